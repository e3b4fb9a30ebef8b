"""Dual propagation against explicit states, and what it refuses."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrules
from lrules.diagnostics import spectral_norm
from lrules.rules.dual_propagation.damping import POWER_ITERATIONS
from tests import bridge
from tests.reference import backprop, losses, nets
from tests.reference import dual_propagation as reference
from tests.zoo import ZOO
from tests.zoo import loss as zoo_loss

NO_FEEDBACK = lrules.Feedback({}, {})


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def half_squared(outputs, targets):
    return 0.5 * jnp.sum(jnp.square(outputs - targets), -1)


def dense(rng=0, activations=("tanh", "relu")):
    rng = np.random.default_rng(rng)
    return bridge.random_dense(rng, (4, 5, 6, 3), list(activations)), rng.normal(size=(5, 4))


def conv(rng=0, activation="tanh", pool="max"):
    rng = np.random.default_rng(rng)
    return bridge.random_conv(rng, activation, pool), rng.normal(size=(3, 6, 6, 2))


def targets_of(net, x):
    return np.random.default_rng(7).normal(size=nets.forward(net, x).outputs.shape)


def expected(net, x, **options):
    """The reference's gradients, for half squared errors."""
    y = targets_of(net, x)

    def error_at(outputs):
        return losses.mean(*losses.half_squared_error(outputs, y))[1]

    e = error_at(nets.forward(net, x).outputs)
    got, _ = reference.gradients(net, x, e, error_at=error_at, targets=y, **options)
    return got


def computed(net, x, weights=NO_FEEDBACK, rng=None, **options):
    fn = lrules.value_and_grad(bridge.apply_of(net), half_squared, lrules.dual_propagation(**options))
    y = jnp.asarray(targets_of(net, x))
    return jax.jit(fn)(bridge.parameters(net), weights, jnp.asarray(x), y, rng=rng)


def transformed(net, x, **options):
    """`(params, inputs)` gradients by way of `transform`."""
    f = lrules.transform(bridge.apply_of(net), lrules.dual_propagation(**options))
    y = jnp.asarray(targets_of(net, x))

    def objective(params, x):
        return half_squared(f(params, NO_FEEDBACK, x), y).mean()

    return jax.jit(jax.grad(objective, argnums=(0, 1)))(bridge.parameters(net), jnp.asarray(x))


VARIANTS = [(True, "once"), (True, "refreshed"), (False, "once"), (False, "refreshed"), (False, "squared_error")]
CASES = [
    (order, alpha, adjoint, output)
    for order in reference.ORDERS
    for alpha in (0.0, 0.25, 0.5, 1.0)
    for adjoint, output in VARIANTS
]


@pytest.mark.parametrize("order,alpha,adjoint,output", CASES)
def test_explicit_states(order, alpha, adjoint, output):
    index = CASES.index((order, alpha, adjoint, output))
    net, x = conv(pool=["max", "average"][index % 2]) if index % 5 == 2 else dense()
    iterations = 1 + index % 5 if order != "forward" else len(net) + index % 2
    options = {"alpha": alpha, "beta": 0.4, "adjoint": adjoint, "order": order, "iterations": iterations}
    options["output"] = output
    want = expected(net, x, **options)
    (_, outputs), grads = computed(net, x, **options)
    bridge.close(grads.params, bridge.kernels_and_biases(want))
    np.testing.assert_allclose(outputs, nets.forward(net, x).outputs, atol=1e-12)
    assert grads.report["residual"].shape == (iterations,)


@pytest.mark.slow
@pytest.mark.parametrize("case", [dense, conv])
@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("order,alpha,adjoint,output", CASES)
def test_explicit_states_in_full(order, alpha, adjoint, output, iterations, case):
    """All that `test_explicit_states` takes a sample of."""
    net, x = case()
    if order == "forward" and iterations < len(net):
        pytest.skip("refused: error would not come down")
    options = {"alpha": alpha, "beta": 0.4, "adjoint": adjoint, "order": order, "iterations": iterations}
    options["output"] = output
    _, grads = computed(net, x, **options)
    bridge.close(grads.params, bridge.kernels_and_biases(expected(net, x, **options)))


