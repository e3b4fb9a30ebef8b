"""Modifiers: what may happen to the error on its way, or to the updates that it makes. Each maps a rule to a rule.

Those of the error act at *hidden signals*, and at marked tensors (`lrules.hidden`) where direct feedback lands: on all
that arrives there, before the derivative of the activation below and before it goes further down. Of several modifiers
the outermost acts first: `quantize_error(drop_error(rule, 0.5), 5)` quantises an error and then drops some of it.

Modifiers that are not linear act on the gradient of the per-example *sum*: an error that arrives as that of a mean over
n examples is multiplied by n, modified, and divided by n. For rules whose gradient depends on the batch as a whole
(`rule.additive` is False, as BackMAN's) the error is taken as it stands.

Equation and section numbers are those of Baldi, Sadowski, Lu: Learning in the machine: random backpropagation and the
deep learning channel (2018).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from lrules.engine.activations import passing_names, treated
from lrules.engine.closures import held
from lrules.engine.handlers import Frame, Handler, key_at
from lrules.engine.jaxprs import placed_as
from lrules.engine.per_example import PerExample, scaled
from lrules.engine.quantizer import by_parts, quantize, quantizer_numbers
from lrules.engine.records import Activation, Hidden
from lrules.network import Network
from lrules.options import ByName, asked_for, by_name, is_number, mesh_axes
from lrules.rule import Feedback, Rule, require_rule
from lrules.typing import AxisName, Loss, Numbers, Pytree


def modify_error(
    rule: Rule,
    fn: Callable[..., Any],
    *,
    stochastic: bool = False,
    numbers: Mapping[str, Any] | None = None,
    axis_name: AxisName = None,
) -> Rule:
    """Passes the error that arrives at each hidden signal through a function: the constructor of one's own modifier.

    s_l <- fn(s_l)

    A signal has the shape that the model itself gives the tensor, the whole batch in it: `[batch, features]` mostly,
    but the batch need not be in front, and may be merged with other axes (`[batch * time, features]`). Of a model
    under `jax.vmap` it is the batched tensor. Inside a scan, `fn` gets one iteration at a time, without an axis for the
    loop; inside a `shard_map` or `pmap`, the examples of one device.

    Args:
      rule: the rule to modify.
      fn: `(signal, name, rng) -> signal` of the same shape. `signal` is of the shape of the hidden tensor where it is
        defined, as said above, in float32 at least (or complex), on the scale of the per-example sum
        (around BackMAN, whose `additive` is False: the cotangent as it stands); `name` is the hidden signal's, or the
        mark's; `rng` a key of its own (None unless `stochastic`).
      stochastic: whether `fn` needs `rng`; the rule then asks for `rng=` at every step.
      numbers: hyperparameters that `fn` asks for by name: for each a number, or a dict of numbers by regular expression
        (`re.search` on the name of the hidden signal or mark, the first match holds). They may be traced by `jax.jit`
        or `jax.vmap`.
      axis_name: under `shard_map` or `pmap`, the mesh axes over which the mean of the objective runs, if it does.

    Returns:
      The modified rule.

    Raises:
      TypeError: `fn` is not a function, or cannot be called as described; `axis_name` is not a name or names.
      ValueError: at use: `fn` returns something else than an array of the signal's shape, or a pattern in `numbers`
        matches no hidden signal.

    Example:
      >>> import lrules
      >>> clipped = modify_error(lrules.feedback_alignment(), lambda signal, name, rng: signal.clip(-1, 1))
    """
    if not callable(fn):
        raise TypeError(f"modify_error: fn={fn!r} is no function: give one, (signal, name, rng) -> signal")
    given = {name: ByName(name, value, "hidden signal") for name, value in (numbers or {}).items()}
    wanted = asked_for("modify_error: fn", fn, ("signal", "name", "rng"), tuple(given))
    if unasked := sorted(set(given) - wanted):
        raise ValueError(f"numbers= names {unasked[0]!r}, for which fn does not ask: add it to its arguments")

    def bound(name: str) -> Callable[..., Any]:
        return functools.partial(fn, **{number: value.of(name) for number, value in given.items()}) if given else fn

    def push(net: Network, params: Pytree, inputs: Pytree, scale: Any, key: Any) -> Network:
        fns = {"": bound("")} if not any(value.several for value in given.values()) else {}
        if not fns:
            hidden = [h for h in net.graph(params, inputs).hidden if jnp.issubdtype(h.root.aval.dtype, jnp.inexact)]
            for value in given.values():
                value.check(h.name for h in hidden)
            fns = {h.name: bound(h.name) for h in hidden if not h.mark or all(v.has(h.name) for v in given.values())}
        return net.pushing(_AtHidden(fns, scale, key))

    return _modified(rule, push, stochastic=stochastic, axis_name=axis_name)


def quantize_error(
    rule: Rule,
    bits: Numbers,
    *,
    scale: Numbers = 2**-3,
    at: Literal["hidden", "output"] = "hidden",
    axis_name: AxisName = None,
) -> Rule:
    """Quantises the error to signed powers of two, at each hidden signal or at the outputs before it is sent.

    s_l <- alpha sign(s_l) 2^round(clip(log2 |s_l / alpha|, 1 - bits, 0)),  and 0 stays 0   (see `quantize`)

    At hidden signals it is quantised before it goes further down, so that the differences add up in sequential rules,
    while the last layer keeps its true gradient. At the outputs the whole channel starts from the quantised error, the
    last layer included. The error is that of the per-example sum; around BackMAN the cotangent as it stands.

    Args:
      rule: the rule to modify.
      bits: the number of magnitudes, the paper's bit width; or a dict of such numbers by regular expression
        (`re.search` on the name of the hidden signal, the first match holds).
      scale: alpha, the largest magnitude; or a dict of such numbers.
      at: `"hidden"` or `"output"`.
      axis_name: as in `modify_error`.

    Returns:
      The modified rule.

    Raises:
      ValueError: `bits`, `scale` or `at` is out of range; at use: a pattern matches no hidden signal.

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
            raise ValueError('numbers by pattern are for hidden signals: with at="output" give one for bits and scale')
        bits_there, scale_there = (number.of("") for number in chosen)
        return _at_output(rule, lambda error: quantize(error, bits_there, scale_there), axis_name)
    raise ValueError(f'at must be "hidden" or "output", got {at!r}')


