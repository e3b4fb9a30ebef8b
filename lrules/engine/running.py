"""Running a network under a plan: the same outputs, differentiated as the rule says.

Sequential rules are a `custom_vjp` around each layer, direct ones one `custom_vjp` around the whole network.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from lrules.engine.batch import Unbatched, moved
from lrules.engine.handlers import Frame, Handler, Operation
from lrules.engine.head import finish
from lrules.engine.jaxprs import bind, placed_as, split_as, varying_axes
from lrules.engine.operations import of
from lrules.engine.plan import Plan
from lrules.engine.records import Hidden, Layer
from lrules.engine.weights import DirectFeedback
from lrules.network import Network
from lrules.rule import Direct, Feedback, Sequential
from lrules.typing import Pytree


class _Layers(Handler):
    """The rule's own handler at layers, where they have a sequential rule."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def layer(self, layer: Layer, op: Operation, w: jax.Array, b: Any, x: jax.Array, frame: Frame) -> Any:
        spec = self.plan.specs[layer.site]
        if not isinstance(spec, Sequential) or (layer.mixed and layer.weight.batched and spec.whole_batch):
            return op(w, x)
        return _sequential_layer(spec, layer, op.product)(w, b if spec.init is not None else None, x)


class _Landings(Handler):
    """The rule's own handler at hidden signals, where direct feedback lands."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def hidden(self, hidden: Hidden, value: Any, frame: Frame) -> Any:
        landing = self.plan.direct_feedback.get(hidden.name)
        if landing is None or landing.hidden is not hidden:
            return value
        if landing.spec.lands:
            frame.records[hidden.name] = value
        return jax.lax.stop_gradient(value)


def _sequential_layer(spec: Sequential, layer: Layer, op: Callable[..., Any]) -> Callable[..., Any]:
    @jax.custom_vjp
    def multiply(w: jax.Array, b: Any, x: jax.Array) -> Any:
        return op(w, x)

    def forward(w: jax.Array, b: Any, x: jax.Array) -> tuple[Any, Any]:
        return op(w, x), (w, b, x)

    def backward(residuals: Any, d: jax.Array) -> tuple[Any, Any, Any]:
        w, b, x = residuals
        dw, dx, db = spec.backward(op, w, b, x, d, layer)
        return dw, db, None if dx is None else jax.tree.map(_if_floating, x, dx)

    multiply.defvjp(forward, backward)
    return multiply


def _if_floating(x: jax.Array, dx: Any) -> Any:
    return dx if jnp.issubdtype(x.dtype, jnp.inexact) else None


def run_plan(
    plan: Plan,
    net: Network,
    params: Pytree,
    feedback: Feedback,
    inputs: Pytree,
    *,
    targets: Pytree = None,
    rng: jax.Array | None = None,
) -> Any:
    """Runs the network under a plan; what comes out differentiates as the rule says."""
    outputs, aux = run_to_heads(plan, net, params, feedback, inputs, targets=targets, rng=rng)
    outputs = from_heads(plan, net, outputs, params, inputs)
    return (outputs, aux) if net.has_aux else outputs


def run_to_heads(
    plan: Plan,
    net: Network,
    params: Pytree,
    feedback: Feedback,
    inputs: Pytree,
    *,
    targets: Pytree = None,
    rng: jax.Array | None = None,
) -> Any:
    """The same up to where the output error is taken: `(outputs, aux)`, see `head.py`."""
    plan.check(feedback)
    weights, leaves = {**feedback.fixed, **feedback.learned}, net.parameters(params)
    if rng is not None:
        weights |= plan.init(rng, leaves, redrawn=True).fixed
    args = (leaves, weights, jax.tree.leaves(inputs), plan.graph.consts, net.handlers, targets)
    if any(landing.spec.lands for landing in plan.direct_feedback.values()):
        return _direct_run(plan)(*args)
    return evaluate(plan, *args[:5], Frame())


def from_heads(plan: Plan, net: Network, outputs: Pytree, params: Pytree, inputs: Pytree) -> Pytree:
    """The network's outputs, from what `run_to_heads` gives in their place."""
    if not plan.heads:
        return outputs
    leaves, tree = jax.tree.flatten(outputs)
    given = {id(head.value): leaves[head.output] for head in plan.heads.values()}
    outs = finish(plan.graph, given, jax.lax.stop_gradient(net.parameters(params)), jax.tree.leaves(inputs))
    below = {head.output for head in plan.heads.values()}
    return jax.tree.unflatten(tree, [outs[i] if i in below else leaf for i, leaf in enumerate(leaves)])


