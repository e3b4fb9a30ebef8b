"""Initializers of feedback weights that `jax.nn.initializers` does not have.

Each function here returns an `init(key, shape, dtype)`, for the `init=` of a rule. Rules draw sequential feedback as a
layer's `[fan_in, fan_out]` (a convolution: `[*window, in, out]`), and direct feedback as `[hidden size, outputs]`. The
error comes from the last axis; the other axes are the layer that receives it. The source is Baldi, Sadowski, Lu:
Learning in the machine: random backpropagation and the deep learning channel (2018), sections 3 and 4, except where a
docstring names another.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lrules.options import as_initializer, draw, is_whole
from lrules.typing import Initializer

__all__ = ["absolute", "averaged", "binary", "congruent", "shifted", "sparse"]


def _around(init: Initializer | None, change: Callable[..., Any]) -> Initializer:
    """An initializer that returns `change(inner, key)`, where `inner(key)` is a draw of another initializer."""
    inner = as_initializer(init)

    @functools.wraps(inner)  # with its signature: it gets the weight if the other initializer asks for it
    def changed(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, **weight: Any) -> Any:
        return change(lambda k: draw(inner, k, shape, dtype, **weight), key)

    return changed


def sparse(n: float, *, rescale: bool = False) -> Initializer:
    """Sparse feedback: each neuron above reaches on average n neurons of the receiving layer, with weight one.

    B = 1 with probability p = n / fan_in, else 0, where fan_in is the size of the receiving layer

    Args:
      n: the average number of neurons, >= 0. A number above the size of the receiving layer means all its neurons.
      rescale: divides the weights by sqrt(n), so that errors do not grow from layer to layer of a sequential rule.

    Returns:
      The initializer.

    Raises:
      ValueError: n is negative, or n is zero and `rescale` is True.

    Example:
      >>> import jax, lrules
      >>> b = lrules.feedback.sparse(2)(jax.random.key(0), (100, 100))
      >>> round(float(b.sum(0).mean()))
      2

    References:
      Baldi, Sadowski, Lu (2018), Figures 3 and 4.
    """
    if n < 0 or (rescale and n == 0):
        least = "> 0 with rescale=True" if rescale else ">= 0"
        raise ValueError(f"sparse: n must be a number {least}, got {n}")

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        p = min(n / math.prod(shape[:-1]), 1.0)
        drawn = jax.random.bernoulli(key, p, shape).astype(dtype)
        return drawn / jnp.asarray(math.sqrt(n), dtype) if rescale else drawn

    return init


def binary(low: float = -1.0, high: float = 1.0) -> Initializer:
    """Binary feedback: one of two values, each with probability one half.

    B = low or high;  `binary()` draws -1 and +1, `binary(0, 1)` draws 0 and 1

    Args:
      low, high: the two values.

    Returns:
      The initializer.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> jnp.unique(lrules.feedback.binary(0, 1)(jax.random.key(0), (4, 5))).tolist()
      [0.0, 1.0]

    References:
      Baldi, Sadowski, Lu (2018), section 3.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        chosen = jax.random.bernoulli(key, 0.5, shape)
        return jnp.where(chosen, jnp.asarray(high, dtype), jnp.asarray(low, dtype))

    return init


def shifted(mean: float, *, init: Initializer | None = None) -> Initializer:
    """Feedback with a mean: the weights of another initializer plus a constant.

    B = B' + mean,  B' ~ init

    Args:
      mean: the constant.
      init: the other initializer; default `jax.nn.initializers.glorot_normal()`.

    Returns:
      The initializer.

    Raises:
      TypeError: `init` is not a function.

    Example:
      >>> import jax, lrules
      >>> b = lrules.feedback.shifted(0.1, init=jax.nn.initializers.zeros)(jax.random.key(0), (2, 3))
      >>> round(float(b.mean()), 3)
      0.1

    References:
      Baldi, Sadowski, Lu (2018), section 4.2, observation 3.
    """

    def change(inner: Callable[..., Any], key: jax.Array) -> Any:
        drawn = inner(key)
        return drawn + jnp.asarray(mean, drawn.dtype)

    return _around(init, change)


def absolute(init: Initializer | None = None) -> Initializer:
    """Non-negative feedback: the absolute values of another initializer.

    B = |B'|,  B' ~ init

    Args:
      init: the other initializer; default `jax.nn.initializers.glorot_normal()`.

    Returns:
      The initializer.

    Raises:
      TypeError: `init` is not a function.

    Example:
      >>> import jax, lrules
      >>> bool((lrules.feedback.absolute()(jax.random.key(0), (4, 5)) >= 0).all())
      True

    References:
      Lechner: Learning representations for binary-classification without backpropagation (2020), section 3.
    """
    return _around(init, lambda inner, key: jnp.abs(inner(key)))


def congruent(init: Initializer | None = None) -> Initializer:
    """Feedback with the signs that the forward weights have when `rule.init` draws it.

    B = |B'| * sign(W),  B' ~ init

    Only sequential rules can use it. The signs of the feedback stay the same when the forward weights change. For
    signs that follow the forward weights, use `lrules.sign_symmetry`.

    Args:
      init: the initializer of the magnitudes; default `jax.nn.initializers.glorot_normal()`.

    Returns:
      The initializer.

    Raises:
      TypeError: `init` is not a function.
      ValueError: in `rule.init`: the rule is direct, so its feedback does not belong to a forward weight.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": -jnp.ones((4, 2))}
      >>> rule = lrules.feedback_alignment(lrules.feedback.congruent())
      >>> bool((rule.init(jax.random.key(0), net, params, jnp.ones((1, 3))).fixed["b"] <= 0).all())
      True

    References:
      Baldi, Sadowski, Lu (2018), section 3.
    """
    inner = as_initializer(init)

    def congruent_init(
        key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, weight: Any = None
    ) -> jax.Array:
        if weight is None:
            raise ValueError(
                "congruent feedback takes the signs of a layer's weight, and direct feedback does not belong to a "
                "weight: use a sequential rule, such as feedback_alignment(init=congruent())"
            )
        return jnp.abs(draw(inner, key, shape, dtype)) * jnp.sign(weight).astype(dtype)

    return congruent_init


def averaged(n: int, *, init: Initializer | None = None) -> Initializer:
    """Averaged feedback: the mean of n draws of another initializer.

    B = (B_1 + ... + B_n) / n,  B_i ~ init;  this equals averaging the signals that n sets of random matrices bring

    Args:
      n: the number of draws, >= 1.
      init: the other initializer; default `jax.nn.initializers.glorot_normal()`.

    Returns:
      The initializer.

    Raises:
      TypeError: `init` is not a function.
      ValueError: n is not an integer >= 1.

    Example:
      >>> import jax, lrules
      >>> b = lrules.feedback.averaged(16, init=lrules.feedback.binary())(jax.random.key(0), (100, 100))
      >>> round(float(b.std()), 2)  # 1 / sqrt(16)
      0.25

    References:
      Baldi, Sadowski, Lu (2018), sections 3 and 6.1.
    """
    if not (is_whole(n) and n >= 1):
        raise ValueError(f"averaged: n must be an integer >= 1, got {n!r}")
    return _around(init, lambda inner, key: jax.vmap(inner)(jax.random.split(key, n)).mean(0))


def __dir__() -> list[str]:
    return list(__all__)
