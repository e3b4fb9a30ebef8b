"""The reference of difference target propagation against what its papers prove."""

import numpy as np
import pytest

from . import backprop, difference_target_propagation, direct_feedback_alignment, nets, skipped_backprop
from .cases import RNG, all_entries, assert_same, conv_case, dense_case, linear_chain, numeric, orthogonal


def targets_of(net, feedback, x, e, **options):
    return difference_target_propagation.gradients(net, feedback, x, e, **options)


def test_difference_target_propagation_by_hand():
    # x = 1, weights 2 and 3, relu: h = 2, o = 6. e = 4, eta 1/2: t_2 = 4. V = 1/4, c = 1, phi = relu:
    # G(4) - G(6) = 2 - 2.5: t_1 = 1.5. d_1 = 4, d_0 = (2 - 1.5) / eta = 1.
    net = nets.dense_net([[[2.0]], [[3.0]]], [None, None], ["relu"])
    x, e = np.ones((1, 1)), np.array([[4.0]])
    options = {"step_size": 0.5, "biases": [None, np.ones(1)], "activations": [None, "relu"]}
    got, targets = targets_of(net, [None, [[0.25]]], x, e, **options)
    np.testing.assert_allclose([targets[1].item(), targets[2].item()], [1.5, 4])
    np.testing.assert_allclose([g.item() for g in got.kernels], [1, 8])
    np.testing.assert_allclose(got.inputs, [[2]])
    # Without the difference t_1 = G(4) = 2 = h: nothing to learn. By the true weight t_1 = 2 - 0.5 * 12 = -4.
    got, targets = targets_of(net, [None, [[0.25]]], x, e, difference=False, **options)
    np.testing.assert_allclose([targets[1].item(), got.kernels[0].item()], [2, 0])
    got, targets = targets_of(net, [None, [[0.25]]], x, e, top="penultimate", **options)
    np.testing.assert_allclose([targets[1].item(), got.kernels[0].item(), got.kernels[1].item()], [-4, 12, 8])
    # Two equal examples of a mean are one.
    twice, _ = targets_of(net, [None, [[0.25]]], np.ones((2, 1)), np.full((2, 1), 2.0), **options)
    np.testing.assert_allclose([g.item() for g in twice.kernels], [1, 8])


def test_exact_inverses_give_gauss_newton_targets():
    """Linear layers: from t_k the outputs are t_L; invertible ones: t_k - h_k = -eta J^-1 e."""
    for sizes in ((4, 4, 4, 4), (6, 5, 4, 3)):
        net, x, e = linear_chain(sizes)
        feedback = [None, *(np.linalg.pinv(layer.kernel).T for layer in net[1:])]
        got, targets = targets_of(net, feedback, x, e, step_size=0.3, reduction="sum")
        trace = nets.forward(net, x)
        above = np.eye(sizes[-1])
        for k in reversed(range(1, len(net))):
            above = net[k].kernel @ above
            reached = nets.forward(net[k:], targets[k]).outputs
            np.testing.assert_allclose(reached, trace.outputs - 0.3 * e)
            if len(set(sizes)) == 1:
                newton = -0.3 * e @ np.linalg.inv(above)
                np.testing.assert_allclose(targets[k] - trace.reads[k], newton, atol=1e-10)
        np.testing.assert_allclose(got.kernels[-1], trace.reads[-1].T @ e)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_transposes_as_inverses(reduction):
    """V = W: backpropagation in linear nets, skipped backpropagation in others, whatever eta is."""
    for activation, true in (("identity", backprop.gradients), ("tanh", skipped_backprop.gradients)):
        net, x, e = dense_case(activation)
        weights = [None, *(layer.kernel for layer in net[1:])]
        got, _ = targets_of(net, weights, x, e, step_size=0.7, reduction=reduction)
        assert_same(got, true(net, x, e))
    net, x, e = conv_case()
    net = [layer._replace(activation="identity") for layer in net]
    weights = [None, *(layer.kernel for layer in net[1:])]
    for top in ("outputs", "penultimate"):
        got, _ = targets_of(net, weights, x, e, step_size=0.7, reduction=reduction, top=top)
        assert_same(got, backprop.gradients(net, x, e))


