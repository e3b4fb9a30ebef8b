"""The fast gradient sign method: on a linear model in closed form, in training and under attack."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrules
from experiments import adversarial, compare, results, tasks
from experiments.config import Config
from experiments.errors import InputError
from tests.experiments import programs
from tests.experiments.programs import fork
from tests.experiments.test_loop import make_run, make_task, tiny


def test_closed_form_on_a_linear_model():
    """L = (w x - y)^2 / 2 per example: sign(dL/dx) = sign((w x - y) w), and 0 where w is."""
    w, y = jnp.array([1.0, -2.0, 0.0]), jnp.array([0.0, 10.0])
    x = jnp.array([[1.0, 0.0, 3.0], [1.0, 0.0, 3.0]])
    moved = adversarial.fgsm(lambda x: 0.5 * (x @ w - y) ** 2, x, 0.1)
    np.testing.assert_allclose(moved, [[1.1, -0.1, 3.0], [0.9, 0.1, 3.0]], rtol=1e-6)


def test_the_signs_are_those_of_finite_differences():
    weights = jax.random.normal(jax.random.key(0), (6, 4))
    x, y = jax.random.normal(jax.random.key(1), (3, 6)), jnp.array([0, 1, 3])

    def loss(x):
        return tasks.cross_entropy(jnp.tanh(x @ weights), y)

    step = np.sign(adversarial.fgsm(loss, x, 0.5) - x)
    for i in range(x.size):
        nudge = 1e-2 * jnp.eye(x.size)[i].reshape(x.shape)
        assert step.ravel()[i] == np.sign(loss(x + nudge).sum() - loss(x - nudge).sum())


def test_no_step_is_no_step_and_wrong_steps_are_refused():
    x = jnp.ones((2, 3))
    assert adversarial.fgsm(lambda x: 1 / 0, x, 0.0) is x  # type: ignore[arg-type,return-value]
    for epsilon in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="adversarial step must be 0 .none. or"):
            adversarial.fgsm(lambda x: x, x, epsilon)
        with pytest.raises(InputError, match="adversarial step must be 0"):
            make_run(attack=epsilon)


def test_training_step_is_a_plain_step_on_the_moved_batch():
    task, dataset, epsilon = make_task(), tiny(), 0.3
    ours = make_run(lrules.feedback_alignment(), task, dataset, fgsm=epsilon, batch_size=40, seeds=(0,))
    params, state = jax.tree.map(lambda a: jnp.copy(a[0]), (ours.carry.params, ours.carry.state))
    feedback = jax.tree.map(lambda a: jnp.copy(a[0]), ours.carry.feedback)
    x, y = jnp.asarray(dataset.x_train), jnp.asarray(dataset.y_train)

    def losses(x):
        return tasks.cross_entropy(task.net(params, (state, x))[0], y)

    x = x + epsilon * jnp.sign(jax.grad(lambda x: losses(x).sum())(x))
    value_and_grad = lrules.value_and_grad(task.net, tasks.cross_entropy, lrules.feedback_alignment())
    (value, *_), grads = value_and_grad(params, feedback, (state, x), y)
    record = ours.epoch()
    assert record.train_loss[0] == pytest.approx(float(value), rel=1e-5)
    expected = optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, grads.params))
    for a, b in zip(jax.tree.leaves(ours.carry.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-6)


def test_accuracy_falls_under_attack_and_less_so_after_adversarial_training():
    plain = make_run(attack=0.5, task=make_task(widths=(16,)), dataset=tiny(400))
    robust = make_run(attack=0.5, task=make_task(widths=(16,)), dataset=tiny(400), fgsm=0.5)
    for _ in range(10):
        records = plain.epoch(), robust.epoch()
    assert records[0].accuracy.min() > 0.9
    assert (records[0].attacked < records[0].accuracy - 0.05).all()
    assert (records[1].attacked > records[0].attacked).all(), records
    figures = results.summary([records[0]])
    assert figures["attacked"]["mean"] == pytest.approx(records[0].attacked.mean())
    assert np.shape(figures["curves"]["attacked"]) == (1, 2)


def test_without_attack_nothing_is_measured():
    task = make_task()
    record = make_run(task=task).epoch()
    assert record.attacked is None and "attacked" not in results.summary([record])
    assert (make_run(task=task, attack=0.1).epoch().accuracy == record.accuracy).all()


def test_comparison_shows_the_attack():
    rules = {"backprop": lrules.backprop()}
    config = Config(epochs=1, batch_size=10, attack=0.5, optimizer="sgd", learning_rate=0.1)
    trials, _ = compare.make_trials(config, tiny(), rules, task=make_task())
    compare.train(trials)
    header, _, row = (line.split("|") for line in compare.table(trials).splitlines())
    attacked = trials["backprop"].records[0].attacked[0]
    assert float(row[header.index(" under attack (%) ")]) == pytest.approx(100 * attacked, abs=0.01)


def test_train_under_attack(tmp_path):
    done = fork("train", "--widths=8", "--epochs=1", "--fgsm=0.01", "--attack=0.02", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "test accuracy under attack (%)" in done.stdout and programs.results(tmp_path)["attacked"]["mean"] > 0
    assert "attacked" in (tmp_path / "curves.csv").read_text().splitlines()[0]


def test_negative_flag_is_told_in_a_sentence(tmp_path):
    done = fork("train", "--fgsm=-0.1", f"--output={tmp_path}")
    assert done.returncode != 0 and "Error: fgsm must be a number >= 0, got -0.1." in done.stderr
    assert "Traceback" not in done.stderr
