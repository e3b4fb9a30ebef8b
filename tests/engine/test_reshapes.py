"""Which axes become which under a reshape: every shape of sixty numbers into every other; and axes moved."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrules.engine.reshapes import in_order, moved, reshape_groups

SIZES = (1, 2, 3, 5, 6, 10, 12, 60)
SHAPES = [s for n in range(4) for s in itertools.product(SIZES, repeat=n) if math.prod(s) == 60]


@pytest.mark.parametrize("a", SHAPES, ids=str)
def test_groups_are_the_smallest(a):
    """Each group has as many elements on the left as on the right; all axes are in one, in order; none can be split."""
    for b in SHAPES:
        groups = reshape_groups(a, b)
        assert [i for left, _ in groups for i in left] == list(range(len(a)))
        assert [j for _, right in groups for j in right] == list(range(len(b)))
        for left, right in groups:
            m, n = [a[i] for i in left], [b[j] for j in right]
            assert math.prod(m) == math.prod(n)
            cuts = {math.prod(m[:i]) for i in range(1, len(m))} & {math.prod(n[:j]) for j in range(1, len(n))}
            assert not cuts - {1, math.prod(m)}


def test_symbolic_sizes():
    b, t = jax.export.symbolic_shape("b, t")
    assert reshape_groups((b, t, 6), (b * t, 2, 3)) == [([0, 1], [0]), ([2], [1, 2])]
    assert reshape_groups((b * t, 6), (b, t, 6)) == [([0], [0, 1]), ([1], [2])]


def test_axes_of_size_one_are_groups_of_their_own():
    assert reshape_groups((3, 1, 1), (3,)) == [([0], [0]), ([1], []), ([2], [])]
    assert reshape_groups((3,), (3, 1, 1)) == [([0], [0]), ([], [1]), ([], [2])]
    assert reshape_groups((), (1,)) == [([], [0])]


def test_axes_move_as_in_numpy():
    x = np.arange(24.0).reshape(2, 3, 4)
    for source, destination in (([0], [2]), ([2], [0]), ([0, 1], [1, 0]), ([0, 2], [2, 1]), ([1], [1]), ([], [])):
        np.testing.assert_array_equal(moved(jnp.asarray(x), source, destination), np.moveaxis(x, source, destination))
    np.testing.assert_array_equal(in_order(jnp.asarray(x), (2, 0, 1)), x.transpose(2, 0, 1))


def test_what_does_not_move_is_no_operation():
    x = jnp.ones((2, 3, 4))
    assert in_order(x, [0, 1, 2]) is x and moved(x, [1], [1]) is x and moved(x, [0, 2], [0, 2]) is x
