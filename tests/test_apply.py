"""`transform` and `value_and_grad`: the user's own objective, and what is said of a wrong call."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from tests import bridge
from tests.reference import backman, direct_feedback_alignment, feedback_alignment, losses
from tests.small import DFA, FA, KEY, NONE, W, X, half_square, mlp


def test_masked_weighted_regularised_objective():
    """The user's own objective: masks, weights and a penalty on the weights go through `transform` as they are."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        net = bridge.random_dense(rng, (5, 6, 7, 3), ["tanh", "relu"])
        x, labels = rng.normal(size=(6, 5)), rng.integers(0, 3, 6)
        mask = np.array([1.0, 0, 1, 1, 0, 1])
        penalty = 0.01
        for rule, reference in [
            (lrules.feedback_alignment(), feedback_alignment.gradients),
            (lrules.direct_feedback_alignment(), direct_feedback_alignment.gradients),
            (lrules.backman(), lambda net, b, x, e: backman.gradients(net, x, e)),
        ]:
            params = bridge.parameters(net)
            f = lrules.transform(bridge.apply_of(net), rule)
            feedback = rule.init(jax.random.key(0), bridge.apply_of(net), params, jnp.asarray(x))

            def objective(p, f=f, feedback=feedback):
                logp = jax.nn.log_softmax(f(p, feedback, jnp.asarray(x)))
                per = -jnp.take_along_axis(logp, jnp.asarray(labels)[:, None], 1)[:, 0]
                decay = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))
                return jnp.sum(per * mask) / mask.sum() + penalty * decay

            value, grads = jax.jit(jax.value_and_grad(objective))(params)
            outputs = np.asarray(bridge.apply_of(net)(params, jnp.asarray(x)))
            per, error = losses.softmax_cross_entropy(outputs, losses.one_hot(labels, 3))
            wanted_value, e = losses.weighted_mean(per, error, mask)
            listed = [None] + [np.asarray(b) for _, b in sorted(feedback.fixed.items())]
            wanted = bridge.kernels_and_biases(reference(net, listed, x, e))
            wanted = jax.tree.map(lambda g, p: g + 2 * penalty * np.asarray(p), wanted, params)
            bridge.close(grads, wanted)
            squares = sum(np.sum(np.asarray(leaf) ** 2) for leaf in jax.tree.leaves(params))
            np.testing.assert_allclose(value, wanted_value + penalty * squares, rtol=1e-12)


def test_loss_with_another_batch():
    step = lrules.value_and_grad(mlp, lambda y, t: half_square(y, t).mean(), FA)
    feedback = FA.init(KEY, mlp, W, X)
    with pytest.raises(ValueError, match="one loss per example"):
        step(W, feedback, X, jnp.zeros((4, 3)))
    step = lrules.value_and_grad(mlp, lambda y, t: half_square(y, t)[:2], FA)
    with pytest.raises(ValueError, match="4 examples"):
        step(W, feedback, X, jnp.zeros((4, 3)))


@pytest.mark.parametrize("bad", [jnp.ones((5, 6), jnp.int32), 3.0, "weights"])
def test_parameters_that_are_no_float_arrays(bad):
    params = {**W, "a": bad}
    for call in (
        lambda: FA.init(KEY, mlp, params, X),
        lambda: lrules.transform(mlp, FA)(params, NONE, X),
        lambda: lrules.value_and_grad(mlp, half_square, FA)(params, NONE, X, X),
    ):
        with pytest.raises(TypeError, match="the parameter 'a' .*inputs"):
            call()


def test_feedback_of_another_network():
    feedback = FA.init(KEY, mlp, W, X)
    f = lrules.transform(mlp, FA)
    with pytest.raises(ValueError, match="no entry 'b'.*rule.init"):
        f(W, NONE, X)
    with pytest.raises(ValueError, match="entry 'z'.*rule.init"):
        f(W, feedback._replace(fixed={**feedback.fixed, "z": X}), X)
    with pytest.raises(ValueError, match=r"'b' has shape \(4, 5\).*\(6, 6\).*rule.init"):
        f(W, feedback._replace(fixed={**feedback.fixed, "b": X}), X)
    with pytest.raises(ValueError, match="rule.init"):
        lrules.transform(mlp, DFA)(W, feedback, X)


