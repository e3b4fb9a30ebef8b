"""Quantised error signals and quantised weight updates.

Baldi, Sadowski and Lu 2018, section 5, Eq. 19:

    Q(x) = alpha sign(x) 2^round(clip(log2 |x / alpha|, 1 - bits, 0)),   Q(0) = 0

that is, the power of two nearest to |x / alpha| on the logarithmic scale, not above 1 and not below 2^(1 - bits). Both
uses act on the gradient of the per-example sum; the division by the batch comes afterwards.

Errors (5.1, alpha = 2^-3): the signal that arrives at each hidden signal, before the derivative, before it goes further
down (`error`, a `modify`); the error at the top is left as it is.

Updates (5.2, alpha = 2^-6): every example's weight gradient, of all layers and the biases (weights of a unit that is
always one) included, before the sum over the batch (`update`).
"""

import math
from fractions import Fraction

import numpy as np

from . import modifiers, nets


def _root_half():
    """The smallest double whose square is at least one half."""
    root = math.sqrt(0.5)
    while Fraction(root) ** 2 >= Fraction(1, 2):
        root = math.nextafter(root, 0)
    return math.nextafter(root, 1)


_ROOT_HALF = _root_half()


def quantise(x, bits, scale):
    """Eq. 19 without logarithms: |x / alpha| = m 2^p, 1/2 <= m < 1; log2 rounds to p if m^2 > 1/2, else to p - 1."""
    x = np.asarray(x, dtype=np.float64)
    mantissa, power = np.frexp(np.abs(x) / scale)
    exponent = np.clip(np.where(mantissa >= _ROOT_HALF, power, power - 1), 1 - bits, 0)
    return scale * np.sign(x) * np.ldexp(1.0, exponent)


def error(bits, batch, scale=2**-3, reduction="mean"):
    """A `modify` that quantises what arrives at the hidden signals."""
    return modifiers.per_example(lambda signal: quantise(signal, bits, scale), batch, reduction)


def output_error(e, bits, scale=2**-3, reduction="mean"):
    """The output error quantised, where the top is to be quantised too."""
    n = e.shape[0] if reduction == "mean" else 1
    return quantise(np.asarray(e) * n, bits, scale) / n


def update(rule, net, x, e, bits, scale=2**-6, reduction="mean", biases=True):
    """Gradients with every example's quantised.

    Args:
      rule: (net, x [1, ...], e [1, outputs], index of the example) -> `nets.Gradients`, called on one example at a
        time with the output error of the per-example sum (a `modify` inside takes reduction="sum").
      net: a list of `nets.Layer`.
      x: inputs [batch, ...].
      e: output error [batch, outputs].
      bits, scale: of the quantisation.
      reduction: "mean" or "sum", what e is of.
      biases: whether bias gradients are quantised as well.
    """
    n = x.shape[0] if reduction == "mean" else 1
    kernels = [np.zeros(layer.kernel.shape) for layer in net]
    offsets = [None if layer.bias is None else np.zeros(layer.bias.shape) for layer in net]
    inputs = []
    for i in range(x.shape[0]):
        got = rule(net, x[i : i + 1], e[i : i + 1] * n, i)
        inputs.append(got.inputs / n)
        for k in range(len(net)):
            kernels[k] += quantise(got.kernels[k], bits, scale) / n
            if offsets[k] is not None:
                offsets[k] += (quantise(got.biases[k], bits, scale) if biases else got.biases[k]) / n
    return nets.Gradients(kernels, offsets, np.concatenate(inputs))
