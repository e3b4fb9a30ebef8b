"""Batches of sets that do not fit on the device, read from the disk while the device computes.

    for x, y in chunks(data, batch=128, seed=0, epoch=3, steps=50):  # [50, 128, ...] and [50, 128]
        carry = train(carry, x, y)                                   # a compiled scan over the 50 steps

Grain's threads read the next chunks ahead. The order depends on the seed and the epoch alone: not on the number of
threads, nor on the number of processes.
"""

from collections.abc import Mapping
from typing import Any

import grain
import jax
import numpy as np

from experiments.data import Dataset
from experiments.errors import InputError

Chunk = tuple[np.ndarray, np.ndarray]


def chunks(
    data: Dataset,
    batch: int,
    seed: int,
    epoch: int,
    steps: int,
    *,
    threads: int = 2,
    ahead: int = 2,
    process: tuple[int, int] | None = None,
    first: int = 0,
) -> grain.DatasetIterator[Chunk]:
    """One epoch of training batches in a new order: x [steps, batch, ...] as stored (or float32), y [steps, batch].

    An epoch has as many full batches as there are; the last chunk has fewer steps if `steps` does not divide them. Of
    several processes each gets, and reads, its own part of every batch: [steps, batch / processes, ...], and these
    parts in the order of the processes are the batches of a single process.

    The iterator's `get_state()` is a small dictionary for JSON, the position after the chunk that it gave last;
    `set_state(state)` on an iterator with the same arguments goes on from there.

    Args:
      data: the set.
      batch: the number of examples of a step, over all processes.
      seed, epoch: the order of the examples is drawn from these two.
      steps: the most steps in one chunk.
      threads: the number of threads that read; with 0 a chunk is read where it is asked for.
      ahead: the most chunks that are read ahead.
      process: the index of this process and their number (default: JAX's).
      first: the chunk to begin with.

    Raises:
      InputError: there is no full batch, or a number is out of its range.
    """
    index, count = (jax.process_index(), jax.process_count()) if process is None else process
    examples = len(data.x_train)
    _at_least(1, {"batch size": batch, "number of steps in a chunk": steps})
    _at_least(0, {"seed": seed, "epoch": epoch})
    if batch > examples:
        raise InputError(
            f"The batch size must be <= {examples}, the number of training examples of {data.name}, got {batch}."
        )
    if batch % count:
        raise InputError(f"The batch size must be a multiple of {count}, the number of processes, got {batch}.")
    order = np.random.default_rng([seed, epoch]).permutation(examples)
    order = order[: examples // batch * batch].reshape(-1, count, batch // count)[:, index]
    return _read(
        data.x_train,
        data.y_train,
        [order[i : i + steps] for i in range(first * steps, len(order), steps)],
        threads,
        ahead,
    )


def _read(x: Any, y: Any, parts: list[np.ndarray], threads: int, ahead: int) -> grain.DatasetIterator[Chunk]:
    """The rows of each part, read by threads."""
    _at_least(0, {"number of threads": threads})
    _at_least(min(threads, 1), {"number of chunks ahead": ahead})

    def read(part: int) -> Chunk:
        rows = parts[part]
        return _rows(x, rows), _rows(y, rows)

    # The order is drawn beforehand, all at once: Grain's own shuffle and batch make a call for each example, and take
    # six times as long for MNIST.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead if threads else 0)
    return iter(grain.MapDataset.range(len(parts)).map(read).to_iter_dataset(options))


def _rows(array: Any, rows: np.ndarray) -> np.ndarray:
    values = np.asarray(array[rows.ravel()])
    if np.issubdtype(values.dtype, np.floating):
        values = values.astype(np.float32, copy=False)
    return values.reshape(rows.shape + values.shape[1:])


def _at_least(least: int, numbers: Mapping[str, int]) -> None:
    for name, value in numbers.items():
        if value < least:
            raise InputError(f"The {name} must be at least {least}, got {value}.")
