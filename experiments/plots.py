"""Figures of results."""

import itertools
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from experiments.loop import Record
from matplotlib.ticker import MaxNLocator


def learning_curves(path: pathlib.Path, histories: Mapping[str, Sequence[Record]], title: str) -> None:
    """Test accuracy and angle to backprop by epoch for each rule: the mean over seeds, and a band of one sd."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    styles = itertools.product(("-", "--", ":", "-."), plt.colormaps["tab10"].colors)
    for (name, records), (line, colour) in zip(histories.items(), styles, strict=False):
        epochs = [record.epoch for record in records]
        for axis, values in ((left, [100 * r.accuracy for r in records]), (right, [r.angle for r in records])):
            mean, sd = np.mean(values, axis=1), np.std(values, axis=1)
            axis.plot(epochs, mean, linestyle=line, color=colour, label=name, marker="." if len(epochs) == 1 else None)
            axis.fill_between(epochs, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
    left.set(xlabel="epoch", ylabel="test accuracy (%)")
    right.set(xlabel="epoch", ylabel="angle to backprop (degrees)", ylim=(-3, None))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize="small", frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def bars(
    path: pathlib.Path,
    ratios: Mapping[str, Mapping[str, tuple[float, float, float]]],
    title: str,
    label: str,
) -> None:
    """One group of bars a model, one bar a rule: the median of `(median, lower, upper)`, and the quartiles as whiskers."""
    rules = list(dict.fromkeys(rule for group in ratios.values() for rule in group))
    width = 0.8 / len(rules)
    figure, axis = plt.subplots(figsize=(max(6.0, 1.2 + 0.45 * len(rules) * len(ratios)), 4.2), layout="constrained")
    for i, rule in enumerate(rules):
        at = [(j + (i - (len(rules) - 1) / 2) * width, group[rule]) for j, group in enumerate(ratios.values()) if rule in group]
        heights = [median for _, (median, _, _) in at]
        spread = [[m - low for _, (m, low, _) in at], [high - m for _, (m, _, high) in at]]
        axis.bar([x for x, _ in at], heights, width * 0.92, yerr=spread, label=rule, ecolor="0.35", capsize=2)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(ratios)), list(ratios))
    axis.set(ylabel=label)
    axis.grid(axis="y", alpha=0.3)
    figure.suptitle(title, fontsize="medium")
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
