"""Tasks made of a data set: classes chosen, drawn and divided."""

import numpy as np
import pytest

from experiments import data, subsets
from experiments.errors import InputError


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_chosen_classes_are_numbered_in_the_order_given(digits):
    chosen = subsets.choose(digits, [8, 3, 5])
    assert chosen.classes == 3 and chosen.name == "digits[8,3,5]"
    for part, old in ((chosen.y_train, digits.y_train), (chosen.y_test, digits.y_test)):
        assert (np.bincount(part) == np.bincount(old)[[8, 3, 5]]).all()
    assert (chosen.x_train[chosen.y_train == 1] == digits.x_train[digits.y_train == 3]).all()
    assert (chosen.x_test[chosen.y_test == 0] == digits.x_test[digits.y_test == 8]).all()
    assert chosen.y_train.dtype == np.int32


def test_classes_are_drawn_by_the_seed(digits):
    names = [subsets.choose(digits, 2, seed=seed).name for seed in range(20)]
    assert names[0] == subsets.choose(digits, 2, seed=0).name
    assert len(set(names)) > 10 and subsets.choose(digits, 2).classes == 2
    drawn = subsets.choose(digits, 10, seed=1)
    assert len(drawn.x_train) == len(digits.x_train) and not (drawn.y_train == digits.y_train).all()


def test_validation_examples_are_chosen_too(digits):
    chosen = subsets.choose(data.split_validation(digits, 0.2), [0, 1])
    assert set(chosen.y_val) == {0, 1} and len(chosen.x_val) == len(chosen.y_val) < 70


def test_rows_on_the_disk_stay_there(tmp_path, digits):
    for name in data.NAMES:
        np.save(tmp_path / f"{name}.npy", getattr(digits, name))
    chosen = subsets.choose(data.load(f"npy:{tmp_path}"), [3, 8])
    assert not isinstance(chosen.x_train, np.ndarray)
    assert (np.asarray(chosen.x_train) == subsets.choose(digits, [3, 8]).x_train).all()


@pytest.mark.parametrize(("text", "classes"), [("2", 2), ("3,8", [3, 8]), (" 0 , 1 ", [0, 1])])
def test_classes_as_text(text, classes):
    assert subsets.parse_classes(text) == classes


@pytest.mark.parametrize("text", ["", "a", "3,", "-1,2", "1.5", "²"])
def test_wrong_classes_as_text(text):
    with pytest.raises(InputError, match="as in 2, or their labels, as in 3,8, got"):
        subsets.parse_classes(text)


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (1, "must be from 2 to 10, the classes of digits, got 1"),
        (11, "must be from 2 to 10"),
        ([3, 10], "digits has no class 10: use the classes 0 to 9"),
        ([3, -1], "digits has no class -1"),
        ([3, 3], "at least two classes, each once, got 3, 3"),
        ([3], "at least two classes, each once, got 3"),
        ([], "each once, got none"),
    ],
)
def test_wrong_classes(digits, classes, words):
    with pytest.raises(InputError, match=words):
        subsets.choose(digits, classes)


def test_classes_without_examples(digits):
    few = digits._replace(x_test=digits.x_test[digits.y_test > 1], y_test=digits.y_test[digits.y_test > 1])
    with pytest.raises(InputError, match="digits has no test examples of the classes chosen"):
        subsets.choose(few, [0, 1])
    assert set(subsets.choose(few, [0, 2]).y_test) == {1}
    few = digits._replace(x_train=digits.x_train[digits.y_train != 1], y_train=digits.y_train[digits.y_train != 1])
    with pytest.raises(InputError, match="digits has no train examples of class 1: choose other classes"):
        subsets.choose(few, [0, 1])


def groups(classes):
    return [frozenset(group) for group in classes.tolist()]


def test_tasks_hold_every_class_once(digits):
    classes = subsets.divide(digits, seed=0)
    assert classes.shape == (5, 2) and sorted(classes.ravel()) == list(range(10))
    assert groups(classes) == groups(subsets.divide(digits, seed=0)) != groups(subsets.divide(digits, seed=1))
    assert subsets.divide(digits, seed=0, per_task=5).shape == (2, 5)


@pytest.mark.parametrize("per_task", [2, 5])
def test_tuning_has_other_groups(digits, per_task):
    for seed in range(20):
        one, other = (
            groups(subsets.divide(digits, seed=seed, per_task=per_task, tuning=tuning)) for tuning in (False, True)
        )
        assert not set(one) & set(other) and len(set(other)) == 10 // per_task


@pytest.mark.parametrize("per_task", [1, 3, 10, 20])
def test_tasks_that_cannot_be(digits, per_task):
    with pytest.raises(InputError, match=f"10 classes of digits cannot be divided into tasks of {per_task}"):
        subsets.divide(digits, seed=0, per_task=per_task)
