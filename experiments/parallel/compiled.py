"""The formulas of `experiments/costs.py` against compiled programs: operations, feedback, and what devices send.

    python -m experiments.parallel.compiled                         # two minutes on two cores
    python -m experiments.parallel.compiled --output=docs/parallel  # the results that docs/costs.md shows

It compiles a step of each rule and runs none: an MLP, ResNet-18 and a transformer of 12 blocks, all of small widths,
and an MLP on eight devices in three layouts. It counts products and collectives in the compiled HLO (`hlo.py`), and
takes XLA's own cost analysis, which counts elementwise operations, too, and the body of a loop once. It writes
costs.json.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lrules
from experiments import cli, costs, files, models
from experiments.parallel import hlo
from experiments.transformer import Transformer

FLAGS = flags.FLAGS
BATCH, DEVICES = 2, 8
DFA = "direct_feedback_alignment"
P = PartitionSpec


def squared(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The loss of each example."""
    return ((outputs - targets) ** 2).reshape(outputs.shape[0], -1).sum(-1)


Options = dict[str, Any]
CASES: list[tuple[str, Options]] = [
    *((rule, {}) for rule in costs.RULES),
    (DFA, {"rank": 4}),
    (DFA, {"shared": True}),
    ("dual_propagation", {"iterations": 3}),
]


def make(rule: str, options: Options) -> lrules.Rule:
    """The rule of the library for a case."""
    given = {"shared_axes" if name == "shared" else name: 1 if name == "shared" else v for name, v in options.items()}
    return getattr(lrules, rule)(**given)


def serves(rule: str, options: Options, net: costs.Net) -> bool:
    """Whether there is a formula: sharing needs positions, and dual propagation no attention."""
    return not (("shared" in options and net.positions == 1) or (rule == "dual_propagation" and net.mixing))


Model = tuple[Callable[[nnx.Rngs], nnx.Module], tuple[int, ...], Any, tuple[int, ...], costs.Net]
# The module, the inputs of an example and their dtype, the outputs of an example, and the formulas.
MODELS: dict[str, Model] = {
    "mlp": (
        lambda rngs: models.MLP((20, 64, 48, 48, 10), rngs=rngs),
        (20,), float, (10,), costs.mlp((20, 64, 48, 48, 10)),
    ),
    "resnet18": (
        lambda rngs: models.ResNet18((16, 16, 3), 10, rngs=rngs, width=4),
        (16, 16, 3), float, (10,), costs.resnet18(16, 3, 10, width=4),
    ),
    "transformer": (
        lambda rngs: Transformer(11, 8, rngs=rngs, blocks=12, width=16, heads=2),
        (8,), int, (8, 11), costs.transformer(11, 8, blocks=12, width=16),
    ),
}  # fmt: skip


def operations(model: Model, rule: str, options: Options) -> dict[str, Any]:
    """Products of a compiled step and numbers of feedback, by formula and counted."""
    module, inputs, dtype, outputs, net = model
    apply, params = lrules.from_nnx(module(nnx.Rngs(0)))
    x, y = jnp.zeros((BATCH, *inputs), dtype), jnp.zeros((BATCH, *outputs))
    own = make(rule, options)
    feedback = jax.eval_shape(lambda p: own.init(jax.random.key(0), apply, p, x), params)
    program = jax.jit(lrules.value_and_grad(apply, squared, own)).lower(params, feedback, x, y).compile()
    cost: Any = program.cost_analysis()
    sizes = {name: value for name, value in options.items() if name != "iterations"}
    return {
        "rule": rule,
        "options": options,
        "formula": BATCH * costs.products(rule, net, **options),
        "counted": hlo.read(program.as_text() or "").products,
        "cost_analysis": cost["flops"],
        "feedback_formula": costs.feedback_numbers(rule, net, **sizes),
        "feedback": sum(leaf.size for leaf in jax.tree.leaves((feedback.fixed, feedback.learned))),
    }


# ------------------------------------------------------------------------------------------------- on many devices

LAYOUTS = ("data", "tensor", "fsdp")


