"""Analysis: what a jaxpr's values depend on, and the layers, hidden signals and activations found in it.

Every value is classed by what it depends on: parameters only, data only, both, or neither; classes in scan carries go
to a fixpoint. A *layer* multiplies a value that depends on data by a weight; the *hidden signal* that it reads is
followed back through casts, reshapes and transposes to the tensor where it was defined. What is a weight:

- what depends on parameters alone;
- what depends on parameters, and on data only through integers and booleans: a weight *chosen* by data, as an expert's
  behind a router. An embedding is one, too, until something else than data multiplies it: then it is data itself;
- what layers have made of their own weights, where it multiplies data with a batch and has none, or has one and
  multiplies as a matrix: the weights that a hypernetwork makes, a mixed kernel.

Layers may also read what has no batch (coordinates that are closed over, support sets): constants that go through a
nonlinearity between two multiplications by parameters. The first walk sees them as weights made of parameters; where it
meets such a nonlinearity, the walk begins anew with the multiplications before it as layers.

Uses of parameters that no rule can serve are kept as refusals, for the rule that meets them to raise.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jax.extend.core import Literal
from jax.sharding import NamedSharding, PartitionSpec

from lrules import products
from lrules.activations import (
    CALLS,
    COMPARISONS,
    MARK,
    NONLINEAR,
    UNMARK,
    Doubt,
    call_name,
    find_regions,
    is_atom,
)


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
    owned: frozenset = frozenset()
    eqn: Any = dataclasses.field(default=None, repr=False)
    sources: frozenset[int] = frozenset()
    position: int = 0  # which operand of the equation the weight is
    mixed: bool = False
    place: Any = dataclasses.field(default=None, repr=False)  # the block and the equation's number
    uses: set[str] = dataclasses.field(default_factory=set, repr=False)  # what becomes of rows that it looks up
    output: Value | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(eq=False)
class Offset:
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

    def to_definition(self, signal):
        """Carries a signal of the first reader's shape to the shape and dtype of the definition."""

        signal = signal.astype(self.reader.aval.dtype)
        for eqn in reversed(self.views):
            before = eqn.invars[0].aval
            if eqn.primitive.name == "transpose":
                permutation = eqn.params["permutation"]
                signal = signal.transpose([permutation.index(i) for i in range(signal.ndim)])
            signal = signal.reshape(before.shape).astype(before.dtype)
        return signal


@dataclasses.dataclass(eq=False)
class Activation:
    """An elementwise nonlinear function without parameters, evaluated as one.

    Attributes:
      name: the function's name where it has one (`relu`), else its primitives (`tanh`, `mul_add_tanh`).
      site: unique within the network.
    """

    name: str
    site: str
    scope: tuple[str, ...] = ()
    source: Value | None = dataclasses.field(default=None, repr=False)
    output: Value | None = dataclasses.field(default=None, repr=False)


# ----------------------------------------------------------------------------------------------------- classing values


