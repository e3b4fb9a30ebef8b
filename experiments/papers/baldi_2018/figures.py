"""Figures 1 to 9: accuracy on the training set and the test set, by epoch. Most cells are those of Table 1.

    python -m experiments.papers.baldi_2018 --figure=1,2,3,7,8,9     # MNIST: the cells that Table 1 has not measured
    python -m experiments.papers.baldi_2018 --figure=4 --seeds=2     # the sparsity of SRBP
    python -m experiments.papers.baldi_2018 --figure=5,6 --seeds=1   # CIFAR-10

The curves of the paper are pictures, so only the final accuracies of Table 1 stand beside ours. Figures 1 and 5 also
have skipped backpropagation (SBP). The paper names only two of the n in figure 4, 0 and 100. Times are those of Table 1
(`table_1.py`).
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import plots
from experiments.papers.baldi_2018.table_1 import CELLS, CIFAR, TOP, cell
from experiments.papers.cells import Cell, Found, Table, star_key

BY_NAME = {each.name: each for each in CELLS}
COLOURS = {"BP": plots.COLOURS[0], "SBP": plots.COLOURS[3], "RBP": plots.COLOURS[1], "SRBP": plots.COLOURS[2]}
CHANCE = 20  # percent; what ends below it has not learned, and would press the other curves together
SPARSITY = (0, 1, 2, 4, 8, 16, 32, 64, 90, 99, 100)


def _rows(rows: Sequence[str], columns: Sequence[str] = ("BP", "RBP", "SRBP")) -> list[Cell]:
    """The cells of Table 1 in these rows and columns."""
    return [BY_NAME[name] for row in rows for column in columns if (name := f"{row}, {column}") in BY_NAME]


def _nine(data: str) -> list[Cell]:
    """The algorithms of figures 1 and 5."""
    made = []
    for row, rule in (("Baseline", "sbp"), ("No-f'", "without_derivatives(sbp)")):
        bp, *others = _rows([data + row])
        made += [bp, cell(data + row, "SBP", rule), *others]
    return [*made, *_rows([data + TOP])]


def _sparse(n: int) -> Cell:
    """A cell of figure 4, of Table 1 where that has it."""
    row = f"Sparse-{n}"
    return BY_NAME.get(f"{row}, SRBP") or cell(row, "SRBP", f"srbp(init=sparse({n}))")


def by_epoch(found: Sequence[Found]) -> Figure:
    """Two panels by epoch, the mean over the seeds and one sd: the training set above, the test set below.

    Where some cell has no accuracy on the training set, the upper panel has the loss in training. A rule has a colour,
    a row a line style; a star marks reduced cells. What ends at chance is below the panel, and its label says so.
    """
    trained = all(each.values("train_accuracy") is not None for each in found)
    upper = ("train_accuracy", "training accuracy (%)", 100) if trained else ("train_loss", "training loss", 1)
    figure = Figure(figsize=(9, 7.6), dpi=130, layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    rows = dict.fromkeys(each.cell.row for each in found)
    lines = dict(zip(rows, plots.LINES, strict=False))
    marks = dict(zip(rows, itertools.cycle("oxs^Dv"), strict=False))  # for a single point, where lines do not tell
    ends = [100 * float(np.mean(np.asarray(each.values("accuracy")))) for each in found]
    bottom = max(0.0, min((end for end in ends if end > CHANCE), default=5.0) - 5)
    for axis, (name, label, unit) in zip(axes, (upper, ("accuracy", "test accuracy (%)", 100)), strict=True):
        for each, end in zip(found, ends, strict=True):
            epochs, values = each.curve(name)
            mean = unit * values.mean(1)
            sd = unit * (values.std(1, ddof=1) if values.shape[1] > 1 else np.zeros(len(mean)))
            colour = "black" if TOP in each.cell.row else COLOURS[each.cell.column]
            marker = marks[each.cell.row] if len(epochs) == 1 else None
            named = each.cell.name + each.star + " (below)" * (end < bottom)
            axis.plot(epochs, mean, color=colour, linestyle=lines[each.cell.row], marker=marker, label=named)
            axis.fill_between(epochs, mean - sd, mean + sd, color=colour, alpha=0.12, linewidth=0)
        if unit == 100:
            axis.set_ylim(bottom, None)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    plots.in_epochs(axes[1])
    handles, labels = axes[1].get_legend_handles_labels()
    style: Any = {"fontsize": "small", "frameon": False, "title": star_key(found), "title_fontsize": "small"}
    figure.legend(handles, labels, loc="outside right upper", **style)
    return figure


def by_sparsity(found: Sequence[Found]) -> Figure:
    """Figure 4: the final accuracy over n, ours and that of Table 1 of the paper."""
    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    axis = figure.subplots()
    for each in found:
        place = SPARSITY.index(int(each.cell.row.removeprefix("Sparse-")))
        paper, values = each.cell.paper.get("accuracy"), 100 * np.asarray(each.values("accuracy"))
        if paper:
            axis.errorbar(
                place, paper[0], paper[1], fmt="_", color=plots.COLOURS[1], markersize=13, elinewidth=3, alpha=0.6
            )
        sd = values.std(ddof=1) if len(values) > 1 else 0.0
        face = "none" if each.less else plots.COLOURS[0]
        axis.errorbar(place, values.mean(), sd, fmt="o", color=plots.COLOURS[0], markerfacecolor=face, capsize=2)
    axis.errorbar([], [], fmt="_", color=plots.COLOURS[1], markersize=13, label="paper, Table 1")
    axis.errorbar([], [], fmt="o", color=plots.COLOURS[0], label="ours ± sd (hollow: fewer epochs or seeds)")
    axis.set_xticks(range(len(SPARSITY)), list(map(str, SPARSITY)))
    axis.set(xlabel="n, the neurons of each layer that an output reaches on average", ylabel="test accuracy (%)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower center")
    return figure


def _curves(title: str, cells: Sequence[Cell]) -> Table:
    return Table(
        f"{title}: test accuracy (%) after 100 epochs; the picture has the curves",
        cells,
        plot=by_epoch,
        folder="table 1",
    )


_QUANTISED = [f"Quantized {what} {bits}-bit" for what in ("error", "update") for bits in (5, 3, 1)]
FIGURES = {
    "figure 1": _curves("Nine algorithms on MNIST", _nine("")),
    "figure 2": _curves("Adaptive feedback on MNIST", _rows(["Baseline", "Adaptive"], ("RBP", "SRBP"))),
    "figure 3": _curves(
        "Sparse feedback on MNIST", _rows(["Baseline", "Sparse-8", "Sparse-2", "Sparse-1"], ("RBP", "SRBP"))
    ),
    "figure 4": Table(
        "Test accuracy (%) of sparse SRBP on MNIST after 100 epochs",
        [_sparse(n) for n in SPARSITY],
        notes="With n = 0 and n = 100, only the top layer learns: the errors of softmax outputs add up to zero. Both "
        "have the same accuracy.",
        plot=by_sparsity,
        folder="table 1",
    ),
    "figure 5": _curves("Nine algorithms on CIFAR-10", _nine(CIFAR)),
    "figure 6": _curves(
        "Sparse feedback on CIFAR-10",
        _rows([CIFAR + row for row in ("Baseline", "Sparse-8", "Sparse-2", "Sparse-1")], ("RBP", "SRBP")),
    ),
    "figure 7": _curves("Quantised errors on MNIST", _rows(["Baseline", *_QUANTISED[:3]])),
    "figure 8": _curves("Quantised updates on MNIST", _rows(["Baseline", *_QUANTISED[3:]])),
    "figure 9": _curves(
        "Dropout in the learning channel on MNIST", _rows(["Baseline", *(f"LC Dropout {p}%" for p in (10, 20, 50))])
    ),
}
