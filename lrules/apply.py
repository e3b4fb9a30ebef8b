"""Applying a rule to a network: `transform`, `value_and_grad` and `feedback_grad`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from lrules.engine.jaxprs import varying_axes
from lrules.network import Network, NetworkLike, as_network
from lrules.rule import (
    Feedback,
    Gradients,
    Rule,
    check_params,
    check_rng,
    require_description,
    require_feedback,
    require_rule,
)
from lrules.typing import Loss, Pytree

ValueAndGradients: TypeAlias = tuple[tuple[jax.Array, *tuple[Any, ...]], Gradients]  # ((value, outputs[, aux]), ...)


class TransformedNetwork(Protocol):
    """The type of the function that `transform` returns.

    f(params, feedback, inputs) = net(params, inputs), with the gradients of the rule

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> def outputs(f: lrules.TransformedNetwork, w, x):
      ...     return f(w, lrules.Feedback({}, {}), x)
      >>> outputs(lrules.transform(lambda w, x: x @ w, lrules.backprop()), jnp.eye(2), jnp.ones((1, 2))).shape
      (1, 2)
    """

    def __call__(self, params: Pytree, feedback: Feedback, inputs: Pytree, *, rng: jax.Array | None = None) -> Any:
        """The outputs of the network; `(outputs, aux)` if the network has `has_aux=True`.

        Args:
          params: the parameters.
          feedback: the result of `rule.init`; `Feedback({}, {})` for a rule without feedback weights.
          inputs: the inputs of the network.
          rng: a new key for every step, only for stochastic rules.
        """


class FeedbackGrad(Protocol):
    """The type of the function that `feedback_grad` returns.

    fn(params, feedback, inputs) -> the gradient of feedback.learned

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> def one_step(mirror: lrules.FeedbackGrad, params, feedback, x):
      ...     return mirror(params, feedback, x, rng=jax.random.key(1))
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> x, rule = jnp.ones((5, 3)), lrules.weight_mirror()
      >>> feedback = rule.init(jax.random.key(0), net, params, x)
      >>> one_step(lrules.feedback_grad(net, rule), params, feedback, x)["b"].shape
      (4, 2)
    """

    def __call__(
        self, params: Pytree, feedback: Feedback, inputs: Pytree, *, rng: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """The gradient of the learned feedback weights, with the structure of `feedback.learned`.

        Args:
          params: the parameters.
          feedback: the result of `rule.init`.
          inputs: inputs of the network. They give the shapes, and the number of examples.
          rng: a new key for every step, only if the phase is stochastic.
        """


class ValueAndGrad(Protocol):
    """The type of the function that `value_and_grad` returns.

    fn(params, feedback, inputs, targets) -> ((value, outputs[, aux]), Gradients)

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> def value(step: lrules.ValueAndGrad, w, x, y):
      ...     return step(w, lrules.Feedback({}, {}), x, y)[0][0]
      >>> step = lrules.value_and_grad(lambda w, x: x @ w, lrules.testing.half_squared_error, lrules.backprop())
      >>> float(value(step, jnp.eye(2), jnp.ones((1, 2)), jnp.zeros((1, 2))))
      1.0
    """

    def __call__(
        self, params: Pytree, feedback: Feedback, inputs: Pytree, targets: Pytree, *, rng: jax.Array | None = None
    ) -> ValueAndGradients:
        """The objective, the outputs (and aux, if the network has `has_aux=True`), and the gradients of the rule.

        Args:
          params: the parameters.
          feedback: the result of `rule.init`; `Feedback({}, {})` for a rule without feedback weights.
          inputs: the inputs of the network.
          targets: the second argument of the loss.
          rng: a new key for every step, only for stochastic rules.
        """


def transform(net: NetworkLike, rule: Rule, *, reduction: Literal["mean", "sum"] = "mean") -> TransformedNetwork:
    """Returns the network with the backward pass of a rule: the outputs stay the same, the gradient is the update.

    f(params, feedback, inputs) = net(params, inputs), and jax.grad of any objective of f is the update of the rule

    Args:
      net: a `Network`, or a bare function `apply(params, inputs) -> outputs`.
      rule: the learning rule.
      reduction: how your objective reduces the losses of the examples, `"mean"` or `"sum"`. Some rules depend on the
        scale of the error. They read the error that arrives at the outputs as the error of such an objective.

    Returns:
      `f(params, feedback, inputs, *, rng=None)`, a `TransformedNetwork`. It equals `net(params, inputs)` bit for bit.
      Its gradient with respect to `params` is the update of the rule, with respect to `feedback` the update of learned
      feedback weights, and with respect to `inputs` the error that the rule brings down to them. There is no forward
      mode and no second derivative.

    Raises:
      ValueError: the rule needs the loss or the targets (use `value_and_grad`). When f is called: `rng` is missing, or
        the rule does not use it.
      NotImplementedError: when f is called: the network has an operation that the rule cannot serve.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> x, rule = jnp.ones((5, 3)), lrules.feedback_alignment()
      >>> feedback = rule.init(jax.random.key(0), net, params, x)
      >>> f = lrules.transform(net, rule)
      >>> grads = jax.grad(lambda params: (f(params, feedback, x) ** 2).mean())(params)
      >>> grads["a"].shape
      (3, 4)
    """
    _check_call(net, rule)
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    inner = rule.transform(as_network(net), reduction=reduction)

    def f(params: Pytree, feedback: Feedback, inputs: Pytree, *, rng: jax.Array | None = None) -> Any:
        check_rng(rule, rng)
        check_params(params)
        require_feedback(feedback)
        return inner(params, feedback, inputs, rng=rng)

    return f


def value_and_grad(net: NetworkLike, loss: Loss, rule: Rule) -> ValueAndGrad:
    """Returns a function that computes the objective and the gradients of a rule, for a loss per example.

    value = mean over all elements of loss(net(params, inputs), targets)

    Args:
      net: a `Network`, or a bare function `apply(params, inputs) -> outputs`.
      loss: `(outputs, targets) -> [batch]` or `[batch, ...]`.
      rule: the learning rule.

    Returns:
      `fn(params, feedback, inputs, targets, *, rng=None) -> ((value, outputs[, aux]), Gradients)`, a `ValueAndGrad`.

    Raises:
      ValueError: when fn is called: the loss does not have the batch of the inputs, `rng` is missing, or the rule does
        not use `rng`.
      NotImplementedError: when fn is called: the network has an operation that the rule cannot serve.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> x, rule, loss = jnp.ones((5, 3)), lrules.direct_feedback_alignment(), lrules.testing.half_squared_error
      >>> feedback = rule.init(jax.random.key(0), net, params, x)
      >>> step = jax.jit(lrules.value_and_grad(net, loss, rule))
      >>> (value, outputs), grads = step(params, feedback, x, jnp.zeros((5, 2)))
      >>> outputs.shape, grads.params["a"].shape
      ((5, 2), (3, 4))
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


