"""Pipelines of stages under backpropagation and under direct feedback alignment: the same numbers, and what they cost.

    python -m experiments.parallel.pipeline                         # two minutes on two cores
    python -m experiments.parallel.pipeline --output=docs/parallel  # the results that the guide shows

It needs no accelerator: the processor counts as eight devices. It measures four things.

- The gradients of the pipeline against those of one device, in float32 and float64.
- The operations of the compiled program of one device against the formulas in `counts.py`, what it sends, and the
  memory that it takes.
- The time of one stage: its forward pass, and what each backward pass adds.
- From these times, by simulation (`timetable.py`), the time of a step and how long stages wait. Eight devices that
  share two cores run one after the other, so their wall time would say nothing.

It writes pipeline.json and pipeline.png.
"""

import concurrent.futures
import multiprocessing
import os
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments import cli, files
from experiments.parallel import counts, report

FLAGS = flags.FLAGS
COUNTED = (
    counts.Size(stages=4, microbatches=4),
    *(counts.Size(microbatches=m) for m in (8, 32, 128)),
    counts.Size(microbatches=16, width=128, layers=3),
)
STAGES, MICROBATCHES = (4, 8, 16), (4, 8, 16, 32, 64)


def same_numbers() -> dict[str, dict[str, float]]:
    """By dtype and rule, how far the pipeline is from one device."""
    found = {"float32": {n: counts.difference(counts.problem(n, counts.Size())) for n in counts.NAMES}}
    with jax.enable_x64(True):
        made = {n: counts.problem(n, counts.Size(), dtype=jnp.float64) for n in counts.NAMES}
        found["float64"] = {n: counts.difference(one) for n, one in made.items()}
    return found


def operations() -> list[dict[str, Any]]:
    """On paper and counted, for each of `COUNTED`."""
    rows = []
    for size in COUNTED:
        paper, sent = counts.on_paper(size), counts.sent_on_paper(size)
        for name in counts.NAMES:
            row = {"size": size._asdict(), "rule": name, "paper": paper[name], "sent_on_paper": sent[name]}
            found = counts.counted(name, size)
            rows.append(row | {"counted": found.products, "sent": found.sent, "temporary": found.temporary})
    return rows


def stage_seconds(size: counts.Size, repeats: int) -> dict[str, list[float]]:
    """The times of a stage, from a process whose processor is one device: eight devices would share its threads."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_alone, size, repeats).result()


def _alone(size: counts.Size, repeats: int) -> dict[str, list[float]]:
    os.environ.pop("XLA_FLAGS", None)
    return counts.stage_seconds(size, repeats)


def main() -> None:
    folder = cli.output_folder()
    size = counts.Size(examples=FLAGS.examples, width=FLAGS.width)
    seconds = stage_seconds(size, FLAGS.repeats)
    content = cli.provenance_and_settings(0) | {
        "differences": same_numbers(),
        "operations": operations(),
        "stage": {"size": size._asdict(), "seconds": seconds},
        "simulated": counts.simulated(seconds, STAGES, MICROBATCHES),
    }
    files.write_json(folder / "pipeline.json", content)
    report.figure(content).savefig(folder / "pipeline.png")
    for name, table in report.TABLES.items():
        print(f"\n{name}\n\n{table(content)}")
    print(f"\nResults: {folder}/pipeline.json, pipeline.png")


if __name__ == "__main__":
    # JAX reads it when it first looks for devices.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
    flags.DEFINE_integer("width", 1024, "The width of the stage that is timed.", lower_bound=1)
    flags.DEFINE_integer("examples", 256, "The examples of the microbatch that is timed.", lower_bound=1)
    flags.DEFINE_integer("repeats", 100, "How often each program of a stage is timed.", lower_bound=2)
    flags.DEFINE_string("output", "results/pipeline", "Folder for the results.")
    cli.run(main)
