"""Feedback weights that learn by node perturbation (Lansdell, Prakash, Kording 2019).

A second forward pass adds noise to all hidden signals h_l at once: sigma xi_l, where xi_l has unit variance and one
draw per example. This estimates the gradient of the loss L of each example at each hidden signal,

    lambda_l = (L(xi) - L(0)) xi_l / sigma,    E lambda_l = dL/dh_l + O(sigma)               (Eq. 3)

and the feedback weights descend the squared distance between this estimate and the error that they bring there:

    sequential    B descends 1/2 |B_{l+1}^T e_{l+1} - lambda_l|^2,  e_l = (B_{l+1}^T e_{l+1}) * f'(z_l)    (Eq. 4)
    direct        B descends 1/2 |B_l^T e - lambda_l|^2,  e the output error                     (Corollary 1)

The forward weights learn on the clean pass, with B instead of W^T. The residual belongs to the hidden signal: it is the
whole error that arrives there minus the estimate, and it is the same for each layer that reads the hidden signal. The
gradient of B is a weight gradient in which the residual replaces the input of the layer, <d, op(B, residual)>. So a
third run of the network, in which residuals replace the hidden signals, gives this gradient for layers of every kind.
Nothing else of this run is needed, and under `jit` nothing else is computed.

Least squares (Eq. 5, 9, 11): B = S V^-1 with V = ridge I + sum d d^T and S = sum lambda d^T, where the sums are over
all batches so far. The B that `init` draws brings the error down in the first step, and has no effect after it. The
pairs of a batch enter B after the forward weights have got their gradients from B.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn, get_args

import jax
import jax.numpy as jnp

from lrules.apply import mean_loss
from lrules.engine.batch import BatchAxis, batch_axis, doubled
from lrules.engine.dtypes import at_least_float32
from lrules.engine.graph import Graph
from lrules.engine.handlers import Frame, Handler, Operation, all_zeros_at, key_at
from lrules.engine.jaxprs import placed_as, split_as
from lrules.engine.landing import direct_feedback_gradient, output_error, sent_error
from lrules.engine.operations import of
from lrules.engine.plan import Plan
from lrules.engine.planning import make_plan
from lrules.engine.product import Product
from lrules.engine.records import Hidden, Layer
from lrules.engine.running import evaluate, from_heads, run_to_heads
from lrules.network import Network, NetworkLike, as_network
from lrules.options import as_initializer, is_number
from lrules.rule import Direct, Feedback, Gradients, Rule, RuleDescription, Sequential, check_params
from lrules.rules.direct_feedback_alignment import arrive, correlate, project
from lrules.typing import Initializer, Loss, Pytree

Channel = Literal["sequential", "direct"]
Solver = Literal["sgd", "rls"]


def node_perturbation(
    std: float,
    *,
    channel: Channel = "sequential",
    solver: Solver = "sgd",
    init: Initializer | None = None,
    noise: Callable[..., jax.Array] = jax.random.normal,
    ridge: float = 0.1,
    max_feedback_bytes: float = 2**30,
) -> Rule:
    """Node perturbation: feedback weights learn the effect of noise in the hidden signals on the loss.

    lambda_l = (L(xi) - L(0)) xi_l / std,  B_{l+1} descends 1/2 |B_{l+1}^T e_{l+1} - lambda_l|^2

    The rule makes two forward passes, the second one with new noise at every step, from `rng=`. The value and the
    outputs are those of the first, clean pass.

    With `solver="sgd"` the feedback weights are learned: `grads.feedback` is their gradient, a mean over examples. Give
    them their own optimizer and learning rate. With `solver="rls"` the feedback weights are the least-squares solution
    for all batches so far: continue with `feedback._replace(state=grads.state)`. A batch enters this solution after the
    rule has computed `grads.params` for it. So the first step uses the feedback weights that `init` draws, and later
    steps do not depend on them. To let the feedback weights settle before the forward weights change, begin with steps
    that do not use `grads.params`.

    Args:
      std: the standard deviation of the noise.
      channel: `"sequential"` brings the error down through every layer, as feedback alignment does. `"direct"` brings
        the output error (see docs/terms.md) straight to every hidden signal, as direct feedback alignment does.
      solver: `"sgd"`, or `"rls"` for recursive least squares. `"rls"` serves dense layers, and direct feedback to every
        layer. Under `jit` with a sharded batch, and under `shard_map`, it uses the examples of all devices. Under
        `pmap`, or with `check_vma=False`, it uses those of one device.
      init: the initializer of the feedback weights, as in `feedback_alignment` and `direct_feedback_alignment`;
        default `jax.nn.initializers.glorot_normal()`.
      noise: `(key, shape, dtype)` -> numbers with mean 0 and variance 1, such as `jax.random.rademacher`.
      ridge: the multiple of the identity with which least squares start.
      max_feedback_bytes: the rule refuses to make more bytes of direct feedback than this.

    Returns:
      The rule. It needs `rng=`, and `lrules.value_and_grad`.

    Raises:
      ValueError: an argument is out of range. `lrules.transform` raises it, because the rule needs the loss. At use:
        the noise does not have the shape that the rule asks for.
      TypeError: `init` or `noise` is not a function.
      NotImplementedError: at use: a hidden signal lies inside a `cond` or `shard_map` of the network, its batch axis
        cannot be found, or a layer is not dense and the solver is `"rls"`.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> x, rule, loss = jnp.ones((5, 3)), lrules.node_perturbation(0.01), lrules.testing.half_squared_error
      >>> feedback = rule.init(jax.random.key(0), net, params, x)
      >>> step = lrules.value_and_grad(net, loss, rule)
      >>> (value, outputs), grads = step(params, feedback, x, jnp.zeros((5, 2)), rng=jax.random.key(1))
      >>> grads.feedback["b"].shape
      (4, 2)

    References:
      Lansdell, Prakash, Kording: Learning to solve the credit assignment problem (2019), sections 2 and 3, Eq. 1 to 5,
      9, 11; Theorems 1 and 2, Corollary 1.
    """
    if not (is_number(std) and 0 < std < math.inf):
        raise ValueError(f"std must be a finite number > 0, got {std!r}")
    if channel not in get_args(Channel):
        raise ValueError(f'channel must be "sequential" or "direct", got {channel!r}')
    if solver not in get_args(Solver):
        raise ValueError(f'solver must be "sgd" or "rls", got {solver!r}')
    if not (is_number(ridge) and 0 < ridge < math.inf):
        raise ValueError(f"ridge must be a finite number > 0, got {ridge!r}")
    if not callable(noise):
        raise TypeError(f"noise must be a function (key, shape, dtype) -> array, got a {type(noise).__name__}")
    draw = as_initializer(init)
    learned = solver == "sgd"
    if channel == "direct":
        learn = (lambda e, h, b: jnp.zeros_like(b)) if learned else None  # the gradient is computed below
        spec: Any = Direct(arrive, draw, learn, max_feedback_bytes=max_feedback_bytes, offers=())
    else:
        spec = Sequential(_backward_learned if learned else _backward, draw, learned)

    def plan(net: Network, graph: Graph, params: Pytree, inputs: Pytree) -> Plan:
        return make_plan(net, graph, params, inputs, lambda name: spec, partition=False)

    def rule_init(key: jax.Array, net: NetworkLike, params: Pytree, inputs: Pytree) -> Feedback:
        net = as_network(net)
        check_params(params)
        graph = net.graph(params, inputs)
        made = plan(net, graph, params, inputs)
        feedback = made.init(key, net.parameters(params))
        return feedback if learned else Feedback({}, {}, _Rows(made).begin(feedback.fixed, ridge))

    def transform(net: Network, *, reduction: str = "mean") -> NoReturn:
        raise ValueError(
            "node_perturbation compares the losses of two forward passes, so transform cannot serve it: use "
            "lrules.value_and_grad(net, loss, rule)"
        )

    def value_and_grad(net: Network, loss: Loss) -> Callable[..., tuple[tuple[Any, ...], Gradients]]:
        def fn(
            params: Pytree, feedback: Feedback, inputs: Pytree, targets: Pytree, *, rng: jax.Array | None = None
        ) -> tuple[tuple[Any, ...], Gradients]:
            graph = net.graph(params, inputs)
            made = plan(net, graph, params, inputs)
            if not (learned or isinstance(feedback.state, dict)):
                raise ValueError(
                    'node_perturbation(solver="rls") keeps its feedback in feedback.state, and the state of this '
                    "feedback is empty: make new feedback with rule.init(key, net, params, inputs)"
                )
            weights = feedback if learned else Feedback({n: s["b"] for n, s in feedback.state.items()}, {})
            made.check(weights)
            experiment = _Experiment(net, graph, made, loss, std, noise)
            run = experiment.direct if channel == "direct" else experiment.sequential
            head, grads, db, statistics = run(params, weights, inputs, targets, rng)
            if learned:
                return head, Gradients(grads, {name: db[name] for name in feedback.learned}, feedback.state, {})
            n, rows = net.batch_size(inputs), _Rows(made)
            state = {name: rows.step(name, s, n * db[name], statistics[name]) for name, s in feedback.state.items()}
            return head, Gradients(grads, {}, state, {})

        return fn

    return Rule(rule_init, transform, value_and_grad, stochastic=True, description=RuleDescription(plan))


def _backward(op: Product, w: jax.Array, b: Any, x: jax.Array, d: jax.Array, layer: Layer) -> tuple[Any, Any, None]:
    return op.weight_gradient(w, x, d), op.passed_down(b, x, d), None


def _backward_learned(
    op: Product, w: jax.Array, b: jax.Array, x: jax.Array, d: jax.Array, layer: Layer
) -> tuple[Any, Any, jax.Array]:
    dw, dx, _ = _backward(op, w, b, x, d, layer)
    return dw, dx, jnp.zeros_like(b)  # its gradient is formed in `_Experiment`


class _Experiment:
    """Both forward passes, and the gradients of the feedback weights that follow from them."""

    def __init__(
        self, net: Network, graph: Graph, plan: Plan, loss: Callable[..., Any], std: float, noise: Callable[..., Any]
    ) -> None:
        self.net, self.graph, self.plan, self.loss, self.std, self.noise = net, graph, plan, loss, std, noise
        self.hidden = [h for h in graph.hidden if not h.mark and jnp.issubdtype(h.root.aval.dtype, jnp.inexact)]
        for place, what in [
            *((h.root.place[0].scope, f"hidden signal {h.name!r}") for h in self.hidden),  # type: ignore[index]
            *((layer.scope, f"layer {layer.name!r}") for layer in graph.layers if layer.reads is not None),
        ]:
            inside = [s.split(" ")[0] for s in place if s != "scan"]
            if inside:
                raise NotImplementedError(
                    f"the {what} lies inside a {inside[0]}, where node_perturbation cannot follow its noise: move it "
                    f"out of the {inside[0]}, or use another rule"
                )

    def objective(self, outputs: Pytree, inputs: Pytree, targets: Pytree) -> jax.Array:
        return mean_loss(self.net, self.loss, outputs, inputs, targets)

    def estimates(
        self, params: Pytree, inputs: Pytree, targets: Pytree, outputs: Pytree, rng: Any
    ) -> dict[str, jax.Array]:
        """lambda at the definition of each hidden signal; the axes of the scans around it come first."""
        net, graph = self.net, self.graph
        batch = net.batch_size(inputs)
        twice = doubled(net, params, inputs, graph)
        frame = Frame()
        handlers = (_Noise({h.name for h in self.hidden}, self.std, self.noise, rng),)
        noisy, _ = graph.run(net.parameters(params), jax.tree.leaves(inputs), handlers=handlers, frame=frame)
        losses = [self.loss(o, targets) for o in (noisy, outputs)]
        difference = jnp.mean((losses[0] - losses[1]).reshape(batch, -1), axis=1) / self.std
        found = {}
        for h in self.hidden:
            other = twice(h.root) if twice else None
            axis = batch_axis(net, h.name, h.root, other, batch)
            if axis is None:
                raise NotImplementedError(
                    f"the batch axis of the hidden signal {h.name!r} of shape {h.root.aval.shape} cannot be found "
                    f"(batch {batch}), and node_perturbation compares its noise with the loss of each example: write "
                    "the network so that the batch is a separate axis, in the order of the inputs, or use another rule"
                )
            found[h.name] = frame.records[h.name] * _per_example(difference, axis, h)
        return found

    def sequential(
        self, params: Pytree, feedback: Feedback, inputs: Pytree, targets: Pytree, rng: jax.Array | None
    ) -> tuple[tuple[Any, ...], Any, Any, dict[str, Any]]:
        plan, graph = self.plan, self.graph
        weights = {**feedback.fixed, **feedback.learned}
        leaves, consts = jax.tree.leaves(inputs), graph.consts
        taught = {
            layer.site: layer
            for layer in graph.layers
            if layer.reads is not None and any(name in plan.sequential_feedback for name in layer.parameters)
        }
        values = {h.name: h.root for h in self.hidden} | {f"{s} output": layer.output for s, layer in taught.items()}
        probes = all_zeros_at(values)

        def clean(params: Pytree, probes: Mapping[str, Any]) -> tuple[jax.Array, Any]:
            handlers = (_ArrivingAtHidden(), *self.net.handlers, _ArrivingAtLayers())
            run = evaluate(plan, self.net.parameters(params), weights, leaves, consts, handlers, Frame(probes))
            outputs, aux = run
            return self.objective(outputs, inputs, targets), (outputs, aux)

        (value, (outputs, aux)), (grads, arriving) = jax.value_and_grad(clean, argnums=(0, 1), has_aux=True)(
            params, probes
        )
        lambdas = self.estimates(params, inputs, targets, outputs, rng)
        n = self.net.batch_size(inputs)
        residuals = {h.name: (n * arriving[h.name] - lambdas[h.name]).astype(h.root.aval.dtype) for h in self.hidden}

        def stand_in(weights: Any) -> dict[str, Any]:
            frame = Frame(residuals)
            evaluate(plan, self.net.parameters(params), weights, leaves, consts, (_StandIn(set(taught)),), frame)
            return frame.records

        (db,) = jax.vjp(stand_in, weights)[1]({site: arriving[f"{site} output"] for site in taught})
        head = (value, outputs, aux) if self.net.has_aux else (value, outputs)
        statistics = {}
        if not feedback.learned:
            for site, layer in taught.items():
                d = jnp.moveaxis(arriving[f"{site} output"], next(iter(layer.output_axes.values())), -1)
                statistics[layer.name] = _covariance(n * d)
        return head, grads, db, statistics

    def direct(
        self, params: Pytree, feedback: Feedback, inputs: Pytree, targets: Pytree, rng: jax.Array | None
    ) -> tuple[tuple[Any, ...], Any, dict[str, Any], dict[str, Any]]:
        plan, net = self.plan, self.net

        def of_outputs(ends: Any) -> tuple[jax.Array, Any]:
            outputs = from_heads(plan, net, ends, params, inputs)
            return self.objective(outputs, inputs, targets), outputs

        def clean(params: Pytree) -> tuple[jax.Array, Any]:
            ends, aux = run_to_heads(plan, net, params, feedback, inputs)
            value, outputs = of_outputs(ends)
            return value, (ends, outputs, aux)

        (value, (ends, outputs, aux)), grads = jax.value_and_grad(clean, has_aux=True)(params)
        errors, _ = jax.grad(of_outputs, allow_int=True, has_aux=True)(ends)
        lambdas = self.estimates(params, inputs, targets, outputs, rng)
        n = net.batch_size(inputs)
        weights = {**feedback.fixed, **feedback.learned}

        def learn(e: jax.Array, estimate: jax.Array, b: Any) -> Any:
            return correlate(e, n * project(e, b) - estimate, b)

        db, statistics = {}, {}
        for name, landing in plan.direct_feedback.items():
            e = sent_error(plan, landing.spec, output_error(plan, errors), weights)
            taught = dataclasses.replace(landing, spec=dataclasses.replace(landing.spec, learn=learn))
            db[name] = direct_feedback_gradient(taught, e, lambdas[name], weights[name])
            statistics[name] = _covariance(n * e)
        head = (value, outputs, aux) if net.has_aux else (value, outputs)
        return head, grads, db, statistics


def _covariance(d: jax.Array) -> Any:
    """sum d d^T over all axes but the last."""
    d = split_as(d).reshape(-1, d.shape[-1]).astype(at_least_float32(d.dtype))
    return correlate(d, d, jnp.zeros((d.shape[1], d.shape[1]), d.dtype))


def _per_example(numbers: jax.Array, axis: BatchAxis, hidden: Hidden) -> jax.Array:
    """One number per example, spread over a hidden signal at its definition."""
    shape = hidden.root.aval.shape
    rest = axis.rest(shape)
    spread = jnp.broadcast_to(numbers.reshape(-1, *[1] * len(rest)), (numbers.shape[0], *rest))
    spread = axis.restore(spread, shape).astype(hidden.root.aval.dtype)
    return spread.reshape((1,) * len(hidden.loops) + shape)


# ---------------------------------------------------------------------------------------------------- the handlers


class _Noise(Handler):
    """Adds noise to hidden signals, and records it."""

    def __init__(self, names: Any, std: float, noise: Callable[..., Any], key: jax.Array) -> None:
        self.names, self.std, self.noise, self.key = names, std, noise, key

    def hidden(self, hidden: Hidden, value: Any, frame: Frame) -> Any:
        if hidden.name not in self.names:
            return value
        key = key_at(self.key, hidden.name, value, frame)
        frame.records[hidden.name] = xi = self.noise(key, value.shape, value.dtype)
        if jnp.shape(xi) != value.shape:
            raise ValueError(
                f"node_perturbation: noise(key, shape, dtype) must return the shape {value.shape} at the hidden signal "
                f"{hidden.name!r}, got {jnp.shape(xi)}: draw one number for each element"
            )
        return value + self.std * xi


class _ArrivingAtHidden(Handler):
    """Gives the error that arrives at a hidden signal also to a probe."""

    def hidden(self, hidden: Hidden, value: Any, frame: Frame) -> Any:
        return _probed(value, frame.inputs[hidden.name]) if hidden.name in frame.inputs else value


class _ArrivingAtLayers(Handler):
    """Gives the error that arrives at the outputs of a layer also to a probe."""

    def layer(self, layer: Layer, op: Operation, w: jax.Array, b: Any, x: jax.Array, frame: Frame) -> Any:
        probe = frame.inputs.get(f"{layer.site} output")
        return op(w, x) if probe is None else _probed(op(w, x), probe)


@jax.custom_vjp
def _probed(value: Any, probe: jax.Array) -> Any:
    return value


_probed.defvjp(lambda value, probe: (value, None), lambda _, error: (error, error))


class _StandIn(Handler):
    """Replaces hidden signals by those in `frame.inputs`, and records what layers compute from them with `b`."""

    def __init__(self, sites: Any) -> None:
        self.sites = sites

    def hidden(self, hidden: Hidden, value: Any, frame: Frame) -> Any:
        return frame.inputs.get(hidden.name, value)

    def layer(self, layer: Layer, op: Operation, w: jax.Array, b: Any, x: jax.Array, frame: Frame) -> Any:
        if layer.site in self.sites:
            frame.records[layer.site] = op.product(b, x)
        return op(w, x)


# ---------------------------------------------------------------------------------------------------- least squares


class _Rows:
    """Feedback weights as `[..., size of d, size of the signal that they bring]`, and the recursion for them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.layers: dict[str, Any] = {}
        if plan.direct_feedback:
            return
        for layer in plan.graph.layers:
            if layer.reads is None:
                continue
            dense = layer.row.kind == "product" and layer.row.by_example and len(layer.weight.aval.shape) == 2
            weight = layer.weight
            while weight.producer is not None and of(weight.producer).same_shape:
                (weight,) = weight.operands
            whole = layer.parameters == (layer.name,) and weight.producer is None and not layer.scope
            if not (dense and whole and layer.name not in self.layers and len(layer.reads.readers) == 1):
                raise NotImplementedError(
                    f'solver="rls" cannot serve the layer {layer.name!r}: it serves dense layers whose weight is one '
                    "matrix that the network uses once, and whose hidden signal no other layer reads; give "
                    'solver="sgd", or channel="direct"'
                )
            self.layers[layer.name] = layer

    def of(self, name: str, b: Any) -> Any:
        b = split_as(b.astype(at_least_float32(b.dtype)))
        if name in self.layers:
            return b.T if self.layers[name].contracted == (0,) else b
        lead = len(self.plan.direct_feedback[name].lengths)
        return b.reshape(*b.shape[: lead + 1], -1)

    def back(self, name: str, rows: jax.Array, like: Any) -> Any:
        if name in self.layers and self.layers[name].contracted == (0,):
            rows = rows.T
        return placed_as(rows.reshape(like.shape).astype(like.dtype), jax.typeof(like))

    def begin(self, drawn: dict[str, jax.Array], ridge: float) -> dict[str, Any]:
        """The state before the first batch."""
        state = {}
        for name, b in drawn.items():
            rows = self.of(name, b)
            state[name] = {"b": b, "s": jnp.zeros_like(rows), "v": ridge * jnp.eye(rows.shape[-2], dtype=rows.dtype)}
        return state

    def step(self, name: str, state: Pytree, gradient: jax.Array, covariance: jax.Array) -> dict[str, Any]:
        """Adds a batch: `gradient` is its sum of d (B^T d - lambda)^T, `covariance` that of d d^T."""
        v = state["v"] + covariance.astype(state["v"].dtype)
        rows = self.of(name, state["b"])
        s = state["s"] + jnp.einsum("ij,...jk->...ik", v - state["v"], rows) - self.of(name, gradient)
        width, columns = v.shape[0], jnp.moveaxis(s, -2, 0)
        solved = _solve(v, columns.reshape(width, -1)).reshape(columns.shape)
        return {"b": self.back(name, jnp.moveaxis(solved, 0, -2), state["b"]), "s": s, "v": v}


def _solve(v: jax.Array, s: Any) -> Any:
    """V^-1 S for a positive definite V, by elimination, which then works without pivots.

    `jnp.linalg.solve` calls LAPACK, which stops for seconds in jitted training loops on CPUs with few cores.
    """
    width = v.shape[0]

    def eliminate(i: int, rows: jax.Array) -> jax.Array:
        pivot = rows[i] / rows[i, i]
        return (rows - jnp.outer(rows[:, i], pivot)).at[i].set(pivot)

    return jax.lax.fori_loop(0, width, eliminate, jnp.concatenate([v, s], axis=1))[:, width:]
