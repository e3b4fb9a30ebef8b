"""Reports of tables and figures: Markdown with the paper's numbers beside ours, pictures, and the data behind them."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import files, plots, results
from experiments.papers.cells import Cell, Found, Shown, Table, load, star_key

MISSING = "missing"
DATA = ("cell", "figure", "seed", "epochs", "value")  # the columns of a CSV file


def folder_of(root: pathlib.Path, key: str, table: Table | None = None) -> pathlib.Path:
    """The folder of a table's cells: `table_1` for "table 1", or for a table that has its cells there."""
    return root / ((table and table.folder) or key).replace(" ", "_")


def markdown(table: Table, folder: pathlib.Path) -> str:
    """The table: numbers of the paper, ours (mean ± sd, number of seeds) and the difference; then rows beyond it."""
    columns = list(dict.fromkeys(cell.column for cell in table.cells))
    heads = [", ".join(filter(None, (column, each.label))) for column in columns for each in table.shown]
    words = ("paper", "ours", "difference")
    header = ["", *(", ".join(filter(None, (head, word))) for head in heads for word in words)]
    rows: list[list[str]] = []
    remarks: dict[str, list[str]] = {}  # what is less, and the cells of which it is
    for beyond in (False, True):
        own = [cell for cell in table.cells if cell.beyond == beyond]
        if beyond and own:
            rows.append(["*beyond the paper*", *[""] * (len(header) - 1)])
        for row in dict.fromkeys(cell.row for cell in own):
            line = [row]
            for column in columns:
                cell = next((cell for cell in own if (cell.row, cell.column) == (row, column)), None)
                line += [""] * 3 * len(table.shown) if cell is None else _numbers(folder, cell, table.shown, remarks)
            rows.append(line)
    kept = [i for i in range(len(header)) if i == 0 or any(row[i] not in ("", "-") for row in rows)]
    shown = results.table([header[i] for i in kept], [[row[i] for i in kept] for row in rows])
    notes = table.notes if isinstance(table.notes, str) else table.notes(measured(table, folder))
    reduced = "\n".join(f"\\* {'; '.join(names)}: {less}." for less, names in remarks.items())
    return "\n\n".join(filter(None, [table.title, shown, reduced, notes]))


def measured(table: Table, folder: pathlib.Path) -> list[Found]:
    """The cells that have results."""
    return [found for cell in table.cells if (found := load(folder, cell)) is not None]


def _numbers(folder: pathlib.Path, cell: Cell, shown: Sequence[Shown], remarks: dict[str, list[str]]) -> list[str]:
    """For each figure the paper's number, ours, and the difference."""
    found = load(folder, cell)
    texts = []
    for figure in shown:
        paper, values = cell.paper.get(figure.name), None if found is None else found.values(figure.name)
        texts.append("-" if paper is None else f"{paper[0]:g}" + ("" if paper[1] is None else f" ± {paper[1]:g}"))
        if found is None or values is None:
            texts += [MISSING if found is None and not cell.quoted else "-", ""]  # a measured cell may lack a figure
            continue
        figures = results.statistics(values)
        mean = figures["mean"] * figure.unit
        reduced = "*" if found.less else ""
        texts.append(f"{results.text(figures, figure.unit, figure.digits)} ({len(values)}){reduced}")
        texts.append("-" if paper is None else f"{mean - paper[0]:+.{figure.digits}f}")
    if found is not None and found.less:
        remarks.setdefault(found.less, []).append(cell.name)
    return texts


def far(table: Table, folder: pathlib.Path) -> list[str]:
    """The full cells that differ from the paper by more than two sd (the larger of the paper's and ours)."""
    named = []
    for cell in table.cells:
        found = load(folder, cell)
        if found is None or found.less:
            continue
        for figure in table.shown:
            values, paper = found.values(figure.name), cell.paper.get(figure.name)
            if values is None or paper is None:
                continue
            figures = results.statistics(values)
            sd = max(filter(None, (figure.unit * (figures["sd"] or 0), paper[1])), default=None)
            if sd and abs(figure.unit * figures["mean"] - paper[0]) > 2 * sd:
                named.append(f"{cell.name}{', ' * bool(figure.label)}{figure.label}")
    return named


def listing(tables: Mapping[str, Table], root: pathlib.Path, pattern: re.Pattern[str] = re.compile("")) -> str:
    """A list of the cells whose names have the pattern: done, reduced or missing, and the time that they still need."""
    rows = []
    for key, table in tables.items():
        for cell in table.to_measure(pattern):
            found = load(folder_of(root, key, table), cell)
            state = MISSING if found is None else f"reduced: {found.less}" if found.less else "done"
            left = cell.config.seeds
            if found is not None and found.epochs >= cell.config.epochs:
                left -= len(found.seeds)
            gpu = "" if cell.gpu_minutes is None else f"{cell.gpu_minutes * (left > 0):.1f}"
            rows.append((cell.name, key, state, f"{cell.minutes * max(left, 0):.0f}", gpu))
    return results.table(("cell", "place", "state", "minutes, two cores", "minutes, one GPU"), rows)


