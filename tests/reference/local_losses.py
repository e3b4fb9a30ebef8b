"""Local losses: each hidden signal has a loss of its own, and no error comes from above (Nokland and Eidnes 2019).

Section 2. With h_k what layer k reads (k >= 1), n examples, targets Y [n, classes] (one-hot labels):

    prediction   L_pred = mean_i loss(C_k h_k + c_k, y_i)                   Eq. 3: a linear classifier, cross-entropy
    similarity   L_sim  = |S(P_k h_k) - S(Y)|_F^2                           Eq. 1, S the adjusted cosine similarity
                 S_ij   = x_i . x_j / (|x_i| |x_j|),  each x_i less the mean of its own features       Eq. 2
    both         L      = (1 - beta) L_pred + beta L_sim,  beta = 0.99      Eq. 4, "predsim"

    s_k     = dL_k/dh_k                                  all that arrives at r_k; nothing else flows in
    d_{k-1} = unpool(s_k) * f'(z_{k-1}),   dW, db as in direct feedback alignment
    last layer: e, the true gradient of the objective

The classifiers C_k [outputs, *shape of h_k], biases c_k and projections P_k learn by the true gradients of their own
losses. P_k is a dense layer without bias for features, and a 3x3 convolution (SAME, without bias) for maps.

Maps: S sees the standard deviation of each channel over its positions, not the map; `spread=False`
flattens instead. With or without Bessel's correction it is the same S, which does not see a common factor.

Choices:

- The Frobenius norm is a sum over pairs; the authors' program takes the mean over the n^2 entries. `pair_scale`
  multiplies the sum: 1 / n^2 if None, 1 for Eq. 1 as printed.
- Authors' program: 1e-8 is added to |x_i|. Here nothing is added, and a row of norm zero has similarity 0 to all and
  gets no gradient; likewise a channel of standard deviation zero.
- Hidden signals are what the next layer reads: after pooling and flattening. In the authors' networks pooling follows
  the local loss, and the classifier of a map reads an average-pooled one; here it reads the whole.
- Not additive: S joins the examples of a batch.
- Similarity without projections (`projections=None`): S of the signals themselves.
- Everything is of a batch mean. For an objective that is a sum of losses multiply the signals, and the gradients of
  the local weights, by n.
"""

from typing import NamedTuple

import numpy as np

from . import direct_feedback_alignment, losses, nets


class Local(NamedTuple):
    """The local loss of one hidden signal, and its gradients; None for what is not there."""

    loss: float
    signal: np.ndarray
    classifier: np.ndarray | None
    bias: np.ndarray | None
    projection: np.ndarray | None


def prediction(h, targets, classifier, bias=None, loss=losses.softmax_cross_entropy):
    """L_pred: (value, dL/dh, dL/dC, dL/dc), C [outputs, *hidden]."""
    flat = h.reshape(len(h), -1)
    weights = np.asarray(classifier, dtype=np.float64).reshape(len(classifier), -1)
    logits = flat @ weights.T + (0 if bias is None else bias)
    value, e = losses.mean(*loss(logits, targets))
    d_bias = None if bias is None else e.sum(axis=0)
    return value, (e @ weights).reshape(h.shape), (e.T @ flat).reshape(np.shape(classifier)), d_bias


def features(h, projection=None, spread=True):
    """What S compares, [n, features]: the projected signal, of maps the standard deviation of each channel."""
    projected = h if projection is None else nets.multiply(_projector(projection), projection, h)
    if projected.ndim == 4 and spread:
        return np.sqrt(projected.var(axis=(1, 2)))
    return projected.reshape(len(h), -1)


def similarity_matrix(x):
    """S(x), [n, n]: adjusted cosine similarity; zero to and from rows whose features are all equal."""
    unit = _unit(np.asarray(x, dtype=np.float64))[0]
    return unit @ unit.T


