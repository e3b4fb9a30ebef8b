"""Running a network under a plan: the outputs stay the same, and their derivative is that of the rule.

A sequential rule is a `custom_vjp` around each layer. A direct rule is one `custom_vjp` around the whole network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.custom_derivatives import SymbolicZero

from lrules.engine import chained
from lrules.engine.calls import Calls
from lrules.engine.handlers import Frame, Handler, Operation
from lrules.engine.head import finish
from lrules.engine.jaxprs import placed_as, varying_axes
from lrules.engine.landing import (
    direct_feedback_gradient,
    land,
    landed_as,
    output_error,
    reduction_gradient,
    sent_error,
)
from lrules.engine.plan import Plan
from lrules.engine.records import Hidden, Layer
from lrules.engine.returned import called
from lrules.network import Network
from lrules.rule import Direct, Feedback, Sequential
from lrules.typing import Pytree


class _Layers(Handler):
    """The handler of the rule itself at layers with a sequential rule."""

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
    """The handler of the rule itself at hidden signals where direct feedback lands."""

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
    """Runs the network under a plan; the derivative of the outputs is that of the rule."""
    outputs, aux = run_to_heads(plan, net, params, feedback, inputs, rng=rng, calls=calls, states=states)
    outputs = from_heads(plan, net, outputs, params, inputs)
    return (outputs, aux) if net.has_aux else outputs


def prepare(plan: Plan, feedback: Feedback, rng: jax.Array | None = None, targets: Pytree = None) -> Calls | None:
    """Checks the feedback, and prepares what the functions of the rule ask for (None if they ask for nothing)."""
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
    """Runs a network under a plan, up to the place where a direct rule takes the output error.

    This place is below a softmax or the like (see `head.py`), or the outputs.

    Args:
      plan: the plan.
      net, params, feedback, inputs: the network, and what it takes.
      rng: the key of the step, for stochastic rules.
      calls: what the functions of the rule ask for, already prepared; None: it is prepared here.
      states: the states of `calls`, as arguments of a function that is differentiated.

    Returns:
      `(ends, aux)`: the values at this place, with the structure of the outputs, and the aux.

    Raises:
      ValueError: the feedback was made for another rule or network.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> from lrules import extend
      >>> net, rule = lrules.Network(lambda w, x: jax.nn.softmax(x @ w)), lrules.backprop()
      >>> w, x, none = jnp.eye(2), jnp.ones((1, 2)), lrules.Feedback({}, {})
      >>> plan = extend.make_plan(net, net.graph(w, x), w, x, lambda name: extend.Backprop())
      >>> extend.run_to_heads(plan, net, w, none, x)[0].tolist()  # backprop needs no output error: at the outputs
      [[0.5, 0.5]]
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
    """Continues from the result of `run_to_heads` to the outputs of the network.

    Args:
      plan, net: the plan and the network.
      outputs: the `ends` of `run_to_heads`.
      params, inputs: what the network takes.

    Returns:
      The outputs.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> from lrules import extend
      >>> net, w, x = lrules.Network(lambda w, x: x @ w), jnp.eye(2), jnp.ones((1, 2))
      >>> plan = extend.make_plan(net, net.graph(w, x), w, x, lambda name: extend.Backprop())
      >>> ends, aux = extend.run_to_heads(plan, net, w, lrules.Feedback({}, {}), x)
      >>> extend.from_heads(plan, net, ends, w, x).tolist()
      [[1.0, 1.0]]
    """
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
    """Runs a network under a plan, with the handlers of the rule innermost. Arguments are flat lists.

    Args:
      plan: the plan.
      params: `net.parameters(params)`.
      feedback: the feedback weights by name.
      inputs: the leaves of the inputs.
      consts: `plan.graph.consts`.
      handlers: further handlers, such as `net.handlers`.
      frame: what the handlers read and write.
      calls, operands: as `run_to_heads` makes them, for rules that ask for more.

    Returns:
      `(outputs, aux)`; the records are in `frame.records`.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> from lrules import extend
      >>> net, w, x = lrules.Network(lambda w, x: x @ w), jnp.eye(2), jnp.ones((1, 2))
      >>> plan = extend.make_plan(net, net.graph(w, x), w, x, lambda name: extend.Backprop())
      >>> extend.evaluate(plan, [w], {}, [x], plan.graph.consts, (), extend.Frame())[0].tolist()
      [[1.0, 1.0]]
    """
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
        feedback_grads: dict[str, Any] = {}
        states: dict[str, Any] = {}
        learned: list[Any] = []

        def bring(name: str, formed: Sequence[Any] = ()) -> Any:
            """The signal of one landing; it waits for `formed`, and for what its feedback learned above."""
            landing, b = plan.direct_feedback[name], feedback.get(name)
            spec = landing.spec
            if spec not in sent:
                sent[spec] = sent_error(plan, spec, output_error(plan, errors), feedback)
            e = sent[spec] = chained.after(sent[spec], [*formed, *learned], len(landing.shared))
            learned.clear()
            if spec.plain:
                signal = land(landing, e, b, _plain_signal(spec, name))
            else:
                assert calls is not None
                signal, new = calls.signal(operands, landing, e, b, records)
                states.update(new)
            if spec.learn is not None:
                learn = () if calls is None or spec.plain else calls.learn(operands, landing, e, records)
                feedback_grads[name] = direct_feedback_gradient(landing, e, records[name], b, *learn)
                learned.extend([feedback_grads[name]] if waits else ())
            return signal

        for name, (spec, _, _) in plan.reduced.items():
            if spec.learned_factors:
                e = output_error(plan, errors)
                feedback_grads[name] = reduction_gradient(plan, spec, name, e, feedback, records)
        signals: dict[str, Any] = {}
        for pull_signals in pulls:
            signals |= pull_signals(errors)
        brought = [name for name, landing in plan.direct_feedback.items() if landing.spec.signal is not None]
        lands = {name: landed_as(plan.direct_feedback[name]) for name in brought}
        waits = not signals and chained.wanted(errors, lands)
        if waits:
            params, weights, passed, *rest = chained.pulled(pull, errors, lands, bring)
        else:
            signals |= {name: bring(name) for name in brought}
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
