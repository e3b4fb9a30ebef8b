"""Tables of the papers. A table is a list of cells; a cell has the config of a run and the number in the paper.

The program of a paper gives its tables to `main`. Then it has these commands:

    python -m experiments.papers.baldi_2018 --list                   # the cells: done, reduced, missing, and their time
    python -m experiments.papers.baldi_2018 --table=1 --minutes=60   # trains missing cells; goes on where it stopped
    python -m experiments.papers.baldi_2018 --table=1 --cells="SRBP" --seeds=2 --epochs=20   # some cells, reduced
    python -m experiments.papers.baldi_2018 --table=1 --report       # the table as Markdown, from the finished cells

A finished cell is one JSON file: config, figures for each seed, some points of the curves, versions, device, time. To
combine the results of two machines, copy their files into one folder. A cell with fewer epochs or seeds than its config
is *reduced*: the table marks it, and a full run replaces it.
"""

import json
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments import build, cli, data, files, results, rules, signals
from experiments.config import Config
from experiments.errors import InputError, nearest
from experiments.keeper import Keeper
from experiments.progress import Progress
from experiments.trial import Trial

FLAGS = flags.FLAGS
POINTS = 25  # how many points of a curve a file keeps


class Cell(NamedTuple):
    """One number of a table.

    Attributes:
      row, column: its place in the table.
      config: the run that measures it, with the paper's settings and seeds.
      paper, spread: the number in the paper and its sd, in percent; None if the paper does not give it.
      minutes: our estimate of the time for one seed on two cores.
      beyond: whether the paper does not have this row.
    """

    row: str
    column: str
    config: Config
    paper: float | None = None
    spread: float | None = None
    minutes: float = 1.0
    beyond: bool = False

    @property
    def name(self) -> str:
        """The name that --cells searches."""
        return f"{self.row}, {self.column}"

    @property
    def file(self) -> str:
        """The name of the file of this cell."""
        return re.sub("[^a-z0-9]+", "_", self.name.lower()).strip("_") + ".json"


class Table(NamedTuple):
    """A table: its title, its cells in the order of the paper, and notes on our settings."""

    title: str
    cells: Sequence[Cell]
    notes: str = ""


class Measured(NamedTuple):
    """The content of a cell's file: test accuracy in percent for each seed, the epochs, and all the rest."""

    accuracy: np.ndarray
    epochs: int
    content: Mapping[str, Any]

    def reduced(self, cell: Cell) -> str:
        """What it has less than the cell's config, such as `20 of 100 epochs`; empty if it has all."""
        less = [f"{self.epochs} of {cell.config.epochs} epochs"] if self.epochs < cell.config.epochs else []
        if len(self.accuracy) < cell.config.seeds:
            less.append(f"{len(self.accuracy)} of {cell.config.seeds} seeds")
        return ", ".join(less)


def load(folder: pathlib.Path, cell: Cell) -> Measured | None:
    """The measured cell; None if there is no file, or a file with other settings."""
    try:
        content = json.loads((folder / cell.file).read_text())
    except FileNotFoundError:
        return None
    found = Config.from_dict(content["config"])
    same = cell.config.replace(epochs=found.epochs, seeds=found.seeds)
    if found != same:
        return None
    return Measured(100 * np.array(content["accuracy"]["by_seed"], float), found.epochs, content)


def missing(folder: pathlib.Path, cell: Cell, config: Config) -> bool:
    """Whether a run of `config` (perhaps reduced) has more epochs than the file, or as many and more seeds."""
    there = load(folder, cell)
    return there is None or (there.epochs, len(there.accuracy)) < (config.epochs, config.seeds)


