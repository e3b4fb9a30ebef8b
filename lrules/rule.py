"""Rules: what one is, how to apply one to a network, and the two constructors from which most are made.

A rule changes the backward pass and leaves the forward pass as it is. `sequential` rules decide, layer by layer, how
the weight gradient is formed and what error goes down; `direct` rules bring the output error straight to each hidden
signal. Both are handlers on the network (see `network.py`).
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from lrules.analysis import Hidden, Layer, bind, varying_axes
from lrules.batch import BatchAxis, doubled, find_batch_axis
from lrules.network import Frame, Graph, Handler, Network, as_network

Pytree = Any
Initializer = Callable[..., jax.Array]


class Feedback(NamedTuple):
    """The weights of the learning channel, by name.

    Attributes:
      fixed: never enters an optimizer.
      learned: `grads.feedback` has its structure, and the sign of a gradient.
      state: statistics that a rule carries; continue with `feedback._replace(state=grads.state)`.
    """

    fixed: dict[str, jax.Array]
    learned: dict[str, jax.Array]
    state: Pytree = ()


class Gradients(NamedTuple):
    """What a rule gives in place of gradients: optimizers subtract it.

    Attributes:
      params: of the structure of the parameters.
      feedback: of the structure of `feedback.learned`.
      state: the next `feedback.state`.
      report: what the rule has to tell of this step, by name.
    """

    params: Pytree
    feedback: dict[str, jax.Array]
    state: Pytree = ()
    report: dict[str, Any] = {}


class Rule(NamedTuple):
    """A learning rule, as pure functions.

    Attributes:
      init: `(key, net, params, inputs) -> Feedback`.
      transform: `(net, *, reduction) -> f(params, feedback, inputs, *, rng=None)`, see `lrules.transform`.
      value_and_grad: `(net, loss) -> fn`, see `lrules.value_and_grad`; None where that of `transform` serves.
      stochastic: needs `rng=`.
      additive: the gradient of a batch is the sum of those of its parts, up to their weights in the objective.
      plan: `(net, graph, params, inputs) -> Plan`, what the rule does where; None for a rule of another kind.
      layer: what the rule does at one layer, for `partition`; None where it cannot be said layer by layer.
    """

    init: Callable[..., Feedback]
    transform: Callable[..., Callable[..., Any]]
    value_and_grad: Callable[..., Callable[..., Any]] | None = None
    stochastic: bool = False
    additive: bool = True
    plan: Callable[..., Plan] | None = None
    layer: LayerRule | None = None


# ------------------------------------------------------------------------------------------------- applying a rule


def transform(net: Network | Callable, rule: Rule, *, reduction: str = "mean") -> Callable[..., Any]:
    """The network with its backward pass replaced: the same outputs, the rule's update as gradient.

    Args:
      net: a `Network`, or a bare function `apply(params, inputs) -> outputs`.
      rule: the learning rule.
      reduction: how the objective reduces the per-example losses, `"mean"` or `"sum"`. Rules whose arithmetic depends
        on the scale of the error take the arriving cotangent as that of such an objective.

    Returns:
      `f(params, feedback, inputs, *, rng=None)`, equal to `net(params, inputs)` bit for bit. Its gradient with respect
      to `params` is the rule's update, to `feedback` that of learned feedback weights, to `inputs` what the rule brings
      down to them. No forward mode, no second derivatives.

    Raises:
      ValueError: the rule needs the loss or the targets (use `value_and_grad`), or `rng` is missing or superfluous.
      NotImplementedError: the network holds a construct that the rule cannot serve.

    Example:
      >>> import jax.numpy as jnp
      >>> from lrules import backprop, transform
      >>> f = transform(lambda w, x: jnp.tanh(x @ w), backprop())
      >>> f(jnp.eye(2), Feedback({}, {}), jnp.zeros((1, 2))).shape
      (1, 2)
    """
    _check_call(net, rule)
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction={reduction!r} is neither "mean" nor "sum"')
    inner = rule.transform(as_network(net), reduction=reduction)

    def f(params, feedback, inputs, *, rng=None):
        check_rng(rule, rng)
        check_params(params)
        return inner(params, feedback, inputs, rng=rng)

    return f


def value_and_grad(net: Network | Callable, loss: Callable, rule: Rule) -> Callable[..., Any]:
    """The objective and the rule's gradients, for a loss per example.

    The objective is the mean over all elements of `loss(outputs, targets)`.

    Args:
      net: a `Network`, or a bare function `apply(params, inputs) -> outputs`.
      loss: `(outputs, targets) -> [batch]` or `[batch, ...]`.
      rule: the learning rule.

    Returns:
      `fn(params, feedback, inputs, targets, *, rng=None) -> ((value, outputs[, aux]), Gradients)`.

    Raises:
      ValueError: the loss has another batch than the inputs, or `rng` is missing or superfluous.
      NotImplementedError: the network holds a construct that the rule cannot serve.
    """
    _check_call(net, rule)
    net = as_network(net)
    if rule.value_and_grad is None:
        inner = grad_of_transform(rule.transform(net, reduction="mean"), net, loss)
    else:
        inner = rule.value_and_grad(net, loss)

    def fn(params, feedback, inputs, targets, *, rng=None):
        check_rng(rule, rng)
        check_params(params)
        return inner(params, feedback, inputs, targets, rng=rng)

    return fn


def grad_of_transform(f: Callable, net: Network, loss: Callable, *, pass_targets: bool = False) -> Callable[..., Any]:
    """`value_and_grad` of a rule that `transform` serves."""

    def fn(params, feedback, inputs, targets, *, rng=None):
        def objective(params, learned):
            extra = {"targets": targets} if pass_targets else {}
            out = f(params, feedback._replace(learned=learned), inputs, rng=rng, **extra)
            outputs = out[0] if net.has_aux else out
            return mean_loss(net, loss, outputs, inputs, targets), out

        graded = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        (value, out), (params_grad, feedback_grad) = graded(params, feedback.learned)
        head = (value, *out) if net.has_aux else (value, out)
        return head, Gradients(params_grad, feedback_grad, feedback.state, {})

    return fn


def mean_loss(net: Network, loss: Callable, outputs: Pytree, inputs: Pytree, targets: Pytree) -> jax.Array:
    """The mean over all elements of `loss(outputs, targets)`, its batch checked.

    Raises:
      ValueError: the loss does not begin with the batch of the inputs.
    """
    batch = net.batch_size(inputs)
    losses = loss(outputs, targets)
    if jnp.ndim(losses) == 0 or jnp.shape(losses)[0] != batch:
        shapes = [jnp.shape(x) for x in jax.tree.leaves(outputs)]
        raise ValueError(
            f"loss(outputs, targets) has shape {jnp.shape(losses)}, but the inputs hold {batch} examples and the "
            f"outputs have shape {', '.join(map(str, shapes))}: return one loss per example, [batch] or [batch, ...]"
        )
    return jnp.mean(losses)


def _check_call(net, rule) -> None:
    """The network and the rule stand where they should."""
    if not isinstance(rule, Rule):
        hint = "call its factory first" if callable(rule) else "the order is (net, rule) and (net, loss, rule)"
        raise TypeError(f"the rule is a {type(rule).__name__}, not an lrules.Rule: {hint}")
    if isinstance(net, Rule) or not callable(net):
        raise TypeError(f"the network is a {type(net).__name__}: give a Network, or a function apply(params, inputs)")


def at_least_float32(dtype) -> Any:
    """The dtype in which sums over a batch are taken."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def check_rng(rule: Rule, rng) -> None:
    """`rng=` belongs to stochastic rules and to no others."""
    if rule.stochastic and rng is None:
        raise ValueError("this rule is stochastic: give it a fresh key at every step, rng=jax.random.key(...)")
    if not rule.stochastic and rng is not None:
        raise ValueError("this rule uses no randomness: leave rng= out")


