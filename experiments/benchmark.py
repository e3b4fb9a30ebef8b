"""Compare every learning rule with plain `jax.value_and_grad`: step time, compile time and compiled memory.

    python -m experiments.benchmark --quick            # small models: about four minutes on two cores
    python -m experiments.benchmark                    # the full models: for a GPU; more than an hour on two cores
    python -m experiments.benchmark --models=mlp --rules="feedback_alignment,backman(alpha=0.5)" --repeats=30
    python -m experiments.benchmark --models=wide --batch=1024 --rules="dfa,dfa(storage='recomputed')"

A step is the loss and its gradient, jitted, without an optimizer. Each round times every rule next to the plain step.
A ratio is the median over the rounds of rule over plain, with the quartiles; the quartiles of plain over plain show how
quiet the machine was. A modifier is also compared with the rule that it modifies, and feedback that is drawn again with
stored feedback. Memory is the memory that the compiled step allocates, for outputs and temporaries. The user holds the
feedback weights beside the parameters, so they have their own column. The program writes metrics.json, table.csv and
benchmark.png.
"""

import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

import lrules
from experiments import cli, files, models, plots, results, rules, tasks, transformer
from experiments.errors import InputError, nearest

FLAGS = flags.FLAGS


class Case(NamedTuple):
    """A model of `models.py` and the shape of its inputs; `widths` are for the MLP.

    With `blocks` it is the transformer of `transformer.py`, which reads tokens and predicts the next ones; `widths` has
    its width. `model` is the name in `models.py`, if the benchmark has another name for it.
    """

    shape: tuple[int, ...]
    batch: int
    widths: tuple[int, ...] = ()
    blocks: int = 0
    classes: int = 10
    model: str = ""

    def describe(self, model: str) -> str:
        if self.blocks:
            inside = f"{self.blocks} blocks of width {self.widths[0]}"
            return f"{model}, {inside}, {self.shape[0]} tokens, batch {self.batch}"
        inside = f" {'-'.join(map(str, (math.prod(self.shape), *self.widths, self.classes)))}" if self.widths else ""
        return f"{model}{inside}, inputs {'x'.join(map(str, self.shape))}, batch {self.batch}"

    def maker(self, model: str, dtype: str) -> Callable[[Any], Any]:
        """The function that builds the model, with ReLU (the transformer: with GELU), from the `rngs`."""
        if self.blocks:
            tokens = self.shape[0]
            sizes: dict[str, Any] = {"blocks": self.blocks, "width": self.widths[0], "dtype": jnp.dtype(dtype)}
            return lambda rngs: transformer.Transformer(VOCABULARY, tokens, rngs=rngs, **sizes)
        options: dict[str, Any] = {"widths": self.widths, "activation": "relu", "dtype": jnp.dtype(dtype)}
        return lambda rngs: models.build(self.model or model, self.shape, self.classes, rngs=rngs, **options)

    def examples(self, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Random inputs and targets, from two keys."""
        if self.blocks:
            x = jax.random.randint(keys[0], (self.batch, *self.shape), 0, VOCABULARY)
            return x, jnp.roll(x, -1, 1)
        x = jax.random.uniform(keys[0], (self.batch, *self.shape))
        return x, jax.random.randint(keys[1], (self.batch,), 0, self.classes)


VOCABULARY = 256  # of the transformer
FULL = {
    "mlp": Case((28, 28, 1), 1024, (2000,) * 4),
    "lenet5": Case((32, 32, 3), 1024),
    "vgg16": Case((32, 32, 3), 64),
    "resnet18": Case((32, 32, 3), 64),
    "transformer": Case((64,), 16, (512,), blocks=4),
    "wide": Case((28, 28, 1), 128, (512,) * 3, classes=20_000, model="mlp"),
}
QUICK = {
    "mlp": Case((28, 28, 1), 256, (500,) * 4),
    "lenet5": Case((32, 32, 3), 128),
    "vgg16": Case((32, 32, 3), 4),
    "resnet18": Case((8, 8, 3), 8),
    "transformer": Case((16,), 4, (64,), blocks=2),
    "wide": Case((28, 28, 1), 32, (64,) * 3, classes=2000, model="mlp"),
}
ASKED_FOR = ("wide",)  # it is for feedback that is drawn again: only --models=wide measures it


# The program also times these by default, after every rule without a required argument.
FURTHER = (
    "arbp",
    "asrbp",
    "direct_feedback_alignment(shared_axes=1)",
    "dual_propagation(iterations=2)",
    "dual_propagation(iterations=5)",
    "node_perturbation(std=0.01)",
    "node_perturbation(std=0.01, direct=True)",
    "forward_gradient('activations')",
    "forward_gradient(method='central', std=0.001)",
    "quantize_error(feedback_alignment, bits=5)",
    "drop_error(feedback_alignment, rate=0.5)",
    "sign_error(feedback_alignment)",
    "magnitude_error(feedback_alignment)",
    "without_derivatives(feedback_alignment)",
    "quantize_error(direct_feedback_alignment, bits=5)",
    "drop_error(direct_feedback_alignment, rate=0.5)",
)


class Step(NamedTuple):
    """A jitted step and its arguments; it returns (loss, model state, gradients). The `.params` are compared."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Row(NamedTuple):
    """One rule on one model. Ratios are to plain `jax.value_and_grad`: (median, lower quartile, upper quartile).

    `over_rule` is the median ratio of a modifier's step time to that of the rule that it modifies (`rules.modified`).
    """

    step_seconds: float
    step_ratio: tuple[float, float, float]
    over_rule: float | None
    compile_seconds: float
    compile_ratio: float
    memory_bytes: int
    memory_ratio: float
    feedback_bytes: int
    identical_gradients: bool


def benchmark(
    make_model: Callable[..., Any],
    case: Case,
    chosen: Mapping[str, lrules.Rule],
    *,
    repeats: int,
    compile_repeats: int,
    limit: float = math.inf,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int], Any] = lambda n: None,
) -> tuple[dict[str, Row], dict[str, str]]:
    """Measure rules on one model; returns a row for "plain" and for each rule, and the messages of rules that refuse.

    After `limit` seconds of compiling, and after `limit` seconds of timing, no further round begins, but at least one
    round of compiling and three of timing are done. `clock` times the steps. The function calls `progress(runs)` after
    each compilation and each timing.
    """
    steps, refused = make_steps(make_model, case, chosen, seed)
    compiled: dict[str, Any] = {}

    def compile_seconds(name: str) -> float:
        compiled[name], seconds = compile_step(steps[name])
        return seconds

    def step_seconds(name: str) -> float:
        begin = clock()
        for _ in range(calls):
            out = compiled[name](*steps[name].arguments)
        jax.block_until_ready(out)
        return (clock() - begin) / calls

    compile_seconds("plain")  # to warm up
    compiling = time_pairs(compile_seconds, list(steps), compile_repeats, 1, limit, progress)
    gradients = {name: compiled[name](*steps[name].arguments)[2].params for name in steps}
    calls = 3
    calls = max(1, math.ceil(0.05 / step_seconds("plain")))
    stepping = time_pairs(step_seconds, list(steps), repeats, 3, limit, progress)

    rows = {}
    memory = {name: memory_bytes(c) for name, c in compiled.items()}
    ratios = {name: own / plain for name, (own, plain) in stepping.items()}
    for name in steps:
        rule = rules.modified(name)
        rows[name] = Row(
            float(np.median(stepping[name][0])),
            tuple(np.quantile(ratios[name], (0.5, 0.25, 0.75)).tolist()),
            float(np.median(ratios[name] / ratios[rule])) if rule in ratios else None,
            float(np.median(compiling[name][0])),
            float(np.median(compiling[name][0] / compiling[name][1])),
            memory[name],
            memory[name] / memory["plain"],
            sum(leaf.nbytes for leaf in jax.tree.leaves(steps[name].arguments[1])),
            jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), gradients[name], gradients["plain"])),
        )
    return rows, refused


