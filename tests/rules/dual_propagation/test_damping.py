"""Damped states: how strong the damping is, and which networks it serves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from lrules.diagnostics import spectral_norm
from lrules.rules.dual_propagation.damping import POWER_ITERATIONS
from tests import bridge
from tests.reference import nets
from tests.rules.dual_propagation.common import (
    NO_FEEDBACK,
    computed,
    conv,
    dense,
    expected,
    gradient_of_sum,
    half_squared,
    refused,
    residual_case,
    residual_net,
    targets_of,
)
from tests.sampling import mostly_slow, pairs

pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.mark.parametrize(
    "order,input_nudge",
    mostly_slow(
        pairs(["forward_backward", "forward", "parallel"], [None, 0.7]),
        [("forward_backward", None), ("forward", 0.7), ("parallel", None)],
    ),
)
def test_damped(order, input_nudge):
    net, x = conv(activation="relu")
    options = {"alpha": 1.0, "beta": 0.5, "adjoint": False, "iterations": 5, "order": order, "output": "squared_error"}
    options["input_nudge"] = input_nudge
    want = expected(net, x, damping=[0.8] * 4, **options)
    _, grads = computed(net, x, damping=0.8, **options)
    bridge.close(grads.params, bridge.kernels_and_biases(want))


def norms(net, x):
    """|W^T W| of each layer, by power iterations, and exactly."""
    graph = lrules.Network(bridge.apply_of(net)).graph(bridge.parameters(net), jnp.asarray(x))
    estimates, exact = [], []
    for layer, plain in zip(graph.layers, net, strict=True):

        def op(w, v, plain=plain):
            if w.ndim == 2:
                return v @ w
            return jax.lax.conv_general_dilated(
                v, w, plain.stride, plain.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        w, shape = jnp.asarray(plain.kernel), (1, *layer.operand.aval.shape[1:])
        estimates.append(float(spectral_norm(layer, op, w, POWER_ITERATIONS)) ** 2)
        matrix = jax.jacobian(lambda v, w=w, op=op: op(w, v).ravel())(jnp.zeros(shape))
        exact.append(float(np.linalg.norm(matrix.reshape(matrix.shape[0], -1), 2)) ** 2)
    return estimates, exact


@pytest.mark.parametrize(
    "damping,pool,input_nudge",
    mostly_slow(
        [(d, *p) for d in ("spectral", "contracting") for p in (("max", None), ("max", 0.7), ("average", 0.7))],
        [("spectral", "max", 0.7), ("contracting", "average", 0.7)],
    ),
)
def test_damping_by_power_iterations(damping, pool, input_nudge):
    net, x = conv(activation="relu", pool=pool)
    estimates, exact = norms(net, x)
    for estimate, norm in zip(estimates, exact, strict=True):
        assert 0.8 * norm < estimate <= norm * (1 + 1e-9)
    estimates[0] *= input_nudge or 1
    if pool == "average":  # of 2 x 2: the norm of (1, 1, 1, 1) / 4, squared, for what reads pooled states
        estimates = [n / 4 if k and net[k - 1].pool else n for k, n in enumerate(estimates)]
    strengths = estimates if damping == "spectral" else [max(0, n - 1) / 2 for n in estimates]
    options = {"alpha": 0.0, "beta": 0.3, "adjoint": False, "iterations": 4, "input_nudge": input_nudge}
    want = expected(net, x, damping=strengths, **options)
    _, grads = computed(net, x, damping=damping, **options)
    bridge.close(grads.params, bridge.kernels_and_biases(want))


def test_damping_knows_the_strengths_of_states_and_factors():
    """Eq. 46: L_k holds beta_k / beta_{k+1}; and a factor counts as it does inside the weight."""
    net, x = bridge.random_dense(np.random.default_rng(0), (4, 6, 7, 3), ["relu", "hard_tanh"], scale=1.5), None
    x = np.random.default_rng(1).normal(size=(5, 4))
    params, y = bridge.parameters(net), jnp.asarray(targets_of(net, x))
    options = {"alpha": 1.0, "adjoint": False, "damping": "spectral", "iterations": 300}

    def grads(apply, params, **more):
        fn = lrules.value_and_grad(apply, half_squared, lrules.dual_propagation(**options, **more))
        return jax.jit(fn)(params, NO_FEEDBACK, jnp.asarray(x), y)[1]

    for more in ({"beta": {"relu": 3.0, "hard_tanh": 0.3}}, {"beta": 0.3, "input_nudge": 20.0},
                 {"beta": 3.0, "output": "refreshed"}):  # fmt: skip
        assert grads(bridge.apply_of(net), params, **more).report["residual"][-1] < 0.05

    def factors(p, x):
        h = 6 * jax.nn.relu(x @ p["a"]) / 2
        return jax.nn.hard_tanh(-2 * (h @ p["b"])) @ p["c"]

    w = {name: params[str(k)]["kernel"] for k, name in enumerate("abc")}
    inside = grads(lambda p, x: jax.nn.hard_tanh(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"], w | {"b": -6 * w["b"]})
    outside = grads(factors, w)
    bridge.close(outside.params["a"], inside.params["a"])
    np.testing.assert_allclose(outside.report["residual"], inside.report["residual"], atol=1e-9)
    for between in (lambda h: h * jnp.arange(1.0, 8.0)[None], lambda h: h / jnp.sqrt(1 + jnp.square(h).mean())):
        with pytest.raises(NotImplementedError, match="give a number, such as damping=0.5"):
            grads(lambda p, x, f=between: jax.nn.relu(f(jax.nn.relu(x @ p["a"]) @ p["b"])) @ p["c"], w)


def test_damping_of_a_loop():
    """Refused for what it is; written out, as the refusal says, the same chain is damped."""
    width, options = 4, {"alpha": 1.0, "adjoint": False, "iterations": 2}
    params, x = {"w": jnp.ones((3, width, width)) / 9, "out": jnp.ones((width, 2))}, jnp.ones((5, width))

    def looped(p, x):
        return jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, p["w"])[0] @ p["out"]

    def written_out(p, x):
        for w in p["w"]:
            x = jax.nn.relu(x @ w)
        return x @ p["out"]

    for damping in ("spectral", "contracting", 0.5):
        rule = lrules.dual_propagation(damping=damping, **options)
        with pytest.raises(NotImplementedError, match="'relu' lies inside a loop, .*: write the loop out"):
            gradient_of_sum(looped, rule, params, x)
        assert jnp.any(gradient_of_sum(written_out, rule, params, x)["w"])


def test_nudged_and_damped_inputs_converge():
    """With a first layer of norm 5 the undamped states of the inputs jump to and fro."""
    rng = np.random.default_rng(0)
    kernels = [rng.normal(size=s) for s in ((3, 4), (4, 2))]
    kernels[0] *= 5 / np.linalg.norm(kernels[0], 2)
    net = nets.dense_net(kernels, [None, None], ["relu"])
    x = rng.normal(size=(5, 3))
    options = {"alpha": 1.0, "beta": 0.5, "adjoint": False, "output": "squared_error", "iterations": 2000}
    _, grads = computed(net, x, input_nudge=1.0, damping="spectral", **options)
    assert grads.report["residual"][-1] < 1e-3


def test_damped_activations_that_are_projections():
    x = jnp.ones((5, 3))
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    rule = lrules.dual_propagation(alpha=1.0, adjoint=False, damping="contracting", iterations=2)
    for f in (jax.nn.relu, jax.nn.relu6, jax.nn.hard_tanh, lambda h: jnp.clip(h, 0, 1), lambda h: jnp.maximum(h, 0)):
        net = lambda p, x, f=f: f(x @ p["a"]) @ p["b"]  # noqa: E731
        gradient_of_sum(net, rule, params, x)
    for f in (jax.nn.hard_sigmoid, jax.nn.leaky_relu, jax.nn.gelu, lambda h: jnp.maximum(h, h / 2)):
        net = lambda p, x, f=f: f(x @ p["a"]) @ p["b"]  # noqa: E731
        with pytest.raises(NotImplementedError, match="cannot be damped"):
            gradient_of_sum(net, rule, params, x)


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.hard_tanh, lambda h: jnp.clip(h, 0, 1)])
def test_damped_under_vmap(activation):
    """Many seeds at once, as experiments train them."""
    seeds = jax.random.split(jax.random.key(0), 3)
    params = {"a": jax.vmap(lambda k: jax.random.normal(k, (3, 4)))(seeds), "b": jnp.ones((3, 4, 2))}
    rule = lrules.dual_propagation(alpha=1.0, adjoint=False, damping="contracting", iterations=2)

    def gradient(params):
        net = lambda p, x: activation(x @ p["a"]) @ p["b"]  # noqa: E731
        return gradient_of_sum(net, rule, params, jnp.ones((5, 3)))

    together = jax.jit(jax.vmap(gradient))(params)
    for i in range(3):
        bridge.close(jax.tree.map(lambda g, i=i: g[i], together), gradient(jax.tree.map(lambda p, i=i: p[i], params)))


def test_networks_that_cannot_be_damped():
    damped = {"alpha": 1.0, "adjoint": False, "damping": "spectral"}
    refused(NotImplementedError, "'tanh' cannot be damped", **damped)
    refused(NotImplementedError, "cannot be damped", net=dense(0, ("relu", "leaky_relu")), **damped)
    params, x, y = residual_case()
    with pytest.raises(NotImplementedError, match="chains"):
        fn = lrules.value_and_grad(lambda p, x: residual_net(p, x), half_squared, lrules.dual_propagation(**damped))
        fn(params, NO_FEEDBACK, x, y)

    def two_layers(p, x):  # make one pre-activation
        h = jax.nn.relu(x @ p["a"])
        return jax.nn.relu(h @ p["b"] + h @ p["c"]) @ p["d"]

    shapes = {"a": (4, 6), "b": (6, 6), "c": (6, 6), "d": (6, 3)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    with pytest.raises(NotImplementedError, match="chains"):
        fn = lrules.value_and_grad(two_layers, half_squared, lrules.dual_propagation(**damped))
        fn(params, NO_FEEDBACK, jnp.ones((5, 4)), jnp.ones((5, 3)))
