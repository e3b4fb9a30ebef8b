"""Difference target propagation against the reference, and the limits that its papers prove."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import lrules
from lrules.testing import half_squared_error
from tests import bridge
from tests.reference import difference_target_propagation as reference
from tests.reference import nets
from tests.rules.common import ALL_NETS, BATCH, by_name, make, one_hot_mean
from tests.sampling import mostly_slow
from tests.small import KEY, W, X, mlp, refused

DTP = lrules.difference_target_propagation
CLASSES = optax.softmax_cross_entropy_with_integer_labels
LABELS = np.array([0, 2, 1, 1, 0])
DECODERS = {"tanh": jnp.tanh, "softplus": jax.nn.softplus, "identity": None}
TOP = {"hidden": "penultimate", "outputs": "outputs"}


def unpooled():
    """Two convolutions and two dense layers, without pooling."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))  # noqa: E731
    net = [
        nets.conv(draw(3, 3, 2, 4), rng.normal(size=4), "tanh", stride=(2, 2), padding="SAME"),
        nets.conv(draw(2, 2, 4, 5), rng.normal(size=5), "softplus", padding="SAME"),
        nets.dense(draw(45, 6), None, "sigmoid"),
        nets.dense(draw(6, 3), rng.normal(size=3)),
    ]
    return net, rng.normal(size=(BATCH, 6, 6, 2))


def case(name):
    net, x, _ = (*unpooled(), None) if name == "unpooled" else make(name)
    labels = LABELS % net[-1].kernel.shape[1]
    return net, x, labels, one_hot_mean(net, x, labels)


def drawn(rule, net, x):
    """Inverses, and the same as the reference takes them; zeros for a last layer without."""
    feedback = rule.init(jax.random.key(1), bridge.apply_of(net), bridge.parameters(net), jnp.asarray(x))
    made = {f"{k}/kernel": np.zeros_like(layer.kernel) for k, layer in enumerate(net)} | feedback.learned
    return feedback, [None, *(np.asarray(made[f"{k}/kernel"]) for k in range(1, len(net)))]


def gradients(net, rule, feedback, x, labels):
    step = lrules.value_and_grad(bridge.apply_of(net), CLASSES, rule)
    return step(bridge.parameters(net), feedback, jnp.asarray(x), jnp.asarray(labels), rng=jax.random.key(1))[1]


NAMES = [*ALL_NETS, "unpooled"]


@pytest.mark.parametrize("first_target", TOP)
@pytest.mark.parametrize("name", mostly_slow(NAMES, ["deep", "unpooled"]))
def test_reference(name, first_target):
    """The targets; where there is pooling, an inverse with a decoder begins below it, and the reference's above it."""
    with jax.enable_x64(True):
        net, x, labels, e = case(name)
        for decoder in DECODERS if "conv" not in name else ("identity",):
            rule = DTP(0.5, first_target=first_target, decoder=DECODERS[decoder])
            feedback, listed = drawn(rule, net, x)
            assert set(feedback.learned) == {f"{k}/kernel" for k in range(1, len(net) - (first_target == "hidden"))}
            wanted, _ = reference.gradients(
                net, listed, x, e, step_size=0.5, top=TOP[first_target], activations=[None, *[decoder] * len(net)]
            )
            bridge.close(gradients(net, rule, feedback, x, labels).params, bridge.kernels_and_biases(wanted))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ["reconstruction", "difference", "jacobian"])
