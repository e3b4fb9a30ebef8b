"""Are the gradients of rules on an accelerator those of the CPU, and those of many seeds those of each alone?

Both sides compute in float32 with `jax_default_matmul_precision="highest"`, from the same parameters, feedback and
keys. `tests/test_gpu.py` asks the same functions.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import benchmark, rules
from experiments.gpu import session

TOLERANCE = 1e-4
MODELS = ("mlp", "cnn", "transformer")
# One of each kind: sequential, direct, with norms, with two states, with learned feedback and noise, modified.
RULES = (
    "feedback_alignment, {direct}, backman, dual_propagation, node_perturbation(std=0.01), "
    "drop_error(feedback_alignment, rate=0.5)"
)
SEEDED = "feedback_alignment, backman"  # for ten seeds at once


def names(model: str) -> list[str]:
    """The rules that are compared on a model."""
    shared = "(shared_axes=1)" if model == "transformer" else ""
    return list(rules.select(RULES.format(direct=f"direct_feedback_alignment{shared}")))


def of_rule(model: str, name: str, device: jax.Device) -> float:
    """The relative error of a rule's gradient on the device, against the CPU."""
    step = session.problem(model, 8, small=True).step(rules.parse(name))
    with jax.default_matmul_precision("highest"):
        there, here = (_gradients(step)(*jax.device_put(step.arguments, d)) for d in (device, jax.devices("cpu")[0]))
    return relative_error(there, here)


def of_seeds(model: str, name: str, device: jax.Device, seeds: int = 10) -> float:
    """The largest relative error of the gradients of many seeds at once, against those of each alone."""
    steps = [session.problem(model, 8, small=True, seed=s).step(rules.parse(name), 10 + s) for s in range(seeds)]
    each = jax.device_put([step.arguments for step in steps], device)
    alone = _gradients(steps[0])
    with jax.default_matmul_precision("highest"):
        together = jax.jit(jax.vmap(alone))(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))
        return max(
            relative_error(jax.tree.map(lambda leaf, i=i: leaf[i], together), alone(*own)) for i, own in enumerate(each)
        )


def _gradients(step: benchmark.Step) -> Callable[..., Any]:
    def gradients(*arguments: Any) -> Any:
        grads = step.function(*arguments)[2]
        return grads.params, grads.feedback

    return jax.jit(gradients)


def relative_error(found: Any, expected: Any) -> float:
    """The largest relative error of a leaf, ||a - b|| / ||b||; a leaf of less than 1% of the whole is small change.

    (The gradient of a bias of attention's keys, for example, is zero but for rounding.)
    """
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    ]
    whole = np.sqrt(sum(np.sum(b**2) for _, b in pairs))
    errors = [np.linalg.norm(a - b) / max(np.linalg.norm(b), 0.01 * whole, 1e-30) for a, b in pairs]
    return float(np.max(errors))  # NaN stays NaN


def part(results: session.Results, clock: session.Clock, tiny: bool) -> None:
    """Entries: for each model the relative errors of the rules; then those of ten seeds at once."""
    device = jax.devices()[0]
    keys = [*(f"{m}, device against CPU" for m in MODELS), *(f"{m}, ten seeds against one" for m in MODELS[:2])]
    for key in results.todo(dict.fromkeys(keys, 5.0), clock):
        model, seeded = key.split(",")[0], "seeds" in key
        errors: dict[str, Any] = {}
        with results.guard(key):
            for name in (list(rules.select(SEEDED)) if seeded else names(model))[: 2 if tiny else None]:
                try:
                    errors[name] = (of_seeds if seeded else of_rule)(model, name, device)
                except Exception as error:
                    errors[name] = session.first_line(error)
                wrong = [n for n, e in errors.items() if not (isinstance(e, float) and e <= TOLERANCE)]
                results.put(key, {"relative_errors": errors, "wrong": wrong, "device": device.device_kind})
