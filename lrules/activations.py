"""Activations: elementwise nonlinear functions without parameters, found in a jaxpr.

Names come first: a `custom_jvp` function (relu) or a named `jit` (silu) with an elementwise body is one activation.
Otherwise an activation is a maximal run of elementwise equations with one root and one output that holds a nonlinear
primitive: gelu is one activation, not the tanh inside it. Factors and terms before and after it are none of it, so that
0.1 * tanh(z / 2) is treated as 0.1 * relu(z / 2) is, unless they may belong to a formula: 1 / (1 + exp(-z)). A lone
exp, log, root, power or quotient is none (softmax, exp(logvar / 2)), nor is what normalisations do to means and
variances. What may be meant as an activation and is none by these rules, a square that a layer reads (as it is, scaled,
normalised or added to something), a maximum of two values, or a bent function of whole rows with a derivative of its
own, is kept as a `Doubt`, which rules that need activations refuse; `activation` and `not_activation` settle it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LINEAR = {"add", "add_any", "sub", "neg", "convert_element_type", "copy", "copy_p", "reduce_precision", "pvary",
          "real", "imag", "mul"}  # fmt: skip
NONLINEAR = {"max", "min", "pow", "rem", "atan2", "select_n", "clamp", "abs", "exp", "exp2", "log", "log1p", "expm1",
             "sqrt", "rsqrt", "cbrt", "tanh", "sin", "cos", "tan", "logistic", "erf", "erfc", "erf_inv", "integer_pow",
             "square", "sign", "floor", "ceil", "round", "div", "asinh", "acosh", "atanh", "asin", "acos", "atan",
             "sinh", "cosh", "lgamma", "digamma", "eq", "ne", "lt", "gt", "le", "ge", "and", "or", "not", "xor",
             "is_finite"}  # fmt: skip
COMPARISONS = {"eq", "ne", "lt", "gt", "le", "ge", "and", "or", "not", "xor", "is_finite"}
NOT_ALONE = {"exp", "exp2", "log", "log1p", "sqrt", "rsqrt", "cbrt", "pow", "integer_pow", "square", "div", "mul"}
OF_STATISTICS = NOT_ALONE | COMPARISONS | {"max", "min", "clamp", "select_n", "abs", "sign"}  # normalisations
PASSING = {"reduce_window_sum", "concatenate", "pad", "slice", "name", "scan"}
STOP = "stop_gradient"  # no region goes through it but to a comparison: what is behind it has no part in the derivative
VIEWS = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose"}
NAMED = {"relu", "relu6", "silu", "swish", "elu", "celu", "selu", "gelu", "hard_tanh", "hard_sigmoid", "hard_silu",
         "hard_swish", "leaky_relu", "softplus", "soft_sign", "mish", "squareplus", "sparse_plus", "sparse_sigmoid",
         "log_sigmoid", "logistic", "sigmoid", "tanh", "relu2"}  # fmt: skip
ALIASES = {"integer_pow_tanh_mul": "gelu", "erfc_mul": "gelu", "erf_mul": "gelu", "logistic": "sigmoid",
           "logistic_mul": "silu"}  # fmt: skip
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
         "custom_vjp_call_jaxpr": "fun_jaxpr"}  # fmt: skip
OWN_DERIVATIVE = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
MARK, UNMARK = "lrules_activation_", "lrules_not_activation_"


def activation(fn: Callable) -> Callable:
    """Marks an elementwise function as one activation, for rules that need to know.

    Args:
      fn: `x -> y` of the same shape, without parameters.

    Returns:
      The same function under a name that the library recognises.

    Example:
      >>> bent = activation(lambda x: x + jnp.sin(x))
      >>> float(bent(0.0))
      0.0
    """
    return _named(fn, MARK)


def not_activation(fn: Callable) -> Callable:
    """Marks a function as holding no activation, for rules that would otherwise take one in it for such.

    Args:
      fn: any function.

    Returns:
      The same function under a name that the library recognises.
    """
    return _named(fn, UNMARK)


def sampled(fn: Callable, like) -> tuple[np.ndarray, np.ndarray]:
    """Points from -8 to 8 and two far ones, in increasing order, and what an activation makes of them.

    Args:
      fn: the activation, as handlers get it.
      like: what it acts on, of whose shape and dtype it is asked.

    Raises:
      jax.errors.JAXTypeError: it uses numbers that are not known when the network is traced.
    """
    grid = np.concatenate([[-1e4], np.linspace(-8, 8, 65), [1e4]])
    size = max(int(np.prod(like.shape)), 1)
    known = jax.jit(fn)  # without, a custom_jvp under vmap gives a tracer even for known numbers
    points, values = [], []
    for i in range(0, len(grid), size):
        with jax.ensure_compile_time_eval():
            part = jnp.asarray(np.resize(grid[i : i + size], like.shape), like.dtype)
            points.append(np.asarray(part, np.float64).ravel())
            values.append(np.asarray(known(part), np.float64).ravel())
    return np.concatenate(points)[: len(grid)], np.concatenate(values)[: len(grid)]


def _named(fn: Callable, prefix: str) -> Callable:
    def renamed(*args, **kwargs):
        return fn(*args, **kwargs)

    renamed.__name__ = renamed.__qualname__ = prefix + getattr(fn, "__name__", "function").strip("<>")
    return jax.jit(renamed)


@dataclasses.dataclass(eq=False)
class Region:
    """An activation's equations, from its root to its output."""

    name: str
    root: Any
    output: Any
    others: tuple[Any, ...]
    eqns: list[Any]
    indices: list[int]
    activation: Any = None


