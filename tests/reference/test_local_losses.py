"""The reference of local losses against numbers by hand and finite differences."""

import numpy as np
import pytest

from tests.sampling import mostly_slow

from . import backprop, local_losses, losses, nets
from .cases import CASES, RNG, TOP, E, X, dense_case, hand_net, numeric


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
