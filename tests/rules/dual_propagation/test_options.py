"""Options that are out of range, or that do not go together."""

import pytest

import lrules
from tests.rules.dual_propagation.common import NO_FEEDBACK

pytestmark = pytest.mark.usefixtures("double_precision")


def test_arguments_out_of_range():
    for options, message in [
        ({"alpha": 1.2}, r"^alpha must be a number in \[0, 1\], got 1.2"),
        ({"alpha": {"relu": -0.1}}, r"^alpha must be a number in \[0, 1\], got -0.1"),
        ({"beta": 0.0}, "^beta must be a finite number > 0, got 0.0"),
        ({"beta": {".*": 0.0}}, "^beta must be a finite number > 0, got 0.0"),
        ({"iterations": 0}, "iterations must be an integer >= 1, got 0"),
        ({"iterations": 1.5}, "iterations must be an integer >= 1, got 1.5"),
        ({"order": "backward"}, "order must be one of 'forward_backward', 'forward', .* got 'backward'"),
        ({"output": "twice"}, "output must be one of 'once', 'refreshed', 'squared_error', got 'twice'"),
        ({"damping": "spectral"}, "adjoint=False"),
        ({"damping": "strong", "adjoint": False}, '"spectral", "contracting", .* got \'strong\''),
        ({"damping": -1.0, "adjoint": False}, "a finite number >= 0 or None, got -1.0"),
        ({"output": "squared_error"}, "adjoint=False"),
        ({"feedback_rule": "fa"}, "feedback_rule must be a sequential rule, .* got a str$"),
        ({"input_nudge": 0.0}, "input_nudge must be a finite number > 0, got 0.0: leave it out"),
        ({"tolerance": -1.0}, "tolerance must be a number >= 0 or None, got -1.0"),
        ({"alpha": "half"}, "in \\[0, 1\\], got 'half'"),
        ({"alpha": {"(": 0.5}}, "is not a regular expression"),
        ({"beta": None}, "beta must be a finite number > 0, got None"),
        ({"beta": float("inf")}, "got inf"),
        ({"adjoint": "no"}, "must be True or False"),
        ({"input_nudge": "a"}, "leave it out"),
        ({"tolerance": "a"}, "tolerance must be a number"),
    ]:
        with pytest.raises(ValueError, match=message):
            lrules.dual_propagation(**options)


FA = lrules.feedback_alignment()


@pytest.mark.parametrize(
    "rule,message",
    [
        (lrules.sign_error(FA), "put the modifier around dual_propagation"),
        (lrules.quantize_error(FA, 2, at="output"), "put the modifier around dual_propagation"),
        (lrules.without_derivatives(FA), "put the modifier around dual_propagation"),
        (lrules.node_perturbation(0.1), "got a rule that needs the loss or the targets"),
        (lrules.random_target_projection(), "got a rule that needs the loss or the targets"),
        (lrules.feedback_alignment, "got a function: call it first"),
        (lrules.Rule(FA.init, FA.transform), "does not say it: it was made of functions by hand"),
        (FA._replace(init=lambda key, net, params, inputs: NO_FEEDBACK), "one of its functions was replaced"),
    ],
)
def test_rules_that_cannot_bring_down_the_difference(rule, message):
    with pytest.raises(ValueError, match=f"feedback_rule.*{message}"):
        lrules.dual_propagation(feedback_rule=rule)
