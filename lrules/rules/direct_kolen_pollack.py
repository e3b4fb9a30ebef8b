"""Direct feedback weights that learn, and decay as the forward weights do (Webster, Choi, Ahn 2021).

delta_l = (B_l^T e) * f'(z_l), dW_l = delta_l h_{l-1}^T and dB_l = e h_l^T, where e is the output error. The forward and
the feedback weights have one optimizer and one weight decay gamma. As in Kolen and Pollack (1994), each step of
gradient descent then multiplies W_L - B_{L-1} by 1 - eta gamma: the topmost hidden signal gets the true error.

For the layers below, B_l stands for the product M_l = W_L ... W_{l+1} of a linear network. Where the network no longer
changes, gamma W_k = -B_k^T <e h_{k-1}^T> and gamma B_k = -<e h_k^T> for each layer k. With h_k = W_k h_{k-1} follow
W_k = B_k^T B_{k-1} and B_k = P_{k-1} B_k with P_k = B_k B_k^T. So P_{k-1} P_k = P_k, and

    M_l = P_{L-1} ... P_{l+1} B_l = P_{L-1} B_l = W_L W_L^T B_l   for l < L - 1.

B_l comes to the product up to the factor W_L W_L^T at the outputs. With one output this is a number, so both have the
same direction. They are equal if W_L W_L^T is the identity on the outputs that B_l reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lrules.rule import Rule
from lrules.rules.direct_feedback_alignment import direct_feedback_alignment
from lrules.typing import Initializer


def direct_kolen_pollack(
    init: Initializer | None = None,
    *,
    at: str | Sequence[str] | None = None,
    shared_axes: int | Sequence[int | tuple[int, int | str]] = (),
    rank: int | None = None,
    error_at: Literal["layer", "outputs"] = "layer",
    max_feedback_bytes: float = 2**30,
) -> Rule:
    """Direct Kolen-Pollack (DKP): direct feedback weights learn from the output error and the hidden signal.

    delta_l = (B_l^T e) * f'(z_l),  dB_l = e h_l^T

    Here e is the output error and h_l a hidden signal (see docs/terms.md). The rule computes the update, and the
    optimizer does the decay. Use the same optimizer with the same decay (as `optax.add_decayed_weights` before
    `optax.sgd`) for `params` and for `feedback.learned`.

    With decay, the feedback weight of the topmost hidden signal becomes the weight of the last layer: each step of
    gradient descent with rate eta and decay gamma multiplies their difference by 1 - eta gamma. The other feedback
    weights B_l come to estimate the product M_l of the weights above them. In a linear network that has come to rest,
    M_l = W_L W_L^T B_l, where W_L is the weight of the last layer. With one output both have the same direction. With
    more outputs they are equal only if the rows of W_L are orthonormal where B_l reads them. Without decay, the rule is
    `direct_feedback_alignment(adaptive=True)`.

    On the digits of scikit-learn (three layers of 64, AdamW with decay 0.1, 5 seeds) it has 96.4 ± 0.4% of the test set
    right, direct feedback alignment 96.1 ± 0.6%, Kolen-Pollack 96.7 ± 0.7%, backpropagation 97.4 ± 0.3%. It fails in
    depth: with eight layers (3 seeds) it gains nothing over direct feedback alignment, 95.1 ± 1.0% against 94.9 ± 0.4%.

    Args:
      init: the initializer of the feedback weights, `init(key, shape, dtype)`; it draws `[hidden size, outputs]`.
        Default `jax.nn.initializers.glorot_normal()`.
      at, shared_axes: as in `direct_feedback_alignment`.
      rank: as in `direct_feedback_alignment`. The shared matrix does not learn, so no feedback weight becomes a forward
        weight.
      error_at, max_feedback_bytes: as in `direct_feedback_alignment`.

    Returns:
      The rule. It has one learned feedback weight `[outputs, *hidden shape]` per hidden signal.

    Raises:
      TypeError, ValueError: as in `direct_feedback_alignment`.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> x, rule, loss = jnp.ones((1, 3)), lrules.direct_kolen_pollack(), lrules.testing.half_squared_error
      >>> feedback = rule.init(jax.random.key(0), net, params, x)
      >>> _, grads = lrules.value_and_grad(net, loss, rule)(params, feedback, x, jnp.zeros((1, 2)))
      >>> bool((grads.feedback["b"] == grads.params["b"].T).all())
      True

    References:
      Webster, Choi, Ahn: Learning the connections in direct feedback alignment (2021).
      Kolen, Pollack: Backpropagation without weight transport (1994).
    """
    return direct_feedback_alignment(
        init,
        adaptive=True,
        at=at,
        shared_axes=shared_axes,
        rank=rank,
        error_at=error_at,
        max_feedback_bytes=max_feedback_bytes,
    )
