"""Rules made with the public constructors, in a few lines each. Copy one and change it to make your own.

The first rules are variants that Baldi, Sadowski and Lu (2018) mention in sections 3, 4.2 and 6.1. The others show what
the functions of a rule can ask for (see `lrules.constructors`): targets, the hidden signal, numbers by layer. `pepita`
shows a rule with two forward passes. Each public function returns a rule, except `cascade`.
"""

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import lrules


def mixed_channel(long_range: str) -> lrules.Rule:
    """The output error goes straight to some layers, and from there down by feedback alignment.

    Args:
      long_range: a regular expression for names of layers. The hidden signals that these layers read get direct
        feedback.
    """
    return lrules.partition({long_range: lrules.direct_feedback_alignment(), ".*": lrules.feedback_alignment()})


def nonlinear_channel(rule: lrules.Rule | None = None, fn: Callable[[jax.Array], jax.Array] = jnp.tanh) -> lrules.Rule:
    """Nonlinear neurons in the learning channel: s_l <- fn(s_l), where s_l has the scale of one example's error."""
    return lrules.modify_error(rule or lrules.direct_feedback_alignment(), lambda signal, name, rng: fn(signal))


def averaged_matrices(n: int, init: Callable[..., jax.Array] | None = None) -> lrules.Rule:
    """Feedback alignment with the average of n random matrices: its signal is the average of their signals."""
    return lrules.feedback_alignment(init=lrules.feedback.averaged(n, init=init))


def redrawn(init: Callable[..., jax.Array] | None = None) -> lrules.Rule:
    """Feedback alignment with new random matrices at every step: it learns poorly (observation 1)."""

    def backward(op, w, b, x, d, layer):
        dw, _ = jax.vjp(op, w, x)[1](d)
        (dx,) = jax.vjp(lambda x: op(b, x), x)[1](d)
        return dw, dx, None

    return lrules.sequential(backward, init=init or jax.nn.initializers.glorot_normal(), redrawn=True)


def redrawn_concordant() -> lrules.Rule:
    """`redrawn` with the signs of the forward weights, as `sign_symmetry("random")`: it learns (observation 2)."""
    return redrawn(init=lrules.feedback.congruent())


def redrawn_direct(init: Callable[..., jax.Array] | None = None) -> lrules.Rule:
    """Direct feedback alignment with new random matrices at every step."""
    signal = lambda e, b, targets, name: jnp.tensordot(e, b, axes=1)  # noqa: E731
    return lrules.direct(signal, init=init or jax.nn.initializers.glorot_normal(), redrawn=True)


def cascaded(init: Callable[..., jax.Array] | None = None) -> lrules.Rule:
    """Direct feedback from the output, and also from every hidden signal to all hidden signals below it.

    s_h = C_h e + sum over l above h of C_lh s_l. The channel is linear, so this is direct feedback with one matrix for
    each hidden signal: `cascade` computes it. The network must not have loops over layers.
    """
    draw = init or jax.nn.initializers.glorot_normal()
    rule = lrules.direct_feedback_alignment(init)

    def make(key, net, params, inputs):
        rows = lrules.describe(net, rule, params, inputs).hidden
        names = [row["hidden signal"] for row in rows]
        straight = rule.init(key, net, params, inputs).fixed
        between: dict[tuple[str, str], jax.Array] = {}
        for i, below in enumerate(names):
            for above in names[i + 1 :]:
                (_, *into), (_, *out) = straight[below].shape, straight[above].shape
                k = jax.random.fold_in(key, zlib.crc32(f"{above} to {below}".encode()) & 0x7FFFFFFF)
                drawn = draw(k, (straight[below][0].size, straight[above][0].size), straight[below].dtype)
                between[above, below] = drawn.T.reshape(*out, *into)
        return lrules.Feedback(cascade(names, straight, between), {})

    return rule._replace(init=make)


def cascade(
    names: list[str], straight: Mapping[str, jax.Array], between: Mapping[tuple[str, str], jax.Array]
) -> dict[str, jax.Array]:
    """The total matrices B_h = C_h + sum over l above h of B_l C_lh, `[outputs, *hidden]`; `names`: lowest first."""
    total: dict[str, jax.Array] = {}
    for i in reversed(range(len(names))):
        total[names[i]] = straight[names[i]]
        for above in names[i + 1 :]:
            steps = jnp.tensordot(total[above], between[above, names[i]], axes=total[above].ndim - 1)
            total[names[i]] = total[names[i]] + steps
    return total