@pytest.mark.parametrize("adjoint,alpha,iterations", [(True, 0.25, 3), (False, 0.0, 1), (True, 0.5, 2)])
@pytest.mark.parametrize("case", [dense, conv])
def test_transform(case, adjoint, alpha, iterations):
    net, x = case()
    options = {"alpha": alpha, "beta": 0.4, "adjoint": adjoint, "iterations": iterations}
    want = expected(net, x, **options)
    params, inputs = transformed(net, x, **options)
    bridge.close((params, inputs), (bridge.kernels_and_biases(want), want.inputs))


def test_transform_of_a_sum():
    net, x = dense()
    y = jnp.asarray(targets_of(net, x))
    rule = lrules.dual_propagation(alpha=0.2, beta=0.4)
    means, sums = (lrules.transform(bridge.apply_of(net), rule, reduction=r) for r in ("mean", "sum"))
    params = bridge.parameters(net)
    mean = jax.grad(lambda p: half_squared(means(p, NO_FEEDBACK, jnp.asarray(x)), y).mean())(params)
    total = jax.grad(lambda p: half_squared(sums(p, NO_FEEDBACK, jnp.asarray(x)), y).sum())(params)
    bridge.close(jax.tree.map(lambda g: g / len(x), total), mean)


@pytest.mark.parametrize("order", ["forward_backward", "forward", "odd_even"])
@pytest.mark.parametrize("adjoint", [True, False])
def test_inputs_as_states(order, adjoint):
    net, x = dense()
    options = {"alpha": 0.3, "beta": 0.5, "adjoint": adjoint, "order": order, "iterations": 3, "input_nudge": 0.7}
    want = expected(net, x, **options)
    params, inputs = transformed(net, x, **options)
    bridge.close((params, inputs), (bridge.kernels_and_biases(want), want.inputs))


@pytest.mark.parametrize("order", ["forward_backward", "parallel"])
def test_numbers_by_name(order):
    net, x = dense()
    want = expected(
        net, x, alpha=[0.1, 0.3, 0.8, 0.6], beta=[0.2, 0.3, 0.6, 0.5], adjoint=False, iterations=3, order=order,
        output="squared_error", input_nudge=1.0,
    )  # fmt: skip
    alpha = {"inputs": 0.1, "tanh": 0.3, "relu": 0.8, "outputs": 0.6}
    beta = {"inputs": 0.2, "tanh": 0.3, "relu": 0.6, ".*": 0.5}
    options = {"adjoint": False, "iterations": 3, "order": order, "output": "squared_error", "input_nudge": 1.0}
    _, grads = computed(net, x, alpha=alpha, beta=beta, **options)
    bridge.close(grads.params, bridge.kernels_and_biases(want))


@pytest.mark.parametrize("input_nudge", [None, 0.7])
@pytest.mark.parametrize("order", ["forward_backward", "forward", "parallel"])
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


@pytest.mark.parametrize("pool,input_nudge", [("max", None), ("max", 0.7), ("average", 0.7)])
@pytest.mark.parametrize("damping", ["spectral", "contracting"])
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


def test_feedback_weights():
    net, x = conv()
    rng = np.random.default_rng(3)
    feedback = [None, *(rng.normal(size=layer.kernel.shape) for layer in net[1:])]
    options = {"alpha": 0.3, "beta": 0.5, "iterations": 3}
    want = expected(net, x, feedback=feedback, **options)
    fixed = lrules.Feedback(bridge.feedback_dict(feedback), {})
    _, grads = computed(net, x, fixed, feedback_rule=lrules.feedback_alignment(), **options)
    bridge.close(grads.params, bridge.kernels_and_biases(want))
    learned = lrules.Feedback({}, bridge.feedback_dict(feedback))
    _, grads = computed(net, x, learned, feedback_rule=lrules.kolen_pollack(), **options)
    bridge.close(grads.params, bridge.kernels_and_biases(want))
    bridge.close(grads.feedback, {f"{k}/kernel": want.kernels[k] for k in range(1, len(net))})


