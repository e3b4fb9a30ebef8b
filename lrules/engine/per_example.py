"""Changing the weight gradient of each example, before the sum over the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lrules.engine.batch import BatchAxis, doubled, find_batch_axis
from lrules.engine.closures import held
from lrules.engine.dtypes import at_least_float32
from lrules.engine.graph import Graph
from lrules.engine.handlers import Frame, Handler, Operation
from lrules.engine.jaxprs import placed_as, split_as
from lrules.engine.records import Affine, Layer
from lrules.network import Network
from lrules.options import ByName
from lrules.rule import Rule, Sequential, require_description
from lrules.typing import Pytree

# Of gradients of single examples, at most so many elements are made at once, so that they do not fill the memory. A CPU
# is fastest if they stay in its cache; elsewhere XLA adds them up without storing them.
ELEMENTS = {"cpu": 2**16}
ELEMENTS_ELSEWHERE = 2**24


class PerExample(Handler):
    """Functions of each example's weight gradient, summed over the batch.

    Where the rule says that the gradient is c times that of backprop (`Sequential.gain`), c is that of the whole batch.
    """

    affines = True

    def __init__(
        self,
        fns: tuple[Callable[..., Any], ...],
        numbers: Sequence[ByName[Any]],
        rule: Rule,
        net: Network,
        params: Pytree,
        inputs: Pytree,
    ) -> None:
        self.fns = fns
        batch = net.batch_size(inputs)
        graph = net.graph(params, inputs)
        twice = doubled(net, params, inputs, graph)
        self.names = {layer.site: layer.name for layer in graph.layers}
        self.names |= {affine.site: graph.names[min(affine.value.params)] for affine in graph.affines}
        self.check(numbers)
        self.gains = {}
        self.holds = False
        known = rule.description if rule.additive else require_description(rule, "quantize_update")
        specs = known.plan(net, graph, params, inputs).specs if known else {}
        for site, spec in specs.items():
            if not isinstance(spec, Sequential):
                continue
            if whole := sorted(spec.asks_for & {"rng", "state", "targets", "h", "slope"}):
                raise NotImplementedError(
                    f"quantize_update computes updates one example at a time, and the rule of the layer {site!r} asks "
                    f"for {whole[0]!r}, which belongs to the whole batch: use another rule for it, or another modifier"
                )
            self.holds |= spec.holds
            if spec.gain is not None:
                self.gains[site] = spec.bound("gain", self.names[site])
        self.axes = {
            site: [find_batch_axis(end, twice(end) if twice else None, batch) for end in ends]
            for site, ends in _meeting(graph).items()
        }

    def check(self, numbers: Sequence[ByName[Any]]) -> None:
        """Every pattern matches a layer, a bias or a scale."""
        for number in numbers:
            number.check(self.names.values())
            for name in self.names.values():
                number.of(name)

    def then(self, fn: Callable[..., Any], numbers: Sequence[ByName[Any]]) -> PerExample:
        """The same with one more function, inside the others."""
        self.check(numbers)
        new = copy.copy(self)
        new.fns = (*self.fns, fn)
        return new

    def changed(self, gradient: jax.Array, site: str) -> jax.Array:
        for fn in self.fns:
            gradient = fn(gradient, self.names[site])
        return gradient

    def layer(self, layer: Layer, op: Operation, w: jax.Array, b: Any, x: jax.Array, frame: Frame) -> Any:
        x_axis, y_axis = self.axes[layer.site]
        # If the rows of one example cannot be multiplied alone, its error alone goes back through the whole batch.
        whole = layer.weight.batched or not layer.row.by_example
        if y_axis is None or not (whole or (x_axis is not None and len(jax.tree.leaves(x)) == 1)):
            raise NotImplementedError(
                f"quantize_update: the batch axis in the input or output of the layer {layer.name!r} cannot be found, "
                "so its updates cannot be computed one example at a time: write the network so that the batch is a "
                "separate axis, in the order of the inputs"
            )
        product, fed = op.product, b is not w
        called = self.gains.get(layer.site), op.run
        values, remade = held(called) if self.holds else ([], lambda values: called)

        @jax.custom_vjp
        def multiply(values: Any, w: jax.Array, b: Any, x: jax.Array) -> Any:
            _, run = remade(values)
            return run(w, b if fed else w, x)

        def backward(residuals: Any, d: jax.Array) -> tuple[Any, Any, Any, Any]:
            values, w, b, x = residuals
            gain, run = remade(values)
            (dw, db, dx) = jax.vjp(lambda w, b, x: run(w, b if fed else w, x), w, b, x)[1](d)
            c = None if gain is None else gain(product, w, x, d, layer)

            def raw(x: jax.Array, d: jax.Array) -> Any:
                if c is None:
                    y, pull = jax.vjp(lambda w, b: run(w, b if fed else w, x), w, b)
                    return pull(placed_as(d, jax.typeof(y)))
                y, pull = jax.vjp(lambda w: product(w, x), w)
                (g,) = pull(placed_as(d, jax.typeof(y)))
                return g.astype(at_least_float32(g.dtype)) * c, db

            def example(slices: Any) -> Any:
                if whole:
                    found = raw(x, _alone(d, slices, y_axis))
                else:
                    found = raw(jax.tree.map(lambda leaf: _one(leaf, x_axis), slices[0]), _one(slices[1], y_axis))  # type: ignore[arg-type]
                return jax.tree.map(lambda g: self.changed(g, layer.site).astype(at_least_float32(g.dtype)), found)

            split: Any = jnp.arange(d.shape[y_axis.axis] // (y_axis.before * y_axis.after))
            if not whole:
                split = jax.tree.map(lambda leaf: _to_front(leaf, x_axis), x), _to_front(d, y_axis)  # type: ignore[arg-type]
            at_once = 1  # convolutions would become grouped ones, and other layers may have no vmap
            if layer.row.together and not whole and isinstance(dw.size, int):
                at_once = max(1, ELEMENTS.get(jax.default_backend(), ELEMENTS_ELSEWHERE) // max(1, dw.size))
            totals = _sum(example, split, jax.tree.map(_nothing, (dw, db)), at_once)
            dw, db = jax.tree.map(lambda t, g: t.astype(g.dtype), totals, (dw, db))
            return None, dw, db, dx

        multiply.defvjp(lambda *args: (multiply(*args), args), backward)
        return multiply(values, w, b if fed else None, x)

    def affine(self, affine: Affine, op: Callable[..., Any], p: Any, others: Any, frame: Frame) -> Any:
        (axis,) = self.axes[affine.site]
        if axis is None:
            return op(p, others)
        shape = affine.output.aval.shape
        kept = {i + len(shape) - jnp.ndim(p) for i in affine.value.spread}

        @jax.custom_vjp
        def meet(p: Any, others: Any) -> Any:
            return op(p, others)

        def backward(residuals: Any, d: jax.Array) -> tuple[Any, ...]:
            p, others = residuals
            wide, spread = jax.vjp(lambda p: jnp.broadcast_to(p, shape), p)
            g, d_others = jax.vjp(op, wide, others)[1](d)
            g = _to_front(g, axis)
            narrow, g = g.dtype, g.astype(at_least_float32(g.dtype))
            origin = [*range(axis.axis), axis.axis, axis.axis, *range(axis.axis + 1, len(shape))]
            summed = [1 + k for k, i in enumerate(origin) if i not in kept]  # along these p is merely broadcast
            total = self.changed(g.sum(summed, keepdims=True), affine.site).sum(0, keepdims=True)
            total = jnp.pad(total, [(0, n - m) for n, m in zip(g.shape, total.shape, strict=True)])
            (dp,) = spread(jnp.moveaxis(total, 0, axis.axis + 1).reshape(shape).astype(narrow))
            return dp, d_others

        meet.defvjp(lambda p, others: (op(p, others), (p, others)), backward)
        return meet(p, others)


def _sum(fn: Callable[[Any], Any], slices: Any, zero: Any, at_once: int) -> Any:
    """The sum of a function over the first axis of the slices, some of them at once: XLA adds up as it computes."""
    count = jax.tree.leaves(slices)[0].shape[0]
    if isinstance(count, int) and count:  # else it is symbolic
        at_once = next(n for n in range(min(at_once, count), 0, -1) if count % n == 0)
    else:
        at_once = 1
    if at_once == 1:
        return jax.lax.scan(lambda total, each: (jax.tree.map(jnp.add, total, fn(each)), None), zero, slices)[0]

    def add(total: Any, chunk: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda t, g: t + g.sum(0), total, jax.vmap(fn)(chunk)), None

    if count == at_once:
        return add(zero, slices)[0]
    return jax.lax.scan(add, zero, jax.tree.map(lambda leaf: leaf.reshape(-1, at_once, *leaf.shape[1:]), slices))[0]


def _meeting(graph: Graph) -> dict[str, list[Any]]:
    """The values that meet parameters, and the results, by site."""
    layers = {layer.site: [layer.operand, layer.output] for layer in graph.layers}
    return layers | {affine.site: [affine.output] for affine in graph.affines}


def _nothing(x: jax.Array) -> Any:
    """Zeros like x, on the devices of x, to begin a sum."""
    return placed_as(jnp.zeros(x.shape, at_least_float32(x.dtype)), jax.typeof(x))


def _to_front(x: jax.Array, axis: BatchAxis) -> jax.Array:
    """`[batch, ..., before, after, ...]` of `[..., before * batch * after, ...]`, whole on every device."""
    x = _whole(x, axis.axis)
    x = x.reshape(*x.shape[: axis.axis], axis.before, -1, axis.after, *x.shape[axis.axis + 1 :])
    return jnp.moveaxis(x, axis.axis + 1, 0)


def _whole(x: jax.Array, axis: int) -> Any:
    """The array, not split over explicit mesh axes along this axis: loops cannot run over a split axis."""
    spec = jax.typeof(x).sharding.spec
    return split_as(x, *spec[:axis], None, *spec[axis + 1 :])


def _one(x: jax.Array, axis: BatchAxis) -> jax.Array:
    """One example of `_to_front`, as `[..., before * 1 * after, ...]`."""
    return x.reshape(*x.shape[: axis.axis], axis.before * axis.after, *x.shape[axis.axis + 2 :])


def _alone(x: jax.Array, i: int, axis: BatchAxis) -> jax.Array:
    """The tensor with zeros for all examples but one."""
    size = x.shape[axis.axis]
    example = jnp.arange(size) // axis.after % (size // (axis.before * axis.after))
    return jnp.where(jnp.expand_dims(example == i, [a for a in range(x.ndim) if a != axis.axis]), x, 0)


def scaled(error: jax.Array, scale: float) -> jax.Array:
    """The error times the batch, in float32 at least: half precision might not hold it."""
    return error.astype(at_least_float32(error.dtype)) * scale
