"""Whittington and Bogacz (2017): predictive coding beside backpropagation.

    python -m experiments.papers.whittington_2017 --list
    python -m experiments.papers.whittington_2017 --data_dir=FOLDER    # FOLDER has mnist.npz
    python -m experiments.papers.whittington_2017 --report

We had no copy of the paper, so no numbers of the paper stand beside ours.

The network, 784-600-600-10 with sigmoids, and the 20 steps of the states are those that others report of the paper. The
rest is from the authors' program (github.com/djcrw/Supervised-Predictive-Coding): linear outputs, half the squared
error, states that are the pre-activations and move by steps of 0.1, batches of 20 images, Adam with the rate 1e-3, and
the first weights (uniform, four times those of Glorot). The program itself has 784-500-500-10 and at most 50 steps.

One variance of the outputs is 1, as that of all states; the other is 100, which brings predictive coding closer to
backpropagation. We chose: three epochs on all images in [0, 1], and the targets 0 and 1 (the program has 0.03 and
0.97).

Time: an epoch takes 8 seconds on one core for BP, and 33 for predictive coding.
"""

import pathlib

import jax
import numpy as np
from flax import nnx

from experiments import cli, models, tasks
from experiments.config import Config
from experiments.data import Dataset
from experiments.papers import cells, program
from experiments.papers.cells import Cell, Shown, Table

Array = jax.Array
CONFIG = Config(
    dataset="mnist",
    loss="squared_error",
    widths=(600, 600),
    activation="sigmoid",
    batch_size=20,
    optimizer="adam",
    learning_rate=1e-3,
    schedule="constant",
    epochs=3,
    seeds=2,
    probe=256,
)


def task(config: Config, dataset: Dataset) -> tasks.Task:
    """The network of a config with half the squared error."""
    draw = nnx.initializers.variance_scaling(16.0, "fan_avg", "uniform")
    sizes = int(np.prod(dataset.shape)), *config.widths, dataset.classes
    return tasks.task(lambda rngs: models.MLP(sizes, jax.nn.sigmoid, kernel_init=draw, rngs=rngs), tasks.squared_error)


PC = "predictive_coding(steps=20, step_size=0.1, states='pre_activation'{})"
ROWS = {
    "BP": ("bp", False),
    "PC, output variance 1": (PC.format(""), False),
    "PC, output variance 100": (PC.format(", beta=0.01"), False),
    "PC, fixed predictions": (PC.format(", fixed_predictions=True"), True),
    "DFA": ("dfa", True),
}
TABLE = Table(
    "784-600-600-10 on MNIST after three epochs: test accuracy (%), and angle to the gradient of BP (°)",
    [
        Cell(
            name,
            "",
            CONFIG.replace(rule=rule),
            minutes=1.7 if "coding" in rule else 0.5,
            measure=cells.of_task(task),
            beyond=beyond,
        )
        for name, (rule, beyond) in ROWS.items()
    ],
    shown=(Shown(label="accuracy (%)"), Shown("angle", "angle (°)", 1, 1)),
    notes="""We had no copy of the paper, so there are no numbers of the paper here.

The angle is that of all parameters together, in which the last layer weighs most. With fixed predictions, the error of
a layer is that of BP times one number, since 20 steps of 0.1 do not settle it. Adam divides this number out, so the
accuracies are those of BP.""",
)

HEADING = "Whittington and Bogacz (2017): predictive coding approximates backpropagation"
TABLES = {"table on mnist": TABLE}
HOME = pathlib.Path(__file__).parent / "results"

if __name__ == "__main__":
    program.define_flags()
    cli.run(lambda: program.main(TABLES, HOME, HEADING))
