"""Rules made with the public constructors, in a few lines each. Copy one and change it to make your own.

The first rules are variants that Baldi, Sadowski and Lu (2018) mention in sections 3, 4.2 and 6.1. The others show what
the functions of a rule can ask for (see `lrules.constructors`): keys, targets, the hidden signal, the output of a
layer, numbers by layer. Each public function returns a rule, except `cascade`.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import lrules


def mixed_channel(long_range: str) -> lrules.Rule:
    """The output error goes straight to some layers, and from there down by feedback alignment.

    Args:
      long_range: a regular expression for names of layers. The hidden signals that these layers read get direct
        feedback.
    """
    return lrules.partition({long_range: lrules.direct_feedback_alignment(), ".*": lrules.feedback_alignment()})


def nonlinear_channel(rule: lrules.Rule | None = None, fn: Callable[[jax.Array], jax.Array] = jnp.tanh) -> lrules.Rule:
    """Nonlinear neurons in the learning channel: s_l <- fn(s_l), where s_l has the scale of one example's error."""
    return lrules.modify_error(rule or lrules.direct_feedback_alignment(), lambda signal, name, rng: fn(signal))


def averaged_matrices(n: int, init: Callable[..., jax.Array] | None = None) -> lrules.Rule:
    """Feedback alignment with the average of n random matrices: its signal is the average of their signals."""
    return lrules.feedback_alignment(init=lrules.feedback.averaged(n, init=init))


def redrawn(init: Callable[..., jax.Array] | None = None) -> lrules.Rule:
    """Feedback alignment with new random matrices at every step: it learns poorly (observation 1)."""

    def backward(op, w, b, x, d, layer):
        dw, _ = jax.vjp(op, w, x)[1](d)
        (dx,) = jax.vjp(lambda x: op(b, x), x)[1](d)
        return dw, dx, None

    return lrules.sequential(backward, init=init or jax.nn.initializers.glorot_normal(), redrawn=True)


def redrawn_concordant() -> lrules.Rule:
    """`redrawn` with the signs of the forward weights, as `sign_symmetry("random")`: it learns (observation 2)."""
    return redrawn(init=lrules.feedback.congruent())


def redrawn_direct(init: Callable[..., jax.Array] | None = None) -> lrules.Rule:
    """Direct feedback alignment with new random matrices at every step."""
    signal = lambda e, b, targets, name: jnp.tensordot(e, b, axes=1)  # noqa: E731
    return lrules.direct(signal, init=init or jax.nn.initializers.glorot_normal(), redrawn=True)


def cascaded(init: Callable[..., jax.Array] | None = None) -> lrules.Rule:
    """Direct feedback from the output, and also from every hidden signal to all hidden signals below it.

    s_h = C_h e + sum over l above h of C_lh s_l. The channel is linear, so this is direct feedback with one matrix for
    each hidden signal: `cascade` computes it. The network must not have loops over layers.
    """
    draw = init or jax.nn.initializers.glorot_normal()
    rule = lrules.direct_feedback_alignment(init)

    def make(key, net, params, inputs):
        rows = lrules.describe(net, rule, params, inputs).hidden
        names = [row["hidden signal"] for row in rows]
        straight = rule.init(key, net, params, inputs).fixed
        between: dict[tuple[str, str], jax.Array] = {}
        for i, below in enumerate(names):
            for above in names[i + 1 :]:
                (_, *into), (_, *out) = straight[below].shape, straight[above].shape
                k = jax.random.fold_in(key, zlib.crc32(f"{above} to {below}".encode()) & 0x7FFFFFFF)
                drawn = draw(k, (straight[below][0].size, straight[above][0].size), straight[below].dtype)
                between[above, below] = drawn.T.reshape(*out, *into)
        return lrules.Feedback(cascade(names, straight, between), {})

    return rule._replace(init=make)


def cascade(
    names: list[str], straight: Mapping[str, jax.Array], between: Mapping[tuple[str, str], jax.Array]
) -> dict[str, jax.Array]:
    """The total matrices B_h = C_h + sum over l above h of B_l C_lh, `[outputs, *hidden]`; `names`: lowest first."""
    total: dict[str, jax.Array] = {}
    for i in reversed(range(len(names))):
        total[names[i]] = straight[names[i]]
        for above in names[i + 1 :]:
            steps = jnp.tensordot(total[above], between[above, names[i]], axes=total[above].ndim - 1)
            total[names[i]] = total[names[i]] + steps
    return total


