"""One row for each primitive of JAX, with all facts that the library knows about it.

To serve one more primitive, add its row here, and a test. All other files ask the row (`of`); they do not compare
names. If a parameter meets data in a primitive without a row, rules refuse it by name. Elsewhere the error passes
through it by its derivative.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from lrules.engine import indexing
from lrules.engine.indexing import Axes, ndim
from lrules.engine.jaxprs import CALLS, OWN_DERIVATIVE, SCAN, Equation
from lrules.engine.reshapes import reshape_groups

Places = list[tuple[int, ...]]  # for each axis of the output, the axes of the operand that it holds

Kind = Literal[
    "elementwise", "view", "placement", "move", "lookup", "scatter", "product", "reduction", "cumulative", "window",
    "collective", "transform", "call", "loop", "source", "unknown",
]  # fmt: skip

Curve = Literal["", "linear", "bent", "formula", "choice", "comparison", "rows"]

Combines = Literal["", "sum", "product", "quotient", "select", "extreme", "distance"]


def _none(eqn: Equation, k: int) -> Axes:
    return ()


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """The facts about one primitive. Functions take an equation, and `k`, the number of an operand.

    Attributes:
      name: the name in JAX.
      kind: what it does with the elements: `"elementwise"` functions; a `"view"` in another shape; a `"placement"` on
        devices; a `"move"`, which cuts, joins or sorts; a `"lookup"` by indices; a `"scatter"`; a `"product"`, which
        multiplies and sums; a `"reduction"`, also `"cumulative"`; a `"window"`, as in pooling; a `"collective"` over a
        mesh; a `"transform"` between all elements; a `"call"`, a `"loop"`; a `"source"`: no error flows into it.
      curve: how it is nonlinear: `"linear"`; `"bent"`, as tanh; `"formula"`, which alone is not an activation, as exp;
        `"choice"`, as abs; `"comparison"`; `"rows"`, nonlinear in whole rows; empty if no activation can hold it.
      combines: how it combines two values, elementwise or in a window: a `"sum"`, a `"product"` and so on.
      power: `eqn -> n`, if it raises to an integer power.
      view: `(eqn, shape of the operand) -> axes`: for each axis of the output, the axes of its operand that it holds;
        None for an equation that is not a view.
      permutation: `eqn -> axes`, if the view puts the elements into another order.
      lies: `(eqn, k) -> {axis: axis of the output}` for the axes of an operand that the output holds.
      reorders: `(eqn, axis of the output, which operands are data) -> whether` it may put examples elsewhere along it.
      takes: `(eqn, number of the result, axis) -> slice` of its operand that it takes; None for all of it.
      repeats: `(eqn, axis) -> how often` it puts its operand one behind the other.
      joins: `eqn -> axis` along which it puts its operands one behind the other.
      columns: `eqn -> {axis of the first operand: column of the indices}` that choose along it.
      paired: `eqn -> {axis of the first operand: axis of the indices}` that are gone through together.
      updates: `eqn -> {axis of the indices: axis of the updates}` of a scatter.
      weights: the operands that may be the weight of a layer.
      contracted: `(eqn, k) -> axes` over which a product sums, along which a lookup chooses, or over which a transform
        goes.
      members: `(eqn, k) -> axes` of separate matrices: members of an ensemble, experts.
      window: `(eqn, k) -> axes` of the window of a convolution.
      reduced: `(eqn, k) -> axes` along which elements are summed, multiplied or compared with each other.
      by_example: whether the rows of one example give the same result alone and among all others.
      together: whether the gradients of several examples are made at once, by `vmap`: where that is surely quicker.
      rounds: whether it may round the weight of a layer, so that the error must be scaled, not the weight.
      carries: whether a product of weights and data goes through it (see `by_hand.py`).
      bare: whether such a product then has still only been moved, cut and multiplied by numbers.
      leads: whether a layer still reads the nonlinearity below through it.
      statistic: whether it computes a mean, a maximum or the like, as normalisations do.
      totals: whether this is a sum, which is a mean after a division by a number.
      brings: whether it brings the outputs of a layer along by constants, as along the edges of a graph.
      cuts: whether it takes a part of its operand.
      same: whether each result equals the operand at the same place.
      casts, stops, marks: whether it casts, stops the error, or gives a name.
    """

    name: str
    kind: Kind = "unknown"
    curve: Curve = ""
    combines: Combines = ""
    power: Callable[[Equation], int] | None = None
    view: Callable[[Equation, Axes], Places | None] | None = None
    permutation: Callable[[Equation], tuple[int, ...]] | None = None
    lies: Callable[[Equation, int], Mapping[int, int]] | None = None
    reorders: Callable[[Equation, int, Sequence[bool]], bool] | None = None
    takes: Callable[[Equation, int, int], slice | None] | None = None
    repeats: Callable[[Equation, int], int] | None = None
    joins: Callable[[Equation], int] | None = None
    columns: Callable[[Equation], Mapping[int, int]] | None = None
    paired: Callable[[Equation], Mapping[int, int]] | None = None
    updates: Callable[[Equation], Mapping[int, int]] | None = None
    weights: tuple[int, ...] = ()
    contracted: Callable[[Equation, int], Axes] = _none
    members: Callable[[Equation, int], Axes] = _none
    window: Callable[[Equation, int], Axes] = _none
    reduced: Callable[[Equation, int], Axes] = _none
    by_example: bool = True
    together: bool = False
    rounds: bool = False
    carries: bool = False
    bare: bool = False
    leads: bool = False
    statistic: bool = False
    totals: bool = False
    brings: bool = False
    cuts: bool = False
    same: bool = False
    casts: bool = False
    stops: bool = False
    marks: bool = False

    @functools.cached_property
    def elementwise(self) -> bool:
        return self.kind == "elementwise"

    @functools.cached_property
    def nonlinear(self) -> bool:
        """Whether it is nonlinear in each element."""
        return self.curve in ("bent", "formula", "choice", "comparison")

    @functools.cached_property
    def bends(self) -> bool:
        """Whether it may be an activation by itself."""
        return self.curve in ("bent", "choice")

    @functools.cached_property
    def either(self) -> bool:
        """Whether either of two operands may be the weight."""
        return self.kind == "product" and self.weights == (0, 1)

    @functools.cached_property
    def looks_up(self) -> bool:
        """Whether it takes rows of its first operand, as an embedding does."""
        return self.kind != "product" and bool(self.weights)

    @functools.cached_property
    def may_mix(self) -> bool:
        """Whether parameters may meet data in it without a layer."""
        return self.kind in ("elementwise", "placement", "move", "lookup", "scatter", "source") or self.either

    @functools.cached_property
    def same_shape(self) -> bool:
        """Whether it is a view in which each element keeps its place."""
        return self.view is _as_it_is

    def held(self, eqn: Equation, k: int, axis: int) -> int | None:
        """The axis of operand `k` that the output holds at this axis."""
        lies = self.lies(eqn, k) if self.lies is not None else {}
        return next((i for i, out in lies.items() if out == axis), None)

    def free(self, eqn: Equation, k: int) -> frozenset[int]:
        """The axes of a product's operand along which the rows lie that are multiplied one by one."""
        return frozenset(self.lies(eqn, k)) - set(self.members(eqn, k)) if self.lies else frozenset()


