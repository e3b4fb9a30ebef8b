"""The model zoo: small models of every kind that a rule must serve, with what a network must find in them.

Each entry of `ZOO` builds `(net, params, inputs)` and states, written down by hand from the model's own code, the
layers in program order and the number of hidden signals. Layers in the body of a scan stand once, those of a `cond`
branch by branch, the false branch first (as `lax.cond` orders them). Every network has outputs with the batch in front;
`loss` below serves them all. Sizes are small, for compile time, and unlike the batch size, so that no axis is mistaken
for it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from lrules.adapters import from_linen, from_nnx
from lrules.network import Network

BATCH = 4
Layer = tuple[tuple[str, ...], str]


class Entry(NamedTuple):
    """A model and what is to be found in it.

    Args:
      name: the entry's name.
      build: returns `(net, params, inputs)`.
      layers: the expected layers in program order: the names of the parameters that make the weight (sorted), and the
        operation, `"dot_general"`, `"conv_general_dilated"` or `"gather"`.
      hidden: the expected number of hidden signals, or None where direct rules do not apply.
      direct: direct rules and dual propagation serve it; else they refuse it, and sequential rules serve it.
      foreign: the model is another library's, and relies on JAX's ordinary dtype and rank promotion.
    """

    name: str
    build: Callable[[], tuple[Network, Any, Any]]
    layers: tuple[Layer, ...]
    hidden: int | None
    direct: bool = True
    foreign: bool = False


ZOO: dict[str, Entry] = {}


def model(layers: list[Layer], hidden: int | None, direct: bool = True) -> Callable[[Callable], Callable]:
    """Enters the decorated builder into `ZOO`, under its own name, which begins with the library's if it is foreign."""

    def enter(build):
        name = build.__name__
        foreign = name.startswith(("linen_", "nnx_", "equinox_"))
        ZOO[name] = Entry(name, build, tuple(layers), hidden, direct, foreign)
        return build

    return enter


def dot(*names: str) -> Layer:
    return names, "dot_general"


def conv(*names: str) -> Layer:
    return names, "conv_general_dilated"


def gather(*names: str) -> Layer:
    return names, "gather"


def loss(outputs: Any, targets: Any = None) -> jax.Array:
    """Half the squared outputs, summed per example: `[batch]`, in float32. The targets are ignored."""
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(outputs)]
    return sum(0.5 * jnp.sum(jnp.square(leaf).reshape(leaf.shape[0], -1), axis=1) for leaf in leaves)


def data(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (BATCH, *shape))


