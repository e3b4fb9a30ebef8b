"""What ends a training early, by force or at will: the same command goes on, to the same numbers to the last bit."""

import csv
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from experiments import checkpoints, files
from tests.experiments.programs import ROOT, environment, fork, results

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

    def strip(found):
        times = ("provenance", "step_seconds", "compile_seconds", "seconds")
        return {k: strip(v) if isinstance(v, dict) else v for k, v in found.items() if k not in times}

    return strip(results(folder))


def killed(tmp_path, kills, flags, seed=0):
    """Kills a run at random moments, and compares what it has in the end; if it ends before, it begins anew."""
    flags, rng = [*SMALL, *flags], random.Random(seed)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = fork("train", *flags, f"--output={whole}")
    assert done.returncode == 0, done.stderr
    places = set()
    while kills or done.returncode != 0:
        signals = [(cut / "checkpoints", rng.randrange(1, 60), rng.uniform(0, 0.02), signal.SIGKILL)] if kills else []
        done = fork("train", *flags, f"--output={cut}", signals=signals)
        assert done.returncode in (-signal.SIGKILL, 0) and " is damaged" not in done.stderr, done.stderr
        places |= {line.split(",")[0] for line in done.stdout.splitlines() if line.startswith("Goes on after")}
        kills -= done.returncode != 0
        if done.returncode == 0:
            assert curves(cut) == curves(whole) and len(curves(cut)) == 6
            assert without_times(cut) == without_times(whole)
            assert not [name for name in os.listdir(cut) if name.endswith(".tmp")]
            shutil.rmtree(cut)
    print(sorted(places))
    assert places


@pytest.mark.slow
def test_killed_while_training(tmp_path):
    killed(tmp_path, 3, RULES["learned"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", RULES)
def test_killed_more_often(tmp_path, kind):
    killed(tmp_path, 20, RULES[kind], seed=1)


# ------------------------------------------------------------------------------------------------------------- stopped


def saved(folder):
    """The steps of the checkpoints."""
    return sorted(int(name) for name in os.listdir(folder / "checkpoints") if name.isdecimal())


def stopped(folder, *flags, number=signal.SIGTERM, after="curves.csv", program="train"):
    """Ends a run by a signal, when it has written a file; it makes no checkpoint before."""
    signals = [(folder / after, 1, 0.0, number)]
    return fork(program, *flags, "--checkpoint_seconds=9999", f"--output={folder}", signals=signals)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "reason", "after"),
    [(signal.SIGTERM, 143, "SIGTERM", "curves.csv"), (signal.SIGINT, 130, "Ctrl-C", "checkpoints")],
)
def test_stopped_by_a_signal(tmp_path, number, code, reason, after):
    """In an epoch, and in the warm-up: it saves, says how far it is, and goes on."""
    flags, whole, cut = [*SMALL, *RULES["learned"]], tmp_path / "whole", tmp_path / "cut"
    assert fork("train", *flags, f"--output={whole}").returncode == 0
    done = stopped(cut, *flags, number=number, after=after)
    assert done.returncode == code and f"Stopped by {reason} before the end." in done.stdout, done
    assert "the same command goes on." in done.stdout and "Traceback" not in done.stderr
    assert len(saved(cut)) == 1
    done = fork("train", *flags, f"--output={cut}")
    assert done.returncode == 0 and "Goes on after" in done.stdout
    assert without_times(cut) == without_times(whole)


@pytest.mark.slow
def test_the_time_limit_and_more_epochs(tmp_path):
    """At the limit it saves, too. With more epochs it is another run, and that is said."""
    flags = [*SMALL, *RULES["sequential"], f"--output={tmp_path}/x"]
    done = fork("train", *flags, "--minutes=0.0001")
    assert done.returncode == 75 and "Stopped at the time limit before the end." in done.stdout
    done = fork("train", *flags, "--epochs=7", "--minutes=0")
    assert done.returncode == 75 and "No epoch was finished" in done.stdout
    assert f"{tmp_path}/x holds another run (config.epochs: 6 there, 7 here)" in done.stdout
    assert "another number of epochs begins anew" in done.stdout and (tmp_path / "x-2").is_dir()
    done = fork("train", *SMALL, "--rule=backman", "--minutes=0", f"--output={tmp_path}/x")
    assert f"this run writes to {tmp_path}/x-3" in done.stdout


@pytest.mark.slow
def test_a_damaged_checkpoint(tmp_path):
    """The newest one is cut off: the one before is taken, and the numbers are those of the whole run."""
    flags, whole, cut = [*SMALL, *RULES["sequential"]], tmp_path / "whole", tmp_path / "cut"
    assert fork("train", *flags, f"--output={whole}").returncode == 0
    assert fork("train", *flags, f"--output={cut}").returncode == 0
    before, newest = saved(cut)
    for path in (cut / "checkpoints" / str(newest)).rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    done = fork("train", *flags, f"--output={cut}")
    assert done.returncode == 0 and f"{newest} is damaged (" in done.stderr and "Goes on after" in done.stdout
    assert without_times(cut) == without_times(whole) and before < newest


