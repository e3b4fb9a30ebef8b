"""Checks of a release: one version everywhere, and the files of the wheel and the sdist. The Makefile runs them.

    python -m tests.release contents .wheel   # the wheel and the sdist in this folder have our files, and no others
    python -m tests.release versions          # the release can be made: everything is committed, under one version
"""  # fmt: skip

import pathlib
import re
import subprocess
import sys
import tarfile
import zipfile

import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
MADE = {"PKG-INFO"}  # what the build adds to the sdist
DIST_INFO = {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE"}


class Wrong(Exception):
    """What is wrong, and what to do, in one sentence."""


def version(root=ROOT):
    """`__version__`."""
    (found,) = re.findall(r'^__version__ = "(.*)"$', (root / "lrules" / "__init__.py").read_text(), re.MULTILINE)
    return found


def releases(changelog):
    """The headings of a changelog: [(version, date)], newest first, the date of "Unreleased" None; and their texts."""
    parts = re.split(r"^## \[(.+?)\](?: - (\S+))?$", changelog, flags=re.MULTILINE)[1:]
    return list(zip(parts[::3], parts[1::3], strict=True)), [text.strip() for text in parts[2::3]]


def check_versions(root=ROOT, *, release):
    """`__version__`, the newest release of CHANGELOG.md and CITATION.cff agree; for a release nothing is unreleased."""
    wanted, citation = version(root), yaml.safe_load((root / "CITATION.cff").read_text())
    headings, texts = releases((root / "CHANGELOG.md").read_text())
    if headings and headings[0] == ("Unreleased", None):
        if release and texts[0]:
            raise Wrong(f"CHANGELOG.md has unreleased entries: move them under a heading '## [{wanted}] - YYYY-MM-DD'.")
        headings = headings[1:]
    if not headings or headings[0][0] != wanted:
        newest = headings[0][0] if headings else "none"
        raise Wrong(f"__version__ is {wanted}, the newest release in CHANGELOG.md is {newest}: make them the same.")
    date = headings[0][1]
    if (str(citation["version"]), str(citation["date-released"])) != (wanted, date):
        raise Wrong(
            f"CITATION.cff has version {citation['version']} of {citation['date-released']}, CHANGELOG.md has {wanted} "
            f"of {date}: write these in CITATION.cff."
        )


def git(*arguments, root=ROOT):
    """The lines that git prints."""
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()


def check_committed(root=ROOT):
    """No file differs from the last commit: what is released can be found again."""
    if changed := git("status", "--porcelain", root=root):
        raise Wrong(f"{changed[0][3:]} is not committed: commit it, or remove it.")


def check_contents(wheel, sdist, tracked):
    """The wheel has the library alone, the sdist what its tests need; both only files that are tracked.

    Args:
      wheel, sdist: the names of their files.
      tracked: the names of the files of the repository.
    """
    info = next((name.split("/")[0] for name in wheel if ".dist-info/" in name), "")
    library = {name for name in tracked if name.startswith("lrules/")}
    wanted = library | {f"{info}/{name}" for name in DIST_INFO}
    _same("the wheel", set(wheel), wanted)
    if "lrules/py.typed" not in wheel:
        raise Wrong("The wheel has no lrules/py.typed, so type checkers would ignore its types: add the file.")
    (top,) = {name.split("/")[0] for name in sdist}
    found = {name.removeprefix(f"{top}/") for name in sdist}
    _same("the sdist", found, {name for name in tracked if not name.startswith(".ci/")} | MADE)


def _same(what, found, wanted):
    """Refuses files too many and too few."""
    if more := sorted(found - wanted):
        raise Wrong(f"{more[0]} is in {what} and should not be: leave it out in pyproject.toml, or commit it.")
    if less := sorted(wanted - found):
        raise Wrong(f"{less[0]} is not in {what}: include it in pyproject.toml.")


def check_folder(folder):
    """`check_contents` of the wheel and the sdist in a folder."""
    folder, name = pathlib.Path(folder), f"lrules-{version()}"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl") as file:
        wheel = file.namelist()
    with tarfile.open(folder / f"{name}.tar.gz") as file:
        sdist = [member.name for member in file.getmembers() if member.isfile()]
    check_contents(wheel, sdist, git("ls-files"))
    print(f"{name}: {len(wheel)} files in the wheel, {len(sdist)} in the sdist, and they are the right ones")


def main(task, *arguments):
    try:
        if task == "versions":
            check_committed()
            check_versions(release=True)
            print(f"lrules {version()}: one version everywhere, and all is committed")
        else:
            check_folder(*arguments)
    except Wrong as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
