"""Carries the state that a rule's functions return out of the backward pass.

A backward pass returns cotangents. So a state goes in as an argument, and the new state comes out as its cotangent.
Cotangents are floats: integers, booleans and keys travel as parts of 16 bits, which float32 holds exactly. A zero goes
with each state, and its cotangent is one if the function ran. If it did not run, in a branch that was not taken or
because no error arrives, the old state stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lrules.engine.jaxprs import as_varying, varying_axes
from lrules.typing import Pytree


def begin(
    make: Callable[..., Pytree], asks: frozenset[str], like: Any, name: str, key: jax.Array, lengths: tuple[int, ...]
) -> Pytree:
    """The first state: the result of `make`, separately for each iteration of the loops around it.

    Args:
      make: `(like) -> pytree`; it gets `key` and `name` if it asks for them.
      asks: the arguments that it asks for.
      like: a layer, or the shape of a hidden signal.
      name: the name of the layer or hidden signal.
      key: a key for it.
      lengths: the lengths of the loops around it.
    """

    def one(key: jax.Array) -> Pytree:
        given = {"key": key, "name": name}
        return jax.tree.map(jnp.asarray, make(like, **{what: given[what] for what in asks}))

    if not lengths:
        return one(key)
    states = jax.vmap(one, axis_size=math.prod(lengths))(jax.random.split(key, math.prod(lengths)))
    return jax.tree.map(lambda s: s.reshape(*lengths, *s.shape[1:]), states)


def encoded(state: Pytree) -> tuple[Pytree, Callable[[Pytree], Pytree]]:
    """A state as floats, and the function from such floats back to a state."""
    leaves, tree = jax.tree.flatten(state)
    leaves = [jnp.asarray(leaf) if not hasattr(leaf, "dtype") else leaf for leaf in leaves]
    parts = [_floats(leaf) for leaf in leaves]
    decode = [back for _, back in parts]

    def decoded(floats: Pytree) -> Pytree:
        given = tree.flatten_up_to(floats)
        return jax.tree.unflatten(tree, [back(x) for back, x in zip(decode, given, strict=True)])

    return jax.tree.unflatten(tree, [x for x, _ in parts]), decoded


def _floats(leaf: Any) -> tuple[Any, Callable[[Any], Any]]:
    dtype = leaf.dtype
    if jnp.issubdtype(dtype, jnp.inexact):
        return leaf, lambda x: x
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        kind = jax.random.key_impl(leaf)
        data, back = _floats(jax.random.key_data(leaf))
        return data, lambda x: jax.random.wrap_key_data(back(x), impl=kind)
    if dtype == jnp.bool_ or jnp.iinfo(dtype).bits <= 16:
        return leaf.astype(jnp.float32), lambda x: x.astype(dtype)
    halves = jax.lax.bitcast_convert_type(leaf, jnp.uint16)
    return halves.astype(jnp.float32), lambda x: jax.lax.bitcast_convert_type(x.astype(jnp.uint16), dtype)


def require_same(new: Pytree, old: Pytree, what: str) -> Pytree:
    """The new state, checked against the structure, shapes and dtypes of the old state.

    Raises:
      TypeError, ValueError: it differs; the message begins with `what`.
    """
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise TypeError(
            f"{what} returned a state of the structure {jax.tree.structure(new)}, and got one of the structure "
            f"{jax.tree.structure(old)}: return the state with new values"
        )
    new = jax.tree.map(lambda n, o: n if hasattr(n, "dtype") else jnp.asarray(n, o.dtype), new, old)
    for n, o in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        if apart := sorted(varying_axes(jax.typeof(n)) - varying_axes(jax.typeof(o))):
            raise ValueError(
                f"{what} returned a state that differs between the devices along {apart[0]!r}, and got one that they "
                f"share: make it the same on all, as jax.lax.pmean(state, {apart[0]!r}) does"
            )
        if n.shape != o.shape or n.dtype != o.dtype:
            raise ValueError(
                f"{what} returned a state of shape {n.shape} and dtype {n.dtype}, and got one of shape {o.shape} and "
                f"dtype {o.dtype}: keep both"
            )
    return jax.tree.map(lambda n, o: as_varying(n, varying_axes(jax.typeof(o))), new, old)
