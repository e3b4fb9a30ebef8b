"""Plans: what a rule does at each layer and each hidden signal of one traced network, settled before it runs.

What a rule does at a layer is a `LayerRule`: `Plain`, `Sequential` or `Direct`. Feedback weights follow from it: an
`Entry` for each parameter that sequential feedback stands in for, a `Landing` for each place where direct feedback
arrives.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from lrules.analysis import SAME_SHAPE_VIEWS, Hidden, Layer, split_as
from lrules.batch import BatchAxis, Unbatched, batch_axis, doubled
from lrules.head import Head, heads
from lrules.network import Graph, Network, as_network, name_number
from lrules.rule import (
    Feedback,
    Initializer,
    Pytree,
    Rule,
    as_initializer,
    at_least_float32,
    draw,
    is_number,
    require_rule,
)

SMALLER = {  # what makes direct feedback smaller, by option
    "at": "let it land at fewer places (at=)",
    "shared_axes": "share it along axes of the outputs (shared_axes=)",
    "rank": "make it of two factors (rank=)",
}

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

    def __post_init__(self):
        as_initializer(self.init)  # which refuses what cannot be called


@dataclasses.dataclass(frozen=True, eq=False)
class Direct:
    """The output error comes straight to the hidden signal that this layer reads.

    Attributes:
      signal: `(e, b, targets, name) -> cotangent`; None where nothing arrives.
      init: the initializer of the feedback weights; None where there are none (then `b` is None).
      learn: `(e, h, b) -> db`, the gradient of the feedback weights; None for fixed ones.
      redrawn: whether the feedback weights are drawn anew at every step.
      at: names (regular expressions) of the hidden signals or marked tensors where feedback lands; None for all.
      shared_axes: axes of the outputs along which one feedback weight serves all positions, each with the places in
        hidden signals that are given for it: axes, or `"loop 0"`; the first that fits a signal holds there.
      rank: of the error that is sent, brought to it by one more feedback weight, `(outputs)`; None: as it is.
      channel: in place of `signal`: `(plan, params, inputs, consts, records) -> pull`, where `pull(errors)` gives the
        cotangent of each hidden signal at its definition, by name.
      targets: whether `signal` needs the targets; it then gets `elements=`, too, if it has an argument of that name:
        how many losses the objective is the mean of.
      error_at: where the output error is taken. `"layer"`: at the last layer's outputs, below a softmax or the like
        that has no parameters (see `head.py`); or `"outputs"`.
      max_feedback_bytes: what the feedback weights of one rule may take.
      offers: which of `at`, `shared_axes` and `rank` the rule's user can give, for refusals to advise.
    """

    signal: Callable[..., Any] | None
    init: Initializer | None = None
    learn: Callable[..., Any] | None = None
    redrawn: bool = False
    at: tuple[str, ...] | None = None
    shared_axes: tuple[tuple[int, tuple[int | str, ...]], ...] = ()
    rank: int | None = None
    channel: Callable[..., Callable[..., Any]] | None = None
    targets: bool = False
    error_at: str = "layer"
    max_feedback_bytes: int = 2**30
    offers: tuple[str, ...] = ("at", "shared_axes", "rank")

    def __post_init__(self):
        as_initializer(self.init)
        if self.error_at not in ("layer", "outputs"):
            raise ValueError(f'error_at must be "layer" or "outputs", got {self.error_at!r}')
        if not (is_number(self.max_feedback_bytes) and self.max_feedback_bytes >= 0):
            raise ValueError(f"max_feedback_bytes must be a number >= 0 or inf, got {self.max_feedback_bytes!r}")

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
      outputs: how many numbers the error has before it is brought to `Direct.rank`.
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
    outputs: int = 0

    def axes_named(self) -> str:
        """The shape of the feedback weights, as `3 iterations x 10 outputs x (128,)`."""
        n = len(self.lengths)
        scans = "".join(f"{length} iterations x " for length in self.lengths)
        return f"{scans}{self.shape[n]} {'outputs' if self.spec.rank is None else 'rank'} x {self.shape[n + 1 :]}"

    @property
    def lies(self) -> Sequence[Any]:
        """The explicit mesh axes over which the hidden signal is split, before the reader gathers it."""
        value = self.hidden.reader
        while value.source is not None and value.view.primitive.name in SAME_SHAPE_VIEWS:
            value = value.source
        return value.aval.sharding.spec

    @property
    def batch_split(self) -> Any:
        """Those over which its batch is split; None where it is merged with other axes."""
        assert self.axis is not None
        unsplit = self.axis.merged or isinstance(self.axis, Unbatched)
        return None if unsplit else self.lies[self.axis.axis]

    @property
    def split(self) -> tuple[Any, ...]:
        """Those over which the feedback weights are split, as the hidden signal's features are."""
        assert self.axis is not None
        positions = {place for kind, place in self.shared if kind == "axis"}
        axis = self.axis.axis
        rest = (*self.lies[:axis], *[None] * len(self.axis.merged), *self.lies[axis + 1 :])
        rest = tuple(self.lies) if isinstance(self.axis, Unbatched) else rest
        return (*[None] * (len(self.lengths) + 1), *(s for i, s in enumerate(rest) if i not in positions))

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
        weights = None
        if "weight" in inspect.signature(init).parameters:
            weights = split_as(jax.lax.stop_gradient(jnp.transpose(weight, order))).reshape(count, *shape)

        def one(k, w):
            return draw(init, k, shape, self.dtype, **({} if w is None else {"weight": w}))

        if self.sliced:
            drawn = jax.vmap(one)(jax.random.split(key, count), weights)
        else:
            drawn = one(key, None if weights is None else weights[0])
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
    heads: dict[str, Head] = dataclasses.field(default_factory=dict)  # where the output error is taken, see head.py
    reduced: dict[str, tuple[Direct, tuple[int, int], Any]] = dataclasses.field(default_factory=dict)  # see Direct.rank
    elements: int | None = None  # how many losses the objective is the mean of, where rules need the targets

    @property
    def marks(self) -> list[Hidden]:
        """The marks where feedback lands."""
        return [landing.hidden for landing in self.landings.values() if landing.hidden.mark]

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
            k = jax.random.fold_in(key, name_number(name))
            if name in self.entries:
                i = self.entries[name].index
                drawn = split_as(self.entries[name].draw(k, params[i]), *self.graph.param_avals[i].sharding.spec)
            elif name in self.landings:
                drawn = split_as(_draw_direct(self.landings[name], k), *self.landings[name].split)
            else:
                drawn = _draw_reduction(k, shape, dtype)
            (learned if is_learned else fixed)[name] = drawn
        return Feedback(fixed, learned)

    def check(self, feedback: Feedback) -> None:
        """Feedback must have been made for this rule, network and shapes."""
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
        for name, (shape, _, learned) in wanted.items():
            if name in (feedback.fixed if learned else feedback.learned):
                raise ValueError(
                    f"the feedback {name!r} is {'fixed' if learned else 'learned'}, and this rule "
                    f"{'learns it' if learned else 'keeps it as it is'}, so it is another rule's: {remedy}"
                )
            if jnp.shape(given[name]) != tuple(shape):
                raise ValueError(
                    f"the feedback {name!r} has shape {jnp.shape(given[name])}, but this network needs "
                    f"{tuple(shape)}: {remedy}"
                )