def make_steps(
    make_model: Callable[..., Any], case: Case, chosen: Mapping[str, lrules.Rule], seed: int
) -> tuple[dict[str, Step], dict[str, str]]:
    """The plain step and one for each rule that serves the model, on random inputs."""
    task = tasks.task(make_model)
    keys = jax.random.split(jax.random.key(seed), 3)
    params, state = jax.jit(task.init)(keys[0])
    x, y = case.examples(keys[1:])

    steps = {"plain": Step(plain_step(task), (params, lrules.Feedback({}, {}), state, x, y))}
    refused = {}
    for name, rule in chosen.items():
        step = rule_step(task, rule)
        try:
            feedback = jax.jit(lambda key, rule=rule: rule.init(key, task.net, params, (state, x)))(keys[2])
            arguments = (params, feedback, state, x, y, *([keys[1]] if rule.stochastic else []))
            jax.eval_shape(step, *arguments)
        except (ValueError, TypeError, NotImplementedError) as error:
            refused[name] = str(error).splitlines()[0]
        else:
            steps[name] = Step(step, arguments)
    return steps, refused


def plain_step(task: tasks.Task) -> Callable[..., Any]:
    """The function of the plain `Step`: the loss and its gradient by `jax.value_and_grad`."""

    def plain(params: Any, feedback: lrules.Feedback, state: Any, x: jax.Array, y: jax.Array):
        def objective(params: Any):
            logits, new_state = task.net(params, (state, x))
            return task.loss(logits, y).mean(), new_state

        (value, new_state), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return value, new_state, lrules.Gradients(grads, {})

    return plain


