"""Feedback weights learned by node perturbation.

Lansdell, Prakash and Kording 2019, sections 2 and 3, Eq. 1 to 5 and 9, 11. Noise xi_k ~ N(0, 1), one draw per example,
is added with standard deviation sigma (the paper's c_h) to all hidden signals r_k, k >= 1, in one noisy pass. It comes
after activation and pooling, at the tensor that layer k reads:

    r_k      = (clean function of the noisy layer below) + sigma xi_k
    lambda_k = (noisy loss - clean loss) xi_k / sigma                  Eq. 3, per example: estimates dL/dr_k

Sequential: the forward gradients are feedback alignment's on the clean pass, and with its per-example signals d_k (the
paper's e~, on the scale of the per-example sum) B_k descends

    1/2 |op_k(B_k, .)^T d_k - lambda_k|^2                              Eq. 4; dense: 1/2 |d_k B_k^T - lambda_k|^2

Direct: direct feedback alignment, and B_k descends 1/2 |e . B_k - lambda_k|^2 with e the output error (Corollary 1).
The signs: lambda estimates a gradient and e, d are gradients, so B_k goes to W_k (sequential, top layer; linear nets).

Where the objective is a batch mean, so is that of B. Least squares, Eq. 5, 9 and 11, recursive: sums over batches
are kept (dense layers, direct):

    V = ridge I + sum d d^T,   S = sum lambda d^T,   B = S V^-1        B [in, out]; direct: its transpose

The multiple of the identity is the authors' programs', which start from S = 0. A batch is brought down by the B of the
batches before it (the first one by any B), and enters B afterwards.
"""

import numpy as np

from . import direct_feedback_alignment, feedback_alignment, nets


def noisy_outputs(net, x, noise, std):
    """The outputs of the noisy pass; `noise` [None, xi_1, ...] in the shapes of r_k with batch."""
    p = np.asarray(x, dtype=np.float64)
    for k, layer in enumerate(net):
        r = nets.as_read(layer, p)
        if k > 0:
            r = r + std * np.asarray(noise[k])
        p = nets.pool(layer, nets.activate(layer.activation, nets.pre_activation(layer, r)))
    return p


def estimates(noisy, clean, noise, std):
    """[None, lambda_1, ...] from losses per example [batch]."""
    difference = (np.asarray(noisy) - np.asarray(clean)) / std
    return [None, *(difference.reshape(-1, *[1] * (xi.ndim - 1)) * xi for xi in noise[1:])]


def signals(net, feedback, x, e):
    """d_0, ..., d_{L-1}: feedback alignment's signals at the pre-activations, on the clean pass."""
    trace = nets.forward(net, x)
    found, signal = [None] * len(net), np.asarray(e, dtype=np.float64)
    for k in reversed(range(len(net))):
        found[k] = nets.to_pre_activation(net, trace, k, signal)
        if k > 0:
            signal = nets.transpose(net[k], np.asarray(feedback[k]), found[k], trace.reads[k].shape)
    return found


def gradients(net, feedback, x, e, lambdas, reduction="mean"):
    """Sequential: feedback alignment's gradients, and those of the B_k.

    Args:
      net: a list of `nets.Layer`.
      feedback: [None, B_1, ...] of the shapes of the kernels.
      x: inputs [batch, ...].
      e: output error of the clean pass.
      lambdas: `estimates`.
      reduction: "mean" or "sum", what e is of.
    """
    n = x.shape[0] if reduction == "mean" else 1
    found = [d * n for d in signals(net, feedback, x, e)]
    learned = [None]
    for k in range(1, len(net)):
        residual = nets.transpose(net[k], np.asarray(feedback[k]), found[k], lambdas[k].shape) - lambdas[k]
        # <op(B, .)^T d, residual> = <d, op(B, residual)>, so B's gradient is a weight gradient that reads the residual.
        learned.append(nets.kernel_gradient(net[k], residual, found[k]) / n)
    return feedback_alignment.gradients(net, feedback, x, e)._replace(feedback=learned)


def direct_gradients(net, feedback, x, e, lambdas, reduction="mean"):
    """Direct: direct feedback alignment's gradients, and those of the B_k [outputs, *shape of r_k]."""
    n = x.shape[0] if reduction == "mean" else 1
    flat = np.asarray(e, dtype=np.float64).reshape(len(e), -1) * n
    learned = [None]
    for b, estimate in zip(feedback[1:], lambdas[1:], strict=True):
        residual = np.tensordot(flat, np.asarray(b), axes=1) - estimate
        learned.append(np.tensordot(flat.T, residual, axes=1) / n)
    return direct_feedback_alignment.gradients(net, feedback, x, e)._replace(feedback=learned)


def least_squares(pairs, ridge=0.1):
    """B [in, out] that solves the problem over all batches seen.

    Args:
      pairs: (lambda [batch, in], d [batch, out]) of each batch, on the scale of the per-example sum.
      ridge: the multiple of the identity that V starts from.

    Direct: use d = e and transpose the result to [outputs, hidden].
    """
    width_in, width_out = pairs[0][0].shape[1], pairs[0][1].shape[1]
    v = ridge * np.eye(width_out)
    s = np.zeros((width_in, width_out))
    for estimate, d in pairs:
        v = v + d.T @ d
        s = s + estimate.T @ d
    return s @ np.linalg.inv(v)
