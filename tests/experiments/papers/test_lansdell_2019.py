"""The cells of the node-perturbation paper."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lrules
from experiments import build, data, methods, models, optimizers, rules, signals, tasks
from experiments.papers import cells, report
from experiments.papers.cells import Job
from experiments.papers.lansdell_2019 import __main__ as program
from experiments.papers.lansdell_2019 import figure_1, figure_2, networks, section_3_3, steps
from experiments.progress import Progress

TOP, MIDDLE = "layers/2/kernel", "layers/1/kernel"
TABLES = program.TABLES
CELLS = {(key, cell.name): cell for key, table in TABLES.items() for cell in table.cells}


def tiny(side=4):
    """Images that a network can tell apart."""
    noise = np.random.default_rng(0).integers(0, 40, (240, side, side, 1))
    y = np.arange(240) % 3
    x = (noise + 80 * y[:, None, None, None]).astype(np.uint8)
    return data.Dataset(x[:180], y[:180].astype(np.int32), x[180:], y[180:].astype(np.int32), 3, "tiny")


class Short(signals.Stop):
    """Asks the run to end after some epochs."""

    def __init__(self, epochs):
        super().__init__()
        self.left = itertools.count(epochs, -1)

    @property
    def requested(self):
        return next(self.left) <= 0


def job(cell, work, stop=None, **changes):
    config = cell.config.replace(seeds=2, batch_size=6, **changes)
    bar = Progress(1, "epoch", show=False)
    return Job(config, (), lambda _: tiny(), work, stop or signals.Stop(), bar)


@pytest.fixture(scope="module")
def short():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "STEPS", 8)
        yield


NP, AUTOENCODER = CELLS["figure 1", "NP, std 0.1"], CELLS["figure 2", "NP"]
STEPS = steps.STEPS  # before `short`


@pytest.fixture(scope="module")
def whole(tmp_path_factory, short):
    """Figure 1, without a stop."""
    return NP.measure(job(NP, tmp_path_factory.mktemp("whole"), epochs=5, widths=(5, 4)))


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory, short):
    changes = {"epochs": 8, "widths": (6, 2, 6), "learning_rate": 0.001}
    return AUTOENCODER.measure(job(AUTOENCODER, tmp_path_factory.mktemp("autoencoder"), **changes))


@pytest.fixture(scope="module")
def setting():
    made = tasks.task(lambda rngs: models.MLP((6, 5, 4, 3), jax.nn.sigmoid, rngs=rngs), loss=tasks.squared_error)
    params, state = made.init(jax.random.key(0))
    x, y = jax.random.uniform(jax.random.key(1), (20, 6)), jnp.arange(20) % 3
    return made, params, state, x, y


def measured(setting, rule, change=lambda leaf: leaf, **options):
    made, params, state, x, y = setting
    feedback = rule.init(jax.random.key(2), made.net, params, (state, x))
    params = jax.tree.map(change, params)
    compare = figure_1.alignments(made, rule, x, y, **options)
    return feedback, params, compare(params, state, feedback, jax.random.key(3))


def test_backprop_has_the_weights_themselves(setting):
    _, _, found = measured(setting, lrules.backprop(), transports=True)
    assert list(found) == [MIDDLE, TOP]
    for layer in found.values():
        assert (layer.relative_error, layer.sign_agreement) == (0, 1) and layer.angle < 0.1


def test_a_rule_without_feedback_weights_has_an_angle_alone(setting):
    _, _, found = measured(setting, lrules.sign_symmetry())
    for layer in found.values():
        assert np.isnan(layer.relative_error) and np.isnan(layer.sign_agreement) and layer.angle > 0.1


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


def test_numbers_and_settings_of_the_paper():
    errors = {name: cell.paper for (key, name), cell in CELLS.items() if key == "figure 1"}
    assert errors["BP"] == {"error": (2.65, None)} and errors["FA"] == {"error": (4.28, None)}
    assert errors["NP, std 0.1"] == {"noisy_error": (15.9, None)}
    losses = {name: cell.paper.get("lowest_test_loss") for (key, name), cell in CELLS.items() if key == "figure 2"}
    assert losses["NP"] == (515, None) and losses["BP"] == (610, None) and losses["FA"] == (759, None)
    accuracies = {name: cell.paper.get("accuracy") for (key, name), cell in CELLS.items() if key == "section 3.3"}
    assert accuracies == {"NP": (75.2, None), "DFA": (72.5, None), "BP": (77.2, None), "FA": None}
    config = CELLS["figure 1", "BP"].config
    assert config.epochs * steps.STEPS == 2_001_000 and config.learning_rate == pytest.approx(32 * 4e-4)
    autoencoder = CELLS["figure 2", "NP"].config
    assert autoencoder.feedback_learning_rate == pytest.approx(32 * 8e-6) and autoencoder.epochs * steps.STEPS == 10**6


def test_examples_come_in_passes():
    """All examples once, in a new order each time, however the epochs cut the passes."""
    found = np.concatenate([steps.rows(3, epoch, 8, 10) for epoch in range(5)])
    passes = found.reshape(4, 10)
    assert (np.sort(passes, 1) == np.arange(10)).all() and len({tuple(each) for each in passes}) == 4
    assert (steps.rows(4, 0, 8, 10) != found[:8]).any()
    assert len(steps.training_images(tiny()).x_train) == 165  # of 180, as 55,000 of 60,000


@pytest.mark.parametrize("epochs", [1, 2, 30, 1000, 2001])
def test_curves_have_few_points_and_the_last(epochs):
    points = steps.looks(epochs)
    assert points[-1] == epochs and len(points) < 40 and points == sorted(set(points))
    assert epochs != 2001 or set(figure_1.LENGTHS) <= set(points)


def test_weights_as_the_authors_draw_them_and_noise_in_hidden_signals():
    make = lambda rngs: networks.Dense((400, 200, 50, 5), ("tanh", "identity", "relu"), rngs=rngs)  # noqa: E731
    model = make(nnx.Rngs(0))
    assert float(jnp.var(model.layers[1].kernel[...])) == pytest.approx(2 / 200, rel=0.05)
    assert float(jnp.std(model.layers[0].bias[...])) == pytest.approx((2 / 400) ** 0.5, rel=0.2)
    _, params, state = nnx.split(model, nnx.Param, ...)
    noisy, x, key = networks.noisy(make), jnp.ones((3000, 400)) * 0.1, jax.random.key(1)
    clean = model(x)
    np.testing.assert_allclose(noisy(params, state, x, 0.0, key), clean, rtol=1e-5)
    assert model(x, stop=2).shape == (3000, 50)
    moved = (noisy(params, state, x, 1e-2, key) - clean)[:, np.asarray(clean[0]) > 0.1]
    second = model.layers[1].kernel[...] @ model.layers[2].kernel[...]  # noise below the linear layer, and above it
    expected = 1e-4 * (jnp.square(second).sum(0) + jnp.square(model.layers[2].kernel[...]).sum(0))
    np.testing.assert_allclose(moved.var(0), expected[np.asarray(clean[0]) > 0.1], rtol=0.15)


@pytest.mark.slow
def test_figure_one_goes_on_after_a_stop_as_without_it(tmp_path, whole):
    parts = [NP.measure(job(NP, tmp_path, Short(3), epochs=5, widths=(5, 4))) for _ in range(2)]
    assert parts[0] is None
    for name, figure in whole.items():
        if name != "curves":
            np.testing.assert_array_equal(parts[1][name]["by_seed"], figure["by_seed"])
    curves = whole["curves"]
    assert curves["epoch"].tolist() == [1, 2, 3, 4, 5] == parts[1]["curves"]["epoch"].tolist()
    assert (curves["train_loss"][-1] < curves["train_loss"][1]).all()
    assert (curves["relative_error layer 3"][-1] < 1).all() and (whole["noisy_error"]["by_seed"] <= 1).all()


def test_the_warm_up_trains_only_the_feedback(whole):
    curves, examples = whole["curves"], tiny()
    task = tasks.task(figure_1.network(NP.config.replace(widths=(5, 4)), examples), tasks.squared_error)
    for seed in (0, 1):
        params, state = task.init(jax.random.key(seed))  # the weights that no step has changed
        loss = task.evaluate(params, state, jnp.asarray(examples.x_test), jnp.asarray(examples.y_test))["loss"].mean()
        assert curves["test_loss"][0][seed] == pytest.approx(float(loss), rel=1e-5)
        assert curves["test_loss"][1][seed] != pytest.approx(float(loss), rel=1e-2)
    assert np.isnan(curves["train_loss"][0]).all() and (curves["relative_error layer 3"][0] != 1).all()


@pytest.mark.slow
def test_the_autoencoder_learns(autoencoder):
    curves, shown = autoencoder["curves"], autoencoder["shown"]
    assert (curves["test_loss"][-1] < curves["test_loss"][0]).all()
    np.testing.assert_array_equal(autoencoder["lowest_test_loss"]["by_seed"], curves["test_loss"].min(0))
    assert (curves["test_noisy_loss"] != curves["test_loss"]).all()
    assert shown["middle"].shape == (60, 2) and shown["outputs"].shape == (6, 16) == shown["images"].shape
    assert shown["images"].max() <= 255


@pytest.mark.slow
@pytest.mark.foreign
def test_noise_of_the_autoencoder_changes_what_backprop_learns(tmp_path, short):
    plain, noisy = (CELLS["figure 2", name] for name in ("Adam", "Adam with noise"))
    assert plain.config == noisy.config
    found = [cell.measure(job(cell, tmp_path / cell.stem, epochs=2, widths=(6, 2, 6))) for cell in (plain, noisy)]
    assert (found[0]["lowest_test_loss"]["by_seed"] != found[1]["lowest_test_loss"]["by_seed"]).all()
    assert "lowest_test_noisy_loss" not in found[0]


def test_the_loss_of_the_convolutional_net():
    """Its value is half the squared error of the softmax, its gradient that of the cross-entropy."""
    logits, labels = jnp.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]]), jnp.array([0, 2])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    error = p - np.eye(3)[np.asarray(labels)]
    np.testing.assert_allclose(section_3_3.loss(logits, labels), 0.5 * (error**2).sum(1), rtol=1e-5)
    gradient = jax.grad(lambda logits: (section_3_3.loss(logits, labels) * jnp.array([1.0, 2.0])).sum())(logits)
    np.testing.assert_allclose(gradient, error * np.array([[1], [2]]), rtol=1e-5)
    images = section_3_3.standardised(np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8))
    assert float(jnp.abs(images.mean((1, 2, 3))).max()) < 1e-5 and float(images[1].std()) == pytest.approx(1, abs=1e-4)


@pytest.mark.foreign
@pytest.mark.parametrize("name", list(section_3_3.RULES))
def test_the_convolutional_net_with_each_rule(name):
    config, task = CELLS["section 3.3", name].config, section_3_3.task((8, 8, 3), 12)
    method = methods.by_rule(task, rules.parse(config.rule), optimizers.make(config, 4), angle=False)
    x, y = jnp.ones((2, 8, 8, 3)), jnp.array([1, 2])
    carry = jax.eval_shape(lambda key: method.step(method.init(key, x, y), key, x, y), jax.random.key(0))[0]
    shapes = {k: v.shape for k, v in {**carry.feedback.fixed, **carry.feedback.learned}.items()}
    assert (shapes.get("dense/0/kernel") == (10, 256)) == (name in ("NP", "DFA")) and (name == "BP") == (shapes == {})


@pytest.mark.parametrize(("key", "name"), [each for each in CELLS if each[0] != "section 3.3"])
def test_the_dense_networks_accept_their_rules(key, name):
    cell = CELLS[key, name]
    made = (figure_2 if key == "figure 2" else figure_1).network(cell.config, tiny())
    task = tasks.task(made, tasks.half_squared_distance)
    x, y = jnp.zeros((4, 16)), jnp.zeros((4, made(nnx.Rngs(0)).layers[-1].out_features))
    methods.check(task, {cell.name: rules.parse(cell.config.rule)}, x, y, 4)


def test_the_report(tmp_path, whole, autoencoder):
    for key, cell, found in (("figure 1", NP, whole), ("figure 2", AUTOENCODER, autoencoder)):
        folder = report.folder_of(tmp_path, key)
        folder.mkdir()
        config = cell.config.replace(epochs=len(found["curves"]["epoch"]), seeds=2)  # as if with the paper's widths
        cells.keep(folder, cell, config, {"cell": cell.name, "config": config.to_dict()} | found)
    text = report.write(TABLES, tmp_path, program.HEADING)
    assert "15.9" in text and "5 of 2001 epochs" in text and "| NP, std 0.1, noisy, repeat " in text
    assert json.loads(next((tmp_path / "figure_2").glob("np.*")).read_text())["shown"]["classes"]
    assert all((tmp_path / f"figure_{n}.png").stat().st_size > 20_000 for n in (1, 2))


@pytest.mark.slow
def test_learned_feedback_points_where_the_true_gradient_does(tmp_path, monkeypatch):
    """On digits: closer than FA's, and BP and NP learn."""
    monkeypatch.setattr(steps, "STEPS", STEPS)  # `short` lasts to the end of the file
    last = {}
    for name in ("FA", "NP, std 0.001", "BP"):
        cell = CELLS["figure 1 on digits", name]
        bar = Progress(1, "epoch", show=False)
        own = Job(cell.config.replace(seeds=2), (), build.dataset, tmp_path / name, signals.Stop(), bar)
        last[name] = cell.measure(own)
    for layer in figure_1.LAYERS.values():
        ours, fixed = (np.mean(last[name][f"angle {layer}"]["by_seed"]) for name in ("NP, std 0.001", "FA"))
        assert ours < 0.7 * fixed, (layer, ours, fixed)
    assert np.mean(last["BP"]["error"]["by_seed"]) < 0.1 and np.mean(last["NP, std 0.001"]["error"]["by_seed"]) < 0.12
