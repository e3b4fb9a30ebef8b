"""The results of a session as Markdown tables."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments import epochs as training
from experiments import results

Entries = Mapping[str, Mapping[str, Any]]


def tables(folder: pathlib.Path) -> str:
    """All tables that the files of the folder allow, then what failed or was left out."""
    shown, problems = [], []
    for part, (title, show) in PARTS.items():
        path = folder / f"{part}.json"
        if not path.exists():
            continue
        entries = json.loads(path.read_text())
        for key, entry in entries.items():
            if {"failed", "skipped"} & set(entry):
                text = entry.get("skipped") or entry["failed"].strip().splitlines()[-1]
                problems.append(f"- {part}, {key}: {text}")
        good = {key: entry for key, entry in entries.items() if set(entry) - {"failed", "skipped", "refused"}}
        if good:
            shown.append(f"## {title}\n\n" + "\n\n".join(show(good)))
    if problems:
        shown.append("## Left out, and failures\n\n" + "\n".join(sorted(problems)))
    return "\n\n".join(shown)


def session(entries: Entries) -> list[str]:
    start = next((entry for key, entry in entries.items() if key.startswith("start")), None)
    lines = []
    if start:
        versions = start["provenance"]["versions"]
        lines.append(f"{start['provenance']['device']}, jax {versions['jax']}, Python {versions['python']}")
    lines += [f"- {key}: {e['from']:.0f} s to {e['to']:.0f} s" for key, e in entries.items() if "to" in e]
    return ["\n".join(lines)]


def correctness(entries: Entries) -> list[str]:
    rows = []
    for key, entry in entries.items():
        errors = {n: e for n, e in entry["relative_errors"].items() if isinstance(e, float)}
        worst = max(errors, key=errors.__getitem__, default="-")
        shown = f"{errors[worst]:.1e} ({worst})" if errors else "-"
        rows.append((key, str(len(errors)), shown, ", ".join(entry["wrong"]) or "none"))
    return [results.table(("comparison", "rules", "largest relative error", "beyond the tolerance"), rows)]


def steps(entries: Entries) -> list[str]:
    shown = []
    for key, entry in entries.items():
        if key == "precision":
            errors = entry["relative_error_of_a_float32_product"]
            text = " and ".join(f"{value:.1e} ({name})" for name, value in errors.items())
            shown.append(f"The relative error of a float32 product of 1024 x 1024 matrices: {text}.")
        else:
            shown += [key, step_times(entry["rows"])]
            shown += [f"{rule}: {reason}" for rule, reason in entry.get("refused", {}).items()]
            if entry.get("backprop_is_identical") is False:
                shown.append("The gradients of backprop are not bit for bit those of `jax.value_and_grad`.")
    return shown


def step_times(rows: Mapping[str, Any]) -> str:
    """The table of one case."""
    cells = []
    for name, row in rows.items():
        median, low, high = (f"{value:.3f}" for value in row["step_ratio"])
        memory = f"{row['memory_ratio']:.2f}"
        if name == "plain":
            name, memory = "plain jax.value_and_grad", results.mebibytes(row["memory_bytes"])
            median = f"{1e3 * row['step_seconds']:.3f} ms"
        over = "-" if row["over_rule"] is None else f"{row['over_rule']:.3f}"
        feedback = results.mebibytes(row["feedback_bytes"]) if row["feedback_bytes"] else "-"
        cells.append((name, median, f"{low} to {high}", over, memory, feedback))
    return results.table(("rule", "step time", "quartiles", "over its rule", "memory", "feedback weights"), cells)


def epochs(entries: Entries) -> list[str]:
    rows = []
    for key, entry in entries.items():
        found = entry["ratios"]
        ratios = (f"{found[ratio]:.3f}" if ratio in found else "-" for ratio in training.RATIOS)
        rows.append((key, f"{np.median(entry['seconds']['ours']):.3f} s", *ratios))
    return [results.table(("model, rule", "an epoch", *training.RATIOS), rows)]


def cells(entries: Entries) -> list[str]:
    rows = [(key, str(entry.get("exit_code", "-"))) for key, entry in entries.items()]
    return [results.table(("program", "exit code"), rows), "75 means: stopped at the time limit."]


PARTS: dict[str, tuple[str, Callable[[Entries], list[str]]]] = {
    "session": ("Session", session),
    "correctness": ("Gradients on the device against the CPU", correctness),
    "steps": ("Step times", steps),
    "epochs": ("An epoch of the training loop", epochs),
    "tables": ("Cells of the papers", cells),
}
