"""Turns traced values over which a function closes into arguments.

A rule's functions run inside functions with a custom derivative. These must not close over traced values: inside a
loop, `remat` or `vmap` they would fail. A traced hyperparameter, as alpha in `jax.vmap(lambda alpha: ...)`, is such a
value. So it is taken out of the function, goes in as an argument, and is put back into a copy of the function.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

F = TypeVar("F")


def held(thing: F) -> tuple[list[Any], Callable[[Sequence[Any]], F]]:
    """Finds the traced values over which a function closes, and how to replace them.

    It searches closures, default values, `functools.partial`, methods and pytrees.

    Args:
      thing: a function, or a pytree of functions.

    Returns:
      The values, and a function from other values to a copy of the thing with these values. If there are no values, it
      returns the thing itself.

    Example:
      >>> def double(alpha):
      ...     values, remade = held(lambda x: alpha * x)
      ...     return remade([2 * v for v in values])(1.0)
      >>> float(jax.jit(double)(3.0))
      6.0
    """
    found: dict[int, tuple[Any, _Hole]] = {}  # the values by id; keeping them keeps the ids unique

    def hole(value: Any) -> _Hole:
        return found.setdefault(id(value), (value, _Hole(len(found))))[1]

    emptied = _rebuilt(thing, jax.core.Tracer, hole, {})  # it does not keep the values: they end with the trace
    if not found:
        return [], lambda values: thing

    def remade(values: Sequence[Any]) -> F:
        return _rebuilt(emptied, _Hole, lambda hole: values[hole.number], {})

    return [value for value, _ in found.values()], remade


class _Hole:
    """The place of a value that was taken out."""

    def __init__(self, number: int):
        self.number = number


def _rebuilt(thing: Any, kind: type, swap: Callable[[Any], Any], known: dict[int, Any]) -> Any:
    """A copy in which all values of this kind are swapped; the thing itself if there are none."""
    if isinstance(thing, kind):
        return swap(thing)
    if id(thing) in known:
        return known[id(thing)][1]
    known[id(thing)] = thing, thing  # this also keeps it, so that no other object gets its id
    new = thing
    if isinstance(thing, types.FunctionType):
        new = _function(thing, kind, swap, known)
    elif isinstance(thing, types.MethodType):
        owner = _rebuilt(thing.__self__, kind, swap, known)
        new = thing if owner is thing.__self__ else types.MethodType(thing.__func__, owner)
    elif isinstance(thing, functools.partial):
        parts = (thing.func, thing.args, thing.keywords)
        fn, args, keywords = (_rebuilt(part, kind, swap, known) for part in parts)
        if any(a is not b for a, b in zip((fn, args, keywords), parts, strict=True)):
            new = functools.partial(fn, *args, **keywords)
    elif not isinstance(thing, jax.Array):
        leaves, tree = jax.tree.flatten(thing)
        if not jax.tree_util.treedef_is_leaf(tree):
            others = [_rebuilt(leaf, kind, swap, known) for leaf in leaves]
            if any(a is not b for a, b in zip(leaves, others, strict=True)):
                new = jax.tree.unflatten(tree, others)
    known[id(thing)] = thing, new
    return new


def _function(fn: types.FunctionType, kind: type, swap: Callable[[Any], Any], known: dict[int, Any]) -> Any:
    cells = [cell for cell in fn.__closure__ or () if _filled(cell)]
    if not cells and not fn.__defaults__ and not fn.__kwdefaults__:
        return fn
    fresh = {id(cell): types.CellType() for cell in cells}
    closure = tuple(fresh.get(id(cell), cell) for cell in fn.__closure__ or ())
    new = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, None, closure)
    known[id(fn)] = fn, new  # before its closure: it may call itself
    for cell in cells:
        fresh[id(cell)].cell_contents = _rebuilt(cell.cell_contents, kind, swap, known)
    new.__defaults__ = _rebuilt(fn.__defaults__, kind, swap, known)
    new.__kwdefaults__ = _rebuilt(fn.__kwdefaults__, kind, swap, known)
    new.__dict__.update(fn.__dict__)
    same = all(fresh[id(cell)].cell_contents is cell.cell_contents for cell in cells)
    same &= new.__defaults__ is fn.__defaults__ and new.__kwdefaults__ is fn.__kwdefaults__
    return fn if same else new


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # the name has no value yet
        return False
    return True
