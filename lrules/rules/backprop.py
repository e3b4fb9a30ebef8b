"""The two ends of every comparison: backpropagation, and training only the last layer.

Backpropagation: delta_l = (W_{l+1}^T delta_{l+1}) * f'(z_l), dW_l = delta_l h_{l-1}^T.
Last layer only: delta_l = 0 for every hidden layer l (Baldi, Sadowski, Lu 2018, section 3, the "top layer only" row).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from lrules.constructors import direct
from lrules.extend import Backprop, Frame, Graph, Plan, RuleDescription
from lrules.network import Network, NetworkLike
from lrules.rule import Feedback, Rule
from lrules.typing import Pytree


def backprop() -> Rule:
    """Backpropagation (BP) as a rule: its update is the gradient.

    delta_l = (W_{l+1}^T delta_{l+1}) * f'(z_l),  dW_l = delta_l h_{l-1}^T

    It serves every network. Without modifiers it does not change the network, so it costs what `jax.value_and_grad`
    costs.

    Returns:
      The rule. It has no feedback weights: its feedback is `Feedback({}, {})`.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, w, x = lambda w, x: jnp.tanh(x @ w), jnp.ones((3, 2)), jnp.ones((5, 3))
      >>> f = lrules.transform(net, lrules.backprop())
      >>> grads = jax.grad(lambda w: f(w, lrules.Feedback({}, {}), x).sum())(w)
      >>> bool((grads == jax.grad(lambda w: net(w, x).sum())(w)).all())
      True
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
    """Trains only the last layer: no error arrives at any hidden signal (see docs/terms.md).

    delta_l = 0 for l < L

    Parameters from which a path without a hidden signal leads to the outputs get their gradient. All others get zero.

    Returns:
      The rule. It has no feedback weights.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> f = lrules.transform(net, lrules.last_layer_only())
      >>> grads = jax.grad(lambda p: f(p, lrules.Feedback({}, {}), jnp.ones((5, 3))).sum())(params)
      >>> {name: bool(g.any()) for name, g in grads.items()}
      {'a': False, 'b': True}

    References:
      Baldi, Sadowski, Lu: Learning in the machine: random backpropagation and the deep learning channel (2018), 3.
    """
    return direct(None)
