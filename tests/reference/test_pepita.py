"""The reference of PEPITA against numbers by hand and backpropagation."""

import numpy as np
import pytest

from . import backprop, forward_gradient, nets, pepita
from .cases import RNG, TOP, X, assert_same, conv_case, dense_case, hand_net, linear_chain


def test_pepita_by_hand():
    # Clean: h = (3, 1, 0), o = (3, 2), e = (2, -1). F rows (0, 1), (1, 0): x' = (1, 2) + (-1, 2) = (0, 4):
    # z' = (4, 3, 0), h' = (4, 3, 0), o' = (4, 4), e' = (3, 1). h - h' = (-1, -2, 0).
    projection = np.array([[0.0, 1], [1, 0]])
    got, modulated = pepita.gradients(hand_net(), projection, X, lambda o: o - [[1, 3]])
    np.testing.assert_array_equal(modulated, [[0, 4]])
    np.testing.assert_array_equal(got.kernels[0], [[0, 0, 0], [-4, -8, 0]])
    np.testing.assert_array_equal(got.biases[0], [-1, -2, 0])
    np.testing.assert_array_equal(got.kernels[1], [[12, 4], [9, 3], [0, 0]])
    np.testing.assert_array_equal(got.biases[1], [3, 1])
    got, _ = pepita.gradients(hand_net(), projection, X, lambda o: o - [[1, 3]], top="clean")
    np.testing.assert_array_equal(got.kernels[1], [[8, -4], [6, -3], [0, 0]])
    got, _ = pepita.gradients(hand_net(), projection, X, lambda o: o - [[1, 3]], top="clean", read="clean")
    np.testing.assert_array_equal(got.kernels[0], [[-1, -2, 0], [-2, -4, 0]])
    np.testing.assert_array_equal(got.kernels[1], TOP)
    assert not got.inputs.any()


@pytest.mark.parametrize("case", [dense_case, conv_case])
def test_pepita_with_little_projection(case):
    """F small: h - h' is -J_k (e F): with the top clean, the last layer's gradient is backpropagation's. The batch."""
    net, x, e = case()
    projection, size = RNG(3).normal(size=(2, *x.shape[1:])), 1e-6
    got, _ = pepita.gradients(net, size * projection, x, lambda o: e, top="clean")
    true = backprop.gradients(net, x, e)
    np.testing.assert_allclose(got.kernels[-1], true.kernels[-1], atol=1e-4)
    trace, n = nets.forward(net, x), len(x)
    moved = forward_gradient.output_tangent(net[:1], x, signals=[n * np.tensordot(e, projection, axes=1)])
    if net[0].pool is None:
        expected = nets.kernel_gradient(net[0], trace.reads[0], -moved) / n
        np.testing.assert_allclose(got.kernels[0] / size, expected, atol=1e-3)
    # The sum over a batch of single examples.
    parts = [
        pepita.gradients(net, projection, x[i : i + 1], lambda o, i=i: n * e[i : i + 1])[0].kernels for i in range(n)
    ]
    whole = pepita.gradients(net, projection, x, lambda o: e)[0].kernels
    for k, kernel in enumerate(whole):
        np.testing.assert_allclose(kernel, sum(part[k] for part in parts) / n, atol=1e-12)


def test_pepita_in_a_linear_net():
    """One hidden linear layer: dW_0 = -(x + e F)^T e F W_0, which descends where F W_0 is against W_1^T."""
    net, x, y = linear_chain((4, 5, 3))
    projection, n = RNG(3).normal(size=(3, 4)), len(x)
    got, modulated = pepita.gradients(net, projection, x, lambda o: (o - y) / n, top="clean")
    e = nets.forward(net, x).outputs - y
    np.testing.assert_allclose(got.kernels[0], -modulated.T @ e @ projection @ net[0].kernel / n)
    # F W_0 = -W_1^T and products with the clean reads: backpropagation.
    square = [nets.dense(RNG(5).normal(size=(4, 4))), nets.dense(RNG(6).normal(size=(4, 3)))]
    projection = -square[1].kernel.T @ np.linalg.inv(square[0].kernel)
    e = (nets.forward(square, x).outputs - y) / n
    got, _ = pepita.gradients(square, projection, x, lambda o: (o - y) / n, top="clean", read="clean")
    assert_same(got, backprop.gradients(square, x, e)._replace(inputs=got.inputs))
