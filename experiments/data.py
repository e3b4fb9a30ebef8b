"""Data sets: scikit-learn's `digits` (embedded, the default), `npz:FILE`, `npy:FOLDER`, or the name of a TFDS set.

Images keep their stored dtype, so uint8 stays small on the device; `scale` turns a batch into floats. What is too large
for memory stays on the disk and is read batch by batch (`streaming.py`).
"""

import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import checks, memory
from experiments.errors import InputError
from experiments.rows import on_disk, take

NAMES = ("x_train", "y_train", "x_test", "y_test")
OPTIONAL = ("x_val", "y_val")
IN_MEMORY = 2**31


class Dataset(NamedTuple):
    """Inputs [examples, ...] (images: [examples, height, width, channels]) and integer labels [examples].

    The validation examples are there if the set has some of its own, or after `split_validation`. Inputs may be arrays,
    or rows that are read from the disk where they are asked for.
    """

    x_train: Any
    y_train: Any
    x_test: Any
    y_test: Any
    classes: int
    name: str
    x_val: Any = None
    y_val: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return self.x_train.shape[1:]

    @property
    def parts(self) -> dict[str, tuple[Any, Any]]:
        """The inputs and labels of `train`, `test` and, where there is one, `val`."""
        parts = {"train": (self.x_train, self.y_train), "test": (self.x_test, self.y_test)}
        return parts if self.x_val is None else parts | {"val": (self.x_val, self.y_val)}

    def with_parts(self, parts: Mapping[str, tuple[Any, Any]], **changes: Any) -> "Dataset":
        """The same set with other inputs and labels."""
        arrays = {
            f"{axis}_{part}": value for part, pair in parts.items() for axis, value in zip("xy", pair, strict=True)
        }
        return self._replace(**(arrays | changes))


def load(source: str, *, data_dir: str | None = None, in_memory: int = IN_MEMORY) -> Dataset:
    """Load and check a data set: `digits`, `npz:FILE`, `npy:FOLDER`, or a TFDS name prepared below `data_dir`.

    A file NAME.npz in `data_dir` comes before a TFDS set of this name.

    Nothing is downloaded; `tfds_sets.prepare` does that. The arrays of `npy:FOLDER` (x_train.npy, ...) are mapped,
    never read whole. A TFDS set of more than `in_memory` bytes stays on the disk too.

    Raises:
      InputError: the set is not there or something is wrong with it; the sentence says what to do.

    Example: `load("npz:mnist.npz").shape` is (28, 28, 1).
    """
    if source == "digits":
        return _digits()
    if source.startswith("npz:"):
        return _npz(source.removeprefix("npz:"))
    if source.startswith("npy:"):
        return _npy(source.removeprefix("npy:"))
    file = pathlib.Path(data_dir or "").expanduser() / f"{source}.npz"
    if data_dir and file.is_file():
        return _npz(str(file))._replace(name=source)
    from experiments import tfds_sets  # slow to import

    parts, classes = tfds_sets.read(source, data_dir, in_memory)
    return check(parts, classes, source)


def scale(x: jax.Array | np.ndarray) -> jax.Array:
    """A batch as floats: uint8 is divided by 255, floats stay as they are."""
    return jnp.asarray(x, jnp.float32) / 255 if x.dtype == jnp.uint8 else jnp.asarray(x)


