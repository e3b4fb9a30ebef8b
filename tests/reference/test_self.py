"""The references against finite differences and against numbers worked out by hand."""

import numpy as np
import pytest

from tests.sampling import mostly_slow, pairs

from . import (
    backman,
    backprop,
    difference_target_propagation,
    direct_feedback_alignment,
    direct_kolen_pollack,
    dual_propagation,
    equilibrium_propagation,
    feedback_alignment,
    forward_forward,
    forward_gradient,
    kolen_pollack,
    local_losses,
    losses,
    low_rank_feedback,
    modifiers,
    monotone_dfa,
    nets,
    node_perturbation,
    partition,
    pepita,
    predictive_coding,
    quantise,
    random_target_projection,
    sign_symmetry,
    skipped_backprop,
    weight_mirror,
)

RNG = np.random.default_rng


def random_dense(activation, sizes=(4, 5, 3, 2), seed=0):
    rng = RNG(seed)
    kernels = [rng.normal(size=shape) for shape in zip(sizes[:-1], sizes[1:], strict=True)]
    biases = [rng.normal(size=size) for size in sizes[1:]]
    return nets.dense_net(kernels, biases, [activation] * (len(sizes) - 2))


def random_conv(padding, stride, pool, seed=0, activation="tanh"):
    """6x7x2 -> conv 3x2 (3 filters) -> pool -> conv 2x2 (2) -> dense 4 -> dense 2."""
    rng = RNG(seed)
    first = nets.conv(
        rng.normal(size=(3, 2, 2, 3)), rng.normal(size=3), activation, stride=stride, padding=padding, pool=pool
    )
    second = nets.conv(rng.normal(size=(2, 2, 3, 2)), None, activation, padding="SAME")
    features = nets.forward([first, second], np.zeros((1, 6, 7, 2))).outputs.size
    third = nets.dense(rng.normal(size=(features, 4)), rng.normal(size=4), activation)
    return [first, second, third, nets.dense(rng.normal(size=(4, 2)), rng.normal(size=2))]


CONVS = [("VALID", (1, 1), None), ("VALID", (1, 1), "max"), ("SAME", (2, 1), "average"), ("SAME", (2, 2), "max")]


def direct_shapes(net, x):
    """Random direct feedback for `net`."""
    trace = nets.forward(net, x)
    outputs = trace.outputs[0].size
    return [None, *(RNG(7).normal(size=(outputs, *r.shape[1:])) for r in trace.reads[1:])]


def numeric(value, array, step=1e-6):
    """Central finite differences of value() with respect to `array`, which is changed in place."""
    gradient = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        before = array[index]
        array[index] = before + step
        up = value()
        array[index] = before - step
        gradient[index] = (up - value()) / (2 * step)
        array[index] = before
    return gradient


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


# --- one example by hand ----------------------------------------------------------------------------------------------
#
# x = (1, 2); W0 x + b0 = (3, 1, -1), relu: (3, 1, 0); outputs (3, 1 + 1) = (3, 2); targets (1, 3): e = (2, -1).
# The third hidden neuron is dead.

X = np.array([[1.0, 2.0]])
E = np.array([[2.0, -1.0]])
TOP = np.array([[6.0, -3.0], [2.0, -1.0], [0.0, 0.0]])  # (3, 1, 0)^T e


def hand_net():
    kernels = [np.array([[1.0, 0, -1], [1, 1, 0]]), np.array([[1.0, 0], [0, 1], [1, 1]])]
    return nets.dense_net(kernels, [np.array([0.0, -1, 0]), np.array([0.0, 1])], ["relu"])


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


