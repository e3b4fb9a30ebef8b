"""Marks inside a model: a name for a tensor, and what is an activation and what is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

from lrules.engine.activations import MARK, UNMARK

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def hidden(x: T, name: str) -> T:
    """Names a tensor inside a model, so that direct feedback can land there (`at=`).

    Args:
      x: an array, or a pytree of them.
      name: the name.

    Returns:
      The same values.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> net = lambda w, x: jnp.tanh(lrules.hidden(jnp.sin(x @ w["a"]), "sines") @ w["b"]) @ w["c"]
      >>> w = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 5)), "c": jnp.ones((5, 2))}
      >>> rule = lrules.direct_feedback_alignment(at="sines")
      >>> list(rule.init(jax.random.key(0), net, w, jnp.ones((6, 3))).fixed)
      ['sines']
    """
    named: T = checkpoint_name(x, name)  # JAX names tensors for the sake of rematerialisation; names are all we need
    return named


def activation(fn: F) -> F:
    """Marks an elementwise function as one activation, for rules that need to know.

    Args:
      fn: `x -> y` of the same shape, without parameters.

    Returns:
      The same function under a name that the library recognises.

    Example:
      >>> import jax.numpy as jnp
      >>> bent = activation(lambda x: x + jnp.sin(x))
      >>> float(bent(0.0))
      0.0
    """
    return _named(fn, MARK)


def not_activation(fn: F) -> F:
    """Marks a function as holding no activation, for rules that would otherwise take one in it for such.

    Args:
      fn: any function.

    Returns:
      The same function under a name that the library recognises.
    """
    return _named(fn, UNMARK)


def _named(fn: F, prefix: str) -> F:
    def renamed(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    renamed.__name__ = renamed.__qualname__ = prefix + getattr(fn, "__name__", "function").strip("<>")
    named: F = jax.jit(renamed)  # type: ignore[assignment]  # of the same arguments
    return named