def test_phi_makes_targets_of_its_range():
    """Small eta: G's derivative at h_{k+1} brings the error down."""
    net, x, e = dense_case()
    feedback = [None, *(RNG(k).normal(size=layer.kernel.shape) for k, layer in enumerate(net[1:]))]
    biases = [None, RNG(8).normal(size=5), RNG(9).normal(size=3)]
    options = {"step_size": 1e-6, "biases": biases, "activations": [None, "tanh", "tanh"]}
    got, _ = targets_of(net, feedback, x, e, **options)
    trace = nets.forward(net, x)
    s2 = (e @ feedback[2].T) * nets.slope("tanh", trace.outputs @ feedback[2].T + biases[2])
    s1 = (s2 @ feedback[1].T) * nets.slope("tanh", trace.reads[2] @ feedback[1].T + biases[1])
    wanted = direct_feedback_alignment.from_signals(net, trace, x, e, [s1, s2])
    np.testing.assert_allclose(all_entries(got), all_entries(wanted), atol=1e-4)


@pytest.mark.parametrize("kind", ["reconstruction", "difference", "jacobian"])
@pytest.mark.parametrize("case", [dense_case, conv_case])
def test_inverses_descend_their_losses(case, kind):
    net, x, _ = case()
    trace = nets.forward(net, x)
    feedback = [None, *(RNG(k).normal(size=layer.kernel.shape) for k, layer in enumerate(net[1:]))]
    biases = [None, *(RNG(k).normal(size=r.shape[-1]) for k, r in enumerate(trace.reads[1:]))]
    states = [*trace.reads, trace.outputs]
    noise = [None, *(RNG(20 + k).normal(size=states[k].shape) for k in range(1, len(net)))]
    top_noise = [None, *(RNG(30 + k).normal(size=states[k + 1].shape) for k in range(1, len(net)))]
    options = {"top_noise": top_noise, "biases": biases, "activations": [None, *["tanh"] * (len(net) - 1)]}
    options["variance"] = 0.5

    def found():
        return difference_target_propagation.feedback_gradients(net, feedback, x, noise, kind, **options)

    _, kernels, shifts = found()
    for k in range(1, len(net)):
        np.testing.assert_allclose(kernels[k], numeric(lambda k=k: found()[0][k], feedback[k]), atol=1e-6, rtol=1e-6)
        np.testing.assert_allclose(shifts[k], numeric(lambda k=k: found()[0][k], biases[k]), atol=1e-6, rtol=1e-6)


def test_what_inverses_learn():
    """Over an orthonormal set of noises linear layers rest where V inverts ("difference"), transposes ("jacobian")."""
    net, _, _ = linear_chain((4, 4, 4))
    x = np.broadcast_to(RNG(1).normal(size=4), (4, 4))
    noise, top_noise = [None, 2 * orthogonal(4, 2)], [None, 2 * orthogonal(4, 3)]
    places = {"difference": np.linalg.inv(net[1].kernel).T, "jacobian": net[1].kernel}
    for kind, place in places.items():
        for at, rests in [(place, True), (place + 0.1, False)]:
            _, kernels, _ = difference_target_propagation.feedback_gradients(
                net, [None, at], x, noise, kind, top_noise=top_noise
            )
            assert (np.abs(kernels[1]).max() < 1e-12) == rests
    # Reconstruction with exact inverses has no loss at all, whatever the noise.
    value, kernels, _ = difference_target_propagation.feedback_gradients(net, [None, places["difference"]], x, noise)
    np.testing.assert_allclose(value[1], 0, atol=1e-20)
    # A tanh layer: to first order in the noise the rest is at the transposed Jacobian, which a linear G has at one h.
    curved = [net[0], net[1]._replace(activation="tanh"), nets.dense(np.eye(4))]
    z = nets.forward(curved, x).pre[1][0]
    jacobian = net[1].kernel * nets.slope("tanh", z)
    small_noise = [None, 1e-3 * orthogonal(4, 2), np.zeros((4, 4))]
    small_top = [None, 1e-3 * orthogonal(4, 3), np.zeros((4, 4))]
    for at, rests in [(jacobian, True), (net[1].kernel, False)]:
        _, kernels, _ = difference_target_propagation.feedback_gradients(
            curved, [None, at, np.eye(4)], x, small_noise, "jacobian", top_noise=small_top, variance=1e-6 / 4
        )
        assert (np.abs(kernels[1]).max() < 1e-2) == rests
