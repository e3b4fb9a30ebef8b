"""Baldi et al. (2018): the numbers of Table 1, the network for CIFAR-10, figures that share cells, linear networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from experiments import methods, rules, signals
from experiments.data import Dataset
from experiments.papers import cells, program, report
from experiments.papers.baldi_2018 import cifar10, figures, linear, settings, table_1
from experiments.papers.baldi_2018.__main__ import TABLES
from experiments.progress import Progress
from tests.sampling import mostly_slow

CELLS = {cell.name: cell for cell in table_1.CELLS}


def small(examples=96, side=9, channels=1, classes=3):
    rng = np.random.default_rng(0)
    y = np.arange(examples) % classes
    x = rng.integers(0, 100, (examples, side, side, channels), np.uint8)
    x[np.arange(examples), y] += 150  # a bright row tells the class
    return Dataset(x, y.astype(np.int32), x[:30], y[:30].astype(np.int32), classes, "small")


def job(config, tmp_path, dataset, stop=None):
    bar = Progress(1, "epoch", show=False)
    return cells.Job(config, (), lambda _: dataset, tmp_path / "work", stop or signals.Stop(), bar)


def test_the_numbers_of_table_1():
    cifar = [cell for cell in CELLS.values() if cell.config.dataset == "cifar10"]
    assert len(cifar) == 13 and len({cell.config.rule for cell in cifar}) == 13
    assert CELLS["CIFAR-10 Baseline, RBP"].paper["accuracy"] == (70.2, 1.1)
    assert CELLS["CIFAR-10 Sparse-8, RBP"].paper["accuracy"] == (46.3, 4.3)
    assert CELLS["CIFAR-10 No-f', SRBP"].paper["accuracy"] == (39.9, 3.9)
    assert CELLS["CIFAR-10 Top layer only, BP"].paper["accuracy"] == (47.9, 0.4)
    assert CELLS["Quantized update 1-bit, RBP"].config.schedule == "constant"
    assert CELLS["Adaptive, RBP"].config.learning_rate == 0.01
    assert CELLS["Adaptive, SRBP"].config == settings.MNIST.replace(rule="srbp(adaptive=True)")


def test_the_network_for_cifar10_has_the_sizes_of_the_paper():
    task = cifar10.make_task(cifar10.CIFAR10, (32, 32, 3), 10)
    params = jax.eval_shape(task.init, jax.random.key(0))[0]
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
              for path, leaf in jax.tree_util.tree_leaves_with_path(params)}  # fmt: skip
    kernels = {name.split("/kernel")[0]: shape for name, shape in shapes.items() if "kernel" in name}
    assert kernels == {
        "convs/0": (5, 5, 3, 64),
        "convs/1": (5, 5, 64, 64),
        "convs/2": (5, 5, 64, 64),
        "fc": (1024, 1024),
        "out": (1024, 10),
    }


def test_the_inputs_of_cifar10_are_normalised_after_the_augmentation():
    task = cifar10.make_task(cifar10.CIFAR10, (32, 32, 3), 10)
    black, grey = (float(task.prepare(np.full((1, 32, 32, 3), v, np.uint8)).mean()) for v in (0, 120))
    assert black < -1.5 and abs(grey) < 0.2


@pytest.mark.parametrize("key", ["figure 5", "figure 6"])
def test_every_rule_trains_the_network_for_cifar10(key):
    task = cifar10.make_task(cifar10.CIFAR10, (9, 9, 3), 4, channels=2, hidden=5)
    found = {cell.name: rules.parse(cell.config.rule) for cell in TABLES[key].cells}
    methods.check(task, found, jnp.zeros((2, 9, 9, 3)), jnp.zeros(2, jnp.int32), 2)


@pytest.mark.slow
def test_sbp_and_srbp_differ_from_bp_below_the_upper_layers():
    task = cifar10.make_task(cifar10.CIFAR10, (9, 9, 3), 4, channels=2, hidden=5)
    params, state = task.init(jax.random.key(0))
    x, y = jax.random.normal(jax.random.key(1), (3, 9, 9, 3)), jnp.arange(3)
    grads = {}
    for name in ("bp", "sbp", "srbp"):
        rule = rules.parse(name)
        feedback = rule.init(jax.random.key(2), task.net, params, (state, x))
        grads[name] = lrules.value_and_grad(task.net, task.loss, rule)(params, feedback, (state, x), y)[1].params
    for name in ("sbp", "srbp"):
        same = jax.tree.map(lambda a, b: bool(np.allclose(a, b, atol=1e-6)), grads["bp"], grads[name])
        flat = {
            jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in jax.tree_util.tree_leaves_with_path(same)
        }
        assert all(v for k, v in flat.items() if k.startswith("out"))
        assert not any(v for k, v in flat.items() if k.startswith("convs/0"))


@pytest.mark.slow
def test_the_measure_of_cifar10_goes_on_after_a_stop_and_has_the_training_accuracy(tmp_path, monkeypatch):
    make = cifar10.make_task
    monkeypatch.setattr(cifar10, "make_task", lambda *args: make(*args, channels=2, hidden=5))
    config = cifar10.CIFAR10.replace(epochs=3, seeds=1, batch_size=32, augmentation="translate(0.2),flip")
    data = small(channels=3)
    whole = cifar10.train(job(config, tmp_path / "whole", data))

    class After(signals.Stop):
        """Asks to stop in the second epoch."""

        asked = 0

        @property
        def requested(self):
            self.asked += 1
            return self.asked > 6

    assert cifar10.train(job(config, tmp_path, data, After())) is None
    gone_on = cifar10.train(job(config, tmp_path, data))
    for name in ("accuracy", "train_accuracy", "train_loss"):
        assert np.array_equal(gone_on["curves"][name], whole["curves"][name]), name
    assert gone_on["curves"]["train_accuracy"].shape == (3, 1)
    assert np.array_equal(gone_on["train_accuracy"]["by_seed"], whole["curves"]["train_accuracy"][-1])


def test_figures_share_the_cells_of_table_1(tmp_path):
    names = {key: [cell.name for cell in table.cells] for key, table in figures.FIGURES.items()}
    assert list(names) == [f"figure {n}" for n in range(1, 10)]
    assert len(names["figure 1"]) == len(names["figure 5"]) == 9
    assert set(names["figure 1"]) - set(CELLS) == {"Baseline, SBP", "No-f', SBP"}
    assert len(names["figure 2"]) == 4 and len(names["figure 3"]) == len(names["figure 6"]) == 8
    assert all(len(names[f"figure {n}"]) == 12 for n in (7, 8, 9))
    assert {n for n in figures.SPARSITY if f"Sparse-{n}, SRBP" in CELLS} == {1, 2, 8}
    assert all(table.folder == "table 1" for table in figures.FIGURES.values())
    by_stem = {}
    for table in (table_1.TABLE_1, *figures.FIGURES.values()):
        for cell in table.cells:
            assert by_stem.setdefault(cell.stem, cell.config) == cell.config  # one file, one config


@pytest.mark.slow
def test_a_figure_has_its_curves_from_the_folder_of_table_1(tmp_path):
    config = settings.MNIST.replace(widths=(6,), epochs=2, seeds=2, batch_size=32)
    own = [cell._replace(config=config.replace(rule=cell.config.rule)) for cell in figures.FIGURES["figure 2"].cells]
    table = figures.FIGURES["figure 2"]._replace(cells=own)
    folder = report.folder_of(tmp_path, "figure 2", table)
    assert folder == tmp_path / "table_1"
    folder.mkdir()
    for cell in own:
        content = cell.measure(job(cell.config, tmp_path / cell.stem, small()))
        cells.keep(folder, cell, cell.config, {"config": cell.config.to_dict()} | dict(content))
    text = report.write({"figure 2": table}, tmp_path, "A paper")
    assert "![figure 2](figure_2.png)" in text and "missing" not in text
    found = report.measured(table, folder)
    upper, lower = figures.by_epoch(found).axes
    assert upper.get_ylabel() == "training accuracy (%)" and len(upper.lines) == len(lower.lines) == 4
    without = [each._replace(contents=[{k: v for k, v in each.contents[0].items() if k != "train_accuracy"}])
               for each in found]  # fmt: skip
    assert figures.by_epoch(without).axes[0].get_ylabel() == "training loss"


def test_the_sparsity_of_figure_4(tmp_path):
    found = []
    for cell, accuracy in zip(figures.FIGURES["figure 4"].cells, np.linspace(0.2, 0.9, 11), strict=True):
        rules.parse(cell.config.rule)
        found.append(cells.Found(cell, 100, [0, 1], [{"accuracy": {"by_seed": [accuracy, accuracy + 0.01]}}]))
    axis = figures.by_sparsity(found).axes[0]
    heights = sorted(y for line in axis.lines for y in np.ravel(line.get_ydata()))
    assert heights[-1] == pytest.approx(96.9) and heights[0] == pytest.approx(20.5, abs=2)


SIZES = [((1, 1, 1),), ((1, 2, 1),), ((2, 1, 2),), ((2, 2, 2),)]


@pytest.mark.parametrize("sizes", mostly_slow(SIZES, quick=SIZES[:1]))
def test_linear_networks_reach_the_limits_of_the_paper(sizes, tmp_path):
    config = linear.LINEAR.replace(widths=sizes, seeds=2)
    content = linear.simulate(job(config, tmp_path, None))
    assert max(content["distance"]["by_seed"]) < -7 and len(content["curves"]["epoch"]) == linear.POINTS
    assert np.shape(content["curves"]["error"]) == (linear.POINTS, 2)
    if sizes != (2, 1, 2):  # whose limit is not the best network of its rank
        assert max(content["error"]["by_seed"]) < -7
    found = cells.Found(linear.Cell("A", "", config), 1, [0, 1], [content])
    assert len(linear.by_time([found]).axes[0].lines) == 4


def test_a_limit_that_is_not_reached_shows():
    from experiments.theory import rbp_dynamics as dynamics

    problem = dynamics.random_problem(0, (1, 1, 1))
    assert linear._distance(problem.weights, problem) > 0.1


def test_the_field_of_figure_11_and_a_stop(tmp_path):
    (cell,) = TABLES["figure 11"].cells
    content = linear.simulate_field(job(cell.config.replace(seeds=2, seed=3), tmp_path, None))
    assert max(content["distance"]["by_seed"]) < -7 and len(content["error"]["by_seed"]) == 2
    stopped = signals.Stop(seconds=0)
    assert linear.simulate(job(linear.LINEAR.replace(widths=(1, 1, 1)), tmp_path, None, stopped)) is None


def test_the_program_knows_all_figures_and_sections():
    chosen = program.choose(TABLES, ["1"], ["4", "14"], ["4.2 on digits"])
    assert list(chosen) == ["table 1", "figure 4", "figure 14", "section 4.2 on digits"]
    assert [key for key in TABLES if key.startswith("figure")] == [f"figure {n}" for n in range(1, 15)]
