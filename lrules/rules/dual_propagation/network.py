"""One network with its states: a list of them, and one run of the network up and down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from lrules.engine.planning import plan_elsewhere
from lrules.extend import (
    Direct,
    Frame,
    Graph,
    Handler,
    Plan,
    all_zeros_at,
    evaluate,
    require_description,
    treated,
)
from lrules.network import Network
from lrules.rule import Feedback
from lrules.rules.dual_propagation.damping import check_projection, readers, strengths
from lrules.rules.dual_propagation.differences import check_differences
from lrules.rules.dual_propagation.levels import levels_of
from lrules.rules.dual_propagation.options import Options
from lrules.rules.dual_propagation.states import Dyads, State, units_of, with_damping
from lrules.typing import AxisName, Pytree


def plan_for(options: Options, net: Network, graph: Graph, params: Pytree, inputs: Pytree) -> Plan:
    """What happens at the layers of a network: the plan of the feedback rule, if there is one.

    Raises:
      NotImplementedError: an activation cannot have two states.
      ValueError: the feedback rule is a direct one.
    """
    made: Plan = graph.once_for(options, lambda: _plan(options, net, graph, params, inputs))
    return made


def _plan(options: Options, net: Network, graph: Graph, params: Pytree, inputs: Pytree) -> Plan:
    activations = treated(graph, options.passing)
    inside = {a.site: s.split(" ")[0] for a in activations for s in a.scope if s != "scan"}
    if inside:
        listed, place = ", ".join(map(repr, inside)), next(iter(inside.values()))
        what, lie, them = ("activation", "lies", "it") if len(inside) == 1 else ("activations", "lie", "them")
        raise NotImplementedError(
            f"the {what} {listed} {lie} inside a {place}, where two states cannot be kept: move {them} out of the "
            f"{place}, or give passing={{{listed}}}, so that the error passes through {them} by the derivative"
        )
    check_differences(graph, activations)
    own = plan_elsewhere(net, graph, params, inputs)
    if options.feedback_rule is None:
        return own
    description = require_description(options.feedback_rule, "dual_propagation", "its feedback_rule")
    plan = description.plan(net, graph, params, inputs)
    if any(isinstance(spec, Direct) for spec in plan.specs.values()):
        raise ValueError(
            "feedback_rule must be a sequential rule, got a direct rule, which sends the output error past the states: "
            "give lrules.feedback_alignment() or the like"
        )
    for spec in plan.asking:
        what = f"asks for {min(spec.asks_for)!r} by name" if spec.asks_for else "has a traced number"
        raise ValueError(
            f"feedback_rule must be a rule that takes (op, w, b, x, d, layer) and known numbers, got one that {what}: "
            "give lrules.feedback_alignment() or the like"
        )
    return plan


class DualNetwork:
    """A network with two values at each activation.

    The error comes from a sum over the examples, or from a mean (`reduction`) over those of all devices along
    `mean_axes`.

    Attributes:
      nudged: the inputs that are states, by their place among the leaves of the inputs.
      clean: zeros of the shape of each state.
      ranks: the rank of each state without the axes of loops; not of inputs, which lie in none.
      units: the numbers of each state.
      readers: the layers that read each state, if there is damping.
      levels, depth: the levels of the states and of the outputs, if the order needs them.
    """

    def __init__(
        self, options: Options, net: Network, params: Pytree, inputs: Pytree, reduction: str, mean_axes: AxisName
    ) -> None:
        self.options = options
        if any(handler.activations for handler in net.handlers):
            raise NotImplementedError(
                "dual_propagation uses differences of states instead of derivatives, so without_derivatives and "
                "replace_derivative cannot change it: leave them out"
            )
        self.graph = graph = net.graph(params, inputs)
        self.plan = plan_for(options, net, graph, params, inputs)
        batch = net.batch_size(inputs) if reduction == "mean" else 1
        if reduction == "mean" and mean_axes is not None:
            batch *= int(jax.lax.psum(1, mean_axes))
        self.nudged = _nudged_inputs(options, net, inputs)
        activations = treated(graph, options.passing)
        self.clean = all_zeros_at({a.site: a.output for a in activations})
        self.ranks = {a.site: a.output.aval.ndim for a in activations if a.output is not None}
        self.clean |= {name: jnp.zeros_like(jax.tree.leaves(inputs)[i]) for i, name in self.nudged.items()}
        names = [*self.clean, *(["outputs"] if options.output == "squared_error" else [])]
        self.units = units_of(options, names, list(self.nudged.values()), batch)
        if options.damping is not None and any(is_symbolic_dim(zeros.size) for zeros in self.clean.values()):
            raise NotImplementedError(
                "damping evaluates the activations, so the shapes must be numbers, not symbols: give the batch its "
                "size, or leave damping out"
            )
        self.readers = readers(graph, activations, list(self.nudged.values())) if options.damping is not None else {}
        self.levels: dict[str, np.ndarray] = {}
        self.depth = 1
        if options.order != "forward_backward":
            self.levels, self.depth = levels_of(graph, set(self.clean))
            self.levels |= {name: np.zeros((), int) for name in self.nudged.values()}
        if options.order == "forward" and options.iterations < self.depth:
            raise ValueError(
                f'dual_propagation(order="forward", iterations={options.iterations}): the error falls by one layer in '
                f"each iteration, and this network has {self.depth} layers, so the lowest layers would get no error: "
                f"give at least iterations={self.depth}"
            )

    def arguments(
        self, net: Network, params: Pytree, feedback: Feedback, inputs: Pytree, rng: Any
    ) -> tuple[tuple[list[Any], dict[str, jax.Array], list[Any], list[Any], tuple[Handler, ...]], jax.Array | None]:
        """`(args, keys)`: all that the network needs, as differentiable arguments, and a key per iteration."""
        self.plan.check(feedback)
        leaves = net.parameters(params)
        weights = {**feedback.fixed, **feedback.learned}
        keys = None
        if self.options.order == "random":
            rng, key = jax.random.split(rng)
            keys = jax.random.key_data(jax.random.split(key, self.options.iterations))
        if self.options.feedback_rule is not None and self.options.feedback_rule.stochastic:
            weights |= self.plan.init(rng, leaves, redrawn=True).fixed
        return (leaves, weights, jax.tree.leaves(inputs), self.graph.consts, net.handlers), keys

    def damping(self, args: Any) -> dict[str, Any]:
        """L of every state that a layer reads; empty without damping."""
        if self.options.damping is None:
            return {}
        params, _, inputs, consts, _ = args
        return strengths(self.options, self.graph, self.units, self.readers, params, inputs, consts)

    def run(self, mode: str, args: Any, state: State) -> tuple[Any, Any, dict[str, Any]]:
        """`(outputs, aux, records)` of one run in a mode of `Dyads`."""
        params, weights, inputs, consts, handlers = args
        damped = self.options.damping is not None and mode in ("clean", "record")
        own = Dyads(self.units, mode, check_projection if damped else None)
        frame = Frame(inputs=state)
        inputs = [
            own.state(self.nudged[i], lambda z: z, x, frame, first=True) if i in self.nudged else x
            for i, x in enumerate(inputs)
        ]
        outputs, aux = evaluate(self.plan, params, weights, inputs, consts, (own, *handlers), frame)
        return outputs, aux, frame.records

    def vjp(self, mode: str, args: Any, state: State, damping: Any) -> tuple[Any, Any, Any]:
        """`(outputs, pull, aux)`; `pull` is the function from the error of the outputs to the new states."""

        def run(state: Pytree) -> tuple[tuple[Any, dict[str, Any]], Any]:
            outputs, aux, zeros = self.run(mode, args, with_damping(state, damping))
            return (outputs, {site: zeros[site] for site in state}), aux

        (outputs, zeros), pull, aux = jax.vjp(run, state, has_aux=True)
        return outputs, jax.tree_util.Partial(_pull, pull, zeros), aux


def _pull(pull: Callable[..., Any], zeros: Any, error: Pytree) -> State:
    return pull((error, zeros))[0]


def _nudged_inputs(options: Options, net: Network, inputs: Pytree) -> dict[int, str]:
    """The names of the inputs that are states: batches of floating-point numbers."""
    if options.input_nudge is None:
        return {}
    places = [
        i
        for i, (x, axis) in enumerate(zip(jax.tree.leaves(inputs), net.input_batch_axes(inputs), strict=True))
        if axis is not None and jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    ]
    if not places:
        raise ValueError(
            f"dual_propagation(input_nudge={options.input_nudge:g}) nudges inputs that are batches of floating-point "
            "numbers, and this network has none: leave input_nudge out"
        )
    return {i: f"inputs#{k}" if k > 1 else "inputs" for k, i in enumerate(places, 1)}
