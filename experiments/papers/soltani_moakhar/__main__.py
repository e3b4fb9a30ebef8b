"""Soltani Moakhar et al.: BackMAN beside backpropagation, feedback alignment and direct feedback alignment.

    python -m experiments.papers.soltani_moakhar --list
    python -m experiments.papers.soltani_moakhar --table=1 --cells=MLP --data_dir=FOLDER    # FOLDER has mnist.npz, ...
    python -m experiments.papers.soltani_moakhar --table=2 --cells=wide --seeds=20 --data_dir=FOLDER
    python -m experiments.papers.soltani_moakhar --report

`settings.py` has what the paper says of all networks, and what was chosen where it is silent; the file of each table
has its own settings, commands and times. Section 4.1 and section 4.2 are the grids that choose batch sizes and rates,
on validation images; Table 5 is that of the MLP. The paper does not print what it chose.
"""

import pathlib

from experiments import cli
from experiments.papers import program
from experiments.papers.soltani_moakhar.depth import FIGURE_2, FIGURE_3
from experiments.papers.soltani_moakhar.figure_4 import FIGURE_4
from experiments.papers.soltani_moakhar.forgetting import FIGURE_1, SECTION_4_2, TABLE_2
from experiments.papers.soltani_moakhar.settings import SECTION_4_1, TABLE_5
from experiments.papers.soltani_moakhar.table_1 import TABLE_1
from experiments.papers.soltani_moakhar.table_3 import TABLE_3

HEADING = "Soltani Moakhar et al.: BackMAN"
TABLES = {
    "table 1": TABLE_1,
    "table 2": TABLE_2,
    "figure 1": FIGURE_1,
    "figure 2": FIGURE_2,
    "table 3": TABLE_3,
    "table 5": TABLE_5,
    "figure 3": FIGURE_3,
    "figure 4": FIGURE_4,
    "section 4.1": SECTION_4_1,
    "section 4.2": SECTION_4_2,
}
HOME = pathlib.Path(__file__).parent / "results"

if __name__ == "__main__":
    program.define_flags()
    cli.run(lambda: program.main(TABLES, HOME, HEADING))