@pytest.mark.parametrize("name", mostly_slow(["shallow", "deep", "one_output", "unpooled"], ["deep", "unpooled"]))
def test_what_inverses_learn(name, kind, decoder):
    with jax.enable_x64(True):
        net, x, labels, _ = case(name)
        seen = []

        def noise(key, shape, dtype):
            seen.append(np.asarray(jax.random.normal(key, shape, dtype)))
            return jnp.asarray(seen[-1])

        rule = DTP(std=0.3, first_target="outputs", feedback_loss=kind, decoder=DECODERS[decoder], noise=noise)
        feedback, listed = drawn(rule, net, x)
        got = gradients(net, rule, feedback, x, labels)
        each = 2 if kind == "jacobian" else 1  # layer by layer, first at the input, then at the output
        assert len(seen) == each * (len(net) - 1)
        below, above = ([None, *(0.3 * n for n in seen[k::each])] for k in (0, each - 1))
        states = nets.forward(net, x).reads
        losses, wanted, _ = reference.feedback_gradients(
            net, listed, x, [None, *(n.reshape(r.shape) for n, r in zip(below[1:], states[1:], strict=True))], kind,
            top_noise=[None, *(n.reshape(len(x), -1) if net[k + 1].kernel.ndim == 2 else n
                               for k, n in enumerate(above[1:-1], 1)), above[-1]],
            activations=[None, *[decoder] * len(net)], variance=0.09 if kind == "jacobian" else 1.0,
        )  # fmt: skip
        bridge.close(got.feedback, by_name(wanted))
        bridge.close(got.report["feedback_loss"], sum(losses[1:]))


# ------------------------------------------------------------------------------------------------------------- limits


def chain(width=5, depth=4, seed=0):
    keys = jax.random.split(jax.random.key(seed), depth + 2)
    params = {f"w{i}": jnp.eye(width) + jax.random.normal(k, (width, width)) / width for i, k in enumerate(keys[2:])}

    def apply(p, x):
        for i in range(depth):
            x = x @ p[f"w{i}"]
        return x

    return apply, params, jax.random.normal(keys[0], (7, width)), jax.random.normal(keys[1], (7, width))


def stepped(apply, rule, feedback, params, x, y, loss=half_squared_error):
    return jax.jit(lrules.value_and_grad(apply, loss, rule))(params, feedback, x, y, rng=KEY)[1]


@pytest.mark.parametrize("decoder", [None, lambda u: 2 * u])
def test_exact_inverses_give_gauss_newton_targets(decoder):
    """Meulemans et al. 2020, Bengio 2020: the target of h_l is h_l - step J_l^-1 e, and the inverses have no loss."""
    with jax.enable_x64(True):
        apply, params, x, y = chain()
        rule = DTP(0.3, first_target="outputs", decoder=decoder)
        feedback = rule.init(KEY, apply, params, x)
        exact = {n: jnp.linalg.inv(params[n]).T / (1 if decoder is None else 2) for n in feedback.learned}
        got = stepped(apply, rule, feedback._replace(learned=exact), params, x, y)
        error, jacobian, h = (apply(params, x) - y) / len(x), jnp.eye(5), [x]
        for i in range(4):
            h.append(h[-1] @ params[f"w{i}"])
        for i in reversed(range(4)):
            newton = error @ jnp.linalg.inv(jacobian)  # (h - t) / step of the layer's output
            bridge.close(got.params[f"w{i}"], h[i].T @ newton)
            jacobian = params[f"w{i}"] @ jacobian
        assert got.report["feedback_loss"] < 1e-20
        assert max(float(jnp.max(abs(g))) for g in got.feedback.values()) < 1e-12


def test_one_hidden_layer_is_backprop():
    """The first target is that of backprop: no inverse is left, whatever the network does between."""
    with jax.enable_x64(True):
        net, x, labels, _ = case("shallow")
        rule = DTP()
        feedback, _ = drawn(rule, net, x)
        assert feedback == lrules.Feedback({}, {})
        got = gradients(net, rule, feedback, x, labels)
        step = lrules.value_and_grad(bridge.apply_of(net), CLASSES, lrules.backprop())
        bridge.close(got.params, step(bridge.parameters(net), feedback, jnp.asarray(x), jnp.asarray(labels))[1].params)


