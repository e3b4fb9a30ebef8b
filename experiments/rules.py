"""Learning rules by name: `backman(alpha=1.0)`, `drop_error(feedback_alignment, rate=0.5)`.

`ast` parses an expression; it is never evaluated as code. It may hold names and calls of the rules and modifiers that
lrules exports (by their names there or in the papers, such as `srbp`), of the rules of `recipes.py`, and of weight
initializers. It may also hold names of elementwise functions (`tanh`, `derivative(tanh)`) and Python literals. A bare
name is a call without arguments.
"""

import ast
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

import lrules
from experiments import models, recipes
from experiments.errors import InputError, nearest

Factory = Callable[..., Any]

# The names that the papers use.
PAPER_NAMES: dict[str, Factory] = {
    "bp": lrules.backprop,
    "fa": lrules.feedback_alignment,
    "rbp": lrules.feedback_alignment,
    "arbp": functools.partial(lrules.feedback_alignment, adaptive=True),
    "dfa": lrules.direct_feedback_alignment,
    "srbp": lrules.direct_feedback_alignment,
    "asrbp": functools.partial(lrules.direct_feedback_alignment, adaptive=True),
    "sbp": lrules.skipped_backprop,
    "usf": lrules.sign_symmetry,
    "brsf": functools.partial(lrules.sign_symmetry, magnitude="random"),
    "frsf": functools.partial(lrules.sign_symmetry, magnitude="fixed"),
    "kp": lrules.kolen_pollack,
    "dkp": lrules.direct_kolen_pollack,
    "wm": lrules.weight_mirror,
    "drtp": lrules.random_target_projection,
    "mdfa": lrules.monotone_dfa,
    "dp": lrules.dual_propagation,
}

# Elementwise functions, for options that take one: `replace_derivative(srbp, derivative(sigmoid))`.
FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = models.ACTIVATIONS | {"sign": jnp.sign, "abs": jnp.abs}


def names_of_backprop() -> list[str]:
    """The ways to write backprop without options."""
    names = [name for name, factory in PAPER_NAMES.items() if factory is lrules.backprop]
    return [text for name in ("backprop", *names) for text in (name, f"{name}()")]


def rules() -> dict[str, Factory]:
    """Every rule factory that lrules exports, by name."""
    return _functions(_exports(), "lrules.rules")


def modifiers() -> dict[str, Factory]:
    """Every modifier (a function from a rule to a rule) that lrules exports, by name."""
    return _functions(_exports(), "lrules.modifiers")


def recipe_rules() -> dict[str, Factory]:
    """Every rule of `recipes.py`, by name."""
    found = _functions(vars(recipes), "experiments.recipes")
    return {name: f for name, f in found.items() if inspect.signature(f).return_annotation is lrules.Rule}


