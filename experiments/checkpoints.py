"""Checkpoints of a run: written beside the training, whole or absent, and refused where they are of another run.

    with checkpoints.Checkpoints(folder / "checkpoints", description, best="max") as saved:
        found = saved.restore(state)                       # None in a folder without checkpoints
        first = 0 if found is None else found.step
        state = state if found is None else found.state
        for epoch in range(first + 1, epochs + 1):
            state = train(state)
            saved.save(epoch, state, {"epoch": epoch, "curves": curves}, metric=accuracy)

Orbax writes them, into a folder with another name that is renamed when it is complete. What it does not do is done
here: a checkpoint has the description of its run, and a checksum of every array, so that the one before is taken where
it is damaged (Orbax reads other numbers where a bit of the file has changed, and does not notice). The thread in the
background is ours too: Orbax's own leaves threads that wait for minutes where a full disk has no room for a folder.

A checkpoint has the step as its name and two parts. `about/` is JSON: `{"version", "checksum", "content"}`, where
`content` is again a text of JSON, with the fields of `_About`. `state/` has the arrays as a list, in the order of the
leaves there, without those of size zero.
"""

import json
import pathlib
import shutil
import sys
import warnings
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from experiments import files
from experiments.errors import InputError

# Orbax logs every error with its traceback, also those that are then raised, and that are told here in one sentence.
logging.get_absl_logger().addFilter(lambda record: "orbax" not in pathlib.Path(record.pathname).parts)

# Where the write of one array fails, threads of TensorStore would print a traceback for each array behind it.
_hook = sys.unraisablehook


def _without_echoes(told: Any) -> None:
    if str(told.exc_value) != "Event loop is closed":
        _hook(told)


sys.unraisablehook = _without_echoes

VERSION = 1  # of what `content` has; the three names around it stay as they are, so that any version can tell
Pytree = Any


class Restored(NamedTuple):
    """What a checkpoint has."""

    step: int
    state: Pytree
    extra: Any


class _About(NamedTuple):
    """The content of `about/`. Leaves: (path, shape, dtype)."""

    description: dict[str, Any]
    extra: Any
    metric: float | None
    leaves: list[tuple[str, tuple[int, ...], str]]
    checksums: list[int]


class _Damaged(Exception):
    """A checkpoint that cannot be read, or has other content than was written; the text says how that showed."""


