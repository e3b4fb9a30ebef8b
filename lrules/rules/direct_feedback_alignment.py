"""Direct (skipped) channels: the output error comes straight to every hidden signal.

Direct feedback alignment, or skipped random backpropagation (SRBP): delta_l = (B_l^T e) * f'(z_l), dW_l = delta_l
h_{l-1}^T, with e the output error and B_l fixed and random (Nokland 2016; Baldi, Sadowski, Lu 2018, section 3).
Adaptive (ASRBP): dB_l = e h_l^T besides, the product of the error at the top and the activity where it arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax

from lrules.constructors import direct
from lrules.options import as_initializer, require_flags
from lrules.rule import Rule
from lrules.typing import Initializer, Pytree


def project(e: jax.Array, b: Any) -> jax.Array:
    """Brings the output error `e` `[batch, outputs]` to a hidden signal by `b` `[outputs, *hidden]`."""
    e = e if e.dtype == b.dtype else e.astype(b.dtype)
    return jax.lax.dot_general(e, b, (((e.ndim - 1,), (0,)), ((), ())))


def arrive(e: jax.Array, b: Any, targets: Pytree, name: str) -> jax.Array:
    """The signal of direct feedback alignment."""
    return project(e, b)


def correlate(e: jax.Array, h: jax.Array, b: Any) -> Any:
    """The product of the output error `e` `[batch, outputs]` and the hidden signal `h` `[batch, *hidden]`, summed.

    As the transpose of `project`, in which JAX itself sees to a batch that lies on several devices.
    """
    return jax.vjp(lambda b: project(e, b), b)[1](h)[0]


def direct_feedback_alignment(
    init: Initializer | None = None,
    *,
    adaptive: bool = False,
    at: str | Sequence[str] | None = None,
    shared_axes: int | Sequence[int | tuple[int, int | str]] = (),
    rank: int | None = None,
    error_at: Literal["layer", "outputs"] = "layer",
    max_feedback_bytes: float = 2**30,
) -> Rule:
    """Direct feedback alignment (DFA), which Baldi, Sadowski and Lu call skipped random backpropagation (SRBP).

    delta_l = (B_l^T e) * f'(z_l)

    Args:
      init: the initializer of the feedback weights, `init(key, shape, dtype)`, drawn as `[hidden size, outputs]`;
        default `jax.nn.initializers.glorot_normal()`.
      adaptive: the feedback weights learn by the product of the output error and the hidden signal: ASRBP.
        `grads.feedback` holds it; train it with the same optimizer or another.
      at: where feedback lands in place of every hidden signal: regular expressions (`re.search`) that names of hidden
        signals, or of tensors marked with `lrules.hidden`, match. Between landings the error flows as in backprop.
      shared_axes: axes of the outputs (counted with the batch) along which one feedback weight serves all positions:
        1 for `[batch, time, classes]`, (1, 2) for `[batch, height, width, classes]`. The error of a position then
        reaches that position alone. The corresponding place in a hidden signal is the axis of the same number, or a
        loop of that length around it. Where another axis or loop has that length too, pairs have to say which it is:
        `[(1, 2)]` is axis 2 of the hidden signals (counted with the batch), `[(1, "loop 0")]` the outermost loop around
        them; of several pairs for one axis of the outputs, the first that fits a hidden signal holds there.
      rank: for outputs in the tens of thousands: the feedback weights are products of one random matrix
        `[outputs, rank]`, which all share, and one `[rank, *hidden shape]` each. The former is never learned; its name
        is `(outputs)`, in more brackets where a parameter, a mark or another such matrix has that. The latter are so
        many rows of what `init` draws for all outputs (for as many as `max_feedback_bytes` holds, if fewer), and the
        products have numbers of the mean (from a rank of 3 on) and variance of such feedback, but not its zeros or
        signs.
      error_at: where the output error e is taken. `"layer"`: where the outputs are a function without parameters of a
        layer's outputs (softmax, log_softmax, sigmoid), at the layer's outputs, so that e is T - O with the
        cross-entropy that belongs to the function, as the papers have it; not where the function lies inside a loop
        (`lrules.describe` says where). `"outputs"`: at the outputs themselves.
      max_feedback_bytes: refuse to make more feedback than this.

    Returns:
      The rule. One feedback weight `[outputs, *hidden shape]` per hidden signal (`lrules.describe` lists them).

    Raises:
      TypeError: `init` is no function that returns an array.
      ValueError: an option is not of the kind described; at `init` or use: `init` draws another shape or whole numbers,
        the feedback would exceed `max_feedback_bytes`, a batch axis cannot be told, or a hidden signal has nothing that
        corresponds to a shared axis.

    References:
      Nokland: Direct feedback alignment provides learning in deep neural networks (2016).
      Baldi, Sadowski, Lu: Learning in the machine: random backpropagation and the deep learning channel (2018), 2.2, 3.
    """
    require_flags(adaptive=adaptive)
    return direct(
        arrive,
        init=as_initializer(init),
        learn=correlate if adaptive else None,
        at=at,
        shared_axes=shared_axes,
        rank=rank,
        error_at=error_at,
        max_feedback_bytes=max_feedback_bytes,
    )
