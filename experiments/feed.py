"""Where the examples of a run come from: arrays on the device, or parts that are read from the disk."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import Dataset

Array = jax.Array
Place = Callable[[Any], Array]  # puts an array on the device, or on all of them
CHUNK = 64 * 2**20  # bytes that are read from the disk together


class Resident:
    """A set that lies on the device."""

    chunk: int | None = None  # steps that are read together: any number

    def __init__(self, data: Dataset, place: Place):
        self.sets = {name: (place(x), place(y)) for name, (x, y) in data.parts.items()}

    def first(self, examples: int) -> tuple[Array, Array]:
        """The first training examples."""
        x, y = self.sets["train"]
        return x[:examples], y[:examples]

    def put(self, rows: Array) -> Array:
        """Some rows of a set, on the device."""
        return rows

    def parts(self, epoch: int, step: int) -> Iterator[tuple[Array, Array]]:
        """Inputs and targets for each part of an epoch, from a step on."""
        return itertools.repeat(self.sets["train"])

    def order(self, order: Array) -> Array:
        """The rows of `parts` for each step [lanes, steps, batch], of an order of the whole set."""
        return order


class Streamed:
    """A set that is read from the disk, part by part; all lanes see the batches of one seed."""

    def __init__(self, data: Dataset, place: Place, *, seed: int, batch_size: int, steps: int, record_every: int):
        self.sets, self._data, self._place = data.parts, data, place
        self._seed, self._batch = seed, batch_size
        step = batch_size * math.prod(data.shape) * data.x_train.dtype.itemsize
        most = max(1, min(CHUNK // max(step, 1), steps))
        # Records fall between two parts.
        self.chunk = max(n for n in range(1, most + 1) if record_every % n == 0) if record_every else most

    def first(self, examples: int) -> tuple[Array, Array]:
        x, y = self.sets["train"]
        return self.put(x[:examples]), self.put(y[:examples])

    def put(self, rows: Any) -> Array:
        rows = np.asarray(rows)
        return self._place(rows.astype(np.float32) if np.issubdtype(rows.dtype, np.floating) else rows)

    def parts(self, epoch: int, step: int) -> Iterator[tuple[Array, Array]]:
        from experiments.streaming import chunks  # Grain is slow to import

        first = step // self.chunk
        read = chunks(self._data, self._batch, self._seed, epoch, self.chunk, process=(0, 1), first=first)
        for x, y in read:
            # The last part may be shorter, and the program is compiled for one length.
            missing = self.chunk - len(x)
            if missing:
                x, y = (np.concatenate([a, np.zeros((missing, *a.shape[1:]), a.dtype)]) for a in (x, y))
            yield self._place(x.reshape(-1, *x.shape[2:])), self._place(y.reshape(-1))

    def order(self, order: Array) -> Array:
        rows = jnp.arange(self.chunk * self._batch).reshape(self.chunk, self._batch)
        return self._place(jnp.broadcast_to(rows, (len(order), *rows.shape)))


Feed = Resident | Streamed
