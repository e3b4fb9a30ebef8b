"""Mono-nets and monotone direct feedback alignment: the theorems, the constraint, the initialisers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lrules
from lrules import monotone
from tests import bridge
from tests.rules.common import make
from tests.sampling import mostly_slow


def test_from_sigmoid():
    """A.1: twice the width, the same output."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        first, first_bias, second, second_bias = (rng.normal(size=s) * 3 for s in ((4, 7), 7, (7, 2), 2))
        x = rng.normal(size=(50, 4)) * 3
        wanted = 1 / (1 + np.exp(-(x @ first + first_bias))) @ second + second_bias
        a, b, c, d = map(np.asarray, monotone.from_sigmoid(first, first_bias, second, second_bias))
        assert a.shape == (4, 14) and (c >= 0).all()
        np.testing.assert_allclose(np.tanh(x @ a + b) @ c + d, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "shapes", [((4, 7), 6, (7, 2), 2), ((4, 7), 7, (6, 2), 2), ((4, 7), 7, (7, 2), 3), (7, 7, (7, 2), 2)]
)
def test_from_sigmoid_of_shapes_that_do_not_go_together(shapes):
    with pytest.raises(ValueError, match=r"must be \[inputs, N\], \[N\], \[N, outputs\] and \[outputs\], got"):
        monotone.from_sigmoid(*map(np.zeros, shapes))


def test_a_first_layer_that_is_a_slice_of_a_scanned_weight():
    """A parameter is constrained as a whole."""
    apply = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0] @ p["out"]  # noqa: E731
    params, x = {"w": -jnp.ones((3, 4, 4)), "out": jnp.ones((4, 1))}, jnp.ones((2, 4))
    assert monotone.constrained(apply, params, x) == {"w": True, "out": True}
    positive = monotone.constrain(apply, params, x)
    updates, _ = positive.update(jax.tree.map(jnp.zeros_like, params), positive.init(params), params)
    assert (optax.apply_updates(params, updates)["w"] > 0).all()


def nets_of_a_kind(kind):
    """A network, parameters and inputs; which parameters are constrained."""
    if kind != "embedding":
        rng = np.random.default_rng(0)
        net = bridge.random_conv(rng) if kind == "conv" else bridge.random_dense(rng, (5, 6, 7, 3), ["tanh"] * 2)
        x = jnp.asarray(rng.normal(size=(4, 6, 6, 2) if kind == "conv" else (4, 5)), jnp.float32)
        names = [f"{k}/kernel" for k in range(1, len(net))]
        return lrules.Network(bridge.apply_of(net)), bridge.parameters(net), x, names

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(5, 3, rngs=rngs)
            self.one, self.two = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, tokens):
            return self.two(jnp.tanh(self.one(self.embed(tokens))))

    net, params = lrules.from_nnx(Model(nnx.Rngs(0)))
    return net, params, jnp.asarray([0, 3]), ["one/kernel", "two/kernel"]


OPTIMIZERS = {"sgd": optax.sgd(1.0), "adam": optax.adam(0.3), "rmsprop": optax.rmsprop(0.3)}
RULES = {
    "monotone_dfa": lrules.monotone_dfa(),
    "feedback_alignment": lrules.feedback_alignment(),
    "backprop": lrules.backprop(),
}


@pytest.mark.foreign
@pytest.mark.parametrize(
    ("kind", "optimizer", "rule"),
    mostly_slow(
        [(k, o, r) for k in ("dense", "conv", "embedding") for o in OPTIMIZERS for r in RULES],
        [
            ("dense", "sgd", "monotone_dfa"),
            ("conv", "adam", "feedback_alignment"),
            ("embedding", "rmsprop", "backprop"),
        ],
    ),
)
def test_constraint(kind, optimizer, rule):
    """After any optimizer, under any rule: weights of all layers but the first stay at the bound or above."""
    optimizer, rule = OPTIMIZERS[optimizer], RULES[rule]
    net, params, x, names = nets_of_a_kind(kind)
    mask = monotone.constrained(net, params, x)
    flat = jax.tree_util.tree_leaves_with_path(mask)
    found = [jax.tree_util.keystr(path, simple=True, separator="/") for path, on in flat if on]
    assert [name.removesuffix("/value") for name in found] == names
    params = monotone.initialize(jax.random.key(0), net, params, x, init=monotone.uniform())
    monotone.check(net, params, x)
    chained = optax.chain(optimizer, monotone.constrain(net, params, x, bound=1e-6))
    feedback, state = rule.init(jax.random.key(1), net, params, x), chained.init(params)
    step = lrules.value_and_grad(net, lambda y, t: ((y - t) ** 2).sum(-1), rule)

    @jax.jit
    def update(params, state):
        grads = step(params, feedback, x, -100.0)[1]
        updates, state = chained.update(grads.params, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = update(params, state)
    kept = [p for p, on in zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True) if on]
    assert all(bool((p >= 1e-6).all()) for p in kept)


def test_the_bound_holds_after_rounding():
    """Where p + (bound - p) rounds below the bound, the update is the next one above."""
    apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    b = jnp.asarray(10.0 ** np.linspace(-6, 6, 2001), jnp.float32)[:, None]
    params = {"a": jnp.ones((1, 2001)), "b": b}
    positive = monotone.constrain(apply, params, jnp.ones((1, 1)))
    updates, _ = positive.update({"a": params["a"], "b": -2 * b}, positive.init(params), params)
    moved = np.asarray(optax.apply_updates(params, updates)["b"])
    assert (moved >= np.float32(1e-6)).all() and (moved <= 1e-6 + 1.3e-7 * np.asarray(b)).all()
    np.testing.assert_array_equal(updates["a"], params["a"])


