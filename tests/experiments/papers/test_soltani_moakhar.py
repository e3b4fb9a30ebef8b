"""The tables of the paper on BackMAN: their numbers, settings and measures."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lrules
from experiments import benchmark, data, expressions, methods, models, rules, signals, tasks
from experiments.config import Config
from experiments.papers import cells, program, report
from experiments.papers.soltani_moakhar import coefficients, figure_4, forgetting, settings, table_3
from experiments.papers.soltani_moakhar.__main__ import TABLES
from experiments.progress import Progress


def by_name(key):
    return {cell.name: cell for cell in TABLES[key].cells}


def test_numbers_of_the_paper():
    one, two, five = (by_name(key) for key in ("table 1", "table 2", "table 5"))
    assert one["BackMAN, ResNet-18 CIFAR-100"].paper == {"accuracy": (63.00, None)}
    assert one["Feedback alignment, LeNet-5 CIFAR-10"].paper["accuracy"][0] == 53.31
    assert one["Adaptive DropConnect, LeNet-5 CIFAR-10"].paper["accuracy"][0] == 60.16
    assert [name for name, cell in one.items() if cell.quoted] == [
        "Adaptive DropConnect, MLP MNIST",
        "Adaptive DropConnect, LeNet-5 CIFAR-10",
        "Forward-Forward, MLP MNIST",
    ]
    assert two["BackMAN"].paper["task 5"] == (86.65, 10.90)
    assert two["Error-backpropagation"].paper["average"] == (73.47, 4.81)
    large = [five[f"{row}, batch 1024"].paper for row in (settings.EBP, settings.BACKMAN)]
    assert [number for number, _ in large[0].values()] == [90.0, 97.1, 98.6, 98.4]
    assert [number for number, _ in large[1].values()] == [52.0, 78.2, 96.4, 98.4]
    three = by_name("table 3")
    assert three["BackMAN, LeNet-5"].paper == {"seconds": (129, None), "ratio": (2.11, None)}
    for row, numbers in table_3.NUMBERS.items():
        for network, (_, ratio) in numbers.items():
            assert ratio == round(numbers[network][0] / table_3.NUMBERS[settings.EBP][network][0], 2), (row, network)


def test_settings_are_those_of_the_paper_and_figures_are_complete():
    for key, seeds in (("table 1", 5), ("table 2", 100), ("figure 2", 5)):
        assert {cell.config.seeds for cell in TABLES[key].cells} == {seeds}
    mlp = by_name("table 1")["BackMAN, MLP MNIST"].config
    assert (mlp.widths, mlp.activation, mlp.optimizer, mlp.schedule, mlp.epochs) == (
        (2000,) * 4, "relu", "sgd", "halfway", 100,
    )  # fmt: skip
    assert len(TABLES["figure 2"].cells) == 24 and len(TABLES["figure 3"].cells) == 32
    assert all(cell.config.batch_size == 1024 for cell in TABLES["figure 2"].cells)
    stems = {key: [cell.stem for cell in table.cells] for key, table in TABLES.items()}
    assert all(len(set(names)) == len(names) for names in stems.values())
    chosen = [cell.config for cell in TABLES["table 1"].cells if not cell.quoted]
    assert all(c.batch_size in settings.BATCHES and c.learning_rate in settings.RATES for c in chosen)


@pytest.mark.parametrize("column", ["MLP MNIST", "LeNet-5 CIFAR-10", "ResNet-18 CIFAR-100"])
def test_backmans_update_of_each_layer_has_the_norm_one(column):
    config = by_name("table 1")[f"BackMAN, {column}"].config
    classes = 100 if "100" in column else 10
    shape = (28, 28, 1) if "MNIST" in column else (32, 32, 3)
    model = lambda: models.build(config.model, shape, classes, rngs=nnx.Rngs(0), widths=config.widths)  # noqa: E731
    flat = {".".join(map(str, name)): leaf.shape for name, leaf in nnx.to_flat_state(nnx.state(nnx.eval_shape(model)))}
    alphas = expressions.single(config.rule, "rule")[2]["alpha"]
    for name, dimensions in flat.items():
        if name.endswith("kernel"):
            alpha = next(value for pattern, value in alphas.items() if re.search(pattern, name))
            assert alpha == pytest.approx(dimensions[-1] ** -0.5, rel=1e-3), name


@pytest.mark.slow
def test_every_rule_serves_its_network():
    """Traced with few units: each kind of network with each of its rules once, ResNets with one."""
    seen = set()
    for table in TABLES.values():
        for cell in table.cells:
            config = cell.config
            blocks = int(config.model.removeprefix("resnet50(blocks=")[:-1]) if "resnet50" in config.model else 0
            kind = config.model.split("(")[0], config.rule.split("(alpha={")[0]
            slow = kind[0].startswith("resnet") and kind[1] != "backman"  # those take long
            if cell.quoted or kind in seen or blocks > 4 or slow:
                continue
            seen.add(kind)
            small = {"resnet18": "resnet18(width=4)", "resnet50": f"resnet50(width=4,blocks={blocks})"}
            config = config.replace(model=small.get(kind[0], config.model), widths=(6,) * len(config.widths))
            shape = table_3.SHAPES["mlp" if config.dataset == "mnist" else "lenet5"]
            x, y = np.zeros((20, *shape), np.uint8), np.arange(20) % 10
            dataset = data.check({"train": (x, y), "test": (x, y)}, 10, config.dataset)
            task = tasks.build(config, dataset)
            methods.check(task, {config.rule: rules.parse(config.rule)}, x, y, 4)
    assert {("resnet18", "backman"), ("resnet50", "backman"), ("lenet5", "kolen_pollack")} <= seen


def digits(folder, examples=60):
    """A set of ten classes that a small network learns, as mnist.npz."""
    rng = np.random.default_rng(0)
    y = np.arange(examples) % 10
    x = rng.integers(0, 60, (examples, 4, 4, 1)).astype(np.uint8)
    x[np.arange(examples), y // 4, y % 4, 0] = 255
    np.savez(folder / "mnist.npz", x_train=x, y_train=y, x_test=x[:40], y_test=y[:40])


def measured(tmp_path, cell, *, seconds=None):
    """What the program measures of one cell, and whether it came to its end."""
    table = {"table 9": cells.Table("A table", [cell])}
    wanted = program.Wanted(data_dir=str(tmp_path), work=tmp_path / "work")
    with signals.Stop(seconds=seconds) as stop:
        program.run(table, tmp_path / "out", wanted, stop)
    return cells.load(tmp_path / "out" / "table_9", cell)


def small(cell, **changes):
    few = {"widths": (12,), "epochs": 2, "seeds": 2, "batch_size": 4, "augmentation": ""}
    return cell._replace(config=cell.config.replace(**few | changes))


def test_a_grid_has_the_validation_accuracy_of_each_rate(tmp_path):
    digits(tmp_path)
    cell = small(by_name("table 5")["BackMAN, batch 64"], epochs=3, validation=0.34, rule="backman")
    found = measured(tmp_path, cell)
    values = np.array([found.values(figure.name) for figure in settings.SHOWN])
    assert values.shape == (4, 2) and values[2].mean() > values[0].mean()
    assert found.contents[0]["chosen"]["learning_rate"] in settings.RATES
    panel = TABLES["table 5"].plot([found]).axes[0]
    papers = [line for line in panel.lines if len(line.get_xdata()) == 4 and line.get_linewidth() == 5]
    assert len(panel.containers) == len(papers) == 1  # ours, with error bars, and the paper's
    assert " 93.9 | " in report.markdown(cells.Table("", [cell], settings.SHOWN), tmp_path / "out" / "table_9")


@pytest.mark.parametrize("row", [settings.UNIFORM, settings.EBP_HE])
def test_rows_with_other_initial_weights(monkeypatch, row):
    """PyTorch's and those of He et al., each seed its own; all else is the row without them."""
    cell = by_name("table 5")[f"{row}, batch 1024"]
    assert cell.config == by_name("table 5")[f"{row.partition(',')[0]}, batch 1024"].config
    dataset = type("Data", (), {"shape": (20, 20, 1), "classes": 10})
    job = type("Job", (), {"config": cell.config.replace(widths=(30, 100)), "dataset": lambda self, config: dataset})()
    monkeypatch.setattr(settings, "rates", lambda job, task: task)
    task = cell.measure(job)
    drawn = jax.vmap(lambda key: task.init(key)[0])(jax.random.split(jax.random.key(0), 50))
    for i, inputs in enumerate((400, 30, 100)):
        kernel, bias = (np.asarray(drawn["layers"][i][name][...]) for name in ("kernel", "bias"))
        assert not (kernel[0] == kernel[1]).any()
        if row == settings.UNIFORM:
            for values in (kernel, bias):
                assert 0.95 < abs(values).max() * inputs**0.5 <= 1 and abs(values.mean()) < 0.1 * inputs**-0.5
            assert not (bias[0] == bias[1]).any()
        else:
            assert abs(kernel).max() > 3 * kernel.std() and not bias.any()
        variance = 1 / 3 if row == settings.UNIFORM else 2
        np.testing.assert_allclose(kernel.std(), (variance / inputs) ** 0.5, rtol=0.05)


