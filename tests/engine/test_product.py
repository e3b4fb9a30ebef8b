"""A layer's multiplication as rules get it: its two transposes are those of jax.vjp, for layers of any kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lrules
from lrules.engine import product
from lrules.engine.product import Product
from lrules.engine.shared import Pieces

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (5, 3))
IMAGES = jax.random.normal(KEY, (2, 6, 6, 3))
LAYERS = {
    "dense": (lambda w, x: x @ w, (3, 4), X),
    "weight first": (lambda w, x: jnp.einsum("oi,bi->bo", w, x), (4, 3), X),
    "members": (lambda w, x: jnp.einsum("bmi,mio->bmo", jnp.stack([x, 2 * x], 1), w), (2, 3, 4), X),
    "conv": (
        lambda w, x: lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        (3, 3, 3, 4), IMAGES,
    ),
    "embedding": (lambda w, x: w[x], (7, 4), jnp.array([0, 3, 3, 6, 1])),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_transposes(name):
    apply, shape, x = LAYERS[name]
    seen = []

    def backward(op, w, b, x, d, layer):
        seen.append(layer.name)
        dw = op.weight_gradient(w, x, d)
        dx = op.passed_down(w, x, d)
        wanted_w, wanted_x = jax.vjp(op, w, x)[1](d)
        assert jax.tree.structure(dx) == jax.tree.structure(wanted_x)
        np.testing.assert_allclose(dw, wanted_w, rtol=1e-6, atol=1e-6)
        for got, wanted in zip(jax.tree.leaves(dx), jax.tree.leaves(wanted_x), strict=True):
            assert got.dtype == wanted.dtype
            if got.dtype != jax.dtypes.float0:
                np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
        return dw, dx, None

    w = jax.random.normal(jax.random.key(1), shape)
    f = lrules.transform(lambda p, x: apply(p["w"], x), lrules.sequential(backward))
    grads = jax.grad(lambda p: (f(p, lrules.Feedback({}, {}), x) ** 2).sum())({"w": w})
    assert seen == ["w"]
    wanted = jax.grad(lambda w: (apply(w, x) ** 2).sum())(w)
    np.testing.assert_allclose(grads["w"], wanted, rtol=1e-5, atol=1e-5)


def test_layers_of_one_shape_share_what_they_trace_and_not_their_numbers():
    """Two layers of one shape, and a third of another stride: each gets its own numbers."""

    def apply(p, x):
        strided = lax.conv_general_dilated(x, p["c"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        plain = lambda x, w: lax.conv_general_dilated(  # noqa: E731
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return plain(jnp.tanh(plain(jnp.tanh(strided), p["a"])), p["b"])

    keys = jax.random.split(KEY, 3)
    params = {name: jax.random.normal(k, (3, 3, 3, 3)) for name, k in zip("abc", keys, strict=True)}

    def backward(op, w, b, x, d, layer):
        return op.weight_gradient(w, x, d), op.passed_down(w, x, d), None

    f = lrules.transform(apply, lrules.sequential(backward))
    got = jax.grad(lambda p: (f(p, lrules.Feedback({}, {}), IMAGES) ** 2).sum())(params)
    wanted = jax.grad(lambda p: (apply(p, IMAGES) ** 2).sum())(params)
    for name in params:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-4, atol=1e-4)


def test_products_of_one_shape_are_traced_once(monkeypatch):
    evaluated, bind = [], product.bind
    monkeypatch.setattr(product, "EVERYWHERE", Pieces())
    monkeypatch.setattr(product, "bind", lambda eqn, values: evaluated.append(eqn) or bind(eqn, values))
    params = {name: jnp.ones((3, 3)) for name in "abc"}
    net = lrules.Network(lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"])
    for layer in net.graph(params, X).layers:
        op = Product(layer.eqn, layer.position, single=True)
        op.weight_gradient(params["a"], X, X)
        op.passed_down(params["a"], X, X)
    assert len(evaluated) == 2


def dense(factor):
    """A product with a derivative of its own."""
    made = jax.custom_vjp(lambda w, x: factor * (x @ w))
    made.defvjp(lambda w, x: (factor * (x @ w), (w, x)), lambda r, d: (factor * (r[1].T @ d), factor * (d @ r[0].T)))
    return made


def test_products_with_a_derivative_of_their_own_are_not_shared():
    one, two = dense(1.0), dense(-2.0)

    def apply(p, x):
        return two(p["b"], jnp.tanh(one(p["a"], x)))

    def backward(op, w, b, x, d, layer):
        return op.weight_gradient(w, x, d), op.passed_down(w, x, d), None

    params = {name: jax.random.normal(jax.random.key(i), (3, 3)) for i, name in enumerate("ab")}
    f = lrules.transform(apply, lrules.sequential(backward))
    got = jax.grad(lambda p: (f(p, lrules.Feedback({}, {}), X) ** 2).sum())(params)
    wanted = jax.grad(lambda p: (apply(p, X) ** 2).sum())(params)
    for name in params:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-4, atol=1e-4)


def conv(kernel, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lambda w, x: lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options), kernel, (3, 6, 5, 4)


TERMS = {
    "dense": (lambda w, x: x @ w, (4, 3), (5, 4)),
    "weight first": (lambda w, x: w @ x, (3, 4), (4, 5)),
    "several axes": (lambda w, x: jnp.einsum("btij,ijo->bto", x, w), (2, 3, 4), (5, 6, 2, 3)),
    "heads": (lambda w, x: jnp.einsum("bhi,hio->bho", x, w), (2, 3, 4), (5, 2, 3)),
    "padding": conv((3, 3, 4, 2), window_strides=(1, 1), padding="SAME"),
    "strides": conv((3, 2, 4, 2), window_strides=(2, 3), padding=((2, 0), (1, 1))),
    "dilated kernel": conv((3, 3, 4, 2), window_strides=(1, 2), padding="SAME", rhs_dilation=(2, 1)),
    "dilated input": conv((3, 3, 4, 2), window_strides=(1, 1), padding=((2, 2), (1, 3)), lhs_dilation=(2, 3)),
    "groups": conv((3, 3, 2, 6), window_strides=(1, 1), padding="SAME", feature_group_count=2),
    "groups of examples": conv((3, 3, 4, 6), window_strides=(1, 1), padding="SAME", batch_group_count=3),
    "more padding than map": conv((3, 3, 4, 2), window_strides=(9, 9), padding=((7, 0), (7, 0)), rhs_dilation=(2, 2)),
    "rows by group": (lambda w, x: lax.ragged_dot(x, w, jnp.array([2, 0, 3])), (3, 4, 2), (5, 4)),
}


@pytest.mark.parametrize("name", TERMS)
def test_terms(name):
    """Each weight is in as many terms as its gradient is large, if all inputs and errors are one."""
    apply, weight, data = TERMS[name]
    w, x = jnp.zeros(weight), jnp.ones(data)
    (layer,) = lrules.Network(apply, batch_axes=None).graph(w, x).layers
    single = name != "rows by group"
    rest = [] if single else [jnp.array([2, 0, 3])]
    op = Product(layer.eqn, layer.position, single)
    x = x if single else (x, *rest)
    counted = np.broadcast_to(op.terms(w, x), w.shape)
    wanted = np.asarray(jax.grad(lambda w: apply(w, jnp.ones(data)).sum())(w))
    np.testing.assert_array_equal(counted, np.maximum(wanted, 1))
    assert name not in ("padding", "groups of examples") or len(np.unique(wanted)) > 1


def test_more_terms_than_float16_can_count():
    apply = lambda w, x: lax.ragged_dot(x, w, jnp.array([1, 0, 69_999]))  # noqa: E731
    w, x = jnp.ones((3, 4, 2), jnp.float16), jnp.ones((70_000, 4), jnp.float16)
    (layer,) = lrules.Network(apply, batch_axes=None).graph(w, x).layers
    terms = Product(layer.eqn, layer.position, False).terms(w, (x, jnp.array([1, 0, 69_999])))
    np.testing.assert_allclose(terms[:, 0, 0], [1, 1, 69_999], rtol=1e-3)
