"""Calling the functions of a rule: with what they ask for by name, and with a look at what they return."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lrules.engine.carried import encoded, require_same
from lrules.engine.closures import held
from lrules.engine.handlers import Frame, key_at, name_number, on_device
from lrules.engine.jaxprs import placed_as, split_as
from lrules.engine.plan import Plan
from lrules.engine.records import Layer, undo_views
from lrules.engine.slopes import Slopes, activation_of_hidden, activations_of_layers, open_slot
from lrules.engine.weights import DirectFeedback
from lrules.rule import Direct, Feedback, Sequential

PER_CALL = ("rng", "state", "h", "y", "slope")  # what differs between iterations and positions


class Calls:
    """What the functions of a rule get in one run, beyond what they always get.

    `operands` are the arrays among it. They are arguments of whatever has a derivative of its own.
    """

    def __init__(self, plan: Plan, feedback: Feedback, rng: Any, targets: Any):
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
        self.decode: dict[str, Callable[[Any], Any]] = {}
        states = {}
        for site, (_, _, _, lengths) in plan.states.items():
            floats, self.decode[site] = encoded(feedback.state[site])
            states[site] = {"state": floats, "ran": jnp.zeros(lengths)}
        asked = frozenset().union(*(spec.asks_for for spec in plan.asking))
        wants_targets = "targets" in asked or any(isinstance(s, Direct) and s.targets for s in plan.asking)
        self.operands: dict[str, Any] = {
            "held": {name: values for name, (values, _) in values.items() if values},
            "states": states,
            "rng": jax.random.key_data(rng) if "rng" in asked else None,  # plain numbers, as custom_vjp takes them
            "targets": targets if wants_targets else None,
        }
        self.kind = jax.random.key_impl(rng) if "rng" in asked else None
        self.above = activations_of_layers(plan.graph) if "slope" in asked else {}

    def key(self, operands: Mapping[str, Any]) -> Any:
        return jax.random.wrap_key_data(operands["rng"], impl=self.kind)

    def function(self, operands: Mapping[str, Any], name: str) -> Callable[..., Any]:
        """A function of the rule, as it is under these operands."""
        return self.remade[name](operands["held"].get(name, []))

    def new_states(self, states: Mapping[str, Any], cotangents: Mapping[str, Any]) -> dict[str, Any]:
        """The new states, from the cotangents of the old ones."""
        found = {}
        for site, old in states.items():
            new, ran = cotangents[site]["state"], cotangents[site]["ran"]

            def chosen(n, o, ran=ran):
                return jnp.where(ran.reshape(ran.shape + (1,) * (o.ndim - ran.ndim)) != 0, n, o)

            found[site] = self.decode[site](jax.tree.map(chosen, new, old["state"]))
        return found

    def slopes(self) -> list[Slopes]:
        """The handler that brings slopes where they are asked for, if they are."""
        layers: dict[str, list[tuple[str, tuple[Any, ...]]]] = defaultdict(list)
        for site, (activation, views) in self.above.items():
            if self.wants(site, "slope"):
                layers[activation.site].append((site, views))
        hidden: dict[str, tuple[str, str]] = {}
        for name, landing in self.plan.direct_feedback.items():
            if {"y", "slope"} & landing.spec.asks_for:
                below = activation_of_hidden(self.plan.graph, landing.hidden)
                hidden |= {below.site: (f"{name} y", f"{name} slope")} if below is not None else {}
        return [Slopes(layers, hidden)] if layers or hidden else []

    def wants(self, site: str, what: str) -> bool:
        spec = self.plan.specs[site]
        return isinstance(spec, Sequential) and what in spec.asks["backward"]

    # -- sequential rules

    def layer(self, operands: Mapping[str, Any], spec: Sequential, layer: Layer, op, w, b, x, frame: Frame):
        """The layer's output, whose derivative is the rule's."""
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

    def apart(self, spec: Direct) -> bool:
        """Whether the rule's functions are called for each iteration and position."""
        return any(name in spec.asks_for for name in PER_CALL)

    def records(self) -> set[str]:
        """What has to be kept of the hidden signals."""
        kept: set[str] = set()
        for name, landing in self.plan.direct_feedback.items():
            kept |= {name} if "h" in landing.spec.asks_for or landing.spec.learn is not None else set()
            kept |= {f"{name} {what}" for what in ("y", "slope") if what in landing.spec.asks_for}
        return kept

    def given(self, operands: Mapping[str, Any], landing: DirectFeedback, option: str, e, records) -> dict[str, Any]:
        """What one function is given at each iteration and position, these axes in front."""
        name, asks, calls = landing.hidden.name, landing.spec.asks[option], landing.calls
        given: dict[str, Any] = {}
        if "rng" in asks:
            key = on_device(jax.random.fold_in(self.key(operands), name_number(f"{name} {option}")), e)
            given["rng"] = jax.random.split(key, calls) if calls else key
        if "state" in asks:
            given["state"] = operands["states"][name]["state"]
        for what, record in (("h", name), ("y", f"{name} y"), ("slope", f"{name} slope")):
            if what in asks and record in records:
                given[what] = at_calls(landing, records[record], e.shape[len(landing.shared)])
        return given

    def named(self, operands: Mapping[str, Any], landing: DirectFeedback, option: str, given) -> dict[str, Any]:
        """The arguments by name of one call."""
        asks, name = landing.spec.asks[option], landing.hidden.name
        known = {"elements": self.plan.elements, "targets": operands["targets"], "name": name, **given}
        if "state" in given:
            known["state"] = self.decode[name](given["state"])
        return {what: known.get(what) for what in asks if what not in landing.spec.numbers}

    def signal(self, operands: Mapping[str, Any], landing: DirectFeedback, e, b, records) -> tuple[Any, Any]:
        """The error at the definition of a hidden signal, and what the old state's cotangent is."""
        spec, name = landing.spec, landing.hidden.name
        fn = self.function(operands, f"signal at {name}")
        given = self.given(operands, landing, "signal", e, records)
        e = split_as(e, *[None] * len(landing.shared), landing.batch_split)
        b = None if b is None else split_as(b, *landing.split)
        targets = operands["targets"] if spec.targets else None

        def one(e, b, given):
            named = self.named(operands, landing, "signal", given)
            made = fn(e, b, targets, name, **named)
            if "state" not in named:
                return arriving(landing, made, e), ()
            if not (isinstance(made, tuple | list) and len(made) == 2):
                raise TypeError(
                    f"signal asks for state, and returned {_what(made)} at the hidden signal {name!r}: return two "
                    "things, the signal and the new state"
                )
            what = f"signal, at the hidden signal {name!r},"
            return arriving(landing, made[0], e), encoded(require_same(made[1], named["state"], what))[0]

        for axes in _nested(landing, (0, None, 0), (None, None, 0), (None, 0, 0)):
            one = jax.vmap(one, axes[0], axis_size=axes[1])
        signal, state = one(e, b, given)
        signal = jnp.moveaxis(signal, range(len(landing.calls)), landing.where)
        define = landing.defined
        for _ in landing.hidden.loops:
            define = jax.vmap(define)
        signal = placed_as(define(signal), landing.hidden.root.aval, len(landing.hidden.loops))
        return signal, {"state": state, "ran": jnp.ones(landing.calls)} if "state" in spec.asks["signal"] else None

    def learn(self, operands: Mapping[str, Any], landing: DirectFeedback, e, records):
        """The function `(e, h, b, given) -> db`, and what it is given."""
        fn = self.function(operands, f"learn at {landing.hidden.name}")

        def learn(e, h, b, given):
            return fn(e, h, b, **self.named(operands, landing, "learn", given))

        return learn, self.given(operands, landing, "learn", e, records)


