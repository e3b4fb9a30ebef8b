"""Feedback weights with the signs of the forward weights, as they are at each step (Liao, Leibo, Poggio 2016).

delta_l = (B_{l+1}^T delta_{l+1}) * f'(z_l) with B_l = M_l * sign(W_l), M_l >= 0, and sign(0) = 0.

With magnitudes of one, error grows as the square root of a layer's width from layer to layer. Where all magnitudes are
the standard deviation of the weights at the start, it grows as backpropagation's does there.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from lrules.constructors import sequential
from lrules.engine.dtypes import at_least_float32
from lrules.engine.product import Product
from lrules.engine.records import Layer
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
      magnitude: of the feedback weights: `"unit"`, all one (uSF), for nets of few layers: in ReLU nets initialised by
        He's rule the error was infinite in float32 44 layers down at width 128, where it grows eightfold a layer, and
        34 at width 512; `"scaled"`, for a layer all the standard deviation of its weights when `rule.init` gets them
        (zero, for a layer that starts from equal weights: nothing goes down then); `"random"`, drawn anew at every
        step from `rng=` (brSF); `"fixed"`, drawn once (frSF).
      init: the initializer whose absolute values the magnitudes are; default `jax.nn.initializers.glorot_normal()`.
        `"unit"` and `"scaled"` take none.

    Returns:
      The rule. `"fixed"` and `"scaled"` have one feedback weight per parameter matrix of a layer that reads a hidden
      signal, of its shape; the others have none.

    Raises:
      ValueError: the magnitude is none of the four, or `"unit"` or `"scaled"` was given an initializer.

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
    feedback = w if layer.reads is None else signed  # what goes down to the inputs is no feedback
    return op.weight_gradient(w, x, d), op.passed_down(feedback, x, d), None
