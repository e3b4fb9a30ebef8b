"""Checkpoints of a `Trial`: saved now and then, and taken up again by the same command."""

import pathlib
import shutil
import time
from collections.abc import Mapping
from typing import Any

from experiments import sweep
from experiments.checkpoints import Checkpoints
from experiments.config import Config
from experiments.trial import Trial


def describe(config: Config, grid: sweep.Grid) -> dict[str, Any]:
    """What makes a run another one than others, for its folder and its checkpoints."""
    swept = {name: list(values) for name, values in (grid.fields | grid.options).items()}
    return {"config": config.to_dict()} | ({"sweep": swept} if swept else {})



class Keeper:
    """Saves checkpoints of a trial, and goes on from the last one."""

    EVERY = 10.0  # seconds between two checkpoints, at least; the last epoch is always saved

    def __init__(self, trial: Trial, folder: pathlib.Path, described: Mapping[str, Any], *, keep: int, resume: bool):
        if not resume and folder.exists():
            shutil.rmtree(folder)
        self.trial, self.last = trial, time.monotonic()
        self.saved = Checkpoints(folder, described, keep=keep, best="max" if trial.config.validation else None)
        found = self.saved.restore(trial.state()[0])
        if found is not None:
            trial.restore(found.state, found.extra)
            at = f", step {trial.runs[-1].step}" if trial.runs[-1].step else ""
            again = " The run is finished: --noresume trains it again." if trial.finished else ""
            print(f"Goes on after epoch {trial.epochs}{at}, from the checkpoint in {folder}.{again}")

    def save(self, *, now: bool) -> None:
        """Saves if it is time, or `now`."""
        if now or time.monotonic() - self.last > self.EVERY:
            state, extra = self.trial.state()
            accuracy = self.trial.records[-1].validation_accuracy if self.trial.records else None
            metric = None if accuracy is None else float(accuracy.mean())
            self.saved.save(self.trial.steps_done, state, extra, metric=metric)
            self.last = time.monotonic()

    def close(self) -> None:
        """Waits until all is written."""
        self.saved.wait()
        self.saved.close()
