"""Bad input and constructs that cannot be served: one sentence that names the thing and the remedy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import lrules
from tests import bridge

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 5))
NONE = lrules.Feedback({}, {})
W = {"a": jnp.ones((5, 6)), "b": jnp.ones((6, 6)), "c": jnp.ones((6, 3))}
GLOROT = jax.nn.initializers.glorot_normal()
FA, DFA, BACKMAN = lrules.feedback_alignment(), lrules.direct_feedback_alignment(), lrules.backman()


def mlp(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


def half_square(y, t):
    return 0.5 * jnp.sum((y - t) ** 2, -1)


def refused(apply, *words, rule=FA, error=NotImplementedError, params=W, inputs=X):
    with pytest.raises(error) as caught:
        rule.init(KEY, apply, params, inputs)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# ------------------------------------------------------------------------------------------------------ constructs


def test_parameter_in_a_carry():
    def apply(p, x):
        step = lambda c, _: ((jnp.tanh(c[0] @ c[1]), 0.9 * c[1]), None)  # noqa: E731
        (h, _), _ = lax.scan(step, (x @ p["a"], p["b"]), None, length=2)
        return h @ p["c"]

    refused(apply, "'b'", "carry", "xs")
    lrules.backprop().init(KEY, apply, W, X)


def test_layer_in_a_while_loop():
    def apply(p, x):
        def body(state):
            i, h = state
            return i + 1, jnp.tanh(h @ p["b"])

        return lax.while_loop(lambda s: s[0] < 2, body, (0, x @ p["a"]))[1] @ p["c"]

    for rule in (FA, DFA, BACKMAN):
        refused(apply, "'b'", "while", "lax.fori_loop", rule=rule)
    rule = lrules.partition({"^b$": lrules.backprop(), ".*": FA})
    f = lrules.transform(apply, rule)
    feedback = rule.init(KEY, apply, W, X)
    assert f(W, feedback, X).shape == (4, 3)
    assert set(feedback.fixed) == {"c"}


@jax.custom_vjp
def vjp_dense(w, x):
    return x @ w


@jax.custom_jvp
def jvp_dense(w, x):
    return x @ w


vjp_dense.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, d: (r[1].T @ d, d @ r[0].T))
jvp_dense.defjvps(lambda dw, y, w, x: x @ dw, lambda dx, y, w, x: dx @ w)


def is_layer(apply, layers, params, inputs=X):
    """Feedback alignment with the weights as feedback is jax.grad, and with zeros nothing arrives below."""
    assert [row["layer"] for row in lrules.describe(apply, FA, params, inputs).layers] == layers
    feedback = FA.init(KEY, apply, params, inputs)
    assert list(feedback.fixed) == layers[1:]
    weights = feedback._replace(fixed={name: params[name] for name in feedback.fixed})
    gradient = lambda f: jax.grad(lambda p: jnp.sum(jnp.sin(f(p))))(params)  # noqa: E731
    f = lrules.transform(apply, FA)
    bridge.close(gradient(lambda p: f(p, weights, inputs)), gradient(lambda p: apply(p, inputs)), 1e-5)
    zero_below(apply, params, inputs)


@pytest.mark.parametrize("dense", [vjp_dense, jvp_dense])
def test_layer_in_a_function_with_its_own_derivative(dense):
    """One product of one weight and data: the function is the layer."""
    params = {name: GLOROT(jax.random.fold_in(KEY, i), w.shape) for i, (name, w) in enumerate(W.items())}
    apply = lambda p, x: jnp.tanh(dense(p["b"], x @ p["a"])) @ p["c"]  # noqa: E731
    is_layer(apply, ["a", "b", "c"], params)
    assert set(DFA.init(KEY, apply, params, X).fixed) == {"b", "c"}
    BACKMAN.init(KEY, apply, params, X)


def _own(function, backward):
    """A function whose own derivative is `backward(w, x, d) -> (dw, dx)`."""
    made = jax.custom_vjp(function)
    made.defvjp(lambda w, x: (function(w, x), (w, x)), lambda r, d: backward(*r, d))
    return made


def _true(function):
    return _own(function, lambda w, x, d: jax.vjp(function, w, x)[1](d))


MORE_THAN_ONE_LAYER = {
    "two products of one weight": (_true(lambda w, x: jnp.tanh(x @ w) @ w), lambda p: p["b"]),
    "a bias": (_true(lambda wb, x: x @ wb[0] + wb[1]), lambda p: (p["b"], p["t"])),
    "two weights": (_true(lambda wb, x: jnp.tanh(x @ wb[0]) @ wb[1]), lambda p: (p["b"], p["b2"])),
    "a product by hand": (_true(lambda w, x: (x[:, :, None] * w[None]).sum(1)), lambda p: p["b"]),
    "a product and one by hand": (_true(lambda w, x: x @ w + (x[:, :, None] * w[None]).sum(1)), lambda p: p["b"]),
    "a product in a while loop": (
        _own(
            lambda w, x: lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] @ w), (0, x))[1],
            lambda w, x, d: (x.T @ d, d @ w.T),
        ),
        lambda p: p["b"],
    ),
}


@pytest.mark.parametrize("rule", [FA, DFA, BACKMAN])
@pytest.mark.parametrize("name", MORE_THAN_ONE_LAYER)
def test_more_than_one_layer_in_a_function_with_its_own_derivative(name, rule):
    function, weights = MORE_THAN_ONE_LAYER[name]
    params = W | {"b2": W["b"], "t": jnp.ones((1, 6))}
    apply = lambda p, x: jnp.tanh(function(weights(p), x @ p["a"])) @ p["c"]  # noqa: E731
    refused(apply, "'b'", "custom_vjp" if "hand" not in name else "summed", "backprop", params=params, rule=rule)


def test_unknown_primitive():
    def apply(p, x):
        return lax.linalg.triangular_solve(p["b"], x @ p["a"], left_side=False) @ p["c"]

    refused(apply, "'b'", "triangular_solve", "dot_general")


def test_product_summed_by_hand():
    def apply(p, x):
        h = jnp.tanh(x @ p["a"])
        return (h[:, :, None] * p["b"][None]).sum(1) @ p["c"]

    refused(apply, "'b'", "summed", "einsum")

    def one_neuron(p, x):
        return (jnp.tanh(x @ p["a"]) * p["v"][None]).sum(1, keepdims=True)

    refused(one_neuron, "'v'", "summed", params={"a": W["a"], "v": jnp.ones(6)})


def test_normalisation_is_no_product_summed_by_hand():
    """A scale followed by a mean over other axes, or by the next normalisation after its bias, is served."""

    def norm(scale, bias, x):
        x = x - x.mean(-1, keepdims=True)
        return x * scale[None] + bias[None]

    def apply(p, x):
        h = norm(p["s"], p["t"], x @ p["a"])
        h = norm(p["s"], p["t"], h)
        return jnp.tanh(h * p["s"][None]) @ p["c"]

    FA.init(KEY, apply, {**W, "s": jnp.ones(6), "t": jnp.ones(6)}, X)

    def pooled(p, x):
        h = jnp.stack([x @ p["a"]] * 2, 1) * p["s"][None, None]
        return h.mean(1) @ p["c"]

    FA.init(KEY, pooled, {**W, "s": jnp.ones(6)}, X)


def test_direct_rules_in_a_branch():
    def apply(p, x):
        h = jnp.tanh(x @ p["a"])
        return lax.cond(h.sum() > 0, lambda h: h @ p["b"], lambda h: h, h) @ p["c"]

    refused(apply, "'b'", "cond", "sequential", rule=DFA)
    FA.init(KEY, apply, W, X)


def test_disagreeing_rules_of_one_signal():
    def apply(p, x):
        h = jnp.tanh(x @ p["a"])
        return jnp.tanh(h @ p["b"]) @ p["c"] + h @ p["c"]

    rule = lrules.partition({"b": DFA, ".*": FA})
    refused(apply, "'b'", "'c'", "hidden signal", rule=rule, error=ValueError)
    two = lrules.partition({"b": DFA, ".*": lrules.direct_feedback_alignment()})
    refused(apply, "disagree", rule=two, error=ValueError)
    lrules.partition({"b": FA, "c": BACKMAN, ".*": lrules.backprop()}).init(KEY, apply, W, X)


# ------------------------------------------------------------------------------------------------------- bad input


def test_no_layer():
    refused(lambda p, x: x * p["v"][None], "no layer found", "arguments", error=ValueError, params={"v": jnp.ones(5)})
    refused(lambda p, x: x @ jnp.ones((5, 3)), "no layer found", error=ValueError)
    lrules.backprop().init(KEY, lambda p, x: x, W, X)


def test_batch_axes():
    refused(lambda p, x: mlp(p, x).sum(0), "no batch axis", "has_aux", rule=DFA, error=ValueError)
    refused(lrules.Network(mlp, batch_axes=None), "batch_axes", rule=DFA, error=ValueError)
    refused(lrules.Network(mlp, batch_axes=7), "no batch axis 7", "batch_axes", rule=DFA, error=ValueError)
    refused(lrules.Network(mlp, batch_axes={"x": 0}), "no prefix", rule=DFA, error=ValueError)
    uneven = lrules.Network(lambda p, x: mlp(p, x[0]) + x[1].sum())
    refused(uneven, "differ in size", "batch_axes", rule=DFA, error=ValueError, inputs=(X, jnp.ones(3)))

    def mixed(p, x):  # a hidden signal that holds the batch along two axes
        h = jnp.tanh(x @ p["a"])
        return jnp.tanh((h @ h.T) @ (h @ p["b"])) @ p["c"]

    DFA.init(KEY, mixed, W, X)


def test_loss_with_another_batch():
    step = lrules.value_and_grad(mlp, lambda y, t: half_square(y, t).mean(), FA)
    feedback = FA.init(KEY, mlp, W, X)
    with pytest.raises(ValueError, match="one loss per example"):
        step(W, feedback, X, jnp.zeros((4, 3)))
    step = lrules.value_and_grad(mlp, lambda y, t: half_square(y, t)[:2], FA)
    with pytest.raises(ValueError, match="4 examples"):
        step(W, feedback, X, jnp.zeros((4, 3)))


@pytest.mark.parametrize("bad", [jnp.ones((5, 6), jnp.int32), 3.0, "weights"])
def test_parameters_that_are_no_float_arrays(bad):
    params = {**W, "a": bad}
    for call in (
        lambda: FA.init(KEY, mlp, params, X),
        lambda: lrules.transform(mlp, FA)(params, NONE, X),
        lambda: lrules.value_and_grad(mlp, half_square, FA)(params, NONE, X, X),
    ):
        with pytest.raises(TypeError, match="the parameter 'a' .*inputs"):
            call()


def test_feedback_of_another_network():
    feedback = FA.init(KEY, mlp, W, X)
    f = lrules.transform(mlp, FA)
    with pytest.raises(ValueError, match="no entry 'b'.*rule.init"):
        f(W, NONE, X)
    with pytest.raises(ValueError, match="entry 'z'.*rule.init"):
        f(W, feedback._replace(fixed={**feedback.fixed, "z": X}), X)
    with pytest.raises(ValueError, match=r"'b' has shape \(4, 5\).*\(6, 6\).*rule.init"):
        f(W, feedback._replace(fixed={**feedback.fixed, "b": X}), X)
    with pytest.raises(ValueError, match="rule.init"):
        lrules.transform(mlp, DFA)(W, feedback, X)


def test_feedback_that_another_rule_would_learn():
    fixed = FA.init(KEY, mlp, W, X)
    learned = lrules.kolen_pollack().init(KEY, mlp, W, X)
    with pytest.raises(ValueError, match="is fixed, and this rule learns it.*make it anew"):
        lrules.transform(mlp, lrules.kolen_pollack())(W, fixed, X)
    with pytest.raises(ValueError, match="is learned, and this rule keeps it as it is"):
        lrules.transform(mlp, FA)(W, learned, X)
    with pytest.raises(TypeError, match="the feedback is a NoneType, not an lrules.Feedback"):
        lrules.transform(mlp, lrules.backprop())(W, None, X)


def test_rng():
    feedback = FA.init(KEY, mlp, W, X)
    with pytest.raises(ValueError, match="no randomness: leave rng= out"):
        lrules.transform(mlp, FA)(W, feedback, X, rng=KEY)
    with pytest.raises(ValueError, match="rng=jax.random.key"):
        lrules.transform(mlp, FA._replace(stochastic=True))(W, feedback, X)


def test_rule_that_needs_the_targets():
    rule = lrules.direct(lambda e, b, targets, name: targets @ b, init=jax.nn.initializers.normal(), targets=True)
    with pytest.raises(ValueError, match="value_and_grad"):
        lrules.transform(mlp, rule)
    feedback = rule.init(KEY, mlp, W, X)
    _, grads = lrules.value_and_grad(mlp, half_square, rule)(W, feedback, X, jnp.ones((4, 3)))
    assert all(jnp.any(g) for g in jax.tree.leaves(grads.params))


def test_feedback_above_the_limit():
    rule = lrules.direct_feedback_alignment(max_feedback_bytes=100)
    refused(mlp, "144 bytes", "max_feedback_bytes", "at=", "shared_axes", "rank=", rule=rule, error=ValueError)
    wide = W | {"c": jnp.ones((6, 30))}
    for remedy in ({"at": "b"}, {"rank": 1}, {"max_feedback_bytes": 1440}):
        most = {"max_feedback_bytes": 720} | remedy
        lrules.direct_feedback_alignment(**most).init(KEY, mlp, wide, X)
    shared = lrules.direct_feedback_alignment(shared_axes=1, max_feedback_bytes=144)
    shared.init(KEY, mlp, W, jnp.ones((4, 7, 5)))


@pytest.mark.parametrize(
    "make",
    [
        lrules.monotone_dfa,
        lambda **more: lrules.node_perturbation(0.1, channel="direct", **more),
        lrules.random_target_projection,
        lambda **more: lrules.direct(lambda e, b, t, n: e @ b, init=GLOROT, offers=(), **more),
    ],
)
def test_no_remedy_that_the_rule_does_not_have(make):
    with pytest.raises(ValueError, match="raise max_feedback_bytes$"):
        make(max_feedback_bytes=100).init(KEY, mlp, W, X)
    make(max_feedback_bytes=144).init(KEY, mlp, W, X)

    def reversed_examples(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"] @ p["c"] + (jnp.sin(x @ p["a"])[::-1] @ p["b"])[::-1] @ p["c"]

    with pytest.raises(ValueError, match="batch axis .* cannot be told .*: write the network so") as caught:
        make().init(KEY, reversed_examples, W, X)
    assert "at=" not in str(caught.value) and "partition" not in str(caught.value)
    refused(reversed_examples, "partition", "at=", rule=DFA, error=ValueError)


@pytest.mark.parametrize("rule", [FA, DFA, lrules.node_perturbation(0.1, channel="direct", solver="rls")])
def test_feedback_restored_as_a_dict(rule):
    """What a checkpoint gives back without the structure that was saved; the remedy works."""
    feedback = rule.init(KEY, mlp, W, X)
    restored = dict(feedback._asdict())
    step = lrules.value_and_grad(mlp, half_square, rule)
    rng = {"rng": KEY} if rule.stochastic else {}
    wanted = step(W, feedback, X, jnp.ones((4, 3)), **rng)
    for given in (restored, {k: v for k, v in restored.items() if k != "state" or v}):
        with pytest.raises(
            TypeError, match=r"the feedback is a dict, .*: make one of it, lrules.Feedback\(\*\*restored\)"
        ):
            step(W, given, X, jnp.ones((4, 3)), **rng)
        got = step(W, lrules.Feedback(**given), X, jnp.ones((4, 3)), **rng)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, got, wanted))
    with pytest.raises(TypeError, match=r"make it with rule.init\(key, net, params, inputs\)"):
        step(W, restored["fixed"], X, jnp.ones((4, 3)), **rng)


@pytest.mark.foreign
def test_a_whole_equinox_model_as_parameters():
    """Its functions and numbers are no parameters; taken apart as the message says, it is served."""
    model = eqx.nn.Sequential([eqx.nn.Linear(5, 6, key=KEY), eqx.nn.Lambda(jnp.tanh), eqx.nn.Linear(6, 3, key=KEY)])
    apply = lambda model, x: jax.vmap(model)(x)  # noqa: E731
    for step in (lambda: FA.init(KEY, apply, model, X), lambda: lrules.transform(apply, FA)(model, NONE, X)):
        with pytest.raises(
            TypeError, match=r"not an array: .* params, static = eqx.partition\(model, eqx.is_inexact_array"
        ):
            step()
    params, static = eqx.partition(model, eqx.is_inexact_array)
    whole = lambda p, x: apply(eqx.combine(p, static), x)  # noqa: E731
    feedback = FA.init(KEY, whole, params, X)
    grads = lrules.value_and_grad(whole, half_square, FA)(params, feedback, X, jnp.ones((4, 3)))[1].params
    assert all(jnp.any(g) for g in jax.tree.leaves(grads))


def test_nowhere_to_land():
    with pytest.raises(ValueError, match="at= names no place"):
        lrules.direct_feedback_alignment(at=[])


def test_options():
    for alpha in ("norm", "1", None, True, -1, float("nan"), float("inf"), jnp.ones(2)):
        with pytest.raises(ValueError, match='a finite number >= 0 or "gradient_norm"'):
            lrules.backman(alpha)
    lrules.backman(jnp.float32(0.5))
    jax.jit(lambda alpha: lrules.transform(mlp, lrules.backman(alpha))(W, NONE, X))(0.5)
    with pytest.raises(TypeError, match='axis_name=3 names no mesh axes: give "data"'):
        lrules.backman(axis_name=3)
    with pytest.raises(ValueError, match='neither "mean" nor "sum"'):
        lrules.transform(mlp, FA, reduction="none")
    with pytest.raises(ValueError, match="at='nothing' matches no hidden signal.*'b', 'c'"):
        lrules.direct_feedback_alignment(at="nothing").init(KEY, mlp, W, X)
    with pytest.raises(TypeError, match="has_aux=True"):
        FA.init(KEY, lrules.Network(mlp, has_aux=True), W, X)


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"shared_axes": [(1, 1, 1)]}, r"shared_axes must be an axis of the outputs, .* got \[\(1, 1, 1\)\]"),
        ({"shared_axes": "1"}, "shared_axes must be .* got '1'"),
        ({"shared_axes": 1.5}, "shared_axes must be .* got 1.5"),
        ({"shared_axes": True}, "shared_axes must be .* got True"),
        ({"shared_axes": None}, "shared_axes must be .* got None"),
        ({"shared_axes": [(1, "2")]}, "shared_axes must be .* got"),
        ({"shared_axes": [(1, "loop")]}, "shared_axes must be .* got"),
        ({"shared_axes": (1, 1)}, r"names the axis 1 of the outputs twice, got \(1, 1\): .* give pairs in a list"),
        ({"shared_axes": [1, (1, 2)]}, "names the axis 1 of the outputs twice"),
        ({"max_feedback_bytes": None}, "max_feedback_bytes must be a number >= 0 or inf, got None"),
        ({"max_feedback_bytes": "1G"}, "max_feedback_bytes must be a number >= 0 or inf, got '1G'"),
        ({"max_feedback_bytes": float("nan")}, "max_feedback_bytes must be .* got nan"),
        ({"at": 3}, "at=3 is no regular expression"),
        ({"at": ["b", None]}, "at=None is no regular expression"),
        ({"at": "("}, r"at='\(' is no regular expression"),
        ({"rank": True}, "rank must be an integer >= 1 or None, got True"),
        ({"rank": "2"}, "rank must be an integer >= 1 or None, got '2'"),
        ({"adaptive": "yes"}, "adaptive='yes' is neither True nor False"),
    ],
)
def test_options_of_direct_rules(option, match):
    with pytest.raises(ValueError, match=match):
        lrules.direct_feedback_alignment(**option)


def test_a_rank_without_feedback_weights():
    with pytest.raises(ValueError, match="rank=2 makes feedback weights .* init= draws"):
        lrules.direct(lambda e, b, targets, name: e, rank=2)


def test_options_that_are_flags():
    with pytest.raises(ValueError, match="adaptive=1 is neither True nor False"):
        lrules.feedback_alignment(adaptive=1)
    with pytest.raises(ValueError, match="learned='no' is neither"):
        lrules.sequential(lambda *_: None, learned="no")


RULES_WITH_INIT = {
    "feedback_alignment": lrules.feedback_alignment,
    "direct": lrules.direct_feedback_alignment,
    "rank": lambda init: lrules.direct_feedback_alignment(init, rank=2),
    "monotone": lrules.monotone_dfa,
    "kolen_pollack": lrules.kolen_pollack,
    "sign_symmetry": lambda init: lrules.sign_symmetry("fixed", init=init),
    "targets": lrules.random_target_projection,
    "sequential": lambda init: lrules.sequential(lambda *_: None, init=init),
    "own direct": lambda init: lrules.direct(lambda *_: None, init=init),
    "shifted": lambda init: lrules.feedback_alignment(lrules.feedback.shifted(0.1, init=init)),
    "congruent": lambda init: lrules.feedback_alignment(lrules.feedback.congruent(init)),
}


@pytest.mark.parametrize(
    ("init", "error", "match"),
    [
        ("glorot", TypeError, "init= is a str, not an initializer: give a function"),
        (jnp.ones((6, 6)), TypeError, "init= is a .*Array.*, not an initializer: give a function"),
        (jax.nn.initializers.glorot_normal, TypeError, "init= made a function in place of .*: call its factory first"),
        (lambda key, shape, dtype: None, TypeError, "init= made a NoneType in place of an array of shape"),
        (lambda key, shape, dtype: GLOROT(key, (2, 2), dtype), ValueError, r"made an array of shape \(2, 2\) and"),
        (lambda key, shape, dtype: jnp.ones(shape, int), ValueError, "dtype int32 in place of one of shape .* float32"),
    ],
)
@pytest.mark.parametrize("name", RULES_WITH_INIT)
def test_what_is_no_initializer(name, init, error, match):
    with pytest.raises(error, match=match):
        RULES_WITH_INIT[name](init).init(KEY, mlp, W, X)


def test_partition():
    with pytest.raises(TypeError, match="partition: rules must be a dict {pattern: rule}, got a list"):
        lrules.partition([(".*", FA)])
    with pytest.raises(ValueError, match="3 is no regular expression"):
        lrules.partition({3: FA})
    with pytest.raises(ValueError, match="'d' matches no layer; the layers are 'a', 'b', 'c'"):
        lrules.partition({"d": FA, ".*": FA}).init(KEY, mlp, W, X)
    with pytest.raises(ValueError, match="'b' is shadowed"):
        lrules.partition({".*": FA, "b": FA}).init(KEY, mlp, W, X)
    with pytest.raises(ValueError, match="no pattern matches the layer 'a'"):
        lrules.partition({"b|c": FA}).init(KEY, mlp, W, X)
    with pytest.raises(ValueError, match="no regular expression"):
        lrules.partition({"(": FA})
    with pytest.raises(ValueError, match="call its factory"):
        lrules.partition({".*": lrules.feedback_alignment})
    with pytest.raises(ValueError, match="acts on the network as a whole"):
        lrules.partition({".*": lrules.dual_propagation()})
    with pytest.raises(ValueError, match="at least one rule"):
        lrules.partition({})


# ------------------------------------------------------------------------ weights and layers in disguise: never silent


def zero_below(apply, params, inputs=X, rule=None):
    """With feedback of zero nothing arrives below a hidden signal: the parameter `a` gets no gradient."""
    rule = rule or lrules.feedback_alignment(init=jax.nn.initializers.zeros)
    feedback = rule.init(KEY, apply, params, inputs)
    f = lrules.transform(apply, rule)
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(f(p, feedback, inputs))))(params)
    assert feedback.fixed and not jnp.any(grads["a"])


def test_weights_that_meet_what_has_no_batch():
    """A weight masked by a key, a mask or a flag among the inputs stays a weight."""

    def masked(p, inputs):
        x, key = inputs
        keep = jax.random.bernoulli(key, 0.5, p["b"].shape).astype(jnp.float32)
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ (p["b"] * keep)) @ p["c"]

    zero_below(lrules.Network(masked, batch_axes=(0, None)), W, (X, KEY))

    def chosen(p, inputs):
        x, task = inputs
        return jnp.tanh(x @ p["a"]) @ p["tasks"][task]

    params = {"a": W["a"], "tasks": jnp.ones((2, 6, 3))}
    zero_below(lrules.Network(chosen, batch_axes=(0, None)), params, (X, jnp.asarray(1)))


H = lambda p, x: jnp.tanh(x @ p["a"])  # noqa: E731
BY_HAND = {
    "scaled": lambda h, w: (0.5 * (h[:, :, None] * w[None])).sum(1),
    "mean": lambda h, w: (h[:, :, None] * w[None]).mean(1),
    "masked": lambda h, w: jnp.sum(h[:, :, None] * w[None], 1, where=(jnp.arange(6) < 5)[None, :, None]),
    "dot_without_contraction": lambda h, w: jnp.einsum("bi,ij->bij", h, w).sum(1),
    "summed_by_a_dot": lambda h, w: jnp.einsum("bij,i->bj", h[:, :, None] * w[None], jnp.ones(6)),
    "cumsum": lambda h, w: jnp.cumsum(h[:, :, None] * w[None], 1)[:, -1],
    "row_by_row": lambda h, w: sum(h[:, i : i + 1] * w[i][None] for i in range(6)),
    "in_a_loop": lambda h, w: lax.fori_loop(
        0, 6, lambda i, s: s + lax.dynamic_slice_in_dim(h, i, 1, 1) * w[i][None], jnp.zeros((4, 3))
    ),
    "shifts": lambda h, w: sum(jnp.pad(h, ((0, 0), (i, 0)))[:, :6] * w[i, 0] for i in range(3)),
    "quotient": lambda h, w: (h[:, :, None] / w[None]).sum(1),
    "outer": lambda h, w: jnp.trace(jnp.tensordot(h, w, 0), axis1=1, axis2=2),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_products_summed_by_hand(name):
    for rule in (FA, DFA, BACKMAN):
        refused(lambda p, x: BY_HAND[name](H(p, x), p["c"]), "'c'", "summed", "einsum", rule=rule)


def test_scales_are_no_products_summed_by_hand():
    """Normalisations without bias, mixing with a previous token, gated pooling, scaled residuals: all served."""

    def norm(x, scale):
        x = x - x.mean(-1, keepdims=True)
        return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale[None]

    params = {**W, "g": jnp.ones(6)}
    zero_below(lambda p, x: norm(norm(x @ p["a"], p["g"]), p["g"]) @ p["c"], params)
    zero_below(lambda p, x: (H(p, x) * p["g"][None] + jnp.roll(H(p, x), 1, 1) * (1 - p["g"][None])) @ p["c"], params)
    zero_below(lambda p, x: ((H(p, x) * p["g"][None]).mean(-1, keepdims=True) * H(p, x)) @ p["c"], params)
    zero_below(lambda p, x: (x @ p["a"] + H(p, x) * p["g"][None]) @ p["c"], params)


def test_matrices_looked_up_for_each_example():
    """They are the weight of a layer, chosen by data; BackMAN alone has no norm of a neuron of the whole batch."""

    def experts(p, inputs):
        x, index = inputs
        return jnp.einsum("bi,bio->bo", H(p, x), p["experts"][index])

    params = {"a": GLOROT(KEY, (5, 6)), "experts": GLOROT(KEY, (3, 6, 3))}
    inputs = (X, jnp.arange(4) % 3)
    is_layer(experts, ["a", "experts"], params, inputs)
    refused(experts, "'experts'", "chosen for each example", "select among", rule=BACKMAN, params=params, inputs=inputs)


def test_inputs_closed_over():
    """The nodes of one graph, of which the inputs name some: layers, in which all nodes' errors add up."""
    nodes, graph = jax.random.normal(KEY, (7, 5)), jnp.eye(7) + jnp.eye(7, k=1)
    apply = lambda p, ids: (graph @ jnp.tanh(graph @ nodes @ p["a"]) @ p["c"])[ids]  # noqa: E731
    params, ids = {"a": GLOROT(KEY, (5, 6)), "c": GLOROT(KEY, (6, 3))}, jnp.arange(3)
    is_layer(apply, ["a", "c"], params, ids)
    refused(apply, "signal_axes={'outputs': 0}", "segment_sum", rule=DFA, error=ValueError, params=params, inputs=ids)
    stated = lrules.Network(apply, signal_axes={"outputs": 0})
    assert {k: v.shape for k, v in DFA.init(KEY, stated, params, ids).fixed.items()} == {"c": (3, 7, 6)}
    assert [row["shape"] for row in lrules.describe(stated, DFA, params, ids).hidden] == [(7, 6)]


