"""Jaxprs: reading and evaluating them, and everything that changes between versions of JAX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.sharding import NamedSharding, PartitionSpec

try:
    from jax.extend.core import jaxprs_in_params
except ImportError:  # before JAX 0.10
    from jax.core import jaxprs_in_params

# JAX's types for these say too little (an `AbstractValue` has no shape), and differ between versions.
Jaxpr: TypeAlias = Any
Equation: TypeAlias = Any
Atom: TypeAlias = Any  # a variable or a literal
Aval: TypeAlias = Any  # the shape and dtype of a value

CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
         "custom_vjp_call_jaxpr": "fun_jaxpr"}  # fmt: skip

JITS = {"jit", "pjit"}

OWN_DERIVATIVE = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


def call_body(eqn: Equation) -> Any:
    """The jaxpr that a call equation calls; None for other equations."""
    key = CALLS.get(eqn.primitive.name)
    if key is None:
        return None
    body = eqn.params[key]
    return None if getattr(body, "consts", ()) else getattr(body, "jaxpr", body)


def call_name(eqn: Equation) -> str:
    """The name of the function that a call equation calls."""
    if eqn.primitive.name in OWN_DERIVATIVE:
        inner = call_body(eqn)
        if inner is not None and len(inner.eqns) == 1 and "name" in inner.eqns[0].params:
            return str(inner.eqns[0].params["name"])
        info = getattr(inner, "debug_info", None)
        return str(getattr(info, "func_name", None) or eqn.primitive.name)
    return str(eqn.params.get("name", ""))


INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
           "core_closed_call": "call_jaxpr", "remat": "jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr"}  # fmt: skip

REMATS = {"remat", "remat2", "checkpoint"}

SCAN, COND, WHILE, SHARD_MAP = "scan", "cond", "while", "shard_map"

NEW_FORMS = {  # experimental forms of JAX, and how to get the ones that are known here
    "call_hi_primitive": "turn off JAX's options jax_custom_jvp3, jax_custom_vjp3 and jax_remat3",
}

CONSTRUCTS = {SCAN, COND, WHILE, SHARD_MAP}

FOLLOWED = {*CALLS, *INLINED, *CONSTRUCTS}  # the analysis looks inside


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """The numbers of constants and carries of a scan equation."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # JAX 0.12
    return len(consts), len(carry)


def open_jaxpr(jaxpr: Jaxpr) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants, from either of its two forms."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def varying_axes(aval: Aval) -> frozenset[Any]:
    """The mesh axes along which a value differs between devices, inside a shard_map that checks it."""
    kind = getattr(aval, "manual_axis_type", None)
    return frozenset(kind.varying if kind is not None else getattr(aval, "vma", None) or ())


def as_varying(x: jax.Array, axes: Any) -> Any:
    """The same value, marked as different between devices also along these mesh axes (inside a shard_map)."""
    missing = tuple(sorted(axes - varying_axes(jax.typeof(x))))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def placed_as(x: jax.Array, aval: Aval, lead: int = 0) -> Any:
    """Places a value on devices like another value.

    On a mesh with explicit axes it is then split like the other; inside a shard_map it varies like the other.

    Args:
      x: the value.
      aval: the type of the other value, such as `jax.typeof(other)`.
      lead: the number of first axes of x that the other value does not have.

    Returns:
      The same value, on these devices.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> lrules.extend.placed_as(jnp.ones((2, 3)), jax.typeof(jnp.zeros(3)), lead=1).shape
      (2, 3)
    """
    spec, mesh = (*[None] * lead, *aval.sharding.spec), aval.sharding.mesh
    if mesh.empty or jax.typeof(x).sharding.mesh.axis_types == mesh.axis_types:
        placed = split_as(x, *spec)
    else:  # the other value is made inside jax.sharding.auto_axes
        placed = jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))
    return as_varying(placed, varying_axes(aval))


def split_as(x: jax.Array, *spec: Any) -> Any:
    """Splits a value over these explicit axes of the mesh, and over no others.

    Args:
      x: the value.
      *spec: for each axis of x, the mesh axes, or None; missing ones are None.

    Returns:
      The same value, split like this.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> lrules.extend.split_as(jnp.ones((2, 3)), None, None).shape
      (2, 3)
    """
    sharding = jax.typeof(x).sharding
    if tuple(sharding.spec) == (*spec, *[None] * (x.ndim - len(spec))):
        return x
    mesh = jax.sharding.get_abstract_mesh() if sharding.mesh.empty else sharding.mesh
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))


def same_mesh(aval: Aval) -> Any:
    """A context in which values of this type can be computed with: that of `jax.sharding.auto_axes` if it made them."""
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    if mesh is None or mesh.empty or mesh == jax.sharding.get_abstract_mesh():
        return nullcontext()
    return jax.sharding.use_abstract_mesh(mesh)


def is_literal(atom: Atom) -> bool:
    """Whether an operand is a literal in the equation."""
    return isinstance(atom, Literal)


def bind(eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation. For a part of the batch, it ignores the output sharding of the whole batch."""
    params = eqn.params
    if params.get("out_sharding") is not None and any(
        jnp.shape(value) != atom.aval.shape for value, atom in zip(values, eqn.invars, strict=True)
    ):
        params, values = params | {"out_sharding": None}, [split_as(value) for value in values]
    prepared = eqn.primitive.get_bind_params(params)
    with eqn.ctx.manager:
        if isinstance(prepared, tuple):  # before JAX 0.9
            out = eqn.primitive.bind(*prepared[0], *values, **prepared[1])
        else:
            out = eqn.primitive.bind(*values, **prepared)
    return list(out) if eqn.primitive.multiple_results else [out]


def primitives(jaxpr: Jaxpr) -> set[str]:
    """The names of all primitives in a jaxpr, and in the jaxprs inside it."""
    found = set()
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        found |= {eqn.primitive.name}.union(*map(primitives, jaxprs_in_params(eqn.params)))
    return found


def refuse_mutable(jaxpr: Jaxpr) -> None:
    """Refuses a network that writes floats into a mutable array: no equation leads from there to what is read."""
    if _writes(jaxpr):
        raise NotImplementedError(
            "the network writes floating-point numbers into a mutable array (jax.new_ref), where lrules cannot follow "
            "the error: write x = x.at[i].set(y) instead, or return new values of a state as auxiliary outputs "
            "(has_aux=True)"
        )


def _writes(jaxpr: Jaxpr) -> bool:
    """Whether a jaxpr writes floats into a mutable array, other than inside a kernel."""
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        inside = list(jaxprs_in_params(eqn.params))
        values = [v.aval for v in eqn.invars if not hasattr(v.aval, "inner_aval")]
        if len(values) < len(eqn.invars) and not inside:
            if any(jnp.issubdtype(aval.dtype, jnp.inexact) for aval in values):
                return True
        elif eqn.primitive.name in FOLLOWED and any(map(_writes, inside)):
            return True
    return False
