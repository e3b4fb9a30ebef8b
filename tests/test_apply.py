"""`transform` and `value_and_grad`: the user's own objective, and what is said of a wrong call."""

import jax
import jax.numpy as jnp
import numpy as np

import lrules
from tests import bridge
from tests.reference import backman, direct_feedback_alignment, feedback_alignment, losses


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
            (lrules.direct_feedback_alignment(), direct_feedback_alignment.gradients),
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
