"""Activations: elementwise nonlinear functions without parameters, found in a jaxpr.

Names come first: a `custom_jvp` function (relu) or a named `jit` (silu) with an elementwise body is one activation.
Otherwise an activation is a maximal run of elementwise equations with one root and one output that holds a nonlinear
primitive: gelu is one activation, not the tanh inside it. Factors and terms before and after it are none of it, so that
0.1 * tanh(z / 2) is treated as 0.1 * relu(z / 2) is, unless they may belong to a formula: 1 / (1 + exp(-z)). A lone
exp, log, root, power or quotient is none (softmax, exp(logvar / 2)), nor is what normalisations do to means and
variances. What may be meant as an activation and is none by these rules, a square that a layer reads (as it is, scaled,
normalised or added to something), a maximum of two values, or a bent function of whole rows with a derivative of its
own, is kept as a `Doubt`, which rules that need activations refuse; `activation` and `not_activation` settle it inside
the model, an option `passing=` of the rule from outside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
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
BENDING = NONLINEAR - NOT_ALONE - COMPARISONS
OF_STATISTICS = NOT_ALONE | COMPARISONS | {"max", "min", "clamp", "select_n", "abs", "sign"}  # normalisations
REDUCING = ("reduce_", "cumsum", "cumprod", "cumlogsumexp", "psum", "pmax", "pmin")  # how their names begin
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
Axes = tuple[int, ...]  # for each axis of one value, the axis of another that it is
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
    """An activation's equations, from its root to its output; `axes` says how the root lies in the output."""

    name: str
    root: Any
    output: Any
    others: tuple[Any, ...]
    eqns: list[Any]
    indices: list[int]
    axes: Axes
    activation: Any = None


@dataclasses.dataclass(frozen=True)
class Doubt:
    """A nonlinearity that is no activation by the rules above, and may be meant as one.

    Attributes:
      name: its primitives.
      output: the variable that it gives; None if it is one whatever reads it.
      why: what keeps a marked function from being an activation.
    """

    name: str
    output: Any = None
    why: str = ""


def passing_names(passing: str | Iterable[str]) -> frozenset[str]:
    """The names that an option `passing=` gives.

    Raises:
      ValueError: it is neither a name nor several.
    """
    names = [passing] if isinstance(passing, str) else list(passing) if isinstance(passing, Iterable) else [None]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f'passing={passing!r} names no functions: give names, such as {{"exp", "tanh#2"}}')
    return frozenset(names)


def treated(graph, passing: frozenset[str] = frozenset()) -> list[Any]:
    """The activations of a network for rules that treat them specially: all but those that `passing` names.

    Raises:
      NotImplementedError: a nonlinearity is neither recognised as an activation nor said to be none.
      ValueError: a name in `passing` is that of nothing in the network.
    """
    names = {name for a in graph.activations for name in (a.name, a.site)} | set(graph.nonlinearities)
    for name in sorted(passing - names):
        there = f"give one of {', '.join(map(repr, sorted(names)))}" if names else "leave it out, it has none"
        raise ValueError(f"passing: {name!r} is no activation and no nonlinearity of this network: {there}")
    doubts = {d.name: f"{d.name} ({d.why})" if d.why else d.name for d in graph.doubts if d.name not in passing}
    if doubts:
        named = sorted(doubts)
        what, are, kind = "nonlinearities", "are", "activations"
        if len(named) == 1:
            what, are, kind = "nonlinearity", "is", "an activation"
        raise NotImplementedError(
            f"the {what} {', '.join(doubts[name] for name in named)} {are} not recognised as {kind}, "
            "which this rule needs to know: write it as lrules.activation(f)(x), with f elementwise and "
            "without parameters, or, if error is to pass through it by its derivative, as lrules.not_activation(f)(x), "
            f"or give the rule passing={{{', '.join(map(repr, named))}}}"
        )
    return [a for a in graph.activations if passing.isdisjoint((a.name, a.site))]


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


def arrangement(eqn, plain: Sequence[bool], opaque: bool = False) -> dict[int, Axes] | None:
    """How the operands of an equation that acts on each element alone lie in its output; None if it does not.

    For each operand, by position, the axis of it that each axis of the output is (`vmap` transposes where batches lie
    in different places). A call acts on each element alone if all its equations do. `plain` says which operands are
    constants that are the same for all elements, and may therefore be broadcast; they have no part in the arrangement.
    Inside an `opaque` call, whose derivative is its own or which is marked, there may be a `stop_gradient`.
    """
    name = eqn.primitive.name
    moving = [k for k, p in enumerate(plain) if not p]
    if name in LINEAR or name in NONLINEAR or (opaque and name == STOP):
        if any(len(eqn.invars[k].aval.shape) != len(eqn.outvars[0].aval.shape) for k in moving):
            return None  # one choice for all elements
        return {k: tuple(range(len(eqn.invars[k].aval.shape))) for k in moving}
    if name == "transpose":
        return {k: tuple(eqn.params["permutation"]) for k in moving}
    body = call_body(eqn)
    if body is None or len(eqn.outvars) != 1:
        return None
    marked = call_name(eqn).startswith(MARK)
    opaque = opaque or marked or name in OWN_DERIVATIVE
    known: dict[Any, dict[int, Axes]] = {}  # what each value in the body holds of the operands
    for k, (v, p) in enumerate(zip(body.invars, plain, strict=True)):
        known[v] = {} if p or not v.aval.shape else {k: tuple(range(len(v.aval.shape)))}
    for inner in body.eqns:
        held = [{} if _is_literal(v) else known.get(v) for v in inner.invars]
        if None in held:
            return None
        steps = arrangement(inner, [not h for h in held], opaque)
        if steps is None and not (inner.primitive.name in VIEWS and not any(held)):
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


