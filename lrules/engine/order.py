"""In which order the examples lie along an axis: the axis is followed back to the inputs.

An axis may hold the examples in the order of the inputs, perhaps merged with other axes, as in `[batch * time]`: then
the order is `(before, after)`, the sizes that are merged with the batch before and after it. Operations that put
elements elsewhere say how they change this order; so examples that were reversed, sorted or shuffled are noticed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.export import is_symbolic_dim

from lrules.engine.activations import arranged, is_atom
from lrules.engine.jaxprs import COND, OWN_DERIVATIVE, SCAN, Aval, Equation, bind, is_literal, scan_counts
from lrules.engine.operations import Places, Row, of, view_axes
from lrules.engine.records import Value
from lrules.engine.twice import AtTwice, Twin

Order = tuple[Any, Any] | str  # (before, after), or one of these:
NONE = "none"  # the elements do not come from examples, as those of a constant, or all from the same ones
MOVED = "moved"  # the examples are in another order, or at places that only data tells
UNKNOWN = "unknown"  # an operation that nobody knows; an axis of the size of the batch counts as kept


@dataclasses.dataclass(frozen=True)
class BySize:
    """Instead of a value at twice the batch: each axis that has the size of the batch may hold it."""

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


@dataclasses.dataclass(frozen=True)
class Source:
    """The axis of an operand from which an axis comes; `then(before, after)` is its order, if it differs."""

    value: Value
    twin: Twin
    axis: int
    then: Callable[[Any, Any], Order] | None = None

    def order(self) -> Order | None:
        """The order of the axis that comes from it; None if that of its own is not known yet."""
        known = (self.value.order_of_batch or {}).get(self.axis)
        return self.then(*known) if self.then is not None and isinstance(known, tuple) else known


@dataclasses.dataclass(frozen=True)
class Origin:
    """From which axes an axis comes, and how their orders make its own.

    `combine` is `"first"` for the first of them that holds the examples in order, `"all"` if none may be in another
    order, `"joined"` if they lie one behind the other, and `"needed"` if one must hold examples. Without sources, or if
    one is needed and none holds examples, the order is `otherwise`.
    """

    sources: Sequence[Source] = ()
    otherwise: Order = NONE
    combine: str = "first"

    def order(self) -> Order | Source:
        """The order of the axis, or a source whose own order has to be known first."""
        orders: list[Any] = []
        for source in self.sources:
            order = source.order()
            if order is None:
                return source
            if isinstance(order, tuple) and self.combine in ("first", "needed"):
                return order
            orders.append(order)
        kept = [order for order in orders if isinstance(order, tuple)]
        if self.combine == "joined":
            same = len(kept) == len(orders) and len({after for _, after in kept}) == 1
            return (sum(before for before, _ in kept), kept[0][1]) if same else MOVED
        if MOVED in orders:
            return MOVED
        if kept or UNKNOWN in orders:
            return kept[0] if kept else UNKNOWN
        return NONE if orders and self.combine != "needed" else self.otherwise


def order_of(a: Value, b: Twin, axis: int, batch: Any) -> Order:
    """The order of the examples along an axis of a value; `b` is the value at twice the batch."""
    asked = [(a, axis, _origin(a, b, axis, batch))]
    while True:
        value, at, origin = asked[-1]
        order = origin.order()
        if isinstance(order, Source):
            asked.append((order.value, order.axis, _origin(order.value, order.twin, order.axis, batch)))
            continue
        if order == UNKNOWN and value.aval.shape[at] == batch:
            order = 1, 1  # most operations keep it
        value.order_of_batch = {**(value.order_of_batch or {}), at: order}
        asked.pop()
        if not asked:
            return order


def holds(a: Value, b: Twin, axis: int) -> bool:
    """Whether the axis may hold the batch: it grows with it, or, if that is not known, has its size."""
    if isinstance(b, BySize):
        return a.aval.shape[axis] == b.batch
    return len(a.aval.shape) == len(b.aval.shape) and a.aval.shape[axis] != b.aval.shape[axis]


def _origin(a: Value, b: Twin, axis: int, batch: Any) -> Origin:
    known = (a.order_of_batch or {}).get(axis)
    if known is not None or not a.data:
        return Origin(otherwise=NONE if known is None else known)
    if a.producer is not None:
        same = len(a.operands) == len(b.operands)
        pairs = list(zip(a.operands, b.operands, strict=True)) if same else []
        return _through(a.producer, a, b, axis, pairs, batch) if same else Origin((), UNKNOWN)
    if not a.operands:
        return Origin((), UNKNOWN)  # an input
    u, v = a.operands[0], b.operands[0]  # a slice of a scanned value, the start of a carry, a shard_map's operand
    return Origin(_at(u, v, axis + len(u.aval.shape) - len(a.aval.shape)), UNKNOWN)


Pairs = Sequence[tuple[Value, Twin]]


def _at(u: Value, v: Twin, axis: int, then: Callable[[Any, Any], Order] | None = None) -> list[Source]:
    """An axis of an operand as the only source, if it may hold examples."""
    if not u.data or not 0 <= axis < len(getattr(u.aval, "shape", ())):
        return []
    merged = isinstance(v, BySize) and u.aval.shape[axis] % v.batch == 0
    return [Source(u, v, axis, then)] if merged or holds(u, v, axis) else []


def _through(eqn: Equation, a: Value, b: Twin, axis: int, pairs: Pairs, batch: Any) -> Origin:
    """Through an equation."""
    row = of(eqn)
    if row.view is not None and len(pairs) == 1 and pairs[0][0].data:
        axes = view_axes(b.producer or eqn, pairs[0][1].aval.shape)
        if axes is not None:
            return _through_view(axes, a, axis, *pairs[0])
    if row.elementwise or is_atom(eqn, a.operands) or row.name in OWN_DERIVATIVE:
        return _through_elements(row, a, axis, pairs)
    if row.name == SCAN and len(pairs) == 1:
        u, v = pairs[0]
        outer = axis - len(a.aval.shape) + len(u.aval.shape)
        if outer >= 0:  # in a stacked output, or the last carry
            return Origin(_at(u, v, outer), UNKNOWN)
        scanned = range(sum(scan_counts(eqn.params)), len(eqn.invars))
        return Origin([s for k in scanned for s in _at(*_read(a, b, k), 0)], UNKNOWN)
    if row.name == COND:
        return Origin([s for u, v in pairs[1:] for s in _at(u, v, axis)], UNKNOWN, "all")
    if row.reorders is not None and row.reorders(eqn, axis, [u.data for u in a.operands]):
        return Origin((), MOVED)
    if row.columns is not None:
        return _through_lookup(eqn, row, axis, pairs, batch)
    if row.kind == "product":
        return _through_product(eqn, row, axis, pairs)
    if row.lies is None:
        k = a.result if row.kind == "placement" else 0
        if row.kind in ("transform", "collective", "placement") and axis not in row.contracted(eqn, k):
            kept = [(u, v) for u, v in pairs[k : k + 1] if u.aval.shape == a.aval.shape]
            return Origin([s for u, v in kept for s in _at(u, v, axis)], UNKNOWN)
        return Origin((), UNKNOWN)
    if row.joins is not None and row.joins(eqn) == axis:
        sources = [s for u, v in pairs for s in _at(u, v, axis)]
        return Origin(sources, MOVED, "joined") if len(sources) == len(pairs) else Origin((), MOVED)
    taken = None if row.takes is None else row.takes(eqn, a.result, axis)
    sources = []
    for k, (u, v) in enumerate(pairs):
        at = next((i for i, out in row.lies(eqn, k).items() if out == axis), -1)
        sources += _at(u, v, at, None if taken is None else _chosen(taken, u.aval.shape[at], batch))
    lost = row.kind == "scatter" or row.reorders is not None or row.takes is not None
    return Origin(sources, MOVED if lost else NONE)


def _read(a: Value, b: Twin, k: int) -> tuple[Value, Twin]:
    """What the equation of a value reads as number `k`, where the operands of the value are others."""
    assert a.block is not None
    u = a.block.value(a.producer.invars[k])
    if isinstance(b, Value):
        assert b.block is not None
        return u, b.block.value(b.producer.invars[k])
    return u, BySize(u, b.batch) if isinstance(b, BySize) else AtTwice(u)


def _through_view(axes: Places, a: Value, axis: int, u: Value, v: Twin) -> Origin:
    """Through a reshape: axes are merged, split, or both."""
    held, shape = axes[axis], u.aval.shape
    right = [j for j in range(len(axes)) if axes[j] == held]
    for i in sorted(held, key=lambda i: not holds(u, v, i)):
        front = math.prod(shape[j] for j in held if j < i), math.prod(a.aval.shape[j] for j in right if j < axis)
        behind = math.prod(shape[j] for j in held if j > i), math.prod(a.aval.shape[j] for j in right if j > axis)

        def then(before: Any, after: Any, front: Any = front, behind: Any = behind) -> Order:
            sizes = _divided(before * front[0], front[1]), _divided(after * behind[0], behind[1])
            return MOVED if None in sizes else sizes

        found = _at(u, v, i, then)
        if found:
            return Origin(found, UNKNOWN)
    return Origin((), UNKNOWN if held else NONE)


def _divided(size: Any, by: Any) -> Any:
    """The quotient; None if there is a remainder."""
    return size if by == 1 else size // by if size % by == 0 else None


def _through_elements(row: Row, a: Value, axis: int, pairs: Pairs) -> Origin:
    """Through an elementwise function: the results of a choice count, not what decides."""
    lies = arranged(a) or {}
    found = [
        s for k, (u, v) in enumerate(pairs) if len(getattr(u.aval, "shape", ())) == len(a.aval.shape)
        for s in _at(u, v, lies[k][axis] if lies.get(k) else axis)
    ]  # fmt: skip
    if row.combines == "select":
        found = [s for s in found if s.value is not pairs[0][0]] or found
    return Origin(found, NONE if row.elementwise else UNKNOWN)


def _through_lookup(eqn: Equation, row: Row, axis: int, pairs: Pairs, batch: Any) -> Origin:
    """Through a gather: examples are looked up, or something for each of them."""
    (table, u), (indices, v) = pairs
    columns = row.columns(eqn)  # type: ignore[misc]
    at = next((d for d, out in row.lies(eqn, 1).items() if out == axis), None)  # type: ignore[misc]
    if at is None:
        i = next(i for i, out in row.lies(eqn, 0).items() if out == axis)  # type: ignore[misc]
        cut = i in columns and table.data
        return Origin((), MOVED) if cut else Origin(_at(table, u, i), UNKNOWN)
    by_indices = _at(indices, v, at)
    for i, d in row.paired(eqn).items():  # type: ignore[misc]
        if d == at:
            return Origin([*_at(table, u, i), *by_indices])
    sources, chosen = [], False
    for i, column in columns.items():
        positions = _column(indices, column, at)
        source = _at(table, u, i, _chosen(positions, table.aval.shape[i], batch))
        chosen |= bool(source)
        sources += source if positions is not None else []
    return Origin(sources, MOVED) if chosen else Origin(by_indices)


def _through_product(eqn: Equation, row: Row, axis: int, pairs: Pairs) -> Origin:
    """Through a product: if examples are summed, the other operand must bring them in their order."""
    sources, summed, brings = [], False, None
    for k, (u, v) in enumerate(pairs):
        contracted = row.contracted(eqn, k)
        at = next((i for i, out in row.lies(eqn, k).items() if out == axis and i not in contracted), None)  # type: ignore[misc]
        if at is not None:
            brings = u
            sources += _at(u, v, at)
        summed |= u.data and any(holds(u, v, i) for i in contracted)
    if not summed or brings is None:
        return Origin(sources)
    if brings.data:
        return Origin(sources, MOVED, "needed")
    matrix = _known(brings, {})  # such as jnp.eye(n)[::-1], or the edges of a graph
    moves = matrix is not None and matrix.ndim == 2 and not np.diagonal(matrix).all()
    return Origin(sources, MOVED if moves else UNKNOWN)


def _chosen(taken: Any, size: Any, batch: Any) -> Callable[[Any, Any], Order]:
    """The order of elements that are taken from an axis: kept if these are all examples, equally often and in order.

    Args:
      taken: the positions, or a slice.
      size: the length of the axis.
      batch: the number of examples.
    """

    def then(before: Any, after: Any) -> Order:
        if any(map(is_symbolic_dim, (size, after, batch))):
            return MOVED
        positions = np.arange(size)[taken] if isinstance(taken, slice) else taken
        if np.array_equal(positions, np.arange(size)):
            return before, after
        examples = positions // after % batch
        times = int(np.argmax(examples != 0)) if batch > 1 else 1  # how often the first example comes first
        if not times or len(examples) % (batch * times):
            return MOVED
        blocks = len(examples) // (batch * times)
        in_order = np.tile(np.repeat(np.arange(batch), times), blocks)
        return (blocks, times) if np.array_equal(examples, in_order) else MOVED

    return then


def _column(indices: Value, column: int, axis: int) -> Any:
    """The numbers in a column of indices along an axis, if they are known, and the same along the other axes."""
    while (eqn := indices.producer) is not None and _known(indices, {}) is None:
        row, last = of(eqn), len(indices.aval.shape) - 1
        if row.joins is not None and row.joins(eqn) == last:
            pieces = iter(indices.operands)
            while column >= (indices := next(pieces)).aval.shape[last]:
                column -= indices.aval.shape[last]
        elif row.same_shape and len(indices.operands) == 1:
            indices = indices.operands[0]
        else:
            return None
    known = _known(indices, {})
    if known is None:
        return None
    columns = np.moveaxis(known[..., column], axis, 0).reshape(known.shape[axis], -1)
    return columns[:, 0] if columns.size and (columns == columns[:, :1]).all() else None


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
