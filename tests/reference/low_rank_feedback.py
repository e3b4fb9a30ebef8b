"""Direct feedback through a few numbers, B_k = P Q_k, with both factors learned; and normalised output errors.

Hanut and Kadmon 2025 (low-dimensional error feedback): feedback matrices of rank r, whose factors learn by the product
that Kolen and Pollack's rule gives the whole matrix. With dB the gradient of a whole feedback matrix, the chain rule:

    dQ = P^T dB,    dP = dB Q^T

Their program (for matrices between neighbouring layers) forms just these two from dB = the forward weight's gradient.
Here for direct feedback (Nokland 2016), with dB_k = sum_batch e r_k; P [outputs, r] may be shared by all hidden signals
(then its gradients add up) or one for each; Q_k [r, *shape of r_k without batch]:

    q       = e P                                   r numbers for each example
    s_k     = q . Q_k,   d_{k-1} = unpool(s_k) * f'(z_{k-1}),   d_{L-1} = e * f'(z_{L-1})
    dQ_k    = sum_batch q r_k
    dP      = sum_batch e (r_k . Q_k)               . sums over the shape of r_k; a shared P: summed over k

No product of the size [outputs, hidden] is made. With weight decay on both factors at the same rate, P^T P - Q Q^T of
one signal with its own P obeys d/dt = -2 gamma (...), so the factors become balanced (test: to first order in eta).

Normalised errors. The feedback gets e_i / |e_i| for each example (the Euclidean norm over all outputs), on the scale of
the per-example sum: with e of a batch mean over n, n e_i / |n e_i| / n. An error of exactly zero stays zero. The last
layer gets e itself. Launay, Poli, Boniface and Krzakala 2020 write the scale of feedback as a matter of normalisation;
their program draws B uniformly in [-1, 1) and divides e . B by the square root of the largest hidden size (not by a
norm of e): `projection_scale`.
"""

import numpy as np

from . import direct_feedback_alignment, nets


def product(p, q):
    """B = P Q: [outputs, r], [r, *hidden] -> [outputs, *hidden]."""
    return np.tensordot(np.asarray(p, dtype=np.float64), np.asarray(q), axes=1)


def gradients(
    net,
    p,
    factors,
    x,
    e,
    *,
    learned=True,
    normalise=False,
    reduction="mean",
    modify=nets.unmodified,
    derivative=nets.slope,
):
    """Direct feedback alignment through P Q_k: (`nets.Gradients` with .feedback = [None, dQ_1, ...], dP).

    Args:
      net: a list of `nets.Layer`.
      p: P [outputs, r], shared (dP is one array), or [None, P_1, ...] (dP is such a list).
      factors: [None, Q_1, ..., Q_{L-1}], Q_k [r, *shape of r_k without batch].
      x: inputs [batch, ...].
      e: output error, the shape of the outputs.
      learned: without it the gradients of the factors are zero.
      normalise: feedback of `normalised` errors, signals and gradients of the factors alike.
      reduction: "mean" or "sum", what the output error is of.
      modify, derivative: as in `backprop.gradients`.
    """
    trace = nets.forward(net, x)
    shared = not isinstance(p, list)
    each = [None, *[p] * (len(net) - 1)] if shared else p
    sent = normalised(e, reduction) if normalise else np.asarray(e, dtype=np.float64)
    flat = sent.reshape(sent.shape[0], -1)
    signals, d_factors, d_p = [], [None], [None]
    for k in range(1, len(net)):
        q = flat @ np.asarray(each[k])
        read, factor = trace.reads[k], np.asarray(factors[k])
        signals.append(np.tensordot(q, factor, axes=1))
        reached = read.reshape(read.shape[0], -1) @ factor.reshape(factor.shape[0], -1).T
        d_factors.append(np.tensordot(q.T, read, axes=1) * float(learned))
        d_p.append(flat.T @ reached * float(learned))
    result = direct_feedback_alignment.from_signals(net, trace, x, e, signals, modify=modify, derivative=derivative)
    return result._replace(feedback=d_factors), sum(d_p[1:]) if shared else d_p


def normalised(e, reduction="mean"):
    """Each example's output error at norm 1 on the scale of the per-example sum; zero errors stay zero."""
    e = np.asarray(e, dtype=np.float64)
    n = e.shape[0] if reduction == "mean" else 1
    norms = np.sqrt((e.reshape(e.shape[0], -1) ** 2).sum(axis=1)).reshape(-1, *[1] * (e.ndim - 1))
    return np.where(norms > 0, e / np.where(norms > 0, norms, 1.0), 0.0) / n


def projection_scale(hidden_sizes):
    """1 / sqrt(largest hidden size): what multiplies e . B in the program of Launay et al. 2020."""
    return 1 / np.sqrt(max(hidden_sizes))
