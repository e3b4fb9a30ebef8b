"""Bad input and constructs that cannot be served: one sentence that names the thing and the remedy."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lrules

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 5))
NONE = lrules.Feedback({}, {})
W = {"a": jnp.ones((5, 6)), "b": jnp.ones((6, 6)), "c": jnp.ones((6, 3))}
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
        (h, _), _ = lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), 0.9 * c[1]), None), (x @ p["a"], p["b"]), None, length=2)
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
        refused(apply, "'b'", "while", "backprop", rule=rule)
    rule = lrules.partition({"^b$": lrules.backprop(), ".*": FA})
    f = lrules.transform(apply, rule)
    feedback = rule.init(KEY, apply, W, X)
    assert f(W, feedback, X).shape == (4, 3)
    assert set(feedback.fixed) == {"c"}


def test_layer_in_a_custom_vjp():
    @jax.custom_vjp
    def dense(w, x):
        return x @ w

    dense.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, d: (r[1].T @ d, d @ r[0].T))
    refused(lambda p, x: jnp.tanh(dense(p["b"], x @ p["a"])) @ p["c"], "'b'", "custom_vjp", "backprop")


def test_layer_in_a_custom_jvp():
    @jax.custom_jvp
    def dense(w, x):
        return x @ w

    dense.defjvps(lambda dw, y, w, x: x @ dw, lambda dx, y, w, x: dx @ w)
    refused(lambda p, x: jnp.tanh(dense(p["b"], x @ p["a"])) @ p["c"], "'b'", "custom_jvp", "backprop")


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
    refused(mlp, "144 bytes", "max_feedback_bytes", "at=", "shared_axes", rule=rule, error=ValueError)


def test_options():
    with pytest.raises(ValueError, match='neither a number nor "gradient_norm"'):
        lrules.backman("norm")
    with pytest.raises(ValueError, match='neither "mean" nor "sum"'):
        lrules.transform(mlp, FA, reduction="none")
    with pytest.raises(ValueError, match="at='nothing' matches no hidden signal.*'b', 'c'"):
        lrules.direct_feedback_alignment(at="nothing").init(KEY, mlp, W, X)
    with pytest.raises(TypeError, match="has_aux=True"):
        FA.init(KEY, lrules.Network(mlp, has_aux=True), W, X)


def test_partition():
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
        lrules.partition({".*": FA._replace(layer=None)})
    with pytest.raises(ValueError, match="no rules"):
        lrules.partition({})
