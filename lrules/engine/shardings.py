"""Where feedback lies on a mesh: sequential feedback as its parameter, direct feedback as its hidden signal.

Where an array lies is known in one of three ways:

- An array has its sharding, and so may have a `ShapeDtypeStruct`.
- On a mesh with explicit axes the type of a value has it, also under `jit` (see `split_as`).
- Under `jit`, on a mesh with automatic axes, XLA chooses it after tracing. Then it is asked to place two values alike.

A hidden signal has no sharding before the network runs, so it is found, axis by axis. An axis lies as the model says
(`with_sharding_constraint`), else as the axis of the weight that multiplies it, else as the axis of the weight that it
comes from. These weights may lie in parts to save memory (FSDP): the feedback weight then lies in parts as they do.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lrules.engine.activations import arranged, is_atom
from lrules.engine.batch import Unbatched
from lrules.engine.graph import Graph
from lrules.engine.jaxprs import OWN_DERIVATIVE, split_as, varying_axes
from lrules.engine.operations import of, view_axes
from lrules.engine.records import Layer, Value, united
from lrules.engine.weights import DirectFeedback

Source = tuple[int, int]  # a parameter, by number, and one of its axes

MOST = 2000  # values to look at, on the way back from one axis of a hidden signal


@dataclasses.dataclass(frozen=True)
class Layout:
    """What tells where an array lies.

    Attributes:
      home: the parameter, by number, on whose mesh it lies.
      sources: for each axis, the axes of parameters as which it lies; the first that is split decides.
      stated: for each axis, the mesh axes that the model gives for it; None if it gives none.
      typed: for each axis, the explicit mesh axes of its type.
      batch: the mesh axes over which the model splits the batch.
      mesh: the mesh of what the model gives.
      same: whether it lies exactly as the parameter `home`, which has its shape.
    """

    home: int
    sources: tuple[tuple[Source, ...], ...]
    stated: tuple[Any, ...] = ()
    typed: tuple[Any, ...] = ()
    batch: frozenset[Any] = frozenset()
    mesh: Any = None
    same: bool = False

    def sharding(self, shape: Sequence[int], shardings: Sequence[Any]) -> Any:
        """The sharding, from those of the parameters; None if they are not known."""
        own = (i for axis in self.sources for i, _ in axis)
        told = itertools.chain([self.home], own, range(len(shardings)))
        home = next((s for i in told if isinstance(s := shardings[i], NamedSharding)), shardings[self.home])
        if self.same or not isinstance(home, NamedSharding):
            return shardings[self.home]
        mesh, types = home.mesh, dict(zip(home.mesh.axis_names, home.mesh.axis_types, strict=True))
        free = (AxisType.Auto,) if self.typed else (AxisType.Auto, AxisType.Explicit)
        spec = [_names(entry) for entry in self.typed or [None] * len(shape)]
        used = {*self.batch, *(name for names in spec for name in names)}
        for d, size in enumerate(shape):
            for names in self._candidates(d, shardings):
                new = tuple(n for n in names if types.get(n) in free and n not in used)
                if new and size % math.prod(mesh.shape[n] for n in (*spec[d], *new)) == 0:
                    spec[d], used = (*spec[d], *new), used | set(new)
                    break
        return NamedSharding(mesh, partition(spec))

    def behind(self, lead: int) -> Layout:
        """The layout with more axes in front, which are not split."""
        more: Any = {"stated": (*[None] * lead, *self.stated)} if self.stated else {}
        more |= {"typed": (*[None] * lead, *self.typed)} if self.typed else {}
        return dataclasses.replace(self, sources=(*[()] * lead, *self.sources), same=self.same and not lead, **more)

    @property
    def reversed(self) -> Layout:
        """The layout of the transposed array."""
        parts = self.sources[::-1], self.stated[::-1], self.typed[::-1]
        return Layout(self.home, *parts, self.batch, self.mesh)

    def of_last(self, n: int) -> Layout:
        """The layout of the last axes alone."""
        at = len(self.sources) - n
        parts = self.sources[at:], self.stated[at:], self.typed[at:]
        return Layout(self.home, *parts, self.batch, self.mesh)

    def _candidates(self, d: int, shardings: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """The mesh axes over which an axis may be split, the likeliest first."""
        if self.stated and self.stated[d] is not None:
            yield self.stated[d]
            return
        for i, axis in self.sources[d]:
            if isinstance(shardings[i], NamedSharding) and axis < len(shardings[i].spec):
                yield _names(shardings[i].spec[axis])

    def place(self, x: jax.Array, params: Sequence[Any], shardings: Sequence[Any]) -> Any:
        """The array, placed on the devices where it belongs.

        Args:
          x: the array.
          params: the parameters.
          shardings: `known` of each.
        """
        home = params[self.home]
        if AxisType.Explicit in _kinds(home):
            x = split_as(x, *(self.typed or self.sharding(x.shape, list(map(_in_type, params))).spec))
        if isinstance(home, jax.core.Tracer):
            return self._tied(x, params)
        sharding = self.sharding(x.shape, shardings)
        if not isinstance(sharding, NamedSharding):
            return x
        if isinstance(x, jax.core.Tracer):
            automatic = all(kind == AxisType.Auto for kind in sharding.mesh.axis_types)
            return jax.lax.with_sharding_constraint(x, sharding) if automatic else x
        return x if x.sharding.is_equivalent_to(sharding, x.ndim) else jax.device_put(x, sharding)

    def _tied(self, x: jax.Array, params: Sequence[Any]) -> Any:
        """The array, which XLA shall place as the parameters, wherever it places them."""
        if any(kind != AxisType.Auto for kind in _kinds(params[self.home])) or jax.device_count() == 1:
            return x
        if any(s is not None for s in self.stated) and isinstance(self.mesh, jax.sharding.Mesh):
            given = dataclasses.replace(self, home=0, sources=((),) * x.ndim)
            spec = given.sharding(x.shape, [NamedSharding(self.mesh, PartitionSpec())]).spec
            spec = [PartitionSpec.UNCONSTRAINED if s is None else n for s, n in zip(self.stated, spec, strict=True)]
            x = jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*spec)))
        like = self._like(x, params)
        if like is None:
            return x
        # XLA splits the operands of a select alike. It cannot know that the barrier lets a constant through.
        return jax.lax.select(jax.lax.optimization_barrier(jnp.bool_(True)), x, like)

    def _like(self, x: jax.Array, params: Sequence[Any]) -> Any:
        """An array of the shape of `x`, which lies as the parameters do. XLA drops it when both are placed."""
        if self.same:
            return params[self.home].astype(x.dtype)
        by_param: dict[int, dict[int, int]] = {}
        for d, axis in enumerate(self.sources):
            for i, a in axis if not self.stated or self.stated[d] is None else ():
                if params[i].shape[a] == x.shape[d] and d not in by_param.get(i, {}).values():
                    by_param.setdefault(i, {}).setdefault(a, d)
        total = None
        for i, places in by_param.items():
            row, kept = params[i], sorted(places)
            for a in reversed(range(row.ndim)):
                row = row if a in places else jax.lax.index_in_dim(row, 0, a, keepdims=False)
            order = sorted(range(len(kept)), key=[places[a] for a in kept].__getitem__)
            row = row.transpose(order).astype(x.dtype)
            row = jax.lax.broadcast_in_dim(row, x.shape, sorted(places.values()))
            total = row if total is None else total + row
        return total


def known(leaf: Any) -> Any:
    """The sharding of an array or `ShapeDtypeStruct`; None if it is not known."""
    return None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)


def _in_type(leaf: Any) -> Any:
    """The sharding in the type of a value, which has the explicit axes."""
    return known(leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf).sharding


def _kinds(leaf: Any) -> Sequence[Any]:
    """The kinds of the axes of the mesh in the type of a value."""
    return getattr(getattr(_in_type(leaf), "mesh", None), "axis_types", ())


def may_lie_on_a_mesh(params: Sequence[Any]) -> bool:
    """Whether the parameters lie on a mesh; under `jit`, whether they can."""
    traced = any(isinstance(p, jax.core.Tracer) for p in params)
    return (traced and jax.device_count() > 1) or any(isinstance(known(p), NamedSharding) for p in params)


def partition(spec: Sequence[tuple[Any, ...]]) -> PartitionSpec:
    """The mesh axes of each axis, as JAX writes them."""

    return PartitionSpec(*(names if len(names) > 1 else names[0] if names else None for names in spec))


def _names(entry: Any) -> tuple[Any, ...]:
    """The mesh axes in an entry of a PartitionSpec."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def of_parameter(i: int, ndim: int) -> Layout:
    """The layout of what has the shape of a parameter and belongs to it."""
    return Layout(i, tuple(((i, d),) for d in range(ndim)), same=True)


