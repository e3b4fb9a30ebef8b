"""A rule with a modifier around it: the handlers of `modifiers.py`, and how they act in the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from lrules.engine.closures import held
from lrules.engine.handlers import Frame, Handler, key_at
from lrules.engine.per_example import scaled
from lrules.engine.records import Activation, Hidden
from lrules.network import Network
from lrules.options import mesh_axes
from lrules.rule import Feedback, Rule, require_rule
from lrules.typing import AxisName, Loss, Pytree


def modified(rule: Rule, push: Callable[..., Any], *, stochastic: bool = False, axis_name: AxisName = None) -> Rule:
    """The rule on another network, `push(net, params, inputs, scale, key)`, with one more handler."""
    require_rule(rule)
    mesh_axes(axis_name)

    def serve(net: Network, inner: Any, reduction: str) -> Callable[..., Any]:
        def f(params: Pytree, feedback: Feedback, inputs: Pytree, *targets: Pytree, rng: Any = None) -> Any:
            own, rest = jax.random.split(rng) if stochastic else (None, rng)
            rest = rest if rule.stochastic else None
            modified = push(net, params, inputs, _scale(rule, net, inputs, reduction, axis_name), own)
            return inner(modified)(params, feedback, inputs, *targets, rng=rest)

        return f

    def transform(net: Network, *, reduction: str = "mean") -> Callable[..., Any]:
        rule.transform(net, reduction=reduction)  # it refuses here, not later
        return serve(net, lambda net: rule.transform(net, reduction=reduction), reduction)

    def value_and_grad(net: Network, loss: Loss) -> Callable[..., Any]:
        rule.value_and_grad(net, loss)  # type: ignore[misc]
        return serve(net, lambda net: rule.value_and_grad(net, loss), "mean")  # type: ignore[misc]

    return rule.modified(
        transform=transform,
        value_and_grad=None if rule.value_and_grad is None else value_and_grad,
        stochastic=rule.stochastic or stochastic,
    )


def _scale(rule: Rule, net: Network, inputs: Pytree, reduction: str, axis_name: AxisName) -> Any:
    """The factor from the arriving error to that of the per-example sum; it may be a symbolic batch (`jax.export`)."""
    if reduction == "sum" or not rule.additive:
        return 1.0
    n = net.batch_size(inputs) * (jax.lax.psum(1, axis_name) if axis_name is not None else 1)
    return n if is_symbolic_dim(n) else float(n)


class AtHidden(Handler):
    """A function of the error at hidden signals: one for all, with the name "", or one for each."""

    arrays = ("key", "values")

    def __init__(self, fns: Mapping[str, Callable[..., Any]], scale: float, key: Any) -> None:
        self.scale, self.key = scale, key
        self.names, (self.values, self.remade) = set(fns), held(dict(fns))

    def hidden(self, hidden: Hidden, value: Any, frame: Frame) -> Any:
        twice = hidden.mark and hidden.root.hidden is not None  # a layer reads this tensor too
        if twice or not jnp.issubdtype(value.dtype, jnp.inexact):
            return value
        remade, scale, name = self.remade, self.scale, hidden.name
        if not self.names & {name, ""}:
            raise ValueError(
                f"no pattern matches the mark {name!r}, where feedback lands: add one, such as '.*', at the end"
            )

        @jax.custom_vjp
        def identity(value: Any, key: Any, values: Any) -> Any:
            return value

        def backward(kept: Any, error: jax.Array) -> tuple[Any, None, None]:
            key, values = kept
            rng, fns = None if key is None else jax.random.wrap_key_data(key), remade(values)
            fn = fns[name if name in fns else ""]
            new = fn(scaled(error, scale), name, rng)
            shape = getattr(new, "shape", None)
            if shape != error.shape:
                made = f"a {type(new).__name__}" if shape is None else f"the shape {shape}"
                raise ValueError(
                    f"modify_error: fn must return an array of the signal's shape {error.shape} at the hidden signal "
                    f"{name!r}, got {made}"
                )
            return (new / scale).astype(error.dtype), None, None

        identity.defvjp(lambda value, key, values: (value, (key, values)), backward)
        key = None if self.key is None else jax.random.key_data(key_at(self.key, hidden.name, value, frame))
        return identity(value, key, self.values)


def at_output(rule: Rule, fn: Callable[..., Any], axis_name: AxisName) -> Rule:
    """The rule, which gets a function of the output error instead of the output error."""

    require_rule(rule)
    mesh_axes(axis_name)

    def mark(outputs: Pytree, scale: Any) -> Any:
        @jax.custom_vjp
        def identity(y: jax.Array) -> jax.Array:
            return y

        def backward(_: Any, error: jax.Array) -> tuple[Any]:
            return ((fn(scaled(error, scale)) / scale).astype(error.dtype),)

        identity.defvjp(lambda y: (y, None), backward)
        floating = lambda y: jnp.issubdtype(jnp.result_type(y), jnp.inexact)  # noqa: E731
        return jax.tree.map(lambda y: identity(y) if floating(y) else y, outputs)

    def transform(net: Network, *, reduction: str = "mean") -> Callable[..., Any]:
        inner = rule.transform(net, reduction=reduction)

        def f(params: Pytree, feedback: Feedback, inputs: Pytree, *, rng: jax.Array | None = None) -> Any:
            scale = _scale(rule, net, inputs, reduction, axis_name)
            out = inner(params, feedback, inputs, rng=rng)
            return (mark(out[0], scale), *out[1:]) if net.has_aux else mark(out, scale)

        return f

    def value_and_grad(net: Network, loss: Loss) -> Callable[..., Any]:
        assert rule.value_and_grad is not None
        return rule.value_and_grad(net, _with_error(loss, fn))

    return rule.modified(
        transform=transform,
        value_and_grad=None if rule.value_and_grad is None else value_and_grad,
    )


def _with_error(loss: Callable[..., Any], fn: Callable[..., Any]) -> Callable[..., Any]:
    """The loss with another gradient: `fn` of the gradient of each example's loss, times the arriving weight."""

    def modified(outputs: Pytree, targets: Pytree) -> Any:
        @jax.custom_vjp
        def call(outputs: Pytree, targets: Pytree) -> Any:
            return loss(outputs, targets)

        def forward(outputs: Pytree, targets: Pytree) -> tuple[Any, Any]:
            return jax.vjp(lambda o: loss(o, targets), outputs)

        def backward(pull: Callable[..., Any], arriving: jax.Array) -> tuple[Any, None]:
            elements = arriving[0].size if arriving.ndim else 1
            (error,) = pull(jnp.full_like(arriving, 1 / elements))
            weight = arriving.mean() * elements  # the objective is a mean, so the weight is the same for all examples
            error = jax.tree.map(lambda e: fn(e).astype(e.dtype) * weight.astype(e.dtype), error)
            return error, None

        call.defvjp(forward, backward)
        return call(outputs, targets)

    modified.error_is_modified = True  # type: ignore[attr-defined]  # for rules that read values alone, and must refuse
    return modified


