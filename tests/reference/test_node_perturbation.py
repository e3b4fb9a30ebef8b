"""The reference of node perturbation against numbers by hand and finite differences."""

import numpy as np
import pytest

from . import losses, nets, node_perturbation
from .cases import RNG, conv_case, direct_shapes, numeric, random_dense


def perturb(net, x, targets, std, seed):
    trace = nets.forward(net, x)
    noise = [None, *(RNG(seed).normal(size=r.shape) for r in trace.reads[1:])]
    noisy = losses.half_squared_error(node_perturbation.noisy_outputs(net, x, noise, std), targets)[0]
    clean, error = losses.half_squared_error(trace.outputs, targets)
    return node_perturbation.estimates(noisy, clean, noise, std), error


def test_estimates_by_hand():
    # Linear chain of weights 1, 3 at x = 1, y = 0: loss 9/2; noise 0.1 * 2 in between: output 3.6, loss 6.48.
    net = nets.dense_net([[[1.0]], [[3.0]]], [None, None], ["identity"])
    noise, x = [None, np.array([[2.0]])], np.array([[1.0]])
    outputs = node_perturbation.noisy_outputs(net, x, noise, 0.1)
    np.testing.assert_allclose(outputs, [[3.6]])
    lambdas = node_perturbation.estimates([6.48], [4.5], noise, 0.1)
    np.testing.assert_allclose(lambdas[1], [[39.6]])
    # e = 3; B = 1: residual 3 * 1 - 39.6, times d = 3, sequential and direct alike.
    for rule in (node_perturbation.gradients, node_perturbation.direct_gradients):
        got = rule(net, [None, np.array([[1.0]])], x, np.array([[3.0]]), lambdas)
        np.testing.assert_allclose(got.feedback[1], [[-36.6 * 3]])
        np.testing.assert_allclose(got.kernels[0], [[3.0]])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_feedback_gradients_are_gradients(reduction):
    net, x, e = conv_case()
    scale = len(x) if reduction == "mean" else 1
    lambdas = [None, *(RNG(3).normal(size=r.shape) for r in nets.forward(net, x).reads[1:])]
    sequential = [None, *(RNG(4).normal(size=layer.kernel.shape) for layer in net[1:])]
    fixed = [d * scale for d in node_perturbation.signals(net, sequential, x, e)]
    got = node_perturbation.gradients(net, sequential, x, e, lambdas, reduction).feedback
    for k in (1, 2, 3):

        def value(k=k):
            sent = nets.transpose(net[k], sequential[k], fixed[k], lambdas[k].shape)
            return 0.5 * ((sent - lambdas[k]) ** 2).sum() / scale

        np.testing.assert_allclose(got[k], numeric(value, sequential[k]), rtol=1e-6, atol=1e-6)
    matrices = direct_shapes(net, x)
    got = node_perturbation.direct_gradients(net, matrices, x, e, lambdas, reduction).feedback
    for k in (1, 2, 3):

        def value(k=k):
            sent = np.tensordot(e * scale, matrices[k], axes=1)
            return 0.5 * ((sent - lambdas[k]) ** 2).sum() / scale

        np.testing.assert_allclose(got[k], numeric(value, matrices[k]), rtol=1e-6, atol=1e-6)


def test_top_layer_feedback_is_learned():
    """Theorem 1: least squares over many draws finds the top weight."""
    net = random_dense("tanh", (4, 3, 3))
    pairs = []
    for seed in range(40):
        x, targets = RNG(seed).normal(size=(200, 4)), RNG(seed + 100).normal(size=(200, 3))
        lambdas, error = perturb(net, x, targets, 1e-4, seed)
        pairs.append((lambdas[1], error))
    found = node_perturbation.least_squares(pairs)
    assert np.abs(found - net[1].kernel).max() < 0.1
    exact = [(d @ net[1].kernel.T, d) for _, d in pairs]
    np.testing.assert_allclose(node_perturbation.least_squares(exact, 1e-6), net[1].kernel, rtol=1e-6)
    (estimate, d), ridge = pairs[0], 0.1  # what minimises sum |d B^T - lambda|^2 + ridge |B|^2
    b = node_perturbation.least_squares(pairs[:1], ridge)
    np.testing.assert_allclose((d @ b.T - estimate).T @ d + ridge * b, 0, atol=1e-12 * np.abs(estimate.T @ d).max())
