"""What an option may be, and the sentence that is said where it is something else."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lrules.typing import Initializer

T = TypeVar("T")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is one real number, NaN and infinity among them; True and False are none."""
    dtype = getattr(value, "dtype", None)
    if dtype is not None:
        real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
        return bool(real and value.ndim == 0)
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def as_initializer(init: Any) -> Initializer:
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


def draw(init: Initializer, key: jax.Array, shape: tuple[int, ...], dtype: Any, **weight: Any) -> jax.Array:
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


def require_flags(**flags: object) -> None:
    """Options that are True or False are that."""
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{name}={value!r} is neither True nor False: give one of them")


def require_pattern(pattern: Any, what: str = "") -> None:
    """A regular expression is one; `what` stands before it in the message."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{what}{pattern!r} is no regular expression: {error}") from None


def mesh_axes(axis_name: Any) -> tuple[str, ...]:
    """The names of mesh axes that `axis_name=` gives.

    Raises:
      TypeError: it is neither None nor a name nor several.
    """
    several = isinstance(axis_name, Iterable) and not isinstance(axis_name, str)
    names = () if axis_name is None else tuple(axis_name) if several else (axis_name,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f'axis_name={axis_name!r} names no mesh axes: give "data", or several as ("data", "model")')
    return names


def first_match(patterns: Mapping[str, T], name: str) -> T | None:
    """The value of the first regular expression (`re.search`) that the name matches; None if it matches none."""
    return next((value for pattern, value in patterns.items() if re.search(pattern, name)), None)


class ByName(Generic[T]):
    """An option: one value for every name, or values by regular expression, of which the first match holds.

    Args:
      option: the name of the option, for messages.
      given: the value, or a dict `{pattern: value}`.
      kind: what the names are names of, for messages.

    Raises:
      ValueError: a pattern is not a regular expression, or the dict is empty.

    Example:
      >>> alpha = ByName("alpha", {"head": 0.1, ".*": 1.0})
      >>> alpha.check(["body/kernel", "head/kernel"])
      >>> alpha.of("head/kernel")
      0.1
    """

    def __init__(self, option: str, given: T | Mapping[str, T], kind: str = "layer") -> None:
        self.option, self.kind = option, kind
        self.several = isinstance(given, Mapping)
        self.patterns: dict[str, T] = dict(given) if isinstance(given, Mapping) else {"": given}
        if not self.patterns:
            raise ValueError(f"{option} is an empty dict: give one value, or {{pattern: value}}")
        for pattern in self.patterns if self.several else ():
            require_pattern(pattern, f"{option}: ")

    def values(self) -> list[T]:
        """All values that are given, in their order."""
        return list(self.patterns.values())

    def of(self, name: str) -> T:
        """The value for this name.

        Raises:
          ValueError: no pattern matches it.
        """
        for pattern, value in self.patterns.items():
            if re.search(pattern, name):
                return value
        raise ValueError(
            f"{self.option}: no pattern matches the {self.kind} {name!r}: add one, such as '.*', at the end"
        )

    def check(self, names: Iterable[str], hint: str = "") -> None:
        """Every pattern has to be the first match of a name, but for one that matches everything ('.*').

        Raises:
          ValueError: a pattern is not; the message lists the names, and ends with the hint.
        """
        if not self.several:
            return
        names = list(dict.fromkeys(names))
        used = {next((p for p in self.patterns if re.search(p, name)), None) for name in names}
        for pattern in self.patterns:
            if pattern not in used and names and not re.search(pattern, ""):
                matches = any(re.search(pattern, name) for name in names)
                why = "is shadowed by those before it" if matches else f"matches no {self.kind}"
                listed = ", ".join(map(repr, names))
                raise ValueError(f"{self.option}: {pattern!r} {why}; the {self.kind}s are {listed}{hint}")


def numbers(option: str, given: Any, allowed: Callable[[Any], bool], remedy: str, kind: str = "layer") -> ByName[Any]:
    """An option that is a number, or numbers by regular expression.

    Raises:
      ValueError: one of them is not allowed; the message ends with the remedy, "give a number from 0 on".
    """
    found = ByName(option, given, kind)
    for value in found.values():
        if not allowed(value):
            raise ValueError(f"{option} must be {remedy}, got {value!r}")
    return found
