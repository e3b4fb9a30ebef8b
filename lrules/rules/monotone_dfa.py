"""Monotone direct feedback alignment (Lechner 2020).

delta_l = (B_l^T e) * f'(z_l), dW_l = delta_l h_{l-1}^T (Eq. 6), with B_l >= 0. In a mono-net (`lrules.monotone`) with
one output, the update of every example then has the same sign as its gradient (Theorem 2).
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
    """Monotone direct feedback alignment (mDFA): DFA with non-negative feedback, for networks with positive weights.

    delta_l = (B_l^T e) * f'(z_l),  B_l >= 0

    Use it with a mono-net: its activations increase, and all its layers but the first have weights >= 0.
    `lrules.monotone` initialises such networks and keeps their weights >= 0.

    Args:
      init: an initializer; it draws `[hidden size, outputs]`, and the feedback weights are the absolute values. Default
        `jax.nn.initializers.glorot_normal()`.
      error_at: as in `direct_feedback_alignment`.
      max_feedback_bytes: the rule refuses to make more bytes of feedback than this.

    Returns:
      The rule. It has one feedback weight `[outputs, *hidden shape]` per hidden signal (see docs/terms.md).

    Raises:
      TypeError: `init` is not a function, or it does not return an array.
      ValueError: at `init` or use: the feedback would exceed `max_feedback_bytes`, or a batch axis cannot be found.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 1))}
      >>> feedback = lrules.monotone_dfa().init(jax.random.key(0), net, params, jnp.ones((1, 3)))
      >>> feedback.fixed["b"].shape, bool((feedback.fixed["b"] >= 0).all())
      ((1, 4), True)

    References:
      Lechner: Learning representations for binary-classification without backpropagation (2020), section 3.
    """
    return direct(arrive, init=absolute(init), error_at=error_at, max_feedback_bytes=max_feedback_bytes, offers=())
