"""Both forward passes of node perturbation, and the gradients of the feedback weights that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lrules.extend import (
    BatchAxis,
    Frame,
    Graph,
    Hidden,
    Plan,
    all_zeros_at,
    batch_axis,
    correlate,
    direct_feedback_gradient,
    doubled,
    evaluate,
    from_heads,
    mean_loss,
    output_error,
    project,
    run,
    run_to_heads,
    sent_error,
)
from lrules.network import Network
from lrules.options import ByName
from lrules.rule import Feedback
from lrules.rules.node_perturbation.handlers import ArrivingAtHidden, ArrivingAtLayers, Noise, StandIn
from lrules.rules.node_perturbation.least_squares import covariance
from lrules.typing import Pytree


class Experiment:
    """Both forward passes, and the gradients of the feedback weights that follow from them."""

    def __init__(
        self,
        net: Network,
        graph: Graph,
        plan: Plan,
        loss: Callable[..., Any],
        std: ByName[float],
        noise: Callable[..., Any],
    ) -> None:
        self.net, self.graph, self.plan, self.loss, self.noise = net, graph, plan, loss, noise
        self.hidden = [h for h in graph.hidden if not h.mark and jnp.issubdtype(h.root.aval.dtype, jnp.inexact)]
        std.check(h.name for h in self.hidden)
        self.std = {h.name: std.of(h.name) for h in self.hidden}
        for place, what in [
            *((h.root.place[0].scope, f"hidden signal {h.name!r}") for h in self.hidden),  # type: ignore[index]
            *((layer.scope, f"layer {layer.name!r}") for layer in graph.layers if layer.reads is not None),
        ]:
            inside = [s.split(" ")[0] for s in place if s != "scan"]
            if inside:
                raise NotImplementedError(
                    f"the {what} lies inside a {inside[0]}, where node_perturbation cannot follow its noise: move it "
                    f"out of the {inside[0]}, or use another rule"
                )

    def objective(self, outputs: Pytree, inputs: Pytree, targets: Pytree) -> jax.Array:
        return mean_loss(self.net, self.loss, outputs, inputs, targets)

    def estimates(
        self, params: Pytree, inputs: Pytree, targets: Pytree, outputs: Pytree, rng: Any
    ) -> dict[str, jax.Array]:
        """lambda at the definition of each hidden signal; the axes of the scans around it come first."""
        net, graph = self.net, self.graph
        batch = net.batch_size(inputs)
        twice = doubled(net, params, inputs, graph)
        noisy, _, drawn = run(net, params, inputs, [Noise(self.std, self.noise, rng)])
        losses = [self.loss(o, targets) for o in (noisy, outputs)]
        difference = jnp.mean((losses[0] - losses[1]).reshape(batch, -1), axis=1)
        found = {}
        for h in self.hidden:
            other = twice(h.root) if twice else None
            axis = batch_axis(net, h.name, h.root, other, batch)
            if axis is None:
                raise NotImplementedError(
                    f"the batch axis of the hidden signal {h.name!r} of shape {h.root.aval.shape} cannot be found "
                    f"(batch {batch}), and node_perturbation compares its noise with the loss of each example: write "
                    "the network so that the batch is a separate axis, in the order of the inputs, or use another rule"
                )
            found[h.name] = drawn[h.name] * _per_example(difference / self.std[h.name], axis, h)
        return found

    def sequential(
        self, params: Pytree, feedback: Feedback, inputs: Pytree, targets: Pytree, rng: jax.Array | None
    ) -> tuple[tuple[Any, ...], Any, Any, dict[str, Any]]:
        plan, graph = self.plan, self.graph
        weights = {**feedback.fixed, **feedback.learned}
        values, consts = jax.tree.leaves(inputs), graph.consts
        taught = {
            layer.site: layer
            for layer in graph.layers
            if layer.reads is not None and any(name in plan.sequential_feedback for name in layer.parameters)
        }
        outputs_of = {layer.at_output: layer.output for layer in taught.values()}
        probes = all_zeros_at({h.name: h.root for h in self.hidden} | outputs_of)

        def clean(params: Pytree, probes: Mapping[str, Any]) -> tuple[jax.Array, Any]:
            handlers = (ArrivingAtHidden(), *self.net.handlers, ArrivingAtLayers())
            leaves = self.net.parameters(params)
            outputs, aux = evaluate(plan, leaves, weights, values, consts, handlers, Frame(probes))
            return self.objective(outputs, inputs, targets), (outputs, aux)

        (value, (outputs, aux)), (grads, arriving) = jax.value_and_grad(clean, argnums=(0, 1), has_aux=True)(
            params, probes
        )
        lambdas = self.estimates(params, inputs, targets, outputs, rng)
        n = self.net.batch_size(inputs)
        residuals = {h.name: (n * arriving[h.name] - lambdas[h.name]).astype(h.root.aval.dtype) for h in self.hidden}

        def stand_in(weights: Any) -> dict[str, Any]:
            frame = Frame(residuals)
            evaluate(plan, self.net.parameters(params), weights, values, consts, (StandIn(set(taught)),), frame)
            return frame.records

        (db,) = jax.vjp(stand_in, weights)[1]({site: arriving[layer.at_output] for site, layer in taught.items()})
        head = (value, outputs, aux) if self.net.has_aux else (value, outputs)
        statistics = {}
        if not feedback.learned:
            for layer in taught.values():
                d = jnp.moveaxis(arriving[layer.at_output], next(iter(layer.output_axes.values())), -1)
                statistics[layer.name] = covariance(n * d)
        return head, grads, db, statistics

    def direct(
        self, params: Pytree, feedback: Feedback, inputs: Pytree, targets: Pytree, rng: jax.Array | None
    ) -> tuple[tuple[Any, ...], Any, dict[str, Any], dict[str, Any]]:
        plan, net = self.plan, self.net

        def of_outputs(ends: Any) -> tuple[jax.Array, Any]:
            outputs = from_heads(plan, net, ends, params, inputs)
            return self.objective(outputs, inputs, targets), outputs

        def clean(params: Pytree) -> tuple[jax.Array, Any]:
            ends, aux = run_to_heads(plan, net, params, feedback, inputs)
            value, outputs = of_outputs(ends)
            return value, (ends, outputs, aux)

        (value, (ends, outputs, aux)), grads = jax.value_and_grad(clean, has_aux=True)(params)
        errors, _ = jax.grad(of_outputs, allow_int=True, has_aux=True)(ends)
        lambdas = self.estimates(params, inputs, targets, outputs, rng)
        n = net.batch_size(inputs)
        weights = {**feedback.fixed, **feedback.learned}

        def learn(e: jax.Array, estimate: jax.Array, b: Any, given: Any) -> Any:
            return correlate(e, n * project(e, b) - estimate, b)

        db, statistics = {}, {}
        for name, landing in plan.direct_feedback.items():
            e = sent_error(plan, landing.spec, output_error(plan, errors), weights)
            db[name] = direct_feedback_gradient(landing, e, lambdas[name], weights[name], learn)
            statistics[name] = covariance(n * e)
        head = (value, outputs, aux) if net.has_aux else (value, outputs)
        return head, grads, db, statistics


def _per_example(numbers: jax.Array, axis: BatchAxis, hidden: Hidden) -> jax.Array:
    """One number per example, spread over a hidden signal at its definition."""
    shape = hidden.root.aval.shape
    rest = axis.rest(shape)
    spread = jnp.broadcast_to(numbers.reshape(-1, *[1] * len(rest)), (numbers.shape[0], *rest))
    spread = axis.restore(spread, shape).astype(hidden.root.aval.dtype)
    return spread.reshape((1,) * len(hidden.loops) + shape)