def evaluate(
    plan: Plan,
    params: Sequence[Any],
    feedback: Mapping[str, Any],
    inputs: Sequence[Any],
    consts: Sequence[Any],
    handlers: Sequence[Handler],
    frame: Frame,
) -> tuple[Any, Any]:
    shadow: list[Any] | None = None
    if plan.shadows:
        shadow = []
        for name, p, value in zip(plan.graph.names, params, plan.graph.parameters, strict=True):
            if name in plan.sequential_feedback:
                shadow.append(placed_as(feedback[name], jax.typeof(p)))
            else:
                shadow.append(jax.lax.stop_gradient(p) if value.wanted else None)
    own: list[Handler] = [_Layers(plan)] if any(isinstance(s, Sequential) for s in plan.specs.values()) else []
    own += [_Landings(plan)] if plan.direct_feedback else []
    options: dict[str, Any] = {"consts": consts, "feedback": shadow, "frame": frame, "marks": plan.marks}
    taps = {name: head.value for name, head in plan.heads.items()}
    outputs, aux = plan.graph.run(params, inputs, handlers=(*own, *handlers), taps=taps, **options)
    leaves, tree = jax.tree.flatten(outputs)
    for name, head in plan.heads.items():
        leaves[head.output] = frame.records.pop(name)
    return jax.tree.unflatten(tree, leaves), aux


def _direct_run(plan: Plan) -> Callable[..., Any]:
    """The whole network as one function whose backward pass brings the output error to every landing at once."""

    @jax.custom_vjp
    def run(
        params: Sequence[Any],
        feedback: Mapping[str, Any],
        inputs: Sequence[Any],
        consts: Sequence[Any],
        handlers: Sequence[Handler],
        targets: Pytree,
    ) -> tuple[Any, Any]:
        return evaluate(plan, params, feedback, inputs, consts, handlers, Frame())

    def forward(*args: Any) -> tuple[Any, Any]:
        # Only what is differentiated is: data may come from what has no reverse mode, such as a while loop.
        wanted = any(leaf.perturbed for leaf in jax.tree.leaves(args[2:5]))
        params, feedback, inputs, consts, handlers, targets = jax.tree.map(lambda leaf: leaf.value, args)

        def network(
            params: Sequence[Any],
            feedback: Mapping[str, Any],
            inputs: Sequence[Any] = inputs,
            consts: Sequence[Any] = consts,
            handlers: Sequence[Handler] = handlers,
        ) -> tuple[Any, Any]:
            frame = Frame()
            outputs, aux = evaluate(plan, params, feedback, inputs, consts, handlers, frame)
            return (outputs, frame.taken()), aux

        differentiated = (params, feedback, inputs, consts, handlers) if wanted else (params, feedback)
        (outputs, records), pull, aux = jax.vjp(network, *differentiated, has_aux=True)
        learns = any(landing.spec.learn is not None for landing in plan.direct_feedback.values())
        landings = plan.direct_feedback.values()
        pullbacks = dict.fromkeys(landing.spec.pullback for landing in landings if landing.spec.pullback)
        pulls = [pullback(plan, params, inputs, consts, records) for pullback in pullbacks]
        return (outputs, aux), (pull, pulls, feedback, targets, records if learns else None)

    def backward(residuals: Any, cotangent: Any) -> tuple[Any, ...]:
        pull, pulls, feedback, targets, records = residuals
        errors = jax.tree.map(_instantiate, cotangent[0], is_leaf=_is_zero)
        sent: dict[Direct, Any] = {}
        more = {spec: _more(plan, spec) for spec in {landing.spec for landing in plan.direct_feedback.values()}}
        signals: dict[str, Any] = {}
        feedback_grads: dict[str, Any] = {}
        for pull_signals in pulls:
            signals |= pull_signals(errors)
        for name, landing in plan.direct_feedback.items():
            spec, b = landing.spec, feedback.get(name)
            if spec.signal is None:
                continue
            if spec not in sent:
                sent[spec] = sent_error(plan, spec, output_error(plan, errors), feedback)
            signals[name] = _land(landing, sent[spec], b, targets, more[spec])
            if spec.learn is not None:
                feedback_grads[name] = direct_feedback_gradient(landing, sent[spec], records[name], b)
        grads = list(pull((errors, signals)))
        grads[1] = {**grads[1], **{name: _over_devices(g, feedback[name]) for name, g in feedback_grads.items()}}
        return (*grads, *[None] * (6 - len(grads)))

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


def _more(plan: Plan, spec: Direct) -> dict[str, Any]:
    """What a signal gets besides: how many losses the objective is the mean of, if it has an argument for it."""
    named = spec.signal is not None and "elements" in inspect.signature(spec.signal).parameters
    return {"elements": plan.elements} if named else {}


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


def _instantiate(x: Any) -> Any:
    return np.zeros(x.shape, x.dtype) if _is_zero(x) else x


def _over_devices(grad: Any, b: Any) -> Any:
    """Sums a feedback gradient over the devices that share the feedback weight, as the transpose of using it would."""
    axes = tuple(sorted(varying_axes(jax.typeof(grad)) - varying_axes(jax.typeof(b))))
    return jax.lax.psum(grad, axes) if axes else grad


def _spec(x: jax.Array) -> Any:
    """Which axes of an array are split over which explicit axes of a mesh."""
    return jax.typeof(x).sharding.spec


