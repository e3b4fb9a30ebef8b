"""Backpropagation and its bottom end, training the last layer only.

With d_k the gradient at the pre-activation z_k, for a chain as in `nets`:

    d_{L-1} = e * f'(z_{L-1})
    s_k     = op_k(W_k, .)^T d_k                    the signal at r_k
    d_{k-1} = unpool(s_k) * f'(z_{k-1})
    dW_k    = sum d_k r_k,   db_k = sum d_k,   inputs: s_0
"""

import numpy as np

from . import nets


def gradients(net, x, e, *, modify=nets.unmodified, derivative=nets.slope):
    """The gradient of the objective whose output error is e.

    Args:
      net: a list of `nets.Layer`.
      x: inputs [batch, ...].
      e: output error, the shape of the outputs.
      modify: (signal, k) -> signal, applied to s_k for k >= 1 before it goes on.
      derivative: (activation name, z) -> what stands for f'(z).
    """
    trace = nets.forward(net, x)
    kernels, biases = [None] * len(net), [None] * len(net)
    signal = np.asarray(e, dtype=np.float64)
    for k in reversed(range(len(net))):
        d = nets.to_pre_activation(net, trace, k, signal, derivative)
        kernels[k] = nets.kernel_gradient(net[k], trace.reads[k], d)
        biases[k] = nets.bias_gradient(net[k], d)
        signal = nets.transpose(net[k], net[k].kernel, d, trace.reads[k].shape)
        if k > 0:
            signal = modify(signal, k)
    return nets.Gradients(kernels, biases, signal.reshape(np.shape(x)))


def last_layer_only(net, x, e):
    """The last layer gets its true gradient; nothing goes below it: every other gradient is zero, inputs included."""
    true = gradients(net, x, e)
    last = len(net) - 1
    kernels = [g if k == last else 0 * g for k, g in enumerate(true.kernels)]
    biases = [g if g is None or k == last else 0 * g for k, g in enumerate(true.biases)]
    return nets.Gradients(kernels, biases, true.inputs if last == 0 else 0 * true.inputs)
