"""Adversarial inputs by the fast gradient sign method (Goodfellow, Shlens and Szegedy, 2015)."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.errors import InputError

Array = jax.Array


def fgsm(loss: Callable[[Array], Array], x: Array, epsilon: float) -> Array:
    """x + epsilon * sign(dL/dx): of all steps with entries of at most epsilon, the one that raises the loss most.

    `loss` maps inputs [batch, ...] to losses [batch], one per example. The result is not clipped. The
    dual-propagation paper trains on such inputs, with epsilon = 0.01, as a baseline (section 6.1, Table 1).
    """
    check(epsilon)
    if not epsilon:
        return x
    gradient = jax.grad(lambda x: jnp.sum(loss(x)))(x)
    return x + jnp.asarray(epsilon, x.dtype) * jnp.sign(gradient)


def check(epsilon: float) -> None:
    """Refuse a step that is negative or not finite."""
    if not 0 <= epsilon < math.inf:
        raise InputError(f"The adversarial step must be 0 (none) or a finite positive number, got {epsilon:g}.")
