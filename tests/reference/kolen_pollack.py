"""Kolen-Pollack: feedback weights that receive the forward weights' own update and decay (Kolen and Pollack 1994).

    dW_k = dB_k = sum d_k r_k,   d the signals of feedback alignment with B

so as a gradient it is adaptive feedback alignment (ARBP); what makes it Kolen-Pollack is the decay that both share. One
step of gradient descent at rate eta with weight decay gamma (optax.add_decayed_weights, then optax.sgd):

    W <- W - eta (dW + gamma W),   B <- B - eta (dB + gamma B):     W - B shrinks by 1 - eta gamma.
"""

import numpy as np

from . import feedback_alignment, nets


def gradients(net, feedback, x, e, *, modify=nets.unmodified, derivative=nets.slope):
    """Arguments as in `feedback_alignment.gradients`; `.feedback` is [None, dB_1, ...]."""
    return feedback_alignment.gradients(net, feedback, x, e, adaptive=True, modify=modify, derivative=derivative)


def step(net, feedback, x, e, rate, decay):
    """One step of gradient descent with weight decay on kernels and feedback, biases left alone: (net, feedback)."""
    got = gradients(net, feedback, x, e)
    kernels = [layer.kernel - rate * (g + decay * layer.kernel) for layer, g in zip(net, got.kernels, strict=True)]
    matrices = [
        np.asarray(b) - rate * (g + decay * np.asarray(b)) for b, g in zip(feedback[1:], got.feedback[1:], strict=True)
    ]
    return [layer._replace(kernel=w) for layer, w in zip(net, kernels, strict=True)], [None, *matrices]
