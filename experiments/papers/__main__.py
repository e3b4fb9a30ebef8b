"""All papers: which cells are measured, and their reports.

    python -m experiments.papers                # how much of each table and figure is measured
    python -m experiments.papers --report       # every report anew, and the tables in docs/results.md

To measure the cells of a paper, use its own program, such as `python -m experiments.papers.baldi_2018 --table=1`.
"""

import importlib
import pathlib
import re
from typing import Any

from absl import flags

from experiments import cli, files, results
from experiments.papers import report

FLAGS = flags.FLAGS
HOME = pathlib.Path(__file__).parent
PAPERS = sorted(path.parent.name for path in HOME.glob("*/__main__.py"))
DOCS = HOME.parent.parent / "docs" / "results.md"
# In the docs, a table of a report stands between two comments, the first of which names it.
INCLUDED = re.compile(r"(<!-- report (\w+) ([\w .]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def program(paper: str) -> Any:
    """The program of a paper: its TABLES, HEADING and HOME."""
    return importlib.import_module(f"experiments.papers.{paper}.__main__")


def overview() -> str:
    """A table of all tables: how many of their cells are done, reduced and missing."""
    rows = []
    for paper in PAPERS:
        own = program(paper)
        for key, table in own.TABLES.items():
            found = report.measured(table, report.folder_of(own.HOME, key, table))
            reduced = sum(bool(each.less) for each in found)
            counts = (len(found) - reduced, reduced, len(table.to_measure()) - len(found))
            rows.append((f"{paper}, {key}", *map(str, counts)))
    return results.table(("table or figure", "done", "reduced", "missing"), rows)


def included(text: str) -> str:
    """A text of the docs with each of its tables as the reports have it."""

    def fill(match: re.Match[str]) -> str:
        begin, paper, key, end = match.groups()
        if (paper, key) == ("all", "papers"):
            return f"{begin}{overview()}\n{end}"
        own = program(paper)
        return f"{begin}{report.section(key, own.TABLES[key], own.HOME)}\n{end}"

    return INCLUDED.sub(fill, text)


def main() -> None:
    if FLAGS.report:
        for paper in PAPERS:
            own = program(paper)
            report.write(own.TABLES, files.check_writable(own.HOME), own.HEADING)
        files.write_atomic(DOCS, included(DOCS.read_text()))
    print(overview())


if __name__ == "__main__":
    flags.DEFINE_bool("report", False, "Write the reports of all papers, and their tables in docs/results.md.")
    cli.run(main)