def assert_same(got, expected, atol=1e-12):
    for a, b in zip([*got.kernels, *got.biases], [*expected.kernels, *expected.biases], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_allclose(a, b, atol=atol)
    np.testing.assert_allclose(got.inputs, expected.inputs, atol=atol)


# --- the random backpropagation family --------------------------------------------------------------------------------


def dense_case(activation="tanh", sizes=(4, 5, 3, 2), batch=3):
    net = random_dense(activation, sizes)
    return net, RNG(1).normal(size=(batch, sizes[0])), RNG(2).normal(size=(batch, sizes[-1]))


def conv_case():
    return random_conv("VALID", (1, 1), "max"), RNG(1).normal(size=(2, 6, 7, 2)), RNG(2).normal(size=(2, 2))


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


# --- dual propagation -------------------------------------------------------------------------------------------------


def dual(net, x, e, **options):
    return dual_propagation.gradients(net, x, e, **options)[0]


def all_entries(gradients):
    return np.concatenate(
        [g.ravel() for g in [*gradients.kernels, *gradients.biases, gradients.inputs] if g is not None]
    )


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


# --- node perturbation ------------------------------------------------------------------------------------------------


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


# --- predictive coding ------------------------------------------------------------------------------------------------


def small(net, scale=0.5):
    return [layer._replace(kernel=scale * layer.kernel) for layer in net]


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


# --- direct Kolen-Pollack, low rank -----------------------------------------------------------------------------------


def linear_chain(sizes, seed=0, scale=1.0):
    """A linear net without biases, its inputs and targets."""
    rng = RNG(seed)
    kernels = [scale * rng.normal(size=shape) / np.sqrt(shape[0]) for shape in zip(sizes[:-1], sizes[1:], strict=True)]
    net = nets.dense_net(kernels, [None] * len(kernels), ["identity"] * (len(kernels) - 1))
    return net, rng.normal(size=(20, sizes[0])), rng.normal(size=(20, sizes[-1]))


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


# --- forward gradients ------------------------------------------------------------------------------------------------


def random_direction(net, seed):
    rng = RNG(seed)
    kernels = [rng.normal(size=layer.kernel.shape) for layer in net]
    return kernels, [None if layer.bias is None else rng.normal(size=layer.bias.shape) for layer in net]


def unpacked(vector, shapes):
    """A flat vector as a list of arrays."""
    sizes = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(vector, sizes), shapes, strict=True)]


def orthogonal(size, seed=0):
    return np.linalg.qr(RNG(seed).normal(size=(size, size)))[0]


@pytest.mark.parametrize("case", [dense_case, conv_case])
def test_tangents(case):
    """The derivative in a direction is backpropagation's gradient times the direction."""
    net, x, e = case()
    true, (kernels, biases) = backprop.gradients(net, x, e), random_direction(net, 3)
    product = sum((g * v).sum() for g, v in zip(true.kernels, kernels, strict=True))
    product += sum((g * v).sum() for g, v in zip(true.biases, biases, strict=True) if g is not None)
    np.testing.assert_allclose((e * forward_gradient.output_tangent(net, x, kernels, biases)).sum(), product)
    trace = nets.forward(net, x)
    for place, shapes in (("pre", trace.pre), ("signals", trace.reads)):
        noise = [RNG(k).normal(size=z.shape) for k, z in enumerate(shapes)]
        near, far = (forward_gradient.noisy_outputs(net, x, s, **{place: noise}) for s in (1e-6, -1e-6))
        moved = forward_gradient.output_tangent(net, x, **{place: noise})
        np.testing.assert_allclose(moved, (near - far) / 2e-6, atol=1e-6, rtol=1e-6)
    average = [layer if layer.pool is None else layer._replace(pool="average") for layer in net]
    moved = forward_gradient.output_tangent(average, x, kernels, biases)
    true = backprop.gradients(average, x, e)
    product = sum((g * v).sum() for g, v in zip(true.kernels, kernels, strict=True))
    product += sum((g * v).sum() for g, v in zip(true.biases, biases, strict=True) if g is not None)
    np.testing.assert_allclose((e * moved).sum(), product)


@pytest.mark.parametrize("case", [dense_case, conv_case])
def test_forward_gradient_over_all_directions(case):
    """Unbiased (theorem 1): the mean over directions sqrt(N) q with q an orthonormal basis is the gradient."""
    net, x, e = case()
    true = backprop.gradients(net, x, e)
    shapes = [layer.kernel.shape for layer in net] + [(0,) if g is None else g.shape for g in true.biases]
    size = sum(int(np.prod(shape)) for shape in shapes)
    directions = []
    for row in np.sqrt(size) * orthogonal(size):
        parts = unpacked(row, shapes)
        directions.append((parts[: len(net)], [b if b.size else None for b in parts[len(net) :]]))
    got = forward_gradient.weight_gradients(net, x, directions, e)
    assert not got.inputs.any()
    assert_same(got, true._replace(inputs=got.inputs), 1e-10)


