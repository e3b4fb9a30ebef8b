"""The documentation site: its links, its pictures, and what follows from the code is as the code has it.

Only the last test needs Sphinx. `python -m docs.generate` mends pictures and tables.
"""

import ast
import inspect
import pathlib
import re
import xml.etree.ElementTree as ElementTree

import pytest

import lrules
from docs.generate import blocks, facts, pictures
from tests.test_docs import PUBLIC

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MADE_BY_BUILDS = (DOCS / "_build", DOCS / "papers")
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if not any(made in page.parents for made in MADE_BY_BUILDS)]
RULES = sorted(
    name for name in lrules.__all__ if getattr(getattr(lrules, name), "__module__", "").startswith("lrules.rules.")
)


def named(page):
    return str(page.relative_to(ROOT))


def without_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


# --------------------------------------------------------------------------------------------------------------- links


def anchors(page):
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=named)
def test_links(page):
    """Each link to a file leads to one, and to a heading that it has."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file), f"{target}: there is no such heading"


def listed():
    """The pages that a toctree lists."""
    for page in PAGES:
        for tree in re.findall(r"^```{toctree}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for line in tree.splitlines():
                if line and not line.startswith(":"):
                    yield (page.parent / f"{line}.md").resolve()


def test_each_page_has_its_place():
    places = list(listed())
    assert sorted(places) == sorted({*places}), "a page stands twice"
    assert set(places) == set(PAGES) - {DOCS / "index.md"}


# --------------------------------------------------------------------------------------------- what the code says


def test_pictures():
    """The pictures are those of the code, and each one is on a page."""
    made = pictures.files()
    there = {path.name: path.read_text() for path in (DOCS / "pictures").iterdir()}
    assert there == made, "run python -m docs.generate --quick"
    shown = set(re.findall(r"pictures/(\w+\.svg)", "".join(page.read_text() for page in PAGES)))
    assert shown == set(made)


@pytest.mark.parametrize("name", pictures.ALL)
def test_words_of_a_picture(name):
    """All words lie on the card, and each kind of line has a colour on the light card and on the dark one."""
    drawing = pictures.ALL[name]()
    root = ElementTree.fromstring(drawing.svg())
    style = next(node for node in root.iter() if node.tag.endswith("style")).text
    light, _, dark = style.partition("@media (prefers-color-scheme:dark)")
    for node in root.iter():
        for kind in node.get("class", "").split():
            assert all(re.search(rf"\.{kind}[{{,]", colours) for colours in (light, dark)), kind
        if node.tag.endswith("text"):
            x, y, size = (float(node.get(key)) for key in ("x", "y", "font-size"))
            half = 0.28 * size * len(node.text)
            assert half < x < drawing.width - half and size < y < drawing.height, node.text


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=named)
def test_parts_made_of_the_code(page):
    text = page.read_text()
    assert blocks.filled(text, slow=False) == text, "run python -m docs.generate --quick"


@pytest.mark.slow
@pytest.mark.foreign
def test_coverage():
    """The table of networks and rules is what the rules say now."""
    for page in (DOCS / "coverage.md", ROOT / "README.md"):
        text = page.read_text()
        assert blocks.filled(text) == text, "run python -m docs.generate"


def test_what_parts_are_made_of():
    """A part that is wrong is made anew, and the rest of the page stays."""
    wrong = "before\n<!-- made references backman -->\n\nnothing\n\n<!-- end -->\nafter\n"
    right = blocks.filled(wrong)
    assert "Soltani Moakhar" in right and "nothing" not in right
    assert right.startswith("before\n<!-- made") and right.endswith("<!-- end -->\nafter\n")


# ------------------------------------------------------------------------------------------------- nothing is missing


def test_each_public_name_has_an_entry():
    """In the API reference: by its own name, or as a member of its module."""
    text = (DOCS / "api.md").read_text()
    entries = set(re.findall(r"^\.\. auto(?:function|class):: lrules\.(\w+)$", text, re.MULTILINE))
    modules = set(re.findall(r"^\.\. automodule:: lrules\.(\w+)\n   :members:", text, re.MULTILINE))
    missing = [name for name in PUBLIC if name not in entries and name.split(".")[0] not in modules]
    assert not missing and entries | modules == set(lrules.__all__)


def test_each_rule_has_a_page():
    """With its picture, its equation, what it needs, its cost, its example and its references."""
    assert sorted(facts.NAMES) == sorted(pictures.RULES) == RULES
    assert {page.stem for page in (DOCS / "rules").glob("*.md")} == {*RULES, "index"}
    for name in RULES:
        text = (DOCS / "rules" / f"{name}.md").read_text()
        assert f"(../pictures/{name}.svg)" in text
        parts = {"equation", "properties", "cost", "example", "references"} - {"equation" * (name == "partition")}
        assert {part for part, of in re.findall(r"<!-- made (\w+) (\w+) -->", text) if of == name} == parts
        assert "## When it works" in text and "## When it does not" in text


def test_rows_of_the_table_are_calls():
    """Each row names arguments that the rule has, and is timed where docs/speed.md has a row for it."""
    for shown in facts.SHOWN:
        assert shown.call.startswith(f"{shown.name}(") and isinstance(shown.make(), lrules.Rule)
        given = re.findall(r"(\w+)=", shown.call)
        assert set(given) <= set(inspect.signature(getattr(lrules, shown.name)).parameters)
        assert bool(facts.cost(shown)) == bool(shown.timed), shown.call


def test_numbers_of_the_readme():
    """What the pages of rules say of the digits of the README stands in its table."""
    rows = re.findall(r"^\| \w+ +\| +([\d.]+) ± [\d.]+ \| +([\d.]+) ±", (ROOT / "README.md").read_text(), re.MULTILINE)
    accuracies, angles = ({float(row[i]) for row in rows} for i in (0, 1))
    pages = 0
    for page in (DOCS / "rules").glob("*.md"):
        text = re.sub(r"\]\([^)]*\)", "]", without_code(page.read_text()))
        for sentence in re.split(r"(?<=\.)\s+(?=[A-Z])", text):
            if "README" in sentence:
                pages += 1
                assert {f"{a:.1f}" for a in accuracies} >= set(re.findall(r"(\d+\.\d)%", sentence)), sentence
                assert {f"{a:.0f}" for a in angles} >= set(re.findall(r"(\d+) degrees", sentence)), sentence
    assert pages > 4


def words_of_refusals():
    """What the tests of remedies want in the sentences: texts and regular expressions, from the source of the tests."""
    tree = ast.parse((ROOT / "tests" / "test_remedies.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In) and isinstance(node.left, ast.Constant):
            if "refusal" in ast.unparse(node.comparators[0]) or ast.unparse(node.comparators[0]) == "message":
                yield re.escape(re.sub(r"^'a', 'c' ", "", node.left.value))  # two or three: the words are the same
        if isinstance(node, ast.keyword) and node.arg == "match":
            yield ast.literal_eval(node.value)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CONSTRUCTS":
            yield from (ast.literal_eval(value.elts[1]) for value in node.value.values)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("re.search", "re.findall"):
            if isinstance(node.args[0], ast.Constant):
                yield node.args[0].value


def test_each_refusal_is_explained():
    text = (DOCS / "guides" / "refusals.md").read_text()
    text = " ".join(re.sub(r"^> ", "", text, flags=re.MULTILINE).split())
    wanted = sorted(set(words_of_refusals()))
    assert len(wanted) > 50
    assert not [words for words in wanted if words and not re.search(words, text)]


# ------------------------------------------------------------------------------------------------------------ the site


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    """Without a warning. Skipped where Sphinx is not installed (the extra `docs`)."""
    build = pytest.importorskip("sphinx.cmd.build")
    pytest.importorskip("furo")
    given = ["--fail-on-warning", "--keep-going", "--quiet", "--builder", "html"]
    assert build.main([*given, "--doctree-dir", str(tmp_path / "trees"), str(DOCS), str(tmp_path / "html")]) == 0
    page = (tmp_path / "html" / "rules" / "backman.html").read_text()
    assert "backman.svg" in page and "Soltani" in page
    assert "lrules.backman" in (tmp_path / "html" / "api.html").read_text()
