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
    with pytest.raises(ValueError, match="must have the same shape"):
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


def test_relative_error():
    got = diagnostics.compare(jnp.array([3.0, 1.0]), jnp.array([0.0, 5.0]))
    np.testing.assert_allclose(got.relative_error, 1, rtol=1e-6)
    np.testing.assert_allclose(diagnostics.compare(jnp.zeros(3), jnp.ones(3)).relative_error, 1, rtol=1e-6)
    assert diagnostics.compare(jnp.zeros(3), jnp.zeros(3)).relative_error == 0
    assert jnp.isinf(diagnostics.compare(jnp.ones(3), jnp.zeros(3)).relative_error)


def test_lipschitz_product_of_an_mlp():
    """The spectral norm of the product, biases and activations apart."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=s) for s in ((8, 6), (6, 5), (5, 3))]

    def mlp(p, x):
        for w, f in zip(p, (jax.nn.relu, jax.nn.gelu, lambda h: h), strict=True):
            x = f(x @ w + 0.5)
        return x

    with jax.enable_x64(True):
        params = [jnp.asarray(w) for w in weights]
        got = jax.jit(lambda p, x: diagnostics.lipschitz_product(mlp, p, x))(params, jnp.ones((4, 8)))
        np.testing.assert_allclose(got, np.linalg.norm(weights[0] @ weights[1] @ weights[2], 2), rtol=1e-10)
        with pytest.raises(ValueError, match="one output"):
            diagnostics.lipschitz_product(lambda p, x: (x @ p, x), jnp.ones((8, 2)), jnp.ones((4, 8)))


def test_spectral_norms():
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 2, 4), "out": (3, 64), "loop": (2, 3, 3)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}

    def conv(w, x):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def net(p, x):
        h = jax.nn.relu(conv(p["conv"], x) + 1).reshape(x.shape[0], -1)
        h = jnp.tanh((p["out"] @ h.T).T)
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["loop"])[0]

    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)
        got = jax.jit(lambda p: diagnostics.spectral_norms(net, p, jnp.ones((5, 4, 4, 2)), iterations=300))(params)
        matrix = jax.jacobian(lambda x: conv(params["conv"], x).ravel())(jnp.zeros((1, 4, 4, 2))).reshape(64, -1)
        np.testing.assert_allclose(got["conv"], np.linalg.norm(matrix, 2), rtol=1e-6)
        np.testing.assert_allclose(got["out"], np.linalg.norm(params["out"], 2), rtol=1e-6)
        np.testing.assert_allclose(got["loop"], [np.linalg.norm(w, 2) for w in params["loop"]], rtol=1e-6)


@pytest.mark.parametrize("lost", [jnp.nan, jnp.inf])
def test_numbers_that_are_lost_are_not_hidden(lost):
    figures = jnp.ones(3), jnp.ones(3).at[1].set(lost)
    for pair in (figures, figures[::-1]):
        assert all(jnp.isnan(figure) for figure in diagnostics.compare(*pair))
        assert jnp.isnan(diagnostics.total_angle(*({"w": x} for x in pair)))


@pytest.mark.parametrize("size", [8, 64, 1000])
@pytest.mark.parametrize("jitted", [False, True])
def test_a_nan_in_a_large_array_is_not_lost(size, jitted):
    """On some processors the maximum of a large array drops a NaN."""
    whole = jax.random.normal(jax.random.key(0), (size, size))
    lost = whole.at[size // 2, 3].set(jnp.nan)
    compare = jax.jit(diagnostics.compare) if jitted else diagnostics.compare
    for pair in ((lost, whole), (whole, lost)):
        assert all(jnp.isnan(figure) for figure in compare(*pair))
        assert jnp.isnan(diagnostics.total_angle(*({"w": x} for x in pair)))


def test_dead_units_by_hand():
    def net(params, x):
        h = jax.nn.relu(x @ params["a"])
        return jax.nn.relu(h @ params["b"])

    x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    params = {"a": jnp.array([[1.0, -1.0, 1.0, 0.0], [-1.0, -1.0, 1.0, 0.0]]), "b": jnp.ones((4, 2))}
    found = diagnostics.dead_units(net, params, x)
    assert {name: float(fraction) for name, fraction in found.items()} == {"relu": 0.5, "relu#2": 0.0}


def test_gradients_of_other_shapes_are_not_compared():
    with pytest.raises(ValueError, match="must have the same shape"):
        diagnostics.total_angle({"a": jnp.ones((2, 3)), "b": jnp.ones(1)}, {"a": jnp.ones((3, 2)), "b": jnp.ones(1)})
