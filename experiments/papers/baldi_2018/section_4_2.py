"""Section 4.2 of Baldi, Sadowski and Lu (2018): eight observations on random backpropagation. Does each one hold?

    python -m experiments.papers.baldi_2018 --section=4.2 --seeds=2      # an hour on one core
    python -m experiments.papers.baldi_2018 --section="4.2 on digits"    # under two minutes on two cores

The paper gives no setting here. On MNIST it is that of Table 1, with five seeds and 100 epochs. On digits there are
three seeds, 40 epochs and batches of 25.

An observation consists of a claim, some runs and a criterion, which is applied to means over the seeds. The report has
the verdicts. Some points are not clear in the paper:

- Observation 3: which means? The paper refers to its sparse matrices. With 100 neurons in each layer, the means of
  Table 1 are 0.01 to 0.03 in RBP and 0.01 to 0.08 in SRBP. We take 0.03: `MEAN`. A mean sends down the sum of the
  errors of a layer. With a mean as large as the standard deviation (0.1), this sum grows by a factor of ten from layer
  to layer, and RBP gets worse. A mean has no effect on SRBP, because the errors of softmax outputs add up to zero.
- Observation 4: in "worse than if we fix layers l h", the inequality sign is lost. The sentence before says that the
  updates of a deep layer need the updates of the layers that precede it *in the learning channel*. These are the layers
  above. So, if layer h is fixed, training below it is useless, and it is better to fix those layers too. The criterion
  is therefore for l <= h. There are also runs for l >= h (hidden layers only: the top layer always trains).
- Observation 8: which logistic units? With the usual slope at zero, 1/4, four layers of them learn nothing for a long
  time with any rule, even backpropagation. Here they are logistic(4z), with slope 1 at zero, as tanh has. With the
  rate 0.1, RBP and SRBP with linear units are unstable on MNIST, and SRBP with ReLU learns nothing: the rows beyond the
  paper have the rate 0.02.
"""

import functools
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments import models, results, tasks
from experiments.config import Config
from experiments.papers import cells
from experiments.papers.baldi_2018.settings import MNIST
from experiments.papers.cells import Cell, Found, Job, Shown, Table

BP, TOP, RBP, SRBP = "BP", "top layer only", "RBP", "SRBP"
BASIC = {BP: "bp", TOP: "last_layer_only", RBP: "rbp", SRBP: "srbp"}
TRANSFERS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda z: z,
    "logistic": lambda z: jax.nn.sigmoid(4 * z),
    "ReLU": jax.nn.relu,
}
MEAN = 0.03
LOWER_RATE = 0.02
ALIKE = 0.25  # two accuracies are alike if they differ by at most this part of the gap (BP to top layer only)
ZERO = 0.005  # a training error below this counts as 0%


class Entry(NamedTuple):
    """How one run trains."""

    rule: str
    transfer: str = "tanh"  # or one of TRANSFERS
    frozen: tuple[int, ...] = ()  # layers; the lowest is 1
    rate: float = 0.1


class Accuracy(NamedTuple):
    """The final accuracies, one for each seed: arrays [seeds]."""

    train: np.ndarray
    test: np.ndarray


Accuracies = Mapping[str, Accuracy]


class Observation(NamedTuple):
    """A claim of the paper, the runs that show it, and the criterion for it to hold."""

    claim: str
    runs: list[str]
    criterion: str
    holds: Callable[[Accuracies], bool]

    def measured(self, found: Accuracies) -> bool:
        """Whether there are results of all its runs, and of those that criteria compare with."""
        return {BP, TOP, *self.runs} <= set(found)


# ---------------------------------------------------------------------------------------------------------- the runs


