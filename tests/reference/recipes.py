"""The recipes' rules for chains of dense layers, from the papers' equations; layers are counted from 0, as in `nets`.

r_k is what layer k reads, z_k = r_k W_k + b_k, d_k the error at z_k; signals s_k arrive at r_k for k >= 1. Feedback is
[None, B_1, ...], B_k of the shape of W_k, or for classifiers C_k [classes, size of r_k].
"""

import numpy as np

from . import nets


def difference_target_propagation(net, feedback, x, e, noises, step, decoder, slope):
    """Targets y'_k = y_k - step n d_k and r'_k = r_k + g_k(y'_k) - g_k(y_k), with g_k(y) = decoder(y B_k^T).

    y_k = r_k W_k; s_k = (r_k - r'_k) / (step n); dB_k is the gradient of 1/2n sum |g_k((r_k + xi) W_k) - (r_k + xi)|^2.
    """
    trace, n = nets.forward(net, x), len(x)
    kernels, biases, learned = ([None] * len(net) for _ in range(3))
    d = np.asarray(e, dtype=np.float64)  # the last layer is linear
    for k in reversed(range(len(net))):
        reads, w, b = trace.reads[k], net[k].kernel, feedback[k]
        kernels[k], biases[k] = reads.T @ d, d.sum(0)
        if k == 0:
            signal = d @ w.T
            break
        y = reads @ w
        target = y - step * n * d
        corrected = reads + decoder(target @ b.T) - decoder(y @ b.T)
        signal = (reads - corrected) / (step * n)
        noisy = reads + noises[k]
        up = noisy @ w
        lost = (decoder(up @ b.T) - noisy) * slope(up @ b.T) / n
        learned[k] = lost.T @ up
        d = signal * nets.slope(net[k - 1].activation, trace.pre[k - 1])
    return nets.Gradients(kernels, biases, signal, learned)
