"""Compare the cost of tracing under every learning rule with plain `jax.value_and_grad`, from 8 to 512 layers.

    python -m experiments.tracing --quick          # 8 and 32 layers: half a minute on one core
    python -m experiments.tracing                  # up to 512 layers: some ten minutes on one core
    python -m experiments.tracing --models="mlp 128" --rules="feedback_alignment,backman" --repeats=9

Tracing is what JAX does in Python before it compiles: `jax.jit(step).trace(...)`, with JAX's caches cleared before each
run. The step is the loss and its gradient. The program takes processor time, and the best of several rounds. Each round
traces the plain step and every rule, one after the other. With --compile it also compiles, and compares that time.
It writes metrics.json and table.csv.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from tqdm import tqdm

import lrules
from experiments import cli, files, results, rules
from experiments.errors import InputError, nearest

FLAGS = flags.FLAGS
WIDTH = 16
DEPTHS = (8, 32, 128, 512)
DEFAULT = "backprop,feedback_alignment,backman,direct_feedback_alignment,dual_propagation"


class Model(NamedTuple):
    """A function `apply(params, inputs)`, its parameters from a key, and the shape of its inputs."""

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]
    shape: tuple[int, ...]


class Row(NamedTuple):
    """Seconds of processor time, the best of several rounds; `compile_seconds` is None if nothing was compiled."""

    trace_seconds: float
    compile_seconds: float | None = None


def chain(depth: int, *, residual: bool) -> Model:
    """A multilayer perceptron of equal layers, or a residual network of dense layers."""

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, depth)
        return [{"w": jax.random.normal(k, (WIDTH, WIDTH)) / WIDTH**0.5, "b": jnp.zeros(WIDTH)} for k in keys]

    def apply(params: Any, x: jax.Array) -> jax.Array:
        *hidden, last = params
        for layer in hidden:
            z = x @ layer["w"] + layer["b"]
            x = x + jax.nn.relu(z) if residual else jnp.tanh(z)
        return x @ last["w"] + last["b"]

    return Model(init, apply, (4, WIDTH))


def transformer(*, scanned: bool, blocks: int = 12, width: int = 16, heads: int = 2, length: int = 6) -> Model:
    """A transformer of equal blocks, one after the other or in a `lax.scan`."""
    size = width // heads
    shapes = {
        "query": (width, heads, size), "key": (width, heads, size), "value": (width, heads, size),
        "out": (heads, size, width), "up": (width, 4 * width), "down": (4 * width, width),
    }  # fmt: skip

    def init(key: jax.Array) -> Any:
        def weights(key: jax.Array) -> dict[str, jax.Array]:
            keys = jax.random.split(key, len(shapes))
            return {n: jax.random.normal(k, s) / s[0] ** 0.5 for k, (n, s) in zip(keys, shapes.items(), strict=True)}

        first, *rest = jax.random.split(key, blocks + 1)
        made: Any = [weights(k) for k in rest]
        return {
            "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *made) if scanned else made,
            "head": jax.random.normal(first, (width, 10)) / width**0.5,
        }

    def block(x: jax.Array, p: Mapping[str, jax.Array]) -> jax.Array:
        y = jax.nn.standardize(x)
        q, k, v = (jnp.einsum("btd,dhk->bthk", y, p[name]) for name in ("query", "key", "value"))
        attention = jax.nn.softmax(jnp.einsum("bqhk,bthk->bhqt", q, k) / size**0.5)
        x = x + jnp.einsum("bqhk,hkd->bqd", jnp.einsum("bhqt,bthk->bqhk", attention, v), p["out"])
        return x + jax.nn.gelu(jax.nn.standardize(x) @ p["up"]) @ p["down"]

    def apply(params: Any, x: jax.Array) -> jax.Array:
        if scanned:
            x, _ = jax.lax.scan(lambda x, p: (block(x, p), None), x, params["blocks"])
        else:
            for p in params["blocks"]:
                x = block(x, p)
        return x.mean(1) @ params["head"]

    return Model(init, apply, (4, length, width))


MODELS: dict[str, Callable[[], Model]] = {
    **{f"mlp {n}": lambda n=n: chain(n, residual=False) for n in DEPTHS},  # type: ignore[misc]
    **{f"residual {n}": lambda n=n: chain(n, residual=True) for n in DEPTHS},  # type: ignore[misc]
    "transformer": lambda: transformer(scanned=False),
    "transformer in a scan": lambda: transformer(scanned=True),
}
QUICK = ("mlp 8", "mlp 32", "residual 8", "residual 32", "transformer in a scan")


def measure(
    model: Model, chosen: Mapping[str, lrules.Rule], *, repeats: int, compiled: bool, progress: Callable[[int], Any]
) -> dict[str, Row]:
    """A row for the plain step, "plain", and one for each rule."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    inputs, targets = jnp.zeros(model.shape), jnp.zeros(model.shape[0], int)

    def loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
        picked = jax.nn.log_softmax(outputs) * jax.nn.one_hot(targets, outputs.shape[-1])
        return -picked.sum(-1)

    def plain(params: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        return jax.value_and_grad(lambda p: loss(model.apply(p, inputs), targets).mean())(params)

    def step(rule: lrules.Rule) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # Made anew for every run: a network keeps what it has traced.
        network = lrules.Network(lambda p, x: model.apply(p, x))
        feedback = jax.eval_shape(lambda p: rule.init(jax.random.key(0), network, p, inputs), params)
        rng = (jax.random.key(0),) if rule.stochastic else ()
        fresh = lrules.Network(lambda p, x: model.apply(p, x))
        made = lrules.value_and_grad(fresh, loss, rule)
        run = (lambda p, f, x, y, key: made(p, f, x, y, rng=key)) if rng else made
        return run, (params, feedback, inputs, targets, *rng)

    rows: dict[str, Row] = {}
    for _ in range(repeats):
        for name in ("plain", *chosen):
            run, args = (plain, (params, inputs, targets)) if name == "plain" else step(chosen[name])
            jax.clear_caches()
            gc.collect()
            start = time.process_time()
            traced = jax.jit(run).trace(*args)
            middle = time.process_time()
            if compiled:
                traced.lower().compile()
            seconds = (middle - start, time.process_time() - middle)
            if name in rows:
                seconds = (min(rows[name][0], seconds[0]), min(rows[name][1] or 0.0, seconds[1]))
            rows[name] = Row(seconds[0], seconds[1] if compiled else None)
            progress(1)
    return rows


def table(measured: Mapping[str, Mapping[str, Row]], field: str) -> str:
    """One model a line, the plain step in milliseconds and the ratio of every rule to it."""
    names = [name for name in next(iter(measured.values())) if name != "plain"]
    cells = []
    for model, rows in measured.items():
        plain = getattr(rows["plain"], field)
        cells.append((model, f"{1e3 * plain:.0f} ms", *(f"{getattr(rows[name], field) / plain:.2f}" for name in names)))
    return results.table(("model", "plain", *names), cells)


def main() -> None:
    chosen = rules.select(FLAGS.rules)
    names: Sequence[str] = FLAGS.models or (QUICK if FLAGS.quick else list(MODELS))
    for name in names:
        if name not in MODELS:
            raise InputError(f"There is no model '{name}' to trace: {nearest(name, MODELS)}")
    repeats = FLAGS.repeats or (3 if FLAGS.quick else 5)
    folder = cli.output_folder()
    measured: dict[str, dict[str, Row]] = {}
    with tqdm(total=len(names) * repeats * (len(chosen) + 1), unit="trace") as bar:
        for name in names:
            bar.set_description(name)
            measured[name] = measure(
                MODELS[name](), chosen, repeats=repeats, compiled=FLAGS.compile, progress=bar.update
            )
    print(f"\nTime to trace, over plain jax.value_and_grad ({results.describe_device()}, jax {jax.__version__})\n")
    print(table(measured, "trace_seconds"))
    if FLAGS.compile:
        print(f"\nTime to compile, over plain\n\n{table(measured, 'compile_seconds')}")
    content = {model: {name: row._asdict() for name, row in rows.items()} for model, rows in measured.items()}
    files.write_json(folder / "metrics.json", cli.provenance_and_settings(0) | {"models": content})
    flat = [(model, name, *row) for model, rows in measured.items() for name, row in rows.items()]
    files.write_csv(folder / "table.csv", ("model", "rule", *Row._fields), flat)
    print(f"\nResults: {folder}/metrics.json, table.csv")


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "Networks of at most 32 layers.")
    flags.DEFINE_bool("compile", False, "Also compile, and compare the time that it takes.")
    flags.DEFINE_list("models", None, f"Some of {', '.join(MODELS)} (default: all).")
    flags.DEFINE_string("rules", DEFAULT, "Rules separated by commas.")
    flags.DEFINE_integer("repeats", None, "Rounds; the best counts (default: 5, 3 with --quick).", lower_bound=1)
    flags.DEFINE_string("output", "results/tracing", "Folder for the results.")
    cli.run(main)
