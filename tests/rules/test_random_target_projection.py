"""Direct random target projection against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrules
from tests import bridge
from tests.reference import losses, random_target_projection
from tests.rules.common import BATCH, NETS, draw, make, one_hot_mean

LABELS = np.array([0, 2, 1, 1, 0])


def step(net, rule, targets, loss):
    x = step.x
    feedback, listed = draw(rule, net, x)
    (_, _), grads = lrules.value_and_grad(bridge.apply_of(net), loss, rule)(
        bridge.parameters(net), feedback, jnp.asarray(x), targets
    )
    return grads.params, listed


@pytest.mark.parametrize("name", NETS)
def test_reference(name):
    with jax.enable_x64(True):
        net, x, _ = make(name)
        step.x = x
        e, targets = one_hot_mean(net, x, LABELS), losses.one_hot(LABELS, 3)
        rule = lrules.random_target_projection()
        classes, listed = step(net, rule, jnp.asarray(LABELS), optax.softmax_cross_entropy_with_integer_labels)
        wanted = random_target_projection.gradients(net, listed, x, e, targets, sign=-1.0)
        bridge.close(classes, bridge.kernels_and_biases(wanted))
        dense, _ = step(net, rule, jnp.asarray(targets), optax.softmax_cross_entropy)
        bridge.close(dense, classes)


def test_within_a_partition():
    with jax.enable_x64(True):
        net, x, _ = make("deep")
        step.x = x
        rule = lrules.partition({"3": lrules.random_target_projection(), ".*": lrules.direct_feedback_alignment()})
        grads, listed = step(net, rule, jnp.asarray(LABELS), optax.softmax_cross_entropy_with_integer_labels)
        projected = -losses.one_hot(LABELS, 3) @ listed[3] / BATCH
        z = np.asarray(grads["2"]["bias"])
        assert z.shape == (8,) and np.all(np.sign(z) == np.sign(projected.sum(0))) or projected.shape == (BATCH, 8)


def test_refusals():
    net, x, _ = make("shallow")
    step.x = x
    rule = lrules.random_target_projection()
    with pytest.raises(ValueError, match="value_and_grad"):
        lrules.transform(bridge.apply_of(net), rule)
    with pytest.raises(ValueError, match="do not make 3 numbers per example"):
        step(net, rule, jnp.ones((BATCH, 2)), lambda o, t: (o**2).sum(1))
    with pytest.raises(ValueError, match="do not begin with the batch"):
        step(net, rule, jnp.ones((2, 3)), lambda o, t: (o**2).sum(1))
