"""Section 4.2 of Baldi et al.: what is frozen, how verdicts fall, and the cells."""

import json

import jax
import numpy as np
import optax
import pytest

from experiments import data, loop, methods, rules, signals
from experiments.papers import program, report
from experiments.papers.baldi_2018 import section_4_2 as obs
from tests.experiments.programs import run

HIDDEN, MEAN = 4, 0.03
ENTRIES = obs.entries(HIDDEN, MEAN)
OBSERVATIONS = obs.observations(HIDDEN, MEAN)


def figures(**tests):
    """Invented results: BP 0.98, the top layer only 0.90, anything else as one of BP's kind, unless told otherwise."""
    found = {name: 0.97 for name in ENTRIES} | {name: 0.98 for name in ENTRIES if name.startswith("BP")}
    found |= {name: 0.90 for name in ENTRIES if name.startswith(obs.TOP)} | tests.pop("tests", {})
    train = {name: 1.0 for name in ENTRIES} | tests.pop("train", {})
    assert set(found) == set(train) == set(ENTRIES), "a name is misspelt"
    spread = np.array([-0.002, 0.002])
    return {name: obs.Accuracy(train[name] + 0 * spread, found[name] + spread) for name in ENTRIES}


@pytest.mark.parametrize("frozen", [(), (1,), (2, 3)])
def test_frozen_layers_stay_and_all_others_train(frozen):
    x = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
    small = data.Dataset(x, np.arange(16) % 3, x, np.arange(16) % 3, 3, "small")
    optimizer = optax.chain(optax.sgd(0.1, momentum=0.9), obs.freeze(frozen))
    task = obs.make_task("tanh", [5, 4, 4, 4, 3])
    trained = loop.Run(methods.by_rule(task, rules.parse("srbp"), optimizer), small, batch_size=8)

    def snapshot():
        leaves = jax.tree_util.tree_leaves_with_path(trained.carry.params)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): np.array(leaf) for path, leaf in leaves}

    before = snapshot()
    trained.epoch()
    moved = {name for name, after in snapshot().items() if not np.array_equal(after, before[name])}
    parts = {layer: {name for name in before if name.startswith(f"layers/{layer - 1}/")} for layer in (1, 2, 3, 4)}
    assert all(len(names) == 2 for names in parts.values())  # kernel and bias
    assert moved == set().union(*(parts[layer] for layer in parts if layer not in frozen))


def test_freezing_tells_layer_one_from_layer_eleven():
    tree = {"layers": {str(i): {"kernel": np.ones(2)} for i in range(12)}}
    transformation = obs.freeze((2,))
    updates, _ = transformation.update(tree, transformation.init(tree))
    assert [float(updates["layers"][str(i)]["kernel"].sum()) for i in range(12)] == [2, 0] + [2] * 10


@pytest.mark.parametrize("hidden", [2, 3, 4, 6])
def test_every_observation_has_its_runs(hidden):
    entries, observations = obs.entries(hidden, MEAN), obs.observations(hidden, MEAN)
    assert list(observations) == [*"12345678", "8, rate 0.02"]
    for observation in observations.values():
        assert set(observation.runs) <= set(entries) and len(observation.runs) == len(set(observation.runs)) >= 3
    used = set().union(*(observation.runs for observation in observations.values()))
    assert set(entries) == used


def test_fixed_layers_are_those_that_the_name_says():
    runs = {name: ENTRIES[name].frozen for name in OBSERVATIONS["4"].runs}
    assert runs == {
        "SRBP": (),
        "SRBP, layer 2 fixed": (2,),
        "SRBP, layers 1-2 fixed": (1, 2),
        "SRBP, layer 3 fixed": (3,),
        "SRBP, layers 1-3 fixed": (1, 2, 3),
        "SRBP, layer 4 fixed": (4,),
        "top layer only": (),  # nothing below the top trains anyway
        "SRBP, layers 2-4 fixed": (2, 3, 4),
        "SRBP, layers 3-4 fixed": (3, 4),
    }


@pytest.mark.parametrize(
    ("number", "yes", "no"),
    [
        ("1", {"RBP, redrawn": 0.89}, {"RBP, redrawn": 0.96}),
        ("1", {"RBP, redrawn": 0.919}, {"RBP, redrawn": 0.3}),  # poorer by far is not alike
        ("1", {"RBP, redrawn": 0.90}, {"RBP, redrawn": 0.90, "RBP": 0.89}),
        ("3", {"RBP, normal, mean 0.03": 0.955}, {"RBP, normal, mean 0.03": 0.94}),
        ("3", {"SRBP, uniform, mean 0.03": 0.985}, {"SRBP, uniform, mean 0.03": 0.1}),
        (
            "4",
            {"SRBP, layer 2 fixed": 0.8, "SRBP, layer 4 fixed": 0.85},
            {"SRBP, layer 2 fixed": 0.8, "SRBP, layer 4 fixed": 0.95},
        ),
        ("5", {"SRBP, sign only": 0.95}, {"SRBP, sign only": 0.89}),
        ("5", {"SRBP, sign only": 0.91}, {"SRBP, sign only": 0.975}),
        ("6", {"SRBP, magnitude only": 0.1}, {"SRBP, magnitude only": 0.91}),
        ("7", {"one random weight a synapse": 0.7}, {"one random weight a synapse": 0.95}),
        ("8", {"RBP, linear": 0.945}, {"RBP, linear": 0.93}),
        ("8", {}, {"SRBP, logistic": 0.5}),
        ("8, rate 0.02", {"SRBP, logistic": 0.5}, {"SRBP, logistic, rate 0.02": 0.5}),
        ("8", {}, {"BP, ReLU": 0.1, "RBP, ReLU": 0.6}),  # where nothing learns, half-way is not enough
    ],
)
def test_a_verdict_falls_either_way(number, yes, no):
    assert OBSERVATIONS[number].holds(figures(tests=yes)) is True
    assert OBSERVATIONS[number].holds(figures(tests=no)) is False


