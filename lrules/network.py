"""Network: a JAX function seen as layers, hidden signals and activations, and the running of it with handlers.

`Network.graph` traces the function to a jaxpr and has it analysed (see `analysis.py`). `Graph.run` evaluates the jaxpr,
calling handlers at every layer, hidden signal and activation. The jaxpr itself is never edited, and equations that
touch none of these run as they stand.

Sequential feedback rides along as a *shadow*: every value computed from parameters alone is computed twice, once from
the parameters and once from the feedback, so that feedback meets its layer after the same casts, reshapes and slices.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrules.activations import linear_origins
from lrules.analysis import (
    INLINED,
    REMATS,
    Activation,
    Analysis,
    Block,
    Hidden,
    Layer,
    Offset,
    Value,
    argument,
    bind,
    is_literal,
    parameter,
    placed_as,
    reach,
    scan_counts,
    varying_axes,
)

Pytree = Any
Pair = tuple[Any, Any]  # a value and its shadow (None where there is none)


# --------------------------------------------------------------------------------------------------------- the network


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A pure function `apply(params, inputs) -> outputs`, ready for a learning rule.

    Args:
      apply: the function; `params`, `inputs` and `outputs` are pytrees.
      has_aux: `apply` returns `(outputs, aux)`; no error arrives at `aux`.
      batch_axes: where the batch lies in `inputs`: a prefix pytree of it, as vmap's `in_axes`; None for what has no
        batch (state, keys, positions).
      frozen: a pytree of weights that are not trained; `apply` is then `apply(params, frozen, inputs)`. Rules treat
        their layers as all others: feedback stands in for a frozen weight, too. None: there are none.
      signal_axes: where the batch lies in the outputs and hidden signals, in the order of the inputs, for rules that
        send each example its own error: one axis for all, or axes by regular expression on the names of hidden signals
        and on `"outputs"`. None: it is found. To be said where rows are the nodes of one graph (`segment_sum`), or
        where examples are put into another order and back.
      handlers: what modifiers do at layers, hidden signals and activations, the outermost first.
    """

    apply: Callable[..., Any]
    _: dataclasses.KW_ONLY
    has_aux: bool = False
    batch_axes: Pytree = 0
    frozen: Pytree = None
    signal_axes: int | Mapping[str, int] | None = None
    handlers: tuple[Handler, ...] = ()

    def __post_init__(self):
        axes = self.signal_axes
        given = axes.values() if isinstance(axes, Mapping) else () if axes is None else (axes,)
        if not all(isinstance(axis, int | np.integer) for axis in given):
            raise ValueError(f"signal_axes must be an axis, axes by name as {{'outputs': 0}}, or None, got {axes!r}")

    # jax.jit keeps what it has traced by equality: two networks are one only if they hold the very same frozen weights.
    def __eq__(self, other):
        if not isinstance(other, Network):
            return NotImplemented
        (mine, tree), (theirs, other_tree) = jax.tree.flatten(self.frozen), jax.tree.flatten(other.frozen)
        same = tree == other_tree and all(a is b for a, b in zip(mine, theirs, strict=True))
        names = ("apply", "has_aux", "batch_axes", "signal_axes", "handlers")
        return same and all(getattr(self, name) == getattr(other, name) for name in names)

    def __hash__(self):
        return hash((self.apply, self.has_aux, self.handlers))

    def __call__(self, params: Pytree, inputs: Pytree) -> Any:
        return self.apply(params, inputs) if self.frozen is None else self.apply(params, self.frozen, inputs)

    def parameters(self, params: Pytree) -> list[Any]:
        """The leaves of the parameters, and after them the frozen weights."""
        return [*jax.tree.leaves(params), *map(jax.lax.stop_gradient, jax.tree.leaves(self.frozen))]

    def pushing(self, handler: Handler) -> Network:
        """The same network with one more handler, inside those that it has."""
        return dataclasses.replace(self, handlers=(*self.handlers, handler))

    def graph(self, params: Pytree, inputs: Pytree, *, double: bool = False) -> Graph:
        """Traces the network; with `double`, on the batch put after itself (to see which axes grow with it)."""
        paths, params_tree = jax.tree_util.tree_flatten_with_path((params, self.frozen))
        paths = [(path[1:], leaf) for path, leaf in paths]
        names = [parameter_name(path) for path, _ in paths]
        leaves, inputs_tree = jax.tree.flatten(inputs)
        trees: list[Any] = []

        def flat(param_leaves, input_leaves):
            if double:
                input_leaves = [
                    x if a is None else jax.lax.concatenate([x, x], a % jnp.ndim(x))
                    for x, a in zip(input_leaves, axes, strict=True)
                ]
            p, frozen = jax.tree.unflatten(params_tree, param_leaves)
            given = (p,) if frozen is None else (p, frozen)
            out = self.apply(*given, jax.tree.unflatten(inputs_tree, input_leaves))
            outputs, aux = _split_aux(out) if self.has_aux else (out, None)
            (out_leaves, out_tree), (aux_leaves, aux_tree) = jax.tree.flatten(outputs), jax.tree.flatten(aux)
            trees[:] = [out_tree, aux_tree, len(out_leaves)]
            return out_leaves, aux_leaves

        if len(set(names)) < len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise ValueError(f"two parameters are named {twice!r}: rename one, since rules and feedback go by names")
        axes = self.input_batch_axes(inputs)
        closed = jax.make_jaxpr(flat)([leaf for _, leaf in paths], leaves)
        # What has no batch (state, keys, masks) is no data: a weight that it changes stays a weight.
        batched = [a is not None or all(other is None for other in axes) for a in axes]
        return Graph(closed, names, batched, *trees)

    def input_batch_axes(self, inputs: Pytree) -> list[int | None]:
        """The batch axis of each leaf of `inputs`; None among the inputs is no leaf."""
        axes: list[int | None] = []
        try:
            jax.tree.map(
                lambda axis, sub: axes.extend([axis] * len(jax.tree.leaves(sub))),
                self.batch_axes,
                inputs,
                is_leaf=lambda axis: axis is None,
            )
        except ValueError:
            raise ValueError(
                f"batch_axes={self.batch_axes} is no prefix of the inputs, whose structure is "
                f"{jax.tree.structure(inputs)}: give one axis (or None) per input, as in_axes of jax.vmap"
            ) from None
        return axes

    def stated_axis(self, name: str, shape: Sequence[int], batch: int) -> int | None:
        """Where `signal_axes` says that the batch lies in a hidden signal or, as `"outputs"`, in an output.

        Raises:
          ValueError: there is no such axis of the size of the batch.
        """
        stated = self.signal_axes
        if isinstance(stated, Mapping):
            stated = next((axis for pattern, axis in stated.items() if re.search(pattern, name)), None)
        if stated is None:
            return None
        if not -len(shape) <= stated < len(shape) or shape[stated] != batch:
            raise ValueError(
                f"signal_axes says that the batch lies in axis {stated} of {name!r}, but its shape is {tuple(shape)} "
                f"and the batch {batch}: give axes by name, signal_axes={{{name!r}: ...}}"
            )
        return stated % len(shape)

    def batch_size(self, inputs: Pytree) -> int:
        """How many examples `inputs` holds.

        Raises:
          ValueError: no input has a batch axis, or they differ in size.
        """
        sizes: dict[int, None] = {}  # in the order of the inputs: symbolic ones may not compare
        for leaf, axis in zip(jax.tree.leaves(inputs), self.input_batch_axes(inputs), strict=True):
            if axis is not None:
                if not -jnp.ndim(leaf) <= axis < jnp.ndim(leaf):
                    raise ValueError(
                        f"an input of shape {jnp.shape(leaf)} has no batch axis {axis}: "
                        "say where the batch lies with Network(apply, batch_axes=...)"
                    )
                sizes[jnp.shape(leaf)[axis]] = None
        if len(sizes) != 1:
            found = f"the inputs' batch axes differ in size, {list(sizes)}" if sizes else "no input has a batch axis"
            raise ValueError(f"{found}: say where the batch lies with Network(apply, batch_axes=...)")
        return next(iter(sizes))


