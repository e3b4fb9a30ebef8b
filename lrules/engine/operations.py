"""What each primitive of JAX does: what is a weight in it, what the operand, and which axes become which."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax.export import is_symbolic_dim

from lrules.engine.activations import COMPARISONS, NONLINEAR
from lrules.engine.jaxprs import CALLS, Equation, Jaxpr, open_jaxpr
from lrules.engine.records import Value, parts

ELEMENTWISE = {
    "add", "add_any", "sub", "mul", "div", "max", "min", "pow", "rem", "atan2", "nextafter", "and", "or", "xor", "eq",
    "ne", "lt", "gt", "le", "ge", "select_n", "clamp", "complex", "igamma", "igammac", "regularized_incomplete_beta",
    "neg", "abs", "exp", "exp2", "log", "log1p", "expm1", "sqrt", "rsqrt", "cbrt", "tanh", "sin", "cos", "tan",
    "logistic", "erf", "erfc", "erf_inv", "integer_pow", "square", "sign", "floor", "ceil", "round", "is_finite", "not",
    "convert_element_type", "stop_gradient", "reduce_precision", "copy", "copy_p", "real", "imag", "name", "asinh",
    "acosh", "atanh", "asin", "acos", "atan", "sinh", "cosh", "lgamma", "digamma", "pvary", "population_count",
}  # fmt: skip


STRUCTURAL = {"concatenate", "stack", "dynamic_update_slice", "pad", "scatter", "scatter-add", "scatter_add",
              "scatter_mul",
              "scatter-mul", "scatter_max", "scatter_min", "scatter-max", "scatter-min", "iota", "argmax", "argmin",
              "sort", "split", "slice", "rev", "gather", "dynamic_slice", "dot_general", "optimization_barrier",
              "reduce_window_sum", "threefry2x32", "random_bits", "debug_callback", "debug_print"}  # fmt: skip

SAME_SHAPE_VIEWS = {"convert_element_type", "copy", "copy_p", "name", "pvary", "sharding_constraint", "reshard",
                    "mesh_cast", "layout_constraint", "reduce_precision", "optimization_barrier"}  # fmt: skip


def reshape_groups(a: Sequence[int], b: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Axes of `a` that become axes of `b` under a reshape, in the smallest groups."""
    groups, i, j = [], 0, 0
    while i < len(a) or j < len(b):
        left, right = [i] if i < len(a) else [], [j] if j < len(b) else []
        m, n = (a[i] if left else 1), (b[j] if right else 1)
        i, j = i + len(left), j + len(right)
        while m != n:
            if i < len(a) and (j == len(b) or _smaller(m, n)):
                left.append(i)
                m *= a[i]
                i += 1
            elif j < len(b):
                right.append(j)
                n *= b[j]
                j += 1
            else:
                break
        groups.append((left, right))
    return groups


def _smaller(m: Any, n: Any) -> bool:
    """Whether a product of sizes is the smaller one; of symbolic sizes, which may not compare, the one that divides."""
    if is_symbolic_dim(m) or is_symbolic_dim(n):
        return n % m == 0
    return m < n


