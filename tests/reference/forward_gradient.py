"""Forward gradients: directional derivatives times their directions, of weights or activations, exact or by two losses.

Weights (Baydin, Pearlmutter, Syme, Wood and Torr 2022, section 3, definition 1 and theorem 1): one direction v for all
parameters together, the same for all examples, and the objective J of the whole batch:

    g = D v,   D = grad J . v                       unbiased if E v v^T = I; normal v in the paper

Activations (Ren, Kornblith, Liao and Hinton 2023, section 3): directions u_k at the pre-activations z_k,
drawn for each example, and the objective J_i of that example; all layers are perturbed at once:

    D_i      = sum_k dJ_i/dz_{k,i} . u_{k,i}
    d_{k,i}  = D_i u_{k,i}                          stands where backpropagation has dJ/dz_{k,i}
    dW_k     = sum d_k r_k,   db_k = sum d_k,   inputs: op_0(W_0, .)^T d_0

`at="signals"` has the directions at the hidden signals r_k, k >= 1, as node perturbation does: D_i u_k arrives at r_k
and is brought to z_{k-1} by the true derivatives of pooling and activation. A layer without a direction (None) has no
noise; only the last layer may be one, and then gets its true gradient (`at="signals"` has it so always).

D is computed (`method`):

    "jvp"       forward mode: the tangent of the outputs times e. No sampling but v, no step size.
    "central"   (J(+ std v) - J(- std v)) / (2 std): SPSA (Spall 1992, section 2, with c_k = std) and, with normal v,
                MeZO (Malladi et al. 2023, definition 1, epsilon = std). Activations: with each example's own J_i.

Spall divides by the direction, component by component: D / v. For his +-1 that is D v, which is taken here always.
Several directions: the mean over them (Malladi et al.: n-SPSA). J is the objective as it is, mean or sum: D is linear
in it, so no scale needs care.

Local losses (Ren et al., section 4): each hidden signal has a loss of its own, no error comes from above, and D_i of
layer k is that of its own loss by its own direction alone: `local_gradients`, from the signals of `local_losses`.

Open in the papers: whether the last layer, whose gradient is at hand, is perturbed (Ren et al.: the loss of the last
block is treated as the other losses; both here).
"""

import numpy as np

from . import nets


def pool_tangent(layer, a, tangent):
    """The derivative of pool(a) in the direction `tangent`: the transpose of `nets.unpool`."""
    if layer.pool is None:
        return tangent
    shape = nets.pool(layer, a).shape
    result = np.zeros(shape)
    for y in range(shape[1]):
        for x in range(shape[2]):
            rows = slice(y * layer.pool_stride, y * layer.pool_stride + layer.window)
            columns = slice(x * layer.pool_stride, x * layer.pool_stride + layer.window)
            window, moved = a[:, rows, columns], tangent[:, rows, columns]
            if layer.pool == "average":
                result[:, y, x] = moved.mean(axis=(1, 2))
                continue
            for example in range(shape[0]):
                for channel in range(shape[3]):
                    first = np.argmax(window[example, :, :, channel])
                    result[example, y, x, channel] = moved[example, :, :, channel].ravel()[first]
    return result


def output_tangent(net, x, kernels=None, biases=None, pre=None, signals=None):
    """The derivative of the outputs in a direction: of kernels, biases, pre-activations z_k, hidden signals r_k.

    Each is a list by layer with None where nothing moves, or None.
    """
    trace = nets.forward(net, x)
    nothing = [None] * len(net)
    kernels, biases, pre, signals = (nothing if d is None else d for d in (kernels, biases, pre, signals))
    moved = np.zeros(np.shape(x))
    for k, layer in enumerate(net):
        moved = nets.as_read(layer, moved)
        if signals[k] is not None:
            moved = moved + np.asarray(signals[k])
        z = nets.multiply(layer, layer.kernel, moved)
        if kernels[k] is not None:
            z = z + nets.multiply(layer, np.asarray(kernels[k]), trace.reads[k])
        for direction in (biases[k], pre[k]):
            if direction is not None:
                z = z + np.asarray(direction)
        moved = pool_tangent(layer, trace.activations[k], z * nets.slope(layer.activation, trace.pre[k]))
    return moved


def noisy_outputs(net, x, std, pre=None, signals=None):
    """The outputs with std times the directions added to pre-activations or hidden signals."""
    nothing = [None] * len(net)
    pre, signals = (nothing if d is None else d for d in (pre, signals))
    p = np.asarray(x, dtype=np.float64)
    for k, layer in enumerate(net):
        r = nets.as_read(layer, p)
        r = r if signals[k] is None else r + std * np.asarray(signals[k])
        z = nets.pre_activation(layer, r)
        z = z if pre[k] is None else z + std * np.asarray(pre[k])
        p = nets.pool(layer, nets.activate(layer.activation, z))
    return p


