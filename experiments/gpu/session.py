"""What all parts share: the time that is left, results that survive an interruption, data, and work in threads."""

import contextlib
import json
import math
import os
import pathlib
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lrules
from experiments import cli, data, loop
from experiments.errors import InputError


class Clock:
    """The seconds until a part must begin nothing new."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def share(self, parts: int) -> "Clock":
        """A clock for one of some equal parts of the time that is left."""
        return Clock(self.left / max(1, parts))


class Results:
    """The entries of one part, in a JSON file that is written whole after each: the file is never half written."""

    def __init__(self, folder: pathlib.Path, part: str):
        self.path = folder / f"{part}.json"
        self.entries: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def done(self, key: str) -> bool:
        """Whether there is an entry that neither failed nor was left out for want of time."""
        return key in self.entries and not {"failed", "skipped"} & set(self.entries[key])

    def put(self, key: str, entry: Mapping[str, Any]) -> None:
        self.entries[key] = dict(entry)
        temporary = self.path.with_suffix(".tmp")
        cli.write_json(temporary, self.entries)
        os.replace(temporary, self.path)

    @contextlib.contextmanager
    def guard(self, key: str) -> Iterator[None]:
        """An error inside becomes the entry: the next one can go on."""
        try:
            yield
        except Exception:
            self.put(key, {"failed": traceback.format_exc()})

    def todo(self, keys: Mapping[str, float], clock: Clock) -> Iterator[str]:
        """The keys that are not done, while the time that each needs is left; the others are marked as left out.

        Args:
          keys: for each key the seconds that it needs at least.
          clock: of the part.
        """
        for key, seconds in keys.items():
            if self.done(key):
                continue
            if clock.left < seconds:
                self.put(key, {"skipped": f"{max(0.0, clock.left):.0f} s were left, {seconds:.0f} s are needed"})
                continue
            print(f"{key}: {clock.left:.0f} s left", flush=True)
            yield key


class Settings(NamedTuple):
    """What the parts get: `tiny` makes everything so small that a CPU does it in a minute."""

    tiny: bool
    mnist: Callable[[], data.Dataset]
    cifar10: Callable[[], data.Dataset]


def settings(folder: str | None, tiny: bool) -> Settings:
    """The settings of a session; without a folder of npz files, digits stand in for both sets if it is tiny."""

    def load(name: str) -> data.Dataset:
        if folder is None:
            digits = data.load("digits")
            colours = 3 if name == "cifar10" else 1
            x_train, x_test = (np.repeat(x[:n], colours, -1) for x, n in ((digits.x_train, 320), (digits.x_test, 80)))
            return digits._replace(
                x_train=x_train, y_train=digits.y_train[:320], x_test=x_test, y_test=digits.y_test[:80]
            )
        return data.load(f"npz:{folder}/{name}.npz")

    if folder is None and not tiny:
        raise InputError("The GPU session needs MNIST and CIFAR-10: give --data=FOLDER with mnist.npz and cifar10.npz.")
    return Settings(tiny, lambda: load("mnist"), lambda: load("cifar10"))


def threads(make: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Calls all functions at once, each in a thread (XLA compiles without Python's lock); an error is a value."""

    def guarded(function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:
            return error

    with ThreadPoolExecutor(min(12, os.cpu_count() or 1)) as pool:
        return dict(zip(make, pool.map(guarded, make.values()), strict=True))


def drawn(shapes: Any, seed: int) -> Any:
    """Random arrays of the given shapes, on the host: as no program draws them, there is none to compile.

    Matrices and kernels keep the size of a signal, roughly; vectors, such as the variances of BatchNorm, are around 1.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return np.zeros(leaf.shape, leaf.dtype)
        if leaf.ndim < 2:
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        fan_in = max(1, math.prod(leaf.shape[:-1]))
        centred = rng.random(leaf.shape, np.float32) - np.float32(0.5)
        return (centred * np.float32((12 / fan_in) ** 0.5)).astype(leaf.dtype)

    return jax.tree.map(draw, shapes)


def drawn_model(task: loop.Task, seed: int) -> tuple[Any, Any]:
    """Parameters and state of a model, `drawn`."""
    shapes = jax.eval_shape(task.init, jax.random.key(0)[None])
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), shapes)
    params, state = drawn(one, seed)
    return params, state


def drawn_feedback(task: loop.Task, rule: lrules.Rule, params: Any, state: Any, x: Any, seed: int) -> list[Any]:
    """What a rule's step takes beside the rest: the feedback, `drawn`, and the key of a stochastic rule."""
    key = jax.random.key(seed)
    shapes = jax.eval_shape(lambda key: rule.init(key, task.net, params, (state, x)), key)
    return [drawn(shapes, seed), *([key] if rule.stochastic else [])]


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def rated(optimizer: Callable[..., optax.GradientTransformation], **options: Any) -> optax.GradientTransformation:
    """The optimizer with its learning rate in its state, where `set_rates` changes it."""
    return optax.inject_hyperparams(optimizer)(learning_rate=0.0, **options)


def set_rates(run: loop.Run, rates: Any) -> None:
    """Gives each seed of a run its own learning rate; the optimizer must be `rated`."""
    rates = jnp.broadcast_to(jnp.asarray(rates, jnp.float32), (len(run.seeds),))
    state = optax.tree_utils.tree_set(run.carry.optimizer, learning_rate=rates)
    state = jax.tree.map(jnp.copy, state)  # two optimizers may not share an array: the run donates both
    run.carry = run.carry._replace(optimizer=state)


def scale_feedback(run: loop.Run, factors: Any) -> None:
    """Multiplies the fixed feedback weights of each seed of a run by its own factor."""
    factors = jnp.asarray(factors, jnp.float32)

    def scaled(leaf: jax.Array) -> jax.Array:
        return leaf * factors.reshape(-1, *[1] * (leaf.ndim - 1)).astype(leaf.dtype)

    fixed = jax.tree.map(scaled, run.carry.feedback.fixed)
    run.carry = run.carry._replace(feedback=run.carry.feedback._replace(fixed=fixed))


def standardized(dataset: data.Dataset) -> data.Dataset:
    """The same set, every channel with mean 0 and standard deviation 1 over the training set."""
    x_train, x_test = (np.asarray(x, np.float32) for x in (dataset.x_train, dataset.x_test))
    axes = tuple(range(x_train.ndim - 1))
    mean, sd = x_train.mean(axes, dtype=np.float64), x_train.std(axes, dtype=np.float64)
    x_train, x_test = (((x - mean) / sd).astype(np.float32) for x in (x_train, x_test))
    return dataset._replace(x_train=x_train, x_test=x_test)
