"""Train one network on several tasks in sequence, and measure every task after every task (Split-MNIST).

    python -m experiments.sequence                                     # digits: five pairs of classes, half a minute
    python -m experiments.sequence --dataset=mnist --rule='backman("dynamic")' --seeds=100

The classes are divided at random, for each seed anew, into tasks of two (--per_task). Within a task they are numbered
from 0, so one head serves all tasks. The optimizer and its schedule start anew with each task. Every task has as many
training examples as the rarest pair has. All seeds train at once. With --tuning the division is another one, for
choosing settings. The program writes metrics.json, table.csv and sequence.png.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments import build, cli, data, files, plots, results, subsets, tasks
from experiments.config import Config
from experiments.loop import Run, steps_per_epoch
from experiments.methods import Method
from experiments.progress import Progress

FLAGS = flags.FLAGS
PyTree = Any
# What has no part here: every task is classified, and measured on its test examples after the last of its steps.
FIXED: dict[str, Any] = {
    **{"task": "classification", "loss": "cross_entropy", "classes": "", "validation": 0.0, "select": "last"},
    **{"warmup_epochs": 0, "attack": 0.0, "probe": 0, "record_every": 0, "layers": False},
}


class Division(NamedTuple):
    """The tasks of each seed: the classes [seeds, tasks, classes of a task], and each class's number in its task."""

    classes: np.ndarray
    numbers: np.ndarray  # [seeds, classes]

    def rows(self, labels: np.ndarray, task: int) -> np.ndarray:
        """The examples of a task [seeds, examples]: as many as all seeds have."""
        found = [np.flatnonzero(np.isin(labels, classes[task])) for classes in self.classes]
        return np.stack([rows[: min(map(len, found))] for rows in found]).astype(np.int32)


def divide(dataset: data.Dataset, seeds: range, per_task: int, *, tuning: bool = False) -> Division:
    """The division of each seed."""
    classes = np.stack([subsets.divide(dataset, seed=seed, per_task=per_task, tuning=tuning) for seed in seeds])
    numbers = np.zeros((len(classes), dataset.classes), np.int32)
    for own, of_seed in zip(numbers, classes, strict=True):
        for group in of_seed:
            own[group] = np.arange(per_task)
    return Division(classes, numbers)


def renumbered(method: Method, classes: int) -> Method:
    """The method with labels that each lane numbers its own way; the carry has the numbers [classes] as its second."""

    def init(key: Any, x: Any, y: Any) -> PyTree:
        return method.init(key, x, jnp.zeros_like(y)), jnp.zeros(classes, jnp.int32)

    def step(carry: PyTree, key: Any, x: Any, y: Any) -> tuple[PyTree, Any]:
        inner, loss = method.step(carry[0], key, x, carry[1][y])
        return (inner, carry[1]), loss

    def evaluate(carry: PyTree, x: Any, y: Any) -> dict[str, Any]:
        return method.evaluate(carry[0], x, carry[1][y])

    return Method(init, step, evaluate, convolves=method.convolves)