def weight_gradients(net, x, directions, e=None, *, method="jvp", std=None, objective_at=None):
    """Weight perturbation: `nets.Gradients`, nothing for the inputs.

    Args:
      net: a list of `nets.Layer`.
      x: inputs [batch, ...].
      directions: a list of (kernels, biases), each by layer and of their shapes.
      e: output error, for "jvp".
      method: "jvp" or "central".
      std: the step of "central".
      objective_at: outputs -> J, for "central".
    """
    kernels = [np.zeros(layer.kernel.shape) for layer in net]
    biases = [None if layer.bias is None else np.zeros(layer.bias.shape) for layer in net]
    for direction_w, direction_b in directions:
        if method == "jvp":
            derivative = (np.asarray(e) * output_tangent(net, x, direction_w, direction_b)).sum()
        else:
            up, down = (
                objective_at(nets.forward(_moved(net, direction_w, direction_b, s), x).outputs) for s in (std, -std)
            )
            derivative = (up - down) / (2 * std)
        for k in range(len(net)):
            kernels[k] += derivative * np.asarray(direction_w[k]) / len(directions)
            if biases[k] is not None:
                biases[k] += derivative * np.asarray(direction_b[k]) / len(directions)
    return nets.Gradients(kernels, biases, np.zeros(np.shape(x)))


def _moved(net, kernels, biases, step):
    return [
        layer._replace(
            kernel=layer.kernel + step * np.asarray(kernels[k]),
            bias=None if layer.bias is None else layer.bias + step * np.asarray(biases[k]),
        )
        for k, layer in enumerate(net)
    ]


def activation_gradients(net, x, directions, e, *, at="pre_activations", method="jvp", std=None, objectives_at=None):
    """Activation perturbation: `nets.Gradients`.

    Args:
      net: a list of `nets.Layer`.
      x: inputs [batch, ...].
      directions: a list of [u_0, ..., u_{L-1}], u_k of the shape of z_k; the last may be None. With at="signals"
        [None, u_1, ..., u_{L-1}] of the shapes of r_k.
      e: output error, the shape of the outputs; with "central" it serves only a last layer without direction.
      at: "pre_activations" or "signals".
      method: "jvp" or "central".
      std: the step of "central".
      objectives_at: outputs -> J_i [batch], each example's part of the objective (sum J_i = J), for "central".
    """
    trace, e = nets.forward(net, x), np.asarray(e, dtype=np.float64)
    top, place = len(net) - 1, "pre" if at == "pre_activations" else "signals"
    totals = [np.zeros(z.shape) for z in trace.pre]
    for noise in directions:
        if method == "jvp":
            product = e * output_tangent(net, x, **{place: noise})
            derivative = product.reshape(len(e), -1).sum(axis=1)
        else:
            up, down = (objectives_at(noisy_outputs(net, x, s, **{place: noise})) for s in (std, -std))
            derivative = (up - down) / (2 * std)
        for k in range(len(net)):
            u = noise[k] if place == "pre" else noise[k + 1] if k < top else None
            if u is None:
                continue
            d = derivative.reshape(-1, *[1] * (np.ndim(u) - 1)) * np.asarray(u)
            totals[k] += d if place == "pre" else nets.to_pre_activation(net, trace, k, d)
    arriving = [d / len(directions) for d in totals]
    if place == "signals" or directions[0][top] is None:
        arriving[top] = nets.to_pre_activation(net, trace, top, e)
    return _from_pre_activations(net, trace, x, arriving)


def local_gradients(net, x, directions, signals, e):
    """Ren et al. with layer-local losses: D_i of layer k is (signal at r_{k+1}) . (its tangent by u_k alone).

    Args:
      net, x: as above.
      directions: a list of [u_0, ..., u_{L-2}, None], u_k of the shape of z_k.
      signals: [None, s_1, ..., s_{L-1}], the gradients of the local losses at the hidden signals r_k.
      e: output error: the last layer gets its true gradient.
    """
    trace = nets.forward(net, x)
    arriving = []
    for k, layer in enumerate(net[:-1]):
        total = np.zeros(trace.pre[k].shape)
        for noise in directions:
            moved = np.asarray(noise[k]) * nets.slope(layer.activation, trace.pre[k])
            moved = pool_tangent(layer, trace.activations[k], moved)
            product = np.asarray(signals[k + 1]).reshape(len(moved), -1) * moved.reshape(len(moved), -1)
            total += product.sum(axis=1).reshape(-1, *[1] * (total.ndim - 1)) * np.asarray(noise[k])
        arriving.append(total / len(directions))
    arriving.append(nets.to_pre_activation(net, trace, len(net) - 1, np.asarray(e, dtype=np.float64)))
    return _from_pre_activations(net, trace, x, arriving)


def _from_pre_activations(net, trace, x, arriving):
    kernels = [nets.kernel_gradient(layer, r, d) for layer, r, d in zip(net, trace.reads, arriving, strict=True)]
    biases = [nets.bias_gradient(layer, d) for layer, d in zip(net, arriving, strict=True)]
    inputs = nets.transpose(net[0], net[0].kernel, arriving[0], trace.reads[0].shape)
    return nets.Gradients(kernels, biases, inputs.reshape(np.shape(x)))
