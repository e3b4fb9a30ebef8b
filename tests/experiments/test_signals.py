"""Signals and a time limit end a run after a part, and the exit code says which."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from experiments.signals import Stop
from tests.experiments.programs import ROOT, environment

LOOP = """
import signal, sys, time
from experiments.signals import Stop
with Stop() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("trained", flush=True)
    if "wait" in sys.argv:
        time.sleep(60)
print(stop.sentence)
sys.exit(stop.exit_code)
"""


def started(*arguments):
    command = [sys.executable, "-c", LOOP, *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number, code, reason", [("SIGTERM", 143, "SIGTERM"), ("SIGINT", 130, "Ctrl-C")])
def test_a_signal(number, code, reason):
    """The part is finished, what comes after it runs, and the exit code tells."""
    process = started()
    process.send_signal(getattr(signal, number))
    out, err = process.communicate(timeout=30)
    assert process.returncode == code and out == f"trained\nStopped by {reason} before the end.\n"
    assert err.startswith(f"\n{reason}: the run ends after this part") and len(err.splitlines()) == 2


def test_ctrl_c_twice():
    """The second press ends the run at once; a second SIGTERM does not."""
    process = started("wait")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "trained\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode not in (0, 130, 143) and "KeyboardInterrupt" in err and not out
    assert err.count("SIGTERM: the run ends") == 1


def test_the_time_limit():
    stop = Stop(seconds=3600)
    assert not stop.requested and (stop.reason, stop.exit_code, stop.sentence) == (None, 0, "")
    stop = Stop(seconds=0.0)
    assert stop.requested and (stop.reason, stop.exit_code) == ("time", 75) and "time limit" in stop.sentence
    with Stop(seconds=0.0) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and stop.reason == "SIGTERM"  # the limit has passed too, but nobody had asked for it


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(RuntimeError), Stop():
        assert signal.getsignal(signal.SIGINT) not in before
        raise RuntimeError
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_in_another_thread():
    """No signals there, and no error; the time limit holds."""
    found = []

    def run():
        with Stop(seconds=0.0) as stop:
            found.append(stop.requested)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [True]


def test_several_processes_agree():
    """What one was asked holds for all, with its reason; nobody asks again after that."""
    told = []
    stop = Stop(agree=lambda code: told.append(code) or max(code, 143))
    assert stop.requested and (stop.reason, stop.exit_code) == ("SIGTERM", 143)
    assert stop.requested and told == [0]
    alone = Stop(seconds=0.0, agree=lambda code: code)
    assert alone.requested and alone.exit_code == 75
