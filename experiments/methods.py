"""How a rule trains a task: the `Method` that `loop.Run` repeats.

    method = by_rule(task, lrules.backman(), optax.adam(1e-3))
    run = loop.Run(method, dataset, seeds=range(5), batch_size=64)

A method of one's own (another loss, several networks) uses the same loop: give it the functions of `Method`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lrules
from experiments import adversarial
from experiments.data import scale
from experiments.errors import InputError
from experiments.optimizers import Optimizers
from experiments.tasks import Task

Array = jax.Array
PyTree = Any
Augment = Callable[[Array, Array], Array]  # (key, x [batch, ...]) -> x


class Refused(InputError):
    """A rule cannot train this model."""


class Carry(NamedTuple):
    """What a rule carries from step to step."""

    params: PyTree
    state: PyTree  # of the model, such as the statistics of BatchNorm
    feedback: lrules.Feedback
    optimizer: tuple[PyTree, PyTree]  # states of the two `Optimizers`
    average: PyTree | None = None  # of the parameters, if the run keeps one

    @property
    def evaluated(self) -> PyTree:
        """The parameters that are evaluated."""
        return self.params if self.average is None else self.average


class Method(NamedTuple):
    """What a run trains: pure functions for one seed; the carry is any pytree of arrays.

    Attributes:
      init: `(key, x, y) -> carry`, from one batch.
      step: `(carry, key, x, y) -> (carry, loss)`, the loss one number; `x` as the data set stores it.
      evaluate: `(carry, x, y) -> {name: figures [batch]}`. "loss" must be there; it and "accuracy" come into the
        records. `Run.evaluate` returns the means of all.
      attacked: the same under attack, or None.
      measure: `(carry, key, x, y) -> {name: number}` on a fixed batch, or None; they come into `Run.curve`, and "angle"
        into the records, too.
      warm_up: a step that trains only what must be ready before the others begin, or None.
      lies: `(carry, x) -> shardings` of the carry, from `ShapeDtypeStruct`s that have shardings by their shapes, and a
        batch; or None: they lie as these say.
      convolves: how many convolutions there are: in a loop, XLA makes them slow on a CPU, and compiles many of them
        for minutes on a GPU.
    """

    init: Callable[[Array, Array, Array], PyTree]
    step: Callable[[PyTree, Array, Array, Array], tuple[PyTree, Array]]
    evaluate: Callable[[PyTree, Array, Array], dict[str, Array]]
    attacked: Callable[[PyTree, Array, Array], dict[str, Array]] | None = None
    measure: Callable[[PyTree, Array, Array, Array], dict[str, Array]] | None = None
    warm_up: Callable[[PyTree, Array, Array, Array], tuple[PyTree, Array]] | None = None
    lies: Callable[[PyTree, Array], PyTree] | None = None
    convolves: int = 0


def one_loss(loss: Any) -> Array:
    """The loss of a step in float32, or an error if it is not one number."""
    loss = jnp.asarray(loss, jnp.float32)
    if loss.ndim:
        raise InputError(f"The step of a method must return one number as its loss, got shape {loss.shape}: average.")
    return loss


def of_examples(figures: dict[str, Array], count: int) -> dict[str, Array]:
    """The figures of an evaluation, or an error if they are not those of a method."""
    if "loss" not in figures:
        found = ", ".join(figures) or "nothing"
        raise InputError(f"The evaluation of a method must return a 'loss', got {found}: add it.")
    for name, values in figures.items():
        if jnp.shape(values) != (count,):
            raise InputError(
                f"The evaluation of a method must return a number for each of the {count} examples, got the shape "
                f"{jnp.shape(values)} as {name}: do not average over the batch."
            )
    return figures


def by_rule(
    task: Task,
    rule: lrules.Rule,
    optimizer: optax.GradientTransformation | Optimizers,
    *,
    augment: Augment | None = None,
    fgsm: float = 0.0,
    attack: float = 0.0,
    accumulate: int = 1,
    average: float = 0.0,
    angle: bool = True,
    layers: bool = False,
) -> Method:
    """The method that trains a task with a rule.

    Args:
      task, rule: the model with its loss, and the rule that trains it.
      optimizer: the same one for forward and learned feedback weights, or `Optimizers`.
      augment: random changes of the inputs, in [0, 1], before the task prepares them.
      fgsm: the step of adversarial training, along the plain gradient of the present network.
      attack: the step of the attack under which the accuracy is measured, too.
      accumulate: the parts of a batch whose gradients are averaged, one after another.
      average: the decay of an exponential average of the weights, which is evaluated in their place; 0 for none.
      angle: measure the angle of the gradient to that of backprop.
      layers: measure angle, norm ratio, norm of the true gradient and weight alignment of each parameter, and dead
        units, too.
    """
    for epsilon in (fgsm, attack):
        adversarial.check(epsilon)
    optimizers = as_optimizers(optimizer, task)
    value_and_grad = lrules.value_and_grad(task.net, task.loss, rule)
    feedback_grad = None if rule.phase is None else lrules.feedback_grad(task.net, rule)
    true_gradient = lrules.value_and_grad(task.net, task.loss, lrules.backprop())
    if accumulate > 1 and not rule.additive:
        raise InputError(
            "accumulate must be 1 for this rule: its gradient is not a sum over the examples, so the gradients of the "
            "parts of a batch do not add up to that of the batch."
        )

    def init(key: Array, x: Array, y: Array) -> Carry:
        params, state = task.init(key)
        # A fault of the model shows as it is, before the rule sees the model.
        jax.eval_shape(lambda x: task.loss(task.net(params, (state, x))[0], task.targets(x, y)), task.prepare(x))
        refusing = refused(rule.init)
        feedback = refusing(jax.random.fold_in(key, 1), task.net, params, (state, task.prepare(x)))
        begin = optimizers.params.init(params), optimizers.feedback.init(feedback.learned)
        return Carry(params, state, feedback, begin, params if average else None)

    def gradients(carry: Carry, key: Array, x: Array, y: Array) -> tuple[Array, PyTree, lrules.Gradients]:
        (value, _, state), grads = refused(value_and_grad)(
            carry.params, carry.feedback, (carry.state, x), y, rng=key if rule.stochastic else None
        )
        if feedback_grad is not None and rule.phase is not None:  # each step is one of the phase too
            rng = jax.random.fold_in(key, 1) if rule.phase.stochastic else None
            taught = feedback_grad(carry.params, carry.feedback, (carry.state, x), rng=rng)
            grads = grads._replace(feedback=jax.tree.map(jnp.add, grads.feedback, taught))
        return value, state, grads

    def accumulated(carry: Carry, key: Array, x: Array, y: Array) -> tuple[Array, PyTree, lrules.Gradients]:
        """The mean of the gradients of the parts, whose states follow one another."""

        def body(carry: Carry, part: tuple[Array, ...]) -> tuple[Carry, Any]:
            key, x, y = part
            value, state, grads = gradients(carry, key, x, y)
            carry = carry._replace(state=state, feedback=carry.feedback._replace(state=grads.state))
            return carry, (value, grads.params, grads.feedback)

        parts = [a.reshape(accumulate, -1, *a.shape[1:]) for a in (x, y)]
        carry, found = jax.lax.scan(body, carry, (jax.random.split(key, accumulate), *parts))
        value, params, feedback = jax.tree.map(lambda a: a.mean(0), found)
        return value, carry.state, lrules.Gradients(params, feedback, carry.feedback.state)

    def step(carry: Carry, key: Array, x: Array, y: Array, *, warm_up: bool = False) -> tuple[Carry, Array]:
        keys = jax.random.split(key)
        if augment:
            x = augment(keys[0], scale(x))  # images in [0, 1]: the normalisation comes after it
        x = task.prepare(x)
        y = task.targets(x, y)
        x = adversarial.fgsm(lambda x: task.loss(task.net(carry.params, (carry.state, x))[0], y), x, fgsm)
        value, state, grads = (accumulated if accumulate > 1 else gradients)(carry, keys[1], x, y)
        learned = carry.feedback.learned
        forward_state, feedback_state = carry.optimizer
        updates, feedback_state = optimizers.feedback.update(grads.feedback, feedback_state, learned)
        feedback = carry.feedback._replace(learned=optax.apply_updates(learned, updates), state=grads.state)
        if warm_up:
            return carry._replace(feedback=feedback, optimizer=(forward_state, feedback_state)), value
        updates, forward_state = optimizers.params.update(grads.params, forward_state, carry.params)
        params = optax.apply_updates(carry.params, updates)
        mean = optax.incremental_update(params, carry.average, 1 - average) if average else None
        return Carry(params, state, feedback, (forward_state, feedback_state), mean), value

    def measure(carry: Carry, key: Array, x: Array, y: Array) -> dict[str, Array]:
        x = task.prepare(x)
        y = task.targets(x, y)
        truth = true_gradient(carry.params, lrules.Feedback({}, {}), (carry.state, x), y)[1].params
        grads = gradients(carry, key, x, y)[2].params
        found = {"angle": lrules.diagnostics.total_angle(grads, truth)}
        if layers:
            agreements = lrules.diagnostics.agreement(grads, truth).items()
            for (name, agreement), leaf in zip(agreements, jax.tree.leaves(truth), strict=True):
                found |= {f"angle {name}": agreement.angle, f"norm ratio {name}": agreement.norm_ratio}
                found |= {f"norm {name}": jnp.linalg.norm(leaf.ravel())}
            aligned = lrules.diagnostics.weight_alignment(carry.feedback, carry.params)
            found |= {f"alignment {name}": agreement.angle for name, agreement in aligned.items()}
            dead = lrules.diagnostics.dead_units(task.net, carry.params, (carry.state, x))
            found |= {f"dead units {name}": fraction for name, fraction in dead.items()}
        return found

    def evaluate(carry: Carry, x: Array, y: Array, epsilon: float = 0.0) -> dict[str, Array]:
        return task.evaluate(carry.evaluated, carry.state, x, y, epsilon)

    def lies(carry: Carry, x: Array) -> Carry:
        inputs = carry.state, jax.eval_shape(task.prepare, x)
        feedback = lrules.feedback.shardings(rule, task.net, carry.params, inputs)
        found = jax.tree.map(lambda leaf: leaf.sharding, carry)
        state = optax.tree_map_params(
            optimizers.feedback,
            lambda _, sharding: sharding,
            carry.optimizer[1],
            feedback.learned,
            transform_non_params=lambda leaf: leaf.sharding,
        )
        return found._replace(feedback=feedback, optimizer=(found.optimizer[0], state))

    shapes = jax.eval_shape(task.init, jax.random.key(0))[0]
    return Method(
        init,
        step,
        evaluate,
        functools.partial(evaluate, epsilon=attack) if attack else None,
        measure if angle or layers else None,
        functools.partial(step, warm_up=True),
        lies,
        convolves=sum(leaf.ndim > 3 for leaf in jax.tree.leaves(shapes)),  # [height, width, in, out]
    )


def as_optimizers(optimizer: optax.GradientTransformation | Optimizers, task: Task) -> Optimizers:
    """One optimizer is used for both; the constraint of the task comes after that of the forward weights."""
    both = optimizer if isinstance(optimizer, Optimizers) else Optimizers(optimizer, optimizer)
    return both._replace(params=optax.chain(both.params, task.constraint))


def refused(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function; if a rule refuses the network, it raises `Refused` with the first line of the message."""

    @functools.wraps(function)
    def guarded(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except InputError:
            raise
        except (ValueError, TypeError, NotImplementedError) as error:
            raise Refused(str(error).splitlines()[0]) from error

    return guarded


def check(task: Task, rules: dict[str, lrules.Rule], x: Any, y: Any, batch_size: int) -> None:
    """Trace a step of each rule without computing it, so that a rule refuses before any rule has trained.

    Raises:
      Refused: a rule cannot train this model; the message names the rule.
    """
    shapes = [jax.ShapeDtypeStruct((batch_size, *a.shape[1:]), a.dtype) for a in (x, y)]
    for name, rule in rules.items():
        method = by_rule(task, rule, optax.sgd(0.0), angle=False)

        def step(key: Array, x: Array, y: Array, method: Method = method) -> Any:
            return method.step(method.init(key, x, y), key, x, y)

        try:
            jax.eval_shape(step, jax.random.key(0), *shapes)
        except Refused as error:
            raise Refused(f"{name}: {error}") from error
