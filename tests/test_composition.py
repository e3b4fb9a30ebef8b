"""Rules under the user's transformations: numbers equal to those of one device and of plain calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lrules
from tests import bridge
from tests.sampling import mostly_slow, pairs

NONE = lrules.Feedback({}, {})
SIZES = [("a", (5, 8)), ("b", (8, 8)), ("c", (8, 3))]
W = {n: jax.random.normal(jax.random.key(i), s) / s[0] ** 0.5 for i, (n, s) in enumerate(SIZES)}
W["bias"] = jnp.linspace(-1, 1, 8)
X = jax.random.normal(jax.random.key(7), (8, 5))
Y = jax.random.normal(jax.random.key(8), (8, 3))
RULES = {
    "backprop": lrules.backprop(),
    "last_layer_only": lrules.last_layer_only(),
    "feedback_alignment": lrules.feedback_alignment(),
    "direct_feedback_alignment": lrules.direct_feedback_alignment(),
    "backman": lrules.backman(),
    "backman_gradient_norm": lrules.backman("gradient_norm"),
}


def mlp(p, x):
    h = jnp.tanh(x @ p["a"] + p["bias"].reshape(1, -1).astype(x.dtype))
    return (jax.nn.gelu(h @ p["b"]) + h) @ p["c"]


def half_square(y, t):
    return 0.5 * jnp.sum((y - t) ** 2, -1)


@functools.cache
def of_the_batch(name):
    """A rule's feedback, and its gradients of the whole batch."""
    feedback = RULES[name].init(jax.random.key(1), mlp, W, X)
    step = lrules.value_and_grad(mlp, half_square, RULES[name])
    return feedback, jax.jit(step)(W, feedback, X, Y)[1].params


@pytest.fixture(params=RULES)
def case(request):
    """A rule with its feedback and its gradients of the whole batch."""
    return request.param, RULES[request.param], *of_the_batch(request.param)


def test_sharded_batch(case):
    """Under `jit` a sharded batch needs nothing."""
    _, rule, feedback, reference = case
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, y = (jax.device_put(v, NamedSharding(mesh, P("data"))) for v in (X, Y))
    grads = jax.jit(lrules.value_and_grad(mlp, half_square, rule))(W, feedback, x, y)[1].params
    bridge.close(grads, reference, 1e-5)