@pytest.mark.foreign  # optax adds the two
def test_the_bound_holds_in_mixed_precision():
    """Weights in bfloat16, updates in float32."""
    apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    b = jnp.abs(jax.random.normal(jax.random.key(0), (50, 40), jnp.bfloat16))
    params = {"a": jnp.ones((3, 50), jnp.bfloat16), "b": b}
    positive = monotone.constrain(apply, params, jnp.ones((1, 3), jnp.bfloat16))
    down = jax.tree.map(lambda p: -jnp.ones(p.shape, jnp.float32), params)
    updates, _ = positive.update(down, positive.init(params), params)
    moved = optax.apply_updates(params, updates)["b"]
    assert moved.dtype == jnp.bfloat16 and (moved >= jnp.asarray(1e-6, jnp.bfloat16)).all()


def test_constraint_inside_masks():
    """Where a part of the parameters is left to others."""
    apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    positive = monotone.constrain(apply, params, jnp.ones((1, 3)))
    parts = {"trained": optax.chain(optax.sgd(2.0), positive), "fixed": optax.set_to_zero()}
    optimizer = optax.multi_transform(parts, {"a": "fixed", "b": "trained"})
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_allclose(moved["b"], 1e-6, rtol=0.05)
    np.testing.assert_array_equal(moved["a"], params["a"])
    with pytest.raises(ValueError, match="was made for 2 parameters, got 1 updates of 1"):
        positive.update({"b": params["b"]}, positive.init(params), {"b": params["b"]})


DECREASING = {
    "cos": jnp.cos,
    "abs": jnp.abs,
    "silu": jax.nn.silu,
    "minus": lambda z: -z,
    "one minus tanh": lambda z: 1 - jnp.tanh(z),
    "minus relu": lambda z: -jax.nn.relu(z),
    "relu of minus": lambda z: jax.nn.relu(-z),
    "exp of minus": lambda z: jnp.exp(-z),
    "square": lambda z: z**2,
}
INCREASING = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "softplus": jax.nn.softplus,
    "selu": jax.nn.selu,
    "scaled": lambda z: 1.7 * jnp.tanh(0.6 * z) - 1,
    "by hand": lambda z: 1 / (1 + jnp.exp(-z)),
}


@pytest.mark.parametrize("name", [*DECREASING, *INCREASING])
def test_check_of_activations(name):
    f = (DECREASING | INCREASING)[name]
    shapes = {"a": (5, 6), "b": (6, 4), "c": (4, 1)}
    params = {k: jax.random.uniform(jax.random.key(i), s) for i, (k, s) in enumerate(shapes.items())}
    apply = lambda p, x: f(f(x @ p["a"]) @ p["b"]) @ p["c"]  # noqa: E731
    x = jax.random.normal(jax.random.key(3), (8, 5))
    if name in INCREASING:
        monotone.check(apply, params, x)
    else:
        with pytest.raises(ValueError, match="decreases, at|changes the sign"):
            monotone.check(apply, params, x)


@pytest.mark.parametrize("init", [monotone.zeros, monotone.uniform(), monotone.absolute_normal()])
def test_initialisers(init):
    net, x, _ = make("conv_max")
    apply, params = bridge.apply_of(net), bridge.parameters(net)
    new = monotone.initialize(jax.random.key(0), apply, params, jnp.asarray(x), init=init)
    for name, p in new.items():
        assert (p["kernel"] is params[name]["kernel"]) == (name == "0") and p["bias"] is params[name]["bias"]
        if name != "0":
            kernel = np.asarray(p["kernel"])
            assert kernel.shape == params[name]["kernel"].shape and (kernel >= 0).all()
            if init is not monotone.zeros:
                assert kernel.std() > 0
    monotone.check(lambda p, x: apply(p, x), new, jnp.asarray(x))


def test_uniform_bounds():
    drawn = np.asarray(monotone.uniform()(jax.random.key(0), (3, 3, 4, 100)))
    assert 1e-3 <= drawn.min() < 5e-3 and 0.16 < drawn.max() <= 1 / 6


def test_refusals():
    x = jnp.ones((2, 3))
    apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    params = {"a": -jnp.ones((3, 3)), "b": -jnp.ones((3, 1))}
    with pytest.raises(ValueError, match="'b' has negative entries"):
        monotone.check(apply, params, x)
    good = monotone.initialize(jax.random.key(0), apply, params, x)
    monotone.check(apply, good, x)
    with pytest.raises(ValueError, match="'gelu' decreases, at -4.75"):
        monotone.check(lambda p, x: jax.nn.gelu(x @ p["a"]) @ p["b"], good, x)
    with pytest.raises(ValueError, match="low < high"):
        monotone.uniform(0.0)
    with pytest.raises(ValueError, match="low must be < .* = 0.5 for a layer of fan-in 4, got 0.5; give a smaller low"):
        monotone.uniform(0.5)(jax.random.key(0), (4, 3))
    for bound in (-1, np.nan, np.inf, True, "1"):
        with pytest.raises(ValueError, match=f"bound must be a finite number >= 0, got {bound!r}"):
            monotone.constrain(apply, params, x, bound=bound)
    constraint = monotone.constrain(apply, params, x)
    with pytest.raises(ValueError, match="needs the parameters"):
        constraint.update(params, constraint.init(params))
    with pytest.raises(ValueError, match="give each of these layers its own weight"):
        monotone.constrained(lambda p, x: jnp.tanh(x @ p["a"]) @ p["a"], params, x)