def weight_by_weight() -> lrules.Rule:
    """Each synapse has one random weight for the error of each output. It does not learn (observation 7).

    dw_ij = sum over k of c_ijk e_k f'(z_i) h_j. Direct feedback is linear in its matrices. So the term of output k is
    the gradient with feedback weights of 1 for output k and 0 for the others, times c_ijk.
    """
    direct = lrules.direct_feedback_alignment(init=jax.nn.initializers.zeros)

    def init(key, net, params, inputs):
        feedback = direct.init(key, net, params, inputs).fixed
        outputs = next(iter(feedback.values())).shape[0]
        leaves = jax.tree.leaves(params)
        keys = jax.random.split(key, len(leaves))
        drawn = [jax.random.normal(k, (outputs, *p.shape), p.dtype) for k, p in zip(keys, leaves, strict=True)]
        return lrules.Feedback(
            {str(i): c for i, c in enumerate(drawn)} | {"zeros/" + n: b for n, b in feedback.items()}, {}
        )

    def value_and_grad(net, loss):
        step = lrules.value_and_grad(net, loss, direct)

        def f(params, feedback, inputs, targets, *, rng=None):
            zeros = {n.removeprefix("zeros/"): b for n, b in feedback.fixed.items() if n.startswith("zeros/")}
            coefficients = [feedback.fixed[str(i)] for i in range(len(jax.tree.leaves(params)))]

            def of_output(k):
                passing = {n: b.at[k].set(1) for n, b in zeros.items()}
                return step(params, lrules.Feedback(passing, {}), inputs, targets)[1].params

            head, last = step(params, lrules.Feedback(zeros, {}), inputs, targets)
            parts = jax.vmap(of_output)(jnp.arange(len(coefficients[0])))
            weighted = [
                g + (c * (part - g[None])).sum(0)
                for c, part, g in zip(coefficients, jax.tree.leaves(parts), jax.tree.leaves(last.params), strict=True)
            ]
            return head, last._replace(params=jax.tree.unflatten(jax.tree.structure(params), weighted))

        return f

    def transform(net, *, reduction="mean") -> Any:
        raise ValueError("lrules.transform cannot use weight_by_weight: use lrules.value_and_grad(net, loss, rule)")

    return lrules.Rule(init, transform, value_and_grad)


def quantized_signals(channel: str, bits: int, scale: float = 2**-6) -> lrules.Rule:
    """Quantises the signal s of each hidden neuron after the whole backward pass, and sums over the batch.

    dW_l = sum over examples of Q(s_l) * f'(z_l) h_{l-1}^T

    s_l has the scale of one example's error. Q is the quantiser of `lrules.quantize_error`; the signals that go further
    down are not quantised. The layer of the outputs learns as in backpropagation, by the mean, and so do the biases of
    BP and RBP. This is what "quantised updates" may be in the table of Baldi, Sadowski and Lu (2018).

    Args:
      channel: "bp", "rbp" or "srbp".
      bits: the number of magnitudes.
      scale: the largest magnitude.
    """

    quantized = functools.partial(lrules.extend.quantize, bits=bits, scale=scale)

    def backward(op, w, b, x, d, layer, *, slope):
        weights = w if b is None else b
        (dx,) = jax.vjp(lambda x: op(weights, x), x)[1](d)
        if slope is not None:
            signal = len(d) * d / jnp.where(slope == 0, 1, slope)  # d is s f'(z) / batch
            d = quantized(signal) * slope
        return jax.vjp(lambda w: op(w, x), w)[1](d)[0], dx, None

    if channel == "srbp":
        signal = lambda e, b, targets, name: quantized(len(e) * jnp.tensordot(e, b, axes=1))  # noqa: E731
        rule = lrules.direct(signal, init=jax.nn.initializers.glorot_normal())
    elif channel in ("bp", "rbp"):
        rule = lrules.sequential(backward, init=jax.nn.initializers.glorot_normal() if channel == "rbp" else None)
    else:
        raise ValueError(f'channel must be "bp", "rbp" or "srbp", got {channel!r}')
    return rule._replace(additive=False)  # the updates of the examples are summed, not averaged


def rates(by_layer: Mapping[str, float]) -> lrules.Rule:
    """Backpropagation with a separate learning rate for each layer: dW_l <- rate_l dW_l.

    Args:
      by_layer: the rate for each regular expression for names of layers. The first match counts. If a pattern matches
        no layer, an error lists the layers.
    """

    def backward(op, w, b, x, d, layer, rate):
        dw, dx = jax.vjp(op, w, x)[1](d)
        return rate * dw, dx, None

    return lrules.sequential(backward, numbers={"rate": by_layer})


