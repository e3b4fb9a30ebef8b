"""Equilibrium propagation: a free and a nudged equilibrium of one energy, and the difference between them.

Scellier and Bengio 2017; the discrete dynamics of convolutional nets: Ernoult et al. 2019; centred
nudging: Laborieux et al. 2021. States s_1, ..., s_L (s_0 = x, clamped), state k + 1 made by layer k, pooled:

    Phi(x, s) = sum_k s_{k+1} . pool(op(W_k, s_k) + b_k)
    F(s)      = E(s) + beta C(outputs)                            per example, summed over examples

    "discrete"  s_k <- f_{k-1}(dPhi/ds_k)                         Ernoult et al., Laborieux et al.; E = G(s) - Phi with
                                                                  G' = f^-1, so that equilibria are where dE/ds = 0
    "euler"     s_k <- s_k - eps dF/ds_k, with                    Scellier and Bengio
                E = 1/2 |s|^2 - Phi(x, f(s)):  dE/ds_k = s_k - f'(s_k) dPhi/df_k        (inputs without f)

    dPhi/ds_k = pool(op(W_{k-1}, s_{k-1}) + b_{k-1}) + op(W_k, .)^T unpool(s_{k+1})

with unpool at the present op(W_k, s_k) + b_k; f acts after pooling (max and a monotone f: the same as before it). A
damped discrete step, s <- (1 - eps) s + eps f(.), has the same equilibria; eps = 1 in the papers. Outputs (linear,
`output`):

    "state"     s_L is a state and the outputs: its step has -beta dC/ds_L besides dPhi/ds_L, and it acts on s_{L-1}
    "readout"   the outputs are op(W_{L-1}, s_{L-1}) + b, outside Phi (Laborieux et al., for softmax and cross-entropy):
                the nudge is -beta op(W_{L-1}, .)^T dC/do, besides dPhi/ds_{L-1}; nothing else comes down

Free phase (beta = 0) to s^0, then from s^0 the nudged phase to s^beta; centred: also from s^0 with -beta. Gradients:

    one-sided   (dF/dW(s^beta) - dF/dW(s^0)) / beta               Scellier and Bengio; -dPhi/dW in F
    centred     (dF/dW(s^beta) - dF/dW(s^-beta)) / (2 beta)       dF of each with its own beta

likewise biases and inputs. For a readout dF/dW_{L-1} = beta dC/dW, so its gradient is dC/dW at s^beta (centred: the
mean of both nudged equilibria). Limit beta -> 0: the gradient of C at the free equilibrium (theorem 1), with an error
of beta, centred of beta^2, if both phases have settled.

Not the gradient at the forward pass: in the free phase the states above act on those below, so the free outputs are
not the network's. Open in the papers: the order of a step ("parallel", all at once, here by default; "upward",
"downward": one after another), where states start (zeros, or `start`), eps. Scellier and Bengio clip the states to
[0, 1] with f the hard sigmoid: `clip`.
"""

from typing import NamedTuple

import numpy as np

from . import nets


class Phases(NamedTuple):
    """States by index 0 ... L (L absent for a readout), the outputs of the free phase, its last step's largest move."""

    free: list[np.ndarray]
    nudged: list[np.ndarray]
    opposite: list[np.ndarray] | None  # with -beta, centred only
    outputs: np.ndarray
    moved: float


