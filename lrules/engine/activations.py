"""Activations: elementwise nonlinear functions without parameters, found in a jaxpr.

Names come first: a `custom_jvp` function (relu) or a named `jit` (silu) with an elementwise body is one activation.
Otherwise an activation is a maximal run of elementwise equations with one root and one output that holds a nonlinear
primitive: gelu is one activation, not the tanh inside it. Factors and terms before and after it do not belong to it, so
0.1 * tanh(z / 2) is treated like 0.1 * relu(z / 2), unless they may belong to a formula: 1 / (1 + exp(-z)). A single
exp, log, root, power or quotient is not an activation (softmax, exp(logvar / 2)). The operations of normalisations on
means and variances are not activations either.

Some functions are not activations by these rules, but may be meant as such: a square that a layer reads (itself,
scaled, normalised or added to something), a maximum of two values, or a nonlinear function of whole rows with a custom
derivative. Each is kept as a `Doubt`. Rules that need activations refuse it. `activation` and `not_activation` settle
it inside the model, and the option `passing=` of the rule settles it from outside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrules.engine.jaxprs import OWN_DERIVATIVE, Atom, Equation, call_body, call_name
from lrules.engine.operations import of

NAMED = {"relu", "relu6", "silu", "swish", "elu", "celu", "selu", "gelu", "hard_tanh", "hard_sigmoid", "hard_silu",
         "hard_swish", "leaky_relu", "softplus", "soft_sign", "mish", "squareplus", "sparse_plus", "sparse_sigmoid",
         "log_sigmoid", "logistic", "sigmoid", "tanh", "relu2"}  # fmt: skip

ALIASES = {"integer_pow_tanh_mul": "gelu", "erfc_mul": "gelu", "erf_mul": "gelu", "logistic": "sigmoid",
           "logistic_mul": "silu"}  # fmt: skip

FORMULAS = {"exp_log": "log_softmax", "exp_div": "softmax"}  # with other primitives between them

Axes = tuple[int, ...]  # for each axis of one value, the axis of another that it is

MARK, UNMARK = "lrules_activation_", "lrules_not_activation_"


def sampled(fn: Callable[..., Any], like: Any) -> tuple[np.ndarray, np.ndarray]:
    """Points from -8 to 8 and two far points, in increasing order, and the values of an activation there.

    Args:
      fn: the activation, as handlers get it.
      like: an array with the shape and dtype of its argument.

    Raises:
      jax.errors.JAXTypeError: it uses numbers that are not known when the network is traced.
    """
    grid = np.concatenate([[-1e4], np.linspace(-8, 8, 65), [1e4]])
    size = max(int(np.prod(like.shape)), 1)
    known = jax.jit(fn)  # without jit, a custom_jvp under vmap gives a tracer even for known numbers
    points, values = [], []
    for i in range(0, len(grid), size):
        with jax.ensure_compile_time_eval():
            part = jnp.asarray(np.resize(grid[i : i + size], like.shape), like.dtype)
            points.append(np.asarray(part, np.float64).ravel())
            values.append(np.asarray(known(part), np.float64).ravel())
    return np.concatenate(points)[: len(grid)], np.concatenate(values)[: len(grid)]


@dataclasses.dataclass(frozen=True)
class Doubt:
    """A nonlinearity that is not an activation by the rules above, and may be meant as one.

    Attributes:
      name: its primitives.
      output: the variable of its result, if it is a doubt only when a layer reads it; else None.
      why: what else is known: why a marked function is not an activation, or how to write it in a known form.
    """

    name: str
    output: Any = None
    why: str = ""


def passing_names(passing: str | Iterable[str]) -> frozenset[str]:
    """Reads the option `passing=` of a rule.

    Args:
      passing: a name, or several names.

    Returns:
      The names.

    Raises:
      ValueError: it is not a name or several names.

    Example:
      >>> import lrules
      >>> lrules.extend.passing_names("exp")
      frozenset({'exp'})
    """
    names = [passing] if isinstance(passing, str) else list(passing) if isinstance(passing, Iterable) else [None]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f'passing must be names of functions, such as {{"exp", "tanh#2"}}, got {passing!r}')
    return frozenset(names)


def treated(graph: Any, passing: frozenset[str] = frozenset()) -> list[Any]:
    """Lists the activations of a network that a rule treats: all but those in `passing`.

    Args:
      graph: the traced network.
      passing: names of activations and nonlinearities through which the error passes by their derivative.

    Returns:
      The activations.

    Raises:
      NotImplementedError: a nonlinearity is not recognised as an activation, and no mark or `passing` says what it is.
      ValueError: nothing in the network has a name in `passing`.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net = lrules.Network(lambda w, x: jax.nn.relu(jnp.tanh(x @ w) @ w))
      >>> graph = net.graph(jnp.eye(2), jnp.ones((3, 2)))
      >>> [a.site for a in lrules.extend.treated(graph, frozenset({"tanh"}))]
      ['relu']
    """
    names = {name for a in graph.activations for name in (a.name, a.site)} | set(graph.nonlinearities)
    for name in sorted(passing - names):
        there = f"give one of {', '.join(map(repr, sorted(names)))}" if names else "leave passing out, it has none"
        raise ValueError(f"passing: {name!r} is not an activation or a nonlinearity of this network: {there}")
    doubts = {d.name: f"{d.name} ({d.why})" if d.why else d.name for d in graph.doubts if d.name not in passing}
    if doubts:
        named = sorted(doubts)
        what, are, kind = "nonlinearities", "are", "activations"
        if len(named) == 1:
            what, are, kind = "nonlinearity", "is", "an activation"
        marks = any(not d.why for d in graph.doubts if d.name in named)
        mark = "write it as lrules.activation(f)(x), with f elementwise and without parameters; or, " if marks else ""
        raise NotImplementedError(
            f"the {what} {', '.join(doubts[name] for name in named)} {are} not recognised as {kind}, and this rule "
            f"needs to know: {mark}if the error should pass through it by its derivative, write it as "
            f"lrules.not_activation(f)(x), or give the rule passing={{{', '.join(map(repr, named))}}}"
        )
    return [a for a in graph.activations if passing.isdisjoint((a.name, a.site))]


def arrangement(eqn: Equation, uniform: Sequence[bool], opaque: bool = False) -> dict[int, Axes] | None:
    """How the operands of an elementwise equation lie in its output; None if the equation is not elementwise.

    For each operand, by position: the axis of the operand that each axis of the output is (`vmap` transposes if batches
    lie in different places). A call is elementwise if all its equations are. `uniform` says which operands are
    constants that are the same for all elements; they may be broadcast, and have no part in the arrangement. Inside an
    `opaque` call, which has a custom derivative or a mark, there may be a `stop_gradient`.
    """
    row = of(eqn)
    moving = [k for k, p in enumerate(uniform) if not p]
    if (row.elementwise and row.curve) or (opaque and row.stops):
        if any(len(eqn.invars[k].aval.shape) != len(eqn.outvars[0].aval.shape) for k in moving):
            return None  # one choice for all elements
        return {k: tuple(range(len(eqn.invars[k].aval.shape))) for k in moving}
    if row.permutation is not None:
        return {k: row.permutation(eqn) for k in moving}
    body = call_body(eqn)
    if body is None or len(eqn.outvars) != 1:
        return None
    marked = call_name(eqn).startswith(MARK)
    opaque = opaque or marked or row.name in OWN_DERIVATIVE
    known: dict[Any, dict[int, Axes]] = {}  # how the operands lie in each value of the body
    for k, (v, p) in enumerate(zip(body.invars, uniform, strict=True)):
        known[v] = {} if p or not v.aval.shape else {k: tuple(range(len(v.aval.shape)))}
    for inner in body.eqns:
        held = [{} if _is_literal(v) else known.get(v) for v in inner.invars]
        if None in held:
            return None
        steps = arrangement(inner, [not h for h in held], opaque)
        if steps is None and not (of(inner).kind == "view" and not any(held)):
            return None
        merged: dict[int, Axes] = {}
        for at, step in (steps or {}).items():
            for k, axes in held[at].items():  # type: ignore[union-attr]
                if merged.setdefault(k, _composed(axes, step)) != _composed(axes, step):
                    return None
        known.update(dict.fromkeys(inner.outvars, merged))
    if not (body.eqns or marked):
        return None
    (out,) = body.outvars
    unused = {k: tuple(range(len(body.invars[k].aval.shape))) for k in moving}
    return unused | ({} if _is_literal(out) else known[out])


def _composed(first: Axes, then: Axes) -> Axes:
    return tuple(first[i] for i in then)


def arranged(value: Any) -> dict[int, Axes] | None:
    """The arrangement of the equation that produces a value; None if it is not elementwise."""
    if value.arranged is False:  # not computed yet: many values share their operands
        eqn, operands = value.producer, value.operands
        whole = eqn is not None and len(operands) == len(eqn.invars)  # no loop, no branch
        value.arranged = arrangement(eqn, [_is_uniform(v) for v in operands]) if whole else None
    return value.arranged


def is_atom(eqn: Equation, ins: Sequence[Any]) -> bool:
    """Whether a call is evaluated as one: it is elementwise as a whole, and a function of one value alone."""
    held = arrangement(eqn, [_is_uniform(v) for v in ins]) if of(eqn).kind == "call" else None
    if held is None or any(not v.both and not _is_uniform(v) for v in ins):
        return False
    return _one_origin([(v, held[k]) for k, v in enumerate(ins) if v.both])


def _is_uniform(value: Any) -> bool:
    """A constant that is the same for all elements."""
    if value.params or value.data:
        return False
    if value.uniform is None:  # kept: values are shared by many
        eqn, operands = value.producer, value.operands
        value.uniform = False  # what a loop makes of itself is none
        value.uniform = getattr(value.aval, "shape", None) == () or (
            eqn is not None
            and len(operands) == len(eqn.invars)
            and bool(operands)
            and all(map(_is_uniform, operands))
            and (of(eqn).kind == "view" or arrangement(eqn, [True] * len(operands)) is not None)
        )
    return value.uniform


def _one_origin(values: Sequence[Any]) -> bool:
    """Whether values are elementwise functions of one, each of which lies in the same way in what is made of them."""
    front = {(v.order, axes): v for v, axes in values}
    while len(front) > 1:
        order, axes = latest = max(front)
        value = front.pop(latest)
        held = arranged(value)
        if held is None and value.producer is not None and of(value.producer).stops:
            held = {0: tuple(range(len(axes)))}
        if held is None or not all(v.both or _is_uniform(v) for v in value.operands):
            return False  # those before it do not come from it
        front |= {(v.order, lie): v for k, v in enumerate(value.operands) if v.both
                  for lie in [_composed(held[k], axes)]}  # fmt: skip
    return True


def _reduces(eqn: Equation) -> bool:
    """Whether an equation takes a mean, a maximum or the like over axes of the array or of a mesh, but no pooling."""
    return of(eqn).statistic and eqn.params.get("axes") != ()


def is_statistic(value: Any) -> bool:
    """Whether a value comes elementwise from results of reductions, as means and variances do."""
    eqn = value.producer
    if eqn is None or _reduces(eqn):
        return eqn is not None
    if value.statistic is None:  # kept: values are shared by many
        row = of(eqn)
        mixed = [v for v in value.operands if v.both]
        passing = row.kind in ("view", "window") or row.stops or row.statistic or arranged(value) is not None
        passing = passing or (row.cuts and _over_devices(value))  # one sum over devices of several statistics
        value.statistic = bool(mixed) and passing and all(map(is_statistic, mixed))
    return value.statistic


def _over_devices(value: Any) -> bool:
    """Whether a value is cut, elementwise, from what devices have summed or compared."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        value = stack.pop()
        if value.producer is None or id(value) in seen:
            continue
        seen.add(id(value))
        row = of(value.producer)
        if row.kind == "collective":
            return True
        if row.cuts or row.kind == "view" or arranged(value) is not None:
            stack += [v for v in value.operands if v.both]
    return False


def linear_origins(values: Sequence[Any]) -> set[int]:
    """The values that these hold up to factors, terms, normalisation and views: what a layer reads of a nonlinearity.

    Products with data are not followed, exp(logvar / 2) * noise, nor quotients by what depends on both: softmax.
    """
    seen: set[int] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if value.producer is None:
            continue
        row, mixed = of(value.producer), [v for v in value.operands if v.both]
        if row.combines in ("product", "quotient"):
            kept = [v for v in mixed if row.combines == "quotient" or not is_statistic(v)]
            if kept == [value.operands[0]] or (row.combines == "product" and len(kept) == 1):
                stack += [] if any(v.data and not v.params for v in value.operands) else kept
        elif row.curve == "linear" or row.kind == "view" or row.leads:
            stack += mixed
    return seen


def _is_literal(atom: Atom) -> bool:
    return hasattr(atom, "val")