@dataclasses.dataclass(frozen=True)
class Doubt:
    """A nonlinearity that is no activation by the rules above, and may be meant as one.

    Attributes:
      name: its primitives.
      output: the variable that it gives; None if it is one whatever reads it.
    """

    name: str
    output: Any = None


def refuse_doubts(doubts: Sequence[Doubt]) -> None:
    """For rules that treat activations specially.

    Raises:
      NotImplementedError: a nonlinearity is neither recognised as an activation nor said to be none.
    """
    if doubts:
        raise NotImplementedError(
            f"the nonlinearity {doubts[0].name} is not recognised as an activation, which this rule needs to know: "
            "write it as lrules.activation(f)(x), with f elementwise and without parameters, or, if error is to pass "
            "through it by its derivative, as lrules.not_activation(f)(x)"
        )


def call_body(eqn):
    """The jaxpr that a call equation calls, else None."""
    key = CALLS.get(eqn.primitive.name)
    if key is None:
        return None
    body = eqn.params[key]
    return None if getattr(body, "consts", ()) else getattr(body, "jaxpr", body)


def call_name(eqn) -> str:
    """The name of the function that a call equation calls."""
    if eqn.primitive.name in OWN_DERIVATIVE:
        inner = call_body(eqn)
        if inner is not None and len(inner.eqns) == 1 and "name" in inner.eqns[0].params:
            return str(inner.eqns[0].params["name"])
        info = getattr(inner, "debug_info", None)
        return str(getattr(info, "func_name", None) or eqn.primitive.name)
    return str(eqn.params.get("name", ""))


def is_elementwise(eqn, opaque: bool = False) -> bool:
    """Whether an equation acts on each element alone (a call: whether all its equations do).

    Inside an `opaque` call, whose derivative is its own or which is marked, there may be a `stop_gradient`.
    """
    name = eqn.primitive.name
    if name in LINEAR or name in NONLINEAR or (opaque and name == STOP):
        return True
    body = call_body(eqn)
    if body is None or len(eqn.outvars) != 1:
        return False
    marked = call_name(eqn).startswith(MARK)
    opaque = opaque or marked or name in OWN_DERIVATIVE
    return all(_pointwise(inner, opaque) for inner in body.eqns) and (bool(body.eqns) or marked)


def _pointwise(eqn, opaque: bool) -> bool:
    scalar_broadcast = eqn.primitive.name == "broadcast_in_dim" and eqn.invars[0].aval.shape == ()
    return scalar_broadcast or is_elementwise(eqn, opaque)


def is_atom(eqn, ins) -> bool:
    """Whether a call is evaluated as it stands: elementwise as a whole, and a function of one value alone."""
    if eqn.primitive.name not in CALLS or not is_elementwise(eqn):
        return False
    mixed = [v for v in ins if v.both]
    if any(not v.both and not _plain(v) for v in ins):
        return False
    return len(mixed) <= 1 or len(_origins(mixed)) == 1


def _plain(value) -> bool:
    """A constant that is the same for all elements."""
    if value.params or value.data:
        return False
    if getattr(value.aval, "shape", None) == ():
        return True
    spread = value.producer is not None and value.producer.primitive.name == "broadcast_in_dim"
    return spread and value.operands[0].aval.shape == ()


def _origins(values) -> set[int]:
    """Where elementwise functions of one value each lead back to; more than one in doubt."""
    found: set[int] = set()
    seen: set[int] = set()
    stack = list(values)
    while stack and len(found) < 2:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        eqn = value.producer
        followed = eqn is not None and (is_elementwise(eqn) or eqn.primitive.name == STOP)
        if followed and all(v.both or _plain(v) for v in value.operands):
            stack += [v for v in value.operands if v.both]
        else:
            found.add(id(value))
    return found


