"""A network: where its batch lies, and which networks are one."""

import jax
import jax.numpy as jnp
import pytest

import lrules

X = jnp.ones((8, 4))


def test_none_is_counted_as_vmap_counts_it():
    """The axes of a prefix tree belong to the leaves that are there; an axis for what is not there is no matter."""
    inputs = ({"x": X, "edges": None}, None, [None, jnp.ones((3, 8))])
    for axes, want in (
        (({"x": 0, "edges": 0}, 0, 1), [0, 1]),
        ((0, None, [0, 1]), [0, 1]),
        ((None, 0, 1), [None, 1]),
        (None, [None, None]),
    ):
        net = lrules.Network(lambda p, i: i, batch_axes=axes)
        assert net.input_batch_axes(inputs) == want
        if want != [None, None]:
            jax.vmap(lambda i: i[2][1], in_axes=(axes,))(inputs)
            assert net.batch_size(inputs) == 8
    with pytest.raises(ValueError, match="must be a prefix of the inputs"):
        lrules.Network(lambda p, i: i, batch_axes=({"x": 0}, 0, 1)).input_batch_axes(inputs)


def test_networks_with_other_frozen_weights_are_not_one():
    """`jax.jit` keeps traced networks by equality, and must not run one with another's frozen weights."""
    apply = lambda p, frozen, x: x @ frozen["w"] @ p  # noqa: E731
    one, two = (lrules.Network(apply, frozen={"w": scale * jnp.eye(3)}) for scale in (1.0, 2.0))
    p, x = jnp.eye(3), jnp.ones((1, 3))
    for net in (one, two):
        assert jnp.array_equal(jax.jit(net)(p, x), net(p, x))
    assert one != two and one == lrules.Network(apply, frozen=one.frozen)
    assert hash(one) == hash(lrules.Network(apply, frozen=one.frozen))


def test_axes_of_signals():
    with pytest.raises(ValueError, match="signal_axes must be an axis"):
        lrules.Network(lambda p, x: x @ p, signal_axes="x")
