"""Node perturbation against NumPy, its estimator, and where its feedback weights go."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrules
from lrules import diagnostics
from tests import bridge
from tests.reference import losses, nets
from tests.reference import node_perturbation as reference
from tests.sampling import mostly_slow, pairs

KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("double_precision")


def half_squared(outputs, targets):
    return 0.5 * jnp.sum(jnp.square(outputs - targets), -1)


def dense():
    rng = np.random.default_rng(0)
    return bridge.random_dense(rng, (4, 5, 6, 3), ["tanh", "sigmoid"]), rng.normal(size=(7, 4))


def conv(pool="max"):
    rng = np.random.default_rng(0)
    return bridge.random_conv(rng, "tanh", pool), rng.normal(size=(4, 6, 6, 2))


def noise_of(net, x, key, noise=jax.random.normal):
    """The noise that the library draws, in the shape that each layer reads."""
    trace, found = nets.forward(net, x), [None]
    for k, layer in enumerate(net[1:], 1):
        name = f"{k}/kernel"
        shape = trace.pooled[k - 1].shape
        here = jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
        found.append(nets.as_read(layer, np.asarray(noise(here, shape, jnp.float64))))
    return found


def targets_of(net, x):
    return np.random.default_rng(7).normal(size=nets.forward(net, x).outputs.shape)


def estimates(net, x, noise, std):
    y = targets_of(net, x)
    noisy = losses.half_squared_error(reference.noisy_outputs(net, x, noise, std), y)[0]
    clean, e = losses.half_squared_error(nets.forward(net, x).outputs, y)
    return reference.estimates(noisy, clean, noise, std), e / len(x)


def made(std, direct, **options):
    return lrules.node_perturbation(std, direct=direct, **options)


def draw_feedback(net, x, direct):
    rng = np.random.default_rng(3)
    trace, outputs = nets.forward(net, x), net[-1].kernel.shape[-1]
    shapes = [(outputs, *r.shape[1:]) if direct else w.kernel.shape for r, w in zip(trace.reads, net, strict=True)]
    return [None, *(rng.normal(size=shape) for shape in shapes[1:])]


def run(net, x, rule, feedback, key):
    fn = lrules.value_and_grad(bridge.apply_of(net), half_squared, rule)
    arguments = bridge.parameters(net), feedback, jnp.asarray(x), jnp.asarray(targets_of(net, x))
    return jax.jit(fn)(*arguments, rng=key)


CASES = {"dense": dense, "conv": conv, "average": lambda: conv("average")}


@pytest.mark.parametrize(
    ("case", "direct", "noise"),
    mostly_slow(
        [(c, d, n) for c in CASES for d in (False, True) for n in ("normal", "rademacher")],
        [
            ("dense", False, "rademacher"),
            ("dense", True, "normal"),
            ("conv", False, "normal"),
            ("average", True, "normal"),
        ],
    ),
)
def test_reference(case, direct, noise):
    (net, x), noise = CASES[case](), getattr(jax.random, noise)
    key, std, feedback = jax.random.key(5), 0.2, draw_feedback(net, x, direct)
    lambdas, e = estimates(net, x, noise_of(net, x, key, noise), std)
    gradients = reference.direct_gradients if direct else reference.gradients
    want = gradients(net, feedback, x, e, lambdas)
    rule = made(std, direct, noise=noise)
    (value, outputs), grads = run(net, x, rule, lrules.Feedback({}, bridge.feedback_dict(feedback)), key)
    np.testing.assert_allclose(outputs, nets.forward(net, x).outputs, atol=1e-12)
    np.testing.assert_allclose(value, half_squared(outputs, targets_of(net, x)).mean())
    bridge.close(grads.params, bridge.kernels_and_biases(want))
    shaped = made(std, direct).init(key, bridge.apply_of(net), bridge.parameters(net), x)
    wanted = {name: b.reshape(shaped.learned[name].shape) for name, b in bridge.feedback_dict(want.feedback).items()}
    bridge.close(grads.feedback, wanted)


@pytest.mark.parametrize("direct", [False, True])
def test_recursive_least_squares(direct):
    net, x = dense()
    apply, params = bridge.apply_of(net), bridge.parameters(net)
    std, rule = 0.2, made(0.2, direct, solver="rls", ridge=0.3)
    feedback = rule.init(jax.random.key(0), apply, params, jnp.asarray(x))
    assert not feedback.fixed and not feedback.learned
    assert all(np.any(s["b"]) and not np.any(s["s"]) for s in feedback.state.values())
    pairs = {name: [] for name in feedback.state}
    for step in range(3):
        batch = np.random.default_rng(step).normal(size=x.shape)
        key = jax.random.key(step)
        lambdas, e = estimates(net, batch, noise_of(net, batch, key), std)
        b = [None, *(np.asarray(feedback.state[f"{k}/kernel"]["b"]) for k in range(1, len(net)))]
        d = [None, *reference.signals(net, b, batch, e * len(x))[1:]] if not direct else [e * len(x)] * len(net)
        _, grads = run(net, batch, rule, feedback, key)
        gradients = reference.direct_gradients if direct else reference.gradients
        bridge.close(grads.params, bridge.kernels_and_biases(gradients(net, b, batch, e, lambdas)))
        feedback = feedback._replace(state=grads.state)
        for k in range(1, len(net)):
            name = f"{k}/kernel"
            pairs[name].append((lambdas[k], d[k]))
            want = reference.least_squares(pairs[name], 0.3)
            bridge.close(feedback.state[name]["b"], want.T if direct else want)


def test_least_squares_for_weights_on_the_left_and_for_maps():
    """`W @ x` keeps its weight as [out, in]; direct feedback to maps is solved for all positions at once."""
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(4, 3))), "b": jnp.asarray(rng.normal(size=(2, 4)))}
    x, y = jnp.asarray(rng.normal(size=(3, 500))), jnp.asarray(rng.normal(size=(2, 500)))
    net = lrules.Network(lambda p, x: (p["b"] @ (p["a"] @ x)).T, batch_axes=1)
    rule = lrules.node_perturbation(1e-4, solver="rls", ridge=1e-3)
    feedback = rule.init(jax.random.key(0), net, params, x)
    step = jax.jit(lrules.value_and_grad(net, half_squared, rule))
    for i in range(30):
        _, grads = step(params, feedback, x, y.T, rng=jax.random.key(i))
        feedback = feedback._replace(state=grads.state)
    error = jnp.linalg.norm(feedback.state["b"]["b"] - params["b"]) / jnp.linalg.norm(params["b"])
    assert error < 0.1
    net, x = conv()
    rule = lrules.node_perturbation(0.1, direct=True, solver="rls")
    feedback = rule.init(jax.random.key(0), bridge.apply_of(net), bridge.parameters(net), x)
    _, grads = run(net, x, rule, feedback, jax.random.key(1))
    assert jax.tree.map(jnp.shape, grads.state) == jax.tree.map(jnp.shape, feedback.state)


@pytest.mark.parametrize(
    ("direct", "noise"),
    mostly_slow(pairs([False, True], ["normal", "rademacher"]), [(False, "normal"), (True, "rademacher")]),
)
def test_unbiased(direct, noise):
    """Over many draws the feedback's gradient is that with the true gradient in the place of the estimate."""
    noise = getattr(jax.random, noise)
    net, x = dense()
    y, params = jnp.asarray(targets_of(net, x)), bridge.parameters(net)
    feedback = draw_feedback(net, x, direct)
    e = losses.half_squared_error(nets.forward(net, x).outputs, np.asarray(y))[1] / len(x)
    truth, signal = [None] * len(net), e
    trace = nets.forward(net, x)
    for k in reversed(range(1, len(net))):
        signal = nets.to_pre_activation(net, trace, k, signal)
        signal = truth[k] = nets.transpose(net[k], net[k].kernel, signal, trace.reads[k].shape)
    gradients = reference.direct_gradients if direct else reference.gradients
    want = gradients(net, feedback, x, e, [None, *(len(x) * t for t in truth[1:])]).feedback
    fn = lrules.value_and_grad(bridge.apply_of(net), half_squared, made(1e-5, direct, noise=noise))

    @jax.jit
    @jax.vmap
    def draws(key):
        return fn(params, lrules.Feedback({}, bridge.feedback_dict(feedback)), jnp.asarray(x), y, rng=key)[1].feedback

    got = draws(jax.random.split(jax.random.key(0), 20000))
    for k in range(1, len(net)):
        sample = np.asarray(got[f"{k}/kernel"])
        z = (sample.mean(0) - want[k]) / (sample.std(0) / np.sqrt(len(sample)))
        assert np.abs(z).max() < 4.5 and 0.7 < np.sqrt((z**2).mean()) < 1.4
        assert np.abs(sample.mean(0) - want[k]).max() < 0.1 * np.abs(want[k]).max()


