"""Where the batch lies in a tensor: this is found by tracing the network at twice the batch.

An axis that doubles with the batch holds the batch. Direct feedback brings each example its own error, so the order of
the examples counts too: the axis is followed back to the inputs, through operations that keep the order. If it was
merged with other axes, as in `[batch * time]`, the reshape shows how. If examples were reversed, sorted, gathered or
concatenated along the axis, their order is not known.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrules.engine.activations import arranged, is_atom
from lrules.engine.graph import Graph
from lrules.engine.jaxprs import OWN_DERIVATIVE, SCAN, Aval, Equation, bind, is_literal
from lrules.engine.operations import of, view_axes
from lrules.engine.records import Value
from lrules.engine.reshapes import moved
from lrules.engine.twice import AtTwice, Twin, write_shapes
from lrules.network import Network
from lrules.typing import Pytree


@dataclasses.dataclass(frozen=True)
class BatchAxis:
    """The place of the batch in a tensor: axis `axis`, with the size `before * batch * after` if it is merged.

    Args:
      axis: the axis.
      before, after: the sizes that are merged with the batch, before and after it.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> axis = lrules.extend.BatchAxis(0, after=4)  # [batch * time, features], with 4 steps
      >>> axis.in_front(jnp.ones((20, 3)), (20, 3), 5).shape
      (5, 4, 3)
    """

    axis: int
    before: int = 1
    after: int = 1

    @property
    def merged(self) -> list[int]:
        """The sizes of the axes that are merged with the batch."""
        return [n for n in (self.before, self.after) if n != 1]

    @property
    def _place(self) -> int:
        """Where the batch lies once its axis is split: an axis of size one before it would stop JAX's reshapes."""
        return self.axis + (self.before != 1)

    def rest(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape without the batch; a merged axis is split."""
        return (*shape[: self.axis], *self.merged, *shape[self.axis + 1 :])

    def restore(self, x: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Moves the batch axis, which is first in `x`, to its place in a tensor of that shape."""
        if not self.merged:
            x = moved(x, [0], [self.axis])
            return x if x.shape == tuple(shape) else x.reshape(shape)
        return moved(x.reshape(x.shape[0], *self.rest(shape)), [0], [self._place]).reshape(shape)

    def in_front(self, x: jax.Array, shape: Sequence[int], batch: int) -> jax.Array:
        """A tensor of that shape as `[batch, *rest]`."""
        if not self.merged:
            return moved(x, [self.axis], [0])
        sizes = list(self.rest(shape))
        sizes.insert(self._place, -1)
        return moved(x.reshape(sizes), [self._place], [0])


@dataclasses.dataclass(frozen=True)
class Unbatched(BatchAxis):
    """Instead of a batch axis, for a tensor that is the same for all examples: their signals add up there."""

    axis: int = -1

    def rest(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)

    def restore(self, x: jax.Array, shape: Sequence[int]) -> jax.Array:
        return x.sum(0).reshape(shape)

    def in_front(self, x: jax.Array, shape: Sequence[int], batch: int) -> jax.Array:
        return jnp.broadcast_to(x.reshape(1, *shape), (batch, *shape))


class Moved(Exception):
    """The network puts the examples into another order."""


Step = tuple[Value, Twin, int, tuple[int, int]]


def find_batch_axis(a: Value, b: Twin | None, batch: int) -> BatchAxis | None:
    """The batch axis of a value, from its traces `a` at the batch and `b` at twice the batch; None if not known."""
    shape = a.aval.shape
    if b is None:  # the model does not accept another batch
        if sum(n != 0 and n % batch == 0 for n in shape) != 1:
            return None
        b = BySize(a, batch)
    axis = _grown(a, b)
    if axis is None:
        return None
    try:
        order = _order(a, b, axis, batch)
    except Moved:
        return None
    if order is not None and order[0] * batch * order[1] == shape[axis]:
        return BatchAxis(axis, *order)
    return BatchAxis(axis) if shape[axis] == batch else None


def batch_axis(net: Network, name: str, a: Value, b: Twin | None, batch: int) -> BatchAxis | None:
    """Finds the batch axis of an output or a hidden signal.

    Args:
      net: the network; its `signal_axes` may give the axis.
      name: the name of the hidden signal, or `"outputs"`.
      a: the value in the graph of the network.
      b: the same value at twice the batch, from `doubled`; None if there is none.
      batch: the number of examples.

    Returns:
      The axis; None if it cannot be found.

    Raises:
      ValueError: the axis in `signal_axes` does not have the size of the batch.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> net, w, x = lrules.Network(lambda w, x: (x @ w).T), jnp.ones((3, 4)), jnp.ones((5, 3))
      >>> (out,) = net.graph(w, x).outs
      >>> twice = lrules.extend.doubled(net, w, x, net.graph(w, x))
      >>> lrules.extend.batch_axis(net, "outputs", out, twice(out), 5)
      BatchAxis(axis=1, before=1, after=1)
    """
    stated = net.stated_axis(name, a.aval.shape, batch)
    return find_batch_axis(a, b, batch) if stated is None else BatchAxis(stated)


@dataclasses.dataclass(frozen=True)
class BySize:
    """Instead of a value at twice the batch: the only axis that has the size of the batch holds it."""

    value: Value
    batch: int

    @property
    def aval(self) -> Aval:
        return self.value.aval

    @property
    def producer(self) -> Equation | None:
        return self.value.producer

    @property
    def operands(self) -> tuple[BySize, ...]:
        return tuple(BySize(v, self.batch) for v in self.value.operands)


def _grown(a: Value, b: Twin) -> int | None:
    """The one axis that doubles with the batch."""
    if isinstance(b, BySize):
        fits = [i for i, n in enumerate(a.aval.shape) if n == b.batch]
        return fits[0] if len(fits) == 1 else None
    if len(a.aval.shape) != len(b.aval.shape):
        return None
    grown = [i for i, (m, n) in enumerate(zip(a.aval.shape, b.aval.shape, strict=True)) if n != m]
    return grown[0] if len(grown) == 1 and b.aval.shape[grown[0]] == 2 * a.aval.shape[grown[0]] else None


def _holds(a: Value, b: Twin, axis: int) -> bool:
    """Whether the axis may hold the batch: the one that doubles with it, or, if that is not known, one of its size."""
    return a.aval.shape[axis] == b.batch if isinstance(b, BySize) else _grown(a, b) == axis


def _order(a: Value, b: Twin, axis: int, batch: int) -> tuple[int, int] | None:
    """`(before, after)`, the sizes merged with the batch before and after it; None if not known.

    Raises:
      Moved: the examples are not in the order of the inputs.
    """
    way: list[tuple[Value, int, tuple[int, int]]] = []  # from the value to where it is known
    while (known := (a.order_of_batch or {}).get(axis)) is None:
        try:
            step = _step(a, b, axis)
        except Moved:
            known = "moved"
            break
        if step is None:
            lost = a.producer is not None and any(map(_written, (a, *(v for v, _, _ in way))))
            known = "moved" if lost else (1, 1) if a.aval.shape[axis] == batch else "unknown"
            break
        way.append((a, axis, step[3]))
        a, b, axis, _ = step
    way.append((a, axis, (1, 1)))
    for value, at, (front, behind) in reversed(way):
        if isinstance(known, tuple):
            known = known[0] * front, known[1] * behind
        value.order_of_batch = {**(value.order_of_batch or {}), at: known}
    if known == "moved":
        raise Moved
    return known if isinstance(known, tuple) else None


def _written(a: Value) -> bool:
    """Whether a scatter makes it, which may put examples into another order."""
    return a.producer is not None and of(a.producer).kind == "scatter"


def _step(a: Value, b: Twin, axis: int) -> Step | None:
    """One step back: the operand that holds the axis, in both traces, its axis there, and the merged sizes."""
    if a.producer is not None:
        return _back(a.producer, a, b, axis)
    if not a.operands:
        return None
    u, v = a.operands[0], b.operands[0]  # a slice of a scanned value, the start of a carry, a shard_map's operand
    outer = axis + len(u.aval.shape) - len(a.aval.shape)
    return (u, v, outer, (1, 1)) if _holds(u, v, outer) else None


def _back(eqn: Equation, a: Value, b: Twin, axis: int) -> Any:
    """The same through an equation."""
    if len(a.operands) != len(b.operands):
        return None
    pairs = [(u, v) for u, v in zip(a.operands, b.operands, strict=True) if u.data and hasattr(u.aval, "shape")]

    def to(u: Value, v: Twin, i: int, front: Any = 1, behind: Any = 1) -> Any:
        return (u, v, i, (front, behind)) if _holds(u, v, i) else None

    row = of(eqn)
    if row.view is not None and len(a.operands) == 1 and pairs:
        axes = view_axes(b.producer or eqn, pairs[0][1].aval.shape)
        if axes is not None:
            return _back_view(axes, a, axis, to, *pairs[0])
    if row.elementwise or is_atom(eqn, a.operands) or row.name in OWN_DERIVATIVE:
        lies = arranged(a) or {}
        for k, (u, v) in enumerate(zip(a.operands, b.operands, strict=True)):
            i = lies[k][axis] if lies.get(k) else axis
            if u.data and len(getattr(u.aval, "shape", ())) == len(a.aval.shape) and _holds(u, v, i):
                return to(u, v, i)
        return None
    if row.name == SCAN and len(pairs) == 1:  # a stacked output, or the last carry
        return to(*pairs[0], axis - len(a.aval.shape) + len(pairs[0][0].aval.shape))
    if row.reorders is not None and row.reorders(eqn, axis, [u.data for u in a.operands]):
        if row.looks_up and _rises(a.operands[1]):
            return None
        raise Moved
    if row.lies is None:
        return None
    for k, (u, v) in enumerate(zip(a.operands, b.operands, strict=True)):
        if not u.data or (row.looks_up and k > 0 and a.operands[0].data):
            continue
        places = {out: i for i, out in row.lies(eqn, k).items() if i not in row.contracted(eqn, k)}
        if axis in places and _holds(u, v, places[axis]):
            return to(u, v, places[axis])
    if row.kind == "move" and row.reorders is not None:
        raise Moved
    return None


def _rises(indices: Value) -> bool:
    """Whether indices are known and keep the order of what they look up, such as jnp.arange(n) * 3 + 2."""
    known = _known(indices, {})
    return known is not None and known.size == len(known) and bool(np.all(np.diff(known.ravel()) > 0))


def _known(value: Value, found: dict[int, Any]) -> Any:
    """The numbers of a value that depends on no parameters, inputs or captured arrays; else None.

    `found` holds those of the values that were asked for: many share their operands.
    """
    if id(value) not in found:
        found[id(value)] = _computed(value, found)
    return found[id(value)]


def _computed(value: Value, found: dict[int, Any]) -> Any:
    eqn = value.producer
    if eqn is None or len(value.operands) != len(eqn.invars) or len(eqn.outvars) != 1:
        return None
    ins = [v.val if is_literal(v) else _known(u, found) for v, u in zip(eqn.invars, value.operands, strict=True)]
    if any(x is None for x in ins):
        return None
    with jax.ensure_compile_time_eval():
        return np.asarray(bind(eqn, ins)[0])


def _back_view(axes: Sequence[tuple[int, ...]], a: Value, axis: int, to: Any, u: Value, v: Twin) -> Any:
    """Through a view: the axis holds one axis of the operand, or several; the axis that grows is the batch."""
    held = axes[axis]
    i = next((i for i in held if _holds(u, v, i)), None)
    if i is None or any(axes[j] == held and n != 1 for j, n in enumerate(a.aval.shape) if j != axis):
        return None
    front = math.prod(u.aval.shape[j] for j in held if j < i)
    return to(u, v, i, front, math.prod(u.aval.shape[j] for j in held if j > i))


def doubled(net: Network, params: Pytree, inputs: Pytree, graph: Graph) -> Callable[[Value], Twin] | None:
    """Traces a network at twice the batch: there the axes that hold the batch are twice as long.

    Args:
      net, params, inputs: the network, and what it takes.
      graph: its trace at the batch.

    Returns:
      A function from a value of the graph to the same value at twice the batch; None if the model cannot be traced like
      this.

    Raises:
      ValueError: the trace is another network.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> net, w, x = lrules.Network(lambda w, x: x @ w), jnp.ones((3, 4)), jnp.ones((5, 3))
      >>> graph = net.graph(w, x)
      >>> lrules.extend.doubled(net, w, x, graph)(graph.outs[0]).aval.shape
      (10, 4)
    """

    def trace() -> Callable[[Value], Twin] | None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if write_shapes(graph, net.jaxpr_at_twice(params, inputs), net.input_batch_axes(inputs)):
                    return AtTwice
                twice = net.graph(params, inputs, double=True)  # it has other operations, as may be for one example
        except Exception:  # noqa: BLE001  any failure of the user's model at another batch size
            return None
        if [h.name for h in twice.hidden] != [h.name for h in graph.hidden] or len(twice.outs) != len(graph.outs):
            raise ValueError(
                "the network has other layers at another batch size, so direct feedback cannot find the single "
                "examples: write it so that the batch is only an axis (vmap, scan), or use a sequential rule"
            )
        pairs = {id(a): b for a, b in zip(_found(graph), _found(twice), strict=False)}
        return lambda value: pairs[id(value)]

    return graph.once("doubled", trace)


def _found(graph: Graph) -> list[Value]:
    """The values whose batch axis may be asked for."""
    values = [*graph.outs, *(v for h in graph.hidden for v in (h.reader, h.root))]
    values += [v for layer in graph.layers for v in (layer.operand, layer.output) if v is not None]
    return values + [affine.output for affine in graph.affines]