def weights(**shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Parameters of the named shapes, drawn with variance 1 / fan-in."""
    keys = jax.random.split(jax.random.key(1), len(shapes))
    init = jax.nn.initializers.lecun_normal
    return {
        name: init(in_axis=tuple(range(len(shape) - 1)), out_axis=-1)(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def linen(module: nn.Module, inputs: Any, **options: Any) -> tuple[Network, Any, Any]:
    net, params = from_linen(module, jax.jit(module.init)(jax.random.key(1), inputs), **options)
    return net, params, inputs


# ---------------------------------------------------------------------------------------------------------------- Linen


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6)(x))
        x = nn.tanh(nn.Dense(5)(x))
        return nn.Dense(3)(x)


@model([dot("Dense_0/kernel"), dot("Dense_1/kernel"), dot("Dense_2/kernel")], hidden=2)
def linen_mlp():
    return linen(LinenMLP(), data(7))


class LinenLeNet5(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.avg_pool(nn.tanh(nn.Conv(3, (5, 5))(x)), (2, 2), (2, 2))
        x = nn.avg_pool(nn.tanh(nn.Conv(5, (5, 5), padding="VALID")(x)), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.tanh(nn.Dense(12)(x))
        x = nn.tanh(nn.Dense(11)(x))
        return nn.Dense(10)(x)


@model(
    [conv("Conv_0/kernel"), conv("Conv_1/kernel"), dot("Dense_0/kernel"), dot("Dense_1/kernel"), dot("Dense_2/kernel")],
    hidden=4,
)
def linen_lenet5():
    return linen(LinenLeNet5(), data(12, 12, 1))


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for features in (6, 5):
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False, dtype=jnp.bfloat16)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, dtype=jnp.bfloat16)(x))
        return nn.Dense(3, dtype=jnp.bfloat16)(x.mean((1, 2)))


@model([conv("Conv_0/kernel"), conv("Conv_1/kernel"), dot("Dense_0/kernel")], hidden=2)
def linen_cnn_batchnorm_bfloat16():
    return linen(LinenCNN(), data(7, 7, 3), call=lambda m, x: m(x, train=True))


class LinenBlock(nn.Module):
    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=False)
        y = nn.relu(norm()(nn.Conv(self.features, (3, 3), self.stride, use_bias=False)(x)))
        y = norm()(nn.Conv(self.features, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = norm()(nn.Conv(self.features, (1, 1), self.stride, use_bias=False)(x))
        return nn.relu(x + y)


class LinenResNet18(nn.Module):
    """The CIFAR stem (3x3, no pooling), four stages of two blocks."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(5, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        for stage, features in enumerate((5, 6, 7, 9)):
            for block in range(2):
                x = LinenBlock(features, 2 if stage and not block else 1)(x)
        return nn.Dense(10)(x.mean((1, 2)))


@model(
    [
        conv("Conv_0/kernel"),
        conv("LinenBlock_0/Conv_0/kernel"), conv("LinenBlock_0/Conv_1/kernel"),
        conv("LinenBlock_1/Conv_0/kernel"), conv("LinenBlock_1/Conv_1/kernel"),
        conv("LinenBlock_2/Conv_0/kernel"), conv("LinenBlock_2/Conv_1/kernel"), conv("LinenBlock_2/Conv_2/kernel"),
        conv("LinenBlock_3/Conv_0/kernel"), conv("LinenBlock_3/Conv_1/kernel"),
        conv("LinenBlock_4/Conv_0/kernel"), conv("LinenBlock_4/Conv_1/kernel"), conv("LinenBlock_4/Conv_2/kernel"),
        conv("LinenBlock_5/Conv_0/kernel"), conv("LinenBlock_5/Conv_1/kernel"),
        conv("LinenBlock_6/Conv_0/kernel"), conv("LinenBlock_6/Conv_1/kernel"), conv("LinenBlock_6/Conv_2/kernel"),
        conv("LinenBlock_7/Conv_0/kernel"), conv("LinenBlock_7/Conv_1/kernel"),
        dot("Dense_0/kernel"),
    ],
    hidden=17,  # each block's input (its projection reads it too), each block's middle, the pooled features
)  # fmt: skip
def linen_resnet18():
    return linen(LinenResNet18(), data(16, 16, 3))


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(10)(nn.LayerNorm()(x)))
        x = x + nn.Dense(6)(y)
        return nn.Dense(3)(x.mean(1))


@model(
    [
        dot("Dense_0/kernel"),
        dot("MultiHeadDotProductAttention_0/query/kernel"),
        dot("MultiHeadDotProductAttention_0/key/kernel"),
        dot("MultiHeadDotProductAttention_0/value/kernel"),
        dot("MultiHeadDotProductAttention_0/out/kernel"),
        dot("Dense_1/kernel"),
        dot("Dense_2/kernel"),
        dot("Dense_3/kernel"),
    ],
    hidden=5,  # what q, k and v read; the attended values; the second norm; gelu; the mean over time
)
def linen_attention():
    return linen(LinenAttention(), data(5, 7))


class LinenRecurrent(nn.Module):
    cell: type

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(self.cell(5, name="cell"))(x)
        return nn.Dense(3, name="head")(x[:, -1])


@model(
    [
        dot("cell/ii/kernel"), dot("cell/hi/kernel"), dot("cell/if/kernel"), dot("cell/hf/kernel"),
        dot("cell/ig/kernel"), dot("cell/hg/kernel"), dot("cell/io/kernel"), dot("cell/ho/kernel"),
        dot("head/kernel"),
    ],
    hidden=2,  # the carried state, which all four gates read, and the last output
)  # fmt: skip
def linen_lstm():
    return linen(LinenRecurrent(nn.LSTMCell), data(6, 7))


