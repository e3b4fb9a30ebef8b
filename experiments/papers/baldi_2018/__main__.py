"""Baldi, Sadowski and Lu (2018): random backpropagation and its variants.

    python -m experiments.papers.baldi_2018 --list
    python -m experiments.papers.baldi_2018 --table=1 --cells="^(?!CIFAR)" --seeds=2   # half a minute a seed and cell
    python -m experiments.papers.baldi_2018 --table=1 --cells=CIFAR --seeds=1          # CIFAR-10, for a GPU
    python -m experiments.papers.baldi_2018 --figure=1,4 --quick --data_dir=FOLDER     # FOLDER has mnist.npz
    python -m experiments.papers.baldi_2018 --figure=10,11,12,13,14                    # linear networks, in seconds
    python -m experiments.papers.baldi_2018 --section=4.2 --epochs=20 --seeds=2        # eight observations
    python -m experiments.papers.baldi_2018 --section="4.2 on digits"
    python -m experiments.papers.baldi_2018 --report

The settings of the paper for MNIST (section 4.1): 784-100-100-100-100-10 with tanh, batches of 100, 100 epochs on all
60,000 images, five seeds, SGD with rate 0.1, which each update multiplies by 1 - 1e-6. Errors are quantised at each
hidden neuron before they go further down, with alpha 2^-3. Updates are quantised for each example before the sum over
the batch, with alpha 2^-6 and a constant rate. RBP with adaptive feedback has a tenth of the rate. `cifar10.py` has the
network and the settings for CIFAR-10, `section_4_2.py` the observations, `linear.py` the linear networks. Table 2 of
the paper has no numbers.
"""

import pathlib

from experiments import cli
from experiments.papers import program
from experiments.papers.baldi_2018.figures import FIGURES
from experiments.papers.baldi_2018.linear import LINEAR_FIGURES
from experiments.papers.baldi_2018.section_4_2 import ON_DIGITS, ON_MNIST
from experiments.papers.baldi_2018.table_1 import TABLE_1

HEADING = "Baldi, Sadowski and Lu (2018): random backpropagation"
TABLES = {"table 1": TABLE_1, **FIGURES, **LINEAR_FIGURES, "section 4.2": ON_MNIST, "section 4.2 on digits": ON_DIGITS}
HOME = pathlib.Path(__file__).parent / "results"

if __name__ == "__main__":
    program.define_flags()
    cli.run(lambda: program.main(TABLES, HOME, HEADING))