DP = lrules.dual_propagation
EXPLICIT = RULES | {
    "skipped_backprop": lrules.skipped_backprop(),
    "adaptive": lrules.direct_feedback_alignment(adaptive=True),
    "kolen_pollack": lrules.kolen_pollack(),
    "random_target_projection": lrules.random_target_projection(),
    "dual_propagation": DP(0.2, iterations=3, input_nudge=1.0),
    "parallel": DP(iterations=4, order="parallel", tolerance=1e-3),
    "squared_error": DP(adjoint=False, output="squared_error", feedback_rule=lrules.feedback_alignment()),
    "node_perturbation": lrules.node_perturbation(0.1),
    "least_squares": lrules.node_perturbation(0.1, direct=True, solver="rls"),
    "forward_gradient": lrules.forward_gradient(),
    "central_differences": lrules.forward_gradient(method="central", std=0.1),
    "forward_activations": lrules.forward_gradient("activations"),
    "forward_local": lrules.forward_gradient("activations", local=lrules.local_losses()),
    "local_losses": lrules.local_losses("both"),
    "difference_target_propagation": lrules.difference_target_propagation(first_target="outputs"),
    "predictive_coding": lrules.predictive_coding(6, tolerance=1e-3),
    "fixed_predictions": lrules.predictive_coding(6, fixed_predictions=True, states="pre_activation"),
    "without_derivatives": lrules.without_derivatives(lrules.backprop()),
}


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        EXPLICIT, ["feedback_alignment", "backman", "skipped_backprop", "adaptive", "dual_propagation", "least_squares"]
    ),
)
def test_explicit_mesh(name):
    """Under `jax.set_mesh` with explicit axes, as `jax.make_mesh` gives them, in a scan over layers too."""

    def net(p, x):
        layer = lambda h, _: (jnp.tanh(h @ p["b"]) + h, None)  # noqa: E731
        return jax.lax.scan(layer, mlp(p | {"c": p["b"]}, x), None, length=2)[0] @ p["c"]

    rule, mesh = EXPLICIT[name], jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.enable_x64(True):
        params, x, y = jax.tree.map(lambda v: v.astype(jnp.float64), (W, X, Y))
        feedback = rule.init(jax.random.key(1), net, params, x)
        rng = {"rng": jax.random.key(2)} if rule.stochastic else {}
        step = jax.jit(lrules.value_and_grad(net, half_square, rule))
        want = step(params, feedback, x, y, **rng)[1]
        params, feedback = jax.device_put((params, feedback), NamedSharding(mesh, P()))
        x, y = jax.device_put((x, y), NamedSharding(mesh, P("data")))
        with jax.set_mesh(mesh):
            got = step(params, feedback, x, y, **rng)[1]
        bridge.close(jax.device_get(got._replace(report={})), want._replace(report={}), 1e-9)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(case, check_vma):
    """Each device takes its share of the objective; the sum of the devices' gradients is that of the batch.

    `own`: the parameters are made each device's own, as is usual to get its own gradient, and the feedback is shared.
    """
    name, rule, feedback, reference = case
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    if name.startswith("backman"):
        if check_vma:
            with pytest.raises(ValueError, match="'data'.*axis_name"):
                _shard_map_gradient(rule, feedback, mesh, check_vma)
        rule = lrules.backman("gradient_norm" if "norm" in name else 1.0, axis_name="data")
    bridge.close(_shard_map_gradient(rule, feedback, mesh, check_vma), reference, 1e-5)
    if check_vma:
        bridge.close(_shard_map_gradient(rule, feedback, mesh, check_vma, own=True), reference, 1e-5)


def _shard_map_gradient(rule, feedback, mesh, check_vma, own=False):
    f = lrules.transform(mlp, rule)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("data"), P("data")), out_specs=P(), check_vma=check_vma
    )
    def gradient(params, feedback, x, y):
        params = jax.tree.map(lambda p: jax.lax.pcast(p, "data", to="varying"), params) if own else params
        grads = jax.grad(lambda p: half_square(f(p, feedback, x), y).sum() / len(X))(params)
        return grads if check_vma and not own else jax.lax.psum(grads, "data")

    return jax.jit(gradient)(W, feedback, X, Y)


def test_pmap(case):
    name, rule, feedback, reference = case
    if name.startswith("backman"):
        rule = lrules.backman("gradient_norm" if "norm" in name else 1.0, axis_name="devices")
    f = lrules.transform(mlp, rule)

    @functools.partial(jax.pmap, axis_name="devices", in_axes=(None, None, 0, 0))
    def gradient(params, feedback, x, y):
        grads = jax.grad(lambda p: half_square(f(p, feedback, x), y).sum() / len(X))(params)
        return jax.lax.psum(grads, "devices")

    grads = gradient(W, feedback, X.reshape(4, 2, 5), Y.reshape(4, 2, 3))
    bridge.close(jax.tree.map(lambda g: g[0], grads), reference, 1e-5)