def test_feedback_that_another_rule_would_learn():
    fixed = FA.init(KEY, mlp, W, X)
    learned = lrules.kolen_pollack().init(KEY, mlp, W, X)
    with pytest.raises(ValueError, match="is fixed, and this rule learns it.*make new feedback"):
        lrules.transform(mlp, lrules.kolen_pollack())(W, fixed, X)
    with pytest.raises(ValueError, match="is learned, and this rule keeps it fixed"):
        lrules.transform(mlp, FA)(W, learned, X)
    with pytest.raises(TypeError, match="the feedback is a NoneType, not an lrules.Feedback"):
        lrules.transform(mlp, lrules.backprop())(W, None, X)


def test_rng():
    feedback = FA.init(KEY, mlp, W, X)
    with pytest.raises(ValueError, match="does not use random numbers: leave rng out"):
        lrules.transform(mlp, FA)(W, feedback, X, rng=KEY)
    with pytest.raises(ValueError, match="rng=jax.random.key"):
        lrules.transform(mlp, FA._replace(stochastic=True))(W, feedback, X)


def test_rule_that_needs_the_targets():
    rule = lrules.direct(lambda e, b, targets, name: targets @ b, init=jax.nn.initializers.normal(), targets=True)
    with pytest.raises(ValueError, match="value_and_grad"):
        lrules.transform(mlp, rule)
    feedback = rule.init(KEY, mlp, W, X)
    _, grads = lrules.value_and_grad(mlp, half_square, rule)(W, feedback, X, jnp.ones((4, 3)))
    assert all(jnp.any(g) for g in jax.tree.leaves(grads.params))


@pytest.mark.parametrize("rule", [FA, DFA, lrules.node_perturbation(0.1, direct=True, solver="rls")])
def test_feedback_restored_as_a_dict(rule):
    """What a checkpoint gives back without the structure that was saved; the remedy works."""
    feedback = rule.init(KEY, mlp, W, X)
    restored = dict(feedback._asdict())
    step = lrules.value_and_grad(mlp, half_square, rule)
    rng = {"rng": KEY} if rule.stochastic else {}
    wanted = step(W, feedback, X, jnp.ones((4, 3)), **rng)
    for given in (restored, {k: v for k, v in restored.items() if k != "state" or v}):
        with pytest.raises(TypeError, match=r"the feedback is a dict, .*: write lrules.Feedback\(\*\*restored\)"):
            step(W, given, X, jnp.ones((4, 3)), **rng)
        got = step(W, lrules.Feedback(**given), X, jnp.ones((4, 3)), **rng)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, got, wanted))
    with pytest.raises(TypeError, match=r"make it with rule.init\(key, net, params, inputs\)"):
        step(W, restored["fixed"], X, jnp.ones((4, 3)), **rng)


@pytest.mark.foreign
def test_a_whole_equinox_model_as_parameters():
    """Its functions and numbers are no parameters; taken apart as the message says, it is served."""
    model = eqx.nn.Sequential([eqx.nn.Linear(5, 6, key=KEY), eqx.nn.Lambda(jnp.tanh), eqx.nn.Linear(6, 3, key=KEY)])
    apply = lambda model, x: jax.vmap(model)(x)  # noqa: E731
    for step in (lambda: FA.init(KEY, apply, model, X), lambda: lrules.transform(apply, FA)(model, NONE, X)):
        with pytest.raises(
            TypeError, match=r"not an array: .* params, static = eqx.partition\(model, eqx.is_inexact_array"
        ):
            step()
    params, static = eqx.partition(model, eqx.is_inexact_array)
    whole = lambda p, x: apply(eqx.combine(p, static), x)  # noqa: E731
    feedback = FA.init(KEY, whole, params, X)
    grads = lrules.value_and_grad(whole, half_square, FA)(params, feedback, X, jnp.ones((4, 3)))[1].params
    assert all(jnp.any(g) for g in jax.tree.leaves(grads))


def test_wrong_calls():
    with pytest.raises(TypeError, match="call its factory first"):
        lrules.transform(mlp, lrules.feedback_alignment)
    with pytest.raises(TypeError, match="the order is"):
        lrules.value_and_grad(mlp, FA, NONE)
    with pytest.raises(TypeError, match="not an lrules.Rule|Network or a function .*, got a Rule"):
        lrules.transform(FA, mlp)
    with pytest.raises(TypeError, match="the feedback is a dict.*rule.init"):
        lrules.transform(mlp, FA)(W, {}, X)
    with pytest.raises(ValueError, match="is not a regular expression"):
        lrules.direct_feedback_alignment(at="(")
