"""Monotone direct feedback alignment: the reference, and the theorem of its updates' signs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lrules
from tests import bridge
from tests.reference import backprop
from tests.reference import monotone_dfa as reference
from tests.rules.common import NETS, agrees, draw, make, pull
from tests.sampling import mostly_slow


@pytest.mark.parametrize("name", mostly_slow(NETS, ["deep", "conv_max"]))
def test_reference(name):
    with jax.enable_x64(True):
        net, x, e = make(name)
        net = reference.lift(net)
        rule = lrules.monotone_dfa()
        feedback, listed = draw(rule, net, x)
        assert all((b >= 0).all() for b in listed[1:])
        agrees(pull(net, rule, feedback, x, e), reference.gradients(net, listed, x, e))


INCREASING = ["tanh", "sigmoid", "relu", "softplus", "elu", "leaky_relu", "hard_tanh", "relu6"]


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from(INCREASING)), min_size=1, max_size=4),
)
def test_theorem_2(seed, hidden):
    """One output, one example: every update agrees with its gradient in sign."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        sizes = (3, *(width for width, _ in hidden), 1)
        net = bridge.random_dense(rng, sizes, [activation for _, activation in hidden])
        net = [net[0], *(layer._replace(kernel=np.abs(layer.kernel)) for layer in net[1:])]
        x, e = rng.normal(size=(1, 3)), rng.normal(size=(1, 1))
        apply, params = bridge.apply_of(net), bridge.parameters(net)
        rule = lrules.monotone_dfa()
        feedback = rule.init(jax.random.key(seed % 1000), apply, params, jnp.asarray(x))
        f = lrules.transform(apply, rule)
        got = jax.jit(lambda p: jax.vjp(lambda p: f(p, feedback, jnp.asarray(x)), p)[1](jnp.asarray(e))[0])(params)
        true = bridge.kernels_and_biases(backprop.gradients(net, x, e))
        for g, t in zip(jax.tree.leaves(got), jax.tree.leaves(true), strict=True):
            assert np.all(np.asarray(g) * t >= 0)
            assert np.all((np.asarray(g) != 0) | (t == 0) | (np.abs(t) < 1e-300))


def test_two_outputs_may_disagree():
    """The counterexample of A.3: minus the gradient."""
    apply = lambda p, x: jax.nn.relu(x @ p["first"]) @ p["second"]  # noqa: E731
    params = {"first": jnp.eye(2), "second": jnp.asarray([[0.0, 1.0], [1.0, 0.0]])}
    x, e = jnp.ones((1, 2)), jnp.asarray([[1.0, -1.0]])
    feedback = lrules.Feedback({"second": jnp.eye(2)}, {})
    got = jax.vjp(lambda p: lrules.transform(apply, lrules.monotone_dfa())(p, feedback, x), params)[1](e)[0]["first"]
    gradient = jax.vjp(lambda p: apply(p, x), params)[1](e)[0]["first"]
    np.testing.assert_array_equal(got, -gradient)
    assert np.all(np.asarray(got)[0] == [1, -1])
