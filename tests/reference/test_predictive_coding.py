"""The reference of predictive coding against numbers by hand and its energy."""

import numpy as np
import pytest

from . import backprop, losses, nets, predictive_coding
from .cases import all_entries, assert_same, conv_case, dense_case, numeric, small


def predictive(net, x, e, **options):
    return predictive_coding.gradients(net, x, lambda outputs: e, **options)[0]


def settle(net, x, targets, loss=losses.half_squared_error, **options):
    return predictive_coding.gradients(
        net, x, lambda o: loss(o, targets)[1], reduction="sum", loss_at=lambda o: loss(o, targets)[0], **options
    )


def test_predictive_coding_by_hand():
    # Chain of weights 2, 3 at x = 1, y = 4: mu_1 = 2, o = 6, eps_2 = y - o = -2; gamma 1/10: v_1 = 2 - 0.1 * 6 = 1.4,
    # eps_1 = -0.6, o = 4.2, eps_2 = -0.2. Gradients 0.6 * 1 and 0.2 * 1.4, inputs 0.6 * 2.
    net = nets.dense_net([[[2.0]], [[3.0]]], [None, None], ["identity"])
    for states in ("signals", "pre_activations"):
        got, settled = settle(net, np.array([[1.0]]), np.array([[4.0]]), steps=1, step_size=0.1, states=states)
        np.testing.assert_allclose([g.item() for g in got.kernels], [0.6, 0.28])
        np.testing.assert_allclose(got.inputs.item(), 1.2)
        np.testing.assert_allclose(settled.energies, [2, 0.2])


@pytest.mark.parametrize("states", ["signals", "pre_activations"])
@pytest.mark.parametrize("case", [dense_case, conv_case])
def test_fixed_predictions_are_backpropagation(case, states):
    """After L - 1 steps of size 1, one step downward, or many small ones (Millidge et al. 2020)."""
    net, x, e = case()
    true = backprop.gradients(net, x, e)
    for options in (
        {"steps": len(net) - 1, "step_size": 1.0},
        {"steps": 1, "step_size": 1.0, "order": "downward"},
        {"steps": 400, "step_size": 0.1},
        {"steps": len(net) - 1, "step_size": 1.0, "reduction": "sum"},
    ):
        assert_same(predictive(net, x, e, predictions="fixed", states=states, **options), true, 1e-10)
    early = predictive(net, x, e, predictions="fixed", states=states, steps=len(net) - 2, step_size=1.0)
    assert not early.kernels[0].any() and np.abs(early.kernels[1] - true.kernels[1]).max() < 1e-10


