"""Figure 4: the coefficients c of BackMAN by layer during the training, and their correlation with the size of g.

    python -m experiments.papers.soltani_moakhar --figure=4 --data_dir=FOLDER                 # a GPU: 3 minutes
    python -m experiments.papers.soltani_moakhar --figure=4 --epochs=2 --seeds=1              # two cores: 2 minutes

In the paper each layer has a panel with the distribution of its c, and one with the correlation, over its neurons, of c
with the norm of g. The network and its training are those of Table 1 on MNIST, so the cell is that of Table 1.
`coefficients.py` says what is measured.
"""

from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments import plots
from experiments.papers.cells import Found, Shown, Table
from experiments.papers.soltani_moakhar.coefficients import QUANTILES, coefficients
from experiments.papers.soltani_moakhar.settings import MLP
from experiments.papers.soltani_moakhar.table_1 import TABLE_1

LAYERS = len(MLP.widths) + 1


def figure_4(found: Sequence[Found]) -> Figure:
    """For each layer the distribution of c by epoch, and below the correlations of c with the norms of g and r.

    Empty panels where the cell was measured without them.
    """
    made = Figure(figsize=(3.2 * LAYERS, 5.6), dpi=130, layout="constrained")
    axes = made.subplots(2, LAYERS, squeeze=False, sharex=True)
    each = found[0]
    for number, column in enumerate(axes.T if each.values("g 1") is not None else (), 1):
        epochs = each.curve("accuracy")[0]
        low, median, high = (each.curve(f"{word} {number}")[1].mean(1) for word in QUANTILES)
        column[0].plot(epochs, median, marker=".", color=plots.COLOURS[0])
        column[0].fill_between(epochs, low, high, color=plots.COLOURS[0], alpha=0.2, linewidth=0)
        plots.logarithmic(column[0])
        for name, style in zip("gr", plots.styles(), strict=False):
            values = each.curve(f"{name} {number}")[1].mean(1)
            column[1].plot(epochs, values, marker=".", label=f"c and |{name}|", **style)
        column[0].set_title(f"layer {number}" if number < LAYERS else "output layer")
        column[1].set_ylim(-1.05, 1.05)
        plots.in_epochs(column[1])
        for axis in column:
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("c: median, 5% to 95%")
    axes[1][0].set_ylabel("correlation of logarithms")
    axes[1][0].legend(*axes[1][0].get_legend_handles_labels(), frameon=False, fontsize="small")
    if each.less:
        made.suptitle(each.less, fontsize="small")
    return made


FIGURE_4 = Table(
    "BackMAN on MNIST: correlation of log c with log |g| and log |r| over the neurons of a layer, mean of the epochs",
    [cell for cell in TABLE_1.cells if cell.measure is coefficients],
    [Shown(f"{name} {i}", f"{name}, layer {i}", 1, 2) for name in "gr" for i in range(1, LAYERS + 1)],
    notes="The paper has a picture and no numbers. It says that c decreases where the norm of g increases. As g is c "
    "r, both are here: the signal r that arrives at a neuron, and the signal g that the neuron passes down. The "
    "correlation is of logarithms, as a few c are huge. Ours, over 100 epochs of one seed: c falls as r grows. With g "
    "there is no such fall: the correlation is near 0 in layers 1 to 3, 0.2 in layer 4 and 0.6 in the output layer, "
    "and it changes its sign between epochs in layers 1 to 4. Where c is 0 in all layers, at epoch 59, no error is "
    "left in the images on which it is measured.",
    plot=figure_4,
    folder="table 1",
)
