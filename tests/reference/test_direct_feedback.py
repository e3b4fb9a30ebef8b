"""The references of direct Kolen-Pollack and of feedback of low rank."""

import numpy as np
import pytest

from . import direct_kolen_pollack, kolen_pollack, low_rank_feedback, nets
from .cases import RNG, TOP, E, X, assert_same, conv_case, dense_case, direct_shapes, hand_net, linear_chain, numeric


def test_direct_kolen_pollack_by_hand():
    feedback = [None, np.array([[1.0, 2, 3], [0, 1, -1]])]
    got = direct_kolen_pollack.gradients(hand_net(), feedback, X, E)
    np.testing.assert_array_equal(got.kernels[0], [[2, 3, 0], [4, 6, 0]])
    np.testing.assert_array_equal(got.feedback[1], TOP.T)
    net, stepped = direct_kolen_pollack.step(hand_net(), feedback, X, E, rate=0.5, decay=0.2)
    np.testing.assert_allclose(net[1].kernel, 0.9 * hand_net()[1].kernel - TOP / 2)
    np.testing.assert_allclose(stepped[1], 0.9 * feedback[1] - TOP.T / 2)
    np.testing.assert_allclose(net[1].bias, [-1, 1.5])


def test_direct_kolen_pollack_at_the_top():
    """Any net: the difference at the top shrinks by 1 - eta gamma; with one hidden layer that is Kolen-Pollack."""
    net, x, e = dense_case()
    feedback = direct_shapes(net, x)
    before = net[-1].kernel - feedback[-1].T
    for _ in range(3):
        net, feedback = direct_kolen_pollack.step(net, feedback, x, e, rate=0.1, decay=0.5)
    np.testing.assert_allclose(net[-1].kernel - feedback[-1].T, 0.95**3 * before)
    shallow, x, e = dense_case(sizes=(4, 5, 2))
    b = RNG(5).normal(size=(5, 2))
    direct = direct_kolen_pollack.gradients(shallow, [None, b.T], x, e)
    sequential = kolen_pollack.gradients(shallow, [None, b], x, e)
    assert_same(direct, sequential)
    np.testing.assert_allclose(direct.feedback[1], sequential.feedback[1].T)


def test_direct_kolen_pollack_comes_to_rest():
    """Linear nets: B_k M_k = W^T of the last layer at rest, and dB_k M_k = dW^T at all times."""
    net, x, y = linear_chain((4, 5, 5, 3))
    feedback = direct_shapes(net, x)
    for i in range(6000):
        e = (nets.forward(net, x).outputs - y) / len(x)
        if i == 7:
            got = direct_kolen_pollack.gradients(net, feedback, x, e)
            np.testing.assert_allclose(got.feedback[1] @ net[1].kernel, got.kernels[2].T)
            assert np.abs(feedback[1] @ net[1].kernel - net[2].kernel.T).max() > 0.1
        net, feedback = direct_kolen_pollack.step(net, feedback, x, e, rate=0.1, decay=0.05)
    e = (nets.forward(net, x).outputs - y) / len(x)
    got = direct_kolen_pollack.gradients(net, feedback, x, e)
    assert max(np.abs(g + 0.05 * layer.kernel).max() for g, layer in zip(got.kernels, net, strict=True)) < 1e-6
    assert np.abs(net[2].kernel).max() > 0.1
    np.testing.assert_allclose(feedback[1] @ net[1].kernel, net[2].kernel.T, atol=1e-5)
    np.testing.assert_allclose(feedback[2], net[2].kernel.T, atol=1e-5)


@pytest.mark.parametrize("case", [dense_case, conv_case])
@pytest.mark.parametrize("shared", [True, False])
def test_low_rank_feedback(case, shared):
    """The signals are those of the product, the gradients those that the chain rule makes of the product's."""
    net, x, e = case()
    factors = [None, *(RNG(k).normal(size=(2, *b.shape[1:])) for k, b in enumerate(direct_shapes(net, x)[1:]))]
    p = RNG(8).normal(size=(2, 2)) if shared else [None, *(RNG(8 + k).normal(size=(2, 2)) for k in range(1, len(net)))]
    each = [None, *[p] * (len(net) - 1)] if shared else p
    whole = [None, *(low_rank_feedback.product(each[k], factors[k]) for k in range(1, len(net)))]
    got, d_p = low_rank_feedback.gradients(net, p, factors, x, e)
    wanted = direct_kolen_pollack.gradients(net, whole, x, e)
    assert_same(got, wanted)

    # The gradients of <dB, P Q> with dB held.
    def value():
        return sum((g * low_rank_feedback.product(each[k], factors[k])).sum() for k, g in held)

    held = [(k, wanted.feedback[k]) for k in range(1, len(net))]
    for k in range(1, len(net)):
        np.testing.assert_allclose(got.feedback[k], numeric(value, factors[k]), atol=1e-6)
    for found, array in [(d_p, p)] if shared else zip(d_p[1:], p[1:], strict=True):
        np.testing.assert_allclose(found, numeric(value, array), atol=1e-6)
    fixed, none = low_rank_feedback.gradients(net, p, factors, x, e, learned=False)
    assert_same(fixed, wanted)
    assert not any(g.any() for g in [*fixed.feedback[1:], *([none] if shared else none[1:])])


def test_low_rank_by_hand():
    # P = (1; 1), Q = (1, 2, 3): e P = 2 - 1 = 1, s = (1, 2, 3), the dead one out. r = (3, 1, 0): dQ = r, r . Q = 5.
    p, factors = np.array([[1.0], [1.0]]), [None, np.array([[1.0, 2, 3]])]
    got, d_p = low_rank_feedback.gradients(hand_net(), p, factors, X, E)
    np.testing.assert_array_equal(got.kernels[0], [[1, 2, 0], [2, 4, 0]])
    np.testing.assert_array_equal(got.feedback[1], [[3, 1, 0]])
    np.testing.assert_array_equal(d_p, [[10], [-5]])
    # Normalised: the hidden layer and the factors get e / sqrt(5), the last layer e.
    got, d_p = low_rank_feedback.gradients(hand_net(), p, factors, X, E, normalise=True)
    np.testing.assert_allclose(got.kernels[0], np.array([[1, 2, 0], [2, 4, 0]]) / np.sqrt(5))
    np.testing.assert_allclose(d_p, np.array([[10], [-5]]) / np.sqrt(5))
    np.testing.assert_array_equal(got.kernels[1], TOP)


def test_balanced_factors():
    """P^T P - Q Q^T moves by decay alone, to first order in the rate."""
    net, x, e = dense_case(sizes=(4, 5, 3))
    p, q = RNG(0).normal(size=(3, 2)), RNG(1).normal(size=(2, 5))
    got, d_p = low_rank_feedback.gradients(net, p, [None, q], x, e)
    d_q, decay = got.feedback[1], 0.3
    change = -(d_p.T @ p + p.T @ d_p) - 2 * decay * p.T @ p + (d_q @ q.T + q @ d_q.T) + 2 * decay * q @ q.T
    np.testing.assert_allclose(change, -2 * decay * (p.T @ p - q @ q.T), atol=1e-12)


def test_normalised_errors():
    e = np.array([[3.0, 4], [0, 0], [-1e-30, 0]])
    np.testing.assert_allclose(low_rank_feedback.normalised(e, "sum"), [[0.6, 0.8], [0, 0], [-1, 0]])
    np.testing.assert_allclose(low_rank_feedback.normalised(e / 3), low_rank_feedback.normalised(e, "sum") / 3)
    assert low_rank_feedback.projection_scale([16, 100, 4]) == 0.1
