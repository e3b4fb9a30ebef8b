"""Which of many parameters of a test run in `make test`; the others are slow tests."""

import pytest


def mostly_slow(names, quick):
    """Parameters of a test, all but the quick ones marked slow."""
    return [pytest.param(n, marks=[] if n in quick else [pytest.mark.slow], id=str(n)) for n in names]
