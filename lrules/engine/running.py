"""Running a network under a plan: the same outputs, differentiated as the rule says.

Sequential rules are a `custom_vjp` around each layer, direct ones one `custom_vjp` around the whole network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.custom_derivatives import SymbolicZero

from lrules.engine.calls import Calls
from lrules.engine.handlers import Frame, Handler, Operation
from lrules.engine.head import finish
from lrules.engine.jaxprs import placed_as, varying_axes
from lrules.engine.landing import direct_feedback_gradient, land, output_error, sent_error
from lrules.engine.plan import Plan
from lrules.engine.records import Hidden, Layer
from lrules.engine.returned import called
from lrules.network import Network
from lrules.rule import Direct, Feedback, Sequential
from lrules.typing import Pytree


class _Layers(Handler):
    """The rule's own handler at layers, where they have a sequential rule."""

    arrays = ("operands",)

    def __init__(self, plan: Plan, calls: Calls | None, operands: Any) -> None:
        self.plan, self.calls, self.operands = plan, calls, operands

    def layer(self, layer: Layer, op: Operation, w: jax.Array, b: Any, x: jax.Array, frame: Frame) -> Any:
        spec = self.plan.specs[layer.site]
        if not isinstance(spec, Sequential) or (layer.mixed and layer.weight.batched and spec.whole_batch):
            return op(w, x)
        b = b if spec.init is not None else None
        if spec.plain:
            return _sequential_layer(spec, layer, op.product)(w, b, x)
        assert self.calls is not None
        return self.calls.layer(self.operands, spec, layer, op.product, w, b, x, frame)


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
    fn, learned = spec.bound("backward", layer.name) if spec.numbers else spec.backward, spec.learned

    @jax.custom_vjp
    def multiply(w: jax.Array, b: Any, x: jax.Array) -> Any:
        return op(w, x)

    def forward(w: jax.Array, b: Any, x: jax.Array) -> tuple[Any, Any]:
        return op(w, x), (w, b, x)

    def backward(residuals: Any, d: jax.Array) -> tuple[Any, Any, Any]:
        w, b, x = residuals
        dw, dx, db, _ = called(learned, fn, op, w, b, x, d, layer)
        return dw, db, dx

    multiply.defvjp(forward, backward)
    return multiply


def run_plan(
    plan: Plan,
    net: Network,
    params: Pytree,
    feedback: Feedback,
    inputs: Pytree,
    *,
    rng: jax.Array | None = None,
    calls: Calls | None = None,
    states: Any = None,
) -> Any:
    """Runs the network under a plan; what comes out differentiates as the rule says."""
    outputs, aux = run_to_heads(plan, net, params, feedback, inputs, rng=rng, calls=calls, states=states)
    outputs = from_heads(plan, net, outputs, params, inputs)
    return (outputs, aux) if net.has_aux else outputs


def prepare(plan: Plan, feedback: Feedback, rng: jax.Array | None = None, targets: Pytree = None) -> Calls | None:
    """What the functions of the rule ask for, if they do; and a look whether the feedback is that of the plan."""
    plan.check(feedback)
    return Calls(plan, feedback, rng, targets) if plan.asking else None


def run_to_heads(
    plan: Plan,
    net: Network,
    params: Pytree,
    feedback: Feedback,
    inputs: Pytree,
    *,
    rng: jax.Array | None = None,
    calls: Calls | None = None,
    states: Any = None,
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
    plan: Plan,
    params: Sequence[Any],
    feedback: Mapping[str, Any],
    inputs: Sequence[Any],
    consts: Sequence[Any],
    handlers: Sequence[Handler],
    frame: Frame,
    calls: Calls | None = None,
    operands: Any = None,
) -> tuple[Any, Any]:
    """Runs the network with the rule's own handlers innermost; the arguments are flat, as `run_to_heads` makes them."""
    shadow: list[Any] | None = None
    if plan.shadows:
        shadow = []
        for name, p, value in zip(plan.graph.names, params, plan.graph.parameters, strict=True):
            if name in plan.sequential_feedback:
                shadow.append(placed_as(feedback[name], jax.typeof(p)))
            else:
                shadow.append(jax.lax.stop_gradient(p) if value.wanted else None)
    sequential = any(isinstance(s, Sequential) for s in plan.specs.values())
    own: list[Handler] = [_Layers(plan, calls, operands)] if sequential else []
    own += [_Landings(plan)] if plan.direct_feedback else []
    outermost: list[Handler] = []
    if calls is not None:
        outermost += calls.slopes()
        frame.inputs = {**frame.inputs, **calls.inputs(operands)}
    options: dict[str, Any] = {"consts": consts, "feedback": shadow, "frame": frame, "marks": plan.marks}
    taps = {name: head.value for name, head in plan.heads.items()}
    outputs, aux = plan.graph.run(params, inputs, handlers=(*own, *handlers, *outermost), taps=taps, **options)
    leaves, tree = jax.tree.flatten(outputs)
    for name, head in plan.heads.items():
        leaves[head.output] = frame.records.pop(name)
    return jax.tree.unflatten(tree, leaves), aux


