"""The reference of equilibrium propagation against numbers by hand and its energy."""

import numpy as np
import pytest

from tests.sampling import mostly_slow, pairs

from . import backprop, equilibrium_propagation, losses, nets
from .cases import CASES, RNG, all_entries, conv_case, dense_case, numeric, small


def test_equilibrium_propagation_by_hand():
    # Linear, weights 1/2, x = 1: s_1 = 1/2 + s_2 / 2, s_2 = s_1 / 2: at rest 2/3, 1/3. Nudged by 1/2 towards y = 1, one
    # step: s_2 = 1/3 + 1/3, s_1 as before: dPhi/dw = (2/3, 4/9) against (2/3, 2/9).
    net = nets.dense_net([[[0.5]], [[0.5]]], [None, None], ["identity"])
    x, options = np.ones((1, 1)), {"beta": 0.5, "free_steps": 200}
    got, phases = equilibrium_propagation.gradients(net, x, lambda o: o - 1, nudged_steps=1, **options)
    np.testing.assert_allclose([s.item() for s in phases.free], [1, 2 / 3, 1 / 3])
    np.testing.assert_allclose([s.item() for s in phases.nudged], [1, 2 / 3, 2 / 3])
    np.testing.assert_allclose([g.item() for g in got.kernels], [0, -4 / 9], atol=1e-12)
    # A second step, s_1 = 1/2 + 1/3: dPhi/dw_1 = 5/6; s_2 = 1/3 - (2/3 - 1) / 2 = 1/2.
    got, phases = equilibrium_propagation.gradients(net, x, lambda o: o - 1, nudged_steps=2, **options)
    np.testing.assert_allclose([g.item() for g in got.kernels], [-1 / 3, -2 * (5 / 12 - 2 / 9)])
    # Two steps from zeros, all at once: (1/2, 0), (1/2, 1/4); upward (1/2, 1/4), (5/8, 5/16).
    for order, wanted in [("parallel", [0.5, 0.25]), ("upward", [0.625, 0.3125])]:
        _, phases = equilibrium_propagation.gradients(
            net, x, lambda o: o - 1, beta=1.0, free_steps=2, nudged_steps=0, order=order
        )
        np.testing.assert_allclose([s.item() for s in phases.free[1:]], wanted)
    # A readout is no state: s_1 = 1/2, o = 1/4, e = -3/4; nudged s_1 = 1/2 + 1/2 * 1/2 * 3/4 = 11/16 at once.
    got, phases = equilibrium_propagation.gradients(
        net, x, lambda o: o - 1, nudged_steps=1, output="readout", **options
    )
    np.testing.assert_allclose(phases.nudged[1], [[11 / 16]])
    np.testing.assert_allclose([g.item() for g in got.kernels], [-3 / 8, (11 / 32 - 1) * 11 / 16])
    # Euler with f the identity is a damped discrete step; clipping.
    _, phases = equilibrium_propagation.gradients(
        net, x, lambda o: o - 1, beta=1.0, free_steps=1, nudged_steps=0, dynamics="euler", step_size=0.5, clip=(0, 0.2)
    )
    np.testing.assert_allclose([s.item() for s in phases.free[1:]], [0.2, 0])


def settled(net, x, targets, loss=losses.softmax_cross_entropy, **options):
    def error_at(outputs):
        return losses.mean(*loss(outputs, targets))[1]

    options = {"free_steps": 100, "nudged_steps": 100, "beta": 0.1} | options
    return equilibrium_propagation.gradients(net, x, error_at, **options)


DYNAMICS = pairs(["state", "readout"], ["discrete", "euler"])


