"""Several tasks in sequence: who sees which examples, and what is forgotten."""

import csv

import numpy as np
import pytest

from experiments import data, sequence
from experiments.config import Config
from tests.experiments.programs import fork, is_png, results


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_each_seed_has_its_own_tasks(digits):
    division = sequence.divide(digits, range(3), 2)
    assert division.classes.shape == (3, 5, 2) and not (division.classes[0] == division.classes[1]).all()
    for classes, numbers in zip(division.classes, division.numbers, strict=True):
        assert sorted(classes.ravel()) == list(range(10)) and (numbers[classes] == [0, 1]).all()
    labels = np.asarray(digits.y_train)
    rows = division.rows(labels, 1)[:, :100]
    assert rows.shape == (3, 100)
    for own, classes in zip(rows, division.classes, strict=True):
        assert set(labels[own]) == set(classes[1]) and len(set(own)) == 100


def test_a_task_is_learned_after_its_turn_and_not_before(digits):
    config = Config(widths=(32,), epochs=4, seeds=2, optimizer="sgd", learning_rate=0.3, schedule="constant")
    accuracy = sequence.train(config, digits, sequence.divide(digits, range(2), 2))
    assert accuracy.shape == (2, 5, 5)
    assert np.mean([accuracy[:, i, i] for i in range(5)]) > 0.9  # each just after it was trained
    before = [accuracy[:, i, i + 1] for i in range(4)]
    assert np.mean(before) < 0.8
    assert accuracy[:, -1].mean() < np.mean([accuracy[:, i, i] for i in range(5)])  # some is forgotten


def test_every_task_has_as_many_examples_as_the_rarest_classes(digits):
    labels = np.repeat([0, 1, 2, 3], [9, 5, 8, 6])
    four = digits._replace(classes=4)
    division = sequence.divide(four, range(2), 2)
    assert division.rows(labels, 0).shape == division.rows(labels, 1).shape == (2, 11)


def test_a_course_goes_on_from_its_state_and_has_a_lane_for_each_rate(digits):
    digits = data.split_validation(digits, 0.2)
    config = Config(widths=(8,), epochs=2, seeds=2, optimizer="sgd", schedule="halfway", learning_rate=0.1)
    division = sequence.divide(digits, range(2), 2, tuning=True)
    whole = sequence.Course(config, digits, division, rates=(0.01, 0.1), part="val")
    parts = [sequence.Course(config, digits, division, rates=(0.01, 0.1), part="val") for _ in range(2)]
    for _ in range(10):
        whole.epoch()
    for _ in range(3):
        parts[0].epoch()
    parts[1].restore(parts[0].state())
    while not parts[1].finished:
        parts[1].epoch()
    assert whole.finished and (whole.accuracy == parts[1].accuracy).all()
    assert (whole.accuracy[:, -1].mean(1) > 0.4).all() and not (whole.accuracy[:2] == whole.accuracy[2:]).all()
    alone = sequence.Course(config, digits, division, part="val")
    while not alone.finished:
        alone.epoch()
    np.testing.assert_allclose(alone.accuracy, whole.accuracy[2:], atol=0.05)


def test_program(tmp_path):
    done = fork("sequence", "--epochs=1", "--seeds=2", "--widths=8", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "| task 5 " in done.stdout and is_png(tmp_path / "sequence.png")
    assert np.shape(results(tmp_path)["accuracy"]) == (2, 5, 5)
    assert len(list(csv.DictReader((tmp_path / "table.csv").open()))) == 50
    done = fork("sequence", "--warmup_epochs=1", f"--output={tmp_path}")  # it would do nothing
    assert done.returncode != 0 and "Unknown command line flag 'warmup_epochs'" in done.stderr
    done = fork("sequence", "--per_task=3", f"--output={tmp_path}")
    assert done.returncode != 0 and "cannot be divided into tasks of 3" in done.stderr