def rule_step(task: tasks.Task, rule: lrules.Rule) -> Callable[..., Any]:
    """The function of a rule's `Step`; a stochastic rule takes a key after the other arguments."""
    value_and_grad = lrules.value_and_grad(task.net, task.loss, rule)

    def step(params: Any, feedback: lrules.Feedback, state: Any, x: jax.Array, y: jax.Array, *rng: jax.Array):
        (value, _, new_state), grads = value_and_grad(params, feedback, (state, x), y, rng=rng[0] if rng else None)
        return value, new_state, grads

    return step


def compile_step(step: Step) -> tuple[Any, float]:
    """The compiled step, and the seconds from tracing to machine code when JAX's caches are empty."""
    jax.clear_caches()
    begin = time.perf_counter()
    compiled = jax.jit(step.function).lower(*step.arguments).compile()
    return compiled, time.perf_counter() - begin


def time_pairs(
    seconds: Callable[[str], float],
    names: Sequence[str],
    repeats: int,
    least: int,
    limit: float,
    progress: Callable[[int], Any],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The seconds of each name, and those of "plain" immediately before or after, [rounds] each.

    The rounds begin at different names. In every second round "plain" is second in each pair. After `limit` seconds no
    further round begins, but at least `least` rounds are done.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    end = time.perf_counter() + limit
    for round_ in range(repeats):
        if round_ >= least and time.perf_counter() > end:
            progress((repeats - round_) * len(names))
            break
        for i in range(len(names)):
            name = names[(i + round_) % len(names)]
            if round_ % 2:
                own, plain = seconds(name), seconds("plain")
            else:
                plain, own = seconds("plain"), seconds(name)
            times[name].append((own, plain))
            progress(1)
    return {name: (np.array(pairs)[:, 0], np.array(pairs)[:, 1]) for name, pairs in times.items()}


def memory_bytes(compiled: Any) -> int:
    """Bytes that a call allocates: outputs and temporaries."""
    stats = compiled.memory_analysis()
    return stats.output_size_in_bytes + stats.temp_size_in_bytes - stats.alias_size_in_bytes


def table(rows: Mapping[str, Row]) -> str:
    """The rows of one model as a Markdown table."""
    cells = []
    for name, row in rows.items():
        median, low, high = (f"{ratio:.3f}" for ratio in row.step_ratio)
        compilation, memory = f"{row.compile_ratio:.2f}", f"{row.memory_ratio:.2f}"
        feedback = results.mebibytes(row.feedback_bytes) if row.feedback_bytes else "-"
        if name == "plain":
            name, median = "plain jax.value_and_grad", f"{1e3 * row.step_seconds:.2f} ms"
            compilation, memory = f"{row.compile_seconds:.2f} s", results.mebibytes(row.memory_bytes)
        over = "-" if row.over_rule is None else f"{row.over_rule:.3f}"
        cells.append((name, median, f"{low} to {high}", over, compilation, memory, feedback))
    header = ("rule", "step time", "quartiles", "over its rule", "compile time", "memory", "feedback weights")
    return results.table(header, cells)


def main() -> None:
    chosen = rules.select(FLAGS.rules or ",".join([*rules.argument_free_rules(), *FURTHER]))
    cases = QUICK if FLAGS.quick else FULL
    names: Sequence[str] = FLAGS.models or [name for name in cases if name not in ASKED_FOR]
    if FLAGS.batch:
        cases = {name: case._replace(batch=FLAGS.batch) for name, case in cases.items()}
    for name in names:
        if name not in cases:
            raise InputError(f"There is no model '{name}' in the benchmark: {nearest(name, cases)}")
    repeats = FLAGS.repeats or (5 if FLAGS.quick else 20)
    compile_repeats = FLAGS.compile_repeats or (1 if FLAGS.quick else 3)
    folder = cli.output_folder()
    measured: dict[str, dict[str, Row]] = {}
    refusals: dict[str, dict[str, str]] = {}
    each = (len(chosen) + 1) * (repeats + compile_repeats)
    with tqdm(total=each * len(names), unit="run") as bar:
        for name in names:
            bar.set_description(name)
            measured[name], refusals[name] = benchmark(
                cases[name].maker(name, FLAGS.dtype),
                cases[name],
                chosen,
                repeats=repeats,
                compile_repeats=compile_repeats,
                limit=60 * FLAGS.minutes,
                seed=FLAGS.seed,
                clock=time.process_time if FLAGS.processor_time else time.perf_counter,
                progress=bar.update,
            )
            write(folder, cases, measured, refusals)  # now, as the next model may take long
    device = f"{results.describe_device()}, {FLAGS.dtype}, jax {jax.__version__}"
    device += ", processor time" if FLAGS.processor_time else ""
    for name, rows in measured.items():
        print(f"\n{cases[name].describe(name)} ({device}); ratios to plain jax.value_and_grad\n\n{table(rows)}")
        for rule, reason in refusals[name].items():
            print(f"\n{rule} refused this model: {reason}")
        if "backprop" in rows:
            identical = "identical to" if rows["backprop"].identical_gradients else "DIFFERENT from"
            print(f"\nThe gradients of backprop() are {identical} those of jax.value_and_grad.")
    ratios = {n: {r: row.step_ratio for r, row in rows.items() if r != "plain"} for n, rows in measured.items()}
    files.savefig(plots.bars(ratios, device, "step time / plain jax.value_and_grad"), folder / "benchmark.png")
    print(f"\nResults: {folder}/metrics.json, table.csv, benchmark.png")


def write(
    folder: pathlib.Path,
    cases: Mapping[str, Case],
    measured: Mapping[str, Mapping[str, Row]],
    refusals: Mapping[str, Mapping[str, str]],
) -> None:
    """Write metrics.json and table.csv."""
    content = {}
    flat = []
    for name, rows in measured.items():
        by_rule = {rule: row._asdict() for rule, row in rows.items()}
        content[name] = {"case": cases[name]._asdict(), "rules": by_rule, "refused": refusals[name]}
        flat += [(name, rule, row.step_seconds, *row.step_ratio, *row[2:]) for rule, row in rows.items()]
    files.write_json(folder / "metrics.json", cli.provenance_and_settings(FLAGS.seed) | {"models": content})
    ratios = ("step_ratio", "step_ratio_lower_quartile", "step_ratio_upper_quartile")
    files.write_csv(folder / "table.csv", ("model", "rule", "step_seconds", *ratios, *Row._fields[2:]), flat)


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "Smaller models and batches.")
    flags.DEFINE_list("models", None, f"Some of {', '.join(FULL)} (default: all but the last).")
    flags.DEFINE_string("rules", None, "Rules separated by commas (default: every rule, and some variants).")
    flags.DEFINE_integer("batch", None, "The batch (default: that of each model).", lower_bound=1)
    flags.DEFINE_integer("repeats", None, "Rounds of timing (default: 20, 5 with --quick).", lower_bound=1)
    flags.DEFINE_integer("compile_repeats", None, "Rounds of compiling (default: 3, 1 with --quick).", lower_bound=1)
    flags.DEFINE_bool("processor_time", False, "Time steps by processor time of all cores, for a machine that is busy.")
    flags.DEFINE_float(
        "minutes", 10, "Do not begin a round of a model after this time (but do one of compiling, three of timing)."
    )
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "The dtype in which models compute; parameters are float32."
    )
    flags.DEFINE_integer("seed", 0, "The seed of weights and inputs.", lower_bound=0)
    flags.DEFINE_string("output", "results/benchmark", "Folder for the results.")
    cli.run(main)
