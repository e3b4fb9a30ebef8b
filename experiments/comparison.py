"""Runs of several days beside each other: their curves read from files, and differences to the first over seeds.

    runs = comparison.read(["monday/metrics.json", "tuesday/curves.csv"])
    comparison.differences(runs, "accuracy")
"""  # fmt: skip

import csv
import json
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from experiments import results
from experiments.errors import InputError, nearest
from experiments.loop import Record

WRITTEN_BY = "give the metrics.json or curves.csv of experiments.train or experiments.compare"
OF_RUN = ("rule", "seed", "seeds")  # in these fields the configs of two runs may differ, without a remark


class Series(NamedTuple):
    """One run: its name, its seeds, a record for each epoch, and its config where the file has it."""

    name: str
    seeds: tuple[int, ...]
    records: list[Record]
    config: Mapping[str, Any] | None = None


class Difference(NamedTuple):
    """A run minus the first: the mean, half the 95% interval, and the effect size, which need two seeds."""

    mean: float
    interval: float | None
    effect: float | None
    paired: bool


# ------------------------------------------------------------------------------------------------------------- reading


def read(paths: Sequence[str]) -> list[Series]:
    """The runs of some files, in their order; where two have one name, it is followed by that of the folder or file.

    Raises:
      InputError: a file cannot be read, or has no curves.
    """
    found: list[tuple[pathlib.Path, Series]] = []
    for path in map(pathlib.Path, paths):
        try:
            text = path.expanduser().read_text()
            of_file = _from_csv(text) if path.suffix == ".csv" else _from_json(json.loads(text))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): {WRITTEN_BY}.") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise InputError(f"{path} has no curves that can be read: {WRITTEN_BY}.") from None
        found += [(path, series) for series in of_file]
    names = [[s.name, f"{s.name} ({path.parent.name})", f"{s.name} ({path})"] for path, s in found]
    times = Counter(name for own in names for name in own)
    for own in names:
        if times[own[-1]] > 1:
            raise InputError(f"{own[-1]} is given twice: give each file once.")
    return [
        series._replace(name=next(name for name in own if times[name] == 1))
        for own, (_, series) in zip(names, found, strict=True)
    ]


def _from_json(content: Any) -> list[Series]:
    """The run of `experiments.train`, or the rules of `experiments.compare` that were not refused."""
    runs = content.get("rules") or {content.get("rule"): content}
    config = content["config"]
    seeds = tuple(range(config.get("seed", 0), config.get("seed", 0) + config.get("seeds", 1)))
    found = []
    for name, run in runs.items():
        if "refused" in run:
            continue
        figures = {k: np.array(v, float) for k, v in run["curves"].items() if k in Record._fields}  # None becomes NaN
        seconds = figures.pop("seconds", np.zeros(len(figures["train_loss"])))
        if any(values.shape != (len(seconds), len(seeds)) for values in figures.values()):
            raise ValueError
        records = [
            Record(epoch=i + 1, seconds=float(seconds[i]), **{k: values[i] for k, values in figures.items()})
            for i in range(len(seconds))
        ]
        found.append(Series(str(name), seeds, records, config))
    return found


def _from_csv(text: str) -> list[Series]:
    """The rules of a curves.csv."""
    runs: dict[str, dict[int, dict[int, dict[str, str]]]] = {}
    for row in csv.DictReader(text.splitlines()):
        runs.setdefault(row["rule"], {}).setdefault(int(row["seed"]), {})[int(row["epoch"])] = row
    if not runs:
        raise ValueError
    found = []
    for name, by_seed in runs.items():
        epochs = list(next(iter(by_seed.values())))
        for seed, rows in by_seed.items():
            if list(rows) != epochs:
                raise InputError(f"seed {seed} of '{name}' has not the epochs of the other seeds: add what is missing.")
        records = []
        for epoch in epochs:
            rows_of = [rows[epoch] for rows in by_seed.values()]
            figures: dict[str, Any] = {
                figure: np.array([row[figure] for row in rows_of], float)
                for figure in results.CURVES
                if rows_of[0].get(figure)  # an empty cell was not measured
            }
            records.append(Record(epoch=epoch, **figures))
        found.append(Series(name, tuple(by_seed), records))
    return found


# ---------------------------------------------------------------------------------------------------------- comparing


def measured(runs: Sequence[Series]) -> list[str]:
    """The figures that every run has, in the order of `results.FIGURES`."""
    return [f for f in results.FIGURES if all(getattr(run.records[-1], f) is not None for run in runs)]


