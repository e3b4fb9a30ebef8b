"""Curves in the form of TensorBoard, beside the files of a run.

    with logs.opened("tensorboard", folder) as log:
        log(histories, steps, seeds)   # after each epoch; it writes what is new

`tensorboard --logdir=FOLDER/tensorboard` then shows a curve for each rule and seed.
"""

import contextlib
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.errors import InputError
from experiments.results import Histories, Steps

KINDS = ("tensorboard",)
NOT_FIGURES = ("epoch", "step", "updates", "seconds")

Log = Callable[[Histories, Steps, Sequence[int]], None]


def require(kind: str | None) -> None:
    """Refuses a log whose package is missing, before anything is trained."""
    if kind == "tensorboard":
        _writer()


def _writer() -> Any:
    try:
        from tensorboardX import SummaryWriter  # an extra: most runs need no log
    except ImportError:
        raise InputError(
            "--log=tensorboard needs the package tensorboardX, which is not installed: run pip install tensorboardX, "
            "or leave the flag out."
        ) from None
    return SummaryWriter


@contextlib.contextmanager
def opened(kind: str | None, folder: pathlib.Path) -> Iterator[Log]:
    """A function that writes the log of a run; it does nothing where the kind is None.

    A log that is there already is removed: the run that goes on writes its first epochs again.
    """
    if kind is None:
        yield lambda histories, steps, seeds: None
        return
    board = TensorBoard(folder / "tensorboard")
    try:
        yield board.write
    finally:
        board.close()


class TensorBoard:
    """The event files of a run: a folder for each rule, and in it one for each seed."""

    def __init__(self, folder: pathlib.Path):
        """Removes what is in the folder."""
        self.folder, self._make = folder, _writer()
        self._writers: dict[str, list[Any]] = {}
        self._done: dict[str, tuple[slice, int, int]] = {}  # the lanes, epochs and steps that are written
        shutil.rmtree(folder, ignore_errors=True)

    def write(self, histories: Histories, steps: Steps, seeds: Sequence[int]) -> None:
        """Writes the epochs and steps that are new.

        Args:
          histories: the records of each rule by epoch, and its lanes.
          steps: its records inside the epochs, each figure [seeds].
          seeds: its seeds.
        """
        for i, (name, (records, lanes)) in enumerate(histories.items()):
            known, epochs, inner = self._done.get(name, (lanes, 0, 0))
            if known != lanes:  # another setting of the sweep is now the best: its curve from the beginning
                self._remove(name)
                epochs = inner = 0
            if name not in self._writers:
                short = re.sub(r"[^\w.,=()+-]+", "_", name)[:80]  # two long names may begin alike: hence the number
                place = self.folder / (f"{i:02d} {short}" if len(histories) > 1 else short)
                self._writers[name] = [self._make(str(place / f"seed {seed}")) for seed in seeds]
            for record in records[epochs:]:
                figures = {key: value for key, value in record._asdict().items() if key not in NOT_FIGURES}
                self._add(name, "epoch", {k: v[lanes] for k, v in figures.items() if v is not None}, record.epoch)
            own = steps.get(name, ())
            for step in own[inner:]:
                figures = {key: value for key, value in step.items() if key not in NOT_FIGURES}
                self._add(name, "step", figures, step["updates"])
            for writer in self._writers[name]:
                writer.flush()
            self._done[name] = (lanes, len(records), len(own))

    def close(self) -> None:
        """Closes all files."""
        for writers in self._writers.values():
            for writer in writers:
                writer.close()

    def _add(self, name: str, axis: str, figures: Mapping[str, np.ndarray], at: int) -> None:
        for figure, values in figures.items():
            for writer, value in zip(self._writers[name], values, strict=True):
                writer.add_scalar(f"{axis}/{figure}", float(value), at)

    def _remove(self, name: str) -> None:
        for writer in self._writers.pop(name):
            writer.close()
            shutil.rmtree(writer.logdir, ignore_errors=True)
