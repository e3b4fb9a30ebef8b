"""Trials: grids whose points are lanes, choosing on validation, stopping and going on to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import build, loop, results, sweep, tasks
from experiments.config import Config
from experiments.data import split_validation
from experiments.errors import InputError
from experiments.trial import Trial
from tests.experiments.test_loop import tiny

SMALL = Config(widths=(5,), batch_size=10, epochs=2, optimizer="sgd", learning_rate=0.1, schedule="constant", seeds=2)


def trained(config, *grid, dataset=None, **options):
    dataset = dataset or (split_validation(tiny(), 0.25) if grid else tiny())
    trial = Trial(config, dataset, grid=sweep.parse(grid, config), **options)
    while not trial.finished:
        trial.epoch()
    return trial


def test_points_are_lanes_and_each_is_what_it_is_alone():
    """Traced rates, decay and a rule's number together: one run; a lane equals a run of its own."""
    dataset = split_validation(tiny(), 0.25)
    config = SMALL.replace(rule="backman(alpha=1.0)")
    grid = ["learning_rate=0.1,0.01", "weight_decay=0.0,0.1", "alpha=0.5,1.0"]
    trial = trained(config, *grid, dataset=dataset)
    assert len(trial.runs) == 1 and len(trial.points) == 8 and trial.records[-1].train_loss.shape == (16,)
    for i in (0, 5, 7):
        point = trial.points[i]
        own = config.replace(**point.fields, rule=f"backman(alpha={point.options['alpha']})")
        alone = trained(own, dataset=dataset)
        for figure in ("train_loss", "test_loss", "validation_loss", "angle"):
            found, wanted = (getattr(t.records[-1], figure) for t in (trial, alone))
            np.testing.assert_allclose(found[trial.lanes(i)], wanted, rtol=1e-4, atol=1e-2 * (figure == "angle"))


def test_what_cannot_be_traced_gets_a_run_of_its_own():
    grid = "iterations=1,2", "learning_rate=0.1,0.01", "batch_size=5,10"
    trial = trained(SMALL.replace(rule="dual_propagation"), *grid)
    assert len(trial.runs) == 4 and [run.batch_size for run in trial.runs] == [5, 5, 10, 10]
    assert len(trial.points) == 8 and trial.records[0].accuracy.shape == (16,)
    alone = trained(SMALL.replace(rule="dual_propagation(iterations=2)"), dataset=split_validation(tiny(), 0.25))
    wanted = {"batch_size": 10, "learning_rate": 0.1, "iterations": 2}
    same = [point.fields | point.options for point in trial.points].index(wanted)
    np.testing.assert_allclose(trial.records[-1].train_loss[trial.lanes(same)], alone.records[-1].train_loss, rtol=1e-4)


def test_traced_and_other_options_of_a_rule_together():
    config = SMALL.replace(rule="quantize_error(backman, bits=1)")
    trial = trained(config, "alpha=0.5,1.0", "bits=1,5")
    assert len(trial.runs) == 2 and len(trial.points) == 4
    alone = trained(config.replace(rule="quantize_error(backman(alpha=1.0), bits=5)"), dataset=trial_data())
    same = [point.options for point in trial.points].index({"alpha": 1.0, "bits": 5})
    np.testing.assert_allclose(trial.records[-1].train_loss[trial.lanes(same)], alone.records[-1].train_loss, rtol=1e-4)


def trial_data():
    return split_validation(tiny(), 0.25)


def test_the_best_point_on_the_validation_set_is_chosen():
    trial = trained(SMALL, "learning_rate=1e-7,0.2,1e38")
    result = trial.result()
    assert result["chosen"] == {"learning_rate": 0.2} and result["at_edge"] == []
    assert len(result["points"]) == 3 and result["accuracy"]["by_seed"].shape == (2,)
    edge = trained(SMALL, "learning_rate=1e-9,1e-7,0.2").result()
    assert edge["chosen"] == {"learning_rate": 0.2} and edge["at_edge"] == ["learning_rate"]