def _direct_run(plan: Plan, calls: Calls | None) -> Callable[..., Any]:
    """The whole network as one function whose backward pass brings the output error to every landing at once."""
    landings = plan.direct_feedback.values()
    kept = {name for name, landing in plan.direct_feedback.items() if landing.spec.learn is not None}
    kept |= calls.records() if calls is not None else set()

    @jax.custom_vjp
    def run(
        params: Sequence[Any],
        feedback: Mapping[str, Any],
        inputs: Sequence[Any],
        consts: Sequence[Any],
        handlers: Sequence[Handler],
        operands: Any,
    ) -> tuple[Any, Any]:
        return evaluate(plan, params, feedback, inputs, consts, handlers, Frame(), calls, operands)

    def forward(*args: Any) -> tuple[Any, Any]:
        # Only what is differentiated is: data may come from what has no reverse mode, such as a while loop.
        wanted = any(leaf.perturbed for leaf in jax.tree.leaves(args[2:5]))
        params, feedback, inputs, consts, handlers, operands = jax.tree.map(lambda leaf: leaf.value, args)
        states = None if operands is None else operands["states"]

        def network(
            params: Sequence[Any],
            feedback: Mapping[str, Any],
            states: Any,
            inputs: Sequence[Any] = inputs,
            consts: Sequence[Any] = consts,
            handlers: Sequence[Handler] = handlers,
        ) -> tuple[Any, Any]:
            frame, given = Frame(), None if operands is None else operands | {"states": states}
            outputs, aux = evaluate(plan, params, feedback, inputs, consts, handlers, frame, calls, given)
            records = frame.taken()
            landed = {name: value for name, value in records.items() if name in plan.direct_feedback}
            return (outputs, landed), (aux, records)

        differentiated = (params, feedback, states, *((inputs, consts, handlers) if wanted else ()))
        (outputs, landed), pull, (aux, records) = jax.vjp(network, *differentiated, has_aux=True)
        pullbacks = dict.fromkeys(landing.spec.pullback for landing in landings if landing.spec.pullback)
        pulls = [pullback(plan, params, inputs, consts, landed) for pullback in pullbacks]
        records = {name: value for name, value in records.items() if name in kept}
        return (outputs, aux), (pull, pulls, feedback, operands, records)

    def backward(residuals: Any, cotangent: Any) -> tuple[Any, ...]:
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
            if spec.plain:
                signals[name] = land(landing, e, b, _plain_signal(spec, name))
            else:
                assert calls is not None
                signals[name], new = calls.signal(operands, landing, e, b, records)
                states |= new
            if spec.learn is not None:
                learn = () if calls is None or spec.plain else calls.learn(operands, landing, e, records)
                feedback_grads[name] = direct_feedback_gradient(landing, e, records[name], b, *learn)
        params, weights, passed, *rest = pull((errors, signals))
        weights = {**weights, **{name: _over_devices(g, feedback[name]) for name, g in feedback_grads.items()}}
        given = None if operands is None else dict.fromkeys(operands) | {"states": {**passed, **states}}
        return (params, weights, *rest, *[None] * (3 - len(rest)), given)

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


def _plain_signal(spec: Direct, name: str) -> Callable[..., Any]:
    fn = spec.bound("signal", name)
    return lambda e, b: fn(e, b, None, name)


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


def _instantiate(x: Any) -> Any:
    return np.zeros(x.shape, x.dtype) if _is_zero(x) else x


def _over_devices(grad: Any, b: Any) -> Any:
    """Sums a feedback gradient over the devices that share the feedback weight, as the transpose of using it would."""
    axes = tuple(sorted(varying_axes(jax.typeof(grad)) - varying_axes(jax.typeof(b))))
    return jax.lax.psum(grad, axes) if axes else grad