def _draw_direct(landing: Landing, key) -> jax.Array:
    """Draws `[hidden size, outputs]`, of which feedback of a rank keeps so many outputs, as good as any others.

    Where such a matrix would be larger than all feedback may be, of as many outputs as fit.
    """
    n = len(landing.lengths)
    sent, size = landing.shape[n], math.prod(landing.shape[n + 1 :])
    fitting = landing.spec.max_feedback_bytes / max(size * jnp.dtype(landing.dtype).itemsize, 1)
    outputs = landing.outputs if landing.spec.rank is None else max(sent, int(min(landing.outputs, fitting)))

    def one(k):
        drawn = draw(landing.spec.init, k, (size, outputs), landing.dtype)  # type: ignore[arg-type]
        return drawn[:, :sent].T.reshape(landing.shape[n:])

    if not n:
        return one(key)
    return jax.vmap(one)(jax.random.split(key, math.prod(landing.lengths))).reshape(landing.shape)


def _draw_reduction(key, shape: tuple[int, ...], dtype) -> jax.Array:
    """The matrix `[outputs, rank]` that brings errors to a rank: random rows of length one that sum to one.

    Independent numbers have the same mean and variance after it as before. Fewer than three numbers of length one
    cannot sum to one at random: there the rows are normal, of squares that sum to one on average.
    """
    wide, rank = at_least_float32(dtype), shape[1]
    rows = jax.random.normal(key, shape, wide)
    if rank <= 2:
        return (rows / rank**0.5).astype(dtype)
    rows = rows - rows.mean(1, keepdims=True)
    rows = rows / jnp.linalg.norm(rows, axis=1, keepdims=True).astype(wide)
    return (rows * (1 - 1 / rank) ** 0.5 + 1 / rank).astype(dtype)


