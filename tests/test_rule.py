"""A rule has one description, and it is true of it."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import pytest

import lrules
from experiments import recipes

FA, DFA = lrules.feedback_alignment(), lrules.direct_feedback_alignment()
X = jnp.ones((4, 3))
W = {"a": jnp.ones((3, 5)), "b": jnp.ones((5, 2))}


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def other_init(key, net, params, inputs):
    drawn = FA.init(key, net, params, inputs)
    return drawn._replace(fixed=jax.tree.map(jnp.zeros_like, drawn.fixed))


def other_transform(net, *, reduction="mean"):
    return lambda params, feedback, inputs, *, rng=None: net(params, inputs)


REPLACED = {
    "init": lambda rule: rule._replace(init=other_init),
    "transform": lambda rule: rule._replace(transform=other_transform),
    "value_and_grad": lambda rule: rule._replace(value_and_grad=lambda net, loss: None),
    "by dataclasses": lambda rule: dataclasses.replace(rule, init=other_init),
    "of a copy": lambda rule: copy.copy(rule)._replace(init=other_init),
    "of a modified rule": lambda rule: lrules.sign_error(rule)._replace(init=other_init),
    "with the description": lambda rule: rule._replace(init=other_init, description=rule.description),
    "by hand": lambda rule: lrules.Rule(rule.init, rule.transform, rule.value_and_grad),
}
NEEDS = {
    "dual_propagation": lambda rule: lrules.dual_propagation(feedback_rule=rule),
    "partition": lambda rule: lrules.partition({".*": rule}),
    "refusals": lambda rule: lrules.refusals(mlp, rule, W, X),
    "audit": lambda rule: lrules.audit(mlp, rule, W, X),
}


@pytest.mark.parametrize("need", NEEDS)
@pytest.mark.parametrize("replace", REPLACED)
def test_a_replaced_function_drops_the_description(replace, need):
    with pytest.raises(ValueError, match=f"{need}.*does not say it.*one of its functions was replaced"):
        NEEDS[need](REPLACED[replace](FA))


def test_what_is_no_function_may_be_replaced():
    assert FA._replace(stochastic=True).description is FA.description
    assert copy.copy(FA).description is FA.description
    same = FA._replace(init=FA.init)
    assert lrules.refusals(mlp, lrules.partition({".*": same}), W, X) == {}


def test_a_replaced_function_is_used():
    rule = FA._replace(init=other_init)
    feedback = rule.init(jax.random.key(0), mlp, W, X)
    assert not jnp.any(feedback.fixed["b"])
    grads = jax.grad(lambda w: lrules.transform(mlp, rule)(w, feedback, X).sum())(W)
    assert not jnp.any(grads["a"]) and jnp.any(grads["b"])
    assert str(lrules.describe(mlp, rule, W, X)).count("own") == 2  # the layers are seen, the rule is not


def test_recipes_with_an_init_of_their_own_are_not_taken_for_the_rule_that_they_change():
    with pytest.raises(ValueError, match=r"the rule for '\.\*' does not say it"):
        lrules.partition({".*": recipes.cascaded()})


def test_modified_rules():
    """A modifier keeps the plan, says that it is there, and has no rule of one layer."""
    rule = lrules.quantize_error(DFA, 3)
    assert rule.description.modified and rule.description.layer is None
    assert rule.description.plan is DFA.description.plan
    assert lrules.refusals(mlp, rule, W, X) == {}
    assert "direct" in str(lrules.describe(mlp, rule, W, X))
    with pytest.raises(ValueError, match="acts on the network as a whole"):
        lrules.partition({".*": rule})


def test_quantised_updates_of_a_rule_that_is_not_additive_need_its_description():
    rule = dataclasses.replace(lrules.backman(), init=other_init)
    assert not rule.additive
    with pytest.raises(ValueError, match="quantize_update needs to know"):
        f = lrules.transform(mlp, lrules.quantize_update(rule, 3))
        f(W, lrules.Feedback({}, {}), X)


def test_gradients_have_a_report_of_their_own():
    first, second = lrules.Gradients({}, {}), lrules.Gradients({}, {})
    first.report["residual"] = 1
    assert second.report == {} and lrules.Gradients({}, {}).report == {}
    params, feedback, state, report = jax.tree.map(lambda x: x, lrules.Gradients(1, 2, 3, {"a": 4}))
    assert (params, feedback, state, report) == (1, 2, 3, {"a": 4})
    assert isinstance(jax.tree.map(lambda x: x, first), lrules.Gradients)
    assert first._replace(report={}) == second