def test_forgetting_goes_on_after_a_stop(tmp_path):
    digits(tmp_path)
    cell = small(by_name("table 2")["BackMAN"], batch_size=2, learning_rate=0.05)
    whole = measured(tmp_path, cell).contents[0]

    class AfterSome:
        """Asks to stop once some epochs are trained."""

        def __init__(self, calls):
            self.calls = calls

        @property
        def requested(self):
            self.calls -= 1
            return self.calls < 0

    config = cell.config
    dataset = data.load("mnist", data_dir=str(tmp_path))
    job = cells.Job(config, (), lambda config: dataset, tmp_path / "stopped", AfterSome(6), Progress(1, "epoch"))
    assert forgetting.forgetting(job) is None
    again = forgetting.forgetting(job._replace(stop=AfterSome(99)))
    assert again["after"].tolist() == whole["after"]
    last = np.array(whole["after"])[:, -1]
    np.testing.assert_allclose(whole["average"]["by_seed"], last.mean(1))
    np.testing.assert_allclose(whole["drop 1"]["by_seed"], np.array(whole["after"])[:, 0, 0] - last[:, 0])
    found = cells.load(tmp_path / "out" / "table_9", cell)
    assert len(forgetting.figure_1([found]).axes) == 2 and forgetting.table_2([found]).axes


