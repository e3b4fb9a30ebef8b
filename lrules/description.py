"""What a rule does to a network, as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from lrules.engine.batch import batch_axis, doubled
from lrules.engine.graph import Graph
from lrules.engine.operations import of
from lrules.engine.plan import Plan, Refused
from lrules.engine.records import Hidden, Layer, Value
from lrules.network import Network, NetworkLike, as_network
from lrules.rule import Backprop, Direct, Rule, Sequential, require_description, require_rule
from lrules.typing import Pytree


class Description(NamedTuple):
    """What a rule does to a network; `print` shows it as a table.

    Attributes:
      layers: one dict per layer: its name, its operation, the shape of its weight, what the rule does there, the hidden
        signal that the layer reads, and the feedback that reaches the layer.
      hidden: one dict per hidden signal: its name, its shape without the batch (with the batch if its axis cannot be
        found), the shape of its feedback, and the bytes of its feedback.
      activations: the names of the activations in the network.
      feedback_bytes: the bytes of all feedback weights.
      error_at: where direct rules take the output error; empty if they take it at the outputs.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> found = lrules.describe(net, lrules.direct_feedback_alignment(), params, jnp.ones((5, 3)))
      >>> found.activations, found.feedback_bytes
      (['tanh'], 32)
    """

    layers: list[dict[str, Any]]
    hidden: list[dict[str, Any]]
    activations: list[str]
    feedback_bytes: int
    error_at: str = ""

    def __str__(self) -> str:
        lines = table(self.layers, ("layer", "operation", "weight", "rule", "reads", "reached by"))
        if self.hidden:
            lines += ["", *table(self.hidden, ("hidden signal", "shape", "feedback", "bytes"))]
        lines += ["", f"activations: {', '.join(self.activations) or 'none'}"]
        lines += [f"feedback: {self.feedback_bytes:,} bytes"]
        lines += [f"output error: {self.error_at}"] if self.error_at else []
        return "\n".join(lines)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    cells = [list(columns)] + [[str(row[c]) for c in columns] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]


def describe(net: NetworkLike, rule: Rule, params: Pytree, inputs: Pytree) -> Description:
    """Describes what a rule does at each layer, and which feedback reaches each layer.

    It needs shapes only, and computes nothing.

    Args:
      net: the network.
      rule: the rule.
      params, inputs: what the network takes, arrays or `ShapeDtypeStruct`s.

    Returns:
      A `Description`: print it, or read its rows.

    Raises:
      ValueError, NotImplementedError: the errors of `rule.init`.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> print(lrules.describe(net, lrules.direct_feedback_alignment(), params, jnp.ones((5, 3))))
      layer  operation    weight  rule    reads   reached by
      a      dot_general  (3, 4)  direct  (data)  b
      b      dot_general  (4, 2)  direct  b       output
      <BLANKLINE>
      hidden signal  shape  feedback          bytes
      b              (4,)   2 outputs x (4,)  32
      <BLANKLINE>
      activations: tanh
      feedback: 32 bytes
    """
    net = as_network(net)
    graph = net.graph(params, inputs)
    known = rule.description
    plan = known.plan(net, graph, params, inputs) if known else None
    landings = plan.direct_feedback if plan else {}
    reached = feedback_reach(graph, {landing.hidden: landing.spec.lands for landing in landings.values()})
    layers = []
    for layer in graph.layers:
        spec = plan.specs[layer.site] if plan else None
        layers.append(
            {
                "layer": layer.site,
                "operation": layer.operation,
                "weight": tuple(layer.weight.aval.shape),
                "rule": _treatment(spec, layer, plan),
                "reads": layer.reads.name if layer.reads else "(data)",
                "reached by": ", ".join(reached[layer.site]) or "(nothing)",
            }
        )
    hidden = []
    for h, shape in zip(graph.hidden, _shapes(net, graph, params, inputs), strict=True):
        landing = landings.get(h.name)
        if h.mark and landing is None:
            continue
        has = landing is not None and landing.spec.init is not None
        hidden.append(
            {
                "hidden signal": h.name,
                "shape": shape,
                "feedback": landing.axes_named() if has and landing else "-",
                "bytes": landing.nbytes if has and landing else 0,
            }
        )
    total = 0
    if plan:
        for shape, dtype, _ in plan.feedback_shapes().values():
            total += math.prod(shape) * jnp.dtype(dtype).itemsize
    heads = plan.heads.values() if plan else ()
    error_at = "; ".join(f"at the outputs of the layer {h.layer!r}, below {h.function}" for h in heads)
    return Description(layers, hidden, [a.site for a in graph.activations], total, error_at)


def refusals(net: NetworkLike, rule: Rule, params: Pytree, inputs: Pytree) -> dict[str, str]:
    """Lists the parameters that a rule cannot serve, each with the reason and a remedy.

    It needs shapes only, and computes nothing.

    Args:
      net: the network.
      rule: the rule.
      params, inputs: what the network takes, arrays or `ShapeDtypeStruct`s.

    Returns:
      A dict with a sentence for each name of such a parameter; empty if the rule serves all parameters.

    Raises:
      ValueError: the rule does not say what it does at each layer (`rule.description` is None).

    Example:
      >>> import re, jax.numpy as jnp, lrules
      >>> net = lambda p, x: (jnp.tanh(x @ p["a"])[:, :, None] * p["b"]).sum(1) @ p["c"]  # multiplies by 'b' by hand
      >>> params, x = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 4)), "c": jnp.ones((4, 2))}, jnp.ones((5, 2))
      >>> rule = lrules.feedback_alignment()
      >>> refused = lrules.refusals(net, rule, params, x)
      >>> list(refused)
      ['b']
      >>> rule = lrules.partition({f"^{re.escape(name)}$": lrules.backprop() for name in refused} | {".*": rule})
      >>> lrules.refusals(net, rule, params, x)
      {}
    """
    net = as_network(net)
    require_rule(rule)
    try:
        require_description(rule, "refusals").plan(net, net.graph(params, inputs), params, inputs)
    except Refused as error:
        return error.refusals
    return {}


def _shapes(net: Network, graph: Graph, params: Pytree, inputs: Pytree) -> list[tuple[int, ...]]:
    """The shapes of the hidden signals, without the batch if its axis can be found."""
    shapes = [tuple(h.reader.aval.shape) for h in graph.hidden]
    try:
        batch, twice = net.batch_size(inputs), doubled(net, params, inputs, graph)
    except ValueError:  # there is no batch, or another batch size makes another network
        return shapes
    axes = [
        batch_axis(net, h.name, h.reader, twice(h.reader) if twice else None, batch) if h.reader.batched else None
        for h in graph.hidden
    ]
    return [axis.rest(shape) if axis else shape for axis, shape in zip(axes, shapes, strict=True)]


def _treatment(spec: Any, layer: Layer, plan: Plan | None) -> str:
    if isinstance(spec, Sequential):
        return "sequential" + (", feedback" if plan and set(layer.parameters) & set(plan.sequential_feedback) else "")
    if isinstance(spec, Direct):
        return "direct"
    return "backprop" if isinstance(spec, Backprop) else "own"


def feedback_reach(graph: Graph, stops: Mapping[Hidden, bool]) -> dict[str, list[str]]:
    """For each layer, where its error comes from: the output, or landings of direct feedback."""
    reach: dict[str, list[str]] = {layer.site: [] for layer in graph.layers}
    stop_of: dict[int, list[str]] = {}
    for hidden in stops:
        stop_of.setdefault(id(hidden.root), []).append(hidden.name)

    def spread(value: Value, source: str, seen: set[int], start: bool) -> None:
        stack = [(value, start)]
        while stack:
            value, first = stack.pop()
            if id(value) in seen or (id(value) in stop_of and not first):
                continue
            seen.add(id(value))
            if value.layer is not None and source not in reach[value.layer.site]:
                reach[value.layer.site].append(source)
            stops = value.producer is not None and of(value.producer).stops
            stack += [] if stops else [(v, False) for v in value.operands]

    for hidden in sorted((h for h, lands in stops.items() if lands), key=graph.hidden.index):
        spread(hidden.root, hidden.name, set(), True)
    for out in graph.outs[: graph.n_outputs]:
        spread(out, "output", set(), False)
    return reach
