"""What the devices of a mesh send to one another in a step, by rule and by where the parameters lie.

    python -m experiments.layouts          # measures, and writes docs/layouts.json
    python -m experiments.layouts --print  # measures, and prints

The network is an MLP with eight layers of 256 units, 10 outputs, and a batch of 64. The numbers are read in the program
that XLA has compiled for eight devices of a CPU; nothing is timed. The layouts are:

- `data`: the batch is split, and the parameters are whole.
- `tensor`: the weights are split, by turns over their columns and over their rows.
- `columns`: the weights are split over their columns.
- `FSDP`: the batch is split, and the weights are split over their rows to save memory. The model states that its hidden
  signals are split over the batch alone (`with_sharding_constraint`), so XLA gathers the weights.

The parameters are placed first, and `rule.init` places the feedback. To compare, direct feedback is also placed in two
other ways: whole on every device, and split over its last axis, whatever its hidden signal does.
"""

import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lrules
from experiments import devices

FILE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "layouts.json"
LAYERS, WIDTH, OUTPUTS, BATCH = 8, 256, 10, 64
LAYOUTS = ("data", "tensor", "columns", "FSDP")
RULES: dict[str, Callable[[], lrules.Rule]] = {
    "backprop": lrules.backprop,
    "feedback_alignment": lrules.feedback_alignment,
    "direct_feedback_alignment": lrules.direct_feedback_alignment,
    "backman": lrules.backman,
    "dual_propagation": lrules.dual_propagation,
}
ELSEWHERE = {"direct feedback, whole": P(), "direct feedback, split over its last axis": P(None, "parts")}


class Cell(TypedDict):
    """What a rule needs: the number of operations of each kind and their bytes; the bytes of feedback on a device."""

    sent: dict[str, list[int]]
    feedback: int


def weight_spec(layout: str, layer: int, layers: int) -> P:
    """Where a weight [in, out] lies."""
    if layout == "FSDP":
        return P("parts", None)
    if layout == "data" or (layout == "columns" and layer == layers - 1):
        return P()
    columns = layout == "columns" or (layer % 2 == 0 and layer < layers - 1)
    return P(None, "parts") if columns else P("parts", None)


def measure(
    layout: str, rule: lrules.Rule, *, elsewhere: P | None = None, layers: int = LAYERS, width: int = WIDTH
) -> Cell:
    """What the devices send in one step, and what they hold.

    Args:
      layout: where the parameters lie, one of `LAYOUTS`.
      rule: the rule.
      elsewhere: where all feedback weights lie; None: where `rule.init` places them.
      layers, width: of the network.
    """
    mesh = Mesh(jax.devices(), ("parts",), axis_types=(AxisType.Auto,))
    of_examples = NamedSharding(mesh, P("parts" if layout in ("data", "FSDP") else None))

    def net(params: Any, x: jax.Array) -> jax.Array:
        for i, (w, b) in enumerate(params):
            x = x @ w + b[None]
            x = jnp.tanh(x) if i < len(params) - 1 else x
            x = jax.lax.with_sharding_constraint(x, of_examples) if layout == "FSDP" else x
        return x

    def place(array: jax.Array, spec: P) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, spec))

    params = []
    for i, key in enumerate(jax.random.split(jax.random.key(0), layers)):
        spec, size = weight_spec(layout, i, layers), OUTPUTS if i == layers - 1 else width
        w = jax.random.normal(key, (width, size)) / width**0.5
        columns = spec[1] if len(spec) > 1 else None
        params.append((place(w, spec), place(jnp.zeros(size), P(columns))))
    x, y = (jax.device_put(jnp.ones((BATCH, size)), of_examples) for size in (width, OUTPUTS))
    feedback = rule.init(jax.random.key(1), net, params, x)
    if elsewhere is not None:
        feedback = jax.tree.map(lambda b: place(b, elsewhere), feedback)
    gradients = lrules.value_and_grad(net, lrules.testing.half_squared_error, rule)

    def step(params: Any, feedback: Any, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
        (value, _), grads = gradients(params, feedback, x, y)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads.params), value

    lies = jax.tree.map(lambda p: p.sharding, params), NamedSharding(mesh, P())
    compiled = jax.jit(step, out_shardings=lies).lower(params, feedback, x, y).compile()
    sent = {kind: list(found) for kind, found in devices.traffic(compiled).items() if found[0]}
    return {"sent": sent, "feedback": sum(b.addressable_shards[0].data.nbytes for b in jax.tree.leaves(feedback))}


def measure_all() -> dict[str, dict[str, Cell]]:
    """The cells by layout and rule."""
    found: dict[str, dict[str, Cell]] = {}
    for layout in LAYOUTS:
        found[layout] = {name: measure(layout, make()) for name, make in RULES.items()}
        for name, spec in ELSEWHERE.items():
            found[layout][name] = measure(layout, lrules.direct_feedback_alignment(), elsewhere=spec)
    return found


def total(cell: Cell) -> tuple[int, int]:
    """The number of operations, and their bytes."""
    return sum(n for n, _ in cell["sent"].values()), sum(size for _, size in cell["sent"].values())


def rows(cells: dict[str, dict[str, Cell]]) -> list[list[str]]:
    """The table: how many times, KiB sent, KiB of feedback on a device; by rule, with the layouts beside each other."""
    names = next(iter(cells.values()))

    def shown(cell: Cell) -> str:
        number, size = total(cell)
        return f"{number} / {size / 1024:.0f} / {cell['feedback'] / 1024:.0f}"

    return [[name, *(shown(found[name]) for found in cells.values())] for name in names]


def main(arguments: Sequence[str]) -> None:
    cells = measure_all()
    for row in rows(cells):
        print(*row, sep="; ")
    if "--print" not in arguments:
        FILE.write_text(json.dumps({"jax": jax.__version__, "cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
