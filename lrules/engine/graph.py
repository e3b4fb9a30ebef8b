"""Graph: a traced network with the findings about it, and how it runs with handlers.

`Graph.run` evaluates the jaxpr and calls handlers at every layer, hidden signal and activation. It never edits the
jaxpr. Equations without such a site run unchanged.

Sequential feedback goes with the weights as a *shadow*: each value that depends on parameters alone is computed twice,
once from the parameters and once from the feedback. So feedback arrives at its layer after the same casts, reshapes and
slices.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrules.engine import jaxprs
from lrules.engine.activations import Doubt, linear_origins
from lrules.engine.analysis import Analysis
from lrules.engine.handlers import Frame, Handler, Pair, below, nest_activation, nest_affine, nest_layer
from lrules.engine.jaxprs import INLINED, REMATS, Atom, Equation, bind, is_literal, same_mesh, scan_counts
from lrules.engine.operations import of
from lrules.engine.product import Product
from lrules.engine.records import Activation, Affine, Block, Hidden, Layer, Value, argument, parameter, reach
from lrules.engine.regions import Region, RegionFunction, find_activations
from lrules.engine.reshapes import in_order
from lrules.engine.shared import EVERYWHERE, Pieces, Together, equation_key
from lrules.typing import Pytree


class Graph:
    """A traced network, from `net.graph(params, inputs)`: its layers, hidden signals and activations.

    `layers`, `hidden`, `activations` and `affines` are what was found. `parameters` and `arguments` are the values that
    go in. `live` are the hidden signals with a path to the outputs, not through `stop_gradient` and not to aux alone.

    Args:
      closed: the jaxpr of the network.
      names: the names of the parameters.
      batched: for each input, whether it has a batch.
      out_tree, aux_tree: the structures of outputs and aux.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> graph = lrules.Network(net).graph(params, jnp.ones((5, 3)))
      >>> [layer.site for layer in graph.layers], [h.name for h in graph.hidden], [a.site for a in graph.activations]
      (['a', 'b'], ['b'], ['tanh'])
    """

    def __init__(
        self, closed: Any, names: Sequence[str], batched: Sequence[bool], out_tree: Any, aux_tree: Any
    ) -> None:
        self.closed, self.names = closed, list(names)
        self.out_tree, self.aux_tree, self.n_outputs = out_tree, aux_tree, out_tree.num_leaves
        jaxprs.refuse_mutable(closed)
        n_outputs = self.n_outputs
        invars = closed.jaxpr.invars
        self.param_avals = [v.aval for v in invars[: len(names)]]
        promoted: dict[Any, int] = {}
        while True:
            analysis = Analysis(names, [len(a.shape) for a in self.param_avals], promoted)
            self.parameters = [parameter(i, aval) for i, aval in enumerate(self.param_avals)]
            self.arguments = [argument(v.aval, b) for v, b in zip(invars[len(names) :], batched, strict=True)]
            ins = [*self.parameters, *self.arguments]
            self.block, self.outs = analysis.walk(closed, ins, (), (), ())
            if analysis.found.keys() <= promoted.keys():
                break
            promoted |= analysis.found
        analysis.finish(self.outs[:n_outputs])
        self.layers, self.hidden = analysis.layers, analysis.hidden
        self.affines, self.refusals, self._noted = analysis.affines, analysis.refusals, analysis.noted
        reached = reach(self.outs[:n_outputs])
        self.live = {hidden for hidden in self.hidden if id(hidden.root) in reached}
        self.pieces = Pieces()  # pieces that hold programs of the user live as long as the graph
        self._made: dict[Hashable, Any] = {}
        self._made_for: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of `make`, which is called once; it must depend on the graph alone, and must not hold tracers."""
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            return self._made[key]

    def once_for(self, owner: Any, make: Callable[[], Any]) -> Any:
        """The same for an owner, with whom the result is dropped: so it may hold tracers, but not the owner itself."""
        with self._lock:
            if owner not in self._made_for:
                self._made_for[owner] = make()
            return self._made_for[owner]

    @property
    def activations(self) -> list[Activation]:
        """The activations. They are searched at first use, because few rules need them."""
        return self.once("activations", lambda: find_activations(self._noted))[0]

    @property
    def nonlinearities(self) -> list[str]:
        """The names of nonlinearities that may be meant as activations, and are not recognised."""
        return [doubt.name for doubt, _ in self.once("activations", lambda: find_activations(self._noted))[1]]

    @property
    def doubts(self) -> list[Doubt]:
        """The nonlinearities among them that a layer reads."""
        _, doubts = self.once("activations", lambda: find_activations(self._noted))
        read = linear_origins([hidden.root for hidden in self.hidden if not hidden.mark])
        return [doubt for doubt, value in doubts if value is None or id(value) in read]

    def pre_activations(self) -> dict[str, list[Hidden]]:
        """The pre-activations of each hidden signal that activations make, by the name of the hidden signal.

        Pooling, factors, casts, reshapes and transposes may lie between. Several signals may share one. They are
        searched at first use; from then on handlers with a method `pre_activation` are called where they are defined.
        """
        return self.once("pre_activations", self._find_pre_activations)

    def _find_pre_activations(self) -> dict[str, list[Hidden]]:
        outputs = {id(activation.output): activation for activation in self.activations}
        found: dict[str, list[Hidden]] = {}
        for hidden in self.hidden:
            made, stack, seen = {}, [hidden.root], set()
            while stack:
                value = stack.pop()
                if id(value) in outputs:
                    made[id(value)] = outputs[id(value)]
                elif id(value) not in seen:
                    seen.add(id(value))
                    below = [] if value.layer is not None else [v for v in value.operands if v.both]
                    if not below or (len(below) > 1 and value.producer is not None):  # a carry is made in two places
                        break
                    stack += below
            else:
                found[hidden.name] = [self._pre_activation(a) for a in made.values()]
        return found

    def _pre_activation(self, activation: Activation) -> Hidden:
        source = activation.source
        assert source is not None
        root, views = source.root()
        block, variable = root.place  # type: ignore[misc]
        if variable not in block.pre_activations:
            loops = tuple((length, False) for _, length in block.loops)
            name = f"{activation.site} pre-activation"
            block.pre_activations[variable] = Hidden(name, root, views, source, loops=loops)
        return block.pre_activations[variable]

    @property
    def consts(self) -> list[Any]:
        """Arrays over which the function closes. They are arguments of `run`, so that gradients reach them."""
        return list(self.closed.consts)

    def run(
        self,
        params: Sequence[Any],
        inputs: Sequence[Any],
        *,
        consts: Sequence[Any] | None = None,
        feedback: Sequence[Any] | None = None,
        handlers: Sequence[Handler] = (),
        frame: Frame | None = None,
        marks: Sequence[Hidden] = (),
        taps: Mapping[str, Value] | None = None,
    ) -> tuple[Any, Any]:
        """Evaluates the network.

        Args:
          params, inputs: flat lists of arrays.
          consts: the arrays over which the function closes (default: those of the trace).
          feedback: the feedback that replaces each parameter in the shadow (None: there is no shadow).
          handlers: they are called at each site; the first acts last in the forward direction, nearest to the readers.
          frame: what the handlers read and write.
          marks: the marks that count as hidden signals; handlers do not get the others.
          taps: values outside all loops to record, by name.

        Returns:
          `(outputs, aux)`; the records are in `frame.records`.
        """
        shadows = list(feedback) if feedback is not None else [None] * len(params)
        if any(handler.activations for handler in handlers):
            self.activations  # noqa: B018  this searches them
        runner = _Runner(self.pieces, handlers, feedback is not None, frozenset(marks), taps or {})
        pairs = [*zip(params, shadows, strict=True), *((x, None) for x in inputs)]
        outs = runner.block(self.block, pairs, frame or Frame(), self.consts if consts is None else consts)
        flat = [value for value, _ in outs]
        outputs = jax.tree.unflatten(self.out_tree, flat[: self.n_outputs])
        return outputs, jax.tree.unflatten(self.aux_tree, flat[self.n_outputs :])


