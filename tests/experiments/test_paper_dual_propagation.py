"""The program of the dual-propagation paper's tables."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from experiments import data, models, tasks
from experiments.papers import dual_propagation as paper
from tests.experiments.programs import fork, is_png, results, run


def test_every_run_of_table_one_has_the_papers_figures():
    names = [*paper.table_one(0.5, 6, 16), "BP, adversarial"]
    assert all(list(known) == names for known in paper.PAPER.values())


def deep_task():
    return tasks.task(lambda rngs: models.MLP((64, 32, 32, 32, 32, 10), jax.nn.relu, rngs=rngs), tasks.squared_error)


@pytest.fixture(scope="module")
def measured():
    """After 30 iterations on digits, at initial weights: (Lipschitz estimate, residuals) by rule of Table 2."""
    task, digits = deep_task(), data.load("digits")
    one = task.init(jax.random.key(3))
    x, y = jnp.asarray(digits.x_train[:50]), jnp.asarray(digits.y_train[:50])
    return one[0], {
        name: jax.jit(paper.measures(task, rule, x, y))(*one, lrules.Feedback({}, {}))
        for name, rule in paper.table_two(0.5, 30).items()
    }


def test_states_of_the_original_do_not_settle_and_those_of_the_adjoint_do(measured):
    last = {name: float(residual[-1]) for name, (_, residual) in measured[1].items()}
    assert all(residual.shape == (30,) for _, residual in measured[1].values())
    assert max(last["DP^T, alpha=0"], last["DP^T, alpha=1"]) < 1e-4
    assert last["DP, alpha=1"] > paper.SETTLED


def test_the_lipschitz_estimate_is_the_norm_of_the_product(measured):
    params, found = measured
    product = np.eye(64)
    for layer in range(5):
        product = product @ np.asarray(params["layers"][layer]["kernel"][...], np.float64)
    assert float(found["DP, alpha=1"][0]) == pytest.approx(np.linalg.norm(product, 2), rel=1e-4)


def result(loss=0.1, residual=()):
    residual = np.array([residual, residual], float).reshape(2, -1)
    return paper.Result(np.array([0.98, 0.96]), np.array([0.1, loss]), np.array([30.0, 32.0]), residual)


def test_tables_mark_what_has_not_settled():
    assert result().settled and result(residual=(1.0, 1e-3)).settled
    for lost in (result(loss=np.nan), result(residual=(1.0, 0.5)), result(residual=(1.0, np.nan))):
        assert not lost.settled
    found = {"DP, alpha=0": result(residual=(1.0, 0.5)), "DP^T, alpha=0": result(residual=(0.0,))}
    shown = paper.table_two_shown(found)
    assert "97.00 ± 1.41 (X)" in shown and shown.count("(X)") == 1


def test_the_papers_figures_stand_beside_ours_on_its_data_set():
    shown = paper.table_one_shown({"DP, alpha=0": result()}, paper.PAPER["mnist"])
    assert "98.46 ± 0.07" in shown and "29.9 ± 4.2" in shown and "31.0 ± 1.4" in shown
    assert "98.46" not in paper.table_one_shown({"DP, alpha=0": result()}, {})


def test_figure_of_both_tables_or_one(tmp_path):
    one = {name: result(residual=(1.0, 0.5)) for name in paper.PAPER["mnist"]}
    two = {name: result(residual=(1.0, np.nan)) for name in paper.table_two(0.5, 2)}
    for tables in ((one, two), (one, {}), ({}, two)):
        paper.figure(*tables, paper.PAPER["mnist"], "title").savefig(tmp_path / "tables.png")
        assert is_png(tmp_path / "tables.png")


@pytest.mark.slow
def test_program(tmp_path):
    flags = ["--table=2", "--epochs=1", "--seeds=2", "--deep_widths=6,5", "--deep_iterations=3", f"--output={tmp_path}"]
    done = run("papers.dual_propagation", *flags)
    assert done.returncode == 0, done.stderr
    assert "| Table 2 " in done.stdout and "Table 1" not in done.stdout
    found = results(tmp_path)
    assert list(found["table_2"]) == ["DP, alpha=0", "DP, alpha=1", "DP^T, alpha=0", "DP^T, alpha=1"]
    assert np.shape(found["table_2"]["DP^T, alpha=0"]["residual"]) == (2, 3)
    assert found["settings"]["beta"] == 0.5 and "papers.dual_propagation" in found["provenance"]["command"]
    assert len(list(csv.DictReader((tmp_path / "table.csv").open()))) == 8 and is_png(tmp_path / "tables.png")


@pytest.mark.slow
def test_the_tables_on_digits(tmp_path):
    """As it stands, but for fewer seeds: what the paper says of alpha, and that the undamped original fails."""
    done = run("papers.dual_propagation", "--seeds=2", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    found = results(tmp_path)
    steep = {name: np.mean(row["lipschitz"]) for name, row in found["table_1"].items()}
    assert steep["DP^T, alpha=0"] < steep["DP^T, alpha=1/2"] < steep["DP^T, alpha=1"]
    assert steep["DP, alpha=0, inputs nudged"] < steep["DP, alpha=0"] < steep["DP, alpha=1"]
    assert steep["BP, adversarial"] < steep["BP"]
    for name in ("DP, alpha=1", "DP, alpha=1/2", "DP^T, alpha=1", "DP^T, alpha=1/2", "DP^T, alpha=0", "BP"):
        assert np.mean(found["table_1"][name]["accuracy"]) > 0.96, name
    settled = {name: row["settled"] for name, row in found["table_2"].items()}
    assert settled == {"DP, alpha=0": False, "DP, alpha=1": False, "DP^T, alpha=0": True, "DP^T, alpha=1": True}


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--beta=2", 'Error: DP, alpha=1/2: output="squared_error" has a minimiser only if (1 - alpha) beta < 1'),
        ("--activation=tanh", "Error: DP, alpha=1: the activation 'tanh' cannot be damped"),
        ("--beta=0", "Error: beta must be a finite number > 0, got 0.0."),
    ],
)
def test_what_a_rule_refuses_is_told_before_any_trains(tmp_path, flag, sentence):
    done = fork("papers.dual_propagation", flag, f"--output={tmp_path}")
    assert done.returncode != 0 and sentence in done.stderr and "Traceback" not in done.stderr
    assert "epoch" not in done.stderr
