"""Running a network under a plan: the same outputs, differentiated as the rule says.

Sequential rules are a `custom_vjp` around each layer, direct ones one `custom_vjp` around the whole network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from lrules.engine.calls import Calls, arriving, at_calls, called, learned_by
from lrules.engine.handlers import Frame, Handler
from lrules.engine.head import finish
from lrules.engine.jaxprs import placed_as, split_as, varying_axes
from lrules.engine.plan import Plan
from lrules.engine.records import Hidden, Layer
from lrules.engine.weights import DirectFeedback
from lrules.network import Network
from lrules.rule import Direct, Feedback, Sequential
from lrules.typing import Pytree


class _RuleHandler(Handler):
    """The rule's own handler: the layers of sequential rules, and the landings of direct ones."""

    arrays = ("operands",)

    def __init__(self, plan: Plan, calls: Calls | None = None, operands: Any = None):
        self.plan, self.calls, self.operands = plan, calls, operands

    def layer(self, layer: Layer, op, w, b, x, frame: Frame):
        spec = self.plan.specs[layer.site]
        if not isinstance(spec, Sequential) or (layer.mixed and layer.weight.batched and spec.whole_batch):
            return op(w, x)
        b, product = (b if spec.init is not None else None), op.product  # no handler is further inside
        if spec.plain:
            return _sequential_layer(spec, layer, product)(w, b, x)
        assert self.calls is not None
        return self.calls.layer(self.operands, spec, layer, product, w, b, x, frame)

    def hidden(self, hidden: Hidden, value, frame: Frame):
        landing = self.plan.direct_feedback.get(hidden.name)
        if landing is None or landing.hidden is not hidden:
            return value
        if landing.spec.lands:
            frame.records[hidden.name] = value
        return jax.lax.stop_gradient(value)


def _sequential_layer(spec: Sequential, layer: Layer, op) -> Callable:
    fn, learned = spec.bound("backward", layer.name) if spec.numbers else spec.backward, spec.learned

    @jax.custom_vjp
    def multiply(w, b, x):
        return op(w, x)

    def forward(w, b, x):
        return op(w, x), (w, b, x)

    def backward(residuals, d):
        w, b, x = residuals
        dw, dx, db, _ = called(learned, fn, op, w, b, x, d, layer)
        return dw, db, dx

    multiply.defvjp(forward, backward)
    return multiply


def run_plan(
    plan: Plan, net: Network, params: Pytree, feedback: Feedback, inputs: Pytree, *, rng=None, calls=None, states=None
) -> Any:
    """Runs the network under a plan; what comes out differentiates as the rule says."""
    outputs, aux = run_to_heads(plan, net, params, feedback, inputs, rng=rng, calls=calls, states=states)
    outputs = from_heads(plan, net, outputs, params, inputs)
    return (outputs, aux) if net.has_aux else outputs


def prepare(plan: Plan, feedback: Feedback, rng=None, targets=None) -> Calls | None:
    """What the functions of the rule ask for, if they do; and a look whether the feedback is that of the plan."""
    plan.check(feedback)
    return Calls(plan, feedback, rng, targets) if plan.asking else None


