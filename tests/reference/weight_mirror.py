"""Weight mirrors: feedback that learns the forward weights from noise, in a phase of its own (Akrout et al. 2019).

Akrout, Wilson, Humphreys, Lillicrap and Tweed 2019, section 3. In the ordinary phase the error goes down as in feedback
alignment, through B_k. In mirror mode every layer k >= 1 reads noise xi_k of its own, zero mean and variance sigma^2,
in place of r_k; the layer above responds, and only the feedback learns, by the product of noise and response:

    y_k     = op(W_k, xi_k)                                              response
    mirror      dB_k = - <xi_k y_k> + decay B_k,                         < > the mean over examples and positions

as a gradient: an optimizer subtracts it. E <xi y> = sigma^2 W_k, since E xi xi^T = sigma^2 I. So B_k rests at
sigma^2 W_k / decay, and on average B_k - sigma^2 W_k / decay shrinks by 1 - eta decay each step (rate eta).

`response="activation"`: y_k = f_k(op(W_k, xi_k) + b_k), what a circuit of the same neurons has (section 4, where the
neurons' biases keep them where f is nearly linear); E <xi y> is then sigma^2 E f' W_k for normal noise.

Weight estimation: the feedback is fitted to the responses, by least squares of the same noise:

    estimation  dB_k = <xi_k (op(B_k, xi_k) - y_k)>,    1/2 <|op(B_k, xi_k) - y_k|^2> descended

whose expectation is sigma^2 (B_k - W_k): it rests at W_k whatever sigma, without a decay, and without the noise of a
finite mean (at B_k = W_k each single residual is zero).

Positions: a convolution sees sigma^2 times the number of positions at which a tap lies inside the map. `positions`:
"taps" divides each tap's sum by its own number (E <xi y> = sigma^2 W exactly, for SAME padding too); "all" divides by
the number of output positions (the same for VALID; less at the edges of SAME kernels). Dense layers: 1.

Open in the paper: the mean over a batch (theirs is one example at a time), convolutions' positions, the decay's place.
"""

import numpy as np

from . import feedback_alignment, nets


def gradients(net, feedback, x, e, *, modify=nets.unmodified, derivative=nets.slope):
    """The ordinary phase: feedback alignment, nothing for the feedback."""
    return feedback_alignment.gradients(net, feedback, x, e, modify=modify, derivative=derivative)


def mirror_gradients(net, feedback, noise, *, kind="mirror", decay=1.0, response="linear", positions="taps"):
    """Mirror mode: [None, dB_1, ..., dB_{L-1}]; the forward weights get nothing.

    Args:
      net: a list of `nets.Layer`.
      feedback: [None, B_1, ..., B_{L-1}] of the shapes of the kernels.
      noise: [None, xi_1, ..., xi_{L-1}], sigma included, of the shapes of r_k with batch (as layer k reads it).
      kind: "mirror" or "estimation".
      decay: of "mirror".
      response: "linear" or "activation".
      positions: "taps" or "all".
    """
    learned = [None]
    for k in range(1, len(net)):
        layer, b, xi = net[k], np.asarray(feedback[k], dtype=np.float64), np.asarray(noise[k], dtype=np.float64)
        y = nets.multiply(layer, layer.kernel, xi)
        if response == "activation":
            y = nets.activate(layer.activation, y + (0 if layer.bias is None else layer.bias))
        if kind == "mirror":
            learned.append(decay * b - correlation(layer, xi, y, positions))
        elif kind == "estimation":
            learned.append(correlation(layer, xi, nets.multiply(layer, b, xi) - y, positions))
        else:
            raise ValueError(f"unknown kind {kind!r}")
    return learned


def correlation(layer, xi, y, positions="taps"):
    """<xi y>, of the shape of the kernel."""
    total = nets.kernel_gradient(layer, xi, y) / len(xi)
    if layer.kernel.ndim == 2:
        return total
    if positions == "all":
        return total / (y.shape[1] * y.shape[2])
    numbers = nets.kernel_gradient(layer, np.ones((1, *xi.shape[1:])), np.ones((1, *y.shape[1:])))
    return np.where(numbers > 0, total / np.maximum(numbers, 1), 0.0)


def step(net, feedback, noise, rate, **options):
    """One step of gradient descent on the feedback in mirror mode."""
    got = mirror_gradients(net, feedback, noise, **options)
    return [None, *(np.asarray(b) - rate * g for b, g in zip(feedback[1:], got[1:], strict=True))]