def check_params(params: Pytree) -> None:
    """Parameters are arrays of real or complex numbers."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "params"
            what = f"has dtype {dtype}" if dtype is not None else f"is a {type(leaf).__name__}, not an array"
            raise TypeError(
                f"the parameter {name!r} {what}: only floating-point arrays can be trained, so pass it with the inputs "
                "(batch_axes=None for what has no batch) or close over it"
            )


# ---------------------------------------------------------------------------------------------- what happens at a layer


@dataclasses.dataclass(frozen=True, eq=False)
class Plain:
    """Backpropagation at this layer."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sequential:
    """Error passes through this layer, and `backward` says how.

    Attributes:
      backward: `(op, w, b, x, d, layer) -> (dw, dx, db)`.
      init: the initializer of the feedback weights; None where there are none (then `b` is None).
      learned: whether `db` trains the feedback weights.
      redrawn: whether the feedback weights are drawn anew at every step.
      whole_batch: whether the gradient depends on the batch as a whole, so that it must be summed over devices.
      gain: `(op, w, x, d, layer) -> c`, where the weight gradient is c times that of backprop; None for 1.
    """

    backward: Callable[..., tuple[Any, Any, Any]]
    init: Initializer | None = None
    learned: bool = False
    redrawn: bool = False
    whole_batch: bool = False
    gain: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Direct:
    """The output error comes straight to the hidden signal that this layer reads.

    Attributes:
      signal: `(e, b, targets, name) -> cotangent`; None where nothing arrives.
      init: the initializer of the feedback weights; None where there are none (then `b` is None).
      learn: `(e, h, b) -> db`, the gradient of the feedback weights; None for fixed ones.
      redrawn: whether the feedback weights are drawn anew at every step.
      at: names (regular expressions) of the hidden signals or marked tensors where feedback lands; None for all.
      shared_axes: pairs of an axis of the outputs and the axis of the hidden signals that corresponds to it (None: of
        the same number): one feedback weight serves all positions.
      rank: of the error that is sent, brought to it by one more feedback weight, `outputs`; None: as it is.
      channel: in place of `signal`: `(plan, params, inputs, consts, records) -> pull`, where `pull(errors)` gives the
        cotangent of each hidden signal at its definition, by name.
      targets: whether `signal` needs the targets.
      max_feedback_bytes: what the feedback weights of one rule may take.
    """

    signal: Callable[..., Any] | None
    init: Initializer | None = None
    learn: Callable[..., Any] | None = None
    redrawn: bool = False
    at: tuple[str, ...] | None = None
    shared_axes: tuple[tuple[int, int | None], ...] = ()
    rank: int | None = None
    channel: Callable[..., Callable[..., Any]] | None = None
    targets: bool = False
    max_feedback_bytes: int = 2**30

    @property
    def lands(self) -> bool:
        """Whether anything arrives at all."""
        return self.signal is not None or self.channel is not None


LayerRule = Plain | Sequential | Direct


@dataclasses.dataclass(frozen=True)
class Landing:
    """One place where direct feedback arrives.

    Attributes:
      hidden: the hidden signal.
      spec: what the rule brings there.
      axis: the batch axis, as the reader sees it.
      shape: of the feedback weights, `[*lengths, outputs, *hidden]`.
      lengths: of the scans whose iterations have feedback weights of their own.
      shared: where the shared axes of the outputs lie in the hidden signal: its axis without the batch, or the loop.
      dtype: of the feedback weights.
    """

    hidden: Hidden
    spec: Direct
    axis: BatchAxis | None = None
    shape: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    shared: tuple[tuple[str, int], ...] = ()
    dtype: Any = jnp.float32

    def axes_named(self) -> str:
        """The shape of the feedback weights, as `3 iterations x 10 outputs x (128,)`."""
        n = len(self.lengths)
        scans = "".join(f"{length} iterations x " for length in self.lengths)
        return f"{scans}{self.shape[n]} {'outputs' if self.spec.rank is None else 'rank'} x {self.shape[n + 1 :]}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize if self.spec.init is not None else 0


@dataclasses.dataclass(frozen=True)
class Entry:
    """One sequential feedback weight: it stands in for a parameter.

    Attributes:
      index: of the parameter among the leaves.
      shape, dtype: those of the parameter.
      spec: the rule of the layer.
      fan_in, fan_out, sliced: the parameter's axes that are summed over, that are not, and that a loop runs over.
      spatial: the axes of a convolution's window.
    """

    index: int
    shape: tuple[int, ...]
    dtype: Any
    spec: Sequential
    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]
    sliced: tuple[int, ...]
    spatial: tuple[int, ...] = ()

    def draw(self, key, weight) -> jax.Array:
        """Draws it as the layer's `[fan_in, fan_out]` (a convolution: `[*window, in, out]`), loops apart.

        Initializers with an argument `weight` get the parameter, in the same layout.
        """
        sizes = [[self.shape[i] for i in axes] for axes in (self.sliced, self.spatial, self.fan_in, self.fan_out)]
        shape = (*sizes[1], math.prod(sizes[2]), math.prod(sizes[3]))
        init = self.spec.init
        assert init is not None
        count = math.prod(sizes[0])
        order = (*self.sliced, *self.spatial, *self.fan_in, *self.fan_out)
        if "weight" in inspect.signature(init).parameters:
            weights = jax.lax.stop_gradient(jnp.transpose(weight, order)).reshape(count, *shape)
            draw = lambda k, w: init(k, shape, self.dtype, weight=w)  # noqa: E731
        else:
            weights = None
            draw = lambda k, _: init(k, shape, self.dtype)  # noqa: E731
        if self.sliced:
            drawn = jax.vmap(draw)(jax.random.split(key, count), weights)
        else:
            drawn = draw(key, None if weights is None else weights[0])
        inverse = [order.index(i) for i in range(len(order))]
        return drawn.reshape([self.shape[i] for i in order]).transpose(inverse)


