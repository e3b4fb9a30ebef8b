"""Figure 1 of Lansdell, Prakash and Kording, Learning to solve the credit assignment problem (2019).

    python -m experiments.papers.node_perturbation        # on digits, 64-50-20-10: a minute on two cores
    python -m experiments.papers.node_perturbation --dataset=mnist --epochs=267 --learning_rate=0.0128

The second command has the authors' settings, from the paper and their code: 784-50-20-10 with sigmoid hidden layers,
half squared error on one-hot targets, batches of 32, feedback weights by exact least squares, plain SGD. The rate is
0.0128 for the mean over a batch (the code has 0.0004 for the sum). The command takes 500,000 steps; the authors took
2,001,000 (--epochs=1067). Here one epoch warms up the feedback, and the initial weights have variance 1 / fan-in; the
code has twice this variance. On digits, the rate and the number of steps differ.

Panels A, B and C show, for each epoch and layer:

- A: the relative error of the feedback weights B of a layer as an estimate of its weights W;
- B: the angle between the gradient below that layer and the true gradient;
- C: how many signs of B and W agree.

FA keeps its B. BP uses W itself. B of the lower layer cannot become W, because its 20 errors are functions of only 10
output errors; the gradient does not need it. Panel D is the test error. The paper reports "close to 3%"; the figures
beside ours are from the authors' notebooks.

The program writes metrics.json, curves.csv (one row for each run, seed, epoch and layer) and figure_1.png.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.figure import Figure

import lrules
from experiments import build, cli, compare, data, files, methods, plots, results, tasks
from experiments.loop import Record, Run

FLAGS = flags.FLAGS
NOTEBOOKS = {  # test error in percent, MNIST
    "BP": 2.65,
    "FA": 4.28,
    "NP, std 0.0001": 3.51,
    "NP, std 0.001": 3.51,
    "NP, std 0.01": 3.64,
    "NP, std 0.1": 15.9,
}
COLOURS = ("black", "#ff7f0e", "#08306b", "#2171b5", "#6baed6", "#74c476")


class Alignment(NamedTuple):
    """One layer: its B compared with its W, and the gradient of the layer below compared with the true gradient."""

    relative_error: Any
    angle: Any
    sign_agreement: Any


Layers = dict[str, Alignment]  # by the name of the layer that has this B


def runs(stds: Sequence[float], solver: Literal["sgd", "rls"]) -> dict[str, lrules.Rule]:
    """BP, FA, and node perturbation with each standard deviation of the noise."""
    found = {"BP": lrules.backprop(), "FA": lrules.feedback_alignment()}
    return found | {f"NP, std {std:g}": lrules.node_perturbation(std, solver=solver) for std in stds}


class Watch:
    """Measures a run before the first epoch and after each epoch, on a batch of training examples."""

    def __init__(self, task: tasks.Task, rules: Mapping[str, lrules.Rule], x: jax.Array, y: jax.Array):
        self.measured: dict[str, list[Layers]] = {name: [] for name in rules}
        self._measures = {name: jax.jit(jax.vmap(measure(task, rule, x, y))) for name, rule in rules.items()}

    def __call__(self, name: str, run: Run) -> None:
        keys = jax.vmap(jax.random.key)(jnp.asarray(run.seeds))
        carry = run.carry
        found = self._measures[name](carry.params, carry.state, carry.feedback, keys)
        self.measured[name].append(jax.tree.map(np.asarray, found))


def measure(task: tasks.Task, rule: lrules.Rule, x: jax.Array, y: jax.Array) -> Any:
    """(params, state, feedback, key) -> `Layers` of one seed."""
    ours = lrules.value_and_grad(task.net, task.loss, rule)
    true = lrules.value_and_grad(task.net, task.loss, lrules.backprop())

    def layers(params: Any, state: Any, feedback: lrules.Feedback, key: jax.Array) -> Layers:
        inputs = state, x
        update = ours(params, feedback, inputs, y, rng=key if rule.stochastic else None)[1].params
        truth = true(params, lrules.Feedback({}, {}), inputs, y)[1].params
        gradients = {k: v for k, v in lrules.diagnostics.agreement(update, truth).items() if k.endswith("kernel")}
        weights = lrules.diagnostics.weight_alignment(feedback, params)
        below = dict(zip(list(gradients)[1:], gradients, strict=False))  # for each layer, the name of the layer below
        exact = lrules.diagnostics.compare(jnp.ones(1), jnp.ones(1))  # backprop: B is W
        found = {
            name: Alignment(weight.relative_error, gradients[beneath].angle, weight.sign_agreement)
            for name, beneath in below.items()
            for weight in [weights.get(name, exact)]
        }
        sane = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()
        return jax.tree.map(lambda figure: jnp.where(sane, figure, jnp.nan), found)

    return layers


def final(layers: Layers, field: str, unit: float, digits: int) -> str:
    """One figure for each layer, from the lowest to the highest: means over the seeds."""
    return ", ".join(f"{unit * getattr(layer, field).mean():.{digits}f}" for layer in layers.values())


def table(
    histories: Mapping[str, Sequence[Record]], measured: Mapping[str, Sequence[Layers]], known: Mapping[str, float]
) -> str:
    """The figures after the last epoch; (X) marks a loss that is not finite."""
    header = ("run", "test error (%)", "notebooks", "|B - W| / |W|", "angle below (°)", "same sign (%)")
    rows = []
    for name, records in histories.items():
        errors, last = 100 * (1 - records[-1].accuracy), measured[name][-1]
        lost = "" if np.isfinite(records[-1].train_loss).all() else " (X)"
        test = results.text(results.statistics(errors)) + lost
        weights = final(last, "relative_error", 1, 2), final(last, "angle", 1, 1), final(last, "sign_agreement", 100, 0)
        rows.append((name, test, f"{known[name]:g}" if name in known else "-", *weights))
    return results.table(header, rows)


def figure(
    histories: Mapping[str, Sequence[Record]], measured: Mapping[str, Sequence[Layers]], title: str
) -> Figure:
    """The four panels of figure 1; A, B and C have one line for each layer."""
    made = Figure(figsize=(13, 7.5), dpi=120, layout="constrained")
    axes = made.subplots(2, 2).ravel()
    panels = (
        ("relative_error", "A: |B - W| / |W|", 1),
        ("angle", "B: angle to the true gradient (degrees)", 1),
        ("sign_agreement", "C: signs of B and W that agree (%)", 100),
    )
    for (name, layers), colour in zip(measured.items(), COLOURS * 3, strict=False):
        for axis, (field, _, unit) in zip(axes, panels, strict=False):
            for layer, line in zip(layers[0], ("-", "--", ":", "-.") * 3, strict=False):
                band(axis, range(len(layers)), [unit * getattr(at[layer], field) for at in layers], colour, line)
        errors = [100 * (1 - record.accuracy) for record in histories[name]]
        band(axes[3], range(1, len(errors) + 1), errors, colour, "-", name)
    for axis, (_, label, _) in zip(axes, panels, strict=False):
        axis.set(ylabel=label, xlabel="epoch")
    axes[3].set(ylabel="D: test error (%)", xlabel="epoch")
    plots.logarithmic(axes[3])
    for layer, line in zip(next(iter(measured.values()))[0], ("-", "--", ":", "-."), strict=False):
        axes[0].plot([], [], color="black", linestyle=line, label=layer)
    axes[0].legend(frameon=False, fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
    made.legend(*axes[3].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    made.suptitle(title, fontsize="medium")
    return made


def band(axis: Any, epochs: Sequence[int], values: Any, colour: str, line: str, label: str | None = None) -> None:
    """A line for the mean over the seeds, and a band of one standard error around it."""
    seeds = np.shape(values)[1]
    mean, error = np.mean(values, axis=1), np.std(values, axis=1, ddof=int(seeds > 1)) / np.sqrt(seeds)
    axis.plot(epochs, mean, color=colour, linestyle=line, label=label)
    axis.fill_between(epochs, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)


def main() -> None:
    rules = runs(cli.numbers("stds", FLAGS.stds), FLAGS.solver)
    folder = cli.output_folder()
    config = cli.config(rule="node_perturbation(std=0.001)", loss="squared_error")
    dataset = data.on_device(build.dataset(config, data_dir=FLAGS.data_dir))
    task = tasks.build(config, dataset)
    methods.check(task, rules, dataset.x_train, dataset.y_train, config.batch_size)
    watch = Watch(task, rules, task.prepare(dataset.x_train[:256]), dataset.y_train[:256])
    trials, refused = compare.make_trials(config, dataset, rules, task=task)
    assert not refused, refused  # `methods.check` has checked all rules
    compare.train(trials, watch=watch)
    histories = {name: trial.records for name, trial in trials.items()}

    known = NOTEBOOKS if dataset.name.removesuffix(".npz") == "mnist" else {}
    layers = {
        name: [{layer: figures._asdict() for layer, figures in at.items()} for at in measured]
        for name, measured in watch.measured.items()
    }
    found = {name: results.summary(records) | {"layers": layers[name]} for name, records in histories.items()}
    content = cli.provenance_and_settings(config.seed) | {"config": config.to_dict(), "runs": found, "notebooks": known}
    files.write_json(folder / "metrics.json", content)
    rows = [
        (name, config.seed + i, epoch, layer, *(figures[i] for figures in at), records[epoch - 1].accuracy[i])
        for name, records in histories.items()
        for epoch, layers in enumerate(watch.measured[name][1:], start=1)
        for layer, at in layers.items()
        for i in range(config.seeds)
    ]
    files.write_csv(folder / "curves.csv", ("run", "seed", "epoch", "layer", *Alignment._fields, "accuracy"), rows)
    widths = "-".join(map(str, config.widths))
    seeds, epochs = results.counted(config.seeds, "seed"), results.counted(config.epochs, "epoch")
    title = f"{widths} on {dataset.name}, {FLAGS.solver}, {seeds}, {epochs}"
    files.savefig(figure(histories, watch.measured, title), folder / "figure_1.png")
    print(table(histories, watch.measured, known))
    print(f"\nLayers, from the lowest: {', '.join(watch.measured['BP'][0])}.")
    print(f"{title}. Results: {folder}/metrics.json, curves.csv, figure_1.png")


if __name__ == "__main__":
    flags.DEFINE_list("stds", ["1e-4", "1e-3", "1e-2", "1e-1"], "Standard deviations of the noise.")
    flags.DEFINE_enum("solver", "rls", ["rls", "sgd"], "How the feedback weights learn.")
    cli.define_config_flags(
        omit=("rule", "loss", "task", *cli.UNUSED_BY_PAPERS),
        epochs=120,
        seeds=5,
        learning_rate=0.2,
        widths=(50, 20),
        activation="sigmoid",
        batch_size=32,
        optimizer="sgd",
        schedule="constant",
        warmup_epochs=1,
    )
    cli.define_output_flags(output="results/node_perturbation")
    flags.adopt_module_key_flags(cli)
    cli.run(main)
