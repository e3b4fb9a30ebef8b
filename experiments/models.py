"""Flax NNX models without any part of lrules inside: MLP, LeNet-5, a small CNN, ResNet-18 and 50, and VGG16."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments import expressions
from experiments.errors import InputError, nearest

Array = jax.Array
ACTIVATIONS = {
    name: getattr(jax.nn, name)
    for name in ("relu", "tanh", "sigmoid", "gelu", "silu", "elu", "leaky_relu", "softplus", "hard_tanh", "mish")
}
KERNEL_INIT = nnx.initializers.lecun_normal()  # that of Flax
MODELS = ("mlp", "lenet5", "cnn", "resnet18", "resnet50", "vgg16")
OPTIONS = {"resnet18": ("width",), "resnet50": ("width", "blocks"), "vgg16": ("width",)}  # as in resnet50(blocks=4)


def build(
    name: str,
    shape: Sequence[int],
    classes: int,
    *,
    rngs: nnx.Rngs,
    widths: Sequence[int] = (128, 128),
    activation: str = "",
    dtype: Any = jnp.float32,
) -> nnx.Module:
    """The named model for inputs of `shape` (without the batch axis); `widths` are for the MLP.

    Without an `activation` each model has its own: tanh for mlp, lenet5 and cnn, and ReLU for the others, which take
    no other. A name may have `OPTIONS`, as in `resnet50(blocks=4)`.
    """
    name, values, given = expressions.single(name, "model")
    if name not in MODELS:
        raise InputError(f"There is no model '{name}': {nearest(name, MODELS)}")
    known = OPTIONS.get(name, ())
    wrong = [*values, *(option for option in given if option not in known)]
    if wrong:
        remedy = f"write it as in {name}({known[0]}=8)." if known else f"write {name} alone."
        raise InputError(f"The model {name} has no option {wrong[0]!r}: {remedy}")
    for option, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"The model {name}: {option} must be a whole number above 0, got {value!r}.")
    if activation and activation not in ACTIVATIONS:
        raise InputError(f"There is no activation '{activation}': {nearest(activation, ACTIVATIONS)}")
    options: dict[str, Any] = {"rngs": rngs, "dtype": dtype} | given
    if name not in OPTIONS:
        options |= {"activation": ACTIVATIONS[activation]} if activation else {}
    elif activation not in ("", "relu"):
        raise InputError(f"{name} has the activation relu, got '{activation}': leave it out, or use lenet5 or cnn.")
    if name == "mlp":
        return MLP((math.prod(shape), *widths, classes), **options)
    if len(shape) != 3:
        raise InputError(f"{name} needs images [height, width, channels], got the shape {tuple(shape)}: use mlp.")
    convolutional: dict[str, Any] = {"lenet5": LeNet5, "cnn": CNN, "vgg16": VGG16, "resnet18": ResNet18}
    convolutional["resnet50"] = ResNet50
    return convolutional[name](shape, classes, **options)


class MLP(nnx.Module):
    """Dense layers of widths `[inputs, hidden, ..., outputs]` with an activation between them."""

    def __init__(
        self,
        widths: Sequence[int],
        activation: Callable[[Array], Array] = jnp.tanh,
        *,
        rngs: nnx.Rngs,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        dtype: Any = jnp.float32,
    ):
        self.activation = activation
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.layers = nnx.List([nnx.Linear(m, n, kernel_init=kernel_init, rngs=rngs, dtype=dtype) for m, n in pairs])

    def __call__(self, x: Array) -> Array:
        """[batch, ...] -> logits [batch, outputs]."""
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class LeNet5(nnx.Module):
    """LeNet-5 with max-pooling; in the BackMAN paper (appendix B.3) with ReLU, `activation=jax.nn.relu`.

    The paper's images measure 32x32. The model centres smaller images in a field of that size, as LeCun et al. (1998)
    did.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        rngs: nnx.Rngs,
        activation: Callable[[Array], Array] = jnp.tanh,
        dtype: Any = jnp.float32,
    ):
        self.activation = activation
        height, width, channels = shape
        self.margins = [divmod(max(0, 32 - side), 2) for side in (height, width)]
        flat = 16 * math.prod(((max(32, side) - 4) // 2 - 4) // 2 for side in (height, width))
        self.conv1 = nnx.Conv(channels, 6, (5, 5), padding="VALID", rngs=rngs, dtype=dtype)
        self.conv2 = nnx.Conv(6, 16, (5, 5), padding="VALID", rngs=rngs, dtype=dtype)
        self.fc1 = nnx.Linear(flat, 120, rngs=rngs, dtype=dtype)
        self.fc2 = nnx.Linear(120, 84, rngs=rngs, dtype=dtype)
        self.out = nnx.Linear(84, classes, rngs=rngs, dtype=dtype)

    def __call__(self, x: Array) -> Array:
        """[batch, height, width, channels] -> logits [batch, classes]."""
        x = jnp.pad(x, [(0, 0), *((half, half + odd) for half, odd in self.margins), (0, 0)])
        x = _pool(self.activation(self.conv1(x)))
        x = _pool(self.activation(self.conv2(x)))
        x = self.activation(self.fc1(x.reshape(x.shape[0], -1)))
        return self.out(self.activation(self.fc2(x)))


class CNN(nnx.Module):
    """A small CNN for small images: two 3x3 convolutions with pooling, one hidden dense layer."""

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        rngs: nnx.Rngs,
        activation: Callable[[Array], Array] = jnp.tanh,
        dtype: Any = jnp.float32,
    ):
        self.activation = activation
        height, width, channels = shape
        if min(height, width) < 4:
            raise InputError(f"cnn needs images of at least 4x4 pixels, got {height}x{width}: use mlp.")
        self.conv1 = nnx.Conv(channels, 16, (3, 3), rngs=rngs, dtype=dtype)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs, dtype=dtype)
        self.fc = nnx.Linear(32 * (height // 4) * (width // 4), 128, rngs=rngs, dtype=dtype)
        self.out = nnx.Linear(128, classes, rngs=rngs, dtype=dtype)

    def __call__(self, x: Array) -> Array:
        """[batch, height, width, channels] -> logits [batch, classes]."""
        x = _pool(self.activation(self.conv1(x)))
        x = _pool(self.activation(self.conv2(x)))
        x = self.activation(self.fc(x.reshape(x.shape[0], -1)))
        return self.out(x)


class ResNet18(nnx.Module):
    """ResNet-18 with BatchNorm and the stem for small images: one 3x3 convolution, no pooling (He et al., 2016)."""

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        width: int = 64,
    ):
        self.stem = _conv(shape[-1], width, 3, 1, rngs, dtype)
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs, dtype=dtype)
        widths = [width * 2**stage for stage in range(4) for _ in range(2)]
        strides = [1, 1, 2, 1, 2, 1, 2, 1]
        self.blocks = nnx.List(
            [Block(m, n, s, rngs, dtype) for m, n, s in zip([width, *widths[:-1]], widths, strides, strict=True)]
        )
        self.out = nnx.Linear(widths[-1], classes, rngs=rngs, dtype=dtype)

    def __call__(self, x: Array) -> Array:
        """[batch, height, width, channels] -> logits [batch, classes]."""
        x = jax.nn.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.out(x.mean((1, 2)))


