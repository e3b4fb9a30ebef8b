"""The equations that are layers: the weight and the operand in a product or a lookup."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lrules.engine.jaxprs import Equation, Jaxpr, open_jaxpr
from lrules.engine.operations import Row, is_product, of
from lrules.engine.records import Value, parts


@dataclasses.dataclass(frozen=True, eq=False)
class Multiplication:
    """The equation of a layer, with its weight and its operand.

    Attributes:
      position: which operand of the equation the weight is.
      contracted, output_axes, sources, mixed: as in `Layer`.
      shape: of what comes out.
    """

    weight: Value
    operand: Value
    contracted: Sequence[int]
    output_axes: dict[int, int]
    position: int
    sources: frozenset[int]
    shape: tuple[int, ...]
    mixed: bool = False


def multiplies(jaxpr: Jaxpr) -> bool:
    """Whether there are products in a jaxpr or the jaxprs inside it."""
    jaxpr, _ = open_jaxpr(jaxpr)
    inner = [v for eqn in jaxpr.eqns for v in eqn.params.values() if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
    return any(map(is_product, jaxpr.eqns)) or any(map(multiplies, inner))


def multiplication(eqn: Equation, ins: list[Value]) -> Multiplication | None:
    """The layer of an equation; None if it is not a layer."""
    row = of(eqn)
    if row.looks_up:
        operand = next((v for v in ins[1:] if v.data), None)
        return _layer(row, eqn, ins, 0, ins[0].params, operand) if ins[0].pure and operand is not None else None
    if not is_product(eqn):
        return None
    side, sources = _either_side(row, eqn, ins) if row.either else _one_side(row, eqn, ins)
    return None if side is None else _layer(row, eqn, ins, side, sources, ins[1 - side])


def _layer(
    row: Row, eqn: Equation, ins: list[Value], side: int, sources: frozenset[int], operand: Value
) -> Multiplication:
    contracted, w = row.contracted(eqn, side), ins[side]
    lies = row.lies(eqn, side) if row.lies is not None else {}
    output_axes = {axis: out for axis, out in lies.items() if axis not in contracted}
    shape = tuple(eqn.outvars[0].aval.shape)
    mixed = not (w.pure or w.chosen)
    return Multiplication(w, operand, contracted, output_axes, side, sources, shape, mixed)


def of_latents(eqn: Equation, ins: list[Value]) -> Multiplication | None:
    """The first product of a network without a batch, of two parameters: learned latents and a weight.

    The latents are a vector, or else what stands on the left. Two that are made of one parameter are no layer.
    """
    if not of(eqn).either or not is_product(eqn) or ins[0].params & ins[1].params:
        return None
    latents = 1 if len(ins[1].aval.shape) < len(ins[0].aval.shape) == 2 else 0
    seen = [dataclasses.replace(v, data=k == latents) for k, v in enumerate(ins)]
    found = multiplication(eqn, seen)
    return None if found is None else dataclasses.replace(found, weight=ins[1 - latents], operand=ins[latents])


def transformed(eqn: Equation, ins: list[Value], axes: int) -> Multiplication | None:
    """An elementwise product between a Fourier transform over the last axes and its inverse."""
    pure = [k for k, v in enumerate(ins) if v.pure]
    if not axes or of(eqn).combines != "product" or len(pure) != 1:
        return None
    w, shape = ins[pure[0]], tuple(eqn.outvars[0].aval.shape)
    contracted = range(len(shape) - axes, len(shape))
    kept = {d: d for d in range(len(shape) - axes) if d in w.spread}
    return Multiplication(w, ins[1 - pure[0]], contracted, kept, pure[0], w.params, shape)


def _one_side(row: Row, eqn: Equation, ins: list[Value]) -> tuple[int | None, frozenset[int]]:
    """The weight of a product that has it on one side only, and the parameters from which it is made."""
    (side,) = row.weights
    w, x = ins[side], ins[1 - side]
    if x.pure and not any(v.data for v in ins[2:]):
        return None, frozenset()
    sources = w.differentiable if w.pure or w.chosen else _mixed(row, eqn, ins, side)
    return (side if sources else None), sources


def _either_side(row: Row, eqn: Equation, ins: list[Value]) -> tuple[int | None, frozenset[int]]:
    """The operand of a product that is the weight, and the parameters from which it is made."""
    if ins[0].pure != ins[1].pure:
        side = 0 if ins[0].pure else 1
        return side, ins[side].params
    if ins[0].pure:
        return None, frozenset()
    summed = [frozenset(row.contracted(eqn, k)) for k in (0, 1)]
    chosen = [k for k in (0, 1) if ins[k].chosen and ins[k].weight_dims & summed[k]]
    if len(chosen) == 2:  # embeddings; one of them may be looked up as a matrix
        chosen = [k for k in chosen if is_matrix(ins[k].weight_dims, summed[k], row.free(eqn, k))]
    if len(chosen) == 1:
        return chosen[0], ins[chosen[0]].differentiable
    mixed = [_mixed(row, eqn, ins, k) for k in (0, 1)]
    if bool(mixed[0]) != bool(mixed[1]):
        side = 0 if mixed[0] else 1
        return side, mixed[side]
    return None, frozenset()


def _mixed(row: Row, eqn: Equation, ins: list[Value], side: int) -> frozenset[int]:
    """The parameters of a weight that layers have made. It is made for each example and multiplies a hidden signal as
    a matrix, or it is made without a batch and multiplies a value with a batch."""
    w, x = ins[side], ins[1 - side]
    if not (w.both and w.smooth and w.differentiable):
        return frozenset()
    if not w.batched and x.batched:
        return w.differentiable
    summed, free = frozenset(row.contracted(eqn, side)), row.free(eqn, side)
    made = any(p.is_matrix and is_matrix(p.dims, summed, free) for p in w.products)
    return parts(w)[1] if made and x.differentiable else frozenset()


def is_matrix(dims: frozenset[int], contracted: frozenset[int], free: frozenset[int]) -> bool:
    """Whether a value is a matrix in a product: its weight varies along `dims`, and these are its rows and columns."""
    return bool(dims & contracted) and bool(free) and free <= dims


def one_layer(eqn: Equation, ins: list[Value], found: list[Multiplication]) -> Multiplication | None:
    """A function with a custom derivative as one layer: it holds one product, of one weight and data."""
    pure = [k for k, v in enumerate(ins) if v.pure]
    data = [v for v in ins if v.data]
    if len(found) != 1 or len(pure) != 1 or len(eqn.outvars) != 1 or not data or found[0].mixed:
        return None
    inner, w = found[0], ins[pure[0]]
    summed = {(i, a) for i, (dims, _) in inner.weight.axes.items() for d in inner.contracted for a in dims[d]}
    contracted, output_axes = [], {}
    taken: dict[tuple[int, int], int] = {}
    for i, (dims, _) in inner.weight.axes.items():
        taken |= {(i, a): inner.output_axes[d] for d, held in enumerate(dims) if d in inner.output_axes for a in held}
    for d in range(len(w.aval.shape)):
        held = {(i, a) for i, (dims, _) in w.axes.items() for a in dims[d]}
        if held & summed:
            contracted.append(d)
        elif outs := {taken[h] for h in held if h in taken}:
            output_axes[d] = min(outs)
    if not contracted or tuple(eqn.outvars[0].aval.shape) != inner.shape:
        return None
    operand = next((v for v in data if v.differentiable or v.smooth), data[0])
    return Multiplication(w, operand, contracted, output_axes, pure[0], w.params, inner.shape)


def stage(eqn: Equation, ins: list[Value]) -> int:
    """For a value made from parameters: 1 after a product, 2 after a nonlinearity that followed a product.

    A number by which all is multiplied or divided, as a spectral norm, does not count.
    """
    row = of(eqn)
    factors = [v for v in ins if v.spread] if row.combines in ("product", "quotient") else ins
    highest = max((v.stage for v in factors), default=0)
    if is_product(eqn):
        return max(highest, 1)
    if row.combines == "product":
        bends = sum(v.stage > 0 for v in factors) > 1
    elif row.combines == "quotient":
        bends = len(factors) > 1 and factors[1].stage > 0
    elif row.combines == "select":
        bends = bool(ins[0].stage)
    else:
        bends = row.kind == "call" or (row.nonlinear and row.curve != "comparison")
    return 2 if bends and highest else highest
