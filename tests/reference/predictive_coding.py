"""Predictive coding: states that settle in an energy, with explicit states; fixed predictions; muPC's scales.

Whittington and Bogacz 2017, section 2, with variances 1; in the form with any function in a node: Millidge, Tschantz
and Buckley 2020, section 3, Algorithm 1. States are counted from
0 (the inputs, clamped) to L; layer k - 1 of the net predicts state k from state k - 1:

    mu_k  = g_k(v_{k-1}),    eps_k = v_k - mu_k                     k = 1, ..., L - 1
    F     = sum_{k<L} 1/2 |eps_k|^2 + loss(mu_L)                    per example, summed over examples

The outputs are clamped to the targets: 1/2 |y - mu_L|^2 is the half squared error, so eps_L = y - mu_L = -dloss/do, and
for other losses eps_L = -dloss/do at mu_L (Millidge et al.: the loss takes the place of the top energy).

States start at the clean forward pass (all eps_k = 0 for k < L). One step of size gamma, all states at once:

    v_k <- v_k - gamma dF/dv_k,   dF/dv_k = eps_k - J_{k+1}^T eps_{k+1},   J_{k+1} = dg_{k+1}/dv_k

Gradient, at the final states: dF/dW_k = -J_W^T eps_{k+1}, likewise biases; for the inputs -J_1^T eps_1. "refreshed"
predictions: mu, J and the reads of the weight gradients are those of the present states. "fixed" predictions (Millidge
et al., the fixed-prediction assumption): mu, J, the reads and eps_L stay those of the clean forward pass;
the fixed point has eps_k = J_{k+1}^T eps_{k+1}, which is backpropagation with eps = -d. With gamma = 1 it is reached
after L - 1 steps, exactly (eps_k is right after L - k steps).

What a state is (papers differ, `states`):

    "signals"           v_k is what layer k reads:  g_k(v) = pool(f(op(W, v) + b))      Millidge et al.; J has f'
    "pre_activations"   v_k is z:                   g_k(v) = op(W, pool(f(v))) + b      Whittington and Bogacz
                        (the first layer reads the inputs as they are)

Of the same network, both have the outputs L linear, and both give backpropagation in the fixed case.

Order of a step: "parallel", all from the old states (the papers); "downward", from state L - 1 to 1, each from the new
eps_{k+1} above, where mu_{k+1} is refreshed too; "upward" the other way about. They share their fixed points.

muPC (Innocenti, Achour and Buckley 2025; Depth-muP in the energy; the scales as in their program, jpc): layer k's
product is scaled, a_k op(W_k, .), with W ~ N(0, 1), and hidden layers have identity skips, mu_k = a_k W_k f(v_{k-1}) +
v_{k-1} with pre-activations as states:

    a_1 = 1 / sqrt(D),   a_k = 1 / sqrt(N L) with skips and 1 / sqrt(N) without,   a_L = 1 / N

D inputs, N the hidden width, L layers in all. A gradient is then a_k times that of the scaled kernel. The scale is on
the product alone: a bias is not scaled.

Open in the papers: where the division by the batch goes (here once, at the end: all energies are per-example sums).
"""

from typing import NamedTuple

import numpy as np

from . import nets


class States(NamedTuple):
    """The states and errors by index 0 ... L; eps_0 is None, v_L is mu_L, the present outputs."""

    values: list[np.ndarray]
    errors: list[np.ndarray | None]
    energies: list[float]  # F before the first step and after each


class _Network:
    """The functions g_k and their transposes, at the states `values`."""

    def __init__(self, net, x, states, scales, skips):
        if net[-1].activation != "identity" or net[-1].pool is not None:
            raise ValueError("the outputs must be linear: absorb their activation into the loss")
        self.net, self.top, self.pre = net, len(net), states == "pre_activations"
        self.scales = [1.0] * self.top if scales is None else scales
        self.skips = [False] * self.top if skips is None else skips
        self.inputs = np.asarray(x, dtype=np.float64)

    def prepare(self, k, v):
        """v_k as the layer above makes use of it: activated and pooled if it is a pre-activation; then reshaped."""
        if self.pre and k > 0:
            v = nets.pool(self.net[k - 1], nets.activate(self.net[k - 1].activation, v))
        return nets.as_read(self.net[k], v)

    def predict(self, k, below):
        """mu_k from v_{k-1}."""
        layer = self.net[k - 1]
        z = self.scales[k - 1] * nets.multiply(layer, layer.kernel, self.prepare(k - 1, below))
        z = z + (0 if layer.bias is None else layer.bias)
        mu = z if self.pre else nets.pool(layer, nets.activate(layer.activation, z))
        return mu + below if self.skips[k - 1] else mu

    def to_product(self, k, below, eps):
        """eps_k brought to the output of layer k - 1's product, at v_{k-1} = below."""
        if self.pre:
            return eps
        layer = self.net[k - 1]
        z = self.scales[k - 1] * nets.multiply(layer, layer.kernel, self.prepare(k - 1, below))
        z = z + (0 if layer.bias is None else layer.bias)
        eps = nets.unpool(layer, nets.activate(layer.activation, z), eps)
        return eps * nets.slope(layer.activation, z)

    def brought_down(self, k, below, eps):
        """J_k^T eps_k, the shape of v_{k-1} = below."""
        layer, read = self.net[k - 1], self.prepare(k - 1, below)
        d = self.to_product(k, below, eps)
        signal = self.scales[k - 1] * nets.transpose(layer, layer.kernel, d, read.shape)
        if self.pre and k > 1:
            under = self.net[k - 2]
            a = nets.activate(under.activation, below)
            signal = nets.unpool(under, a, signal.reshape(nets.pool(under, a).shape))
            signal = signal * nets.slope(under.activation, below)
        signal = signal.reshape(below.shape)
        return signal + eps if self.skips[k - 1] else signal


