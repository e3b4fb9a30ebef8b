"""Making a plan: what a rule does at each place of a traced network, and refusals of what it cannot serve."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lrules.engine.direct_feedback import add_direct_feedback, bare
from lrules.engine.graph import Graph
from lrules.engine.plan import Plan, Refused
from lrules.engine.records import Layer
from lrules.engine.weights import (
    SequentialFeedback,
    sequential_feedback_of,
)
from lrules.network import Network
from lrules.rule import Backprop, Direct, LayerRule, Sequential
from lrules.typing import Pytree


class Elsewhere:
    """The entry of a layer in the plan of a rule that does nothing there; it is not backprop, so refusals count."""


def plan_elsewhere(net: Network, graph: Graph, params: Pytree, inputs: Pytree) -> Plan:
    """The plan of a rule that acts elsewhere than at layers; it refuses what no rule but backprop can serve."""
    return make_plan(net, graph, params, inputs, lambda name: Elsewhere(), partition=False)  # type: ignore[arg-type,return-value]


def make_plan(
    net: Network,
    graph: Graph,
    params: Pytree,
    inputs: Pytree,
    choose: Callable[[str], LayerRule],
    *,
    partition: bool = True,
) -> Plan:
    """Decides what a rule does at each place, and refuses what it cannot serve.

    Args:
      net, graph, params, inputs: the network, and its trace on these parameters and inputs.
      choose: a function from the name of a layer to its rule.
      partition: whether a partition can give single layers another rule.

    Returns:
      The plan.

    Raises:
      ValueError: the network has no layer, or the rules of one hidden signal disagree.
      Refused: the rule cannot serve some parameters; a NotImplementedError that names all of them.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> from lrules import extend
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> net, x = lrules.Network(net), jnp.ones((5, 3))
      >>> choose = lambda name: extend.Direct(None) if name == "b" else extend.Backprop()
      >>> plan = extend.make_plan(net, net.graph(params, x), params, x, choose)
      >>> list(plan.direct_feedback)
      ['b']
    """
    specs = {layer.site: choose(layer.name) for layer in graph.layers}
    refused = [r for r in graph.refusals if any(not isinstance(choose(graph.names[i]), Backprop) for i in r.parameters)]
    found = [([graph.names[i] for i in sorted(refusal.parameters)], refusal.sentence) for refusal in refused]
    stuck = {graph.names[i] for refusal in refused if not refusal.differentiable for i in refusal.parameters}
    for layer in graph.layers:
        found += [([layer.name], sentence) for sentence in _not_served(layer, specs[layer.site], partition)]
    if found:
        raise Refused(found, [name for names, _ in found for name in names if partition and name not in stuck])
    if not graph.layers and not graph.refusals:
        raise ValueError(
            "no layer found: the network never multiplies a value that depends on its inputs by a parameter "
            "(dot_general or conv_general_dilated); check that the parameters and inputs are arguments of the function "
            "and not closed over"
        )
    entries: dict[str, SequentialFeedback] = {}
    for layer in graph.layers:
        spec = specs[layer.site]
        if isinstance(spec, Sequential):
            if spec.init is not None and layer.reads is not None:
                for entry in sequential_feedback_of(graph, layer, spec):
                    name = graph.names[entry.index]
                    if entries.setdefault(name, entry).spec is not spec:
                        raise ValueError(
                            f"the parameter {name!r} is used by layers under two rules with feedback, and each rule "
                            f"would draw its own feedback: give the layer {layer.name!r} the rule of the other layer"
                        )
    plan = Plan(graph, specs, entries, {})
    add_direct_feedback(plan, net, params, inputs)
    _check_numbers(plan)
    return plan


def _check_numbers(plan: Plan) -> None:
    """Checks that every layer or hidden signal has its numbers, and that every pattern is used."""
    for spec in {spec: None for spec in plan.specs.values() if isinstance(spec, Sequential | Direct) and spec.numbers}:
        if isinstance(spec, Direct):
            names = [name for name, landing in plan.direct_feedback.items() if landing.spec is spec]
        else:
            names = [layer.name for layer in plan.graph.layers if plan.specs[layer.site] is spec]
        for number in spec.numbers.values():
            number.check(names)
            for name in names:
                number.of(name)


def _not_served(layer: Layer, spec: LayerRule, partition: bool) -> Iterator[str]:
    """What stands in the way of one layer's rule."""
    if isinstance(spec, Direct) and spec.lands and {"cond", "shard_map"} & set(bare(layer.scope)):
        construct = next(c for c in bare(layer.scope) if c in ("cond", "shard_map"))
        yield (
            f"the layer {layer.name!r} lies inside a {construct}, where direct feedback cannot land: use a sequential "
            f"rule{' for it' if partition else ''}, or move the layer out of the {construct}"
        )
    if isinstance(spec, Sequential) and {"state", "targets"} & spec.asks_for and "shard_map" in bare(layer.scope):
        what = "state" if "state" in spec.asks_for else "targets"
        yield (
            f"the layer {layer.name!r} lies inside a shard_map of the network, where its rule cannot be given the "
            f"{what} of the whole batch: take the layer out of the shard_map, or use a rule that asks for none"
        )
    if not (isinstance(spec, Sequential) and spec.whole_batch):
        return
    if "shard_map unchecked" in layer.scope:
        yield (
            f"the layer {layer.name!r} lies inside a shard_map with check_vma=False, where the rule cannot find the "
            "devices over which the batch is spread: set check_vma=True, or use another rule for it"
        )
    if layer.owned:
        yield (
            f"the parameter {layer.name!r} is itself split over the mesh axes {sorted(layer.owned)} inside a "
            "shard_map, so the norms of its neurons would need a sum over devices: use another rule for it"
        )
    if layer.weight.chosen and layer.weight.batched:
        yield (
            f"the weight of the layer {layer.name!r} is chosen for each example, so its neurons have no gradient of "
            "the whole batch: multiply by every choice and select among the products, or use another rule for it"
        )
