"""Facts about the rules: from the `Rule` objects, their docstrings, docs/speed.md and docs/gpu/steps.json."""

import dataclasses
import functools
import inspect
import json
import pathlib
import re
import textwrap
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import lrules

DOCS = pathlib.Path(__file__).resolve().parent.parent
MLP = "MLP 784-2000x4-10"
GPU = "mlp, float32, batch 1024, all rules"


@dataclasses.dataclass(frozen=True)
class Shown:
    """A rule in the table of rules.

    Attributes:
      name: the function, which has the page.
      call: how the table writes it.
      make: makes the rule.
      timed: its name in the tables of docs/speed.md, if it is there.
    """

    name: str
    call: str
    make: Callable[[], lrules.Rule]
    timed: str = ""

    @property
    def source(self) -> str:
        """The papers of the references of the docstring: authors and year."""
        found = []
        for entry in references(self.name):
            authors, _, rest = entry.partition(":")
            year = re.search(r"\((\d{4})\)", rest)
            found.append(authors + (f" {year[1]}" if year else ""))
        return "; ".join(found)


def _mixed() -> lrules.Rule:
    return lrules.partition({"last": lrules.backprop(), ".*": lrules.feedback_alignment()})


SHOWN = [
    Shown("backprop", "backprop()", lrules.backprop, "backprop"),
    Shown("last_layer_only", "last_layer_only()", lrules.last_layer_only, "last_layer_only"),
    Shown("feedback_alignment", "feedback_alignment()", lrules.feedback_alignment, "feedback_alignment"),
    Shown(
        "feedback_alignment",
        "feedback_alignment(adaptive=True)",
        lambda: lrules.feedback_alignment(adaptive=True),
        "arbp",
    ),
    Shown(
        "direct_feedback_alignment",
        "direct_feedback_alignment()",
        lrules.direct_feedback_alignment,
        "direct_feedback_alignment",
    ),
    Shown(
        "direct_feedback_alignment",
        "direct_feedback_alignment(adaptive=True)",
        lambda: lrules.direct_feedback_alignment(adaptive=True),
        "asrbp",
    ),
    Shown("skipped_backprop", "skipped_backprop()", lrules.skipped_backprop, "skipped_backprop"),
    Shown("sign_symmetry", "sign_symmetry()", lrules.sign_symmetry, "sign_symmetry"),
    Shown("sign_symmetry", 'sign_symmetry("scaled")', lambda: lrules.sign_symmetry("scaled")),
    Shown("sign_symmetry", 'sign_symmetry("random")', lambda: lrules.sign_symmetry("random")),
    Shown("sign_symmetry", 'sign_symmetry("fixed")', lambda: lrules.sign_symmetry("fixed")),
    Shown("kolen_pollack", "kolen_pollack()", lrules.kolen_pollack, "kolen_pollack"),
    Shown("direct_kolen_pollack", "direct_kolen_pollack()", lrules.direct_kolen_pollack, "direct_kolen_pollack"),
    Shown("weight_mirror", "weight_mirror()", lrules.weight_mirror, "weight_mirror"),
    Shown(
        "random_target_projection",
        "random_target_projection()",
        lrules.random_target_projection,
        "random_target_projection",
    ),
    Shown("backman", "backman()", lrules.backman, "backman"),
    Shown("monotone_dfa", "monotone_dfa()", lrules.monotone_dfa, "monotone_dfa"),
    Shown("dual_propagation", "dual_propagation()", lrules.dual_propagation, "dual_propagation"),
    Shown(
        "dual_propagation",
        "dual_propagation(iterations=2)",
        lambda: lrules.dual_propagation(iterations=2),
        "dual_propagation(iterations=2)",
    ),
    Shown(
        "dual_propagation",
        "dual_propagation(iterations=5)",
        lambda: lrules.dual_propagation(iterations=5),
        "dual_propagation(iterations=5)",
    ),
    Shown("predictive_coding", "predictive_coding()", lrules.predictive_coding, "predictive_coding"),
    Shown(
        "predictive_coding",
        "predictive_coding(fixed_predictions=True)",
        lambda: lrules.predictive_coding(fixed_predictions=True),
    ),
    Shown(
        "equilibrium_propagation",
        "equilibrium_propagation()",
        lrules.equilibrium_propagation,
        "equilibrium_propagation",
    ),
    Shown(
        "node_perturbation",
        "node_perturbation(std)",
        lambda: lrules.node_perturbation(0.01),
        "node_perturbation(std=0.01)",
    ),
    Shown(
        "node_perturbation",
        "node_perturbation(std, direct=True)",
        lambda: lrules.node_perturbation(0.01, direct=True),
        "node_perturbation(std=0.01, direct=True)",
    ),
    Shown("forward_gradient", "forward_gradient()", lrules.forward_gradient, "forward_gradient"),
    Shown(
        "forward_gradient",
        'forward_gradient(method="central", std=std)',
        lambda: lrules.forward_gradient(method="central", std=1e-3),
        "forward_gradient(method='central', std=0.001)",
    ),
    Shown(
        "forward_gradient",
        'forward_gradient("activations")',
        lambda: lrules.forward_gradient("activations"),
        "forward_gradient('activations')",
    ),
    Shown("local_losses", "local_losses()", lrules.local_losses, "local_losses"),
    Shown("local_losses", 'local_losses("both")', lambda: lrules.local_losses("both")),
    Shown(
        "difference_target_propagation",
        "difference_target_propagation()",
        lrules.difference_target_propagation,
        "difference_target_propagation",
    ),
    Shown(
        "difference_target_propagation",
        'difference_target_propagation(feedback_loss="jacobian")',
        lambda: lrules.difference_target_propagation(feedback_loss="jacobian"),
    ),
    Shown("partition", "partition({pattern: rule})", _mixed),
]
NAMES = list(dict.fromkeys(shown.name for shown in SHOWN))