def _asking(remade, asks: frozenset[str], layer: Layer, op, learned: bool, sloped: bool, decode, kind, elements):
    """A layer under a rule that asks for more, `(values, w, b, x, given) -> y`, with a slot for the slope if `sloped`.

    What it closes over lives as long as the program that it becomes part of, so that there must be nothing traced.
    """

    @jax.custom_vjp
    def multiply(values, w, b, x, given):
        y = op(w, x)
        return (y, open_slot(y)) if sloped else y

    def forward(values, w, b, x, given):
        y = multiply(values, w, b, x, given)
        seen = (y[0] if sloped else y) if "y" in asks else None
        return y, (values, w, b, x, seen, given)

    def backward(residuals, d):
        values, w, b, x, y, given = residuals
        d, slope = d if sloped else (d, None)
        known: dict[str, Any] = {"slope": slope, "y": y, "elements": elements, "targets": given.get("targets")}
        if "h" in asks:
            known["h"] = _definition(layer, x)
        if "rng" in asks:
            known["rng"] = jax.random.wrap_key_data(given["rng"], impl=kind)
        if "state" in asks:
            known["state"] = decode(given["state"]["state"])
        named = {name: known[name] for name in asks if name in known}
        dw, dx, db, state = called(learned, remade(values), op, w, b, x, d, layer, named)
        passed = dict.fromkeys(given)
        if "state" in asks:
            passed["state"] = {"state": encoded(state)[0], "ran": jnp.ones_like(given["state"]["ran"])}
        return None, dw, db, dx, passed

    multiply.defvjp(forward, backward)
    return multiply


def _nested(landing: DirectFeedback, shared, others, own) -> list[tuple[Any, int]]:
    """How a function of one iteration and position is mapped over them, the innermost first."""
    axes = [*[own] * len(landing.own), *[others] * len(landing.others), *[shared] * len(landing.shared)]
    return list(reversed(list(zip(axes, landing.calls, strict=True))))


