"""Equilibrium propagation: the difference of two equilibria is the gradient (Scellier and Bengio 2017).

Each activation f_l has a state s_l. Its pre-activation a_l(s_below, W) is what the network computes from the states
below it. The energy of one example, with the loss L of the outputs y, is

    E = sum_l G_l(s_l) - <s_l, a_l>,   F = E + beta L(y),   G_l' = f_l^-1

So dE/ds_l = 0 where s_l = f_l(a_l + D_l) with D_l = sum_above (da_k/ds_l)^T s_k: the same weights bring states up and
down. In a chain of dense layers, D_l = W_{l+1}^T s_{l+1}. For activations that clip, this is the energy of the paper,
|s|^2 / 2 - s^T W s / 2 - b^T s. (If f is not monotone, read E as a function of u with s = f(u): G = u f(u) - int f.)

The phases: the states settle at beta = 0 (the free equilibrium), then at a small beta (the nudged equilibrium). If
s^beta is the equilibrium at beta, and L* the loss at the free equilibrium (Theorem 1 of the paper; Laborieux et al.
2021 for the second form, whose error is O(beta^2)),

    dL*/dW = lim (dF/dW(s^beta) - dE/dW(s^0)) / beta = lim (dF/dW(s^beta) - dF/dW(s^-beta)) / (2 beta)

What comes after the last activation is no part of the energy: it is read out, and has its own gradient, as in Laborieux
et al. With output="state" it is a state without an activation, s = a - beta dL/ds, as in the paper. If the network ends
with an activation, the outputs are states in any case.

The code needs no formula for G. It uses Phi = sum_l <s_l, a_l> - beta L(y), which one run of the network makes: at each
activation the state s_l goes up in place of f(a_l), and s_l goes down as the cotangent of a_l. Then D_l arrives, and
the new state f(a_l + D_l) comes out as the cotangent of the old one. The weight gradient of that run is dPhi/dW, which
is -dF/dW.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from lrules.constructors import drawn_by, no_transform
from lrules.engine.distance import depth_of
from lrules.engine.dtypes import widened
from lrules.engine.planning import plan_elsewhere
from lrules.engine.settling import repeat, residual
from lrules.extend import (
    Activation,
    Frame,
    Graph,
    Handler,
    Plan,
    RuleDescription,
    evaluate,
    mean_loss,
    passing_names,
    treated,
)
from lrules.network import Network
from lrules.options import is_number, is_positive, is_whole, not_traced, require_flags
from lrules.rule import Feedback, Gradients, Rule
from lrules.typing import Loss, Pytree

Output = Literal["readout", "state"]


def equilibrium_propagation(
    beta: float = 0.5,
    *,
    centred: bool = True,
    free_steps: int = 30,
    nudged_steps: int = 10,
    step_size: float = 0.5,
    output: Output = "readout",
    passing: str | Iterable[str] = (),
) -> Rule:
    """Equilibrium propagation: the states settle without and with a nudge, and the difference is the update.

    s_l <- s_l + step_size (f(a_l + D_l) - s_l),  D_l = sum_above (da_k/ds_l)^T s_k - beta dL/ds_l,
    dW = (dF/dW(s^beta) - dF/dW(s^-beta)) / (2 beta)

    It is the gradient of the loss at the *free equilibrium* of the states, not of the loss of the forward pass: in the
    equilibrium, states above act on states below. The outputs and the value are those of the forward pass, as with all
    rules. `grads.report` of `value_and_grad` has `free_outputs` and `free_value`, those at the free equilibrium. A
    network that is trained with this rule should predict with them.

    Measured: a tanh network of 64-64-64-10 units on the digits of scikit-learn (10 epochs, Adam 0.003, 3 seeds) reached
    96.3 +- 0.9% with the free outputs and 93.1 +- 1.4% with the forward pass, backprop 98.6%. With one nudge only
    (`centred=False`) it reached 67.9 +- 5.4%, and with relu and weights of He's size, which do not settle, 77 +- 6%.

    The report also has the `residual` of each free step: the norm of the change of a state, divided by the norm of the
    new state, both over the whole batch; the largest of all states. It must fall to a small number, or the states
    do not settle, and the update means nothing. Bounded activations (tanh, a clip) and small weights settle; with relu
    and large weights the states can grow without bound.

    The operations between states may be any differentiable ones (pooling, skip connections, normalisation), but each
    way from state to state must cross at most one layer. A layer inside a loop (`scan`) has states for each iteration.

    Args:
      beta: the strength of the nudge, on the scale of the loss of one example.
      centred: whether the update compares the nudges beta and -beta, with an error of O(beta^2). False compares beta
        with the free equilibrium, with an error of O(beta), as in the paper.
      free_steps: how many times the states are renewed without a nudge. They start with the forward pass.
      nudged_steps: how many times they are renewed with each nudge, from the free equilibrium. If a nudge cannot reach
        all parameters in so many steps, the rule refuses the network.
      step_size: how far a state moves to its new value, in (0, 1].
      output: `"readout"`: what follows the last activation is computed from the states. `"state"`: the outputs are
        states too, and act on the states below, so that the states settle less easily.
      passing: names of functions that have no states, see `dual_propagation`.

    Returns:
      The rule. It needs `lrules.value_and_grad`.

    Raises:
      ValueError: an option is out of range. `lrules.transform` raises it, because the rule needs the loss. At use:
        there are too few nudged steps for the depth of the network.
      NotImplementedError: at use: a layer reads another layer with no activation between; an activation is not
        recognised, lies inside a `cond` or `shard_map` of the network, or is complex; or there is a modifier.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net = lambda w, x: jnp.tanh(x @ w["first"]) @ w["second"]
      >>> w, x, y = {"first": jnp.eye(2), "second": jnp.ones((2, 1))}, jnp.ones((3, 2)), jnp.zeros((3, 1))
      >>> rule, loss = lrules.equilibrium_propagation(0.1), lrules.testing.half_squared_error
      >>> (value, outputs), grads = lrules.value_and_grad(net, loss, rule)(w, lrules.Feedback({}, {}), x, y)
      >>> grads.params["first"].shape, grads.report["free_outputs"].shape
      ((2, 2), (3, 1))

    References:
      Scellier, Bengio: Equilibrium propagation: bridging the gap between energy-based models and backpropagation
      (2017), sections 2 and 3.
      Laborieux, Ernoult, Scellier, Bengio, Grollier, Querlioz: Scaling equilibrium propagation to deep ConvNets by
      drastically reducing its gradient estimator bias (2021): the symmetric nudge, the readout.
    """
    options = _Options(beta, centred, free_steps, nudged_steps, step_size, output, passing_names(passing))
    options.check()

    def plan(net: Network, graph: Graph, params: Pytree, inputs: Pytree) -> Plan:
        made: Plan = graph.once_for(options, lambda: _plan(options, net, graph, params, inputs))
        return made

    def value_and_grad(net: Network, loss: Loss) -> Callable[..., tuple[tuple[Any, ...], Gradients]]:
        def fn(
            params: Pytree, feedback: Feedback, inputs: Pytree, targets: Pytree, *, rng: jax.Array | None = None
        ) -> tuple[tuple[Any, ...], Gradients]:
            if net.handlers:
                raise NotImplementedError(
                    "equilibrium_propagation sends states down, not errors, so modifiers cannot act on it: leave the "
                    "modifier out, or use another rule"
                )
            graph = net.graph(params, inputs)
            made = plan(net, graph, params, inputs)
            made.check(feedback)

            def objective(outputs: Pytree) -> jax.Array:
                return mean_loss(net, loss, outputs, inputs, targets)

            phases = _Phases(options, made, net.batch_size(inputs), objective, jax.tree.leaves(inputs))
            leaves = net.parameters(params)
            outputs, aux, states = phases.run("record", leaves, {})
            free, report = phases.settled(leaves, states)
            (grads, free_outputs) = phases.compared(leaves, free)
            tree = jax.tree.structure(params)  # frozen weights come after it
            value, free_value = objective(outputs), objective(free_outputs)
            head = (value, outputs, aux) if net.has_aux else (value, outputs)
            report = {"residual": report["residual"], "free_value": free_value, "free_outputs": free_outputs}
            params_grad = jax.tree.unflatten(tree, grads[: tree.num_leaves])
            return head, Gradients(params_grad, {}, feedback.state, report)

        return fn

    transform = no_transform("equilibrium_propagation nudges the states with the loss")
    return Rule(drawn_by(plan), transform, value_and_grad, description=RuleDescription(plan))


@dataclasses.dataclass(frozen=True, eq=False)
class _Options:
    """What the user chose, see `equilibrium_propagation`."""

    beta: float
    centred: bool
    free_steps: int
    nudged_steps: int
    step_size: float
    output: Output
    passing: frozenset[str]

    def check(self) -> None:
        not_traced("beta", self.beta, "a finite number > 0")
        if not is_positive(self.beta):
            raise ValueError(f"beta must be a finite number > 0, got {self.beta!r}")
        require_flags(centred=self.centred)
        for option, value in (("free_steps", self.free_steps), ("nudged_steps", self.nudged_steps)):
            if not (is_whole(value) and value >= 1):
                raise ValueError(f"{option} must be an integer >= 1, got {value!r}")
        not_traced("step_size", self.step_size, "a number in (0, 1]")
        if not (is_number(self.step_size) and 0 < self.step_size <= 1):
            raise ValueError(f"step_size must be a number in (0, 1], got {self.step_size!r}")
        if self.output not in get_args(Output):
            raise ValueError(f'output must be "readout" or "state", got {self.output!r}')


def _plan(options: _Options, net: Network, graph: Graph, params: Pytree, inputs: Pytree) -> Plan:
    """Refuses what the rule cannot serve."""
    own = plan_elsewhere(net, graph, params, inputs)
    activations = treated(graph, options.passing)
    for a in activations:
        inside = [s.split(" ")[0] for s in a.scope if s != "scan"]
        if inside:
            raise NotImplementedError(
                f"the activation {a.site!r} lies inside a {inside[0]}, where equilibrium_propagation cannot keep its "
                f"state: move it out of the {inside[0]}, or use another rule"
            )
        if any(jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in (a.source, a.output)):
            raise NotImplementedError(
                f"the activation {a.site!r} is complex, and equilibrium_propagation has real states: write the network "
                "for the real and the imaginary part, or use another rule"
            )
    _check_layers(graph, {id(a.output) for a in activations})
    depth = depth_of(graph, {a.output.place: None for a in activations})
    depth += len(_ends(graph, activations)) > 0 and options.output == "state"
    if options.nudged_steps < depth:
        raise ValueError(
            f"equilibrium_propagation(nudged_steps={options.nudged_steps}): the nudge crosses one state in each step, "
            f"and in this network it takes {depth} steps to the layer farthest from the outputs, which would learn "
            f"nothing: give at least nudged_steps={depth}"
        )
    return own


def _check_layers(graph: Graph, states: set[int]) -> None:
    """Refuses two layers without a state between them, because the lower would learn by backpropagation."""
    for layer in graph.layers:
        seen, stack = set(states), [layer.operand, layer.weight]
        while stack:
            value = stack.pop()
            if value.layer is not None and value.both:
                raise NotImplementedError(
                    f"the layer {layer.name!r} reads what the layer {value.layer.name!r} makes, with no activation "
                    "between them, so equilibrium_propagation has no state there: put an activation between the two, "
                    "or use another rule"
                )
            if id(value) not in seen and value.both:
                seen.add(id(value))
                stack += value.operands


def _ends(graph: Graph, activations: Sequence[Activation]) -> list[int]:
    """The outputs, by number, that are not the outputs of an activation, so that they may be states of their own."""
    made = {id(a.output) for a in activations}
    outs = graph.outs[: graph.n_outputs]
    return [i for i, v in enumerate(outs) if jnp.issubdtype(v.aval.dtype, jnp.inexact) and id(v.root()[0]) not in made]


class _States(Handler):
    """Runs all activations as states.

    With `record`, the states are those of the forward pass. With `settle`, they are in `frame.inputs`, and the
    cotangent of a state is the new state.
    """

    activations = True

    def __init__(self, sites: set[str], mode: str, rate: float) -> None:
        self.sites, self.mode, self.rate = sites, mode, rate

    def activation(self, activation: Activation, fn: Callable[..., Any], x: jax.Array, frame: Frame) -> Any:
        if activation.site not in self.sites:
            return fn(x)
        if self.mode == "record":
            frame.records[activation.site] = y = fn(x)
            return y
        converted, captured = jax.closure_convert(fn, x)
        return _state(converted, self.rate)(x, frame.inputs[activation.site], captured)


def _state(fn: Callable[..., Any], rate: float) -> Callable[..., Any]:
    """One activation: the state goes up, and down; with what arrives from above, it is renewed."""

    @jax.custom_vjp
    def state(x: jax.Array, s: jax.Array, captured: Any) -> jax.Array:
        return s

    def backward(kept: Any, arriving: jax.Array) -> tuple[Any, Any, None]:
        x, s, captured = kept
        new = fn(x + arriving.astype(x.dtype), *captured)
        return s.astype(x.dtype), s + rate * (new - s), None

    state.defvjp(lambda x, s, captured: (s, (x, s, captured)), backward)
    return state


class _Phases:
    """The free phase and the nudged phases of one network."""

    def __init__(
        self, options: _Options, plan: Plan, batch: Any, objective: Callable[..., Any], inputs: Sequence[Any]
    ) -> None:
        self.options, self.plan, self.inputs = options, plan, inputs
        activations = treated(plan.graph, options.passing)
        self.sites = {a.site for a in activations}
        self.ends = _ends(plan.graph, activations) if options.output == "state" else []
        self.batch, self.slope = batch, jax.grad(objective, allow_int=True)

    def run(self, mode: str, params: Sequence[Any], states: Any) -> tuple[Any, Any, dict[str, Any]]:
        """`(outputs, aux, records)`."""
        frame = Frame(states)
        handlers = (_States(self.sites, mode, self.options.step_size),)
        outputs, aux = evaluate(self.plan, params, {}, self.inputs, self.plan.graph.consts, handlers, frame)
        leaves, tree = jax.tree.flatten(outputs)
        records = {site: frame.records[site] for site in self.sites} if mode == "record" else {}
        for i in self.ends:
            if mode == "record":
                records[f"output {i}"] = leaves[i]
            else:
                leaves[i] = _state(lambda z: z, self.options.step_size)(leaves[i], states[f"output {i}"], [])
        return jax.tree.unflatten(tree, leaves), aux, records

    def phi(self, params: Sequence[Any], states: Any, beta: Any) -> tuple[Any, Callable[..., Any], Any]:
        """`(outputs, pull, nudge)`; `pull(nudge)` gives dPhi/dparams and the new states."""
        outputs, pull = jax.vjp(lambda params, states: self.run("settle", params, states)[0], params, states)

        def nudge(error: Any) -> Any:
            if not jnp.issubdtype(error.dtype, jnp.inexact):
                return error
            return widened(jnp.multiply, error, -beta * jnp.asarray(self.batch, beta.dtype))

        return outputs, pull, jax.tree.map(nudge, self.slope(outputs))

    def settled(self, params: Sequence[Any], states: Any) -> tuple[Any, dict[str, Any]]:
        """The free equilibrium."""
        free = jnp.zeros(())
        outputs = [(a.site, a.output) for a in self.plan.graph.activations if a.site in self.sites]
        ranks = {site: len(output.aval.shape) for site, output in outputs if output is not None}

        def iterate(states: Any, _: Any) -> tuple[Any, jax.Array]:
            new = self.renewed(params, states, free)
            return new, residual(jax.tree.map(jnp.subtract, new, states), new, ranks=ranks)

        return repeat(iterate, states, done=0, iterations=self.options.free_steps)

    def renewed(self, params: Sequence[Any], states: Any, beta: jax.Array) -> Any:
        _, pull, nudge = self.phi(params, states, beta)
        return pull(nudge)[1]

    def compared(self, params: Sequence[Any], free: Any) -> tuple[list[Any], Any]:
        """The update, and the outputs at the free equilibrium."""
        options = self.options

        def phase(beta: jax.Array) -> Any:
            step = lambda states, _: (self.renewed(params, states, beta), None)  # noqa: E731
            states, _ = jax.lax.scan(step, free, None, length=options.nudged_steps)
            _, pull, nudge = self.phi(params, states, beta)
            return pull(nudge)[0]

        outputs, pull, nudge = self.phi(params, free, jnp.zeros(()))
        if options.centred:
            both = jax.lax.map(phase, jnp.asarray([options.beta, -options.beta]))
            difference = jax.tree.map(lambda g: g[1] - g[0], both)
        else:
            difference = jax.tree.map(jnp.subtract, pull(nudge)[0], phase(jnp.asarray(options.beta)))
        scale = options.beta * (2 if options.centred else 1)
        grads = [widened(lambda g, n: g / (scale * n), g, self.batch) for g in difference]
        return grads, outputs
