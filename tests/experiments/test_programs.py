"""The programs as a user runs them: tiny runs, bad input, and the numbers of the demo."""

import csv
import importlib.util

import jax
import numpy as np
import pytest
from flax import nnx

import lrules
from experiments import benchmark, files, models, rules
from experiments import results as figures
from tests.experiments.programs import fork, is_png, results, run


def test_train(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1), np.uint8)
    np.savez(tmp_path / "set.npz", x_train=x, y_train=np.arange(40) % 2, x_test=x[:10], y_test=np.arange(10) % 2)
    rule = 'partition({"layers/0": backman(alpha=0.1), ".*": backprop})'
    flags = [f"--dataset=npz:{tmp_path}/set.npz", f"--rule={rule}", "--widths=4", "--activation=tanh", "--epochs=3"]
    logged = importlib.util.find_spec("tensorboardX") is not None
    flags += ["--seeds=2", "--seed=7", "--batch_size=8", "--record_every=2", *["--log=tensorboard"] * logged]
    done = run("train", *flags, f"--output={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert "| test accuracy (%)" in done.stdout and "epoch 3/3" in done.stderr
    metrics = results(tmp_path / "out")
    assert metrics["rule"] == rule and len(metrics["accuracy"]["by_seed"]) == 2
    assert np.shape(metrics["curves"]["train_loss"]) == (3, 2)
    assert metrics["config"]["seed"] == 7 and "experiments.train" in metrics["provenance"]["command"]
    assert metrics["provenance"]["versions"]["jax"] == jax.__version__ and metrics["provenance"]["device"]
    assert metrics["config"]["activation"] == "tanh"
    rows = list(csv.DictReader((tmp_path / "out" / "curves.csv").open()))
    assert [(row["epoch"], row["seed"]) for row in rows] == [(e, s) for e in "123" for s in "78"]
    steps = list(csv.DictReader((tmp_path / "out" / "steps.csv").open()))
    assert [row["updates"] for row in steps if row["seed"] == "8"] == ["2", "4", "5", "7", "9", "10", "12", "14", "15"]
    assert float(steps[-1]["train_loss"]) > 0
    assert is_png(tmp_path / "out" / "curves.png")
    assert len(list((tmp_path / "out").glob("tensorboard/*/seed */events.*"))) == 2 * logged
    arrays = np.load(tmp_path / "out" / "export" / "params.npz")
    assert arrays["layers/0/kernel"].shape == (2, 16, 4)  # [seeds, inputs, outputs]
    assert lrules.feedback.load(tmp_path / "out" / "export" / "feedback.npz").learned == {}


def test_compare_sweeps_and_refuses(tmp_path):
    """A rule that cannot train the model is told apart; the others go on."""
    refused = "partition({'nowhere': backprop, '.*': backman})"
    flags = [f"--rules={refused}", "--widths=8", "--epochs=2", "--seeds=2", "--batch_size=128", "--validation=0.2"]
    flags.append("--sweep=learning_rate=0.01,0.001")
    done = run("compare", *flags, f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "refused this model: partition: 'nowhere' matches no layer" in done.stdout
    found = results(tmp_path)["rules"]
    assert list(found) == ["backprop", refused]
    assert found["backprop"]["chosen"] == {"learning_rate": 0.01} and len(found["backprop"]["points"]) == 2
    assert "nowhere" in found[refused]["refused"]
    done = fork("train", f"--config={tmp_path}/metrics.json", "--epochs=1", "--seeds=1", f"--output={tmp_path}/again")
    assert done.returncode == 0, done.stderr
    again = results(tmp_path / "again")
    assert again["sweep"] == ["learning_rate=0.01,0.001"] and again["config"]["widths"] == [8]
    rows = list(csv.DictReader((tmp_path / "again" / "curves.csv").open()))
    assert [row["rule"] for row in rows] == ["backprop, learning_rate=0.01", "backprop, learning_rate=0.001"]
    assert is_png(tmp_path / "curves.png")


@pytest.mark.slow
def test_demo_shows_every_rule_and_reaches_its_numbers(tmp_path):
    """`make demo` as it stands: handwritten digits, mean test accuracy over its seeds."""
    done = run("compare", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    found = results(tmp_path)["rules"]
    assert set(found) == set(rules.argument_free_rules()) and next(iter(found)) == "backprop"
    assert not [name for name in found if "refused" in found[name]]
    assert all(f"| {name} " in done.stdout for name in found)
    assert {"curves.csv", "curves.png", "metrics.json"} <= {path.name for path in tmp_path.iterdir()}

    accuracy = {name: found[name]["accuracy"]["mean"] for name in found}
    assert min(accuracy["backprop"], accuracy["backman"]) > 0.95
    assert min(accuracy["feedback_alignment"], accuracy["direct_feedback_alignment"]) > 0.90
    base = accuracy.pop("last_layer_only")
    assert all(value > base for value in accuracy.values()), (base, accuracy)
    assert found["backprop"]["angle"]["mean"] == 0 and found["backman"]["angle"]["mean"] > 0


@pytest.mark.slow
def test_learned_and_dual_channels_come_close_to_backprop(tmp_path):
    """The demo's model and seeds: dual propagation within half a point of backprop's accuracy, noise within two."""
    taught = "node_perturbation(std=0.001)"
    done = run("compare", f"--rules=dual_propagation(alpha=0.5),{taught}", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    accuracy = {name: found["accuracy"]["mean"] for name, found in results(tmp_path)["rules"].items()}
    assert abs(accuracy["dual_propagation(alpha=0.5)"] - accuracy["backprop"]) <= 0.005
    assert accuracy[taught] >= accuracy["backprop"] - 0.02


def test_benchmark_measures_rules_and_tells_refusals():
    progress = []
    chosen = {
        "backprop": lrules.backprop(),
        "feedback_alignment": lrules.feedback_alignment(),
        "sign_error(feedback_alignment)": lrules.sign_error(lrules.feedback_alignment()),
        "refused": lrules.partition({"nowhere": lrules.backprop()}),
    }
    rows, refused = benchmark.benchmark(
        lambda rngs: models.MLP((4, 5, 5, 10), rngs=rngs),
        benchmark.Case((4,), 8),
        chosen,
        repeats=2,
        compile_repeats=1,
        progress=progress.append,
    )
    assert list(rows) == ["plain", *chosen][:-1] and "nowhere" in refused["refused"]
    assert rows["backprop"].identical_gradients and not rows["feedback_alignment"].identical_gradients
    assert rows["feedback_alignment"].feedback_bytes == 4 * (25 + 50) and rows["backprop"].feedback_bytes == 0
    assert rows["plain"].memory_ratio == 1 and rows["plain"].memory_bytes > 0
    assert all(low <= median <= high for median, low, high in (row.step_ratio for row in rows.values()))
    assert sum(progress) == 4 * (2 + 1)
    modified = rows["sign_error(feedback_alignment)"]
    assert modified.over_rule and rows["feedback_alignment"].over_rule is None
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in benchmark.table(rows).splitlines()]
    over = lines[0].index("over its rule")
    shown = {line[0]: line[over] for line in lines[2:]}
    assert shown["sign_error(feedback_alignment)"] == f"{modified.over_rule:.3f}" and shown["feedback_alignment"] == "-"


def test_benchmark_times_every_modifier_of_the_error_beside_its_rule():
    timed = rules.select(",".join([*rules.argument_free_rules(), *benchmark.FURTHER]))
    assert all(rules.modified(name) in timed for name in timed if rules.modified(name))
    assert len({name.split("(")[0] for name in timed} & set(rules.modifiers())) == 5


def test_benchmark_program(tmp_path):
    flags = ["--quick", "--models=mlp", "--rules=backprop", "--repeats=1", "--compile_repeats=1"]
    done = run("benchmark", *flags, f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "identical to those of jax.value_and_grad" in done.stdout and "784-500-500-500-500-10" in done.stdout
    assert set(results(tmp_path)["models"]["mlp"]["rules"]) == {"plain", "backprop"}
    assert len(list(csv.DictReader((tmp_path / "table.csv").open()))) == 2 and is_png(tmp_path / "benchmark.png")


def test_benchmark_of_feedback_that_is_drawn_again(tmp_path):
    """The command of docs/speed.md, with smaller sizes."""
    flags = ["--quick", "--models=wide", "--batch=8", "--repeats=1", "--compile_repeats=1"]
    done = fork("benchmark", *flags, "--rules=dfa,dfa(storage='recomputed')", f"--output={tmp_path}")
    assert done.returncode == 0 and "784-64-64-64-2000, inputs 28x28x1, batch 8" in done.stdout, done.stderr
    found = results(tmp_path)["models"]["wide"]["rules"]
    assert (found["dfa"]["feedback_bytes"], found["dfa"]["over_rule"]) == (4 * 3 * 64 * 2000, None)
    drawn_again = found["dfa(storage='recomputed')"]
    assert drawn_again["feedback_bytes"] == 3 * 8 and drawn_again["over_rule"] > 0


def test_tracing_program(tmp_path):
    flags = ["--models=mlp 8,transformer in a scan", "--rules=backprop,node_perturbation(std=0.1)", "--repeats=1"]
    done = fork("tracing", *flags, "--compile", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "Time to trace, over plain" in done.stdout and "Time to compile" in done.stdout
    found = results(tmp_path)["models"]
    assert set(found) == {"mlp 8", "transformer in a scan"}
    assert all(row["trace_seconds"] > 0 and row["compile_seconds"] > 0 for row in found["mlp 8"].values())
    done = fork("tracing", "--models=mlp", f"--output={tmp_path}")
    assert done.returncode != 0 and "mlp 8" in done.stderr


@pytest.mark.parametrize("size", ["QUICK", "FULL"])
def test_benchmarked_models_exist(size):
    for name, case in getattr(benchmark, size).items():
        model = nnx.eval_shape(lambda name=name, case=case: case.maker(name, "float32")(nnx.Rngs(0)))
        x, y = jax.eval_shape(case.examples, jax.random.split(jax.random.key(0)))
        assert x.shape[0] == y.shape[0] == case.batch
        assert isinstance(model, nnx.Module) and str(case.batch) in case.describe(name)


@pytest.mark.parametrize(
    ("program", "flags", "sentence"),
    [
        ("train", ["--rule=bakman"], "Error: There is no rule 'bakman': did you mean 'backman'?"),
        ("train", ["--lerning_rate=1"], "Did you mean: learning_rate ?"),
        ("train", ["backman"], "Error: 'backman' is not a flag: write flags as --name=value; --help lists them."),
        (
            "train",
            ["--dataset=npz:none.npz"],
            "Error: There is no file none.npz: give --dataset=npz:FILE with the arrays",
        ),
        (
            "train",
            ["--activation=relu", "--optimizer=sgd", "--learning_rate=1e30", "--check_nan"],
            "Error: The loss of seed 0 became NaN or Inf",
        ),
        ("compare", ["--rules=backman(alfa=1)"], "Error: backman has no option 'alfa': did you mean 'alpha'?"),
        ("compare", ["--widths=a"], "Error: --widths must be positive integers, as in --widths=128,128, got 'a'."),
        ("train", ["--mono_net=zeroes"], "Error: There is no mono-net start 'zeroes': did you mean 'zeros'?"),
        (
            "train",
            ["--mono_net=zeros", "--activation=gelu"],
            "Error: mono_net: the activation 'gelu' decreases, at -",
        ),
        ("train", ["--output="], "Error: --output is empty: give a folder"),
        ("benchmark", ["--models=mpl"], "Error: There is no model 'mpl' in the benchmark: did you mean 'mlp'?"),
    ],
)
def test_bad_input_is_one_sentence_and_a_failure(tmp_path, program, flags, sentence):
    done = fork(program, f"--output={tmp_path}", *flags)
    assert done.returncode != 0 and sentence in done.stderr and "Traceback" not in done.stderr
    assert not [path for path in tmp_path.iterdir() if path.name in ("metrics.json", "curves.csv")]


@pytest.mark.parametrize("program", ["train", "compare", "benchmark"])
def test_help_shows_the_commands_and_every_flag(program):
    done = fork(program, "--help")
    assert f"python -m experiments.{program}" in done.stdout
    wanted = {"train": "--rule:", "compare": "--sweep:", "benchmark": "--[no]quick:"}[program]
    assert wanted in done.stdout and "--output:" in done.stdout


def test_json_has_no_nan_and_tables_are_aligned(tmp_path):
    files.write_json(tmp_path / "metrics.json", {"a": np.array([1.0, np.nan]), "b": (float("inf"), np.float32(0.5))})
    assert results(tmp_path) == {"a": [1.0, None], "b": [None, 0.5]}
    assert figures.table(("a", "bb"), [("xyz", "1")]) == "| a   | bb |\n| --- | -: |\n| xyz |  1 |"
