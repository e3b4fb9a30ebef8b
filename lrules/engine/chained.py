"""The backward pass of a direct rule from the top down: each signal is made when the gradients above it are formed.

All signals could be made at once, as they wait only for the output error. XLA's scheduler for CPUs does that, and then
all of them are in memory together. Here each signal waits for the gradients of the layers above it, so that they, and
the hidden signals that they were made from, are free again before the next signal is made.

For the weight gradient of a convolution XLA for CPUs copies its input into another layout. The copy waits for nothing,
so XLA makes it in the forward pass, and then it lies in memory beside the input. Here these inputs wait for their
signals, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lrules.engine.jaxprs import bind, is_literal, open_jaxpr
from lrules.engine.operations import of
from lrules.engine.reshapes import moved
from lrules.typing import Pytree


def wanted(errors: Pytree, signals: Mapping[str, Any]) -> bool:
    """Whether signals should wait for the gradients above them.

    They do on one CPU: on a GPU it was not measured, and several devices would have to communicate. And only if they
    are larger than the error, of which another copy may be made.
    """
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (errors, dict(signals))]
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(e).sharding.mesh for e in jax.tree.leaves(errors))]
    return alone() and len(signals) > 1 and sizes[0] < sizes[1] and all(mesh.empty for mesh in meshes)


def alone() -> bool:
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def after(e: jax.Array, formed: Sequence[jax.Array], shared: int = 0) -> jax.Array:
    """The same error, with some shared axes in front, which is there only when these arrays are.

    `jax.lax.optimization_barrier` does not serve: XLA removes it on CPUs before it decides the order.
    """
    never = [jnp.real(x.ravel()[0]) < -jnp.inf for x in formed if x.size and jnp.issubdtype(x.dtype, jnp.inexact)]
    if not never:
        return e
    e = moved(e, range(shared), range(1, shared + 1))  # as in the network, so that XLA need not copy it
    e = _unless(functools.reduce(jnp.logical_or, never), e)
    return moved(e, range(1, shared + 1), range(shared))


@jax.custom_jvp
def _unless(never: jax.Array, e: jax.Array) -> jax.Array:
    return _selected(never, e)


_unless.defjvp(lambda primals, tangents: (_unless(*primals), tangents[1]))  # `custom_vmap` has no reverse mode


@jax.custom_batching.custom_vmap
def _selected(never: jax.Array, e: jax.Array) -> jax.Array:
    return jnp.where(never, jnp.zeros((), e.dtype), e)  # e, which XLA cannot know


@_selected.def_vmap
def _(size: int, batched: Sequence[bool], never: jax.Array, e: jax.Array) -> tuple[Any, bool]:
    """Under `vmap` e waits for all: what is the same for all (the inputs, if seeds differ) is not copied for each."""
    return _selected(never.any(0) if batched[0] else never, e), batched[1]


def pulled(
    pull: Callable[[Any], Pytree],
    errors: Pytree,
    signals: Mapping[str, Any],
    make: Callable[[str, Sequence[jax.Array]], jax.Array],
) -> Pytree:
    """The result of `pull((errors, signals))`, where each signal is made just before it is needed.

    Args:
      pull: the function that `jax.vjp` returned.
      errors: the cotangents of the outputs.
      signals: the shape and dtype of each signal, by name.
      make: `(name, formed) -> signal`, where `formed` are the results that were formed since it was called before.
    """
    closed, shapes = jax.make_jaxpr(pull, return_shape=True)((errors, dict(signals)))
    jaxpr, consts = open_jaxpr(closed)
    given = jax.tree.leaves(errors)
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars[: len(given)]], [*consts, *given], strict=True))
    names = dict(zip(jaxpr.invars[len(given) :], sorted(signals), strict=True))
    results = {v for v in jaxpr.outvars if not is_literal(v)}
    shapes_of_signals = {signal.shape for signal in signals.values()}
    hidden = {v for v in jaxpr.constvars if v.aval.shape in shapes_of_signals}
    formed: list[Any] = []
    latest: list[Any] = []

    def read(atom: Any) -> Any:
        if is_literal(atom):
            return atom.val
        if atom not in env:
            env[atom] = make(names[atom], formed)
            latest[:] = [env[atom]]
            formed.clear()
        return env[atom]

    def waiting(atom: Any) -> Any:
        value = read(atom)
        return after(value, latest) if not is_literal(atom) and atom in hidden else value

    for eqn in _by_signal(jaxpr.eqns, names):
        arguments = [read(v) for v in eqn.invars]  # all of them first, because one of them may be the signal
        if of(eqn).window(eqn, 1):  # a convolution
            arguments = [waiting(v) for v in eqn.invars]
        made = bind(eqn, arguments)
        env.update(zip(eqn.outvars, made, strict=True))
        formed += [x for v, x in zip(eqn.outvars, made, strict=True) if v in results]
    return jax.tree.unflatten(jax.tree.structure(shapes), [read(v) for v in jaxpr.outvars])


def _by_signal(eqns: Sequence[Any], names: Mapping[Any, str]) -> list[Any]:
    """The equations in the order of the signals that they wait for: what can be done before the next signal is done."""
    level: dict[Any, int] = {}
    count = 0
    for eqn in eqns:
        for v in eqn.invars:
            if not is_literal(v) and v in names and v not in level:
                level[v] = count = count + 1
        here = max((level.get(v, 0) for v in eqn.invars if not is_literal(v)), default=0)
        level |= dict.fromkeys(eqn.outvars, here)
    return sorted(eqns, key=lambda eqn: level[eqn.outvars[0]] if eqn.outvars else 0)
