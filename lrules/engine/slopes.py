"""The activation of a layer, or of a hidden signal, for rules that ask for its slope f'(z).

For a layer, it is the activation f above it: the pre-activation z is the output y of the layer, up to added terms,
factors, normalisation, casts, reshapes and transposes. For a hidden signal, it is the activation whose output is that
tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lrules.engine.activations import is_statistic
from lrules.engine.graph import Graph
from lrules.engine.handlers import Frame, Handler
from lrules.engine.jaxprs import placed_as
from lrules.engine.operations import of
from lrules.engine.records import Activation, Hidden, Layer, Value, reach, undo_views


def activations_of_layers(graph: Graph) -> dict[str, tuple[Activation, tuple[Any, ...]]]:
    """For each layer (by site) with one activation above it: this activation, and the views from y to z."""
    reached = reach(graph.outs[: graph.n_outputs])
    found: dict[str, list[tuple[Activation, tuple[Any, ...]]]] = defaultdict(list)
    for activation in graph.activations:
        if id(activation.output) in reached:
            for layer, views in _layers_below(activation.source):
                found[layer.site].append((activation, views))
    return {site: above[0] for site, above in found.items() if len(above) == 1}


def _layers_below(source: Value | None) -> list[tuple[Layer, tuple[Any, ...]]]:
    """The layers whose outputs add up to a value, with the views from each to it."""
    found = []
    stack: list[tuple[Value, tuple[Any, ...]]] = [] if source is None else [(source, ())]
    while stack:
        value, views = stack.pop()
        if value.layer is not None:
            found.append((value.layer, views))
        elif value.source is not None:
            stack.append((value.source, (value.view, *views)))
        else:
            stack += [(v, views) for v in _terms(value) if v.aval.shape == value.aval.shape]
    return found


def _terms(value: Value) -> list[Value]:
    """The terms of a value that is a sum, or the one value of which it is a multiple."""
    if value.producer is None:
        return []
    row, moving = of(value.producer), [v for v in value.operands if v.both and not is_statistic(v)]
    if row.combines in ("product", "quotient"):
        alone = len(moving) == 1 and (row.combines == "product" or moving[0] is value.operands[0])
        return moving if alone else []
    return moving if row.curve == "linear" else []


def activation_of_hidden(graph: Graph, hidden: Hidden) -> Activation | None:
    """The activation whose output a hidden signal is."""
    return next((a for a in graph.activations if a.output is hidden.root), None)


class Slopes(Handler):
    """Brings the slope of activations to layers, and records it for hidden signals.

    It is outside all other handlers, so its slope is the one that the error meets: with `replace_derivative`, g(z). A
    layer makes zeros beside its output, see `open_slot`. Their cotangent is the slope.

    Args:
      layers: for each activation, by site, the layers below it, with the views from y to z.
      hidden: for each activation, by site, the names under which to record the pre-activation and the slope.
    """

    activations = True

    def __init__(
        self, layers: Mapping[str, list[tuple[str, tuple[Any, ...]]]], hidden: Mapping[str, tuple[str, str]]
    ) -> None:
        self.layers, self.hidden_signals = layers, hidden

    def activation(self, activation: Activation, fn: Callable[..., Any], x: jax.Array, frame: Frame) -> Any:
        below, names = self.layers.get(activation.site, ()), self.hidden_signals.get(activation.site)
        y = fn(x)
        if not below and names is None:
            return y
        z = jax.lax.stop_gradient(x)
        _, pull = jax.vjp(fn, z)
        slope = jax.lax.stop_gradient(pull(placed_as(jnp.ones(y.shape, y.dtype), jax.typeof(y)))[0])
        if names is not None:
            frame.records[names[0]], frame.records[names[1]] = z, slope
        for site, views in below:
            if site not in frame.slots:
                raise NotImplementedError(
                    f"the activation {activation.site!r} lies in another loop, branch or remat than the layer {site!r} "
                    "below it, so the rule cannot get its slope: write both into the same one, or give that layer a "
                    "rule that does not ask for slope"
                )
            at_root = slope.transpose([activation.axes.index(i) for i in range(slope.ndim)])
            slot = frame.slots.pop(site)
            y = _with_slope(y, slot, undo_views(views, at_root).astype(slot.dtype))
        return y


def open_slot(y: jax.Array) -> jax.Array:
    """Zeros beside the output of a layer; their cotangent will be the slope of the activation above."""
    return placed_as(jnp.zeros(y.shape, y.dtype), jax.typeof(y))


@jax.custom_vjp
def _with_slope(y: jax.Array, slot: jax.Array, slope: jax.Array) -> jax.Array:
    return y


_with_slope.defvjp(lambda y, slot, slope: (y, slope), lambda slope, d: (d, slope, None))
