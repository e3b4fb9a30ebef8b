"""Measure the claims of the papers' theorems, and plot them.

    python -m experiments.theory                           # everything: under two minutes on two cores
    python -m experiments.theory --only=chains,relaxations --seeds=20 --nofigures

The claims are about random backpropagation in linear networks (`rbp_dynamics.py`), the best responses of BackMAN
(`backman.py`) and the relaxations of dual propagation (`dual_propagation.py`). Where the print of a paper is wrong, the
program measures the corrected statement. It writes metrics.json, claims.csv and one PNG for each figure. The exit
status is 1 if a claim does not hold.
"""

import sys

from absl import flags
from tqdm import tqdm

from experiments import cli, files, results
from experiments.errors import InputError, nearest
from experiments.theory.check import Check
from experiments.theory.claims import CLAIMS
from experiments.theory.figures import FIGURES

FLAGS = flags.FLAGS


def measure(names: list[str], seeds: range) -> dict[str, list[Check]]:
    """The checks of the named `CLAIMS`, with a progress bar."""
    found = {}
    for name in (bar := tqdm(names, desc="claims", unit="theorem")):
        bar.set_postfix_str(name)
        found[name] = CLAIMS[name](seeds)
    return found


def table(checks: list[Check]) -> str:
    """A Markdown table with one row for each check."""
    rows = [(c.source, c.claim, f"{c.measured:.2g}", c.wanted, "yes" if c.holds else "NO") for c in checks]
    return results.table(("theorem", "measured", "is", "wanted", "holds"), rows)


def main() -> None:
    names = [name.strip() for name in FLAGS.only] or list(CLAIMS)
    for name in names:
        if name not in CLAIMS:
            raise InputError(f"There is no claim '{name}': {nearest(name, CLAIMS)}")
    folder = cli.output_folder()
    found = measure(names, range(FLAGS.seed, FLAGS.seed + FLAGS.seeds))
    checks = [check for group in found.values() for check in group]
    rows = {name: [c._asdict() | {"holds": c.holds} for c in group] for name, group in found.items()}
    files.write_json(folder / "metrics.json", cli.provenance_and_settings(FLAGS.seed) | {"claims": rows})
    files.write_csv(folder / "claims.csv", (*Check._fields, "holds"), [(*c, c.holds) for c in checks])
    print(table(checks))
    if FLAGS.figures:
        for name, draw in (bar := tqdm(FIGURES.items(), desc="figures", unit="figure")):
            bar.set_postfix_str(name)
            draw().savefig(folder / f"{name}.png")
    failed = sum(not c.holds for c in checks)
    print(f"\n{len(checks) - failed} of {len(checks)} claims hold, {FLAGS.seeds} seeds. Results: {folder}/")
    sys.exit(failed > 0)


if __name__ == "__main__":
    flags.DEFINE_list("only", [], f"The claims to measure, from {', '.join(CLAIMS)} (default: all).")
    flags.DEFINE_integer("seeds", 3, "The number of random problems for each theorem.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "The first seed.", lower_bound=0)
    flags.DEFINE_bool("figures", True, "Draw the figures.")
    flags.DEFINE_string("output", "results/theory", "Folder for the results.")
    cli.run(main)
