"""How public functions are called: an option after the first has its name at every call."""

import inspect
import types

import pytest

import lrules

# What may stand without its name though it has a default and is not the first: it belongs to what stands before it.
UNNAMED = {
    "Rule": ["value_and_grad"],
    "extend.run": ["handlers"],
    "feedback.binary": ["high"],
    "from_nnx": ["wrt"],
    "testing.check_rule": ["net", "params", "inputs"],
}


def public_functions():
    """Every function and class of `lrules.__all__`, and those of its modules; named tuples are for reading."""
    found = {}
    for name in lrules.__all__:
        value = getattr(lrules, name)
        if isinstance(value, types.ModuleType):
            own = {n: v for n, v in vars(value).items() if getattr(v, "__module__", None) == value.__name__}
            found |= {f"{name}.{n}": v for n, v in own.items() if not n.startswith("_")}
        else:
            found[name] = value
    tuples = [name for name, value in found.items() if inspect.isclass(value) and issubclass(value, tuple)]
    return {name: f for name, f in found.items() if callable(f) and name not in tuples}


def unnamed_options(f):
    """The parameters with a default that may stand without their name, but for the first parameter."""
    parameters = list(inspect.signature(f).parameters.values())
    return [p.name for p in parameters[1:] if p.default is not p.empty and p.kind is not p.KEYWORD_ONLY]


@pytest.mark.parametrize("name", sorted(public_functions()))
def test_options_after_the_first_are_keyword_only(name):
    assert unnamed_options(public_functions()[name]) == UNNAMED.get(name, [])


def test_all_public_functions_are_looked_at():
    names = set(public_functions())
    assert {"backman", "dual_propagation", "quantize_update", "Network", "direct", "hidden"} <= names
    assert {"feedback.sparse", "monotone.constrain", "diagnostics.spectral_norms", "testing.check_rule"} <= names
    assert set(UNNAMED) <= names and "Feedback" not in names
    assert unnamed_options(lambda rule, bits, scale=1.0, *, at="hidden": None) == ["scale"]