def sign_error(rule: Rule, *, axis_name: AxisName = None) -> Rule:
    """Keeps the sign of the error at each hidden signal and drops its magnitude.

    s_l <- sign(s_l),  and 0 stays 0; of a complex error the signs of its real and imaginary part

    Args:
      rule: the rule to modify.
      axis_name: as in `modify_error`.

    Returns:
      The modified rule.

    References:
      Baldi, Sadowski, Lu (2018), section 4.2, observation 5.
    """
    return modify_error(rule, lambda signal, name, rng: by_parts(jnp.sign, signal), axis_name=axis_name)


def magnitude_error(rule: Rule) -> Rule:
    """Keeps the magnitude of the error at each hidden signal and drops its sign.

    s_l <- |s_l|; of a complex error the modulus, a real number

    Args:
      rule: the rule to modify.

    Returns:
      The modified rule.

    References:
      Baldi, Sadowski, Lu (2018), section 4.2, observation 6: this does not learn.
    """
    return modify_error(rule, lambda signal, name, rng: jnp.abs(signal))


def drop_error(rule: Rule, rate: Numbers) -> Rule:
    """Dropout in the learning channel: at each hidden signal, errors are dropped at random and the others scaled up.

    s_l <- s_l m_l / (1 - rate),  with m_l = 0 with probability rate, else 1; a complex error is one number

    Args:
      rule: the rule to modify.
      rate: the probability with which an error is dropped. Errors keep their mean and get 1 / (1 - rate) times the
        mean square: a thousand times at 0.999. The rate is met to a precision of 2^-17, so that near one the mean is
        off by up to 2^-17 / (1 - rate), 0.8% at 0.999, and from 1 - 2^-17 on everything is dropped. (Multiples of
        2^-16 are met exactly.) Or a dict of such numbers by regular expression (`re.search` on the name of the hidden
        signal, the first match holds).

    Returns:
      The modified rule; it needs `rng=`.

    Raises:
      ValueError: the rate is not a number from 0 to below 1; at use: a pattern matches no hidden signal.

    References:
      Baldi, Sadowski, Lu (2018), section 6.1.
    """
    by_name("rate", rate, lambda value: is_number(value) and 0 <= value < 1, "a number >= 0 and < 1", "hidden signal")

    def drop(signal: jax.Array, name: str, rng: Any, rate: float) -> jax.Array:
        kept = placed_as(_kept(rng, signal.shape, rate), jax.typeof(signal))
        return jnp.where(kept, signal / (1 - rate), jnp.zeros_like(signal))

    return modify_error(rule, drop, stochastic=True, numbers={"rate": rate})


