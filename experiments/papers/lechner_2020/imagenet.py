"""Tables 2, 5 and 6: some classes of ImageNet, with fully connected (FC) and convolutional (CNN) networks.

The settings of the paper: images cropped and resized to 224x224; FC with four hidden layers of 1024; CNN of six layers;
all else as for CIFAR-100. The accuracy is that of ImageNet's own validation images, as there are no public test labels.
Here they choose nothing: settings and epochs are chosen on 15% of the training images. The authors' program has one
more convolution than the paper (appendix B.1), and a larger window in the first one; we have the paper's.

The data are a set that TFDS has prepared below --data_dir: imagenet2012, whose images are read, cropped and resized
(`imagenet2012@224`), or imagenet_resized/64x64 for the rows beyond the paper. Only images of the classes that a cell
needs are read: 2 GB for two classes of each of five sets, and 10 GB for ten.

We expect for five sets of two classes on one GPU 1.5 minutes with FC and 12 minutes with the CNN (0.2 and 1.5 at
64x64), and for more classes so many times more: this is not measured, and may be several times too low. On two cores it
takes days.

    python -m experiments.papers.lechner_2020 --table=2 --data_dir=FOLDER
    python -m experiments.papers.lechner_2020 --table=5,6 --data_dir=FOLDER
    python -m experiments.papers.lechner_2020 --table=2,5,6 --cells=64x64 --data_dir=FOLDER
"""

from collections.abc import Mapping, Sequence

from experiments.papers.cells import Cell, Table
from experiments.papers.lechner_2020 import cifar
from experiments.papers.lechner_2020.cifar import RULES, SHOWN, Rows, notes

CONFIG = cifar.CONFIG.replace(dataset="imagenet2012@224", widths=(1024, 1024, 1024, 1024))
MODELS = {"FC": "mlp", "CNN": "conv_imagenet"}
SMALL = "imagenet_resized/64x64"

# For FC and CNN the training and the validation accuracy, each with its sd.
TABLE_2_PAPER: dict[str, dict[str, tuple[float, ...]]] = {
    "hard-tanh": {
        "BP": (98.4, 3.6, 77.3, 6.8, 99.8, 0.5, 81.7, 11.6),
        "DFA": (93.8, 13.0, 74.0, 8.5, 100.0, 0.0, 83.0, 8.6),
        "FA": (97.5, 0.8, 74.7, 7.7, 51.9, 0.5, 54.7, 4.6),
        "mDFA": (95.3, 10.4, 79.5, 9.8, 79.5, 9.8, 83.8, 7.2),
    },
    "ReLU": {
        "BP": (100.0, 0.0, 78.3, 7.7, 90.0, 18.1, 72.5, 13.7),
        "DFA": (75.1, 8.1, 73.2, 8.0, 50.4, 0.9, 52.7, 2.4),
        "FA": (68.3, 7.9, 71.0, 6.7, 52.3, 0.9, 54.8, 2.1),
        "mDFA": (56.9, 0.9, 59.7, 2.4, 52.6, 1.6, 58.4, 4.5),
    },
    "tanh": {
        "BP": (99.9, 0.2, 75.8, 7.7, 99.9, 0.1, 76.2, 9.8),
        "DFA": (97.9, 2.2, 76.8, 7.2, 99.3, 1.5, 83.2, 8.8),
        "FA": (98.1, 2.3, 76.5, 7.2, 62.4, 17.3, 60.8, 13.8),
        "mDFA": (99.9, 0.1, 78.0, 6.8, 78.2, 9.4, 83.0, 6.8),
    },
}
# For each number of classes the accuracies of BP, DFA, FA and mDFA with their sds: training, then validation.
TABLE_5_PAPER: Rows = {
    3: ((100.0, 0.0, 59.6, 7.2, 50.4, 5.9, 51.4, 4.4), (74.5, 8.8, 62.8, 11.9, 64.2, 10.9, 62.0, 9.6)),
    5: ((100.0, 0.0, 48.9, 5.0, 41.4, 5.5, 41.0, 7.1), (63.0, 7.4, 43.8, 6.2, 42.3, 7.1, 37.3, 5.2)),
    10: ((99.7, 0.5, 33.4, 4.5, 24.7, 3.3, 38.7, 10.1), (41.2, 5.0, 30.8, 4.9, 26.0, 4.5, 33.3, 8.0)),
}
TABLE_6_PAPER: Rows = {
    3: ((100.0, 0.0, 100.0, 0.0, 35.8, 0.7, 68.1, 8.2), (68.5, 13.0, 76.5, 9.9, 53.3, 1.7, 74.8, 8.8)),
    5: ((100.0, 0.0, 100.0, 0.0, 21.4, 0.4, 60.4, 6.2), (61.6, 7.3, 68.7, 6.3, 29.0, 2.0, 61.9, 5.3)),
    10: ((100.0, 0.0, 90.4, 10.0, 11.3, 0.7, 42.9, 3.9), (52.8, 4.6, 53.6, 5.3, 10.6, 0.8, 44.1, 4.4)),
}


def timed(cells: Sequence[Cell]) -> list[Cell]:
    """The cells with our estimate of their time."""
    found = []
    for cell in cells:
        share = int(cell.config.classes) / 2 * (0.12 if cell.config.dataset == SMALL else 1.0)
        gpu_minutes = share * (1.5 if cell.config.model == "mlp" else 12.0)
        found.append(cell._replace(gpu_minutes=gpu_minutes, minutes=40 * gpu_minutes))
    return found


def small(paper: Mapping[int, object], model: str) -> list[Cell]:
    """Rows beyond the paper: images of 64x64 pixels."""
    cells = []
    for classes in paper:
        for rule, fields in RULES.items():
            own = CONFIG.replace(dataset=SMALL, model=model, classes=str(classes), activation="tanh", **fields)
            cells.append(cifar.cell(f"{classes} classes of 64x64, {rule}", "", own, {}, beyond=True))
    return cells


def binary() -> list[Cell]:
    """The cells of Table 2, with tanh for images of 64x64 pixels, too."""
    cells = cifar.binary_cells(CONFIG, TABLE_2_PAPER, MODELS)
    for cell in [cell for cell in cells if cell.row.startswith("tanh") and not cell.beyond]:
        own = cell.config.replace(dataset=SMALL)
        cells.append(cell._replace(row=f"{cell.row}, 64x64", config=own, paper={}, beyond=True))
    return cells


TABLE_2 = Table("Accuracy (%) on two classes of ImageNet", timed(binary()), SHOWN, notes)
TABLE_5, TABLE_6 = (
    Table(
        f"Accuracy (%) on some classes of ImageNet, {name} network with tanh",
        timed([*cifar.class_cells(CONFIG.replace(model=model), paper), *small(paper, model)]),
        SHOWN,
        notes,
    )
    for name, model, paper in (
        ("fully connected", "mlp", TABLE_5_PAPER),
        ("convolutional", "conv_imagenet", TABLE_6_PAPER),
    )
)
