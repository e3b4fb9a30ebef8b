"""Which activations dual propagation serves: those whose derivative is that of the function, and a complex number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from tests import bridge
from tests.rules.dual_propagation.common import NO_FEEDBACK, half_squared
from tests.sampling import mostly_slow, pairs

EMPTY = lrules.Feedback({}, {})


def own(body, slope):
    """A function that declares its derivative."""
    f = jax.custom_jvp(body)
    f.defjvp(lambda primals, tangents: (f(*primals), slope(*primals) * tangents[0]))
    return f


def backwards(body, slope):
    """The same by a custom_vjp."""
    f = jax.custom_vjp(body)
    f.defvjp(lambda x: (f(x), x), lambda x, error: (error * slope(x),))
    return f


def step(x):
    return (x > 0).astype(x.dtype)


def window(x):
    return (abs(x) < 0.5).astype(x.dtype)


def hidden_inside(f):
    return jax.jit(lambda x: 2 * f(x) + jnp.tanh(x))


@jax.custom_vjp
def steep(x, slope):
    return step(x)


steep.defvjp(lambda x, slope: (step(x), (x, slope)), lambda kept, error: (error / (1 + kept[1] * abs(kept[0])), None))

THEIR_OWN = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "softplus": jax.nn.softplus,
    "mish": jax.nn.mish,
    "hard_silu": jax.nn.hard_silu,
    "log_sigmoid": jax.nn.log_sigmoid,
    "sinc, marked": lrules.activation(jnp.sinc),  # from JAX 0.12 on it stops gradients
    "tanh, said again": backwards(jnp.tanh, lambda x: 1 - jnp.tanh(x) ** 2),
    "leaky, said again": own(lambda x: jnp.maximum(x, 0.1 * x), lambda x: jnp.where(x > 0, 1, 0.1).astype(x.dtype)),
    "comparison that stops": lambda x: jnp.where(jax.lax.stop_gradient(x) > 0, x, 0),
    "straight through, seen": lambda x: (h := jnp.tanh(x)) + jax.lax.stop_gradient(jnp.round(h) - h),
    "inside another": hidden_inside(jax.nn.relu),
    "mapped": jax.vmap(jax.vmap(jax.nn.relu)),
}
SURROGATES = {
    "spike": ("step", backwards(step, lambda x: 1 / (1 + 10 * abs(x)) ** 2)),
    "spike, narrow": ("step", own(step, window)),
    "spike of two arguments": ("steep", lambda x: steep(x, 5.0)),
    "straight through": ("sign", own(jnp.sign, jnp.ones_like)),
    "straight through, marked": (
        "lambda",
        lrules.activation(lambda x: x + jax.lax.stop_gradient(jnp.round(x) - x)),
    ),
    "leak of the derivative alone": (
        "",
        own(jax.jit(lambda x: jnp.maximum(x, 0)), lambda x: jnp.full_like(x, 0.01)),
    ),
    "inside another": ("", hidden_inside(backwards(step, window))),
    "mapped": ("step", jax.vmap(jax.vmap(backwards(step, window)))),
}


@pytest.fixture(autouse=True)
def relaxed():
    """Dtypes are the user's affair here."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def setting(f):
    def net(p, x):
        return f(f(x @ p["a"]) @ p["b"]) @ p["c"]

    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"a": (3, 6), "b": (6, 6), "c": (6, 2)}
    params = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=False)}
    return net, params, jax.random.normal(keys[3], (8, 3))


def gradient(net, rule, params, x):
    f = lrules.transform(net, rule)
    return jax.jit(jax.grad(lambda p: (f(p, EMPTY, x) ** 2).mean()))(params)


@pytest.mark.parametrize("name", THEIR_OWN)
def test_functions_that_declare_their_own_derivative(name):
    net, params, x = setting(THEIR_OWN[name])
    found = gradient(net, lrules.dual_propagation(beta=1e-3), params, x)
    bridge.close(found, gradient(net, lrules.backprop(), params, x), 1e-2)


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates_are_refused_and_can_pass(name):
    site, f = SURROGATES[name]
    net, params, x = setting(f)
    for call in (
        lambda: lrules.dual_propagation().init(jax.random.key(0), net, params, x),
        lambda: jax.grad(lambda p: lrules.transform(net, lrules.dual_propagation())(p, EMPTY, x).mean())(params),
        lambda: gradient(net, lrules.dual_propagation(), params, x),
    ):
        with pytest.raises(NotImplementedError, match=f"'.*{site}' declares a derivative that is not") as refusal:
            call()
    offered = str(refusal.value).split("passing={'")[1].split("'")[0]
    passing = lrules.dual_propagation(passing=offered)
    bridge.close(gradient(net, passing, params, x), gradient(net, lrules.backprop(), params, x), 1e-5)


