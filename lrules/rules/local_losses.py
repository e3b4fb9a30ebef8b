"""Local losses: every hidden signal learns from a loss of its own, one layer above it (Nokland, Eidnes 2019).

No error comes down from the layers above: each hidden signal h_l passes its value on and stops the error. The layers
between two hidden signals learn from the loss at the upper one. There are two losses, each with one learned layer:

    prediction    L_pred = L(C_l h_l, t),  where L is the loss of the network; for classes the cross-entropy
    similarity    L_sim = mean over pairs (i, j) of (S(K_l h_l)_ij - S(t)_ij)^2
    both          (1 - beta) L_pred + beta L_sim,  with beta = 0.99

S(a)_ij is the cosine of the angle between a_i and a_j, the rows of examples i and j, after the mean of each row is
subtracted. The paper writes L_sim as the squared Frobenius norm, a sum over pairs. The authors' program takes the mean,
and so does this file: with the sum, the two losses would have another proportion for each size of the batch.

K_l is a matrix. Where h_l has positions (`[batch, *positions, features]`, a map of a convolution), K_l is a convolution
of width 3, and the standard deviation of each feature over the positions is compared, as in the paper.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args

import jax
import jax.numpy as jnp

from lrules.constructors import direct, drawn_by, no_transform
from lrules.engine.handlers import name_number
from lrules.engine.landing import at_calls
from lrules.engine.shardings import Layout, known, may_lie_on_a_mesh, whole
from lrules.extend import (
    DirectFeedback,
    Frame,
    Graph,
    Handler,
    Plan,
    RuleDescription,
    at_least_float32,
    evaluate,
    from_heads,
    make_plan,
    mean_loss,
    output_error,
    placed_as,
    project,
    require_description,
    sent_error,
    split_as,
)
from lrules.network import Network
from lrules.options import ByName, as_initializer, by_name, draw, is_number
from lrules.rule import Feedback, Gradients, Rule
from lrules.typing import Initializer, Loss, Numbers, Pytree

LocalLoss = Literal["prediction", "similarity", "both"]


def local_losses(
    loss: LocalLoss = "prediction",
    *,
    similarity: float | None = None,
    factor: Numbers = 1.0,
    init: Initializer | None = None,
    at: str | Sequence[str] | None = None,
    shared_axes: int | Sequence[int | tuple[int, int | str]] = (),
    max_feedback_bytes: float = 2**30,
) -> Rule:
    """Local losses: each hidden signal learns from its own loss, and no error comes down from the layers above.

    dh_l = d/dh_l of (1 - beta) L(C_l h_l, t) + beta mean over i, j of (S(K_l h_l)_ij - S(t)_ij)^2

    `"prediction"` is the first term (beta = 0): a linear layer C_l predicts the outputs from the hidden signal, and the
    loss of the network judges the prediction. If the network ends with a softmax or the like, so does the prediction.
    `"similarity"` is the second term (beta = 1): the similarities of the examples in a batch become those of their
    targets. `"both"` has both terms. The matrices C_l and K_l learn from the same losses: `grads.feedback` has their
    gradients. The last layer learns from the loss of the network.

    A layer learns what the layer right above it can use, so features that only later layers would need get lost. On the
    digits of scikit-learn (an MLP with three hidden layers of 64, 30 epochs, 3 seeds) predictions reach 96.9%,
    similarities 95.7%, both 96.3%; backprop 97.6%. With eight hidden layers, predictions reach 96.3%; backprop 97.2%.

    All layers learn at once. To train greedily, one layer after the other, give `factor` by hidden signal: where it is
    0, nothing learns. `jax.jit` may trace the factors, so one compiled step serves all phases.

    Args:
      loss: `"prediction"`, `"similarity"` or `"both"`.
      similarity: beta, the part of the similarity, a number in [0, 1], only for `"both"`. Default 0.99, as in the
        paper.
      factor: the factor of the local losses; or a dict of such numbers by regular expression (`re.search` on the name
        of the hidden signal, the first match holds). `jax.jit` and `jax.vmap` may trace them.
      init: the initializer of C_l and K_l, `init(key, shape, dtype)`; it draws `[hidden size, outputs]` and
        `[hidden size, features]`. Default `jax.nn.initializers.glorot_normal()`.
      at: the places that have a local loss, as in `direct_feedback_alignment`. Default: every hidden signal. Between
        two such places the error goes down by backpropagation, so `at` makes blocks of several layers.
      shared_axes: axes of the outputs along which all positions share one C_l, as in `direct_feedback_alignment`; only
        for `"prediction"`.
      max_feedback_bytes: the rule refuses to make more bytes of C_l and K_l than this.

    Returns:
      The rule. `feedback.learned` has C_l `[outputs, *hidden]` under the name of the hidden signal, and K_l
      `[features, features]` (`[3, 3, features, features]` for maps) under `"NAME similarity"`. Use it with
      `lrules.value_and_grad`. It is not additive with similarities, because they compare the examples of a batch (under
      `shard_map` and `pmap`, those of one device).

    Raises:
      TypeError: `init` is not a function.
      ValueError: an option is out of range; `lrules.transform` uses the rule. At use: a pattern in `factor` or `at`
        matches no hidden signal, or the targets do not give one row for each example.
      NotImplementedError: at use: a hidden signal lies inside a `cond` or a `shard_map` of the network.

    Example:
      >>> import jax, jax.numpy as jnp, lrules, optax
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> x, classes, rule = jnp.ones((5, 3)), jnp.array([0, 1, 1, 0, 1]), lrules.local_losses()
      >>> feedback = rule.init(jax.random.key(0), net, params, x)
      >>> step = lrules.value_and_grad(net, optax.softmax_cross_entropy_with_integer_labels, rule)
      >>> _, grads = step(params, feedback, x, classes)
      >>> grads.params["a"].shape, grads.feedback["b"].shape
      ((3, 4), (2, 4))

    References:
      Nokland, Eidnes: Training neural networks with local error signals (2019), section 2.
    """
    if loss not in get_args(LocalLoss):
        raise ValueError(f"loss must be one of {', '.join(map(repr, get_args(LocalLoss)))}, got {loss!r}")
    if similarity is not None and not (is_number(similarity) and 0 <= similarity <= 1):
        raise ValueError(f"similarity must be a number in [0, 1], got {similarity!r}")
    if similarity is not None and loss != "both":
        raise ValueError(
            f'similarity weighs the two terms of loss="both", and loss={loss!r} has one term: leave similarity out'
        )
    if loss != "prediction" and shared_axes != ():
        raise ValueError(
            f"shared_axes shares a prediction along axes of the outputs, and loss={loss!r} compares whole examples: "
            'leave shared_axes out, or give loss="prediction"'
        )
    beta = {"prediction": 0.0, "similarity": 1.0, "both": 0.99 if similarity is None else similarity}[loss]
    factors = by_name("factor", factor, _is_factor, "a finite number >= 0", "hidden signal", traced=True)
    initializer = as_initializer(init)
    made = direct(
        _arrive,
        init=initializer if loss != "similarity" else None,
        learn=_learn if loss != "similarity" else None,
        at=at,
        shared_axes=shared_axes,
        targets=True,
        max_feedback_bytes=max_feedback_bytes,
        offers=("at", "shared_axes") if loss == "prediction" else ("at",),
    )
    spec, compares = require_description(made, "local_losses").layer, initializer if loss != "prediction" else None

    def choose(name: str) -> Any:
        return spec

    def plan(net: Network, graph: Graph, params: Pytree, inputs: Pytree) -> LocalPlan:
        places = graph.once_for(choose, lambda: make_plan(net, graph, params, inputs, choose, partition=False))
        return LocalPlan(places, compares, beta, factors)

    about = LocalDescription(plan)

    def value_and_grad(net: Network, loss: Loss) -> Callable[..., tuple[tuple[Any, ...], Gradients]]:
        def fn(
            params: Pytree, feedback: Feedback, inputs: Pytree, targets: Pytree, *, rng: jax.Array | None = None
        ) -> tuple[tuple[Any, ...], Gradients]:
            plan: LocalPlan = about.plan(net, net.graph(params, inputs), params, inputs)
            plan.check(feedback)
            run = LocalRun(plan, net, loss, inputs, targets)

            def total(params: Pytree, learned: Mapping[str, jax.Array]) -> tuple[jax.Array, Any]:
                ends, aux, signals = run.forward(params, net.handlers)
                outputs, value = run.judged(ends, params)
                local = run.losses(signals, learned, ends, params)
                return value.astype(local.dtype) + local, (value, outputs, aux)

            (grads, own), (value, outputs, aux) = jax.grad(total, (0, 1), has_aux=True)(params, feedback.learned)
            head = (value, outputs, aux) if net.has_aux else (value, outputs)
            return head, Gradients(grads, own, feedback.state)

        return fn

    transform = no_transform("local_losses needs the targets and the loss")
    return Rule(drawn_by(about.plan), transform, value_and_grad, additive=loss == "prediction", description=about)


def _is_factor(value: Any) -> bool:
    return is_number(value) and 0 <= value < math.inf


def _arrive(e: jax.Array, b: Any, targets: Pytree, name: str) -> NoReturn:
    """Stands for what arrives: `LocalRun` differentiates the local losses, and calls no function of the rule."""
    raise AssertionError


def _learn(e: jax.Array, h: jax.Array, b: Any) -> NoReturn:
    raise AssertionError


# ------------------------------------------------------------------------------------------------------------- the plan


@dataclasses.dataclass(frozen=True, eq=False)
class LocalDescription(RuleDescription):
    """The description of a rule with local losses: its plan is a `LocalPlan`."""


class LocalPlan(Plan):
    """Where local losses are, and the shapes of what they learn.

    Args:
      places: a plan with a direct rule: where it lands is a local loss.
      compares: the initializer for the similarities; None if there are none.
      beta: the part of the similarities.
      factors: the factors of the losses.
    """

    def __init__(self, places: Plan, compares: Initializer | None, beta: float, factors: ByName[float]) -> None:
        super().__init__(**{field.name: getattr(places, field.name) for field in dataclasses.fields(places)})
        self.places, self.compares, self.beta, self.factors = places, compares, beta, factors
        factors.check(self.direct_feedback)
        for name in self.direct_feedback:
            factors.of(name)
        limit = min((p.spec.max_feedback_bytes for p in self.direct_feedback.values()), default=math.inf)
        total = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype, _ in self.feedback_shapes().values())
        if total > limit:
            raise ValueError(
                f"the local losses have {total:,} bytes, above max_feedback_bytes={limit:,}: raise max_feedback_bytes, "
                "or have them at fewer places (at=)"
            )

    def kernel(self, landing: DirectFeedback) -> tuple[int, ...]:
        """The shape of K_l, for each loop iteration that has its own."""
        *positions, features = landing.signal_shape or (1,)
        return (*landing.lengths, *[3] * len(positions), features, features)

    def feedback_shapes(self, *, redrawn: bool = False) -> dict[str, tuple[tuple[int, ...], Any, bool]]:
        shapes = self.places.feedback_shapes(redrawn=redrawn)
        if self.compares is not None and not redrawn:
            shapes |= {_compared(n): (self.kernel(p), p.dtype, True) for n, p in self.direct_feedback.items()}
        return shapes

    def init(self, key: jax.Array, params: Sequence[Any], *, redrawn: bool = False) -> Feedback:
        feedback = self.places.init(key, params, redrawn=redrawn)
        for name, (shape, dtype, _) in self.feedback_shapes(redrawn=redrawn).items():
            if name not in feedback.learned:
                place = self.direct_feedback[name.removesuffix(_compared(""))]
                own = jax.random.fold_in(key, name_number(name))
                drawn = self.draw(own, shape, len(place.lengths), dtype)
                if may_lie_on_a_mesh(params) and not redrawn:
                    drawn = self.layouts[name].place(drawn, params, [known(p) for p in params])
                feedback.learned[name] = drawn
        return feedback

    @functools.cached_property
    def layouts(self) -> dict[str, Layout]:
        """Where each weight lies: K_l, which mixes all features, whole on each device."""
        more = set(self.feedback_shapes()) - set(self.places.layouts)
        return self.places.layouts | {name: whole(0, len(self.feedback_shapes()[name][0])) for name in more}

    def draw(self, key: jax.Array, shape: tuple[int, ...], lead: int, dtype: Any) -> jax.Array:
        assert self.compares is not None
        init, matrix = self.compares, (math.prod(shape[lead:-1]), shape[-1])
        if not lead:
            return draw(init, key, matrix, dtype).reshape(shape)
        keys = jax.random.split(key, math.prod(shape[:lead]))
        return jax.vmap(lambda k: draw(init, k, matrix, dtype))(keys).reshape(shape)


def _compared(name: str) -> str:
    return f"{name} similarity"


# ----------------------------------------------------------------------------------------------------------- the losses


class LocalRun:
    """One step on one batch: the network with its hidden signals, and the local losses of these."""

    def __init__(self, plan: LocalPlan, net: Network, loss: Loss, inputs: Pytree, targets: Pytree) -> None:
        self.plan, self.net, self.loss, self.inputs, self.targets = plan, net, loss, inputs, targets
        double = any(jnp.finfo(aval.dtype).bits == 64 for aval in plan.graph.param_avals)
        self.wide = jnp.float64 if double else jnp.float32

    def forward(self, params: Pytree, handlers: Sequence[Handler]) -> tuple[Any, Any, dict[str, jax.Array]]:
        """`(ends, aux, records)`: the ends of the network, and what is recorded, above all the hidden signals.

        No derivative passes a hidden signal that has a local loss.
        """
        frame, consts = Frame(), self.plan.graph.consts
        leaves = self.net.parameters(params)
        ends, aux = evaluate(self.plan, leaves, {}, jax.tree.leaves(self.inputs), consts, handlers, frame)
        return ends, aux, frame.taken()

    def judged(self, ends: Pytree, params: Pytree) -> tuple[Pytree, jax.Array]:
        """The outputs that follow from the ends of the network, and the objective there."""
        outputs = from_heads(self.plan, self.net, ends, params, self.inputs)
        return outputs, mean_loss(self.net, self.loss, outputs, self.inputs, self.targets)

    def losses(
        self, signals: Mapping[str, jax.Array], learned: Mapping[str, jax.Array], ends: Pytree, params: Pytree
    ) -> jax.Array:
        """The sum of all local losses, each with its factor."""
        total = jnp.zeros((), self.wide)
        for name, landing in self.plan.direct_feedback.items():
            weights = {kind: learned[n] for kind, n in (("c", name), ("k", _compared(name))) if n in learned}
            if "c" in weights:
                weights["c"] = split_as(weights["c"], *landing.split)
            one: Callable[..., Any] = self.local(landing, ends, params)
            h = at_calls(landing, signals[name], self.plan.batch or 1)
            for _ in landing.others:
                one = _summed(one, (0, None))
            for _ in landing.own:
                one = _summed(one, (0, 0))
            total += jnp.asarray(self.plan.factors.of(name), self.wide) * one(h, weights)
        return total

    def local(self, landing: DirectFeedback, ends: Pytree, params: Pytree) -> Callable[..., Any]:
        """The loss of one hidden signal `[*shared, batch, *hidden]`, in one iteration of the loops around it."""
        beta = self.plan.beta

        def one(h: jax.Array, weights: Mapping[str, jax.Array]) -> jax.Array:
            total = jnp.zeros((), self.wide)
            if "c" in weights:
                _, value = self.judged(self.predicted(landing, h, weights["c"], ends), params)
                total += (1 - beta) * value.astype(self.wide)
            if "k" in weights:
                rows = compared(split_as(h, landing.batch_split).astype(weights["k"].dtype), weights["k"])
                wanted = labels(self.targets, rows.shape[0], landing.outputs, rows.dtype)
                total += beta * jnp.mean((similarities(rows) - similarities(wanted)) ** 2).astype(self.wide)
            return total

        return one

    def predicted(self, landing: DirectFeedback, h: jax.Array, c: jax.Array, ends: Pytree) -> Pytree:
        """The ends that C_l predicts."""

        def read(h: jax.Array, like: jax.Array) -> jax.Array:  # the transpose of a projection of the output error
            return jax.vjp(lambda e: project(e, c), like)[1](h.astype(c.dtype))[0]

        for _ in landing.shared:
            read = jax.vmap(read)
        flat = lambda ends: sent_error(self.plan, landing.spec, output_error(self.plan, ends), {})  # noqa: E731
        like, back = jax.vjp(flat, ends)  # it moves numbers to other places, so its transpose moves them back
        split = split_as(like, *[None] * len(landing.shared), landing.batch_split)
        (made,) = back(placed_as(read(h, split), jax.typeof(like)))
        inexact = lambda end: jnp.issubdtype(end.dtype, jnp.inexact)  # noqa: E731
        return jax.tree.map(lambda new, end: new if inexact(end) else end, made, ends)


def _summed(fn: Callable[..., Any], in_axes: Any) -> Callable[..., Any]:
    return lambda *args: jax.vmap(fn, in_axes)(*args).sum(0)


def compared(h: jax.Array, k: jax.Array) -> jax.Array:
    """What is compared of a hidden signal: `[batch, features]`, in at least float32."""
    batch, wide = h.shape[0], at_least_float32(h.dtype)
    if h.ndim <= 2:
        return (h.reshape(batch, -1) @ k).astype(wide)
    n = h.ndim - 2
    map_axes = (0, n + 1, *range(1, n + 1))
    numbers = jax.lax.ConvDimensionNumbers(map_axes, (n + 1, n, *range(n)), map_axes)
    maps = jax.lax.conv_general_dilated(h, k, (1,) * n, "SAME", dimension_numbers=numbers)
    maps = maps.reshape(batch, -1, h.shape[-1]).astype(wide)
    centred = maps - maps.mean(1, keepdims=True)
    return _root(jnp.sum(centred**2, 1) / max(maps.shape[1] - 1, 1))


def _root(x: jax.Array) -> jax.Array:
    """The square root, with the derivative 0 at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def similarities(rows: jax.Array) -> jax.Array:
    """The cosine of the angle between each two rows, from which their means are subtracted; 0 for a row of equals."""
    centred = rows - rows.mean(1, keepdims=True)
    norms = _root(jnp.sum(centred**2, 1, keepdims=True))
    unit = centred / jnp.where(norms > 0, norms, 1)
    return unit @ split_as(unit).T


def labels(targets: Pytree, batch: int, outputs: int, dtype: Any) -> jax.Array:
    """The targets as `[batch, ...]`; classes become one-hot."""
    rows = []
    leaves = jax.tree.leaves(targets)
    for t in map(jnp.asarray, leaves):
        if t.ndim == 0 or t.shape[0] != batch:
            raise ValueError(
                f"local_losses: the first axis of the targets must be the batch of {batch}, got targets of shape "
                f'{t.shape}: give one target for each example, or loss="prediction"'
            )
        t = t.reshape(batch, -1)
        classes = not jnp.issubdtype(t.dtype, jnp.inexact) and len(leaves) == 1 and outputs % t.shape[1] == 0
        if classes and t.shape[1] != outputs:
            t = jax.nn.one_hot(t, outputs // t.shape[1]).reshape(batch, -1)
        rows.append(t.astype(dtype))
    return jnp.concatenate(rows, 1)