def networks_without_activations():
    key = jax.random.split(KEY, 9)
    draw = lambda k, *shape: jax.random.normal(k, shape) / shape[0] ** 0.5  # noqa: E731
    square = {n: draw(k, 5, 5) for n, k in zip("abcd", key, strict=False)}
    x = jax.random.normal(key[5], (4, 5))
    yield "chain", lambda p, x: x @ p["a"] @ p["b"] @ p["c"], square, x

    def branched(p, x):
        h = x @ p["a"]
        return (h @ p["b"] + h.T[::-1].T + h @ p["c"]) @ p["d"] + h

    yield "branched", branched, square, x
    yield "tied", lambda p, x: x @ p["a"] @ p["b"] @ p["b"] @ p["a"].T, square, x

    def scanned(p, x):
        h = lax.scan(jax.checkpoint(lambda h, w: (h + h @ w, None)), x @ p["a"], p["s"])[0]
        return h @ p["b"]

    yield "scanned", scanned, square | {"s": draw(key[6], 3, 5, 5)}, x

    def pooled(p, x):
        h = lax.conv(x, p["k"], (1, 1), "SAME")
        h = lax.reduce_window(h, 0.0, lax.add, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        h = lax.conv(h, p["l"], (1, 1), "SAME").reshape(len(x), -1)
        return h @ p["m"]

    kernels = {"k": draw(key[6], 3, 2, 3, 3), "l": draw(key[7], 4, 3, 2, 2), "m": draw(key[8], 16, 5)}
    yield "pooled", pooled, kernels, jax.random.normal(key[5], (4, 2, 4, 4))


@pytest.mark.parametrize("first_target", TOP)
def test_linear_layers_and_inverses_are_feedback_alignment(first_target):
    """Without activations and decoder a target goes down as the error of feedback alignment does, in every network."""
    for name, apply, params, x in networks_without_activations():
        rule = DTP(first_target="outputs", decoder=None)
        feedback = rule.init(KEY, apply, params, x)
        y = jnp.ones((4, 5))
        fixed = dict(feedback.learned)
        own = feedback
        if first_target == "hidden":  # the last layers have the true weights
            rule = DTP(decoder=None)
            own = rule.init(KEY, apply, params, x)
            fixed = {n: own.learned.get(n, params[n]) for n in fixed}
        got = stepped(apply, rule, own, params, x, y)
        step = lrules.value_and_grad(apply, half_squared_error, lrules.feedback_alignment())
        want = step(params, lrules.Feedback(fixed, {}), x, y)[1].params
        for layer in params:
            np.testing.assert_allclose(got.params[layer], want[layer], rtol=1e-4, atol=1e-5, err_msg=f"{name} {layer}")


def test_the_last_use_of_a_weight_has_no_inverse():
    """A weight that is used below, too, has one: only there the error goes down through it."""
    net = lambda p, x: x @ p["a"] @ p["b"] @ p["b"]  # noqa: E731
    params, x, y = {n: W["b"] / 6 + jnp.eye(6) for n in "ab"}, jnp.ones((4, 6)), jnp.zeros((4, 6))
    rule = DTP(decoder=None)
    feedback = rule.init(KEY, net, params, x)
    assert list(feedback.learned) == ["b"]
    e = net(params, x) / 4
    down = e @ params["b"].T
    got = stepped(net, rule, feedback, params, x, y).params
    bridge.close(got["a"], x.T @ (down @ feedback.learned["b"].T), 1e-5)
    bridge.close(got["b"], (x @ params["a"]).T @ down + (x @ params["a"] @ params["b"]).T @ e, 1e-5)


def test_jacobians_rest_at_the_transposed_jacobian():
    """Ernoult et al. 2022: over an orthonormal set of noises, a linear layer rests where B is W, and only there."""
    with jax.enable_x64(True):
        apply, params, _, _ = chain(depth=3)
        x = jnp.broadcast_to(jnp.arange(1.0, 6.0), (5, 5))  # each example gets one direction
        for decoder, factor in ((None, 1.0), (lambda u: 4 * u, 0.25)):
            rule = DTP(
                std=0.2, first_target="outputs", feedback_loss="jacobian", decoder=decoder,
                noise=lambda key, shape, dtype: 5**0.5 * jnp.eye(5, dtype=dtype),
            )  # fmt: skip
            feedback = rule.init(KEY, apply, params, x)
            for shift, rests in ((0.0, True), (0.1, False)):
                at = {name: factor * params[name] + shift for name in feedback.learned}
                got = stepped(apply, rule, feedback._replace(learned=at), params, x, x)
                for name, g in got.feedback.items():
                    assert (float(jnp.max(abs(g))) < 1e-12) == rests, name
            # The mean is 1/2 |J_g - J_f^T|^2 plus a constant, so its gradient is J_g - J_f^T.
            bridge.close(got.feedback["w2"], jnp.full((5, 5), 0.1 / factor) if factor == 1 else got.feedback["w2"])


@pytest.mark.parametrize(("kind", "largest"), [("jacobian", 20), ("difference", 65), ("reconstruction", 65)])
def test_inverses_that_learn(kind, largest):
    """With learned Jacobians the update comes near that of backprop; all losses fall."""
    keys = jax.random.split(jax.random.key(2), 6)
    params = {n: jax.random.normal(k, (12, 12)) / 12**0.5 for n, k in zip("abcd", keys, strict=False)}
    x, y = jax.random.normal(keys[4], (64, 12)), jax.random.normal(keys[5], (64, 12))
    net = lambda p, x: jnp.tanh(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]) @ p["d"]  # noqa: E731
    rule = DTP(feedback_loss=kind, decoder=None)
    feedback = rule.init(KEY, net, params, x)
    step = lrules.value_and_grad(net, half_squared_error, rule)

    def learn(feedback, key):
        grads = step(params, feedback, x, y, rng=key)[1]
        learned = jax.tree.map(lambda b, g: b - 0.05 * g, feedback.learned, grads.feedback)
        return feedback._replace(learned=learned), grads.report["feedback_loss"]

    later, losses = jax.jit(lambda f: lax.scan(learn, f, jax.random.split(KEY, 600)))(feedback)
    assert losses[-100:].mean() < losses[:100].mean()
    true = jax.grad(lambda p: half_squared_error(net(p, x), y).mean())(params)
    before, after = (
        float(lrules.diagnostics.total_angle(step(params, f, x, y, rng=KEY)[1].params, true)) for f in (feedback, later)
    )
    assert after < min(before, largest)


