"""Handlers: they decide what happens at the sites of a network while it runs. Modifiers and rules consist of them."""

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

Pair = tuple[Any, Any]  # a value and its shadow (None if there is none)


class Handler:
    """Decides what happens at the sites of a network; the base class changes nothing.

    Make a subclass and override `layer`, `affine`, `hidden`, `pre_activation` or `activation`. Handlers are pytrees, so
    that a `custom_vjp` around the network can take their arrays as arguments: name the attributes that hold arrays in
    `arrays`.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> class Doubled(lrules.extend.Handler):
      ...     def layer(self, layer, op, w, b, x, frame):
      ...         return 2 * op(w, x)
      >>> lrules.extend.run(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.ones((1, 2)), [Doubled()])[0].tolist()
      [[4.0]]
    """

    arrays: tuple[str, ...] = ()
    activations = False  # whether activations are evaluated as units
    affines = False  # whether biases and scales are evaluated one by one

    def __init_subclass__(cls) -> None:
        def flatten(handler: Any) -> tuple[tuple[Any, ...], Any]:
            if "_bare" not in handler.__dict__:  # the handler without its arrays: equal for all copies of it
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
        """The output of the layer, `op(w, x)`; `b` is the feedback that replaces `w`."""
        return op(w, x)

    def affine(self, affine: Affine, op: Callable[..., Any], p: Any, others: Any, frame: Frame) -> Any:
        """The result of a bias or scale `p` and the data that it meets, `op(p, others)`."""
        return op(p, others)

    def hidden(self, hidden: Hidden, value: Any, frame: Frame) -> Any:
        """The value that the readers of a hidden signal (and all other users of that tensor) get."""
        return value

    def pre_activation(self, hidden: Hidden, value: Any, frame: Frame) -> Any:
        """The value that all users of a pre-activation get, at its definition; only of `Graph.pre_activations`."""
        return value

    def activation(self, activation: Activation, fn: Callable[..., Any], x: jax.Array, frame: Frame) -> Any:
        """The output of the activation, `fn(x)`."""
        return fn(x)


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """The multiplication of a layer, as a handler gets it: `op(w, x)`.

    Attributes:
      run: `(w, b, x) -> y`, the same with the feedback as an argument; its pullback is that of the handlers inside.
      product: `(w, x) -> y`, the multiplication itself.
      b: the feedback.

    Example:
      >>> import lrules
      >>> op = lrules.extend.Operation(lambda w, b, x: w * x, lambda w, x: w * x, None)
      >>> op(2.0, 3.0)
      6.0
    """

    run: Callable[..., Any]
    product: Callable[..., Any]
    b: Any

    def __call__(self, w: jax.Array, x: jax.Array) -> Any:
        return self.run(w, self.b, x)


@dataclasses.dataclass(eq=False)
class Frame:
    """What a handler can read and write where it is called.

    Attributes:
      inputs: arrays by site; arrays of sites inside a scan have its length in front, and are scanned too.
      records: arrays by site; arrays that are written inside a scan come out stacked.
      index: the iteration number of each scan around the site, the outermost scan first.
      slots: by layer, what handlers at its output give to handlers further up in the same loop, branch or remat.

    Example:
      >>> import lrules
      >>> frame = lrules.extend.Frame(inputs={"a output": 1.0})
      >>> frame.records["a output"] = 2 * frame.inputs["a output"]
      >>> frame.taken()
      {'a output': 2.0}
    """

    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    records: dict[str, Any] = dataclasses.field(default_factory=dict)
    index: tuple[Any, ...] = ()
    slots: dict[str, Any] = dataclasses.field(default_factory=dict)

    def taken(self) -> dict[str, Any]:
        """The records. The frame forgets them, because handlers may keep the frame longer than a trace lives."""
        taken, self.records = self.records, {}
        return taken


def name_number(name: str) -> int:
    """A number for a name, to fold into keys: it is the same in every process (hash() is not)."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def key_at(key: jax.Array, site: str, value: Any, frame: Frame) -> jax.Array:
    """Makes a key for this site, this iteration of the loops around it, and this device.

    Args:
      key: the key of the step.
      site: the name of a hidden signal, a layer or an activation.
      value: the value there, a pytree of arrays. They show over which devices it is spread.
      frame: the frame that the handler got.

    Returns:
      The key.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> key, frame = jax.random.key(0), lrules.extend.Frame()
      >>> a, b = (lrules.extend.key_at(key, site, jnp.ones(2), frame) for site in "ab")
      >>> bool(a == b)
      False
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
    """Makes zeros with the shape of a value, with the axes of the scans around it in front, for `Frame.inputs`.

    Args:
      value: a value of a network, such as `layer.output` or `hidden.root`.

    Returns:
      The zeros.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> graph = lrules.Network(lambda w, x: x @ w).graph(jnp.ones((3, 2)), jnp.ones((5, 3)))
      >>> lrules.extend.zeros_at(graph.layers[0].output).shape
      (5, 2)
    """
    assert value is not None and value.place is not None
    lengths = [length for _, length in value.place[0].loops]
    zeros = jnp.zeros((*lengths, *value.aval.shape), value.aval.dtype)
    return placed_as(zeros, value.aval, len(lengths))


def all_zeros_at(values: Mapping[str, Value | None]) -> dict[str, jax.Array]:
    """Makes zeros as `zeros_at` does, for many values; values of the same kind share one array.

    Args:
      values: a dict of values of a network.

    Returns:
      A dict with the zeros.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> graph = lrules.Network(lambda w, x: x @ w).graph(jnp.ones((3, 2)), jnp.ones((5, 3)))
      >>> zeros = lrules.extend.all_zeros_at({layer.at_output: layer.output for layer in graph.layers})
      >>> {site: value.shape for site, value in zeros.items()}
      {'params output': (5, 2)}
    """
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
