"""Changes single operators of a library file, and shows the changes that its tests do not notice.

    make mutate MODULE=lrules/rules/backman.py            # a sample of 30 changes
    make mutate MODULE=lrules/engine/batch.py SAMPLE=100

It works on a copy of the checkout, because the tool (cosmic-ray) changes files in place. The sample has one change at
each place of the file before it has two at any. A change that survives is a hole in the tests, or makes no difference:
docs/mutations.md lists the second kind.
"""

import argparse
import itertools
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
from typing import Any

from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import WorkerOutcome, WorkResult

from tests.test_layout import TESTED_ELSEWHERE

ROOT = pathlib.Path(__file__).parents[1]
SKIPPED = [
    "core/ReplaceBinaryOperator_BitOr_.*",  # mostly `X | None` in annotations
    "core/ExceptionReplacer",
    "core/RemoveDecorator",  # of a dataclass, of jax.custom_vjp: an error in any case
]
CONFIG = """[cosmic-ray]
module-path = "{module}"
timeout = {timeout}
excluded-modules = []
test-command = "{python} -m pytest -x -q -m 'not slow' {tests}"

[cosmic-ray.distributor]
name = "local"

[cosmic-ray.filters.operators-filter]
exclude-operators = {skipped}
"""


def tests_of(module: pathlib.Path) -> str:
    """The file of tests that belongs to a library file, as tests/test_layout.py says."""
    inner = module.relative_to("lrules")
    own = inner.parent / f"test_{inner.stem}.py"
    return f"tests/{TESTED_ELSEWHERE.get(str(inner.with_suffix('')), (own, ''))[0]}"


def sample_of(pending: list[Any], count: int, seed: int) -> list[Any]:
    """So many changes in random order: at each place one, then at each place a second, and so on."""
    places: dict[Any, list[Any]] = {}
    for item in sorted(pending, key=lambda item: str(item.mutations)):  # their ids are random
        places.setdefault(item.mutations[0].start_pos, []).append(item)
    drawn, groups = random.Random(seed), list(places.values())
    for group in (groups, *groups):
        drawn.shuffle(group)
    return [item for turn in itertools.zip_longest(*groups) for item in turn if item is not None][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", type=pathlib.Path, help="a file of the library")
    parser.add_argument("--sample", type=int, default=30, help="how many changes to try")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one run of the tests")
    parser.add_argument("--tests", help="files of tests, if not those that belong to the file")
    args = parser.parse_args()
    if args.module.parts[:1] != ("lrules",) or not (ROOT / args.module).is_file():
        parser.error(f"the module must be a file of the library, such as lrules/rules/backman.py, got {args.module}")
    tests = args.tests or tests_of(args.module)
    tools = pathlib.Path(sys.executable).parent
    # What the copy compiles is kept for the next run, apart from what the tests of the checkout keep.
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax" / "mutate")}
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "results", "__pycache__"))

        def run(command: str, *more: str) -> None:
            subprocess.run([tools / command, *more], cwd=copy, check=True, env=environment)

        (copy / "config.toml").write_text(
            CONFIG.format(module=args.module, timeout=args.timeout, python=sys.executable, tests=tests, skipped=SKIPPED)
        )
        run("cosmic-ray", "init", "config.toml", "session.sqlite")
        run("cr-filter-operators", "session.sqlite", "config.toml")
        with use_db(str(copy / "session.sqlite")) as work:
            pending = list(work.pending_work_items)
            chosen = sample_of(pending, args.sample, args.seed)
            for item in pending:
                if item not in chosen:
                    result = WorkResult(output="not sampled", worker_outcome=WorkerOutcome.SKIPPED)
                    work.set_result(item.job_id, result)
        print(f"{len(chosen)} of {len(pending)} changes of {args.module}, by {tests}")
        run("cosmic-ray", "baseline", "config.toml")
        run("cosmic-ray", "exec", "config.toml", "session.sqlite")
        run("cr-report", "session.sqlite", "--show-diff", "--surviving-only")


if __name__ == "__main__":
    main()
