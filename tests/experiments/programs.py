"""Runs the programs as a user does, each in a process of its own.

A process that starts Python and JAX anew takes longer than most of these programs then run. `fork` has one process
that has imported what the programs need, and copies it for each run; `run` starts from nothing, once a program.
"""

import atexit
import functools
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]


class Done(NamedTuple):
    """How a program ended."""

    returncode: int
    stdout: str
    stderr: str


def environment():
    """That of the tests, on the one device of the host."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\S+", "", os.environ.get("XLA_FLAGS", ""))
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def run(program, *flags):
    """`python -m experiments.PROGRAM FLAGS`."""
    command = [sys.executable, "-m", f"experiments.{program}", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    return Done(done.returncode, done.stdout, done.stderr)


def fork(program, *flags, signals=()):
    """The same, in a copy of a process that has imported JAX already.

    Of the `signals`, (path, changes, seconds, number), each is sent so many seconds after so many changes of the file,
    or of the names in the folder.
    """
    process = server()
    wanted = [(str(path), changes, seconds, int(number)) for path, changes, seconds, number in signals]
    print(json.dumps([[program, *flags], wanted]), file=process.stdin, flush=True)
    return Done(*json.loads(process.stdout.readline()))


@functools.cache
def server():
    command = [sys.executable, "-m", "tests.experiments.programs"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes)
    atexit.register(process.communicate)  # it ends where its input ends
    return process


def results(folder):
    """The metrics.json that a program wrote."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((folder / "metrics.json").read_text(), parse_constant=refuse)


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def serve():
    """Reads the runs that are asked for, line by line, and answers how each ended."""
    import experiments.benchmark
    import experiments.compare  # noqa: F401  what all programs need; no device is touched before a copy does so

    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            command, signals = json.loads(line)
            child = os.fork()
            if not child:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                os._exit(outcome(*command))
            code = os.waitstatus_to_exitcode(waited(child, signals))
            texts = [file.read() for file in (out, err) if file.seek(0) == 0]
        print(json.dumps([code, *texts]), flush=True)


def waited(child, signals):
    """The status of a process at its end, after the signals that are sent to it."""
    for path, changes, seconds, number in signals:
        seen, begin = stamp(path), None
        while begin is None or time.monotonic() < begin + seconds:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status
            if stamp(path) != seen:
                seen, changes = stamp(path), changes - 1
            if changes <= 0 and begin is None:
                begin = time.monotonic()
            time.sleep(0.0005)
        os.kill(child, number)
    return os.waitpid(child, 0)[1]


def stamp(path):
    """What changes where a file is written, or where there is another file in a folder."""
    try:
        return sorted(os.listdir(path)) if os.path.isdir(path) else os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return None


def outcome(program, *flags):
    """Runs a program as `python -m` does, and gives its exit code."""
    sys.argv[1:] = flags
    sys.orig_argv[:] = [sys.executable, "-m", f"experiments.{program}", *flags]  # which results keep as the command
    code = 0
    try:
        runpy.run_module(f"experiments.{program}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve()
