"""The settings of Sphinx: `make docs` builds the pages of this folder into docs/_build."""

import os
import pathlib
import re
import shutil
import sys
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import lrules  # noqa: E402

project = "lrules"
author = "the authors of lrules"
version = release = lrules.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"lrules {release}"
html_show_copyright = False
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
smartquotes = False  # messages are quoted letter by letter
default_role = "literal"  # docstrings write code as `code`
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
toc_object_entries_show_parents = "hide"

# The reports of the papers lie beside their programs. Sphinx reads only this folder, so they are copied to it.
REPORTS = HERE.parent / "experiments" / "papers"
COPIES = HERE / "papers"


def copy_reports(app: Any) -> None:
    """Copies each report with its pictures."""
    shutil.rmtree(COPIES, ignore_errors=True)
    for report in sorted(REPORTS.glob("*/results/README.md")):
        folder = COPIES / report.parent.parent.name
        folder.mkdir(parents=True)
        for path in [report, *report.parent.glob("*.png"), *report.parent.glob("*.csv")]:
            shutil.copy(path, folder)


def place_reports(app: Any, page: str, source: list[str]) -> None:
    """Links to a report lead to its copy, and one page lists all reports."""
    source[0] = re.sub(r"\((?:\.\./)+experiments/papers/(\w+)/results/(?=[^/]+\))", r"(/papers/\1/", source[0])
    found = [f"papers/{path.parent.name}/README" for path in sorted(COPIES.glob("*/README.md"))]
    if page == "reproduction" and found:
        source[0] += "\n".join(["", "```{toctree}", ":maxdepth: 1", "", *found, "```", ""])


def place_links(app: Any, page: str, source: list[str]) -> None:
    """The page of the notebooks links to Colab, if LRULES_COLAB says at which address that opens their folder."""
    where = os.environ.get("LRULES_COLAB", "").rstrip("/")
    if page == "notebooks" and where:
        names = "|".join(path.stem for path in (HERE.parent / "notebooks").glob("*.ipynb"))
        source[0] = re.sub(rf"`({names})`", rf"[`\1`]({where}/\1.ipynb)", source[0])


def as_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with `code`: what reStructuredText would read otherwise is written in its way."""
    text = "\n".join(lines)
    if what != "module":  # the second paragraph is an equation, if there is one
        text = re.sub(r"\A(.*\n\n)((?:[^:\n]*(?:=|<-|descends|\||~).*\n)(?:(?! *[A-Z][a-z]+:$).+\n?)*)", _literal, text)
    text = re.sub(r"^( *)(\w+Error), (\w+Error): (.*)$", r"\1\2: \4\n\1\3: \4", text, flags=re.MULTILINE)
    text = re.sub(r"(Returns:\n[^\n]*?): ", r"\1 – ", text)  # what stands before a colon would be a type
    text = re.sub(r"`[^`]+`(?=(\w?))", lambda found: found[0] + ("\\ " if found[1] else ""), text)  # `list`s
    text = re.sub(r"(?:^\|.*\|$\n?)+", _list_table, text, flags=re.MULTILINE)
    lines[:] = text.replace("(see docs/terms.md)", "(see :doc:`/terms`)").split("\n")


def _literal(found: re.Match[str]) -> str:
    if found[2].rstrip().endswith("."):
        return found[0]
    return found[1] + "::\n\n" + "".join(f"    {line}\n" for line in found[2].splitlines())


def _list_table(found: re.Match[str]) -> str:
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[0].splitlines()]
    cells = "".join(f"   {'* -' if i == 0 else '  -'} {cell}\n" for row in [head, *rows] for i, cell in enumerate(row))
    return f".. list-table::\n   :header-rows: 1\n\n{cells}\n"


def setup(app: Any) -> None:
    app.connect("builder-inited", copy_reports)
    app.connect("env-get-outdated", lambda *_: ["reproduction"])  # its list of reports is not in its file
    app.connect("source-read", place_reports)
    app.connect("source-read", place_links)
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # before napoleon