def measure(cell: Cell, config: Config, dataset: data.Dataset, work: pathlib.Path, stop: signals.Stop) -> Any:
    """Trains a cell, or goes on with it. Returns the content of its file, or None if it was stopped before the end."""
    begin = time.monotonic()
    trial = Trial(config, dataset)
    described = {"cell": cell.name, "config": config.to_dict()}
    folder = work / f"{cell.file.removesuffix('.json')}-{config.hash()}"
    with (
        Keeper(trial, folder, described, keep=1, resume=True) as kept,
        Progress(config.epochs, "epoch", begin=trial.epochs) as bar,
    ):
        bar.describe(cell.name)
        while not trial.finished and not stop.requested:
            record = trial.epoch(advance=lambda _: stop.requested)
            kept.save(now=trial.finished or stop.requested)
            if record is not None:
                bar.advance(1, f"{record.accuracy.mean():.2%}")
    if not trial.finished:
        return None
    figures = trial.summary(0)
    curves = figures.pop("curves")
    points = np.unique(np.linspace(0, config.epochs - 1, min(POINTS, config.epochs)).round().astype(int))
    thin = {name: np.asarray(values)[points] for name, values in curves.items()}
    content = {"cell": cell.name, "config": config.to_dict()} | figures
    content |= {"curves": {"epoch": points + 1} | thin, "seconds": sum(curves["seconds"])}
    return content | {"wall_seconds": time.monotonic() - begin, "provenance": results.provenance()}


def report(table: Table, folder: pathlib.Path) -> str:
    """The table as Markdown: numbers of the paper and ours, in the order of the paper; then rows beyond the paper."""
    columns = list(dict.fromkeys(cell.column for cell in table.cells))
    header = ["", *(text for column in columns for text in (f"{column}, paper", f"{column}, ours"))]
    rows: list[list[str]] = []
    remarks: list[str] = []
    for beyond in (False, True):
        own = [cell for cell in table.cells if cell.beyond == beyond]
        if beyond and own:
            rows.append(["*beyond the paper*", *[""] * (len(header) - 1)])
        for row in dict.fromkeys(cell.row for cell in own):
            line = [row]
            for column in columns:
                cell = next((cell for cell in own if (cell.row, cell.column) == (row, column)), None)
                line += ["", ""] if cell is None else [_papers(cell), _ours(folder, cell, remarks)]
            rows.append(line)
    shown = f"{table.title}\n\n{results.table(header, rows)}"
    return "\n\n".join(filter(None, [shown, "\n".join(remarks), table.notes]))


def _papers(cell: Cell) -> str:
    if cell.paper is None:
        return "-"
    return f"{cell.paper:g}" + ("" if cell.spread is None else f" ± {cell.spread:g}")


def _ours(folder: pathlib.Path, cell: Cell, remarks: list[str]) -> str:
    found = load(folder, cell)
    if found is None:
        return "missing"
    figures = results.statistics(found.accuracy)
    less = found.reduced(cell)
    ours = results.text(figures) + ("*" if less else "")
    if less:
        remarks.append(f"\\* {cell.name}: {less}.")
    sd = max(filter(None, (figures["sd"], cell.spread)), default=None)
    if not less and cell.paper is not None and sd and abs(figures["mean"] - cell.paper) > 2 * sd:
        remarks.append(f"{cell.name}: {figures['mean'] - cell.paper:+.2f} from the paper, more than two sd.")
    return ours


def listing(tables: Mapping[str, Table], root: pathlib.Path) -> str:
    """A list of all cells: done, reduced or missing, and the minutes that they need on two cores."""
    rows = []
    for key, table in tables.items():
        for cell in table.cells:
            found = load(root / f"table_{key}", cell)
            less = "" if found is None else found.reduced(cell)
            state = "missing" if found is None else f"reduced: {less}" if less else "done"
            needs = 0.0 if state == "done" else cell.minutes * cell.config.seeds
            rows.append((f"{key}: {cell.name}", state, f"{needs:.0f}"))
    return results.table(("table, cell", "state", "minutes, two cores"), rows)


