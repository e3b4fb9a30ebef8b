"""Random directions: they are made of keys alone, so their numbers can be drawn again and need not be stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lrules.engine.handlers import name_number
from lrules.engine.jaxprs import primitives, varying_axes
from lrules.extend import Graph, at_least_float32, placed_as
from lrules.typing import Pytree


@dataclasses.dataclass(frozen=True, eq=False)
class Directions:
    """How many directions there are, and where their numbers come from.

    Attributes:
      count: the number of directions.
      noise: `(key, shape, dtype)` -> numbers with mean 0 and variance 1.
    """

    count: int
    noise: Callable[..., Any]

    def keys(self, key: jax.Array) -> jax.Array:
        """A key for each direction."""
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(self.count))

    def each(self, fn: Callable[..., Any], keys: jax.Array, out_axes: tuple[int | None, ...]) -> Any:
        """What a function of a key gives for each direction, side by side; it has several results.

        Args:
          fn: the function.
          keys: the keys.
          out_axes: 0 for results that get an axis for the directions, in front; None for those that are all the same.
        """
        if self.count > 1:
            return jax.vmap(fn, out_axes=out_axes)(keys)
        pairs = zip(fn(keys[0]), out_axes, strict=True)
        return tuple(x if axis is None else jax.tree.map(lambda leaf: leaf[None], x) for x, axis in pairs)

    def of(self, key: jax.Array, like: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """A direction in the space of several arrays, by name."""
        return {name: self.one(key, name, x) for name, x in like.items()}

    def one(self, key: jax.Array, name: str, like: jax.Array) -> jax.Array:
        """The part of a direction that has this name."""
        return self.draw(jax.random.fold_in(key, name_number(name)), like)

    def draw(self, key: jax.Array, like: jax.Array) -> jax.Array:
        """Numbers in the place of an array; a complex number has two."""
        shape, dtype = like.shape, like.dtype
        if jnp.issubdtype(dtype, jnp.complexfloating):
            parts = [self._drawn(k, shape, jnp.finfo(dtype).dtype) for k in jax.random.split(key)]
            return placed_as(jax.lax.complex(*parts), jax.typeof(like))
        return placed_as(self._drawn(key, shape, dtype), jax.typeof(like))

    def _drawn(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        drawn = self.noise(key, shape, dtype)
        if jnp.shape(drawn) != shape:
            raise ValueError(
                f"forward_gradient: noise(key, shape, dtype) must return the shape {shape}, got {jnp.shape(drawn)}: "
                "draw one number for each element"
            )
        return jnp.asarray(drawn).astype(dtype)


def scaled(v: jax.Array, rate: jax.Array, like: jax.Array) -> jax.Array:
    """The estimate of a gradient: a direction times the derivative along it.

    Where devices have different derivatives and share the array, it is their sum, as for a gradient.
    """
    wide = at_least_float32(v.dtype)
    g = (jnp.conj(v).astype(wide) * rate.astype(wide)).astype(like.dtype)
    axes = tuple(sorted(varying_axes(jax.typeof(g)) - varying_axes(jax.typeof(like))))
    return jax.lax.psum(g, axes) if axes else g


def paired(cotangent: jax.Array, tangent: jax.Array) -> jax.Array:
    """The products of a cotangent and a tangent, number by number, in at least float32."""
    wide = at_least_float32(tangent.dtype)
    return jnp.real(cotangent.astype(wide) * tangent.astype(wide))


def forward_mode(graph: Graph, fn: Callable[..., Any], at: Pytree, along: Pytree) -> tuple[Any, Any]:
    """`(rates, more)` of a function `at -> (values, more)`: the derivatives of the values along a direction.

    The function runs the network of the graph, or a part of it.
    """

    def run(at: Pytree, along: Pytree) -> tuple[Any, Any]:
        _, rates, more = jax.jvp(fn, (at,), (along,), has_aux=True)
        return rates, more

    inside = graph.once("primitives", lambda: primitives(graph.block.jaxpr))
    # Under jit, JAX itself refuses a function with jax.custom_vjp only when it compiles the step.
    if any(name.startswith("custom_vjp_call") for name in inside):
        if "custom_lin" in primitives(jax.make_jaxpr(run)(at, along)):
            raise NotImplementedError(
                "the network has a function with jax.custom_vjp, which has no forward mode, and "
                'forward_gradient(method="jvp") needs it: give method="central" and std=, or write the function with '
                "jax.custom_jvp"
            )
    return run(at, along)


def widened(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss in at least float32, because differences of losses are small."""

    def wide(outputs: Pytree, targets: Pytree) -> jax.Array:
        losses = jnp.asarray(loss(outputs, targets))
        return losses.astype(at_least_float32(losses.dtype))

    return wide
