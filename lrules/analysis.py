"""Analysis: what a jaxpr's values depend on, and the layers, hidden signals and activations found in it.

Every value is classed by what it depends on: parameters only, data only, both, or neither; classes in scan carries go
to a fixpoint. A *layer* multiplies a value that depends on data by one that depends on parameters alone; the *hidden
signal* that it reads is followed back through casts, reshapes and transposes to the tensor where it was defined. Uses
of parameters that no rule can serve are kept as refusals, for the rule that meets them to raise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jax.extend.core import Literal
from jax.sharding import NamedSharding, PartitionSpec

from lrules import products
from lrules.activations import MARK, UNMARK, Doubt, call_name, find_regions, is_atom


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
    weight_first: bool = False
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

    `axes` maps a parameter (by index) to the parameter's axes that each dimension of the value holds, and the axes that
    were sliced away; it serves fan-in and fan-out. `varies` are the dimensions along which the value is not merely
    broadcast (None: all). `products` tells of weights times data in it, see `products.py`.
    """

    aval: Any
    params: frozenset[int] = frozenset()
    data: bool = False
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
    table: bool = False  # holds, for each example, a matrix looked up in a parameter
    network: bool = False  # made of parameters by products with constants, as a network's output may be
    hidden: Hidden | None = None
    statistic: bool | None = None  # comes elementwise from results of reductions (see activations.py)
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
    def spread(self) -> frozenset[int]:
        """The dimensions along which it is not merely broadcast."""
        if self.varies is not None:
            return self.varies
        return frozenset(i for i, n in enumerate(getattr(self.aval, "shape", ())) if n != 1)

    @property
    def shadowed(self) -> bool:
        return self.pure and not self.carried

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
    """A use of parameters that no rule but backprop can serve."""

    parameters: frozenset[int]
    sentence: str


