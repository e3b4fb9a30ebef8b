"""Train one model under one learning rule, several seeds at once if asked, and evaluate it after each epoch.

    python -m experiments.train                                            # digits, backprop: about 15 seconds
    python -m experiments.train --rule="backman(alpha=1.0)" --model=lenet5 --dataset=mnist --epochs=10
    python -m experiments.train --rule="drop_error(feedback_alignment, rate=0.5)" --seeds=5
    python -m experiments.train --rule='partition({"layers/0/.*": backman, ".*": backprop})'

Writes metrics.json (final figures, curves, settings, versions, device and command), curves.csv and curves.png.
"""

from absl import flags
from experiments import cli, loop, plots, rules
from experiments.data import Dataset
from experiments.loop import Record
from tqdm import tqdm

FLAGS = flags.FLAGS


def train(run: loop.Run, epochs: int) -> list[Record]:
    """Train for some epochs, showing the progress and the latest figures."""
    records: list[Record] = []
    with tqdm(total=epochs * run.steps, unit="step") as bar:
        for epoch in range(1, epochs + 1):
            bar.set_description(f"epoch {epoch}/{epochs}")
            records.append(run.epoch(parts=20, advance=bar.update))
            bar.set_postfix_str(describe(records[-1]))
    return records


def describe(record: Record) -> str:
    """One epoch in a few words."""
    return f"loss {record.train_loss.mean():.4f}, accuracy {record.accuracy.mean():.2%}, angle {record.angle.mean():.1f}°"


def make_run(dataset: Dataset) -> loop.Run:
    """The run that the flags ask for."""
    return loop.Run(
        cli.task_from_flags(dataset),
        rules.parse(FLAGS.rule),
        dataset,
        optimizer=cli.optimizer_from_flags(FLAGS.learning_rate, dataset),
        seeds=range(FLAGS.seed, FLAGS.seed + FLAGS.seeds),
        batch_size=FLAGS.batch_size,
        check_nan=FLAGS.check_nan,
    )


def main() -> None:
    rules.parse(FLAGS.rule)  # a wrong rule is told before the data are read
    folder = cli.output_folder()
    dataset = cli.dataset_from_flags()
    run = make_run(dataset)
    records = train(run, FLAGS.epochs)
    final = loop.summary(records)
    seconds = sum(record.seconds for record in records) / (run.steps * len(records))
    final |= {"step_seconds": seconds, "compile_seconds": run.compile_seconds}
    cli.write_results(folder, {"rule": FLAGS.rule} | final, {FLAGS.rule: records}, f"{FLAGS.model} on {dataset.name}")
    names = {"accuracy": "test accuracy", "test_loss": "test loss", "train_loss": "training loss", "angle": "angle to backprop"}
    rows = [(label, f"{final[name]:.4g}", f"{final[f'{name}_sd']:.2g}") for name, label in names.items()]
    print(cli.table([FLAGS.rule, "mean", f"sd of {FLAGS.seeds} seeds"], rows))
    print(f"\nResults: {folder}/metrics.json, curves.csv, curves.png")


if __name__ == "__main__":
    flags.DEFINE_string("rule", "backprop", 'A learning rule, such as "backman(alpha=1.0)"; modifiers are nested the same way.')
    flags.DEFINE_float("learning_rate", 1e-3, "The optimizer's learning rate.", lower_bound=0)
    cli.define_training_flags(epochs=20, seeds=1, output="results/train")
    flags.adopt_module_key_flags(cli)
    cli.run(main)