def test_the_grid_of_forgetting_has_another_division(tmp_path):
    digits(tmp_path)
    cell = by_name("section 4.2")["Error-backpropagation, batch 64"]
    found = measured(tmp_path, small(cell, validation=0.34, epochs=1))
    assert all(found.values(figure.name).shape == (2,) for figure in settings.SHOWN)


def test_times_are_those_of_the_rule_and_of_plain_backpropagation(tmp_path, monkeypatch):
    monkeypatch.setattr(table_3, "ROUNDS", 2)
    steps = {"plain": 1.0, "backman": 2.0}  # what a step takes
    row = benchmark.Row(1.0, (1.0, 1.0, 1.0), None, 1.0, 1.0, 1, 1.0, 0, True)

    def times(maker, case, chosen, **options):
        assert case == benchmark.Case((28, 28, 1), 4, (12,)) and options["repeats"] == 2
        rows = {name: row._replace(step_seconds=steps[name], step_ratio=(steps[name], 1, 3)) for name in steps}
        return {name: rows[name] for name in ("plain", *chosen)}, {}

    monkeypatch.setattr(benchmark, "benchmark", times)
    for name, ratio in (("Error-backpropagation, MLP", 1.0), ("BackMAN, MLP", 2.0)):
        found = measured(tmp_path, small(by_name("table 3")[name], seeds=1))
        assert found.values("seconds").tolist() == [1e4 * ratio] and found.values("ratio").tolist() == [ratio]


