"""The documentation: what it shows runs, and every public docstring has the same parts.

What runs: the examples in docstrings, and the Python of the README and of each page of docs/ from top to bottom. (A
block marked `py` is shown only: another page runs the like.)
"""

import doctest
import functools
import importlib
import inspect
import pathlib
import pkgutil
import re
import textwrap

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lrules
from tests.sampling import mostly_slow

pytestmark = pytest.mark.foreign
ROOT = pathlib.Path(__file__).resolve().parent.parent
MODULES = ["lrules", *(module.name for module in pkgutil.walk_packages(lrules.__path__, "lrules."))]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert not result.failed


def public_names():
    """Every public function and class, by the name under which users find it."""
    found = {}
    for name in lrules.__all__:
        value = getattr(lrules, name)
        if inspect.ismodule(value):
            own = {n: getattr(value, n) for n in value.__all__}
            own = {n: v for n, v in own.items() if inspect.isroutine(v) or inspect.isclass(v)}  # no values, no aliases
            found |= {f"{name}.{n}": v for n, v in own.items() if n not in OTHERS}
        else:
            found[name] = value
    return found


OTHERS = {"zeros"}  # an initializer of JAX
PUBLIC = public_names()
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Warns", "Example", "References")


def section(docstring, title):
    """The lines of one section of a docstring, without their indentation; None if it has no such section."""
    found = re.search(rf"^{title}:\n((?:  .*\n|\n)*)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    return None if found is None else textwrap.dedent(found[1]).strip().splitlines()


def names_of(lines):
    """The names that the entries of a section explain: `a, b: ...` explains two."""
    entries = [re.match(r"([\w*`][\w*, `]*):(?= |$)", line) for line in lines]
    return [name.strip(" *`") for entry in entries if entry is not None for name in entry[1].split(",")]


def wanted_names(value):
    """The parameters of a function; of a class, what its instances are made of."""
    parameters = inspect.signature(value).parameters
    return [name for name in parameters if not name.startswith("_")]


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_docstring(name):
    value = PUBLIC[name]
    docstring = inspect.getdoc(value)
    assert docstring, "it has no docstring"
    first, *rest = docstring.splitlines()
    assert first.endswith(".") and not first.endswith(".."), f"the first line is no sentence: {first}"
    assert not rest or not rest[0], "the first sentence does not fit one line"
    example = section(docstring, "Example")
    assert example and any(line.startswith(">>> ") for line in example), "it has no example"
    is_protocol = getattr(value, "_is_protocol", False)  # its method explains the arguments
    wanted = [] if is_protocol else wanted_names(value)
    explained = names_of(section(docstring, "Args") or section(docstring, "Attributes") or [])
    if name.startswith("extend.") and section(docstring, "Attributes"):  # made by the library: users read a part of it
        assert set(explained) <= set(wanted)
    else:
        assert explained == wanted
    returns = not (inspect.isclass(value) or inspect.signature(value).return_annotation in (None, "None"))
    assert returns == (section(docstring, "Returns") is not None), "what it returns is not said"
    assert [t for t in SECTIONS if section(docstring, t) is not None] == re.findall(
        rf"^({'|'.join(SECTIONS)}):$", docstring, re.MULTILINE
    ), "its sections are not in the usual order"


@pytest.mark.parametrize("name", [n for n in lrules.extend.__all__ if inspect.isclass(getattr(lrules.extend, n))])
def test_a_class_of_extend(name):
    """What the engine is made of: one sentence, and what a rule can use, as attributes that are there or as methods."""
    value = getattr(lrules.extend, name)
    first, *rest = inspect.cleandoc(value.__doc__).splitlines()
    assert first.endswith(".") and (not rest or not rest[0])
    explained = names_of(section(value.__doc__, "Attributes") or [])
    there = {*inspect.signature(value).parameters, *dir(value), *value.__annotations__}
    assert set(explained) <= there or name == "Graph", set(explained) - there
    methods = [m for m, f in vars(value).items() if inspect.isfunction(f) and not m.startswith("_")]
    assert explained or methods or name in ("Backprop", "Product"), "nothing is said of it"
    assert all(inspect.getdoc(getattr(value, m)) for m in methods), "a method says nothing"


def test_the_check_of_public_docstrings():
    """It sees every part that is missing."""
    docstring = "Does it.\n\nArgs:\n  a, b: two.\n    Note: more.\n  **rest: the rest.\n\nExample:\n  >>> 1\n  1\n"
    assert names_of(section(docstring, "Args")) == ["a", "b", "rest"]
    assert section(docstring, "Example") == [">>> 1", "1"] and section(docstring, "Returns") is None
    assert {"describe", "Feedback", "ValueAndGrad", "feedback.sparse", "testing.check_rule"} <= set(PUBLIC)


@functools.cache
def run_page(page):
    """The names that a page defines, after all its examples have run."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    namespace = {"__name__": page}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    return namespace


WITH_PYTHON = [
    str(page.relative_to(ROOT))
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if ROOT / "docs" / "papers" not in page.parents and re.search("^```python$", page.read_text(), re.MULTILINE)
]


TAUGHT_ON = pytest.mark.xdist_group("writing_rules")  # one process runs the page, and tests its rules


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[TAUGHT_ON] if p == "docs/writing_rules.md" else []) for p in WITH_PYTHON]
)
def test_page(page):
    if page == "docs/guides/haiku.md":
        pytest.importorskip("haiku")
    run_page(page)


TAUGHT = {"mixed": (), "fading": (), "signs": (), "normalised": (), "limited": ("net", "params", "x")}  # its network


@TAUGHT_ON
@pytest.mark.parametrize("name", mostly_slow(TAUGHT, {"signs"}))
def test_rules_that_the_page_teaches(name):
    page = run_page("docs/writing_rules.md")
    lrules.testing.check_rule(page[name], *(page[argument] for argument in TAUGHT[name]))


@TAUGHT_ON
def test_all_rules_that_the_page_teaches_are_here():
    rules = {name for name, value in run_page("docs/writing_rules.md").items() if isinstance(value, lrules.Rule)}
    assert rules == TAUGHT.keys() | {"local"}  # which needs classes as its targets


@pytest.mark.parametrize("page", ["README.md", "docs/start/diff.md"])
def test_the_diff(page):
    """The script before and after the change trains, and at most six lines are new."""
    (diff,) = re.findall(r"^```diff\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    lines = diff.splitlines()
    assert sum(line.startswith("+") for line in lines) <= 6
    for kept in ("-", "+"):
        script = "\n".join(line[1:] for line in lines if not line or line[0] in (" ", kept))
        x = jax.random.normal(jax.random.key(0), (32, 4))
        names = {"MLP": _MLP, "x": x, "y": jnp.argmax(x[:, :3], -1)}
        exec(compile(script, page, "exec"), names)
        values = [float(names["train"](names["model"], names["optimizer"], x, names["y"])) for _ in range(60)]
        assert values[-1] < 0.95 * values[0]


class _MLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.head = nnx.Linear(4, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.hidden(x)))
