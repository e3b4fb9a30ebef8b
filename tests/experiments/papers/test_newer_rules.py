"""The tables of the papers behind the newer rules: each trains on a few images, with the numbers of its sources."""

import importlib

import numpy as np
import pytest

from experiments import data, methods, rules, signals
from experiments.papers.cells import Job
from experiments.progress import Progress

# For each paper: the row whose rule it is about, small widths, and the figure beyond the accuracy.
PAPERS = {
    "akrout_2019": ("WM", (5,), "angle"),
    "lee_2015": ("DTP", (5, 5, 4), "angle"),
    "nokland_2019": ("Local losses, predsim", (5, 4), "error"),
    "ren_2023": ("LG-FG-A", (5, 4), "error"),
    "scellier_2017": ("EP, nudged by beta", (5,), "forward_accuracy"),
    "webster_2021": ("DKP", (2, 3, 4), "train_loss"),
    "whittington_2017": ("PC, output variance 1", (5, 4), "angle"),
}


def program(paper):
    return importlib.import_module(f"experiments.papers.{paper}.__main__")


def cells_of(paper):
    return {cell.name: cell for table in program(paper).TABLES.values() for cell in table.cells}


def tiny(channels):
    """Images that a network can tell apart."""
    noise = np.random.default_rng(0).integers(0, 40, (96, 8, 8, channels))
    y = np.arange(96) % 3
    x = (noise + 80 * y[:, None, None, None]).astype(np.uint8)
    y = y.astype(np.int32)
    return data.Dataset(x[:48], y[:48], x[48:72], y[48:72], 3, "tiny", x[72:], y[72:])


@pytest.mark.foreign  # Adam of optax
@pytest.mark.parametrize("paper", PAPERS)
def test_a_small_cell_is_measured(paper, tmp_path):
    name, widths, figure = PAPERS[paper]
    cell = cells_of(paper)[name]
    config = cell.config.replace(widths=widths, batch_size=12, epochs=1, seeds=1)
    channels = 3 if config.dataset == "cifar10" else 1
    job = Job(config, (), lambda _: tiny(channels), tmp_path, signals.Stop(), Progress(1, "epoch", show=False))
    found = cell.measure(job)
    for each in ("accuracy", "test_loss", figure):
        assert np.isfinite(found[each]["by_seed"]).all(), each
    if figure == "error":
        np.testing.assert_allclose(np.add(found["error"]["by_seed"], found["accuracy"]["by_seed"]), 1)


@pytest.mark.slow
@pytest.mark.foreign
@pytest.mark.parametrize("paper", PAPERS)
def test_every_rule_accepts_its_network(paper):
    for cell in cells_of(paper).values():
        examples = tiny(3 if cell.config.dataset == "cifar10" else 1)
        config = cell.config.replace(widths=PAPERS[paper][1])
        task = program(paper).task(config, examples)
        methods.check(task, {cell.name: rules.parse(config.rule)}, examples.x_train, examples.y_train, 12)


def test_the_numbers_are_those_of_the_sources():
    """The README of Nokland and Eidnes, that of Webster, the logs of Akrout et al., Table 3 of Ren et al."""
    found = {paper: {name: dict(c.paper) for name, c in cells_of(paper).items() if c.paper} for paper in PAPERS}
    errors = {name: numbers["error"][0] for name, numbers in found["nokland_2019"].items()}
    assert list(errors.values()) == [0.75, 0.68, 0.80, 0.62]
    accuracies = {name: numbers["accuracy"][0] for name, numbers in found["webster_2021"].items()}
    assert accuracies == {"BP": 70.47, "DFA": 61.02, "DKP": 67.52}
    logs = {name: numbers["accuracy"][0] for name, numbers in found["akrout_2019"].items()}
    assert logs == {"BP": 96.23, "FA": 92.25, "WM": 92.62, "KP": 97.00}
    table_3 = {name: numbers["error"][0] for name, numbers in found["ren_2023"].items()}
    assert table_3["FG-W"] == table_3["LG-FG-W"] == 9.25 and table_3["FG-A"] == table_3["LG-FG-A"] == 3.24
    assert (table_3["BP"], table_3["LG-BP"], table_3["FA"], table_3["DFA"]) == (2.66, 2.43, 2.82, 3.31)
    assert not found["lee_2015"] and not found["scellier_2017"] and not found["whittington_2017"]
