"""Predictive coding: states settle into the least prediction errors (Whittington and Bogacz 2017).

Each state x_l is predicted from the states below it, mu_l = g_l(x_below, W). The energy of one example is

    F = beta L(y) + sum_l |x_l - mu_l|^2 / 2,    y the outputs as the states predict them

Inference descends F by the states, from x_l = mu_l (the clean forward pass), with the weights as they are:

    e_l = x_l - mu_l,   dF/dx_l = e_l - sum_above (dmu_k/dx_l)^T e_k + beta (dy/dx_l)^T dL/dy

and the weights descend F at the states that are reached: dW_l = dF/dW_l / beta. With half squared errors, beta = 1 is a
network whose outputs are clamped to the targets. 1 / beta is the variance of the outputs, if that of the states is 1.

Fixed predictions (Millidge, Tschantz and Buckley 2020, section 3): mu_k and dmu_k/dx_l keep their values of the clean
pass. So F is replaced by its linear part, and the errors settle where e_l = -dL/dx_l: this is backpropagation.

The states are the hidden signals, or the pre-activations: Whittington and Bogacz have mu_l = W f(x_{l-1}), others
mu_l = f(W x_{l-1}). A handler cuts the network at each state. One run of the cut network gives all predictions at once,
and its pullback gives dF/dx and dF/dW. The sign is that of a gradient: -e_l / n stands for the error of
backpropagation, where n is the batch, so that modifiers of the error act on the prediction errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from lrules.constructors import drawn_by
from lrules.engine.distance import depth_of
from lrules.engine.dtypes import widened
from lrules.engine.planning import plan_elsewhere
from lrules.engine.settling import repeat, residual
from lrules.extend import (
    Frame,
    Graph,
    Plan,
    RuleDescription,
    all_zeros_at,
    evaluate,
    mean_loss,
)
from lrules.network import Network
from lrules.options import is_number, is_positive, is_whole, mesh_axes, not_traced, require_flags
from lrules.rule import Feedback, Gradients, Rule
from lrules.rules.predictive_coding.states import Place, States, places_of
from lrules.typing import AxisName, Loss, Pytree

Kind = Literal["hidden", "pre_activation"]


def predictive_coding(
    steps: int = 20,
    *,
    step_size: float = 0.1,
    beta: float = 1.0,
    states: Kind = "hidden",
    fixed_predictions: bool = False,
    tolerance: float | None = None,
    axis_name: AxisName = None,
) -> Rule:
    """Predictive coding: hidden signals are states that settle between their predictions and the targets.

    F = beta L(y) + sum_l |x_l - mu_l|^2 / 2,  x <- x - step_size dF/dx, steps times,  dW = dF/dW / beta

    The outputs and the value are those of the clean forward pass, where the states begin. Prediction errors fall by one
    state in each step. They shrink on their way, by about step_size in each state, until the states have settled. So a
    deep network needs many steps, or a step_size near the largest that is stable.

    Measured: an MLP on the digits of scikit-learn (20 epochs, 3 seeds) reached 96.5 +- 0.2%, and backprop 96.9 +- 0.6%.
    With step_size=0.5 the states of the same network diverge as its weights grow: 66.3 +- 4.3%.

    The report, `grads.report` of `value_and_grad`, has the number of `iterations` and the `residual` of each: the norm
    of the change of a state, divided by the norm of its prediction error, both over the whole batch; the largest of all
    states. It falls to zero if the states settle. In the first step it is 1 by definition, and in steps that
    `tolerance` leaves out it is NaN.

    In a loop each iteration has its own states. The carry and the stacked outputs of a `scan` are states of their own.
    A carry that begins with data (or zeros) is no state there, as in a network that is written out.

    Args:
      steps: how many times the states descend the energy. If an error cannot reach all parameters in so many steps, the
        rule refuses the network.
      step_size: the step size. Gradient descent is stable below 2 / (the largest curvature of F), which is 1 + ||W||^2
        in a linear network of two layers. With fixed predictions it is stable below 2.
      beta: the weight of the loss. For beta -> 0 the settled states give the gradient of backpropagation, up to
        O(beta).
      states: which tensors are states. `"hidden"`: the hidden signals, mu_l = f(W x_{l-1}). `"pre_activation"`: what
        the activations read, mu_l = W f(x_{l-1}), as in the paper; hidden signals that no activation makes are states.
      fixed_predictions: whether the predictions and their derivatives keep their values of the clean forward pass. Then
        the errors settle at those of backpropagation. The energy does not matter any more, nor does beta.
      tolerance: the steps stop as soon as the residual is <= this.
      axis_name: under `shard_map` or `pmap`, the mesh axes over which the residual is taken, so that all devices stop
        together.

    Returns:
      The rule. `lrules.transform` serves it only with `fixed_predictions=True`.

    Raises:
      ValueError: an option is out of range. At use: there are too few steps for the depth of the network.
      TypeError: `axis_name` is not a name, several names or None.
      NotImplementedError: at use: a state lies inside a `cond` or `shard_map` of the network, or has no batch.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net = lambda w, x: jnp.tanh(x @ w["first"]) @ w["second"]
      >>> w = {"first": jnp.eye(2), "second": jnp.ones((2, 1))}
      >>> rule, loss = lrules.predictive_coding(steps=10), lrules.testing.half_squared_error
      >>> step = lrules.value_and_grad(net, loss, rule)
      >>> (value, outputs), grads = step(w, lrules.Feedback({}, {}), jnp.ones((3, 2)), jnp.zeros((3, 1)))
      >>> grads.params["first"].shape, grads.report["residual"].shape
      ((2, 2), (10,))

    References:
      Whittington, Bogacz: An approximation of the error backpropagation algorithm in a predictive coding network with
      local Hebbian synaptic plasticity (2017), section 2.
      Innocenti, Achour, Buckley: MuPC: scaling predictive coding to 100+ layer networks (2025).
      Millidge, Tschantz, Buckley: Predictive coding approximates backprop along arbitrary computation graphs (2020),
      section 3 (the fixed predictions).
    """
    options = _Options(steps, step_size, beta, states, fixed_predictions, tolerance, axis_name)
    options.check()

    def plan(net: Network, graph: Graph, params: Pytree, inputs: Pytree) -> Plan:
        made: Plan = graph.once_for(options, lambda: _plan(options, net, graph, params, inputs))
        return made

    def prepare(net: Network, params: Pytree, feedback: Feedback, inputs: Pytree) -> tuple[_Cut, tuple[Any, ...]]:
        graph = net.graph(params, inputs)
        made = plan(net, graph, params, inputs)
        made.check(feedback)
        cut = _Cut(options, made, net.batch_size(inputs))
        return cut, (net.parameters(params), jax.tree.leaves(inputs), graph.consts, net.handlers)

    def transform(net: Network, *, reduction: str = "mean") -> Callable[..., Any]:
        if not fixed_predictions:
            raise ValueError(
                "predictive_coding needs the loss, and lrules.transform does not have it: use "
                "lrules.value_and_grad(net, loss, rule), or give fixed_predictions=True"
            )

        def f(params: Pytree, feedback: Feedback, inputs: Pytree, *, rng: jax.Array | None = None) -> Any:
            cut, args = prepare(net, params, feedback, inputs)
            outputs, aux = _transformed(cut)(*args)
            return (outputs, aux) if net.has_aux else outputs

        return f

    def value_and_grad(net: Network, loss: Loss) -> Callable[..., tuple[tuple[Any, ...], Gradients]]:
        def fn(
            params: Pytree, feedback: Feedback, inputs: Pytree, targets: Pytree, *, rng: jax.Array | None = None
        ) -> tuple[tuple[Any, ...], Gradients]:
            cut, args = prepare(net, params, feedback, inputs)

            def objective(outputs: Pytree) -> jax.Array:
                return mean_loss(net, loss, outputs, inputs, targets)

            (outputs, predicted), pull, aux = cut.vjp(True, args, cut.zeros)
            value, error = jax.value_and_grad(objective, allow_int=True)(outputs)
            if fixed_predictions:
                grads, report = cut.settled(pull, error)
            else:
                grads, report = cut.descended(pull, error, predicted, args, jax.grad(objective, allow_int=True))
            tree = jax.tree.structure(params)  # frozen weights come after it
            params_grad = jax.tree.unflatten(tree, grads[0][: tree.num_leaves])
            head = (value, outputs, aux) if net.has_aux else (value, outputs)
            return head, Gradients(params_grad, {}, feedback.state, report)

        return fn

    description = RuleDescription(plan)
    return Rule(drawn_by(plan), transform, value_and_grad, additive=tolerance is None, description=description)


@dataclasses.dataclass(frozen=True, eq=False)
class _Options:
    """What the user chose, see `predictive_coding`."""

    steps: int
    step_size: float
    beta: float
    states: Kind
    fixed_predictions: bool
    tolerance: float | None
    axis_name: AxisName

    def check(self) -> None:
        if not (is_whole(self.steps) and self.steps >= 1):
            raise ValueError(f"steps must be an integer >= 1, got {self.steps!r}")
        for option, value in (("step_size", self.step_size), ("beta", self.beta)):
            not_traced(option, value, "a finite number > 0")
            if not is_positive(value):
                raise ValueError(f"{option} must be a finite number > 0, got {value!r}")
        if self.states not in get_args(Kind):
            raise ValueError(f'states must be "hidden" or "pre_activation", got {self.states!r}')
        require_flags(fixed_predictions=self.fixed_predictions)
        not_traced("tolerance", self.tolerance, "a number or None")
        if self.tolerance is not None and not (is_number(self.tolerance) and self.tolerance >= 0):
            raise ValueError(f"tolerance must be a number >= 0 or None, got {self.tolerance!r}")
        mesh_axes(self.axis_name)


def _plan(options: _Options, net: Network, graph: Graph, params: Pytree, inputs: Pytree) -> Plan:
    """Refuses what the rule cannot serve."""
    own = plan_elsewhere(net, graph, params, inputs)
    _, depth = _states(options, graph)
    if options.steps < depth:
        raise ValueError(
            f"predictive_coding(steps={options.steps}): the error crosses one state in each step, and in this network "
            f"it takes {depth} steps to the layer farthest from the outputs, which would learn nothing: give at least "
            f"steps={depth}"
        )
    return own


def _states(options: _Options, graph: Graph) -> tuple[list[Place], int]:
    """The states of a network, and how many steps an error needs to reach all parameters."""

    def find() -> tuple[list[Place], int]:
        places = places_of(graph, options.states == "pre_activation")
        return places, depth_of(graph, {place.root.place: place.first for place in places})

    found: tuple[list[Place], int] = graph.once(("predictive_coding", options.states), find)
    return found


def _apart(x: jax.Array, mu: jax.Array) -> jax.Array:
    """x - mu, and zero where they differ by rounding alone: no error has reached such a state yet."""
    difference = x - mu
    return jnp.where(jnp.abs(difference) <= jnp.finfo(x.dtype).eps * jnp.abs(mu), 0, difference)


class _Cut:
    """A network that is cut at its states."""

    def __init__(self, options: _Options, plan: Plan, batch: Any) -> None:
        self.options, self.plan, self.batch = options, plan, batch
        self.places, self.depth = _states(options, plan.graph)
        self.zeros = all_zeros_at({place.name: place.root for place in self.places})
        self.ranks = {place.name: len(place.root.aval.shape) for place in self.places}

    def vjp(self, probes: bool, args: Sequence[Any], given: Any, wrt: int = 1) -> tuple[Any, Any, Any]:
        """`((outputs, predictions), pull, aux)`; `pull` gives those of `given` and of `args[:wrt]`."""

        def run(given: Any, *moving: Any) -> tuple[tuple[Any, dict[str, Any]], Any]:
            params, inputs, consts, handlers = (*moving, *args[len(moving) :])
            frame = Frame(given)
            own = States(self.places, probes)
            outputs, aux = evaluate(self.plan, params, {}, inputs, consts, (own, *handlers), frame)
            return (outputs, {place.name: frame.records[place.name] for place in self.places}), aux

        return jax.vjp(run, given, *args[:wrt], has_aux=True)

    def settled(self, pull: Callable[..., Any], error: Pytree) -> tuple[Any, dict[str, Any]]:
        """The cotangents of the arguments, and the report, if the predictions are fixed."""
        rate = self.options.step_size

        def iterate(errors: Any, _: Any) -> tuple[Any, jax.Array]:
            changes = jax.tree.map(lambda arriving, e: rate * (arriving - e), pull((error, errors))[0], errors)
            new = jax.tree.map(jnp.add, errors, changes)
            return new, residual(changes, new, self.options.axis_name, self.ranks)

        errors, report = self.repeat(iterate, self.zeros, done=0)
        return pull((error, errors))[1:], report

    def descended(
        self, pull: Callable[..., Any], error: Pytree, predicted: Any, args: Any, slope: Callable[..., Any]
    ) -> tuple[Any, dict[str, Any]]:
        """The same for states that descend the energy.

        Args:
          pull: the pullback of the clean pass, with probes.
          error: the slope of the objective at the clean outputs.
          predicted: the states of the clean pass.
          args: the arguments of the network.
          slope: the function from outputs to the slope of the objective.
        """
        options, sum_of = self.options, self.of_sum
        weighted = lambda error: _times(options.beta, error)  # noqa: E731

        def errors_of(states: Any, predicted: Any) -> Any:
            return jax.tree.map(lambda x, mu: sum_of(jnp.conj(mu - x), -1), states, predicted)

        def iterate(states: Any, _: Any) -> tuple[Any, jax.Array]:
            (outputs, predicted), pull, _ = self.vjp(False, args, states, wrt=0)
            (arriving,) = pull((weighted(slope(outputs)), errors_of(states, predicted)))
            changes = jax.tree.map(
                lambda a, x, mu: -options.step_size * (x - mu + sum_of(jnp.conj(a))), arriving, states, predicted
            )
            new = jax.tree.map(jnp.add, states, changes)
            return new, residual(changes, jax.tree.map(_apart, new, predicted), options.axis_name, self.ranks)

        arriving = pull((weighted(error), self.zeros))[0]  # in the first step there are no prediction errors
        states = jax.tree.map(lambda mu, a: mu - options.step_size * sum_of(jnp.conj(a)), predicted, arriving)
        states, report = self.repeat(iterate, states, done=1)
        (outputs, predicted), pull, _ = self.vjp(False, args, states)
        grads = pull((weighted(slope(outputs)), errors_of(states, predicted)))[1:]
        return _times(1 / options.beta, grads), report

    def repeat(self, iterate: Callable[..., Any], carry: Any, done: int) -> tuple[Any, dict[str, Any]]:
        options = self.options
        return repeat(
            iterate, carry, done=done, iterations=options.steps, least=self.depth, tolerance=options.tolerance,
            axis_name=options.axis_name,
        )  # fmt: skip

    def of_sum(self, x: jax.Array, power: int = 1) -> jax.Array:
        """From the gradient of a mean over the batch to that of the sum; with the power -1, back."""
        return widened(jnp.multiply if power == 1 else jnp.divide, x, self.batch)


def _times(factor: float, tree: Pytree) -> Pytree:
    """A tree times a number; cotangents of integers stay."""
    if factor == 1:
        return tree
    return jax.tree.map(lambda x: factor * x if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree)


def _transformed(cut: _Cut) -> Callable[..., Any]:
    """The network as one function whose backward pass settles the errors."""

    @jax.custom_vjp
    def run(*args: Any) -> tuple[Any, Any]:
        params, inputs, consts, handlers = args
        return evaluate(cut.plan, params, {}, inputs, consts, handlers, Frame())

    def forward(*args: Any) -> tuple[Any, Any]:
        (outputs, _), pull, aux = cut.vjp(True, args, cut.zeros, wrt=len(args))
        return (outputs, aux), pull

    def backward(pull: Any, cotangent: Any) -> tuple[Any, ...]:
        grads: tuple[Any, ...] = cut.settled(pull, cotangent[0])[0]
        return grads

    run.defvjp(forward, backward)
    return run
