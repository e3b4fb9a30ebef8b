"""What all parts share: the time that is left, results that survive an interruption, and models with their inputs."""

import contextlib
import json
import math
import pathlib
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lrules
from experiments import benchmark, files, tasks, transformer

TOKENS, VOCABULARY = 64, 256
SMALL = {"mlp": benchmark.Case((12, 12, 3), 8, (64,) * 3), "cnn": benchmark.Case((12, 12, 3), 8)}


class Clock:
    """The seconds until a part must begin nothing new."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


class Results:
    """The entries of one part, in a JSON file that is written whole after each."""

    def __init__(self, folder: pathlib.Path, part: str):
        self.path = folder / f"{part}.json"
        self.entries: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def put(self, key: str, entry: Mapping[str, Any]) -> None:
        self.entries[key] = dict(entry)
        files.write_json(self.path, self.entries)

    @contextlib.contextmanager
    def guard(self, key: str) -> Iterator[None]:
        """An error inside is written into the entry, beside what was measured before: the next one can go on."""
        try:
            yield
        except Exception:
            self.put(key, self.entries.get(key, {}) | {"failed": traceback.format_exc()})

    def todo(self, keys: Mapping[str, float], clock: Clock) -> Iterator[str]:
        """The keys that have no whole entry, while the time that each needs is left; the others are marked.

        Args:
          keys: for each key the seconds that it needs at least.
          clock: of the part.
        """
        for key, seconds in keys.items():
            before = self.entries.get(key, {"skipped": ""})
            if not {"failed", "skipped"} & set(before):
                continue
            kept = {name: value for name, value in before.items() if name not in ("failed", "skipped")}
            if clock.left < seconds:
                self.put(key, kept | {"skipped": f"{max(0.0, clock.left):.0f} s were left, {seconds:.0f} s are needed"})
                continue
            print(f"{key}: {clock.left:.0f} s left", flush=True)
            self.entries[key] = kept
            yield key


class Problem(NamedTuple):
    """A model with its loss; parameters, state, inputs and targets are arrays of the host."""

    task: tasks.Task
    params: Any
    state: Any
    x: np.ndarray
    y: np.ndarray

    def step(self, rule: lrules.Rule | None, seed: int = 1) -> benchmark.Step:
        """A step of the rule, or of plain `jax.value_and_grad` for None; its feedback is drawn from the seed."""
        task, params, state, x, y = self
        if rule is None:
            return benchmark.Step(benchmark.plain_step(task), (params, lrules.Feedback({}, {}), state, x, y))
        key, init = jax.random.key(seed), rule.init
        feedback = drawn(jax.eval_shape(lambda key: init(key, task.net, params, (state, x)), key), seed)
        step = benchmark.rule_step(task, rule)
        return benchmark.Step(step, (params, feedback, state, x, y, *([key] if rule.stochastic else [])))


def problem(model: str, batch: int, dtype: str = "float32", *, small: bool = False, seed: int = 0) -> Problem:
    """A model of the benchmark, or the transformer; the small ones (and the cnn) are for correctness and for CPUs."""
    rng = np.random.default_rng(seed)
    if model == "transformer":
        sizes: dict[str, Any] = {"blocks": 2, "width": 32, "heads": 2} if small else {}
        sizes["dtype"] = jnp.dtype(dtype)
        task = tasks.task(lambda rngs: transformer.Transformer(VOCABULARY, TOKENS, rngs=rngs, **sizes))
        x = rng.integers(0, VOCABULARY, (batch, TOKENS), np.int32)
        y = np.roll(x, -1, 1)
    else:
        case = (SMALL if small else benchmark.FULL)[model]
        task = tasks.task(case.maker(model, dtype))
        x = rng.random((batch, *case.shape), np.float32)
        y = rng.integers(0, 10, batch, np.int32)
    params, state = drawn(jax.eval_shape(task.init, jax.random.key(0)), seed)
    return Problem(task, params, state, x, y)


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


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
