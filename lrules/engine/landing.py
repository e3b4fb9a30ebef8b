"""Bringing the output error to hidden signals, and the gradients of direct feedback weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lrules.engine.dtypes import at_least_float32
from lrules.engine.jaxprs import placed_as, split_as
from lrules.engine.plan import Plan
from lrules.engine.recomputed import Matrix, reduced
from lrules.engine.reshapes import moved
from lrules.engine.returned import arriving, learned_by
from lrules.engine.weights import DirectFeedback, draw_reduction
from lrules.rule import Direct
from lrules.typing import Pytree


def _spec(x: jax.Array) -> Any:
    """The explicit mesh axes over which the axes of an array are split."""
    return jax.typeof(x).sharding.spec


def output_error(plan: Plan, errors: Pytree) -> jax.Array:
    """Collects the cotangents of the outputs, flattened per example.

    Args:
      plan: a plan with direct feedback.
      errors: the cotangents of the outputs, or of the ends of `run_to_heads`.

    Returns:
      The output error, `[batch, outputs]`.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> from lrules import extend
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> net, x = lrules.Network(net), jnp.ones((5, 3))
      >>> spec = extend.Direct(lambda e, b, targets, name: extend.project(e, b), jnp.ones)
      >>> plan = extend.make_plan(net, net.graph(params, x), params, x, lambda name: spec)
      >>> extend.output_error(plan, jnp.ones((5, 2))).shape
      (5, 2)
    """
    flat, leaves = [], jax.tree.leaves(errors)
    for head in plan.heads.values():
        leaves[head.output] = head.arranged(leaves[head.output])
    for error, axis in zip(leaves, plan.output_axes, strict=True):
        if axis is not None and jnp.issubdtype(error.dtype, jnp.inexact):
            error = split_as(error, *[None] * axis.axis, _spec(error)[axis.axis])  # only the batch stays split
            flat.append(moved(error, [axis.axis], [0]).reshape(plan.batch, -1))
    dtype = jnp.result_type(*[x.dtype for x in flat]) if len({x.dtype for x in flat}) == 1 else jnp.float32
    return jnp.concatenate([x.astype(dtype) for x in flat], axis=1) if len(flat) > 1 else flat[0]


def sent_error(plan: Plan, spec: Direct, e: jax.Array, feedback: Mapping[str, Any]) -> jax.Array:
    """Prepares the output error for sending: with the shared axes in front, normalised, and reduced to a rank.

    Args:
      plan: a plan with direct feedback.
      spec: the direct rule.
      e: the result of `output_error`.
      feedback: the feedback weights by name.

    Returns:
      The error, `[*shared, batch, outputs]`, or `[*shared, batch, rank]`.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> from lrules import extend
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> net, x = lrules.Network(net), jnp.ones((5, 3))
      >>> spec = extend.Direct(lambda e, b, targets, name: extend.project(e, b), jnp.ones)
      >>> plan = extend.make_plan(net, net.graph(params, x), params, x, lambda name: spec)
      >>> extend.sent_error(plan, spec, extend.output_error(plan, jnp.ones((5, 2))), {}).shape
      (5, 2)
    """
    if spec.shared_axes:
        (aval, batch_axis) = plan.graph.outs[0].aval, plan.output_axes[0].axis  # type: ignore[union-attr]
        e = e.reshape(plan.batch, *(n for i, n in enumerate(aval.shape) if i != batch_axis))
        axes = [out + 1 if out < batch_axis else out for out, _ in spec.shared_axes]
        e = moved(e, axes, range(len(axes)))
        e = e.reshape(*e.shape[: len(axes) + 1], -1)
    if spec.normalise_error:
        assert plan.elements is not None
        e = (_unit(e) / plan.elements).astype(e.dtype)
    for name, (owner, shape, dtype) in plan.reduced.items():
        if owner is spec and spec.storage == "recomputed":
            e = reduced(e.astype(dtype), feedback[name], Matrix(draw_reduction, *shape, dtype, name))
        elif owner is spec:
            e = jnp.tensordot(e.astype(feedback[name].dtype), feedback[name], axes=1)
    return e


def _unit(e: jax.Array) -> jax.Array:
    """Vectors of length one; zeros stay zero. Their largest number is 1 first, so that no square underflows."""
    e = e.astype(at_least_float32(e.dtype))
    e = e / jnp.max(jnp.abs(e), axis=-1, keepdims=True, initial=jnp.finfo(e.dtype).tiny)
    length = jnp.linalg.norm(e, axis=-1, keepdims=True)
    return e / jnp.where(length == 0, jnp.ones_like(length), length)


def land(landing: DirectFeedback, e: jax.Array, b: Any, signal: Callable[..., Any]) -> jax.Array:
    """The error at the definition of one hidden signal, with the axes of the scans around it in front.

    Args:
      landing: the place.
      e: the error that is sent.
      b: the feedback weight.
      signal: the function of the rule, `(e, b) -> [batch, *hidden]`. It is called once for all iterations that share b.
    """
    hidden, shared = landing.hidden, landing.shared
    turns = [i for i, (kind, _) in enumerate(shared) if kind == "loop"]
    places = {i: place for i, (kind, place) in enumerate(shared) if kind == "axis"}
    e = split_as(e, *[None] * len(shared), landing.batch_split)
    b = landing.weight(b)

    def one(e: jax.Array, b: Any) -> jax.Array:  # [*shared, batch, *hidden without shared axes]
        return arriving(landing, signal(e, b), e)

    # Where JAX finds shared axes: behind the batch, where the network has them, it copies less.
    behind = 0 if turns else 1
    if behind:
        e = moved(e, range(len(shared)), range(1, len(shared) + 1))
    for _ in shared:
        one = jax.vmap(one, in_axes=(behind, None), out_axes=behind)
    define = landing.defined
    for _ in turns:
        define = jax.vmap(define)

    def arrive(b: Any) -> jax.Array:
        s = moved(one(e, b), turns, range(len(turns)))
        front = [len(turns) + behind + k for k in range(len(places))]
        return define(moved(s, front, [len(turns) + 1 + place for place in places.values()]))

    for _ in landing.lengths:  # feedback that is drawn again is drawn for one iteration after the other
        arrive = functools.partial(jax.lax.map, arrive) if landing.spec.storage == "recomputed" else jax.vmap(arrive)
    out = arrive(b)
    if not hidden.loops:
        return placed_as(out, hidden.root.aval)
    order = [i for i, (_, own) in enumerate(hidden.loops) if own] + [shared[i][1] for i in turns]
    out = moved(out, range(len(order)), [sorted(order).index(i) for i in order])
    lead = [length if i in order else 1 for i, (length, _) in enumerate(hidden.loops)]
    out = out.reshape(*lead, *out.shape[len(order) :])
    out = jnp.broadcast_to(out, (*(length for length, _ in hidden.loops), *out.shape[len(lead) :]))
    return placed_as(out, hidden.root.aval, len(hidden.loops))


def landed_as(landing: DirectFeedback) -> jax.ShapeDtypeStruct:
    """The shape and dtype of the result of `land`."""
    hidden = landing.hidden
    aval = hidden.root.aval
    return jax.ShapeDtypeStruct((*(length for length, _ in hidden.loops), *aval.shape), aval.dtype)


def land_each(
    landing: DirectFeedback, e: jax.Array, b: Any, signal: Callable[..., tuple[Any, Any]], given: Mapping[str, Any]
) -> tuple[jax.Array, Pytree]:
    """The same, if the function is called for each iteration and position.

    Args:
      landing, e, b: as in `land`.
      signal: `(e, b, given) -> (signal, state)`.
      given: more arguments, with the axes of `landing.calls` in front.

    Returns:
      The error, and the states with the axes of `landing.calls` in front.
    """
    e = split_as(e, *[None] * len(landing.shared), landing.batch_split)
    b = landing.weight(b)

    def one(e: jax.Array, b: Any, given: Any) -> tuple[jax.Array, Any]:
        made, state = signal(e, b, given)
        return arriving(landing, made, e), state

    for in_axes, size in _nested(landing, (0, None, 0), (None, None, 0), (None, 0, 0)):
        one = jax.vmap(one, in_axes, axis_size=size)
    made, state = one(e, b, given)
    define = landing.defined
    for _ in landing.hidden.loops:
        define = jax.vmap(define)
    made = define(moved(made, range(len(landing.calls)), landing.where))
    return placed_as(made, landing.hidden.root.aval, len(landing.hidden.loops)), state


def direct_feedback_gradient(
    landing: DirectFeedback,
    e: jax.Array,
    record: jax.Array,
    b: Any,
    learn: Callable[..., Any] | None = None,
    given: Mapping[str, Any] | None = None,
) -> Any:
    """Computes the gradient of one direct feedback weight, summed over the scans and positions that share it.

    Args:
      landing: the place, in `plan.direct_feedback`.
      e: the result of `sent_error`.
      record: the hidden signal, at its definition.
      b: the feedback weight.
      learn: `(e, h, b, given) -> db`; None for the function of the rule.
      given: more arguments for it, with the axes of `landing.calls` in front.

    Returns:
      The gradient, like b.

    Raises:
      TypeError, ValueError: the function does not return an array with the shape of b.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> from lrules import extend
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> net, x = lrules.Network(net), jnp.ones((5, 3))
      >>> spec = extend.Direct(lambda e, b, targets, name: extend.project(e, b), jnp.ones)
      >>> plan = extend.make_plan(net, net.graph(params, x), params, x, lambda name: spec)
      >>> learn = lambda e, h, b, given: extend.correlate(e, h, b)
      >>> b, landing = jnp.zeros((2, 4)), plan.direct_feedback["b"]
      >>> extend.direct_feedback_gradient(landing, jnp.ones((5, 2)), jnp.ones((5, 4)), b, learn)[0].tolist()
      [5.0, 5.0, 5.0, 5.0]
    """
    if learn is None:
        own = landing.spec.bound("learn", landing.hidden.name)
        learn = lambda e, h, b, given: own(e, h, b)  # noqa: E731
    placing, b = _spec(b), split_as(b, *landing.split)
    e = split_as(e, *[None] * len(landing.shared), landing.batch_split)
    h = at_calls(landing, record, e.shape[len(landing.shared)]).astype(b.dtype)
    fn = learn

    def one(e: jax.Array, h: jax.Array, b: Any, given: Any) -> Any:
        return learned_by(landing, fn(e, h, b, given), b)

    def summed(learn: Callable[..., Any], in_axes: Any) -> Callable[..., Any]:
        return lambda *args: jax.vmap(learn, in_axes)(*args).sum(0)

    for _ in landing.shared:
        one = summed(one, (0, 0, None, 0))
    for _ in landing.others:
        one = summed(one, (None, 0, None, 0))
    for _ in landing.own:
        one = jax.vmap(one, (None, 0, 0, 0))
    return split_as(one(e, h, b, given or {}), *placing)


def reduction_gradient(
    plan: Plan, spec: Direct, name: str, e: jax.Array, feedback: Mapping[str, Any], records: Mapping[str, Any]
) -> jax.Array:
    """The gradient of the matrix R that reduces errors to a rank, where it learns: dR = sum over l of e (B_l h_l)^T.

    The feedback weight of a hidden signal is the product R B_l, and e h_l^T its gradient. This is the part of R in it.

    Args:
      plan: a plan with direct feedback.
      spec, name: the direct rule, and the name of its matrix in `plan.reduced`.
      e: the result of `output_error`.
      feedback: the feedback weights by name.
      records: the hidden signals, at their definitions.
    """
    reduced, pull = jax.vjp(lambda r: sent_error(plan, spec, e, {name: r}), feedback[name])
    back = jnp.zeros_like(reduced)
    for place, landing in plan.direct_feedback.items():
        if landing.spec is spec:  # what is linear in the error: its transpose brings h back to the error

            def lands(e: jax.Array, landing: DirectFeedback = landing, b: Any = feedback[place]) -> jax.Array:
                return land(landing, e, b, lambda e, b: jnp.tensordot(e.astype(b.dtype), b, axes=1))

            back += jax.vjp(lands, reduced)[1](records[place])[0]
    return pull(back)[0]


def at_calls(landing: DirectFeedback, record: jax.Array, batch: int) -> jax.Array:
    """What is recorded at a hidden signal, as its reader sees it: `[*calls, batch, *hidden]`."""
    seen: Callable[..., jax.Array] = functools.partial(landing.read, batch=batch)
    for _ in landing.hidden.loops:
        seen = jax.vmap(seen)
    return moved(seen(record), landing.where, range(len(landing.where)))


def _nested(landing: DirectFeedback, shared: Any, others: Any, own: Any) -> list[tuple[Any, int]]:
    """How a function of one iteration and position is mapped over them, the innermost first."""
    axes = [*[own] * len(landing.own), *[others] * len(landing.others), *[shared] * len(landing.shared)]
    return list(reversed(list(zip(axes, landing.calls, strict=True))))