# ------------------------------------------------------------------------------------------------- what it is made of


def test_a_scan_over_layers_is_the_layers():
    """Stacked weights have stacked inverses; noise that does not depend on the key makes the losses equal, too."""
    with jax.enable_x64(True):
        weights = jax.random.normal(KEY, (3, 5, 5)) / 2
        params = {"w": weights, "first": weights[0] + 1, "last": weights[1]}
        apart = {"first": params["first"], "last": params["last"], **{f"w{i}": w for i, w in enumerate(weights)}}
        x, y = jax.random.normal(KEY, (4, 5)), jnp.ones((4, 5))
        layer = lambda h, w: (jax.nn.softplus(h @ w), None)  # noqa: E731

        def scanned(p, x):
            return lax.scan(layer, jnp.tanh(x @ p["first"]), p["w"])[0] @ p["last"]

        def unrolled(p, x):
            h = jnp.tanh(x @ p["first"])
            for i in range(3):
                h = layer(h, p[f"w{i}"])[0]
            return h @ p["last"]

        rule = DTP(feedback_loss="jacobian", noise=lambda key, shape, dtype: jnp.cos(jnp.arange(20.0)).reshape(shape))
        feedback = rule.init(KEY, scanned, params, x)
        (b,) = feedback.learned.values()
        got = stepped(scanned, rule, feedback, params, x, y)
        other = feedback._replace(learned={f"w{i}": m for i, m in enumerate(b)})
        want = stepped(unrolled, rule, other, apart, x, y)
        bridge.close(got.params["w"], jnp.stack([want.params[f"w{i}"] for i in range(3)]))
        bridge.close(got.params["first"], want.params["first"])
        bridge.close(got.feedback["w"], jnp.stack([want.feedback[f"w{i}"] for i in range(3)]))
        bridge.close(got.report, want.report)


