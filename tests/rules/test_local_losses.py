"""Local losses against NumPy: predictions, similarities and both; simultaneous and greedy; maps, loops, sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrules
from tests import bridge
from tests.reference import local_losses as reference
from tests.reference import losses, nets
from tests.sampling import mostly_slow

CLASSES = optax.softmax_cross_entropy_with_integer_labels
KEY, LABELS = jax.random.key(0), np.array([0, 2, 1, 0, 1, 2, 2])
pytestmark = pytest.mark.usefixtures("double_precision")


def half_squared(outputs, targets):
    return 0.5 * jnp.sum(jnp.square(outputs - targets), -1)


def dense():
    rng = np.random.default_rng(0)
    return bridge.random_dense(rng, (4, 5, 6, 3), ["tanh", "sigmoid"]), rng.normal(size=(7, 4))


def conv():
    rng = np.random.default_rng(0)
    return bridge.random_conv(rng, "tanh", "max"), rng.normal(size=(7, 6, 6, 2))


CASES = {"dense": dense, "conv": conv}


def start(net, x, rule):
    apply, params = bridge.apply_of(net), bridge.parameters(net)
    return apply, params, rule.init(KEY, apply, params, jnp.asarray(x))


def by_layer(net, feedback, suffix=""):
    return [None, *(feedback.learned.get(f"{k}/kernel{suffix}") for k in range(1, len(net)))]


def as_maps(net, x, learned):
    """The library has classifiers of the shape that the hidden signal has where it is defined by a reader."""
    reads = nets.forward(net, x).reads
    return [None, *(None if c is None else np.asarray(c).reshape(len(c), *r.shape[1:])
                    for c, r in zip(learned[1:], reads[1:], strict=True))]  # fmt: skip


def error_of(net, x, targets):
    return losses.mean(*losses.softmax_cross_entropy(nets.forward(net, x).outputs, targets))[1]


@pytest.mark.parametrize("kind", ["prediction", "similarity", "both"])
@pytest.mark.parametrize("case", CASES)
def test_reference(case, kind):
    net, x = CASES[case]()
    rule = lrules.local_losses(kind, similarity=0.7 if kind == "both" else None)
    apply, params, feedback = start(net, x, rule)
    targets = losses.one_hot(LABELS, 3)
    e = error_of(net, x, targets)
    want, found = reference.gradients(
        net, x, e, targets, kind, beta=0.7, classifiers=as_maps(net, x, by_layer(net, feedback)),
        projections=by_layer(net, feedback, " similarity"),
    )  # fmt: skip
    step = jax.jit(lrules.value_and_grad(apply, CLASSES, rule))
    (value, outputs), grads = step(params, feedback, jnp.asarray(x), jnp.asarray(LABELS))
    bridge.close(grads.params, bridge.kernels_and_biases(want))
    bridge.close(value, losses.softmax_cross_entropy(outputs, targets)[0].mean())
    for k in range(1, len(net)):
        for suffix, wanted in (("", found[k].classifier), (" similarity", found[k].projection)):
            got = grads.feedback.get(f"{k}/kernel{suffix}")
            assert (got is None) == (wanted is None)
            if wanted is not None:
                bridge.close(got, wanted.reshape(got.shape))
    if kind != "prediction":  # real targets are compared as they are
        one_hot = lrules.value_and_grad(apply, optax.softmax_cross_entropy, rule)
        _, again = jax.jit(one_hot)(params, feedback, jnp.asarray(x), jnp.asarray(targets))
        bridge.close(again.params, grads.params)


def test_any_loss():
    """The prediction is judged by the loss of the network, for real targets too."""
    net, x = dense()
    rule = lrules.local_losses()
    apply, params, feedback = start(net, x, rule)
    y = np.random.default_rng(1).normal(size=(7, 3))
    e = losses.mean(*losses.half_squared_error(nets.forward(net, x).outputs, y))[1]
    want, found = reference.gradients(
        net, x, e, y, "prediction", classifiers=by_layer(net, feedback), loss=losses.half_squared_error
    )
    _, grads = lrules.value_and_grad(apply, half_squared, rule)(params, feedback, jnp.asarray(x), jnp.asarray(y))
    bridge.close(grads.params, bridge.kernels_and_biases(want))
    bridge.close(grads.feedback["1/kernel"], found[1].classifier)


def test_softmax_at_the_end():
    """A network with a softmax, and a loss of probabilities: the prediction passes the softmax too."""
    net, x = dense()
    rule = lrules.local_losses()
    apply, params, feedback = start(net, x, rule)
    log_loss = lambda p, t: -jnp.log(jnp.take_along_axis(p, t[:, None], 1)[:, 0])  # noqa: E731
    ended = lambda p, x: jax.nn.softmax(apply(p, x))  # noqa: E731
    args = params, feedback, jnp.asarray(x), jnp.asarray(LABELS)
    _, want = lrules.value_and_grad(apply, CLASSES, rule)(*args)
    _, got = lrules.value_and_grad(ended, log_loss, rule)(*args)
    bridge.close((got.params, got.feedback), (want.params, want.feedback), 1e-8)


def test_several_outputs():
    """Outputs in a dict, one of them integers: the prediction has the same structure."""
    net, x = dense()
    apply = bridge.apply_of(net)

    def both(p, x):
        y = apply(p, x)
        return {"a": y[:, :2], "b": y[:, 2:], "n": jnp.arange(7)}

    rule = lrules.local_losses()
    _, params, feedback = start(net, x, rule)
    y = jnp.ones((7, 3))
    loss = lambda o, t: half_squared(jnp.concatenate([o["a"], o["b"]], 1), t) + 0.0 * o["n"].astype(t.dtype)  # noqa: E731
    _, want = lrules.value_and_grad(apply, half_squared, rule)(params, feedback, jnp.asarray(x), y)
    _, got = lrules.value_and_grad(both, loss, rule)(params, feedback, jnp.asarray(x), y)
    bridge.close((got.params, got.feedback), (want.params, want.feedback))


def test_no_error_from_above():
    """A hidden signal does not know the layers above it: other weights there change nothing below."""
    net, x = dense()
    rule = lrules.local_losses("both")
    apply, params, feedback = start(net, x, rule)
    step = jax.jit(lrules.value_and_grad(apply, CLASSES, rule))
    other = params | {"2": jax.tree.map(lambda p: -3 * p, params["2"])}
    one, two = (step(p, feedback, jnp.asarray(x), jnp.asarray(LABELS))[1].params for p in (params, other))
    bridge.close([one["0"], one["1"]], [two["0"], two["1"]])
    assert jnp.any(one["2"]["kernel"] != two["2"]["kernel"])


def test_greedy():
    """With traced factors one compiled step trains layer after layer; all others stay as they are."""
    net, x = dense()
    apply, params, _ = start(net, x, lrules.local_losses("both"))

    @jax.jit
    def step(params, feedback, phase):
        factor = {f"^{i + 1}/": jnp.where(phase == i, 1.0, 0.0) for i in range(2)}
        rule = lrules.local_losses("both", factor=factor)
        return lrules.value_and_grad(apply, CLASSES, rule)(params, feedback, jnp.asarray(x), jnp.asarray(LABELS))[1]

    rule = lrules.local_losses("both")
    feedback = rule.init(KEY, apply, params, jnp.asarray(x))
    together = lrules.value_and_grad(apply, CLASSES, rule)(params, feedback, jnp.asarray(x), jnp.asarray(LABELS))[1]
    for phase in (0, 1):
        got = step(params, feedback, phase)
        bridge.close(got.params[str(phase)], together.params[str(phase)])
        assert not any(np.any(g) for g in jax.tree.leaves(got.params[str(1 - phase)]))
        for name, g in got.feedback.items():
            assert np.any(g) == name.startswith(str(phase + 1)), name
    assert step._cache_size() <= 1  # 0: JAX may leave its fast path out
    twice = lrules.local_losses("both", factor=2.0)
    got = lrules.value_and_grad(apply, CLASSES, twice)(params, feedback, jnp.asarray(x), jnp.asarray(LABELS))[1]
    bridge.close(got.params["0"], jax.tree.map(lambda g: 2 * g, together.params["0"]))


def test_blocks():
    """With `at`, the error goes down by backpropagation to the next hidden signal that has a loss."""
    net, x = dense()
    rule = lrules.local_losses(at="2/kernel")
    apply, params, feedback = start(net, x, rule)
    assert list(feedback.learned) == ["2/kernel"]
    c = feedback.learned["2/kernel"]

    def block(params):
        h = jnp.asarray(x)
        for k, f in ((0, jnp.tanh), (1, jax.nn.sigmoid)):
            h = f(h @ params[str(k)]["kernel"] + params[str(k)]["bias"][None])
        return CLASSES(h @ c.T, jnp.asarray(LABELS)).mean()

    want = jax.grad(block)(params)
    _, got = lrules.value_and_grad(apply, CLASSES, rule)(params, feedback, jnp.asarray(x), jnp.asarray(LABELS))
    bridge.close([got.params["0"], got.params["1"]], [want["0"], want["1"]])


def sequence(p, x):
    """`[batch, time, features]` through shared layers, to classes at each time."""
    h = jnp.tanh(x @ p["a"])
    return jnp.tanh(h @ p["b"]) @ p["c"]


def test_sequences_share_a_prediction():
    """With `shared_axes`, one classifier predicts the classes at every time."""
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=s)) for n, s in {"a": (3, 4), "b": (4, 4), "c": (4, 2)}.items()}
    x, t = jnp.asarray(rng.normal(size=(5, 6, 3))), jnp.asarray(rng.integers(0, 2, size=(5, 6)))
    rule = lrules.local_losses(shared_axes=1)
    feedback = rule.init(KEY, sequence, params, x)
    assert {n: c.shape for n, c in feedback.learned.items()} == {"b": (2, 4), "c": (2, 4)}

    def local(p, learned):
        h = jnp.tanh(x @ p["a"])
        value = CLASSES(h @ learned["b"].T, t).mean()
        h = jnp.tanh(jax.lax.stop_gradient(h) @ p["b"])
        value += CLASSES(h @ learned["c"].T, t).mean()
        return value + CLASSES(jax.lax.stop_gradient(h) @ p["c"], t).mean()

    want = jax.grad(local, (0, 1))(params, feedback.learned)
    _, got = jax.jit(lrules.value_and_grad(sequence, CLASSES, rule))(params, feedback, x, t)
    bridge.close((got.params, got.feedback), want)


@pytest.mark.parametrize("kind", ["prediction", "both"])
def test_layers_in_a_scan(kind):
    """Each iteration has its own loss and its own C and K, as the same layers without a scan."""
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(4, 5)), "w": rng.normal(size=(3, 5, 5)), "out": rng.normal(size=(5, 3))}
    params = jax.tree.map(jnp.asarray, params)
    x = jnp.asarray(rng.normal(size=(7, 4)))

    def scanned(p, x):
        body = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
        return jax.lax.scan(body, jnp.tanh(x @ p["a"]), p["w"])[0] @ p["out"]

    def unrolled(p, x):
        h = jnp.tanh(x @ p["a"])
        for i in range(3):
            h = jnp.tanh(h @ p[f"w{i}"])
        return h @ p["out"]

    rule = lrules.local_losses(kind)
    feedback = rule.init(KEY, scanned, params, x)
    apart = {f"w{i}": params["w"][i] for i in range(3)} | {"a": params["a"], "out": params["out"]}
    learned = {n: b for n, b in feedback.learned.items() if not n.startswith("w")}
    for n, b in feedback.learned.items():
        if n.startswith("w"):
            learned |= {n.replace("w", f"w{i}", 1): b[i] for i in range(3)}
    grads = [
        jax.jit(lrules.value_and_grad(net, CLASSES, rule))(p, feedback._replace(learned=b), x, jnp.asarray(LABELS))[1]
        for net, p, b in ((scanned, params, feedback.learned), (unrolled, apart, learned))
    ]
    bridge.close(grads[0].params["w"], jnp.stack([grads[1].params[f"w{i}"] for i in range(3)]))
    bridge.close([grads[0].params[n] for n in ("a", "out")], [grads[1].params[n] for n in ("a", "out")])
    for n, g in grads[0].feedback.items():
        wanted = [grads[1].feedback[n.replace("w", f"w{i}", 1)] for i in range(3)] if n.startswith("w") else None
        bridge.close(g, grads[1].feedback[n] if wanted is None else jnp.stack(wanted))


def test_dead_units_and_equal_rows():
    """Rows without spread have similarity 0, and gradients stay finite."""
    net = nets.dense_net([np.zeros((4, 5)), np.ones((5, 3))], [None, None], ["relu"])
    rule = lrules.local_losses("similarity")
    apply, params, feedback = start(net, np.ones((3, 4)), rule)
    _, grads = lrules.value_and_grad(apply, CLASSES, rule)(params, feedback, jnp.ones((3, 4)), jnp.array([0, 1, 2]))
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads.params))


MODIFIERS = {
    "sign_error": lrules.sign_error,
    "drop_error": lambda rule: lrules.drop_error(rule, 0.5),
    "without_derivatives": lrules.without_derivatives,
}


@pytest.mark.parametrize("name", mostly_slow(MODIFIERS, ["sign_error"]))
def test_modifiers_act_on_what_arrives(name):
    """The error at each hidden signal is that of its local loss, modified."""
    net, x = dense()
    rule = lrules.local_losses()
    apply, params, feedback = start(net, x, rule)
    modified = MODIFIERS[name](rule)
    rng = {"rng": KEY} if modified.stochastic else {}
    args = params, feedback, jnp.asarray(x), jnp.asarray(LABELS)
    _, plain = lrules.value_and_grad(apply, CLASSES, rule)(*args)
    _, got = jax.jit(lrules.value_and_grad(apply, CLASSES, modified))(*args, **rng)
    bridge.close((got.params["2"], got.feedback), (plain.params["2"], plain.feedback))
    trace = nets.forward(net, x)
    _, found = reference.gradients(net, x, error_of(net, x, losses.one_hot(LABELS, 3)), losses.one_hot(LABELS, 3),
                                   "prediction", classifiers=by_layer(net, feedback))  # fmt: skip
    if name == "sign_error":
        d = np.sign(found[1].signal) / len(x) * nets.slope(net[0].activation, trace.pre[0])
        bridge.close(got.params["0"]["kernel"], x.T @ d)
    elif name == "without_derivatives":
        bridge.close(got.params["0"]["kernel"], x.T @ found[1].signal)
    else:
        assert jnp.any(got.params["0"]["kernel"] != plain.params["0"]["kernel"])


def test_refusals():
    for options, message in [
        ({"loss": "sim"}, "loss must be one of 'prediction', 'similarity', 'both', got 'sim'"),
        ({"similarity": 1.5}, r"similarity must be a number in \[0, 1\], got 1.5"),
        ({"similarity": 0.5}, "loss='prediction' has one term: leave similarity out"),
        ({"factor": -1}, "factor must be a finite number >= 0, got -1"),
        ({"init": 3}, "init must be a function"),
        ({"loss": "both", "shared_axes": 1}, "leave shared_axes out"),
        ({"at": ()}, "at must name at least one place"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            lrules.local_losses(**options)
    net, x = dense()
    for rule, message in [
        (lrules.local_losses(factor={"^7/": 1.0, ".*": 2.0}), r"factor: '\^7/' matches no hidden signal"),
        (lrules.local_losses(factor={"^1/": 1.0}), "factor: no pattern matches the hidden signal '2/kernel'"),
        (lrules.local_losses(at="7"), "at='7' matches no hidden signal"),
        (lrules.local_losses("both", max_feedback_bytes=300), "raise max_feedback_bytes"),
    ]:
        with pytest.raises(ValueError, match=message):
            start(net, x, rule)
    with pytest.raises(ValueError, match="value_and_grad"):
        lrules.transform(bridge.apply_of(net), lrules.local_losses())
    with pytest.raises(ValueError, match="acts on the network as a whole"):
        lrules.partition({".*": lrules.local_losses()})
    rule = lrules.local_losses("similarity")
    apply, params, feedback = start(net, x, rule)
    with pytest.raises(ValueError, match="the first axis of the targets must be the batch of 7"):
        loss = lambda o, t: jnp.sum(o, -1)  # noqa: E731
        lrules.value_and_grad(apply, loss, rule)(params, feedback, jnp.asarray(x), jnp.ones((3, 7)))
    with pytest.raises(ValueError, match="made for another rule"):
        args = params, lrules.Feedback({}, {}), jnp.asarray(x), jnp.asarray(LABELS)
        lrules.value_and_grad(apply, CLASSES, rule)(*args)


def test_description():
    net, x = dense()
    apply, params, _ = start(net, x, lrules.local_losses("both"))
    found = lrules.describe(apply, lrules.local_losses("both"), params, jnp.asarray(x))
    assert found.feedback_bytes == 8 * (3 * 5 + 3 * 6 + 5 * 5 + 6 * 6)
    assert not lrules.refusals(apply, lrules.local_losses("both"), params, jnp.asarray(x))
