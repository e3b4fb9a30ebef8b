"""Skipped backpropagation (Baldi, Sadowski, Lu 2018, section 3).

The signal of hidden layer l is the output error brought down by the transposed forward weights above it, without the
derivatives of the activations on the way; the layer's own derivative is applied:

    s_L-1 = W_L^T e,  s_l = W_{l+1}^T s_{l+1},  delta_l = s_l * f'(z_l),  dW_l = delta_l h_{l-1}^T

Of what may lie between two layers besides, the paper speaks of nothing. Here pooling keeps its true derivative, as do
normalisation and softmax: none of them is a neuron's transfer function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lrules.constructors import layerwise
from lrules.engine.activations import passing_names, treated
from lrules.engine.graph import Graph
from lrules.engine.handlers import Frame, Handler
from lrules.engine.plan import Plan
from lrules.engine.records import Activation, Hidden
from lrules.rule import Direct, Rule


def skipped_backprop(passing: str | Iterable[str] = ()) -> Rule:
    """Skipped backpropagation (SBP): backprop's path to each layer, without the activations' derivatives on the way.

    delta_l = (W_{l+1}^T W_{l+2}^T ... W_L^T e) * f'(z_l)

    Convolutions go down by their transpose, pooling and whatever else is no activation by its true derivative
    (max pooling: to the maximum). An activation after the last layer counts as one on the way.

    Modifiers of the error act on what arrives at each hidden signal, for the layer below it alone: nothing that they
    change goes further down, so that, other than around sequential rules, modifications do not accumulate.

    Args:
      passing: names of functions that are no activations, so that error passes them by their derivative: activations as
        `lrules.describe` lists them (`"tanh"`: all of that name, `"tanh#2"`: that one) and nonlinearities as refusals
        name them (`{"exp"}`).

    Returns:
      The rule; it needs no feedback. It costs what backprop costs, up to a second pass over the activations.

    Raises:
      ValueError: at `init` or use: a name in `passing` is that of nothing in the network.
      NotImplementedError: at `init` or use: a nonlinearity is not recognised as an activation, or a layer lies inside
        a `cond` or `shard_map`.

    References:
      Baldi, Sadowski, Lu: Learning in the machine: random backpropagation and the deep learning channel (2018), 3.
    """
    spec = Direct(None, pullback=_Pullback(passing_names(passing)))

    def choose_for(graph: Graph) -> Callable[[str], Direct]:
        treated(graph, spec.pullback.passing)  # type: ignore[union-attr]
        return lambda name: spec

    return layerwise(choose_for, layer=spec)


@dataclasses.dataclass(frozen=True)
class _Pullback:
    """The pullback from the outputs to the hidden signals `records`, through a network whose activations are linear."""

    passing: frozenset[str]

    def __call__(
        self, plan: Plan, params: Sequence[Any], inputs: Sequence[Any], consts: Sequence[Any], records: Any
    ) -> Callable[..., Any]:
        handler = _Linear(set(records), {a.site for a in treated(plan.graph, self.passing)})

        def network(records: Any) -> tuple[Any, Any]:
            frame = Frame(records)
            return plan.graph.run(params, inputs, consts=consts, handlers=(handler,), frame=frame, marks=plan.marks)

        _, pull, _ = jax.vjp(network, records, has_aux=True)
        return jax.tree_util.Partial(_only, pull)


def _only(pull: Callable[..., Any], errors: Any) -> Any:
    (signals,) = pull(errors)
    return signals


class _Linear(Handler):
    """Activations with derivative one; hidden signals taken from the frame, so that what arrives there comes out."""

    activations = True

    def __init__(self, names: set[str], sites: set[str]) -> None:
        self.names, self.sites = names, sites

    def activation(self, activation: Activation, fn: Callable[..., Any], x: jax.Array, frame: Frame) -> Any:
        if activation.site not in self.sites:
            return fn(x)
        return _straight(jax.lax.stop_gradient(fn(x)), x)

    def hidden(self, hidden: Hidden, value: Any, frame: Frame) -> Any:
        return _tap(value, frame.inputs[hidden.name]) if hidden.name in self.names else value


@jax.custom_vjp
def _straight(y: jax.Array, x: jax.Array) -> jax.Array:
    """y, with the derivative of x."""
    return y


_straight.defvjp(lambda y, x: (y, jnp.zeros((), x.dtype)), lambda like, d: (None, d.astype(like.dtype)))


@jax.custom_vjp
def _tap(value: Any, record: jax.Array) -> jax.Array:
    """The record, whose error is seen besides by the value that it is a record of."""
    return record


_tap.defvjp(lambda value, record: (record, None), lambda _, d: (d, d))
