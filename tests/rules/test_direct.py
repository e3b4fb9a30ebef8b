"""Adaptive direct feedback, feedback shared along axes, feedback of low rank."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrules
from tests import bridge
from tests.reference import direct
from tests.rules.common import NETS, agrees, by_name, draw, make, pull


@pytest.mark.parametrize("name", NETS)
def test_adaptive(name):
    with jax.enable_x64(True):
        net, x, e = make(name)
        rule = lrules.direct_feedback_alignment(adaptive=True)
        feedback, listed = draw(rule, net, x)
        assert feedback.fixed == {} and sorted(feedback.learned) == [f"{k}/kernel" for k in range(1, len(net))]
        got = pull(net, rule, feedback, x, e)
        wanted = direct.gradients(net, listed, x, e, adaptive=True)
        agrees(got, wanted)
        bridge.close(got[1].learned, by_name(wanted.feedback))


@pytest.mark.foreign
def test_same_optimizer_and_another():
    net, params = lrules.Network(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]), {"a": jnp.eye(3), "b": jnp.ones((3, 2))}
    rule = lrules.direct_feedback_alignment(adaptive=True)
    x, y = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 2))
    feedback = rule.init(jax.random.key(0), net, params, x)
    _, grads = lrules.value_and_grad(net, lrules.testing.half_squared_error, rule)(params, feedback, x, y)
    together = (params, feedback.learned)
    same = optax.sgd(0.1)
    updates, _ = same.update((grads.params, grads.feedback), same.init(together), together)
    learned = optax.apply_updates(together, updates)[1]
    np.testing.assert_allclose(learned["b"], feedback.learned["b"] - 0.1 * grads.params["b"].T, rtol=1e-6)
    slower = optax.adam(1e-4)
    updates, _ = slower.update(grads.feedback, slower.init(feedback.learned))
    assert float(jnp.abs(updates["b"]).max()) < 2e-4


# ------------------------------------------------------------------------------------------------------- shared axes


def sequences(rng):
    """Two layers that mix time, and an output per time step: [batch, time, features]."""
    params = {
        "first": jnp.asarray(rng.normal(size=(3, 4))),
        "mix": jnp.asarray(rng.normal(size=(2, 4, 5))),
        "last": jnp.asarray(rng.normal(size=(5, 2))),
    }

    def apply(p, x):
        h = jnp.tanh(x @ p["first"])
        before = jnp.pad(h, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        h = jnp.tanh(h @ p["mix"][0] + before @ p["mix"][1])
        return h @ p["last"]

    return apply, params, jnp.asarray(rng.normal(size=(6, 7, 3)))


def test_shared_along_time():
    """One matrix for all time steps is the full one with its blocks on the diagonal of time."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        apply, params, x = sequences(rng)
        e = jnp.asarray(rng.normal(size=(6, 7, 2)))
        shared = lrules.direct_feedback_alignment(shared_axes=1, adaptive=True)
        feedback = shared.init(jax.random.key(0), apply, params, x)
        assert {k: b.shape for k, b in feedback.learned.items()} == {"mix": (2, 4), "mix#2": (2, 4), "last": (2, 5)}
        eye = np.eye(7)
        full = {k: jnp.einsum("tu,ch->tcuh", eye, b).reshape(14, 7, -1) for k, b in feedback.learned.items()}

        def gradients(rule, feedback):
            return jax.vjp(lrules.transform(apply, rule), params, feedback, x)[1](e)

        got = gradients(shared, feedback)
        wanted = gradients(lrules.direct_feedback_alignment(adaptive=True), lrules.Feedback({}, full))
        bridge.close(got[0], wanted[0])
        bridge.close(got[2], wanted[2])
        for name, b in got[1].learned.items():
            blocks = wanted[1].learned[name].reshape(7, 2, 7, -1)
            bridge.close(b, jnp.einsum("tcth->ch", blocks))


