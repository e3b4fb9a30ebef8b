"""What an option may be, and the sentence that is said where it is something else."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

Initializer = Callable[..., jax.Array]


def is_number(value) -> TypeGuard[float]:
    """Whether it is one real number, NaN and infinity among them; True and False are none."""
    dtype = getattr(value, "dtype", None)
    if dtype is not None:
        real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
        return bool(real and value.ndim == 0)
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value) -> TypeGuard[int]:
    """Whether it is a whole number; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def as_initializer(init) -> Initializer:
    """The initializer, or `jax.nn.initializers.glorot_normal()` if it is None.

    Raises:
      TypeError: it is no function.
    """
    if init is None:
        return jax.nn.initializers.glorot_normal()
    if not callable(init):
        raise TypeError(
            f"init= is a {type(init).__name__}, not an initializer: give a function (key, shape, dtype) -> array, such "
            "as jax.nn.initializers.glorot_normal()"
        )
    return init


def draw(init: Initializer, key, shape: tuple[int, ...], dtype, **weight) -> jax.Array:
    """What an initializer draws, checked.

    Raises:
      TypeError: it draws no array.
      ValueError: it draws one of another shape, or of whole numbers.
    """
    drawn = init(key, shape, dtype, **weight)
    if not hasattr(drawn, "shape"):
        hint = "call its factory first" if callable(drawn) else "give a function (key, shape, dtype) -> array"
        raise TypeError(f"init= made a {type(drawn).__name__} in place of an array of shape {shape}: {hint}")
    if drawn.shape != tuple(shape) or not jnp.issubdtype(drawn.dtype, jnp.inexact):
        raise ValueError(
            f"init= made an array of shape {drawn.shape} and dtype {drawn.dtype} in place of one of shape {shape} and "
            f"dtype {jnp.dtype(dtype)}: give a function (key, shape, dtype) -> array that keeps to both"
        )
    return drawn


def require_flags(**flags) -> None:
    """Options that are True or False are that."""
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{name}={value!r} is neither True nor False: give one of them")


def require_pattern(pattern, what: str = "") -> None:
    """A regular expression is one; `what` stands before it in the message."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{what}{pattern!r} is no regular expression: {error}") from None


def mesh_axes(axis_name) -> tuple[str, ...]:
    """The names of mesh axes that `axis_name=` gives.

    Raises:
      TypeError: it is neither None nor a name nor several.
    """
    several = isinstance(axis_name, Iterable) and not isinstance(axis_name, str)
    names = () if axis_name is None else tuple(axis_name) if several else (axis_name,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f'axis_name={axis_name!r} names no mesh axes: give "data", or several as ("data", "model")')
    return names
