"""The activations for which differences of states can replace derivatives.

A difference of two states shows the values of a function, not the derivative that it declares. A spike with a surrogate
derivative and a straight-through function declare another derivative. And if states are complex, JAX sends cotangents
down by the transpose of the derivative. A difference gives the same only if the derivative is one complex number, which
means that the function is holomorphic.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrules.engine.jaxprs import OWN_DERIVATIVE, Jaxpr, bind, call_body, is_literal
from lrules.engine.operations import of
from lrules.engine.records import Block, Value
from lrules.engine.regions import Region
from lrules.extend import Activation, Graph, placed_as

FAR = np.asarray([-1e4, 1e4])
NEAR = np.asarray([-0.03, -0.01, -0.003, 0.003, 0.01, 0.03])
POINTS = np.concatenate([np.linspace(-8, 8, 257), FAR, NEAR]) + 3e-4  # at none of the usual kinks
TURNED = np.linspace(0.1, 4, 128) * np.exp(2.4j * np.arange(128))
CACHE: dict[Any, bool] = {}  # whether two derivatives, as jaxprs, are the same


def check_differences(graph: Graph, activations: Sequence[Activation]) -> None:
    """Refuses activations whose derivatives differences of states cannot replace.

    Raises:
      NotImplementedError: an activation declares a derivative that is not that of the function, or is complex and not
        holomorphic.
    """
    sites = {a.site for a in activations}
    served = graph.once("served by differences", set)  # regions, or what they compute
    for block, region in _regions(graph.block):
        site = region.activation.site
        if site not in sites:
            continue
        what = region if region.others else region.program.key or region
        if what in served:
            continue
        kinds = [jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in (region.root, region.output)]
        if any(kinds) and not (all(kinds) and _same(graph, block, region, _turned, _straight)):
            raise NotImplementedError(
                f"the activation {site!r} is complex and not holomorphic, so differences of states are not its "
                f"derivatives: write it for the real and the imaginary part, or give passing={{{site!r}}}, so that "
                "the error passes through it by its derivative"
            )
        if _declares(region.eqns) and not _same(graph, block, region, _straight, _straight, opened=True):
            raise NotImplementedError(
                f"the activation {site!r} declares a derivative that is not that of the function, and differences of "
                f"states cannot show it: give passing={{{site!r}}}, so that the error passes through it by the "
                "declared derivative, or use another rule"
            )
        served.add(what)


def _regions(block: Block) -> Iterator[tuple[Block, Region]]:
    yield from ((block, region) for region in block.regions.values())
    for children in block.children.values():
        for child in children:
            yield from _regions(child)


def _declares(eqns: Any) -> bool:
    """Whether the derivative may differ from that of the function."""
    rows, bodies = [of(eqn) for eqn in eqns], [call_body(eqn) for eqn in eqns]
    own = any(row.stops or row.name in OWN_DERIVATIVE for row in rows)
    return own or any(_declares(body.eqns) for body in bodies if body is not None)


def _straight(f: Callable[..., Any], x: jax.Array) -> Any:
    """The derivative."""
    y, pull = jax.vjp(f, x)
    return pull(jnp.ones_like(y))[0]


def _turned(f: Callable[..., Any], x: jax.Array) -> Any:
    """The derivative in another direction; it is the same if the function is holomorphic."""
    y, pull = jax.vjp(f, x)
    return pull(1j * jnp.ones_like(y))[0] / 1j


def _same(
    graph: Graph, block: Block, region: Region, one: Callable[..., Any], other: Callable[..., Any], opened: bool = False
) -> bool:
    """Whether two derivatives of an activation are the same at sample points; `opened` is for the second."""
    like = region.root.aval
    complex_ = jnp.issubdtype(like.dtype, jnp.complexfloating)
    close = 4 * float(jnp.finfo(like.dtype).eps) ** 0.5
    with jax.ensure_compile_time_eval():
        captured = [_constant(graph, block.value(v)) for v in region.others]

    def function(opened: bool) -> Callable[..., Any]:
        def f(x: jax.Array) -> Any:
            env = dict(zip(region.others, captured, strict=True)) | {region.root: x}
            return _evaluate(region.eqns, env, opened)[region.output]

        return f

    def traced(derivative: Callable[..., Any], f: Callable[..., Any]) -> Jaxpr:
        bare = jax.ShapeDtypeStruct(like.shape, like.dtype)
        return jax.make_jaxpr(lambda x: derivative(f, placed_as(x, like)))(bare)

    pair = [traced(one, function(False)), traced(other, function(opened))]
    key = (
        *(re.sub(r"\[[\d,]*\]", "", str(t.jaxpr)) for t in pair),
        *(np.asarray(c).tobytes() for t in pair for c in t.consts),
    )
    if key not in CACHE:
        a, b = (_sampled(t, TURNED if complex_ else POINTS, like.dtype) for t in pair)
        known = np.isfinite(a) & np.isfinite(b)
        CACHE[key] = bool(np.allclose(a[known], b[known], rtol=close, atol=close))
    return CACHE[key]


def _sampled(traced: Any, points: np.ndarray, dtype: Any) -> np.ndarray:
    """The values of an elementwise function at points, one by one, without shapes and shardings."""

    def at(jaxpr: Jaxpr, values: Sequence[Any]) -> list[Any]:
        env = dict(zip(jaxpr.invars, values, strict=True))
        for eqn in jaxpr.eqns:
            ins = [v.val if is_literal(v) else env[v] for v in eqn.invars]
            body = call_body(eqn)
            if body is not None:
                got = at(body, ins)
            elif of(eqn).casts:
                got = [jax.lax.convert_element_type(ins[0], eqn.params["new_dtype"])]
            else:
                got = ins if of(eqn).same or of(eqn).kind == "view" else bind(eqn, ins)
            env.update(zip(eqn.outvars, got, strict=True))
        return [v.val if is_literal(v) else env[v] for v in jaxpr.outvars]

    jaxpr = getattr(traced, "jaxpr", traced)
    consts = [jnp.ravel(c)[0] for c in traced.consts]
    with jax.ensure_compile_time_eval():
        opened = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
        values = jax.jit(jax.vmap(lambda x: at(opened, [*consts, x])[0]))(jnp.asarray(points, dtype))
        return np.asarray(values, np.result_type(points))


def _evaluate(eqns: Any, env: dict[Any, Any], opened: bool) -> dict[Any, Any]:
    """The values that equations compute; if opened, they have the derivative of the function, not a declared one."""
    for eqn in eqns:
        values = [v.val if is_literal(v) else env[v] for v in eqn.invars]
        body = call_body(eqn) if opened else None
        if opened and of(eqn).stops:
            got = values
        elif body is not None:
            inner = _evaluate(body.eqns, dict(zip(body.invars, values, strict=True)), opened)
            got = [v.val if is_literal(v) else inner[v] for v in body.outvars]
        else:
            got = bind(eqn, values)
        env.update(zip(eqn.outvars, got, strict=True))
    return env


def _constant(graph: Graph, value: Value) -> Any:
    """The value of a constant that is the same for all elements; ones if it is not known when the network is traced."""
    if value.producer is not None and len(value.producer.outvars) == 1:
        eqn = value.producer
        return bind(eqn, [v.val if is_literal(v) else _constant(graph, operand)
                          for v, operand in zip(eqn.invars, value.operands, strict=True)])[0]  # fmt: skip
    if value.place is not None and value.place[1] in value.place[0].jaxpr.constvars:
        block, variable = value.place
        consts = graph.consts if block is graph.block else block.consts
        found = dict(zip(block.jaxpr.constvars, consts, strict=True))[variable]
        if not isinstance(found, jax.core.Tracer):
            return jnp.asarray(found)
    return jnp.ones(value.aval.shape, value.aval.dtype)
