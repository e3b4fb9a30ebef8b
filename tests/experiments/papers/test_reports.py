"""The committed reports are what the programs make of the committed cells, and so are the tables in the docs."""

import csv
import importlib
import json

import pytest

from experiments.papers import report

papers = importlib.import_module("experiments.papers.__main__")


@pytest.mark.parametrize("paper", papers.PAPERS)
def test_the_report_of_a_paper_is_that_of_its_cells(paper):
    own = papers.program(paper)
    assert (own.HOME / "README.md").read_text() == report.text(own.TABLES, own.HOME, own.HEADING)


@pytest.mark.parametrize("paper", papers.PAPERS)
def test_the_data_of_a_report_are_those_of_its_cells(paper):
    own = papers.program(paper)
    for key, table in own.TABLES.items():
        found = report.measured(table, report.folder_of(own.HOME, key, table))
        path = own.HOME / f"{key.replace(' ', '_')}.csv"
        assert path.exists() == bool(found) == path.with_suffix(".png").exists()
        if found:
            rows = [tuple(map(str, row)) for row in report.data(table, found)]
            assert [tuple(row) for row in csv.reader(path.open())][1:] == rows


@pytest.mark.parametrize("paper", papers.PAPERS)
def test_every_file_belongs_to_a_cell(paper):
    """A file that no cell reads would be a measurement that nobody sees."""
    own = papers.program(paper)
    known = set()
    for key, table in own.TABLES.items():
        folder = report.folder_of(own.HOME, key, table)
        for cell in table.cells:
            if (found := report.load(folder, cell)) is not None:
                assert found.contents
            known |= {path for path in folder.glob(f"{cell.stem}.*.json")}
    assert set(own.HOME.rglob("*.json")) <= known


@pytest.mark.parametrize("paper", papers.PAPERS)
def test_no_file_names_a_folder_of_the_machine(paper):
    for path in papers.program(paper).HOME.rglob("*.json"):
        command = json.loads(path.read_text())["provenance"]["command"]
        assert not any(f"--{name}=" in command for name in ("data_dir", "work", "output")), path.name


def test_the_tables_of_the_docs_are_those_of_the_reports():
    text = papers.DOCS.read_text()
    assert papers.INCLUDED.search(text) and papers.included(text) == text
