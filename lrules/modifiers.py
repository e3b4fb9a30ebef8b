"""Modifiers: functions from a rule to a rule. They change the error on its way, or the updates.

Modifiers of the error act at *hidden signals* (see docs/terms.md), and at marked tensors (`lrules.hidden`) where direct
feedback lands. They change the whole error that arrives there, before the derivative of the activation below and before
it goes further down. Of several modifiers, the outermost acts first: `quantize_error(drop_error(rule, 0.5), 5)`
quantises an error and then drops a part of it.

Modifiers that are not linear act on the gradient of the per-example *sum*: the error of a mean over n examples is
multiplied by n, modified, and divided by n. For rules whose gradient depends on the batch as a whole (`rule.additive`
is False, as for BackMAN), they act on the error as it arrives.

Equation and section numbers are those of Baldi, Sadowski, Lu: Learning in the machine: random backpropagation and the
deep learning channel (2018).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lrules.engine.activations import passing_names, treated
from lrules.engine.jaxprs import placed_as
from lrules.engine.per_example import PerExample, scaled
from lrules.engine.quantizer import by_parts, quantize, quantizer_numbers
from lrules.modified import AtHidden, Derivative, at_output, kept_errors, modified
from lrules.network import Network
from lrules.options import asked_for, by_name, is_number, rule_numbers
from lrules.rule import Rule
from lrules.typing import AxisName, Numbers, Pytree


def modify_error(
    rule: Rule,
    fn: Callable[..., Any],
    *,
    stochastic: bool = False,
    numbers: Mapping[str, Any] | None = None,
    axis_name: AxisName = None,
) -> Rule:
    """Passes the error that arrives at each hidden signal through a function. Use it to make your own modifier.

    s_l <- fn(s_l)

    A signal has the shape that the tensor has in the model, with the whole batch: mostly `[batch, features]`. But the
    batch may be another axis, or be merged with other axes (`[batch * time, features]`). For a model under `jax.vmap`,
    the signal is the batched tensor. Inside a scan, `fn` gets one iteration at a time, without an axis for the loop.
    Inside a `shard_map` or `pmap`, it gets the examples of one device.

    Args:
      rule: the rule to modify.
      fn: `(signal, name, rng) -> signal`, with the same shape. `signal` is at least float32 (or complex), on the scale
        of the per-example sum (around BackMAN, whose `additive` is False, as it arrives). `name` is the name of the
        hidden signal or mark. `rng` is a separate key for each signal (None unless `stochastic` is True).
      stochastic: whether `fn` needs `rng`. The rule then asks for `rng=` at every step.
      numbers: hyperparameters that `fn` asks for by name. Give for each a number, or a dict of numbers by regular
        expression for the names of hidden signals and marks (`re.search`, the first match holds). `jax.jit` and
        `jax.vmap` may trace them.
      axis_name: under `shard_map` or `pmap`, the mesh axes over which the mean of the objective runs, if it runs over
        any.

    Returns:
      The modified rule.

    Raises:
      TypeError: `fn` is not a function or cannot be called like this, or `axis_name` is not a name, several names or
        None.
      ValueError: at use: `fn` does not return an array with the shape of the signal, or a pattern in `numbers` matches
        no hidden signal.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> stopped = lrules.modify_error(lrules.backprop(), lambda signal, name, rng: 0 * signal)
      >>> f = lrules.transform(net, stopped)
      >>> grads = jax.grad(lambda p: f(p, lrules.Feedback({}, {}), jnp.ones((5, 3))).sum())(params)
      >>> {name: bool(g.any()) for name, g in grads.items()}
      {'a': False, 'b': True}
    """
    if not callable(fn):
        raise TypeError(f"modify_error: fn must be a function (signal, name, rng) -> signal, got {fn!r}")
    given = rule_numbers(numbers, "hidden signal")
    wanted = asked_for("modify_error: fn", fn, ("signal", "name", "rng"), tuple(given))
    if unasked := sorted(set(given) - wanted):
        raise ValueError(f"numbers has {unasked[0]!r}, but fn has no argument of this name: add it to fn")

    def bound(name: str) -> Callable[..., Any]:
        return functools.partial(fn, **{number: value.of(name) for number, value in given.items()}) if given else fn

    def push(net: Network, params: Pytree, inputs: Pytree, scale: Any, key: Any) -> Network:
        fns = {"": bound("")} if not any(value.several for value in given.values()) else {}
        if not fns:
            hidden = [h for h in net.graph(params, inputs).hidden if jnp.issubdtype(h.root.aval.dtype, jnp.inexact)]
            for value in given.values():
                value.check(h.name for h in hidden)
            fns = {h.name: bound(h.name) for h in hidden if not h.mark or all(v.has(h.name) for v in given.values())}
        return net.pushing(AtHidden(fns, scale, key))

    return modified(rule, push, stochastic=stochastic, axis_name=axis_name)


def quantize_error(
    rule: Rule,
    bits: Numbers,
    *,
    scale: Numbers = 2**-3,
    at: Literal["hidden", "output"] = "hidden",
    axis_name: AxisName = None,
) -> Rule:
    """Quantises the error to signed powers of two, at each hidden signal or at the outputs.

    s_l <- alpha sign(s_l) 2^round(clip(log2 |s_l / alpha|, 1 - bits, 0)),  and 0 stays 0

    At hidden signals, the error is quantised before it goes further down. So the differences add up in sequential
    rules, and the last layer keeps its true gradient. At the outputs, the whole learning channel begins with the
    quantised error, also for the last layer. The error has the scale of the per-example sum (around BackMAN, the scale
    with which it arrives).

    Args:
      rule: the rule to modify.
      bits: the number of magnitudes, called bit width in the paper. Or a dict of such numbers by regular expression for
        the names of hidden signals (`re.search`, the first match holds).
      scale: alpha, the largest magnitude. Or a dict of such numbers. `jax.jit` and `jax.vmap` may trace them.
      at: `"hidden"` or `"output"`.
      axis_name: as in `modify_error`.

    Returns:
      The modified rule.

    Raises:
      ValueError: `bits`, `scale` or `at` is out of range. At use: a pattern matches no hidden signal.
      TypeError: `axis_name` is not a name, several names or None.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> rule = lrules.quantize_error(lrules.backprop(), bits=3, scale=1.0, at="output")
      >>> f = lrules.transform(lambda w, x: x @ w, rule)
      >>> jax.grad(lambda w: 0.3 * f(w, lrules.Feedback({}, {}), jnp.ones((1, 2))).sum())(jnp.ones((2, 1))).tolist()
      [[0.25], [0.25]]

    References:
      Baldi, Sadowski, Lu (2018), section 5.1, Eq. 17 to 19.
    """
    chosen = quantizer_numbers(bits, scale, "hidden signal")
    if at == "hidden":

        def fn(signal: jax.Array, name: str, rng: Any, bits: int, scale: float) -> jax.Array:
            return quantize(signal, bits, scale)

        return modify_error(rule, fn, numbers={"bits": bits, "scale": scale}, axis_name=axis_name)
    if at == "output":
        if any(number.several for number in chosen):
            raise ValueError('with at="output", bits and scale must be numbers: patterns are for hidden signals')
        bits_there, scale_there = (number.of("") for number in chosen)
        return at_output(rule, lambda error: quantize(error, bits_there, scale_there), axis_name)
    raise ValueError(f'at must be "hidden" or "output", got {at!r}')


def sign_error(rule: Rule, *, axis_name: AxisName = None) -> Rule:
    """Keeps the sign of the error at each hidden signal and drops its magnitude.

    s_l <- sign(s_l),  and 0 stays 0; for a complex error, the signs of its real and imaginary parts

    Args:
      rule: the rule to modify.
      axis_name: as in `modify_error`.

    Returns:
      The modified rule.

    Raises:
      TypeError: `axis_name` is not a name, several names or None.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net = lambda p, x: jnp.sin(x @ p["a"]) @ p["b"]
      >>> params = {"a": jnp.zeros((1, 2)), "b": jnp.array([[0.3], [-2.0]])}
      >>> f = lrules.transform(net, lrules.sign_error(lrules.backprop()))
      >>> jax.grad(lambda p: f(p, lrules.Feedback({}, {}), jnp.ones((1, 1))).sum())(params)["a"].tolist()
      [[1.0, -1.0]]

    References:
      Baldi, Sadowski, Lu (2018), section 4.2, observation 5.
    """
    return modify_error(rule, lambda signal, name, rng: by_parts(jnp.sign, signal), axis_name=axis_name)


def magnitude_error(rule: Rule) -> Rule:
    """Keeps the magnitude of the error at each hidden signal and drops its sign.

    s_l <- |s_l|; for a complex error, the modulus, a real number

    Args:
      rule: the rule to modify.

    Returns:
      The modified rule.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net = lambda p, x: jnp.sin(x @ p["a"]) @ p["b"]
      >>> params = {"a": jnp.zeros((1, 2)), "b": jnp.array([[0.5], [-2.0]])}
      >>> f = lrules.transform(net, lrules.magnitude_error(lrules.backprop()))
      >>> jax.grad(lambda p: f(p, lrules.Feedback({}, {}), jnp.ones((1, 1))).sum())(params)["a"].tolist()
      [[0.5, 2.0]]

    References:
      Baldi, Sadowski, Lu (2018), section 4.2, observation 6. Such a rule does not learn.
    """
    return modify_error(rule, lambda signal, name, rng: jnp.abs(signal))


def drop_error(rule: Rule, rate: Numbers) -> Rule:
    """Dropout in the learning channel: drops errors at each hidden signal at random, and scales up the others.

    s_l <- s_l m_l / (1 - rate),  where m_l = 0 with probability rate, else 1; a complex error is one number

    Args:
      rule: the rule to modify.
      rate: the probability of dropping an error, >= 0 and < 1. The mean of the errors stays the same, and their mean
        square becomes 1 / (1 - rate) times as large: a thousand times at 0.999. The rate has a precision of 2^-17
        (multiples of 2^-16 are exact). So near one the mean may be wrong by up to 2^-17 / (1 - rate), 0.8% at 0.999,
        and a rate >= 1 - 2^-17 drops everything. Or a dict of such numbers by regular expression for the names of
        hidden signals (`re.search`, the first match holds).

    Returns:
      The modified rule. It needs `rng=`.

    Raises:
      ValueError: `rate` is not a number >= 0 and < 1. At use: a pattern matches no hidden signal.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.sin(x @ p["a"]) @ p["b"], {"a": jnp.zeros((1, 8)), "b": jnp.ones((8, 1))}
      >>> f = lrules.transform(net, lrules.drop_error(lrules.backprop(), rate=0.75))
      >>> loss = lambda p: f(p, lrules.Feedback({}, {}), jnp.ones((1, 1)), rng=jax.random.key(0)).sum()
      >>> sorted(set(jax.grad(loss)(params)["a"][0].tolist()))
      [0.0, 4.0]

    References:
      Baldi, Sadowski, Lu (2018), section 6.1.
    """
    by_name("rate", rate, lambda value: is_number(value) and 0 <= value < 1, "a number >= 0 and < 1", "hidden signal")

    def drop(signal: jax.Array, name: str, rng: Any, rate: float) -> jax.Array:
        kept = placed_as(kept_errors(rng, signal.shape, rate), jax.typeof(signal))
        return jnp.where(kept, signal / (1 - rate), jnp.zeros_like(signal))

    return modify_error(rule, drop, stochastic=True, numbers={"rate": rate})


def replace_derivative(rule: Rule, g: Callable[..., Any], *, passing: str | Iterable[str] = ()) -> Rule:
    """Replaces the derivative of every activation by a function of its pre-activation.

    delta_l = s_l * g(z_l), not s_l * f'(z_l)

    `lrules.describe` lists the activations. Pooling, normalisation and softmax are not activations. If there are
    several replacements, the outermost holds.

    Args:
      rule: the rule to modify.
      g: `z -> g(z)`, elementwise.
      passing: names of functions that are not activations here, so they keep their derivative. Give names of
        activations that `lrules.describe` lists (`"tanh"`: all with that name, `"tanh#2"`: only this one), and names of
        nonlinearities that refusals name (`{"exp"}`).

    Returns:
      The modified rule.

    Raises:
      TypeError: `g` is not a function.
      ValueError: at use: nothing in the network has a name in `passing`, or `g` is not elementwise.
      NotImplementedError: at use: a nonlinearity is not recognised as an activation.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> triangular = lrules.replace_derivative(lrules.backprop(), lambda z: jnp.maximum(1 - abs(z), 0))
      >>> f = lrules.transform(lambda w, x: jnp.tanh(x @ w), triangular)
      >>> jax.grad(lambda w: f(w, lrules.Feedback({}, {}), jnp.ones((1, 1))).sum())(jnp.array([[0.25]])).tolist()
      [[0.75]]
    """

    if not callable(g):
        raise TypeError(f"replace_derivative: g must be an elementwise function of the pre-activation, got {g!r}")

    names = passing_names(passing)

    def push(net: Network, params: Pytree, inputs: Pytree, scale: Any, key: Any) -> Network:
        sites = frozenset(a.site for a in treated(net.graph(params, inputs), names))
        replaced = any(isinstance(handler, Derivative) for handler in net.handlers)
        return net if replaced else net.pushing(Derivative(g, sites))

    return modified(rule, push)


def without_derivatives(rule: Rule, *, passing: str | Iterable[str] = ()) -> Rule:
    """Leaves out the derivatives of the activations.

    delta_l = s_l, not s_l * f'(z_l)

    Args:
      rule: the rule to modify.
      passing: as in `replace_derivative`.

    Returns:
      The modified rule.

    Raises:
      ValueError, NotImplementedError: as in `replace_derivative`.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> f = lrules.transform(lambda w, x: jnp.tanh(x @ w), lrules.without_derivatives(lrules.backprop()))
      >>> jax.grad(lambda w: f(w, lrules.Feedback({}, {}), jnp.ones((1, 1))).sum())(jnp.array([[0.25]])).tolist()
      [[1.0]]

    References:
      Baldi, Sadowski, Lu (2018), section 3: the variants "(no f')".
    """
    return replace_derivative(rule, jnp.ones_like, passing=passing)


def quantize_update(rule: Rule, bits: Numbers, *, scale: Numbers = 2**-6, axis_name: AxisName = None) -> Rule:
    """Quantises the weight update of each example to signed powers of two, before the sum over the batch.

    dW_l = sum over examples of Q(delta_l h_{l-1}^T),  Q(x) = alpha sign(x) 2^round(clip(log2 |x / alpha|, 1 - bits, 0))

    Each use of a weight is quantised separately. Biases and scales are quantised where they meet the data. A parameter
    that meets a statistic of the whole batch (as the scale of BatchNorm in some models) has no update per example, so
    it keeps its gradient. So does a parameter that is concatenated with the data. Learned sequential feedback is
    quantised too, because its update is the same product. Learned direct feedback
    (`direct_feedback_alignment(adaptive=True)`) is not: its update comes from the output error and the hidden signal.

    The examples are computed one by one: the time grows with batch times parameters, the memory does not. On a mesh
    with explicit axes, every device computes all examples. If one example cannot be multiplied alone (weights chosen
    for each example, `ragged_dot`, functions with a custom derivative), its error alone goes back through the whole
    batch. For BackMAN, c times the gradient of the example is quantised, with its own scale; c comes from the
    unquantised gradient of the batch.

    Args:
      rule: the rule to modify.
      bits: the number of magnitudes, called bit width in the paper. Or a dict of such numbers by regular expression for
        the names of layers, biases and scales (`re.search`, the first match holds).
      scale: alpha, the largest magnitude. Or a dict of such numbers. `jax.jit` and `jax.vmap` may trace them.
      axis_name: as in `modify_error`.

    Returns:
      The modified rule.

    Raises:
      ValueError: `bits` or `scale` is out of range. At use: a pattern matches no layer, bias or scale.
      TypeError: `axis_name` is not a name, several names or None.
      NotImplementedError: at use: the batch axis of a layer cannot be found, or the rule asks for values of the whole
        batch (`rng`, `state`, `targets`, `h` or `slope`).

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> f = lrules.transform(lambda w, x: x @ w, lrules.quantize_update(lrules.backprop(), bits=3, scale=1.0))
      >>> x = jnp.array([[0.3], [0.9]])  # the updates of two examples become 0.25 and 1
      >>> float(jax.grad(lambda w: f(w, lrules.Feedback({}, {}), x).mean())(jnp.ones((1, 1)))[0, 0])
      0.625

    References:
      Baldi, Sadowski, Lu (2018), section 5.2.
    """
    chosen = quantizer_numbers(bits, scale, "layer")

    def push(net: Network, params: Pytree, inputs: Pytree, scale_: Any, key: Any) -> Network:
        def fn(gradient: jax.Array, name: str) -> jax.Array:
            bits, scale = (number.of(name) for number in chosen)
            return quantize(scaled(gradient, scale_), bits, scale) / scale_

        if any(isinstance(handler, PerExample) for handler in net.handlers):
            both = (h.then(fn, chosen) if isinstance(h, PerExample) else h for h in net.handlers)
            return net.handled(tuple(both))
        return net.pushing(PerExample((fn,), chosen, rule, net, params, inputs))

    return modified(rule, push, axis_name=axis_name)
