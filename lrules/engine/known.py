"""Numbers that are known while a network is traced: those that depend on no parameters and no inputs."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.export import is_symbolic_dim

from lrules.engine.jaxprs import bind, is_literal
from lrules.engine.operations import of
from lrules.engine.records import Value


def column_of(indices: Value, column: int) -> Any:
    """The numbers in a column of indices, if they are known."""
    while known_numbers(indices) is None and (eqn := indices.producer) is not None:
        row, last = of(eqn), len(indices.aval.shape) - 1
        if row.joins is not None and row.joins(eqn) == last:
            pieces = iter(indices.operands)
            while column >= (indices := next(pieces)).aval.shape[last]:
                column -= indices.aval.shape[last]
        elif row.same_shape and len(indices.operands) == 1:
            indices = indices.operands[0]
        else:
            return None
    known = known_numbers(indices)
    return None if known is None else np.asarray(known)[..., column]


def counts(positions: Any, size: Any) -> int | None:
    """The axis along which the positions are 0, 1, ... up to the size, whatever the other axes."""
    if is_symbolic_dim(size):
        return None
    for axis, length in enumerate(positions.shape):
        if length == size and (np.moveaxis(positions, axis, -1) == np.arange(size)).all():
            return axis
    return None


def known_numbers(value: Value) -> Any:
    """The numbers, or keys, of a value that depends on no parameters and examples; None if they are not known here."""
    stack = [value]
    while stack:
        last = stack[-1]
        if last.known is not False:
            stack.pop()
            continue
        waiting = [] if last.params or last.batched or last.producer is None else last.operands
        if any(v.params or v.batched for v in waiting):
            waiting, last.known = [], None
        waiting = [v for v in waiting if v.known is False]
        if not waiting:
            last.known = _computed(last) if last.known is False else None
        stack += waiting
    return value.known


def _computed(value: Value) -> Any:
    eqn = value.producer
    if value.params or value.batched or eqn is None:
        return None
    if len(value.operands) != len(eqn.invars) or len(eqn.outvars) != 1:
        return None
    ins = [v.val if is_literal(v) else u.known for v, u in zip(eqn.invars, value.operands, strict=True)]
    if any(x is None for x in ins):
        return None
    with jax.ensure_compile_time_eval():
        return bind(eqn, ins)[0]
