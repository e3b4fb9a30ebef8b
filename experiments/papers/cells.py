"""Tables and figures of the papers as lists of cells. A cell is a run, and what the paper says about it.

    config = Config(dataset="mnist", rule="srbp(init=sparse(1))", seeds=5)
    Cell("Sparse-1", "SRBP", config, paper={"accuracy": (94.6, 0.6)})

A run gives its figures for each seed: `measure` trains a config, and a paper may have a `Measure` of its own. The file
of a measured block of seeds holds the config, those figures, some points of the curves, versions, device, commit and
time. Every seed is a run of its own, so the blocks of a cell add up, on whichever machine they were measured: to merge
two folders, copy their files. What was measured for fewer epochs than the config has is *reduced*, and so is a cell
with fewer seeds; reports say so, and a fuller run replaces it.
"""

import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import files, results, sweep
from experiments.config import Config
from experiments.data import Dataset
from experiments.errors import InputError
from experiments.keeper import Keeper, parts
from experiments.progress import Progress
from experiments.signals import Stop
from experiments.tasks import Task
from experiments.trial import Trial

POINTS = 25  # of a curve, that a file keeps
Number = tuple[float, float | None]  # mean and sd


class Job(NamedTuple):
    """What a `Measure` gets: the cell's config with the epochs and seeds to measure now, and where the work goes on.

    Attributes:
      config: what to train; `config.seed` and `config.seeds` are the block of seeds.
      sweep: the grid of the cell.
      dataset: loads the data set of a config; it keeps the last one.
      work: a folder for checkpoints, of this job alone.
      stop: whether to end after the present part; a job that ends so returns None and goes on in the same folder later.
      bar: shows what is done; `bar.restart` sets its total and its unit, which is an epoch at first.
    """

    config: Config
    sweep: Sequence[str]
    dataset: Callable[[Config], Dataset]
    work: pathlib.Path
    stop: Stop
    bar: Progress


# The figures of a job by name, each {"by_seed": [a number for each seed]}, and whatever else the file should hold, such
# as "curves"; None if it was stopped before the end.
Measure = Callable[[Job], Mapping[str, Any] | None]


def measure(job: Job, *, task: Task | None = None, training: bool = False) -> Mapping[str, Any] | None:
    """Trains a config to its end; of a grid, it has the figures of the point that the validation set chooses.

    Args:
      job: what to train.
      task: the model and its loss, where they are not those of the config.
      training: also measure the accuracy on the training set, where the curves have points; not for a grid.
    """
    dataset = job.dataset(job.config)
    trial = Trial(job.config, dataset, grid=sweep.parse(job.sweep, job.config), task=task)
    return trained(job, trial, measured_on=dataset if training else None)


def of_task(make: Callable[[Config, Dataset], Task]) -> Measure:
    """A `Measure` that trains the task that `make` builds for a config and its data set."""
    return lambda job: measure(job, task=make(job.config, job.dataset(job.config)))


def trained(job: Job, trial: Trial, *, measured_on: Dataset | None = None) -> Mapping[str, Any] | None:
    """Trains a trial to its end in the folder of a job, and gives its figures; None if it was stopped before.

    With a data set to be `measured_on`, it also has the accuracy on its training set.
    """
    described = {"config": job.config.to_dict(), "sweep": list(job.sweep)}
    with Keeper(trial, job.work, described, keep=1, resume=True) as kept:
        job.bar.restart(trial.config.epochs * trial.steps, trial.steps_done, unit="step")
        while not trial.finished and not job.stop.requested:
            record = trial.epoch(parts=parts(trial), advance=kept.after_part(job.bar, job.stop))
            if measured_on is not None and record is not None and trial.epochs in kept_epochs(trial.config.epochs):
                run = trial.runs[0]  # a checkpoint has its curve
                found = run.evaluate(measured_on.x_train, measured_on.y_train, batch_size=1000)
                run.curve[-1]["train_accuracy"] = found["accuracy"]
            kept.save(now=trial.finished or job.stop.requested)
            if record is not None:
                loss, accuracy = record.test_loss, record.accuracy
                job.bar.advance(0, f"{loss.mean():.3g}" if accuracy is None else f"{accuracy.mean():.2%}")
    if not trial.finished:
        return None
    result = trial.result()
    result |= result.pop("selected", {})  # the epoch that the validation set chooses, where the config asks for it
    curves = thin(result["curves"], trial.config.epochs)
    if measured_on is not None:
        curve = np.array([entry["train_accuracy"] for entry in trial.runs[0].curve if "train_accuracy" in entry])
        result["train_accuracy"] = results.statistics(curve[-1]) | {"by_seed": curve[-1]}
        curves["train_accuracy"] = curve
    return result | {"curves": curves}


