"""The checks of a release find what is wrong; what is declared stays light."""

import re
import tomllib

import pytest

from tests import release

CHANGELOG = "# Changelog\n\n## [Unreleased]\n{entry}\n## [1.2.0] - 2026-03-04\n\n- New.\n\n## [1.1.0] - 2026-01-02\n"
CITATION = "cff-version: 1.2.0\nversion: {version}\ndate-released: {date}\n"


def checkout(folder, *, version="1.2.0", cited="1.2.0", date="2026-03-04", entry=""):
    (folder / "lrules").mkdir()
    (folder / "lrules" / "__init__.py").write_text(f'__version__ = "{version}"\n')
    (folder / "CHANGELOG.md").write_text(CHANGELOG.format(entry=entry))
    (folder / "CITATION.cff").write_text(CITATION.format(version=cited, date=date))
    return folder


def test_headings_of_a_changelog():
    headings, texts = release.releases(CHANGELOG.format(entry=""))
    assert headings == [("Unreleased", None), ("1.2.0", "2026-03-04"), ("1.1.0", "2026-01-02")]
    assert texts == ["", "- New.", ""]


def test_our_versions_agree():
    release.check_versions(release=False)


def test_versions_that_agree(tmp_path):
    release.check_versions(checkout(tmp_path), release=True)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"version": "1.3.0"}, "the newest release in CHANGELOG.md is 1.2.0"),
        ({"cited": "1.1.0"}, "CITATION.cff has version 1.1.0"),
        ({"date": "2026-03-05"}, "CHANGELOG.md has 1.2.0 of 2026-03-04"),
        ({"entry": "\n- Newer.\n"}, r"under a heading '## \[1.2.0\] - YYYY-MM-DD'"),
    ],
)
def test_versions_that_differ(tmp_path, wrong, message):
    with pytest.raises(release.Wrong, match=message):
        release.check_versions(checkout(tmp_path, **wrong), release=True)


def test_entries_between_two_releases(tmp_path):
    release.check_versions(checkout(tmp_path, entry="\n- Newer.\n"), release=False)


def test_what_is_not_committed(tmp_path):
    release.git("init", "--quiet", root=tmp_path)
    release.check_committed(tmp_path)
    (tmp_path / "new.py").write_text("")
    with pytest.raises(release.Wrong, match="^new.py is not committed: commit it, or remove it"):
        release.check_committed(tmp_path)


TRACKED = ["lrules/__init__.py", "lrules/py.typed", "tests/test_a.py", "README.md", ".ci/run"]
WHEEL = [*TRACKED[:2], *(f"lrules-1.2.0.dist-info/{name}" for name in release.DIST_INFO)]
SDIST = [f"lrules-1.2.0/{name}" for name in [*TRACKED[:4], "PKG-INFO"]]


def test_contents_that_are_right():
    release.check_contents(WHEEL, SDIST, TRACKED)


@pytest.mark.parametrize(
    "wheel, sdist, message",
    [
        ([*WHEEL, "tests/test_a.py"], SDIST, "^tests/test_a.py is in the wheel and should not be"),
        ([*WHEEL, "lrules/notes.txt"], SDIST, "^lrules/notes.txt is in the wheel"),
        ([name for name in WHEEL if "typed" not in name], SDIST, "^lrules/py.typed is not in the wheel"),
        (WHEEL, [name for name in SDIST if "tests" not in name], "^tests/test_a.py is not in the sdist"),
        (WHEEL, [*SDIST, "lrules-1.2.0/results/metrics.json"], "^results/metrics.json is in the sdist"),
    ],
)
def test_contents_that_are_wrong(wheel, sdist, message):
    with pytest.raises(release.Wrong, match=message):
        release.check_contents(wheel, sdist, TRACKED)


def test_types_without_their_mark():
    """A file that nobody has committed is missed by comparing with what is committed."""
    lost = [name for name in TRACKED if "typed" not in name]
    with pytest.raises(release.Wrong, match="no lrules/py.typed"):
        release.check_contents([n for n in WHEEL if "typed" not in n], [n for n in SDIST if "typed" not in n], lost)


def test_the_library_needs_little():
    """Whoever installs the library gets JAX and what works with it; all else is in an extra."""
    project = tomllib.loads((release.ROOT / "pyproject.toml").read_text())["project"]
    assert {re.match(r"[\w.-]+", need)[0] for need in project["dependencies"]} == {"jax", "flax", "optax"}
