"""Difference target propagation: targets for hidden signals, brought down by learned inverses (Lee et al. 2015).

Lee, Zhang, Fischer and Bengio 2015, section 2. States h_0 = x, h_{k+1} = F_k(h_k) = what layer k makes of
h_k, with pooling, as the next layer reads it; h_L the outputs. Per example, with G_k an inverse of F_k for k >= 1:

    F_k(h) = pool(f_k(op(W_k, h) + b_k))
    G_k(u) = phi_k(op(V_k, .)^T unpool(u) + c_k)               V_k of the shape of W_k; dense: u V_k^T

    t_L     = h_L - eta dloss/dh_L                             `top="outputs"`
    t_{L-1} = h_{L-1} - eta dloss/dh_{L-1}                     `top="penultimate"`: theirs, by W_{L-1} itself
    t_k     = h_k + G_k(t_{k+1}) - G_k(h_{k+1})                Eq. 15; without the difference: G_k(t_{k+1})

Layer k descends 1/2 |F_k(h_k) - t_{k+1}|^2 / eta with h_k and t_{k+1} held (theirs without 1/2 and eta, a matter of
the rate; they make the top layer's gradient the true one, on the scale of e):

    d_k  = unpool((h_{k+1} - t_{k+1}) / eta) * f'(z_k),   dW_k = sum d_k h_k,   db_k = sum d_k
    the last layer: its true gradient, either way;   inputs: op_0(W_0, .)^T d_0

The inverses learn from noise, layer by layer, with W held:

    "reconstruction"    1/2 |G(F(h + xi)) - (h + xi)|^2                         Lee et al. (without 1/2)
    "difference"        1/2 |G(F(h + xi)) - G(F(h)) - xi|^2         Meulemans et al. 2020, their difference
                        reconstruction loss, for one layer: what t does with the target F(h + xi)
    "jacobian"          -xi . (G(F(h + xi)) - G(F(h))) + 1/2 |G(F(h) + zeta) - G(F(h))|^2
                        Ernoult et al. 2022, their local difference reconstruction loss: with xi and zeta of
                        one variance its minimum has the Jacobian of G the transpose of that of F: backpropagation

xi and zeta come with their standard deviation in them; the loss is a mean over the batch, and is divided by `variance`
where that is wanted ("jacobian" in the paper: 1 / sigma^2).

What follows (its test shows it). Linear invertible layers with exact inverses: t_k - h_k = -eta J_k^-1 e,
J_k from h_k to the outputs: Gauss-Newton targets. V_k = W_k, phi the identity, small eta or not: backpropagation
without the f' of the layers in between (`skipped_backprop`); in linear nets backpropagation.

Choices: phi_k is given by name (Lee et al.: tanh as f; "identity" is the default here). unpool is the transpose of the
clean pass's pooling (of the maxima's places) throughout, also for noisy states.
"""

import numpy as np

from . import nets


class Inverse:
    """G_k of one layer, linearised in pooling at the clean pass."""

    def __init__(self, net, trace, k, kernel, bias=None, activation="identity"):
        self.layer, self.activations = net[k], trace.activations[k]
        self.pooled_shape, self.read_shape = trace.pooled[k].shape, trace.reads[k].shape
        self.kernel, self.bias, self.activation = np.asarray(kernel, dtype=np.float64), bias, activation

    def unpool(self, u):
        return nets.unpool(self.layer, self.activations, u.reshape(self.pooled_shape))

    def pre(self, u):
        return nets.transpose(self.layer, self.kernel, self.unpool(u), self.read_shape) + (
            0 if self.bias is None else self.bias
        )

    def __call__(self, u):
        return nets.activate(self.activation, self.pre(u))

    def gradients(self, u, slope):
        """Of <slope, G(u)> with respect to V and c."""
        d = slope * nets.slope(self.activation, self.pre(u))
        bias = None if self.bias is None else d.reshape(-1, d.shape[-1]).sum(axis=0)
        # <d, op(V, .)^T u> = <op(V, d), u>: V's gradient is a weight gradient that reads d.
        return nets.kernel_gradient(self.layer, d, self.unpool(u)), bias


def _inverses(net, trace, feedback, biases, activations):
    biases = [None] * len(net) if biases is None else biases
    activations = ["identity"] * len(net) if activations is None else activations
    made = [Inverse(net, trace, k, feedback[k], biases[k], activations[k]) for k in range(1, len(net))]
    return [None, *made]


