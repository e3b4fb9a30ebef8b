"""The reference of forward-forward against numbers by hand and what it learns."""

import numpy as np
import pytest

from . import forward_forward, losses, nets
from .cases import RNG, X, conv_case, dense_case, hand_net, numeric


def test_forward_forward_by_hand():
    # Positive (1, 2): z = (3, 1, -1), y = (3, 1, 0), G = 10. Negative (1, 0): z = (1, -1, -1), y = (1, 0, 0), G = 1.
    # theta 10: slopes -1/2 and sigmoid(-9). The second layer reads (3, 1, 0) / sqrt(10) and (1, 0, 0).
    positive, negative = X, np.array([[1.0, 0]])
    kernels, biases, values = forward_forward.gradients(hand_net(), positive, negative, theta=10.0)
    low = 1 / (1 + np.exp(9))
    np.testing.assert_allclose(kernels[0], np.array([[-3 + 2 * low, -1, 0], [-6, -2, 0]]))
    np.testing.assert_allclose(biases[0], [-3 + 2 * low, -1, 0])
    np.testing.assert_allclose(values[0], np.log(2) + np.log1p(np.exp(-9)))
    # Outputs (3, 1) / sqrt(10) + (0, 1), and (1, 1).
    trace = forward_forward.forward(hand_net(), positive)
    np.testing.assert_allclose(trace.outputs, [[3 / np.sqrt(10), 1 + 1 / np.sqrt(10)]])
    np.testing.assert_allclose(forward_forward.goodnesses(trace)[1], 2 + 2 / np.sqrt(10))
    np.testing.assert_allclose(forward_forward.goodnesses(trace, "mean")[0], 10 / 3)
    np.testing.assert_array_equal(forward_forward.normalise(np.zeros((1, 3))), np.zeros((1, 3)))
    np.testing.assert_allclose(forward_forward.normalise(np.array([[3.0, 4]]), epsilon=5.0), [[0.3, 0.4]])
    np.testing.assert_array_equal(forward_forward.embed(np.full((1, 2, 2, 1), 7.0), [[0, 1, 0]]).ravel(), [0, 1, 0, 7])


@pytest.mark.parametrize("goodness", ["sum", "mean"])
@pytest.mark.parametrize("case", [dense_case, conv_case])
def test_forward_forward_is_local(case, goodness):
    """Each layer's gradient is that of its own loss alone, those below held."""
    net, positive, _ = case()
    negative = RNG(9).normal(size=positive.shape)
    options = {"theta": 0.8, "goodness": goodness, "epsilon": 1e-3}
    kernels, biases, _ = forward_forward.gradients(net, positive, negative, **options)
    for k, layer in enumerate(net):

        def value(k=k):
            return forward_forward.gradients(net, positive, negative, **options)[2][k]

        np.testing.assert_allclose(kernels[k], numeric(value, layer.kernel), atol=1e-6, rtol=1e-5)
        if layer.bias is not None:
            np.testing.assert_allclose(biases[k], numeric(value, layer.bias), atol=1e-6, rtol=1e-5)
    # A layer does not see the length of what the one below gives: with relu, no scale of it.
    scaled = [net[0]._replace(activation="relu"), *net[1:]]
    longer = [scaled[0]._replace(kernel=3 * net[0].kernel, bias=3 * net[0].bias), *net[1:]]
    one, other = (forward_forward.gradients(n, positive, negative, theta=0.8) for n in (scaled, longer))
    np.testing.assert_allclose(one[0][1], other[0][1])


def test_forward_forward_scores():
    """After training against both wrong labels, examples score highest with their own; all layers learn."""
    rng = RNG(0)
    labels = np.arange(30) % 3
    x = 0.3 * rng.normal(size=(30, 9)) + 2 * np.eye(9)[3 + labels]
    kernels = [rng.normal(size=(9, 20)) / 3, rng.normal(size=(20, 20)) / 4]
    net = [nets.dense(kernel, np.zeros(20), "relu") for kernel in kernels]
    positive, *wrong = (forward_forward.embed(x, losses.one_hot((labels + i) % 3, 3)) for i in range(3))
    negative = np.concatenate(wrong)
    before = forward_forward.scores(net, x, 3, first=0).argmax(axis=1)
    history = []
    for _ in range(400):
        kernels, biases, values = forward_forward.gradients(net, positive, negative, theta=2.0)
        history.append(values)
        net = [
            layer._replace(kernel=layer.kernel - 0.1 * w, bias=layer.bias - 0.1 * b)
            for layer, w, b in zip(net, kernels, biases, strict=True)
        ]
    after = forward_forward.scores(net, x, 3, first=0).argmax(axis=1)
    assert (before == labels).mean() < 0.5 and (after == labels).mean() > 0.95
    assert all(late < 0.6 * early for early, late in zip(history[0], history[-1], strict=True))
