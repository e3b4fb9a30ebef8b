"""BackMAN: every neuron maximises the attention that the next layer pays to it (Soltani Moakhar et al.).

r is the error that arrives at the outputs of a layer, and a is the input of the layer, both for the whole batch. For
each output neuron i:

    c_i = alpha / ||(r^T a)_i||_2                     (Eq. 7; filters of a convolution: Eq. 20)
    g = r diag(c)                                     (Eq. 6, 16)
    dW = g^T a,  so that ||dW_i|| = alpha             (Eq. 5, 15)
    the error that goes down is g W                   (Eq. 9, 18), computed as r (diag(c) W): no third product

The paper does not define c for a neuron whose raw gradient is zero. Here the mean norm of the layer replaces a norm
below 1e-15, and c is 0 if the mean norm is zero too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lrules.constructors import sequential
from lrules.engine.jaxprs import varying_axes
from lrules.extend import Layer, Product, at_least_float32
from lrules.options import ByName, is_number, mesh_axes
from lrules.rule import Rule
from lrules.typing import AxisName, Numbers

DEAD = 1e-15


def backman(
    alpha: Numbers | jax.Array | Mapping[str, jax.Array] | Literal["gradient_norm"] = 1.0, *, axis_name: AxisName = None
) -> Rule:
    """BackMAN: scales the weight gradient of each neuron to the norm alpha, and scales the error that goes down alike.

    c_i = alpha / ||(r^T a)_i||,  dW_i = c_i (r^T a)_i,  and g W goes down, where g = r diag(c)

    The norm is over the whole batch, so gradients of microbatches do not add up (`rule.additive` is False). Biases and
    normalisation scales get the signal that arrives at them. If the network uses a weight more than once, it gets alpha
    from each use. The rule takes the error with the scale that it has when it arrives: bias gradients depend on this
    scale, weight gradients do not.

    Args:
      alpha: the norm of each neuron's weight gradient; or a dict of norms by regular expression (`re.search` on the
        name of the layer, the first match holds). `jax.jit` and `jax.vmap` may trace norms. Or `"gradient_norm"`: for
        each layer the number that makes ||g||_F = ||r||_F (section 4.2).
      axis_name: under `shard_map` or `pmap`, the mesh axes over which the batch is spread. The gradients of the devices
        then sum to that of the whole batch. Under `jit` it is not needed.

    Returns:
      The rule. It has no feedback weights.

    Raises:
      ValueError: `alpha` is not a finite number >= 0 or `"gradient_norm"`. At use: a pattern matches no layer, or the
        batch is spread over mesh axes that `axis_name` does not name.
      TypeError: `axis_name` is not a name, several names or None.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, w, x = lambda w, x: jnp.tanh(x @ w), jnp.ones((3, 2)), jnp.ones((5, 3))
      >>> f = lrules.transform(net, lrules.backman(alpha=0.5))
      >>> grads = jax.grad(lambda w: f(w, lrules.Feedback({}, {}), x).sum())(w)
      >>> [round(float(norm), 4) for norm in jnp.linalg.norm(grads, axis=0)]
      [0.5, 0.5]

    References:
      Soltani Moakhar et al.: Seeking next layer neurons' attention for error-backpropagation-like training in a
      multi-agent network framework, sections 3.2 and A.2, Eq. 5 to 9 and 14 to 20.
    """
    named = isinstance(alpha, str) and alpha == "gradient_norm"
    for value in () if named else ByName("alpha", alpha).values():
        if not (is_number(value) and (isinstance(value, jax.core.Tracer) or 0 <= value < math.inf)):
            raise ValueError(f'alpha must be a finite number >= 0 or "gradient_norm", got {value!r}')
    outer = mesh_axes(axis_name)

    def coefficients(
        op: Product, w: jax.Array, x: jax.Array, d: jax.Array, layer: Layer, alpha: Any
    ) -> tuple[Any, jax.Array]:
        raw = op.weight_gradient(w, x, d)
        axes = _device_axes(layer, raw, outer)
        if named:
            size = _squares(op, w, x, d.astype(at_least_float32(raw.dtype)), layer)
            return raw, _coefficients(raw, None, size, layer.contracted, axes)
        return raw, _coefficients(raw, alpha, None, layer.contracted, axes)

    def gain(op: Product, w: jax.Array, x: jax.Array, d: jax.Array, layer: Layer, alpha: Any) -> jax.Array:
        return coefficients(op, w, x, d, layer, alpha)[1]

    def backward(
        op: Product, w: jax.Array, b: Any, x: jax.Array, d: jax.Array, layer: Layer, alpha: Any
    ) -> tuple[Any, Any, None]:
        raw, c = coefficients(op, w, x, d, layer, alpha)
        order = _neurons(w, layer) if layer.row.rounds else None
        if order is not None:  # the operation may round its weight, so this scales the error, not the weight
            scaled = (d.astype(c.dtype) * _at_outputs(c, d, order, layer)).astype(d.dtype)
            dx = op.passed_down(w, x, scaled)
        else:
            dx = op.passed_down(_times(w, c), x, d)
        return _times(raw, c), dx, None

    return sequential(backward, whole_batch=True, gain=gain, numbers={"alpha": alpha})


@functools.partial(jax.jit, static_argnames=("contracted", "axes"))
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
    return c.astype(wide)  # complex if the gradient is complex


@functools.partial(jax.jit, inline=True)
def _times(w: jax.Array, c: jax.Array) -> jax.Array:
    """The weights of each neuron times its coefficient."""
    return (w.astype(c.dtype) * c).astype(w.dtype)


def _neurons(w: jax.Array, layer: Layer) -> list[int] | None:
    """The weight's axes of neurons, in their order in the outputs; None if rows belong to groups of neurons."""
    order = sorted(layer.output_axes, key=lambda a: (layer.output_axes[a], a))
    return order if len(order) + len(layer.contracted) == w.ndim else None


