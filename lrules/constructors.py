"""The two constructors from which most rules are made, `sequential` and `direct`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax

from lrules.apply import grad_of_transform
from lrules.engine.graph import Graph
from lrules.engine.plan import Plan
from lrules.engine.planning import make_plan
from lrules.engine.running import run_plan
from lrules.network import Network, NetworkLike, as_network
from lrules.options import is_whole, require_flags, require_pattern
from lrules.rule import Direct, Feedback, LayerRule, Rule, RuleDescription, Sequential, check_params
from lrules.typing import Initializer, Loss, Pytree


def layerwise(
    choose_for: Callable[[Graph], Callable[[str], LayerRule]], *, layer: LayerRule | None, **flags: Any
) -> Rule:
    """A rule that is said layer by layer.

    Args:
      choose_for: from a traced network to the rule of each layer, by name.
      layer: that rule where it is the same for all.
      **flags: `additive` and the like, see `Rule`.
    """
    needs_targets = flags.pop("targets", False)

    def plan(net: Network, graph: Graph, params: Pytree, inputs: Pytree) -> Plan:
        return make_plan(net, graph, params, inputs, choose_for(graph))

    def init(key: jax.Array, net: NetworkLike, params: Pytree, inputs: Pytree) -> Feedback:
        net = as_network(net)
        check_params(params)
        return plan(net, net.graph(params, inputs), params, inputs).init(key, net.parameters(params))

    def run(
        net: Network,
        params: Pytree,
        feedback: Feedback,
        inputs: Pytree,
        targets: Pytree,
        rng: jax.Array | None,
        loss: Loss | None = None,
    ) -> Any:
        graph = net.graph(params, inputs)
        made = plan(net, graph, params, inputs)
        if loss is not None:
            outputs = jax.tree.unflatten(graph.out_tree, [value.aval for value in graph.outs[: graph.n_outputs]])
            elements = jax.eval_shape(loss, outputs, targets).size
            made = dataclasses.replace(made, elements=elements)
        return run_plan(made, net, params, feedback, inputs, targets=targets, rng=rng)

    def transform(net: Network, *, reduction: str = "mean") -> Callable[..., Any]:
        if needs_targets:
            raise ValueError(
                "this rule needs the targets: use lrules.value_and_grad(net, loss, rule) in place of transform"
            )

        def f(params: Pytree, feedback: Feedback, inputs: Pytree, *, rng: jax.Array | None = None) -> Any:
            return run(net, params, feedback, inputs, None, rng)

        return f

    def value_and_grad(net: Network, loss: Loss) -> Callable[..., Any]:
        def f(
            params: Pytree, feedback: Feedback, inputs: Pytree, *, rng: jax.Array | None = None, targets: Pytree = None
        ) -> Any:
            return run(net, params, feedback, inputs, targets, rng, loss)

        return grad_of_transform(f, net, loss, pass_targets=True)

    description = RuleDescription(plan, layer)
    return Rule(init, transform, value_and_grad if needs_targets else None, description=description, **flags)


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
    require_flags(learned=learned, redrawn=redrawn, whole_batch=whole_batch)
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
    shared_axes: int | Sequence[int | tuple[int, int | str]] = (),
    rank: int | None = None,
    pullback: Callable[..., Callable[..., Any]] | None = None,
    targets: bool = False,
    error_at: Literal["layer", "outputs"] = "layer",
    max_feedback_bytes: float = 2**30,
    offers: Sequence[str] = ("at", "shared_axes", "rank"),
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
        time in `[batch, time, classes]`; places in the hidden signals are found, or said in pairs, as in
        `direct_feedback_alignment`. `e`, `b` and the hidden signals then come without these axes.
      rank: bring the error to so many numbers by one random matrix `[outputs, rank]` before it is sent, as in
        `direct_feedback_alignment`; `e` is then `[batch, rank]`.
      pullback: in place of `signal`, see `Direct`.
      targets: whether `signal` needs the targets (then only `value_and_grad` serves it; else it gets None). If it has
        an argument `elements`, it also gets how many losses the objective is the mean of: the batch, or more where the
        loss is `[batch, ...]`.
      error_at: where the output error is taken. `"layer"`: where the outputs are a function without parameters of a
        layer's outputs (softmax, log_softmax, sigmoid), at the layer's outputs. `"outputs"`: at the outputs themselves.
      max_feedback_bytes: refuse to make more feedback than this.
      offers: which of the options `at`, `shared_axes` and `rank` your own rule passes on: refusals advise no others.

    Returns:
      The rule.

    Raises:
      ValueError: `at`, `shared_axes`, `rank` or `max_feedback_bytes` is not of the kind described.
      TypeError: `init` is no function that returns an array.
    """
    require_flags(redrawn=redrawn, targets=targets)
    several = isinstance(at, Iterable) and not isinstance(at, str)
    where: tuple[Any, ...] | None = None if at is None else tuple(at) if several else (at,)
    if where == ():
        raise ValueError("at= names no place for feedback to land: name some, or leave it out for every hidden signal")
    for pattern in where or ():
        require_pattern(pattern, "at=")
    if rank is not None and not (is_whole(rank) and rank >= 1):
        raise ValueError(f"rank must be an integer >= 1 or None, got {rank!r}")
    if rank is not None and init is None:
        raise ValueError(f"rank={rank} makes feedback weights of two factors, which init= draws: give both or neither")
    if redrawn and learn is not None:
        raise ValueError("feedback that is redrawn at every step cannot be learned: leave out redrawn= or learn=")
    pairs = _pairs(shared_axes)
    spec = Direct(
        signal, init, learn, redrawn, where, pairs, rank, pullback, targets, error_at, max_feedback_bytes, tuple(offers)
    )
    return layerwise(lambda graph: lambda name: spec, layer=spec, targets=targets, stochastic=redrawn)


def _pairs(shared_axes: Any) -> tuple[tuple[int, tuple[int | str, ...]], ...]:
    """`shared_axes=` as axes of the outputs, each with the places of the hidden signals that are given for it."""
    several = isinstance(shared_axes, Iterable) and not isinstance(shared_axes, str)
    pairs = [(a, None) if is_whole(a) else a for a in (tuple(shared_axes) if several else (shared_axes,))]
    places: dict[int, tuple[int | str, ...]] = {}
    for pair in pairs:
        given = pair if isinstance(pair, list | tuple) and len(pair) == 2 else (pair, "")
        loop = isinstance(given[1], str) and re.fullmatch(r"loop \d+", given[1])
        if not (is_whole(given[0]) and (loop or is_whole(given[1]) or given[1] is None)):
            raise ValueError(
                f"shared_axes must be an axis of the outputs, several, or pairs [(axis of the outputs, axis of the "
                f'hidden signals or "loop 0")], got {shared_axes!r}'
            )
        out, within = given
        if out in places and (within is None or not places[out]):
            raise ValueError(
                f"shared_axes names the axis {out} of the outputs twice, got {shared_axes!r}: name each once, or give "
                "pairs in a list, [(axis of the outputs, axis of the hidden signals)]"
            )
        places[out] = (*places.get(out, ()), *(() if within is None else (within,)))
    return tuple(places.items())
