"""The reference of dual propagation against numbers by hand and what the paper proves."""

import numpy as np
import pytest

from . import backprop, dual_propagation, feedback_alignment, losses, nets
from .cases import RNG, all_entries, assert_same, conv_case, dense_case


def dual(net, x, e, **options):
    return dual_propagation.gradients(net, x, e, **options)[0]


def test_dual_propagation_by_hand():
    # x = 2, weights 1 and 3, relu: a = 2, o = 6. beta 4, e = 1: s+_2 - s-_2 = -4, D = -12.
    net = nets.dense_net([[[1.0]], [[3.0]]], [None, None], ["relu"])
    x, e = np.array([[2.0]]), np.array([[1.0]])
    # alpha 1/2: s = relu(2 -+ 6) = 0, 8; sbar = 4. Gradients 8/4 * 2 and 4/4 * sbar.
    for adjoint in (True, False):
        got, states = dual_propagation.gradients(net, x, e, beta=4.0, adjoint=adjoint)
        np.testing.assert_array_equal([g.item() for g in got.kernels], [4, 4])
        np.testing.assert_array_equal([states.plus[1].item(), states.minus[1].item()], [0, 8])
        assert got.inputs.item() == 2
    # alpha 1: original s = relu(2 - 12), relu(2) = 0, 2, sbar = s+ = 0; adjoint s = relu(2), relu(2 + 12), sbar = 2.
    original = dual(net, x, e, alpha=1.0, beta=4.0, adjoint=False)
    np.testing.assert_array_equal([g.item() for g in original.kernels], [1, 0])
    adjoint = dual(net, x, e, alpha=1.0, beta=4.0)
    np.testing.assert_array_equal([g.item() for g in adjoint.kernels], [6, 2])
    # Weak feedback crosses no kink: backpropagation, with its sbar = a.
    weak = dual(net, x, e, beta=0.1)
    np.testing.assert_allclose([g.item() for g in weak.kernels], [6, 2])
    # Twice: a second sweep up meets D = -12 and the outputs e once more, nothing changes.
    again = dual(net, x, e, beta=4.0, iterations=2)
    np.testing.assert_array_equal([g.item() for g in again.kernels], [4, 4])


def test_squared_error_by_hand():
    # One linear layer, a = 3, y = 1, beta 1, alpha 1/2: s+ = (3 + 1/2) / (3/2) = 7/3, s- = (3 - 1/2) / (1/2) = 5.
    net = [nets.dense([[3.0]])]
    options = {"beta": 1.0, "adjoint": False, "output": "squared_error", "targets": np.array([[1.0]])}
    got, states = dual_propagation.gradients(net, np.array([[1.0]]), **options)
    np.testing.assert_allclose([states.plus[1].item(), states.minus[1].item()], [7 / 3, 5])
    np.testing.assert_allclose(got.kernels[0], [[8 / 3]])
    with pytest.raises(ValueError, match="below 1"):
        dual_propagation.gradients(net, np.array([[1.0]]), **options | {"alpha": 0.0})


@pytest.mark.parametrize("order", dual_propagation.ORDERS)
@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("case", [dense_case, conv_case])
def test_weak_feedback_is_backpropagation(case, alpha, adjoint, order):
    net, x, e = case()
    iterations = 1 if order == "forward_backward" else len(net)
    got = dual(net, x, e, alpha=alpha, beta=1e-6, adjoint=adjoint, order=order, iterations=iterations)
    true = all_entries(backprop.gradients(net, x, e))
    assert np.abs(all_entries(got) - true).max() < 1e-4 * np.abs(true).max()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_nets_are_exact(reduction):
    """f the identity: the differences are the true gradients whatever beta, and sbar the clean states if adjoint."""
    net, x, e = dense_case("identity")
    assert_same(dual(net, x, e, beta=3.0, alpha=0.2, reduction=reduction), backprop.gradients(net, x, e))


def test_error_in_beta():
    """O(beta), but O(beta^2) for alpha = 1/2."""
    net, x, e = dense_case()
    true = all_entries(backprop.gradients(net, x, e))
    for alpha, power in [(0.5, 2), (0.0, 1), (1.0, 1)]:
        far, near = (np.abs(all_entries(dual(net, x, e, alpha=alpha, beta=b)) - true).max() for b in (1e-2, 1e-3))
        assert abs(np.log10(far / near) - power) < 0.2


