"""Mistakes in a rule of one's own: one sentence each, which says where it is and what to do."""

import functools

import jax
import jax.numpy as jnp
import pytest

import lrules
from tests.small import GLOROT, KEY, NONE, W, X, half_square, mlp

Y = jnp.zeros((4, 3))


def vjp(op, w, x, d):
    return jax.vjp(op, w, x)[1](d)


def message(error, make):
    """What it raises, in one line."""
    with pytest.raises(error) as caught:
        make()
    text = str(caught.value).split("\n--------------------")[0]  # which JAX adds
    assert "\n" not in text
    return text


def used(rule, *, value_and_grad=False):
    feedback = rule.init(KEY, mlp, W, X)
    rng = {"rng": KEY} if rule.stochastic else {}
    if value_and_grad:
        return lrules.value_and_grad(mlp, half_square, rule)(W, feedback, X, Y, **rng)
    return jax.grad(lambda w: lrules.transform(mlp, rule)(w, feedback, X, **rng).sum())(W)


# ------------------------------------------------------------------------------------------------- how they are called

CALLED = {
    "too_few": (
        lambda: lrules.sequential(lambda op, w, x, d: None),
        "backward must take the arguments (op, w, b, x, d, layer), got a function of (op, w, x, d)",
    ),
    "unknown": (
        lambda: lrules.sequential(lambda op, w, b, x, d, layer, stat: None),
        "backward asks for an unknown argument 'stat': after (op, w, b, x, d, layer) it can ask for 'rng', "
        "'state', 'targets', 'elements', 'h', 'y', 'slope' by name",
    ),
    "unknown_keyword": (
        lambda: lrules.direct(lambda e, b, targets, name, *, hidden: None),
        "signal asks for an unknown argument 'hidden'",
    ),
    "of_another": (
        lambda: lrules.direct(lambda e, b, targets, name: e, init=GLOROT, learn=lambda e, b: b),
        "learn must take the arguments (e, h, b), got a function of (e, b)",
    ),
    "gain": (
        lambda: lrules.sequential(lambda *_: None, gain=lambda op, w, x, d, layer, rng: 1),
        "gain asks for an unknown argument 'rng': after (op, w, x, d, layer) it can ask for nothing by name",
    ),
    "no_backward": (
        lambda: lrules.sequential(None),  # type: ignore[arg-type]
        "backward must be a function (op, w, b, x, d, layer), got a NoneType",
    ),
    "numbers": (
        lambda: lrules.sequential(lambda *_: None, numbers=[("a", 1)]),  # type: ignore[arg-type]
        "numbers must be a dict {name: number}, got a list",
    ),
    "no_function": (lambda: lrules.sequential(3), "backward must be a function (op, w, b, x, d, layer), got a int"),
    "modify_error": (
        lambda: lrules.modify_error(lrules.backprop(), lambda signal: signal),
        "modify_error: fn must take the arguments (signal, name, rng), got a function of (signal)",
    ),
    "init_of_state": (
        lambda: lrules.sequential(lambda op, w, b, x, d, layer, state: 0, state=lambda: 0),
        "state must take the arguments (layer), got a function of ()",
    ),
}


@pytest.mark.parametrize("name", CALLED)
def test_arguments_that_a_function_does_not_get(name):
    make, words = CALLED[name]
    assert words in message(TypeError, make)


def test_feedback_weights_that_are_not_drawn():
    rules = {
        "project: b is None": lrules.direct(lambda e, b, targets, name: lrules.extend.project(e, b)),
        "op: the weight is None": lrules.sequential(lambda op, w, b, x, d, layer: (w, op.passed_down(b, x, d), None)),
        "a rule without init= has no": lrules.sequential(lambda op, w, b, x, d, layer: (*vjp(op, b, x, d), None)),
    }
    for words, rule in rules.items():
        assert words in message(TypeError, lambda: used(rule))  # noqa: B023


