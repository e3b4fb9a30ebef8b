"""Parts of the pages that follow from the code.

In a page, such a part stands between two comments. The first one names it:

    <!-- made equation backman -->
    ...
    <!-- end -->
"""

import inspect
import json
import re
from collections.abc import Callable

import lrules
from docs.generate import cost_tables, coverage, facts
from docs.generate.markdown import table
from experiments import layouts as sent
from experiments.parallel import report

BLOCK = re.compile(r"(<!-- made ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def equation(name: str) -> str:
    """The equations of a rule."""
    return f"```text\n{facts.equation(name)}\n```"


def example(name: str) -> str:
    """The example of its docstring, which the tests run."""
    return f"```pycon\n{facts.section(name, 'Example')}\n```"


def references(name: str) -> str:
    """Its references."""
    return "\n".join(f"- {entry}" for entry in facts.references(name)) or "None."


def cost(name: str) -> str:
    """What it costs."""
    rows = facts.costs(name)
    if not rows:
        return "It was not measured." + " It costs what the rules of its layers cost." * (name == "partition")
    head = ("network", "rule", "step time", "memory", "feedback weights")
    return table(head, rows, 2)


def properties(name: str) -> str:
    """What the rule says of itself."""
    own = next(shown for shown in facts.SHOWN if shown.name == name)
    found = facts.properties(own.make())
    return table(list(found), [list(found.values())])


def rules() -> str:
    """The table of all rules."""
    rows = []
    for shown in facts.SHOWN:
        found = facts.properties(shown.make())
        rows.append([f"[`{shown.call}`]({shown.name}.md)", *found.values(), facts.cost(shown), shown.source])
    return table(["rule", *found, "cost", "source"], rows)


def modifiers() -> str:
    """The table of all modifiers: the first sentence of each docstring, and its equation."""
    rows = []
    for name in lrules.__all__:
        value = getattr(lrules, name)
        if inspect.isfunction(value) and value.__module__ == "lrules.modifiers":
            first, formula = (inspect.getdoc(value) or "").split("\n\n")[:2]
            rows.append([f"`{name}`", " ".join(first.split()), f"`{' '.join(formula.split())}`".replace("|", "\\|")])
    return table(("modifier", "what it does", "s is the error at a hidden signal"), rows)


def layouts() -> str:
    """What devices send in a step, by rule and layout."""
    cells = json.loads(sent.FILE.read_text())["cells"]
    named = [[f"`{name}`" if name in sent.RULES else name, *found] for name, *found in sent.rows(cells)]
    return table(["rule", *(f"`{layout}`" for layout in cells)], named)


def pipeline(name: str) -> str:
    """A table of what the pipelines of stages were measured at."""
    content = json.loads((facts.DOCS / "parallel" / "pipeline.json").read_text())
    return report.TABLES[name](content)


def costs(name: str) -> str:
    """A table of how cost grows."""
    return cost_tables.TABLES[name]()


MADE: dict[str, Callable[..., str]] = {
    "equation": equation, "example": example, "references": references, "cost": cost, "properties": properties,
    "rules": rules, "modifiers": modifiers, "coverage": coverage.full, "coverage in short": coverage.short,
    "layouts": layouts, "pipeline": pipeline, "costs": costs,
}  # fmt: skip
SLOW = ("coverage", "coverage in short")


def made(name: str) -> str:
    """The text of the part with this name."""
    if name in MADE:
        return MADE[name]()
    kind, _, of = name.partition(" ")
    return MADE[kind](of)


def filled(text: str, slow: bool = True) -> str:
    """A page with each of its parts made anew; without the slow ones, these stay as they are."""

    def fill(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        return match[0] if name in SLOW and not slow else f"{begin}\n{made(name)}\n\n{end}"

    return BLOCK.sub(fill, text)
