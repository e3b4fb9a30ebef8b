"""Feedback weights that receive the forward weights' own update, and decay with them (Kolen and Pollack 1994).

delta_l = (B_{l+1}^T delta_{l+1}) * f'(z_l) and dW_l = dB_l = delta_l h_{l-1}^T. With one optimizer for both and weight
decay gamma, W_l - B_l shrinks by the factor 1 - eta gamma at every step of gradient descent.
"""

from __future__ import annotations

from lrules.rule import Rule
from lrules.rules.feedback_alignment import feedback_alignment
from lrules.typing import Initializer


def kolen_pollack(init: Initializer | None = None) -> Rule:
    """Kolen-Pollack: feedback weights learn by the forward weights' own update, and converge to them by weight decay.

    dB_l = dW_l = delta_l h_{l-1}^T,  delta_l = (B_{l+1}^T delta_{l+1}) * f'(z_l)

    The rule gives the update; the decay is the optimizer's. Run the same optimizer with the same decay (as
    `optax.add_decayed_weights` before `optax.sgd`) on `params` and on `feedback.learned`. Without decay the difference
    stays what it was at the start, and the rule is that of adaptive random backpropagation (weight matching). Where a
    model computes its weight from parameters (weight normalisation), the two get the gradients of two such computations
    and their differences may shrink or grow without decay, too.

    Args:
      init: the initializer of the feedback weights, `init(key, shape, dtype)`, applied to each layer's
        `[fan_in, fan_out]`; default `jax.nn.initializers.glorot_normal()`.

    Returns:
      The rule. One learned feedback weight per parameter matrix of a layer that reads a hidden signal, of its shape.

    References:
      Kolen, Pollack: Backpropagation without weight transport (1994).
      Akrout, Wilson, Humphreys, Lillicrap, Tweed: Deep learning without weight transport (2019), section 4.
    """
    return feedback_alignment(init, adaptive=True)