def pepita(init: Callable[..., jax.Array] | None = None) -> lrules.Rule:
    """PEPITA: a second forward pass, with the error added to the inputs, in the place of a backward pass.

    h'_0 = x + F^T e,  dW_l = (h_l - h'_l) h'_{l-1}^T,  dW_L = e' h'_{L-1}^T

    (Dellaferrera and Kreiman 2022, section 3.) h are the outputs of the activations, and e' is the output error of the
    second pass. The matrix F is in `feedback.fixed`, by the name `"inputs"`. It is no feedback of a layer or a hidden
    signal, so this is no rule of the library. A bias gets what its layer gets. One input must have the examples, and
    each hidden signal must come from an activation. What lies between an activation and the hidden signal, such as a
    scale, does not learn.

    On digits (tanh, Adam, 15 epochs, three seeds) it reaches 94.6 ± 0.4 percent with a hidden layer of 128 (last layer
    only 91.5, feedback alignment 94.7), and with three of 64 it falls behind: 91.6 ± 0.4 (80.6, 93.1).

    Args:
      init: the initializer of F; it draws `[inputs, outputs]`. Default: a twentieth of `he_uniform`, as in the paper.
    """
    draw = init or (lambda *args: 0.05 * jax.nn.initializers.he_uniform()(*args))
    own = lrules.extend.Sequential(lambda *_: (None, None, None))  # at every layer: not backpropagation

    def plan(net, graph, params, inputs):
        _units(graph)
        return lrules.extend.make_plan(net, graph, params, inputs, lambda name: own, partition=False)

    def rule_init(key, net, params, inputs):
        net = lrules.extend.as_network(net)
        graph = net.graph(params, inputs)
        leaves, place, _ = _batched(net, inputs)
        if graph.n_outputs != 1:
            raise NotImplementedError("pepita adds the error of one output to the inputs: return the others as aux")
        plan(net, graph, params, inputs)
        n, x = math.prod(graph.outs[0].aval.shape[1:]), leaves[place]
        f = draw(key, (math.prod(x.shape[1:]), n), x.dtype)
        return lrules.Feedback({"inputs": f.T.reshape(n, *x.shape[1:])}, {})

    def transform(net, *, reduction="mean") -> Any:
        raise ValueError("pepita needs the loss, so transform cannot serve it: use lrules.value_and_grad")

    def value_and_grad(net, loss):
        def step(params, feedback, inputs, targets, *, rng=None):
            if net.handlers:
                raise ValueError("modifiers cannot change pepita, which sends no error down: leave them out")
            graph, n = net.graph(params, inputs), net.batch_size(inputs)
            plan(net, graph, params, inputs)
            units = _units(graph)
            objective = lambda outputs: lrules.extend.mean_loss(net, loss, outputs, inputs, targets)  # noqa: E731
            outputs, aux, clean = lrules.extend.run(net, params, inputs, [_Recorded(units)])
            value, e = jax.value_and_grad(objective)(outputs)
            leaves, place, tree = _batched(net, inputs)
            leaves[place] += lrules.extend.project(n * e.reshape(n, -1), feedback.fixed["inputs"])
            moved = jax.tree.unflatten(tree, leaves)

            def modulated(params):
                outputs, _, terms = lrules.extend.run(net, params, moved, [_Difference(units)], given=clean)
                return objective(outputs) + sum(jnp.sum(term) for term in terms.values()) / n

            head = (value, outputs, aux) if net.has_aux else (value, outputs)
            return head, lrules.Gradients(jax.grad(modulated)(params), {}, feedback.state)

        return step

    return lrules.Rule(rule_init, transform, value_and_grad, description=lrules.extend.RuleDescription(plan))


def _batched(net: lrules.Network, inputs: Any) -> tuple[list[Any], int, Any]:
    """The leaves of the inputs, which of them has the examples, and the structure."""
    leaves, tree = jax.tree.flatten(inputs)
    floats = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    found = [i for i, axis in enumerate(net.input_batch_axes(inputs)) if axis == 0 and floats[i]]
    if len(found) != 1:
        raise NotImplementedError(
            f"pepita adds the error to the one input that has the examples, and {len(found)} inputs are floating-point "
            "arrays with the batch in front: join them, or use another rule"
        )
    return leaves, found[0], tree


def _units(graph: Any) -> set[str]:
    """The activations from which hidden signals come, by site."""
    made = {id(activation.output): activation for activation in graph.activations}
    roots = {id(hidden.root) for hidden in graph.hidden}
    found = set()
    for hidden in graph.hidden:
        stack, own = [hidden.root], set()
        while stack:
            value = stack.pop()
            if id(value) in made:
                own.add(made[id(value)])
            elif value is hidden.root or id(value) not in roots:
                stack += [v for v in (value.source, *value.operands) if v is not None and v.both]
        if not own or any(set(activation.scope) - {"scan"} for activation in own):
            raise NotImplementedError(
                f"pepita: the hidden signal {hidden.name!r} does not come from an activation outside of cond and "
                "shard_map, so the two passes cannot be compared there: use another rule"
            )
        found |= {activation.site for activation in own}
    return found


class _Recorded(lrules.extend.Handler):
    """Records the outputs of activations."""

    activations = True

    def __init__(self, units):
        self.units = units

    def activation(self, activation, fn, x, frame):
        y = fn(x)
        if activation.site in self.units:
            frame.records[activation.site] = y
        return y


class _Difference(_Recorded):
    """Gives each pre-activation the difference of the two passes as its error, and nothing from above."""

    def activation(self, activation, fn, x, frame):
        y = fn(x)
        if activation.site in self.units:
            frame.records[activation.site] = jnp.sum(jax.lax.stop_gradient(frame.inputs[activation.site] - y) * x)
        return y

    def hidden(self, hidden, value, frame):
        return jax.lax.stop_gradient(value)
