"""Direct Kolen-Pollack (DKP): direct feedback that learns by Kolen and Pollack's rule (Webster, Choi and Ahn 2021).

The signals are those of direct feedback alignment, and the feedback weight of a hidden signal moves with the
product of that signal and the output error, with the decay that the forward weights have. B_k [outputs, *shape of r_k
without batch]; as gradients, with e as it is given:

    s_k     = e . B_k,   d_{k-1} = unpool(s_k) * f'(z_{k-1}),   d_{L-1} = e * f'(z_{L-1})
    dW_k    = sum d_k r_k
    dB_k    = sum_batch e r_k                       = sum e h_k^T of the paper

so as a gradient it is adaptive direct feedback alignment (ASRBP); what makes it Kolen-Pollack is the decay of both. One
step of gradient descent at rate eta with weight decay gamma on kernels and feedback (optax.add_decayed_weights, sgd):

    W <- W - eta (dW + gamma W),   B <- B - eta (dB + gamma B)

What follows from it (tests/reference/test_direct_feedback.py):

- The signal under a linear top layer: dB_{L-1} is the transpose of dW_{L-1}, so W_{L-1}^T - B_{L-1} shrinks by
  1 - eta gamma each step; with one hidden layer DKP is Kolen-Pollack.
- Deeper, in a linear net without biases and with M_k = W_k ... W_{L-2} (from r_k to r_{L-1}; M_{L-1} = I):
  dB_k M_k = dW_{L-1}^T, so wherever training comes to rest B_k M_k = W_{L-1}^T: B_k is the true feedback
  (M_k W_{L-1})^T if M_k is orthogonal, and else W_{L-1}^T through an inverse of M_k.
- Without decay nothing is forgotten: W_{L-1}^T - B_{L-1} stays as it was drawn.

Low rank (`rank`): B_k = P Q_k, both learned: see `low_rank_feedback`, which gives their gradients from the same dB_k.

Open in the paper: whether the rates of W and B are equal (here two may be given), and the decay of biases (none here).
"""

import numpy as np

from . import direct_feedback_alignment, nets


def gradients(net, feedback, x, e, *, modify=nets.unmodified, derivative=nets.slope):
    """Arguments as in `direct_feedback_alignment.gradients`; `.feedback` is [None, dB_1, ..., dB_{L-1}]."""
    return direct_feedback_alignment.gradients(net, feedback, x, e, adaptive=True, modify=modify, derivative=derivative)


def step(net, feedback, x, e, rate, decay, feedback_rate=None):
    """One step of gradient descent with weight decay on kernels and feedback; biases without decay: (net, feedback)."""
    got = gradients(net, feedback, x, e)
    below = rate if feedback_rate is None else feedback_rate
    layers = []
    for layer, kernel, bias in zip(net, got.kernels, got.biases, strict=True):
        moved = None if bias is None else layer.bias - rate * bias
        layers.append(layer._replace(kernel=layer.kernel - rate * (kernel + decay * layer.kernel), bias=moved))
    matrices = [
        np.asarray(b) - below * (g + decay * np.asarray(b)) for b, g in zip(feedback[1:], got.feedback[1:], strict=True)
    ]
    return layers, [None, *matrices]
