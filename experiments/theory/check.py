"""One measured claim."""

from typing import NamedTuple


class Check(NamedTuple):
    """A claim of a paper, its measured figure, and the interval of figures for which it holds."""

    source: str  # the paper and the theorem
    claim: str
    measured: float
    most: float = float("inf")
    least: float = float("-inf")

    @property
    def holds(self) -> bool:
        return self.least <= self.measured <= self.most

    @property
    def wanted(self) -> str:
        """The interval as text."""
        below = [f"> {self.least:g}"] if self.least > -float("inf") else []
        above = [f"< {self.most:g}"] if self.most < float("inf") else []
        return " and ".join(below + above)