# ---------------------------------------------------------------------------------------------------------- docstrings


def section(name: str, title: str) -> str:
    """A section of the docstring of a public function, without its indentation; empty if there is none."""
    docstring = inspect.getdoc(getattr(lrules, name)) or ""
    found = re.search(rf"^{title}:\n((?:  .*\n|\n)*)", docstring + "\n", re.MULTILINE)
    return textwrap.dedent(found[1]).strip() if found else ""


def references(name: str) -> list[str]:
    """The references of a rule, one text each: an entry begins with authors and a colon."""
    entries: list[str] = []
    for line in section(name, "References").splitlines():
        if not entries or re.match(r"[A-Z][^:(]*: [A-Z]", line):
            entries.append(line)
        else:
            entries[-1] += " " + line
    return entries


def equation(name: str) -> str:
    """The second paragraph of the docstring of a rule: its equations."""
    return (inspect.getdoc(getattr(lrules, name)) or "").split("\n\n")[1]


# ------------------------------------------------------------------------------------------- what the rules say


def _net(params: Any, x: Any) -> Any:
    return jnp.tanh(jnp.tanh(x @ params["first"]) @ params["second"]) @ params["last"]


def properties(rule: lrules.Rule) -> dict[str, str]:
    """What a rule needs and keeps, as the rule itself says it on a small network."""
    params = {"first": jnp.ones((2, 3)), "second": jnp.ones((3, 3)), "last": jnp.ones((3, 2))}
    feedback = rule.init(jax.random.key(0), _net, params, jnp.ones((4, 2)))
    needs = "no"
    try:
        lrules.transform(_net, rule)
    except ValueError as error:  # the sentence says what `transform` does not have
        needs = "yes" if "targets" in str(error) else "the loss"
    kinds = [name for name in ("fixed", "learned") if getattr(feedback, name)]
    return {
        "needs targets": needs,
        "needs feedback": "yes" if kinds else "no",
        "learned": "yes" if "learned" in kinds else "no",
        "stochastic": "yes" if rule.stochastic else "no",
        "additive": "yes" if rule.additive else "no",
    }


# --------------------------------------------------------------------------------------------------------------- costs


@functools.cache
def cpu() -> dict[str, dict[str, dict[str, str]]]:
    """The first table of each model in docs/speed.md: by model and rule, the columns of the table."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for part in (DOCS / "speed.md").read_text().split("\n## ")[1:]:
        heading, _, body = part.partition("\n")
        rows = re.search(r"(?:^\|.*\n)+", body, re.MULTILINE)
        if "batch" not in heading or rows is None:
            continue
        head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in rows[0].splitlines())
        found[heading.split(",")[0]] = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    return found


@functools.cache
def gpu() -> dict[str, Any]:
    """All rules on one network on a GPU, by their name in docs/speed.md."""
    rows: dict[str, Any] = json.loads((DOCS / "gpu" / "steps.json").read_text())[GPU]["rows"]
    return {name.replace('"', ""): row for name, row in rows.items()}


def cost(shown: Shown) -> str:
    """The step time over plain JAX on the MLP, on a CPU and, where it was measured, on a GPU."""
    here, there = cpu()[MLP].get(shown.timed), gpu().get(shown.timed)
    found = [float(here["step time"])] if here else []
    return ", ".join(f"{ratio:.2f}" for ratio in (*found, *([there["step_ratio"][0]] if there else [])))


def costs(name: str) -> list[list[str]]:
    """Model, rule, step time, memory and feedback weights of every measurement of a rule."""
    rows = []
    for shown in SHOWN:
        if shown.name != name or not shown.timed:
            continue
        for model, table in cpu().items():
            if own := table.get(shown.timed):
                figures = own["step time"], own["memory"], own["feedback weights"]
                rows.append([f"{model}, CPU", f"`{shown.call}`", *figures])
        if (row := gpu().get(shown.timed)) is not None:
            weights = f"{row['feedback_bytes'] / 2**20:.1f} MiB" if row["feedback_bytes"] else "-"
            ratios = f"{row['step_ratio'][0]:.3f}", f"{row['memory_ratio']:.2f}"
            rows.append([f"{MLP}, GPU", f"`{shown.call}`", *ratios, weights])
    return rows