def test_what_lies_between_a_layer_and_its_activation():
    """A normalisation and a residual belong to the layer: a perfect inverse of it all has no loss."""
    with jax.enable_x64(True):
        params = {"a": jnp.eye(4) * 2, "b": jnp.eye(4) * 3, "c": jnp.eye(4), "scale": jnp.full((1, 4), 5.0)}

        def net(p, x):
            h = jax.nn.relu(x @ p["a"]) + 1
            return jax.nn.relu(p["scale"] * (h @ p["b"]) + h) @ p["c"]

        x = jnp.abs(jax.random.normal(KEY, (3, 4))) + 1  # all units are active
        # The residual term is clean in the noisy pass, so h -> 15 h + clean h, and the noise comes back by 1/15.
        rule = DTP(std=0.01, feedback_loss="difference", decoder=None)
        feedback = lrules.Feedback({}, {"b": jnp.eye(4) / 15})
        assert stepped(net, rule, feedback, params, x, x).report["feedback_loss"] < 1e-20


def test_where_a_layer_ends():
    """At its activation; where that lies in another loop, branch or remat, at its bias or its output."""
    params, x = jax.tree.map(lambda v: v / 3, (W | {"bias": jnp.ones((1, 6))}, X))
    inside = lambda p, h: jnp.tanh(h @ p["b"] + p["bias"])  # noqa: E731
    nets_ = {
        "whole": inside,
        "in a remat": jax.checkpoint(inside),
        "in a jit": jax.jit(inside),
        "bias": lambda p, h: jnp.tanh(jax.checkpoint(lambda p, h: h @ p["b"] + p["bias"])(p, h)),
        "output": lambda p, h: jnp.tanh(jax.checkpoint(lambda p, h: h @ p["b"])(p, h) + p["bias"]),
        "branch": lambda p, h: lax.cond(h.sum() < 99, jnp.tanh, jnp.sin, h @ p["b"] + p["bias"]),
    }
    rule = DTP(noise=lambda key, shape, dtype: jnp.ones(shape, dtype))
    feedback = rule.init(KEY, lambda p, x: inside(p, jnp.tanh(x @ p["a"])) @ p["c"], params, x)
    h = jnp.tanh(x @ params["a"])
    z = (h + 0.1) @ params["b"]
    ends = dict.fromkeys(nets_, jnp.tanh(z + 1 / 3)) | {"bias": z + 1 / 3, "output": z, "branch": z + 1 / 3}
    for name, middle in nets_.items():
        net = lambda p, x, middle=middle: middle(p, jnp.tanh(x @ p["a"])) @ p["c"]  # noqa: E731
        got = stepped(net, rule, feedback, params, x, jnp.ones((4, 3))).report["feedback_loss"]
        wanted = 0.5 * jnp.sum((jnp.tanh(ends[name] @ feedback.learned["b"].T) - h - 0.1) ** 2) / 4
        bridge.close(got, wanted, 1e-5)


def test_numbers_may_be_traced():
    """Many steps and noises at once; without a decoder the step has no effect."""
    net = lambda p, x: jnp.tanh(mlp(p, x)) @ p["c"].T @ p["b"]  # noqa: E731
    y = jnp.ones((4, 6))

    def of(step, std, decoder):
        rule = DTP(step, std={"b": std, ".*": 0.1}, decoder=decoder)
        feedback = DTP().init(KEY, net, W, X)
        grads = lrules.value_and_grad(net, half_squared_error, rule)(W, feedback, X, y, rng=KEY)[1]
        return grads.params["a"], grads.feedback["b"]

    values = jnp.array([0.1, 2.0]), jnp.array([0.1, 0.5])
    for decoder in (jnp.tanh, None):
        many = jax.jit(jax.vmap(lambda step, std: of(step, std, decoder)))(*values)  # noqa: B023
        for i in range(2):
            alone = of(float(values[0][i]), float(values[1][i]), decoder)
            bridge.close(jax.tree.map(lambda leaf: leaf[i], many), alone, 1e-4)  # noqa: B023
        assert np.allclose(many[0][0], many[0][1], rtol=1e-4) == (decoder is None)
    slopes = jax.vmap(lambda slope: of(0.1, 0.1, lambda u: slope * u)[0])(jnp.array([1.0, 0.0]))
    assert slopes[0].any() and not slopes[1].any()  # a decoder may close over a traced number