class _Network:
    def __init__(self, net, x, error_at, n, dynamics, output, step_size, order, clip):
        if net[-1].activation != "identity" or net[-1].pool is not None:
            raise ValueError("the outputs must be linear: absorb their activation into the loss")
        self.net, self.inputs, self.n, self.error_at = net, np.asarray(x, dtype=np.float64), n, error_at
        self.euler, self.readout, self.step_size = dynamics == "euler", output == "readout", step_size
        self.order, self.clip = order, clip
        self.top = len(net) - 1 if self.readout else len(net)  # the highest state

    def zeros(self):
        shapes = [p.shape for p in nets.forward(self.net, self.inputs).pooled[: self.top]]
        return [self.inputs, *(np.zeros(shape) for shape in shapes)]

    def active(self, s, k):
        """What enters Phi: s_k, of the Euler dynamics f(s_k)."""
        return nets.activate(self.net[k - 1].activation, s[k]) if self.euler and k > 0 else s[k]

    def read(self, s, k):
        return nets.as_read(self.net[k], self.active(s, k))

    def drive(self, s, k):
        """op(W_k, s_k) + b_k."""
        return nets.pre_activation(self.net[k], self.read(s, k))

    def unpooled(self, s, k):
        """State k + 1 at layer k's product."""
        return nets.unpool(self.net[k], self.drive(s, k), self.active(s, k + 1))

    def brought_down(self, s, k, d):
        signal = nets.transpose(self.net[k], self.net[k].kernel, d, self.read(s, k).shape)
        return signal.reshape(s[k].shape)

    def outputs(self, s):
        return self.drive(s, len(self.net) - 1) if self.readout else self.active(s, self.top)

    def error(self, s):
        """dC/do of each example."""
        return self.n * np.asarray(self.error_at(self.outputs(s)), dtype=np.float64)

    def nudge(self, s, k):
        """dC/ds_k; a linear output state is its own activation."""
        if k < self.top:
            return 0.0
        return self.brought_down(s, self.top, self.error(s)) if self.readout else self.error(s)

    def moved(self, s, k, beta):
        layer = self.net[k - 1]
        slope = nets.pool(layer, self.drive(s, k - 1))  # dPhi/ds_k
        if k < self.top:
            slope = slope + self.brought_down(s, k, self.unpooled(s, k))
        nudge = beta * self.nudge(s, k) if beta else 0.0
        if not self.euler:
            target = nets.activate(layer.activation, slope - nudge)
        elif self.readout:  # the nudge comes through the readout, which reads f(s)
            target = nets.slope(layer.activation, s[k]) * (slope - nudge)
        else:
            target = nets.slope(layer.activation, s[k]) * slope - nudge
        new = (1 - self.step_size) * s[k] + self.step_size * target
        return new if self.clip is None else np.clip(new, *self.clip)

    def settle(self, s, beta, steps):
        s, largest = list(s), np.inf
        for _ in range(steps):
            before = list(s)
            if self.order == "parallel":
                s = [s[0], *(self.moved(s, k, beta) for k in range(1, self.top + 1))]
            else:
                up = range(1, self.top + 1)
                for k in up if self.order == "upward" else reversed(up):
                    s[k] = self.moved(s, k, beta)
            largest = max(np.abs(new - old).max() for new, old in zip(s, before, strict=True))
        return s, largest

    def slopes(self, s, beta):
        """dF/dW, dF/db by layer, dF/dx."""
        d = [-self.unpooled(s, k) for k in range(self.top)]
        if self.readout:
            d.append(beta * self.error(s))
        kernels = [nets.kernel_gradient(layer, self.read(s, k), d[k]) for k, layer in enumerate(self.net)]
        biases = [nets.bias_gradient(layer, d[k]) for k, layer in enumerate(self.net)]
        return kernels, biases, self.brought_down(s, 0, d[0])


def gradients(
    net,
    x,
    error_at,
    *,
    beta,
    free_steps,
    nudged_steps,
    dynamics="discrete",
    output="state",
    centred=False,
    step_size=1.0,
    order="parallel",
    start=None,
    clip=None,
    reduction="mean",
):
    """Equilibrium propagation: (`nets.Gradients`, `Phases`).

    Args:
      net: a list of `nets.Layer`, the last one linear.
      x: inputs [batch, ...].
      error_at: outputs -> output error, with the scale of `reduction`.
      beta: the strength of the nudge; a negative one is right, too.
      free_steps, nudged_steps: how many.
      dynamics: "discrete" or "euler".
      output: "state" or "readout".
      centred: both nudges, beta and -beta.
      step_size: eps.
      order: "parallel", "upward" or "downward".
      start: [x, s_1, ...], where the free phase starts; zeros if None.
      clip: (low, high) of the states after each step.
      reduction: "mean" or "sum", what the output error is of.
    """
    if order not in ("parallel", "upward", "downward") or dynamics not in ("discrete", "euler"):
        raise ValueError(f"unknown order {order!r} or dynamics {dynamics!r}")
    n = len(x) if reduction == "mean" else 1
    network = _Network(net, x, error_at, n, dynamics, output, step_size, order, clip)
    free, largest = network.settle(network.zeros() if start is None else start, 0.0, free_steps)
    nudged, _ = network.settle(free, beta, nudged_steps)
    opposite = network.settle(free, -beta, nudged_steps)[0] if centred else None
    high = network.slopes(nudged, beta)
    low = network.slopes(opposite, -beta) if centred else network.slopes(free, 0.0)
    scale = 1 / (2 * beta if centred else beta) / n

    def difference(a, b):
        return None if a is None else scale * (a - b)

    kernels, biases = ([difference(a, b) for a, b in zip(high[i], low[i], strict=True)] for i in (0, 1))
    found = nets.Gradients(kernels, biases, difference(high[2], low[2]))
    return found, Phases(free, nudged, opposite, network.outputs(free), largest)
