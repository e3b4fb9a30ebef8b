"""What section 4.1 and appendix B say of every network, and the grids that choose batch sizes and learning rates.

The paper's settings: SGD without momentum and weight decay, the rate times 0.1 half-way, the epoch with the best
validation accuracy, random crops of MNIST, flips, rotations, shifts and colours of CIFAR, normalised inputs, batch
sizes of 64 to 512 and rates of 0.002 to 0.25. The rate plays BackMAN's alpha, so that the rule has the alpha 1.

Whose norm is alpha? Equation 4 says: that of each neuron's update. But then the paper's rates are far too large for its
MLP. At 0.05 and a batch of 64 the loss is 2 million after 40 steps, where Table 5 has 99.1%. At 0.002 and a batch of
128 the network reaches 90% in 100 steps, and the paper's in 25 epochs, 47 times as many steps at this rate. Appendix D
says that the weight gradients that PyTorch gets have the norm 1. If that is the gradient of a whole layer, which its n
neurons share equally, each has alpha / sqrt(n): 1/45 for 2,000. So we read it (`backman`): the loss falls at 0.05, and
is restless at 0.25, where the paper's net fails. It is no proof: at 0.002, and with PyTorch's smaller initial weights,
ours has 73% after 500 steps of 128, and the paper 75.5% after 2,300 of 256. A row beyond the paper has the other
reading.

Ours, where the paper is silent: a fifth of the training images is held out (MNIST has 60,000, of which the paper counts
50,000); crops of MNIST have a margin of one pixel; `experiments/augment.py` has the sizes of the changes of CIFAR.
CIFAR-100 has the augmentation, the batch sizes and the rates of CIFAR-10.

    python -m experiments.papers.soltani_moakhar --table=5 --data_dir=FOLDER    # a GPU: 8 minutes; two cores: two days
    python -m experiments.papers.soltani_moakhar --section=4.1 --cells=LeNet --epochs=10 --data_dir=FOLDER

Each cell has one batch size, and trains the four rates at once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments import expressions, plots, tasks
from experiments.config import Config
from experiments.papers import cells
from experiments.papers.cells import Cell, Found, Job, Number, Shown, Table

MLP = Config(
    dataset="mnist",
    validation=0.2,
    normalisation="mnist",
    augmentation="backman_mnist",
    model="mlp",
    widths=(2000,) * 4,
    activation="relu",
    optimizer="sgd",
    schedule="halfway",
    epochs=100,
    seeds=5,
    select="best_validation",
    probe=0,
)
LENET = MLP.replace(
    dataset="cifar10", normalisation="cifar10", augmentation="backman_cifar10", model="lenet5", widths=Config().widths
)
RESNET = LENET.replace(model="resnet18")
CIFAR100 = RESNET.replace(dataset="cifar100", normalisation="cifar100")

EBP, DFA, FA, BACKMAN = "Error-backpropagation", "Direct feedback alignment", "Feedback alignment", "BackMAN"
PER_NEURON, UNIFORM = "BackMAN, alpha per neuron", "BackMAN, PyTorch's initial weights"
RULES = {EBP: "backprop", DFA: "direct_feedback_alignment", FA: "feedback_alignment", PER_NEURON: "backman"}


def backman(config: Config) -> str:
    """BackMAN where the update of each layer has the norm 1: a neuron of n has alpha = 1 / sqrt(n)."""
    classes = 100 if config.dataset == "cifar100" else 10
    name, _, options = expressions.single(config.model, "model")
    if name == "mlp":
        neurons = {f"layers.{len(config.widths)}": classes, ".*": config.widths[0]}
    elif name == "lenet5":
        neurons = {"conv1": 6, "conv2": 16, "fc1": 120, "fc2": 84, "out": classes}
    elif name == "resnet18":
        neurons = {"stem": 64, "blocks.[01]": 64, "blocks.[23]": 128, "blocks.[45]": 256, "blocks.[67]": 512}
        neurons["out"] = classes
    else:
        neurons = {"stem": 64, "out": classes}
        stages = [(64, range(3)), (128, range(3, 7)), (256, range(7, 13)), (512, range(13, 16))]
        for middle, blocks in stages:
            of_stage = "|".join(str(block) for block in blocks if block < options["blocks"])
            if of_stage:
                neurons[f"blocks.({of_stage})[^0-9].*conv[12]"] = middle
                neurons[f"blocks.({of_stage})[^0-9]"] = 4 * middle
    return f"backman(alpha={ {name: round(count**-0.5, 6) for name, count in neurons.items()} })"


def rule(row: str, config: Config) -> str:
    """The rule of a row for the network of a config."""
    return backman(config) if row in (BACKMAN, UNIFORM) else RULES[row]


BATCHES = (64, 128, 256, 512, 1024)
RATES = (0.002, 0.01, 0.05, 0.25)
GRID = "learning_rate=" + ",".join(map(str, RATES))


def rates(job: Job, *, task: tasks.Task | None = None) -> Mapping[str, Any] | None:
    """Trains with each rate of the grid, and has the best validation accuracy of each as a figure."""
    found = cells.measure(job, task=task)
    if found is None:
        return None
    figures = {
        f"{point['settings']['learning_rate']:g}": point["selected"]["validation_accuracy"] for point in found["points"]
    }
    tests = {f"test {rate}": p["selected"]["accuracy"] for rate, p in zip(figures, found["points"], strict=True)}
    kept = {name: found[name] for name in ("chosen", "at_edge", "epochs", "step_seconds", "compile_seconds")}
    return figures | tests | kept


def from_uniform(job: Job) -> Mapping[str, Any] | None:
    """As `rates`; the initial weights and biases are those of PyTorch, uniform within 1 / sqrt(inputs)."""
    task = tasks.build(job.config, job.dataset(job.config))

    def init(key: jax.Array) -> tuple[Any, Any]:
        params, state = task.init(key)
        for i, layer in params["layers"].items():
            bound = layer["kernel"].shape[0] ** -0.5
            for k, name in enumerate(("kernel", "bias")):
                own = jax.random.fold_in(key, 2 * i + k + 1)
                layer[name][...] = jax.random.uniform(own, layer[name].shape, minval=-bound, maxval=bound)
        return params, state

    return rates(job, task=task._replace(init=init))


def grid(network: str, config: Config, row: str, batch: int, paper: tuple[float, ...] = (), **options: Any) -> Cell:
    """A cell of one rule and one batch size, with a figure for each rate."""
    options.setdefault("measure", rates)
    own = config.replace(rule=rule(row, config), batch_size=batch, epochs=25, seeds=1)
    numbers: dict[str, Number] = {f"{rate:g}": (value, None) for rate, value in zip(RATES, paper, strict=False)}
    name = f"{network}{row}, batch {batch}"
    return Cell(name, "", own, numbers, sweep=[GRID], **options)


def by_rate(found: Sequence[Found], label: str) -> Figure:
    """The accuracy of each cell by rate, ours with points and the paper's without."""
    made = Figure(figsize=(8, 4.4), dpi=130, layout="constrained")
    axis = made.subplots()
    for each, style in zip(found, plots.styles(), strict=False):
        means = [100 * np.asarray(each.values(figure.name)).mean() for figure in SHOWN]
        axis.plot(RATES, means, marker="o", mfc="none" if each.less else None, label=each.cell.name, **style)
        if each.cell.paper:
            paper = [each.cell.paper[figure.name][0] for figure in SHOWN]
            axis.plot(RATES, paper, alpha=0.35, linewidth=4, **style)
    plots.logarithmic(axis, "x")
    axis.set(xlabel="learning rate (wide and pale: the paper; hollow: reduced)", ylabel=label)
    axis.set_xticks(RATES)
    axis.grid(alpha=0.3)
    made.legend(loc="outside right upper", frameon=False, fontsize="small")
    return made


