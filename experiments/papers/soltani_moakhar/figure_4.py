"""Figure 4: the coefficients c of BackMAN by layer during the training, and their correlation with the size of g.

    python -m experiments.papers.soltani_moakhar --figure=4 --data_dir=FOLDER                 # a GPU: 2 minutes
    python -m experiments.papers.soltani_moakhar --figure=4 --epochs=2 --seeds=1              # two cores: 2 minutes

The paper's settings: the network and the training of Table 1 on MNIST. Each layer has a panel with the distribution of
its c, and the correlation over its neurons of c with the norm of g. The paper does not say on which images, nor over
what else the correlation is. Ours are the first images of the training set, as many as a batch has, without crops,
after each epoch that the curves keep, and c is 1 / ||r^T a||, as the rate plays alpha. For g and for r the norm is over
the images, and a neuron without a gradient is left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import lrules
from experiments import plots, sweep, tasks
from experiments.loop import Record
from experiments.papers import cells
from experiments.papers.cells import Cell, Found, Job, Shown, Table
from experiments.papers.soltani_moakhar.settings import BACKMAN, MLP
from experiments.papers.soltani_moakhar.table_1 import CHOSEN
from experiments.trial import Trial

LAYERS = len(MLP.widths) + 1
QUANTILES = {"low": 0.05, "median": 0.5, "high": 0.95}
DEAD = 1e-15


def recorded() -> lrules.Rule:
    """BackMAN with alpha 1 for dense layers, whose state has for each neuron c, the norm of g and that of r."""

    def backward(op: Any, w: Any, b: Any, x: Any, d: Any, layer: Any, *, state: Any) -> tuple[Any, ...]:
        raw = op.weight_gradient(w, x, d)
        norm = jnp.linalg.norm(raw, axis=0, keepdims=True)
        norm = jnp.where(norm < DEAD, norm.mean(), norm)
        c = jnp.where(norm > 0, 1 / norm, 0)
        size = jnp.linalg.norm(d, axis=0)
        found = {"c": c[0], "g": c[0] * size, "r": size}
        return raw * c, op.passed_down(w * c, x, d), None, found

    def state(layer: Any) -> dict[str, Any]:
        return dict.fromkeys("cgr", jnp.zeros(layer.weight.aval.shape[1]))

    return lrules.sequential(backward, state=state, whole_batch=True)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of two numbers over the neurons; 0 where one of them is the same for all."""
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


class Watched(Trial):
    """A trial that measures the coefficients after each epoch that the curves keep, on one batch; its run has them."""

    def __init__(self, job: Job):
        dataset = job.dataset(job.config)
        super().__init__(job.config, dataset, grid=sweep.NO_GRID)
        task, rule = tasks.build(job.config, dataset), recorded()
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
        alive = g > 0
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


def figure_4(found: Sequence[Found]) -> Figure:
    """For each layer the distribution of c by epoch, and below the correlations of c with the norms of g and r."""
    made = Figure(figsize=(3.2 * LAYERS, 5.6), dpi=130, layout="constrained")
    axes = made.subplots(2, LAYERS, squeeze=False, sharex=True)
    each = found[0]
    for number, column in enumerate(axes.T, 1):
        epochs = each.curve("accuracy")[0]
        low, median, high = (each.curve(f"{word} {number}")[1].mean(1) for word in QUANTILES)
        column[0].plot(epochs, median, marker=".", color=plots.COLOURS[0])
        column[0].fill_between(epochs, low, high, color=plots.COLOURS[0], alpha=0.2, linewidth=0)
        plots.logarithmic(column[0])
        for name, style in zip("gr", plots.styles(), strict=False):
            values = each.curve(f"{name} {number}")[1].mean(1)
            column[1].plot(epochs, values, marker=".", label=f"c and |{name}|", **style)
        column[0].set_title(f"layer {number}" if number < LAYERS else "output layer")
        column[1].set(ylim=(-1.05, 1.05), xlabel="epoch")
        for axis in column:
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("c: median, 5% to 95%")
    axes[1][0].set_ylabel("correlation over neurons")
    axes[1][0].legend(frameon=False, fontsize="small")
    if each.less:
        made.suptitle(each.less, fontsize="small")
    return made


_BATCH, _RATE = CHOSEN["MLP MNIST"][BACKMAN]
_CONFIG = MLP.replace(rule="backman", batch_size=_BATCH, learning_rate=_RATE, seeds=1)
FIGURE_4 = Table(
    "BackMAN on MNIST: correlation over the neurons of a layer of c with the norms of g and r, mean over the training",
    [Cell(BACKMAN, "", _CONFIG, minutes=70, gpu_minutes=2, measure=coefficients)],
    [Shown(f"{name} {i}", f"{name}, layer {i}", 1, 2) for name in "gr" for i in range(1, LAYERS + 1)],
    notes="The paper has a picture and no numbers. It says that c decreases where the norm of g increases. As g is "
    "c r, both are here: the signal r that arrives at a neuron, and the signal g that the neuron passes down.",
    plot=figure_4,
)
