"""Dual propagation, its adjoint, and the damped form, with explicit states s+ and s-.

Hoier and Zach 2024. States are counted from 0 (the inputs) to L (the outputs); layer k - 1 of the net makes state k
from state k - 1, pooling and flattening belong to the way between two states. With ~alpha = 1 - alpha:

    sbar_k = alpha s+_k + ~alpha s-_k
    a_k    = op(W, pool(sbar_{k-1})) + b                              bottom-up
    D_k    = (op(W', pool(.)) at sbar_k)^T (s+_{k+1} - s-_{k+1})      top-down; W' = W, or a feedback matrix

    original, Eq. 2:    s+_k = f(a_k + alpha D_k),     s-_k = f(a_k - ~alpha D_k)
    adjoint, Eq. 19:    s+_k = f(a_k + ~alpha D_k),    s-_k = f(a_k - alpha D_k)
    damped, Eq. 50:     s+_k = f((a_k + N_k s+_k + alpha D_k) / (1 + N_k)),   s-_k alike with -~alpha D_k
                        (original only; right for activations that are projections). Eq. 50 is of alpha = 0 or 1,
                        where the other state, without D, is f(a_k)

Outputs (linear, state L), with e the gradient of one example's loss at the outputs:

    linearised          s+_L = a_L - p beta e,  s-_L = a_L + m beta e;  original (p, m) = (alpha, ~alpha), adjoint
                        swapped (Eq. 22). "once": e at the clean outputs throughout; "refreshed": e at the present a_L
    "squared_error"     Eq. 3 for half squared error, original only: s = (a_L + delta y) / (1 + delta) with
                        delta = alpha beta for s+ and -~alpha beta for s-; refused unless ~alpha beta < 1

Gradient of one example, at the final states: weights -(s+_k - s-_k) pool(sbar_{k-1}) / beta_k, biases
-(s+_k - s-_k) / beta_k; for the inputs -D_0 / beta_1. All states are those of the per-example sum; a mean
divides at the end.

alpha and beta may differ by state (Eq. 12, 44: potentials weighted 1/beta_k): D_k above is then multiplied by
beta_k / beta_{k+1}.

Input nudge (section 6.1, E_0 = |s_0 - x|^2 / 2): the inputs become a state with f the identity and a_0 = x,
s+_0 = x + p g D_0, s-_0 = x - m g D_0, with g = 1 in the paper; sbar_0 is then what the first layer reads. They are
damped as the other states are.

Orders; all start from clean states, s+ = s- = the forward pass, D = 0:

    forward_backward    up: states 1 ... L with the D of the last sweep down (zero at first); down: L - 1 ... 1 (and 0
                        if nudged), each with a fresh D, pooling linearised at the sbar of this sweep up, and a_k as
                        it was on the way up
    forward             (0 if nudged,) 1 ... L, each with a_k from the state just renewed and D_k from the old one above
    parallel            all states at once from the old ones
    odd_even            states 1, 3, 5, ... at once, then 0, 2, 4, ... at once
    a list, of a list of states for each iteration: one after another as it says

"forward" takes L iterations until the lowest weights get a signal; fewer are refused.
"""

from typing import NamedTuple

import numpy as np

from . import nets

ORDERS = ("forward_backward", "forward", "parallel", "odd_even")


class States(NamedTuple):
    """The two states, by index 0 ... L, [batch, ...] as activations are before pooling."""

    plus: list[np.ndarray]
    minus: list[np.ndarray]
    mean: list[np.ndarray]  # sbar


