"""The random backpropagation family by hand: its feedback, its modifiers, and partitions."""

import numpy as np
import pytest

from . import (
    backman,
    backprop,
    direct_feedback_alignment,
    feedback_alignment,
    kolen_pollack,
    modifiers,
    monotone_dfa,
    nets,
    partition,
    quantise,
    random_target_projection,
    sign_symmetry,
    skipped_backprop,
)
from .cases import RNG, TOP, E, X, assert_same, conv_case, dense_case, direct_shapes, hand_net


def test_skipped_backprop():
    net, x, e = dense_case()
    wanted = direct_feedback_alignment.gradients(net, skipped_backprop.feedback(net), x, e)
    assert_same(skipped_backprop.gradients(net, x, e), wanted)
    net, x, e = dense_case("identity")
    assert_same(skipped_backprop.gradients(net, x, e), backprop.gradients(net, x, e))
    net, x, e = conv_case()
    linear = [layer._replace(activation="identity") for layer in net]
    assert_same(skipped_backprop.gradients(linear, x, e), backprop.gradients(linear, x, e))
    got, true = skipped_backprop.gradients(net, x, e), backprop.gradients(net, x, e)
    np.testing.assert_array_equal(got.kernels[3], true.kernels[3])
    np.testing.assert_allclose(got.kernels[2], true.kernels[2])
    assert np.abs(got.kernels[1] - true.kernels[1]).max() > 1e-3


def test_skipped_backprop_by_hand():
    """Chain 1 -> 1 -> 1 -> 1 of weights 2, 3, 5, slopes 1/2 and 1/4 in place of f': 1/2 * 3 * 5 at the bottom."""
    net = nets.dense_net([[[2.0]], [[3.0]], [[5.0]]], [None] * 3, ["identity", "identity"])
    slopes = {2.0: 0.5, 6.0: 0.25}
    got = skipped_backprop.gradients(
        net, [[1.0]], [[1.0]], derivative=lambda name, z: np.vectorize(lambda v: slopes.get(v, 1.0))(z)
    )
    np.testing.assert_array_equal([kernel.item() for kernel in got.kernels], [7.5, 2 * 5 / 4, 6])
    assert got.inputs.item() == 15


def test_sign_symmetry():
    net, x, e = conv_case()
    signs = [None, *(np.sign(layer.kernel) for layer in net[1:])]
    assert_same(sign_symmetry.gradients(net, None, x, e), feedback_alignment.gradients(net, signs, x, e))
    magnitudes = [None, *(layer.kernel for layer in net[1:])]
    assert_same(sign_symmetry.gradients(net, magnitudes, x, e), backprop.gradients(net, x, e))


def test_kolen_pollack_converges():
    net, x, e = dense_case()
    feedback = [None, *(RNG(5).normal(size=layer.kernel.shape) for layer in net[1:])]
    before = [layer.kernel - b for layer, b in zip(net[1:], feedback[1:], strict=True)]
    for _ in range(3):
        net, feedback = kolen_pollack.step(net, feedback, x, e, rate=0.1, decay=0.5)
    for old, layer, b in zip(before, net[1:], feedback[1:], strict=True):
        np.testing.assert_allclose(layer.kernel - b, 0.95**3 * old)


def test_random_target_projection_by_hand():
    """Targets (0, 1) bring down the second row of B, (0, 1, -1), through relu."""
    feedback = [None, np.array([[1.0, 2, 3], [0, 1, -1]])]
    got = random_target_projection.gradients(hand_net(), feedback, X, E, [[0, 1]])
    np.testing.assert_array_equal(got.kernels[0], [[0, 1, 0], [0, 2, 0]])
    np.testing.assert_array_equal(got.kernels[1], TOP)
    turned = random_target_projection.gradients(hand_net(), feedback, X, E, [[0, 1]], sign=-1, scale=2)
    np.testing.assert_array_equal(turned.kernels[0], -2 * got.kernels[0])


def test_quantise_by_hand():
    # bits = 3: exponents -2, -1, 0 on a scale of 1/8, so 1/32, 1/16, 1/8. 2^-1/2 = 0.7071 separates 1/2 from 1.
    x = np.array([0, 1, -1, 0.125, 0.125 * 0.70710, 0.125 * 0.70711, -0.04, 1e-9, 0.125 * 0.25 * 1.4143])
    expected = [0, 0.125, -0.125, 0.125, 0.0625, 0.125, -0.03125, 1 / 32, 0.0625]
    np.testing.assert_array_equal(quantise.quantise(x, 3, 2**-3), expected)
    np.testing.assert_array_equal(quantise.quantise(x, 1, 2**-3), 0.125 * np.sign(x))
    many = RNG(0).normal(size=1000) * 10 ** RNG(1).uniform(-4, 1, size=1000)
    for bits, scale in [(2, 2**-3), (5, 2**-6), (8, 0.3)]:
        exponent = np.round(np.clip(np.log2(np.abs(many / scale)), 1 - bits, 0))
        np.testing.assert_allclose(quantise.quantise(many, bits, scale), scale * np.sign(many) * 2**exponent)


