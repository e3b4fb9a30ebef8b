"""Findings: the layers, hidden signals, activations, biases and scales of a network, and its refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lrules.engine.activations import Doubt
from lrules.engine.jaxprs import Equation, varying_axes
from lrules.engine.layers import Multiplication
from lrules.engine.operations import of
from lrules.engine.records import Affine, Block, Hidden, Layer, Names, Refusal, Value, want

REMEDIES = {
    "while loop": " (rules serve a loop with numbers as bounds: lax.fori_loop, or lax.scan)",
    "loop inside a custom_vjp function": " (for diffrax.diffeqsolve, sequential rules serve adjoint=DirectAdjoint())",
}


class Findings:
    """The results of a walk over a network (see `analysis.py`).

    Args:
      names, ndims: the names and the numbers of axes of the parameters.
    """

    def __init__(self, names: Sequence[str], ndims: Sequence[int]) -> None:
        self.names, self.ndims = names, ndims
        self.layers: list[Layer] = []
        self.hidden: list[Hidden] = []
        self.affines: list[Affine] = []
        self.refusals: list[Refusal] = []
        self.noted: list[Block | Doubt] = []  # blocks with possible activations, and misplaced marks
        self.silent = 0  # > 0 while a walk over a scan's body only looks for the classes of its carry
        self.unmarked = False  # inside lrules.not_activation
        self.sealed: str | None = None  # inside a construct where no layer can be served
        self.inner: list[tuple[Multiplication, str]] | None = None  # products inside a custom derivative

    def refuse(self, params: frozenset[int], what: str) -> None:
        if not self.silent:
            names = ", ".join(repr(self.names[i]) for i in sorted(params))
            refusal = Refusal(params, what.format(name=names), self.sealed != "while loop")
            if refusal not in self.refusals:
                self.refusals.append(refusal)

    def add_layer(self, block: Block, index: int, eqn: Equation, found: Multiplication) -> None:
        w, x, sources = found.weight, found.operand, found.sources
        if self.inner is not None:
            self.inner.append((found, "loop inside a " if {"scan", "while"} & set(block.scope) else ""))
            return
        if self.sealed:
            self.refuse(
                sources,
                f"the parameter {{name}} is multiplied by data inside a {self.sealed}, and rules cannot act there: "
                f"move the multiplication out of the {self.sealed}{REMEDIES.get(self.sealed, '')}",
            )
            return
        if w.carried:
            self.refuse(
                sources,
                "the parameter {name} passes through a scan's carry before it multiplies data: scan over it (xs), or "
                "use it from outside the loop",
            )
            return
        if self.silent:
            return
        for lookup in w.lookups:
            lookup.uses.add("weight")
        order = sorted(sources, key=lambda i: (self.rank_at_use(w, i) < 2, i))
        names = tuple(self.names[i] for i in order)
        layer = Layer(
            name=names[0],
            parameters=names,
            operation=of(eqn).name,
            site="",
            contracted=tuple(found.contracted),
            output_axes=found.output_axes,
            weight=w,
            operand=x,
            scope=block.scope,
            owned=_owned_axes(w),
            eqn=eqn,
            sources=sources,
            position=found.position,
            mixed=found.mixed,
            place=(block, index),
        )
        self.layers.append(layer)
        block.layers[index] = layer
        if x.params and jnp.issubdtype(x.aval.dtype, jnp.inexact):
            layer.reads = self.add_hidden(x, "", w.loops, mark=False)
            layer.reads.readers.append(layer)

    def add_hidden(self, x: Value, name: str, loops: frozenset[Any], mark: bool) -> Hidden:
        root, views = x.root()
        if mark or root.hidden is None:
            block, variable = root.place  # type: ignore[misc]
            hidden = Hidden(
                name=name,
                root=root,
                views=views,
                reader=x,
                loops=tuple((length, key in loops) for key, length in block.loops),
                mark=mark,
            )
            block.hidden.setdefault(variable, []).append(hidden)
            self.hidden.append(hidden)
            if mark:
                return hidden
            root.hidden = hidden
        return root.hidden

    def finish(self, outs: Sequence[Value]) -> None:
        """Decides which lookups are layers, names all that was found, and marks the values that need feedback."""
        for out in outs:
            for lookup in out.lookups:
                lookup.uses.add("data")
        for layer in [layer for layer in self.layers if layer.uses == {"weight"}]:
            block, index = layer.place
            self.layers.remove(layer)
            del block.layers[index]
            layer.output.layer = None  # type: ignore[union-attr]
            if layer.reads is not None:
                layer.reads.readers.remove(layer)
        for hidden in [h for h in self.hidden if not h.mark and not h.readers]:
            self.hidden.remove(hidden)
            block, variable = hidden.root.place  # type: ignore[misc]
            block.hidden[variable].remove(hidden)
        sites = Names()
        for layer in self.layers:
            layer.site = sites.unique(layer.name)
            want(layer.weight)
        self.count_uses()
        taken = {True: Names(), False: Names()}
        for hidden in self.hidden:
            hidden.name = taken[hidden.mark].unique(hidden.name if hidden.mark else hidden.readers[0].name)

    def count_uses(self) -> None:
        """Says of each layer how often its parameter is used where it reads a hidden signal."""
        whole: dict[str, list[Layer]] = {}  # not those that use a slice each, such as w[0] and w[1]
        for layer in self.layers:
            loops = layer.place[0].loops
            layer.times = math.prod(length for key, length in loops if key not in layer.weight.loops)
            if layer.reads is not None and not any(sliced for _, sliced in layer.weight.axes.values()):
                whole.setdefault(layer.name, []).append(layer)
        for layers in whole.values():
            total = sum(layer.times for layer in layers)
            for layer in layers:
                layer.times = total

    def add_affine(self, block: Block, index: int, ins: list[Value], out: Value) -> None:
        """Records where a bias or scale meets data, except in a `custom_jvp` body, which has no place of its own."""
        pure = [k for k, v in enumerate(ins) if v.pure]
        if len(pure) == 1 and not self.sealed and jnp.issubdtype(out.aval.dtype, jnp.inexact):
            affine = Affine(f"affine {len(self.affines)}", pure[0], ins[pure[0]], out)
            self.affines.append(affine)
            block.affines[index] = affine

    def rank_at_use(self, w: Value, i: int) -> int:
        axes, sliced = w.axes.get(i, ((), frozenset()))
        return self.ndims[i] - len(sliced)


def _owned_axes(w: Value) -> frozenset[Any]:
    """Mesh axes along which a `shard_map` of the network splits the values from which the weight is made."""
    if not varying_axes(w.aval):
        return frozenset()
    found: set[str] = set()
    seen: set[int] = set()
    stack = [w]
    while stack:
        value = stack.pop()
        if id(value) not in seen:
            seen.add(id(value))
            found |= value.split
            stack += value.operands
    return frozenset(found) & varying_axes(w.aval)