def of_weight(layer: Layer) -> Layout:
    """The layout of what has the shape of the weight of a layer."""
    return Layout(min(layer.sources), tuple(tuple(_held(layer, d)) for d in range(len(layer.weight.aval.shape))))


def whole(home: int, ndim: int) -> Layout:
    """The layout of what lies whole on each device of the mesh of a parameter."""
    return Layout(home, ((),) * ndim)


def of_signal(landing: DirectFeedback) -> Layout:
    """The layout of a direct feedback weight, `[*lengths, outputs, *hidden]`."""
    reader, readers, axis = landing.hidden.reader, landing.hidden.readers, landing.axis
    assert axis is not None
    dims: list[int | None] = list(range(len(reader.aval.shape)))
    stated: Any = None
    if not isinstance(axis, Unbatched):
        dims[axis.axis : axis.axis + 1] = [None] * len(axis.merged)
        stated = _told(reader, axis.axis)[1]
    positions = {place for kind, place in landing.shared if kind == "axis"}
    found = [
        ((), None) if d is None else _told(reader, d, [p for layer in readers for p in _multiplies(layer, reader, d)])
        for i, d in enumerate(dims)
        if i not in positions
    ]
    lead: list[tuple[tuple[Source, ...], _Stated | None]] = [((), None)] * (len(landing.lengths) + 1)
    if readers and len(landing.lengths) == 1:  # the weights of its iterations may lie in parts
        for i, (_, sliced) in readers[0].weight.axes.items():
            lead[0] = (tuple((i, a) for a in sliced) if len(sliced) == 1 else (), None)
    told = [*lead, *found]
    meshes = [at.mesh for _, at in [*told, ((), stated)] if at is not None]
    return Layout(
        min(readers[0].sources) if readers else 0,
        tuple(sources for sources, _ in told),
        tuple(None if at is None else at.names for _, at in told),
        landing.split,
        frozenset() if stated is None else frozenset(stated.names),
        meshes[0] if meshes else None,
    )


