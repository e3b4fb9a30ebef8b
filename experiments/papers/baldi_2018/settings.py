"""The settings of the paper, section 4.1 for MNIST, and the measure that its cells share."""

import functools

from experiments.config import Config
from experiments.papers import cells

MNIST = Config(
    dataset="mnist",
    widths=(100, 100, 100, 100),
    activation="tanh",
    batch_size=100,
    optimizer="sgd",
    learning_rate=0.1,
    schedule="exponential(factor=0.999999)",
    epochs=100,
    seeds=5,
    probe=0,
)
train = functools.partial(cells.measure, training=True)  # the figures show training accuracy, too