def test_two_parameters_of_one_name():
    params = {"v": {"w": jnp.ones((5, 3))}, "v/w": jnp.ones((3, 3))}
    refused(lambda p, x: x @ p["v"]["w"] @ p["v/w"], "two parameters", "'v/w'", error=ValueError, params=params)


T = 3
SEQUENCES = jax.random.normal(KEY, (4, T, 5))


def reached(apply, params, x):
    """The examples that get a signal when only example 0 is wrong."""
    feedback = DFA.init(KEY, apply, params, x)
    y, pull = jax.vjp(lambda x: lrules.transform(apply, DFA)(params, feedback, x), x)
    (d,) = pull(jnp.zeros_like(y).at[0].set(1.0))
    return [i for i in range(len(x)) if jnp.any(d[i])]


def test_merged_axes_keep_the_order_of_the_examples():
    def batch_first(p, x):
        return jnp.tanh(H(p, x.reshape(-1, 5)) @ p["b"]).reshape(-1, T, 6).mean(1) @ p["c"]

    def time_first(p, x):
        h = jnp.tanh(H(p, x.transpose(1, 0, 2).reshape(-1, 5)) @ p["b"])
        return h.reshape(T, -1, 6).mean(0) @ p["c"]

    for apply in (batch_first, time_first):
        for x in (SEQUENCES, SEQUENCES[:1]):
            assert reached(apply, {k: v * 0.1 for k, v in W.items()}, x) == [0]


