"""Which states a network has: skip connections, inputs, branches, and what no error reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from tests import bridge
from tests.rules.dual_propagation.common import (
    ALL_ORDERS,
    NO_FEEDBACK,
    dense,
    expected,
    gradient_of_sum,
    half_squared,
    residual_case,
    residual_net,
    transformed,
)
from tests.sampling import mostly_slow, pairs
from tests.zoo import ZOO
from tests.zoo import loss as zoo_loss

pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.mark.parametrize(
    "order,adjoint",
    mostly_slow(
        pairs(["forward_backward", "forward", "odd_even"], [True, False]),
        [("forward_backward", True), ("forward", False), ("odd_even", True)],
    ),
)
def test_inputs_as_states(order, adjoint):
    net, x = dense()
    options = {"alpha": 0.3, "beta": 0.5, "adjoint": adjoint, "order": order, "iterations": 3, "input_nudge": 0.7}
    want = expected(net, x, **options)
    params, inputs = transformed(net, x, **options)
    bridge.close((params, inputs), (bridge.kernels_and_biases(want), want.inputs))


BEHIND = {
    "stop_gradient": lambda p, h: jax.lax.stop_gradient(h) @ p["b"],
    "a branch": lambda p, h: h @ p["b"] + jax.lax.stop_gradient(jax.nn.silu(h @ p["b"])),
    "an index": lambda p, h: (h @ p["b"]) * jax.nn.one_hot(jnp.argmax(jnp.sin(h @ p["b"]), -1), 5),
    "its own factor": lambda p, h: (lambda a: a * jax.lax.stop_gradient(jax.nn.sigmoid(a)))(h @ p["b"]),
    "a surrogate": lambda p, h: (h + jax.lax.stop_gradient(jnp.round(h) - h)) @ p["b"],
}


@pytest.mark.parametrize(
    "name,order", mostly_slow(pairs(BEHIND, ALL_ORDERS), list(zip(BEHIND, ALL_ORDERS, strict=True)))
)
def test_states_that_no_error_reaches(name, order):
    """They stay as they come from below, and what reads them learns as ever."""
    params, x, y = residual_case()
    rng = {"rng": jax.random.key(0)} if order == "random" else {}
    net = lambda p, x: jax.nn.softplus(BEHIND[name](p, jnp.tanh(x @ p["a"]))) @ p["c"][:, :2]  # noqa: E731
    rule = lrules.dual_propagation(beta=1e-4, order=order, iterations=6)
    fn = lrules.value_and_grad(net, half_squared, rule)
    _, grads = jax.jit(fn)(params, NO_FEEDBACK, x, y, **rng)
    bridge.close(grads.params, jax.grad(lambda p: half_squared(net(p, x), y).mean())(params), 1e-6)
    assert grads.report["residual"][-1] < 1e-3


def test_nudged_inputs_that_no_error_reaches():
    params, x, y = residual_case()
    net = lambda p, i: jnp.tanh(i["x"] @ p["a"]) @ p["f"] * jnp.where(i["mask"] > 0.5, 1.0, 0.0)  # noqa: E731
    inputs = {"x": x, "mask": jnp.linspace(0, 1, 7)[:, None]}
    _, grads = lrules.value_and_grad(net, half_squared, lrules.dual_propagation(beta=1e-4, input_nudge=1e-3))(
        params, NO_FEEDBACK, inputs, y
    )
    bridge.close(grads.params, jax.grad(lambda p: half_squared(net(p, inputs), y).mean())(params), 1e-6)
    with pytest.raises(ValueError, match="batches of floating-point numbers, and this network has none"):
        f = lrules.transform(lambda p, i: p["a"][i], lrules.dual_propagation(input_nudge=1.0))
        f(params, NO_FEEDBACK, jnp.asarray([0, 1]))


@pytest.mark.parametrize("order", mostly_slow(ALL_ORDERS, ["forward_backward", "odd_even", "random"]))
def test_skip_connections(order):
    """Weak feedback gives the gradient; strong feedback the same fixed point in every order."""
    params, x, y = residual_case()
    rng = {"rng": jax.random.key(0)} if order == "random" else {}

    def grads(order, rng, **options):
        fn = lrules.value_and_grad(residual_net, half_squared, lrules.dual_propagation(order=order, **options))
        return jax.jit(fn)(params, NO_FEEDBACK, x, y, **rng)[1]

    true = jax.grad(lambda p: half_squared(residual_net(p, x), y).mean())(params)
    bridge.close(grads(order, rng, beta=1e-4, iterations=8).params, true, 1e-7)
    settled = grads("forward_backward", {}, alpha=0.4, beta=0.05, iterations=40)
    assert settled.report["residual"][-1] < 1e-12
    bridge.close(grads(order, rng, alpha=0.4, beta=0.05, iterations=40).params, settled.params, 1e-6)


@pytest.mark.foreign
@pytest.mark.parametrize(
    "name",
    mostly_slow(
        ["nnx_lenet5", "nnx_transformer", "linen_lstm", "weight_normalisation", "vmapped_batch_last", "fori_loop"],
        ["linen_lstm", "weight_normalisation", "vmapped_batch_last", "fori_loop"],
    ),
)
def test_models_of_the_zoo(name):
    """In float32, at beta 1/100: the gradient to a per cent."""
    with jax.enable_x64(False):
        net, params, inputs = ZOO[name].build()[:3]
        f = lrules.transform(net, lrules.dual_propagation(beta=1e-2))
        got = jax.jit(jax.grad(lambda p: zoo_loss(f(p, NO_FEEDBACK, inputs)).mean()))(params)
        want = jax.jit(jax.grad(lambda p: zoo_loss(net(p, inputs)).mean()))(params)
        floor = max(float(jnp.abs(w).max()) for w in jax.tree.leaves(want))
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(g, w, atol=1e-2 * float(jnp.abs(w).max()) + 1e-3 * floor)


def test_a_net_without_activations_gets_its_gradient():
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=s)) for s in ((3, 4), (4, 2))]
    x, y = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=(5, 2)))
    net = lambda p, x: x @ p[0] @ p[1]  # noqa: E731
    for iterations in (1, 3):
        f = lrules.transform(net, lrules.dual_propagation(iterations=iterations))
        got = jax.grad(lambda p, f=f: half_squared(f(p, NO_FEEDBACK, x), y).mean())(params)
        bridge.close(got, jax.grad(lambda p: half_squared(net(p, x), y).mean())(params))


def test_learned_numbers_in_between_reach_their_parameters():
    """Biases, normalisation scales and skip weights take the signals that arrive at them."""
    params, x, y = residual_case()

    def net(p, x):
        h = jnp.tanh(x @ p["a"])
        return jax.nn.relu((h * p["g"] + p["s"]) @ p["b"]) @ p["c"][:, :2] + p["t"]

    params = {**params, "g": jnp.ones((1, 4)), "s": jnp.full((1, 4), 0.3), "t": jnp.zeros((1, 2))}
    f = lrules.transform(net, lrules.dual_propagation(beta=1e-4))
    got = jax.grad(lambda p: half_squared(f(p, NO_FEEDBACK, x), y).mean())(params)
    bridge.close(got, jax.grad(lambda p: half_squared(net(p, x), y).mean())(params), 1e-6)


@pytest.mark.parametrize(
    "construct,message",
    [
        (lambda h: jax.lax.cond(h.sum() > 0, jax.nn.relu, jnp.tanh, h), "inside a cond"),
        (jnp.square, "square is not recognised|integer_pow is not recognised"),
        (lambda h: jnp.maximum(h, h[:, ::-1]), "max is not recognised"),
    ],
)
def test_refused_activations(construct, message):
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    x, y = jnp.ones((5, 3)), jnp.ones((5, 2))

    def apply(p, x):
        return construct(x @ p["a"]) @ p["b"]

    with pytest.raises(NotImplementedError, match=message):
        lrules.value_and_grad(apply, half_squared, lrules.dual_propagation())(params, NO_FEEDBACK, x, y)


def test_what_lies_in_a_branch_can_pass():
    """As the refusal says."""
    params, x = {"a": jnp.eye(3), "b": jnp.ones((3, 3)) / 2, "c": jnp.ones((3, 2))}, jnp.ones((5, 3))

    def net(p, x):
        h = jnp.sin(x @ p["a"]) @ p["b"]
        return jax.lax.cond(h.sum() > 0, jax.nn.silu, jnp.tanh, h) @ p["c"]

    with pytest.raises(NotImplementedError, match=r"'tanh', 'silu' lie inside a cond, .* passing=\{'tanh', 'silu'\},"):
        gradient_of_sum(net, lrules.dual_propagation(), params, x)
    found = gradient_of_sum(net, lrules.dual_propagation(beta=1e-5, passing={"silu", "tanh"}), params, x)
    bridge.close(found, jax.grad(lambda p: net(p, x).sum())(params), 1e-6)
