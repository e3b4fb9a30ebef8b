"""Questions about dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lrules.engine.jaxprs import Aval


def is_inexact(aval: Aval) -> bool:
    return jnp.issubdtype(getattr(aval, "dtype", jnp.int32), jnp.inexact)


def counts(aval: Aval) -> bool:
    """Whether the elements are integers, not booleans."""
    return jnp.issubdtype(getattr(aval, "dtype", jnp.bool_), jnp.integer)


def feedback_dtype(dtype: Any) -> Any:
    """The dtype of feedback for a weight: float32 if a frozen weight is quantised to integers."""
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.dtype(jnp.float32)


def at_least_float32(dtype: Any) -> Any:
    """Returns the dtype for sums over a batch: float32 for a narrower dtype, else the dtype itself.

    Args:
      dtype: a real or complex floating-point dtype.

    Returns:
      The dtype.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> str(lrules.extend.at_least_float32(jnp.dtype("bfloat16")))
      'float32'
    """
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def widened(fn: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, n: Any) -> jax.Array:
    """`fn(x, n)`, such as a quotient, in at least float32, in the dtype of x: float16 has no number n above 65,504."""
    dtype = at_least_float32(x.dtype)
    return fn(x.astype(dtype), jnp.asarray(n).astype(dtype)).astype(x.dtype)
