"""The session on a GPU, as far as a CPU can run it: each part tiny, what is kept, what fails, and its tables."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import benchmark, loop, models, rules
from experiments.errors import InputError
from experiments.gpu import cells, convolutional, report, session, steps
from tests.experiments.programs import fork, run
from tests.experiments.test_loop import make_run, make_task, tiny

PARTS = ("correctness", "steps", "seeds", "more_steps", "convolutional", "cells")


@pytest.mark.slow
def test_the_whole_session_tiny(tmp_path):
    done = run("gpu", "--tiny", "--minutes=60", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    for part in PARTS:
        entries = json.loads((tmp_path / f"{part}.json").read_text())
        assert entries and not [key for key in entries if {"failed", "skipped"} & set(entries[key])], part
    assert "Left out, and failures" not in done.stdout and "| feedback_alignment " in done.stdout
    assert len(list(tmp_path.iterdir())) == 7  # as many files as come back from a borrowed machine


def test_data_are_asked_for(tmp_path):
    done = fork("gpu", f"--output={tmp_path}")
    assert done.returncode == 1 and "--data=FOLDER" in done.stderr and "Traceback" not in done.stderr


def test_results_survive_and_failures_are_written_down(tmp_path):
    results = session.Results(tmp_path, "part")
    with results.guard("wrong"):
        raise ValueError("no such thing")
    results.put("right", {"value": np.float32(0.5)})
    assert list(results.todo({"right": 1, "wrong": 1, "late": 100}, session.Clock(50))) == ["wrong"]
    again = session.Results(tmp_path, "part")
    assert again.done("right") and not again.done("wrong") and not again.done("late")
    assert again.entries["right"] == {"value": 0.5} and "no such thing" in again.entries["wrong"]["failed"]
    assert "50 s were left" in again.entries["late"]["skipped"]
    assert [path.name for path in tmp_path.iterdir()] == ["part.json"]


def test_a_loop_takes_the_same_steps():
    """The sum of the losses and the gradient of a loop of four steps, against the step itself."""
    task = make_task()
    rule = rules.parse("feedback_alignment")
    params, state = session.drawn_model(task, 0)
    x, y = jnp.asarray(tiny().x_train[:10]), jnp.asarray(tiny().y_train[:10])
    feedback, *_ = session.drawn_feedback(task, rule, params, state, x, 1)
    step = benchmark.Step(benchmark.rule_step(task, rule), (params, feedback, state, x, y))
    total, (_, grads) = steps.looped(step, 4)(*step.arguments)
    value, _, expected = step.function(*step.arguments)
    np.testing.assert_allclose(total, 4 * value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads.params, expected.params)


def test_each_position_has_its_rate_and_its_feedback():
    """Two seeds that are equal but for the rate: the one with none stays where it is."""
    run = make_run(rules.parse("feedback_alignment"), optimizer=session.rated(optax.sgd), seeds=(3, 3))
    session.set_rates(run, (0.0, 0.1))
    session.scale_feedback(run, (1.0, 0.5))
    before = jax.tree.map(np.asarray, (run.carry.params, run.carry.feedback.fixed))
    run.epoch()
    still, moved = (
        [float(np.abs(np.asarray(a)[i] - b[i]).max()) for a, b in zip(*map(jax.tree.leaves, pair), strict=True)]
        for i, pair in enumerate([(run.carry.params, before[0])] * 2)
    )
    assert max(still) == 0 and min(moved) > 0
    for leaf in jax.tree.leaves(before[1]):
        np.testing.assert_allclose(leaf[1], 0.5 * leaf[0])


@pytest.mark.foreign  # map_coordinates mixes dtypes
def test_augmentation_moves_images_and_keeps_their_shape():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 12, 12, 3)), jnp.float32)
    for augment in (cells.crop, cells.augment_colours):
        changed = augment(jax.random.key(0), x)
        assert changed.shape == x.shape and bool(jnp.isfinite(changed).all())
        assert len({float(jnp.abs(a - b).mean()) for a, b in zip(changed, x, strict=True)}) > 1
    ones = jnp.ones((2, 8, 8, 3))
    middle = cells.augment_colours(jax.random.key(1), ones)[:, 3:5, 3:5]
    assert bool((jnp.abs(middle - 1) < 0.5).all())  # away from the border a plain image stays plain
    np.testing.assert_allclose(middle, jnp.broadcast_to(middle[:, :1, :1, :1], middle.shape), rtol=1e-5)


def test_cells_and_settings_are_what_they_say():
    table = {str(cell): cell for cell in cells.cells(tiny=False)}
    assert table["LeNet-5, CIFAR-10, BackMAN"].paper == "66.27" and len(table) == 12
    assert all(cells.rule_of(cell) for cell in table.values())
    groups = list(convolutional.settings_in_order(tiny=False))
    assert len({str(setting) for group in groups for setting in group}) == sum(map(len, groups)) == 26
    first, later = steps.groups(tiny=False)
    named = [str(case) for group in (*first.values(), *later.values()) for case in group]
    assert len(set(named)) == len(named)


def test_convolutional_nets_take_an_activation():
    for net in (models.LeNet5, models.CNN):
        task = loop.task(lambda rngs, net=net: net((8, 8, 3), 4, rngs=rngs, activation=jnp.tanh))
        text = str(jax.make_jaxpr(task.net)(*_model_and_batch(task)))
        assert "tanh" in text


def _model_and_batch(task):
    params, state = session.drawn_model(task, 0)
    return params, (state, jnp.zeros((2, 8, 8, 3)))


def test_tables_name_what_is_missing(tmp_path):
    results = session.Results(tmp_path, "seeds")
    results.put("net, backprop", {"skipped": "3 s were left"})
    assert "- seeds, net, backprop: 3 s were left" in report.tables(tmp_path)


def test_another_folder_is_an_input_error():
    with pytest.raises(InputError, match="--data=FOLDER"):
        session.settings(None, tiny=False)
