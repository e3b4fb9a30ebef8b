"""Backprop and training of the last layer alone against the explicit references, in float64."""

import jax
import pytest

import lrules
from tests.reference import backprop
from tests.rules.common import ALL_NETS, NOTHING, agrees, make, pull


@pytest.mark.parametrize("name", ALL_NETS)
def test_backprop(name):
    with jax.enable_x64(True):
        net, x, e = make(name)
        agrees(pull(net, lrules.backprop(), NOTHING, x, e), backprop.gradients(net, x, e))


@pytest.mark.parametrize("name", ALL_NETS)
def test_last_layer_only(name):
    with jax.enable_x64(True):
        net, x, e = make(name)
        agrees(pull(net, lrules.last_layer_only(), NOTHING, x, e), backprop.last_layer_only(net, x, e))
