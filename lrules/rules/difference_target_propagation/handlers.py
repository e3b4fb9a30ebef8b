"""The handlers of difference target propagation: how targets go down, and what the inverses learn from noise."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lrules.engine.closures import held
from lrules.engine.jaxprs import INLINED, REMATS
from lrules.engine.operations import of
from lrules.engine.records import undo_views
from lrules.engine.slopes import activations_of_layers, open_slot
from lrules.extend import (
    Activation,
    Affine,
    Frame,
    Graph,
    Handler,
    Hidden,
    Layer,
    Operation,
    at_least_float32,
    key_at,
    placed_as,
)
from lrules.options import ByName
from lrules.typing import Pytree


class Above:
    """Where each layer ends: at the activation above it, or at its bias, with the way back to the output of the layer.

    A layer that has neither ends at its output. What lies in another loop, branch or remat than the layer does not
    count, because handlers cannot give it anything there.
    """

    def __init__(self, graph: Graph, sites: Container[str]) -> None:
        self.layers: set[str] = set()
        self.below: dict[str, list[tuple[str, Callable[[jax.Array], jax.Array]]]] = defaultdict(list)
        frames = _frames(graph)
        places = {layer.site: frames[layer.place[0]] for layer in graph.layers}
        for site, (activation, views) in activations_of_layers(graph).items():
            if site in sites and _frame_of(activation.output, frames) is places[site]:
                order = [activation.axes.index(i) for i in range(len(activation.axes))]
                back = lambda v, views=views, order=order: undo_views(views, v.transpose(order))  # noqa: E731
                self.layers.add(site)
                self.below[activation.site].append((site, back))
        for affine in graph.affines:
            adds = affine.output.producer is not None and of(affine.output.producer).combines == "sum"
            for value in affine.output.operands if adds else ():
                root, views = value.root()
                if root.layer is None or value.aval.shape != affine.output.aval.shape:
                    continue
                site, here = root.layer.site, _frame_of(affine.output, frames)
                if site in sites and site not in self.layers and here is places[site]:
                    self.layers.add(site)
                    self.below[affine.site].append((site, functools.partial(undo_views, views)))

    def splits(self) -> Handler:
        return Splits(self)

    def measures(self) -> Handler:
        return Measures(self)

    def met(self, place: Activation | Affine, frame: Frame) -> Iterator[tuple[str, Any, Callable[..., jax.Array]]]:
        """The layers that end here: the site, what the layer has left in its slot, and the way back."""
        for site, back in self.below.get(place.site, ()):
            yield site, frame.slots.pop(site), back


def _frames(graph: Graph) -> dict[Any, Any]:
    """For each block the outermost block that shares its frame."""
    found = {}
    stack = [(graph.block, graph.block)]
    while stack:
        block, frame = stack.pop()
        found[block] = frame
        for index, children in block.children.items():
            name = of(block.jaxpr.eqns[index]).name
            stack += [(child, frame if name in INLINED and name not in REMATS else child) for child in children]
    return found


def _frame_of(value: Any, frames: Mapping[Any, Any]) -> Any:
    return None if value is None or value.place is None else frames[value.place[0]]


class Splits(Handler):
    """Gives the error that arrives where layers end, before the derivative of the activation, also to these layers."""

    activations = affines = True

    def __init__(self, above: Above) -> None:
        self.above = above

    def activation(self, activation: Activation, fn: Callable[..., Any], x: jax.Array, frame: Frame) -> Any:
        return self.split(activation, fn(x), frame)

    def affine(self, affine: Affine, op: Callable[..., Any], p: Any, others: Any, frame: Frame) -> Any:
        return self.split(affine, op(p, others), frame)

    def split(self, place: Activation | Affine, y: jax.Array, frame: Frame) -> jax.Array:
        for site, slots, back in self.above.met(place, frame):
            frame.records[f"{site} output"] = jax.lax.stop_gradient(back(y)).astype(slots[0].dtype)
            y = _split(back, slots[0].dtype)(y, slots)
        return y


def _split(back: Callable[[jax.Array], jax.Array], dtype: Any) -> Callable[..., Any]:
    @jax.custom_vjp
    def split(y: jax.Array, slots: Any) -> jax.Array:
        return y

    split.defvjp(lambda y, slots: (y, y), lambda y, s: (s, (back(y).astype(dtype), back(s).astype(dtype))))
    return split


class Targets(Handler):
    """At layers with an inverse: the error goes down as the difference of two targets."""

    arrays = ("size",)

    def __init__(self, layers: Mapping[str, Layer], above: Above, decoder: Any, size: Any) -> None:
        self.layers, self.above, self.decoder, self.size = layers, above, decoder, size

    def hidden(self, hidden: Hidden, value: Any, frame: Frame) -> Any:
        frame.records[hidden.name] = jax.lax.stop_gradient(value)
        return value

    def layer(self, layer: Layer, op: Operation, w: jax.Array, b: Any, x: Any, frame: Frame) -> Any:
        if layer.site not in self.layers:
            return op.product(w, x)
        values, remade = held(self.decoder)
        split = layer.site in self.above.layers
        y = _inverted(op.product, remade, split)(values, self.size, w, b, x)
        if not split:
            frame.records[layer.at_output] = jax.lax.stop_gradient(y)
            return y
        y, frame.slots[layer.site] = y
        return y


def _inverted(product: Any, remade: Callable[..., Any], split: bool) -> Callable[..., Any]:
    """A layer whose error goes down through its inverse.

    With `split`, slots beside its output get the output of the activation above, and the error that arrives there.
    """

    @jax.custom_vjp
    def multiply(values: Any, size: jax.Array, w: jax.Array, b: jax.Array, x: Any) -> Any:
        y = product(w, x)
        return (y, (open_slot(y), open_slot(y))) if split else y

    def forward(*args: Any) -> tuple[Any, Any]:
        y = multiply(*args)
        return y, (args, None if split else y)

    def backward(residuals: Any, errors: Any) -> tuple[Any, ...]:
        (values, size, w, b, x), y = residuals
        d, (h, s) = errors if split else (errors, (y, errors))
        if remade(values) is None:  # a linear inverse needs no place
            return None, None, product.weight_gradient(w, x, d), None, product.passed_down(b, x, s)
        decode = _decoder(remade(values))

        def difference(at: Any, moved: Any, like: Any) -> Any:
            if not jnp.issubdtype(like.dtype, jnp.inexact):
                return None
            wide = at_least_float32(like.dtype)
            at, far = at.astype(wide), size.astype(jnp.finfo(wide).dtype)
            return ((decode(at) - decode(at - far * moved.astype(wide))) / far).astype(like.dtype)

        dx = jax.tree.map(difference, product.passed_down(b, x, h), product.passed_down(b, x, s), x)
        return None, None, product.weight_gradient(w, x, d), None, dx

    multiply.defvjp(forward, backward)
    return multiply


def _decoder(decoder: Any) -> Callable[[jax.Array], jax.Array]:
    def decode(x: jax.Array) -> jax.Array:
        y = x if decoder is None else jnp.asarray(decoder(x))
        if y.shape != x.shape:
            raise ValueError(f"decoder must be elementwise, got the shape {y.shape} from an array of shape {x.shape}")
        return y.astype(x.dtype)

    return decode


class Noisy(Handler):
    """Clean hidden signals, and noise at the input of each layer with an inverse: the loss of the inverse."""

    def __init__(
        self,
        layers: Mapping[str, Layer],
        above: Above,
        decoder: Any,
        std: ByName[float],
        noise: Callable[..., Any],
        key: Any,
        loss: str,
    ) -> None:
        self.layers, self.above, self.decode, self.std = layers, above, _decoder(decoder), std
        self.noise, self.key, self.loss = noise, key, loss

    def hidden(self, hidden: Hidden, value: Any, frame: Frame) -> Any:
        return frame.inputs.get(hidden.name, value)

    def layer(self, layer: Layer, op: Operation, w: jax.Array, b: Any, x: Any, frame: Frame) -> Any:
        product: Any = op.product
        if layer.site not in self.layers:
            return product(w, x)
        std, clean = self.std.of(layer.name), frame.inputs[layer.at_output]
        below, above = (key_at(self.key, f"{layer.site} {end}", (w, x), frame) for end in ("input", "output"))
        eps = jax.tree.map(lambda leaf: self.drawn(below, leaf, std, layer), x)
        noisy = jax.tree.map(lambda leaf, e: leaf if e is None else leaf + e, x, eps)

        def inverse(h: jax.Array) -> Any:
            made = _floats(product.passed_down(b, x, h))
            return jax.tree.map(lambda u: self.decode(u.astype(at_least_float32(u.dtype))), made)

        def lost(h: jax.Array) -> jax.Array:
            found = inverse(h)
            if self.loss == "reconstruction":
                return _inner(*[_minus(found, _floats(noisy))] * 2) / 2
            base = inverse(clean)
            moved, xi = _minus(found, base), _floats(eps)
            if self.loss == "difference":
                return _inner(*[_minus(moved, xi)] * 2) / 2
            shaken = _minus(inverse(clean + self.drawn(above, clean, std, layer)), base)
            total = _inner(shaken, shaken) / 2 - _inner(xi, moved)
            return total / jnp.asarray(std).astype(total.dtype) ** 2

        y = product(w, noisy)
        if layer.site in self.above.layers:
            frame.slots[layer.site] = lost
        else:
            frame.records[layer.at_output] = lost(y)
        return y

    def drawn(self, key: jax.Array, like: jax.Array, std: Any, layer: Layer) -> Any:
        """Noise for an array; None for integers."""
        if not jnp.issubdtype(like.dtype, jnp.inexact):
            return None
        xi = self.noise(key, like.shape, like.dtype)
        if jnp.shape(xi) != like.shape:
            raise ValueError(
                f"difference_target_propagation: noise(key, shape, dtype) must return the shape {like.shape} at the "
                f"layer {layer.name!r}, got {jnp.shape(xi)}: draw one number for each element"
            )
        return placed_as(jnp.asarray(std).astype(xi.real.dtype) * xi, jax.typeof(like))


class Measures(Handler):
    """Records the loss of the inverse of each layer, where the layer ends."""

    activations = affines = True

    def __init__(self, above: Above) -> None:
        self.above = above

    def activation(self, activation: Activation, fn: Callable[..., Any], x: jax.Array, frame: Frame) -> Any:
        return self.measure(activation, fn(x), frame)

    def affine(self, affine: Affine, op: Callable[..., Any], p: Any, others: Any, frame: Frame) -> Any:
        return self.measure(affine, op(p, others), frame)

    def measure(self, place: Activation | Affine, y: jax.Array, frame: Frame) -> jax.Array:
        for site, lost, back in self.above.met(place, frame):
            frame.records[f"{site} output"] = lost(back(y))
        return y


def _floats(tree: Pytree) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def _minus(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
    return [x - y.astype(x.dtype) for x, y in zip(a, b, strict=True)]


def _inner(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    terms = [jnp.sum((jnp.conj(x.astype(y.dtype)) * y).real) for x, y in zip(a, b, strict=True)]
    return sum(terms[1:], terms[0])
