"""Figures 10 to 14: the linear networks of section 7, whose learning is a differential equation.

    python -m experiments.papers.baldi_2018 --figure=10,11,12,13,14     # a minute on one core

Figures 10 and 12 to 14 of the paper are drawings of networks. Here each network learns random tasks, one for each seed,
by random backpropagation (averaged over the data, in continuous time, until t = 500) and by gradient descent. Figure 11
is the vector field of A[1,1,1]; its cell has a solution for each of the starts in the picture. `experiments.theory` has
the equations, and checks the theorems.

A cell has three figures, as logarithms, in which -12 stands for all below: the error at the end above the least error
of a network of this rank, the same by gradient descent, and the distance from the limit that theory gives (Theorems 2
to 6: the fixed point; Theorem 8: of C_1 P from C_1 S_TI S_II^-1). Theorem 6 has autoencoders; for other tasks we
derived the limit (`rbp_dynamics.compressive_limit`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import plots
from experiments.config import Config
from experiments.papers.cells import Cell, Found, Job, Shown, Table

LINEAR = Config(dataset="random linear tasks", model="linear", rule="srbp", epochs=1, seeds=5, probe=0)
LEAST = 1e-12  # what is below counts as this, so that there is a logarithm
SHOWN = (
    Shown("error", "log10 error", 1, 1),
    Shown("gradient_descent", "log10 error of gradient descent", 1, 1),
    Shown("distance", "log10 distance from the limit", 1, 1),
)
POINTS = 60  # of a curve


def simulate(job: Job) -> Mapping[str, Any] | None:
    """Solves the equations of a network for the random task of each seed."""
    from experiments.theory import rbp_dynamics as dynamics  # diffrax is slow to import

    sizes, seeds = job.config.widths, job.config.all_seeds
    job.bar.restart(len(seeds))
    curves: dict[str, list[Any]] = {"error": [], "gradient_descent": []}
    distances = []
    times = np.zeros(0)
    for seed in seeds:
        if job.stop.requested:
            return None
        problem = dynamics.random_problem(seed, sizes)
        weights, feedback, ti, ii = problem
        least = dynamics.best_excess_error(ti, ii, min(sizes))
        flows = {
            "error": dynamics.integrate(dynamics.srbp, *problem),
            "gradient_descent": dynamics.integrate(dynamics.gradient_descent, weights, ti, ii),
        }
        for name, flow in flows.items():
            kept = np.unique(np.linspace(1, len(flow.times) - 1, POINTS).round().astype(int))
            times = flow.times[kept]
            curves[name].append(dynamics.excess_error(flow.states, ti, ii)[kept] - least)
        distances.append(_distance(flows["error"].last, problem))
        job.bar.advance(1)
    return _found(curves | {"distance": distances}) | {
        "curves": {"epoch": times} | {name: np.transpose(curve) for name, curve in curves.items()}
    }


def simulate_field(job: Job) -> Mapping[str, Any] | None:
    """Solves the equations of A[1,1,1] with c_1 = alpha = beta = 1 from a start of figure 11 for each seed."""
    from experiments.theory import figures  # diffrax is slow to import
    from experiments.theory import rbp_dynamics as dynamics

    job.bar.restart(job.config.seeds)
    errors, distances = [], []
    for start in [figures.STARTS[seed] for seed in job.config.all_seeds]:
        problem = dynamics.chain_problem(start, [1.0])
        last = dynamics.integrate(dynamics.srbp, *problem).last
        errors.append([dynamics.excess_error(last, problem.ti, problem.ii)])
        distances.append(_distance(last, problem))
        job.bar.advance(1)
    return _found({"error": errors, "distance": distances})


def _distance(weights: Any, problem: Any) -> float:
    """The distance of the weights from the limit that theory gives, or of P from the best P where it has none."""
    from experiments.theory import rbp_dynamics as dynamics

    start, feedback, ti, ii = problem
    sizes = [len(ti[0]), *(len(w) for w in start)]
    if set(sizes) == {1}:
        limit = dynamics.chain_limit(np.ravel(start), np.ravel(feedback), ti.item(), ii.item())
        return float(np.linalg.norm(np.ravel(weights) - limit))
    if len(start) == 2 and 1 in sizes:
        ends = (dynamics.expansive_limit if sizes[0] == 1 else dynamics.compressive_limit)(problem)
        return float(np.linalg.norm(np.concatenate([(w - v).ravel() for w, v in zip(weights, ends, strict=True)])))
    gap = dynamics.product(weights) - dynamics.optimum(ti, ii)
    return float(np.linalg.norm(feedback[0] @ gap if len(start) == 2 else gap))


def _found(values: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The logarithm of the last value of each seed, by name."""
    last = {name: [np.ravel(each)[-1] for each in of_seeds] for name, of_seeds in values.items()}
    return {name: {"by_seed": np.log10(np.maximum(each, LEAST))} for name, each in last.items()}


