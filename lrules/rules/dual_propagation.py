"""Dual propagation: every activation holds two states, nudged apart by the error (Hoier and Zach 2024).

State k has the pre-activation a_k from below and the top-down signal D_k from above; with ~alpha = 1 - alpha

    sbar_k = alpha s+_k + ~alpha s-_k,  a_k = W sbar_{k-1} + b,  D_k = W^T (s+_{k+1} - s-_{k+1})
    original    s+_k = f(a_k + alpha D_k),   s-_k = f(a_k - ~alpha D_k)                      (Eq. 2)
    adjoint     s+_k = f(a_k + ~alpha D_k),  s-_k = f(a_k - alpha D_k)                       (Eq. 19)
    damped      s+_k = f((a_k + L_k s+_k + alpha D_k) / (1 + L_k)),  s-_k alike              (Eq. 50)
                (at alpha = 0 and 1 one of the two is not nudged, and is f(a_k) as it is)
    dW_k = -(s+_{k+1} - s-_{k+1}) sbar_k^T / beta

Where beta differs by state, D_k is multiplied by beta_k / beta_{k+1} and dW_k divided by beta_{k+1} (Eq. 12, 45).
What lies between two activations (weights, pooling, normalisation, skip connections) is linearised at sbar.

What travels here is delta = -(s+ - s-) / beta, on the scale on which the cotangent arrives: at beta -> 0 it is the
gradient, modifiers of the error find what they expect, and beta may differ by state (Eq. 44). D_k is -n beta_k times
what arrives at state k, with n the batch for the cotangent of a mean and 1 for that of a sum. Each activation is a
`custom_vjp` that takes the arriving D, renews s+ and s- from it, hands down delta in the place of a derivative and
returns the new state as the cotangent of the old one: one backward pass is one sweep down.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from lrules.apply import mean_loss
from lrules.engine.activations import LINEAR, VIEWS, passing_names, treated
from lrules.engine.dtypes import at_least_float32
from lrules.engine.graph import Graph
from lrules.engine.handlers import Frame, Handler, zeros_at
from lrules.engine.jaxprs import INLINED, as_varying, bind, is_literal, scan_counts, varying_axes
from lrules.engine.plan import Plan
from lrules.engine.planning import make_plan
from lrules.engine.records import Block
from lrules.engine.running import evaluate
from lrules.network import Network, as_network
from lrules.options import is_number, is_whole, mesh_axes, require_flags, require_pattern
from lrules.rule import Direct, Feedback, Gradients, Rule, RuleDescription, check_params
from lrules.rules.damping import check_projection, norms, readers
from lrules.rules.differences import check_differences

Number = float | Mapping[str, float]
State = dict[str, dict[str, Any]]  # by site: plus, minus, and what arrived from above

ORDERS = ("forward_backward", "forward", "parallel", "odd_even", "random")
OUTPUTS = ("once", "refreshed", "squared_error")
DAMPINGS = ("spectral", "contracting")


def dual_propagation(
    alpha: Number = 0.5,
    beta: Number = 0.1,
    adjoint: bool = True,
    iterations: int = 1,
    order: str = "forward_backward",
    output: str = "once",
    damping: str | float | None = None,
    input_nudge: float | None = None,
    feedback: Rule | None = None,
    tolerance: float | None = None,
    *,
    axis_name: str | Sequence[str] | None = None,
    passing: str | Iterable[str] = (),
) -> Rule:
    """Dual propagation (DP) and its adjoint (DP^T): differences of two nudged states in the place of derivatives.

    s+_k = f(a_k + ~alpha D_k),  s-_k = f(a_k - alpha D_k),  D_k = W^T (s+_{k+1} - s-_{k+1}),
    dW_k = -(s+_{k+1} - s-_{k+1}) sbar_k^T / beta  with  sbar = alpha s+ + ~alpha s-  and  ~alpha = 1 - alpha

    The outputs and the value are those of the clean forward pass. States start clean; an iteration renews each once
    (`"forward_backward"`: on the way up and on the way down). In `grads.report` of `value_and_grad` are the `residual`
    of each iteration and how many `iterations` ran. For one activation it is the norm of the change of s+ and s- over
    that of s+ - s-, both taken over the whole batch; the residual is the maximum over the hidden activations, with
    `input_nudge` the inputs too; the outputs do not count. It falls to zero where the states converge, and stays of
    order 1 where they do not; it is 1 by definition in the first iteration (but in `"odd_even"` and `"random"`, where
    it is measured), and NaN in those that `tolerance` saves.

    States have the precision of their activation: in half precision the difference of two is mostly rounding unless
    beta is large. Differences of values stand in for derivatives: an activation that declares another derivative than
    its own (a surrogate gradient, a straight-through one) is refused, and so is a complex one that is not holomorphic.

    Max pooling sends error to the maximum of sbar. With the adjoint, sbar is f(a) to O(beta^2) for every alpha; with
    the original at alpha other than 1/2 it is that only to O(beta), so that another element may be the maximum. (The
    authors' programs take the maximum of the last s+ and pool before the activation.)

    Args:
      alpha: the weight of s+ in the mean, in [0, 1]. At 1/2 the two variants are one, and the gradient is exact to
        O(beta^2), else to O(beta). A number, or numbers by regular expression (`re.search`, first match) on the names
        of activations as `lrules.describe` lists them; at the ends there are `"inputs"`, with `input_nudge`, and
        `"outputs"`, with `output="squared_error"`.
      beta: how strongly the outputs are nudged, on the scale of one example's loss. As alpha, a number or by name: then
        D_k is multiplied by beta_k / beta_{k+1} (Eq. 12, 45).
      adjoint: DP^T (Eq. 19 and 22), which is stable for every alpha; else the original (Eq. 2).
      iterations: how many.
      order: `"forward_backward"`, a sweep up and one down: n of them cost (2n + 1) / 3 of backprop. `"forward"`, sweeps
        up alone, in which error falls by one layer per iteration. `"parallel"`, all states at once from the old ones;
        `"odd_even"`, the odd ones at once, then the even ones, where a state's number is that of the activations on the
        longest way from the inputs to it, itself included (in a loop each iteration has its own), the inputs have 0 and
        the outputs one more than the highest before them; `"random"`, one after another in random order (those of a
        scanned activation together): in these three, too, error needs up to as many iterations as there are layers to
        come down, and the lowest weights get none before.
      output: the outputs' error: `"once"`, the loss linearised at the clean outputs; `"refreshed"`, at the present ones
        in each iteration (Eq. 22); `"squared_error"`, the exact minimiser (Eq. 3) for squared errors of single outputs,
        original only. It exists where ~alpha beta h < 1, h the loss's curvature (1 for half a squared error), and is
        NaN where the loss turns out to be more curved.
      damping: of the original: L_k = (beta_k / beta_{k+1}) ||W^T W|| from 5 power iterations (`"spectral"`, Eq. 46),
        max(0, that - 1) / 2, at which a state contracts while its neighbours stand still (`"contracting"`; all together
        may still oscillate), or a number (Eq. 50). For chains of dense layers and convolutions, with constant factors
        and pooling, written without loops; the first two not with normalisation. At alpha 0 or 1 the state that is not
        nudged is not damped.
      input_nudge: g, to let the inputs be states too, damped where the others are: s+_0 = x + ~alpha g D_0 and so on
        (the original: x + alpha g D_0; section 6.1 has g = 1). `"forward_backward"` renews them once, at the end
        of its way down, `"forward"` before all others, with the D of the old states, `"parallel"` with all others,
        `"odd_even"` with the even ones, `"random"` in their turn.
      feedback: a sequential rule whose feedback takes the place of W^T on the way down: `feedback_alignment()`,
        `kolen_pollack()`, a partition of such. It forms the weight gradient, too.
      tolerance: stop as soon as the residual is at most this.
      axis_name: under `shard_map` or `pmap`, the mesh axes over which the mean of the objective runs, if it does (that
        of `value_and_grad` runs over one device's share).
      passing: names of functions that have no states, so that error passes them by their derivative: activations as
        `lrules.describe` lists them (`"tanh"`: all of that name, `"tanh#2"`: that one) and nonlinearities as refusals
        name them (`{"exp"}`).

    Returns:
      The rule. Under `lrules.transform` only with `output="once"`. It needs `rng=` if the order is `"random"`.

    Raises:
      ValueError: an argument is out of range, or two do not go together; at use: fewer forward iterations than layers.
      NotImplementedError: at use: an activation is not recognised, or lies inside a `cond` or `shard_map` of the
        network, declares another derivative than its own, or is complex and not holomorphic; a modifier replaces
        derivatives; the network is no chain that can be damped.

    References:
      Hoier, Zach: Two tales of single-phase contrastive Hebbian learning (2024), sections 3, 5, 6.1, F; Eq. 1 to 3, 18
      to 22, 44 to 50.
    """
    options = _Options(
        alpha, beta, adjoint, iterations, order, output, damping, input_nudge, feedback, tolerance, axis_name,
        passing_names(passing),
    )  # fmt: skip
    _check(options)

    def plan(net, graph, params, inputs) -> Plan:
        return _plan(options, net, graph, params, inputs)

    def init(key, net, params, inputs) -> Feedback:
        net = as_network(net)
        check_params(params)
        return plan(net, net.graph(params, inputs), params, inputs).init(key, net.parameters(params))

    def transform(net, *, reduction="mean"):
        if output != "once":
            raise ValueError(
                f'dual_propagation(output="{output}") needs the loss: use lrules.value_and_grad(net, loss, rule) in '
                'place of transform, or output="once"'
            )

        def f(params, feedback, inputs, *, rng=None):
            network = _Dual(options, net, params, inputs, reduction)
            args, keys = network.arguments(net, params, feedback, inputs, rng)
            outputs, aux = _transformed(network)(*args, keys)
            return (outputs, aux) if net.has_aux else outputs

        return f

    def value_and_grad(net, loss):
        def fn(params, feedback, inputs, targets, *, rng=None):
            network = _Dual(dataclasses.replace(options, axis_name=None), net, params, inputs, "mean")
            args, keys = network.arguments(net, params, feedback, inputs, rng)
            outputs, aux, begin = network.begin(args)
            value, error = jax.value_and_grad(lambda o: mean_loss(net, loss, o, inputs, targets), allow_int=True)(
                outputs
            )
            error_at: Callable = lambda outputs: error  # noqa: E731
            if output != "once":
                error_at = _error_function(network, lambda o: mean_loss(net, loss, o, inputs, targets), outputs)
            (grads, learned, *_), report = network.gradients(args, keys, begin, outputs, error_at)
            tree = jax.tree.structure(params)
            params_grad = jax.tree.unflatten(tree, grads[: tree.num_leaves])
            learned = {name: learned[name] for name in feedback.learned}
            head = (value, outputs, aux) if net.has_aux else (value, outputs)
            return head, Gradients(params_grad, learned, feedback.state, report)

        return fn

    stochastic = order == "random" or (feedback is not None and feedback.stochastic)
    return Rule(init, transform, value_and_grad, stochastic=stochastic, description=RuleDescription(plan))


@dataclasses.dataclass(frozen=True, eq=False)
class _Options:
    alpha: Number
    beta: Number
    adjoint: bool
    iterations: int
    order: str
    output: str
    damping: str | float | None
    input_nudge: float | None
    feedback: Rule | None
    tolerance: float | None
    axis_name: str | Sequence[str] | None
    passing: frozenset[str]


def _check(options: _Options) -> None:
    for name, value, known in (("order", options.order, ORDERS), ("output", options.output, OUTPUTS)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is none of {', '.join(map(repr, known))}")
    require_flags(adjoint=options.adjoint)
    for name, given in (("alpha", options.alpha), ("beta", options.beta)):
        for pattern in given if isinstance(given, Mapping) else ():
            require_pattern(pattern, f"{name}: ")
    for a in options.alpha.values() if isinstance(options.alpha, Mapping) else [options.alpha]:
        if not (is_number(a) and 0 <= a <= 1):
            raise ValueError(f"alpha={a!r} is the weight of one of two states in their mean: give a number in [0, 1]")
    for b in options.beta.values() if isinstance(options.beta, Mapping) else [options.beta]:
        if not (is_number(b) and 0 < b < math.inf):
            raise ValueError(f"beta={b!r} is the strength of the nudge: give a positive number")
    iterations, damping, nudge = options.iterations, options.damping, options.input_nudge
    if not (is_whole(iterations) and iterations >= 1):
        raise ValueError(f"iterations={iterations!r} is no number of iterations: give a whole number from 1 on")
    if damping is not None and damping not in DAMPINGS and not is_number(damping):
        raise ValueError(f'damping={damping!r} is neither "spectral" nor "contracting" nor a number')
    if is_number(damping) and not 0 <= damping < math.inf:
        raise ValueError(f"damping={damping!r} must not be negative: the states are averaged with their old values")
    if options.adjoint and damping is not None:
        raise ValueError(
            "damping belongs to the original, whose states diverge without: give adjoint=False, or no damping"
        )
    if options.adjoint and options.output == "squared_error":
        raise ValueError('output="squared_error" (Eq. 3) belongs to the original: give adjoint=False, or "refreshed"')
    rule = options.feedback
    about = rule.description if isinstance(rule, Rule) else None
    if rule is not None and (about is None or about.modified or rule.value_and_grad is not None):
        raise ValueError(
            "feedback= wants a sequential rule, such as lrules.feedback_alignment(), whose feedback weights take the "
            "place of W^T (modifiers go around dual_propagation, not inside; W^T itself is what it has without)"
        )
    if nudge is not None and not (is_number(nudge) and 0 < nudge < math.inf):
        raise ValueError(f"input_nudge={nudge!r} must be positive: leave it out to keep the inputs as they are")
    tolerance = options.tolerance
    if tolerance is not None and not (is_number(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance={tolerance!r} is what the residual has to fall to: give a number from 0 on")
    mesh_axes(options.axis_name)


class _Own:
    """What `describe` shows at a layer, and why refusals count: this rule is not backprop."""


def _plan(options: _Options, net: Network, graph: Graph, params, inputs) -> Plan:
    activations = treated(graph, options.passing)
    inside = {a.site: s.split(" ")[0] for a in activations for s in a.scope if s != "scan"}
    if inside:
        listed = ", ".join(map(repr, inside))
        what, lie = ("activation", "lies") if len(inside) == 1 else ("activations", "lie")
        raise NotImplementedError(
            f"the {what} {listed} {lie} inside a {next(iter(inside.values()))}, where two states cannot be kept: take "
            f"them out of it, or give passing={{{listed}}}, by which error passes by their derivative"
        )
    check_differences(graph, activations)
    own = make_plan(net, graph, params, inputs, lambda name: _Own(), partition=False)  # type: ignore[arg-type,return-value]
    if options.feedback is None:
        return own
    assert options.feedback.description is not None
    plan = options.feedback.description.plan(net, graph, params, inputs)
    if any(isinstance(spec, Direct) for spec in plan.specs.values()):
        raise ValueError(
            "feedback= wants a sequential rule: direct feedback leaves nothing for the states to hand down"
        )
    return plan


# -------------------------------------------------------------------------------------------------------- one state


@dataclasses.dataclass(frozen=True)
class _Unit:
    """The numbers of one state.

    Attributes:
      alpha: the weight of s+ in the mean.
      up, down: the factors of D in s+ and of -D in s-.
      beta, n: minus what arrives times n beta is D, minus a difference of states over n beta is what goes down. The
        batch n may be symbolic, so that each use makes a number of it.
    """

    alpha: float
    up: float
    down: float
    beta: float
    n: int

    @property
    def scale(self) -> float:
        return self.beta * self.n

    def settle(self, fn, a, arriving, damping, plus, minus):
        """The new states from what comes from below and above, and the old states."""
        d = (-self.scale * arriving.astype(at_least_float32(a.dtype))).astype(a.dtype)
        high, low = a + self.up * d, a - self.down * d
        if damping is not None:  # of the state that is not nudged nothing has to be held back
            n = damping.astype(a.dtype)
            high = (high + n * plus.astype(a.dtype)) / (1 + n) if self.up else high
            low = (low + n * minus.astype(a.dtype)) / (1 + n) if self.down else low
        return fn(high), fn(low)

    def mean(self, plus, minus):
        return self.alpha * plus + (1 - self.alpha) * minus

    def error(self, plus, minus):
        return ((minus - plus).astype(at_least_float32(plus.dtype)) / self.scale).astype(plus.dtype)


class _Dyads(Handler):
    """All activations as pairs of states; their old states are in `frame.inputs`.

    Modes: `clean`: the states are what comes from below. `sweep`: they are renewed on the way up, with what last
    arrived from above. In both they are renewed again on the way down, and the new ones are the cotangents of the old.
    `still`: the old states are sent up and down, and the new ones are the cotangents of the old. `record`: clean states
    are recorded. `up`: they are renewed on the way up and recorded; nothing goes down.
    """

    activations = True

    def __init__(self, units: Mapping[str, _Unit], mode: str, projections: bool):
        self.units, self.mode, self.projections = units, mode, projections

    def activation(self, activation, fn, x, frame):
        if activation.site not in self.units:
            return fn(x)
        if self.projections:
            check_projection(activation.site, fn, x)
        return self.state(activation.site, fn, x, frame)

    def state(self, site, fn, x, frame, *, first: bool = False):
        unit = self.units[site]
        if self.mode == "record":
            y = fn(x)
            frame.records[site] = {"plus": y, "minus": y, "arriving": jnp.zeros_like(y)}
            return y
        old = dict(frame.inputs[site])
        damping = old.pop("damping", None)
        if self.mode == "up":
            plus, minus = unit.settle(fn, x, old["arriving"], damping, old["plus"], old["minus"])
            frame.records[site] = {"plus": plus, "minus": minus, "arriving": old["arriving"]}
            return unit.mean(plus, minus)
        converted, captured = jax.closure_convert(fn, x)
        y, frame.records[site] = _dyad(unit, self.mode, converted, first)(x, old, damping, captured)
        return y


def _dyad(unit: _Unit, mode: str, fn: Callable, first: bool) -> Callable:
    """One activation: what it sends up, and on the way down its new state and what goes further down.

    It also gives a zero, whose cotangent makes JAX take the way down even where no error arrives (`stop_gradient`).
    """

    @jax.custom_vjp
    def dyad(x, old, damping, captured):
        return forward(x, old, damping, captured)[0]

    def forward(x, old, damping, captured):
        zero = jnp.zeros(())
        if mode == "clean":
            y = fn(x, *captured)
            return (y, zero), (x, y, y, old, damping, captured)
        plus, minus = old["plus"], old["minus"]
        if mode == "sweep" and not first:  # nothing has changed below the inputs since the way down
            plus, minus = unit.settle(lambda z: fn(z, *captured), x, old["arriving"], damping, plus, minus)
        return (unit.mean(plus, minus), zero), (x, plus, minus, old, damping, captured)

    def backward(residuals, cotangent):
        arriving, _ = cotangent
        x, plus, minus, old, damping, captured = residuals
        new_plus, new_minus = unit.settle(lambda z: fn(z, *captured), x, arriving, damping, plus, minus)
        down = unit.error(plus, minus) if mode == "still" else unit.error(new_plus, new_minus)
        new = {"plus": new_plus, "minus": new_minus, "arriving": arriving}
        nothing = jax.tree.map(jnp.zeros_like, (damping, captured))
        return (arriving if first and mode == "still" else down.astype(x.dtype)), new, *nothing

    dyad.defvjp(forward, backward)
    return dyad


# ------------------------------------------------------------------------------------------------------ all states


class _Dual:
    """One network with its states."""

    def __init__(self, options: _Options, net: Network, params, inputs, reduction: str):
        self.options = options
        if any(handler.activations for handler in net.handlers):
            raise NotImplementedError(
                "dual propagation has differences of states in the place of derivatives: without_derivatives and "
                "replace_derivative do not go with it: leave them out"
            )
        self.graph = graph = net.graph(params, inputs)
        self.plan = _plan(options, net, graph, params, inputs)
        self.batch = net.batch_size(inputs) if reduction == "mean" else 1
        if reduction == "mean" and options.axis_name is not None:
            self.batch *= int(jax.lax.psum(1, options.axis_name))
        nudged = [
            axis is not None and options.input_nudge is not None and jnp.issubdtype(jnp.result_type(x), jnp.inexact)
            for x, axis in zip(jax.tree.leaves(inputs), net.input_batch_axes(inputs), strict=True)
        ]
        if options.input_nudge is not None and not any(nudged):
            raise ValueError(
                f"dual_propagation(input_nudge={options.input_nudge:g}): no input is a batch of floating-point "
                "numbers, which alone can be nudged: leave input_nudge out"
            )
        firsts = [f"inputs{f'#{k}' if k > 1 else ''}" for k in range(1, sum(nudged) + 1)]
        self.nudged = {i: name for i, name in zip([i for i, n in enumerate(nudged) if n], firsts, strict=True)}
        activations = treated(graph, options.passing)
        self.clean = {a.site: zeros_at(a.output) for a in activations}
        self.clean |= {name: jnp.zeros_like(jax.tree.leaves(inputs)[i]) for i, name in self.nudged.items()}
        self.units = self._units([*self.clean, *(["outputs"] if options.output == "squared_error" else [])])
        if options.damping is not None and any(is_symbolic_dim(zeros.size) for zeros in self.clean.values()):
            raise NotImplementedError(
                "damping tries the activations on numbers, for which a symbolic batch is no shape: give the batch its "
                "size, or leave damping out"
            )
        self.readers = readers(graph, activations, list(self.nudged.values())) if options.damping is not None else {}
        self.levels: dict[str, np.ndarray] = {}
        self.depth = 1
        if options.order != "forward_backward":
            self.levels, self.depth = _levels(graph, set(self.clean))
            self.levels |= {name: np.zeros((), int) for name in self.nudged.values()}
        if options.order == "forward" and options.iterations < self.depth:
            raise ValueError(
                f"dual_propagation(order='forward', iterations={options.iterations}): error falls by one layer per "
                f"iteration, and this network has {self.depth}, so that the lowest would get none: give at least "
                f"iterations={self.depth}"
            )

    def _units(self, names) -> dict[str, _Unit]:
        options, used = self.options, set()

        def number(value: Number, name: str, what: str) -> float:
            if not isinstance(value, Mapping):
                return float(value)
            pattern = next((p for p in value if re.search(p, name)), None)
            if pattern is None:
                raise ValueError(f"{what} names no value for {name!r}: add a pattern, such as '.*', at the end")
            used.add((what, pattern))
            return float(value[pattern])

        units = {}
        for name in names:
            alpha, beta = number(options.alpha, name, "alpha"), number(options.beta, name, "beta")
            gain = 1.0 if name not in self.nudged.values() else float(options.input_nudge or 0)
            up, down = (1 - alpha, alpha) if options.adjoint else (alpha, 1 - alpha)
            units[name] = _Unit(alpha, up * gain, down * gain, beta, self.batch)
            if name == "outputs" and (1 - alpha) * beta >= 1:
                raise ValueError(
                    f'output="squared_error" has no minimiser for (1 - alpha) beta = {(1 - alpha) * beta:g} >= 1: take '
                    "a smaller beta or a larger alpha"
                )
        for what, value in (("alpha", options.alpha), ("beta", options.beta)):
            for pattern in value if isinstance(value, Mapping) else ():
                if (what, pattern) not in used:
                    listed = ", ".join(map(repr, units))
                    raise ValueError(
                        f"{what}: {pattern!r} matches no state first: leave it out or give it one of {listed} (inputs "
                        'are states with input_nudge, outputs with output="squared_error")'
                    )
        return units

    def arguments(self, net: Network, params, feedback: Feedback, inputs, rng):
        """What the network is run on, as arguments of functions with their own derivative; and a key per iteration."""
        self.plan.check(feedback)
        leaves = net.parameters(params)
        weights = {**feedback.fixed, **feedback.learned}
        keys = None
        if self.options.order == "random":
            rng, key = jax.random.split(rng)
            keys = jax.random.key_data(jax.random.split(key, self.options.iterations))
        if self.options.feedback is not None and self.options.feedback.stochastic:
            weights |= self.plan.init(rng, leaves, redrawn=True).fixed
        return (leaves, weights, jax.tree.leaves(inputs), self.graph.consts, net.handlers), keys

    # -- runs

    def run(self, mode: str, args, state: State):
        """`(outputs, aux, records)` of one evaluation, see `_Dyads`."""
        params, weights, inputs, consts, handlers = args
        own = _Dyads(self.units, mode, self.options.damping is not None and mode in ("clean", "record"))
        frame = Frame(inputs=state)
        inputs = [
            own.state(self.nudged[i], lambda z: z, x, frame, first=True) if i in self.nudged else x
            for i, x in enumerate(inputs)
        ]
        outputs, aux = evaluate(self.plan, params, weights, inputs, consts, (own, *handlers), frame)
        return outputs, aux, frame.records

    def vjp(self, mode: str, args, state: State, damping):
        """The outputs, and the function from their error to the new states."""

        def run(state):
            outputs, aux, zeros = self.run(mode, args, _joined(state, damping))
            return (outputs, {site: zeros[site] for site in state}), aux

        (outputs, zeros), pull, aux = jax.vjp(run, state, has_aux=True)
        return outputs, jax.tree_util.Partial(_pull, pull, zeros), aux

    def begin(self, args):
        """The clean outputs, and what the first iteration starts from."""
        damping = self.damping(args)
        if self.options.order == "forward_backward":
            zeros = {site: dict.fromkeys(("plus", "minus", "arriving"), zero) for site, zero in self.clean.items()}
            outputs, pull, aux = self.vjp("clean", args, zeros, damping)
            return outputs, aux, (damping, pull)
        outputs, aux, records = self.run("record", args, {})
        return outputs, aux, (damping, records)

    def gradients(self, args, keys, begin, outputs, error_at: Callable):
        """`(cotangents of args, report)` after all iterations."""
        options, (damping, start) = self.options, begin
        split = _Floats(outputs)
        error = split.take(error_at(outputs))
        if options.order == "forward_backward":
            state = start(split.put(error))
            done = 1
        elif options.order in ("forward", "parallel"):  # the first iteration renews the outputs alone
            state, done = start, 1
        else:
            state, error, done = start, [jnp.zeros_like(e) for e in error], 0

        def step(carry, key):
            state, error = carry
            if options.order == "forward_backward":
                outputs, pull, _ = self.vjp("sweep", args, state, damping)
                error = split.take(error_at(outputs))
                return pull(split.put(error)), error
            if options.order in ("forward", "parallel"):
                outputs, pull, _ = self.vjp("still", args, state, damping)
                new = pull(split.put(error))
                if options.order == "forward":
                    new = {site: {**state[site], "arriving": new[site]["arriving"]} for site in state}
                    outputs, _, new = self.run("up", args, _joined(new, damping))
                return new, split.take(error_at(outputs))
            if options.order == "odd_even":
                for parity in (1, 0):
                    state, error = self.renew(args, state, error, damping, split, error_at, self._parities(parity))
                return state, error
            names = [*self.clean, "outputs"]
            branches = [
                lambda c, name=name: self.renew(args, c[0], c[1], damping, split, error_at, {name: True})
                for name in names
            ]
            shuffled = jax.random.permutation(jax.random.wrap_key_data(key), len(names))
            return jax.lax.scan(lambda c, k: (jax.lax.switch(k, branches, c), None), (state, error), shuffled)[0]

        (state, error), report = self.repeat(step, (state, error), keys, done)

        def still(*args):
            outputs, aux, _ = self.run("still", args, _joined(state, damping))
            return outputs, aux

        _, pull, _ = jax.vjp(still, *args, has_aux=True)
        return pull(split.put(error)), report

    def _parities(self, parity: int) -> dict[str, Any]:
        chosen = {name: levels % 2 == parity for name, levels in self.levels.items()}
        return chosen | {"outputs": self.depth % 2 == parity}

    def renew(self, args, state, error, damping, split, error_at, chosen: Mapping[str, Any]):
        """Renews the chosen states at once, from the old ones; masks choose iterations of a scan."""
        outputs, pull, _ = self.vjp("still", args, state, damping)
        new = pull(split.put(error))
        renewed = {}
        for site, old in state.items():
            mask = np.asarray(chosen.get(site, False))
            if mask.all():
                renewed[site] = new[site]
            elif not mask.any():
                renewed[site] = old
            else:
                renewed[site] = jax.tree.map(
                    lambda o, n, mask=mask: jnp.where(mask.reshape(mask.shape + (1,) * (n.ndim - mask.ndim)), n, o),
                    old, new[site],
                )  # fmt: skip
        return renewed, split.take(error_at(outputs)) if chosen.get("outputs", False) else error

    def repeat(self, step, carry, keys, done: int):
        """The iterations that are left after `done`, stopping early where a tolerance says so; and the report."""
        options, dtype = self.options, jnp.result_type(float)
        keys = None if keys is None else keys[done:]

        def iteration(carry, key):
            new = step(carry, key)
            residual = _residual(carry[0], new[0])
            return new, residual if options.axis_name is None else jax.lax.pmax(residual, options.axis_name)

        if options.tolerance is None or options.iterations == done:
            found = jnp.ones(done, dtype)
            if options.iterations > done:
                carry, rest = jax.lax.scan(iteration, carry, keys, length=options.iterations - done)
                found = jnp.concatenate([found, rest])
            return carry, {"residual": found, "iterations": jnp.asarray(options.iterations)}

        least = max(self.depth, done)  # before that many, the lowest layers have not met any error

        def more(loop):
            i, _, found = loop
            return (i < options.iterations) & ((i < least) | ~(found[i - 1] <= options.tolerance))

        def body(loop):
            i, carry, found = loop
            carry, residual = iteration(carry, None if keys is None else keys[i - done])
            return i + 1, carry, found.at[i].set(residual)

        found = jnp.where(jnp.arange(options.iterations) < done, jnp.ones((), dtype), jnp.full((), jnp.nan, dtype))
        if options.axis_name is None:
            found = as_varying(found, varying_axes(jax.typeof(_residual(carry[0], carry[0]))))
        count, carry, found = jax.lax.while_loop(more, body, (jnp.asarray(done), carry, found))
        return carry, {"residual": found, "iterations": count}

    # -- damping

    def damping(self, args) -> dict[str, Any]:
        """L of every state that a layer reads."""
        options = self.options
        if options.damping is None:
            return {}
        if not isinstance(options.damping, str):
            return {site: jnp.asarray(options.damping, jnp.result_type(float)) for site in self.readers}
        params, _, inputs, consts, _ = args
        found: dict[str, Any] = {}
        for site, above, norm in norms(self.graph, set(self.clean), params, inputs, consts, self.readers):
            beta = self.units[site].beta * (float(options.input_nudge or 0) if site in self.nudged.values() else 1)
            higher = self.units[above].beta if above in self.units else self.units[site].beta
            if options.output == "refreshed" and above == "outputs":  # losses of a curvature up to 1
                higher = min(higher, 1.0)
            found[site] = found.get(site, 0) + beta / higher * norm
        if options.damping == "spectral":
            return found
        return {site: jnp.maximum(norm - 1, 0) / 2 for site, norm in found.items()}


def _pull(pull: Callable, zeros, error) -> State:
    return pull((error, zeros))[0]


def _transformed(network: _Dual) -> Callable:
    """The network as one function whose backward pass is all of dual propagation."""

    @jax.custom_vjp
    def run(params, weights, inputs, consts, handlers, keys):
        return evaluate(network.plan, params, weights, inputs, consts, handlers, Frame())

    def forward(*args):
        outputs, aux, begin = network.begin(args[:-1])
        return (outputs, aux), (args, begin, outputs)

    def backward(residuals, cotangent):
        (*args, keys), begin, outputs = residuals
        grads, _ = network.gradients(tuple(args), keys, begin, outputs, lambda outputs: cotangent[0])
        return *grads, None

    run.defvjp(forward, backward)
    return run


class _Floats:
    """The floating-point leaves of outputs, and cotangents made of them."""

    def __init__(self, outputs):
        leaves, self.tree = jax.tree.flatten(outputs)
        self.real = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves]
        self.others = [None if r else np.zeros(jnp.shape(x), jax.dtypes.float0)
                       for r, x in zip(self.real, leaves, strict=True)]  # fmt: skip

    def take(self, error) -> list[Any]:
        return [e for e, real in zip(jax.tree.leaves(error), self.real, strict=True) if real]

    def put(self, floats, others=None):
        """Outputs with these floats, and for the rest `others` (default: cotangents of whole numbers)."""
        given, others = iter(floats), self.others if others is None else others
        return jax.tree.unflatten(self.tree, [next(given) if r else o for r, o in zip(self.real, others, strict=True)])


def _joined(state: State, damping: Mapping[str, Any]) -> State:
    return {site: {**values, "damping": damping[site]} if site in damping else values for site, values in state.items()}


def _norm(x):
    return jnp.sqrt(jnp.sum(jnp.square(jnp.abs(x.astype(at_least_float32(x.dtype))))))


def _residual(old: State, new: State):
    """The largest change of a pair of states, relative to the difference between the two.

    Pairs without one, which no error reaches, count where they change what those above them do.
    """
    found = jnp.zeros((), jnp.result_type(float))
    for site, pair in new.items():
        change = _norm(jnp.stack([pair[s] - old[site][s] for s in ("plus", "minus")]))
        size = _norm(pair["plus"] - pair["minus"])
        here = jnp.where(size == 0, 0, change / jnp.where(size == 0, 1, size))
        found = jnp.maximum(found, here.astype(found.dtype))
    return found


# ------------------------------------------------------------------------------------------------------ the outputs


def _error_function(network: _Dual, objective: Callable, outputs) -> Callable:
    """The outputs' error at given outputs, for those that are not linearised once."""
    gradient = jax.grad(objective, allow_int=True)
    if network.options.output == "refreshed":
        return gradient
    unit, n, split = network.units["outputs"], network.batch, _Floats(outputs)

    def slopes(floats, outputs):
        return split.take(gradient(split.put(floats, jax.tree.leaves(outputs))))

    if not _affine(Network(slopes).graph(split.take(outputs), outputs).outs):
        raise ValueError(
            'output="squared_error" has a closed form for squared errors of single outputs alone, and this loss cannot '
            "be seen to be quadratic in each of them by itself: write it as a sum of jnp.square(outputs - targets), or "
            'take output="refreshed"'
        )

    def exact(outputs):
        """-(s+ - s-) / (n beta), s+ and s- the minimisers of Eq. 3 for the gradient g and the curvature h."""

        def leaf(g, h):
            h = h * n * unit.beta
            a, b = unit.alpha, 1 - unit.alpha
            return g * jnp.where(b * h < 1, a / (1 + a * h) + b / (1 - b * h), jnp.nan)

        floats = split.take(outputs)
        found = jax.jvp(lambda floats: slopes(floats, outputs), (floats,), (jax.tree.map(jnp.ones_like, floats),))
        return split.put([leaf(g, h) for g, h in zip(*found, strict=True)])

    return exact


def _affine(slopes) -> bool:
    """Whether each element of each slope is an affine function of the output at its own place, and of no other."""
    stack: list[tuple[Any, int, tuple[Any, ...]]] = [(value, i, ()) for i, value in enumerate(slopes)]
    seen: set[Any] = set()
    while stack:  # a value, whose slope it is, and the views between
        value, i, views = stack.pop()
        if not value.params or (id(value), i, views) in seen:
            continue
        seen.add((id(value), i, views))
        operands, eqn = [v for v in value.operands if v.params], value.producer
        if not operands:
            if value.params != {i} or not _in_place(value, views):
                return False
            continue
        name = eqn.primitive.name
        if name == "integer_pow" and eqn.params["y"] == 0:
            continue
        linear = name in LINEAR and (name != "mul" or len(operands) == 1)
        linear |= name == "integer_pow" and eqn.params["y"] == 1  # so do older versions of JAX differentiate squares
        linear |= name == "div" and not value.operands[1].params
        linear |= name == "select_n" and not value.operands[0].params
        view = name in VIEWS and operands[0].aval.size == value.aval.size
        if not (linear or view):
            return False
        stack += [(operand, i, (eqn, *views) if view else views) for operand in operands]
    return True


def _in_place(value, views) -> bool:
    """Whether views leave all elements in their order."""
    if not any(eqn.primitive.name == "transpose" for eqn in views):
        return True
    if is_symbolic_dim(value.aval.size):
        raise NotImplementedError(
            f"where the transposes in the loss put outputs of the symbolic shape {value.aval.shape} cannot be told: "
            'give all axes their sizes, or take output="refreshed"'
        )
    order = np.arange(value.aval.size).reshape(value.aval.shape)
    with jax.ensure_compile_time_eval():
        places = jnp.asarray(order)
        for eqn in views:
            (places,) = bind(eqn, [places])
        return bool((np.asarray(places).ravel() == order.ravel()).all())


# ------------------------------------------------------------------------------------------------------ the levels


def _levels(graph: Graph, sites: set[str]) -> tuple[dict[str, np.ndarray], int]:
    """The number of activations up to each state, per iteration of the loops, and that of the outputs."""

    def walk(block: Block, ins: list[int]) -> tuple[list[int], dict[str, Any]]:
        env = dict.fromkeys(block.jaxpr.constvars, 0) | dict(zip(block.jaxpr.invars, ins, strict=True))
        found: dict[str, Any] = {}

        def read(atom) -> int:
            return 0 if is_literal(atom) else env[atom]

        for index, eqn in enumerate(block.jaxpr.eqns):
            levels = [read(v) for v in eqn.invars]
            outs = [max(levels, default=0)] * len(eqn.outvars)
            if index in block.regions and block.regions[index].activation.site in sites:
                region = block.regions[index]
                outs = [read(region.root) + 1]
                found[region.activation.site] = np.asarray(outs[0])
            elif index in block.children and eqn.primitive.name == "scan":
                outs, inner = scan(block.children[index][0], eqn.params, levels)
                found |= inner
            elif index in block.children and eqn.primitive.name in INLINED:
                outs, inner = walk(block.children[index][0], levels)
                found |= inner
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in block.jaxpr.outvars], found

    def scan(child: Block, params, levels: list[int]) -> tuple[list[int], dict[str, Any]]:
        n_consts, n_carry = scan_counts(params)
        carry, stacks, ys = levels[n_consts : n_consts + n_carry], [], []
        if is_symbolic_dim(params["length"]):
            raise NotImplementedError(
                f"this order numbers the iterations of a scan, whose length is the symbolic {params['length']}: give "
                'that axis of the inputs its size, or take order="forward_backward"'
            )
        for _ in range(params["length"]):
            outs, found = walk(child, [*levels[:n_consts], *carry, *levels[n_consts + n_carry :]])
            carry = outs[:n_carry]
            ys.append(outs[n_carry:])
            stacks.append(found)
        if params["reverse"]:
            stacks.reverse()
        stacked = {site: np.stack([found[site] for found in stacks]) for site in stacks[0]} if stacks else {}
        return [*carry, *(max(column) for column in zip(*ys, strict=True))], stacked

    outs, found = walk(graph.block, [0] * len(graph.block.jaxpr.invars))
    return found, max(outs[: graph.n_outputs], default=0) + 1
