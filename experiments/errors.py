"""The exception for bad input, and the nearest name for a misspelt name."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input. Its text is one sentence with the fault and the remedy; programs print it without a traceback."""


def nearest(name: str, options: Iterable[str], *, most: int = 20) -> str:
    """`did you mean 'x'?` if an option resembles the name, else a list of the options."""
    options = sorted(options)
    matches = difflib.get_close_matches(name, options, n=1)
    if matches:
        return f"did you mean '{matches[0]}'?"
    listed = ", ".join(options[:most]) + (", ..." if len(options) > most else "")
    return f"use one of: {listed}"