@dataclasses.dataclass(frozen=True)
class _Stated:
    names: tuple[Any, ...]
    mesh: Any


def _multiplies(layer: Layer, reader: Value, d: int) -> list[Source]:
    """The axes of parameters that a layer multiplies by axis `d` of what it reads, and sums over."""
    eqn, k, row = layer.eqn, layer.position, layer.row
    if row.kind != "product" or layer.operand.aval.shape != reader.aval.shape or len(eqn.invars) != 2:
        return []
    window = row.window(eqn, k)
    weight = [a for a in row.contracted(eqn, k) if a not in window]
    data = [eqn.params["dimension_numbers"].lhs_spec[1]] if window else list(row.contracted(eqn, 1 - k))
    if d not in data or len(data) != len(weight):
        return []
    axis = weight[data.index(d)]
    return _held(layer, axis) if layer.weight.aval.shape[axis] == reader.aval.shape[d] else []


def _held(layer: Layer, axis: int) -> list[Source]:
    """The axes of parameters that an axis of a layer's weight holds; of several that are merged, the first."""
    held = [(i, dims[axis]) for i, (dims, _) in layer.weight.axes.items() if axis < len(dims)]
    return [(i, axes[0]) for i, axes in held if axes and i in layer.sources]


def _told(
    value: Value, dim: int, sources: Sequence[Source] = (), *, whole_weights: bool = False
) -> tuple[tuple[Source, ...], _Stated | None]:
    """As what an axis of a value lies: axes of parameters, and what the model states.

    The axis is followed back through all operations that keep it in one place. With `whole_weights`, weights that the
    devices have gathered tell nothing.
    """
    found = dict.fromkeys(sources)
    todo, seen = deque([(value, dim)]), set[tuple[int, int]]()
    while todo and len(seen) < MOST:
        value, dim = todo.popleft()
        if (id(value), dim) in seen:
            continue
        seen.add((id(value), dim))
        at = _constraint(value, dim)
        if at is not None:
            return tuple(found), at
        layer = value.layer
        comes = {} if layer is None else {o: a for a, o in layer.output_axes.items()}
        if layer is not None and dim in comes:
            if not (whole_weights and _gathered(layer.weight)):
                found |= dict.fromkeys(_held(layer, comes[dim]))
        else:
            todo += [(v, d) for v, d in _before(value, dim) if v.data]
    return tuple(found), None


