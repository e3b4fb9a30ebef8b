"""Training with any rule, many seeds at once: vmap over the seeds, one compiled loop over the steps.

(On a CPU, a model with convolutions takes its steps one by one: XLA's convolutions are much slower in a loop there.)

    task = loop.task(lambda rngs: models.MLP((64, 100, 10), rngs=rngs))
    run = loop.Run(task, lrules.backman(), data.load("digits"), seeds=range(5), optimizer=optax.adam(1e-3))
    records = [run.epoch() for _ in range(10)]
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lrules
from experiments import adversarial
from experiments.data import Dataset, scale
from experiments.errors import InputError

Array = jax.Array
PyTree = Any
Loss = Callable[[Array, Array], Array]

# (logits [batch, classes], labels [batch]) -> [batch]
cross_entropy: Loss = optax.softmax_cross_entropy_with_integer_labels


def squared_error(outputs: Array, labels: Array) -> Array:
    """Half the squared distance to the one-hot target: (outputs [batch, classes], labels [batch]) -> [batch]."""
    return 0.5 * jnp.sum(jnp.square(outputs - jax.nn.one_hot(labels, outputs.shape[-1], dtype=outputs.dtype)), -1)


class Task(NamedTuple):
    """A model and its loss as pure functions, compiled once for all rules; `[seeds]` means a leading axis of seeds."""

    net: lrules.Network  # (params, (state, x [batch, ...])) -> (logits [batch, classes], new state), in training mode
    loss: Loss
    init: Callable[..., tuple[PyTree, PyTree]]  # keys [seeds] -> (params, state) [seeds]
    # (params, state, x, y, epsilon=0.0) -> (losses, hits) [seeds, batch], under an FGSM attack with the step epsilon
    evaluate: Callable[..., tuple[Array, Array]]
    backprop: Callable[..., PyTree]  # (params, state, x, y) -> gradient [seeds]
    constraint: optax.GradientTransformation = optax.identity()  # comes after the optimizer of the forward weights


class Optimizers(NamedTuple):
    """One optimizer for the forward weights and one for learned feedback; each has its own state."""

    params: optax.GradientTransformation
    feedback: optax.GradientTransformation


class Carry(NamedTuple):
    """The values that training carries from step to step; in a `Run` every leaf has a leading axis of seeds."""

    params: PyTree
    state: PyTree  # of the model, such as the statistics of BatchNorm
    feedback: lrules.Feedback
    optimizer: tuple[PyTree, PyTree]  # states of the two `Optimizers`


class Record(NamedTuple):
    """One epoch: figures by seed [seeds], and the seconds that its steps took."""

    epoch: int
    train_loss: np.ndarray
    test_loss: np.ndarray
    accuracy: np.ndarray
    angle: np.ndarray  # degrees between the rule's update and backprop's on a fixed batch
    seconds: float
    attacked: np.ndarray | None = None  # accuracy under attack, if the run measures it


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

    def evaluate(params: PyTree, state: PyTree, x: Array, y: Array, epsilon: float = 0.0) -> tuple[Array, Array]:
        def one_seed(params: PyTree, state: PyTree) -> tuple[Array, Array]:
            def model(x: Array) -> Array:
                return nnx.merge(evaluating, params, state, copy=True)(x)

            outputs = model(adversarial.fgsm(lambda x: loss(model(x), y), scale(x), epsilon))
            return loss(outputs, y), outputs.argmax(-1) == y

        return jax.vmap(one_seed)(params, state)

    def backprop(params: PyTree, state: PyTree, x: Array, y: Array) -> PyTree:
        return value_and_grad(params, lrules.Feedback({}, {}), (state, scale(x)), y)[1].params

    return Task(
        net,
        loss,
        jax.jit(jax.vmap(init)),
        jax.jit(evaluate, static_argnames="epsilon"),
        jax.jit(jax.vmap(backprop, (0, 0, None, None))),
    )


def mono_net(task: Task, shape: Sequence[int], initializer: Callable[..., Array]) -> Task:
    """The task with a mono-net: weights >= 0 in all layers but the first, at the start and after each step.

    Args:
      task: a task whose model has increasing activations.
      shape: the shape of one input.
      initializer: the initializer of these weights, as in `lrules.monotone`.
    """
    x = jnp.zeros((2, *shape))
    params, state = jax.tree.map(lambda leaf: leaf[0], task.init(jax.random.key(0)[None]))
    positive = lrules.monotone.initialize(jax.random.key(0), task.net, params, (state, x))
    lrules.monotone.check(task.net, positive, (state, x))

    def init(keys: Array) -> tuple[PyTree, PyTree]:
        params, state = task.init(keys)

        def one_seed(key: Array, params: PyTree, state: PyTree) -> PyTree:
            key = jax.random.fold_in(key, 4)
            return lrules.monotone.initialize(key, task.net, params, (state, x), init=initializer)

        return jax.jit(jax.vmap(one_seed))(keys, params, state), state

    return task._replace(init=init, constraint=lrules.monotone.constrain(task.net, params, (state, x)))


def check(task: Task, rules: Mapping[str, lrules.Rule], data: Dataset, batch_size: int) -> None:
    """Trace a step of each rule without computing it, so that a rule refuses before any rule has trained.

    Raises:
      Refused: a rule cannot train this model; the message names the rule.
    """
    x, y = (jax.ShapeDtypeStruct((batch_size, *a.shape[1:]), a.dtype) for a in (data.x_train, data.y_train))

    def step(key: Array, x: Array, y: Array, rule: lrules.Rule) -> Any:
        params, state = jax.tree.map(lambda leaf: leaf[0], task.init(key[None]))
        feedback = rule.init(key, task.net, params, (state, scale(x)))
        value_and_grad = lrules.value_and_grad(task.net, task.loss, rule)
        return value_and_grad(params, feedback, (state, scale(x)), y, rng=key if rule.stochastic else None)

    for name, rule in rules.items():
        try:
            _refusing(jax.eval_shape)(functools.partial(step, rule=rule), jax.random.key(0), x, y)
        except Refused as error:
            raise Refused(f"{name}: {error}") from error


def make_step(
    task: Task,
    rule: lrules.Rule,
    optimizer: optax.GradientTransformation | Optimizers,
    *,
    fgsm: float = 0.0,
    warmup: bool = False,
) -> Callable[[Carry, Array, Array, Array], tuple[Carry, Array]]:
    """One step: (carry, key, x [batch, ...], y [batch]) -> (carry, mean loss); it optimizes learned feedback too.

    Args:
      task, rule: the model with its loss, and the rule that trains it.
      optimizer: the same one for forward and learned feedback weights, or `Optimizers`.
      fgsm: the step of adversarial training, along the plain gradient of the present network.
      warmup: train only the feedback; everything else keeps its value, also the state of the forward optimizer and the
        averages of BatchNorm.
    """
    optimizers = as_optimizers(optimizer, task)
    value_and_grad = lrules.value_and_grad(task.net, task.loss, rule)

    def step(carry: Carry, key: Array, x: Array, y: Array) -> tuple[Carry, Array]:
        x = adversarial.fgsm(lambda x: task.loss(task.net(carry.params, (carry.state, x))[0], y), x, fgsm)
        (value, _, state), grads = value_and_grad(
            carry.params, carry.feedback, (carry.state, x), y, rng=key if rule.stochastic else None
        )
        params, learned = carry.params, carry.feedback.learned
        forward_state, feedback_state = carry.optimizer
        updates, feedback_state = optimizers.feedback.update(grads.feedback, feedback_state, learned)
        feedback = carry.feedback._replace(learned=optax.apply_updates(learned, updates), state=grads.state)
        if warmup:
            return carry._replace(feedback=feedback, optimizer=(forward_state, feedback_state)), value
        updates, forward_state = optimizers.params.update(grads.params, forward_state, params)
        return Carry(optax.apply_updates(params, updates), state, feedback, (forward_state, feedback_state)), value

    return step


def as_optimizers(optimizer: optax.GradientTransformation | Optimizers, task: Task) -> Optimizers:
    """One optimizer is used for both; the constraint of the task comes after that of the forward weights."""
    both = optimizer if isinstance(optimizer, Optimizers) else Optimizers(optimizer, optimizer)
    return both._replace(params=optax.chain(both.params, task.constraint))


class Run:
    """One rule on one task and data set, for many seeds at once. A seed gives the same result alone or with others."""

    def __init__(
        self,
        task: Task,
        rule: lrules.Rule,
        data: Dataset,
        *,
        optimizer: optax.GradientTransformation | Optimizers,
        seeds: Sequence[int] = (0,),
        batch_size: int = 32,
        augment: Callable[[Array, Array], Array] | None = None,  # (key, x [batch, ...]) -> x
        fgsm: float = 0.0,
        attack: float = 0.0,
        check_nan: bool = False,
        probe: int = 256,
    ):
        """Initialise and compile. `probe` training examples measure the angle; with `check_nan` NaN is an error.

        `fgsm` is the step of adversarial training. `attack` is the step of the attack under which accuracy is measured.
        """
        for epsilon in (fgsm, attack):
            adversarial.check(epsilon)
        self.attack = float(attack)
        self.seeds, self.batch_size, self.check_nan = tuple(seeds), batch_size, check_nan
        self.steps, self.epochs = steps_per_epoch(data, batch_size), 0
        self._task, self._keys = task, jax.vmap(jax.random.key)(jnp.asarray(self.seeds))
        self._train_set = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
        self._test_set = jnp.asarray(data.x_test), jnp.asarray(data.y_test)
        self._probe = self._train_set[0][:probe], self._train_set[1][:probe]
        self._make_step = functools.partial(make_step, task, rule, optimizer, fgsm=fgsm)
        self._augment, optimizers = augment, as_optimizers(optimizer, task)
        value_and_grad = lrules.value_and_grad(task.net, task.loss, rule)

        def init(key: Array, params: PyTree, state: PyTree, x: Array) -> tuple[lrules.Feedback, PyTree]:
            feedback = rule.init(jax.random.fold_in(key, 1), task.net, params, (state, scale(x)))
            return feedback, (optimizers.params.init(params), optimizers.feedback.init(feedback.learned))

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
        self._train = self._compile(self._make_step())
        self._angle = jax.jit(jax.vmap(to_backprop, (0, 0, 0, None, None)))
        self.compile_seconds = time.perf_counter() - start

    def _compile(self, step: Callable[[Carry, Array, Array, Array], tuple[Carry, Array]]) -> Callable[..., Any]:
        """Steps `start` to `stop` of an epoch: (carry, keys, order, start, stop, x, y) -> (carry, summed losses)."""

        def train(carry: Carry, key: Array, order: Array, start: Array, stop: Array, x: Array, y: Array):
            def body(i: Array, loop: tuple[Carry, Array]) -> tuple[Carry, Array]:
                carry, total = loop
                inputs, keys = scale(x[order[i]]), jax.random.split(jax.random.fold_in(key, i))
                inputs = self._augment(keys[0], inputs) if self._augment else inputs
                carry, value = step(carry, keys[1], inputs, y[order[i]])
                return carry, total + value

            begin = carry, jnp.zeros(())
            return jax.lax.fori_loop(start, stop, body, begin) if self._looped else body(start, begin)

        jitted = jax.jit(jax.vmap(train, (0, 0, 0, None, None, None, None)), donate_argnums=0)
        return _refusing(jitted.lower)(self.carry, *self._shuffle(), 0, self.steps, *self._train_set).compile()

    def _shuffle(self, *, warmup: int | None = None) -> tuple[Array, Array]:
        """The keys [seeds] and orders of examples [seeds, steps, batch] of this epoch, or of a warm-up epoch."""
        purpose, epoch = (2, self.epochs) if warmup is None else (3, warmup)
        return _shuffle(self._keys, purpose, epoch, len(self._train_set[0]), self.steps, self.batch_size)

    def _steps(self, train: Callable[..., Any], shuffled: tuple[Array, Array], parts: int, advance: Any) -> np.ndarray:
        """One pass over the training set; returns the summed losses."""
        size = -(-self.steps // parts) if self._looped else 1
        sums = []  # added on the host: on the device the first sum would be compiled, and its time counted
        for start in range(0, self.steps, size):
            stop = min(start + size, self.steps)
            self.carry, losses = train(self.carry, *shuffled, start, stop, *self._train_set)
            sums.append(losses)
            if self.check_nan:
                self._check(losses)
            if advance:
                jax.block_until_ready(losses)
                advance(stop - start)
        return np.sum(jax.block_until_ready(sums), axis=0)

    @property
    def learns_feedback(self) -> bool:
        """Whether there is feedback that a warm-up would train."""
        return bool(jax.tree.leaves((self.carry.feedback.learned, self.carry.feedback.state)))

    def warm_up(self, epochs: int, *, parts: int = 1, advance: Callable[[int], Any] | None = None) -> None:
        """Train only the feedback for some epochs. They do not count as epochs of the run.

        It does nothing for a rule that does not learn feedback. The later epochs have the same batches as without a
        warm-up.
        """
        if epochs and self.learns_feedback:
            train = self._compile(self._make_step(warmup=True))
            for epoch in range(epochs):
                self._steps(train, self._shuffle(warmup=epoch), parts, advance)

    def epoch(self, *, parts: int = 1, advance: Callable[[int], Any] | None = None) -> Record:
        """Train one epoch and evaluate; it calls `advance(steps)` after each of about `parts` parts."""
        keys, order = jax.block_until_ready(self._shuffle())
        self.epochs += 1
        begin = time.perf_counter()
        total = self._steps(self._train, (keys, order), parts, advance)
        seconds = time.perf_counter() - begin
        params, state = self.carry.params, self.carry.state
        test_loss, accuracy = self.evaluate(*self._test_set)
        angles = self._angle(self.carry, keys, self._task.backprop(params, state, *self._probe), *self._probe)
        attacked = self.evaluate(*self._test_set, epsilon=self.attack)[1] if self.attack else None
        return Record(self.epochs, total / self.steps, test_loss, accuracy, np.asarray(angles), seconds, attacked)

    def evaluate(
        self, x: Array, y: Array, *, batch_size: int = 250, epsilon: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean loss and accuracy [seeds] on a set of examples, under an FGSM attack with the step `epsilon`."""
        size = min(batch_size, len(x))
        starts = [*range(0, len(x) - size, size), len(x) - size]  # the last batch overlaps: all have one size
        parts = []
        for i, start in enumerate(starts):
            batch = slice(start, start + size)
            known = i * size - start
            figures = self._task.evaluate(self.carry.params, self.carry.state, x[batch], y[batch], epsilon=epsilon)
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


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
@functools.partial(jax.vmap, in_axes=(0, None, None, None, None, None))
def _shuffle(key: Array, purpose: int, epoch: int, examples: int, steps: int, batch_size: int) -> tuple[Array, Array]:
    key = jax.random.fold_in(jax.random.fold_in(key, purpose), epoch)
    order = jax.random.permutation(key, examples)[: steps * batch_size]
    return key, order.reshape(steps, batch_size)


