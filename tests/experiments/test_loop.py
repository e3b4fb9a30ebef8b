"""The training loop: seeds, learned feedback, states, BatchNorm, and agreement with a plain loop."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lrules
from experiments import data, loop, methods, models, results, tasks
from experiments.errors import InputError


def tiny(examples=40, shape=(4, 4, 1), seed=0):
    """Three classes of noisy images."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, 2 * examples).astype(np.int32)
    x = (rng.normal(size=(2 * examples, *shape)) + y[:, None, None, None]).astype(np.float32)
    return data.Dataset(x[:examples], y[:examples], x[examples:], y[examples:], 3, "tiny")


def make_task(model="mlp", shape=(4, 4, 1), **options):
    return tasks.task(lambda rngs: models.build(model, shape, 3, rngs=rngs, **({"widths": (5,)} | options)))


def make_run(rule=None, task=None, dataset=None, **options):
    """A run on a tiny set; options of the run, and others, which are those of `methods.by_rule`."""
    options = {"optimizer": optax.sgd(0.1), "batch_size": 10, "seeds": (0, 1)} | options
    own = {name: options.pop(name) for name in list(options) if name in inspect.signature(methods.by_rule).parameters}
    method = methods.by_rule(task or make_task(), rule or lrules.backprop(), own.pop("optimizer"), **own)
    return loop.Run(method, dataset or tiny(), **options)


def learning_feedback(stochastic=True):
    """Backprop with a feedback weight that learns, a state that counts and use for a key: what a rule may need."""

    def init(key, net, params, inputs):
        return lrules.Feedback(
            {"b": jax.random.normal(key, (2,))}, {"c": jnp.ones(3)}, {"count": jnp.zeros((), jnp.int32)}
        )

    def value_and_grad(net, loss):
        plain = lrules.value_and_grad(net, loss, lrules.backprop())

        def fn(params, feedback, inputs, targets, *, rng=None):
            head, grads = plain(params, lrules.Feedback({}, {}), inputs, targets)
            noise = jax.random.normal(rng, (3,)) if stochastic else jnp.ones(3)
            return head, grads._replace(feedback={"c": noise}, state={"count": feedback.state["count"] + 1})

        return fn

    return lrules.Rule(init, lrules.backprop().transform, value_and_grad, stochastic=stochastic)


