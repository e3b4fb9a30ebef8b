"""Train one model with one learning rule, for one or several seeds at once, and evaluate it after each epoch.

    python -m experiments.train                                            # digits, backprop: about 15 seconds
    python -m experiments.train --rule="backman(alpha=1.0)" --model=lenet5 --dataset=mnist --epochs=10
    python -m experiments.train --rule="drop_error(feedback_alignment, rate=0.5)" --seeds=5
    python -m experiments.train --rule='partition({"layers/0/.*": backman, ".*": backprop})'
    python -m experiments.train --rule="node_perturbation(std=0.01)" --warmup_epochs=1 --feedback_learning_rate=0.01
    python -m experiments.train --fgsm=0.01 --attack=0.05                  # adversarial training, accuracy under attack

The program writes metrics.json (final figures, curves, settings, versions, device and command), curves.csv and
curves.png.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import cli, loop, rules
from experiments.data import Dataset
from experiments.loop import Record

FLAGS = flags.FLAGS


def train(run: loop.Run, epochs: int, warmup_epochs: int = 0) -> list[Record]:
    """Train for some epochs after a warm-up of learned feedback, and show the progress and the latest figures."""
    records: list[Record] = []
    if warmup_epochs and not run.learns_feedback:
        print("This rule does not learn feedback: there is nothing to warm up.")
    elif warmup_epochs:
        with tqdm(total=warmup_epochs * run.steps, unit="step", desc="warm-up") as bar:
            run.warm_up(warmup_epochs, parts=20, advance=bar.update)
    with tqdm(total=epochs * run.steps, unit="step") as bar:
        for epoch in range(1, epochs + 1):
            bar.set_description(f"epoch {epoch}/{epochs}")
            records.append(run.epoch(parts=20, advance=bar.update))
            bar.set_postfix_str(describe(records[-1]))
    return records


def describe(record: Record) -> str:
    """One epoch in a few words, means over the seeds."""
    loss, accuracy, angle = record.train_loss.mean(), record.accuracy.mean(), record.angle.mean()
    return f"loss {loss:.4f}, test accuracy {accuracy:.2%}, angle {angle:.1f}°"


def make_run(dataset: Dataset) -> loop.Run:
    """The run that the flags choose."""
    return loop.Run(
        cli.task_from_flags(dataset),
        rules.parse(FLAGS.rule),
        dataset,
        optimizer=cli.optimizer_from_flags(FLAGS.learning_rate, dataset),
        **cli.run_options(),
    )


def main() -> None:
    rules.parse(FLAGS.rule)  # reports a wrong rule before the data are read
    folder = cli.output_folder()
    dataset = cli.dataset_from_flags()
    run = make_run(dataset)
    records = train(run, FLAGS.epochs, FLAGS.warmup_epochs)
    final = loop.summary(records)
    seconds = sum(record.seconds for record in records) / (run.steps * len(records))
    final |= {"step_seconds": seconds, "compile_seconds": run.compile_seconds}
    cli.write_results(folder, {"rule": FLAGS.rule} | final, {FLAGS.rule: records}, f"{FLAGS.model} on {dataset.name}")
    print(table(final))
    if not np.isfinite(final["train_loss"]):
        print("\nThe loss became NaN or Inf: lower --learning_rate, and use --check_nan to stop at that step.")
    print(f"\nResults: {folder}/metrics.json, curves.csv, curves.png")


def table(final: Mapping[str, Any]) -> str:
    """The figures of the last epoch as a Markdown table."""
    figures = (
        ("test accuracy (%)", "accuracy", 100, 2),
        ("the same under attack (%)", "attacked", 100, 2),
        ("test loss", "test_loss", 1, 4),
        ("training loss", "train_loss", 1, 4),
        ("angle to backprop (°)", "angle", 1, 1),
    )
    rows = [
        (label, f"{unit * final[name]:.{digits}f}", f"{unit * final[f'{name}_sd']:.{digits}f}")
        for label, name, unit, digits in figures
        if name in final
    ]
    rows.append(("step (ms)", f"{1e3 * final['step_seconds']:.2f}", ""))
    return cli.table(("after the last epoch", "mean", "sd over seeds"), rows)


if __name__ == "__main__":
    flags.DEFINE_string(
        "rule", "backprop", 'A learning rule, such as "backman(alpha=1.0)"; modifiers are nested the same way.'
    )
    flags.DEFINE_float("learning_rate", 3e-3, "The optimizer's learning rate.", lower_bound=0)
    cli.define_training_flags(epochs=30, seeds=1, output="results/train")
    flags.adopt_module_key_flags(cli)
    cli.run(main)