def test_a_surrogate_in_a_loop():
    spike = backwards(step, window)
    net = lambda p, x: jax.lax.scan(lambda h, w: (spike(h @ w), None), x, p)[0]  # noqa: E731
    with pytest.raises(NotImplementedError, match="'step' declares a derivative that is not"):
        lrules.dual_propagation().init(jax.random.key(0), net, jnp.ones((2, 3, 3)), jnp.ones((4, 3)))


HOLOMORPHIC = {
    "tanh": jnp.tanh,
    "sin": jnp.sin,
    "rational": lrules.activation(lambda z: z / (2 + z * z)),
    "of the conjugate": lambda z: jnp.tanh(jnp.conj(z)),
    "of the parts": lambda z: jax.lax.complex(jnp.tanh(z.real), jnp.sin(z.imag)),
}
OTHERS = {
    "phase": lambda z: z / (jnp.abs(z) + 1e-3),
    "of the modulus": lambda z: jax.nn.relu(jnp.abs(z) - 0.1) * z / jnp.abs(z),
    "modulus": lambda z: jnp.abs(z),
    "marked": lrules.activation(lambda z: z * jnp.abs(z)),
    "a real number made complex": lambda z: 1 / (1 + jnp.exp(1j * z.real)),
}


def complex_setting(f):
    net, params, x = setting(f)
    params = {n: jax.lax.complex(w, w[::-1, ::-1]) / 3 for n, w in params.items()}
    return (lambda p, x: net(p, x).real), params, jax.lax.complex(x, x[::-1])


@pytest.mark.parametrize(
    "name,alpha",
    mostly_slow(
        pairs(HOLOMORPHIC, [0.5, 0.2]), [(n, 0.2 if n in ("tanh", "of the parts") else 0.5) for n in HOLOMORPHIC]
    ),
)
def test_complex_states(name, alpha):
    """At a weak nudge they give the gradient, in the convention that JAX has for complex numbers."""
    with jax.enable_x64(True):
        net, params, x = complex_setting(HOLOMORPHIC[name])
        params, x = jax.tree.map(lambda a: a.astype(np.complex128), (params, x))
        rule = lrules.dual_propagation(alpha=alpha, beta=1e-5, iterations=2)
        found, expected = gradient(net, rule, params, x), gradient(net, lrules.backprop(), params, x)
        for key in params:
            np.testing.assert_allclose(found[key], expected[key], rtol=1e-3, atol=1e-6)
        step = lrules.value_and_grad(net, lambda y, t: (y**2).sum(-1), rule)
        residual = jax.jit(step)(params, EMPTY, x, jnp.zeros((8, 2)))[1].report["residual"]
        assert residual.shape == (2,) and (residual >= 0).all() and residual[1] < 1


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_holomorphic_is_refused(name):
    net, params, x = complex_setting(OTHERS[name])
    with pytest.raises(NotImplementedError, match="is complex and not holomorphic") as refusal:
        gradient(net, lrules.dual_propagation(), params, x)
    offered = str(refusal.value).split("passing={'")[1].split("'")[0]
    found = gradient(net, lrules.dual_propagation(beta=1e-3, passing=offered), params, x)
    bridge.close(found, gradient(net, lrules.backprop(), params, x), 1e-2)


@jax.custom_vjp
def scaled(x, factor):
    return jnp.tanh(factor * x)


scaled.defvjp(lambda x, factor: (scaled(x, factor), x), lambda x, error: (error * (1 - jnp.tanh(x) ** 2), None))


@pytest.mark.parametrize("number", [1.0, 0.5])
def test_numbers_that_an_activation_takes(number):
    """Its declared derivative is the true one if this number, which the network computes, is 1."""

    def net(p, x):
        h = x @ p["a"]
        return scaled(h, jnp.broadcast_to(jnp.asarray(number / 2, h.dtype) * 2, h.shape)) @ p["b"]

    params, x, y = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 3))}, jnp.ones((5, 4)), jnp.ones((5, 3))
    fn = lrules.value_and_grad(net, half_squared, lrules.dual_propagation(0.0, beta=0.1))
    if number == 1:
        fn(params, NO_FEEDBACK, x, y)
    else:
        with pytest.raises(NotImplementedError, match="declares a derivative"):
            fn(params, NO_FEEDBACK, x, y)
