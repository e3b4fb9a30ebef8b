"""Mono-nets: networks whose layers, all but the first, have weights >= 0, and increasing activations (Lechner 2020).

Such a network increases with everything that its first layer makes, so that with one output the error of an example has
the same sign everywhere above the first layer, and direct feedback with positive weights agrees with the gradient in
sign (`lrules.monotone_dfa`, Theorem 2). Biases are free. *The first layer* is every layer that reads data.

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
from lrules.engine.graph import Graph
from lrules.engine.handlers import Frame, Handler, Operation, all_zeros_at, name_number
from lrules.engine.records import Activation, Layer
from lrules.engine.weights import SequentialFeedback, sequential_feedback_of
from lrules.feedback import absolute
from lrules.network import NetworkLike, as_network
from lrules.options import is_number
from lrules.rule import Sequential
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


zeros: Initializer = jax.nn.initializers.zeros  # the paper's best start for all activations but ReLU


def uniform(low: float = 1e-3, *, high: float | None = None) -> Initializer:
    """Uniform between a positive lower bound and an upper one.

    W ~ U(low, high)

    Args:
      low: the lower bound.
      high: the upper bound; by default 1 / sqrt(fan_in).

    Raises:
      ValueError: the lower bound is not positive, or not below the upper one; at use, too.

    References:
      Lechner (2020), section 4.
    """
    top = math.inf if high is None else high
    if not (is_number(low) and is_number(top) and 0 < low < top):
        raise ValueError(f"uniform(low={low}, high={high}): weights of a mono-net need 0 < low < high")

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        top = high if high is not None else 1 / math.sqrt(math.prod(shape[:-1]))
        if not low < top:
            raise ValueError(
                f"uniform(low={low}): a layer of fan-in {math.prod(shape[:-1])} draws weights up to 1 / sqrt(fan_in) = "
                f"{top:.3g}, so give a lower bound below that, or high="
            )
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


def constrained(net: NetworkLike, params: Pytree, inputs: Pytree) -> Pytree:
    """Which parameters a mono-net constrains: the weights of all layers but the first.

    A parameter is constrained or free as a whole. In a scan over layers whose first iteration reads the data, all
    slices of the scanned weight are constrained, the first among them: give the first layer a weight of its own to
    leave it free.

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


def _weights(graph: Graph, init: Initializer = zeros) -> dict[int, SequentialFeedback]:
    """The weights of all layers but the first, by their number among the parameters."""
    spec = Sequential(lambda *_: (None, None, None), init)
    first = frozenset().union(*(layer.sources for layer in graph.layers if layer.reads is None))
    above = [layer for layer in graph.layers if layer.reads is not None]
    found = {e.index: e for layer in above for e in sequential_feedback_of(graph, layer, spec)}
    if shared := first & set(found):
        raise ValueError(
            f"the parameter {graph.names[min(shared)]!r} is the weight of a first layer, which a mono-net leaves free, "
            "and of another one, which it constrains: give the two layers weights of their own"
        )
    return found


def initialize(
    key: jax.Array, net: NetworkLike, params: Pytree, inputs: Pytree, *, init: Initializer | None = None
) -> Pytree:
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
    for index, entry in _weights(graph, absolute_normal() if init is None else init).items():
        k = jax.random.fold_in(key, name_number(graph.names[index]))
        leaves[index] = entry.draw(k, leaves[index])
    return jax.tree.unflatten(tree, leaves)


class ConstrainState(NamedTuple):
    """The constraint carries nothing."""