@pytest.mark.parametrize("output", ["once", "refreshed"])
@pytest.mark.parametrize("alpha", [0.3, 0.5])
def test_orders_share_their_fixed_point(alpha, output):
    net, x, e = dense_case()
    net = [layer._replace(kernel=0.5 * layer.kernel) for layer in net]
    targets = losses.one_hot([0, 1, 1], 2)

    def error_at(outputs):
        return losses.mean(*losses.softmax_cross_entropy(outputs, targets))[1]

    results = [
        all_entries(
            dual(net, x, e, alpha=alpha, beta=0.5, iterations=60, order=order, output=output, error_at=error_at)
        )
        for order in dual_propagation.ORDERS
    ]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=1e-10)
    if output == "refreshed":
        free = error_at(nets.forward(net, x).outputs)
        assert np.abs(results[0] - all_entries(dual(net, x, free, alpha=alpha, beta=0.5, iterations=60))).max() > 1e-6


def test_fixed_point_is_stationary():
    """At convergence the states satisfy Eq. 2 as written, with betas by layer as Eq. 44 has them."""
    net, x, e = dense_case()
    net = [layer._replace(kernel=0.5 * layer.kernel) for layer in net]
    beta, alpha = np.array([1.0, 0.2, 0.4, 0.8]), 0.3
    _, s = dual_propagation.gradients(net, x, e, alpha=alpha, beta=beta, adjoint=False, iterations=80, reduction="sum")
    for k in (1, 2):
        a = s.mean[k - 1] @ net[k - 1].kernel + net[k - 1].bias
        pull = (s.plus[k + 1] - s.minus[k + 1]) @ net[k].kernel.T / beta[k + 1]
        # 1/beta_k (f^-1(s+) - a) = alpha pull
        np.testing.assert_allclose((np.arctanh(s.plus[k]) - a) / beta[k], alpha * pull, atol=1e-9)
        np.testing.assert_allclose((np.arctanh(s.minus[k]) - a) / beta[k], -(1 - alpha) * pull, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_damped_fixed_point_is_the_undamped_one(alpha):
    net, x, _ = dense_case("hard_tanh")
    net = [layer._replace(kernel=0.3 * layer.kernel, bias=0.3 * layer.bias) for layer in net]
    options = {"alpha": alpha, "beta": 0.5, "adjoint": False, "output": "squared_error"}
    options["targets"] = losses.one_hot([0, 1, 1], 2)
    damping = [None]
    for k in (1, 2):
        start = RNG(k).normal(size=net[k].kernel.shape[0])
        damping.append(dual_propagation.spectral_norm_squared(net[k].kernel, 50, start))
        np.testing.assert_allclose(damping[k], np.linalg.norm(net[k].kernel, 2) ** 2, rtol=1e-3)
    plain = all_entries(dual(net, x, None, iterations=100, **options))
    damped = all_entries(dual(net, x, None, iterations=100, damping=damping, **options))
    np.testing.assert_allclose(damped, plain, atol=1e-9)
    early = all_entries(dual(net, x, None, iterations=1, damping=damping, **options))
    assert np.abs(early - damped).max() > 1e-3


def test_input_nudge_by_hand():
    # One linear layer of weight 2, x = 1, e = 1, beta 1/2, alpha 1/4, original: D_0 = 2 * -1/2 = -1,
    # s+_0 = 1 - 1/4, s-_0 = 1 + 3/4, sbar_0 = 1/4 * 3/4 + 3/4 * 7/4 = 3/2: the gradient is 1 * 3/2.
    net = [nets.dense([[2.0]])]
    x, e = np.array([[1.0]]), np.array([[1.0]])
    got = dual(net, x, e, alpha=0.25, beta=0.5, adjoint=False, input_nudge=1.0)
    np.testing.assert_allclose([got.kernels[0].item(), got.inputs.item()], [1.5, 2])


def test_dual_feedback_matrices():
    net, x, e = conv_case()
    feedback = [None, *(RNG(4).normal(size=layer.kernel.shape) for layer in net[1:])]
    got = all_entries(dual(net, x, e, beta=1e-6, feedback=feedback))
    expected = all_entries(feedback_alignment.gradients(net, feedback, x, e))
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


def test_dual_refusals():
    net, x, e = dense_case()
    for options in (
        {"order": "forward", "iterations": 2},
        {"damping": [None, 1.0, 1.0]},
        {"output": "squared_error", "targets": e},
    ):
        with pytest.raises(ValueError):
            dual(net, x, e, **options)
