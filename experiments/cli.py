"""The common parts of the programs: flags, errors without a traceback, provenance, tables and result files."""

import csv
import datetime
import functools
import json
import math
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
import optax
from absl import app, flags, logging

import lrules
from experiments import data, loop, models, plots
from experiments.errors import InputError, nearest

FLAGS = flags.FLAGS
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
    "rmsprop": optax.rmsprop,
}
SCHEDULES = ("constant", "cosine", "halfway")
MONO_NETS = {
    "zeros": lrules.monotone.zeros,
    "uniform": lrules.monotone.uniform(),
    "absolute_normal": lrules.monotone.absolute_normal(),
}


def define_training_flags(*, epochs: int, seeds: int, output: str) -> None:
    """Defines the flags of a program that trains; `flags.adopt_module_key_flags(cli)` then adds them to --help."""
    flags.DEFINE_string("dataset", "digits", "digits (embedded), npz:FILE, or a TFDS name such as mnist or cifar10.")
    flags.DEFINE_string("data_dir", None, "The folder of prepared TFDS sets (default: ~/tensorflow_datasets).")
    flags.DEFINE_float("validation", 0.0, "For tuning: test on this fraction of the training set, not on the test set.")
    flags.DEFINE_string("model", "mlp", f"One of {', '.join(models.MODELS)}.")
    flags.DEFINE_list("widths", ["64", "64", "64"], "The MLP's hidden widths.")
    flags.DEFINE_string("activation", "tanh", f"The MLP's activation: {', '.join(models.ACTIVATIONS)}.")
    flags.DEFINE_string(
        "mono_net", None, f"Turn the model into a mono-net (for mdfa); initial weights: {', '.join(MONO_NETS)}."
    )
    flags.DEFINE_integer("epochs", epochs, "Passes over the training set.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "Examples in a step.", lower_bound=1)
    flags.DEFINE_string("optimizer", "adam", f"One of {', '.join(OPTIMIZERS)} (momentum: SGD with 0.9).")
    flags.DEFINE_string("schedule", "cosine", "Learning rate: constant, cosine (to 0), or halfway (x0.1 at half-time).")
    flags.DEFINE_float("weight_decay", 0.0, "Adds this fraction of each weight to its gradient.", lower_bound=0)
    flags.DEFINE_integer(
        "warmup_epochs",
        0,
        "Epochs before --epochs that train only the feedback, for rules that learn it or keep statistics for it.",
        lower_bound=0,
    )
    flags.DEFINE_float(
        "feedback_learning_rate",
        None,
        "The learning rate of learned feedback weights, constant in the warm-up (default: the learning rate).",
        lower_bound=0,
    )
    flags.DEFINE_float(
        "fgsm", 0.0, "Train on adversarial inputs with this step (FGSM, by backprop; 0: do not).", lower_bound=0
    )
    flags.DEFINE_float(
        "attack", 0.0, "Measure accuracy also on adversarial test inputs with this step (0: do not).", lower_bound=0
    )
    flags.DEFINE_integer("seeds", seeds, "The number of seeds to train at once.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "The first seed.", lower_bound=0)
    flags.DEFINE_bool("check_nan", False, "Stop with an error when the loss becomes NaN or Inf.")
    flags.DEFINE_string("output", output, "Folder for the results.")


def dataset_from_flags() -> data.Dataset:
    """The data set that the flags choose."""
    dataset = data.load(FLAGS.dataset, data_dir=FLAGS.data_dir)
    return data.hold_out(dataset, FLAGS.validation, seed=FLAGS.seed) if FLAGS.validation else dataset


def task_from_flags(
    dataset: data.Dataset, loss: loop.Loss = loop.cross_entropy, *, widths: str = "widths"
) -> loop.Task:
    """The model that the flags choose, for the shape of the data; `widths` is the name of the flag with the widths."""
    options = {"widths": positive_integers(widths, getattr(FLAGS, widths)), "activation": FLAGS.activation}
    task = loop.task(lambda rngs: models.build(FLAGS.model, dataset.shape, dataset.classes, rngs=rngs, **options), loss)
    if FLAGS.mono_net is None:
        return task
    if FLAGS.mono_net not in MONO_NETS:
        raise InputError(f"There is no mono-net start '{FLAGS.mono_net}': {nearest(FLAGS.mono_net, MONO_NETS)}")
    try:
        return loop.mono_net(task, dataset.shape, MONO_NETS[FLAGS.mono_net])
    except ValueError as error:
        raise InputError(f"--mono_net: {str(error).splitlines()[0]}.") from None


def run_options() -> dict[str, Any]:
    """The options of a `loop.Run` that the flags choose, without its model, rule and optimizer."""
    return {
        "seeds": range(FLAGS.seed, FLAGS.seed + FLAGS.seeds),
        "batch_size": FLAGS.batch_size,
        "fgsm": FLAGS.fgsm,
        "attack": FLAGS.attack,
        "check_nan": FLAGS.check_nan,
    }


def optimizer_from_flags(rate: float, dataset: data.Dataset) -> loop.Optimizers:
    """The optimizers, schedule and weight decay that the flags choose; `rate` is that of the forward weights."""
    if FLAGS.optimizer not in OPTIMIZERS:
        raise InputError(f"There is no optimizer '{FLAGS.optimizer}': {nearest(FLAGS.optimizer, OPTIMIZERS)}")
    if FLAGS.schedule not in SCHEDULES:
        raise InputError(f"There is no schedule '{FLAGS.schedule}': {nearest(FLAGS.schedule, SCHEDULES)}")
    steps = FLAGS.epochs * loop.steps_per_epoch(dataset, FLAGS.batch_size)

    def make(rate: float, warmup: int) -> optax.GradientTransformation:
        schedule: Any = {
            "constant": optax.constant_schedule(rate),
            "cosine": optax.cosine_decay_schedule(rate, steps),
            "halfway": optax.piecewise_constant_schedule(rate, {steps // 2: 0.1}),
        }[FLAGS.schedule]
        if warmup:  # the schedule begins together with that of the forward weights
            schedule = optax.join_schedules([optax.constant_schedule(rate), schedule], [warmup])
        return optax.chain(optax.add_decayed_weights(FLAGS.weight_decay), OPTIMIZERS[FLAGS.optimizer](schedule))

    feedback_rate = rate if FLAGS.feedback_learning_rate is None else FLAGS.feedback_learning_rate
    warmup = FLAGS.warmup_epochs * loop.steps_per_epoch(dataset, FLAGS.batch_size)
    return loop.Optimizers(make(rate, 0), make(feedback_rate, warmup))


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


def run(main: Callable[[], None]) -> None:
    """`absl.app.run`; bad input gives one sentence and a non-zero exit status, without a traceback."""

    def guarded(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        if len(argv) > 1:
            sys.exit(f"Error: '{argv[1]}' is not a flag: write flags as --name=value; --help lists them.")
        try:
            main()
        except InputError as error:
            sys.exit(f"Error: {error}")
        except KeyboardInterrupt:
            sys.exit("Interrupted.")

    app.run(guarded)


def provenance_and_settings(seed: int) -> dict[str, Any]:
    """All that is needed to repeat a result: versions, device, seed, command, time, and every flag of the program."""
    settings = {flag.name: flag.value for flag in FLAGS.get_key_flags_for_module(sys.argv[0])}
    return {"provenance": provenance(seed), "settings": settings}


def provenance(seed: int) -> dict[str, Any]:
    """Versions, device, seed, command and time."""
    packages = ("lrules", "jax", "jaxlib", "flax", "optax", "numpy")
    device = jax.devices()[0]
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "seed": seed,
        "device": describe_device(),
        "platform": device.platform,
        "devices": jax.device_count(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def describe_device() -> str:
    """The name of the accelerator, or of the processor with its number of cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    rows = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = line(["-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)])
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def output_folder() -> pathlib.Path:
    """The results folder; it is made if it does not exist."""
    folder = pathlib.Path(FLAGS.output).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be made ({error.strerror}): give another --output.") from None
    return folder


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Write valid JSON: arrays as lists, NaN and Inf as null."""
    path.write_text(json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")


def write_csv(path: pathlib.Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows under a header."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {str(k): _plain(v) for k, v in value.items()}
        case list() | tuple():
            return [_plain(v) for v in value]
        case np.ndarray() | np.generic() | jax.Array():
            return _plain(np.asarray(value).tolist())
        case float() if not np.isfinite(value):
            return None
    return value


def write_results(
    folder: pathlib.Path, results: Mapping[str, Any], histories: Mapping[str, Sequence[loop.Record]], title: str
) -> None:
    """Write metrics.json (with settings and provenance), curves.csv (a row per rule, seed and epoch), curves.png."""
    write_json(folder / "metrics.json", provenance_and_settings(FLAGS.seed) | dict(results))
    attacked = any(record.attacked is not None for records in histories.values() for record in records)
    figures = ("train_loss", "test_loss", "accuracy", "angle", *(["attacked"] if attacked else []))
    rows = [
        (name, FLAGS.seed + i, record.epoch, *(float(getattr(record, figure)[i]) for figure in figures))
        for name, records in histories.items()
        for record in records
        for i in range(FLAGS.seeds)
    ]
    write_csv(folder / "curves.csv", ("rule", "seed", "epoch", *figures), rows)
    plots.learning_curves(histories, title).savefig(folder / "curves.png")
