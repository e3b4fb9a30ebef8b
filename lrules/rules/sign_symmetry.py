"""Feedback weights with the signs that the forward weights have at each step (Liao, Leibo, Poggio 2016).

delta_l = (B_{l+1}^T delta_{l+1}) * f'(z_l) with B_l = M_l * sign(W_l), M_l >= 0, and sign(0) = 0.

If the magnitudes are one, the error grows from layer to layer by the square root of the layer's width. If the
magnitudes are the standard deviation of the initial weights, it grows at the start as in backpropagation.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from lrules.constructors import sequential
from lrules.extend import Layer, Product, at_least_float32
from lrules.options import as_initializer
from lrules.rule import Rule
from lrules.typing import Initializer

MAGNITUDES = ("unit", "scaled", "random", "fixed")


def sign_symmetry(
    magnitude: Literal["unit", "scaled", "random", "fixed"] = "unit", *, init: Initializer | None = None
) -> Rule:
    """Sign symmetry: feedback with the signs of the present forward weights.

    delta_l = ((M_{l+1} * sign(W_{l+1}))^T delta_{l+1}) * f'(z_l)

    Args:
      magnitude: the magnitudes M of the feedback weights.
        `"unit"`: all are one (uSF). Use it for networks with few layers: in ReLU networks initialised by He's rule, the
        error was infinite in float32 44 layers down at width 128 (it grows eightfold per layer), and 34 layers down at
        width 512.
        `"scaled"`: all magnitudes of a layer are the standard deviation of the weights that `rule.init` gets. (If all
        weights of a layer are equal at the start, this is zero, and no error goes down.)
        `"random"`: drawn anew at every step from `rng=` (brSF).
        `"fixed"`: drawn once (frSF).
      init: an initializer for `"random"` and `"fixed"`; the magnitudes are its absolute values. Default
        `jax.nn.initializers.glorot_normal()`.

    Returns:
      The rule. With `"fixed"` and `"scaled"`, if a layer reads a hidden signal (see docs/terms.md), each of its
      parameter matrices has one feedback weight of the same shape. The others have no feedback weights.

    Raises:
      ValueError: `magnitude` is not one of the four, or `init` is given with `"unit"` or `"scaled"`.
      TypeError: `init` is not a function, or it does not return an array.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, x = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], jnp.ones((1, 3))
      >>> params = {"a": jnp.zeros((3, 4)), "b": -0.1 * jnp.ones((4, 2))}
      >>> f = lrules.transform(net, lrules.sign_symmetry())
      >>> grads = jax.grad(lambda p: f(p, lrules.Feedback({}, {}), x).sum())(params)
      >>> float(grads["a"][0, 0])  # two outputs, each through sign(-0.1) = -1
      -2.0

    References:
      Liao, Leibo, Poggio: How important is weight symmetry in backpropagation? (2016), section 3.
      Baldi, Sadowski, Lu: Learning in the machine: random backpropagation and the deep learning channel (2018), 4.2.
    """
    if magnitude not in MAGNITUDES:
        raise ValueError(f"magnitude must be one of {', '.join(map(repr, MAGNITUDES))}, got {magnitude!r}")
    if magnitude in ("unit", "scaled"):
        if init is not None:
            raise ValueError(f'magnitude="{magnitude}" draws nothing: leave out init=, or choose "random" or "fixed"')
        return sequential(_backward, init=None if magnitude == "unit" else _deviation)
    return sequential(_backward, init=as_initializer(init), redrawn=magnitude == "random")


def _deviation(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, weight: Any = None) -> jax.Array:
    """The standard deviation of a layer's weights, of their shape."""
    return jnp.full(shape, jnp.std(weight.astype(at_least_float32(dtype)))).astype(dtype)


def _backward(op: Product, w: jax.Array, b: Any, x: jax.Array, d: jax.Array, layer: Layer) -> tuple[Any, Any, None]:
    signed = jnp.sign(w) if b is None else jnp.abs(b).astype(w.dtype) * jnp.sign(w)
    feedback = w if layer.reads is None else signed  # the error of the inputs goes through the true weight
    return op.weight_gradient(w, x, d), op.passed_down(feedback, x, d), None
