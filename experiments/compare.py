"""Train the same model with every learning rule, several seeds at once, and compare the rules.

    python -m experiments.compare                             # every rule on digits: under two minutes on two cores
    python -m experiments.compare --rules="backprop,backman(alpha=0.5)" --dataset=mnist --epochs=5
    python -m experiments.compare --validation=0.2 --sweep=learning_rate=0.001,0.003,0.01   # the best rate of each rule

The rules take turns, epoch by epoch. `make bench` compares their step times. The program writes metrics.json (each rule
by its text), curves.csv and curves.png after each epoch, and checkpoints: the same command goes on where it stopped.
"""

import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

import lrules
from experiments import build, cli, data, devices, files, results, rules, signals, sweep, tasks
from experiments.config import Config
from experiments.errors import InputError
from experiments.keeper import Keeper, describe
from experiments.loop import Run
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
    for name in (bar := tqdm(chosen, desc="compiling", unit="rule", disable=None)):
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
    keepers: Mapping[str, Keeper] | None = None,
    stop: signals.Stop | None = None,
    after: Callable[[], Any] = lambda: None,
) -> None:
    """Trains all trials to their end, in turns, epoch by epoch; those with learned feedback have their warm-up before.

    It calls `watch(name, run)` before the first epoch and after each, and `after()` when all have finished an epoch.
    """
    stop, keepers = stop or signals.Stop(), keepers or {}
    for trial in trials.values():
        trial.warm_up()
    if watch:
        for name, trial in trials.items():
            if not trial.epochs:
                watch(name, trial.runs[0])
    total = sum(trial.config.epochs for trial in trials.values())
    with Progress(total, "epoch", begin=sum(trial.epochs for trial in trials.values())) as bar:
        while any(not trial.finished for trial in trials.values()) and not stop.requested:
            turn = min(trial.epochs for trial in trials.values())
            for name, trial in trials.items():
                if trial.epochs > turn or trial.finished or stop.requested:
                    continue
                record = trial.epoch(advance=lambda _: stop.requested)
                if name in keepers and (record is not None or stop.requested):
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


def main() -> int:
    config = cli.config(rule="backprop")
    chosen = {FIRST: lrules.backprop()} | {
        name: rule for name, rule in rules.select(FLAGS.rules).items() if name not in rules.names_of_backprop()
    }
    grid = sweep.parse(FLAGS.sweep or [], config)
    devices.initialize_processes()
    placement = devices.placement(FLAGS.devices, FLAGS.mesh, config.batch_size)
    described = describe(config, grid) | {"rules": list(chosen)}
    files.check_writable(FLAGS.output)
    dataset = build.dataset(config, data_dir=FLAGS.data_dir, download=FLAGS.download)
    trials, refused = make_trials(
        config, dataset, chosen, grid=grid, placement=placement, check_nan=FLAGS.check_nan
    )
    if FIRST not in trials:
        raise InputError(f"backprop failed: {refused[FIRST]}")
    title = f"{config.model} on {dataset.name}, {config.seeds} seeds"
    claim = files.claim(FLAGS.output, described)
    if claim.notice:
        print(claim.notice)
    with claim.lock, signals.Stop(seconds=FLAGS.minutes and 60 * FLAGS.minutes) as stop:
        keepers = make_keepers(trials, claim.folder, described)
        train(
            trials,
            keepers=keepers,
            stop=stop,
            after=lambda: write(trials, refused, claim.folder, None),
        )
        for keeper in keepers.values():
            keeper.close()
        if any(not trial.records for trial in trials.values()):
            print(f"{stop.sentence} No epoch of all rules was finished.")
            return stop.exit_code
        write(trials, refused, claim.folder, title)
    print(table(trials))
    for name, reason in refused.items():
        print(f"\n{name} refused this model: {reason}")
    for sentence in remarks(trials):
        print(f"\n{sentence}")
    print(f"\n{title}, {config.epochs} epochs. Results: {claim.folder}/metrics.json, curves.csv, curves.png")
    if stop.requested and any(not trial.finished for trial in trials.values()):
        print(f"{stop.sentence} The same command goes on.")
        return stop.exit_code
    return 0


def make_keepers(trials: Trials, folder: pathlib.Path, described: Mapping[str, Any]) -> dict[str, Keeper]:
    """The checkpoints of each trial, in folders of their own."""
    if not FLAGS.keep:
        return {}
    return {
        name: Keeper(
            trial,
            folder / "checkpoints" / f"{i:02d}-{re.sub('[^a-zA-Z0-9]+', '_', name)[:60]}",
            dict(described) | {"rule": name},
            keep=FLAGS.keep,
            resume=FLAGS.resume,
        )
        for i, (name, trial) in enumerate(trials.items())
    }


def write(trials: Trials, refused: Mapping[str, str], folder: pathlib.Path, title: str | None) -> None:
    """Writes the results so far; the picture only with a title."""
    first = next(iter(trials.values()))
    found: dict[str, Any] = {name: trial.result() for name, trial in trials.items()}
    content = {"config": first.config.to_dict()}
    content["rules"] = {
        name: {k: v for k, v in result.items() if k != "config"} for name, result in found.items()
    } | {name: {"refused": reason} for name, reason in refused.items()}
    histories = {name: (trial.records, trial.lanes(trial.chosen())) for name, trial in trials.items()}
    seeds = range(first.config.seed, first.config.seed + first.config.seeds)
    results.write(folder, content, histories, seeds, title)


def table(trials: Trials) -> str:
    """The figures of the selected epoch as a Markdown table, mean ± sd over the seeds."""
    found = {name: trial.summary(trial.chosen()) for name, trial in trials.items()}
    found = {name: figures | figures.get("selected", {}) for name, figures in found.items()}
    columns = (
        ("test accuracy (%)", "accuracy", 100, 2),
        ("validation accuracy (%)", "validation_accuracy", 100, 2),
        ("under attack (%)", "attacked", 100, 2),
        ("test loss", "test_loss", 1, 4),
        ("angle to backprop (°)", "angle", 1, 1),
    )
    classes = any("accuracy" in figures for figures in found.values())
    shown = [c for c in columns if any(c[1] in f for f in found.values()) and not (classes and c[1] == "test_loss")]
    swept = any(len(trial.points) > 1 for trial in trials.values())
    rows = []
    for name, figures in found.items():
        cells = [
            results.text(figures[figure], unit, digits) if figure in figures else "-"
            for _, figure, unit, digits in shown
        ]
        trial = trials[name]
        rows.append((name, *cells, *([trial.points[trial.chosen()].text()] if swept else [])))
    return results.table(("rule", *(column[0] for column in shown), *(["chosen"] if swept else [])), rows)


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
    flags.DEFINE_multi_string(
        "sweep", None, "A setting and its values, such as learning_rate=0.01,0.1; given again, all combinations."
    )
    cli.define_config_flags(omit=("rule",), seeds=5)
    cli.define_execution_flags(output="results/compare")
    flags.adopt_module_key_flags(cli)
    cli.run(main)
