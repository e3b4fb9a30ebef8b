"""Operations of a pipeline: on paper, and in the compiled program of one device; the times of a stage.

All devices of a pipeline run the same program, in step: in a tick, a stage without a microbatch computes what nobody
reads. So the operations of the program of one device are those of the critical path.

On paper only products count. In operations, for one microbatch of m examples, `layers` dense layers of `width` in a
stage, and C outputs:

    f = 2 m width^2 layers                 the forward pass of a stage
    b = 2 m C width                        direct feedback to one hidden signal
    first, last = 2 m inputs width, 2 m width C

    backprop               (M + P - 1) 3 f + (M + P - 1) 2 first + M 3 last
    direct                 (M + P - 1) f + M (f + b layers) + ends
    direct between stages  (M + P - 1) f + M (2 f - f / layers + b) + ends
    ends                   (M + P - 1) first + M (2 first + b) + M 2 last

(Between stages no error goes below the first layer of a stage. The forward pass of `first` runs once more in its
backward pass, see `steps.direct`.)
"""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import lrules
from experiments.parallel import hlo, stages, steps, timetable
from experiments.parallel.split import split_feedback

BETWEEN = "direct between stages"
RULES: dict[str, lrules.Rule] = {
    "backprop": lrules.backprop(),
    "direct": lrules.direct_feedback_alignment(),
    BETWEEN: lrules.direct_feedback_alignment(at=stages.BOUNDARY),
}
NAMES = tuple(RULES)


class Size(NamedTuple):
    """A pipeline of dense layers."""

    stages: int = 8
    microbatches: int = 8
    examples: int = 8  # of a microbatch
    inputs: int = 64
    width: int = 64
    outputs: int = 10
    layers: int = 2  # of a stage

    @property
    def forward(self) -> int:
        """f: the operations of a stage's forward pass for one microbatch."""
        return 2 * self.examples * self.width**2 * self.layers

    @property
    def feedback(self) -> int:
        """b: those that bring the output error of one microbatch to one hidden signal."""
        return 2 * self.examples * self.outputs * self.width


