"""Backprop, last layer only, FA, DFA and BackMAN against the explicit references, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from tests import bridge
from tests.reference import backman, backprop, direct, feedback_alignment, losses, partition

NETS = {
    "shallow": lambda rng: bridge.random_dense(rng, (5, 6, 3), ["tanh"]),
    "deep": lambda rng: bridge.random_dense(rng, (5, 7, 6, 8, 3), ["relu", "gelu", "softplus"]),
    "one_output": lambda rng: bridge.random_dense(rng, (4, 6, 5, 1), ["sigmoid", "elu"]),
    "conv_max": lambda rng: bridge.random_conv(rng, "relu", "max"),
    "conv_average": lambda rng: bridge.random_conv(rng, "silu", "average"),
}


@pytest.fixture(params=NETS)
def case(request):
    """A random net, inputs and an output error."""
    rng = np.random.default_rng(0)
    net = NETS[request.param](rng)
    with jax.enable_x64(True):
        shape = (5, 6, 6, 2) if net[0].kernel.ndim == 4 else (5, net[0].kernel.shape[0])
        x = rng.normal(size=shape)
        e = rng.normal(size=(5, net[-1].kernel.shape[1])) / 5
        yield net, x, e


def pull(net, rule, feedback, x, e):
    """The rule's gradients for parameters, feedback and inputs when the cotangent `e` arrives."""
    f = lrules.transform(bridge.apply_of(net), rule)
    params = bridge.parameters(net)

    @jax.jit
    def gradients(params, feedback, x, e):
        return jax.vjp(f, params, feedback, x)[1](e)

    return gradients(params, feedback, jnp.asarray(x), jnp.asarray(e))


def draw(rule, net, x):
    feedback = rule.init(jax.random.key(1), bridge.apply_of(net), bridge.parameters(net), jnp.asarray(x))
    listed = [None] + [np.asarray(feedback.fixed[f"{k}/kernel"]) for k in range(1, len(net))]
    return feedback, listed


def agrees(got, reference):
    params, _, inputs = got
    bridge.close(params, bridge.kernels_and_biases(reference))
    bridge.close(inputs, reference.inputs)


def test_backprop(case):
    net, x, e = case
    agrees(pull(net, lrules.backprop(), lrules.Feedback({}, {}), x, e), backprop.gradients(net, x, e))


def test_last_layer_only(case):
    net, x, e = case
    agrees(pull(net, lrules.last_layer_only(), lrules.Feedback({}, {}), x, e), backprop.last_layer_only(net, x, e))


def test_feedback_alignment(case):
    net, x, e = case
    rule = lrules.feedback_alignment()
    feedback, listed = draw(rule, net, x)
    assert [b.shape for b in listed[1:]] == [layer.kernel.shape for layer in net[1:]]
    agrees(pull(net, rule, feedback, x, e), feedback_alignment.gradients(net, listed, x, e))


def test_direct_feedback_alignment(case):
    net, x, e = case
    rule = lrules.direct_feedback_alignment()
    feedback, listed = draw(rule, net, x)
    agrees(pull(net, rule, feedback, x, e), direct.gradients(net, listed, x, e))


@pytest.mark.parametrize("alpha", [1.0, 0.3, "gradient_norm"])
def test_backman(case, alpha):
    net, x, e = case
    got = pull(net, lrules.backman(alpha), lrules.Feedback({}, {}), x, e)
    agrees(got, backman.gradients(net, x, e, alpha=alpha))