def constrain(
    net: NetworkLike, params: Pytree, inputs: Pytree, *, bound: float = BOUND
) -> optax.GradientTransformationExtraArgs:
    """Keeps a mono-net one: lifts weights of all layers but the first to a positive bound after each step.

    W <- max(W + dW, bound)

    Chain it after any optimizer, last: it changes the updates so that the weights come out as said. Of a weight that is
    scanned over layers, all slices are lifted (see `constrained`).

    Args:
      net, params, inputs: the network and what it takes, to tell which layers are not the first; `ShapeDtypeStruct`s
        will do.
      bound: the smallest weight.

    Returns:
      An optax transformation; its `update` needs `params`.

    Raises:
      ValueError: the bound is no number from 0 on, a first layer has its weight in common with another layer, or at
        use, `params` is missing.

    Example:
      >>> import optax
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
    if not (is_number(bound) and 0 <= bound < math.inf):
        raise ValueError(f"bound={bound!r} does not keep weights at or above 0: give zero or a small positive number")
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
            lifted = jnp.where(p + u < floor, floor - p, u)  # p + (floor - p) may round to just below the floor
            return jnp.where(p + lifted < floor, jnp.nextafter(lifted, jnp.full_like(lifted, jnp.inf)), lifted)

        leaves = [jax.tree.leaves(tree, is_leaf=_left_out) for tree in (mask, updates, params)]
        if len({len(each) for each in leaves}) > 1:
            raise ValueError(
                f"monotone.constrain was made for {len(leaves[0])} parameters and is given {len(leaves[1])} updates of "
                f"{len(leaves[2])} parameters: make it from the parameters that the optimizer is given"
            )
        lifted = [lift(*each) for each in zip(*leaves, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(updates, is_leaf=_left_out), lifted), state

    import optax  # which takes longer to import than the whole library, and which no other function here needs

    return optax.GradientTransformationExtraArgs(init, update)


def _left_out(leaf: Any) -> bool:
    """What stands for a parameter that `optax.masked` and the like leave to others."""
    import optax

    return leaf is None or isinstance(leaf, optax.MaskedNode)


def check(net: NetworkLike, params: Pytree, inputs: Pytree) -> None:
    """Checks that a network is a mono-net.

    Activations are asked at 67 points from -10,000 to 10,000; what lies between them and the layers (a sign turned
    round, a subtraction) by the gradient of the outputs at what each layer computes, moved at random four times.

    Args:
      net, params, inputs: the network and what it takes, arrays.

    Raises:
      ValueError: a weight above the first layer is negative, an activation decreases somewhere, or an output falls
        where what a layer computes rises; and which.
    """
    net = as_network(net)
    graph = net.graph(params, inputs)
    leaves = net.parameters(params)
    for index in _weights(graph):
        if bool(jnp.any(leaves[index] < 0)):
            raise ValueError(
                f"the weight {graph.names[index]!r} has negative entries and does not belong to the first layer: start "
                "from monotone.initialize and chain monotone.constrain after the optimizer"
            )
    layers = [layer for layer in graph.layers if not set(layer.scope) - {"scan"}]

    def total(probes: Mapping[str, Any]) -> Any:
        handlers = (_Increasing(), *net.handlers)
        outputs, _ = graph.run(leaves, jax.tree.leaves(inputs), handlers=handlers, frame=Frame(probes))
        return sum(jnp.sum(y) for y in jax.tree.leaves(outputs) if jnp.issubdtype(y.dtype, jnp.inexact))

    for k in jax.random.split(jax.random.key(0), PROBES):
        zeros = all_zeros_at({f"{layer.site} output": layer.output for layer in layers})
        keys = dict(zip(zeros, jax.random.split(k, len(zeros)), strict=True))
        probes = {name: z + 3 * jax.random.normal(keys[name], z.shape, z.dtype) for name, z in zeros.items()}
        slopes = jax.grad(total)(probes)
        for layer in layers:
            if bool(jnp.any(slopes[f"{layer.site} output"] < 0)):
                raise ValueError(
                    f"an output may fall where what the layer {layer.name!r} computes rises, though no weight above is "
                    "negative: something between them turns the sign round; take that out"
                )


class _Increasing(Handler):
    """Refuses activations that decrease, and adds a probe to what each layer computes."""

    activations = True

    def activation(self, activation: Activation, fn: Callable[..., Any], x: jax.Array, frame: Frame) -> Any:
        try:
            points, values = sampled(fn, x)
        except jax.errors.JAXTypeError:
            return fn(x)  # it uses numbers that are not known here: the probes tell
        where = np.diff(values) < -1e-6 * np.maximum(1, np.abs(values[1:]))
        if where.any():
            at = points[:-1][where][0]
            raise ValueError(
                f"the activation {activation.site!r} decreases, at {at:g}: use one that increases everywhere, such as "
                "tanh, sigmoid or relu"
            )
        return fn(x)

    def layer(self, layer: Layer, op: Operation, w: jax.Array, b: Any, x: jax.Array, frame: Frame) -> Any:
        probe = frame.inputs.get(f"{layer.site} output")
        return op(w, x) if probe is None else op(w, x) + probe


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

    Raises:
      ValueError: the shapes do not go together.

    References:
      Lechner (2020), Theorem 3 (A.1), where the halves of w and b are missing: sigma(x) = (1 + tanh(x / 2)) / 2.
    """
    first, first_bias, second, second_bias = map(jnp.asarray, (first, first_bias, second, second_bias))
    shapes = [a.shape for a in (first, first_bias, second, second_bias)]
    matrices = first.ndim == second.ndim == 2 and first.shape[1] == second.shape[0]
    if not matrices or shapes[1::2] != [first.shape[1:], second.shape[1:]]:
        raise ValueError(
            f"from_sigmoid: arrays of shapes {', '.join(map(str, shapes))} make no net with one hidden layer: give "
            "[inputs, N], [N], [N, outputs] and [outputs]"
        )
    return (
        jnp.concatenate([first, -first], axis=1) / 2,
        jnp.concatenate([first_bias, -first_bias]) / 2,
        jnp.concatenate([jnp.maximum(second, 0), jnp.maximum(-second, 0)]) / 2,
        second_bias + second.sum(0) / 2,
    )


def __dir__() -> list[str]:
    return list(__all__)