# ------------------------------------------------------------------------------------------- where the feedback goes


def relative_errors(rule, net, wanted, steps, optimizer=None, batch=200):
    """||B - W|| / ||W|| after learning the feedback alone, on random data."""
    rng = np.random.default_rng(0)
    params = bridge.parameters(net)
    shape = (batch, net[0].kernel.shape[0])
    apply = bridge.apply_of(net)
    feedback = rule.init(jax.random.key(1), apply, params, jnp.zeros(shape))
    fn = lrules.value_and_grad(apply, half_squared, rule)
    teacher = jnp.asarray(rng.normal(size=(shape[1], net[-1].kernel.shape[1])))

    def step(carry, key):
        feedback, opt = carry
        key, data = jax.random.split(key)
        x = jax.random.normal(data, shape, jnp.float64)
        _, grads = fn(params, feedback, x, x @ teacher, rng=key)
        if optimizer is None:
            return (feedback._replace(state=grads.state), opt), None
        update, opt = optimizer.update(grads.feedback, opt)
        return (feedback._replace(learned=optax.apply_updates(feedback.learned, update)), opt), None

    opt = None if optimizer is None else optimizer.init(feedback.learned)
    keys = jax.random.split(jax.random.key(2), steps)
    with jax.numpy_dtype_promotion("standard"):  # for optax's schedules
        (feedback, _), _ = jax.jit(lambda f, o: jax.lax.scan(step, (f, o), keys))(feedback, opt)
    weights = feedback.learned or {name: s["b"] for name, s in feedback.state.items()}
    return {n: float(jnp.linalg.norm(weights[n] - w) / jnp.linalg.norm(w)) for n, w in wanted.items()}


