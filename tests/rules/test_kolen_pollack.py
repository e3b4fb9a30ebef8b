"""Kolen-Pollack against the reference, and weights and feedback that converge."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrules
from tests import bridge
from tests.reference import kolen_pollack
from tests.rules.common import NETS, agrees, by_name, draw, make, pull
from tests.sampling import mostly_slow


@pytest.mark.parametrize("name", mostly_slow(NETS, ["deep", "conv_max"]))
def test_reference(name):
    with jax.enable_x64(True):
        net, x, e = make(name)
        rule = lrules.kolen_pollack()
        feedback, listed = draw(rule, net, x)
        got = pull(net, rule, feedback, x, e)
        wanted = kolen_pollack.gradients(net, listed, x, e)
        agrees(got, wanted)
        bridge.close(got[1].learned, by_name(wanted.feedback))


@pytest.mark.parametrize("decay", [0.5, 0.0])
def test_weights_and_feedback_converge(decay):
    """One optimizer with weight decay for both: W - B shrinks by 1 - eta gamma at each step; without decay it stays."""
    with jax.enable_x64(True):
        net, x, _ = make("deep")
        apply, params = bridge.apply_of(net), bridge.parameters(net)
        rule = lrules.kolen_pollack()
        feedback = rule.init(jax.random.key(0), apply, params, jnp.asarray(x))
        optimizer = optax.chain(optax.add_decayed_weights(decay), optax.sgd(0.1))
        step = lrules.value_and_grad(apply, lrules.testing.half_squared_error, rule)
        targets = jnp.ones((len(x), 3))

        @jax.jit
        def update(params, learned, state):
            _, grads = step(params, lrules.Feedback({}, learned), jnp.asarray(x), targets)
            updates, state = optimizer.update((grads.params, grads.feedback), state, (params, learned))
            return (*optax.apply_updates((params, learned), updates), state)

        learned, state = feedback.learned, optimizer.init((params, feedback.learned))
        for _ in range(20):
            params, learned, state = update(params, learned, state)
        for name, b in learned.items():
            before = np.asarray(net[int(name[0])].kernel - feedback.learned[name])
            after = np.asarray(params[name[0]]["kernel"] - b)
            np.testing.assert_allclose(after, before * (1 - 0.1 * decay) ** 20, atol=1e-12)


def test_a_weight_used_twice_keeps_its_difference():
    """Feedback learns from every use of its weight, a first layer's included, as the weight does."""

    def apply(p, x):
        h = jnp.tanh(x @ p["w"])
        return jnp.tanh(h @ p["w"])

    params, x = {"w": jnp.eye(3) * 0.5}, jnp.arange(6.0).reshape(2, 3)
    rule = lrules.kolen_pollack()
    feedback = rule.init(jax.random.key(0), apply, params, x)
    _, grads = lrules.value_and_grad(apply, lrules.testing.half_squared_error, rule)(params, feedback, x, x)
    np.testing.assert_allclose(grads.feedback["w"], grads.params["w"], rtol=1e-6)
