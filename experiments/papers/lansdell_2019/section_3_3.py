"""Section 3.3: a convolutional net on CIFAR-10 with direct feedback, learned or fixed, against backpropagation.

The network is the paper's: convolutions of 3x3 with 32 maps, 5x5 with 128 and 5x5 with 256, each with tanh and a pool
of 3x3 at every second place, then two layers of 2048 and ten outputs. From the authors' code: 200 epochs of batches of
128, Adam with rate 4.8e-6, dropout of one half behind both dense layers, weights uniform within 1 / sqrt(fan-in),
biases 0.1. The rate of the feedback is 8.3e-6 for the sum over a batch; its noise has the standard deviation 0.067.

There the effect of the noise is measured with half the squared error of the softmax, and the network learns from the
error p - y, which would be the gradient of the cross-entropy. So does `loss` here.

We chose: images with mean 0 and variance 1, feedback that is normal at first (Glorot), three seeds. The authors' first
and last feedback weights stay fixed; ours all learn.

    python -m experiments.papers.lansdell_2019 --section=3.3 --epochs=30 --seeds=1

We expect two seconds an epoch on a GPU (NP: four), for each seed. One CPU core took ten minutes (NP: fifteen).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments import tasks
from experiments.config import Config
from experiments.data import scale
from experiments.papers import cells
from experiments.papers.cells import Cell, Job, Table

Array = jax.Array
CONFIG = Config(
    dataset="cifar10",
    loss="softmax_squared_error",
    activation="tanh",
    optimizer="adam",
    learning_rate=4.8e-6,
    feedback_optimizer="sgd",
    feedback_learning_rate=1.06e-3,  # for the mean over 128
    schedule="constant",
    batch_size=128,
    epochs=200,
    seeds=3,
    probe=0,
)
MAPS = ((3, 32), (5, 128), (5, 256))  # size and number of the filters
WIDTH, CLASSES, SHAPE = 2048, 10, (32, 32, 3)
DROPOUT = 0.5


class Network(nnx.Module):
    """Three convolutions with pools, two dense layers with dropout, and the outputs, with tanh between them."""

    def __init__(self, shape: tuple[int, int, int] = SHAPE, width: int = WIDTH, *, rngs: nnx.Rngs):
        height, across, channels = shape
        draw: dict[str, Any] = {
            "kernel_init": nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            "bias_init": nnx.initializers.constant(0.1),
            "rngs": rngs,
        }
        convolutions = []
        for size, maps in MAPS:
            convolutions.append(nnx.Conv(channels, maps, (size, size), **draw))
            channels, height, across = maps, -(-height // 2), -(-across // 2)
        self.convolutions = nnx.List(convolutions)
        self.dense = nnx.List([nnx.Linear(height * across * channels, width, **draw), nnx.Linear(width, width, **draw)])
        self.dropout = nnx.Dropout(DROPOUT, rngs=rngs)
        self.out = nnx.Linear(width, CLASSES, **draw)

    def __call__(self, x: Array) -> Array:
        """[batch, height, width, channels] -> logits [batch, classes]."""
        for convolution in self.convolutions:
            x = nnx.max_pool(jnp.tanh(convolution(x)), (3, 3), (2, 2), "SAME")
        x = x.reshape(len(x), -1)
        for layer in self.dense:
            x = self.dropout(jnp.tanh(layer(x)))
        return self.out(x)


@jax.custom_vjp
def loss(logits: Array, labels: Array) -> Array:
    """Half the squared error of the softmax p [batch]; but its gradient is p - y, that of the cross-entropy."""
    return tasks.softmax_squared_error(logits, labels)


def _gradient(error: Array, arriving: Array) -> tuple[Array, None]:
    return error * arriving[:, None], None


def _forward(logits: Array, labels: Array) -> tuple[Array, Array]:
    return loss(logits, labels), jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1])


loss.defvjp(_forward, _gradient)


def standardised(x: Array) -> Array:
    """Images [batch, height, width, channels] with mean 0 and variance 1, each by itself."""
    x = scale(x)
    axes = tuple(range(1, x.ndim))
    return (x - x.mean(axes, keepdims=True)) / jnp.maximum(x.std(axes, keepdims=True), 1e-2)


def task(shape: tuple[int, int, int] = SHAPE, width: int = WIDTH) -> tasks.Task:
    """The network with its loss; tests have a smaller one."""
    return tasks.task(lambda rngs: Network(shape, width, rngs=rngs), loss)._replace(prepare=standardised)


def measure(job: Job) -> Mapping[str, Any] | None:
    """Trains the network of a cell."""
    return cells.measure(job, task=task())


RULES = {
    "NP": ("node_perturbation(std=0.067, direct=True)", 75.2),
    "DFA": ("dfa", 72.5),
    "BP": ("bp", 77.2),
    "FA": ("fa", None),
}
SECTION_3_3 = Table(
    "Test accuracy (%) of the convolutional net on CIFAR-10 after 200 epochs",
    [
        Cell(
            name,
            "",
            CONFIG.replace(rule=rule),
            {} if number is None else {"accuracy": (number, None)},
            minutes=6000 if name == "NP" else 3000,
            gpu_minutes=35 if name == "NP" else 20,
            measure=measure,
            beyond=number is None,
        )
        for name, (rule, number) in RULES.items()
    ],
    notes="One epoch of 200 shows only that the network begins to learn. The rate is 4.8e-6, and the feedback of NP is "
    "random at first.",
)
