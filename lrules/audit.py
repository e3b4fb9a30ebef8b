"""Audit: by which route each parameter learns, and a second proof that no parameter learns by backpropagation unseen.

The analysis finds the layers of a network, and rules act there. The audit checks the result without the analysis. It
takes the program that computes the gradients under feedback alignment, forward and backward together, and follows the
error through it. Some numbers may multiply the error on its way: recorded forward values, feedback weights, and scales
that the analysis knows. If a number depends on parameters alone, it is a weight that the analysis has missed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lrules.description import feedback_reach, table
from lrules.engine.jaxprs import COND, SCAN, WHILE, Atom, Aval, Equation, Jaxpr, is_literal, open_jaxpr, scan_counts
from lrules.engine.operations import of
from lrules.engine.records import reach
from lrules.extend import (
    Backprop,
    Direct,
    Frame,
    Graph,
    Handler,
    Hidden,
    Layer,
    Operation,
    Plan,
    Sequential,
    as_network,
    check_params,
    evaluate,
    make_plan,
    require_description,
)
from lrules.network import Network, NetworkLike
from lrules.options import as_initializer
from lrules.rule import Rule, require_rule
from lrules.typing import Pytree

RECORDED = "lrules recorded"


class Audit(NamedTuple):
    """By which route each parameter learns; `print` shows it as a table.

    Attributes:
      rows: one dict per parameter: its name, its route, the layers whose weight it makes, and what reaches these
        layers.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> found = lrules.audit(net, lrules.backprop(), params, jnp.ones((5, 3)))
      >>> [row["route"] for row in found.rows]
      ['backprop', 'backprop']
    """

    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        return "\n".join(table(self.rows, ("parameter", "route", "layers", "reached by")))


def audit(net: NetworkLike, rule: Rule, params: Pytree, inputs: Pytree) -> Audit:
    """Lists by which route each parameter learns under a rule, and checks it a second time.

    The routes are:

    - `"layer, feedback"` and `"layer"`: the rule forms the gradient of the layer, with feedback weights or without.
    - `"layer, direct"`: the output error comes straight to the hidden signal that the layer reads.
    - `"last layer"` and the like: the error of the layer crosses no hidden signal.
    - `"bias or scale"`: it learns from the signal that arrives at the operation where it meets the data.
    - `"latents"`: learned inputs of a network without a batch.
    - `"backprop"`: the rule is backprop there.
    - `"frozen"`: it is not trained. `"not reached"`: it has no path to the outputs.

    The proof finds weights that multiply the error on its way down. If a parameter meets data elementwise anywhere, the
    proof takes it for a bias or a scale. If a value is added to recorded values, the proof takes it for a part of them.

    Args:
      net: the network.
      rule: the rule.
      params, inputs: what the network takes, arrays or `ShapeDtypeStruct`s.

    Returns:
      An `Audit`: print it, or read its rows.

    Raises:
      NotImplementedError, ValueError: the errors of `rule.init`.
      RuntimeError: the program that computes the gradients multiplies the error by a parameter, and the analysis does
        not know this parameter as the weight of a layer, a bias or a scale.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> params = {"a": jnp.ones((3, 4)), "bias": jnp.ones(4), "b": jnp.ones((4, 2))}
      >>> net = lambda p, x: jnp.tanh(x @ p["a"] + p["bias"]) @ p["b"]
      >>> print(lrules.audit(net, lrules.feedback_alignment(), params, jnp.ones((5, 3))))
      parameter  route                 layers  reached by
      a          layer                 a       b
      b          last layer, feedback  b       output
      bias       bias or scale         -       -
    """
    require_rule(rule)
    check_params(params)
    net = as_network(net)
    graph = net.graph(params, inputs)
    description = require_description(rule, "audit")
    plan = description.plan(net, graph, params, inputs)
    untouched = isinstance(description.layer, Backprop)
    trained = len(jax.tree.leaves(params))
    found = reach(graph.outs[: graph.n_outputs])
    live = {i for i, value in enumerate(graph.parameters) if id(value) in found}
    reached = _reached_by(graph)
    rows = []
    for i, name in enumerate(graph.names):
        layers = [layer for layer in graph.layers if i in layer.sources]
        latents = any(i in layer.operand.params for layer in graph.layers if layer.operand.pure)
        route = "backprop" if untouched else _route(plan, layers, latents, reached)
        rows.append(
            {
                "parameter": name,
                "route": "frozen" if i >= trained else route if i in live else "not reached",
                "layers": ", ".join(layer.site for layer in layers) or "-",
                "reached by": ", ".join(dict.fromkeys(s for layer in layers for s in reached[layer.site])) or "-",
            }
        )
    if not untouched:
        _prove(net, graph, plan, params, inputs, live)
    return Audit(rows)


def _reached_by(graph: Graph) -> dict[str, list[str]]:
    """For each layer, the hidden signals whose error reaches it first, and the outputs."""
    return feedback_reach(graph, dict.fromkeys((h for h in graph.hidden if not h.mark), True))


def _route(plan: Plan, layers: Sequence[Layer], latents: bool, reached: Mapping[str, list[str]]) -> str:
    if not layers:
        return "latents" if latents else "bias or scale"
    routes = []
    for layer in layers:
        spec, last = plan.specs[layer.site], "last " if reached[layer.site] == ["output"] else ""
        if isinstance(spec, Backprop):
            routes.append("backprop")
        elif isinstance(spec, Direct):
            routes.append(f"{last}layer, direct" if layer.reads is not None else f"{last}layer")
        else:
            fed = ", feedback" if set(layer.parameters) & set(plan.sequential_feedback) else ""
            routes.append(f"{last}layer{fed}")
    return "; ".join(dict.fromkeys(routes))


# --------------------------------------------------------------------------------------------------------- the proof


class _Recorded(Handler):
    """Marks the inputs and outputs of layers as recorded forward values."""

    def layer(self, layer: Layer, op: Operation, w: jax.Array, b: Any, x: jax.Array, frame: Frame) -> Any:
        return checkpoint_name(op(w, x), RECORDED)

    def hidden(self, hidden: Hidden, value: Any, frame: Frame) -> Any:
        return value if hidden.mark else checkpoint_name(value, RECORDED)


def _prove(net: Network, graph: Graph, plan: Plan, params: Pytree, inputs: Pytree, live: set[int]) -> None:
    """Follows the error through the program that computes the gradients."""
    plain = {layer.name for layer in graph.layers if isinstance(plan.specs[layer.site], Backprop)}
    refused = {graph.names[i] for refusal in graph.refusals for i in refusal.parameters}
    probe = Sequential(_through_feedback, as_initializer(None))
    choose = lambda name: Backprop() if name in plain | refused else probe  # noqa: E731
    made = make_plan(net, graph, params, inputs, choose)

    def program(leaves: list[Any], weights: Any, values: Sequence[Any], errors: Any) -> Any:
        def outputs(leaves: list[Any]) -> list[Any]:
            out, _ = evaluate(made, leaves, weights, values, graph.consts, (_Recorded(),), Frame())
            return [y for y in jax.tree.leaves(out) if jnp.issubdtype(y.dtype, jnp.inexact)]

        return jax.vjp(outputs, leaves)[1](errors)[0]

    leaves = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in graph.param_avals]
    weights = {name: leaves[entry.index] for name, entry in made.sequential_feedback.items()}
    values = jax.tree.leaves(inputs)
    outs = [graph.outs[i].aval for i in range(graph.n_outputs)]
    errors = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in outs if jnp.issubdtype(a.dtype, jnp.inexact)]
    closed = jax.make_jaxpr(program)(leaves, weights, values, errors)
    ins = [_Trace(params=frozenset([i])) for i in range(len(leaves))]
    ins += [_Trace(known=True)] * len(weights)
    ins += [_Trace(known=v.data) for v in graph.arguments]
    ins += [_Trace(error=True)] * len(errors)
    gradients = _follow(closed.jaxpr, ins)

    scales = frozenset().union(*(affine.value.params for affine in graph.affines))
    exempt = scales | {i for i, name in enumerate(graph.names) if name in plain | refused}
    exempt |= frozenset().union(*(layer.sources for layer in graph.layers if layer.name in plain))
    for i, gradient in enumerate(gradients):
        own = frozenset().union(*(layer.sources for layer in graph.layers if i in layer.sources), {i})
        if missed := gradient.via - exempt - own:
            named = ", ".join(repr(graph.names[j]) for j in sorted(missed))
            raise RuntimeError(
                f"the program multiplies the error of the parameter {graph.names[i]!r} by the value of {named}, and "
                "the analysis has not found a layer there: please report the network; until then give these "
                "parameters backprop() in a partition"
            )
        if gradient.error and i not in live:
            raise RuntimeError(
                f"error reaches the parameter {graph.names[i]!r}, but the analysis has found no path from it to the "
                "outputs: please report the network"
            )


def _through_feedback(
    op: Operation, w: jax.Array, b: Any, x: jax.Array, d: jax.Array, layer: Layer
) -> tuple[Any, Any, None]:
    (dw,) = jax.vjp(lambda w: op(w, x), w)[1](d)
    (dx,) = jax.vjp(lambda x: op(b, x), x)[1](d)
    return dw, dx, None


@dataclasses.dataclass(frozen=True)
class _Trace:
    """What a value of the program depends on.

    Attributes:
      params: the parameters on which it depends differentiably.
      known: whether it also depends on feedback, on outputs of layers, or differentiably on data.
      error: whether it is error, on its way.
      via: the parameters by which the error has been multiplied, if the factor depended on nothing else.
    """

    params: frozenset[int] = frozenset()
    known: bool = False
    error: bool = False
    via: frozenset[int] = frozenset()


def _union(traces: Iterable[_Trace]) -> _Trace:
    traces = list(traces)
    return _Trace(
        frozenset().union(*(t.params for t in traces)),
        any(t.known for t in traces),
        any(t.error for t in traces),
        frozenset().union(*(t.via for t in traces)),
    )


def _follow(jaxpr: Jaxpr, ins: Sequence[_Trace]) -> list[_Trace]:
    """What the results of a jaxpr depend on."""
    jaxpr, _ = open_jaxpr(jaxpr)
    env = dict.fromkeys(jaxpr.constvars, _Trace()) | dict(zip(jaxpr.invars, ins, strict=True))

    def read(atom: Atom) -> _Trace:
        return _Trace() if is_literal(atom) else env[atom]

    for eqn in jaxpr.eqns:
        outs = _equation(eqn, [read(v) for v in eqn.invars])
        env |= dict(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _equation(eqn: Equation, ins: list[_Trace]) -> list[_Trace]:
    name, params = of(eqn).name, eqn.params
    if name == SCAN:
        return _loop(params["jaxpr"], ins, *scan_counts(params))
    if name == WHILE:
        n, m = params["cond_nconsts"], params["body_nconsts"]
        return _loop(params["body_jaxpr"], ins[n:], m, len(ins) - n - m)
    if name == COND:
        outs = [_follow(branch, ins[1:]) for branch in params["branches"]]
        return [_union(out) for out in zip(*outs, strict=True)]
    inner = next((params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params), None)
    if inner is not None and len(open_jaxpr(inner)[0].invars) == len(ins):
        return _follow(inner, ins)
    return [_result(eqn, ins, out.aval) for out in eqn.outvars]


def _result(eqn: Equation, ins: list[_Trace], aval: Aval) -> _Trace:
    dtype = getattr(aval, "dtype", jnp.bool_)
    if not jnp.issubdtype(dtype, jnp.inexact):  # integers and booleans select, they do not multiply
        return _Trace(known=jnp.issubdtype(dtype, jnp.integer) and any(t.known for t in ins))
    real = [jnp.issubdtype(getattr(v.aval, "dtype", jnp.bool_), jnp.inexact) for v in eqn.invars]
    met = _union(t for t, r in zip(ins, real, strict=True) if r or of(eqn).casts)
    if met.error:
        factors = [t.params for t in ins if not t.error and not t.known]
        return _Trace(error=True, via=met.via.union(*factors))
    recorded = of(eqn).marks and eqn.params["name"] == RECORDED
    return dataclasses.replace(met, known=met.known or recorded)


def _loop(body: Any, ins: list[_Trace], n_consts: int, n_carry: int) -> list[_Trace]:
    carry = ins[n_consts : n_consts + n_carry]
    while True:
        outs = _follow(body, [*ins[:n_consts], *carry, *ins[n_consts + n_carry :]])
        merged = [_union(pair) for pair in zip(carry, outs[:n_carry], strict=True)]
        if merged == carry:
            return outs
        carry = merged