def as_network(net: Network | Callable[..., Any]) -> Network:
    """`net` itself, or a bare function wrapped."""
    return net if isinstance(net, Network) else Network(net)


def parameter_name(path) -> str:
    """The name of a parameter: its path with `/` between the parts, without a trailing `/value`."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.removesuffix("/value") or "params"


def _split_aux(out):
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"has_aux=True wants apply to return (outputs, aux), got {type(out).__name__}")
    return out


# ------------------------------------------------------------------------------------------------- what handlers see


class Handler:
    """What to do where; the base class does nothing.

    Handlers are pytrees, so that a `custom_vjp` around the network can take their arrays as arguments: a subclass names
    in `arrays` its attributes that hold any.
    """

    arrays: tuple[str, ...] = ()
    activations = False  # whether activations are evaluated as units
    offsets = False  # whether biases and scales are evaluated one by one

    def __init_subclass__(cls):
        def flatten(handler):
            if "_bare" not in handler.__dict__:  # the same without its arrays: equal for all that are made of it
                handler._bare = copy.copy(handler)
                handler._bare.__dict__.update(dict.fromkeys(cls.arrays))
            return tuple(getattr(handler, name) for name in cls.arrays), handler._bare

        def unflatten(bare, values):
            new = copy.copy(bare)
            new.__dict__.update(zip(cls.arrays, values, strict=True))
            new._bare = bare
            return new

        jax.tree_util.register_pytree_node(cls, flatten, unflatten)

    def layer(self, layer: Layer, op: Operation, w, b, x, frame: Frame):
        """The layer's output, `op(w, x)`; `b` is the shadow of `w`."""
        return op(w, x)

    def offset(self, offset: Offset, op: Callable, p, others, frame: Frame):
        """What comes of a bias or scale `p` and the data that it meets, `op(p, others)`."""
        return op(p, others)

    def hidden(self, hidden: Hidden, value, frame: Frame):
        """What the readers of a hidden signal (and all other users of that tensor) get."""
        return value

    def activation(self, activation: Activation, fn: Callable, x, frame: Frame):
        """The activation's output, `fn(x)`."""
        return fn(x)


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """A layer's multiplication as a handler meets it: `op(w, x)`.

    Attributes:
      run: `(w, b, x) -> y`, the same with the feedback an argument; its pullback is that of the handlers inside.
      plain: `(w, x) -> y`, the multiplication itself.
      b: the feedback.
    """

    run: Callable[..., Any]
    plain: Callable[..., Any]
    b: Any

    def __call__(self, w, x):
        return self.run(w, self.b, x)