def test_scan_with_donation(case):
    """Steps under `lax.scan`, with optax, the carry donated: as a Python loop of steps."""
    _, rule, feedback, _ = case
    step = lrules.value_and_grad(mlp, half_square, rule)
    optimizer = optax.sgd(0.01, momentum=0.9)

    def update(carry, _):
        params, state = carry
        (value, _), grads = step(params, feedback, X, Y)
        updates, state = optimizer.update(grads.params, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry: jax.lax.scan(update, carry, None, length=3), donate_argnums=0)
    first = jax.tree.map(jnp.copy, (W, optimizer.init(W)))
    (params, _), values = run(first)
    carry, wanted = (W, optimizer.init(W)), []
    once = jax.jit(update)
    for _ in range(3):
        carry, value = once(carry, None)
        wanted.append(value)
    bridge.close(params, carry[0], 1e-5)
    np.testing.assert_allclose(values, jnp.stack(wanted), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype"),
    mostly_slow(
        pairs(RULES, ["bfloat16", "float16"]),
        [*((name, "bfloat16") for name in RULES), ("backman", "float16"), ("direct_feedback_alignment", "float16")],
    ),
)
def test_half_precision(name, dtype):
    """Parameters in half precision: gradients keep the dtype; float32 parameters with half-precision compute do too."""
    rule, dtype = RULES[name], jnp.dtype(dtype)
    *_, reference = of_the_batch(name)
    params = jax.tree.map(lambda p: p.astype(dtype), W)
    feedback = rule.init(jax.random.key(1), mlp, params, X.astype(dtype))
    f = lrules.transform(mlp, rule)
    grads = jax.jit(jax.grad(lambda p: half_square(f(p, feedback, X.astype(dtype)), Y.astype(dtype)).mean()))(params)
    assert all(g.dtype == dtype and jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads))

    def compute(p, x):
        return mlp(jax.tree.map(lambda v: v.astype(dtype), p), x.astype(dtype)).astype(jnp.float32)

    feedback = rule.init(jax.random.key(1), compute, W, X)
    assert all(b.dtype == jnp.float32 for b in feedback.fixed.values())
    grads = jax.jit(lrules.value_and_grad(compute, half_square, rule))(W, feedback, X, Y)[1].params
    angles = lrules.diagnostics.agreement(grads, reference)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
    assert all(a.angle < 5 or not np.any(reference[n]) for n, a in angles.items()), angles


def test_gradient_of_a_sum(case):
    """Additive rules add over microbatches; BackMAN does not, and says so."""
    name, rule, feedback, reference = case
    step = jax.jit(lrules.value_and_grad(mlp, half_square, rule))
    parts = [step(W, feedback, X[i : i + 4], Y[i : i + 4])[1].params for i in (0, 4)]
    added = jax.tree.map(lambda a, b: (a + b) / 2, *parts)
    assert rule.additive == (not name.startswith("backman"))
    if rule.additive:
        bridge.close(added, reference, 1e-5)


def test_inside_a_larger_model(case):
    """The gradient with respect to the inputs is what the rule brings down, so that parts can be chained."""
    _, rule, feedback, _ = case
    f = lrules.transform(mlp, rule)
    before = jnp.eye(5) * 0.5

    def whole(m):
        return half_square(f(W, feedback, X @ m), Y).mean()

    down = jax.jit(jax.grad(lambda x: half_square(f(W, feedback, x), Y).mean()))(X @ before)
    bridge.close(jax.jit(jax.grad(whole))(before), X.T @ down, 1e-5)


def test_closed_over_arrays():
    """What the function closes over stays differentiable: nothing is cut silently."""
    for rule in (lrules.backprop(), lrules.direct_feedback_alignment()):

        def objective(shift, rule=rule):
            net = lrules.Network(lambda p, x: mlp(p, x) + shift)
            feedback = rule.init(jax.random.key(1), mlp, W, X)
            return half_square(lrules.transform(net, rule)(W, feedback, X), Y).mean()

        shift = jnp.full((1, 3), 0.1)
        wanted = (mlp(W, X) + shift - Y).mean(0, keepdims=True)
        bridge.close(jax.jit(jax.grad(objective))(shift), wanted, 1e-5)


