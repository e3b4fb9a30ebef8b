"""Equilibrium propagation, against the explicit states of the reference and the gradient at the free equilibrium."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.datasets

import lrules
from lrules.testing import check_rule, half_squared_error
from tests import bridge
from tests.reference import equilibrium_propagation as reference
from tests.reference import losses, nets
from tests.rules.common import NOTHING

pytestmark = pytest.mark.usefixtures("double_precision")
EP = lrules.equilibrium_propagation
OUTPUTS = ("readout", "state")


def pooled_first(net):
    """A reference net as a JAX function that pools before the activation, so that the states are the pooled ones."""

    def apply(params, x):
        for k, layer in enumerate(net):
            p = params[str(k)]
            if layer.kernel.ndim == 2:
                z = x.reshape(x.shape[0], -1) @ p["kernel"]
            else:
                numbers = ("NHWC", "HWIO", "NHWC")
                z = jax.lax.conv_general_dilated(x, p["kernel"], layer.stride, layer.padding, dimension_numbers=numbers)
            z = z + p["bias"].reshape((1,) * (z.ndim - 1) + (-1,))
            x = bridge.ACTIVATIONS[layer.activation](bridge._pool(z, layer) if layer.pool else z)
        return x

    return apply


def start(net, x):
    """The states of a forward pass that pools before the activation, and its outputs."""
    found = [np.asarray(x)]
    for layer in net:
        z = nets.pre_activation(layer, nets.as_read(layer, found[-1]))
        found.append(nets.activate(layer.activation, nets.pool(layer, z)))
    return found


NETS = {
    "dense": lambda rng: (bridge.random_dense(rng, (4, 5, 6, 3), ["tanh", "sigmoid"]), rng.normal(size=(5, 4))),
    "not monotone": lambda rng: (bridge.random_dense(rng, (4, 5, 3), ["gelu"]), rng.normal(size=(5, 4))),
    "clipped": lambda rng: (bridge.random_dense(rng, (4, 5, 3), ["hard_tanh"]), rng.normal(size=(5, 4))),
    "conv_max": lambda rng: (bridge.random_conv(rng, "tanh", "max"), rng.normal(size=(2, 6, 6, 2))),
    "conv_average": lambda rng: (bridge.random_conv(rng, "relu", "average"), rng.normal(size=(2, 6, 6, 2))),
}


def case(name):
    net, x = NETS[name](np.random.default_rng(0))
    y = np.random.default_rng(7).normal(size=(len(x), 3))
    return net, x, y


def computed(apply, params, x, y, **options):
    step = jax.jit(lrules.value_and_grad(apply, half_squared_error, EP(**options)))
    return step(params, NOTHING, jnp.asarray(x), jnp.asarray(y))


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_reference(name, centred, output):
    net, x, y = case(name)
    states = start(net, x)
    options = {"beta": 0.3, "free_steps": 5, "nudged_steps": 4, "centred": centred, "output": output, "step_size": 0.7}
    wanted, phases = reference.gradients(
        net, x, lambda o: losses.mean(*losses.half_squared_error(o, y))[1],
        start=states if output == "state" else states[:-1], **options,
    )  # fmt: skip
    (value, outputs), grads = computed(pooled_first(net), bridge.parameters(net), x, y, **options)
    bridge.close(grads.params, bridge.kernels_and_biases(wanted))
    bridge.close(outputs, states[-1])
    bridge.close(value, 0.5 * ((states[-1] - y) ** 2).sum() / len(x))
    bridge.close(grads.report["free_outputs"], phases.outputs)
    bridge.close(grads.report["free_value"], 0.5 * ((phases.outputs - y) ** 2).sum() / len(x))


def settled(p, x):
    """The outputs of a chain at its free equilibrium, by iteration; the gradient comes from JAX through all of it."""
    s1, s2 = jnp.tanh(x @ p["a"]), jax.nn.sigmoid(jnp.tanh(x @ p["a"]) @ p["b"])
    for _ in range(100):
        s1, s2 = jnp.tanh(x @ p["a"] + s2 @ p["b"].T), jax.nn.sigmoid(s1 @ p["b"])
    return s2 @ p["c"]


def chain(p, x):
    return jax.nn.sigmoid(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


def settled_with_skips(p, x):
    """The same for `skips`: the energy is Phi = s1 (x A) + s2 (s1 B) + s3 ((s1 + s2) C)."""
    s1 = s2 = s3 = jnp.zeros((x.shape[0], 4))
    for _ in range(200):
        s1, s2, s3 = (
            jnp.tanh(x @ p["a"] + s2 @ p["b"].T + s3 @ p["c"].T),
            jnp.tanh(s1 @ p["b"] + s3 @ p["c"].T),
            jnp.tanh((s1 + s2) @ p["c"]),
        )
    return s3 @ p["d"] + s1 @ p["e"]


def skips(p, x):
    s1 = jnp.tanh(x @ p["a"])
    s2 = s1 + jnp.tanh(s1 @ p["b"])
    return jnp.tanh(s2 @ p["c"]) @ p["d"] + s1 @ p["e"]


def weights(**shapes):
    rng = np.random.default_rng(0)
    return {name: 0.6 * rng.normal(size=s) / s[0] ** 0.5 for name, s in shapes.items()}  # in float64, also on import


EQUILIBRIA = {
    "chain": (chain, settled, weights(a=(3, 4), b=(4, 5), c=(5, 2))),
    "skips": (skips, settled_with_skips, weights(a=(3, 4), b=(4, 4), c=(4, 4), d=(4, 2), e=(4, 2))),
}


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("name", EQUILIBRIA)
def test_a_small_beta_is_the_gradient_at_the_free_equilibrium(name, centred):
    """The error is O(beta^2) with two nudges, and O(beta) with one (Theorem 1). It is not that of the forward pass."""
    net, equilibrium, params = EQUILIBRIA[name]
    params = jax.tree.map(jnp.asarray, params)
    rng = np.random.default_rng(1)
    x, y = jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(rng.normal(size=(6, 2)))
    value, true = jax.value_and_grad(lambda p: half_squared_error(equilibrium(p, x), y).mean())(params)
    forward = jax.grad(lambda p: half_squared_error(net(p, x), y).mean())(params)
    off = []
    for beta in (1e-2, 1e-3):
        _, grads = computed(net, params, x, y, beta=beta, centred=centred, free_steps=200, nudged_steps=200)
        off.append(max(float(jnp.abs(grads.params[n] - g).max() / jnp.abs(g).max()) for n, g in true.items()))
    assert off[0] < 0.1 and 0.8 < off[0] / off[1] / (100 if centred else 10) < 1.2
    assert off[1] < 1e-4 or not centred
    assert all(float(jnp.abs(forward[n] - g).max() / jnp.abs(g).max()) > 0.01 for n, g in true.items())
    bridge.close(grads.report["free_value"], value)
    assert grads.report["residual"][-1] < 1e-10


@pytest.mark.parametrize("output", OUTPUTS)
def test_outputs_of_an_activation_are_states(output):
    """The network of the paper: the nudge acts on the last state, and the option has no effect."""
    params = jax.tree.map(jnp.asarray, weights(a=(3, 4), b=(4, 2)))
    rng = np.random.default_rng(1)
    x, y = jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(rng.normal(size=(6, 2)))

    def equilibrium(p):
        s1, s2 = jnp.zeros((6, 4)), jnp.zeros((6, 2))
        for _ in range(100):
            s1, s2 = jnp.tanh(x @ p["a"] + s2 @ p["b"].T), jnp.tanh(s1 @ p["b"])
        return half_squared_error(s2, y).mean()

    true = jax.grad(equilibrium)(params)
    net = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"])  # noqa: E731
    _, grads = computed(net, params, x, y, beta=1e-4, output=output, free_steps=100, nudged_steps=100)
    bridge.close(grads.params, true, 1e-6)


@pytest.mark.parametrize("output", OUTPUTS)
def test_scanned_layers(output):
    """A loop over layers is the chain that it stands for."""
    params = jax.tree.map(jnp.asarray, weights(w=(3, 4, 4), out=(4, 2)))
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(6, 2))

    def looped(p, x):
        body = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
        return jax.lax.scan(body, x, p["w"])[0] @ p["out"]

    def written(p, x):
        for k in range(3):
            x = jnp.tanh(x @ p["w"][k])
        return x @ p["out"]

    found = [computed(f, params, x, y, output=output)[1] for f in (looped, written)]
    bridge.close(*(grads.params for grads in found))
    bridge.close(*(grads.report for grads in found))


@pytest.mark.parametrize("options, message", [
    ({"beta": 0}, "beta must be a finite number > 0"),
    ({"centred": 1}, "centred"),
    ({"free_steps": 0}, "free_steps must be an integer >= 1"),
    ({"nudged_steps": 1.5}, "nudged_steps must be an integer >= 1"),
    ({"step_size": 1.5}, r"step_size must be a number in \(0, 1\]"),
    ({"output": "linear"}, 'output must be "readout" or "state"'),
])  # fmt: skip
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        EP(**options)


def refused(net, params, x, **options):
    with pytest.raises((NotImplementedError, ValueError)) as error:
        EP(**options).init(jax.random.key(0), net, params, jnp.asarray(x))
    return str(error.value)


def test_refusals():
    params, x = jax.tree.map(jnp.asarray, weights(a=(3, 4), b=(4, 4), c=(4, 2))), np.ones((5, 3))
    tanh = jnp.tanh
    assert "takes 2 steps" in refused(lambda p, x: tanh(tanh(x @ p["a"]) @ p["b"]) @ p["c"], params, x, nudged_steps=1)
    deep = refused(chain, params, x, nudged_steps=2, output="state")
    assert "nudged_steps=3" in deep

    def between(p, x):
        return tanh(x @ p["a"] @ p["b"]) @ p["c"]

    assert "'b' reads what the layer 'a' makes, with no activation between" in refused(between, params, x)
    last = refused(lambda p, x: tanh(x @ p["a"]) @ p["b"] @ p["c"], params, x)
    assert "'c' reads what the layer 'b' makes" in last

    def branch(p, x):
        return jax.lax.cond(x[0, 0] > 0, lambda h: tanh(h @ p["b"]), lambda h: h @ p["b"], tanh(x @ p["a"])) @ p["c"]

    assert "lies inside a cond" in refused(branch, params, x)
    complex_params = jax.tree.map(lambda w: w.astype(complex), params)
    assert "is complex" in refused(lambda p, x: (tanh(x @ p["a"]) @ p["c"]).real, complex_params, x + 0j)
    with pytest.raises(ValueError, match="nudges the states with the loss"):
        lrules.transform(chain, EP())
    step = lrules.value_and_grad(chain, half_squared_error, lrules.sign_error(EP()))
    with pytest.raises(NotImplementedError, match="modifiers cannot act on it"):
        step(params, NOTHING, jnp.asarray(x), jnp.ones((5, 2)))


def test_check_rule():
    with jax.enable_x64(False):
        params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), weights(a=(3, 4), b=(4, 5), c=(5, 2)))
        for options in ({}, {"centred": False, "beta": 0.2}, {"output": "state"}):
            check_rule(EP(**options), chain, params, jax.random.normal(jax.random.key(1), (6, 3)))


def train_on_digits(rule, activation=jnp.tanh, gain=1.0, seeds=3):
    """The test accuracies with the free outputs and with the forward pass, by seed, after 10 epochs with Adam."""
    digits = sklearn.datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, labels = jnp.asarray(digits.data[order] / 16, jnp.float32), jnp.asarray(digits.target[order])

    def net(p, x):
        h = activation(activation(x @ p["a"] + p["ba"][None]) @ p["b"] + p["bb"][None])
        return h @ p["c"] + p["bc"][None]

    def loss(outputs, labels):
        return -jnp.take_along_axis(jax.nn.log_softmax(outputs), labels[:, None], axis=1)[:, 0]

    step, optimizer = lrules.value_and_grad(net, loss, rule), optax.adam(0.003)

    def one(key):
        keys, sizes = jax.random.split(key, 5), (64, 64, 64, 10)
        params = {
            name: gain * jax.random.normal(keys[i], sizes[i : i + 2]) / sizes[i] ** 0.5 for i, name in enumerate("abc")
        }
        params |= {f"b{name}": jnp.zeros(sizes[i + 1]) for i, name in enumerate("abc")}

        def update(carry, rows):
            params, state = carry
            updates, state = optimizer.update(step(params, NOTHING, x[rows], labels[rows])[1].params, state)
            return (optax.apply_updates(params, updates), state), None

        def epoch(carry, key):
            return jax.lax.scan(update, carry, jax.random.permutation(key, 1437)[:1392].reshape(29, 48))

        carry = params, optimizer.init(params)
        (params, _), _ = jax.lax.scan(epoch, carry, jax.random.split(keys[4], 10))
        free = step(params, NOTHING, x[1437:], labels[1437:])[1].report["free_outputs"]
        return [(y.argmax(-1) == labels[1437:]).mean() for y in (free, net(params, x[1437:]))]

    with jax.enable_x64(False):
        return [np.asarray(found) for found in jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), seeds))]


@pytest.mark.slow
@pytest.mark.foreign  # optax
def test_the_free_equilibrium_learns_the_digits():
    """Measured: 96.3 +- 0.9% with the free outputs, 93.1 +- 1.4% with the forward pass; one nudge 67.9 +- 5.4%."""
    free, forward = train_on_digits(EP())
    assert free.mean() > 0.94 and forward.mean() < free.mean()
    assert train_on_digits(EP(centred=False))[0].mean() < 0.85
