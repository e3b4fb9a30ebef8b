"""The network of section 4.3 for CIFAR-10, its settings, and what trains it.

Three times a convolution with 64 tanh channels and a kernel of 5x5, and max-pooling of 3x3 with stride 2; then a dense
layer of 1024 tanh units and ten outputs. SGD with momentum 0.9, batches of 128, a rate of 0.01, which each update
multiplies by 1 - 1e-5. Images are translated by up to 10% and flipped.

Where the paper is silent: convolutions and pooling keep the border (SAME: with VALID, the third convolution would have
no room), so the sides are 32, 16, 8, 4. Inputs have mean 0 and sd 1 by channel. A translated image has black borders.
The direct feedback of SRBP arrives at the pooled maps, and passes max-pooling by its true derivative, as the error of
SBP does. For SRBP, sparse-n means that an output reaches n units of all in a pooled map (16,384 in the lowest). For
RBP, a unit has n of the 1,600 weights of a kernel, scaled by 1 / sqrt(n).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments import tasks
from experiments.config import Config
from experiments.papers import cells
from experiments.papers.cells import Job

CIFAR10 = Config(
    dataset="cifar10",
    model="three convolutions",
    activation="tanh",
    augmentation="translate(0.1),flip",
    normalisation="cifar10",
    batch_size=128,
    optimizer="sgd(momentum=0.9)",
    learning_rate=0.01,
    schedule="exponential(factor=0.99999)",
    epochs=100,
    seeds=5,
    probe=0,
)


class ConvNet(nnx.Module):
    """Three convolutions with max-pooling and a dense hidden layer, with weights as Glorot and Bengio scale them."""

    def __init__(self, shape: Sequence[int], classes: int, *, rngs: nnx.Rngs, channels: int = 64, hidden: int = 1024):
        init = nnx.initializers.glorot_normal()
        height, width, inputs = shape
        self.convs = nnx.List(
            [nnx.Conv(n, channels, (5, 5), kernel_init=init, rngs=rngs) for n in (inputs, channels, channels)]
        )
        for _ in self.convs:
            height, width = -(-height // 2), -(-width // 2)
        self.fc = nnx.Linear(height * width * channels, hidden, kernel_init=init, rngs=rngs)
        self.out = nnx.Linear(hidden, classes, kernel_init=init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, height, width, channels] -> logits [batch, classes]."""
        for conv in self.convs:
            x = nnx.max_pool(jnp.tanh(conv(x)), (3, 3), (2, 2), "SAME")
        return self.out(jnp.tanh(self.fc(x.reshape(x.shape[0], -1))))


def make_task(config: Config, shape: Sequence[int], classes: int, **sizes: int) -> tasks.Task:
    """The task of the network; `sizes` are options of `ConvNet`."""
    return tasks.normalised(tasks.task(lambda rngs: ConvNet(shape, classes, rngs=rngs, **sizes)), config.normalisation)


def train(job: Job) -> Mapping[str, Any] | None:
    """Trains the network, and measures the accuracy on the training set, too."""
    dataset = job.dataset(job.config)
    return cells.measure(job, task=make_task(job.config, dataset.shape, dataset.classes), training=True)
