"""Runs a network whose parameters are made anew where they are used, so that one of them exists at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from lrules.engine.jaxprs import bind, is_literal
from lrules.extend import Graph

Make = Callable[[str, Any], jax.Array]


def run_late(graph: Graph, inputs: Sequence[Any], consts: Sequence[Any], make: Make) -> tuple[Any, Any]:
    """Evaluates a network, with parameters made late.

    What depends on parameters alone (a cast, a transpose) waits until an equation reads it beside data. So XLA cannot
    begin it before the data are there. It is then made again for each such equation.

    Args:
      graph: the traced network.
      inputs, consts: the leaves of its inputs, and the arrays over which it closes.
      make: `(name, after) -> parameter`, where `after` is an array, or None, that has to be there before.

    Returns:
      `(outputs, aux)`.
    """
    jaxpr, names = graph.closed.jaxpr, graph.names
    parameters = dict(zip(jaxpr.invars, names, strict=False))
    env = dict(zip(jaxpr.invars[len(names) :], inputs, strict=True)) | dict(zip(jaxpr.constvars, consts, strict=True))
    makers: dict[Any, Any] = {}  # the equations of values that depend on parameters alone

    def late(v: Any) -> bool:
        return not is_literal(v) and (v in parameters or v in makers)

    def read(v: Any, after: Any, made: dict[Any, Any]) -> Any:
        if is_literal(v):
            return v.val
        if v in env:
            return env[v]
        if v not in made:
            if v in parameters:
                made[v] = make(parameters[v], after)
            else:
                eqn = makers[v]
                made |= zip(eqn.outvars, bind(eqn, [read(u, after, made) for u in eqn.invars]), strict=True)
        return made[v]

    for eqn in jaxpr.eqns:
        data = [v for v in eqn.invars if not is_literal(v) and not late(v) and v not in jaxpr.constvars]
        if any(map(late, eqn.invars)) and not data and not eqn.effects:
            makers |= dict.fromkeys(eqn.outvars, eqn)
            continue
        after, here = (env[data[0]] if data else None), dict[Any, Any]()
        env |= zip(eqn.outvars, bind(eqn, [read(v, after, here) for v in eqn.invars]), strict=True)
    end: dict[Any, Any] = {}
    outs = [read(v, None, end) for v in jaxpr.outvars]
    n = graph.n_outputs
    return jax.tree.unflatten(graph.out_tree, outs[:n]), jax.tree.unflatten(graph.aux_tree, outs[n:])
