"""The axes of parameters that the dimensions of a value hold."""

from __future__ import annotations

from typing import Any

from lrules.engine.jaxprs import Aval, Equation
from lrules.engine.operations import of
from lrules.engine.records import Layer, Value, classes_of, spread_of, united


def slice_of(value: Value, aval: Aval, key: tuple[Any, ...]) -> Value:
    """One slice of a scanned value: it counts as a new definition."""
    axes = {}
    for i, (dims, sliced) in value.axes.items():
        axes[i] = (dims[1:], sliced | frozenset(dims[0]))
    varies = frozenset(d - 1 for d in value.spread if d > 0)
    return Value(
        aval, **classes_of(value), axes=axes, varies=varies, operands=(value,), lookups=value.lookups,
        loops=value.loops | ({key} if not value.data or value.chosen else set()), carried=value.carried,
    )  # fmt: skip


def _through(axes: Any, dims: frozenset[int]) -> frozenset[int]:
    return frozenset(j for j, held in enumerate(axes) if dims & set(held))


def varying_dims(eqn: Equation, ins: list[Value], aval: Aval, axes: Any) -> frozenset[int] | None:
    """The dimensions along which a value is not only broadcast, for `Value.varies`."""
    row = of(eqn)
    full = spread_of(aval)
    if axes is not None:
        varies = _through(axes, ins[0].spread) & full
    elif row.kind == "view" and row.lies is not None:  # it repeats elements
        lies = row.lies(eqn, 0)
        varies = frozenset(lies[i] for i in ins[0].spread)
    elif row.elementwise:
        varies = united(v.spread for v in ins) & full
    else:
        return None
    return None if varies == full else varies


def parameter_axes(eqn: Equation, ins: list[Value], aval: Aval, axes: Any) -> dict[int, Any]:
    """The axes of parameters that the dimensions of a value made from parameters hold."""
    row = of(eqn)
    ndim = len(getattr(aval, "shape", ()))
    found: dict[int, Any] = {}

    def add(i: int, dims: Any, sliced: Any) -> None:
        if i not in found or sum(map(len, dims)) > sum(map(len, found[i][0])):
            found[i] = (dims, sliced)

    for k, value in enumerate(ins):
        for i, (dims, sliced) in value.axes.items():
            if axes is not None:
                kept = tuple(tuple(a for j in held for a in dims[j]) for held in axes)
                gone = frozenset(a for d in dims for a in d) - frozenset(a for d in kept for a in d)
                add(i, kept, sliced | gone if gone else sliced)
            elif row.lies is not None:
                new: list[tuple[int, ...]] = [()] * ndim
                lies = row.lies(eqn, k)
                for j, o in lies.items():
                    new[o] = dims[j]
                gone = frozenset(a for j, held in enumerate(dims) if j not in lies for a in held)
                add(i, tuple(new), sliced | gone if gone and row.looks_up and k == 0 else sliced)
            elif len(dims) == ndim:
                add(i, dims, sliced)
            else:
                add(i, ((),) * ndim, sliced)
    return found


def output_parameter_axes(layer: Layer) -> dict[int, Any]:
    """The axes of its parameters that the dimensions of a layer's output hold."""
    came_from = {o: a for a, o in layer.output_axes.items()}
    ndim = len(layer.output.aval.shape)  # type: ignore[union-attr]
    return {
        i: (tuple(dims[came_from[d]] if d in came_from and dims else () for d in range(ndim)), sliced)
        for i, (dims, sliced) in layer.weight.axes.items()
    }