class Checkpoints:
    """The checkpoints of one run in one folder. Only one process may have the folder: see `files.Lock`."""

    def __init__(
        self,
        folder: str | pathlib.Path,
        description: Mapping[str, Any],
        *,
        keep: int = 3,
        best: Literal["max", "min"] | None = None,
    ):
        """Open the folder; it is made if it does not exist.

        Args:
          folder: the folder. What an interrupted save has left there is removed.
          description: what makes this run another run than others (rule, model, data, ...), of values that JSON has.
          keep: how many checkpoints stay: the last ones. The oldest goes when a new one is complete, so the disk needs
            room for one more.
          best: with "max" or "min", the one with the best metric stays too.

        Raises:
          InputError: the folder cannot be written; or its checkpoints are of another run or a newer version.
        """
        if keep < 1:
            raise InputError(f"The number of checkpoints to keep must be at least 1, got {keep}.")
        if best not in (None, "max", "min"):
            raise InputError(f"The best checkpoint is that with the 'max' or the 'min' metric, got '{best}'.")
        self.folder = files.check_writable(folder).absolute()
        self._description, self._keep = _as_json(description), keep
        self._sign = {None: 0, "max": 1, "min": -1}[best]
        self._metrics: dict[int, float] = {}
        self._damaged: dict[int, str] = {}
        self._pool = ThreadPoolExecutor(1, "checkpoint")  # at the end of the program, Python waits for it
        self._writing: Future[None] | None = None
        self._manager = self._open()
        for step in self._manager.all_steps():
            try:
                about = self._about(step)
            except _Damaged:
                continue
            self._metrics[step] = np.nan if about.metric is None else about.metric

    def _open(self) -> ocp.CheckpointManager:
        for rest in self.folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):  # Orbax would do it at some time later
            shutil.rmtree(rest, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self,
            lightweight_initialize=True,  # it reads nothing of a checkpoint, which may be damaged
            save_root_metadata=False,
            enable_async_checkpointing=False,
            create=False,
            # Of several processes only this one is here; Orbax would wait for the others.
            multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={jax.process_index()}),
        )
        return ocp.CheckpointManager(self.folder, options=options, item_names=("state", "about"))

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which checkpoints stay, for Orbax: the last and the best."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        stay = set(steps[-self._keep :])
        measured = [step for step in steps if not np.isnan(self._metrics.get(step, np.nan))]
        if self._sign and measured:
            stay.add(max(measured, key=lambda step: (self._sign * self._metrics[step], step)))
        return [step in stay for step in steps]

    def latest(self) -> int | None:
        """The step of the newest checkpoint, whole or not; None if there is none."""
        self.wait()
        return self._manager.latest_step()

    # ----------------------------------------------------------------------------------------------------------- saving

    def save(self, step: int, state: Pytree, extra: Any = None, *, metric: float | None = None) -> None:
        """Begin to write a checkpoint; what `state` has may change, or be donated, as soon as this returns.

        The write before it is waited for.

        Args:
          step: a number above those of the checkpoints that are there.
          state: a pytree of arrays (also typed keys), NumPy scalars and numbers.
          extra: values that JSON has, such as the epoch and the curves; NaN stays NaN, tuples become lists.
          metric: what `best` compares.

        Raises:
          TypeError: a leaf of the state is something else, or `extra` is not JSON.
          InputError: this checkpoint or the one before it cannot be written; those that were there stay.
        """
        self.wait()
        self._set_damaged_aside()
        latest = self.latest()
        if latest is not None and step <= latest:
            raise InputError(
                f"The folder {self.folder} has a checkpoint of step {latest}, and this run would save step {step}: "
                "restore it first, or give another --output."
            )
        paths, leaves = _flat(state)
        for path, leaf in zip(paths, leaves, strict=True):
            if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
                raise TypeError(f"the leaf '{path}' of the state is a {type(leaf).__name__}, not an array or a number")
        # An array of NumPy can change; an array of JAX cannot, and while its values are in use here it is not donated.
        values = [_stored(leaf).copy() if isinstance(leaf, np.ndarray) else _stored(leaf) for leaf in leaves]
        content = {
            "description": self._description,
            "extra": _as_json(extra),
            "metric": None if metric is None else float(metric),
            "leaves": [(path, np.shape(leaf), _dtype(leaf)) for path, leaf in zip(paths, leaves, strict=True)],
        }
        self._writing = self._pool.submit(self._write, step, content, values)

    def _write(self, step: int, content: dict[str, Any], values: list[np.ndarray]) -> None:
        text = json.dumps(content | {"checksums": [_checksum(value) for value in values]})
        about = {"version": VERSION, "checksum": _checksum_of_text(VERSION, text), "content": text}
        written = [value for value in values if value.size] or [np.zeros(1)]  # Orbax writes no empty arrays
        self._metrics[step] = np.nan if content["metric"] is None else content["metric"]
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(written), about=ocp.args.JsonSave(about))
        self._manager.save(step, args=args, force=True)  # Orbax would leave some out, by rules of its own

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
          InputError: it cannot be written; those that were there stay.
        """
        if self._writing is None:
            return
        try:
            self._writing.result()
        except Exception as error:
            self._writing = None
            self._start_anew()
            if why := files.system_reason(error):
                raise InputError(self._cannot_write(why)) from error
            raise  # not the disk, but a mistake of a program
        self._writing = None

    def _start_anew(self) -> None:
        """After a failed write: what it left is removed, and the next one can succeed."""
        try:
            self._manager.close()
            self._manager = self._open()
        except OSError as error:
            logging.warning("The folder %s cannot be read (%s).", self.folder, files.reason(error))

    def _cannot_write(self, why: str) -> str:
        latest = self._manager.latest_step()
        there = "there is no other one" if latest is None else f"the last one that is there is of step {latest}"
        return (
            f"The checkpoint cannot be written to {self.folder} ({why}), and {there}: free space there, or give "
            "another --output."
        )

    def _set_damaged_aside(self) -> None:
        """Damaged checkpoints make room for new ones of the same step, under another name."""
        for step in self._damaged:
            path = self.folder / str(step)
            aside = self.folder / f"damaged-{step}"
            if path.exists():
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        if self._damaged:
            self._damaged.clear()
            self._manager.reload()

    def close(self) -> None:
        """Wait as `wait` does, and end the threads."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
            return
        try:
            self.close()
        except InputError as error:  # the exception that is under way matters more
            logging.warning("%s", error)

    # -------------------------------------------------------------------------------------------------------- restoring

    def restore(self, template: Pytree, sharding: Any = None) -> Restored | None:
        """The newest checkpoint that is whole; None if the folder has none. A warning names those that are damaged.

        Args:
          template: a pytree with the structure, shapes and dtypes of the state: arrays, or `ShapeDtypeStruct`s.
          sharding: a sharding, or a pytree of them that is a prefix of the template; None: those of the template,
            and the default device for what has none. It need not be that under which the state was saved.

        Raises:
          InputError: the checkpoint is of another run or a newer version, its state has another structure, or all
            checkpoints are damaged.
        """
        self.wait()
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                about = self._about(step)
                paths, leaves = _flat(template)
                self._check_structure(step, about, paths, leaves)
                values = self._read(step, about)
            except _Damaged as damage:
                self._damaged[step] = str(damage)
                logging.warning(
                    "The checkpoint %s is damaged (%s): an older one is taken.", self.folder / str(step), damage
                )
                continue
            shardings = _per_leaf(sharding, template)
            state = [_placed(*each) for each in zip(values, leaves, shardings, strict=True)]
            return Restored(step, jax.tree.unflatten(jax.tree.structure(template), state), about.extra)
        if self._damaged:
            raise InputError(
                f"All checkpoints in {self.folder} are damaged (step {max(self._damaged)}: "
                f"{self._damaged[max(self._damaged)]}): remove the folder to begin anew, or give another --output."
            )
        return None

    def _about(self, step: int) -> _About:
        """What a checkpoint says of itself.

        Raises:
          _Damaged: it cannot be read.
          InputError: it is of another run, or of a newer version.
        """
        try:
            about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
            version, checksum, text = about["version"], about["checksum"], about["content"]
            if checksum != _checksum_of_text(version, text):
                raise _Damaged("its description has another checksum")
            content = json.loads(text)
            if version <= VERSION:
                leaves = [(path, tuple(shape), dtype) for path, shape, dtype in content["leaves"]]
                found = _About(**content | {"leaves": leaves})
        except (_Damaged, MemoryError):
            raise
        except Exception as error:
            raise _Damaged(f"its description cannot be read: {files.reason(error)}") from error
        if version > VERSION:
            raise InputError(
                f"The checkpoint {self.folder / str(step)} has format {version}, and this program reads formats up to "
                f"{VERSION}: use the newer program that wrote it, or give another --output."
            )
        if differs := files.differences(found.description, self._description):
            raise InputError(
                f"The checkpoints in {self.folder} are of another run ({differs}): use the same settings, or give "
                "another --output."
            )
        return found

    def _check_structure(self, step: int, about: _About, paths: list[str], leaves: list[Any]) -> None:
        there = {path: f"{dtype}[{','.join(map(str, shape))}]" for path, shape, dtype in about.leaves}
        here = {
            path: f"{_dtype(leaf)}[{','.join(map(str, np.shape(leaf)))}]"
            for path, leaf in zip(paths, leaves, strict=True)
        }
        if differs := files.differences(there, here):
            raise InputError(
                f"The state in the checkpoint {self.folder / str(step)} is not that of this program ({differs}): use "
                "the program and the versions that wrote it, or give another --output."
            )

    def _read(self, step: int, about: _About) -> list[np.ndarray]:
        """The arrays of a checkpoint on the host, in their stored form."""
        empty = [0 in shape for _, shape, _ in about.leaves]
        restore_args = [ocp.RestoreArgs(restore_type=np.ndarray) for e in empty if not e] or [ocp.RestoreArgs()]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.PyTreeRestore([0] * len(restore_args), restore_args=restore_args)
                    ),
                ).state
        except MemoryError:
            raise
        except Exception as error:
            raise _Damaged(f"its arrays cannot be read: {files.reason(error)}") from error
        full = iter(read)
        values = [
            np.zeros(shape, _data_type(dtype)) if e else next(full)
            for (_, shape, dtype), e in zip(about.leaves, empty, strict=True)
        ]
        for (path, *_), checksum, value in zip(about.leaves, about.checksums, values, strict=True):
            if _checksum(value) != checksum:
                raise _Damaged(f"'{path}' has another checksum")
        return values


