"""The conformance test that every rule passes, ours and yours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrules.apply import transform, value_and_grad
from lrules.network import Network, as_network
from lrules.rule import Feedback, Gradients, Rule
from lrules.typing import Pytree

__all__ = ["check_rule", "half_squared_error", "serves_transform"]


def check_rule(rule: Rule, net: Network | None = None, params: Pytree = None, inputs: Pytree = None) -> None:
    """Checks that a rule keeps the promises of `lrules.Rule`.

    The forward pass stays as it is, bit for bit; gradients have the parameters' structure, shapes and dtypes, and are
    finite, dead units included; `jit`, `vmap` over seeds and `scan` over steps agree with plain calls; the second step
    does not compile again; `init` works under `eval_shape` and returns buffers of its own; `rng` is asked for exactly
    by stochastic rules; an error that is zero at the outputs moves no forward weight, unless the rule is stochastic or
    needs the targets.

    Args:
      rule: the rule.
      net, params, inputs: a network to try it on, with outputs `[batch, outputs]`; by default a small multilayer
        perceptron with a skip connection, and one unit that is always dead.

    Raises:
      AssertionError: a promise is broken; the message says which.

    Example:
      >>> import lrules
      >>> lrules.testing.check_rule(lrules.feedback_alignment())
    """
    if net is None:
        net, params, inputs = _example()
    net = as_network(net)
    key = jax.random.key(7)
    rng = {"rng": jax.random.key(11)} if rule.stochastic else {}
    feedback = rule.init(key, net, params, inputs)
    outputs = jax.jit(net.__call__)(params, inputs)
    outputs = outputs[0] if net.has_aux else outputs
    targets = jax.tree.map(lambda y: jnp.roll(y, 1, 0) + jnp.asarray(0.1, y.dtype), outputs)

    _check_init(rule, net, params, inputs, feedback, key)
    _check_rng(rule, net, params, feedback, inputs, targets)
    if serves_transform(rule, net):
        f = transform(net, rule)
        got = jax.jit(lambda p, x: f(p, feedback, x, **rng))(params, inputs)
        got = got[0] if net.has_aux else got
        _same(got, outputs, "transform changes the outputs", exact=True)

    step = value_and_grad(net, half_squared_error, rule)
    jitted = jax.jit(step)
    (value, seen, *_), grads = jitted(params, feedback, inputs, targets, **rng)
    _same(seen, outputs, "value_and_grad returns other outputs than the network's", tolerance=1e-6)
    _same(value, half_squared_error(outputs, targets).mean(), "the value is not the mean loss", tolerance=1e-5)
    _check_gradients(params, feedback, grads)

    (plain_value, *_), plain = step(params, feedback, inputs, targets, **rng)
    _same(plain_value, value, "jit changes the value", tolerance=1e-5)
    _same(plain.params, grads.params, "jit changes the gradients", tolerance=1e-4)
    jitted(jax.tree.map(lambda p: p * jnp.asarray(0.9, p.dtype), params), feedback, inputs, targets, **rng)
    assert jitted._cache_size() == 1, "the second step compiles again"  # type: ignore[attr-defined]

    _check_vmap(rule, net, params, inputs, targets, step)
    _check_scan(step, params, feedback, inputs, targets, rng)
    if not rule.stochastic and serves_transform(rule, net):  # targets may teach where the error is zero
        (_, seen, *_), _ = jitted(params, feedback, inputs, targets)
        still = jax.jit(step)(params, feedback, inputs, seen)[1]
        for leaf in jax.tree.leaves(still.params):
            assert not jnp.any(leaf), "an error of zero at the outputs moves the parameters"


def serves_transform(rule: Rule, net: Network) -> bool:
    """Whether `transform` serves the rule (else only `value_and_grad` does)."""
    try:
        transform(net, rule)
    except ValueError:
        return False
    return True


def half_squared_error(outputs: Pytree, targets: Pytree) -> jax.Array:
    """0.5 ||y - t||^2 per example, `[batch]`."""
    terms = [0.5 * ((y - t) ** 2).reshape(len(y), -1).sum(1) for y, t in _zip(outputs, targets)]
    return sum(terms[1:], terms[0])


def _zip(a: Pytree, b: Any) -> Iterator[tuple[Any, Any]]:
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


def _example() -> tuple[Network, dict[str, dict[str, Any]], jax.Array]:
    keys = jax.random.split(jax.random.key(3), 4)
    params = {
        name: {"kernel": jax.random.normal(k, shape) / shape[0] ** 0.5, "bias": jnp.full(shape[1], 0.1, jnp.float32)}
        for name, k, shape in zip("abcd", keys, [(6, 8), (8, 8), (8, 8), (8, 3)], strict=True)
    }
    params["a"]["bias"] = params["a"]["bias"].at[2].set(-100.0)  # never active

    def apply(params: Pytree, x: jax.Array) -> Any:
        layer = lambda name, h: h @ params[name]["kernel"] + params[name]["bias"][None]  # noqa: E731
        h = jax.nn.relu(layer("a", x))
        h = h + jnp.tanh(layer("b", h))
        return layer("d", jax.nn.relu(layer("c", h)))

    return Network(apply), params, jax.random.normal(jax.random.key(4), (5, 6))


def _same(got: Pytree, wanted: Pytree, complaint: str, *, tolerance: float = 0.0, exact: bool = False) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted), f"{complaint}: another structure"
    for g, w in _zip(got, wanted):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        scale = max(float(np.max(np.abs(w), initial=0)), 1.0)
        fine = np.array_equal(g, w) if exact else np.allclose(g, w, rtol=tolerance, atol=tolerance * scale)
        assert fine, f"{complaint} (largest difference {np.max(np.abs(g - w)):.3g})"


def _check_init(rule: Rule, net: Network, params: Pytree, inputs: Pytree, feedback: Feedback, key: jax.Array) -> None:
    assert isinstance(feedback, Feedback), "init does not return a Feedback"
    shapes = jax.eval_shape(lambda k, p, x: rule.init(k, net, p, x), key, params, inputs)
    described = jax.tree.map(lambda x: (x.shape, str(x.dtype)), feedback)
    assert jax.tree.map(lambda x: (x.shape, str(x.dtype)), shapes) == described, "init differs under eval_shape"
    buffers = {id(x) for x in jax.tree.leaves(params)}
    assert not buffers & {id(x) for x in jax.tree.leaves(feedback)}, "init returns buffers of the parameters"
    again = rule.init(key, net, params, inputs)
    _same(again, feedback, "init with one key gives two results", exact=True)


def _check_rng(rule: Rule, net: Network, params: Pytree, feedback: Feedback, inputs: Pytree, targets: Pytree) -> None:
    wrong = {} if rule.stochastic else {"rng": jax.random.key(0)}
    try:
        value_and_grad(net, half_squared_error, rule)(params, feedback, inputs, targets, **wrong)
    except ValueError as error:
        assert "rng" in str(error), f"the wrong use of rng raises something else: {error}"
    else:
        raise AssertionError("rng is " + ("not asked for" if rule.stochastic else "taken without need"))


def _check_gradients(params: Pytree, feedback: Feedback, grads: Gradients) -> None:
    assert jax.tree.structure(grads.params) == jax.tree.structure(params), "gradients have another structure"
    for g, p in _zip(grads.params, params):
        kinds = f"{g.dtype}{g.shape}", f"{p.dtype}{p.shape}"
        assert kinds[0] == kinds[1], f"a gradient is {kinds[0]}, its parameter {kinds[1]}"
        assert jnp.all(jnp.isfinite(g)), "a gradient is not finite"
    assert any(bool(jnp.any(g)) for g in jax.tree.leaves(grads.params)), "all gradients are zero"
    assert jax.tree.structure(grads.feedback) == jax.tree.structure(feedback.learned), (
        "grads.feedback has another structure than feedback.learned"
    )
    for g, b in _zip(grads.feedback, feedback.learned):
        same = g.shape == b.shape and g.dtype == b.dtype
        assert same, "a feedback gradient has another shape or dtype than its weight"
        assert jnp.all(jnp.isfinite(g)), "a feedback gradient is not finite"
    assert jax.tree.structure(grads.state) == jax.tree.structure(feedback.state), "grads.state has another structure"


def _check_vmap(rule: Rule, net: Network, params: Pytree, inputs: Pytree, targets: Pytree, step: Any) -> None:
    keys = jax.random.split(jax.random.key(5), 2)
    feedbacks = jax.vmap(lambda k: rule.init(k, net, params, inputs))(keys)
    many = jax.tree.map(lambda p: jnp.stack([p, p * jnp.asarray(0.5, p.dtype)]), params)
    rng = jax.random.split(jax.random.key(6), 2) if rule.stochastic else None

    def one(p: Any, fb: Feedback, k: Any) -> Any:
        return step(p, fb, inputs, targets, **({} if k is None else {"rng": k}))[1].params

    together = jax.jit(jax.vmap(one))(many, feedbacks, rng)
    for i in range(2):
        alone = jax.jit(one)(*jax.tree.map(lambda x: x[i], (many, feedbacks, rng)))  # noqa: B023
        picked = jax.tree.map(lambda x: x[i], together)  # noqa: B023
        _same(picked, alone, "vmap over seeds changes the gradients", tolerance=1e-4)


def _check_scan(
    step: Any, params: Pytree, feedback: Feedback, inputs: Pytree, targets: Pytree, rng: Mapping[str, Any]
) -> None:
    def update(p: Any, fb: Feedback) -> tuple[Any, Feedback]:
        _, grads = step(p, fb, inputs, targets, **rng)
        p = jax.tree.map(lambda p, g: p - jnp.asarray(1e-3, p.dtype) * g, p, grads.params)
        learned = jax.tree.map(lambda b, g: b - jnp.asarray(1e-3, b.dtype) * g, fb.learned, grads.feedback)
        return p, fb._replace(learned=learned, state=grads.state)

    scanned = jax.jit(lambda carry: jax.lax.scan(lambda c, _: (update(*c), None), carry, None, length=2)[0])
    once = jax.jit(update)
    _same(scanned((params, feedback))[0], once(*once(params, feedback))[0], "scan changes the steps", tolerance=1e-4)


def __dir__() -> list[str]:
    return list(__all__)