@pytest.mark.parametrize(
    ("case", "output", "dynamics"),
    mostly_slow(
        [(case, *options) for case in CASES for options in DYNAMICS],
        [("dense", "state", "euler"), ("dense", "readout", "discrete"), ("conv", "state", "discrete")],
    ),
)
def test_equilibrium_propagation_is_the_gradient_at_the_free_equilibrium(case, output, dynamics):
    """Theorem 1 of Scellier and Bengio: as beta -> 0, with an error of beta, centred of beta^2."""
    case = CASES[case]
    net, x, _ = case()
    net, x = small(net, 0.2 if case is dense_case else 0.07), 0.5 * x
    targets = losses.one_hot(np.arange(len(x)) % 2, 2)
    options = {"dynamics": dynamics, "output": output, "step_size": 1.0 if dynamics == "discrete" else 0.7}
    if case is conv_case:
        options |= {"free_steps": 40, "nudged_steps": 40}

    def value():
        phases = settled(net, x, targets, **options | {"nudged_steps": 0})
        return losses.softmax_cross_entropy(phases[1].outputs, targets)[0].mean()

    got, phases = settled(net, x, targets, beta=1e-3, centred=True, **options)
    assert phases.moved < 1e-11
    for k, layer in enumerate(net):
        if layer.kernel.size < 30:  # the others take long
            np.testing.assert_allclose(got.kernels[k], numeric(value, layer.kernel), atol=1e-6)
        if layer.bias is not None:
            np.testing.assert_allclose(got.biases[k], numeric(value, layer.bias), atol=1e-6)
    # Of the other kernels one direction each.
    for k, layer in enumerate(net):
        direction, kernel = RNG(k).normal(size=layer.kernel.shape), layer.kernel.copy()
        values = []
        for step in (1e-6, -1e-6):
            layer.kernel[...] = kernel + step * direction
            values.append(value())
        layer.kernel[...] = kernel
        np.testing.assert_allclose((got.kernels[k] * direction).sum(), (values[0] - values[1]) / 2e-6, atol=1e-5)
    if case is dense_case:
        np.testing.assert_allclose(got.inputs, numeric(value, x), atol=1e-6)
    true = all_entries(settled(net, x, targets, beta=1e-4, centred=True, **options)[0])
    assert np.abs(true - all_entries(backprop.gradients(net, x, np.zeros((len(x), 2))))).max() > 1e-3
    for centred, power in [(False, 1), (True, 2)]:
        far, near = (
            np.abs(all_entries(settled(net, x, targets, beta=b, centred=centred, **options)[0]) - true).max()
            for b in (0.1, 0.01)
        )
        assert abs(np.log10(far / near) - power) < 0.3


@pytest.mark.parametrize("dynamics", ["discrete", "euler"])
def test_equilibria_are_where_the_energy_is_stationary(dynamics):
    """dF/ds = 0 at the nudged equilibrium, by finite differences of F as it is written; orders share it."""
    net, x, _ = dense_case()
    net, targets, beta = small(net, 0.3), losses.one_hot([0, 1, 1], 2), 0.4
    options = {"dynamics": dynamics, "beta": beta, "step_size": 0.5, "nudged_steps": 300}
    phases = settled(net, x, targets, **options)[1]
    s = [state.copy() for state in phases.nudged]

    def primitive(v):
        return sum((v[k + 1] * (v[k] @ layer.kernel + layer.bias)).sum() for k, layer in enumerate(net))

    def energy():
        cost = beta * losses.softmax_cross_entropy(s[-1], targets)[0].sum()
        quadratic = 0.5 * (s[-1] ** 2).sum()
        if dynamics == "euler":
            quadratic += sum(0.5 * (v**2).sum() for v in s[1:-1])
            return quadratic - primitive([s[0], *map(np.tanh, s[1:-1]), s[-1]]) + cost
        # G with G' = arctanh
        quadratic += sum((v * np.arctanh(v) + 0.5 * np.log(1 - v**2)).sum() for v in s[1:-1])
        return quadratic - primitive(s) + cost

    for k in range(1, len(s)):
        np.testing.assert_allclose(numeric(energy, s[k]), 0, atol=1e-7)
    for order in ("upward", "downward"):
        other = settled(net, x, targets, order=order, **options)[1]
        for a, b in zip(other.nudged, phases.nudged, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10)
