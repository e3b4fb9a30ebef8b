"""Products in compiled programs: those of the channel, Eq. 14 and 15 of Baldi, Sadowski, Lu (2018); transformers."""

import collections
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import lrules
from experiments import transformer

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


def operations_of_a_transformer(rule, blocks):
    """The operations by kind, and the floating-point operations, of one compiled step on one device."""
    net, params = lrules.from_nnx(transformer.Transformer(32, 8, rngs=nnx.Rngs(0), blocks=blocks, width=64, heads=2))
    x = jnp.zeros((4, 8), int)
    feedback = jax.eval_shape(lambda key: rule.init(key, net, params, x), jax.random.key(0))
    step = lrules.value_and_grad(net, optax.softmax_cross_entropy_with_integer_labels, rule)
    compiled = jax.jit(lambda *args: step(*args)[1].params).lower(params, feedback, x, x).compile()
    found = re.findall(r" = \S+ (dot|transpose|copy)\(", compiled.as_text())
    return collections.Counter(found), compiled.cost_analysis()["flops"]


def test_direct_feedback_of_a_transformer_adds_no_operation_to_backprop():
    """One product brings feedback to queries, keys and values, and one to every other layer; nothing is transposed."""
    blocks = 2
    plain, plain_flops = operations_of_a_transformer(lrules.backprop(), blocks)
    found, flops = operations_of_a_transformer(lrules.direct_feedback_alignment(shared_axes=1), blocks)
    assert plain["dot"] - found["dot"] == 2 * blocks
    assert found["transpose"] <= plain["transpose"] and found["copy"] <= plain["copy"]
    places, width, outputs = 4 * 8, 64, 32
    down = 12 * width * width  # the numbers of the weights through which the error of a block goes down in backprop
    left_out = 2 * places * (blocks * (down - outputs * 7 * width))  # 7 width: all that its layers read
    assert abs(plain_flops - flops - left_out) < 0.05 * left_out  # and what is elementwise


def test_one_sweep_of_dual_propagation_costs_a_second_forward_pass():
    plain, plain_flops = operations_of_a_transformer(lrules.backprop(), 2)
    found, flops = operations_of_a_transformer(lrules.dual_propagation(), 2)
    assert 1.2 < flops / plain_flops < 4 / 3
    assert found["dot"] < 1.6 * plain["dot"]