@dataclasses.dataclass(eq=False)
class Value:
    """What is known of one value of the jaxpr, at one place in the call tree.

    `differentiable` are the parameters, and `smooth` says whether it depends on data, by a derivative: not through
    integers, booleans or `stop_gradient`. `axes` maps a parameter (by index) to the parameter's axes that each
    dimension of the value holds, and the axes that were sliced away; it serves fan-in and fan-out. `varies` are the
    dimensions along which the value is not merely broadcast (None: all). `products` tells of weights times data in it,
    see `products.py`.
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
    place: tuple[Block, Any] | None = None  # the block and variable where it is defined
    axes: dict[int, tuple[tuple[tuple[int, ...], ...], frozenset[int]]] = dataclasses.field(default_factory=dict)
    varies: frozenset[int] | None = None
    loops: frozenset = frozenset()
    carried: bool = False
    products: tuple[products.Product, ...] = ()
    lookups: frozenset = frozenset()  # the layers whose rows a chosen value is made of
    stage: int = 0  # of a value made of parameters: 1 after a product, 2 after a nonlinearity that followed one
    key: Any = None  # where the product stands that made it
    wanted: bool = False  # a weight is made of it, so that feedback has to ride along
    hidden: Hidden | None = None
    statistic: bool | None = None  # comes elementwise from results of reductions (see activations.py)
    plain: bool | None = None  # a constant that is the same for all elements (see activations.py)
    arranged: Any = False  # how its operands lie in it, where it comes elementwise from them (see activations.py)
    order: int = dataclasses.field(default_factory=itertools.count().__next__)  # operands come before what they make
    layer: Layer | None = None  # the layer whose output this is
    split: frozenset = frozenset()  # mesh axes along which a shard_map of the network splits it

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
        if self.varies is not None:
            return self.varies
        return frozenset(i for i, n in enumerate(getattr(self.aval, "shape", ())) if n != 1)

    @property
    def shadowed(self) -> bool:
        return (self.pure or self.wanted) and not self.carried

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
    offsets: dict[int, Offset] = dataclasses.field(default_factory=dict)
    children: dict[int, list[Block]] = dataclasses.field(default_factory=dict)
    hidden: dict[Any, list[Hidden]] = dataclasses.field(default_factory=dict)
    regions: dict[int, Any] = dataclasses.field(default_factory=dict)
    skipped: frozenset[int] = frozenset()

    def sites(self, *, offsets: bool = False) -> set[str]:
        """Keys in frames of all that is in here and below: hidden signals and activations by name, `<layer> output`.

        Biases and scales too if asked.
        """
        own = {f"{layer.site} output" for layer in self.layers.values()}
        own |= {h.name for hs in self.hidden.values() for h in hs}
        own |= {region.activation.site for region in self.regions.values()}
        own |= {offset.site for offset in self.offsets.values()} if offsets else set()
        for children in self.children.values():
            for child in children:
                own |= child.sites(offsets=offsets)
        return own

    def value(self, atom) -> Value:
        if is_literal(atom):
            return Value(atom.aval)
        return self.values[atom]


def parameter(i: int, aval) -> Value:
    """The value of a parameter."""
    axes: dict[int, Any] = {i: (tuple((d,) for d in range(len(aval.shape))), frozenset())}
    own = frozenset([i])
    return Value(aval, params=own, differentiable=own, axes=axes)


def argument(aval, batched: bool) -> Value:
    """The value of an input; what has no batch is a constant."""
    return Value(aval, data=batched, batched=batched, smooth=batched and _inexact(aval))


ELEMENTWISE = {
    "add", "add_any", "sub", "mul", "div", "max", "min", "pow", "rem", "atan2", "nextafter", "and", "or", "xor", "eq",
    "ne", "lt", "gt", "le", "ge", "select_n", "clamp", "complex", "igamma", "igammac", "regularized_incomplete_beta",
    "neg", "abs", "exp", "exp2", "log", "log1p", "expm1", "sqrt", "rsqrt", "cbrt", "tanh", "sin", "cos", "tan",
    "logistic", "erf", "erfc", "erf_inv", "integer_pow", "square", "sign", "floor", "ceil", "round", "is_finite", "not",
    "convert_element_type", "stop_gradient", "reduce_precision", "copy", "copy_p", "real", "imag", "name", "asinh",
    "acosh", "atanh", "asin", "acos", "atan", "sinh", "cosh", "lgamma", "digamma", "pvary", "population_count",
}  # fmt: skip
STRUCTURAL = {"concatenate", "stack", "dynamic_update_slice", "pad", "scatter", "scatter-add", "scatter_add",
              "scatter_mul",
              "scatter-mul", "scatter_max", "scatter_min", "scatter-max", "scatter-min", "iota", "argmax", "argmin",
              "sort", "split", "slice", "rev", "gather", "dynamic_slice", "dot_general", "optimization_barrier",
              "reduce_window_sum", "threefry2x32", "random_bits", "debug_callback", "debug_print"}  # fmt: skip
SAME_SHAPE_VIEWS = {"convert_element_type", "copy", "copy_p", "name", "pvary", "sharding_constraint", "reshard",
                    "mesh_cast", "layout_constraint", "reduce_precision", "optimization_barrier"}  # fmt: skip
INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
           "core_closed_call": "call_jaxpr", "remat": "jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr"}  # fmt: skip
REMATS = {"remat", "remat2", "checkpoint"}
REMEDIES = {
    "while loop": " (a loop with numbers as bounds is served: lax.fori_loop, or lax.scan)",
    "loop inside a custom_vjp function": " (for diffrax.diffeqsolve, sequential rules serve adjoint=DirectAdjoint())",
}


def reshape_groups(a: Sequence[int], b: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Axes of `a` that become axes of `b` under a reshape, in the smallest groups."""
    groups, i, j = [], 0, 0
    while i < len(a) or j < len(b):
        left, right = [i] if i < len(a) else [], [j] if j < len(b) else []
        m, n = (a[i] if left else 1), (b[j] if right else 1)
        i, j = i + len(left), j + len(right)
        while m != n:
            if i < len(a) and (j == len(b) or _smaller(m, n)):
                left.append(i)
                m *= a[i]
                i += 1
            elif j < len(b):
                right.append(j)
                n *= b[j]
                j += 1
            else:
                break
        groups.append((left, right))
    return groups


def _smaller(m, n) -> bool:
    """Whether a product of sizes is the smaller one; of symbolic sizes, which may not compare, the one that divides."""
    if is_symbolic_dim(m) or is_symbolic_dim(n):
        return n % m == 0
    return m < n


def view_axes(eqn, shape: Sequence[int]) -> list[tuple[int, ...]] | None:
    """For each axis of the equation's output, the axes of its operand that it holds; None if it is no view."""
    name, params = eqn.primitive.name, eqn.params
    if name in SAME_SHAPE_VIEWS and len(eqn.invars) == 1:
        return [(i,) for i in range(len(shape))]
    if name == "transpose":
        return [(i,) for i in params["permutation"]]
    if name == "squeeze":
        return [(i,) for i in range(len(shape)) if i not in params["dimensions"]]
    if name == "reshape" and params.get("dimensions") is None:
        out = eqn.outvars[0].aval.shape
        axes: list[tuple[int, ...]] = [()] * len(out)
        for left, right in reshape_groups(shape, out):
            for j in right:
                axes[j] = tuple(left)
        return axes
    if name in ("broadcast_in_dim", "expand_dims") and math.prod(eqn.outvars[0].aval.shape) == math.prod(shape):
        if name == "expand_dims":
            kept = [i for i in range(len(eqn.outvars[0].aval.shape)) if i not in params["dimensions"]]
        else:
            kept = list(params["broadcast_dimensions"])
        axes = [()] * len(eqn.outvars[0].aval.shape)
        for i, j in enumerate(kept):
            axes[j] = (i,)
        return axes
    return None


