"""BackMAN: every neuron maximises the attention that the next layer pays it (Soltani Moakhar et al.).

r is the error that arrives at a layer's outputs, a what the layer reads, both for the whole batch. Per output neuron i

    c_i = alpha / ||(r^T a)_i||_2                     (Eq. 7; filters of a convolution: Eq. 20)
    g = r diag(c)                                     (Eq. 6, 16)
    dW = g^T a,  so that ||dW_i|| = alpha             (Eq. 5, 15)
    what goes down: g W                               (Eq. 9, 18), computed as r (diag(c) W): no third product

The paper leaves c undefined for a neuron whose raw gradient vanishes. Here a norm below 1e-15 is replaced by the mean
norm of the layer, and c is 0 if that is zero too.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lrules.constructors import sequential
from lrules.engine.dtypes import at_least_float32
from lrules.engine.jaxprs import varying_axes
from lrules.engine.product import Product
from lrules.engine.records import Layer
from lrules.options import is_number, mesh_axes
from lrules.rule import Rule
from lrules.typing import AxisName

DEAD = 1e-15


def backman(alpha: float | jax.Array | Literal["gradient_norm"] = 1.0, *, axis_name: AxisName = None) -> Rule:
    """BackMAN: each neuron's weight gradient, and the error it sends down, scaled to a norm of alpha.

    c_i = alpha / ||(r^T a)_i||,  dW_i = c_i (r^T a)_i,  and g W goes down with g = r diag(c)

    The norm is over the whole batch, so gradients of microbatches do not add up (`rule.additive` is False). Biases and
    normalisation scales take the signal that arrives at them. A weight that is used more than once gets alpha from each
    use. The cotangent is taken as it arrives: weight gradients do not depend on its scale, bias gradients do.

    Args:
      alpha: the norm of each neuron's weight gradient; or `"gradient_norm"`: per layer such that ||g||_F = ||r||_F
        (section 4.2).
      axis_name: under `shard_map` or `pmap`, the mesh axes over which the batch is spread. The gradients of the devices
        then sum to that of the whole batch. Not needed under `jit`.

    Returns:
      The rule; it needs no feedback.

    Raises:
      ValueError: alpha is neither a finite number from 0 on nor `"gradient_norm"`; or at use, the batch is spread over
        mesh axes that `axis_name` does not name.
      TypeError: `axis_name` is no name and no names.

    References:
      Soltani Moakhar et al.: Seeking next layer neurons' attention for error-backpropagation-like training in a
      multi-agent network framework, sections 3.2 and A.2, Eq. 5 to 9 and 14 to 20.
    """
    named = isinstance(alpha, str) and alpha == "gradient_norm"
    if not named and not (is_number(alpha) and (isinstance(alpha, jax.core.Tracer) or 0 <= alpha < math.inf)):
        raise ValueError(f'alpha={alpha!r} is neither a number nor "gradient_norm": give that, or a number from 0 on')
    outer = mesh_axes(axis_name)

    def coefficients(op: Product, w: jax.Array, x: jax.Array, d: jax.Array, layer: Layer) -> tuple[Any, jax.Array]:
        raw = op.weight_gradient(w, x, d)
        axes = _device_axes(layer, raw, outer)
        if named:
            size = _squares(op, w, x, d.astype(at_least_float32(raw.dtype)), layer)
            return raw, _coefficients(raw, None, size, layer.contracted, axes)
        return raw, _coefficients(raw, alpha, None, layer.contracted, axes)

    def gain(op: Product, w: jax.Array, x: jax.Array, d: jax.Array, layer: Layer) -> jax.Array:
        return coefficients(op, w, x, d, layer)[1]

    def backward(
        op: Product, w: jax.Array, b: Any, x: jax.Array, d: jax.Array, layer: Layer
    ) -> tuple[Any, Any, None]:
        raw, c = coefficients(op, w, x, d, layer)
        order = _neurons(w, layer) if layer.operation.startswith("custom") else None
        if order is not None:  # it may round its weight, so that the error is scaled in the weight's place
            scaled = (d.astype(c.dtype) * _at_outputs(c, d, order, layer)).astype(d.dtype)
            dx = op.passed_down(w, x, scaled)
        else:
            dx = op.passed_down(_times(w, c), x, d)
        return _times(raw, c), dx, None

    return sequential(backward, whole_batch=True, gain=gain)


@functools.partial(jax.jit, static_argnames=("contracted", "axes"), inline=True)
def _coefficients(raw: jax.Array, alpha: Any, size: Any, contracted: tuple[int, ...], axes: tuple[str, ...]) -> Any:
    """The coefficients of the neurons; traced once for all layers of one shape.

    Args:
      raw: the raw gradient, of this device alone.
      alpha: their norm; None where ||g||_F = ||r||_F.
      size: there, the sum of squares of the arriving error per neuron.
      contracted: the axes of the weight that are summed over.
      axes: the mesh axes over which the batch is spread.
    """

    def whole(value: Any) -> Any:
        return jax.lax.psum(value, axes) if axes else value

    wide = at_least_float32(raw.dtype)
    squares = jnp.abs(whole(raw.astype(wide))) ** 2
    norm = jnp.sqrt(squares.sum(contracted, keepdims=True))
    norm = jnp.where(norm < DEAD, norm.mean(), norm)
    alive = norm > 0
    c = jnp.where(alive, 1 / jnp.where(alive, norm, 1), 0)
    if alpha is not None:
        return c.astype(wide) * jnp.asarray(alpha, wide)
    size = whole(size)
    total, scaled = size.sum(), (size * c * c).sum()
    c = c * jnp.where(scaled > 0, jnp.sqrt(total / jnp.where(scaled > 0, scaled, 1)), 0)
    return c.astype(wide)  # which is complex where the gradient is


@functools.partial(jax.jit, inline=True)
def _times(w: jax.Array, c: jax.Array) -> jax.Array:
    """The weights of each neuron times its coefficient."""
    return (w.astype(c.dtype) * c).astype(w.dtype)


def _neurons(w: jax.Array, layer: Layer) -> list[int] | None:
    """The weight's axes of neurons in the order in which they lie in the outputs; None if rows belong to groups."""
    order = sorted(layer.output_axes, key=lambda a: (layer.output_axes[a], a))
    return order if len(order) + len(layer.contracted) == w.ndim else None


