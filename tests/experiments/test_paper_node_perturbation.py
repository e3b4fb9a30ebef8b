"""The program of the node-perturbation paper's figure 1."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from experiments import models, tasks
from experiments.loop import Record
from experiments.papers import node_perturbation as paper
from tests.experiments.programs import is_png, results, run

TOP, MIDDLE = "layers/2/kernel", "layers/1/kernel"


def task():
    return tasks.task(lambda rngs: models.MLP((6, 5, 4, 3), jax.nn.sigmoid, rngs=rngs), loss=tasks.squared_error)


@pytest.fixture(scope="module")
def setting():
    made = task()
    params, state = made.init(jax.random.key(0))
    x, y = jax.random.uniform(jax.random.key(1), (20, 6)), jnp.arange(20) % 3
    return made, params, state, x, y


def measured(setting, rule, change=lambda leaf: leaf):
    made, params, state, x, y = setting
    feedback = rule.init(jax.random.key(2), made.net, params, (state, x))
    params = jax.tree.map(change, params)
    return feedback, params, paper.measure(made, rule, x, y)(params, state, feedback, jax.random.key(3))


def test_backprop_has_the_weights_themselves(setting):
    _, _, found = measured(setting, lrules.backprop())
    assert list(found) == [MIDDLE, TOP]
    for layer in found.values():
        assert (layer.relative_error, layer.sign_agreement) == (0, 1) and layer.angle < 0.1


@pytest.mark.parametrize(
    "rule",
    [lrules.node_perturbation(0.01, solver="rls"), pytest.param(lrules.feedback_alignment(), marks=pytest.mark.slow)],
)
def test_figures_of_one_layer(setting, rule):
    """By hand: |B - W| / |W|, signs; and the angle below the top layer, where e B^T meets the derivative."""
    feedback, params, found = measured(setting, rule)
    b = feedback.fixed[TOP] if feedback.fixed else feedback.state[TOP]["b"]
    w = params["layers"][2]["kernel"][...]
    b, w = np.asarray(b, float), np.asarray(w, float)
    assert float(found[TOP].relative_error) == pytest.approx(np.linalg.norm(b - w) / np.linalg.norm(w), rel=1e-4)
    assert float(found[TOP].sign_agreement) == pytest.approx(np.mean(np.sign(b) == np.sign(w)))

    _, _, _, x, y = setting
    layers = [{k: np.asarray(v[...], float) for k, v in params["layers"][i].items()} for i in range(3)]
    h = [np.asarray(x, float)]
    for layer in layers[:2]:
        h.append(1 / (1 + np.exp(-(h[-1] @ layer["kernel"] + layer["bias"]))))
    e = h[2] @ w + layers[2]["bias"] - np.eye(3)[np.asarray(y)]
    ours, true = (h[1].T @ ((e @ m.T) * h[2] * (1 - h[2])) for m in (b, w))
    cosine = (ours * true).sum() / np.linalg.norm(ours) / np.linalg.norm(true)
    assert float(found[TOP].angle) == pytest.approx(np.degrees(np.arccos(cosine)), abs=0.1)


def test_what_is_lost_is_no_number(setting):
    _, _, found = measured(setting, lrules.feedback_alignment(), lambda leaf: leaf * jnp.nan)
    assert all(np.isnan(figure) for layer in found.values() for figure in layer)


def test_table_has_the_notebooks_figures():
    record = Record(1, *(np.array([v, v]) for v in (0.1, 0.1, 0.96, 9.0)), 1.0)
    layers = {TOP: paper.Alignment(*(np.array([v, v]) for v in (0.5, 12.0, 0.75)))}
    shown = paper.table({"FA": [record]}, {"FA": [layers]}, paper.NOTEBOOKS)
    assert all(text in shown for text in ("4.00 ± 0.00", " 4.28 ", " 0.50 ", " 12.0 ", " 75 ")) and "(X)" not in shown
    lost = paper.table({"FA": [record._replace(train_loss=np.array([np.nan, 1]))]}, {"FA": [layers]}, {})
    assert "4.00 ± 0.00 (X)" in lost and "4.28" not in lost
    assert set(paper.runs([1e-4, 1e-3, 1e-2, 1e-1], "sgd")) == set(paper.NOTEBOOKS)


@pytest.mark.slow
def test_program(tmp_path):
    flags = ["--stds=0.01", "--solver=sgd", "--epochs=2", "--seeds=2", "--widths=6,5", f"--output={tmp_path}"]
    done = run("papers.node_perturbation", *flags)
    assert done.returncode == 0, done.stderr
    assert "| NP, std 0.01 " in done.stdout and "epoch 2/2" in done.stderr
    found = results(tmp_path)
    assert list(found["runs"]) == ["BP", "FA", "NP, std 0.01"] and found["config"]["warmup_epochs"] == 1
    assert len(found["runs"]["FA"]["layers"]) == 3  # before the first epoch, and after each
    rows = list(csv.DictReader((tmp_path / "curves.csv").open()))
    assert len(rows) == 3 * 2 * 2 * 2 and {row["layer"] for row in rows} == {MIDDLE, TOP}
    assert is_png(tmp_path / "figure_1.png")


@pytest.mark.slow
def test_figure_one_on_digits(tmp_path):
    """As it stands, but for seeds and noise: learned feedback points where the true gradient does, better than FA's."""
    done = run("papers.node_perturbation", "--stds=0.001", "--seeds=3", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    found = results(tmp_path)["runs"]
    last = {name: found[name]["layers"][-1] for name in found}
    for layer in (MIDDLE, TOP):
        ours, fixed = (np.mean(last[name][layer]["angle"]) for name in ("NP, std 0.001", "FA"))
        assert ours < 0.7 * fixed, (layer, ours, fixed)
    assert found["BP"]["accuracy"]["mean"] > 0.9 and found["NP, std 0.001"]["accuracy"]["mean"] > 0.88