@model(
    [
        dot("cell/ir/kernel"), dot("cell/hr/kernel"), dot("cell/iz/kernel"), dot("cell/hz/kernel"),
        dot("cell/in/kernel"), dot("cell/hn/kernel"),
        dot("head/kernel"),
    ],
    hidden=2,
)  # fmt: skip
def linen_gru():
    return linen(LinenRecurrent(nn.GRUCell), data(6, 7))


class LinenResidual(nn.Module):
    """One residual layer, in the form that nn.scan asks for."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.relu(nn.Dense(7, name="up")(x))
        return x + nn.Dense(6, name="down")(y), None


class LinenStack(nn.Module):
    """A first layer, three residual ones and a last one, the residual ones under a lifted transform."""

    lift: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="first")(x)
        block = LinenResidual
        if self.lift in ("remat", "scan_remat"):
            block = nn.remat(block)
        if self.lift in ("scan", "scan_remat"):
            block = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = block(name="blocks")(x, None)
        else:
            block = nn.jit(block) if self.lift == "jit" else block
            for i in range(3):
                x, _ = block(name=f"block{i}")(x)
        return nn.Dense(3, name="last")(nn.tanh(x))


SCANNED = [dot("first/kernel"), dot("blocks/up/kernel"), dot("blocks/down/kernel"), dot("last/kernel")]
UNROLLED = [
    dot("first/kernel"),
    dot("block0/up/kernel"), dot("block0/down/kernel"),
    dot("block1/up/kernel"), dot("block1/down/kernel"),
    dot("block2/up/kernel"), dot("block2/down/kernel"),
    dot("last/kernel"),
]  # fmt: skip


@model(SCANNED, hidden=3)  # in the body the carry and relu; after it tanh
def linen_scan():
    return linen(LinenStack("scan"), data(5))


@model(SCANNED, hidden=3)
def linen_scan_remat():
    return linen(LinenStack("scan_remat"), data(5))


@model(UNROLLED, hidden=7)
def linen_remat():
    return linen(LinenStack("remat"), data(5))


@model(UNROLLED, hidden=7)
def linen_jit():
    return linen(LinenStack("jit"), data(5))


# ------------------------------------------------------------------------------------------------------------------ NNX


class NNXMLP(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(7, 6, rngs=rngs), nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


@model([dot("layers/0/kernel"), dot("layers/1/kernel"), dot("layers/2/kernel")], hidden=2)
def nnx_mlp():
    return *from_nnx(NNXMLP(nnx.Rngs(0))), data(7)


class NNXLeNet5(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 3, (5, 5), rngs=rngs)
        self.conv2 = nnx.Conv(3, 5, (5, 5), padding="VALID", rngs=rngs)
        self.dense1 = nnx.Linear(5, 12, rngs=rngs)
        self.dense2 = nnx.Linear(12, 11, rngs=rngs)
        self.dense3 = nnx.Linear(11, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), (2, 2))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        x = nnx.relu(self.dense1(x.reshape(x.shape[0], -1)))
        return self.dense3(nnx.relu(self.dense2(x)))


@model(
    [conv("conv1/kernel"), conv("conv2/kernel"), dot("dense1/kernel"), dot("dense2/kernel"), dot("dense3/kernel")],
    hidden=4,
)
def nnx_lenet5():
    return *from_nnx(NNXLeNet5(nnx.Rngs(0))), data(12, 12, 1)


class NNXBlock(nnx.Module):
    def __init__(self, inputs, features, stride, rngs):
        self.conv1 = nnx.Conv(inputs, features, (3, 3), stride, use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(features, rngs=rngs)
        self.conv2 = nnx.Conv(features, features, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(features, rngs=rngs)
        self.shortcut = (
            nnx.Conv(inputs, features, (1, 1), stride, use_bias=False, rngs=rngs) if inputs != features else None
        )

    def __call__(self, x):
        skip = x if self.shortcut is None else self.shortcut(x)
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(skip + self.norm2(self.conv2(y)))


class NNXResNet(nnx.Module):
    """A stem and three blocks: one whose shapes stay, two with a shortcut."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 5, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        widths = (5, 5, 6, 7)
        self.blocks = nnx.List([
            NNXBlock(a, b, 1 if a == b else 2, rngs) for a, b in zip(widths, widths[1:], strict=False)
        ])  # fmt: skip
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(7, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x.mean((1, 2))))