def test_the_figure_of_the_best_validation_epoch():
    config = SMALL.replace(select="best_validation", validation=0.2, epochs=4)
    trial = trained(config, dataset=split_validation(tiny(), 0.25))
    validation = np.array([record.validation_accuracy for record in trial.records])
    chosen = trial.result()["selected"]
    assert (chosen["epoch_by_seed"] == validation.argmax(0) + 1).all()
    for seed, epoch in enumerate(validation.argmax(0)):
        assert chosen["accuracy"]["by_seed"][seed] == trial.records[epoch].accuracy[seed]


def test_the_best_epoch_of_a_set_with_validation_examples_of_its_own():
    """`validation` would be refused then: it is not needed."""
    config = SMALL.replace(select="best_validation")
    assert "selected" in trained(config, dataset=trial_data()).result()
    with pytest.raises(InputError, match="as in --validation=0.1"):
        trained(config)


def test_without_an_accuracy_the_best_epoch_has_the_lowest_validation_loss():
    config = SMALL.replace(select="best_validation", task="autoencoding", loss="squared_error", learning_rate=0.6)
    trial = trained(config.replace(epochs=4), dataset=trial_data())
    losses = np.array([record.validation_loss for record in trial.records])
    assert (trial.result()["selected"]["epoch_by_seed"] == losses.argmin(0) + 1).all()
    lost = [[3, 1], [2, np.nan]]
    records = [loop.Record(i, *np.ones((2, 2)), validation_loss=np.array(v)) for i, v in enumerate(lost)]
    assert (results.summary(records, select="best_validation")["selected"]["epoch_by_seed"] == [2, 1]).all()


def test_an_epoch_begins_with_the_warm_up():
    """Also where nobody calls it."""
    config = SMALL.replace(rule="node_perturbation(std=0.01)", warmup_epochs=1)
    first, second = Trial(config, tiny()), Trial(config, tiny())
    second.warm_up()
    for trial in (first, second):
        trial.epoch()
        trial.warm_up()  # it was done
    assert (first.records[0].test_loss == second.records[0].test_loss).all()


def test_what_is_measured_by_layer_is_in_the_result():
    result = trained(SMALL.replace(layers=True)).result()
    assert [record["step"] for record in result["records"]] == [4, 4]
    assert all("angle layers/0/kernel" in record for record in result["records"])


@pytest.mark.parametrize(
    ("config", "grid"),
    [
        (SMALL, ()),
        (SMALL.replace(rule="direct_feedback_alignment(adaptive=True)", optimizer="momentum", warmup_epochs=1), ()),
        (SMALL.replace(rule="node_perturbation(std=0.01)", average=0.9, record_every=2), ()),
        pytest.param(
            SMALL.replace(rule="dual_propagation"), ("iterations=1,2", "learning_rate=0.1,0.2"), marks=pytest.mark.slow
        ),
    ],
)
def test_it_goes_on_to_the_last_bit(config, grid):
    """Stopped inside an epoch, and its state taken up by a new trial: the records are those without a stop."""
    dataset = split_validation(tiny(), 0.25) if grid else tiny()

    def made():
        return Trial(config, dataset, grid=sweep.parse(grid, config))

    whole, first, second = made(), made(), made()
    for trial in (whole, first):
        trial.warm_up()
    while not whole.finished:
        whole.epoch(parts=3)
    first.epoch(parts=3)
    steps = []
    assert first.epoch(parts=3, advance=lambda n: steps.append(n) or True) is None and len(steps) == 1
    assert first.steps_done == first.steps + steps[0]
    second.restore(*first.state())
    second.warm_up()  # it was done
    while not second.finished:
        second.epoch(parts=3)
    for ours, theirs in zip(second.records, whole.records, strict=True):
        for name in set(loop.Record._fields) - {"seconds"}:
            a, b = getattr(ours, name), getattr(theirs, name)
            assert (a is None and b is None) or (np.asarray(a, float) == np.asarray(b, float)).all(), name
    curves = [[(r["epoch"], r["step"], *np.asarray(r["train_loss"])) for r in t.runs[0].curve] for t in (second, whole)]
    assert curves[0] == curves[1]


