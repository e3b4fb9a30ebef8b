"""Chains of dense and convolutional layers: forward passes, and the transposes that backward passes are made of.

A net is a list of `Layer`s, the last one giving the outputs. With r_k the tensor that layer k reads (r_0 the inputs),

    z_k = op_k(W_k, r_k) + b_k          pre-activation
    a_k = f_k(z_k)                      activation
    p_k = pool_k(a_k)                   the same as a_k where the layer has no pooling
    r_{k+1} = p_k                       flattened per example in C order if layer k + 1 is dense and p_k is a map

Dense: z = r W, W [in, out]. Convolution: NHWC maps, HWIO kernels, cross-correlation (no flipping), "VALID" or "SAME";
SAME pads max((ceil(n / s) - 1) s + k - n, 0) zeros in all along an axis, the smaller half in front. Pooling windows are
never padded; what does not fill a window is left out. Among equal maxima the first in row-major order gets the signal.

Layers are counted from 0. `r_k` for k >= 1 is a *hidden signal*, named after the layer that reads it.
"""

import math
from typing import Any, NamedTuple

import numpy as np


class Layer(NamedTuple):
    """One layer; dense if `kernel` has rank 2, convolutional if it has rank 4."""

    kernel: np.ndarray  # [in, out] or [height, width, in, out]
    bias: np.ndarray | None = None  # [out]
    activation: str = "identity"
    stride: tuple[int, int] = (1, 1)
    padding: str = "VALID"  # or "SAME"
    pool: str | None = None  # "max", "average"
    window: int = 2
    pool_stride: int = 2


class Trace(NamedTuple):
    """What a forward pass leaves, one entry per layer."""

    reads: list[np.ndarray]  # r_k, [batch, in] or [batch, height, width, in]
    pre: list[np.ndarray]  # z_k
    activations: list[np.ndarray]  # a_k
    pooled: list[np.ndarray]  # p_k

    @property
    def outputs(self):
        return self.pooled[-1]


class Gradients(NamedTuple):
    """Gradients by layer, all with the sign of a gradient: an optimizer subtracts them."""

    kernels: list[np.ndarray]
    biases: list[np.ndarray | None]
    inputs: np.ndarray
    feedback: list[np.ndarray | None] | None = None  # by reading layer; None where nothing is learned


def dense(kernel, bias=None, activation="identity"):
    """A dense layer, kernel [in, out]."""
    return Layer(_float64(kernel), _float64(bias), activation)


def conv(kernel, bias=None, activation="identity", **options):
    """A convolutional layer, kernel [height, width, in, out]; options: stride, padding, pool, window, pool_stride."""
    return Layer(_float64(kernel), _float64(bias), activation, **options)


def dense_net(kernels, biases, activations):
    """A net of dense layers; `activations` has one name per hidden layer, the last layer is linear."""
    return [dense(*layer) for layer in zip(kernels, biases, [*activations, "identity"], strict=True)]


def _float64(x):
    return None if x is None else np.asarray(x, dtype=np.float64)


# --- activations ------------------------------------------------------------------------------------------------------


def _sigmoid(z):
    return 0.5 * (1 + np.tanh(z / 2))


_GELU = math.sqrt(2 / math.pi)


def _gelu_slope(z):
    t = np.tanh(_GELU * (z + 0.044715 * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * _GELU * (1 + 3 * 0.044715 * z**2)


# name: (f, f'). At a kink the slope is the one of the left piece for relu, relu6, hard_tanh, elu.
ACTIVATIONS: dict[str, Any] = {
    "identity": (lambda z: z, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(np.float64)),
    "relu6": (lambda z: np.clip(z, 0, 6), lambda z: ((z > 0) & (z < 6)).astype(np.float64)),
    "hard_tanh": (lambda z: np.clip(z, -1, 1), lambda z: ((z > -1) & (z < 1)).astype(np.float64)),
    "leaky_relu": (lambda z: np.where(z >= 0, z, 0.01 * z), lambda z: np.where(z >= 0, 1.0, 0.01)),
    "elu": (lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0))), lambda z: np.exp(np.minimum(z, 0))),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "sigmoid": (_sigmoid, lambda z: _sigmoid(z) * (1 - _sigmoid(z))),
    "softplus": (lambda z: np.logaddexp(z, 0), _sigmoid),
    "silu": (lambda z: z * _sigmoid(z), lambda z: _sigmoid(z) * (1 + z * (1 - _sigmoid(z)))),
    "gelu": (lambda z: 0.5 * z * (1 + np.tanh(_GELU * (z + 0.044715 * z**3))), _gelu_slope),
}


def activate(name, z):
    """f(z)."""
    return ACTIVATIONS[name][0](z)


def slope(name, z):
    """f'(z), the default of every rule's `derivative`."""
    return ACTIVATIONS[name][1](z)


def no_slope(name, z):
    """1 in place of f'(z): the rules "(no f')"."""
    del name
    return np.ones_like(z)


def unmodified(signal, layer):
    """The default of every rule's `modify`: the signal that arrives at hidden signal r_layer, as it is."""
    del layer
    return signal


# --- one layer's multiplication and its transposes --------------------------------------------------------------------


