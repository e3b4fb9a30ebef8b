"""Data sources, and one sentence for each way in which data can be wrong."""

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments import data
from experiments.errors import InputError


def arrays(**changes):
    rng = np.random.default_rng(0)
    good = {
        "x_train": rng.integers(0, 256, (12, 4, 4, 1), np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": rng.integers(0, 256, (6, 4, 4, 1), np.uint8),
        "y_test": np.arange(6) % 3,
    }
    return {name: value for name, value in (good | changes).items() if value is not None}


@pytest.fixture
def save(tmp_path):
    def save(**changes):
        np.savez(tmp_path / "set.npz", **arrays(**changes))
        return f"npz:{tmp_path / 'set.npz'}"

    return save


def test_digits_are_real_and_always_split_alike():
    digits = data.load("digits")
    assert digits.x_train.shape == (1437, 8, 8, 1) and digits.x_test.shape == (360, 8, 8, 1)
    assert (digits.x_train.min(), digits.x_train.max()) == (0, 1) and digits.x_train.dtype == np.float32
    assert digits.classes == 10 and set(digits.y_test) == set(range(10))
    assert (data.load("digits").y_test == digits.y_test).all()


def test_npz_keeps_uint8_and_scales_it_in_the_batch(save):
    loaded = data.load(save())
    assert loaded.x_train.dtype == np.uint8 and loaded.classes == 3 and loaded.shape == (4, 4, 1)
    assert loaded.y_train.dtype == np.int32
    scaled = data.scale(jnp.array([0, 51, 255], jnp.uint8))
    np.testing.assert_allclose(scaled, [0, 0.2, 1], rtol=1e-6)
    assert data.scale(jnp.array([-3.0])) == -3


def test_images_without_a_channel_axis_get_one(save):
    loaded = data.load(save(x_train=np.zeros((12, 4, 4)), x_test=np.zeros((6, 4, 4))))
    assert loaded.shape == (4, 4, 1) and loaded.x_train.dtype == np.float32


def test_hold_out_takes_from_the_training_examples_alone():
    digits = data.load("digits")
    tuning = data.hold_out(digits, 0.25, seed=3)
    assert len(tuning.x_train) + len(tuning.x_test) == len(digits.x_train)
    assert not (data.hold_out(digits, 0.25, seed=4).y_test == tuning.y_test).all()
    with pytest.raises(InputError, match="must be a number between 0 and 1, got 1.5"):
        data.hold_out(digits, 1.5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_test": None}, ["set.npz has no array y_test", "numpy.savez"]),
        ({"y_test": np.array([0, 1, 2, 3, 0, 1])}, ["y_test of set.npz holds the label 3", "classes 0 to 2"]),
        ({"y_train": np.arange(12) - 1}, ["y_train of set.npz holds the label -1"]),
        ({"y_train": np.zeros(11, int)}, ["12 examples", "11 labels", "one label per example"]),
        ({"y_train": np.zeros(12)}, ["y_train of set.npz has dtype float64", "save integers"]),
        ({"y_test": np.zeros((6, 3), int)}, ["shape (6, 3)", "integers of shape [examples]"]),
        ({"x_train": np.zeros((12, 4, 4, 1), int)}, ["x_train of set.npz has dtype int64", "uint8"]),
        ({"x_train": np.full((12, 4), np.nan), "x_test": np.zeros((6, 4))}, ["NaN or Inf", "remove"]),
        ({"x_test": np.zeros((6, 5, 5, 1), np.uint8)}, ["different shapes", "(4, 4, 1)", "(5, 5, 1)"]),
        ({"x_test": np.zeros((0, 4, 4, 1), np.uint8), "y_test": np.zeros(0, int)}, ["at least one example"]),
        ({"x_train": np.array([None] * 12)}, ["not an npz file of plain arrays"]),
    ],
)
def test_wrong_arrays_are_told_in_a_sentence(save, changes, words):
    with pytest.raises(InputError) as error:
        data.load(save(**changes))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_malformed_files(tmp_path):
    with pytest.raises(InputError, match="There is no file .*none.npz: give --dataset=npz:FILE"):
        data.load(f"npz:{tmp_path / 'none.npz'}")
    for content in (b"", b"not a zip file", b"PK\x03\x04 broken"):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(InputError, match="is not an npz file of plain arrays"):
            data.load(f"npz:{tmp_path / 'bad.npz'}")
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(InputError, match="is not an npz file"):
        data.load(f"npz:{tmp_path / 'single.npy'}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mnits", ["no data set 'mnits'", "did you mean 'mnist'?"]),
        ("digit", ["did you mean 'digits'?"]),
        ("mnist", ["'mnist' is not prepared in", "tfds.data_source('mnist', data_dir=", "once"]),
        ("mnist/none", ["no data set 'mnist/none'"]),
    ],
)
def test_tfds_set_that_cannot_be_read(tmp_path, name, words):
    with pytest.raises(InputError) as error:
        data.load(name, data_dir=str(tmp_path))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


class TinyImages(tfds.core.GeneratorBasedBuilder):
    """Six and three images of one pixel row."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Tensor(shape=(1, 2, 1), dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
        )
        return self.dataset_info_from_configs(features=features, supervised_keys=("image", "label"))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(6), "validation": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": np.full((1, 2, 1), i, np.uint8), "label": i % 3}


def test_prepared_tfds_set_is_read(tmp_path):
    TinyImages(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    loaded = data.load("tiny_images", data_dir=str(tmp_path))
    assert loaded.shape == (1, 2, 1) and loaded.classes == 3 and loaded.x_train.dtype == np.uint8
    assert len(loaded.x_train) == 6 and len(loaded.x_test) == 3
    assert sorted(loaded.x_train[:, 0, 0, 0]) == list(range(6))
    assert (loaded.x_train[:, 0, 0, 0] % 3 == loaded.y_train).all()
