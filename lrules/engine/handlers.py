"""Handlers: what modifiers and rules do at the sites of a network while it runs."""

from __future__ import annotations

import copy
import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lrules.engine.jaxprs import placed_as, varying_axes
from lrules.engine.records import Activation, Affine, Block, Hidden, Layer, Value

Pair = tuple[Any, Any]  # a value and its shadow (None where there is none)


class Handler:
    """What to do where; the base class does nothing.

    Handlers are pytrees, so that a `custom_vjp` around the network can take their arrays as arguments: a subclass names
    in `arrays` its attributes that hold any.
    """

    arrays: tuple[str, ...] = ()
    activations = False  # whether activations are evaluated as units
    affines = False  # whether biases and scales are evaluated one by one

    def __init_subclass__(cls) -> None:
        def flatten(handler: Any) -> tuple[tuple[Any, ...], Any]:
            if "_bare" not in handler.__dict__:  # the same without its arrays: equal for all that are made of it
                handler._bare = copy.copy(handler)
                handler._bare.__dict__.update(dict.fromkeys(cls.arrays))
            return tuple(getattr(handler, name) for name in cls.arrays), handler._bare

        def unflatten(bare: Any, values: Sequence[Any]) -> Any:
            new = copy.copy(bare)
            new.__dict__.update(zip(cls.arrays, values, strict=True))
            new._bare = bare
            return new

        jax.tree_util.register_pytree_node(cls, flatten, unflatten)

    def layer(self, layer: Layer, op: Operation, w: jax.Array, b: Any, x: jax.Array, frame: Frame) -> Any:
        """The layer's output, `op(w, x)`; `b` is the shadow of `w`."""
        return op(w, x)

    def affine(self, affine: Affine, op: Callable[..., Any], p: Any, others: Any, frame: Frame) -> Any:
        """What comes of a bias or scale `p` and the data that it meets, `op(p, others)`."""
        return op(p, others)

    def hidden(self, hidden: Hidden, value: Any, frame: Frame) -> Any:
        """What the readers of a hidden signal (and all other users of that tensor) get."""
        return value

    def activation(self, activation: Activation, fn: Callable[..., Any], x: jax.Array, frame: Frame) -> Any:
        """The activation's output, `fn(x)`."""
        return fn(x)


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """A layer's multiplication as a handler meets it: `op(w, x)`.

    Attributes:
      run: `(w, b, x) -> y`, the same with the feedback an argument; its pullback is that of the handlers inside.
      product: `(w, x) -> y`, the multiplication itself.
      b: the feedback.
    """

    run: Callable[..., Any]
    product: Callable[..., Any]
    b: Any

    def __call__(self, w: jax.Array, x: jax.Array) -> Any:
        return self.run(w, self.b, x)


@dataclasses.dataclass(eq=False)
class Frame:
    """Where in the run a handler is called: what it may read and write there.

    Attributes:
      inputs: arrays by site; those of sites inside a scan are scanned along.
      records: arrays by site; those written inside a scan come out stacked.
      index: the iteration number of each scan around the site, the outermost first.
      slots: by layer, what handlers at its output hand to those further up in the same loop, branch or remat.
    """

    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    records: dict[str, Any] = dataclasses.field(default_factory=dict)
    index: tuple[Any, ...] = ()
    slots: dict[str, Any] = dataclasses.field(default_factory=dict)

    def taken(self) -> dict[str, Any]:
        """The records, which the frame then no longer holds: what handlers have made of it outlives a trace."""
        taken, self.records = self.records, {}
        return taken


def name_number(name: str) -> int:
    """A number for a name, to fold into keys: the same in every process, which hash() is not."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def key_at(key: jax.Array, site: str, value: Any, frame: Frame) -> jax.Array:
    """A key for this site, this iteration of the loops around it, and this device.

    Args:
      key: the key of the step.
      site: the name of a hidden signal, a layer or an activation.
      value: what is there, an array or several: they tell over which devices it is spread.
      frame: where in the run.
    """
    key = jax.random.fold_in(key, name_number(site))
    for i in frame.index:
        key = jax.random.fold_in(key, i)
    return on_device(key, value)


def on_device(key: jax.Array, value: Any) -> jax.Array:
    """A key for this device, among those over which a value is spread."""
    axes = frozenset().union(*(varying_axes(jax.typeof(leaf)) for leaf in jax.tree.leaves(value)))
    for axis in sorted(axes):
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return key


def zeros_at(value: Value | None) -> jax.Array:
    """Zeros in the shape of a value, with the axes of the scans around it in front, as `Frame.inputs` wants them."""
    assert value is not None and value.place is not None
    lengths = [length for _, length in value.place[0].loops]
    zeros = jnp.zeros((*lengths, *value.aval.shape), value.aval.dtype)
    return placed_as(zeros, value.aval, len(lengths))


def all_zeros_at(values: Mapping[str, Value | None]) -> dict[str, jax.Array]:
    """The same for many values; those that are equal are one array."""
    made: dict[Any, jax.Array] = {}
    found = {}
    for name, value in values.items():
        assert value is not None and value.place is not None
        key = value.aval, tuple(length for _, length in value.place[0].loops)
        if key not in made:
            made[key] = zeros_at(value)
        found[name] = made[key]
    return found


def below(inputs: Mapping[str, Any], child: Block) -> dict[str, Any]:
    if not inputs:
        return {}
    sites = child.sites()
    return {site: value for site, value in inputs.items() if site in sites}


def nest_layer(
    handler: Handler, layer: Layer, run: Callable[..., Any], product: Callable[..., Any], frame: Frame
) -> Callable[..., Any]:
    def nested(w: jax.Array, b: Any, x: jax.Array) -> Any:
        return handler.layer(layer, Operation(run, product, b), w, b, x, frame)

    return nested


def nest_affine(handler: Handler, affine: Affine, run: Callable[..., Any], frame: Frame) -> Callable[..., Any]:
    return lambda p, others: handler.affine(affine, run, p, others, frame)


def nest_activation(
    handler: Handler, activation: Activation, run: Callable[..., Any], frame: Frame
) -> Callable[..., Any]:
    return lambda x: handler.activation(activation, run, x, frame)
