"""The notebooks run from top to bottom, begin in the same way, and need few packages."""

import ast
import importlib.util
import json
import pathlib
import re
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from docs import conf
from tests.sampling import mostly_slow

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
NEEDED = {"jax", "lrules", "flax", "optax", "numpy", "matplotlib", "sklearn"}  # the first cell installs these
OPTIONAL = {"equinox", "haiku", "tensorflow_datasets"}


def code(name):
    """The code cells of a notebook, without the lines that are IPython's."""
    cells = nbformat.read(NOTEBOOKS[name], as_version=4).cells
    return [re.sub(r"^(\s*)%.*$", r"\1pass", c.source, flags=re.MULTILINE) for c in cells if c.cell_type == "code"]


def execute(name):
    """Runs a notebook, and returns what it prints."""
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    return "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))


def numbers(line):
    return [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e[-+]\d+)?", line)]


def after(printed, start):
    """The numbers in the line that begins so."""
    (line,) = [line for line in printed.splitlines() if line.startswith(start)]
    return numbers(line[len(start) :])


def quickstart(printed):
    last, *others = (after(printed, n)[0] for n in ("last layer only", "backprop", "BackMAN", "feedback alignment"))
    assert min(others) > 90 and last < min(others)


def your_own_model(printed):
    names = ["Flax Linen", "a bare function", "Equinox"]
    names += ["Haiku"] * (importlib.util.find_spec("haiku") is not None)
    assert min(after(printed, name)[0] for name in names) > 90
    assert "refused: ['middle']" in printed


def your_own_rule(printed):
    assert "the mixture passes" in printed and "check the sign" in printed
    shares = [after(printed, "share of the true weights " + share)[0] for share in ("0.0:", "0.3:", "1.0:")]
    assert 85 < shares[0] < shares[1] < shares[2]


def dual_propagation(printed):
    slopes = [after(printed, f"alpha {alpha}: the error grows")[0] for alpha in ("0.0", "0.5", "1.0")]
    assert [round(slope) for slope in slopes] == [1, 2, 1]
    assert after(printed, "original, alpha 0")[-1] > 0.5 and after(printed, "adjoint, alpha 0")[-1] < 1e-3


def node_perturbation(printed):
    fixed, learned = after(printed, "feedback alignment"), after(printed, "node perturbation")
    assert learned[0] > fixed[0] and learned[1] < fixed[1] / 1.5


def direct_feedback_and_memory(printed):
    lines = printed.splitlines()
    losses = {line[:19].strip(): numbers(line)[-1] for line in lines if "loss at the end" in line}
    assert losses["backprop"] < losses["DFA, shared_axes=1"] < losses["last layer only"]
    memory = {line[:19].strip(): numbers(line[19:]) for line in lines if line.endswith("MiB")}
    assert memory["DFA, shared_axes=1"][-1] > memory["backprop"][-1] > memory["last layer only"][-1]


def monotone_nets(printed):
    right, *others = [numbers(line) for line in printed.splitlines() if line.count("%") == 4]
    assert right == [100.0] * 4 and all(40 < share < 60 for shares in others for share in shares[:3])


def random_backpropagation(printed):
    top, srbp = after(printed, "top layer only")[0], after(printed, "SRBP")[0]
    dropped = numbers(next(line for line in printed.splitlines() if line.startswith("errors dropped")))
    assert dropped[1] > srbp - 3 and after(printed, "bits of each error")[1] > top + 3


def backman_continual(printed):
    lost = [numbers(line)[1] for line in printed.splitlines() if "points lost" in line]
    assert all(10 < points < 35 for points in lost) and abs(lost[0] - lost[1]) < 8


def many_devices(printed):
    assert "8 devices" in printed and after(printed, "test accuracy")[0] > 90
    assert all(numbers(line)[0] < 1e-5 for line in printed.splitlines() if "updates differ" in line)


def paper_baldi_2018(printed):
    top, bp, srbp = (after(printed, name)[0] for name in ("Top layer only", "Baseline, BP", "Baseline, SRBP"))
    worse = [after(printed, f"{name}, SRBP")[0] for name in ("No-f'", "Sparse-1", "Quantized error 1-bit")]
    assert bp > srbp > max(worse) and min(worse) > top + 5


def paper_hoier_2024(printed):
    assert after(printed, "backprop")[0] > 90 and after(printed, "DP^T, alpha 1/2")[0] > 90


def paper_lansdell_2019(printed):
    bp, fa, learned = (after(printed, name)[0] for name in ("BP", "FA", "NP, std 0.01"))
    assert bp < learned < fa


def paper_lechner_2020(printed):
    assert min(after(printed, name)[0] for name in ("tanh, BP", "tanh, FA", "tanh, DFA", "tanh, mDFA")) > 90


def paper_soltani_moakhar(printed):
    assert min(after(printed, name)[0] for name in ("backprop", "FA", "DFA", "BackMAN, alpha 0.1  ")) > 85


CLAIMS = {
    check.__name__: check
    for check in (
        quickstart, your_own_model, your_own_rule, dual_propagation, node_perturbation, direct_feedback_and_memory,
        monotone_nets, random_backpropagation, backman_continual, many_devices, paper_baldi_2018, paper_hoier_2024,
        paper_lansdell_2019, paper_lechner_2020, paper_soltani_moakhar,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(NOTEBOOKS, {"many_devices"}))
def test_runs(name):
    """It runs, and what its text says of its results holds."""
    printed = execute(name)
    assert "no results here" not in printed
    CLAIMS[name](printed)


def test_the_claims_of_each_notebook_are_here():
    assert CLAIMS.keys() == NOTEBOOKS.keys()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_is_stored_without_traces_of_a_run(name):
    text = NOTEBOOKS[name].read_text()
    stored = json.loads(text)
    assert text == json.dumps(stored, indent=1, ensure_ascii=False) + "\n"
    for i, cell in enumerate(stored["cells"]):
        assert cell["id"] == f"cell-{i}" and cell["metadata"] == {}
        assert not cell.get("outputs") and cell.get("execution_count") is None, "clear the outputs before committing"
    assert set(stored["metadata"]) == {"kernelspec", "language_info"}
    assert "://" not in text


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_begins_with_the_check_of_versions(name):
    first = code("quickstart")[0]
    assert first in code(name)[0]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_imports_little(name):
    tree = ast.parse("\n".join(code(name)))
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in found} - sys.stdlib_module_names <= NEEDED | OPTIONAL


def test_all_are_listed():
    page = (ROOT / "docs" / "notebooks.md").read_text()
    assert {name for name in re.findall(r"`(\w+)`", page) if name in NOTEBOOKS} == set(NOTEBOOKS)


def test_the_page_links_to_colab_if_told(monkeypatch):
    page = (ROOT / "docs" / "notebooks.md").read_text()
    for where, count in (("", 0), ("https://colab.example/notebooks/", len(NOTEBOOKS))):
        monkeypatch.setenv("LRULES_COLAB", where)
        source = [page]
        conf.place_links(None, "notebooks", source)
        assert source[0].count("(https://colab.example/notebooks/") == count
