"""The material of `lrules.testing.check_rule`: a network, an objective, and the true gradient."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lrules.apply import feedback_grad, value_and_grad
from lrules.network import Network
from lrules.rule import Direct, Feedback, Gradients, Rule
from lrules.rules.backprop import backprop, last_layer_only
from lrules.typing import Pytree

KEYS = 64  # the number of samples from a stochastic rule


def example(dtype: Any = jnp.float32) -> tuple[Network, Any, jax.Array]:
    """The default network, its parameters and inputs."""
    keys = jax.random.split(jax.random.key(3), 4)
    params = {
        name: {"kernel": jax.random.normal(k, shape) / shape[0] ** 0.5, "bias": jnp.full(shape[1], 0.1, jnp.float32)}
        for name, k, shape in zip("abcd", keys, [(6, 8), (8, 8), (8, 8), (8, 3)], strict=True)
    }
    params["a"]["bias"] = params["a"]["bias"].at[2].set(-100.0)  # never active
    params["b"]["scale"] = jnp.full(8, 0.9, jnp.float32)  # learns only from the error that the layer b sends down
    x = jax.random.normal(jax.random.key(4), (6, 6))
    params, x = jax.tree.map(lambda v: v.astype(dtype), (params, x))
    return Network(lambda params, x: forward(params, x)[0]), params, x


class Layers(NamedTuple):
    """Parameters in another container than a dict, with the same names."""

    b: Any
    c: Any
    d: Any


def other_example() -> tuple[Network, Layers, Any]:
    """The default network with other habits: frozen weights, an input without a batch, parameters in a tuple."""
    _, params, x = example()

    def apply(layers: Layers, frozen: Any, inputs: Any) -> jax.Array:
        return inputs["size"] * forward(layers._asdict() | frozen, inputs["x"])[0]

    frozen = {"a": params.pop("a")}
    axes = {"x": 0, "size": None}
    return Network(apply, frozen=frozen, batch_axes=axes), Layers(**params), {"x": x, "size": jnp.ones(())}


def forward(params: Pytree, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The outputs of the default network, and the inputs of its layers."""
    read = {}

    def layer(name: str, h: jax.Array) -> jax.Array:
        read[name] = h
        return h @ params[name]["kernel"] + params[name]["bias"][None]

    h = jax.nn.relu(layer("a", x))
    h = h + jnp.tanh(layer("b", h * params["b"]["scale"][None]))
    return layer("d", jax.nn.relu(layer("c", h))), read


def loss(outputs: Pytree, targets: Pytree) -> jax.Array:
    """0.5 ||y + t||^2 per example, `[batch]`: not the usual loss, so that a rule that ignores the loss fails."""
    terms = [0.5 * ((y + t) ** 2).reshape(len(y), -1).sum(1) for y, t in zip_leaves(outputs, targets)]
    return sum(terms[1:], terms[0])


def targets_for(outputs: Pytree) -> Pytree:
    """Targets such that y - t, the error of the usual loss, points away from y + t."""
    return jax.tree.map(lambda y: 2 * y + jnp.asarray(0.3, y.dtype) * jnp.roll(y, 1, 0), outputs)


