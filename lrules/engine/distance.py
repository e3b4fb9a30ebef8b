"""How far the layers of a network are from its outputs, counted in states between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrules.engine.graph import Graph
from lrules.engine.jaxprs import SCAN, Atom, is_literal, scan_counts
from lrules.engine.operations import of
from lrules.engine.records import Block

First = tuple[tuple[int, Any], ...]  # loops around a place (the outermost is 0), each with one of its iterations


def depth_of(graph: Graph, states: Mapping[Any, First | None]) -> int:
    """The number of steps until an error has reached all parameters.

    An error crosses one state in each step, on the shortest way down. A parameter of several layers is reached when one
    of them is.

    Args:
      graph: the network.
      states: the places of the states (`Value.place`), each with the iterations of the loops around it in which it is
        none; None if it always is one.
    """
    reached: dict[str, list[tuple[tuple[tuple[Any, int], ...], float]]] = {}
    outside = float("inf")

    def walk(block: Block, outs: list[float], index: tuple[int, ...]) -> list[float]:
        """The steps until an error reaches the arguments of a block, from those until it reaches its results."""
        env: dict[Any, float] = {}

        def reach(atom: Atom, steps: float) -> None:
            if not is_literal(atom):
                env[atom] = min(env.get(atom, outside), steps)

        def made(variable: Any) -> float:
            """The steps until an error reaches what makes a variable."""
            steps, place = env.get(variable, outside), (block, variable)
            first = states.get(place)
            none = place not in states or (first is not None and all(index[loop] == i for loop, i in first))
            return steps if none else steps + 1

        for atom, steps in zip(block.jaxpr.outvars, outs, strict=True):
            reach(atom, steps)
        for number, eqn in reversed(list(enumerate(block.jaxpr.eqns))):
            outs_at = [made(v) for v in eqn.outvars]
            children = block.children.get(number, [])
            if number in block.layers:
                layer = block.layers[number]
                own = tuple((k, i) for (k, _), i in zip(block.loops, index, strict=True) if k in layer.weight.loops)
                reached.setdefault(layer.name, []).append((own, min(outs_at)))
            if len(children) == 1 and of(eqn).name == SCAN:
                ins = scan(children[0], eqn.params, outs_at, index)
            elif len(children) == 1 and len(children[0].jaxpr.invars) == len(eqn.invars):
                ins = walk(children[0], outs_at, index)
            else:
                ins = [outside if of(eqn).stops else min(outs_at, default=outside)] * len(eqn.invars)
            for atom, own_steps in zip(eqn.invars, ins, strict=True):
                reach(atom, own_steps)
        return [made(v) for v in block.jaxpr.invars]

    def scan(child: Block, params: Any, outs: list[float], index: tuple[int, ...]) -> list[float]:
        n_consts, n_carry = scan_counts(params)
        length = params["length"] if isinstance(params["length"], int) else 1  # it may be symbolic
        carry, ins = outs[:n_carry], [outside] * len(child.jaxpr.invars)
        for turn in reversed(range(length)):
            place = length - 1 - turn if params["reverse"] else turn
            found = walk(child, [*carry, *outs[n_carry:]], (*index, place))
            carry = found[n_consts : n_consts + n_carry]
            ins = [min(pair) for pair in zip(ins, found, strict=True)]
        return [*ins[:n_consts], *carry, *ins[n_consts + n_carry :]]

    walk(graph.block, [0.0 if i < graph.n_outputs else outside for i in range(len(graph.outs))], ())
    needed = [0.0]
    for uses in reached.values():
        by_slice: dict[Any, float] = {}
        for own, steps in uses:
            by_slice[own] = min(by_slice.get(own, outside), steps)
        needed += [steps for steps in by_slice.values() if steps < outside]
    return int(max(needed))
