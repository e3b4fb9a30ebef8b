"""Figures of results. Each function returns a figure to save or show, and does not change the state of pyplot."""

import itertools
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.loop import Record

# Ticks of a logarithmic axis as plain numbers: `axis.yaxis.set(**PLAIN)`.
TICKS = FuncFormatter(lambda value, _: f"{value:g}" if str(value)[0] in "1235" else "")
PLAIN = {"major_formatter": TICKS, "minor_formatter": TICKS}


def learning_curves(histories: Mapping[str, Sequence[Record]], title: str) -> Figure:
    """Test error and angle to backprop by epoch for each rule: the mean over seeds, and a band of one sd."""
    figure = Figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = itertools.product(("-", "--", ":", "-."), matplotlib.colormaps["tab10"](range(10)))
    for (name, records), (line, colour) in zip(histories.items(), styles, strict=False):
        epochs = [record.epoch for record in records]
        for axis, values in ((left, [100 * (1 - r.accuracy) for r in records]), (right, [r.angle for r in records])):
            mean, sd = np.mean(values, axis=1), np.std(values, axis=1)
            axis.plot(epochs, mean, linestyle=line, color=colour, label=name, marker="." if len(epochs) == 1 else None)
            axis.fill_between(epochs, np.maximum(mean - sd, 0.01), mean + sd, color=colour, alpha=0.15, linewidth=0)
    left.set(xlabel="epoch", ylabel="test error (%)", yscale="log")
    left.yaxis.set(**PLAIN)
    right.set(xlabel="epoch", ylabel="angle to backprop (degrees)", ylim=(-3, None))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.set_xlim(0.5, 0.5 + max(len(records) for records in histories.values()))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.suptitle(title)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize="small", frameon=False)
    return figure


def bars(ratios: Mapping[str, Mapping[str, tuple[float, float, float]]], title: str, label: str) -> Figure:
    """A panel per model and a bar per rule: ratios (median, lower, upper quartile), with the quartiles as whiskers."""
    rules = list(dict.fromkeys(rule for group in ratios.values() for rule in group))
    size = (0.5 + 0.085 * max(map(len, rules)) + 3 * len(ratios), 1.3 + 0.3 * len(rules))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.subplots(1, len(ratios), sharey=True, squeeze=False)
    for axis, (name, group) in zip(axes[0], ratios.items(), strict=True):
        for row, rule in enumerate(rules):
            median, lower, upper = group.get(rule, (np.nan,) * 3)
            whiskers = [[median - lower], [upper - median]]
            axis.barh(row, median, xerr=whiskers, color="#a6c8e8", ecolor="0.3", capsize=2)
            text = f" {median:.2f}" if rule in group else " refused"
            axis.text(0, row, text, verticalalignment="center", fontsize="small")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(title=name, yticks=range(len(rules)), yticklabels=rules)
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_ylim(len(rules) - 0.4, -0.6)
    figure.supxlabel(label, fontsize="medium")
    figure.suptitle(title, fontsize="small")
    return figure
