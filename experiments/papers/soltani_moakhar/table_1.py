"""Table 1: accuracy of four networks, each with the batch size and the rate that the grid chooses for its rule.

    python -m experiments.papers.soltani_moakhar --table=1 --cells=MLP --data_dir=FOLDER         # 5 minutes on a GPU
    python -m experiments.papers.soltani_moakhar --table=1 --cells=LeNet --data_dir=FOLDER
    python -m experiments.papers.soltani_moakhar --table=1 --cells='ResNet-18.CIFAR-10$' --epochs=20 --seeds=1

The paper's settings are in `settings.py`; 100 epochs, five seeds, test accuracy of the epoch with the best validation
accuracy. It does not print the batch sizes and rates that it chose. For the MLP under EBP its Table 5 shows them, and
for BackMAN, FA and DFA our cells there. For LeNet-5 the validation accuracy of a part of the grid chose (section 4.1:
batches of 64, three epochs). Those of ResNet-18 in `CHOSEN` are guesses. Two cores need an hour for a seed of the MLP,
about as long for LeNet-5, and days for ResNet-18. On two cores, `--epochs=5 --seeds=1` gives an impression of LeNet-5.

Adaptive DropConnect and Forward-Forward are quoted from the paper: they are other networks, not rules for these.
"""

from typing import Any

from experiments.papers import cells
from experiments.papers.cells import Cell, Table
from experiments.papers.soltani_moakhar.coefficients import coefficients
from experiments.papers.soltani_moakhar.settings import (
    BACKMAN,
    CIFAR100,
    DFA,
    EBP,
    FA,
    LENET,
    MLP,
    RESNET,
    rule,
)

COLUMNS = {"MLP MNIST": MLP, "LeNet-5 CIFAR-10": LENET, "ResNet-18 CIFAR-10": RESNET, "ResNet-18 CIFAR-100": CIFAR100}
DROPCONNECT, FORWARD = "Adaptive DropConnect", "Forward-Forward"
NUMBERS: dict[str, tuple[float | None, ...]] = {
    EBP: (99.10, 71.24, 92.8, 75.61),
    DROPCONNECT: (98.64, 60.16, None, None),
    FORWARD: (92.37, None, None, None),
    DFA: (95.97, 45.79, 74.37, 38.94),
    FA: (95.15, 53.31, 63.79, 30.54),
    BACKMAN: (98.93, 66.27, 91.33, 63.00),
}
SLOWER = "BackMAN, rate 0.01"
# Each with the row whose batch size and rate it takes: at the rate of EBP, the first two do not learn LeNet-5. With
# magnitudes of one, the error of sign symmetry grows by the square root of the width in each layer.
BEYOND = {
    "Sign symmetry": ('sign_symmetry(magnitude="scaled")', FA),
    "Kolen-Pollack": ("kolen_pollack", FA),
    "Dual propagation": ("dual_propagation", EBP),
}

# The batch size and the rate of each row of the paper.
CHOSEN: dict[str, dict[str, tuple[int, float]]] = {
    "MLP MNIST": {EBP: (128, 0.25), BACKMAN: (256, 0.25), DFA: (64, 0.01), FA: (64, 0.01)},
    "LeNet-5 CIFAR-10": {
        EBP: (64, 0.05),
        BACKMAN: (64, 0.05),
        SLOWER: (64, 0.01),
        DFA: (64, 0.002),
        FA: (64, 0.01),
    },
    "ResNet-18 CIFAR-10": {EBP: (128, 0.25), BACKMAN: (128, 0.05), DFA: (128, 0.05), FA: (128, 0.05)},
}
CHOSEN["ResNet-18 CIFAR-100"] = CHOSEN["ResNet-18 CIFAR-10"]
# For one seed on two cores, and for five on a GPU.
MINUTES = {
    "MLP MNIST": (60.0, 3.0),
    "LeNet-5 CIFAR-10": (60.0, 5.0),
    "ResNet-18 CIFAR-10": (6000.0, 60.0),
    "ResNet-18 CIFAR-100": (6000.0, 60.0),
}


def _cell(row: str, column: str, own: str, number: float | None, like: str = "", **options: Any) -> Cell:
    batch, rate = CHOSEN[column][like or row]
    config = COLUMNS[column].replace(rule=own, batch_size=batch, learning_rate=rate)
    minutes, gpu = MINUTES[column]
    paper = {} if number is None else {"accuracy": (number, None)}
    measure = coefficients if (row, column) == (BACKMAN, "MLP MNIST") else cells.measure  # for figure 4
    return Cell(row, column, config, paper, minutes=minutes, gpu_minutes=gpu, measure=measure, **options)


TABLE_1 = Table(
    "Test accuracy (%)",
    [
        *(
            _cell(row, column, "backprop", number, EBP, quoted=True)
            if row in (DROPCONNECT, FORWARD)
            else _cell(row, column, rule(row, COLUMNS[column]), number)
            for row, numbers in NUMBERS.items()
            for column, number in zip(COLUMNS, numbers, strict=True)
            if number is not None
        ),
        *(
            _cell(row, column, own, None, like, beyond=True)
            for row, (own, like) in BEYOND.items()
            for column in list(COLUMNS)[:2]
        ),
        _cell(SLOWER, "LeNet-5 CIFAR-10", rule(BACKMAN, LENET), None, beyond=True),
    ],
    notes="The paper gives no sd. BackMAN's alpha is read here as the norm of the update of a layer, 1 / sqrt(n) for "
    "each of its n neurons. With alpha as the norm of each neuron's update (Eq. 4 of the paper) the MLP does not "
    "learn at the paper's rates of 0.05 and 0.25 (a row of Table 5). We chose this reading after we had seen that; "
    "`settings.py` gives the reasons. The MLP with BackMAN has the batch size and the rate that are best in our Table "
    "5, where these cells have three epochs: 256 and 0.25 (in the paper's, 64 and 0.05). Its training loss rises from "
    "0.2 to 6 after the first epochs, and its best epoch is soon after the rate has fallen. The settings of LeNet-5 "
    "come from a part of its grid (section 4.1): batches of 64 and three epochs. FA and DFA are about 19 points behind "
    "the paper there. Under FA the weights grow without end: after nine epochs of 100 the training loss is above 1e9, "
    "and the best epoch, the 50th, is one of a network that has long diverged. DFA has six epochs; in its grid no "
    "batch size and no rate has more than 23% after three to six. Smaller feedback would grow them less, but we have "
    "not tried any. Sign symmetry and "
    "Kolen-Pollack have FA's rate. The feedback of sign symmetry has the magnitude of the initial weights. After 100 "
    "epochs (one seed) LeNet-5 with BackMAN is 11 points behind error-backpropagation, in the paper five. The norm "
    "of its updates does not fall as the error does: its best epoch is the first after the rate has fallen, and then "
    "its training loss rises again. A rate of 0.01 is seven points worse (a row beyond the paper). The settings of "
    "ResNet-18 are guesses. Under FA and DFA our MLP is two to three points better than the paper's. Both depend on "
    "the rate: in Table 5 DFA has 10% to 98%, FA 94% to 97%. The paper prints neither what it chose nor how it drew "
    "the feedback weights.",
)
