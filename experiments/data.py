"""Data sets: scikit-learn's `digits` (embedded, the default), `npz:FILE`, or the name of a TFDS set.

Images keep their stored dtype, so uint8 stays small on the device; `scale` turns a batch into floats.
"""

import pathlib
import zipfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from experiments.errors import InputError, nearest

NAMES = ("x_train", "y_train", "x_test", "y_test")


class Dataset(NamedTuple):
    """Inputs [examples, ...] (images: [examples, height, width, channels]) and integer labels [examples]."""

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


def load(source: str, *, data_dir: str | None = None) -> Dataset:
    """Load and check a data set: `digits`, `npz:FILE`, or a TFDS name prepared below `data_dir`."""
    if source == "digits":
        return _digits()
    if source.startswith("npz:"):
        return _npz(source.removeprefix("npz:"))
    return _tfds(source, data_dir)


def scale(x: jax.Array | np.ndarray) -> jax.Array:
    """A batch as floats: uint8 is divided by 255, floats stay as they are."""
    return jnp.asarray(x, jnp.float32) / 255 if x.dtype == jnp.uint8 else jnp.asarray(x)


def on_device(data: Dataset) -> Dataset:
    """The same set with its arrays on the accelerator, so that several runs share them."""
    x_train, y_train, x_test, y_test = map(jnp.asarray, data[:4])
    return Dataset(x_train, y_train, x_test, y_test, data.classes, data.name)


def hold_out(data: Dataset, fraction: float, *, seed: int = 0) -> Dataset:
    """The same set with a stratified fraction of the training examples as its test examples, for tuning."""
    if not 0 < fraction < 1:
        raise InputError(f"The validation fraction must be a number between 0 and 1, got {fraction:g}.")
    return _split(data.x_train, data.y_train, fraction, data.classes, data.name, seed)


def check(data: Dataset) -> Dataset:
    """The set with float32 or uint8 inputs, int32 labels and channels last, or an error that names the fault."""
    _check_part("train", data.x_train, data.y_train, data)
    _check_part("test", data.x_test, data.y_test, data)
    train, test = data.x_train.shape[1:], data.x_test.shape[1:]
    if train != test:
        raise InputError(
            f"x_train and x_test of {data.name} hold examples of different shapes, {train} and {test}: make them equal."
        )

    def inputs(x: np.ndarray) -> np.ndarray:
        x = x if x.dtype == np.uint8 else x.astype(np.float32)
        return x[..., None] if x.ndim == 3 else x

    y_train, y_test = data.y_train.astype(np.int32), data.y_test.astype(np.int32)
    return Dataset(inputs(data.x_train), y_train, inputs(data.x_test), y_test, data.classes, data.name)


def _check_part(part: str, x: np.ndarray, y: np.ndarray, data: Dataset) -> None:
    """Checks dtypes, shapes and values of the training or the test examples."""
    xs, ys = f"x_{part} of {data.name}", f"y_{part} of {data.name}"
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise InputError(f"{xs} has dtype {x.dtype}: save it as uint8 (which is scaled to [0, 1]) or as floats.")
    if x.ndim < 2 or not x.size:
        raise InputError(f"{xs} has shape {x.shape}: save it as [examples, ...], with at least one example.")
    if x.dtype != np.uint8 and not np.isfinite(x).all():
        raise InputError(f"{xs} holds NaN or Inf: remove or replace those values.")
    if not np.issubdtype(y.dtype, np.integer) or y.ndim != 1:
        raise InputError(f"{ys} has dtype {y.dtype} and shape {y.shape}: save integers of shape [examples].")
    if len(x) != len(y):
        raise InputError(f"{xs} holds {len(x)} examples but y_{part} {len(y)} labels: save one label per example.")
    if len(wrong := y[(y < 0) | (y >= data.classes)]):
        raise InputError(
            f"{ys} holds the label {wrong[0]}, outside the classes 0 to {data.classes - 1}: number the classes from 0, "
            "and use only classes that the training labels have."
        )


def _split(x: np.ndarray, y: np.ndarray, fraction: float, classes: int, name: str, seed: int) -> Dataset:
    """Hold out a stratified fraction as the test set."""
    try:
        x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=fraction, stratify=y, random_state=seed)
    except ValueError as error:
        raise InputError(f"Holding out {fraction:g} of the training examples of {name} failed: {error}") from None
    return Dataset(x_train, y_train, x_test, y_test, classes, name)


def _digits() -> Dataset:
    """1,797 real handwritten digits of 8x8 pixels; a fifth of them (always the same) is the test set."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[..., None]
    return check(_split(images, digits.target, 0.2, 10, "digits", seed=0))


def _npz(file: str) -> Dataset:
    """Arrays x_train, y_train, x_test and y_test of an npz file; the classes are 0 to the largest training label."""
    path = pathlib.Path(file).expanduser()
    if not path.is_file():
        raise InputError(f"There is no file {path}: give --dataset=npz:FILE with the arrays {', '.join(NAMES)}.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = [name for name in NAMES if name not in arrays]
            if missing:
                raise InputError(f"{path} has no array {missing[0]}: save {', '.join(NAMES)} with numpy.savez.")
            x_train, y_train, x_test, y_test = (arrays[name] for name in NAMES)
    except InputError:
        raise
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile):
        raise InputError(
            f"{path} is not an npz file of plain arrays: save {', '.join(NAMES)} with numpy.savez."
        ) from None
    classes = int(y_train.max()) + 1 if y_train.size and np.issubdtype(y_train.dtype, np.integer) else 0
    return check(Dataset(x_train, y_train, x_test, y_test, classes, path.name))


def _tfds(name: str, data_dir: str | None) -> Dataset:
    """A prepared TFDS set, read without TensorFlow. The test set is its test split, or else its validation split."""
    import tensorflow_datasets as tfds  # slow to import

    known = ["digits", "npz:FILE", *tfds.list_builders(with_community_datasets=False)]
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        raise InputError(f"There is no data set '{name}': {nearest(name, known, most=2)}") from None
    except ValueError as error:
        raise InputError(f"There is no data set '{name}': {str(error).splitlines()[0]}") from None
    try:
        sources: Any = builder.as_data_source()
    except (NotImplementedError, AssertionError, ValueError, OSError):
        where = f", data_dir={data_dir!r}" if data_dir else ""
        raise InputError(
            f"The data set '{name}' is not prepared in {builder.data_dir}: run python -c \"import tensorflow_datasets "
            f"as tfds; tfds.data_source('{name}'{where})\" once (some sets need tensorflow-cpu)."
        ) from None
    keys = builder.info.supervised_keys
    if not keys or not isinstance(builder.info.features[keys[1]], tfds.features.ClassLabel):
        raise InputError(
            f"The data set '{name}' does not have labelled classes: use one that has, such as mnist or cifar10."
        )
    test = "test" if "test" in sources else "validation"
    if "train" not in sources or test not in sources:
        raise InputError(f"The data set '{name}' has the splits {', '.join(sources)}: use one with train and test.")
    arrays: list[np.ndarray] = []
    for split in ("train", test):
        rows = [
            (row[keys[0]], row[keys[1]]) for row in tqdm(sources[split], desc=f"reading {name} {split}", leave=False)
        ]
        if len({np.shape(x) for x, _ in rows}) != 1:
            raise InputError(f"The data set '{name}' holds examples of several shapes: resize them and use npz:FILE.")
        arrays += [np.stack([x for x, _ in rows]), np.array([y for _, y in rows])]
    x_train, y_train, x_test, y_test = arrays
    return check(Dataset(x_train, y_train, x_test, y_test, builder.info.features[keys[1]].num_classes, name))