# ------------------------------------------------------------------------------------------------------ making a plan


class Refused(NotImplementedError):
    """A network holds what the rule cannot serve.

    Args:
      found: parameters, and what stands in the way.
      offered: the parameters to which a partition can give backprop().

    Attributes:
      refusals: what stands in the way, by parameter.
    """

    def __init__(self, found: Sequence[tuple[Sequence[str], str]], offered: Sequence[str]):
        self.refusals: dict[str, str] = {}
        for names, sentence in found:
            for name in names:
                known = self.refusals.get(name)
                self.refusals[name] = sentence if known in (None, sentence) else f"{known}; {sentence}"
        sentences = list(dict.fromkeys(sentence for _, sentence in found))
        message = sentences[0]
        if len(sentences) > 1:
            message = f"{len(sentences)} things cannot be served: "
            message += "; ".join(f"({i}) {sentence}" for i, sentence in enumerate(sentences, 1))
        if offered:
            message += f", or give {', '.join(map(repr, dict.fromkeys(offered)))} backprop() in a partition"
        super().__init__(message)


def refusals(net: Network | Callable, rule: Rule, params: Pytree, inputs: Pytree) -> dict[str, str]:
    """What stands in the way of a rule: the parameters that it cannot serve, each with the reason and the remedy.

    Args:
      net: the network.
      rule: the rule.
      params, inputs: as the network takes them; `ShapeDtypeStruct`s will do.

    Returns:
      Sentences by the name of the parameter; empty where the rule serves all.

    Example:
      >>> import re
      >>> import lrules
      >>> net = lambda p, x: (jnp.tanh(x @ p["a"])[:, :, None] * p["b"]).sum(1) @ p["c"]  # 'b' by hand
      >>> params, x = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 4)), "c": jnp.ones((4, 2))}, jnp.ones((5, 2))
      >>> rule = lrules.feedback_alignment()
      >>> refused = refusals(net, rule, params, x)
      >>> list(refused)
      ['b']
      >>> rule = lrules.partition({f"^{re.escape(name)}$": lrules.backprop() for name in refused} | {".*": rule})
      >>> refusals(net, rule, params, x)
      {}
    """
    net = as_network(net)
    require_rule(rule)
    try:
        if rule.plan is not None:
            rule.plan(net, net.graph(params, inputs), params, inputs)
    except Refused as error:
        return error.refusals
    return {}


def make_plan(
    net: Network,
    graph: Graph,
    params: Pytree,
    inputs: Pytree,
    choose: Callable[[str], LayerRule],
    *,
    partition: bool = True,
) -> Plan:
    """Settles what a rule does where, and refuses what it cannot serve.

    Args:
      net, graph, params, inputs: the network, traced on these.
      choose: the rule of a layer, by name.
      partition: whether a partition can give single layers another rule.

    Raises:
      ValueError: no layer was found, or the rules of one hidden signal disagree.
      Refused: constructs cannot be served; a NotImplementedError that names them all.
    """
    specs = {layer.site: choose(layer.name) for layer in graph.layers}
    refused = [r for r in graph.refusals if any(not isinstance(choose(graph.names[i]), Plain) for i in r.parameters)]
    found = [([graph.names[i] for i in sorted(refusal.parameters)], refusal.sentence) for refusal in refused]
    stuck = {graph.names[i] for refusal in refused if not refusal.differentiable for i in refusal.parameters}
    for layer in graph.layers:
        found += [([layer.name], sentence) for sentence in _not_served(layer, specs[layer.site], partition)]
    if found:
        raise Refused(found, [name for names, _ in found for name in names if partition and name not in stuck])
    if not graph.layers and not graph.refusals:
        raise ValueError(
            "no layer found: the network never multiplies something that depends on its inputs by a parameter "
            "(dot_general or conv_general_dilated); check that the parameters and inputs are the function's arguments "
            "and not closed over"
        )
    entries: dict[str, Entry] = {}
    for layer in graph.layers:
        spec = specs[layer.site]
        if isinstance(spec, Sequential):
            if spec.init is not None and layer.reads is not None:
                for entry in layer_entries(graph, layer, spec):
                    name = graph.names[entry.index]
                    if entries.setdefault(name, entry).spec is not spec:
                        raise ValueError(
                            f"the parameter {name!r} is used by layers under two rules with feedback, of which each "
                            f"would draw its own: give the layer {layer.name!r} the rule of the other"
                        )
    plan = Plan(graph, specs, entries, {})
    _plan_landings(plan, net, params, inputs)
    return plan


