"""PEPITA: a second forward pass, with the error projected onto the inputs, in place of a backward pass.

Dellaferrera and Kreiman 2022, section 3, algorithm 1. Clean pass h_0 = x, h_1, ..., h_L (h_{k+1} what layer k makes of
h_k, after its activation); modulated pass, with F [outputs, inputs] fixed and random (the paper's F^T):

    e        = o - t, the output error of the clean pass
    h'_0     = x + e F,   h'_1, ..., h'_L
    dW_k     = sum (h_{k+1} - h'_{k+1}) h'_k                k < L - 1: hidden layers, the first one reads x + e F
    dW_{L-1} = sum e' h'_{L-1},                             e' the output error of the modulated pass

as gradients (the paper subtracts them). Per example, with e of the per-example sum; a mean divides at the end.
`top="clean"` has e in place of e' for the last layer; the authors' program has e'. `read="clean"` has h_k in place of
h'_k in the products (a variant; the paper's is h'_k).

Nothing multiplies by f'. e is the error below a softmax, softmax(o) - t for cross-entropy, as in the paper.

Choices where the paper has none: a bias gets what multiplies its kernel's reads, sum (h_{k+1} - h'_{k+1}); the paper's
networks have none. Convolutions: the difference is that of the activations before pooling, and the products are the
layer's weight gradient at h'_k. For inputs, nothing is brought down: zeros. Dropout masks, in the authors' program, are
those of the clean pass in both.
"""

import numpy as np

from . import nets


def gradients(net, projection, x, error_at, *, top="modulated", read="modulated", reduction="mean"):
    """PEPITA: (`nets.Gradients`, the modulated inputs).

    Args:
      net: a list of `nets.Layer`, the last one linear.
      projection: F [outputs, *shape of x without batch].
      x: inputs [batch, ...].
      error_at: outputs -> output error, with the scale of `reduction`.
      top: "modulated" or "clean", whose error the last layer gets.
      read: "modulated" or "clean", what the layers read in the products.
      reduction: "mean" or "sum", what the output error is of.
    """
    if net[-1].activation != "identity" or net[-1].pool is not None:
        raise ValueError("the outputs must be linear: absorb their activation into the loss")
    x = np.asarray(x, dtype=np.float64)
    n = len(x) if reduction == "mean" else 1
    clean = nets.forward(net, x)
    e = n * np.asarray(error_at(clean.outputs), dtype=np.float64)
    modulated_x = x + np.tensordot(e.reshape(len(x), -1), np.asarray(projection), axes=1)
    modulated = nets.forward(net, modulated_x)
    last = e if top == "clean" else n * np.asarray(error_at(modulated.outputs), dtype=np.float64)
    d = [a - b for a, b in zip(clean.activations[:-1], modulated.activations[:-1], strict=True)] + [last]
    reads = (clean if read == "clean" else modulated).reads
    kernels = [nets.kernel_gradient(layer, reads[k], d[k]) / n for k, layer in enumerate(net)]
    biases = [nets.bias_gradient(layer, d[k] / n) for k, layer in enumerate(net)]
    return nets.Gradients(kernels, biases, np.zeros(x.shape)), modulated_x