def test_lanes_that_do_not_fit_train_in_groups():
    config = SMALL.replace(seeds=5)
    together, apart = (build.run(config, tiny(), limit=limit) for limit in (None, 1))
    assert len(together._groups) == 1 and len(apart._groups) == 5
    one, other = together.epoch(), apart.epoch()
    np.testing.assert_allclose(one.train_loss, other.train_loss, rtol=1e-5)
    np.testing.assert_allclose(one.angle, other.angle, atol=0.05)
    before = apart.carry
    apart.restore(apart.state())
    assert (before.params["layers"][0]["kernel"][...] == apart.carry.params["layers"][0]["kernel"][...]).all()


def test_accumulated_gradients_are_those_of_the_batch():
    whole = trained(SMALL.replace(rule="feedback_alignment"))
    parts = trained(SMALL.replace(rule="feedback_alignment", accumulate=5))
    np.testing.assert_allclose(whole.records[-1].train_loss, parts.records[-1].train_loss, rtol=1e-5)
    with pytest.raises(InputError, match="accumulate must be 1 for this rule"):
        trained(SMALL.replace(rule="backman", accumulate=5))


def test_an_average_of_the_weights_is_evaluated():
    """With plain weights w1, w2, ... the average after two steps is d(d w0 + (1-d) w1) + (1-d) w2."""
    config = SMALL.replace(average=0.5, epochs=1, batch_size=20, seeds=1)
    trial = Trial(config, tiny())
    kernels = [np.array(trial.runs[0].carry.params["layers"][0]["kernel"][...])]
    trial.epoch(parts=2, advance=lambda _: kernels.append(np.array(kernel(trial, "params"))))
    expected = 0.5 * (0.5 * kernels[0] + 0.5 * kernels[1]) + 0.5 * kernels[2]
    np.testing.assert_allclose(kernel(trial, "average"), expected, rtol=1e-5)


def kernel(trial, part):
    return getattr(trial.runs[0].carry, part)["layers"][0]["kernel"][...]


@pytest.mark.parametrize("task", ["autoencoding", "smoothing", "bfloat16", "softmax_squared_error"])
def test_tasks_learn(task):
    changes = {
        "autoencoding": {"task": "autoencoding", "loss": "squared_error"},
        "smoothing": {"label_smoothing": 0.1},
        "bfloat16": {"dtype": "bfloat16"},
        "softmax_squared_error": {"loss": "softmax_squared_error", "learning_rate": 1.0},
    }[task]
    trial = trained(SMALL.replace(rule="feedback_alignment", epochs=6).replace(**changes))
    first, last = trial.records[0], trial.records[-1]
    assert (last.train_loss < first.train_loss).all()
    assert (last.accuracy is None) == (task == "autoencoding")


def test_images_are_augmented_before_they_are_normalised():
    """The steps of an augmentation are for images in [0, 1]; the model reads what the normalisation makes of them."""
    dataset = tiny()._replace(x_train=np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1), np.uint8))
    dataset = dataset._replace(x_test=dataset.x_train, y_test=dataset.y_train)
    config = SMALL.replace(normalisation="0.5/0.25", augmentation="flip")
    task, seen = tasks.build(config, dataset), []

    def prepare(x):
        seen.append(task.prepare(x))
        return seen[-1]

    method = build.method(config, task._replace(prepare=prepare), 4)
    x, y = jnp.asarray(dataset.x_train[:10]), jnp.asarray(dataset.y_train[:10])
    carry = method.init(jax.random.key(0), x, y)
    seen.clear()
    inputs = jax.jit(lambda x, y: (method.step(carry, jax.random.key(1), x, y), seen[-1])[1])
    read = inputs(x, y)
    plain = (dataset.x_train[:10] / 255 - 0.5) / 0.25
    for image, wanted in zip(read, plain, strict=True):
        assert np.allclose(image, wanted, atol=1e-5) or np.allclose(image, wanted[:, ::-1], atol=1e-5)


