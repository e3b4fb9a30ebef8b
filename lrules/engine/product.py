"""The multiplication of a layer, as rules get it: `y = op(w, x)`, and its transposes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from lrules.engine.dtypes import at_least_float32, feedback_dtype
from lrules.engine.jaxprs import Equation, bind
from lrules.engine.operations import of
from lrules.engine.shared import EVERYWHERE, equation_key
from lrules.typing import Pytree


class Product:
    """The multiplication of a weight `w` and the input `x` of a layer: an array, or a tuple of the other operands.

    y = op(w, x)

    `jax.vjp(op, w, x)[1](d)` gives the gradients of both. `weight_gradient` and `passed_down` give one of them, and are
    traced once for all layers of the same shape.

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

    def terms(self, w: jax.Array, x: Pytree) -> Any:
        """For each weight, in how many terms of the output sums it is: a number, or an array to divide `w` by.

        In a dense layer this is the number of rows of `x`. A convolution has fewer terms at a border with padding. The
        numbers have at least float32: a convolution in float16 easily has more terms than the largest float16.
        """
        row, out, dtype = of(self.eqn), self.eqn.outvars[0].aval, at_least_float32(feedback_dtype(w.dtype))
        if row.window(self.eqn, self.position):
            if not any(map(is_symbolic_dim, out.shape)):
                return jnp.asarray(_window_terms(self.eqn, out.shape), dtype)
        elif row.either:
            contracted = row.contracted(self.eqn, self.position)
            free = math.prod(n for i, n in enumerate(w.shape) if i not in contracted)
            return jnp.asarray(_at_least_one(math.prod(out.shape) // _at_least_one(free)), dtype)
        ones = [jnp.ones_like(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf for leaf in jax.tree.leaves(x)]
        x = jax.tree.unflatten(jax.tree.structure(x), ones)
        one = 1.0 if dtype == w.dtype else 2.0**-8  # a sum that does not overflow
        count = self.weight_gradient(w, x, jnp.full_like(self(w, x), one)).astype(dtype) / one
        return jnp.where(count == 0, jnp.ones_like(count), count)  # no term, and so no gradient to divide

    def _shared(self, what: str, pull: Callable[..., Any]) -> Callable[..., Any]:
        key = equation_key(self.eqn)
        return pull if key is None else EVERYWHERE.shared((what, key, self.position, self.single), lambda: pull)


def _at_least_one(n: Any) -> Any:
    """Without a term there is no gradient to divide; a symbolic number is never zero."""
    return n if is_symbolic_dim(n) else max(n, 1)


def _window_terms(eqn: Equation, out: Sequence[int]) -> np.ndarray:
    """For each place in the window of a convolution, the number of products there, in the shape of the kernel."""
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    data, kernel = (v.aval.shape for v in eqn.invars)
    count = np.full([1] * len(kernel), out[numbers.out_spec[0]], float)
    for d, axis in enumerate(numbers.rhs_spec[2:]):
        dilated = (data[numbers.lhs_spec[2 + d]] - 1) * params["lhs_dilation"][d] + 1
        starts = np.arange(out[numbers.out_spec[2 + d]]) * params["window_strides"][d] - params["padding"][d][0]
        place = starts + np.arange(kernel[axis])[:, None] * params["rhs_dilation"][d]
        inside = (place >= 0) & (place < dilated) & (place % params["lhs_dilation"][d] == 0)
        count = count * inside.sum(1).reshape([-1 if i == axis else 1 for i in range(len(kernel))])
    return np.maximum(count, 1)  # a place that meets padding alone has no gradient to divide


def _no_error(leaf: jax.Array) -> Any:
    """The cotangent of integers, as JAX writes it. A symbolic shape cannot be that of a NumPy array."""
    return np.zeros(() if any(map(is_symbolic_dim, leaf.shape)) else leaf.shape, jax.dtypes.float0)
