"""Finds activations in a block of a jaxpr; `activations.py` says what counts as an activation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrules.engine.activations import (
    ALIASES,
    MARK,
    NAMED,
    UNMARK,
    Axes,
    Doubt,
    _composed,
    _is_literal,
    _is_uniform,
    arranged,
    is_statistic,
)
from lrules.engine.jaxprs import FOLLOWED, NEW_FORMS, OWN_DERIVATIVE, Equation, call_body, call_name
from lrules.engine.operations import Row, of
from lrules.engine.records import Activation, Block, Names, Value
from lrules.engine.reshapes import in_order
from lrules.engine.shared import Pieces, Together, equation_key


@dataclasses.dataclass(eq=False)
class Region:
    """The equations of an activation, from its root to its output; `axes` says how the root lies in the output."""

    name: str
    root: Any
    output: Any
    others: tuple[Any, ...]
    eqns: list[Any]
    indices: list[int]
    axes: Axes
    activation: Any = None

    @functools.cached_property
    def program(self) -> RegionProgram:
        return RegionProgram(self)


class RegionProgram:
    """The function that a region computes, `program(x, *captured)`.

    Attributes:
      key: equal for all programs that compute the same; None if this is not known.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        keys = [equation_key(eqn) for eqn in region.eqns]
        self._run = Together(region.eqns, keys, [region.output])
        places = (self._run.given.index(region.root), tuple(map(self._run.given.index, region.others)))
        self.key = None if None in keys else (self._run.key, region.axes, places)

    def __call__(self, x: jax.Array, *captured: Any) -> Any:
        values = dict(zip(self.region.others, captured, strict=True))
        values[self.region.root] = in_order(x, [int(i) for i in np.argsort(self.region.axes)])
        return self._run(*(values[v] for v in self._run.given))[0]


@dataclasses.dataclass(frozen=True, eq=False)
class RegionFunction:
    """An activation as handlers get it, `fn(x)`.

    Attributes:
      program: the function of `x` and of the other values that it reads.
      captured: these other values, which are the same for all elements.
      pieces: the store for functions that belong to it, by the key of the program; None if nothing is shared.
    """

    program: RegionProgram
    captured: Sequence[Any]
    pieces: Pieces | None

    def __call__(self, x: jax.Array) -> Any:
        return self.program(x, *self.captured)


def find_activations(noted: Sequence[Block | Doubt]) -> tuple[list[Activation], list[tuple[Doubt, Value | None]]]:
    """The activations in all blocks (written into the blocks too), and the doubts, each with its value."""
    activations: list[Activation] = []
    doubts: list[tuple[Doubt, Value | None]] = []
    sites = Names()
    for block in noted:
        if isinstance(block, Doubt):
            doubts.append((block, None))
            continue
        regions, own = find_regions(block)
        doubts += [(doubt, None if doubt.output is None else block.value(doubt.output)) for doubt in own]
        for region in regions:
            source, output = block.value(region.root), block.value(region.output)
            region.activation = Activation(
                region.name, sites.unique(region.name), block.scope, region.axes, source, output
            )
            activations.append(region.activation)
            block.regions[region.indices[-1]] = region
        block.skipped = frozenset(i for region in regions for i in region.indices[:-1])
    return activations, doubts


def _nonlinear(eqn: Equation, value: Callable[..., Value]) -> list[Row]:
    """The nonlinear primitives of an elementwise equation."""
    row = of(eqn)
    if row.combines == "product":
        return [row] if sum(value(v).params != frozenset() for v in eqn.invars) > 1 else []
    if row.combines == "quotient":
        return [row] if value(eqn.invars[1]).params else []
    return [inner for inner in (_inner(eqn) if row.kind == "call" else [row]) if inner.nonlinear]


def _inner(eqn: Equation) -> list[Row]:
    """The primitives in a call, and in the calls in it."""
    eqns = getattr(call_body(eqn), "eqns", ())
    return [row for e in eqns for row in (_inner(e) if of(e).kind == "call" else [of(e)])]