def entries(hidden: int, mean: float = MEAN) -> dict[str, Entry]:
    """Every run by name, for a number of hidden layers. Observations may share runs."""
    rules = BASIC | {
        "RBP, redrawn": "redrawn",
        "RBP, redrawn, forward signs": "redrawn_concordant",
        "SRBP, sign only": "sign_error(srbp)",
        "SRBP, magnitude only": "magnitude_error(srbp)",
        "one random weight a synapse": "weight_by_weight",
    }
    for shape in ("uniform", "normal"):
        shifted = f"shifted({mean:g}, init=glorot_{shape})"
        rules[f"RBP, {shape}, mean {mean:g}"] = f"rbp(init={shifted})"
        rules[f"SRBP, {shape}, mean {mean:g}"] = f"srbp(init={shifted})"
    runs = {name: Entry(rule) for name, rule in rules.items()}
    for h in range(2, hidden + 1):  # for h = 1, "h alone" and "all l <= h" are the same run
        for layers in (range(h, h + 1), range(1, h + 1), range(h, hidden + 1)):
            runs.setdefault(fixing(layers, hidden), Entry("srbp", frozen=tuple(layers)))
    runs |= {f"{name}, {t}": Entry(rule, t) for t in TRANSFERS for name, rule in BASIC.items()}
    for transfer in TRANSFERS:
        runs |= {f"{name}, {lowered(transfer)}": Entry(rule, transfer, rate=LOWER_RATE) for name, rule in BASIC.items()}
    return runs


def lowered(transfer: str) -> str:
    """What the names of the runs with the lower rate end with."""
    return f"{transfer}, rate {LOWER_RATE:g}"


def fixing(layers: range, hidden: int) -> str:
    """The name of the SRBP run with these layers fixed. If all hidden layers are fixed, only the top layer trains."""
    if len(layers) == hidden:
        return TOP
    first, last = layers[0], layers[-1]
    return f"SRBP, layer {first} fixed" if first == last else f"SRBP, layers {first}-{last} fixed"


def freeze(layers: Iterable[int]) -> optax.GradientTransformation:
    """Sets the updates of these layers of an MLP to zero; the lowest layer is 1."""
    names = [f"layers/{n - 1}/" for n in layers]

    def mask(tree: Any) -> Any:
        text = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
        return jax.tree.map_with_path(lambda path, _: any(name in text(path) for name in names), tree)

    return optax.masked(optax.set_to_zero(), mask)


# -------------------------------------------------------------------------------------------------- the observations


def tested(found: Accuracies, name: str) -> float:
    """The mean test accuracy of a run."""
    return float(found[name].test.mean())


def alike(found: Accuracies, a: str, b: str) -> bool:
    """Whether the test accuracies of two runs are alike, relative to the gap between BP and the top layer only."""
    return abs(tested(found, a) - tested(found, b)) <= ALIKE * (tested(found, BP) - tested(found, TOP))


def learns(found: Accuracies, name: str, transfer: str) -> bool:
    """Whether a rule is better than the top layer only and at least half-way to BP, with one transfer function."""
    value, top, bp = (tested(found, f"{run}, {transfer}") for run in (name, TOP, BP))
    return value > top and value >= (top + bp) / 2


