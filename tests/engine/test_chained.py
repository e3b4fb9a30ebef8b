"""On one CPU, each signal of a direct rule waits for the gradients above it: the same numbers, with less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from lrules.engine import chained, operations
from tests.small import KEY, W, X, half_square, mlp

RULES = {
    "direct": lrules.direct_feedback_alignment(),
    "adaptive": lrules.direct_feedback_alignment(adaptive=True),
    "rank": lrules.direct_feedback_alignment(rank=2),
    "recomputed": lrules.direct_feedback_alignment(storage="recomputed"),
    "monotone": lrules.monotone_dfa(),
    "targets": lrules.random_target_projection(),
    "drop": lrules.drop_error(lrules.direct_feedback_alignment(), rate=0.5),
    "state": lrules.direct(
        lambda e, b, targets, name, *, state: (lrules.extend.project(e, b) * state.astype(e.dtype), state + 1),
        init=jax.nn.initializers.glorot_normal(), state=lambda shape: jnp.ones(()),
    ),
    "partition": lrules.partition({"b": lrules.feedback_alignment(), ".*": lrules.direct_feedback_alignment()}),
}  # fmt: skip
Y = jnp.ones((4, 3))


def wait(monkeypatch, wanted):
    monkeypatch.setattr(chained, "alone", lambda: wanted)


def scanned(params, x):
    h = jnp.tanh(x @ params["a"])
    h, _ = jax.lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), h, jnp.stack([params["b"]] * 2))
    return jax.nn.softmax(h @ params["c"])


def step_of(apply, rule):
    def step(params, feedback, x, y):
        fn = lrules.value_and_grad(apply, half_square, rule)
        return fn(params, feedback, x, y, **({"rng": KEY} if rule.stochastic else {}))

    return step


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("apply", [mlp, scanned])
def test_the_numbers_stay_the_same(monkeypatch, name, apply):
    rule = RULES[name]
    feedback = rule.init(KEY, apply, W, X)
    found = []
    for wanted in (False, True):
        wait(monkeypatch, wanted)
        found.append(jax.jit(step_of(apply, rule))(W, feedback, X, Y))
        if wanted:
            found.append(step_of(apply, rule)(W, feedback, X, Y))
    for got in found[1:]:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), got, found[0])


def test_inputs_of_convolutions_wait_too(monkeypatch):
    """The same numbers, with less memory: the copies for the weight gradients are not made in the forward pass."""

    def net(params, x):
        dims = ("NHWC", "HWIO", "NHWC")
        for w in params["convs"]:
            x = jax.nn.relu(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims))
        return x.mean((1, 2)) @ params["out"]

    keys = jax.random.split(KEY, 6)
    convs = [jax.random.normal(key, (3, 3, 8, 8)) / 8 for key in keys[:4]]
    params, x = {"convs": convs, "out": jnp.ones((8, 3))}, jax.random.normal(keys[4], (16, 16, 16, 8))
    wait(monkeypatch, True)
    for rule in (RULES["direct"], RULES["adaptive"]):
        feedback = rule.init(KEY, net, params, x)
        found = []
        for waits in (True, False):
            if not waits:
                monkeypatch.setattr(chained, "of", lambda eqn: operations.Row("another"))
            compiled = jax.jit(step_of(net, rule)).lower(params, feedback, x, jnp.ones((16, 3))).compile()
            found.append((compiled(params, feedback, x, jnp.ones((16, 3))), compiled.memory_analysis()))
        monkeypatch.undo()
        wait(monkeypatch, True)
        (got, ours), (want, without) = found
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), got, want)
        copies = x.nbytes if jax.__version_info__ < (0, 11) else 0  # newer XLA makes the copies late by itself
        assert ours.temp_size_in_bytes <= without.temp_size_in_bytes - copies


@pytest.mark.parametrize(
    "kind",
    [
        {"window_strides": (2, 2)},
        {"window_strides": (1, 1), "rhs_dilation": (2, 2)},
        {"window_strides": (1, 1), "lhs_dilation": (2, 2), "padding": ((1, 2), (1, 2))},  # a transposed convolution
        {"window_strides": (1, 1), "feature_group_count": 2},
        {"window_strides": (1, 1), "padding": ((2, 0), (1, 1))},
    ],
)
@pytest.mark.parametrize("name", ["direct", "adaptive"])
def test_every_kind_of_convolution_may_wait(monkeypatch, name, kind):
    def net(params, x):
        dims = ("NHWC", "HWIO", "NHWC")
        for w in params["convs"]:
            x = jnp.tanh(jax.lax.conv_general_dilated(x, w, dimension_numbers=dims, **{"padding": "SAME"} | kind))
        return x.mean((1, 2)) @ params["out"]

    keys = jax.random.split(KEY, 4)
    inputs = 4 // kind.get("feature_group_count", 1)
    convs = [jax.random.normal(key, (3, 3, inputs, 4)) / 4 for key in keys[:2]]
    params, x = {"convs": convs, "out": jnp.ones((4, 3))}, jax.random.normal(keys[2], (5, 8, 8, 4))
    feedback = RULES[name].init(KEY, net, params, x)
    found = []
    for wanted in (False, True):
        wait(monkeypatch, wanted)
        found.append(jax.jit(step_of(net, RULES[name]))(params, feedback, x, jnp.ones((5, 3))))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *found)


def test_infinite_gradients_above_leave_the_signals_below_as_they_are(monkeypatch):
    e, formed = jnp.array([[1.0, -0.0, jnp.nan]]), [jnp.array([-jnp.inf]), jnp.array([jnp.nan]), jnp.zeros(0)]
    got = chained.after(e, [*formed, jnp.array(3)])
    assert np.array_equal(got, e, equal_nan=True) and np.array_equal(np.signbit(got), np.signbit(e))
    assert chained.after(e, []) is e


def test_under_vmap_what_is_the_same_for_all_stays_one():
    """As the hidden signals, if many feedback weights are tried with the same parameters: no copy for each of them."""
    e, formed = X, jnp.stack([X, -X, jnp.nan * X])
    one = jax.vmap(lambda formed: chained.after(e, [formed]), out_axes=None)  # which refuses a result for each
    assert np.array_equal(one(formed), e) and np.array_equal(jax.vmap(one, out_axes=None)(formed[None]), e)
    for in_axes, e in (((0, 0), formed), ((0, None), formed)):
        got = jax.jit(jax.vmap(lambda e, formed: chained.after(e, [formed]), in_axes))(e, formed)
        assert np.array_equal(got, e, equal_nan=True)


@pytest.mark.parametrize("name", ["direct", "adaptive"])
def test_derivatives_of_a_step(monkeypatch, name):
    """As without waiting, also under vmap."""
    rule = RULES[name]
    feedback = rule.init(KEY, mlp, W, X)

    def size(params):
        grads = step_of(mlp, rule)(params, feedback, X, Y)[1].params
        return sum(jnp.sum(jnp.square(g)) for g in grads.values())

    many, found = jax.tree.map(lambda w: jnp.stack([0.1 * w, 0.2 * w]), W), []
    for wanted in (False, True):
        wait(monkeypatch, wanted)
        found.append(jax.jit(jax.vmap(jax.grad(size)))(many))
        found.append(jax.grad(lambda many: jax.vmap(size)(many).sum())(many))
    for got in found[1:]:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, found[0])


def test_who_waits(monkeypatch):
    signals, small = {"b": X, "c": X}, X[:1]
    assert not chained.wanted(small, signals)  # the tests have several devices
    wait(monkeypatch, True)
    assert chained.wanted(small, signals)
    assert not chained.wanted(small, {"b": X}) and not chained.wanted(jnp.ones((9, 9)), signals)
    with jax.set_mesh(jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))):
        assert not chained.wanted(small, signals)


WIDE = {"a": (32, 256), "b": (256, 256), "c": (256, 256), "d": (256, 256), "e": (256, 4)}
PARAMS = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in WIDE.items()}
INPUTS, TARGETS = jax.ShapeDtypeStruct((512, 32), jnp.float32), jax.ShapeDtypeStruct((512, 4), jnp.float32)


def deep(params, x, wrap=lambda f: f):
    *hidden, last = params.values()
    for w in hidden:
        x = wrap(lambda x, w: jax.nn.relu(x @ w))(x, w)
    return x @ last


def temporary(step, *args, donate=()):
    made = jax.jit(step, donate_argnums=donate).lower(*args).compile()
    return made.memory_analysis().temp_size_in_bytes


def test_memory_is_at_most_that_of_backpropagation(monkeypatch):
    def bytes_of(rule):
        feedback = jax.eval_shape(lambda key: rule.init(key, deep, PARAMS, INPUTS), KEY)
        return temporary(step_of(deep, rule), PARAMS, feedback, INPUTS, TARGETS)

    def plain(params, feedback, x, y):
        return jax.value_and_grad(lambda p: half_square(deep(p, x), y).mean())(params)

    backprop = temporary(plain, PARAMS, (), INPUTS, TARGETS)
    signal = 4 * 512 * 256
    wait(monkeypatch, False)
    assert bytes_of(RULES["direct"]) > backprop + signal  # all signals are there at once
    wait(monkeypatch, True)
    for name in ("direct", "recomputed", "monotone", "adaptive"):
        assert bytes_of(RULES[name]) <= backprop - (name != "adaptive") * signal / 2, name


@jax.custom_vjp
def updated(w):
    """The parameter; what comes back for it is not its gradient but the parameter after a step."""
    return w


updated.defvjp(lambda w: (w, w), lambda w, g: (w - 0.1 * g,))


def test_update_while_going_down(monkeypatch):
    wait(monkeypatch, True)
    rule = RULES["direct"]

    def down(params, x):
        return deep(jax.tree.map(updated, params), x)

    def at_the_end(params, feedback, x, y):
        grads = lrules.value_and_grad(deep, half_square, rule)(params, feedback, x, y)[1]
        return jax.tree.map(lambda w, g: w - 0.1 * g, params, grads.params)

    def on_the_way(params, feedback, x, y):
        return lrules.value_and_grad(down, half_square, rule)(params, feedback, x, y)[1].params

    keys = iter(jax.random.split(KEY, 8))
    params = {name: jax.random.normal(next(keys), w.shape) / 16 for name, w in PARAMS.items()}
    x, y = jax.random.normal(next(keys), (8, 32)), jnp.ones((8, 4))
    feedback = rule.init(KEY, deep, params, x)
    wanted, got = (jax.jit(step)(params, feedback, x, y) for step in (at_the_end, on_the_way))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), got, wanted)

    few = jax.ShapeDtypeStruct((8, 32), jnp.float32), jax.ShapeDtypeStruct((8, 4), jnp.float32)
    late, soon = (temporary(step, PARAMS, feedback, *few, donate=0) for step in (at_the_end, on_the_way))
    assert soon < late - 4 * 256 * 256  # at least one gradient less


@pytest.mark.parametrize("scan", [False, True])
def test_checkpoints(monkeypatch, scan):
    """Blocks of two layers in `jax.checkpoint`, updated on the way; XLA recomputes on a CPU inside a scan alone."""
    wait(monkeypatch, True)

    def block(x, w):
        return jax.nn.relu(jax.nn.relu(x @ w[0]) @ w[1])

    def net(params, x, wrap):
        blocks, last = jax.tree.map(updated, params)
        if scan:
            return jax.lax.scan(lambda x, w: (wrap(block)(x, w), None), x, blocks)[0] @ last
        for w in blocks:
            x = wrap(block)(x, w)
        return x @ last

    rule = lrules.direct_feedback_alignment()
    params = jax.random.normal(KEY, (4, 2, 64, 64)) / 8, jnp.ones((64, 4)) / 8
    x, y = jax.random.normal(KEY, (512, 64)), jnp.ones((512, 4))
    found = []
    for wrap in (lambda f: f, jax.checkpoint):
        apply = functools.partial(net, wrap=wrap)
        feedback = rule.init(KEY, apply, params, x)
        step = jax.jit(step_of(apply, rule), donate_argnums=0)
        found.append((step.lower(params, feedback, x, y).compile(), feedback))
    kept, recomputed = (made(jax.tree.map(jnp.copy, params), feedback, x, y)[1].params for made, feedback in found)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), recomputed, kept)
    bytes_kept, bytes_recomputed = (made.memory_analysis().temp_size_in_bytes for made, _ in found)
    assert bytes_recomputed < bytes_kept if scan else bytes_recomputed <= bytes_kept