def multiply(layer, kernel, r):
    """op(kernel, r) without bias: what `layer` does, with any kernel of its shape."""
    if kernel.ndim == 2:
        return r @ kernel
    padded = np.pad(r, _padding(layer, r.shape))
    height, width, rows, columns = _windows(layer, padded.shape)
    z = np.zeros((r.shape[0], rows, columns, kernel.shape[3]))
    for y in range(rows):
        for x in range(columns):
            patch = padded[:, _span(y, layer.stride[0], height), _span(x, layer.stride[1], width)]
            z[:, y, x] = np.einsum("bhwi,hwio->bo", patch, kernel)
    return z


def kernel_gradient(layer, r, d):
    """sum over batch and positions of d (shape of z) times what the layer reads there: the shape of the kernel."""
    if layer.kernel.ndim == 2:
        return r.T @ d
    padded = np.pad(r, _padding(layer, r.shape))
    height, width, rows, columns = _windows(layer, padded.shape)
    gradient = np.zeros(layer.kernel.shape)
    for y in range(rows):
        for x in range(columns):
            patch = padded[:, _span(y, layer.stride[0], height), _span(x, layer.stride[1], width)]
            gradient += np.einsum("bhwi,bo->hwio", patch, d[:, y, x])
    return gradient


def bias_gradient(layer, d):
    """sum over batch and positions of d; None for a layer without bias."""
    return None if layer.bias is None else d.reshape(-1, d.shape[-1]).sum(axis=0)


def transpose(layer, kernel, d, shape):
    """op(kernel, .)^T d: the signal for what the layer reads, of `shape`."""
    if kernel.ndim == 2:
        return d @ kernel.T
    pads = _padding(layer, shape)
    below = np.zeros([n + low + high for n, (low, high) in zip(shape, pads, strict=True)])
    height, width, rows, columns = _windows(layer, below.shape)
    for y in range(rows):
        for x in range(columns):
            part = np.einsum("bo,hwio->bhwi", d[:, y, x], kernel)
            below[:, _span(y, layer.stride[0], height), _span(x, layer.stride[1], width)] += part
    return below[tuple(slice(low, low + n) for n, (low, _) in zip(shape, pads, strict=True))]


def _padding(layer, shape):
    pads = [(0, 0)] * 4
    for axis, k, s in zip((1, 2), layer.kernel.shape[:2], layer.stride, strict=True):
        if layer.padding == "SAME":
            total = max((math.ceil(shape[axis] / s) - 1) * s + k - shape[axis], 0)
            pads[axis] = (total // 2, total - total // 2)
    return pads


def _windows(layer, padded):
    height, width = layer.kernel.shape[:2]
    rows = (padded[1] - height) // layer.stride[0] + 1
    columns = (padded[2] - width) // layer.stride[1] + 1
    return height, width, rows, columns


def _span(index, stride, size):
    return slice(index * stride, index * stride + size)


# --- pooling ----------------------------------------------------------------------------------------------------------


def pool(layer, a):
    """pool(a), [batch, height, width, channels]."""
    if layer.pool is None:
        return a
    reduce = {"max": np.max, "average": np.mean}[layer.pool]
    rows, columns = ((n - layer.window) // layer.pool_stride + 1 for n in a.shape[1:3])
    pooled = np.zeros((a.shape[0], rows, columns, a.shape[3]))
    for y in range(rows):
        for x in range(columns):
            window = a[:, _span(y, layer.pool_stride, layer.window), _span(x, layer.pool_stride, layer.window)]
            pooled[:, y, x] = reduce(window, axis=(1, 2))
    return pooled


def unpool(layer, a, signal):
    """The signal at pool(a) brought to a by the true derivative of pooling at a."""
    if layer.pool is None:
        return signal
    below = np.zeros(a.shape)
    for y in range(signal.shape[1]):
        for x in range(signal.shape[2]):
            rows, columns = _span(y, layer.pool_stride, layer.window), _span(x, layer.pool_stride, layer.window)
            if layer.pool == "average":
                below[:, rows, columns] += signal[:, y, x][:, None, None, :] / layer.window**2
                continue
            for example in range(a.shape[0]):
                for channel in range(a.shape[3]):
                    window = a[example, rows, columns, channel]
                    i, j = np.unravel_index(np.argmax(window), window.shape)
                    below[example, rows.start + i, columns.start + j, channel] += signal[example, y, x, channel]
    return below


# --- the chain --------------------------------------------------------------------------------------------------------


def as_read(layer, p):
    """p as `layer` reads it: flattened per example for a dense layer."""
    return p.reshape(p.shape[0], -1) if layer.kernel.ndim == 2 else p


def pre_activation(layer, r):
    """z = op(W, r) + b."""
    return multiply(layer, layer.kernel, r) + (0 if layer.bias is None else layer.bias)


def forward(net, inputs):
    """The forward pass: inputs [batch, ...] -> `Trace`."""
    trace = Trace([], [], [], [])
    p = np.asarray(inputs, dtype=np.float64)
    for layer in net:
        r = as_read(layer, p)
        z = pre_activation(layer, r)
        a = activate(layer.activation, z)
        p = pool(layer, a)
        for values, value in zip(trace, (r, z, a, p), strict=True):
            values.append(value)
    return trace


def to_pre_activation(net, trace, k, signal, derivative=slope):
    """The signal at p_k (in that shape or flattened) brought down to z_k: through pooling, then times f'(z_k)."""
    signal = unpool(net[k], trace.activations[k], signal.reshape(trace.pooled[k].shape))
    return signal * derivative(net[k].activation, trace.pre[k])