class Derivative(Handler):
    """Another derivative for every activation."""

    activations = True

    def __init__(self, g: Callable[..., Any], sites: frozenset[str]) -> None:
        self.g, self.sites = g, sites

    def activation(self, activation: Activation, fn: Callable[..., Any], x: jax.Array, frame: Frame) -> Any:
        if activation.site not in self.sites:
            return fn(x)
        g = self.g

        @jax.custom_vjp
        def replaced(y: jax.Array, x: jax.Array) -> jax.Array:
            return y

        def backward(x: jax.Array, error: jax.Array) -> tuple[None, jax.Array]:
            slope = jnp.asarray(g(x))
            if slope.shape != x.shape:
                raise ValueError(
                    f"replace_derivative: g must be elementwise, got the shape {slope.shape} from a pre-activation of "
                    f"shape {x.shape} at the activation {activation.site!r}"
                )
            return None, (error.astype(x.dtype) * slope).astype(x.dtype)

        replaced.defvjp(lambda y, x: (y, x), backward)
        return replaced(jax.lax.stop_gradient(fn(x)), x)


def kept_errors(key: Any, shape: tuple[int, ...], rate: float) -> Any:
    """True with probability 1 - rate. Each element needs as few random bits as possible: one for 1/2, at most 16.

    The random bits are the cost of dropping.
    """
    bits = next((b for b in (1, 2, 4, 8) if float(rate * 2**b).is_integer()), 16)
    last = shape[-1] if shape else 1
    words = jax.random.bits(key, (*shape[:-1], -(-last * bits // 32)), jnp.uint32)
    shifts = jnp.arange(0, 32, bits, dtype=jnp.uint32).reshape((1,) * words.ndim + (-1,))
    drawn = jnp.expand_dims(words, -1) >> shifts & jnp.uint32(2**bits - 1)
    kept = drawn >= jnp.uint32(round(rate * 2**bits))
    return kept.reshape(*words.shape[:-1], words.shape[-1] * 32 // bits)[..., :last].reshape(shape)
