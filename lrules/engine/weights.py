"""Feedback weights: their shapes, and how they are drawn."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lrules.engine.batch import BatchAxis, Unbatched
from lrules.engine.dtypes import at_least_float32, feedback_dtype
from lrules.engine.graph import Graph
from lrules.engine.jaxprs import bind, split_as
from lrules.engine.operations import of
from lrules.engine.recomputed import Matrix, RecomputedFeedback
from lrules.engine.records import Hidden, Layer
from lrules.options import draw
from lrules.rule import Direct, Sequential

KEY_BYTES = 8  # of a feedback weight that is not stored: two words of 32 bits


@dataclasses.dataclass(frozen=True)
class DirectFeedback:
    """One place where direct feedback arrives, in `plan.direct_feedback`.

    Attributes:
      hidden: the hidden signal.
      spec: the rule there.
      axis: the batch axis in the value that the reader gets.
      shape: the shape of the feedback weights, `[*lengths, outputs, *hidden]`.
      lengths: the lengths of the scans whose iterations have separate feedback weights.
      shared: the places of the shared axes of the outputs in the hidden signal: axes without the batch, or loops.
      dtype: the dtype of the feedback weights.
      outputs: the number of values of the error before `Direct.rank` reduces it.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> from lrules import extend
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> net, x = lrules.Network(net), jnp.ones((5, 3))
      >>> spec = extend.Direct(lambda e, b, targets, name: extend.project(e, b), jnp.ones)
      >>> plan = extend.make_plan(net, net.graph(params, x), params, x, lambda name: spec)
      >>> plan.direct_feedback["b"].shape
      (2, 4)
    """

    hidden: Hidden
    spec: Direct
    axis: BatchAxis | None = None
    shape: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    shared: tuple[tuple[str, int], ...] = ()
    dtype: Any = jnp.float32
    outputs: int = 0

    def axes_named(self) -> str:
        """The shape of the feedback weights, as `3 iterations x 10 outputs x (128,)`."""
        n = len(self.lengths)
        scans = "".join(f"{length} iterations x " for length in self.lengths)
        again = ", drawn again" if self.spec.storage == "recomputed" else ""
        sent = "outputs" if self.spec.rank is None else "rank"
        return f"{scans}{self.shape[n]} {sent} x {self.shape[n + 1 :]}{again}"

    @property
    def lies(self) -> Sequence[Any]:
        """The explicit mesh axes over which the hidden signal is split, before the reader gathers it."""
        value = self.hidden.reader
        while value.source is not None and of(value.view).same_shape:
            value = value.source
        return value.aval.sharding.spec

    @property
    def batch_split(self) -> Any:
        """The mesh axes over which its batch is split; None if the batch is merged with other axes."""
        assert self.axis is not None
        unsplit = self.axis.merged or isinstance(self.axis, Unbatched)
        return None if unsplit else self.lies[self.axis.axis]

    @property
    def split(self) -> tuple[Any, ...]:
        """The mesh axes over which the feedback weights are split, as the features of the hidden signal are."""
        assert self.axis is not None
        positions = {place for kind, place in self.shared if kind == "axis"}
        axis = self.axis.axis
        rest = (*self.lies[:axis], *[None] * len(self.axis.merged), *self.lies[axis + 1 :])
        rest = tuple(self.lies) if isinstance(self.axis, Unbatched) else rest
        return (*[None] * (len(self.lengths) + 1), *(s for i, s in enumerate(rest) if i not in positions))

    @property
    def own(self) -> list[int]:
        """The loops around the hidden signal whose iterations have separate feedback weights."""
        return [i for i, (_, own) in enumerate(self.hidden.loops) if own]

    @property
    def others(self) -> list[int]:
        """The loops whose iterations share the feedback weights, except those that are a shared axis."""
        turns = [place for kind, place in self.shared if kind == "loop"]
        return [i for i, (_, own) in enumerate(self.hidden.loops) if not own and i not in turns]

    @property
    def where(self) -> list[int]:
        """The places of own loops, other loops and shared axes in `[*loops, batch, *hidden]`."""
        behind = len(self.hidden.loops) + 1
        return [*self.own, *self.others, *(i if kind == "loop" else behind + i for kind, i in self.shared)]

    @property
    def calls(self) -> tuple[int, ...]:
        """The number of calls of a function that is called for each iteration and position, along each of `where`."""
        assert self.axis is not None
        sizes = [*(n for n, _ in self.hidden.loops), 1, *self.axis.rest(self.hidden.reader.aval.shape)]
        return tuple(sizes[i] for i in self.where)

    @property
    def signal_shape(self) -> tuple[int, ...]:
        """The shape of the hidden signal without batch and shared axes, for the functions of the rule."""
        return self.shape[len(self.lengths) + 1 :]

    def read(self, value: Any, batch: int) -> jax.Array:
        """Brings the hidden signal from its definition to its reader, with the batch in front."""
        assert self.axis is not None
        for eqn in self.hidden.views:
            (value,) = bind(eqn, [value])
        if not isinstance(self.axis, Unbatched):
            at = self.axis.axis
            value = split_as(value, *self.lies[:at], self.batch_split, *self.lies[at + 1 :])
        return self.axis.in_front(value, self.hidden.reader.aval.shape, batch)

    def defined(self, signal: jax.Array) -> jax.Array:
        """Brings an error from the reader back to the definition."""
        assert self.axis is not None
        if self.axis.merged or not all(of(eqn).same_shape for eqn in self.hidden.views):
            signal = split_as(signal, self.batch_split)  # JAX can reshape few axes that are split
        return self.hidden.to_definition(self.axis.restore(signal, self.hidden.reader.aval.shape))

    @property
    def drawn(self) -> int:
        """The number of outputs for which feedback is drawn; with a rank, it keeps only as many as the rank.

        If such a matrix would be larger than all feedback may be, it is drawn for as many outputs as fit.
        """
        sent = self.shape[len(self.lengths)]
        size = math.prod(self.signal_shape)
        fitting = self.spec.max_feedback_bytes / max(size * jnp.dtype(self.dtype).itemsize, 1)
        return self.outputs if self.spec.rank is None else max(sent, int(min(self.outputs, fitting)))

    def weight(self, b: Any) -> Any:
        """The feedback weight as the function of the rule gets it, with the axes of `lengths` in front."""
        if b is None or self.spec.storage == "stored":
            return None if b is None else split_as(b, *self.split)
        assert self.spec.init is not None
        if self.lengths:
            keys = jax.random.split(jax.random.wrap_key_data(b, impl="threefry2x32"), math.prod(self.lengths))
            b = jax.random.key_data(keys).reshape(*self.lengths, 2)
        shape, size = self.shape[len(self.lengths) :], math.prod(self.signal_shape)
        matrix = Matrix(self.spec.init, size, self.drawn, self.dtype, self.hidden.name)
        return RecomputedFeedback(b, matrix, shape, self.dtype, self.hidden.name)

    def check_drawing(self, key: jax.Array) -> None:
        """Refuses an initializer that cannot draw a part of a feedback weight."""
        one = dataclasses.replace(self, lengths=(), shape=self.shape[len(self.lengths) :])
        jax.eval_shape(lambda key: one.weight(key).checked(), key)

    @property
    def nbytes(self) -> int:
        if self.spec.storage == "recomputed":
            return KEY_BYTES
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize if self.spec.init is not None else 0


@dataclasses.dataclass(frozen=True)
class SequentialFeedback:
    """One sequential feedback weight, in `plan.sequential_feedback`: it replaces a parameter.

    Attributes:
      index: the number of the parameter among the leaves.
      shape, dtype: the shape and dtype of the parameter.
      spec: the rule of the layer.
      fan_in, fan_out, sliced: the axes of the parameter that are summed over, that are not, and that a loop runs over.
      spatial: the axes of the window of a convolution.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> from lrules import extend
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> net, x = lrules.Network(net), jnp.ones((5, 3))
      >>> spec = extend.Sequential(lambda op, w, b, x, d, layer: (None, None, None), jnp.ones)
      >>> plan = extend.make_plan(net, net.graph(params, x), params, x, lambda name: spec)
      >>> {name: (entry.fan_in, entry.fan_out) for name, entry in plan.sequential_feedback.items()}
      {'b': ((0,), (1,))}
    """

    index: int
    shape: tuple[int, ...]
    dtype: Any
    spec: Sequential
    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]
    sliced: tuple[int, ...]
    spatial: tuple[int, ...] = ()

    def draw(self, key: jax.Array, weight: Any) -> jax.Array:
        """Draws it as the layer's `[fan_in, fan_out]` (a convolution: `[*window, in, out]`), for each loop iteration.

        Initializers with an argument `weight` get the parameter, in the same layout.
        """
        sizes = [[self.shape[i] for i in axes] for axes in (self.sliced, self.spatial, self.fan_in, self.fan_out)]
        shape = (*sizes[1], math.prod(sizes[2]), math.prod(sizes[3]))
        init = self.spec.init
        assert init is not None
        count = math.prod(sizes[0])
        order = (*self.sliced, *self.spatial, *self.fan_in, *self.fan_out)
        weights = None
        if "weight" in inspect.signature(init).parameters:
            weights = split_as(jax.lax.stop_gradient(jnp.transpose(weight, order))).reshape(count, *shape)

        def one(k: Any, w: Any) -> jax.Array:
            return draw(init, k, shape, self.dtype, **({} if w is None else {"weight": w}))

        if self.sliced:
            drawn = jax.vmap(one)(jax.random.split(key, count), weights)
        else:
            drawn = one(key, None if weights is None else weights[0])
        inverse = [order.index(i) for i in range(len(order))]
        return drawn.reshape([self.shape[i] for i in order]).transpose(inverse)


def draw_direct(landing: DirectFeedback, key: jax.Array) -> jax.Array:
    """Draws `[hidden size, outputs]`; with a rank, feedback keeps only `rank` of these outputs."""
    n = len(landing.lengths)
    sent, size = landing.shape[n], math.prod(landing.shape[n + 1 :])

    def one(k: Any) -> jax.Array:
        drawn = draw(landing.spec.init, k, (size, landing.drawn), landing.dtype)  # type: ignore[arg-type]
        return drawn[:, :sent].T.reshape(landing.shape[n:])

    if not n:
        return one(key)
    return jax.vmap(one)(jax.random.split(key, math.prod(landing.lengths))).reshape(landing.shape)


def draw_reduction(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The matrix `[outputs, rank]` that reduces errors to a rank: random rows of length one that sum to one.

    Independent numbers keep their mean and variance. Fewer than three numbers of length one cannot sum to one at
    random. Then the rows are normal, and their squares sum to one on average.
    """
    wide, rank = at_least_float32(dtype), shape[1]
    rows = jax.random.normal(key, shape, wide)
    if rank <= 2:
        return (rows / rank**0.5).astype(dtype)
    rows = rows - rows.mean(1, keepdims=True)
    rows = rows / jnp.linalg.norm(rows, axis=1, keepdims=True).astype(wide)
    return (rows * (1 - 1 / rank) ** 0.5 + 1 / rank).astype(dtype)


