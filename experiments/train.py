"""Train one model with one learning rule, for one or several seeds at once, and evaluate it after each epoch.

    python -m experiments.train                                            # digits, backprop: about 15 seconds
    python -m experiments.train --rule="backman(alpha=1.0)" --model=lenet5 --dataset=mnist --epochs=10
    python -m experiments.train --rule="drop_error(feedback_alignment, rate=0.5)" --seeds=5
    python -m experiments.train --rule='partition({"layers/0/.*": backman, ".*": backprop})'
    python -m experiments.train --rule="node_perturbation(std=0.01)" --warmup_epochs=1 --feedback_learning_rate=0.01
    python -m experiments.train --fgsm=0.01 --attack=0.05                  # adversarial training, accuracy under attack
    python -m experiments.train --seeds=5 --validation=0.2 --sweep="learning_rate=0.001,0.003,0.01" --sweep="weight_decay=0,1e-4"
    python -m experiments.train --config=results/train/metrics.json        # the same run again, in full

The program writes metrics.json (figures, curves, config, versions, device and command), curves.csv and curves.png after
each epoch, and a checkpoint. The same command goes on from there if it was stopped. docs/training.md has more.
"""  # noqa: E501

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import flags

from experiments import build, cli, devices, export, keeper, logs, results, rules, signals, sweep
from experiments.config import Config
from experiments.loop import Diverged, Record
from experiments.progress import Progress
from experiments.trial import Trial

FLAGS = flags.FLAGS


def main() -> int:
    config = cli.config()
    logs.require(FLAGS.log)
    rules.parse(config.rule)  # a wrong rule is refused before the data are read
    grid = sweep.parse(cli.sweep(), config)
    devices.initialize_processes(FLAGS.processes)
    placement = devices.placement(FLAGS.devices, FLAGS.mesh, config.batch_size)
    described = keeper.describe(config, grid)
    keeper.check_free(FLAGS.output, described)
    dataset = build.dataset(config, data_dir=FLAGS.data_dir, download=FLAGS.download)
    trial = Trial(config, dataset, grid=grid, placement=placement, check_nan=FLAGS.check_nan, parts=keeper.FIRST_PARTS)
    title = f"{config.model} on {dataset.name}"
    with keeper.folder_of(FLAGS.output, described) as folder, keeper.listen(FLAGS.minutes) as stop:
        with logs.opened(FLAGS.log if devices.is_first() else None, folder) as log:
            train(trial, folder, described, title, stop, log, **cli.keeping())
    if devices.is_first():
        for paragraph in report(trial, folder, stop, keeper.goes_on(FLAGS.keep)):
            print(paragraph)
    return 0 if trial.finished else stop.exit_code


def train(
    trial: Trial,
    folder: pathlib.Path,
    described: Mapping[str, Any],
    title: str,
    stop: signals.Stop,
    log: logs.Log,
    **keeping: Any,
) -> None:
    """Trains to the end or to a stop; writes checkpoints, results after each epoch, and at the end plain arrays.

    `keeping` are the options of the `Keeper`.
    """
    with keeper.Keeper(trial, folder / "checkpoints", described, **keeping) as kept:
        try:
            if warm_up(trial, kept, stop):
                train_epochs(trial, kept, folder, title, stop, log)
        except Diverged as error:
            raise Diverged(f"{error} {kept.sentence}") from None
        if trial.records:
            devices.from_first(lambda: write(trial, folder, title, log))
            carry = trial.carry(trial.chosen())
            params, feedback = devices.gather((carry.evaluated, carry.feedback))
            devices.from_first(lambda: export.export(folder / "export", params, feedback))


def warm_up(trial: Trial, kept: keeper.Keeper, stop: signals.Stop) -> bool:
    """The warm-up, if there is one; False if it was stopped."""
    config, first = trial.config, devices.is_first()
    if config.warmup_epochs and not trial.warms_up and first:
        print("This rule does not learn feedback: there is nothing to warm up.")
    if trial.warmed_up:
        return True
    total = config.warmup_epochs * trial.steps
    with Progress(total, "step", begin=trial.warm_up_steps_done, show=first) as bar:
        bar.describe("warm-up")
        finished = trial.warm_up(parts=keeper.FIRST_PARTS, advance=kept.after_part(bar, stop))
    if not finished:
        kept.save(now=True)
    return finished


