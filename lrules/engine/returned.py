"""Checks the results of a rule's functions: one sentence says where the fault is, and what it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lrules.engine.carried import require_same
from lrules.engine.records import Layer
from lrules.engine.weights import DirectFeedback


def called(
    learned: bool,
    fn: Callable[..., Any],
    op: Callable[..., Any],
    w: jax.Array,
    b: Any,
    x: Any,
    d: jax.Array,
    layer: Layer,
    named: Mapping[str, Any] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Calls `backward` and checks its result: `(dw, dx, db, new state)`, as custom_vjp takes them."""
    named = named or {}
    made = fn(op, w, b, x, d, layer, **named)
    at, count = f"at the layer {layer.name!r}", 4 if "state" in named else 3
    if not (isinstance(made, tuple | list) and len(made) == count):
        wanted = "(dw, dx, db, state), as it asks for state" if count == 4 else "(dw, dx, db)"
        raise TypeError(f"backward returned {what(made)} {at}: return {wanted}; db is None for fixed feedback")
    dw, dx, db, state = (*made, None)[:4]
    dw = _like(dw, w, "dw", "the weight w", at)
    if learned and db is None:
        raise ValueError(f"backward returned None for db {at}, and the rule has learned=True: return its gradient")
    if not learned and db is not None:
        raise ValueError(
            f"backward returned a db {at}, and the rule's feedback is fixed: give learned=True, or return None for db"
        )
    db = _like(db, b, "db", "the feedback weight b", at)
    if dx is not None:
        leaves, tree = jax.tree.flatten(x)
        given, other = jax.tree.flatten(dx, is_leaf=lambda leaf: leaf is None)
        if other != tree:
            raise TypeError(f"backward returned a dx of the structure {other} {at}, and x has {tree}: return that of x")
        pairs = zip(given, leaves, strict=True)
        real = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
        dx = jax.tree.unflatten(
            tree, [_like(g, leaf, "dx", "x", at) if r else None for (g, leaf), r in zip(pairs, real, strict=True)]
        )
    if "state" in named:
        state = require_same(state, named["state"], f"backward, {at},")
    return dw, dx, db, state


def _like(grad: Any, of: Any, name: str, whose: str, at: str) -> Any:
    """A gradient, checked against the shape and dtype of its value; None for no gradient."""
    if grad is None:
        return None
    if not hasattr(grad, "dtype"):
        raise TypeError(f"backward returned {what(grad)} for {name} {at}: return an array of the shape of {whose}")
    if grad.shape != of.shape or grad.dtype != of.dtype:
        raise ValueError(
            f"backward returned a {name} of shape {grad.shape} and dtype {grad.dtype} {at}, and {whose} has shape "
            f"{of.shape} and dtype {of.dtype}: return the same shape and dtype"
        )
    return grad


def arriving(landing: DirectFeedback, signal: Any, e: jax.Array) -> jax.Array:
    """The error that a direct rule brings to a hidden signal, checked."""
    name, wanted = landing.hidden.name, (e.shape[0], *landing.signal_shape)
    if not hasattr(signal, "dtype"):
        raise TypeError(
            f"signal returned {what(signal)} at the hidden signal {name!r}: return an array of shape {wanted}, the "
            "batch and the hidden signal; lrules.direct(None) brings no error to any hidden signal"
        )
    if signal.shape != wanted:
        raise ValueError(
            f"signal returned an array of shape {signal.shape} at the hidden signal {name!r}: return one of shape "
            f"{wanted}, the batch and the hidden signal"
        )
    return signal


def learned_by(landing: DirectFeedback, db: Any, b: Any) -> jax.Array:
    """The gradient of a direct feedback weight, checked."""
    if not hasattr(db, "dtype") or db.shape != b.shape:
        got = f"an array of shape {db.shape}" if hasattr(db, "dtype") else what(db)
        raise (ValueError if hasattr(db, "dtype") else TypeError)(
            f"learn returned {got} for the feedback weight of {landing.hidden.name!r}: return its gradient, of shape "
            f"{b.shape}"
        )
    return db.astype(b.dtype)


def what(made: Any) -> str:
    """A short name of what a function returned."""
    if made is None:
        return "None"
    if isinstance(made, Sequence):
        return f"{len(made)} thing{'s' if len(made) != 1 else ''}"
    return f"one {type(made).__name__}" if not hasattr(made, "shape") else "one array"
