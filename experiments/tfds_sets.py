"""TFDS sets, read without TensorFlow: those prepared as array_record by TFDS's own reader, tfrecord files by ours."""

import functools
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from experiments.errors import InputError, nearest
from experiments.rows import Column

Parts = dict[str, tuple[Any, Any]]


class TFRecords:
    """Random access to the records of TFRecord files.

    A record is its length in 8 bytes, a checksum in 4, its content, and a checksum in 4. Checksums are not compared.
    """

    def __init__(self, instructions: Iterable[Any]) -> None:
        self._found: list[tuple[np.memmap, int, int]] = []
        for part in instructions:
            bounds = _records(part.filename)
            stop = None if part.take in (-1, None) else part.skip + part.take
            self._found += bounds[part.skip : stop]

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, i: int) -> bytes:
        file, start, stop = self._found[i]
        return file[start:stop].tobytes()


class Examples(Sequence):
    """The examples of a split in TFRecord files."""

    def __init__(self, records: TFRecords, features: Any, decoders: Any) -> None:
        self._records, self._features, self._decoders = records, features, decoders

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: Any) -> Any:
        return self._features.deserialize_example_np(self._records[i], decoders=self._decoders)


def read(name: str, data_dir: str | None, in_memory: int) -> tuple[Parts, int]:
    """Inputs and labels by part, and the number of classes, of a prepared set.

    `imagenet2012@224` is the set imagenet2012 with the central square of each image, resized to 224x224.
    The test set is its test split, or else its validation split; if it has both, the latter is for validation.
    """
    name, side = _side(name)
    builder = _builder(name, data_dir)
    if not builder.is_prepared():
        raise InputError(
            f"The data set '{name}' is not prepared in {builder.data_dir}: run {_command(name, data_dir)} once (some "
            "sets need tensorflow-cpu)."
        )
    keys, features = builder.info.supervised_keys, builder.info.features
    if not keys or not isinstance(features[keys[1]], tfds.features.ClassLabel):
        raise InputError(
            f"The data set '{name}' does not have labelled classes: use one that has, such as mnist or cifar10."
        )
    splits = list(builder.info.splits)
    test = "test" if "test" in splits else "validation"
    if "train" not in splits or test not in splits:
        raise InputError(f"The data set '{name}' has the splits {', '.join(splits)}: use one with train and test.")
    chosen = {"train": "train", "test": test}
    if "validation" in splits and test == "test":
        chosen["val"] = "validation"
    shape = features[keys[0]].shape
    if side:
        if len(shape) != 3 or features[keys[0]].np_dtype != np.uint8:
            raise InputError(f"The data set '{name}' does not have images of bytes to resize: leave out @{side}.")
        shape = side, side, shape[-1]
    count = sum(builder.info.splits[split].num_examples for split in chosen.values())
    small = None in shape or count * int(np.prod(shape)) * np.dtype(features[keys[0]].np_dtype).itemsize <= in_memory
    parts: Parts = {}
    for part, split in chosen.items():
        if small and not side:
            parts[part] = _arrays(builder, name, split)
        else:
            x, y = _columns(builder, name, split, side)
            parts[part] = np.asarray(x) if small else x, y
    return parts, features[keys[1]].num_classes


def _side(name: str) -> tuple[str, int]:
    """The name of a set, and the side of its images after `@`; 0 if they stay as they are."""
    name, mark, side = name.partition("@")
    if mark and not (side.isascii() and side.isdecimal() and int(side)):
        raise InputError(f"After @ comes the side of the images, as in {name}@224, got '{side}'.")
    return name, int(side or 0)


def squared(image: np.ndarray, side: int) -> np.ndarray:
    """The central square of an image of bytes [height, width, channels], resized (bilinear)."""
    from PIL import Image

    height, width, channels = image.shape
    edge = min(height, width)
    left, top = (width - edge) / 2, (height - edge) / 2
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    resized = picture.resize((side, side), Image.Resampling.BILINEAR, (left, top, left + edge, top + edge))
    return np.asarray(resized).reshape(side, side, channels)


