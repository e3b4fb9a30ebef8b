"""Rules: what one is, and how to apply one to a network.

A rule changes the backward pass and leaves the forward pass as it is. Most are made by the two constructors of
`constructors.py`: *sequential* rules decide, layer by layer, how the weight gradient is formed and what error goes
down; *direct* rules bring the output error straight to each hidden signal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lrules.network import NetworkLike
from lrules.options import as_initializer, is_number
from lrules.typing import Initializer, Pytree


@dataclasses.dataclass(frozen=True, eq=False)
class Backprop:
    """Backpropagation at this layer."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sequential:
    """Error passes through this layer, and `backward` says how.

    Attributes:
      backward: `(op, w, b, x, d, layer) -> (dw, dx, db)`.
      init: the initializer of the feedback weights; None where there are none (then `b` is None).
      learned: whether `db` trains the feedback weights.
      redrawn: whether the feedback weights are drawn anew at every step.
      whole_batch: whether the gradient depends on the batch as a whole, so that it must be summed over devices.
      gain: `(op, w, x, d, layer) -> c`, where the weight gradient is c times that of backprop; None for 1.
    """

    backward: Callable[..., tuple[Any, Any, Any]]
    init: Initializer | None = None
    learned: bool = False
    redrawn: bool = False
    whole_batch: bool = False
    gain: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        as_initializer(self.init)  # which refuses what cannot be called


@dataclasses.dataclass(frozen=True, eq=False)
class Direct:
    """The output error comes straight to the hidden signal that this layer reads.

    Attributes:
      signal: `(e, b, targets, name) -> cotangent`; None where nothing arrives.
      init: the initializer of the feedback weights; None where there are none (then `b` is None).
      learn: `(e, h, b) -> db`, the gradient of the feedback weights; None for fixed ones.
      redrawn: whether the feedback weights are drawn anew at every step.
      at: names (regular expressions) of the hidden signals or marked tensors where feedback lands; None for all.
      shared_axes: axes of the outputs along which one feedback weight serves all positions, each with the places in
        hidden signals that are given for it: axes, or `"loop 0"`; the first that fits a signal holds there.
      rank: of the error that is sent, brought to it by one more feedback weight, `(outputs)`; None: as it is.
      pullback: in place of `signal`: `(plan, params, inputs, consts, records) -> pull`, where `pull(errors)` gives the
        cotangent of each hidden signal at its definition, by name.
      targets: whether `signal` needs the targets; it then gets `elements=`, too, if it has an argument of that name:
        how many losses the objective is the mean of.
      error_at: where the output error is taken. `"layer"`: at the last layer's outputs, below a softmax or the like
        that has no parameters (see `head.py`); or `"outputs"`.
      max_feedback_bytes: what the feedback weights of one rule may take.
      offers: which of `at`, `shared_axes` and `rank` the rule's user can give, for refusals to advise.
    """

    signal: Callable[..., Any] | None
    init: Initializer | None = None
    learn: Callable[..., Any] | None = None
    redrawn: bool = False
    at: tuple[str, ...] | None = None
    shared_axes: tuple[tuple[int, tuple[int | str, ...]], ...] = ()
    rank: int | None = None
    pullback: Callable[..., Callable[..., Any]] | None = None
    targets: bool = False
    error_at: Literal["layer", "outputs"] = "layer"
    max_feedback_bytes: float = 2**30
    offers: tuple[str, ...] = ("at", "shared_axes", "rank")

    def __post_init__(self) -> None:
        as_initializer(self.init)
        if self.error_at not in ("layer", "outputs"):
            raise ValueError(f'error_at must be "layer" or "outputs", got {self.error_at!r}')
        if not (is_number(self.max_feedback_bytes) and self.max_feedback_bytes >= 0):
            raise ValueError(f"max_feedback_bytes must be a number >= 0 or inf, got {self.max_feedback_bytes!r}")

    @property
    def lands(self) -> bool:
        """Whether anything arrives at all."""
        return self.signal is not None or self.pullback is not None

LayerRule = Backprop | Sequential | Direct


class Feedback(NamedTuple):
    """The weights of the learning channel, by name.

    Attributes:
      fixed: never enters an optimizer.
      learned: `grads.feedback` has its structure, and the sign of a gradient.
      state: statistics that a rule carries; continue with `feedback._replace(state=grads.state)`.
    """

    fixed: dict[str, jax.Array]
    learned: dict[str, jax.Array]
    state: Pytree = ()


class _Gradients(NamedTuple):
    params: Pytree
    feedback: dict[str, jax.Array]
    state: Pytree
    report: dict[str, Any]


class Gradients(_Gradients):
    """What a rule gives in place of gradients: optimizers subtract it.

    Attributes:
      params: of the structure of the parameters.
      feedback: of the structure of `feedback.learned`.
      state: the next `feedback.state`; `()` for rules without one.
      report: what the rule has to tell of this step, by name; `{}` for most rules.
    """

    __slots__ = ()

    def __new__(
        cls, params: Pytree, feedback: dict[str, jax.Array], state: Pytree = (), report: dict[str, Any] | None = None
    ) -> Gradients:
        return super().__new__(cls, params, feedback, state, {} if report is None else report)


