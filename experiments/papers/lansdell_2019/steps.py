"""Training by thousands of steps, as the authors count: an "epoch" here has 1,000 steps.

The authors keep the first 5,000 images apart and go through the other 55,000 again and again, in a new order each time;
so an epoch ends somewhere inside a pass. A warm-up counts as the first epochs.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.checkpoints import Checkpoints
from experiments.data import Dataset
from experiments.loop import Run
from experiments.methods import Method
from experiments.papers.cells import Job

STEPS = 1000  # of an epoch
HELD_OUT = 5000  # of 60,000 images
SECONDS = 20.0  # between two checkpoints
Look = Callable[[Run], Mapping[str, np.ndarray]]  # figures [lanes] of the present network


def training_images(data: Dataset) -> Dataset:
    """The set without the images that the authors keep apart."""
    kept = slice(len(data.x_train) * HELD_OUT // 60_000, None)
    return data._replace(x_train=data.x_train[kept], y_train=data.y_train[kept])


def rows(seed: int, epoch: int, count: int, examples: int) -> np.ndarray:
    """The examples of an epoch [count]: the part of an endless row of passes, each in an order of its own."""
    begin, end = epoch * count, (epoch + 1) * count
    passes = range(begin // examples, -(-end // examples))
    orders = [np.random.default_rng([seed, each]).permutation(examples) for each in passes]
    first = begin - passes.start * examples
    return np.concatenate(orders)[first : first + count]


def looks(epochs: int) -> list[int]:
    """The epochs after which a curve has a point: the first ones, every twentieth part, and the last one."""
    every = max(1, epochs // 20)
    return sorted({n for n in (1, 2, 5, 10, 20, 50) if n < every} | set(range(every, epochs + 1, every)) | {epochs})


def train(job: Job, method: Method, data: Dataset, look: Look, points: Sequence[int]) -> dict[str, Any] | None:
    """Trains all seeds of a job to its last epoch; returns the curves, or None if it was stopped.

    Args:
      job, method: what is trained, and how.
      data: the set, of which the training examples are used.
      look: what is measured.
      points: the epochs after which it is measured.

    Returns:
      {"epoch": [points], name: [points, seeds]}, with the "train_loss" of the epoch; and the run under "run".
    """
    config, examples = job.config, len(data.x_train)
    count = STEPS * config.batch_size

    def all_rows(epoch: int) -> np.ndarray:
        return np.stack([rows(seed, epoch, count, examples) for seed in config.all_seeds]).astype(np.int32)

    run = Run(method, data, seeds=config.all_seeds, batch_size=config.batch_size, probe=0, rows=all_rows(0), parts=1)
    curves: list[dict[str, Any]] = []
    with Checkpoints(job.work, {"config": config.to_dict()}, keep=1) as saved:
        found = saved.restore(run.state())
        if found is not None:
            run.restore(found.state)
            curves = found.extra["curves"]
        done = run.warmed + run.epochs
        kept, last = done, time.monotonic()
        job.bar.restart(config.epochs, done)
        while done < config.epochs and not job.stop.requested:
            run.rows = all_rows(done)
            loss = np.full(config.seeds, np.nan)
            if run.learns_feedback and run.warmed < config.warmup_epochs:
                run.warm_up(run.warmed + 1, parts=1)
            else:
                loss = run.steps_of_an_epoch().mean(1)
            done += 1
            if done in points:
                figures = {**look(run), "train_loss": loss}
                curves.append({"epoch": done} | {name: np.asarray(v, float).tolist() for name, v in figures.items()})
            job.bar.advance(1, _note(curves[-1]) if curves else None)
            if time.monotonic() - last > SECONDS:
                saved.save(done, run.state(), {"curves": curves})
                kept, last = done, time.monotonic()
        if done > kept:
            saved.save(done, run.state(), {"curves": curves})
    if done < config.epochs:
        return None
    return {name: np.array([point[name] for point in curves]) for name in curves[0]} | {"run": run}


def _note(point: Mapping[str, Any]) -> str:
    """The first figure of a point of the curves."""
    name = next(name for name in point if name != "epoch")
    return f"{name} {np.mean(point[name]):.4g} at {point['epoch']}"