class _Runner:
    """Evaluates blocks; pairs are (value, shadow)."""

    def __init__(
        self,
        pieces: Pieces,
        handlers: Sequence[Handler],
        shadows: bool,
        marks: frozenset[Hidden],
        taps: Mapping[str, Value],
    ) -> None:
        self.pieces = pieces
        self.handlers, self.shadows, self.marks = tuple(handlers), shadows, marks
        self.taps = {value.place: name for name, value in taps.items()}
        self.activations = any(h.activations for h in handlers)
        self.affines = any(h.affines for h in handlers)
        self.at_activations = [h for h in self.handlers if type(h).activation is not Handler.activation]
        self.at_layers = [h for h in self.handlers if type(h).layer is not Handler.layer]
        self.at_hidden = [h for h in self.handlers if type(h).hidden is not Handler.hidden]
        self.before = [h for h in self.handlers if type(h).pre_activation is not Handler.pre_activation]
        # Without jit an equation is a program of its own, as it is where the network is called.
        self.staged = isinstance(jax.lax.neg(np.float32(0)), jax.core.Tracer)

    def block(self, block: Block, ins: Sequence[Pair], frame: Frame, consts: Sequence[Any] | None = None) -> list[Pair]:
        env: dict[Any, Pair] = {}

        def read(atom: Atom) -> Pair:
            return (atom.val, None) if is_literal(atom) else env[atom]

        def write(variable: Any, pair: Pair) -> None:
            value, shadow = pair
            here = [h for h in block.hidden.get(variable, ()) if not h.mark or h in self.marks]
            calls = [(x.hidden, h) for x in reversed(self.at_hidden) for h in here]  # the rule's own last
            if self.before and variable in block.pre_activations:
                calls += [(x.pre_activation, block.pre_activations[variable]) for x in reversed(self.before)]
            for call, site in calls:
                with same_mesh(jax.typeof(value)):
                    value = call(site, value, frame)
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
        pending: dict[int, Any] = {}  # equations that run together, and what they compute

        def run_pending() -> None:
            eqns = [block.jaxpr.eqns[i] for i in pending]
            made = [v for e in eqns for v in e.outvars]
            read_later = {v for v in made if any(i not in pending for i in block.readers.get(v, ()))}
            wanted = [v for v in made if v in read_later or self.is_noted(block, v)]
            run = Together(eqns, list(pending.values()), wanted)
            pending.clear()
            shared = (self.pieces if run.programs else EVERYWHERE).shared(run.key, lambda: run)
            for v, value in zip(wanted, shared(*(read(v)[0] for v in run.given)), strict=True):
                write(v, (value, None))

        for index, eqn in enumerate(block.jaxpr.eqns):
            if self.activations and index in block.skipped:
                continue
            key = equation_key(eqn) if self.staged and self.is_plain(block, index, eqn) else None
            if key is not None:
                pending[index] = key
                if any(self.is_noted(block, v) for v in eqn.outvars):  # its readers get what handlers make of it
                    run_pending()
                continue
            if pending:
                run_pending()
            if self.activations and index in block.regions:
                region = block.regions[index]
                with same_mesh(region.output.aval):
                    write(region.output, self.activation(region, read, frame, block.values[region.output].shadowed))
                continue
            with same_mesh(eqn.outvars[0].aval if eqn.outvars else None):
                outs = self.equation(block, index, eqn, [read(v) for v in eqn.invars], frame)
            inlined = index in block.children and of(eqn).name in INLINED
            for var, pair in zip(eqn.outvars, outs, strict=True):
                if inlined and block.values[var].place != (block, var):
                    env[var] = pair  # defined, and handled, inside
                else:
                    write(var, pair)
        if pending:
            run_pending()
        return [read(v) for v in block.jaxpr.outvars]

    def is_plain(self, block: Block, index: int, eqn: Equation) -> bool:
        """Whether an equation runs as it stands, without feedback that rides along."""
        if index in block.children or (index in block.layers and self.at_layers):
            return False
        if (self.affines and index in block.affines) or (self.activations and index in block.regions):
            return False
        return not (self.shadows and any(block.values[v].shadowed for v in eqn.outvars))

    def is_noted(self, block: Block, v: Atom) -> bool:
        """Whether a value is handled, or recorded."""
        held = (self.at_hidden and v in block.hidden) or (self.before and v in block.pre_activations)
        return bool(held) or (block, v) in self.taps

    def activation(self, region: Region, read: Any, frame: Frame, shadowed: bool) -> Pair:
        root, others = read(region.root), [read(v) for v in region.others]
        program = region.program
        x = in_order(root[0], region.axes)
        fn = RegionFunction(program, [value for value, _ in others], self.pieces if self.staged else None)
        run: Callable[[jax.Array], Any] = fn
        for handler in self.at_activations:  # the rule's own innermost
            run = nest_activation(handler, region.activation, run, frame)
        if not (self.shadows and shadowed):
            return run(x), None
        x_shadow, *rest = (value if shadow is None else shadow for value, shadow in (root, *others))
        return run(x), program(in_order(x_shadow, region.axes), *rest)

    def equation(self, block: Block, index: int, eqn: Equation, pairs: list[Pair], frame: Frame) -> list[Pair]:
        values = [value for value, _ in pairs]
        if index in block.layers:
            out = self.layer(block.layers[index], eqn, pairs, frame)
            if not (self.shadows and block.values[eqn.outvars[0]].shadowed):
                return [(out, None)]
            return [(out, bind(eqn, [v if s is None else s for v, s in pairs])[0])]
        if self.affines and index in block.affines:
            return [(self.affine(block.affines[index], eqn, values, frame), None)]
        if index in block.children and self.busy(block, index):
            name = of(eqn).name
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

        def held(affines: bool) -> bool:
            return any(child.sites(affines=affines, activations=self.activations) for child in block.children[index])

        if (all(not v.data for v in ins) and not held(False)) or all(not v.params for v in ins):
            return False
        return (self.shadows and any(block.values[v].shadowed for v in eqn.outvars)) or held(self.affines)

    def layer(self, layer: Layer, eqn: Equation, pairs: list[Pair], frame: Frame) -> Any:
        k = layer.position
        (w, b), rest = pairs[k], [value for i, (value, _) in enumerate(pairs) if i != k]
        single = len(rest) == 1 and not layer.row.looks_up
        x = rest[0] if single else tuple(rest)

        op = Product(eqn, k, single)
        b = w if b is None else b

        def run(w: jax.Array, b: Any, x: Any) -> Any:
            return op(w, x)

        for handler in self.at_layers:  # the rule's own innermost
            run = nest_layer(handler, layer, run, op, frame)
        return run(w, b, x)

    def affine(self, affine: Affine, eqn: Equation, values: list[Any], frame: Frame) -> Any:
        k = affine.position

        def run(p: Any, others: Any) -> Any:
            return bind(eqn, [*others[:k], p, *others[k:]])[0]

        for handler in self.handlers:
            run = nest_affine(handler, affine, run, frame)
        return run(values[k], [*values[:k], *values[k + 1 :]])

    # -- constructs

    def remat(self, block: Block, index: int, eqn: Equation, pairs: Sequence[Pair], frame: Frame) -> Any:
        (child,) = block.children[index]

        def body(pairs: Sequence[Pair], inputs: Pytree, position: Any) -> tuple[list[Pair], dict[str, Any]]:
            inner = Frame(inputs, {}, position)
            return self.block(child, pairs, inner), inner.taken()

        checkpointed = jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
        outs, records = checkpointed(pairs, below(frame.inputs, child), frame.index)
        frame.records.update(records)
        return outs

    def scan(self, block: Block, index: int, eqn: Equation, pairs: Sequence[Pair], frame: Frame) -> list[Any]:
        (child,), params = block.children[index], eqn.params
        n_consts, n_carry = scan_counts(params)
        consts, carry, xs = pairs[:n_consts], pairs[n_consts : n_consts + n_carry], pairs[n_consts + n_carry :]

        classes = [child.value(v) for v in child.jaxpr.invars[n_consts : n_consts + n_carry]]

        def body(carry: Any, sliced: Any) -> tuple[Any, Any]:
            xs, inputs, i = sliced
            inner = Frame(inputs, {}, (*frame.index, i))
            outs = self.block(child, [*consts, *carry, *xs], inner)
            ys = [self.paired(child.value(v), p) for v, p in zip(child.jaxpr.outvars, outs, strict=True)][n_carry:]
            carry = [self.paired(c, p) for c, p in zip(classes, outs[:n_carry], strict=True)]
            return carry, (ys, inner.taken())

        options = {"_split_transpose": params["_split_transpose"]} if "_split_transpose" in params else {}
        carry, (ys, records) = jax.lax.scan(
            body,
            [self.paired(c, p) for c, p in zip(classes, carry, strict=True)],
            (list(xs), below(frame.inputs, child), jnp.arange(params["length"])),  # which may be symbolic
            reverse=params["reverse"],
            unroll=params["unroll"],
            **options,
        )
        frame.records.update(records)
        return [*carry, *ys]

    def cond(self, block: Block, index: int, eqn: Equation, pairs: Sequence[Pair], frame: Frame) -> Any:
        classes = [block.values[v] for v in eqn.outvars]

        def branch(child: Block) -> Callable[..., list[Pair]]:
            def run(pairs: Sequence[Pair], inputs: Pytree) -> list[Pair]:
                outs = self.block(child, pairs, Frame(below(inputs, child), {}, frame.index))
                return [self.paired(c, p) for c, p in zip(classes, outs, strict=True)]

            return run

        # Frames inside a branch keep nothing: what one branch records the other would have to record too.
        children = block.children[index]
        inputs = {site: value for child in children for site, value in below(frame.inputs, child).items()}
        return jax.lax.switch(pairs[0][0], [branch(child) for child in children], list(pairs[1:]), inputs)

    def shard_map(self, block: Block, index: int, eqn: Equation, pairs: Sequence[Pair], frame: Frame) -> list[Pair]:
        (child,), params = block.children[index], eqn.params
        classes = [child.value(v) for v in child.jaxpr.outvars]

        def body(*pairs: Pair) -> tuple[Pair, ...]:
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
