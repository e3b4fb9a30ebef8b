"""Rule expressions: what they stand for, and one sentence for each way in which they can be wrong."""

import jax
import jax.numpy as jnp
import pytest

import lrules
from experiments import rules
from experiments.errors import InputError


def test_every_factory_without_a_required_argument_is_found():
    found = rules.argument_free_rules()
    assert {"backprop", "last_layer_only", "feedback_alignment", "direct_feedback_alignment", "backman"} <= set(found)
    assert "partition" not in found
    assert all(isinstance(rule, lrules.Rule) for rule in found.values())
    assert set(rules.rules()) & set(rules.modifiers()) == set()


@pytest.mark.parametrize(
    "expression",
    [
        "backprop",
        "backprop()",
        " backman( alpha = 0.5 ) ",
        "backman(0.5)",
        'partition({"layers/1": feedback_alignment(init=shifted(-0.5)), ".*": backprop})',
        "feedback_alignment(init=normal(0.1))",
        "feedback_alignment(init=zeros)",
        "feedback_alignment(init=orthogonal)",
        "drop_error(feedback_alignment, rate=0.5)",
        "sign_error(quantize_error(rule=backman(alpha=0.1), bits=5))",
        'mixed_channel("layers/2")',
        "nonlinear_channel(srbp, fn=sigmoid)",
        "averaged_matrices(4)",
        "redrawn(init=sparse(3))",
        "sign_error(cascaded)",
        "replace_derivative(backprop, derivative(tanh))",
    ],
)
def test_expression_is_a_rule(expression):
    assert isinstance(rules.parse(expression), lrules.Rule)


def test_options_reach_the_rule():
    net = lrules.Network(lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"])
    params, x = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((5, 3))
    feedback = rules.parse("feedback_alignment(init=constant(7.0))").init(jax.random.key(0), net, params, x)
    assert (feedback.fixed["b"] == 7).all()


def test_functions_reach_the_rule():
    f = lrules.transform(lambda w, x: jnp.tanh(x @ w), rules.parse("replace_derivative(backprop, derivative(sigmoid))"))
    w, x = jnp.ones((1, 1)), jnp.full((1, 1), 0.3)
    gradient = jax.grad(lambda w: f(w, lrules.Feedback({}, {}), x).sum())(w)
    assert jnp.allclose(gradient, 0.3 * jax.nn.sigmoid(0.3) * jax.nn.sigmoid(-0.3))


def test_list_is_split_outside_brackets():
    chosen = rules.select("backprop, backman(alpha=0.5), partition({'a': backman(0.1), '.*': backprop})")
    assert list(chosen) == ["backprop", "backman(alpha=0.5)", "partition({'a': backman(0.1), '.*': backprop})"]
    assert list(rules.select(None)) == list(rules.argument_free_rules())


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("bakman", ["no rule 'bakman'", "did you mean 'backman'?"]),
        ("xyz", ["no rule 'xyz'", "use one of", "backprop"]),
        ("backman(alhpa=1.0)", ["backman has no option 'alhpa'", "did you mean 'alpha'?"]),
        ("backprop(rate=1)", ["backprop has no option 'rate'", "it has no options"]),
        ("backman(1.0, alpha=1.0)", ["backman", "alpha"]),
        ("partition", ["partition needs the option 'rules'", "partition(rules=...)"]),
        ("drop_error(rate=0.5)", ["drop_error needs the option 'rule'"]),
        ("drop_error(0.5, backprop)", ["drop_error modifies a rule, not 0.5", "drop_error(backprop"]),
        ("drop_error(backprop)", ["drop_error needs the option 'rate'", "rate=..."]),
        ("drop_error(backprop, rate=2.0)", ["drop_error: ", "2.0"]),
        ("backman(1.0, None, 3)", ["backman takes at most 1", "got 3", "such as axis_name=..."]),
        ("feedback_alignment(sparse(1, True))", ["sparse takes at most 1", "got 2", "such as rescale=..."]),
        ("backprop(1)", ["backprop takes at most 0", "leave the others out."]),
        ("drop_error(None, rate=0.5)", ["drop_error modifies a rule, not None"]),
        ("partition({[1]: backprop})", ["A rule cannot contain '{[1]: backprop}'"]),
        ("partition({**{}})", ["A rule cannot contain"]),
        ("partition({'.*': bakman})", ["did you mean 'backman'?"]),
        ("backman(alpha=1.0", ["malformed", "backman(alpha=1.0)"]),
        ("", ["malformed"]),
        ("1.0", ["'1.0' is not a rule"]),
        ("normal", ["'normal' is not a rule"]),
        ("backman(**{'alpha': 1})", ["A rule cannot contain"]),
        ("lrules.backprop", ["A rule cannot contain 'lrules.backprop'"]),
        ("backman(alpha=__import__('os').getpid())", ["A rule cannot contain"]),
        ("backman(alpha=2 ** 9999)", ["A rule cannot contain '2 ** 9999'"]),
        ("(lambda: backprop)()", ["A rule cannot contain"]),
        ("[backprop for _ in 'ab']", ["A rule cannot contain"]),
        ("backprop\n.x", ["malformed"]),
        ("replace_derivative(backprop, derivative(tahn))", ["no rule 'tahn'", "did you mean 'tanh'?"]),
        ("replace_derivative(backprop, derivative(2.0))", ["derivative: 2.0 is not a function", "tanh"]),
        ("mixed_channel", ["mixed_channel needs the option 'long_range'"]),
        ("cascade", ["no rule 'cascade'", "did you mean 'cascaded'?"]),
        ("sign_symmetry(magnitude=scaled)", ["there is no function 'scaled'", 'write it in quotes, as "scaled"']),
        ("forward_gradient(weights)", ["there is no function 'weights'", 'write it in quotes, as "weights"']),
        ("feedback_alignment(glorot_norml)", ["no function 'glorot_norml'", "did you mean 'glorot_normal'?"]),
        ("(" * 500 + "backprop" + ")" * 500, ["malformed"]),
    ],
)
def test_wrong_expression_is_told_in_a_sentence(expression, words):
    with pytest.raises(InputError) as error:
        rules.parse(expression)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("expressions", ["backprop,backman(", "backprop], [backman"])
def test_malformed_list(expressions):
    with pytest.raises(InputError, match="malformed"):
        rules.select(expressions)


def test_modified_rule():
    assert rules.modified("drop_error(fa(init=normal(0.1)), 0.5)") == "fa(init=normal(0.1))"
    assert rules.modified("dfa(storage='recomputed')") == "dfa" and rules.modified("dfa(storage='stored')") is None
    assert rules.modified("dfa(rank=3, storage='recomputed')") == "dfa(rank=3)"
    assert rules.modified("backprop") is None and rules.modified("partition({'.*': backprop})") is None


@pytest.mark.parametrize("name", rules.PAPER_NAMES)
def test_names_of_the_papers(name):
    assert isinstance(rules.parse(name), lrules.Rule)
    assert isinstance(rules.parse(f"sign_error({name})"), lrules.Rule)


def test_a_name_of_the_papers_takes_options():
    assert isinstance(rules.parse("quantize_error(srbp(max_feedback_bytes=1000), bits=2)"), lrules.Rule)
    with pytest.raises(InputError, match="did you mean"):
        rules.parse("arpb")
