"""Direct (skipped) channels: the output error comes straight to every hidden signal.

Direct feedback alignment, or skipped random backpropagation (SRBP): delta_l = (B_l^T e) * f'(z_l), dW_l = delta_l
h_{l-1}^T, where e is the output error and B_l is fixed and random (Nokland 2016; Baldi, Sadowski, Lu 2018, section 3).
Adaptive (ASRBP): also dB_l = e h_l^T, the product of the error at the top and the activity where it arrives.

With a rank, B_l = R B'_l. If both factors learn, they learn by the parts that they have in e h_l^T: dB'_l = (R^T e)
h_l^T and dR = sum over l of e (B'_l h_l)^T (as the two factors of low-dimensional feedback in Hanut, Kadmon 2025).
Normalised: e / |e| in the place of e, so examples with small and with large errors move hidden layers alike. (Launay et
al. 2020 normalise feedback too; their program divides it by the root of the hidden size, which is a choice of `init`.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax

from lrules.constructors import direct
from lrules.extend import correlate, project
from lrules.options import as_initializer, require_flags
from lrules.rule import Rule
from lrules.typing import Initializer, Pytree


def arrive(e: jax.Array, b: Any, targets: Pytree, name: str) -> jax.Array:
    """The signal that direct feedback alignment brings to a hidden signal."""
    return project(e, b)


def direct_feedback_alignment(
    init: Initializer | None = None,
    *,
    adaptive: bool = False,
    at: str | Sequence[str] | None = None,
    shared_axes: int | Sequence[int | tuple[int, int | str]] = (),
    rank: int | None = None,
    learned_factors: bool = False,
    normalise_error: bool = False,
    error_at: Literal["layer", "outputs"] = "layer",
    max_feedback_bytes: float = 2**30,
    storage: Literal["stored", "recomputed"] = "stored",
) -> Rule:
    """Direct feedback alignment (DFA), which Baldi, Sadowski and Lu call skipped random backpropagation (SRBP).

    delta_l = (B_l^T e) * f'(z_l),  dW_l = delta_l h_{l-1}^T

    Here e is the output error and h_l a hidden signal (see docs/terms.md). On the digits of scikit-learn (three layers
    of 64, 5 seeds) the rule has 96.0 ± 0.7% of the test set right. `rank=3` has 77.8 ± 3.2%, for ten classes; 87.3 ±
    3.1% with `learned_factors=True`. `normalise_error=True` has 94.7 ± 1.0% at full rank.

    Args:
      init: the initializer of the feedback weights, `init(key, shape, dtype)`; it draws `[hidden size, outputs]`.
        Default `jax.nn.initializers.glorot_normal()`.
      adaptive: the feedback weights learn by the product of the output error and the hidden signal (ASRBP).
        `grads.feedback` holds this product. Train them with the same optimizer or with another one.
      at: the places where feedback lands, if not at every hidden signal: regular expressions for `re.search` in the
        names of hidden signals and of tensors marked with `lrules.hidden`. Between landings the error flows as in
        backprop.
      shared_axes: axes of the outputs (counted with the batch) along which all positions share one feedback weight:
        1 for `[batch, time, classes]`, (1, 2) for `[batch, height, width, classes]`. The error of a position then
        reaches that position only. The corresponding place in a hidden signal is the axis with the same number, or a
        loop of the same length around it. If another axis or loop has that length too, give pairs that say which it is:
        `[(1, 2)]` is axis 2 of the hidden signals (counted with the batch), `[(1, "loop 0")]` is the outermost loop
        around them. You may give several pairs for one axis of the outputs: at each hidden signal, the first pair that
        fits holds.
      rank: for tens of thousands of outputs. Each feedback weight is then a product of two matrices: one random matrix
        `[outputs, rank]`, which all hidden signals share, and one matrix `[rank, *hidden shape]` for each hidden
        signal. The shared matrix learns only with `learned_factors=True`. Its name is `(outputs)`, or with more
        brackets if a parameter, a mark or another shared matrix has that name. The other matrix has `rank` of the rows
        that `init` draws for all outputs (or for as many outputs as `max_feedback_bytes` can hold). The products have
        the mean (from rank 3 on) and the variance of such feedback, but not its zeros or signs.
      learned_factors: both factors that `rank` makes learn, the shared one by the sum over all hidden signals.
      normalise_error: the error vector of each example (with `shared_axes`: of each position) has length one where it
        is sent to hidden signals and where feedback weights learn from it; an error of zero stays zero. The last layer
        gets its true error. The rule then needs `lrules.value_and_grad`.
      error_at: where the rule takes the output error e. `"layer"`: if the outputs are a function without parameters of
        the outputs of a layer (softmax, log_softmax, sigmoid), the rule takes e at the outputs of this layer. With the
        cross-entropy that belongs to the function, e is then T - O, as in the papers. This is not so if the function
        lies inside a loop (`lrules.describe` says where e is taken). `"outputs"`: the rule takes e at the outputs.
      max_feedback_bytes: the rule refuses to make more bytes of feedback than this. With `storage="recomputed"` these
        are the bytes of the keys.
      storage: `"recomputed"` is for tens of thousands of outputs, where feedback is larger than the network.
        `feedback.fixed` then has only the two words of a key for each hidden signal. Each step draws the feedback
        weights again from it, a few rows at a time, so that they take no memory, but time. They are those that
        `"stored"` draws from the same key of `init` (bit for bit, if `init` is jitted). This needs keys of
        threefry2x32 (JAX's default), and an initializer that draws each number by itself (no orthogonal matrices).

    Returns:
      The rule. It has one feedback weight `[outputs, *hidden shape]` per hidden signal (`lrules.describe` lists them).

    Raises:
      TypeError: `init` is not a function, or it does not return an array.
      ValueError: an option does not fit its description. At `init` or use: `init` draws another shape or whole numbers,
        the feedback would exceed `max_feedback_bytes`, a batch axis cannot be found, or no place in a hidden signal
        corresponds to a shared axis.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> rule = lrules.direct_feedback_alignment()
      >>> feedback = rule.init(jax.random.key(0), net, params, jnp.ones((1, 3)))
      >>> {name: b.shape for name, b in feedback.fixed.items()}
      {'b': (2, 4)}

    References:
      Nokland: Direct feedback alignment provides learning in deep neural networks (2016).
      Baldi, Sadowski, Lu: Learning in the machine: random backpropagation and the deep learning channel (2018), 2.2, 3.
      Launay, Poli, Boniface, Krzakala: Direct feedback alignment scales to modern deep learning tasks and architectures
      (2020).
      Hanut, Kadmon: Training large neural networks with low-dimensional error feedback (2025).
    """
    require_flags(adaptive=adaptive, learned_factors=learned_factors, normalise_error=normalise_error)
    if learned_factors and rank is None:
        raise ValueError("learned_factors trains the two factors that rank makes: give rank=, or adaptive=True")
    return direct(
        arrive,
        init=as_initializer(init),
        learn=correlate if adaptive or learned_factors else None,
        at=at,
        shared_axes=shared_axes,
        rank=rank,
        learned_factors=learned_factors,
        normalise_error=normalise_error,
        error_at=error_at,
        max_feedback_bytes=max_feedback_bytes,
        storage=storage,
    )