def _bare(scope: Sequence[str]) -> list[str]:
    return [s.split(" ")[0] for s in scope]


def _not_served(layer: Layer, spec: LayerRule, partition: bool) -> Iterator[str]:
    """What stands in the way of one layer's rule."""
    if isinstance(spec, Direct) and spec.lands and {"cond", "shard_map"} & set(_bare(layer.scope)):
        construct = next(c for c in _bare(layer.scope) if c in ("cond", "shard_map"))
        yield (
            f"the layer {layer.name!r} lies inside a {construct}, where direct feedback cannot land: use a sequential "
            f"rule{' for it' if partition else ''}, or take the layer out of the {construct}"
        )
    if not (isinstance(spec, Sequential) and spec.whole_batch):
        return
    if "shard_map unchecked" in layer.scope:
        yield (
            f"the layer {layer.name!r} lies inside a shard_map with check_vma=False, where it cannot be seen over "
            "which devices the batch is spread: set check_vma=True, or use another rule for it"
        )
    if layer.owned:
        yield (
            f"the parameter {layer.name!r} is itself split over the mesh axes {sorted(layer.owned)} inside a "
            "shard_map, so its neurons' norms would need a sum that depends on how: use another rule for it"
        )
    if layer.weight.chosen and layer.weight.batched:
        yield (
            f"the weight of the layer {layer.name!r} is chosen for each example, so that its neurons have no gradient "
            "of the whole batch: multiply by every choice and select among the products, or use another rule for it"
        )


def _feedback_parameters(graph: Graph, layer: Layer) -> list[int]:
    """The parameters of a layer's weight that get feedback: matrices, or vectors where there are only those."""
    indices = sorted(layer.sources)
    ranks = {i: len(graph.param_avals[i].shape) - len(layer.weight.axes.get(i, ((), ()))[1]) for i in indices}
    return [i for i in indices if ranks[i] >= 2] or indices


def layer_entries(graph: Graph, layer: Layer, spec: Sequential) -> list[Entry]:
    """What sequential feedback there is to a layer: one entry per parameter matrix of its weight."""
    return [_entry(graph, layer, i, spec) for i in _feedback_parameters(graph, layer)]


def _real(dtype) -> Any:
    """The dtype of feedback for a weight: float32 where a frozen weight is quantised to integers."""
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.dtype(jnp.float32)


def _entry(graph: Graph, layer: Layer, i: int, spec: Sequential) -> Entry:
    aval = graph.param_avals[i]
    dims, sliced = layer.weight.axes.get(i, ((), frozenset()))
    contracted = {a for d in layer.contracted if d < len(dims) for a in dims[d]}
    free = {a for d, held in enumerate(dims) if d not in layer.contracted for a in held} - contracted
    batch: Sequence[int] = ()
    if layer.operation == "dot_general":  # members of an ensemble, heads: each is a matrix of its own
        batch = layer.eqn.params["dimension_numbers"][1][layer.position]
    elif layer.operation.startswith("ragged_dot"):
        batch = layer.eqn.params["ragged_dot_dimension_numbers"].rhs_group_dimensions
    if batch:
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
        i, tuple(aval.shape), _real(aval.dtype), spec,
        tuple(sorted(contracted)), tuple(sorted(free)), tuple(sorted(sliced)), spatial,
    )  # fmt: skip


