"""Random projections of the targets instead of the output error (Frenkel, Lefebvre, Bol 2019).

delta_l = -(B_l^T t) * f'(z_l), dW_l = delta_l h_{l-1}^T, where t is the target of an example and B_l is fixed and
random.

The last layer gets its true gradient. The minus sign is that of t in the output error o - t. The authors' program has a
plus sign; this makes no difference if B is negative as often as positive.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lrules.constructors import direct
from lrules.engine.dtypes import widened
from lrules.extend import project
from lrules.options import as_initializer
from lrules.rule import Rule
from lrules.typing import Initializer, Pytree


def random_target_projection(init: Initializer | None = None, *, max_feedback_bytes: float = 2**30) -> Rule:
    """Direct random target projection (DRTP): each hidden signal gets a random projection of the targets.

    delta_l = -(B_l^T t) * f'(z_l)

    Hidden layers do not need the outputs, so they do not wait for the forward pass. Targets are integer classes, which
    the rule makes one-hot, or they have as many elements per example as the outputs. The rule divides the signals by
    the number of losses in the mean of the objective, as in the gradient of the last layer: by the batch, or for a loss
    `[batch, time]` by batch times time.

    Args:
      init: the initializer of the feedback weights, `init(key, shape, dtype)`; it draws `[hidden size, outputs]`.
        Default `jax.nn.initializers.glorot_normal()`.
      max_feedback_bytes: the rule refuses to make more bytes of feedback than this.

    Returns:
      The rule. It has one feedback weight `[outputs, *hidden shape]` per hidden signal (see docs/terms.md). Use it with
      `lrules.value_and_grad`.

    Raises:
      TypeError: `init` is not a function, or it does not return an array.
      ValueError: at use: the rule is used in `transform`, which has no targets, or the targets do not fit the outputs.

    Example:
      >>> import jax, jax.numpy as jnp, lrules, optax
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> x, classes, rule = jnp.ones((5, 3)), jnp.array([0, 1, 1, 0, 1]), lrules.random_target_projection()
      >>> step = lrules.value_and_grad(net, optax.softmax_cross_entropy_with_integer_labels, rule)
      >>> _, grads = step(params, rule.init(jax.random.key(0), net, params, x), x, classes)
      >>> grads.params["a"].shape
      (3, 4)

    References:
      Frenkel, Lefebvre, Bol: Learning without feedback: direct random target projection as a feedback-alignment
      algorithm with layerwise feedforward training (2019).
    """

    def signal(e: jax.Array, b: Any, targets: Pytree, name: str, elements: int) -> jax.Array:
        return widened(jnp.divide, project(-_as_outputs(targets, e), b), elements)

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
                f"random_target_projection: the first axis of the targets must be the batch of {batch}, got targets of "
                f"shape {shapes}: give one target per example"
            )
        t = t.reshape(batch, -1)
        if not jnp.issubdtype(t.dtype, jnp.inexact) and len(leaves) == 1 and outputs % t.shape[1] == 0:
            t = jax.nn.one_hot(t, outputs // t.shape[1]) if t.shape[1] != outputs else t
        parts.append(t.reshape(batch, -1).astype(e.dtype))
    t = jnp.concatenate(parts, axis=1) if parts else jnp.zeros((batch, 0), e.dtype)
    if t.shape != e.shape:
        raise ValueError(
            f"random_target_projection: the targets must give {outputs} numbers per example, got targets of shape "
            f"{shapes}: give classes, one-hot targets, or real targets with the shape of the outputs"
        )
    return t
