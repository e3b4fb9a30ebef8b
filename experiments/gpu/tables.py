"""Cells of the papers' tables on a GPU, the most wanted first; several programs at once, as each compiles for long.

A program that ends at the time limit goes on in the next session, if its folder is still there. The results are in
tables/PAPER, with the folders that the paper's own program has: copy them into `experiments/papers/PAPER/results`.
"""

import collections
import os
import pathlib
import subprocess
import sys
import threading
from typing import NamedTuple

from absl import flags

from experiments.gpu import session

FLAGS = flags.FLAGS
WORKERS = 2  # programs at once: one compiles while the other trains; more share the GPU and gain nothing
NEEDS = 20.0  # the least seconds in which a program is worth beginning
GRACE = 25.0  # seconds that a program may take to end after its time


class Entry(NamedTuple):
    """A call of a paper's program."""

    paper: str
    options: str

    def __str__(self) -> str:
        return f"{self.paper} {self.options}"


ENTRIES = (
    Entry("baldi_2018", "--table=1 --cells=CIFAR-10.(Baseline|Top) --epochs=30 --seeds=1"),
    Entry("soltani_moakhar", "--table=1 --cells=ResNet-18.CIFAR-10$ --epochs=8 --seeds=1"),
    Entry("lechner_2020", "--table=1 --cells=^tanh.*CNN"),
    Entry("hoier_2024", "--table=3 --cells=(^BP|one.sweep),.CIFAR-10$ --epochs=15 --seeds=1"),
    Entry("hoier_2024", "--table=1 --cells=MNIST"),
    Entry("baldi_2018", "--table=1 --cells=update"),
    Entry("soltani_moakhar", "--section=4.1 --cells=LeNet.*64$ --epochs=10"),
    Entry("soltani_moakhar", "--table=1 --cells=LeNet --seeds=3"),
)


def command(entry: Entry, folder: pathlib.Path, data_dir: str, seconds: float, tiny: bool) -> list[str]:
    """The command of an entry, which ends itself after the time."""
    options = [*entry.options.split(), *(["--quick"] if tiny else [])]
    places = [f"--output={folder}/tables/{entry.paper}", f"--work={folder}/work", f"--data_dir={data_dir}"]
    limit = f"--minutes={seconds / 60:.3f}"
    return [sys.executable, "-m", f"experiments.papers.{entry.paper}", *options, *places, limit]


def run(results: session.Results, clock: session.Clock, data_dir: str, tiny: bool, entries: tuple[Entry, ...]) -> None:
    """Runs the entries in order, some at once, and writes down how each ended."""
    waiting, lock = collections.deque(entries), threading.Lock()
    folder = results.path.parent
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

    def work() -> None:
        while True:
            with lock:
                if not waiting:
                    return
                entry, left = waiting.popleft(), clock.left
                if left < NEEDS and not tiny:
                    results.put(str(entry), {"skipped": f"{max(0.0, left):.0f} s were left"})
                    continue
            arguments = command(entry, folder, data_dir, max(left - GRACE, 1.0), tiny)
            with lock:
                results.put(str(entry), {"began": clock.left})
            try:
                done = subprocess.run(arguments, capture_output=True, text=True, timeout=left + GRACE, env=environment)
                code, told = done.returncode, done.stdout[-1000:] + done.stderr[-3000:]
            except subprocess.TimeoutExpired:
                code, told = -1, "It did not end in time."
            with lock:
                ended = {"ended": clock.left, "exit_code": code, "output": told}
                results.put(str(entry), results.entries[str(entry)] | ended)
                print(f"{entry}: exit code {code}, {clock.left:.0f} s left", flush=True)

    threads = [threading.Thread(target=work) for _ in range(min(WORKERS, len(entries)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def part(results: session.Results, clock: session.Clock, tiny: bool) -> None:
    """The cells of `ENTRIES`, where --data_dir names a folder with their data."""
    if FLAGS.data_dir is None:
        results.put("data", {"skipped": "--data_dir names no folder with mnist.npz and others"})
        return
    run(results, clock, FLAGS.data_dir, tiny, ENTRIES)
