"""Step times on an accelerator: every rule over plain `jax.value_and_grad`, as in `experiments.benchmark`.

A step is the loss and its gradient, without an optimizer. Many steps run in one compiled loop, so that the host's
dispatch does not count; a barrier in the loop keeps XLA from computing anything once for all steps. Programs are
compiled in threads before the first is timed. Memory is what the loop allocates, gradients and temporaries.
"""

import functools
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lrules
from experiments import benchmark, loop, models, rules, transformer
from experiments.gpu import session

TOKENS, VOCABULARY = 64, 256
CHIEF = "backprop, feedback_alignment, direct_feedback_alignment, backman, dual_propagation"
SHARED = CHIEF.replace("direct_feedback_alignment", "direct_feedback_alignment(shared_axes=1)")
SHAPES = {"mlp": (28, 28, 1), "vgg16": (32, 32, 3), "resnet18": (32, 32, 3)}


class Case(NamedTuple):
    """A model, its dtype and batch, and how many steps one call takes."""

    model: str
    batch: int
    dtype: str
    steps: int
    rules: str = CHIEF

    def __str__(self) -> str:
        return f"{self.model}, {self.dtype}, batch {self.batch}" + (", all rules" if self.rules.count(",") > 5 else "")


def groups(tiny: bool) -> tuple[dict[str, list[Case]], dict[str, list[Case]]]:
    """Cases that are compiled together, by the name of the group: the first part, and what comes after ten seeds."""
    everything = ", ".join([*rules.argument_free_rules(), *benchmark.FURTHER])
    dtypes = ("float32", "bfloat16")
    if tiny:
        few = "feedback_alignment, direct_feedback_alignment(shared_axes=1)"
        return {
            "mlp": [Case("mlp", 4, dtype, 2, "feedback_alignment, backprop") for dtype in dtypes],
            "transformer": [Case("transformer", 2, "float32", 2, few)],
        }, {"mlp, all rules": [Case("mlp", 8, "float32", 2, "sign_error(feedback_alignment), feedback_alignment")]}
    mlp = [Case("mlp", batch, dtype, 50) for batch in (1024, 128) for dtype in dtypes]
    first = {
        "mlp": mlp,
        "transformer": [Case("transformer", 16, dtype, 10, SHARED) for dtype in dtypes],
        "resnet18": [Case("resnet18", 128, dtype, 5) for dtype in reversed(dtypes)],
        "vgg16": [Case("vgg16", 128, dtype, 5) for dtype in reversed(dtypes)],
    }
    later = {
        "mlp, all rules": [Case("mlp", 1024, "float32", 50, everything)],
        "transformer, batch 64": [Case("transformer", 64, dtype, 5, SHARED) for dtype in dtypes],
        "resnet18, batch 1024": [Case("resnet18", 1024, dtype, 2) for dtype in reversed(dtypes)],
        "vgg16, batch 1024": [Case("vgg16", 1024, dtype, 2) for dtype in reversed(dtypes)],
    }
    return first, later


# The least seconds in which a group is worth beginning, on an H100.
NEEDS = {"mlp": 10.0, "transformer": 20.0, "resnet18": 25.0, "vgg16": 25.0}


@functools.cache
def task(model: str, dtype: str, tiny: bool) -> loop.Task:
    """The model with its loss; built on the CPU, where small programs compile faster."""
    with jax.default_device(jax.devices("cpu")[0]):
        if model == "transformer":
            sizes = {"blocks": 2, "width": 8, "heads": 2} if tiny else {}
            return loop.task(
                lambda rngs: transformer.Transformer(VOCABULARY, TOKENS, rngs=rngs, dtype=jnp.dtype(dtype), **sizes)
            )
        widths = (16, 16) if tiny else (2000,) * 4
        return loop.task(
            lambda rngs: models.build(model, SHAPES[model], 10, rngs=rngs, widths=widths, dtype=jnp.dtype(dtype))
        )


