"""Rules by layer against the explicit reference, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from tests import bridge
from tests.reference import partition
from tests.rules.common import ALL_NETS, agrees, make, pull
from tests.small import BACKMAN, DFA, FA, KEY, W, X, first, mlp, refused


@pytest.mark.parametrize("kinds", [("fa", "bp", "fa", "fa"), ("bm", "fa", "bp", "bm"), ("fa", "dfa", "dfa", "bp")])
@pytest.mark.parametrize("name", ALL_NETS)
def test_reference(name, kinds):
    """Each layer follows its own rule: what arrives at the hidden signal it reads, and how its gradient is formed."""
    with jax.enable_x64(True):
        net, x, e = make(name)
        kinds = kinds[: len(net)]
        dfa = lrules.direct_feedback_alignment()
        rules = {"fa": lrules.feedback_alignment(), "bp": lrules.backprop(), "bm": lrules.backman(0.7), "dfa": dfa}
        rule = lrules.partition({f"^{k}/": rules[kind] for k, kind in enumerate(kinds)})
        feedback = rule.init(jax.random.key(1), bridge.apply_of(net), bridge.parameters(net), jnp.asarray(x))
        b = {k: np.asarray(feedback.fixed.get(f"{k}/kernel")) for k in range(len(net))}
        forms = {
            "fa": lambda k: ("feedback_alignment", b[k]),
            "bp": lambda k: ("backprop",),
            "bm": lambda k: ("backman", 0.7),
            "dfa": lambda k: ("direct", b[k]),
        }
        wanted = partition.gradients(net, [forms[kind](k) for k, kind in enumerate(kinds)], x, e)
        agrees(pull(net, rule, feedback, x, e), wanted)


def test_disagreeing_rules_of_one_signal():
    def apply(p, x):
        h = jnp.tanh(x @ p["a"])
        return jnp.tanh(h @ p["b"]) @ p["c"] + h @ p["c"]

    rule = lrules.partition({"b": DFA, ".*": FA})
    refused(apply, "'b'", "'c'", "hidden signal", rule=rule, error=ValueError)
    two = lrules.partition({"b": DFA, ".*": lrules.direct_feedback_alignment()})
    refused(apply, "disagree", rule=two, error=ValueError)
    lrules.partition({"b": FA, "c": BACKMAN, ".*": lrules.backprop()}).init(KEY, apply, W, X)


def test_patterns():
    with pytest.raises(TypeError, match="partition: rules must be a dict {pattern: rule}, got a list"):
        lrules.partition([(".*", FA)])
    with pytest.raises(ValueError, match="3 is not a regular expression"):
        lrules.partition({3: FA})
    with pytest.raises(ValueError, match="'d' matches no layer; the layers are 'a', 'b', 'c'"):
        lrules.partition({"d": FA, ".*": FA}).init(KEY, mlp, W, X)
    with pytest.raises(ValueError, match="'b' comes after patterns"):
        lrules.partition({".*": FA, "b": FA}).init(KEY, mlp, W, X)
    with pytest.raises(ValueError, match="no pattern matches the layer 'a'"):
        lrules.partition({"b|c": FA}).init(KEY, mlp, W, X)
    with pytest.raises(ValueError, match="is not a regular expression"):
        lrules.partition({"(": FA})
    with pytest.raises(ValueError, match="call its factory"):
        lrules.partition({".*": lrules.feedback_alignment})
    with pytest.raises(ValueError, match="acts on the network as a whole"):
        lrules.partition({".*": lrules.dual_propagation()})
    with pytest.raises(ValueError, match="at least one rule"):
        lrules.partition({})


def test_one_parameter_under_two_rules():
    """A parameter that two layers of different names share has one feedback: their rules must be one."""

    def shared(p, x):
        h = first(p, x)
        return jnp.tanh(h @ (p["b"] @ p["u"])) @ (p["b"] @ p["v"])

    params = {"a": W["a"], "b": jnp.ones((6, 6)), "u": jnp.ones((6, 6)), "v": jnp.ones((6, 3))}
    names = [row["layer"] for row in lrules.describe(shared, FA, params, X).layers]
    assert names == ["a", "b", "b#2"]  # named after the first of their parameters
    lrules.partition({"b": FA, ".*": lrules.feedback_alignment()}).init(KEY, shared, params, X)

    def crossed(p, x):
        return jnp.tanh(first(p, x) @ (p["b"] @ p["u"])) @ (p["A"] @ p["u"].T @ p["v"])

    params["A"] = jnp.ones((6, 6))
    rule = lrules.partition({"A": FA, ".*": lrules.feedback_alignment()})
    refused(crossed, "'u'", "two rules", rule=rule, error=ValueError, params=params)
