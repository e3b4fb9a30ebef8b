"""What the analysis takes for a layer, and what it cannot serve: one sentence names the thing and the remedy."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lrules
from tests import bridge
from tests.small import BACKMAN, DFA, FA, GLOROT, KEY, W, X, first, refused, zero_below


def test_parameter_in_a_carry():
    def apply(p, x):
        step = lambda c, _: ((jnp.tanh(c[0] @ c[1]), 0.9 * c[1]), None)  # noqa: E731
        (h, _), _ = lax.scan(step, (x @ p["a"], p["b"]), None, length=2)
        return h @ p["c"]

    refused(apply, "'b'", "carry", "xs")
    lrules.backprop().init(KEY, apply, W, X)


def test_layer_in_a_while_loop():
    def apply(p, x):
        def body(state):
            i, h = state
            return i + 1, jnp.tanh(h @ p["b"])

        return lax.while_loop(lambda s: s[0] < 2, body, (0, x @ p["a"]))[1] @ p["c"]

    for rule in (FA, DFA, BACKMAN):
        refused(apply, "'b'", "while", "lax.fori_loop", rule=rule)
    rule = lrules.partition({"^b$": lrules.backprop(), ".*": FA})
    f = lrules.transform(apply, rule)
    feedback = rule.init(KEY, apply, W, X)
    assert f(W, feedback, X).shape == (4, 3)
    assert set(feedback.fixed) == {"c"}


@jax.custom_vjp
def vjp_dense(w, x):
    return x @ w


@jax.custom_jvp
def jvp_dense(w, x):
    return x @ w


vjp_dense.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, d: (r[1].T @ d, d @ r[0].T))
jvp_dense.defjvps(lambda dw, y, w, x: x @ dw, lambda dx, y, w, x: dx @ w)


def is_layer(apply, layers, params, inputs=X):
    """Feedback alignment with the weights as feedback is jax.grad, and with zeros nothing arrives below."""
    assert [row["layer"] for row in lrules.describe(apply, FA, params, inputs).layers] == layers
    feedback = FA.init(KEY, apply, params, inputs)
    assert list(feedback.fixed) == layers[1:]
    weights = feedback._replace(fixed={name: params[name] for name in feedback.fixed})
    gradient = lambda f: jax.grad(lambda p: jnp.sum(jnp.sin(f(p))))(params)  # noqa: E731
    f = lrules.transform(apply, FA)
    bridge.close(gradient(lambda p: f(p, weights, inputs)), gradient(lambda p: apply(p, inputs)), 1e-5)
    zero_below(apply, params, inputs)


@pytest.mark.parametrize("dense", [vjp_dense, jvp_dense])
def test_layer_in_a_function_with_its_own_derivative(dense):
    """One product of one weight and data: the function is the layer."""
    params = {name: GLOROT(jax.random.fold_in(KEY, i), w.shape) for i, (name, w) in enumerate(W.items())}
    apply = lambda p, x: jnp.tanh(dense(p["b"], x @ p["a"])) @ p["c"]  # noqa: E731
    is_layer(apply, ["a", "b", "c"], params)
    assert set(DFA.init(KEY, apply, params, X).fixed) == {"b", "c"}
    BACKMAN.init(KEY, apply, params, X)


def _own(function, backward):
    """A function whose own derivative is `backward(w, x, d) -> (dw, dx)`."""
    made = jax.custom_vjp(function)
    made.defvjp(lambda w, x: (function(w, x), (w, x)), lambda r, d: backward(*r, d))
    return made


def _true(function):
    return _own(function, lambda w, x, d: jax.vjp(function, w, x)[1](d))


MORE_THAN_ONE_LAYER = {
    "two products of one weight": (_true(lambda w, x: jnp.tanh(x @ w) @ w), lambda p: p["b"]),
    "a bias": (_true(lambda wb, x: x @ wb[0] + wb[1]), lambda p: (p["b"], p["t"])),
    "two weights": (_true(lambda wb, x: jnp.tanh(x @ wb[0]) @ wb[1]), lambda p: (p["b"], p["b2"])),
    "a product in another shape": (_true(lambda w, x: (x @ w).reshape(-1, 2, 3)), lambda p: p["b"]),
    "a product by hand": (_true(lambda w, x: (x[:, :, None] * w[None]).sum(1)), lambda p: p["b"]),
    "a product and one by hand": (_true(lambda w, x: x @ w + (x[:, :, None] * w[None]).sum(1)), lambda p: p["b"]),
    "a product in a while loop": (
        _own(
            lambda w, x: lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] @ w), (0, x))[1],
            lambda w, x, d: (x.T @ d, d @ w.T),
        ),
        lambda p: p["b"],
    ),
}


@pytest.mark.parametrize("rule", [FA, DFA, BACKMAN])
@pytest.mark.parametrize("name", MORE_THAN_ONE_LAYER)
def test_more_than_one_layer_in_a_function_with_its_own_derivative(name, rule):
    function, weights = MORE_THAN_ONE_LAYER[name]
    params = W | {"b2": W["b"], "t": jnp.ones((1, 6))}
    apply = lambda p, x: jnp.tanh(function(weights(p), x @ p["a"])).reshape(4, 6) @ p["c"]  # noqa: E731
    refused(apply, "'b'", "custom_vjp" if "hand" not in name else "summed", "backprop", params=params, rule=rule)


def test_unknown_primitive():
    def apply(p, x):
        return lax.linalg.triangular_solve(p["b"], x @ p["a"], left_side=False) @ p["c"]

    refused(apply, "'b'", "triangular_solve", "dot_general")


# ------------------------------------------------------------------------------------------- networks without layers


def test_no_layer():
    refused(lambda p, x: x * p["v"][None], "no layer found", "arguments", error=ValueError, params={"v": jnp.ones(5)})
    refused(lambda p, x: x @ jnp.ones((5, 3)), "no layer found", error=ValueError)
    lrules.backprop().init(KEY, lambda p, x: x, W, X)


# ------------------------------------------------------------------------------- weights and layers in disguise


def test_weights_that_meet_what_has_no_batch():
    """A weight masked by a key, a mask or a flag among the inputs stays a weight."""

    def masked(p, inputs):
        x, key = inputs
        keep = jax.random.bernoulli(key, 0.5, p["b"].shape).astype(jnp.float32)
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ (p["b"] * keep)) @ p["c"]

    zero_below(lrules.Network(masked, batch_axes=(0, None)), W, (X, KEY))

    def chosen(p, inputs):
        x, task = inputs
        return jnp.tanh(x @ p["a"]) @ p["tasks"][task]

    params = {"a": W["a"], "tasks": jnp.ones((2, 6, 3))}
    zero_below(lrules.Network(chosen, batch_axes=(0, None)), params, (X, jnp.asarray(1)))


def test_weights_made_in_a_loop_over_data():
    """What the turns stack up is made of slices of parameters alone: it is a weight, each of several."""

    def apply(p, x, k):
        turn = lambda h, pair: (jnp.sin(h), (2 * pair[0], jnp.sin(pair[1])))  # noqa: E731
        h, weights = lax.scan(turn, x @ p["a"], (p["b"], p["c"]))
        return h @ weights[k][1]

    for k, name in enumerate("bc"):
        params = {"a": W["a"], "b": jnp.ones((2, 6, 3)), "c": jnp.ones((2, 6, 3))}
        zero_below(lambda p, x, k=k: apply(p, x, k), params)
        assert set(FA.init(KEY, lambda p, x, k=k: apply(p, x, k), params, X).fixed) == {name}


def test_matrices_looked_up_for_each_example():
    """They are the weight of a layer, chosen by data; BackMAN alone has no norm of a neuron of the whole batch."""

    def experts(p, inputs):
        x, index = inputs
        return jnp.einsum("bi,bio->bo", first(p, x), p["experts"][index])

    params = {"a": GLOROT(KEY, (5, 6)), "experts": GLOROT(KEY, (3, 6, 3))}
    inputs = (X, jnp.arange(4) % 3)
    is_layer(experts, ["a", "experts"], params, inputs)
    refused(experts, "'experts'", "chosen for each example", "select among", rule=BACKMAN, params=params, inputs=inputs)


def test_inputs_closed_over():
    """The nodes of one graph, of which the inputs name some: layers, in which all nodes' errors add up."""
    nodes, graph = jax.random.normal(KEY, (7, 5)), jnp.eye(7) + jnp.eye(7, k=1)
    apply = lambda p, ids: (graph @ jnp.tanh(graph @ nodes @ p["a"]) @ p["c"])[ids]  # noqa: E731
    params, ids = {"a": GLOROT(KEY, (5, 6)), "c": GLOROT(KEY, (6, 3))}, jnp.arange(3)
    is_layer(apply, ["a", "c"], params, ids)
    for net in (apply, lrules.Network(apply, signal_axes={"outputs": 0})):
        assert {k: v.shape for k, v in DFA.init(KEY, net, params, ids).fixed.items()} == {"c": (3, 7, 6)}
        assert [row["shape"] for row in lrules.describe(net, DFA, params, ids).hidden] == [(7, 6)]


def test_two_parameters_of_one_name():
    params = {"v": {"w": jnp.ones((5, 3))}, "v/w": jnp.ones((3, 3))}
    refused(lambda p, x: x @ p["v"]["w"] @ p["v/w"], "two parameters", "'v/w'", error=ValueError, params=params)
