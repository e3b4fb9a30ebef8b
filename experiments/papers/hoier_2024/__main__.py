"""Tables and figures of Hoier and Zach (2024)."""

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
