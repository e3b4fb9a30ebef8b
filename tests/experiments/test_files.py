"""Result files that are whole or absent; folders that belong to one run."""

import csv
import errno
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import files
from experiments.errors import InputError
from tests.experiments.programs import ROOT, environment, is_png


def in_another_process(code, *arguments):
    """Starts Python with `files` imported, and waits for the first line that it prints."""
    command = [sys.executable, "-c", f"import sys\nfrom experiments import files\n{code}", *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes)
    return process, process.stdout.readline().strip()


def failing(code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


# ------------------------------------------------------------------------------------------------------------- writing


def test_what_is_written(tmp_path):
    """JSON without NaN, CSV as the csv module has it, a figure; nothing else is left in the folder."""
    files.write_json(
        tmp_path / "a.json",
        {"x": np.float32(np.nan), 3: [np.inf, 1.5], "b": jnp.arange(2), "t": (True, None, "ü"), "n": np.int64(7)},
    )
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"x": None, "3": [None, 1.5], "b": [0, 1], "t": [True, None, "ü"], "n": 7}
    assert "NaN" not in text and text.endswith("}\n")
    files.write_csv(tmp_path / "a.csv", ("rule", "x"), [("a, b", 1.0), ("ü", np.float64(2))])
    with (tmp_path / "a.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["rule", "x"], ["a, b", "1.0"], ["ü", "2.0"]]
    figure = Figure(figsize=(1, 1))
    for name in ("a.png", "a.svg"):
        files.savefig(figure, tmp_path / name)
    assert is_png(tmp_path / "a.png") and b"<svg" in (tmp_path / "a.svg").read_bytes()
    files.write_atomic(tmp_path / "a.txt", b"\x00\xff")
    assert (tmp_path / "a.txt").read_bytes() == b"\x00\xff"
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "a.json", "a.png", "a.svg", "a.txt"]


def test_what_is_no_json_is_refused(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        files.write_json(tmp_path / "a.json", {"x": object()})
    assert not os.listdir(tmp_path)


def test_a_link_stays_a_link(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    files.write_atomic(link, "new")
    assert link.is_symlink() and target.read_text() == "new"


def test_the_rights_of_a_file_are_the_usual_ones(tmp_path):
    mask = os.umask(0o027)
    try:
        files.write_atomic(tmp_path / "a", "")
    finally:
        os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_file_that_cannot_be_written(tmp_path, monkeypatch, where, code):
    """One sentence, the old content, and no temporary file."""
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})
    monkeypatch.setattr(os, where, failing(code))
    with pytest.raises(InputError, match=rf"^The file \S+a.json cannot be written \({os.strerror(code)}\): .*\.$"):
        files.write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 1} and os.listdir(tmp_path) == ["a.json"]


def test_a_file_too_large(tmp_path):
    """The limit is the system's, so that the write itself fails, half-way."""
    code = """
import pathlib, resource
path = pathlib.Path(sys.argv[1])
files.write_atomic(path, "old")
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
try:
    files.write_atomic(path, bytes(2**20))
except files.InputError as error:
    print(error)
"""
    process, line = in_another_process(code, tmp_path / "a")
    process.communicate()
    assert "cannot be written (File too large)" in line
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_readers_see_whole_files(tmp_path):
    """While a file is written again and again, a reader finds either content, never a part."""
    contents, done = [b"a" * 100_000, b"b" * 300_000], threading.Event()
    files.write_atomic(tmp_path / "x", contents[0])

    def write():
        for i in range(60):
            files.write_atomic(tmp_path / "x", contents[i % 2])
        done.set()

    writer, seen = threading.Thread(target=write), set()
    writer.start()
    while not done.is_set():
        seen.add((tmp_path / "x").read_bytes())
    writer.join()
    assert seen <= set(contents)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("x\ny"), KeyError()])
def test_reason(error):
    """The words of the system, also where another library has only kept them in its text."""
    assert files.reason(error) == {OSError: "No space left on device", ValueError: "x"}.get(type(error), "KeyError")
    try:
        raise error from error
    except Exception as itself:
        assert files.system_reason(itself) == (os.strerror(errno.ENOSPC) if isinstance(error, OSError) else None)
    try:
        raise RuntimeError("outer") from error
    except RuntimeError as outer:
        expected = "No space left on device" if isinstance(error, OSError) else "outer"
        assert files.reason(outer) == expected
    assert files.reason(ValueError("write failed [OS error 28: No space left on device] at 3")) == os.strerror(28)


def test_check_writable(tmp_path, monkeypatch):
    assert files.check_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b" and not os.listdir(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(InputError, match=r"^The folder .* cannot be written \(.*\): give another --output\.$"):
            files.check_writable(folder)
    monkeypatch.setattr(pathlib.Path, "write_bytes", failing(errno.ENOSPC))
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        files.check_writable(tmp_path / "a")
    if os.getuid():  # nothing is read-only to the superuser
        monkeypatch.undo()
        (tmp_path / "a").chmod(0o500)
        with pytest.raises(InputError, match=r"cannot be written \(Permission denied\)"):
            files.check_writable(tmp_path / "a")


# ------------------------------------------------------------------------------------------------ one run, one folder

HOLD = "lock = files.Lock(sys.argv[1])\nprint('held', flush=True)\nsys.stdin.read()"


