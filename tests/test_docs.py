"""What the documentation shows runs: the examples in docstrings, and the Python of the README from top to bottom."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import pytest

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
