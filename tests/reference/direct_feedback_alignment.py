"""Direct feedback alignment = skipped random backpropagation (SRBP), and its adaptive form (ASRBP).

Baldi, Sadowski and Lu 2018, section 3: the signal arriving at hidden layer h is C^h (T - O); Lechner 2020, Eq. 6. With
e the output error flattened per example and B_k [outputs, *shape of r_k without batch], for k >= 1:

    s_k     = e . B_k                               all that arrives at r_k; nothing else flows in
    d_{k-1} = unpool(s_k) * f'(z_{k-1})
    d_{L-1} = e * f'(z_{L-1})                       the last layer: its true gradient
    dW_k    = sum d_k r_k,   db_k = sum d_k,   inputs: op_0(W_0, .)^T d_0

The feedback lands where the layer reads: for a convolution after pooling B_k is [outputs, height, width, channels] of
the pooled map, for a dense layer after flattening [outputs, features]. Pooling and the activation below it are passed
by their true derivatives.

Adaptive (ASRBP): the product of the signal at the top and the forward activity, as a gradient dB_k = sum_batch e r_k,
with e as it is given.
"""

import numpy as np

from . import nets


def gradients(net, feedback, x, e, *, adaptive=False, modify=nets.unmodified, derivative=nets.slope):
    """Direct feedback alignment.

    Args:
      net: a list of `nets.Layer`.
      feedback: [None, B_1, ..., B_{L-1}], B_k [outputs, *shape of r_k without batch].
      x: inputs [batch, ...].
      e: output error, the shape of the outputs.
      adaptive: also the gradients of the B_k (ASRBP); without it they are zero.
      modify, derivative: as in `backprop.gradients`.
    """
    trace = nets.forward(net, x)
    e = np.asarray(e, dtype=np.float64)
    flat = e.reshape(e.shape[0], -1)
    signals = [np.tensordot(flat, np.asarray(b), axes=1) for b in feedback[1:]]
    result = from_signals(net, trace, x, e, signals, modify=modify, derivative=derivative)
    learned = [np.tensordot(flat.T, r, axes=1) * float(adaptive) for r in trace.reads[1:]]
    return result._replace(feedback=[None, *learned])


def from_signals(net, trace, x, e, signals, *, modify=nets.unmodified, derivative=nets.slope):
    """Gradients where s_1, ..., s_{L-1} = `signals` arrive at the hidden signals and e at the outputs."""
    e = np.asarray(e, dtype=np.float64)
    kernels, biases = [], []
    for k, layer in enumerate(net):
        arriving = e if k == len(net) - 1 else modify(signals[k], k + 1)
        d = nets.to_pre_activation(net, trace, k, arriving, derivative)
        if k == 0:
            first = d
        kernels.append(nets.kernel_gradient(layer, trace.reads[k], d))
        biases.append(nets.bias_gradient(layer, d))
    inputs = nets.transpose(net[0], net[0].kernel, first, trace.reads[0].shape)
    return nets.Gradients(kernels, biases, inputs.reshape(np.shape(x)))