def test_examples_in_another_order():
    """Where examples were concatenated, reversed or sorted, direct feedback would reach the wrong ones: refused."""

    def steps_in_turn(p, x):
        e = H(p, x.reshape(-1, 5)).reshape(-1, T, 6)
        e = jnp.concatenate([e[:, t] for t in range(T)], 0)
        return jnp.tanh(e @ p["b"]).reshape(T, -1, 6).mean(0) @ p["c"]

    def reversed_inside(p, x):
        return (jnp.tanh(H(p, x[:, 0])[::-1] @ p["b"]) @ p["c"])[::-1]

    def sorted_inside(p, x):
        order = jnp.argsort(x[:, 0, 0])
        return (jnp.tanh(H(p, x[:, 0])[order] @ p["b"]) @ p["c"])[jnp.argsort(order)]

    for apply in (steps_in_turn, reversed_inside, sorted_inside):
        refused(apply, "batch", rule=DFA, error=ValueError, inputs=SEQUENCES)
        FA.init(KEY, apply, W, SEQUENCES)


def test_a_model_of_one_batch_size():
    def fixed(p, x):  # traces at no other batch; the features are as many as the examples
        e = jnp.tanh(x.reshape(4 * T, 5) @ p["e"])
        return (e @ p["f"]).reshape(4, T, -1).mean(1)

    params = {"e": jnp.ones((5, 4)), "f": jnp.ones((4, 2))}
    refused(fixed, "cannot be told", rule=DFA, error=ValueError, params=params, inputs=SEQUENCES)

    def microbatches(p, x):
        return jnp.concatenate([H(p, x[i : i + 2]) @ p["c"] for i in range(0, len(x), 2)])

    refused(microbatches, "another batch size", rule=DFA, error=ValueError)


