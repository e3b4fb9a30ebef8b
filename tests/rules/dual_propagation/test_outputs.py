"""The error at the outputs: the exact minimiser for squared errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrules
from tests import bridge
from tests.reference import dual_propagation as reference
from tests.reference import nets
from tests.rules.dual_propagation.common import NO_FEEDBACK, dense, expected, half_squared, targets_of

pytestmark = pytest.mark.usefixtures("double_precision")


def test_squared_errors_of_another_scale():
    """Eq. 3 for c/2 |o - y|^2 per example: the minimisers of alpha beta l(s) + (s - a)^2 / 2, and of the other."""
    net, x = dense()
    y = targets_of(net, x)
    weights = jnp.asarray([0.0, 1.0, 2.0, 0.5, 1.0])
    rule = lrules.dual_propagation(0.6, beta=0.5, adjoint=False, output="squared_error")

    def loss(outputs, targets):  # optax has the same without the factor
        return 3 * weights[:, None] * optax.squared_error(outputs, targets)

    fn = lrules.value_and_grad(bridge.apply_of(net), loss, rule)
    _, grads = jax.jit(fn)(bridge.parameters(net), NO_FEEDBACK, jnp.asarray(x), jnp.asarray(y))
    h = 2 * np.asarray(weights)[:, None]  # 3 of 3 outputs per example
    outputs = nets.forward(net, x).outputs
    states = [(outputs + d * h * y) / (1 + d * h) for d in (0.6 * 0.5, -0.4 * 0.5)]
    e = -(states[0] - states[1]) / 0.5 / len(x)
    want, _ = reference.gradients(net, x, e, alpha=0.6, beta=0.5, adjoint=False)
    bridge.close(grads.params, bridge.kernels_and_biases(want))


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: 0.5 * jnp.square(o.sum(-1) - t.sum(-1)),
        lambda o, t: jnp.einsum("bi,ij,bj->b", o - t, jnp.eye(3) + 0.1, o - t),
        lambda o, t: optax.huber_loss(o, t),
        lambda o, t: jnp.abs(o - t),
        lambda o, t: jnp.maximum(0, 1 - o * t).sum(-1),
        lambda o, t: jnp.square(o - o[:, ::-1]),
        lambda o, t: jnp.square(o[:3] - o[:3].T).sum() + 0 * t[:, 0],
        lambda o, t: jnp.square(o + o.T.reshape(o.shape)).sum() + 0 * t[:, 0],
    ],
)
def test_losses_that_have_no_closed_form(loss):
    net, x = dense()
    rule = lrules.dual_propagation(alpha=0.3, beta=0.2, adjoint=False, output="squared_error")
    fn = lrules.value_and_grad(bridge.apply_of(net), loss, rule)
    with pytest.raises(ValueError, match="quadratic in each output by itself"):
        fn(bridge.parameters(net), NO_FEEDBACK, jnp.asarray(x), jnp.asarray(targets_of(net, x)))


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: 0.5 * jnp.square(o.T - t.T).sum(0),
        jax.vmap(lambda o, t: 0.5 * jnp.sum((o.reshape(3, 1) - t.reshape(3, 1)) ** 2)),
        lambda o, t: 0.5 * ((o.T.reshape(-1) - t.T.reshape(-1)) ** 2).reshape(3, 5).sum(0),
        lambda o, t: jnp.where(t < 9, 0.5 * (o - t) ** 2, 0).sum(-1),
    ],
)
def test_squared_errors_in_other_words(loss):
    net, x = dense()
    options = {"alpha": 0.25, "beta": 0.3, "adjoint": False, "output": "squared_error"}
    want = bridge.kernels_and_biases(expected(net, x, **options))

    def grads(apply, loss):
        fn = lrules.value_and_grad(apply, loss, lrules.dual_propagation(**options))
        return fn(bridge.parameters(net), NO_FEEDBACK, jnp.asarray(x), jnp.asarray(targets_of(net, x)))[1].params

    apply = bridge.apply_of(net)
    bridge.close(grads(apply, loss), want)
    bridge.close(grads(lambda p, x: (apply(p, x), jnp.argmax(apply(p, x), -1)), lambda o, t: loss(o[0], t)), want)


def test_losses_that_are_too_curved_show_it():
    """(o - y)^2 has curvature 2: at beta 1/2 and alpha 0 the minimiser is at infinity."""
    net, x = dense()
    for beta, finite in ((0.4, True), (0.5, False), (0.6, False)):
        rule = lrules.dual_propagation(alpha=0.0, beta=beta, adjoint=False, output="squared_error")
        fn = lrules.value_and_grad(bridge.apply_of(net), lambda o, t: 2 * half_squared(o, t), rule)
        y = jnp.asarray(targets_of(net, x))
        _, grads = jax.jit(fn)(bridge.parameters(net), NO_FEEDBACK, jnp.asarray(x), y)
        shows = jnp.isfinite if finite else jnp.isnan
        assert all(bool(shows(g).all()) for g in jax.tree.leaves(grads.params))
