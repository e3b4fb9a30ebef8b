"""BackMAN: every neuron's weight update has a given norm, and what it passes down is scaled with it.

Soltani Moakhar et al., section 3.2, Eq. 5 to 9 and algorithm 1; convolutions: appendix A.2, Eq. 14 to 20, algorithm 2.
The paper's r and g are minus the signals here (it adds updates, gradients are subtracted). With d_k what arrives at z_k
(the paper's -r), over the whole batch and with e as it arrives:

    G_k      = sum d_k r_k                          the raw weight gradient
    norm_i   = sqrt(sum of squares of G_k over all axes but the output one)      one per output neuron or filter i
    c_i      = alpha / norm_i                       Eq. 7, 20
    dW_k     = c_i G_k[..., i]                      Eq. 5, 14: sum g r_k with g = d c
    s_k      = op_k(W_k, .)^T (d_k c)               Eq. 9, 18, also for the inputs (k = 0)
    d_{k-1}  = unpool(s_k) * f'(z_{k-1})
    db_k     = sum d_k                              the bias takes the signal that arrives, without c

Left unsaid by the paper: a norm below 1e-15 (a dead neuron) is replaced by the mean of the layer's norms, dead ones
counted; where that is zero too, c_i = 0. Every layer is treated so, the first and the last included.

alpha = "gradient_norm": per layer such that the Frobenius norm of g_k = d_k c equals that of d_k.
"""

import numpy as np

from . import nets


def coefficients(raw, d, alpha=1.0):
    """c [out], from the raw gradient [..., in, out] and the signal d [batch, ..., out]."""
    norm = np.sqrt((raw**2).sum(axis=tuple(range(raw.ndim - 1))))
    norm = np.where(norm < 1e-15, norm.mean(), norm)
    c = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0)
    if alpha == "gradient_norm":
        before, after = np.sqrt((d**2).sum()), np.sqrt(((d * c) ** 2).sum())
        alpha = before / after if after > 0 else 0.0
    return alpha * c


def gradients(net, x, e, *, alpha=1.0, modify=nets.unmodified, derivative=nets.slope):
    """BackMAN.

    Args:
      net: a list of `nets.Layer`.
      x: inputs [batch, ...], the whole batch.
      e: output error, the shape of the outputs.
      alpha: a number, or "gradient_norm".
      modify, derivative: as in `backprop.gradients`.
    """
    trace = nets.forward(net, x)
    kernels, biases = [None] * len(net), [None] * len(net)
    signal = np.asarray(e, dtype=np.float64)
    for k in reversed(range(len(net))):
        d = nets.to_pre_activation(net, trace, k, signal, derivative)
        raw = nets.kernel_gradient(net[k], trace.reads[k], d)
        c = coefficients(raw, d, alpha)
        kernels[k] = raw * c
        biases[k] = nets.bias_gradient(net[k], d)
        signal = nets.transpose(net[k], net[k].kernel * c, d, trace.reads[k].shape)
        if k > 0:
            signal = modify(signal, k)
    return nets.Gradients(kernels, biases, signal.reshape(np.shape(x)))