def run_to_heads(
    plan: Plan, net: Network, params: Pytree, feedback: Feedback, inputs: Pytree, *, rng=None, calls=None, states=None
) -> Any:
    """The same up to where the output error is taken: `(outputs, aux)`, see `head.py`.

    Args:
      plan, net, params, feedback, inputs, rng: what is run on what.
      calls: what `prepare` made; None: it is made here.
      states: those of `calls`, as arguments of a function that is differentiated.
    """
    calls = prepare(plan, feedback, rng) if calls is None else calls
    weights, leaves = {**feedback.fixed, **feedback.learned}, net.parameters(params)
    if rng is not None:
        weights |= plan.init(rng, leaves, redrawn=True).fixed
    operands = None if calls is None else calls.operands | ({} if states is None else {"states": states})
    args = (leaves, weights, jax.tree.leaves(inputs), plan.graph.consts, net.handlers)
    if any(landing.spec.lands for landing in plan.direct_feedback.values()):
        return _direct_run(plan, calls)(*args, operands)
    return evaluate(plan, *args, Frame(), calls, operands)


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
    plan: Plan, params, feedback, inputs, consts, handlers, frame: Frame, calls: Calls | None = None, operands=None
):
    """Runs the network with the rule's own handler innermost; the arguments are flat, as `run_to_heads` makes them."""
    shadow = None
    if plan.shadows:
        names = plan.graph.names
        shadow = [
            placed_as(feedback[name], jax.typeof(p))
            if name in plan.sequential_feedback
            else jax.lax.stop_gradient(p)
            for name, p in zip(names, params, strict=True)
        ]
    own, outermost = _RuleHandler(plan, calls, operands), [] if calls is None else calls.slopes()
    if calls is not None and operands["states"]:
        states = {site: s for site, s in operands["states"].items() if site not in plan.direct_feedback}
        frame.inputs = {**frame.inputs, **{f"{site} output": s for site, s in states.items()}}
    options: dict[str, Any] = {"consts": consts, "feedback": shadow, "frame": frame, "marks": plan.marks}
    taps = {name: head.value for name, head in plan.heads.items()}
    outputs, aux = plan.graph.run(params, inputs, handlers=(own, *handlers, *outermost), taps=taps, **options)
    leaves, tree = jax.tree.flatten(outputs)
    for name, head in plan.heads.items():
        leaves[head.output] = frame.records.pop(name)
    return jax.tree.unflatten(tree, leaves), aux


def _direct_run(plan: Plan, calls: Calls | None) -> Callable:
    """The whole network as one function whose backward pass brings the output error to every landing at once."""
    landings = plan.direct_feedback.values()
    kept = {name for name, landing in plan.direct_feedback.items() if landing.spec.learn is not None}
    kept |= calls.records() if calls is not None else set()

    @jax.custom_vjp
    def run(params, feedback, inputs, consts, handlers, operands):
        return evaluate(plan, params, feedback, inputs, consts, handlers, Frame(), calls, operands)

    def forward(*args):
        # Only what is differentiated is: data may come from what has no reverse mode, such as a while loop.
        wanted = any(leaf.perturbed for leaf in jax.tree.leaves(args[2:5]))
        params, feedback, inputs, consts, handlers, operands = jax.tree.map(lambda leaf: leaf.value, args)
        states = None if operands is None else operands["states"]

        def network(params, feedback, states, inputs=inputs, consts=consts, handlers=handlers):
            frame, given = Frame(), None if operands is None else operands | {"states": states}
            outputs, aux = evaluate(plan, params, feedback, inputs, consts, handlers, frame, calls, given)
            landed = {name: value for name, value in frame.records.items() if name in plan.direct_feedback}
            return (outputs, landed), (aux, frame.records)

        differentiated = (params, feedback, states, *((inputs, consts, handlers) if wanted else ()))
        (outputs, landed), pull, (aux, records) = jax.vjp(network, *differentiated, has_aux=True)
        pullbacks = dict.fromkeys(landing.spec.pullback for landing in landings if landing.spec.pullback)
        pulls = [pullback(plan, params, inputs, consts, landed) for pullback in pullbacks]
        records = {name: value for name, value in records.items() if name in kept}
        return (outputs, aux), (pull, pulls, feedback, operands, records)

    def backward(residuals, cotangent):
        pull, pulls, feedback, operands, records = residuals
        errors = jax.tree.map(_instantiate, cotangent[0], is_leaf=_is_zero)
        sent: dict[Direct, Any] = {}
        signals: dict[str, Any] = {}
        feedback_grads: dict[str, Any] = {}
        states: dict[str, Any] = {}
        for pull_signals in pulls:
            signals |= pull_signals(errors)
        for name, landing in plan.direct_feedback.items():
            spec, b = landing.spec, feedback.get(name)
            if spec.signal is None:
                continue
            if spec not in sent:
                sent[spec] = sent_error(plan, spec, output_error(plan, errors), feedback)
            e = sent[spec]
            if calls is not None and calls.apart(spec):
                signals[name], state = calls.signal(operands, landing, e, b, records)
                states |= {name: state} if state is not None else {}
            else:
                signals[name] = _land(landing, e, b, calls, operands)
            if spec.learn is not None:
                learn = None if calls is None or spec.plain else calls.learn(operands, landing, e, records)
                feedback_grads[name] = direct_feedback_gradient(landing, e, records[name], b, learn)
        params, weights, passed, *rest = pull((errors, signals))
        weights = {**weights, **{name: _over_devices(g, feedback[name]) for name, g in feedback_grads.items()}}
        given = None if operands is None else dict.fromkeys(operands) | {"states": {**passed, **states}}
        return (params, weights, *rest, *[None] * (3 - len(rest)), given)

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


