"""What an option may be, and the sentence that is said if it is something else."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from lrules.options import ByName, by_name, first_match, is_number, is_positive
from tests.small import FA, GLOROT, KEY, NONE, W, X, mlp


def test_nowhere_to_land():
    with pytest.raises(ValueError, match="at must name at least one place"):
        lrules.direct_feedback_alignment(at=[])


def test_values_of_options():
    for alpha in ("norm", "1", None, True, -1, float("nan"), float("inf"), jnp.ones(2)):
        with pytest.raises(ValueError, match='a finite number >= 0 or "gradient_norm"'):
            lrules.backman(alpha)
    lrules.backman(jnp.float32(0.5))
    jax.jit(lambda alpha: lrules.transform(mlp, lrules.backman(alpha))(W, NONE, X))(0.5)
    with pytest.raises(TypeError, match='axis_name must be a name such as "data", .*, got 3'):
        lrules.backman(axis_name=3)
    with pytest.raises(ValueError, match='reduction must be "mean" or "sum"'):
        lrules.transform(mlp, FA, reduction="none")
    with pytest.raises(ValueError, match="at='nothing' matches no hidden signal.*'b', 'c'"):
        lrules.direct_feedback_alignment(at="nothing").init(KEY, mlp, W, X)
    with pytest.raises(TypeError, match="has_aux=True"):
        FA.init(KEY, lrules.Network(mlp, has_aux=True), W, X)


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"shared_axes": [(1, 1, 1)]}, r"shared_axes must be an axis of the outputs, .* got \[\(1, 1, 1\)\]"),
        ({"shared_axes": "1"}, "shared_axes must be .* got '1'"),
        ({"shared_axes": 1.5}, "shared_axes must be .* got 1.5"),
        ({"shared_axes": True}, "shared_axes must be .* got True"),
        ({"shared_axes": None}, "shared_axes must be .* got None"),
        ({"shared_axes": [(1, "2")]}, "shared_axes must be .* got"),
        ({"shared_axes": [(1, "loop")]}, "shared_axes must be .* got"),
        ({"shared_axes": (1, 1)}, r"names the axis 1 of the outputs twice, got \(1, 1\): .* give pairs in a list"),
        ({"shared_axes": [1, (1, 2)]}, "names the axis 1 of the outputs twice"),
        ({"max_feedback_bytes": None}, "max_feedback_bytes must be a number >= 0 or inf, got None"),
        ({"max_feedback_bytes": "1G"}, "max_feedback_bytes must be a number >= 0 or inf, got '1G'"),
        ({"max_feedback_bytes": float("nan")}, "max_feedback_bytes must be .* got nan"),
        ({"at": 3}, "at=3 is not a regular expression"),
        ({"at": ["b", None]}, "at=None is not a regular expression"),
        ({"at": "("}, r"at='\(' is not a regular expression"),
        ({"rank": True}, "rank must be an integer >= 1 or None, got True"),
        ({"rank": "2"}, "rank must be an integer >= 1 or None, got '2'"),
        ({"adaptive": "yes"}, "adaptive must be True or False, got 'yes'"),
    ],
)
def test_options_of_direct_rules(option, match):
    with pytest.raises(ValueError, match=match):
        lrules.direct_feedback_alignment(**option)


def test_a_rank_without_feedback_weights():
    with pytest.raises(ValueError, match="rank=2 makes feedback weights .* give init too"):
        lrules.direct(lambda e, b, targets, name: e, rank=2)


def test_options_that_are_flags():
    with pytest.raises(ValueError, match="adaptive must be True or False, got 1"):
        lrules.feedback_alignment(adaptive=1)
    with pytest.raises(ValueError, match="learned must be True or False"):
        lrules.sequential(lambda *_: None, learned="no")


RULES_WITH_INIT = {
    "feedback_alignment": lrules.feedback_alignment,
    "direct": lrules.direct_feedback_alignment,
    "rank": lambda init: lrules.direct_feedback_alignment(init, rank=2),
    "monotone": lrules.monotone_dfa,
    "kolen_pollack": lrules.kolen_pollack,
    "difference targets": lambda init: lrules.difference_target_propagation(init=init),
    "sign_symmetry": lambda init: lrules.sign_symmetry("fixed", init=init),
    "targets": lrules.random_target_projection,
    "local": lambda init: lrules.local_losses("both", init=init),
    "sequential": lambda init: lrules.sequential(lambda *_: None, init=init),
    "own direct": lambda init: lrules.direct(lambda *_: None, init=init),
    "shifted": lambda init: lrules.feedback_alignment(lrules.feedback.shifted(0.1, init=init)),
    "congruent": lambda init: lrules.feedback_alignment(lrules.feedback.congruent(init)),
}


@pytest.mark.parametrize(
    ("init", "error", "match"),
    [
        ("glorot", TypeError, "init must be a function .*, got a str"),
        (jnp.ones((6, 6)), TypeError, "init must be a function .*, got a .*Array"),
        (jax.nn.initializers.glorot_normal, TypeError, "got a function: call its factory first"),
        (lambda key, shape, dtype: None, TypeError, "init must return an array of shape .*, got a NoneType"),
        (lambda key, shape, dtype: GLOROT(key, (2, 2), dtype), ValueError, r"got one of shape \(2, 2\) and"),
        (lambda key, shape, dtype: jnp.ones(shape, int), ValueError, "dtype float32, got one of .* dtype int32"),
    ],
)
@pytest.mark.parametrize("name", RULES_WITH_INIT)
def test_what_is_no_initializer(name, init, error, match):
    with pytest.raises(error, match=match):
        RULES_WITH_INIT[name](init).init(KEY, mlp, W, X)


def test_first_match():
    patterns = {"head": 1, "a": 2, "": 3}
    assert [first_match(patterns, name) for name in ("head", "a/b", "c")] == [1, 2, 3]
    assert first_match({"x": 1}, "y") is None
    assert first_match({"y": 0}, "y") == 0


def test_one_value_for_all():
    alpha = ByName("alpha", 0.5)
    alpha.check(["a", "b"])
    assert alpha.of("anything") == 0.5 and alpha.values() == [0.5] and not alpha.several


def test_values_by_name():
    alpha = ByName("alpha", {"^a": 1.0, "b$": 2.0, ".*": 3.0})
    alpha.check(["a", "b"])  # a pattern for everything may be idle
    assert [alpha.of(name) for name in ("a", "ab", "b", "c")] == [1, 1, 2, 3]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"head": 1, ".*": 2}, r"alpha: 'head' matches no layer; the layers are 'a', 'ab'"),
        ({"a": 1, "ab": 2}, r"alpha: 'ab' comes after patterns that match the same names; the layers are 'a', 'ab'"),
    ],
)
def test_patterns_without_use(patterns, message):
    with pytest.raises(ValueError, match=message):
        ByName("alpha", patterns).check(["a", "ab", "a"])


def test_names_without_pattern():
    with pytest.raises(ValueError, match=r"alpha: no pattern matches the layer 'b': add one, such as '\.\*'"):
        ByName("alpha", {"a": 1}).of("b")


def test_refused_values_by_name():
    with pytest.raises(ValueError, match="alpha is an empty dict: give one value"):
        ByName("alpha", {})
    with pytest.raises(ValueError, match=r"alpha: '\(' is not a regular expression"):
        ByName("alpha", {"(": 1})
    with pytest.raises(ValueError, match="alpha must be a number, got 'x'"):
        by_name("alpha", {"a": 1.0, "b": "x"}, is_number, "a number")


def test_feedback_may_be_one_gibibyte_unless_said():
    """Every public function that makes direct feedback has the same limit."""
    functions = {name: getattr(lrules, name) for name in lrules.__all__ if inspect.isfunction(getattr(lrules, name))}
    options = {name: inspect.signature(function).parameters for name, function in functions.items()}
    limits = {name: of["max_feedback_bytes"].default for name, of in options.items() if "max_feedback_bytes" in of}
    assert set(limits.values()) == {2**30} and {"direct", "direct_feedback_alignment", "monotone_dfa"} <= set(limits)


@pytest.mark.parametrize(
    "value, positive",
    [(0.5, True), (3, True), (np.float32(1e-30), True), (0, False), (-1.0, False), (float("inf"), False),
     (float("nan"), False), (True, False), ("1", False), (None, False), (np.ones(2), False)],
)  # fmt: skip
def test_positive_numbers(value, positive):
    assert bool(is_positive(value)) is positive