def at_calls(landing: DirectFeedback, record, batch):
    """What is recorded at a hidden signal, as its reader sees it: `[*calls, batch, *hidden]`."""
    seen = functools.partial(landing.read, batch=batch)
    for _ in landing.hidden.loops:
        seen = jax.vmap(seen)
    return jnp.moveaxis(seen(record), landing.where, range(len(landing.where)))


def _definition(layer: Layer, x):
    """The hidden signal that a layer reads, at its definition; None where it reads data."""
    if layer.reads is None:
        return None
    if isinstance(x, tuple):
        block, _ = layer.place
        rest = [v for i, v in enumerate(layer.eqn.invars) if i != layer.position]
        x = x[next(i for i, v in enumerate(rest) if block.value(v) is layer.operand)]
    return undo_views(layer.operand.root()[1], x)


# ---------------------------------------------------------------------------------------------------- what they return


def called(learned: bool, fn: Callable[..., Any], op, w, b, x, d, layer: Layer, named: Mapping[str, Any] = {}):
    """`(dw, dx, db, new state)`, as custom_vjp takes them."""
    made = fn(op, w, b, x, d, layer, **named)
    at, count = f"at the layer {layer.name!r}", 4 if "state" in named else 3
    if not (isinstance(made, tuple | list) and len(made) == count):
        wanted = "(dw, dx, db, state), as it asks for state" if count == 4 else "(dw, dx, db)"
        raise TypeError(f"backward returned {_what(made)} {at}: return {wanted}; db is None for fixed feedback")
    dw, dx, db, state = (*made, None)[:4]
    dw = _like(dw, w, "dw", "the weight w", at)
    if learned and db is None:
        raise ValueError(f"backward returned None for db {at}, and the rule has learned=True: return its gradient")
    if not learned and db is not None:
        raise ValueError(
            f"backward returned a db {at}, and the rule's feedback is fixed: give learned=True, or return None for db"
        )
    db = _like(db, b, "db", "the feedback weight b", at)
    if dx is not None:
        leaves, tree = jax.tree.flatten(x)
        given, other = jax.tree.flatten(dx, is_leaf=lambda leaf: leaf is None)
        if other != tree:
            raise TypeError(f"backward returned a dx of the structure {other} {at}, and x has {tree}: return that of x")
        pairs = zip(given, leaves, strict=True)
        real = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
        dx = jax.tree.unflatten(
            tree, [_like(g, leaf, "dx", "x", at) if r else None for (g, leaf), r in zip(pairs, real, strict=True)]
        )
    if "state" in named:
        state = require_same(state, named["state"], f"backward, {at},")
    return dw, dx, db, state


def _like(grad, of, name: str, what: str, at: str):
    """A gradient of the shape and dtype of what it is the gradient of; None for nothing."""
    if grad is None:
        return None
    if not hasattr(grad, "dtype"):
        raise TypeError(f"backward returned {_what(grad)} for {name} {at}: return an array of the shape of {what}")
    if grad.shape != of.shape or grad.dtype != of.dtype:
        raise ValueError(
            f"backward returned a {name} of shape {grad.shape} and dtype {grad.dtype} {at}, and {what} has shape "
            f"{of.shape} and dtype {of.dtype}: return both as they are there"
        )
    return grad


def arriving(landing: DirectFeedback, signal, e):
    """What a direct rule brings to a hidden signal, checked."""
    name, wanted = landing.hidden.name, (e.shape[0], *landing.signal_shape)
    if not hasattr(signal, "dtype"):
        raise TypeError(
            f"signal returned {_what(signal)} at the hidden signal {name!r}: return an array of shape {wanted}, the "
            "batch and the hidden signal; lrules.direct(None) brings nothing anywhere"
        )
    if signal.shape != wanted:
        raise ValueError(
            f"signal returned an array of shape {signal.shape} at the hidden signal {name!r}: return one of shape "
            f"{wanted}, the batch and the hidden signal"
        )
    return signal


def learned_by(landing: DirectFeedback, db, b):
    """The gradient of a direct feedback weight, checked."""
    if not hasattr(db, "dtype") or db.shape != b.shape:
        got = f"an array of shape {db.shape}" if hasattr(db, "dtype") else _what(db)
        raise (ValueError if hasattr(db, "dtype") else TypeError)(
            f"learn returned {got} for the feedback weight of {landing.hidden.name!r}: return its gradient, of shape "
            f"{b.shape}"
        )
    return db.astype(b.dtype)


def _what(made: Any) -> str:
    """A short name of what a function returned."""
    if made is None:
        return "None"
    if isinstance(made, Sequence):
        return f"{len(made)} thing{'s' if len(made) != 1 else ''}"
    return f"one {type(made).__name__}" if not hasattr(made, "shape") else "one array"
