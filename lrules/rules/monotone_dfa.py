"""Monotone direct feedback alignment (Lechner 2020).

delta_l = (B_l^T e) * f'(z_l), dW_l = delta_l h_{l-1}^T (Eq. 6), with B_l >= 0. In a mono-net (`lrules.monotone`) with
one output, the update of every example then agrees in sign with its gradient (Theorem 2).
"""

from __future__ import annotations

from typing import Literal

from lrules.constructors import direct
from lrules.feedback import absolute
from lrules.rule import Rule
from lrules.rules.direct_feedback_alignment import arrive
from lrules.typing import Initializer


def monotone_dfa(
    init: Initializer | None = None,
    *,
    error_at: Literal["layer", "outputs"] = "layer",
    max_feedback_bytes: float = 2**30,
) -> Rule:
    """Monotone direct feedback alignment (mDFA): DFA with positive feedback, for nets with positive weights.

    delta_l = (B_l^T e) * f'(z_l),  B_l >= 0

    It belongs with a mono-net: weights of all layers but the first >= 0 and increasing activations. `lrules.monotone`
    initialises such nets and keeps them so.

    Args:
      init: the initializer whose absolute values the feedback weights are, drawn as `[hidden size, outputs]`; default
        `jax.nn.initializers.glorot_normal()`.
      error_at: as in `direct_feedback_alignment`.
      max_feedback_bytes: refuse to make more feedback than this.

    Returns:
      The rule. One feedback weight `[outputs, *hidden shape]` per hidden signal.

    Raises:
      ValueError: at `init` or use: the feedback would exceed `max_feedback_bytes`, or a batch axis cannot be told.

    References:
      Lechner: Learning representations for binary-classification without backpropagation (2020), section 3.
    """
    return direct(
        arrive, init=absolute(init), error_at=error_at, max_feedback_bytes=max_feedback_bytes, offers=()
    )