@dataclasses.dataclass(eq=False)
class Plan:
    """What a rule does at each layer and each hidden signal of one traced network."""

    graph: Graph
    specs: dict[str, LayerRule]  # by site
    entries: dict[str, Entry]  # sequential feedback, by parameter
    landings: dict[str, Landing]  # direct feedback, by hidden signal
    batch: int | None = None
    output_axes: list[BatchAxis | None] = dataclasses.field(default_factory=list)
    reduced: dict[str, tuple[Direct, tuple[int, int], Any]] = dataclasses.field(default_factory=dict)  # see Direct.rank

    @property
    def shadows(self) -> bool:
        return any(isinstance(s, Sequential) and s.init is not None for s in self.specs.values())

    def feedback_shapes(self, *, redrawn: bool = False) -> dict[str, tuple[tuple[int, ...], Any, bool]]:
        """Shape, dtype and whether it is learned, of each feedback weight; or of those redrawn at every step."""
        shapes = {}
        for name, e in self.entries.items():
            if e.spec.redrawn == redrawn:
                shapes[name] = (e.shape, e.dtype, e.spec.learned)
        for name, landing in self.landings.items():
            if landing.spec.init is not None and landing.spec.redrawn == redrawn:
                shapes[name] = (landing.shape, landing.dtype, landing.spec.learn is not None)
        for name, (spec, shape, dtype) in self.reduced.items():
            if spec.redrawn == redrawn:
                shapes[name] = (shape, dtype, False)
        return shapes

    def init(self, key, params: Sequence[Any], *, redrawn: bool = False) -> Feedback:
        """Draws the feedback weights, each from a key of its own name."""
        fixed: dict[str, jax.Array] = {}
        learned: dict[str, jax.Array] = {}
        for name, (shape, dtype, is_learned) in sorted(self.feedback_shapes(redrawn=redrawn).items()):
            k = jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
            if name in self.entries:
                drawn = self.entries[name].draw(k, params[self.entries[name].index])
            elif name in self.landings:
                drawn = _draw_direct(self.landings[name], k)
            else:
                drawn = self.reduced[name][0].init(k, shape[::-1], dtype).T  # type: ignore[misc]
            (learned if is_learned else fixed)[name] = drawn
        return Feedback(fixed, learned)

    def check(self, feedback: Feedback) -> None:
        """Feedback must have been made for this rule, network and shapes."""
        if not isinstance(feedback, Feedback):
            raise TypeError(
                f"the feedback is a {type(feedback).__name__}, not an lrules.Feedback: make it with "
                "rule.init(key, net, params, inputs)"
            )
        given = {**feedback.fixed, **feedback.learned}
        wanted = self.feedback_shapes()
        remedy = "make it anew with rule.init(key, net, params, inputs)"
        if missing := sorted(set(wanted) - set(given)):
            raise ValueError(
                f"the feedback has no entry {missing[0]!r}, so it is not of this rule and network: {remedy}"
            )
        if extra := sorted(set(given) - set(wanted)):
            raise ValueError(
                f"the feedback has an entry {extra[0]!r} for which this rule and network have no use: {remedy}"
            )
        for name, (shape, _, _) in wanted.items():
            if jnp.shape(given[name]) != tuple(shape):
                raise ValueError(
                    f"the feedback {name!r} has shape {jnp.shape(given[name])}, but this network needs "
                    f"{tuple(shape)}: {remedy}"
                )


def _draw_direct(landing: Landing, key) -> jax.Array:
    n = len(landing.lengths)
    outputs, size = landing.shape[n], math.prod(landing.shape[n + 1 :])

    def draw(k):
        return landing.spec.init(k, (size, outputs), landing.dtype).T.reshape(landing.shape[n:])  # type: ignore[misc]

    if not n:
        return draw(key)
    return jax.vmap(draw)(jax.random.split(key, math.prod(landing.lengths))).reshape(landing.shape)


# ------------------------------------------------------------------------------------------------------ making a plan


def make_plan(net: Network, graph: Graph, params: Pytree, inputs: Pytree, choose: Callable[[str], LayerRule]) -> Plan:
    """Settles what a rule does where, and refuses what it cannot serve.

    Args:
      net, graph, params, inputs: the network, traced on these.
      choose: the rule of a layer, by name.

    Raises:
      ValueError: no layer was found, or the rules of one hidden signal disagree.
      NotImplementedError: a construct cannot be served.
    """
    for refusal in graph.refusals:
        if any(not isinstance(choose(graph.names[i]), Plain) for i in refusal.parameters):
            raise NotImplementedError(refusal.sentence)
    if not graph.layers:
        raise ValueError(
            "no layer found: the network never multiplies something that depends on its inputs by a parameter "
            "(dot_general or conv_general_dilated); check that the parameters and inputs are the function's arguments "
            "and not closed over"
        )
    specs = {layer.site: choose(layer.name) for layer in graph.layers}
    entries: dict[str, Entry] = {}
    for layer in graph.layers:
        spec = specs[layer.site]
        if isinstance(spec, Sequential):
            if spec.whole_batch:
                _check_whole_batch(layer)
            if spec.init is not None and layer.reads is not None:
                for entry in layer_entries(graph, layer, spec):
                    name = graph.names[entry.index]
                    if entries.setdefault(name, entry).spec is not spec:
                        raise ValueError(
                            f"the parameter {name!r} is used by layers under two rules with feedback, of which each "
                            f"would draw its own: give the layer {layer.name!r} the rule of the other"
                        )
        if isinstance(spec, Direct) and spec.lands and {"cond", "shard_map"} & set(_bare(layer.scope)):
            construct = next(c for c in _bare(layer.scope) if c in ("cond", "shard_map"))
            raise NotImplementedError(
                f"the layer {layer.name!r} lies inside a {construct}, where direct feedback cannot land: use a "
                f"sequential rule for it (partition), or take the layer out of the {construct}"
            )
    plan = Plan(graph, specs, entries, {})
    _plan_landings(plan, net, params, inputs)
    return plan


