"""Applying a rule to a network: `transform` and `value_and_grad`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from lrules.network import Network, NetworkLike, as_network
from lrules.rule import Feedback, Gradients, Rule, check_params, check_rng, require_feedback, require_rule
from lrules.typing import Loss, Pytree

ValueAndGradients: TypeAlias = tuple[tuple[jax.Array, *tuple[Any, ...]], Gradients]  # ((value, outputs[, aux]), ...)


class TransformedNetwork(Protocol):
    """What `transform` returns."""

    def __call__(self, params: Pytree, feedback: Feedback, inputs: Pytree, *, rng: jax.Array | None = None) -> Any:
        """The network's outputs, with `has_aux` `(outputs, aux)`.

        Args:
          params: the parameters.
          feedback: from `rule.init`; `Feedback({}, {})` for rules that have none.
          inputs: what the network takes.
          rng: a fresh key for every step, for stochastic rules and for no others.
        """


class ValueAndGrad(Protocol):
    """What `value_and_grad` returns."""

    def __call__(
        self, params: Pytree, feedback: Feedback, inputs: Pytree, targets: Pytree, *, rng: jax.Array | None = None
    ) -> ValueAndGradients:
        """The objective and the outputs, with `has_aux` aux too, and the rule's gradients.

        Args:
          params: the parameters.
          feedback: from `rule.init`; `Feedback({}, {})` for rules that have none.
          inputs: what the network takes.
          targets: what the loss takes beside the outputs.
          rng: a fresh key for every step, for stochastic rules and for no others.
        """


def transform(net: NetworkLike, rule: Rule, *, reduction: Literal["mean", "sum"] = "mean") -> TransformedNetwork:
    """The network with its backward pass replaced: the same outputs, the rule's update as gradient.

    Args:
      net: a `Network`, or a bare function `apply(params, inputs) -> outputs`.
      rule: the learning rule.
      reduction: how the objective reduces the per-example losses, `"mean"` or `"sum"`. Rules whose arithmetic depends
        on the scale of the error take the arriving cotangent as that of such an objective.

    Returns:
      `f(params, feedback, inputs, *, rng=None)`, a `TransformedNetwork`, equal to `net(params, inputs)` bit for bit.
      Its gradient with respect to `params` is the rule's update, to `feedback` that of learned feedback weights, to
      `inputs` what the rule brings down to them. No forward mode, no second derivatives.

    Raises:
      ValueError: the rule needs the loss or the targets (use `value_and_grad`), or `rng` is missing or superfluous.
      NotImplementedError: the network holds a construct that the rule cannot serve.

    Example:
      >>> import jax.numpy as jnp
      >>> import lrules
      >>> f = transform(lambda w, x: jnp.tanh(x @ w), lrules.backprop())
      >>> f(jnp.eye(2), lrules.Feedback({}, {}), jnp.zeros((1, 2))).shape
      (1, 2)
    """
    _check_call(net, rule)
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction={reduction!r} is neither "mean" nor "sum"')
    inner = rule.transform(as_network(net), reduction=reduction)

    def f(params: Pytree, feedback: Feedback, inputs: Pytree, *, rng: jax.Array | None = None) -> Any:
        check_rng(rule, rng)
        check_params(params)
        require_feedback(feedback)
        return inner(params, feedback, inputs, rng=rng)

    return f


def value_and_grad(net: NetworkLike, loss: Loss, rule: Rule) -> ValueAndGrad:
    """The objective and the rule's gradients, for a loss per example.

    The objective is the mean over all elements of `loss(outputs, targets)`.

    Args:
      net: a `Network`, or a bare function `apply(params, inputs) -> outputs`.
      loss: `(outputs, targets) -> [batch]` or `[batch, ...]`.
      rule: the learning rule.

    Returns:
      `fn(params, feedback, inputs, targets, *, rng=None) -> ((value, outputs[, aux]), Gradients)`, a `ValueAndGrad`.

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

    def fn(
        params: Pytree, feedback: Feedback, inputs: Pytree, targets: Pytree, *, rng: jax.Array | None = None
    ) -> ValueAndGradients:
        check_rng(rule, rng)
        check_params(params)
        require_feedback(feedback)
        return inner(params, feedback, inputs, targets, rng=rng)

    return fn


def grad_of_transform(
    f: Callable[..., Any], net: Network, loss: Callable[..., Any], *, pass_targets: bool = False
) -> Callable[..., Any]:
    """`value_and_grad` of a rule that `transform` serves."""

    def fn(
        params: Pytree, feedback: Feedback, inputs: Pytree, targets: Pytree, *, rng: jax.Array | None = None
    ) -> tuple[tuple[Any, ...], Gradients]:
        def objective(params: Pytree, learned: Any) -> tuple[jax.Array, Any]:
            extra = {"targets": targets} if pass_targets else {}
            out = f(params, feedback._replace(learned=learned), inputs, rng=rng, **extra)
            outputs = out[0] if net.has_aux else out
            return mean_loss(net, loss, outputs, inputs, targets), out

        graded = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        (value, out), (params_grad, feedback_grad) = graded(params, feedback.learned)
        head = (value, *out) if net.has_aux else (value, out)
        return head, Gradients(params_grad, feedback_grad, feedback.state, {})

    return fn


def mean_loss(net: Network, loss: Callable[..., Any], outputs: Pytree, inputs: Pytree, targets: Pytree) -> jax.Array:
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


def _check_call(net: Any, rule: Any) -> None:
    """The network and the rule stand where they should."""
    require_rule(rule)
    if isinstance(net, Rule) or not callable(net):
        raise TypeError(f"the network is a {type(net).__name__}: give a Network, or a function apply(params, inputs)")
