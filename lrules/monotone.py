"""Mono-nets: networks whose layers, all but the first, have weights >= 0, and increasing activations (Lechner 2020).

Such a network increases with everything that its first layer makes, so that with one output the error of an example has
the same sign everywhere above the first layer, and direct feedback with positive weights agrees with the gradient in
sign (`lrules.monotone_dfa`, Theorem 2). Biases are free. *The first layer* is every layer that reads data.

    params = monotone.initialize(key, net, params, inputs, monotone.uniform())
    optimizer = optax.chain(optax.adam(1e-3), monotone.constrain(net, params, inputs))
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lrules.feedback import absolute
from lrules.network import Graph, Network, as_network
from lrules.plan import Entry, Sequential, layer_entries
from lrules.rule import Initializer

Pytree = Any
BOUND = 1e-6


zeros: Initializer = jax.nn.initializers.zeros  # the paper's best start for all activations but ReLU


def uniform(low: float = 1e-3, high: float | None = None) -> Initializer:
    """Uniform between a positive lower bound and an upper one.

    W ~ U(low, high)

    Args:
      low: the lower bound.
      high: the upper bound; by default 1 / sqrt(fan_in).

    Raises:
      ValueError: the lower bound is not positive, or not below the upper one.

    References:
      Lechner (2020), section 4.
    """
    if not 0 < low or (high is not None and not low < high):
        raise ValueError(f"uniform(low={low}, high={high}): weights of a mono-net need 0 < low < high")

    def init(key, shape, dtype=jnp.float32):
        top = high if high is not None else max(1 / math.sqrt(math.prod(shape[:-1])), low)
        return jax.random.uniform(key, shape, dtype, low, top)

    return init


def absolute_normal(init: Initializer | None = None) -> Initializer:
    """Absolute values of normal weights.

    W = |W'|,  W' ~ N

    Args:
      init: the initialiser of W'; default `jax.nn.initializers.glorot_normal()`.

    References:
      Lechner (2020), section 4.
    """
    return absolute(init)


def constrained(net: Network | Callable, params: Pytree, inputs: Pytree) -> Pytree:
    """Which parameters a mono-net constrains: the weights of all layers but the first.

    Args:
      net: the network.
      params, inputs: as it takes them; `ShapeDtypeStruct`s will do.

    Returns:
      A pytree of the structure of `params`, True for a constrained parameter.

    Raises:
      ValueError: a first layer has its weight in common with another layer.
    """
    net = as_network(net)
    names = _weights(net.graph(params, inputs))
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [i in names for i in range(len(leaves))])


def _weights(graph: Graph, init: Initializer = zeros) -> dict[int, Entry]:
    """The weights of all layers but the first, by their number among the parameters."""
    spec = Sequential(lambda *_: (None, None, None), init)
    first = frozenset().union(*(layer.weight.params for layer in graph.layers if layer.reads is None))
    found = {e.index: e for layer in graph.layers if layer.reads is not None for e in layer_entries(graph, layer, spec)}
    if shared := first & set(found):
        raise ValueError(
            f"the parameter {graph.names[min(shared)]!r} is the weight of a first layer, which a mono-net leaves free, "
            "and of another one, which it constrains: give the two layers weights of their own"
        )
    return found


def initialize(key, net: Network | Callable, params: Pytree, inputs: Pytree, init: Initializer | None = None) -> Pytree:
    """Draws the weights of all layers but the first anew; other parameters stay as they are.

    Args:
      key: a PRNG key.
      net, params, inputs: the network and what it takes.
      init: the initialiser, applied to each layer's `[fan_in, fan_out]` (a convolution: `[*window, in, out]`): `zeros`
        (for all activations but ReLU the best, with the first layer at zero too), `uniform()` or `absolute_normal()`,
        the default. One that draws negative weights makes no mono-net.

    Returns:
      Parameters of a mono-net.

    References:
      Lechner (2020), sections 4 and B.3.
    """
    net = as_network(net)
    graph = net.graph(params, inputs)
    leaves, tree = jax.tree.flatten(params)
    for index, entry in _weights(graph, init or absolute_normal()).items():
        k = jax.random.fold_in(key, zlib.crc32(graph.names[index].encode()) & 0x7FFFFFFF)
        leaves[index] = entry.draw(k, leaves[index])
    return jax.tree.unflatten(tree, leaves)


class ConstrainState(NamedTuple):
    """The constraint carries nothing."""


def constrain(
    net: Network | Callable, params: Pytree, inputs: Pytree, bound: float = BOUND
) -> optax.GradientTransformationExtraArgs:
    """Keeps a mono-net one: lifts weights of all layers but the first to a positive bound after each step.

    W <- max(W + dW, bound)

    Chain it after any optimizer, last: it changes the updates so that the weights come out as said.

    Args:
      net, params, inputs: the network and what it takes, to tell which layers are not the first; `ShapeDtypeStruct`s
        will do.
      bound: the smallest weight.

    Returns:
      An optax transformation; its `update` needs `params`.

    Raises:
      ValueError: the bound is negative, or at use, `params` is missing.

    Example:
      >>> apply = lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"]
      >>> params = {"first": -jnp.ones((3, 2)), "second": jnp.ones((2, 1))}
      >>> positive = constrain(apply, params, jnp.zeros((1, 3)))
      >>> step = jax.tree.map(lambda p: -2 * jnp.ones_like(p), params)
      >>> updates, _ = positive.update(step, positive.init(params), params)
      >>> float(optax.apply_updates(params, updates)["second"].min()) > 0
      True

    References:
      Lechner (2020), section 4.
    """
    if bound < 0:
        raise ValueError(
            f"bound={bound} lets weights of a mono-net become negative: give zero or a small positive number"
        )
    mask = constrained(net, params, inputs)

    def init(params):
        return ConstrainState()

    def update(updates, state, params=None, **extra: Any):
        if params is None:
            raise ValueError("monotone.constrain needs the parameters: optimizer.update(grads, state, params)")

        def lift(positive, u, p):
            if not positive:
                return u
            floor = jnp.asarray(bound, p.dtype)
            lifted = jnp.where(p + u < floor, floor - p, u)  # p + (floor - p) may round to just below the floor
            return jnp.where(p + lifted < floor, jnp.nextafter(lifted, jnp.full_like(lifted, jnp.inf)), lifted)

        flat = jax.tree.map(lift, jax.tree.leaves(mask), jax.tree.leaves(updates), jax.tree.leaves(params))
        return jax.tree.unflatten(jax.tree.structure(updates), flat), state

    return optax.GradientTransformationExtraArgs(init, update)


def check(net: Network | Callable, params: Pytree, inputs: Pytree) -> None:
    """Checks that a network is a mono-net.

    Args:
      net, params, inputs: the network and what it takes.

    Raises:
      ValueError: a weight above the first layer is negative, or an activation decreases somewhere, and which.
    """
    net = as_network(net)
    graph = net.graph(params, inputs)
    leaves = jax.tree.leaves(params)
    for index in _weights(graph):
        if bool(jnp.any(leaves[index] < 0)):
            raise ValueError(
                f"the weight {graph.names[index]!r} has negative entries and does not belong to the first layer: start "
                "from monotone.initialize and chain monotone.constrain after the optimizer"
            )
    for activation in graph.activations:
        if activation.name in ("gelu", "silu", "swish", "mish", "hard_silu", "hard_swish"):
            raise ValueError(
                f"the activation {activation.site!r} is not increasing: use one that is, such as tanh, sigmoid or relu"
            )


def from_sigmoid(first: Any, first_bias: Any, second: Any, second_bias: Any) -> tuple[Any, Any, Any, Any]:
    """Turns a sigmoid net with one hidden layer into a mono-net with tanh, of twice the width and the same output.

    sum_i v_i sigma(w_i x + b_i) = sum_i |v_i| / 2 tanh(sign(v_i) (w_i x + b_i) / 2) + sum_i v_i / 2

    With several outputs v_i may have either sign, so each unit is there twice, once turned round.

    Args:
      first, first_bias: `[inputs, N]` and `[N]`, of the hidden layer.
      second, second_bias: `[N, outputs]` and `[outputs]`, of the output.

    Returns:
      The same four of the mono-net `tanh(x @ first + first_bias) @ second + second_bias`, with 2 N hidden units and
      `second >= 0`.

    References:
      Lechner (2020), Theorem 3 (A.1), where the halves of w and b are missing: sigma(x) = (1 + tanh(x / 2)) / 2.
    """
    first, first_bias, second, second_bias = map(jnp.asarray, (first, first_bias, second, second_bias))
    return (
        jnp.concatenate([first, -first], axis=1) / 2,
        jnp.concatenate([first_bias, -first_bias]) / 2,
        jnp.concatenate([jnp.maximum(second, 0), jnp.maximum(-second, 0)]) / 2,
        second_bias + second.sum(0) / 2,
    )
