"""The results of a session as Markdown tables."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments import cli

Entries = Mapping[str, Mapping[str, Any]]


def tables(folder: pathlib.Path) -> str:
    """All tables that the files of the folder allow, then what failed or was left out."""
    shown = []
    problems = []
    for part, (title, show) in PARTS.items():
        path = folder / f"{part}.json"
        if not path.exists():
            continue
        entries = json.loads(path.read_text())
        good = {key: entry for key, entry in entries.items() if not {"failed", "skipped"} & set(entry)}
        for key in entries.keys() - good.keys():
            text = entries[key].get("skipped") or entries[key]["failed"].strip().splitlines()[-1]
            problems.append(f"- {part}, {key}: {text}")
        if good:
            shown.append(f"## {title}\n\n{show(good)}")
    if problems:
        shown.append("## Left out, and failures\n\n" + "\n".join(sorted(problems)))
    return "\n\n".join(shown)


def session(entries: Entries) -> str:
    start = next((entry for key, entry in entries.items() if key.startswith("start")), None)
    lines = []
    if start:
        versions = start["provenance"]["versions"]
        lines.append(f"{start['provenance']['device']}, jax {versions['jax']}, Python {versions['python']}")
    lines += [
        f"- {key}: {entry['from']:.0f} s to {entry['to']:.0f} s" + (", failed" if entry["error"] else "")
        for key, entry in entries.items()
        if "from" in entry
    ]
    return "\n".join(lines)


def correctness(entries: Entries) -> str:
    rows = []
    for key, entry in entries.items():
        errors = {n: e for n, e in entry["relative_errors"].items() if isinstance(e, float)}
        worst = max(errors, key=errors.__getitem__, default="-")
        shown = f"{errors[worst]:.1e} ({worst})" if errors else "-"
        rows.append((key, str(len(errors)), shown, ", ".join(entry["wrong"]) or "none"))
    return cli.table(("comparison", "rules", "largest relative error", "beyond the tolerance"), rows)


def steps(entries: Entries) -> str:
    shown = []
    for key, entry in entries.items():
        if key == "precision":
            errors = entry["relative_error_of_a_float32_product"]
            text = " and ".join(f"{value:.1e} ({name})" for name, value in errors.items())
            shown.append(f"The relative error of a float32 product of 1024 x 1024 matrices: {text}.")
        elif key.startswith("compile time"):
            shown.append(f"{key}\n\n{compile_times(entry['rows'])}")
        elif "rows" in entry:
            shown.append(f"{key}\n\n{step_times(entry['rows'])}")
            shown += [f"{rule}: {reason}" for rule, reason in entry["refused"].items()]
            if "plain_step_seconds" in entry["alone"]:
                shown.append(f"Without the loop, a plain step takes {_ms(entry['alone']['plain_step_seconds'])}.")
            if entry.get("backprop_is_identical") is False:
                shown.append("The gradients of backprop are DIFFERENT from those of jax.value_and_grad.")
    return "\n\n".join(shown)


def step_times(rows: Mapping[str, Any]) -> str:
    cells = []
    for name, row in rows.items():
        median, low, high = (f"{value:.3f}" for value in row["step_ratio"])
        memory = f"{row['memory_ratio']:.2f}"
        if name == "plain":
            name, median, memory = "plain jax.value_and_grad", _ms(row["step_seconds"]), _mebibytes(row["memory_bytes"])
        over = "-" if row["over_rule"] is None else f"{row['over_rule']:.3f}"
        feedback = _mebibytes(row["feedback_bytes"]) if row["feedback_bytes"] else "-"
        cells.append((name, median, f"{low} to {high}", over, memory, feedback))
    return cli.table(("rule", "step time", "quartiles", "over its rule", "memory", "feedback weights"), cells)


def compile_times(rows: Mapping[str, Any]) -> str:
    cells = []
    for name, row in rows.items():
        plain = name == "plain"
        seconds = f"{row['compile_seconds']:.2f} s" if plain else f"{row['compile_ratio']:.2f}"
        memory = _mebibytes(row["memory_bytes"]) if plain else f"{row['memory_ratio']:.2f}"
        cells.append(("plain jax.value_and_grad" if plain else name, seconds, memory))
    return cli.table(("rule", "compile time", "memory"), cells)


def seeds(entries: Entries) -> str:
    rows = []
    for key, entry in entries.items():
        median, low, high = (f"{value:.3f}" for value in entry["ten_at_once_over_ten_alone"])
        one, ten = f"{entry['epoch_seconds_of_one']:.2f} s", f"{entry['epoch_seconds_of_ten']:.2f} s"
        rows.append((key, one, ten, median, f"{low} to {high}"))
    return cli.table(("net, rule", "epoch of one", "epoch of ten at once", "over ten alone", "quartiles"), rows)


def convolutional(entries: Entries) -> str:
    rows = []
    for key, entry in entries.items():
        best, last = entry["best"], np.array(entry["accuracy"][-1], float)
        grid = np.array(entry["grid"])
        by_scale = [f"{100 * last[grid[:, 1] == scale].max():.1f}" for scale in dict.fromkeys(grid[:, 1])]
        where = f"rate {best['rate']:g}, feedback x {best['feedback_scale']:g}"
        rows.append((key, f"{100 * best['accuracy']:.1f}", where, " / ".join(by_scale), str(entry["epochs"])))
    header = ("setting", "best validation accuracy (%)", "where", "best by feedback (x 0.1 / 0.3 / 1)", "epochs")
    return cli.table(header, rows)


def cells(entries: Entries) -> str:
    rows = []
    for key, entry in entries.items():
        accuracy, settings = 100 * np.array(entry["accuracy"], float), entry["settings"]
        measured = f"{accuracy.mean():.2f}" + (f" ± {accuracy.std():.2f}" if len(accuracy) > 1 else "")
        epochs = f"{entry['epochs']} of {settings['epochs']}" + (", reduced" if entry["reduced"] else "")
        if "residual" in entry:
            measured += f" (residual {np.mean(np.array(entry['residual'], float)):.1e})"
        rates = f"{settings['batch']}, {entry['rate']:g}"
        row = key, measured, entry["paper"], epochs, str(entry["images"]["training"]), rates
        rows.append((*row, f"{entry['wall_seconds']:.0f} s"))
    return cli.table(("cell", "test accuracy (%)", "paper", "epochs", "images", "batch, rate", "time"), rows)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


PARTS: dict[str, tuple[str, Callable[[Entries], str]]] = {
    "session": ("Session", session),
    "correctness": ("Gradients on the device against the CPU", correctness),
    "steps": ("Step times", steps),
    "seeds": ("Ten seeds at once", seeds),
    "more_steps": ("More step times", steps),
    "convolutional": ("Convolutional nets under feedback alignment", convolutional),
    "cells": ("Cells of the papers' tables", cells),
}
