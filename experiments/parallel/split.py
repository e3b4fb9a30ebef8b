"""The feedback of a whole network, as the stages of a pipeline need it, and what a pipeline refuses."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

import lrules
from experiments.errors import InputError
from experiments.parallel.stages import BOUNDARY, Params, PyTree, SplitFeedback, Staged


def split_feedback(
    net: Staged, rule: lrules.Rule, params: Params, feedback: lrules.Feedback, inputs: Any
) -> SplitFeedback:
    """The feedback of the whole network, as the devices need it.

    Args:
      net, rule: the network and a direct rule.
      params: the parameters, with a list of stages.
      feedback: `rule.init(key, net.whole, params, inputs)`, or gradients of learned feedback in the same form.
      inputs: inputs of the network; only their shapes matter.

    Raises:
      InputError: direct feedback does not land at what one stage sends to the next.
    """
    names = _names(net, rule, params, inputs)
    everywhere = set.intersection(*({name for local, name in own.items() if local == name} for own in names))
    if together := everywhere & set(feedback.learned):
        raise InputError(
            f"All stages share the learned feedback weight {min(together)!r}, and each would have its own gradient of "
            "it: leave out learned_factors."
        )
    parts = []
    for own in names:
        fixed = {local: feedback.fixed[name] for local, name in own.items() if name in feedback.fixed}
        learned = {local: feedback.learned[name] for local, name in own.items() if name in feedback.learned}
        parts.append(lrules.Feedback(fixed, learned))
    return SplitFeedback(parts[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts[1:]))


def _names(net: Staged, rule: lrules.Rule, params: Params, inputs: Any) -> list[dict[str, str]]:
    """For `first` and for each stage: its feedback weights, and their names in the whole network."""
    _check(net, rule, params, inputs)

    def drawn(apply: Any, *args: Any) -> set[str]:
        made = jax.eval_shape(lambda *args: rule.init(jax.random.key(0), apply, *args), *args)
        return {*made.fixed, *made.learned}

    whole = drawn(net.whole, params, inputs)
    h = jax.eval_shape(net.first, params.first, inputs)
    locals_ = [drawn(net.alone(net.first), {"part": params.first, "last": params.last}, inputs)]
    locals_ += [drawn(net.alone(net.stage), {"part": p, "last": params.last}, h) for p in params.stages]
    prefixes = ["first", *(f"stages/{i}" for i in range(len(params.stages))), "last"]
    inner = [
        {n: prefix + n.removeprefix("part") for n in own if re.match(r"part\b", n)}
        for prefix, own in zip(prefixes[:-1], locals_, strict=True)
    ]
    upper = [*((net.stage, p) for p in params.stages), (net.last, params.last)]
    found, used = [], {name for own in inner for name in own.values()}
    for i, own in enumerate(locals_):
        shared = {n: n for n in own & whole if not n.startswith(("part", "last"))}  # a factor of all feedback weights
        ends = sorted(own - inner[i].keys() - shared.keys())
        reader = re.compile(rf"{prefixes[i + 1]}\b|{BOUNDARY}/{i}$")
        above = sorted(n for n in whole - used if reader.match(n))
        above = [n for n in above if n.startswith(BOUNDARY) or _reads_it_as_it_is(upper[i], n, prefixes[i + 1], h)]
        if len(ends) != 1 or len(above) != 1 or not set(inner[i].values()) <= whole:
            raise InputError(
                f"Direct feedback does not land at what {prefixes[i]!r} sends to {prefixes[i + 1]!r}: let the first "
                f"layer of a stage read it as it is, or give the rule at={BOUNDARY!r}, so that feedback lands there."
            )
        found.append(inner[i] | shared | {ends[0]: above[0]})
    return found


class _Signals(lrules.extend.Handler):
    """Notes what a layer computes, and each hidden signal."""

    def __init__(self) -> None:
        self.hidden_signals: dict[str, Any] = {}
        self.output: Any = None

    def layer(self, layer: Any, op: Any, w: Any, b: Any, x: Any, frame: Any) -> Any:
        y = op(w, x)
        self.output = y if layer.site == "below" else self.output
        return y

    def hidden(self, hidden: Any, value: Any, frame: Any) -> Any:
        self.hidden_signals[hidden.name] = value
        return value


def _reads_it_as_it_is(upper: tuple[Any, PyTree], name: str, prefix: str, h: Any) -> bool:
    """Whether the layer `name` of a part reads what comes from below, not a function of it."""
    (part, params), seen = upper, _Signals()

    def apply(params: dict[str, PyTree], x: jax.Array) -> Any:
        return part(params["part"], x @ params["below"])

    width = jax.ShapeDtypeStruct((h.shape[-1],) * 2, h.dtype)
    network = lrules.Network(apply)
    jax.eval_shape(lambda p, x: lrules.extend.run(network, p, x, [seen])[0], {"part": params, "below": width}, h)
    return seen.hidden_signals.get("part" + name.removeprefix(prefix)) is seen.output


def _check(net: Staged, rule: lrules.Rule, params: Params, inputs: Any) -> None:
    remedy = "use direct_feedback_alignment()"
    if rule.stochastic or not rule.additive:
        kind = "draws random numbers at every step" if rule.stochastic else "needs the whole batch at once"
        raise InputError(f"The rule {kind}, and a pipeline adds up microbatches: {remedy}.")
    described = lrules.describe(net.whole, rule, params, inputs)
    if any(row["rule"] != "direct" for row in described.layers):
        raise InputError(f"The rule is not direct at every layer: use gpipe() for backprop, or {remedy}.")
    if not described.feedback_bytes:
        raise InputError(f"The rule has no feedback weights, which bring the error to a stage alone: {remedy}.")
    if described.error_at:
        raise InputError(f"The rule takes the output error {described.error_at}: move that function into the loss.")
    try:
        lrules.transform(net.whole, rule)
    except ValueError:
        raise InputError(f"The rule needs the targets or the loss, and a stage gets the error: {remedy}.") from None
