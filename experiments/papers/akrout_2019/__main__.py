"""Akrout, Wilson, Humphreys, Lillicrap and Tweed (2019): feedback weights that learn without weight transport.

    python -m experiments.papers.akrout_2019 --list
    python -m experiments.papers.akrout_2019 --data_dir=FOLDER    # FOLDER has mnist.npz
    python -m experiments.papers.akrout_2019 --report

The networks of the paper (ResNets on ImageNet) are out of reach here. The numbers beside ours are from the logs that
the authors published with their program (github.com/makrout/Deep-Learning-without-Weight-Transport): one seed of
784-500-10 on MNIST, after the 20th of 400 epochs. They are no numbers of the paper, of which we had no copy.

The settings are those of the program: sigmoids, cross-entropy of ten independent outputs, batches of 128, SGD without
momentum, normal weights of variance 1 / (fan-in + fan-out) forward and backward, and a rate of 0.2 (0.3 for KP).

We differ in these points. Our examples come in a new order in each epoch. Our biases begin at 0, and have the rate of
the weights (in the program it is 128 times smaller). The mirrors of the program get uniform noise between -0.05 and
0.05 and the outputs of the sigmoids, and their feedback weights grow, since nothing makes them decay. Ours get noise of
variance 1 and what the weights make of it, and decay towards the forward weights: rate 0.01, decay 1, one epoch of the
phase before the training, and a step of it in each step. The row WM has the program's rate for it, 0.05; beyond the
authors' rows, WM has the rate of BP, too.

Time: an epoch takes two seconds for each seed on one core.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import lrules
from experiments import cli, tasks
from experiments.config import Config
from experiments.data import Dataset
from experiments.papers import cells, program
from experiments.papers.cells import Cell, Job, Shown, Table
from experiments.trial import Trial

Array = jax.Array
CONFIG = Config(
    dataset="mnist",
    widths=(500,),
    activation="sigmoid",
    batch_size=128,
    optimizer="sgd",
    learning_rate=0.2,
    schedule="constant",
    epochs=20,
    seeds=3,
    probe=0,
)
DRAW = "variance_scaling(0.5, 'fan_avg', 'normal')"
MIRROR: dict[str, Any] = {"feedback_learning_rate": 0.01, "warmup_epochs": 1}
ESTIMATION = {"feedback_learning_rate": 0.1, "warmup_epochs": 1}
TOP = "out/kernel"  # the only weight whose feedback weight is used


class Network(nnx.Module):
    """One hidden layer of sigmoids, and the inputs of ten sigmoids."""

    def __init__(self, inputs: int, hidden: int, outputs: int, *, rngs: nnx.Rngs):
        draw = nnx.initializers.variance_scaling(0.5, "fan_avg", "normal")
        self.hidden = nnx.Linear(inputs, hidden, kernel_init=draw, rngs=rngs)
        self.out = nnx.Linear(hidden, outputs, kernel_init=draw, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[batch, ...] -> logits [batch, outputs]."""
        return self.out(nnx.sigmoid(self.hidden(x.reshape(len(x), -1))))


def loss(logits: Array, labels: Array) -> Array:
    """The cross-entropies of independent outputs, summed: [batch]."""
    return optax.sigmoid_binary_cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1])).sum(-1)


def task(config: Config, dataset: Dataset) -> tasks.Task:
    """The network of a config with its loss."""
    sizes = int(np.prod(dataset.shape)), config.widths[0], dataset.classes
    return tasks.task(lambda rngs: Network(*sizes, rngs=rngs), loss)


def measure(job: Job) -> Mapping[str, Any] | None:
    """Trains the network of a cell; afterwards, the angle between the last weight and its feedback weight."""
    dataset = job.dataset(job.config)
    trial = Trial(job.config, dataset, task=task(job.config, dataset))
    found = cells.trained(job, trial)
    if found is None:
        return None
    carry = trial.carry(0)
    compared = jax.vmap(lrules.diagnostics.weight_alignment)(carry.feedback, carry.params)
    return {**found, **({"angle": {"by_seed": np.asarray(compared[TOP].angle)}} if compared else {})}


# The rule, what differs in its config, and the numbers of the authors' logs: accuracy, and angle of the last weight.
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
    "BP": ("bp", {}, {"accuracy": 96.23}),
    "FA": (f"fa(init={DRAW})", {}, {"accuracy": 92.25, "angle": 31.2}),
    "WM": (f"wm(init={DRAW})", MIRROR | {"learning_rate": 0.05}, {"accuracy": 92.62, "angle": 18.7}),
    "KP": (f"kp(init={DRAW})", {"learning_rate": 0.3}, {"accuracy": 97.00, "angle": 8.7}),
    "WM, rate of BP": (f"wm(init={DRAW})", MIRROR, {}),
    "WM, estimation": (f"wm(init={DRAW}, std=0.3, phase='estimation')", ESTIMATION, {}),
    "Sign symmetry": ("usf", {}, {}),
}
TABLE = Table(
    "784-500-10 on MNIST after 20 epochs: test accuracy (%), and the angle between the last weight and its feedback "
    "weight (°)",
    [
        Cell(
            name,
            "",
            CONFIG.replace(rule=rule, **changes),
            {figure: (number, None) for figure, number in numbers.items()},
            minutes=0.7,
            measure=measure,
            beyond=not numbers,
        )
        for name, (rule, changes, numbers) in ROWS.items()
    ],
    shown=(Shown(label="accuracy (%)"), Shown("angle", "angle (°)", 1, 1)),
    notes="""The column *paper* has the logs of the authors' program after 20 of 400 epochs, of one seed, so their
spread is not known. BP and sign symmetry have no feedback weights. WM has the program's rate for it, a quarter of BP's:
after 20 epochs it is where our BP is after 5 (92.2). With the rate of BP it is where BP is. KP has a larger rate than
BP. Our feedback weights decay, those of the program's mirrors do not, so the two angles of WM belong to two different
rules. Accuracies of FA and WM differ by 0.3 points from the logs, perhaps because of the order of the examples and the
biases. At the end of the logs, after 400 epochs, BP has 98.50, FA 97.80 (40.0°), WM 98.49 (3.8°), KP 98.45 (3.6°).""",
)

HEADING = "Akrout, Wilson, Humphreys, Lillicrap and Tweed (2019): deep learning without weight transport"
TABLES = {"table on mnist": TABLE}
HOME = pathlib.Path(__file__).parent / "results"

if __name__ == "__main__":
    program.define_flags()
    cli.run(lambda: program.main(TABLES, HOME, HEADING))
