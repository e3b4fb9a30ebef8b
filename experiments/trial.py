"""A config trained to its end, perhaps over a grid of settings: epoch by epoch, with its records and its state.

    trial = Trial(config, dataset, grid=sweep.parse(["learning_rate=0.01,0.1"], config))
    while not trial.finished:
        trial.epoch()
    trial.result()  # the figures of the best point, chosen on the validation set, and those of all points
"""  # fmt: skip

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import lrules
from experiments import build, results, sweep, tasks
from experiments.config import Config
from experiments.data import Dataset
from experiments.errors import InputError
from experiments.loop import PARTS, Record, Run
from experiments.placement import Placement


class Trial:
    """The runs of a config: one, or as many as its grid needs.

    Attributes:
      config, grid, points: what is trained; the lanes of `records` are those of the points, each with every seed.
      runs: the `loop.Run`s.
      records: one for each finished epoch.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        *,
        grid: sweep.Grid = sweep.NO_GRID,
        rule: lrules.Rule | None = None,
        task: tasks.Task | None = None,
        placement: Placement | None = None,
        check_nan: bool = False,
        resident: int | None = None,
        parts: int = PARTS,
    ):
        """Initialises and compiles; `rule` and `task` are given where they are not those of the config.

        The other options are those of `build.run`.

        Raises:
          Refused: the rule cannot train the model.
        """
        self.config, self.grid, self.records = config, grid, list[Record]()
        self.parts = parts
        self._parts: dict[int, Record] = {}  # of the epoch that some runs have finished and others not
        self.runs: list[Run] = []
        self.points: list[sweep.Point] = []
        if len(grid.points()) > 1 and dataset.x_val is None:
            raise InputError(
                "A sweep chooses on the validation set, and there is none: keep a part of the training set, as in "
                "--validation=0.2."
            )
        if config.select == "best_validation" and dataset.x_val is None:
            raise InputError(
                "select is best_validation, and there is no validation set: keep a part of the training set, as in "
                "--validation=0.1."
            )
        for points in grid.runs():
            fixed = {name: value for name, value in points[0].fields.items() if name not in grid.traced}
            options = {name: value for name, value in points[0].options.items() if name not in grid.traced}
            own = config.replace(**fixed)
            own_task = task if task is not None and not fixed else tasks.build(own, dataset)
            self.points += points
            self.runs.append(
                build.run(
                    own,
                    dataset,
                    own_task,
                    rule=rule,
                    options=options,
                    settings=sweep.settings(points, grid.traced, config.seeds),
                    placement=placement,
                    check_nan=check_nan,
                    resident=resident,
                    parts=parts,
                )
            )
        self.compile_seconds = sum(run.compile_seconds for run in self.runs)
        self.warmed_up = not config.warmup_epochs or not self.warms_up

    @property
    def epochs(self) -> int:
        """The finished epochs."""
        return len(self.records)

    @property
    def steps(self) -> int:
        """The steps of an epoch of all runs."""
        return sum(run.steps for run in self.runs)

    @property
    def steps_done(self) -> int:
        """The finished steps of all epochs."""
        if not self.warmed_up:
            return 0
        return self.epochs * self.steps + sum(run.step if run.epochs == self.epochs else run.steps for run in self.runs)

    @property
    def warm_up_steps_done(self) -> int:
        """The finished steps of the warm-up."""
        return sum(run.warmed * run.steps + run.step * (not self.warmed_up) for run in self.runs)

    @property
    def finished(self) -> bool:
        """Whether all epochs of the config are trained."""
        return self.epochs >= self.config.epochs

    @property
    def warms_up(self) -> bool:
        """Whether there is feedback that a warm-up would train."""
        return any(run.learns_feedback for run in self.runs)

    def warm_up(self, *, parts: int = PARTS, advance: Callable[[int], Any] | None = None) -> bool:
        """The warm-up of the config, where it has one and the rule learns feedback; False if `advance` stopped it."""
        self.warmed_up = self.warmed_up or all(
            run.warm_up(self.config.warmup_epochs, parts=parts, advance=advance) for run in self.runs
        )
        return self.warmed_up

    def epoch(self, *, parts: int = PARTS, advance: Callable[[int], Any] | None = None) -> Record | None:
        """One epoch of all runs, or the rest of one; None if `advance` stopped it (see `Run.epoch`).

        The warm-up, where the config has one, comes before the first.
        """
        self.warm_up()
        for i, run in enumerate(self.runs):
            if run.epochs == self.epochs:  # otherwise it has trained this epoch already, before a stop
                record = run.epoch(parts=parts, advance=advance)
                if record is None:
                    return None
                self._parts[i] = record
        self.records.append(_joined([self._parts[i] for i in range(len(self.runs))]))
        self._parts.clear()
        return self.records[-1]

    def lanes(self, point: int) -> slice:
        """The lanes of a point."""
        return slice(point * self.config.seeds, (point + 1) * self.config.seeds)

    def _place(self, point: int) -> tuple[Run, slice]:
        """The run of a point, and its lanes there."""
        places = [(run, i) for run, points in zip(self.runs, self.grid.runs(), strict=True) for i in range(len(points))]
        run, place = places[point]
        return run, self.lanes(place)

    def carry(self, point: int) -> Any:
        """What the run of a point carries now, every leaf [seeds, ...]."""
        run, lanes = self._place(point)
        return jax.tree.map(lambda leaf: leaf[lanes], run.carry)

    def steps_of(self, point: int) -> list[dict[str, Any]]:
        """The records of a point inside the epochs, each figure [seeds]; none where the config asks for none.

        "step" counts the steps of the epoch, "updates" those of all epochs.
        """
        run, lanes = self._place(point)
        if not (self.config.record_every or self.config.layers):
            return []
        return [
            {"epoch": record["epoch"], "step": record["step"]}
            | {"updates": (record["epoch"] - 1) * run.steps + record["step"]}
            | {name: values[lanes] for name, values in record.items() if name not in ("epoch", "step")}
            for record in run.curve
        ]

    def chosen(self) -> int:
        """The point with the best mean validation accuracy, at the epochs that the config selects."""
        return 0 if len(self.points) == 1 else self._best([self.summary(i) for i in range(len(self.points))])

    def _best(self, summaries: Sequence[Mapping[str, Any]]) -> int:
        figure = "validation_accuracy" if self.records[-1].validation_accuracy is not None else "validation_loss"
        sign = 1 if figure == "validation_accuracy" else -1
        means = []
        for found in summaries:
            mean = found.get("selected", found)[figure]["mean"]
            means.append(sign * mean if np.isfinite(mean) else -np.inf)
        return int(np.argmax(means))

    def summary(self, point: int) -> dict[str, Any]:
        """The figures of a point."""
        return results.summary(self.records, self.lanes(point), select=self.config.select)

    def result(self) -> dict[str, Any]:
        """What metrics.json has of this trial: the figures of the chosen point, and those of every point of a grid."""
        summaries = [self.summary(i) for i in range(len(self.points))]
        chosen = self._best(summaries) if len(summaries) > 1 else 0
        content = {"config": self.config.to_dict(), "hash": self.config.hash()} | summaries[chosen]
        content |= {"epochs": self.epochs, "compile_seconds": self.compile_seconds}
        content["step_seconds"] = sum(r.seconds for r in self.records) / (self.steps * self.epochs)
        if len(self.points) > 1:
            point = self.points[chosen]
            content["sweep"] = self.grid.texts()
            content["chosen"] = point.fields | point.options
            content["at_edge"] = self.grid.at_edge(point)
            content["points"] = [
                {"settings": p.fields | p.options} | {k: v for k, v in summary.items() if k != "curves"}
                for p, summary in zip(self.points, summaries, strict=True)
            ]
        if self.config.record_every or self.config.layers:
            content["records"] = [record for run in self.runs for record in run.curve]
        return content

    # What a checkpoint holds

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """All that the next step depends on: arrays, and what JSON holds."""
        arrays = {str(i): run.state() for i, run in enumerate(self.runs)}
        extra = {
            "records": [_to_json(record) for record in self.records],
            "parts": {str(i): _to_json(record) for i, record in self._parts.items()},
            "curves": [[_to_json(record) for record in run.curve] for run in self.runs],
            "warmed_up": self.warmed_up,
        }
        return arrays, extra

    def restore(self, arrays: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Goes on from a `state`."""
        for i, run in enumerate(self.runs):
            run.restore(arrays[str(i)])
            run.curve = [_from_json(record) for record in extra["curves"][i]]
        self.records = [Record(**_from_json(record)) for record in extra["records"]]
        self._parts.update({int(i): Record(**_from_json(record)) for i, record in extra["parts"].items()})
        self.warmed_up = extra["warmed_up"]


def _joined(records: Sequence[Record]) -> Record:
    """The records of one epoch of several runs as one, with all lanes."""
    joined: dict[str, Any] = {
        name: None if getattr(records[0], name) is None else np.concatenate([getattr(r, name) for r in records])
        for name in Record._fields
        if name not in ("epoch", "seconds")
    }
    return Record(epoch=records[0].epoch, seconds=sum(r.seconds for r in records), **joined)


def _to_json(record: Record | Mapping[str, Any]) -> dict[str, Any]:
    fields = record._asdict() if isinstance(record, Record) else record
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}


def _from_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The figures as they were: JSON keeps them to the last bit."""
    return {name: np.asarray(v, float) if isinstance(v, list) else v for name, v in fields.items()}
