"""TFDS sets: prepared ones are read without TensorFlow, in both formats; one sentence for what cannot be read."""

import gzip
import io
import json
import os
import pathlib
import struct
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments import data, streaming, tfds_sets
from experiments.errors import InputError
from experiments.rows import Column


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mnits", ["no data set 'mnits'", "did you mean 'mnist'?"]),
        ("digit", ["did you mean 'digits'?"]),
        ("mnist", ["'mnist' is not prepared in", "prepare('mnist', '", "once"]),
        ("mnist/none", ["no data set 'mnist/none'"]),
    ],
)
def test_tfds_set_that_cannot_be_read(tmp_path, name, words):
    with pytest.raises(InputError) as error:
        data.load(name, data_dir=str(tmp_path))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


class TinyImages(tfds.core.GeneratorBasedBuilder):
    """Six, two and three images of one pixel row."""

    VERSION = tfds.core.Version("1.0.0")
    SPLITS = {"train": 6, "test": 2, "validation": 3}

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Tensor(shape=(1, 2, 1), dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
        )
        return self.dataset_info_from_configs(features=features, supervised_keys=("image", "label"))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(count) for split, count in self.SPLITS.items()}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": np.full((1, 2, 1), i, np.uint8), "label": i % 3}


class TinyWithoutTest(TinyImages):
    """The same without a test split."""

    SPLITS = {"train": 6, "validation": 3}


class TinyOfTwoSizes(TinyImages):
    """Images of one size but for one."""

    def _info(self):
        features = {
            "image": tfds.features.Tensor(shape=(None, 2, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": np.zeros((1 + i // 4, 2, 1), np.uint8), "label": i % 3}


class TinyUnlabelled(TinyImages):
    """The same without a word on which feature is the label."""

    def _info(self):
        return self.dataset_info_from_configs(features=super()._info().features)


@pytest.fixture
def folder(tmp_path):
    TinyImages(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    return tmp_path / "tiny_images" / "1.0.0"


def to_tfrecord(folder):
    """Writes the records of an array_record set as TFRecord files, as TFDS names them."""
    builder = tfds.builder_from_directory(folder)
    raw = builder.as_data_source(deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    for split, records in raw.items():
        framed = [struct.pack("<Q", len(r)) + bytes(4) + bytes(r) + bytes(4) for r in records]
        file = folder / f"{builder.name}-{split}.tfrecord-00000-of-00001"
        file.write_bytes(b"".join(framed))
    for file in folder.glob("*.array_record*"):
        file.unlink()
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))


def check_tiny(loaded):
    assert loaded.shape == (1, 2, 1) and loaded.classes == 3 and loaded.x_train.dtype == np.uint8
    assert (len(loaded.x_train), len(loaded.x_test), len(loaded.x_val)) == (6, 2, 3)
    images = np.asarray(loaded.x_train)
    assert sorted(images[:, 0, 0, 0]) == list(range(6))
    assert (images[:, 0, 0, 0] % 3 == loaded.y_train).all()


def test_prepared_set_is_read(folder):
    check_tiny(data.load("tiny_images", data_dir=str(folder.parents[1])))


def test_set_prepared_as_tfrecord_is_read_without_tensorflow(folder):
    to_tfrecord(folder)
    check_tiny(data.load("tiny_images", data_dir=str(folder.parents[1])))
    check_tiny(data.load("tiny_images", data_dir=str(folder.parents[1]), in_memory=0))


def test_large_set_stays_on_the_disk(folder):
    loaded = data.load("tiny_images", data_dir=str(folder.parents[1]), in_memory=21)
    assert isinstance(loaded.x_train, Column)
    check_tiny(loaded)
    assert loaded.x_train[3].shape == (1, 2, 1) and loaded.x_train[[3, 1]].shape == (2, 1, 2, 1)
    assert (loaded.x_train[[3, 1]][0] == loaded.x_train[3]).all() and (loaded.x_train[-1] == loaded.x_train[5]).all()
    assert not isinstance(data.load("tiny_images", data_dir=str(folder.parents[1]), in_memory=22).x_train, Column)


@pytest.mark.parametrize("convert", [lambda folder: None, to_tfrecord], ids=["array_record", "tfrecord"])
def test_large_set_is_streamed_by_several_threads(folder, convert):
    convert(folder)
    small, large = (data.load("tiny_images", data_dir=str(folder.parents[1]), in_memory=limit) for limit in (22, 21))
    one, other = (list(streaming.chunks(of, 2, 0, 0, 1, threads=3)) for of in (small, large))
    assert len(one) == 3 and all((a[0] == b[0]).all() and (a[1] == b[1]).all() for a, b in zip(one, other, strict=True))
    assert (data.on_device(large).x_train == small.x_train).all()


def test_cut_off_tfrecord(folder):
    to_tfrecord(folder)
    file = folder / "tiny_images-train.tfrecord-00000-of-00001"
    for size in (3, 30):
        file.write_bytes(file.read_bytes()[:-size])
        with pytest.raises(InputError, match="tfrecord-00000-of-00001 is cut off or is no TFRecord file: delete"):
            data.load("tiny_images", data_dir=str(folder.parents[1]))


def test_format_that_needs_tensorflow(folder):
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "riegeli"}))
    for file in folder.glob("*.array_record*"):
        file.rename(str(file).replace("array_record", "riegeli"))
    with pytest.raises(
        InputError, match=r"as riegeli, .* prepare\('tiny_images', 'FOLDER'\)\", and give --data_dir=FOL"
    ):
        data.load("tiny_images", data_dir=str(folder.parents[1]))


