"""Nets, data and checks that the tests of the references share."""

import numpy as np

from . import nets

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


X = np.array([[1.0, 2.0]])

E = np.array([[2.0, -1.0]])

TOP = np.array([[6.0, -3.0], [2.0, -1.0], [0.0, 0.0]])  # (3, 1, 0)^T e


def hand_net():
    kernels = [np.array([[1.0, 0, -1], [1, 1, 0]]), np.array([[1.0, 0], [0, 1], [1, 1]])]
    return nets.dense_net(kernels, [np.array([0.0, -1, 0]), np.array([0.0, 1])], ["relu"])


def assert_same(got, expected, atol=1e-12):
    for a, b in zip([*got.kernels, *got.biases], [*expected.kernels, *expected.biases], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_allclose(a, b, atol=atol)
    np.testing.assert_allclose(got.inputs, expected.inputs, atol=atol)


def dense_case(activation="tanh", sizes=(4, 5, 3, 2), batch=3):
    net = random_dense(activation, sizes)
    return net, RNG(1).normal(size=(batch, sizes[0])), RNG(2).normal(size=(batch, sizes[-1]))


def conv_case():
    return random_conv("VALID", (1, 1), "max"), RNG(1).normal(size=(2, 6, 7, 2)), RNG(2).normal(size=(2, 2))


def all_entries(gradients):
    return np.concatenate(
        [g.ravel() for g in [*gradients.kernels, *gradients.biases, gradients.inputs] if g is not None]
    )


def small(net, scale=0.5):
    return [layer._replace(kernel=scale * layer.kernel) for layer in net]


def linear_chain(sizes, seed=0, scale=1.0):
    """A linear net without biases, its inputs and targets."""
    rng = RNG(seed)
    kernels = [scale * rng.normal(size=shape) / np.sqrt(shape[0]) for shape in zip(sizes[:-1], sizes[1:], strict=True)]
    net = nets.dense_net(kernels, [None] * len(kernels), ["identity"] * (len(kernels) - 1))
    return net, rng.normal(size=(20, sizes[0])), rng.normal(size=(20, sizes[-1]))


def orthogonal(size, seed=0):
    return np.linalg.qr(RNG(seed).normal(size=(size, size)))[0]


CASES = {"dense": dense_case, "conv": conv_case}