def _kept(key: Any, shape: tuple[int, ...], rate: float) -> Any:
    """True with probability 1 - rate, each from as few random bits as can tell: one for 1/2, at most 16.

    Drawing them is what dropping costs.
    """
    bits = next((b for b in (1, 2, 4, 8) if float(rate * 2**b).is_integer()), 16)
    last = shape[-1] if shape else 1
    words = jax.random.bits(key, (*shape[:-1], -(-last * bits // 32)), jnp.uint32)
    shifts = jnp.arange(0, 32, bits, dtype=jnp.uint32).reshape((1,) * words.ndim + (-1,))
    drawn = jnp.expand_dims(words, -1) >> shifts & jnp.uint32(2**bits - 1)
    kept = drawn >= jnp.uint32(round(rate * 2**bits))
    return kept.reshape(*words.shape[:-1], words.shape[-1] * 32 // bits)[..., :last].reshape(shape)


class _AtHidden(Handler):
    """A function of the error at hidden signals: one for all, by the name "", or one for each."""

    arrays = ("key", "values")

    def __init__(self, fns: Mapping[str, Callable[..., Any]], scale: float, key: Any) -> None:
        self.scale, self.key = scale, key
        self.names, (self.values, self.remade) = set(fns), held(dict(fns))

    def hidden(self, hidden: Hidden, value: Any, frame: Frame) -> Any:
        twice = hidden.mark and hidden.root.hidden is not None  # a layer reads this tensor, so it has that name too
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
                made = f"a {type(new).__name__}" if shape is None else f"a signal of shape {shape}"
                raise ValueError(
                    f"modify_error: the function made {made} of a signal of shape {error.shape} at the hidden signal "
                    f"{name!r}: it has to return an array and to keep the shape"
                )
            return (new / scale).astype(error.dtype), None, None

        identity.defvjp(lambda value, key, values: (value, (key, values)), backward)
        key = None if self.key is None else jax.random.key_data(key_at(self.key, hidden.name, value, frame))
        return identity(value, key, self.values)


def _at_output(rule: Rule, fn: Callable[..., Any], axis_name: AxisName) -> Rule:
    """The rule, sent a function of the output error."""

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
    """The loss with another gradient: `fn` of that of each example's own loss, times what arrives."""

    def modified(outputs: Pytree, targets: Pytree) -> Any:
        @jax.custom_vjp
        def call(outputs: Pytree, targets: Pytree) -> Any:
            return loss(outputs, targets)

        def forward(outputs: Pytree, targets: Pytree) -> tuple[Any, Any]:
            return jax.vjp(lambda o: loss(o, targets), outputs)

        def backward(pull: Callable[..., Any], arriving: jax.Array) -> tuple[Any, None]:
            elements = arriving[0].size if arriving.ndim else 1
            (error,) = pull(jnp.full_like(arriving, 1 / elements))
            weight = arriving.mean() * elements  # the objective is the same mean over examples for all
            error = jax.tree.map(lambda e: fn(e).astype(e.dtype) * weight.astype(e.dtype), error)
            return error, None

        call.defvjp(forward, backward)
        return call(outputs, targets)

    return modified


def replace_derivative(rule: Rule, g: Callable[..., Any], *, passing: str | Iterable[str] = ()) -> Rule:
    """Puts a function of the pre-activation in the place of every activation's derivative.

    delta_l = s_l * g(z_l) in place of s_l * f'(z_l)

    What counts as an activation, `lrules.describe` lists; pooling, normalisation and softmax do not. The outermost
    replacement holds.

    Args:
      rule: the rule to modify.
      g: `z -> g(z)`, elementwise.
      passing: names of functions that are no activations and keep their derivative: activations as `lrules.describe`
        lists them (`"tanh"`: all of that name, `"tanh#2"`: that one) and nonlinearities as refusals name them
        (`{"exp"}`).

    Returns:
      The modified rule.

    Raises:
      TypeError: `g` is no function.
      ValueError: at use: a name in `passing` is that of nothing in the network.
      NotImplementedError: at use: a nonlinearity is not recognised as an activation.

    Example:
      >>> import lrules
      >>> triangular = replace_derivative(lrules.backprop(), lambda z: jnp.maximum(1 - abs(z), 0))
    """

    if not callable(g):
        raise TypeError(f"replace_derivative: g={g!r} is no function: give one of the pre-activation, elementwise")

    names = passing_names(passing)

    def push(net: Network, params: Pytree, inputs: Pytree, scale: Any, key: Any) -> Network:
        sites = frozenset(a.site for a in treated(net.graph(params, inputs), names))
        replaced = any(isinstance(handler, _Derivative) for handler in net.handlers)
        return net if replaced else net.pushing(_Derivative(g, sites))

    return _modified(rule, push)


def without_derivatives(rule: Rule, *, passing: str | Iterable[str] = ()) -> Rule:
    """Leaves out the derivatives of the activations.

    delta_l = s_l in place of s_l * f'(z_l)

    Args:
      rule: the rule to modify.
      passing: as in `replace_derivative`.

    Returns:
      The modified rule.

    Raises:
      ValueError, NotImplementedError: as `replace_derivative`.

    References:
      Baldi, Sadowski, Lu (2018), section 3: the variants "(no f')".
    """
    return replace_derivative(rule, jnp.ones_like, passing=passing)


class _Derivative(Handler):
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
                    f"replace_derivative: the function made {slope.shape} of a pre-activation of shape {x.shape} at "
                    f"the activation {activation.site!r}: it has to be elementwise"
                )
            return None, (error.astype(x.dtype) * slope).astype(x.dtype)

        replaced.defvjp(lambda y, x: (y, x), backward)
        return replaced(jax.lax.stop_gradient(fn(x)), x)


def quantize_update(rule: Rule, bits: Numbers, *, scale: Numbers = 2**-6, axis_name: AxisName = None) -> Rule:
    """Quantises each example's weight update to signed powers of two, before the sum over the batch.

    dW_l = sum over examples of Q(delta_l h_{l-1}^T),  Q as in `quantize`

    Every use of a weight is quantised on its own, and so are biases and scales where they meet the data. What meets a
    statistic of the whole batch (as BatchNorm's scale in some models) has no update per example and keeps its gradient,
    as does a parameter that joins the data otherwise, by concatenation. Learned sequential feedback, whose update is
    the same product, is quantised too; learned direct feedback (`direct_feedback_alignment(adaptive=True)`), whose
    update is formed from the output error and the hidden signal, is not. Examples are taken one by one: the memory does
    not grow with batch times parameters, the time does; on a mesh with explicit axes, every device takes all examples.
    Where one example cannot be multiplied alone (weights chosen for each example, `ragged_dot`, functions with a
    derivative of their own), its error alone goes back through the whole batch.
    Of BackMAN, c times the example's gradient is quantised, as it stands, with c from the unquantised gradient of the
    batch.

    Args:
      rule: the rule to modify.
      bits: the number of magnitudes, the paper's bit width; or a dict of such numbers by regular expression
        (`re.search` on the name of the layer, or of the bias or scale; the first match holds).
      scale: alpha, the largest magnitude; or a dict of such numbers.
      axis_name: as in `modify_error`.

    Returns:
      The modified rule.

    Raises:
      ValueError: `bits` or `scale` is out of range; at use: a pattern matches no layer, bias or scale.
      NotImplementedError: at use: the batch axis of a layer cannot be told, or the rule asks for what belongs to the
        whole batch (`rng`, `state`, `targets`, `h` or `slope`).

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

    return _modified(rule, push, axis_name=axis_name)


def _scale(rule: Rule, net: Network, inputs: Pytree, reduction: str, axis_name: AxisName) -> Any:
    """What makes the arriving error that of the per-example sum: a number, or a symbolic batch (`jax.export`)."""
    if reduction == "sum" or not rule.additive:
        return 1.0
    n = net.batch_size(inputs) * (jax.lax.psum(1, axis_name) if axis_name is not None else 1)
    return n if is_symbolic_dim(n) else float(n)


def _modified(rule: Rule, push: Callable[..., Any], *, stochastic: bool = False, axis_name: AxisName = None) -> Rule:
    """The rule on another network, `push(net, params, inputs, scale, key)`, which has one more handler."""
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
        rule.transform(net, reduction=reduction)  # what it refuses, it refuses here
        return serve(net, lambda net: rule.transform(net, reduction=reduction), reduction)

    def value_and_grad(net: Network, loss: Loss) -> Callable[..., Any]:
        rule.value_and_grad(net, loss)  # type: ignore[misc]
        return serve(net, lambda net: rule.value_and_grad(net, loss), "mean")  # type: ignore[misc]

    return rule.modified(
        transform=transform,
        value_and_grad=None if rule.value_and_grad is None else value_and_grad,
        stochastic=rule.stochastic or stochastic,
    )
