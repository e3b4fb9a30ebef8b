"""Augmentation of images on the device, example by example, inside the compiled step; and normalisation.

    augment = parse("crop(4),flip")                # or the name of a paper's, such as dual_propagation
    x = augment(key, scale(batch))                 # [batch, height, width, channels] in [0, 1]; in training only
    x = parse_normalise("cifar10")(x)              # in training and in evaluation

The steps are applied in the order written, each with its own draw for each example:

| step | does |
| --- | --- |
| `crop(padding)` | pads with black by so many pixels, and cuts a random window of the old size |
| `flip(probability=0.5)` | mirrors left and right |
| `rotate(degrees)` | turns about the centre by a uniform angle up to this, either way, bilinear, black outside |
| `translate(fraction)` | moves by whole pixels, up to this fraction of the height and of the width, black outside |
| `cutout(size)` | blackens a square of so many pixels; its centre is any pixel, so it may stick out |
| `colour(brightness, contrast, saturation, hue=0)` | shifts brightness, scales contrast and saturation, turns hue |

The ranges of `colour` are [-b, b], [1 - c, 1 + c], [1 - s, 1 + s] and [-h, h] (in turns). Contrast and saturation are
as the brightness if they are not given. The result is cut to [0, 1]. Grey images have no saturation and no hue.
"""

import ast
import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.ndimage import map_coordinates

from experiments.errors import InputError, nearest

Step = Callable[[Array, Array], Array]

# What the papers train with. BackMAN's names its steps for CIFAR-10 but not their sizes: these are ours. The papers on
# monotone DFA and on node perturbation augment nothing.
PAPERS = {
    "backman_mnist": "crop(1)",
    "backman_cifar10": "flip,rotate(15),translate(0.1),colour(0.2)",
    "random_backprop_cifar10": "translate(0.1),flip",
    "dual_propagation": "crop(4),flip",
}

