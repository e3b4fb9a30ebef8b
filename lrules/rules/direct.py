"""Direct (skipped) channels: the output error comes straight to every hidden signal.

Direct feedback alignment, or skipped random backpropagation (SRBP): delta_l = (B_l^T e) * f'(z_l), dW_l = delta_l
h_{l-1}^T, with e the output error and B_l fixed and random (Nokland 2016; Baldi, Sadowski, Lu 2018, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lrules.rule import Initializer, Rule, direct


def project(e, b):
    """Brings the output error `e` `[batch, outputs]` to a hidden signal by `b` `[outputs, *hidden]`."""
    return jnp.tensordot(e.astype(b.dtype), b, axes=1)


def direct_feedback_alignment(
    init: Initializer | None = None, *, at: str | Sequence[str] | None = None, max_feedback_bytes: int = 2**30
) -> Rule:
    """Direct feedback alignment (DFA), which Baldi, Sadowski and Lu call skipped random backpropagation (SRBP).

    delta_l = (B_l^T e) * f'(z_l)

    Args:
      init: the initializer of the feedback weights, `init(key, shape, dtype)`, drawn as `[hidden size, outputs]`;
        default `jax.nn.initializers.glorot_normal()`.
      at: where feedback lands in place of every hidden signal: regular expressions (`re.search`) that names of hidden
        signals, or of tensors marked with `lrules.hidden`, match. Between landings the error flows as in backprop.
      max_feedback_bytes: refuse to make more feedback than this.

    Returns:
      The rule. One feedback weight `[outputs, *hidden shape]` per hidden signal (`lrules.describe` lists them).

    Raises:
      ValueError: at `init` or use: the feedback would exceed `max_feedback_bytes`, or a batch axis cannot be told.

    References:
      Nokland: Direct feedback alignment provides learning in deep neural networks (2016).
      Baldi, Sadowski, Lu: Learning in the machine: random backpropagation and the deep learning channel (2018), 2.2.
    """
    return direct(
        lambda e, b, targets, name: project(e, b),
        init=init or jax.nn.initializers.glorot_normal(),
        at=at,
        max_feedback_bytes=max_feedback_bytes,
    )