def _of_formulas(row: Row) -> bool:
    """Whether a primitive alone is not an activation: exp, a root, a quotient or a product."""
    return row.curve == "formula" or row.combines == "product"


def _of_statistics(row: Row) -> bool:
    """Whether normalisations apply this primitive to means and variances."""
    return row.curve in ("formula", "comparison", "choice") or row.combines == "product"


def _is_named(eqn: Equation) -> bool:
    row = of(eqn)
    name = call_name(eqn) if row.kind == "call" else ""
    return name in NAMED or name.startswith((MARK, UNMARK)) or row.name in OWN_DERIVATIVE


def find_regions(block: Block) -> tuple[list[Region], list[Doubt]]:
    """The activations of one block, in program order, and the doubts."""
    eqns, value = block.jaxpr.eqns, block.value
    users: dict[Any, set[int]] = {}
    for index, eqn in [*enumerate(eqns), (-1, None)]:
        for v in block.jaxpr.outvars if eqn is None else eqn.invars:
            if not _is_literal(v):
                users.setdefault(v, set()).add(index)

    def compared(eqn: Equation) -> bool:
        asks = [i >= 0 and of(eqns[i]).curve == "comparison" for i in users.get(eqn.outvars[0], {-1})]
        return of(eqn).stops and all(asks)

    def selected(eqn: Equation) -> bool:
        """Whether an equation is not a transpose, or only one that `vmap` makes before a select of several values."""
        if of(eqn).permutation is None:
            return True
        readers = [(of(eqns[i]), eqns[i]) for i in users.get(eqn.outvars[0], ()) if i >= 0]
        asks = [
            (row.combines == "select" or row.kind == "call") and sum(value(v).both for v in e.invars) > 1
            for row, e in readers
        ]
        return all(asks) and -1 not in users.get(eqn.outvars[0], ())

    candidates: dict[int, list[Any]] = {}  # the operands of elementwise equations that depend on parameters and data
    for index, eqn in enumerate(eqns):
        if len(eqn.outvars) != 1 or not value(eqn.outvars[0]).both or not selected(eqn):
            continue
        if value(eqn.outvars[0]).producer is not eqn:  # a call that is not evaluated as one
            continue
        operands = [v for v in eqn.invars if value(v).both]
        others = [v for v in eqn.invars if not value(v).both]
        if all(_is_uniform(value(v)) for v in others) and (compared(eqn) or _lies(block, eqn, operands)):
            candidates[index] = operands

    def output(index: int) -> Any:
        return eqns[index].outvars[0]

    named = {index for index in candidates if _is_named(eqns[index])}
    cuts = {v for i in named for v in (*candidates[i], output(i))}  # where one region ends and another may begin

    def grouped() -> dict[Any, list[int]]:
        """The candidates by their common root; a named candidate is alone."""
        root: dict[Any, tuple[Any, Axes]] = {}  # and how it lies in the value
        groups: dict[Any, list[int]] = {}
        for index, operands in candidates.items():
            steps = _steps(block, eqns[index])
            roots = set()
            for v, step in zip(operands, steps, strict=True):
                start, axes = root[v] if v in root and v not in cuts else (v, tuple(range(len(v.aval.shape))))
                roots.add((start, _composed(axes, step)))
            if index in named:
                if len(set(zip(operands, steps, strict=True))) == 1:
                    groups["named", index] = [index]
            elif len(roots) == 1:
                (root[output(index)],) = roots
                groups.setdefault(root[output(index)][0], []).append(index)
            else:
                cuts.add(output(index))
        return groups

    def region(key: Any, indices: list[int], last: int) -> Region | Doubt | None:
        """The region, or the doubt, that ends with this equation."""
        needed, stack = {last}, [last]
        while stack:
            wanted = [v for v in eqns[stack.pop()].invars if not _is_literal(v)]
            fresh = [i for i in indices if i not in needed and output(i) in wanted and output(i) not in cuts]
            needed.update(fresh)
            stack += fresh
        if isinstance(key, tuple):
            return _region(block, candidates[last][0], sorted(needed))
        return _region(block, *_trimmed(block, key, sorted(needed), candidates))

    while True:
        groups = grouped()
        shared = {output(i) for indices in groups.values() for i in indices
                  if users.get(output(i), {-1}) & set(indices) and users[output(i)] - set(indices)}  # fmt: skip
        ends = [] if shared - cuts else [
            region(key, indices, last) for key, indices in groups.items() for last in indices
            if users.get(output(last), {-1}) - set(indices)
        ]  # fmt: skip
        found = list({end.output: end for end in ends if isinstance(end, Region)}.values())
        inside = {i for region in found for i in region.indices}
        inner = {output(i) for region in found for i in region.indices[:-1]}
        seen = {v for region in found for v in (region.root, region.output, *region.others)}
        seen |= {v for v, readers in users.items() if readers - inside}
        shared |= inner & seen  # nothing else reads the inner values of a region
        if shared <= cuts:
            break
        cuts |= shared
    grouping = {i for indices in groups.values() for i in indices}
    doubts = [end for end in ends if isinstance(end, Doubt)]
    doubts += [
        Doubt(_doubted(eqn))
        for index, eqn in enumerate(eqns)
        if index not in grouping and len(eqn.outvars) == 1 and value(eqn.outvars[0]).both
        and (_bends(eqn, value) or _hides(eqn, value))
    ]  # fmt: skip
    doubts += [
        Doubt(_doubted(eqn), v, NEW_FORMS.get(of(eqn).name, ""))
        for eqn in eqns if _is_obscure(eqn, value)
        for v in eqn.outvars if value(v).both and jnp.issubdtype(v.aval.dtype, jnp.inexact)
    ]  # fmt: skip
    return sorted(found, key=lambda region: region.indices[-1]), doubts


