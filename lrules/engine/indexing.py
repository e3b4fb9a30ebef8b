"""What the primitives do that take parts of arrays, or write into them; `operations.py` has a row for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lrules.engine.jaxprs import Equation

Axes = Sequence[int]


def ndim(eqn: Equation, k: int) -> int:
    """The number of axes of an operand."""
    return len(eqn.invars[k].aval.shape)


# ------------------------------------------------------------------------------------------------------------- gather


def gathered(eqn: Equation, k: int) -> Mapping[int, int]:
    """`Row.lies` of a gather."""
    numbers = eqn.params["dimension_numbers"]
    if k == 1:  # the last axis of the indices holds their columns
        rest = [o for o in range(len(eqn.outvars[0].aval.shape)) if o not in numbers.offset_dims]
        return dict(enumerate(rest))
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    whole = [i for i in range(ndim(eqn, 0)) if i not in gone]
    return dict(zip(whole, numbers.offset_dims, strict=True))


def gather_chooses(eqn: Equation, k: int) -> Axes:
    """`Row.contracted` of a gather."""
    return sorted(set(eqn.params["dimension_numbers"].start_index_map)) if k == 0 else ()


def columns(eqn: Equation) -> Mapping[int, int]:
    """`Row.columns` of a gather, for the axes along which it does not take all."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    gone, shape = numbers.collapsed_slice_dims, eqn.invars[0].aval.shape
    return {i: c for c, i in enumerate(numbers.start_index_map) if i in gone or sizes[i] != shape[i]}


def paired(eqn: Equation) -> Mapping[int, int]:
    """`Row.paired` of a gather."""
    numbers = eqn.params["dimension_numbers"]
    return dict(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))


# ------------------------------------------------------------------------------------------------------------ slices


def slice_chooses(eqn: Equation, k: int) -> Axes:
    """`Row.contracted` of a dynamic slice."""
    sizes = zip(eqn.invars[0].aval.shape, eqn.params["slice_sizes"], strict=True)
    return [i for i, (n, size) in enumerate(sizes) if n != size] if k == 0 else ()


def sliced(eqn: Equation, result: int, axis: int) -> slice | None:
    """`Row.takes` of a slice."""
    size, strides = eqn.invars[0].aval.shape[axis], eqn.params["strides"]
    start, stop = eqn.params["start_indices"][axis], eqn.params["limit_indices"][axis]
    step = 1 if strides is None else strides[axis]
    return None if stop == size and start == 0 and step == 1 else slice(start, stop, step)


def split(eqn: Equation, result: int, axis: int) -> slice | None:
    """`Row.takes` of a split."""
    if axis != eqn.params["axis"]:
        return None
    start = sum(eqn.params["sizes"][:result])
    return slice(start, start + eqn.params["sizes"][result])


def reversed_(eqn: Equation, result: int, axis: int) -> slice | None:
    """`Row.takes` of a reversal."""
    return slice(None, None, -1) if axis in eqn.params["dimensions"] else None


def update_reorders(eqn: Equation, axis: int, data: Sequence[bool]) -> bool:
    """Whether a dynamic update writes data into a part of the examples."""
    return data[1] and eqn.invars[1].aval.shape[axis] != eqn.invars[0].aval.shape[axis]


def tiled(eqn: Equation, axis: int) -> int:
    """`Row.repeats` of a tile."""
    return eqn.params["reps"][axis]


# ----------------------------------------------------------------------------------------------------------- scatter


def scatter_lies(eqn: Equation, k: int) -> Mapping[int, int]:
    """`Row.lies` of a scatter: where windows of the updates, and what is gone through together, lie in the output."""
    if k != 2:
        return {i: i for i in range(ndim(eqn, 0))} if k == 0 else {}
    numbers, places = eqn.params["dimension_numbers"], updates(eqn)
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    whole = [o for o in range(ndim(eqn, 0)) if o not in gone]
    together = zip(numbers.scatter_indices_batching_dims, numbers.operand_batching_dims, strict=True)
    return dict(zip(numbers.update_window_dims, whole, strict=True)) | {places[d]: o for d, o in together}


def scatter_columns(eqn: Equation) -> Mapping[int, int]:
    """`Row.columns` of a scatter."""
    return {i: c for c, i in enumerate(eqn.params["dimension_numbers"].scatter_dims_to_operand_dims)}


def updates(eqn: Equation) -> Mapping[int, int]:
    """`Row.updates` of a scatter."""
    windows = eqn.params["dimension_numbers"].update_window_dims
    return dict(enumerate(i for i in range(ndim(eqn, 2)) if i not in windows))


def scattered(eqn: Equation, k: int) -> Axes:
    """`Row.reduced` of a scatter: updates may be summed along all axes except those of their windows."""
    return list(updates(eqn).values()) if k == 2 else ()
