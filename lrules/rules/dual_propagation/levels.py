"""The level of each state: the number of activations on the longest path from the inputs to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.export import is_symbolic_dim

from lrules.engine.jaxprs import INLINED, SCAN, Atom, is_literal, scan_counts
from lrules.engine.operations import of
from lrules.engine.records import Block
from lrules.extend import Graph


def levels_of(graph: Graph, sites: set[str]) -> tuple[dict[str, np.ndarray], int]:
    """The level of each state, one per iteration of the loops around it; and the level of the outputs.

    Raises:
      NotImplementedError: a loop has a symbolic length.
    """

    def walk(block: Block, ins: list[int]) -> tuple[list[int], dict[str, Any]]:
        env = dict.fromkeys(block.jaxpr.constvars, 0) | dict(zip(block.jaxpr.invars, ins, strict=True))
        found: dict[str, Any] = {}

        def read(atom: Atom) -> int:
            return 0 if is_literal(atom) else env[atom]

        for index, eqn in enumerate(block.jaxpr.eqns):
            levels = [read(v) for v in eqn.invars]
            outs = [max(levels, default=0)] * len(eqn.outvars)
            if index in block.regions and block.regions[index].activation.site in sites:
                region = block.regions[index]
                outs = [read(region.root) + 1]
                found[region.activation.site] = np.asarray(outs[0])
            elif index in block.children and of(eqn).name == SCAN:
                outs, inner = scan(block.children[index][0], eqn.params, levels)
                found |= inner
            elif index in block.children and of(eqn).name in INLINED:
                outs, inner = walk(block.children[index][0], levels)
                found |= inner
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in block.jaxpr.outvars], found

    def scan(child: Block, params: Mapping[str, Any], levels: list[int]) -> tuple[list[int], dict[str, Any]]:
        n_consts, n_carry = scan_counts(params)
        carry, stacks, ys = levels[n_consts : n_consts + n_carry], [], []
        if is_symbolic_dim(params["length"]):
            raise NotImplementedError(
                f"this order numbers the iterations of a scan, and the length of the scan is the symbolic "
                f'{params["length"]}: give that axis of the inputs its size, or give order="forward_backward"'
            )
        for _ in range(params["length"]):
            outs, found = walk(child, [*levels[:n_consts], *carry, *levels[n_consts + n_carry :]])
            carry = outs[:n_carry]
            ys.append(outs[n_carry:])
            stacks.append(found)
        if params["reverse"]:
            stacks.reverse()
        stacked = {site: np.stack([found[site] for found in stacks]) for site in stacks[0]} if stacks else {}
        return [*carry, *(max(column) for column in zip(*ys, strict=True))], stacked

    outs, found = walk(graph.block, [0] * len(graph.block.jaxpr.invars))
    return found, max(outs[: graph.n_outputs], default=0) + 1
