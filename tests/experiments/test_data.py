"""Data sources, and one sentence for each way in which data can be wrong."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checks, data
from experiments.errors import InputError

IMAGES = np.where(np.arange(12 * 64).reshape(12, 8, 8) % 3, 255, 0).astype(np.uint8)
FLAT = IMAGES.reshape(12, 64).astype(np.float32)


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
        ({"x_train": IMAGES[:, None], "x_test": IMAGES[:6, None]}, ["(12, 1, 8, 8)", "axis 1", "moveaxis(x, 1, -1)"]),
        ({"x_train": np.zeros((12, 3, 32, 40), np.uint8)}, ["channels in axis 1"]),
        ({"x_train": IMAGES * 1.0}, ["x_train of set.npz holds floats from 0 to 255", "divide them by 255"]),
        ({"x_train": FLAT}, ["floats from 0 to 255", "look like pixels"]),
        ({"x_test": np.ones((6, 4, 4, 1))}, ["dtype uint8 and x_test float64", "both as uint8, or both as floats"]),
        ({"x_train": IMAGES // 255}, ["holds only 0 and 1", "save 255 for 1"]),
        ({"x_train": IMAGES > 128}, ["dtype bool", "astype(numpy.float32)"]),
        ({"x_train": np.full((12, 4), 1e300), "x_test": np.zeros((6, 4))}, ["beyond the range of float32", "divide"]),
        ({"x_train": np.full((12, 4), -1e39), "x_test": np.zeros((6, 4))}, ["beyond the range of float32"]),
        ({"y_train": np.arange(12) % 3 + 1}, ["begin at 1", "subtract 1 from y_train and y_test"]),
        ({"y_train": np.arange(12) % 3 * 500_000}, ["from 0 to 1000000", "only 3", "numpy.searchsorted"]),
        ({"y_train": np.arange(12) % 2 * 5 + 3}, ["from 3 to 8", "only 2", "numpy.searchsorted"]),
        ({"y_train": np.eye(3)[np.arange(12) % 3]}, ["is one-hot", "numpy.argmax(y, axis=1)"]),
        ({"y_test": np.eye(3, dtype=int)[[0, 1, 2, 0, 1, 2]]}, ["y_test of set.npz", "is one-hot"]),
        ({"y_train": np.arange(12)[:, None] % 3}, ["shape (12, 1)", "y[:, 0]"]),
        ({"y_train": np.zeros(0, int)}, ["y_train of set.npz holds no labels"]),
        ({"x_val": IMAGES[..., None]}, ["has x_val but not y_val", "both or neither"]),
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
    "x",
    [
        np.full((18, 3, 32), 0.5),  # features in two axes, or images without a channel axis
        np.full((18, 1, 28, 28, 1), 0.5),  # five axes are no image
        np.full((18, 3, 3, 3), 0.5),  # a very small image
        np.full((18, 1, 128, 9), 0.5),  # a signal in one row
        np.full((18, 28, 28, 3), 0.5),
        np.full((18, 8, 8), 16.0),  # pixels of another range
        np.full((18, 8, 8), -2.5) + 200 * np.eye(8),  # standardised, with outliers
        np.full((18, 3), 255.0),  # a table: counts, ages
        np.full((18, 64), 150.0),  # many counts, none near 255
        np.full((18, 64), 0.5) + 200,  # many features, but not whole
        np.full((18, 4, 4, 1), 0, np.uint8),
        np.full((18, 4, 4, 1), 2, np.uint8),
    ],
    ids=lambda x: f"{x.shape}-{x.dtype}",
)
def test_what_only_resembles_a_fault_passes(save, x):
    assert len(data.load(save(x_train=x[:12], x_test=x[12:])).x_train) == 12


def test_a_test_set_too_small_to_tell_may_be_black(save):
    assert data.load(save(x_test=np.ones((6, 4, 4, 1), np.uint8))).x_test.max() == 1


def test_following_the_remedies_makes_the_set_pass(save):
    remedied = data.load(save(x_train=np.moveaxis(IMAGES[:, None], 1, -1), x_test=np.moveaxis(IMAGES[:6, None], 1, -1)))
    assert remedied.shape == (8, 8, 1)
    assert data.load(save(x_train=IMAGES / 255, x_test=IMAGES[:6] / 255)).x_train.max() == 1
    assert data.load(save(x_train=IMAGES // 255 * 255, x_test=IMAGES[:6])).x_train.max() == 255
    bits = (IMAGES > 128).astype(np.float32)
    assert data.load(save(x_train=bits, x_test=bits[:6])).x_train.max() == 1
    labels = np.array([3, 8, 1000] * 4)
    numbers = np.searchsorted(np.unique(labels), labels)
    assert data.load(save(y_train=numbers, y_test=numbers[:6])).classes == 3
    one_hot = np.eye(3)[numbers]
    assert (data.load(save(y_train=np.argmax(one_hot, axis=1))).y_train == numbers).all()


def test_a_class_without_training_examples_is_allowed_where_most_have_some(save):
    assert data.load(save(y_train=np.array([0, 1, 3, 4] * 3))).classes == 5


def test_validation_arrays_of_a_file_are_checked_and_kept(save):
    loaded = data.load(save(x_val=arrays()["x_test"], y_val=arrays()["y_test"]))
    assert loaded.x_val.shape == (6, 4, 4, 1) and loaded.y_val.dtype == np.int32
    with pytest.raises(InputError, match="y_val of set.npz holds the label 3"):
        data.load(save(x_val=arrays()["x_test"], y_val=arrays()["y_test"] + 1))
    assert data.on_device(loaded).x_val.shape == (6, 4, 4, 1)


def test_split_validation_leaves_the_test_set_and_takes_from_every_class():
    digits = data.load("digits")
    split = data.split_validation(digits, 0.2, seed=1)
    assert split.x_test is digits.x_test and split.x_val.shape == (288, 8, 8, 1)
    rows = np.concatenate([split.x_train, split.x_val]).reshape(len(digits.x_train), -1)
    expected = digits.x_train.reshape(len(rows), -1)
    assert (rows[np.lexsort(rows.T)] == expected[np.lexsort(expected.T)]).all()
    shares = np.bincount(split.y_val) / np.bincount(digits.y_train)
    assert shares.min() > 0.18 and shares.max() < 0.22
    assert (data.split_validation(digits, 0.2, seed=1).y_val == split.y_val).all()
    assert not (data.split_validation(digits, 0.2, seed=2).y_val == split.y_val).all()
    with pytest.raises(InputError, match="must be a number between 0 and 1, got 1.5"):
        data.split_validation(digits, 1.5)
    with pytest.raises(InputError, match="has 288 validation examples already"):
        data.split_validation(split, 0.2)


@pytest.mark.parametrize(
    ("labels", "fraction", "words"),
    [
        ([0, 1, 2] * 4, 0.0, "between 0 and 1, got 0"),
        ([0, 1, 2] * 4, 0.1, "0.1 leaves a class .* from 0.25 to 0.75, as class 0 has 4"),
        ([0] * 50 + [1] * 3, 0.1, "leaves a class .* from 0.334 to 0.666, as class 1 has 3"),
        ([0] * 50 + [1] * 3, 0.9, "leaves a class .* from 0.334 to 0.666"),
        ([0] * 11 + [1], 0.5, "Class 1 of small has only one training example"),
    ],
)
def test_a_fraction_that_leaves_a_class_empty_is_refused(labels, fraction, words):
    y = np.array(labels)
    small = data.Dataset(np.zeros((len(y), 2)), y, np.zeros((2, 2)), y[:2], 3, "small")
    with pytest.raises(InputError, match=words):
        data.split_validation(small, fraction)


@pytest.mark.parametrize("fraction", [0.334, 0.5, 0.666])
@pytest.mark.parametrize("many", [3, 50, 51, 52])
def test_the_fractions_that_the_message_offers_are_taken(fraction, many):
    y = np.array([0] * many + [1] * 3)
    split = data.split_validation(data.Dataset(y[:, None], y, y[:2, None], y[:2], 2, "small"), fraction)
    assert set(split.y_val) == set(split.y_train) == {0, 1}


def test_a_folder_of_npy_files_is_mapped_and_never_copied(tmp_path):
    for name, value in arrays(x_val=arrays()["x_test"], y_val=arrays()["y_test"]).items():
        np.save(tmp_path / f"{name}.npy", value)
    loaded = data.load(f"npy:{tmp_path}")
    assert isinstance(loaded.x_train, np.memmap) and (loaded.x_train == arrays()["x_train"]).all()
    assert loaded.shape == (4, 4, 1) and loaded.classes == 3 and loaded.x_val.shape == (6, 4, 4, 1)
    split = data.split_validation(loaded._replace(x_val=None, y_val=None), 0.5)
    assert not isinstance(split.x_train, np.ndarray) and split.x_val.shape == (6, 4, 4, 1)
    both = np.concatenate([np.asarray(split.x_train), split.x_val[:], split.x_val[[1, 2]], split.x_val[0][None]])
    assert {row.tobytes() for row in both} == {row.tobytes() for row in arrays()["x_train"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "y_test.npy").unlink(), "has no file y_test.npy: save x_train, y_train"),
        (lambda folder: (folder / "x_test.npy").write_bytes(b"no"), "x_test.npy is not an npy file of a plain array"),
        (lambda folder: np.save(folder / "x_train.npy", np.zeros((12, 4, 4, 1))), "float64 and is read from the disk"),
        (lambda folder: np.save(folder / "x_train.npy", np.array([{}])), "not an npy file of a plain array"),
    ],
)
def test_a_folder_with_wrong_files(tmp_path, change, words):
    for name, value in arrays().items():
        np.save(tmp_path / f"{name}.npy", value)
    change(tmp_path)
    with pytest.raises(InputError, match=words):
        data.load(f"npy:{tmp_path}")
    with pytest.raises(InputError, match="There is no folder .*none: give --dataset=npy:FOLDER"):
        data.load(f"npy:{tmp_path / 'none'}")


def test_a_large_array_on_disk_is_checked_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "BLOCK_BYTES", 4 * 2)
    for name, value in arrays(x_train=np.full((300, 2), 0.5, np.float32), y_train=np.arange(300) % 3).items():
        np.save(tmp_path / f"{name}.npy", value)
    np.save(tmp_path / "x_test.npy", np.zeros((6, 2), np.float32))
    assert len(data.load(f"npy:{tmp_path}").x_train) == 300
    x = np.load(tmp_path / "x_train.npy", mmap_mode="r+")
    x[5 * 37] = np.nan  # the block is one of the 60 that are read
    with pytest.raises(InputError, match="NaN or Inf"):
        data.load(f"npy:{tmp_path}")
    x[5 * 37], x[5 * 37 + 1] = 0, np.nan  # and this one is not
    data.load(f"npy:{tmp_path}")


def test_a_file_of_the_name_in_the_folder_comes_before_tfds(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 1), np.uint8)
    y = np.arange(12) % 3
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    found = data.load("mnist", data_dir=str(tmp_path))
    assert found.name == "mnist" and (found.x_train == x).all() and found.classes == 3