def test_loop_is_a_plain_training_loop():
    """Three epochs of the compiled loop against optax steps of jax.value_and_grad in the same order."""
    dataset, task, optimizer = tiny(), make_task(), optax.sgd(0.05, momentum=0.9)
    run = make_run(task=task, dataset=dataset, optimizer=optimizer, seeds=(7,))
    params, state = jax.tree.map(lambda a: a[0], (run.carry.params, run.carry.state))
    optimizer_state = optimizer.init(params)

    def objective(params, x, y):
        return tasks.cross_entropy(task.net(params, (state, x))[0], y).mean()

    for epoch in range(3):
        order = np.asarray(run.order(epoch)[0])
        assert sorted(order.ravel()) == list(range(40))
        record = run.epoch()
        losses = []
        for batch in order:
            x, y = jnp.asarray(dataset.x_train[batch]), jnp.asarray(dataset.y_train[batch])
            value, grads = jax.value_and_grad(objective)(params, x, y)
            updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
            params = optax.apply_updates(params, updates)
            losses.append(value)
        assert record.epoch == epoch + 1
        np.testing.assert_allclose(record.train_loss, [np.mean(losses)], rtol=1e-5)
    for ours, plain in zip(jax.tree.leaves(run.carry.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours[0], plain, rtol=1e-4, atol=1e-6)
    logits = task.net(params, (state, jnp.asarray(dataset.x_test)))[0]
    assert record.accuracy[0] == pytest.approx(np.mean(logits.argmax(-1) == dataset.y_test))
    assert record.angle[0] == 0


def test_a_seed_alone_gives_what_it_gives_among_others():
    rule, task = lrules.feedback_alignment(), make_task()
    together = make_run(rule, task, seeds=(3, 4, 5))
    alone = make_run(rule, task, seeds=(4,))
    for _ in range(2):
        several, single = together.epoch(), alone.epoch()
    assert several.train_loss[1] == pytest.approx(single.train_loss[0], rel=1e-5)
    assert several.angle[1] == pytest.approx(single.angle[0], abs=0.01)
    assert len(set(several.train_loss.tolist())) == 3


def test_many_convolutions_take_their_steps_one_by_one_on_an_accelerator(monkeypatch):
    records = {}
    for many in (1, loop.MANY):
        monkeypatch.setattr(loop, "MANY", many)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # what the loop asks
        run = make_run(task=make_task("cnn"))
        assert run._looped == (many > 2) and len(run._stops(2)) == (2 if many > 2 else 4)
        records[many] = run.epoch()
    for name in ("train_loss", "test_loss"):
        np.testing.assert_allclose(*(getattr(record, name) for record in records.values()), rtol=1e-5)


def test_parts_of_an_epoch_make_the_epoch():
    task, steps = make_task(), []
    whole, parts = make_run(task=task), make_run(task=task)
    assert (whole.epoch().train_loss == parts.epoch(parts=3, advance=steps.append).train_loss).all()
    assert steps == [2, 2]


@pytest.mark.parametrize("stochastic", [True, False])
def test_learned_feedback_state_and_keys(stochastic):
    run = make_run(learning_feedback(stochastic))
    fixed = np.asarray(run.carry.feedback.fixed["b"])
    run.epoch()
    feedback = run.carry.feedback
    assert (feedback.state["count"] == 4).all() and (feedback.fixed["b"] == fixed).all()
    if stochastic:
        assert len(np.unique(feedback.learned["c"])) == 6  # another key for each seed and step
    else:
        np.testing.assert_allclose(feedback.learned["c"], 1 - 4 * 0.1, rtol=1e-5)


class Normalised(nnx.Module):
    """A convolution and a dense layer around BatchNorm."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.out = nnx.Linear(4 * 16, 3, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.conv(x)))
        return self.out(x.reshape(len(x), -1))


def test_batch_statistics_are_carried_and_used():
    """Training normalises by the batch and keeps the average, evaluation takes the average."""
    run = make_run(lrules.direct_feedback_alignment(), tasks.task(Normalised), optimizer=optax.sgd(0.0))
    before, dataset = jax.tree.map(np.asarray, run.carry.params), tiny()
    record = run.epoch()
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (before, run.carry.params)), strict=True))
    mean = run.carry.state["norm"]["mean"][...]
    model = Normalised(nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda a: a[1], (run.carry.params)))
    images = model.conv(jnp.asarray(dataset.x_train))
    np.testing.assert_allclose(mean[1], images.mean((0, 1, 2)), atol=0.5)
    assert mean.shape == (2, 4) and (mean != 0).all()
    nnx.update(model, jax.tree.map(lambda a: a[1], (run.carry.state)))
    model.eval()
    accuracy = (model(jnp.asarray(dataset.x_test)).argmax(-1) == dataset.y_test).mean()
    assert record.accuracy[1] == pytest.approx(float(accuracy)) and (record.angle > 1).all()


def test_evaluation_counts_every_example_once():
    run, dataset = make_run(), tiny()
    whole = run.evaluate(jnp.asarray(dataset.x_test), jnp.asarray(dataset.y_test))
    batches = run.evaluate(jnp.asarray(dataset.x_test), jnp.asarray(dataset.y_test), batch_size=7)
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(whole[name], batches[name], rtol=1e-5)


def test_augmentation_sees_a_key_and_the_batch():
    blank = make_run(augment=lambda key, x: jax.random.normal(key, x.shape) * 0)
    assert blank.epoch().train_loss == pytest.approx(np.log(3), abs=0.1)


def test_nan_is_an_error_only_when_asked():
    dataset, task = tiny(), make_task(activation="relu")
    dataset.x_train[3] = 1e38
    assert not np.isfinite(make_run(task=task, dataset=dataset).epoch().train_loss).all()
    with pytest.raises(InputError, match="loss of seed 0 became NaN or Inf in epoch 1, step .: lower the"):
        make_run(task=task, dataset=dataset, check_nan=True).epoch()


def test_what_cannot_be_trained_is_told_in_a_sentence():
    with pytest.raises(InputError, match="batch size must be <= 40, the number of training examples of tiny, got 41"):
        make_run(batch_size=41)
    with pytest.raises(methods.Refused, match="'nowhere' matches no layer"):
        make_run(lrules.partition({"nowhere": lrules.backman(), ".*": lrules.backprop()}))


def test_a_fault_of_the_model_is_shown_as_it_is():
    class Wrong(nnx.Module):
        def __init__(self, rngs):
            self.out = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x):
            if x.shape[0] == 10:
                raise ValueError("this model counts to nine")
            return self.out(x.reshape(len(x), -1))

    with pytest.raises(ValueError, match="this model counts to nine") as caught:
        make_run(lrules.feedback_alignment(), tasks.task(Wrong))
    assert not isinstance(caught.value, InputError)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"step": lambda carry, key, x, y: (carry, jnp.zeros(len(y)))}, "one number as its loss, got shape"),
        ({"evaluate": lambda carry, x, y: {"score": jnp.zeros(len(y))}}, "must return a 'loss', got score"),
        ({"evaluate": lambda carry, x, y: {"loss": jnp.zeros(())}}, "a number for each of the 40 examples"),
    ],
)
def test_what_a_method_of_ones_own_must_return(change, sentence):
    method = methods.Method(
        lambda key, x, y: jnp.zeros(3),
        lambda carry, key, x, y: (carry, 0.5),
        lambda carry, x, y: {"loss": y.astype(jnp.float32)},
    )
    assert loop.Run(method, tiny(), batch_size=10).epoch().train_loss == 0.5
    with pytest.raises(InputError, match=sentence):
        loop.Run(method._replace(**change), tiny(), batch_size=10).epoch()


@pytest.mark.parametrize("layers", [False, True])
def test_the_curve_has_what_is_measured_inside_an_epoch(layers):
    run = make_run(lrules.feedback_alignment(), record_every=2, layers=layers)
    record = run.epoch()
    assert [(r["epoch"], r["step"]) for r in run.curve] == [(1, 2), (1, 4)]
    first, last = run.curve
    alone = make_run(lrules.feedback_alignment(), record_every=2)
    alone.epoch(parts=2, advance=lambda steps: True)  # it stops after two steps
    np.testing.assert_allclose(first["train_loss"], alone.state()["losses"][:, :2].mean(1), rtol=1e-6)
    of_both = (first["train_loss"] + last["train_loss"]) / 2  # each has the loss of its own two steps
    np.testing.assert_allclose(of_both, record.train_loss, rtol=1e-6)
    assert (last["angle"] == record.angle).all() and not (first["angle"] == last["angle"]).all()
    names = {"angle layers/0/kernel", "norm ratio layers/1/bias", "alignment layers/1/kernel", "dead units tanh"}
    names.add("norm layers/0/kernel")
    assert names <= set(first) if layers else not names & set(first)


def test_lanes_may_have_examples_of_their_own():
    rows = np.array([np.arange(20), np.arange(20, 40)])
    dataset = tiny()
    run = make_run(dataset=dataset, rows=rows)
    assert run.steps == 2
    for own, order in zip(rows, run.order(0), strict=True):
        assert sorted(order.ravel()) == list(own)
    run.epoch()
    run.rows = rows[::-1].copy()
    assert sorted(run.order(1)[0].ravel()) == list(rows[1])


def test_summary_is_of_the_last_epoch():
    run = make_run()
    records = [run.epoch(), run.epoch()]
    figures = results.summary(records)
    assert figures["accuracy"]["mean"] == pytest.approx(records[1].accuracy.mean())
    assert figures["train_loss"]["sd"] == pytest.approx(records[1].train_loss.std(ddof=1))
    assert np.shape(figures["curves"]["angle"]) == (2, 2)


@pytest.mark.parametrize("initializer", [lrules.monotone.zeros, lrules.monotone.uniform()])
def test_mono_net_stays_one(initializer):
    """Weights above the first layer, from the start and after large steps of an optimizer with momentum."""
    mono = tasks.mono_net(make_task(widths=(6, 5), activation="tanh"), (4, 4, 1), initializer)
    run = make_run(lrules.monotone_dfa(), mono, optimizer=optax.sgd(1.0, momentum=0.9))

    def smallest():
        return min(float(run.carry.params["layers"][i]["kernel"][...].min()) for i in (1, 2))

    first = run.carry.params["layers"][0]["kernel"][...]
    assert float(first.min()) < 0 <= smallest()
    before = jax.tree.map(jnp.copy, run.carry.params)
    for _ in range(3):
        run.epoch()
        assert smallest() >= np.float32(1e-6)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, run.carry.params)
    assert all(jax.tree.leaves(moved)) and float(run.carry.params["layers"][0]["kernel"][...].min()) < 0


def test_mono_net_of_a_net_that_cannot_be_one():
    with pytest.raises(ValueError, match="'gelu' decreases"):
        tasks.mono_net(make_task(activation="gelu"), (4, 4, 1), lrules.monotone.zeros)
