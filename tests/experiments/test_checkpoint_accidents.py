"""Checkpoints when the program is killed while it writes, or the disk is full: what was there stays whole."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from subprocess import PIPE

import pytest

from experiments.checkpoints import Checkpoints
from experiments.errors import InputError
from tests.experiments.programs import ROOT, environment
from tests.experiments.saving import DESCRIPTION, found_steps, restored, same, saved_in, state_at


def killed_while_saving(folder, kills, seed=0):
    """Kills the program at random moments; each time what is there must be whole, and no step that was told is lost."""
    rng, told, lines = random.Random(seed), 0, 0
    command, pipes = [sys.executable, "-m", "tests.experiments.saving", folder], {"stdin": PIPE, "stdout": PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes) as process:
        for _ in range(kills):
            print(file=process.stdin, flush=True)
            _, child, _, start = process.stdout.readline().split()  # an error ends here: it has another first line
            assert int(start) >= told
            count = rng.randrange(4)
            told, lines = max([int(start), *(int(process.stdout.readline()) for _ in range(count))]), lines + count
            time.sleep(rng.uniform(0, 0.1))
            os.kill(int(child), signal.SIGKILL)
            told = max([told, *map(int, iter(process.stdout.readline, "killed\n"))])
        process.stdin.close()
    step, state, extra = restored(folder)
    assert step >= told and same(state, state_at(step)) and extra["step"] == step
    assert step >= lines > kills  # it came forward between the kills


def test_killed_while_saving(tmp_path):
    killed_while_saving(tmp_path, kills=10)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_killed_more_often(tmp_path, seed):
    killed_while_saving(tmp_path, kills=20, seed=seed)


FULL = """
import os, resource, sys
import jax.numpy as jnp
from experiments.checkpoints import Checkpoints
from experiments.errors import InputError
from tests.experiments.saving import DESCRIPTION, same, state_at
import numpy as np
with Checkpoints(sys.argv[1], DESCRIPTION) as saved:
    noise = np.random.default_rng(0).random(2**18)
    saved.save(1, {"x": noise})
    saved.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
    for _ in range(2):
        try:
            saved.save(2, {"x": noise + 1})
            saved.wait()
        except InputError as error:
            print(error, os.listdir(sys.argv[1]))
    assert (saved.restore({"x": noise}).state["x"] == noise).all()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    saved.save(2, {"x": noise + 1})
    print(saved.restore({"x": noise}).step)
"""


def test_a_write_that_fails(tmp_path):
    """One sentence, the checkpoints that were there, no rest of the failed one; with space again, it goes on."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    sentence = (
        f"The checkpoint cannot be written to {tmp_path} (File too large), and the last one that is there is of step "
        "1: free space there, or give another --output."
    )
    assert done.stdout.splitlines() == [f"{sentence} ['1']"] * 2 + ["2"], done.stderr
    assert not done.stderr
    assert found_steps(tmp_path) == [1, 2] and len(os.listdir(tmp_path)) == 2


def test_a_full_disk(tmp_path, monkeypatch):
    """The error of the disk, already where the folder of the checkpoint is made."""
    saved_in(tmp_path)
    made, full = os.mkdir, True

    def mkdir(path, *args, **kwargs):
        if full and "orbax" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return made(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with Checkpoints(tmp_path, DESCRIPTION) as saved:
        saved.save(4, state_at(4))
        with pytest.raises(InputError, match=r"\(No space left on device\), and the last .* is of step 3: free space"):
            saved.wait()
        full = False
        saved.save(4, state_at(4))
        assert saved.restore(state_at(0)).step == 4


def test_an_error_of_the_run_comes_first(tmp_path, caplog):
    """What the run raises is not hidden by a checkpoint that fails at the same time; that one is told as a warning."""
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, DESCRIPTION) as saved:
        saved._manager.save = lambda *_, **__: os.stat(tmp_path / "nowhere")
        saved.save(1, state_at(1))
        raise ZeroDivisionError
    assert "The checkpoint cannot be written" in caplog.text and "there is no other one" in caplog.text
    saved.close()  # once more does no harm
