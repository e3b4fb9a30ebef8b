"""Forward gradients of activations: a direction for each example (Ren, Kornblith, Liao, Hinton 2023).

The places are those where direct feedback lands, one for each hidden signal h. If an activation makes it, h = f(z), the
direction is that of the pre-activation z, as in the paper; else that of h itself. Two passes follow: one along the
directions (or two, with central differences), and one in which the network learns. In the second, no derivative passes
a place, and each place brings its *effect* along: the inner product of its value and its direction, for each example.
The cotangent of this number is the derivative of the example's loss along all directions, so what arrives at the place
is this derivative times the direction. The rest is JAX's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lrules.extend import (
    Activation,
    Direct,
    DirectFeedback,
    Frame,
    Graph,
    Handler,
    Hidden,
    LayerRule,
    Plan,
    at_least_float32,
    key_at,
    make_plan,
    mean_loss,
    output_error,
    placed_as,
)
from lrules.network import Network
from lrules.rules.forward_gradient.directions import Directions, forward_mode, paired, widened
from lrules.typing import Loss, Pytree


def planner() -> Callable[..., Plan]:
    """A function that makes a plan: the places are those of a direct rule."""
    spec = Direct(_arrive, error_at="outputs", offers=())

    def choose(name: str) -> LayerRule:
        return spec

    def plan(net: Network, graph: Graph, params: Pytree, inputs: Pytree) -> Plan:
        return graph.once_for(choose, lambda: make_plan(net, graph, params, inputs, choose, partition=False))

    return plan


def _arrive(e: jax.Array, b: Any, targets: Pytree, name: str) -> jax.Array:
    """Stands for what arrives: `Learning` brings it there, and calls no function of the rule."""
    raise AssertionError


class _Places(Handler):
    """A handler at each place of a plan: the pre-activation that makes the hidden signal, or the hidden signal."""

    activations = True

    def __init__(self, plan: Plan, drawn: Directions) -> None:
        self.plan, self.drawn, self.places = plan, drawn, plan.direct_feedback
        makers = {id(activation.output): activation.site for activation in plan.graph.activations}
        made = {name: makers.get(id(place.hidden.root)) for name, place in self.places.items()}
        self.by_activation = {site: name for name, site in made.items() if site is not None}
        self.by_hidden = {name for name, site in made.items() if site is None}

    def activation(self, activation: Activation, fn: Callable[..., Any], x: jax.Array, frame: Frame) -> Any:
        name = self.by_activation.get(activation.site)
        return fn(x if name is None else self.at(name, x, frame))

    def hidden(self, hidden: Hidden, value: Any, frame: Frame) -> Any:
        here = hidden.name in self.by_hidden and self.places[hidden.name].hidden is hidden
        return self.at(hidden.name, value, frame) if here else value

    def at(self, name: str, value: jax.Array, frame: Frame) -> jax.Array:
        raise NotImplementedError

    def direction(self, key: jax.Array, name: str, value: jax.Array, frame: Frame) -> jax.Array:
        return self.drawn.draw(key_at(key, name, value, frame), value)


class Step(_Places):
    """Moves all places by a step along a direction.

    Args:
      plan, drawn: the places, and how the direction is drawn.
      key: the key of the direction.
      size: the size of the step.
    """

    def __init__(self, plan: Plan, drawn: Directions, key: jax.Array, size: Any) -> None:
        super().__init__(plan, drawn)
        self.key, self.size = key, size

    def at(self, name: str, value: jax.Array, frame: Frame) -> jax.Array:
        return value + jnp.asarray(self.size).astype(value.dtype) * self.direction(self.key, name, value, frame)


class Along(_Places):
    """Gives all places a derivative along a direction, with respect to a number that changes no value.

    Args:
      plan, drawn, key: as in `Step`.
      number: the number.
      cut: whether a place moves along its own direction alone, and not with the places below.
    """

    def __init__(self, plan: Plan, drawn: Directions, key: jax.Array, number: jax.Array, cut: bool = False) -> None:
        super().__init__(plan, drawn)
        self.key, self.number, self.cut = key, number, cut

    def at(self, name: str, value: jax.Array, frame: Frame) -> jax.Array:
        value = jax.lax.stop_gradient(value) if self.cut else value
        return _moving(value, self.direction(self.key, name, value, frame), self.number)


@jax.custom_jvp
def _moving(value: jax.Array, direction: jax.Array, number: jax.Array) -> jax.Array:
    return value


@_moving.defjvp
def _moving_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (value, direction, _), (below, _, rate) = primals, tangents
    return value, below + rate.astype(value.dtype) * direction


class Learning(_Places):
    """Stops the derivative at all places, and records their effects `[directions, batch]`, by name."""

    def __init__(self, plan: Plan, drawn: Directions, keys: jax.Array) -> None:
        super().__init__(plan, drawn)
        self.keys = keys

    def at(self, name: str, value: jax.Array, frame: Frame) -> jax.Array:
        place, batch = self.places[name], self.plan.batch or 1

        def effect(key: jax.Array) -> tuple[jax.Array]:
            products = jnp.conj(self.direction(key, name, value, frame)) * value
            return (by_example(place.read(products, batch)),)

        (frame.records[effect_of(name)],) = self.drawn.each(effect, self.keys, (0,))
        return jax.lax.stop_gradient(value)


def effect_of(name: str) -> str:
    """The name of the record of an effect."""
    return f"{name} effect"


def by_example(products: jax.Array) -> jax.Array:
    """The sums of real numbers over all axes but the batch, which is the first."""
    products = jnp.real(products)
    wide = at_least_float32(products.dtype)
    return products.astype(wide).reshape(products.shape[0], -1).sum(1)


# ------------------------------------------------------------------------------------------------------------ the rule


def transformed(made: Plan, drawn: Directions, net: Network, params: Pytree, inputs: Pytree, rng: Any) -> Any:
    """The outputs of the network; their derivative is the forward gradient."""
    if not made.direct_feedback:
        return net(params, inputs)
    keys, still = drawn.keys(rng), jax.lax.stop_gradient((params, inputs))

    def along(key: jax.Array) -> tuple[jax.Array]:
        def outputs(number: jax.Array) -> tuple[jax.Array, None]:
            return output_error(made, _run(made, net, *still, Along(made, drawn, key, number))[0]), None

        return (forward_mode(made.graph, outputs, jnp.zeros(()), jnp.ones(()))[0],)

    (rates,) = drawn.each(along, keys, (0,))
    outputs, aux, effect = learning(made, drawn, net, params, inputs, keys)
    outputs = _attached(made, drawn)(outputs, jax.lax.stop_gradient(rates), effect)
    return (outputs, aux) if net.has_aux else outputs


def _run(made: Plan, net: Network, params: Pytree, inputs: Pytree, *handlers: Handler) -> tuple[Any, Any, Any]:
    """`(outputs, aux, records)` of the traced network of the plan, whose places the handlers know."""
    frame = Frame()
    outputs, aux = made.graph.run(net.parameters(params), jax.tree.leaves(inputs), handlers=handlers, frame=frame)
    return outputs, aux, frame.taken()


def learning(
    made: Plan, drawn: Directions, net: Network, params: Pytree, inputs: Pytree, keys: jax.Array
) -> tuple[Any, Any, jax.Array]:
    """`(outputs, aux, effect)`: the pass in which the network learns, with the sum of all effects."""
    outputs, aux, records = _run(made, net, params, inputs, Learning(made, drawn, keys))
    effects = [records[effect_of(name)] for name in made.direct_feedback]
    effects = [effect.reshape(-1, *effect.shape[-2:]).sum(0) for effect in effects]  # over the loops around the place
    return outputs, aux, sum(effects[1:], effects[0])


def _attached(made: Plan, drawn: Directions) -> Callable[..., Any]:
    """The outputs; besides their own error, the effect gets the derivative along each direction."""

    @jax.custom_vjp
    def attached(outputs: Pytree, rates: jax.Array, effect: jax.Array) -> Pytree:
        return outputs

    def forward(outputs: Pytree, rates: jax.Array, effect: jax.Array) -> tuple[Pytree, Any]:
        return outputs, (rates, effect)

    def backward(kept: Any, errors: Pytree) -> tuple[Pytree, None, jax.Array]:
        rates, effect = kept
        along = paired(output_error(made, errors)[None], rates).sum(2) / drawn.count
        return errors, None, placed_as(along.astype(effect.dtype), jax.typeof(effect))

    attached.defvjp(forward, backward)
    return attached


def central(
    made: Plan, drawn: Directions, std: Any, net: Network, loss: Loss, params: Pytree, inputs: Pytree,
    targets: Pytree, rng: jax.Array,
) -> tuple[tuple[Any, ...], Pytree]:  # fmt: skip
    """`(head, gradients)` from the losses of two passes for each direction."""
    keys, still = drawn.keys(rng), jax.lax.stop_gradient((params, inputs))
    batch = net.batch_size(inputs)

    def losses(key: jax.Array, step: Any) -> jax.Array:
        outputs, _, _ = _run(made, net, *still, Step(made, drawn, key, step))
        mean_loss(net, loss, outputs, inputs, targets)  # this refuses a loss without a batch
        return widened(loss)(outputs, targets).reshape(batch, -1).mean(1)

    def rate(key: jax.Array) -> jax.Array:
        return (losses(key, std) - losses(key, -std)) / (2 * std * batch * drawn.count)

    rates = None
    if made.direct_feedback:
        rates = jax.lax.stop_gradient(jax.lax.map(rate, keys) if drawn.count > 1 else rate(keys[0])[None])

    def objective(params: Pytree) -> tuple[jax.Array, Any]:
        if rates is None:
            outputs, aux, _ = _run(made, net, params, inputs)
            added: Any = 0.0
        else:
            outputs, aux, effect = learning(made, drawn, net, params, inputs, keys)
            added = jnp.sum(rates.astype(effect.dtype) * effect)
        value = mean_loss(net, loss, outputs, inputs, targets)
        total = value.astype(jnp.result_type(added)) + added if rates is not None else value
        return total, (value, outputs, aux)

    grads, (value, outputs, aux) = jax.grad(objective, has_aux=True)(params)
    return ((value, outputs, aux) if net.has_aux else (value, outputs)), grads


def of_each_example(place: DirectFeedback, products: jax.Array, batch: int) -> jax.Array:
    """The sums for each example and iteration, `[*loops, batch]`, of numbers at the definition of a hidden signal."""
    one: Callable[..., jax.Array] = lambda products: by_example(place.read(products, batch))  # noqa: E731
    for _ in place.hidden.loops:
        one = jax.vmap(one)
    return one(products)
