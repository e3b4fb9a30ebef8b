"""A small network and its parameters, and what tests of refusals share."""

import jax
import jax.numpy as jnp
import pytest

import lrules

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 5))
W = {"a": jnp.ones((5, 6)), "b": jnp.ones((6, 6)), "c": jnp.ones((6, 3))}
NONE = lrules.Feedback({}, {})
FA, DFA, BACKMAN = lrules.feedback_alignment(), lrules.direct_feedback_alignment(), lrules.backman()
GLOROT = jax.nn.initializers.glorot_normal()


def mlp(p, x):
    return jnp.tanh(first(p, x) @ p["b"]) @ p["c"]


def first(p, x):
    return jnp.tanh(x @ p["a"])


def half_square(y, t):
    return 0.5 * jnp.sum((y - t) ** 2, -1)


def refused(apply, *words, rule=FA, error=NotImplementedError, params=W, inputs=X):
    """The rule refuses the network, in one line that has all these words."""
    with pytest.raises(error) as caught:
        rule.init(KEY, apply, params, inputs)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def zero_below(apply, params, inputs=X):
    """With feedback of zero nothing arrives below a hidden signal: the parameter `a` gets no gradient."""
    rule = lrules.feedback_alignment(init=jax.nn.initializers.zeros)
    feedback = rule.init(KEY, apply, params, inputs)
    f = lrules.transform(apply, rule)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(f(p, feedback, inputs)))))(params)
    assert feedback.fixed and not jnp.any(grads["a"])
