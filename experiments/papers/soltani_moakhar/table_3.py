"""Table 3: the time of 10,000 forward and backward passes of 1,024 images.

    python -m experiments.papers.soltani_moakhar --table=3       # a GPU: 3 minutes for the paper's rows, 20 for all

The paper timed PyTorch on a P100, BackMAN as hooks around each layer. We time the compiled step (the loss and its
gradients, no optimizer) of this library, and plain `jax.value_and_grad` as error-backpropagation. Each round times a
rule next to the plain step, and the ratio is the median over the rounds, so compare ratios and not seconds. The inputs
are random and not blank, which changes no time. No data set is needed. On two cores a pass of the MLP takes a second,
so the time of 10,000 is that of fewer, scaled; measure there only when nothing else runs.
"""

import functools
from collections.abc import Mapping
from typing import Any

from experiments import benchmark, rules
from experiments.methods import Refused
from experiments.papers.cells import Cell, Job, Measure, Number, Shown, Table
from experiments.papers.soltani_moakhar.settings import BACKMAN, DFA, EBP, FA, LENET, MLP

PASSES, ROUNDS = 10_000, 20
SHAPES = {"mlp": (28, 28, 1), "lenet5": (32, 32, 3)}
COLUMNS = {"MLP": MLP, "LeNet-5": LENET}
# Seconds in the paper, and those over error-backpropagation's.
NUMBERS = {EBP: {"MLP": (117, 1.0), "LeNet-5": (61, 1.0)}, BACKMAN: {"MLP": (263, 2.25), "LeNet-5": (129, 2.11)}}
BEYOND = {
    "Backprop of this library": "backprop",
    "BackMAN, dynamic alpha": 'backman("gradient_norm")',
    FA: "feedback_alignment",
    DFA: "direct_feedback_alignment",
    "Sign symmetry": "sign_symmetry",
    "Kolen-Pollack": "kolen_pollack",
    "Skipped backprop": "skipped_backprop",
    "Random target projection": "random_target_projection",
    "Dual propagation": "dual_propagation",
    "Node perturbation": "node_perturbation(std=0.01)",
}


def seconds(job: Job, *, plain: bool = False) -> Mapping[str, Any] | None:
    """The seconds of 10,000 passes, and the ratio to those of `jax.value_and_grad`, which is timed alone if `plain`."""
    config = job.config
    found = []
    job.bar.restart(ROUNDS * config.seeds * (1 + (not plain)))
    for seed in config.all_seeds:
        if job.stop.requested:
            return None
        case = benchmark.Case(SHAPES[config.model], config.batch_size, config.widths)
        chosen = {} if plain else {config.rule: rules.parse(config.rule)}
        rows, refused = benchmark.benchmark(
            case.maker(config.model, config.dtype),
            case,
            chosen,
            repeats=ROUNDS,
            compile_repeats=1,
            limit=120,
            seed=seed,
            progress=job.bar.advance,
        )
        if refused:
            raise Refused(next(iter(refused.values())))
        found.append(rows["plain" if plain else config.rule])
    return {
        "seconds": {"by_seed": [PASSES * row.step_seconds for row in found]},
        "ratio": {"by_seed": [row.step_ratio[0] for row in found]},
        "quartiles": [row.step_ratio[1:] for row in found],
        "memory_ratio": [row.memory_ratio for row in found],
    }


def _cell(row: str, column: str, rule: str) -> Cell:
    measure: Measure = functools.partial(seconds, plain=True) if row == EBP else seconds
    config = COLUMNS[column].replace(rule=rule, batch_size=1024, epochs=1, seeds=1)
    paper: dict[str, Number] = {}
    if row in NUMBERS:
        paper = {name: (value, None) for name, value in zip(("seconds", "ratio"), NUMBERS[row][column], strict=True)}
    return Cell(row, column, config, paper, minutes=4, gpu_minutes=0.7, measure=measure, beyond=row not in NUMBERS)


TABLE_3 = Table(
    "Seconds of 10,000 forward and backward passes of 1,024 images, and their ratio to error-backpropagation",
    [
        _cell(row, column, rule)
        for row, rule in ({EBP: "backprop", BACKMAN: "backman"} | BEYOND).items()
        for column in COLUMNS
    ],
    [Shown("seconds", "seconds", 1, 1), Shown("ratio", "ratio", 1, 2)],
    notes="The paper's ratios are those of its seconds, on a P100. Ours are of two cores of two servers, scaled up "
    "from fewer passes: compare the ratios.",
)
