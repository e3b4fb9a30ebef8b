"""The options of dual propagation, and the checks that do not need a network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from lrules.extend import require_description
from lrules.options import ByName, is_number, is_positive, is_whole, mesh_axes, not_traced, require_flags
from lrules.rule import Rule
from lrules.typing import AxisName

Number = float | Mapping[str, float]  # one for all states, or by regular expression on their names
Order = Literal["forward_backward", "forward", "parallel", "odd_even", "random"]
Output = Literal["once", "refreshed", "squared_error"]
Damping = Literal["spectral", "contracting"]


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
    """What the user chose, see `dual_propagation`."""

    alpha: ByName[float]
    beta: ByName[float]
    adjoint: bool
    iterations: int
    order: Order
    output: Output
    damping: Damping | float | None
    input_nudge: float | None
    feedback_rule: Rule | None
    tolerance: float | None
    axis_name: AxisName
    passing: frozenset[str]

    def check(self) -> None:
        """Refuses options that are out of range, or that do not work together; `alpha` and `beta` are checked before.

        Raises:
          ValueError: there is such an option.
          TypeError: `axis_name` is not a name, several names or None.
        """
        _check_choice("order", self.order, get_args(Order))
        _check_choice("output", self.output, get_args(Output))
        require_flags(adjoint=self.adjoint)
        if not (is_whole(self.iterations) and self.iterations >= 1):
            raise ValueError(f"iterations must be an integer >= 1, got {self.iterations!r}")
        self._check_damping()
        if self.adjoint and self.output == "squared_error":
            raise ValueError(
                'output="squared_error" works only with the original equations: give adjoint=False, or '
                'output="refreshed"'
            )
        _check_feedback_rule(self.feedback_rule)
        nudge, tolerance = self.input_nudge, self.tolerance
        for option, value in (("input_nudge", nudge), ("tolerance", tolerance)):
            not_traced(option, value, "a number or None")
        if nudge is not None and not is_positive(nudge):
            raise ValueError(
                f"input_nudge must be a finite number > 0, got {nudge!r}: leave it out if the inputs must not change"
            )
        if tolerance is not None and not (is_number(tolerance) and tolerance >= 0):
            raise ValueError(f"tolerance must be a number >= 0 or None, got {tolerance!r}")
        mesh_axes(self.axis_name)

    def _check_damping(self) -> None:
        damping = self.damping
        not_traced("damping", damping, "a number, a word or None")
        in_range = is_number(damping) and 0 <= damping < math.inf
        if not (damping is None or in_range or damping in get_args(Damping)):
            raise ValueError(
                f'damping must be "spectral", "contracting", a finite number >= 0 or None, got {damping!r}'
            )
        if self.adjoint and damping is not None:
            raise ValueError("damping works only with the original equations: give adjoint=False, or leave damping out")


def _check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def _check_feedback_rule(rule: Any) -> None:
    """Only a rule that says what each layer sends down can replace W^T."""
    if rule is None:
        return
    want = "feedback_rule must be a sequential rule, such as lrules.feedback_alignment()"
    if not isinstance(rule, Rule):
        raise ValueError(f"{want}, got a {type(rule).__name__}{': call it first' if callable(rule) else ''}")
    description = require_description(rule, "dual_propagation", "its feedback_rule")
    if description.modified:
        raise ValueError(
            "feedback_rule must be a rule without a modifier: put the modifier around dual_propagation instead, as in "
            "lrules.sign_error(lrules.dual_propagation(feedback_rule=rule))"
        )
    if rule.value_and_grad is not None:
        raise ValueError(f"{want}, got a rule that needs the loss or the targets: leave feedback_rule out to use W^T")
