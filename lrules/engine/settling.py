"""States that settle: iterations that renew them all, for a fixed number of times or until they hardly change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lrules.engine.dtypes import at_least_float32
from lrules.engine.jaxprs import as_varying, varying_axes
from lrules.typing import AxisName


def repeat(
    iterate: Callable[..., Any],
    carry: Any,
    keys: Any = None,
    *,
    done: int,
    iterations: int,
    least: int = 0,
    tolerance: float | None = None,
    axis_name: AxisName = None,
) -> tuple[Any, dict[str, jax.Array]]:
    """`(carry, report)` after the remaining iterations; it stops early if the residual is within the tolerance.

    Args:
      iterate: `(carry, key) -> (carry, residual)`.
      carry: the states, and what goes with them.
      keys: one per iteration, or None.
      done: how many iterations came before. Their residual is 1.
      iterations: how many there are in all, those before included.
      least: it does not stop before so many.
      tolerance: None if it never stops early.
      axis_name: the mesh axes over which the residual is the same.
    """
    dtype = jnp.result_type(float)
    keys = None if keys is None else keys[done:]
    if tolerance is None or iterations == done:
        found = jnp.ones(done, dtype)
        if iterations > done:
            carry, rest = jax.lax.scan(iterate, carry, keys, length=iterations - done)
            found = jnp.concatenate([found, rest])
        return carry, {"residual": found, "iterations": jnp.asarray(iterations)}

    least = max(least, done)

    def more(loop: Any) -> Any:
        i, _, found = loop
        return (i < iterations) & ((i < least) | ~(found[i - 1] <= tolerance))

    def body(loop: Any) -> tuple[Any, Any, Any]:
        i, carry, found = loop
        carry, change = iterate(carry, None if keys is None else keys[i - done])
        return i + 1, carry, found.at[i].set(change)

    found = jnp.where(jnp.arange(iterations) < done, jnp.ones((), dtype), jnp.full((), jnp.nan, dtype))
    if axis_name is None:
        change = jax.eval_shape(iterate, carry, None if keys is None else keys[0])[1]
        found = as_varying(found, varying_axes(change))
    count, carry, found = jax.lax.while_loop(more, body, (jnp.asarray(done), carry, found))
    return carry, {"residual": found, "iterations": count}


def residual(
    changes: Mapping[str, Any],
    sizes: Mapping[str, Any],
    axis_name: AxisName = None,
    ranks: Mapping[str, int] | None = None,
) -> jax.Array:
    """The largest change of a state, divided by its size; the norms are over all devices of the axes.

    A state of size zero is left out, because no error reaches it. If it changes, other states show it.

    Args:
      changes, sizes: arrays by state.
      axis_name: the mesh axes.
      ranks: the rank of a state, by name. The axes before are those of loops, with a state for each iteration. A name
        that is not there has one state.
    """
    ranks = ranks or {}
    dtype = jnp.result_type(float)
    if not changes:
        return jnp.zeros((), dtype)
    squares = [
        jnp.concatenate([_squares(by[site], ranks.get(site)).astype(dtype) for site in changes])
        for by in (changes, sizes)
    ]
    both = jnp.stack(squares)
    change, size = jnp.sqrt(both if axis_name is None else jax.lax.psum(both, axis_name))
    return jnp.where(size == 0, 0, change / jnp.where(size == 0, 1, size)).max(initial=0)  # a loop may have no turn


def _squares(x: jax.Array, rank: int | None) -> jax.Array:
    """The squared norms of the states in `x`, which are of this rank."""
    squared = jnp.square(jnp.abs(x.astype(at_least_float32(x.dtype))))
    return squared.sum(tuple(range(x.ndim - (x.ndim if rank is None else rank), x.ndim))).reshape(-1)