SHOWN = [Shown(f"{rate:g}", f"rate {rate:g}", digits=1) for rate in RATES]

# Table 5: for each batch size the accuracies at the four rates.
TABLE_5_NUMBERS = {
    EBP: (
        (98.5, 98.8, 99.2, 99.2),
        (98.0, 98.9, 99.2, 99.3),
        (96.6, 98.6, 98.9, 99.1),
        (93.8, 98.3, 98.9, 99.1),
        (90.0, 97.1, 98.6, 98.4),
    ),
    BACKMAN: (
        (93.9, 98.5, 99.1, 0.1),
        (90.1, 97.1, 98.8, 98.3),
        (75.5, 95.2, 98.1, 98.7),
        (57.8, 91.2, 97.4, 98.7),
        (52.0, 78.2, 96.4, 98.4),
    ),
}

TABLE_5 = Table(
    "Best validation accuracy (%) on MNIST in 25 epochs, by batch size and learning rate",
    [
        *(
            grid("", MLP, row, batch, paper, minutes=85, gpu_minutes=0.4)
            for row, numbers in TABLE_5_NUMBERS.items()
            for batch, paper in zip(BATCHES, numbers, strict=True)
        ),
        *(
            grid("", MLP, row, batch, beyond=True, minutes=85, gpu_minutes=0.4)
            for row in (DFA, FA)
            for batch in BATCHES[:4]
        ),
        grid("", MLP, PER_NEURON, 64, beyond=True, minutes=85, gpu_minutes=0.4),
        grid("", MLP, UNIFORM, 1024, beyond=True, minutes=85, gpu_minutes=0.4, measure=from_uniform),
    ],
    SHOWN,
    notes="The paper does not say on which images it measured, nor for how many seeds. Its best number, 99.3, is "
    "above the 99.10 of its Table 1, with a quarter of the epochs: we take it for validation accuracy. Its 0.1 "
    "at the largest rate and the smallest batch must be a network that does not learn: 10%, as a fraction. "
    "BackMAN has alpha 1 / sqrt(n) for each of the n neurons of a layer, as in Table 1. With batches of 1024 it "
    "reaches at the rates 0.01 and 0.05 what the paper has at rates five times as large. PyTorch's initial weights, "
    "which are smaller than ours, explain little of it: at the smallest rate 83.3 in the place of 90.1, where the "
    "paper has 52.0. And backpropagation, which has no alpha, learns at small rates slower here than in the paper; "
    "with smaller weights we expect it to be slower still. So the paper's updates of BackMAN are probably smaller "
    "than in our reading of alpha.",
    plot=lambda found: by_rate(found, "best validation accuracy (%)"),
)

SECTION_4_1 = Table(
    "The grids of LeNet-5 and ResNet-18 on CIFAR-10: best validation accuracy (%) in 25 epochs",
    [
        grid(f"{network}, ", config, row, batch, minutes=minutes, gpu_minutes=gpu)
        for network, config, minutes, gpu in (("LeNet-5", LENET, 60, 0.8), ("ResNet-18", RESNET, 6000, 10))
        for row in (EBP, DFA, FA, BACKMAN)
        for batch in BATCHES[:4]
    ],
    SHOWN,
    notes="The paper has the grid and not its numbers.",
    plot=lambda found: by_rate(found, "best validation accuracy (%)"),
)
