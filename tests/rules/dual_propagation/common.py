"""What the tests of dual propagation share: nets, and the gradients of the library and of the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from tests import bridge
from tests.reference import dual_propagation as reference
from tests.reference import losses, nets

NO_FEEDBACK = lrules.Feedback({}, {})


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


def refused(error, message, apply=None, loss=half_squared, net=None, modify=lambda rule: rule, **options):
    net, x = net or dense()
    apply = apply or bridge.apply_of(net)
    with pytest.raises(error, match=message):
        fn = lrules.value_and_grad(apply, loss, modify(lrules.dual_propagation(**options)))
        fn(bridge.parameters(net), NO_FEEDBACK, jnp.asarray(x), jnp.asarray(targets_of(net, x)))


def gradient_of_sum(net, rule, params, x):
    f = lrules.transform(net, rule)
    return jax.grad(lambda p: f(p, NO_FEEDBACK, x).sum())(params)