def _in_place(eqn: Equation, k: int) -> Mapping[int, int]:
    return {i: i for i in range(ndim(eqn, k))}


def _all(eqn: Equation, k: int) -> Axes:
    return range(ndim(eqn, k))


def _axes(eqn: Equation, k: int) -> Axes:
    return eqn.params["axes"]


def _axis(eqn: Equation, k: int) -> Axes:
    return [eqn.params["axis"]]


def _not_reduced(eqn: Equation, k: int) -> Mapping[int, int]:
    kept = [i for i in range(ndim(eqn, k)) if i not in eqn.params["axes"]]
    return {i: o for o, i in enumerate(kept)}


def _as_it_is(eqn: Equation, shape: Axes) -> Places | None:
    return [(i,) for i in range(len(shape))] if len(eqn.invars) == 1 else None


def _permutation(eqn: Equation) -> tuple[int, ...]:
    return tuple(eqn.params["permutation"])


def _transposed(eqn: Equation, shape: Axes) -> Places | None:
    return [(i,) for i in eqn.params["permutation"]]


def _squeezed(eqn: Equation, shape: Axes) -> Places | None:
    return [(i,) for i in range(len(shape)) if i not in eqn.params["dimensions"]]


def _broadcast(eqn: Equation, k: int) -> Mapping[int, int]:
    return dict(enumerate(eqn.params["broadcast_dimensions"] if k == 0 else ()))


