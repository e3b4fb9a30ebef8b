"""The sets of the paper: some classes of a data set, drawn anew for each seed.

The classes of seed k are the first of the permutation that NumPy's `RandomState(k)` draws, as in the authors' program;
the paper does not say which seeds it used, and we take 0 to 4. All methods get the same sets.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.config import Config
from experiments.data import Dataset
from experiments.errors import InputError
from experiments.rows import take


class Sets(NamedTuple):
    """The images of all sets, and for each set (a row) which of them it has.

    Attributes:
      seeds: the seed of each set.
      x, y: the images and their classes in the whole data set.
      rows: by part ("train", "val", "test") the examples [sets, examples]; each set has as many as the smallest has.
      numbers: the class within its set [sets, classes of the data set].
    """

    seeds: Sequence[int]
    x: np.ndarray
    y: np.ndarray
    rows: dict[str, np.ndarray]
    numbers: np.ndarray


def classes_of(seed: int, count: int, of: int) -> np.ndarray:
    """The classes of a set."""
    if not 2 <= count <= of:
        raise InputError(f"The number of classes must be from 2 to {of}, the classes of the data set, got {count}.")
    return np.random.RandomState(seed).permutation(of)[:count]


def draw(whole: Dataset, config: Config, seeds: Sequence[int]) -> Sets:
    """The sets of some seeds; the config's fraction of the training images of each is for validation."""
    labels = {part: np.asarray(y) for part, (_, y) in whole.parts.items()}
    numbers = np.zeros((len(seeds), whole.classes), np.int32)
    chosen: dict[str, list[np.ndarray]] = {"train": [], "val": [], "test": []}
    for own, seed in zip(numbers, seeds, strict=True):
        classes = classes_of(seed, int(config.classes), whole.classes)
        own[classes] = np.arange(len(classes))
        train = np.random.RandomState(seed).permutation(np.flatnonzero(np.isin(labels["train"], classes)))
        held = int(config.validation * len(train))
        chosen["val"].append(train[:held])
        chosen["train"].append(train[held:])
        chosen["test"].append(np.flatnonzero(np.isin(labels["test"], classes)))
    rows = {part: np.stack([each[: min(map(len, found))] for each in found]) for part, found in chosen.items()}
    # Only these images come into memory: the whole set may lie on the disk.
    used = {"train": np.unique(np.concatenate([rows["train"], rows["val"]], 1)), "test": np.unique(rows["test"])}
    x = np.concatenate([np.asarray(take(whole.parts[part][0], index)) for part, index in used.items()])
    y = np.concatenate([labels[part][index] for part, index in used.items()])
    place = {
        part: np.searchsorted(used["test" if part == "test" else "train"], index).astype(np.int32)
        for part, index in rows.items()
    }
    place["test"] += len(used["train"])
    return Sets(seeds, x, y, place, numbers)
