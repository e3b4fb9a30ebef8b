"""The records of the analysis: values, blocks, and the layers, hidden signals and activations found in them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax

from lrules.engine.by_hand import HandProduct
from lrules.engine.dtypes import is_inexact
from lrules.engine.jaxprs import Atom, Aval, Equation, is_literal
from lrules.engine.operations import Row, of


@dataclasses.dataclass(eq=False)
class Layer:
    """A multiplication of data by parameters.

    Attributes:
      name: the name of its parameter (if the weight is computed from several, the first of rank >= 2).
      parameters: the names of all parameters from which its weight is computed.
      operation: the primitive: `dot_general`, `conv_general_dilated`, `gather` and so on.
      site: the name, unique in the network, with `#2`, `#3`, ... for further uses.
      contracted: the axes of the weight that are summed over (for an embedding, the vocabulary).
      output_axes: for each other axis of the weight, the axis of the output that it becomes.
      weight, operand, output: the values that it multiplies, and the result.
      reads: the hidden signal that it reads; None for a first layer.
      scope: the constructs around it, as `("scan", "cond")`.
      sources: the parameters (by index) from which its weight is computed.
      position: the operand of the equation that is the weight.
      mixed: whether other layers have made its weight, from the same parameters.
      owned: mesh axes along which the parameter itself is split, inside a `shard_map` of the network.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> (layer,) = lrules.Network(lambda w, x: x @ w).graph(jnp.ones((3, 4)), jnp.ones((5, 3))).layers
      >>> layer.name, layer.operation, layer.contracted, layer.output_axes
      ('params', 'dot_general', (0,), {1: 1})
    """

    name: str
    parameters: tuple[str, ...]
    operation: str
    site: str
    contracted: tuple[int, ...]
    output_axes: dict[int, int]
    weight: Value = dataclasses.field(repr=False)
    operand: Value = dataclasses.field(repr=False)
    scope: tuple[str, ...] = ()
    reads: Hidden | None = None
    owned: frozenset[Any] = frozenset()
    eqn: Any = dataclasses.field(default=None, repr=False)
    sources: frozenset[int] = frozenset()
    position: int = 0
    mixed: bool = False
    times: Any = 1  # how often its parameter reads hidden signals, in loops that share it and at several layers
    place: Any = dataclasses.field(default=None, repr=False)  # the block and the number of the equation
    uses: set[str] = dataclasses.field(default_factory=set, repr=False)  # how the rows that it looks up are used
    output: Value | None = dataclasses.field(default=None, repr=False)

    @property
    def row(self) -> Row:
        """The facts about its operation."""
        return of(self.eqn)

    @property
    def at_output(self) -> str:
        """The name of its output in frames."""
        return f"{self.site} output"


@dataclasses.dataclass(eq=False)
class Affine:
    """A bias or a scale: a value made from parameters meets data, but not in a layer.

    Attributes:
      site: the name, unique in the network.
      position: the operand of the equation that is the bias or scale.
      value: this operand.
      output: the result.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: x @ p["w"] + p["b"], {"w": jnp.ones((3, 4)), "b": jnp.ones((1, 4))}
      >>> (affine,) = lrules.Network(net).graph(params, jnp.ones((5, 3))).affines
      >>> affine.output.aval.shape
      (5, 4)
    """

    site: str
    position: int
    value: Value = dataclasses.field(repr=False)
    output: Value = dataclasses.field(repr=False)


@dataclasses.dataclass(eq=False)
class Hidden:
    """A hidden signal: a tensor that layers read, at its definition.

    Attributes:
      name: the name of the first weight that reads it (`#2`, `#3` for further signals of that weight), or of its mark.
      root: the value at the definition.
      views: the casts, reshapes and transposes from the definition to the first reader.
      reader: the value that the first reader gets.
      readers: the layers that read it.
      loops: for each scan around the definition, its length, and whether the reading weight changes with it.
      mark: whether the model marks it (`lrules.hidden`); else a layer reads it.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> (hidden,) = lrules.Network(net).graph(params, jnp.ones((5, 3))).hidden
      >>> hidden.name, hidden.root.aval.shape
      ('b', (5, 4))
    """

    name: str
    root: Value = dataclasses.field(repr=False)
    views: tuple[Any, ...] = dataclasses.field(repr=False)
    reader: Value = dataclasses.field(repr=False)
    readers: list[Layer] = dataclasses.field(default_factory=list, repr=False)
    loops: tuple[tuple[int, bool], ...] = ()
    mark: bool = False

    def to_definition(self, signal: jax.Array) -> jax.Array:
        """Brings a signal from the shape of the first reader to the shape and dtype of the definition."""
        return undo_views(self.views, signal.astype(self.reader.aval.dtype))


def undo_views(views: Sequence[Equation], x: jax.Array) -> jax.Array:
    """Undoes casts, reshapes and transposes."""
    for eqn in reversed(views):
        before, permutes = eqn.invars[0].aval, of(eqn).permutation
        if permutes is not None:
            x = x.transpose(sorted(range(x.ndim), key=list(permutes(eqn)).__getitem__))
        x = x.reshape(before.shape).astype(before.dtype)
    return x


@dataclasses.dataclass(eq=False)
class Activation:
    """An elementwise nonlinear function without parameters, evaluated as one function.

    Attributes:
      name: the name of the function if it has one (`relu`), else its primitives (`tanh`, `mul_add_tanh`).
      site: the name, unique in the network.
      scope: the constructs around it.
      axes: for each axis of the output, the axis of the source.
      source, output: the pre-activation and the result.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net = lrules.Network(lambda w, x: jax.nn.relu(jax.nn.relu(x @ w)))
      >>> [a.site for a in net.graph(jnp.eye(3), jnp.ones((5, 3))).activations]
      ['relu', 'relu#2']
    """

    name: str
    site: str
    scope: tuple[str, ...] = ()
    axes: tuple[int, ...] = ()
    source: Value | None = dataclasses.field(default=None, repr=False)
    output: Value | None = dataclasses.field(default=None, repr=False)


_NONE: Mapping[int, Any] = MappingProxyType({})


def _no_axes() -> Mapping[int, Any]:
    return _NONE  # all values share one, because there are many values


@dataclasses.dataclass(eq=False, slots=True)
class Value:
    """The facts about one value of the jaxpr, at one place in the call tree.

    `differentiable` are the parameters on which it depends with a derivative (not through integers, booleans or
    `stop_gradient`), and `smooth` says whether it depends so on data. `axes` maps a parameter (by index) to the axes of
    the parameter that each dimension of the value holds, and to the axes that were sliced away; this gives fan-in and
    fan-out. `varies` are the dimensions along which the value is not only broadcast (None: all). `products` are the
    products of weights and data in it, see `by_hand.py`.
    """

    aval: Any
    params: frozenset[int] = frozenset()
    data: bool = False
    differentiable: frozenset[int] = frozenset()
    smooth: bool = False
    batched: bool = False  # depends on an input that has a batch
    source: Value | None = None  # the value that this one is a cast, reshape or transpose of
    view: Any = None
    producer: Any = None
    result: int = 0  # which of the results of its producer it is
    operands: tuple[Value, ...] = ()
    block: Block | None = None  # where it is defined
    variable: Any = None
    axes: Mapping[int, tuple[tuple[tuple[int, ...], ...], frozenset[int]]] = dataclasses.field(default_factory=_no_axes)
    varies: frozenset[int] | None = None
    loops: frozenset[Any] = frozenset()
    carried: bool = False
    products: tuple[HandProduct, ...] = ()
    lookups: frozenset[Any] = frozenset()  # the layers whose rows make a chosen value
    stage: int = 0  # for a value made from parameters: 1 after a product, 2 after a nonlinearity of a product
    key: Any = None  # the place of the product that made it
    wanted: bool = False  # a layer's weight depends on it, so feedback must be computed with it
    hidden: Hidden | None = None
    statistic: bool | None = None  # comes elementwise from results of reductions (see activations.py)
    uniform: bool | None = None  # a constant that is the same for all elements (see activations.py)
    at_twice: Aval | None = None  # its type at twice the batch (see twice.py)
    order_of_batch: dict[int, Any] | None = None  # the order of the examples along an axis (see order.py)
    known: Any = False  # its numbers, if they depend on no parameters and inputs (see order.py)
    arranged: Any = False  # how its operands lie in it, if it is elementwise (see activations.py)
    order: int = dataclasses.field(default_factory=itertools.count().__next__)  # operands have smaller numbers
    layer: Layer | None = None  # the layer whose output this is
    split: frozenset[Any] = frozenset()  # mesh axes along which a shard_map of the network splits it

    @property
    def place(self) -> tuple[Block, Any] | None:
        """The block and the variable where it is defined."""
        return None if self.block is None else (self.block, self.variable)

    @property
    def pure(self) -> bool:
        """Whether it depends on parameters alone."""
        return bool(self.params) and not self.data

    @property
    def both(self) -> bool:
        return bool(self.params) and self.data

    @property
    def chosen(self) -> bool:
        """Whether it depends on parameters, and on data only through choices."""
        return bool(self.differentiable) and self.data and not self.smooth

    @property
    def spread(self) -> frozenset[int]:
        """The dimensions along which it is not only broadcast."""
        return spread_of(self.aval) if self.varies is None else self.varies

    @property
    def shadowed(self) -> bool:
        """Whether it is also computed from the feedback."""
        return self.wanted and not self.carried

    @property
    def weight_dims(self) -> frozenset[int]:
        """For a weight, the dimensions that hold axes of its parameters; all dimensions if this is not known."""
        held = frozenset(d for dims, _ in self.axes.values() for d, axes in enumerate(dims) if axes)
        return held or frozenset(range(len(self.aval.shape)))

    def root(self) -> tuple[Value, tuple[Any, ...]]:
        """Where it was defined, and the views from there to here."""
        value, views = self, []
        while value.source is not None:
            views.append(value.view)
            value = value.source
        return value, tuple(reversed(views))


@dataclasses.dataclass(eq=False)
class Block:
    """A jaxpr at one place in the call tree, with what was found in it."""

    jaxpr: Any
    consts: Sequence[Any]
    scope: tuple[str, ...]
    loops: tuple[tuple[Any, int], ...]  # the scans around it: key and length
    values: dict[Any, Value] = dataclasses.field(default_factory=dict)
    layers: dict[int, Layer] = dataclasses.field(default_factory=dict)
    affines: dict[int, Affine] = dataclasses.field(default_factory=dict)
    children: dict[int, list[Block]] = dataclasses.field(default_factory=dict)
    hidden: dict[Any, list[Hidden]] = dataclasses.field(default_factory=dict)
    regions: dict[int, Any] = dataclasses.field(default_factory=dict)
    pre_activations: dict[Any, Hidden] = dataclasses.field(default_factory=dict)
    skipped: frozenset[int] = frozenset()

    @functools.cached_property
    def readers(self) -> dict[Any, tuple[int, ...]]:
        """The equations that read each variable, by number; -1: it is a result of the block."""
        found: dict[Any, list[int]] = {v: [-1] for v in self.jaxpr.outvars if not is_literal(v)}
        for index, eqn in enumerate(self.jaxpr.eqns):
            for v in {v for v in eqn.invars if not is_literal(v)}:
                found.setdefault(v, []).append(index)
        return {v: tuple(indices) for v, indices in found.items()}  # which the garbage collector need not look into

    def sites(self, *, affines: bool = False, activations: bool = True) -> set[str]:
        """The keys in frames of all sites in this block and below: hidden signals, activations, `<layer> output`.

        With `affines` also biases and scales. Activations and pre-activations are in it if they have been searched.
        """
        own = {layer.at_output for layer in self.layers.values()}
        own |= {h.name for hs in (*self.hidden.values(), self.pre_activations.values()) for h in hs}
        own |= {region.activation.site for region in self.regions.values()} if activations else set()
        own |= {affine.site for affine in self.affines.values()} if affines else set()
        for children in self.children.values():
            for child in children:
                own |= child.sites(affines=affines, activations=activations)
        return own

    def value(self, atom: Atom) -> Value:
        return Value(atom.aval) if is_literal(atom) else self.values[atom]


def parameter(i: int, aval: Aval) -> Value:
    """The value of a parameter."""
    own = frozenset([i])
    return Value(aval, params=own, differentiable=own, axes={i: _own_axes(len(aval.shape))})


@functools.lru_cache
def _own_axes(ndim: int) -> tuple[tuple[tuple[int, ...], ...], frozenset[int]]:
    return tuple((d,) for d in range(ndim)), EMPTY


def argument(aval: Aval, batched: bool) -> Value:
    """The value of an input; an input without a batch is a constant."""
    return Value(aval, data=batched, batched=batched, smooth=batched and is_inexact(aval))


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A use of parameters that no rule but backprop can serve.

    Attributes:
      parameters: their numbers.
      sentence: the reason, and the remedy.
      differentiable: whether JAX can differentiate there, so that backprop() is a remedy.
    """

    parameters: frozenset[int]
    sentence: str
    differentiable: bool = True


