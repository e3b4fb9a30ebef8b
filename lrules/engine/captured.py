"""The values that a function reads beside its arguments: they show whether it is still the same function.

A network is traced once for each kind of arguments. The values over which its function closes are part of the trace. So
the trace is valid only as long as they stay the same: someone may replace an array in a closure, set a flag of a model,
or edit a helper in a notebook. This file looks up all values that can change, from the function through closures,
defaults, the names that its code reads in modules, containers and the attributes of objects. It assumes that installed
packages do not change. It leaves out values that the function itself changes while it is traced, as a counter of calls.
"""

from __future__ import annotations

import array
import collections
import contextvars
import functools
import pathlib
import sys
import sysconfig
import types
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import numpy as np

MOST = 10_000  # the largest number of places; a function that reads more is traced again at each call
LARGE = 2**20  # the largest writable NumPy array, in bytes; a function that reads a larger one is traced again too

STILL = {"jax", "jaxlib", "numpy", "logging"}  # packages whose objects are assumed not to change

LENGTH = "length"  # if this changes, the whole sequence is left out
ORDER = ("order",)  # of the keys of a dict: no key of a dict that people write

Place = tuple[int, Any]  # an object, by id, and the place in it: the name of an attribute, the key of a dict

SEQUENCES = (list, tuple, set, frozenset, collections.deque)
MAPPINGS = (dict, types.MappingProxyType)
CONTAINERS = (*SEQUENCES, *MAPPINGS, functools.partial, types.MethodType, types.CellType)


class _Unclear(Exception):
    """The values that a function reads are not known."""


class Captured:
    """The values that a function reads, by place."""

    def __init__(self, fn: Callable[..., Any], without: Collection[Place] = ()) -> None:
        self.found: dict[Place, Any] = {}
        self.holders: dict[int, Any] = {}  # so that no two objects have the same id
        stack: list[tuple[Place, Any]] = [((0, "function"), fn)]
        while stack:
            place, value = stack.pop()
            if place in without:
                continue
            self.found[place] = _identity(value)
            if len(self.found) > MOST:
                raise _Unclear
            if id(value) not in self.holders:
                self.holders[id(value)] = value
                parts = [((id(value), where), part) for where, part in _parts(value)]
                if not any(place in without for place, _ in parts[:1] if place[1] is LENGTH):
                    stack += parts

    def changed(self, other: Captured) -> set[Place]:
        """The places where two differ."""
        mine, theirs = self.found, other.found
        return (mine.keys() ^ theirs.keys()) | {
            place for place in mine.keys() & theirs.keys() if not _is_same(mine[place], theirs[place])
        }


def captured(fn: Callable[..., Any], without: Collection[Place] = ()) -> Captured | None:
    """The values that a function reads beside its arguments; None if they are not known, or belong to a trace."""
    try:
        return Captured(fn, without)
    except _Unclear:
        return None


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, bytes | str | int) and a == b)


def _identity(value: Any) -> Any:
    """What identifies an object: itself, the kind of a container, or the content of an array that can be written."""
    if isinstance(value, jax.core.Tracer):
        raise _Unclear
    if isinstance(value, np.ndarray) and _writeable(value):
        if value.nbytes > LARGE:
            raise _Unclear
        return value.tobytes()
    if isinstance(value, bytearray | array.array):
        return bytes(value)
    return type(value) if isinstance(value, CONTAINERS) else value


def _writeable(value: Any) -> bool:
    """Whether the content of an array can change: a view that cannot be written shows an array that perhaps can."""
    return isinstance(value, np.ndarray) and (value.flags.writeable or _writeable(value.base))


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """The parts of an object that can change, with their places."""
    if isinstance(value, types.FunctionType):
        yield from _attributes(value, "__code__", "__defaults__", "__kwdefaults__")
        yield from vars(value).items()
        yield from enumerate(value.__closure__ or ())
        if not _installed(value.__module__):
            yield from _globals(value)
    elif isinstance(value, types.CellType):
        yield "contents", _contents(value)
    elif isinstance(value, types.MethodType):
        yield from _attributes(value, "__func__", "__self__")
    elif isinstance(value, functools.partial):
        yield from _attributes(value, "func", "args", "keywords")
    elif isinstance(value, MAPPINGS):
        yield ORDER, hash(tuple(value))
        yield from value.items()
    elif isinstance(value, contextvars.ContextVar):
        yield "value", value.get(None)
    elif isinstance(value, SEQUENCES):
        yield LENGTH, len(value)
        yield from enumerate(value)
    elif isinstance(value, type):
        if not _installed(value.__module__):
            yield from enumerate(value.__bases__)
            yield from vars(value).items()
    elif isinstance(value, types.ModuleType):
        return
    elif not _installed(type(value).__module__):
        yield type, type(value)
        yield from _state(value)
    elif isinstance(value, property | functools.cached_property):
        yield from _attributes(value, "fget", "func")
    elif callable(value) or isinstance(value, classmethod | staticmethod):  # a jitted function, for example
        yield from _attributes(value, "__wrapped__")
    elif not _stays(type(value).__module__):
        yield from _state(value)


def _state(value: Any) -> Iterator[tuple[Any, Any]]:
    yield from getattr(value, "__dict__", {}).items()
    yield from _attributes(value, *_slots(type(value)))


def _attributes(value: Any, *names: str) -> Iterator[tuple[str, Any]]:
    yield from ((name, getattr(value, name, None)) for name in names)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is still empty
        return None


def _globals(fn: types.FunctionType) -> Iterator[tuple[Any, Any]]:
    """The values of the names in a function's code: in its module, and in other modules that are not installed.

    The function has these other modules from its own module, from a closure, or from an import in its body.
    """
    names = _names(fn.__code__)
    found = {name: fn.__globals__.get(name, sys.modules.get(name)) for name in names}
    yield from found.items()
    yield from _in_modules([*found.values(), *map(_contents, fn.__closure__ or ())], names)


def _in_modules(values: list[Any], names: Collection[str]) -> Iterator[tuple[Any, Any]]:
    """The values of these names in the modules among the values, and in the modules that are found there."""
    seen = set()
    while values:
        module = values.pop()
        if not isinstance(module, types.ModuleType) or _installed(module.__name__) or module.__name__ in seen:
            continue
        seen.add(module.__name__)
        for name in names:
            value = vars(module).get(name)
            yield (module.__name__, name), value
            values.append(value)


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    inner = (name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names(const))
    return tuple(dict.fromkeys((*code.co_names, *inner)))


def _slots(cls: type[Any]) -> tuple[str, ...]:
    slots = (vars(base).get("__slots__", ()) for base in cls.__mro__)
    return tuple(name for own in slots for name in ([own] if isinstance(own, str) else own))


def _stays(module: str) -> bool:
    return module.partition(".")[0] in STILL or module.startswith("lrules.engine")


@functools.lru_cache(maxsize=1024)
def _installed(module: str | None) -> bool:
    """Whether a module belongs to Python, to an installed package or to this library."""
    if module is None or module == "__main__" or module not in sys.modules:
        return False
    if module.partition(".")[0] == "lrules":
        return True
    file = getattr(sys.modules[module], "__file__", None)
    if file is None:
        return True
    folder = pathlib.Path(file)
    return folder.is_relative_to(sysconfig.get_path("stdlib")) or bool(
        {"site-packages", "dist-packages"} & set(folder.parts)
    )