# The mean and standard deviation of the training pixels in [0, 1], by channel.
NORMALISE: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The steps of an augmentation. Calling it with a key and images [batch, ...] gives the augmented images.

    It may be jitted and vmapped over keys and images. It computes in float32 and returns the dtype that it got.
    """

    text: str
    steps: tuple[Step, ...]

    def check(self, shape: Sequence[int]) -> None:
        """Raises InputError if examples of this shape are no images, or do not suit a step."""
        self._check_axes(shape)
        key, image = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
        jax.eval_shape(self._one, key, image)

    def __call__(self, key: Array, x: Array) -> Array:
        self._check_axes(x.shape[1:])
        augmented = jax.vmap(self._one)(jax.random.split(key, len(x)), x.astype(jnp.float32))
        return augmented.astype(x.dtype)

    def _check_axes(self, shape: Sequence[int]) -> None:
        # Features in three axes cannot be told from images; those in two get a channel axis in `data.load`.
        if len(shape) != 3:
            raise InputError(
                f"The augmentation {self.text} is for images [height, width, channels], and the examples have the "
                f"shape {tuple(shape)}: leave it out, or save the data as images."
            )

    def _one(self, key: Array, image: Array) -> Array:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # dm_pix mixes dtypes
            for step, subkey in zip(self.steps, jax.random.split(key, len(self.steps)), strict=True):
                image = step(subkey, image)
        return image


def parse(text: str) -> Augmentation:
    """The augmentation of a text such as `crop(4),flip`, or of a name in `PAPERS`.

    Raises:
      InputError: a step or an option is unknown or out of its range.

    Example: `parse("crop(4),flip")(jax.random.key(0), x)` has the shape and dtype of `x`.
    """
    written = PAPERS.get(text.strip(), text)
    try:
        tree = ast.parse(f"[{written}]", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    if not isinstance(tree, ast.List) or not tree.elts:
        raise InputError(f"The augmentation {text!r} is malformed: write it as in crop(4),flip.")
    return Augmentation(text.strip(), tuple(_step(node) for node in tree.elts))


def normalise(mean: Sequence[float], std: Sequence[float]) -> Callable[[Array], Array]:
    """The function x -> (x - mean) / std, with one number for all channels or one for each.

    Raises:
      InputError: the numbers are no mean and deviation; the returned function, if they do not fit the channels.

    Example: `normalise([0.1307], [0.3081])(x)` for MNIST.
    """
    if len(mean) != len(std) or not mean or not all(map(math.isfinite, [*mean, *std])) or min(std) <= 0:
        raise InputError(
            f"A normalisation needs as many means as deviations, and deviations above 0, got {list(mean)} and "
            f"{list(std)}: write it as in 0.49,0.48,0.45/0.25,0.24,0.26."
        )

    def normalised(x: Array) -> Array:
        if len(mean) not in (1, x.shape[-1]):
            raise InputError(
                f"The normalisation is for {len(mean)} channels, and the data have {x.shape[-1]}: give one mean and "
                "one deviation, or one for each channel."
            )
        shape = (1,) * (x.ndim - 1) + (len(mean),)
        centre, width = (jnp.asarray(v, jnp.float32).reshape(shape) for v in (mean, std))
        return ((x.astype(jnp.float32) - centre) / width).astype(x.dtype)

    return normalised


def parse_normalise(text: str) -> Callable[[Array], Array]:
    """The normalisation of a name in `NORMALISE`, or of means and deviations such as `0.5/0.25`, by channel."""
    if text in NORMALISE:
        return normalise(*NORMALISE[text])
    try:
        mean, std = ([float(v) for v in part.split(",")] for part in text.split("/"))
    except ValueError:
        raise InputError(
            f"There is no normalisation '{text}': {nearest(text, NORMALISE)}"
            " (or write means and deviations, as in 0.5/0.25)"
        ) from None
    return normalise(mean, std)


def _step(node: ast.expr) -> Step:
    """One step of the text."""
    match node:
        case ast.Name(id=name):
            args: list[ast.expr] = []
            options: dict[str, ast.expr] = {}
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if all(k.arg for k in keywords):
            options = {str(k.arg): k.value for k in keywords}
        case _:
            raise InputError(f"'{ast.unparse(node)}' is no step of an augmentation: write it as in crop(4),flip.")
    if name not in STEPS:
        raise InputError(f"There is no augmentation '{name}': {nearest(name, [*STEPS, *PAPERS])}")
    parameters = inspect.signature(STEPS[name]).parameters
    for option in options:
        if option not in parameters:
            raise InputError(f"{name} has no option '{option}': {nearest(option, parameters)}")
    if len(args) > len(parameters) or any(option in list(parameters)[: len(args)] for option in options):
        raise InputError(f"{name} takes {' and '.join(parameters)}, each once: write {_example(name)}.")
    values = {**dict(zip(parameters, args, strict=False)), **options}
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in values:
            raise InputError(f"{name} needs the option '{option}': write {_example(name)}.")
    return STEPS[name](**{option: _literal(name, option, value) for option, value in values.items()})


def _literal(name: str, option: str, node: ast.expr) -> float:
    try:
        value = ast.literal_eval(node)
    except (TypeError, ValueError):
        value = None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{name}: {option} must be a number, got {ast.unparse(node)}: write {_example(name)}.")
    return value


def _example(name: str) -> str:
    return {"crop": "crop(4)", "rotate": "rotate(15)", "cutout": "cutout(8)", "flip": "flip(0.5)"}.get(
        name, f"{name}(0.1)"
    )


def _within(name: str, option: str, value: float, low: float, high: float = math.inf, *, whole: bool = False) -> None:
    if not low <= value <= high or (whole and not isinstance(value, int)):
        kind = "a whole number" if whole else "a number"
        bounds = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
        raise InputError(f"{name}: {option} must be {kind} {bounds}, got {value:g}: write {_example(name)}.")


def _moved(key: Array, image: Array, step: str, rows: int, columns: int) -> Array:
    height, width, _ = image.shape
    if rows >= height or columns >= width:
        raise InputError(f"{step} moves images of {height} x {width} out of sight: use a smaller number.")
    padded = jnp.pad(image, ((rows, rows), (columns, columns), (0, 0)))
    return pix.random_crop(key, padded, image.shape)


def _crop(padding: int) -> Step:
    _within("crop", "padding", padding, 1, whole=True)
    return lambda key, image: _moved(key, image, f"crop({padding})", padding, padding)


def _translate(fraction: float) -> Step:
    _within("translate", "fraction", fraction, 0, 1)

    def translate(key: Array, image: Array) -> Array:
        rows, columns = (int(fraction * size) for size in image.shape[:2])
        if not (rows or columns):
            raise InputError(
                f"translate({fraction:g}) is less than one pixel of images of {image.shape[0]} x {image.shape[1]}: "
                "use a larger fraction."
            )
        return _moved(key, image, f"translate({fraction:g})", rows, columns)

    return translate


def _flip(probability: float = 0.5) -> Step:
    _within("flip", "probability", probability, 0, 1)
    return lambda key, image: pix.random_flip_left_right(key, image, probability=float(probability))


def _rotate(degrees: float) -> Step:
    _within("rotate", "degrees", degrees, 0, 180)

    def rotate(key: Array, image: Array) -> Array:
        # dm_pix.rotate interpolates between channels too: under vmap it takes 23 times as long as this (32 x 32 x 3).
        angle = jax.random.uniform(key, (), minval=-math.radians(degrees), maxval=math.radians(degrees))
        rows, columns = ((size - 1) / 2 for size in image.shape[:2])
        y, x = jnp.meshgrid(*(jnp.arange(size) for size in image.shape[:2]), indexing="ij")
        y, x, cos, sin = y - rows, x - columns, jnp.cos(angle), jnp.sin(angle)
        places = [cos * y + sin * x + rows, cos * x - sin * y + columns]
        return jax.vmap(lambda channel: map_coordinates(channel, places, order=1), in_axes=2, out_axes=2)(image)

    return rotate


def _cutout(size: int) -> Step:
    _within("cutout", "size", size, 1, whole=True)

    def cutout(key: Array, image: Array) -> Array:
        height, width, _ = image.shape
        if size > min(height, width):
            raise InputError(f"cutout({size}) is larger than the images of {height} x {width}: use a smaller square.")
        within = []
        for subkey, length in zip(jax.random.split(key), (height, width), strict=True):
            start = jax.random.randint(subkey, (), 0, length) - size // 2
            within.append((jnp.arange(length) >= start) & (jnp.arange(length) < start + size))
        return jnp.where((within[0][:, None] & within[1])[..., None], 0, image)

    return cutout


def _linear(matrix: Array | np.ndarray, image: Array) -> Array:
    return jnp.einsum("ij,hwj->hwi", matrix, image, precision="highest")


def _colour(brightness: float, contrast: float | None = None, saturation: float | None = None, hue: float = 0) -> Step:
    contrast, saturation = (brightness if v is None else v for v in (contrast, saturation))
    for option, value in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
        _within("colour", option, value, 0, 1)
    _within("colour", "hue", hue, 0, 0.5)

    def colour(key: Array, image: Array) -> Array:
        channels = image.shape[2]
        if channels not in (1, 3):
            raise InputError(f"colour is for images of 1 or 3 channels, and the data have {channels}: leave it out.")
        keys = jax.random.split(key, 4)
        image = pix.random_brightness(keys[0], image, brightness)
        image = jnp.clip(pix.random_contrast(keys[1], image, 1 - contrast, 1 + contrast), 0, 1)
        if channels == 3 and saturation:
            factor = jax.random.uniform(keys[2], (), minval=1 - saturation, maxval=1 + saturation)
            grey = _linear(LUMA, image)
            image = jnp.clip(grey + factor * (image - grey), 0, 1)
        if channels == 3 and hue:
            turn = jax.random.uniform(keys[3], (), minval=-hue, maxval=hue)
            image = _linear(LUMA + jnp.cos(math.tau * turn) * CHROMA + jnp.sin(math.tau * turn) * ACROSS, image)
        return jnp.clip(image, 0, 1)

    return colour


# Saturation and hue are linear in red, green and blue. dm_pix goes by way of hue, saturation and value, and asks which
# channel equals the largest: in compiled code, where the two sides may be rounded differently, that gave wrong hues.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
LUMA, CHROMA, ACROSS = (
    np.asarray(np.linalg.inv(_YIQ) @ np.array(part) @ _YIQ, np.float32)
    for part in (np.diag([1, 0, 0]), np.diag([0, 1, 1]), [[0, 0, 0], [0, 0, -1], [0, 1, 0]])
)

STEPS: dict[str, Callable[..., Any]] = {
    "crop": _crop,
    "flip": _flip,
    "rotate": _rotate,
    "translate": _translate,
    "cutout": _cutout,
    "colour": _colour,
}
