"""All that needs a GPU, in one session of some minutes: correctness, step times, cells of the papers, and epochs.

    python -m experiments.gpu --minutes=8.5 --output=results/gpu --data_dir=FOLDER    # with mnist.npz, cifar10.npz, ...
    python -m experiments.gpu --tiny --output=results/tiny            # all parts, tiny: for a CPU
    python -m experiments.gpu --report --output=results/gpu           # the results as Markdown tables

The parts run in order, each until its own time: what one leaves, the next gets. Each writes its results to PART.json as
soon as they are measured. A failure is written down, and the next result is measured. The program does not measure
again what it finds in the folder, so that an interrupted session can go on.
"""

import pathlib
import tempfile
import time

import jax
from absl import flags

from experiments import cli, epochs, rules
from experiments.gpu import correctness, report, session, steps, tables

FLAGS = flags.FLAGS


def epochs_part(results: session.Results, clock: session.Clock, tiny: bool) -> None:
    """An entry for each model and rule of `experiments.epochs`."""
    names = ["backprop", "feedback_alignment", "direct_feedback_alignment"]
    pairs = {f"{case}, {rule}": (case, rule) for rule in names for case in epochs.CASES}
    if tiny:
        pairs = dict(list(pairs.items())[:1])
    for key in results.todo(dict.fromkeys(pairs, 0.0 if tiny else 20.0), clock):
        name, rule = pairs[key]
        case = epochs.CASES[name]._replace(examples=300) if tiny else epochs.CASES[name]
        with results.guard(key), tempfile.TemporaryDirectory() as folder:
            loops = epochs.loops(case, rules.parse(rule), pathlib.Path(folder))
            seconds = epochs.measure(loops, 3, lambda n: None)
            results.put(key, {"seconds": seconds, "ratios": epochs.ratios(seconds)})


# For each part its share of the time: after this part of the minutes it begins nothing new.
PARTS = {
    "correctness": (0.12, correctness.part),
    "steps": (0.3, steps.part),
    "epochs": (0.35, epochs_part),
    "tables": (1.0, tables.part),
}


def main() -> None:
    folder = cli.output_folder()
    if not FLAGS.report:
        begin, log = time.monotonic(), session.Results(folder, "session")
        log.put(f"start {len(log.entries)}", cli.provenance_and_settings(0) | {"backend": jax.default_backend()})
        for name in FLAGS.parts or PARTS:
            end, run = PARTS[name]
            clock = session.Clock(begin + end * 60 * FLAGS.minutes - time.monotonic())
            start = time.monotonic() - begin
            print(f"== {name}: {clock.left:.0f} s", flush=True)
            log.put(name, {"from": start})
            with log.guard(name):
                run(session.Results(folder, name), clock, FLAGS.tiny)
                log.put(name, {"from": start, "to": time.monotonic() - begin})
    print(report.tables(folder))


if __name__ == "__main__":
    flags.DEFINE_float("minutes", 8.5, "Begin nothing new after this time.", lower_bound=0)
    flags.DEFINE_bool("tiny", False, "Small models, few rules and few steps: for a CPU.")
    flags.DEFINE_bool("report", False, "Print the tables of the results in the output folder; measure nothing.")
    flags.DEFINE_multi_enum("parts", None, list(PARTS), "Some of the parts (default: all); may be given again.")
    flags.DEFINE_string("output", "results/gpu", "Folder for the results.")
    flags.DEFINE_string("data_dir", None, "The folder of NAME.npz files, for the cells of the papers.")
    cli.run(main)
