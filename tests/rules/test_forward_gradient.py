"""Forward gradients against NumPy: directions of weights and of activations, by a jvp and by two losses, and local."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrules
from tests import bridge
from tests.reference import forward_gradient as reference
from tests.reference import local_losses as local_reference
from tests.reference import losses, nets
from tests.sampling import mostly_slow

KEY, NONE = jax.random.key(5), lrules.Feedback({}, {})
FG = lrules.forward_gradient
pytestmark = pytest.mark.usefixtures("double_precision")


def half_squared(outputs, targets):
    return 0.5 * jnp.sum(jnp.square(outputs - targets), -1)


def dense():
    rng = np.random.default_rng(0)
    return bridge.random_dense(rng, (4, 5, 6, 3), ["tanh", "sigmoid"]), rng.normal(size=(7, 4))


def conv():
    """The first hidden signal is pooled, so the direction is its own; the others are made by an activation."""
    rng = np.random.default_rng(0)
    return bridge.random_conv(rng, "tanh", "max"), rng.normal(size=(4, 6, 6, 2))


CASES = {"dense": dense, "conv": conv}


def targets_of(net, x):
    return np.random.default_rng(7).normal(size=nets.forward(net, x).outputs.shape)


def named(key, name):
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def draw(key, name, shape, noise=jax.random.normal):
    return np.asarray(noise(named(key, name), shape, jnp.float64))


def keys(directions):
    return [jax.random.fold_in(KEY, i) for i in range(directions)]


def weight_directions(net, directions, noise=jax.random.normal):
    return [
        tuple([draw(key, f"{k}/{kind}", getattr(layer, kind).shape, noise) for k, layer in enumerate(net)]
              for kind in ("kernel", "bias"))
        for key in keys(directions)
    ]  # fmt: skip


def activation_directions(net, x, directions):
    """For each direction, what moves at pre-activations, and at hidden signals that are pooled."""
    trace, found = nets.forward(net, x), []
    for key in keys(directions):
        pre, signals = [None] * len(net), [None] * len(net)
        for k, layer in enumerate(net[:-1]):
            pooled = layer.pool is not None
            shape = trace.pooled[k].shape if pooled else trace.pre[k].shape
            (signals if pooled else pre)[k + pooled] = draw(key, f"{k + 1}/kernel", shape)
        found.append((pre, signals))
    return found


def wanted_of_activations(net, x, e, directions, derivative):
    """The mean over directions of the derivative of each example times the direction, brought down as is usual."""
    trace = nets.forward(net, x)
    arriving = [np.zeros(z.shape) for z in trace.pre]
    for pre, signals in directions:
        d = derivative(pre, signals)
        for k in range(len(net) - 1):
            u = pre[k] if pre[k] is not None else signals[k + 1]
            made = d.reshape(-1, *[1] * (u.ndim - 1)) * u
            made = made if pre[k] is not None else nets.to_pre_activation(net, trace, k, made)
            arriving[k] += made / len(directions)
    arriving[-1] = nets.to_pre_activation(net, trace, len(net) - 1, e)
    return reference._from_pre_activations(net, trace, x, arriving)


def run(net, x, rule, loss=half_squared, targets=None, feedback=NONE, key=KEY):
    step = lrules.value_and_grad(bridge.apply_of(net), loss, rule)
    targets = jnp.asarray(targets_of(net, x) if targets is None else targets)
    return jax.jit(step)(bridge.parameters(net), feedback, jnp.asarray(x), targets, rng=key)


# ------------------------------------------------------------------------------------------------------ the reference


OPTIONS = mostly_slow(
    [(case, method, directions) for case in CASES for method in ("jvp", "central") for directions in (1, 3)],
    [("dense", "jvp", 1), ("dense", "central", 3), ("conv", "jvp", 3), ("conv", "central", 1)],
)


@pytest.mark.parametrize(("case", "method", "directions"), OPTIONS)
def test_weights(case, method, directions):
    net, x = CASES[case]()
    y, std = targets_of(net, x), 0.03
    e = losses.half_squared_error(nets.forward(net, x).outputs, y)[1] / len(x)
    at = lambda outputs: losses.half_squared_error(outputs, y)[0].mean()  # noqa: E731
    drawn = weight_directions(net, directions)
    want = reference.weight_gradients(net, x, drawn, e, method=method, std=std, objective_at=at)
    rule = FG(method=method, directions=directions, std=std if method == "central" else None)
    (value, outputs), grads = run(net, x, rule)
    bridge.close(grads.params, bridge.kernels_and_biases(want))
    bridge.close((value, outputs), (at(outputs), nets.forward(net, x).outputs))


@pytest.mark.parametrize(("case", "method", "directions"), OPTIONS)
def test_activations(case, method, directions):
    net, x = CASES[case]()
    y, std = targets_of(net, x), 0.03
    e = losses.half_squared_error(nets.forward(net, x).outputs, y)[1] / len(x)

    def exact(pre, signals):
        return (e * reference.output_tangent(net, x, pre=pre, signals=signals)).sum(1)

    def two_losses(pre, signals):
        up, down = (
            losses.half_squared_error(reference.noisy_outputs(net, x, s, pre, signals), y)[0] for s in (std, -std)
        )
        return (up - down) / (2 * std * len(x))

    drawn = activation_directions(net, x, directions)
    want = wanted_of_activations(net, x, e, drawn, exact if method == "jvp" else two_losses)
    if case == "dense":  # here it is the reference itself
        at = lambda outputs: losses.half_squared_error(outputs, y)[0] / len(x)  # noqa: E731
        options = {"method": method, "std": std, "objectives_at": at}
        alone = reference.activation_gradients(net, x, [pre for pre, _ in drawn], e, **options)
        bridge.close(bridge.kernels_and_biases(want), bridge.kernels_and_biases(alone))
    (_, outputs), grads = run(
        net, x, FG("activations", method=method, directions=directions, std=std if method == "central" else None)
    )
    bridge.close(grads.params, bridge.kernels_and_biases(want))
    bridge.close(outputs, nets.forward(net, x).outputs)


LABELS = np.arange(7) % 3


def local_case(kind, **options):
    """A dense net with local losses: their signals, and what their layers learn."""
    net, x = dense()
    local = lrules.local_losses(kind, **options)
    params = bridge.parameters(net)
    feedback = local.init(jax.random.key(2), bridge.apply_of(net), params, jnp.asarray(x))
    learned = lambda suffix: [None] + [feedback.learned.get(f"{k}/kernel{suffix}") for k in (1, 2)]  # noqa: E731
    e = losses.mean(*losses.softmax_cross_entropy(nets.forward(net, x).outputs, losses.one_hot(LABELS, 3)))[1]
    _, found = local_reference.gradients(
        net, x, e, losses.one_hot(LABELS, 3), kind, classifiers=learned(""), projections=learned(" similarity")
    )
    return net, x, local, feedback, found, e


CLASSES = optax.softmax_cross_entropy_with_integer_labels


@pytest.mark.parametrize(("kind", "directions"), [("prediction", 1), ("both", 3)])
def test_local_activations(kind, directions):
    net, x, local, feedback, found, e = local_case(kind)
    drawn = [pre for pre, _ in activation_directions(net, x, directions)]
    signals = [None, *(each.signal for each in found[1:])]
    want = reference.local_gradients(net, x, drawn, signals, e)
    _, grads = run(net, x, FG("activations", local=local, directions=directions), CLASSES, LABELS, feedback)
    bridge.close(grads.params, bridge.kernels_and_biases(want))
    for k in (1, 2):
        if kind == "both":
            bridge.close(grads.feedback[f"{k}/kernel similarity"], found[k].projection)
        bridge.close(grads.feedback[f"{k}/kernel"], found[k].classifier)


@pytest.mark.parametrize(("kind", "directions"), [("prediction", 3), ("both", 1)])
def test_local_weights(kind, directions):
    """The layer below each hidden signal has the derivative of its own local loss, the last that of the objective."""
    net, x, local, feedback, found, e = local_case(kind)
    trace = nets.forward(net, x)
    signals = [*(each.signal for each in found[1:]), e]
    want = bridge.parameters(net)
    want = jax.tree.map(np.zeros_like, want)
    for kernels, biases in weight_directions(net, directions):
        for k, layer in enumerate(net):
            moved = (trace.reads[k] @ kernels[k] + biases[k]) * nets.slope(layer.activation, trace.pre[k])
            rate = (signals[k] * moved).sum() / directions
            want[str(k)]["kernel"] += rate * kernels[k]
            want[str(k)]["bias"] += rate * biases[k]
    _, grads = run(net, x, FG(local=local, directions=directions), CLASSES, LABELS, feedback)
    bridge.close(grads.params, want)
    for k in (1, 2):
        bridge.close(grads.feedback[f"{k}/kernel"], found[k].classifier)


# ------------------------------------------------------------------------------------------------------- the estimator


def residual_net(params, x):
    """A skip past a layer, two readers of one hidden signal, an unused weight, and a scan with its own weights."""
    h = jnp.tanh(x @ params["a"] + params["bias"][None])
    h = h + jnp.tanh(h @ params["b"] + h @ params["c"])
    layer = jax.checkpoint(lambda h, w: (h + jnp.tanh(h @ w), None))
    return jax.lax.scan(layer, h, params["stack"])[0] @ params["d"]


def residual_case():
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "bias": (4,), "b": (4, 4), "c": (4, 4), "stack": (2, 4, 4), "d": (4, 2), "unused": (2,)}
    params = {n: jnp.asarray(rng.normal(size=s) * 0.5) for n, s in shapes.items()}
    return params, jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=(5, 2)))


UNBIASED = {
    "weights": FG(),
    "weights, 2 signs": FG(directions=2, noise=jax.random.rademacher),
    "weights, central": FG(method="central", std=1e-4),
    "activations": FG("activations"),
    "activations, 2 signs": FG("activations", directions=2, noise=jax.random.rademacher),
    "activations, central": FG("activations", method="central", std=1e-4),
}


@pytest.mark.parametrize("name", mostly_slow(UNBIASED, ["weights", "activations", "activations, central"]))
def test_unbiased(name):
    """Over many draws the mean is the gradient, in a network with skips, shared readers and a loop."""
    params, x, y = residual_case()
    truth = jax.grad(lambda p: half_squared(residual_net(p, x), y).mean())(params)
    step = lrules.value_and_grad(residual_net, half_squared, UNBIASED[name])
    draws = jax.jit(jax.vmap(lambda key: step(params, NONE, x, y, rng=key)[1].params))
    got = draws(jax.random.split(jax.random.key(0), 20000))
    assert not np.any(got["unused"]) or "weights" in name
    scores = []
    for n, want in truth.items():
        sample = np.asarray(got[n])
        spread = sample.std(0) / np.sqrt(len(sample))
        if n == "d" and "activations" in name:  # the last layer has its true gradient
            bridge.close(sample, np.broadcast_to(want, sample.shape), 1e-8)
        elif np.any(spread):
            scores.append(np.ravel((sample.mean(0) - want) / spread))
    z = np.concatenate(scores)
    assert np.abs(z).max() < 4.5 and 0.7 < np.sqrt((z**2).mean()) < 1.4


def test_variance():
    """E |g - dL|^2 = (N + 1) / n |dL|^2 for n normal directions in N numbers, (N - 1) / n for signs."""
    w, x, y = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4))), jnp.ones((1, 6)), jnp.zeros((1, 4))
    net = lambda w, x: x @ w  # noqa: E731
    truth = jax.grad(lambda w: half_squared(net(w, x), y).mean())(w)
    for directions, noise, wanted in ((1, "normal", 25), (4, "normal", 25 / 4), (1, "rademacher", 23)):
        rule = FG(directions=directions, noise=getattr(jax.random, noise))
        step = lrules.value_and_grad(net, half_squared, rule)
        many = jax.random.split(jax.random.key(1), 20000)
        got = jax.jit(jax.vmap(lambda key: step(w, NONE, x, y, rng=key)[1].params))(many)  # noqa: B023
        measured = jnp.mean(jnp.sum((got - truth[None]) ** 2, (1, 2))) / jnp.sum(truth**2)
        np.testing.assert_allclose(measured, wanted, rtol=0.06)


def test_activations_are_less_noisy():
    """Ren et al., section 3: the variance is that of fewer numbers."""
    net, x = bridge.random_dense(np.random.default_rng(0), (20, 20, 20, 3), ["tanh", "tanh"]), np.ones((4, 20))
    apply, params = bridge.apply_of(net), bridge.parameters(net)
    y = jnp.asarray(targets_of(net, x))
    truth = jax.grad(lambda p: half_squared(apply(p, jnp.asarray(x)), y).mean())(params)
    noise = {}
    for perturb in ("weights", "activations"):
        step = lrules.value_and_grad(apply, half_squared, FG(perturb))
        many = jax.random.split(jax.random.key(1), 500)
        got = jax.jit(jax.vmap(lambda key: step(params, NONE, jnp.asarray(x), y, rng=key)[1].params))(many)  # noqa: B023
        gaps = jax.tree.map(lambda g, t: jnp.mean(jnp.sum((g - t[None]) ** 2, tuple(range(1, g.ndim)))), got, truth)
        noise[perturb] = float(gaps["0"]["kernel"] / jnp.sum(truth["0"]["kernel"] ** 2))
    assert noise["activations"] < noise["weights"] / 5, noise


def test_central_goes_to_the_jvp():
    """The two losses differ from the derivative by O(std^2)."""
    net, x = dense()
    apply, args = bridge.apply_of(net), (bridge.parameters(net), NONE, jnp.asarray(x), jnp.asarray(targets_of(net, x)))
    for perturb in ("weights", "activations"):

        @jax.jit
        def with_std(std, perturb=perturb):
            rule = FG(perturb, method="central", std=std)
            return lrules.value_and_grad(apply, half_squared, rule)(*args, rng=KEY)[1].params

        exact = run(net, x, FG(perturb))[1].params
        gaps = [
            max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(*map(jax.tree.leaves, (exact, got)), strict=True))
            for got in map(with_std, (1e-1, 1e-2))
        ]
        assert 50 < gaps[0] / gaps[1] < 200
