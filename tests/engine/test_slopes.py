"""Which slope a layer or a hidden signal has: the activation above the one, the one that makes the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from tests.bridge import close
from tests.small import KEY, NONE

X = jax.random.normal(KEY, (4, 5))
P = {
    "a": jax.random.normal(jax.random.key(1), (5, 6)),
    "b": jax.random.normal(jax.random.key(2), (6, 6)),
    "c": jax.random.normal(jax.random.key(3), (6, 3)),
    "bias": jnp.linspace(-1, 1, 6),
    "scale": jnp.linspace(1, 2, 6),
}


def slopes(net, params=P, x=X, modify=lambda rule: rule):
    """The slope at each layer, by site."""
    seen = {}

    def backward(op, w, b, x, d, layer, slope):
        seen[layer.site] = slope
        return *jax.vjp(op, w, x)[1](d), None

    rule = modify(lrules.sequential(backward))
    got, pull = jax.vjp(lambda p: lrules.transform(net, rule)(p, NONE, x), params)
    close(pull(jnp.ones_like(got))[0], jax.vjp(lambda p: net(p, x), params)[1](jnp.ones_like(got))[0], 1e-5)
    return seen


def normalised(z):
    return (z - z.mean(-1, keepdims=True)) * jax.lax.rsqrt(z.var(-1, keepdims=True) + 1e-5)


def rows(v):
    return v.reshape(1, -1)


def dtanh(z):
    return 1 - np.tanh(z) ** 2


Z = X @ P["a"]
BETWEEN = {  # what lies between a layer's output and the activation, and the pre-activation
    "nothing": lambda p, y: y,
    "bias": lambda p, y: y + rows(p["bias"]),
    "scale": lambda p, y: rows(p["scale"]) * y / 2 - rows(p["bias"]),
    "normalisation": lambda p, y: normalised(y) * rows(p["scale"]),
    "skip": lambda p, y: y + jnp.sin(X @ jnp.ones((5, 6))),
    "mask": lambda p, y: y * (X[:, :1] > 0).astype(y.dtype),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_leaves_the_activation_the_layers_own(name):
    between = BETWEEN[name]
    seen = slopes(lambda p, x: jnp.tanh(between(p, x @ p["a"])) @ p["c"])
    close(seen["a"], dtanh(between(P, Z)), 1e-5)
    assert seen["c"] is None


def test_reshapes_and_transposes():
    """The slope has the shape of the layer's output, whatever shape the pre-activation has."""

    def net(p, x):
        h = jnp.tanh((x @ p["a"]).reshape(4, 2, 3).transpose(2, 0, 1))
        return h.transpose(1, 2, 0).reshape(4, 6) @ p["c"]

    close(slopes(net)["a"], dtanh(Z), 1e-5)
    each = jax.vmap(lambda p, x: p["c"].T @ jnp.tanh(p["a"].T @ x), in_axes=(None, 0))
    close(np.sort(np.ravel(slopes(each)["a"])), np.sort(np.ravel(dtanh(Z))), 1e-5)


def test_two_layers_make_one_pre_activation():
    seen = slopes(lambda p, x: jnp.tanh(x @ p["a"] + jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"])
    z = Z + jax.nn.relu(Z) @ P["b"]
    close(seen["a"], dtanh(z), 1e-5)
    close(seen["b"], dtanh(z), 1e-5)
    close(seen["a#2"], (np.asarray(Z) > 0).astype(float))


def test_none():
    """No activation above, several, one that no error comes from, or one whose input is more than a sum or multiple."""
    assert slopes(lambda p, x: (x @ p["a"]) @ p["c"])["a"] is None
    assert slopes(lambda p, x: jnp.max((x @ p["a"]).reshape(4, 3, 2), -1) @ p["c"][:3])["a"] is None
    assert slopes(lambda p, x: jnp.tanh((x @ p["a"]) * jnp.sin(x @ p["a"])) @ p["c"])["a"] is None
    assert slopes(lambda p, x: jnp.tanh(rows(p["scale"]) / (9 + x @ p["a"])) @ p["c"])["a"] is None
    two = slopes(lambda p, x: (lambda y: jnp.tanh(y) @ p["b"] + jax.nn.relu(y))(x @ p["a"]) @ p["c"])
    assert two["a"] is None
    one = slopes(lambda p, x: (lambda y: jnp.tanh(y) + jax.lax.stop_gradient(jax.nn.relu(y)))(x @ p["a"]) @ p["c"])
    close(one["a"], dtanh(Z), 1e-5)


def test_what_modifiers_put_there():
    net = lambda p, x: jnp.tanh(x @ p["a"]) @ p["c"]  # noqa: E731
    seen = {}

    def backward(op, w, b, x, d, layer, slope):
        seen[layer.site] = slope
        return *jax.vjp(op, w, x)[1](d), None

    for modify, wanted in (
        (lambda rule: lrules.replace_derivative(rule, jnp.cos), np.cos(Z)),
        (lrules.without_derivatives, np.ones_like(Z)),
        (lrules.sign_error, dtanh(Z)),
    ):
        rule = modify(lrules.sequential(backward))
        jax.grad(lambda p: lrules.transform(net, rule)(p, NONE, X).sum())(P)  # noqa: B023
        close(seen["a"], wanted, 1e-5)


def test_precision_of_the_layer():
    net = lambda p, x: jnp.tanh((x @ p["a"]).astype(jnp.float32)).astype(jnp.bfloat16) @ p["c"]  # noqa: E731
    half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (P, X))
    seen = {}

    def backward(op, w, b, x, d, layer, slope, y):
        seen[layer.site] = slope, y
        return *jax.vjp(op, w, x)[1](d), None

    f = lrules.transform(net, lrules.sequential(backward))
    jax.grad(lambda p: f(p, NONE, half[1]).astype(jnp.float32).sum())(half[0])
    slope, y = seen["a"]
    assert slope.dtype == y.dtype == jnp.bfloat16
    close(slope.astype(jnp.float32), dtanh(np.asarray(y, np.float32)), 1e-2)


@pytest.mark.parametrize("construct", ["remat", "scan", "cond"])
def test_an_activation_elsewhere_is_refused(construct):
    """The layer lies inside, its activation outside: its slope cannot be handed in."""
    wrap = {
        "remat": lambda f, x: jax.checkpoint(f)(x),
        "scan": lambda f, x: jax.lax.scan(lambda _, row: (None, f(row[None])[0]), None, x)[1],
        "cond": lambda f, x: jax.lax.cond(x.sum() > 0, f, f, x),
    }[construct]
    net = lambda p, x: jnp.tanh(wrap(lambda x: x @ p["a"], x)) @ p["c"]  # noqa: E731
    if construct == "remat":
        with pytest.raises(NotImplementedError, match="'tanh' lies in another loop, branch or remat than .* 'a'"):
            slopes(net)
    else:  # what comes out of a loop or branch is not that layer's output any more
        assert slopes(net)["a"] is None
