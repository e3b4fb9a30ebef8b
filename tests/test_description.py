"""What `describe` and `refusals` tell."""

import pytest

import lrules
from tests.small import DFA, FA, W, X, mlp


def test_describe_says_where_nothing_arrives():
    rows = lrules.describe(mlp, lrules.last_layer_only(), W, X).layers
    assert [row["reached by"] for row in rows] == ["(nothing)", "(nothing)", "output"]
    text = str(lrules.describe(mlp, FA, W, X))
    assert "activations: tanh, tanh#2" in text and "feedback: 216 bytes" in text


def test_describe_leaves_the_batch_out_under_every_rule():
    mixed = lrules.partition({"b": FA, ".*": DFA})
    for rule in (FA, DFA, mixed, lrules.backprop()):
        assert [row["shape"] for row in lrules.describe(mlp, rule, W, X).hidden] == [(6,), (6,)]
    one = lrules.Network(mlp, batch_axes=None)  # there is none that it could leave out
    assert [row["shape"] for row in lrules.describe(one, FA, W, X).hidden] == [(4, 6), (4, 6)]


def test_what_is_no_rule():
    with pytest.raises(TypeError, match="call its factory first"):
        lrules.refusals(mlp, lrules.feedback_alignment, W, X)
