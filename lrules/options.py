"""The allowed values of options, and the message for other values."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lrules.typing import Initializer

T = TypeVar("T")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether the value is one real number. NaN and infinity are numbers, True and False are not."""
    dtype = getattr(value, "dtype", None)
    if dtype is not None:
        real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
        return bool(real and value.ndim == 0)
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_positive(value: Any) -> TypeGuard[float]:
    """Whether the value is one finite real number above 0."""
    return is_number(value) and 0 < value < math.inf


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether the value is an integer. True and False are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def as_initializer(init: Any) -> Initializer:
    """The initializer, or `jax.nn.initializers.glorot_normal()` if it is None.

    Raises:
      TypeError: it is not a function.
    """
    if init is None:
        return jax.nn.initializers.glorot_normal()
    if not callable(init):
        raise TypeError(
            "init must be a function (key, shape, dtype) -> array, such as jax.nn.initializers.glorot_normal(), got a "
            f"{type(init).__name__}"
        )
    return init


def draw(init: Initializer, key: jax.Array, shape: tuple[int, ...], dtype: Any, **weight: Any) -> jax.Array:
    """Draws with an initializer, and checks the result.

    Raises:
      TypeError: the result is not an array.
      ValueError: the array has another shape, or holds integers.
    """
    drawn = init(key, shape, dtype, **weight)
    if not hasattr(drawn, "shape"):
        hint = "call its factory first" if callable(drawn) else "give a function (key, shape, dtype) -> array"
        raise TypeError(f"init must return an array of shape {shape}, got a {type(drawn).__name__}: {hint}")
    if drawn.shape != tuple(shape) or not jnp.issubdtype(drawn.dtype, jnp.inexact):
        raise ValueError(
            f"init must return an array of shape {shape} and dtype {jnp.dtype(dtype)}, got one of shape {drawn.shape} "
            f"and dtype {drawn.dtype}: give a function (key, shape, dtype) -> array that uses both"
        )
    return drawn


def require_flags(**flags: object) -> None:
    """Refuses options that are not True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def require_key(key: Any, what: str) -> None:
    """Refuses what is not one key of `jax.random`.

    Raises:
      TypeError: it is something else.
      ValueError: it is several keys.
    """
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and dtype != jnp.uint32:
        got = key if is_number(key) else f"a {type(key).__name__}"
        raise TypeError(f"{what} must be a key, such as jax.random.key(0), got {got}")
    if typed and key.ndim:
        raise ValueError(f"{what} must be one key, got keys of shape {key.shape}: give keys[0], or use jax.vmap")


def require_pattern(pattern: Any, what: str = "") -> None:
    """Refuses a pattern that is not a regular expression; the message begins with `what`."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{what}{pattern!r} is not a regular expression: {error}") from None


def mesh_axes(axis_name: Any) -> tuple[str, ...]:
    """The names of mesh axes in `axis_name=`.

    Raises:
      TypeError: it is not a name, several names or None.
    """
    several = isinstance(axis_name, Iterable) and not isinstance(axis_name, str)
    names = () if axis_name is None else tuple(axis_name) if several else (axis_name,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f'axis_name must be a name such as "data", several names as ("data", "model"), or None, got {axis_name!r}'
        )
    return names


def first_match(patterns: Mapping[str, T], name: str) -> T | None:
    """The value of the first regular expression (`re.search`) that matches the name; None if none matches."""
    return next((value for pattern, value in patterns.items() if re.search(pattern, name)), None)


