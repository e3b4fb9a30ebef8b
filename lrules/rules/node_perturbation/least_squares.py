"""The feedback weights as the least-squares solution for all batches so far."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lrules.engine.operations import of
from lrules.engine.shardings import whole
from lrules.extend import Plan, at_least_float32, correlate, placed_as, split_as
from lrules.typing import Pytree


def covariance(d: jax.Array) -> Any:
    """sum d d^T over all axes but the last."""
    d = split_as(d).reshape(-1, d.shape[-1]).astype(at_least_float32(d.dtype))
    return correlate(d, d, jnp.zeros((d.shape[1], d.shape[1]), d.dtype))


class Rows:
    """Feedback weights as `[..., size of d, size of the signal that they bring]`, and the recursion for them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.layers: dict[str, Any] = {}
        if plan.direct_feedback:
            return
        for layer in plan.graph.layers:
            if layer.reads is None:
                continue
            dense = layer.row.kind == "product" and layer.row.by_example and len(layer.weight.aval.shape) == 2
            weight = layer.weight
            while weight.producer is not None and of(weight.producer).same_shape:
                (weight,) = weight.operands
            whole = layer.parameters == (layer.name,) and weight.producer is None and not layer.scope
            if not (dense and whole and layer.name not in self.layers and len(layer.reads.readers) == 1):
                raise NotImplementedError(
                    f'solver="rls" cannot serve the layer {layer.name!r}: it serves dense layers whose weight is one '
                    "matrix that the network uses once, and whose hidden signal no other layer reads; give "
                    'solver="sgd", or direct=True'
                )
            self.layers[layer.name] = layer

    def of(self, name: str, b: Any) -> Any:
        b = split_as(b.astype(at_least_float32(b.dtype)))
        if name in self.layers:
            return b.T if self.layers[name].contracted == (0,) else b
        lead = len(self.plan.direct_feedback[name].lengths)
        return b.reshape(*b.shape[: lead + 1], -1)

    def back(self, name: str, rows: jax.Array, like: Any) -> Any:
        if name in self.layers and self.layers[name].contracted == (0,):
            rows = rows.T
        return placed_as(rows.reshape(like.shape).astype(like.dtype), jax.typeof(like))

    def begin(self, drawn: dict[str, jax.Array], ridge: float) -> dict[str, Any]:
        """The state before the first batch."""
        state = {}
        for name, b in drawn.items():
            rows = self.of(name, b)
            state[name] = {"b": b, "s": jnp.zeros_like(rows), "v": ridge * jnp.eye(rows.shape[-2], dtype=rows.dtype)}
        return state

    def step(self, name: str, state: Pytree, gradient: jax.Array, covariance: jax.Array) -> dict[str, Any]:
        """Adds a batch: `gradient` is its sum of d (B^T d - lambda)^T, `covariance` that of d d^T."""
        v = state["v"] + covariance.astype(state["v"].dtype)
        rows = self.of(name, state["b"])
        s = split_as(state["s"]) + jnp.einsum("ij,...jk->...ik", v - state["v"], rows) - self.of(name, gradient)
        width, columns = v.shape[0], jnp.moveaxis(s, -2, 0)
        solved = _solve(v, columns.reshape(width, -1)).reshape(columns.shape)
        s = placed_as(s, jax.typeof(state["s"]))
        return {"b": self.back(name, jnp.moveaxis(solved, 0, -2), state["b"]), "s": s, "v": v}


def layouts(plan: Plan) -> dict[str, Any]:
    """Where the states lie: b and s as the feedback weights, which s has as rows; v whole."""
    found, layers = {}, Rows(plan).layers
    for name, lies in plan.layouts.items():
        rows = lies.reversed if name in layers and layers[name].contracted == (0,) else lies
        lead = 0 if name in layers else len(plan.direct_feedback[name].lengths)
        if len(rows.sources) != lead + 2:  # the axes of the hidden signal are merged
            rows = whole(lies.home, lead + 2)
        found[name] = {"b": lies, "s": rows, "v": whole(lies.home, 2)}
    return found


def _solve(v: jax.Array, s: Any) -> Any:
    """V^-1 S for a positive definite V, by elimination, which then works without pivots.

    `jnp.linalg.solve` calls LAPACK, which stops for seconds in jitted training loops on CPUs with few cores.
    """
    width = v.shape[0]

    def eliminate(i: int, rows: jax.Array) -> jax.Array:
        pivot = rows[i] / rows[i, i]
        return (rows - jnp.outer(rows[:, i], pivot)).at[i].set(pivot)

    return jax.lax.fori_loop(0, width, eliminate, jnp.concatenate([v, s], axis=1))[:, width:]
