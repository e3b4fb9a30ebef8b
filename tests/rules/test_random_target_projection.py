"""Direct random target projection against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrules
from tests import bridge
from tests.reference import direct_feedback_alignment, losses, nets, random_target_projection
from tests.rules.common import BATCH, NETS, draw, make, one_hot_mean
from tests.sampling import mostly_slow

LABELS = np.array([0, 2, 1, 1, 0])
CLASSES = optax.softmax_cross_entropy_with_integer_labels


def gradients(net, x, rule, targets, loss):
    feedback, listed = draw(rule, net, x)
    step = lrules.value_and_grad(bridge.apply_of(net), loss, rule)
    return step(bridge.parameters(net), feedback, jnp.asarray(x), targets)[1].params, listed


@pytest.mark.parametrize("name", mostly_slow(NETS, ["deep", "conv_max"]))
def test_reference(name):
    with jax.enable_x64(True):
        net, x, _ = make(name)
        e, targets = one_hot_mean(net, x, LABELS), losses.one_hot(LABELS, 3)
        rule = lrules.random_target_projection()
        classes, listed = gradients(net, x, rule, jnp.asarray(LABELS), CLASSES)
        wanted = random_target_projection.gradients(net, listed, x, e, targets, sign=-1.0)
        bridge.close(classes, bridge.kernels_and_biases(wanted))
        dense, _ = gradients(net, x, rule, jnp.asarray(targets), optax.softmax_cross_entropy)
        bridge.close(dense, classes)


@pytest.mark.parametrize("wrapped", [lambda r: r, lambda r: lrules.partition({".*": r})])
def test_a_loss_per_example_and_time(wrapped):
    """The mean over both: hidden layers and the last layer are divided by the same number."""
    with jax.enable_x64(True):
        steps, classes = 4, 2
        net = bridge.random_dense(np.random.default_rng(0), (5, 6, steps * classes), ["tanh"])
        x = np.random.default_rng(1).normal(size=(BATCH, 5))
        labels = np.random.default_rng(2).integers(0, classes, size=(BATCH, steps))
        rule, apply = wrapped(lrules.random_target_projection()), bridge.apply_of(net)
        feedback, listed = draw(rule, net, x)

        def loss(outputs, targets):
            return CLASSES(outputs.reshape(BATCH, steps, classes), targets)

        step = lrules.value_and_grad(apply, loss, rule)
        got = jax.jit(step)(bridge.parameters(net), feedback, jnp.asarray(x), jnp.asarray(labels))[1].params
        outputs, targets = nets.forward(net, x).outputs, losses.one_hot(labels.ravel(), classes)
        e = losses.softmax_cross_entropy(outputs.reshape(-1, classes), targets)[1].reshape(BATCH, -1) / (BATCH * steps)
        wanted = random_target_projection.gradients(
            net, listed, x, e, targets.reshape(BATCH, -1), sign=-1.0, scale=1 / (BATCH * steps)
        )
        bridge.close(got, bridge.kernels_and_biases(wanted))


def test_within_a_partition():
    """One layer reads the projected targets, the others the projected error."""
    with jax.enable_x64(True):
        net, x, _ = make("deep")
        rule = lrules.partition({"3": lrules.random_target_projection(), ".*": lrules.direct_feedback_alignment()})
        got, listed = gradients(net, x, rule, jnp.asarray(LABELS), CLASSES)
        e = one_hot_mean(net, x, LABELS)
        signals = [e @ listed[1], e @ listed[2], -losses.one_hot(LABELS, 3) @ listed[3] / BATCH]
        wanted = direct_feedback_alignment.from_signals(net, nets.forward(net, x), x, e, signals)
        bridge.close(got, bridge.kernels_and_biases(wanted))


def test_refusals():
    net, x, _ = make("shallow")
    rule = lrules.random_target_projection()
    with pytest.raises(ValueError, match="value_and_grad"):
        lrules.transform(bridge.apply_of(net), rule)
    with pytest.raises(ValueError, match="must give 3 numbers per example"):
        gradients(net, x, rule, jnp.ones((BATCH, 2)), lambda o, t: (o**2).sum(1))
    with pytest.raises(ValueError, match="first axis of the targets must be the batch of"):
        gradients(net, x, rule, jnp.ones((2, 3)), lambda o, t: (o**2).sum(1))
    with pytest.raises(ValueError, match="must give 3 numbers per example"):  # a real target is no class
        gradients(net, x, rule, jnp.ones((BATCH, 1)), lambda o, t: (o**2).sum(1))
    one = bridge.random_dense(np.random.default_rng(0), (5, 6, 1), ["tanh"])
    with pytest.raises(ValueError, match="must give 1 numbers per example"):
        gradients(one, np.ones((BATCH, 5)), rule, (), lambda o, t: (o**2).sum(1))