def output_error(plan: Plan, errors: Pytree) -> jax.Array:
    """The cotangent of the outputs, flattened per example: `[batch, outputs]`."""
    flat, leaves = [], jax.tree.leaves(errors)
    for head in plan.heads.values():
        leaves[head.output] = head.arranged(leaves[head.output])
    for error, axis in zip(leaves, plan.output_axes, strict=True):
        if axis is not None and jnp.issubdtype(error.dtype, jnp.inexact):
            error = split_as(error, *[None] * axis.axis, _spec(error)[axis.axis])  # whole but for the batch
            flat.append(jnp.moveaxis(error, axis.axis, 0).reshape(plan.batch, -1))
    dtype = jnp.result_type(*[x.dtype for x in flat]) if len({x.dtype for x in flat}) == 1 else jnp.float32
    return jnp.concatenate([x.astype(dtype) for x in flat], axis=1) if len(flat) > 1 else flat[0]


def sent_error(plan: Plan, spec: Direct, e: jax.Array, feedback: Mapping[str, Any]) -> jax.Array:
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


def _land(landing: DirectFeedback, e: jax.Array, b: Any, targets: Pytree, more: Mapping[str, Any]) -> Any:
    """The cotangent of one hidden signal at its definition, with the axes of the scans around it in front."""
    hidden, shared, axis = landing.hidden, landing.shared, landing.axis
    assert axis is not None and landing.spec.signal is not None
    turns = [i for i, (kind, _) in enumerate(shared) if kind == "loop"]
    places = {i: place for i, (kind, place) in enumerate(shared) if kind == "axis"}
    e = split_as(e, *[None] * len(shared), landing.batch_split)
    b = None if b is None else split_as(b, *landing.split)

    def signal(e: jax.Array, b: Any) -> Any:  # [*shared, batch, *hidden without shared axes]
        return landing.spec.signal(e, b, targets, hidden.name, **more)  # type: ignore[misc]

    for _ in shared:
        signal = jax.vmap(signal, in_axes=(0, None))

    def define(s: Any) -> jax.Array:
        if axis.merged or not all(of(eqn).same_shape for eqn in hidden.views):
            s = split_as(s, landing.batch_split)  # reshapes take few axes that are split
        return hidden.to_definition(axis.restore(s, hidden.reader.aval.shape))

    for _ in turns:
        define = jax.vmap(define)

    def arrive(b: Any) -> jax.Array:
        s = moved(signal(e, b), turns, range(len(turns)))
        front = [len(turns) + k for k in range(len(places))]
        return define(moved(s, front, [len(turns) + 1 + place for place in places.values()]))

    for _ in landing.lengths:
        arrive = jax.vmap(arrive)
    out = arrive(b)
    if not hidden.loops:
        return placed_as(out, hidden.root.aval)
    order = [i for i, (_, own) in enumerate(hidden.loops) if own] + [shared[i][1] for i in turns]
    out = moved(out, range(len(order)), [sorted(order).index(i) for i in order])
    lead = [length if i in order else 1 for i, (length, _) in enumerate(hidden.loops)]
    out = out.reshape(*lead, *out.shape[len(order) :])
    out = jnp.broadcast_to(out, (*(length for length, _ in hidden.loops), *out.shape[len(lead) :]))
    return placed_as(out, hidden.root.aval, len(hidden.loops))


def direct_feedback_gradient(landing: DirectFeedback, e: jax.Array, record: jax.Array, b: Any) -> Any:
    """The gradient of one direct feedback weight, summed over the scans and positions that share it."""
    hidden, shared, axis = landing.hidden, landing.shared, landing.axis
    assert axis is not None and landing.spec.learn is not None
    n = len(hidden.loops)
    given, b = b, split_as(b, *landing.split)
    e = split_as(e, *[None] * len(shared), landing.batch_split)

    def seen(value: Any) -> jax.Array:  # as the reader sees it, the batch in front
        for eqn in hidden.views:
            (value,) = bind(eqn, [value])
        spec, at = landing.lies, axis.axis
        if not isinstance(axis, Unbatched):
            value = split_as(value, *spec[:at], landing.batch_split, *spec[at + 1 :])
        return axis.in_front(value, hidden.reader.aval.shape, e.shape[len(shared)])

    for _ in range(n):
        seen = jax.vmap(seen)
    where = [place if kind == "loop" else n + 1 + place for kind, place in shared]
    own = [i for i, (_, own) in enumerate(hidden.loops) if own]
    others = [i for i in range(n) if i not in own and i not in where]
    h = seen(record).astype(b.dtype)
    h = jnp.moveaxis(h, [*own, *others, *where], range(len(own) + len(others) + len(where)))

    def summed(learn: Callable[..., Any], in_axes: Any) -> Callable[..., Any]:
        return lambda *args: jax.vmap(learn, in_axes)(*args).sum(0)

    learn = landing.spec.learn
    for _ in shared:
        learn = summed(learn, (0, 0, None))
    for _ in others:
        learn = summed(learn, (None, 0, None))
    for _ in own:
        learn = jax.vmap(learn, (None, 0, 0))
    return split_as(learn(e, h, b), *_spec(given))
