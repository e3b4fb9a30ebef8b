"""Are the gradients of every rule on an accelerator those of the CPU, and those of many seeds those of each alone?

Both sides compute in float32 with `jax_default_matmul_precision="highest"`, from the same parameters, feedback and
keys. `tests/test_gpu.py` asks the same functions.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lrules
from experiments import benchmark, loop, models, rules, transformer
from experiments.gpu import session

TOLERANCE = 1e-4
# Where the error is rounded to a power of two or to its sign, a last bit can change a signal by as much as itself.
ROUNDING = ("quantize_error", "sign_error")
ROUNDED_TOLERANCE = 1e-2
EVERYWHERE = (
    "backprop, feedback_alignment, direct_feedback_alignment(shared_axes=1), backman, dual_propagation, kolen_pollack, "
    "sign_symmetry, skipped_backprop, node_perturbation(std=0.01)"
)
SEEDED = ("feedback_alignment", "direct_feedback_alignment", "backman")


def tolerance(rule: str) -> float:
    """The greatest relative error that a rule's gradient may have."""
    return ROUNDED_TOLERANCE if rule.startswith(ROUNDING) else TOLERANCE


def names(model: str) -> list[str]:
    """The rules that are compared on a model: all of the benchmark on the MLP, the chief ones on the others."""
    if model == "mlp":
        return [*rules.argument_free_rules(), *benchmark.FURTHER]
    chosen = EVERYWHERE if model == "transformer" else EVERYWHERE.replace("(shared_axes=1)", "")
    return list(rules.select(chosen))


def task_and_batch(model: str, *, tiny: bool) -> tuple[loop.Task, jax.Array, jax.Array]:
    """A small model with its loss, and a batch of random inputs and labels."""
    keys = jax.random.split(jax.random.key(0), 2)
    batch, width = (8, 16) if tiny else (64, 256)
    if model == "transformer":
        tokens = jax.random.randint(keys[0], (batch // 4, 8), 0, 11)
        sizes = {"blocks": 2, "width": 4 * width // 16, "heads": 2}
        task = loop.task(lambda rngs: transformer.Transformer(11, 8, rngs=rngs, **sizes))
        return task, tokens, jnp.roll(tokens, -1, 1)
    shape = (12, 12, 3) if model == "cnn" else (28, 28, 1)
    task = loop.task(lambda rngs: models.build(model, shape, 10, rngs=rngs, widths=(width,) * 3))
    return task, jax.random.uniform(keys[0], (batch, *shape)), jax.random.randint(keys[1], (batch,), 0, 10)


MODELS = ("mlp", "cnn", "transformer")


class Comparison:
    """One model on two devices. Rules are traced one after the other, and compiled and run in threads."""

    def __init__(self, model: str, device: jax.Device, *, tiny: bool = False):
        self.device, self.cpu = device, jax.devices("cpu")[0]
        with jax.default_device(self.cpu):
            self.task, self.x, self.y = task_and_batch(model, tiny=tiny)

    def of_rule(self, rule: lrules.Rule) -> Callable[[], float]:
        """Traces the rule's gradient; the function that is returned gives its relative error on the device."""
        with jax.default_device(self.cpu), jax.default_matmul_precision("highest"):
            arguments = self._arguments(rule, 0)
            step = jax.jit(_gradients(self.task, rule))
            sides = [jax.device_put(arguments, device) for device in (self.device, self.cpu)]
            lowered = [step.lower(*side) for side in sides]

        def error() -> float:
            there, here = (low.compile()(*side) for low, side in zip(lowered, sides, strict=True))
            return relative_error(there, here)

        return error

    def of_seeds(self, rule: lrules.Rule, seeds: int = 10) -> Callable[[], float]:
        """Traces the gradient of many seeds at once and of one; the function gives the largest relative error."""
        with jax.default_device(self.cpu), jax.default_matmul_precision("highest"):
            each = [self._arguments(rule, 10 * seed) for seed in range(seeds)]
            each = jax.device_put(each, self.device)
            together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
            step = _gradients(self.task, rule)
            lowered = jax.jit(jax.vmap(step)).lower(*together), jax.jit(step).lower(*each[0])

        def error() -> float:
            many, one = (low.compile() for low in lowered)
            found = many(*together)
            seeds_found = [jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(seeds)]
            return max(relative_error(a, one(*own)) for a, own in zip(seeds_found, each, strict=True))

        return error

    def _arguments(self, rule: lrules.Rule, seed: int) -> tuple[Any, ...]:
        params, state = session.drawn_model(self.task, seed)
        feedback, *key = session.drawn_feedback(self.task, rule, params, state, self.x, seed + 1)
        return params, feedback, state, self.x, self.y, *key


def _gradients(task: loop.Task, rule: lrules.Rule) -> Callable[..., Any]:
    step = benchmark.rule_step(task, rule)

    def gradients(*arguments: Any) -> Any:
        grads = step(*arguments)[2]
        return grads.params, grads.feedback

    return gradients


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


def part(results: session.Results, clock: session.Clock, settings: session.Settings) -> None:
    """Entries: for each model the relative errors of the rules; then those of ten seeds at once."""
    device = jax.devices()[0]
    keys = {f"{model}, device against CPU": 8.0 for model in MODELS} | {
        f"{model}, ten seeds against one": 5.0 for model in MODELS[:2]
    }
    for key in results.todo(keys, clock):
        model = key.split(",")[0]
        with results.guard(key):
            comparison, work, errors = Comparison(model, device, tiny=settings.tiny), {}, {}
            chosen = list(SEEDED) if "seeds" in key else names(model)
            for name in chosen[:2] if settings.tiny else chosen:
                if clock.left < 2:
                    break
                try:
                    rule = rules.parse(name)
                    work[name] = comparison.of_seeds(rule) if "seeds" in key else comparison.of_rule(rule)
                except Exception as error:
                    errors[name] = session.first_line(error)
            for name, found in session.threads(work).items():
                errors[name] = session.first_line(found) if isinstance(found, Exception) else found
            wrong = [n for n, e in errors.items() if not (isinstance(e, float) and e <= tolerance(n))]
            results.put(key, {"relative_errors": errors, "wrong": wrong, "device": device.device_kind})
