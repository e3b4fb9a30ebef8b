"""Skipped backpropagation (SBP).

Baldi, Sadowski and Lu 2018, section 3: as SRBP, with the product of the transposed forward matrices above a hidden
layer as its feedback, so without the derivatives of the activations above it; its own derivative is applied:

    s_{L-1} = op_{L-1}(W_{L-1}, .)^T e
    s_k     = op_k(W_k, .)^T unpool(s_{k+1})        dense: s_k = e W_{L-1}^T ... W_k^T
    d_{k-1} = unpool(s_k) * f'(z_{k-1})
    the rest as in `direct`

The paper does not say what becomes of max pooling between two layers: here pooling keeps its true derivative, as it is
no transfer function of a neuron. What is modified (`modify`) is the signal that arrives at a hidden layer, not what
travels past it. Only linear outputs are meant: the derivative of an activation at the top would be left out too.
"""

import numpy as np

from . import direct_feedback_alignment, nets


def gradients(net, x, e, *, modify=nets.unmodified, derivative=nets.slope):
    """Skipped backpropagation; arguments as in `backprop.gradients`."""
    trace = nets.forward(net, x)
    signals = [None] * len(net)
    travelling = np.asarray(e, dtype=np.float64)
    for k in reversed(range(1, len(net))):
        signals[k] = nets.transpose(net[k], net[k].kernel, travelling, trace.reads[k].shape)
        below = signals[k].reshape(trace.pooled[k - 1].shape)
        travelling = nets.unpool(net[k - 1], trace.activations[k - 1], below)
    return direct_feedback_alignment.from_signals(net, trace, x, e, signals[1:], modify=modify, derivative=derivative)


def feedback(net):
    """The direct feedback of a dense net that gives the same: B_k = W_{L-1}^T ... W_k^T, [outputs, in of layer k]."""
    matrices, product = [None] * len(net), np.eye(net[-1].kernel.shape[1])
    for k in reversed(range(1, len(net))):
        product = product @ net[k].kernel.T
        matrices[k] = product
    return matrices
