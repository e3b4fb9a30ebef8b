"""What may happen to a signal on its way: sign only, magnitude only, dropped, without derivatives, sparse feedback.

Baldi, Sadowski and Lu 2018: sections 3 ("(no f')", sparse matrices), 4.2 (observations 5 and 6), 6.1 (dropout in the
learning channel). Each function here is a `modify` for the rules' `gradients`: (signal, k) -> signal, applied to all
that arrives at hidden signal r_k, before the derivative and before it goes further down. For rules without derivatives
pass `derivative=nets.no_slope`.

A nonlinear function acts on the gradient of the per-example sum. For an objective that is a batch mean over n examples,
with signals s that carry 1/n, that is fn(n s) / n. (BackMAN acts on signals as they stand: there use reduction="sum".)
"""

import numpy as np


def per_example(fn, batch, reduction="mean"):
    """fn on the scale of the per-example sum: a `modify`. reduction: "mean" or "sum", what the output error is of."""
    n = batch if reduction == "mean" else 1
    return lambda signal, k: fn(signal * n) / n


def sign(batch, reduction="mean"):
    """Only the sign of each entry; 0 stays 0."""
    return per_example(np.sign, batch, reduction)


def magnitude(batch, reduction="mean"):
    """Only the absolute value of each entry."""
    return per_example(np.abs, batch, reduction)


def drop(masks, rate):
    """s_k * mask_k / (1 - rate); `masks` [None, mask_1, ...] of ones (kept) and zeros, of the shape of r_k."""
    return lambda signal, k: signal * masks[k] / (1 - rate)


def in_turn(*functions):
    """Several `modify`s, the first one first. Of nested modifiers the outermost comes first."""

    def modify(signal, k):
        for function in functions:
            signal = function(signal, k)
        return signal

    return modify


def sparse(uniform, n, receiving, rescaled=False):
    """Sparse-n feedback from draws in [0, 1): 1 where the draw is below p = n / receiving (at most 1), else 0.

    Args:
      uniform: draws of the shape of the feedback.
      n: how many neurons of the receiving layer one neuron above reaches on average.
      receiving: size of the receiving hidden layer. Sequential B [in, out]: in, as the error goes from out to in.
        Direct B [outputs, hidden]: hidden.
      rescaled: divide by sqrt(n), as the paper does for RBP.
    """
    matrix = (np.asarray(uniform) < min(n / receiving, 1.0)).astype(np.float64)
    return matrix / np.sqrt(n) if rescaled else matrix
