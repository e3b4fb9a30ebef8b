"""A rule per layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lrules.constructors import layerwise
from lrules.engine.graph import Graph
from lrules.options import ByName, first_match, require_pattern
from lrules.rule import Backprop, Direct, LayerRule, Rule, require_description


def partition(rules: Mapping[str, Rule]) -> Rule:
    """Gives each layer the rule of the first regular expression that its name matches.

    A layer's rule decides what arrives at the hidden signal that the layer reads, and how its weight gradient
    is formed. Sequential rules (backprop among them) that read one hidden signal add up there.

    Args:
      rules: regular expressions (`re.search` on the name of the layer's parameter: what `lrules.describe` prints,
        without `#2` and the like) to rules; the first match wins.

    Returns:
      The rule.

    Raises:
      TypeError: `rules` is no dict.
      ValueError: a rule cannot be said layer by layer; or at `init` or use, an expression matches no layer, a layer
        matches none, or the rules of one hidden signal disagree.

    Example:
      >>> from lrules import backprop, feedback_alignment
      >>> rule = partition({"head": backprop(), ".*": feedback_alignment()})
    """
    if not isinstance(rules, Mapping):
        raise TypeError(f"partition wants a dict of rules, not a {type(rules).__name__}: give {{pattern: rule, ...}}")
    if not rules:
        raise ValueError("partition got no rules: give at least {'.*': rule}")
    layers: dict[str, LayerRule] = {}
    for pattern, rule in rules.items():
        require_pattern(pattern)
        if not isinstance(rule, Rule):
            raise ValueError(f"partition[{pattern!r}] is a {type(rule).__name__}, not a rule: call its factory first")
        layer = require_description(rule, "partition", f"the rule for {pattern!r}").layer
        if layer is None:
            raise ValueError(
                f"the rule for {pattern!r} acts on the network as a whole and cannot be given to single layers: "
                "partition takes sequential and direct rules (put a modifier around the partition)"
            )
        layers[pattern] = layer

    chosen: ByName[LayerRule] = ByName("partition", layers)

    def choose_for(graph: Graph) -> Callable[[str], LayerRule]:
        refused = [graph.names[i] for refusal in graph.refusals for i in sorted(refusal.parameters)]
        names = [*(layer.name for layer in graph.layers), *refused]
        chosen.check(names)
        for name in names:
            chosen.of(name)  # which refuses a layer without a rule
        return lambda name: first_match(layers, name) or Backprop()

    return layerwise(
        choose_for,
        layer=None,
        additive=all(rule.additive for rule in rules.values()),
        stochastic=any(rule.stochastic for rule in rules.values()),
        targets=any(isinstance(layer, Direct) and layer.targets for layer in layers.values()),
    )
