"""Measurements: how close two updates are, how feedback aligns with forward weights, and how steep a network is.

All functions are pure. You may call them inside a jitted step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lrules.engine.handlers import name_number
from lrules.engine.jaxprs import as_varying, varying_axes
from lrules.extend import Activation, Frame, Handler, Layer, Operation, as_network, at_least_float32
from lrules.network import NetworkLike, parameter_name
from lrules.rule import Feedback
from lrules.typing import Pytree

__all__ = [
    "Agreement",
    "agreement",
    "compare",
    "dead_units",
    "lipschitz_product",
    "spectral_norms",
    "total_angle",
    "weight_alignment",
]


class Agreement(NamedTuple):
    """How an update u compares with a reference r; all values are NaN if u or r holds NaN or Inf.

    Attributes:
      angle: the angle between u and r in degrees; 90 if u or r is zero.
      sign_agreement: the fraction of entries with the same sign, among the entries where r is not zero.
      norm_ratio: ||u|| / ||r||.
      relative_error: ||u - r|| / ||r||.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> a = lrules.diagnostics.compare(jnp.array([3.0, 4.0]), jnp.array([3.0, -4.0]))
      >>> float(a.sign_agreement), float(a.norm_ratio)
      (0.5, 1.0)
    """

    angle: jax.Array
    sign_agreement: jax.Array
    norm_ratio: jax.Array
    relative_error: jax.Array


def compare(update: jax.Array, reference: jax.Array) -> Agreement:
    """Compares an update u with a reference r.

    angle = arccos(<u, r> / (||u|| ||r||))

    Args:
      update, reference: u and r, two arrays of the same shape.

    Returns:
      An `Agreement` of scalars.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> round(float(lrules.diagnostics.compare(jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0])).angle), 3)
      45.0
    """
    if jnp.shape(update) != jnp.shape(reference):
        raise ValueError(
            f"compare: the update and the reference must have the same shape, got {jnp.shape(update)} and "
            f"{jnp.shape(reference)}"
        )
    wide = at_least_float32(update.dtype)
    u, r = (jnp.asarray(x).astype(wide).ravel() for x in (update, reference))
    largest_u, largest_r = jnp.max(jnp.abs(u), initial=0), jnp.max(jnp.abs(r), initial=0)
    scale_u, scale_r = jnp.where(largest_u > 0, largest_u, 1), jnp.where(largest_r > 0, largest_r, 1)
    u_hat, r_hat = u / scale_u, r / scale_r
    norm_u, norm_r = jnp.linalg.norm(u_hat), jnp.linalg.norm(r_hat)
    both = (norm_u > 0) & (norm_r > 0)
    u_hat = u_hat / jnp.where(norm_u > 0, norm_u, 1)
    r_hat = r_hat / jnp.where(norm_r > 0, norm_r, 1)
    # This is exact for small angles too. The arccosine of a rounded cosine is not.
    halves = jnp.linalg.norm(u_hat - r_hat), jnp.linalg.norm(u_hat + r_hat)
    angle = jnp.where(both, 2 * jnp.rad2deg(jnp.arctan2(*halves)), 90.0)
    counted = r != 0
    agree = jnp.sum((jnp.sign(u) == jnp.sign(r)) & counted) / jnp.maximum(jnp.sum(counted), 1)
    ratio = jnp.where(norm_r > 0, norm_u * scale_u / (jnp.where(norm_r > 0, norm_r, 1) * scale_r), jnp.inf)
    ratio = jnp.where((norm_u == 0) & (norm_r == 0), jnp.ones_like(ratio), ratio)
    error = jnp.where(norm_r > 0, jnp.linalg.norm(ratio * u_hat - r_hat), jnp.where(norm_u > 0, jnp.inf, 0.0))
    finite = jnp.all(jnp.isfinite(u)) & jnp.all(jnp.isfinite(r))  # not by the largest: on a CPU it may drop NaN
    found = Agreement(angle, agree.astype(wide), ratio, error.astype(wide))
    return Agreement(*(jnp.where(finite, figure, jnp.nan) for figure in found))


def agreement(update: Pytree, reference: Pytree) -> dict[str, Agreement]:
    """Compares two gradients, parameter by parameter.

    angle_i = arccos(<u_i, r_i> / (||u_i|| ||r_i||)) for parameter i

    Args:
      update, reference: two pytrees with the structure of the parameters, for example the `grads.params` of a rule and
        the result of `jax.grad`.

    Returns:
      A dict with an `Agreement` for each parameter name.

    Raises:
      ValueError: the structures or shapes differ.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> found = lrules.diagnostics.agreement({"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([1.0, 1.0])})
      >>> round(float(found["w"].angle), 3)
      45.0
    """
    if not jax.tree.structure(update) == jax.tree.structure(reference):
        raise ValueError("the update and the reference differ in structure: compare gradients of the same parameters")
    leaves = jax.tree_util.tree_leaves_with_path(update)
    return {
        parameter_name(path): compare(u, r) for (path, u), r in zip(leaves, jax.tree.leaves(reference), strict=True)
    }


def total_angle(update: Pytree, reference: Pytree) -> jax.Array:
    """Measures the angle between two gradients over all parameters together.

    angle = arccos(<u, r> / (||u|| ||r||)), where u and r hold the entries of all parameters

    Args:
      update, reference: two pytrees with the structure of the parameters.

    Returns:
      The angle in degrees, a scalar.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> update, reference = {"a": jnp.array(1.0), "b": jnp.array(0.0)}, {"a": jnp.array(1.0), "b": jnp.array(1.0)}
      >>> round(float(lrules.diagnostics.total_angle(update, reference)), 3)
      45.0
    """
    trees = [jax.tree.leaves(tree) for tree in (update, reference)]
    shapes = [[jnp.shape(leaf) for leaf in leaves] for leaves in trees]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"total_angle: the update and the reference must have the same shapes, got {shapes[0]} and {shapes[1]}"
        )
    wide = jnp.float64 if any(leaf.dtype == jnp.float64 for leaves in trees for leaf in leaves) else jnp.float32
    return compare(*(jnp.concatenate([jnp.ravel(leaf).astype(wide) for leaf in leaves]) for leaves in trees)).angle


def weight_alignment(feedback: Feedback, params: Pytree) -> dict[str, Agreement]:
    """Compares feedback weights with the forward weights that they replace.

    It compares sequential feedback with the parameter of the same name. It compares direct feedback `[outputs, hidden]`
    with the transpose of the weight `[hidden, outputs]` of the same name, if this weight leads to the outputs. Other
    direct feedback does not replace one single weight, and the result does not contain it.

    Args:
      feedback: a `Feedback`, from `rule.init`.
      params: the parameters.

    Returns:
      A dict with an `Agreement` for each name of a feedback weight.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> rule = lrules.feedback_alignment(jax.nn.initializers.ones)
      >>> feedback = rule.init(jax.random.key(0), net, params, jnp.ones((1, 3)))
      >>> {name: float(a.angle) for name, a in lrules.diagnostics.weight_alignment(feedback, params).items()}
      {'b': 0.0}
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
    """Estimates the Lipschitz constant: the spectral norm of the network without its activations.

    ||W_L ... W_2 W_1||_2, exact for a multilayer perceptron

    Args:
      net: the network. The operations between its activations should be linear (dense layers, convolutions, mean
        pooling).
      params: the parameters.
      inputs: one array, with the batch in front. The function linearises operations that are not linear at the first
        example.

    Returns:
      A scalar.

    Raises:
      ValueError: the network has several inputs, several outputs, or an input without a batch.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> params = {"a": jnp.diag(jnp.array([1.0, 2.0])), "b": 3 * jnp.eye(2)}
      >>> net = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
      >>> round(float(lrules.diagnostics.lipschitz_product(net, params, jnp.ones((1, 2)))), 4)
      6.0

    References:
      Hoier, Zach: Two tales of single-phase contrastive Hebbian learning (2024), section 6.1, Table 1.
    """
    net = as_network(net)
    leaves, axes = jax.tree.leaves(inputs), net.input_batch_axes(inputs)
    if len(leaves) != 1 or axes[0] is None:
        raise ValueError(
            f"lipschitz_product: the network must have one input with a batch axis, got {len(leaves)} inputs"
        )
    one = jax.lax.slice_in_dim(leaves[0], 0, 1, axis=axes[0])
    graph = net.graph(params, jax.tree.unflatten(jax.tree.structure(inputs), [one]))

    def linear(x: jax.Array) -> jax.Array:
        outputs, _ = graph.run(as_network(net).parameters(params), [x], handlers=(_LeftOut(),), frame=Frame())
        if len(jax.tree.leaves(outputs)) != 1:
            raise ValueError(
                "lipschitz_product: the network must have one output; wrap it in a function that returns one output"
            )
        return jnp.ravel(jax.tree.leaves(outputs)[0])

    y, pull = jax.vjp(linear, one)
    (rows,) = jax.vmap(pull)(jnp.eye(y.size, dtype=y.dtype))
    return jnp.linalg.norm(rows.reshape(y.size, -1).astype(at_least_float32(y.dtype)), 2)


def spectral_norms(net: NetworkLike, params: Pytree, inputs: Pytree, *, iterations: int = 50) -> dict[str, jax.Array]:
    """Estimates the spectral norm of every dense layer and convolution, by power iterations.

    ||W_l||_2; in a chain of layers with 1-Lipschitz activations and pooling, the Lipschitz constant is <= their product

    Args:
      net: the network.
      params, inputs: what the network takes.
      iterations: the number of power iterations for each layer.

    Returns:
      A dict with a scalar for each layer name (one per iteration for a layer inside a loop), estimates from below. They
      do not include biases.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: x @ p["a"], {"a": jnp.diag(jnp.array([1.0, 2.0]))}
      >>> round(float(lrules.diagnostics.spectral_norms(net, params, jnp.ones((1, 2)))["a"]), 4)
      2.0
    """
    graph, frame = as_network(net).graph(params, inputs), Frame()
    handler = _SpectralNorms(iterations)
    graph.run(as_network(net).parameters(params), jax.tree.leaves(inputs), handlers=(handler,), frame=frame)
    return {name.removesuffix(" norm"): norm for name, norm in frame.records.items()}


def dead_units(net: NetworkLike, params: Pytree, inputs: Pytree) -> dict[str, jax.Array]:
    """Measures the fraction of dead units of every activation: those whose output is 0 for each example.

    Args:
      net: the network.
      params, inputs: what the network takes; the batch is the first axis of what the activations read.

    Returns:
      A dict with a scalar for each activation (one per iteration for an activation inside a loop).

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jax.nn.relu(x @ p["a"]), {"a": jnp.array([[1.0, -1.0]])}
      >>> {name: float(f) for name, f in lrules.diagnostics.dead_units(net, params, jnp.ones((3, 1))).items()}
      {'relu': 0.5}
    """
    graph, frame = as_network(net).graph(params, inputs), Frame()
    graph.run(as_network(net).parameters(params), jax.tree.leaves(inputs), handlers=(_DeadUnits(),), frame=frame)
    return {name.removesuffix(" dead"): fraction for name, fraction in frame.records.items()}


class _DeadUnits(Handler):
    """Records how many units of an activation are 0 for each example."""

    activations = True

    def activation(self, activation: Activation, fn: Callable[..., Any], x: jax.Array, frame: Frame) -> jax.Array:
        y = fn(x)
        frame.records[f"{activation.site} dead"] = jnp.mean(jnp.all(y == 0, axis=0))
        return y


class _LeftOut(Handler):
    """Leaves out the activations."""

    activations = True

    def activation(self, activation: Activation, fn: Callable[..., Any], x: jax.Array, frame: Frame) -> jax.Array:
        assert activation.output is not None
        return x.astype(activation.output.aval.dtype)


class _SpectralNorms(Handler):
    """Records the spectral norms of layers."""

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
    """Estimates the largest singular value of a layer's linear map, without the bias, by power iterations.

    sigma = ||A v||, v <- A^T A v / ||A^T A v||, where A is the map x -> op(w, x)

    Args:
      layer: the layer, from a handler.
      op: `(w, x) -> y`, the operation of the layer.
      w: its weight.
      iterations: the number of power iterations.

    Returns:
      A scalar, an estimate from below.

    Raises:
      NotImplementedError: the layer is not dense and not a convolution.
    """
    if not _known(layer):
        raise NotImplementedError(
            f"spectral_norm: the layer {layer.name!r} must be dense or a convolution, got a {layer.operation}"
        )
    free = layer.row.free(layer.eqn, 1 - layer.position)  # one of the rows that are multiplied alone will do
    shape = [1 if i in free else n for i, n in enumerate(layer.operand.aval.shape)]
    w = jax.lax.stop_gradient(w)
    v = jax.random.normal(jax.random.key(name_number(layer.name)), shape, layer.operand.aval.dtype)
    v = as_varying(v, varying_axes(jax.typeof(w)))

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
