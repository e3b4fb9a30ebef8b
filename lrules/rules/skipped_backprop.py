"""Skipped backpropagation (Baldi, Sadowski, Lu 2018, section 3).

The signal of hidden layer l is the output error brought down by the transposed forward weights above it, without the
derivatives of the activations on the way; the layer's own derivative is applied:

    s_L-1 = W_L^T e,  s_l = W_{l+1}^T s_{l+1},  delta_l = s_l * f'(z_l),  dW_l = delta_l h_{l-1}^T

Of what may lie between two layers besides, the paper speaks of nothing. Here pooling keeps its true derivative, as do
normalisation and softmax: none of them is a neuron's transfer function.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lrules.activations import refuse_doubts
from lrules.constructors import layerwise
from lrules.network import Frame, Handler
from lrules.plan import Direct, Plan
from lrules.rule import Rule


def skipped_backprop() -> Rule:
    """Skipped backpropagation (SBP): backprop's path to each layer, without the activations' derivatives on the way.

    delta_l = (W_{l+1}^T W_{l+2}^T ... W_L^T e) * f'(z_l)

    Convolutions go down by their transpose, pooling and whatever else is no activation by its true derivative
    (max pooling: to the maximum). An activation after the last layer counts as one on the way.

    Returns:
      The rule; it needs no feedback. It costs what backprop costs, up to a second pass over the activations.

    Raises:
      NotImplementedError: at `init` or use: a nonlinearity is not recognised as an activation, or a layer lies inside
        a `cond` or `shard_map`.

    References:
      Baldi, Sadowski, Lu: Learning in the machine: random backpropagation and the deep learning channel (2018), 3.
    """
    spec = Direct(None, channel=_channel)

    def choose_for(graph):
        refuse_doubts(graph.doubts)
        return lambda name: spec

    return layerwise(choose_for, layer=spec)


def _channel(plan: Plan, params, inputs, consts, records):
    """The pullback from the outputs to the hidden signals `records`, through a network whose activations are linear."""
    refuse_doubts(plan.graph.doubts)
    handler = _Linear(set(records))

    def network(records):
        frame = Frame(records)
        return plan.graph.run(params, inputs, consts=consts, handlers=(handler,), frame=frame, marks=plan.marks)

    _, pull, _ = jax.vjp(network, records, has_aux=True)
    return jax.tree_util.Partial(_only, pull)


def _only(pull, errors):
    (signals,) = pull(errors)
    return signals


class _Linear(Handler):
    """Activations with derivative one; hidden signals taken from the frame, so that what arrives there comes out."""

    activations = True

    def __init__(self, names: set[str]):
        self.names = names

    def activation(self, activation, fn, x, frame):
        return _straight(jax.lax.stop_gradient(fn(x)), x)

    def hidden(self, hidden, value, frame):
        return _tap(value, frame.inputs[hidden.name]) if hidden.name in self.names else value


@jax.custom_vjp
def _straight(y, x):
    """y, with the derivative of x."""
    return y


_straight.defvjp(lambda y, x: (y, jnp.zeros((), x.dtype)), lambda like, d: (None, d.astype(like.dtype)))


@jax.custom_vjp
def _tap(value, record):
    """The record, whose error is seen besides by the value that it is a record of."""
    return record


_tap.defvjp(lambda value, record: (record, None), lambda _, d: (d, d))
