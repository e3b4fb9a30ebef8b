"""Rules made with the public constructors, each in a few lines: take one, change it, make your own.

The first rules are variants that Baldi, Sadowski and Lu (2018) mention in sections 3, 4.2 and 6.1. The others show what
the functions of a rule can ask for (see `lrules.constructors`): keys, targets, the hidden signal, the output of a
layer, numbers by layer. Each function returns a rule.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import lrules


def mixed_channel(long_range: str) -> lrules.Rule:
    """The output error comes straight to some layers, and continues from there by feedback alignment.

    Args:
      long_range: a regular expression; layers that it matches get direct feedback to the hidden signal that they read.
    """
    return lrules.partition({long_range: lrules.direct_feedback_alignment(), ".*": lrules.feedback_alignment()})


def nonlinear_channel(rule: lrules.Rule | None = None, fn: Callable[[jax.Array], jax.Array] = jnp.tanh) -> lrules.Rule:
    """Nonlinear neurons in the learning channel: s_l <- fn(s_l), on the scale of the error of a single example."""
    return lrules.modify_error(rule or lrules.direct_feedback_alignment(), lambda signal, name, rng: fn(signal))


def averaged_matrices(n: int, init: Callable[..., jax.Array] | None = None) -> lrules.Rule:
    """The average of the signals of n random matrices, which is the signal of the averaged matrix."""
    return lrules.feedback_alignment(init=lrules.feedback.averaged(n, init=init))


def redrawn(init: Callable[..., jax.Array] | None = None) -> lrules.Rule:
    """Feedback alignment with new random matrices at every step: trains like the last layer only (observation 1)."""

    def backward(op, w, b, x, d, layer):
        dw, _ = jax.vjp(op, w, x)[1](d)
        (dx,) = jax.vjp(lambda x: op(b, x), x)[1](d)
        return dw, dx, None

    return lrules.sequential(backward, init=init or jax.nn.initializers.glorot_normal(), redrawn=True)


def redrawn_concordant() -> lrules.Rule:
    """The same with the signs of the forward weights, which trains (observation 2); it is `sign_symmetry("random")`."""
    return redrawn(init=lrules.feedback.congruent())


def redrawn_direct(init: Callable[..., jax.Array] | None = None) -> lrules.Rule:
    """Direct feedback alignment with new random matrices at every step."""
    signal = lambda e, b, targets, name: jnp.tensordot(e, b, axes=1)  # noqa: E731
    return lrules.direct(signal, init=init or jax.nn.initializers.glorot_normal(), redrawn=True)


def cascaded(init: Callable[..., jax.Array] | None = None) -> lrules.Rule:
    """Direct feedback from the output, and also from every hidden signal to all hidden signals below it.

    s_h = C_h e + sum over l above h of C_lh s_l. The channel is linear, so this equals direct feedback by one matrix
    `cascade` for each signal. It is for networks without loops over layers.
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
    """The total matrices: B_h = C_h + sum over l above h of B_l C_lh, `[outputs, *hidden]`; names from below."""
    total: dict[str, jax.Array] = {}
    for i in reversed(range(len(names))):
        total[names[i]] = straight[names[i]]
        for above in names[i + 1 :]:
            steps = jnp.tensordot(total[above], between[above, names[i]], axes=total[above].ndim - 1)
            total[names[i]] = total[names[i]] + steps
    return total


