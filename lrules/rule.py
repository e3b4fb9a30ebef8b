"""The protocol of rules: `Rule`, `Feedback`, `Gradients`, and what a rule may do at a layer.

A rule changes the backward pass only. The two constructors of `constructors.py` make most rules. *Sequential* rules
decide, layer by layer, the weight gradient and the error that goes down. *Direct* rules bring the output error straight
to each hidden signal.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lrules.engine.closures import held
from lrules.network import NetworkLike
from lrules.options import ByName, as_initializer, asked_for, is_number, require_key
from lrules.typing import Initializer, Pytree


@dataclasses.dataclass(frozen=True, eq=False)
class Backprop:
    """Backpropagation at this layer.

    Example:
      >>> import lrules
      >>> lrules.backprop().description.layer
      Backprop()
    """


# What the functions of a rule may ask for by name, besides the rule's own numbers; `sequential` and `direct` define it.
OFFERED = ("rng", "state", "targets", "elements", "h", "y", "slope")


class _LayerRule:
    """The common part of sequential and direct rules: functions that may ask for more arguments by name."""

    of = ""  # a state belongs to it
    redrawn: bool
    numbers: Mapping[str, ByName[Any]]
    state: Callable[..., Any] | None

    def functions(self) -> dict[str, tuple[Any, tuple[str, ...], tuple[str, ...]]]:
        """The functions by their option, with the arguments that they take and the arguments that they may ask for."""
        raise NotImplementedError

    @functools.cached_property
    def asks(self) -> dict[str, frozenset[str]]:
        """The arguments that each function asks for by name."""
        return {
            option: asked_for(option, fn, takes, (*offers, *self.numbers))
            for option, (fn, takes, offers) in self.functions().items()
            if fn is not None
        }

    @functools.cached_property
    def asks_for(self) -> frozenset[str]:
        """The arguments that any function asks for, without the numbers of the rule."""
        return frozenset().union(*self.asks.values()) - frozenset(self.numbers)

    @functools.cached_property
    def holds(self) -> bool:
        """Whether a function closes over a traced value, or a number is traced."""
        fns = [fn for fn, _, _ in self.functions().values()]
        return bool(held([*fns, *(value for by_name in self.numbers.values() for value in by_name.values())])[0])

    @functools.cached_property
    def begins_with(self) -> frozenset[str]:
        """The arguments that `state` asks for by name."""
        assert self.state is not None
        return asked_for("state", self.state, (self.of,), ("key", "name"))

    @property
    def stochastic(self) -> bool:
        """Whether the rule needs a key at every step."""
        return self.redrawn or "rng" in self.asks_for

    @property
    def needs_loss(self) -> str | None:
        """A name of what the rule needs and `transform` does not have; None if it needs nothing more."""
        if "targets" in self.asks_for or getattr(self, "targets", False):
            return "the targets"
        if "elements" in self.asks_for or getattr(self, "normalise_error", False):
            return "the loss"
        return None if self.state is None else "to return its state"

    @functools.cached_property
    def plain(self) -> bool:
        """Whether the functions need only the arguments that they always get, and static numbers."""
        return not (self.asks_for or self.holds or getattr(self, "targets", False))

    def bound(self, option: str, name: str) -> Callable[..., Any]:
        """A function with the numbers that it asks for, for one layer or hidden signal."""
        fn, wanted = self.functions()[option][0], self.asks[option].intersection(self.numbers)
        return functools.partial(fn, **{number: self.numbers[number].of(name) for number in wanted}) if wanted else fn

    def _check_asked(self) -> None:
        for name in self.numbers:
            if name in OFFERED:
                raise ValueError(f"numbers must not have {name!r}, which every rule can ask for: use another name")
            if all(name not in asks for asks in self.asks.values()):
                listed = " or ".join(self.asks)
                raise ValueError(
                    f"numbers has {name!r}, but {listed} has no argument of this name: add it to the function"
                )
        if self.state is not None:
            assert self.begins_with is not None  # this refuses a state that is not a function
            if "state" not in self.asks_for:
                listed = " or ".join(self.asks)
                raise ValueError(f"state is given, but {listed} does not ask for it: add the argument, or drop state")
        if self.state is None and "state" in self.asks_for:
            raise ValueError("a function asks for state, but the option state is not given: give the first state")


@dataclasses.dataclass(frozen=True, eq=False)
class Sequential(_LayerRule):
    """The error passes through this layer as `backward` says.

    Attributes:
      backward: `(op, w, b, x, d, layer) -> (dw, dx, db)`.
      init: the initializer of the feedback weights; None if there are none (then `b` is None).
      learned: whether `db` trains the feedback weights.
      redrawn: whether the rule draws new feedback weights at every step.
      whole_batch: whether the gradient depends on the batch as a whole, so that it must be summed over devices.
      gain: `(op, w, x, d, layer) -> c`, if the weight gradient is c times that of backprop; None for 1.
      state: `(layer) -> pytree`, the first state of a layer; None if there is none.
      numbers: hyperparameters, by the name that the functions ask for.

    Example:
      >>> import lrules
      >>> spec = lrules.feedback_alignment(adaptive=True).description.layer
      >>> isinstance(spec, lrules.extend.Sequential), spec.learned
      (True, True)
    """

    backward: Callable[..., tuple[Any, ...]]
    init: Initializer | None = None
    learned: bool = False
    redrawn: bool = False
    whole_batch: bool = False
    gain: Callable[..., Any] | None = None
    state: Callable[..., Any] | None = None
    numbers: Mapping[str, ByName[Any]] = dataclasses.field(default_factory=dict)

    of = "layer"

    def __post_init__(self) -> None:
        as_initializer(self.init)  # this refuses an init that is not a function
        asked_for("backward", *self.functions()["backward"][:2], (*OFFERED, *self.numbers))  # and a backward
        self._check_asked()

    def functions(self) -> dict[str, tuple[Any, tuple[str, ...], tuple[str, ...]]]:
        return {
            "backward": (self.backward, ("op", "w", "b", "x", "d", "layer"), OFFERED),
            "gain": (self.gain, ("op", "w", "x", "d", "layer"), ()),
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Direct(_LayerRule):
    """The output error comes straight to the hidden signal that this layer reads.

    Attributes:
      signal: `(e, b, targets, name) -> cotangent`; None if nothing arrives.
      init: the initializer of the feedback weights; None if there are none (then `b` is None).
      learn: `(e, h, b) -> db`, the gradient of the feedback weights; None for fixed feedback weights.
      redrawn: whether the rule draws new feedback weights at every step.
      at: names (regular expressions) of the hidden signals or marked tensors where feedback lands; None for all.
      shared_axes: axes of the outputs along which positions share a feedback weight, and their places, see `direct`.
      rank: the number of values to which one more feedback weight, `(outputs)`, reduces the error; None: it does not.
      pullback: instead of `signal`, see `lrules.direct`.
      targets: whether `signal` needs the targets.
      error_at: where it takes the output error: below a softmax or the like, `"layer"` (see `head.py`), or `"outputs"`.
      max_feedback_bytes: the largest number of bytes that the feedback weights may have.
      storage: `"stored"`, or `"recomputed"`: the feedback weights are drawn again from keys where they are needed.
      offers: which of `at`, `shared_axes`, `rank` and `storage` the user of the rule can give: refusals advise them.
      state: `(shape) -> pytree`, the first state of a hidden signal; None if there is none.
      numbers: hyperparameters, by the name that the functions ask for.
      learned_factors, normalise_error: whether the matrix of `rank` learns; whether errors are sent with length one.

    Example:
      >>> import lrules
      >>> spec = lrules.direct_feedback_alignment(at="c").description.layer
      >>> isinstance(spec, lrules.extend.Direct), spec.at
      (True, ('c',))
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
    storage: Literal["stored", "recomputed"] = "stored"
    offers: tuple[str, ...] = ("at", "shared_axes", "rank", "storage")
    state: Callable[..., Any] | None = None
    numbers: Mapping[str, ByName[Any]] = dataclasses.field(default_factory=dict)
    learned_factors: bool = False
    normalise_error: bool = False

    of = "shape"

    def __post_init__(self) -> None:
        as_initializer(self.init)
        if self.error_at not in ("layer", "outputs"):
            raise ValueError(f'error_at must be "layer" or "outputs", got {self.error_at!r}')
        if not (is_number(self.max_feedback_bytes) and self.max_feedback_bytes >= 0):
            raise ValueError(f"max_feedback_bytes must be a number >= 0 or inf, got {self.max_feedback_bytes!r}")
        self._check_asked()
        if self.state is not None and "state" not in self.asks.get("signal", ()):
            raise ValueError("learn asks for state, and signal returns the next state, so signal must ask for it too")

    def functions(self) -> dict[str, tuple[Any, tuple[str, ...], tuple[str, ...]]]:
        return {
            "signal": (self.signal, ("e", "b", "targets", "name"), tuple(n for n in OFFERED if n != "targets")),
            "learn": (self.learn, ("e", "h", "b"), ("name", *(n for n in OFFERED if n != "h"))),
        }

    @property
    def lands(self) -> bool:
        """Whether an error arrives."""
        return self.signal is not None or self.pullback is not None


