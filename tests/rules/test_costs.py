"""The learning channel's products in the compiled program: Eq. 14 and 15 of Baldi, Sadowski, Lu (2018)."""

import jax
import jax.numpy as jnp
import pytest

import lrules

BATCH = 8


def products_of_the_channel(rule, widths, *, inputs):
    """Multiplications per example of a linear net's compiled step, without forward pass and weight gradients."""

    def apply(params, x):
        for w in params:
            x = x @ w
        return x

    params = [jnp.ones(shape) for shape in zip(widths[:-1], widths[1:], strict=True)]
    x, e = jnp.ones((BATCH, widths[0])), jnp.ones((BATCH, widths[-1]))
    feedback = rule.init(jax.random.key(0), apply, params, x)
    f = lrules.transform(apply, rule)

    def step(params, feedback, x, e):
        outputs, pull = jax.vjp(lambda params, x: f(params, feedback, x), params, x)
        return outputs, pull(e) if inputs else pull(e)[0]

    cost = jax.jit(step).lower(params, feedback, x, e).compile().cost_analysis()
    return cost["flops"] / (2 * BATCH) - 2 * sum(w.size for w in params)


@pytest.mark.parametrize("widths", [(20, 30, 15, 10, 4), (7, 9, 9, 9, 9), (5, 6, 3)])
def test_costs_of_the_channel(widths):
    weights = sum(m * n for m, n in zip(widths[:-1], widths[1:], strict=True))  # Eq. 14
    skipped = widths[-1] * sum(widths[1:-1])  # Eq. 15
    first = widths[0] * widths[1]  # what Eq. 14 counts besides: the way down to the inputs
    for rule in (lrules.backprop(), lrules.feedback_alignment(), lrules.skipped_backprop()):
        assert products_of_the_channel(rule, widths, inputs=True) == weights
        assert products_of_the_channel(rule, widths, inputs=False) == weights - first
    rule = lrules.direct_feedback_alignment()
    assert products_of_the_channel(rule, widths, inputs=True) == skipped + first
    assert products_of_the_channel(rule, widths, inputs=False) == skipped
    assert products_of_the_channel(lrules.last_layer_only(), widths, inputs=False) < 0  # no weight gradients below