class DrawFeedback(Protocol):
    """What `rule.init` is."""

    def __call__(self, key: jax.Array, net: NetworkLike, params: Pytree, inputs: Pytree) -> Feedback:
        """Draws the feedback weights of a network.

        Args:
          key: a key of `jax.random`.
          net: the network.
          params, inputs: as the network takes them; `ShapeDtypeStruct`s will do for the inputs.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class RuleDescription:
    """What a rule does where. The rule's functions are made from it.

    Attributes:
      plan: `(net, graph, params, inputs) -> Plan`.
      layer: what the rule does at one layer, for `partition`; None where it cannot be said layer by layer.
      modified: a modifier acts around the rule, and `plan` knows nothing of it.
    """

    plan: Callable[..., Any]
    layer: LayerRule | None = None
    modified: bool = False
    _functions: list[Any] = dataclasses.field(default_factory=list, init=False, repr=False)

    def describes(self, functions: tuple[Any, ...]) -> bool:
        """Whether these functions are the ones that were made from it: those of the first rule that holds it."""
        if not self._functions:
            self._functions.extend(functions)
        return all(a is b for a, b in zip(self._functions, functions, strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """A learning rule, as pure functions.

    Attributes:
      init: `(key, net, params, inputs) -> Feedback`.
      transform: `(net, *, reduction) -> f(params, feedback, inputs, *, rng=None)`, see `lrules.transform`.
      value_and_grad: `(net, loss) -> fn`, see `lrules.value_and_grad`; None where that of `transform` serves.
      stochastic: needs `rng=`.
      additive: the gradient of a batch is the sum of those of its parts, up to their weights in the objective.
      description: what the rule does where, from which its functions are made. None for a rule that is made of
        functions by hand, and for a copy with another function: a description would no longer be true of it.
    """

    init: DrawFeedback
    transform: Callable[..., Callable[..., Any]]
    value_and_grad: Callable[..., Callable[..., Any]] | None = None
    _: dataclasses.KW_ONLY
    stochastic: bool = False
    additive: bool = True
    description: RuleDescription | None = None

    def __post_init__(self) -> None:
        functions = (self.init, self.transform, self.value_and_grad)
        if self.description is not None and not self.description.describes(functions):
            object.__setattr__(self, "description", None)

    def _replace(self, **changes: Any) -> Rule:
        """A copy with other attributes, as `dataclasses.replace` makes it."""
        return dataclasses.replace(self, **changes)

    def modified(self, **changes: Any) -> Rule:
        """The rule with a modifier around it: other functions, and a description that says so."""
        known = self.description
        about = None if known is None else RuleDescription(known.plan, modified=True)
        return dataclasses.replace(self, **changes, description=about)


def require_description(rule: Rule, who: str, which: str = "this rule") -> RuleDescription:
    """The description of a rule.

    Raises:
      ValueError: it has none; the message names `who` needs it and `which` rule it is.
    """
    if rule.description is None:
        raise ValueError(
            f"{who} needs to know what a rule does at each layer, and {which} does not say it: it was made of "
            "functions by hand, or one of its functions was replaced; make it with lrules.sequential or lrules.direct"
        )
    return rule.description


def require_rule(rule: Any) -> None:
    """A rule is a `Rule`, not the factory that makes it."""
    if not isinstance(rule, Rule):
        hint = "call its factory first" if callable(rule) else "the order is (net, rule) and (net, loss, rule)"
        raise TypeError(f"the rule is a {type(rule).__name__}, not an lrules.Rule: {hint}")


def require_feedback(feedback: Any) -> None:
    """Feedback is a `Feedback`, empty for rules that need none."""
    if not isinstance(feedback, Feedback):
        restored = isinstance(feedback, Mapping) and {"fixed", "learned"} <= set(feedback) <= set(Feedback._fields)
        remedy = "make one of it, lrules.Feedback(**restored)" if restored else "make it with "
        remedy += "" if restored else "rule.init(key, net, params, inputs)"
        raise TypeError(f"the feedback is a {type(feedback).__name__}, not an lrules.Feedback: {remedy}")


def check_rng(rule: Rule, rng: jax.Array | None) -> None:
    """`rng=` belongs to stochastic rules and to no others."""
    if rule.stochastic and rng is None:
        raise ValueError("this rule is stochastic: give it a fresh key at every step, rng=jax.random.key(...)")
    if not rule.stochastic and rng is not None:
        raise ValueError("this rule uses no randomness: leave rng= out")


def check_params(params: Pytree) -> None:
    """Parameters are arrays of real or complex numbers."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "params"
            what = f"has dtype {dtype}" if dtype is not None else f"is a {type(leaf).__name__}, not an array"
            raise TypeError(
                f"the parameter {name!r} {what}: only floating-point arrays can be trained, so pass it with the inputs "
                "(batch_axes=None for what has no batch), close over it, or take an Equinox model apart, by "
                "params, static = eqx.partition(model, eqx.is_inexact_array)"
            )
