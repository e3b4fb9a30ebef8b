"""Feedback weights that learn from noise to mirror the forward weights (Akrout et al. 2019).

Ordinary steps are those of feedback alignment, delta_l = (B_{l+1}^T delta_{l+1}) * f'(z_l) and dW_l = delta_l
h_{l-1}^T, and leave B as it is. In a phase of its own, noise xi of mean 0 and variance std^2 replaces the input of each
layer, biases are silent, and only B learns:

    mirror        B <- B + eta (xi y^T - decay B),  y = W xi     E xi y^T = std^2 W, so B goes to std^2 / decay W
    estimation    B <- B - eta xi (y' - y)^T,       y' = B xi    descends |y' - y|^2 / 2, so B goes to W

with B in the layout of W, and means over the examples. (Both are mirrored in the layout of W^T in the paper, Eq. 7 to
9.) The noise of the mirror's samples stays in B: its variance is proportional to eta. The estimate has no noise at B =
W. The paper takes all responses as linear, and so does the rule: it needs no activation.

A convolution uses a weight at many places. xi y^T is its mean over these places, as over examples. So std and decay
mean the same for layers of all kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from lrules.constructors import sequential
from lrules.engine.dtypes import widened
from lrules.extend import Layer, Product, placed_as
from lrules.options import as_initializer, by_name, is_number, is_positive
from lrules.rule import Rule
from lrules.typing import Initializer, Numbers, Pytree

Phase = Literal["mirror", "estimation"]


def weight_mirror(
    init: Initializer | None = None,
    *,
    std: Numbers = 1.0,
    decay: Numbers = 1.0,
    noise: Callable[..., jax.Array] = jax.random.normal,
    phase: Phase = "mirror",
) -> Rule:
    """Weight mirror (WM): feedback alignment whose feedback weights learn the forward weights from noise.

    dB_l = decay B_l - mean of xi y^T,  y = W_l xi,  xi ~ noise of variance std^2

    An ordinary step (`lrules.value_and_grad`, `lrules.transform`) is one of feedback alignment. It needs no key, and
    `grads.feedback` is zero. The feedback weights learn in steps of their own: `lrules.feedback_grad(net, rule)` gives
    their gradient, without a loss. There noise replaces the input of every layer. No weight is copied.

    Take as many of these steps as you want, whenever you want. Give them an optimizer of their own, without weight
    decay: with plain gradient descent of rate eta, the distance to the limit shrinks by about 1 - eta decay
    (`"mirror"`) or 1 - eta std^2 (`"estimation"`) at each step. Use eta decay or eta std^2 below 1; with a batch of n
    examples and a layer of m inputs, `"estimation"` needs eta std^2 (1 + m / n) below 2. More examples give less noise.
    Of a weight that the network uses several times (the steps of a recurrent net), dB is the mean over its uses.

    On the digits of scikit-learn (three layers of 64, 5 seeds, a step of the phase of rate 0.1 after each ordinary
    step) it has 97.4 ± 0.6% of the test set right, as backpropagation (97.4 ± 0.5%); feedback alignment has 96.1 ±
    0.7%. It fails if B cannot follow W: at rate 0.001 the angle to backpropagation is 51 degrees, and 96.4 ± 0.4% are
    right.

    Args:
      init: the initializer of the feedback weights, `init(key, shape, dtype)`; it draws each layer's
        `[fan_in, fan_out]`. Default `jax.nn.initializers.glorot_normal()`.
      std: the standard deviation of the noise; or a dict of such numbers by regular expression (`re.search` on the name
        of the layer, the first match holds). Layers that read data get no noise, and need no number. `jax.jit` and
        `jax.vmap` may trace them.
      decay: the decay of the feedback weights in the phase, a number or numbers by layer; for `phase="mirror"` only.
        B goes to `std**2 / decay` times W.
      noise: `(key, shape, dtype)` -> numbers with mean 0 and variance 1, such as `jax.random.rademacher`.
      phase: `"mirror"`: B follows the product of noise and response, and decays. `"estimation"`: B is fitted to the
        responses by least squares, dB_l = mean of xi (B_l xi - W_l xi)^T, so B goes to W, and stays there.

    Returns:
      The rule. If a layer reads a hidden signal (see docs/terms.md), each of its parameter matrices has one learned
      feedback weight of the same shape.

    Raises:
      TypeError: `init` or `noise` is not a function.
      ValueError: an option does not fit its description, or `decay` is given for `phase="estimation"`. At use: a
        pattern in `std` or `decay` matches no layer, a layer that gets noise has no number, or the noise does not have
        the shape that the rule asks for.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> x, rule, loss = jnp.ones((500, 3)), lrules.weight_mirror(), lrules.testing.half_squared_error
      >>> feedback = rule.init(jax.random.key(0), net, params, x)
      >>> mirror = jax.jit(lrules.feedback_grad(net, rule))
      >>> for key in jax.random.split(jax.random.key(1), 50):
      ...     db = mirror(params, feedback, x, rng=key)
      ...     feedback = feedback._replace(learned=jax.tree.map(lambda b, g: b - 0.1 * g, feedback.learned, db))
      >>> bool(abs(feedback.learned["b"] - params["b"]).max() < 0.1)
      True
      >>> _, grads = lrules.value_and_grad(net, loss, rule)(params, feedback, x, jnp.zeros((500, 2)))
      >>> bool(grads.feedback["b"].any())
      False

    References:
      Akrout, Wilson, Humphreys, Lillicrap, Tweed: Deep learning without weight transport (2019), sections 3, 4.
    """
    draw = as_initializer(init)
    by_name("std", std, is_positive, "a finite number > 0", traced=True)
    by_name("decay", decay, lambda d: d == 0 or is_positive(d), "a finite number >= 0", traced=True)
    if not callable(noise):
        raise TypeError(f"noise must be a function (key, shape, dtype) -> array, got a {type(noise).__name__}")
    if phase not in get_args(Phase):
        raise ValueError(f'phase must be "mirror" or "estimation", got {phase!r}')

    def noisy(x: Pytree, rng: jax.Array, std: Any, layer: Layer) -> Pytree:
        """Noise in the place of the input of a layer; integers, which choose weights, stay."""
        leaves, tree = jax.tree.flatten(x)
        drawn = []
        for leaf, key in zip(leaves, jax.random.split(rng, len(leaves)), strict=True):
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                drawn.append(leaf)
                continue
            xi = noise(key, leaf.shape, leaf.dtype)
            if jnp.shape(xi) != leaf.shape:
                raise ValueError(
                    f"weight_mirror: noise(key, shape, dtype) must return the shape {leaf.shape} at the layer "
                    f"{layer.name!r}, got {jnp.shape(xi)}: draw one number for each element"
                )
            drawn.append(placed_as(jnp.asarray(std).astype(leaf.dtype) * xi.astype(leaf.dtype), jax.typeof(leaf)))
        return jax.tree.unflatten(tree, drawn)

    def mirror(
        op: Product, w: jax.Array, b: Any, x: Any, d: jax.Array, layer: Layer, *, rng: Any, std: Any, decay: Any
    ) -> tuple[Any, Any, Any]:
        if layer.reads is None:  # nothing goes down from here
            return None, None, jnp.zeros_like(b)
        _require_numbers(layer, std=std, decay=decay)
        xi = noisy(x, rng, std, layer)
        mirrored = _mean_product(op, w, xi, op(w, xi))
        db = jnp.asarray(decay).astype(b.dtype) * jnp.conj(b) - mirrored.astype(b.dtype)
        return None, _zeros(x), _one_of(layer, db)

    def estimate(
        op: Product, w: jax.Array, b: Any, x: Any, d: jax.Array, layer: Layer, *, rng: Any, std: Any
    ) -> tuple[Any, Any, Any]:
        if layer.reads is None:
            return None, None, jnp.zeros_like(b)
        _require_numbers(layer, std=std)
        xi = noisy(x, rng, std, layer)
        difference = op(b.astype(w.dtype), xi) - op(w, xi)  # of responses: a product may round its weight
        return None, _zeros(x), _one_of(layer, _mean_product(op, w, xi, difference).astype(b.dtype))

    numbers: dict[str, Any] = {"std": _or_none(std)}
    if phase == "mirror":
        numbers["decay"] = _or_none(decay)
    elif not is_number(decay) or isinstance(decay, jax.core.Tracer) or decay != 1:
        raise ValueError('decay belongs to phase="mirror": leave it out, as the estimate goes to W by itself')
    own = sequential(mirror if phase == "mirror" else estimate, init=draw, learned=True, numbers=numbers)
    return sequential(_backward, init=draw, learned=True, phase=own)


def _backward(
    op: Product, w: jax.Array, b: jax.Array, x: Any, d: jax.Array, layer: Layer
) -> tuple[Any, Any, jax.Array]:
    return op.weight_gradient(w, x, d), op.passed_down(b, x, d), jnp.zeros_like(b)


def _or_none(numbers: Numbers) -> Any:
    """The numbers, with None for layers that match no pattern: a layer that reads data needs no number."""
    return {**numbers, "": numbers.get("")} if isinstance(numbers, Mapping) else numbers


def _require_numbers(layer: Layer, **numbers: Any) -> None:
    for option, number in numbers.items():
        if number is None:
            raise ValueError(
                f"{option}: no pattern matches the layer {layer.name!r}: add one, such as '.*', at the end"
            )


def _mean_product(op: Product, w: jax.Array, xi: Pytree, y: jax.Array) -> jax.Array:
    """The mean of xi y^T over the examples and places where each weight is used, in the layout of w.

    Of complex numbers it is the conjugate, as gradients of JAX are: they are conjugated before they are subtracted.
    """
    terms, error = op.terms(w, xi), jnp.conj(y)
    if terms.dtype == w.dtype:
        return op.weight_gradient(w, xi, error) / terms
    root = jnp.sqrt(jnp.max(terms))  # half of the division comes before the sum, which float16 may not hold
    smaller = widened(jnp.divide, error, root)
    return op.weight_gradient(w, xi, smaller).astype(root.dtype) / (terms / root)


def _one_of(layer: Layer, db: jax.Array) -> jax.Array:
    """The part of one use in the mean over all uses of a weight, as in the steps of a recurrent net: parts add up."""
    return db / jnp.asarray(layer.times, db.dtype)


def _zeros(x: Pytree) -> Pytree:
    """An error of zero: layers below are asked for their gradients too, and do not read it."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else None, x)
