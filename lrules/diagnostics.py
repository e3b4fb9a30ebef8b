"""How close a rule's update is to another, how feedback aligns with forward weights, and how steep a network is.

All functions are pure and may be called inside a jitted step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lrules.engine.dtypes import at_least_float32
from lrules.engine.handlers import Frame, Handler, Operation, name_number
from lrules.engine.records import Activation, Layer
from lrules.network import NetworkLike, as_network, parameter_name
from lrules.rule import Feedback
from lrules.typing import Pytree

__all__ = [
    "Agreement",
    "agreement",
    "compare",
    "lipschitz_product",
    "spectral_norms",
    "total_angle",
    "weight_alignment",
]


class Agreement(NamedTuple):
    """How an update compares with a reference; all NaN where one of them holds NaN or Inf.

    Attributes:
      angle: between them, in degrees; 90 where either is zero.
      sign_agreement: the fraction of entries, among those where the reference is not zero, whose signs agree.
      norm_ratio: the norm of the update over that of the reference.
      relative_error: the norm of their difference over that of the reference.
    """

    angle: jax.Array
    sign_agreement: jax.Array
    norm_ratio: jax.Array
    relative_error: jax.Array


def compare(update: jax.Array, reference: jax.Array) -> Agreement:
    """Compares two arrays of one shape.

    angle = arccos(<u, r> / (||u|| ||r||))

    Args:
      update, reference: arrays of one shape.

    Returns:
      An `Agreement` of scalars.

    Raises:
      ValueError: the shapes differ.
    """
    if jnp.shape(update) != jnp.shape(reference):
        raise ValueError(f"arrays of shapes {jnp.shape(update)} and {jnp.shape(reference)} cannot be compared")
    wide = at_least_float32(update.dtype)
    u, r = (jnp.asarray(x).astype(wide).ravel() for x in (update, reference))
    largest_u, largest_r = jnp.max(jnp.abs(u), initial=0), jnp.max(jnp.abs(r), initial=0)
    scale_u, scale_r = jnp.where(largest_u > 0, largest_u, 1), jnp.where(largest_r > 0, largest_r, 1)
    u_hat, r_hat = u / scale_u, r / scale_r
    norm_u, norm_r = jnp.linalg.norm(u_hat), jnp.linalg.norm(r_hat)
    both = (norm_u > 0) & (norm_r > 0)
    u_hat = u_hat / jnp.where(norm_u > 0, norm_u, 1)
    r_hat = r_hat / jnp.where(norm_r > 0, norm_r, 1)
    # Exact for small angles too, where the arccosine of a rounded cosine is not.
    halves = jnp.linalg.norm(u_hat - r_hat), jnp.linalg.norm(u_hat + r_hat)
    angle = jnp.where(both, 2 * jnp.rad2deg(jnp.arctan2(*halves)), 90.0)
    counted = r != 0
    agree = jnp.sum((jnp.sign(u) == jnp.sign(r)) & counted) / jnp.maximum(jnp.sum(counted), 1)
    ratio = jnp.where(norm_r > 0, norm_u * scale_u / (jnp.where(norm_r > 0, norm_r, 1) * scale_r), jnp.inf)
    ratio = jnp.where((norm_u == 0) & (norm_r == 0), jnp.ones_like(ratio), ratio)
    error = jnp.where(norm_r > 0, jnp.linalg.norm(ratio * u_hat - r_hat), jnp.where(norm_u > 0, jnp.inf, 0.0))
    finite = jnp.isfinite(largest_u) & jnp.isfinite(largest_r)
    found = Agreement(angle, agree.astype(wide), ratio, error.astype(wide))
    return Agreement(*(jnp.where(finite, figure, jnp.nan) for figure in found))


def agreement(update: Pytree, reference: Pytree) -> dict[str, Agreement]:
    """Compares two gradients parameter by parameter.

    Args:
      update, reference: of the structure of the parameters; for example a rule's `grads.params` and `jax.grad`'s.

    Returns:
      An `Agreement` per parameter, by name.

    Raises:
      ValueError: the structures or shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(agreement({"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([1.0, 1.0])})["w"].angle), 3)
      45.0
    """
    if not jax.tree.structure(update) == jax.tree.structure(reference):
        raise ValueError("the update and the reference differ in structure: compare gradients of the same parameters")
    leaves = jax.tree_util.tree_leaves_with_path(update)
    return {
        parameter_name(path): compare(u, r) for (path, u), r in zip(leaves, jax.tree.leaves(reference), strict=True)
    }


def total_angle(update: Pytree, reference: Pytree) -> jax.Array:
    """The angle in degrees between two gradients, all parameters together.

    Args:
      update, reference: of one structure.

    Returns:
      A scalar.

    Raises:
      ValueError: the shapes differ.
    """
    trees = [jax.tree.leaves(tree) for tree in (update, reference)]
    shapes = [[jnp.shape(leaf) for leaf in leaves] for leaves in trees]
    if shapes[0] != shapes[1]:
        raise ValueError(f"gradients of the shapes {shapes[0]} and {shapes[1]} cannot be compared")
    wide = jnp.float64 if any(leaf.dtype == jnp.float64 for leaves in trees for leaf in leaves) else jnp.float32
    return compare(*(jnp.concatenate([jnp.ravel(leaf).astype(wide) for leaf in leaves]) for leaves in trees)).angle


def weight_alignment(feedback: Feedback, params: Pytree) -> dict[str, Agreement]:
    """Compares feedback weights with the forward weights that they stand in for.

    Sequential feedback is compared with the parameter of its name. Direct feedback `[outputs, hidden]` is compared with
    the transpose of the weight `[hidden, outputs]` of its name, where that weight leads to the outputs; other direct
    feedback stands in for no single weight and is left out.

    Args:
      feedback: as from `rule.init`.
      params: the parameters.

    Returns:
      An `Agreement` per feedback weight, by name.
    """
    by_name = {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    state = feedback.state if isinstance(feedback.state, dict) else {}
    solved = {name: s["b"] for name, s in state.items() if isinstance(s, dict) and "b" in s}  # by least squares
    found = {}
    for name, b in {**feedback.fixed, **feedback.learned, **solved}.items():
        w = by_name.get(name)
        if w is not None and w.shape == b.shape:
            found[name] = compare(b, w)
        elif w is not None and w.ndim == 2 and w.T.shape == b.shape:
            found[name] = compare(b, w.T)
    return found


def lipschitz_product(net: NetworkLike, params: Pytree, inputs: Pytree) -> jax.Array:
    """The spectral norm of the network with its activations left out: an estimate of its Lipschitz constant.

    ||W_L ... W_2 W_1||_2, exactly, for a multilayer perceptron

    Args:
      net: the network; what lies between its activations should be linear (dense layers, convolutions, mean pooling).
      params: the parameters.
      inputs: one array, the batch in front; its first example says where what is not linear is linearised.

    Returns:
      A scalar.

    Raises:
      ValueError: the network has several inputs or outputs.

    References:
      Hoier, Zach: Two tales of single-phase contrastive Hebbian learning (2024), section 6.1, Table 1.
    """
    net = as_network(net)
    leaves, axes = jax.tree.leaves(inputs), net.input_batch_axes(inputs)
    if len(leaves) != 1 or axes[0] is None:
        raise ValueError(f"lipschitz_product wants one input with a batch axis, but there are {len(leaves)} inputs")
    one = jax.lax.slice_in_dim(leaves[0], 0, 1, axis=axes[0])
    graph = net.graph(params, jax.tree.unflatten(jax.tree.structure(inputs), [one]))

    def linear(x: jax.Array) -> jax.Array:
        outputs, _ = graph.run(as_network(net).parameters(params), [x], handlers=(_LeftOut(),), frame=Frame())
        if len(jax.tree.leaves(outputs)) != 1:
            raise ValueError("lipschitz_product wants one output: wrap the network in a function that returns it")
        return jnp.ravel(jax.tree.leaves(outputs)[0])

    y, pull = jax.vjp(linear, one)
    (rows,) = jax.vmap(pull)(jnp.eye(y.size, dtype=y.dtype))
    return jnp.linalg.norm(rows.reshape(y.size, -1).astype(at_least_float32(y.dtype)), 2)


def spectral_norms(net: NetworkLike, params: Pytree, inputs: Pytree, *, iterations: int = 50) -> dict[str, jax.Array]:
    """The spectral norm of every dense layer and convolution, by power iterations.

    Their product bounds the Lipschitz constant of a chain of layers with 1-Lipschitz activations and pooling.

    Args:
      net: the network.
      params, inputs: as it takes them.
      iterations: of each layer.

    Returns:
      A scalar per layer, by name (inside a loop, one per iteration). Biases do not count.
    """
    graph, frame = as_network(net).graph(params, inputs), Frame()
    handler = _SpectralNorms(iterations)
    graph.run(as_network(net).parameters(params), jax.tree.leaves(inputs), handlers=(handler,), frame=frame)
    return {name.removesuffix(" norm"): norm for name, norm in frame.records.items()}


class _LeftOut(Handler):
    """Leaves out activations."""

    activations = True

    def activation(self, activation: Activation, fn: Callable[..., Any], x: jax.Array, frame: Frame) -> jax.Array:
        assert activation.output is not None
        return x.astype(activation.output.aval.dtype)


class _SpectralNorms(Handler):
    """Records the spectral norm of layers."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations

    def layer(self, layer: Layer, op: Operation, w: jax.Array, b: Any, x: jax.Array, frame: Frame) -> Any:
        if _known(layer):
            frame.records[f"{layer.site} norm"] = spectral_norm(layer, op.product, w, self.iterations)
        return op(w, x)


def _known(layer: Layer) -> bool:
    """Whether each row of what a layer reads is multiplied by the same matrix."""
    return layer.row.kind == "product" and layer.row.by_example


def spectral_norm(layer: Layer, op: Callable[..., Any], w: jax.Array, iterations: int) -> jax.Array:
    """The largest singular value of a layer's linear map, the bias apart, by power iterations.

    Args:
      layer: the layer.
      op: `(w, x) -> y`.
      w: its weight.
      iterations: how many.

    Returns:
      A scalar: an estimate from below.

    Raises:
      NotImplementedError: the layer is neither dense nor a convolution.
    """
    if not _known(layer):
        raise NotImplementedError(
            f"the spectral norm of the layer {layer.name!r}, a {layer.operation}, is not known here"
        )
    free = layer.row.free(layer.eqn, 1 - layer.position)  # one of the rows that are multiplied alone will do
    shape = [1 if i in free else n for i, n in enumerate(layer.operand.aval.shape)]
    w = jax.lax.stop_gradient(w)
    v = jax.random.normal(jax.random.key(name_number(layer.name)), shape, layer.operand.aval.dtype)

    def apply(v: jax.Array) -> Any:
        u, pull = jax.vjp(lambda v: op(w, v), v)
        return pull(u)[0]

    def iterate(_: Any, v: jax.Array) -> Any:
        v = apply(v)
        norm = _norm(v)
        return (v / jnp.where(norm > 0, norm, 1)).astype(v.dtype)

    v = jax.lax.fori_loop(0, iterations, iterate, v / _norm(v).astype(v.dtype))
    return _norm(op(w, v))


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(at_least_float32(x.dtype)))))


def __dir__() -> list[str]:
    return list(__all__)