@pytest.mark.parametrize("alpha,tolerance", [(0.5, 1e-7), (0.0, 1e-3), (1.0, 1e-3)])
@pytest.mark.parametrize("order", ["forward_backward", "forward", "odd_even"])
def test_weak_feedback_is_backprop(alpha, tolerance, order):
    net, x = dense(activations=("tanh", "tanh"))
    y = targets_of(net, x)
    e = losses.mean(*losses.half_squared_error(nets.forward(net, x).outputs, y))[1]
    want = bridge.kernels_and_biases(backprop.gradients(net, x, e))
    iterations = 1 if order == "forward_backward" else len(net)
    _, grads = computed(net, x, alpha=alpha, beta=1e-4, order=order, iterations=iterations)
    bridge.close(grads.params, want, tolerance)
    if order == "forward_backward" and alpha == 0:
        far, _ = transformed(net, x, alpha=alpha, beta=1.0)
        relative = [
            np.abs(g - w).max() / np.abs(w).max() for g, w in zip(*map(jax.tree.leaves, (far, want)), strict=True)
        ]
        assert max(relative) > 1e-2


def test_squared_errors_of_another_scale():
    """Eq. 3 for c/2 |o - y|^2 per example: the minimisers of alpha beta l(s) + (s - a)^2 / 2, and of the other."""
    net, x = dense()
    y = targets_of(net, x)
    weights = jnp.asarray([0.0, 1.0, 2.0, 0.5, 1.0])
    rule = lrules.dual_propagation(0.6, beta=0.5, adjoint=False, output="squared_error")

    def loss(outputs, targets):  # optax has the same without the factor
        return 3 * weights[:, None] * optax.squared_error(outputs, targets)

    fn = lrules.value_and_grad(bridge.apply_of(net), loss, rule)
    _, grads = jax.jit(fn)(bridge.parameters(net), NO_FEEDBACK, jnp.asarray(x), jnp.asarray(y))
    h = 2 * np.asarray(weights)[:, None]  # 3 of 3 outputs per example
    outputs = nets.forward(net, x).outputs
    states = [(outputs + d * h * y) / (1 + d * h) for d in (0.6 * 0.5, -0.4 * 0.5)]
    e = -(states[0] - states[1]) / 0.5 / len(x)
    want, _ = reference.gradients(net, x, e, alpha=0.6, beta=0.5, adjoint=False)
    bridge.close(grads.params, bridge.kernels_and_biases(want))


# ------------------------------------------------------------------------------------------------- any graph


def stacked(length=3, width=4):
    """A loop of equal layers, and the chain that it stands for."""
    rng = np.random.default_rng(0)
    kernels = [rng.normal(size=(width, width)) for _ in range(length)]
    net = nets.dense_net([*kernels, rng.normal(size=(width, 2))], [None] * (length + 1), ["tanh"] * length)
    params = {"w": jnp.asarray(np.stack(kernels)), "out": jnp.asarray(net[-1].kernel)}

    def apply(params, x):
        @jax.checkpoint
        def body(h, w):
            return jnp.tanh(h @ w), None

        return jax.lax.scan(body, x, params["w"])[0] @ params["out"]

    return net, rng.normal(size=(5, width)), apply, params


@pytest.mark.parametrize("order", reference.ORDERS)
def test_loops(order):
    net, x, apply, params = stacked()
    options = {"alpha": 0.3, "beta": 0.5, "iterations": 4, "order": order}
    want = expected(net, x, **options)
    fn = lrules.value_and_grad(apply, half_squared, lrules.dual_propagation(**options))
    _, grads = jax.jit(fn)(params, NO_FEEDBACK, jnp.asarray(x), jnp.asarray(targets_of(net, x)))
    bridge.close(grads.params, {"w": np.stack(want.kernels[:-1]), "out": want.kernels[-1]})
    f = lrules.transform(apply, lrules.dual_propagation(**options))
    np.testing.assert_array_equal(
        jax.jit(f)(params, NO_FEEDBACK, jnp.asarray(x)), jax.jit(apply)(params, jnp.asarray(x))
    )


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


def test_a_loop_counts_as_many_layers_as_it_has_iterations():
    net, x, apply, params = stacked(6)
    rule = lrules.dual_propagation(order="forward", iterations=6)
    with pytest.raises(ValueError, match="at least iterations=7"):
        lrules.transform(apply, rule)(params, NO_FEEDBACK, jnp.asarray(x))


def residual_net(params, x):
    h = jnp.tanh(x @ params["a"])
    h = h + jnp.tanh(jax.nn.relu(h @ params["b"]) @ params["c"])
    centred = h - h.mean(-1, keepdims=True)
    h = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-3)
    return jax.nn.gelu(h @ params["d"]) @ params["e"] + h @ params["f"]