def test_shared_along_a_recurrence():
    """A loop over time: the error of a step reaches the state of that step; adaptive feedback sums over steps."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params = {k: jnp.asarray(rng.normal(size=s)) for k, s in {"i": (3, 4), "h": (4, 4), "o": (4, 2)}.items()}
        x, e = jnp.asarray(rng.normal(size=(5, 7, 3))), jnp.asarray(rng.normal(size=(5, 7, 2)))

        def apply(p, x):
            def step(h, x):
                h = jnp.tanh(x @ p["i"] + h @ p["h"])
                return h, h @ p["o"]

            return jax.lax.scan(step, x[:, 0, :1] * jnp.zeros(4)[None], x.swapaxes(0, 1))[1].swapaxes(0, 1)

        rule = lrules.direct_feedback_alignment(shared_axes=1, adaptive=True)
        feedback = rule.init(jax.random.key(0), apply, params, x)
        assert {k: b.shape for k, b in feedback.learned.items()} == {"h": (2, 4), "o": (2, 4)}
        got = jax.jit(lambda: jax.vjp(lrules.transform(apply, rule), params, feedback, x)[1](e))()

        # By hand: the carry, read at the next step by h, and the new state, read by o, are hidden signals of their own.
        h, states, pre = np.zeros((5, 4)), [np.zeros((5, 4))], []
        for t in range(7):
            pre.append(np.asarray(x[:, t] @ params["i"] + h @ params["h"]))
            h = np.tanh(pre[-1])
            states.append(h)
        b = np.asarray(feedback.learned["o"])
        wanted = sum(np.asarray(x[:, t]).T @ (e[:, t] @ b * (1 - states[t + 1] ** 2)) for t in range(7))
        bridge.close(got[0]["i"], wanted)
        bridge.close(got[1].learned["o"], sum(np.asarray(e[:, t]).T @ states[t + 1] for t in range(7)))
        bridge.close(got[1].learned["h"], sum(np.asarray(e[:, t]).T @ states[t] for t in range(7)))


def test_shared_pixels_and_pairs():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params = {"a": jnp.asarray(rng.normal(size=(3, 3, 1, 4))), "b": jnp.asarray(rng.normal(size=(1, 1, 4, 2)))}
        x = jnp.asarray(rng.normal(size=(2, 5, 6, 1)))

        def apply(p, x):
            conv = lambda x, w: jax.lax.conv_general_dilated(  # noqa: E731
                x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return conv(jnp.tanh(conv(x, p["a"])), p["b"])

        rule = lrules.direct_feedback_alignment(shared_axes=(1, 2))
        feedback = rule.init(jax.random.key(0), apply, params, x)
        assert feedback.fixed["b"].shape == (2, 4)
        e = jnp.asarray(rng.normal(size=(2, 5, 6, 2)))
        got = jax.vjp(lrules.transform(apply, rule), params, feedback, x)[1](e)[0]["a"]

        class Kernel:
            kernel, stride, padding = np.asarray(params["a"]), (1, 1), "SAME"

        from tests.reference import nets

        layer = nets.conv(params["a"], padding="SAME")
        z = nets.multiply(layer, layer.kernel, np.asarray(x))
        d = np.asarray(e) @ np.asarray(feedback.fixed["b"]) * (1 - np.tanh(z) ** 2)
        bridge.close(got, nets.kernel_gradient(layer, np.asarray(x), d))

        swapped = lrules.direct_feedback_alignment(shared_axes=[(1, 2), (2, 1)])
        with pytest.raises(ValueError, match="no axis that corresponds to axis 1"):
            swapped.init(jax.random.key(0), apply, params, x)

        def turned(p, x):
            return apply(p, x).swapaxes(1, 2)

        same = jax.vjp(lrules.transform(turned, swapped), params, feedback, x)[1](e.swapaxes(1, 2))[0]["a"]
        bridge.close(same, got)


def test_refusals_of_shared_axes():
    apply, params, x = sequences(np.random.default_rng(0))

    def refused(match, net, **options):
        with pytest.raises(ValueError, match=match):
            lrules.direct_feedback_alignment(**options).init(jax.random.key(0), net, params, x)

    refused("no axis of the outputs", apply, shared_axes=3)
    refused("no axis of the outputs", apply, shared_axes=0)
    refused("outputs that are one array", lambda p, x: (apply(p, x), apply(p, x)), shared_axes=1)
    refused("no axis that corresponds", lambda p, x: apply(p, x)[:, :4], shared_axes=1)
    with pytest.raises(ValueError, match="rank=0"):
        lrules.direct_feedback_alignment(rank=0)


# ---------------------------------------------------------------------------------------------------------- low rank


@pytest.mark.parametrize("name", ["deep", "conv_max"])
def test_low_rank(name):
    with jax.enable_x64(True):
        net, x, e = make(name)
        rule = lrules.direct_feedback_alignment(rank=2, adaptive=True)
        feedback = rule.init(jax.random.key(0), bridge.apply_of(net), bridge.parameters(net), jnp.asarray(x))
        shared = np.asarray(feedback.fixed["outputs"])
        assert list(feedback.fixed) == ["outputs"] and shared.shape == (3, 2)
        listed = [np.asarray(feedback.learned[f"{k}/kernel"]) for k in range(1, len(net))]
        products = [None, *(np.tensordot(shared, b, axes=1) for b in listed)]
        got = pull(net, rule, feedback, x, e)
        wanted = direct.gradients(net, products, x, e, adaptive=True)
        agrees(got, wanted)
        for k, b in enumerate(wanted.feedback[1:], 1):
            bridge.close(got[1].learned[f"{k}/kernel"], np.tensordot(shared.T, b, axes=1))


def test_low_rank_saves_memory_for_many_outputs():
    params = {"a": jnp.zeros((8, 64)), "b": jnp.zeros((64, 64)), "c": jnp.zeros((64, 50_000))}

    def apply(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    x = jnp.zeros((2, 8))
    full = lrules.describe(apply, lrules.direct_feedback_alignment(), params, x).feedback_bytes
    low = lrules.describe(apply, lrules.direct_feedback_alignment(rank=16), params, x).feedback_bytes
    assert full == 4 * 50_000 * 128 and low == 4 * 16 * (50_000 + 128)
    with pytest.raises(ValueError, match="max_feedback_bytes"):
        rule = lrules.direct_feedback_alignment(rank=16, max_feedback_bytes=10**6)
        rule.init(jax.random.key(0), apply, params, x)