def test_the_verdict_on_training_error_reads_training_error():
    name = "RBP, redrawn, forward signs"
    assert OBSERVATIONS["2"].holds(figures(train={name: 0.998}, tests={name: 0.5})) is True
    assert OBSERVATIONS["2"].holds(figures(train={name: 0.98}, tests={name: 1.0})) is False


def test_the_mean_reaches_the_feedback():
    rule = rules.parse(obs.entries(2, 5.0)["RBP, uniform, mean 5"].rule)
    task = obs.make_task("tanh", [64, 8, 8, 10])
    params, state = task.init(jax.random.key(0))
    fixed = rule.init(jax.random.key(1), task.net, params, (state, data.load("digits").x_train[:8])).fixed
    assert len(fixed) == 2 and all(abs(b.mean() - 5) < 0.5 and b.std() > 0.1 for b in fixed.values())


def test_the_figure_shows_every_run():
    found = figures(tests={"RBP, redrawn": 0.9})
    picture = obs.figure(OBSERVATIONS, found, "title")
    assert len(picture.axes) == 9
    for axis, (number, observation) in zip(picture.axes, OBSERVATIONS.items(), strict=True):
        assert axis.get_title(loc="left").startswith(f"{number}. ")
        assert axis.get_title(loc="left").endswith(obs.verdict(observation, found))
        assert [label.get_text() for label in axis.get_yticklabels()] == observation.runs
    assert len(obs.figure({"3": OBSERVATIONS["3"]}, found, "title").axes) == 1


@pytest.mark.slow
def test_every_run_is_a_cell_whose_rule_trains_its_network():
    table = obs.ON_MNIST
    assert [cell.row for cell in table.cells] == list(ENTRIES)
    assert len({cell.stem for cell in table.cells}) == len(ENTRIES) == 44
    task, x = obs.make_task("logistic", [4, 3, 3, 3, 3, 2]), np.zeros((2, 4), np.float32)
    methods.check(task, {cell.name: rules.parse(cell.config.rule) for cell in table.cells}, x, np.zeros(2, int), 2)
    of = {cell.row: cell for cell in table.cells}
    assert of["SRBP, ReLU, rate 0.02"].config.learning_rate == 0.02 and of["SRBP, ReLU, rate 0.02"].beyond
    assert of["SRBP, ReLU"].config.activation == "ReLU" and of["SRBP, ReLU"].config.learning_rate == 0.1


@pytest.mark.slow
def test_cells_become_verdicts_a_picture_and_a_report(tmp_path):
    config = obs.DIGITS.replace(widths=(6, 6), epochs=2, seeds=2, batch_size=200)
    table = obs.table(config, "Digits", 0.1)
    wanted = ("BP", obs.TOP, "SRBP", "SRBP, layer 2 fixed", "SRBP, magnitude only", "SRBP, ReLU")
    table = table._replace(cells=[cell for cell in table.cells if cell.row in wanted])
    program.run({"section 4.2": table}, tmp_path, program.Wanted(work=tmp_path / "work"), signals.Stop())
    folder = tmp_path / "section_4.2"
    content = json.loads((folder / "srbp_layer_2_fixed.0-1.json").read_text())
    assert content["frozen"] == [2] and np.shape(content["curves"]["train_accuracy"]) == (2, 2)
    assert content["curves"]["train_accuracy"][-1] == content["train_accuracy"]["by_seed"]
    found = report.measured(table, folder)
    values = obs.accuracies(found)
    assert set(values) == set(wanted) and values["BP"].train.shape == (2,)
    text = report.markdown(table, folder)
    own = obs.observations(2)
    assert f"- **6.** {own['6'].claim} *{obs.verdict(own['6'], values).capitalize()}*" in text
    assert "- **4.**" in text and "- **1.**" not in text and "- **8.**" not in text  # these lack runs
    assert [axis.get_title(loc="left")[0] for axis in obs.plot(found).axes] == ["4", "6"]
    # The lowest of two layers and the frozen one: the frozen run is another one than SRBP.
    assert content["test_loss"] != json.loads((folder / "srbp.0-1.json").read_text())["test_loss"]


def test_nothing_measured_has_no_verdict():
    assert obs.verdicts([]) == ""


@pytest.mark.slow
def test_observations_on_digits(tmp_path):
    """The program as it stands. Whether 1, 4 and 5 hold on digits is a matter of some tenths of a percent or no.

    Nor 8: at its rate SRBP with ReLU learns or fails by rounding, 94% or 75% with other options of the compiler.
    """
    done = run("papers.baldi_2018", "--section=4.2 on digits", f"--output={tmp_path}/out", f"--work={tmp_path}/work")
    assert done.returncode == 0, done.stderr
    values = obs.accuracies(report.measured(obs.ON_DIGITS, tmp_path / "out" / "section_4.2_on_digits"))
    assert [n for n in ("2", "3", "6", "7", "8, rate 0.02") if not OBSERVATIONS[n].holds(values)] == []
    accuracy = {name: each.test.mean() for name, each in values.items()}
    assert accuracy["BP"] > 0.95 and accuracy["RBP"] > 0.94 and accuracy["SRBP"] > 0.94
    assert accuracy["RBP, redrawn"] < accuracy["top layer only"] < accuracy["SRBP, sign only"]
    assert abs(accuracy["SRBP, normal, mean 0.03"] - accuracy["SRBP"]) < 0.005  # softmax errors add up to zero