def residual_case():
    shapes = {"a": (3, 4), "b": (4, 5), "c": (5, 4), "d": (4, 6), "e": (6, 2), "f": (4, 2)}
    rng = np.random.default_rng(5)
    params = {n: jnp.asarray(0.5 * rng.normal(size=s)) for n, s in shapes.items()}
    return params, jnp.asarray(rng.normal(size=(7, 3))), jnp.asarray(rng.normal(size=(7, 2)))


ALL_ORDERS = (*reference.ORDERS, "random")


BEHIND = {
    "stop_gradient": lambda p, h: jax.lax.stop_gradient(h) @ p["b"],
    "a branch": lambda p, h: h @ p["b"] + jax.lax.stop_gradient(jax.nn.silu(h @ p["b"])),
    "an index": lambda p, h: (h @ p["b"]) * jax.nn.one_hot(jnp.argmax(jnp.sin(h @ p["b"]), -1), 5),
    "its own factor": lambda p, h: (lambda a: a * jax.lax.stop_gradient(jax.nn.sigmoid(a)))(h @ p["b"]),
    "a surrogate": lambda p, h: (h + jax.lax.stop_gradient(jnp.round(h) - h)) @ p["b"],
}


@pytest.mark.parametrize("order", ALL_ORDERS)
@pytest.mark.parametrize("name", BEHIND)
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


@pytest.mark.parametrize("order", ALL_ORDERS)
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
    "name", ["nnx_lenet5", "nnx_transformer", "linen_lstm", "weight_normalisation", "vmapped_batch_last", "fori_loop"]
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


def vgg16(params, x):
    """13 convolutions of 3x3, max-pooling after the 2nd, 4th, 7th, 10th and 13th, three dense layers (Table 3)."""
    for k in range(13):
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.nn.relu(jax.lax.conv_general_dilated(x, params[f"conv{k}"], (1, 1), "SAME", dimension_numbers=dims))
        if k in (1, 3, 6, 9, 12):
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = x.reshape(x.shape[0], -1)
    for k in range(2):
        x = jax.nn.relu(x @ params[f"fc{k}"])
    return x @ params["out"]


def test_vgg16_takes_sixteen_passes():
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    shapes = {f"conv{k}": (3, 3, *io) for k, io in enumerate(itertools.pairwise(widths))}
    shapes |= {"fc0": (512, 512), "fc1": (512, 512), "out": (512, 10)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    x, y = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 32, 32, 3), (2, 10)))

    def step(params, x, y, iterations):
        rule = lrules.dual_propagation(0.0, beta=0.01, order="forward", iterations=iterations)
        return lrules.value_and_grad(vgg16, optax.softmax_cross_entropy, rule)(params, NO_FEEDBACK, x, y)[1]

    assert jax.eval_shape(functools.partial(step, iterations=16), params, x, y).params == params
    with pytest.raises(ValueError, match="has 16"):
        jax.eval_shape(functools.partial(step, iterations=15), params, x, y)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("adjoint,output", VARIANTS)
def test_random_order(adjoint, output, alpha):
    """State by state, in the order of the key."""
    index = VARIANTS.index((adjoint, output))
    net, x = conv() if (index + int(4 * alpha)) % 3 == 0 else dense()
    iterations, key = 1 + (index + int(4 * alpha)) % 5, jax.random.key(3)
    keys = jax.random.split(jax.random.split(key)[1], iterations)
    states = [[int(i) + 1 for i in np.asarray(jax.random.permutation(k, len(net)))] for k in keys]
    options = {"alpha": alpha, "beta": 0.4, "adjoint": adjoint, "iterations": iterations, "output": output}
    _, grads = computed(net, x, rng=key, order="random", **options)
    bridge.close(grads.params, bridge.kernels_and_biases(expected(net, x, order=states, **options)))


def test_random_order_follows_its_key():
    net, x = dense()
    others = [
        computed(net, x, rng=jax.random.key(i), alpha=0.3, beta=0.5, iterations=1, order="random")[1] for i in range(3)
    ]
    assert len({float(other.params["0"]["kernel"].sum()) for other in others}) > 1