def prepare(name: str, data_dir: str | None = None, **options: Any) -> None:
    """Download a set and prepare it for `load`; one that is prepared already is left alone.

    `options` go to TFDS's `download_and_prepare`.

    Raises:
      InputError: there is no such set, TensorFlow is needed and not installed, or the download failed.

    Example: `prepare("cifar10", "~/data")`, then `load("cifar10", data_dir="~/data")`.
    """
    builder = _builder(name, data_dir, file_format="array_record")
    if builder.is_prepared() or _builder(name, data_dir).is_prepared():
        return
    try:
        builder.download_and_prepare(**options)
    except Exception as error:
        causes = [error, error.__cause__, error.__context__]
        if any("No module named 'tensorflow'" in str(cause) for cause in causes):
            raise InputError(
                f"To prepare the data set '{name}', TFDS needs TensorFlow: install tensorflow-cpu (pip install "
                "tensorflow-cpu) and prepare it again; to read it, TensorFlow is not needed."
            ) from error
        raise InputError(
            f"The data set '{name}' could not be prepared in {builder.data_dir} ({_first_line(error)}): mend that, or "
            "give the data as npz:FILE."
        ) from error


def _builder(name: str, data_dir: str | None, **options: Any) -> Any:
    try:
        return tfds.builder(name, data_dir=data_dir, **options)
    except tfds.core.DatasetNotFoundError:
        known = ["digits", "npz:FILE", "npy:FOLDER", *tfds.list_builders(with_community_datasets=False)]
        raise InputError(f"There is no data set '{name}': {nearest(name, known, most=3)}") from None
    except ValueError as error:
        raise InputError(f"There is no data set '{name}': {_first_line(error)}") from None


def _sources(builder: Any, name: str, split: str, **decoders: Any) -> Sequence[Mapping[str, Any]]:
    """The examples of a split, in whichever format the set was prepared."""
    try:
        return builder.as_data_source(split, decoders=decoders or None)
    except NotImplementedError:
        pass
    if builder.info.file_format is not tfds.core.FileFormat.TFRECORD:
        raise InputError(
            f"The data set '{name}' is prepared in {builder.data_dir} as {builder.info.file_format.value}, which "
            f"cannot be read without TensorFlow: prepare it in another folder with {_command(name, 'FOLDER')}, and "
            "give --data_dir=FOLDER."
        )
    records = TFRecords(builder.info.splits[split].file_instructions)
    return Examples(records, builder.info.features, decoders or None)


def _arrays(builder: Any, name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and labels of a split, read into memory."""
    inputs, labels = builder.info.supervised_keys[:2]
    rows = _sources(builder, name, split)
    if not len(rows):
        raise InputError(f"The split '{split}' of the data set '{name}' is empty: use a set with examples in it.")
    first = np.asarray(rows[0][inputs])
    x, y = np.empty((len(rows), *first.shape), first.dtype), np.empty(len(rows), np.int64)
    for i, row in enumerate(tqdm(rows, desc=f"reading {name} {split}", leave=False)):
        if np.shape(row[inputs]) != first.shape:
            raise InputError(
                f"The data set '{name}' holds examples of several shapes: give a side for images, as in {name}@64, or "
                "resize them and use npz:FILE."
            )
        x[i], y[i] = row[inputs], row[labels]
    return x, y


def _columns(builder: Any, name: str, split: str, side: int) -> tuple[Column, np.ndarray]:
    """The inputs of a split as rows that are read later, perhaps resized, and its labels."""
    inputs, labels = builder.info.supervised_keys[:2]
    feature = builder.info.features[inputs]
    shape = (*feature.shape, 1) if len(feature.shape) == 2 else feature.shape
    rows = _sources(builder, name, split)
    if side:
        resize = functools.partial(squared, side=side)
        x = Column(rows, inputs, (side, side, shape[-1]), feature.np_dtype, resize)
    else:
        x = Column(rows, inputs, shape, feature.np_dtype)
    undecoded = _sources(builder, name, split, **{inputs: tfds.decode.SkipDecoding()})
    rows = tqdm(undecoded, desc=f"reading the labels of {name} {split}", leave=False)
    return x, np.array([row[labels] for row in rows])


def _records(path: Any) -> list[tuple[np.memmap, int, int]]:
    """Where the records of a TFRecord file begin and end."""
    file = np.memmap(path, np.uint8, "r")
    found, position = [], 0
    while position < len(file):
        start = position + 12
        stop = start + struct.unpack("<Q", file[position : position + 8].tobytes().ljust(8, b"\xff"))[0]
        position = stop + 4
        if position > len(file):
            raise InputError(f"{path} is cut off or is no TFRecord file: delete its folder and prepare the set anew.")
        found.append((file, start, stop))
    return found


def _command(name: str, data_dir: str | None) -> str:
    where = f", '{data_dir}'" if data_dir else ""
    return f"python -c \"from experiments.tfds_sets import prepare; prepare('{name}'{where})\""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
