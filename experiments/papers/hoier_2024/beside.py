"""A picture of a table with a panel for each of its columns, which have accuracies of their own."""

from collections.abc import Collection, Sequence

from matplotlib.figure import Figure

from experiments import plots, results
from experiments.papers.cells import Found, Shown


def picture(found: Sequence[Found], shown: Sequence[Shown], logarithmic: Collection[str] = ()) -> Figure:
    """Our figures (hollow where reduced) and those of the paper: rows of panels for the columns of the table."""
    columns = list(dict.fromkeys(each.cell.column for each in found))
    sets = [[each for each in found if each.cell.column == column] for column in columns]
    heights = [len(each) + 2 for each in sets]
    size = 4.2 + 3.5 * len(shown), 0.8 + 0.3 * sum(heights)
    made = Figure(figsize=size, dpi=130, layout="constrained")
    panels = made.subplots(len(sets), len(shown), squeeze=False, height_ratios=heights)
    ours, papers = plots.COLOURS[:2]
    for row, cells in zip(panels, sets, strict=True):
        for axis, figure in zip(row, shown, strict=True):
            for place, each in enumerate(cells):
                if figure.name in each.cell.paper:
                    number, spread = each.cell.paper[figure.name]
                    axis.errorbar(number, place, xerr=spread, fmt="|", color=papers, ms=11, elinewidth=3, alpha=0.6)
                values = each.values(figure.name)
                if values is not None:
                    sd = figure.unit * (results.statistics(values)["sd"] or 0.0)
                    face = "none" if each.less else ours
                    axis.errorbar(figure.unit * values.mean(), place, xerr=sd, fmt="o", color=ours, mfc=face, capsize=2)
            axis.set(xlabel=f"{cells[0].cell.column}, {figure.axis}", yticks=range(len(cells)), yticklabels=[])
            axis.set_ylim(len(cells) - 0.4, -0.6)
            axis.grid(alpha=0.3)
            if figure.name in logarithmic:
                plots.logarithmic(axis, "x")
        row[0].set_yticklabels([each.cell.row for each in cells])
    panels[0][0].errorbar([], [], fmt="|", color=papers, ms=11, label="paper ± sd")
    panels[0][0].errorbar([], [], fmt="o", color=ours, label="ours ± sd (hollow: reduced)")
    made.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    return made
