"""Learning channels made of the public constructors, each in a few lines: take one, change it, make your own.

They are variants of which Baldi, Sadowski and Lu (2018) speak in passing (sections 3, 4.2, 6.1). Each returns a rule.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import lrules


def mixed_channel(long_range: str) -> lrules.Rule:
    """The output error comes straight to some layers, and goes on from there by feedback alignment.

    Args:
      long_range: a regular expression; layers that match it get direct feedback to the hidden signal that they read.
    """
    return lrules.partition({long_range: lrules.direct_feedback_alignment(), ".*": lrules.feedback_alignment()})


def nonlinear_channel(rule: lrules.Rule | None = None, fn: Callable[[jax.Array], jax.Array] = jnp.tanh) -> lrules.Rule:
    """Neurons of the channel that are not linear: s_l <- fn(s_l), on the scale of a single example's error."""
    return lrules.modify_error(rule or lrules.direct_feedback_alignment(), lambda signal, name, rng: fn(signal))


def averaged_matrices(n: int, init: Callable[..., jax.Array] | None = None) -> lrules.Rule:
    """The signals of n random matrices, averaged, which is the signal of the averaged matrix."""
    return lrules.feedback_alignment(init=lrules.feedback.averaged(n, init=init))


def redrawn(init: Callable[..., jax.Array] | None = None) -> lrules.Rule:
    """Feedback alignment with other random matrices at every step: trains like the last layer only (observation 1)."""

    def backward(op, w, b, x, d, layer):
        dw, _ = jax.vjp(op, w, x)[1](d)
        (dx,) = jax.vjp(lambda x: op(b, x), x)[1](d)
        return dw, dx, None

    return lrules.sequential(backward, init=init or jax.nn.initializers.glorot_normal(), redrawn=True)


def redrawn_concordant() -> lrules.Rule:
    """The same with the forward weights' signs, which trains (observation 2); it is `sign_symmetry("random")`."""
    return redrawn(init=lrules.feedback.congruent())


def redrawn_direct(init: Callable[..., jax.Array] | None = None) -> lrules.Rule:
    """Direct feedback alignment with other random matrices at every step."""
    signal = lambda e, b, targets, name: jnp.tensordot(e, b, axes=1)  # noqa: E731
    return lrules.direct(signal, init=init or jax.nn.initializers.glorot_normal(), redrawn=True)


def cascaded(init: Callable[..., jax.Array] | None = None) -> lrules.Rule:
    """Direct feedback from the output, and besides from every hidden signal to all below it.

    s_h = C_h e + sum over l above h of C_lh s_l. The channel is linear, so this is direct feedback by one matrix
    `cascade` for each signal. For networks without loops over layers.
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
    """What arrives in all: B_h = C_h + sum over l above h of B_l C_lh, `[outputs, *hidden]`; names from below."""
    total: dict[str, jax.Array] = {}
    for i in reversed(range(len(names))):
        total[names[i]] = straight[names[i]]
        for above in names[i + 1 :]:
            steps = jnp.tensordot(total[above], between[above, names[i]], axes=total[above].ndim - 1)
            total[names[i]] = total[names[i]] + steps
    return total


def weight_by_weight() -> lrules.Rule:
    """A random weight for the error of each output to each single synapse, which does not train (observation 7).

    dw_ij = sum over k of c_ijk e_k f'(z_i) h_j. Direct feedback is linear in its matrices, so the part of output k
    is the gradient under feedback that passes the error of output k alone, to all neurons alike.
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
        raise ValueError("weight_by_weight is for lrules.value_and_grad(net, loss, rule)")

    return lrules.Rule(init, transform, value_and_grad)
