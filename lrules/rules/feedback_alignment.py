"""Sequential channels with feedback weights B_l instead of the forward weights.

Feedback alignment, or random backpropagation (RBP): delta_l = (B_{l+1}^T delta_{l+1}) * f'(z_l) and
dW_l = delta_l h_{l-1}^T, where B is fixed and random (Lillicrap et al. 2014; Baldi, Sadowski, Lu 2018, section 2.2).
Adaptive random backpropagation (ARBP): also dB_l = dW_l (Baldi, Sadowski, Lu 2018, section 3).
"""

from __future__ import annotations

from typing import Any

import jax

from lrules.constructors import sequential
from lrules.extend import Layer, Product
from lrules.options import as_initializer, require_flags
from lrules.rule import Rule
from lrules.typing import Initializer


def feedback_alignment(init: Initializer | None = None, *, adaptive: bool = False) -> Rule:
    """Feedback alignment (FA), which Baldi, Sadowski and Lu call random backpropagation (RBP).

    delta_l = (B_{l+1}^T delta_{l+1}) * f'(z_l),  dW_l = delta_l h_{l-1}^T

    Args:
      init: the initializer of the feedback weights, `init(key, shape, dtype)`; it draws each layer's
        `[fan_in, fan_out]`. Default `jax.nn.initializers.glorot_normal()`.
      adaptive: the feedback weights learn by the product of the error above and the activity below, which is also the
        update of the forward weights (ARBP). `grads.feedback` holds this product. Train them with the same optimizer or
        with another one.

    Returns:
      The rule. If a layer reads a hidden signal (see docs/terms.md), each of its parameter matrices has one feedback
      weight of the same shape.

    Raises:
      TypeError: `init` is not a function, or it does not return an array.
      ValueError: `adaptive` is not True or False. At `init`: the initializer draws another shape or whole numbers.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> rule = lrules.feedback_alignment(adaptive=True)
      >>> feedback = rule.init(jax.random.key(0), net, params, jnp.ones((1, 3)))
      >>> {name: b.shape for name, b in feedback.learned.items()}
      {'b': (4, 2)}

    References:
      Lillicrap, Cownden, Tweed, Akerman: Random feedback weights support learning in deep neural networks (2014).
      Baldi, Sadowski, Lu: Learning in the machine: random backpropagation and the deep learning channel (2018), 2.2, 3.
    """
    require_flags(adaptive=adaptive)

    def backward(op: Product, w: jax.Array, b: Any, x: jax.Array, d: jax.Array, layer: Layer) -> tuple[Any, Any, Any]:
        dw = op.weight_gradient(w, x, d)
        return dw, op.passed_down(b, x, d), dw if adaptive else None

    return sequential(backward, init=as_initializer(init), learned=adaptive)
