"""Random projections of the targets in the place of the output error (Frenkel, Lefebvre, Bol 2019).

delta_l = -(B_l^T t) * f'(z_l), dW_l = delta_l h_{l-1}^T, with t the targets of an example and B_l fixed and random.

The last layer gets its true gradient. The sign stands in for that of the output error o - t, which falls with t; the
authors' program has it the other way round, which comes to the same where B is as often negative as positive.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lrules.constructors import direct
from lrules.options import as_initializer
from lrules.rule import Rule
from lrules.rules.direct_feedback_alignment import project
from lrules.typing import Initializer, Pytree


def random_target_projection(init: Initializer | None = None, *, max_feedback_bytes: float = 2**30) -> Rule:
    """Direct random target projection (DRTP): each hidden signal gets a random projection of the targets.

    delta_l = -(B_l^T t) * f'(z_l)

    Hidden layers need no output, and so do not wait for the forward pass. It serves `lrules.value_and_grad` alone.
    Targets are integer classes, which are made one-hot, or have as many elements per example as the outputs.
    The signals are divided by as many losses as the objective is the mean of, as the last layer's gradient is: by the
    batch, or with a loss `[batch, time]` by batch times time.

    Args:
      init: the initializer of the feedback weights, `init(key, shape, dtype)`, drawn as `[hidden size, outputs]`;
        default `jax.nn.initializers.glorot_normal()`.
      max_feedback_bytes: refuse to make more feedback than this.

    Returns:
      The rule. One feedback weight `[outputs, *hidden shape]` per hidden signal.

    Raises:
      ValueError: at use: it was given to `transform`, which has no targets, or the targets do not fit the outputs.

    References:
      Frenkel, Lefebvre, Bol: Learning without feedback: direct random target projection as a feedback-alignment
      algorithm with layerwise feedforward training (2019).
    """

    def signal(e: jax.Array, b: Any, targets: Pytree, name: str, elements: int) -> jax.Array:
        return project(-_as_outputs(targets, e), b) / elements

    return direct(signal, init=as_initializer(init), targets=True, max_feedback_bytes=max_feedback_bytes, offers=())


def _as_outputs(targets: Pytree, e: jax.Array) -> jax.Array:
    """The targets as `[batch, outputs]`; classes become one-hot."""
    batch, outputs = e.shape
    leaves = jax.tree.leaves(targets)
    shapes = ", ".join(str(jnp.shape(t)) for t in leaves)
    parts = []
    for t in leaves:
        t = jnp.asarray(t)
        if t.ndim == 0 or t.shape[0] != batch:
            raise ValueError(
                f"targets of shape {shapes} do not begin with the batch of {batch} that direct random target "
                "projection sends: give one target per example"
            )
        t = t.reshape(batch, -1)
        if not jnp.issubdtype(t.dtype, jnp.inexact) and len(leaves) == 1 and outputs % t.shape[1] == 0:
            t = jax.nn.one_hot(t, outputs // t.shape[1]) if t.shape[1] != outputs else t
        parts.append(t.reshape(batch, -1).astype(e.dtype))
    t = jnp.concatenate(parts, axis=1) if parts else jnp.zeros((batch, 0), e.dtype)
    if t.shape != e.shape:
        raise ValueError(
            f"direct random target projection sends the targets in the place of the output error, but targets of "
            f"shape {shapes} do not make {outputs} numbers per example: give classes, one-hot or real targets of the "
            "outputs' shape"
        )
    return t
