"""The notebooks run from top to bottom."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    if path.stem == "quickstart":
        accuracy = {line[:27].strip(): float(line.split()[-4]) for line in printed.splitlines() if "±" in line}
        assert accuracy["backprop"] > 95 and accuracy["BackMAN"] > 95
        assert min(accuracy["feedback alignment"], accuracy["direct feedback alignment"]) > 90
        assert min(accuracy, key=lambda name: accuracy[name]) == "last layer only"
