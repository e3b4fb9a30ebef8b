"""Different rules for different layers of one net.

A layer's rule decides what arrives at the hidden signal it reads and how its weight gradient is formed. In a chain
every hidden signal has one reader, so sequential and direct rules may follow each other:

    s_k = op_k(V_k, .)^T d_k      sequential: V = W (backprop), B (feedback alignment), W c (BackMAN)
    s_k = e . B_k                 direct
    dW_k = sum d_k r_k            times c for BackMAN
"""

import numpy as np

from . import backman, nets


def gradients(net, rules, x, e, *, modify=nets.unmodified, derivative=nets.slope):
    """Gradients under one rule per layer.

    Args:
      net: a list of `nets.Layer`.
      rules: per layer ("backprop",), ("feedback_alignment", B), ("backman", alpha) or ("direct", B). In the first
        layer, which has no feedback, "feedback_alignment" and "direct" are as "backprop".
      x, e, modify, derivative: as in `backprop.gradients`.
    """
    trace = nets.forward(net, x)
    kernels, biases = [None] * len(net), [None] * len(net)
    e = signal = np.asarray(e, dtype=np.float64)
    for k in reversed(range(len(net))):
        name, *settings = rules[k]
        d = nets.to_pre_activation(net, trace, k, signal, derivative)
        kernels[k] = nets.kernel_gradient(net[k], trace.reads[k], d)
        biases[k] = nets.bias_gradient(net[k], d)
        down = net[k].kernel
        if name == "backman":
            c = backman.coefficients(kernels[k], d, *settings)
            kernels[k], down = kernels[k] * c, down * c
        elif name == "feedback_alignment" and k > 0:
            down = np.asarray(settings[0])
        if name == "direct" and k > 0:
            signal = np.tensordot(e.reshape(e.shape[0], -1), np.asarray(settings[0]), axes=1)
        else:
            signal = nets.transpose(net[k], down, d, trace.reads[k].shape)
        if k > 0:
            signal = modify(signal, k)
    return nets.Gradients(kernels, biases, signal.reshape(np.shape(x)))
