"""Tables and a figure of what `pipeline.py` measured."""

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure

from experiments import results
from experiments.parallel import counts
from experiments.plots import COLOURS, logarithmic

Content = Mapping[str, Any]
NAMES = tuple(counts.SIMULATED)
LINES = dict(zip(NAMES, ("-", ":", "-", "--"), strict=True))


def differences(content: Content) -> str:
    """The largest difference between the pipeline and one device."""
    found = content["differences"]
    rows = [(dtype, *(f"{found[dtype][name]:.1e}" for name in counts.NAMES)) for dtype in found]
    return results.table(("dtype", *counts.NAMES), rows)


def operations(content: Content) -> str:
    """Operations of the critical path, what a device sends, and what it holds besides arguments and results."""
    rows = []
    for row in content["operations"]:
        size, sent = row["size"], row["sent"]
        up, all_ = (sent.get(kind, (0, 0)) for kind in ("collective-permute", "all-reduce"))
        rows.append(
            (
                f"{size['stages']}", f"{size['microbatches']}", f"{size['layers']} x {size['width']}", row["rule"],
                f"{row['paper']:,}", f"{row['counted']:,}", f"{up[0]}", f"{up[1]:,}", f"{all_[0]}", f"{all_[1]:,}",
                f"{row['temporary'] / 1024:,.0f} KiB",
            )
        )  # fmt: skip
    head = ("P", "M", "stage", "rule", "on paper", "counted", "sends", "bytes", "all-reduces", "bytes ", "memory")
    return results.table(head, rows)


def stage(content: Content) -> str:
    """The measured times of a stage."""
    seconds = content["stage"]["seconds"]
    rows = [
        (name, f"{1e3 * v[0]:.3f} ms", f"{1e3 * v[1]:.3f} to {1e3 * v[2]:.3f}", f"{v[0] / seconds['forward'][0]:.2f}")
        for name, v in seconds.items()
    ]
    return results.table(("task", "median", "quartiles", "over forward"), rows)


def simulated(content: Content) -> str:
    """The time of a step in forward passes of a stage, and how long a stage waits."""
    unit = content["stage"]["seconds"]["forward"][0]
    found = {(r["stages"], r["microbatches"], r["schedule"]): r for r in content["simulated"]}
    rows = []
    for p, m in dict.fromkeys(key[:2] for key in found):
        row = [found[p, m, name] for name in NAMES]
        shown = [f"{r['seconds'] / unit:.1f}, {100 * r['idle']:.0f}%, {r['in_flight']}" for r in row]
        rows.append((f"{p}", f"{m}", *shown, f"{row[1]['seconds'] / row[2]['seconds']:.2f}"))
    return results.table(("P", "M", *NAMES, "1F1B over direct"), rows)


TABLES: dict[str, Callable[[Content], str]] = {
    "differences": differences,
    "operations": operations,
    "stage": stage,
    "simulated": simulated,
}


def figure(content: Content) -> Figure:
    """How long a stage waits, and the time of a step, over the number of microbatches."""
    made = Figure(figsize=(9.6, 4.2), dpi=130, layout="constrained")
    waits, steps = made.subplots(1, 2)
    unit, shown = content["stage"]["seconds"]["forward"][0], 8
    for name, colour in zip(NAMES, COLOURS, strict=False):
        rows = [r for r in content["simulated"] if r["stages"] == shown and r["schedule"] == name]
        style: dict[str, Any] = {
            "color": colour,
            "linestyle": LINES[name],
            "marker": "os^v"[NAMES.index(name)],
            "label": name,
        }
        style |= {"linewidth": 4, "markersize": 9, "alpha": 0.6} if name == "GPipe" else {}  # 1F1B lies on it
        m = [r["microbatches"] for r in rows]
        waits.plot(m, [100 * r["idle"] for r in rows], **style)
        steps.plot(m, [r["seconds"] / unit / r["microbatches"] for r in rows], **style)
    for axis in (waits, steps):
        logarithmic(axis, "x")
        axis.set_xticks(m, map(str, m))
        axis.set_xlabel("microbatches")
        axis.grid(alpha=0.3)
        axis.set_ylim(0, None)
    waits.set(ylabel="a stage waits (% of the step)")
    steps.set(ylabel="time per microbatch, over a forward pass")
    made.suptitle(f"{shown} stages, simulated with the measured times of a stage", fontsize="medium")
    handles = waits.get_legend_handles_labels()
    made.legend(*handles, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    return made