def linear(sizes, activations):
    return bridge.random_dense(np.random.default_rng(4), sizes, activations)


def test_theorem_1():
    """The top layer's feedback converges to its weights, in a nonlinear network."""
    net = linear((8, 6, 3, 4), ["tanh", "tanh"])
    rule = lrules.node_perturbation(1e-3, solver="rls")
    wanted = {"2/kernel": net[2].kernel}
    assert relative_errors(rule, net, wanted, 1500)["2/kernel"] < 0.05
    rule = lrules.node_perturbation(1e-3)
    assert (
        relative_errors(rule, net, wanted, 4000, optax.adam(optax.exponential_decay(0.02, 1000, 0.2)))["2/kernel"]
        < 0.05
    )


@pytest.mark.parametrize("solver", mostly_slow(["sgd", "rls"], ["rls"]))
def test_theorem_2(solver):
    """In linear networks all feedback converges to the weights, if hidden layers are no wider than the output."""
    net = linear((8, 3, 3, 4), ["identity", "identity"])
    wanted = {f"{k}/kernel": net[k].kernel for k in (1, 2)}
    rule = lrules.node_perturbation(1e-3, solver=solver)
    optimizer = optax.adam(optax.exponential_decay(0.02, 1000, 0.2)) if solver == "sgd" else None
    found = relative_errors(rule, net, wanted, 5000, optimizer)
    assert max(found.values()) < 0.05, found


@pytest.mark.parametrize("solver", mostly_slow(["sgd", "rls"], ["sgd"]))
def test_corollary_1(solver):
    """In linear networks direct feedback converges to the product of the weights above."""
    net = linear((8, 3, 3, 4), ["identity", "identity"])
    wanted = {"1/kernel": (net[1].kernel @ net[2].kernel).T, "2/kernel": net[2].kernel.T}
    rule = lrules.node_perturbation(1e-3, direct=True, solver=solver)
    optimizer = optax.adam(optax.exponential_decay(0.02, 1000, 0.2)) if solver == "sgd" else None
    found = relative_errors(rule, net, wanted, 4000, optimizer)
    assert max(found.values()) < 0.05, found


def test_wide_hidden_layers_break_the_condition():
    net = linear((8, 20, 20, 4), ["identity", "identity"])
    found = relative_errors(lrules.node_perturbation(1e-3, solver="rls"), net, {"1/kernel": net[1].kernel}, 1000)
    assert found["1/kernel"] > 0.5


