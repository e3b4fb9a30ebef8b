"""The cells of Hoier and Zach (2024): the paper's numbers, rules, fixed batches, measures of their own, pictures."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from experiments import data, methods, models, rules, tasks
from experiments.papers import cells, report
from experiments.papers.cells import Job
from experiments.papers.hoier_2024 import dense, layers, table_1, table_2, table_3, vgg
from experiments.progress import Progress
from experiments.signals import Stop
from experiments.trial import Trial
from tests.experiments.programs import fork, is_png

TABLES = importlib.import_module("experiments.papers.hoier_2024.__main__").TABLES
ADAM = pytest.mark.foreign  # optax's Adam mixes integers and floats


def named(table):
    return {cell.name: cell for cell in table.cells}


def test_the_papers_numbers():
    one, three = named(table_1.TABLE_1), named(table_3.TABLE_3)
    assert one["DP, alpha=1, MNIST"].paper == {"accuracy": (95.85, 0.68), "lipschitz": (522, 288)}
    assert one["DP, alpha=0, inputs nudged, Fashion-MNIST"].paper["lipschitz"] == (8.05, 1.03)
    assert one["BP, adversarial, MNIST"].paper["accuracy"] == (98.43, 0.04)
    assert one["BP, adversarial, MNIST"].config.fgsm == 0.01 and not one["BP, MNIST"].config.fgsm
    assert three["BP, CIFAR-10"].paper["accuracy"] == (92.36, 0.16)
    assert three["DP^T, alpha=1/2, beta=0.01, CIFAR-10"].paper["accuracy"] == (92.19, 0.32)
    assert three["DP^T, alpha=0, beta=1, CIFAR-10"].paper["accuracy"] == (91.34, 0.16)
    assert not three["DP^T, alpha=1, beta=0.1, CIFAR-10"].paper


@pytest.mark.parametrize("key", TABLES)
def test_every_cell_has_a_file_of_its_own(key):
    all_cells = TABLES[key].cells
    assert len({cell.stem for cell in all_cells}) == len(all_cells)
    for rule in {cell.config.rule for cell in all_cells}:
        rules.parse(rule)


def test_figures_show_cells_of_tables():
    assert set(cell.stem for cell in table_2.FIGURE_3.cells) < set(cell.stem for cell in table_2.TABLE_2.cells)
    by_epoch = [cell for cell in table_3.FIGURE_2.cells if "first" not in cell.name]
    of_table = named(table_3.TABLE_3)
    assert len(by_epoch) == 4 and all(of_table[cell.name].config == cell.config for cell in by_epoch)


def images(count=24, shape=(4, 4, 1), classes=3):
    x = np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)
    y = np.arange(count, dtype=np.int32) % classes
    return data.Dataset(x, y, x[:6], y[:6], classes, "tiny")


@pytest.mark.parametrize("table", [table_1.TABLE_1, table_2.TABLE_2])
def test_the_rules_of_dense_networks_train_them(table):
    config = table.cells[0].config.replace(widths=(6,) * len(table.cells[0].config.widths), batch_size=4)
    dataset = images()
    batches = dense.fixed_batches(dataset, 4)
    known = {cell.name: rules.parse(cell.config.rule) for cell in table.cells if "Fashion" not in cell.name}
    methods.check(dense.task(config, dataset), known, batches.x_train, batches.y_train, 1)


@pytest.mark.parametrize("order", [table_3.SWEEP, pytest.param(table_3.FORWARD, marks=pytest.mark.slow)])
def test_the_rules_of_vgg16_train_it(order):
    dataset = images(2, (32, 32, 3))
    config = vgg.scheduled(vgg.CIFAR_10.replace(epochs=3), vgg.CIFAR_10.epochs)
    assert config.schedule.startswith("cosine(warmup=0.230769, start=0.04, end=8e-05, flat=0.23")
    rule = rules.parse(vgg.rule(0.5, 0.01, order))
    methods.check(tasks.build(config, dataset), {order: rule}, dataset.x_train, dataset.y_train, 2)


def test_vgg16_is_that_of_the_paper():
    model = jax.eval_shape(lambda: models.VGG16((32, 32, 3), 10, rngs=models.nnx.Rngs(0)))
    params = models.nnx.state(model, models.nnx.Param)
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    assert len(shapes) == 2 * 16 and not jax.tree.leaves(models.nnx.state(model, models.nnx.BatchStat))
    assert shapes.count((4096, 4096)) == 1 and (512, 4096) in shapes


@ADAM
def test_batches_stay_and_come_in_another_order():
    dataset = images(25)
    batches = dense.fixed_batches(dataset, 4)
    assert batches.x_train.shape == (6, 4, 4, 4, 1) and (batches.y_train[1] == dataset.y_train[4:8]).all()
    config = dense.CONFIG.replace(widths=(6, 5), epochs=2, seeds=2)
    trial = Trial(config.replace(batch_size=1), batches, task=dense.task(config, dataset))
    orders = [trial.runs[0].order(epoch)[0].ravel() for epoch in (0, 1)]
    assert all(sorted(order) == list(range(6)) for order in orders) and (orders[0] != orders[1]).any()
    kernels = [leaf for leaf in jax.tree.leaves(trial.carry(0).params) if leaf.ndim == 3]
    biases = [leaf for leaf in jax.tree.leaves(trial.carry(0).params) if leaf.ndim == 2]
    assert len(kernels) == 3 and not any(leaf.any() for leaf in biases)
    assert float(kernels[0].std()) == pytest.approx(1 / 4, rel=0.25)  # 16 pixels


def job(cell, dataset, folder, stop=None, **changes):
    config = cell.config.replace(**changes)
    with Progress(config.epochs, "epoch", show=False) as bar:
        return cell.measure(Job(config, (), lambda _: dataset, folder, stop or Stop(), bar))


SMALL = {"widths": (6, 5), "batch_size": 4, "epochs": 3, "seeds": 2}


class After(Stop):
    """Asks to stop after so many questions."""

    def __init__(self, left):
        super().__init__()
        self.left = left

    @property
    def requested(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.slow
@ADAM
def test_a_dense_cell_goes_on_where_it_was_stopped(tmp_path):
    cell, dataset = named(table_1.TABLE_1)["DP, alpha=0, inputs nudged, MNIST"], images()
    whole = job(cell, dataset, tmp_path / "whole", **SMALL)
    assert job(cell, dataset, tmp_path / "parts", After(4), **SMALL) is None
    parts = job(cell, dataset, tmp_path / "parts", **SMALL)
    for figure in ("accuracy", "lipschitz", "residual"):
        np.testing.assert_array_equal(whole[figure]["by_seed"], parts[figure]["by_seed"])
    assert whole["lipschitz"]["by_seed"].shape == (2,) and whole["residuals"].shape == (2, table_1.DAMPED)


def test_the_lipschitz_estimate_is_the_norm_of_the_product():
    dataset, config = images(), dense.CONFIG.replace(widths=(6, 5))
    task = dense.task(config, dataset)
    params, state = task.init(jax.random.key(3))
    x, y = task.prepare(dataset.x_train[:4]), jnp.asarray(dataset.y_train[:4])
    found, residual = dense.measures(task, lrules.backprop(), x, y)(params, state, lrules.Feedback({}, {}))
    product = np.eye(16)
    for layer in range(3):
        product = product @ np.asarray(params["layers"][layer]["kernel"][...], np.float64)
    assert float(found) == pytest.approx(np.linalg.norm(product, 2), rel=1e-4) and not residual.size


def test_states_of_the_original_do_not_settle_and_those_of_the_adjoint_do():
    """As in Table 2, at initial weights."""
    digits = data.load("digits")
    task = dense.task(table_2.DEEP.replace(widths=(32,) * 4), digits)
    start = task.init(jax.random.key(3))
    x, y = task.prepare(digits.x_train[:50]), jnp.asarray(digits.y_train[:50])
    last = {
        name: float(jax.jit(dense.measures(task, rules.parse(rule), x, y))(*start, lrules.Feedback({}, {}))[1][-1])
        for name, rule in table_2.RULES.items()
    }
    assert max(last["DP^T, alpha=0"], last["DP^T, alpha=1"]) < 1e-4 and last["DP, alpha=1"] > 0.1


def keep(folder, cell, content, config):
    folder.mkdir(exist_ok=True)
    cells.keep(folder, cell, config, content | {"config": config.to_dict()})


@pytest.mark.slow
@ADAM
def test_figure_3_shows_angles_and_norms_by_layer(tmp_path):
    cell, dataset = table_2.FIGURE_3.cells[0], images()
    small = cell._replace(config=cell.config.replace(widths=(6, 5), batch_size=4, probe=8, epochs=2, seeds=2))
    content = job(small, dataset, tmp_path / "work")
    assert "records" not in content and content["curves"]["norm layers/2"].shape == (2, 2)
    keep(tmp_path / "table_2", small, content, small.config)
    table = table_2.FIGURE_3._replace(cells=[small])
    text = report.write({"figure 3": table}, tmp_path, "title")
    assert is_png(tmp_path / "figure_3.png") and "DP^T, alpha=0" in text
    found = cells.load(tmp_path / "table_2", small)
    assert layers.names(found) == ["layers/0", "layers/1", "layers/2"]
    _, rule, true, apart = layers.norms(found, "layers/0")
    angle = np.deg2rad(found.curve("angle layers/0")[1])
    np.testing.assert_allclose(apart**2, rule**2 + true**2 - 2 * rule * true * np.cos(angle), rtol=1e-4, atol=1e-8)


def convolutional():
    return data.split_validation(images(24, (8, 8, 3)), 0.25)


@pytest.mark.slow
def test_a_cell_of_vgg16_trains_its_seeds_one_after_another(tmp_path):
    """A small network stands for VGG16."""
    cell, dataset = table_3.TABLE_3.cells[1], convolutional()
    small = {"model": "mlp", "widths": (6,), "activation": "relu", "augmentation": "", "batch_size": 4, "epochs": 2}
    both = job(cell, dataset, tmp_path / "both", seeds=2, **small)
    second = job(cell, dataset, tmp_path / "second", seed=1, **small)
    assert job(cell, dataset, tmp_path / "parts", After(3), seeds=2, **small) is None
    parts = job(cell, dataset, tmp_path / "parts", seeds=2, **small)
    for found in (both, parts):
        assert found["accuracy"]["by_seed"].shape == (2,) and found["curves"]["accuracy"].shape == (2, 2)
        assert found["accuracy"]["by_seed"][1] == second["accuracy"]["by_seed"][0]
    assert json.loads((tmp_path / "both" / "seed_0.json").read_text())["epoch_by_seed"] == both["epoch_by_seed"][0]


@pytest.mark.slow
def test_figure_2_shows_the_first_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(vgg, "BATCHES", 4)
    cell = next(cell for cell in table_3.FIGURE_2.cells if "first" in cell.name and cell.beyond)
    config = cell.config.replace(model="cnn", activation="relu", batch_size=4, record_every=2, probe=4, seeds=2)
    small = cell._replace(config=config)
    content = job(small, convolutional(), tmp_path / "work")
    assert content["curves"]["epoch"] == [2, 4] and content["curves"]["angle conv2"].shape == (2, 2)
    keep(tmp_path / "table_3", small, content, config)
    report.write({"figure 2": table_3.FIGURE_2._replace(cells=[small])}, tmp_path, "title")
    assert is_png(tmp_path / "figure_2.png")


def test_the_program(tmp_path):
    dataset = images()
    arrays = {name: getattr(dataset, name) for name in data.NAMES}
    np.savez(tmp_path / "mnist.npz", **{name: np.repeat(array, 5, 0) for name, array in arrays.items()})
    flags = ["--table=1", "--cells=^BP, MNIST", "--quick", f"--data_dir={tmp_path}", f"--work={tmp_path}/work"]
    done = fork("papers.hoier_2024", *flags, f"--output={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert "1 of 20 epochs, 1 of 3 seeds" in done.stdout
    assert [path.name for path in (tmp_path / "out" / "table_1").iterdir()] == ["bp_mnist.0.1_epochs.json"]
