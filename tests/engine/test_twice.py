"""The shapes at twice the batch: those that a walk over the network there would find."""

import jax
import jax.numpy as jnp
import pytest

import lrules
from lrules.engine.batch import _found
from lrules.engine.twice import AtTwice, write_shapes
from tests.test_zoo import build
from tests.zoo import ZOO

# Models that are written differently for twice the batch: none.
EXAMPLES = [name for name in ZOO if name not in ("linen_resnet18", "nnx_lenet5")]  # which are as others


@pytest.mark.parametrize("name", EXAMPLES)
def test_shapes_are_those_of_the_network_at_twice_the_batch(name):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        net, params, inputs = build(ZOO[name])[:3]
        graph = net.graph(params, inputs)
        try:
            twice = net.graph(params, inputs, double=True)
        except Exception:  # noqa: BLE001  it takes no other batch
            return
        assert write_shapes(graph, net.jaxpr_at_twice(params, inputs), net.input_batch_axes(inputs))
    for a, b in zip(_found(graph), _found(twice), strict=True):
        while True:
            assert AtTwice(a).aval.shape == b.aval.shape
            moving = [(u, v) for u, v in zip(a.operands, b.operands, strict=False) if u.data]
            if not moving:
                break
            a, b = moving[0]


def test_another_program_at_twice_the_batch_is_told():
    """A program for one example may be written differently: then the whole network is looked at there."""

    def differs(p, x):
        h = jnp.tanh(x @ p["a"])
        return (h if len(x) == 1 else h + 0.0) @ p["b"]

    def wired(p, x):
        h = jnp.tanh(x @ p["a"])
        g = jnp.tanh(h)
        return (h + g if len(x) == 1 else g + h) @ p["b"]

    def longer(p, x):
        y = jnp.tanh(x @ p["a"]) @ p["b"]
        return y if len(x) == 1 else jnp.sin(y)

    def shorter(p, x):
        y = jnp.tanh(x @ p["a"]) @ p["b"]
        return jnp.sin(y) if len(x) == 1 else y

    params, x = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((1, 3))
    for apply in (differs, wired, longer, shorter):
        net = lrules.Network(apply)
        assert not write_shapes(net.graph(params, x), net.jaxpr_at_twice(params, x), [0])
        feedback = lrules.direct_feedback_alignment().init(jax.random.key(0), net, params, x)
        assert feedback.fixed["b"].shape == (2, 4)


def test_inputs_without_a_batch_and_unused_ones():
    def apply(p, inputs):
        x, scale, unused = inputs
        return jnp.tanh(x @ p["a"] * jnp.concatenate([scale, scale])) @ p["b"]

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    inputs = (jnp.ones((5, 3)), jnp.ones(2), jnp.ones((5, 7)))
    net = lrules.Network(apply, batch_axes=(0, None, 0))
    with jax.numpy_rank_promotion("allow"):
        graph = net.graph(params, inputs)
        assert write_shapes(graph, net.jaxpr_at_twice(params, inputs), [0, None, 0])
    (hidden,) = graph.hidden
    assert AtTwice(hidden.reader).aval.shape == (10, 4)