def test_figure_1():
    """Relative error, angle and sign congruence per layer, as the feedback learns."""
    net = linear((8, 6, 3, 4), ["tanh", "tanh"])
    params = bridge.parameters(net)
    b = lrules.Feedback({}, {"2/kernel": params["2"]["kernel"] * 1.1}, {"1/kernel": {"b": -params["1"]["kernel"]}})
    found = diagnostics.weight_alignment(b, params)
    np.testing.assert_allclose(found["2/kernel"].relative_error, 0.1, rtol=1e-6)
    np.testing.assert_allclose([found["2/kernel"].angle, found["1/kernel"].angle], [0, 180], atol=1e-5)
    np.testing.assert_allclose([found["2/kernel"].sign_agreement, found["1/kernel"].sign_agreement], [1, 0])


# ----------------------------------------------------------------------------------------------------- any graph


def residual_net(params, x):
    h = jnp.tanh(x @ params["a"])
    h = h + jnp.tanh(h @ params["b"] + h @ params["c"])
    return h @ params["d"]


def test_one_residual_for_all_readers():
    """Two layers that read one hidden signal, with a skip: what arrives there together is held against the estimate."""
    rng = np.random.default_rng(0)
    params = {
        n: jnp.asarray(rng.normal(size=s)) for n, s in {"a": (3, 4), "b": (4, 4), "c": (4, 4), "d": (4, 2)}.items()
    }
    feedback = {n: jnp.asarray(rng.normal(size=params[n].shape)) for n in "bcd"}
    x, y, key, std = jnp.asarray(rng.normal(size=(5, 3))), jnp.zeros((5, 2)), jax.random.key(0), 0.1
    fn = lrules.value_and_grad(residual_net, half_squared, lrules.node_perturbation(std))
    _, grads = jax.jit(fn)(params, lrules.Feedback({}, feedback), x, y, rng=key)
    first = jnp.tanh(x @ params["a"])
    second = first + (t := jnp.tanh(first @ params["b"] + first @ params["c"]))
    e = second @ params["d"] - y
    xi = {
        n: jax.random.normal(jax.random.fold_in(key, zlib.crc32(n.encode()) & 0x7FFFFFFF), (5, 4), jnp.float64)
        for n in "bd"
    }
    noisy = first + std * xi["b"]
    noisy = noisy + jnp.tanh(noisy @ params["b"] + noisy @ params["c"]) + std * xi["d"]
    difference = half_squared(noisy @ params["d"], y) - half_squared(second @ params["d"], y)
    lambdas = {n: difference[:, None] * xi[n] / std for n in "bd"}
    above = e @ feedback["d"].T
    signal = above * (1 - t**2)
    arriving = above + signal @ feedback["b"].T + signal @ feedback["c"].T
    residual = arriving - lambdas["b"]
    want = {"d": (above - lambdas["d"]).T @ e, "b": residual.T @ signal, "c": residual.T @ signal}
    bridge.close(grads.feedback, jax.tree.map(lambda g: g / 5, want))


def test_loops_share_or_stack_their_feedback():
    rng = np.random.default_rng(0)
    kernels = [rng.normal(size=(4, 4)) for _ in range(3)]
    net = nets.dense_net([*kernels, rng.normal(size=(4, 2))], [None] * 4, ["tanh"] * 3)
    x = jnp.asarray(rng.normal(size=(5, 4)))
    params = {"w": jnp.asarray(np.stack(kernels)), "out": jnp.asarray(net[-1].kernel)}

    def apply(params, x):
        body = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
        return jax.lax.scan(body, x, params["w"])[0] @ params["out"]

    for direct in (False, True):
        rule = made(0.1, direct)
        feedback = rule.init(jax.random.key(0), apply, params, x)
        fn = jax.jit(lrules.value_and_grad(apply, half_squared, rule))
        keys = jax.random.split(jax.random.key(1), 2)
        one, two = (fn(params, feedback, x, jnp.zeros((5, 2)), rng=k)[1] for k in keys)
        assert jax.tree.map(jnp.shape, one.feedback) == jax.tree.map(jnp.shape, feedback.learned)
        bridge.close(one.params, two.params)
        assert all(
            jnp.all(jnp.any(a != b, (-1, -2)))
            for a, b in zip(*map(jax.tree.leaves, (one.feedback, two.feedback)), strict=True)
        )


