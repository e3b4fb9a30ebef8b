"""Products of weights and data that a model sums by hand, in place of a dot product: layers that no rule would see.

A product is *outer* if the weight varies where the data were broadcast, as in `h[:, :, None] * w`, and a *scale* if
not, as in `h * gamma`. Outer products are followed through all that is linear, and refused where they are summed.
Scales are ordinary; they are refused only where the scaled values themselves are summed over the scale's own axes into
a neuron, or where slices of one parameter scale what is then added up (a convolution written as shifts).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

LINEAR = {"add", "add_any", "sub", "neg", "mul", "div", "select_n", "convert_element_type", "copy", "copy_p", "name",
          "reduce_precision", "real", "imag", "pad", "concatenate", "stack", "slice", "dynamic_slice", "rev", "gather",
          "squeeze", "reshape", "transpose", "broadcast_in_dim", "expand_dims", "split", "pvary",
          "optimization_barrier", "sharding_constraint", "reshard", "mesh_cast", "layout_constraint",
          "dynamic_update_slice", "reduce_sum"}  # fmt: skip
FOR_SCALES = {"neg", "mul", "div", "convert_element_type", "copy", "copy_p", "name", "reduce_precision", "pad", "slice"}
BY_HAND = (
    "the parameter {name} is multiplied by data elementwise and the product is summed, a layer written by hand: write "
    "it as a dot product or convolution (jnp.dot, jnp.einsum), or give that parameter backprop() in a partition"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """Where a value holds a product of `weight` and data: `dims` are the axes along which the weight varies."""

    weight: Any
    dims: frozenset[int]
    outer: bool

    @property
    def params(self) -> frozenset[int]:
        return self.weight.params

    def is_slice_beside(self, other: Product) -> bool:
        """Whether the two hold different slices of one parameter."""
        if self.weight is other.weight or not self.params & other.params:
            return False
        return (self.outer and other.outer) or _cuts(self.weight) != _cuts(other.weight)


def _cuts(weight) -> set[str]:
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


def made(eqn, ins, out) -> list[Product]:
    """The product that an equation makes of a weight and data."""
    name = eqn.primitive.name
    if len(ins) != 2 or ins[0].pure == ins[1].pure:
        return []
    side = 0 if ins[0].pure else 1
    weight, data = ins[side], ins[1 - side]
    if not data.data or not hasattr(out.aval, "shape"):
        return []
    if name == "mul" or (name == "div" and side == 1):
        if len(weight.aval.shape) not in (0, len(out.aval.shape)):
            return []
        return [Product(weight, weight.spread, bool(weight.spread - data.spread))]
    if name == "dot_general" and not eqn.params["dimension_numbers"][0][0]:
        (_, batch) = eqn.params["dimension_numbers"]
        places = []
        for k, v in enumerate(ins):
            free = [d for d in range(len(v.aval.shape)) if d not in batch[k]]
            start = len(batch[0]) if k == 0 else len(out.aval.shape) - len(free)
            where = {d: i for i, d in enumerate(batch[k])} | {d: start + i for i, d in enumerate(free)}
            places.append(frozenset(where[d] for d in v.spread))
        return [Product(weight, places[side], bool(places[side] - places[1 - side]))]
    return []


def passed(eqn, ins, out, axes) -> list[Product]:
    """The products that an equation passes on; `axes` as from `view_axes`."""
    name = eqn.primitive.name
    body = eqn.params.get("jaxpr") if name in ("jit", "pjit") else None
    is_where = body is not None and all(e.primitive.name in LINEAR for e in getattr(body, "jaxpr", body).eqns)
    if name not in LINEAR and not is_where:
        return []
    if name in ("mul", "div") and sum(v.both for v in ins) > 1:
        return []
    ndim = len(getattr(out.aval, "shape", ()))
    found = []
    for value in ins:
        for product in value.products:
            offset = name in ("add", "sub") and not all(v.both for v in ins)
            if not (product.outer or axes is not None or name in FOR_SCALES or offset and not product.dims):
                continue
            dims = product.dims
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
                found.append(Product(product.weight, dims, product.outer))
    return found[:8]


def summed(eqn, ins, block) -> frozenset[int]:
    """The parameters of products that an equation sums up."""
    name = eqn.primitive.name
    hit: frozenset[int] = frozenset()
    for k, value in enumerate(ins):
        for product in value.products:
            axes: Any = ()
            if name == "reduce_sum":
                axes = eqn.params["axes"]
                if not product.outer and _is_mean(eqn, block):
                    continue
            elif name in ("cumsum", "cumlogsumexp") and product.outer:
                axes = (eqn.params["axis"],)
            elif name == "reduce_window_sum" and product.outer:
                axes = tuple(d for d, n in enumerate(eqn.params["window_dimensions"]) if n != 1)
            elif name == "dot_general" and product.outer and not ins[1 - k].pure:
                axes = eqn.params["dimension_numbers"][0][k]
            elif name == "conv_general_dilated" and product.outer and not ins[1 - k].pure:
                axes = product.dims
            elif name in ("scatter-add", "scatter_add") and k == 2:
                axes = product.dims - set(eqn.params["dimension_numbers"].update_window_dims)
            elif name == "fft" and (product.outer or jnp.issubdtype(product.weight.aval.dtype, jnp.complexfloating)):
                axes = product.dims
            if product.dims & set(axes):
                hit |= product.params
    if name in ("add", "add_any", "sub") and len(ins) == 2:
        for p in ins[0].products:
            for q in ins[1].products:
                if p.is_slice_beside(q):
                    hit |= p.params & q.params
    return hit


def _is_mean(eqn, block) -> bool:
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