def weight_by_weight() -> lrules.Rule:
    """One random weight for the error of each output at each single synapse. It does not train (observation 7).

    dw_ij = sum over k of c_ijk e_k f'(z_i) h_j. Direct feedback is linear in its matrices, so the part of output k is
    the gradient under feedback that passes only the error of output k, equally to all neurons.
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
        raise ValueError("transform cannot serve weight_by_weight: use lrules.value_and_grad(net, loss, rule)")

    return lrules.Rule(init, transform, value_and_grad)


def rates(by_layer: Mapping[str, float]) -> lrules.Rule:
    """Backpropagation with a separate learning rate for each layer: dW_l <- rate_l dW_l.

    Args:
      by_layer: rates by regular expression for the names of layers; the first match holds. If a pattern matches no
        layer, an error lists the layers.
    """

    def backward(op, w, b, x, d, layer, rate):
        dw, dx = jax.vjp(op, w, x)[1](d)
        return rate * dw, dx, None

    return lrules.sequential(backward, numbers={"rate": by_layer})


def weight_mirror(
    std: float = 1.0, decay: float = 1.0, noise: Callable[..., jax.Array] = jax.random.normal
) -> lrules.Rule:
    """Feedback alignment whose feedback weights learn to mirror the forward weights (Akrout et al. 2019, section 3).

    B_l <- B_l + eta (xi y^T - decay B_l),  y = W_l xi,  where noise xi replaces the input of layer l

    The mean of xi y^T over the noise is std^2 W_l (with the layout of the parameter). So B_l goes to std^2 / decay W_l,
    without any copy of a weight. `grads.feedback` is minus the bracket, a mean over the batch; plain `optax.sgd(eta)`
    makes this update from it. (In the paper, the noise passes in separate phases, not at every step.)

    Args:
      std: the standard deviation of the noise.
      decay: the decay of the feedback weights.
      noise: `(key, shape, dtype)` -> numbers with mean 0 and variance 1.
    """

    def backward(op, w, b, x, d, layer, *, rng, h):
        dw, _ = jax.vjp(op, w, x)[1](d)
        (dx,) = jax.vjp(lambda x: op(b, x), x)[1](d)
        if h is None:  # a first layer has no feedback
            return dw, dx, jnp.zeros_like(b)
        xi = std * noise(rng, x.shape, x.dtype)
        (mirrored,) = jax.vjp(lambda v: op(v, xi), w)[1](op(w, xi) / len(x))
        return dw, dx, decay * b - mirrored

    return lrules.sequential(backward, init=jax.nn.initializers.glorot_normal(), learned=True)


def difference_target_propagation(
    step: float = 0.1,
    std: float = 0.1,
    decoder: Callable[[jax.Array], jax.Array] = jnp.tanh,
    noise: Callable[..., jax.Array] = jax.random.normal,
) -> lrules.Rule:
    """Difference target propagation (Lee et al. 2015), from layer output to layer output.

    Layer l computes y_l = W_l x_l from its input x_l, and g_l(y) = decoder(B_l^T y) is the learned way back. The target
    of y_l is one step against the error of the example. The target of x_l is corrected by the difference of two ways:

        y'_l = y_l - step d_l,   x'_l = x_l + g_l(y'_l) - g_l(y_l)                            (Eq. 15)
        dW_l descends |y_l - y'_l|^2 / (2 step),   dB_l descends |g_l(W_l (x_l + noise)) - (x_l + noise)|^2 / 2

    Between x_l and the output of the layer below are its bias and its activation. The error x_l - x'_l, divided by the
    step, goes down through them by their derivatives. (In the paper, layers include the activation, and the target
    comes after it.) The last layer has the true gradient.

    Args:
      step: the distance of targets from the values, on the scale of the error of one example.
      std: the standard deviation of the noise for learning the way back.
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


def local_classifiers(init: Callable[..., jax.Array] | None = None) -> lrules.Rule:
    """Every hidden signal has its own linear classifier, and learns from its loss (Nokland and Eidnes 2019).

    L_h = softmax cross-entropy of C_h h with the classes,  s_h = C_h^T (p_h - t),  dC_h = (p_h - t) h^T

    No error comes down from above. The layers between two hidden signals learn from the classifier at the upper hidden
    signal, and the last layer learns from the loss of the network. The classifiers C_h `[classes, *hidden]` are in
    `feedback.learned`.

    Args:
      init: the initializer of the classifiers; it draws `[hidden size, classes]`.
    """

    def error(h, b, targets, elements):
        logits = jnp.tensordot(h, b, axes=(tuple(range(1, h.ndim)),) * 2)
        wanted = jax.nn.one_hot(targets, len(b)) if targets.ndim < 2 else targets
        return (jax.nn.softmax(logits) - wanted.astype(logits.dtype)) / elements

    def signal(e, b, targets, name, *, h, elements):
        return lrules.extend.project(error(h, b, targets, elements), b)

    def learn(e, h, b, *, targets, elements):
        return lrules.extend.correlate(error(h, b, targets, elements), h, b)

    draw = init or jax.nn.initializers.glorot_normal()
    return lrules.direct(signal, init=draw, learn=learn, targets=True)
