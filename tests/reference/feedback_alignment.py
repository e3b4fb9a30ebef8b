"""Feedback alignment = random backpropagation (RBP), and its adaptive form (ARBP).

Baldi, Sadowski and Lu 2018, section 3 (RBP: random matrices take the place of the transposed forward ones); Lechner
2020, section 2.2. As backpropagation, with a matrix B_k of the shape of W_k on the way down, for k >= 1:

    s_k     = op_k(B_k, .)^T d_k                    dense: s_k = d_k B_k^T
    d_{k-1} = unpool(s_k) * f'(z_{k-1})
    dW_k    = sum d_k r_k,   db_k = sum d_k

The first layer reads data and has no feedback: the gradient for the inputs is op_0(W_0, .)^T d_0. The last layer's
gradient is the true one, since e reaches it through no feedback.

Adaptive (ARBP): Delta c^k_{rs} = eta R^{k+1}_s O^k_r, with R the signal at the layer above and O the forward activity
below. That is the product of the forward update, so as a gradient dB_k = dW_k = sum d_k r_k, with e as it is given.
"""

import numpy as np

from . import nets


def gradients(net, feedback, x, e, *, adaptive=False, modify=nets.unmodified, derivative=nets.slope):
    """Feedback alignment.

    Args:
      net: a list of `nets.Layer`.
      feedback: [None, B_1, ..., B_{L-1}], B_k of the shape of layer k's kernel.
      x: inputs [batch, ...].
      e: output error, the shape of the outputs.
      adaptive: also the gradients of the B_k (ARBP); without it they are zero.
      modify, derivative: as in `backprop.gradients`.
    """
    trace = nets.forward(net, x)
    kernels, biases = [None] * len(net), [None] * len(net)
    signal = np.asarray(e, dtype=np.float64)
    for k in reversed(range(len(net))):
        d = nets.to_pre_activation(net, trace, k, signal, derivative)
        kernels[k] = nets.kernel_gradient(net[k], trace.reads[k], d)
        biases[k] = nets.bias_gradient(net[k], d)
        if k > 0:
            signal = modify(nets.transpose(net[k], np.asarray(feedback[k]), d, trace.reads[k].shape), k)
        else:
            signal = nets.transpose(net[0], net[0].kernel, d, trace.reads[0].shape)
    learned = [None, *(g.copy() if adaptive else 0 * g for g in kernels[1:])]
    return nets.Gradients(kernels, biases, signal.reshape(np.shape(x)), learned)