def test_quantised_error_by_hand():
    # s = e W1^T = (2, -1, 1) of one example, cut to +-1/8; as one of two equal examples of a mean, e is halved.
    got = backprop.gradients(hand_net(), X, E, modify=quantise.error(3, batch=1))
    np.testing.assert_array_equal(got.kernels[0], [[0.125, -0.125, 0], [0.25, -0.25, 0]])
    np.testing.assert_array_equal(got.kernels[1], TOP)
    twice = backprop.gradients(hand_net(), np.repeat(X, 2, 0), np.repeat(E, 2, 0) / 2, modify=quantise.error(3, 2))
    assert_same(twice._replace(inputs=got.inputs), got)
    np.testing.assert_array_equal(quantise.output_error(E, 3), [[0.125, -0.125]])


def test_quantised_update_by_hand():
    # Bottom gradients ((2, -1, 0), (4, -2, 0)) are all beyond the scale: +-1/64, the dead one's zeros stay.
    got = quantise.update(lambda net, x, e, i: backprop.gradients(net, x, e), hand_net(), X, E, bits=4)
    np.testing.assert_array_equal(got.kernels[0], np.array([[1, -1, 0], [1, -1, 0]]) / 64)
    np.testing.assert_array_equal(got.biases[1], np.array([1, -1]) / 64)
    # Many bits and a large scale: nothing but rounding to powers of two, example by example.
    net, x, e = conv_case()
    fine = quantise.update(lambda net, x, e, i: backprop.gradients(net, x, e), net, x, e, bits=60, scale=2.0**10)
    parts = [backprop.gradients(net, x[i : i + 1], e[i : i + 1] * 2).kernels[0] for i in range(2)]
    nearest = [np.sign(p) * 2 ** np.round(np.log2(np.abs(p))) for p in parts]
    np.testing.assert_allclose(fine.kernels[0], sum(nearest) / 2)


def test_signs_magnitudes_drops_by_hand():
    def bottom(modify, **options):
        return backprop.gradients(hand_net(), X, E, modify=modify, **options).biases[0]

    np.testing.assert_array_equal(bottom(modifiers.sign(1)), [1, -1, 0])
    np.testing.assert_array_equal(bottom(modifiers.magnitude(1)), [2, 1, 0])
    np.testing.assert_array_equal(bottom(modifiers.drop([None, np.array([[0, 1, 1]])], 0.5)), [0, -2, 0])
    np.testing.assert_array_equal(bottom(nets.unmodified, derivative=nets.no_slope), [2, -1, 1])
    np.testing.assert_array_equal(bottom(modifiers.in_turn(modifiers.magnitude(1), modifiers.sign(1))), [1, 1, 0])
    # A mean over two: the sign is of the per-example gradient, then halved.
    half = backprop.gradients(hand_net(), np.repeat(X, 2, 0), np.repeat(E, 2, 0) / 2, modify=modifiers.sign(2))
    np.testing.assert_array_equal(half.biases[0], [1, -1, 0])


def test_sparse():
    uniform = RNG(0).uniform(size=(50, 400))
    matrix = modifiers.sparse(uniform, n=10, receiving=400)
    assert set(np.unique(matrix)) == {0, 1} and abs(matrix.sum(axis=1).mean() - 10) < 1
    np.testing.assert_array_equal(modifiers.sparse(uniform, 400, 400), np.ones((50, 400)))
    np.testing.assert_allclose(modifiers.sparse(uniform, 10, 400, rescaled=True).max(), 1 / np.sqrt(10))


def test_monotone_signs_agree():
    """Lechner 2020, theorem 2: example by example, with one output."""
    net, x, _ = dense_case("tanh", (4, 5, 3, 1), batch=1)
    net = monotone_dfa.lift([layer._replace(kernel=layer.kernel * 0.5) for layer in net])
    assert monotone_dfa.is_mono_net(net) and (net[0].kernel < 0).any()
    feedback = [None, *(np.abs(b) for b in direct_shapes(net, x)[1:])]
    e = np.array([[-1.3]])
    got, true = monotone_dfa.gradients(net, feedback, x, e), backprop.gradients(net, x, e)
    for a, b in zip([*got.kernels, *got.biases], [*true.kernels, *true.biases], strict=True):
        assert (a * b >= 0).all()
    with pytest.raises(ValueError, match="negative"):
        monotone_dfa.gradients(net, [None, *(-b for b in feedback[1:])], x, e)


def test_partition():
    net, x, e = conv_case()
    assert_same(partition.gradients(net, [("backprop",)] * 4, x, e), backprop.gradients(net, x, e))
    assert_same(partition.gradients(net, [("backman", 0.5)] * 4, x, e), backman.gradients(net, x, e, alpha=0.5))
    feedback = direct_shapes(net, x)
    rules = [("backprop",), *(("direct", b) for b in feedback[1:])]
    assert_same(partition.gradients(net, rules, x, e), direct_feedback_alignment.gradients(net, feedback, x, e))
    weights = [RNG(3).normal(size=layer.kernel.shape) for layer in net]
    rules = [("feedback_alignment", b) for b in weights]
    assert_same(partition.gradients(net, rules, x, e), feedback_alignment.gradients(net, weights, x, e))