def test_a_net_without_activations_gets_its_gradient():
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=s)) for s in ((3, 4), (4, 2))]
    x, y = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=(5, 2)))
    net = lambda p, x: x @ p[0] @ p[1]  # noqa: E731
    for iterations in (1, 3):
        f = lrules.transform(net, lrules.dual_propagation(iterations=iterations))
        got = jax.grad(lambda p, f=f: half_squared(f(p, NO_FEEDBACK, x), y).mean())(params)
        bridge.close(got, jax.grad(lambda p: half_squared(net(p, x), y).mean())(params))


def test_under_vmap_and_eager():
    params, x, y = residual_case()
    fn = lrules.value_and_grad(residual_net, half_squared, lrules.dual_propagation(0.3, beta=0.5, iterations=3))
    seeds = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    _, both = jax.jit(jax.vmap(lambda p: fn(p, NO_FEEDBACK, x, y)))(seeds)
    for i, scale in enumerate((1, 2)):
        _, one = fn(jax.tree.map(lambda p, scale=scale: scale * p, params), NO_FEEDBACK, x, y)
        bridge.close(jax.tree.map(lambda g, i=i: g[i], both.params), one.params)


def test_aux_integers_and_half_precision():
    def apply(params, inputs):
        x, scale = inputs
        h = jax.nn.relu(x @ params["a"]) * scale.astype(x.dtype)
        out = h @ params["b"]
        return (out, jnp.argmax(out, -1)), {"h": h}

    net = lrules.Network(apply, has_aux=True, batch_axes=(0, None))
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=s), jnp.bfloat16) for n, s in {"a": (3, 4), "b": (4, 2)}.items()}
    inputs = jnp.asarray(rng.normal(size=(5, 3)), jnp.bfloat16), jnp.asarray(1)
    y = jnp.zeros((5, 2), jnp.bfloat16)
    for output in ("once", "refreshed"):
        rule = lrules.dual_propagation(output=output, iterations=2)
        fn = lrules.value_and_grad(net, lambda o, t: half_squared(o[0], t), rule)
        (_, outputs, aux), grads = jax.jit(fn)(params, NO_FEEDBACK, inputs, y)
        assert aux["h"].shape == (5, 4) and outputs[1].dtype == jnp.int64
        assert all(g.dtype == jnp.bfloat16 and jnp.any(g) for g in jax.tree.leaves(grads.params))
    f = lrules.transform(net, rule._replace() if output == "once" else lrules.dual_propagation())
    grads = jax.grad(lambda p: half_squared(f(p, NO_FEEDBACK, inputs)[0][0], y).mean())(params)
    assert all(jnp.any(g) for g in jax.tree.leaves(grads))


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


# ------------------------------------------------------------------------------------- convergence and its report


def deep_relu():
    """Table 2 in small: five layers of ReLU, beta 1/2."""
    rng = np.random.default_rng(0)
    net = bridge.random_dense(rng, (20, 40, 40, 40, 40, 5), ["relu"] * 4, scale=1.4)
    return net, rng.normal(size=(8, 20))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_divergence_is_seen(alpha):
    net, x = deep_relu()
    options = {"alpha": alpha, "beta": 0.5, "iterations": 30}
    _, adjoint = computed(net, x, **options)
    _, original = computed(net, x, adjoint=False, output="squared_error", **options | {"alpha": max(alpha, 0.01)})
    assert adjoint.report["residual"][-1] < 1e-3
    assert not original.report["residual"][-1] < 0.1


def test_stops_early():
    net, x = dense()
    options = {"alpha": 0.3, "beta": 0.5}
    for order in ALL_ORDERS:
        rng = jax.random.key(0) if order == "random" else None
        _, full = computed(net, x, rng=rng, order=order, iterations=60, **options)
        _, early = computed(net, x, rng=rng, order=order, iterations=60, tolerance=1e-8, **options)
        count = int(early.report["iterations"])
        assert len(net) <= count < 30 and int(full.report["iterations"]) == 60
        assert early.report["residual"][count - 1] <= 1e-8 and np.isnan(early.report["residual"][count])
        bridge.close(early.params, full.params, 1e-6)
    params, _ = transformed(net, x, iterations=60, tolerance=1e-8, **options)
    bridge.close(params, full.params, 1e-6)