def _squares(op: Product, w: jax.Array, x: jax.Array, d: jax.Array, layer: Layer) -> Any:
    """The sum of squares of the arriving error per output neuron, with the rank of the weight."""
    order = _neurons(w, layer)
    if order is None:  # each row belongs to one group of neurons
        ones = jax.tree.map(lambda v: jnp.ones_like(v) if jnp.issubdtype(v.dtype, jnp.inexact) else v, x)
        (rows,) = jax.vjp(lambda w: op(w, ones), w)[1]((jnp.abs(d) ** 2).astype(w.dtype))
        return rows.mean(layer.contracted, keepdims=True)
    summed = tuple(i for i in range(d.ndim) if i not in layer.output_axes.values())
    per_neuron = jnp.sum(jnp.abs(d) ** 2, axis=summed).reshape([w.shape[a] for a in order])
    per_neuron = per_neuron.transpose([order.index(a) for a in sorted(order)])
    return jnp.expand_dims(per_neuron, tuple(a for a in range(w.ndim) if a not in order))


def _at_outputs(c: Any, d: jax.Array, order: Any, layer: Layer) -> Any:
    """The coefficients of the neurons, placed as the neurons are in the outputs."""
    c = c.squeeze(layer.contracted).transpose([sorted(order).index(a) for a in order])
    return c.reshape([n if i in layer.output_axes.values() else 1 for i, n in enumerate(d.shape)])


def _device_axes(layer: Layer, raw: Any, outer: Any) -> tuple[Any, ...]:
    """The mesh axes over which to sum the raw gradient."""
    spread = varying_axes(jax.typeof(raw))
    inside = any(s.startswith("shard_map") for s in layer.scope)
    if not inside and not spread <= set(outer):
        missing = ", ".join(map(repr, sorted(spread - set(outer))))
        raise ValueError(
            f"the batch is spread over the mesh axes {missing}, and backman needs the gradient of the whole batch: "
            f"give their names, backman(axis_name=...)"
        )
    return (*outer, *sorted(spread - set(outer)))