def test_times_are_those_of_the_models_of_the_table():
    """LeNet-5 too, whose config has widths that it does not use."""
    for column, model in {"MLP": models.MLP, "LeNet-5": models.LeNet5}.items():
        config = by_name("table 3")[f"BackMAN, {column}"].config
        make = benchmark.Case(table_3.SHAPES[config.model], 2, config.widths).maker(config.model, config.dtype)
        assert type(nnx.eval_shape(lambda make=make: make(nnx.Rngs(0)))) is model


def test_recorded_coefficients_are_those_of_backman():
    net, loss = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], methods.lrules.testing.half_squared_error
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"a": jax.random.normal(keys[0], (5, 8)), "b": jax.random.normal(keys[1], (8, 3))}
    x, y = jax.random.normal(keys[2], (6, 5)), jax.random.normal(keys[3], (6, 3))
    found = {}
    alpha = {"a": 0.5, "b": 2.0}
    for name, rule in (("own", coefficients.recorded(alpha)), ("library", lrules.backman(alpha=alpha))):
        feedback = rule.init(keys[0], net, params, x)
        found[name] = lrules.value_and_grad(net, loss, rule)(params, feedback, x, y)[1]
    for name in params:
        np.testing.assert_allclose(found["own"].params[name], found["library"].params[name], rtol=1e-5, atol=1e-6)
    error = (net(params, x) - y) / 6
    raw = jax.nn.relu(x @ params["a"]).T @ error
    state = found["own"].state["b"]
    np.testing.assert_allclose(state["c"], 2 / jnp.linalg.norm(raw, axis=0), rtol=1e-5)
    np.testing.assert_allclose(state["g"], state["c"] * jnp.linalg.norm(error, axis=0), rtol=1e-5)


def test_coefficients_by_layer_and_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(figure_4, "LAYERS", 3)
    digits(tmp_path)
    (cell,) = TABLES["figure 4"].cells
    assert cell in TABLES["table 1"].cells and cell.name == "BackMAN, MLP MNIST"
    rule = "backman(alpha={'layers.2': 0.5, '.*': 0.3})"
    found = measured(tmp_path, small(cell, widths=(12, 10), epochs=3, validation=0.34, rule=rule))
    assert found.values("accuracy").shape == (2,)
    for number in (1, 2, 3):
        epochs, median = found.curve(f"median {number}")
        assert epochs.tolist() == [1, 2, 3] and median.shape == (3, 2) and (median > 0).all()
        assert (found.curve(f"low {number}")[1] <= median).all()
        assert (np.abs(found.values(f"g {number}")) <= 1).all()
    assert len(figure_4.figure_4([found]).axes) == 6


def test_the_picture_of_a_depth(tmp_path):
    digits(tmp_path)
    cell = small(by_name("figure 2")["2 hidden layers, BackMAN"], widths=(12, 12), validation=0.34, seeds=1)
    found = measured(tmp_path, cell)
    assert found.contents[0]["chosen"]["learning_rate"] > 0.0004
    assert TABLES["figure 2"].plot([found]).axes[0].get_xlabel() == "hidden layers of 2,000"


@pytest.mark.parametrize("file", sorted(pathlib.Path(settings.__file__).parent.rglob("*.json")))
def test_committed_cells_have_a_device_and_a_commit(file):
    content = json.loads(file.read_text())
    assert content["provenance"]["device"] and content["provenance"]["commit"]
    Config.from_dict(content["config"])
