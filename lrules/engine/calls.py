"""Calls the functions of a rule with the arguments that they ask for by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lrules.engine.carried import encoded, require_same
from lrules.engine.closures import held
from lrules.engine.handlers import Frame, Handler, key_at, name_number, on_device
from lrules.engine.landing import at_calls, land, land_each
from lrules.engine.plan import Plan
from lrules.engine.records import Layer, undo_views
from lrules.engine.returned import called, what
from lrules.engine.slopes import Slopes, activation_of_hidden, activations_of_layers, open_slot
from lrules.engine.weights import DirectFeedback
from lrules.rule import Direct, Feedback, Sequential
from lrules.typing import Pytree

PER_CALL = ("rng", "state", "h", "y", "slope")  # these differ between iterations and positions

Operands = Mapping[str, Any]


class Calls:
    """The further arguments of a rule's functions in one run, which they ask for by name.

    `operands` are the arrays among them. Every function with a custom derivative takes them as arguments.
    """

    def __init__(self, plan: Plan, feedback: Feedback, rng: Any, targets: Pytree) -> None:
        self.plan = plan
        functions: dict[str, Callable[..., Any]] = {}
        for layer in plan.graph.layers:
            spec = plan.specs[layer.site]
            if isinstance(spec, Sequential) and not spec.plain:
                functions[layer.site] = spec.bound("backward", layer.name)
        for name, landing in plan.direct_feedback.items():
            for option in () if landing.spec.plain else landing.spec.asks:
                functions[f"{option} at {name}"] = landing.spec.bound(option, name)
        values = {name: held(fn) for name, fn in functions.items()}
        self.remade = {name: remade for name, (_, remade) in values.items()}
        self.decode: dict[str, Callable[[Pytree], Pytree]] = {}
        states: dict[str, Any] = {}
        for site, (_, _, _, lengths) in plan.states.items():
            floats, self.decode[site] = encoded(feedback.state[site])
            states[site] = {"state": floats, "ran": jnp.zeros(lengths)}
        asked = frozenset[str]().union(*(spec.asks_for for spec in plan.asking))
        wants_targets = "targets" in asked or any(isinstance(s, Direct) and s.targets for s in plan.asking)
        self.operands: dict[str, Any] = {
            "held": {name: values for name, (values, _) in values.items() if values},
            "states": states,
            "rng": jax.random.key_data(rng) if "rng" in asked else None,  # numbers, because custom_vjp needs them
            "targets": targets if wants_targets else None,
        }
        self.kind = jax.random.key_impl(rng) if "rng" in asked else None
        self.above = activations_of_layers(plan.graph) if "slope" in asked else {}

    def key(self, operands: Operands) -> jax.Array:
        return jax.random.wrap_key_data(operands["rng"], impl=self.kind)

    def function(self, operands: Operands, name: str) -> Callable[..., Any]:
        """A function of the rule, with these operands."""
        return self.remade[name](operands["held"].get(name, []))

    def inputs(self, operands: Operands) -> dict[str, Any]:
        """The states of layers, as inputs of a frame."""
        return {f"{site} output": s for site, s in operands["states"].items() if site not in self.plan.direct_feedback}

    def new_states(self, states: Mapping[str, Any], cotangents: Mapping[str, Any]) -> dict[str, Any]:
        """The new states, from the cotangents of the old ones."""
        found = {}
        for site, old in states.items():
            new, ran = cotangents[site]["state"], cotangents[site]["ran"]

            def chosen(n: jax.Array, o: jax.Array, ran: jax.Array = ran) -> jax.Array:
                return jnp.where(ran.reshape(ran.shape + (1,) * (o.ndim - ran.ndim)) != 0, n, o)

            found[site] = self.decode[site](jax.tree.map(chosen, new, old["state"]))
        return found

    def slopes(self) -> list[Handler]:
        """The handler that brings slopes to the functions that ask for them, if any do."""
        layers: dict[str, list[tuple[str, tuple[Any, ...]]]] = defaultdict(list)
        for site, (activation, views) in self.above.items():
            spec = self.plan.specs[site]
            if isinstance(spec, Sequential) and "slope" in spec.asks["backward"]:
                layers[activation.site].append((site, views))
        hidden: dict[str, tuple[str, str]] = {}
        for name, landing in self.plan.direct_feedback.items():
            if {"y", "slope"} & landing.spec.asks_for:
                below = activation_of_hidden(self.plan.graph, landing.hidden)
                hidden |= {below.site: (f"{name} y", f"{name} slope")} if below is not None else {}
        return [Slopes(layers, hidden)] if layers or hidden else []

    # -- sequential rules

    def layer(
        self,
        operands: Operands,
        spec: Sequential,
        layer: Layer,
        op: Callable[..., Any],
        w: jax.Array,
        b: Any,
        x: Any,
        frame: Frame,
    ) -> Any:
        """The output of the layer, with the derivative of the rule."""
        site, asks = layer.site, spec.asks["backward"]
        given: dict[str, Any] = {}
        if "rng" in asks:
            given["rng"] = jax.random.key_data(key_at(self.key(operands), f"{site} output", (w, x), frame))
        if "targets" in asks:
            given["targets"] = operands["targets"]
        if "state" in asks:
            given["state"] = frame.inputs[f"{site} output"]
        values, remade = held(self.function(operands, site))
        sloped = "slope" in asks and site in self.above
        multiply = _asking(
            remade, asks, layer, op, spec.learned, sloped, self.decode.get(site), self.kind, self.plan.elements
        )
        y = multiply(values, w, b, x, given)
        if sloped:
            y, frame.slots[site] = y
        return y

    # -- direct rules

    def records(self) -> set[str]:
        """The records of hidden signals that must be kept."""
        kept: set[str] = set()
        for name, landing in self.plan.direct_feedback.items():
            kept |= {name} if "h" in landing.spec.asks_for else set()
            kept |= {f"{name} {what}" for what in ("y", "slope") if what in landing.spec.asks_for}
        return kept

    def signal(
        self, operands: Operands, landing: DirectFeedback, e: jax.Array, b: Any, records: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """The error at the definition of a hidden signal, and the cotangent of the old state by its name."""
        spec, name, asks = landing.spec, landing.hidden.name, landing.spec.asks["signal"]
        fn, targets = self.function(operands, f"signal at {name}"), operands["targets"] if spec.targets else None
        if not any(asked in asks for asked in PER_CALL):
            named = self._named(operands, landing, "signal", {})
            return land(landing, e, b, lambda e, b: fn(e, b, targets, name, **named)), {}

        def signal(e: jax.Array, b: Any, given: Mapping[str, Any]) -> tuple[Any, Any]:
            named = self._named(operands, landing, "signal", given)
            made = fn(e, b, targets, name, **named)
            if "state" not in named:
                return made, ()
            if not (isinstance(made, tuple | list) and len(made) == 2):
                raise TypeError(
                    f"signal asks for state, and returned {what(made)} at the hidden signal {name!r}: return two "
                    "things, the signal and the new state"
                )
            new = require_same(made[1], named["state"], f"signal, at the hidden signal {name!r},")
            return made[0], encoded(new)[0]

        made, state = land_each(landing, e, b, signal, self._given(operands, landing, "signal", e, records))
        return made, {name: {"state": state, "ran": jnp.ones(landing.calls)}} if "state" in asks else {}

    def learn(
        self, operands: Operands, landing: DirectFeedback, e: jax.Array, records: Mapping[str, Any]
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        """The function `(e, h, b, given) -> db`, and its `given`."""
        fn = self.function(operands, f"learn at {landing.hidden.name}")

        def learn(e: jax.Array, h: jax.Array, b: Any, given: Mapping[str, Any]) -> Any:
            return fn(e, h, b, **self._named(operands, landing, "learn", given))

        return learn, self._given(operands, landing, "learn", e, records)

    def _given(
        self, operands: Operands, landing: DirectFeedback, option: str, e: jax.Array, records: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The further arguments of one function at each iteration and position, with these axes in front."""
        name, asks, calls = landing.hidden.name, landing.spec.asks[option], landing.calls
        given: dict[str, Any] = {}
        if "rng" in asks:
            key = on_device(jax.random.fold_in(self.key(operands), name_number(f"{name} {option}")), e)
            given["rng"] = jax.random.split(key, calls) if calls else key
        if "state" in asks:
            given["state"] = operands["states"][name]["state"]
        for asked, record in (("h", name), ("y", f"{name} y"), ("slope", f"{name} slope")):
            if asked in asks and record in records:
                given[asked] = at_calls(landing, records[record], e.shape[len(landing.shared)])
        return given

    def _named(
        self, operands: Operands, landing: DirectFeedback, option: str, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The arguments by name of one call."""
        name = landing.hidden.name
        known = {"elements": self.plan.elements, "targets": operands["targets"], "name": name, **given}
        if "state" in given:
            known["state"] = self.decode[name](given["state"])
        return {asked: known.get(asked) for asked in landing.spec.asks[option] if asked not in landing.spec.numbers}


def _asking(
    remade: Callable[..., Any],
    asks: frozenset[str],
    layer: Layer,
    op: Callable[..., Any],
    learned: bool,
    sloped: bool,
    decode: Callable[[Pytree], Pytree] | None,
    kind: Any,
    elements: int | None,
) -> Callable[..., Any]:
    """A layer under a rule that asks for more, `(values, w, b, x, given) -> y`, with a slot for the slope if `sloped`.

    The values over which it closes live as long as the program of which it becomes a part, so none may be traced.
    """

    @jax.custom_vjp
    def multiply(values: Any, w: jax.Array, b: Any, x: Any, given: Any) -> Any:
        y = op(w, x)
        return (y, open_slot(y)) if sloped else y

    def forward(values: Any, w: jax.Array, b: Any, x: Any, given: Any) -> tuple[Any, Any]:
        y = multiply(values, w, b, x, given)
        seen = (y[0] if sloped else y) if "y" in asks else None
        return y, (values, w, b, x, seen, given)

    def backward(residuals: Any, d: Any) -> tuple[Any, ...]:
        values, w, b, x, y, given = residuals
        d, slope = d if sloped else (d, None)
        known: dict[str, Any] = {"slope": slope, "y": y, "elements": elements, "targets": given.get("targets")}
        if "h" in asks:
            known["h"] = _definition(layer, x)
        if "rng" in asks:
            known["rng"] = jax.random.wrap_key_data(given["rng"], impl=kind)
        if decode is not None:
            known["state"] = decode(given["state"]["state"])
        named = {name: known[name] for name in asks if name in known}
        dw, dx, db, state = called(learned, remade(values), op, w, b, x, d, layer, named)
        passed: dict[str, Any] = dict.fromkeys(given)
        if decode is not None:
            passed["state"] = {"state": encoded(state)[0], "ran": jnp.ones_like(given["state"]["ran"])}
        return None, dw, db, dx, passed

    multiply.defvjp(forward, backward)
    return multiply


def _definition(layer: Layer, x: Any) -> jax.Array | None:
    """The hidden signal that a layer reads, at its definition; None if it reads data."""
    if layer.reads is None:
        return None
    if isinstance(x, tuple):
        block, _ = layer.place
        rest = [v for i, v in enumerate(layer.eqn.invars) if i != layer.position]
        x = x[next(i for i, v in enumerate(rest) if block.value(v) is layer.operand)]
    return undo_views(layer.operand.root()[1], x)