def _bare(scope: Sequence[str]) -> list[str]:
    return [s.split(" ")[0] for s in scope]


def _check_whole_batch(layer: Layer) -> None:
    if "shard_map unchecked" in layer.scope:
        raise NotImplementedError(
            f"the layer {layer.name!r} lies inside a shard_map with check_vma=False, where it cannot be seen over "
            "which devices the batch is spread: set check_vma=True, or use another rule for it (partition)"
        )
    if layer.owned:
        raise NotImplementedError(
            f"the parameter {layer.name!r} is itself split over the mesh axes {sorted(layer.owned)} inside a "
            "shard_map, so its neurons' norms would need a sum that depends on how: use another rule for it (partition)"
        )


def _feedback_parameters(graph: Graph, layer: Layer) -> list[int]:
    """The parameters of a layer's weight that get feedback: matrices, or vectors where there are only those."""
    indices = sorted(layer.weight.params)
    ranks = {i: len(graph.param_avals[i].shape) - len(layer.weight.axes.get(i, ((), ()))[1]) for i in indices}
    return [i for i in indices if ranks[i] >= 2] or indices


def layer_entries(graph: Graph, layer: Layer, spec: Sequential) -> list[Entry]:
    """What sequential feedback there is to a layer: one entry per parameter matrix of its weight."""
    return [_entry(graph, layer, i, spec) for i in _feedback_parameters(graph, layer)]


def _entry(graph: Graph, layer: Layer, i: int, spec: Sequential) -> Entry:
    aval = graph.param_avals[i]
    dims, sliced = layer.weight.axes.get(i, ((), frozenset()))
    contracted = {a for d in layer.contracted if d < len(dims) for a in dims[d]}
    free = {a for d, held in enumerate(dims) if d not in layer.contracted for a in held} - contracted
    if layer.operation == "dot_general":  # members of an ensemble, heads: each is a matrix of its own
        batch = layer.eqn.params["dimension_numbers"][1][0 if layer.weight_first else 1]
        members = {a for d in batch if d < len(dims) for a in dims[d]} - contracted
        free, sliced = free - members, sliced | members
    lost = [a for a in range(len(aval.shape)) if a not in contracted | free | sliced]
    if lost:  # an axis summed away on the way (a factorised weight): it faces the side that is not seen
        (contracted if free and not contracted else free).update(lost)
    spatial: tuple[int, ...] = ()
    if layer.operation == "conv_general_dilated" and all(len(held) == 1 for held in dims):
        rhs = layer.eqn.params["dimension_numbers"].rhs_spec
        spatial = tuple(dims[d][0] for d in rhs[2:])
        contracted -= set(spatial)
    return Entry(
        i, tuple(aval.shape), aval.dtype, spec,
        tuple(sorted(contracted)), tuple(sorted(free)), tuple(sorted(sliced)), spatial,
    )  # fmt: skip


