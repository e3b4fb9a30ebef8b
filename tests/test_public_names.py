"""What `dir` and `import *` show of the library and its public modules: names of their own, written out."""

import importlib
import inspect

import pytest

import lrules

MODULES = ["diagnostics", "extend", "feedback", "monotone", "testing"]
INTERNAL = {"spectral_norm"}  # of a layer as the engine knows it
VALUES = {"monotone": {"zeros"}}


def test_the_library():
    assert dir(lrules) == sorted([*lrules.__all__, "__version__"])
    assert all(hasattr(lrules, name) for name in lrules.__all__)
    modules = [name for name in lrules.__all__ if inspect.ismodule(getattr(lrules, name))]
    assert modules == MODULES


@pytest.mark.parametrize("name", MODULES)
def test_a_module(name):
    module = importlib.import_module(f"lrules.{name}")
    assert dir(module) == sorted(module.__all__)
    functions = {n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    public = {n for n in functions if not n.startswith("_")} - INTERNAL
    if name == "extend":  # what it takes from the engine is its own to give
        assert public <= set(module.__all__) and all(hasattr(module, n) for n in module.__all__)
        return
    assert set(module.__all__) == public | VALUES.get(name, set())