@pytest.mark.parametrize("at", ["pre_activations", "signals"])
@pytest.mark.parametrize("case", [dense_case, conv_case])
def test_activation_perturbation_over_all_directions(case, at):
    net, x, e = case()
    true, trace, batch = backprop.gradients(net, x, e), nets.forward(net, x), len(x)
    places = trace.pre if at == "pre_activations" else trace.reads[1:]
    for last in (True, False) if at == "pre_activations" else (True,):
        shapes = [p.shape[1:] for p in (places if last else places[:-1])]
        size = sum(int(np.prod(shape)) for shape in shapes)
        rotations = [np.sqrt(size) * orthogonal(size, i) for i in range(batch)]  # each example has its own directions
        directions = []
        for i in range(size):
            each = [unpacked(rotation[i], shapes) for rotation in rotations]
            noise = [np.stack(parts) for parts in zip(*each, strict=True)]
            directions.append([None, *noise] if at == "signals" else noise if last else [*noise, None])
        assert_same(forward_gradient.activation_gradients(net, x, directions, e, at=at), true, 1e-10)


def test_signs_as_directions():
    """SPSA: over all signs the mean is the gradient, the mean square N times its square (N parameters)."""
    net = nets.dense_net([[[0.5, -1.0]], [[2.0], [1.0]]], [None, None], ["tanh"])
    x, e = np.array([[0.7]]), np.array([[1.3]])
    true = all_entries(backprop.gradients(net, x, e)._replace(inputs=None))
    signs = [np.array([1.0 if i >> b & 1 else -1.0 for b in range(4)]) for i in range(16)]
    directions = [(unpacked(v, [(1, 2), (2, 1)]), [None, None]) for v in signs]
    each = [all_entries(forward_gradient.weight_gradients(net, x, [d], e)._replace(inputs=None)) for d in directions]
    np.testing.assert_allclose(np.mean(each, axis=0), true)
    np.testing.assert_allclose(np.mean([(g**2).sum() for g in each]), 4 * (true**2).sum())
    all_at_once = forward_gradient.weight_gradients(net, x, directions, e)._replace(inputs=None)
    np.testing.assert_allclose(all_entries(all_at_once), true)
    for g, v in zip(each, signs, strict=True):  # Spall's division by the direction
        np.testing.assert_allclose(g, (true @ v) / v)


def test_forward_gradients_by_hand():
    # Chain of weights 2, 3 at x = 1, e = 1: dJ/dw = (3, 2). v = (1, -1): D = 1, g = (1, -1).
    net = nets.dense_net([[[2.0]], [[3.0]]], [None, None], ["identity"])
    x, one = np.ones((1, 1)), np.ones((1, 1))
    v = ([one, -one], [None, None])
    got = forward_gradient.weight_gradients(net, x, [v], one)
    np.testing.assert_allclose([g.item() for g in got.kernels], [1, -1])
    # J = o^2 / 2 with weights (3, 2) and (1, 4), one step each way: o = 6 and 4, D = (18 - 8) / 2 = 5.
    got = forward_gradient.weight_gradients(
        net, x, [v], method="central", std=1.0, objective_at=lambda o: 0.5 * (o**2).sum()
    )
    np.testing.assert_allclose([g.item() for g in got.kernels], [5, -5])
    # Activations: u = (2, 5): o' = 3 * 2 + 5 = 11; d = (22, 55); gradients 22 * 1 and 55 * 2, inputs 2 * 22.
    got = forward_gradient.activation_gradients(net, x, [[2 * one, 5 * one]], one)
    np.testing.assert_allclose([g.item() for g in got.kernels], [22, 110])
    np.testing.assert_allclose(got.inputs, [[44]])
    # Without u at the top: o' = 6, d = (12, e).
    got = forward_gradient.activation_gradients(net, x, [[2 * one, None]], one)
    np.testing.assert_allclose([g.item() for g in got.kernels], [12, 2])
    # At the signal: u = 2: o' = 6, D u = 12 arrives.
    got = forward_gradient.activation_gradients(net, x, [[None, 2 * one]], one, at="signals")
    np.testing.assert_allclose([g.item() for g in got.kernels], [12, 2])
    # Central, J = o^2 / 2 (e = 6): o = 6 +- 6 s, D = (12^2 - 0) / 4 = 36 at s = 1.
    got = forward_gradient.activation_gradients(
        net, x, [[2 * one, None]], 6 * one, method="central", std=1.0, objectives_at=lambda o: 0.5 * (o**2).sum(axis=1)
    )
    np.testing.assert_allclose([g.item() for g in got.kernels], [72, 12])


