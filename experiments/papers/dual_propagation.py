"""Tables 1 and 2 of Hoier and Zach, Two tales of single-phase contrastive Hebbian learning (2024).

    python -m experiments.papers.dual_propagation         # on digits, with smaller networks: a minute on two cores
    python -m experiments.papers.dual_propagation --dataset=mnist --widths=512,512 --deep_widths=1000,1000,1000,1000

The second command has the paper's settings: beta 1/2, Adam with rate 1e-3, 20 epochs with batches of 50, half squared
error on one-hot targets. It is for a GPU. On one core, Table 1 alone (`--table=1`) takes half an hour for each seed.
The paper does not give the batch size, the iterations, the variance of the initial weights (1 / fan-in) and the form of
the error: these are from the authors' code. We use all 60,000 training images; their code uses 50,000.

Table 1 (section 6.1) has the test accuracy and an estimate of the Lipschitz constant: the spectral norm of the product
of all weights. A smaller alpha should give a smaller constant, and the effect should be much larger for the original
(DP) than for the adjoint (DP^T). Nudged inputs or adversarial training should make the constant smaller still. DP is
damped (Eq. 50) unless alpha is 1/2. (On digits, training is short: DP with alpha 0 has the hardest aim, and has not
caught up at the end.)

Table 2 (appendix A.1) is about convergence. After 30 iterations without damping, the states of DP have not converged
for alpha 0 and 1, and the states of DP^T have. The residual is the change of the states in the last iteration, relative
to their difference. (X) marks states that have not converged, or a loss that is not finite.

The program writes metrics.json, table.csv (one row for each run and seed) and tables.png.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.figure import Figure

import lrules
from experiments import build, cli, compare, data, files, methods, plots, results, tasks
from experiments.config import Config
from experiments.errors import InputError

FLAGS = flags.FLAGS
SETTLED = 0.1  # above this residual, the states still change by a tenth of their difference

# Table 1, mean and sd over three seeds: (accuracy in percent, Lipschitz estimate).
Figures = tuple[tuple[float, float], tuple[float, float]]
PAPER: dict[str, dict[str, Figures]] = {
    "mnist": {
        "DP, alpha=1": ((95.85, 0.68), (522, 288)),
        "DP, alpha=1/2": ((98.09, 0.06), (67.2, 12.6)),
        "DP, alpha=0": ((98.46, 0.07), (29.9, 4.2)),
        "DP, alpha=0, inputs nudged": ((98.43, 0.11), (15.87, 6.34)),
        "DP^T, alpha=1": ((98.06, 0.15), (73.4, 2.7)),
        "DP^T, alpha=1/2": ((97.9, 0.1), (78.1, 9.9)),
        "DP^T, alpha=0": ((98.21, 0.13), (43.2, 19.4)),
        "BP": ((98.05, 0.12), (55.1, 14.4)),
        "BP, adversarial": ((98.43, 0.04), (36.16, 4.23)),
    },
    "fashion_mnist": {
        "DP, alpha=1": ((83.36, 0.74), (157.7, 57.8)),
        "DP, alpha=1/2": ((88.32, 0.05), (34.3, 4.0)),
        "DP, alpha=0": ((89.16, 0.43), (19.97, 3.9)),
        "DP, alpha=0, inputs nudged": ((88.29, 0.79), (8.05, 1.03)),
        "DP^T, alpha=1": ((88.26, 0.46), (52.0, 23.6)),
        "DP^T, alpha=1/2": ((88.35, 0.37), (35.1, 7.0)),
        "DP^T, alpha=0": ((88.18, 0.27), (29.4, 2.7)),
        "BP": ((88.37, 0.56), (37.7, 10.2)),
        "BP, adversarial": ((88.64, 0.25), (12.68, 0.81)),
    },
}
ALPHAS = {"1": 1.0, "1/2": 0.5, "0": 0.0}


class Result(NamedTuple):
    """The measurements after the last epoch, for each seed."""

    accuracy: np.ndarray  # [seeds]
    train_loss: np.ndarray  # [seeds]
    lipschitz: np.ndarray  # [seeds]
    residual: np.ndarray  # [seeds, iterations], for one batch; backprop has no iterations

    @property
    def settled(self) -> bool:
        """Whether, for all seeds, the loss is finite and the states have converged."""
        return bool(np.isfinite(self.train_loss).all() and (self.residual[:, -1:] <= SETTLED).all())


def original(alpha: float, beta: float, iterations: int, **options: Any) -> lrules.Rule:
    """DP (Eq. 2), with the exact minimiser at the outputs (Eq. 3)."""
    return lrules.dual_propagation(
        alpha, beta=beta, adjoint=False, iterations=iterations, output="squared_error", **options
    )


def adjoint(alpha: float, beta: float, iterations: int) -> lrules.Rule:
    """DP^T (Eq. 19), linearised at the current outputs (Eq. 22)."""
    return lrules.dual_propagation(alpha, beta=beta, iterations=iterations, output="refreshed")


def table_one(beta: float, iterations: int, damped_iterations: int) -> dict[str, lrules.Rule]:
    """The rules of Table 1, without adversarial training."""
    damped: dict[str, Any] = {"iterations": damped_iterations, "damping": "spectral"}
    found = {}
    for name, alpha in ALPHAS.items():
        options = {"iterations": iterations} if alpha == 0.5 else damped
        found[f"DP, alpha={name}"] = original(alpha, beta, **options)
    found["DP, alpha=0, inputs nudged"] = original(0.0, beta, input_nudge=1.0, **damped)
    found |= {f"DP^T, alpha={name}": adjoint(alpha, beta, iterations) for name, alpha in ALPHAS.items()}
    return found | {"BP": lrules.backprop()}


def table_two(beta: float, iterations: int) -> dict[str, lrules.Rule]:
    """The rules of Table 2."""
    found = {f"DP, alpha={name}": original(ALPHAS[name], beta, iterations) for name in ("0", "1")}
    return found | {f"DP^T, alpha={name}": adjoint(ALPHAS[name], beta, iterations) for name in ("0", "1")}


def train(
    config: Config, rules: Mapping[str, lrules.Rule], dataset: data.Dataset, task: tasks.Task
) -> dict[str, Result]:
    """Train with each rule, and measure after the last epoch."""
    trials, refused = compare.make_trials(config, dataset, rules, task=task)
    assert not refused, refused  # `main` has checked all rules
    compare.train(trials)
    x, y = task.prepare(dataset.x_train[: config.batch_size]), jnp.asarray(dataset.y_train[: config.batch_size])
    found = {}
    for name, trial in trials.items():
        last, carry = trial.records[-1], trial.runs[0].carry
        lipschitz, residual = jax.jit(jax.vmap(measures(task, rules[name], x, y)))(
            carry.params, carry.state, carry.feedback
        )
        found[name] = Result(last.accuracy, last.train_loss, np.asarray(lipschitz), np.asarray(residual))
    return found


def measures(task: tasks.Task, rule: lrules.Rule, x: jax.Array, y: jax.Array) -> Any:
    """A function of one seed: the Lipschitz estimate, and for a batch the residual of the states in each iteration."""
    value_and_grad = lrules.value_and_grad(task.net, task.loss, rule)

    def measure(params: Any, state: Any, feedback: lrules.Feedback) -> tuple[jax.Array, jax.Array]:
        def net(params: Any, x: jax.Array) -> jax.Array:
            return task.net(params, (state, x))[0]

        report = value_and_grad(params, feedback, (state, x), y)[1].report
        return lrules.diagnostics.lipschitz_product(net, params, x), report.get("residual", jnp.zeros(0))

    return measure


def spread(values: np.ndarray, digits: int, unit: float = 1) -> str:
    """Mean ± sd over the seeds."""
    return results.text(results.statistics(values), unit, digits)


def mark(result: Result) -> str:
    """(X) for states that have not converged, as in Table 2 of the paper."""
    return "" if result.settled else " (X)"


def table_one_shown(found: Mapping[str, Result], paper: Mapping[str, Figures]) -> str:
    """Table 1, with the figures of the paper if it has this data set."""
    rows = []
    for name, result in found.items():
        known = [f"{mean:g} ± {sd:g}" for mean, sd in paper[name]] if name in paper else ["-", "-"]
        lost = "" if np.isfinite(result.train_loss).all() else " (X)"
        last = f"{result.residual[:, -1].mean():.1e}" if result.residual.size else "-"
        measured = spread(result.accuracy, 2, 100) + lost, known[0], spread(result.lipschitz, 1), known[1], last
        rows.append((name, *measured))
    return results.table(("Table 1", "test accuracy (%)", "paper", "Lipschitz estimate", "paper", "residual"), rows)


def table_two_shown(found: Mapping[str, Result]) -> str:
    """Table 2. The paper marks DP with (X) for both alphas."""
    rows = [
        (name, spread(result.accuracy, 2, 100) + mark(result), f"{result.residual[:, -1].mean():.1e}")
        for name, result in found.items()
    ]
    return results.table(("Table 2", "test accuracy (%)", "residual"), rows)


def figure(one: Mapping[str, Result], two: Mapping[str, Result], paper: Mapping[str, Figures], title: str) -> Figure:
    """Table 1 as points, from us and from the paper; the residuals of Table 2 over the iterations."""
    panels = 2 * bool(one) + bool(two)
    made = Figure(figsize=(2 + 3.7 * panels, 4.4), dpi=130, layout="constrained")
    axes = made.subplots(1, panels, squeeze=False)[0]
    if one:
        points(axes[0], [100 * result.accuracy for result in one.values()], [paper[n][0] for n in one if n in paper])
        points(axes[1], [result.lipschitz for result in one.values()], [paper[n][1] for n in one if n in paper])
        axes[0].set(xlabel="test accuracy (%)", yticklabels=list(one))
        axes[1].set(xlabel="Lipschitz estimate", yticklabels=[])
        plots.logarithmic(axes[1], "x")
        axes[1].tick_params(axis="x", which="both", labelsize="x-small")
    if two:
        colours = ("#d62728", "#ff9896", "#1f77b4", "#ffb000")
        for (name, result), colour in zip(two.items(), colours, strict=True):
            shown = np.where(np.isfinite(result.residual), result.residual, np.nan).mean(0)
            line = "--" if colour == colours[-1] else "-"  # this line may cover the one before
            axes[-1].plot(range(1, len(shown) + 1), shown, color=colour, linestyle=line, marker=".", label=name)
        axes[-1].axhline(SETTLED, color="black", linewidth=0.8, linestyle=":")
        axes[-1].set(xlabel="iteration", ylabel="residual of the states (Table 2)")
        axes[-1].set_yscale("symlog", linthresh=1e-3)  # residuals of DP^T may be exactly zero
        axes[-1].set_ylim(-1e-4, None)
        axes[-1].grid(alpha=0.3)
        axes[-1].legend(frameon=False, fontsize="small", loc="lower right", bbox_to_anchor=(1, 0.1))
    made.suptitle(title, fontsize="medium")
    return made


def points(axis: Any, ours: Sequence[np.ndarray], paper: Sequence[tuple[float, float]]) -> None:
    """One row for each run: mean and sd of our values [runs][seeds], and of the paper if it has all runs."""
    rows = np.arange(len(ours))
    bars: dict[str, Any] = {"linestyle": "none", "capsize": 3}
    sds = [results.statistics(v)["sd"] or 0.0 for v in ours]
    axis.errorbar([v.mean() for v in ours], rows, xerr=sds, marker="o", label="ours", **bars)
    if len(paper) == len(ours):
        means, spreads = zip(*paper, strict=True)
        axis.errorbar(means, rows + 0.25, xerr=spreads, marker="x", color="0.4", label="paper", **bars)
        axis.legend(frameon=False)
    axis.set(yticks=rows)
    axis.invert_yaxis()
    axis.grid(alpha=0.3)


def main() -> None:
    folder = cli.output_folder()
    config = cli.config(rule="dual_propagation", loss="squared_error")
    dataset = data.on_device(build.dataset(config, data_dir=FLAGS.data_dir))
    beta, one, two = FLAGS.beta, {}, {}
    try:
        rules_one = table_one(beta, FLAGS.iterations, FLAGS.damped_iterations)
        rules_two = table_two(beta, FLAGS.deep_iterations)
    except ValueError as error:
        raise InputError(f"{error}.") from None
    deep_widths = cli.positive_integers("deep_widths", FLAGS.deep_widths)
    shallow, deep = tasks.build(config, dataset), tasks.build(config.replace(widths=deep_widths), dataset)
    for task, rules, other in ((shallow, rules_one, "2"), (deep, rules_two, "1")):
        if FLAGS.table != other:
            methods.check(task, rules, dataset.x_train, dataset.y_train, config.batch_size)
    plain = config.replace(fgsm=0.0)  # only one row of Table 1 uses the flag
    if FLAGS.table != "2":
        one = train(plain, rules_one, dataset, shallow)
        one |= train(config, {"BP, adversarial": lrules.backprop()}, dataset, shallow)
    if FLAGS.table != "1":
        two = train(plain, rules_two, dataset, deep)

    paper = PAPER.get(dataset.name.removesuffix(".npz"), {})
    tables = {"table_1": one, "table_2": two}
    figures = {
        table: {name: result._asdict() | {"settled": result.settled} for name, result in found.items()}
        for table, found in tables.items()
    }
    content = cli.provenance_and_settings(config.seed) | {"config": config.to_dict()} | figures | {"paper": paper}
    files.write_json(folder / "metrics.json", content)
    rows = [
        (table, name, config.seed + i, r.accuracy[i], r.lipschitz[i], r.residual[i, -1] if r.residual.size else "")
        for table, found in tables.items()
        for name, r in found.items()
        for i in range(config.seeds)
    ]
    files.write_csv(folder / "table.csv", ("table", "run", "seed", "accuracy", "lipschitz", "residual"), rows)
    shown = [*([config.widths] if one else []), *([deep_widths] if two else [])]
    nets = " and ".join("-".join(map(str, widths)) for widths in shown)
    seeds, epochs = results.counted(config.seeds, "seed"), results.counted(config.epochs, "epoch")
    title = f"{nets} on {dataset.name}, beta {beta:g}, {seeds}, {epochs}"
    files.savefig(figure(one, two, paper, title), folder / "tables.png")
    if one:
        print(table_one_shown(one, paper))
    if two:
        print("\n" + table_two_shown(two))
    print(f"\n{title}. Results: {folder}/metrics.json, table.csv, tables.png")


if __name__ == "__main__":
    cli.define_config_flags(
        omit=("rule", "loss", "task", *cli.UNUSED_BY_PAPERS),
        epochs=20,
        seeds=3,
        learning_rate=1e-3,
        widths=(128, 128),
        activation="relu",
        batch_size=50,
        schedule="constant",
        fgsm=0.01,
    )
    cli.define_output_flags(output="results/dual_propagation")
    flags.DEFINE_enum("table", "both", ["1", "2", "both"], "Which table to measure.")
    flags.DEFINE_float("beta", 0.5, "The strength of the nudge at the outputs.", lower_bound=0)
    flags.DEFINE_integer("iterations", 6, "The iterations of DP with alpha 1/2 and of DP^T in Table 1.", lower_bound=1)
    flags.DEFINE_integer("damped_iterations", 16, "The iterations of damped DP.", lower_bound=1)
    flags.DEFINE_list("deep_widths", ["64"] * 4, "The hidden widths of Table 2.")
    flags.DEFINE_integer("deep_iterations", 30, "The iterations of Table 2.", lower_bound=1)
    flags.adopt_module_key_flags(cli)
    cli.run(main)
