"""The end of a network without parameters: softmax, log_softmax, sigmoid or the like of the outputs of a layer.

Direct rules take the output error below this end, at the outputs of the layer. There it is T - O for softmax or sigmoid
with their cross-entropies, as in the papers. So the network runs up to there as one function with a custom derivative,
and the end runs unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lrules.engine.activations import ALIASES, FORMULAS
from lrules.engine.graph import Graph
from lrules.engine.jaxprs import CONSTRUCTS, INLINED, SCAN, Atom, bind, is_literal
from lrules.engine.operations import Row, of
from lrules.engine.records import Block, Layer, Value


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """One output that is a function without parameters of the outputs of a layer.

    Attributes:
      output: the number of the output.
      value: the outputs of the layer.
      layer: the name of the layer.
      function: the name of the function, `softmax` for example.
      views: the casts, reshapes and transposes after the function; the error follows them.
    """

    output: int
    value: Value
    layer: str
    function: str
    views: tuple[Any, ...] = ()

    def arranged(self, error: jax.Array) -> jax.Array:
        """The error at the outputs of the layer, arranged as the output."""
        for eqn in self.views:
            (error,) = bind(eqn, [error])
        return error


def heads(graph: Graph) -> dict[int, Head]:
    """The outputs that are nonlinear functions, without parameters, of outputs of a layer with the same shape."""
    return {i: head for i in range(graph.n_outputs) if (head := _head(graph, i)) is not None}


def _head(graph: Graph, i: int) -> Head | None:
    out, views = graph.outs[i].root()
    found: dict[int, Value] = {}
    known: dict[int, Layer | None] = {}
    seen: set[int] = set()
    passed: list[tuple[str, Row]] = []
    stack, bends = [out], False
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if _layer_of(value, known) is not None:
            found[id(value)] = value
            continue
        eqn = value.producer
        moving = [v for v in value.operands if v.params]
        if eqn is None or not moving or of(eqn).name in CONSTRUCTS:
            return None
        row = of(eqn)
        meet = row.kind == "product" or row.combines in ("product", "quotient")
        bends |= _bends(row) or (meet and len(moving) > 1)
        passed.append((str(eqn.params.get("name", row.name)), row))
        stack += moving
    (value, *others) = found.values() or (out,)
    block = value.place[0] if value.place is not None else None
    layer = _layer_of(value, known)
    if others or not bends or block is None or block.scope or layer is None or value.aval.shape != out.aval.shape:
        return None
    return Head(i, value, layer.name, _named(passed), views)


def _bends(row: Row) -> bool:
    """Whether a primitive is nonlinear, or selects from its operand."""
    if row.combines in ("quotient", "select"):
        return False
    return row.nonlinear or row.curve == "rows" or row.kind == "call"


def _named(passed: Sequence[tuple[str, Row]]) -> str:
    """One name for all primitives and calls between a layer and an output."""
    names = [name for name, _ in passed]
    for formula, called in FORMULAS.items():
        if set(formula.split("_")) <= set(names):
            return called
    bent = [name for name, row in passed if row.curve != "linear"]
    return ALIASES.get(bent[0], bent[0]) if len(bent) == 1 else " ".join(dict.fromkeys(reversed(bent)))


def _layer_of(value: Value, known: dict[int, Layer | None]) -> Layer | None:
    """The layer whose outputs these are, with its bias, or the first of several that add up; None if there is none.

    Values that constants bring along the edges of a graph still count as the outputs of the layer.
    """
    stack = [value]
    while stack:  # a chain of residual blocks is too long for recursion
        at = stack[-1]
        same = [] if at.layer is not None else _same_layer(at)
        waiting = [v for v in same if id(v) not in known]
        if waiting:
            stack += waiting
            continue
        layers = [known[id(v)] for v in same]
        known[id(at)] = at.layer if not layers else None if None in layers else layers[0]
        stack.pop()
    return known[id(value)]


def _same_layer(value: Value) -> list[Value]:
    """The values that are outputs of a layer if this one is."""
    row = None if value.producer is None else of(value.producer)
    moving = [v for v in value.operands if v.both]
    adds = row is not None and row.combines == "sum"
    if adds and len(moving) == 2:
        return moving
    if value.source is not None:
        return [value.source]
    biased = adds and all(v.pure for v in value.operands if v not in moving)
    brought = row is not None and row.brings and not any(v.pure or v.chosen for v in value.operands)
    looped = row is not None and row.name == SCAN
    return moving if len(moving) == 1 and (biased or brought or looped) else []


def finish(graph: Graph, given: Mapping[int, Any], params: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """The outputs, computed from the given values (by id)."""
    wanted = graph.block.jaxpr.outvars[: graph.n_outputs]
    env = dict(zip(graph.block.jaxpr.invars, [*params, *inputs], strict=True))
    env |= dict(zip(graph.block.jaxpr.constvars, graph.consts, strict=True))
    _evaluate(graph.block, wanted, env, given)
    return [v.val if is_literal(v) else env[v] for v in wanted]


def _needed(block: Block, wanted: Sequence[Any], given: Mapping[int, Any]) -> tuple[dict[int, list[Any]], set[Any]]:
    """The equations that give the wanted variables, what is wanted of each, and the variables where they begin."""
    makers = {v: i for i, eqn in enumerate(block.jaxpr.eqns) for v in eqn.outvars}
    equations: dict[int, list[Any]] = {}
    seen: set[Any] = set()
    begin: set[Any] = set()
    todo: dict[int, set[Any]] = {}
    for v in wanted:
        todo.setdefault(makers.get(v, -1) if not is_literal(v) else -2, set()).add(v)
    for index in range(len(block.jaxpr.eqns) - 1, -2, -1):
        asked = [v for v in todo.get(index, ()) if v not in seen]
        seen.update(asked)
        begin.update(v for v in asked if index == -1 and id(block.values[v]) not in given)
        asked = [v for v in asked if index >= 0 and id(block.values[v]) not in given]
        if asked:
            equations[index] = asked
            for v in _operands(block, index, asked, given):
                if not is_literal(v):
                    todo.setdefault(makers.get(v, -1), set()).add(v)
    return equations, begin


def _operands(block: Block, index: int, asked: Sequence[Any], given: Mapping[int, Any]) -> list[Any]:
    """The operands that an equation needs for the results that are asked of it."""
    eqn = block.jaxpr.eqns[index]
    if index not in block.children or of(eqn).name not in INLINED:
        return list(eqn.invars)
    (child,) = block.children[index]
    inner = [child.jaxpr.outvars[eqn.outvars.index(v)] for v in asked]
    _, begin = _needed(child, inner, given)
    return [outer for outer, v in zip(eqn.invars, child.jaxpr.invars, strict=True) if v in begin]


def _evaluate(block: Block, wanted: Sequence[Any], env: dict[Any, Any], given: Mapping[int, Any]) -> None:
    """Puts the wanted variables into the environment."""
    equations, _ = _needed(block, wanted, given)
    env |= {v: given[id(value)] for v, value in block.values.items() if id(value) in given}

    def read(v: Atom) -> Any:
        return v.val if is_literal(v) else env[v]

    for index in sorted(equations):
        eqn = block.jaxpr.eqns[index]
        if index in block.children and of(eqn).name in INLINED:
            (child,) = block.children[index]
            passed = [(o, v) for o, v in zip(eqn.invars, child.jaxpr.invars, strict=True) if is_literal(o) or o in env]
            inner = {v: read(o) for o, v in passed}
            inner |= dict(zip(child.jaxpr.constvars, child.consts, strict=True))
            outs = [child.jaxpr.outvars[eqn.outvars.index(v)] for v in equations[index]]
            _evaluate(child, outs, inner, given)
            env |= {v: o.val if is_literal(o) else inner[o] for v, o in zip(equations[index], outs, strict=True)}
        else:
            env |= dict(zip(eqn.outvars, bind(eqn, [read(v) for v in eqn.invars]), strict=True))
