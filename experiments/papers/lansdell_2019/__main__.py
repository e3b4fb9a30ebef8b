"""Lansdell, Prakash and Kording (2019): feedback weights that learn by node perturbation.

    python -m experiments.papers.lansdell_2019 --list
    python -m experiments.papers.lansdell_2019 --figure="1 on digits"                    # a minute, needs no files
    python -m experiments.papers.lansdell_2019 --figure=1 --seeds=3 --data_dir=FOLDER    # FOLDER has mnist.npz
    python -m experiments.papers.lansdell_2019 --figure=2 --epochs=50 --seeds=1 --data_dir=FOLDER
    python -m experiments.papers.lansdell_2019 --section=3.3 --epochs=30 --seeds=1 --data_dir=FOLDER    # cifar10.npz
    python -m experiments.papers.lansdell_2019 --report

In figures 1 and 2, `--epochs` counts thousands of steps, as the authors do. The settings are from the paper and from
its authors' code; each file says at its top what we chose, and where we differ.
"""

import pathlib

from experiments import cli
from experiments.papers import program
from experiments.papers.lansdell_2019.figure_1 import FIGURE_1, ON_DIGITS
from experiments.papers.lansdell_2019.figure_2 import FIGURE_2
from experiments.papers.lansdell_2019.section_3_3 import SECTION_3_3

HEADING = "Lansdell, Prakash and Kording (2019): learning to solve the credit assignment problem"
TABLES = {"figure 1": FIGURE_1, "figure 1 on digits": ON_DIGITS, "figure 2": FIGURE_2, "section 3.3": SECTION_3_3}
HOME = pathlib.Path(__file__).parent / "results"

if __name__ == "__main__":
    program.define_flags()
    cli.run(lambda: program.main(TABLES, HOME, HEADING))
