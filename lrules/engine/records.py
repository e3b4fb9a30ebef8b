"""What the analysis writes down: values, blocks, and the layers, hidden signals and activations found in them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax

from lrules.engine.by_hand import Product
from lrules.engine.dtypes import is_inexact
from lrules.engine.jaxprs import Atom, Aval, Equation, is_literal
from lrules.engine.operations import Row, of


@dataclasses.dataclass(eq=False)
class Layer:
    """A multiplication of data by parameters.

    Attributes:
      name: the name of its parameter (the first of rank >= 2 where its weight is computed from several).
      parameters: the names of all parameters its weight is computed from.
      operation: `dot_general`, `conv_general_dilated`, `gather` or `dynamic_slice`.
      site: unique: the name, with `#2`, `#3`, ... for further uses.
      contracted: the axes of the weight that are summed over (an embedding's vocabulary).
      output_axes: for each other axis of the weight, the axis of the layer's output that it becomes.
      reads: the hidden signal it reads, or None for a first layer.
      scope: the constructs around it, as `("scan", "cond")`.
      sources: the parameters (by index) that its weight is computed from.
      mixed: its weight is what other layers have made, of the same parameters.
      owned: mesh axes along which the parameter itself is split, inside a `shard_map` that the network contains.
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
    position: int = 0  # which operand of the equation the weight is
    mixed: bool = False
    place: Any = dataclasses.field(default=None, repr=False)  # the block and the equation's number
    uses: set[str] = dataclasses.field(default_factory=set, repr=False)  # what becomes of rows that it looks up
    output: Value | None = dataclasses.field(default=None, repr=False)

    @property
    def row(self) -> Row:
        """What is known of its operation."""
        return of(self.eqn)

    @property
    def at_output(self) -> str:
        """The name under which frames hold what belongs to its output."""
        return f"{self.site} output"


@dataclasses.dataclass(eq=False)
class Affine:
    """Where a value made of parameters meets data otherwise than in a layer: a bias, a normalisation's scale.

    Attributes:
      site: unique within the network.
      position: which operand of the equation it is.
      value: that operand.
      output: what comes out.
    """

    site: str
    position: int
    value: Value = dataclasses.field(repr=False)
    output: Value = dataclasses.field(repr=False)


@dataclasses.dataclass(eq=False)
class Hidden:
    """A tensor that layers read, at its definition.

    Attributes:
      name: that of the first weight that reads it (`#2`, `#3` for further signals of that weight), or its mark.
      root: the value where it is defined.
      views: the casts, reshapes and transposes from the definition to what the first reader sees.
      reader: the value as the first reader sees it.
      readers: the layers that read it.
      loops: for each scan around the definition, its length and whether the reading weight changes with it.
      mark: it is there because the model marks it (`lrules.hidden`), not because a layer reads it.
    """

    name: str
    root: Value = dataclasses.field(repr=False)
    views: tuple[Any, ...] = dataclasses.field(repr=False)
    reader: Value = dataclasses.field(repr=False)
    readers: list[Layer] = dataclasses.field(default_factory=list, repr=False)
    loops: tuple[tuple[int, bool], ...] = ()
    mark: bool = False

    def to_definition(self, signal: jax.Array) -> jax.Array:
        """Carries a signal of the first reader's shape to the shape and dtype of the definition."""
        return undo_views(self.views, signal.astype(self.reader.aval.dtype))


def undo_views(views: Sequence[Equation], x: jax.Array) -> jax.Array:
    """What was before these casts, reshapes and transposes, of what comes after them."""
    for eqn in reversed(views):
        before, permutes = eqn.invars[0].aval, of(eqn).permutation
        if permutes is not None:
            permutation = permutes(eqn)
            x = x.transpose([permutation.index(i) for i in range(x.ndim)])
        x = x.reshape(before.shape).astype(before.dtype)
    return x


@dataclasses.dataclass(eq=False)
class Activation:
    """An elementwise nonlinear function without parameters, evaluated as one.

    Attributes:
      name: the function's name where it has one (`relu`), else its primitives (`tanh`, `mul_add_tanh`).
      site: unique within the network.
      axes: for each axis of the output, the axis of the source that it is.
    """

    name: str
    site: str
    scope: tuple[str, ...] = ()
    axes: tuple[int, ...] = ()
    source: Value | None = dataclasses.field(default=None, repr=False)
    output: Value | None = dataclasses.field(default=None, repr=False)


_NONE: Mapping[int, Any] = MappingProxyType({})


def _no_axes() -> Mapping[int, Any]:
    return _NONE  # one for all, since there are many


@dataclasses.dataclass(eq=False, slots=True)
class Value:
    """What is known of one value of the jaxpr, at one place in the call tree.

    `differentiable` are the parameters, and `smooth` says whether it depends on data, by a derivative: not through
    integers, booleans or `stop_gradient`. `axes` maps a parameter (by index) to the parameter's axes that each
    dimension of the value holds, and the axes that were sliced away; it serves fan-in and fan-out. `varies` are the
    dimensions along which the value is not merely broadcast (None: all). `products` tells of weights times data in it,
    see `by_hand.py`.
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
    operands: tuple[Value, ...] = ()
    block: Block | None = None  # where it is defined
    variable: Any = None
    axes: Mapping[int, tuple[tuple[tuple[int, ...], ...], frozenset[int]]] = dataclasses.field(default_factory=_no_axes)
    varies: frozenset[int] | None = None
    loops: frozenset[Any] = frozenset()
    carried: bool = False
    products: tuple[Product, ...] = ()
    lookups: frozenset[Any] = frozenset()  # the layers whose rows a chosen value is made of
    stage: int = 0  # of a value made of parameters: 1 after a product, 2 after a nonlinearity that followed one
    key: Any = None  # where the product stands that made it
    wanted: bool = False  # a layer's weight is made of it, so that feedback has to ride along
    hidden: Hidden | None = None
    statistic: bool | None = None  # comes elementwise from results of reductions (see activations.py)
    uniform: bool | None = None  # a constant that is the same for all elements (see activations.py)
    at_twice: Aval | None = None  # what it is at twice the batch (see twice.py)
    order_of_batch: dict[int, Any] | None = None  # what the batch is merged with in an axis (see batch.py)
    arranged: Any = False  # how its operands lie in it, where it comes elementwise from them (see activations.py)
    order: int = dataclasses.field(default_factory=itertools.count().__next__)  # operands come before what they make
    layer: Layer | None = None  # the layer whose output this is
    split: frozenset[Any] = frozenset()  # mesh axes along which a shard_map of the network splits it

    @property
    def place(self) -> tuple[Block, Any] | None:
        """The block and the variable where it is defined."""
        return None if self.block is None else (self.block, self.variable)

    @property
    def pure(self) -> bool:
        """Depends on parameters and on nothing else."""
        return bool(self.params) and not self.data

    @property
    def both(self) -> bool:
        return bool(self.params) and self.data

    @property
    def chosen(self) -> bool:
        """Depends on parameters, and on data only by what they choose."""
        return bool(self.differentiable) and self.data and not self.smooth

    @property
    def spread(self) -> frozenset[int]:
        """The dimensions along which it is not merely broadcast."""
        return spread_of(self.aval) if self.varies is None else self.varies

    @property
    def shadowed(self) -> bool:
        """Whether it is computed from the feedback, too."""
        return self.wanted and not self.carried

    @property
    def weight_dims(self) -> frozenset[int]:
        """Of a weight, the dimensions that hold axes of its parameters; all where that cannot be told."""
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
        """Keys in frames of all that is in here and below: hidden signals and activations by name, `<layer> output`.

        Biases and scales too if asked; activations, where they have been looked for, unless asked not to.
        """
        own = {layer.at_output for layer in self.layers.values()}
        own |= {h.name for hs in self.hidden.values() for h in hs}
        own |= {region.activation.site for region in self.regions.values()} if activations else set()
        own |= {affine.site for affine in self.affines.values()} if affines else set()
        for children in self.children.values():
            for child in children:
                own |= child.sites(affines=affines, activations=activations)
        return own

    def value(self, atom: Atom) -> Value:
        if is_literal(atom):
            return Value(atom.aval)
        return self.values[atom]


def parameter(i: int, aval: Aval) -> Value:
    """The value of a parameter."""
    own = frozenset([i])
    return Value(aval, params=own, differentiable=own, axes={i: _own_axes(len(aval.shape))})


@functools.lru_cache
def _own_axes(ndim: int) -> tuple[tuple[tuple[int, ...], ...], frozenset[int]]:
    return tuple((d,) for d in range(ndim)), EMPTY


def argument(aval: Aval, batched: bool) -> Value:
    """The value of an input; what has no batch is a constant."""
    return Value(aval, data=batched, batched=batched, smooth=batched and is_inexact(aval))


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A use of parameters that no rule but backprop can serve.

    Attributes:
      parameters: their numbers.
      sentence: what stands in the way, and what to write in its place.
      differentiable: whether JAX brings error through there, so that backprop() is a way out.
    """

    parameters: frozenset[int]
    sentence: str
    differentiable: bool = True


def classes_of(value: Value) -> dict[str, Any]:
    """What a value depends on, and how, as `Value` takes it."""
    names = ("params", "data", "differentiable", "smooth", "batched", "stage")
    return {name: getattr(value, name) for name in names}


def merged_classes(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {name: max(a[name], b[name]) if name == "stage" else a[name] | b[name] for name in a}


def ancestors(value: Value, stop: Callable[[Value], bool]) -> list[Value]:
    """A value and all that it is made of, back to those at which to stop."""
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
    def ends(value: Value) -> bool:
        return not is_inexact(value.aval) or not (value.params or value.data)

    found: set[int] = set()
    stack = list(outs)
    while stack:
        value = stack.pop()
        if id(value) not in found and not ends(value):
            found.add(id(value))
            row = None if value.producer is None else of(value.producer)
            if row is not None and row.casts and not is_inexact(value.operands[0].aval):  # a unit that is on or off
                stack += value.operands[0].operands
            elif row is None or not row.stops:
                stack += value.operands
    return found


def parts(weight: Value) -> tuple[list[Value], frozenset[int]]:
    """The values through which feedback has to ride along to a weight, and the parameters that it is made of.

    They choose it, mix it, or make it without a batch; what depends on a batch otherwise is data, and is left out.
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
    """Marks all that a weight is made of."""
    stack, _ = parts(weight)
    stack += [operand for value in stack for operand in value.operands if operand.pure]
    stack += [weight] if weight.pure else []
    while stack:
        value = stack.pop()
        if value.params and not value.wanted:
            value.wanted = True
            stack += value.operands if value.pure else ()


def spread_of(aval: Aval) -> frozenset[int]:
    """The dimensions of more than one element."""
    return frozenset(i for i, n in enumerate(getattr(aval, "shape", ())) if n != 1)


EMPTY: frozenset[Any] = frozenset()


def united(sets: Iterable[frozenset[Any]]) -> frozenset[Any]:
    """The union of sets: one of them where it holds the others, so that many values share one set."""
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
        """The name, with `#2`, `#3`, ... where it is taken."""
        new, n = name, self.next.get(name, 2)
        while new in self.taken:
            new, n = f"{name}#{n}", n + 1
        self.next[name] = n
        self.taken.add(new)
        return new
