"""Each layer gets its own rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from lrules.extend import Backprop, Graph, LayerRule, layerwise, require_description
from lrules.options import ByName, first_match, require_pattern
from lrules.rule import Rule


def partition(rules: Mapping[str, Rule]) -> Rule:
    """Gives each layer the rule of the first regular expression that matches the layer's name.

    The rule of a layer decides what arrives at the hidden signal that the layer reads, and how the weight gradient of
    the layer is formed. If several layers with sequential rules (backprop is one) read the same hidden signal, their
    errors add up there.

    Args:
      rules: a dict from regular expressions to rules. `re.search` looks for them in the name of the layer's parameter:
        the name that `lrules.describe` prints, without `#2` and the like. The first match holds.

    Returns:
      The rule.

    Raises:
      TypeError: `rules` is not a dict.
      ValueError: a rule acts on the network as a whole, so it cannot serve single layers. At `init` or use: an
        expression is not the first match of a layer, a layer has no match, or the rules of one hidden signal disagree.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["head"]
      >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 4)), "head": jnp.ones((4, 2))}
      >>> rule = lrules.partition({"head": lrules.backprop(), ".*": lrules.feedback_alignment()})
      >>> list(rule.init(jax.random.key(0), net, params, jnp.ones((1, 3))).fixed)
      ['b']
    """
    if not isinstance(rules, Mapping):
        raise TypeError(f"partition: rules must be a dict {{pattern: rule}}, got a {type(rules).__name__}")
    if not rules:
        raise ValueError("partition: rules must have at least one rule, as in {'.*': rule}, got an empty dict")
    layers: dict[str, LayerRule] = {}
    phases: dict[str, LayerRule] = {}
    for pattern, rule in rules.items():
        require_pattern(pattern)
        if not isinstance(rule, Rule):
            raise ValueError(f"partition[{pattern!r}] is a {type(rule).__name__}, not a rule: call its factory first")
        layer = require_description(rule, "partition", f"the rule for {pattern!r}").layer
        if layer is None:
            raise ValueError(
                f"partition: the rule for {pattern!r} acts on the network as a whole, so it cannot serve single "
                "layers: give a sequential or a direct rule, and put modifiers around the partition"
            )
        layers[pattern] = layer
        if rule.phase is not None:
            own = require_description(rule.phase, "partition", f"the phase of the rule for {pattern!r}").layer
            phases[pattern] = Backprop() if own is None else own

    chosen: ByName[LayerRule] = ByName("partition", layers)

    def choose_for(graph: Graph) -> Callable[[str], LayerRule]:
        refused = [graph.names[i] for refusal in graph.refusals for i in sorted(refusal.parameters)]
        names = [*(layer.name for layer in graph.layers), *refused]
        chosen.check(names)
        for name in names:
            chosen.of(name)  # this refuses a layer without a rule
        return lambda name: first_match(layers, name) or Backprop()

    def phase_for(graph: Graph) -> Callable[[str], LayerRule]:
        choose_for(graph)  # this refuses the same
        own: dict[str, LayerRule] = {pattern: phases.get(pattern, Backprop()) for pattern in layers}
        return lambda name: first_match(own, name) or Backprop()

    phase = layerwise(phase_for, phases.values(), layer=None) if phases else None
    return dataclasses.replace(layerwise(choose_for, layers.values(), layer=None), phase=phase)
