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

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lrules.analysis import varying_axes
from lrules.constructors import sequential
from lrules.rule import Rule, at_least_float32, is_number, mesh_axes

DEAD = 1e-15


def backman(alpha: float | str = 1.0, axis_name: str | Sequence[str] | None = None) -> Rule:
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

    def coefficients(raw, d, layer):
        axes = _device_axes(layer, raw, outer)

        def whole(value):
            return jax.lax.psum(value, axes) if axes else value

        wide = at_least_float32(raw.dtype)
        squares = jnp.abs(whole(raw.astype(wide))) ** 2
        norm = jnp.sqrt(squares.sum(layer.contracted, keepdims=True))
        norm = jnp.where(norm < DEAD, norm.mean(), norm)
        alive = norm > 0
        c = jnp.where(alive, 1 / jnp.where(alive, norm, 1), 0)
        if named:
            size = whole(_squares(d.astype(wide), raw.ndim, layer))
            total, scaled = size.sum(), (size * c * c).sum()
            c = c * jnp.where(scaled > 0, jnp.sqrt(total / jnp.where(scaled > 0, scaled, 1)), 0)
            return c.astype(wide)  # which is complex where the gradient is
        return c.astype(wide) * jnp.asarray(alpha, wide)

    def raw_gradient(op, w, x, d):
        return jax.vjp(lambda w: op(w, x), w)[1](d)[0]

    def gain(op, w, x, d, layer):
        return coefficients(raw_gradient(op, w, x, d), d, layer)

    def backward(op, w, b, x, d, layer):
        raw = raw_gradient(op, w, x, d)
        c = coefficients(raw, d, layer)
        (dx,) = jax.vjp(lambda x: op((w.astype(c.dtype) * c).astype(w.dtype), x), x)[1](d)
        return (raw.astype(c.dtype) * c).astype(w.dtype), dx, None

    return sequential(backward, whole_batch=True, gain=gain)


def _squares(d, ndim, layer):
    """The sum of squares of the arriving error per output neuron, of the weight's rank."""
    kept = sorted(layer.output_axes, key=lambda a: layer.output_axes[a])
    summed = tuple(i for i in range(d.ndim) if i not in layer.output_axes.values())
    per_neuron = jnp.sum(jnp.abs(d) ** 2, axis=summed)  # its axes in the order of the outputs
    per_neuron = per_neuron.transpose([kept.index(a) for a in sorted(kept)])
    return jnp.expand_dims(per_neuron, tuple(a for a in range(ndim) if a not in kept))


def _device_axes(layer, raw, outer):
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
