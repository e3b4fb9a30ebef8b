"""The iterations: random order, convergence, and its report."""

import jax
import numpy as np
import pytest

from tests import bridge
from tests.reference import backprop, losses, nets
from tests.rules.dual_propagation.common import (
    VARIANTS,
    computed,
    conv,
    dense,
    expected,
    targets_of,
    transformed,
)
from tests.sampling import mostly_slow, pairs

pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.mark.parametrize(
    "order,alpha",
    mostly_slow(
        pairs(["forward_backward", "forward", "odd_even"], [0.0, 0.5, 1.0]),
        [("forward_backward", 0.0), ("forward", 0.5), ("odd_even", 1.0), ("odd_even", 0.5)],
    ),
)
def test_weak_feedback_is_backprop(order, alpha):
    tolerance = 1e-7 if alpha == 0.5 else 1e-3
    net, x = dense(activations=("tanh", "tanh"))
    y = targets_of(net, x)
    e = losses.mean(*losses.half_squared_error(nets.forward(net, x).outputs, y))[1]
    want = bridge.kernels_and_biases(backprop.gradients(net, x, e))
    iterations = 1 if order == "forward_backward" else len(net)
    _, grads = computed(net, x, alpha=alpha, beta=1e-4, order=order, iterations=iterations)
    bridge.close(grads.params, want, tolerance)
    if order == "forward_backward" and alpha == 0:
        far, _ = transformed(net, x, alpha=alpha, beta=1.0)
        relative = [
            np.abs(g - w).max() / np.abs(w).max() for g, w in zip(*map(jax.tree.leaves, (far, want)), strict=True)
        ]
        assert max(relative) > 1e-2


ALPHAS = (0.0, 0.25, 0.5, 1.0)


@pytest.mark.parametrize(
    "adjoint,output,alpha",
    mostly_slow(
        [(*variant, alpha) for variant in VARIANTS for alpha in ALPHAS],
        [(*variant, ALPHAS[i % 4]) for i, variant in enumerate(VARIANTS)],
    ),
)
def test_random_order(adjoint, output, alpha):
    """State by state, in the order of the key."""
    index = VARIANTS.index((adjoint, output))
    net, x = conv() if (index + int(4 * alpha)) % 3 == 0 else dense()
    iterations, key = 1 + (index + int(4 * alpha)) % 5, jax.random.key(3)
    keys = jax.random.split(jax.random.split(key)[1], iterations)
    states = [[int(i) + 1 for i in np.asarray(jax.random.permutation(k, len(net)))] for k in keys]
    options = {"alpha": alpha, "beta": 0.4, "adjoint": adjoint, "iterations": iterations, "output": output}
    _, grads = computed(net, x, rng=key, order="random", **options)
    bridge.close(grads.params, bridge.kernels_and_biases(expected(net, x, order=states, **options)))


def test_random_order_follows_its_key():
    net, x = dense()
    others = [
        computed(net, x, rng=jax.random.key(i), alpha=0.3, beta=0.5, iterations=1, order="random")[1] for i in range(3)
    ]
    assert len({float(other.params["0"]["kernel"].sum()) for other in others}) > 1


def deep_relu():
    """Table 2 in small: five layers of ReLU, beta 1/2."""
    rng = np.random.default_rng(0)
    net = bridge.random_dense(rng, (20, 40, 40, 40, 40, 5), ["relu"] * 4, scale=1.4)
    return net, rng.normal(size=(8, 20))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_divergence_is_seen(alpha):
    net, x = deep_relu()
    options = {"alpha": alpha, "beta": 0.5, "iterations": 30}
    _, adjoint = computed(net, x, **options)
    _, original = computed(net, x, adjoint=False, output="squared_error", **options | {"alpha": max(alpha, 0.01)})
    assert adjoint.report["residual"][-1] < 1e-3
    assert not original.report["residual"][-1] < 0.1


def test_stops_early():
    net, x = dense()
    options = {"alpha": 0.3, "beta": 0.5}
    for order in ("forward_backward", "random", "parallel"):
        rng = jax.random.key(0) if order == "random" else None
        _, full = computed(net, x, rng=rng, order=order, iterations=60, **options)
        _, early = computed(net, x, rng=rng, order=order, iterations=60, tolerance=1e-8, **options)
        count = int(early.report["iterations"])
        assert len(net) <= count < 30 and int(full.report["iterations"]) == 60
        assert early.report["residual"][count - 1] <= 1e-8 and np.isnan(early.report["residual"][count])
        bridge.close(early.params, full.params, 1e-6)
    params, _ = transformed(net, x, iterations=60, tolerance=1e-8, **options)
    bridge.close(params, full.params, 1e-6)