def feedback_grad(net: NetworkLike, rule: Rule) -> FeedbackGrad:
    """Returns a function that computes the gradient of the feedback weights in a phase of their own.

    fn(params, feedback, inputs) = dB, without a loss, an error or an update of the parameters

    Some rules (`lrules.weight_mirror`) train the feedback weights apart from the parameters. Their ordinary steps give
    the feedback weights no gradient (`grads.feedback` is zero). Take a step of the phase whenever you want: after each
    ordinary step, before training, or between epochs.

    Args:
      net: a `Network`, or a bare function `apply(params, inputs) -> outputs`.
      rule: a rule with such a phase.

    Returns:
      `fn(params, feedback, inputs, *, rng=None) -> dB`, a `FeedbackGrad`. dB has the structure of `feedback.learned`
      and the sign of a gradient: optimizers subtract it. It is zero for feedback weights that learn in ordinary steps
      (in a partition). Give the phase an optimizer of its own.

    Raises:
      ValueError: the rule has no such phase. When fn is called: there are no examples, `rng` is missing, or the phase
        does not use it.
      NotImplementedError: when fn is called: the network has an operation that the rule cannot serve.

    Example:
      >>> import jax, jax.numpy as jnp, lrules, optax
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> x, rule, optimizer = jnp.ones((5, 3)), lrules.weight_mirror(), optax.sgd(0.1)
      >>> feedback = rule.init(jax.random.key(0), net, params, x)
      >>> mirror, state = jax.jit(lrules.feedback_grad(net, rule)), optimizer.init(feedback.learned)
      >>> grads = mirror(params, feedback, x, rng=jax.random.key(1))
      >>> updates, state = optimizer.update(grads, state)
      >>> feedback = feedback._replace(learned=optax.apply_updates(feedback.learned, updates))
      >>> feedback.learned["b"].shape
      (4, 2)
    """
    _check_call(net, rule)
    phase = rule.phase
    if phase is None:
        raise ValueError(
            "this rule has no phase in which its feedback weights alone learn: if they learn at all, their gradient is "
            "grads.feedback of lrules.value_and_grad(net, loss, rule)"
        )
    net = as_network(net)
    f = transform(net, phase)

    def fn(params: Pytree, feedback: Feedback, inputs: Pytree, *, rng: jax.Array | None = None) -> dict[str, jax.Array]:
        require_feedback(feedback)
        check_params(params)
        net.require_examples(inputs)  # the means over an empty batch would be NaN
        about = require_description(phase, "feedback_grad", "the phase of this rule")
        taught = about.plan(net, net.graph(params, inputs), params, inputs).feedback_shapes()

        def run(learned: dict[str, jax.Array]) -> jax.Array:
            out = f(params, Feedback({}, learned), inputs, rng=rng)
            leaves = jax.tree.leaves(out[0] if net.has_aux else out)
            # What arrives at the layers does not matter, but something has to: the phase gives its gradients there.
            sums = [jnp.sum(y.real).astype(float) for y in leaves if jnp.issubdtype(y.dtype, jnp.inexact)]
            return sum(sums, jnp.zeros(()))

        own = {name: b for name, b in feedback.learned.items() if name in taught}
        spread = frozenset().union(*(varying_axes(jax.typeof(leaf)) for leaf in jax.tree.leaves(inputs)))

        def averaged(grad: jax.Array, b: jax.Array) -> jax.Array:
            """Inside a shard_map, JAX has summed the gradient over the devices that share b."""
            axes = tuple(sorted(spread - varying_axes(jax.typeof(b))))
            return grad / jax.lax.psum(1, axes) if axes else grad

        return jax.tree.map(jnp.zeros_like, feedback.learned) | jax.tree.map(averaged, jax.grad(run)(own), own)

    return fn


