"""Tables of Markdown."""

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: int | None = None) -> str:
    """A table; the columns from `right` on are aligned to the right."""
    ends = len(head) if right is None else right
    rule = ["---"] * ends + ["---:"] * (len(head) - ends)
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in (head, rule, *rows))