def test_arguments_that_are_no_keys():
    rule = lrules.sign_symmetry("random")
    f = lrules.transform(mlp, rule)
    for key, words in ((3, "got 3"), (jnp.ones(2), "got a ArrayImpl"), (mlp, "got a function")):
        text = message(TypeError, lambda: f(W, NONE, X, rng=key))  # noqa: B023
        assert text == f"rng must be a key, such as jax.random.key(0), {words}"
    text = message(ValueError, lambda: f(W, NONE, X, rng=jax.random.split(KEY, 3)))
    assert text == "rng must be one key, got keys of shape (3,): give keys[0], or use jax.vmap"
    for made in (lrules.feedback_alignment(), lrules.node_perturbation(0.1), lrules.dual_propagation()):
        text = message(TypeError, lambda: made.init(0, mlp, W, X))  # noqa: B023
        assert text == "the first argument of init must be a key, such as jax.random.key(0), got 0"
        made.init(jax.random.PRNGKey(0), mlp, W, X)
        text = message(TypeError, lambda: made.init(mlp, KEY, W, X))  # noqa: B023
        assert "got a PRNGKeyArray: the order of the arguments is rule.init(key, net, params, inputs)" in text


def test_arguments_with_a_default_keep_it():
    """But None: that is how one writes an argument that may be left out."""

    def backward(op, w, b, x, d, layer, scale=0.5, y=7, *, h=None, rng=None):
        assert y == 7 and rng is not None and (h is None) == (layer.name == "a")
        dw, dx = vjp(op, w, x, d)
        return scale * dw, dx, None

    assert lrules.sequential(backward).stochastic
    halved = used(lrules.sequential(backward))
    plain = used(lrules.sequential(lambda op, w, b, x, d, layer, *, h=None: (*vjp(op, w, x, d), None)))
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, 0.5 * b), halved, plain))


def test_functions_of_all_kinds():
    class Backward:
        def __call__(self, op, w, b, x, d, layer, *, h):
            return *vjp(op, w, x, d), None

    for fn in (
        Backward(),
        lambda *args: (*vjp(args[0], args[1], args[3], args[4]), None),
        functools.partial(lambda scale, op, w, b, x, d, layer: (*vjp(op, w, x, d), None), 1.0),
        jax.tree_util.Partial(lambda op, w, b, x, d, layer: (*vjp(op, w, x, d), None)),
    ):
        used(lrules.sequential(fn))


# ----------------------------------------------------------------------------------------- which options go together

