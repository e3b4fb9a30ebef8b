"""The reference of weight mirrors against numbers by hand and expectations."""

import numpy as np
import pytest

from . import backprop, nets, weight_mirror
from .cases import RNG, assert_same, conv_case, dense_case, hand_net, numeric, orthogonal, random_dense


def whole_noise(net, x, std):
    """Noise whose mean over its examples of xi xi^T is std^2 I exactly: a basis, for each layer."""
    reads = nets.forward(net, x[:1]).reads
    sizes = [r.size for r in reads[1:]]
    bases = [std * np.sqrt(size) * orthogonal(size, k) for k, size in enumerate(sizes)]
    return [None, *(basis.reshape(-1, *r.shape[1:]) for basis, r in zip(bases, reads[1:], strict=True))]


def test_weight_mirror_by_hand():
    # W = (1 0; 0 1; 1 1), noise (1, 2, 0) and (0, 0, 2): responses (1, 2), (2, 2). Products, averaged:
    # ((1, 2), (2, 4), (0, 0)) / 2 and ((0, 0), (0, 0), (4, 4)) / 2.
    noise = [None, np.array([[1.0, 2, 0], [0, 0, 2]])]
    b = np.full((3, 2), 0.5)
    products = np.array([[0.5, 1], [1, 2], [2, 2]])
    got = weight_mirror.mirror_gradients(hand_net(), [None, b], noise, decay=0.1)
    np.testing.assert_allclose(got[1], 0.05 - products)
    np.testing.assert_allclose(weight_mirror.mirror_gradients(hand_net(), [None, b], noise)[1], b - products)
    # op(B, xi) = (1.5, 1.5), (1, 1): residuals (0.5, -0.5), (-1, -1).
    got = weight_mirror.mirror_gradients(hand_net(), [None, b], noise, kind="estimation")
    np.testing.assert_allclose(got[1], np.array([[0.5, -0.5], [1, -1], [-2, -2]]) / 2)
    # Through relu with biases (-2, 1): responses (0, 3), (0, 3).
    net = hand_net()
    net[1] = net[1]._replace(activation="relu", bias=np.array([-2.0, 1]))
    got = weight_mirror.mirror_gradients(net, [None, 0 * b], noise, response="activation")
    np.testing.assert_allclose(got[1], -np.array([[0, 1.5], [0, 3], [0, 3]]))
    net[1] = net[1]._replace(bias=None)
    got = weight_mirror.mirror_gradients(net, [None, 0 * b], noise, response="activation")
    np.testing.assert_allclose(got[1], -products)


@pytest.mark.parametrize("case", [dense_case, conv_case])
def test_weight_mirror_expectation(case):
    """std^2 W, in every padding; the rest is at std^2 W / decay, estimation's at W."""
    net, x, e = case()
    noise = whole_noise(net, x, 0.7)
    zero = [None, *(0 * layer.kernel for layer in net[1:])]
    start = [None, *(RNG(k).normal(size=layer.kernel.shape) for k, layer in enumerate(net[1:]))]
    got = weight_mirror.mirror_gradients(net, zero, noise)
    for layer, g in zip(net[1:], got[1:], strict=True):
        np.testing.assert_allclose(-g, 0.49 * layer.kernel, atol=1e-12)
    feedback = start
    for _ in range(3):
        feedback = weight_mirror.step(net, feedback, noise, rate=0.1, decay=2.0)
    for layer, b, old in zip(net[1:], feedback[1:], start[1:], strict=True):
        rest = 0.49 * layer.kernel / 2
        np.testing.assert_allclose(b - rest, 0.8**3 * (old - rest), atol=1e-12)
    weights = [None, *(layer.kernel for layer in net[1:])]
    for g in weight_mirror.mirror_gradients(net, weights, noise, kind="estimation")[1:]:
        np.testing.assert_allclose(g, 0, atol=1e-12)
    for layer, g, b in zip(
        net[1:], weight_mirror.mirror_gradients(net, start, noise, kind="estimation")[1:], start[1:], strict=True
    ):
        np.testing.assert_allclose(g, 0.49 * (b - layer.kernel), atol=1e-12)
    assert_same(weight_mirror.gradients(net, weights, x, e), backprop.gradients(net, x, e))


def test_positions_of_a_mirror():
    """One row of three, kernel of three, SAME: the middle tap lies inside three times, the others twice."""
    layer = nets.conv(np.array([1.0, 2, 3]).reshape(1, 3, 1, 1), padding="SAME")
    noise = np.sqrt(3) * np.eye(3).reshape(3, 1, 3, 1)
    y = nets.multiply(layer, layer.kernel, noise)
    np.testing.assert_allclose(weight_mirror.correlation(layer, noise, y).ravel(), [1, 2, 3])
    np.testing.assert_allclose(weight_mirror.correlation(layer, noise, y, "all").ravel(), [2 / 3, 2, 2])


def test_estimation_descends_its_loss():
    net, x, _ = conv_case()
    noise = [None, *(RNG(k).normal(size=r.shape) for k, r in enumerate(nets.forward(net, x).reads[1:]))]
    feedback = [None, *(RNG(k).normal(size=layer.kernel.shape) for k, layer in enumerate(net[1:]))]
    got = weight_mirror.mirror_gradients(net, feedback, noise, kind="estimation", positions="all")
    for k, layer in enumerate(net[1:], 1):

        def value(k=k, layer=layer):
            residual = nets.multiply(layer, feedback[k] - layer.kernel, noise[k])
            positions = residual[0].size / residual.shape[-1]
            return 0.5 * (residual**2).sum() / len(x) / positions

        np.testing.assert_allclose(got[k], numeric(value, feedback[k]), atol=1e-6)


def test_normal_noise_through_an_activation():
    """sigma^2 E f' W, roughly, over many draws."""
    net = random_dense("tanh", (3, 4, 3, 2))
    noise = [None, 0.3 * RNG(1).normal(size=(200000, 4)), np.zeros((1, 3))]
    zero = [None, *(0 * layer.kernel for layer in net[1:])]
    got = weight_mirror.mirror_gradients(net, zero, noise, response="activation")
    slopes = nets.slope("tanh", noise[1] @ net[1].kernel + net[1].bias).mean(axis=0)
    assert np.abs(-got[1] - 0.09 * slopes * net[1].kernel).max() < 2e-3