def observations(hidden: int, mean: float = MEAN) -> dict[str, Observation]:
    """The eight observations, with the numbers that the paper gives them, and the last one with a lower rate."""
    redrawn, concordant, single = "RBP, redrawn", "RBP, redrawn, forward signs", "one random weight a synapse"
    sign, magnitude = "SRBP, sign only", "SRBP, magnitude only"
    shifted = {f"{rule}, {shape}, mean {mean:g}": rule for rule in (RBP, SRBP) for shape in ("uniform", "normal")}
    above_lowest = range(2, hidden + 1)  # for h = 1, "h alone" and "all l <= h" are the same run
    pairs = [(fixing(range(h, h + 1), hidden), fixing(range(1, h + 1), hidden)) for h in above_lowest]
    others = [fixing(range(h, hidden + 1), hidden) for h in above_lowest]
    fixed = dict.fromkeys([*(name for pair in pairs for name in pair), *others])

    def with_units(claim: str, units: list[str]) -> Observation:
        return Observation(
            claim,
            [f"{run}, {u}" for u in units for run in (BP, RBP, SRBP, TOP)],
            "RBP and SRBP are better than top layer only and at least half-way to BP, for each of the three",
            lambda found: all(learns(found, run, u) for u in units for run in (RBP, SRBP)),
        )

    claim = "RBP and SRBP also work with linear, logistic and ReLU units."
    return {
        "1": Observation(
            "RBP with new random matrices at each update is poor, like training the top layer only.",
            [RBP, redrawn, TOP],
            f"redrawn is at most {ALIKE:.0%} of the gap (BP to top layer only) from top layer only, better or worse; "
            "RBP beats both",
            lambda found: (
                alike(found, redrawn, TOP) and tested(found, RBP) > max(tested(found, redrawn), tested(found, TOP))
            ),
        ),
        "2": Observation(
            "With new matrices that have the signs of the forward weights, it learns the training set without error.",
            [BP, concordant, RBP],
            f"the training error is below {ZERO:.1%}",
            lambda found: bool(1 - found[concordant].train.mean() < ZERO),
        ),
        "3": Observation(
            "A mean other than zero, in uniform or normal matrices, changes nothing.",
            [RBP, SRBP, *shifted],
            f"each differs from the same rule with mean zero by at most {ALIKE:.0%} of the gap",
            lambda found: all(alike(found, name, rule) for name, rule in shifted.items()),
        ),
        "4": Observation(
            "To train the layers below a fixed layer h is useless: it is often better to fix all l <= h.",
            [SRBP, *fixed],
            "fixing only h gives worse test accuracy than fixing all l <= h, for more than half of the hidden h > 1",
            lambda found: sum(tested(found, h) < tested(found, below) for h, below in pairs) > len(pairs) / 2,
        ),
        "5": Observation(
            "SRBP with only the sign of its errors is better than the top layer only, and worse than SRBP.",
            [SRBP, sign, TOP],
            "its test accuracy is between the two",
            lambda found: tested(found, TOP) < tested(found, sign) < tested(found, SRBP),
        ),
        "6": Observation(
            "SRBP with only the magnitude of its errors does not work at all.",
            [SRBP, magnitude, TOP],
            "its test accuracy is worse than top layer only",
            lambda found: tested(found, magnitude) < tested(found, TOP),
        ),
        "7": Observation(
            "A random weight for each synapse, instead of each neuron, does not work at all.",
            [SRBP, single, TOP],
            "its test accuracy is worse than top layer only",
            lambda found: tested(found, single) < tested(found, TOP),
        ),
        "8": with_units(claim, list(TRANSFERS)),
        f"8, rate {LOWER_RATE:g}": with_units(f"{claim[:-1]}, with a lower rate.", [lowered(t) for t in TRANSFERS]),
    }


def accuracies(found: Iterable[Found]) -> dict[str, Accuracy]:
    """The accuracies of the measured runs, by name."""
    made = {}
    for each in found:
        train, test = each.values("train_accuracy"), each.values("accuracy")
        if train is not None and test is not None:
            made[each.cell.row] = Accuracy(train, test)
    return made


# --------------------------------------------------------------------------------------------------------- measuring


def train(job: Job, *, frozen: Sequence[int] = ()) -> Mapping[str, Any] | None:
    """Trains an MLP whose config may name one of TRANSFERS; some of its layers stay as they are."""
    config, dataset = job.config, job.dataset(job.config)
    task = make_task(config.activation, (math.prod(dataset.shape), *config.widths, dataset.classes))
    found = cells.measure(job, task=task._replace(constraint=freeze(frozen)) if frozen else task, training=True)
    return found if found is None else {**found, "frozen": list(frozen)}


def make_task(transfer: str, sizes: Sequence[int]) -> tasks.Task:
    """The task of an MLP with a transfer function."""
    function = TRANSFERS.get(transfer, jax.numpy.tanh)
    return tasks.task(lambda rngs: models.MLP(sizes, function, rngs=rngs))


# ----------------------------------------------------------------------------------------------------------- results


def verdict(observation: Observation, found: Accuracies) -> str:
    return "holds" if observation.holds(found) else "does not hold here"