# ---------------------------------------------------------------------------------------------------- refusals


def test_arguments_out_of_range():
    for options, message in [
        ({"alpha": 1.2}, r"^alpha must be a number in \[0, 1\], got 1.2"),
        ({"alpha": {"relu": -0.1}}, r"^alpha\['relu'\] must be a number in \[0, 1\], got -0.1"),
        ({"beta": 0.0}, "^beta must be a finite number > 0, got 0.0"),
        ({"beta": {".*": 0.0}}, r"^beta\['\.\*'\] must be a finite number > 0, got 0.0"),
        ({"iterations": 0}, "iterations must be an integer >= 1, got 0"),
        ({"iterations": 1.5}, "iterations must be an integer >= 1, got 1.5"),
        ({"order": "backward"}, "order must be one of 'forward_backward', 'forward', .* got 'backward'"),
        ({"output": "twice"}, "output must be one of 'once', 'refreshed', 'squared_error', got 'twice'"),
        ({"damping": "spectral"}, "adjoint=False"),
        ({"damping": "strong", "adjoint": False}, '"spectral", "contracting", .* got \'strong\''),
        ({"damping": -1.0, "adjoint": False}, "a finite number >= 0 or None, got -1.0"),
        ({"output": "squared_error"}, "adjoint=False"),
        ({"feedback_rule": "fa"}, "feedback_rule must be a sequential rule, .* got a str$"),
        ({"input_nudge": 0.0}, "input_nudge must be a finite number > 0, got 0.0: leave it out"),
        ({"tolerance": -1.0}, "tolerance must be a number >= 0 or None, got -1.0"),
        ({"alpha": "half"}, "in \\[0, 1\\], got 'half'"),
        ({"alpha": {"(": 0.5}}, "is not a regular expression"),
        ({"beta": None}, "beta must be a finite number > 0, got None"),
        ({"beta": float("inf")}, "got inf"),
        ({"adjoint": "no"}, "must be True or False"),
        ({"input_nudge": "a"}, "leave it out"),
        ({"tolerance": "a"}, "tolerance must be a number"),
    ]:
        with pytest.raises(ValueError, match=message):
            lrules.dual_propagation(**options)


def refused(error, message, apply=None, loss=half_squared, net=None, modify=lambda rule: rule, **options):
    net, x = net or dense()
    apply = apply or bridge.apply_of(net)
    with pytest.raises(error, match=message):
        fn = lrules.value_and_grad(apply, loss, modify(lrules.dual_propagation(**options)))
        fn(bridge.parameters(net), NO_FEEDBACK, jnp.asarray(x), jnp.asarray(targets_of(net, x)))


FA = lrules.feedback_alignment()


