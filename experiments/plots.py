"""Figures of results. Each function returns a figure to save or show, and does not change the state of pyplot."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from experiments.loop import Record

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito: all can tell
LINES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))


def _plain(value: float, _: Any = None) -> str:
    return f"{value:g}"


def logarithmic(panel: Any, which: Literal["x", "y"] = "y") -> None:
    """Makes an axis of a panel logarithmic, with plain numbers, however few decades are in view."""
    panel.set(**{f"{which}scale": "log"})
    axis = getattr(panel, f"{which}axis")
    low, high = sorted(getattr(panel, f"get_{which}lim")())
    decades = np.log10(high / low) if low > 0 else 9
    few = (1.0,) if decades > 4 else (1.0, 2.0, 3.0, 5.0)  # so that their labels do not overlap
    many = (1.5, *np.arange(1.0, 10.0)) if decades > 0.3 else tuple(np.arange(1.0, 10.0, 0.25))
    subs = few if decades > 0.7 else many
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_formatter(NullFormatter())


def in_epochs(axis: Any) -> None:
    """Names the x axis "epoch", with ticks at whole epochs only."""
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def styles() -> Iterator[dict[str, Any]]:
    """Line styles and colours, as many as there are rules; colours repeat with another line."""
    for line in itertools.cycle(LINES):
        for colour in COLOURS:
            yield {"linestyle": line, "color": colour}


def learning_curves(histories: Mapping[str, tuple[Sequence[Record], slice]], title: str) -> Figure:
    """Test error (or loss) and angle to backprop by epoch for each rule: the mean over seeds, and a band of one sd.

    There is no panel for the angle where no rule has one that is not 0.
    """
    classes = all(records[-1].accuracy is not None for records, _ in histories.values())
    angles = any(
        record.angle is not None and np.nanmax(np.abs(record.angle), initial=0) > 0.01
        for records, _ in histories.values()
        for record in records
    )
    columns = 1 + len(histories) // 22  # of the legend, beside the panels
    legend = max(0.0, columns * (0.6 + 0.075 * max(map(len, histories))) - 2.6)  # what it takes more than usual
    figure = Figure(figsize=((11 if angles else 7) + legend, 4.6), dpi=130, layout="constrained")
    axes = figure.subplots(1, 2 if angles else 1, squeeze=False)[0]
    panels = [(axes[0], lambda r: 100 * (1 - r.accuracy) if classes else r.test_loss)]
    if angles:
        panels.append((axes[1], lambda r: r.angle))
    for (name, (records, lanes)), style in zip(histories.items(), styles(), strict=False):
        for axis, of in panels:
            shown = [record for record in records if of(record) is not None]
            if not shown:
                continue
            values = np.array([of(record)[lanes] for record in shown])
            mean, sd = values.mean(1), values.std(1, ddof=1) if values.shape[1] > 1 else np.zeros(len(values))
            epochs = [record.epoch for record in shown]
            axis.plot(epochs, mean, label=name, marker="." if len(epochs) == 1 else None, **style)
            low = np.maximum(mean - sd, mean / 3) if axis is axes[0] else mean - sd
            axis.fill_between(epochs, low, mean + sd, color=style["color"], alpha=0.15, linewidth=0)
    axes[0].set(ylabel="test error (%)" if classes else "test loss")
    if not any(height <= 0 for line in axes[0].lines for height in line.get_ydata()):
        logarithmic(axes[0])  # a log axis would leave out an error of 0, and a negative loss
    if angles:
        axes[1].set(ylabel="angle to backprop (degrees)", ylim=(-3, None))
    for axis in axes:
        in_epochs(axis)
        axis.grid(alpha=0.3)
        axis.set_xlim(0.5, 0.5 + max(len(records) for records, _ in histories.values()))
    axes[0].set_title(title, loc="left")  # a title of the figure would lie under a wide legend
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside right upper",
        fontsize="small",
        frameon=False,
        ncols=columns,
    )
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
            axis.barh(row, median, xerr=whiskers, color=COLOURS[5], alpha=0.5, ecolor="0.3", capsize=2)
            text = f" {median:.2f}" if rule in group else " refused"
            axis.text(0, row, text, verticalalignment="center", fontsize="small")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(title=name, yticks=range(len(rules)), yticklabels=rules)
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_ylim(len(rules) - 0.4, -0.6)
    figure.supxlabel(label, fontsize="medium")
    figure.suptitle(title, fontsize="small")
    return figure