def arranged(value) -> dict[int, Axes] | None:
    """The arrangement of the equation that produces a value; None where it is not elementwise."""
    if value.arranged is False:  # not asked yet: values are shared by many
        eqn, operands = value.producer, value.operands
        whole = eqn is not None and len(operands) == len(eqn.invars)  # no loop, no branch
        value.arranged = arrangement(eqn, [_plain(v) for v in operands]) if whole else None
    return value.arranged


def is_atom(eqn, ins) -> bool:
    """Whether a call is evaluated as it stands: elementwise as a whole, and a function of one value alone."""
    held = arrangement(eqn, [_plain(v) for v in ins]) if eqn.primitive.name in CALLS else None
    if held is None or any(not v.both and not _plain(v) for v in ins):
        return False
    return _one_origin([(v, held[k]) for k, v in enumerate(ins) if v.both])


def _plain(value) -> bool:
    """A constant that is the same for all elements."""
    if value.params or value.data:
        return False
    if value.plain is None:  # kept: values are shared by many
        eqn, operands = value.producer, value.operands
        value.plain = False  # what a loop makes of itself is none
        value.plain = getattr(value.aval, "shape", None) == () or (
            eqn is not None
            and len(operands) == len(eqn.invars)
            and bool(operands)
            and all(map(_plain, operands))
            and (eqn.primitive.name in VIEWS or arrangement(eqn, [True] * len(operands)) is not None)
        )
    return value.plain


def _one_origin(values) -> bool:
    """Whether values are elementwise functions of one, each of which lies in the same way in what is made of them."""
    front = {(v.order, axes): v for v, axes in values}
    while len(front) > 1:
        order, axes = latest = max(front)
        value = front.pop(latest)
        held = arranged(value)
        if held is None and value.producer is not None and value.producer.primitive.name == STOP:
            held = {0: tuple(range(len(axes)))}
        if held is None or not all(v.both or _plain(v) for v in value.operands):
            return False  # those before it do not come from it
        front |= {(v.order, lie): v for k, v in enumerate(value.operands) if v.both
                  for lie in [_composed(held[k], axes)]}  # fmt: skip
    return True


def _reduces(eqn) -> bool:
    """Whether an equation takes a mean, a maximum or the like over axes of the array or of a mesh, but no pooling."""
    name = eqn.primitive.name
    if not name.startswith(REDUCING) or name.startswith(("reduce_window", "reduce_precision")):
        return False
    return eqn.params.get("axes") != ()