class ByName(Generic[T]):
    """An option: one value for every name, or values by regular expression (the first match holds).

    Args:
      option: the name of the option, for messages.
      given: the value, or a dict `{pattern: value}`.
      kind: the kind of thing that the names belong to, for messages.

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
        """All values, in the order in which they were given."""
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

    def has(self, name: str) -> bool:
        """Whether a pattern matches this name."""
        return any(re.search(pattern, name) for pattern in self.patterns)

    def check(self, names: Iterable[str], hint: str = "") -> None:
        """Refuses a pattern that is not the first match of any name, except one that matches everything ('.*').

        Raises:
          ValueError: there is such a pattern; the message lists the names, and ends with the hint.
        """
        if not self.several:
            return
        names = list(dict.fromkeys(names))
        used = {next((p for p in self.patterns if re.search(p, name)), None) for name in names}
        for pattern in self.patterns:
            if pattern not in used and names and not re.search(pattern, ""):
                matches = any(re.search(pattern, name) for name in names)
                why = "comes after patterns that match the same names" if matches else f"matches no {self.kind}"
                listed = ", ".join(map(repr, names))
                raise ValueError(f"{self.option}: {pattern!r} {why}; the {self.kind}s are {listed}{hint}")


def rule_numbers(numbers: Any, kind: str = "layer") -> dict[str, ByName[Any]]:
    """The option `numbers=`, by name.

    Raises:
      TypeError: it is not a dict.
    """
    if not isinstance(numbers or {}, Mapping):
        raise TypeError(f"numbers must be a dict {{name: number}}, got a {type(numbers).__name__}")
    return {name: ByName(name, value, kind) for name, value in (numbers or {}).items()}


def by_name(
    option: str,
    given: Any,
    allowed: Callable[[Any], bool],
    remedy: str,
    kind: str = "layer",
    *,
    traced: bool = False,
) -> ByName[Any]:
    """An option that is a number, or numbers by regular expression; with `traced`, `jax.jit` may trace them.

    Raises:
      ValueError: a number is not allowed; the message says `remedy`, such as "a number >= 0". The range of a traced
        number cannot be checked.
    """
    found = ByName(option, given, kind)
    for value in found.values():
        if isinstance(value, jax.core.Tracer):
            if traced and is_number(value):
                continue
            not_traced(option, value, remedy)
        if not allowed(value):
            raise ValueError(f"{option} must be {remedy}, got {value!r}")
    return found


def not_traced(option: str, value: Any, remedy: str) -> None:
    """Refuses a traced number; the message says `remedy`, such as "a number >= 0"."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{option} must be {remedy}, and not traced, got {jax.typeof(value)}: make one rule for each value, "
            "outside of jit, vmap and scan"
        )


def asked_for(what: str, fn: Callable[..., Any], takes: Sequence[str], offers: Collection[str]) -> frozenset[str]:
    """Finds the arguments that a function asks for by name, after the arguments that it gets by position.

    A function asks for an argument without a default value, or with the default None.

    Args:
      what: the name of the function, for messages.
      fn: the function.
      takes: the arguments that it gets by position; it may use other names for them.
      offers: the names that it may ask for.

    Raises:
      TypeError: `fn` is not a function, or it cannot be called with these arguments.

    Example:
      >>> sorted(asked_for("learn", lambda e, h, b, *, rng: e, ["e", "h", "b"], ["rng", "state"]))
      ['rng']
    """
    call = f"({', '.join(takes)})"
    if not callable(fn):
        raise TypeError(f"{what} must be a function {call}, got a {type(fn).__name__}")
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # some functions have no signature
        return frozenset()
    ordered = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(ordered) < len(takes) and all(p.kind != p.VAR_POSITIONAL for p in parameters):
        got = f"({', '.join(p.name for p in ordered)})"
        raise TypeError(f"{what} must take the arguments {call}, got a function of {got}")
    names = set()
    for p in (p for p in parameters if p not in ordered[: len(takes)]):
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        if p.name in offers and (p.default is p.empty or p.default is None) and p.kind != p.POSITIONAL_ONLY:
            names.add(p.name)
        elif p.default is p.empty:
            listed = ", ".join(map(repr, offers)) or "nothing"
            raise TypeError(
                f"{what} asks for an unknown argument {p.name!r}: after {call} it can ask for {listed} by name"
            )
    return frozenset(names)
