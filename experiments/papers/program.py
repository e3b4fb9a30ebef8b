"""The program of a paper. Its package gives the tables to `main`, which has these commands:

    python -m experiments.papers.baldi_2018 --list                     # the cells: done, reduced, missing
    python -m experiments.papers.baldi_2018 --table=1 --minutes=60     # measures missing cells; goes on after a stop
    python -m experiments.papers.baldi_2018 --table=1 --cells=SRBP --seeds=2 --epochs=20    # some of them, reduced
    python -m experiments.papers.baldi_2018 --report                   # README.md, pictures and data of the results
"""  # fmt: skip

import pathlib
import re
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments import build, cli, data, files, results, rules, signals
from experiments.config import Config
from experiments.errors import InputError, nearest
from experiments.papers import cells, report
from experiments.papers.cells import Cell, Job, Table
from experiments.progress import Progress

FLAGS = flags.FLAGS
PLACES = ("data_dir", "output", "work")
DATA = ("dataset", "classes", "validation")  # what a data set depends on


def define_flags() -> None:
    """Defines the flags of the program of a paper."""
    flags.DEFINE_list("table", [], "The tables to measure or show (default: all tables and figures).")
    flags.DEFINE_list("figure", [], "The figures to measure or show.")
    flags.DEFINE_list("section", [], "The sections to measure or show, for what a paper says without a table.")
    flags.DEFINE_string("cells", "", "Only cells with this text or regular expression in their name, also in --list.")
    flags.DEFINE_integer("seeds", None, "The number of seeds (default: as in the paper).", lower_bound=1)
    flags.DEFINE_integer("skip_seeds", 0, "Leave out the first seeds, which another machine has.", lower_bound=0)
    flags.DEFINE_integer("epochs", None, "The number of epochs (default: as in the paper).", lower_bound=1)
    flags.DEFINE_float("minutes", None, "Stop after this time; the same command goes on later.", lower_bound=0)
    flags.DEFINE_bool("quick", False, "One epoch and one seed.")
    flags.DEFINE_bool("list", False, "Show the cells: done, reduced, missing.")
    flags.DEFINE_bool("report", False, "Write and show the report of what is measured.")
    flags.DEFINE_string("data_dir", None, "The folder of prepared TFDS sets, or of NAME.npz files.")
    flags.DEFINE_string("output", None, "Folder for the cells (default: in the repository).")
    flags.DEFINE_string("work", "results/papers", "Folder for checkpoints.")
    cli.define_cache_flag()


class Wanted(NamedTuple):
    """Which cells to measure, how much of each, for how long, and where their data and checkpoints are."""

    pattern: re.Pattern[str] = re.compile("")
    epochs: int | None = None
    seeds: int | None = None
    skip_seeds: int = 0
    data_dir: str | None = None
    work: pathlib.Path = pathlib.Path("results/papers")


def main(tables: Mapping[str, Table], home: pathlib.Path, heading: str) -> int:
    """The program of a paper: its tables by name ("table 1", "figure 5"), the folder of its results, its title."""
    root = pathlib.Path(FLAGS.output).expanduser() if FLAGS.output else home
    chosen = choose(tables, FLAGS.table, FLAGS.figure, FLAGS.section)
    if FLAGS.report:
        files.check_writable(root)
        print(report.write(tables, root, heading))
        return 0
    epochs, seeds = (1, 1) if FLAGS.quick else (FLAGS.epochs, FLAGS.seeds)
    try:
        pattern = re.compile(FLAGS.cells)
    except re.error as error:
        raise InputError(f"--cells is not a regular expression ({error}): write it as in --cells=SRBP.") from None
    wanted = Wanted(pattern, epochs, seeds, FLAGS.skip_seeds, FLAGS.data_dir, pathlib.Path(FLAGS.work).expanduser())
    check(chosen, wanted)
    if FLAGS.list:
        print(report.listing(chosen, root, pattern))
        return 0
    with signals.Stop(seconds=FLAGS.minutes and 60 * FLAGS.minutes) as stop:
        run(chosen, root, wanted, stop)
    for key, table in chosen.items():
        print(f"{report.markdown(table, report.folder_of(root, key, table))}\n")
    if stop.requested:
        print(f"{stop.sentence} The same command goes on.")
    return stop.exit_code