def train(
    config: Config,
    dataset: data.Dataset,
    division: Division,
    *,
    advance: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """Test accuracy of every task after every task [seeds, after, task], each task trained for the config's epochs."""
    seeds = config.all_seeds
    count = division.classes.shape[1]
    y_train, y_test = np.asarray(dataset.y_train), np.asarray(dataset.y_test)
    rows = [division.rows(y_train, task) for task in range(count)]
    examples = min(own.shape[1] for own in rows)
    task = tasks.build(config, dataset._replace(classes=division.classes.shape[2]))
    method = build.method(config, task, steps_per_epoch(dataset, config.batch_size, examples))
    run = Run(
        renumbered(method, dataset.classes),
        dataset,
        seeds=seeds,
        batch_size=config.batch_size,
        probe=0,
        rows=rows[0][:, :examples],
    )
    fresh = jax.tree.map(np.asarray, run.carry[0].optimizer)
    accuracy = np.zeros((config.seeds, count, count))
    for after in range(count):
        run.rows = rows[after][:, :examples]
        run.carry = run.carry[0]._replace(optimizer=fresh), jnp.asarray(division.numbers)
        for _ in range(config.epochs):
            run.steps_of_an_epoch()
            if advance:
                advance(1)
        hits = run.figures(dataset.x_test, dataset.y_test)["accuracy"]
        for seed, classes in enumerate(division.classes):
            for measured in range(count):
                accuracy[seed, after, measured] = hits[seed, np.isin(y_test, classes[measured])].mean()
    return accuracy


def table(accuracy: np.ndarray) -> str:
    """Accuracy in percent: a row after each task, a column for each task, and the mean of the tasks seen so far."""
    count = accuracy.shape[1]
    rows = []
    for after in range(count):
        cells = [results.text(results.statistics(accuracy[:, after, task]), 100, 1) for task in range(count)]
        seen = accuracy[:, after, : after + 1].mean(1)
        rows.append((f"task {after + 1}", *cells, results.text(results.statistics(seen), 100, 2)))
    return results.table(("after", *(f"task {i + 1} (%)" for i in range(count)), "tasks so far (%)"), rows)


def figure(accuracy: np.ndarray, title: str) -> Figure:
    """The accuracy of each task after each task from its own on: the mean over seeds and a band of one sd."""
    made = Figure(figsize=(7, 4.4), dpi=130, layout="constrained")
    axis = made.subplots()
    count = accuracy.shape[1]
    for task, style in zip(range(count), plots.styles(), strict=False):
        values = 100 * accuracy[:, task:, task]
        after, mean = np.arange(task + 1, count + 1), values.mean(0)
        sd = values.std(0, ddof=1) if len(values) > 1 else np.zeros_like(mean)
        axis.plot(after, mean, marker=".", label=f"task {task + 1}", **style)
        axis.fill_between(after, mean - sd, np.minimum(mean + sd, 100), color=style["color"], alpha=0.15, linewidth=0)
    axis.set(xlabel="tasks trained", ylabel="test accuracy (%)", title=title, xticks=range(1, count + 1))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize="small")
    return made


def main() -> None:
    config = cli.config(**FIXED)
    folder = cli.output_folder()
    dataset = build.dataset(config, data_dir=FLAGS.data_dir)
    division = divide(
        dataset, config.all_seeds, FLAGS.per_task, tuning=FLAGS.tuning
    )
    with Progress(division.classes.shape[1] * config.epochs, "epoch") as bar:
        accuracy = train(config, dataset, division, advance=bar.advance)
    count = accuracy.shape[1]
    content = {"config": config.to_dict(), "per_task": FLAGS.per_task, "tuning": FLAGS.tuning}
    content |= {"accuracy": accuracy, "classes": division.classes}
    content["final"] = results.statistics(accuracy[:, -1].mean(1))
    files.write_json(folder / "metrics.json", {"provenance": results.provenance()} | content)
    flat = [
        (config.seed + seed, after + 1, task + 1, accuracy[seed, after, task])
        for seed in range(config.seeds)
        for after in range(count)
        for task in range(count)
    ]
    files.write_csv(folder / "table.csv", ("seed", "after", "task", "accuracy"), flat)
    title = f"{config.rule}, {config.model} on {dataset.name}, {results.counted(config.seeds, 'seed')}"
    files.savefig(figure(accuracy, title), folder / "sequence.png")
    print(table(accuracy))
    print(f"\n{title}. Results: {folder}/metrics.json, table.csv, sequence.png")


if __name__ == "__main__":
    cli.define_config_flags(omit=tuple(FIXED), epochs=5, seeds=5, widths=(100,))
    cli.define_output_flags(output="results/sequence")
    flags.DEFINE_integer("per_task", 2, "The classes of a task.", lower_bound=2)
    flags.DEFINE_bool("tuning", False, "Divide the classes another way, to choose settings.")
    flags.adopt_module_key_flags(cli)
    cli.run(main)