class _Network:
    """One inference; see `gradients` for the arguments."""

    def __init__(self, net, x, alpha, beta, adjoint, damping, input_nudge, feedback, output):
        self.net, self.top = net, len(net)
        if net[-1].activation != "identity" or net[-1].pool is not None:
            raise ValueError("the outputs must be linear: absorb their activation into the loss")
        self.alpha = np.broadcast_to(np.asarray(alpha, dtype=np.float64), self.top + 1)
        self.beta = np.broadcast_to(np.asarray(beta, dtype=np.float64), self.top + 1)
        # The coefficients of D in s+ and of -D in s-.
        self.up, self.down = (1 - self.alpha, self.alpha) if adjoint else (self.alpha, 1 - self.alpha)
        self.damping = damping
        self.nudge = input_nudge
        self.lowest = 1 if input_nudge is None else 0
        self.backward = [layer.kernel for layer in net] if feedback is None else [net[0].kernel, *feedback[1:]]
        self.output = output
        trace = nets.forward(net, x)
        self.inputs = np.asarray(x, dtype=np.float64)
        clean = [self.inputs, *trace.activations]
        self.plus, self.minus, self.mean = list(clean), list(clean), list(clean)
        self.met = [np.zeros_like(s) for s in clean]  # the D each state last met

    def read(self, k):
        """What layer k reads: sbar_k, pooled and flattened."""
        pooled = self.mean[k] if k == 0 else nets.pool(self.net[k - 1], self.mean[k])
        return nets.as_read(self.net[k], pooled)

    def bottom_up(self, k):
        return self.inputs if k == 0 else nets.pre_activation(self.net[k - 1], self.read(k - 1))

    def top_down(self, k):
        """D_k; zero for the outputs."""
        if k == self.top:
            return np.zeros_like(self.plus[k])
        difference = self.plus[k + 1] - self.minus[k + 1]
        signal = nets.transpose(self.net[k], np.asarray(self.backward[k]), difference, self.read(k).shape)
        if k == 0:
            return signal.reshape(self.inputs.shape)
        pooled_shape = nets.pool(self.net[k - 1], self.mean[k]).shape
        return nets.unpool(self.net[k - 1], self.mean[k], signal.reshape(pooled_shape))

    def settle(self, k, a, d):
        """State k from what arrives from below and above."""
        if k == self.top:
            self.plus[k], self.minus[k] = self.output(a, self.up[k], self.down[k], self.beta[k])
        else:
            d_scaled = d * self.beta[k] / self.beta[k + 1]
            name = self.net[k - 1].activation
            if k == 0:
                name, d_scaled = "identity", self.nudge * d_scaled
            high, low = a + self.up[k] * d_scaled, a - self.down[k] * d_scaled
            if self.damping is not None and self.damping[k] is not None:
                n = self.damping[k]
                high = (high + n * self.plus[k]) / (1 + n) if self.up[k] else high
                low = (low + n * self.minus[k]) / (1 + n) if self.down[k] else low
            self.plus[k], self.minus[k] = nets.activate(name, high), nets.activate(name, low)
        self.mean[k] = self.alpha[k] * self.plus[k] + (1 - self.alpha[k]) * self.minus[k]
        self.met[k] = d

    def at_once(self, states):
        arriving = [(k, self.bottom_up(k), self.top_down(k)) for k in states]
        for k, a, d in arriving:
            self.settle(k, a, d)

    def iterate(self, order):
        states = range(self.lowest, self.top + 1)
        if order == "forward_backward":
            arriving = {}
            for k in range(1, self.top + 1):
                arriving[k] = self.bottom_up(k)
                self.settle(k, arriving[k], self.met[k])
            arriving[0] = self.inputs
            for k in reversed(range(self.lowest, self.top)):
                self.settle(k, arriving[k], self.top_down(k))
        elif order == "forward":
            for k in states:
                self.at_once([k])
        elif order == "parallel":
            self.at_once(states)
        elif order == "odd_even":
            self.at_once([k for k in states if k % 2 == 1])
            self.at_once([k for k in states if k % 2 == 0])
        else:
            for k in order:
                self.at_once([k])


def gradients(
    net,
    x,
    e=None,
    *,
    alpha=0.5,
    beta=0.1,
    adjoint=True,
    iterations=1,
    order="forward_backward",
    output="once",
    error_at=None,
    targets=None,
    damping=None,
    input_nudge=None,
    feedback=None,
    reduction="mean",
):
    """Dual propagation: (`nets.Gradients`, `States`).

    Args:
      net: a list of `nets.Layer`, the last one linear.
      x: inputs [batch, ...].
      e: output error at the clean outputs, for output="once".
      alpha, beta: numbers, or one per state 0 ... L (entry 0 counts with an input nudge only).
      adjoint: Eq. 19 and 22, else Eq. 2.
      iterations: how many.
      order: one of `ORDERS`, or a list of lists of states.
      output: "once", "refreshed" or "squared_error".
      error_at: outputs -> output error, for output="refreshed", with the scale of `reduction`.
      targets: y, the shape of the outputs, for output="squared_error".
      damping: [N_0, N_1, ..., N_{L-1}], numbers, N_0 that of nudged inputs, else unused; original only.
      input_nudge: g, or None for fixed inputs.
      feedback: [None, B_1, ..., B_{L-1}] in place of the kernels on the way down.
      reduction: "mean" or "sum", what the output error is of.
    """
    if not (order in ORDERS or len(order) == iterations) or output not in ("once", "refreshed", "squared_error"):
        raise ValueError(f"unknown order {order!r} or output {output!r}")
    if order == "forward" and iterations < len(net):
        raise ValueError(f"a forward pass brings the error one layer down: {len(net)} iterations at least")
    if adjoint and (damping is not None or output == "squared_error"):
        raise ValueError("damping and squared_error belong to the original, adjoint=False")
    n = len(x) if reduction == "mean" else 1

    def linearised(a, up, down, strength):
        error = n * np.asarray(e if output == "once" else error_at(a), dtype=np.float64)
        return a - up * strength * error, a + down * strength * error

    def exact(a, up, down, strength):
        if down * strength >= 1:
            raise ValueError("(1 - alpha) beta must be below 1")
        return tuple((a + d * np.asarray(targets)) / (1 + d) for d in (up * strength, -down * strength))

    rule = exact if output == "squared_error" else linearised
    network = _Network(net, x, alpha, beta, adjoint, damping, input_nudge, feedback, rule)
    for i in range(iterations):
        network.iterate(order if order in ORDERS else order[i])

    kernels, biases = [], []
    for k, layer in enumerate(net):
        d = -(network.plus[k + 1] - network.minus[k + 1]) / network.beta[k + 1] / n
        kernels.append(nets.kernel_gradient(layer, network.read(k), d))
        biases.append(nets.bias_gradient(layer, d))
    inputs = -network.top_down(0) / network.beta[1] / n
    return nets.Gradients(kernels, biases, inputs), States(network.plus, network.minus, network.mean)


def spectral_norm_squared(w, iterations, start):
    """|W^T W|_2 by power iterations from `start` [in] (W [in, out]): the damping N of the layer that W reads."""
    v = np.asarray(start, dtype=np.float64)
    for _ in range(iterations):
        u = w @ (w.T @ v)
        v = u / np.sqrt((u**2).sum())
    return v @ (w @ (w.T @ v))
