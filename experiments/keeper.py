"""What keeps the work of a `Trial`: its folder, its checkpoints, and one end for all processes.

    with keeper.folder_of("results/train", described) as folder, keeper.listen(minutes=30) as stop:
        with keeper.Keeper(trial, folder / "checkpoints", described, keep=2, resume=True) as kept:
            trial.epoch(advance=lambda steps: kept.save() or stop.requested)

Of several processes, only the first reads and writes files; what it finds is told to the others.
"""

import contextlib
import math
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from experiments import devices, files, signals, sweep
from experiments.checkpoints import Checkpoints, Restored
from experiments.config import Config
from experiments.loop import PARTS
from experiments.progress import Progress
from experiments.trial import Trial

FIRST_PARTS = 100  # of the first epoch, of which nobody knows how long it takes
GOES_ON = "the same command goes on."
BEGINS_ANEW = "the same command begins anew, as --keep=0 makes no checkpoints."
PART = 2.0  # seconds that a part of a later epoch may take; a run that is asked to end does so after a part
LEAST = 0.02  # seconds of a part, below which fewer parts cost less


def describe(config: Config, grid: sweep.Grid) -> dict[str, Any]:
    """What makes a run another one than others, for its folder and its checkpoints."""
    swept = {name: list(values) for name, values in (grid.fields | grid.options).items()}
    return {"config": config.to_dict()} | ({"sweep": swept} if swept else {})


def check_free(path: str, described: Mapping[str, Any]) -> None:
    """Refuses a folder that cannot be written or that the same run has, before the data are read."""
    devices.from_first(lambda: files.check_free(path, described))


@contextlib.contextmanager
def folder_of(path: str, described: Mapping[str, Any]) -> Iterator[pathlib.Path]:
    """The folder of a run, which has it alone; tells the user where it is not the one that was asked for."""
    claims: list[files.Claim] = []

    def take() -> pathlib.Path:
        claims.append(files.claim(path, described))
        return claims[0].folder

    folder = devices.from_first(take)
    try:
        if claims and claims[0].notice:
            print(claims[0].notice, flush=True)
            if "config.epochs: " in claims[0].notice:
                print("A run with another number of epochs begins anew, as schedules depend on the number.")
        yield folder
    finally:
        for claim in claims:
            claim.lock.release()


def goes_on(keep: int) -> str:
    """What the same command does after a stop, for so many checkpoints."""
    return GOES_ON if keep else BEGINS_ANEW


def listen(minutes: float | None) -> signals.Stop:
    """Ends the run by a signal or after some minutes; all processes at the same place."""
    return signals.Stop(None if minutes is None else 60 * minutes, agree=devices.largest)


def parts(trial: Trial) -> int:
    """The parts of the next epoch, each short enough that a run which is asked to end does so in time.

    It seldom changes, because an accelerator compiles the loop for each number of parts.
    """
    if trial.records:
        seconds = 1e-6 * devices.largest(round(1e6 * trial.records[-1].seconds / len(trial.runs) / trial.parts))
        if seconds < LEAST:
            trial.parts = min(trial.parts, PARTS)
        elif seconds > PART:
            trial.parts *= 2 ** math.ceil(math.log2(seconds / PART))
    return trial.parts


