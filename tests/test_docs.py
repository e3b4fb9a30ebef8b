"""What the documentation shows runs: the examples in docstrings, and the Python of the README from top to bottom."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lrules

pytestmark = pytest.mark.foreign
ROOT = pathlib.Path(__file__).resolve().parent.parent
MODULES = ["lrules", *(module.name for module in pkgutil.walk_packages(lrules.__path__, "lrules."))]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert not result.failed


@pytest.mark.parametrize("page", ["README.md"])
def test_page(page):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    namespace = {"__name__": page}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)


def test_the_diff_of_the_readme():
    """The script before and after the change trains, and at most six lines are new."""
    (diff,) = re.findall(r"^```diff\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = diff.splitlines()
    assert sum(line.startswith("+") for line in lines) <= 6
    for kept in ("-", "+"):
        script = "\n".join(line[1:] for line in lines if not line or line[0] in (" ", kept))
        x = jax.random.normal(jax.random.key(0), (32, 4))
        names = {"MLP": _MLP, "x": x, "y": jnp.argmax(x[:, :3], -1)}
        exec(compile(script, "README.md", "exec"), names)
        values = [float(names["train"](names["model"], names["optimizer"], x, names["y"])) for _ in range(60)]
        assert values[-1] < 0.95 * values[0]


class _MLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.head = nnx.Linear(4, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.hidden(x)))
