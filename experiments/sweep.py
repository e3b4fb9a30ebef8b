"""Grids of settings: `--sweep="learning_rate=0.002,0.01" --sweep="alpha=0.5,1"`.

    grid = sweep.parse(["learning_rate=0.002,0.01", "weight_decay=0,1e-4"], config)
    grid.points()  # [Point({"learning_rate": 0.002, "weight_decay": 0.0}, {}), ...]

A name is a field of the config, or an option of the rule. The lanes of one run may differ in learning rates, in weight
decay, and in the numbers of a rule that may be traced. All other settings need a run each.
"""

import ast
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from experiments import rules
from experiments.build import TRACED
from experiments.config import Config
from experiments.errors import InputError, nearest

# All points share these: the data, the number of epochs, and what is measured.
SHARED = (
    *("rule", "seed", "seeds", "dataset", "classes", "validation", "epochs", "warmup_epochs"),
    *("select", "probe", "record_every", "layers", "attack"),
)


class Point(NamedTuple):
    """One combination of settings: fields of the config, and options of the rule."""

    fields: dict[str, Any]
    options: dict[str, Any]

    def text(self) -> str:
        """The settings as `learning_rate=0.01, alpha=1`."""
        return ", ".join(f"{name}={value}" for name, value in (self.fields | self.options).items())


class Grid(NamedTuple):
    """The values of each setting, and the names of those that lanes of one run may differ in."""

    fields: dict[str, tuple[Any, ...]]
    options: dict[str, tuple[Any, ...]]
    traced: frozenset[str]

    def points(self) -> list[Point]:
        """Every combination; those that share a run follow one another."""
        names = [*self.fields, *self.options]
        names.sort(key=lambda name: name in self.traced)  # what needs a run of its own changes last
        values = self.fields | self.options
        combined = [dict(zip(names, found, strict=True)) for found in itertools.product(*(values[n] for n in names))]
        return [Point({n: p[n] for n in self.fields}, {n: p[n] for n in self.options}) for p in combined]

    def texts(self) -> list[str]:
        """The texts that `parse` makes it of."""
        values = self.fields | self.options
        return [f"{name}={','.join(map(_text, found))}" for name, found in values.items()]

    def runs(self) -> list[list[Point]]:
        """The points that share a run."""
        groups: dict[tuple[Any, ...], list[Point]] = {}
        for point in self.points():
            fixed = tuple(repr(v) for n, v in (point.fields | point.options).items() if n not in self.traced)
            groups.setdefault(fixed, []).append(point)
        return list(groups.values())

    def at_edge(self, point: Point) -> list[str]:
        """The settings of a point that are the smallest or the largest of three or more that were tried."""
        values = self.fields | self.options
        return [
            name
            for name, value in (point.fields | point.options).items()
            if len(values[name]) > 2 and all(_is_number(v) for v in values[name])
            and value in (min(values[name]), max(values[name]))
        ]  # fmt: skip


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


NO_GRID = Grid({}, {}, frozenset())


def parse(texts: Sequence[str], config: Config) -> Grid:
    """The grid of texts such as `learning_rate=0.002,0.01`.

    Raises:
      InputError: a text is malformed, or names neither a field of the config nor an option of its rule.
    """
    fields: dict[str, tuple[Any, ...]] = {}
    options: dict[str, tuple[Any, ...]] = {}
    known = [name for name in config.to_dict() if name not in SHARED]
    for text in texts:
        name, _, right = text.partition("=")
        name, values = name.strip(), _values(right)
        if not values:
            raise InputError(f"--sweep needs a name and values, as in --sweep=learning_rate=0.001,0.01, got {text!r}.")
        if name in fields | options:
            raise InputError(f"--sweep has {name} twice: write all its values in one, as in --sweep={name}=A,B,C.")
        if name in known:
            fields[name] = tuple(getattr(config.replace(**{name: value}), name) for value in values)
        elif name in SHARED:
            raise InputError(f"--sweep cannot have {name}, which all points share: give it as --{name}, run by run.")
        elif name in rules.options(config.rule):
            options[name] = values
            for value in values:
                rules.parse(config.rule, {name: value})  # refuses a value that the rule refuses
        else:
            choices = [*known, *rules.options(config.rule)]
            raise InputError(f"There is no setting '{name}' to sweep: {nearest(name, choices, most=99)}")
    traced = {name for name in fields if name in TRACED}
    traced |= {name for name, values in options.items() if _may_be_traced(config.rule, name, values)}
    return Grid(fields, options, frozenset(traced))


def _values(text: str) -> tuple[Any, ...]:
    """Values separated by commas, each once: literals, or texts such as `sgd(momentum=0.9,nesterov=True)`."""
    try:
        tree = ast.parse(f"[{text}]", mode="eval").body
        assert isinstance(tree, ast.List)
    except (AssertionError, SyntaxError, ValueError, RecursionError, MemoryError):
        parts: list[Any] = [part.strip() for part in text.split(",") if part.strip()]
    else:
        parts = [_literal(node, ast.get_source_segment(f"[{text}]", node)) for node in tree.elts]
    return tuple(value for i, value in enumerate(parts) if value not in parts[:i])


def _literal(node: ast.expr, text: str | None) -> Any:
    try:
        return ast.literal_eval(node)
    except (TypeError, ValueError):
        return text


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _may_be_traced(rule: str, name: str, values: Sequence[Any]) -> bool:
    """Whether the rule takes a traced number for an option; whole numbers are counts, which it does not."""
    if not all(_is_number(value) for value in values) or all(isinstance(value, int) for value in values):
        return False
    try:
        jax.eval_shape(lambda value: rules.parse(rule, {name: value}) and 0, jax.ShapeDtypeStruct((), "float32"))
    except (InputError, TypeError, jax.errors.JAXTypeError):
        return False
    return True


def settings(points: Sequence[Point], traced: frozenset[str], seeds: int) -> Mapping[str, Sequence[float]]:
    """The traced numbers of a run's lanes, for `build.run`: those of each point, once for each seed."""
    names = [name for name in points[0].fields | points[0].options if name in traced]
    return {
        (name if name in points[0].fields else f"rule.{name}"): [
            (point.fields | point.options)[name] for point in points for _ in range(seeds)
        ]
        for name in names
    }