@pytest.mark.parametrize("case", [dense_case, conv_case])
def test_central_differences_are_forward_gradients(case):
    """To second order in std."""
    net, x, _ = case()
    targets = losses.one_hot(np.arange(len(x)) % 2, 2)
    loss = losses.softmax_cross_entropy
    e = losses.mean(*loss(nets.forward(net, x).outputs, targets))[1]

    def parts(outputs):
        return loss(outputs, targets)[0] / len(x)

    weights = [random_direction(net, seed) for seed in (3, 4)]
    trace = nets.forward(net, x)
    noises = [[RNG(10 * s + k).normal(size=z.shape) for k, z in enumerate(trace.pre)] for s in (1, 2)]
    exact = (
        forward_gradient.weight_gradients(net, x, weights, e),
        forward_gradient.activation_gradients(net, x, noises, e),
    )
    distances = []
    for std in (1e-2, 1e-3):
        options = {"method": "central", "std": std}
        found = (
            forward_gradient.weight_gradients(net, x, weights, objective_at=lambda o: parts(o).sum(), **options),
            forward_gradient.activation_gradients(net, x, noises, e, objectives_at=parts, **options),
        )
        distances.append([np.abs(all_entries(a) - all_entries(b)).max() for a, b in zip(found, exact, strict=True)])
    for far, near in zip(*distances, strict=True):
        assert 30 < far / near < 300


def test_local_forward_gradients():
    """Over all directions: each layer gets the gradient of what its own signal is the slope of."""
    net, x, e = conv_case()
    signals = [None, *(RNG(k).normal(size=r.shape) for k, r in enumerate(nets.forward(net, x).reads[1:]))]
    shapes = [z.shape[1:] for z in nets.forward(net, x).pre[:-1]]
    count = max(int(np.prod(shape)) for shape in shapes)
    bases = [orthogonal(int(np.prod(shape))) for shape in shapes]
    directions = []
    for i in range(count):  # a direction beyond a layer's own basis is zero there
        noise = []
        for shape, basis in zip(shapes, bases, strict=True):
            row = basis[i] * np.sqrt(count) if i < len(basis) else np.zeros(len(basis))
            noise.append(np.broadcast_to(row.reshape(shape), (len(x), *shape)))
        directions.append([*noise, None])
    got = forward_gradient.local_gradients(net, x, directions, signals, e)
    trace = nets.forward(net, x)
    wanted = direct_feedback_alignment.from_signals(net, trace, x, e, signals[1:])
    assert_same(got, wanted, 1e-10)


# --- local losses -----------------------------------------------------------------------------------------------------