def test_modifiers_and_aux():
    net, x = dense()
    feedback = lrules.Feedback({}, bridge.feedback_dict(draw_feedback(net, x, False)))
    y, params = jnp.asarray(targets_of(net, x)), bridge.parameters(net)
    rule = lrules.node_perturbation(0.1)
    apply = bridge.apply_of(net)
    network = lrules.Network(lambda p, x: (apply(p, x), {"sum": x.sum()}), has_aux=True)
    arguments = params, feedback, jnp.asarray(x), y
    (_, _, aux), plain = lrules.value_and_grad(network, half_squared, rule)(*arguments, rng=jax.random.key(0))
    assert aux["sum"].shape == ()
    signed = lrules.sign_error(rule)
    _, grads = lrules.value_and_grad(network, half_squared, signed)(*arguments, rng=jax.random.key(0))
    fa = lrules.sign_error(lrules.feedback_alignment())
    fixed = lrules.Feedback(feedback.learned, {})
    _, want = lrules.value_and_grad(network, half_squared, fa)(params, fixed, *arguments[2:])
    bridge.close(grads.params, want.params)
    bridge.close(grads.feedback["2/kernel"], plain.feedback["2/kernel"])  # what reaches the top is not modified yet


MODIFIERS = {
    "quantize_error": lambda r: lrules.quantize_error(r, 3),
    "quantize_error_at_output": lambda r: lrules.quantize_error(r, 3, at="output"),
    "quantize_update": lambda r: lrules.quantize_update(r, 3),
    "drop_error": lambda r: lrules.drop_error(r, 0.5),
    "magnitude_error": lrules.magnitude_error,
    "modify_error": lambda r: lrules.modify_error(r, lambda s, name, rng: s.clip(-0.05, 0.05)),
    "replace_derivative": lambda r: lrules.replace_derivative(r, jnp.cos),
    "without_derivatives": lrules.without_derivatives,
    "two": lambda r: lrules.without_derivatives(lrules.quantize_error(r, 3)),
}


@pytest.mark.parametrize(
    ("name", "direct"),
    mostly_slow(pairs(MODIFIERS, [False, True]), [(name, bool(i % 2)) for i, name in enumerate(MODIFIERS)]),
)
def test_modified_weights_are_those_of_fixed_feedback(direct, name):
    """The forward weights learn as under (direct) feedback alignment with the same feedback and modifier."""
    net, x = conv()
    apply, params, y = bridge.apply_of(net), bridge.parameters(net), jnp.asarray(targets_of(net, x))
    rule = made(0.1, direct)
    other = lrules.direct_feedback_alignment() if direct else lrules.feedback_alignment()
    feedback = rule.init(KEY, apply, params, jnp.asarray(x))

    def grads(rule, feedback, rng):
        step = lrules.value_and_grad(apply, half_squared, MODIFIERS[name](rule))
        return jax.jit(step)(params, feedback, jnp.asarray(x), y, **rng)[1]

    learned = grads(rule, feedback, {"rng": KEY})
    fixed = grads(other, lrules.Feedback(feedback.learned, {}), {"rng": KEY} if name == "drop_error" else {})
    bridge.close(learned.params, fixed.params)
    assert all(bool(jnp.isfinite(g).all() and jnp.any(g)) for g in jax.tree.leaves(learned.feedback))


@pytest.mark.parametrize(
    ("direct", "solver"), mostly_slow(pairs([False, True], ["sgd", "rls"]), [(False, "sgd"), (True, "rls")])
)
def test_shard_map(direct, solver):
    """Feedback that all devices share learns from the examples of all of them."""
    net, _ = dense()
    x = np.random.default_rng(2).normal(size=(8, 4))
    apply, params, y = bridge.apply_of(net), bridge.parameters(net), jnp.asarray(targets_of(net, x))
    noise = lambda key, shape, dtype: jnp.broadcast_to(jnp.cos(jnp.arange(shape[-1], dtype=dtype)), shape)  # noqa: E731
    rule = made(0.1, direct, solver=solver, noise=noise)
    feedback = rule.init(KEY, apply, params, jnp.asarray(x))
    step = lrules.value_and_grad(apply, half_squared, rule)
    spec, mesh = jax.sharding.PartitionSpec, jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def shared(x, y):
        _, grads = step(params, feedback, x, y, rng=KEY)
        return grads.params, grads.feedback, grads.state

    specs = {"in_specs": (spec("data"), spec("data")), "out_specs": spec()}
    *sums, state = jax.jit(jax.shard_map(shared, mesh=mesh, **specs))(jnp.asarray(x), y)
    _, grads = jax.jit(step)(params, feedback, jnp.asarray(x), y, rng=KEY)
    bridge.close(jax.tree.map(lambda g: g / 4, sums), [grads.params, grads.feedback])
    bridge.close(state, grads.state)


