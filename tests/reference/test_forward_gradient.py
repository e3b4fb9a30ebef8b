"""The reference of forward gradients against backpropagation, over all directions."""

import numpy as np
import pytest

from . import backprop, direct_feedback_alignment, forward_gradient, losses, nets
from .cases import RNG, all_entries, assert_same, conv_case, dense_case, orthogonal


def random_direction(net, seed):
    rng = RNG(seed)
    kernels = [rng.normal(size=layer.kernel.shape) for layer in net]
    return kernels, [None if layer.bias is None else rng.normal(size=layer.bias.shape) for layer in net]


def unpacked(vector, shapes):
    """A flat vector as a list of arrays."""
    sizes = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(vector, sizes), shapes, strict=True)]


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
