"""Angles, signs and norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from lrules import diagnostics


def test_compare_by_hand():
    got = diagnostics.compare(jnp.array([3.0, 0.0, 0.0]), jnp.array([1.0, 1.0, 0.0]))
    np.testing.assert_allclose(got.angle, 45, rtol=1e-6)
    np.testing.assert_allclose(got.sign_agreement, 0.5)
    np.testing.assert_allclose(got.norm_ratio, 3 / 2**0.5, rtol=1e-6)


@pytest.mark.parametrize("angle", [0.0, 1e-3, 30.0, 90.0, 179.999, 180.0])
def test_angles(angle):
    with jax.enable_x64(True):
        a = np.deg2rad(angle)
        got = diagnostics.compare(jnp.array([np.cos(a), np.sin(a)]) * 1e-200, jnp.array([1e200, 0.0]))
        np.testing.assert_allclose(got.angle, angle, atol=1e-9)


def test_zero_and_shapes():
    zero = diagnostics.compare(jnp.zeros(3), jnp.ones(3))
    assert zero.angle == 90 and zero.norm_ratio == 0 and zero.sign_agreement == 0
    assert diagnostics.compare(jnp.zeros(3), jnp.zeros(3)).norm_ratio == 1
    with pytest.raises(ValueError, match="cannot be compared"):
        diagnostics.compare(jnp.zeros(3), jnp.zeros(4))
    with pytest.raises(ValueError, match="differ in structure"):
        diagnostics.agreement({"a": jnp.zeros(3)}, {"b": jnp.zeros(3)})


def test_in_a_jitted_step():
    def mlp(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    keys = jax.random.split(jax.random.key(0), 3)
    w = {n: jax.random.normal(k, s) for n, k, s in zip("abc", keys, [(5, 6), (6, 6), (6, 3)], strict=True)}
    x, rule = jnp.ones((4, 5)), lrules.feedback_alignment()
    feedback = rule.init(jax.random.key(1), mlp, w, x)
    loss = lambda y, t: jnp.sum((y - t) ** 2, -1)  # noqa: E731

    @jax.jit
    def step(w):
        _, grads = lrules.value_and_grad(mlp, loss, rule)(w, feedback, x, jnp.ones((4, 3)))
        _, true = lrules.value_and_grad(mlp, loss, lrules.backprop())(w, lrules.Feedback({}, {}), x, jnp.ones((4, 3)))
        alike = diagnostics.agreement(grads.params, true.params)
        return alike, diagnostics.total_angle(grads.params, true.params), diagnostics.weight_alignment(feedback, w)

    alike, total, alignment = step(w)
    assert alike["c"].angle < 0.1 and alike["a"].angle > 1 and 0 < total < 180
    assert set(alignment) == {"b", "c"}
    perfect = diagnostics.weight_alignment(lrules.Feedback({"b": 2 * w["b"]}, {"c": -w["c"].T}), w)
    np.testing.assert_allclose(perfect["b"].angle, 0, atol=1e-3)
    np.testing.assert_allclose(perfect["b"].norm_ratio, 2, rtol=1e-6)
    np.testing.assert_allclose(perfect["c"].angle, 180, atol=1e-3)
