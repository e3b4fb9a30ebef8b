"""The traces of a network: it is traced and analysed once for each kind of arguments, and both are kept.

JAX itself says which trace serves: it keeps what it has traced by the shapes, dtypes and splits of the arguments and
by its own settings (precision, meshes, 64 bits), and gives the same jaxpr again. The analysis belongs to that jaxpr.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

from lrules.engine.captured import Place, captured
from lrules.engine.graph import Graph

MOST = 32


class _Signature:
    """One kind of arguments: the function that JAX traces, and what came of it."""

    def __init__(self, apply: Callable[..., Any], flat: Callable[..., Any]) -> None:
        self.apply = apply
        self.trace = jax.make_jaxpr(flat, return_shape=True)
        self.graphs: collections.deque[Graph] = collections.deque(maxlen=4)  # by JAX's settings
        self.writes: frozenset[Place] = frozenset()
        self.reads = captured(apply)

    @property
    def serves(self) -> bool:
        """Whether what the function reads is what it read when it was traced."""
        if self.reads is None:
            return False
        now = captured(self.apply, self.writes)
        return now is not None and not self.reads.changed(now)

    def graph(self, args: Sequence[Any], build: Callable[..., Graph]) -> Graph:
        closed, shapes = self.trace(*args)
        known = next((graph for graph in self.graphs if graph.closed.jaxpr is closed.jaxpr), None)
        if known is not None:
            return known
        graph = build(closed, *map(jax.tree.structure, shapes))
        self.graphs.append(graph)
        after = captured(self.apply)
        # Tracers that it has reached unseen, or kept, belong to this call alone.
        if after is None or any(isinstance(const, jax.core.Tracer) for const in closed.consts):
            self.reads = None
        elif self.reads is not None:
            self.writes |= self.reads.changed(after)
            self.reads = captured(self.apply, self.writes)
        return graph


class Traces:
    """What one network, with any handlers, has been traced to; the least recently used is forgotten first."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._signatures: collections.OrderedDict[Hashable, _Signature] = collections.OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return Traces, ()  # a copy in another process begins anew

    def graph(
        self,
        apply: Callable[..., Any],
        key: Hashable,
        flat: Callable[..., Any],
        args: Sequence[Any],
        build: Callable[..., Graph],
    ) -> Graph:
        """The graph of `apply` on these arguments.

        Args:
          apply: the function of the network.
          flat: `flat(*args) -> (outputs, aux)`, which calls it.
          key: which of all such functions it is.
          args: lists of arrays.
          build: `(jaxpr, structures of outputs and aux) -> Graph`.
        """
        with self._lock:
            try:
                key = (key, *(tuple(map(jax.typeof, leaves)) for leaves in args))
                signature = self._signatures.pop(key, None)
            except TypeError:  # a structure that has no hash, or an argument that JAX will refuse
                return _Signature(apply, flat).graph(args, build)
            if signature is None or not signature.serves:
                signature = _Signature(apply, flat)
            graph = signature.graph(args, build)
            if signature.reads is not None:
                self._signatures[key] = signature
                if len(self._signatures) > MOST:
                    self._signatures.popitem(last=False)
            return graph
