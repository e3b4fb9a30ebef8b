"""Feedback alignment, fixed and adaptive (ARBP): the reference, and training the feedback with one optimizer or two."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrules
from tests import bridge
from tests.reference import backprop, direct_feedback_alignment, feedback_alignment, modifiers
from tests.rules.common import ALL_NETS, NETS, agrees, by_name, draw, make, pull
from tests.sampling import mostly_slow


@pytest.mark.parametrize("name", ALL_NETS)
def test_fixed(name):
    with jax.enable_x64(True):
        net, x, e = make(name)
        rule = lrules.feedback_alignment()
        feedback, listed = draw(rule, net, x)
        assert [b.shape for b in listed[1:]] == [layer.kernel.shape for layer in net[1:]]
        agrees(pull(net, rule, feedback, x, e), feedback_alignment.gradients(net, listed, x, e))


@pytest.mark.parametrize("name", mostly_slow(NETS, ["deep", "conv_max"]))
def test_adaptive(name):
    with jax.enable_x64(True):
        net, x, e = make(name)
        rule = lrules.feedback_alignment(adaptive=True)
        feedback, listed = draw(rule, net, x)
        assert feedback.fixed == {} and sorted(feedback.learned) == [f"{k}/kernel" for k in range(1, len(net))]
        got = pull(net, rule, feedback, x, e)
        wanted = feedback_alignment.gradients(net, listed, x, e, adaptive=True)
        agrees(got, wanted)
        bridge.close(got[1].learned, by_name(wanted.feedback))


@pytest.mark.foreign
def test_same_optimizer_and_another():
    net, params = lrules.Network(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]), {"a": jnp.eye(3), "b": jnp.ones((3, 2))}
    rule = lrules.feedback_alignment(adaptive=True)
    x, y = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 2))
    feedback = rule.init(jax.random.key(0), net, params, x)
    _, grads = lrules.value_and_grad(net, lrules.testing.half_squared_error, rule)(params, feedback, x, y)

    same = optax.adam(1e-2)
    together = (params, feedback.learned)
    updates, _ = same.update((grads.params, grads.feedback), same.init(together), together)
    _, learned = optax.apply_updates(together, updates)
    assert learned["b"].shape == (3, 2) and jnp.all(learned["b"] != feedback.learned["b"])

    slower = optax.sgd(1e-3)  # the paper's adaptive channel learns ten times more slowly
    updates, _ = slower.update(grads.feedback, slower.init(feedback.learned))
    learned = optax.apply_updates(feedback.learned, updates)
    np.testing.assert_allclose(learned["b"], feedback.learned["b"] - 1e-3 * grads.params["b"], rtol=1e-6)


def test_linear_net_is_direct_with_the_products():
    """In a linear net RBP with matrices C_i equals SRBP with their products."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        net = bridge.random_dense(rng, (5, 6, 4, 3), ["identity", "identity"])
        x, e = rng.normal(size=(4, 5)), rng.normal(size=(4, 3)) / 4
        rule = lrules.feedback_alignment()
        feedback, listed = draw(rule, net, x)
        products = {"2/kernel": listed[2].T, "1/kernel": listed[2].T @ listed[1].T}
        skipped = pull(net, lrules.direct_feedback_alignment(), lrules.Feedback(products, {}), x, e)
        bridge.close(pull(net, rule, feedback, x, e)[0], skipped[0])


def test_one_hidden_layer_is_direct():
    with jax.enable_x64(True):
        net, x, e = make("shallow")
        rule = lrules.feedback_alignment()
        feedback, listed = draw(rule, net, x)
        skipped = lrules.Feedback({"1/kernel": jnp.asarray(listed[1].T)}, {})
        bridge.close(
            pull(net, rule, feedback, x, e)[0], pull(net, lrules.direct_feedback_alignment(), skipped, x, e)[0]
        )


RULES = {
    "feedback_alignment": lrules.feedback_alignment(),
    "direct": lrules.direct_feedback_alignment(),
    "skipped": lrules.skipped_backprop(),
    "symmetric": lrules.sign_symmetry(),
    "adaptive": lrules.direct_feedback_alignment(adaptive=True),
}


@pytest.mark.parametrize("name", RULES)
def test_facts_of_the_paper(name):
    """The top layer follows its gradient; e turned round turns every update round; no error, no update."""
    with jax.enable_x64(True):
        net, x, e = make("deep")
        rule = RULES[name]
        feedback, _ = draw(rule, net, x)
        got = pull(net, rule, feedback, x, e)[:2]
        true = bridge.kernels_and_biases(backprop.gradients(net, x, e))
        bridge.close(got[0][str(len(net) - 1)], true[str(len(net) - 1)])
        bridge.close(jax.tree.map(lambda g: -g, got), pull(net, rule, feedback, x, -e)[:2])
        for leaf in jax.tree.leaves(pull(net, rule, feedback, x, 0 * e)[:2]):
            assert not np.any(leaf)


def test_sparse_and_rescaled_feedback():
    with jax.enable_x64(True):
        net, x, e = make("deep")
        rule = lrules.feedback_alignment(init=lrules.feedback.sparse(2, rescale=True))
        feedback, listed = draw(rule, net, x)
        for b in listed[1:]:
            assert set(np.round(np.unique(b * np.sqrt(2)), 12)) <= {0.0, 1.0}
        agrees(pull(net, rule, feedback, x, e), feedback_alignment.gradients(net, listed, x, e))
        uniform = np.random.default_rng(0).uniform(size=(6, 8))
        assert set(np.unique(modifiers.sparse(uniform, 2, 6))) == {0.0, 1.0}


def test_redrawn():
    """Feedback redrawn at every step: the same key gives the same, another key another, none is kept."""
    with jax.enable_x64(True):
        net, x, e = make("shallow")

        def backward(op, w, b, x, d, layer):
            dw, _ = jax.vjp(op, w, x)[1](d)
            return dw, jax.vjp(lambda x: op(b, x), x)[1](d)[0], None

        rule = lrules.sequential(backward, init=jax.nn.initializers.glorot_normal(), redrawn=True)
        feedback, _ = draw(rule, net, x)
        assert feedback == lrules.Feedback({}, {}) and rule.stochastic
        key = jax.random.key(5)
        kept = lrules.feedback_alignment().init(key, bridge.apply_of(net), bridge.parameters(net), jnp.asarray(x))
        agrees(
            pull(net, rule, feedback, x, e, rng=key),
            feedback_alignment.gradients(net, [None, np.asarray(kept.fixed["1/kernel"])], x, e),
        )
        with pytest.raises(ValueError, match="redrawn"):
            lrules.sequential(backward, init=jax.nn.initializers.zeros, redrawn=True, learned=True)
        with pytest.raises(ValueError, match="redrawn"):
            lrules.direct(lambda e, b, t, name: e @ b, init=jax.nn.initializers.zeros, redrawn=True, learn=lambda *a: 0)


def test_redrawn_direct():
    with jax.enable_x64(True):
        net, x, e = make("shallow")
        rule = lrules.direct(lambda e, b, targets, name: e @ b, init=jax.nn.initializers.glorot_normal(), redrawn=True)
        key = jax.random.key(5)
        kept = lrules.direct_feedback_alignment().init(
            key, bridge.apply_of(net), bridge.parameters(net), jnp.asarray(x)
        )
        got = pull(net, rule, lrules.Feedback({}, {}), x, e, rng=key)
        agrees(got, direct_feedback_alignment.gradients(net, [None, np.asarray(kept.fixed["1/kernel"])], x, e))
