"""Tasks made of a data set: some of its classes, and its classes in several tasks."""

from collections.abc import Sequence

import numpy as np

from experiments.data import Dataset
from experiments.errors import InputError
from experiments.rows import take


def choose(data: Dataset, classes: int | Sequence[int], *, seed: int = 0) -> Dataset:
    """The examples of some classes, numbered anew from 0 in the order given.

    A number of classes is drawn by the seed: `choose(cifar100, 2, seed=k)` for k = 0 to 4 gives five binary tasks.

    Raises:
      InputError: the set has no such classes or none of their examples, or there are fewer than two.

    Example: `choose(load("digits"), [3, 8])` has the labels 0 for a 3 and 1 for an 8.
    """
    if isinstance(classes, int):
        if not 2 <= classes <= data.classes:
            raise InputError(
                f"The number of classes must be from 2 to {data.classes}, the classes of {data.name}, got {classes}."
            )
        classes = [int(c) for c in np.random.default_rng(seed).permutation(data.classes)[:classes]]
    wrong = [c for c in classes if not 0 <= c < data.classes]
    if wrong:
        raise InputError(f"{data.name} has no class {wrong[0]}: use the classes 0 to {data.classes - 1}.")
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise InputError(
            f"A subset needs at least two classes, each once, got {', '.join(map(str, classes)) or 'none'}: name "
            f"others of the classes 0 to {data.classes - 1}."
        )
    number = np.full(data.classes, -1, np.int32)
    number[list(classes)] = np.arange(len(classes))
    parts = {}
    for part, (x, y) in data.parts.items():
        kept = np.flatnonzero(number[y] >= 0)
        parts[part] = take(x, kept), number[np.asarray(y)[kept]]
        counts = np.bincount(parts[part][1], minlength=len(classes))
        if part == "train" and not counts.all():
            raise InputError(
                f"{data.name} has no {part} examples of class {classes[int(counts.argmin())]}: choose other classes."
            )
        if not len(kept):
            raise InputError(f"{data.name} has no {part} examples of the classes chosen: choose other classes.")
    name = f"{data.name}[{','.join(map(str, classes))}]"
    return data.with_parts(parts, classes=len(classes), name=name)


def parse_classes(text: str) -> int | list[int]:
    """`2` is a number of classes to draw, `3,8` are classes.

    Example: `choose(data, parse_classes("3,8"))`.
    """
    found = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in found):
        raise InputError(f"Classes are a number of them to draw, as in 2, or their labels, as in 3,8, got '{text}'.")
    return int(found[0]) if len(found) == 1 else [int(part) for part in found]


def divide(data: Dataset, *, seed: int, per_task: int = 2, tuning: bool = False) -> np.ndarray:
    """The classes divided at random into tasks of some classes each [tasks, per_task]; Split-MNIST has two.

    With `tuning` the division is another one: no group of its classes is one of the same seed without `tuning`.

    Raises:
      InputError: the classes cannot be divided like that.
    """
    if per_task < 2 or data.classes % per_task or data.classes == per_task:
        raise InputError(
            f"The {data.classes} classes of {data.name} cannot be divided into tasks of {per_task}: use a number from "
            f"2 on that divides {data.classes} and is less, or choose fewer classes first."
        )
    order = np.random.default_rng(seed).permutation(data.classes)
    if tuning:
        order = np.roll(order, 1)  # each group gets one class of the group beside it
    return order.reshape(-1, per_task)