def scan_counts(params) -> tuple[int, int]:
    """How many constants and carries a scan equation has."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # JAX 0.12
    return len(consts), len(carry)


def open_jaxpr(jaxpr) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants, whichever of the two forms it comes in."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def varying_axes(aval) -> frozenset:
    """The mesh axes along which a value differs between devices, inside a shard_map that checks it."""
    kind = getattr(aval, "manual_axis_type", None)
    return frozenset(kind.varying if kind is not None else getattr(aval, "vma", ()))


def as_varying(x, axes):
    """The same value, seen as differing between devices along these mesh axes, too (inside a shard_map)."""
    missing = tuple(sorted(axes - varying_axes(jax.typeof(x))))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def placed_as(x, aval, lead: int = 0):
    """The same value on the devices where one of `aval` lies, its `lead` first axes apart.

    On a mesh with explicit axes it is split as that one is; inside a shard_map it varies as that one does.
    """
    return as_varying(split_as(x, *[None] * lead, *aval.sharding.spec), varying_axes(aval))


def split_as(x, *spec):
    """The same value, split over these explicit axes of the mesh in place of those that it is split over."""
    sharding = jax.typeof(x).sharding
    if tuple(sharding.spec) == (*spec, *[None] * (x.ndim - len(spec))):
        return x
    mesh = jax.sharding.get_abstract_mesh() if sharding.mesh.empty else sharding.mesh
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))


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


class Analysis:
    """One walk over a jaxpr and all jaxprs inside it.

    Args:
      names, ndims: of the parameters.
      promoted: keys of equations that an earlier walk has found to be layers: the first ones of networks without a
        batch (0), and products between a Fourier transform and its inverse (over so many axes).
    """

    def __init__(self, names: Sequence[str], ndims: Sequence[int], promoted: Mapping[Any, int]):
        self.names, self.ndims, self.promoted = names, ndims, promoted
        self.layers: list[Layer] = []
        self.hidden: list[Hidden] = []
        self.activations: list[Activation] = []
        self.offsets: list[Offset] = []
        self.refusals: list[Refusal] = []
        self.doubts: list[tuple[Doubt, Value | None]] = []
        self.found: dict[Any, int] = {}  # further ones
        self.silent = 0  # walking a scan's body only to find the classes of its carry
        self.unmarked = False  # inside lrules.not_activation
        self.sealed: str | None = None  # inside a construct where no layer can be served
        self.inner: list[tuple[Multiplication, str]] | None = None  # the products in a function with its own derivative

    # -- registering what is found

    def refuse(self, params: frozenset[int], what: str):
        if not self.silent:
            names = ", ".join(repr(self.names[i]) for i in sorted(params))
            refusal = Refusal(params, what.format(name=names), self.sealed != "while loop")
            if refusal not in self.refusals:
                self.refusals.append(refusal)

    def add_layer(self, block: Block, index: int, eqn, found: Multiplication):
        w, x, sources = found.weight, found.operand, found.sources
        if self.inner is not None:
            self.inner.append((found, "loop inside a " if {"scan", "while"} & set(block.scope) else ""))
            return
        if self.sealed:
            self.refuse(
                sources,
                f"the parameter {{name}} is multiplied by data inside a {self.sealed}, where no rule can reach it: "
                f"take the multiplication out of the {self.sealed}{REMEDIES.get(self.sealed, '')}",
            )
            return
        if w.carried:
            self.refuse(
                sources,
                "the parameter {name} passes through a scan's carry before it multiplies data: scan over it (xs) or "
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
            operation=eqn.primitive.name,
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

    def add_hidden(self, x: Value, name: str, loops: frozenset, mark: bool) -> Hidden:
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

    def finish(self, outs: Sequence[Value]):
        """Settles which lookups are layers, names all that was found, and says where feedback has to ride along."""
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
        sites: set[str] = set()
        for layer in self.layers:
            layer.site = _unique(layer.name, sites)
            sites.add(layer.site)
            for value in _parts(layer.weight)[0]:
                value.wanted = True
        taken: dict[bool, set[str]] = {True: set(), False: set()}
        for hidden in self.hidden:
            hidden.name = _unique(hidden.name if hidden.mark else hidden.readers[0].name, taken[hidden.mark])
            taken[hidden.mark].add(hidden.name)

    def add_offset(self, block: Block, index: int, ins: list[Value], out: Value):
        """Notes where a bias or scale meets data; a `custom_jvp` body walked only to look for layers has no place."""
        pure = [k for k, v in enumerate(ins) if v.pure]
        if len(pure) == 1 and not self.sealed and jnp.issubdtype(out.aval.dtype, jnp.inexact):
            offset = Offset(f"offset {len(self.offsets)}", pure[0], ins[pure[0]], out)
            self.offsets.append(offset)
            block.offsets[index] = offset

    def add_activations(self, block: Block):
        if self.silent or self.sealed or self.unmarked:
            return
        regions, doubts = find_regions(block)
        self.doubts += [(doubt, None if doubt.output is None else block.value(doubt.output)) for doubt in doubts]
        for region in regions:
            site = _unique(region.name, {a.site for a in self.activations})
            source, output = block.value(region.root), block.value(region.output)
            region.activation = Activation(region.name, site, block.scope, source, output)
            self.activations.append(region.activation)
            block.regions[region.indices[-1]] = region
            block.skipped |= frozenset(region.indices[:-1])

    def rank_at_use(self, w: Value, i: int) -> int:
        axes, sliced = w.axes.get(i, ((), frozenset()))
        return self.ndims[i] - len(sliced)

    # -- walking

    def walk(self, jaxpr, ins: Sequence[Value], scope, loops, path) -> tuple[Block, list[Value]]:
        jaxpr, consts = open_jaxpr(jaxpr)
        block = Block(jaxpr, consts, scope, loops)
        for var in jaxpr.constvars:
            block.values[var] = Value(var.aval)
        for var, value in zip(jaxpr.invars, ins, strict=True):
            block.values[var] = value
            if value.place is None:
                value.place = (block, var)
        for index, eqn in enumerate(jaxpr.eqns):
            outs = self.equation(block, index, eqn, [block.value(v) for v in eqn.invars], path)
            for var, value in zip(eqn.outvars, outs, strict=True):
                block.values[var] = value
                if value.place is None:
                    value.place = (block, var)
        self.add_activations(block)
        return block, [block.value(v) for v in jaxpr.outvars]

    def equation(self, block: Block, index: int, eqn, ins: list[Value], path) -> list[Value]:
        name = eqn.primitive.name
        params = frozenset().union(*(v.params for v in ins))
        key = (*path, index)
        begins = key in self.promoted and not any(v.data for v in ins)
        data = any(v.data for v in ins) or begins
        atom = is_atom(eqn, ins)
        if name in INLINED and not atom and (params or any(v.loops for v in ins)):
            unmarked, self.unmarked = self.unmarked, self.unmarked or call_name(eqn).startswith(UNMARK)
            if call_name(eqn).startswith(MARK) and not self.silent and any(v.both for v in ins):
                what = "acts on more than one element or holds parameters"
                self.doubts.append((Doubt(call_name(eqn).removeprefix(MARK), why=f"marked, but it {what}"), None))
            child, outs = self.walk(eqn.params[INLINED[name]], ins, block.scope, block.loops, key)
            self.unmarked = unmarked
            block.children[index] = [child]
            return outs
        found = None
        if params and data:
            walk = {"scan": self.scan, "cond": self.cond, "while": self.loop, "shard_map": self.shard_map}.get(name)
            if walk is not None:
                return walk(block, index, eqn, ins, key)
            if any(v.differentiable for v in ins):
                found = self.mixture(block, index, eqn, ins, key)
        elif params and name == "scan":
            outs = self.generic(eqn, ins, carried=any(v.carried for v in ins))
            if multiplies(eqn.params["jaxpr"]):  # a network without a batch may lie inside
                walked = self.scan(block, index, eqn, ins, key)
                if any(v.data for v in walked):
                    return walked
                del block.children[index]
                for out, inner in zip(outs, walked, strict=True):
                    out.stage, out.operands = inner.stage, (*out.operands, inner)
            return outs
        elif params:
            self.find_beginnings(eqn, ins)
        outs = self.generic(eqn, ins)
        layer = block.layers.get(index)
        if begins:
            outs[0].data = outs[0].smooth = True
        if found is not None:  # of signals a layer makes a signal; else rows are looked up
            outs[0].smooth |= begins or found.operand.smooth or bool(found.operand.differentiable)
        if not self.silent and not (outs and outs[0].chosen and layer is None):
            weights = found.weight.lookups if found else frozenset()
            for lookup in frozenset().union(*(v.lookups for v in ins)) - weights:
                lookup.uses.add("data")
        if layer is not None:
            outs[0].layer, layer.output = layer, outs[0]
            outs[0].lookups = frozenset([layer]) if outs[0].chosen else frozenset()
            if not outs[0].chosen:
                layer.uses.add("data")
                outs[0].products, outs[0].axes = products.of_layer(layer), _output_parameter_axes(layer)
        elif params and data and not self.silent and name in ELEMENTWISE:
            self.add_offset(block, index, ins, outs[0])
        if params and not data and outs and is_product(eqn):
            outs[0].key = key
        for out in outs:
            out.products = tuple(dataclasses.replace(p, key=key) if p.key is None else p for p in out.products)
        self.sums(block, eqn, ins)
        marked = name == "name" and ins[0].both and jnp.issubdtype(ins[0].aval.dtype, jnp.inexact)
        if marked and not self.silent and not self.sealed:
            self.add_hidden(ins[0], eqn.params["name"], ins[0].loops, mark=True)
        return outs

    def find_beginnings(self, eqn, ins: list[Value]):
        """Where a nonlinear function of a product meets parameters again, the product was a layer without a batch."""
        if is_product(eqn) and all(v.params for v in ins[:2]):
            bent = [v for v in ins[:2] if v.stage == 2]
            self.found |= {v.key: 0 for b in bent for v in _ancestors(b, lambda v: False) if v.key is not None}

    def mixture(self, block: Block, index: int, eqn, ins: list[Value], key) -> Multiplication | None:
        """An equation in which values made of parameters meet data: a layer, a bias or scale, or unknown."""
        name = eqn.primitive.name
        found = multiplication(eqn, ins) or transformed(eqn, ins, self.promoted.get(key, 0))
        if found is None and key in self.promoted and not any(v.data for v in ins):
            found = of_latents(eqn, ins)
        if found is not None:
            self.add_layer(block, index, eqn, found)
            return found
        weights = [v for v in ins if v.pure or v.chosen]
        inner = [v for k, v in eqn.params.items() if k in ("call_jaxpr", "fun_jaxpr")]
        if not weights or not any(v.data for v in ins if v not in weights):
            return None
        if name.startswith(("custom_jvp_call", "custom_vjp_call")) and inner:
            return self.own_derivative(block, index, eqn, ins, inner[0])
        if name not in ELEMENTWISE and name not in STRUCTURAL:
            self.refuse(
                frozenset().union(*(v.params for v in weights)),
                f"the parameter {{name}} meets data in the primitive {name!r}, which lrules does not know: write it "
                "with dot_general or conv_general_dilated",
            )
        return None

    def own_derivative(self, block: Block, index: int, eqn, ins: list[Value], body) -> Multiplication | None:
        """A function with a derivative of its own: one layer if one weight multiplies data in it, else sealed."""
        what = "custom_" + eqn.primitive.name[7:10] + " function"
        before = self.inner, self.sealed, self.refusals
        self.inner, self.sealed, self.refusals = [], self.sealed or what, []
        self.walk(body, [dataclasses.replace(v, place=None) for v in ins], (), (), (index, "custom"))
        found, refusals = self.inner, self.refusals
        self.inner, self.sealed, self.refusals = before
        served = None if refusals or any(loop for _, loop in found) else one_layer(eqn, ins, [p for p, _ in found])
        if served is not None:
            self.add_layer(block, index, eqn, served)
            return served
        self.refusals += refusals
        for product, loop in found:
            self.refuse(
                product.sources,
                f"the parameter {{name}} is multiplied by data inside a {loop}{what}, where no rule can reach it: take "
                f"the multiplication out of the {loop}{what}{REMEDIES.get(loop + what, '')}",
            )
        return None

    def generic(self, eqn, ins: list[Value], carried: bool = False) -> list[Value]:
        """What an equation without a structure of its own passes from its operands to its results."""
        if eqn.primitive.name == "optimization_barrier":
            return [self.generic_one(eqn, [v], out.aval, carried) for v, out in zip(ins, eqn.outvars, strict=True)]
        return [self.generic_one(eqn, ins, out.aval, carried) for out in eqn.outvars]

    def generic_one(self, eqn, ins: list[Value], aval, carried: bool) -> Value:
        name = eqn.primitive.name
        value = Value(
            aval,
            params=frozenset().union(*(v.params for v in ins)),
            data=any(v.data for v in ins),
            batched=any(v.batched for v in ins),
            loops=frozenset().union(*(v.loops for v in ins)),
            carried=carried or any(v.carried for v in ins),
            producer=eqn,
            operands=tuple(ins),
        )
        own = self.inner is not None  # inside a function with a derivative of its own, which may pass integers
        stops = name == "stop_gradient" and ins[0].smooth and not own  # of a weight, it only freezes it
        if _inexact(aval) or (own and _counts(aval)):
            value.differentiable = frozenset() if stops else frozenset().union(*(v.differentiable for v in ins))
            value.smooth = any(v.smooth or (v.data and _counts(v.aval) and name in CASTS) for v in ins)
        if value.chosen:
            value.params = value.differentiable
            value.lookups = frozenset().union(*(v.lookups for v in ins))
        operand = ins[0] if len(ins) == 1 else None
        axes = view_axes(eqn, operand.aval.shape) if operand is not None and hasattr(operand.aval, "shape") else None
        if operand is not None and axes is not None and value.both:
            value.source, value.view = operand, eqn
        value.varies = _varying(eqn, ins, aval, axes)
        if value.pure or value.chosen:
            value.axes = _parameter_axes(eqn, ins, aval, axes)
        if value.pure:
            value.stage = stage(eqn, ins)
        elif value.both:
            value.products = (*products.made(eqn, ins, value), *products.passed(eqn, ins, value, axes))[: products.MOST]
            if not value.batched or any(p.is_matrix for p in value.products):
                value.axes = _parameter_axes(eqn, ins, aval, axes)
        return value

    def sums(self, block: Block, eqn, ins: list[Value]):
        """Refuses products of weights and data that are summed by hand."""
        for product, sentence in products.summed(eqn, ins, block):
            if eqn.primitive.name == "fft":  # a product between two transforms is a convolution
                self.found[product.key] = len(eqn.params["fft_lengths"])
            else:
                self.refuse(product.params, sentence)

    # -- constructs

    def scan(self, block: Block, index: int, eqn, ins: list[Value], key) -> list[Value]:
        n_consts, n_carry = scan_counts(eqn.params)
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        avals = [v.aval for v in open_jaxpr(body)[0].invars]
        scope, loops = (*block.scope, "scan"), (*block.loops, (key, length))
        carry = [_classes(v) for v in ins[n_consts : n_consts + n_carry]]

        def inputs():
            for value in ins[:n_consts]:
                yield value
            for classes, aval in zip(carry, avals[n_consts : n_consts + n_carry], strict=True):
                value = Value(aval, **classes)
                value.carried = value.pure or value.chosen
                value.loops = frozenset([] if value.data else [key])
                yield value
            for value, aval in zip(ins[n_consts + n_carry :], avals[n_consts + n_carry :], strict=True):
                yield _slice(value, aval, key)

        while True:
            self.silent += 1
            _, outs = self.walk(body, list(inputs()), scope, loops, key)
            self.silent -= 1
            merged = [_merged(a, _classes(v)) for a, v in zip(carry, outs[:n_carry], strict=True)]
            if merged == carry:
                break
            carry = merged
        inner_ins = list(inputs())
        for i, value in enumerate(inner_ins[n_consts : n_consts + n_carry]):  # those that come around, of the last walk
            value.operands = (ins[n_consts + i], outs[i])
        child, outs = self.walk(body, inner_ins, scope, loops, key)
        block.children[index] = [child]
        for i, value in enumerate(inner_ins[n_consts : n_consts + n_carry]):
            value.operands = (ins[n_consts + i], outs[i])
        for inner in outs[:n_carry]:
            for p in inner.products:
                if p.outer and p.kind == "product" and key in p.weight.loops:
                    self.refuse(p.params, products.BY_HAND)
        for lookup in frozenset().union(*(v.lookups for v in (*ins[n_consts : n_consts + n_carry], *outs[:n_carry]))):
            lookup.uses.add("data")
        results = []
        for i, (inner, out) in enumerate(zip(outs, eqn.outvars, strict=True)):
            classes = carry[i] if i < n_carry else _classes(inner)
            result = Value(out.aval, **classes, producer=eqn, operands=(inner,), loops=inner.loops - {key})
            result.carried = (result.pure or result.chosen) and (i < n_carry or inner.carried)
            result.lookups = inner.lookups if i >= n_carry else frozenset()
            results.append(result)
        return results

    def cond(self, block: Block, index: int, eqn, ins: list[Value], key) -> list[Value]:
        walked = [
            self.walk(branch, ins[1:], (*block.scope, "cond"), block.loops, (*key, i))
            for i, branch in enumerate(eqn.params["branches"])
        ]
        block.children[index] = [child for child, _ in walked]
        results = []
        for j, out in enumerate(eqn.outvars):
            inner = [outs[j] for _, outs in walked]
            merged = self.generic_one(eqn, [ins[0], *inner], out.aval, False)
            merged.source = None
            results.append(merged)
        return results

    def loop(self, block: Block, index: int, eqn, ins: list[Value], key) -> list[Value]:
        """A while loop: nothing in it can be served, so it must hold no layer."""
        n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        consts, carry = ins[n : n + m], ins[n + m :]
        everything = self.generic_one(eqn, ins, eqn.outvars[0].aval, False)
        everything.differentiable = frozenset().union(*(v.differentiable for v in ins))
        everything.smooth = any(v.smooth for v in ins)
        body = eqn.params["body_jaxpr"]
        inner = [dataclasses.replace(v, place=None) for v in consts] + [
            Value(v.aval, **_classes(v if v.pure else everything)) for v in carry
        ]
        before, self.sealed = self.sealed, self.sealed or "while loop"
        self.walk(body, inner, (*block.scope, "while"), (), (*key, "while"))
        self.sealed = before
        return [Value(v.aval, **_classes(everything), producer=eqn, operands=tuple(ins)) for v in eqn.outvars]

    def shard_map(self, block: Block, index: int, eqn, ins: list[Value], key) -> list[Value]:
        body = eqn.params["jaxpr"]
        avals = [v.aval for v in open_jaxpr(body)[0].invars]
        inner = [
            dataclasses.replace(
                v, aval=aval, source=None, view=None, place=None, hidden=None, operands=(v,), layer=None,
                split=varying_axes(aval) - varying_axes(v.aval),
            )
            for v, aval in zip(ins, avals, strict=True)
        ]  # fmt: skip
        checked = "shard_map" if eqn.params["check_vma"] else "shard_map unchecked"
        child, outs = self.walk(body, inner, (*block.scope, checked), block.loops, key)
        block.children[index] = [child]
        return [
            Value(
                out.aval, **_classes(v), axes=v.axes, varies=v.varies, carried=v.carried, producer=eqn, operands=(v,),
                lookups=v.lookups,
            )
            for v, out in zip(outs, eqn.outvars, strict=True)
        ]  # fmt: skip


def _classes(value: Value) -> dict[str, Any]:
    """What a value depends on, and how, as `Value` takes it."""
    names = ("params", "data", "differentiable", "smooth", "batched", "stage")
    return {name: getattr(value, name) for name in names}


def _merged(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {name: max(a[name], b[name]) if name == "stage" else a[name] | b[name] for name in a}


def _inexact(aval) -> bool:
    return jnp.issubdtype(getattr(aval, "dtype", jnp.int32), jnp.inexact)


def _counts(aval) -> bool:
    """Whether its elements are integers, not truth values."""
    return jnp.issubdtype(getattr(aval, "dtype", jnp.bool_), jnp.integer)


def _ancestors(value: Value, stop: Callable[[Value], bool]) -> list[Value]:
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
        return not _inexact(value.aval) or not (value.params or value.data)

    found: set[int] = set()
    stack = list(outs)
    while stack:
        value = stack.pop()
        if id(value) not in found and not ends(value):
            found.add(id(value))
            name = value.producer.primitive.name if value.producer is not None else ""
            if name == "convert_element_type" and not _inexact(value.operands[0].aval):  # a unit that is on or off
                stack += value.operands[0].operands
            else:
                stack += () if name == "stop_gradient" else value.operands
    return found


def _parts(weight: Value) -> tuple[list[Value], frozenset[int]]:
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


def _unique(name: str, taken: set[str]) -> str:
    """The name, with `#2`, `#3`, ... where it is taken."""
    if name not in taken:
        return name
    return next(new for n in range(2, len(taken) + 3) if (new := f"{name}#{n}") not in taken)


# ------------------------------------------------------------------------------------------------ which one is a layer


@dataclasses.dataclass(frozen=True, eq=False)
class Multiplication:
    """A layer's equation: what is the weight in it, and what the operand.

    Attributes:
      position: which operand of the equation the weight is.
      contracted, output_axes, sources, mixed: as in `Layer`.
      shape: of what comes out.
    """

    weight: Value
    operand: Value
    contracted: Sequence[int]
    output_axes: dict[int, int]
    position: int
    sources: frozenset[int]
    shape: tuple[int, ...]
    mixed: bool = False


def is_product(eqn) -> bool:
    """Whether an equation multiplies and sums up."""
    if eqn.primitive.name == "dot_general":
        return bool(eqn.params["dimension_numbers"][0][0])
    return eqn.primitive.name in ("conv_general_dilated", "ragged_dot_general", "ragged_dot")


def multiplies(jaxpr) -> bool:
    """Whether there are products in a jaxpr or the jaxprs inside it."""
    jaxpr, _ = open_jaxpr(jaxpr)
    inner = [v for eqn in jaxpr.eqns for v in eqn.params.values() if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
    return any(map(is_product, jaxpr.eqns)) or any(map(multiplies, inner))


def multiplication(eqn, ins: list[Value]) -> Multiplication | None:
    """The layer that an equation is; None if it is none."""
    name, shape = eqn.primitive.name, tuple(getattr(eqn.outvars[0].aval, "shape", ()))
    if name == "dot_general" and is_product(eqn):
        contract, batch = eqn.params["dimension_numbers"]
        free = [
            frozenset(range(len(v.aval.shape))) - frozenset(contract[k]) - frozenset(batch[k])
            for k, v in enumerate(ins)
        ]
        side, sources = _weight_side(ins, contract, free)
        if side is None:
            return None
        n_batch, kept = len(batch[0]), sorted(free[side])
        start = n_batch if side == 0 else len(shape) - len(kept)
        output_axes = {axis: i for i, axis in enumerate(batch[side])} | {a: start + i for i, a in enumerate(kept)}
        w = ins[side]
        mixed = not (w.pure or w.chosen)
        return Multiplication(w, ins[1 - side], contract[side], output_axes, side, sources, shape, mixed)
    if name == "conv_general_dilated" and not ins[0].pure:
        spec, w = eqn.params["dimension_numbers"], ins[1]
        out_axis = spec.rhs_spec[0]
        contracted = frozenset(range(len(w.aval.shape))) - {out_axis}
        sources = w.differentiable if w.pure or w.chosen else _mixed(w, ins[0], contracted, frozenset([out_axis]))
        if not sources:
            return None
        mixed = not (w.pure or w.chosen)
        return Multiplication(w, ins[0], sorted(contracted), {out_axis: spec.out_spec[1]}, 1, sources, shape, mixed)
    if name in ("ragged_dot_general", "ragged_dot") and (ins[1].pure or ins[1].chosen):
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (contract, batch), groups = numbers.dot_dimension_numbers, numbers.rhs_group_dimensions
        if not groups or batch[1]:
            return None
        w = ins[1]
        kept = [i for i in range(len(w.aval.shape)) if i not in contract[1] and i not in groups]
        output_axes = {axis: len(shape) - len(kept) + i for i, axis in enumerate(kept)}
        return Multiplication(w, ins[0], contract[1], output_axes, 1, w.differentiable, shape)
    if name in ("gather", "dynamic_slice") and ins[0].pure:
        w = ins[0]
        x = next((v for v in ins[1:] if v.data), None)
        if x is None:
            return None
        if name == "gather":
            dims = eqn.params["dimension_numbers"]
            batching = set(getattr(dims, "operand_batching_dims", ()))
            looked_up = set(dims.start_index_map)
            whole = [i for i in range(len(w.aval.shape)) if i not in dims.collapsed_slice_dims and i not in batching]
            output_axes = {a: o for a, o in zip(whole, dims.offset_dims, strict=True) if a not in looked_up}
        else:
            sizes = eqn.params["slice_sizes"]
            looked_up = {i for i, (n, s) in enumerate(zip(w.aval.shape, sizes, strict=True)) if n != s}
            output_axes = {i: i for i in range(len(sizes)) if i not in looked_up}
        return Multiplication(w, x, sorted(looked_up), output_axes, 0, w.params, shape)
    return None


def of_latents(eqn, ins: list[Value]) -> Multiplication | None:
    """A product of two parameters with which a network without a batch begins: of learned latents and a weight.

    The latents are a vector, or else what stands on the left. Two that are made of one parameter are no layer.
    """
    if eqn.primitive.name != "dot_general" or not is_product(eqn) or ins[0].params & ins[1].params:
        return None
    latents = 1 if len(ins[1].aval.shape) < len(ins[0].aval.shape) == 2 else 0
    seen = [dataclasses.replace(v, data=k == latents) for k, v in enumerate(ins)]
    found = multiplication(eqn, seen)
    return None if found is None else dataclasses.replace(found, weight=ins[1 - latents], operand=ins[latents])


def transformed(eqn, ins: list[Value], axes: int) -> Multiplication | None:
    """An elementwise product between a Fourier transform over the last axes and its inverse."""
    pure = [k for k, v in enumerate(ins) if v.pure]
    if not axes or eqn.primitive.name != "mul" or len(pure) != 1:
        return None
    w, shape = ins[pure[0]], tuple(eqn.outvars[0].aval.shape)
    contracted = range(len(shape) - axes, len(shape))
    kept = {d: d for d in range(len(shape) - axes) if d in w.spread}
    return Multiplication(w, ins[1 - pure[0]], contracted, kept, pure[0], w.params, shape)


def _weight_side(ins: list[Value], contract, free) -> tuple[int | None, frozenset[int]]:
    """Which operand of a dot product is the weight, and the parameters that it is made of."""
    if ins[0].pure != ins[1].pure:
        side = 0 if ins[0].pure else 1
        return side, ins[side].params
    if ins[0].pure:
        return None, frozenset()
    chosen = [k for k, v in enumerate(ins) if v.chosen and v.weight_dims & frozenset(contract[k])]
    if len(chosen) == 2:  # embeddings, of which one may be looked up as a matrix
        chosen = [k for k in chosen if is_matrix(ins[k].weight_dims, frozenset(contract[k]), free[k])]
    if len(chosen) == 1:
        return chosen[0], ins[chosen[0]].differentiable
    mixed = [_mixed(v, ins[1 - k], frozenset(contract[k]), free[k]) for k, v in enumerate(ins)]
    if bool(mixed[0]) != bool(mixed[1]):
        side = 0 if mixed[0] else 1
        return side, mixed[side]
    return None, frozenset()


def _mixed(w: Value, x: Value, contracted: frozenset[int], free: frozenset[int]) -> frozenset[int]:
    """The parameters of a weight that layers have made: for each example, where it multiplies a hidden signal as a
    matrix, or without a batch, where it multiplies what has one."""
    if not (w.both and w.smooth and w.differentiable):
        return frozenset()
    if not w.batched and x.batched:
        return w.differentiable
    made = any(p.is_matrix and is_matrix(p.dims, contracted, free) for p in w.products)
    return _parts(w)[1] if made and x.differentiable else frozenset()


def is_matrix(dims: frozenset[int], contracted: frozenset[int], free: frozenset[int]) -> bool:
    """Whether a value is a matrix in a product: `dims`, along which its weight varies, are its rows and its columns."""
    return bool(dims & contracted) and bool(free) and free <= dims


def one_layer(eqn, ins: list[Value], found: list[Multiplication]) -> Multiplication | None:
    """A function with a derivative of its own as one layer: there is one product in it, of one weight and data."""
    pure = [k for k, v in enumerate(ins) if v.pure]
    data = [v for v in ins if v.data]
    if len(found) != 1 or len(pure) != 1 or len(eqn.outvars) != 1 or not data or found[0].mixed:
        return None
    inner, w = found[0], ins[pure[0]]
    summed = {(i, a) for i, (dims, _) in inner.weight.axes.items() for d in inner.contracted for a in dims[d]}
    contracted, output_axes = [], {}
    taken: dict[tuple[int, int], int] = {}
    for i, (dims, _) in inner.weight.axes.items():
        taken |= {(i, a): inner.output_axes[d] for d, held in enumerate(dims) if d in inner.output_axes for a in held}
    for d in range(len(w.aval.shape)):
        held = {(i, a) for i, (dims, _) in w.axes.items() for a in dims[d]}
        if held & summed:
            contracted.append(d)
        elif outs := {taken[h] for h in held if h in taken}:
            output_axes[d] = min(outs)
    if not contracted or tuple(eqn.outvars[0].aval.shape) != inner.shape:
        return None
    operand = next((v for v in data if v.differentiable or v.smooth), data[0])
    return Multiplication(w, operand, contracted, output_axes, pure[0], w.params, inner.shape)


CASTS = {"convert_element_type"}
BENDING = NONLINEAR - COMPARISONS - {"select_n", "mul"}


def stage(eqn, ins: list[Value]) -> int:
    """Of a value made of parameters: 1 after a product, 2 after a nonlinearity that followed one.

    A number by which all is multiplied or divided, as a spectral norm, does not count.
    """
    name = eqn.primitive.name
    factors = [v for v in ins if v.spread] if name in ("mul", "div") else ins
    highest = max((v.stage for v in factors), default=0)
    if is_product(eqn):
        return max(highest, 1)
    bends = name in BENDING or name in CALLS or (name == "select_n" and bool(ins[0].stage))
    bends |= name == "mul" and sum(v.stage > 0 for v in factors) > 1
    if name == "div":
        bends = len(factors) > 1 and factors[1].stage > 0
    return 2 if bends and highest else highest


def _owned_axes(w: Value) -> frozenset:
    """Mesh axes along which a `shard_map` of the network splits what the weight is made of."""
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


def _slice(value: Value, aval, key) -> Value:
    """One slice of a scanned value: a definition of its own."""
    axes = {}
    for i, (dims, sliced) in value.axes.items():
        axes[i] = (dims[1:], sliced | frozenset(dims[0]))
    varies = frozenset(d - 1 for d in value.spread if d > 0)
    return Value(
        aval, **_classes(value), axes=axes, varies=varies, operands=(value,), lookups=value.lookups,
        loops=value.loops | ({key} if not value.data or value.chosen else set()), carried=value.carried,
    )  # fmt: skip


def _through(axes, dims: frozenset[int]) -> frozenset[int]:
    return frozenset(j for j, held in enumerate(axes) if dims & set(held))


def _varying(eqn, ins: list[Value], aval, axes) -> frozenset[int]:
    name = eqn.primitive.name
    full = frozenset(i for i, n in enumerate(getattr(aval, "shape", ())) if n != 1)
    if axes is not None:
        return _through(axes, ins[0].spread) & full
    if name == "broadcast_in_dim":
        dims = eqn.params["broadcast_dimensions"]
        return frozenset(dims[i] for i in ins[0].spread)
    if name in ELEMENTWISE:
        return frozenset().union(*(v.spread for v in ins)) & full
    return full


def _parameter_axes(eqn, ins: list[Value], aval, axes):
    """Which axes of which parameters the dimensions of a value made of parameters hold."""
    name = eqn.primitive.name
    ndim = len(getattr(aval, "shape", ()))
    found: dict[int, Any] = {}

    def add(i, dims, sliced):
        if i not in found or sum(map(len, dims)) > sum(map(len, found[i][0])):
            found[i] = (dims, sliced)

    for k, value in enumerate(ins):
        for i, (dims, sliced) in value.axes.items():
            if axes is not None:
                gone = frozenset().union(*map(frozenset, dims)) if dims else frozenset()
                kept = tuple(tuple(a for j in held for a in dims[j]) for held in axes)
                gone -= frozenset(a for d in kept for a in d)
                add(i, kept, sliced | gone)
            elif name == "broadcast_in_dim":
                new: list[tuple[int, ...]] = [()] * ndim
                for j, d in enumerate(eqn.params["broadcast_dimensions"]):
                    new[d] = dims[j]
                add(i, tuple(new), sliced)
            elif name in ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"):
                add(i, tuple(d for j, d in enumerate(dims) if j not in eqn.params["axes"]), sliced)
            elif name == "gather" and k == 0:
                numbers = eqn.params["dimension_numbers"]
                new = [()] * ndim
                batching = set(getattr(numbers, "operand_batching_dims", ()))
                whole = [j for j in range(len(dims)) if j not in numbers.collapsed_slice_dims and j not in batching]
                for d, j in zip(numbers.offset_dims, whole, strict=True):
                    new[d] = dims[j]
                gone = frozenset(a for j in (set(numbers.collapsed_slice_dims) | batching) for a in dims[j])
                add(i, tuple(new), sliced | gone)
            elif name == "dot_general":
                contract, batch = eqn.params["dimension_numbers"]
                free = [j for j in range(len(dims)) if j not in contract[k] and j not in batch[k]]
                start = len(batch[0]) if k == 0 else ndim - len(free)
                new = [()] * ndim
                for o, j in [*enumerate(batch[k]), *enumerate(free, start)]:
                    new[o] = dims[j]
                add(i, tuple(new), sliced)
            elif len(dims) == ndim:
                add(i, dims, sliced)
            else:
                add(i, ((),) * ndim, sliced)
    return found


def _output_parameter_axes(layer: Layer):
    """Which axes of its parameters the dimensions of a layer's output hold."""
    came_from = {o: a for a, o in layer.output_axes.items()}
    ndim = len(layer.output.aval.shape)  # type: ignore[union-attr]
    return {
        i: (tuple(dims[came_from[d]] if d in came_from and dims else () for d in range(ndim)), sliced)
        for i, (dims, sliced) in layer.weight.axes.items()
    }


def is_literal(atom) -> bool:
    """Whether an operand is written into the equation."""
    return isinstance(atom, Literal)


def bind(eqn, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation as it stands; on a part of the batch, without what it says of the split of the whole."""
    params = eqn.params
    if params.get("out_sharding") is not None and any(
        jnp.shape(value) != atom.aval.shape for value, atom in zip(values, eqn.invars, strict=True)
    ):
        params, values = params | {"out_sharding": None}, [split_as(value) for value in values]
    prepared = eqn.primitive.get_bind_params(params)
    with eqn.ctx.manager:
        if isinstance(prepared, tuple):  # before JAX 0.9
            out = eqn.primitive.bind(*prepared[0], *values, **prepared[1])
        else:
            out = eqn.primitive.bind(*values, **prepared)
    return list(out) if eqn.primitive.multiple_results else [out]
