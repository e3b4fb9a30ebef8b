"""Which settings let feedback alignment and direct feedback alignment learn on a convolutional net?

A validation split of the CIFAR-10 training images, small nets, a few epochs. One run trains all learning rates and all
standard deviations of the feedback weights at once, as if they were seeds; their seed is the same.
"""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments import data, loop, models, rules
from experiments.gpu import session

RATES = {"adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "momentum": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}
SCALES = (0.1, 0.3, 1.0)
TRAINING, VALIDATION, BATCH, EPOCHS = 10_000, 2_000, 64, 5
OPTIMIZERS: dict[str, optax.GradientTransformation] = {
    "adam": session.rated(optax.adam),
    "momentum": session.rated(optax.sgd, momentum=0.9),
}
NETS = {"lenet5": models.LeNet5, "cnn": models.CNN}
SHORT = {"FA": "feedback_alignment", "DFA": "direct_feedback_alignment", "BP": "backprop"}


class Setting(NamedTuple):
    """One run: all rates and feedback scales."""

    model: str
    rule: str
    activation: str = "relu"
    inputs: str = "standardized"
    optimizer: str = "adam"

    def __str__(self) -> str:
        return ", ".join(self)

    @property
    def grid(self) -> list[tuple[float, float]]:
        """The (rate, factor of the standard deviation of the feedback) of each position."""
        scales = (1.0,) if self.rule == "BP" else SCALES
        return list(itertools.product(RATES[self.optimizer], scales))


def settings_in_order(tiny: bool) -> Iterator[list[Setting]]:
    """Settings in groups that are compiled together: the groups change one thing after the other."""
    pairs = list(itertools.product(NETS, ("FA", "DFA")))
    if tiny:
        yield [Setting("cnn", "FA", "tanh", optimizer="momentum")]
        return
    yield [Setting(*pair, activation) for activation in ("relu", "tanh") for pair in pairs] + [
        Setting(net, "BP") for net in NETS
    ]
    yield [Setting(*pair, activation, "as they are") for activation in ("relu", "tanh") for pair in pairs]
    yield [Setting(*pair, activation, optimizer="momentum") for activation in ("relu", "tanh") for pair in pairs]


def make_run(setting: Setting, dataset: data.Dataset) -> loop.Run:
    """The run of a setting, each position with its rate and its feedback."""
    activation = {"relu": jax.nn.relu, "tanh": jax.numpy.tanh}[setting.activation]
    task = loop.task(lambda rngs: NETS[setting.model](dataset.shape, 10, rngs=rngs, activation=activation))
    rates, scales = zip(*setting.grid, strict=True)
    run = loop.Run(
        task,
        rules.parse(SHORT[setting.rule]),
        dataset,
        optimizer=OPTIMIZERS[setting.optimizer],
        seeds=(0,) * len(rates),
        batch_size=BATCH,
    )
    session.set_rates(run, rates)
    session.scale_feedback(run, scales)
    return run


def part(results: session.Results, clock: session.Clock, settings: session.Settings) -> None:
    """An entry for each setting: validation accuracy by epoch and position, and the best position."""
    training, validation, epochs = (128, 64, 2) if settings.tiny else (TRAINING, VALIDATION, EPOCHS)
    whole = settings.cifar10()
    n = min(training, len(whole.x_train) - validation)
    cut = [a[: n + validation] for a in (whole.x_train, whole.y_train)]
    raw = whole._replace(x_train=cut[0][:n], y_train=cut[1][:n], x_test=cut[0][n:], y_test=cut[1][n:])
    sets = {"as they are": data.on_device(raw)}
    sets["standardized"] = data.on_device(session.standardized(raw))
    for group in settings_in_order(settings.tiny):
        group = [setting for setting in group if not results.done(str(setting))]
        if not group:
            continue
        if clock.left < (0 if settings.tiny else 15):
            for setting in group:
                results.put(str(setting), {"skipped": f"{clock.left:.0f} s were left"})
            continue
        runs = session.threads({str(s): partial(make_run, s, sets[s.inputs]) for s in group})
        for left, setting in zip(range(len(group), 0, -1), group, strict=True):
            run, own = runs.pop(str(setting)), clock.share(left)
            with results.guard(str(setting)):
                if isinstance(run, Exception):
                    raise run
                results.put(str(setting), explore(run, setting, epochs, own))


def explore(run: loop.Run, setting: Setting, epochs: int, clock: session.Clock) -> dict[str, Any]:
    """Train for some epochs, or as many as the time allows (at least one)."""
    records = [run.epoch()]
    while len(records) < epochs and clock.left > 1.2 * records[-1].seconds:
        records.append(run.epoch())
    accuracy = np.array([record.accuracy for record in records])  # [epochs, positions]
    best = int(accuracy[-1].argmax())
    rate, scale = setting.grid[best]
    return {
        "setting": setting._asdict(),
        "examples": run.steps * run.batch_size,
        "epochs": len(records),
        "grid": setting.grid,
        "accuracy": accuracy,
        "train_loss": records[-1].train_loss,
        "angle": records[-1].angle,
        "best": {"rate": rate, "feedback_scale": scale, "accuracy": accuracy[-1, best]},
        "seconds": [record.seconds for record in records],
    }
