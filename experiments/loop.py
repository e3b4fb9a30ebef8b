"""Training under any rule, many seeds at once: vmap over the seeds, one compiled loop over the steps.

(On a CPU a model that convolves takes its steps one by one: XLA's convolutions are much slower in a loop there.)

    task = loop.task(lambda rngs: models.MLP((64, 100, 10), rngs=rngs))
    run = loop.Run(task, lrules.backman(), data.load("digits"), seeds=range(5), optimizer=optax.adam(1e-3))
    records = [run.epoch() for _ in range(10)]
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lrules
from experiments.data import Dataset, scale
from experiments.errors import InputError

Array = jax.Array
PyTree = Any
Loss = Callable[[Array, Array], Array]

# (logits [batch, classes], labels [batch]) -> [batch]
cross_entropy: Loss = optax.softmax_cross_entropy_with_integer_labels


class Task(NamedTuple):
    """A model and its loss as pure functions, compiled once for every rule; `[seeds]` marks a leading axis of seeds."""

    net: lrules.Network  # (params, (state, x [batch, ...])) -> (logits [batch, classes], new state), in training mode
    loss: Loss
    init: Callable[..., tuple[PyTree, PyTree]]  # keys [seeds] -> (params, state) [seeds]
    evaluate: Callable[..., tuple[Array, Array]]  # (params, state, x, y) -> (losses, hits) [seeds, batch]
    backprop: Callable[..., PyTree]  # (params, state, x, y) -> gradient [seeds]


class Carry(NamedTuple):
    """What training carries from step to step; in a `Run` every leaf has a leading axis of seeds."""

    params: PyTree
    state: PyTree  # of the model, such as the statistics of BatchNorm
    feedback: lrules.Feedback
    optimizer: PyTree


class Record(NamedTuple):
    """One epoch: figures by seed [seeds], and the seconds that its steps took."""

    epoch: int
    train_loss: np.ndarray
    test_loss: np.ndarray
    accuracy: np.ndarray
    angle: np.ndarray  # degrees between the rule's update and backprop's on a fixed batch
    seconds: float


class Refused(InputError):
    """A rule cannot train this model."""


def task(make_model: Callable[[nnx.Rngs], nnx.Module], loss: Loss = cross_entropy) -> Task:
    """The functions of a model, given the function that builds it."""
    model = make_model(nnx.Rngs(0))
    net: lrules.Network = lrules.from_nnx(model, with_state=True)[0]
    model.eval()
    evaluating = nnx.graphdef(model)
    value_and_grad = lrules.value_and_grad(net, loss, lrules.backprop())

    def init(key: Array) -> tuple[PyTree, PyTree]:
        split: Any = nnx.split(make_model(nnx.Rngs(jax.random.fold_in(key, 0))), nnx.Param, ...)
        return split[1], split[2]

    def evaluate(params: PyTree, state: PyTree, x: Array, y: Array) -> tuple[Array, Array]:
        outputs = nnx.merge(evaluating, params, state, copy=True)(scale(x))
        return loss(outputs, y), outputs.argmax(-1) == y

    def backprop(params: PyTree, state: PyTree, x: Array, y: Array) -> PyTree:
        return value_and_grad(params, lrules.Feedback({}, {}), (state, scale(x)), y)[1].params

    over_seeds = (0, 0, None, None)
    return Task(
        net,
        loss,
        jax.jit(jax.vmap(init)),
        jax.jit(jax.vmap(evaluate, over_seeds)),
        jax.jit(jax.vmap(backprop, over_seeds)),
    )


def make_step(
    task: Task, rule: lrules.Rule, optimizer: optax.GradientTransformation
) -> Callable[[Carry, Array, Array, Array], tuple[Carry, Array]]:
    """One step: (carry, key, x [batch, ...], y [batch]) -> (carry, mean loss); learned feedback is optimized too."""
    value_and_grad = lrules.value_and_grad(task.net, task.loss, rule)

    def step(carry: Carry, key: Array, x: Array, y: Array) -> tuple[Carry, Array]:
        (value, _, state), grads = value_and_grad(
            carry.params, carry.feedback, (carry.state, x), y, rng=key if rule.stochastic else None
        )
        trained = carry.params, carry.feedback.learned
        updates, optimizer_state = optimizer.update((grads.params, grads.feedback), carry.optimizer, trained)
        params, learned = optax.apply_updates(trained, updates)
        feedback = carry.feedback._replace(learned=learned, state=grads.state)
        return Carry(params, state, feedback, optimizer_state), value

    return step


class Run:
    """One rule on one task and data set, for many seeds at once. Seed k alone gives what it gives among others."""

    def __init__(
        self,
        task: Task,
        rule: lrules.Rule,
        data: Dataset,
        *,
        optimizer: optax.GradientTransformation,
        seeds: Sequence[int] = (0,),
        batch_size: int = 32,
        augment: Callable[[Array, Array], Array] | None = None,  # (key, x [batch, ...]) -> x
        check_nan: bool = False,
        probe: int = 256,
    ):
        """Initialise and compile. `probe` training examples measure the angle, `check_nan` makes NaN an error."""
        self.seeds, self.batch_size, self.check_nan = tuple(seeds), batch_size, check_nan
        self.steps, self.epochs = steps_per_epoch(data, batch_size), 0
        self._task, self._keys = task, jax.vmap(jax.random.key)(jnp.asarray(self.seeds))
        self._train_set = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
        self._test_set = jnp.asarray(data.x_test), jnp.asarray(data.y_test)
        self._probe = self._train_set[0][:probe], self._train_set[1][:probe]
        step = make_step(task, rule, optimizer)
        value_and_grad = lrules.value_and_grad(task.net, task.loss, rule)

        def init(key: Array, params: PyTree, state: PyTree, x: Array) -> tuple[lrules.Feedback, PyTree]:
            feedback = rule.init(jax.random.fold_in(key, 1), task.net, params, (state, scale(x)))
            return feedback, optimizer.init((params, feedback.learned))

        def train(carry: Carry, key: Array, order: Array, start: Array, stop: Array, x: Array, y: Array):
            def body(i: Array, loop: tuple[Carry, Array]) -> tuple[Carry, Array]:
                carry, total = loop
                inputs, keys = scale(x[order[i]]), jax.random.split(jax.random.fold_in(key, i))
                inputs = augment(keys[0], inputs) if augment else inputs
                carry, value = step(carry, keys[1], inputs, y[order[i]])
                return carry, total + value

            begin = carry, jnp.zeros(())
            return jax.lax.fori_loop(start, stop, body, begin) if self._looped else body(start, begin)

        def to_backprop(carry: Carry, key: Array, truth: PyTree, x: Array, y: Array) -> Array:
            rng = key if rule.stochastic else None
            _, grads = value_and_grad(carry.params, carry.feedback, (carry.state, scale(x)), y, rng=rng)
            return lrules.diagnostics.total_angle(grads.params, truth)

        start = time.perf_counter()
        params, state = task.init(self._keys)
        feedback, optimizer_state = _refusing(jax.jit(jax.vmap(init, (0, 0, 0, None))))(
            self._keys, params, state, self._probe[0][:batch_size]
        )
        self.carry = Carry(params, state, feedback, optimizer_state)
        convolves = any(leaf.ndim > 4 for leaf in jax.tree.leaves(params))  # [seeds, height, width, in, out]
        self._looped = jax.default_backend() != "cpu" or not convolves
        keys, order = self._shuffle()
        jitted = jax.jit(jax.vmap(train, (0, 0, 0, None, None, None, None)), donate_argnums=0)
        self._train = _refusing(jitted.lower)(self.carry, keys, order, 0, self.steps, *self._train_set).compile()
        self._angle = jax.jit(jax.vmap(to_backprop, (0, 0, 0, None, None)))
        self.compile_seconds = time.perf_counter() - start

    def _shuffle(self) -> tuple[Array, Array]:
        """This epoch's keys [seeds] and orders of examples [seeds, steps, batch]."""
        return _shuffle(self._keys, self.epochs, len(self._train_set[0]), self.steps, self.batch_size)

    def epoch(self, *, parts: int = 1, advance: Callable[[int], Any] | None = None) -> Record:
        """Train one epoch and evaluate; `advance(steps)` is called after each of about `parts` parts."""
        keys, order = self._shuffle()
        self.epochs += 1
        size = -(-self.steps // parts) if self._looped else 1
        total = jnp.zeros(len(self.seeds))
        begin = time.perf_counter()
        for start in range(0, self.steps, size):
            stop = min(start + size, self.steps)
            self.carry, losses = self._train(self.carry, keys, order, start, stop, *self._train_set)
            total += losses
            if self.check_nan:
                self._check(total)
            if advance:
                jax.block_until_ready(losses)
                advance(stop - start)
        jax.block_until_ready(total)
        seconds = time.perf_counter() - begin
        params, state = self.carry.params, self.carry.state
        test_loss, accuracy = self.evaluate(*self._test_set)
        angles = self._angle(self.carry, keys, self._task.backprop(params, state, *self._probe), *self._probe)
        return Record(self.epochs, np.asarray(total / self.steps), test_loss, accuracy, np.asarray(angles), seconds)

    def evaluate(self, x: Array, y: Array, *, batch_size: int = 250) -> tuple[np.ndarray, np.ndarray]:
        """Mean loss and accuracy [seeds] on a set of examples."""
        size = min(batch_size, len(x))
        starts = [*range(0, len(x) - size, size), len(x) - size]  # the last batch overlaps, so that all have one size
        parts = []
        for i, start in enumerate(starts):
            batch = slice(start, start + size)
            known = i * size - start
            figures = self._task.evaluate(self.carry.params, self.carry.state, x[batch], y[batch])
            parts.append([np.asarray(figure)[:, known:] for figure in figures])
        losses, hits = (np.concatenate(figure, axis=1) for figure in zip(*parts, strict=True))
        return losses.mean(1), hits.mean(1)

    def _check(self, losses: Array) -> None:
        bad = [seed for seed, value in zip(self.seeds, np.asarray(losses), strict=True) if not np.isfinite(value)]
        if bad:
            raise InputError(
                f"The loss of seed {bad[0]} became NaN or Inf in epoch {self.epochs}: lower the learning rate "
                "or look for extreme values in the data."
            )


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
@functools.partial(jax.vmap, in_axes=(0, None, None, None, None))
def _shuffle(key: Array, epoch: int, examples: int, steps: int, batch_size: int) -> tuple[Array, Array]:
    key = jax.random.fold_in(jax.random.fold_in(key, 2), epoch)
    order = jax.random.permutation(key, examples)[: steps * batch_size]
    return key, order.reshape(steps, batch_size)


def steps_per_epoch(data: Dataset, batch_size: int) -> int:
    """Full batches in an epoch; the examples left over differ from epoch to epoch."""
    steps = len(data.x_train) // batch_size
    if not steps:
        raise InputError(
            f"The batch size {batch_size} exceeds the {len(data.x_train)} training examples of {data.name}: lower it."
        )
    return steps


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """The last epoch's figures (mean and sd over seeds), and every epoch's by seed: curves [epochs][seeds]."""
    last = records[-1]
    figures: dict[str, Any] = {}
    for name in ("accuracy", "test_loss", "train_loss", "angle"):
        values = getattr(last, name)
        figures |= {name: values.mean(), f"{name}_sd": values.std(), f"{name}_by_seed": values}
    curves = {name: [getattr(r, name) for r in records] for name in Record._fields if name != "epoch"}
    return figures | {"curves": curves}


def _refusing(function: Callable) -> Callable:
    """A rule that refuses a network says why; pass its first sentence on."""

    def guarded(*args):
        try:
            return function(*args)
        except InputError:
            raise
        except (ValueError, TypeError, NotImplementedError) as error:
            raise Refused(str(error).splitlines()[0]) from error

    return guarded
