"""Table 2 and figure 3 (appendix A): 784-1000-1000-1000-1000-10 on MNIST with 30 iterations and asymmetric nudging.

    python -m experiments.papers.hoier_2024 --table=2 --data_dir=FOLDER      # the runs of figure 3 are among these

After 30 iterations without damping, the states of DP have not converged for alpha 0 and 1, and those of DP^T have. The
residual is the change of the states in the last iteration, relative to their difference. Figure 3 compares the
gradients of DP^T with those of backprop, here on 250 images.

The paper gives the network, beta, the squared error and five seeds; the rest is as in Table 1. It gives no number of
epochs. Time: an hour for each seed and row on two cores; on one GPU about three minutes for a row.
"""

from experiments.papers.cells import Cell, Shown, Table
from experiments.papers.hoier_2024 import layers
from experiments.papers.hoier_2024.dense import CONFIG, adjoint, measure, original

ITERATIONS = 30
DEEP = CONFIG.replace(widths=(1000,) * 4, seeds=5, probe=250, layers=True)
RULES = {
    "DP, alpha=0": original(0.0, ITERATIONS),
    "DP, alpha=1": original(1.0, ITERATIONS),
    "DP^T, alpha=0": adjoint(0.0, ITERATIONS),
    "DP^T, alpha=1": adjoint(1.0, ITERATIONS),
}
CELLS = [
    Cell(row, "", DEEP.replace(rule=rule), minutes=60, gpu_minutes=3.0, measure=measure) for row, rule in RULES.items()
]

TABLE_2 = Table(
    "784-1000x4-10 on MNIST after 20 epochs, 30 iterations: test accuracy (%), and residual of the states",
    CELLS,
    shown=(Shown(label="accuracy"), Shown("residual", "residual", 1, 3)),
    notes="The table's figures are lost in our copy of the paper. Its text (A.1) says that the states of DP diverge "
    "and that those of DP^T are stable. Here, after two epochs with one seed, the states of DP^T settle with both "
    "alphas. Those of DP with alpha 0 change in the last iteration by more than their difference, and yet the network "
    "learns. With alpha 1 they grow in each iteration until they overflow.",
)
FIGURE_3 = Table(
    "The gradients of DP^T beside those of backprop, 784-1000x4-10 on MNIST",
    CELLS[2:],
    shown=(Shown("angle", "angle to backprop after the last epoch (°)", 1, 2),),
    plot=layers.alignment,
    folder="table 2",
)