def with_error(found: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The figures of a job, with "error", one minus the accuracy; for tables of papers that give errors."""
    if found is None:
        return None
    return {**found, "error": {"by_seed": 1 - np.asarray(found["accuracy"]["by_seed"])}}


def kept_epochs(epochs: int, points: int = POINTS) -> np.ndarray:
    """The epochs that curves keep, from 1; the first and the last are among them."""
    return np.unique(np.linspace(0, epochs - 1, min(points, epochs)).round().astype(int)) + 1


def thin(curves: Mapping[str, Any], epochs: int, points: int = POINTS) -> dict[str, Any]:
    """Some points of curves [epochs, ...], the first and the last among them, with their epochs."""
    kept = kept_epochs(epochs, points)
    return {"epoch": kept} | {name: np.asarray(curve)[kept - 1] for name, curve in curves.items()}


class Cell(NamedTuple):
    """One run of a table: its place, its config, and the numbers in the paper.

    Attributes:
      row, column: its place in the table, and the name that --cells searches.
      config: the run, with the settings and the number of seeds of the paper.
      paper: by figure, the mean and the sd in the paper (None: it does not give one), in the unit of the table.
      minutes: our estimate for one seed on two cores.
      gpu_minutes: our estimate for all seeds on one GPU.
      sweep: settings to choose on the validation set, as --sweep has them.
      measure: what runs it.
      beyond: whether the paper does not have this row.
      quoted: whether the paper's number alone is shown, and nothing is measured.
    """

    row: str
    column: str
    config: Config
    paper: Mapping[str, Number] = {}
    minutes: float = 1.0
    gpu_minutes: float | None = None
    sweep: Sequence[str] = ()
    measure: Measure = measure
    beyond: bool = False
    quoted: bool = False

    @property
    def name(self) -> str:
        return f"{self.row}, {self.column}" if self.column else self.row

    def named_by(self, pattern: re.Pattern[str]) -> bool:
        """Whether the pattern, or its text as it stands ("DP^T"), is in the name."""
        return bool(pattern.search(self.name)) or pattern.pattern in self.name

    @property
    def stem(self) -> str:
        """What the names of its files begin with."""
        return re.sub("[^a-z0-9]+", "_", self.name.lower().replace("α", "alpha")).strip("_")

    def described(self) -> dict[str, Any]:
        """What a file must have measured to count; epochs and seeds may be fewer."""
        config = {k: v for k, v in self.config.to_dict().items() if k not in ("epochs", "seed", "seeds")}
        return {"config": config, "sweep": list(self.sweep)}


class Shown(NamedTuple):
    """A figure in a table: its name in the files, its label, the unit that it is multiplied by, and its digits."""

    name: str = "accuracy"
    label: str = ""
    unit: float = 100
    digits: int = 2

    @property
    def axis(self) -> str:
        """Its label with the unit, for an axis."""
        return f"{self.label} (%)" if self.label and self.unit == 100 and "(" not in self.label else self.label


class Table(NamedTuple):
    """A table or a figure of a paper: its cells in the order of the paper.

    Attributes:
      title: what it shows, with the unit.
      cells: its cells.
      shown: the figures that each cell has in it.
      notes: on our settings, and reasons for differences; Markdown, or a function that makes it of the measured cells.
      plot: makes a picture of the measured cells; None: `report.comparison`, which sets ours beside the paper's.
      folder: the table whose files hold its cells, such as "table 1"; empty: its own.
    """

    title: str
    cells: Sequence[Cell]
    shown: Sequence[Shown] = (Shown(),)
    notes: str | Callable[[Sequence["Found"]], str] = ""
    plot: Callable[[Sequence["Found"]], Any] | None = None
    folder: str = ""

    def to_measure(self, pattern: re.Pattern[str] = re.compile("")) -> list[Cell]:
        """The cells that the pattern names, without the quoted ones."""
        return [cell for cell in self.cells if not cell.quoted and cell.named_by(pattern)]


class Found(NamedTuple):
    """What was measured of a cell: the epochs, the seeds, and the contents of the files in the order of their seeds."""

    cell: Cell
    epochs: int
    seeds: Sequence[int]
    contents: Sequence[Mapping[str, Any]]

    def values(self, figure: str) -> np.ndarray | None:
        """A figure for each seed; None if it was not measured."""
        if not all(figure in content for content in self.contents):
            return None
        return np.concatenate([np.asarray(c[figure]["by_seed"], float) for c in self.contents])

    def curve(self, figure: str) -> tuple[np.ndarray, np.ndarray]:
        """Epochs [points], and the figure there [points, seeds]."""
        curves = [content["curves"] for content in self.contents]
        return np.asarray(curves[0]["epoch"]), np.concatenate([np.asarray(c[figure], float) for c in curves], 1)

    @property
    def less(self) -> str:
        """What it has less than the cell's config, such as `20 of 100 epochs`; empty if it has all."""
        config = self.cell.config
        less = [f"{self.epochs} of {config.epochs} epochs"] if self.epochs < config.epochs else []
        if len(self.seeds) < config.seeds:
            less.append(f"{len(self.seeds)} of {results.counted(config.seeds, 'seed')}")
        return ", ".join(less)

    @property
    def star(self) -> str:
        """What stands behind its name in a picture: a star if it is reduced."""
        return "*" * bool(self.less)


def star_key(found: Sequence[Found]) -> str | None:
    """The title of a legend that says what the star is; None where nothing is reduced."""
    return "*: fewer epochs or seeds" if any(each.less for each in found) else None


def load(folder: pathlib.Path, cell: Cell) -> Found | None:
    """What was measured of a cell: of its files with the most epochs, every seed once; None if there is nothing."""
    whole: dict[int, list[tuple[range, Mapping[str, Any]]]] = {}
    for path in sorted(folder.glob(f"{cell.stem}.*.json")):
        config, content = read(path)
        if cell._replace(config=config, sweep=content.get("sweep", [])).described() == cell.described():
            whole.setdefault(config.epochs, []).append((config.all_seeds, content))
    if not whole:
        return None
    epochs = max(whole)
    seeds: list[int] = []
    contents = []
    for block, content in sorted(whole[epochs], key=lambda each: (-len(each[0]), each[0].start)):
        if not set(block) & set(seeds):  # a larger block may hold the seeds of a smaller one
            seeds += block
            contents.append(content)
    order = np.argsort([content["config"]["seed"] for content in contents])
    return Found(cell, epochs, sorted(seeds), [contents[i] for i in order])


def read(path: pathlib.Path) -> tuple[Config, Mapping[str, Any]]:
    """The config and the content of the file of a measured block; `InputError` if it is damaged or of another kind."""
    try:
        content = json.loads(path.read_text())
        return Config.from_dict(content["config"]), content
    except (OSError, ValueError, KeyError, TypeError, InputError) as error:
        why = str(error) if isinstance(error, InputError) else "damaged, or no file of a measured cell"
        raise InputError(f"{path} cannot be used ({why}): delete it, or copy it here again.") from None


def missing(folder: pathlib.Path, cell: Cell, epochs: int, seeds: int, skip: int = 0) -> list[Config]:
    """The runs that a cell still needs for so many epochs and seeds: one for each block of seeds without a gap.

    The first `skip` of the seeds are left out: another machine measures them.
    """
    found = load(folder, cell)
    if found is not None and found.epochs > epochs:
        return []
    done = set(found.seeds) if found is not None and found.epochs == epochs else set()
    left = [seed for seed in range(cell.config.seed, cell.config.seed + seeds)[skip:] if seed not in done]
    blocks: list[list[int]] = []
    for seed in left:
        if blocks and seed == blocks[-1][-1] + 1:
            blocks[-1].append(seed)
        else:
            blocks.append([seed])
    return [cell.config.replace(epochs=epochs, seed=block[0], seeds=len(block)) for block in blocks]


def keep(folder: pathlib.Path, cell: Cell, config: Config, content: Mapping[str, Any]) -> pathlib.Path:
    """Writes the file of a measured block, and removes those of fewer epochs that it replaces."""
    last = config.all_seeds[-1]
    seeds = f"{config.seed}" if config.seed == last else f"{config.seed}-{last}"
    reduced = "" if config.epochs == cell.config.epochs else f".{config.epochs}_epochs"
    path = folder / f"{cell.stem}.{seeds}{reduced}.json"
    files.write_atomic(path, _lines(content))
    for other in folder.glob(f"{cell.stem}.*.json"):
        before, _ = read(other)
        if before.epochs < config.epochs and set(before.all_seeds) <= set(config.all_seeds):
            other.unlink()
    return path


def _lines(content: Mapping[str, Any]) -> str:
    """JSON with a line for each entry, and floats of six digits, so that hundreds of files stay small."""
    text = json.dumps(files.plain({k: v for k, v in content.items() if k != "config"}, finite=True))
    rounded = {"config": content["config"]} | json.loads(text, parse_float=lambda t: float(f"{float(t):.6g}"))
    return "{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in rounded.items()) + "\n}\n"
