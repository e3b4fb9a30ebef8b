"""Direct feedback follows the examples through what a network does with the batch, or refuses the network."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.engine.test_batch import SEQUENCES, reached
from tests.small import DFA, W, first, refused

EXAMPLES = 4
FEATURES = 6
SMALL = {name: value * 0.1 for name, value in W.items()}


def network(move, any_batch):
    """A network that moves a hidden signal `[batch, features]`; `move` gets the number of examples, too.

    Without `any_batch` it accepts one batch size only, so nothing tells which axes grow with the batch.
    """

    def apply(p, x):
        h = first(p, x if any_batch else x.reshape(EXAMPLES, 5))
        return jnp.tanh(move(h, len(h) if any_batch else EXAMPLES) @ p["b"]) @ p["c"]

    return apply


def back(n):
    return jnp.arange(n)[::-1]


def each(h, n, times=3):
    """`[batch * times, features]`, the rows of an example one behind the other."""
    return jnp.stack([h] * times, 1).reshape(n * times, FEATURES)


def rounds(h, n, times=3):
    """`[times * batch, features]`, all examples after each other."""
    return jnp.concatenate([(k + 1) * h for k in range(times)])


def one_hot(h, n):
    """Row i chooses example n - 1 - i; that this depends on data hides it."""
    return jax.nn.one_hot(back(n) + 0 * h.argmax(1), n)


KEPT = {
    "two columns of indices": lambda h, n: h[jnp.arange(n)[:, None], jnp.arange(FEATURES)[None, ::-1]],
    "a column that data tells": lambda h, n: jnp.stack([h, -h], 1)[jnp.arange(n), (h[:, 0] > 0).astype(int)],
    "features of each example": lambda h, n: jnp.take_along_axis(h, h.argsort(1), axis=1),
    "one of the rows": lambda h, n: each(h, n).reshape(n, 3, FEATURES)[:, 0],
    "strides": lambda h, n: each(h, n)[1::3],
    "repeated": lambda h, n: jnp.repeat(h, 3, axis=0)[::3],
    "a round": lambda h, n: rounds(h, n).reshape(3, n, FEATURES)[0],
    "the first round": lambda h, n: rounds(h, n)[:n],
    "the last round": lambda h, n: rounds(h, n)[-n:],
    "two views": lambda h, n: rounds(h, n, 2).reshape(2, n, FEATURES).sum(0),
    "two views of rows": lambda h, n: jnp.concatenate([each(h, n), -each(h, n)]).reshape(2, n, 3, FEATURES)[1, :, 2],
    "chosen features": lambda h, n: h[:, back(FEATURES)],
    "carried": lambda h, n: lax.scan(lambda c, _: (jnp.sin(c), None), h, None, length=2)[0],
    "flattened": lambda h, n: h.reshape(-1).reshape(n, FEATURES),
    "rolled features": lambda h, n: jnp.roll(h, 1, axis=1),
    "split features": lambda h, n: jnp.split(h, 2, axis=1)[1] @ jnp.ones((3, FEATURES)),
    "written features": lambda h, n: lax.dynamic_update_slice(jnp.zeros_like(h), h[:, 1:2], (0, 3)),
    "mapped": lambda h, n: lax.map(jnp.sin, h),
    "a branch": lambda h, n: lax.cond(h.sum() > 0, lambda h: 2 * h, lambda h: h, h),
    "a transform of features": lambda h, n: jnp.fft.fft(h).real,
    "a slice of each example": jax.vmap(lambda h, n: lax.dynamic_slice(jnp.tile(h, 2), (h.argmax(),), (6,)), (0, None)),
    "not by what is stopped": lambda h, n: h + lax.stop_gradient(h)[back(n)],
}

MOVED = {
    "two columns of indices": lambda h, n: h[back(n)[:, None], jnp.arange(FEATURES)[None]],
    "along the batch": lambda h, n: jnp.take_along_axis(h, back(n)[:, None], axis=0),
    "along the batch, all indices": lambda h, n: jnp.take_along_axis(h, h.argsort(0), axis=0),
    "merged rows": lambda h, n: each(h, n)[back(3 * n)].reshape(n, 3, FEATURES)[:, 0],
    "merged and split otherwise": lambda h, n: jnp.sin(each(h, n)).reshape(3, n, FEATURES)[0],
    "rows of the first examples": lambda h, n: each(h, n)[:n],
    "strides of rounds": lambda h, n: rounds(h, n)[::3],
    "halves": lambda h, n: jnp.concatenate([h[n // 2 :], h[: n // 2]]),
    "views of which one is moved": lambda h, n: jnp.concatenate([h, h[back(n)]])[:n],
    "rows and rounds": lambda h, n: jnp.concatenate([each(h, n), rounds(h, n)])[::6],
    "carried": lambda h, n: lax.scan(lambda c, _: (jnp.sin(c), None), h[back(n)], None, length=2)[0],
    "a transpose": lambda h, n: h.reshape(FEATURES, n).T,
    "sorted": lambda h, n: jnp.sort(h, axis=0),
    "rolled": lambda h, n: jnp.roll(h, 1, axis=0),
    "split afterwards": lambda h, n: jnp.split(h[back(n)], 2, axis=1)[0] @ jnp.ones((3, FEATURES)),
    "a permutation matrix": lambda h, n: jnp.eye(n)[::-1] @ h,
    "a choice by data": lambda h, n: one_hot(h, n).T @ h,
    "written rows": lambda h, n: lax.dynamic_update_slice(jnp.zeros_like(h), h[1:2], (0, 0)),
    "chosen elements": lambda h, n: jnp.where(h > 0, h[back(n)], 0.0),
    "mapped": lambda h, n: lax.map(jnp.sin, h[back(n)]),
    "a branch": lambda h, n: lax.cond(h.sum() > 0, lambda h: h[back(n)], lambda h: h, h),
    "a transform of features": lambda h, n: jnp.fft.fft(h[back(n)]).real,
    "inside a function": lambda h, n: jax.checkpoint(lambda h: h[back(n)])(h),
}


@pytest.mark.parametrize("any_batch", [True, False], ids=["any batch", "one batch"])
@pytest.mark.parametrize("move", KEPT.values(), ids=KEPT)
def test_examples_that_keep_their_order(move, any_batch):
    assert reached(network(move, any_batch), SMALL, SEQUENCES[:, 0]) == [0]


@pytest.mark.parametrize("any_batch", [True, False], ids=["any batch", "one batch"])
@pytest.mark.parametrize("move", MOVED.values(), ids=MOVED)
def test_examples_in_another_order_are_refused(move, any_batch):
    inputs = SEQUENCES[:, 0]
    refused(network(move, any_batch), "the batch axis of", rule=DFA, error=ValueError, inputs=inputs)


@pytest.mark.parametrize("any_batch", [True, False], ids=["any batch", "one batch"])
def test_examples_that_meet_each_other(any_batch):
    """Where one of the operands has the examples in order, they are: each example gets its own error, and may be read
    by others."""
    for meet in (
        lambda h, n: 0.5 * h + 0.5 * h[back(n)],
        lambda h, n: 0.5 * h[back(n)] + 0.5 * h,
        lambda h, n: h[back(n)] * h,
    ):
        assert reached(network(meet, any_batch), SMALL, SEQUENCES[:, 0]) == [0, 3]
    for mix in (
        lambda h, n: jax.nn.softmax(h @ h.T) @ h,
        lambda h, n: (jnp.eye(n) - 1 / n) @ h,
        lambda h, n: jnp.broadcast_to(h.mean(0), h.shape) + h,
        lambda h, n: jnp.broadcast_to(h.mean(0), h.shape),
    ):
        assert reached(network(mix, any_batch), SMALL, SEQUENCES[:, 0]) == [0, 1, 2, 3]


def test_two_views_of_each_example():
    """Each example gets its error in both views, as the twin networks of contrastive losses have them."""

    def twins(p, x):
        h = first(p, jnp.concatenate([x, 2 * x]))
        a, b = jnp.split(jnp.tanh(h @ p["b"]), 2)
        return (a * b) @ p["c"]

    assert reached(twins, SMALL, SEQUENCES[:, 0]) == [0]