def by_time(found: Sequence[Found]) -> Figure:
    """A panel for each network: the error over time, by random backpropagation and by gradient descent."""
    figure = Figure(figsize=(1.5 + 3.4 * len(found), 3.8), dpi=130, layout="constrained")
    for axis, each in zip(figure.subplots(1, len(found), sharey=True, squeeze=False)[0], found, strict=True):
        styles = {"error": ("-", "random backpropagation"), "gradient_descent": ("--", "gradient descent")}
        for name, (line, label) in styles.items():
            times, errors = each.curve(name)
            for seed, error in enumerate(np.maximum(errors, LEAST).T):
                colour = plots.COLOURS[seed % len(plots.COLOURS)]
                axis.plot(times, error, line, color=colour, label=None if seed else label)
        axis.set(title=each.cell.row, xscale="log", yscale="log", xlabel="time")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("error above the least")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def field(found: Sequence[Found]) -> Figure:
    """Figure 11."""
    from experiments.theory import figures  # diffrax is slow to import

    return figures.vector_field()


BELOW = "-12 stands for all numbers below."
NARROW = (
    "With a narrow hidden layer the limit is not the best network of its rank, which gradient descent finds: P keeps "
    "to the directions of the feedback weights."
)


def _table(title: str, *networks: tuple[int, ...], notes: str = "") -> Table:
    cells = [
        Cell(f"A[{','.join(map(str, sizes))}]", "", LINEAR.replace(widths=sizes), minutes=0.05, measure=simulate)
        for sizes in networks
    ]
    return Table(title, cells, SHOWN, f"{notes} {BELOW}".strip(), plot=by_time)


LINEAR_FIGURES = {
    "figure 10": _table("The chains A[1,1,1] and A[1,1,1,1] (Theorems 2 and 3)", (1, 1, 1), (1, 1, 1, 1)),
    "figure 11": Table(
        "The vector field of A[1,1,1] with c_1 = alpha = beta = 1 (Theorem 2)",
        [Cell("A[1,1,1]", "", LINEAR.replace(widths=(1, 1, 1), seeds=7), minutes=0.01, measure=simulate_field)],
        (SHOWN[0], SHOWN[2]),
        notes=f"A seed is a start in the picture. {BELOW}",
        plot=field,
    ),
    "figure 12": _table("Chains of any length (Theorem 4)", (1,) * 5, (1,) * 6),
    "figure 13": _table(
        "A hidden layer wider or narrower than the others (Theorems 5 and 6)",
        (1, 4, 1),
        (4, 1, 4),
        notes=f"{NARROW} Theorem 6 has autoencoders only. The tasks here are others, and their limit is ours.",
    ),
    "figure 14": _table(
        "Linear networks of any size (Theorems 7 and 8 for three layers; none for four)",
        (2, 2, 2),
        (4, 6, 3),
        (4, 2, 3),
        (4, 5, 5, 3),
        notes=NARROW,
    ),
}
