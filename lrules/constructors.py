"""The two constructors that make most rules, `sequential` and `direct`.

The functions of a rule always get some arguments by position. They get more arguments if they ask for them by name:
with an argument of one of these names, without a default value or with the default None.

- `rng`: a separate key for this layer or hidden signal, this step, this iteration of the loops around it, and this
  device.
- `state`: the state that the function returned here at the step before. It returns the new state as one more result.
- `targets`: the targets of the whole batch. (`signal` has them by position, with `targets=True`.)
- `elements`: the number of losses in the mean of the objective: the batch, or more with a loss `[batch, ...]`.
- `h`: the hidden signal (see docs/terms.md). In `backward` it is the input x of the layer, before casts, reshapes and
  transposes; None if the layer reads data. In `signal` it is `[batch, *hidden]`, with the axes of e and b.
- `y`: in `backward` the output of the layer, `op(w, x)`. In `signal` and `learn`, the pre-activation z if the hidden
  signal is f(z) for an activation f, `[batch, *hidden]`; None if it is not.
- `slope`: f'(z). In `backward`, f is the activation above the layer, and its z is y plus a bias or other terms, scaled
  or normalised; `slope` has the shape of y, and is None if there is no such activation, or more than one. In `signal`
  and `learn`, the hidden signal is f(z); None as for `y`. Inside `replace_derivative` it is the derivative of that
  modifier.
- a name in `numbers=`: the number for this layer or hidden signal.

`lrules.transform` has no `targets`, `elements` and `state`: rules that ask for them need `lrules.value_and_grad`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn

import jax

from lrules.apply import graded
from lrules.engine.graph import Graph
from lrules.engine.plan import Plan
from lrules.engine.planning import make_plan
from lrules.engine.running import prepare, run_plan
from lrules.network import Network, NetworkLike, as_network
from lrules.options import is_whole, require_flags, require_pattern, rule_numbers
from lrules.rule import Direct, Feedback, Gradients, LayerRule, Rule, RuleDescription, Sequential, check_params
from lrules.typing import Initializer, Loss, Pytree


def drawn_by(plan: Callable[[Network, Graph, Pytree, Pytree], Plan]) -> Callable[..., Feedback]:
    """The `init` of a rule whose plan draws all its feedback."""

    def init(key: jax.Array, net: NetworkLike, params: Pytree, inputs: Pytree) -> Feedback:
        net = as_network(net)
        check_params(params)
        return plan(net, net.graph(params, inputs), params, inputs).init(key, net.parameters(params))

    return init


def no_transform(why: str) -> Callable[..., NoReturn]:
    """The `transform` of a rule that only `lrules.value_and_grad` serves: it says why."""

    def transform(net: Network, *, reduction: str = "mean") -> NoReturn:
        raise ValueError(f"{why}, so transform cannot serve it: use lrules.value_and_grad(net, loss, rule)")

    return transform


def layerwise(
    choose_for: Callable[[Graph], Callable[[str], LayerRule]], layers: Iterable[LayerRule], *, layer: LayerRule | None
) -> Rule:
    """Makes a rule that acts layer by layer.

    Args:
      choose_for: a function from a traced network to a function from the name of a layer to its rule.
      layers: the rules that a layer may have.
      layer: the rule, if it is the same for all layers; else None.

    Returns:
      The rule.

    Example:
      >>> import lrules
      >>> from lrules import extend
      >>> stop, pass_on = extend.Direct(None), extend.Backprop()
      >>> choose_for = lambda graph: lambda name: stop if name == graph.layers[-1].name else pass_on
      >>> rule = extend.layerwise(choose_for, [stop, pass_on], layer=None)
      >>> rule.stochastic, rule.additive
      (False, True)
    """
    specs = [spec for spec in layers if isinstance(spec, Sequential | Direct)]
    needs_loss = next((spec.needs_loss for spec in specs if spec.needs_loss is not None), None)

    def plan(net: Network, graph: Graph, params: Pytree, inputs: Pytree) -> Plan:
        return graph.once_for(choose_for, lambda: make_plan(net, graph, params, inputs, choose_for(graph)))

    def transform(net: Network, *, reduction: str = "mean") -> Callable[..., Any]:
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

            def run(params: Pytree, learned: Any, states: Any) -> Any:
                weights = feedback._replace(learned=learned)
                return run_plan(made, net, params, weights, inputs, rng=rng, calls=calls, states=states)

            states = {} if calls is None else calls.operands["states"]
            args = params, feedback.learned, states
            head, (params_grad, feedback_grad, passed) = graded(net, loss, run, args, inputs, targets)
            state = calls.new_states(states, passed) if calls is not None and states else feedback.state
            return head, Gradients(params_grad, feedback_grad, state)

        return fn

    return Rule(
        drawn_by(plan),
        transform if needs_loss is None else no_transform(f"this rule needs {needs_loss}"),
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
    phase: Rule | None = None,
) -> Rule:
    """Makes a rule whose error goes down through every layer, as `backward` says.

    dW_l, s_{l-1} = backward(W_l, x_{l-1}, s_l * f'(z_l))

    Args:
      backward: `(op, w, b, x, d, layer) -> (dw, dx, db)`. The layer computes `y = op(w, x)`. `d` is the error that
        arrives at `y`, with its shape. `b` is the feedback weight that replaces `w`, with its shape (None without
        `init`). `dw` is the weight gradient of the layer, `dx` is the error that goes down, with the shape of `x`, and
        `db` is the gradient of learned feedback, else None. `jax.vjp(op, w, x)[1](d)` is the `(dw, dx)` of
        backpropagation. `backward` can ask for `rng`, `state`, `targets`, `elements`, `h`, `y`, `slope` and the numbers
        of the rule by name, see `help(lrules.constructors)`. If it asks for `state`, it returns `(dw, dx, db, state)`.
      init: the initializer of the feedback weights, as in `jax.nn.initializers`; None if the rule has none.
      learned: whether `db` trains the feedback weights.
      redrawn: draws new feedback weights at every step, from `rng=`, and does not keep them.
      whole_batch: whether the gradient depends on the batch as a whole (then the rule is not additive).
      gain: `(op, w, x, d, layer) -> c`, if `dw` is c times the gradient of backprop, for modifiers that compute it for
        each example; None if c is 1. It can ask for the numbers of the rule.
      state: `(layer) -> pytree` of arrays, the first state of a layer; it can ask for `key` and `name`. The shapes are
        in `layer.weight.aval`, `layer.operand.aval` (the input of the layer) and `layer.output.aval`. `feedback.state`
        has the states by layer (in a loop one for each iteration, stacked), and `grads.state` has the next states:
        continue with `feedback._replace(state=grads.state)`.
      numbers: hyperparameters by name. Give for each a number, or a dict of numbers by regular expression for the names
        of layers (`re.search`, the first match holds). `jax.jit` and `jax.vmap` may trace them.
      phase: a sequential rule with learned feedback, for a phase in which the feedback weights alone learn, by its
        `db`. `lrules.feedback_grad` runs it. `d` has no meaning there, and `dx` must not be None, so that the layers
        below take part. The `db` of this rule, in ordinary steps, is then zeros.

    Returns:
      The rule.

    Raises:
      TypeError: `backward` cannot be called like this, or asks for another name; or `init` is not a function.
      ValueError: two options do not work together. At use: `backward` returns something else, or a pattern in `numbers`
        matches no layer.

    Example:
      >>> import jax, lrules
      >>> def backward(op, w, b, x, d, layer, *, factor):
      ...     dw, dx = jax.vjp(op, w, x)[1](d)
      ...     return dw, factor * dx, None
      >>> rule = lrules.sequential(backward, numbers={"factor": {"[bcd]": 0.5, ".*": 1.0}})
      >>> lrules.testing.check_rule(rule)
    """
    require_flags(learned=learned, redrawn=redrawn, whole_batch=whole_batch)
    if redrawn and learned:
        raise ValueError("feedback that is redrawn at every step cannot learn: leave out redrawn or learned")
    if learned and init is None:
        raise ValueError("learned=True trains feedback weights, and init draws them: give both or neither")
    spec = Sequential(backward, init, learned, redrawn, whole_batch, gain, state, rule_numbers(numbers))
    rule = layerwise(lambda graph: lambda name: spec, [spec], layer=spec)
    if phase is None:
        return rule
    own = None if phase.description is None else phase.description.layer
    if not (isinstance(own, Sequential) and own.learned and own.state is None and own.needs_loss is None and learned):
        raise ValueError(
            "phase must be a sequential rule with learned=True that asks for no state, targets or elements, and this "
            "rule must have learned=True too"
        )
    return dataclasses.replace(rule, phase=phase)


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
    storage: Literal["stored", "recomputed"] = "stored",
    offers: Sequence[str] = ("at", "shared_axes", "rank", "storage"),
    state: Callable[..., Pytree] | None = None,
    numbers: Mapping[str, Any] | None = None,
    learned_factors: bool = False,
    normalise_error: bool = False,
) -> Rule:
    """Makes a rule that brings the output error straight to every hidden signal.

    delta_l = signal(e, B_l) * f'(z_l)

    Args:
      signal: `(e, b, targets, name) -> [batch, *hidden]`, the cotangent of the hidden signal `name`, from the output
        error `e` `[batch, outputs]` and the feedback weight `b` `[outputs, *hidden]` (None without `init`). It can ask
        for `rng`, `state`, `elements`, `h`, `y`, `slope` and the numbers of the rule by name, see
        `help(lrules.constructors)`. If it asks for `state`, it returns `(signal, state)`. Give None to stop the error
        at every hidden signal.
      init: the initializer of the feedback weights; it draws `[hidden size, outputs]`. None if the rule has none.
      learn: `(e, h, b) -> db`, the gradient of the feedback weight from the hidden signal `h` `[batch, *hidden]`; None
        for fixed feedback. It can also ask for `targets` and `name`. It reads the state of the step before.
      redrawn: draws new feedback weights at every step, from `rng=`, and does not keep them.
      at: the places where feedback lands, if not at every hidden signal: regular expressions for the names of hidden
        signals and of tensors marked with `lrules.hidden`.
      shared_axes: axes of the outputs (counted with the batch) along which all positions share one feedback weight,
        such as time in `[batch, time, classes]`. The library finds the places in the hidden signals, or you give pairs,
        as in `direct_feedback_alignment`. `e`, `b` and the hidden signals then do not have these axes.
      rank: reduces the error to this number of values by one random matrix `[outputs, rank]`, as in
        `direct_feedback_alignment`. `e` is then `[batch, rank]`.
      pullback: instead of `signal`: `(plan, params, inputs, consts, records) -> pull`, where `pull(errors)` gives the
        cotangent of each hidden signal at its definition, by name.
      targets: whether `signal` needs the targets (else it gets None). Only `value_and_grad` can serve such a rule.
      error_at: where the rule takes the output error. `"layer"`: if the outputs are a function without parameters of
        the outputs of a layer (softmax, log_softmax, sigmoid), at the outputs of this layer. `"outputs"`: at the
        outputs.
      max_feedback_bytes: the rule refuses to make more bytes of feedback than this.
      storage: `"recomputed"` keeps only a key for each feedback weight, as in `direct_feedback_alignment`. `b` is then
        an `lrules.extend.RecomputedFeedback`: give it to `lrules.extend.project`.
      offers: which of the options `at`, `shared_axes`, `rank` and `storage` the users of your rule can give. Messages
        do not advise the others.
      state: `(shape) -> pytree` of arrays, the first state of a hidden signal, from its shape without batch and shared
        axes; it can ask for `key` and `name`. States are kept as in `sequential`, by hidden signal: one for each
        iteration of the loops around it, and for each position along shared axes.
      numbers: hyperparameters by name, as in `sequential`; regular expressions are for the names of hidden signals.
      learned_factors: whether the matrix of `rank` learns too. Its gradient is the sum over the hidden signals of
        e (B_l h_l)^T, with the error e before the matrix reduces it.
      normalise_error: whether the error vector of each example (and shared position) has length one, before the matrix
        of `rank` reduces it. It is then divided by the number of losses, as the gradient of a mean is.

    Returns:
      The rule.

    Raises:
      TypeError: `signal` or `learn` cannot be called like this, or asks for another name; or `init` is not a function
        that returns an array.
      ValueError: an option does not fit its description. At use: a function returns something else, or a pattern in
        `numbers` matches no hidden signal.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> def signal(e, b, targets, name, *, slope):  # the rule then multiplies by the slope once more
      ...     s = jnp.tensordot(e, b, axes=1)
      ...     return s if slope is None else slope * s
      >>> rule = lrules.direct(signal, init=jax.nn.initializers.glorot_normal())
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> rule.init(jax.random.key(0), net, params, jnp.ones((1, 3))).fixed["b"].shape
      (2, 4)
    """
    require_flags(redrawn=redrawn, targets=targets, learned_factors=learned_factors, normalise_error=normalise_error)
    several = isinstance(at, Iterable) and not isinstance(at, str)
    where: tuple[Any, ...] | None = None if at is None else tuple(at) if several else (at,)
    if where == ():
        raise ValueError("at must name at least one place, got none: leave it out to use every hidden signal")
    for pattern in where or ():
        require_pattern(pattern, "at=")
    if rank is not None and not (is_whole(rank) and rank >= 1):
        raise ValueError(f"rank must be an integer >= 1 or None, got {rank!r}")
    if rank is not None and init is None:
        raise ValueError(f"rank={rank} makes feedback weights of two factors, and init draws both: give init too")
    if signal is not None and pullback is not None:
        raise ValueError("signal and pullback both say what arrives: give one of them")
    if signal is None and pullback is None:
        for option, value in {"init": init, "learn": learn, "state": state, "numbers": numbers}.items():
            if value:
                raise ValueError(f"signal=None stops the error, so {option} has no use: leave it out")
    if learned_factors and (rank is None or learn is None):
        raise ValueError("learned_factors trains the matrix of rank beside the others: give rank and learn too")
    if redrawn and learn is not None:
        raise ValueError("feedback that is redrawn at every step cannot learn: leave out redrawn or learn")
    if learn is not None and init is None:
        raise ValueError("learn trains feedback weights, and init draws them: give both or neither")
    if storage not in ("stored", "recomputed"):
        raise ValueError(f'storage must be "stored" or "recomputed", got {storage!r}')
    if storage == "recomputed" and learn is not None:
        raise ValueError(
            'storage="recomputed" draws the feedback weights again from their keys, so they cannot learn: leave out '
            'adaptive=True (learn), or give storage="stored"'
        )
    if storage == "recomputed" and init is None:
        raise ValueError('storage="recomputed" draws the feedback weights again with init: give init too')
    given = rule_numbers(numbers, "hidden signal")
    spec = Direct(
        signal, init, learn, redrawn, where, _pairs(shared_axes), rank, pullback, targets, error_at, max_feedback_bytes,
        storage, tuple(offers), state, given, learned_factors, normalise_error,
    )  # fmt: skip
    return layerwise(lambda graph: lambda name: spec, [spec], layer=spec)


def _pairs(shared_axes: Any) -> tuple[tuple[int, tuple[int | str, ...]], ...]:
    """`shared_axes=` as axes of the outputs, each with the places in hidden signals that are given for it."""
    several = isinstance(shared_axes, Iterable) and not isinstance(shared_axes, str)
    pairs = [(a, None) if is_whole(a) else a for a in (tuple(shared_axes) if several else (shared_axes,))]
    places: dict[int, tuple[int | str, ...]] = {}
    for pair in pairs:
        given = pair if isinstance(pair, list | tuple) and len(pair) == 2 else (pair, "")
        loop = isinstance(given[1], str) and re.fullmatch(r"loop \d+", given[1])
        if not (is_whole(given[0]) and (loop or is_whole(given[1]) or given[1] is None)):
            raise ValueError(
                f"shared_axes must be an axis of the outputs, several axes, or pairs [(axis of the outputs, axis of "
                f'the hidden signals or "loop 0")], got {shared_axes!r}'
            )
        out, within = given
        if out in places and (within is None or not places[out]):
            raise ValueError(
                f"shared_axes names the axis {out} of the outputs twice, got {shared_axes!r}: name each once, or give "
                "pairs in a list, [(axis of the outputs, axis of the hidden signals)]"
            )
        places[out] = (*places.get(out, ()), *(() if within is None else (within,)))
    return tuple(places.items())
