"""Products of weights and data that a model sums by hand, not by a dot product: rules would not see these layers.

A product is *outer* if the weight varies where the data were broadcast, as in `h[:, :, None] * w`. Otherwise it is a
*scale*, as in `h * gamma`. This file follows both through linear operations. Outer products are refused where they are
summed. Scales are usual, and are refused only in three cases: the scaled values are summed over the axes of the scale
into a neuron, they multiply other data as a matrix, or slices of one parameter scale values that are then added (a
convolution written as shifts). *Distances* are nonlinear functions of outer sums, differences and products, as in
`(h[:, None] - m) ** 2`. They are refused where they are summed into one number for each row of the weight.

If the weight of a layer has several axes of outputs, the *output* may be a matrix for each example; `analysis.py` uses
this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lrules.engine.jaxprs import JITS, Equation, open_jaxpr
from lrules.engine.operations import is_product, of

MOST = 8  # the number of products that are followed in one value

BY_HAND = (
    "the parameter {name} is multiplied by data elementwise and the product is summed, a layer written by hand: write "
    "it as a dot product or convolution (jnp.dot, jnp.einsum)"
)

DISTANCES = (
    "a nonlinear function of the parameter {name} and data, a distance for example, is summed into one number for each "
    "row of the parameter, a layer written by hand: write it with a dot product (|h|^2 - 2 h.m + |m|^2)"
)


@dataclasses.dataclass(frozen=True, eq=False)
class HandProduct:
    """A product of `weight` and data in a value: `dims` are the axes along which the weight varies.

    Attributes:
      kind: `"product"`, `"sum"` of the two, `"distance"`, `"output"` of a layer, or `"base"`: a matrix added to data.
      rank: the number of axes along which the weight varied at first.
      bare: whether the product has since only been moved, cut and multiplied by numbers.
      key: the key of the equation that made it.
    """

    weight: Any
    dims: frozenset[int]
    outer: bool
    kind: str
    rank: int
    bare: bool = True
    key: Any = None

    @property
    def is_matrix(self) -> bool:
        """Whether it may be a matrix for each example."""
        return self.kind in ("output", "base")

    @property
    def params(self) -> frozenset[int]:
        return self.weight.differentiable

    def is_slice_beside(self, other: HandProduct) -> bool:
        """Whether the two hold different slices of one parameter."""
        if self.weight is other.weight or not self.params & other.params:
            return False
        if not (self.bare or self.outer) or not (other.bare or other.outer):
            return False
        return (self.outer and other.outer) or _cuts(self.weight) != _cuts(other.weight)


def _cuts(weight: Any) -> set[str]:
    """The slices of parameters from which a weight is computed."""
    found, stack, seen = set(), [weight], set()
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        eqn = value.producer
        if eqn is not None and of(eqn).cuts:
            literals = [str(v.val) for v in eqn.invars if hasattr(v, "val")]
            found.add(f"{of(eqn).name} {eqn.params} {literals} {value.result}")
        stack.extend(value.operands)
    return found


def of_layer(layer: Any) -> tuple[HandProduct, ...]:
    """The output of a layer, if it may hold a matrix for each example."""
    members = layer.row.members(layer.eqn, layer.position)
    free = frozenset(o for a, o in layer.output_axes.items() if a not in members)
    several = len(free) > 1 or any(layer.output.aval.shape[o] != 1 for o in free)  # an axis may be split
    return (HandProduct(layer.weight, free, False, "output", len(free)),) if several else ()


def made(eqn: Equation, ins: Sequence[Any], out: Any) -> list[HandProduct]:
    """The products of a weight and data that an equation makes."""
    row = of(eqn)
    weighs = [v.pure or _is_weight(v, other) for v, other in zip(ins, ins[::-1], strict=True)]
    if len(ins) != 2 or weighs[0] == weighs[1] or not hasattr(out.aval, "shape"):
        return []
    side = 0 if weighs[0] else 1
    weight, data = ins[side], ins[1 - side]
    if not data.data or (out.chosen and not data.differentiable):  # rows, or a weight, chosen by a mask
        return []
    if row.elementwise and row.combines:
        if len(weight.aval.shape) not in (0, len(out.aval.shape)):
            return []
        dims = frozenset(weight.spread if weight.pure else weight.weight_dims & weight.spread)
        outer = bool(dims - data.spread)
        if row.combines in ("product", "quotient"):
            return [HandProduct(weight, dims, outer, "product", len(dims))]
        linear, differs = row.combines == "sum", outer and bool(dims & data.spread) and bool(data.differentiable)
        found = [HandProduct(weight, dims, True, "sum" if linear else "distance", len(dims))] if differs else []
        is_base = len(dims) > 1 and (linear or (row.combines == "extreme" and not data.differentiable))
        return found + ([HandProduct(weight, dims, False, "base", len(dims))] if is_base else [])
    if row.either and row.lies is not None and not is_product(eqn):  # an outer product
        places = []
        for k, v in enumerate(ins):
            lies = row.lies(eqn, k)
            places.append(frozenset(lies[d] for d in v.spread))
        dims = places[side]
        return [HandProduct(weight, dims, bool(dims - places[1 - side]), "product", len(dims))]
    return []


def _is_weight(value: Any, other: Any) -> bool:
    """Whether this value is the weight, of two values that meet and do not depend on parameters alone."""
    chosen = value.chosen and not other.chosen and other.data
    return chosen or (value.both and not value.batched and other.batched)


def passed(eqn: Equation, ins: Sequence[Any], out: Any, axes: Any) -> list[HandProduct]:
    """The products that an equation passes on; `axes` as from `view_axes`."""
    row = of(eqn)
    ndim = len(getattr(out.aval, "shape", ()))
    linear = row.carries or _is_where(eqn)
    bends = row.nonlinear or row.combines == "product" or row.kind == "call"
    factors, quotient = row.combines in ("product", "quotient"), row.combines == "quotient"
    both = sum(v.both for v in ins) > 1
    found = []
    for k, value in enumerate(ins):
        for product in value.products:
            kind, dims = product.kind, product.dims
            if not linear or (factors and both):
                if not bends or len(value.aval.shape) != ndim or (quotient and k == 1):
                    continue  # what data weigh a layer's output by, and sum, are recorded values, as in attention
                if product.is_matrix and not (quotient and k == 0):  # but a kernel that is normalised remains one
                    continue
                if not product.is_matrix and not product.outer:
                    continue
                kind = kind if product.is_matrix else "distance"
            if product.is_matrix and row.kind == "reduction":
                continue
            if axes is not None:
                dims = frozenset(j for j, held in enumerate(axes) if dims & set(held))
            elif row.kind in ("view", "reduction") and row.lies is not None:
                dims = frozenset(o for d, o in row.lies(eqn, k).items() if d in dims)
            elif len(value.aval.shape) != ndim:
                dims = frozenset(range(ndim))
            if dims or not product.dims:
                moved = axes is not None or row.bare or (row.combines == "sum" and not both)
                bare = product.bare and moved
                if (dims, kind, bare) != (product.dims, product.kind, product.bare):
                    product = dataclasses.replace(product, dims=dims, kind=kind, bare=bare)
                found.append(product)
    return found


def _is_where(eqn: Equation) -> bool:
    return of(eqn).name in JITS and all(of(e).carries for e in open_jaxpr(eqn.params["jaxpr"])[0].eqns)


def summed(eqn: Equation, ins: Sequence[Any], block: Any) -> list[tuple[HandProduct, str]]:
    """The products that an equation sums, each with the message about it."""
    hit: list[tuple[HandProduct, str]] = []
    for k, value in enumerate(ins):
        for product in value.products:
            if product.kind == "product" and product.dims & _summed_axes(eqn, ins, k, product, block):
                hit.append((product, BY_HAND))
            elif product.kind in ("distance", "sum") and (axes := _distance_axes(eqn, ins, k, product, block)):
                if product.dims & axes and product.dims - axes:
                    hit.append((product, DISTANCES))
    if of(eqn).combines == "sum" and len(ins) == 2:
        for p in ins[0].products:
            for q in ins[1].products:
                if p.kind == q.kind == "product" and p.is_slice_beside(q):
                    hit.append((p, BY_HAND))
    return hit


def _distance_axes(eqn: Equation, ins: Sequence[Any], k: int, product: HandProduct, block: Any) -> frozenset[int]:
    """The axes of operand `k` along which an equation sums distances, or multiplies differences by each other."""
    row, done = of(eqn), product.kind == "distance"
    if row.kind == "product" and k < 2:
        twice = any(p.kind == product.kind and p.params & product.params for p in ins[1 - k].products)
        constant = done and not (ins[1 - k].params or ins[1 - k].data)
        summed = twice or constant
    else:
        summed = row.kind in ("reduction", "cumulative") and done and not (row.totals and _is_mean(eqn, block))
    return frozenset(row.reduced(eqn, k)) if summed else frozenset()


def _summed_axes(eqn: Equation, ins: Sequence[Any], k: int, product: HandProduct, block: Any) -> frozenset[int]:
    """The axes of operand `k` along which an equation sums values that must not be summed."""
    row, axes = of(eqn), frozenset(of(eqn).reduced(eqn, k))
    if row.kind == "product" and k < 2:
        free, other = frozenset(range(len(ins[k].aval.shape))) - axes - set(row.members(eqn, k)), ins[1 - k]
        matrix = other.data and product.dims & free and free <= product.dims
        wrong = (product.outer and not other.pure) or matrix
    elif row.kind == "reduction" and row.totals:
        whole = product.rank <= 1 or product.dims <= axes  # not a row of a matrix
        wrong = product.outer or not (whole and _is_mean(eqn, block))
    elif row.kind == "transform":
        wrong = product.outer or jnp.issubdtype(product.weight.aval.dtype, jnp.complexfloating)
    else:
        wrong = product.outer or row.kind == "scatter"
    return axes if wrong else frozenset()


def _is_mean(eqn: Equation, block: Any) -> bool:
    """Whether a sum is only divided by a number, as a mean is: statistics of scaled values are not a neuron."""
    variables, divided = list(eqn.outvars[:1]), False
    while variables:
        for index in block.readers.get(variables.pop(), ()):
            if index < 0:
                continue
            user = block.jaxpr.eqns[index]
            row = of(user)
            if row.kind == "view" or row.casts:
                variables.append(user.outvars[0])
            elif row.combines in ("product", "quotient") and any(hasattr(v, "val") for v in user.invars):
                divided = True
            else:
                return False
    return divided
