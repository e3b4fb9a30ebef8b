"""Forward gradients of parameters: one direction for all of them (Baydin et al. 2022; Spall 1992; Malladi et al. 2023).

A jvp brings the direction v through the network, and the outputs move by y' = J v. Then (dL . v) = e . y' for the
output error e of any objective. So the network is one function with a custom derivative, which need not know the loss.

With central differences, the key makes the direction three times: for the pass with +v, for the pass with -v, and for
the gradient. Each key waits for the data beside which its noise is used (`_after`). Otherwise XLA would make the
direction once and keep it, or make all of it at the beginning. So there is the noise of one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from lrules.engine.jaxprs import varying_axes
from lrules.engine.operations import of
from lrules.engine.planning import Elsewhere
from lrules.engine.records import ancestors, reach
from lrules.extend import Graph, Plan, mean_loss
from lrules.network import Network, parameter_names
from lrules.rules.forward_gradient.directions import Directions, forward_mode, paired, scaled, widened
from lrules.rules.forward_gradient.late import run_late
from lrules.typing import Loss, Pytree


def plan(net: Network, graph: Graph, params: Pytree, inputs: Pytree) -> Plan:
    """A plan that refuses no network: there is no error that could go a wrong way."""
    return Plan(graph, dict.fromkeys((layer.site for layer in graph.layers), Elsewhere()), {}, {})  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------- a jvp


def transformed(made: Plan, drawn: Directions, net: Network, params: Pytree, inputs: Pytree, rng: Any) -> Any:
    """The outputs of the network; their derivative is the forward gradient."""
    graph, leaves = made.graph, jax.tree.leaves(inputs)
    names = [list(graph.names), *([f"({what} {i})" for i in range(len(of))] for what, of in
             (("input", leaves), ("constant", graph.consts)))]  # fmt: skip
    values = [*net.parameters(params), *leaves, *graph.consts]
    args = dict(zip((name for part in names for name in part), values, strict=True))
    outputs, aux = _network(graph, drawn, names, jax.random.key_impl(rng))(args, jax.random.key_data(rng))
    return (outputs, aux) if net.has_aux else outputs


def _network(graph: Graph, drawn: Directions, names: Sequence[Sequence[str]], kind: Any) -> Callable[..., Any]:
    """The network as a function of its parameters, inputs and constants by name, and of the numbers of a key."""

    def plain(args: dict[str, Any]) -> Any:
        params, inputs, consts = ([args[name] for name in part] for part in names)
        return graph.run(params, inputs, consts=consts)

    @jax.custom_vjp
    def run(args: dict[str, Any], key: Any) -> Any:
        return plain(args)

    def forward(args: dict[str, Any], key: Any) -> tuple[Any, Any]:
        values = {name: arg.value for name, arg in args.items()}
        unmoved = set(graph.names) - reaching(graph)
        wanted = [name for name, arg in args.items() if arg.perturbed and _inexact(arg.value) and name not in unmoved]
        moving = {name: values[name] for name in wanted}

        def outputs(moving: dict[str, jax.Array]) -> tuple[list[jax.Array], Any]:
            outs = plain(values | moving)
            return [y for y in jax.tree.leaves(outs[0]) if _inexact(y)], outs

        def along(key: jax.Array) -> tuple[list[jax.Array], Any]:
            return forward_mode(graph, outputs, moving, drawn.of(key, moving))

        keys = drawn.keys(jax.random.wrap_key_data(key.value, impl=kind))
        rates, outs = drawn.each(along, keys, (0, None))
        return outs, (rates, moving, values, key.value)

    def backward(kept: Any, cotangent: Any) -> tuple[Any, None]:
        rates, moving, values, key = kept
        errors = [e for e in jax.tree.leaves(cotangent[0], is_leaf=_is_zero) if _inexact(e)]
        along = [paired(e[None], rate).reshape(drawn.count, -1).sum(1)
                 for e, rate in zip(errors, rates, strict=True) if not _is_zero(e)]  # fmt: skip
        grads = dict.fromkeys(values)
        if along:
            keys = drawn.keys(jax.random.wrap_key_data(key, impl=kind))
            grads |= mean_of(drawn, keys, sum(along[1:], along[0]), moving)
        return grads, None

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


def mean_of(drawn: Directions, keys: jax.Array, rates: Any, like: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The mean over directions of each direction times its rate; rates are `[directions]`, or such by name."""

    def one(key: jax.Array, rate: Any) -> dict[str, jax.Array]:
        by_name = rate if isinstance(rate, dict) else dict.fromkeys(like, rate)
        direction = drawn.of(key, like)
        return {name: scaled(direction[name], by_name[name] / drawn.count, x) for name, x in like.items()}

    if drawn.count == 1:
        return one(keys[0], jax.tree.map(lambda rate: rate[0], rates))

    def add(total: dict[str, jax.Array], here: Any) -> tuple[dict[str, jax.Array], None]:
        return jax.tree.map(jnp.add, total, one(*here)), None

    first = jax.tree.map(jnp.zeros_like, like)
    return jax.lax.scan(add, first, (keys, rates))[0]