def _is_statistic(value) -> bool:
    """Whether a value comes elementwise from results of reductions, as means and variances do."""
    eqn = value.producer
    if eqn is None:
        return False
    name = eqn.primitive.name
    if name.startswith(("reduce_", "cumsum", "cumprod", "cumlogsumexp")) and not name.startswith("reduce_window"):
        return name != "reduce_precision"
    if value.statistic is None:  # kept: values are shared by many
        mixed = [v for v in value.operands if v.both]
        passing = name in VIEWS or name == STOP or is_elementwise(eqn)
        value.statistic = bool(mixed) and passing and all(map(_is_statistic, mixed))
    return value.statistic


def linear_origins(values) -> set[int]:
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
        name = value.producer.primitive.name if value.producer is not None else ""
        mixed = [v for v in value.operands if v.both]
        if name in ("mul", "div"):
            kept = [v for v in mixed if name == "div" or not _is_statistic(v)]
            if kept == [value.operands[0]] or (name == "mul" and len(kept) == 1):
                stack += [] if any(v.data and not v.params for v in value.operands) else kept
        elif name in LINEAR or name in VIEWS or name in PASSING:
            stack += mixed
    return seen


def _nonlinear(eqn, value) -> list[str]:
    """The nonlinear primitives of an elementwise equation."""
    name = eqn.primitive.name
    if name == "mul":
        return ["mul"] if sum(value(v).params != frozenset() for v in eqn.invars) > 1 else []
    if name == "div":
        return ["div"] if value(eqn.invars[1]).params else []
    body = call_body(eqn)
    if body is not None:
        return [p for e in body.eqns for p in (_inner(e) if e.primitive.name in CALLS else [e.primitive.name])
                if p in NONLINEAR]  # fmt: skip
    return [name] if name in NONLINEAR else []


def _inner(eqn) -> list[str]:
    eqns = getattr(call_body(eqn), "eqns", ())
    return [p for e in eqns for p in (_inner(e) if e.primitive.name in CALLS else [e.primitive.name])]


def _is_literal(atom) -> bool:
    return hasattr(atom, "val")


def _is_named(eqn) -> bool:
    name = call_name(eqn) if eqn.primitive.name in CALLS else ""
    return name in NAMED or name.startswith((MARK, UNMARK)) or eqn.primitive.name in OWN_DERIVATIVE


def find_regions(block) -> tuple[list[Region], list[Doubt]]:
    """The activations of one block, in program order, and what may be one."""
    eqns, value = block.jaxpr.eqns, block.value
    users: dict[Any, set[int]] = {}
    for index, eqn in [*enumerate(eqns), (-1, None)]:
        for v in block.jaxpr.outvars if eqn is None else eqn.invars:
            if not _is_literal(v):
                users.setdefault(v, set()).add(index)

    def compared(eqn) -> bool:
        asks = [i >= 0 and eqns[i].primitive.name in COMPARISONS for i in users.get(eqn.outvars[0], {-1})]
        return eqn.primitive.name == STOP and all(asks)

    candidates: dict[int, list[Any]] = {}  # the operands of elementwise equations that depend on parameters and data
    for index, eqn in enumerate(eqns):
        if len(eqn.outvars) != 1 or not value(eqn.outvars[0]).both or not (is_elementwise(eqn) or compared(eqn)):
            continue
        operands = [v for v in eqn.invars if value(v).both]
        others = [v for v in eqn.invars if not value(v).both]
        shape = eqn.outvars[0].aval.shape
        if all(_plain(value(v)) for v in others) and all(v.aval.shape == shape for v in operands):
            candidates[index] = operands

    def output(index):
        return eqns[index].outvars[0]

    cuts: set[Any] = set()  # values at which one region ends and another may begin
    while True:
        root: dict[Any, Any] = {}
        groups: dict[Any, list[int]] = {}
        for index, operands in candidates.items():
            roots = {v if v in cuts else root.get(v, v) for v in operands}
            if _is_named(eqns[index]):
                cuts.update(v for v in operands if v in root)
                if len(set(operands)) == 1:
                    groups["named", index] = [index]
                cuts.add(output(index))
            elif len(roots) == 1:
                (root[output(index)],) = roots
                groups.setdefault(root[output(index)], []).append(index)
            else:
                cuts.add(output(index))
        more = {
            output(i)
            for indices in groups.values()
            for i in indices
            if users.get(output(i), {-1}) & set(indices) and users[output(i)] - set(indices)
        }
        if more <= cuts:
            break
        cuts |= more

    found, doubts = [], []
    for key, indices in groups.items():
        inside = set(indices)
        for last in indices:
            if users.get(output(last), {-1}) <= inside:
                continue
            needed, stack = {last}, [last]
            while stack:
                wanted = [v for v in eqns[stack.pop()].invars if not _is_literal(v)]
                fresh = [i for i in indices if i not in needed and output(i) in wanted and output(i) not in cuts]
                needed.update(fresh)
                stack += fresh
            start, kept = candidates[last][0] if isinstance(key, tuple) else key, sorted(needed)
            if not isinstance(key, tuple):
                start, kept = _trimmed(block, start, kept, candidates)
            region = _region(block, start, kept)
            if isinstance(region, Region):
                found.append(region)
            elif region is not None:
                doubts.append(region)
    inside = {i for region in found for i in region.indices}
    doubts += [
        Doubt(eqn.primitive.name)
        for index, eqn in enumerate(eqns)
        if index not in inside and index not in {i for indices in groups.values() for i in indices}
        and len(eqn.outvars) == 1 and value(eqn.outvars[0]).both and (_bends(eqn, value) or _hides(eqn))
    ]  # fmt: skip
    return sorted(found, key=lambda region: region.indices[-1]), doubts


