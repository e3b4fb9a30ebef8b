"""In which order the examples lie along an axis: the axis is followed back to the inputs.

An axis may hold the examples in the order of the inputs, perhaps merged with other axes, as in `[batch * time]`, or a
part of them, as after `reshape(n // 2, 2, ...)`. Operations that put elements elsewhere say how they change this order;
so examples that were reversed, sorted or shuffled are noticed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.export import is_symbolic_dim

from lrules.engine.activations import arranged, is_atom
from lrules.engine.analysis import Analysis
from lrules.engine.jaxprs import COND, JITS, OWN_DERIVATIVE, SCAN, Equation, call_body, scan_counts
from lrules.engine.known import column_of, counts, known_numbers
from lrules.engine.operations import Places, Row, of, view_axes
from lrules.engine.records import Value
from lrules.engine.twice import Twin, beside, grows, may_hold


class Examples(NamedTuple):
    """Examples in their order: at position i of the axis lies a share of example `stride * (i // after % size)`.

    If `size` is the batch, these are whole examples; else other axes hold the rest of their numbers.
    """

    before: Any
    size: Any
    after: Any
    stride: Any = 1


Order = Examples | str  # or one of these:
NONE = "none"  # the elements do not come from examples, as those of a constant, or all from the same ones
MOVED = "moved"  # the examples are in another order, or at places that only data tells
UNKNOWN = "unknown"  # an operation that nobody knows; an axis of the size of the batch counts as kept


@dataclasses.dataclass(frozen=True)
class Source:
    """An axis of an operand; `then` makes what comes from it, if the examples do not stay where they are."""

    value: Value
    twin: Twin
    axis: int
    then: Callable[[Examples], Order] | None = None

    def order(self) -> Order | None:
        """The order of what comes from it; None if that of the axis is not known yet."""
        known = (self.value.order_of_batch or {}).get(self.axis)
        return self.then(known) if self.then is not None and isinstance(known, Examples) else known


Combine = Callable[[Sequence[Order], bool], Order | None]  # of orders, and whether these are all; None to ask for more


def _first(orders: Sequence[Order], complete: bool, *, empty: Order = NONE, none: Order = NONE) -> Order | None:
    """The order of the first source that holds examples in order; `empty` without sources, `none` if none has any."""
    if orders and isinstance(orders[-1], Examples):
        return orders[-1]
    if not complete:
        return None
    return MOVED if MOVED in orders else UNKNOWN if UNKNOWN in orders else none if orders else empty


def _every(orders: Sequence[Order], complete: bool) -> Order | None:
    """Examples must be in order in all sources that hold any."""
    if not complete:
        return None
    kept = [order for order in orders if isinstance(order, Examples)]
    if MOVED in orders or len(set(kept)) > 1:
        return MOVED
    return kept[0] if kept else NONE if orders and UNKNOWN not in orders else UNKNOWN


def _joined(orders: Sequence[Order], complete: bool) -> Order | None:
    """The sources lie one behind the other."""
    if not complete:
        return None
    kept = [order for order in orders if isinstance(order, Examples)]
    if len(kept) < len(orders) or len({order[1:] for order in kept}) != 1:
        return MOVED
    return kept[0]._replace(before=sum(order.before for order in kept))


@dataclasses.dataclass(frozen=True)
class Origin:
    """The axes from which an axis comes, and how their orders make its own."""

    sources: Sequence[Source] = ()
    combine: Combine = _first
    back: Source | None = None  # the source, if one is made of this value itself, an iteration earlier

    def order(self) -> Order | Source:
        """The order of the axis, or a source whose own order has to be known first."""
        orders: list[Order] = []
        for source in self.sources:
            order = source.order()
            if order is None:
                return source
            orders.append(order)
            made = self.combine(orders, False)
            if made is not None:
                return made
        made = self.combine(orders, True)
        assert made is not None
        return made


def _learning(sources: Sequence[Source]) -> Sequence[Source]:
    """The sources into which an error flows: a mask, or what is stopped, does not say whose the elements are."""
    return [s for s in sources if s.value.differentiable] or [s for s in sources if s.value.smooth] or sources


def lost(order: Order) -> Origin:
    """The origin of an axis of which only this is known."""
    return Origin((), functools.partial(_first, empty=order))


def order_of(a: Value, b: Twin, axis: int, batch: Any) -> Order:
    """The order of the examples along an axis of a value; `b` is the value at twice the batch."""
    search = _Search(batch)
    asked = [(a, axis, search.origin(a, b, axis))]
    noted: list[tuple[Value, int]] = []
    guessed: dict[tuple[int, int], int] = {}  # carries, and how much was noted when they were guessed
    while True:
        value, at, origin = asked[-1]
        order = origin.order()
        if isinstance(order, Source):
            if order is origin.back:  # so far it has the order of the first iteration
                guessed[id(value), at] = len(noted)
                first = origin.sources[0].order() if len(origin.sources) == 2 else NONE
                _note(value, at, first)
            asked.append((order.value, order.axis, search.origin(order.value, order.twin, order.axis)))
            continue
        if (since := guessed.pop((id(value), at), None)) is not None and order != value.order_of_batch[at]:  # type: ignore[index]
            for other, i in noted[since:]:
                del other.order_of_batch[i]  # type: ignore[union-attr]
            del noted[since:]
        if order == UNKNOWN and not origin.sources and value.aval.shape[at] == batch:
            order = Examples(1, batch, 1)  # most operations keep it
        _note(value, at, order)
        noted.append((value, at))
        asked.pop()
        if not asked:
            return order


def _note(value: Value, axis: int, order: Order | None) -> None:
    value.order_of_batch = {**(value.order_of_batch or {}), axis: order}


def _at(u: Value, v: Twin, axis: int | None, then: Callable[[Examples], Order] | None = None) -> list[Source]:
    """An axis of an operand as the only source, if there is one and the operand depends on examples."""
    if axis is None or not u.batched or not 0 <= axis < len(getattr(u.aval, "shape", ())):
        return []
    return [Source(u, v, axis, then)]


Pairs = Sequence[tuple[Value, Twin]]


class _Search:
    """Finds from where an axis comes, for one number of examples."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def origin(self, a: Value, b: Twin, axis: int) -> Origin:
        known = (a.order_of_batch or {}).get(axis)
        if known is not None or not a.batched:
            return lost(NONE if known is None else known)
        if a.producer is not None:
            if len(a.operands) != len(b.operands):
                return lost(UNKNOWN)
            return self.through(a.producer, a, b, axis, list(zip(a.operands, b.operands, strict=True)))
        if not a.operands:  # an input
            return lost(UNKNOWN if may_hold(a, b, axis) else NONE)
        # A slice of a scanned value, a carry (its start and its end), an argument of a shard_map or of a function.
        pairs = zip(a.operands, b.operands, strict=False)
        sources = [s for u, v in pairs for s in _at(u, v, axis + len(u.aval.shape) - len(a.aval.shape))]
        carried = len(a.operands) == 2 and bool(sources)
        return Origin(sources, _every if carried else _first, back=sources[-1] if carried else None)

    def through(self, eqn: Equation, a: Value, b: Twin, axis: int, pairs: Pairs) -> Origin:
        """Through an equation."""
        row = of(eqn)
        if row.view is not None and len(pairs) == 1:
            axes = view_axes(b.producer or eqn, pairs[0][1].aval.shape)
            if axes is not None:
                return self.view(axes, a, axis, *pairs[0])
        if row.elementwise or is_atom(eqn, a.operands) or (row.name in OWN_DERIVATIVE and arranged(a) is not None):
            return _elements(row, a, axis, pairs)
        if row.name in OWN_DERIVATIVE or row.name in JITS:
            return _body(eqn, a, b, axis, pairs)
        if row.name == SCAN and len(pairs) == 1:
            return _loop(eqn, a, b, axis, *pairs[0])
        if row.name == COND:
            return Origin([s for u, v in pairs[1:] for s in _at(u, v, axis)], _every)
        if row.updates is not None:
            return self.write(eqn, row, axis, pairs)
        if row.reorders is not None and row.reorders(eqn, axis, [u.batched for u in a.operands]):
            return lost(MOVED)
        if row.columns is not None:
            return self.lookup(eqn, row, axis, pairs)
        if row.kind == "product":
            return _product(eqn, row, axis, pairs)
        if row.lies is None:
            k = a.result if row.kind == "placement" else 0
            if row.kind in ("transform", "collective", "placement") and axis not in row.contracted(eqn, k):
                kept = [(u, v) for u, v in pairs[k : k + 1] if u.aval.shape == a.aval.shape]
                return Origin([s for u, v in kept for s in _at(u, v, axis)], functools.partial(_first, empty=UNKNOWN))
            return lost(UNKNOWN)
        if row.joins is not None and row.joins(eqn) == axis:
            parts = [(u, v) for u, v in pairs if u.aval.shape[axis] != 0]
            sources = [s for u, v in parts for s in _at(u, v, axis)]
            return Origin(sources, _joined) if len(sources) == len(parts) else lost(MOVED)
        taken = None if row.takes is None else row.takes(eqn, a.result, axis)
        times = 1 if row.repeats is None else row.repeats(eqn, axis)
        sources = []
        for k, (u, v) in enumerate(pairs):
            at, then = row.held(eqn, k, axis), None
            if taken is not None and at is not None:
                then = self.chosen(taken, u.aval.shape[at], 0)
            elif times != 1:
                then = functools.partial(_repeated, times)
            sources += _at(u, v, at, then)
        return Origin(_learning(sources))

    def view(self, axes: Places, a: Value, axis: int, u: Value, v: Twin) -> Origin:
        """Through a reshape: axes are merged, split, or both."""
        held = axes[axis]
        if len(u.aval.shape) != len(v.aval.shape):
            return lost(UNKNOWN)
        ordered = sorted(held, key=lambda i: not grows(u, v, i))
        sources = [s for i in ordered for s in _at(u, v, i)]
        if len(held) < 2 and axes.count(held) == 1:
            return Origin(sources)
        return Origin(sources, functools.partial(self.merged, axes, a, axis, u, ordered))

    def merged(
        self, axes: Places, a: Value, axis: int, u: Value, ordered: Sequence[int], orders: Sequence[Order],
        complete: bool,
    ) -> Order | None:  # fmt: skip
        """The order of an axis of a reshape, from the orders of the axes that it holds."""
        held, shape, out = axes[axis], u.aval.shape, a.aval.shape
        right = [j for j in range(len(axes)) if axes[j] == held]
        behind = {i: math.prod(shape[j] for j in held if j > i) for i in held}
        rest = math.prod(out[j] for j in right if j > axis)
        if 0 in (*shape, *out):
            return UNKNOWN
        if orders and isinstance(orders[-1], Examples) and orders[-1].size == self.batch:
            i, order = ordered[len(orders) - 1], orders[-1]
            front = math.prod(shape[j] for j in held if j < i), math.prod(out[j] for j in right if j < axis)
            before = _divided(order.before * front[0], front[1])
            after = _divided(order.after * behind[i], rest)
            if before is not None and after is not None:
                return order._replace(before=before, after=after)
            complete = True
        if not complete:
            return None
        parts = {i: order for i, order in zip(ordered, orders, strict=False) if isinstance(order, Examples)}
        if MOVED in orders or not parts:
            return MOVED if MOVED in orders else UNKNOWN if UNKNOWN in orders else NONE
        if any(map(is_symbolic_dim, (*shape, *out, self.batch))):
            return MOVED
        # Each part steps through a digit of the number of an example: from `low` to `high` in the merged positions.
        digits: list[tuple[int, int, int]] = []
        for low, size, stride in sorted((o.after * behind[i], o.size, o.stride) for i, o in parts.items()):
            if digits and digits[-1][1] == low and stride == digits[-1][2] * (low // digits[-1][0]):
                digits[-1] = digits[-1][0], low * size, digits[-1][2]
            else:
                digits.append((low, low * size, stride))
        end, found = rest * out[axis], []
        for low, high, stride in digits:
            start, stop = max(low, rest), min(high, end)
            if start >= stop:
                if low % end and rest % high:
                    return MOVED
            else:
                if start % low or start % rest or stop % start or end % stop:
                    return MOVED
                found.append(Examples(end // stop, stop // start, start // rest, stride * (start // low)))
        return found[0] if len(found) == 1 else MOVED if found else NONE

    def lookup(self, eqn: Equation, row: Row, axis: int, pairs: Pairs) -> Origin:
        """Through a gather: examples are looked up, or something for each of them."""
        (table, u), (indices, v) = pairs
        assert row.columns is not None and row.paired is not None
        columns, at = row.columns(eqn), row.held(eqn, 1, axis)
        if at is None:
            i = row.held(eqn, 0, axis)
            assert i is not None
            cut = i in columns and table.batched and grows(table, u, i)
            return lost(MOVED) if cut else Origin(_at(table, u, None if i in columns else i))
        by_indices = _at(indices, v, at)
        for i, d in row.paired(eqn).items():
            if d == at:
                return Origin(_learning([*_at(table, u, i), *by_indices]))
        sources, examples = [], False
        for i, column in columns.items():
            positions = column_of(indices, column)
            if positions is not None:
                sources += _at(table, u, i, self.chosen(positions, table.aval.shape[i], at))
            elif table.batched:
                examples |= may_hold(table, u, i)
        if not examples and not sources:
            return Origin(by_indices)
        # A source without examples along its axis leaves it to the others.
        return Origin(sources, functools.partial(_first, empty=MOVED, none=MOVED if examples else NONE))

    def write(self, eqn: Equation, row: Row, axis: int, pairs: Pairs) -> Origin:
        """Through a scatter: updates go to examples by index, or into the features of each."""
        (x, u), (indices, _), (updates, w) = pairs
        assert row.columns is not None and row.updates is not None
        sources, columns = [*_at(x, u, axis), *_at(updates, w, row.held(eqn, 2, axis))], row.columns(eqn)
        if axis in columns and updates.batched:
            positions = column_of(indices, columns[axis])
            place = None if positions is None else counts(positions, x.aval.shape[axis])
            if place is None:
                return lost(MOVED)
            sources += _at(updates, w, row.updates(eqn)[place])
        return Origin(sources, functools.partial(_first, empty=MOVED))

    def chosen(self, taken: Any, size: Any, axis: int) -> Callable[[Examples], Order]:
        """What comes from an axis of so many positions: kept if these are all examples, equally often and in order.

        Args:
          taken: the positions, or a slice.
          size: the length of the axis.
          axis: the axis of the positions that is asked for.
        """

        def then(order: Examples) -> Order:
            if any(map(is_symbolic_dim, (size, *order))):
                return MOVED
            positions = np.arange(size)[taken] if isinstance(taken, slice) else np.clip(taken, 0, size - 1)
            found = np.moveaxis(positions // order.after % order.size, axis, 0)
            found = found.reshape(found.shape[0], -1)
            if not found.size or (found != found[:, :1]).any():
                return MOVED
            if np.array_equal(positions, np.arange(size)):
                return order
            found = found[:, 0]
            times = len(found) if order.size == 1 else int(np.argmax(found != 0))  # how often the first comes first
            if not times or len(found) % (order.size * times):
                return MOVED
            rounds = len(found) // (order.size * times)
            in_order = np.tile(np.repeat(np.arange(order.size), times), rounds)
            return order._replace(before=rounds, after=times) if np.array_equal(found, in_order) else MOVED

        return then


def _divided(size: Any, by: Any) -> Any:
    """The quotient; None if there is a remainder."""
    return size if by == 1 else size // by if size % by == 0 else None


def _repeated(times: int, order: Examples) -> Order:
    return order._replace(before=order.before * times)


def _elements(row: Row, a: Value, axis: int, pairs: Pairs) -> Origin:
    """Through an elementwise function: the results of a choice count, not what decides."""
    lies = arranged(a) or {}
    found = [
        s for k, (u, v) in enumerate(pairs) if len(getattr(u.aval, "shape", ())) == len(a.aval.shape)
        for s in _at(u, v, lies[k][axis] if lies.get(k) else axis)
    ]  # fmt: skip
    if row.combines == "select":
        found = [s for s in found if s.value is not pairs[0][0]] or found
    return Origin(_learning(found))


def _body(eqn: Equation, a: Value, b: Twin, axis: int, pairs: Pairs) -> Origin:
    """Through a function: the axis is followed inside."""
    ins = []
    for u, _ in pairs:  # as constants and data, so that nothing else is found
        value = Value(u.aval, data=u.batched, batched=u.batched, smooth=u.smooth or bool(u.differentiable))
        value.operands, value.known = (u,), known_numbers(u)
        ins.append(value)
    _, outs = Analysis([], [], {}).walk(call_body(eqn), ins, (), (), ())
    inner = outs[a.result]
    return Origin(_at(inner, beside(b, inner), axis))


def _loop(eqn: Equation, a: Value, b: Twin, axis: int, u: Value, v: Twin) -> Origin:
    """Through a scan, to its last carry or a stacked output; the latter's first axis is that of the scanned values."""
    outer = axis - len(a.aval.shape) + len(u.aval.shape)
    if outer >= 0:
        return Origin(_at(u, v, outer))
    assert a.block is not None
    sources = []
    for k in range(sum(scan_counts(eqn.params)), len(eqn.invars)):
        x = a.block.value(eqn.invars[k])
        if isinstance(b, Value):
            assert b.block is not None and b.producer is not None
            sources += _at(x, b.block.value(b.producer.invars[k]), 0)
        else:
            sources += _at(x, beside(b, x), 0)
    # An index that is scanned in place of examples may go to any of them.
    return Origin(sources, functools.partial(_first, empty=MOVED if grows(a, b, axis) else NONE))


def _product(eqn: Equation, row: Row, axis: int, pairs: Pairs) -> Origin:
    """Through a product: if examples are summed, the other operand must bring them in their order."""
    sources, summed, brings = [], False, None
    for k, (u, v) in enumerate(pairs):
        contracted, at = row.contracted(eqn, k), row.held(eqn, k, axis)
        if at is not None and at not in contracted:
            brings = u
            sources += _at(u, v, at)
        summed |= u.batched and any(grows(u, v, i) for i in contracted)
    if not summed or brings is None:
        return Origin(_learning(sources))
    if brings.batched:
        return Origin(sources, functools.partial(_first, empty=MOVED, none=MOVED))
    matrix = known_numbers(brings)
    one = matrix is not None and matrix.ndim == 2 and (np.count_nonzero(np.asarray(matrix), axis=1) == 1).all()
    moves = one and not np.diagonal(np.asarray(matrix)).all()  # as jnp.eye(n)[::-1]; the edges of a graph mix its nodes
    return lost(MOVED if moves else UNKNOWN)
