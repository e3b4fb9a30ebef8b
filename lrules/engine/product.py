"""The multiplication of a layer, as rules get it: `y = op(w, x)`, and its transposes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from lrules.engine.jaxprs import Equation, bind
from lrules.engine.shared import EVERYWHERE, equation_key
from lrules.typing import Pytree


class Product:
    """The multiplication of a weight `w` and the input `x` of a layer: an array, or a tuple of the other operands.

    y = op(w, x)

    `jax.vjp(op, w, x)[1](d)` gives the gradients of both. Each of the two methods gives one of them, and is traced once
    for all layers of the same shape.

    Args:
      eqn: the equation of the layer.
      position: the operand of the equation that is the weight.
      single: whether x is one array.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> (layer,) = lrules.Network(lambda w, x: x @ w).graph(jnp.ones((3, 2)), jnp.ones((5, 3))).layers
      >>> op = lrules.extend.Product(layer.eqn, layer.position, single=True)
      >>> op.weight_gradient(jnp.ones((3, 2)), jnp.ones((5, 3)), jnp.ones((5, 2))).shape
      (3, 2)
    """

    def __init__(self, eqn: Equation, position: int, single: bool) -> None:
        self.eqn, self.position, self.single = eqn, position, single

    def __call__(self, w: jax.Array, x: Pytree) -> Any:
        if w is None:
            raise TypeError("op: the weight is None: a rule without init= has no feedback weights b, so give it")
        others = [x] if self.single else list(x)
        return bind(self.eqn, [*others[: self.position], w, *others[self.position :]])[0]

    def weight_gradient(self, w: jax.Array, x: Pytree, d: jax.Array) -> jax.Array:
        """The gradient of the weight: the error `d` times the input of the layer."""

        def pull(w: jax.Array, x: Pytree, d: jax.Array) -> jax.Array:
            (dw,) = jax.vjp(lambda w: self(w, x), w)[1](d)
            return dw

        return self._shared("weight", pull)(w, x, d)

    def passed_down(self, w: jax.Array, x: Pytree, d: jax.Array) -> Pytree:
        """The error that goes down from `d` through the weight, with the structure of `x`."""
        leaves, tree = jax.tree.flatten(x)
        floating = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        found: list[Any] = [None if i in floating else _no_error(leaf) for i, leaf in enumerate(leaves)]

        def pull(w: jax.Array, leaves: Sequence[Any], d: jax.Array) -> Any:
            def run(given: Sequence[Any]) -> Any:
                own = dict(zip(floating, given, strict=True))
                return self(w, jax.tree.unflatten(tree, [own.get(i, leaf) for i, leaf in enumerate(leaves)]))

            return jax.vjp(run, [leaves[i] for i in floating])[1](d)[0]

        if floating:
            for i, leaf in zip(floating, self._shared("passed down", pull)(w, leaves, d), strict=True):
                found[i] = leaf
        return jax.tree.unflatten(tree, found)

    def _shared(self, what: str, pull: Callable[..., Any]) -> Callable[..., Any]:
        key = equation_key(self.eqn)
        return pull if key is None else EVERYWHERE.shared((what, key, self.position, self.single), lambda: pull)


def _no_error(leaf: jax.Array) -> Any:
    """The cotangent of integers, as JAX writes it. A symbolic shape cannot be that of a NumPy array."""
    return np.zeros(() if any(map(is_symbolic_dim, leaf.shape)) else leaf.shape, jax.dtypes.float0)