def make_steps(case: Case, tiny: bool) -> tuple[dict[str, benchmark.Step], dict[str, str]]:
    """The plain step and one for each rule, with arguments on the accelerator; and the refusals."""
    rng, own = np.random.default_rng(0), task(case.model, case.dtype, tiny)
    if case.model == "transformer":
        x = rng.integers(0, VOCABULARY, (case.batch, TOKENS), np.int32)
        y = np.roll(x, -1, 1)
    else:
        x = rng.random((case.batch, *SHAPES[case.model]), np.float32)
        y = rng.integers(0, 10, case.batch, np.int32)
    params, state, x, y = jax.device_put((*session.drawn_model(own, 0), x, y))
    steps = {"plain": benchmark.Step(benchmark.plain_step(own), (params, lrules.Feedback({}, {}), state, x, y))}
    refused = {}
    for name, rule in rules.select(case.rules).items():
        try:
            feedback, *key = jax.device_put(session.drawn_feedback(own, rule, params, state, x, 1))
            step = jax.jit(benchmark.rule_step(own, rule))
            arguments = (params, feedback, state, x, y, *key)
            jax.eval_shape(step, *arguments)
        except (ValueError, TypeError, NotImplementedError) as error:
            refused[name] = session.first_line(error)
        else:
            steps[name] = benchmark.Step(step, arguments)
    return steps, refused


def looped(step: benchmark.Step, times: int) -> Any:
    """The step, `times` times, jitted: (the step's arguments) -> (summed losses, (state, gradients))."""
    function = jax.jit(step.function)

    def run(params: Any, feedback: Any, state: Any, x: jax.Array, y: jax.Array, *rng: jax.Array) -> Any:
        def body(i: jax.Array, carry: Any) -> Any:
            # The sum differs from step to step, so nothing behind the barrier is the same for all steps.
            *arguments, total = jax.lax.optimization_barrier((params, feedback, state, x, y, carry[0]))
            value, *rest = function(*arguments, *(jax.random.fold_in(key, i) for key in rng))
            return total + value.astype(total.dtype), rest

        shapes = jax.eval_shape(function, params, feedback, state, x, y, *rng)
        rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), list(shapes[1:]))
        return jax.lax.fori_loop(0, times, body, (jnp.zeros(()), rest))

    return jax.jit(run)


class Compiled(NamedTuple):
    """The compiled loops of a case, by the name of the rule."""

    steps: dict[str, benchmark.Step]
    loops: dict[str, Any]
    refused: dict[str, str]


def compile_together(cases: list[Case], tiny: bool, clock: session.Clock) -> dict[Case, Compiled]:
    """Traces all steps of some cases one after the other, then compiles them in threads; a case may get no time."""
    found: dict[Case, Compiled] = {}
    lowered = {}
    for case in cases:
        if found and clock.left < NEEDS.get(case.model, 0) / 2:
            break
        found[case] = Compiled({}, {}, {})
        steps, refused = make_steps(case, tiny)
        found[case].refused.update(refused)
        for name, step in steps.items():
            try:
                lowered[case, name] = looped(step, case.steps).lower(*step.arguments)
                found[case].steps[name] = step
            except Exception as error:
                found[case].refused[name] = session.first_line(error)
    work = {f"{case} {name}": low.compile for (case, name), low in lowered.items()}
    for (case, name), result in zip(lowered, session.threads(work).values(), strict=True):
        if isinstance(result, Exception):
            found[case].refused[name] = session.first_line(result)
            del found[case].steps[name]
        else:
            found[case].loops[name] = result
    return found


def measure(case: Case, compiled: Compiled, seconds: float) -> dict[str, Any]:
    """The rows of one case: times interleaved with the plain step, for at most `seconds` after three rounds."""
    steps, loops = compiled.steps, compiled.loops
    gradients = {}
    for name in loops:  # the first call loads the program
        (total, (_, grads)) = jax.block_until_ready(loops[name](*steps[name].arguments))
        if name in ("plain", "backprop"):
            gradients[name] = grads.params
        finite = bool(jnp.isfinite(total))
        if not finite:
            compiled.refused[f"{name}, note"] = "the loss is not finite; the time stands"

    def step_seconds(name: str) -> float:
        begin = time.perf_counter()
        out = [loops[name](*steps[name].arguments)[0] for _ in range(2)]
        jax.block_until_ready(out)
        return (time.perf_counter() - begin) / (len(out) * case.steps)

    times = benchmark.time_pairs(step_seconds, list(loops), 9, 3, seconds, lambda n: None)
    ratios = {name: own / plain for name, (own, plain) in times.items()}
    memory = {name: benchmark.memory_bytes(program) for name, program in loops.items()}
    rows = {}
    for name in loops:
        rule = rules.modified(name)
        rows[name] = {
            "step_seconds": np.median(times[name][0]),
            "step_ratio": np.quantile(ratios[name], (0.5, 0.25, 0.75)),
            "over_rule": np.median(ratios[name] / ratios[rule]) if rule in ratios else None,
            "memory_bytes": memory[name],
            "memory_ratio": memory[name] / max(1, memory["plain"]),
            "feedback_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(steps[name].arguments[1])),
        }
    entry: dict[str, Any] = {"case": case._asdict(), "rounds": len(times["plain"][0]), "rows": rows}
    if "backprop" in gradients:
        same = jax.tree.map(lambda a, b: bool((a == b).all()), gradients["backprop"], gradients["plain"])
        entry["backprop_is_identical"] = jax.tree.all(same)
    return entry | {"refused": compiled.refused, "alone": alone(case, steps["plain"])}


