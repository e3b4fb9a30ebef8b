"""Train the same model with every learning rule, several seeds at once, and compare the rules.

    python -m experiments.compare                             # every rule on digits: under two minutes on two cores
    python -m experiments.compare --rules="backprop,backman(alpha=0.5)" --dataset=mnist --epochs=5
    python -m experiments.compare --validation=0.2 --sweep=learning_rate=0.001,0.003,0.01   # the best rate of each rule

The rules take turns, epoch by epoch. `make bench` compares their step times. The program writes metrics.json (each rule
by its text), curves.csv and curves.png after each epoch, and checkpoints: the same command goes on where it stopped.
"""

import contextlib
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

import lrules
from experiments import build, cli, data, devices, keeper, logs, results, rules, signals, sweep, tasks
from experiments.config import Config
from experiments.errors import InputError
from experiments.loop import Diverged, Run
from experiments.methods import Refused
from experiments.progress import Progress
from experiments.trial import Trial

FLAGS = flags.FLAGS

Trials = dict[str, Trial]
FIRST = "backprop"  # it is always there: the others are seen beside it


def make_trials(
    config: Config,
    dataset: data.Dataset,
    chosen: Mapping[str, lrules.Rule],
    *,
    task: tasks.Task | None = None,
    **options: Any,
) -> tuple[Trials, dict[str, str]]:
    """A trial for each rule, and the message of each rule that refuses the model; `options` are those of `Trial`."""
    dataset = data.on_device(dataset)
    task = tasks.build(config, dataset) if task is None else task
    trials: Trials = {}
    refused: dict[str, str] = {}
    for name in (bar := tqdm(chosen, desc="compiling", unit="rule", disable=None if devices.is_first() else True)):
        bar.set_postfix_str(name)
        try:
            trials[name] = Trial(config, dataset, rule=chosen[name], task=task, **options)
        except Refused as error:
            refused[name] = str(error)
    return trials, refused


def train(
    trials: Trials,
    *,
    watch: Callable[[str, Run], Any] | None = None,
    keepers: Mapping[str, keeper.Keeper] | None = None,
    stop: signals.Stop | None = None,
    after: Callable[[], Any] = lambda: None,
) -> None:
    """Trains all trials to their end, in turns, epoch by epoch; those with learned feedback have their warm-up before.

    It calls `watch(name, run)` before the first epoch and after each, and `after()` when all have finished an epoch.
    """
    stop, keepers, first = stop or signals.Stop(), keepers or {}, devices.is_first()

    def advance_of(name: str) -> Callable[[int], bool]:
        def advance(_: int) -> bool:
            if name in keepers:
                keepers[name].save()
            return stop.requested

        return advance

    for name, trial in trials.items():
        with naming(name, keepers):
            warmed_up = trial.warm_up(advance=advance_of(name))
        if not warmed_up:
            if name in keepers:
                keepers[name].save(now=True)
            return
    if watch:
        for name, trial in trials.items():
            if not trial.epochs:
                watch(name, trial.runs[0])
    total = sum(trial.config.epochs for trial in trials.values())
    with Progress(total, "epoch", begin=sum(trial.epochs for trial in trials.values()), show=first) as bar:
        while any(not trial.finished for trial in trials.values()) and not stop.requested:
            turn = min(trial.epochs for trial in trials.values())
            for name, trial in trials.items():
                if trial.epochs > turn or trial.finished or stop.requested:
                    continue
                with naming(name, keepers):
                    record = trial.epoch(parts=keeper.parts(trial), advance=advance_of(name))
                if name in keepers:
                    keepers[name].save(now=trial.finished or stop.requested)
                if record is None:
                    continue
                if watch:
                    watch(name, trial.runs[0])
                bar.describe(f"epoch {trial.epochs}/{trial.config.epochs}")
                figure = "" if record.accuracy is None else f": {record.accuracy.mean():.1%}"
                bar.advance(1, f"{name}{figure}")
            if all(trial.records for trial in trials.values()):
                after()


@contextlib.contextmanager
def naming(name: str, keepers: Mapping[str, keeper.Keeper]) -> Iterator[None]:
    """Where a loss becomes NaN, it says of which rule, and where that rule's last checkpoint is."""
    try:
        yield
    except Diverged as error:
        raise Diverged(f"{name}: {error}" + (f" {keepers[name].sentence}" if name in keepers else "")) from None


