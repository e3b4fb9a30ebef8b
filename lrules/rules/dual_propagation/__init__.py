"""Dual propagation: each activation has two values, and their difference carries the error (Hoier and Zach 2024).

The two values of state k are s+_k and s-_k. Its pre-activation a_k comes from below and the signal D_k from above; with
~alpha = 1 - alpha

    sbar_k = alpha s+_k + ~alpha s-_k,  a_k = W sbar_{k-1} + b,  D_k = W^T (s+_{k+1} - s-_{k+1})
    original    s+_k = f(a_k + alpha D_k),   s-_k = f(a_k - ~alpha D_k)                      (Eq. 2)
    adjoint     s+_k = f(a_k + ~alpha D_k),  s-_k = f(a_k - alpha D_k)                       (Eq. 19)
    damped      s+_k = f((a_k + L_k s+_k + alpha D_k) / (1 + L_k)),  s-_k alike              (Eq. 50)
    dW_k = -(s+_{k+1} - s-_{k+1}) sbar_k^T / beta

At alpha 0 and 1 one of the two values is f(a_k): D_k does not move it, and damping leaves it alone. Where beta differs
from state to state, D_k is multiplied by beta_k / beta_{k+1} and dW_k divided by beta_{k+1} (Eq. 12, 45). What lies
between two activations (weights, pooling, normalisation, skip connections) is linearised at sbar.

The code sends down delta = -(s+ - s-) / beta, which has the scale of a gradient: for beta -> 0 it is the gradient. So
modifiers of the error find what they expect, and beta may differ from state to state (Eq. 44). D_k is -n beta_k times
what arrives at state k; n is the batch if the objective is a mean, and 1 if it is a sum. Each activation is a
`custom_vjp`. Its backward pass takes what arrives, computes the new s+ and s-, hands down delta where other rules hand
down error times derivative, and returns the new state as the cotangent of the old one. So one backward pass of JAX is
one sweep down.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax

from lrules.apply import mean_loss
from lrules.engine.activations import passing_names
from lrules.engine.graph import Graph
from lrules.engine.plan import Plan
from lrules.network import Network, NetworkLike, as_network
from lrules.rule import Feedback, Gradients, Rule, RuleDescription, check_params
from lrules.rules.dual_propagation.network import DualNetwork, plan_for
from lrules.rules.dual_propagation.options import Damping, Number, Options, Order, Output
from lrules.rules.dual_propagation.outputs import exact_error
from lrules.rules.dual_propagation.sweeps import begin, gradients, transformed
from lrules.typing import AxisName, Loss, Pytree


def dual_propagation(
    alpha: Number = 0.5,
    *,
    beta: Number = 0.1,
    adjoint: bool = True,
    iterations: int = 1,
    order: Order = "forward_backward",
    output: Output = "once",
    damping: Damping | float | None = None,
    input_nudge: float | None = None,
    feedback_rule: Rule | None = None,
    tolerance: float | None = None,
    axis_name: AxisName = None,
    passing: str | Iterable[str] = (),
) -> Rule:
    """Dual propagation (DP) and its adjoint (DP^T): differences of two nudged states do the work of derivatives.

    s+_k = f(a_k + ~alpha D_k),  s-_k = f(a_k - alpha D_k),  D_k = W^T (s+_{k+1} - s-_{k+1}),
    dW_k = -(s+_{k+1} - s-_{k+1}) sbar_k^T / beta  with  sbar = alpha s+ + ~alpha s-  and  ~alpha = 1 - alpha

    The outputs and the value are those of the clean forward pass. The states start clean, and each iteration renews
    each state once (`"forward_backward"`: once on the way up and once on the way down).

    The report, `grads.report` of `value_and_grad`, has the number of `iterations` and the `residual` of each. The
    residual of one activation is the norm of the change of s+ and s-, divided by the norm of s+ - s-, both norms over
    the whole batch. The report has the maximum over the hidden activations, and over the inputs with `input_nudge`; the
    outputs do not count. It falls to zero if the states converge, and stays around 1 if they do not. In the first
    iteration it is 1 by definition, except that `"odd_even"` and `"random"` measure it. In iterations that `tolerance`
    leaves out it is NaN.

    States have the precision of their activation. In half precision the difference of two states is mostly rounding
    unless beta is large. A difference of values cannot show a derivative that is not the function's own: an activation
    that declares one (a surrogate, a straight-through estimator) is refused, and so is one that is complex but not
    holomorphic.

    Max pooling sends error to the maximum of sbar. With the adjoint, sbar is f(a) up to O(beta^2) for every alpha. With
    the original at an alpha other than 1/2 it is f(a) up to O(beta) only, and another element may be the maximum. (The
    authors' programs take the maximum of the last s+, and pool before the activation.)

    Args:
      alpha: the weight of s+ in the mean, in [0, 1]. At 1/2 the original and the adjoint are the same, and the gradient
        is exact up to O(beta^2); else up to O(beta). A number, or numbers by regular expression (`re.search`, the first
        match counts) on the names of activations that `lrules.describe` lists. With `input_nudge` the inputs are called
        `"inputs"`; with `output="squared_error"` the outputs are called `"outputs"`.
      beta: how strongly the outputs are nudged, on the scale of one example's loss. A number or numbers by name, as
        alpha; then D_k is multiplied by beta_k / beta_{k+1} (Eq. 12, 45).
      adjoint: True for DP^T (Eq. 19 and 22), which is stable for every alpha; False for the original (Eq. 2).
      iterations: how many times the states are renewed.
      order: in which order one iteration renews the states.
        `"forward_backward"`: a sweep up and a sweep down; n iterations cost (2n + 1) / 3 of backprop.
        `"forward"`: a sweep up only.
        `"parallel"`: all states at once from the old ones.
        `"odd_even"`: the states of odd level at once, then those of even level. The level of a state is the number of
        activations on the longest way from the inputs to it, itself included; inputs have level 0, and the outputs one
        more than the highest level below them. In a loop each iteration has its own level.
        `"random"`: one state after another in random order; the states of an activation in a `scan` are renewed
        together.
        In all but the first, the error falls about one layer in each iteration, so it can take as many iterations as
        there are layers before the lowest weights get any.
      output: where the error of the outputs is taken. `"once"`: the loss is linearised at the clean outputs.
        `"refreshed"`: at the present outputs, in each iteration (Eq. 22). `"squared_error"`: the exact minimiser (Eq.
        3), for squared errors of single outputs and the original only; it exists where ~alpha beta h < 1, with h the
        curvature of the loss (1 for half a squared error), and the gradients are NaN where h is too large.
      damping: how far each state keeps its old value, for the original only. `"spectral"`: L_k = (beta_k / beta_{k+1})
        ||W^T W|| from 5 power iterations (Eq. 46). `"contracting"`: L_k = max(0, that - 1) / 2, at which a state
        contracts while the states around it stand still; all together may still oscillate. A number: L_k itself (Eq.
        50). Damping serves chains of dense layers and convolutions, with constant factors and pooling between them,
        written without loops; with normalisation only a number serves. At alpha 0 and 1 the value that is not nudged is
        not damped.
      input_nudge: g, which makes the inputs states too, damped where the others are: s+_0 = x + ~alpha g D_0 and so on
        (the original: x + alpha g D_0; section 6.1 has g = 1). `"forward_backward"` renews the inputs once, at the end
        of the way down; `"forward"` before all others, with the D of the old states; `"parallel"` with all others;
        `"odd_even"` with the even ones; `"random"` when their turn comes.
      feedback_rule: a sequential rule whose feedback weights replace W^T on the way down: `feedback_alignment()`,
        `kolen_pollack()`, a partition of such rules. It forms the weight gradient too.
      tolerance: stop as soon as the residual is at most this.
      axis_name: under `shard_map` or `pmap`, the mesh axes over which the mean of the objective runs, if it runs over
        any (that of `value_and_grad` runs over one device's share).
      passing: names of functions that have no states; error passes through them by their derivative. Give the names
        of activations that `lrules.describe` lists (`"tanh"`: all of that name, `"tanh#2"`: that one), and those of
        nonlinearities that refusals give (`{"exp"}`).

    Returns:
      The rule. `lrules.transform` serves it with `output="once"` only. It needs `rng=` if the order is `"random"`.

    Raises:
      ValueError: an option is out of range, or two options do not go together; at use: `"forward"` has fewer iterations
        than the network has layers.
      TypeError: `axis_name` is neither None nor a name nor several names.
      NotImplementedError: at use: an activation is not recognised, or lies inside a `cond` or `shard_map` of the
        network, or declares a derivative that is not its own, or is complex and not holomorphic; a modifier replaces
        derivatives; damping does not serve the network.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lrules import value_and_grad
      >>> net = lambda w, x: jnp.tanh(x @ w["first"]) @ w["second"]
      >>> loss = lambda outputs, targets: ((outputs - targets) ** 2).sum(-1)
      >>> w, x, y = {"first": jnp.eye(2), "second": jnp.ones((2, 1))}, jnp.ones((3, 2)), jnp.zeros((3, 1))
      >>> rule = dual_propagation(0.5, beta=0.1, iterations=2)
      >>> feedback = rule.init(jax.random.key(0), net, w, x)
      >>> (value, outputs), grads = value_and_grad(net, loss, rule)(w, feedback, x, y)
      >>> grads.params["first"].shape, grads.report["residual"].shape
      ((2, 2), (2,))

    References:
      Hoier, Zach: Two tales of single-phase contrastive Hebbian learning (2024), sections 3, 5, 6.1, F; Eq. 1 to 3, 18
      to 22, 44 to 50.
    """
    options = Options(
        alpha, beta, adjoint, iterations, order, output, damping, input_nudge, feedback_rule, tolerance, axis_name,
        passing_names(passing),
    )  # fmt: skip
    options.check()

    def plan(net: Network, graph: Graph, params: Pytree, inputs: Pytree) -> Plan:
        return plan_for(options, net, graph, params, inputs)

    def init(key: jax.Array, net: NetworkLike, params: Pytree, inputs: Pytree) -> Feedback:
        net = as_network(net)
        check_params(params)
        return plan(net, net.graph(params, inputs), params, inputs).init(key, net.parameters(params))

    def transform(net: Network, *, reduction: str = "mean") -> Callable[..., Any]:
        if output != "once":
            raise ValueError(
                f'dual_propagation(output="{output}") needs the loss, which lrules.transform does not have: use '
                'lrules.value_and_grad(net, loss, rule), or give output="once"'
            )

        def f(params: Pytree, feedback: Feedback, inputs: Pytree, *, rng: jax.Array | None = None) -> Any:
            network = DualNetwork(options, net, params, inputs, reduction)
            args, keys = network.arguments(net, params, feedback, inputs, rng)
            outputs, aux = transformed(network)(*args, keys)
            return (outputs, aux) if net.has_aux else outputs

        return f

    def value_and_grad(net: Network, loss: Loss) -> Callable[..., tuple[tuple[Any, ...], Gradients]]:
        def fn(
            params: Pytree, feedback: Feedback, inputs: Pytree, targets: Pytree, *, rng: jax.Array | None = None
        ) -> tuple[tuple[Any, ...], Gradients]:
            network = DualNetwork(dataclasses.replace(options, axis_name=None), net, params, inputs, "mean")
            args, keys = network.arguments(net, params, feedback, inputs, rng)
            outputs, aux, started = begin(network, args)

            def objective(outputs: Pytree) -> jax.Array:
                return mean_loss(net, loss, outputs, inputs, targets)

            value, error = jax.value_and_grad(objective, allow_int=True)(outputs)
            error_at: Callable[..., Any] = lambda present: error  # noqa: E731
            if output == "refreshed":
                error_at = jax.grad(objective, allow_int=True)
            elif output == "squared_error":
                error_at = exact_error(network.units["outputs"], objective, outputs)
            (grads, learned, *_), report = gradients(network, args, keys, started, outputs, error_at)
            tree = jax.tree.structure(params)
            params_grad = jax.tree.unflatten(tree, grads[: tree.num_leaves])
            learned = {name: learned[name] for name in feedback.learned}
            head = (value, outputs, aux) if net.has_aux else (value, outputs)
            return head, Gradients(params_grad, learned, feedback.state, report)

        return fn

    stochastic = order == "random" or (feedback_rule is not None and feedback_rule.stochastic)
    return Rule(init, transform, value_and_grad, stochastic=stochastic, description=RuleDescription(plan))
