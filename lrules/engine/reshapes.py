"""The axes of an array before and after a reshape or a transpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.export import is_symbolic_dim


def in_order(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The array with its axes in this order, without an operation if they are."""
    return x if list(axes) == sorted(axes) else jax.lax.transpose(x, tuple(axes))


def moved(x: jax.Array, source: Sequence[int], destination: Sequence[int]) -> jax.Array:
    """`jnp.moveaxis`, without an operation if nothing moves."""
    order = [i for i in range(x.ndim) if i not in source]
    for at, i in sorted(zip(destination, source, strict=True)):
        order.insert(at, i)
    return in_order(x, order)


def reshape_groups(a: Sequence[int], b: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The axes of the shape `a` that become axes of the shape `b` in a reshape, in the smallest groups."""
    groups, i, j = [], 0, 0
    while i < len(a) or j < len(b):
        left, right = [i] if i < len(a) else [], [j] if j < len(b) else []
        m, n = (a[i] if left else 1), (b[j] if right else 1)
        i, j = i + len(left), j + len(right)
        while m != n:
            if i < len(a) and (j == len(b) or _smaller(m, n)):
                left.append(i)
                m *= a[i]
                i += 1
            elif j < len(b):
                right.append(j)
                n *= b[j]
                j += 1
            else:
                break
        groups.append((left, right))
    return groups


def _smaller(m: Any, n: Any) -> bool:
    """Whether the first product of sizes is smaller. Symbolic sizes cannot be compared: then, whether it divides."""
    if is_symbolic_dim(m) or is_symbolic_dim(n):
        return n % m == 0
    return m < n
