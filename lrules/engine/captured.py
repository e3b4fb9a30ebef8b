"""What a function reads besides its arguments, by which one sees that it is still the function that it was.

A network is traced once for each kind of arguments. What its function closes over is part of that trace, so that the
trace serves only as long as this is the same: an array in a closure may be replaced, a flag of a model set, a helper
edited in a notebook. So all that can change is looked up, from the function through closures, defaults, the names that
its code reads in modules, containers and the attributes of objects. Installed packages are taken to stay as they are.
What the function itself changes while it is traced, as a counter of its calls, is left out.
"""

from __future__ import annotations

import functools
import pathlib
import sys
import sysconfig
import types
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import numpy as np

MOST = 10_000  # places; a function that reads more is traced anew at each call
LARGE = 2**20  # bytes of a NumPy array that may be written to; so is a function that reads a larger one

STILL = {"jax", "jaxlib", "numpy", "logging"}  # packages whose objects are taken to stay as they are

LENGTH = "length"  # where this changes, the whole sequence is left out

Place = tuple[int, Any]  # an object, by id, and where in it: the name of an attribute, the key of a dict

CONTAINERS = (dict, list, tuple, set, frozenset, functools.partial, types.MethodType, types.CellType)


class _Unclear(Exception):
    """What a function reads cannot be told."""


class Captured:
    """What a function reads, by place."""

    def __init__(self, fn: Callable[..., Any], without: Collection[Place] = ()) -> None:
        self.found: dict[Place, Any] = {}
        self.holders: dict[int, Any] = {}  # so that no two objects have one id
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
    """What a function reads besides its arguments; None where that cannot be told, or belongs to a trace."""
    try:
        return Captured(fn, without)
    except _Unclear:
        return None




def _is_same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, bytes | str | int) and a == b)


def _identity(value: Any) -> Any:
    """By what an object is seen to be the same: itself, the kind of a container, what a NumPy array holds."""
    if isinstance(value, jax.core.Tracer):
        raise _Unclear
    if isinstance(value, np.ndarray) and value.flags.writeable:
        if value.nbytes > LARGE:
            raise _Unclear
        return value.tobytes()
    return type(value) if isinstance(value, CONTAINERS) else value


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """What an object consists of, as far as that can change, and where."""
    if isinstance(value, types.FunctionType):
        yield from _attributes(value, "__code__", "__defaults__", "__kwdefaults__")
        yield from vars(value).items()
        yield from enumerate(value.__closure__ or ())
        if not _installed(value.__module__):
            yield from _globals(value)
    elif isinstance(value, types.CellType):
        try:
            yield "contents", value.cell_contents
        except ValueError:  # nothing is in it yet
            return
    elif isinstance(value, types.MethodType):
        yield from _attributes(value, "__func__", "__self__")
    elif isinstance(value, functools.partial):
        yield from _attributes(value, "func", "args", "keywords")
    elif isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list | tuple | set | frozenset):
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


def _globals(fn: types.FunctionType) -> Iterator[tuple[Any, Any]]:
    """What the names in a function's code stand for, in its module and in others that are not installed."""
    names = _names(fn.__code__)
    for name in names:
        value = fn.__globals__.get(name)
        yield name, value
        if isinstance(value, types.ModuleType) and not _installed(value.__name__):
            yield from (((name, other), vars(value).get(other)) for other in names)


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
    """Whether a module comes with Python or in an installed package, or is this library's own."""
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