def train_epochs(
    trial: Trial, kept: keeper.Keeper, folder: pathlib.Path, title: str, stop: signals.Stop, log: logs.Log
) -> None:
    """The epochs."""
    first = devices.is_first()
    with Progress(trial.config.epochs * trial.steps, "step", begin=trial.steps_done, show=first) as bar:
        while not trial.finished and not stop.requested:
            bar.describe(f"epoch {trial.epochs + 1}/{trial.config.epochs}")
            record = trial.epoch(parts=keeper.parts(trial), advance=kept.after_part(bar, stop))
            if record is not None:
                bar.advance(0, brief(record))
                devices.from_first(lambda: write(trial, folder, title, log, picture=False))
            kept.save(now=trial.finished or stop.requested)


def report(trial: Trial, folder: pathlib.Path, stop: signals.Stop, goes_on: str) -> list[str]:
    """What the user is told at the end."""
    if not trial.records:
        return [f"{stop.sentence} No epoch was finished: {goes_on}"]
    final = trial.result()
    told = [table(final, trial.config), *(f"\n{sentence}" for sentence in remarks(trial, final))]
    told.append(f"\nResults: {folder}/metrics.json, curves.csv, curves.png; parameters and feedback: {folder}/export")
    if not trial.finished:
        done = f"{trial.epochs} of {trial.config.epochs} epochs are done"
        told.append(f"{stop.sentence} {done}: {goes_on}")
    return told


def write(trial: Trial, folder: pathlib.Path, title: str, log: logs.Log, *, picture: bool = True) -> None:
    """Writes the results so far."""
    config = trial.config
    names = [", ".join(filter(None, (config.rule, point.text()))) for point in trial.points]
    content = {"rule": config.rule} | trial.result()
    seeds = config.all_seeds
    histories = {name: (trial.records, trial.lanes(i)) for i, name in enumerate(names)}
    steps = {name: trial.steps_of(i) for i, name in enumerate(names)}
    shown = [names[trial.chosen()]] if picture else None
    results.write(folder, content, histories, steps, seeds, title if picture else None, shown=shown)
    log(histories, steps, seeds)


def brief(record: Record) -> str:
    """One epoch in a few words, means over the lanes."""
    words = [f"loss {record.train_loss.mean():.4f}"]
    if record.validation_accuracy is not None:
        words.append(f"validation accuracy {record.validation_accuracy.mean():.2%}")
    if record.accuracy is not None:
        words.append(f"test accuracy {record.accuracy.mean():.2%}")
    if record.angle is not None:
        words.append(f"angle {record.angle.mean():.1f}°")
    return ", ".join(words)


def table(final: Mapping[str, Any], config: Config) -> str:
    """The figures of the selected epoch as a Markdown table."""
    where = f"after epoch {final['epochs']}"
    if "selected" in final:
        final, where = final | final["selected"], "in the best epoch on the validation set"
    rows = []
    for name, (label, unit, digits) in results.FIGURES.items():
        if name in final:
            values = final[name]
            mean, sd, half = (
                "-" if values[key] is None else results.number(unit * values[key], digits)
                for key in ("mean", "sd", "interval")
            )
            rows.append((label, mean, sd, half if half == "-" else f"± {half}"))
    rows.append(("step (ms)", f"{1e3 * final['step_seconds']:.2f}", "-", "-"))
    seeds = results.counted(config.seeds, "seed")
    return results.table((where, "mean", f"sd of {seeds}", "95% interval of the mean"), rows)


def remarks(trial: Trial, final: Mapping[str, Any]) -> list[str]:
    """What the user should know of a result."""
    found = []
    if "chosen" in final:
        chosen = ", ".join(f"{name}={value}" for name, value in final["chosen"].items())
        found.append(f"Chosen of {len(trial.points)} points on the validation set: {chosen}.")
        if final["at_edge"]:
            found.append(f"The best {', '.join(final['at_edge'])} is at the edge of the grid: try values beyond it.")
    if not np.isfinite(final["train_loss"]["mean"]):
        found.append("The loss became NaN or Inf: lower --learning_rate, and use --check_nan to stop at that step.")
    return found


if __name__ == "__main__":
    cli.define_config_flags()
    cli.define_execution_flags(output="results/train")
    cli.define_sweep_flag()
    cli.define_log_flag(logs.KINDS)
    flags.adopt_module_key_flags(cli)
    cli.run(main)
