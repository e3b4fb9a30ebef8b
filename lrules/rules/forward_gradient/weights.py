"""Forward gradients of parameters: one direction for all of them (Baydin et al. 2022; Spall 1992; Malladi et al. 2023).

A jvp brings the direction v through the network, and the outputs move by y' = J v. Then (dL . v) = e . y' for the output
error e of any objective. So the network is one function with a custom derivative, and the loss need not be known.

With central differences, the key makes the direction three times: for the pass with +v, for the pass with -v, and for
the gradient. Barriers stop XLA from making it once and keeping it. So between the passes nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from lrules.extend import Graph, Plan, mean_loss
from lrules.network import Network, parameter_names
from lrules.rules.forward_gradient.directions import Directions, forward_mode, paired, scaled, widened
from lrules.typing import Loss, Pytree


class _Own:
    """What the rule does at a layer: nothing, because it acts on parameters."""


def plan(net: Network, graph: Graph, params: Pytree, inputs: Pytree) -> Plan:
    """A plan that refuses no network: there is no error that could go a wrong way."""
    return Plan(graph, dict.fromkeys((layer.site for layer in graph.layers), _Own()), {}, {})  # type: ignore[arg-type]


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
        moving = {name: arg.value for name, arg in args.items() if arg.perturbed and _inexact(arg.value)}

        def outputs(moving: dict[str, jax.Array]) -> tuple[list[jax.Array], Any]:
            outs = plain(values | moving)
            return [y for y in jax.tree.leaves(outs[0]) if _inexact(y)], outs

        def along(key: jax.Array) -> tuple[list[jax.Array], Any]:
            return forward_mode(outputs, moving, drawn.of(key, moving))

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


def mean_of(drawn: Directions, keys: jax.Array, rates: jax.Array, like: dict[str, jax.Array]) -> dict[str, jax.Array]:
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
    leaves, tree = jax.tree.flatten(params)
    named = dict(zip(parameter_names((params, None)), leaves, strict=True))
    kind = jax.random.key_impl(rng)

    def at(key: jax.Array, step: Any) -> jax.Array:
        """The objective at the parameters and a step along the direction of the key."""
        direction = drawn.of(key, named)
        moved = [p + (jnp.asarray(step).astype(direction[n].dtype) * direction[n]) for n, p in named.items()]
        out = net(jax.tree.unflatten(tree, moved), inputs)
        return mean_loss(net, widened(loss), out[0] if net.has_aux else out, inputs, targets)

    def after(key: jax.Array, done: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same key, for what begins when `done` is there."""
        numbers, done = jax.lax.optimization_barrier((jax.random.key_data(key), done))
        return jax.random.wrap_key_data(numbers, impl=kind), done

    def along(key: jax.Array) -> dict[str, jax.Array]:
        later, up = after(key, at(key, std))
        last, rate = after(later, (up - at(later, -std)) / (2 * std))
        direction = drawn.of(last, named)
        return {name: scaled(direction[name], rate / drawn.count, p) for name, p in named.items()}

    if drawn.count == 1:
        grads = along(drawn.keys(rng)[0])
    else:
        add = lambda total, key: (jax.tree.map(jnp.add, total, along(key)), None)  # noqa: E731
        grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, named), drawn.keys(rng))
    head = (value, *out) if net.has_aux else (value, out)
    return head, jax.tree.unflatten(tree, [grads[name] for name in named])
