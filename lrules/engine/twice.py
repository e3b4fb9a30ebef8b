"""The shapes of the values of a network at twice the batch, from its program there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

from lrules.engine.graph import Graph
from lrules.engine.jaxprs import COND, INLINED, SCAN, SHARD_MAP, Aval, Equation, Jaxpr, is_literal, open_jaxpr
from lrules.engine.operations import of
from lrules.engine.records import Block, Value


class Twin(Protocol):
    """The properties that are needed of a value at twice the batch."""

    @property
    def aval(self) -> Aval: ...

    @property
    def producer(self) -> Equation | None: ...

    @property
    def operands(self) -> Sequence[Twin]: ...


class AtTwice:
    """A value at twice the batch, from the shapes that the values of the network hold."""

    def __init__(self, value: Value) -> None:
        self.value = value

    @property
    def aval(self) -> Aval:
        return self.value.aval if self.value.at_twice is None else self.value.at_twice

    @property
    def producer(self) -> Equation | None:
        """The equation that makes it, with the shape of the result that views need."""
        eqn = self.value.producer
        if eqn is None:
            return None
        return SimpleNamespace(primitive=eqn.primitive, params=eqn.params, invars=eqn.invars, outvars=[self])

    @property
    def operands(self) -> tuple[AtTwice, ...]:
        return tuple(map(AtTwice, self.value.operands))


@dataclasses.dataclass(frozen=True)
class BySize:
    """Instead of a value at twice the batch: each axis that has the size of the batch may hold it."""

    value: Value
    batch: int

    @property
    def aval(self) -> Aval:
        return self.value.aval

    @property
    def producer(self) -> Equation | None:
        return self.value.producer

    @property
    def operands(self) -> tuple[BySize, ...]:
        return tuple(BySize(v, self.batch) for v in self.value.operands)


def grows(a: Value, b: Twin, axis: int) -> bool:
    """Whether an axis grows with the batch, or, if that is not known, has its size; `b` is the value at twice."""
    if isinstance(b, BySize):
        return a.aval.shape[axis] == b.batch
    return len(a.aval.shape) == len(b.aval.shape) and a.aval.shape[axis] != b.aval.shape[axis]


def may_hold(a: Value, b: Twin, axis: int) -> bool:
    """Whether an axis may hold the batch, perhaps merged with others."""
    return a.aval.shape[axis] % b.batch == 0 if isinstance(b, BySize) else grows(a, b, axis)


def beside(b: Twin, a: Value) -> Twin:
    """The twin of another value of the network, of the same kind as `b`."""
    return BySize(a, b.batch) if isinstance(b, BySize) else AtTwice(a)


def write_shapes(graph: Graph, at_twice: Jaxpr, axes: Sequence[int | None]) -> bool:
    """Writes into each value its type at twice the batch; False if the program there differs in more than sizes.

    Args:
      graph: the network.
      at_twice: its program at twice the batch; it first concatenates each input with itself.
      axes: the batch axis of each input.
    """
    jaxpr, _ = open_jaxpr(at_twice)
    twins = dict(zip(graph.block.jaxpr.invars, jaxpr.invars, strict=True))
    inputs = graph.block.jaxpr.invars[len(graph.parameters) :]
    doubled = {twins[v]: v for v, axis in zip(inputs, axes, strict=True) if axis is not None}
    first = 0
    for eqn in jaxpr.eqns[: len(doubled)]:
        if not all(v is eqn.invars[0] for v in eqn.invars) or is_literal(eqn.invars[0]):
            break
        if eqn.invars[0] not in doubled:
            break
        twins[doubled[eqn.invars[0]]] = eqn.outvars[0]
        first += 1
    return _write(graph.block, jaxpr, jaxpr.eqns[first:], twins)


def _write(block: Block, at_twice: Any, eqns: Sequence[Equation], twins: dict[Any, Any]) -> bool:
    jaxpr = block.jaxpr
    if len(eqns) != len(jaxpr.eqns) or len(at_twice.constvars) != len(jaxpr.constvars):
        return False
    twins |= dict(zip(jaxpr.constvars, at_twice.constvars, strict=True))
    for index, (a, b) in enumerate(zip(jaxpr.eqns, eqns, strict=True)):
        if a.primitive is not b.primitive or len(a.outvars) != len(b.outvars) or not _same(a.invars, b.invars, twins):
            return False
        twins.update(zip(a.outvars, b.outvars, strict=True))
        inner = _programs(b) if index in block.children else []
        for child, program in zip(block.children.get(index, ()), inner, strict=True):
            opened, _ = open_jaxpr(program)
            if len(opened.invars) != len(child.jaxpr.invars):
                return False
            if not _write(child, opened, opened.eqns, dict(zip(child.jaxpr.invars, opened.invars, strict=True))):
                return False
    if not _same(jaxpr.outvars, at_twice.outvars, twins):
        return False
    for variable, twin in twins.items():
        block.values[variable].at_twice = twin.aval
    return True


def _same(a: Sequence[Any], b: Sequence[Any], twins: Mapping[Any, Any]) -> bool:
    """Whether an equation reads the same variables in the two programs."""
    return len(a) == len(b) and all(
        is_literal(w) if is_literal(v) else twins.get(v) is w for v, w in zip(a, b, strict=True)
    )


def _programs(eqn: Equation) -> list[Any]:
    """The programs inside an equation."""
    name, params = of(eqn).name, eqn.params
    if name == COND:
        return list(params["branches"])
    return [params["jaxpr"] if name in (SCAN, SHARD_MAP) else params[INLINED[name]]]
