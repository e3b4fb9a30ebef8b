"""The coefficients c of BackMAN by layer during the training, and their correlation with the size of signals.

r is the signal that arrives at a layer, and g = c r the one that it passes down. The paper does not say on which images
it measured. Ours are the first images of the training set, as many as a batch has, without crops, after each epoch that
the curves keep. c is alpha / ||r^T a|| with the rule's alpha, without the rate. The norms of g and r are over the
images, and a neuron without a gradient is left out.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lrules
from experiments import expressions, sweep, tasks
from experiments.loop import Record
from experiments.papers import cells
from experiments.papers.cells import Job
from experiments.trial import Trial

QUANTILES = {"low": 0.05, "median": 0.5, "high": 0.95}
DEAD = 1e-15


def recorded(alpha: float | Mapping[str, float] = 1.0) -> lrules.Rule:
    """BackMAN for dense layers, whose state has for each neuron c, the norm of g and that of r."""

    def backward(op: Any, w: Any, b: Any, x: Any, d: Any, layer: Any, *, alpha: Any, state: Any) -> tuple[Any, ...]:
        raw = op.weight_gradient(w, x, d)
        norm = jnp.linalg.norm(raw, axis=0, keepdims=True)
        norm = jnp.where(norm < DEAD, norm.mean(), norm)
        c = jnp.where(norm > 0, alpha / norm, 0)
        size = jnp.linalg.norm(d, axis=0)
        found = {"c": c[0], "g": c[0] * size, "r": size}
        return raw * c, op.passed_down(w * c, x, d), None, found

    def state(layer: Any) -> dict[str, Any]:
        return dict.fromkeys("cgr", jnp.zeros(layer.weight.aval.shape[1]))

    return lrules.sequential(backward, state=state, whole_batch=True, numbers={"alpha": alpha})


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of the logarithms of two numbers over the neurons, as some c are huge; 0 where one is the same for all."""
    a, b = np.log(a), np.log(b)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


class Watched(Trial):
    """A trial that measures the coefficients after each epoch that the curves keep, on one batch; its run has them."""

    def __init__(self, job: Job):
        dataset = job.dataset(job.config)
        super().__init__(job.config, dataset, grid=sweep.NO_GRID)
        task = tasks.build(job.config, dataset)
        rule = recorded(expressions.single(job.config.rule, "rule")[2].get("alpha", 1.0))
        x, y = (jnp.asarray(a[: job.config.batch_size]) for a in (dataset.x_train, dataset.y_train))
        value_and_grad = lrules.value_and_grad(task.net, task.loss, rule)

        def states(params: Any, state: Any) -> Any:
            inputs = state, task.prepare(x)
            feedback = rule.init(jax.random.key(0), task.net, params, inputs)
            return value_and_grad(params, feedback, inputs, y)[1].state

        self._states = jax.jit(states)

    def epoch(self, **options: Any) -> Record | None:
        """An epoch as of any trial, and then the measures."""
        record = super().epoch(**options)
        if record is not None and self.epochs in cells.kept_epochs(self.config.epochs):
            carry = self.carry(0)
            both = carry.params, carry.state
            lanes = [jax.tree.map(lambda leaf, i=i: leaf[i], both) for i in range(self.config.seeds)]
            found = [figures(jax.tree.map(np.asarray, self._states(*lane))) for lane in lanes]
            self.runs[0].curve[-1] |= {name: np.array([own[name] for own in found]) for name in found[0]}
        return record


def figures(states: Mapping[str, Any]) -> dict[str, float]:
    """Quantiles of c, and its correlations with the norms of g and of r, of each layer from below."""
    found = {}
    for number, name in enumerate(sorted(states), 1):
        c, g, r = (np.asarray(states[name][key], float) for key in "cgr")
        alive = (c > 0) & (g > 0)
        c, g, r = c[alive], g[alive], r[alive]
        for word, level in QUANTILES.items():
            found[f"{word} {number}"] = float(np.quantile(c, level)) if len(c) else 0.0
        found[f"g {number}"] = correlation(c, g) if len(c) > 1 else 0.0
        found[f"r {number}"] = correlation(c, r) if len(c) > 1 else 0.0
    return found


def coefficients(job: Job) -> Mapping[str, Any] | None:
    """Trains with BackMAN; the figures are the correlations, each the mean over the training."""
    trial = Watched(job)
    result = cells.trained(job, trial)
    if result is None:
        return None
    points = [entry for entry in trial.runs[0].curve if "g 1" in entry]
    names = [name for name in points[0] if name[-1].isdigit()]
    curves = {name: np.array([point[name] for point in points]) for name in names}
    means = {name: {"by_seed": curve.mean(0)} for name, curve in curves.items() if name[0] in "gr"}
    return means | dict(result) | {"curves": result["curves"] | curves}
