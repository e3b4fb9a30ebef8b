"""The tables of Lechner (2020): the numbers of the paper, the sets, the networks, and the measure on tiny images."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import data, rules
from experiments.config import Config
from experiments.errors import InputError
from experiments.papers import cells, report
from experiments.papers.lechner_2020 import cifar, measure, nets, sets
from experiments.papers.lechner_2020.__main__ import TABLES
from experiments.progress import Progress
from experiments.rows import Column

CELLS = {f"{key}: {cell.name}": cell for key, table in TABLES.items() for cell in table.cells}
TINY = Config(
    dataset="tiny", classes="2", model="mlp", widths=(8, 8), activation="tanh", batch_size=16, epochs=6, seeds=3,
    validation=0.15, mono_net="grid", rule=cifar.RULES["mDFA"]["rule"],
)  # fmt: skip
GRID = ("start=normal,zeros", "sgd=0.0001,0.3", "adam=0.01", "rmsprop=0.01")


def tiny(classes=4, size=(6, 6, 3), each=40):
    """Noise around a picture of each class."""
    rng = np.random.default_rng(0)
    pictures = rng.uniform(0, 255, (classes, *size))
    arrays = []
    for count in (each, each // 2):
        y = np.tile(np.arange(classes), count)
        x = np.clip(pictures[y] + rng.normal(0, 40, (len(y), *size)), 0, 255).astype(np.uint8)
        arrays += [x, y]
    return data.Dataset(*arrays, classes, "tiny")


class Stop:
    """Stops after it was asked so many times."""

    def __init__(self, after):
        self.after = after

    @property
    def requested(self):
        self.after -= 1
        return self.after < 0


def measured_by(tmp_path, config=TINY, grid=GRID, stop=10**9):
    """What the measure finds on tiny images; it is to stop after it has asked so many times."""
    bar = Progress(1, "epoch", show=False)
    job = cells.Job(config, grid, lambda _: tiny(), tmp_path / "work" / "job", Stop(stop), bar)
    with jax.numpy_dtype_promotion("standard"):  # of optax, where the numbers of Adam are traced
        return measure.measure(job)


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("table 1: hard-tanh, FA, CNN", (82.5, 10.2), (77.5, 12.2)),
        ("table 1: ReLU, mDFA, FC", (78.2, 9.9), (62.1, 12.7)),
        ("table 1: tanh, mDFA, CNN", (89.0, 6.0), (81.1, 9.8)),
        ("table 2: tanh, DFA, FC", (97.9, 2.2), (76.8, 7.2)),
        ("table 2: hard-tanh, BP, CNN", (99.8, 0.5), (81.7, 11.6)),
        ("table 3: 25 classes, mDFA", (13.1, 1.4), (13.1, 1.3)),
        ("table 4: 10 classes, DFA", (83.0, 3.5), (65.0, 4.8)),
        ("table 5: 5 classes, FA", (41.4, 5.5), (42.3, 7.1)),
        ("table 6: 10 classes, mDFA", (42.9, 3.9), (44.1, 4.4)),
    ],
)
def test_the_numbers_of_the_paper(name, train, test):
    assert CELLS[name].paper == {"train": train, "test": test} and not CELLS[name].beyond


def test_every_table_has_its_cells():
    counts = {key: sum(not cell.beyond for cell in table.cells) for key, table in TABLES.items()}
    assert counts == {"table 1": 24, "table 2": 24, "table 3": 20, "table 4": 20, "table 5": 12, "table 6": 12}
    for table in TABLES.values():
        assert len({cell.stem for cell in table.cells}) == len(table.cells)
    assert CELLS["table 4: 100 classes, BP"].beyond and not CELLS["table 4: 100 classes, BP"].paper


@pytest.mark.parametrize("model", ["mlp", "conv_cifar", "conv_imagenet"])
@pytest.mark.parametrize("rule", [*cifar.RULES, *cifar.BEYOND])
def test_every_rule_trains_every_network(model, rule):
    config = cifar.CONFIG.replace(model=model, activation="tanh", widths=(8,), **(cifar.RULES | cifar.BEYOND)[rule])
    shape = (64, 64, 3) if model == "conv_imagenet" else (32, 32, 3)
    task = nets.task(config, shape, 2)
    task = nets.start(task, shape, ["normal", "zeros"], 0, mono_net=bool(config.mono_net))
    method = measure.by_rule(task, rules.parse(config.rule), optax.sgd(0.1), angle=False)
    x, y = jax.ShapeDtypeStruct((4, *shape), "uint8"), jax.ShapeDtypeStruct((4,), "int32")
    carry, loss = jax.eval_shape(
        lambda x, y: method.step(method.init(jax.random.key(0), x, y), jax.random.key(1), x, y), x, y
    )
    assert loss.shape == () and carry.params["out" if model != "mlp" else "layers"]


def test_each_cell_has_a_rule_a_grid_and_a_network():
    for cell in CELLS.values():
        rules.parse(cell.config.rule)
        starts = {point.start for point in measure.points(cell.sweep)}
        assert ("zeros" in starts) == ("fa(" in cell.config.rule)
        assert ({"normal", "uniform"} <= starts) == ("from zeros" not in cell.row)
        assert bool(cell.config.mono_net) == ("mDFA" in cell.row or "mono-net" in cell.row)


def test_the_convolutions_have_the_sizes_of_the_paper():
    config = cifar.CONFIG.replace(model="conv_cifar", activation="relu")
    params, _ = jax.eval_shape(nets.task(config, (32, 32, 3), 10).init, jax.random.key(0))
    shapes = [leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    assert shapes == [(5, 5, 3, 96), (3, 3, 96, 96), (3, 3, 96, 96), (4 * 4 * 96, 10)]
    with pytest.raises(InputError, match="8x8 are too small"):
        nets.task(config, (8, 8, 3), 10)


def test_one_logit_has_the_loss_of_a_sigmoid():
    outputs, labels = jnp.array([[2.0], [-1.0], [0.5]]), jnp.array([1, 1, 0])
    p = 1 / (1 + np.exp(-np.array([2.0, -1.0, 0.5])))
    expected = -np.log([p[0], p[1], 1 - p[2]])
    np.testing.assert_allclose(nets.binary_cross_entropy(outputs, labels), expected, rtol=1e-6)
    assert nets.hits(outputs, labels).tolist() == [True, False, False]
    assert nets.hits(jnp.array([[0.0, 1.0], [3.0, 1.0]]), jnp.array([1, 1])).tolist() == [True, False]


def test_starts_and_the_constraint_of_a_mono_net():
    shape, starts = (4, 4, 3), ["normal", "uniform", "zeros"]
    plain = nets.task(TINY, shape, 2)
    for i, name in enumerate(starts):
        task = nets.start(plain, shape, starts, i, mono_net=True)
        first, *above = [leaf for leaf in jax.tree.leaves(task.init(jax.random.key(0))[0]) if leaf.ndim > 1]
        assert all((w >= 0).all() for w in above)
        if name == "zeros":
            assert not first.any() and not any(w.any() for w in above)
        else:
            assert (first < 0).any() and (first > 0).any() and all(w.std() > 0 for w in above)
        if name == "uniform":
            assert above[0].min() >= 1e-3 and above[0].max() <= 1 / np.sqrt(8) and abs(first).max() <= 1 / np.sqrt(48)


def test_sets_have_the_same_classes_for_all_methods_and_no_image_twice():
    whole = tiny()
    drawn = sets.draw(whole, TINY, [0, 2])
    for place, seed in enumerate((0, 2)):
        classes = np.random.RandomState(seed).permutation(4)[:2]
        assert (drawn.numbers[place][classes] == [0, 1]).all()
        for part, count in (("train", 68), ("val", 12), ("test", 40)):
            rows = drawn.rows[part][place]
            assert len(set(rows.tolist())) == count and set(drawn.y[rows].tolist()) == set(classes.tolist())
        assert not set(drawn.rows["train"][place]) & set(drawn.rows["val"][place])
    test = drawn.rows["test"][0]
    held = whole.x_test[np.isin(whole.y_test, np.random.RandomState(0).permutation(4)[:2])]
    assert (drawn.x[test] == held).all()
    with pytest.raises(InputError, match="from 2 to 4"):
        sets.draw(whole, TINY.replace(classes="5"), [0])


def test_sets_of_images_on_the_disk_come_into_memory():
    whole = tiny()

    def on_disk(x):
        return Column([{"image": image} for image in x], "image", x.shape[1:], x.dtype)

    lying = whole._replace(x_train=on_disk(whole.x_train), x_test=on_disk(whole.x_test))
    ours, theirs = (sets.draw(each, TINY, [0, 1]) for each in (lying, whole))
    assert isinstance(ours.x, np.ndarray) and (ours.x == theirs.x).all()


@pytest.mark.foreign
def test_adam_with_other_numbers_is_rmsprop():
    b1, b2, eps = measure.ADAM["rmsprop"]
    ours, theirs = optax.adam(0.1, b1, b2, eps), optax.rmsprop(0.1, 0.9, eps, bias_correction=True, eps_in_sqrt=False)
    w = jnp.array([1.0, -2.0])
    states = ours.init(w), theirs.init(w)
    for g in (jnp.array([0.3, 2.0]), jnp.array([-0.1, 1.0])):
        (u, a), (v, b) = ours.update(g, states[0], w), theirs.update(g, states[1], w)
        states = a, b
        np.testing.assert_allclose(u, v, rtol=1e-5)


def test_a_grid_has_known_names():
    found = measure.points(("start=zeros,normal", "sgd=0.1,0.2", "adam=0.01"))
    assert len(found) == 6 and found[0] == measure.Point("zeros", "sgd", 0.1)
    with pytest.raises(InputError, match="got momentum"):
        measure.points(("start=zeros", "momentum=0.1"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return measured_by(tmp_path_factory.mktemp("whole"))


def test_the_measure_chooses_on_validation_images_and_learns(measured):
    assert len(measured["compared"]) == 5  # four with the first start, and the best of them with the other start
    best, *others = measured["compared"]
    assert all(best["validation"] >= other["validation"] for other in others)
    assert measured["chosen"] == {name: best[name] for name in measure.Point._fields}
    assert measured["chosen"]["rate"] != 0.0001  # with it nothing is learned
    assert min(measured["train"]["by_seed"]) > 0.9 and min(measured["test"]["by_seed"]) > 0.8
    assert np.shape(measured["curves"]["val"]) == (2, 3) and measured["curves"]["epoch"] == [5, 6]


def test_blocks_of_seeds_add_up_to_the_whole(measured, tmp_path):
    block = measured_by(tmp_path, TINY.replace(seed=2, seeds=1))
    assert block["chosen"] == measured["chosen"]
    for figure in ("train", "test"):
        assert block[figure]["by_seed"] == measured[figure]["by_seed"][2:]


def test_a_stopped_job_goes_on_to_the_same_figures(measured, tmp_path):
    assert measured_by(tmp_path, stop=21) is None  # within a training run
    assert list((tmp_path / "work").glob("runs-*/*/")), "no checkpoint"
    assert measured_by(tmp_path, stop=12) is None
    found = measured_by(tmp_path)
    assert found["test"]["by_seed"] == measured["test"]["by_seed"] and found["chosen"] == measured["chosen"]
    assert found["curves"]["train"].tolist() == measured["curves"]["train"].tolist()


def test_convolutions_and_several_classes(tmp_path, monkeypatch):
    monkeypatch.setitem(nets.CONVOLUTIONS, "conv_cifar", ((4, 3, 2),))
    config = TINY.replace(model="conv_cifar", classes="3", epochs=3, seeds=2, rule="dfa", mono_net="")
    found = measured_by(tmp_path, config, ("start=normal", "adam=0.01"))
    assert min(found["test"]["by_seed"]) > 0.6 and found["choosing_epochs"] == 3
    own = measure.Program.__init__

    def looped(self, *args):
        own(self, *args)
        self.looped = True  # as on an accelerator

    monkeypatch.setattr(measure.Program, "__init__", looped)
    again = measured_by(tmp_path / "again", config, ("start=normal", "adam=0.01"))
    np.testing.assert_allclose(again["curves"]["val"], found["curves"]["val"], atol=0.06)


def test_the_report_has_both_accuracies(measured, tmp_path):
    cell = CELLS["table 1: tanh, mDFA, FC"]
    config = cell.config.replace(seeds=3)
    content = {"config": config.to_dict(), "sweep": list(cell.sweep)} | measured
    path = cells.keep(tmp_path, cell, config, content)
    assert json.loads(path.read_text())["chosen"]["optimizer"] in measure.OPTIMIZERS
    text = report.markdown(TABLES["table 1"], tmp_path)
    assert "FC, training, paper" in text and "100 ± 0" in text and "3 of 5 seeds" in text
    row = [part.strip() for part in text.splitlines()[-1].split("|")]
    start, optimizer, rate = measured["chosen"].values()
    assert row[1:5] == ["tanh, mDFA, FC", optimizer, f"{rate:g}", start]