@pytest.mark.parametrize("states", ["signals", "pre_activations"])
@pytest.mark.parametrize("case", [dense_case, conv_case])
def test_predictive_coding_descends_its_energy(case, states):
    """The gradients are those of the energy with the states held, and a step is one of steepest descent."""
    net, x, _ = case()
    net, targets = small(net), losses.one_hot(np.arange(len(x)) % 2, 2)
    options = {"loss": losses.softmax_cross_entropy, "states": states}
    got, settled = settle(net, x, targets, steps=5, step_size=0.1, **options)

    def energy():
        return settle(net, x, targets, steps=0, step_size=0.0, start=settled.values, **options)[1].energies[0]

    np.testing.assert_allclose(energy(), settled.energies[-1])
    assert (np.diff(settled.energies) < 0).all()
    for layer, kernel, bias in zip(net, got.kernels, got.biases, strict=True):
        np.testing.assert_allclose(kernel, numeric(energy, layer.kernel), atol=1e-6, rtol=1e-6)
        if layer.bias is not None:
            np.testing.assert_allclose(bias, numeric(energy, layer.bias), atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(got.inputs, numeric(energy, x), atol=1e-6, rtol=1e-6)
    stepped = settle(net, x, targets, steps=1, step_size=0.1, start=settled.values, **options)[1].values
    for k in range(1, len(net)):
        moved = (settled.values[k] - stepped[k]) / 0.1
        np.testing.assert_allclose(moved, numeric(energy, settled.values[k]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("states", ["signals", "pre_activations"])
def test_orders_of_predictive_coding_share_their_fixed_point(states):
    net, x, _ = dense_case()
    targets, net = losses.one_hot([0, 1, 1], 2), small(net)
    results = [
        all_entries(settle(net, x, targets, steps=800, step_size=0.3, order=order, states=states)[0])
        for order in ("parallel", "downward", "upward")
    ]
    np.testing.assert_allclose(results[1], results[0], atol=1e-10)
    np.testing.assert_allclose(results[2], results[0], atol=1e-10)


def test_linear_energy_at_equilibrium():
    """Linear nets: F* = 1/2 r S^-1 r^T with r = y - o, S = I + sum_k M_k^T M_k, M_k the product of the kernels above
    state k; its total gradient is predictive coding's at equilibrium (Innocenti et al. 2024, theorem 1)."""
    net, x, _ = dense_case("identity")
    net, targets = small(net), losses.one_hot([0, 1, 1], 2)
    got, settled = settle(net, x, targets, steps=3000, step_size=0.2)

    def equilibrium():
        above, s = np.eye(2), np.eye(2)
        for layer in reversed(net[1:]):
            above = layer.kernel @ above
            s = s + above.T @ above
        r = targets - nets.forward(net, x).outputs
        return 0.5 * np.trace(r @ np.linalg.inv(s) @ r.T)

    np.testing.assert_allclose(equilibrium(), settled.energies[-1])
    for layer, kernel in zip(net, got.kernels, strict=True):
        np.testing.assert_allclose(kernel, numeric(equilibrium, layer.kernel), atol=1e-7)


def test_little_error_is_backpropagation():
    """Whittington and Bogacz 2017: targets near the outputs give backpropagation's gradients."""
    net, x, e = dense_case()
    net, relative = small(net), []
    for size in (1e-1, 1e-3):
        got, settled = settle(net, x, nets.forward(net, x).outputs - size * e, steps=600, step_size=0.3)
        # The states take up a part of the error: compare with the backpropagation of what is left of it at the top.
        true = all_entries(backprop.gradients(net, x, -settled.errors[-1]))
        relative.append(np.abs(all_entries(got) - true).max() / np.abs(true).max())
    assert relative[1] < 0.02 * relative[0] and relative[0] > 1e-3


def test_mupc():
    """Scales are those of scaled kernels; skips by hand."""
    np.testing.assert_allclose(predictive_coding.mupc_scales(4, 5, 3), [0.5, 1 / np.sqrt(15), 0.2])
    np.testing.assert_allclose(predictive_coding.mupc_scales(4, 5, 3, skips=False), [0.5, 1 / np.sqrt(5), 0.2])
    net, x, e = dense_case()
    scales = [0.5, 0.3, 0.2]
    scaled = [layer._replace(kernel=a * layer.kernel) for a, layer in zip(scales, net, strict=True)]
    options = {"steps": 4, "step_size": 0.1}
    got, wanted = predictive(net, x, e, scales=scales, **options), predictive(scaled, x, e, **options)
    for a, kernel, expected in zip(scales, got.kernels, wanted.kernels, strict=True):
        np.testing.assert_allclose(kernel, a * expected)
    np.testing.assert_allclose(got.inputs, wanted.inputs)
    # Weights 1, 2, 1 at x = 1 with a skip around the second: mu = 1, 2 + 1, 3; e = 1 brings 1 and 1 * (2 + 1) down.
    net = nets.dense_net([[[1.0]], [[2.0]], [[1.0]]], [None] * 3, ["identity"] * 2)
    got = predictive(
        net, np.ones((1, 1)), np.ones((1, 1)), predictions="fixed", steps=2, step_size=1.0, skips=[False, True, False]
    )
    np.testing.assert_allclose([g.item() for g in got.kernels], [3, 1, 3])
