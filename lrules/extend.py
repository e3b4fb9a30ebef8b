"""The parts for rules that `sequential` and `direct` cannot make. The rules of the library use the same parts.

A *site* is a place in a network where something happens to the error: a layer, a hidden signal (see docs/terms.md), an
activation, a bias or a scale. A *handler* decides what happens at the sites while the network runs. It reads and writes
a *frame*. A *plan* is what a rule does at each site of one network; `make_plan` also refuses what the rule cannot
serve.

| to | use |
| --- | --- |
| see what is in a network | `net.graph(params, inputs)`, a `Graph`: `layers`, `hidden`, `activations`, `affines` |
| run it with other arithmetic | `Handler`, `Frame`, `Operation`, `run`; `key_at` for noise, `all_zeros_at` for probes |
| say what a rule does where | `Sequential`, `Direct`, `Backprop`; `make_plan`, `Plan`; `layerwise` makes a rule of it |
| run a network as a plan says | `evaluate`; with direct feedback `run_to_heads` and `from_heads` |
| send the output error | `output_error`, `sent_error`, `direct_feedback_gradient`; `project` and `correlate` |
| round a signal to powers of two | `quantize` |
| tell activations apart | `treated`, `passing_names` |
| find the batch in a tensor | `batch_axis`, `doubled`, `BatchAxis` |
| put a value where another is | `placed_as`, `split_as` (devices), `at_least_float32` (precision) |
| check what users give | `as_network`, `check_params`, `mean_loss` |

An example: a rule with two forward passes. It is node perturbation without feedback weights. The second pass adds
noise xi_l to all hidden signals, and each signal learns from the change of the loss of the example. So the signal
s_l = (L(xi) - L(0)) / std xi_l arrives at hidden signal l. It goes through the activation and the layer below, and no
further. The last layer has its true gradient.

    >>> import jax, jax.numpy as jnp, lrules
    >>> from lrules import extend
    >>> class Noise(extend.Handler):
    ...     arrays = ("key",)  # the attributes that hold arrays
    ...     def __init__(self, std, key):
    ...         self.std, self.key = std, key
    ...     def hidden(self, hidden, value, frame):
    ...         xi = jax.random.normal(extend.key_at(self.key, hidden.name, value, frame), value.shape, value.dtype)
    ...         frame.records[hidden.name] = xi  # inside a loop, records come out stacked
    ...         return value + self.std * xi
    >>> class Local(extend.Handler):
    ...     arrays = ("gain",)
    ...     def __init__(self, gain):
    ...         self.gain = gain
    ...     def hidden(self, hidden, value, frame):
    ...         xi = frame.inputs[hidden.name]
    ...         gain = self.gain.reshape(-1, *[1] * (xi.ndim - 1)).astype(xi.dtype)
    ...         frame.records[hidden.name] = jnp.sum(gain * xi * value)  # gain * xi arrives here
    ...         return jax.lax.stop_gradient(value)  # and nothing from above
    >>> def perturbed(std):
    ...     own = extend.Sequential(lambda *_: (None, None, None))  # at every layer: not backpropagation
    ...     def plan(net, graph, params, inputs):  # refuses networks that it cannot serve
    ...         return extend.make_plan(net, graph, params, inputs, lambda name: own, partition=False)
    ...     def init(key, net, params, inputs):
    ...         net = extend.as_network(net)
    ...         return plan(net, net.graph(params, inputs), params, inputs).init(key, net.parameters(params))
    ...     def transform(net, *, reduction="mean"):
    ...         raise ValueError("perturbed needs the loss: use lrules.value_and_grad(net, loss, rule)")
    ...     def value_and_grad(net, loss):
    ...         def step(params, feedback, inputs, targets, *, rng):
    ...             plan(net, net.graph(params, inputs), params, inputs)
    ...             clean, aux, _ = extend.run(net, params, inputs)
    ...             noisy, _, xi = extend.run(net, params, inputs, [Noise(std, rng)])
    ...             effect = (loss(noisy, targets) - loss(clean, targets)) / std
    ...             def objective(params):
    ...                 handlers = [Local(effect / effect.size), *net.handlers]  # modifiers act on what arrives
    ...                 outputs, _, sent = extend.run(net, params, inputs, handlers, given=xi)
    ...                 return extend.mean_loss(net, loss, outputs, inputs, targets) + sum(map(jnp.sum, sent.values()))
    ...             head = extend.mean_loss(net, loss, clean, inputs, targets), clean
    ...             grads = lrules.Gradients(jax.grad(objective)(params), {})
    ...             return ((*head, aux) if net.has_aux else head), grads
    ...         return step
    ...     return lrules.Rule(
    ...         init, transform, value_and_grad, stochastic=True, description=extend.RuleDescription(plan)
    ...     )
    >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    >>> x, y, rule = jnp.ones((5, 3)), jnp.zeros((5, 2)), perturbed(1e-3)
    >>> step = lrules.value_and_grad(net, lrules.testing.half_squared_error, rule)
    >>> (value, _), grads = step(params, rule.init(jax.random.key(0), net, params, x), x, y, rng=jax.random.key(1))
    >>> grads.params["a"].shape
    (3, 4)

Sequential feedback goes with the weights: `b` replaces `w`, after the same casts, reshapes and slices. A handler that
changes the error at a site is an identity with a custom derivative (`jax.custom_vjp`). Give it all arrays as arguments:
inside a loop it must not close over arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lrules.apply import mean_loss
from lrules.constructors import layerwise
from lrules.engine.activations import passing_names, treated
from lrules.engine.batch import BatchAxis, batch_axis, doubled
from lrules.engine.dtypes import at_least_float32
from lrules.engine.graph import Graph
from lrules.engine.handlers import Frame, Handler, Operation, all_zeros_at, key_at, zeros_at
from lrules.engine.jaxprs import placed_as, split_as
from lrules.engine.landing import direct_feedback_gradient, output_error, sent_error
from lrules.engine.plan import Plan
from lrules.engine.planning import make_plan
from lrules.engine.product import Product
from lrules.engine.quantizer import quantize
from lrules.engine.recomputed import RecomputedFeedback
from lrules.engine.records import Activation, Affine, Hidden, Layer
from lrules.engine.running import evaluate, from_heads, run_to_heads
from lrules.engine.weights import DirectFeedback, SequentialFeedback, sequential_feedback_of
from lrules.network import NetworkLike, as_network
from lrules.rule import Backprop, Direct, LayerRule, RuleDescription, Sequential, check_params, require_description
from lrules.typing import Pytree

__all__ = [
    "Activation",
    "Affine",
    "Backprop",
    "BatchAxis",
    "Direct",
    "DirectFeedback",
    "Frame",
    "Graph",
    "Handler",
    "Hidden",
    "Layer",
    "LayerRule",
    "Operation",
    "Plan",
    "Product",
    "RecomputedFeedback",
    "RuleDescription",
    "Sequential",
    "SequentialFeedback",
    "all_zeros_at",
    "as_network",
    "at_least_float32",
    "batch_axis",
    "check_params",
    "correlate",
    "direct_feedback_gradient",
    "doubled",
    "evaluate",
    "from_heads",
    "key_at",
    "layerwise",
    "make_plan",
    "mean_loss",
    "output_error",
    "passing_names",
    "placed_as",
    "project",
    "quantize",
    "require_description",
    "run",
    "run_to_heads",
    "sent_error",
    "sequential_feedback_of",
    "split_as",
    "treated",
    "zeros_at",
]


def run(
    net: NetworkLike,
    params: Pytree,
    inputs: Pytree,
    handlers: Sequence[Handler] = (),
    *,
    given: Mapping[str, Any] | None = None,
) -> tuple[Any, Any, dict[str, Any]]:
    """Runs a network with handlers at its sites.

    Args:
      net, params, inputs: the network, and what it takes.
      handlers: the handlers; the first acts nearest to the layers. Those of modifiers (`net.handlers`) act only if you
        give them too.
      given: arrays by site; handlers find them in `frame.inputs`. Arrays of sites inside a loop have its length in
        front, see `zeros_at`.

    Returns:
      `(outputs, aux, records)`; the records are the arrays that handlers wrote into `frame.records`, stacked over
      loops.

    Raises:
      TypeError: `handlers` is not a list of handlers.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> class Widths(lrules.extend.Handler):
      ...     def layer(self, layer, op, w, b, x, frame):
      ...         frame.records[layer.at_output] = y = op(w, x)
      ...         return y
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> outputs, aux, records = lrules.extend.run(net, params, jnp.ones((5, 3)), [Widths()])
      >>> {site: value.shape for site, value in records.items()}
      {'a output': (5, 4), 'b output': (5, 2)}
    """
    wrong = [h for h in ([handlers] if isinstance(handlers, Handler) else handlers) if not isinstance(h, Handler)]
    if wrong or isinstance(handlers, Handler):
        got = "one handler" if isinstance(handlers, Handler) else f"a {type(wrong[0]).__name__} among them"
        raise TypeError(f"run: handlers must be a list of handlers, such as [MyHandler()], got {got}")
    net, frame = as_network(net), Frame(given or {})
    graph = net.graph(params, inputs)
    outputs, aux = graph.run(net.parameters(params), jax.tree.leaves(inputs), handlers=handlers, frame=frame)
    return outputs, aux, frame.taken()


def project(e: jax.Array, b: jax.Array | RecomputedFeedback) -> jax.Array:
    """Brings the output error to a hidden signal.

    s = e . B

    Args:
      e: the output error, `[batch, outputs]`.
      b: the feedback weight, `[outputs, *hidden]`; with `storage="recomputed"`, a `RecomputedFeedback`.

    Returns:
      The signal, `[batch, *hidden]`.

    Raises:
      TypeError: b is None.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> lrules.extend.project(jnp.ones((5, 2)), jnp.ones((2, 3, 4))).shape
      (5, 3, 4)
    """
    if isinstance(b, RecomputedFeedback):
        return b.projected(e if e.dtype == b.dtype else e.astype(b.dtype))
    if b is None:
        raise TypeError("project: b is None, because the rule has no feedback weights: give the rule init=")
    e = e if e.dtype == b.dtype else e.astype(b.dtype)
    return jax.lax.dot_general(e, b, (((e.ndim - 1,), (0,)), ((), ())))


def correlate(e: jax.Array, h: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies the output error by a hidden signal, and sums over the batch.

    dB = sum over examples of e h^T

    It is the transpose of `project`, so JAX itself sums over devices if the batch lies on several.

    Args:
      e: the output error, `[batch, outputs]`.
      h: the hidden signal, `[batch, *hidden]`.
      b: the feedback weight, `[outputs, *hidden]`, for its shape and dtype.

    Returns:
      An array like b.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> lrules.extend.correlate(jnp.ones((5, 2)), jnp.ones((5, 3)), jnp.zeros((2, 3))).tolist()
      [[5.0, 5.0, 5.0], [5.0, 5.0, 5.0]]
    """
    return jax.vjp(lambda b: project(e, b), b)[1](h)[0]


def __dir__() -> list[str]:
    return list(__all__)
