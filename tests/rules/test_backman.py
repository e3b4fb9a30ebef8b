"""BackMAN against the explicit reference, in float64."""

import jax
import numpy as np
import pytest

import lrules
from tests.reference import backman
from tests.rules.common import ALL_NETS, NOTHING, agrees, make, pull


@pytest.mark.parametrize("alpha", [1.0, 0.3, "gradient_norm"])
@pytest.mark.parametrize("name", ALL_NETS)
def test_backman(name, alpha):
    with jax.enable_x64(True):
        net, x, e = make(name)
        agrees(pull(net, lrules.backman(alpha), NOTHING, x, e), backman.gradients(net, x, e, alpha=alpha))


@pytest.mark.parametrize("alpha", [1.0, "gradient_norm"])
@pytest.mark.parametrize("name", ALL_NETS)
def test_dead_neurons(name, alpha):
    """A neuron without gradient gets the layer's mean norm; a wholly dead layer gets zeros, nothing gets NaN."""
    with jax.enable_x64(True):
        net, x, e = make(name)
        dead = net[0]._replace(bias=net[0].bias - 1e4) if net[0].activation == "relu" else net[0]
        partly = net[0]._replace(bias=net[0].bias - 1e4 * (np.arange(len(net[0].bias)) == 1))
        for first in (dead, partly):
            changed = [first, *net[1:]]
            got = pull(changed, lrules.backman(alpha), NOTHING, x, e)
            agrees(got, backman.gradients(changed, x, e, alpha=alpha))
        zero = pull(net, lrules.backman(alpha), NOTHING, x, np.zeros_like(e))
        assert all(not np.any(g) for g in jax.tree.leaves(zero[0]))
