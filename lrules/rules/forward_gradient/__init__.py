"""Forward gradients: the loss is differentiated along random directions, and no error goes down through the network.

A direction v has random numbers with mean 0 and variance 1. The derivative of the loss L along v, times v, has the
gradient as its mean (Baydin, Pearlmutter, Syme, Wood, Torr 2022):

    g = (dL . v) v,    E g = E (v v^T) dL = dL

`weights.py`: v has a number for each parameter. `activations.py`: v has a number for each example and each unit of
each pre-activation z_l (Ren, Kornblith, Liao, Hinton 2023). Then each example has its own derivative along v,

    (dL . v) = sum over layers of dL/dz_l . v_l,    dL/dz_l ~ (dL . v) v_l,    dW_l ~ (dL . v) v_l h_{l-1}^T

and the numbers that one derivative speaks of are far fewer, so the estimate is less noisy. `local.py`: each hidden
signal has its own loss, and each block of layers the derivative of its own loss.

The derivative along v comes from a forward pass in forward mode (`jvp`), or from the losses of two passes (Spall 1992;
Malladi et al. 2023):

    (dL . v) ~ (L(theta + std v) - L(theta - std v)) / (2 std)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from lrules.constructors import drawn_by
from lrules.extend import Graph, Plan, RuleDescription, require_description
from lrules.network import Network
from lrules.options import by_name, is_number, is_positive, is_whole
from lrules.rule import Feedback, Gradients, Rule
from lrules.rules.forward_gradient import activations, weights
from lrules.rules.forward_gradient.directions import Directions
from lrules.rules.forward_gradient.local import LocalStep
from lrules.rules.local_losses import LocalDescription, LocalPlan
from lrules.typing import Loss, Pytree

Perturb = Literal["weights", "activations"]
Method = Literal["jvp", "central"]


def forward_gradient(
    perturb: Perturb = "weights",
    *,
    method: Method = "jvp",
    directions: int = 1,
    std: float | None = None,
    noise: Callable[..., jax.Array] = jax.random.normal,
    local: Rule | None = None,
) -> Rule:
    """Forward gradients: random directions, each times the derivative of the loss along it.

    g = 1/n sum over n directions v of (dL . v) v,  dL . v by a jvp or as (L(theta + std v) - L(theta - std v)) / 2 std

    The mean of g over the noise is the gradient (with `"central"`, up to O(std^2)). But g is noisy: with N numbers in a
    direction, its squared distance from the gradient is (N + 1) / n times that of zero. So the learning rate has to be
    small, and the rule is for small networks, for weights that are nearly right (fine tuning), or for losses and
    networks that cannot be differentiated. On the digits of scikit-learn (an MLP with three hidden layers of 64, 30
    epochs, 3 seeds) a direction of weights reaches 52.0%, 16 directions 84.4%, a direction of activations 93.6%;
    backprop 97.6%, the last layer alone 84.3%. With eight hidden layers, a direction of activations reaches 86.8%, with
    local losses 91.2%; backprop 97.2%.

    - `perturb="weights"`: theta are the parameters; N is their number. The rule serves every network. With
      `method="central"` it needs no derivatives, and no memory but that of inference: the noise is drawn again from its
      key wherever it is needed, so it is never stored.
    - `perturb="activations"`: theta are the pre-activations of each example, or the hidden signals where no activation
      makes them; N is the number of their units. The layers below learn from the estimates there by their own
      derivatives; the last layer gets its true gradient.

    Args:
      perturb: `"weights"` or `"activations"`.
      method: `"jvp"`: the exact derivative along v, by forward mode. `"central"`: two forward passes, with +v and -v.
      directions: n. A jvp runs them side by side: n + 1 forward passes, and the memory of n perturbed passes.
        `"central"` runs them one after the other: 2 n forward passes, in the memory of one.
      std: the size of the step along v, only for `"central"`; `jax.jit` and `jax.vmap` may trace it. Too small, and the
        losses differ by rounding alone: 1e-3 is a good beginning in float32.
      noise: `(key, shape, dtype)` -> numbers with mean 0 and variance 1, such as `jax.random.rademacher` (then this is
        SPSA, and its noise is a little smaller).
      local: a rule `lrules.local_losses(...)`. Then each hidden signal has its own loss, and the derivative of this
        loss along v is for the layers right below it. What the local losses learn gets its true gradient. Only with
        `method="jvp"`.

    Returns:
      The rule. It needs `rng=`. `lrules.transform` serves it if `method="jvp"` and `local=None`; then the gradient of
      inputs is an estimate, too. It has no feedback weights but those of `local`.

    Raises:
      ValueError: an option is out of range, or two options do not work together. `lrules.transform` raises it for
        `"central"` and `local`, which need the loss.
      TypeError: `noise` is not a function, or `local` is not a rule with local losses.
      NotImplementedError: at use: there is a modifier around the rule; with a jvp, the network has a `jax.custom_vjp`;
        with activations, a hidden signal lies inside a `cond` or `shard_map` of the network.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> x, rule, loss = jnp.ones((5, 3)), lrules.forward_gradient(), lrules.testing.half_squared_error
      >>> feedback = rule.init(jax.random.key(0), net, params, x)
      >>> step = lrules.value_and_grad(net, loss, rule)
      >>> (value, outputs), grads = step(params, feedback, x, jnp.zeros((5, 2)), rng=jax.random.key(1))
      >>> grads.params["a"].shape
      (3, 4)

    References:
      Baydin, Pearlmutter, Syme, Wood, Torr: Gradients without backpropagation (2022), section 3.
      Ren, Kornblith, Liao, Hinton: Scaling forward gradient with local losses (2023), sections 3 and 4.
      Spall: Multivariate stochastic approximation using a simultaneous perturbation gradient approximation (1992).
      Malladi, Gao, Nichani, Damian, Lee, Chen, Arora: Fine-tuning language models with just forward passes (2023).
    """
    _check(perturb, method, directions, std, noise, local)
    drawn = Directions(directions, noise)
    make = weights.plan if perturb == "weights" else activations.planner()
    if local is not None:
        make = require_description(local, "forward_gradient", "local").plan

    def plan(net: Network, graph: Graph, params: Pytree, inputs: Pytree) -> Plan:
        if net.handlers:
            raise NotImplementedError(
                "forward_gradient sends no error from layer to layer, so a modifier of errors, derivatives or updates "
                "cannot change it: leave the modifier out, or use another rule"
            )
        made: Plan = make(net, graph, params, inputs)
        return made

    def transform(net: Network, *, reduction: str = "mean") -> Callable[..., Any]:
        if method == "central" or local is not None:
            option = 'method="central"' if local is None else "local="
            raise ValueError(
                f"forward_gradient({option}) needs the loss, and lrules.transform does not have it: use "
                "lrules.value_and_grad(net, loss, rule)"
            )

        def f(params: Pytree, feedback: Feedback, inputs: Pytree, *, rng: jax.Array | None = None) -> Any:
            made = plan(net, net.graph(params, inputs), params, inputs)
            served = activations.transformed if perturb == "activations" else weights.transformed
            return served(made, drawn, net, params, inputs, rng)

        return f

    def value_and_grad(net: Network, loss: Loss) -> Callable[..., tuple[tuple[Any, ...], Gradients]]:
        if method == "central" and getattr(loss, "error_is_modified", False):
            raise NotImplementedError(
                'forward_gradient(method="central") compares losses, so a modifier of the output error cannot change '
                'it: give method="jvp", or leave the modifier out'
            )

        def fn(
            params: Pytree, feedback: Feedback, inputs: Pytree, targets: Pytree, *, rng: jax.Array | None = None
        ) -> tuple[tuple[Any, ...], Gradients]:
            made = plan(net, net.graph(params, inputs), params, inputs)
            made.check(feedback)
            assert rng is not None  # a stochastic rule always has a key
            if isinstance(made, LocalPlan):
                step = LocalStep(made, drawn, net, loss, inputs, targets, rng)
                head, grads, learned = step.of(perturb, params, feedback.learned)
                return head, Gradients(grads, learned, feedback.state)
            served = activations.central if perturb == "activations" else weights.central
            head, grads = served(made, drawn, std, net, loss, params, inputs, targets, rng)
            return head, Gradients(grads, {}, feedback.state)

        return fn

    return Rule(
        drawn_by(plan),
        transform,
        value_and_grad if method == "central" or local is not None else None,
        stochastic=True,
        additive=local is None or local.additive,
        description=RuleDescription(plan),
    )


def _check(perturb: Any, method: Any, directions: Any, std: Any, noise: Any, local: Any) -> None:
    for name, value, known in (("perturb", perturb, get_args(Perturb)), ("method", method, get_args(Method))):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")
    if not (is_whole(directions) and directions >= 1):
        raise ValueError(f"directions must be an integer >= 1, got {directions!r}")
    if method == "jvp" and std is not None:
        raise ValueError(f'std is the step of method="central", and a jvp makes no step, got std={std!r}: leave it out')
    if method == "central" and std is None:
        raise ValueError('method="central" makes a step of size std along each direction: give it, such as std=1e-3')
    if std is not None:
        by_name("std", std, is_positive, "a finite number > 0", traced=True)
        if not (isinstance(std, jax.core.Tracer) or (is_number(std) and std < math.inf)):
            raise ValueError(f"std must be one number, got {std!r}")
    if not callable(noise):
        raise TypeError(f"noise must be a function (key, shape, dtype) -> array, got a {type(noise).__name__}")
    if local is None:
        return
    if not (isinstance(local, Rule) and isinstance(local.description, LocalDescription)):
        raise TypeError(f"local must be lrules.local_losses(...), without a modifier, got a {type(local).__name__}")
    if method == "central":
        raise ValueError(
            'local= takes the derivative of each local loss, and method="central" compares losses of the whole '
            'network: give method="jvp"'
        )
