"""Where the arrays of a run lie: on one device here, on many with `devices.MeshPlacement`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
PyTree = Any
Lies = Callable[[PyTree], PyTree]  # from a carry of `ShapeDtypeStruct`s with shardings to better shardings


class Placement:
    """Where arrays lie: here on the one device that JAX uses; `devices.py` has one for many devices."""

    def whole(self, array: Any) -> Array:
        """An array that each device has: data sets, keys, settings."""
        return jnp.asarray(array)

    def batch(self, array: Array) -> Array:
        """A batch of one lane, inside a compiled step."""
        return array

    def carry(self, tree: PyTree, lies: Lies | None = None) -> PyTree:
        """What training carries, [lanes, ...]; `lies` as in `layout`."""
        return jax.tree.map(jnp.asarray, tree)

    def layout(self, tree: PyTree, lies: Lies | None = None) -> PyTree | None:
        """The shardings of a carry; None where JAX chooses.

        Args:
          tree: the carry, [lanes, ...].
          lies: from the carry of one lane, with shardings that follow from the shapes, to its shardings.
        """
        return None

    def gather(self, tree: PyTree) -> PyTree:
        """The arrays as NumPy arrays."""
        return jax.tree.map(np.asarray, tree)

    def least(self, number: int) -> int:
        """The smallest number of all processes."""
        return number
