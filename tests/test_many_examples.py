"""More examples than float16 can count: the gradients are those of float32, not zeros or NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules

EXAMPLES = 70_000  # the largest float16 is 65,504
RULES = {
    "feedback_alignment": lrules.feedback_alignment(),
    "direct_feedback_alignment": lrules.direct_feedback_alignment(normalise_error=True),
    "direct_kolen_pollack": lrules.direct_kolen_pollack(),
    "skipped_backprop": lrules.skipped_backprop(),
    "random_target_projection": lrules.random_target_projection(),
    "backman": lrules.backman(0.1),
    "local_losses": lrules.local_losses(),
    "dual_propagation": lrules.dual_propagation(),
    "predictive_coding": lrules.predictive_coding(4, beta=0.1),
    "equilibrium_propagation": lrules.equilibrium_propagation(free_steps=4, nudged_steps=2),
    "drop_error": lrules.drop_error(lrules.feedback_alignment(), 0.0),
}


def net(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


@pytest.mark.parametrize("name", RULES)
def test_gradients_in_float16(name):
    rule = RULES[name]
    full = {"a": jnp.linspace(-0.5, 0.5, 12).reshape(3, 4), "b": jnp.linspace(0.2, 0.9, 8).reshape(4, 2)}
    x, y = jax.random.normal(jax.random.key(0), (EXAMPLES, 3)), jnp.ones((EXAMPLES, 2))
    drawn = rule.init(jax.random.key(1), net, full, x)
    found = []
    for dtype in (jnp.float16, jnp.float32):
        cast = lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf  # noqa: B023, E731
        params, feedback, inputs, targets = jax.tree.map(cast, (full, drawn, x, y))
        step = lrules.value_and_grad(net, lrules.testing.half_squared_error, rule)
        key = {"rng": jax.random.key(2)} if rule.stochastic else {}
        _, grads = step(params, feedback, inputs, targets, **key)
        found.append({name: np.asarray(grads.params[name], float) for name in grads.params})
    for layer, wanted in found[1].items():
        assert np.linalg.norm(wanted) > 0
        assert np.linalg.norm(found[0][layer] - wanted) < 0.05 * np.linalg.norm(wanted)
