"""Train one network on several tasks in sequence, and measure every task after every task (Split-MNIST).

    python -m experiments.sequence                                     # digits: five pairs of classes, half a minute
    python -m experiments.sequence --dataset=mnist --rule='backman("gradient_norm")' --seeds=100

The classes are divided at random, for each seed anew, into tasks of two (--per_task). Within a task they are numbered
from 0, so one head serves all tasks. The optimizer and its schedule start anew with each task. Every task has as many
training examples as the two rarest classes have. All seeds train at once. With --tuning the division is another one,
for choosing settings. The program writes metrics.json, table.csv and sequence.png.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

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
        """The examples of a task [seeds, examples]: as many as the rarest classes have together."""
        count = np.sort(np.bincount(labels, minlength=self.numbers.shape[1]))[: self.classes.shape[2]].sum()
        found = [np.flatnonzero(np.isin(labels, classes[task])) for classes in self.classes]
        return np.stack([rows[:count] for rows in found]).astype(np.int32)


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

    def lies(carry: PyTree, x: Any) -> PyTree:
        assert method.lies is not None
        return method.lies(carry[0], x), carry[1].sharding

    return Method(init, step, evaluate, lies=method.lies and lies, convolves=method.convolves)


class Course:
    """The training on all tasks in turn, epoch by epoch.

    Attributes:
      config, epochs, finished: what is trained, the epochs done, and whether those of all tasks are.
      accuracy: of every task after every task [lanes, after, task]; 0 for what is not measured yet.
    """

    def __init__(
        self,
        config: Config,
        dataset: data.Dataset,
        division: Division,
        *,
        rates: Sequence[float] = (),
        part: Literal["test", "val"] = "test",
    ):
        """Compiles; each seed is a lane, and with `rates` each learning rate has all seeds; `part` is measured."""
        self.config, self.epochs = config, 0
        lanes = max(1, len(rates))
        self.classes = np.tile(division.classes, (lanes, 1, 1))
        self._numbers = np.tile(division.numbers, (lanes, 1))
        self._measured: Any = dataset.parts[part]
        labels, count = np.asarray(dataset.y_train), division.classes.shape[1]
        self._rows = [np.tile(division.rows(labels, task), (lanes, 1)) for task in range(count)]
        task = tasks.build(config, dataset._replace(classes=division.classes.shape[2]))
        steps = steps_per_epoch(dataset, config.batch_size, self._rows[0].shape[1])

        def method(**settings: Any) -> Method:
            return renumbered(build.method(config, task, steps, **settings), dataset.classes)

        self._run = Run(
            method if rates else method(),
            dataset,
            seeds=[*config.all_seeds] * lanes,
            settings={"learning_rate": [rate for rate in rates for _ in config.all_seeds]} if rates else None,
            batch_size=config.batch_size,
            probe=0,
            rows=self._rows[0],
            parts=1,
        )
        self._fresh = jax.tree.map(np.asarray, self._run.carry[0].optimizer)
        self.accuracy = np.zeros((len(self.classes), count, count))

    @property
    def finished(self) -> bool:
        return self.epochs == len(self._rows) * self.config.epochs

    def epoch(self) -> None:
        """Trains for an epoch on the present task; after its last one, measures all tasks."""
        task, begun = divmod(self.epochs, self.config.epochs)
        self._run.rows = self._rows[task]
        if not begun:
            self._run.carry = self._run.carry[0]._replace(optimizer=self._fresh), jnp.asarray(self._numbers)
        self._run.steps_of_an_epoch()
        self.epochs += 1
        if begun + 1 == self.config.epochs:
            x, y = self._measured
            hits, y = self._run.figures(x, y)["accuracy"], np.asarray(y)
            for lane, classes in enumerate(self.classes):
                self.accuracy[lane, task] = [hits[lane, np.isin(y, own)].mean() for own in classes]

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on, and what is measured."""
        return {"run": self._run.state(), "epochs": self.epochs, "accuracy": self.accuracy}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state`."""
        self._run.restore(state["run"])
        self.epochs, self.accuracy = int(state["epochs"]), np.array(state["accuracy"])


def train(
    config: Config,
    dataset: data.Dataset,
    division: Division,
    *,
    advance: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """Test accuracy of every task after every task [seeds, after, task], each task trained for the config's epochs."""
    course = Course(config, dataset, division)
    while not course.finished:
        course.epoch()
        if advance:
            advance(1)
    return course.accuracy


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
    division = divide(dataset, config.all_seeds, FLAGS.per_task, tuning=FLAGS.tuning)
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