def _expanded(eqn: Equation, shape: Axes) -> Places | None:
    out = eqn.outvars[0].aval.shape
    if math.prod(out) != math.prod(shape):
        return None
    axes: list[tuple[int, ...]] = [()] * len(out)
    for i, o in enumerate(eqn.params["broadcast_dimensions"]):
        axes[o] = (i,)
    return axes


def _reshaped(eqn: Equation, shape: Axes) -> Places | None:
    if eqn.params.get("dimensions") is not None:
        return None
    out = eqn.outvars[0].aval.shape
    axes: list[tuple[int, ...]] = [()] * len(out)
    for left, right in reshape_groups(shape, out):
        for o in right:
            axes[o] = tuple(left)
    return axes


def _stacked(eqn: Equation, k: int) -> Mapping[int, int]:
    return {i: i + (i >= eqn.params["axis"]) for i in range(ndim(eqn, k))}


def _dot_contracted(eqn: Equation, k: int) -> Axes:
    return eqn.params["dimension_numbers"][0][k]


def _dot_members(eqn: Equation, k: int) -> Axes:
    return eqn.params["dimension_numbers"][1][k]


def _dot_lies(eqn: Equation, k: int) -> Mapping[int, int]:
    contracted, members = eqn.params["dimension_numbers"]
    return _free_last(eqn, k, members[k], [*contracted[k], *members[k]])


def _free_last(eqn: Equation, k: int, members: Axes, others: Axes) -> Mapping[int, int]:
    """The output of a product holds the members, then the free axes of the left operand, then those of the right."""
    free = [i for i in range(ndim(eqn, k)) if i not in others]
    start = len(members) if k == 0 else len(eqn.outvars[0].aval.shape) - len(free)
    return dict(zip(members, range(len(members)), strict=True)) | {i: start + o for o, i in enumerate(free)}