def test_marks_and_at():
    """`at=` chooses where feedback lands, by name or at a mark; between landings error flows as in backprop."""

    def marked(p, x):
        h = lrules.hidden(jnp.tanh(x @ p["a"]), "first")
        return jnp.tanh(h @ p["b"]) @ p["c"]

    by_name = lrules.direct_feedback_alignment(at="^b$")
    by_mark = lrules.direct_feedback_alignment(at="first")
    one, two = (rule.init(jax.random.key(1), marked, W, X) for rule in (by_name, by_mark))
    assert one.fixed["b"].shape == two.fixed["first"].shape == (3, 8)
    two = lrules.Feedback({"first": one.fixed["b"]}, {})
    params = {n: W[n] for n in "abc"}

    def gradient(rule, feedback):
        f = lrules.transform(marked, rule)
        return jax.jit(jax.grad(lambda p: half_square(f(p, feedback, X), Y).mean()))(params)

    a, b = gradient(by_name, one), gradient(by_mark, two)
    bridge.close(a, b, 1e-6)
    plain = jax.grad(lambda p: half_square(marked(p, X), Y).mean())(params)
    bridge.close([a["b"], a["c"]], [plain["b"], plain["c"]], 1e-6)
    e = (marked(params, X) - Y) / len(X)
    slope = 1 - jnp.tanh(X @ params["a"]) ** 2
    bridge.close(a["a"], X.T @ ((e @ one.fixed["b"]) * slope), 1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_learned_feedback_under_shard_map(check_vma):
    """The gradient of learned direct feedback sums over devices as that of the parameters does."""
    rule = lrules.direct_feedback_alignment(adaptive=True)
    feedback = rule.init(jax.random.key(1), mlp, W, X)
    reference = jax.jit(lrules.value_and_grad(mlp, half_square, rule))(W, feedback, X, Y)[1].feedback
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    f = lrules.transform(mlp, rule)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("data"), P("data")), out_specs=P(), check_vma=check_vma
    )
    def gradient(params, feedback, x, y):
        grads = jax.grad(lambda fb: half_square(f(params, fb, x), y).sum() / len(X))(feedback).learned
        return grads if check_vma else jax.lax.psum(grads, "data")

    bridge.close(jax.jit(gradient)(W, feedback, X, Y), reference, 1e-5)


def test_data_without_a_reverse_mode():
    """Data may be prepared by what JAX cannot differentiate backwards: only what is asked for is differentiated."""

    def apply(p, x):
        _, x = jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.sin(s[1])), (0, x))
        return mlp(p, x)

    for rule in (lrules.feedback_alignment(), lrules.direct_feedback_alignment(), lrules.backman()):
        feedback = rule.init(jax.random.key(1), apply, W, X)
        grads = jax.jit(lrules.value_and_grad(apply, half_square, rule))(W, feedback, X, Y)[1].params
        prepared = jnp.sin(jnp.sin(jnp.sin(X)))
        again = jax.jit(lrules.value_and_grad(mlp, half_square, rule))(W, feedback, prepared, Y)[1].params
        bridge.close(grads, again, 1e-5)


@pytest.mark.parametrize("rule", [lrules.feedback_alignment(), lrules.direct_feedback_alignment()], ids=["FA", "DFA"])
def test_frozen_weights_that_are_quantised(rule):
    """Feedback stands in for a frozen weight of integers, too: nothing arrives below where it is zero."""

    def apply(p, frozen, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ (frozen["q"].astype(jnp.float32) * 0.01)) @ p["c"]

    params, x = {"a": jnp.ones((3, 4)), "c": jnp.ones((5, 2))}, jnp.ones((6, 3))
    net = lrules.Network(apply, frozen={"q": jnp.arange(20, dtype=jnp.int8).reshape(4, 5)})
    feedback = rule.init(jax.random.key(0), net, params, x)
    f = lrules.transform(net, rule)

    def gradient(feedback):
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(f(p, feedback, x)))))(params)

    assert feedback.fixed["q"].dtype == jnp.float32 and jnp.any(gradient(feedback)["a"])
    silent = feedback._replace(fixed=feedback.fixed | {"q": jnp.zeros_like(feedback.fixed["q"])})
    assert not jnp.any(gradient(silent)["a"]) and jnp.any(gradient(silent)["c"])