# --------------------------------------------------------------------------------------------------------- the leaves


def _flat(tree: Pytree) -> tuple[list[str], list[Any]]:
    """The leaves and their paths; two leaves whose paths read alike differ by their place."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    seen: set[str] = set()
    for i, path in enumerate(paths):
        paths[i] = f"{path}#{i}" if path in seen else path
        seen.add(path)
    return paths, [leaf for _, leaf in flat]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", np.bool_), jax.dtypes.prng_key)


def _dtype(leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", None)
    return str(np.asarray(leaf).dtype if dtype is None else dtype)


def _stored(leaf: Any) -> np.ndarray:
    """The leaf as an array of NumPy; a typed key as its data."""
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _data_type(dtype: str) -> Any:
    return np.uint32 if dtype.startswith("key<") else jnp.dtype(dtype)


def _checksum(value: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(value).view(np.uint8).reshape(-1).data) if value.size else 0


def _checksum_of_text(version: int, text: str) -> int:
    return zlib.crc32(f"{version} {text}".encode())


def _placed(value: np.ndarray, like: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """A stored value as the template has it: of its kind, and on its devices."""
    if not hasattr(like, "dtype"):  # a number of Python
        return type(like)(value.item())
    if isinstance(like, np.ndarray):
        return value
    if isinstance(like, np.generic):
        return value[()]
    placed: Any = jnp.asarray(value)
    if getattr(like, "weak_type", False):  # a weak type decides the dtype of what it is added to, so it must come back
        placed = jnp.full(value.shape, np.zeros((), value.dtype).item()).at[...].set(placed)
    if _is_key(like):
        placed = jax.random.wrap_key_data(placed, impl=jax.random.key_impl(jnp.empty((), like.dtype)))
    if sharding is None and getattr(like, "committed", True):
        sharding = getattr(like, "sharding", None)
    return placed if sharding is None else jax.device_put(placed, sharding)


def _per_leaf(prefix: Any, tree: Pytree) -> list[Any]:
    """The sharding of each leaf of `tree`, None where there is none."""
    found: list[Any] = []
    jax.tree.map(
        lambda sharding, part: found.extend([sharding] * len(jax.tree.leaves(part))),
        prefix,
        tree,
        is_leaf=lambda sharding: sharding is None,
    )
    return found


def _as_json(value: Any) -> Any:
    """The value as JSON gives it back, so that what is compared later is compared in the same form."""
    return json.loads(json.dumps(files.plain(value)))
