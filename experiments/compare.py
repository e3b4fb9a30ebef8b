"""Train the same model with every learning rule, several seeds at once, and compare the rules.

    python -m experiments.compare                             # every rule on digits: under two minutes on two cores
    python -m experiments.compare --rules="backprop,backman(alpha=0.5)" --dataset=mnist --epochs=5
    python -m experiments.compare --sweep=0.001,0.003,0.01    # choose the rate of each rule on held-out training data

The rules take turns, epoch by epoch, so their step times are measured side by side, beginning with the second epoch.
The program writes metrics.json (each rule by the name of its factory), curves.csv and curves.png.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax
from absl import flags
from tqdm import tqdm

import lrules
from experiments import cli, data, loop, rules
from experiments.errors import InputError
from experiments.loop import Record

FLAGS = flags.FLAGS

Rules = Mapping[str, lrules.Rule]
Histories = dict[str, list[Record]]


def compare(
    task: loop.Task,
    dataset: data.Dataset,
    chosen: Rules,
    optimizers: Mapping[str, optax.GradientTransformation | loop.Optimizers],
    *,
    epochs: int,
    warmup_epochs: int = 0,
    watch: Callable[[str, loop.Run], Any] | None = None,
    **options: Any,
) -> tuple[Histories, dict[str, str]]:
    """Train with each rule, in turns; `options` are those of `loop.Run`.

    Rules with learned feedback first have a warm-up. Then all rules train their forward weights for the same `epochs`.
    The function calls `watch(name, run)` before the first of these epochs and after each.

    Returns the epochs by rule, and the message of each rule that refuses this model.
    """
    dataset = data.on_device(dataset)
    runs: dict[str, loop.Run] = {}
    refused: dict[str, str] = {}
    for name in (bar := tqdm(chosen, desc="compiling", unit="rule")):
        bar.set_postfix_str(name)
        try:
            runs[name] = loop.Run(task, chosen[name], dataset, optimizer=optimizers[name], **options)
        except loop.Refused as error:
            refused[name] = str(error)
    histories: Histories = {name: [] for name in runs}
    if warmup_epochs:
        for name in (bar := tqdm([name for name in runs if runs[name].learns_feedback], desc="warm-up", unit="rule")):
            bar.set_postfix_str(name)
            runs[name].warm_up(warmup_epochs)
    if watch:
        for name, run in runs.items():
            watch(name, run)
    with tqdm(total=epochs * len(runs), unit="epoch", desc="training") as bar:
        for epoch in range(1, epochs + 1):
            for name, run in runs.items():
                histories[name].append(run.epoch())
                if watch:
                    watch(name, run)
                bar.set_postfix_str(f"epoch {epoch}/{epochs}, {name}: {histories[name][-1].accuracy.mean():.1%}")
                bar.update()
    return histories, refused


def sweep(
    task: loop.Task, dataset: data.Dataset, chosen: Rules, rates: list[float], optimizer: Callable, **options: Any
) -> dict[str, float]:
    """The best rate of each rule, measured on a held-out fifth of the training data."""
    tuning = data.hold_out(dataset, 0.2)
    accuracy: dict[str, dict[float, float]] = {name: {} for name in chosen}
    for rate in rates:
        print(f"Learning rate {rate:g}:")
        optimizers = dict.fromkeys(chosen, optimizer(rate, tuning))
        for name, records in compare(task, tuning, chosen, optimizers, **options)[0].items():
            accuracy[name][rate] = float(np.nan_to_num(records[-1].accuracy.mean()))
    return {name: max(found, key=found.__getitem__) for name, found in accuracy.items() if found}


def step_times(histories: Histories, baseline: str = "backprop") -> dict[str, tuple[float, float, float]]:
    """The step time of each rule over that of the baseline, epoch by epoch: (median, lower quartile, upper quartile).

    The first epoch does not count, because its first steps prepare things for all later ones. If there is no other
    epoch, all three are NaN.
    """
    base = np.array([record.seconds for record in histories[baseline][1:]])
    times = {}
    for name, records in histories.items():
        ratios = np.array([record.seconds for record in records[1:]]) / base
        quantiles = np.quantile(ratios, (0.5, 0.25, 0.75)) if ratios.size else np.full(3, np.nan)
        median, lower, upper = quantiles.tolist()
        times[name] = median, lower, upper
    return times


def main() -> None:
    chosen = {"backprop": lrules.backprop()} | rules.select(FLAGS.rules)  # backprop: the reference for step times
    rates = cli.numbers("sweep", FLAGS.sweep or [])
    folder = cli.output_folder()
    dataset = cli.dataset_from_flags()
    task = cli.task_from_flags(dataset)
    options = {"epochs": FLAGS.epochs, "warmup_epochs": FLAGS.warmup_epochs} | cli.run_options()
    best = sweep(task, dataset, chosen, rates, cli.optimizer_from_flags, **options) if rates else {}
    rate = {name: best.get(name, FLAGS.learning_rate) for name in chosen}
    optimizers = {name: cli.optimizer_from_flags(rate[name], dataset) for name in chosen}
    histories, refused = compare(task, dataset, chosen, optimizers, **options)
    if "backprop" not in histories:
        raise InputError(f"backprop failed: {refused['backprop']}")
    times = step_times(histories)
    results = {
        name: {"learning_rate": rate[name]}
        | loop.summary(records)
        | {"step_time_ratio": times[name][0], "step_time_quartiles": times[name][1:]}
        for name, records in histories.items()
    }
    results |= {name: {"refused": reason} for name, reason in refused.items()}
    title = f"{FLAGS.model} on {dataset.name}, {FLAGS.seeds} seeds"
    cli.write_results(folder, {"rules": results}, histories, title)
    print(table(results, histories))
    for name, reason in refused.items():
        print(f"\n{name} refused this model: {reason}")
    if lost := [name for name in histories if not np.isfinite(results[name]["train_loss"])]:
        print(f"\nThe loss of {', '.join(lost)} became NaN or Inf: lower --learning_rate or try --sweep.")
    print(f"\n{title}, {FLAGS.epochs} epochs. Results: {folder}/metrics.json, curves.csv, curves.png")


def table(results: Mapping[str, Mapping[str, Any]], histories: Histories) -> str:
    """The figures of the last epoch as a Markdown table, mean ± sd over the seeds."""
    attacked = any("attacked" in results[name] for name in histories)
    header = ["rule", "test accuracy (%)", "angle to backprop (°)", "step time / backprop", "learning rate"]
    rows = []
    for name in histories:
        r = results[name]
        accuracy = f"{100 * r['accuracy']:.2f} ± {100 * r['accuracy_sd']:.2f}"
        angle = f"{r['angle']:.1f} ± {r['angle_sd']:.1f}"
        ratio = "-" if np.isnan(r["step_time_ratio"]) else f"{r['step_time_ratio']:.2f}"
        row = [name, accuracy, angle, ratio, f"{r['learning_rate']:g}"]
        if attacked:
            row.insert(2, f"{100 * r['attacked']:.2f} ± {100 * r['attacked_sd']:.2f}")
        rows.append(row)
    return cli.table([*header[:2], "under attack (%)", *header[2:]] if attacked else header, rows)


if __name__ == "__main__":
    flags.DEFINE_string("rules", None, "Rules separated by commas (default: every rule without a required argument).")
    flags.DEFINE_float("learning_rate", 3e-3, "The learning rate of every rule, unless --sweep finds a better one.")
    flags.DEFINE_list("sweep", None, "Learning rates to try first for each rule, on held-out training data.")
    cli.define_training_flags(epochs=30, seeds=5, output="results/compare")
    flags.adopt_module_key_flags(cli)
    cli.run(main)
