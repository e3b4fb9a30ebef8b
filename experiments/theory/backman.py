"""BackMAN as the best response of neurons that want the attention of the next layer (sections 3.3, 3.4, A.3, A.4).

Soltani Moakhar et al.: Seeking next layer neurons' attention for error-backpropagation-like training in a multi-agent
network framework.

Neuron i of layer l chooses a change b of its input weights, |b| <= alpha. Then the layer above makes its BackMAN
update. The neuron wants a large norm of its output connections after this update (Eq. 2, 33; filters Eq. 12, 78):

    U_i(b) = || (w^{l+1} + g^{l+1 t} a^l(b))_{:i} ||,    in the last layer U_i(b) = -loss    (Eq. 3)

Theorems 3.2 and 3.3: the best response approaches the BackMAN update as alpha -> 0, *if g^{l+1} does not respond to b*.
The paper calls this response of g marginal. `responding=True` measures it: with g responding, the mean cosine of best
response and update stays at about 0.9 for every alpha, and grows slowly with the width, if at all.

The last axis of weights is the output neurons or filters: [in, out], or [height, width, in, out] for images
[n, h, w, in].
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lrules


class Net(NamedTuple):
    """A network of layers a_l = f(op(w_l, a_{l-1})); the last layer has no f. It is hashable."""

    op: Callable[[Any, Any], Any]
    activation: Callable[[Any], Any] = jax.nn.relu


class Data(NamedTuple):
    """The inputs and targets of the whole batch."""

    inputs: Any  # [n, ...]
    targets: Any  # the shape of the outputs


class Responses(NamedTuple):
    """Best responses compared with BackMAN updates: one entry for each neuron of a layer with a nonzero update."""

    cosine: np.ndarray
    length: np.ndarray  # |best response| / |BackMAN update|


def dense(w: Any, x: Any) -> Any:
    """x [n, in] times w [in, out]."""
    return x @ w


def conv(w: Any, x: Any) -> Any:
    """x [n, h, w, in] convolved with w [height, width, in, out], without padding."""
    return jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def loss(outputs: Any, targets: Any) -> Any:
    """Half the mean squared distance."""
    return 0.5 * ((outputs - targets) ** 2).sum() / len(targets)


def forward(net: Net, weights: tuple, inputs: Any) -> tuple[list, list]:
    """(the input of each layer, its pre-activations)."""
    reads, pre = [inputs], []
    for w in weights:
        pre.append(net.op(w, reads[-1]))
        reads.append(net.activation(pre[-1]))
    return reads[:-1], pre


@functools.partial(jax.jit, static_argnums=0)
def updates(net: Net, weights: tuple, data: Data, alpha: Any) -> tuple[list, list]:
    """Algorithms 1 and 2: (g, weight updates g^t a), both for each layer. If alpha is None, c = 1.

    r^L = -dloss/dz^L, c_i = alpha / ||(r^t a)_i||, g = r diag(c), r^{l-1} = op(w, .)^t g * f'(z^{l-1})    (Eq. 5 to 9)
    """
    reads, pre = forward(net, weights, data.inputs)
    r = -jax.grad(loss)(pre[-1], data.targets)
    gs, changes = [], []
    for layer in reversed(range(len(weights))):
        raw = weight_signal(net, weights[layer], reads[layer], r)
        squares = (raw**2).sum(tuple(range(raw.ndim - 1)), keepdims=True)
        alive = squares > 0
        norm = jnp.sqrt(jnp.where(alive, squares, 1))
        c = jnp.ones_like(norm) if alpha is None else jnp.where(alive, alpha / norm, 0)
        gs.append(r * c)
        changes.append(raw * c)
        if layer:
            below = jax.vjp(functools.partial(net.op, weights[layer]), reads[layer])[1](gs[-1])[0]
            r = jax.vjp(net.activation, pre[layer - 1])[1](below)[0]
    return gs[::-1], changes[::-1]


def weight_signal(net: Net, w: Any, a: Any, g: Any) -> Any:
    """g^t a; for a convolution psi(g, a)."""
    return jax.vjp(lambda w: net.op(w, a), w)[1](g)[0]


@functools.partial(jax.jit, static_argnums=0)
def gradient(net: Net, weights: tuple, data: Data) -> tuple:
    """The gradient of the loss."""
    return jax.grad(lambda w: loss(forward(net, w, data.inputs)[1][-1], data.targets))(weights)


@functools.partial(jax.jit, static_argnums=(0, 3))
def library_gradient(net: Net, weights: tuple, data: Data, alpha: float) -> tuple:
    """The gradient of the loss under `lrules.backman(alpha)`."""
    f = lrules.transform(lambda w, inputs: forward(net, w, inputs)[1][-1], lrules.backman(alpha))
    return jax.grad(lambda w: loss(f(w, lrules.Feedback({}, {}), data.inputs), data.targets))(weights)


def utility(net: Net, weights: tuple, data: Data, alpha: Any, layer: int, unit: Any, response: Any, frozen: Any) -> Any:
    """U_i(b) of neuron `unit` (Eq. 2, 3, 12). g^{l+1} is from `frozen`; if `frozen` is None, it responds to b."""
    moved = tuple(w.at[..., unit].add(response) if i == layer else w for i, w in enumerate(weights))
    reads, pre = forward(net, moved, data.inputs)
    if layer == len(weights) - 1:
        return -loss(pre[-1], data.targets)
    g = (updates(net, moved, data, alpha)[0] if frozen is None else frozen)[layer + 1]
    above = weights[layer + 1] + weight_signal(net, weights[layer + 1], reads[layer + 1], g)
    return jnp.sqrt((above[..., unit, :] ** 2).sum())


@functools.partial(jax.jit, static_argnames=("net", "layer", "responding", "steps"))
def _best_responses(net, weights, data, alpha, layer, responding, steps):
    """Projected gradient ascent on U in the ball |b| <= alpha, from b = 0, for every neuron of the layer."""
    frozen = None if responding else updates(net, weights, data, alpha)[0]

    def best(unit):
        uphill = jax.grad(lambda b: utility(net, weights, data, alpha, layer, unit, b, frozen))
        start = jnp.zeros_like(weights[layer][..., 0])
        slope = jnp.sqrt((uphill(start) ** 2).sum())
        rate = jnp.where(slope > 0, 2 * alpha / slope, 0)

        def step(_, b):
            b = b + rate * uphill(b)
            return b * jnp.minimum(1, alpha / jnp.sqrt((b**2).sum()))

        return jax.lax.fori_loop(0, steps, step, start)

    return jax.lax.map(best, jnp.arange(weights[layer].shape[-1]))  # [units, ...]; vmap compiles much more slowly


def best_responses(
    net: Net, weights: tuple, data: Data, alpha: float, layer: int, *, responding: bool = False, steps: int = 50
) -> Responses:
    """The best responses of the neurons of a layer, one neuron at a time, compared with their BackMAN updates.

    Dead neurons, with an update of zero, are left out: the theorems say nothing about them.

    Args:
      net, weights, data: the network and its whole batch.
      alpha: the limit of |b|, for every neuron.
      layer: the number of the layer, from 0.
      responding: False keeps g^{l+1} fixed, as the theorems assume. True lets it respond to b.
      steps: the steps of projected gradient ascent.
    """
    with jax.enable_x64(True):
        weights, data, limit = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), (weights, data, alpha))
        best = np.asarray(_best_responses(net, weights, data, limit, layer, responding, steps))
        update = np.asarray(updates(net, weights, data, limit)[1][layer])
    best = best.reshape(len(best), -1)
    update = np.moveaxis(update, -1, 0).reshape(len(best), -1)
    alive = np.abs(update).max(1) > 0
    best, update = best[alive], update[alive]
    norms = np.linalg.norm(best, axis=1), np.linalg.norm(update, axis=1)
    return Responses((best * update).sum(1) / (norms[0] * norms[1]), norms[0] / norms[1])


def random_dense(seed: int, sizes: tuple[int, ...] = (6, 8, 7, 4), examples: int = 24) -> tuple[Net, tuple, Data]:
    """A ReLU net, its weights, inputs [examples, in] and targets [examples, out], drawn from normal distributions."""
    rng = np.random.default_rng(seed)
    weights = tuple(rng.normal(size=(m, n)) * np.sqrt(2 / m) for m, n in zip(sizes, sizes[1:], strict=False))
    return Net(dense), weights, Data(*(rng.normal(size=(examples, n)) for n in (sizes[0], sizes[-1])))


def random_conv(seed: int, examples: int = 12) -> tuple[Net, tuple, Data]:
    """A ReLU net of three convolutions (the last has a 1 x 1 output), with images [examples, 6, 6, 2] and targets."""
    rng = np.random.default_rng(seed)
    shapes = (3, 3, 2, 5), (3, 3, 5, 4), (2, 2, 4, 3)
    weights = tuple(rng.normal(size=s) * np.sqrt(2 / np.prod(s[:-1])) for s in shapes)
    return Net(conv), weights, Data(rng.normal(size=(examples, 6, 6, 2)), rng.normal(size=(examples, 1, 1, 3)))
