"""Runs beside each other: differences worked by hand, what files give, what is refused."""

import csv
import json

import numpy as np
import pytest
from scipy.special import stdtr

from experiments import comparison, results
from experiments.errors import InputError
from experiments.loop import Record
from tests.experiments.programs import fork, is_png

FIRST = np.array([0.9, 0.8, 0.7])


def test_paired_by_seed():
    """Differences of 0.02, 0.04, 0.06: sd 0.02, and Student's t at 2 degrees of freedom is 4.302653."""
    found = comparison.difference(np.array([0.76, 0.92, 0.84]), (2, 0, 1), FIRST, (0, 1, 2))
    assert found.paired and found.mean == pytest.approx(0.04) and found.effect == pytest.approx(2)
    assert found.interval == pytest.approx(4.302653 * 0.02 / 3**0.5, rel=1e-6)


def test_other_seeds_are_not_paired():
    """Variances of 2 and 2, two seeds each: Welch has 2 degrees of freedom, and an error of sqrt(2)."""
    found = comparison.difference(np.array([1.0, 3.0]), (0, 1), np.array([0.0, 2.0]), (1, 2))
    assert not found.paired and found.mean == 1 and found.effect == pytest.approx(1 / 2**0.5)
    assert found.interval == pytest.approx(4.302653 * 2**0.5, rel=1e-6)


def test_unequal_variances_and_numbers_of_seeds():
    """Variances 2 and 3 of 2 and 3 seeds: errors 1 + 1, 2^2 / (1/1 + 1/2) = 8/3 degrees, pooled variance 8/3."""
    found = comparison.difference(np.array([1.0, 3.0]), (0, 1), np.array([0.0, 0.0, 3.0]), (0, 1, 2))
    assert found.effect == pytest.approx((3 / 8) ** 0.5)
    assert stdtr(8 / 3, found.interval / 2**0.5) == pytest.approx(0.975)


@pytest.mark.parametrize("seeds", [(0,), (1,)])
def test_one_seed_has_no_interval(seeds):
    found = comparison.difference(np.array([0.5]), seeds, np.array([0.25]), (0,))
    assert found == (0.25, None, None, seeds == (0,))


def test_equal_differences_have_no_effect_size():
    assert comparison.difference(FIRST + 0.5, (0, 1, 2), FIRST, (0, 1, 2)).effect is None
    assert comparison.difference(np.ones(2), (3, 4), np.zeros(2), (0, 1))[:3] == (1, 0, None)


def record(epoch, accuracy):
    accuracy, ones = np.array(accuracy), np.ones(len(accuracy))
    return Record(epoch, ones, 2 * ones, accuracy, validation_loss=ones, validation_accuracy=accuracy)


def write(folder, rule, by_epoch, **config):
    """The files of a run of `experiments.train`."""
    folder.mkdir()
    records, seeds = [record(i + 1, row) for i, row in enumerate(by_epoch)], len(by_epoch[0])
    config = {"rule": rule, "seed": 3, "seeds": seeds, "learning_rate": 0.1} | config
    results.write(
        folder, {"rule": rule, "config": config} | results.summary(records), {rule: (records, slice(None))}, {},
        range(3, 3 + seeds), None,
    )  # fmt: skip
    return folder


@pytest.fixture
def days(tmp_path):
    write(tmp_path / "monday", "backprop", [[0.5, 0.6, 0.7], [0.9, 0.8, 0.7]])
    write(tmp_path / "tuesday", "backman", [[0.95, 0.9, 0.85], [0.92, 0.84, 0.76]], learning_rate=0.3)
    write(tmp_path / "sunday", "backman", [[0.5, 0.6]], seed=0)
    return tmp_path


@pytest.mark.parametrize("kind", ["metrics.json", "curves.csv"])
def test_both_files_give_the_same(days, kind):
    (run,) = comparison.read([f"{days}/monday/{kind}"])
    assert run.name == "backprop" and run.seeds == (3, 4, 5) and [r.epoch for r in run.records] == [1, 2]
    np.testing.assert_array_equal(run.records[1].accuracy, [0.9, 0.8, 0.7])
    assert run.records[0].angle is None and comparison.measured([run])[0] == "accuracy"


