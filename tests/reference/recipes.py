"""The recipes' rules for chains of dense layers, from the papers' equations; layers are counted from 0, as in `nets`.

r_k is what layer k reads, z_k = r_k W_k + b_k, d_k the error at z_k; signals s_k arrive at r_k for k >= 1. Feedback is
[None, B_1, ...], B_k of the shape of W_k, or for classifiers C_k [classes, size of r_k].
"""

import numpy as np

from . import nets


def local_classifiers(net, classifiers, x, e, targets):
    """p_k = softmax(r_k C_k^T), s_k = (p_k - t) C_k / n and dC_k = (p_k - t)^T r_k / n; the last layer learns by e."""
    trace, n = nets.forward(net, x), len(x)
    kernels, biases, learned = ([None] * len(net) for _ in range(3))
    last = len(net) - 1
    for k in range(len(net)):
        d = np.asarray(e, dtype=np.float64)
        if k < last:
            above, c = trace.reads[k + 1], classifiers[k + 1]
            powers = np.exp(above @ c.T)
            error = (powers / powers.sum(1, keepdims=True) - targets) / n
            learned[k + 1] = error.T @ above
            d = error @ c * nets.slope(net[k].activation, trace.pre[k])
        kernels[k], biases[k] = trace.reads[k].T @ d, d.sum(0)
        if k == 0:
            signal = d @ net[0].kernel.T
    return nets.Gradients(kernels, biases, signal, learned)
