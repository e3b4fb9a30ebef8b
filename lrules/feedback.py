"""Initialisers of feedback weights that `jax.nn.initializers` lacks.

Each is `init(key, shape, dtype)`, for the `init=` of a rule. Sequential feedback is drawn as a layer's
`[fan_in, fan_out]` (a convolution: `[*window, in, out]`), direct feedback as `[hidden size, outputs]`: the last axis is
where the error comes from, the others are the layer that receives it. All are from Baldi, Sadowski, Lu: Learning in the
machine: random backpropagation and the deep learning channel (2018), sections 3 and 4, if not said otherwise.
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
    """`change(inner, key)` in place of `inner(key)`, what another initialiser draws."""
    inner = as_initializer(init)

    @functools.wraps(inner)  # its signature too: it gets the weight if the other one asks for that
    def changed(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, **weight: Any) -> Any:
        return change(lambda k: draw(inner, k, shape, dtype, **weight), key)

    return changed


def sparse(n: float, *, rescale: bool = False) -> Initializer:
    """Each neuron above reaches n neurons of the receiving layer on average, with weight one; all others get zero.

    B = 1 with probability p = n / fan_in, else 0, where fan_in is the size of the receiving layer

    Args:
      n: how many, from 0 to the size of the receiving layer; more count as all of them.
      rescale: divide by sqrt(n), so that errors do not grow from layer to layer of a sequential channel.

    Raises:
      ValueError: n is negative, or zero where it is to be divided by.

    References:
      Baldi, Sadowski, Lu (2018), Figures 3 and 4.
    """
    if n < 0 or (rescale and n == 0):
        least = "above 0" if rescale else "from 0 on"
        raise ValueError(f"sparse(n={n}): n counts neurons that are reached, so give a number {least}")

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        p = min(n / math.prod(shape[:-1]), 1.0)
        drawn = jax.random.bernoulli(key, p, shape).astype(dtype)
        return drawn / jnp.asarray(math.sqrt(n), dtype) if rescale else drawn

    return init


def binary(low: float = -1.0, high: float = 1.0) -> Initializer:
    """Two values, each with probability one half: `binary()` is {-1, +1}, `binary(0, 1)` is {0, 1}.

    Args:
      low, high: the values.

    References:
      Baldi, Sadowski, Lu (2018), section 3.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        chosen = jax.random.bernoulli(key, 0.5, shape)
        return jnp.where(chosen, jnp.asarray(high, dtype), jnp.asarray(low, dtype))

    return init


def shifted(mean: float, *, init: Initializer | None = None) -> Initializer:
    """Another initialiser's weights plus a mean: `shifted(0.1, init=glorot_uniform())`.

    Args:
      mean: what is added to every weight.
      init: the other initialiser; default `jax.nn.initializers.glorot_normal()`.

    References:
      Baldi, Sadowski, Lu (2018), section 4.2, observation 3.
    """

    def change(inner: Callable[..., Any], key: jax.Array) -> Any:
        drawn = inner(key)
        return drawn + jnp.asarray(mean, drawn.dtype)

    return _around(init, change)


def absolute(init: Initializer | None = None) -> Initializer:
    """Another initialiser's absolute values.

    Args:
      init: the other initialiser; default `jax.nn.initializers.glorot_normal()`.

    References:
      Lechner: Learning representations for binary-classification without backpropagation (2020), section 3.
    """
    return _around(init, lambda inner, key: jnp.abs(inner(key)))


def congruent(init: Initializer | None = None) -> Initializer:
    """Another initialiser's magnitudes with the signs that the forward weights have when the feedback is drawn.

    B = |init| * sign(W)

    For sequential rules. The signs stay where the forward weights' may change; feedback that follows them is
    `lrules.sign_symmetry`.

    Args:
      init: the other initialiser; default `jax.nn.initializers.glorot_normal()`.

    Raises:
      ValueError: at `rule.init`: the rule is direct, so that its feedback stands for no weight.

    References:
      Baldi, Sadowski, Lu (2018), section 3.
    """
    inner = as_initializer(init)

    def congruent_init(
        key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, weight: Any = None
    ) -> jax.Array:
        if weight is None:
            raise ValueError(
                "congruent feedback takes the signs of the layer's own weight, which direct feedback does not stand "
                "for: use a sequential rule, such as feedback_alignment(init=congruent())"
            )
        return jnp.abs(draw(inner, key, shape, dtype)) * jnp.sign(weight).astype(dtype)

    return congruent_init


def averaged(n: int, *, init: Initializer | None = None) -> Initializer:
    """The mean of n draws: what n sets of random matrices give whose signals are averaged.

    Args:
      n: how many.
      init: the other initialiser; default `jax.nn.initializers.glorot_normal()`.

    References:
      Baldi, Sadowski, Lu (2018), sections 3 and 6.1.
    """
    if not (is_whole(n) and n >= 1):
        raise ValueError(f"averaged(n={n!r}): give a whole number of draws, one or more")
    return _around(init, lambda inner, key: jax.vmap(inner)(jax.random.split(key, n)).mean(0))


def __dir__() -> list[str]:
    return list(__all__)
