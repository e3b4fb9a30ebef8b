"""The tables of Lechner (2020): monotone direct feedback alignment (mDFA) on some classes of CIFAR-100 and ImageNet.

    python -m experiments.papers.lechner_2020 --list
    python -m experiments.papers.lechner_2020 --table=1 --cells='tanh.*FC'    # five minutes for each cell on two cores
    python -m experiments.papers.lechner_2020 --table=1 --cells=CNN           # on a GPU
    python -m experiments.papers.lechner_2020 --table=1 --quick --data_dir=FOLDER   # one epoch; with cifar100.npz
    python -m experiments.papers.lechner_2020 --report

`measure.py` says how settings are chosen, `sets.py` which classes a set has, `nets.py` has the networks, and `cifar.py`
and `imagenet.py` what is chosen where the paper is silent.
"""

import pathlib

from experiments import cli
from experiments.papers import program
from experiments.papers.lechner_2020.cifar import TABLE_1, TABLE_3, TABLE_4
from experiments.papers.lechner_2020.imagenet import TABLE_2, TABLE_5, TABLE_6

HEADING = "Lechner (2020): monotone direct feedback alignment"
TABLES = {
    "table 1": TABLE_1,
    "table 2": TABLE_2,
    "table 3": TABLE_3,
    "table 4": TABLE_4,
    "table 5": TABLE_5,
    "table 6": TABLE_6,
}
HOME = pathlib.Path(__file__).parent / "results"

if __name__ == "__main__":
    program.define_flags()
    cli.run(lambda: program.main(TABLES, HOME, HEADING))
