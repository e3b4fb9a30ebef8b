"""Pieces of programs that occur many times are traced once: the equations between two layers, the transposes of layers.

JAX traces, linearises and transposes what stands in `jax.jit(..., inline=True)` once for each kind of arguments, and
puts it in place wherever it is called, so that nothing of it is seen in the program. All layers of one shape then cost
what one of them does.
"""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from lrules.engine.jaxprs import JITS, Atom, Equation, bind, call_body, is_literal
from lrules.engine.operations import of

MOST = 4096


class Pieces:
    """Functions by what they compute; those used last are kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[Hashable, Callable[..., Any]] = collections.OrderedDict()

    def shared(self, key: Hashable, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """The function that `make` returned first for this key: all of them compute the same, and hold no tracers."""
        with self._lock:
            known = self._kept.pop(key, None) or jax.jit(make(), inline=True)
            self._kept[key] = known
            if len(self._kept) > MOST:
                self._kept.popitem(last=False)
            return known


EVERYWHERE = Pieces()  # pieces without functions or arrays of the user


def equation_key(eqn: Equation) -> Hashable | None:
    """A key for what an equation computes; None if this is not known, or if it has effects."""
    if eqn.effects:
        return None
    params: tuple[Any, ...] = tuple(eqn.params.items())
    if any(map(_is_program, eqn.params.values())):
        if eqn.primitive is _relu().primitive and _source(eqn) and _source(eqn) == _source(_relu()):
            params = ("relu",)
        elif of(eqn).name not in JITS:  # JAX keeps the programs of jits: equal ones are the same object
            return None
    key = (eqn.primitive, params, eqn.ctx, tuple(v.aval for v in eqn.invars))
    try:
        hash(key)
    except TypeError:  # parameters of a primitive that JAX does not know, such as arrays
        return None
    return key


def _is_program(param: Any) -> bool:
    if isinstance(param, tuple):
        return any(map(_is_program, param))
    return hasattr(param, "eqns") or hasattr(param, "jaxpr") or (callable(param) and not isinstance(param, type))


def _source(eqn: Equation) -> Any:
    """The place of a call's function in the source; None if it is not known."""
    return getattr(getattr(call_body(eqn), "debug_info", None), "func_src_info", None)


@functools.cache
def _relu() -> Equation:
    (eqn,) = jax.make_jaxpr(jax.nn.relu)(np.float32(0)).eqns
    return eqn


def _literal_key(atom: Atom) -> Hashable:
    return atom.aval, np.asarray(atom.val).tobytes()


class Together:
    """Equations that run as one piece.

    Attributes:
      given: the variables that they read and do not compute themselves.
      wanted: the variables that are asked for.
      key: a key for what they compute.
      programs: whether they hold programs, such as a jitted function of the user.
    """

    def __init__(self, eqns: Sequence[Equation], keys: Sequence[Hashable], wanted: Sequence[Atom]) -> None:
        self.eqns, self.wanted = eqns, wanted
        self.programs = any(of(eqn).kind == "call" for eqn in eqns)
        numbers: dict[Any, int] = {}
        self.given: list[Any] = []
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
                        self.given.append(v)
                reads.append(numbers[v])
            for v in eqn.outvars:
                numbers[v] = len(numbers)
            steps.append((key, tuple(reads)))
        self.key = (tuple(steps), tuple(numbers[v] for v in self.given), tuple(numbers[v] for v in wanted))

    def __call__(self, *values: Any) -> list[Any]:
        env = dict(zip(self.given, values, strict=True))
        for eqn in self.eqns:
            outs = bind(eqn, [v.val if is_literal(v) else env[v] for v in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [env[v] for v in self.wanted]
