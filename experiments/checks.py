"""Checks of the arrays of a data set: each fault that would pass silently is one sentence with the remedy."""

from typing import Any, NamedTuple

import numpy as np

from experiments.errors import InputError
from experiments.rows import Column, on_disk

BLOCK_BYTES = 2**24
MOST_BLOCKS = 64  # of a larger array on disk, that many blocks at equal distances are read: a gibibyte


class Values(NamedTuple):
    """What the values of an array are like."""

    low: float
    high: float
    finite: bool
    whole: bool


def count_classes(y: Any, name: str) -> int:
    """The number of classes of labels that are numbered from 0; other numberings are refused.

    A class without a training example is allowed (a subset of CIFAR-100 may lack some), but not class 0, and not more
    than half of the classes: then the labels are not numbers from 0 on, and the network would get outputs in vain.
    """
    _check_labels(y, f"y_train of {name}")
    found = np.unique(y)
    if found[0] < 0:
        raise InputError(f"y_train of {name} holds the label {found[0]}: number the classes from 0, without gaps.")
    classes = int(found[-1]) + 1
    if found[0] > 0 and len(found) == classes - found[0]:
        raise InputError(
            f"The labels of {name} begin at {found[0]}, so that class 0 has no example: subtract {found[0]} from "
            "y_train and y_test."
        )
    if found[0] > 0 or classes > 2 * len(found):
        raise InputError(
            f"The labels of {name} go from {found[0]} to {found[-1]}, but only {len(found)} of them occur: number the "
            "classes from 0 with numpy.searchsorted(numpy.unique(y_train), y), for y_train and for y_test."
        )
    return classes


def check_part(part: str, x: Any, y: Any, name: str, classes: int) -> None:
    """Checks dtypes, shapes and values of the training, validation or test examples."""
    xs, ys = f"x_{part} of {name}", f"y_{part} of {name}"
    _check_inputs(x, xs, train=part == "train")
    _check_labels(y, ys)
    if len(x) != len(y):
        raise InputError(f"{xs} holds {len(x)} examples but y_{part} {len(y)} labels: save one label per example.")
    if len(wrong := y[(y < 0) | (y >= classes)]):
        raise InputError(
            f"{ys} holds the label {wrong[0]}, outside the classes 0 to {classes - 1}: number the classes from 0, "
            "and use only classes that the training labels have."
        )


def check_alike(part: str, x_train: Any, x: Any, name: str) -> None:
    """Checks that two parts of a set have examples of one shape and of one scale."""
    if x_train.shape[1:] != x.shape[1:]:
        raise InputError(
            f"x_train and x_{part} of {name} hold examples of different shapes, {x_train.shape[1:]} and {x.shape[1:]}: "
            "make them equal."
        )
    # uint8 is divided by 255 and floats are not, so one part would lie in another range than the other.
    if (x_train.dtype == np.uint8) != (x.dtype == np.uint8):
        raise InputError(
            f"x_train of {name} has dtype {x_train.dtype} and x_{part} {x.dtype}: save both as uint8, or both as "
            "floats in one range (uint8 divided by 255)."
        )


def _check_inputs(x: Any, xs: str, *, train: bool) -> None:
    if x.dtype == bool:
        raise InputError(f"{xs} has dtype bool: save it as floats, x.astype(numpy.float32).")
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise InputError(
            f"{xs} has dtype {x.dtype}: save it as uint8 if it holds pixels from 0 to 255 (they are divided by 255), "
            "or else as floats."
        )
    if x.ndim < 2 or 0 in x.shape:
        raise InputError(f"{xs} has shape {x.shape}: save it as [examples, ...], with at least one example.")
    if on_disk(x) and x.dtype not in (np.uint8, np.float32):
        raise InputError(f"{xs} has dtype {x.dtype} and is read from the disk as it is: save it as uint8 or float32.")
    if channels_first(x.shape[1:]):
        raise InputError(
            f"{xs} has shape {x.shape}, which looks like channels in axis 1: put them last with "
            "numpy.moveaxis(x, 1, -1)."
        )
    values = _values(x)
    if x.dtype == np.uint8:
        # Divided by 255, black and white pixels would be 0 and 0.004. A test set may be too small to tell.
        if train and values.high == 1:
            raise InputError(
                f"{xs} is uint8 and holds only 0 and 1, which would be divided by 255: save 255 for 1, or save it as "
                "floats, x.astype(numpy.float32)."
            )
        return
    if not values.finite:
        raise InputError(f"{xs} holds NaN or Inf: remove or replace those values.")
    if max(-values.low, values.high) > float(np.finfo(np.float32).max):
        raise InputError(f"{xs} holds values beyond the range of float32: divide them by a constant.")
    if unscaled_pixels(x.shape[1:], values):
        raise InputError(
            f"{xs} holds floats from {values.low:g} to {values.high:g}, which look like pixels: divide them by 255."
        )


def channels_first(shape: tuple[int, ...]) -> bool:
    """Whether an example looks like an image with its channels first.

    Only three axes can be an image with channels: [examples, 3, 32] are features or an image without channels, and
    [examples, 1, 28, 28, 1] is no image. The first of the three must be 1 or 3 (the number of channels), and the two
    others must be a picture's: equal and at least 5, or both at least 32. So a signal in one row, [examples, 1, 128,
    9], and a small image with channels last, [examples, 3, 3, 3], pass.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        return False
    _, height, width = shape
    return height == width >= 5 or min(height, width) >= 32


def unscaled_pixels(shape: tuple[int, ...], values: Values) -> bool:
    """Whether floats look like pixels from 0 to 255 that nobody has scaled.

    The values must lie in 0..255 and come near its end. For images that is enough. Features in one axis may be counts
    or ages, so there they must also be whole, reach 200, and be as many as the pixels of a small image.
    """
    if not (values.low >= 0 and 100 < values.high <= 255):
        return False
    return len(shape) > 1 or (values.whole and values.high >= 200 and shape[0] >= 64)


def _check_labels(y: Any, ys: str) -> None:
    if y.ndim == 2 and y.shape[1] == 1 and len(y):
        raise InputError(f"{ys} has shape {y.shape}: save it as [examples], y[:, 0].")
    if y.ndim == 2 and len(y) and ((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all():
        raise InputError(f"{ys} has shape {y.shape} and is one-hot: save the labels, numpy.argmax(y, axis=1).")
    if not np.issubdtype(y.dtype, np.integer) or y.ndim != 1:
        raise InputError(f"{ys} has dtype {y.dtype} and shape {y.shape}: save integers of shape [examples].")
    if not len(y):
        raise InputError(f"{ys} holds no labels: save at least one example.")


def _values(x: Any) -> Values:
    """The range of the values, read block by block; of a large array on disk only some blocks."""
    size = max(1, BLOCK_BYTES // max(1, int(np.prod(x.shape[1:])) * x.dtype.itemsize))
    most = MOST_BLOCKS
    if isinstance(x, Column):  # decoding is slow
        size, most = min(size, 1000), 1
    starts = range(0, len(x), size)
    if on_disk(x) and len(starts) > most:
        starts = starts[:: -(-len(starts) // most)]
    found = [_of_block(np.asarray(x[start : start + size])) for start in starts]
    low, high, finite, whole = zip(*found, strict=True)
    return Values(min(low), max(high), all(finite), all(whole))


def _of_block(x: np.ndarray) -> Values:
    low, high = x.min(), x.max()  # both are NaN if any value is
    finite = bool(np.isfinite(low) and np.isfinite(high))
    whole = x.dtype == np.uint8 or (finite and bool((x == np.floor(x)).all()))
    return Values(float(low), float(high), finite, whole)