def gradients(
    net,
    feedback,
    x,
    e,
    *,
    step_size,
    top="outputs",
    difference=True,
    biases=None,
    activations=None,
    reduction="mean",
):
    """Difference target propagation: (`nets.Gradients`, targets [None, t_1, ..., t_L]).

    Args:
      net: a list of `nets.Layer`, the last one linear.
      feedback: [None, V_1, ..., V_{L-1}] of the shapes of the kernels.
      x: inputs [batch, ...].
      e: output error, the shape of the outputs.
      step_size: eta.
      top: "outputs" or "penultimate".
      difference: without it, target propagation.
      biases: [None, c_1, ..., c_{L-1}], of the last axis of what layer k reads.
      activations: [None, name of phi_1, ...].
      reduction: "mean" or "sum", what the output error is of.
    """
    if net[-1].activation != "identity" or net[-1].pool is not None:
        raise ValueError("the outputs must be linear: absorb their activation into the loss")
    e = np.asarray(e, dtype=np.float64)
    n = len(x) if reduction == "mean" else 1
    trace, last = nets.forward(net, x), len(net) - 1
    inverses = _inverses(net, trace, feedback, biases, activations)
    states = [*trace.reads, trace.outputs]
    targets = [None] * last + [None, states[-1] - step_size * n * e]
    for k in reversed(range(1, last + 1)):
        if k == last and top == "penultimate":
            true = nets.transpose(net[k], net[k].kernel, e, trace.reads[k].shape)
            targets[k] = states[k] - step_size * n * true
        else:
            correction = states[k] - inverses[k](states[k + 1]) if difference else 0.0
            targets[k] = inverses[k](targets[k + 1]) + correction
    d = [
        nets.to_pre_activation(net, trace, k, (states[k + 1] - targets[k + 1]) / step_size / n) for k in range(len(net))
    ]
    if top == "penultimate":
        d[last] = e
    kernels = [nets.kernel_gradient(layer, trace.reads[k], d[k]) for k, layer in enumerate(net)]
    shifts = [nets.bias_gradient(layer, d[k]) for k, layer in enumerate(net)]
    inputs = nets.transpose(net[0], net[0].kernel, d[0], trace.reads[0].shape)
    return nets.Gradients(kernels, shifts, inputs.reshape(np.shape(x))), targets


def feedback_gradients(
    net, feedback, x, noise, kind="reconstruction", *, top_noise=None, biases=None, activations=None, variance=1.0
):
    """What the inverses learn: (losses [None, ...], [None, dV_1, ...], [None, dc_1, ...]), means over the batch.

    Args:
      net, feedback, x, biases, activations: as above.
      noise: [None, xi_1, ..., xi_{L-1}], xi_k of the shape of h_k, added to what layer k reads.
      kind: "reconstruction", "difference" or "jacobian".
      top_noise: [None, zeta_1, ..., zeta_{L-1}], zeta_k of the shape of h_{k+1}, for "jacobian".
      variance: what the losses are divided by.
    """
    trace = nets.forward(net, x)
    states = [*trace.reads, trace.outputs]
    found = [None], [None], [None]
    for k, inverse in enumerate(_inverses(net, trace, feedback, biases, activations)):
        if k == 0:
            continue
        xi, clean = np.asarray(noise[k], dtype=np.float64), states[k + 1]
        noisy = nets.pool(net[k], nets.activate(net[k].activation, nets.pre_activation(net[k], states[k] + xi)))
        noisy = noisy.reshape(clean.shape)
        if kind == "reconstruction":
            residual = inverse(noisy) - (states[k] + xi)
            value, terms = 0.5 * (residual**2).sum(), [(noisy, residual)]
        elif kind == "difference":
            residual = inverse(noisy) - inverse(clean) - xi
            value, terms = 0.5 * (residual**2).sum(), [(noisy, residual), (clean, -residual)]
        elif kind == "jacobian":
            moved = clean + np.asarray(top_noise[k])
            size = inverse(moved) - inverse(clean)
            value = -(xi * (inverse(noisy) - inverse(clean))).sum() + 0.5 * (size**2).sum()
            terms = [(noisy, -xi), (clean, xi), (moved, size), (clean, -size)]
        else:
            raise ValueError(f"unknown kind {kind!r}")
        scale = 1 / (len(x) * variance)
        parts = [inverse.gradients(u, slope) for u, slope in terms]
        found[0].append(scale * value)
        found[1].append(scale * sum(kernel for kernel, _ in parts))
        found[2].append(None if inverse.bias is None else scale * sum(bias for _, bias in parts))
    return found