@pytest.mark.parametrize(
    "rule,message",
    [
        (lrules.sign_error(FA), "put the modifier around dual_propagation"),
        (lrules.quantize_error(FA, 2, at="output"), "put the modifier around dual_propagation"),
        (lrules.without_derivatives(FA), "put the modifier around dual_propagation"),
        (lrules.node_perturbation(0.1), "got a rule that needs the loss or the targets"),
        (lrules.random_target_projection(), "got a rule that needs the loss or the targets"),
        (lrules.feedback_alignment, "got a function: call it first"),
        (lrules.Rule(FA.init, FA.transform), "does not say it: it was made of functions by hand"),
        (FA._replace(init=lambda key, net, params, inputs: NO_FEEDBACK), "one of its functions was replaced"),
    ],
)
def test_rules_that_cannot_bring_down_the_difference(rule, message):
    with pytest.raises(ValueError, match=f"feedback_rule.*{message}"):
        lrules.dual_propagation(feedback_rule=rule)


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: 0.5 * jnp.square(o.sum(-1) - t.sum(-1)),
        lambda o, t: jnp.einsum("bi,ij,bj->b", o - t, jnp.eye(3) + 0.1, o - t),
        lambda o, t: optax.huber_loss(o, t),
        lambda o, t: jnp.abs(o - t),
        lambda o, t: jnp.maximum(0, 1 - o * t).sum(-1),
        lambda o, t: jnp.square(o - o[:, ::-1]),
        lambda o, t: jnp.square(o[:3] - o[:3].T).sum() + 0 * t[:, 0],
        lambda o, t: jnp.square(o + o.T.reshape(o.shape)).sum() + 0 * t[:, 0],
    ],
)
def test_losses_that_have_no_closed_form(loss):
    net, x = dense()
    rule = lrules.dual_propagation(alpha=0.3, beta=0.2, adjoint=False, output="squared_error")
    fn = lrules.value_and_grad(bridge.apply_of(net), loss, rule)
    with pytest.raises(ValueError, match="quadratic in each output by itself"):
        fn(bridge.parameters(net), NO_FEEDBACK, jnp.asarray(x), jnp.asarray(targets_of(net, x)))


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: 0.5 * jnp.square(o.T - t.T).sum(0),
        jax.vmap(lambda o, t: 0.5 * jnp.sum((o.reshape(3, 1) - t.reshape(3, 1)) ** 2)),
        lambda o, t: 0.5 * ((o.T.reshape(-1) - t.T.reshape(-1)) ** 2).reshape(3, 5).sum(0),
        lambda o, t: jnp.where(t < 9, 0.5 * (o - t) ** 2, 0).sum(-1),
    ],
)
def test_squared_errors_in_other_words(loss):
    net, x = dense()
    options = {"alpha": 0.25, "beta": 0.3, "adjoint": False, "output": "squared_error"}
    want = bridge.kernels_and_biases(expected(net, x, **options))

    def grads(apply, loss):
        fn = lrules.value_and_grad(apply, loss, lrules.dual_propagation(**options))
        return fn(bridge.parameters(net), NO_FEEDBACK, jnp.asarray(x), jnp.asarray(targets_of(net, x)))[1].params

    apply = bridge.apply_of(net)
    bridge.close(grads(apply, loss), want)
    bridge.close(grads(lambda p, x: (apply(p, x), jnp.argmax(apply(p, x), -1)), lambda o, t: loss(o[0], t)), want)


def test_losses_that_are_too_curved_show_it():
    """(o - y)^2 has curvature 2: at beta 1/2 and alpha 0 the minimiser is at infinity."""
    net, x = dense()
    for beta, finite in ((0.4, True), (0.5, False)):
        rule = lrules.dual_propagation(alpha=0.0, beta=beta, adjoint=False, output="squared_error")
        fn = lrules.value_and_grad(bridge.apply_of(net), lambda o, t: 2 * half_squared(o, t), rule)
        y = jnp.asarray(targets_of(net, x))
        _, grads = jax.jit(fn)(bridge.parameters(net), NO_FEEDBACK, jnp.asarray(x), y)
        assert all(bool(jnp.isfinite(g).all()) == finite for g in jax.tree.leaves(grads.params))


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


def test_refusals():
    refused(ValueError, "has 3", order="forward", iterations=2)
    refused(ValueError, "has a minimiser only if", alpha=0.0, beta=1.0, adjoint=False, output="squared_error")
    exact = {"adjoint": False, "output": "squared_error"}
    refused(ValueError, "write the loss as a sum of jnp.square", loss=optax.softmax_cross_entropy, **exact)
    refused(ValueError, "alpha has no number for 'relu'", alpha={"tanh": 0.5})
    refused(
        ValueError,
        "'elu\\$' matches no state",
        beta={"elu$": 0.5, "elu": 0.1, ".*": 0.1},
        net=dense(0, ("tanh", "tanh")),
    )
    refused(ValueError, "feedback_rule must be a sequential rule", feedback_rule=lrules.direct_feedback_alignment())
    refused(NotImplementedError, "derivatives", modify=lrules.without_derivatives)
    damped = {"alpha": 1.0, "adjoint": False, "damping": "spectral"}
    refused(NotImplementedError, "'tanh' cannot be damped", **damped)
    refused(NotImplementedError, "cannot be damped", net=dense(0, ("relu", "leaky_relu")), **damped)
    net, x = dense()
    with pytest.raises(ValueError, match="value_and_grad"):
        lrules.transform(bridge.apply_of(net), lrules.dual_propagation(output="refreshed"))
    params, x, y = residual_case()
    with pytest.raises(NotImplementedError, match="chains"):
        fn = lrules.value_and_grad(lambda p, x: residual_net(p, x), half_squared, lrules.dual_propagation(**damped))
        fn(params, NO_FEEDBACK, x, y)


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