def _plan_landings(plan: Plan, net: Network, params: Pytree, inputs: Pytree) -> None:
    graph = plan.graph
    directs = list(dict.fromkeys(s for s in plan.specs.values() if isinstance(s, Direct)))
    chosen: list[tuple[Hidden, Direct]] = []
    for hidden in graph.hidden:
        if hidden.mark:
            continue
        specs = {id(plan.specs[layer.site]): plan.specs[layer.site] for layer in hidden.readers}
        if any(isinstance(s, Direct) for s in specs.values()) and len(specs) > 1:
            readers = ", ".join(repr(layer.name) for layer in hidden.readers)
            raise ValueError(
                f"the layers {readers} read one hidden signal, {hidden.name!r}, under rules that disagree on what "
                "arrives there: give them the same direct rule, or sequential rules"
            )
        (spec,) = list(specs.values())[:1]
        if isinstance(spec, Direct) and (spec.at is None or _matches(spec.at, hidden.name)):
            chosen.append((hidden, spec))
    for spec in directs:
        if spec.at is None:
            continue
        names = [h.name for h in graph.hidden]
        for pattern in spec.at:
            if not any(re.search(pattern, name) for name in names):
                raise ValueError(
                    f"at={pattern!r} matches no hidden signal and no marked tensor; there are {_listed(names)}"
                )
        for hidden in graph.hidden:
            landed = any(other.root is hidden.root for other, _ in chosen)  # one feedback for one tensor
            if hidden.mark and not landed and _matches(spec.at, hidden.name):
                if len(directs) > 1:
                    raise ValueError(
                        f"the mark {hidden.name!r} belongs to no layer, so a partition of several direct rules "
                        "cannot tell whose feedback lands there: use one direct rule, or name hidden signals in at="
                    )
                if {"cond", "shard_map"} & set(_bare(hidden.root.place[0].scope)):  # type: ignore[index]
                    raise NotImplementedError(
                        f"the tensor marked {hidden.name!r} lies inside a cond or shard_map, where direct feedback "
                        "cannot land: mark one outside"
                    )
                chosen.append((hidden, spec))
    for i, (hidden, _) in enumerate(chosen):
        if any(other.name == hidden.name for other, _ in chosen[:i]):
            raise ValueError(f"a mark and a layer are both named {hidden.name!r}: give the mark another name")
    if all(spec.signal is None for _, spec in chosen):
        plan.landings = {hidden.name: Landing(hidden, spec) for hidden, spec in chosen}
        return
    plan.batch = batch = net.batch_size(inputs)
    twice = doubled(net, params, inputs, graph)
    outs = range(graph.n_outputs)
    plan.output_axes = [find_batch_axis(graph.outs[i], twice.outs[i] if twice else None, batch) for i in outs]
    avals = [graph.outs[i].aval for i in outs]
    for aval, axis in zip(avals, plan.output_axes, strict=True):
        if jnp.issubdtype(aval.dtype, jnp.inexact) and (axis is None or axis.before * axis.after > 1):
            raise ValueError(
                f"an output of shape {aval.shape} has no batch axis, of {batch} examples in the order of the inputs, "
                "that can be told: direct feedback needs one error per example, so return outputs [batch, ...], or "
                "return what has no batch as aux (has_aux=True)"
            )
    outputs = sum(a.size // batch for a in avals if jnp.issubdtype(a.dtype, jnp.inexact))
    total = 0
    sizes = {spec: outputs for spec in directs}
    for spec in directs:
        if spec.shared_axes:
            sizes[spec] = outputs // math.prod(_shared_sizes(plan, spec))
        if spec.rank is not None and spec.signal is not None:
            name = "outputs" + (f"#{len(plan.reduced) + 1}" if plan.reduced else "")
            dtype = next(a.dtype for a in avals if jnp.issubdtype(a.dtype, jnp.inexact))
            plan.reduced[name] = (spec, (sizes[spec], spec.rank), dtype)
            total += sizes[spec] * spec.rank * jnp.dtype(dtype).itemsize
            sizes[spec] = spec.rank
    for hidden, spec in chosen:
        other = twice.hidden[graph.hidden.index(hidden)].reader if twice else None
        axis = find_batch_axis(hidden.reader, other, batch)
        if axis is None:
            raise ValueError(
                f"the batch axis of the hidden signal {hidden.name!r} of shape {hidden.reader.aval.shape} cannot "
                f"be told (batch {batch}): give that layer a sequential rule (partition), or choose with at= where "
                "feedback lands"
            )
        lengths = tuple(length for length, own in hidden.loops if own)
        shared = _shared_places(plan, hidden, spec, axis)
        positions = {place for kind, place in shared if kind == "axis"}
        rest = (n for i, n in enumerate(axis.rest(hidden.reader.aval.shape)) if i not in positions)
        shape = (*lengths, sizes[spec], *rest)
        dtype = _feedback_dtype(graph, hidden)
        landing = Landing(hidden, spec, axis, shape, lengths, shared, dtype)
        plan.landings[hidden.name] = landing
        total += landing.nbytes
        if total > spec.max_feedback_bytes:
            raise ValueError(
                f"direct feedback of shape {shape} to {hidden.name!r} brings the total to {total:,} bytes, above "
                f"max_feedback_bytes={spec.max_feedback_bytes:,}: raise max_feedback_bytes, let feedback land at fewer "
                "places (at=), or share it along axes (shared_axes=)"
            )


def _shared_sizes(plan: Plan, spec: Direct) -> list[int]:
    """The sizes of the shared axes of the outputs."""
    aval, axis = plan.graph.outs[0].aval, plan.output_axes[0]
    if plan.graph.n_outputs != 1 or axis is None:
        raise ValueError("shared_axes= wants outputs that are one array: this network returns several, or none")
    for out, _ in spec.shared_axes:
        if not 0 <= out < len(aval.shape) or out == axis.axis:
            raise ValueError(
                f"shared_axes={out} is no axis of the outputs {aval.shape} beside the batch: count from 0, with the "
                "batch, as in shared_axes=1 for the time of [batch, time, classes]"
            )
    return [aval.shape[out] for out, _ in spec.shared_axes]


def _shared_places(plan: Plan, hidden: Hidden, spec: Direct, axis: BatchAxis) -> tuple[tuple[str, int], ...]:
    """Where the shared axes of the outputs lie in a hidden signal."""
    if not spec.shared_axes:
        return ()
    shape = hidden.reader.aval.shape
    axes = [*range(axis.axis), *([axis.axis] * sum(n > 1 for n in (axis.before, axis.after)))]
    axes += range(axis.axis + 1, len(shape))  # the axis that each dimension without the batch comes from
    rest, places = axis.rest(shape), []
    for (out, within), size in zip(spec.shared_axes, _shared_sizes(plan, spec), strict=True):
        loops = [i for i, (n, own) in enumerate(hidden.loops) if n == size and not own]
        same = [i for i, a in enumerate(axes) if a == (out if within is None else within) and rest[i] == size]
        merged = [i for i, a in enumerate(axes) if a == axis.axis and rest[i] == size]
        found = [("axis", i) for i in same] if within is not None else [
            *(("loop", i) for i in loops), *(("axis", i) for i in (*same, *merged))
        ]  # fmt: skip
        found = [place for place in found if place not in places]
        if not found:
            raise ValueError(
                f"the hidden signal {hidden.name!r} of shape {shape} has no axis that corresponds to axis {out} of the "
                f"outputs, of size {size}: name it, shared_axes=[({out}, its axis)], or leave that signal out (at=)"
            )
        places.append(found[0])
    return tuple(places)


def _feedback_dtype(graph: Graph, hidden: Hidden):
    if hidden.readers:
        return graph.param_avals[min(hidden.readers[0].weight.params)].dtype
    return hidden.reader.aval.dtype


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) if names else "none"


# --------------------------------------------------------------------------------------------- running under a plan


