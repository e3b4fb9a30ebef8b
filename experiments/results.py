"""Results: figures over seeds, tables, files, and all that is needed to repeat them."""

import datetime
import functools
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
from scipy.special import stdtrit  # the quantile of Student's t; scipy.stats is slow to import

from experiments.files import savefig, write_csv, write_json
from experiments.loop import Record

Histories = Mapping[str, tuple[Sequence[Record], slice]]  # of each run, by name: its epochs, and its lanes there
Steps = Mapping[str, Sequence[Mapping[str, Any]]]  # of each run: its records inside the epochs, each figure [seeds]

PACKAGES = ("lrules", "jax", "jaxlib", "flax", "optax", "numpy")


# What tables show of a `Record`: the label, the unit and the digits.
FIGURES = {
    "accuracy": ("test accuracy (%)", 100, 2),
    "validation_accuracy": ("validation accuracy (%)", 100, 2),
    "attacked": ("test accuracy under attack (%)", 100, 2),
    "test_loss": ("test loss", 1, 4),
    "validation_loss": ("validation loss", 1, 4),
    "train_loss": ("training loss", 1, 4),
    "angle": ("angle to backprop (°)", 1, 1),
}


def statistics(values: np.ndarray) -> dict[str, Any]:
    """Mean, sample sd and half the width of the 95% interval of the mean over seeds; None where one seed has none."""
    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return {"mean": float(values.mean()), "sd": None, "interval": None}
    sd = float(values.std(ddof=1))
    return {"mean": float(values.mean()), "sd": sd, "interval": float(stdtrit(n - 1, 0.975) * sd / n**0.5)}


def text(values: Mapping[str, Any], unit: float = 1, digits: int = 2) -> str:
    """Statistics as `97.44 ± 0.49`: the mean and the sd, or the mean alone."""
    mean = number(unit * values["mean"], digits)
    return mean if values["sd"] is None else f"{mean} ± {number(unit * values['sd'], digits)}"


def summary(records: Sequence[Record], lanes: slice = slice(None), *, select: str = "last") -> dict[str, Any]:
    """The figures of the last epoch over seeds, those of each seed, and the curves [epochs][seeds] of some lanes.

    With `select="best_validation"` it also has, under "selected", the figures of the epoch in which each seed had its
    best validation accuracy (where there is no accuracy, its lowest validation loss).
    """
    last = records[-1]
    measured = [name for name in Record._fields if getattr(last, name) is not None and name not in ("epoch", "seconds")]
    curves = {name: np.array([getattr(record, name)[lanes] for record in records]) for name in measured}
    found: dict[str, Any] = {name: statistics(curve[-1]) | {"by_seed": curve[-1]} for name, curve in curves.items()}
    if select == "best_validation":
        if "validation_accuracy" in curves:
            best = np.nan_to_num(curves["validation_accuracy"]).argmax(0)
        else:
            best = np.nan_to_num(curves["validation_loss"], nan=np.inf).argmin(0)
        seeds = np.arange(len(best))
        found["selected"] = {
            name: statistics(curve[best, seeds]) | {"by_seed": curve[best, seeds]} for name, curve in curves.items()
        } | {"epoch_by_seed": best + 1}
    return found | {"curves": curves | {"seconds": [record.seconds for record in records]}}


def provenance() -> dict[str, Any]:
    """Versions, device, command and time."""
    device = jax.devices()[0]
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "device": describe_device(),
        "platform": device.platform,
        "processes": jax.process_count(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def _commit() -> str | None:
    """The commit of the checkout that runs, with a + if files differ from it; None outside a checkout."""
    git = ["git", "-C", str(pathlib.Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + "+" * bool(changed)


@functools.cache
def describe_device() -> str:
    """The name of the accelerator, or of the processor with its number of cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


@functools.cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 seed`, `5 seeds`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def number(value: float, digits: int) -> str:
    """A number with some digits; a huge one as 1.2e+30."""
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def mebibytes(size: float) -> str:
    """A number of bytes as `1.5 MiB`."""
    return f"{size / 2**20:.1f} MiB"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    rows = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = line(["-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)])
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def curve_rows(name: str, records: Sequence[Record], seeds: Sequence[int], lanes: slice) -> list[tuple[Any, ...]]:
    """A row per seed and epoch: name, seed, epoch, and every figure of a `Record` (empty where it was not measured)."""

    def figure(record: Record, field: str, lane: int) -> Any:
        values = getattr(record, field)
        return "" if values is None else float(values[lanes][lane])

    return [
        (name, seed, record.epoch, *(figure(record, field, lane) for field in CURVES))
        for record in records
        for lane, seed in enumerate(seeds)
    ]


CURVES = ("train_loss", "test_loss", "accuracy", "angle", "attacked", "validation_loss", "validation_accuracy")
PLACES = ("epoch", "step", "updates")


def step_table(steps: Steps, seeds: Sequence[int]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """The header and a row per seed and record inside the epochs: rule, seed, where it is, and what was measured."""
    figures = dict.fromkeys(name for own in steps.values() for record in own for name in record if name not in PLACES)
    rows = [
        (name, seed, *(record[p] for p in PLACES), *(float(record[f][i]) if f in record else "" for f in figures))
        for name, own in steps.items()
        for record in own
        for i, seed in enumerate(seeds)
    ]
    return ("rule", "seed", *PLACES, *figures), rows


def write(
    folder: pathlib.Path,
    content: Mapping[str, Any],
    histories: Histories,
    steps: Steps,
    seeds: Sequence[int],
    title: str | None,
    *,
    shown: Collection[str] | None = None,
) -> None:
    """Writes metrics.json, curves.csv, steps.csv if there are `steps`, and, with a title, curves.png.

    The figure has the runs `shown` (default: all).
    """
    write_json(folder / "metrics.json", {"provenance": provenance()} | dict(content))
    rows = [row for name, (records, lanes) in histories.items() for row in curve_rows(name, records, seeds, lanes)]
    write_csv(folder / "curves.csv", ("rule", "seed", "epoch", *CURVES), rows)
    if any(steps.values()):
        write_csv(folder / "steps.csv", *step_table(steps, seeds))
    if title:
        from experiments import plots  # matplotlib is slow to import

        of = {name: history for name, history in histories.items() if shown is None or name in shown}
        savefig(plots.learning_curves(of, title), folder / "curves.png")
