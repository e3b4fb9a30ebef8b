"""Damping: for which networks, and how strong (Hoier and Zach 2024, appendix F, Eq. 45 to 50).

A state acts on the state above it, and that state acts back: together they multiply a change of the state by
(beta_k / beta_{k+1}) W^T W. If this has a norm above 1, the states diverge. Damping averages the new state with the old
state; L_k is the weight of the old state, and the new state has the weight 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lrules.diagnostics import spectral_norm
from lrules.engine.activations import sampled
from lrules.engine.jaxprs import Atom, Equation, is_literal
from lrules.engine.operations import of
from lrules.engine.records import Value
from lrules.extend import Activation, Frame, Graph, Handler, Layer, Operation
from lrules.rules.dual_propagation.options import Options
from lrules.rules.dual_propagation.states import Unit

POWER_ITERATIONS = 5


class Reader(NamedTuple):
    """A layer between two states of a chain, the value to which it leads, and the name of the state made from it."""

    layer: Layer
    target: Value
    above: str


def strengths(
    options: Options,
    graph: Graph,
    units: Mapping[str, Unit],
    reading: dict[str, list[Reader]],
    params: Sequence[Any],
    inputs: Sequence[Any],
    consts: Sequence[Any],
) -> dict[str, Any]:
    """L of every state that a layer reads."""
    if not isinstance(options.damping, str):
        return {site: jnp.asarray(options.damping, jnp.result_type(float)) for site in reading}
    found: dict[str, Any] = {}
    for site, above, norm in _norms(graph, set(units), params, inputs, consts, reading):
        beta = units[site].beta
        higher = units[above].beta if above in units else beta
        if options.output == "refreshed" and above == "outputs":  # losses of a curvature up to 1
            higher = min(higher, 1.0)
        found[site] = found.get(site, 0) + beta * units[site].gain / higher * norm
    if options.damping == "spectral":
        return found
    return {site: jnp.maximum(norm - 1, 0) / 2 for site, norm in found.items()}


def readers(graph: Graph, activations: Sequence[Activation], inputs: Sequence[str]) -> dict[str, list[Reader]]:
    """The layers that read each state, in a chain with one layer between two activations; `inputs` are states too.

    Raises:
      NotImplementedError: the network is not such a chain.
    """
    for activation in activations:
        if "scan" in activation.scope:
            raise NotImplementedError(
                f"the activation {activation.site!r} lies inside a loop, and damping cannot find the next state there: "
                "write the loop out, layer by layer, or leave damping out"
            )
    outputs = {id(a.output): a.site for a in activations}
    layers = {id(layer.output): layer for layer in graph.layers}

    def above(start: Any) -> tuple[set[str], list[Any]]:
        sites: set[str] = set()
        found: list[Any] = []
        seen, stack = set(), [start]
        while stack:
            value = stack.pop()
            if value is None or id(value) in seen:
                continue
            seen.add(id(value))
            if id(value) in outputs:
                sites.add(outputs[id(value)])
            elif id(value) in layers:
                found.append(layers[id(value)])
            else:
                stack += [*value.operands, *([value.source] if value.source is not None else [])]
        return sites, found

    reading: dict[str, list[Reader]] = {a.site: [] for a in activations}
    driven = [(a.source, a.site) for a in activations if a.source is not None]
    for target, name in [*driven, *((out, "outputs") for out in graph.outs[: graph.n_outputs])]:
        sites, found = above(target)
        below = [above(layer.operand) for layer in found]
        if sites or len(found) != 1 or len(below[0][0]) > 1 or below[0][1]:
            raise NotImplementedError(
                "damping serves chains with one layer between two activations, and this network has skip connections "
                "or layers without an activation between them: leave damping out"
            )
        for site in below[0][0] or inputs:
            reading.setdefault(site, []).append(Reader(found[0], target, name))
    return reading


def _norms(
    graph: Graph,
    sites: set[str],
    params: Sequence[Any],
    inputs: Sequence[Any],
    consts: Sequence[Any],
    reading: dict[str, list[Reader]],
) -> Iterator[tuple[str, str, Any]]:
    """|W^T W| between each state and those above it, by power iterations: `(state, state above, norm)`.

    It includes factors and pooling on the way; for pooling it may be a bound.

    Raises:
      NotImplementedError: another operation lies on the way.
    """
    frame = Frame()
    handler = _RecordNorms({reader.layer.site for readers in reading.values() for reader in readers})
    graph.run(params, inputs, consts=consts, handlers=(handler,), frame=frame)
    states = {id(activation.output) for activation in graph.activations if activation.site in sites}
    for site, readers in reading.items():
        for layer, target, above in readers:
            grown = _growth(target, states) * _growth(layer.operand, states)
            yield site, above, grown**2 * frame.records[layer.site]


class _RecordNorms(Handler):
    """Records |W^T W| of layers, by power iterations."""

    def __init__(self, sites: Any) -> None:
        self.sites = sites

    def layer(self, layer: Layer, op: Operation, w: jax.Array, b: Any, x: jax.Array, frame: Frame) -> Any:
        if layer.site in self.sites:
            frame.records[layer.site] = spectral_norm(layer, op.product, w, POWER_ITERATIONS) ** 2
        return op(w, x)


def _growth(value: Value, states: set[int]) -> float:
    """The factor by which a vector can grow on its way from the layer or state (by id) below to here."""
    grown = 1.0
    while value.layer is None and id(value) not in states and value.operands:
        eqn, moving = value.producer, [v for v in value.operands if v.data]
        known = _factor(eqn, moving[0], value) if len(moving) == 1 and eqn is not None else None
        if known is None:
            raise NotImplementedError(
                "damping by power iterations serves weights, biases, constant factors and pooling between two states, "
                f"and this network has {of(eqn).name if eqn else 'a loop'} there: give a number, such as damping=0.5"
            )
        grown, value = grown * known, moving[0]
    return grown


def _factor(eqn: Equation, operand: Value, out: Value) -> float | None:
    """The norm of one equation between states, or a bound on it; None where it is not known."""
    row, params, size = of(eqn), eqn.params, int(np.prod(operand.aval.shape))
    if row.combines in ("product", "quotient"):
        numbers = [_number(atom, v) for atom, v in zip(eqn.invars, out.operands, strict=True)]
        constants = [number for number in numbers if number is not None]
        if not constants or (row.combines == "quotient" and numbers[0] is not None):
            return None
        return abs(constants[0]) if row.combines == "product" else 1 / abs(constants[0])
    if row.kind == "view":  # which may repeat elements
        return float(np.sqrt(np.prod(out.aval.shape) / size))
    if row.kind == "reduction" and row.totals:
        return float(np.sqrt(size / np.prod(out.aval.shape)))
    if row.kind == "window" and (row.totals or row.combines == "extreme"):
        window, stride, dilation = (np.asarray(params[f"window_{k}"]) for k in ("dimensions", "strides", "dilation"))
        overlap = np.prod(np.where(dilation == 1, -(-window // stride), window))  # how many windows one element is in
        return float(np.sqrt(overlap * (np.prod(window) if row.totals else 1)))
    moves = row.curve == "linear" or row.same or (row.kind == "move" and row.carries)
    return 1.0 if moves or (row.kind == "reduction" and row.curve == "rows") else None


def _number(atom: Atom, value: Value) -> float | None:
    """A number in an equation, also where a shard_map has marked it as each device's own; None if it is none."""
    while not is_literal(atom) and value.producer is not None:
        row = of(value.producer)
        if not (row.same or (row.casts and jnp.issubdtype(value.aval.dtype, jnp.inexact))):
            break
        atom, value = value.producer.invars[0], value.operands[0]
    return float(atom.val) if is_literal(atom) and np.ndim(atom.val) == 0 else None


def check_projection(site: str, fn: Callable[..., Any], x: jax.Array) -> None:
    """Refuses an activation that damping cannot serve.

    Damping needs activations that clip to an interval, so that s = f(a) is the point of the interval nearest to a.

    Raises:
      NotImplementedError: this activation does not clip to an interval.
    """
    try:
        points, values = sampled(fn, x)
    except jax.errors.JAXTypeError:
        raise NotImplementedError(
            f"the activation {site!r} uses constants that are not known when the network is traced, and damping needs "
            "their values: write them as literals"
        ) from None
    if jnp.iscomplexobj(x) or not np.allclose(
        values, np.clip(points, values.min(), values.max()), rtol=1e-3, atol=1e-3
    ):
        raise NotImplementedError(
            f"the activation {site!r} cannot be damped: Eq. 50 holds only for activations that clip to an interval "
            "(relu, relu6, hard_tanh, jnp.clip), and it changes the fixed points of others: leave damping out"
        )
