"""How a cell of the paper is measured: settings are chosen on validation data, then each set trains with them.

1. Points of the grid train on the sets of the first `CHOOSING` seeds, for fewer epochs. The point with the best
   validation accuracy is the cell's (the mean over these sets, of the best epoch of each).
2. With it, the set of each seed trains for all epochs. "test" is the test accuracy of the epoch with the best
   validation accuracy, and "train" the highest training accuracy of all epochs, as in the paper.

So a seed has the same figures whichever other seeds are measured with it. Each training run is alone on the device: on
two cores runs that train together take no less time, and on a GPU their convolutions would become grouped ones (whether
these are slower there is not measured). All runs of a cell share two compiled programs, one for SGD and one for the
other optimizers.
"""

import json
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import files, results, rules
from experiments.checkpoints import Checkpoints
from experiments.config import Config
from experiments.errors import InputError
from experiments.methods import Carry, Method, by_rule
from experiments.papers.cells import Job
from experiments.papers.lechner_2020 import nets
from experiments.papers.lechner_2020.sets import Sets, draw

Array = jax.Array
CHOOSING = 2  # sets that choose the settings
EVERY = 5  # epochs between two measurements
CHUNK = 600  # images that are classified at once
SAVE = 60.0  # seconds between two checkpoints of a training run

# b1, b2, epsilon: RMSprop (with its bias corrected) is Adam with other numbers, so that one program has both.
ADAM = {"adam": (0.9, 0.999, 1e-8), "rmsprop": (0.0, 0.9, 1e-8)}
OPTIMIZERS = ("sgd", *ADAM)
CURVES = ("epoch", "train", "val", "test")


class Point(NamedTuple):
    """The settings of a training run."""

    start: str
    optimizer: str
    rate: float

    def text(self) -> str:
        return f"{self.optimizer} {self.rate:g}, {self.start}"


def points(grid: Sequence[str]) -> list[Point]:
    """The points of a grid such as `start=zeros,normal`, `sgd=0.1,0.3`, `adam=0.001`: an optimizer has its rates."""
    values = {name: text.split(",") for name, text in (each.split("=") for each in grid)}
    starts = values.pop("start")
    if unknown := {*values}.difference(OPTIMIZERS) | {*starts}.difference(nets.STARTS):
        known = f"the optimizers {', '.join(OPTIMIZERS)} and the starts {', '.join(nets.STARTS)}"
        raise InputError(f"A grid has {known}, got {', '.join(sorted(unknown))}.")
    return [Point(s, name, float(rate)) for s in starts for name, rates in values.items() for rate in rates]


