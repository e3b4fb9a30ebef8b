"""Skipped backpropagation on dense, convolutional and pooled nets, in loops, and mixed with other rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from tests import bridge
from tests.reference import direct_feedback_alignment, skipped_backprop
from tests.rules.common import NETS, agrees, draw, make, pull
from tests.sampling import mostly_slow


@pytest.mark.parametrize("name", mostly_slow(NETS, ["deep", "conv_max"]))
def test_reference(name):
    with jax.enable_x64(True):
        net, x, e = make(name)
        agrees(
            pull(net, lrules.skipped_backprop(), lrules.Feedback({}, {}), x, e), skipped_backprop.gradients(net, x, e)
        )


def test_is_direct_feedback_by_the_products():
    with jax.enable_x64(True):
        net, x, e = make("deep")
        products = lrules.Feedback(bridge.feedback_dict(skipped_backprop.feedback(net)), {})
        got = pull(net, lrules.skipped_backprop(), lrules.Feedback({}, {}), x, e)
        bridge.close(got[0], pull(net, lrules.direct_feedback_alignment(), products, x, e)[0])


def test_beside_direct_feedback():
    """In a partition what travels by SBP passes layers whose own signal comes by other feedback."""
    with jax.enable_x64(True):
        net, x, e = make("deep")
        rule = lrules.partition({"2": lrules.direct_feedback_alignment(), ".*": lrules.skipped_backprop()})
        feedback = rule.init(jax.random.key(1), bridge.apply_of(net), bridge.parameters(net), jnp.asarray(x))
        listed = skipped_backprop.feedback(net)
        listed[2] = np.asarray(feedback.fixed["2/kernel"])
        agrees(pull(net, rule, feedback, x, e), direct_feedback_alignment.gradients(net, listed, x, e))


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_layers(remat):
    """A scanned net gives what the same net unrolled gives."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params = {
            "in": jnp.asarray(rng.normal(size=(3, 4))),
            "w": jnp.asarray(rng.normal(size=(3, 4, 4))),
            "out": jnp.asarray(rng.normal(size=(4, 2))),
        }
        x, e = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=(5, 2)))

        def scanned(p, x):
            layer = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
            layer = jax.checkpoint(layer) if remat else layer
            return jax.lax.scan(layer, jax.nn.relu(x @ p["in"]), p["w"])[0] @ p["out"]

        def unrolled(p, x):
            h = jax.nn.relu(x @ p["in"])
            for w in p["w"]:
                h = jnp.tanh(h @ w)
            return h @ p["out"]

        def gradients(apply):
            f = lrules.transform(apply, lrules.skipped_backprop())
            return jax.jit(lambda p, x: jax.vjp(lambda p, x: f(p, lrules.Feedback({}, {}), x), p, x)[1](e))(params, x)

        bridge.close(gradients(scanned), gradients(unrolled))


def test_linear_net_is_backprop():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        net = bridge.random_dense(rng, (5, 6, 4, 3), ["identity", "identity"])
        x, e = rng.normal(size=(4, 5)), rng.normal(size=(4, 3))
        nothing, _ = draw(lrules.skipped_backprop(), net, x)
        assert nothing == lrules.Feedback({}, {})
        bridge.close(pull(net, lrules.skipped_backprop(), nothing, x, e), pull(net, lrules.backprop(), nothing, x, e))


@pytest.mark.parametrize("rule", [lrules.skipped_backprop(), lrules.node_perturbation(0.1)])
def test_a_mark_named_like_a_layer_changes_nothing(rule):
    """Where no feedback lands on it, a mark is no hidden signal, whatever its name."""
    params = {"a": jnp.eye(3), "b": 2 * jnp.eye(3), "c": jnp.ones((3, 2))}
    x, y = jnp.arange(6.0).reshape(2, 3) / 6, jnp.ones((2, 2))

    def apply(p, x, mark=lrules.hidden):
        h = mark(x @ p["a"], "b")
        return jnp.tanh(jnp.tanh(h) @ p["b"]) @ p["c"]

    def unmarked(p, x):
        return apply(p, x, lambda h, name: h)

    feedback = rule.init(jax.random.key(0), unmarked, params, x)
    rng = {"rng": jax.random.key(1)} if rule.stochastic else {}
    one, two = (
        lrules.value_and_grad(net, lrules.testing.half_squared_error, rule)(params, feedback, x, y, **rng)
        for net in (apply, unmarked)
    )
    bridge.close(one, two, 1e-6)


def test_modifications_do_not_accumulate():
    """Each layer gets its own signal modified once, however many signals lie above."""
    params = [jax.random.normal(jax.random.key(i), (3, 3)) for i in range(4)]
    x = jax.random.normal(jax.random.key(9), (5, 3))

    def net(p, x):
        for w in p[:-1]:
            x = jnp.tanh(x @ w)
        return x @ p[-1]

    def gradient(rule):
        f = lrules.transform(net, rule)
        return jax.grad(lambda p: f(p, lrules.Feedback({}, {}), x).sum())(params)

    double = lambda signal, name, rng: 2 * signal  # noqa: E731
    plain = gradient(lrules.skipped_backprop())
    modified = gradient(lrules.modify_error(lrules.skipped_backprop(), double))
    bridge.close(modified, [*(2 * g for g in plain[:-1]), plain[-1]], 1e-6)
    accumulated = gradient(lrules.modify_error(lrules.backprop(), double))
    bridge.close(accumulated, [g * 2 ** (3 - k) for k, g in enumerate(gradient(lrules.backprop()))], 1e-6)
