"""Figures 2 and 3: accuracy by depth, of an MLP on MNIST and of ResNet-50 on CIFAR-100.

    python -m experiments.papers.soltani_moakhar --figure=2 --data_dir=FOLDER             # a GPU: half a minute a cell
    python -m experiments.papers.soltani_moakhar --figure=2 --cells='^(1|2|4|8|12) ' --epochs=5 --seeds=1
    python -m experiments.papers.soltani_moakhar --figure=3 --cells='^(1|4|8|16) ' --epochs=10 --data_dir=FOLDER

Figure 2, the paper's settings: 1 to 12 hidden layers of 2,000, batches of 1,024, five rates from 0.0004, of which the
validation set chooses, five seeds, the epoch with the best validation accuracy. The paper does not say for how many
epochs: ours is 25, as in Table 5. Here all rates have all seeds. Two cores need hours for a cell.

Figure 3, the paper's settings: ResNet-50, of whose 16 blocks the upper ones are left out. It does not say more: ours
are those of Table 1 for ResNet-18 on CIFAR-100, and one seed. A GPU needs 10 to 60 minutes for a cell of 100 epochs.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments import plots, results
from experiments.papers.cells import Cell, Found, Table
from experiments.papers.soltani_moakhar.settings import BACKMAN, CIFAR100, EBP, MLP, rule
from experiments.papers.soltani_moakhar.table_1 import CHOSEN

RATES = "learning_rate=0.0004,0.002,0.01,0.05,0.25"


def by_depth(found: Sequence[Found], label: str) -> Figure:
    """Accuracy by depth for each rule, with one sd; hollow where reduced."""
    made = Figure(figsize=(7, 4.4), dpi=130, layout="constrained")
    axis = made.subplots()
    for column, style in zip(dict.fromkeys(each.cell.column for each in found), plots.styles(), strict=False):
        own = [each for each in found if each.cell.column == column]
        places = [int(each.cell.row.split()[0]) for each in own]
        figures = [results.statistics(np.asarray(each.values("accuracy"))) for each in own]
        means = [100 * figure["mean"] for figure in figures]
        axis.plot(places, means, label=column, **style)
        for each, place, mean, figure in zip(own, places, means, figures, strict=True):
            face = "none" if each.less else style["color"]
            sd = 100 * (figure["sd"] or 0)
            axis.errorbar(place, mean, yerr=sd, fmt="o", mfc=face, color=style["color"], capsize=2, ms=5)
    axis.set(xlabel=label, ylabel="test accuracy (%)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, title="hollow: reduced")
    return made


def _mlp(depth: int, row: str) -> Cell:
    config = MLP.replace(rule="backprop", widths=(2000,) * depth, batch_size=1024, epochs=25)
    config = config.replace(rule=rule(row, config))
    minutes = 10 + 60 * depth / 4  # for a seed: all rates
    name = results.counted(depth, "hidden layer")
    return Cell(name, row, config, sweep=[RATES], minutes=minutes, gpu_minutes=0.2 + depth / 8)


def _resnet(blocks: int, row: str) -> Cell:
    batch, rate = CHOSEN["ResNet-18 CIFAR-100"][row]
    config = CIFAR100.replace(model=f"resnet50(blocks={blocks})", batch_size=batch, learning_rate=rate, seeds=1)
    config = config.replace(rule=rule(row, config))
    name = results.counted(blocks, "block")
    return Cell(name, row, config, minutes=1000 * blocks, gpu_minutes=10 + 3 * blocks)


FIGURE_2 = Table(
    "Test accuracy (%) on MNIST by the number of hidden layers",
    [_mlp(depth, row) for depth in range(1, 13) for row in (EBP, BACKMAN)],
    notes="The paper has a picture and no numbers. It says that BackMAN is better with more than six layers. Points "
    "of one epoch show which rule learns faster at first, not which is better in the end.",
    plot=lambda found: by_depth(found, "hidden layers of 2,000"),
)
FIGURE_3 = Table(
    "Test accuracy (%) of ResNet-50 on CIFAR-100 by the number of its blocks",
    [_resnet(blocks, row) for blocks in range(1, 17) for row in (EBP, BACKMAN)],
    notes="The paper has a picture and no numbers. It says that BackMAN scales to deep models, with a lower accuracy.",
    plot=lambda found: by_depth(found, "blocks of ResNet-50"),
)
