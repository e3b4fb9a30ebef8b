"""One state: how it is renewed, and what it sends up and down."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lrules.engine import settling
from lrules.engine.regions import RegionFunction
from lrules.extend import Activation, Frame, Handler, at_least_float32
from lrules.rules.dual_propagation.options import Options
from lrules.typing import AxisName

State = dict[str, dict[str, Any]]  # by name: plus (s+), minus (s-), and the error that last arrived from above


@dataclasses.dataclass(frozen=True)
class Unit:
    """The numbers of one state.

    Attributes:
      alpha: the weight of s+ in the mean.
      adjoint: which of the two equations renews it.
      gain: the factor of D; it is 1 except for inputs.
      beta, n: D is the arriving error times -n beta, and s+ - s- over -n beta goes down. The batch n may be symbolic.
    """

    alpha: float
    adjoint: bool
    gain: float
    beta: float
    n: int

    @property
    def up(self) -> float:
        """The factor of D in s+."""
        return self.gain * ((1 - self.alpha) if self.adjoint else self.alpha)

    @property
    def down(self) -> float:
        """The factor of -D in s-."""
        return self.gain * (self.alpha if self.adjoint else (1 - self.alpha))

    @property
    def scale(self) -> float:
        return self.beta * self.n

    def settle(
        self, fn: Callable[..., Any], a: jax.Array, arriving: jax.Array, damping: Any, plus: jax.Array, minus: jax.Array
    ) -> tuple[Any, Any]:
        """The new s+ and s-, from the pre-activation a, the error from above, and the old values."""
        d = (-self.scale * arriving.astype(at_least_float32(a.dtype))).astype(a.dtype)
        high, low = a + self.up * d, a - self.down * d
        if damping is not None:  # a value for which D has the factor 0 needs no damping
            n = damping.astype(a.dtype)
            high = (high + n * plus.astype(a.dtype)) / (1 + n) if self.up else high
            low = (low + n * minus.astype(a.dtype)) / (1 + n) if self.down else low
        return fn(high), fn(low)

    def mean(self, plus: jax.Array, minus: jax.Array) -> jax.Array:
        return self.alpha * plus + (1 - self.alpha) * minus

    def error(self, plus: jax.Array, minus: jax.Array) -> jax.Array:
        """The error that goes down, (s- - s+) over n beta.

        The select changes no number. Without it, XLA for CPUs computes s+ and s- again for each reader of the error,
        as the last operation before the readers would have one array only: it takes such an operation for cheap.
        """
        difference = minus - plus
        scaled = (difference.astype(at_least_float32(plus.dtype)) / self.scale).astype(plus.dtype)
        return _scaled(difference, scaled)


@jax.custom_jvp
def _scaled(difference: jax.Array, scaled: jax.Array) -> jax.Array:
    return jnp.where(difference == 0, difference, scaled)


_scaled.defjvp(lambda primals, tangents: (_scaled(*primals), tangents[1]))  # also where both are zero


def units_of(options: Options, names: Sequence[str], inputs: Sequence[str], n: int) -> dict[str, Unit]:
    """The numbers of each state.

    Args:
      options: the options of the rule.
      names: the names of the states.
      inputs: the names of the states that are inputs.
      n: the batch, see `Unit`.

    Raises:
      ValueError: alpha or beta has no number for a state, or has a pattern that no state uses; or squared errors have
        no minimiser.
    """
    for option in (options.alpha, options.beta):
        option.check(names, ' (inputs are states with input_nudge, outputs with output="squared_error")')
    units = {}
    for name in names:
        alpha, beta = float(options.alpha.of(name)), float(options.beta.of(name))
        gain = float(options.input_nudge or 0) if name in inputs else 1.0
        units[name] = Unit(alpha, bool(options.adjoint), gain, beta, n)
        if name == "outputs" and (1 - alpha) * beta >= 1:
            raise ValueError(
                f'output="squared_error" has a minimiser only if (1 - alpha) beta < 1, got {(1 - alpha) * beta:g}: '
                "give a smaller beta or a larger alpha"
            )
    return units


class Dyads(Handler):
    """Runs all activations as pairs s+, s-; the old pairs are in `frame.inputs`.

    Modes:
      clean: on the way up, s+ and s- are both f(a). On the way down, they are renewed.
      sweep: on the way up, they are renewed with the error that last arrived from above. On the way down, they are
        renewed again.
      still: the old pairs are sent up and down. On the way down, the new pairs are computed.
      record: clean pairs are recorded on the way up; nothing goes down.
      up: the pairs are renewed on the way up, and recorded; nothing goes down.

    In the first three modes, the new pairs are the cotangents of the old pairs.
    """

    activations = True

    def __init__(self, units: Mapping[str, Unit], mode: str, check: Callable[..., None] | None = None) -> None:
        """`check(site, fn, x)` refuses activations that the options do not serve."""
        self.units, self.mode, self.check = units, mode, check

    def activation(self, activation: Activation, fn: Callable[..., Any], x: jax.Array, frame: Frame) -> Any:
        if activation.site not in self.units:
            return fn(x)
        if self.check is not None:
            self.check(activation.site, fn, x)
        return self.state(activation.site, fn, x, frame)

    def state(self, site: str, fn: Callable[..., Any], x: jax.Array, frame: Frame, *, first: bool = False) -> Any:
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
        if isinstance(fn, RegionFunction):  # one for all activations that compute the same
            program, captured = fn.program, fn.captured
            if fn.pieces is None or program.key is None:
                run = _dyad(unit, self.mode, program, first)
            else:
                key = ("dyad", unit, self.mode, first, program.key)
                run = fn.pieces.shared(key, lambda: _dyad(unit, self.mode, program, first, shared=True))
        else:
            converted, captured = jax.closure_convert(fn, x)
            run = _dyad(unit, self.mode, converted, first)
        y, frame.records[site] = run(x, old, damping, captured)
        return y


def _dyad(unit: Unit, mode: str, fn: Callable[..., Any], first: bool, *, shared: bool = False) -> Callable[..., Any]:
    """One activation; its backward pass renews its state and sends down the difference instead of a derivative.

    If many activations share it, its backward pass is traced once. It also returns a zero. The cotangent of this zero
    makes JAX run the backward pass even if no error arrives (`stop_gradient`).
    """

    @jax.custom_vjp
    def dyad(x: jax.Array, old: Any, damping: Any, captured: Any) -> tuple[Any, ...]:
        return forward(x, old, damping, captured)[0]

    def forward(x: jax.Array, old: Any, damping: Any, captured: Any) -> tuple[Any, Any]:
        zero = jnp.zeros(())
        if mode == "clean":
            y = fn(x, *captured)
            return (y, zero), (x, y, y, damping, captured)
        plus, minus = old["plus"], old["minus"]
        if mode == "sweep" and not first:  # nothing below the inputs has changed since the way down
            plus, minus = unit.settle(lambda z: fn(z, *captured), x, old["arriving"], damping, plus, minus)
        return (unit.mean(plus, minus), zero), (x, plus, minus, damping, captured)

    def renew(arriving: jax.Array, x: jax.Array, plus: Any, minus: Any, damping: Any, captured: Any) -> tuple[Any, Any]:
        new_plus, new_minus = unit.settle(lambda z: fn(z, *captured), x, arriving, damping, plus, minus)
        down = unit.error(plus, minus) if mode == "still" else unit.error(new_plus, new_minus)
        new = {"plus": new_plus, "minus": new_minus, "arriving": arriving}
        return (arriving if first and mode == "still" else down.astype(x.dtype)), new

    renewed = jax.jit(renew) if shared else renew

    def backward(residuals: Any, cotangent: Any) -> tuple[Any, ...]:
        return *renewed(cotangent[0], *residuals), None, None

    dyad.defvjp(forward, backward)
    return dyad


def with_damping(state: State, damping: Mapping[str, Any]) -> State:
    """The states, with L for those that have one."""
    return {site: {**values, "damping": damping[site]} if site in damping else values for site, values in state.items()}


def residual(old: State, new: State, axis_name: AxisName = None, ranks: Mapping[str, int] | None = None) -> jax.Array:
    """The largest change of a pair s+, s-, divided by the norm of s+ - s-; the norms are over all devices of the axes.

    It leaves out a pair without a difference, because no error reaches it. If such a pair changes, the pairs above
    show it. `ranks` has the rank of each state: before it are the axes of loops, which have a pair for each iteration.
    """
    ranks = ranks or {}
    changes, sizes, both = {}, {}, {}
    for site, pair in new.items():
        plus, minus = pair["plus"], pair["minus"]
        rank = ranks.get(site, plus.ndim)
        axis = plus.ndim - rank  # s+ and s- beside each other, behind the axes of loops
        changes[site] = jnp.stack([plus - old[site]["plus"], minus - old[site]["minus"]], axis)
        sizes[site], both[site] = jnp.expand_dims(plus - minus, axis), rank + 1
    return settling.residual(changes, sizes, axis_name, both)
