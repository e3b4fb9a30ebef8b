"""Damping of dual propagation: for which networks, and how strongly (Hoier and Zach 2024, appendix F, Eq. 45 to 50).

A state that follows the next one follows itself by way of it, (beta_k / beta_{k+1}) W^T W times. Where that is longer
than one, the states diverge, unless they are averaged with their old values, L_k to one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lrules.diagnostics import spectral_norm
from lrules.engine.activations import LINEAR, VIEWS, sampled
from lrules.engine.graph import Graph
from lrules.engine.handlers import Frame, Handler
from lrules.engine.jaxprs import is_literal
from lrules.engine.records import Activation, Layer, Value

POWER_ITERATIONS = 5


def norms(
    graph: Graph, sites: set[str], params, inputs, consts, reading: dict[str, list[Reader]]
) -> Iterator[tuple[str, str, Any]]:
    """|W^T W| between each state and those above it, by power iterations: `(state, state above, norm)`.

    Factors and pooling on the way count; of pooling it may be a bound.

    Raises:
      NotImplementedError: something else lies on the way.
    """
    frame = Frame()
    handler = _Norms({reader.layer.site for readers in reading.values() for reader in readers})
    graph.run(params, inputs, consts=consts, handlers=(handler,), frame=frame)
    states = {id(activation.output) for activation in graph.activations if activation.site in sites}
    for site, readers in reading.items():
        for layer, target, above in readers:
            grown = _growth(target, states) * _growth(layer.operand, states)
            yield site, above, grown**2 * frame.records[layer.site]


class _Norms(Handler):
    """Records |W^T W| of layers, by power iterations."""

    def __init__(self, sites):
        self.sites = sites

    def layer(self, layer, op, w, b, x, frame):
        if layer.site in self.sites:
            frame.records[layer.site] = spectral_norm(layer, op.product, w, POWER_ITERATIONS) ** 2
        return op(w, x)


class Reader(NamedTuple):
    """A layer between two states of a chain, what it drives, and the name of the state made of that."""

    layer: Layer
    target: Value
    above: str


def readers(graph: Graph, activations: Sequence[Activation], inputs: Sequence[str]) -> dict[str, list[Reader]]:
    """What reads each state, in a chain with one layer between two activations; `inputs` are states too."""
    for activation in activations:
        if "scan" in activation.scope:
            raise NotImplementedError(
                f"the activation {activation.site!r} lies inside a loop, where damping does not know which state comes "
                "next: write the loop out, layer by layer, or give no damping"
            )
    outputs = {id(a.output): a.site for a in activations}
    layers = {id(layer.output): layer for layer in graph.layers}

    def above(start) -> tuple[set[str], list[Any]]:
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
                "damping serves chains, in which one layer lies between two activations: this network has skip "
                "connections, or layers without an activation between them: leave damping= out"
            )
        for site in below[0][0] or inputs:
            reading.setdefault(site, []).append(Reader(found[0], target, name))
    return reading


def _growth(value: Value, states: set[int]) -> float:
    """How much longer a vector can get on its way to here from the layer or state (by id) below."""
    grown = 1.0
    while value.layer is None and id(value) not in states and value.operands:
        eqn, moving = value.producer, [v for v in value.operands if v.data]
        known = _factor(eqn, moving[0], value) if len(moving) == 1 and eqn is not None else None
        if known is None:
            raise NotImplementedError(
                f"damping by power iterations knows what weights, biases, constant factors and pooling do to a change "
                f"of a state, not {eqn.primitive.name if eqn is not None else 'a loop'}, which lies between two "
                "states here: give damping= a number"
            )
        grown, value = grown * known, moving[0]
    return grown


def _factor(eqn, operand: Value, out: Value) -> float | None:
    """The norm of one equation between states, or a bound of it; None: not known."""
    name, params, size = eqn.primitive.name, eqn.params, int(np.prod(operand.aval.shape))
    if name in ("mul", "div"):
        constants = [float(v.val) for v in eqn.invars if is_literal(v) and np.ndim(v.val) == 0]
        if not constants or (name == "div" and is_literal(eqn.invars[0])):
            return None
        return abs(constants[0]) if name == "mul" else 1 / abs(constants[0])
    if name == "broadcast_in_dim":
        return float(np.sqrt(np.prod(out.aval.shape) / size))
    if name == "reduce_sum":
        return float(np.sqrt(size / np.prod(out.aval.shape)))
    if name in ("reduce_window_sum", "reduce_window_max"):
        window, stride, dilation = (np.asarray(params[f"window_{k}"]) for k in ("dimensions", "strides", "dilation"))
        overlap = np.prod(np.where(dilation == 1, -(-window // stride), window))  # so many windows hold one element
        return float(np.sqrt(overlap * (np.prod(window) if name == "reduce_window_sum" else 1)))
    return 1.0 if name in LINEAR | VIEWS | {"stop_gradient", "name", "slice", "pad", "rev", "reduce_max"} else None


def check_projection(site: str, fn: Callable, x) -> None:
    """Damping wants s = f(a) to be the nearest point to a of an interval: f = clip."""
    try:
        points, values = sampled(fn, x)
    except jax.errors.JAXTypeError:
        raise NotImplementedError(
            f"the activation {site!r} uses constants that are not known when the network is traced, so that it cannot "
            "be told whether damping serves it: write them as literals"
        ) from None
    if jnp.iscomplexobj(x) or not np.allclose(
        values, np.clip(points, values.min(), values.max()), rtol=1e-3, atol=1e-3
    ):
        raise NotImplementedError(
            f"the activation {site!r} cannot be damped: Eq. 50 holds where the activation is the projection to an "
            "interval (its energy half a square plus an indicator), as relu, relu6, hard_tanh or jnp.clip, and has "
            "other fixed points elsewhere: leave damping= out"
        )
