"""Where the batch lies in a tensor: this is found by tracing the network at twice the batch.

An axis that doubles with the batch holds the batch. Direct feedback brings each example its own error, so the order of
the examples counts too (`order.py`).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lrules.engine.graph import Graph
from lrules.engine.order import MOVED, Examples, order_of
from lrules.engine.records import Value
from lrules.engine.reshapes import moved
from lrules.engine.twice import AtTwice, BySize, Twin, grows, write_shapes
from lrules.network import Network
from lrules.typing import Pytree


@dataclasses.dataclass(frozen=True)
class BatchAxis:
    """The place of the batch in a tensor: axis `axis`, with the size `before * batch * after` if it is merged.

    Args:
      axis: the axis.
      before, after: the sizes that are merged with the batch, before and after it.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> axis = lrules.extend.BatchAxis(0, after=4)  # [batch * time, features], with 4 steps
      >>> axis.in_front(jnp.ones((20, 3)), (20, 3), 5).shape
      (5, 4, 3)
    """

    axis: int
    before: int = 1
    after: int = 1

    @property
    def merged(self) -> list[int]:
        """The sizes of the axes that are merged with the batch."""
        return [n for n in (self.before, self.after) if n != 1]

    @property
    def _place(self) -> int:
        """Where the batch lies once its axis is split: an axis of size one before it would stop JAX's reshapes."""
        return self.axis + (self.before != 1)

    def rest(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape without the batch; a merged axis is split."""
        return (*shape[: self.axis], *self.merged, *shape[self.axis + 1 :])

    def restore(self, x: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Moves the batch axis, which is first in `x`, to its place in a tensor of that shape."""
        if not self.merged:
            x = moved(x, [0], [self.axis])
            return x if x.shape == tuple(shape) else x.reshape(shape)
        return moved(x.reshape(x.shape[0], *self.rest(shape)), [0], [self._place]).reshape(shape)

    def in_front(self, x: jax.Array, shape: Sequence[int], batch: int) -> jax.Array:
        """A tensor of that shape as `[batch, *rest]`."""
        if not self.merged:
            return moved(x, [self.axis], [0])
        sizes = list(self.rest(shape))
        sizes.insert(self._place, -1)
        return moved(x.reshape(sizes), [self._place], [0])


@dataclasses.dataclass(frozen=True)
class Unbatched(BatchAxis):
    """Instead of a batch axis, for a tensor that is the same for all examples: their signals add up there."""

    axis: int = -1

    def rest(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)

    def restore(self, x: jax.Array, shape: Sequence[int]) -> jax.Array:
        return x.sum(0).reshape(shape)

    def in_front(self, x: jax.Array, shape: Sequence[int], batch: int) -> jax.Array:
        return jnp.broadcast_to(x.reshape(1, *shape), (batch, *shape))


def find_batch_axis(a: Value, b: Twin | None, batch: int) -> BatchAxis | None:
    """The batch axis of a value, from its traces `a` at the batch and `b` at twice the batch; None if not known."""
    shape = a.aval.shape
    if b is None:  # the model does not accept another batch
        if sum(n != 0 and n % batch == 0 for n in shape) != 1:
            return None
        b = BySize(a, batch)
    axis = _grown(a, b)
    if axis is None:
        return None
    order = order_of(a, b, axis, batch)
    if isinstance(order, Examples):
        whole = order.size == batch and order.before * batch * order.after == shape[axis]
        return BatchAxis(axis, order.before, order.after) if whole else None
    if order == MOVED:
        return None
    return BatchAxis(axis) if shape[axis] == batch else None


def batch_axis(net: Network, name: str, a: Value, b: Twin | None, batch: int) -> BatchAxis | None:
    """Finds the batch axis of an output or a hidden signal.

    Args:
      net: the network; its `signal_axes` may give the axis.
      name: the name of the hidden signal, or `"outputs"`.
      a: the value in the graph of the network.
      b: the same value at twice the batch, from `doubled`; None if there is none.
      batch: the number of examples.

    Returns:
      The axis; None if it cannot be found.

    Raises:
      ValueError: the axis in `signal_axes` does not have the size of the batch.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> net, w, x = lrules.Network(lambda w, x: (x @ w).T), jnp.ones((3, 4)), jnp.ones((5, 3))
      >>> (out,) = net.graph(w, x).outs
      >>> twice = lrules.extend.doubled(net, w, x, net.graph(w, x))
      >>> lrules.extend.batch_axis(net, "outputs", out, twice(out), 5)
      BatchAxis(axis=1, before=1, after=1)
    """
    stated = net.stated_axis(name, a.aval.shape, batch)
    return find_batch_axis(a, b, batch) if stated is None else BatchAxis(stated)


def _grown(a: Value, b: Twin) -> int | None:
    """The one axis that doubles with the batch."""
    grown = [i for i in range(len(a.aval.shape)) if grows(a, b, i)]
    if len(grown) != 1:
        return None
    doubles = isinstance(b, BySize) or b.aval.shape[grown[0]] == 2 * a.aval.shape[grown[0]]
    return grown[0] if doubles else None


def doubled(net: Network, params: Pytree, inputs: Pytree, graph: Graph) -> Callable[[Value], Twin] | None:
    """Traces a network at twice the batch: there the axes that hold the batch are twice as long.

    Args:
      net, params, inputs: the network, and what it takes.
      graph: its trace at the batch.

    Returns:
      A function from a value of the graph to the same value at twice the batch; None if the model cannot be traced like
      this.

    Raises:
      ValueError: the trace is another network.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> net, w, x = lrules.Network(lambda w, x: x @ w), jnp.ones((3, 4)), jnp.ones((5, 3))
      >>> graph = net.graph(w, x)
      >>> lrules.extend.doubled(net, w, x, graph)(graph.outs[0]).aval.shape
      (10, 4)
    """

    def trace() -> Callable[[Value], Twin] | None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if write_shapes(graph, net.jaxpr_at_twice(params, inputs), net.input_batch_axes(inputs)):
                    return AtTwice
                twice = net.graph(params, inputs, double=True)  # it has other operations, as may be for one example
        except Exception:  # noqa: BLE001  any failure of the user's model at another batch size
            return None
        if [h.name for h in twice.hidden] != [h.name for h in graph.hidden] or len(twice.outs) != len(graph.outs):
            raise ValueError(
                "the network has other layers at another batch size, so direct feedback cannot find the single "
                "examples: write it so that the batch is only an axis (vmap, scan), or use a sequential rule"
            )
        pairs = {id(a): b for a, b in zip(_found(graph), _found(twice), strict=False)}
        return lambda value: pairs[id(value)]

    return graph.once("doubled", trace)


def _found(graph: Graph) -> list[Value]:
    """The values whose batch axis may be asked for."""
    values = [*graph.outs, *(v for h in graph.hidden for v in (h.reader, h.root))]
    values += [v for layer in graph.layers for v in (layer.operand, layer.output) if v is not None]
    return values + [affine.output for affine in graph.affines]
