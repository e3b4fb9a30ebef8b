"""Compare an epoch of the programs' training loop with loops that one would write by hand.

    python -m experiments.epochs                       # some ten minutes on two cores
    python -m experiments.epochs --quick               # a tenth of the examples: two minutes
    python -m experiments.epochs --models="mlp 784-100x4-10" --rules=backprop --repeats=9

The data are random, of the size of MNIST or CIFAR-10, with batches of 100 or 128 and Adam. Every round times each loop
once, one after the other; a ratio is the median over the rounds. The loops are:

- *scan*: `lax.scan` over the steps of an epoch in plain JAX, with the same optimizer and the same order of examples (on
  a CPU, for models with convolutions, a jitted step in a Python loop: XLA's convolutions are slow in a loop there);
- *torch*: the ordinary loop in PyTorch, if that is installed;
- *ten seeds*: ten seeds at once, over ten times one seed;
- *disk*: the data on the disk, over the data on the device.

It writes metrics.json and table.csv.
"""

import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from tqdm import tqdm

import lrules
from experiments import benchmark, cli, data, files, models, results, rules, tasks
from experiments.errors import InputError, nearest
from experiments.loop import Run
from experiments.methods import by_rule

FLAGS = flags.FLAGS
RATE = 1e-3
Epoch = Callable[[], Any]  # trains for an epoch


class Case(NamedTuple):
    """A model of `models.py`, the shape of its inputs, the number of training examples and the batch size."""

    model: str
    shape: tuple[int, ...]
    examples: int
    batch: int
    widths: tuple[int, ...] = ()


CASES = {
    "mlp 784-100x4-10": Case("mlp", (28, 28, 1), 60_000, 100, (100,) * 4),
    "mlp 784-512-512-10": Case("mlp", (28, 28, 1), 60_000, 100, (512, 512)),
    "lenet5": Case("lenet5", (32, 32, 3), 12_800, 128),
}


def make_data(case: Case) -> data.Dataset:
    """Random images and labels."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (case.examples, *case.shape), np.uint8)
    y = rng.integers(0, 10, case.examples).astype(np.int32)
    return data.Dataset(x, y, x[:250], y[:250], 10, "random")


def make_task(case: Case) -> tasks.Task:
    """The task of a case."""
    options: dict[str, Any] = {"widths": case.widths, "activation": "relu"}
    return tasks.task(lambda rngs: models.build(case.model, case.shape, 10, rngs=rngs, **options))


def is_backprop(rule: lrules.Rule) -> bool:
    """Whether a rule is backprop, without modifiers."""
    return repr(getattr(rule.description, "layer", None)) == "Backprop()"


def ours(case: Case, dataset: data.Dataset, rule: lrules.Rule, *, seeds: int = 1, **options: Any) -> Epoch:
    """An epoch of `loop.Run`, without the evaluation."""
    method = by_rule(make_task(case), rule, optax.adam(RATE), angle=False)
    run = Run(method, dataset, seeds=range(seeds), batch_size=case.batch, probe=0, **options)
    return run.steps_of_an_epoch


def scan(case: Case, dataset: data.Dataset, rule: lrules.Rule) -> Epoch:
    """The loop in plain JAX: for backprop with `jax.value_and_grad`, for other rules with the library's."""
    task, optimizer = make_task(case), optax.adam(RATE)
    params, state = jax.jit(task.init)(jax.random.key(0))
    x, y = jnp.asarray(dataset.x_train), jnp.asarray(dataset.y_train)
    steps = case.examples // case.batch
    feedback = rule.init(jax.random.key(1), task.net, params, (state, data.scale(x[: case.batch])))
    gradients = benchmark.plain_step(task) if is_backprop(rule) else benchmark.rule_step(task, rule)

    def step(carry: Any, rows: Any) -> Any:
        params, state, optimizer_state = carry
        value, state, grads = gradients(params, feedback, state, data.scale(x[rows]), y[rows])
        updates, optimizer_state = optimizer.update(grads.params, optimizer_state, params)
        return (optax.apply_updates(params, updates), state, optimizer_state), value

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(carry: Any, key: Any) -> Any:
        order = jax.random.permutation(key, case.examples)[: steps * case.batch].reshape(steps, case.batch)
        return jax.lax.scan(step, carry, order)

    carry = params, state, optimizer.init(params)
    by_step = jax.default_backend() == "cpu" and case.model != "mlp"
    one_step = jax.jit(step, donate_argnums=0)
    keys = iter(jax.random.split(jax.random.key(2), 10_000))

    def run() -> None:
        nonlocal carry
        if by_step:
            order = np.random.default_rng(0).permutation(case.examples)[: steps * case.batch].reshape(steps, -1)
            for rows in order:
                carry, value = one_step(carry, rows)
        else:
            carry, value = epoch(carry, next(keys))
        jax.block_until_ready((carry, value))

    return run


