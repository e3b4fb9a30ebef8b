"""All that needs a GPU, in one session of some minutes: correctness, step times, and cells of the papers' tables.

    python -m experiments.gpu --data=FOLDER --minutes=8.5 --output=results/gpu    # FOLDER: mnist.npz and cifar10.npz
    python -m experiments.gpu --tiny --output=/tmp/gpu                            # all parts, tiny: for a CPU
    python -m experiments.gpu --report --output=results/gpu                       # the results as Markdown tables

The parts run in order, each until its own time: what one leaves, the next gets. Each writes its results to PART.json as
soon as they are measured. A failure is written down, and the next result is measured. The program does not measure
again what it finds in the folder, so that an interrupted session can go on.
"""

import time
import traceback
from collections.abc import Callable

import jax
from absl import flags

from experiments import cli
from experiments.gpu import cells, convolutional, correctness, report, seeds, session, steps

FLAGS = flags.FLAGS

Part = Callable[[session.Results, session.Clock, session.Settings], None]


def parts(tiny: bool) -> dict[str, tuple[float, Part]]:
    """For each part the second, of 510, after which it begins nothing new."""
    first, later = steps.groups(tiny)

    def chief_steps(results: session.Results, clock: session.Clock, settings: session.Settings) -> None:
        steps.part(results, clock, settings, first)

    def more_steps(results: session.Results, clock: session.Clock, settings: session.Settings) -> None:
        steps.part(results, clock, settings, later)
        steps.compile_times(results, clock, settings)

    return {
        "correctness": (60.0, correctness.part),
        "steps": (225.0, chief_steps),
        "seeds": (255.0, seeds.part),
        "more_steps": (280.0, more_steps),
        "convolutional": (340.0, convolutional.part),
        "cells": (510.0, cells.part),
    }


def main() -> None:
    folder = cli.output_folder()
    if FLAGS.report:
        print(report.tables(folder))
        return
    settings = session.settings(FLAGS.data, FLAGS.tiny)
    begin, log = time.monotonic(), session.Results(folder, "session")
    log.put(f"start {len(log.entries)}", cli.provenance_and_settings(0) | {"backend": jax.default_backend()})
    for name, (end, run) in parts(FLAGS.tiny).items():
        if FLAGS.parts and name not in FLAGS.parts:
            continue
        clock = session.Clock(begin + end / 510 * 60 * FLAGS.minutes - time.monotonic())
        print(f"== {name}: {clock.left:.0f} s", flush=True)
        start, failed = time.monotonic() - begin, None
        try:
            run(session.Results(folder, name), clock, settings)
        except Exception:
            failed = traceback.format_exc()
            print(failed, flush=True)
        log.put(name, {"from": start, "to": time.monotonic() - begin, "error": failed})
    print(report.tables(folder))


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "The folder with mnist.npz and cifar10.npz (x_train, y_train, x_test, y_test).")
    flags.DEFINE_float("minutes", 8.5, "Begin nothing new after this time.", lower_bound=0)
    flags.DEFINE_bool("tiny", False, "Tiny models and few steps, on digits if there is no --data.")
    flags.DEFINE_bool("report", False, "Print the tables of the results in the output folder; measure nothing.")
    flags.DEFINE_list("parts", None, "Some of correctness, steps, seeds, more_steps, convolutional, cells.")
    flags.DEFINE_string("output", "results/gpu", "Folder for the results.")
    cli.run(main)