class Block(nnx.Module):
    """Two 3x3 convolutions and a skip connection, which is a 1x1 convolution if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, rngs: nnx.Rngs, dtype: Any):
        self.conv1 = _conv(inputs, outputs, 3, stride, rngs, dtype)
        self.norm1 = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs, dtype=dtype)
        self.conv2 = _conv(outputs, outputs, 3, 1, rngs, dtype)
        self.norm2 = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs, dtype=dtype)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.skip = _conv(inputs, outputs, 1, stride, rngs, dtype)
            self.skip_norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs, dtype=dtype)

    def __call__(self, x: Array) -> Array:
        """[batch, height, width, inputs] -> [batch, height / stride, width / stride, outputs]."""
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        skip = self.skip_norm(self.skip(x)) if self.projects else x
        return jax.nn.relu(y + skip)


class ResNet50(nnx.Module):
    """ResNet-50 with the stem for small images; with fewer than 16 `blocks`, the upper ones are left out."""

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        width: int = 64,
        blocks: int = 16,
    ):
        counts = (3, 4, 6, 3)  # of the stages; the first block of a later stage halves the image
        sizes = [(width * 2**s, 2 if s and not i else 1) for s, count in enumerate(counts) for i in range(count)]
        if blocks > len(sizes):
            raise InputError(f"ResNet-50 has {len(sizes)} blocks, got blocks={blocks}: ask for fewer.")
        self.stem = _conv(shape[-1], width, 3, 1, rngs, dtype)
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs, dtype=dtype)
        outputs = [width, *(4 * middle for middle, _ in sizes)]
        self.blocks = nnx.List([Bottleneck(outputs[i], *sizes[i], rngs, dtype) for i in range(blocks)])
        self.out = nnx.Linear(outputs[blocks], classes, rngs=rngs, dtype=dtype)

    def __call__(self, x: Array) -> Array:
        """[batch, height, width, channels] -> logits [batch, classes]."""
        x = jax.nn.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.out(x.mean((1, 2)))


class Bottleneck(nnx.Module):
    """Convolutions of 1x1, 3x3 and 1x1 to `4 middle` features, and a skip connection as in `Block`."""

    def __init__(self, inputs: int, middle: int, stride: int, rngs: nnx.Rngs, dtype: Any):
        outputs = 4 * middle
        self.conv1 = _conv(inputs, middle, 1, 1, rngs, dtype)
        self.norm1 = nnx.BatchNorm(middle, momentum=0.9, rngs=rngs, dtype=dtype)
        self.conv2 = _conv(middle, middle, 3, stride, rngs, dtype)
        self.norm2 = nnx.BatchNorm(middle, momentum=0.9, rngs=rngs, dtype=dtype)
        self.conv3 = _conv(middle, outputs, 1, 1, rngs, dtype)
        self.norm3 = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs, dtype=dtype)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.skip = _conv(inputs, outputs, 1, stride, rngs, dtype)
            self.skip_norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs, dtype=dtype)

    def __call__(self, x: Array) -> Array:
        """[batch, height, width, inputs] -> [batch, height / stride, width / stride, 4 middle]."""
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        y = jax.nn.relu(self.norm2(self.conv2(y)))
        skip = self.skip_norm(self.skip(x)) if self.projects else x
        return jax.nn.relu(self.norm3(self.conv3(y)) + skip)


class VGG16(nnx.Module):
    """VGG16 without BatchNorm and dropout, as in the dual-propagation paper (section 6.2 and appendix B).

    It has thirteen 3x3 convolutions in five stages, with max-pooling after each stage, and then three dense layers.
    The hidden dense layers have 64 `width` = 4096 units, as in the authors' code; the paper does not describe them
    (those of Simonyan and Zisserman are the same). Pooling follows ReLU, as in Simonyan and Zisserman. The authors'
    code pools first. This is the same function, but dual propagation linearises pooling at its last states, and then
    needs one more product for each pooled layer. The paper does not describe the initialisation. Here it is the normal
    one of He et al., with which a signal keeps its size through sixteen layers of ReLU (the code uses Flax's default).

    A stage pools if both sides measure 2 pixels or more, so images smaller than 32x32 work too. With such images the
    upper stages read mostly padding, and their signal becomes smaller.
    """

    STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))  # (features / width, convolutions)

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        width: int = 64,
    ):
        he: Any = {"kernel_init": nnx.initializers.he_normal(), "rngs": rngs, "dtype": dtype}
        height, wide, channels = shape
        convs, self.pools = [], []
        for factor, count in self.STAGES:
            for i in range(count):
                convs.append(nnx.Conv(channels, factor * width, (3, 3), **he))
                channels = factor * width
                self.pools.append(i == count - 1 and min(height, wide) >= 2)
            if self.pools[-1]:
                height, wide = height // 2, wide // 2
        self.convs = nnx.List(convs)
        self.fc1 = nnx.Linear(height * wide * channels, 64 * width, **he)
        self.fc2 = nnx.Linear(64 * width, 64 * width, **he)
        self.out = nnx.Linear(64 * width, classes, **he)

    def __call__(self, x: Array) -> Array:
        """[batch, height, width, channels] -> logits [batch, classes]."""
        for conv, pools in zip(self.convs, self.pools, strict=True):
            x = jax.nn.relu(conv(x))
            x = _pool(x) if pools else x
        x = jax.nn.relu(self.fc1(x.reshape(x.shape[0], -1)))
        return self.out(jax.nn.relu(self.fc2(x)))


def _conv(inputs: int, outputs: int, size: int, stride: int, rngs: nnx.Rngs, dtype: Any) -> nnx.Conv:
    """A convolution without bias, to use before BatchNorm, with the initial weights of He et al."""
    init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=False,
        kernel_init=init,
        rngs=rngs,
        dtype=dtype,
    )


def _pool(x: Array) -> Array:
    return nnx.max_pool(x, (2, 2), (2, 2))