def figure_of(runs: Sequence[Series], wanted: str | None) -> str:
    """The figure that is asked for, or else the test accuracy or loss.

    Raises:
      InputError: a run does not have it.
    """
    offered = measured(runs)
    if wanted is None:
        wanted = next((figure for figure in ("accuracy", "test_loss") if figure in offered), None)
    if wanted not in offered:
        raise InputError(f"These runs do not all have the figure '{wanted}': {nearest(str(wanted), offered)}")
    return wanted


def values_of(run: Series, figure: str, select: str = "last") -> np.ndarray:
    """A figure by seed, in the last epoch, or with "best_validation" in each seed's best one.

    Raises:
      InputError: there is no validation set to select by.
    """
    if select == "last":
        return np.asarray(getattr(run.records[-1], figure), float)
    if run.records[-1].validation_loss is None:
        raise InputError(f"{run.name} has no validation set to select an epoch by: leave out --select.")
    return results.summary(run.records, select=select)["selected"][figure]["by_seed"]


def difference(
    values: np.ndarray, seeds: Sequence[int], first: np.ndarray, seeds_of_first: Sequence[int]
) -> Difference:
    """Values minus those of the first run: by seed if both have the same seeds, otherwise of the means.

    Paired, with differences d: mean(d), t(n - 1) sd(d) / sqrt(n), and mean(d) / sd(d). Unpaired: Welch's interval, and
    the difference in pooled sds (Cohen's d).
    """
    if sorted(seeds) == sorted(seeds_of_first):
        order = [list(seeds_of_first).index(seed) for seed in seeds]
        found = results.statistics(values - first[order])
        spread = found["sd"] is not None and found["sd"] > 1e-6 * np.abs(values).max()  # below, it is rounding
        effect = found["mean"] / found["sd"] if spread else None
        return Difference(found["mean"], found["interval"], effect, True)
    mean, n = float(values.mean() - first.mean()), np.array([len(values), len(first)])
    if n.min() < 2:
        return Difference(mean, None, None, False)
    variances = np.array([values.var(ddof=1), first.var(ddof=1)])
    parts, pooled = variances / n, (n - 1) @ variances / (n.sum() - 2)
    if not parts.sum():
        return Difference(mean, 0.0, None, False)
    freedom = parts.sum() ** 2 / (parts**2 / (n - 1)).sum()
    half = float(stdtrit(freedom, 0.975) * parts.sum() ** 0.5)
    return Difference(mean, half, mean / float(pooled) ** 0.5, False)


def differences(runs: Sequence[Series], figure: str, select: str = "last") -> list[Difference]:
    """The difference of each run after the first to the first."""
    first = values_of(runs[0], figure, select)
    return [difference(values_of(run, figure, select), run.seeds, first, runs[0].seeds) for run in runs[1:]]


def table(runs: Sequence[Series], figure: str, select: str = "last") -> str:
    """The runs as a Markdown table: the figure, and its difference to the first run."""
    label, unit, digits = results.FIGURES[figure]

    def signed(value: float, digits: int) -> str:
        return ("+" if value >= 0 else "") + results.number(value, digits)

    rows = []
    for run, other in zip(runs, [None, *differences(runs, figure, select)], strict=True):
        own = results.text(results.statistics(values_of(run, figure, select)), unit, digits)
        if other is None:
            rows.append((run.name, str(len(run.seeds)), own, "", "", "", ""))
            continue
        interval = "-" if other.interval is None else f"± {results.number(unit * other.interval, digits)}"
        effect = "-" if other.effect is None else signed(other.effect, 2)
        paired = "by seed" if other.paired else "no"
        rows.append((run.name, str(len(run.seeds)), own, signed(unit * other.mean, digits), interval, effect, paired))
    return results.table(("run", "seeds", label, "minus the first", "95% interval", "effect size", "paired"), rows)


def remarks(runs: Sequence[Series]) -> list[str]:
    """What the user should know: how the differences are made, and in what else the runs differ."""
    first, found = runs[0], []
    pairs = [sorted(run.seeds) == sorted(first.seeds) for run in runs[1:]]
    if any(pairs):
        found.append("Paired by seed: the effect size is the mean of the differences, divided by their sd.")
    if not all(pairs):
        found.append(
            "Not paired, as the seeds are others: Welch's interval; the effect size is in sds, pooled of both runs."
        )
    for run in runs[1:]:
        if len(run.records) != len(first.records):
            epochs = results.counted(len(run.records), "epoch")
            found.append(f"{run.name} has {epochs}, the first run {len(first.records)}.")
        if run.config is None or first.config is None:
            continue
        for name in dict.fromkeys([*first.config, *run.config]):
            ours, its = run.config.get(name), first.config.get(name)
            if ours != its and name not in OF_RUN:
                found.append(f"{run.name} has {name} {ours}, the first run {its}.")
    return found
