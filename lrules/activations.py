"""Activations: elementwise nonlinear functions without parameters, found in a jaxpr.

Names come first: a `custom_jvp` function (relu) or a named `jit` (silu) with an elementwise body is one activation.
Otherwise an activation is a maximal run of elementwise equations with one root and one output that holds a nonlinear
primitive: gelu is one activation, not the tanh inside it. A lone exp, log, root, power or quotient is none (softmax,
normalisation), nor is what starts from a reduction. `activation` and `not_activation` settle the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LINEAR = {"add", "add_any", "sub", "neg", "convert_element_type", "copy", "copy_p", "reduce_precision", "name", "pvary",
          "stop_gradient", "real", "imag", "mul"}  # fmt: skip
NONLINEAR = {"max", "min", "pow", "rem", "atan2", "select_n", "clamp", "abs", "exp", "exp2", "log", "log1p", "expm1",
             "sqrt", "rsqrt", "cbrt", "tanh", "sin", "cos", "tan", "logistic", "erf", "erfc", "erf_inv", "integer_pow",
             "square", "sign", "floor", "ceil", "round", "div", "asinh", "acosh", "atanh", "asin", "acos", "atan",
             "sinh", "cosh", "lgamma", "digamma", "eq", "ne", "lt", "gt", "le", "ge", "and", "or", "not", "xor",
             "is_finite"}  # fmt: skip
NOT_ALONE = {"exp", "exp2", "log", "log1p", "sqrt", "rsqrt", "cbrt", "pow", "integer_pow", "square", "div", "mul"}
REDUCTIONS = ("reduce_", "cumsum", "cumprod", "cumlogsumexp")
NAMED = {"relu", "relu6", "silu", "swish", "elu", "celu", "selu", "gelu", "hard_tanh", "hard_sigmoid", "hard_silu",
         "hard_swish", "leaky_relu", "softplus", "soft_sign", "mish", "squareplus", "sparse_plus", "sparse_sigmoid",
         "log_sigmoid", "logistic", "sigmoid", "tanh", "relu2"}  # fmt: skip
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}
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


def call_body(eqn):
    """The jaxpr that a call equation calls, else None."""
    key = CALLS.get(eqn.primitive.name)
    if key is None:
        return None
    body = eqn.params[key]
    return None if getattr(body, "consts", ()) else getattr(body, "jaxpr", body)


def call_name(eqn) -> str:
    """The name of the function that a call equation calls."""
    if eqn.primitive.name == "custom_jvp_call":
        inner = call_body(eqn)
        if inner is not None and len(inner.eqns) == 1 and "name" in inner.eqns[0].params:
            return str(inner.eqns[0].params["name"])
        return str(eqn.params.get("name", "custom_jvp"))
    return str(eqn.params.get("name", ""))


def is_elementwise(eqn) -> bool:
    """Whether an equation acts on each element alone (a call: whether all its equations do)."""
    if eqn.primitive.name in LINEAR or eqn.primitive.name in NONLINEAR:
        return True
    body = call_body(eqn)
    return body is not None and len(eqn.outvars) == 1 and bool(body.eqns) and all(map(_pointwise, body.eqns))


def _pointwise(eqn) -> bool:
    scalar_broadcast = eqn.primitive.name == "broadcast_in_dim" and eqn.invars[0].aval.shape == ()
    return scalar_broadcast or is_elementwise(eqn)


def is_atom(eqn) -> bool:
    """Whether a call is evaluated as it stands, being elementwise as a whole."""
    return eqn.primitive.name in CALLS and is_elementwise(eqn)


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
    return [p for e in call_body(eqn).eqns for p in (_inner(e) if e.primitive.name in CALLS else [e.primitive.name])]


def find_regions(block) -> list[Region]:
    """The activations of one block, in program order."""
    jaxpr, value = block.jaxpr, block.value
    users: dict[Any, list[int]] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        for v in eqn.invars:
            if not hasattr(v, "val"):
                users.setdefault(v, []).append(index)
    for v in jaxpr.outvars:
        if not hasattr(v, "val"):
            users.setdefault(v, []).append(-1)

    def named(eqn) -> bool:
        name = call_name(eqn) if eqn.primitive.name in CALLS else ""
        return name in NAMED or name.startswith((MARK, UNMARK)) or eqn.primitive.name == "custom_jvp_call"

    candidates = {}
    for index, eqn in enumerate(jaxpr.eqns):
        if not is_elementwise(eqn) or len(eqn.outvars) != 1 or not value(eqn.outvars[0]).both:
            continue
        shape = eqn.outvars[0].aval.shape
        operands = [v for v in eqn.invars if value(v).both]
        others = [v for v in eqn.invars if not value(v).both]
        plain = all(not value(v).params and not value(v).data and v.aval.shape == () for v in others)
        if plain and operands and all(v.aval.shape == shape for v in operands):
            candidates[index] = operands

    forced: set[Any] = set()  # values at which a region ends and another may begin
    while True:
        root: dict[Any, Any] = {}
        regions: dict[Any, list[int]] = {}
        for index, operands in candidates.items():
            eqn = jaxpr.eqns[index]
            roots = {v if v in forced else root.get(v, v) for v in operands}
            out = eqn.outvars[0]
            if len(roots) > 1 or (named(eqn) and any(v in root and v not in forced for v in operands)):
                forced.update(v for v in operands if named(eqn) and v in root)
                if len(roots) > 1:
                    forced.add(out)
                    continue
                roots = {operands[0]}
            (r,) = roots
            root[out] = r
            regions.setdefault(r, []).append(index)
            if named(eqn):
                forced.add(out)
        cut = False
        for indices in regions.values():
            inside = set(indices)
            leaving = [
                jaxpr.eqns[i].outvars[0]
                for i in indices
                if any(u not in inside for u in users.get(jaxpr.eqns[i].outvars[0], [-1]))
            ]
            if len(leaving) > 1 and leaving[0] not in forced:
                forced.add(leaving[0])
                cut = True
        if not cut:
            break

    found = []
    for r, indices in regions.items():
        eqns = [jaxpr.eqns[i] for i in indices]
        produced = {e.outvars[0] for e in eqns}
        leaving = [v for v in (e.outvars[0] for e in eqns)
                   if any(u not in set(indices) for u in users.get(v, [-1]))]  # fmt: skip
        if len(leaving) != 1 or not jnp.issubdtype(leaving[0].aval.dtype, jnp.inexact):
            continue
        nonlinear = [p for e in eqns for p in _nonlinear(e, value)]
        names = [call_name(e) for e in eqns if named(e)]
        if any(n.startswith(UNMARK) for n in names) or not (nonlinear or any(n.startswith(MARK) for n in names)):
            continue
        alone = [p for p in nonlinear if p not in ("eq", "ne", "lt", "gt", "le", "ge", "and", "or", "not", "xor")]
        if not names and len(alone) == 1 and alone[0] in NOT_ALONE:
            continue
        source = value(r)
        producer = source.producer
        if not names and producer is not None and producer.primitive.name.startswith(REDUCTIONS):
            continue
        others = tuple(
            dict.fromkeys(
                v for e in eqns for v in e.invars if not hasattr(v, "val") and v is not r and v not in produced
            )
        )
        name = names[0].removeprefix(MARK) if names else "_".join(dict.fromkeys(nonlinear))
        found.append(Region(name, r, leaving[0], others, eqns, indices))
    return sorted(found, key=lambda region: region.indices[-1])