def gradient_of_sum(net, rule, params, x):
    f = lrules.transform(net, rule)
    return jax.grad(lambda p: f(p, NO_FEEDBACK, x).sum())(params)


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


def test_describe_lists_activations():
    params, x, _ = residual_case()
    text = lrules.describe(residual_net, lrules.dual_propagation(), params, x)
    assert text.activations == ["tanh", "relu", "tanh#2", "gelu"]


# --------------------------------------------------------------------------------------------------- modifiers


def test_error_modifiers_compose():
    """At weak feedback a modified dual propagation is the modified backprop."""
    net, x = conv(activation="tanh")
    y, params = jnp.asarray(targets_of(net, x)), bridge.parameters(net)

    def grads(rule, **rng):
        fn = lrules.value_and_grad(bridge.apply_of(net), half_squared, rule)
        return jax.jit(fn)(params, NO_FEEDBACK, jnp.asarray(x), y, **rng)[1].params

    weak = lrules.dual_propagation(beta=1e-5)
    for modify in (
        lambda r: lrules.modify_error(r, lambda s, name, rng: s.clip(-0.05, 0.05)),
        lrules.magnitude_error,
        lrules.sign_error,
        lambda r: lrules.quantize_error(r, 3),
        lambda r: lrules.quantize_error(r, 3, at="output"),
        lambda r: lrules.sign_error(lrules.quantize_error(r, 3)),
    ):
        bridge.close(grads(modify(weak)), grads(modify(lrules.backprop())), 1e-6)
    quantised = [lrules.quantize_update(r, 20, scale=4.0) for r in (weak, lrules.backprop())]
    for a, b in itertools.pairwise([grads(r) for r in quantised]):
        assert all(
            np.abs(g - h).max() < 1e-2 * np.abs(h).max() for g, h in zip(*map(jax.tree.leaves, (a, b)), strict=True)
        )
    key = {"rng": jax.random.key(1)}
    dropped = [grads(lrules.drop_error(r, 0.5), **key) for r in (weak, lrules.backprop())]
    bridge.close(*dropped, 1e-6)


# --------------------------------------------------------------------------------------------------- many devices

SHARDED = {
    "one sweep": {},
    "sweeps": {"alpha": 0.2, "iterations": 3},
    "until settled": {"alpha": 0.2, "iterations": 9, "tolerance": 1e-9},
    "forward": {"alpha": 0.2, "iterations": 5, "order": "forward"},
    "odd and even": {"alpha": 0.2, "iterations": 3, "order": "odd_even"},
    "inputs too": {"alpha": 0.2, "iterations": 2, "input_nudge": 1.0},
}


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(name, check_vma):
    """A mean over all devices' examples, each device with its share of it: gradients sum to that of the batch."""
    params, x, y = residual_case()
    x, y = jnp.concatenate([x, x[:1]]), jnp.concatenate([y, y[:1]])
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def gradient(f, params, x, y):
        return jax.grad(lambda p: half_squared(f(p, NO_FEEDBACK, x), y).sum() / 8)(params)

    def shared(params, x, y):
        f = lrules.transform(residual_net, lrules.dual_propagation(beta=0.2, **SHARDED[name], axis_name="data"))
        grads = gradient(f, params, x, y)
        return grads if check_vma else jax.lax.psum(grads, "data")

    specs = {"in_specs": (spec(), spec("data"), spec("data")), "out_specs": spec(), "check_vma": check_vma}
    got = jax.jit(jax.shard_map(shared, mesh=mesh, **specs))(params, x, y)
    f = lrules.transform(residual_net, lrules.dual_propagation(beta=0.2, **SHARDED[name]))
    bridge.close(got, jax.jit(lambda *args: gradient(f, *args))(params, x, y), 1e-6)

    def means(params, x, y):
        rule = lrules.dual_propagation(beta=0.2, **SHARDED[name])
        _, grads = lrules.value_and_grad(residual_net, half_squared, rule)(params, NO_FEEDBACK, x, y)
        return jax.tree.map(lambda g: g / 4, grads.params if check_vma else jax.lax.psum(grads.params, "data"))

    bridge.close(jax.jit(jax.shard_map(means, mesh=mesh, **specs))(params, x, y), got, 1e-6)
