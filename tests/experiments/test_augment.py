"""Augmentation: what each step may do to an image, and one sentence for what is written wrongly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import augment
from experiments.errors import InputError

KEY = jax.random.key(0)
EVERY = "crop(2),flip,rotate(15),translate(0.2),cutout(3),colour(0.2,hue=0.1)"


def images(batch=64, height=9, width=7, channels=3):
    return jax.random.uniform(jax.random.key(7), (batch, height, width, channels), minval=0.1, maxval=1.0)


def windows(image, rows, columns):
    """Every place to which an image can be moved, black where nothing is known."""
    padded = np.pad(image, ((rows, rows), (columns, columns), (0, 0)))
    height, width, _ = image.shape
    return {
        padded[i : i + height, j : j + width].tobytes() for i in range(2 * rows + 1) for j in range(2 * columns + 1)
    }


@pytest.mark.parametrize(
    ("text", "rows", "columns"), [("crop(1)", 1, 1), ("translate(0.3)", 2, 2), ("translate(0.14)", 1, 0)]
)
def test_crop_and_translate_give_every_window_and_no_other(text, rows, columns):
    x = np.tile(np.asarray(images(1)), (400, 1, 1, 1))
    moved = np.asarray(augment.parse(text)(KEY, jnp.asarray(x)))
    assert {image.tobytes() for image in moved} == windows(x[0], rows, columns)


def test_flip_mirrors_about_half_of_the_images():
    x = np.asarray(images(400))
    flipped = np.asarray(augment.parse("flip")(KEY, jnp.asarray(x)))
    mirrored = (flipped == x[:, :, ::-1]).all((1, 2, 3))
    assert (mirrored | (flipped == x).all((1, 2, 3))).all()
    assert 150 < mirrored.sum() < 250
    assert (np.asarray(augment.parse("flip(1)")(KEY, jnp.asarray(x))) == x[:, :, ::-1]).all()
    assert (np.asarray(augment.parse("flip(probability=0)")(KEY, jnp.asarray(x))) == x).all()


def test_rotate_turns_by_the_angle_that_is_drawn(monkeypatch):
    x = np.asarray(images(3, height=8, width=8))
    for turns, degrees in ((1, 90), (2, 180), (-1, -90)):
        monkeypatch.setattr(jax.random, "uniform", lambda key, shape, minval, maxval, d=degrees: jnp.radians(float(d)))
        turned = augment.parse("rotate(180)")(KEY, jnp.asarray(x))
        np.testing.assert_allclose(turned, np.rot90(x, turns, (1, 2)), atol=1e-5)


def test_rotate_stays_within_its_angle_and_turns_each_image_differently():
    x = jnp.ones((50, 21, 21, 1))
    turned = np.asarray(augment.parse("rotate(20)")(KEY, x))
    inner = turned[:, 5:16, 5:16]
    np.testing.assert_allclose(inner, 1, atol=1e-5)  # the middle of a white square stays white
    corners = turned[:, 0, 0, 0]
    assert corners.min() < 0.1 and corners.max() > 0.5 and len(np.unique(turned.sum((1, 2, 3)).round(3))) > 40


def test_rotate_turns_either_way():
    x = np.zeros((50, 9, 9, 1), np.float32)
    x[:, 4, 8] = 1  # the middle of the right edge goes up or down
    turned = np.asarray(augment.parse("rotate(30)")(KEY, jnp.asarray(x)))
    up, down = turned[:, :4].sum((1, 2, 3)), turned[:, 5:].sum((1, 2, 3))
    assert 10 < (up > down).sum() < 40


def test_steps_are_drawn_independently():
    x = np.zeros((50, 9, 9, 1), np.float32)
    x[:, 4, 4] = 1
    moved = np.asarray(augment.parse("crop(1),crop(1)")(KEY, jnp.asarray(x)))
    assert {int(row) for row in moved.sum((2, 3)).argmax(1)} == {2, 3, 4, 5, 6}


def test_cutout_blackens_a_square_that_may_stick_out():
    cut = np.asarray(augment.parse("cutout(4)")(KEY, images(300)))[..., 0] == 0
    for black in cut:
        rows, columns = (np.flatnonzero(black.any(axis)) for axis in (1, 0))
        assert black.sum() == len(rows) * len(columns) and max(len(rows), len(columns)) <= 4
        assert (np.diff(rows) == 1).all() and (np.diff(columns) == 1).all()
    assert {int(black.sum()) for black in cut} >= {4, 8, 16}
    narrow = [black.any(1) for black in cut if black.any(1).sum() < 4]
    assert any(rows[0] for rows in narrow) and any(rows[-1] for rows in narrow)  # it sticks out at both ends
    assert cut.any(0).all()  # every pixel may be hit


def test_colour_stays_within_its_ranges():
    x = jnp.full((200, 4, 4, 3), 0.5)
    brighter = np.asarray(augment.parse("colour(0.2,0,0)")(KEY, x))
    assert 0.3 <= brighter.min() < 0.33 and 0.67 < brighter.max() <= 0.7
    assert np.ptp(brighter, (1, 2, 3)).max() < 1e-6  # one shift for the whole image
    x = jnp.tile(jnp.array([0.4, 0.6]).reshape(1, 1, 2, 1), (200, 4, 2, 3))
    spread = np.ptp(np.asarray(augment.parse("colour(0,0.5,0)")(KEY, x)), (1, 2, 3))
    assert 0.1 <= spread.min() < 0.11 and 0.29 < spread.max() <= 0.3001


def luma(x):
    return np.asarray(x) @ [0.299, 0.587, 0.114]


def test_saturation_scales_the_distance_from_grey_and_hue_keeps_the_brightness():
    x = jnp.tile(jnp.array([0.8, 0.4, 0.4]).reshape(1, 1, 1, 3), (200, 2, 2, 1))
    saturated = np.asarray(augment.parse("colour(0,saturation=0.5)")(KEY, x))
    np.testing.assert_allclose(luma(saturated), luma(x), atol=2e-3)
    factors = np.ptp(saturated, 3).mean((1, 2)) / 0.4
    assert 0.5 <= factors.min() < 0.55 and 1.45 < factors.max() <= 1.5001
    x = 0.5 + (x - 0.5) / 4
    turned = np.asarray(augment.parse("colour(0,hue=0.5)")(KEY, x))
    np.testing.assert_allclose(luma(turned), luma(x), atol=2e-3)
    largest = {int(i) for i in turned.argmax(3).ravel()}
    assert largest == {0, 1, 2}  # half a turn either way reaches every colour
    vivid = np.asarray(augment.parse("colour(0,hue=0.5)")(KEY, jnp.tile(jnp.eye(3), (50, 1, 1, 1))))
    assert vivid.min() == 0 and vivid.max() == 1
    near = np.asarray(augment.parse("colour(0,hue=0.05)")(KEY, x))
    assert np.abs(near - x).max() < 0.05 and (near.argmax(3) == 0).all()


def test_colours_do_not_depend_on_how_they_are_compiled():
    """Equal or nearly equal channels, which bfloat16 images are full of, must not change places."""
    x = images(8, height=16, width=16).astype(jnp.bfloat16)
    function = augment.parse("colour(0.2,hue=0.1)")
    np.testing.assert_allclose(
        jax.jit(function)(KEY, x).astype(jnp.float32), function(KEY, x).astype(jnp.float32), atol=1e-2
    )


def test_colour_of_grey_images_keeps_them_grey_and_in_range():
    bright = np.asarray(augment.parse("colour(0.9,hue=0.5)")(KEY, images(50, channels=1)))
    assert bright.shape == (50, 9, 7, 1) and bright.min() >= 0 and bright.max() <= 1


def test_every_example_and_every_key_has_a_draw_of_its_own():
    x = jnp.tile(images(1), (20, 1, 1, 1))
    function = jax.jit(augment.parse(EVERY))
    one, again, other = (function(jax.random.key(k), x) for k in (0, 0, 1))
    assert (one == again).all() and not jnp.allclose(one, other)
    assert len({np.asarray(image).tobytes() for image in one}) == 20


@pytest.mark.parametrize(
    ("text", "dtype"), [(EVERY, jnp.float32), *((text, jnp.bfloat16) for text in [EVERY, *augment.PAPERS])]
)
def test_it_is_jitted_and_vmapped_over_seeds_and_keeps_the_dtype(text, dtype):
    x = images(2, height=16, width=16).astype(dtype)
    keys, xs = jax.random.split(KEY, 3), jnp.stack([x, x * 0.5, x * 0.25])
    function = augment.parse(text)
    alone = jax.jit(function)
    together = jax.jit(jax.vmap(function))(keys, xs)
    assert together.dtype == dtype and together.shape == xs.shape and jnp.isfinite(together).all()
    for i in range(3):
        np.testing.assert_allclose(
            together[i].astype(jnp.float32), alone(keys[i], xs[i]).astype(jnp.float32), atol=1e-2
        )


def test_a_step_that_does_not_depend_on_numbers_beyond_bfloat16():
    """A shift by whole pixels copies bfloat16 exactly, in an image too large to count its pixels in bfloat16."""
    x = jax.random.uniform(KEY, (2, 300, 300, 1)).astype(jnp.bfloat16)
    moved = np.asarray(augment.parse("crop(1)")(KEY, x), np.float32)
    assert all(
        image.tobytes() in windows(np.asarray(old, np.float32), 1, 1) for image, old in zip(moved, x, strict=True)
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "The augmentation '' is malformed: write it as in crop"),
        ("crop(", "is malformed"),
        ("crop(4)],[flip", "is malformed"),
        ("4", "'4' is no step of an augmentation"),
        ("crop(4)(2)", "is no step of an augmentation"),
        ("crop(**4)", "is no step of an augmentation"),
        ("flop", "no augmentation 'flop': did you mean 'flip'"),
        ("color(0.1)", "did you mean 'colour'"),
        ("dual_propagaton", "did you mean 'dual_propagation'"),
        ("zzz", "use one of: backman_cifar10"),
        ("crop", r"crop needs the option 'padding': write crop\(4\)"),
        ("crop(4, 5)", "crop takes padding, each once"),
        ("crop(4, padding=4)", "crop takes padding, each once"),
        ("crop(paddin=4)", "crop has no option 'paddin': did you mean 'padding'"),
        ("crop(0)", "padding must be a whole number of at least 1, got 0"),
        ("crop(2.5)", "padding must be a whole number of at least 1, got 2.5"),
        ("crop('4')", "padding must be a number, got '4'"),
        ("crop(True)", "padding must be a number, got True"),
        ("crop(x)", "padding must be a number, got x"),
        ("flip(2)", "probability must be a number from 0 to 1, got 2"),
        ("rotate(-5)", "degrees must be a number from 0 to 180, got -5"),
        ("rotate(1e999)", "got inf"),
        ("translate(4)", "fraction must be a number from 0 to 1, got 4"),
        ("cutout(0)", "size must be a whole number of at least 1"),
        ("colour(2)", "brightness must be a number from 0 to 1"),
        ("colour(0.1, hue=1)", "hue must be a number from 0 to 0.5"),
    ],
)
def test_wrong_text_is_told_in_a_sentence(text, words):
    with pytest.raises(InputError, match=words) as error:
        augment.parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "shape", "words"),
    [
        ("crop(4),flip", (64,), r"is for images .* have the shape \(64,\): leave it out"),
        ("flip", (2, 8, 8, 1), "is for images"),
        ("cutout(9)", (8, 16, 1), r"cutout\(9\) is larger than the images of 8 x 16"),
        ("crop(8)", (8, 16, 1), r"crop\(8\) moves images of 8 x 16 out of sight"),
        ("translate(1)", (8, 16, 1), "out of sight"),
        ("translate(0.1)", (8, 8, 1), "less than one pixel of images of 8 x 8"),
        ("flip,colour(0.1)", (8, 8, 2), "images of 1 or 3 channels, and the data have 2"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_and_in_the_step(text, shape, words):
    with pytest.raises(InputError, match=words):
        augment.parse(text).check(shape)
    with pytest.raises(InputError, match=words):
        jax.jit(augment.parse(text))(KEY, jnp.zeros((3, *shape)))


def test_normalise_by_channel_and_for_all_channels():
    x = images(5).astype(jnp.float32)
    by_channel = jax.jit(augment.normalise([0.1, 0.2, 0.3], [1, 2, 4]))(x)
    np.testing.assert_allclose(by_channel, (np.asarray(x) - [0.1, 0.2, 0.3]) / [1, 2, 4], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(augment.parse_normalise("0.5/0.25")(x), (x - 0.5) / 0.25, rtol=1e-4, atol=1e-6)
    assert augment.parse_normalise("mnist")(x[..., :1].astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert augment.normalise([0.0], [2.0])(jnp.ones((3, 4))).shape == (3, 4)


@pytest.mark.parametrize("name", augment.NORMALISE)
def test_published_constants_bring_pixels_to_a_range_about_zero(name):
    mean, std = augment.NORMALISE[name]
    x = jnp.broadcast_to(jnp.array(mean, jnp.float32), (1, 2, 2, len(mean)))
    np.testing.assert_allclose(augment.parse_normalise(name)(x), 0, atol=1e-6)
    np.testing.assert_allclose(
        augment.parse_normalise(name)(x + jnp.array(std, jnp.float32)[None, None, None]), 1, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mnits", "no normalisation 'mnits': did you mean 'mnist'"),
        ("0.5", "no normalisation '0.5'"),
        ("0.5/0.2/0.1", "no normalisation"),
        ("0.5/0", "deviations above 0"),
        ("0.5,0.5/0.2", "as many means as deviations"),
        ("nan/1", "deviations above 0"),
    ],
)
def test_wrong_normalisation(text, words):
    with pytest.raises(InputError, match=words):
        augment.parse_normalise(text)


def test_normalisation_for_other_channels_is_refused():
    with pytest.raises(InputError, match="for 3 channels, and the data have 1: give one mean"):
        augment.parse_normalise("cifar10")(jnp.zeros((2, 8, 8, 1)))
