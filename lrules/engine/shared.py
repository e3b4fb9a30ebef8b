"""Pieces of programs that occur many times, traced once: the equations between two layers, a layer's transposes.

JAX traces, linearises and transposes what stands in `jax.jit(..., inline=True)` once for each kind of arguments, and
puts it in place wherever it is called, so that nothing of it is seen in the program. All layers of one shape then cost
what one of them does.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from lrules.engine.jaxprs import Atom, Equation, bind, is_literal

MOST = 4096

_pieces: collections.OrderedDict[Hashable, Callable[..., Any]] = collections.OrderedDict()
_lock = threading.Lock()


def shared(key: Hashable, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, or the function that was first given under this key; the latest used are kept."""
    with _lock:
        known = _pieces.pop(key, None) or jax.jit(fn, inline=True)
        _pieces[key] = known
        if len(_pieces) > MOST:
            _pieces.popitem(last=False)
        return known


def equation_key(eqn: Equation) -> Hashable | None:
    """What an equation computes; None if it holds other programs or functions, or does more than compute."""
    if eqn.effects or any(map(_is_program, eqn.params.values())):
        return None
    return (eqn.primitive, tuple(eqn.params.items()), eqn.ctx, tuple(v.aval for v in eqn.invars))


def _is_program(param: Any) -> bool:
    if isinstance(param, tuple):
        return any(map(_is_program, param))
    return hasattr(param, "eqns") or hasattr(param, "jaxpr") or (callable(param) and not isinstance(param, type))


def _literal_key(atom: Atom) -> Hashable:
    return atom.aval, np.asarray(atom.val).tobytes()


def run_together(
    eqns: Sequence[Equation], keys: Sequence[Hashable], read: Callable[[Atom], Any], wanted: Sequence[Atom]
) -> list[Any]:
    """Evaluates equations, one piece of program; gives the values of the wanted variables."""
    numbers: dict[Any, int] = {}
    given: list[Any] = []
    steps: list[Hashable] = []
    made = {v for eqn in eqns for v in eqn.outvars}
    for eqn, key in zip(eqns, keys, strict=True):
        reads: list[Hashable] = []
        for v in eqn.invars:
            if is_literal(v):
                reads.append(_literal_key(v))
                continue
            if v not in numbers:
                numbers[v] = len(numbers)
                if v not in made:
                    given.append(v)
            reads.append(numbers[v])
        for v in eqn.outvars:
            numbers[v] = len(numbers)
        steps.append((key, tuple(reads)))

    def run(*values: Any) -> list[Any]:
        local = dict(zip(given, values, strict=True))
        for eqn in eqns:
            outs = bind(eqn, [v.val if is_literal(v) else local[v] for v in eqn.invars])
            local.update(zip(eqn.outvars, outs, strict=True))
        return [local[v] for v in wanted]

    key = (tuple(steps), tuple(numbers[v] for v in given), tuple(numbers[v] for v in wanted))
    return shared(key, run)(*map(read, given))