def alone(case: Case, step: benchmark.Step) -> dict[str, float]:
    """The plain step without the loop, call after call: with the host's dispatch, on the MLP (it compiles quickly)."""
    if case.model != "mlp":
        return {}
    program = jax.jit(step.function).lower(*step.arguments).compile()
    out = jax.block_until_ready(program(*step.arguments))
    begin = time.perf_counter()
    for _ in range(case.steps):
        out = program(*step.arguments)
    jax.block_until_ready(out)
    return {"plain_step_seconds": (time.perf_counter() - begin) / case.steps}


def precision() -> dict[str, float]:
    """The relative error of a float32 product at JAX's default precision, and at the highest: 3e-4 would be TF32."""
    a, b = (np.random.default_rng(seed).standard_normal((1024, 1024), np.float32) for seed in (0, 1))
    truth = a.astype(np.float64) @ b.astype(np.float64)
    return {
        name: float(np.linalg.norm(np.asarray(jnp.matmul(a, b, precision=name)) - truth) / np.linalg.norm(truth))
        for name in ("default", "highest")
    }


def part(
    results: session.Results, clock: session.Clock, settings: session.Settings, groups: Mapping[str, list[Case]]
) -> None:
    """An entry for each case; a group of cases is compiled together."""
    with results.guard("precision"):
        results.put("precision", {"relative_error_of_a_float32_product": precision()})
    for name, cases in groups.items():
        missing = [case for case in cases if not results.done(str(case))]
        if not missing:
            continue
        needs = 0.0 if settings.tiny else NEEDS[cases[0].model]
        if clock.left < needs:
            results.put(f"group {name}", {"skipped": f"{clock.left:.0f} s were left, {needs:.0f} s are needed"})
            continue
        print(f"{name}: {clock.left:.0f} s left", flush=True)
        ready: dict[Case, Compiled] = {}
        begin = time.perf_counter()
        with results.guard(f"group {name}"):
            ready = compile_together(missing, settings.tiny, clock)
            results.put(f"group {name}", {"seconds_to_compile_all_at_once": time.perf_counter() - begin})
        for case, compiled in ready.items():
            with results.guard(str(case)):
                results.put(str(case), measure(case, compiled, max(1.0, min(8.0, clock.left / len(ready)))))
        ready.clear()  # the programs and their arguments leave the accelerator


def compile_times(results: session.Results, clock: session.Clock, settings: session.Settings) -> None:
    """An entry for the MLP and one for the transformer: compile times one after the other, and memory of single steps.

    The autotuner has seen these products before, so these are the times of a second run.
    """
    chosen = [Case("mlp", 1024, "float32", 1), Case("transformer", 16, "float32", 1, SHARED)]
    if settings.tiny:
        chosen = [Case("mlp", 4, "float32", 1, "feedback_alignment")]
    cases = {f"compile time, {case}": case for case in chosen}
    for key in results.todo(dict.fromkeys(cases, 0.0 if settings.tiny else 15.0), clock):
        case = cases[key]
        with results.guard(key):
            steps, _ = make_steps(case, settings.tiny)
            rows: dict[str, dict[str, Any]] = {}
            for name in steps:
                if rows and clock.left < 5:
                    break
                program, seconds = benchmark.compile_step(steps[name])
                rows[name] = {"compile_seconds": seconds, "memory_bytes": benchmark.memory_bytes(program)}
            for row in rows.values():
                row["compile_ratio"] = row["compile_seconds"] / rows["plain"]["compile_seconds"]
                row["memory_ratio"] = row["memory_bytes"] / max(1, rows["plain"]["memory_bytes"])
            results.put(key, {"case": case._asdict(), "rows": rows})
