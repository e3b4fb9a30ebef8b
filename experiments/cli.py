"""Flags of the programs, and errors without a traceback. No other file reads a flag, but for a program's `main`."""

import dataclasses
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from experiments import config as configs
from experiments import files, results
from experiments.config import Config
from experiments.errors import InputError

FLAGS = flags.FLAGS
UNUSED_BY_PAPERS = ("layers", "record_every", "attack", "select", "validation")  # their tables do not have these


def define_config_flags(*, omit: Sequence[str] = (), **defaults: Any) -> None:
    """Defines a flag for each field of a `Config`; `flags.adopt_module_key_flags(cli)` then adds them to --help.

    The `defaults` are the program's own; it has no flags for the fields that it omits.
    """
    for field, kind in zip(dataclasses.fields(Config), configs.kinds(), strict=True):
        if field.name in omit:
            continue
        base, _, choices = configs.kind_of(kind)
        default = defaults.get(field.name, field.default)
        text = field.metadata["help"] + (f" One of {', '.join(choices)}." if choices else "")
        define: dict[Any, Callable[..., Any]]
        define = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float}
        if base is tuple:
            flags.DEFINE_list(field.name, [str(value) for value in default], text)
        else:
            define.get(base, flags.DEFINE_string)(field.name, default, text)
    flags.DEFINE_string("config", None, "A JSON file with a config, or the metrics.json of a run; flags come on top.")


def define_sweep_flag() -> None:
    """Defines the flag of grids of settings; `sweep` reads it."""
    flags.DEFINE_multi_string(
        "sweep", None, "A setting and its values, such as learning_rate=0.01,0.1; given again, all combinations."
    )


def define_log_flag(kinds: Sequence[str]) -> None:
    """Defines the flag of a log beside the files of results."""
    flags.DEFINE_enum("log", None, list(kinds), "Write the curves in this form, too, to a folder of the results.")


def define_output_flags(*, output: str) -> None:
    """Defines the flags that say where a program finds data and puts results."""
    flags.DEFINE_string("output", output, "Folder for the results.")
    flags.DEFINE_string(
        "data_dir", None, "The folder of prepared TFDS sets, or of NAME.npz files (default: ~/tensorflow_datasets)."
    )
    define_cache_flag()


def define_execution_flags(*, output: str) -> None:
    """Defines the flags that say where and how a program computes; they change no number of a result."""
    define_output_flags(output=output)
    flags.DEFINE_bool("download", False, "Download and prepare the TFDS set of --dataset before.")
    flags.DEFINE_string("devices", "all", "The number of devices to compute on, or all.")
    flags.DEFINE_string("mesh", None, "How the devices share the work, such as data=4,model=2 (default: data=all).")
    flags.DEFINE_bool("resume", True, "Go on from the last checkpoint in the folder of the results.")
    flags.DEFINE_integer("keep", 2, "The checkpoints to keep, besides the best (0: make none).", lower_bound=0)
    flags.DEFINE_float("checkpoint_seconds", 10.0, "The time between two checkpoints, at least.", lower_bound=0)
    flags.DEFINE_bool("processes", False, "Wait for other processes that the environment does not show: a TPU pod's.")
    flags.DEFINE_float("minutes", None, "Stop after this time; the same command goes on later.", lower_bound=0)
    flags.DEFINE_bool("check_nan", False, "Stop when the loss becomes NaN or Inf, and name the step.")


def define_cache_flag() -> None:
    """Defines the flag of JAX's compilation cache, for programs that train."""
    flags.DEFINE_string(
        "compilation_cache",
        os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "lrules", "jax"),
        "The folder in which compiled programs are kept for the next start; empty: none are kept.",
    )


def config(**fixed: Any) -> Config:
    """The config that the flags describe: the file of --config with the given flags on top, or the flags alone."""
    names = [field.name for field in dataclasses.fields(Config) if field.name in FLAGS and field.name not in fixed]
    if FLAGS.config:
        names = [name for name in names if FLAGS[name].present]
    given = {name: _value(name, FLAGS[name].value) for name in names}
    return (Config.load(FLAGS.config) if FLAGS.config else Config()).replace(**given | fixed)


def sweep() -> list[str]:
    """The texts of --sweep, or those of the result that --config names."""
    given = FLAGS.sweep or []
    return given if given or not FLAGS.config else configs.sweep_of(FLAGS.config)


def _value(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return positive_integers(name, value)
    if isinstance(value, str):
        return value.strip()
    return value


def positive_integers(flag: str, values: Iterable[str]) -> list[int]:
    """The numbers of a list flag."""
    values = [v.strip() for v in values if v.strip()]
    wrong = [v for v in values if not v.isdecimal() or int(v) < 1]
    if wrong:
        raise InputError(f"--{flag} must be positive integers, as in --{flag}=128,128, got '{wrong[0]}'.")
    return [int(v) for v in values]


def numbers(flag: str, values: Iterable[str]) -> list[float]:
    """The positive numbers of a list flag."""
    found = []
    for value in values:
        try:
            found.append(float(value))
        except ValueError:
            found.append(math.nan)
        if not 0 < found[-1] < math.inf:
            raise InputError(f"--{flag} must be positive numbers, as in --{flag}=0.001,0.003, got '{value}'.")
    return found


def run(main: Callable[..., int | None], *, takes_files: bool = False) -> None:
    """`absl.app.run`; bad input gives one sentence and a non-zero exit status, without a traceback.

    `main` may return an exit status. With `takes_files`, it gets what the command line has beside flags.
    """

    def guarded(argv: Sequence[str]) -> int | None:
        logging.set_verbosity(logging.WARNING)
        if len(argv) > 1 and not takes_files:
            sys.exit(f"Error: '{argv[1]}' is not a flag: write flags as --name=value; --help lists them.")
        try:
            use_compilation_cache()
            return main(argv[1:]) if takes_files else main()
        except InputError as error:
            sys.exit(f"Error: {error}")
        except KeyboardInterrupt:
            sys.exit("Interrupted.")

    app.run(guarded)


def use_compilation_cache() -> None:
    """Keeps compiled programs for the next start, where the program has the flag and it is not empty."""
    folder = FLAGS.compilation_cache if "compilation_cache" in FLAGS else ""
    if folder and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def output_folder() -> pathlib.Path:
    """The results folder of --output; it is made if it does not exist."""
    return files.check_writable(FLAGS.output)


def keeping() -> dict[str, Any]:
    """The options of a `keeper.Keeper` that the flags give."""
    return {"keep": FLAGS.keep, "resume": FLAGS.resume, "seconds": FLAGS.checkpoint_seconds}


def provenance_and_settings(seed: int) -> dict[str, Any]:
    """All that is needed to repeat a result: versions, device, seed, command, time, and every flag of the program."""
    settings = {flag.name: flag.value for flag in FLAGS.get_key_flags_for_module(sys.argv[0])}
    return {"provenance": results.provenance() | {"seed": seed}, "settings": settings}
