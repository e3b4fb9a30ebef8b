"""Training on many devices and in several processes: the numbers, and the checkpoints, are those of one device."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.experiments.programs import ROOT, environment, fork, results

FLAGS = ["--widths=256,16", "--epochs=3", "--batch_size=128", "--rule=direct_feedback_alignment", "--seeds=2"]
FLAGS += ["--checkpoint_seconds=0", "--probe=64", "--validation=0.5"]
MESH = "--mesh=data=4,model=2"


def on_devices(count, *flags, processes=1, until=None):
    """`experiments.train` in so many processes with so many devices each; the exit codes and the outputs.

    When the file `until` is there, the last process gets a SIGTERM.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    own = environment()
    own["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={count}"
    if processes > 1:  # they would write to one cache
        own |= {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": str(processes)}
        own |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    started = []
    try:
        for i in range(processes):
            variables = own | ({"PROCESS_ID": str(i)} if processes > 1 else {})
            command = [sys.executable, "-m", "experiments.train", *flags]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            started.append(subprocess.Popen(command, cwd=ROOT, env=variables, text=True, **pipes))
        while until is not None and not until.exists() and started[0].poll() is None:
            time.sleep(0.001)
        if until is not None:
            started[-1].send_signal(signal.SIGTERM)
        texts = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [(process.returncode, *text) for process, text in zip(started, texts, strict=True)]


def check_alike(folder, other):
    found, wanted = (results(f)["curves"] for f in (folder, other))
    for name in set(wanted) - {"seconds"}:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-5 if name != "angle" else 1e-3)


@pytest.mark.slow
def test_eight_devices_and_one(tmp_path):
    """A checkpoint made on the ones goes on on the other."""
    one, first, second = (tmp_path / name for name in ("one", "first", "second"))
    assert fork("train", *FLAGS, f"--output={one}").returncode == 0
    flags = [*FLAGS, "--devices=8", MESH, f"--output={first}"]
    ((code, out, err),) = on_devices(8, *flags, until=first / "curves.csv")
    assert code == 143, err
    done = fork("train", *FLAGS, "--devices=1", f"--output={first}")
    assert done.returncode == 0 and "Goes on after " in done.stdout, done
    stop = (second / "curves.csv", 1, 0.0, signal.SIGTERM)
    assert fork("train", *FLAGS, f"--output={second}", signals=[stop]).returncode == 143
    ((code, out, err),) = on_devices(8, *FLAGS, MESH, f"--output={second}")
    assert code == 0 and "Goes on after " in out, err
    check_alike(first, one)
    check_alike(second, one)


@pytest.mark.slow
def test_two_processes(tmp_path):
    """They stop together and go on together; the first one alone writes, prints and shows its progress."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert fork("train", *FLAGS, f"--output={one}").returncode == 0
    for until, codes in (two / "curves.csv", [143, 143]), (None, [0, 0]):
        ended = on_devices(2, *FLAGS, f"--output={two}", processes=2, until=until)
        assert [end[0] for end in ended] == codes, ended
    (_, out, err), (_, others_out, others_err) = ended
    assert "Goes on after " in out and "epoch 3/3" in err and "| test accuracy (%)" in out
    assert "Goes on" not in others_out and "accuracy" not in others_out and "epoch" not in others_err
    assert results(two)["provenance"]["processes"] == 2
    check_alike(two, one)


def test_two_processes_refuse_together(tmp_path):
    """What only the first one sees ends both, with the same sentence."""
    (tmp_path / "file").write_text("")
    for code, _, err in on_devices(1, *FLAGS, f"--output={tmp_path}/file/x", processes=2):
        assert code == 1 and "cannot be written (Not a directory)" in err and "Traceback" not in err
    assert os.listdir(tmp_path) == ["file"]
