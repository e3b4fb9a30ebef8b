"""The two constructors from which most rules are made, `sequential` and `direct`.

The functions of a rule get some arguments by position, always. They get more if they have an argument of one of these
names, without a default value or with None as one:

- `rng`: a key of its own for this layer or hidden signal, this step, this iteration of the loops around
  it, and this device.
- `state`: what the function returned here at the step before. It returns the new state as one more result.
- `targets`: the targets of the whole batch. (`signal` has them by position, with `targets=True`.)
- `elements`: how many losses the objective is the mean of: the batch, or more with a loss `[batch, ...]`.
- `h`: the hidden signal. In `backward` it is what the layer reads, as the model made it: x before casts, reshapes and
  transposes; None where the layer reads data. In `signal` it is `[batch, *hidden]`, as e and b see it.
- `y`: in `backward` the output of the layer, `op(w, x)`. In `signal` and `learn` the pre-activation z of the activation
  whose output the hidden signal is, `[batch, *hidden]`; None where it is not the output of an activation.
- `slope`: f'(z). In `backward`, f is the activation above the layer, whose z is y plus a bias or other terms, scaled or
  normalised; `slope` has the shape of y, and is None where there is no such activation, or more than one. In `signal`
  and `learn`, the hidden signal is f(z); None as for `y`. Inside
  `replace_derivative` it is what that modifier puts there.
- a name in `numbers=`: the number for this layer or hidden signal.

`targets`, `elements` and `state` are not there under `lrules.transform`: such rules are for `lrules.value_and_grad`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax

from lrules.apply import mean_loss
from lrules.engine.graph import Graph
from lrules.engine.plan import Plan
from lrules.engine.planning import make_plan
from lrules.engine.running import prepare, run_plan
from lrules.network import Network, NetworkLike, as_network
from lrules.options import ByName, is_whole, require_flags, require_pattern
from lrules.rule import Direct, Feedback, Gradients, LayerRule, Rule, RuleDescription, Sequential, check_params
from lrules.typing import Initializer, Loss, Pytree


def layerwise(
    choose_for: Callable[[Graph], Callable[[str], LayerRule]], layers: Iterable[LayerRule], *, layer: LayerRule | None
) -> Rule:
    """A rule that is said layer by layer.

    Args:
      choose_for: from a traced network to the rule of each layer, by name.
      layers: the rules that a layer may have.
      layer: the rule where it is the same for all.
    """
    specs = [spec for spec in layers if isinstance(spec, Sequential | Direct)]
    needs_loss = next((spec.needs_loss for spec in specs if spec.needs_loss is not None), None)

    def plan(net: Network, graph: Graph, params: Pytree, inputs: Pytree) -> Plan:
        return make_plan(net, graph, params, inputs, choose_for(graph))

    def init(key: jax.Array, net: NetworkLike, params: Pytree, inputs: Pytree) -> Feedback:
        net = as_network(net)
        check_params(params)
        return plan(net, net.graph(params, inputs), params, inputs).init(key, net.parameters(params))

    def transform(net: Network, *, reduction: str = "mean") -> Callable[..., Any]:
        if needs_loss is not None:
            raise ValueError(
                f"this rule needs {needs_loss}: use lrules.value_and_grad(net, loss, rule) in place of transform"
            )

        def f(params: Pytree, feedback: Feedback, inputs: Pytree, *, rng: jax.Array | None = None) -> Any:
            made = plan(net, net.graph(params, inputs), params, inputs)
            return run_plan(made, net, params, feedback, inputs, rng=rng)

        return f

    def value_and_grad(net: Network, loss: Loss) -> Callable[..., Any]:
        def fn(
            params: Pytree, feedback: Feedback, inputs: Pytree, targets: Pytree, *, rng: jax.Array | None = None
        ) -> tuple[tuple[Any, ...], Gradients]:
            graph = net.graph(params, inputs)
            outputs = jax.tree.unflatten(graph.out_tree, [value.aval for value in graph.outs[: graph.n_outputs]])
            elements = jax.eval_shape(loss, outputs, targets).size
            made = dataclasses.replace(plan(net, graph, params, inputs), elements=elements)
            calls = prepare(made, feedback, rng, targets)

            def objective(params: Pytree, learned: Any, states: Any) -> tuple[jax.Array, Any]:
                weights = feedback._replace(learned=learned)
                out = run_plan(made, net, params, weights, inputs, rng=rng, calls=calls, states=states)
                outputs = out[0] if net.has_aux else out
                return mean_loss(net, loss, outputs, inputs, targets), out

            graded = jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True)
            states = {} if calls is None else calls.operands["states"]
            (value, out), (params_grad, feedback_grad, passed) = graded(params, feedback.learned, states)
            state = calls.new_states(states, passed) if calls is not None and states else feedback.state
            head = (value, *out) if net.has_aux else (value, out)
            return head, Gradients(params_grad, feedback_grad, state)

        return fn

    return Rule(
        init,
        transform,
        value_and_grad if needs_loss is not None else None,
        stochastic=any(spec.stochastic for spec in specs),
        additive=not any(isinstance(spec, Sequential) and spec.whole_batch for spec in specs),
        description=RuleDescription(plan, layer),
    )


def sequential(
    backward: Callable[..., tuple[Any, ...]],
    *,
    init: Initializer | None = None,
    learned: bool = False,
    redrawn: bool = False,
    whole_batch: bool = False,
    gain: Callable[..., Any] | None = None,
    state: Callable[..., Pytree] | None = None,
    numbers: Mapping[str, Any] | None = None,
) -> Rule:
    """A rule in which error passes through every layer, as `backward` says.

    dW_l, s_{l-1} = backward(W_l, x_{l-1}, s_l * f'(z_l))

    Args:
      backward: `(op, w, b, x, d, layer) -> (dw, dx, db)`. The layer computes `y = op(w, x)`; `d` is the error that
        arrives at `y`, of its shape; `b` the feedback weight in the place of `w`, of its shape (None without `init`).
        `dw` is the layer's weight gradient, `dx` what goes down, of the shape of `x`; `db` the gradient of learned
        feedback, else None. `jax.vjp(op, w, x)[1](d)` gives backpropagation's `(dw, dx)`. It can ask for `rng`,
        `state`, `targets`, `elements`, `h`, `y`, `slope` and the rule's numbers by name, see `lrules.constructors`.
        If it asks for `state`, it returns `(dw, dx, db, state)`.
      init: the initializer of the feedback weights, as in `jax.nn.initializers`; None if the rule has none.
      learned: whether `db` trains the feedback weights.
      redrawn: draw the feedback weights anew at every step, from `rng=`, and do not keep them.
      whole_batch: whether the gradient depends on the batch as a whole (then the rule is not additive).
      gain: `(op, w, x, d, layer) -> c` if `dw` is c times the gradient of backprop, for modifiers that form it per
        example; None if c is 1. It can ask for the rule's numbers.
      state: `(layer) -> pytree` of arrays, the first state of a layer; it can ask for `key` and `name`. The shapes are
        in `layer.weight.aval`, `layer.operand.aval` (what the layer reads) and `layer.output.aval`. States are in
        `feedback.state` by layer (in a loop one for each iteration, stacked), the next ones in `grads.state`: continue
        with `feedback._replace(state=grads.state)`.
      numbers: hyperparameters by name: for each a number, or a dict of numbers by regular expression (`re.search` on
        the name of the layer, the first match holds). They may be traced by `jax.jit` or `jax.vmap`.

    Returns:
      The rule.

    Raises:
      TypeError: `backward` cannot be called as described, or asks for something else; `init` is not a function.
      ValueError: two options do not go together; at use: `backward` returns something else than described, or a
        pattern in `numbers` matches no layer.

    Example:
      >>> def backward(op, w, b, x, d, layer, *, factor):
      ...     dw, dx = jax.vjp(op, w, x)[1](d)
      ...     return dw, factor * dx, None
      >>> halved = sequential(backward, numbers={"factor": {"head": 1.0, ".*": 0.5}})
    """
    require_flags(learned=learned, redrawn=redrawn, whole_batch=whole_batch)
    if redrawn and learned:
        raise ValueError("feedback that is redrawn at every step cannot be learned: leave out redrawn= or learned=")
    if learned and init is None:
        raise ValueError("learned=True trains feedback weights, which init= draws: give both or neither")
    given = {name: ByName(name, value) for name, value in (numbers or {}).items()}
    spec = Sequential(backward, init, learned, redrawn, whole_batch, gain, state, given)
    return layerwise(lambda graph: lambda name: spec, [spec], layer=spec)


def direct(
    signal: Callable[..., Any] | None,
    *,
    init: Initializer | None = None,
    learn: Callable[..., Any] | None = None,
    redrawn: bool = False,
    at: str | Sequence[str] | None = None,
    shared_axes: int | Sequence[int | tuple[int, int | str]] = (),
    rank: int | None = None,
    pullback: Callable[..., Callable[..., Any]] | None = None,
    targets: bool = False,
    error_at: Literal["layer", "outputs"] = "layer",
    max_feedback_bytes: float = 2**30,
    offers: Sequence[str] = ("at", "shared_axes", "rank"),
    state: Callable[..., Pytree] | None = None,
    numbers: Mapping[str, Any] | None = None,
) -> Rule:
    """A rule that brings the output error straight to every hidden signal.

    delta_l = signal(e, B_l) * f'(z_l)

    Args:
      signal: `(e, b, targets, name) -> [batch, *hidden]`, the cotangent of the hidden signal `name`, from the output
        error `e` `[batch, outputs]` and the feedback weight `b` `[outputs, *hidden]` (None without `init`). It can ask
        for `rng`, `state`, `elements`, `h`, `y`, `slope` and the rule's numbers by name, see `lrules.constructors`. If
        it asks for `state`, it returns `(signal, state)`. None stops the error at every hidden signal.
      init: the initializer of the feedback weights, drawn as `[hidden size, outputs]`; None if the rule has none.
      learn: `(e, h, b) -> db`, the gradient of the feedback weight from the hidden signal `h` `[batch, *hidden]`; None
        for fixed feedback. It can ask for `targets`, too, and for `name`. It reads the state of the step before.
      redrawn: draw the feedback weights anew at every step, from `rng=`, and do not keep them.
      at: where feedback lands, if not at every hidden signal: regular expressions that names of hidden signals or of
        tensors marked with `lrules.hidden` match.
      shared_axes: axes of the outputs (counted with the batch) along which one feedback weight serves all positions:
        time in `[batch, time, classes]`; places in the hidden signals are found, or said in pairs, as in
        `direct_feedback_alignment`. `e`, `b` and the hidden signals then come without these axes.
      rank: bring the error to so many numbers by one random matrix `[outputs, rank]` before it is sent, as in
        `direct_feedback_alignment`; `e` is then `[batch, rank]`.
      pullback: in place of `signal`, see `Direct`.
      targets: whether `signal` needs the targets (then only `value_and_grad` serves it; else it gets None).
      error_at: where the output error is taken. `"layer"`: where the outputs are a function without parameters of a
        layer's outputs (softmax, log_softmax, sigmoid), at the layer's outputs. `"outputs"`: at the outputs themselves.
      max_feedback_bytes: refuse to make more feedback than this.
      offers: which of the options `at`, `shared_axes` and `rank` your own rule passes on: refusals advise no others.
      state: `(shape) -> pytree` of arrays, the first state of a hidden signal, whose shape without batch (and shared
        axes) it gets; it can ask for `key` and `name`. States are kept as those of `sequential`, by hidden signal, one
        for each iteration of the loops around it and each position along shared axes.
      numbers: hyperparameters by name, as in `sequential`, for regular expressions on the names of hidden signals.

    Returns:
      The rule.

    Raises:
      TypeError: `signal` or `learn` cannot be called as described, or asks for something else; `init` is not a
        function that returns an array.
      ValueError: an option is not of the kind described; at use: a function returns something else than described, or
        a pattern in `numbers` matches no hidden signal.

    Example:
      >>> import jax.numpy as jnp
      >>> def signal(e, b, targets, name, *, slope):  # with the square of the slope, as the slope comes below
      ...     s = jnp.tensordot(e, b, axes=1)
      ...     return s if slope is None else slope * s
      >>> squared = direct(signal, init=jax.nn.initializers.glorot_normal())
    """
    require_flags(redrawn=redrawn, targets=targets)
    several = isinstance(at, Iterable) and not isinstance(at, str)
    where: tuple[Any, ...] | None = None if at is None else tuple(at) if several else (at,)
    if where == ():
        raise ValueError("at= names no place for feedback to land: name some, or leave it out for every hidden signal")
    for pattern in where or ():
        require_pattern(pattern, "at=")
    if rank is not None and not (is_whole(rank) and rank >= 1):
        raise ValueError(f"rank must be an integer >= 1 or None, got {rank!r}")
    if rank is not None and init is None:
        raise ValueError(f"rank={rank} makes feedback weights of two factors, which init= draws: give both or neither")
    if redrawn and learn is not None:
        raise ValueError("feedback that is redrawn at every step cannot be learned: leave out redrawn= or learn=")
    if learn is not None and init is None:
        raise ValueError("learn= trains feedback weights, which init= draws: give both or neither")
    given = {number: ByName(number, value, "hidden signal") for number, value in (numbers or {}).items()}
    spec = Direct(
        signal, init, learn, redrawn, where, _pairs(shared_axes), rank, pullback, targets, error_at, max_feedback_bytes,
        tuple(offers), state, given,
    )  # fmt: skip
    return layerwise(lambda graph: lambda name: spec, [spec], layer=spec)


def _pairs(shared_axes: Any) -> tuple[tuple[int, tuple[int | str, ...]], ...]:
    """`shared_axes=` as axes of the outputs, each with the places of the hidden signals that are given for it."""
    several = isinstance(shared_axes, Iterable) and not isinstance(shared_axes, str)
    pairs = [(a, None) if is_whole(a) else a for a in (tuple(shared_axes) if several else (shared_axes,))]
    places: dict[int, tuple[int | str, ...]] = {}
    for pair in pairs:
        given = pair if isinstance(pair, list | tuple) and len(pair) == 2 else (pair, "")
        loop = isinstance(given[1], str) and re.fullmatch(r"loop \d+", given[1])
        if not (is_whole(given[0]) and (loop or is_whole(given[1]) or given[1] is None)):
            raise ValueError(
                f"shared_axes must be an axis of the outputs, several, or pairs [(axis of the outputs, axis of the "
                f'hidden signals or "loop 0")], got {shared_axes!r}'
            )
        out, within = given
        if out in places and (within is None or not places[out]):
            raise ValueError(
                f"shared_axes names the axis {out} of the outputs twice, got {shared_axes!r}: name each once, or give "
                "pairs in a list, [(axis of the outputs, axis of the hidden signals)]"
            )
        places[out] = (*places.get(out, ()), *(() if within is None else (within,)))
    return tuple(places.items())
