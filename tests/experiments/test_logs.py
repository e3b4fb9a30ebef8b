"""What TensorBoard is given: each figure of each seed, once, also where a run goes on or changes its setting."""

import builtins
import importlib.util
import struct

import numpy as np
import pytest

from experiments import logs
from experiments.errors import InputError
from experiments.loop import Record

ALL = slice(None)
with_tensorboard = pytest.mark.skipif(not importlib.util.find_spec("tensorboardX"), reason="tensorboardX is an extra")


def record(epoch, *losses):
    return Record(epoch, np.array(losses), np.array(losses) + 1)


def curves(folder):
    """{folder: {tag: [(step, value)]}}, as the event files have it."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.rglob("events.*")):
        tags, content = found.setdefault(str(path.parent.relative_to(folder)), {}), path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event, content = Event.FromString(content[12 : 12 + length]), content[16 + length :]
            for value in event.summary.value:
                tags.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


@with_tensorboard
def test_epochs_and_steps_of_each_seed(tmp_path):
    steps = [{"epoch": 1, "step": 2, "updates": 2, "angle a/b": np.array([10.0, 20.0])}]
    history, rule = [record(1, 4.0, 6.0), record(2, 2.0, 3.0)], "backman(alpha=1.0)"
    with logs.opened("tensorboard", tmp_path) as log:
        for epochs in (1, 2):
            log({rule: (history[:epochs], ALL)}, {rule: steps}, [7, 8])
    found = curves(tmp_path / "tensorboard")
    assert list(found) == [f"{rule}/seed 7", f"{rule}/seed 8"]
    assert found[f"{rule}/seed 7"] == {
        "epoch/train_loss": [(1, 4), (2, 2)], "epoch/test_loss": [(1, 5), (2, 3)], "step/angle_a/b": [(2, 10)],
    }  # fmt: skip
    assert found[f"{rule}/seed 8"]["epoch/train_loss"] == [(1, 6), (2, 3)]


@with_tensorboard
def test_a_run_that_goes_on_is_there_once(tmp_path):
    history = [record(1, 4.0), record(2, 2.0)]
    for epochs in (1, 2):
        with logs.opened("tensorboard", tmp_path) as log:
            log({"bp": (history[:epochs], ALL)}, {}, [0])
    assert curves(tmp_path / "tensorboard")["bp/seed 0"]["epoch/train_loss"] == [(1, 4), (2, 2)]


@with_tensorboard
def test_another_setting_is_the_best_now(tmp_path):
    history = [record(1, 4.0, 5.0), record(2, 2.0, 1.0)]
    with logs.opened("tensorboard", tmp_path) as log:
        log({"a/b": (history[:1], slice(0, 1)), "a_b": (history[:1], slice(0, 1))}, {}, [0])
        log({"a/b": (history, slice(1, 2)), "a_b": (history, slice(0, 1))}, {}, [0])
    found = curves(tmp_path / "tensorboard")
    assert found["00 a_b/seed 0"]["epoch/train_loss"] == [(1, 5), (2, 1)]
    assert found["01 a_b/seed 0"]["epoch/train_loss"] == [(1, 4), (2, 2)]


def test_a_missing_package(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "tensorboardX":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    logs.require(None)
    with pytest.raises(InputError, match="run pip install tensorboardX, or leave the flag out"):
        logs.require("tensorboard")
