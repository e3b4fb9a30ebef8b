"""Sign symmetry: feedback with the signs of the forward weights (Liao, Leibo and Poggio 2016).

Baldi, Sadowski and Lu 2018, section 4.2, observation 2; Lechner 2020, section 2.3. Feedback alignment with

    unit (uSF)      B_k = sign(W_k)
    random (brSF)   B_k = M_k sign(W_k),  M_k >= 0 drawn anew for every batch
    fixed (frSF)    B_k = M_k sign(W_k),  M_k >= 0 drawn once
    scaled          B_k = s_k sign(W_k),  s_k the standard deviation of all numbers of W_k at the start of training

where sign is that of the present weight, and sign(0) = 0.
"""

import numpy as np

from . import feedback_alignment, nets


def feedback(net, magnitudes=None):
    """[None, B_1, ...]; `magnitudes` [None, M_1, ...] (brSF, frSF), absolute values taken; without them uSF."""
    if magnitudes is None:
        magnitudes = [None, *(np.ones(layer.kernel.shape) for layer in net[1:])]
    return [None, *(np.abs(m) * np.sign(layer.kernel) for layer, m in zip(net[1:], magnitudes[1:], strict=True))]


def deviations(net):
    """[None, M_1, ...] for `feedback`, from the net as it is at the start: every number is its layer's s_k."""
    found = [None]
    for layer in net[1:]:
        kernel = np.asarray(layer.kernel, dtype=np.float64)
        variance = np.sum((kernel - np.sum(kernel) / kernel.size) ** 2) / kernel.size
        found.append(np.full(kernel.shape, np.sqrt(variance)))
    return found


def gradients(net, magnitudes, x, e, *, modify=nets.unmodified, derivative=nets.slope):
    """Sign symmetry; the feedback has no gradient."""
    matrices = feedback(net, magnitudes)
    result = feedback_alignment.gradients(net, matrices, x, e, modify=modify, derivative=derivative)
    return result._replace(feedback=None)
