"""What devices send, by rule and layout: the claims, and the file against programs that are compiled here."""

import json
import subprocess
import sys

import jax
import pytest

from experiments import layouts
from tests.experiments.programs import ROOT
from tests.sampling import mostly_slow, pairs

FOUND = json.loads(layouts.FILE.read_text())
DIRECT, SEQUENTIAL = "direct_feedback_alignment", "feedback_alignment"


WHOLE, SPLIT = layouts.ELSEWHERE


def numbers(cell):
    return {kind: n for kind, (n, _) in cell["sent"].items()}


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_direct_feedback_sends_no_more_than_backprop(layout):
    """Neither more operations nor more bytes; where weights are split over devices, much less."""
    cells = FOUND["cells"][layout]
    direct, *others = (layouts.total(cells[n]) for n in (DIRECT, "backprop", WHOLE, SPLIT))
    for other in others:
        assert direct[0] <= other[0] and direct[1] <= other[1]
    backprop = others[0]
    assert cells[DIRECT]["feedback"] <= cells[WHOLE]["feedback"]
    if layout in ("tensor", "columns"):
        assert direct[0] < 0.6 * backprop[0] and direct[1] < 0.52 * backprop[1]
        assert cells[DIRECT]["feedback"] <= 0.5 * cells[WHOLE]["feedback"]
    if layout != "FSDP":  # where a second set of weights is gathered
        assert layouts.total(cells[SEQUENTIAL]) == layouts.total(cells["backprop"])


QUICK = [("tensor", "backprop"), ("tensor", DIRECT), ("tensor", SPLIT), ("FSDP", DIRECT)]


# Where the batch is split, and misplaced feedback too, XLA chooses by the number of devices.
CELLS = [*pairs(layouts.LAYOUTS, layouts.RULES), *pairs(["tensor", "columns"], layouts.ELSEWHERE)]


@pytest.mark.parametrize(("layout", "name"), mostly_slow(CELLS, QUICK))
def test_the_file_on_four_devices(layout, name):
    """A narrow network on four devices sends as many times; XLA may differ between versions of JAX."""
    rule = layouts.RULES.get(name, layouts.RULES[DIRECT])()
    cell = layouts.measure(layout, rule, elsewhere=layouts.ELSEWHERE.get(name), width=32)
    if jax.__version__ == FOUND["jax"]:
        assert numbers(cell) == numbers(FOUND["cells"][layout][name])


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_a_small_network(layout):
    """The claim holds for any version of JAX."""
    direct, backprop = (layouts.total(layouts.measure(layout, layouts.RULES[n](), layers=3, width=32)) for n in (
        DIRECT, "backprop"
    ))  # fmt: skip
    assert direct[0] <= backprop[0] and direct[1] <= backprop[1]


@pytest.mark.slow
@pytest.mark.skipif(jax.__version__ != FOUND["jax"], reason="XLA differs between versions of JAX")
def test_the_file_on_eight_devices():
    command = [sys.executable, "-m", "experiments.layouts", "--print"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["; ".join(row) for row in layouts.rows(FOUND["cells"])]
