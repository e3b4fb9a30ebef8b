"""Options by regular expression: the first match holds, and a pattern without a use is an error."""

import pytest

from lrules.options import ByName, first_match, is_number, numbers


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
        ({"a": 1, "ab": 2}, r"alpha: 'ab' is shadowed by those before it; the layers are 'a', 'ab'"),
    ],
)
def test_patterns_without_use(patterns, message):
    with pytest.raises(ValueError, match=message):
        ByName("alpha", patterns).check(["a", "ab", "a"])


def test_names_without_pattern():
    with pytest.raises(ValueError, match=r"alpha: no pattern matches the layer 'b': add one, such as '\.\*'"):
        ByName("alpha", {"a": 1}).of("b")


def test_refused():
    with pytest.raises(ValueError, match="alpha is an empty dict: give one value"):
        ByName("alpha", {})
    with pytest.raises(ValueError, match=r"alpha: '\(' is no regular expression"):
        ByName("alpha", {"(": 1})
    with pytest.raises(ValueError, match="alpha must be a number, got 'x'"):
        numbers("alpha", {"a": 1.0, "b": "x"}, is_number, "a number")
