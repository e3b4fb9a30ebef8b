"""From a reference net (`tests.reference.nets`) to a JAX function with the same parameters, and random such nets."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.reference import nets

ACTIVATIONS = {
    "identity": lambda z: z,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "hard_tanh": jax.nn.hard_tanh,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
}


def parameters(net):
    """The net's weights as a pytree: `{"0": {"kernel", "bias"}, ...}`."""
    out = {}
    for k, layer in enumerate(net):
        out[str(k)] = {"kernel": jnp.asarray(layer.kernel)}
        if layer.bias is not None:
            out[str(k)]["bias"] = jnp.asarray(layer.bias)
    return out


def apply_of(net):
    """The net as a JAX function `apply(params, inputs) -> outputs`."""

    def apply(params, x):
        for k, layer in enumerate(net):
            p = params[str(k)]
            if layer.kernel.ndim == 2:
                z = x.reshape(x.shape[0], -1) @ p["kernel"]
            else:
                z = jax.lax.conv_general_dilated(
                    x, p["kernel"], layer.stride, layer.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            if "bias" in p:
                z = z + p["bias"].reshape((1,) * (z.ndim - 1) + (-1,))
            x = ACTIVATIONS[layer.activation](z)
            if layer.pool:
                x = _pool(x, layer)
        return x

    return apply


def _pool(x, layer):
    window, stride = (1, layer.window, layer.window, 1), (1, layer.pool_stride, layer.pool_stride, 1)
    if layer.pool == "max":
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, stride, "VALID")
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, stride, "VALID") / layer.window**2


def feedback_dict(feedback):
    """A reference's feedback `[None, B_1, ...]` by the library's names."""
    return {f"{k}/kernel": jnp.asarray(b) for k, b in enumerate(feedback) if b is not None}


def kernels_and_biases(grads):
    """A reference's gradients in the structure of `parameters`."""
    out = {}
    for k, (w, b) in enumerate(zip(grads.kernels, grads.biases, strict=True)):
        out[str(k)] = {"kernel": w} if b is None else {"kernel": w, "bias": b}
    return out


def random_dense(rng, sizes, activations, scale=1.0):
    """A dense net of the given sizes."""
    kernels = [rng.normal(size=s) * scale / np.sqrt(s[0]) for s in zip(sizes[:-1], sizes[1:], strict=True)]
    return nets.dense_net(kernels, [rng.normal(size=n) * 0.3 for n in sizes[1:]], activations)


def random_conv(rng, activation="tanh", pool="max"):
    """conv (SAME) - pool - conv (strided) - dense - dense on 6x6x2 maps, with 3 outputs."""

    def draw(*shape):
        return rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))

    return [
        nets.conv(draw(3, 3, 2, 4), rng.normal(size=4) * 0.1, activation, padding="SAME", pool=pool),
        nets.conv(draw(2, 2, 4, 5), rng.normal(size=5) * 0.1, activation, stride=(1, 1), padding="VALID"),
        nets.dense(draw(20, 7), rng.normal(size=7) * 0.1, activation),
        nets.dense(draw(7, 3), rng.normal(size=3) * 0.1),
    ]


def close(got, wanted, tolerance=1e-10):
    """Both pytrees agree, relative to the largest entry of each leaf."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        g, w = np.asarray(g), np.asarray(w)
        assert g.shape == w.shape
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance * max(np.max(np.abs(w), initial=0), 1e-3))