def dense(params: Sequence[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """Dense layers with tanh between them."""
    for i, p in enumerate(params):
        y = x @ p["kernel"]
        y = y + jnp.broadcast_to(p["bias"], y.shape) if "bias" in p else y
        x = jnp.tanh(y) if i < len(params) - 1 else y
    return x


def sent(layout: str, rule: str, widths: Sequence[int], batch: int, devices: int) -> dict[str, Any]:
    """What one device sends in a step, by formula and in the compiled program.

    Under "data" and "tensor", the parameters are placed and XLA does the rest. Under "fsdp", the program says what it
    gathers: left alone, XLA gathers hidden signals where they are smaller than the weights.
    """
    own: lrules.Rule = getattr(lrules, rule)()
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    params = [{"kernel": jnp.zeros((m, n))} | ({} if layout == "fsdp" else {"bias": jnp.zeros(n)}) for m, n in pairs]
    x, y = jnp.zeros((batch, widths[0])), jnp.zeros((batch, widths[-1]))
    feedback = own.init(jax.random.key(0), dense, params, x)
    mesh = Mesh(np.array(jax.devices()[:devices]), ("devices",))
    step = _fully_sharded(own, mesh) if layout == "fsdp" else _placed(layout, rule, mesh, params, feedback)
    found = hlo.read(step.lower(params, feedback, x, y).compile().as_text() or "").sent
    net = costs.mlp(widths)
    formulas = {
        "data": lambda: costs.data_parallel(rule, net),
        "tensor": lambda: costs.tensor_parallel(rule, widths, batch),
        "fsdp": lambda: costs.fsdp(rule, net._replace(others=0), devices),
    }
    return {"layout": layout, "rule": rule, "formula": formulas[layout](), "counted": found}


def _placed(layout: str, rule: str, mesh: Mesh, params: Any, feedback: lrules.Feedback) -> Any:
    """The step with the layouts of its arguments; feedback weights lie as what they stand for."""

    def kernel(i: int) -> PartitionSpec:
        return P() if layout == "data" else P(None, "devices") if i % 2 == 0 else P("devices", None)

    def bias(i: int) -> PartitionSpec:
        return P("devices") if layout == "tensor" and i % 2 == 0 else P()

    def fed(name: str) -> PartitionSpec:
        i = int(name.split("/")[0])  # this layer reads a hidden signal that is split if the layer is split by rows
        if rule in costs.SEQUENTIAL:
            return kernel(i)
        return P(None, "devices") if layout == "tensor" and i % 2 else P()

    def put(spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(mesh, spec)

    shardings = [{"kernel": put(kernel(i)), "bias": put(bias(i))} for i in range(len(params))]
    weights: list[Any] = [{name: put(fed(name)) for name in part} for part in feedback[:2]]
    batch = put(P("devices") if layout == "data" else P())

    def step(params: Any, feedback: lrules.Feedback, x: jax.Array, y: jax.Array) -> Any:
        return lrules.value_and_grad(dense, squared, own)(params, feedback, x, y)[1].params

    own: lrules.Rule = getattr(lrules, rule)()
    given = (shardings, feedback._replace(fixed=weights[0], learned=weights[1]), batch, batch)
    return jax.jit(step, in_shardings=given, out_shardings=shardings)


def _fully_sharded(rule: lrules.Rule, mesh: Mesh) -> Any:
    """The step under shard_map: parameters and feedback are gathered, and gradients are summed into their parts."""

    def gather(leaf: jax.Array) -> jax.Array:
        return jax.lax.all_gather(leaf, "devices", tiled=True)

    def local(params: Any, feedback: lrules.Feedback, x: jax.Array, y: jax.Array) -> Any:
        feedback = jax.tree.map(gather, feedback)

        def objective(params: Any) -> jax.Array:
            outputs = lrules.transform(dense, rule)(jax.tree.map(gather, params), feedback, x)
            return jax.lax.pmean(squared(outputs, y).mean(), "devices")

        return jax.grad(objective)(params)

    split = P("devices")
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(split, split, split, split), out_specs=split))


WIDTHS, ROWS = (256,) * 8 + (16,), 64
SENDING = ("backprop", "feedback_alignment", "backman", "dual_propagation", DFA, "last_layer_only")
SENT = [(a, b) for a in LAYOUTS for b in SENDING if (a, b) != ("fsdp", "backman")]  # which sums norms there, too


def main() -> None:
    folder = cli.output_folder()
    content = cli.provenance_and_settings(0)
    content["operations"] = {
        name: [operations(model, *case) for case in CASES if serves(*case, model[-1])] for name, model in MODELS.items()
    }
    content["sent"] = [sent(layout, rule, WIDTHS, ROWS, DEVICES) for layout, rule in SENT]
    files.write_json(folder / "costs.json", content)
    for name, rows in content["operations"].items():
        for row in rows:
            print(
                name,
                row["rule"],
                row["options"],
                row["counted"] / row["formula"],
                row["cost_analysis"] / row["formula"],
            )
    for row in content["sent"]:
        print(row)
    print(f"\nResults: {folder}/costs.json")


if __name__ == "__main__":
    # JAX reads it when it first looks for devices.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
    flags.DEFINE_string("output", "results/costs", "Folder for the results.")
    cli.run(main)