def test_validation_split_is_the_test_set_where_there_is_no_other(tmp_path):
    TinyWithoutTest(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    loaded = data.load("tiny_without_test", data_dir=str(tmp_path))
    assert len(loaded.x_test) == 3 and loaded.x_val is None


def test_set_with_images_of_several_sizes(tmp_path):
    TinyOfTwoSizes(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    with pytest.raises(InputError, match="holds examples of several shapes: give a side"):
        data.load("tiny_of_two_sizes", data_dir=str(tmp_path), in_memory=0)


def test_set_without_labels(tmp_path):
    TinyUnlabelled(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    with pytest.raises(InputError, match="does not have labelled classes: use one that has"):
        data.load("tiny_unlabelled", data_dir=str(tmp_path))


def test_prepare_writes_what_load_reads_and_leaves_it_alone_then(tmp_path):
    tfds_sets.prepare("tiny_images", str(tmp_path))
    check_tiny(data.load("tiny_images", data_dir=str(tmp_path)))
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    tfds_sets.prepare("tiny_images", str(tmp_path))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (ModuleNotFoundError("No module named 'tensorflow'"), "needs TensorFlow: install tensorflow-cpu"),
        (OSError("no route to host\nat all"), r"could not be prepared in .* \(no route to host\): .* npz:FILE"),
    ],
)
def test_prepare_that_fails(tmp_path, monkeypatch, raised, words):
    def fail(self, dl_manager):
        raise raised

    monkeypatch.setattr(TinyImages, "_split_generators", fail)
    with pytest.raises(InputError, match=words) as error:
        tfds_sets.prepare("tiny_images", str(tmp_path))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="did you mean 'mnist'"):
        tfds_sets.prepare("mnits", str(tmp_path))


def to_png(self, image):
    file = io.BytesIO()
    Image.fromarray(image[..., 0]).save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.skipif(
    "LRULES_MNIST" not in os.environ, reason="LRULES_MNIST is not set: the folder of MNIST's four gz files"
)
def test_mnist_from_its_original_files(tmp_path, monkeypatch):
    """TFDS's own builder of MNIST, with the three things replaced for which it takes TensorFlow."""
    source = pathlib.Path(os.environ["LRULES_MNIST"])
    raw = {file.name: gzip.decompress(file.read_bytes()) for file in source.glob("*.gz")}
    unpacked = tmp_path / "downloads" / "extracted"
    unpacked.mkdir(parents=True)
    for name, content in raw.items():
        (unpacked / f"GZIP.{name}").write_bytes(content)
    files = types.SimpleNamespace(gfile=types.SimpleNamespace(GFile=open))
    monkeypatch.setattr("tensorflow_datasets.image_classification.mnist.tf", types.SimpleNamespace(io=files))
    monkeypatch.setattr("tensorflow_datasets.core.features.image_feature._ImageEncoder._encode_image", to_png)
    options = tfds.download.DownloadConfig(manual_dir=str(source))
    tfds_sets.prepare("mnist", str(tmp_path), download_config=options)

    def rows(images, labels):
        return sorted(label.tobytes() + image.tobytes() for image, label in zip(images, labels, strict=True))

    for in_memory in (data.IN_MEMORY, 0):
        loaded = data.load("mnist", data_dir=str(tmp_path), in_memory=in_memory)
        assert loaded.shape == (28, 28, 1) and loaded.classes == 10 and len(loaded.x_train) == 60_000
        images = np.frombuffer(raw["t10k-images-idx3-ubyte.gz"], np.uint8, offset=16).reshape(10_000, 28, 28, 1)
        labels = np.frombuffer(raw["t10k-labels-idx1-ubyte.gz"], np.uint8, offset=8)
        assert rows(np.asarray(loaded.x_test), loaded.y_test.astype(np.uint8)) == rows(images, labels)


class TinyPictures(TinyImages):
    """Images of several sizes: grey, with a white square in their centre."""

    def _info(self):
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=3)}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _generate_examples(self, count):
        for i in range(count):
            image = np.full((12, 12 + 4 * i, 3), 100, np.uint8)
            image[4:8, 4 + 2 * i : 8 + 2 * i] = 255
            file = io.BytesIO()
            Image.fromarray(image).save(file, "png")
            file.seek(0)
            yield i, {"image": file, "label": i % 3}


@pytest.mark.parametrize("in_memory", [10**6, 0])
def test_images_of_several_sizes_are_resized(tmp_path, in_memory):
    TinyPictures(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    loaded = data.load("tiny_pictures@6", data_dir=str(tmp_path), in_memory=in_memory)
    assert isinstance(loaded.x_train, Column) == (not in_memory) and loaded.shape == (6, 6, 3)
    images = np.asarray(loaded.x_train)
    assert images.shape == (6, 6, 6, 3) and images.dtype == np.uint8
    for image in images:  # the centre of each, whatever its width
        assert (image[0] == 100).all() and (image[:, 0] == 100).all() and image[2:4, 2:4].min() > 200
    with pytest.raises(InputError, match="as in tiny_pictures@224, got 'small'"):
        data.load("tiny_pictures@small", data_dir=str(tmp_path))


def test_images_of_one_size_and_one_channel_are_resized(folder):
    loaded = data.load("tiny_images@3", data_dir=str(folder.parents[1]))
    assert loaded.x_train.shape == (6, 3, 3, 1) and (loaded.x_train[:, 1, 1, 0] % 3 == loaded.y_train).all()