def _is_zero(x) -> bool:
    return isinstance(x, SymbolicZero)


def _instantiate(x):
    return np.zeros(x.shape, x.dtype) if _is_zero(x) else x


def _over_devices(grad, b):
    """Sums a feedback gradient over the devices that share the feedback weight, as the transpose of using it would."""
    axes = tuple(sorted(varying_axes(jax.typeof(grad)) - varying_axes(jax.typeof(b))))
    return jax.lax.psum(grad, axes) if axes else grad


def _spec(x):
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


def _land(landing: DirectFeedback, e, b, calls: Calls | None, operands):
    """The cotangent of one hidden signal at its definition, with the axes of the scans around it in front."""
    hidden, shared, name = landing.hidden, landing.shared, landing.hidden.name
    turns = [i for i, (kind, _) in enumerate(shared) if kind == "loop"]
    places = {i: place for i, (kind, place) in enumerate(shared) if kind == "axis"}
    e = split_as(e, *[None] * len(shared), landing.batch_split)
    b = None if b is None else split_as(b, *landing.split)
    fn, targets, named = landing.spec.bound("signal", name), None, {}
    if calls is not None and not landing.spec.plain:
        fn, targets = calls.function(operands, f"signal at {name}"), operands["targets"]
        named = calls.named(operands, landing, "signal", {})

    def signal(e, b):  # [*shared, batch, *hidden without shared axes]
        return arriving(landing, fn(e, b, targets, name, **named), e)

    for _ in shared:
        signal = jax.vmap(signal, in_axes=(0, None))
    define = landing.defined
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
    out = jnp.broadcast_to(out, (*(length for length, _ in hidden.loops), *out.shape[len(lead) :]))
    return placed_as(out, hidden.root.aval, len(hidden.loops))


def direct_feedback_gradient(landing: DirectFeedback, e, record, b, learn=None):
    """The gradient of one direct feedback weight, summed over the scans and positions that share it.

    Args:
      landing, e, record, b: where, the error that is sent, the hidden signal at its definition, the feedback weight.
      learn: the rule's function `(e, h, b, given) -> db` and what it is given at each iteration and position; None for
        the rule's own, which is given nothing.
    """
    name = landing.hidden.name
    if learn is None:
        own = landing.spec.bound("learn", name)
        learn = (lambda e, h, b, given: own(e, h, b)), {}
    fn, given = learn
    placing, b = _spec(b), split_as(b, *landing.split)
    e = split_as(e, *[None] * len(landing.shared), landing.batch_split)
    h = at_calls(landing, record, e.shape[len(landing.shared)]).astype(b.dtype)

    def one(e, h, b, given):
        return learned_by(landing, fn(e, h, b, given), b)

    def summed(learn, in_axes):
        return lambda *args: jax.vmap(learn, in_axes)(*args).sum(0)

    for _ in landing.shared:
        one = summed(one, (0, 0, None, 0))
    for _ in landing.others:
        one = summed(one, (None, 0, None, 0))
    for _ in landing.own:
        one = jax.vmap(one, (None, 0, 0, 0))
    return split_as(one(e, h, b, given), *placing)
