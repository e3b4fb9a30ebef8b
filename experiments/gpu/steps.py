"""Step times on an accelerator: rules over plain `jax.value_and_grad`, as in `experiments.benchmark`.

A step is the loss and its gradient, without an optimizer. The MLP's steps are so short that the host's dispatch would
count: many of them run in one compiled loop, in which a barrier keeps XLA from computing anything once for all steps.
Other models take several asynchronous steps, one call each. (XLA measures which algorithm each convolution takes, for
every program anew, so that few programs fit into a session.) Memory is what a call allocates: gradients, temporaries.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import benchmark, rules
from experiments.gpu import session

CHIEF = "backprop, feedback_alignment, direct_feedback_alignment, backman, dual_propagation"
LOOPED = {"mlp": 50}  # steps of a compiled loop
NEEDS = {"mlp": 15.0}  # the least seconds in which a case is worth beginning; 60 for other models


class Case(NamedTuple):
    """A model, its dtype and batch, and rules."""

    model: str
    dtype: str
    batch: int
    rules: str = CHIEF

    def __str__(self) -> str:
        return f"{self.model}, {self.dtype}, batch {self.batch}" + (", all rules" if self.rules.count(",") > 5 else "")


def cases(tiny: bool) -> list[Case]:
    """The cases in the order of their value."""
    if tiny:
        few = "feedback_alignment, sign_error(feedback_alignment)"
        return [Case("mlp", "bfloat16", 4, f"backprop, {few}"), Case("transformer", "float32", 2, few)]
    shared = CHIEF.replace("direct_feedback_alignment", "direct_feedback_alignment(shared_axes=1)")
    found = [
        Case(model, dtype, batch // 8 if model == "transformer" else batch, shared if model == "transformer" else CHIEF)
        for batch in (128, 1024)
        for dtype in ("bfloat16", "float32")
        for model in ("mlp", "resnet18", "vgg16", "transformer")
    ]
    return [*found, Case("mlp", "float32", 1024, ", ".join([*rules.argument_free_rules(), *benchmark.FURTHER]))]


def looped(step: benchmark.Step, times: int) -> Callable[..., Any]:
    """The step, `times` times: (the step's arguments) -> (summed losses, state, gradients)."""
    function = jax.jit(step.function)

    def run(params: Any, feedback: Any, state: Any, x: jax.Array, y: jax.Array, *rng: jax.Array) -> Any:
        def body(i: jax.Array, carry: Any) -> Any:
            # The sum differs from step to step, so nothing behind the barrier is the same for all steps.
            *arguments, total = jax.lax.optimization_barrier((params, feedback, state, x, y, carry[0]))
            value, *rest = function(*arguments, *(jax.random.fold_in(key, i) for key in rng))
            return total + value.astype(total.dtype), *rest

        shapes = jax.eval_shape(function, params, feedback, state, x, y, *rng)
        rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[1:])
        return jax.lax.fori_loop(0, times, body, (jnp.zeros(()), *rest))

    return run


class Program(NamedTuple):
    """A compiled step, or loop of steps, with its arguments on the accelerator."""

    call: Any
    arguments: tuple[Any, ...]
    steps: int
    compile_seconds: float

    def seconds(self, calls: int) -> float:
        """The seconds of a step, over some calls."""
        begin = time.perf_counter()
        jax.block_until_ready([self.call(*self.arguments)[0] for _ in range(calls)])
        return (time.perf_counter() - begin) / (calls * self.steps)


def compiled(step: benchmark.Step, steps: int) -> Program:
    """The program of a step."""
    arguments = jax.device_put(step.arguments)
    begin = time.perf_counter()
    call = jax.jit(step.function if steps == 1 else looped(step, steps)).lower(*arguments).compile()
    return Program(call, arguments, steps, time.perf_counter() - begin)


def measure(results: session.Results, clock: session.Clock, case: Case, tiny: bool) -> None:
    """Compiles and measures plain, then rule after rule next to it; the entry is written after each."""
    own, steps = session.problem(case.model, case.batch, case.dtype, small=tiny), LOOPED.get(case.model, 1)
    programs = {"plain": compiled(own.step(None), steps)}
    plain = jax.block_until_ready(programs["plain"].call(*programs["plain"].arguments))[2].params
    calls = max(2, math.ceil(0.05 / (steps * programs["plain"].seconds(1))))
    entry: dict[str, Any] = {"rows": {}, "refused": {}} | results.entries[str(case)]
    for name, rule in {"plain": None, **rules.select(case.rules)}.items():
        if name in entry["rows"]:
            continue
        if name != "plain" and not tiny and clock.left < programs["plain"].compile_seconds:
            results.put(str(case), entry | {"skipped": f"{clock.left:.0f} s were left at {name}"})
            return
        try:
            if rule is not None:
                programs[name] = compiled(own.step(rule), steps)
                gradients = jax.block_until_ready(programs[name].call(*programs[name].arguments))[2].params
                if name == "backprop":
                    same = jax.tree.map(lambda a, b: bool((a == b).all()), gradients, plain)
                    entry["backprop_is_identical"] = jax.tree.all(same)
            entry["rows"][name] = row(programs, name, calls, entry["rows"])
        except Exception as error:
            entry["refused"][name] = session.first_line(error)
        if name != "plain":
            programs.pop(name, None)  # its feedback leaves the accelerator
        results.put(str(case), entry)


def row(programs: dict[str, Program], name: str, calls: int, rows: dict[str, Any]) -> dict[str, Any]:
    """The figures of one rule, timed in turn with the plain step."""
    pairs = benchmark.time_pairs(lambda n: programs[n].seconds(calls), [name], 9, 3, 3.0, lambda n: None)
    own, plain = pairs[name]
    ratio = np.quantile(own / plain, (0.5, 0.25, 0.75)).tolist()
    base = rows.get(rules.modified(name) or "")
    memory = {n: benchmark.memory_bytes(programs[n].call) for n in ("plain", name)}
    return {
        "step_seconds": np.median(own),
        "step_ratio": ratio,
        "over_rule": ratio[0] / base["step_ratio"][0] if base else None,
        "compile_seconds": programs[name].compile_seconds,
        "memory_bytes": memory[name],
        "memory_ratio": memory[name] / max(1, memory["plain"]),
        "feedback_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(programs[name].arguments[1])),
    }


def precision() -> dict[str, float]:
    """The relative error of a float32 product at JAX's default precision, and at the highest: 3e-4 would be TF32."""
    a, b = (np.random.default_rng(seed).standard_normal((1024, 1024), np.float32) for seed in (0, 1))
    truth = a.astype(np.float64) @ b.astype(np.float64)
    return {
        name: float(np.linalg.norm(np.asarray(jnp.matmul(a, b, precision=name)) - truth) / np.linalg.norm(truth))
        for name in ("default", "highest")
    }


def part(results: session.Results, clock: session.Clock, tiny: bool) -> None:
    """An entry for each case."""
    with results.guard("precision"):
        results.put("precision", {"relative_error_of_a_float32_product": precision()})
    chosen = {str(case): case for case in cases(tiny)}
    needs = {key: 0.0 if tiny else NEEDS.get(case.model, 60.0) for key, case in chosen.items()}
    for key in results.todo(needs, clock):
        with results.guard(key):
            measure(results, clock, chosen[key], tiny)
