"""Table 1 on MNIST: the rule of each row for BP, RBP and SRBP, and the numbers of the paper."""

from experiments.papers.baldi_2018.settings import MNIST, train
from experiments.papers.cells import Cell, Table

RULES = {"BP": "bp", "RBP": "rbp", "SRBP": "srbp"}
Number = tuple[float, float | None] | None  # mean and sd

# For each row: its rule, where {} is the rule of the column, and the numbers of the paper for BP, RBP and SRBP.
ROWS: dict[str, tuple[str, tuple[Number, Number, Number]]] = {
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
}


def _cell(row: str, column: str, number: tuple[float, float | None]) -> Cell:
    values = [RULES[column]]
    if row.startswith("Sparse"):
        values.append(", rescale=True" if column == "RBP" else "")  # sparse RBP is scaled by 1 / sqrt(n)
    config = MNIST.replace(rule=ROWS[row][0].format(*values))
    if row.startswith("Quantized update"):
        config = config.replace(schedule="constant")
    if (row, column) == ("Adaptive", "RBP"):
        config = config.replace(learning_rate=0.01)
    return Cell(row, column, config, {"accuracy": number}, minutes=0.5, measure=train)


TABLE_1 = Table(
    "Test accuracy (%) on MNIST after 100 epochs",
    [
        Cell("Top layer only", "BP", MNIST.replace(rule="last_layer_only"), {"accuracy": (84.7, 0.7)}, 0.4, measure=train),
        *(
            _cell(row, column, number)
            for row, (_, numbers) in ROWS.items()
            for column, number in zip(RULES, numbers, strict=True)
            if number is not None
        ),
    ],
    notes="The sd is over the seeds. For quantised and dropped errors, the paper gives no sd.",
)
