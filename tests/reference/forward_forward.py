"""Forward-forward: each layer tells positive data from negative by its goodness (Hinton 2022, section 2).

Two forward passes, of positive inputs and of negative ones, through the same layers; no error comes from above. With
y_k the activations of layer k before pooling, all of them summed over (features, or positions and channels):

    G_k      = sum y_k^2                            `goodness="mean"`: the mean, so that theta need not know the width
    p        = sigmoid(G_k - theta)                 Eq. 1, the probability of being positive
    L_k      = mean_i -log p(positive_i) + mean_i -log(1 - p(negative_i))
             = mean softplus(theta - G+) + mean softplus(G- - theta)
    d_k      = dL_k/dG_k 2 y_k * f'(z_k),   dW_k = sum d_k r_k,   db_k = sum d_k        over both passes

Between layers the length is taken away, so that the next layer does not read the goodness of this one (section 2.1):
r_{k+1} = y / |y| per example, after pooling (`epsilon` is added to |y|, 0 here; a zero vector stays zero). The inputs
are read as they are. Every layer is trained so, the last one, too.

Labels (section 3.3): the first entries of a flattened input are replaced by a one-hot label, the right one (positive)
or a wrong one (negative): `embed`. A class is read off by trying each label; the one with the highest goodness summed
over all layers but the first is taken: `scores`.

Choices: the two means are added (for equally many examples: twice the mean over all); theta is one number for all
layers.
"""

import numpy as np

from . import nets


def _sigmoid(z):
    return 0.5 * (1 + np.tanh(z / 2))


def normalise(p, epsilon=0.0):
    """p / (|p| + epsilon) per example; zero stays zero."""
    norms = np.sqrt((p.reshape(len(p), -1) ** 2).sum(axis=1)).reshape(-1, *[1] * (p.ndim - 1))
    return np.where(norms > 0, p / np.where(norms > 0, norms + epsilon, 1.0), 0.0)


def forward(net, x, epsilon=0.0):
    """The pass with lengths taken away between layers: a `nets.Trace`."""
    trace = nets.Trace([], [], [], [])
    p = np.asarray(x, dtype=np.float64)
    for k, layer in enumerate(net):
        r = nets.as_read(layer, p if k == 0 else normalise(p, epsilon))
        z = nets.pre_activation(layer, r)
        a = nets.activate(layer.activation, z)
        p = nets.pool(layer, a)
        for values, value in zip(trace, (r, z, a, p), strict=True):
            values.append(value)
    return trace


def goodnesses(trace, goodness="sum"):
    """G_k by layer, each [batch]."""
    reduce = {"sum": np.sum, "mean": np.mean}[goodness]
    return [reduce(a.reshape(len(a), -1) ** 2, axis=1) for a in trace.activations]


def gradients(net, positive, negative, *, theta, goodness="sum", epsilon=0.0):
    """(kernels, biases, L_k), each by layer.

    Args:
      net: a list of `nets.Layer`.
      positive, negative: inputs [batch, ...] each.
      theta: the threshold.
      goodness: "sum" or "mean" of the squares.
      epsilon: what is added to lengths.
    """
    kernels, biases, values = [0.0] * len(net), [0.0] * len(net), [0.0] * len(net)
    for x, sign in ((positive, 1.0), (negative, -1.0)):
        trace = forward(net, x, epsilon)
        for k, (layer, g) in enumerate(zip(net, goodnesses(trace, goodness), strict=True)):
            values[k] += np.logaddexp(0, sign * (theta - g)).mean()
            slope = -sign * _sigmoid(sign * (theta - g)) / len(g)
            a = trace.activations[k]
            share = 1.0 if goodness == "sum" else 1 / a[0].size
            d = slope.reshape(-1, *[1] * (a.ndim - 1)) * 2 * share * a * nets.slope(layer.activation, trace.pre[k])
            kernels[k] = kernels[k] + nets.kernel_gradient(layer, trace.reads[k], d)
            biases[k] = None if layer.bias is None else biases[k] + nets.bias_gradient(layer, d)
    return kernels, biases, values


def embed(x, labels):
    """x with the first entries of each flattened example replaced by `labels` [batch, classes], one-hot."""
    flat = np.array(x, dtype=np.float64).reshape(len(x), -1)
    flat[:, : np.shape(labels)[1]] = labels
    return flat.reshape(np.shape(x))


def scores(net, x, classes, *, goodness="sum", epsilon=0.0, first=1):
    """[batch, classes]: the goodness of each label, summed over layers from `first` on."""
    columns = []
    for label in range(classes):
        labels = np.tile(np.eye(classes)[label], (len(x), 1))
        found = goodnesses(forward(net, embed(x, labels), epsilon), goodness)
        columns.append(sum(found[first:]))
    return np.stack(columns, axis=1)