def test_wrong_calls():
    with pytest.raises(TypeError, match="call its factory first"):
        lrules.transform(mlp, lrules.feedback_alignment)
    with pytest.raises(TypeError, match="the order is"):
        lrules.value_and_grad(mlp, FA, NONE)
    with pytest.raises(TypeError, match="not an lrules.Rule|the network is a Rule"):
        lrules.transform(FA, mlp)
    with pytest.raises(TypeError, match="the feedback is a dict.*rule.init"):
        lrules.transform(mlp, FA)(W, {}, X)
    with pytest.raises(ValueError, match="no regular expression"):
        lrules.direct_feedback_alignment(at="(")


def test_marks_beside_layers():
    """A mark on a tensor that a layer reads is the same signal; marks on integers and in loops are no landings."""

    def apply(p, x):
        h = lrules.hidden(H(p, x), "m")
        return jnp.tanh(h @ p["b"]) @ p["c"]

    everywhere = lrules.direct_feedback_alignment(at=".*")
    assert set(everywhere.init(KEY, apply, W, X).fixed) == {"b", "c"}

    def integer(p, x):
        top = lrules.hidden(jnp.argmax(H(p, x), -1), "m")
        return jnp.tanh(H(p, x) @ p["b"]) @ p["c"] + jax.nn.one_hot(top, 3)

    refused(integer, "'m' matches no hidden signal", rule=lrules.direct_feedback_alignment(at="m"), error=ValueError)