def define_flags() -> None:
    """Defines the flags of the program of a paper."""
    flags.DEFINE_string("table", None, "The table to train or show (default: all).")
    flags.DEFINE_string("cells", "", "Only cells with this regular expression in their name.")
    flags.DEFINE_integer("seeds", None, "The number of seeds (default: as in the paper).", lower_bound=1)
    flags.DEFINE_integer("epochs", None, "The number of epochs (default: as in the paper).", lower_bound=1)
    flags.DEFINE_float("minutes", None, "Stop after this time; the same command goes on later.", lower_bound=0)
    flags.DEFINE_bool("quick", False, "One epoch and one seed.")
    flags.DEFINE_bool("list", False, "Show the cells: done, reduced, missing.")
    flags.DEFINE_bool("report", False, "Show the tables, from the finished cells.")
    flags.DEFINE_string("data_dir", None, "The folder of prepared TFDS sets, or of NAME.npz files.")
    flags.DEFINE_string("output", None, "Folder for the cells (default: in the repository).")
    flags.DEFINE_string("work", "results/papers", "Folder for checkpoints.")
    cli.define_cache_flag()


def main(tables: Mapping[str, Table], home: pathlib.Path) -> int:
    """The program of a paper. The files of its cells are in `home`."""
    root = pathlib.Path(FLAGS.output).expanduser() if FLAGS.output else home
    if FLAGS.table is not None and FLAGS.table not in tables:
        raise InputError(f"There is no table '{FLAGS.table}' here: {nearest(FLAGS.table, tables)}")
    chosen = {key: table for key, table in tables.items() if FLAGS.table in (None, key)}
    if FLAGS.list:
        print(listing(chosen, root))
    elif FLAGS.report:
        print("\n\n".join(report(table, root / f"table_{key}") for key, table in chosen.items()))
    else:
        epochs, seeds = (1, 1) if FLAGS.quick else (FLAGS.epochs, FLAGS.seeds)
        try:
            pattern = re.compile(FLAGS.cells)
        except re.error as error:
            raise InputError(f"--cells is not a regular expression ({error}): write it as in --cells=SRBP.") from None
        wanted = Wanted(pattern, epochs, seeds, FLAGS.minutes, FLAGS.data_dir, pathlib.Path(FLAGS.work))
        return run(chosen, root, wanted)
    return 0


class Wanted(NamedTuple):
    """Which cells to train, how much of each, for how long, and where their data and checkpoints are."""

    pattern: re.Pattern[str]
    epochs: int | None
    seeds: int | None
    minutes: float | None
    data_dir: str | None
    work: pathlib.Path

    def of(self, config: Config) -> Config:
        """The config with these seeds, and with these epochs if they are fewer."""
        epochs = min(self.epochs or config.epochs, config.epochs)
        return config.replace(epochs=epochs, seeds=self.seeds or config.seeds)


def run(tables: Mapping[str, Table], root: pathlib.Path, wanted: Wanted) -> int:
    """Trains the missing cells."""
    sets: dict[tuple[Any, ...], data.Dataset] = {}
    with signals.Stop(seconds=wanted.minutes and 60 * wanted.minutes) as stop:
        for key, table in tables.items():
            folder = files.check_writable(root / f"table_{key}")
            for cell in (cell for cell in table.cells if wanted.pattern.search(cell.name)):
                config = wanted.of(cell.config)
                rules.parse(config.rule)
                if stop.requested or not missing(folder, cell, config):
                    continue
                own = config.dataset, config.classes, config.validation, config.seed
                if own not in sets:
                    sets[own] = data.on_device(build.dataset(config, data_dir=wanted.data_dir))
                content = measure(cell, config, sets[own], wanted.work / f"table_{key}", stop)
                if content is not None:
                    files.write_json(folder / cell.file, content)
            print(report(table, folder))
    if stop.requested:
        print(f"\n{stop.sentence} The same command goes on.")
    return stop.exit_code
