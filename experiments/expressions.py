"""Names with options, such as `sgd(momentum=0.9)`: read by `ast`, never evaluated as code."""

import ast
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from experiments.errors import InputError, nearest


def parse(text: str, what: str) -> list[tuple[str, list[Any], dict[str, Any]]]:
    """The names, values and options of a list such as `crop(4), flip`; `what` is the word for an entry in messages.

    Example:
      >>> parse("step(epochs=[60, 80], factor=0.1)", "schedule")
      [('step', [], {'epochs': [60, 80], 'factor': 0.1})]
    """
    malformed = InputError(f"The {what} {text!r} is malformed: write a name, or a name with options, as in name(a=1).")
    try:
        nodes = ast.parse(f"[{text}]", mode="eval").body
        assert isinstance(nodes, ast.List)
        return [_entry(node) for node in nodes.elts]
    except (AssertionError, SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        raise malformed from None


def _entry(node: ast.expr) -> tuple[str, list[Any], dict[str, Any]]:
    match node:
        case ast.Name(id=name):
            return name, [], {}
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if all(k.arg for k in keywords):
            options = {str(k.arg): ast.literal_eval(k.value) for k in keywords}
            return name, [ast.literal_eval(arg) for arg in args], options
    raise ValueError(ast.unparse(node))


def single(text: str, what: str) -> tuple[str, list[Any], dict[str, Any]]:
    """The one entry of a text."""
    entries = parse(text, what)
    if len(entries) != 1:
        raise InputError(f"The {what} {text!r} must be one name, got {len(entries)}: write it as in name(a=1).")
    return entries[0]


def call(
    table: Mapping[str, Callable[..., Any]], entry: tuple[str, list[Any], dict[str, Any]], what: str, *first: Any
) -> Any:
    """Calls the function of an entry with the `first` values, then those of the entry."""
    name, args, options = entry
    if name not in table:
        raise InputError(f"There is no {what} '{name}': {nearest(name, table)}")
    parameters = list(inspect.signature(table[name]).parameters)[len(first) :]
    for option in options:
        if option not in parameters:
            remedy = nearest(option, parameters) if parameters else f"write {name} alone."
            raise InputError(f"The {what} {name} has no option '{option}': {remedy}")
    try:
        inspect.signature(table[name]).bind(*first, *args, **options)
    except TypeError as error:
        raise InputError(f"The {what} {name}: {error}; its options are {', '.join(parameters) or 'none'}.") from None
    try:
        return table[name](*first, *args, **options)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"The {what} {name}: {str(error).splitlines()[0]}.") from error