def _is_statistic(value) -> bool:
    """Whether a value comes elementwise from results of reductions, as means and variances do."""
    eqn = value.producer
    if eqn is None or _reduces(eqn):
        return eqn is not None
    if value.statistic is None:  # kept: values are shared by many
        name = eqn.primitive.name
        mixed = [v for v in value.operands if v.both]
        passing = name in VIEWS or name == STOP or name.startswith(REDUCING) or arranged(value) is not None
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

    def selected(eqn) -> bool:
        """Whether an equation is no transpose, or one such as `vmap` makes of what a select of several values reads."""
        readers = [eqns[i] for i in users.get(eqn.outvars[0], ()) if i >= 0]
        asks = [e.primitive.name in ("select_n", *CALLS) and sum(value(v).both for v in e.invars) > 1 for e in readers]
        return eqn.primitive.name != "transpose" or (all(asks) and -1 not in users.get(eqn.outvars[0], ()))

    candidates: dict[int, list[Any]] = {}  # the operands of elementwise equations that depend on parameters and data
    for index, eqn in enumerate(eqns):
        if len(eqn.outvars) != 1 or not value(eqn.outvars[0]).both or not selected(eqn):
            continue
        if value(eqn.outvars[0]).producer is not eqn:  # a call that is not evaluated as it stands
            continue
        operands = [v for v in eqn.invars if value(v).both]
        others = [v for v in eqn.invars if not value(v).both]
        if all(_plain(value(v)) for v in others) and (compared(eqn) or _lies(block, eqn, operands)):
            candidates[index] = operands

    def output(index):
        return eqns[index].outvars[0]

    named = {index for index in candidates if _is_named(eqns[index])}
    cuts = {v for i in named for v in (*candidates[i], output(i))}  # where one region ends and another may begin

    def grouped() -> dict[Any, list[int]]:
        """Candidates by their common root; a named one stands alone."""
        root: dict[Any, tuple[Any, Axes]] = {}  # and how it lies in the value
        groups: dict[Any, list[int]] = {}
        for index, operands in candidates.items():
            steps = _steps(block, eqns[index])
            roots = set()
            for v, step in zip(operands, steps, strict=True):
                start, axes = root[v] if v in root and v not in cuts else (v, tuple(range(len(v.aval.shape))))
                roots.add((start, _composed(axes, step)))
            if index in named:
                if len(set(zip(operands, steps, strict=True))) == 1:
                    groups["named", index] = [index]
            elif len(roots) == 1:
                (root[output(index)],) = roots
                groups.setdefault(root[output(index)][0], []).append(index)
            else:
                cuts.add(output(index))
        return groups

    def region(key, indices: list[int], last: int) -> Region | Doubt | None:
        """What ends with this equation."""
        needed, stack = {last}, [last]
        while stack:
            wanted = [v for v in eqns[stack.pop()].invars if not _is_literal(v)]
            fresh = [i for i in indices if i not in needed and output(i) in wanted and output(i) not in cuts]
            needed.update(fresh)
            stack += fresh
        if isinstance(key, tuple):
            return _region(block, candidates[last][0], sorted(needed))
        return _region(block, *_trimmed(block, key, sorted(needed), candidates))

    while True:
        groups = grouped()
        shared = {output(i) for indices in groups.values() for i in indices
                  if users.get(output(i), {-1}) & set(indices) and users[output(i)] - set(indices)}  # fmt: skip
        ends = [] if shared - cuts else [
            region(key, indices, last) for key, indices in groups.items() for last in indices
            if users.get(output(last), {-1}) - set(indices)
        ]  # fmt: skip
        found = list({end.output: end for end in ends if isinstance(end, Region)}.values())
        inside = {i for region in found for i in region.indices}
        inner = {output(i) for region in found for i in region.indices[:-1]}
        seen = {v for region in found for v in (region.root, region.output, *region.others)}
        seen |= {v for v, readers in users.items() if readers - inside}
        shared |= inner & seen  # what a region keeps to itself nobody else reads
        if shared <= cuts:
            break
        cuts |= shared
    grouping = {i for indices in groups.values() for i in indices}
    doubts = [end for end in ends if isinstance(end, Doubt)]
    doubts += [
        Doubt(_doubted(eqn))
        for index, eqn in enumerate(eqns)
        if index not in grouping and len(eqn.outvars) == 1 and value(eqn.outvars[0]).both
        and (_bends(eqn, value) or _hides(eqn, value))
    ]  # fmt: skip
    return sorted(found, key=lambda region: region.indices[-1]), doubts


def _steps(block, eqn) -> list[Axes]:
    """How each operand of a candidate that depends on parameters and data lies in its output."""
    held = arranged(block.value(eqn.outvars[0])) or {}
    same = tuple(range(len(eqn.outvars[0].aval.shape)))
    return [held.get(k, same) for k, v in enumerate(eqn.invars) if block.value(v).both]


def _lies(block, eqn, operands) -> bool:
    """Whether an equation is elementwise, of operands of its output's shape up to the order of the axes."""
    shape = eqn.outvars[0].aval.shape
    return arranged(block.value(eqn.outvars[0])) is not None and all(
        len(v.aval.shape) == len(shape) and tuple(v.aval.shape[i] for i in step) == shape
        for v, step in zip(operands, _steps(block, eqn), strict=True)
    )


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
        mean = producer is not None and producer.primitive.name.startswith(("reduce_sum", "reduce_window_sum", "psum"))
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
    lies = {start: tuple(range(len(start.aval.shape)))}
    for e in eqns:
        v = next(v for v in e.invars if value(v).both)
        lies[e.outvars[0]] = _composed(lies[v], _steps(block, e)[0])
    return Region(name, start, out, tuple(dict.fromkeys(free)), eqns, indices, lies[out])


def _hides(eqn, value) -> bool:
    """Whether a function with a derivative of its own, of more than one element, holds what may be an activation."""
    of_several = eqn.primitive.name in OWN_DERIVATIVE and arranged(value(eqn.outvars[0])) is None
    return of_several and not (NONLINEAR - OF_STATISTICS).isdisjoint(_inner(eqn))


def _doubted(eqn) -> str:
    """The name of an equation of several values that may be meant as an activation."""
    if eqn.primitive.name in OWN_DERIVATIVE:
        return call_name(eqn)
    bent = [p for p in _inner(eqn) if p in BENDING]
    return "_".join(dict.fromkeys(bent)) or eqn.primitive.name


def _bends(eqn, value) -> bool:
    """Whether an elementwise equation of several values bends one of them, as max and select do."""
    mixed = [v for v in eqn.invars if value(v).both]
    if all(_is_statistic(value(v)) for v in mixed):
        return False
    name = eqn.primitive.name
    if name in CALLS and value(eqn.outvars[0]).producer is eqn and arranged(value(eqn.outvars[0])) is not None:
        return not BENDING.isdisjoint(_inner(eqn))
    return value(eqn.invars[0]).both if name == "select_n" else name in BENDING
