"""The two ends of every comparison: backpropagation, and training the last layer alone.

Backpropagation: delta_l = (W_{l+1}^T delta_{l+1}) * f'(z_l), dW_l = delta_l h_{l-1}^T.
Last layer only: delta_l = 0 for every hidden layer l (Baldi, Sadowski, Lu 2018, section 3, the "top layer only" row).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from lrules.constructors import direct
from lrules.engine.graph import Graph
from lrules.engine.handlers import Frame
from lrules.engine.plan import Plan
from lrules.network import Network, NetworkLike
from lrules.rule import Backprop, Feedback, Rule, RuleDescription
from lrules.typing import Pytree


def backprop() -> Rule:
    """Backpropagation, as a rule: the gradient itself.

    Serves any network. Without modifiers the network runs as it is, so this costs what `jax.value_and_grad` costs.

    Returns:
      The rule; its feedback is `Feedback({}, {})`.
    """

    def init(key: jax.Array, net: NetworkLike, params: Pytree, inputs: Pytree) -> Feedback:
        return Feedback({}, {})

    def transform(net: Network, *, reduction: str = "mean") -> Callable[..., Any]:
        def f(params: Pytree, feedback: Feedback, inputs: Pytree, *, rng: jax.Array | None = None) -> Any:
            if not net.handlers:
                return net(params, inputs)
            graph = net.graph(params, inputs)
            outputs, aux = graph.run(
                net.parameters(params), jax.tree.leaves(inputs), handlers=net.handlers, frame=Frame()
            )
            return (outputs, aux) if net.has_aux else outputs

        return f

    everywhere = Backprop()

    def plan(net: Network, graph: Graph, params: Pytree, inputs: Pytree) -> Plan:
        return Plan(graph, {layer.site: everywhere for layer in graph.layers}, {}, {})

    return Rule(init, transform, description=RuleDescription(plan, everywhere))


def last_layer_only() -> Rule:
    """Trains only what reaches the outputs without crossing a hidden signal; everything below stays as it is.

    delta_l = 0 for l < L.

    Returns:
      The rule; it needs no feedback.

    References:
      Baldi, Sadowski, Lu: Learning in the machine: random backpropagation and the deep learning channel (2018).
    """
    return direct(None)
