"""Dual propagation: each activation has two values, and their difference carries the error (Hoier and Zach 2024).

The two values of state k are s+_k and s-_k. Its pre-activation a_k comes from below and the signal D_k from above; with
~alpha = 1 - alpha

    sbar_k = alpha s+_k + ~alpha s-_k,  a_k = W sbar_{k-1} + b,  D_k = W^T (s+_{k+1} - s-_{k+1})
    original    s+_k = f(a_k + alpha D_k),   s-_k = f(a_k - ~alpha D_k)                      (Eq. 2)
    adjoint     s+_k = f(a_k + ~alpha D_k),  s-_k = f(a_k - alpha D_k)                       (Eq. 19)
    damped      s+_k = f((a_k + L_k s+_k + alpha D_k) / (1 + L_k)),  s-_k alike              (Eq. 50)
    dW_k = -(s+_{k+1} - s-_{k+1}) sbar_k^T / beta

At alpha 0 and 1 one of the two values is f(a_k): D_k does not change it, and damping does not change it. If beta
differs from state to state, D_k is multiplied by beta_k / beta_{k+1}, and dW_k is divided by beta_{k+1} (Eq. 12, 45).
The operations between two activations (weights, pooling, normalisation, skip connections) are linearised at sbar.

The code sends down delta = -(s+ - s-) / beta, which has the scale of a gradient: for beta -> 0 it is the gradient. So
modifiers of the error work as usual, and beta may differ from state to state (Eq. 44). D_k is -n beta_k times the error
that arrives at state k, where n is the batch if the objective is a mean, and 1 if it is a sum. Each activation is a
`custom_vjp`. Its backward pass takes the arriving error, computes the new s+ and s-, sends down delta (other rules send
down error times derivative), and returns the new state as the cotangent of the old state. So one backward pass of JAX
is one sweep down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax

from lrules.constructors import drawn_by
from lrules.extend import Graph, Plan, RuleDescription, mean_loss, passing_names
from lrules.network import Network
from lrules.options import by_name, is_number, is_positive
from lrules.rule import Feedback, Gradients, Rule
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
    """Dual propagation (DP) and its adjoint (DP^T): differences of two nudged states replace derivatives.

    s+_k = f(a_k + ~alpha D_k),  s-_k = f(a_k - alpha D_k),  D_k = W^T (s+_{k+1} - s-_{k+1}),
    dW_k = -(s+_{k+1} - s-_{k+1}) sbar_k^T / beta  with  sbar = alpha s+ + ~alpha s-  and  ~alpha = 1 - alpha

    The outputs and the value are those of the clean forward pass. The states start with the clean values, and each
    iteration renews each state once (`"forward_backward"`: once on the way up and once on the way down).

    The report, `grads.report` of `value_and_grad`, has the number of `iterations` and the `residual` of each. The
    residual of one activation is the norm of the change of s+ and s-, divided by the norm of s+ - s-, both norms over
    the whole batch; in a loop each iteration has its own. The report has the maximum over the hidden activations, and
    over the inputs with `input_nudge`; the outputs do not count. It falls to zero if the states converge, and stays
    around 1 if they do not. In the first iteration it is 1 by definition, except that `"odd_even"` and `"random"`
    measure it. In iterations that `tolerance` leaves out it is NaN.

    States have the precision of their activation. In half precision the difference of two states is mostly rounding,
    unless beta is large. A difference of values cannot show a derivative that is not that of the function. So the rule
    refuses an activation that declares such a derivative (a surrogate, a straight-through estimator), and an activation
    that is complex but not holomorphic.

    Max pooling sends error to the maximum of sbar. With the adjoint, sbar is f(a) up to O(beta^2) for every alpha. With
    the original at an alpha other than 1/2 it is f(a) up to O(beta) only, and another element may be the maximum. (The
    authors' programs take the maximum of the last s+, and pool before the activation.)

    Args:
      alpha: the weight of s+ in the mean, in [0, 1]. At 1/2 the original and the adjoint are the same, and the gradient
        is exact up to O(beta^2). At other values it is exact up to O(beta). Give a number, or a dict of numbers by
        regular expression for the names of activations that `lrules.describe` lists (`re.search`, the first match
        holds). With `input_nudge` the inputs have the name `"inputs"`; with `output="squared_error"` the outputs have
        the name `"outputs"`.
      beta: how strongly the outputs are nudged, on the scale of the loss of one example. Give a number, or numbers by
        name as for alpha. With several numbers, D_k is multiplied by beta_k / beta_{k+1} (Eq. 12, 45).
      adjoint: True for DP^T (Eq. 19 and 22), whose states settle for every alpha in an MLP; False for the original
        (Eq. 2).
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
        In all orders but the first, the error falls about one layer in each iteration. So it can take as many
        iterations as there are layers until the lowest weights get an error.
      output: where the rule takes the error of the outputs. `"once"`: it linearises the loss at the clean outputs.
        `"refreshed"`: it linearises the loss at the present outputs, in each iteration (Eq. 22). `"squared_error"`: the
        exact minimiser (Eq. 3), only for squared errors of single outputs and the original equations. It exists if
        ~alpha beta h < 1, where h is the curvature of the loss (1 for half a squared error). If h is too large, the
        gradients are NaN.
      damping: how far each state keeps its old value, for the original only. `"spectral"`: L_k = (beta_k / beta_{k+1})
        ||W^T W|| from 5 power iterations (Eq. 46). `"contracting"`: L_k = max(0, L - 1) / 2, where L is the L_k of
        `"spectral"`. A state then contracts if the states around it do not change; all states together may still
        oscillate. A number: L_k itself (Eq. 50). Damping serves chains of dense layers and convolutions without loops,
        with constant factors and pooling between them. With normalisation only a number works. At alpha 0 and 1 the
        value that is not nudged is not damped.
      input_nudge: g, which makes the inputs states too (with damping, if the others have it): s+_0 = x + ~alpha g D_0
        and so on (the original: x + alpha g D_0; section 6.1 has g = 1). `"forward_backward"` renews the inputs once,
        at the end of the way down; `"forward"` before all others, with the D of the old states; `"parallel"` with all
        others; `"odd_even"` with the states of even level; `"random"` when their turn comes.
      feedback_rule: a sequential rule whose feedback weights replace W^T on the way down: `feedback_alignment()`,
        `kolen_pollack()`, a partition of such rules. It forms the weight gradient too.
      tolerance: the iterations stop as soon as the residual is <= this.
      axis_name: under `shard_map` or `pmap`, the mesh axes over which the mean of the objective runs, if it runs over
        any (the mean of `value_and_grad` runs over the examples of one device). The residual is that of all devices
        along these axes, so they stop together.
      passing: names of functions that have no states: the error passes through them by their derivative. Give names of
        activations that `lrules.describe` lists (`"tanh"`: all with that name, `"tanh#2"`: only this one), and names of
        nonlinearities that refusals name (`{"exp"}`).

    Returns:
      The rule. `lrules.transform` serves it only with `output="once"`. It needs `rng=` if the order is `"random"`.

    Raises:
      ValueError: an option is out of range, or two options do not work together. At use: `"forward"` has fewer
        iterations than the network has layers.
      TypeError: `axis_name` is not a name, several names or None.
      NotImplementedError: at use: an activation is not recognised, lies inside a `cond` or `shard_map` of the network,
        declares a derivative that is not that of the function, or is complex and not holomorphic; a modifier replaces
        derivatives; or damping does not serve the network.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net = lambda w, x: jnp.tanh(x @ w["first"]) @ w["second"]
      >>> w, x, y = {"first": jnp.eye(2), "second": jnp.ones((2, 1))}, jnp.ones((3, 2)), jnp.zeros((3, 1))
      >>> rule, loss = lrules.dual_propagation(0.5, beta=0.1, iterations=2), lrules.testing.half_squared_error
      >>> feedback = rule.init(jax.random.key(0), net, w, x)
      >>> (value, outputs), grads = lrules.value_and_grad(net, loss, rule)(w, feedback, x, y)
      >>> grads.params["first"].shape, grads.report["residual"].shape
      ((2, 2), (2,))

    References:
      Hoier, Zach: Two tales of single-phase contrastive Hebbian learning (2024), sections 3, 5, 6.1, F; Eq. 1 to 3, 18
      to 22, 44 to 50.
    """
    options = Options(
        by_name("alpha", alpha, lambda a: is_number(a) and 0 <= a <= 1, "a number in [0, 1]", "state"),
        by_name("beta", beta, is_positive, "a finite number > 0", "state"),
        adjoint, iterations, order, output, damping, input_nudge, feedback_rule, tolerance, axis_name,
        passing_names(passing),
    )  # fmt: skip
    options.check()

    def plan(net: Network, graph: Graph, params: Pytree, inputs: Pytree) -> Plan:
        return plan_for(options, net, graph, params, inputs)

    def transform(net: Network, *, reduction: str = "mean") -> Callable[..., Any]:
        if output != "once":
            raise ValueError(
                f'dual_propagation(output="{output}") needs the loss, and lrules.transform does not have it: use '
                'lrules.value_and_grad(net, loss, rule), or give output="once"'
            )

        def f(params: Pytree, feedback: Feedback, inputs: Pytree, *, rng: jax.Array | None = None) -> Any:
            network = DualNetwork(options, net, params, inputs, reduction, axis_name)
            args, keys = network.arguments(net, params, feedback, inputs, rng)
            outputs, aux = transformed(network)(*args, keys)
            return (outputs, aux) if net.has_aux else outputs

        return f

    def value_and_grad(net: Network, loss: Loss) -> Callable[..., tuple[tuple[Any, ...], Gradients]]:
        def fn(
            params: Pytree, feedback: Feedback, inputs: Pytree, targets: Pytree, *, rng: jax.Array | None = None
        ) -> tuple[tuple[Any, ...], Gradients]:
            # its mean runs over the share of one device
            network = DualNetwork(options, net, params, inputs, "mean", None)
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
    phase = None if feedback_rule is None else feedback_rule.phase
    description = RuleDescription(plan)
    return Rule(drawn_by(plan), transform, value_and_grad, stochastic=stochastic, description=description, phase=phase)