def test_similarity_by_hand():
    # Rows less their means: (-1, 1), (1, -1), (2, -2): similarities -1, -1, 1. One-hot targets a, a, b: 1, -1, -1.
    h = np.array([[0.0, 2], [3, 1], [4, 0]])
    targets = np.array([[1.0, 0], [1, 0], [0, 1]])
    np.testing.assert_allclose(local_losses.similarity_matrix(h), [[1, -1, -1], [-1, 1, 1], [-1, 1, 1]])
    np.testing.assert_allclose(local_losses.similarity_matrix(targets), [[1, 1, -1], [1, 1, -1], [-1, -1, 1]])
    # Wrong by 2 at (0, 1), (1, 2) and their mirrors: 4 * 4 / 9 (the mean), 16 as printed.
    np.testing.assert_allclose(local_losses.similarity(h, targets)[0], 16 / 9)
    np.testing.assert_allclose(local_losses.similarity(h, targets, pair_scale=1.0)[0], 16)
    # With two features S is +-1 and has no slope; a row of equal features is similar to none, and gets nothing.
    np.testing.assert_allclose(local_losses.similarity(h, targets)[1], 0, atol=1e-15)
    flat = np.array([[1.0, 1, 1], [3, 1, 0], [0, 0, 1]])
    assert not local_losses.similarity_matrix(flat)[0].any()
    slope = local_losses.similarity(flat, targets)[1]
    assert np.isfinite(slope).all() and not slope[0].any() and slope[1].any()
    # A centred row of three classes: (2, -1, -1) / 3 each, so -1/2 between classes.
    three = local_losses.similarity_matrix(np.eye(3))
    np.testing.assert_allclose(three, np.where(np.eye(3) > 0, 1, -0.5))


def test_spread_by_hand():
    """A channel's positions 1, 1, 3, 3 have standard deviation 1; those of a constant channel 0."""
    h = np.stack([np.array([[1.0, 1], [3, 3]]), np.ones((2, 2))], axis=-1)[None]
    np.testing.assert_allclose(local_losses.features(h), [[1, 0]])
    np.testing.assert_allclose(local_losses.features(h, spread=False), h.reshape(1, -1))


CASES = {"dense": dense_case, "conv": conv_case}


def local_parts(net, x, outputs=2):
    """Classifiers, biases and projections of every hidden signal."""
    reads = nets.forward(net, x).reads
    classifiers = [None, *(RNG(k).normal(size=(outputs, *r.shape[1:])) for k, r in enumerate(reads[1:], 1))]
    biases = [None, *(RNG(20 + k).normal(size=outputs) for k in range(1, len(reads)))]
    shapes = [(r.shape[1], 5) if r.ndim == 2 else (3, 3, r.shape[3], 5) for r in reads[1:]]
    projections = [None, *(RNG(40 + k).normal(size=shape) for k, shape in enumerate(shapes))]
    return {"classifiers": classifiers, "biases": biases, "projections": projections}


@pytest.mark.parametrize(
    ("case", "kind", "projected"),
    mostly_slow(
        [(c, k, p) for c in CASES for k in ("prediction", "similarity", "both") for p in (True, False)],
        [*(("dense", k, p) for k in ("prediction", "similarity", "both") for p in (True, False)),
         ("conv", "both", True), ("conv", "similarity", False)],
    ),
)  # fmt: skip
def test_local_losses_are_gradients(case, kind, projected):
    """Each layer gets the gradient of the loss right above it, each local weight that of its own."""
    net, x, e = CASES[case]()
    targets = losses.one_hot(np.arange(len(x)) % 2, 2)
    parts = local_parts(net, x)
    if not projected:
        parts.pop("projections")
    options = {"beta": 0.7, **parts}
    got, local = local_losses.gradients(net, x, e, targets, kind, **options)
    np.testing.assert_array_equal(got.kernels[-1], backprop.gradients(net, x, e).kernels[-1])
    for k in range(1, len(net)):

        def value(k=k):
            return local_losses.gradients(net, x, e, targets, kind, **options)[1][k].loss

        np.testing.assert_allclose(got.kernels[k - 1], numeric(value, net[k - 1].kernel), atol=1e-6, rtol=1e-5)
        if net[k - 1].bias is not None:
            np.testing.assert_allclose(got.biases[k - 1], numeric(value, net[k - 1].bias), atol=1e-6, rtol=1e-5)
        if kind != "similarity":
            np.testing.assert_allclose(local[k].classifier, numeric(value, parts["classifiers"][k]), atol=1e-7)
            np.testing.assert_allclose(local[k].bias, numeric(value, parts["biases"][k]), atol=1e-7)
        if kind != "prediction" and projected:
            np.testing.assert_allclose(local[k].projection, numeric(value, parts["projections"][k]), atol=1e-7)
        else:
            assert local[k].projection is None

    def first():
        return local_losses.gradients(net, x, e, targets, kind, **options)[1][1].loss

    np.testing.assert_allclose(got.inputs, numeric(first, x), atol=1e-6, rtol=1e-5)