TOGETHER = {
    "learned": (
        lambda: lrules.sequential(lambda *_: None, learned=True),
        "learned=True trains feedback weights, and init draws them",
    ),
    "learn": (
        lambda: lrules.direct(lambda *_: None, learn=lambda *_: None),
        "learn trains feedback weights, and init draws them",
    ),
    "state": (
        lambda: lrules.sequential(lambda op, w, b, x, d, layer, state: 0),
        "asks for state, but the option state is not given",
    ),
    "no_state": (
        lambda: lrules.sequential(lambda *_: None, state=lambda layer: 0),
        "state is given, but backward does not ask for it",
    ),
    "only_learn": (
        lambda: lrules.direct(lambda *_: None, init=GLOROT, learn=lambda e, h, b, state: b, state=lambda shape: 0),
        "signal must ask for it too",
    ),
    "nothing_drawn": (
        lambda: lrules.direct(None, init=GLOROT),
        "signal=None stops the error, so init has no use: leave it out",
    ),
    "nothing_asks": (lambda: lrules.direct(None, numbers={"a": 1}), "the error, so numbers has no use: leave it out"),
    "both": (
        lambda: lrules.direct(lambda *_: None, pullback=lambda *_: lambda e: {}),
        "signal and pullback both say what arrives: give one of them",
    ),
    "taken": (
        lambda: lrules.sequential(lambda op, w, b, x, d, layer, y: 0, numbers={"y": 1.0}),
        "numbers must not have 'y', which every rule can ask for",
    ),
    "unasked": (
        lambda: lrules.sequential(lambda *_: None, numbers={"a": 1}),
        "numbers has 'a', but backward has no argument of this name",
    ),
    "unasked_by_fn": (
        lambda: lrules.modify_error(lrules.backprop(), lambda s, name, rng: s, numbers={"a": 1}),
        "numbers has 'a', but fn has no argument of this name",
    ),
    "empty": (lambda: lrules.sequential(lambda op, w, b, x, d, layer, a: 0, numbers={"a": {}}), "a is an empty dict"),
    "pattern": (
        lambda: lrules.sequential(lambda op, w, b, x, d, layer, a: 0, numbers={"a": {"(": 1}}),
        "'(' is not a regular expression",
    ),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_options_that_do_not_go_together(name):
    make, words = TOGETHER[name]
    assert words in message(ValueError, make)


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        (lambda: lrules.sequential(lambda op, w, b, x, d, layer, targets: 0), "the targets"),
        (lambda: lrules.sequential(lambda op, w, b, x, d, layer, elements: 0), "the loss"),
        (
            lambda: lrules.sequential(lambda op, w, b, x, d, layer, state: 0, state=lambda layer: 0.0),
            "to return its state",
        ),
        (lambda: lrules.direct(lambda e, b, targets, name: e, targets=True), "the targets"),
        (lambda: lrules.direct(lambda *_: 0, init=GLOROT, learn=lambda e, h, b, targets: 0), "the targets"),
        (lambda: lrules.partition({".*": lrules.direct(lambda e, b, targets, name: e, targets=True)}), "the targets"),
    ],
)
def test_what_transform_does_not_have(rule, what):
    text = message(ValueError, lambda: lrules.transform(mlp, rule()))
    assert text == f"this rule needs {what}, so transform cannot serve it: use lrules.value_and_grad(net, loss, rule)"
    with pytest.raises(ValueError, match=what):
        lrules.transform(mlp, lrules.sign_error(rule()))


def test_numbers_for_layers_that_are_not_there():
    def rule(numbers):
        return lrules.sequential(lambda op, w, b, x, d, layer, a: (*vjp(op, w, x, d), None), numbers={"a": numbers})

    text = message(ValueError, lambda: rule({"nothing": 1.0, ".*": 2.0}).init(KEY, mlp, W, X))
    assert text == "a: 'nothing' matches no layer; the layers are 'a', 'b', 'c'"
    text = message(ValueError, lambda: rule({"a|b": 1.0}).init(KEY, mlp, W, X))
    assert text == "a: no pattern matches the layer 'c': add one, such as '.*', at the end"
    within = lrules.partition({"c": lrules.backprop(), ".*": rule({"a|b": 1.0})})
    within.init(KEY, mlp, W, X)  # which asks for those of its own layers
    signal = lambda e, b, targets, name, a: jnp.zeros((4, 6))  # noqa: E731
    text = message(ValueError, lambda: lrules.direct(signal, numbers={"a": {"a": 1.0}}).init(KEY, mlp, W, X))
    assert text == "a: 'a' matches no hidden signal; the hidden signals are 'b', 'c'"
    modified = lrules.modify_error(lrules.backprop(), lambda s, name, rng, a: s, numbers={"a": {"a": 1.0, "b|c": 1}})
    assert "a: 'a' matches no hidden signal; the hidden signals are 'b', 'c'" in message(
        ValueError, lambda: used(modified)
    )


# ---------------------------------------------------------------------------------------------------- what they return