def gradients(
    net,
    x,
    error_at,
    *,
    steps,
    step_size,
    predictions="refreshed",
    states="signals",
    order="parallel",
    reduction="mean",
    loss_at=None,
    start=None,
    scales=None,
    skips=None,
):
    """Predictive coding: (`nets.Gradients`, `States`).

    Args:
      net: a list of `nets.Layer`, the last one linear.
      x: inputs [batch, ...].
      error_at: outputs -> output error, with the scale of `reduction`.
      steps: how many.
      step_size: gamma.
      predictions: "refreshed" or "fixed".
      states: "signals" or "pre_activations".
      order: "parallel", "downward" or "upward".
      reduction: "mean" or "sum", what the output error is of.
      loss_at: outputs -> loss per example, for the energies; without it they leave out the loss.
      start: [None, v_1, ..., v_{L-1}], where states start, if not at the clean forward pass.
      scales: [a_1, ..., a_L] of the layers' products; 1 if None.
      skips: [False, True, ...] by layer: state k - 1 is added to the prediction of state k.
    """
    if predictions not in ("refreshed", "fixed") or order not in ("parallel", "downward", "upward"):
        raise ValueError(f"unknown predictions {predictions!r} or order {order!r}")
    n = len(x) if reduction == "mean" else 1
    network = _Network(net, x, states, scales, skips)
    top = network.top
    clean = [network.inputs]
    for k in range(1, top + 1):
        clean.append(network.predict(k, clean[k - 1]))
    v = list(clean) if start is None else [clean[0], *(np.array(s, dtype=np.float64) for s in start[1:top]), clean[top]]
    fixed = predictions == "fixed"

    def point(k):
        """Where g_{k+1} is taken."""
        return clean[k] if fixed else v[k]

    def mu(k):
        return clean[k] if fixed else network.predict(k, v[k - 1])

    def eps(k):
        return -n * np.asarray(error_at(mu(top)), dtype=np.float64) if k == top else v[k] - mu(k)

    def slope(k):
        """dF/dv_k."""
        return eps(k) - network.brought_down(k + 1, point(k), eps(k + 1))

    def energy():
        total = sum(0.5 * (eps(k) ** 2).sum() for k in range(1, top))
        return total + (0 if loss_at is None else loss_at(mu(top)).sum())

    energies = [energy()]
    for _ in range(steps):
        if order == "parallel":
            slopes = [slope(k) for k in range(1, top)]
            for k in range(1, top):
                v[k] = v[k] - step_size * slopes[k - 1]
        else:
            for k in reversed(range(1, top)) if order == "downward" else range(1, top):
                v[k] = v[k] - step_size * slope(k)
        energies.append(energy())

    kernels, biases = [], []
    for k, layer in enumerate(net):
        d = -network.to_product(k + 1, point(k), eps(k + 1)) / n
        kernels.append(network.scales[k] * nets.kernel_gradient(layer, network.prepare(k, point(k)), d))
        biases.append(nets.bias_gradient(layer, d))
    inputs = -network.brought_down(1, point(0), eps(1)) / n
    values = [*v[:top], mu(top)]
    return nets.Gradients(kernels, biases, inputs), States(values, [None, *map(eps, range(1, top + 1))], energies)


def mupc_scales(inputs, width, layers, skips=True):
    """[a_1, ..., a_L] of muPC for `layers` layers of hidden `width` on `inputs` features."""
    hidden = 1 / np.sqrt(width * layers) if skips else 1 / np.sqrt(width)
    return [1 / np.sqrt(inputs), *[hidden] * (layers - 2), 1 / width]