def test_precision_of_half():
    """The difference of two targets is formed in float32: in bfloat16 a step of 1e-3 would vanish."""
    params, x = jax.tree.map(lambda v: v.astype(jnp.bfloat16) / 4, (W, X))
    net = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]  # noqa: E731
    rule = DTP(1e-3, first_target="outputs")
    y = jnp.ones((4, 3), jnp.bfloat16)
    feedback = rule.init(KEY, net, params, x)
    got = stepped(net, rule, feedback, params, x, y).params
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), (feedback, params, x, y))
    bridge.close(jax.tree.map(lambda v: v.astype(jnp.float32), got), stepped(net, rule, *wide).params, 0.05)


# ------------------------------------------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"step": 0.0}, ValueError, "step must be a finite number > 0, got 0.0"),
        ({"step": {"b": 0.1}}, ValueError, "step must be one finite number"),
        ({"std": -1}, ValueError, "std must be a finite number > 0, got -1"),
        ({"first_target": "top"}, ValueError, 'first_target must be "hidden" or "outputs", got \'top\''),
        ({"feedback_loss": "l2"}, ValueError, "one of 'reconstruction', 'difference', 'jacobian', got 'l2'"),
        ({"decoder": "tanh"}, TypeError, "decoder must be an elementwise function such as jnp.tanh, .* got a str"),
        ({"noise": 1.0}, TypeError, "noise must be a function .* got a float"),
        ({"init": 3}, TypeError, "init must be a function"),
    ],
)
def test_options(options, error, match):
    with pytest.raises(error, match=match):
        DTP(**options)


def test_what_is_refused_at_use():
    net = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]  # noqa: E731
    y = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="needs the loss .* lrules.value_and_grad"):
        lrules.transform(net, DTP())
    with pytest.raises(ValueError, match="std: 'd' matches no layer; the layers are 'b'"):
        DTP(std={"d": 1.0, ".*": 0.1}).init(KEY, net, W, X)
    feedback = DTP().init(KEY, net, W, X)
    for options, match in (
        ({"decoder": jnp.sum}, "decoder must be elementwise"),
        ({"noise": lambda key, shape, dtype: jnp.ones(2)}, r"noise.* must return the shape \(4, 6\) at the layer 'b'"),
    ):
        with pytest.raises(ValueError, match=match):
            stepped(net, DTP(**options), feedback, W, X, y)
    with pytest.raises(NotImplementedError, match="asks for 'rng'.*or another modifier"):
        stepped(net, lrules.quantize_update(DTP(), 3), feedback, W, X, y)
    with pytest.raises(ValueError, match="act.* on the network as a whole|cannot be part"):
        lrules.partition({"b": DTP(), ".*": lrules.backprop()})


def test_where_noise_cannot_follow():
    def branch(p, x):
        h = jnp.tanh(x @ p["a"])
        return lax.cond(h.sum() > 0, lambda h: jnp.tanh(h @ p["b"]), lambda h: h, h) @ p["c"]

    words = "the layer 'b' lies inside a cond, where difference_target_propagation cannot follow its noise"
    refused(branch, words, "move it out of the cond", rule=DTP())

    def both(p, x):
        h = jnp.tanh(x @ p["a"])
        return jnp.where(h.sum() > 0, jnp.tanh(h @ p["b"]), h) @ p["c"]

    assert stepped(both, DTP(), DTP().init(KEY, both, W, X), W, X, jnp.ones((4, 3))).params["a"].shape == (5, 6)


def test_noise_costs_nothing_where_it_is_not_used():
    """Without `grads.feedback` a compiled step has no noisy pass, and a step for the feedback alone no way down."""
    net = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]  # noqa: E731
    step = lrules.value_and_grad(net, half_squared_error, DTP(decoder=None))
    feedback, y = DTP().init(KEY, net, W, X), jnp.ones((4, 3))

    def products(part):
        run = jax.jit(lambda p: getattr(step(p, feedback, X, y, rng=KEY)[1], part))
        return run.lower(W).compile().as_text().count(" dot(")

    assert products("params") == 8  # three up, three gradients, one down through c and one through b's inverse
    assert products("feedback") == 4  # one up, one with noise, one down through the inverse, one gradient
