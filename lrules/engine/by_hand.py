"""Products of weights and data that a model sums by hand, in place of a dot product: layers that no rule would see.

A product is *outer* if the weight varies where the data were broadcast, as in `h[:, :, None] * w`, and a *scale* if
not, as in `h * gamma`. Both are followed through all that is linear. Outer products are refused where they are summed.
Scales are ordinary; they are refused only where the scaled values are summed over the scale's own axes into a neuron,
where they multiply other data as a matrix, or where slices of one parameter scale what is then added up (a convolution
written as shifts). *Distances* are nonlinear functions of outer sums, differences and products, as in
`(h[:, None] - m) ** 2`: they are refused where they are summed into one number for each row of the weight.

The *output* of a layer whose weight has several axes of outputs may be a matrix for each example; `analysis.py` asks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lrules.engine.activations import NONLINEAR
from lrules.engine.jaxprs import CALLS, Equation

LINEAR = {"add", "add_any", "sub", "neg", "mul", "div", "select_n", "convert_element_type", "copy", "copy_p", "name",
          "reduce_precision", "real", "imag", "pad", "concatenate", "stack", "slice", "dynamic_slice", "rev", "gather",
          "squeeze", "reshape", "transpose", "broadcast_in_dim", "expand_dims", "split", "pvary",
          "optimization_barrier", "sharding_constraint", "reshard", "mesh_cast", "layout_constraint",
          "dynamic_update_slice", "reduce_sum"}  # fmt: skip

FOR_SCALES = {"neg", "mul", "div", "convert_element_type", "copy", "copy_p", "name", "reduce_precision", "pad", "slice"}

BENDING = NONLINEAR | CALLS.keys() | {"mul"}

MOST = 8  # so many products are followed in one value

REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod"}

BY_HAND = (
    "the parameter {name} is multiplied by data elementwise and the product is summed, a layer written by hand: write "
    "it as a dot product or convolution (jnp.dot, jnp.einsum)"
)

DISTANCES = (
    "a nonlinear function of the parameter {name} and data, a distance for example, is summed into one number for each "
    "row of the parameter, a layer written by hand: write it with a dot product (|h|^2 - 2 h.m + |m|^2)"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """Where a value holds a product of `weight` and data: `dims` are the axes along which the weight varies.

    Attributes:
      kind: `"product"`, `"sum"` of the two, `"distance"`, `"output"` of a layer, or `"base"`: a matrix added to data.
      rank: along how many axes the weight varied in the beginning.
      bare: it has only been moved, cut and multiplied by numbers since.
      key: of the equation that made it.
    """

    weight: Any
    dims: frozenset[int]
    outer: bool
    kind: str = "product"
    rank: int = 1
    bare: bool = True
    key: Any = None

    @property
    def is_matrix(self) -> bool:
        """Whether it may be a matrix for each example."""
        return self.kind in ("output", "base")

    @property
    def params(self) -> frozenset[int]:
        return self.weight.differentiable

    def is_slice_beside(self, other: Product) -> bool:
        """Whether the two hold different slices of one parameter."""
        if self.weight is other.weight or not self.params & other.params:
            return False
        if not (self.bare or self.outer) or not (other.bare or other.outer):
            return False
        return (self.outer and other.outer) or _cuts(self.weight) != _cuts(other.weight)


def _cuts(weight: Any) -> set[str]:
    """Which slices of parameters a weight is computed from."""
    found, stack, seen = set(), [weight], set()
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        eqn = value.producer
        if eqn is not None and eqn.primitive.name in ("slice", "dynamic_slice", "gather", "split"):
            literals = [str(v.val) for v in eqn.invars if hasattr(v, "val")]
            which = [i for i, out in enumerate(eqn.outvars) if out.aval is value.aval]
            found.add(f"{eqn.primitive.name} {eqn.params} {literals} {which}")
        stack.extend(value.operands)
    return found


def of_layer(layer: Any) -> tuple[Product, ...]:
    """The output of a layer, if it may hold a matrix for each example."""
    batch = layer.eqn.params["dimension_numbers"][1] if layer.operation == "dot_general" else ((), ())
    free = frozenset(o for a, o in layer.output_axes.items() if a not in batch[layer.position])
    several = len(free) > 1 or any(layer.output.aval.shape[o] != 1 for o in free)  # an axis may be taken apart
    return (Product(layer.weight, free, False, "output", len(free)),) if several else ()


def made(eqn: Equation, ins: Sequence[Any], out: Any) -> list[Product]:
    """The product that an equation makes of a weight and data."""
    name = eqn.primitive.name
    weighs = [v.pure or _is_weight(v, other) for v, other in zip(ins, ins[::-1], strict=True)]
    if len(ins) != 2 or weighs[0] == weighs[1] or not hasattr(out.aval, "shape"):
        return []
    side = 0 if weighs[0] else 1
    weight, data = ins[side], ins[1 - side]
    if not data.data or (out.chosen and not data.differentiable):  # rows, or a weight, chosen by a mask
        return []
    if name in ("mul", "div", "add", "sub", "max", "min", "atan2", "pow"):
        if len(weight.aval.shape) not in (0, len(out.aval.shape)):
            return []
        dims = frozenset(weight.spread if weight.pure else weight.weight_dims & weight.spread)
        outer = bool(dims - data.spread)
        if name in ("mul", "div"):
            return [Product(weight, dims, outer, "product", len(dims))]
        linear, differs = name in ("add", "sub"), outer and bool(dims & data.spread) and bool(data.differentiable)
        found = [Product(weight, dims, True, "sum" if linear else "distance", len(dims))] if differs else []
        is_base = len(dims) > 1 and (linear or (name in ("max", "min") and not data.differentiable))
        return found + ([Product(weight, dims, False, "base", len(dims))] if is_base else [])
    if name == "dot_general" and not eqn.params["dimension_numbers"][0][0]:
        (_, batch) = eqn.params["dimension_numbers"]
        places = []
        for k, v in enumerate(ins):
            free = [d for d in range(len(v.aval.shape)) if d not in batch[k]]
            start = len(batch[0]) if k == 0 else len(out.aval.shape) - len(free)
            where = {d: i for i, d in enumerate(batch[k])} | {d: start + i for i, d in enumerate(free)}
            places.append(frozenset(where[d] for d in v.spread))
        dims = places[side]
        return [Product(weight, dims, bool(dims - places[1 - side]), "product", len(dims))]
    return []


def _is_weight(value: Any, other: Any) -> bool:
    """Whether of two values that meet, neither made of parameters alone, this one is the weight."""
    chosen = value.chosen and not other.chosen and other.data
    return chosen or (value.both and not value.batched and other.batched)


def passed(eqn: Equation, ins: Sequence[Any], out: Any, axes: Any) -> list[Product]:
    """The products that an equation passes on; `axes` as from `view_axes`."""
    name = eqn.primitive.name
    ndim = len(getattr(out.aval, "shape", ()))
    linear = name in LINEAR or _is_where(eqn)
    both = sum(v.both for v in ins) > 1
    found = []
    for k, value in enumerate(ins):
        for product in value.products:
            kind, outer, dims = product.kind, product.outer, product.dims
            if not linear or (name in ("mul", "div") and both):
                if name not in BENDING or len(value.aval.shape) != ndim or (name == "div" and k == 1):
                    continue  # what data weigh a layer's output by, and sum, are recorded values, as in attention
                if product.is_matrix and not (name == "div" and k == 0):  # but a kernel that is normalised remains one
                    continue
                if not product.is_matrix and not outer:
                    continue
                kind = kind if product.is_matrix else "distance"
            if product.is_matrix and name == "reduce_sum":
                continue
            if axes is not None:
                dims = frozenset(j for j, held in enumerate(axes) if dims & set(held))
            elif name == "broadcast_in_dim":
                dims = frozenset(eqn.params["broadcast_dimensions"][d] for d in dims)
            elif name == "reduce_sum":
                kept = [d for d in range(len(value.aval.shape)) if d not in eqn.params["axes"]]
                dims = frozenset(i for i, d in enumerate(kept) if d in dims)
            elif len(value.aval.shape) != ndim:
                dims = frozenset(range(ndim))
            if dims or not product.dims:
                moved = axes is not None or name in FOR_SCALES or (name in ("add", "sub") and not both)
                bare = product.bare and moved
                found.append(dataclasses.replace(product, dims=dims, outer=outer, kind=kind, bare=bare))
    return found


def _is_where(eqn: Equation) -> bool:
    body = eqn.params.get("jaxpr") if eqn.primitive.name in ("jit", "pjit") else None
    return body is not None and all(e.primitive.name in LINEAR for e in getattr(body, "jaxpr", body).eqns)


def summed(eqn: Equation, ins: Sequence[Any], block: Any) -> list[tuple[Product, str]]:
    """The products that an equation sums up, and what to say of them."""
    name = eqn.primitive.name
    hit: list[tuple[Product, str]] = []
    for k, value in enumerate(ins):
        for product in value.products:
            if product.kind == "product" and product.dims & _summed_axes(eqn, ins, k, product, block):
                hit.append((product, BY_HAND))
            elif product.kind in ("distance", "sum") and (axes := _distance_axes(eqn, ins, k, product, block)):
                if product.dims & axes and product.dims - axes:
                    hit.append((product, DISTANCES))
    if name in ("add", "add_any", "sub") and len(ins) == 2:
        for p in ins[0].products:
            for q in ins[1].products:
                if p.kind == q.kind == "product" and p.is_slice_beside(q):
                    hit.append((p, BY_HAND))
    return hit


def _distance_axes(eqn: Equation, ins: Sequence[Any], k: int, product: Product, block: Any) -> frozenset[int]:
    """Along which axes of its operand `k` an equation sums up distances, or multiplies differences by each other."""
    name, done = eqn.primitive.name, product.kind == "distance"
    if name in REDUCTIONS and done:
        return frozenset() if name == "reduce_sum" and _is_mean(eqn, block) else frozenset(eqn.params["axes"])
    if name in ("cumsum", "cumlogsumexp") and done:
        return frozenset([eqn.params["axis"]])
    if name == "dot_general":
        twice = any(p.kind == product.kind and p.params & product.params for p in ins[1 - k].products)
        constant = done and not (ins[1 - k].params or ins[1 - k].data)
        return frozenset(eqn.params["dimension_numbers"][0][k]) if twice or constant else frozenset()
    return frozenset()


def _summed_axes(eqn: Equation, ins: Sequence[Any], k: int, product: Product, block: Any) -> frozenset[int]:
    """Along which axes of its operand `k` an equation sums up what must not be summed."""
    name, outer = eqn.primitive.name, product.outer
    if name == "reduce_sum":
        axes = frozenset(eqn.params["axes"])
        whole = product.rank <= 1 or product.dims <= axes  # not a row of a matrix
        return frozenset() if not outer and whole and _is_mean(eqn, block) else axes
    if name in REDUCTIONS and outer:
        return frozenset(eqn.params["axes"])
    if name == "dot_general":
        contract, batch = (frozenset(a[k]) for a in eqn.params["dimension_numbers"])
        free = frozenset(range(len(ins[k].aval.shape))) - contract - batch
        other = ins[1 - k]
        matrix = other.data and product.dims & free and free <= product.dims
        return contract if (outer and not other.pure) or matrix else frozenset()
    if name == "conv_general_dilated":
        return product.dims if outer and not ins[1 - k].pure else frozenset()
    if name in ("scatter-add", "scatter_add") and k == 2:
        return product.dims - set(eqn.params["dimension_numbers"].update_window_dims)
    if name == "fft":
        complex_ = jnp.issubdtype(product.weight.aval.dtype, jnp.complexfloating)
        return product.dims if outer or complex_ else frozenset()
    if name in ("cumsum", "cumlogsumexp") and outer:
        return frozenset([eqn.params["axis"]])
    if name == "reduce_window_sum" and outer:
        return frozenset(d for d, n in enumerate(eqn.params["window_dimensions"]) if n != 1)
    return frozenset()


def _is_mean(eqn: Equation, block: Any) -> bool:
    """Whether a sum is only divided by a number, as a mean is: statistics of scaled values are no neuron."""
    variables = {eqn.outvars[0]}
    divided = False
    for user in block.jaxpr.eqns:
        if any(v in variables for v in user.invars if not hasattr(v, "val")):
            if user.primitive.name in ("broadcast_in_dim", "reshape", "convert_element_type"):
                variables.add(user.outvars[0])
            elif user.primitive.name in ("div", "mul") and any(hasattr(v, "val") for v in user.invars):
                divided = True
            else:
                return False
    return divided