def view_axes(eqn: Equation, shape: Sequence[int]) -> list[tuple[int, ...]] | None:
    """For each axis of the equation's output, the axes of its operand that it holds; None if it is no view."""
    name, params = eqn.primitive.name, eqn.params
    if name in SAME_SHAPE_VIEWS and len(eqn.invars) == 1:
        return [(i,) for i in range(len(shape))]
    if name == "transpose":
        return [(i,) for i in params["permutation"]]
    if name == "squeeze":
        return [(i,) for i in range(len(shape)) if i not in params["dimensions"]]
    if name == "reshape" and params.get("dimensions") is None:
        out = eqn.outvars[0].aval.shape
        axes: list[tuple[int, ...]] = [()] * len(out)
        for left, right in reshape_groups(shape, out):
            for j in right:
                axes[j] = tuple(left)
        return axes
    if name in ("broadcast_in_dim", "expand_dims") and math.prod(eqn.outvars[0].aval.shape) == math.prod(shape):
        if name == "expand_dims":
            kept = [i for i in range(len(eqn.outvars[0].aval.shape)) if i not in params["dimensions"]]
        else:
            kept = list(params["broadcast_dimensions"])
        axes = [()] * len(eqn.outvars[0].aval.shape)
        for i, j in enumerate(kept):
            axes[j] = (i,)
        return axes
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class Multiplication:
    """A layer's equation: what is the weight in it, and what the operand.

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


def is_product(eqn: Equation) -> bool:
    """Whether an equation multiplies and sums up."""
    if eqn.primitive.name == "dot_general":
        return bool(eqn.params["dimension_numbers"][0][0])
    return eqn.primitive.name in ("conv_general_dilated", "ragged_dot_general", "ragged_dot")


def multiplies(jaxpr: Jaxpr) -> bool:
    """Whether there are products in a jaxpr or the jaxprs inside it."""
    jaxpr, _ = open_jaxpr(jaxpr)
    inner = [v for eqn in jaxpr.eqns for v in eqn.params.values() if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
    return any(map(is_product, jaxpr.eqns)) or any(map(multiplies, inner))


def multiplication(eqn: Equation, ins: list[Value]) -> Multiplication | None:
    """The layer that an equation is; None if it is none."""
    name, shape = eqn.primitive.name, tuple(getattr(eqn.outvars[0].aval, "shape", ()))
    if name == "dot_general" and is_product(eqn):
        contract, batch = eqn.params["dimension_numbers"]
        free = [
            frozenset(range(len(v.aval.shape))) - frozenset(contract[k]) - frozenset(batch[k])
            for k, v in enumerate(ins)
        ]
        side, sources = _weight_side(ins, contract, free)
        if side is None:
            return None
        n_batch, kept = len(batch[0]), sorted(free[side])
        start = n_batch if side == 0 else len(shape) - len(kept)
        output_axes = {axis: i for i, axis in enumerate(batch[side])} | {a: start + i for i, a in enumerate(kept)}
        w = ins[side]
        mixed = not (w.pure or w.chosen)
        return Multiplication(w, ins[1 - side], contract[side], output_axes, side, sources, shape, mixed)
    if name == "conv_general_dilated" and not ins[0].pure:
        spec, w = eqn.params["dimension_numbers"], ins[1]
        out_axis = spec.rhs_spec[0]
        contracted = frozenset(range(len(w.aval.shape))) - {out_axis}
        sources = w.differentiable if w.pure or w.chosen else _mixed(w, ins[0], contracted, frozenset([out_axis]))
        if not sources:
            return None
        mixed = not (w.pure or w.chosen)
        return Multiplication(w, ins[0], sorted(contracted), {out_axis: spec.out_spec[1]}, 1, sources, shape, mixed)
    if name in ("ragged_dot_general", "ragged_dot") and (ins[1].pure or ins[1].chosen):
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (contract, batch), groups = numbers.dot_dimension_numbers, numbers.rhs_group_dimensions
        if not groups or batch[1]:
            return None
        w = ins[1]
        kept = [i for i in range(len(w.aval.shape)) if i not in contract[1] and i not in groups]
        output_axes = {axis: len(shape) - len(kept) + i for i, axis in enumerate(kept)}
        return Multiplication(w, ins[0], contract[1], output_axes, 1, w.differentiable, shape)
    if name in ("gather", "dynamic_slice") and ins[0].pure:
        w = ins[0]
        x = next((v for v in ins[1:] if v.data), None)
        if x is None:
            return None
        if name == "gather":
            dims = eqn.params["dimension_numbers"]
            batching = set(getattr(dims, "operand_batching_dims", ()))
            looked_up = set(dims.start_index_map)
            whole = [i for i in range(len(w.aval.shape)) if i not in dims.collapsed_slice_dims and i not in batching]
            output_axes = {a: o for a, o in zip(whole, dims.offset_dims, strict=True) if a not in looked_up}
        else:
            sizes = eqn.params["slice_sizes"]
            looked_up = {i for i, (n, s) in enumerate(zip(w.aval.shape, sizes, strict=True)) if n != s}
            output_axes = {i: i for i in range(len(sizes)) if i not in looked_up}
        return Multiplication(w, x, sorted(looked_up), output_axes, 0, w.params, shape)
    return None


def of_latents(eqn: Equation, ins: list[Value]) -> Multiplication | None:
    """A product of two parameters with which a network without a batch begins: of learned latents and a weight.

    The latents are a vector, or else what stands on the left. Two that are made of one parameter are no layer.
    """
    if eqn.primitive.name != "dot_general" or not is_product(eqn) or ins[0].params & ins[1].params:
        return None
    latents = 1 if len(ins[1].aval.shape) < len(ins[0].aval.shape) == 2 else 0
    seen = [dataclasses.replace(v, data=k == latents) for k, v in enumerate(ins)]
    found = multiplication(eqn, seen)
    return None if found is None else dataclasses.replace(found, weight=ins[1 - latents], operand=ins[latents])


def transformed(eqn: Equation, ins: list[Value], axes: int) -> Multiplication | None:
    """An elementwise product between a Fourier transform over the last axes and its inverse."""
    pure = [k for k, v in enumerate(ins) if v.pure]
    if not axes or eqn.primitive.name != "mul" or len(pure) != 1:
        return None
    w, shape = ins[pure[0]], tuple(eqn.outvars[0].aval.shape)
    contracted = range(len(shape) - axes, len(shape))
    kept = {d: d for d in range(len(shape) - axes) if d in w.spread}
    return Multiplication(w, ins[1 - pure[0]], contracted, kept, pure[0], w.params, shape)


def _weight_side(ins: list[Value], contract: Any, free: Any) -> tuple[int | None, frozenset[int]]:
    """Which operand of a dot product is the weight, and the parameters that it is made of."""
    if ins[0].pure != ins[1].pure:
        side = 0 if ins[0].pure else 1
        return side, ins[side].params
    if ins[0].pure:
        return None, frozenset()
    chosen = [k for k, v in enumerate(ins) if v.chosen and v.weight_dims & frozenset(contract[k])]
    if len(chosen) == 2:  # embeddings, of which one may be looked up as a matrix
        chosen = [k for k in chosen if is_matrix(ins[k].weight_dims, frozenset(contract[k]), free[k])]
    if len(chosen) == 1:
        return chosen[0], ins[chosen[0]].differentiable
    mixed = [_mixed(v, ins[1 - k], frozenset(contract[k]), free[k]) for k, v in enumerate(ins)]
    if bool(mixed[0]) != bool(mixed[1]):
        side = 0 if mixed[0] else 1
        return side, mixed[side]
    return None, frozenset()


def _mixed(w: Value, x: Value, contracted: frozenset[int], free: frozenset[int]) -> frozenset[int]:
    """The parameters of a weight that layers have made: for each example, where it multiplies a hidden signal as a
    matrix, or without a batch, where it multiplies what has one."""
    if not (w.both and w.smooth and w.differentiable):
        return frozenset()
    if not w.batched and x.batched:
        return w.differentiable
    made = any(p.is_matrix and is_matrix(p.dims, contracted, free) for p in w.products)
    return parts(w)[1] if made and x.differentiable else frozenset()


def is_matrix(dims: frozenset[int], contracted: frozenset[int], free: frozenset[int]) -> bool:
    """Whether a value is a matrix in a product: `dims`, along which its weight varies, are its rows and its columns."""
    return bool(dims & contracted) and bool(free) and free <= dims


def one_layer(eqn: Equation, ins: list[Value], found: list[Multiplication]) -> Multiplication | None:
    """A function with a derivative of its own as one layer: there is one product in it, of one weight and data."""
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

CASTS = {"convert_element_type"}

BENDING = NONLINEAR - COMPARISONS - {"select_n", "mul"}


def stage(eqn: Equation, ins: list[Value]) -> int:
    """Of a value made of parameters: 1 after a product, 2 after a nonlinearity that followed one.

    A number by which all is multiplied or divided, as a spectral norm, does not count.
    """
    name = eqn.primitive.name
    factors = [v for v in ins if v.spread] if name in ("mul", "div") else ins
    highest = max((v.stage for v in factors), default=0)
    if is_product(eqn):
        return max(highest, 1)
    bends = name in BENDING or name in CALLS or (name == "select_n" and bool(ins[0].stage))
    bends |= name == "mul" and sum(v.stage > 0 for v in factors) > 1
    if name == "div":
        bends = len(factors) > 1 and factors[1].stage > 0
    return 2 if bends and highest else highest