@dataclasses.dataclass(eq=False)
class Frame:
    """Where in the run a handler is called: what it may read and write there.

    Attributes:
      inputs: arrays by site; those of sites inside a scan are scanned along.
      records: arrays by site; those written inside a scan come out stacked.
      index: the iteration number of each scan around the site, the outermost first.
    """

    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    records: dict[str, Any] = dataclasses.field(default_factory=dict)
    index: tuple[Any, ...] = ()


# ---------------------------------------------------------------------------------------------------------- the graph


class Graph:
    """A traced network: its layers, hidden signals and activations, and the running of it.

    `parameters` and `arguments` are the values that go in. `live` are the hidden signals from which a way leads to the
    outputs: none through `stop_gradient`, or to aux alone.
    """

    def __init__(self, closed, names: Sequence[str], batched: Sequence[bool], out_tree, aux_tree, n_outputs: int):
        self.closed, self.names = closed, list(names)
        self.out_tree, self.aux_tree, self.n_outputs = out_tree, aux_tree, n_outputs
        invars = closed.jaxpr.invars
        self.param_avals = [v.aval for v in invars[: len(names)]]
        promoted: dict[Any, int] = {}
        while True:
            analysis = Analysis(names, [len(a.shape) for a in self.param_avals], promoted)
            self.parameters = [parameter(i, aval) for i, aval in enumerate(self.param_avals)]
            self.arguments = [argument(v.aval, b) for v, b in zip(invars[len(names) :], batched, strict=True)]
            ins = [*self.parameters, *self.arguments]
            self.block, self.outs = analysis.walk(closed.jaxpr, ins, (), (), ())
            if analysis.found.keys() <= promoted.keys():
                break
            promoted |= analysis.found
        analysis.finish(self.outs[:n_outputs])
        self.layers, self.hidden = analysis.layers, analysis.hidden
        self.activations, self.offsets, self.refusals = analysis.activations, analysis.offsets, analysis.refusals
        reached = reach(self.outs[:n_outputs])
        self.live = {hidden for hidden in self.hidden if id(hidden.root) in reached}
        read = linear_origins([hidden.root for hidden in self.hidden if not hidden.mark])
        self.doubts = [d for d, value in analysis.doubts if value is None or id(value) in read]
        self.nonlinearities = [d.name for d, _ in analysis.doubts]

    @property
    def consts(self) -> list[Any]:
        """Arrays that the function closed over; they are arguments of `run`, so that gradients reach them."""
        return list(self.closed.consts)

    def run(
        self,
        params,
        inputs,
        *,
        consts=None,
        feedback=None,
        handlers=(),
        frame: Frame | None = None,
        marks: Sequence[Hidden] = (),
        taps: Mapping[str, Value] | None = None,
    ):
        """Evaluates the network.

        Args:
          params, inputs: flat lists of arrays.
          consts: the arrays that the function closed over (default: those it was traced with).
          feedback: what stands in for each parameter in the shadow (None: no shadow is computed).
          handlers: called at each site; the first acts last in the forward direction, nearest to the readers.
          frame: what handlers read and write.
          marks: which marks are hidden signals to the handlers (of the others they hear nothing).
          taps: values outside of all loops to record, by name.

        Returns:
          `(outputs, aux)`; records are in `frame.records`.
        """
        shadows = list(feedback) if feedback is not None else [None] * len(params)
        runner = _Runner(handlers, feedback is not None, frozenset(marks), taps or {})
        pairs = [*zip(params, shadows, strict=True), *((x, None) for x in inputs)]
        outs = runner.block(self.block, pairs, frame or Frame(), self.consts if consts is None else consts)
        flat = [value for value, _ in outs]
        outputs = jax.tree.unflatten(self.out_tree, flat[: self.n_outputs])
        return outputs, jax.tree.unflatten(self.aux_tree, flat[self.n_outputs :])


