"""Put runs of several days into one figure and one table, and compare them with the first, seed by seed.

    python -m experiments.plot results/monday/metrics.json results/tuesday/metrics.json
    python -m experiments.plot results/compare/curves.csv --figure=test_loss --output=results/losses

It takes the files of `experiments.train` and `experiments.compare`. It prints the table, and writes comparison.png (the
mean over the seeds, with a band of one sd) and comparison.csv.
"""

from collections.abc import Sequence

from absl import flags

from experiments import cli, comparison, plots, results
from experiments.errors import InputError
from experiments.files import savefig, write_csv

FLAGS = flags.FLAGS


def main(paths: Sequence[str]) -> None:
    if not paths:
        raise InputError(f"There is no file: {comparison.WRITTEN_BY}.")
    runs = comparison.read(paths)
    figure = comparison.figure_of(runs, FLAGS.figure)
    folder = cli.output_folder()
    table = comparison.table(runs, figure, FLAGS.select)
    rows = []
    for run, other in zip(runs, [("",) * 4, *comparison.differences(runs, figure, FLAGS.select)], strict=True):
        own = results.statistics(comparison.values_of(run, figure, FLAGS.select))
        rows.append((run.name, len(run.seeds), *own.values(), *other))
    header = ("run", "seeds", "mean", "sd", "interval", "difference", "difference_interval", "effect", "paired")
    write_csv(folder / "comparison.csv", header, rows)
    histories = {run.name: (run.records, slice(None)) for run in runs}
    savefig(plots.learning_curves(histories, FLAGS.title), folder / "comparison.png")
    for paragraph in (table, *(f"\n{sentence}" for sentence in comparison.remarks(runs))):
        print(paragraph)
    print(f"\nResults: {folder}/comparison.png, comparison.csv")


if __name__ == "__main__":
    flags.DEFINE_string("figure", None, "What to compare (default: accuracy, or else test_loss).")
    flags.DEFINE_enum("select", "last", ["last", "best_validation"], "The epoch whose figures the table has.")
    flags.DEFINE_string("title", "", "The title of the figure.")
    flags.DEFINE_string("output", "results/plot", "Folder for the figure and the table.")
    flags.adopt_module_key_flags(cli)
    cli.run(main, takes_files=True)