class _RuleHandler(Handler):
    """The rule's own handler: the layers of sequential rules, and the landings of direct ones."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def layer(self, layer: Layer, op, w, b, x, frame: Frame):
        spec = self.plan.specs[layer.site]
        if not isinstance(spec, Sequential):
            return op(w, x)
        return _sequential_layer(spec, layer, op)(w, b if spec.init is not None else None, x)

    def hidden(self, hidden: Hidden, value, frame: Frame):
        landing = self.plan.landings.get(hidden.name)
        if landing is None or landing.hidden is not hidden:
            return value
        if landing.spec.lands:
            frame.records[hidden.name] = value
        return jax.lax.stop_gradient(value)


def _sequential_layer(spec: Sequential, layer: Layer, op) -> Callable:
    @jax.custom_vjp
    def multiply(w, b, x):
        return op(w, x)

    def forward(w, b, x):
        return op(w, x), (w, b, x)

    def backward(residuals, d):
        w, b, x = residuals
        dw, dx, db = spec.backward(op, w, b, x, d, layer)
        return dw, db, dx if _floating(x) else None

    multiply.defvjp(forward, backward)
    return multiply


def _floating(x) -> bool:
    return all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(x))


def run_plan(
    plan: Plan, net: Network, params: Pytree, feedback: Feedback, inputs: Pytree, *, targets=None, rng=None
) -> Any:
    """Runs the network under a plan; what comes out differentiates as the rule says."""
    plan.check(feedback)
    weights = {**feedback.fixed, **feedback.learned}
    if rng is not None:
        weights |= plan.init(rng, jax.tree.leaves(params), redrawn=True).fixed
    args = (
        jax.tree.leaves(params),
        weights,
        jax.tree.leaves(inputs),
        plan.graph.consts,
        net.handlers,
        targets,
    )
    if any(landing.spec.lands for landing in plan.landings.values()):
        outputs, aux = _direct_run(plan)(*args)
    else:
        outputs, aux = plain_run(plan, *args[:5], Frame())
    return (outputs, aux) if net.has_aux else outputs


def plain_run(plan: Plan, params, feedback, inputs, consts, handlers, frame: Frame):
    shadow = None
    if plan.shadows:
        names = plan.graph.names
        shadow = [
            feedback[name] if name in plan.entries else jax.lax.stop_gradient(p)
            for name, p in zip(names, params, strict=True)
        ]
    own = _RuleHandler(plan)
    return plan.graph.run(params, inputs, consts=consts, feedback=shadow, handlers=(own, *handlers), frame=frame)


def _direct_run(plan: Plan) -> Callable:
    """The whole network as one function whose backward pass brings the output error to every landing at once."""

    @jax.custom_vjp
    def run(params, feedback, inputs, consts, handlers, targets):
        return plain_run(plan, params, feedback, inputs, consts, handlers, Frame())

    def forward(*args):
        # Only what is differentiated is: data may come from what has no reverse mode, such as a while loop.
        wanted = any(leaf.perturbed for leaf in jax.tree.leaves(args[2:5]))
        params, feedback, inputs, consts, handlers, targets = jax.tree.map(lambda leaf: leaf.value, args)

        def network(params, feedback, inputs=inputs, consts=consts, handlers=handlers):
            frame = Frame()
            outputs, aux = plain_run(plan, params, feedback, inputs, consts, handlers, frame)
            return (outputs, frame.records), aux

        differentiated = (params, feedback, inputs, consts, handlers) if wanted else (params, feedback)
        (outputs, records), pull, aux = jax.vjp(network, *differentiated, has_aux=True)
        learns = any(landing.spec.learn is not None for landing in plan.landings.values())
        channels = dict.fromkeys(landing.spec.channel for landing in plan.landings.values() if landing.spec.channel)
        skips = [channel(plan, params, inputs, consts, records) for channel in channels]
        return (outputs, aux), (pull, skips, feedback, targets, records if learns else None)

    def backward(residuals, cotangent):
        pull, skips, feedback, targets, records = residuals
        errors = jax.tree.map(_instantiate, cotangent[0], is_leaf=_is_zero)
        sent: dict[Direct, Any] = {}
        signals: dict[str, Any] = {}
        feedback_grads: dict[str, Any] = {}
        for skip in skips:
            signals |= skip(errors)
        for name, landing in plan.landings.items():
            spec, b = landing.spec, feedback.get(name)
            if spec.signal is None:
                continue
            if spec not in sent:
                sent[spec] = sent_error(plan, spec, output_error(plan, errors), feedback)
            signals[name] = _land(landing, sent[spec], b, targets)
            if spec.learn is not None:
                feedback_grads[name] = direct_feedback_gradient(landing, sent[spec], records[name], b)
        grads = list(pull((errors, signals)))
        grads[1] = {**grads[1], **{name: _whole(g, feedback[name]) for name, g in feedback_grads.items()}}
        return (*grads, *[None] * (6 - len(grads)))

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


def _is_zero(x) -> bool:
    return isinstance(x, SymbolicZero)


def _instantiate(x):
    return np.zeros(x.shape, x.dtype) if _is_zero(x) else x


def _whole(grad, b):
    """Sums a feedback gradient over the devices that share the feedback weight, as the transpose of using it would."""
    axes = tuple(sorted(varying_axes(jax.typeof(grad)) - varying_axes(jax.typeof(b))))
    return jax.lax.psum(grad, axes) if axes else grad


def output_error(plan: Plan, errors: Pytree) -> jax.Array:
    """The cotangent of the outputs, flattened per example: `[batch, outputs]`."""
    flat = []
    for error, axis in zip(jax.tree.leaves(errors), plan.output_axes, strict=True):
        if axis is not None and jnp.issubdtype(error.dtype, jnp.inexact):
            flat.append(jnp.moveaxis(error, axis.axis, 0).reshape(plan.batch, -1))
    dtype = jnp.result_type(*[x.dtype for x in flat]) if len({x.dtype for x in flat}) == 1 else jnp.float32
    return jnp.concatenate([x.astype(dtype) for x in flat], axis=1) if len(flat) > 1 else flat[0]


def sent_error(plan: Plan, spec: Direct, e, feedback):
    """The output error as it is sent: shared axes in front, `[*shared, batch, outputs]`, its rank reduced."""
    if spec.shared_axes:
        (aval, batch_axis) = plan.graph.outs[0].aval, plan.output_axes[0].axis  # type: ignore[union-attr]
        e = e.reshape(plan.batch, *(n for i, n in enumerate(aval.shape) if i != batch_axis))
        axes = [out + 1 if out < batch_axis else out for out, _ in spec.shared_axes]
        e = jnp.moveaxis(e, axes, range(len(axes)))
        e = e.reshape(*e.shape[: len(axes) + 1], -1)
    for name, (owner, _, _) in plan.reduced.items():
        if owner is spec:
            e = jnp.tensordot(e.astype(feedback[name].dtype), feedback[name], axes=1)
    return e


def _land(landing: Landing, e, b, targets):
    """The cotangent of one hidden signal at its definition, with the axes of the scans around it in front."""
    hidden, shared, axis = landing.hidden, landing.shared, landing.axis
    assert axis is not None and landing.spec.signal is not None
    turns = [i for i, (kind, _) in enumerate(shared) if kind == "loop"]
    places = {i: place for i, (kind, place) in enumerate(shared) if kind == "axis"}

    def signal(e, b):  # [*shared, batch, *hidden without shared axes]
        return landing.spec.signal(e, b, targets, hidden.name)  # type: ignore[misc]

    for _ in shared:
        signal = jax.vmap(signal, in_axes=(0, None))

    def define(s):
        return hidden.to_definition(axis.restore(s, hidden.reader.aval.shape))

    for _ in turns:
        define = jax.vmap(define)

    def arrive(b):
        s = jnp.moveaxis(signal(e, b), turns, range(len(turns)))
        front = [len(turns) + k for k in range(len(places))]
        return define(jnp.moveaxis(s, front, [len(turns) + 1 + place for place in places.values()]))

    for _ in landing.lengths:
        arrive = jax.vmap(arrive)
    out = arrive(b)
    order = [i for i, (_, own) in enumerate(hidden.loops) if own] + [shared[i][1] for i in turns]
    out = jnp.moveaxis(out, range(len(order)), [sorted(order).index(i) for i in order])
    lead = [length if i in order else 1 for i, (length, _) in enumerate(hidden.loops)]
    out = out.reshape(*lead, *out.shape[len(order) :])
    return jnp.broadcast_to(out, (*(length for length, _ in hidden.loops), *out.shape[len(lead) :]))


def direct_feedback_gradient(landing: Landing, e, record, b):
    """The gradient of one direct feedback weight, summed over the scans and positions that share it."""
    hidden, shared, axis = landing.hidden, landing.shared, landing.axis
    assert axis is not None and landing.spec.learn is not None
    n = len(hidden.loops)

    def seen(value):  # as the reader sees it, the batch in front
        for eqn in hidden.views:
            (value,) = bind(eqn, [value])
        shape = hidden.reader.aval.shape
        value = value.reshape((*shape[: axis.axis], axis.before, -1, axis.after, *shape[axis.axis + 1 :]))
        return jnp.moveaxis(value, axis.axis + 1, 0).reshape(-1, *axis.rest(shape))

    for _ in range(n):
        seen = jax.vmap(seen)
    where = [place if kind == "loop" else n + 1 + place for kind, place in shared]
    own = [i for i, (_, own) in enumerate(hidden.loops) if own]
    others = [i for i in range(n) if i not in own and i not in where]
    h = seen(record).astype(b.dtype)
    h = jnp.moveaxis(h, [*own, *others, *where], range(len(own) + len(others) + len(where)))

    def summed(learn, in_axes):
        return lambda *args: jax.vmap(learn, in_axes)(*args).sum(0)

    learn = landing.spec.learn
    for _ in shared:
        learn = summed(learn, (0, 0, None))
    for _ in others:
        learn = summed(learn, (None, 0, None))
    for _ in own:
        learn = jax.vmap(learn, (None, 0, 0))
    return learn(e, h, b)


# ------------------------------------------------------------------------------------------------------ constructors


def layerwise(choose_for: Callable[[Graph], Callable[[str], LayerRule]], *, layer: LayerRule | None, **flags) -> Rule:
    """A rule that is said layer by layer.

    Args:
      choose_for: from a traced network to the rule of each layer, by name.
      layer: that rule where it is the same for all.
      **flags: `additive` and the like, see `Rule`.
    """
    needs_targets = flags.pop("targets", False)

    def plan(net, graph, params, inputs) -> Plan:
        return make_plan(net, graph, params, inputs, choose_for(graph))

    def init(key, net, params, inputs) -> Feedback:
        net = as_network(net)
        check_params(params)
        return plan(net, net.graph(params, inputs), params, inputs).init(key, jax.tree.leaves(params))

    def run(net, params, feedback, inputs, targets, rng):
        graph = net.graph(params, inputs)
        made = plan(net, graph, params, inputs)
        return run_plan(made, net, params, feedback, inputs, targets=targets, rng=rng)

    def transform(net, *, reduction="mean"):
        if needs_targets:
            raise ValueError(
                "this rule needs the targets: use lrules.value_and_grad(net, loss, rule) in place of transform"
            )

        def f(params, feedback, inputs, *, rng=None):
            return run(net, params, feedback, inputs, None, rng)

        return f

    def value_and_grad(net, loss):
        def f(params, feedback, inputs, *, rng=None, targets=None):
            return run(net, params, feedback, inputs, targets, rng)

        return grad_of_transform(f, net, loss, pass_targets=True)

    return Rule(init, transform, value_and_grad if needs_targets else None, plan=plan, layer=layer, **flags)


def sequential(
    backward: Callable[..., tuple[Any, Any, Any]],
    *,
    init: Initializer | None = None,
    learned: bool = False,
    redrawn: bool = False,
    whole_batch: bool = False,
    gain: Callable[..., Any] | None = None,
) -> Rule:
    """A rule in which error passes through every layer, as `backward` says.

    Args:
      backward: `(op, w, b, x, d, layer) -> (dw, dx, db)`. The layer computes `y = op(w, x)`; `d` is the error that
        arrives at `y`, of its shape; `b` the feedback weight in the place of `w`, of its shape (None without `init`).
        `dw` is the layer's weight gradient, `dx` what goes down, of the shape of `x`; `db` the gradient of learned
        feedback, else None. `jax.vjp(op, w, x)[1](d)` gives backpropagation's `(dw, dx)`.
      init: the initializer of the feedback weights, as in `jax.nn.initializers`; None if the rule has none.
      learned: whether `db` trains the feedback weights.
      redrawn: draw the feedback weights anew at every step, from `rng=`, in place of keeping them.
      whole_batch: whether the gradient depends on the batch as a whole (then the rule is not additive).
      gain: `(op, w, x, d, layer) -> c` if `dw` is c times the gradient of backprop, for modifiers that form it per
        example; None if c is 1.

    Returns:
      The rule.

    Example:
      >>> def backward(op, w, b, x, d, layer):
      ...     dw, dx = jax.vjp(op, w, x)[1](d)
      ...     return dw, 0.5 * dx, None
      >>> halved = sequential(backward)
    """
    if redrawn and learned:
        raise ValueError("feedback that is redrawn at every step cannot be learned: leave out redrawn= or learned=")
    spec = Sequential(backward, init, learned, redrawn, whole_batch, gain)
    return layerwise(lambda graph: lambda name: spec, layer=spec, additive=not whole_batch, stochastic=redrawn)


def direct(
    signal: Callable[..., Any] | None,
    *,
    init: Initializer | None = None,
    learn: Callable[..., Any] | None = None,
    redrawn: bool = False,
    at: str | Sequence[str] | None = None,
    shared_axes: int | Sequence[int | tuple[int, int]] = (),
    rank: int | None = None,
    channel: Callable[..., Callable[..., Any]] | None = None,
    targets: bool = False,
    max_feedback_bytes: int = 2**30,
) -> Rule:
    """A rule that brings the output error straight to every hidden signal.

    Args:
      signal: `(e, b, targets, name) -> [batch, *hidden]`, the cotangent of the hidden signal `name`, from the output
        error `e` `[batch, outputs]` and the feedback weight `b` `[outputs, *hidden]` (None without `init`). None stops
        the error at every hidden signal.
      init: the initializer of the feedback weights, drawn as `[hidden size, outputs]`; None if the rule has none.
      learn: `(e, h, b) -> db`, the gradient of the feedback weight from the hidden signal `h` `[batch, *hidden]`; None
        for fixed feedback.
      redrawn: draw the feedback weights anew at every step, from `rng=`, in place of keeping them.
      at: where feedback lands in place of every hidden signal: regular expressions that names of hidden signals or of
        tensors marked with `lrules.hidden` match.
      shared_axes: axes of the outputs (counted with the batch) along which one feedback weight serves all positions:
        time in `[batch, time, classes]`. The corresponding axis of the hidden signals is that of the same number, or a
        loop of that length around them; pairs `(axis of the outputs, axis of the hidden signals)` say otherwise. `e`,
        `b` and the hidden signals then come without these axes.
      rank: bring the error to so many numbers by one random matrix `[outputs, rank]` before it is sent; `e` is then
        `[batch, rank]`.
      channel: in place of `signal`, see `Direct`.
      targets: whether `signal` needs the targets (then only `value_and_grad` serves it; else it gets None).
      max_feedback_bytes: refuse to make more feedback than this.

    Returns:
      The rule.
    """
    where = None if at is None else ((at,) if isinstance(at, str) else tuple(at))
    for pattern in where or ():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"at={pattern!r} is no regular expression: {error}") from None
    if rank is not None and not (isinstance(rank, int) and rank >= 1):
        raise ValueError(f"rank={rank} is no number of directions to send: give an integer of at least 1, or None")
    axes = [shared_axes] if isinstance(shared_axes, int) else list(shared_axes)
    pairs = tuple((a, None) if isinstance(a, int) else (a[0], a[1]) for a in axes)
    if redrawn and learn is not None:
        raise ValueError("feedback that is redrawn at every step cannot be learned: leave out redrawn= or learn=")
    spec = Direct(signal, init, learn, redrawn, where, pairs, rank, channel, targets, max_feedback_bytes)
    return layerwise(lambda graph: lambda name: spec, layer=spec, targets=targets, stochastic=redrawn)


# ---------------------------------------------------------------------------------------------------------- describe


class Description(NamedTuple):
    """What a rule does to a network; prints as a table.

    Attributes:
      layers: a row per layer: name, operation, weight shape, what the rule does, the hidden signal read, and the
        feedbacks that reach the layer.
      hidden: a row per hidden signal: name, shape without the batch, shape of its feedback, bytes.
      activations: names of the activations found.
      feedback_bytes: of all feedback weights.
    """

    layers: list[dict[str, Any]]
    hidden: list[dict[str, Any]]
    activations: list[str]
    feedback_bytes: int

    def __str__(self) -> str:
        lines = _table(self.layers, ("layer", "operation", "weight", "rule", "reads", "reached by"))
        if self.hidden:
            lines += ["", *_table(self.hidden, ("hidden signal", "shape", "feedback", "bytes"))]
        lines += ["", f"feedback: {self.feedback_bytes:,} bytes"]
        return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    cells = [list(columns)] + [[str(row[c]) for c in columns] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]


def describe(net: Network | Callable, rule: Rule, params: Pytree, inputs: Pytree) -> Description:
    """What the rule does to each layer, and which feedback reaches it.

    Args:
      net: the network.
      rule: the rule.
      params, inputs: as the network takes them; `ShapeDtypeStruct`s will do.

    Returns:
      A `Description`: print it, or read its rows.

    Raises:
      ValueError, NotImplementedError: what `rule.init` would raise.
    """
    net = as_network(net)
    graph = net.graph(params, inputs)
    plan = rule.plan(net, graph, params, inputs) if rule.plan else None
    landings = plan.landings if plan else {}
    reached = feedback_reach(graph, {landing.hidden: landing.spec.lands for landing in landings.values()})
    layers = []
    for layer in graph.layers:
        spec = plan.specs[layer.site] if plan else rule.layer
        layers.append(
            {
                "layer": layer.site,
                "operation": layer.operation,
                "weight": tuple(layer.weight.aval.shape),
                "rule": _treatment(spec, layer, plan),
                "reads": layer.reads.name if layer.reads else "(data)",
                "reached by": ", ".join(reached[layer.site]) or "(nothing)",
            }
        )
    hidden = []
    for h in graph.hidden:
        landing = landings.get(h.name)
        if h.mark and landing is None:
            continue
        shape = landing.axis.rest(h.reader.aval.shape) if landing and landing.axis else h.reader.aval.shape
        has = landing is not None and landing.spec.init is not None
        hidden.append(
            {
                "hidden signal": h.name,
                "shape": tuple(shape),
                "feedback": landing.axes_named() if has and landing else "-",
                "bytes": landing.nbytes if has and landing else 0,
            }
        )
    total = 0
    if plan:
        for shape, dtype, _ in plan.feedback_shapes().values():
            total += math.prod(shape) * jnp.dtype(dtype).itemsize
    return Description(layers, hidden, [a.site for a in graph.activations], total)


def _treatment(spec, layer: Layer, plan) -> str:
    if isinstance(spec, Sequential):
        return "sequential" + (", feedback" if plan and set(layer.parameters) & set(plan.entries) else "")
    if isinstance(spec, Direct):
        return "direct"
    return "backprop" if isinstance(spec, Plain) else "own"


def feedback_reach(graph: Graph, stops: Mapping[Hidden, bool]) -> dict[str, list[str]]:
    """For each layer, where the error that reaches it comes from: the output, or landings of direct feedback."""
    reach: dict[str, list[str]] = {layer.site: [] for layer in graph.layers}
    stop_of: dict[int, list[str]] = {}
    for hidden in stops:
        stop_of.setdefault(id(hidden.root), []).append(hidden.name)

    def spread(value, source: str, seen: set[int], start: bool):
        stack = [(value, start)]
        while stack:
            value, first = stack.pop()
            if id(value) in seen or (id(value) in stop_of and not first):
                continue
            seen.add(id(value))
            if value.layer is not None and source not in reach[value.layer.site]:
                reach[value.layer.site].append(source)
            stack += [(v, False) for v in (*value.operands, *([value.source] if value.source else []))]

    for hidden in sorted((h for h, lands in stops.items() if lands), key=graph.hidden.index):
        spread(hidden.root, hidden.name, set(), True)
    for out in graph.outs[: graph.n_outputs]:
        spread(out, "output", set(), False)
    return reach