def test_local_prediction_by_hand():
    # One hidden signal r = (3, 1, 0), classifier rows (1, 0, 0), (0, 1, 2), half squared error to (1, 3): e = (2, -2).
    classifier = np.array([[1.0, 0, 0], [0, 1, 2]])
    options = {"classifiers": [None, classifier], "loss": losses.half_squared_error}
    got, local = local_losses.gradients(hand_net(), X, E, np.array([[1.0, 3]]), "prediction", **options)
    assert local[1].loss == 4
    np.testing.assert_array_equal(local[1].signal, [[2, -2, -4]])
    np.testing.assert_array_equal(got.kernels[0], [[2, -2, 0], [4, -4, 0]])
    np.testing.assert_array_equal(got.kernels[1], TOP)
    np.testing.assert_array_equal(local[1].classifier, [[6, 2, 0], [-6, -2, 0]])
    # A classifier that is the top layer itself: backpropagation.
    net, x, _ = dense_case()
    targets = losses.one_hot([0, 1, 1], 2)
    e = losses.mean(*losses.softmax_cross_entropy(nets.forward(net, x).outputs, targets))[1]
    top = {"classifiers": [None, np.zeros((2, 5)), net[2].kernel.T], "biases": [None, None, net[2].bias]}
    got, local = local_losses.gradients(net, x, e, targets, "prediction", **top)
    true = backprop.gradients(net, x, e)
    np.testing.assert_allclose(got.kernels[1], true.kernels[1])
    np.testing.assert_allclose(local[2].classifier, true.kernels[2].T)
    assert not got.kernels[0].any()


# --- difference target propagation ------------------------------------------------------------------------------------


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


# --- weight mirrors ---------------------------------------------------------------------------------------------------


def whole_noise(net, x, std):
    """Noise whose mean over its examples of xi xi^T is std^2 I exactly: a basis, for each layer."""
    reads = nets.forward(net, x[:1]).reads
    sizes = [r.size for r in reads[1:]]
    bases = [std * np.sqrt(size) * orthogonal(size, k) for k, size in enumerate(sizes)]
    return [None, *(basis.reshape(-1, *r.shape[1:]) for basis, r in zip(bases, reads[1:], strict=True))]


def test_weight_mirror_by_hand():
    # W = (1 0; 0 1; 1 1), noise (1, 2, 0) and (0, 0, 2): responses (1, 2), (2, 2). Products, averaged:
    # ((1, 2), (2, 4), (0, 0)) / 2 and ((0, 0), (0, 0), (4, 4)) / 2.
    noise = [None, np.array([[1.0, 2, 0], [0, 0, 2]])]
    b = np.full((3, 2), 0.5)
    products = np.array([[0.5, 1], [1, 2], [2, 2]])
    got = weight_mirror.mirror_gradients(hand_net(), [None, b], noise, decay=0.1)
    np.testing.assert_allclose(got[1], 0.05 - products)
    np.testing.assert_allclose(weight_mirror.mirror_gradients(hand_net(), [None, b], noise)[1], b - products)
    # op(B, xi) = (1.5, 1.5), (1, 1): residuals (0.5, -0.5), (-1, -1).
    got = weight_mirror.mirror_gradients(hand_net(), [None, b], noise, kind="estimation")
    np.testing.assert_allclose(got[1], np.array([[0.5, -0.5], [1, -1], [-2, -2]]) / 2)
    # Through relu with biases (-2, 1): responses (0, 3), (0, 3).
    net = hand_net()
    net[1] = net[1]._replace(activation="relu", bias=np.array([-2.0, 1]))
    got = weight_mirror.mirror_gradients(net, [None, 0 * b], noise, response="activation")
    np.testing.assert_allclose(got[1], -np.array([[0, 1.5], [0, 3], [0, 3]]))
    net[1] = net[1]._replace(bias=None)
    got = weight_mirror.mirror_gradients(net, [None, 0 * b], noise, response="activation")
    np.testing.assert_allclose(got[1], -products)