def _plan_landings(plan: Plan, net: Network, params: Pytree, inputs: Pytree) -> None:
    graph = plan.graph
    directs = list(dict.fromkeys(s for s in plan.specs.values() if isinstance(s, Direct)))
    chosen: list[tuple[Hidden, Direct]] = []
    for hidden in graph.hidden:
        if hidden.mark or hidden not in graph.live:
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
            if hidden.mark and hidden in graph.live and not landed and _matches(spec.at, hidden.name):
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
    plan.output_axes = [
        batch_axis(net, "outputs", graph.outs[i], twice.outs[i] if twice else None, batch) for i in outs
    ]
    plan.heads = _heads(graph, {spec for _, spec in chosen})
    avals = [graph.outs[i].aval for i in outs]
    for aval, axis in zip(avals, plan.output_axes, strict=True):
        if jnp.issubdtype(aval.dtype, jnp.inexact) and (axis is None or axis.before * axis.after > 1):
            raise ValueError(
                f"an output of shape {aval.shape} has no batch axis, of {batch} examples in the order of the inputs, "
                "that can be told: direct feedback needs one error per example, so return outputs [batch, ...], or "
                "return what has no batch as aux (has_aux=True); where its examples lie in the order of the inputs, as "
                "the nodes of one graph (segment_sum) do, say so, Network(apply, signal_axes={'outputs': 0})"
            )
    outputs = sum(a.size // batch for a in avals if jnp.issubdtype(a.dtype, jnp.inexact))
    total = 0
    sizes, sent = {spec: outputs for spec in directs}, {}
    for spec in directs:
        if spec.shared_axes:
            sizes[spec] = outputs // math.prod(_shared_sizes(plan, spec))
        if spec.rank is not None and spec.signal is not None:
            name = "(outputs)"
            while name in (*graph.names, *(h.name for h in graph.hidden), *plan.reduced):
                name = f"({name})"
            dtype = next(a.dtype for a in avals if jnp.issubdtype(a.dtype, jnp.inexact))
            plan.reduced[name] = (spec, (sizes[spec], spec.rank), dtype)
            total += sizes[spec] * spec.rank * jnp.dtype(dtype).itemsize
        sent[spec] = sizes[spec] if spec.rank is None else spec.rank
    axes: dict[Hidden, BatchAxis] = {}
    for hidden, spec in chosen:
        other = twice.hidden[graph.hidden.index(hidden)].reader if twice else None
        batched = hidden.reader.batched
        axis = batch_axis(net, hidden.name, hidden.reader, other, batch) if batched else Unbatched()
        if axis is None:
            remedy = "write the network so that the batch stays an axis of its own, in the order of the inputs"
            if "at" in spec.offers:
                remedy = "give that layer a sequential rule (partition), or choose with at= where feedback lands"
            raise ValueError(
                f"the batch axis of the hidden signal {hidden.name!r} of shape {hidden.reader.aval.shape} cannot "
                f"be told (batch {batch}): {remedy}, or, where its examples lie in the order of the inputs, say so, "
                f"Network(apply, signal_axes={{'^{hidden.name}$': 0}})"
            )
        axes[hidden] = axis
    for hidden, spec in chosen:
        axis = axes[hidden]
        lengths = tuple(length for length, own in hidden.loops if own)
        shared = _shared_places(plan, hidden, spec, {h: axes[h] for h, s in chosen if s is spec})
        positions = {place for kind, place in shared if kind == "axis"}
        rest = (n for i, n in enumerate(axis.rest(hidden.reader.aval.shape)) if i not in positions)
        shape = (*lengths, sent[spec], *rest)
        if any(map(is_symbolic_dim, shape)):
            raise ValueError(
                f"direct feedback to {hidden.name!r} would have the symbolic shape {shape}, where the batch alone may "
                "be symbolic: give the inputs' other axes their sizes, or share feedback along them (shared_axes=)"
            )
        dtype = _feedback_dtype(graph, hidden)
        landing = Landing(hidden, spec, axis, shape, lengths, shared, dtype, sizes[spec])
        plan.landings[hidden.name] = landing
        total += landing.nbytes
        if total > spec.max_feedback_bytes:
            raise ValueError(
                f"direct feedback of shape {shape} to {hidden.name!r} brings the total to {total:,} bytes, above "
                f"max_feedback_bytes={spec.max_feedback_bytes:,}: "
                + ", or ".join(["raise max_feedback_bytes", *(SMALLER[option] for option in spec.offers)])
            )


def _heads(graph: Graph, specs: set[Direct]) -> dict[str, Head]:
    """Where the output error is taken below the outputs, by the name under which a run records what is there."""
    where = {spec.error_at for spec in specs if spec.lands}
    if len(where) > 1:
        raise ValueError('the direct rules of a partition take the output error at one place: give all one error_at=')
    if where != {"layer"} or any(spec.channel for spec in specs):
        return {}
    return {f"{head.layer} below output {i}": head for i, head in heads(graph).items()}


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


def _fitting(hidden: Hidden, axis: BatchAxis, size: int) -> dict[tuple[str, int], int | str]:
    """What of a hidden signal has the size of a shared axis, and how a pair names it."""
    shape = hidden.reader.aval.shape
    axes = [*range(axis.axis), *([axis.axis] * len(axis.merged))]
    axes += range(axis.axis + 1, len(shape))  # the axis that each dimension without the batch comes from
    found: dict[tuple[str, int], int | str] = {
        ("loop", i): f"loop {i}" for i, (n, own) in enumerate(hidden.loops) if n == size and not own
    }
    return found | {("axis", i): axes[i] for i, n in enumerate(axis.rest(shape)) if n == size}


def _shared_places(
    plan: Plan, hidden: Hidden, spec: Direct, landings: dict[Hidden, BatchAxis]
) -> tuple[tuple[str, int], ...]:
    """Where the shared axes of the outputs lie in a hidden signal; `landings` are all signals of its rule."""
    if not spec.shared_axes:
        return ()
    places: list[tuple[str, int]] = []
    sizes = dict(zip((out for out, _ in spec.shared_axes), _shared_sizes(plan, spec), strict=True))
    merged = landings[hidden].axis
    for out, given in spec.shared_axes:
        fits = {p: name for p, name in _fitting(hidden, landings[hidden], sizes[out]).items() if p not in places}
        if given:
            wanted = next((name for name in given if name in fits.values()), None)
            likely = [place for place, name in fits.items() if name == wanted]
            rivals = likely
        else:
            likely = [p for p, name in fits.items() if p[0] == "loop" or name in (out, merged)]
            others = {o for o, within in spec.shared_axes if not within and o != out and sizes[o] == sizes[out]}
            rivals = [
                p for p, name in fits.items() if name not in others or name == merged
            ]  # those have their own axes
        if not likely or (len(rivals) > 1 and sizes[out] > 1):
            shape = hidden.reader.aval.shape
            says = [f"shared_axes={_settled(spec, sizes, landings, hidden, out, fits[p])}" for p in rivals or fits]
            remedy = " or ".join(dict.fromkeys(says)) if len(set(fits.values())) == len(fits) else ""
            if not likely:
                raise ValueError(
                    f"the hidden signal {hidden.name!r} of shape {shape} has no axis that corresponds to axis {out} of "
                    f"the outputs, of size {sizes[out]}: "
                    + (f"if another place does, name it, {remedy}, else " if remedy else "")
                    + "leave that signal out (at=)"
                )
            where = " and ".join(name if isinstance(name, str) else f"axis {name}" for name in map(fits.get, rivals))
            raise ValueError(
                f"axis {out} of the outputs has size {sizes[out]}, as have {where} of the hidden signal "
                f"{hidden.name!r} of shape {shape}: "
                + (f"say which it is, {remedy}" if remedy else "leave that signal out (at=), or take its axes apart")
            )
        places.append(likely[0])
    return tuple(places)


def _settled(
    spec: Direct, sizes: dict[int, int], landings: dict[Hidden, BatchAxis], hidden: Hidden, out: int, name: int | str
) -> list[tuple[int, int | str]]:
    """`shared_axes=` as pairs in which `name` is where axis `out` of the outputs lies in a hidden signal."""
    pairs = {o: list(given) for o, given in spec.shared_axes}
    pairs[out].append(name)
    for signal in (hidden, *landings):  # what is left open is said too, so that following this settles the others
        for o, size in sizes.items():
            fits = list(_fitting(signal, landings[signal], size).values())
            taken = {n for other, names in pairs.items() if other != o for n in names}
            if not set(pairs[o]) & set(fits) and (free := [n for n in fits if n not in taken]):
                pairs[o].append(o if o in free else free[0])
    return [(o, n) for o, names in pairs.items() for n in names]


def _feedback_dtype(graph: Graph, hidden: Hidden):
    if hidden.readers:
        return _real(graph.param_avals[min(hidden.readers[0].sources)].dtype)
    return hidden.reader.aval.dtype


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) if names else "none"