def _ragged_numbers(eqn: Equation) -> tuple[Any, Any, Axes]:
    """The contracted axes, those of members, and those of groups; no contracted axes if rows have no groups."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracted, members = numbers.dot_dimension_numbers
    groups = numbers.rhs_group_dimensions
    return ((), ()) if not groups or members[1] else contracted, members, groups


def _ragged_contracted(eqn: Equation, k: int) -> Axes:
    return _ragged_numbers(eqn)[0][k] if k < 2 else ()


def _ragged_groups(eqn: Equation, k: int) -> Axes:
    return _ragged_numbers(eqn)[2] if k == 1 else ()


def _ragged_lies(eqn: Equation, k: int) -> Mapping[int, int]:
    contracted, members, groups = _ragged_numbers(eqn)
    if k > 1 or not contracted[k]:
        return {}
    return _free_last(eqn, k, members[k], [*contracted[k], *members[k], *(groups if k == 1 else ())])


def _conv_lies(eqn: Equation, k: int) -> Mapping[int, int]:
    spec = eqn.params["dimension_numbers"]
    return {spec.lhs_spec[0]: spec.out_spec[0]} if k == 0 else {spec.rhs_spec[0]: spec.out_spec[1]}


def _conv_contracted(eqn: Equation, k: int) -> Axes:
    return [i for i in range(ndim(eqn, k)) if i not in _conv_lies(eqn, k)]


def _conv_window(eqn: Equation, k: int) -> Axes:
    return eqn.params["dimension_numbers"].rhs_spec[2:] if k == 1 else ()


def _fft_axes(eqn: Equation, k: int) -> Axes:
    return range(ndim(eqn, k))[-len(eqn.params["fft_lengths"]) :]


def _windows(eqn: Equation, k: int) -> Axes:
    return [i for i, n in enumerate(eqn.params["window_dimensions"]) if n != 1]


# --------------------------------------------------------------------------------------------------------- the table


def _rows(names: str, kind: Kind, **facts: Any) -> list[Row]:
    return [Row(name, kind, **facts) for name in names.split()]


TABLE = [
    # Elementwise, linear.
    *_rows("add add_any sub", "elementwise", curve="linear", combines="sum", carries=True),
    Row("mul", "elementwise", "linear", "product", carries=True, bare=True),
    Row("neg", "elementwise", "linear", carries=True, bare=True),
    *_rows("real imag", "elementwise", curve="linear", carries=True),
    Row("convert_element_type", "elementwise", "linear", view=_as_it_is, carries=True, casts=True),
    Row("reduce_precision", "elementwise", "linear", view=_as_it_is, carries=True),
    *_rows("copy pvary", "elementwise", curve="linear", view=_as_it_is, carries=True, same=True),
    Row("name", "elementwise", view=_as_it_is, carries=True, leads=True, same=True, marks=True),
    Row("stop_gradient", "elementwise", same=True, stops=True),
    # Elementwise, nonlinear.
    Row("div", "elementwise", "formula", "quotient", carries=True, bare=True),
    Row("select_n", "elementwise", "choice", "select", carries=True),
    *_rows("max min", "elementwise", curve="choice", combines="extreme"),
    *_rows("clamp abs sign", "elementwise", curve="choice"),
    *_rows("eq ne lt gt le ge and or xor not is_finite", "elementwise", curve="comparison"),
    Row("pow", "elementwise", "formula", "distance"),
    *_rows("exp exp2 log log1p log2 sqrt rsqrt cbrt square one_minus_square", "elementwise", curve="formula"),
    Row("integer_pow", "elementwise", "formula", power=lambda eqn: eqn.params["y"]),
    Row("polynomial", "elementwise", "formula", "distance"),
    Row("atan2", "elementwise", "bent", "distance"),
    *_rows("expm1 tanh sin cos tan asin acos atan sinh cosh asinh acosh atanh", "elementwise", curve="bent"),
    *_rows("logistic erf erfc erf_inv lgamma digamma rem floor ceil round", "elementwise", curve="bent"),
    *_rows("bessel_i0e bessel_i1e polygamma zeta", "elementwise", curve="bent"),
    *_rows("nextafter complex igamma igammac regularized_incomplete_beta population_count", "elementwise"),
    # The same elements in another shape, order or place.
    Row("transpose", "view", view=_transposed, permutation=_permutation, carries=True),
    Row("reshape", "view", view=_reshaped, carries=True),
    Row("squeeze", "view", view=_squeezed, carries=True),
    Row("broadcast_in_dim", "view", view=_expanded, lies=_broadcast, carries=True),
    *_rows("sharding_constraint reshard layout_constraint relayout optimization_barrier", "placement", view=_as_it_is,
           carries=True, same=True),
    # Cut, joined, put into another order, looked up.
    Row("concatenate", "move", lies=_in_place, joins=lambda eqn: eqn.params["dimension"], carries=True, leads=True),
    Row("stack", "move", lies=_stacked, carries=True),
    Row("pad", "move", lies=_in_place, reorders=lambda eqn, axis, data: any(eqn.params["padding_config"][axis][::2]),
        carries=True, bare=True, leads=True),
    Row("slice", "move", lies=_in_place, takes=indexing.sliced, carries=True, bare=True, leads=True, cuts=True),
    Row("split", "move", lies=_in_place, takes=indexing.split, carries=True, cuts=True),
    Row("rev", "move", lies=_in_place, takes=indexing.reversed_, carries=True),
    Row("tile", "move", lies=_in_place, repeats=indexing.tiled, carries=True),
    Row("sort", "move", lies=_in_place, reorders=lambda eqn, axis, data: axis == eqn.params["dimension"]),
    Row("dynamic_update_slice", "move", lies=_in_place, reorders=indexing.update_reorders, carries=True),
    Row("dynamic_slice", "move", weights=(0,), contracted=indexing.slice_chooses, lies=_in_place, carries=True,
        reorders=lambda eqn, axis, data: axis in indexing.slice_chooses(eqn, 0), cuts=True),
    Row("gather", "lookup", weights=(0,), contracted=indexing.gather_chooses, lies=indexing.gathered,
        columns=indexing.columns, paired=indexing.paired, carries=True, brings=True, cuts=True),
    *_rows("scatter-add scatter-sub", "scatter", lies=indexing.scatter_lies, columns=indexing.scatter_columns,
           updates=indexing.updates, reduced=indexing.scattered, brings=True),
    *_rows("scatter scatter-mul scatter-max scatter-min", "scatter", lies=indexing.scatter_lies,
           columns=indexing.scatter_columns, updates=indexing.updates),
    # Reduced.
    Row("reduce_sum", "reduction", lies=_not_reduced, reduced=_axes, carries=True, statistic=True, totals=True),
    Row("reduce_max", "reduction", "rows", lies=_not_reduced, reduced=_axes, statistic=True),
    *_rows("reduce_min reduce_prod", "reduction", lies=_not_reduced, reduced=_axes, statistic=True),
    *_rows("reduce_and reduce_or reduce_xor", "reduction", lies=_not_reduced, statistic=True),
    *_rows("argmax argmin", "move", lies=_not_reduced),
    Row("cumsum", "cumulative", lies=_in_place, reduced=_axis, statistic=True),
    Row("cumlogsumexp", "cumulative", "rows", lies=_in_place, reduced=_axis, statistic=True),
    Row("cumprod", "cumulative", lies=_in_place, statistic=True),
    Row("cummax", "cumulative", "rows", lies=_in_place),
    Row("cummin", "cumulative", lies=_in_place),
    Row("reduce_window_sum", "window", lies=_in_place, reduced=_windows, leads=True, totals=True),
    *_rows("reduce_window_max reduce_window_min", "window", combines="extreme", lies=_in_place),
    Row("reduce_window", "window", lies=_in_place),
    *_rows("psum psum_invariant", "collective", statistic=True, totals=True),
    *_rows("pmax pmin reduce_scatter", "collective", statistic=True),
    # Multiplied and summed.
    Row("dot_general", "product", together=True, weights=(0, 1), contracted=_dot_contracted, members=_dot_members,
        lies=_dot_lies, reduced=_dot_contracted, brings=True),
    Row("conv_general_dilated", "product", weights=(1,), contracted=_conv_contracted, window=_conv_window,
        lies=_conv_lies, reduced=_all),
    Row("ragged_dot_general", "product", weights=(1,), contracted=_ragged_contracted, members=_ragged_groups,
        lies=_ragged_lies, reduced=_ragged_contracted, by_example=False),
    Row("bcoo_dot_general", brings=True),
    Row("fft", "transform", contracted=_fft_axes, reduced=_all),
    # Functions, loops, and primitives into which no error flows.
    *(Row(name, "call", by_example=name not in OWN_DERIVATIVE, rounds=name in OWN_DERIVATIVE) for name in CALLS),
    Row(SCAN, "loop", leads=True),
    *_rows("iota threefry2x32 random_bits debug_callback debug_print", "source"),
]  # fmt: skip

ROWS = {row.name: row for row in TABLE}


def of(eqn: Equation) -> Row:
    """The row of an equation's primitive."""
    name = eqn.primitive.name
    return ROWS.get(name) or _unknown(name)


@functools.cache
def _unknown(name: str) -> Row:
    return Row(name)


def view_axes(eqn: Equation, shape: Axes) -> Places | None:
    """For each axis of the output, the axes of the operand that it holds; None if the equation is not a view."""
    view = of(eqn).view
    return None if view is None else view(eqn, shape)


def is_product(eqn: Equation) -> bool:
    """Whether an equation multiplies and sums."""
    row = of(eqn)
    return row.kind == "product" and len(row.contracted(eqn, 1)) > 0
