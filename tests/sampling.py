"""Which of many parameters of a test run in `make test`; the others are slow tests."""

import pytest


def mostly_slow(names, quick):
    """Parameters of a test, all but the quick ones marked slow; where there are several, a tuple stands for each."""
    return [
        pytest.param(
            *(n if isinstance(n, tuple) else (n,)),
            marks=[] if n in quick else [pytest.mark.slow],
            id="-".join(map(str, n)) if isinstance(n, tuple) else str(n),
        )
        for n in names
    ]


def pairs(first, second):
    """All pairs of two parameters."""
    return [(a, b) for a in first for b in second]
