"""The states of predictive coding: where they lie in a network, and what happens there while it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lrules.engine.distance import First
from lrules.engine.jaxprs import SCAN
from lrules.engine.operations import of
from lrules.engine.records import Block, Value
from lrules.extend import Frame, Graph, Handler, Hidden


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """A tensor that is a state.

    Attributes:
      name: its name in frames.
      root: its value, at the definition.
      first: the loops around it (the outermost is 0), each with its first iteration, if the state is data while all
        are in their first iteration: the carry of a loop, which begins with data. None if it never is data.
    """

    name: str
    root: Value
    first: First | None


def places_of(graph: Graph, before: bool) -> list[Place]:
    """The states of a network: its hidden signals, or what their activations read (`before`).

    Raises:
      NotImplementedError: a state would lie where none can be kept, or has no batch.
    """
    hidden = [h for h in graph.hidden if not h.mark and jnp.issubdtype(h.root.aval.dtype, jnp.inexact)]
    chosen = [p for h in hidden for p in graph.pre_activations().get(h.name, [h])] if before else hidden
    begins, found = dict(_beginnings(graph.block)), {}  # type: ignore[var-annotated]
    for h in chosen:
        inside = [s.split(" ")[0] for s in h.root.place[0].scope if s != "scan"]  # type: ignore[index]
        if inside:
            raise NotImplementedError(
                f"the {_words(h)} lies inside a {inside[0]}, where predictive_coding cannot keep its state: move it "
                f"out of the {inside[0]}, or use another rule"
            )
        if not h.root.batched:
            raise NotImplementedError(
                f"the {_words(h)} of shape {h.root.aval.shape} has no batch, and predictive_coding has one state for "
                "each example: use another rule"
            )
        found.setdefault(id(h.root), Place(h.name, h.root, _first(h.root, begins)))
    return list(found.values())


def _words(hidden: Hidden) -> str:
    name = hidden.name.removesuffix(" pre-activation")
    return f"hidden signal {name!r}" if name == hidden.name else f"pre-activation of {name!r}"


def _first(root: Value, begins: Mapping[Any, Any]) -> First | None:
    """See `Place`; `begins` is the first iteration of each loop, by its block."""
    block, variable = root.place  # type: ignore[misc]
    if block not in begins or variable not in block.jaxpr.invars or len(root.operands) != 2:
        return None
    own, start = (len(block.loops) - 1, begins[block]), root.operands[0].root()[0]
    if not start.params:
        return (own,)
    further = None if start.place is None else _first(start, begins)
    return None if further is None else (*further, own)


def _beginnings(block: Block) -> Iterator[tuple[Block, Any]]:
    """The bodies of all loops, each with the number of its first iteration."""
    for number, children in block.children.items():
        eqn = block.jaxpr.eqns[number]
        for child in children:
            if of(eqn).name == SCAN:
                yield child, eqn.params["length"] - 1 if eqn.params["reverse"] else 0
            yield from _beginnings(child)


class States(Handler):
    """Cuts a network at its states: their readers get the states, and what predicts them is recorded.

    With `probes`, the readers get the predictions. The error that they send goes to zeros in `frame.inputs`, and not
    further down. Without, they get the states in `frame.inputs`.
    """

    def __init__(self, places: list[Place], probes: bool) -> None:
        self.places, self.probes = {place.name: place for place in places}, probes

    def hidden(self, hidden: Hidden, value: Any, frame: Frame) -> Any:
        place = self.places.get(hidden.name)
        if place is None:
            return value
        given = frame.inputs[place.name]
        seen = _cut(value, given) if self.probes else given
        if place.first is None:
            frame.records[place.name] = value
            return seen
        data = jnp.all(jnp.stack([frame.index[loop] == i for loop, i in place.first]))
        frame.records[place.name] = jnp.where(data, given, value)  # no prediction error there
        return jnp.where(data, value, seen)

    def pre_activation(self, hidden: Hidden, value: Any, frame: Frame) -> Any:
        return self.hidden(hidden, value, frame)


@jax.custom_vjp
def _cut(value: Any, probe: jax.Array) -> Any:
    return value


_cut.defvjp(lambda value, probe: (value, None), lambda _, error: (None, error))
