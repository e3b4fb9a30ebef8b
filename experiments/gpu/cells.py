"""Cells of the papers' tables, with the papers' settings in the open and their numbers beside.

BackMAN (Soltani Moakhar et al.), Table 1: LeNet-5 on CIFAR-10 and an MLP with four hidden layers of 2000 on MNIST. The
paper: 100 epochs of SGD without momentum, rate x0.1 at half-time, batch 64 to 512 and rate 0.002 to 0.25 by grid
search, 10,000 of 50,000 images for validation, standardized inputs, random crops (MNIST) or flips, rotations, affine
maps and jitter of colours (CIFAR-10), test accuracy of the epoch that is best on validation. Here: the batch and, for
BP and BackMAN on MNIST, the rate of the paper's Table 5; every other rate by a few epochs on the validation images.
The paper does not say how strong its augmentation is; `augment_colours` says what it is here.

Dual propagation (Hoier, Zach), Table 2: 784-1000x4-10, half squared error, beta 1/2, 30 iterations; batch 50, Adam at
1e-3 and 20 epochs as in the authors' code for Table 1, all training images, accuracy after the last epoch.

If the time does not suffice for the epochs, fewer are planned before the first half is over, and the cell says so.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lrules
from experiments import data, loop, models, rules
from experiments.gpu import session
from experiments.papers import dual_propagation

Array = jax.Array
GRID = (0.002, 0.01, 0.05, 0.25)
BACKMAN = {"BP": "backprop", "BackMAN": "backman", "FA": "feedback_alignment", "DFA": "direct_feedback_alignment"}


class Cell(NamedTuple):
    """One training of a table: what the paper says or, where it is silent, what is chosen here."""

    table: str
    row: str
    paper: str  # the number that the paper prints
    dataset: str
    model: str
    widths: tuple[int, ...]
    batch: int
    rates: tuple[float, ...]  # more than one: the best on validation after `tuning` epochs
    optimizer: str = "sgd"
    validation: float = 0.2
    epochs: int = 100
    tuning: int = 4
    seeds: int = 2
    weight: float = 1.0  # its share of the time

    def __str__(self) -> str:
        return f"{self.table}, {self.row}"


def cells(tiny: bool) -> list[Cell]:
    """All cells, the first ones first."""
    lenet = {"BP": "71.24", "BackMAN": "66.27", "FA": "53.31", "DFA": "45.79"}
    mlp = {"BP": "99.10", "BackMAN": "98.93", "FA": "95.15", "DFA": "95.97"}
    of_table_five: dict[str, Any] = {"BP": (128, (0.25,)), "BackMAN": (64, (0.05,))}
    found = [
        Cell("LeNet-5, CIFAR-10", row, number, "cifar10", "lenet5", (), 64, GRID, validation=0.1)
        for row, number in lenet.items()
    ]
    found += [
        Cell("784-2000x4-10, MNIST", row, number, "mnist", "mlp", (2000,) * 4, *of_table_five.get(row, (64, GRID)))
        for row, number in mlp.items()
    ]
    dual = {"DP, alpha=0": "(X)", "DP, alpha=1": "(X)", "DP^T, alpha=0": "-", "DP^T, alpha=1": "-"}
    options: dict[str, Any] = {"optimizer": "adam", "validation": 0.0, "epochs": 20, "seeds": 1, "weight": 0.25}
    found += [
        Cell("784-1000x4-10, 30 iterations, MNIST", row, number, "mnist", "mlp", (1000,) * 4, 50, (1e-3,), **options)
        for row, number in dual.items()
    ]
    if tiny:
        small: dict[str, Any] = {"epochs": 3, "tuning": 1, "batch": 32}
        chosen = found[3]._replace(rates=GRID[:2], **small), found[5]._replace(widths=(8,), **small)
        return [*chosen, found[9]._replace(widths=(8,), **small)]
    return found


def rule_of(cell: Cell) -> lrules.Rule:
    """The rule of a cell."""
    if cell.row in BACKMAN:
        return rules.parse(BACKMAN[cell.row])
    return dual_propagation.table_two(0.5, 30)[cell.row]


def split(cell: Cell, dataset: data.Dataset) -> tuple[data.Dataset, tuple[Any, Any]]:
    """The training set with the validation images as its test set, and the test images apart."""
    if not cell.validation:
        return data.on_device(dataset), (jnp.asarray(dataset.x_test), jnp.asarray(dataset.y_test))
    most = 50_000  # of MNIST's 60,000, the paper uses as many
    dataset = dataset._replace(x_train=dataset.x_train[:most], y_train=dataset.y_train[:most])
    dataset = session.standardized(dataset)
    training = data.on_device(data.hold_out(dataset, cell.validation))
    return training, (jnp.asarray(dataset.x_test), jnp.asarray(dataset.y_test))


def crop(key: Array, x: Array) -> Array:
    """Random crops after padding by one pixel: [batch, height, width, channels], each moved by at most one pixel."""
    padded = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=x.min())

    def one(image: Array, start: Array) -> Array:
        return jax.lax.dynamic_slice(image, (start[0], start[1], 0), x.shape[1:])

    return jax.vmap(one)(padded, jax.random.randint(key, (len(x), 2), 0, 3))


def augment_colours(key: Array, x: Array) -> Array:
    """Flips, rotations to 10 degrees, moves of a tenth, scales within a tenth, brightness and contrast within 0.2."""
    count, height, width, _ = x.shape
    keys = jax.random.split(key, 6)

    def uniform(key: Array, most: float, *shape: int) -> Array:
        return jax.random.uniform(key, (count, *shape), minval=-most, maxval=most)

    flip = jnp.where(jax.random.bernoulli(keys[0], 0.5, (count,)), -1.0, 1.0)
    angle, scale = uniform(keys[1], jnp.pi / 18), 1 + uniform(keys[2], 0.1)
    moves = uniform(keys[3], 0.1, 2) * jnp.array([[height, width]], x.dtype)
    rows, columns = (jnp.arange(n) - (n - 1) / 2 for n in (height, width))

    def one(image: Array, flip: Array, angle: Array, scale: Array, move: Array) -> Array:
        r, c = jnp.meshgrid(rows, columns * flip, indexing="ij")
        at = [
            (jnp.cos(angle) * r - jnp.sin(angle) * c) / scale + move[0] + (height - 1) / 2,
            (jnp.sin(angle) * r + jnp.cos(angle) * c) / scale + move[1] + (width - 1) / 2,
        ]
        channel = lambda plane: jax.scipy.ndimage.map_coordinates(plane, at, order=1)  # noqa: E731
        return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)

    x = jax.vmap(one)(x, flip, angle, scale, moves)
    bright, contrast = uniform(keys[4], 0.2, 1, 1, 1), 1 + uniform(keys[5], 0.2, 1, 1, 1)
    mean = x.mean((1, 2, 3), keepdims=True)
    return (x - mean) * contrast + mean + bright


def make_run(cell: Cell, training: data.Dataset, seeds: tuple[int, ...]) -> loop.Run:
    """A run of the cell; its rates are set later."""
    loss = loop.squared_error if cell.optimizer == "adam" else loop.cross_entropy
    augment: dict[str, Callable[[Array, Array], Array]] = {"mnist": crop, "cifar10": augment_colours}
    optimizer = session.rated(optax.adam if cell.optimizer == "adam" else optax.sgd)

    def model(rngs: Any) -> Any:
        return models.build(cell.model, training.shape, 10, rngs=rngs, widths=cell.widths)

    return loop.Run(
        loop.task(model, loss),
        rule_of(cell),
        training,
        optimizer=optimizer,
        seeds=seeds,
        batch_size=cell.batch,
        augment=augment[cell.dataset] if cell.validation else None,
    )


def tune(cell: Cell, run: loop.Run, clock: session.Clock) -> tuple[float, dict[str, Any]]:
    """The rate with the best validation accuracy after a few epochs of one seed, all rates at once."""
    session.set_rates(run, cell.rates)
    accuracy = []
    for _ in range(cell.tuning):
        begin = time.monotonic()
        accuracy.append(run.epoch().accuracy)
        if clock.left < time.monotonic() - begin:
            break
    best = cell.rates[int(accuracy[-1].argmax())]
    return best, {"rates": cell.rates, "validation_accuracy": np.array(accuracy)}


def train(cell: Cell, run: loop.Run, rate: float, test: tuple[Any, Any], clock: session.Clock) -> dict[str, Any]:
    """Train with a rate that falls to a tenth at half-time; the number of epochs is planned after the second."""
    session.set_rates(run, rate)
    planned, seconds, validation, tested, losses = cell.epochs, [], [], [], []
    begin = time.monotonic()
    while run.epochs < planned:
        start = time.monotonic()
        record = run.epoch()
        accuracy = record.accuracy
        if cell.validation:
            validation.append(accuracy)
            accuracy = run.evaluate(*test, batch_size=2500)[1]
        tested.append(accuracy)
        losses.append(record.train_loss)
        seconds.append(time.monotonic() - start)
        if run.epochs == 2:
            planned = max(2, min(cell.epochs, 2 + int(clock.left / seconds[-1])))
        if cell.optimizer == "sgd" and run.epochs == planned // 2:
            session.set_rates(run, rate / 10)
        if clock.left < -2 * seconds[-1]:
            break  # the plan was wrong: better a short curve than none
    chosen = np.argmax(validation, 0) if cell.validation else np.full(len(run.seeds), len(tested) - 1)
    return {
        "accuracy": np.array(tested)[chosen, np.arange(len(run.seeds))],
        "epoch_chosen": chosen + 1,
        "last_accuracy": tested[-1],
        "epochs": run.epochs,
        "planned_epochs": planned,
        "reduced": run.epochs < cell.epochs,
        "wall_seconds": time.monotonic() - begin,
        "epoch_seconds": np.median(seconds[1:] or seconds),
        "curves": {"test_accuracy": tested, "validation_accuracy": validation, "train_loss": losses},
    }


def part(results: session.Results, clock: session.Clock, settings: session.Settings) -> None:
    """An entry for each cell; those of one table are compiled together and share the time that is left."""
    todo = [cell for cell in cells(settings.tiny) if not results.done(str(cell))]
    sets = {"mnist": settings.mnist, "cifar10": settings.cifar10}
    left = sum(cell.weight for cell in todo)
    for table in dict.fromkeys(cell.table for cell in todo):
        group = [cell for cell in todo if cell.table == table]
        if clock.left < (0 if settings.tiny else 20):
            for cell in group:
                results.put(str(cell), {"skipped": f"{clock.left:.0f} s were left"})
            continue
        training, test = split(group[0], sets[group[0].dataset]())
        make = {str(cell): partial(make_run, cell, training, tuple(range(cell.seeds))) for cell in group}
        tuned = [cell for cell in group if len(cell.rates) > 1]
        make |= {f"tuning of {cell}": partial(make_run, cell, training, (100,) * len(cell.rates)) for cell in tuned}
        runs = session.threads(make)
        for cell in group:
            own = session.Clock(clock.left * cell.weight / left)
            left -= cell.weight
            with results.guard(str(cell)):
                results.put(str(cell), fill(cell, runs, training, test, own))


def fill(
    cell: Cell, runs: dict[str, Any], training: data.Dataset, test: tuple[Any, Any], clock: session.Clock
) -> dict[str, Any]:
    """The entry of one cell."""
    print(f"{cell}: {clock.left:.0f} s", flush=True)
    tuner, run = runs.pop(f"tuning of {cell}", None), runs.pop(str(cell))
    for made in (tuner, run):
        if isinstance(made, Exception):
            raise made
    rate, tuned = cell.rates[0], None
    if tuner is not None:
        rate, tuned = tune(cell, tuner, clock.share(4))
    found = train(cell, run, rate, test, clock)
    if cell.optimizer == "adam":
        x, y = training.x_train[: cell.batch], training.y_train[: cell.batch]
        measure = dual_propagation.measures(run._task, rule_of(cell), data.scale(x), y)
        _, residual = jax.jit(jax.vmap(measure))(run.carry.params, run.carry.state, run.carry.feedback)
        found["residual"] = residual[:, -1]
    images = {"training": len(training.x_train), "validation": len(training.x_test) if cell.validation else 0}
    return {
        "settings": cell._asdict(),
        "images": images | {"test": len(test[0])},
        "rate": rate,
        "tuned": tuned,
        "paper": cell.paper,
    } | found
