"""The tables of docs/costs.md: what was compiled (docs/parallel/costs.json), and extrapolations of the formulas."""

import json
from collections.abc import Callable
from typing import Any

from docs.generate import facts
from docs.generate.markdown import table
from experiments import costs

GIB, MIB = 2**30, 2**20
DFA = "direct_feedback_alignment"
LABELS = {"shared": "shared_axes=1", "rank": "rank={}", "iterations": "iterations={}"}

# Extrapolated: a transformer of 1.14 billion parameters on 256 devices, one sequence for each device.
TOKENS, BLOCKS, WIDTH, VOCABULARY, DEVICES = 2048, 20, 2048, 32000, 256
GROUP = 8  # devices of a tensor or pipeline group; the groups share the batch
MEMORY = 80  # GB of a device
RANK = 64


def _name(rule: str, options: dict[str, Any]) -> str:
    given = ", ".join(LABELS[name].format(value) for name, value in options.items())
    return f"{rule}({given})" if given else rule


def operations() -> str:
    """Formulas and compiled programs."""
    content = json.loads((facts.DOCS / "parallel" / "costs.json").read_text())
    rows = []
    for net, found in content["operations"].items():
        backprop = found[0]["formula"]
        for r in found:
            equal = "equal" if r["formula"] == r["counted"] else f"{r['counted']:,}"
            fed = f"{r['feedback']:,}" if r["feedback"] == r["feedback_formula"] else "differs"
            shown = (f"{r['formula']:,}", f"{r['formula'] / backprop:.3f}", equal)
            rows.append((net, _name(r["rule"], r["options"]), *shown, f"{r['cost_analysis'] / r['counted']:.2f}", fed))
    head = ("network", "rule", "by formula", "over backprop", "counted", "XLA's analysis over it", "feedback")
    return table(head, rows, 2)


def sent() -> str:
    """What one device sends, compiled."""
    content = json.loads((facts.DOCS / "parallel" / "costs.json").read_text())
    rows = []
    for r in content["sent"]:
        cells = [f"{count}, {size / 1024:,.0f} KiB" for count, size in (r["counted"].get(k, (0, 0)) for k in KINDS)]
        equal = "equal" if r["counted"] == r["formula"] else "differs"
        rows.append((r["layout"], r["rule"], *(cell if cell[0] != "0" else "-" for cell in cells), equal))
    return table(("layout", "rule", "all-reduce", "all-gather", "reduce-scatter", "formula"), rows, 2)


KINDS = ("all-reduce", "all-gather", "reduce-scatter")


def imagenet() -> str:
    """Extrapolated: ResNet-18 on images of 224 x 224."""
    rows = []
    for classes in (10, 100, 1000, 21841):
        net = costs.resnet18(224, 3, classes, large=True)
        backprop = costs.products("backprop", net)
        for rule, rank in (("feedback_alignment", None), (DFA, None), *[(DFA, RANK)] * (classes > RANK)):
            fed = costs.FLOAT * costs.feedback_numbers(rule, net, rank=rank) / GIB
            work = costs.products(rule, net, rank=rank) / backprop
            rows.append((f"{classes:,}", _name(rule, {"rank": rank} if rank else {}), f"{fed:.2f} GiB", f"{work:.2f}"))
    return table(("classes", "rule", "feedback", "operations over backprop"), rows, 2)


def fan_out() -> str:
    """Extrapolated: where direct feedback pays in ResNet-18."""
    found = costs.pays(costs.resnet18(224, 3, 1000, large=True))
    names = {"block 0": "64 features, 56 x 56", "inside 2": "128, 28 x 28", "inside 4": "256, 14 x 14"}
    names |= {"inside 6": "512, 7 x 7", "mean": "the last layer's"}
    rows = [(words, f"{1000 / found[name]:,.0f}", f"{found[name]:.2f}") for name, words in names.items()]
    return table(("hidden signal", "fan-out of a unit", "work of direct feedback over that of backprop"), rows, 1)


def _billion() -> costs.Net:
    return costs.transformer(VOCABULARY, TOKENS, BLOCKS, WIDTH)


# Rules, with the options of the formulas.
CHOSEN: dict[str, tuple[str, dict[str, Any]]] = {
    "backprop": ("backprop", {}),
    "feedback_alignment": ("feedback_alignment", {}),
    DFA: (DFA, {}),
    f"{DFA}(shared_axes=1)": (DFA, {"shared": True}),
    f"{DFA}(shared_axes=1, rank={RANK})": (DFA, {"shared": True, "rank": RANK}),
}


def billion() -> str:
    """Extrapolated: feedback, operations and memory of the large transformer."""
    net = _billion()
    backprop, rows = costs.products("backprop", net), []
    for label, (rule, options) in CHOSEN.items():
        fed = costs.feedback_numbers(rule, net, **options)
        work = costs.products(rule, net, **options) / backprop
        held = costs.training_bytes(net, 0)
        whole, lies = held + costs.FLOAT * fed, costs.FLOAT * fed / (1 if rule == DFA else DEVICES)
        fits = [
            f"{_gb(size)}{'' if size < MEMORY * 1e9 else ' (does not fit)'}" for size in (whole, held / DEVICES + lies)
        ]
        rows.append((label, _gb(costs.FLOAT * fed), f"{work:,.2f}", *fits))
    return table(("rule", "feedback", "operations over backprop", "held under data", "held under FSDP"), rows, 1)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size < 1e15 else f"{size / 1e9:.1e} GB"


def layouts() -> str:
    """Extrapolated: what one device sends in a step."""
    net, rows = _billion(), []
    for label, (rule, options) in CHOSEN.items():
        if label == DFA:
            continue  # it fits nowhere
        rank = options.get("rank")
        data = costs.traffic(costs.data_parallel(rule, net), DEVICES)
        keeps, drops = (
            costs.traffic(costs.fsdp(rule, net, DEVICES, keeps=keep, split=rule != DFA, **options), DEVICES)
            for keep in (True, False)
        )
        shared = costs.traffic(costs.data_parallel(rule, net), DEVICES // GROUP) / GROUP  # of the part of a group
        sizes = (VOCABULARY, TOKENS, BLOCKS, WIDTH)
        tensor = costs.traffic(costs.tensor_parallel_transformer(rule, *sizes, GROUP, rank=rank), GROUP)
        errors = TOKENS * (rank or VOCABULARY)
        stage = costs.traffic(costs.pipeline(rule, TOKENS * WIDTH, errors, GROUP, GROUP), GROUP)
        rows.append((label, *map(_gb, (data, keeps, drops, shared + tensor, shared + stage))))
    head = ("rule", "data", "FSDP, weights kept", "FSDP, gathered again", "tensor 8 x data 32", "pipeline 8 x data 32")
    return table(head, rows, 1)


TABLES: dict[str, Callable[[], str]] = {
    maker.__name__: maker for maker in (operations, sent, imagenet, fan_out, billion, layouts)
}
