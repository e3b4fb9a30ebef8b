"""Sign symmetry in its three forms, and congruent feedback."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from tests import bridge
from tests.reference import feedback_alignment, sign_symmetry
from tests.rules.common import NETS, agrees, draw, make, pull


def magnitudes(net, x, key):
    """What `"random"` draws from `key`, and `"fixed"` at `init`."""
    return draw(lrules.feedback_alignment(), net, x, key)[1]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("magnitude", ["unit", "random", "fixed"])
def test_reference(name, magnitude):
    with jax.enable_x64(True):
        net, x, e = make(name)
        net[1].kernel.flat[0] = 0.0
        rule = lrules.sign_symmetry(magnitude)
        feedback, listed = draw(rule, net, x)
        rng = {"rng": jax.random.key(3)} if magnitude == "random" else {}
        drawn = {"unit": None, "random": magnitudes(net, x, 3), "fixed": listed}[magnitude]
        assert bool(feedback.fixed) == (magnitude == "fixed") and rule.stochastic == (magnitude == "random")
        got = pull(net, rule, feedback, x, e, **rng)
        agrees(got, sign_symmetry.gradients(net, drawn, x, e))


def test_no_gradient_of_the_feedback_or_through_it():
    with jax.enable_x64(True):
        net, x, e = make("shallow")
        rule = lrules.sign_symmetry("fixed")
        feedback, _ = draw(rule, net, x)
        assert not np.any(pull(net, rule, feedback, x, e)[1].fixed["1/kernel"])


def test_within_a_partition():
    with jax.enable_x64(True):
        net, x, e = make("deep")
        rule = lrules.partition({"3": lrules.sign_symmetry("random"), ".*": lrules.backprop()})
        feedback, _ = draw(rule, net, x)
        listed = [None, *(layer.kernel for layer in net[1:3]), None]
        listed[3] = np.abs(magnitudes(net, x, 3)[3]) * np.sign(net[3].kernel)
        agrees(pull(net, rule, feedback, x, e, rng=jax.random.key(3)), feedback_alignment.gradients(net, listed, x, e))


@pytest.mark.parametrize("name", NETS)
def test_congruent_feedback(name):
    with jax.enable_x64(True):
        net, x, e = make(name)
        rule = lrules.feedback_alignment(init=lrules.feedback.congruent())
        feedback, listed = draw(rule, net, x)
        for b, m, layer in zip(listed[1:], magnitudes(net, x, 1)[1:], net[1:], strict=True):
            np.testing.assert_array_equal(b, np.abs(m) * np.sign(layer.kernel))
        agrees(pull(net, rule, feedback, x, e), feedback_alignment.gradients(net, listed, x, e))


def test_refusals():
    with pytest.raises(ValueError, match="none of 'unit', 'random', 'fixed'"):
        lrules.sign_symmetry("half")
    with pytest.raises(ValueError, match="leave out init="):
        lrules.sign_symmetry("unit", init=jax.nn.initializers.zeros)
    net, x, _ = make("shallow")
    with pytest.raises(ValueError, match="use a sequential rule"):
        draw(lrules.direct_feedback_alignment(init=lrules.feedback.congruent()), net, jnp.asarray(x))


def test_congruent_under_a_scan_over_layers():
    """Each slice of a scanned weight gives its own signs."""
    w = jax.random.normal(jax.random.key(0), (3, 4, 4))

    def apply(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["in"], p["w"])[0] @ p["out"]

    params = {"in": jnp.ones((2, 4)), "w": w, "out": jnp.ones((4, 1))}
    rule = lrules.feedback_alignment(init=lrules.feedback.congruent())
    feedback = rule.init(jax.random.key(1), apply, params, jnp.ones((5, 2)))
    np.testing.assert_array_equal(np.sign(feedback.fixed["w"]), np.sign(w))
    assert bridge.feedback_dict([None]) == {}