class _Runner:
    """Evaluates blocks; pairs are (value, shadow)."""

    def __init__(self, handlers: Sequence[Handler], shadows: bool, marks: frozenset[Hidden], taps: Mapping[str, Value]):
        self.handlers, self.shadows, self.marks = tuple(handlers), shadows, marks
        self.taps = {value.place: name for name, value in taps.items()}
        self.activations = any(h.activations for h in handlers)
        self.offsets = any(h.offsets for h in handlers)

    def block(self, block: Block, ins: Sequence[Pair], frame: Frame, consts=None) -> list[Pair]:
        env: dict[Any, Pair] = {}

        def read(atom) -> Pair:
            return (atom.val, None) if is_literal(atom) else env[atom]

        def write(variable, pair: Pair):
            value, shadow = pair
            here = [h for h in block.hidden.get(variable, ()) if not h.mark or h in self.marks]
            for handler in reversed(self.handlers):  # the rule's own last, whichever of the names its feedback goes by
                for hidden in here:
                    value = handler.hidden(hidden, value, frame)
            if (block, variable) in self.taps:
                frame.records[self.taps[block, variable]] = value
            env[variable] = (value, shadow)

        for var, const in zip(block.jaxpr.constvars, block.consts if consts is None else consts, strict=True):
            env[var] = (const, None)
        for var, pair in zip(block.jaxpr.invars, ins, strict=True):
            if block.values[var].place == (block, var):
                write(var, pair)
            else:
                env[var] = pair
        for index, eqn in enumerate(block.jaxpr.eqns):
            if self.activations and index in block.skipped:
                continue
            if self.activations and index in block.regions:
                region = block.regions[index]
                write(region.output, self.activation(region, read, frame, block.values[region.output].shadowed))
                continue
            outs = self.equation(block, index, eqn, [read(v) for v in eqn.invars], frame)
            inlined = index in block.children and eqn.primitive.name in INLINED
            for var, pair in zip(eqn.outvars, outs, strict=True):
                if inlined and block.values[var].place != (block, var):
                    env[var] = pair  # defined, and handled, inside
                else:
                    write(var, pair)
        return [read(v) for v in block.jaxpr.outvars]

    def activation(self, region, read, frame: Frame, shadowed: bool) -> Pair:
        root, others = read(region.root), [read(v) for v in region.others]
        captured = [value for value, _ in others]

        def fn(x, *others):
            env = dict(zip(region.others, others, strict=True)) | {region.root: x.transpose(np.argsort(region.axes))}
            for eqn in region.eqns:
                got = bind(eqn, [v.val if is_literal(v) else env[v] for v in eqn.invars])
                env.update(zip(eqn.outvars, got, strict=True))
            return env[region.output]

        x = root[0].transpose(region.axes)
        run = (lambda x: fn(x, *captured)) if captured else fn
        for handler in self.handlers:  # the rule's own innermost
            run = _nest_activation(handler, region.activation, run, frame)
        if not (self.shadows and shadowed):
            return run(x), None
        x_shadow, *rest = (value if shadow is None else shadow for value, shadow in (root, *others))
        return run(x), fn(x_shadow.transpose(region.axes), *rest)

    def equation(self, block: Block, index: int, eqn, pairs: list[Pair], frame: Frame) -> list[Pair]:
        values = [value for value, _ in pairs]
        if index in block.layers:
            out = self.layer(block.layers[index], eqn, pairs, frame)
            if not (self.shadows and block.values[eqn.outvars[0]].shadowed):
                return [(out, None)]
            return [(out, bind(eqn, [v if s is None else s for v, s in pairs])[0])]
        if self.offsets and index in block.offsets:
            return [(self.offset(block.offsets[index], eqn, values, frame), None)]
        name = eqn.primitive.name
        if index in block.children and self.busy(block, index):
            if name in REMATS:
                return self.remat(block, index, eqn, pairs, frame)
            if name in INLINED:
                return self.block(block.children[index][0], pairs, frame)
            return getattr(self, name)(block, index, eqn, pairs, frame)
        outs = bind(eqn, values)
        if self.shadows and any(block.values[v].shadowed for v in eqn.outvars):
            return list(zip(outs, bind(eqn, [v if s is None else s for v, s in pairs]), strict=True))
        return [(out, None) for out in outs]

    def busy(self, block: Block, index: int) -> bool:
        """Whether something in the equation's inner jaxprs has to be handled (else it runs as it stands)."""
        eqn = block.jaxpr.eqns[index]
        ins = [block.value(v) for v in eqn.invars]
        if all(not v.data for v in ins) and not any(child.sites() for child in block.children[index]):
            return False
        if all(not v.params for v in ins):
            return False
        mixed_out = self.shadows and any(block.values[v].shadowed for v in eqn.outvars)
        return mixed_out or any(child.sites(offsets=self.offsets) for child in block.children[index])

    def layer(self, layer: Layer, eqn, pairs: list[Pair], frame: Frame):
        k = layer.position
        (w, b), rest = pairs[k], [value for i, (value, _) in enumerate(pairs) if i != k]
        single = len(rest) == 1 and layer.operation not in ("gather", "dynamic_slice")
        x = rest[0] if single else tuple(rest)

        def op(w, x):
            others = [x] if single else list(x)
            return bind(eqn, [*others[:k], w, *others[k:]])[0]

        b = w if b is None else b

        def run(w, b, x):
            return op(w, x)

        for handler in self.handlers:  # the rule's own innermost
            run = _nest_layer(handler, layer, run, op, frame)
        return run(w, b, x)

    def offset(self, offset: Offset, eqn, values: list[Any], frame: Frame):
        k = offset.position

        def run(p, others):
            return bind(eqn, [*others[:k], p, *others[k:]])[0]

        for handler in self.handlers:
            run = _nest_offset(handler, offset, run, frame)
        return run(values[k], [*values[:k], *values[k + 1 :]])

    # -- constructs

    def remat(self, block: Block, index: int, eqn, pairs, frame: Frame):
        (child,) = block.children[index]

        def body(pairs, inputs, position):
            inner = Frame(inputs, {}, position)
            return self.block(child, pairs, inner), inner.records

        checkpointed = jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
        outs, records = checkpointed(pairs, _below(frame.inputs, child), frame.index)
        frame.records.update(records)
        return outs

    def scan(self, block: Block, index: int, eqn, pairs, frame: Frame):
        (child,), params = block.children[index], eqn.params
        n_consts, n_carry = scan_counts(params)
        consts, carry, xs = pairs[:n_consts], pairs[n_consts : n_consts + n_carry], pairs[n_consts + n_carry :]

        classes = [child.value(v) for v in child.jaxpr.invars[n_consts : n_consts + n_carry]]

        def body(carry, sliced):
            xs, inputs, i = sliced
            inner = Frame(inputs, {}, (*frame.index, i))
            outs = self.block(child, [*consts, *carry, *xs], inner)
            ys = [self.paired(child.value(v), p) for v, p in zip(child.jaxpr.outvars, outs, strict=True)][n_carry:]
            carry = [self.paired(c, p) for c, p in zip(classes, outs[:n_carry], strict=True)]
            return carry, (ys, inner.records)

        options = {"_split_transpose": params["_split_transpose"]} if "_split_transpose" in params else {}
        carry, (ys, records) = jax.lax.scan(
            body,
            [self.paired(c, p) for c, p in zip(classes, carry, strict=True)],
            (list(xs), _below(frame.inputs, child), jnp.arange(params["length"])),  # which may be symbolic
            reverse=params["reverse"],
            unroll=params["unroll"],
            **options,
        )
        frame.records.update(records)
        return [*carry, *ys]

    def cond(self, block: Block, index: int, eqn, pairs, frame: Frame):
        classes = [block.values[v] for v in eqn.outvars]

        def branch(child):
            def run(pairs):
                outs = self.block(child, pairs, Frame({}, {}, frame.index))
                return [self.paired(c, p) for c, p in zip(classes, outs, strict=True)]

            return run

        # Frames inside a branch keep nothing: what one branch records the other would have to record too.
        return jax.lax.switch(pairs[0][0], [branch(child) for child in block.children[index]], list(pairs[1:]))

    def shard_map(self, block: Block, index: int, eqn, pairs, frame: Frame):
        (child,), params = block.children[index], eqn.params
        classes = [child.value(v) for v in child.jaxpr.outvars]

        def body(*pairs):
            outs = self.block(child, pairs, Frame({}, {}, frame.index))
            return tuple(self.paired(c, p) for c, p in zip(classes, outs, strict=True))

        axes = params.get("newly_manual_axes", params.get("manual_axes"))
        mapped = jax.shard_map(
            body,
            mesh=params["mesh"],
            in_specs=tuple(params["in_specs"]),
            out_specs=tuple(params["out_specs"]),
            check_vma=params["check_vma"],
            **({"axis_names": set(axes)} if axes is not None else {}),
        )
        return list(mapped(*pairs))

    def paired(self, value: Value, pair: Pair) -> Pair:
        """A pair whose shadow is there exactly if the value's class has one."""
        if not (self.shadows and value.shadowed):
            return (pair[0], None)
        return (pair[0], pair[0] if pair[1] is None else pair[1])


