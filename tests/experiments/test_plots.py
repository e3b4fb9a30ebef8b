"""Figures: what is on them, for one seed, one epoch, many rules, errors of zero and NaN."""

import pathlib
import re

import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import plots
from experiments.loop import Record
from experiments.papers.lansdell_2019 import figure_1

ALL = slice(None)


def records(accuracy, angle=50.0):
    """A record for each row of accuracies [epochs, seeds]."""
    ones = np.ones(len(accuracy[0]))
    return [Record(i + 1, ones, ones, np.array(row), angle * ones) for i, row in enumerate(accuracy)]


def test_the_band_is_one_sample_sd():
    figure = plots.learning_curves({"bp": (records([[0.9, 0.8], [0.95, 0.9]]), ALL)}, "mlp")
    axis, _ = figure.axes
    assert axis.get_yscale() == "log" and axis.get_title(loc="left") == "mlp"
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [15, 7.5])
    top = axis.collections[0].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(15 + np.std([10, 20], ddof=1))


@pytest.mark.parametrize("accuracy", [1.0, np.nan])
def test_an_error_of_zero_is_seen(accuracy):
    """It has no place on a logarithmic axis; what is NaN has none on any."""
    figure = plots.learning_curves({"bp": (records([[0.9], [accuracy]]), ALL)}, "mlp")
    assert figure.axes[0].get_yscale() == ("linear" if accuracy == 1 else "log")


def test_the_legend_of_many_rules_leaves_room():
    names = [f"quantize_error(backman(alpha={i}), bits=3)" for i in range(40)]
    figure = plots.learning_curves({name: (records([[0.9], [0.95]]), ALL) for name in names}, "mlp on digits")
    figure.draw_without_rendering()
    (legend,), panel = figure.legends, figure.axes[0].get_window_extent()
    box = legend.get_window_extent()
    assert box.x0 > figure.axes[1].get_window_extent().x1 and box.y0 >= 0 and panel.width > 300
    assert len(legend.get_texts()) == 40


def test_the_papers_figure_has_sample_sds():
    axis = Figure().subplots()
    figure_1.band(axis, [1, 2], np.array([[1.0, 3.0], [1.0, 3.0]]), 1, "red", "-")
    assert axis.collections[0].get_paths()[0].vertices[:, 1].max() == pytest.approx(3)  # 2 + sqrt(2) / sqrt(2)


def test_the_notebooks_have_the_same_colours():
    """A notebook stands alone, without the programs, so it repeats them."""
    for path in sorted((pathlib.Path(__file__).parents[2] / "notebooks").glob("*.ipynb")):
        code = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
        assert "plt.subplots" not in code or set(re.findall("#[0-9A-F]{6}", code)) == set(plots.COLOURS), path