def classes_of(value: Value) -> dict[str, Any]:
    """What a value depends on, and how, as arguments of `Value`."""
    names = ("params", "data", "differentiable", "smooth", "batched", "stage")
    return {name: getattr(value, name) for name in names}


def merged_classes(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {name: max(a[name], b[name]) if name == "stage" else a[name] | b[name] for name in a}


def ancestors(value: Value, stop: Callable[[Value], bool]) -> list[Value]:
    """A value and all values from which it is made, back to those where to stop."""
    found: dict[int, Value] = {}
    stack = [value]
    while stack:
        value = stack.pop()
        if id(value) not in found and not stop(value):
            found[id(value)] = value
            stack += value.operands
    return list(found.values())


def reach(outs: Sequence[Value]) -> set[int]:
    """The values (by id) from which a derivative leads to one of these."""
    found: set[int] = set()
    stack = list(outs)
    while stack:
        value = stack.pop()
        varies = is_inexact(value.aval) and (value.params or value.data)
        if varies and id(value) not in found:
            found.add(id(value))
            row = None if value.producer is None else of(value.producer)
            if row is not None and row.casts and not is_inexact(value.operands[0].aval):  # a unit that is on or off
                stack += value.operands[0].operands
            elif row is None or not row.stops:
                stack += value.operands
    return found


def parts(weight: Value) -> tuple[list[Value], frozenset[int]]:
    """The values through which feedback goes to a weight, and the parameters from which the weight is made.

    These values choose it, mix it, or make it without a batch. Other values that depend on a batch are data, and are
    left out.
    """
    found: dict[int, Value] = {}
    sources: frozenset[int] = frozenset()
    stack = [weight]
    while stack:
        value = stack.pop()
        if value.pure:
            sources |= value.differentiable
        elif id(value) not in found:
            found[id(value)] = value
            if value.layer is not None and value.batched:
                stack.append(value.layer.weight)
            elif value.chosen:
                stack += [v for v in value.operands if v.chosen or v.pure]
            elif value.batched:
                stack += [v for v in value.operands if v.pure or any(p.is_matrix for p in v.products)]
            else:
                stack += [v for v in value.operands if v.params]
    return list(found.values()), sources


def want(weight: Value) -> None:
    """Marks all values from which a weight is made."""
    stack, _ = parts(weight)
    stack += [operand for value in stack for operand in value.operands if operand.pure]
    stack += [weight] if weight.pure else []
    while stack:
        value = stack.pop()
        if value.params and not value.wanted:
            value.wanted = True
            stack += value.operands if value.pure else ()


def spread_of(aval: Aval) -> frozenset[int]:
    """The dimensions with more than one element."""
    return frozenset(i for i, n in enumerate(getattr(aval, "shape", ())) if n != 1)


EMPTY: frozenset[Any] = frozenset()


def united(sets: Iterable[frozenset[Any]]) -> frozenset[Any]:
    """The union of sets. If one of them holds the others, it is returned itself, so that many values share it."""
    found = EMPTY
    for own in sets:
        if own is not found and not own <= found:
            found = own if found <= own else found | own
    return found


class Names:
    """Gives out names, each once."""

    def __init__(self) -> None:
        self.taken: set[str] = set()
        self.next: dict[str, int] = {}

    def unique(self, name: str) -> str:
        """The name, with `#2`, `#3`, ... if it is taken."""
        new, n = name, self.next.get(name, 2)
        while new in self.taken:
            new, n = f"{name}#{n}", n + 1
        self.next[name] = n
        self.taken.add(new)
        return new