class Trial:
    """A rule on a network, with its feedback."""

    def __init__(self, rule: Rule, net: Network, params: Pytree, inputs: Pytree):
        self.rule, self.net, self.params, self.inputs = rule, net, params, inputs
        self.rng = {"rng": jax.random.key(11)} if rule.stochastic else {}
        self.feedback = rule.init(jax.random.key(7), net, params, inputs)
        outputs = jax.jit(net.__call__)(params, inputs)
        self.outputs = outputs[0] if net.has_aux else outputs
        self.targets = targets_for(self.outputs)
        self.step: Any = value_and_grad(net, loss, rule)
        self.traces, step = 0, self.step

        def traced(*args: Any, **rng: Any) -> Any:
            self.traces += 1
            return step(*args, **rng)

        self.jitted: Any = jax.jit(traced)
        self.over_keys = jax.jit(jax.vmap(lambda k, *args: self.step(*args, rng=k)[1], (0, None, None, None, None)))

    def samples(self, inputs: Pytree, targets: Pytree, feedback: Feedback | None = None) -> Gradients:
        """The gradients of a step for several keys (the first axis); for one key if the rule is not stochastic."""
        args = self.params, self.feedback if feedback is None else feedback, inputs, targets
        if self.rule.stochastic:
            return self.over_keys(jax.random.split(jax.random.key(13), KEYS), *args)
        return jax.tree.map(lambda g: jnp.asarray(g)[None], self.jitted(*args)[1])

    def teach(self, key: jax.Array) -> dict[str, jax.Array]:
        """The gradient of the feedback in the phase of the rule, jitted."""
        phase = self.rule.phase
        rng = {"rng": key} if phase is not None and phase.stochastic else {}
        return jax.jit(feedback_grad(self.net, self.rule))(self.params, self.feedback, self.inputs, **rng)

    @functools.cached_property
    def taught(self) -> dict[str, jax.Array]:
        """The same, for one key."""
        return self.teach(jax.random.key(19))

    def true_gradient(self, inputs: Pytree, targets: Pytree) -> Pytree:
        step = value_and_grad(self.net, loss, backprop())
        return step(self.params, Feedback({}, {}), inputs, targets)[1].params

    @functools.cached_property
    def true(self) -> dict[str, np.ndarray]:
        """The true gradients, by name, but for those that are zero up to rounding (as a bias below BatchNorm)."""
        found = named(self.true_gradient(self.inputs, self.targets))
        return {name: g for name, g in found.items() if np.linalg.norm(g) > 1e-5 * largest(found)}

    @functools.cached_property
    def nearest(self) -> dict[str, np.ndarray]:
        """The true gradients of the weights nearest the output: their error crosses no hidden signal."""
        try:
            step = value_and_grad(self.net, loss, last_layer_only())
            last = named(step(self.params, Feedback({}, {}), self.inputs, self.targets)[1].params)
        except (NotImplementedError, ValueError):  # layers cannot be found there, so the last one is not known
            return {}
        return {name: g for name, g in self.true.items() if off(last[name], g) < 1e-3}

    @functools.cached_property
    def stops_error(self) -> bool:
        """Whether the rule says that it stops the error somewhere."""
        if self.rule.description is None:
            return False
        graph = self.net.graph(self.params, self.inputs)
        plan = self.rule.description.plan(self.net, graph, self.params, self.inputs)
        return any(isinstance(spec, Direct) and not spec.lands for spec in plan.specs.values())

    @functools.cached_property
    def parts(self) -> list[tuple[Pytree, slice]]:
        """The inputs in two parts, and their places in the batch; none if the network does not accept them."""
        axes, n = self.net.input_batch_axes(self.inputs), self.net.batch_size(self.inputs)
        leaves, tree = jax.tree.flatten(self.inputs)

        def part(where: slice) -> Pytree:
            cut = lambda x, a: x if a is None else x[(slice(None),) * (a % x.ndim) + (where,)]  # noqa: E731
            return jax.tree.unflatten(tree, [cut(x, a) for x, a in zip(leaves, axes, strict=True)])

        parts = [(part(where), where) for where in (slice(0, n // 2), slice(n // 2, n)) if n > 1]
        try:
            for x, _ in parts:
                jax.eval_shape(self.net.__call__, self.params, x)
        except Exception:  # noqa: BLE001  any failure of the user's network at another size of the batch
            return []
        return parts


# ----------------------------------------------------------------------------------------------------- trees of arrays


def stirred(feedback: Feedback) -> Feedback:
    """Feedback with the same signs and zeros and other magnitudes; random numbers if all are zero."""
    return feedback._replace(fixed=changed(feedback.fixed, 1), learned=changed(feedback.learned, 1))


def changed(weights: Any, sign: int) -> Any:
    def change(b: jax.Array) -> jax.Array:
        if not jnp.issubdtype(b.dtype, jnp.inexact):  # the key of feedback that is not stored
            return b if sign > 0 else b + jnp.ones((), b.dtype)
        drawn = jax.random.normal(jax.random.key(17), b.shape, b.dtype)
        return sign * b * jnp.exp(drawn) if jnp.any(b) else 0.5 * drawn

    return jax.tree.map(change, weights)


def zip_leaves(a: Pytree, b: Pytree) -> Iterator[tuple[Any, Any]]:
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


def shapes(tree: Pytree) -> Pytree:
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


def named(tree: Pytree) -> dict[str, np.ndarray]:
    """The leaves in double precision, by name."""
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path).removesuffix("/value"): wide(v) for path, v in jax.tree_util.tree_leaves_with_path(tree)}


def learned(grads: Gradients) -> dict[str, np.ndarray]:
    """The gradients of parameters and feedback weights, by name."""
    return named(grads.params) | {f"feedback {name}": g for name, g in named(grads.feedback).items()}


def wide(x: Any) -> np.ndarray:
    x = jax.random.key_data(x) if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key) else jnp.asarray(x)
    return np.asarray(x, np.complex128 if jnp.issubdtype(x.dtype, jnp.complexfloating) else np.float64)


def largest(arrays: dict[str, np.ndarray]) -> float:
    """The norm of the largest array."""
    return max((float(np.linalg.norm(x)) for x in arrays.values()), default=0.0)


def off(got: np.ndarray, wanted: np.ndarray, least: float = 0.0) -> float:
    """The distance of two arrays, relative to the size of the second, or to the least size that counts."""
    distance = float(np.linalg.norm(got - wanted))
    return distance / max(float(np.linalg.norm(wanted)), least, 1e-30) if distance else 0.0


def same(got: Pytree, wanted: Pytree, complaint: str, *, tolerance: float = 0.0, exact: bool = False) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted), f"{complaint}: another structure"
    for g, w in zip_leaves(got, wanted):
        g, w = wide(g), wide(w)
        scale = max(float(np.max(np.abs(w), initial=0)), 1.0)
        fine = np.array_equal(g, w) if exact else np.allclose(g, w, rtol=tolerance, atol=tolerance * scale)
        assert fine, f"{complaint} (largest difference {np.max(np.abs(g - w)):.3g})"


def gap_of(whole: np.ndarray, parts: np.ndarray, least: float) -> float:
    """How far a gradient and the sum of those of the parts lie apart, relative to its size; 0 if that may be chance.

    Both are samples, whose means are compared. Of random gradients whose mean is zero, the norms tell more. Parts of
    one shape draw the same noise, so that it adds up to as much as 2^(1/2) times the noise of the whole. A gradient
    that depends on the size of the batch differs by a factor of 2 or more.
    """
    a, b = (np.linalg.norm(x.reshape(len(x), -1), axis=1) for x in (whole, parts))
    alike = 0.62 < b.mean() / max(a.mean(), 1e-30) < 1.62
    return _gap_of_means(whole, parts, least) or (0.0 if alike else _gap_of_means(a, b, least))


def _gap_of_means(a: np.ndarray, b: np.ndarray, least: float) -> float:
    difference, n = a - b, len(a)
    noise = np.sqrt(difference.var(0, ddof=1).sum() / n) if n > 1 else 0.0
    size, distance = max(np.linalg.norm(a) / n**0.5, least, 1e-30), np.linalg.norm(difference.mean(0))
    return float(distance / size) if distance > 4 * noise + 2e-3 * size else 0.0
