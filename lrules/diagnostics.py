"""How close a rule's update is to another: angles, signs, norms, and the alignment of feedback with forward weights.

All functions are pure and may be called inside a jitted step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lrules.network import parameter_name
from lrules.rule import Feedback, at_least_float32

Pytree = Any


class Agreement(NamedTuple):
    """How an update compares with a reference.

    Attributes:
      angle: between them, in degrees; 90 where either is zero.
      sign_agreement: the fraction of entries, among those where the reference is not zero, whose signs agree.
      norm_ratio: the norm of the update over that of the reference.
      relative_error: the norm of their difference over that of the reference.
    """

    angle: jax.Array
    sign_agreement: jax.Array
    norm_ratio: jax.Array
    relative_error: jax.Array


def compare(update: jax.Array, reference: jax.Array) -> Agreement:
    """Compares two arrays of one shape.

    angle = arccos(<u, r> / (||u|| ||r||))

    Args:
      update, reference: arrays of one shape.

    Returns:
      An `Agreement` of scalars.

    Raises:
      ValueError: the shapes differ.
    """
    if jnp.shape(update) != jnp.shape(reference):
        raise ValueError(f"arrays of shapes {jnp.shape(update)} and {jnp.shape(reference)} cannot be compared")
    wide = at_least_float32(update.dtype)
    u, r = (jnp.asarray(x).astype(wide).ravel() for x in (update, reference))
    largest_u, largest_r = jnp.max(jnp.abs(u), initial=0), jnp.max(jnp.abs(r), initial=0)
    scale_u, scale_r = jnp.where(largest_u > 0, largest_u, 1), jnp.where(largest_r > 0, largest_r, 1)
    u_hat, r_hat = u / scale_u, r / scale_r
    norm_u, norm_r = jnp.linalg.norm(u_hat), jnp.linalg.norm(r_hat)
    both = (norm_u > 0) & (norm_r > 0)
    u_hat = u_hat / jnp.where(norm_u > 0, norm_u, 1)
    r_hat = r_hat / jnp.where(norm_r > 0, norm_r, 1)
    # Exact for small angles too, where the arccosine of a rounded cosine is not.
    halves = jnp.linalg.norm(u_hat - r_hat), jnp.linalg.norm(u_hat + r_hat)
    angle = jnp.where(both, 2 * jnp.rad2deg(jnp.arctan2(*halves)), 90.0)
    counted = r != 0
    agree = jnp.sum((jnp.sign(u) == jnp.sign(r)) & counted) / jnp.maximum(jnp.sum(counted), 1)
    ratio = jnp.where(norm_r > 0, norm_u * scale_u / (jnp.where(norm_r > 0, norm_r, 1) * scale_r), jnp.inf)
    ratio = jnp.where((norm_u == 0) & (norm_r == 0), jnp.ones_like(ratio), ratio)
    error = jnp.where(norm_r > 0, jnp.linalg.norm(ratio * u_hat - r_hat), jnp.where(norm_u > 0, jnp.inf, 0.0))
    return Agreement(angle, agree.astype(wide), ratio, error.astype(wide))


def agreement(update: Pytree, reference: Pytree) -> dict[str, Agreement]:
    """Compares two gradients parameter by parameter.

    Args:
      update, reference: of the structure of the parameters; for example a rule's `grads.params` and `jax.grad`'s.

    Returns:
      An `Agreement` per parameter, by name.

    Raises:
      ValueError: the structures or shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(agreement({"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([1.0, 1.0])})["w"].angle), 3)
      45.0
    """
    if not jax.tree.structure(update) == jax.tree.structure(reference):
        raise ValueError("the update and the reference differ in structure: compare gradients of the same parameters")
    leaves = jax.tree_util.tree_leaves_with_path(update)
    return {
        parameter_name(path): compare(u, r) for (path, u), r in zip(leaves, jax.tree.leaves(reference), strict=True)
    }


def total_angle(update: Pytree, reference: Pytree) -> jax.Array:
    """The angle in degrees between two gradients, all parameters together.

    Args:
      update, reference: of one structure.

    Returns:
      A scalar.
    """
    flat = [
        jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(t)]) for t in (update, reference)
    ]
    return compare(*flat).angle


def weight_alignment(feedback: Feedback, params: Pytree) -> dict[str, Agreement]:
    """Compares feedback weights with the forward weights that they stand in for.

    Sequential feedback is compared with the parameter of its name. Direct feedback `[outputs, hidden]` is compared with
    the transpose of the weight `[hidden, outputs]` of its name, where that weight leads to the outputs; other direct
    feedback stands in for no single weight and is left out.

    Args:
      feedback: as from `rule.init`.
      params: the parameters.

    Returns:
      An `Agreement` per feedback weight, by name.
    """
    by_name = {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    state = feedback.state if isinstance(feedback.state, dict) else {}
    solved = {name: s["b"] for name, s in state.items() if isinstance(s, dict) and "b" in s}  # by least squares
    found = {}
    for name, b in {**feedback.fixed, **feedback.learned, **solved}.items():
        w = by_name.get(name)
        if w is not None and w.shape == b.shape:
            found[name] = compare(b, w)
        elif w is not None and w.ndim == 2 and w.T.shape == b.shape:
            found[name] = compare(b, w.T)
    return found
