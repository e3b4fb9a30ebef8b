"""Backprop and training of the last layer alone against the explicit references, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from tests.bridge import close
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


@pytest.mark.parametrize("aux", [False, True])
def test_modified_backprop(aux):
    """Without the derivatives of activations, and the outputs and aux are those of the network."""
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in {"a": (4, 6), "b": (6, 3)}.items()}
    x = jnp.asarray(rng.normal(size=(5, 4)))

    def apply(p, x):
        h = jnp.tanh(x @ p["a"])
        return (h @ p["b"], h.sum()) if aux else h @ p["b"]

    net = lrules.Network(apply, has_aux=aux)
    f = lrules.transform(net, lrules.without_derivatives(lrules.backprop()))
    close(f(params, NOTHING, x), apply(params, x))
    grads = jax.grad(lambda p: (f(p, NOTHING, x)[0] if aux else f(p, NOTHING, x)).sum())(params)
    close(grads["a"], x.T @ (jnp.ones((5, 3)) @ params["b"].T), 1e-5)