def test_one_parameter_under_two_rules():
    """A parameter that two layers of different names share has one feedback: their rules must be one."""

    def shared(p, x):
        h = H(p, x)
        return jnp.tanh(h @ (p["b"] @ p["u"])) @ (p["b"] @ p["v"])

    params = {"a": W["a"], "b": jnp.ones((6, 6)), "u": jnp.ones((6, 6)), "v": jnp.ones((6, 3))}
    names = [row["layer"] for row in lrules.describe(shared, FA, params, X).layers]
    assert names == ["a", "b", "b#2"]  # named after the first of their parameters
    lrules.partition({"b": FA, ".*": lrules.feedback_alignment()}).init(KEY, shared, params, X)

    def crossed(p, x):
        return jnp.tanh(H(p, x) @ (p["b"] @ p["u"])) @ (p["A"] @ p["u"].T @ p["v"])

    params["A"] = jnp.ones((6, 6))
    rule = lrules.partition({"A": FA, ".*": lrules.feedback_alignment()})
    refused(crossed, "'u'", "two rules", rule=rule, error=ValueError, params=params)


@pytest.mark.parametrize("factor", [None, 2.0])
@pytest.mark.parametrize(("check_vma", "weight", "words"), [(False, P(), "check_vma=True"), (True, P("d"), "split")])
def test_backman_inside_a_shard_map_of_the_network(check_vma, weight, words, factor):
    """It needs the gradient of the whole batch: refused where the mesh hides it, or where the weight is split."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    data = P(None, "d") if weight == P("d") else P("d")

    def apply(p, x):
        def inner(w, h):
            return jax.lax.psum(h @ w, "d") if weight == P("d") else h @ w

        out = P() if weight == P("d") else P("d")
        mapped = jax.shard_map(inner, mesh=mesh, in_specs=(weight, data), out_specs=out, check_vma=check_vma)
        return jnp.tanh(mapped(factor * p["b"] if factor else p["b"], H(p, x))) @ p["c"]

    refused(apply, "'b'", words, "partition", rule=BACKMAN)
    FA.init(KEY, apply, W, X)


def test_feedback_of_an_ensemble_is_drawn_per_member():
    """One model written with a batch of weights has feedback of the scale of each member."""
    params = {"a": jnp.ones((8, 5, 32)), "b": jnp.ones((8, 32, 32))}

    def apply(p, x):
        return jnp.einsum("ebi,eij->ebj", jnp.tanh(jnp.einsum("bi,eij->ebj", x, p["a"])), p["b"]).mean(0)

    drawn = FA.init(KEY, apply, params, X).fixed["b"]
    assert 0.9 < float(drawn.std()) * 32**0.5 < 1.1


def test_describe_says_where_nothing_arrives():
    rows = lrules.describe(mlp, lrules.last_layer_only(), W, X).layers
    assert [row["reached by"] for row in rows] == ["(nothing)", "(nothing)", "output"]
    text = str(lrules.describe(mlp, FA, W, X))
    assert "activations: tanh, tanh#2" in text and "feedback: 216 bytes" in text


def test_describe_leaves_the_batch_out_under_every_rule():
    mixed = lrules.partition({"b": FA, ".*": DFA})
    for rule in (FA, DFA, mixed, lrules.backprop()):
        assert [row["shape"] for row in lrules.describe(mlp, rule, W, X).hidden] == [(6,), (6,)]
    one = lrules.Network(mlp, batch_axes=None)  # there is none that it could leave out
    assert [row["shape"] for row in lrules.describe(one, FA, W, X).hidden] == [(4, 6), (4, 6)]
