"""How the gradient of each layer compares with that of backprop while a network is trained: curves and pictures."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import plots
from experiments.papers.cells import Found, star_key

KERNEL = re.compile("(angle|norm ratio|norm) (.*)/kernel$")


def curves(records: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """By figure and layer, such as "angle layers/0", its values [records, seeds]; of the weights, not of biases."""
    records = list(records)
    named = {name: match for name in records[0] if (match := KERNEL.match(name))}
    return {f"{m[1]} {m[2]}": np.asarray([record[name] for record in records], float) for name, m in named.items()}


def names(found: Found) -> list[str]:
    """The layers of a cell's curves, from the inputs on."""
    named = [name.removeprefix("angle ") for name in found.contents[0]["curves"] if name.startswith("angle ")]
    return sorted(named, key=lambda name: (not name.startswith("convs"), *_natural(name)))


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def norms(found: Found, layer: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Epochs [points]; the norms of the rule's gradient, of backprop's, and of their difference [points, seeds]."""
    epochs, true = found.curve(f"norm {layer}")
    ratio = found.curve(f"norm ratio {layer}")[1]
    angle = np.deg2rad(found.curve(f"angle {layer}")[1])
    apart = np.sqrt(np.maximum(1 + ratio**2 - 2 * ratio * np.cos(angle), 0))
    return epochs, ratio * true, true, apart * true


def alignment(found: Sequence[Found]) -> Figure:
    """Figure 3: for each cell the angles, the norms of the differences, and those of both gradients, by layer."""
    made = Figure(figsize=(2 + 4.2 * len(found), 9), dpi=130, layout="constrained")
    axes = made.subplots(3, len(found), squeeze=False, sharex=True, sharey="row")
    for column, each in zip(axes.T, found, strict=True):
        column[0].set_title(each.cell.name + each.star, fontsize="medium")
        for number, (layer, style) in enumerate(zip(names(each), plots.styles(), strict=False)):
            epochs, rule, true, apart = norms(each, layer)
            colour, label = style["color"], f"layer {number + 1}"
            for axis, values in zip(column, (each.curve(f"angle {layer}")[1], apart, rule), strict=True):
                mean, sd = values.mean(1), values.std(1, ddof=1) if values.shape[1] > 1 else 0.0
                axis.plot(epochs, mean, color=colour, label=label)
                axis.fill_between(epochs, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
            column[2].plot(epochs, true.mean(1), color=colour, linestyle="--")
        column[2].plot([], [], color="black", linestyle="--", label="of backprop")
        plots.in_epochs(column[2])
    labels = "angle to backprop (°)", "norm of the difference", "norm of the gradient"
    for row, label in zip(axes, labels, strict=True):
        row[0].set_ylabel(label)
        row[0].set_ylim(-0.02 * row[0].get_ylim()[1], None)  # so that a line at 0 is seen
        for axis in row:
            axis.grid(alpha=0.3)
    made.legend(
        *axes[2][0].get_legend_handles_labels(), loc="outside right upper", frameon=False, title=star_key(found)
    )
    return made


def heat(found: Sequence[Found]) -> Figure:
    """Figure 2: for each cell the angle to backprop by layer and time."""
    made = Figure(figsize=(2 + 4.4 * ((len(found) + 1) // 2), 7), dpi=130, layout="constrained")
    axes = made.subplots(2, (len(found) + 1) // 2, squeeze=False).ravel(order="F")
    for axis, each in zip(axes, found, strict=False):
        layers = names(each)
        values = np.stack([each.curve(f"angle {layer}")[1].mean(1) for layer in layers])
        times = each.curve(f"angle {layers[0]}")[0]
        shown = axis.pcolormesh(times, np.arange(1, len(layers) + 1), values, vmin=0, vmax=90, cmap="viridis")
        axis.set_title(each.cell.row.replace("DP^T, alpha=0, ", "") + each.star, fontsize="small")
        axis.set(xlabel=each.contents[0].get("unit", "epoch"), ylabel="layer")
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    made.colorbar(shown, ax=list(axes), label="angle to backprop (°)", aspect=40, pad=0.01)
    return made
