"""Mono-nets: networks with increasing activations, and weights >= 0 in all layers but the first (Lechner 2020).

The outputs of such a network increase with everything that its first layer computes. So with one output, the error of
an example has the same sign everywhere above the first layer, and direct feedback with positive weights has the same
sign as the gradient (`lrules.monotone_dfa`, Theorem 2). Biases are free. *The first layer* is every layer that reads
data.

    params = monotone.initialize(key, net, params, inputs, init=monotone.uniform())
    optimizer = optax.chain(optax.adam(1e-3), monotone.constrain(net, params, inputs))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lrules.engine.activations import sampled
from lrules.engine.handlers import name_number
from lrules.extend import (
    Activation,
    Frame,
    Graph,
    Handler,
    Layer,
    Operation,
    Sequential,
    SequentialFeedback,
    all_zeros_at,
    as_network,
    sequential_feedback_of,
)
from lrules.feedback import absolute
from lrules.network import NetworkLike
from lrules.options import is_number
from lrules.typing import Initializer, Pytree

if TYPE_CHECKING:
    import optax

__all__ = [
    "ConstrainState",
    "absolute_normal",
    "check",
    "constrain",
    "constrained",
    "from_sigmoid",
    "initialize",
    "uniform",
    "zeros",
]

BOUND = 1e-6
PROBES = 4


zeros: Initializer = jax.nn.initializers.zeros  # the best start in the paper, for all activations but ReLU


def uniform(low: float = 1e-3, *, high: float | None = None) -> Initializer:
    """Uniform weights between a positive lower bound and an upper bound.

    W ~ U(low, high)

    Args:
      low: the lower bound, > 0.
      high: the upper bound; default 1 / sqrt(fan_in).

    Returns:
      The initializer, for `initialize`.

    Raises:
      ValueError: `low` is not > 0, or not < `high`. The initializer raises it too, if `low` is not < 1 / sqrt(fan_in).

    Example:
      >>> import jax, lrules
      >>> w = lrules.monotone.uniform(0.1)(jax.random.key(0), (4, 3))
      >>> bool((w >= 0.1).all() and (w <= 0.5).all())
      True

    References:
      Lechner (2020), section 4.
    """
    top = math.inf if high is None else high
    if not (is_number(low) and is_number(top) and 0 < low < top):
        raise ValueError(f"uniform: low and high must be numbers with 0 < low < high, got low={low} and high={high}")

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        top = high if high is not None else 1 / math.sqrt(math.prod(shape[:-1]))
        if not low < top:
            raise ValueError(
                f"uniform: low must be < 1 / sqrt(fan_in) = {top:.3g} for a layer of fan-in "
                f"{math.prod(shape[:-1])}, got {low}; give a smaller low, or give high"
            )
        return jax.random.uniform(key, shape, dtype, low, top)

    return init


def absolute_normal(init: Initializer | None = None) -> Initializer:
    """The absolute values of normal weights.

    W = |W'|,  W' ~ N

    Args:
      init: the initializer of W'; default `jax.nn.initializers.glorot_normal()`.

    Returns:
      The initializer, for `initialize`.

    Raises:
      TypeError: `init` is not a function.

    Example:
      >>> import jax, lrules
      >>> bool((lrules.monotone.absolute_normal()(jax.random.key(0), (4, 3)) >= 0).all())
      True

    References:
      Lechner (2020), section 4.
    """
    return absolute(init)


def constrained(net: NetworkLike, params: Pytree, inputs: Pytree) -> Pytree:
    """Finds the parameters that a mono-net constrains: the weights of all layers but the first.

    A parameter is constrained as a whole, or free as a whole. If the first iteration of a scan over layers reads the
    data, all slices of the scanned weight are constrained, also the first slice. To leave the first layer free, give it
    a separate weight outside the scan.

    Args:
      net: the network.
      params, inputs: what the network takes, arrays or `ShapeDtypeStruct`s.

    Returns:
      A pytree with the structure of `params`: True for a constrained parameter, else False.

    Raises:
      ValueError: a first layer and another layer share a weight.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> net = lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"]
      >>> params = {"first": jnp.ones((3, 2)), "second": jnp.ones((2, 1))}
      >>> lrules.monotone.constrained(net, params, jnp.zeros((1, 3)))
      {'first': False, 'second': True}

    References:
      Lechner (2020), section 3, Definition 1.
    """
    net = as_network(net)
    names = _weights(net.graph(params, inputs))
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [i in names for i in range(len(leaves))])


def _weights(graph: Graph, init: Initializer = zeros) -> dict[int, SequentialFeedback]:
    """The weights of all layers but the first, by their number among the parameters."""
    spec = Sequential(lambda *_: (None, None, None), init)
    first = frozenset().union(*(layer.sources for layer in graph.layers if layer.reads is None))
    above = [layer for layer in graph.layers if layer.reads is not None]
    found = {e.index: e for layer in above for e in sequential_feedback_of(graph, layer, spec)}
    if shared := first & set(found):
        raise ValueError(
            f"the parameter {graph.names[min(shared)]!r} is the weight of a first layer, which a mono-net leaves free, "
            "and of another layer, which a mono-net constrains: give each of these layers its own weight"
        )
    return found


def initialize(
    key: jax.Array, net: NetworkLike, params: Pytree, inputs: Pytree, *, init: Initializer | None = None
) -> Pytree:
    """Draws new weights for all layers but the first; other parameters keep their values.

    Args:
      key: a PRNG key.
      net: the network.
      params, inputs: what the network takes.
      init: the initializer, applied to each layer's `[fan_in, fan_out]` (a convolution: `[*window, in, out]`):
        `absolute_normal()` (the default), `uniform()` or `zeros`. `zeros` is the best for all activations but ReLU, if
        the first layer is zero too. An initializer that draws negative weights does not give a mono-net.

    Returns:
      The parameters of a mono-net.

    Raises:
      ValueError: a first layer and another layer share a weight.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net = lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"]
      >>> params, x = {"first": -jnp.ones((3, 2)), "second": -jnp.ones((2, 1))}, jnp.ones((1, 3))
      >>> params = lrules.monotone.initialize(jax.random.key(0), net, params, x)
      >>> float(params["first"].max()), bool(params["second"].min() >= 0)
      (-1.0, True)

    References:
      Lechner (2020), sections 4 and B.3.
    """
    net = as_network(net)
    graph = net.graph(params, inputs)
    leaves, tree = jax.tree.flatten(params)
    for index, entry in _weights(graph, absolute_normal() if init is None else init).items():
        k = jax.random.fold_in(key, name_number(graph.names[index]))
        leaves[index] = entry.draw(k, leaves[index])
    return jax.tree.unflatten(tree, leaves)


class ConstrainState(NamedTuple):
    """The state of `constrain`: it is empty.

    Example:
      >>> import lrules
      >>> lrules.monotone.ConstrainState()
      ConstrainState()
    """


def constrain(
    net: NetworkLike, params: Pytree, inputs: Pytree, *, bound: float = BOUND
) -> optax.GradientTransformationExtraArgs:
    """Keeps the weights of all layers but the first at or above a bound, in every step of an optimizer.

    W <- max(W + dW, bound)

    Chain it last, after any optimizer: it changes the updates. If a weight is scanned over layers, it constrains all
    slices (see `constrained`).

    Args:
      net: the network.
      params, inputs: what the network takes, arrays or `ShapeDtypeStruct`s. They show which layers are not the first.
      bound: the smallest weight, >= 0.

    Returns:
      An optax transformation; its `update` needs `params`.

    Raises:
      ValueError: `bound` is not a finite number >= 0, or a first layer and another layer share a weight. `update`
        raises it too, if it does not get `params`.

    Example:
      >>> import jax.numpy as jnp, lrules, optax
      >>> net = lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"]
      >>> params = {"first": -jnp.ones((3, 2)), "second": jnp.ones((2, 1))}
      >>> optimizer = optax.chain(optax.sgd(2.0), lrules.monotone.constrain(net, params, jnp.zeros((1, 3))))
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)  # gradients like the parameters
      >>> float(optax.apply_updates(params, updates)["second"].min()) > 0
      True

    References:
      Lechner (2020), section 4.
    """
    if not (is_number(bound) and 0 <= bound < math.inf):
        raise ValueError(f"constrain: bound must be a finite number >= 0, got {bound!r}")
    mask = constrained(net, params, inputs)

    def init(params: Pytree) -> ConstrainState:
        return ConstrainState()

    def update(updates: Pytree, state: Pytree, params: Pytree = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("monotone.constrain needs the parameters: optimizer.update(grads, state, params)")

        def lift(positive: bool, u: jax.Array, p: Any) -> jax.Array:
            if not positive or _left_out(u) or _left_out(p):
                return u
            wide = max(p.dtype, u.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
            floor = jnp.asarray(bound, p.dtype).astype(wide)
            p, u = p.astype(wide), u.astype(wide)
            lifted = jnp.where(p + u < floor, floor - p, u)  # p + (floor - p) may be rounded to just below the floor
            return jnp.where(p + lifted < floor, jnp.nextafter(lifted, jnp.full_like(lifted, jnp.inf)), lifted)

        leaves = [jax.tree.leaves(tree, is_leaf=_left_out) for tree in (mask, updates, params)]
        if len({len(each) for each in leaves}) > 1:
            raise ValueError(
                f"monotone.constrain was made for {len(leaves[0])} parameters, got {len(leaves[1])} updates of "
                f"{len(leaves[2])} parameters: make it from the parameters that the optimizer gets"
            )
        lifted = [lift(*each) for each in zip(*leaves, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(updates, is_leaf=_left_out), lifted), state

    import optax  # which takes longer to import than the whole library, and which no other function here needs

    return optax.GradientTransformationExtraArgs(init, update)


def _left_out(leaf: Any) -> bool:
    """Whether this leaf stands for a parameter that `optax.masked` or the like leaves out."""
    import optax

    return leaf is None or isinstance(leaf, optax.MaskedNode)


def check(net: NetworkLike, params: Pytree, inputs: Pytree) -> None:
    """Checks that a network is a mono-net.

    It evaluates each activation at 67 points from -10,000 to 10,000. It finds a decrease elsewhere (a changed sign, a
    subtraction) by the gradients of the outputs with respect to the outputs of each layer, which it changes at random
    four times.

    Args:
      net: the network.
      params, inputs: what the network takes, arrays.

    Raises:
      ValueError: a weight above the first layer is negative, an activation decreases somewhere, or an output of the
        network decreases when an output of a layer increases. The message names it.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> net = lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"]
      >>> lrules.monotone.check(net, {"first": -jnp.ones((3, 2)), "second": jnp.ones((2, 1))}, jnp.zeros((1, 3)))

    References:
      Lechner (2020), section 3, Definition 1.
    """
    net = as_network(net)
    graph = net.graph(params, inputs)
    leaves = net.parameters(params)
    for index in _weights(graph):
        if bool(jnp.any(leaves[index] < 0)):
            raise ValueError(
                f"the weight {graph.names[index]!r} has negative entries and does not belong to the first layer: start "
                "from monotone.initialize, and chain monotone.constrain after the optimizer"
            )
    layers = [layer for layer in graph.layers if not set(layer.scope) - {"scan"}]

    def total(probes: Mapping[str, Any]) -> Any:
        handlers = (_Increasing(), *net.handlers)
        outputs, _ = graph.run(leaves, jax.tree.leaves(inputs), handlers=handlers, frame=Frame(probes))
        return sum(jnp.sum(y) for y in jax.tree.leaves(outputs) if jnp.issubdtype(y.dtype, jnp.inexact))

    for k in jax.random.split(jax.random.key(0), PROBES):
        zeros = all_zeros_at({layer.at_output: layer.output for layer in layers})
        keys = dict(zip(zeros, jax.random.split(k, len(zeros)), strict=True))
        probes = {name: z + 3 * jax.random.normal(keys[name], z.shape, z.dtype) for name, z in zeros.items()}
        slopes = jax.grad(total)(probes)
        for layer in layers:
            if bool(jnp.any(slopes[layer.at_output] < 0)):
                raise ValueError(
                    f"an output may decrease when the output of the layer {layer.name!r} increases, although the "
                    "weights above it are not negative: an operation between them changes the sign; take it out"
                )


class _Increasing(Handler):
    """Refuses activations that decrease, and adds a probe to what each layer computes."""

    activations = True

    def activation(self, activation: Activation, fn: Callable[..., Any], x: jax.Array, frame: Frame) -> Any:
        try:
            points, values = sampled(fn, x)
        except jax.errors.JAXTypeError:
            return fn(x)  # it uses numbers that are not known here: the probes test it
        where = np.diff(values) < -1e-6 * np.maximum(1, np.abs(values[1:]))
        if where.any():
            at = points[:-1][where][0]
            raise ValueError(
                f"the activation {activation.site!r} decreases, at {at:g}: use an activation that increases "
                "everywhere, such as tanh, sigmoid or relu"
            )
        return fn(x)

    def layer(self, layer: Layer, op: Operation, w: jax.Array, b: Any, x: jax.Array, frame: Frame) -> Any:
        probe = frame.inputs.get(layer.at_output)
        return op(w, x) if probe is None else op(w, x) + probe


def from_sigmoid(first: Any, first_bias: Any, second: Any, second_bias: Any) -> tuple[Any, Any, Any, Any]:
    """Converts a sigmoid network with one hidden layer to a tanh mono-net with the same output and twice the width.

    sum_i v_i sigma(w_i x + b_i) = sum_i |v_i| / 2 tanh(sign(v_i) (w_i x + b_i) / 2) + sum_i v_i / 2

    With several outputs, v_i may have both signs. So the mono-net has each hidden unit twice, once with a changed sign.

    Args:
      first, first_bias: weight and bias of the hidden layer, `[inputs, N]` and `[N]`.
      second, second_bias: weight and bias of the output, `[N, outputs]` and `[outputs]`.

    Returns:
      The same four arrays for the mono-net `tanh(x @ first + first_bias) @ second + second_bias`, with 2 N hidden units
      and `second >= 0`.

    Raises:
      ValueError: the shapes do not fit together.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> sigmoid_net = [jnp.array(a) for a in ([[1.0, 2.0]], [0.0, 0.0], [[1.0], [-1.0]], [0.0])]
      >>> w, b, v, c = lrules.monotone.from_sigmoid(*sigmoid_net)
      >>> round(float((jnp.tanh(0.5 * w + b) @ v + c)[0, 0] - jax.nn.sigmoid(0.5) + jax.nn.sigmoid(1.0)), 4)
      0.0

    References:
      Lechner (2020), Theorem 3 (A.1). The factors 1/2 of w and b are missing there: sigma(x) = (1 + tanh(x / 2)) / 2.
    """
    first, first_bias, second, second_bias = map(jnp.asarray, (first, first_bias, second, second_bias))
    shapes = [a.shape for a in (first, first_bias, second, second_bias)]
    matrices = first.ndim == second.ndim == 2 and first.shape[1] == second.shape[0]
    if not matrices or shapes[1::2] != [first.shape[1:], second.shape[1:]]:
        raise ValueError(
            f"from_sigmoid: the shapes must be [inputs, N], [N], [N, outputs] and [outputs], got "
            f"{', '.join(map(str, shapes))}"
        )
    return (
        jnp.concatenate([first, -first], axis=1) / 2,
        jnp.concatenate([first_bias, -first_bias]) / 2,
        jnp.concatenate([jnp.maximum(second, 0), jnp.maximum(-second, 0)]) / 2,
        second_bias + second.sum(0) / 2,
    )


def __dir__() -> list[str]:
    return list(__all__)