@pytest.mark.parametrize("case", [dense_case, conv_case])
def test_weight_mirror_expectation(case):
    """std^2 W, in every padding; the rest is at std^2 W / decay, estimation's at W."""
    net, x, e = case()
    noise = whole_noise(net, x, 0.7)
    zero = [None, *(0 * layer.kernel for layer in net[1:])]
    start = [None, *(RNG(k).normal(size=layer.kernel.shape) for k, layer in enumerate(net[1:]))]
    got = weight_mirror.mirror_gradients(net, zero, noise)
    for layer, g in zip(net[1:], got[1:], strict=True):
        np.testing.assert_allclose(-g, 0.49 * layer.kernel, atol=1e-12)
    feedback = start
    for _ in range(3):
        feedback = weight_mirror.step(net, feedback, noise, rate=0.1, decay=2.0)
    for layer, b, old in zip(net[1:], feedback[1:], start[1:], strict=True):
        rest = 0.49 * layer.kernel / 2
        np.testing.assert_allclose(b - rest, 0.8**3 * (old - rest), atol=1e-12)
    weights = [None, *(layer.kernel for layer in net[1:])]
    for g in weight_mirror.mirror_gradients(net, weights, noise, kind="estimation")[1:]:
        np.testing.assert_allclose(g, 0, atol=1e-12)
    for layer, g, b in zip(
        net[1:], weight_mirror.mirror_gradients(net, start, noise, kind="estimation")[1:], start[1:], strict=True
    ):
        np.testing.assert_allclose(g, 0.49 * (b - layer.kernel), atol=1e-12)
    assert_same(weight_mirror.gradients(net, weights, x, e), backprop.gradients(net, x, e))


def test_positions_of_a_mirror():
    """One row of three, kernel of three, SAME: the middle tap lies inside three times, the others twice."""
    layer = nets.conv(np.array([1.0, 2, 3]).reshape(1, 3, 1, 1), padding="SAME")
    noise = np.sqrt(3) * np.eye(3).reshape(3, 1, 3, 1)
    y = nets.multiply(layer, layer.kernel, noise)
    np.testing.assert_allclose(weight_mirror.correlation(layer, noise, y).ravel(), [1, 2, 3])
    np.testing.assert_allclose(weight_mirror.correlation(layer, noise, y, "all").ravel(), [2 / 3, 2, 2])


def test_estimation_descends_its_loss():
    net, x, _ = conv_case()
    noise = [None, *(RNG(k).normal(size=r.shape) for k, r in enumerate(nets.forward(net, x).reads[1:]))]
    feedback = [None, *(RNG(k).normal(size=layer.kernel.shape) for k, layer in enumerate(net[1:]))]
    got = weight_mirror.mirror_gradients(net, feedback, noise, kind="estimation", positions="all")
    for k, layer in enumerate(net[1:], 1):

        def value(k=k, layer=layer):
            residual = nets.multiply(layer, feedback[k] - layer.kernel, noise[k])
            positions = residual[0].size / residual.shape[-1]
            return 0.5 * (residual**2).sum() / len(x) / positions

        np.testing.assert_allclose(got[k], numeric(value, feedback[k]), atol=1e-6)


def test_normal_noise_through_an_activation():
    """sigma^2 E f' W, roughly, over many draws."""
    net = random_dense("tanh", (3, 4, 3, 2))
    noise = [None, 0.3 * RNG(1).normal(size=(200000, 4)), np.zeros((1, 3))]
    zero = [None, *(0 * layer.kernel for layer in net[1:])]
    got = weight_mirror.mirror_gradients(net, zero, noise, response="activation")
    slopes = nets.slope("tanh", noise[1] @ net[1].kernel + net[1].bias).mean(axis=0)
    assert np.abs(-got[1] - 0.09 * slopes * net[1].kernel).max() < 2e-3


# --- equilibrium propagation ------------------------------------------------------------------------------------------


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


# --- PEPITA -----------------------------------------------------------------------------------------------------------


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


# --- forward-forward --------------------------------------------------------------------------------------------------


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