def steps_per_epoch(data: Dataset, batch_size: int) -> int:
    """The number of full batches in an epoch; the examples that are left out differ from epoch to epoch."""
    steps = len(data.x_train) // batch_size
    if not steps:
        raise InputError(
            f"The batch size must be <= {len(data.x_train)}, the number of training examples of {data.name}, got "
            f"{batch_size}."
        )
    return steps


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """The figures of the last epoch (mean and sd over seeds), and of every epoch by seed: curves [epochs][seeds]."""
    last = records[-1]
    figures: dict[str, Any] = {}
    measured = [name for name in Record._fields if getattr(last, name) is not None and name != "epoch"]
    for name in (name for name in measured if name != "seconds"):
        values = getattr(last, name)
        figures |= {name: values.mean(), f"{name}_sd": values.std(), f"{name}_by_seed": values}
    curves = {name: [getattr(r, name) for r in records] for name in measured}
    return figures | {"curves": curves}


def _refusing(function: Callable) -> Callable:
    """The function; if a rule refuses the network, it raises `Refused` with the first line of the message."""

    def guarded(*args):
        try:
            return function(*args)
        except InputError:
            raise
        except (ValueError, TypeError, NotImplementedError) as error:
            raise Refused(str(error).splitlines()[0]) from error

    return guarded
