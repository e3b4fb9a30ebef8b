"""Rules: what one is, and how to apply one to a network.

A rule changes the backward pass and leaves the forward pass as it is. Most are made by the two constructors of
`constructors.py`: *sequential* rules decide, layer by layer, how the weight gradient is formed and what error goes
down; *direct* rules bring the output error straight to each hidden signal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from lrules.network import Network, as_network

if TYPE_CHECKING:
    from lrules.plan import LayerRule, Plan

Pytree = Any
Initializer = Callable[..., jax.Array]


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


class Gradients(NamedTuple):
    """What a rule gives in place of gradients: optimizers subtract it.

    Attributes:
      params: of the structure of the parameters.
      feedback: of the structure of `feedback.learned`.
      state: the next `feedback.state`.
      report: what the rule has to tell of this step, by name.
    """

    params: Pytree
    feedback: dict[str, jax.Array]
    state: Pytree = ()
    report: dict[str, Any] = {}


class Rule(NamedTuple):
    """A learning rule, as pure functions.

    Attributes:
      init: `(key, net, params, inputs) -> Feedback`.
      transform: `(net, *, reduction) -> f(params, feedback, inputs, *, rng=None)`, see `lrules.transform`.
      value_and_grad: `(net, loss) -> fn`, see `lrules.value_and_grad`; None where that of `transform` serves.
      stochastic: needs `rng=`.
      additive: the gradient of a batch is the sum of those of its parts, up to their weights in the objective.
      plan: `(net, graph, params, inputs) -> Plan`, what the rule does where; None for a rule of another kind.
      layer: what the rule does at one layer, for `partition`; None where it cannot be said layer by layer.
      modified: whether a modifier acts around it, of which `plan` knows nothing.
    """

    init: Callable[..., Feedback]
    transform: Callable[..., Callable[..., Any]]
    value_and_grad: Callable[..., Callable[..., Any]] | None = None
    stochastic: bool = False
    additive: bool = True
    plan: Callable[..., Plan] | None = None
    layer: LayerRule | None = None
    modified: bool = False


# ------------------------------------------------------------------------------------------------- applying a rule


def transform(net: Network | Callable, rule: Rule, *, reduction: str = "mean") -> Callable[..., Any]:
    """The network with its backward pass replaced: the same outputs, the rule's update as gradient.

    Args:
      net: a `Network`, or a bare function `apply(params, inputs) -> outputs`.
      rule: the learning rule.
      reduction: how the objective reduces the per-example losses, `"mean"` or `"sum"`. Rules whose arithmetic depends
        on the scale of the error take the arriving cotangent as that of such an objective.

    Returns:
      `f(params, feedback, inputs, *, rng=None)`, equal to `net(params, inputs)` bit for bit. Its gradient with respect
      to `params` is the rule's update, to `feedback` that of learned feedback weights, to `inputs` what the rule brings
      down to them. No forward mode, no second derivatives.

    Raises:
      ValueError: the rule needs the loss or the targets (use `value_and_grad`), or `rng` is missing or superfluous.
      NotImplementedError: the network holds a construct that the rule cannot serve.

    Example:
      >>> import jax.numpy as jnp
      >>> from lrules import backprop, transform
      >>> f = transform(lambda w, x: jnp.tanh(x @ w), backprop())
      >>> f(jnp.eye(2), Feedback({}, {}), jnp.zeros((1, 2))).shape
      (1, 2)
    """
    _check_call(net, rule)
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction={reduction!r} is neither "mean" nor "sum"')
    inner = rule.transform(as_network(net), reduction=reduction)

    def f(params, feedback, inputs, *, rng=None):
        check_rng(rule, rng)
        check_params(params)
        require_feedback(feedback)
        return inner(params, feedback, inputs, rng=rng)

    return f


def value_and_grad(net: Network | Callable, loss: Callable, rule: Rule) -> Callable[..., Any]:
    """The objective and the rule's gradients, for a loss per example.

    The objective is the mean over all elements of `loss(outputs, targets)`.

    Args:
      net: a `Network`, or a bare function `apply(params, inputs) -> outputs`.
      loss: `(outputs, targets) -> [batch]` or `[batch, ...]`.
      rule: the learning rule.

    Returns:
      `fn(params, feedback, inputs, targets, *, rng=None) -> ((value, outputs[, aux]), Gradients)`.

    Raises:
      ValueError: the loss has another batch than the inputs, or `rng` is missing or superfluous.
      NotImplementedError: the network holds a construct that the rule cannot serve.
    """
    _check_call(net, rule)
    net = as_network(net)
    if rule.value_and_grad is None:
        inner = grad_of_transform(rule.transform(net, reduction="mean"), net, loss)
    else:
        inner = rule.value_and_grad(net, loss)

    def fn(params, feedback, inputs, targets, *, rng=None):
        check_rng(rule, rng)
        check_params(params)
        require_feedback(feedback)
        return inner(params, feedback, inputs, targets, rng=rng)

    return fn


def grad_of_transform(f: Callable, net: Network, loss: Callable, *, pass_targets: bool = False) -> Callable[..., Any]:
    """`value_and_grad` of a rule that `transform` serves."""

    def fn(params, feedback, inputs, targets, *, rng=None):
        def objective(params, learned):
            extra = {"targets": targets} if pass_targets else {}
            out = f(params, feedback._replace(learned=learned), inputs, rng=rng, **extra)
            outputs = out[0] if net.has_aux else out
            return mean_loss(net, loss, outputs, inputs, targets), out

        graded = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        (value, out), (params_grad, feedback_grad) = graded(params, feedback.learned)
        head = (value, *out) if net.has_aux else (value, out)
        return head, Gradients(params_grad, feedback_grad, feedback.state, {})

    return fn


def mean_loss(net: Network, loss: Callable, outputs: Pytree, inputs: Pytree, targets: Pytree) -> jax.Array:
    """The mean over all elements of `loss(outputs, targets)`, its batch checked.

    Raises:
      ValueError: the loss does not begin with the batch of the inputs.
    """
    batch = net.batch_size(inputs)
    losses = loss(outputs, targets)
    if jnp.ndim(losses) == 0 or jnp.shape(losses)[0] != batch:
        shapes = [jnp.shape(x) for x in jax.tree.leaves(outputs)]
        raise ValueError(
            f"loss(outputs, targets) has shape {jnp.shape(losses)}, but the inputs hold {batch} examples and the "
            f"outputs have shape {', '.join(map(str, shapes))}: return one loss per example, [batch] or [batch, ...]"
        )
    return jnp.mean(losses)


def _check_call(net, rule) -> None:
    """The network and the rule stand where they should."""
    require_rule(rule)
    if isinstance(net, Rule) or not callable(net):
        raise TypeError(f"the network is a {type(net).__name__}: give a Network, or a function apply(params, inputs)")


def require_rule(rule) -> None:
    """A rule is a `Rule`, not the factory that makes it."""
    if not isinstance(rule, Rule):
        hint = "call its factory first" if callable(rule) else "the order is (net, rule) and (net, loss, rule)"
        raise TypeError(f"the rule is a {type(rule).__name__}, not an lrules.Rule: {hint}")


def require_feedback(feedback) -> None:
    """Feedback is a `Feedback`, empty for rules that need none."""
    if not isinstance(feedback, Feedback):
        restored = isinstance(feedback, Mapping) and {"fixed", "learned"} <= set(feedback) <= set(Feedback._fields)
        remedy = "make one of it, lrules.Feedback(**restored)" if restored else "make it with "
        remedy += "" if restored else "rule.init(key, net, params, inputs)"
        raise TypeError(f"the feedback is a {type(feedback).__name__}, not an lrules.Feedback: {remedy}")


def is_number(value) -> TypeGuard[float]:
    """Whether it is one real number, NaN and infinity among them; True and False are none."""
    dtype = getattr(value, "dtype", None)
    if dtype is not None:
        real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
        return bool(real and value.ndim == 0)
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value) -> TypeGuard[int]:
    """Whether it is a whole number; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def as_initializer(init) -> Initializer:
    """The initializer, or `jax.nn.initializers.glorot_normal()` if it is None.

    Raises:
      TypeError: it is no function.
    """
    if init is None:
        return jax.nn.initializers.glorot_normal()
    if not callable(init):
        raise TypeError(
            f"init= is a {type(init).__name__}, not an initializer: give a function (key, shape, dtype) -> array, such "
            "as jax.nn.initializers.glorot_normal()"
        )
    return init