def weight_by_weight() -> lrules.Rule:
    """Each synapse has one random weight for the error of each output. It does not learn (observation 7).

    dw_ij = sum over k of c_ijk e_k f'(z_i) h_j. Direct feedback is linear in its matrices. So the term of output k is
    the gradient with feedback weights of 1 for output k and 0 for the others, times c_ijk.
    """
    direct = lrules.direct_feedback_alignment(init=jax.nn.initializers.zeros)

    def init(key, net, params, inputs):
        feedback = direct.init(key, net, params, inputs).fixed
        outputs = next(iter(feedback.values())).shape[0]
        leaves = jax.tree.leaves(params)
        keys = jax.random.split(key, len(leaves))
        drawn = [jax.random.normal(k, (outputs, *p.shape), p.dtype) for k, p in zip(keys, leaves, strict=True)]
        return lrules.Feedback(
            {str(i): c for i, c in enumerate(drawn)} | {"zeros/" + n: b for n, b in feedback.items()}, {}
        )

    def value_and_grad(net, loss):
        step = lrules.value_and_grad(net, loss, direct)

        def f(params, feedback, inputs, targets, *, rng=None):
            zeros = {n.removeprefix("zeros/"): b for n, b in feedback.fixed.items() if n.startswith("zeros/")}
            coefficients = [feedback.fixed[str(i)] for i in range(len(jax.tree.leaves(params)))]

            def of_output(k):
                passing = {n: b.at[k].set(1) for n, b in zeros.items()}
                return step(params, lrules.Feedback(passing, {}), inputs, targets)[1].params

            head, last = step(params, lrules.Feedback(zeros, {}), inputs, targets)
            parts = jax.vmap(of_output)(jnp.arange(len(coefficients[0])))
            weighted = [
                g + (c * (part - g[None])).sum(0)
                for c, part, g in zip(coefficients, jax.tree.leaves(parts), jax.tree.leaves(last.params), strict=True)
            ]
            return head, last._replace(params=jax.tree.unflatten(jax.tree.structure(params), weighted))

        return f

    def transform(net, *, reduction="mean") -> Any:
        raise ValueError("lrules.transform cannot use weight_by_weight: use lrules.value_and_grad(net, loss, rule)")

    return lrules.Rule(init, transform, value_and_grad)


def rates(by_layer: Mapping[str, float]) -> lrules.Rule:
    """Backpropagation with a separate learning rate for each layer: dW_l <- rate_l dW_l.

    Args:
      by_layer: the rate for each regular expression for names of layers. The first match counts. If a pattern matches
        no layer, an error lists the layers.
    """

    def backward(op, w, b, x, d, layer, rate):
        dw, dx = jax.vjp(op, w, x)[1](d)
        return rate * dw, dx, None

    return lrules.sequential(backward, numbers={"rate": by_layer})


def difference_target_propagation(
    step: float = 0.1,
    std: float = 0.1,
    decoder: Callable[[jax.Array], jax.Array] = jnp.tanh,
    noise: Callable[..., jax.Array] = jax.random.normal,
) -> lrules.Rule:
    """Difference target propagation (Lee et al. 2015), from layer output to layer output.

    Layer l computes y_l = W_l x_l from its input x_l. It learns an approximate inverse, g_l(y) = decoder(B_l^T y). The
    target of y_l is one step against the error of the example. The target of x_l has a correction, the difference:

        y'_l = y_l - step d_l,   x'_l = x_l + g_l(y'_l) - g_l(y_l)                            (Eq. 15)
        dW_l descends |y_l - y'_l|^2 / (2 step),   dB_l descends |g_l(W_l (x_l + noise)) - (x_l + noise)|^2 / 2

    Between x_l and y_{l-1} are the bias and the activation of layer l - 1. The error (x_l - x'_l) / step passes them by
    their derivatives. (In the paper, a layer includes its activation, and the target is for the output of the
    activation.) The last layer has the true gradient.

    Args:
      step: how far targets are from values: target = value - step * error of the example.
      std: the standard deviation of the noise that g_l learns with.
      decoder: an elementwise function.
      noise: `(key, shape, dtype)` -> numbers with mean 0 and variance 1.
    """

    def backward(op, w, b, x, d, layer, *, rng, y, h, elements):
        dw, dx = jax.vjp(op, w, x)[1](d)
        if h is None:
            return dw, dx, jnp.zeros_like(b)
        back = lambda b, y: decoder(jax.vjp(lambda x: op(b, x), x)[1](y)[0])  # noqa: E731
        size = step * elements  # d is the error of a mean over this number of losses
        dx = (back(b, y) - back(b, y - size * d)) / size
        noisy = x + std * noise(rng, x.shape, x.dtype)
        lost = lambda b: jnp.sum((back(b, op(w, noisy)) - noisy) ** 2) / (2 * elements)  # noqa: E731
        return dw, dx, jax.grad(lost)(b)

    return lrules.sequential(backward, init=jax.nn.initializers.glorot_normal(), learned=True)