class Keeper:
    """Saves checkpoints of a trial, and goes on from the last one. It is a context."""

    def __init__(
        self,
        trial: Trial,
        folder: pathlib.Path,
        described: Mapping[str, Any],
        *,
        keep: int,
        resume: bool,
        seconds: float = 10.0,
    ):
        """Opens the folder, and restores the last checkpoint.

        Args:
          trial: what is kept.
          folder: the folder of its checkpoints alone.
          described: see `describe`.
          keep: how many checkpoints stay; 0: none are made.
          resume: go on from the last one; False: remove all.
          seconds: between two checkpoints, at least; 0: one after each part of an epoch.
        """
        self.trial, self.folder, self.seconds = trial, folder, seconds
        self._last, self._cost, self._at = time.monotonic(), 0.0, -1
        self._makes, self._saved, self._told = keep > 0, None, "There is no checkpoint of this run."
        if not self._makes:
            return
        template = self._state()[0]
        found = devices.from_first(lambda: self._open(described, keep, resume, template))
        if found is not None:
            leaves = [_key_like(*each) for each in zip(found.state, jax.tree.leaves(template), strict=True)]
            trial.restore(jax.tree.unflatten(jax.tree.structure(template), leaves), found.extra)
            self._at = self._position
            self._tell()
            again = " The run is finished: --noresume trains it again." if trial.finished else ""
            if devices.is_first():
                print(f"Goes on after {self._where()}, from the checkpoint in {folder}.{again}", flush=True)

    _saved: Checkpoints | None  # of the first process

    def _open(self, described: Mapping[str, Any], keep: int, resume: bool, template: Any) -> Restored | None:
        """The last checkpoint, with its leaves as the state."""
        if not resume and self.folder.exists():
            shutil.rmtree(self.folder)
        validates = self.trial.runs[0].validates
        self._saved = Checkpoints(self.folder, described, keep=keep, best="max" if validates else None)
        found = self._saved.restore(template)
        several = jax.process_count() > 1
        return found and found._replace(
            state=[jax.random.key_data(v) if several and _is_key(v) else v for v in jax.tree.leaves(found.state)]
        )

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        arrays, extra = self.trial.state()
        return (devices.gather(arrays) if jax.process_count() > 1 else arrays), extra

    @property
    def _position(self) -> int:
        """The steps of the warm-up and of the epochs."""
        return self.trial.warm_up_steps_done + self.trial.steps_done

    def _where(self) -> str:
        trial = self.trial
        if not trial.warmed_up:
            return f"{trial.warm_up_steps_done} steps of the warm-up"
        step = trial.steps_done - trial.epochs * trial.steps
        return f"{step} of {trial.steps} steps of epoch {trial.epochs + 1}" if step else f"epoch {trial.epochs}"

    def after_part(self, bar: Progress, stop: signals.Stop) -> Callable[[int], bool]:
        """The `advance` of an epoch: it shows the steps, saves if it is time, and says whether to stop."""

        def advance(steps: int) -> bool:
            bar.advance(steps)
            self.save()
            return stop.requested

        return advance

    def save(self, *, now: bool = False) -> None:
        """Saves if it is time, or `now`; it may be called between two parts of an epoch, and after it.

        Raises:
          InputError: the checkpoint before cannot be written; those that were there stay.
        """
        trial = self.trial
        if not self._makes or trial.steps_done == (trial.epochs + 1) * trial.steps:
            return  # all steps of an epoch are done, and it is not evaluated
        begin = time.monotonic()
        rest = max(self.seconds, 20 * self._cost) if self.seconds else 0.0  # a large state is not saved all the time
        due = begin - self._last >= rest
        if not devices.largest(now or due) or self._position == self._at or not self._is_finite():
            return
        state, extra = self._state()
        whole = trial.records and trial.steps_done == trial.epochs * trial.steps
        metric = trial.records[-1].validation_figure() if whole else None
        devices.from_first(lambda: self._write(state, extra, metric))
        self._at = self._position
        self._tell()
        self._last = time.monotonic()
        self._cost = self._last - begin

    def _write(self, state: Any, extra: Any, metric: float | None) -> None:
        if self._saved is not None:
            self._saved.save(self._position, state, extra, metric=metric)

    def _is_finite(self) -> bool:
        """False where the next loss will be NaN, and the run is to stop there: the checkpoint before is better."""
        if not self.trial.runs[0].check_nan:
            return True
        carries = [getattr(run.carry, "params", run.carry) for run in self.trial.runs]
        leaves = [leaf for leaf in jax.tree.leaves(carries) if jax.numpy.issubdtype(leaf.dtype, np.inexact)]
        return all(bool(jax.numpy.isfinite(leaf).all()) for leaf in leaves)

    def _tell(self) -> None:
        self._told = f"The last checkpoint, after {self._where()}, is in {self.folder}."

    @property
    def sentence(self) -> str:
        """Where the last checkpoint is."""
        return self._told

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        """Waits until all is written."""
        if kind is None:
            devices.from_first(self._close)
        elif self._saved is not None:
            self._saved.__exit__(kind, *error)

    def _close(self) -> None:
        if self._saved is not None:
            self._saved.close()


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_like(value: Any, like: Any) -> Any:
    """A value that another process has told, as a key where it is one."""
    if not _is_key(like) or _is_key(value):
        return value
    return jax.random.wrap_key_data(value, impl=jax.random.key_impl(like))