def section(key: str, table: Table, root: pathlib.Path) -> str:
    """What a report says of one table: the table, its notes, and which cells are far from the paper."""
    folder = folder_of(root, key, table)
    text = markdown(table, folder)
    if named := far(table, folder):
        text += (
            "\n\nOf the cells with all epochs and seeds, more than two sd (the paper's or ours, the larger) from the "
            f"column *paper*: {'; '.join(named)}."
        )
    return text


def text(tables: Mapping[str, Table], root: pathlib.Path, heading: str) -> str:
    """The report of a paper: its README.md."""
    parts = [f"# {heading}"]
    for key, table in tables.items():
        own = section(key, table, root)
        if measured(table, folder_of(root, key, table)):
            own += f"\n\n![{key}]({key.replace(' ', '_')}.png)"
        parts.append(f"## {key.capitalize()}\n\n{own}")
    return "\n\n".join(parts) + "\n"


def write(tables: Mapping[str, Table], root: pathlib.Path, heading: str) -> str:
    """Writes README.md with all tables and, for each that has results, TABLE.csv and TABLE.png; returns the text."""
    for key, table in tables.items():
        if found := measured(table, folder_of(root, key, table)):
            name = key.replace(" ", "_")
            figure = table.plot(found) if table.plot else comparison(table, found)
            files.savefig(figure, root / f"{name}.png")
            files.write_csv(root / f"{name}.csv", DATA, data(table, found))
    written = text(tables, root, heading)
    files.write_atomic(root / "README.md", written)
    return written


def data(table: Table, found: Sequence[Found]) -> list[tuple[Any, ...]]:
    """The rows of the CSV file of a table: a number of each cell, figure and seed."""
    return [
        (each.cell.name, figure.name, seed, each.epochs, float(f"{value:.6g}"))
        for each in found
        for figure in table.shown
        if (values := each.values(figure.name)) is not None
        for seed, value in zip(each.seeds, values, strict=True)
    ]


def comparison(table: Table, found: Sequence[Found]) -> Figure:
    """A row for each cell: ours with one sd (filled; hollow where reduced) and the paper's number (a bar), if any."""
    made = Figure(figsize=(4 + 4 * len(table.shown), 1.2 + 0.24 * len(found)), dpi=130, layout="constrained")
    axes = made.subplots(1, len(table.shown), sharey=True, squeeze=False)[0]
    ours, papers = plots.COLOURS[:2]
    for axis, figure in zip(axes, table.shown, strict=True):
        for row, each in enumerate(found):
            paper, values = each.cell.paper.get(figure.name), each.values(figure.name)
            if paper is not None:
                axis.errorbar(paper[0], row, xerr=paper[1], fmt="|", color=papers, ms=11, elinewidth=3, alpha=0.6)
            if values is not None:
                sd = figure.unit * (results.statistics(values)["sd"] or 0.0)
                face = "none" if each.less else ours
                axis.errorbar(figure.unit * values.mean(), row, xerr=sd, fmt="o", color=ours, mfc=face, capsize=2, ms=5)
        axis.set(xlabel=figure.axis or table.title, yticks=range(len(found)), yticklabels=[f.cell.name for f in found])
        axis.grid(alpha=0.3)
    axes[0].set_ylim(len(found) - 0.4, -0.6)
    numbers = [number for each in found for number in each.cell.paper.values()]
    if numbers:
        label = "paper ± sd" if any(spread for _, spread in numbers) else "paper"
        axes[0].errorbar([], [], fmt="|", color=papers, markersize=11, label=label)
    axes[0].errorbar([], [], fmt="o", color=ours, label="ours ± sd (hollow: fewer epochs or seeds)")
    handles = axes[0].get_legend_handles_labels()
    made.legend(*handles, loc="outside upper right", ncols=2, frameon=False, fontsize="small")
    return made


def curves(found: Sequence[Found], figure: str, label: str, *, unit: float = 1, error: bool = False) -> Figure:
    """A figure by epoch for each cell: the mean over the seeds and a band of one sd; `error`: 100% minus it."""
    made = Figure(figsize=(9, 4.6), dpi=130, layout="constrained")
    axis = made.subplots()
    for each, style in zip(found, plots.styles(), strict=False):
        epochs, values = each.curve(figure)
        values = 100 * (1 - values) if error else unit * values
        mean = values.mean(1)
        sd = values.std(1, ddof=1) if values.shape[1] > 1 else np.zeros_like(mean)
        axis.plot(epochs, mean, label=each.cell.name + each.star, **style)
        axis.fill_between(epochs, mean - sd, mean + sd, color=style["color"], alpha=0.15, linewidth=0)
    axis.set_ylabel(label)
    plots.in_epochs(axis)
    axis.grid(alpha=0.3)
    made.legend(loc="outside right upper", fontsize="small", frameon=False, title=star_key(found))
    return made
