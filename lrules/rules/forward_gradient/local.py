"""Forward gradients of local losses: the derivative of each local loss, for the layers right below it alone.

One pass in forward mode serves all blocks, because no derivative passes a hidden signal with a local loss. There the
signal h moves by h', and the local loss of h by dL_h . h'. With directions of activations, this number is one for each
example, and what arrives at the place is the number times the direction. With directions of weights, each parameter
takes the numbers of the hidden signals that it reaches first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lrules.engine.batch import Unbatched
from lrules.engine.operations import of
from lrules.extend import DirectFeedback, Graph
from lrules.network import Network, parameter_names
from lrules.rules.forward_gradient.activations import Along, Learning, effect_of, of_each_example
from lrules.rules.forward_gradient.directions import Directions, forward_mode, paired
from lrules.rules.forward_gradient.weights import mean_of
from lrules.rules.local_losses import LocalPlan, LocalRun
from lrules.typing import Loss, Pytree

OUTPUTS = "(outputs)"


class LocalStep:
    """One step on one batch."""

    def __init__(
        self, plan: LocalPlan, drawn: Directions, net: Network, loss: Loss, inputs: Pytree, targets: Pytree, rng: Any
    ) -> None:
        self.plan, self.drawn, self.net, self.keys = plan, drawn, net, drawn.keys(rng)
        self.run = LocalRun(plan, net, loss, inputs, targets)

    def signals(self, records: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: records[name] for name in self.plan.direct_feedback}

    def of(
        self, perturb: str, params: Pytree, learned: Mapping[str, jax.Array]
    ) -> tuple[tuple[Any, ...], Pytree, dict[str, jax.Array]]:
        """`(head, gradients, gradients of what the local losses learn)`."""
        measure = self.activations if perturb == "activations" else self.weights
        head, grads, own = measure(params, learned)
        return (head if self.net.has_aux else head[:2]), grads, own

    def errors(
        self, signals: dict[str, jax.Array], learned: Mapping[str, jax.Array], ends: Pytree, params: Pytree
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The gradients of the local losses at their hidden signals, and of what they learn."""
        losses = lambda signals, learned: self.run.losses(signals, learned, ends, params)  # noqa: E731
        return jax.grad(losses, (0, 1))(signals, learned)

    def activations(self, params: Pytree, learned: Mapping[str, jax.Array]) -> tuple[Any, Pytree, Any]:
        run, plan, still = self.run, self.plan, jax.lax.stop_gradient(params)

        def along(key: jax.Array) -> tuple[Any, Any]:
            def signals(number: jax.Array) -> tuple[dict[str, jax.Array], Any]:
                ends, _, records = run.forward(still, [Along(plan, self.drawn, key, number, cut=True)])
                return self.signals(records), (ends, self.signals(records))

            return forward_mode(plan.graph, signals, jnp.zeros(()), jnp.ones(()))

        rates, (ends, signals) = self.drawn.each(along, self.keys, (0, None))
        errors, own = self.errors(signals, learned, ends, still)
        gains = {name: self.gain(place, errors[name], rates[name]) for name, place in plan.direct_feedback.items()}

        def objective(params: Pytree) -> tuple[jax.Array, Any]:
            ends, aux, records = run.forward(params, [Learning(plan, self.drawn, self.keys)])
            outputs, value = run.judged(ends, params)
            total = value.astype(run.wide)
            for name, gain in gains.items():
                effect = records[effect_of(name)].astype(run.wide)
                total += jnp.sum(gain.astype(run.wide) * effect)
            return total, (value, outputs, aux)

        grads, head = jax.grad(objective, has_aux=True)(params)
        return head, grads, own

    def gain(self, place: DirectFeedback, error: jax.Array, rates: jax.Array) -> jax.Array:
        """The derivatives of one local loss, `[*loops, directions, batch]`, as the effects are."""
        batch = self.plan.batch or 1
        numbers = jax.vmap(lambda rate: of_each_example(place, paired(error, rate), batch))(rates)
        numbers = numbers / batch if isinstance(place.axis, Unbatched) else numbers  # it would count for each example
        return jnp.moveaxis(numbers, 0, -2) / self.drawn.count

    def weights(self, params: Pytree, learned: Mapping[str, jax.Array]) -> tuple[Any, Pytree, Any]:
        run, plan = self.run, self.plan
        leaves, tree = jax.tree.flatten(params)
        named = dict(zip(parameter_names((params, None)), leaves, strict=True))

        def along(key: jax.Array) -> tuple[Any, Any]:
            def signals(named: dict[str, jax.Array]) -> tuple[Any, Any]:
                moved = jax.tree.unflatten(tree, [named[name] for name in named])
                ends, aux, records = run.forward(moved, ())
                outputs, value = run.judged(ends, moved)
                found = self.signals(records)
                return (found, value), (ends, found, (value, outputs, aux))

            return forward_mode(plan.graph, signals, named, self.drawn.of(key, named))

        (rates, last), (ends, signals, head) = self.drawn.each(along, self.keys, (0, None))
        errors, own = self.errors(signals, learned, ends, params)
        numbers = {OUTPUTS: last.astype(run.wide)}
        for name in plan.direct_feedback:
            products = jax.vmap(lambda rate, error=errors[name]: paired(error, rate))(rates[name])
            numbers[name] = products.reshape(self.drawn.count, -1).sum(1).astype(run.wide)
        reached = first_reached(plan)
        none = jnp.zeros_like(numbers[OUTPUTS])
        along_each = {name: sum((numbers[n] for n in reached[name]), none) for name in named}
        grads = mean_of(self.drawn, self.keys, along_each, named)
        return head, jax.tree.unflatten(tree, [grads[name] for name in named]), own


def first_reached(plan: LocalPlan) -> dict[str, list[str]]:
    """For each parameter, the hidden signals with a local loss, and the outputs, that it reaches past no other."""
    graph: Graph = plan.graph
    stops = {id(place.hidden.root) for place in plan.direct_feedback.values()}
    numbers = {id(value): graph.names[i] for i, value in enumerate(graph.parameters)}
    reached: dict[str, list[str]] = {name: [] for name in graph.names}
    starts = {name: [place.hidden.root] for name, place in plan.direct_feedback.items()}
    for name, roots in (starts | {OUTPUTS: graph.outs[: graph.n_outputs]}).items():
        seen: set[int] = set()
        stack = [(root, name != OUTPUTS) for root in roots]
        while stack:
            value, first = stack.pop()
            if id(value) in seen or (id(value) in stops and not first):
                continue
            seen.add(id(value))
            if id(value) in numbers:
                reached[numbers[id(value)]].append(name)
            if value.producer is None or not of(value.producer).stops:
                stack += [(operand, False) for operand in value.operands]
    return reached