def main() -> int:
    config = cli.config(rule="backprop")
    logs.require(FLAGS.log)
    chosen = {FIRST: lrules.backprop()} | {
        name: rule for name, rule in rules.select(FLAGS.rules).items() if name not in rules.names_of_backprop()
    }
    grid = sweep.parse(cli.sweep(), config)
    devices.initialize_processes(FLAGS.processes)
    placement = devices.placement(FLAGS.devices, FLAGS.mesh, config.batch_size)
    described = keeper.describe(config, grid) | {"rules": list(chosen)}
    keeper.check_free(FLAGS.output, described)
    dataset = build.dataset(config, data_dir=FLAGS.data_dir, download=FLAGS.download)
    trials, refused = make_trials(
        config, dataset, chosen, grid=grid, placement=placement, check_nan=FLAGS.check_nan, parts=keeper.FIRST_PARTS
    )
    if FIRST not in trials:
        raise InputError(f"backprop failed: {refused[FIRST]}")
    title = f"{config.model} on {dataset.name}, {results.counted(config.seeds, 'seed')}"
    with (
        keeper.folder_of(FLAGS.output, described) as folder,
        keeper.listen(FLAGS.minutes) as stop,
        logs.opened(FLAGS.log if devices.is_first() else None, folder) as log,
        contextlib.ExitStack() as opened,
    ):
        keepers = {}
        for i, (name, trial) in enumerate(trials.items()):
            own = folder / "checkpoints" / f"{i:02d}-{re.sub('[^a-zA-Z0-9]+', '_', name)[:60]}"
            kept = keeper.Keeper(trial, own, described | {"rule": name}, **cli.keeping())
            keepers[name] = opened.enter_context(kept)

        def save_results(title: str | None = None) -> None:
            devices.from_first(lambda: write(trials, refused, folder, title, log))

        train(trials, keepers=keepers, stop=stop, after=save_results)
        if all(trial.records for trial in trials.values()):
            save_results(title)
    if devices.is_first():
        for paragraph in report(trials, refused, folder, title, stop, keeper.goes_on(FLAGS.keep)):
            print(paragraph)
    return 0 if all(trial.finished for trial in trials.values()) else stop.exit_code


def report(
    trials: Trials, refused: Mapping[str, str], folder: pathlib.Path, title: str, stop: signals.Stop, goes_on: str
) -> list[str]:
    """What the user is told at the end."""
    if any(not trial.records for trial in trials.values()):
        return [f"{stop.sentence} No epoch of all rules was finished: {goes_on}"]
    told = [table(trials), *(f"\n{name} refused this model: {reason}" for name, reason in refused.items())]
    told += [f"\n{sentence}" for sentence in remarks(trials)]
    epochs = results.counted(min(trial.epochs for trial in trials.values()), "epoch")
    told.append(f"\n{title}, {epochs}. Results: {folder}/metrics.json, curves.csv, curves.png")
    if any(not trial.finished for trial in trials.values()):
        told.append(f"{stop.sentence} All rules have done {epochs}: {goes_on}")
    return told


def write(trials: Trials, refused: Mapping[str, str], folder: pathlib.Path, title: str | None, log: logs.Log) -> None:
    """Writes the results so far; the picture only with a title."""
    first = next(iter(trials.values()))
    found: dict[str, Any] = {name: trial.result() for name, trial in trials.items()}
    content: dict[str, Any] = {"config": first.config.to_dict()}
    if len(first.points) > 1:
        content["sweep"] = first.grid.texts()
    content["rules"] = {
        name: {k: v for k, v in result.items() if k not in ("config", "hash")} for name, result in found.items()
    } | {name: {"refused": reason} for name, reason in refused.items()}
    histories = {name: (trial.records, trial.lanes(trial.chosen())) for name, trial in trials.items()}
    steps = {name: trial.steps_of(trial.chosen()) for name, trial in trials.items()}
    seeds = first.config.all_seeds
    results.write(folder, content, histories, steps, seeds, title)
    log(histories, steps, seeds)


def table(trials: Trials) -> str:
    """The figures of the selected epoch as a Markdown table, mean ± sd over the seeds."""
    found = {name: trial.summary(trial.chosen()) for name, trial in trials.items()}
    found = {name: figures | figures.get("selected", {}) for name, figures in found.items()}
    classes = any("accuracy" in figures for figures in found.values())
    names = ["accuracy", "validation_accuracy", "attacked", *([] if classes else ["test_loss"]), "angle"]
    shown = [name for name in names if any(name in figures for figures in found.values())]
    labels = {name: label for name, (label, _, _) in results.FIGURES.items()} | {"attacked": "under attack (%)"}
    swept = any(len(trial.points) > 1 for trial in trials.values())
    rows = []
    for name, figures in found.items():
        cells = [
            results.text(figures[figure], *results.FIGURES[figure][1:]) if figure in figures else "-"
            for figure in shown
        ]
        trial = trials[name]
        rows.append((name, *cells, *([trial.points[trial.chosen()].text()] if swept else [])))
    return results.table(("rule", *(labels[figure] for figure in shown), *(["chosen"] if swept else [])), rows)


def remarks(trials: Trials) -> list[str]:
    """What the user should know of the results."""
    found = []
    last = {name: trial.summary(trial.chosen()) for name, trial in trials.items()}
    if edges := [name for name, t in trials.items() if t.grid.at_edge(t.points[t.chosen()])]:
        found.append(f"The best value of {', '.join(edges)} is at the edge of the grid: try values beyond it.")
    if lost := [name for name, figures in last.items() if not np.isfinite(figures["train_loss"]["mean"])]:
        found.append(f"The loss of {', '.join(lost)} became NaN or Inf: lower --learning_rate or try --sweep.")
    return found


if __name__ == "__main__":
    flags.DEFINE_string("rules", None, "Rules separated by commas (default: every rule without a required argument).")
    cli.define_sweep_flag()
    cli.define_log_flag(logs.KINDS)
    cli.define_config_flags(omit=("rule",), seeds=5)
    cli.define_execution_flags(output="results/compare")
    flags.adopt_module_key_flags(cli)
    cli.run(main)
