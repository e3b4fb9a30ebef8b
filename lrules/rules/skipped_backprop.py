"""Skipped backpropagation (Baldi, Sadowski, Lu 2018, section 3).

The signal of hidden layer l is the output error, brought down by the transposed forward weights above it. It does not
get the derivatives of the activations on the way. It gets the derivative of its own layer:

    s_L-1 = W_L^T e,  s_l = W_{l+1}^T s_{l+1},  delta_l = s_l * f'(z_l),  dW_l = delta_l h_{l-1}^T

The paper does not mention other operations between two layers. Here pooling, normalisation and softmax keep their true
derivatives, because they are not the transfer function of a neuron.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lrules.extend import Activation, Direct, Frame, Graph, Handler, Hidden, Plan, layerwise, passing_names, treated
from lrules.rule import Rule


def skipped_backprop(passing: str | Iterable[str] = ()) -> Rule:
    """Skipped backpropagation (SBP): the path of backprop, without the derivatives of the activations on the way.

    delta_l = (W_{l+1}^T W_{l+2}^T ... W_L^T e) * f'(z_l)

    The error goes down through the transposed convolutions. It goes through pooling, and through everything else that
    is not an activation, by the true derivative (max pooling: to the maximum). An activation after the last layer
    counts as an activation on the way.

    Modifiers of the error act on the error that arrives at each hidden signal (see docs/terms.md), and only for the
    layer below it. The changed error does not go further down. So changes do not add up, as they do around sequential
    rules.

    Args:
      passing: names of functions that are not activations here: the error passes through them by their derivative. Give
        names of activations that `lrules.describe` lists (`"tanh"`: all with that name, `"tanh#2"`: only this one), and
        names of nonlinearities that refusals name (`{"exp"}`).

    Returns:
      The rule. It has no feedback weights. It costs as much as backprop and at most one more pass over the activations.

    Raises:
      ValueError: at `init` or use: nothing in the network has a name in `passing`.
      NotImplementedError: at `init` or use: a nonlinearity is not recognised as an activation, or a layer lies inside
        a `cond` or `shard_map`.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]
      >>> params, x = {"a": jnp.ones((1, 1)), "b": -jnp.ones((1, 1)), "c": jnp.ones((1, 1))}, jnp.ones((1, 1))
      >>> f = lrules.transform(net, lrules.skipped_backprop())
      >>> grads = jax.grad(lambda p: f(p, lrules.Feedback({}, {}), x).sum())(params)
      >>> float(grads["a"][0, 0]), float(grads["b"][0, 0])  # the second relu has derivative 0: backprop has 0 for "a"
      (-1.0, 0.0)

    References:
      Baldi, Sadowski, Lu: Learning in the machine: random backpropagation and the deep learning channel (2018), 3.
    """
    spec = Direct(None, pullback=_Pullback(passing_names(passing)))

    def choose_for(graph: Graph) -> Callable[[str], Direct]:
        treated(graph, spec.pullback.passing)  # type: ignore[union-attr]
        return lambda name: spec

    return layerwise(choose_for, [spec], layer=spec)


@dataclasses.dataclass(frozen=True)
class _Pullback:
    """The pullback from the outputs to the hidden signals `records`, through a network with linear activations."""

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
    """Gives activations the derivative one, and takes hidden signals from the frame, to get the error that arrives."""

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
    """The record. The value that it records gets the same error."""
    return record


_tap.defvjp(lambda value, record: (record, None), lambda _, d: (d, d))
