"""The iterations that renew all states, in each of the orders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrules.engine.settling import repeat
from lrules.extend import Frame, Handler, evaluate
from lrules.rules.dual_propagation.network import DualNetwork
from lrules.rules.dual_propagation.outputs import Floats
from lrules.rules.dual_propagation.states import State, residual, with_damping
from lrules.typing import Pytree


def begin(network: DualNetwork, args: Any) -> tuple[Any, ...]:
    """`(outputs, aux, started)`: the clean run; `gradients` continues from `started`."""
    damping = network.damping(args)
    if network.options.order == "forward_backward":
        zeros = {site: dict.fromkeys(("plus", "minus", "arriving"), zero) for site, zero in network.clean.items()}
        outputs, pull, aux = network.vjp("clean", args, zeros, damping)
        return outputs, aux, (damping, pull)
    outputs, aux, records = network.run("record", args, {})
    return outputs, aux, (damping, records)


def gradients(
    network: DualNetwork, args: Any, keys: Any, started: Any, outputs: Pytree, error_at: Callable[..., Any]
) -> tuple[Any, dict[str, jax.Array] | dict[str, Any]]:
    """`(cotangents of args, report)` after all iterations; `error_at` is the function from outputs to their error."""
    damping, start = started
    sweeps = _Sweeps(network, args, damping, Floats(outputs), error_at)
    order, error = network.options.order, sweeps.error(outputs)
    if order == "forward_backward":
        state, done = start(sweeps.split.put(error)), 1
    elif order in ("forward", "parallel"):  # the first iteration renews the outputs alone
        state, done = start, 1
    else:
        state, error, done = start, [jnp.zeros_like(e) for e in error], 0
    options = network.options

    def iterate(carry: Any, key: Any) -> tuple[Any, Any]:
        new = sweeps.iterate(carry, key)
        return new, residual(carry[0], new[0], options.axis_name, network.ranks)

    (state, error), report = repeat(
        iterate, (state, error), keys, done=done, iterations=options.iterations, least=network.depth,
        tolerance=options.tolerance, axis_name=options.axis_name,
    )  # fmt: skip

    def still(*args: Any) -> tuple[Any, Any]:
        outputs, aux, _ = network.run("still", args, with_damping(state, damping))
        return outputs, aux

    _, pull, _ = jax.vjp(still, *args, has_aux=True)
    return pull(sweeps.split.put(error)), report


def transformed(network: DualNetwork) -> Callable[..., Any]:
    """The network as one function whose backward pass is all of dual propagation."""

    @jax.custom_vjp
    def run(
        params: Sequence[Any],
        weights: Any,
        inputs: Sequence[Any],
        consts: Sequence[Any],
        handlers: Sequence[Handler],
        keys: Any,
    ) -> tuple[Any, Any]:
        return evaluate(network.plan, params, weights, inputs, consts, handlers, Frame())

    def forward(*args: Any) -> tuple[Any, Any]:
        outputs, aux, started = begin(network, args[:-1])
        return (outputs, aux), (args, started, outputs)

    def backward(residuals: Any, cotangent: Any) -> tuple[Any, ...]:
        (*args, keys), started, outputs = residuals
        grads, _ = gradients(network, tuple(args), keys, started, outputs, lambda outputs: cotangent[0])
        return *grads, None

    run.defvjp(forward, backward)
    return run


class _Sweeps:
    """One iteration in each order. It renews the states and the error of the outputs."""

    def __init__(
        self, network: DualNetwork, args: Any, damping: Mapping[str, Any], split: Floats, error_at: Callable[..., Any]
    ) -> None:
        self.network, self.args, self.damping, self.split, self.error_at = network, args, damping, split, error_at

    def error(self, outputs: Pytree) -> list[Any]:
        return self.split.take(self.error_at(outputs))

    def iterate(self, carry: Any, key: jax.Array) -> tuple[Any, ...]:
        state, error = carry
        order = self.network.options.order
        if order == "forward_backward":
            return self._up_and_down(state)
        if order == "forward":
            return self._up(state, error)
        if order == "parallel":
            return self._all_at_once(state, error)
        if order == "odd_even":
            for parity in (1, 0):
                state, error = self._renew(state, error, self._of_parity(parity))
            return state, error
        return self._one_after_another(state, error, key)

    def _up_and_down(self, state: State) -> tuple[Any, list[Any]]:
        outputs, pull, _ = self.network.vjp("sweep", self.args, state, self.damping)
        error = self.error(outputs)
        return pull(self.split.put(error)), error

    def _up(self, state: State, error: list[Any]) -> tuple[dict[str, Any], list[Any]]:
        _, pull, _ = self.network.vjp("still", self.args, state, self.damping)
        new = pull(self.split.put(error))
        new = {site: {**state[site], "arriving": new[site]["arriving"]} for site in state}
        outputs, _, new = self.network.run("up", self.args, with_damping(new, self.damping))
        return new, self.error(outputs)

    def _all_at_once(self, state: State, error: list[Any]) -> tuple[Any, list[Any]]:
        outputs, pull, _ = self.network.vjp("still", self.args, state, self.damping)
        return pull(self.split.put(error)), self.error(outputs)

    def _one_after_another(self, state: State, error: list[Any], key: jax.Array) -> tuple[Any, list[Any]]:
        names = [*self.network.clean, "outputs"]
        branches = [lambda carry, name=name: self._renew(carry[0], carry[1], {name: True}) for name in names]
        shuffled = jax.random.permutation(jax.random.wrap_key_data(key), len(names))
        return jax.lax.scan(lambda carry, k: (jax.lax.switch(k, branches, carry), None), (state, error), shuffled)[0]

    def _of_parity(self, parity: int) -> dict[str, Any]:
        chosen = {name: levels % 2 == parity for name, levels in self.network.levels.items()}
        return chosen | {"outputs": self.network.depth % 2 == parity}

    def _renew(self, state: State, error: list[Any], chosen: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        """Renews the chosen states at once, from the old ones; masks choose iterations of a scan."""
        outputs, pull, _ = self.network.vjp("still", self.args, state, self.damping)
        new = pull(self.split.put(error))
        renewed = {}
        for site, old in state.items():
            mask = np.asarray(chosen.get(site, False))
            if mask.all():
                renewed[site] = new[site]
            elif not mask.any():
                renewed[site] = old
            else:
                renewed[site] = jax.tree.map(
                    lambda o, n, mask=mask: jnp.where(mask.reshape(mask.shape + (1,) * (n.ndim - mask.ndim)), n, o),
                    old, new[site],
                )  # fmt: skip
        return renewed, self.error(outputs) if chosen.get("outputs", False) else error
