"""The traces of a network: it is traced and analysed once for each kind of arguments, and both are kept.

JAX itself decides which trace fits: it keeps its traces by the shapes, dtypes and splits of the arguments and by its
settings (precision, meshes, 64 bits), and returns the same jaxpr again. The analysis belongs to that jaxpr.
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
    """One kind of arguments: the function that JAX traces, and the graphs of its traces."""

    def __init__(self, apply: Callable[..., Any], flat: Callable[..., Any]) -> None:
        self.apply = apply
        self.trace = jax.make_jaxpr(flat, return_shape=True)
        self.graphs: collections.deque[Graph] = collections.deque(maxlen=4)  # one for each setting of JAX
        self.writes: frozenset[Place] = frozenset()
        self.reads = captured(apply)

    @property
    def serves(self) -> bool:
        """Whether the function still reads the same values as when it was traced."""
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
        # Tracers that the function reads or keeps belong to this call alone.
        if after is None or any(isinstance(const, jax.core.Tracer) for const in closed.consts):
            self.reads = None
        elif self.reads is not None:
            self.writes |= self.reads.changed(after)
            self.reads = captured(self.apply, self.writes)
        return graph


class Traces:
    """The traces of one network, with any handlers; the least recently used trace is dropped first."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._signatures: collections.OrderedDict[Hashable, _Signature] = collections.OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return Traces, ()  # a copy in another process starts empty

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
          flat: `flat(*args) -> (outputs, aux)`, a function that calls it.
          key: the key of this function.
          args: lists of arrays.
          build: `(jaxpr, structures of outputs and aux) -> Graph`.
        """
        with self._lock:
            try:
                key = (key, *(tuple(map(jax.typeof, leaves)) for leaves in args))
                signature = self._signatures.pop(key, None)
            except TypeError:  # a structure without a hash, or an argument that JAX will refuse
                return _Signature(apply, flat).graph(args, build)
            if signature is None or not signature.serves:
                signature = _Signature(apply, flat)
            graph = signature.graph(args, build)
            if signature.reads is not None:
                self._signatures[key] = signature
                if len(self._signatures) > MOST:
                    self._signatures.popitem(last=False)
            return graph
