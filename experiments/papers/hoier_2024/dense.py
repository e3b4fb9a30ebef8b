"""The dense networks of Tables 1 and 2 and of figure 3: their settings, and what is measured after training.

The paper gives the widths, ReLU, beta 1/2, Adam with a rate of 1e-3, and for Table 1 20 epochs. The rest is as in the
authors' code: half the squared error on one-hot targets; the first 50,000 images, divided by 255; batches of 50 images
that follow one another in the set, and that come in a new order in each epoch; normal weights with a variance of
1 / fan-in; biases 0; the accuracy of the last epoch.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lrules
from experiments import rules, tasks
from experiments.config import Config
from experiments.data import Dataset, scale
from experiments.papers.cells import Job, thin, trained
from experiments.papers.hoier_2024 import layers
from experiments.trial import Trial

IMAGES = 50_000
BETA = 0.5
CONFIG = Config(
    dataset="mnist",
    loss="squared_error",
    widths=(512, 512),
    activation="relu",
    batch_size=50,
    optimizer="adam",
    learning_rate=1e-3,
    schedule="constant",
    epochs=20,
    seeds=3,
    probe=0,
)


def original(alpha: float, iterations: int, **options: Any) -> str:
    """DP (Eq. 2), with the exact minimiser at the outputs (Eq. 3)."""
    return _rule(alpha=alpha, beta=BETA, adjoint=False, iterations=iterations, output="squared_error", **options)


def adjoint(alpha: float, iterations: int, **options: Any) -> str:
    """DP^T (Eq. 19), linearised at the current outputs (Eq. 22)."""
    return _rule(alpha=alpha, beta=BETA, iterations=iterations, output="refreshed", **options)


def _rule(**options: Any) -> str:
    return f"dual_propagation({', '.join(f'{name}={value!r}' for name, value in options.items())})"


def fixed_batches(dataset: Dataset, size: int) -> Dataset:
    """The first images in batches of this size: an example of the new set is a batch, so batches stay as they are."""
    count = min(IMAGES, len(dataset.x_train)) // size
    x, y = (a[: count * size].reshape(count, size, *a.shape[1:]) for a in (dataset.x_train, dataset.y_train))
    return dataset._replace(x_train=x, y_train=y)


def task(config: Config, dataset: Dataset) -> tasks.Task:
    """The task of a config, for examples that are batches and for single ones, with the weights of the authors."""
    built = tasks.build(config, dataset)
    pixels = math.prod(dataset.shape)

    def init(key: jax.Array) -> tuple[Any, Any]:
        params, state = built.init(key)
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
        drawn = [
            jax.random.normal(k, leaf.shape) / math.sqrt(leaf.shape[0]) if leaf.ndim > 1 else jnp.zeros_like(leaf)
            for k, leaf in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, drawn), state

    return built._replace(init=init, prepare=lambda x: scale(x).reshape(-1, pixels), targets=lambda x, y: y.reshape(-1))


def trial(job: Job) -> tuple[Trial, tasks.Task, Dataset]:
    """The trial of a job on fixed batches, its task and these batches."""
    config, dataset = job.config, job.dataset(job.config)
    built, batches = task(config, dataset), fixed_batches(dataset, config.batch_size)
    probe = math.ceil(config.probe / config.batch_size)  # both count batches now
    return Trial(config.replace(batch_size=1, probe=probe), batches, task=built), built, batches


def measure(job: Job) -> Mapping[str, Any] | None:
    """Accuracy; after training the Lipschitz estimate, and for a batch the residual of the states, by iteration."""
    training, built, batches = trial(job)
    found = trained(job, training)
    if found is None:
        return None
    carry, rule = training.carry(0), rules.parse(job.config.rule)
    x, y = built.prepare(batches.x_train[:1]), jnp.asarray(batches.y_train[0])
    lipschitz, residual = jax.jit(jax.vmap(measures(built, rule, x, y)))(carry.params, carry.state, carry.feedback)
    figures: dict[str, Any] = {"lipschitz": {"by_seed": np.asarray(lipschitz)}}
    if "records" in found:
        by_layer = thin(layers.curves(found["records"]), job.config.epochs)
        figures |= {"curves": {**found["curves"], **by_layer}}
        found = {name: value for name, value in found.items() if name != "records"}
    if residual.size:
        figures |= {"residual": {"by_seed": np.asarray(residual[:, -1])}, "residuals": np.asarray(residual)}
    return {**found, **figures}


def measures(task: tasks.Task, rule: lrules.Rule, x: jax.Array, y: jax.Array) -> Any:
    """A function of one seed: the Lipschitz estimate, and for a batch the residual of the states in each iteration."""
    value_and_grad = lrules.value_and_grad(task.net, task.loss, rule)

    def measure(params: Any, state: Any, feedback: lrules.Feedback) -> tuple[jax.Array, jax.Array]:
        def net(params: Any, x: jax.Array) -> jax.Array:
            return task.net(params, (state, x))[0]

        report = value_and_grad(params, feedback, (state, x), y)[1].report
        return lrules.diagnostics.lipschitz_product(net, params, x), report.get("residual", jnp.zeros(0))

    return measure
