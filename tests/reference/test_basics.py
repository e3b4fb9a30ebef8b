"""The references against finite differences and numbers by hand: what all rules share, and backpropagation."""

import numpy as np
import pytest

from . import (
    backman,
    backprop,
    difference_target_propagation,
    direct_feedback_alignment,
    equilibrium_propagation,
    feedback_alignment,
    losses,
    nets,
    pepita,
    predictive_coding,
)
from .cases import RNG, TOP, E, X, assert_same, dense_case, direct_shapes, hand_net, numeric, random_conv, random_dense

CONVS = [("VALID", (1, 1), None), ("VALID", (1, 1), "max"), ("SAME", (2, 1), "average"), ("SAME", (2, 2), "max")]


def check_backprop(net, x, targets):
    def value():
        return losses.mean(*losses.softmax_cross_entropy(nets.forward(net, x).outputs, targets))[0]

    e = losses.mean(*losses.softmax_cross_entropy(nets.forward(net, x).outputs, targets))[1]
    got = backprop.gradients(net, x, e)
    for layer, kernel, bias in zip(net, got.kernels, got.biases, strict=True):
        np.testing.assert_allclose(kernel, numeric(value, layer.kernel), atol=1e-6, rtol=1e-6)
        if layer.bias is not None:
            np.testing.assert_allclose(bias, numeric(value, layer.bias), atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(got.inputs, numeric(value, x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("activation", nets.ACTIVATIONS)
def test_slopes(activation):
    z = np.concatenate([np.linspace(-8, 8, 50), RNG(0).normal(size=50)])
    numerical = (nets.activate(activation, z + 1e-6) - nets.activate(activation, z - 1e-6)) / 2e-6
    np.testing.assert_allclose(nets.slope(activation, z), numerical, atol=1e-7)


@pytest.mark.parametrize("activation", nets.ACTIVATIONS)
def test_backprop_dense(activation):
    net = random_dense(activation)
    check_backprop(net, RNG(1).normal(size=(3, 4)), losses.one_hot([0, 1, 1], 2))


@pytest.mark.parametrize(("padding", "stride", "pool"), CONVS)
def test_backprop_conv(padding, stride, pool):
    net = random_conv(padding, stride, pool)
    check_backprop(net, RNG(1).normal(size=(2, 6, 7, 2)), losses.one_hot([0, 1], 2))


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
@pytest.mark.parametrize("padding", ["VALID", "SAME"])
def test_transposes(padding, stride):
    """<d, op(W, r)> = <op(W, .)^T d, r> = <dW, W>."""
    rng = RNG(0)
    layer = nets.conv(rng.normal(size=(3, 2, 2, 3)), padding=padding, stride=stride)
    r = rng.normal(size=(2, 6, 5, 2))
    z = nets.multiply(layer, layer.kernel, r)
    d = rng.normal(size=z.shape)
    product = (d * z).sum()
    np.testing.assert_allclose((nets.transpose(layer, layer.kernel, d, r.shape) * r).sum(), product)
    np.testing.assert_allclose((nets.kernel_gradient(layer, r, d) * layer.kernel).sum(), product)


def test_same_padding_by_hand():
    """Kernel (1, 3), stride 2 over four columns: one column of zeros in all, behind. 1 2 3 | 3 4 0."""
    layer = nets.conv(np.array([1.0, 10.0, 100.0]).reshape(1, 3, 1, 1), stride=(1, 2), padding="SAME")
    z = nets.multiply(layer, layer.kernel, np.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 4, 1))
    np.testing.assert_array_equal(z.ravel(), [321, 43])


@pytest.mark.parametrize(
    "loss", [losses.softmax_cross_entropy, losses.sigmoid_cross_entropy, losses.half_squared_error]
)
def test_output_errors(loss):
    outputs, targets = RNG(0).normal(size=(3, 4)), losses.one_hot([0, 2, 3], 4)
    weights = np.array([2.0, 0.0, 1.0])
    for reduce in (losses.mean, lambda v, e: losses.weighted_mean(v, e, weights)):
        e = reduce(*loss(outputs, targets))[1]
        numerical = numeric(lambda reduce=reduce: reduce(*loss(outputs, targets))[0], outputs)
        np.testing.assert_allclose(e, numerical, atol=1e-8)


def test_forward_by_hand():
    outputs = nets.forward(hand_net(), X).outputs
    np.testing.assert_array_equal(outputs, [[3, 2]])
    np.testing.assert_array_equal(losses.half_squared_error(outputs, [[1, 3]])[1], E)


def test_backprop_by_hand():
    got = backprop.gradients(hand_net(), X, E)
    # s = e W1^T = (2, -1, 1), the dead one out: d0 = (2, -1, 0).
    np.testing.assert_array_equal(got.kernels[0], [[2, -1, 0], [4, -2, 0]])
    np.testing.assert_array_equal(got.kernels[1], TOP)
    np.testing.assert_array_equal(got.biases[0], [2, -1, 0])
    np.testing.assert_array_equal(got.inputs, [[2, 1]])
    last = backprop.last_layer_only(hand_net(), X, E)
    np.testing.assert_array_equal(last.kernels[1], TOP)
    assert not last.kernels[0].any() and not last.biases[0].any() and not last.inputs.any()


def test_feedback_alignment_by_hand():
    feedback = [None, np.array([[1.0, 2], [-1, 1], [3, 0]])]
    got = feedback_alignment.gradients(hand_net(), feedback, X, E, adaptive=True)
    # s = e B^T = (2 - 2, -2 - 1, 6), d0 = (0, -3, 0).
    np.testing.assert_array_equal(got.kernels[0], [[0, -3, 0], [0, -6, 0]])
    np.testing.assert_array_equal(got.kernels[1], TOP)
    np.testing.assert_array_equal(got.biases[0], [0, -3, 0])
    np.testing.assert_array_equal(got.biases[1], [2, -1])
    np.testing.assert_array_equal(got.inputs, [[0, -3]])
    np.testing.assert_array_equal(got.feedback[1], TOP)


def test_direct_by_hand():
    feedback = [None, np.array([[1.0, 2, 3], [0, 1, -1]])]
    got = direct_feedback_alignment.gradients(hand_net(), feedback, X, E, adaptive=True)
    # s = e B = (2, 4 - 1, 6 + 1), d0 = (2, 3, 0).
    np.testing.assert_array_equal(got.kernels[0], [[2, 3, 0], [4, 6, 0]])
    np.testing.assert_array_equal(got.kernels[1], TOP)
    np.testing.assert_array_equal(got.biases[0], [2, 3, 0])
    np.testing.assert_array_equal(got.inputs, [[2, 5]])
    np.testing.assert_array_equal(got.feedback[1], [[6, 2, 0], [-3, -1, 0]])


def test_backman_by_hand():
    got = backman.gradients(hand_net(), X, E)
    # Top: norms 2 sqrt(10), sqrt(10); g1 = e c = (1, -1) / sqrt(10).
    np.testing.assert_allclose(got.kernels[1], np.array([[3, -3], [1, -1], [0, 0]]) / np.sqrt(10))
    np.testing.assert_allclose(got.biases[1], [2, -1])
    # d0 = g1 W1^T with the dead one out = (1, -1, 0) / sqrt(10); raw norms (1, 1, 0) / sqrt(2), the last replaced.
    np.testing.assert_allclose(got.kernels[0], np.array([[1, -1, 0], [2, -2, 0]]) / np.sqrt(5))
    np.testing.assert_allclose(got.biases[0], np.array([1, -1, 0]) / np.sqrt(10))
    np.testing.assert_allclose(got.inputs, [[1 / np.sqrt(5), 0]], atol=1e-15)
    # c of the three: 1 / norm, the dead one's being 1 / mean norm = 3 / sqrt(2).
    d0 = np.array([[1.0, -1, 0]]) / np.sqrt(10)
    np.testing.assert_allclose(backman.coefficients(X.T @ d0, d0), [np.sqrt(2), np.sqrt(2), 3 / np.sqrt(2)])
    # Frobenius norms: e sqrt(5), g1 1 / sqrt(5), so alpha = 5 on top.
    dynamic = backman.gradients(hand_net(), X, E, alpha="gradient_norm")
    np.testing.assert_allclose(dynamic.kernels[1], 5 * np.array([[3, -3], [1, -1], [0, 0]]) / np.sqrt(10))


def test_convolution_by_hand():
    """A 2x2 filter over 3x3 gives (2 5; 0 2), whose maximum 5 is doubled."""
    x = np.array([[1.0, 2, 0], [0, 1, 3], [2, 0, 1]]).reshape(1, 3, 3, 1)
    kernel = np.array([[1.0, 0], [0, 1]]).reshape(2, 2, 1, 1)
    patch = np.array([[2.0, 0], [1, 3]])  # where the maximum comes from
    e = np.array([[1.0]])
    net = [nets.conv(kernel, pool="max"), nets.dense([[2.0]])]
    trace = nets.forward(net, x)
    np.testing.assert_array_equal(trace.pre[0].ravel(), [2, 5, 0, 2])
    np.testing.assert_array_equal(trace.outputs, [[10]])

    true = backprop.gradients(net, x, e)
    np.testing.assert_array_equal(true.kernels[0][..., 0, 0], 2 * patch)
    np.testing.assert_array_equal(true.inputs[0, :, :, 0], [[0, 2, 0], [0, 0, 2], [0, 0, 0]])

    aligned = feedback_alignment.gradients(net, [None, np.array([[3.0]])], x, e)
    np.testing.assert_array_equal(aligned.kernels[0][..., 0, 0], 3 * patch)
    skipped = direct_feedback_alignment.gradients(net, [None, np.array([[-1.0]])], x, e)
    np.testing.assert_array_equal(skipped.kernels[0][..., 0, 0], -patch)

    # Raw 5, c = 1/5 on top; what goes down, 2/5, does not matter to the filter's unit norm: patch / sqrt(14).
    normed = backman.gradients(net, x, e)
    np.testing.assert_allclose(normed.kernels[1], [[1.0]])
    np.testing.assert_allclose(normed.kernels[0][..., 0, 0], patch / np.sqrt(14))
    np.testing.assert_allclose(normed.inputs[0, 0, 1, 0], 1 / np.sqrt(14))

    averaged = backprop.gradients([net[0]._replace(pool="average"), net[1]], x, e)
    # 2/4 to each of the four places: half the sum of the four patches.
    np.testing.assert_array_equal(averaged.kernels[0][..., 0, 0], [[(1 + 2 + 0 + 1) / 2, 3], [1.5, 2.5]])


# --- relations between the rules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("padding", "stride", "pool"), CONVS)
def test_rules_on_convolutions(padding, stride, pool):
    net, x = random_conv(padding, stride, pool), RNG(1).normal(size=(2, 6, 7, 2))
    e = RNG(2).normal(size=(2, 2))
    true = backprop.gradients(net, x, e)

    weights = [None, *(layer.kernel for layer in net[1:])]
    assert_same(feedback_alignment.gradients(net, weights, x, e), true)

    feedback = direct_shapes(net, x)
    got = direct_feedback_alignment.gradients(net, feedback, x, e)
    np.testing.assert_array_equal(got.kernels[-1], true.kernels[-1])
    # A layer's own part is a network of its own: an objective linear in what is read above it, with e . B as slope.
    part = backprop.gradients(net[:2], x, np.tensordot(e, feedback[2], axes=1))
    np.testing.assert_allclose(got.kernels[1], part.kernels[1], atol=1e-12)

    normed = backman.gradients(net, x, e, alpha=0.3)
    for kernel in normed.kernels:
        np.testing.assert_allclose((kernel**2).sum(axis=tuple(range(kernel.ndim - 1))), 0.3**2)
    np.testing.assert_allclose(normed.biases[-1], true.biases[-1])


def test_backman_dead_layer():
    net = random_dense("relu")
    net[0].bias[:] = -1e3
    got = backman.gradients(net, RNG(1).normal(size=(3, 4)), RNG(2).normal(size=(3, 2)), alpha="gradient_norm")
    assert not got.kernels[0].any() and all(np.isfinite(kernel).all() for kernel in got.kernels)


def test_outputs_must_be_linear():
    """The rules with a state for the outputs refuse an activation there; hidden ones are free."""
    net, x, e = dense_case()
    weights = [None, *(layer.kernel for layer in net[1:])]
    calls = [
        lambda net: predictive_coding.gradients(net, x, lambda o: e, steps=1, step_size=0.1),
        lambda net: difference_target_propagation.gradients(net, weights, x, e, step_size=0.1),
        lambda net: equilibrium_propagation.gradients(net, x, lambda o: e, beta=0.1, free_steps=1, nudged_steps=1),
        lambda net: pepita.gradients(net, RNG(0).normal(size=(2, 4)), x, lambda o: e),
    ]
    for call in calls:
        call(net)
        with pytest.raises(ValueError, match="linear"):
            call([*net[:-1], net[-1]._replace(activation="tanh")])
    for options in ({"order": "sideways"}, {"predictions": "none"}):
        with pytest.raises(ValueError, match="unknown"):
            predictive_coding.gradients(net, x, lambda o: e, steps=1, step_size=0.1, **options)
    with pytest.raises(ValueError, match="unknown"):
        equilibrium_propagation.gradients(net, x, lambda o: e, beta=0.1, free_steps=1, nudged_steps=1, dynamics="fast")
