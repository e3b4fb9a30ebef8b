"""Warm-up of learned feedback: the forward weights stay, the feedback learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrules
from experiments import compare, data, models, tasks
from experiments.config import Config
from experiments.optimizers import Optimizers
from tests.experiments.programs import fork, results
from tests.experiments.test_loop import Normalised, learning_feedback, make_run, make_task, tiny
from tests.sampling import mostly_slow


def same(a, b):
    return all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


RULES = {
    "sgd": lrules.node_perturbation(1e-2),
    "rls": lrules.node_perturbation(1e-2, solver="rls"),
    "direct": lrules.node_perturbation(1e-2, direct=True),
    "adaptive": lrules.direct_feedback_alignment(adaptive=True),
    "kolen_pollack": lrules.kolen_pollack(),
    "weight_mirror": lrules.weight_mirror(),
}


@pytest.mark.parametrize("name", mostly_slow(RULES, ["rls", "adaptive", "weight_mirror"]))
def test_only_the_feedback_moves(name):
    """Bit for bit: forward weights, their optimizer's state and the model's state; the optimizer has a memory."""
    run = make_run(RULES[name], optimizer=optax.sgd(1e-2, momentum=0.9), seeds=(3, 4))
    before = jax.tree.map(jnp.copy, run.carry)
    run.warm_up(2)
    after = run.carry
    assert same(before.params, after.params) and same(before.state, after.state)
    assert same(before.optimizer[0], after.optimizer[0])
    learned = before.feedback.learned, before.feedback.state
    assert not same(learned, (after.feedback.learned, after.feedback.state))
    if before.feedback.learned:
        assert not same(before.optimizer[1], after.optimizer[1])
    assert run.epochs == 0 and run.epoch().epoch == 1
    assert not same(before.params, run.carry.params)


def test_each_step_is_one_of_the_phase_too():
    """The feedback of weight mirrors learns while the weights do, by the optimizer of the feedback alone."""
    for rate in (0.3, 0.0):
        optimizers = Optimizers(optax.sgd(1e-2, momentum=0.9), optax.sgd(rate))
        run = make_run(lrules.weight_mirror(phase="estimation"), optimizer=optimizers)
        before = jax.tree.map(jnp.copy, run.carry)
        run.epoch()
        assert not same(before.params, run.carry.params)
        assert same(before.feedback.learned, run.carry.feedback.learned) == (rate == 0)


def test_the_averages_of_batch_norm_stay():
    run = make_run(lrules.direct_feedback_alignment(adaptive=True), tasks.task(Normalised))
    before = jax.tree.map(jnp.copy, run.carry)
    run.warm_up(1)
    assert same(before.state, run.carry.state) and not same(before.feedback.learned, run.carry.feedback.learned)


def test_a_warm_up_goes_on_to_the_last_bit():
    """Stopped inside its second epoch, and its state taken up by a new run."""
    whole, first, second = (make_run(lrules.direct_feedback_alignment(adaptive=True)) for _ in range(3))
    assert whole.warm_up(2)
    parts = []
    assert not first.warm_up(2, parts=4, advance=lambda steps: parts.append(steps) or len(parts) == 6)
    assert (first.warmed, first.step, first.epochs) == (1, 2, 0)
    second.restore(first.state())
    assert second.warm_up(2) and second.warm_up(2)  # once more does nothing
    assert same(second.carry, whole.carry)
    assert (second.epoch().train_loss == whole.epoch().train_loss).all()


def test_a_rule_that_learns_no_feedback_has_nothing_to_warm_up():
    steps = []
    warm, cold = make_run(lrules.feedback_alignment()), make_run(lrules.feedback_alignment())
    warm.warm_up(3, advance=steps.append)
    assert not steps and (warm.epoch().train_loss == cold.epoch().train_loss).all()


def test_epochs_after_a_warm_up_see_the_batches_that_they_would_see_without():
    """A rule whose feedback does not matter trains the same with and without."""
    warm, cold, steps = make_run(learning_feedback()), make_run(learning_feedback()), []
    warm.warm_up(2, parts=2, advance=steps.append)
    assert steps == [2, 2] * 2 and (warm.carry.feedback.state["count"] == 8).all()
    np.testing.assert_allclose(warm.epoch().train_loss, cold.epoch().train_loss, rtol=1e-6)
    assert (warm.carry.feedback.state["count"] == 12).all()


def test_feedback_has_a_rate_of_its_own():
    optimizers = Optimizers(optax.sgd(0.1), optax.sgd(0.5))
    run = make_run(learning_feedback(stochastic=False), optimizer=optimizers)
    plain = make_run(lrules.backprop())
    assert (run.epoch().train_loss == plain.epoch().train_loss).all()
    np.testing.assert_allclose(run.carry.feedback.learned["c"], 1 - 4 * 0.5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["sgd", "rls"])
def test_node_perturbation_aligns_with_the_weights_on_digits(solver):
    """Before the warm-up the top layer's B and W stand at right angles, more or less; after it they do not."""
    rule = lrules.node_perturbation(1e-3, solver=solver)
    task = tasks.task(lambda rngs: models.MLP((64, 20, 12, 10), jnp.tanh, rngs=rngs))
    run = make_run(rule, task, data.load("digits"), optimizer=optax.sgd(0.3), batch_size=32, seeds=(0, 1, 2))

    def angles():
        found = jax.vmap(lrules.diagnostics.weight_alignment)(run.carry.feedback, run.carry.params)
        return np.asarray(found["layers/2/kernel"].angle)

    before = angles()
    run.warm_up(2)
    assert (before > 70).all() and (angles() < before - 20).all(), (before, angles())


def test_compare_counts_epochs_after_the_warm_up():
    rules = {"backprop": lrules.backprop(), "learns": lrules.node_perturbation(1e-2)}
    config = Config(epochs=2, batch_size=10, optimizer="sgd", learning_rate=0.1)

    def records(config):
        trials, _ = compare.make_trials(config, tiny(), rules, task=make_task())
        compare.train(trials)
        return {name: trial.records for name, trial in trials.items()}

    warm, cold = records(config.replace(warmup_epochs=3)), records(config)
    assert [r.epoch for r in warm["learns"]] == [1, 2]
    assert warm["backprop"][-1].train_loss == cold["backprop"][-1].train_loss
    assert warm["learns"][-1].train_loss != cold["learns"][-1].train_loss


def test_train_says_that_there_is_nothing_to_warm_up(tmp_path):
    done = fork("train", "--widths=8", "--epochs=1", "--warmup_epochs=1", f"--output={tmp_path}")
    assert done.returncode == 0 and "nothing to warm up" in done.stdout


def test_train_with_a_warm_up(tmp_path):
    flags = ["--rule=node_perturbation(std=0.01)", "--widths=8", "--epochs=1", "--warmup_epochs=1"]
    done = fork("train", *flags, "--feedback_learning_rate=0.01", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "warm-up" in done.stderr and "epoch 1/1" in done.stderr
    settings = results(tmp_path)["config"]
    assert settings["warmup_epochs"] == 1 and settings["feedback_learning_rate"] == 0.01