@pytest.mark.slow
def test_a_checkpoint_of_a_newer_version(tmp_path):
    flags = [*SMALL, *RULES["sequential"], f"--output={tmp_path}"]
    assert stopped(tmp_path, *flags).returncode == 143
    (about,) = (path for path in (tmp_path / "checkpoints").glob("*/about/metadata"))
    content = json.loads(about.read_text())
    content["version"] = checkpoints.VERSION + 1
    content["checksum"] = checkpoints._checksum_of_text(content["version"], content["content"])
    about.write_text(json.dumps(content))
    done = fork("train", *flags)
    assert done.returncode == 1 and "use the newer program that wrote it" in done.stderr
    assert "Traceback" not in done.stderr and len(saved(tmp_path)) == 1


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    """Training stops with one sentence; the checkpoint that was there stays, and the same command goes on later."""
    flags = [*SMALL, *RULES["sequential"], "--widths=200,200", f"--output={tmp_path}"]
    assert stopped(tmp_path, *flags).returncode == 143
    there = saved(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train", *flags],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16)),
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and "cannot be written" in errors[0] and f"is of step {there[0]}: free" in errors[0]
    assert saved(tmp_path) == there
    done = fork("train", *flags)
    assert done.returncode == 0 and "Goes on after" in done.stdout


def test_two_runs_and_one_folder(tmp_path):
    """The same run is refused before it reads data; another one goes elsewhere."""
    flags = [*SMALL, *RULES["sequential"], "--minutes=0", f"--output={tmp_path}/x"]
    assert fork("train", *flags).returncode == 75
    with files.Lock(tmp_path / "x"):
        done = fork("train", *flags)
        assert done.returncode == 1 and f"in use by another run (process {os.getpid()}" in done.stderr
        assert "Traceback" not in done.stderr and not done.stdout
        done = fork("train", *flags, "--seed=1")
        assert done.returncode == 75 and f"this run writes to {tmp_path}/x-2" in done.stdout


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    done = fork("train", *SMALL, f"--output={tmp_path}/file/x")
    assert done.returncode == 1 and "cannot be written (Not a directory): give another --output." in done.stderr
    assert "epoch" not in done.stderr and os.listdir(tmp_path) == ["file"]


@pytest.mark.slow
def test_a_loss_that_is_nan(tmp_path):
    """With --check_nan it stops, and names the step and the last checkpoint; else it goes on, and JSON stays JSON."""
    flags = [*SMALL, "--activation=relu", "--optimizer=sgd", "--learning_rate=1e30", "--epochs=2"]
    done = fork("train", *flags, "--check_nan", "--checkpoint_seconds=9999", f"--output={tmp_path}/a")
    assert done.returncode == 1 and "became NaN or Inf in epoch 1, step " in done.stderr
    assert "There is no checkpoint of this run." in done.stderr and "Traceback" not in done.stderr
    done = fork("train", *flags, f"--output={tmp_path}/a")
    assert done.returncode == 0 and "use --check_nan" in done.stdout
    assert results(tmp_path / "a")["train_loss"]["mean"] is None


def test_a_loss_that_becomes_nan(tmp_path):
    """The last checkpoint is one with finite weights."""
    flags = ["--widths=8", "--probe=0", "--optimizer=sgd", "--schedule=exponential(factor=30.0)", "--check_nan"]
    done = fork("train", *flags, "--activation=relu", "--checkpoint_seconds=0", f"--output={tmp_path}")
    assert done.returncode == 1 and "The last checkpoint, after " in done.stderr, done.stderr
    assert f"is in {tmp_path}/checkpoints." in done.stderr


@pytest.mark.slow
def test_compare_goes_on(tmp_path):
    """Stopped in the middle of a turn; and killed."""
    flags = [*SMALL, "--rules=feedback_alignment,node_perturbation(std=0.01)", "--warmup_epochs=1", "--seeds=2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert fork("compare", *flags, f"--output={whole}").returncode == 0
    done = stopped(cut, *flags, program="compare")
    assert done.returncode == 143 and "the same command goes on." in done.stdout, done
    where = cut / "checkpoints" / "01-feedback_alignment"
    done = fork("compare", *flags, f"--output={cut}", signals=[(where, 5, 0.0, signal.SIGKILL)])
    assert done.returncode == -signal.SIGKILL, done
    done = fork("compare", *flags, f"--output={cut}")
    assert done.returncode == 0 and done.stdout.count("Goes on after") == 3
    assert without_times(cut) == without_times(whole) and curves(cut) == curves(whole)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--validation=0.05"], "The validation fraction 0.05 leaves a class of set.npz without examples"),
        (["--batch_size=41"], "The batch size must be <= 40, the number of training examples of set.npz, got 41."),
        (["--augmentation=flip"], "The augmentation flip is for images [height, width, channels], and the examples"),
        (["--optimizer=sgd(momentun=0.9)"], "The optimizer sgd has no option 'momentun': did you mean 'momentum'?"),
        (["--schedule=cosine(warmp=3)"], "The schedule cosine has no option 'warmp': did you mean 'warmup'?"),
        (["--mesh=data=3"], "The mesh 'data=3' takes 3 devices, and there is 1: give sizes whose product is 1"),
        (["--dataset=mnist"], "The data set 'mnist' is not prepared in "),
        (["--model=lenet5"], "lenet5 needs images [height, width, channels], got the shape (20,): use mlp."),
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path, flags, sentence):
    x, y = np.random.default_rng(0).normal(size=(40, 20)).astype(np.float32), np.arange(40) >= 37
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y.astype(int), x_test=x[-10:], y_test=y[-10:].astype(int))
    given = [f"--dataset=npz:{tmp_path}/set.npz", "--batch_size=10", f"--data_dir={tmp_path}/sets", *flags]
    done = fork("train", *given, f"--output={tmp_path}/out/x")
    assert done.returncode == 1 and f"Error: {sentence}" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
    assert os.listdir(tmp_path) == ["set.npz"]
