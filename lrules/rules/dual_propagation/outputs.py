"""The error at the outputs: which outputs have one, and its exact value for squared errors (Eq. 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from lrules.engine.jaxprs import bind
from lrules.engine.operations import of
from lrules.network import Network
from lrules.rules.dual_propagation.states import Unit
from lrules.typing import Pytree


class Floats:
    """Takes the floating-point leaves out of outputs, and puts cotangents together from such leaves."""

    def __init__(self, outputs: Pytree) -> None:
        leaves, self.tree = jax.tree.flatten(outputs)
        self.real = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves]
        self.others = [
            None if real else np.zeros(jnp.shape(x), jax.dtypes.float0)
            for real, x in zip(self.real, leaves, strict=True)
        ]

    def take(self, error: Pytree) -> list[Any]:
        return [e for e, real in zip(jax.tree.leaves(error), self.real, strict=True) if real]

    def put(self, floats: list[Any], others: Any = None) -> Any:
        """Outputs with these floats, and `others` for the rest (default: the cotangents of integers)."""
        given, others = iter(floats), self.others if others is None else others
        return jax.tree.unflatten(self.tree, [next(given) if r else o for r, o in zip(self.real, others, strict=True)])


def exact_error(unit: Unit, objective: Callable[..., Any], outputs: Pytree) -> Callable[..., Any]:
    """The function from outputs to their error by Eq. 3, for an objective that is a sum of squared errors.

    Args:
      unit: the numbers of the outputs' state.
      objective: from the outputs to the objective.
      outputs: outputs of the same structure and shapes.

    Raises:
      ValueError: the analysis cannot see that the objective is such a sum.
      NotImplementedError: the outputs have symbolic shapes, and the loss transposes them.
    """
    gradient, split = jax.grad(objective, allow_int=True), Floats(outputs)

    def slopes(floats: list[Any], outputs: Pytree) -> list[Any]:
        return split.take(gradient(split.put(floats, jax.tree.leaves(outputs))))

    if not _affine(Network(slopes).graph(split.take(outputs), outputs).outs):
        raise ValueError(
            'output="squared_error" needs a loss that is quadratic in each output by itself, and the analysis cannot '
            'see this: write the loss as a sum of jnp.square(outputs - targets), or give output="refreshed"'
        )

    def error_at(outputs: Pytree) -> Any:
        """-(s+ - s-) / (n beta), where s+ and s- minimise Eq. 3 for the gradient g and the curvature h."""

        def leaf(g: Any, h: jax.Array) -> Any:
            h = h * unit.n * unit.beta
            a, b = unit.alpha, 1 - unit.alpha
            return g * jnp.where(b * h < 1, a / (1 + a * h) + b / (1 - b * h), jnp.nan)

        floats = split.take(outputs)
        found = jax.jvp(lambda floats: slopes(floats, outputs), (floats,), (jax.tree.map(jnp.ones_like, floats),))
        return split.put([leaf(g, h) for g, h in zip(*found, strict=True)])

    return error_at


def _affine(slopes: Any) -> bool:
    """Whether each element of each slope is an affine function of the output at its own place, and of no other."""
    stack: list[tuple[Any, int, tuple[Any, ...]]] = [(value, i, ()) for i, value in enumerate(slopes)]
    seen: set[Any] = set()
    while stack:  # a value, the output whose slope it is, and the views between
        value, i, views = stack.pop()
        if not value.params or (id(value), i, views) in seen:
            continue
        seen.add((id(value), i, views))
        operands, eqn = [v for v in value.operands if v.params], value.producer
        if not operands:
            if value.params != {i} or not _in_place(value, views):
                return False
            continue
        row = of(eqn)
        power = None if row.power is None else row.power(eqn)
        if power == 0:
            continue
        linear = row.curve == "linear" and (row.combines != "product" or len(operands) == 1)
        linear |= power == 1  # so do older versions of JAX differentiate squares
        linear |= row.combines == "quotient" and not value.operands[1].params
        linear |= row.combines == "select" and not value.operands[0].params
        view = row.kind == "view" and operands[0].aval.size == value.aval.size
        if not (linear or view):
            return False
        stack += [(operand, i, (eqn, *views) if view else views) for operand in operands]
    return True


def _in_place(value: Any, views: Any) -> bool:
    """Whether all elements are in the same order after these views.

    Raises:
      NotImplementedError: they transpose a symbolic shape.
    """
    if all(of(eqn).permutation is None for eqn in views):
        return True
    if is_symbolic_dim(value.aval.size):
        raise NotImplementedError(
            f"the loss transposes outputs of the symbolic shape {value.aval.shape}, so the analysis cannot follow each "
            'output: give all axes their sizes, or give output="refreshed"'
        )
    order = np.arange(value.aval.size).reshape(value.aval.shape)
    with jax.ensure_compile_time_eval():
        places = jnp.asarray(order)
        for eqn in views:
            (places,) = bind(eqn, [places])
        return bool((np.asarray(places).ravel() == order.ravel()).all())