def torch_loop(case: Case, dataset: data.Dataset) -> Epoch | None:
    """The ordinary loop in PyTorch, for multilayer perceptrons; None if it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    if case.model != "mlp":
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = [int(np.prod(case.shape)), *case.widths, 10]
    layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (torch.nn.Linear(a, b), torch.nn.ReLU())][:-1]
    model = torch.nn.Sequential(torch.nn.Flatten(), *layers).to(device)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    loss = torch.nn.CrossEntropyLoss()
    x = torch.tensor(dataset.x_train, device=device)
    y = torch.tensor(dataset.y_train, dtype=torch.long, device=device)

    def run() -> None:
        order = torch.randperm(len(x), device=device)
        for i in range(0, len(x) - case.batch + 1, case.batch):
            rows = order[i : i + case.batch]
            optimizer.zero_grad()
            value = loss(model(x[rows].float() / 255), y[rows])
            value.backward()
            optimizer.step()
        value.item()

    return run


def loops(case: Case, rule: lrules.Rule, folder: pathlib.Path) -> dict[str, Epoch]:
    """Every loop of one rule on one model, and what it is compared with: `A / B` is the ratio of the two."""
    dataset = make_data(case)
    found = {"ours": ours(case, dataset, rule), "scan": scan(case, dataset, rule)}
    if is_backprop(rule):
        in_torch = torch_loop(case, dataset)
        found |= {"torch": in_torch} if in_torch else {}
        found["ten seeds"] = ours(case, dataset, rule, seeds=10)
        for name in data.NAMES:
            np.save(folder / f"{name}.npy", getattr(dataset, name))
        found["disk"] = ours(case, data.load(f"npy:{folder}"), rule, resident=0)
    return found


def measure(epochs: Mapping[str, Epoch], repeats: int, advance: Callable[[int], Any]) -> dict[str, np.ndarray]:
    """Seconds of each loop, round by round, after one epoch that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    for round_ in range(repeats + 1):
        for name, epoch in epochs.items():
            begin = time.perf_counter()
            epoch()
            if round_:
                seconds[name].append(time.perf_counter() - begin)
            advance(1)
    return {name: np.array(values) for name, values in seconds.items()}


RATIOS = {  # name: (numerator, denominator, factor)
    "ours / scan": ("ours", "scan", 1.0),
    "ours / torch": ("ours", "torch", 1.0),
    "ten seeds / 10 x one": ("ten seeds", "ours", 0.1),
    "disk / device": ("disk", "ours", 1.0),
}


def ratios(seconds: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The median ratios that can be formed."""
    return {
        name: float(np.median(factor * seconds[a] / seconds[b]))
        for name, (a, b, factor) in RATIOS.items()
        if a in seconds and b in seconds
    }


def main() -> None:
    chosen = rules.select(FLAGS.rules)
    names = FLAGS.models or list(CASES)
    for name in names:
        if name not in CASES:
            raise InputError(f"There is no model '{name}' here: {nearest(name, CASES)}")
    folder = cli.output_folder()
    rows, content = [], {}
    with tqdm(total=None, unit="epoch") as bar, tempfile.TemporaryDirectory() as scratch:
        for name in names:
            case = CASES[name]
            case = case._replace(examples=case.examples // 10) if FLAGS.quick else case
            for text, rule in chosen.items():
                bar.set_description(f"{name}, {text}")
                seconds = measure(loops(case, rule, pathlib.Path(scratch)), FLAGS.repeats, bar.update)
                found = ratios(seconds)
                content[f"{name}, {text}"] = {"seconds": seconds, "ratios": found}
                shown = (f"{found[ratio]:.3f}" if ratio in found else "-" for ratio in RATIOS)
                rows.append((name, text, f"{np.median(seconds['ours']):.3f} s", *shown))
    print(f"\n{results.describe_device()}, jax {jax.__version__}\n")
    print(results.table(("model", "rule", "an epoch", *RATIOS), rows))
    files.write_json(folder / "metrics.json", cli.provenance_and_settings(0) | {"epochs": content})
    files.write_csv(folder / "table.csv", ("model", "rule", "seconds", *RATIOS), rows)
    print(f"\nResults: {folder}/metrics.json, table.csv")


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "A tenth of the examples.")
    flags.DEFINE_list("models", None, f"Some of {', '.join(CASES)} (default: all).")
    flags.DEFINE_string("rules", "backprop,feedback_alignment,direct_feedback_alignment", "Rules separated by commas.")
    flags.DEFINE_integer("repeats", 5, "Rounds of timing.", lower_bound=1)
    flags.DEFINE_string("output", "results/epochs", "Folder for the results.")
    cli.run(main)
