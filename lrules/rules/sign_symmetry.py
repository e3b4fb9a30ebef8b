"""Feedback weights with the signs of the forward weights, as they are at each step (Liao, Leibo, Poggio 2016).

delta_l = (B_{l+1}^T delta_{l+1}) * f'(z_l) with B_l = M_l * sign(W_l), M_l >= 0, and sign(0) = 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lrules.constructors import sequential
from lrules.rule import Initializer, Rule, as_initializer

MAGNITUDES = ("unit", "random", "fixed")


def sign_symmetry(magnitude: str = "unit", init: Initializer | None = None) -> Rule:
    """Sign symmetry: feedback with the signs of the present forward weights.

    delta_l = ((M_{l+1} * sign(W_{l+1}))^T delta_{l+1}) * f'(z_l)

    Args:
      magnitude: of the feedback weights: `"unit"`, all one (uSF); `"random"`, drawn anew at every step from `rng=`
        (brSF); `"fixed"`, drawn once (frSF).
      init: the initializer whose absolute values the magnitudes are; default `jax.nn.initializers.glorot_normal()`.
        `"unit"` takes none.

    Returns:
      The rule. `"fixed"` has one feedback weight per parameter matrix of a layer that reads a hidden signal, of its
      shape; the others have none.

    Raises:
      ValueError: the magnitude is none of the three, or `"unit"` was given an initializer.

    References:
      Liao, Leibo, Poggio: How important is weight symmetry in backpropagation? (2016), section 3.
      Baldi, Sadowski, Lu: Learning in the machine: random backpropagation and the deep learning channel (2018), 4.2.
    """
    if magnitude not in MAGNITUDES:
        raise ValueError(f"magnitude={magnitude!r} is none of {', '.join(map(repr, MAGNITUDES))}")
    if magnitude == "unit":
        if init is not None:
            raise ValueError('magnitude="unit" draws nothing: leave out init=, or choose "random" or "fixed"')
        return sequential(_backward)
    return sequential(_backward, init=as_initializer(init), redrawn=magnitude == "random")


def _backward(op, w, b, x, d, layer):
    (dw,) = jax.vjp(lambda w: op(w, x), w)[1](d)
    signed = jnp.sign(w) if b is None else jnp.abs(b).astype(w.dtype) * jnp.sign(w)
    feedback = w if layer.reads is None else signed  # what goes down to the inputs is no feedback
    (dx,) = jax.vjp(lambda x: op(feedback, x), x)[1](d)
    return dw, dx, None