def reaching(graph: Graph, by_derivatives: bool = True) -> set[str]:
    """The parameters with a path to the outputs, past `stop_gradient`; the others have no part in a direction.

    With `by_derivatives`, the path has no integers, booleans or other values without a derivative.
    """

    def find() -> set[str]:
        outs = graph.outs[: graph.n_outputs]
        stops = lambda value: value.producer is not None and of(value.producer).stops  # noqa: E731
        found = reach(outs) if by_derivatives else {id(value) for out in outs for value in ancestors(out, stops)}
        return {name for name, value in zip(graph.names, graph.parameters, strict=True) if id(value) in found}

    return graph.once(("reaching", by_derivatives), find)


def _inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


# -------------------------------------------------------------------------------------------------- central differences


def central(
    made: Plan, drawn: Directions, std: Any, net: Network, loss: Loss, params: Pytree, inputs: Pytree,
    targets: Pytree, rng: jax.Array,
) -> tuple[tuple[Any, ...], Pytree]:  # fmt: skip
    """`(head, gradients)` from the losses of two passes for each direction."""
    out = net(params, inputs)
    outputs = out[0] if net.has_aux else out
    value = mean_loss(net, loss, outputs, inputs, targets)
    names, (leaves, tree) = parameter_names((params, None)), jax.tree.flatten(params)
    moving = set(names) & reaching(made.graph, by_derivatives=False)  # the others are frozen, or lead nowhere
    values = dict(zip(made.graph.names, net.parameters(params), strict=True))

    def at(key: jax.Array, step: Any) -> jax.Array:
        """The objective at the parameters and a step along the direction of the key."""

        def parameter(name: str, after: Any) -> jax.Array:
            p = values[name]
            if name not in moving:
                return p
            v = drawn.one(_after(key, after), name, p)
            return p + jnp.asarray(step).astype(v.dtype) * v

        outputs, _ = run_late(made.graph, jax.tree.leaves(inputs), made.graph.consts, parameter)
        return mean_loss(net, widened(loss), outputs, inputs, targets)

    def along(key: jax.Array) -> list[jax.Array]:
        up = at(key, std)
        rate = (up - at(_after(key, up), -std)) / (2 * std)
        found, last = [], rate
        for name, p in zip(names, leaves, strict=True):
            if name not in moving:
                found.append(jnp.zeros_like(p))
                continue
            v = drawn.one(_after(key, last), name, p)
            found.append(scaled(v, rate / drawn.count, p))
            last = v  # so that the next one is drawn after this one
        return found

    if drawn.count == 1:
        grads = along(drawn.keys(rng)[0])
    else:
        add = lambda total, key: (jax.tree.map(jnp.add, total, along(key)), None)  # noqa: E731
        grads, _ = jax.lax.scan(add, [jnp.zeros_like(p) for p in leaves], drawn.keys(rng))
    head = (value, *out) if net.has_aux else (value, out)
    return head, jax.tree.unflatten(tree, grads)


def _after(key: jax.Array, done: jax.Array | None) -> jax.Array:
    """The same key, which is there only when `done` is: it adds a zero that XLA cannot know.

    (An `optimization_barrier` orders nothing on a CPU, where XLA removes it before it orders the operations.)
    """
    if done is None or not jnp.issubdtype(done.dtype, jnp.number) or not done.size:
        return key
    whole = any(axis is not None for axis in jax.typeof(done).sharding.spec)  # of a split array, any one element
    one = jnp.real(jnp.max(jnp.real(done)) if whole else done[(0,) * done.ndim])
    zero = (jnp.sign(one.astype(jnp.float32)) == 3).astype(jnp.uint32)
    axes, numbers = tuple(sorted(varying_axes(jax.typeof(zero)))), jax.random.key_data(key)
    zero = jax.lax.pmax(zero, axes) if axes else zero  # the key stays the same on all devices
    return jax.random.wrap_key_data(numbers ^ zero.astype(numbers.dtype), impl=jax.random.key_impl(key))