def similarity(h, targets, projection=None, pair_scale=None, spread=True):
    """L_sim: (value, dL/dh, dL/dP)."""
    n = len(h)
    scale = 1 / n**2 if pair_scale is None else pair_scale
    x = features(h, projection, spread)
    unit, norms = _unit(x)
    difference = unit @ unit.T - similarity_matrix(np.asarray(targets).reshape(n, -1))
    # S is symmetric in its two factors: dL/dunit = 2 (dL/dS) unit with dL/dS = 2 scale difference.
    d_unit = 4 * scale * difference @ unit
    along = (d_unit * unit).sum(axis=1, keepdims=True)
    d_centred = np.where(norms > 0, (d_unit - along * unit) / np.where(norms > 0, norms, 1.0), 0.0)
    d_x = d_centred - d_centred.mean(axis=1, keepdims=True)
    layer = None if projection is None else _projector(projection)
    projected = h if projection is None else nets.multiply(layer, projection, h)
    if projected.ndim == 4 and spread:
        deviation = projected - projected.mean(axis=(1, 2), keepdims=True)
        positions = projected.shape[1] * projected.shape[2]
        per_channel = np.where(x > 0, d_x / np.where(x > 0, x, 1.0), 0.0) / positions
        d_projected = per_channel[:, None, None, :] * deviation
    else:
        d_projected = d_x.reshape(projected.shape)
    value = scale * (difference**2).sum()
    if projection is None:
        return value, d_projected, None
    down = nets.transpose(layer, np.asarray(projection), d_projected, h.shape)
    return value, down, nets.kernel_gradient(layer, h, d_projected)


def local_loss(
    h,
    targets,
    kind,
    *,
    classifier=None,
    bias=None,
    projection=None,
    beta=0.99,
    loss=losses.softmax_cross_entropy,
    pair_scale=None,
    spread=True,
):
    """The loss at one hidden signal: `Local`. kind: "prediction", "similarity" or "both"."""
    weights = {"prediction": (1.0, 0.0), "similarity": (0.0, 1.0), "both": (1 - beta, beta)}[kind]
    value, signal, parts = 0.0, np.zeros(h.shape), [None, None, None]
    if kind != "similarity":
        found, down, d_classifier, d_bias = prediction(h, targets, classifier, bias, loss)
        value, signal = value + weights[0] * found, signal + weights[0] * down
        parts[:2] = weights[0] * d_classifier, None if d_bias is None else weights[0] * d_bias
    if kind != "prediction":
        found, down, d_projection = similarity(h, targets, projection, pair_scale, spread)
        value, signal = value + weights[1] * found, signal + weights[1] * down
        parts[2] = None if d_projection is None else weights[1] * d_projection
    return Local(value, signal, *parts)


def gradients(net, x, e, targets, kind="both", *, classifiers=None, biases=None, projections=None, **options):
    """Local losses everywhere: (`nets.Gradients`, [None, Local_1, ..., Local_{L-1}]).

    Args:
      net: a list of `nets.Layer`.
      x: inputs [batch, ...].
      e: output error of the objective, for the last layer alone.
      targets: [batch, classes].
      kind: "prediction", "similarity" or "both".
      classifiers: [None, C_1, ..., C_{L-1}], C_k [outputs, *shape of r_k without batch]; biases: [None, c_1, ...].
      projections: [None, P_1, ..., P_{L-1}], [features in, features out] or [3, 3, channels in, channels out].
      options: of `local_loss`.
    """
    trace = nets.forward(net, x)
    nothing = [None] * len(net)
    classifiers, biases, projections = (nothing if p is None else p for p in (classifiers, biases, projections))
    found = [None]
    for k in range(1, len(net)):
        local = {"classifier": classifiers[k], "bias": biases[k], "projection": projections[k]}
        found.append(local_loss(trace.reads[k], targets, kind, **local, **options))
    signals = [local.signal for local in found[1:]]
    return direct_feedback_alignment.from_signals(net, trace, x, e, signals), found


def _unit(x):
    centred = x - x.mean(axis=1, keepdims=True)
    norms = np.sqrt((centred**2).sum(axis=1, keepdims=True))
    return np.where(norms > 0, centred / np.where(norms > 0, norms, 1.0), 0.0), norms


def _projector(projection):
    projection = np.asarray(projection, dtype=np.float64)
    return nets.dense(projection) if projection.ndim == 2 else nets.conv(projection, padding="SAME")