RETURNED = {
    "two": (
        TypeError,
        lambda dw, dx, b: (dw, dx),
        {},
        "backward returned 2 things at the layer 'c': return (dw, dx, db)",
    ),
    "one": (TypeError, lambda dw, dx, b: dw, {}, "backward returned one array at the layer 'c': return (dw, dx, db)"),
    "none": (TypeError, lambda dw, dx, b: None, {}, "backward returned None at the layer 'c'"),
    "dw_shape": (
        ValueError,
        lambda dw, dx, b: (dw.T, dx, None),
        {},
        "backward returned a dw of shape (3, 6) and dtype float32 at the layer 'c', and the weight w has shape (6, 3)",
    ),
    "dw_dtype": (
        ValueError,
        lambda dw, dx, b: (dw.astype(jnp.bfloat16), dx, None),
        {},
        "a dw of shape (6, 3) and dtype bfloat16",
    ),
    "dw_float": (
        TypeError,
        lambda dw, dx, b: (0.0, dx, None),
        {},
        "backward returned one float for dw at the layer 'c'",
    ),
    "dx_shape": (
        ValueError,
        lambda dw, dx, b: (dw, dx[:, :2], None),
        {},
        "backward returned a dx of shape (4, 2) and dtype float32 at the layer 'c', and x has shape (4, 6)",
    ),
    "dx_dtype": (
        ValueError,
        lambda dw, dx, b: (dw, dx.astype(jnp.float16), None),
        {},
        "a dx of shape (4, 6) and dtype float16",
    ),
    "dx_structure": (TypeError, lambda dw, dx, b: (dw, (dx, dx), None), {}, "return that of x"),
    "db": (ValueError, lambda dw, dx, b: (dw, dx, dw), {}, "give learned=True, or return None for db"),
    "db_fixed": (ValueError, lambda dw, dx, b: (dw, dx, dw), {"init": GLOROT}, "the rule's feedback is fixed"),
    "no_db": (
        ValueError,
        lambda dw, dx, b: (dw, dx, None),
        {"init": GLOROT, "learned": True},
        "backward returned None for db at the layer 'c', and the rule has learned=True",
    ),
    "db_shape": (
        ValueError,
        lambda dw, dx, b: (dw, dx, dw.T),
        {"init": GLOROT, "learned": True},
        "backward returned a db of shape (3, 6) and dtype float32 at the layer 'c', and the feedback weight b",
    ),
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_backward_returns(name):
    error, made, options, words = RETURNED[name]
    rule = lrules.sequential(lambda op, w, b, x, d, layer: made(*vjp(op, w, x, d), b), **options)
    assert words in message(error, lambda: used(rule))
    asking = lrules.sequential(lambda op, w, b, x, d, layer, y: made(*vjp(op, w, x, d), b), **options)
    assert words in message(error, lambda: used(asking))


def test_nothing_may_go_down():
    """None for dw and dx are zeros, as for JAX."""
    grads = used(lrules.sequential(lambda op, w, b, x, d, layer: (vjp(op, w, x, d)[0], None, None)))
    assert jnp.any(grads["c"]) and not jnp.any(grads["a"])


SENT = {
    "none": (
        TypeError,
        lambda e, b: None,
        "signal returned None at the hidden signal 'b': return an array of shape (4, 6)",
    ),
    "float": (TypeError, lambda e, b: 0.0, "signal returned one float at the hidden signal 'b'"),
    "two": (TypeError, lambda e, b: (e @ b, b), "signal returned 2 things at the hidden signal 'b'"),
    "shape": (
        ValueError,
        lambda e, b: e,
        "signal returned an array of shape (4, 3) at the hidden signal 'b': return one of shape (4, 6)",
    ),
    "broadcast": (ValueError, lambda e, b: (e @ b)[:1], "signal returned an array of shape (1, 6)"),
}


@pytest.mark.parametrize("name", SENT)
def test_what_signal_returns(name):
    error, made, words = SENT[name]
    assert words in message(error, lambda: used(lrules.direct(lambda e, b, t, name: made(e, b), init=GLOROT)))
    asking = lrules.direct(lambda e, b, t, name, h: made(e, b), init=GLOROT)
    assert words in message(error, lambda: used(asking))


@pytest.mark.parametrize(
    ("made", "error", "words"),
    [
        (None, TypeError, "learn returned None for the feedback weight of 'b'"),
        (
            0.0,
            TypeError,
            "learn returned one float for the feedback weight of 'b': return its gradient, of shape (3, 6)",
        ),
        (jnp.zeros((6, 3)), ValueError, "learn returned an array of shape (6, 3) for the feedback weight of 'b'"),
    ],
)
def test_what_learn_returns(made, error, words):
    rule = lrules.direct(lambda e, b, t, name: e @ b, init=GLOROT, learn=lambda e, h, b: made)
    assert words in message(error, lambda: used(rule))


def test_what_is_returned_as_state():
    def backward(made):
        return lambda op, w, b, x, d, layer, state: (*vjp(op, w, x, d), None, *made(state))

    for made, error, words in [
        (
            lambda s: (),
            TypeError,
            "backward returned 3 things at the layer 'c': return (dw, dx, db, state), as it asks",
        ),
        (lambda s: (None,), TypeError, "backward, at the layer 'c', returned a state of the structure"),
        (lambda s: (s[None],), ValueError, "backward, at the layer 'c', returned a state of shape (1, 3)"),
    ]:
        rule = lrules.sequential(backward(made), state=lambda layer: jnp.zeros(layer.output.aval.shape[1]))
        assert words in message(error, lambda: used(rule, value_and_grad=True))  # noqa: B023
    for signal, error, words in [
        (lambda e, b, t, name, state: e @ b, TypeError, "signal asks for state, and returned one array at the hidden"),
        (
            lambda e, b, t, name, state: (e @ b, state[:1]),
            ValueError,
            "signal, at the hidden signal 'b', returned a st",
        ),
    ]:
        rule = lrules.direct(signal, init=GLOROT, state=lambda shape: jnp.zeros(shape))
        assert words in message(error, lambda: used(rule, value_and_grad=True))  # noqa: B023


def test_another_networks_state():
    rule = lrules.sequential(
        lambda op, w, b, x, d, layer, state: (*vjp(op, w, x, d), None, state),
        state=lambda layer: jnp.zeros(layer.output.aval.shape[1]),
    )
    step = lrules.value_and_grad(mlp, half_square, rule)
    feedback = rule.init(KEY, mlp, W, X)
    for state in ((), {"a": feedback.state["a"]}, {**feedback.state, "a": jnp.zeros(3)}):
        text = message(ValueError, lambda: step(W, NONE._replace(state=state), X, Y))  # noqa: B023
        assert "feedback.state was made for another rule or network: make it with rule.init" in text


def test_whole_batches_and_single_examples():
    """What belongs to the whole batch cannot be given to one example of it."""
    rule = lrules.sequential(lambda op, w, b, x, d, layer, rng: (*vjp(op, w, x, d), None))
    text = message(NotImplementedError, lambda: used(lrules.quantize_update(rule, 3)))
    assert "the rule of the layer 'a' asks for 'rng', which belongs to the whole batch" in text
    used(lrules.quantize_update(lrules.sequential(lambda op, w, b, x, d, layer, y: (*vjp(op, w, x, d), None)), 3))


@pytest.mark.parametrize("what", ["state", "targets"])
def test_inside_a_shard_map_of_the_network(what):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def net(p, x):
        inner = jax.shard_map(lambda w, x: jnp.tanh(x @ w), mesh=mesh, in_specs=(whole, rows), out_specs=rows)
        return inner(p["a"], x) @ p["c"]

    backward = {"state": lambda op, w, b, x, d, layer, state: 0, "targets": lambda op, w, b, x, d, layer, targets: 0}
    options = {"state": {"state": lambda layer: 0.0}, "targets": {}}
    rule = lrules.sequential(backward[what], **options[what])
    text = message(NotImplementedError, lambda: rule.init(KEY, net, {n: W[n] for n in "ac"}, X))
    assert f"the layer 'a' lies inside a shard_map of the network, where its rule cannot be given the {what}" in text