class Analysis:
    """One walk over a jaxpr and all jaxprs inside it."""

    def __init__(self, names: Sequence[str], ndims: Sequence[int]):
        self.names, self.ndims = names, ndims
        self.layers: list[Layer] = []
        self.hidden: list[Hidden] = []
        self.activations: list[Activation] = []
        self.offsets: list[Offset] = []
        self.refusals: list[Refusal] = []
        self.doubts: list[tuple[Doubt, Value | None]] = []
        self.silent = 0  # walking a scan's body only to find the classes of its carry
        self.unmarked = False  # inside lrules.not_activation
        self.sealed: str | None = None  # inside a construct where no layer can be served

    # -- registering what is found

    def refuse(self, params: frozenset[int], what: str):
        if not self.silent:
            names = ", ".join(repr(self.names[i]) for i in sorted(params))
            self.refusals.append(Refusal(params, what.format(name=names)))

    def add_layer(self, block: Block, index: int, eqn, w: Value, x: Value, contracted, output_axes, weight_first):
        if self.sealed:
            self.refuse(
                w.params,
                f"the parameter {{name}} is multiplied by data inside a {self.sealed}, where no rule can reach it: "
                f"take the multiplication out of the {self.sealed}, or give that parameter backprop() in a partition",
            )
            return
        if w.carried:
            self.refuse(
                w.params,
                "the parameter {name} passes through a scan's carry before it multiplies data: scan over it (xs) or "
                "use it from outside the loop, or give it backprop() in a partition",
            )
            return
        if w.network and eqn.primitive.name in ("gather", "dynamic_slice"):
            self.refuse(
                w.params,
                "rows are looked up in a value that the network computes from the parameter {name} and constants "
                "alone, so that its layers cannot be seen: look up the constants first, or pass them as inputs, or "
                "give that parameter backprop() in a partition",
            )
            return
        if self.silent:
            return
        order = sorted(w.params, key=lambda i: (self.rank_at_use(w, i) < 2, i))
        names = tuple(self.names[i] for i in order)
        layer = Layer(
            name=names[0],
            parameters=names,
            operation=eqn.primitive.name,
            site=_unique(names[0], {other.site for other in self.layers}),
            contracted=tuple(contracted),
            output_axes=output_axes,
            weight=w,
            operand=x,
            scope=block.scope,
            owned=_owned_axes(w),
            eqn=eqn,
            weight_first=weight_first,
        )
        self.layers.append(layer)
        block.layers[index] = layer
        if x.both and jnp.issubdtype(x.aval.dtype, jnp.inexact):
            layer.reads = self.add_hidden(x, names[0], w.loops, mark=False)
            layer.reads.readers.append(layer)

    def add_hidden(self, x: Value, name: str, loops: frozenset, mark: bool) -> Hidden:
        root, views = x.root()
        if mark or root.hidden is None:
            block, variable = root.place  # type: ignore[misc]
            kin = {h.name for h in self.hidden if h.mark == mark}
            hidden = Hidden(
                name=_unique(name, kin),
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
        data = any(v.data for v in ins)
        key = (*path, index)
        atom = is_atom(eqn, ins)
        if name in INLINED and not atom and (params or any(v.loops for v in ins)):
            unmarked, self.unmarked = self.unmarked, self.unmarked or call_name(eqn).startswith(UNMARK)
            if call_name(eqn).startswith(MARK) and not self.silent and any(v.both for v in ins):
                what = "acts on more than one element or holds parameters"
                self.doubts.append((Doubt(f"{call_name(eqn).removeprefix(MARK)!r} (marked, but it {what})"), None))
            child, outs = self.walk(eqn.params[INLINED[name]], ins, block.scope, block.loops, key)
            self.unmarked = unmarked
            block.children[index] = [child]
            return outs
        if params and data:
            walk = {"scan": self.scan, "cond": self.cond, "while": self.loop, "shard_map": self.shard_map}.get(name)
            if walk is not None:
                return walk(block, index, eqn, ins, key)
            if any(v.pure for v in ins):
                self.mixture(block, index, eqn, ins)
        elif params and name == "scan":
            return self.generic(eqn, ins, carried=any(v.carried for v in ins))
        outs = self.generic(eqn, ins)
        if index in block.layers:
            outs[0].layer = block.layers[index]
            outs[0].products = ()
            outs[0].table = name in ("gather", "dynamic_slice") and len(block.layers[index].output_axes) > 1
            block.layers[index].output = outs[0]
        elif params and data and not self.silent and name in ELEMENTWISE:
            self.add_offset(block, index, ins, outs[0])
        self.sums(block, eqn, ins)
        marked = name == "name" and ins[0].both and jnp.issubdtype(ins[0].aval.dtype, jnp.inexact)
        if marked and not self.silent and not self.sealed:
            self.add_hidden(ins[0], eqn.params["name"], ins[0].loops, mark=True)
        return outs

    def mixture(self, block: Block, index: int, eqn, ins: list[Value]):
        """An equation in which values made of parameters alone meet data: a layer, a bias or scale, or unknown."""
        name = eqn.primitive.name
        found = multiplication(eqn, ins)
        if found is not None:
            self.add_layer(block, index, eqn, *found)
            return
        pure = frozenset().union(*(v.params for v in ins if v.pure))
        inner = [v for k, v in eqn.params.items() if k in ("call_jaxpr", "fun_jaxpr")]
        if name.startswith(("custom_jvp_call", "custom_vjp_call")) and inner:
            before, self.sealed = self.sealed, self.sealed or "custom_" + name[7:10] + " function"
            fresh = [dataclasses.replace(v, place=None) for v in ins]
            self.walk(inner[0], fresh, block.scope, (), (index, "custom"))
            self.sealed = before
        elif name not in ELEMENTWISE and name not in STRUCTURAL:
            self.refuse(
                pure,
                f"the parameter {{name}} meets data in the primitive {name!r}, which lrules does not know: write it "
                "with dot_general or conv_general_dilated, or give that parameter backprop() in a partition",
            )

    def generic(self, eqn, ins: list[Value], carried: bool = False) -> list[Value]:
        """What an equation without a structure of its own passes from its operands to its results."""
        if eqn.primitive.name == "optimization_barrier":
            return [self.generic_one(eqn, [v], out.aval, carried) for v, out in zip(ins, eqn.outvars, strict=True)]
        return [self.generic_one(eqn, ins, out.aval, carried) for out in eqn.outvars]

    def generic_one(self, eqn, ins: list[Value], aval, carried: bool) -> Value:
        params = frozenset().union(*(v.params for v in ins))
        value = Value(
            aval,
            params=params,
            data=any(v.data for v in ins),
            loops=frozenset().union(*(v.loops for v in ins)),
            carried=carried or any(v.carried for v in ins),
            producer=eqn,
            operands=tuple(ins),
        )
        operand = ins[0] if len(ins) == 1 else None
        axes = view_axes(eqn, operand.aval.shape) if operand is not None and hasattr(operand.aval, "shape") else None
        if operand is not None and axes is not None and value.both:
            value.source, value.view = operand, eqn
        value.varies = _varying(eqn, ins, aval, axes)
        if value.pure:
            value.axes = _parameter_axes(eqn, ins, axes)
            meets = eqn.primitive.name in ("dot_general", "conv_general_dilated") and not all(v.pure for v in ins)
            value.network = meets or any(v.network for v in ins)
        elif value.both:
            found = products.made(eqn, ins, value) or products.passed(eqn, ins, value, axes)
            value.products = tuple(found)
            value.table = any(v.table for v in ins) and (axes is not None or eqn.primitive.name in products.LINEAR)
        return value

    def sums(self, block: Block, eqn, ins: list[Value]):
        """Refuses products of weights and data that are summed by hand."""
        if by_hand := products.summed(eqn, ins, block):
            self.refuse(by_hand, products.BY_HAND)
        if eqn.primitive.name == "dot_general" and eqn.params["dimension_numbers"][0][0]:
            for value, other in (ins, ins[::-1]):
                if value.table and other.both:
                    self.refuse(
                        value.params,
                        "a matrix looked up in the parameter {name} for each example is multiplied by what depends on "
                        "parameters, which no rule can tell from data: multiply by every one of them and select "
                        "among the products, or give that parameter backprop() in a partition",
                    )

    # -- constructs

    def scan(self, block: Block, index: int, eqn, ins: list[Value], key) -> list[Value]:
        n_consts, n_carry = scan_counts(eqn.params)
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        avals = [v.aval for v in open_jaxpr(body)[0].invars]
        scope, loops = (*block.scope, "scan"), (*block.loops, (key, length))
        carry = [(v.params, v.data) for v in ins[n_consts : n_consts + n_carry]]

        def inputs():
            for value in ins[:n_consts]:
                yield value
            for (params, data), aval in zip(carry, avals[n_consts : n_consts + n_carry], strict=True):
                carried = bool(params) and not data
                yield Value(aval, params, data, carried=carried, loops=frozenset([] if data else [key]))
            for value, aval in zip(ins[n_consts + n_carry :], avals[n_consts + n_carry :], strict=True):
                yield _slice(value, aval, key)

        while True:
            self.silent += 1
            _, outs = self.walk(body, list(inputs()), scope, loops, key)
            self.silent -= 1
            merged = [(a | v.params, b or v.data) for (a, b), v in zip(carry, outs[:n_carry], strict=True)]
            if merged == carry:
                break
            carry = merged
        inner_ins = list(inputs())
        child, outs = self.walk(body, inner_ins, scope, loops, key)
        block.children[index] = [child]
        for i, value in enumerate(inner_ins[n_consts : n_consts + n_carry]):
            value.operands = (ins[n_consts + i], outs[i])
        results = []
        for inner in outs[:n_carry]:
            if summed := frozenset().union(*(p.params for p in inner.products if p.outer and key in p.weight.loops)):
                self.refuse(summed, products.BY_HAND)
        for i, (inner, out) in enumerate(zip(outs, eqn.outvars, strict=True)):
            params, data = carry[i] if i < n_carry else (inner.params, inner.data)
            result = Value(out.aval, params, data, producer=eqn, operands=(inner,), loops=inner.loops - {key})
            result.carried = result.pure and (i < n_carry or inner.carried)
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
        body = eqn.params["body_jaxpr"]
        inner = [dataclasses.replace(v, place=None) for v in consts] + [
            Value(v.aval, v.params, v.data) if v.pure else Value(v.aval, everything.params, everything.data)
            for v in carry
        ]
        before, self.sealed = self.sealed, self.sealed or "while loop"
        self.walk(body, inner, block.scope, (), (*key, "while"))
        self.sealed = before
        return [
            Value(v.aval, everything.params, everything.data, producer=eqn, operands=tuple(ins)) for v in eqn.outvars
        ]

    def shard_map(self, block: Block, index: int, eqn, ins: list[Value], key) -> list[Value]:
        body = eqn.params["jaxpr"]
        avals = [v.aval for v in open_jaxpr(body)[0].invars]
        inner = [
            dataclasses.replace(
                v, aval=aval, source=None, view=None, place=None, hidden=None, operands=(v,),
                split=varying_axes(aval) - varying_axes(v.aval),
            )
            for v, aval in zip(ins, avals, strict=True)
        ]  # fmt: skip
        checked = "shard_map" if eqn.params["check_vma"] else "shard_map unchecked"
        child, outs = self.walk(body, inner, (*block.scope, checked), block.loops, key)
        block.children[index] = [child]
        return [
            Value(
                out.aval, v.params, v.data, axes=v.axes, varies=v.varies, carried=v.carried, producer=eqn, operands=(v,)
            )
            for v, out in zip(outs, eqn.outvars, strict=True)
        ]


def _unique(name: str, taken: set[str]) -> str:
    """The name, with `#2`, `#3`, ... where it is taken."""
    if name not in taken:
        return name
    return next(new for n in range(2, len(taken) + 3) if (new := f"{name}#{n}") not in taken)


def multiplication(eqn, ins: list[Value]):
    """The weight, operand, contracted weight axes and output axes of a layer; None if the equation is none."""
    name = eqn.primitive.name
    if name == "dot_general":
        contract, batch = eqn.params["dimension_numbers"]
        if not contract[0] or ins[0].pure == ins[1].pure:
            return None
        side = 0 if ins[0].pure else 1
        w, x = ins[side], ins[1 - side]
        n_batch = len(batch[0])
        free = [i for i in range(len(w.aval.shape)) if i not in contract[side] and i not in batch[side]]
        start = n_batch if side == 0 else len(eqn.outvars[0].aval.shape) - len(free)
        output_axes = {axis: i for i, axis in enumerate(batch[side])} | {a: start + i for i, a in enumerate(free)}
        return w, x, contract[side], output_axes, side == 0
    if name == "conv_general_dilated" and ins[1].pure and ins[0].data:
        spec = eqn.params["dimension_numbers"]
        out_axis = spec.rhs_spec[0]
        contracted = [i for i in range(len(ins[1].aval.shape)) if i != out_axis]
        return ins[1], ins[0], contracted, {out_axis: spec.out_spec[1]}, False
    if name in ("gather", "dynamic_slice") and ins[0].pure:
        w = ins[0]
        x = next(v for v in ins[1:] if v.data)
        if name == "gather":
            dims = eqn.params["dimension_numbers"]
            batching = set(getattr(dims, "operand_batching_dims", ()))
            looked_up = set(dims.start_index_map)
            kept = [i for i in range(len(w.aval.shape)) if i not in dims.collapsed_slice_dims and i not in batching]
            output_axes = {a: o for a, o in zip(kept, dims.offset_dims, strict=True) if a not in looked_up}
        else:
            sizes = eqn.params["slice_sizes"]
            looked_up = {i for i, (n, s) in enumerate(zip(w.aval.shape, sizes, strict=True)) if n != s}
            output_axes = {i: i for i in range(len(sizes)) if i not in looked_up}
        return w, x, sorted(looked_up), output_axes, True
    return None


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
        aval, value.params, value.data, axes=axes, varies=varies, operands=(value,),
        loops=value.loops | ({key} if not value.data else set()), carried=value.carried,
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


def _parameter_axes(eqn, ins: list[Value], axes):
    """Which axes of which parameters the dimensions of a value made of parameters hold."""
    name = eqn.primitive.name
    ndim = len(getattr(eqn.outvars[0].aval, "shape", ()))
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