LayerRule = Backprop | Sequential | Direct


class Feedback(NamedTuple):
    """The weights of the learning channel (see docs/terms.md), by name.

    Attributes:
      fixed: feedback weights that no optimizer changes.
      learned: feedback weights that learn. `grads.feedback` has the same structure; optimizers subtract it.
      state: statistics of the rule, `()` for most rules. Continue with `feedback._replace(state=grads.state)`.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> feedback = lrules.feedback_alignment().init(jax.random.key(0), net, params, jnp.ones((1, 3)))
      >>> list(feedback.fixed), feedback.learned, feedback.state
      (['b'], {}, ())
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
    """The updates of a rule, in the place of gradients: optimizers subtract them.

    Attributes:
      params: the updates of the parameters, with their structure.
      feedback: the updates of `feedback.learned`, with its structure.
      state: the next `feedback.state`; `()` for rules without a state.
      report: measurements of this step, by name; `{}` for most rules.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> step = lrules.value_and_grad(lambda w, x: x @ w, lrules.testing.half_squared_error, lrules.backprop())
      >>> _, grads = step(jnp.eye(2), lrules.Feedback({}, {}), jnp.ones((1, 2)), jnp.zeros((1, 2)))
      >>> grads.params.shape, grads.feedback, grads.report
      ((2, 2), {}, {})
    """

    __slots__ = ()

    def __new__(
        cls, params: Pytree, feedback: dict[str, jax.Array], state: Pytree = (), report: dict[str, Any] | None = None
    ) -> Gradients:
        return super().__new__(cls, params, feedback, state, {} if report is None else report)


class DrawFeedback(Protocol):
    """The type of `rule.init`."""

    def __call__(self, key: jax.Array, net: NetworkLike, params: Pytree, inputs: Pytree) -> Feedback:
        """Draws the feedback weights for a network.

        Args:
          key: a key of `jax.random`.
          net: the network.
          params: the parameters.
          inputs: the inputs of the network, arrays or `ShapeDtypeStruct`s.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class RuleDescription:
    """What a rule does at each place of a network. The functions of the rule are made from it.

    Attributes:
      plan: `(net, graph, params, inputs) -> Plan`.
      layer: what the rule does at one layer, for `partition`; None if the rule acts on the network as a whole.
      modified: a modifier acts around the rule, and `plan` does not include it.

    Example:
      >>> import lrules
      >>> lrules.sign_error(lrules.backprop()).description.modified
      True
    """

    plan: Callable[..., Any]
    layer: LayerRule | None = None
    modified: bool = False
    _functions: list[Any] = dataclasses.field(default_factory=list, init=False, repr=False)

    def describes(self, functions: tuple[Any, ...]) -> bool:
        """Whether these functions were made from this description: they are those of the first rule that holds it."""
        if not self._functions:
            self._functions.extend(functions)
        return all(a is b for a, b in zip(self._functions, functions, strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """A learning rule, as pure functions.

    Attributes:
      init: `(key, net, params, inputs) -> Feedback`.
      transform: `(net, *, reduction) -> f(params, feedback, inputs, *, rng=None)`, see `lrules.transform`.
      value_and_grad: `(net, loss) -> fn`, see `lrules.value_and_grad`; None if it follows from `transform`.
      stochastic: whether the rule needs `rng=`.
      additive: whether the gradient of a batch is the sum of the gradients of its parts, by their weights in it.
      description: what the rule does at each place of a network; None if functions were made or replaced by hand.
      phase: the rule of a phase in which the feedback weights alone learn, see `lrules.feedback_grad`; or None.

    Example:
      >>> import lrules
      >>> rule = lrules.sign_symmetry("random")
      >>> isinstance(rule, lrules.Rule), rule.stochastic, rule.additive
      (True, True, True)
    """

    init: DrawFeedback
    transform: Callable[..., Callable[..., Any]]
    value_and_grad: Callable[..., Callable[..., Any]] | None = None
    _: dataclasses.KW_ONLY
    stochastic: bool = False
    additive: bool = True
    description: RuleDescription | None = None
    phase: Rule | None = None

    def __post_init__(self) -> None:
        functions = (self.init, self.transform, self.value_and_grad)
        if self.description is not None and not self.description.describes(functions):
            object.__setattr__(self, "description", None)

    def _replace(self, **changes: Any) -> Rule:
        """A copy with other attributes, as by `dataclasses.replace`."""
        return dataclasses.replace(self, **changes)

    def modified(self, **changes: Any) -> Rule:
        """The rule with a modifier around it: it has other functions, and its description says that it is modified."""
        known = self.description
        about = None if known is None else RuleDescription(known.plan, modified=True)
        return dataclasses.replace(self, **changes, description=about)


def require_description(rule: Rule, who: str, which: str = "this rule") -> RuleDescription:
    """Returns the description of a rule.

    Args:
      rule: the rule.
      who: the name of the function that needs it, for the message.
      which: the words for the rule in the message.

    Returns:
      The description.

    Raises:
      ValueError: the rule has none.

    Example:
      >>> import lrules
      >>> lrules.extend.require_description(lrules.backprop(), "mine").layer
      Backprop()
    """
    if rule.description is None:
        raise ValueError(
            f"{who} needs to know what a rule does at each layer, and {which} does not say it: it was made of "
            "functions by hand, or one of its functions was replaced; make it with lrules.sequential or lrules.direct"
        )
    return rule.description


def require_rule(rule: Any) -> None:
    """Refuses an object that is not a `Rule`, such as the factory of a rule."""
    if not isinstance(rule, Rule):
        hint = "call its factory first" if callable(rule) else "the order is (net, rule) and (net, loss, rule)"
        raise TypeError(f"the rule is a {type(rule).__name__}, not an lrules.Rule: {hint}")


def require_feedback(feedback: Any) -> None:
    """Refuses an object that is not a `Feedback`."""
    if not isinstance(feedback, Feedback):
        restored = isinstance(feedback, Mapping) and {"fixed", "learned"} <= set(feedback) <= set(Feedback._fields)
        remedy = "write lrules.Feedback(**restored)" if restored else "make it with rule.init(key, net, params, inputs)"
        raise TypeError(f"the feedback is a {type(feedback).__name__}, not an lrules.Feedback: {remedy}")


def check_rng(rule: Rule, rng: jax.Array | None) -> None:
    """Stochastic rules need `rng=`, and other rules refuse it."""
    if rule.stochastic and rng is None:
        raise ValueError("this rule is stochastic: give it a new key at every step, rng=jax.random.key(...)")
    if rng is not None and rule.stochastic:
        require_key(rng, "rng")
    if not rule.stochastic and rng is not None:
        raise ValueError("this rule does not use random numbers: leave rng out")


def check_params(params: Pytree) -> None:
    """Refuses parameters that are not arrays of real or complex numbers.

    Args:
      params: the parameters.

    Raises:
      TypeError: a parameter is something else; the message names it.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> lrules.extend.check_params({"w": jnp.ones(2)})
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "params"
            what = f"has dtype {dtype}" if dtype is not None else f"is a {type(leaf).__name__}, not an array"
            raise TypeError(
                f"the parameter {name!r} {what}: only floating-point arrays can be trained, so pass it with the inputs "
                "(with batch_axes=None if it has no batch), close over it, or split an Equinox model by "
                "params, static = eqx.partition(model, eqx.is_inexact_array)"
            )