def grad_of_transform(f: Callable[..., Any], net: Network, loss: Callable[..., Any]) -> Callable[..., Any]:
    """`value_and_grad` of a rule that `transform` serves."""

    def fn(
        params: Pytree, feedback: Feedback, inputs: Pytree, targets: Pytree, *, rng: jax.Array | None = None
    ) -> tuple[tuple[Any, ...], Gradients]:
        def run(params: Pytree, learned: Any) -> Any:
            return f(params, feedback._replace(learned=learned), inputs, rng=rng)

        args = params, feedback.learned
        head, (params_grad, feedback_grad) = graded(net, loss, run, args, inputs, targets)
        return head, Gradients(params_grad, feedback_grad, feedback.state)

    return fn


def graded(
    net: Network, loss: Loss, run: Callable[..., Any], args: tuple[Any, ...], inputs: Pytree, targets: Pytree
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """`(value, outputs[, aux])` of the objective at what `run(*args)` returns, and its gradient for each of `args`."""

    def objective(*args: Any) -> tuple[jax.Array, Any]:
        out = run(*args)
        return mean_loss(net, loss, out[0] if net.has_aux else out, inputs, targets), out

    (value, out), grads = jax.value_and_grad(objective, argnums=tuple(range(len(args))), has_aux=True)(*args)
    return ((value, *out) if net.has_aux else (value, out)), grads


def mean_loss(net: Network, loss: Callable[..., Any], outputs: Pytree, inputs: Pytree, targets: Pytree) -> jax.Array:
    """Computes the objective: the mean over all elements of `loss(outputs, targets)`.

    Args:
      net: the network.
      loss: `(outputs, targets) -> [batch]` or `[batch, ...]`.
      outputs, inputs, targets: the outputs, the inputs and the targets.

    Returns:
      A scalar.

    Raises:
      ValueError: the first axis of the loss is not the batch of the inputs.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> net, loss, y = lrules.Network(lambda w, x: x @ w), lrules.testing.half_squared_error, jnp.ones((5, 2))
      >>> float(lrules.extend.mean_loss(net, loss, y, jnp.ones((5, 3)), 0 * y))
      1.0
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
    """The network and the rule are in the right order."""
    require_rule(rule)
    if isinstance(net, Rule) or not callable(net):
        raise TypeError(
            f"the network must be a Network or a function apply(params, inputs), got a {type(net).__name__}"
        )
