"""Direct feedback follows the examples through what a network does with the batch, or refuses the network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.engine.test_batch import SEQUENCES, reached
from tests.small import DFA, KEY, W, first, refused

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


@jax.custom_vjp
def rows(h, order):
    return h[order]


rows.defvjp(lambda h, order: (h[order], order), lambda order, d: (jnp.zeros_like(d).at[order].set(d), None))


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
    "a column of NumPy": lambda h, n: jnp.stack([h, -h], 1)[np.arange(n), (h[:, 0] > 0).astype(int)],
    "rows and columns of NumPy": lambda h, n: h[np.ix_(np.arange(n), np.arange(FEATURES))],
    "all, by NumPy": lambda h, n: jnp.take(h, np.arange(n), axis=0),
    "halves of the batch": lambda h, n: (2 * h.reshape(-1, 2, FEATURES)).reshape(-1, FEATURES),
    "two halves": lambda h, n: jax.vmap(jnp.sin)(h.reshape(2, -1, FEATURES)).reshape(-1, FEATURES),
    "halves there and back": lambda h, n: h.reshape(2, -1, 6).swapaxes(0, 1).swapaxes(0, 1).reshape(-1, 6),
    "halves that are mapped": lambda h, n: lax.map(jnp.sin, h, batch_size=2),
    "a ghost norm": lambda h, n: (lambda g: g - lax.stop_gradient(g.mean(1, keepdims=True)))(
        h.reshape(-1, 2, FEATURES)
    ).reshape(-1, FEATURES),
    "all rows of each": lambda h, n: each(h, n)[jnp.arange(n)[:, None] * 3 + jnp.arange(3)[None]].sum(1),
    "tiled": lambda h, n: jnp.tile(h, (3, 1)).reshape(3, n, FEATURES).mean(0),
    "beams": lambda h, n: jnp.repeat(h, 2, axis=0)[(np.arange(n)[:, None] * 2 + np.array([1, 0])).reshape(-1)][::2],
    "an empty piece": lambda h, n: jnp.concatenate([h[:0], h]),
    "rolled by nothing": lambda h, n: jnp.roll(h, 0, axis=0),
    "padded features": lambda h, n: jnp.pad(h, ((0, 0), (2, 2)), mode="edge")[:, 2:-2],
    "a sum of rows": lambda h, n: jax.vmap(lambda h: jax.ops.segment_sum(h, jnp.arange(3) // 2, 2))(
        each(h, n).reshape(n, 3, FEATURES)
    ).sum(1),
    "written at places that data tells": lambda h, n: (
        jnp.zeros((n, 3, FEATURES)).at[jnp.arange(n), (h[:, 0] > 0).astype(int)].set(h).sum(1)
    ),
    "a function with its derivative": lambda h, n: rows(h, jnp.arange(n)),
    "swapped twice in a loop": lambda h, n: lax.scan(lambda c, _: ((c[1], c[0]), None), (h, h), None, length=2)[0][0],
    "random columns": lambda h, n: jnp.stack([h, -h], 1)[
        jnp.arange(n), jax.random.randint(jax.random.fold_in(KEY, 1), (n,), 0, 2)
    ],
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
    "by a mask of others": lambda h, n: h[back(n)] * (h > 0).astype(h.dtype),
    "by numbers of others": lambda h, n: h[back(n)] * (1.0 + h.argmax(1, keepdims=True).astype(h.dtype)),
    "beside what is stopped": lambda h, n: lax.stop_gradient(h) + h[back(n)],
    "a matrix of NumPy": lambda h, n: jnp.asarray(np.eye(n, dtype=np.float32)[::-1].copy()) @ h,
    "random indices": lambda h, n: h[jax.random.permutation(jax.random.fold_in(jax.random.key(5), 1), n)],
    "indices of NumPy": lambda h, n: h[np.arange(n)[::-1].copy()],
    "tiled and split otherwise": lambda h, n: jnp.tile(h, (2, 1)).reshape(n, 2, FEATURES).sum(1),
    "halves in another order": lambda h, n: h.reshape(2, -1, FEATURES)[::-1].reshape(-1, FEATURES),
    "transposed halves": lambda h, n: h.reshape(2, -1, FEATURES).swapaxes(0, 1).reshape(-1, FEATURES),
    "a function with its derivative": lambda h, n: rows(h, back(n)),
    "a function with its derivative, by data": lambda h, n: rows(h, h[:, 0].argsort()),
    "rolled in a loop": lambda h, n: lax.scan(lambda c, _: (jnp.roll(c, 1, axis=0), c), h, None, length=3)[1][2],
    "swapped in a loop": lambda h, n: lax.scan(lambda c, _: ((c[1], c[0][back(n)]), None), (h, h), None, length=2)[0][
        0
    ],
    "a loop over indices": lambda h, n: lax.map(lambda i: h[i], back(n)),
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
        lambda h, n: (jnp.ones((n, n)) - jnp.eye(n)) @ h + 0.1 * h,
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


def test_deep_networks_with_indices_that_data_tells():
    """The search does not go through the network again for each index, nor deeper than Python can."""

    def deep(p, x):
        h = first(p, x)
        for _ in range(150):
            h = jnp.tanh(h @ p["b"] + 0.1)
        for _ in range(20):
            h = jnp.stack([h, -h], 1)[jnp.arange(len(h)), (h[:, 0] > 0).astype(int)]
        return h @ p["c"]

    assert reached(deep, W, SEQUENCES[:, 0]) == [0]


def test_other_views_at_another_batch():
    def apply(p, x):
        h = first(p, x)
        h = h.reshape(1, -1)[0].reshape(-1, 6) if len(x) < 5 else h[None, :, :, None].reshape(-1).reshape(-1, 6)
        return jnp.tanh(h @ p["b"]) @ p["c"]

    assert reached(apply, SMALL, SEQUENCES[:, 0]) == [0]
