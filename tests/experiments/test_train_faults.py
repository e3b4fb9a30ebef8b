"""What ends a training early, by force or at will: the same command goes on, to the same numbers to the last bit."""

import csv
import os
import random
import signal

import numpy as np
import pytest

from tests.experiments.programs import fork, results

SMALL = ["--widths=16,16", "--epochs=6", "--batch_size=128", "--probe=64", "--checkpoint_seconds=0"]
RULES = {
    "sequential": ["--rule=feedback_alignment"],
    "direct": ["--rule=direct_feedback_alignment", "--validation=0.2"],
    "learned": ["--rule=node_perturbation(std=0.01)", "--warmup_epochs=2", "--record_every=3", "--average=0.9"],
    "iterated": ["--rule=dual_propagation(iterations=2)", "--augmentation=crop(1)"],
}


def curves(folder):
    with (folder / "curves.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_times(folder):
    """What metrics.json has of the numbers of a run."""
    found = results(folder)
    return {name: value for name, value in found.items() if name not in ("provenance", "step_seconds", "compile_seconds")} | {
        "curves": {name: values for name, values in found["curves"].items() if name != "seconds"}
    }


def killed(tmp_path, kills, flags, seed=0):
    """Kills a run at random moments, the first one while it starts, and compares what it has in the end."""
    flags, rng = [*SMALL, *flags], random.Random(seed)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = fork("train", *flags, f"--output={whole}")
    assert done.returncode == 0, done.stderr
    places = set()
    for _ in range(kills):
        when = cut / "checkpoints", rng.randrange(1, 60), rng.uniform(0, 0.02), signal.SIGKILL
        done = fork("train", *flags, f"--output={cut}", signals=[when])
        assert done.returncode in (-signal.SIGKILL, 0), done.stderr
        places |= {line.split(",")[0] for line in done.stdout.splitlines() if line.startswith("Goes on after")}
    done = fork("train", *flags, f"--output={cut}")
    places |= {line for line in done.stdout.splitlines() if line.startswith("Goes on after")}
    print(sorted(places))
    assert done.returncode == 0, done.stderr
    assert " is damaged" not in done.stderr and places
    assert curves(cut) == curves(whole) and len(curves(cut)) == 6
    assert without_times(cut) == without_times(whole)
    assert not [name for name in os.listdir(cut) if name.endswith(".tmp")]


def test_killed_while_training(tmp_path):
    killed(tmp_path, 3, RULES["learned"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", RULES)
def test_killed_more_often(tmp_path, kind):
    killed(tmp_path, 20, RULES[kind], seed=1)
