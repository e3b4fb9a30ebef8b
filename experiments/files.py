"""Result files that are whole or absent, and folders that belong to one run.

    claim = files.claim("results/train", {"rule": "backman", "data": "mnist"})  # the folder, locked for this run
    files.write_json(claim.folder / "metrics.json", {"accuracy": 0.98})
    claim.lock.release()                                                       # also where the process dies
"""  # fmt: skip

import contextlib
import csv
import datetime
import errno
import fcntl
import io
import itertools
import json
import math
import os
import pathlib
import platform
import reprlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from experiments.errors import InputError

LOCK, DESCRIPTION = ".lock", "description.json"
RESULTS = "metrics.json"  # a folder with this file and no description has results of an older version
# What the system says of a disk or folder that takes no more; other libraries keep only these words.
_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


def reason(error: BaseException) -> str:
    """Why a file could not be written or read, in a few words: those of the system where an exception has them."""
    first_line = (str(error).strip().splitlines() or [""])[0][:200]
    return system_reason(error) or first_line or type(error).__name__


def system_reason(error: BaseException) -> str | None:
    """What the system said of a file or disk; None if the exception does not come from there."""
    chain: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None and seen not in chain:  # an exception can be raised from itself
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__
    return next((os.strerror(code) for code in _SYSTEM if os.strerror(code) in str(error)), None)


# ------------------------------------------------------------------------------------------------------------- writing


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a file so that, at every moment, it has either its old content or all of the new one.

    Raises:
      InputError: the folder cannot be written or the disk is full. The old file stays.
    """
    path = pathlib.Path(os.path.realpath(path))  # where the path is a link, its target is written
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())  # else a crash of the machine can leave the new name with no content
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"The file {path} cannot be written ({reason(error)}): free space or choose another folder; a file of "
            "this name that was there before is unchanged."
        ) from error


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write valid JSON: arrays as lists, NaN and Inf as null."""
    write_atomic(path, json.dumps(plain(content, finite=True), indent=2, allow_nan=False) + "\n")


def write_csv(path: str | os.PathLike[str], header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows under a header."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def savefig(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure; the end of the name says in which format, as for `Figure.savefig`."""
    content = io.BytesIO()
    figure.savefig(content, format=pathlib.Path(path).suffix.removeprefix(".") or "png")
    write_atomic(path, content.getvalue())


def plain(value: Any, *, finite: bool = False) -> Any:
    """The value in the types of JSON: arrays as lists, keys as strings; with `finite`, NaN and Inf as None."""
    match value:
        case Mapping():
            return {str(k): plain(v, finite=finite) for k, v in value.items()}
        case list() | tuple():
            return [plain(v, finite=finite) for v in value]
        case float() if finite and not math.isfinite(value):
            return None
        case str() | bool() | int() | float() | None:
            return value
    return plain(np.asarray(value).tolist(), finite=finite) if hasattr(value, "__array__") else value


def check_writable(folder: str | os.PathLike[str], *, leave: bool = True) -> pathlib.Path:
    """Make a folder, and write a file there to see whether results can be written later.

    With `leave=False`, folders that were made are removed again.

    Returns:
      The folder.

    Raises:
      InputError: it cannot be made or written.
    """
    if not os.fspath(folder).strip():  # it would be the present folder
        raise InputError("--output is empty: give a folder, as in --output=results/mine.")
    folder = pathlib.Path(folder).expanduser()
    probe = folder / f".writable.{os.getpid()}.tmp"
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"x" * 4096)  # an empty file can be made on a full disk
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be written ({reason(error)}): give another --output.") from error
    finally:
        if not leave:
            with contextlib.suppress(OSError):  # another run may have put something there
                for path in made:
                    path.rmdir()
    return folder


# ------------------------------------------------------------------------------------------------ one run, one folder


class Locked(InputError):
    """Another run has the folder."""