def choose(
    tables: Mapping[str, Table], table: Sequence[str], figure: Sequence[str], section: Sequence[str] = ()
) -> dict[str, Table]:
    """The tables, figures and sections that the flags name; all of them without a name."""
    asked = []
    for kind, names in (("table", table), ("figure", figure), ("section", section)):
        known = [key.removeprefix(f"{kind} ") for key in tables if key.startswith(kind)]
        for name in names:
            if name not in known:
                raise InputError(f"There is no {kind} '{name}' here: {nearest(name, known)}")
        asked += [f"{kind} {name}" for name in names]
    return {key: table for key, table in tables.items() if key in asked or not asked}


def check(tables: Mapping[str, Table], wanted: Wanted) -> None:
    """Raises `InputError` if no cell has a wanted name, or no seed is left to measure."""
    if not (found := [cell for table in tables.values() for cell in table.to_measure(wanted.pattern)]):
        named = any(cell.named_by(wanted.pattern) for table in tables.values() for cell in table.cells)
        why = "is only quoted from the paper" if named else "is in these tables"
        some = "Each cell with this name" if named else "No cell with this name"
        raise InputError(f"--cells={wanted.pattern.pattern}: {some} {why}; --list shows the cells to measure.")
    if wanted.skip_seeds >= (seeds := max(wanted.seeds or cell.config.seeds for cell in found)):
        raise InputError(
            f"--skip_seeds={wanted.skip_seeds} leaves none of {results.counted(seeds, 'seed')}: "
            "give a larger --seeds, which counts the skipped ones, too."
        )


def run(tables: Mapping[str, Table], root: pathlib.Path, wanted: Wanted, stop: signals.Stop) -> None:
    """Measures the missing cells until it is asked to stop; each measured block of seeds is a file at once."""
    kept: dict[tuple[Any, ...], data.Dataset] = {}

    def dataset(config: Config) -> data.Dataset:
        own = tuple(getattr(config, name) for name in DATA)
        if own not in kept:
            kept.clear()
            # One division for all blocks of seeds, so that a seed does not depend on its block.
            kept[own] = data.on_device(build.dataset(config.replace(seed=0), data_dir=wanted.data_dir))
        return kept[own]

    for key, table in tables.items():
        folder = files.check_writable(report.folder_of(root, key, table))
        for cell in table.to_measure(wanted.pattern):
            epochs = min(wanted.epochs or cell.config.epochs, cell.config.epochs)
            for config in cells.missing(folder, cell, epochs, wanted.seeds or cell.config.seeds, wanted.skip_seeds):
                if stop.requested:
                    return
                rules.parse(config.rule)
                work = wanted.work / root.name / folder.name / f"{cell.stem}-{config.hash()}"
                content = _measured(cell, config, dataset, work, stop)
                if content is not None:
                    cells.keep(folder, cell, config, content)
                    shutil.rmtree(work, ignore_errors=True)  # a later measurement of the cell begins anew


def _measured(cell: Cell, config: Config, dataset: Any, work: pathlib.Path, stop: signals.Stop) -> Any:
    """The content of a cell's file; None if it was stopped."""
    begin = time.monotonic()
    with Progress(config.epochs, "epoch") as bar:
        bar.describe(cell.name)
        found = cell.measure(Job(config, cell.sweep, dataset, work, stop, bar))
    if found is None:
        return None
    content = {"cell": cell.name, "config": config.to_dict()} | ({"sweep": list(cell.sweep)} if cell.sweep else {})
    content |= {name: value for name, value in found.items() if name not in content and name != "hash"}
    return content | {"wall_seconds": time.monotonic() - begin, "provenance": _provenance()}


def _provenance() -> dict[str, Any]:
    """Versions, device, time, and the command without the folders of this machine."""
    found = results.provenance()
    return found | {"command": without_places(found["command"])}


def without_places(command: str) -> str:
    """A command without the flags that name folders of this machine, `--work=FOLDER` or `--work FOLDER`."""
    kept: list[str] = []
    words = iter(shlex.split(command))
    for word in words:
        name, given, _ = word.lstrip("-").partition("=")
        if not (word.startswith("-") and name in PLACES):
            kept.append(word)
        elif not given:
            next(words, None)
    return shlex.join(kept)
