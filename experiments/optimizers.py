"""Optimizers and schedules of optax by name, with weight decay, clipping and an average of the weights.

    optimizers = make(Config(optimizer="sgd(momentum=0.9)", schedule="cosine(warmup=5)"), steps_per_epoch=600)

Every schedule is a number that the learning rate is multiplied with, so that the learning rate may be traced.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments import expressions
from experiments.config import Config
from experiments.errors import InputError

Rate = Any  # a float or a traced scalar


class Optimizers(NamedTuple):
    """One optimizer for the forward weights and one for learned feedback; each has its own state."""

    params: optax.GradientTransformation
    feedback: optax.GradientTransformation


_UNSUITED = ("lbfgs", "optimistic_adam", "rprop", "sm3")  # one needs the loss as a function, three take no schedule


@functools.cache
def names() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """Every optimizer of optax that a learning rate is enough for, by name, and `momentum`: SGD with 0.9."""
    found = {}
    for name, function in vars(optax).items():
        if name.startswith(("_", "scale_by_")) or name in _UNSUITED:
            continue
        if inspect.isfunction(function) and next(iter(inspect.signature(function).parameters), "") == "learning_rate":
            found[name] = function
    return found | {"momentum": functools.partial(optax.sgd, momentum=0.9)}


class _Length(NamedTuple):
    """The length of the training in steps, and of an epoch."""

    steps: int
    per_epoch: int


def _constant(length: _Length) -> optax.Schedule:
    """1 all the time."""
    return optax.constant_schedule(1.0)


def _cosine(
    length: _Length, warmup: float = 0, start: float = 0.0, end: float = 0.0, flat: float = 0
) -> optax.Schedule:
    """A linear rise from `start` for `warmup` epochs, half a cosine down to `end`, then `flat` epochs at `end`.

    `start` and `end` are fractions of the learning rate.
    """
    rise, tail = round(warmup * length.per_epoch), round(flat * length.per_epoch)
    fall = length.steps - rise - tail
    if min(rise, tail) < 0 or fall < 1:
        raise InputError(
            f"The schedule cosine needs warmup and flat >= 0 that leave epochs for the cosine, got {warmup:g} and "
            f"{flat:g} of {length.steps / length.per_epoch:g} epochs."
        )
    cosine = optax.cosine_decay_schedule(1.0, fall, alpha=end)
    return optax.join_schedules([optax.linear_schedule(start, 1.0, rise), cosine], [rise]) if rise else cosine


def _step(length: _Length, epochs: Sequence[float], factor: float = 0.1) -> optax.Schedule:
    """Multiplied by `factor` after each of these epochs."""
    after = [epochs] if isinstance(epochs, (int, float)) else list(epochs)
    if not all(isinstance(epoch, (int, float)) and epoch >= 0 for epoch in after):
        raise InputError(f"The schedule step: epochs must be numbers >= 0, got {epochs!r}: write step(epochs=[60,80]).")
    return optax.piecewise_constant_schedule(1.0, {round(epoch * length.per_epoch): factor for epoch in after})


def _halfway(length: _Length, factor: float = 0.1) -> optax.Schedule:
    """Multiplied by `factor` at half-time."""
    return optax.piecewise_constant_schedule(1.0, {length.steps // 2: factor})


def _linear(length: _Length, end: float = 0.0) -> optax.Schedule:
    """A straight line down to the fraction `end`."""
    return optax.linear_schedule(1.0, end, length.steps)


def _exponential(length: _Length, factor: float) -> optax.Schedule:
    """Multiplied by `factor` at each step."""
    return optax.exponential_decay(1.0, 1, factor)


SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    "constant": _constant,
    "cosine": _cosine,
    "halfway": _halfway,
    "step": _step,
    "linear": _linear,
    "exponential": _exponential,
}


def make(
    config: Config,
    steps_per_epoch: int,
    *,
    learning_rate: Rate | None = None,
    weight_decay: Rate | None = None,
    feedback_learning_rate: Rate | None = None,
) -> Optimizers:
    """The two optimizers of a config; the learning rates and the weight decay may be given as traced numbers."""
    rate = config.learning_rate if learning_rate is None else learning_rate
    decay = config.weight_decay if weight_decay is None else weight_decay
    feedback_rate = config.feedback_learning_rate if feedback_learning_rate is None else feedback_learning_rate
    length = _Length(config.epochs * steps_per_epoch, steps_per_epoch)
    unit = expressions.call(SCHEDULES, expressions.single(config.schedule, "schedule"), "schedule", length)
    warmup = config.warmup_epochs * steps_per_epoch
    # The schedule of the feedback begins together with that of the forward weights.
    held = optax.join_schedules([optax.constant_schedule(1.0), unit], [warmup]) if warmup else unit
    clip = [] if config.clip is None else [optax.clip_by_global_norm(config.clip)]
    params = _decayed(config.optimizer, rate, unit, decay, coupled=config.coupled_decay, everything=config.decay_all)
    feedback = _decayed(
        config.feedback_optimizer or config.optimizer,
        rate if feedback_rate is None else feedback_rate,
        held,
        decay,
        coupled=config.coupled_decay,
        everything=config.decay_all,
    )
    return Optimizers(*(optax.chain(*clip, optimizer) if clip else optimizer for optimizer in (params, feedback)))


def _decayed(
    text: str, rate: Rate, unit: optax.Schedule, decay: Rate | None, *, coupled: bool, everything: bool
) -> optax.GradientTransformation:
    """An optimizer with its weight decay, which leaves out biases and norms unless `everything` decays."""

    def schedule(count: jax.Array) -> jax.Array:
        return rate * unit(count.astype(jnp.float32))  # optax divides it by floats

    name, args, options = expressions.single(text, "optimizer")
    known = names()
    mask = None if everything else _matrices
    own = name in known and {"weight_decay", "mask"} <= set(inspect.signature(known[name]).parameters)
    if own and decay is not None and not coupled:
        if "weight_decay" in options:
            raise InputError(f"The weight decay is given twice: leave it out of {text!r}, or do not set weight_decay.")
        options = options | {"weight_decay": decay}
    if own and "mask" not in options:
        options = options | {"mask": mask}
    if own and coupled:
        options = {"weight_decay": 0.0} | options
    optimizer = expressions.call(known, (name, args, options), "optimizer", schedule)
    _try(optimizer, text)
    if decay is None or (own and not coupled) or (isinstance(decay, float) and not decay):
        return optimizer
    if coupled:
        return optax.chain(optax.add_decayed_weights(decay, mask), optimizer)
    return optax.chain(optimizer, _decoupled(schedule, decay, mask))


def _try(optimizer: optax.GradientTransformation, text: str) -> None:
    """Refuses options that optax takes when the optimizer is made, and that fail in the first step."""
    params = {"kernel": jax.ShapeDtypeStruct((2, 2), "float32"), "bias": jax.ShapeDtypeStruct((2,), "float32")}
    try:
        jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), params)
    except (TypeError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0].removesuffix(".")
        raise InputError(f"The optimizer {text!r} cannot make a step ({reason}): correct its options.") from error


def _matrices(params: Any) -> Any:
    """The weights of layers: not biases, and not the scales and offsets of norms."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _decoupled(schedule: optax.Schedule, decay: Rate, mask: Any) -> optax.GradientTransformation:
    """Subtracts the learning rate times `decay` times the weight, as AdamW does."""
    shrink = optax.chain(optax.add_decayed_weights(decay), optax.scale_by_learning_rate(schedule))
    kept = optax.masked(shrink, mask) if mask else shrink

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        shrunk, state = kept.update(jax.tree.map(jnp.zeros_like, updates), state, params)
        return jax.tree.map(jnp.add, updates, shrunk), state

    return optax.GradientTransformation(kept.init, update)