def name_number(name: str) -> int:
    """A number for a name, to fold into keys: the same in every process, which hash() is not."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def key_at(key, hidden: Hidden, value, frame: Frame):
    """A key for this hidden signal, this iteration of the loops around it, and this device."""
    key = jax.random.fold_in(key, name_number(hidden.name))
    for i in frame.index:
        key = jax.random.fold_in(key, i)
    for axis in sorted(varying_axes(jax.typeof(value))):
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return key


def zeros_at(value: Value | None):
    """Zeros in the shape of a value, with the axes of the scans around it in front, as `Frame.inputs` wants them."""
    assert value is not None and value.place is not None
    lengths = [length for _, length in value.place[0].loops]
    zeros = jnp.zeros((*lengths, *value.aval.shape), value.aval.dtype)
    return placed_as(zeros, value.aval, len(lengths))


def _below(inputs: Mapping[str, Any], child: Block) -> dict[str, Any]:
    if not inputs:
        return {}
    sites = child.sites()
    return {site: value for site, value in inputs.items() if site in sites}


def _nest_layer(handler: Handler, layer: Layer, run, plain, frame: Frame):
    def nested(w, b, x):
        return handler.layer(layer, Operation(run, plain, b), w, b, x, frame)

    return nested


def _nest_offset(handler: Handler, offset: Offset, run, frame: Frame):
    return lambda p, others: handler.offset(offset, run, p, others, frame)


def _nest_activation(handler: Handler, activation: Activation, run, frame: Frame):
    return lambda x: handler.activation(activation, run, x, frame)