class Lock:
    """A lock on a folder that one run holds; it ends with `release`, or with the process, however that ends.

    Attributes:
      folder: the folder.
      held: whether this run is sure to be alone: False on a file system without locks, which a warning says.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        """Take the lock.

        Raises:
          Locked: another run has it; the message has its process, host and time.
          InputError: the folder cannot be written.
        """
        self.folder, self.held = check_writable(folder), True
        try:
            self._file = open(self.folder / LOCK, "a+")
            self._take()
        except OSError as error:
            raise InputError(
                f"The folder {self.folder} cannot be locked ({reason(error)}): give another --output."
            ) from error

    def _take(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._holder()
            self._file.close()
            raise Locked(
                f"The folder {self.folder} is in use by another run ({holder}): wait until it ends, or give another "
                "--output."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self.held = False
            logging.warning(
                "The file system of %s has no locks (%s): see to it that no other run writes there.",
                self.folder,
                reason(error),
            )
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._file.truncate(0)  # the mode "a+" always writes at the end
        self._file.write(json.dumps({"pid": os.getpid(), "host": platform.node(), "since": now}) + "\n")
        self._file.flush()

    def _holder(self) -> str:
        self._file.seek(0)
        try:
            known = json.loads(self._file.read())
            return f"process {known['pid']} on {known['host']}, since {known['since']}"
        except (ValueError, LookupError, TypeError):  # it has the lock and has not written its name yet
            return "which has just begun"

    def release(self) -> None:
        """Free the folder. The lock file stays, empty: to remove it could free another run's lock."""
        if not self._file.closed:
            self._file.truncate(0)
            self._file.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Claim(NamedTuple):
    """A folder for one run."""

    folder: pathlib.Path
    lock: Lock
    notice: str | None  # one sentence for the user where this is not the folder that was asked for


def claim(path: str | os.PathLike[str], description: Mapping[str, Any]) -> Claim:
    """The first of `path`, `path-2`, `path-3`, ... that this run can have; it is locked and has the description.

    A run can have a folder without results, and a folder of a run with the same description: there it goes on, or
    repeats it. It never writes over results of another description. To refuse would be safe too, but the usual case is
    a second command with another rule and the default folder, and a long run should not fail for that.

    Args:
      path: the folder that the user gives.
      description: what makes this run another run than others (rule, model, data, ...), of values that JSON has.

    Raises:
      Locked: a run with the same description has the folder now.
      InputError: the folder cannot be written.
    """
    asked = pathlib.Path(path).expanduser()
    why: str | None = None
    for folder in _candidates(asked):
        try:
            lock = Lock(folder)
        except Locked:
            taken = _why_taken(folder, description)
            if taken is None:  # the same run: a second one in another folder would only repeat it
                raise
        else:
            taken = _why_taken(folder, description)
            if taken is None:
                for rest in folder.glob(".*.tmp"):  # of a run that was killed while it wrote
                    rest.unlink(missing_ok=True)
                write_json(folder / DESCRIPTION, description)
                notice = None if why is None else f"{asked} holds {why}, so this run writes to {folder}."
                return Claim(folder, lock, notice)
            lock.release()
        why = why or taken
    raise AssertionError("there is always a next folder")


def check_free(path: str | os.PathLike[str], description: Mapping[str, Any]) -> None:
    """Refuse what `claim` would refuse, early, before the data are read. It leaves nothing behind.

    Raises:
      Locked, InputError: as `claim` does.
    """
    check_writable(path, leave=False)
    for folder in _candidates(pathlib.Path(path).expanduser()):
        if not (folder / LOCK).exists():
            return
        if _why_taken(folder, description) is None:
            Lock(folder).release()
            return


def _candidates(path: pathlib.Path) -> Iterator[pathlib.Path]:
    yield path
    whole = pathlib.Path(os.path.abspath(path)) if path.name in ("", "..") else path  # "." has no name of its own
    yield from (whole.with_name(f"{whole.name}-{number}") for number in itertools.count(2))


def _why_taken(folder: pathlib.Path, description: Mapping[str, Any]) -> str | None:
    """What the folder holds that this run must not write over; None if there is nothing."""
    try:
        found = differences(json.loads((folder / DESCRIPTION).read_text()), description)
    except FileNotFoundError:
        return "results without a description" if (folder / RESULTS).exists() else None
    except (OSError, ValueError):
        return f"a {DESCRIPTION} that cannot be read"
    return f"another run ({found})" if found else None


def differences(there: Any, here: Any, *, most: int = 5) -> str:
    """How two descriptions differ, as in `rule: 'backprop' there, 'backman' here; ...`; empty if they do not."""
    old, new = dict(_leaves(plain(there, finite=True))), dict(_leaves(plain(here, finite=True)))
    names = [name for name in {**old, **new} if name not in old or name not in new or old[name] != new[name]]

    def side(values: Mapping[str, Any], name: str) -> str:
        return _brief.repr(values[name]) if name in values else "absent"

    told = [f"{name}: {side(old, name)} there, {side(new, name)} here" for name in names[:most]]
    return "; ".join(told) + (f"; and {len(names) - most} more" if len(names) > most else "")


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 80


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested dicts, each with its keys joined by dots; an empty dict is a value."""
    if isinstance(value, dict) and (value or not prefix):
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix or "all", value
