"""Iterations that stop when the states hardly change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrules.engine.settling import repeat, residual


def halve(carry, key):
    return carry / 2, jnp.abs(carry).max() / 2


def run(**options):
    return jax.jit(lambda x: repeat(halve, x, **options))(jnp.ones(3))


def test_a_fixed_number():
    carry, report = run(done=1, iterations=4)
    assert carry.tolist() == [0.125] * 3
    assert report["residual"].tolist() == [1, 0.5, 0.25, 0.125] and report["iterations"] == 4


@pytest.mark.parametrize("least, count", [(0, 4), (5, 5), (9, 9)])
def test_the_tolerance(least, count):
    """It stops after the first iteration with a residual <= tolerance, but not before `least`."""
    carry, report = run(done=1, iterations=9, tolerance=0.125, least=least)
    assert report["iterations"] == count and carry.tolist() == [0.5 ** (count - 1)] * 3
    assert np.isnan(report["residual"]).sum() == 9 - count


def test_keys_are_those_of_the_iterations():
    carry, _ = repeat(lambda c, k: (c + k, 0.0), 0, jnp.arange(5), done=2, iterations=5)
    assert carry == 2 + 3 + 4


def test_the_residual():
    changes = {"a": jnp.asarray([3.0, 4.0]), "b": jnp.asarray([1.0]), "none": jnp.zeros(2)}
    sizes = {"a": jnp.asarray([10.0, 0.0]), "b": jnp.asarray([1.0]), "none": jnp.zeros(2)}
    assert residual(changes, sizes) == 1
    assert residual({"a": changes["a"]}, {"a": sizes["a"]}) == 0.5
    assert residual({"none": changes["a"]}, {"none": sizes["none"]}) == 0  # no error reaches it
    assert residual({}, {}) == 0
    # a loop has a state in each iteration: 5 / 10 and 2 / 4 and 3 / 4
    changes = {"loop": jnp.asarray([[3.0, 4.0], [0.0, 2.0], [3.0, 0.0]])}
    sizes = {"loop": jnp.asarray([[10.0, 0.0], [0.0, 4.0], [4.0, 0.0]])}
    assert residual(changes, sizes, ranks={"loop": 1}) == 0.75
    assert residual(changes, sizes) == jnp.sqrt(jnp.asarray(38 / 132))
