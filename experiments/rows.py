"""Rows of arrays on disk, a choice of them or one feature of a TFDS set: read where they are asked for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


class Rows:
    """Some rows of a larger array, in a given order; nothing is read before a row is asked for.

    Example: `Rows(numpy.load("x.npy", mmap_mode="r"), numpy.array([4, 2]))[0]` is row 4 of the file.
    """

    def __init__(self, base: Any, index: np.ndarray) -> None:
        self._base, self._index = base, index
        self.shape: tuple[int, ...] = (len(index), *base.shape[1:])
        self.dtype: np.dtype = base.dtype
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self._base[self._index[rows]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._base[self._index], dtype)


class Column:
    """One feature of the records of a TFDS split, decoded where it is asked for; each is brought to the shape given.

    `change` is what is done to each before, such as to resize an image.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        key: str,
        shape: tuple[int, ...],
        dtype: Any,
        change: Callable[[np.ndarray], np.ndarray] = np.asarray,
    ) -> None:
        self._records, self._key, self._change = records, key, change
        self.shape: tuple[int, ...] = (len(records), *shape)
        self.dtype = np.dtype(dtype)
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, rows: Any) -> np.ndarray:
        numbers = np.arange(len(self))[rows]
        values = [np.reshape(self._change(self._records[int(i)][self._key]), self.shape[1:]) for i in np.ravel(numbers)]
        return np.array(values, self.dtype).reshape(np.shape(numbers) + self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def on_disk(x: Any) -> bool:
    """Whether the rows are read from a file where they are asked for."""
    return isinstance(x, (np.memmap, Rows, Column))


def take(x: Any, index: np.ndarray) -> Any:
    """The rows with these numbers: copied if the array lies in memory, else read later."""
    return Rows(x, index) if on_disk(x) else x[index]