def figure(chosen: Mapping[str, Observation], found: Accuracies, title: str) -> Figure:
    """One panel for each observation: test error (filled, ± sd) and training error (hollow) of each run."""
    columns = min(len(chosen), 2)
    sizes = [len(observation.runs) for observation in chosen.values()]
    heights = [max(sizes[i : i + columns]) + 4 for i in range(0, len(sizes), columns)]
    picture = Figure(figsize=(1 + 6 * columns, 1 + 0.27 * sum(heights)), dpi=130, layout="constrained")
    axes = picture.subplots(len(heights), columns, squeeze=False, height_ratios=heights, sharex=True).ravel()
    for axis, (number, observation) in zip(axes, chosen.items(), strict=False):
        for row, name in enumerate(observation.runs):
            units = (*TRANSFERS, *map(lowered, TRANSFERS))
            transfer = next((f", {u}" for u in units if name.endswith(f", {u}")), "")
            for reference, colour in ((BP, "tab:green"), (TOP, "tab:red")):
                value = 100 * (1 - tested(found, reference + transfer))
                axis.vlines(value, row - 0.5, row + 0.5, color=colour, linewidth=1.5)
            error, training = 100 * (1 - found[name].test), 100 * (1 - found[name].train)
            sd = results.statistics(error)["sd"] or 0.0
            axis.errorbar(error.mean(), row, xerr=sd, fmt="o", color="tab:blue", capsize=2, markersize=5)
            axis.plot(training.mean(), row, "o", markerfacecolor="none", markeredgecolor="0.4", markersize=5)
        lines = [*textwrap.wrap(f"{number}. {observation.claim}", 62), verdict(observation, found)]
        axis.set_title("\n".join(lines), fontsize="small", loc="left")
        axis.set(yticks=range(len(observation.runs)), ylim=(len(observation.runs) - 0.5, -0.5), xlim=(-0.05, 100))
        axis.set_yticklabels(observation.runs, fontsize="small")
        axis.set_xscale("symlog", linthresh=1, linscale=0.4)  # a logarithmic axis cannot show 0
        axis.set_xticks([0, 1, 2, 5, 10, 20, 50, 100], ["0", "1", "2", "5", "10", "20", "50", "100"])
        axis.minorticks_off()
        axis.tick_params(labelbottom=True, labelsize="small")
        axis.grid(axis="x", alpha=0.3)
    for axis in axes[len(chosen) :]:
        axis.remove()
    picture.suptitle(title, fontsize="medium")
    picture.supxlabel(
        "error (%): test is filled, ± sd; training is hollow; lines: test error of BP (green) and top layer only (red)",
        fontsize="small",
    )
    return picture


def plot(found: Sequence[Found]) -> Figure:
    """The panels of the observations that are measured."""
    config, values = found[0].cell.config, accuracies(found)
    chosen = {n: each for n, each in observations(len(config.widths)).items() if each.measured(values)}
    less = "; ".join(dict.fromkeys(filter(None, (each.less for each in found))))
    title = f"{'-'.join(map(str, config.widths))} on {config.dataset}" + f" (reduced: {less})" * bool(less)
    return figure(chosen, values, title) if chosen else Figure()


def verdicts(found: Sequence[Found]) -> str:
    """A line for each observation that is measured: whether it holds, and the criterion."""
    if not found:
        return ""
    values = accuracies(found)
    lines = [
        f"- **{number}.** {each.claim} *{verdict(each, values).capitalize()}* (criterion: {each.criterion})."
        for number, each in observations(len(found[0].cell.config.widths)).items()
        if each.measured(values)
    ]
    if lines and any(each.less for each in found):
        some = "All" if all(each.less for each in found) else "Some"
        lines.append(f"\n{some} of these runs are reduced: with all epochs and seeds, a verdict may differ.")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ tables

PAPER = {BP: 97.9, TOP: 84.7, RBP: 97.2, SRBP: 97.2}  # Table 1


def table(config: Config, title: str, minutes: float, gpu_minutes: float | None = None) -> Table:
    """The runs of a config as cells, each with its accuracy on the training set and on the test set."""
    made = []
    for name, entry in entries(len(config.widths)).items():
        own = config.replace(rule=entry.rule, activation=entry.transfer, learning_rate=entry.rate)
        paper: dict[str, cells.Number] = {}
        if config.dataset == "mnist":
            paper |= {"accuracy": (PAPER[name], None)} if name in PAPER else {}
            paper |= {"train_accuracy": (100.0, None)} if name == "RBP, redrawn, forward signs" else {}
        measure = functools.partial(train, frozen=entry.frozen)
        beyond = entry.rate == LOWER_RATE
        made.append(Cell(name, "", own, paper, minutes, gpu_minutes, measure=measure, beyond=beyond))
    shown = (Shown("train_accuracy", "training"), Shown("accuracy", "test"))
    return Table(title, made, shown, notes=verdicts, plot=plot)


ON_MNIST = table(MNIST, "Accuracy (%) on MNIST after 100 epochs", minutes=0.6, gpu_minutes=0.4)
DIGITS = MNIST.replace(dataset="digits", batch_size=25, epochs=40, seeds=3)
ON_DIGITS = table(DIGITS, "Accuracy (%) on digits after 40 epochs", minutes=0.02)
