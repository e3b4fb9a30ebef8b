"""Feedback weights that get the update of the forward weights and the same weight decay (Kolen and Pollack 1994).

delta_l = (B_{l+1}^T delta_{l+1}) * f'(z_l) and dW_l = dB_l = delta_l h_{l-1}^T. With one optimizer for both and weight
decay gamma, each step of gradient descent multiplies W_l - B_l by the factor 1 - eta gamma.
"""

from __future__ import annotations

from lrules.rule import Rule
from lrules.rules.feedback_alignment import feedback_alignment
from lrules.typing import Initializer


def kolen_pollack(init: Initializer | None = None) -> Rule:
    """Kolen-Pollack (KP): feedback weights get the updates of the forward weights, and weight decay makes them equal.

    dB_l = dW_l = delta_l h_{l-1}^T,  delta_l = (B_{l+1}^T delta_{l+1}) * f'(z_l)

    The rule computes the update, and the optimizer does the decay. Use the same optimizer with the same decay (as
    `optax.add_decayed_weights` before `optax.sgd`) for `params` and for `feedback.learned`. Without decay the
    difference between them stays the same, and the rule equals adaptive random backpropagation (weight matching). If a
    model computes its weight from parameters (weight normalisation), forward and feedback parameters get the gradients
    of two such computations. Their difference may then change without decay too.

    Args:
      init: the initializer of the feedback weights, `init(key, shape, dtype)`; it draws each layer's
        `[fan_in, fan_out]`. Default `jax.nn.initializers.glorot_normal()`.

    Returns:
      The rule. If a layer reads a hidden signal (see docs/terms.md), each of its parameter matrices has one learned
      feedback weight of the same shape.

    Raises:
      TypeError: `init` is not a function, or it does not return an array.
      ValueError: at `init`: the initializer draws another shape or whole numbers.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> x, rule, loss = jnp.ones((1, 3)), lrules.kolen_pollack(), lrules.testing.half_squared_error
      >>> feedback = rule.init(jax.random.key(0), net, params, x)
      >>> _, grads = lrules.value_and_grad(net, loss, rule)(params, feedback, x, jnp.zeros((1, 2)))
      >>> bool((grads.feedback["b"] == grads.params["b"]).all())
      True

    References:
      Kolen, Pollack: Backpropagation without weight transport (1994).
      Akrout, Wilson, Humphreys, Lillicrap, Tweed: Deep learning without weight transport (2019), section 4.
    """
    return feedback_alignment(init, adaptive=True)
