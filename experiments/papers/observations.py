"""The eight observations on random backpropagation by Baldi, Sadowski and Lu (2018, section 4.2): does each one hold?

    python -m experiments.papers.observations                       # digits: under two minutes on two cores
    python -m experiments.papers.observations --observations=4,5    # some of them
    python -m experiments.papers.observations --dataset=mnist --batch_size=100 --epochs=100 --seeds=5   # as the paper

The last command has the settings of the paper: 784-100-100-100-100-10 with tanh, SGD with rate 0.1, which each update
multiplies by 1 - 1e-6. On two cores, use --epochs=5 --seeds=2: this takes seven minutes.

An observation consists of a claim, some runs and a criterion. The program applies the criterion to means over the
seeds, and prints it with the verdict. It writes metrics.json, runs.csv (one row for each run and seed) and
observations.png.

Some points are not clear in the paper:

- Observation 3: which means? The paper refers to its sparse matrices. With 100 neurons in each layer, their means are
  0.01 to 0.03: --mean. A mean sends down the sum of the errors of a layer. With a mean as large as the standard
  deviation (0.1), this sum grows by a factor of ten from layer to layer, and RBP gets worse. A mean has no effect on
  SRBP, because the errors of softmax outputs add up to zero.
- Observation 4: in "worse than if we fix layers l h", the inequality sign is lost. The sentence before says that the
  updates of a deep layer need the updates of the layers that precede it *in the learning channel*. These are the layers
  above. So, if layer h is fixed, training below it is useless, and it is better to fix those layers too. The criterion
  is therefore for l <= h. The program also shows runs for l >= h (hidden layers only: the top layer always trains).
- Observation 8: which logistic units? With the usual slope at zero, 1/4, four layers of them learn nothing for a long
  time with any rule, even backpropagation. Here they are logistic(4z), with slope 1 at zero, as tanh has.

Results with the defaults on digits, and on MNIST for 5 epochs, and for 15 epochs (only 1, 2 and 8):

- 3, 5, 6 and 7 hold.
- 1 does not hold. New matrices at each step disturb the lower layers. The run is worse than the top layer only, and the
  difference grows with time.
- 2 holds on digits. On MNIST the training error is still 2.5% after 15 epochs.
- 4 does not hold. With more fixed layers, training and test accuracy get worse for l <= h and for l >= h. (On digits,
  l >= h does not change the test accuracy.)
- 8 holds on digits. On MNIST with rate 0.1, RBP with linear units is unstable, and SRBP with ReLU learns nothing. With
  --learning_rate=0.02 it holds (5 epochs).
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import flags
from matplotlib.figure import Figure
from tqdm import tqdm

import lrules
from experiments import cli, data, files, loop, methods, models, recipes, results, tasks
from experiments.errors import InputError

FLAGS = flags.FLAGS

BP, TOP, RBP, SRBP = "BP", "top layer only", "RBP", "SRBP"
TRANSFERS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda z: z,
    "logistic": lambda z: jax.nn.sigmoid(4 * z),
    "ReLU": jax.nn.relu,
}
ALIKE = 0.25  # two accuracies are alike if they differ by at most this part of the gap (BP to top layer only)
ZERO = 0.005  # a training error below this counts as 0%


class Entry(NamedTuple):
    """How one run trains."""

    rule: lrules.Rule
    transfer: str = "tanh"  # or one of TRANSFERS
    frozen: tuple[int, ...] = ()  # layers; the lowest is 1


class Accuracy(NamedTuple):
    """The final accuracies, one for each seed: arrays [seeds]."""

    train: np.ndarray
    test: np.ndarray


Found = Mapping[str, Accuracy]


class Observation(NamedTuple):
    """A claim of the paper, the runs that show it, and the criterion for it to hold."""

    claim: str
    runs: list[str]
    criterion: str
    holds: Callable[[Found], bool]


# ---------------------------------------------------------------------------------------------------------- the runs


def entries(hidden: int, mean: float) -> dict[str, Entry]:
    """Every run by name, for a number of hidden layers. Observations may share runs."""
    basic = {
        BP: lrules.backprop(),
        TOP: lrules.last_layer_only(),
        RBP: lrules.feedback_alignment(),
        SRBP: lrules.direct_feedback_alignment(),
    }
    rules = basic | {
        "RBP, redrawn": recipes.redrawn(),
        "RBP, redrawn, forward signs": recipes.redrawn_concordant(),
        "SRBP, sign only": lrules.sign_error(basic[SRBP]),
        "SRBP, magnitude only": lrules.magnitude_error(basic[SRBP]),
        "one random weight a synapse": recipes.weight_by_weight(),
    }
    distributions = {"uniform": jax.nn.initializers.glorot_uniform(), "normal": jax.nn.initializers.glorot_normal()}
    for shape, init in distributions.items():
        shifted = lrules.feedback.shifted(mean, init=init)
        rules[f"RBP, {shape}, mean {mean:g}"] = lrules.feedback_alignment(init=shifted)
        rules[f"SRBP, {shape}, mean {mean:g}"] = lrules.direct_feedback_alignment(init=shifted)
    runs = {name: Entry(rule) for name, rule in rules.items()}
    for h in range(1, hidden + 1):
        for layers in (range(h, h + 1), range(1, h + 1), range(h, hidden + 1)):
            runs.setdefault(fixing(layers, hidden), Entry(basic[SRBP], frozen=tuple(layers)))
    return runs | {f"{name}, {t}": Entry(rule, t) for t in TRANSFERS for name, rule in basic.items()}


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


def tested(found: Found, name: str) -> float:
    """The mean test accuracy of a run."""
    return float(found[name].test.mean())


def alike(found: Found, a: str, b: str) -> bool:
    """Whether the test accuracies of two runs are alike, relative to the gap between BP and the top layer only."""
    return abs(tested(found, a) - tested(found, b)) <= ALIKE * (tested(found, BP) - tested(found, TOP))


def learns(found: Found, name: str, transfer: str) -> bool:
    """Whether a rule is better than the top layer only and at least half-way to BP, with one transfer function."""
    value, top, bp = (tested(found, f"{run}, {transfer}") for run in (name, TOP, BP))
    return value > top and value >= (top + bp) / 2


def observations(hidden: int, mean: float) -> dict[int, Observation]:
    """The eight observations, with the numbers that the paper gives them."""
    redrawn, concordant, single = "RBP, redrawn", "RBP, redrawn, forward signs", "one random weight a synapse"
    sign, magnitude = "SRBP, sign only", "SRBP, magnitude only"
    shifted = {f"{rule}, {shape}, mean {mean:g}": rule for rule in (RBP, SRBP) for shape in ("uniform", "normal")}
    above_lowest = range(2, hidden + 1)  # for h = 1, "h alone" and "all l <= h" are the same run
    pairs = [(fixing(range(h, h + 1), hidden), fixing(range(1, h + 1), hidden)) for h in above_lowest]
    others = [fixing(range(h, hidden + 1), hidden) for h in above_lowest]
    fixed = dict.fromkeys([*(name for pair in pairs for name in pair), *others])
    transfers = [f"{run}, {t}" for t in TRANSFERS for run in (BP, RBP, SRBP, TOP)]
    return {
        1: Observation(
            "RBP with new random matrices at each update is poor, like training the top layer only.",
            [RBP, redrawn, TOP],
            f"redrawn is within {ALIKE:.0%} of the gap (BP to top layer only) from top layer only; RBP beats both",
            lambda found: (
                alike(found, redrawn, TOP) and tested(found, RBP) > max(tested(found, redrawn), tested(found, TOP))
            ),
        ),
        2: Observation(
            "With new matrices that have the signs of the forward weights, it learns the training set without error.",
            [BP, concordant, RBP],
            f"the training error is below {ZERO:.1%}",
            lambda found: bool(1 - found[concordant].train.mean() < ZERO),
        ),
        3: Observation(
            "A mean other than zero, in uniform or normal matrices, changes nothing.",
            [RBP, SRBP, *shifted],
            f"each differs from the same rule with mean zero by at most {ALIKE:.0%} of the gap",
            lambda found: all(alike(found, name, rule) for name, rule in shifted.items()),
        ),
        4: Observation(
            "To train the layers below a fixed layer h is useless: it is often better to fix all l <= h.",
            [SRBP, *fixed],
            "fixing only h gives worse test accuracy than fixing all l <= h, for more than half of the hidden h > 1",
            lambda found: sum(tested(found, h) < tested(found, below) for h, below in pairs) > len(pairs) / 2,
        ),
        5: Observation(
            "SRBP with only the sign of its errors is better than the top layer only, and worse than SRBP.",
            [SRBP, sign, TOP],
            "its test accuracy is between the two",
            lambda found: tested(found, TOP) < tested(found, sign) < tested(found, SRBP),
        ),
        6: Observation(
            "SRBP with only the magnitude of its errors does not work at all.",
            [SRBP, magnitude, TOP],
            "its test accuracy is worse than top layer only",
            lambda found: tested(found, magnitude) < tested(found, TOP),
        ),
        7: Observation(
            "A random weight for each synapse, instead of each neuron, does not work at all.",
            [SRBP, single, TOP],
            "its test accuracy is worse than top layer only",
            lambda found: tested(found, single) < tested(found, TOP),
        ),
        8: Observation(
            "RBP and SRBP also work with linear, logistic and ReLU units.",
            transfers,
            "RBP and SRBP are better than top layer only and at least half-way to BP, for each of the three",
            lambda found: all(learns(found, run, t) for t in TRANSFERS for run in (RBP, SRBP)),
        ),
    }


# --------------------------------------------------------------------------------------------------------- measuring


def train(
    chosen: Mapping[str, Entry],
    dataset: data.Dataset,
    widths: list[int],
    rate: optax.ScalarOrSchedule,
    *,
    epochs: int,
    **options: Any,
) -> tuple[dict[str, Accuracy], dict[str, dict]]:
    """Trains each run with SGD: its final accuracies, and the figures of all epochs. `options` are for `loop.Run`."""
    made: dict[str, tasks.Task] = {}
    dataset = data.on_device(dataset)
    found: dict[str, Accuracy] = {}
    summaries: dict[str, dict] = {}
    with tqdm(total=epochs * len(chosen), unit="epoch", desc="training") as bar:
        for name, entry in chosen.items():
            bar.set_postfix_str(name)
            if entry.transfer not in made:
                made[entry.transfer] = make_task(entry.transfer, dataset, widths)
            optimizer = optax.chain(optax.sgd(rate), freeze(entry.frozen))
            run = loop.Run(methods.by_rule(made[entry.transfer], entry.rule, optimizer), dataset, **options)
            records: list[loop.Record] = []
            while len(records) < epochs:
                records += filter(None, [run.epoch()])
                bar.update()
            found[name] = Accuracy(run.evaluate(dataset.x_train, dataset.y_train)["accuracy"], records[-1].accuracy)
            training = results.statistics(found[name].train) | {"by_seed": found[name].train}
            summaries[name] = {"train_accuracy": training} | results.summary(records)
    return found, summaries


def make_task(transfer: str, dataset: data.Dataset, widths: list[int]) -> tasks.Task:
    """The task of an MLP with a transfer function."""
    sizes = (math.prod(dataset.shape), *widths, dataset.classes)
    function = TRANSFERS.get(transfer, jax.numpy.tanh)
    return tasks.task(lambda rngs: models.MLP(sizes, function, rngs=rngs))


# ----------------------------------------------------------------------------------------------------------- results


def table(chosen: Mapping[int, Observation], found: Found) -> str:
    """One row for each observation and run: mean ± sd over the seeds."""
    percent = lambda values: results.text(results.statistics(values), 100)  # noqa: E731
    rows = [
        (f"{number}. {name}", percent(found[name].train), percent(found[name].test))
        for number, observation in chosen.items()
        for name in observation.runs
    ]
    return results.table(("observation, run", "train accuracy (%)", "test accuracy (%)"), rows)


def verdict(observation: Observation, found: Found) -> str:
    return "holds" if observation.holds(found) else "does not hold here"


def figure(chosen: Mapping[int, Observation], found: Found, title: str) -> Figure:
    """One panel for each observation: test error (filled, ± sd) and training error (hollow) of each run."""
    columns = min(len(chosen), 2)
    sizes = [len(observation.runs) for observation in chosen.values()]
    heights = [max(sizes[i : i + columns]) + 4 for i in range(0, len(sizes), columns)]
    picture = Figure(figsize=(1 + 6 * columns, 1 + 0.27 * sum(heights)), dpi=130, layout="constrained")
    axes = picture.subplots(len(heights), columns, squeeze=False, height_ratios=heights, sharex=True).ravel()
    for axis, (number, observation) in zip(axes, chosen.items(), strict=False):
        for row, name in enumerate(observation.runs):
            transfer = next((f", {t}" for t in TRANSFERS if name.endswith(f", {t}")), "")
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


def main() -> None:
    numbers = cli.positive_integers("observations", FLAGS.observations)
    widths = cli.positive_integers("widths", FLAGS.widths)
    if len(widths) < 2:
        raise InputError("--widths must have two or more hidden layers, as in --widths=100,100.")
    known = observations(len(widths), FLAGS.mean)
    wrong = [number for number in numbers if number not in known]
    if wrong or not numbers:
        given = f"has {wrong[0]}" if wrong else "is empty"
        raise InputError(f"--observations {given}: give numbers from 1 to {len(known)}, as in --observations=4,5.")
    chosen = {number: observation for number, observation in known.items() if number in numbers}
    folder = cli.output_folder()
    dataset = data.load(FLAGS.dataset, data_dir=FLAGS.data_dir)
    needed = {BP, TOP}.union(*(observation.runs for observation in chosen.values()))
    runs = {name: entry for name, entry in entries(len(widths), FLAGS.mean).items() if name in needed}
    found, summaries = train(
        runs,
        dataset,
        widths,
        optax.exponential_decay(FLAGS.learning_rate, transition_steps=1, decay_rate=1 - FLAGS.decay),
        epochs=FLAGS.epochs,
        seeds=range(FLAGS.seed, FLAGS.seed + FLAGS.seeds),
        batch_size=FLAGS.batch_size,
    )

    judged = {
        number: observation._asdict() | {"holds": observation.holds(found)} for number, observation in chosen.items()
    }
    content = {"observations": judged, "runs": summaries}
    files.write_json(folder / "metrics.json", cli.provenance_and_settings(FLAGS.seed) | content)
    rows = [
        (name, FLAGS.seed + i, accuracy.train[i], accuracy.test[i])
        for name, accuracy in found.items()
        for i in range(FLAGS.seeds)
    ]
    files.write_csv(folder / "runs.csv", ("run", "seed", "train_accuracy", "test_accuracy"), rows)
    seeds, epochs = results.counted(FLAGS.seeds, "seed"), results.counted(FLAGS.epochs, "epoch")
    title = f"{'-'.join(map(str, widths))} on {dataset.name}, {seeds}, {epochs}"
    files.savefig(figure(chosen, found, title), folder / "observations.png")
    print(table(chosen, found))
    for number, observation in chosen.items():
        print(f"\n{number}. {observation.claim}\n   {verdict(observation, found)} (criterion: {observation.criterion})")
    print(f"\n{title}. Results: {folder}/metrics.json, runs.csv, observations.png")


if __name__ == "__main__":
    flags.DEFINE_list("observations", [str(n) for n in range(1, 9)], "The observations to measure.")
    flags.DEFINE_string("dataset", "digits", "digits (embedded), npz:FILE, or the name of a TFDS set such as mnist.")
    flags.DEFINE_string("data_dir", None, "The folder of prepared TFDS sets (default: ~/tensorflow_datasets).")
    flags.DEFINE_list("widths", ["100", "100", "100", "100"], "The hidden widths.")
    flags.DEFINE_integer("epochs", 40, "Passes over the training set.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 25, "Examples in a step.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 0.1, "The rate of SGD.", lower_bound=0)
    flags.DEFINE_float("decay", 1e-6, "Each update reduces the rate by this part.", lower_bound=0, upper_bound=0.99)
    flags.DEFINE_float("mean", 0.03, "The mean of the feedback weights in observation 3.")
    flags.DEFINE_integer("seeds", 3, "How many seeds to train at once.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "The first seed.", lower_bound=0)
    flags.DEFINE_string("output", "results/observations", "Folder for the results.")
    cli.run(main)
