"""Feedback weights that learn by node perturbation (Lansdell, Prakash, Kording 2019).

A second forward pass adds noise to all hidden signals h_l at once: sigma xi_l, where xi_l has unit variance and one
draw per example. This estimates the gradient of the loss L of each example at each hidden signal,

    lambda_l = (L(xi) - L(0)) xi_l / sigma,    E lambda_l = dL/dh_l + O(sigma)               (Eq. 3)

and the feedback weights descend the squared distance between this estimate and the error that they bring there:

    sequential    B descends 1/2 |B_{l+1}^T e_{l+1} - lambda_l|^2,  e_l = (B_{l+1}^T e_{l+1}) * f'(z_l)    (Eq. 4)
    direct        B descends 1/2 |B_l^T e - lambda_l|^2,  e the output error                     (Corollary 1)

The forward weights learn on the clean pass, with B instead of W^T. The residual belongs to the hidden signal: it is the
whole error that arrives there minus the estimate, and it is the same for each layer that reads the hidden signal. The
gradient of B is a weight gradient in which the residual replaces the input of the layer, <d, op(B, residual)>. So a
third run of the network, in which residuals replace the hidden signals, gives this gradient for layers of every kind.
Nothing else of this run is needed, and under `jit` nothing else is computed.

Least squares (Eq. 5, 9, 11): B = S V^-1 with V = ridge I + sum d d^T and S = sum lambda d^T, where the sums are over
all batches so far. The B that `init` draws brings the error down in the first step, and has no effect after it. The
pairs of a batch enter B after the forward weights have got their gradients from B.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from lrules.constructors import no_transform
from lrules.extend import (
    Direct,
    Graph,
    Layer,
    LayerRule,
    Plan,
    Product,
    RuleDescription,
    Sequential,
    as_network,
    check_params,
    make_plan,
    project,
)
from lrules.network import Network, NetworkLike
from lrules.options import as_initializer, by_name, is_positive, require_flags
from lrules.rule import Feedback, Gradients, Rule
from lrules.rules.node_perturbation.experiment import Experiment
from lrules.rules.node_perturbation.least_squares import Rows, layouts
from lrules.typing import Initializer, Loss, Numbers, Pytree

Solver = Literal["sgd", "rls"]


def node_perturbation(
    std: Numbers,
    *,
    direct: bool = False,
    solver: Solver = "sgd",
    init: Initializer | None = None,
    noise: Callable[..., jax.Array] = jax.random.normal,
    ridge: float = 0.1,
    max_feedback_bytes: float = 2**30,
) -> Rule:
    """Node perturbation: feedback weights learn the effect of noise in the hidden signals on the loss.

    lambda_l = (L(xi) - L(0)) xi_l / std,  B_{l+1} descends 1/2 |B_{l+1}^T e_{l+1} - lambda_l|^2

    The rule makes two forward passes, the second one with new noise at every step, from `rng=`. The value and the
    outputs are those of the first, clean pass.

    With `solver="sgd"` the feedback weights are learned: `grads.feedback` is their gradient, a mean over examples. Give
    them their own optimizer and learning rate. With `solver="rls"` the feedback weights are the least-squares solution
    for all batches so far: continue with `feedback._replace(state=grads.state)`. A batch enters this solution after the
    rule has computed `grads.params` for it. So the first step uses the feedback weights that `init` draws, and later
    steps do not depend on them. To let the feedback weights settle before the forward weights change, begin with steps
    that do not use `grads.params`.

    Args:
      std: the standard deviation of the noise; or a dict of such numbers by regular expression (`re.search` on the name
        of the hidden signal, the first match holds). `jax.jit` and `jax.vmap` may trace them.
      direct: True brings the output error (see docs/terms.md) straight to every hidden signal, as direct feedback
        alignment does. False brings the error down through every layer, as feedback alignment does.
      solver: `"sgd"`, or `"rls"` for recursive least squares. `"rls"` serves dense layers, and direct feedback to every
        layer. Under `jit` with a sharded batch, and under `shard_map`, it uses the examples of all devices. Under
        `pmap`, or with `check_vma=False`, it uses those of one device.
      init: the initializer of the feedback weights, as in `feedback_alignment` and `direct_feedback_alignment`;
        default `jax.nn.initializers.glorot_normal()`.
      noise: `(key, shape, dtype)` -> numbers with mean 0 and variance 1, such as `jax.random.rademacher`.
      ridge: the multiple of the identity with which least squares start.
      max_feedback_bytes: the rule refuses to make more bytes of direct feedback than this.

    Returns:
      The rule. It needs `rng=`, and `lrules.value_and_grad`.

    Raises:
      ValueError: an argument is out of range. `lrules.transform` raises it, because the rule needs the loss. At use:
        a pattern in `std` matches no hidden signal, or the noise does not have the shape that the rule asks for.
      TypeError: `init` or `noise` is not a function.
      NotImplementedError: at use: a hidden signal lies inside a `cond` or `shard_map` of the network, its batch axis
        cannot be found, or a layer is not dense and the solver is `"rls"`.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> x, rule, loss = jnp.ones((5, 3)), lrules.node_perturbation(0.01), lrules.testing.half_squared_error
      >>> feedback = rule.init(jax.random.key(0), net, params, x)
      >>> step = lrules.value_and_grad(net, loss, rule)
      >>> (value, outputs), grads = step(params, feedback, x, jnp.zeros((5, 2)), rng=jax.random.key(1))
      >>> grads.feedback["b"].shape
      (4, 2)

    References:
      Lansdell, Prakash, Kording: Learning to solve the credit assignment problem (2019), sections 2 and 3, Eq. 1 to 5,
      9, 11; Theorems 1 and 2, Corollary 1.
    """
    stds = by_name("std", std, is_positive, "a finite number > 0", "hidden signal", traced=True)
    require_flags(direct=direct)
    if solver not in get_args(Solver):
        raise ValueError(f'solver must be "sgd" or "rls", got {solver!r}')
    if not is_positive(ridge):
        raise ValueError(f"ridge must be a finite number > 0, got {ridge!r}")
    if not callable(noise):
        raise TypeError(f"noise must be a function (key, shape, dtype) -> array, got a {type(noise).__name__}")
    draw = as_initializer(init)
    learned = solver == "sgd"
    if direct:
        learn = (lambda e, h, b: jnp.zeros_like(b)) if learned else None  # the gradient is computed below
        spec: Any = Direct(_arrive, draw, learn, max_feedback_bytes=max_feedback_bytes, offers=())
    else:
        spec = Sequential(_backward_learned if learned else _backward, draw, learned)

    def choose(name: str) -> LayerRule:
        return spec

    def plan(net: Network, graph: Graph, params: Pytree, inputs: Pytree) -> Plan:
        def make() -> Plan:
            made = make_plan(net, graph, params, inputs, choose, partition=False)
            made.state_layouts = None if learned else layouts
            return made

        return graph.once_for(choose, make)

    def rule_init(key: jax.Array, net: NetworkLike, params: Pytree, inputs: Pytree) -> Feedback:
        net = as_network(net)
        check_params(params)
        graph = net.graph(params, inputs)
        made = plan(net, graph, params, inputs)
        leaves = net.parameters(params)
        feedback = made.init(key, leaves)
        if learned:
            return feedback
        return Feedback({}, {}, made.placed_state(Rows(made).begin(feedback.fixed, ridge), leaves))

    def value_and_grad(net: Network, loss: Loss) -> Callable[..., tuple[tuple[Any, ...], Gradients]]:
        def fn(
            params: Pytree, feedback: Feedback, inputs: Pytree, targets: Pytree, *, rng: jax.Array | None = None
        ) -> tuple[tuple[Any, ...], Gradients]:
            graph = net.graph(params, inputs)
            made = plan(net, graph, params, inputs)
            if not (learned or isinstance(feedback.state, dict)):
                raise ValueError(
                    'node_perturbation(solver="rls") keeps its feedback in feedback.state, and the state of this '
                    "feedback is empty: make new feedback with rule.init(key, net, params, inputs)"
                )
            weights = feedback if learned else Feedback({n: s["b"] for n, s in feedback.state.items()}, {})
            made.check(weights)
            experiment = Experiment(net, graph, made, loss, stds, noise)
            measure = experiment.direct if direct else experiment.sequential
            head, grads, db, statistics = measure(params, weights, inputs, targets, rng)
            if learned:
                return head, Gradients(grads, {name: db[name] for name in feedback.learned}, feedback.state, {})
            n, rows = net.batch_size(inputs), Rows(made)
            state = {name: rows.step(name, s, n * db[name], statistics[name]) for name, s in feedback.state.items()}
            return head, Gradients(grads, {}, state, {})

        return fn

    transform = no_transform("node_perturbation compares the losses of two forward passes")
    return Rule(rule_init, transform, value_and_grad, stochastic=True, description=RuleDescription(plan))


def _backward(op: Product, w: jax.Array, b: Any, x: jax.Array, d: jax.Array, layer: Layer) -> tuple[Any, Any, None]:
    return op.weight_gradient(w, x, d), op.passed_down(b, x, d), None


def _backward_learned(
    op: Product, w: jax.Array, b: jax.Array, x: jax.Array, d: jax.Array, layer: Layer
) -> tuple[Any, Any, jax.Array]:
    dw, dx, _ = _backward(op, w, b, x, d, layer)
    return dw, dx, jnp.zeros_like(b)  # its gradient is formed in `_Experiment`


def _arrive(e: jax.Array, b: Any, targets: Pytree, name: str) -> jax.Array:
    return project(e, b)
