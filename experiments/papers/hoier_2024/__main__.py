"""Tables 1 to 3 and figures 2 and 3 of Hoier and Zach (2024): dual propagation and its adjoint.

    python -m experiments.papers.hoier_2024 --list
    python -m experiments.papers.hoier_2024 --table=1 --cells=", MNIST" --data_dir=FOLDER   # FOLDER has mnist.npz
    python -m experiments.papers.hoier_2024 --table=2                    # four layers of 1000, and figure 3: on a GPU
    python -m experiments.papers.hoier_2024 --table=3 --cells="^BP, CIFAR-10$" --epochs=30 --seeds=1   # VGG16: on a GPU
    python -m experiments.papers.hoier_2024 --report

The files of the tables have their settings: `dense.py` those of Tables 1 and 2, `vgg.py` those of Table 3. What the
paper does not say is as in the authors' code, and each file names it. Figure 1 is a drawing, Table 4 has settings.
The cells of figure 3 are those of DP^T in Table 2, and figure 2 by epoch shows cells of Table 3.
"""

import pathlib

from experiments import cli
from experiments.papers import program
from experiments.papers.hoier_2024.table_1 import TABLE_1
from experiments.papers.hoier_2024.table_2 import FIGURE_3, TABLE_2
from experiments.papers.hoier_2024.table_3 import FIGURE_2, TABLE_3

HEADING = "Hoier and Zach (2024): dual propagation"
TABLES = {
    "table 1": TABLE_1,
    "table 2": TABLE_2,
    "figure 3": FIGURE_3,
    "table 3": TABLE_3,
    "figure 2": FIGURE_2,
}
HOME = pathlib.Path(__file__).parent / "results"

if __name__ == "__main__":
    program.define_flags()
    cli.run(lambda: program.main(TABLES, HOME, HEADING))