@pytest.mark.parametrize("alpha", [1.0, "gradient_norm"])
def test_backman_dead_neurons(case, alpha):
    """A neuron without gradient gets the layer's mean norm; a wholly dead layer gets zeros, nothing gets NaN."""
    net, x, e = case
    dead = net[0]._replace(bias=net[0].bias - 1e4) if net[0].activation == "relu" else net[0]
    partly = net[0]._replace(bias=net[0].bias - 1e4 * (np.arange(len(net[0].bias)) == 1))
    for first in (dead, partly):
        changed = [first, *net[1:]]
        agrees(
            pull(changed, lrules.backman(alpha), lrules.Feedback({}, {}), x, e),
            backman.gradients(changed, x, e, alpha=alpha),
        )
    zero = pull(net, lrules.backman(alpha), lrules.Feedback({}, {}), x, np.zeros_like(e))
    assert all(not np.any(g) for g in jax.tree.leaves(zero[0]))


@pytest.mark.parametrize("kinds", [("fa", "bp", "fa", "fa"), ("bm", "fa", "bp", "bm"), ("fa", "dfa", "dfa", "bp")])
def test_partition(case, kinds):
    """Each layer follows its own rule: what arrives at the hidden signal it reads, and how its gradient is formed."""
    net, x, e = case
    kinds = kinds[: len(net)]
    dfa = lrules.direct_feedback_alignment()
    factories = {"fa": lrules.feedback_alignment(), "bp": lrules.backprop(), "bm": lrules.backman(0.7), "dfa": dfa}
    rule = lrules.partition({f"^{k}/": factories[kind] for k, kind in enumerate(kinds)})
    feedback = rule.init(jax.random.key(1), bridge.apply_of(net), bridge.parameters(net), jnp.asarray(x))
    b = {k: np.asarray(feedback.fixed.get(f"{k}/kernel")) for k in range(len(net))}
    forms = {
        "fa": lambda k: ("feedback_alignment", b[k]),
        "bp": lambda k: ("backprop",),
        "bm": lambda k: ("backman", 0.7),
        "dfa": lambda k: ("direct", b[k]),
    }
    rules = [forms[kind](k) for k, kind in enumerate(kinds)]
    agrees(pull(net, rule, feedback, x, e), partition.gradients(net, rules, x, e))


def test_masked_weighted_regularised_objective():
    """The user's own objective: masks, weights and a penalty on the weights go through `transform` as they are."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        net = bridge.random_dense(rng, (5, 6, 7, 3), ["tanh", "relu"])
        x, labels = rng.normal(size=(6, 5)), rng.integers(0, 3, 6)
        mask = np.array([1.0, 0, 1, 1, 0, 1])
        penalty = 0.01
        for rule, reference in [
            (lrules.feedback_alignment(), feedback_alignment.gradients),
            (lrules.direct_feedback_alignment(), direct.gradients),
            (lrules.backman(), lambda net, b, x, e: backman.gradients(net, x, e)),
        ]:
            params = bridge.parameters(net)
            f = lrules.transform(bridge.apply_of(net), rule)
            feedback = rule.init(jax.random.key(0), bridge.apply_of(net), params, jnp.asarray(x))

            def objective(p, f=f, feedback=feedback):
                logp = jax.nn.log_softmax(f(p, feedback, jnp.asarray(x)))
                per = -jnp.take_along_axis(logp, jnp.asarray(labels)[:, None], 1)[:, 0]
                decay = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))
                return jnp.sum(per * mask) / mask.sum() + penalty * decay

            value, grads = jax.jit(jax.value_and_grad(objective))(params)
            outputs = np.asarray(bridge.apply_of(net)(params, jnp.asarray(x)))
            per, error = losses.softmax_cross_entropy(outputs, losses.one_hot(labels, 3))
            wanted_value, e = losses.weighted_mean(per, error, mask)
            listed = [None] + [np.asarray(b) for _, b in sorted(feedback.fixed.items())]
            wanted = bridge.kernels_and_biases(reference(net, listed, x, e))
            wanted = jax.tree.map(lambda g, p: g + 2 * penalty * np.asarray(p), wanted, params)
            bridge.close(grads, wanted)
            squares = sum(np.sum(np.asarray(leaf) ** 2) for leaf in jax.tree.leaves(params))
            np.testing.assert_allclose(value, wanted_value + penalty * squares, rtol=1e-12)