def _squares(op: Product, w: jax.Array, x: jax.Array, d: jax.Array, layer: Layer) -> Any:
    """The sum of squares of the arriving error per output neuron, of the weight's rank."""
    order = _neurons(w, layer)
    if order is None:  # each row is that of one group of neurons
        ones = jax.tree.map(lambda v: jnp.ones_like(v) if jnp.issubdtype(v.dtype, jnp.inexact) else v, x)
        (rows,) = jax.vjp(lambda w: op(w, ones), w)[1]((jnp.abs(d) ** 2).astype(w.dtype))
        return rows.mean(layer.contracted, keepdims=True)
    summed = tuple(i for i in range(d.ndim) if i not in layer.output_axes.values())
    per_neuron = jnp.sum(jnp.abs(d) ** 2, axis=summed).reshape([w.shape[a] for a in order])
    per_neuron = per_neuron.transpose([order.index(a) for a in sorted(order)])
    return jnp.expand_dims(per_neuron, tuple(a for a in range(w.ndim) if a not in order))


def _at_outputs(c: Any, d: jax.Array, order: Any, layer: Layer) -> Any:
    """The coefficients of neurons where these lie in the outputs."""
    c = c.squeeze(layer.contracted).transpose([sorted(order).index(a) for a in order])
    return c.reshape([n if i in layer.output_axes.values() else 1 for i, n in enumerate(d.shape)])


def _device_axes(layer: Layer, raw: Any, outer: Any) -> tuple[Any, ...]:
    """The mesh axes over which the raw gradient has to be summed."""
    spread = varying_axes(jax.typeof(raw))
    inside = any(s.startswith("shard_map") for s in layer.scope)
    if not inside and not spread <= set(outer):
        missing = ", ".join(map(repr, sorted(spread - set(outer))))
        raise ValueError(
            f"the batch is spread over the mesh axes {missing}, and BackMAN needs the gradient of the whole batch: "
            f"give them by name, backman(axis_name=...)"
        )
    return (*outer, *sorted(spread - set(outer)))