def derivative(f: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """The derivative of an elementwise function."""
    if not callable(f):
        raise ValueError(f"{_text(f)} is not a function: {nearest(str(f), FUNCTIONS)}")
    return lambda z: jax.jvp(f, (z,), (jnp.ones_like(z),))[1]


def initialisers() -> dict[str, Factory]:
    """The weight initializers of `jax.nn.initializers` and `lrules.feedback`, by name."""
    own = vars(lrules.feedback) if hasattr(lrules, "feedback") else {}
    return _functions(vars(jax.nn.initializers), "jax") | _functions(own, "lrules.feedback")


def _exports() -> dict[str, Any]:
    return {name: getattr(lrules, name) for name in lrules.__all__}


def _functions(names: Mapping[str, Any], module: str) -> dict[str, Factory]:
    """The names that are public functions, defined in the module or below it."""
    found = {name: f for name, f in names.items() if inspect.isfunction(f) and not name.startswith("_")}
    return {name: f for name, f in found.items() if f"{f.__module__}.".startswith(f"{module}.")}


def argument_free_rules() -> dict[str, lrules.Rule]:
    """Every rule whose factory has no required argument, by the name of the factory, backprop first."""
    names = sorted(rules().items(), key=lambda item: item[0] != "backprop")
    return {name: factory() for name, factory in names if not _required(factory)}


def parse(expression: str, options: Mapping[str, Any] | None = None) -> lrules.Rule:
    """The rule of an expression such as `partition({"fc.*": backman(alpha=0.5), ".*": backprop})`.

    The `options` replace those of the outermost call that has them; they may be traced numbers.
    """
    tree = _tree(expression)
    given: dict[int, dict[str, Any]] = {}
    for option, value in (options or {}).items():
        given.setdefault(id(_owner(tree, option, expression)), {})[option] = value
    rule = _value(tree, given)
    if not isinstance(rule, lrules.Rule):
        raise InputError(f"{expression!r} is not a rule: {nearest(expression, rules())}")
    return rule


def options(expression: str) -> list[str]:
    """The options that `parse` can replace: those of every rule and modifier in an expression."""
    tree = _tree(expression)
    parse(expression)
    found = [_options(node) for node in ast.walk(tree)]
    return list(dict.fromkeys(option for names in found for option in names if option != "rule"))


def _tree(expression: str) -> ast.expr:
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise InputError(f"The rule {expression!r} is malformed: write it as in backman(alpha=1.0).") from None


def _options(node: ast.AST) -> list[str]:
    """The options of a call, or of a bare name that is one."""
    match node:
        case ast.Call(func=ast.Name(id=name)) | ast.Name(id=name) if name not in FUNCTIONS:
            return list(inspect.signature(_factory(name)).parameters)
    return []


def _owner(tree: ast.expr, option: str, expression: str) -> ast.AST:
    """The outermost call with an option; of a bare name inside a call, the call."""
    for node in ast.walk(tree):
        if option in _options(node):
            return node
    raise InputError(f"The rule {expression!r} has no option '{option}': {nearest(option, options(expression))}")


def modified(expression: str) -> str | None:
    """The rule that an expression modifies, as text: `fa` of `sign_error(fa)`; None if it is not a modifier.

    Feedback that is drawn again counts as a modifier: it is `dfa` of `dfa(storage='recomputed')`.
    """
    match ast.parse(expression, mode="eval").body:
        case ast.Call(func=ast.Name(id=name), args=[rule, *_]) if name in modifiers():
            return ast.unparse(rule)
        case ast.Call(func=func, args=args, keywords=keywords) if any(map(_recomputes, keywords)):
            rest = [keyword for keyword in keywords if not _recomputes(keyword)]
            return ast.unparse(ast.Call(func, args, rest) if args or rest else func)
    return None


def _recomputes(keyword: ast.keyword) -> bool:
    return keyword.arg == "storage" and isinstance(keyword.value, ast.Constant) and keyword.value.value == "recomputed"


def select(expressions: str | None) -> dict[str, lrules.Rule]:
    """Rules by their text: those of a comma-separated list; default every rule without a required argument."""
    if not expressions:
        return argument_free_rules()
    malformed = InputError(f"The rules {expressions!r} are malformed: write them as in backprop,backman(alpha=1.0).")
    try:
        tree = ast.parse(f"[{expressions}]", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise malformed from None
    if not isinstance(tree, ast.List):
        raise malformed
    names = [ast.unparse(node) for node in tree.elts]
    return {name: parse(name) for name in names}


def _value(node: ast.expr, given: Mapping[int, dict[str, Any]] = MappingProxyType({})) -> Any:
    """The value of an expression node; `given` has options for nodes, by their id."""
    own = given.get(id(node), {})
    match node:
        case ast.Name(id=name):
            return _call(name, [], own) if own else _named(name)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if all(k.arg for k in keywords):
            for argument in (*args, *(k.value for k in keywords)):
                _check_argument(name, argument)
            named = {str(k.arg): _value(k.value, given) for k in keywords}
            return _call(name, [_value(a, given) for a in args], named | own)
        case ast.Dict(keys=keys, values=values) if all(isinstance(key, ast.Constant) for key in keys):
            return {ast.literal_eval(key): _value(value, given) for key, value in zip(keys, values, strict=True) if key}
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_value(element, given) for element in elements]
    try:
        return ast.literal_eval(node)
    except (TypeError, ValueError):
        text = ast.unparse(node)
        raise InputError(f"A rule cannot contain '{text}': use names of rules, their options and literals.") from None


def _check_argument(rule: str, argument: ast.expr) -> None:
    """Refuses an unknown bare name among the arguments of a rule, which may be a text without its quotes."""
    if not isinstance(argument, ast.Name) or rule not in _named_rules() or rule in modifiers():
        return
    name, known = argument.id, [*_factories(), *FUNCTIONS]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        remedy = f"did you mean '{close[0]}'?" if close else f'if it is a text, write it in quotes, as "{name}".'
        raise InputError(f"{rule}: there is no function '{name}': {remedy}")


def _named(name: str) -> Any:
    """A bare name: a function, or an initializer that takes a key itself (`zeros`); all other names are called."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    factory = _factory(name)
    if next(iter(inspect.signature(factory).parameters), None) == "key":
        return factory
    return _call(name, [], {})


def _named_rules() -> dict[str, Factory]:
    """Rules and modifiers, by name."""
    return recipe_rules() | modifiers() | rules() | PAPER_NAMES


def _factories() -> dict[str, Factory]:
    """All that an expression may call, by name."""
    return initialisers() | {"derivative": derivative} | _named_rules()


def _factory(name: str) -> Factory:
    known = _factories()
    if name not in known:
        raise InputError(f"There is no rule '{name}': {nearest(name, [*_named_rules(), *FUNCTIONS])}")
    return known[name]


def _call(name: str, args: list[Any], options: dict[str, Any]) -> Any:
    """Call a factory, with one sentence for every way in which the arguments can be wrong."""
    factory = _factory(name)
    parameters = list(inspect.signature(factory).parameters)
    for option in options:
        if not parameters:
            raise InputError(f"{name} has no option '{option}': it has no options, so write {name} alone.")
        if option not in parameters:
            raise InputError(f"{name} has no option '{option}': {nearest(option, parameters)}")
    unnamed = [p.name for p in inspect.signature(factory).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(args) > len(unnamed):
        named = parameters[len(unnamed) :]
        remedy = f"write the others with their names, such as {named[0]}=..." if named else "leave the others out"
        raise InputError(f"{name} takes at most {len(unnamed)} values without a name, got {len(args)}: {remedy}.")
    missing = [p for p in _required(factory)[len(args) :] if p not in options]
    if missing:
        example = ", ".join([*map(_text, args), *(f"{k}={_text(v)}" for k, v in options.items()), f"{missing[0]}=..."])
        raise InputError(f"{name} needs the option '{missing[0]}': write {name}({example}).")
    first = args[0] if args else options.get("rule")
    if name in modifiers() and not isinstance(first, lrules.Rule):
        raise InputError(f"{name} modifies a rule, not {_text(first)}: write the rule first, as in {name}(backprop).")
    try:
        return factory(*args, **options)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {error}") from error


def _required(factory: Factory) -> list[str]:
    """The names of the parameters without a default."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(factory).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in kinds]


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, (str, int, float, bool, type(None))) else "..."