@model(
    [
        conv("stem/kernel"),
        conv("blocks/0/conv1/kernel"), conv("blocks/0/conv2/kernel"),
        conv("blocks/1/shortcut/kernel"), conv("blocks/1/conv1/kernel"), conv("blocks/1/conv2/kernel"),
        conv("blocks/2/shortcut/kernel"), conv("blocks/2/conv1/kernel"), conv("blocks/2/conv2/kernel"),
        dot("head/kernel"),
    ],
    hidden=7,
)  # fmt: skip
def nnx_resnet_with_state():
    """BatchNorm and Dropout in training mode, their state let in and out: the network has aux."""
    net, params, state = from_nnx(NNXResNet(nnx.Rngs(0)), with_state=True)
    return net, params, (state, data(16, 16, 3))


class NNXEinsum(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(7, 6, rngs=rngs)
        self.split = nnx.Einsum("btd,dhk->bthk", (6, 2, 3), (2, 3), rngs=rngs)
        self.join = nnx.Einsum("bthk,hkd->btd", (2, 3, 5), (5,), rngs=rngs)

    def __call__(self, x):
        return self.join(nnx.tanh(self.split(nnx.tanh(self.first(x)))))


@model([dot("first/kernel"), dot("split/kernel"), dot("join/kernel")], hidden=2)
def nnx_einsum():
    return *from_nnx(NNXEinsum(nnx.Rngs(0))), data(3, 7)


class NNXResidual(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(6, 7, rngs=rngs)
        self.down = nnx.Linear(7, 6, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class NNXStack(nnx.Module):
    """As LinenStack: the scanned blocks are one module with stacked parameters, made by a vmapped constructor."""

    def __init__(self, lift, rngs):
        self.lift = lift
        self.first = nnx.Linear(5, 6, rngs=rngs)
        if lift == "remat":
            self.blocks = nnx.List([NNXResidual(rngs) for _ in range(3)])
        else:
            self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(NNXResidual))(rngs)
        self.last = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        def one(x, block):
            return block(x)

        one = one if self.lift == "scan" else nnx.remat(one)
        x = self.first(x)
        if self.lift == "remat":
            for block in self.blocks:
                x = one(x, block)
        else:
            x = nnx.scan(one, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        return self.last(nnx.tanh(x))


@model(SCANNED, hidden=3)
def nnx_scan():
    return *from_nnx(NNXStack("scan", nnx.Rngs(0))), data(5)


@model(SCANNED, hidden=3)
def nnx_scan_remat():
    return *from_nnx(NNXStack("scan_remat", nnx.Rngs(0))), data(5)


@model(
    [
        dot("first/kernel"),
        dot("blocks/0/up/kernel"), dot("blocks/0/down/kernel"),
        dot("blocks/1/up/kernel"), dot("blocks/1/down/kernel"),
        dot("blocks/2/up/kernel"), dot("blocks/2/down/kernel"),
        dot("last/kernel"),
    ],
    hidden=7,
)  # fmt: skip
def nnx_remat():
    return *from_nnx(NNXStack("remat", nnx.Rngs(0))), data(5)


class NNXTransformerBlock(nnx.Module):
    def __init__(self, dtype, rngs):
        self.norm1 = nnx.LayerNorm(6, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, dtype=dtype, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(6, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(6, 10, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(10, 6, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class NNXTransformer(nnx.Module):
    """A language model of two pre-norm blocks. The positions' embedding meets no data: it is no layer."""

    def __init__(self, dtype, rngs):
        self.embed = nnx.Embed(11, 6, dtype=dtype, rngs=rngs)
        self.position = nnx.Embed(5, 6, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([NNXTransformerBlock(dtype, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(6, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(6, 11, dtype=dtype, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


TRANSFORMER = [
    gather("embed/embedding"),
    dot("blocks/0/attention/query/kernel"), dot("blocks/0/attention/key/kernel"),
    dot("blocks/0/attention/value/kernel"), dot("blocks/0/attention/out/kernel"),
    dot("blocks/0/up/kernel"), dot("blocks/0/down/kernel"),
    dot("blocks/1/attention/query/kernel"), dot("blocks/1/attention/key/kernel"),
    dot("blocks/1/attention/value/kernel"), dot("blocks/1/attention/out/kernel"),
    dot("blocks/1/up/kernel"), dot("blocks/1/down/kernel"),
    dot("head/kernel"),
]  # fmt: skip


def _transformer(dtype):
    tokens = jax.random.randint(jax.random.key(0), (BATCH, 5), 0, 11)
    return *from_nnx(NNXTransformer(dtype, nnx.Rngs(0))), tokens


@model(TRANSFORMER, hidden=9)  # four a block (q, k and v read one), and the last norm
def nnx_transformer():
    return _transformer(jnp.float32)


@model(TRANSFORMER, hidden=9)
def nnx_transformer_bfloat16():
    return _transformer(jnp.bfloat16)


# -------------------------------------------------------------------------------------------------------------- Equinox


def _equinox(module, inputs):
    params, static = eqx.partition(module, eqx.is_inexact_array)
    return Network(lambda params, x: jax.vmap(eqx.combine(params, static))(x)), params, inputs


@model([dot("layers/0/weight"), dot("layers/1/weight"), dot("layers/2/weight")], hidden=2)
def equinox_mlp():
    return _equinox(eqx.nn.MLP(7, 3, width_size=6, depth=2, key=jax.random.key(0)), data(7))


@model([conv("layers/0/weight"), conv("layers/3/weight"), dot("layers/6/weight")], hidden=2)
def equinox_cnn():
    keys = jax.random.split(jax.random.key(0), 3)
    layers = [
        eqx.nn.Conv2d(1, 3, 3, key=keys[0]), eqx.nn.Lambda(jax.nn.relu), eqx.nn.MaxPool2d(2, 2),
        eqx.nn.Conv2d(3, 5, 3, key=keys[1]), eqx.nn.Lambda(jax.nn.relu), eqx.nn.Lambda(jnp.ravel),
        eqx.nn.Linear(45, 6, key=keys[2]),
    ]  # fmt: skip
    return _equinox(eqx.nn.Sequential(layers), data(1, 12, 12))


# ------------------------------------------------------------------------------------------------------- bare functions


@model([dot("w0"), dot("w1"), dot("w2")], hidden=2)
def einsum():
    def apply(p, x):
        h = jnp.tanh(jnp.einsum("bti,io->bto", x, p["w0"]))
        h = jnp.tanh(jnp.einsum("hoc,bto->btch", p["w1"], h))  # the weight first
        return jnp.einsum("btch,tchk->bk", h, p["w2"])

    return Network(apply), weights(w0=(7, 6), w1=(2, 6, 3), w2=(5, 3, 2, 10)), data(5, 7)


def _convolutional(second, spatial=2, operation=lax.conv_general_dilated, **options):
    """A 3x3 convolution, relu, the convolution in question with kernel shape `second`, tanh, mean, a dense layer."""
    axes = "DHW"[-spatial:]
    numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")

    def apply(p, x):
        h = lax.conv_general_dilated(x, p["first"], (1,) * spatial, "SAME", dimension_numbers=numbers)
        h = operation(jax.nn.relu(h), p["second"], padding="SAME", dimension_numbers=numbers, **options)
        return jnp.tanh(h).mean(range(1, spatial + 1)) @ p["last"]

    params = weights(first=(3,) * spatial + (2, 6), second=second, last=(second[-1], 3))
    return Network(apply), params, data(*(7,) * spatial, 2)


CONVOLUTIONAL = [conv("first"), conv("second"), dot("last")]


@model(CONVOLUTIONAL, hidden=2)
def conv_grouped():
    return _convolutional((3, 3, 3, 10), window_strides=(1, 1), feature_group_count=2)


@model(CONVOLUTIONAL, hidden=2)
def conv_depthwise():
    return _convolutional((3, 3, 1, 12), window_strides=(1, 1), feature_group_count=6)


@model(CONVOLUTIONAL, hidden=2)
def conv_strided():
    return _convolutional((3, 3, 6, 5), window_strides=(2, 3))


@model(CONVOLUTIONAL, hidden=2)
def conv_dilated():
    return _convolutional((3, 3, 6, 5), window_strides=(1, 1), rhs_dilation=(2, 2))


@model(CONVOLUTIONAL, hidden=2)
def conv_transposed():
    return _convolutional((3, 3, 6, 5), operation=lax.conv_transpose, strides=(2, 2))


@model(CONVOLUTIONAL, hidden=2)
def conv_1d():
    return _convolutional((3, 6, 5), spatial=1, window_strides=(2,))


@model(CONVOLUTIONAL, hidden=2)
def conv_3d():
    return _convolutional((3, 3, 3, 6, 5), spatial=3, window_strides=(1, 2, 2))


@model([dot("w"), dot("w")], hidden=1)
def tied_autoencoder():
    return Network(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T), weights(w=(7, 5)), data(7)


@model([gather("embedding"), dot("w"), dot("embedding")], hidden=2)
def tied_embedding():
    """The output layer reads with the transposed embedding."""

    def apply(p, tokens):
        h = jnp.tanh(p["embedding"][tokens] @ p["w"])
        return h @ p["embedding"].T

    tokens = jax.random.randint(jax.random.key(0), (BATCH, 5), 0, 11)
    return Network(apply), weights(embedding=(11, 6), w=(6, 6)), tokens


@model([dot("g0", "v0"), dot("g1", "v1")], hidden=1)
def weight_normalisation():
    def weight(v, g):
        return v * (g / jnp.linalg.norm(v, axis=0))[None]

    def apply(p, x):
        return jnp.tanh(x @ weight(p["v0"], p["g0"])) @ weight(p["v1"], p["g1"])

    params = weights(v0=(7, 6), v1=(6, 3)) | {"g0": jnp.full(6, 1.5), "g1": jnp.ones(3)}
    return Network(apply), params, data(7)


MLP = [dot("w0"), dot("w1"), dot("w2")]


def _mlp(p, x):
    return jnp.tanh(jax.nn.relu(x @ p["w0"] + p["b0"]) @ p["w1"]) @ p["w2"]


def _mlp_params():
    return weights(w0=(7, 6), w1=(6, 5), w2=(5, 3)) | {"b0": jnp.full(6, 0.1)}


@model(MLP, hidden=2)
def vmapped():
    return Network(jax.vmap(_mlp, in_axes=(None, 0))), _mlp_params(), data(7)


@model(MLP, hidden=2)
def vmapped_batch_last():
    """The batch is the last axis of the inputs, and the first of everything else."""
    return Network(jax.vmap(_mlp, in_axes=(None, 1)), batch_axes=1), _mlp_params(), data(7).T


@model(MLP, hidden=2)
def columns():
    """`W @ x`: the weight on the left, and examples as columns."""

    def apply(p, x):
        h = jnp.tanh(p["w0"] @ x.T)
        return (p["w2"] @ jnp.tanh(p["w1"] @ h)).T

    return Network(apply), weights(w0=(6, 7), w1=(5, 6), w2=(3, 5)), data(7)


@model(MLP, hidden=2)
def merged_batch_and_time():
    """The hidden layers see `[batch * time, features]`."""

    def apply(p, x):
        h = jnp.tanh(x.reshape(-1, 7) @ p["w0"])
        h = jnp.tanh(h @ p["w1"]) @ p["w2"]
        return h.reshape(x.shape[0], 3, 10)

    return Network(apply), weights(w0=(7, 6), w1=(6, 5), w2=(5, 10)), data(3, 7)


@model([dot("w0"), dot("left"), dot("right")], hidden=1)
def two_heads():
    """Outputs that are a pytree; both heads read one hidden signal."""

    def apply(p, x):
        h = jnp.tanh(x @ p["w0"])
        return {"left": h @ p["left"], "right": (h @ p["right"]).reshape(-1, 5, 2)}

    return Network(apply), weights(w0=(7, 6), left=(6, 3), right=(6, 10)), data(7)


@model([dot("w0"), dot("false"), dot("true"), dot("w1")], hidden=None, direct=False)
def cond():
    def apply(p, inputs):
        x, flag = inputs
        h = jnp.tanh(x @ p["w0"])
        h = lax.cond(flag, lambda h: jnp.tanh(h @ p["true"]), lambda h: jax.nn.relu(h @ p["false"]), h)
        return h @ p["w1"]

    params = weights(w0=(7, 6), true=(6, 5), false=(6, 5), w1=(5, 3))
    return Network(apply, batch_axes=(0, None)), params, (data(7), jnp.array(True))


@model([dot("first"), dot("stack"), dot("last")], hidden=2)
def fori_loop():
    """Static bounds, so that it is a scan; the weight of each turn is a slice of one parameter."""

    def apply(p, x):
        h = jnp.tanh(x @ p["first"])
        h = lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["stack"][i]), h)
        return h @ p["last"]

    params = weights(first=(7, 6), last=(6, 5)) | {"stack": jnp.stack([jnp.eye(6) * s for s in (0.5, 1.0, 1.5)])}
    return Network(apply), params, data(7)


@model(MLP, hidden=None, direct=False)
def sharded_inside():
    """The hidden layers stand in a shard_map over the host's devices, each with its part of the batch."""
    mesh = jax.sharding.Mesh(jax.devices()[: min(jax.device_count(), BATCH)], ("data",))

    def hidden(p, x):
        return jnp.tanh(jnp.tanh(x @ p["w0"]) @ p["w1"])

    def apply(p, x):
        inner = jax.shard_map(hidden, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
        return inner({name: p[name] for name in ("w0", "w1")}, x) @ p["w2"]

    return Network(apply), weights(w0=(7, 6), w1=(6, 5), w2=(5, 3)), data(7)


def _skip(before):
    def apply(p, x):
        h = jnp.tanh(x @ p["w0"])
        if before:
            skip = 0.5 * h
            y = jnp.tanh(h @ p["w1"])
        else:
            y = jnp.tanh(h @ p["w1"])
            skip = 0.5 * h
        return (skip + y) @ p["w2"]

    return Network(apply), weights(w0=(7, 6), w1=(6, 6), w2=(6, 3)), data(7)


@model(MLP, hidden=2)
def skip_before():
    """The skip connection leaves the hidden signal before the layer that reads it."""
    return _skip(before=True)


@model(MLP, hidden=2)
def skip_after():
    return _skip(before=False)


@model([dot("first"), dot("up"), dot("down"), dot("last")], hidden=3)
def pre_norm():
    """No layer reads the residual stream itself; the norms' scales multiply elementwise and are no layers."""

    def norm(scale, x):
        x = x - x.mean(-1, keepdims=True)
        return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale[None]

    def apply(p, x):
        h = x @ p["first"]
        h = h + jax.nn.gelu(norm(p["scale1"], h) @ p["up"]) @ p["down"]
        return norm(p["scale2"], h) @ p["last"]

    params = weights(first=(7, 6), up=(6, 10), down=(10, 6), last=(6, 3))
    return Network(apply), params | {"scale1": jnp.ones(6), "scale2": jnp.ones(6)}, data(7)


@model([dot("first"), dot("query"), dot("key"), dot("value"), dot("last")], hidden=2)
def attention_bfloat16():
    """q, k and v each cast the hidden signal for themselves: it is one hidden signal."""
    half = jnp.bfloat16

    def apply(p, x):
        h = jnp.tanh(x @ p["first"])
        q, k, v = (h.astype(half) @ p[name].astype(half) for name in ("query", "key", "value"))
        scores = jnp.einsum("bqd,bkd->bqk", q, k, preferred_element_type=jnp.float32)
        attended = jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores).astype(half), v)
        return attended @ p["last"].astype(half)

    return Network(apply), weights(first=(7, 6), query=(6, 10), key=(6, 10), value=(6, 5), last=(5, 3)), data(3, 7)
