"""How many states lie between layers and outputs."""

import jax
import jax.numpy as jnp
import pytest

import lrules
from lrules.engine.distance import depth_of

W = {name: jnp.ones((4, 4)) for name in "abcd"}
X = jnp.ones((3, 4))
STACK = {"w": jnp.ones((5, 4, 4)), "u": jnp.ones((4, 4)), "out": jnp.ones((4, 2))}


def depth(net, params, x=X, **options):
    graph = lrules.Network(net, **options).graph(params, x)
    return depth_of(graph, {h.root.place: None for h in graph.hidden})


def chain(p, x):
    for name in "abc":
        x = jnp.tanh(x @ p[name])
    return x @ p["d"]


def skips(p, x):
    h = x @ p["a"]
    for name in "bc":
        h = h + jnp.tanh(h) @ p[name]  # the stream is no state: only what layers read
    return h @ p["d"]


def inside_jit_and_remat(p, x):
    h = jax.jit(lambda x: jnp.tanh(x @ p["a"]))(x)
    return jax.checkpoint(lambda h: jnp.tanh(jnp.tanh(h @ p["b"]) @ p["c"]))(h) @ p["d"]


def stopped(p, x):
    return jax.lax.stop_gradient(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"])) @ p["c"]


@pytest.mark.parametrize(
    "net, wanted", [(chain, 3), (skips, 1), (inside_jit_and_remat, 3), (stopped, 0), (lambda p, x: x @ p["a"], 0)]
)
def test_depth(net, wanted):
    """An error crosses one state in each step, on the shortest way."""
    assert depth(net, W) == wanted


def test_aux_sends_no_error():
    def net(p, x):
        h = jnp.tanh(x @ p["a"])
        return jnp.tanh(h @ p["b"]) @ p["c"], h

    assert depth(net, W, has_aux=True) == 2


@pytest.mark.parametrize("reverse", [False, True])
def test_loops(reverse):
    """A weight with a slice for each iteration needs an error in each, a shared weight in one."""

    def stack(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"], reverse=reverse)[0] @ p["out"]

    def recurrent(p, x):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["u"]), None), x, None, length=5, reverse=reverse)[0] @ p["out"]

    assert depth(stack, STACK) == 5 and depth(recurrent, STACK) == 1
