"""Lanes: each seed with its settings. What a group of lanes has, and functions for all lanes of a group."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any


@dataclasses.dataclass
class Group:
    """Lanes that train together by vmap."""

    lanes: slice
    keys: Array
    settings: tuple[Array, ...]
    carry: PyTree = None

    @property
    def size(self) -> int:
        return self.lanes.stop - self.lanes.start


def over_lanes(function: Callable[..., Any], size: int, shared: int) -> Callable[..., Any]:
    """The function for arguments [lanes, ...], but for the last `shared` ones, which all lanes share."""

    def over(*args: Any) -> Any:
        split = len(args) - shared
        if size > 1:
            return jax.vmap(function, (0,) * split + (None,) * shared)(*args)
        lane = jax.tree.map(lambda leaf: leaf[0], args[:split])
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], function(*lane, *args[split:]))

    return over


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
@functools.partial(jax.vmap, in_axes=(0, None, None, None, None, None))
def shuffle(key: Array, purpose: int, epoch: int, examples: int, steps: int, batch_size: int) -> tuple[Array, Array]:
    key = jax.random.fold_in(jax.random.fold_in(key, purpose), epoch)
    order = jax.random.permutation(key, examples)[: steps * batch_size]
    return key, order.reshape(steps, batch_size)