def on_paper(size: Size) -> dict[str, int]:
    """Operations of the critical path, from the formulas above."""
    ticks, m, f = size.microbatches + size.stages - 1, size.microbatches, size.forward
    first = 2 * size.examples * size.inputs * size.width
    last = 2 * size.examples * size.width * size.outputs
    b, ends = size.feedback, ticks * first + m * (2 * first + size.feedback) + m * 2 * last
    return {
        "backprop": ticks * 3 * f + ticks * 2 * first + m * 3 * last,
        "direct": ticks * f + m * (f + b * size.layers) + ends,
        BETWEEN: ticks * f + m * (2 * f - f // size.layers + b) + ends,
    }


class Problem(NamedTuple):
    """A step in a pipeline and on one device, with their arguments."""

    step: Callable[..., Any]
    arguments: tuple[Any, ...]
    whole: Callable[..., Any]
    unplaced: tuple[Any, ...]

    @property
    def program(self) -> Any:
        """The compiled step of the pipeline."""
        return jax.jit(self.step).lower(*self.arguments).compile()


def problem(name: str, size: Size, *, dtype: Any = jnp.float32, seed: int = 0) -> Problem:
    """A network of dense layers with tanh, random data and the squared error, under one of `RULES`."""
    net, loss, rule = stages.mlp(jnp.tanh), lrules.testing.half_squared_error, RULES[name]
    keys = jax.random.split(jax.random.key(seed), 4)
    params = stages.mlp_params(
        keys[0], inputs=size.inputs, width=size.width, outputs=size.outputs, stages=size.stages, layers=size.layers,
        dtype=dtype,
    )  # fmt: skip
    batch = size.microbatches * size.examples
    x = jax.random.normal(keys[1], (batch, size.inputs), dtype)
    y = jax.random.normal(keys[2], (batch, size.outputs), dtype)
    feedback, mesh = rule.init(keys[3], net.whole, params, x), stages.make_mesh(size.stages)
    fed: Any = {}
    if name == "backprop":
        step = steps.gpipe(net, loss, mesh, size.microbatches)
    else:
        step = steps.direct(net, loss, rule, mesh, size.microbatches)
        fed = stages.place(split_feedback(net, rule, params, feedback, x), mesh)
    placed = (stages.place(stages.stacked(params), mesh), fed, x, y)
    return Problem(step, placed, lrules.value_and_grad(net.whole, loss, rule), (params, feedback, x, y))


def difference(made: Problem) -> float:
    """How far the gradients of the pipeline are from those of one device, relative to the largest of each array."""
    (value, _), grads = jax.jit(made.whole)(*made.unplaced)
    piped_value, piped, _ = jax.jit(made.step)(*made.arguments)
    return stages.difference((value, stages.stacked(grads.params)), (piped_value, piped))


class Counted(NamedTuple):
    """What the compiled program of one device does, and the bytes that it holds besides arguments and results."""

    products: int
    sent: dict[str, tuple[int, int]]
    temporary: int


def counted(name: str, size: Size) -> Counted:
    """Compiles a step under one of `RULES`; it runs nothing."""
    program = problem(name, size).program
    return Counted(*hlo.read(program.as_text() or ""), program.memory_analysis().temp_size_in_bytes)


def sent_on_paper(size: Size) -> dict[str, dict[str, tuple[int, int]]]:
    """How often a device sends and how many bytes, in float32.

    Each tick sends what a stage made to the next one. Backpropagation sends errors of that size down. A direct rule
    sends the output error of each microbatch to all. At the end both share the gradients of `first` and `last`, and the
    value.
    """
    ticks, m = size.microbatches + size.stages - 1, size.microbatches
    up = 4 * size.examples * size.width
    ends = 4 * ((size.inputs + 1) * size.width + (size.width + 1) * size.outputs + 1)
    error = 4 * size.examples * size.outputs
    once = {"collective-permute": (ticks, ticks * up), "all-reduce": (m + 1, m * error + ends)}
    return {
        "backprop": {"collective-permute": (2 * ticks, 2 * ticks * up), "all-reduce": (1, ends)},
        "direct": once,
        BETWEEN: once,
    }


def stage_seconds(size: Size, repeats: int) -> dict[str, list[float]]:
    """Measured on this machine: the processor time of a stage's forward pass, and what each backward pass adds.

    Each is the median of `repeats` runs, then the quartiles. The programs run in turn. What a backward pass adds is the
    time of both passes together without the median of the forward pass. It is processor time, not wall time, as the
    machine may have other work.
    """
    net = stages.mlp(jnp.tanh)
    params = stages.mlp_params(
        jax.random.key(0), inputs=size.inputs, width=size.width, outputs=size.outputs, stages=1, layers=size.layers
    )
    h = jax.random.normal(jax.random.key(1), (size.examples, size.width))
    d = jax.random.normal(jax.random.key(2), h.shape)
    e = jax.random.normal(jax.random.key(3), (size.examples, size.outputs))
    local, both = net.alone(net.stage), {"part": params.stages[0], "last": params.last}

    def backprop(p: Any, h: jax.Array) -> Any:
        out, pull = jax.vjp(net.stage, p, h)
        return out, pull(d)

    def direct(name: str) -> Callable[..., Any]:
        f, feedback = lrules.transform(local, RULES[name]), RULES[name].init(jax.random.key(4), local, both, h)

        def run(p: Any, h: jax.Array) -> Any:
            (_, out), pull = jax.vjp(lambda p: f({"part": p, "last": params.last}, feedback, h), p)
            return out, pull((e, jnp.zeros_like(out)))

        return run

    made = {"forward": net.stage, "backprop": backprop} | {name: direct(name) for name in ("direct", BETWEEN)}
    programs, p = {name: jax.jit(run) for name, run in made.items()}, params.stages[0]
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeats + 3):
        for name, program in programs.items():
            start = time.process_time()
            jax.block_until_ready(program(p, h))
            if turn >= 3:
                seconds[name].append(time.process_time() - start)
    alone = statistics.median(seconds["forward"])
    added = {name: [t - (name != "forward") * alone for t in times] for name, times in seconds.items()}
    quartiles = {name: statistics.quantiles(times, n=4) for name, times in added.items()}
    return {name: [middle, low, high] for name, (low, middle, high) in quartiles.items()}


def simulated(
    seconds: Mapping[str, Sequence[float]], counts: Sequence[int], microbatches: Sequence[int]
) -> list[dict[str, Any]]:
    """The time of a step and the idle part of a stage, for each number of stages and of microbatches.

    All stages cost the same; the two ends of the network and the sending cost nothing. "direct between stages" is a
    rule with `at="boundary"`: inside a stage the error flows as in backpropagation.
    """
    rows: list[dict[str, Any]] = []
    for p, m in itertools.product(counts, microbatches):
        for name, (schedule, own) in SIMULATED.items():
            forward, down = seconds["forward"][0], seconds[own][0]
            made = timetable.SCHEDULES[schedule](timetable.equal(p, forward, down, down), m)
            row = {"schedule": name, "stages": p, "microbatches": m, "seconds": made.makespan}
            rows.append(row | {"idle": sum(made.idle) / p, "in_flight": max(made.in_flight)})
    return rows


# By name: the timetable, and the backward pass of a stage.
SIMULATED = {
    "GPipe": ("GPipe", "backprop"),
    "1F1B": ("1F1B", "backprop"),
    "direct": ("direct", "direct"),
    BETWEEN: ("direct", BETWEEN),
}