def _feedback_parameters(graph: Graph, layer: Layer) -> list[int]:
    """The parameters of a layer's weight that get feedback: matrices, or vectors if there are no matrices."""
    indices = sorted(layer.sources)
    ranks = {i: len(graph.param_avals[i].shape) - len(layer.weight.axes.get(i, ((), ()))[1]) for i in indices}
    return [i for i in indices if ranks[i] >= 2] or indices


def sequential_feedback_of(graph: Graph, layer: Layer, spec: Sequential) -> list[SequentialFeedback]:
    """Lists the sequential feedback of a layer: one entry per parameter matrix of its weight.

    Args:
      graph: the traced network.
      layer: the layer.
      spec: its rule.

    Returns:
      The entries.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> from lrules import extend
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> net, x = lrules.Network(net), jnp.ones((5, 3))
      >>> graph, spec = net.graph(params, x), extend.Sequential(lambda op, w, b, x, d, layer: (None, None, None))
      >>> [entry.shape for entry in extend.sequential_feedback_of(graph, graph.layers[1], spec)]
      [(4, 2)]
    """
    return [_entry(graph, layer, i, spec) for i in _feedback_parameters(graph, layer)]


def _entry(graph: Graph, layer: Layer, i: int, spec: Sequential) -> SequentialFeedback:
    aval = graph.param_avals[i]
    dims, sliced = layer.weight.axes.get(i, ((), frozenset()))
    contracted = {a for d in layer.contracted if d < len(dims) for a in dims[d]}
    free = {a for d, held in enumerate(dims) if d not in layer.contracted for a in held} - contracted
    matrices = layer.row.members(layer.eqn, layer.position)  # an ensemble, heads, experts: each is a separate matrix
    members = {a for d in matrices if d < len(dims) for a in dims[d]} - contracted
    free, sliced = free - members, sliced | members
    lost = [a for a in range(len(aval.shape)) if a not in contracted | free | sliced]
    if lost:  # an axis that was summed on the way (a factorised weight): it counts to the other side
        (contracted if free and not contracted else free).update(lost)
    spatial: tuple[int, ...] = ()
    window = layer.row.window(layer.eqn, layer.position)
    if window and all(len(held) == 1 for held in dims):
        spatial = tuple(dims[d][0] for d in window)
        contracted -= set(spatial)
    return SequentialFeedback(
        i, tuple(aval.shape), feedback_dtype(aval.dtype), spec,
        tuple(sorted(contracted)), tuple(sorted(free)), tuple(sorted(sliced)), spatial,
    )  # fmt: skip
