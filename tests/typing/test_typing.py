"""What type checkers say to a user: nothing to right code, and one error to each mistake.

`user.py` holds right code, every public name in it, and `wrong.py` mistakes; both checkers also report an error that is
expected and does not come. The README's code is checked as it stands.
"""

import inspect
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import lrules
from tests.typing import user

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OWN = [HERE / "user.py", HERE / "wrong.py"]
MODEL = """
class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(x)


x, y = jax.random.normal(jax.random.key(0), (32, 4)), jax.numpy.arange(32) % 3
"""
# What JAX, Flax and optax leave unknown is not ours to mend.
OF_OTHERS = [
    "reportMissingTypeStubs", "reportUnknownArgumentType", "reportUnknownLambdaType", "reportUnknownMemberType",
    "reportUnknownParameterType", "reportUnknownVariableType",
]  # fmt: skip
PROGRAMS = [name for name, f in vars(user).items() if inspect.isfunction(f) and not inspect.signature(f).parameters]


@pytest.fixture
def readme(tmp_path):
    """The README's Python, and the script after its diff."""
    text = (ROOT / "README.md").read_text()
    code, script = tmp_path / "readme.py", tmp_path / "diff.py"
    code.write_text("\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)))
    (diff,) = re.findall(r"^```diff\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line[1:] for line in diff.splitlines() if line[:1] != "-"]
    imports = next(i for i, line in enumerate(lines) if not line)
    script.write_text("\n".join([*lines[:imports], MODEL, *lines[imports:]]))
    return [code, script]


def check(*command):
    """Runs a checker, with this checkout as the library that is installed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=ROOT, env=environment, text=True, stdout=-1)
    assert done.returncode == 0, done.stdout


def test_mypy(readme):
    settings = ["--config-file", HERE / "mypy.ini", "--cache-dir", ROOT / ".mypy_cache" / "typing"]
    check("mypy", *settings, *OWN, *readme)


@pytest.mark.parametrize("mode", ["strict", pytest.param("standard", marks=pytest.mark.slow)])
def test_pyright(mode, readme, tmp_path):
    """Ours strictly, the README by the rules of most users."""
    config = {
        "include": [str(path) for path in (OWN if mode == "strict" else readme)],
        "typeCheckingMode": mode,
        "pythonVersion": "3.11",
        "enableTypeIgnoreComments": False,
        "reportUnnecessaryTypeIgnoreComment": "error",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config | dict.fromkeys(OF_OTHERS, "none")))
    check("basedpyright", "--project", tmp_path, "--pythonpath", sys.executable)


def test_every_public_name_is_in_the_program():
    used = set(re.findall(r"\blrules\.(\w+)", (HERE / "user.py").read_text()))
    assert set(lrules.__all__) <= used | {"diagnostics", "monotone"}  # two that it imports from lrules


@pytest.mark.foreign
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_runs(name):
    """What the checkers accept is also right."""
    getattr(user, name)()