def test_what_one_name_means_is_told_by_its_folder(days):
    runs = comparison.read([f"{days}/{day}/curves.csv" for day in ("monday", "tuesday", "sunday")])
    names = [run.name for run in runs]
    assert names == ["backprop", "backman (tuesday)", "backman (sunday)"]
    names = [run.name for run in comparison.read([f"{days}/sunday/curves.csv", f"{days}/sunday/metrics.json"])]
    assert names == [f"backman ({days}/sunday/curves.csv)", f"backman ({days}/sunday/metrics.json)"]


def test_table_and_remarks(days):
    runs = comparison.read([f"{days}/{day}/metrics.json" for day in ("monday", "tuesday", "sunday")])
    lines = comparison.table(runs, "accuracy").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[2] == ["backprop", "3", "80.00 ± 10.00", "", "", "", ""]
    assert rows[3] == ["backman (tuesday)", "3", "84.00 ± 8.00", "+4.00", "± 4.97", "+2.00", "by seed"]
    assert rows[4][0] == "backman (sunday)" and rows[4][3] == "-25.00" and rows[4][-1] == "no"
    said = comparison.remarks(runs)
    assert said[0].startswith("Paired by seed") and said[1].startswith("Not paired")
    assert said[2:] == [
        "backman (tuesday) has learning_rate 0.3, the first run 0.1.",
        "backman (sunday) has 1 epoch, the first run 2.",
    ]


def test_the_best_epoch_of_each_seed(days):
    (run,) = comparison.read([f"{days}/tuesday/metrics.json"])
    np.testing.assert_array_equal(comparison.values_of(run, "accuracy", "best_validation"), [0.95, 0.9, 0.85])


def test_bad_input(days):
    (days / "text.json").write_text("[]")
    (days / "half.csv").write_text("rule,seed,epoch,train_loss\nbp,0,1,1\nbp,0,2,1\nbp,1,1,1\n")
    for names, sentence in (
        (["nothing.json"], "No such file.*: give the metrics.json or curves.csv"),
        (["text.json"], "has no curves that can be read: give"),
        (["half.csv"], "seed 1 of 'bp' has not the epochs of the other seeds"),
        (["monday/curves.csv"] * 2, "is given twice: give each file once"),
    ):
        with pytest.raises(InputError, match=sentence):
            comparison.read([f"{days}/{name}" for name in names])
    runs = comparison.read([f"{days}/monday/metrics.json"])
    with pytest.raises(InputError, match="figure 'acuracy': did you mean 'accuracy'"):
        comparison.figure_of(runs, "acuracy")
    bare = [runs[0]._replace(records=[r._replace(validation_loss=None) for r in runs[0].records])]
    with pytest.raises(InputError, match="no validation set to select an epoch by: leave out --select"):
        comparison.values_of(bare[0], "accuracy", "best_validation")


def test_the_program(days):
    files = [f"{days}/{day}/metrics.json" for day in ("monday", "tuesday")]
    done = fork("plot", *files, f"--output={days}/out")
    assert done.returncode == 0, done.stderr
    assert "+4.00" in done.stdout and "Paired by seed" in done.stdout and is_png(days / "out" / "comparison.png")
    first, other = csv.DictReader((days / "out" / "comparison.csv").open())
    assert first["difference"] == "" and float(other["difference"]) == pytest.approx(0.04) and other["paired"] == "True"
    done = fork("plot", f"--output={days}/out")
    assert done.returncode == 1 and done.stderr.strip().startswith("Error: There is no file: give the metrics.json")


def test_compare_files(tmp_path):
    """A file of `experiments.compare` has several rules; those that were refused have no curves."""
    curves = {"train_loss": [[1.0, None]], "test_loss": [[1.0, 2.0]], "seconds": [0.5]}
    rules = {"backprop": {"curves": curves}, "backman": {"refused": "why"}, "srbp": {"curves": curves}}
    (tmp_path / "metrics.json").write_text(json.dumps({"config": {"seeds": 2}, "rules": rules}))
    runs = comparison.read([f"{tmp_path}/metrics.json"])
    assert [run.name for run in runs] == ["backprop", "srbp"] and np.isnan(runs[0].records[0].train_loss[1])
    assert comparison.figure_of(runs, None) == "test_loss" and runs[0].seeds == (0, 1)