def on_device(data: Dataset) -> Dataset:
    """The same set with its arrays on the accelerator, so that several runs share them; too large a set as it is."""
    if not fits(data, memory.available() // 2):
        return data
    return data.with_parts({part: (jnp.asarray(x), jnp.asarray(y)) for part, (x, y) in data.parts.items()})


def fits(data: Dataset, limit: int) -> bool:
    """Whether all arrays of the set together take at most `limit` bytes.

    Example: `fits(load("digits"), 2**20)` is True: 1,797 images of 64 floats take 460 kB.
    """
    arrays = [array for part in data.parts.values() for array in part]
    return sum(int(np.prod(array.shape)) * array.dtype.itemsize for array in arrays) <= limit


def split_validation(data: Dataset, fraction: float, *, seed: int = 0) -> Dataset:
    """The same set with a stratified fraction of the training examples as validation examples; the test set stays.

    Every class that has training examples keeps some, and gets some validation examples.

    Raises:
      InputError: the fraction is not between 0 and 1 or leaves a class empty, or the set has validation examples
      already.

    Example: `split_validation(load("digits"), 0.2, seed=1).x_val.shape` is (288, 8, 8, 1).
    """
    if data.x_val is not None:
        raise InputError(
            f"{data.name} has {len(data.x_val)} validation examples already: use those, and ask for no validation "
            "fraction."
        )
    train, held = _stratified(data, fraction, seed)
    return data.with_parts({"train": train, "val": held})


def _stratified(data: Dataset, fraction: float, seed: int) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The training examples in two parts: those that stay, and a fraction of each class."""
    if not 0 < fraction < 1:
        raise InputError(f"The validation fraction must be a number between 0 and 1, got {fraction:g}.")
    y = np.asarray(data.y_train)
    labels, counts = np.unique(y, return_counts=True)
    rarest, least = labels[counts.argmin()], counts.min()
    if least < 2:
        raise InputError(
            f"Class {rarest} of {data.name} has only one training example, so a validation set would leave the class "
            "empty: add examples of that class or leave it out."
        )
    from sklearn.model_selection import train_test_split  # slow to import

    try:
        kept, held = train_test_split(np.arange(len(y)), test_size=fraction, stratify=y, random_state=seed)
    except ValueError:  # fewer examples than classes in one of the parts
        kept = held = np.arange(0)
    if any(len(np.unique(y[part])) < len(labels) for part in (kept, held)):
        raise InputError(
            f"The validation fraction {fraction:g} leaves a class of {data.name} without examples in one of the "
            f"parts: give a fraction from {np.ceil(1e3 / least) / 1e3:g} to {np.floor(1e3 - 1e3 / least) / 1e3:g}, as "
            f"class {rarest} has {least} training examples."
        )
    return (take(data.x_train, kept), y[kept]), (take(data.x_train, held), y[held])


def check(parts: Mapping[str, tuple[Any, Any]], classes: int, name: str) -> Dataset:
    """The set with float32 or uint8 inputs, int32 labels and channels last, or an error that names the fault."""
    ready = {}
    for part, (x, y) in parts.items():
        y = np.asarray(y)
        checks.check_part(part, x, y, name, classes)
        checks.check_alike(part, parts["train"][0], x, name)
        if not on_disk(x) and x.dtype != np.uint8:
            x = x.astype(np.float32)
        ready[part] = x[..., None] if x.ndim == 3 else x, y.astype(np.int32)
    return Dataset(*ready["train"], *ready["test"], classes, name, *ready.get("val", ()))


def _digits() -> Dataset:
    """1,797 real handwritten digits of 8x8 pixels; a fifth of them (always the same) is the test set."""
    from sklearn.datasets import load_digits  # slow to import
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[..., None]
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    return check({"train": (x_train, y_train), "test": (x_test, y_test)}, 10, "digits")


def _npz(file: str) -> Dataset:
    """Arrays x_train, y_train, x_test and y_test of an npz file; the classes are 0 to the largest training label."""
    path = pathlib.Path(file).expanduser()
    if not path.is_file():
        raise InputError(f"There is no file {path}: give --dataset=npz:FILE with the arrays {', '.join(NAMES)}.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in (*NAMES, *OPTIONAL) if name in arrays}
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile):
        raise InputError(
            f"{path} is not an npz file of plain arrays: save {', '.join(NAMES)} with numpy.savez."
        ) from None
    missing = [name for name in NAMES if name not in found]
    if missing:
        raise InputError(f"{path} has no array {missing[0]}: save {', '.join(NAMES)} with numpy.savez.")
    return _of_arrays(found, path.name)


def _npy(folder: str) -> Dataset:
    """The arrays of a folder, x_train.npy and so on, mapped into memory: only what is used is read."""
    path = pathlib.Path(folder).expanduser()
    if not path.is_dir():
        raise InputError(f"There is no folder {path}: give --dataset=npy:FOLDER with {', '.join(NAMES)}, each as .npy.")
    found = {}
    for name in (*NAMES, *OPTIONAL):
        file = path / f"{name}.npy"
        if not file.is_file():
            if name in NAMES:
                raise InputError(f"{path} has no file {name}.npy: save {', '.join(NAMES)} there with numpy.save.")
            continue
        try:
            found[name] = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError):
            raise InputError(f"{file} is not an npy file of a plain array: save it with numpy.save.") from None
    return _of_arrays(found, path.name)


def _of_arrays(arrays: Mapping[str, Any], name: str) -> Dataset:
    """The set of arrays by their names."""
    for given, other in (OPTIONAL, OPTIONAL[::-1]):
        if given in arrays and other not in arrays:
            raise InputError(f"{name} has {given} but not {other}: save both or neither.")
    parts = {
        part: (arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test", "val") if f"x_{part}" in arrays
    }
    return check(parts, checks.count_classes(np.asarray(arrays["y_train"]), name), name)