def _trimmed(block, start, indices: list[int], candidates) -> tuple[Any, list[int]]:
    """The region without the factors and terms at its ends, unless they may belong to a formula."""
    eqns = block.jaxpr.eqns

    def affine(index):
        operands, eqn = candidates[index], eqns[index]
        linear = eqn.primitive.name in LINEAR or (eqn.primitive.name == "div" and eqn.invars[0] is operands[0])
        return linear and len(operands) == 1

    def formula(index):
        return eqns[index].primitive.name in NOT_ALONE - {"mul"}

    front, value, readers = 0, start, indices  # how many lead to the first that bends
    while len(readers := [i for i in indices if value in candidates[i]]) == 1 and affine(readers[0]):
        front, value = front + 1, eqns[readers[0]].outvars[0]
        if readers[0] == indices[-1]:
            return start, indices
    if all(map(formula, readers)):  # but the number by which a mean divides is none of it
        producer = block.value(start).producer
        mean = producer is not None and producer.primitive.name in ("reduce_sum", "reduce_window_sum")
        front = int(mean and front > 0 and eqns[indices[0]].primitive.name in ("div", "mul"))
    for i in indices[:front]:
        start = eqns[i].outvars[0]
    indices = back = indices[front:]
    while len(back) > 1 and affine(back[-1]):
        operand = candidates[back[-1]][0]
        back = back[: 1 + next(n for n, i in enumerate(back) if eqns[i].outvars[0] is operand)]
    return start, indices if formula(back[-1]) else back


def _region(block, start, indices) -> Region | Doubt | None:
    eqns, value = [block.jaxpr.eqns[i] for i in indices], block.value
    out = eqns[-1].outvars[0]
    calls = [call_name(e) for e in eqns if _is_named(e)]
    marked = any(n.startswith(MARK) for n in calls)
    nonlinear = [p for e in eqns for p in _nonlinear(e, value)]
    if any(n.startswith(UNMARK) for n in calls) or not (nonlinear or marked):
        return None
    if not jnp.issubdtype(out.aval.dtype, jnp.inexact):
        return None
    primitives = "_".join(dict.fromkeys(nonlinear))
    if not any(n in NAMED or n.startswith(MARK) for n in calls):
        if set(nonlinear) <= OF_STATISTICS and _is_statistic(value(start)):
            return None
        if len(nonlinear) == 1 and nonlinear[0] in NOT_ALONE:
            return Doubt(primitives, out)
    produced = {e.outvars[0] for e in eqns}
    free = (v for e in eqns for v in e.invars if not _is_literal(v) and v is not start and v not in produced)
    name = calls[0].removeprefix(MARK) if calls else ALIASES.get(primitives, primitives)
    return Region(name, start, out, tuple(dict.fromkeys(free)), eqns, indices)


def _hides(eqn) -> bool:
    """Whether a function with a derivative of its own, of more than one element, holds what may be an activation."""
    of_several = eqn.primitive.name in OWN_DERIVATIVE and not is_elementwise(eqn)
    return of_several and not (NONLINEAR - OF_STATISTICS).isdisjoint(_inner(eqn))


def _bends(eqn, value) -> bool:
    """Whether an elementwise equation of several values bends one of them, as max and select do."""
    mixed = [v for v in eqn.invars if value(v).both]
    if all(_is_statistic(value(v)) for v in mixed):
        return False
    name = eqn.primitive.name
    if name == "select_n":
        return value(eqn.invars[0]).both
    return name in NONLINEAR - NOT_ALONE - COMPARISONS
