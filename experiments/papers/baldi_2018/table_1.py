"""Table 1: the rule of each row for BP, RBP and SRBP on MNIST and on CIFAR-10, and the numbers of the paper.

    python -m experiments.papers.baldi_2018 --table=1 --cells="^(?!CIFAR)"      # MNIST
    python -m experiments.papers.baldi_2018 --table=1 --cells=CIFAR --seeds=1   # CIFAR-10

A seed of an MNIST cell takes half a minute on two cores, and the five together a fifth of a minute on a GPU. A seed of
a CIFAR-10 cell takes seven hours on two cores, and some 80 seconds on a GPU.
"""

from collections.abc import Callable

from experiments.config import Config
from experiments.papers.baldi_2018 import cifar10
from experiments.papers.baldi_2018.settings import MNIST, train
from experiments.papers.cells import Cell, Measure, Number, Table

RULES = {"BP": "bp", "RBP": "rbp", "SRBP": "srbp"}
CIFAR = "CIFAR-10 "  # what names of rows begin with

# For each row: its rule, where {} is the rule of the column, and the numbers of the paper for BP, RBP and SRBP.
ROWS: dict[str, tuple[str, tuple[Number | None, Number | None, Number | None]]] = {
    "Baseline": ("{}", ((97.9, 0.1), (97.2, 0.1), (97.2, 0.2))),
    "No-f'": ("without_derivatives({})", ((89.9, 0.3), (88.3, 1.1), (88.4, 0.7))),
    "Adaptive": ("{}(adaptive=True)", (None, (97.3, 0.1), (97.3, 0.1))),
    "Sparse-8": ("{}(init=sparse(8{}))", (None, (96.0, 0.4), (96.9, 0.1))),
    "Sparse-2": ("{}(init=sparse(2{}))", (None, (96.3, 0.5), (95.8, 0.2))),
    "Sparse-1": ("{}(init=sparse(1{}))", (None, (90.3, 1.1), (94.6, 0.6))),
    "Quantized error 5-bit": ("quantize_error({}, bits=5)", ((97.6, None), (95.4, None), (95.1, None))),
    "Quantized error 3-bit": ("quantize_error({}, bits=3)", ((96.5, None), (92.5, None), (93.2, None))),
    "Quantized error 1-bit": ("quantize_error({}, bits=1)", ((94.6, None), (89.8, None), (91.6, None))),
    "Quantized update 5-bit": ("quantize_update({}, bits=5)", ((95.2, None), (94.0, None), (93.3, None))),
    "Quantized update 3-bit": ("quantize_update({}, bits=3)", ((96.5, None), (91.0, None), (92.2, None))),
    "Quantized update 1-bit": ("quantize_update({}, bits=1)", ((92.5, None), (9.6, None), (90.7, None))),
    "LC Dropout 10%": ("drop_error({}, rate=0.1)", ((97.7, None), (96.5, None), (97.1, None))),
    "LC Dropout 20%": ("drop_error({}, rate=0.2)", ((97.8, None), (96.7, None), (97.2, None))),
    "LC Dropout 50%": ("drop_error({}, rate=0.5)", ((97.7, None), (96.7, None), (97.1, None))),
    CIFAR + "Baseline": ("{}", ((83.4, 0.2), (70.2, 1.1), (72.7, 0.8))),
    CIFAR + "No-f'": ("without_derivatives({})", ((54.8, 3.6), (32.7, 6.2), (39.9, 3.9))),
    CIFAR + "Sparse-8": ("{}(init=sparse(8{}))", (None, (46.3, 4.3), (70.9, 0.7))),
    CIFAR + "Sparse-2": ("{}(init=sparse(2{}))", (None, (62.9, 0.9), (65.7, 1.9))),
    CIFAR + "Sparse-1": ("{}(init=sparse(1{}))", (None, (56.7, 2.6), (62.6, 1.8))),
}
TOP, BEYOND = "Top layer only", "Quantized signal"


def cell(
    row: str, column: str, rule: str, number: Number | None = None, change: Callable[[Config], Config] | None = None
) -> Cell:
    """A cell with the settings of its data set."""
    cifar = row.startswith(CIFAR)
    config = (cifar10.CIFAR10 if cifar else MNIST).replace(rule=rule)
    measure: Measure = cifar10.train if cifar else train
    paper = {} if number is None else {"accuracy": number}
    minutes, gpu_minutes = (400.0, 7.0) if cifar else (0.5, 0.3)
    own, beyond = change(config) if change else config, row.startswith(BEYOND)
    return Cell(row, column, own, paper, minutes, gpu_minutes, measure=measure, beyond=beyond)


def _constant(config: Config) -> Config:
    return config.replace(schedule="constant")


def _of_rows(row: str, column: str, number: Number) -> Cell:
    values = [RULES[column]]
    if "Sparse" in row:
        values.append(", rescale=True" if column == "RBP" else "")  # sparse RBP is scaled by 1 / sqrt(n)
    change = None
    if row.startswith("Quantized update"):
        change = _constant
    if (row, column) == ("Adaptive", "RBP"):
        change = lambda config: config.replace(learning_rate=0.01)  # noqa: E731
    return cell(row, column, ROWS[row][0].format(*values), number, change)


CELLS = [
    cell(TOP, "BP", "last_layer_only", (84.7, 0.7)),
    *(
        _of_rows(row, column, number)
        for row, (_, numbers) in ROWS.items()
        for column, number in zip(RULES, numbers, strict=True)
        if number is not None
    ),
    cell(CIFAR + TOP, "BP", "last_layer_only", (47.9, 0.4)),
    *(
        cell(f"{BEYOND} {bits}-bit", column, f"quantized_signals('{channel}', bits={bits})", number, _constant)
        for bits in (5, 3, 1)
        for (column, channel), number in zip(RULES.items(), ROWS[f"Quantized update {bits}-bit"][1], strict=True)
    ),
]
TABLE_1 = Table(
    "Test accuracy (%) after 100 epochs, on MNIST and on CIFAR-10",
    CELLS,
    notes="The sd is over the seeds. For quantisation and dropout, the paper gives no sd. The network for MNIST "
    "begins with Flax's weights (normal, variance 1 / fan-in), that of the paper with those of Glorot and "
    "Bengio. For quantised updates ours are below the paper's, but for RBP with one bit, which does not learn "
    "in the paper. In short runs, which we did not keep, neither a rate for the sum over the batch nor a top layer "
    "that is not quantised brought them nearer. The rows *quantized signal* are another reading, and have the paper's "
    "numbers of the quantised updates beside them: the signal of each hidden neuron is quantised after the "
    "backward pass, as in Eq. 17, and the updates of the examples are added up, not averaged; the top layer "
    "learns as usual. BP and SRBP are then within about two points of the paper (BP with 5 bits was nearer before). "
    "RBP is within a point with 5 bits. With fewer bits it loses accuracy in training: with 3 bits from 91.6 to 85.2, "
    "with one bit from 87.6 to 79.3, where the paper has 9.6. So the paper may have done this for BP and SRBP. We "
    "found this reading by comparing test accuracies with the paper's.",
)