# ----------------------------------------------------------------------------------------------------- refusals


def test_refusals():
    for options, message in [
        ({"std": 0.0}, "std must be a finite number > 0, got 0.0"),
        ({"std": 1.0, "solver": "adam"}, 'solver must be "sgd" or "rls", got .adam'),
        ({"std": 1.0, "ridge": 0.0}, "ridge must be a finite number > 0, got 0.0"),
        ({"std": None}, "std must be .* got None"),
        ({"std": float("inf")}, "std must be .* got inf"),
        ({"std": 1.0, "ridge": "a"}, "ridge must be .* got 'a'"),
        ({"std": 1.0, "direct": "yes"}, "direct must be True or False, got 'yes'"),
        ({"std": 1.0, "noise": 3}, "noise must be a function .* got a int"),
        ({"std": 1.0, "init": 3}, "init must be a function"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            lrules.node_perturbation(**options)
    net, x = conv()
    with pytest.raises(ValueError, match="draw one number for each element"):
        rule = lrules.node_perturbation(0.1, noise=lambda key, shape, dtype: jnp.ones((), dtype))
        run(net, x, rule, rule.init(jax.random.key(0), bridge.apply_of(net), bridge.parameters(net), x), KEY)
    with pytest.raises(ValueError, match="value_and_grad"):
        lrules.transform(bridge.apply_of(net), lrules.node_perturbation(0.1))
    with pytest.raises(NotImplementedError, match="dense layers"):
        rule = lrules.node_perturbation(0.1, solver="rls")
        rule.init(jax.random.key(0), bridge.apply_of(net), bridge.parameters(net), x)
    with pytest.raises(ValueError, match="keeps its feedback in feedback.state"):
        sgd = lrules.node_perturbation(0.1, direct=True).init(
            jax.random.key(0), bridge.apply_of(net), bridge.parameters(net), x
        )
        run(net, x, lrules.node_perturbation(0.1, direct=True, solver="rls"), sgd, jax.random.key(1))
    with pytest.raises(ValueError, match="stochastic"):
        run(net, x, lrules.node_perturbation(0.1), lrules.Feedback({}, {}), None)

    def branching(p, x):
        return jax.lax.cond(x.sum() > 0, lambda x: jnp.tanh(x @ p["a"]) @ p["b"], lambda x: x @ p["a"] @ p["b"], x)

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    for direct in (False, True):
        rule = made(0.1, direct)
        with pytest.raises(NotImplementedError, match="inside a cond"):
            feedback = rule.init(jax.random.key(0), branching, params, jnp.ones((5, 3)))
            fn = lrules.value_and_grad(branching, half_squared, rule)
            fn(params, feedback, jnp.ones((5, 3)), jnp.ones((5, 2)), rng=jax.random.key(0))


def test_noise_by_hidden_signal():
    """lambda = (L(xi) - L(0)) xi / std, each with its own std: as noise of those sizes, divided by their squares."""
    net, x = dense()
    stds = {"1/": 0.1, "2/": 0.3}
    widths = {5: 0.1, 6: 0.3}

    def sized(key, shape, dtype):
        return widths[shape[1]] * jax.random.normal(key, shape, dtype)

    def gradients(std, **options):
        rule = lrules.node_perturbation(std, direct=True, **options)
        feedback = rule.init(KEY, bridge.apply_of(net), bridge.parameters(net), jnp.asarray(x))
        step = lrules.value_and_grad(bridge.apply_of(net), half_squared, rule)
        return step(bridge.parameters(net), feedback, jnp.asarray(x), jnp.ones((7, 3)), rng=KEY)[1].feedback

    silent = gradients(1.0, noise=lambda key, shape, dtype: jnp.zeros(shape, dtype))  # what is left without lambda
    own, scaled = gradients(stds), gradients(1.0, noise=sized)
    for name, std in (("1/kernel", 0.1), ("2/kernel", 0.3)):
        bridge.close(silent[name] - own[name], (silent[name] - scaled[name]) / std**2)
    bridge.close(gradients({".*": 0.2}), gradients(0.2))
    with pytest.raises(ValueError, match="std: '0/' matches no hidden signal; .* are '1/kernel', '2/kernel'"):
        gradients({"0/": 0.1, ".*": 0.2})
    with pytest.raises(ValueError, match="std must be a finite number > 0, got 0"):
        lrules.node_perturbation({"a": 0})