def _steps(block: Block, eqn: Equation) -> list[Axes]:
    """How the operands of a candidate that depend on parameters and data lie in its output."""
    held = arranged(block.value(eqn.outvars[0])) or {}
    same = tuple(range(len(eqn.outvars[0].aval.shape)))
    return [held.get(k, same) for k, v in enumerate(eqn.invars) if block.value(v).both]


def _lies(block: Block, eqn: Equation, operands: Any) -> bool:
    """Whether an equation is elementwise, and its operands have the shape of its output up to the order of axes."""
    shape = eqn.outvars[0].aval.shape
    return arranged(block.value(eqn.outvars[0])) is not None and all(
        len(v.aval.shape) == len(shape) and tuple(v.aval.shape[i] for i in step) == shape
        for v, step in zip(operands, _steps(block, eqn), strict=True)
    )


def _trimmed(block: Block, start: Any, indices: list[int], candidates: Any) -> tuple[Any, list[int]]:
    """The region without the factors and terms at its ends, unless they may belong to a formula."""
    eqns = block.jaxpr.eqns

    def affine(index: int) -> Any:
        operands, eqn = candidates[index], eqns[index]
        row = of(eqn)
        linear = row.curve == "linear" or (row.combines == "quotient" and eqn.invars[0] is operands[0])
        return linear and len(operands) == 1

    def formula(index: int) -> bool:
        return of(eqns[index]).curve == "formula"

    front, value, readers = 0, start, indices  # the number of equations before the first nonlinear one
    while len(readers := [i for i in indices if value in candidates[i]]) == 1 and affine(readers[0]):
        front, value = front + 1, eqns[readers[0]].outvars[0]
        if readers[0] == indices[-1]:
            return start, indices
    if all(map(formula, readers)):  # but the divisor of a mean does not belong to it
        producer = block.value(start).producer
        mean = producer is not None and of(producer).totals
        front = int(mean and front > 0 and of(eqns[indices[0]]).combines in ("quotient", "product"))
    for i in indices[:front]:
        start = eqns[i].outvars[0]
    indices = back = indices[front:]
    while len(back) > 1 and affine(back[-1]):
        operand = candidates[back[-1]][0]
        back = back[: 1 + next(n for n, i in enumerate(back) if eqns[i].outvars[0] is operand)]
    return start, indices if formula(back[-1]) else back