def draw(init: Initializer, key, shape: tuple[int, ...], dtype, **weight) -> jax.Array:
    """What an initializer draws, checked.

    Raises:
      TypeError: it draws no array.
      ValueError: it draws one of another shape, or of whole numbers.
    """
    drawn = init(key, shape, dtype, **weight)
    if not hasattr(drawn, "shape"):
        hint = "call its factory first" if callable(drawn) else "give a function (key, shape, dtype) -> array"
        raise TypeError(f"init= made a {type(drawn).__name__} in place of an array of shape {shape}: {hint}")
    if drawn.shape != tuple(shape) or not jnp.issubdtype(drawn.dtype, jnp.inexact):
        raise ValueError(
            f"init= made an array of shape {drawn.shape} and dtype {drawn.dtype} in place of one of shape {shape} and "
            f"dtype {jnp.dtype(dtype)}: give a function (key, shape, dtype) -> array that keeps to both"
        )
    return drawn


def require_flags(**flags) -> None:
    """Options that are True or False are that."""
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{name}={value!r} is neither True nor False: give one of them")


def require_pattern(pattern, what: str = "") -> None:
    """A regular expression is one; `what` stands before it in the message."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{what}{pattern!r} is no regular expression: {error}") from None


def mesh_axes(axis_name) -> tuple[str, ...]:
    """The names of mesh axes that `axis_name=` gives.

    Raises:
      TypeError: it is neither None nor a name nor several.
    """
    several = isinstance(axis_name, Iterable) and not isinstance(axis_name, str)
    names = () if axis_name is None else tuple(axis_name) if several else (axis_name,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f'axis_name={axis_name!r} names no mesh axes: give "data", or several as ("data", "model")')
    return names


def at_least_float32(dtype) -> Any:
    """The dtype in which sums over a batch are taken."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def check_rng(rule: Rule, rng) -> None:
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