def test_a_second_run_is_refused(tmp_path):
    """The sentence names the first; the lock ends with its process, also by SIGKILL."""
    process, line = in_another_process(HOLD, tmp_path)
    try:
        assert line == "held"
        with pytest.raises(
            files.Locked, match=rf"in use by another run \(process {process.pid} on \S+, since \d{{4}}-.*\): wait"
        ):
            files.Lock(tmp_path)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    with files.Lock(tmp_path) as lock:
        assert lock.held and lock.folder == tmp_path
        with pytest.raises(files.Locked, match=f"process {os.getpid()} on"):
            files.Lock(tmp_path)
    files.Lock(tmp_path).release()


def test_a_lock_without_a_name(tmp_path):
    """Another run that has the lock and has not yet written who it is."""
    with open(tmp_path / files.LOCK, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(files.Locked, match="which has just begun"):
            files.Lock(tmp_path)


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    """The run goes on, and a warning says what is missing; other faults are refused."""
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOTSUP))
    with files.Lock(tmp_path) as lock:
        assert not lock.held
    assert "has no locks (Operation not supported): see to it that no other run writes there" in caplog.text
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with pytest.raises(InputError, match=r"cannot be locked \(Input/output error\)"):
        files.Lock(tmp_path)


def claimed(path, description):
    claim = files.claim(path, description)
    claim.lock.release()
    return claim


def test_claim(tmp_path):
    """The same description gets the same folder; another one gets the next, and is told why."""
    first, second = {"rule": "backprop", "data": {"batch": 64}}, {"rule": "backman", "data": {"batch": 64}}
    path = tmp_path / "train"
    assert claimed(path, first)[::2] == (path, None)
    (path / files.RESULTS).write_text("{}")
    assert claimed(path, first)[::2] == (path, None)
    folder, _, notice = claimed(path, second)
    assert folder == tmp_path / "train-2" and notice == (
        f"{path} holds another run (rule: 'backprop' there, 'backman' here), so this run writes to {folder}."
    )
    assert claimed(path, second).folder == folder and claimed(path, second | {"seed": 1}).folder.name == "train-3"
    assert json.loads((path / files.DESCRIPTION).read_text()) == first


def test_claim_removes_what_a_killed_run_has_left(tmp_path):
    rest = tmp_path / ".metrics.json.1-2.tmp"
    for description, stays in ({"rule": "a"}, False), ({"rule": "b"}, True), ({"rule": "a"}, False):
        rest.write_text("")
        claimed(tmp_path, description)
        assert rest.exists() == stays


def test_claim_beside_a_run(tmp_path):
    """The same run twice at once is refused; another run goes to the next folder."""
    claim = files.claim(tmp_path / "x", {"rule": "a"})
    with pytest.raises(files.Locked):
        files.claim(tmp_path / "x", {"rule": "a"})
    assert claimed(tmp_path / "x", {"rule": "b"}).folder.name == "x-2"
    claim.lock.release()


def test_check_free(tmp_path):
    """It refuses the run that is under way, and nothing else; it leaves nothing behind."""
    files.check_free(tmp_path / "a" / "x", {"rule": "a"})
    assert not os.listdir(tmp_path)
    claim = files.claim(tmp_path / "x", {"rule": "a"})
    with pytest.raises(files.Locked, match=f"process {os.getpid()} on"):
        files.check_free(tmp_path / "x", {"rule": "a"})
    files.check_free(tmp_path / "x", {"rule": "b"})
    claim.lock.release()
    files.check_free(tmp_path / "x", {"rule": "a"})
    claimed(tmp_path / "x", {"rule": "a"})  # the check has not kept the folder
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        files.check_free(tmp_path / "file" / "x", {})
    assert sorted(os.listdir(tmp_path)) == ["file", "x"]


def test_claim_of_older_results(tmp_path):
    """Results whose description is missing or damaged are not written over; files of other names do no harm."""
    for name, files_there, found in [
        ("old", {files.RESULTS: "{}"}, "results without a description"),
        ("damaged", {files.DESCRIPTION: "{"}, "a description.json that cannot be read"),
        ("other", {"notes.txt": ""}, None),
    ]:
        (tmp_path / name).mkdir()
        for file, text in files_there.items():
            (tmp_path / name / file).write_text(text)
        folder, _, notice = claimed(tmp_path / name, {"rule": "a"})
        assert folder.name == (name if found is None else f"{name}-2") and (found or "") in (notice or "")


def test_claim_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert claimed(".", {"rule": "a"}).folder == pathlib.Path(".")
    assert claimed(".", {"rule": "b"}).folder == tmp_path / "run-2"


def test_differences():
    assert not files.differences({"a": (1, np.float32(2)), "b": {}}, {"a": [1, 2.0], "b": {}})
    assert not files.differences({"x": float("nan")}, {"x": float("nan")})
    assert files.differences({}, {"a": {"b": 1}}) == "a.b: absent there, 1 here"
    assert files.differences({"a": {"b": "x"}, "c": None}, {"a": 1}) == (
        "a.b: 'x' there, absent here; c: None there, absent here; a: absent there, 1 here"
    )
    many = {str(i): i for i in range(9)}
    assert files.differences(many, {}).endswith("4: 4 there, absent here; and 4 more")
    assert len(files.differences({"a": "x" * 1000}, {"a": 0})) < 150