def _region(block: Block, start: Any, indices: Any) -> Region | Doubt | None:
    eqns, value = [block.jaxpr.eqns[i] for i in indices], block.value
    out = eqns[-1].outvars[0]
    calls = [call_name(e) for e in eqns if _is_named(e)]
    marked = any(n.startswith(MARK) for n in calls)
    nonlinear = [p for e in eqns for p in _nonlinear(e, value)]
    if any(n.startswith(UNMARK) for n in calls) or not (nonlinear or marked):
        return None
    if not jnp.issubdtype(out.aval.dtype, jnp.inexact):
        return None
    primitives = "_".join(dict.fromkeys(row.name for row in nonlinear))
    if not any(n in NAMED or n.startswith(MARK) for n in calls):
        if all(map(_of_statistics, nonlinear)) and is_statistic(value(start)):
            return None
        if len(nonlinear) == 1 and _of_formulas(nonlinear[0]):
            return Doubt(primitives, out)
    produced = {e.outvars[0] for e in eqns}
    free = (v for e in eqns for v in e.invars if not _is_literal(v) and v is not start and v not in produced)
    name = calls[0].removeprefix(MARK) if calls else ALIASES.get(primitives, primitives)
    lies = {start: tuple(range(len(start.aval.shape)))}
    for e in eqns:
        v = next(v for v in e.invars if value(v).both)
        lies[e.outvars[0]] = _composed(lies[v], _steps(block, e)[0])
    return Region(name, start, out, tuple(dict.fromkeys(free)), eqns, indices, lies[out])


def _hides(eqn: Equation, value: Callable[..., Value]) -> bool:
    """Whether a function of several elements, with a custom derivative, holds a possible activation."""
    of_several = of(eqn).name in OWN_DERIVATIVE and arranged(value(eqn.outvars[0])) is None
    return of_several and any(row.curve == "bent" for row in _inner(eqn))


def _is_obscure(eqn: Equation, value: Callable[..., Value]) -> bool:
    """Whether nothing is known of a primitive, or of one in a function of several results with a custom derivative."""
    if any(value(v).params and not value(v).both for v in eqn.invars):
        return False  # what meets weights is refused by their names
    several = of(eqn).name in OWN_DERIVATIVE and len(eqn.outvars) > 1
    rows = _inner(eqn) if several else [of(eqn)]
    unknown = any(row.kind == "unknown" and row.name not in FOLLOWED for row in rows)
    return unknown or (several and any(row.curve == "bent" for row in rows))


def _doubted(eqn: Equation) -> str:
    """The name of an equation of several values that may be meant as an activation."""
    if of(eqn).name in OWN_DERIVATIVE:
        return call_name(eqn)
    bent = [row.name for row in _inner(eqn) if row.bends]
    return "_".join(dict.fromkeys(bent)) or of(eqn).name


def _bends(eqn: Equation, value: Callable[..., Value]) -> bool:
    """Whether an elementwise equation of several values is nonlinear in one of them, as max and select are."""
    mixed = [v for v in eqn.invars if value(v).both]
    if all(is_statistic(value(v)) for v in mixed):
        return False
    row, out = of(eqn), value(eqn.outvars[0])
    if row.kind == "call" and out.producer is eqn and arranged(out) is not None:
        return any(inner.bends for inner in _inner(eqn))
    return value(eqn.invars[0]).both if row.combines == "select" else row.bends