def test_smoothing_by_hand():
    logits, label = np.array([[1.0, 2.0, 0.5]]), np.array([1])
    log_p = logits - np.log(np.exp(logits).sum())
    wanted = -(np.eye(3)[1] * 0.9 + 0.1 / 3) @ log_p[0]
    assert float(tasks.smoothed(0.1)(logits, label)[0]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("grid", "sentence"),
    [
        (["learning_rate"], "needs a name and values, as in --sweep=learning_rate=0.001,0.01"),
        (["lerning_rate=1,2"], "no setting 'lerning_rate' to sweep: did you mean 'learning_rate'"),
        (["alpha=0.1,-1"], "alpha"),
        (["batch_size=0,1"], "batch_size must be an integer >= 1"),
        (["epochs=1,2"], "cannot have epochs, which all points share"),
        (["alpha=1,2", "alpha=3"], "has alpha twice: write all its values in one"),
    ],
)
def test_a_wrong_grid_is_told(grid, sentence):
    with pytest.raises(InputError, match=sentence):
        sweep.parse(grid, SMALL.replace(rule="backman"))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("optimizer=sgd(momentum=0.9,nesterov=True),adam", ("sgd(momentum=0.9,nesterov=True)", "adam")),
        ("normalisation=0.5/0.25,mnist", ("0.5/0.25", "mnist")),
        ("augmentation='crop(1),flip',flip", ("crop(1),flip", "flip")),
        ("widths=(8,8),4", ((8, 8), (4,))),
        ("learning_rate=0.1,0.2,0.1", (0.1, 0.2)),
    ],
)
def test_values_of_a_grid_may_have_options(text, values):
    (found,) = sweep.parse([text], SMALL).fields.values()
    assert found == values


def test_a_grid_is_made_of_its_own_texts():
    texts = ["optimizer=sgd(momentum=0.9),adam", "widths=(4,5),(3,)", "alpha=0.5,1.0"]
    grid = sweep.parse(texts, SMALL.replace(rule="backman"))
    assert sweep.parse(grid.texts(), SMALL.replace(rule="backman")) == grid


def test_a_grid_needs_a_validation_set():
    with pytest.raises(InputError, match="as in --validation=0.2"):
        trained(SMALL, "learning_rate=0.1,0.2", dataset=tiny())


def test_steps_of_a_point():
    """They count the updates of all epochs; the rows are those of results."""
    config = SMALL.replace(record_every=2, batch_size=5)
    trial = trained(config, "learning_rate=0.1,0.01", "batch_size=5,10", dataset=split_validation(tiny(), 0.25))
    found = trial.steps_of(3)  # of the second run, which has three steps an epoch
    assert [(r["epoch"], r["step"], r["updates"]) for r in found] == [(1, 2, 2), (1, 3, 3), (2, 2, 5), (2, 3, 6)]
    lanes = trial.runs[1].curve[0]["train_loss"]
    assert len(lanes) == 4 and (found[0]["train_loss"] == lanes[2:]).all()
    header, rows = results.step_table({"bp": found[:1]}, [7, 8])
    assert header == ("rule", "seed", "epoch", "step", "updates", "train_loss", "angle")
    assert [row[:6] for row in rows] == [("bp", 7, 1, 2, 2, lanes[2]), ("bp", 8, 1, 2, 2, lanes[3])]
    assert trained(SMALL).steps_of(0) == []