def choosing_epochs(config: Config) -> int:
    """Epochs in which points are compared: about as many steps for each number of classes."""
    return min(config.epochs, max(3, 30 // int(config.classes)))


class Program:
    """The compiled functions of a cell: a training run is a point, a seed and its set."""

    def __init__(self, config: Config, sets: Sets, shape: Sequence[int], grid: Sequence[Point]):
        self.config, self.sets, self.shape = config, sets, shape
        self.starts = list(dict.fromkeys(point.start for point in grid))
        self.task, self.rule = nets.task(config, shape, int(config.classes)), rules.parse(config.rule)
        examples = sets.rows["train"].shape[1]
        self.steps = examples // config.batch_size
        if not self.steps:
            raise InputError(f"The batch size must be <= {examples}, the images of a set, got {config.batch_size}.")
        self.x, self.y = jnp.asarray(sets.x), jnp.asarray(sets.y)
        self.looped = jax.default_backend() != "cpu" or config.model == "mlp"  # convolutions: see experiments/loop.py
        self._begin = jax.jit(self._first, static_argnums=0)
        self._train = jax.jit(self._steps, static_argnums=0, donate_argnums=2)
        self._hits = jax.jit(self._classified)

    def method(self, sgd: bool, settings: Mapping[str, Any]) -> Method:
        """What trains; the settings are traced numbers. SGD has a program of its own, as it is cheaper than Adam."""
        rate, mono_net = settings["rate"], bool(self.config.mono_net)
        optimizer = optax.sgd(rate)
        if not sgd:
            optimizer = optax.adam(rate, settings["b1"], settings["b2"], settings["eps"])
        task = nets.start(self.task, self.shape, self.starts, settings["start"], mono_net=mono_net)
        return by_rule(task, self.rule, optimizer, angle=False)

    def settings(self, point: Point) -> tuple[bool, dict[str, np.float32]]:
        """Whether a point has SGD, and its numbers."""
        b1, b2, eps = ADAM.get(point.optimizer, (0.0, 0.0, 0.0))
        named = {"rate": point.rate, "b1": b1, "b2": b2, "eps": eps, "start": self.starts.index(point.start)}
        return point.optimizer == "sgd", {name: np.float32(value) for name, value in named.items()}

    def _first(self, sgd: bool, settings: Any, key: Array, x: Array) -> Carry:
        return self.method(sgd, settings).init(key, x, jnp.zeros(len(x), jnp.int32))

    def begin(self, point: Point, key: Array) -> Carry:
        """The weights of a training run before the first step."""
        return self._begin(*self.settings(point), key, self.x[: self.config.batch_size])

    def _steps(
        self, sgd: bool, settings: Any, carry: Carry, key: Array, order: Array, x: Array, y: Array, numbers: Array
    ) -> Carry:
        step = self.method(sgd, settings).step

        def body(i: Any, carry: Carry) -> Carry:
            return step(carry, jax.random.fold_in(key, i), x[order[i]], numbers[y[order[i]]])[0]

        return jax.lax.fori_loop(0, len(order), body, carry) if self.looped else body(0, carry)

    def epoch(self, point: Point, carry: Carry, key: Array, place: int) -> Carry:
        """Trains for an epoch on the set at a place."""
        keys = jax.random.split(key)
        rows = jax.random.permutation(keys[0], self.sets.rows["train"][place])
        order = rows[: self.steps * self.config.batch_size].reshape(self.steps, -1)
        numbers = self.sets.numbers[place]
        parts = [order] if self.looped else [order[i : i + 1] for i in range(self.steps)]
        sgd, settings = self.settings(point)
        for i, part in enumerate(parts):
            own = jax.random.fold_in(keys[1], i)
            carry = self._train(sgd, settings, carry, own, part, self.x, self.y, numbers)
        return carry

    def _classified(self, params: Any, state: Any, x: Array, y: Array, numbers: Array, rows: Array) -> Array:
        return nets.hits(self.task.predict(params, state, self.task.prepare(x[rows])), numbers[y[rows]])

    def accuracies(self, carry: Carry, place: int) -> dict[str, float]:
        """The accuracy on each part of the set at a place."""
        parts = {name: rows[place] for name, rows in self.sets.rows.items()}
        rows = np.concatenate(list(parts.values()))
        padded = np.resize(rows, (-(-len(rows) // CHUNK), CHUNK))
        found = [
            self._hits(carry.params, carry.state, self.x, self.y, self.sets.numbers[place], chunk) for chunk in padded
        ]
        ends = np.cumsum([len(rows) for rows in parts.values()])[:-1]
        by_part = np.split(np.concatenate(found)[: len(rows)], ends)
        return {name: float(own.mean()) for name, own in zip(parts, by_part, strict=True)}


def run(program: Program, job: Job, point: Point, seed: int, epochs: int) -> dict[str, Any] | None:
    """The curves of a training run: accuracies at some epochs; None if it was stopped, to go on later.

    It begins with its file, or else with its last checkpoint. They lie where all jobs of the cell find them.
    """
    place, shared = program.sets.seeds.index(seed), program.config.replace(epochs=1)
    name = f"{point.text()} seed {seed} epochs {epochs}".replace(",", "").replace(" ", "_")
    folder = job.work.parent / f"runs-{shared.hash()}" / name
    kept = folder.parent / f"{name}.json"
    if kept.is_file():
        job.bar.advance(epochs)
        return json.loads(kept.read_text())
    key = jax.random.key(seed)
    carry, curves, last = program.begin(point, key), {name: list[float]() for name in CURVES}, time.monotonic()
    with Checkpoints(folder, {"config": shared.to_dict(), "run": name}, keep=1) as saved:
        done = 0
        if (found := saved.restore(carry)) is not None:
            done, carry, curves = found.step, found.state, found.extra
            job.bar.advance(done)
        for epoch in range(done + 1, epochs + 1):
            carry = program.epoch(point, carry, jax.random.fold_in(jax.random.fold_in(key, 2), epoch), place)
            if epoch % EVERY == 0 or epoch == epochs:
                curves["epoch"].append(epoch)
                for part, value in program.accuracies(carry, place).items():
                    curves[part].append(value)
            job.bar.advance(1, f"{point.text()}: {curves['val'][-1]:.1%}" if curves["val"] else None)
            stopped = job.stop.requested and epoch < epochs
            if stopped or time.monotonic() - last > SAVE:
                saved.save(epoch, carry, curves)
                last = time.monotonic()
            if stopped:
                return None
    files.write_json(kept, curves)
    shutil.rmtree(folder)
    return curves


def score(curves: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """The validation accuracy of a point: of the best epochs, and of all measured epochs, which breaks ties."""
    validation = [curve["val"] for curve in curves]
    return statistics.mean(map(max, validation)), statistics.mean(map(statistics.mean, validation))


def choose(program: Program, job: Job, grid: Sequence[Point]) -> list[dict[str, Any]] | None:
    """The points that were compared, the best one first; None if it was stopped.

    First the optimizers and their rates, with the first start of the grid; then the other starts, with the best one.
    """
    compared: list[tuple[tuple[float, ...], Point]] = []

    def compare(points: Sequence[Point]) -> bool:
        for point in points:
            curves = []
            for seed in range(CHOOSING):
                found = run(program, job, point, seed, choosing_epochs(program.config))
                if found is None:
                    return False
                curves.append(found)
            compared.append((score(curves), point))
        compared.sort(key=lambda each: each[0], reverse=True)
        return True

    if not compare([point for point in grid if point.start == grid[0].start]):
        return None
    best = compared[0][1]
    if not compare([point for point in grid if point.start != best.start and point[1:] == best[1:]]):
        return None
    return [{**point._asdict(), "validation": figures[0]} for figures, point in compared]


def measure(job: Job) -> Mapping[str, Any] | None:
    """Chooses the settings, and trains each seed's set with them."""
    config, grid = job.config, points(job.sweep)
    whole = job.dataset(config.replace(classes="", validation=0.0, seed=0))
    seeds = sorted({*range(CHOOSING), *config.all_seeds})
    program = Program(config.replace(seed=0, seeds=1), draw(whole, config, seeds), whole.shape, grid)
    trials = len(grid) // len(program.starts) + len(program.starts) - 1
    job.bar.restart(trials * CHOOSING * choosing_epochs(config) + config.seeds * config.epochs)
    compared = choose(program, job, grid)
    if compared is None:
        return None
    chosen = Point(*[compared[0][name] for name in Point._fields])
    curves = []
    for seed in config.all_seeds:
        own = run(program, job, chosen, seed, config.epochs)
        if own is None:
            return None
        curves.append(own)
    best = [int(np.argmax(own["val"])) for own in curves]
    figures = {
        "train": [max(own["train"]) for own in curves],
        "test": [own["test"][i] for own, i in zip(curves, best, strict=True)],
        "validation": [max(own["val"]) for own in curves],
        "best_epoch": [own["epoch"][i] for own, i in zip(curves, best, strict=True)],
    }
    content: dict[str, Any] = {name: results.statistics(np.array(v)) | {"by_seed": v} for name, v in figures.items()}
    by_epoch = {part: np.transpose([own[part] for own in curves]) for part in CURVES[1:]}
    content |= {"chosen": chosen._asdict(), "compared": compared, "choosing_epochs": choosing_epochs(config)}
    return content | {"curves": {"epoch": curves[0]["epoch"]} | by_epoch}
