"""Marks inside a model: a name for a tensor, and whether a function is an activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

from lrules.engine.activations import MARK, UNMARK

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def hidden(x: T, name: str) -> T:
    """Gives a tensor inside a model a name, so that direct feedback can land there (`at=`).

    hidden(x, name) = x

    Args:
      x: an array, or a pytree of arrays.
      name: the name.

    Returns:
      The same values.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net = lambda w, x: jnp.tanh(lrules.hidden(jnp.sin(x @ w["a"]), "sines") @ w["b"]) @ w["c"]
      >>> w = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 5)), "c": jnp.ones((5, 2))}
      >>> rule = lrules.direct_feedback_alignment(at="sines")
      >>> list(rule.init(jax.random.key(0), net, w, jnp.ones((6, 3))).fixed)
      ['sines']
    """
    named: T = checkpoint_name(x, name)  # JAX uses these names for rematerialisation; we only need the names
    return named


def activation(fn: F) -> F:
    """Marks an elementwise function as one activation, for rules that treat activations.

    activation(fn)(x) = fn(x)

    Args:
      fn: an elementwise function `x -> y` without parameters.

    Returns:
      The same function, under a name that the library recognises.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> bent = lrules.activation(lambda x: x + jnp.sin(x) ** 2)
      >>> lrules.describe(lambda w, x: bent(x @ w), lrules.backprop(), jnp.eye(2), jnp.ones((3, 2))).activations
      ['lambda']
    """
    return _named(fn, MARK)


def not_activation(fn: F) -> F:
    """Marks a function as one without activations, for rules that treat activations.

    not_activation(fn)(x) = fn(x)

    Args:
      fn: any function. Rules do not take any operation inside it for an activation.

    Returns:
      The same function, under a name that the library recognises.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> gate = lrules.not_activation(jax.nn.sigmoid)
      >>> lrules.describe(lambda w, x: gate(x @ w), lrules.backprop(), jnp.eye(2), jnp.ones((3, 2))).activations
      []
    """
    return _named(fn, UNMARK)


def _named(fn: F, prefix: str) -> F:
    def renamed(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    renamed.__name__ = renamed.__qualname__ = prefix + getattr(fn, "__name__", "function").strip("<>")
    named: F = jax.jit(renamed)  # type: ignore[assignment]  # it takes the same arguments
    return named