def _constraint(value: Value, dim: int) -> _Stated | None:
    """What the model states at this place."""
    sharding = None if value.producer is None else value.producer.params.get("sharding")
    if _is_placed(value) and isinstance(sharding, NamedSharding):
        entry = sharding.spec[dim] if dim < len(sharding.spec) else None
        return None if entry is PartitionSpec.UNCONSTRAINED else _Stated(_names(entry), sharding.mesh)
    return None


def _is_placed(value: Value) -> bool:
    """Whether an operation makes the value that only places it on devices."""
    return value.producer is not None and of(value.producer).kind == "placement"


def _before(value: Value, dim: int) -> Iterator[tuple[Value, int]]:
    """The operands that hold an axis of a value, with their axes."""
    eqn, shape = value.producer, value.aval.shape
    if eqn is None:  # a slice of a scanned value, the start of a carry
        for v in value.operands[:1]:
            if len(v.aval.shape) >= len(shape):
                yield v, dim + len(v.aval.shape) - len(shape)
        return
    row = of(eqn)
    axes = view_axes(eqn, value.operands[0].aval.shape) if row.view is not None and len(value.operands) == 1 else None
    if axes is not None:
        sizes = value.operands[0].aval.shape
        first = next((j for j in axes[dim] if sizes[j] != 1), None)
        before = [o for o in range(dim) if axes[o] == axes[dim] and shape[o] != 1]
        if first is not None and not before:  # of axes that are merged or split, the first lies in parts
            yield value.operands[0], first
        return
    if row.elementwise or row.name in OWN_DERIVATIVE or is_atom(eqn, value.operands):
        lies: Any = arranged(value) or {}
        for k, v in enumerate(value.operands):
            i = lies[k][dim] if lies.get(k) else dim
            if len(getattr(v.aval, "shape", ())) == len(shape) and v.aval.shape[i] == shape[dim]:
                yield v, i
    elif row.lies is not None:
        for k, v in enumerate(value.operands):
            contracted = row.contracted(eqn, k)
            places = {o: i for i, o in row.lies(eqn, k).items() if i not in contracted}
            if dim in places and v.aval.shape[places[dim]] == shape[dim]:
                yield v, places[dim]


# --------------------------------------------------------------------------------------- inside a shard_map of the user


def parts_of_parameter(graph: Graph, i: int) -> frozenset[Any]:
    """The mesh axes along which devices have different parts of a parameter.

    Data-parallel programs may mark their parameters as different, too. There the inputs are split over the same axes,
    and the network does not gather the parameter.
    """
    layers = [layer for layer in graph.layers if i in layer.sources]
    return _own_parts(graph, i, any(_gathered(layer.weight) for layer in layers))


def parts_of_signal(graph: Graph, landing: DirectFeedback) -> frozenset[Any]:
    """The mesh axes along which devices have different features of a hidden signal."""
    reader, axis = landing.hidden.reader, landing.axis
    assert axis is not None
    found: frozenset[Any] = frozenset()
    for dim in range(len(reader.aval.shape)):
        if dim != axis.axis or isinstance(axis, Unbatched):
            for i, _ in _told(reader, dim, whole_weights=True)[0]:
                found |= _own_parts(graph, i, False)
    return found


def _own_parts(graph: Graph, i: int, gathered: bool) -> frozenset[Any]:
    split = varying_axes(graph.param_avals[i])
    return split if gathered or not split else split - united(varying_axes(v.aval) for v in graph.arguments)


def _gathered(weight: Value) -> bool:
    """Whether devices exchange parts of a weight before the layer uses it."""
    todo = [weight]
    while todo:
        value = todo.pop()
        if value.producer is not None and of(value.producer).kind in ("collective", "unknown"):
            return True
        todo += [v for v in value.operands if v.params]
    return False
