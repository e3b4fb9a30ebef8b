"""Where direct feedback lands, and the shapes of its weights there."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.export import is_symbolic_dim

from lrules.engine.batch import BatchAxis, Unbatched, batch_axis, doubled
from lrules.engine.dtypes import feedback_dtype
from lrules.engine.graph import Graph
from lrules.engine.head import Head, heads
from lrules.engine.plan import Plan
from lrules.engine.records import Hidden
from lrules.engine.weights import KEY_BYTES, DirectFeedback
from lrules.network import Network
from lrules.rule import Direct
from lrules.typing import Pytree

SMALLER = {  # how to make direct feedback smaller, by option
    "at": "let it land at fewer places (at=)",
    "shared_axes": "share it along axes of the outputs (shared_axes=)",
    "rank": "make it of two factors (rank=)",
    "storage": 'draw it again at each step (storage="recomputed")',
}


def bare(scope: Sequence[str]) -> list[str]:
    return [s.split(" ")[0] for s in scope]


def add_direct_feedback(plan: Plan, net: Network, params: Pytree, inputs: Pytree) -> None:
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
                f"the layers {readers} read the same hidden signal, {hidden.name!r}, and their rules disagree on the "
                "error that arrives there: give them the same direct rule, or sequential rules"
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
            landed = any(other.root is hidden.root for other, _ in chosen)  # a tensor has one feedback
            if hidden.mark and hidden in graph.live and not landed and _matches(spec.at, hidden.name):
                if len(directs) > 1:
                    raise ValueError(
                        f"the mark {hidden.name!r} does not belong to a layer, so a partition of several direct rules "
                        "cannot choose the feedback for it: use one direct rule, or name hidden signals in at="
                    )
                if {"cond", "shard_map"} & set(bare(hidden.root.place[0].scope)):  # type: ignore[index]
                    raise NotImplementedError(
                        f"the tensor with the mark {hidden.name!r} lies inside a cond or shard_map, where direct "
                        "feedback cannot land: mark one outside"
                    )
                chosen.append((hidden, spec))
    names = [hidden.name for hidden, _ in chosen]
    for name in names if len(set(names)) < len(names) else ():
        if names.count(name) > 1:
            raise ValueError(f"a mark and a layer have the same name {name!r}: give the mark another name")
    if all(spec.signal is None for _, spec in chosen):
        plan.direct_feedback = {hidden.name: DirectFeedback(hidden, spec) for hidden, spec in chosen}
        return
    plan.batch = batch = net.batch_size(inputs)
    twice = doubled(net, params, inputs, graph)
    outs = range(graph.n_outputs)
    plan.output_axes = [
        batch_axis(net, "outputs", graph.outs[i], twice(graph.outs[i]) if twice else None, batch) for i in outs
    ]
    plan.heads = _heads(graph, {spec for _, spec in chosen})
    avals = [graph.outs[i].aval for i in outs]
    for aval, axis in zip(avals, plan.output_axes, strict=True):
        if jnp.issubdtype(aval.dtype, jnp.inexact) and (axis is None or axis.before * axis.after > 1):
            raise ValueError(
                f"the batch axis of an output of shape {aval.shape} cannot be found, for {batch} examples in the order "
                "of the inputs: direct feedback needs one error per example, so return outputs [batch, ...], or return "
                "values without a batch as aux (has_aux=True); if the examples are in the order of the inputs, as the "
                "nodes of one graph (segment_sum) are, give Network(apply, signal_axes={'outputs': 0})"
            )
    outputs = sum(a.size // batch for a in avals if jnp.issubdtype(a.dtype, jnp.inexact))
    made: dict[Direct, list[tuple[int, str, tuple[int, ...]]]] = {spec: [] for spec in directs}  # bytes, name, shape
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
            taken = KEY_BYTES if spec.storage == "recomputed" else sizes[spec] * spec.rank * jnp.dtype(dtype).itemsize
            made[spec].append((taken, name, plan.reduced[name][1]))
        sent[spec] = sizes[spec] if spec.rank is None else spec.rank
    axes: dict[Hidden, BatchAxis] = {}
    for hidden, spec in chosen:
        other = twice(hidden.reader) if twice else None
        batched = hidden.reader.batched
        axis = batch_axis(net, hidden.name, hidden.reader, other, batch) if batched else Unbatched()
        if axis is None:
            remedy = "write the network so that the batch is a separate axis, in the order of the inputs"
            if "at" in spec.offers:
                remedy = "give that layer a sequential rule (partition), or choose with at= where feedback lands"
            raise ValueError(
                f"the batch axis of the hidden signal {hidden.name!r} of shape {hidden.reader.aval.shape} cannot "
                f"be found (batch {batch}): {remedy}; or, if its examples are in the order of the inputs, give "
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
                f"direct feedback to {hidden.name!r} would have the symbolic shape {shape}, and only the batch may be "
                "symbolic: give the other axes of the inputs their sizes, or share feedback along them (shared_axes=)"
            )
        dtype = _feedback_dtype(graph, hidden)
        landing = DirectFeedback(hidden, spec, axis, shape, lengths, shared, dtype, sizes[spec])
        plan.direct_feedback[hidden.name] = landing
        made[spec].append((landing.nbytes, hidden.name, shape))
    for spec, weights in made.items():
        total = sum(taken for taken, _, _ in weights)
        if total > spec.max_feedback_bytes:
            _, name, shape = max(weights, key=lambda weight: weight[0])
            places = sum(landing.spec is spec for landing in plan.direct_feedback.values())
            raise ValueError(
                f"direct feedback would take {total:,} bytes, above max_feedback_bytes={spec.max_feedback_bytes:,} "
                f"(the largest is {name!r}, of shape {shape}): "
                + ", or ".join(["raise max_feedback_bytes", *_smaller(plan, spec, places)])
            )


def _smaller(plan: Plan, spec: Direct, places: int) -> list[str]:
    """What the user of a rule that lands at so many places can do to make its feedback smaller."""
    ways = SMALLER if spec.rank is None else SMALLER | {"rank": "give a smaller rank (rank=)"}
    useless = {"at"} if places == 1 else set()
    if spec.storage == "recomputed":  # a key for each hidden signal, whatever the shapes are
        useless |= {"shared_axes", "rank", "storage"}
    if spec.learn is not None:
        useless |= {"storage"}
    if plan.graph.n_outputs != 1 or len(plan.graph.outs[0].aval.shape) - len(spec.shared_axes) <= 2:
        useless |= {"shared_axes"}  # the outputs have no axis but the batch and the classes, or it is shared
    if spec.rank == 1:
        useless |= {"rank"}
    return [ways[option] for option in spec.offers if option not in useless]


def _heads(graph: Graph, specs: set[Direct]) -> dict[str, Head]:
    """The places below the outputs where the output error is taken, by the name under which a run records them."""
    where = {spec.error_at for spec in specs if spec.lands}
    if len(where) > 1:
        raise ValueError("direct rules of a partition need one place for the output error: give all the same error_at")
    if where != {"layer"} or any(spec.pullback for spec in specs):
        return {}
    return {f"{head.layer} below output {i}": head for i, head in heads(graph).items()}


def _shared_sizes(plan: Plan, spec: Direct) -> list[int]:
    """The sizes of the shared axes of the outputs."""
    aval, axis = plan.graph.outs[0].aval, plan.output_axes[0]
    if plan.graph.n_outputs != 1 or axis is None:
        raise ValueError("shared_axes needs outputs that are one array, and this network returns several, or none")
    for out, _ in spec.shared_axes:
        if not 0 <= out < len(aval.shape) or out == axis.axis:
            raise ValueError(
                f"shared_axes must be an axis of the outputs {aval.shape} other than the batch, got {out}: count from "
                "0, with the batch, as in shared_axes=1 for the time of [batch, time, classes]"
            )
    return [aval.shape[out] for out, _ in spec.shared_axes]


def _fitting(hidden: Hidden, axis: BatchAxis, size: int) -> dict[tuple[str, int], int | str]:
    """The places in a hidden signal with the size of a shared axis, and the names of these places in a pair."""
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
    """The places of the shared axes of the outputs in a hidden signal; `landings` are all signals of its rule."""
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
                    + (f"if another place corresponds, name it, {remedy}, else " if remedy else "")
                    + "leave that signal out (at=)"
                )
            where = " and ".join(name if isinstance(name, str) else f"axis {name}" for name in map(fits.get, rivals))
            raise ValueError(
                f"axis {out} of the outputs has size {sizes[out]}, and so have {where} of the hidden signal "
                f"{hidden.name!r} of shape {shape}: "
                + (f"say which it is, {remedy}" if remedy else "leave that signal out (at=), or split its axes")
            )
        places.append(likely[0])
    return tuple(places)


def _settled(
    spec: Direct, sizes: dict[int, int], landings: dict[Hidden, BatchAxis], hidden: Hidden, out: int, name: int | str
) -> list[tuple[int, int | str]]:
    """`shared_axes=` as pairs, where `name` is the place of axis `out` of the outputs in a hidden signal."""
    pairs = {o: list(given) for o, given in spec.shared_axes}
    pairs[out].append(name)
    for signal in (hidden, *landings):  # the open pairs are given too, so that one remedy settles all
        for o, size in sizes.items():
            fits = list(_fitting(signal, landings[signal], size).values())
            taken = {n for other, names in pairs.items() if other != o for n in names}
            if not set(pairs[o]) & set(fits) and (free := [n for n in fits if n not in taken]):
                pairs[o].append(o if o in free else free[0])
    return [(o, n) for o, names in pairs.items() for n in names]


def _feedback_dtype(graph: Graph, hidden: Hidden) -> Any:
    if hidden.readers:
        return feedback_dtype(graph.param_avals[min(hidden.readers[0].sources)].dtype)
    return hidden.reader.aval.dtype


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) if names else "none"
