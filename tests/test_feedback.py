"""Initialisers of feedback weights: their values, how often, and in which layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from lrules import feedback

KEY = jax.random.key(0)


@pytest.mark.parametrize("n", [0, 1, 7, 100, 1000])
def test_sparse(n):
    """n neurons of the receiving layer per neuron above, on average; as many as there are if n is larger."""
    drawn = np.asarray(feedback.sparse(n)(KEY, (100, 400)))
    assert set(np.unique(drawn)) <= {0.0, 1.0}
    assert abs(drawn.sum(0).mean() - min(n, 100)) < 0.05 * n + 0.01


def test_sparse_counts_the_receiving_layer():
    """Sequential: the layer below; a convolution: all of its window; direct: the hidden signal."""
    window = np.asarray(feedback.sparse(9)(KEY, (3, 3, 4, 2000)))
    assert abs(window.reshape(36, -1).sum(0).mean() - 9) < 0.3
    apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    params, x = {"a": jnp.ones((3, 50)), "b": jnp.ones((50, 2000))}, jnp.ones((1, 3))
    direct = lrules.direct_feedback_alignment(init=feedback.sparse(5)).init(KEY, apply, params, x).fixed["b"]
    sequential = lrules.feedback_alignment(init=feedback.sparse(5)).init(KEY, apply, params, x).fixed["b"]
    assert direct.shape == (2000, 50) and abs(float(direct.sum(1).mean()) - 5) < 0.2
    assert sequential.shape == (50, 2000) and abs(float(sequential.sum(0).mean()) - 5) < 0.2


def test_sparse_rescaled():
    drawn = np.asarray(feedback.sparse(4, rescale=True)(KEY, (10, 10)))
    np.testing.assert_allclose(np.unique(drawn), [0.0, 0.5])
    for make in (lambda: feedback.sparse(-1), lambda: feedback.sparse(0, rescale=True)):
        with pytest.raises(ValueError, match="n must be a number >"):
            make()


@pytest.mark.parametrize(("values", "init"), [((-1, 1), feedback.binary()), ((0, 1), feedback.binary(0, 1))])
def test_binary(values, init):
    drawn = np.asarray(init(KEY, (100, 100)))
    assert tuple(np.unique(drawn)) == values and abs(drawn.mean() - np.mean(values)) < 0.05


def test_shifted_and_absolute():
    for inner in (jax.nn.initializers.glorot_normal(), jax.nn.initializers.glorot_uniform()):
        plain = inner(KEY, (20, 30), jnp.float32)
        np.testing.assert_allclose(feedback.shifted(0.3, init=inner)(KEY, (20, 30)), plain + 0.3, rtol=1e-6)
        np.testing.assert_array_equal(feedback.absolute(inner)(KEY, (20, 30)), jnp.abs(plain))


def test_congruent():
    weight = jax.random.normal(KEY, (20, 30)).at[0, 0].set(0)
    drawn = np.asarray(feedback.congruent()(KEY, (20, 30), jnp.float32, weight=weight))
    np.testing.assert_array_equal(np.sign(drawn), np.sign(weight))
    np.testing.assert_array_equal(np.abs(drawn)[1:], np.abs(jax.nn.initializers.glorot_normal()(KEY, (20, 30)))[1:])


WRAPPERS = {
    "shifted": lambda init: feedback.shifted(0.1, init=init),
    "absolute": feedback.absolute,
    "averaged": lambda init: feedback.averaged(3, init=init),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_congruent_inside_another(name):
    """The forward weight reaches it, also where a loop runs over the layers; a direct rule has none to give."""
    apply = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["a"], p["b"])[0]  # noqa: E731
    b = jax.random.normal(KEY, (3, 50, 50))
    params, x, init = {"a": jnp.ones((3, 50)), "b": b}, jnp.ones((1, 3)), WRAPPERS[name](feedback.congruent())
    drawn = np.asarray(lrules.feedback_alignment(init).init(KEY, apply, params, x).fixed["b"])
    signs = {"shifted": np.sign(drawn - np.float32(0.1)), "absolute": np.ones_like(drawn)}.get(name, np.sign(drawn))
    np.testing.assert_array_equal(signs, np.ones_like(drawn) if name == "absolute" else np.sign(b))
    assert np.all(drawn > 0) == (name == "absolute")
    with pytest.raises(ValueError, match="does not belong to a weight: use a sequential rule"):
        lrules.direct_feedback_alignment(init).init(KEY, apply, params, x)


@pytest.mark.parametrize(
    "init",
    [
        feedback.sparse(2),
        feedback.sparse(2, rescale=True),
        feedback.binary(),
        feedback.shifted(1.0),
        feedback.averaged(3),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes(init, dtype):
    assert init(KEY, (4, 5), dtype).dtype == dtype
    with pytest.raises(ValueError, match="integer >= 1"):
        feedback.averaged(0)
