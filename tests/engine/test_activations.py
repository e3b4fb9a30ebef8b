"""What is found as an activation, what is not, and what is left in doubt."""

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import lrules
from lrules.engine.activations import treated
from lrules.engine.handlers import Frame, Handler
from lrules.network import Network
from tests.sampling import mostly_slow, pairs

nn = jax.nn


@jax.custom_vjp
def spike(x):
    return jnp.where(x > 0, 1.0, 0.0)


spike.defvjp(lambda x: (spike(x), x), lambda x, g: (g / (1 + jnp.abs(x)) ** 2,))


@jax.custom_jvp
def kinked(x):
    return jnp.maximum(x, 0.1 * x)


kinked.defjvp(lambda primals, tangents: (kinked(*primals), tangents[0]))


@jax.custom_vjp
def stopped_spike(x):
    return jax.lax.stop_gradient(jnp.sign(x)) * 1.0


stopped_spike.defvjp(lambda x: (stopped_spike(x), x), lambda x, g: (g / (1 + x * x),))


@jax.custom_jvp
def centred_tanh(x):
    return jnp.tanh(x - x.mean(-1, keepdims=True))


centred_tanh.defjvp(lambda primals, tangents: (centred_tanh(*primals), tangents[0]))


FOUND = {
    "relu": (nn.relu, "relu"),
    "relu6": (nn.relu6, "relu6"),
    "silu": (nn.silu, "silu"),
    "elu": (nn.elu, "elu"),
    "celu": (nn.celu, "celu"),
    "selu": (nn.selu, "selu"),
    "hard_tanh": (nn.hard_tanh, "hard_tanh"),
    "hard_sigmoid": (nn.hard_sigmoid, "hard_sigmoid"),
    "leaky_relu": (nn.leaky_relu, "leaky_relu"),
    "softplus": (nn.softplus, "softplus"),
    "mish": (nn.mish, "mish"),
    "gelu": (nn.gelu, "gelu"),
    "exact gelu": (lambda x: nn.gelu(x, approximate=False), "gelu"),
    "gelu by hand": (lambda x: 0.5 * x * (1 + jnp.tanh(0.79788 * (x + 0.044715 * x**3))), "gelu"),
    "tanh": (jnp.tanh, "tanh"),
    "scaled tanh": (lambda x: 1.7159 * jnp.tanh(0.6667 * x), "tanh"),
    "sigmoid": (nn.sigmoid, "sigmoid"),
    "silu by hand": (lambda x: x * nn.sigmoid(1.702 * x), "silu"),
    "sigmoid by hand": (lambda x: 1 / (1 + jnp.exp(-x)), "exp_div"),
    "softplus by hand": (lambda x: jnp.log(1 + jnp.exp(x)), "exp_log"),
    "maximum": (lambda x: jnp.maximum(x, 0), "max"),
    "clip": (lambda x: jnp.clip(x, -1, 1), "max_min"),
    "where": (lambda x: jnp.where(x > 0, x, 0), "gt_select_n"),
    "where and zeros_like": (lambda x: jnp.where(x > 0, x, jnp.zeros_like(x)), "gt_select_n"),
    "masked": (lambda x: x * (x > 0).astype(x.dtype), "gt_mul"),
    "abs": (jnp.abs, "abs"),
    "sin": (jnp.sin, "sin"),
    "custom_jvp": (kinked, "kinked"),
    "custom_vjp": (spike, "spike"),
    "custom_vjp that stops": (stopped_spike, "stopped_spike"),
    "comparison that stops": (lambda x: jnp.where(jax.lax.stop_gradient(x) > 0, x, 0), "gt_select_n"),
    "marked, stops": (lrules.activation(lambda x: x + jax.lax.stop_gradient(jnp.sign(x) - x)), "lambda"),
    "jit": (jax.jit(lambda x: jnp.where(x > 0, x, 0.01 * x)), "gt_select_n"),
    "remat": (jax.checkpoint(nn.gelu), "gelu"),
    "vmap": (jax.vmap(nn.relu), "relu"),
    "reshaped": (lambda x: nn.relu(x.reshape(-1)).reshape(x.shape), "relu"),
    "in bfloat16": (lambda x: nn.relu(x.astype(jnp.bfloat16)).astype(x.dtype), "relu"),
    "tanh of a mean": (lambda x: jnp.tanh(x.mean(-1, keepdims=True)) * jnp.ones_like(x), "tanh"),
    "marked square": (lrules.activation(jnp.square), "square"),
    "marked identity": (lrules.activation(lambda x: x), "lambda"),
}


def both_halves(a, b):
    """Of two values, what no elementwise function can make of them together."""
    return a[:, ::-1] + b


SEVERAL = {
    "relu, then tanh": (lambda x: jnp.tanh(nn.relu(x)), ["relu", "tanh"]),
    "relu plus tanh": (lambda x: nn.relu(x) + jnp.tanh(x), ["relu", "tanh"]),
    "relu twice": (lambda x: nn.relu(x) - nn.relu(-x), ["relu", "relu#2"]),
    "sine and cosine": (lambda x: jnp.sin(2 * x) * jnp.cos(2 * x[:, ::-1]), ["sin", "cos"]),
    "shared start": (lambda x: jnp.stack([jnp.sin(2 * x), jnp.cos(2 * x)]).sum(0), ["sin", "cos"]),
    "chained": (lambda x: (t := jnp.tanh(x)) + jnp.sin(t) * t.mean(), ["tanh", "sin"]),
    "glu's gate": (lambda x: jnp.repeat(nn.glu(x), 2, 1), ["sigmoid"]),
    "geglu": (jax.jit(lambda x: jax.jit(lambda a, b: nn.gelu(a) * b)(x, x[:, ::-1])), ["gelu"]),
    "straight through": (lambda x: (t := jnp.tanh(x)) + jax.lax.stop_gradient(jnp.round(t) - t), ["tanh", "round"]),
    "its own factor": (lambda x: x * jax.lax.stop_gradient(nn.sigmoid(x)), ["sigmoid"]),
    "residual relu": (lambda x: nn.relu(x + 2 * x[:, ::-1]) + x, ["relu"]),
    "residual where": (lambda x: jnp.where((h := x + 2 * x[:, ::-1]) > 0, h, 0), ["gt_select_n"]),
    "read bent and scaled": (lambda x: both_halves(jnp.sin(t := jnp.tanh(x)), 0.1 * t), ["tanh", "sin"]),
    "read scaled twice": (lambda x: both_halves(0.1 * (t := jnp.tanh(x)), 0.2 * t), ["tanh"]),
    "read in a formula and scaled": (lambda x: both_halves(1 / (1 + jnp.exp(y := -x)), 3 * y), ["exp_div"]),
    "two formulas of one": (
        lambda x: both_halves(1 / (1 + (y := jnp.exp(-x))), jnp.log(1 + y)),
        ["exp_div", "exp_log"],
    ),
    "read by a named one": (
        lambda x: both_halves(nn.relu(t := jnp.tanh(x)), jnp.sin(0.5 * t)),
        ["tanh", "relu", "sin"],
    ),
}


def layer_norm(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


NONE = {
    "identity": lambda x: x,
    "scale": lambda x: 2 * x + 1,
    "softmax": nn.softmax,
    "log_softmax": nn.log_softmax,
    "logsumexp": lambda x: x - nn.logsumexp(x, axis=-1, keepdims=True),
    "layer_norm": layer_norm,
    "standardize": nn.standardize,
    "rms_norm": lambda x: x * jax.lax.rsqrt(jnp.maximum((x**2).mean(-1, keepdims=True), 1e-6)),
    "unit length": lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6),
    "log-variance": lambda x: x + jnp.exp(x / 2) * x[:, ::-1],
    "dropout": lambda x: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), x / 0.5, 0),
    "mask": lambda x: jnp.where(jnp.arange(4) < 3, x, -1e9),
    "cast": lambda x: x.astype(jnp.bfloat16).astype(x.dtype),
    "max pooling": lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2), (1, 1), "SAME"),
    "said to be none": lrules.not_activation(jnp.tanh),
    "a whole said to be none": lrules.not_activation(lambda x: jnp.tanh(x) * x.mean()),
}

DOUBTED = {
    "square": jnp.square,
    "product with itself": lambda x: x * x,
    "exp": jnp.exp,
    "relu squared": lambda x: jnp.square(nn.relu(x)),
    "square, scaled": lambda x: 3 * jnp.square(x) + 1,
    "square beside": lambda x: x + jnp.square(x[:, ::-1]),
    "square, normalised": lambda x: (lambda y: y * jax.lax.rsqrt(y.mean(-1, keepdims=True)))(jnp.square(x)),
    "square and a skip": lambda x: (lambda h: h + jnp.square(h @ jnp.eye(h.shape[1])))(jnp.tanh(x)),
    "squares, pooled": lambda x: linen.avg_pool(jnp.square(x)[..., None], (2,), (1,), "SAME")[..., 0],
    "maxout": lambda x: jnp.maximum(x, x[:, ::-1]),
    "gated by another": lambda x: jnp.where(x[:, ::-1] > 0, x, 0),
    "marked softmax": lrules.activation(nn.softmax),
    "custom_jvp of a row": centred_tanh,
}


def network(f):
    return Network(lambda params, x: jnp.dot(f(jnp.dot(x, params["a"]) + params["c"]), params["b"]))


def arguments():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"a": (3, 4), "b": (4, 2), "c": (1, 4)}
    params = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=False)}
    return params, jax.random.normal(keys[3], (5, 3))


class Seen(Handler):
    activations = True

    def __init__(self):
        self.sites = []

    def activation(self, activation, fn, x, frame):
        self.sites.append(activation.site)
        frame.records[activation.site] = x
        return fn(x)


@pytest.fixture(autouse=True)
def relaxed():
    """Ranks and dtypes are the user's affair here."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def check(f, expected):
    params, x = arguments()
    net = network(f)
    graph = net.graph(params, x)
    assert [a.site for a in graph.activations] == expected
    assert not graph.doubts
    seen = Seen()

    @jax.jit
    def run(params, x):
        frame = Frame()
        return graph.run(jax.tree.leaves(params), [x], handlers=(seen,), frame=frame)[0], frame.records

    outputs, records = run(params, x)
    assert seen.sites == expected
    np.testing.assert_array_equal(outputs, jax.jit(net)(params, x))
    return records


@pytest.mark.parametrize("name", FOUND)
def test_found(name):
    f, expected = FOUND[name]
    check(f, [expected])


@pytest.mark.parametrize("name", ["relu", "gelu", "tanh", "where", "maximum", "silu"])
def test_starts_at_the_preactivation(name):
    params, x = arguments()
    (recorded,) = check(FOUND[name][0], [FOUND[name][1]]).values()
    np.testing.assert_allclose(recorded, jnp.dot(x, params["a"]) + params["c"], rtol=1e-6)


@pytest.mark.parametrize("name", SEVERAL)
def test_several(name):
    check(*SEVERAL[name])


@pytest.mark.parametrize("name", NONE)
def test_none(name):
    check(NONE[name], [])


@pytest.mark.parametrize("name", DOUBTED)
def test_doubted(name):
    graph = network(DOUBTED[name]).graph(*arguments())
    assert graph.doubts
    with pytest.raises(NotImplementedError, match=r"write it as lrules.not_activation\(f\)\(x\)") as refusal:
        treated(graph)
    assert ("lrules.activation(f)(x)" in str(refusal.value)) == any(not d.why for d in graph.doubts)  # marked already
    offered = eval(str(refusal.value).split("passing=")[1])  # noqa: S307  the set, as Python writes it
    assert treated(graph, frozenset(offered)) == graph.activations


def test_leaky_relu_with_a_learned_slope_is_doubted():
    params, x = arguments()
    net = Network(lambda p, x: (lambda h: jnp.where(h > 0, h, h * p["c"]))(jnp.dot(x, p["a"])))
    assert net.graph(params, x).doubts


BENDS = {
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": nn.sigmoid,
    "gelu": nn.gelu,
    "exact gelu": lambda x: nn.gelu(x, approximate=False),
    "maximum": lambda x: jnp.maximum(x, 0),
    "clip": lambda x: jnp.clip(x, -1, 1),
    "where": lambda x: jnp.where(x > 0, x, 0.1 * x),
}


@pytest.mark.parametrize("name", BENDS)
def test_factors_and_terms_around_are_none_of_it(name):
    """Without f' there remain the factors, the same for all activations; and the true f' gives the gradient."""
    f, x = BENDS[name], jax.random.normal(jax.random.key(0), (4, 3))
    params = {"a": jax.random.normal(jax.random.key(1), (3, 5)), "b": jax.random.normal(jax.random.key(2), (5, 2))}

    def gradient(around, rule):
        net = lrules.transform(lambda p, x: around(jnp.dot(x, p["a"])) @ p["b"], rule)
        return jax.grad(lambda p: net(p, lrules.Feedback({}, {}), x).sum())(params)["a"]

    bare, true = (rule(lrules.backprop()) for rule in (lrules.without_derivatives, lambda rule: rule))
    slope = lambda z: jax.vmap(jax.vmap(jax.grad(f)))(z)  # noqa: E731
    for around, factor in (
        (lambda z: 0.1 * f(z), 0.1),
        (lambda z: f(z / 3), 1 / 3),
        (lambda z: f(z + 1), 1),
        (lambda z: 1 - f(2 * z) / 4, -0.5),
    ):
        np.testing.assert_allclose(gradient(around, bare), factor * gradient(lambda z: z, true), rtol=1e-5)
        by_slope = gradient(around, lrules.replace_derivative(lrules.backprop(), slope))
        np.testing.assert_allclose(by_slope, gradient(around, true), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("f", [jnp.tanh, nn.relu, lambda x: 1 / (1 + jnp.exp(-x))])
def test_the_factor_of_average_pooling_is_none_of_it(f):
    x, params = jnp.ones((2, 4, 4, 1)), {"k": jnp.ones((3, 3, 1, 2)), "b": jnp.ones((8, 3))}

    def gradient(rule):
        def apply(p, x):
            layout = ("NHWC", "HWIO", "NHWC")
            h = jax.lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=layout)
            return f(linen.avg_pool(h, (2, 2), (2, 2))).reshape(2, -1) @ p["b"]

        net = lrules.transform(apply, rule)
        return jax.grad(lambda p: net(p, lrules.Feedback({}, {}), x).sum())(params)["k"]

    slope = lambda z: jax.jvp(f, (z,), (jnp.ones_like(z),))[1]  # noqa: E731
    by_slope = gradient(lrules.replace_derivative(lrules.backprop(), slope))
    np.testing.assert_allclose(by_slope, gradient(lrules.backprop()), rtol=1e-5)


def test_a_sigmoid_by_hand_keeps_its_sign():
    """The minus of exp(-x) belongs to the formula."""
    f = lrules.transform(lambda w, x: 1 / (1 + jnp.exp(-(x @ w))), lrules.without_derivatives(lrules.backprop()))
    w, x = jnp.ones((3, 1)), jnp.ones((1, 3))
    assert (jax.grad(lambda w: f(w, lrules.Feedback({}, {}), x).sum())(w) == 1).all()


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_pooling_before_the_activation(pool):
    model = linen.Sequential([
        linen.Conv(3, (3, 3)), lambda x: getattr(linen, f"{pool}_pool")(x, (2, 2), (2, 2)), jnp.tanh,
        lambda x: x.reshape(x.shape[0], -1), linen.Dense(2),
    ])  # fmt: skip
    x = jnp.ones((2, 4, 4, 1))
    graph = Network(model.apply).graph(model.init(jax.random.key(0), x), x)
    assert [a.name for a in graph.activations] == ["tanh"] and not graph.doubts


@pytest.mark.parametrize("norm", [linen.LayerNorm, linen.RMSNorm, linen.GroupNorm, linen.BatchNorm])
def test_flax_normalisation_is_none(norm):
    options = {"num_groups": 2} if norm is linen.GroupNorm else {}
    options |= {"use_running_average": False} if norm is linen.BatchNorm else {}
    model = linen.Sequential([linen.Dense(4), norm(**options), linen.relu, linen.Dense(2)])
    x = jnp.ones((2, 3))
    variables = model.init(jax.random.key(0), x)
    net = Network(lambda p, x: model.apply(p, x, mutable=["batch_stats"])[0])
    graph = net.graph(variables, x)
    assert [a.name for a in graph.activations] == ["relu"] and not graph.doubts


def test_attention_and_dropout_hold_none():
    model = linen.Sequential([linen.MultiHeadDotProductAttention(2, qkv_features=4), linen.LayerNorm(), linen.Dense(4)])
    x = jnp.ones((2, 5, 4))
    graph = Network(model.apply).graph(model.init(jax.random.key(0), x), x)
    assert not graph.activations and not graph.doubts


def test_gates_of_an_lstm():
    model = linen.RNN(linen.OptimizedLSTMCell(3))
    x = jnp.ones((2, 5, 4))
    params = model.init(jax.random.key(0), x)
    graph = Network(model.apply).graph(params, x)
    assert sorted(a.name for a in graph.activations) == ["sigmoid"] * 3 + ["tanh"] * 2
    assert all(a.scope == ("scan",) for a in graph.activations) and not graph.doubts
    frame = Frame()
    outputs, _ = graph.run(jax.tree.leaves(params), [x], handlers=(Seen(),), frame=frame)
    np.testing.assert_array_equal(outputs, model.apply(params, x))
    assert all(r.shape == (5, 2, 3) for r in frame.records.values())


def test_a_constant_array_inside_a_scan():
    slopes = np.asarray(0.1, np.float32)

    def apply(w, x):
        def body(h, _):
            h = jnp.dot(h, w)
            return jnp.maximum(h, slopes * h), None

        return jax.lax.scan(body, x, None, length=3)[0]

    w, x = jnp.eye(3) * 0.9, jnp.ones((2, 3))
    graph = Network(apply).graph(w, x)
    assert [a.name for a in graph.activations] == ["max"]
    outputs, _ = graph.run([w], [x], handlers=(Seen(),), frame=Frame())
    np.testing.assert_array_equal(outputs, apply(w, x))


def test_data_alone_pass_through_no_activation():
    params, x = arguments()
    graph = Network(lambda p, x: jnp.dot(jnp.tanh(x), nn.relu(p["a"]))).graph(params, x)
    assert not graph.activations and not graph.doubts


NAMES = ["relu", "relu6", "silu", "elu", "celu", "selu", "gelu", "hard_tanh", "hard_sigmoid", "hard_silu", "leaky_relu",
         "softplus", "soft_sign", "mish", "squareplus", "sparse_plus", "sparse_sigmoid", "log_sigmoid", "sigmoid",
         "tanh"]  # fmt: skip
MAPPED = {name: getattr(nn, name) for name in NAMES} | {
    "where": lambda h: jnp.where(h > 0, h, 0),
    "where and zeros_like": lambda h: jnp.where(h > 0, h, jnp.zeros_like(h)),
    "where, twice": lambda h: jnp.where(h > 0, h, 0.5 * jnp.expm1(jnp.where(h > 0, 0, h))),
    "lax.select": lambda h: jax.lax.select(h > 0, h, jnp.full_like(h, 0.1)),
    "maximum of zeros": lambda h: jnp.maximum(h, jnp.zeros_like(h)),
    "clip": lambda h: jnp.clip(h, -1, 1),
    "sinc, marked": lrules.activation(jnp.sinc),
    "softplus with base two": lambda h: jnp.log2(1 + jnp.exp2(h)),
    "jitted": jax.jit(lambda h: jnp.where(h > 0.5, h, 0.1 * h)),
}


@pytest.mark.parametrize("name", mostly_slow(MAPPED, ("elu", "selu", "gelu", "relu", "silu", "jitted", "softplus")))
def test_vmap_changes_no_activation(name):
    """Batches at either end of the hidden tensor, of the size of other axes too, and in loops within loops."""
    params = {"a": jax.random.normal(jax.random.key(0), (4, 4)), "b": jax.random.normal(jax.random.key(1), (2, 4))}
    x, f = jax.random.normal(jax.random.key(2), (4, 3, 4)), MAPPED[name]

    def right(p, x):
        return f(x @ p["a"].T) @ p["b"].T

    def left(p, x):
        return p["b"] @ f(p["a"] @ x)

    nets = [
        right,
        jax.vmap(jax.vmap(left, (None, 0)), (None, 0)),
        jax.jit(jax.vmap(jax.jit(right), (None, 1), 1)),
        jax.vmap(jax.vmap(left, (None, 0)), (None, 1), 1),
    ]
    (site,) = (a.site for a in Network(right).graph(params, x).activations)
    for rule in (lrules.skipped_backprop(), lrules.dual_propagation(alpha=0.3)):
        found = []
        for net in nets:
            graph = Network(net).graph(params, x)
            assert [a.site for a in graph.activations] == [site] and not graph.doubts
            f_rule = lrules.transform(net, rule)

            def objective(p, f=f_rule):
                y = f(p, EMPTY, x)
                return (y**2).mean(), y

            step = jax.jit(lambda p, f=objective, net=net: (jax.grad(f, has_aux=True)(p), net(p, x)))
            (grads, y), plain = step(params)
            np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-6)
            found.append(grads["a"])
        for other in found[1:]:
            np.testing.assert_allclose(other, found[0], rtol=2e-4, atol=1e-5)


EMPTY = lrules.Feedback({}, {})


@jax.custom_jvp
def bent_and_slope(h):
    return jnp.tanh(h), 1 - jnp.tanh(h) ** 2


@bent_and_slope.defjvp
def _(primals, tangents):
    ((h,), (t,)), slope = (primals, tangents), 1 - jnp.tanh(primals[0]) ** 2
    return bent_and_slope(h), (slope * t, -2 * jnp.tanh(h) * slope * t)


OBSCURE = {  # nothing is known of the primitive, or the function has several results
    "top_k": lambda h: jax.lax.top_k(h, 4)[0],
    "bent_and_slope": lambda h: bent_and_slope(h)[0],
}


@pytest.mark.parametrize("name", OBSCURE)
@pytest.mark.parametrize("rule", [lrules.skipped_backprop, lrules.dual_propagation])
def test_what_may_bend_is_refused_and_can_pass(name, rule):
    """Rules that need activations do not let it through by its derivative unseen."""
    net = lambda p, x: OBSCURE[name](jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]  # noqa: E731
    params, x = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 4)), "c": jnp.ones((4, 2))}, jnp.ones((5, 3))
    with pytest.raises(NotImplementedError, match=rf"nonlinearity {name} is not recognised .* passing={{'{name}'}}"):
        rule().init(jax.random.key(0), net, params, x)
    rule(passing=name).init(jax.random.key(0), net, params, x)
    lrules.feedback_alignment().init(jax.random.key(0), net, params, x)  # it needs no activations


polynomial = getattr(jax.lax, "polynomial", lambda h, c: c[0] + h * (c[1] + h * c[2]))
NEWER = {  # JAX 0.12 has primitives for these
    "log2": lambda h: jnp.log2(1 + jnp.exp2(h)),
    "one_minus_square": lambda h: jax.jvp(jnp.tanh, (h,), (jnp.ones_like(h),))[1],
    "polynomial": lambda h: jnp.tanh(polynomial(h, [0.0, 1.0, 0.5])),
}


@pytest.mark.parametrize("name", NEWER)
def test_activations_of_formulas(name):
    """They are found, and marks are believed."""
    net = lambda p, x: NEWER[name](x @ p["a"]) @ p["b"]  # noqa: E731
    marked = lambda p, x: lrules.activation(NEWER[name])(x @ p["a"]) @ p["b"]  # noqa: E731
    params, x = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((5, 3))
    for each in (net, marked):
        graph = Network(each).graph(params, x)
        assert len(graph.activations) == 1 and not graph.doubts


def feedback(rule, net, params, x):
    return rule.init(jax.random.key(3), net, params, x)


@pytest.mark.foreign
@pytest.mark.parametrize("activation", [nn.relu, nn.elu, nn.selu, nn.gelu, lambda h: jnp.where(h > 0, h, 0)])
def test_equinox_under_vmap(activation):
    mlp = eqx.nn.MLP(3, 2, 4, 2, activation, key=jax.random.key(0))
    params, static = eqx.partition(mlp, eqx.is_inexact_array)
    net = Network(lambda p, x: jax.vmap(eqx.combine(p, static))(x))
    graph = net.graph(params, jnp.ones((4, 3)))
    assert len(graph.activations) == 2 and not graph.doubts


UNARY = [jnp.tanh, jnp.sin, nn.silu, nn.elu, nn.relu, lambda v: 0.1 * v, lambda v: v + 1, lambda v: -v, jnp.negative,
         lambda v: 1 / (1 + jnp.exp(-v)), lambda v: jnp.log(1 + jnp.exp(v)), lambda v: jnp.where(v > 0.1, v, 0.2 * v),
         lambda v: v.astype(jnp.float64)]  # fmt: skip
STEPS = st.tuples(st.integers(0, len(UNARY) + 1), st.integers(0, 3), st.integers(0, 3))


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.lists(STEPS, min_size=2, max_size=6), st.lists(st.integers(0, 6), min_size=1, max_size=2))
def test_values_that_many_read(steps, reads):
    """Graphs of elementwise functions are served, and weakly nudged they give the gradient."""

    def net(p, x):
        values = [x @ p["a"]]
        for kind, i, j in steps:
            one, other = values[-1 - i % len(values)], values[-1 - j % len(values)]
            values.append(UNARY[kind](one) if kind < len(UNARY) else one + 0.5 * other if kind == len(UNARY)
                          else one - jnp.tanh(other))  # fmt: skip
        return sum((values[-1 - i % len(values)] @ p["b"] for i in reads), jnp.sin(values[-1]) @ p["b"])

    with jax.enable_x64(True):
        rng = np.random.default_rng(len(steps))
        params = {"a": jnp.asarray(rng.normal(size=(3, 4))), "b": jnp.asarray(rng.normal(size=(4, 2)))}
        x = jnp.asarray(rng.normal(size=(5, 3)))

        def gradient(rule):
            f = lrules.transform(net, rule, reduction="sum")
            weights = feedback(rule, net, params, x)
            return jax.jit(jax.grad(lambda p: (f(p, weights, x) ** 2).sum()))(params)

        expected = gradient(lrules.backprop())
        found = gradient(lrules.dual_propagation(beta=1e-5))
        for name in params:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6 * abs(expected[name]).max())
        for rule in (lrules.skipped_backprop(), lrules.without_derivatives(lrules.direct_feedback_alignment())):
            assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient(rule)))


def normalised(mean):
    def net(p, x):
        h = nn.relu(x @ p["a"])
        m = mean(h)
        v = jnp.maximum(0.0, mean(h * h) - m * m)
        return jnp.tanh((h - m) / jnp.sqrt(v + 1e-5) @ p["b"]) @ p["c"]

    return net


def named(mean):
    return jax.vmap(normalised(mean), (None, 0), axis_name="batch")


MEANS = {
    "pmean": named(lambda h: jax.lax.pmean(h, "batch")),
    "psum": named(lambda h: jax.lax.psum(h, "batch") / jax.lax.psum(1, "batch")),
    "all_gather": named(lambda h: jax.lax.all_gather(h, "batch").mean(0)),
    "of no axes too": named(lambda h: jax.lax.pmean(h.mean(()), "batch")),
}
RULES = {
    "feedback alignment": lrules.feedback_alignment(),
    "dual": lrules.dual_propagation(alpha=0.3),
    "dual, weak": lrules.dual_propagation(beta=1e-3),
    "skipped": lrules.skipped_backprop(),
    "no derivatives": lrules.without_derivatives(lrules.direct_feedback_alignment()),
}


@pytest.mark.parametrize(
    ("mean", "rule"),
    mostly_slow(pairs(MEANS, RULES), [*(("pmean", r) for r in RULES if r != "dual"), *((m, "dual") for m in MEANS)]),
)
def test_normalisation_over_a_named_axis(mean, rule):
    keys, rule = jax.random.split(jax.random.key(0), 5), RULES[rule]
    params = {"a": jax.random.normal(keys[0], (3, 6)).at[:, 0].set(-9.0)}  # a dead neuron
    params |= {"b": jax.random.normal(keys[1], (6, 6)), "c": jax.random.normal(keys[2], (6, 2))}
    x, t = abs(jax.random.normal(keys[3], (8, 3))), jax.random.normal(keys[4], (8, 2))
    found = []
    for net in (normalised(lambda h: h.mean(0)), MEANS[mean]):
        graph = Network(net).graph(params, x)
        assert [a.site for a in graph.activations] == ["relu", "tanh"] and not graph.doubts
        step = lrules.value_and_grad(net, lambda y, t: ((y - t) ** 2).sum(-1), rule)
        found.append(jax.jit(step)(params, feedback(rule, net, params, x), x, t)[1].params)
    for name in params:
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_normalisation_over_a_mesh_axis(check_vma):
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    net = normalised(lambda h: jax.lax.pmean(h.mean(0), "batch"))
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 4)), "c": jnp.ones((4, 2))}

    def inside(params, x):
        graph = Network(net).graph(params, x)
        assert [a.site for a in graph.activations] == ["relu", "tanh"] and not graph.doubts
        return net(params, x)

    specs = (spec(), spec("batch"))
    jax.shard_map(inside, mesh=mesh, in_specs=specs, out_specs=spec("batch"), check_vma=check_vma)(
        params, jnp.ones((4, 3))
    )


@pytest.mark.parametrize("join", [jnp.stack, jnp.concatenate])
def test_statistics_that_devices_sum_together(join):
    """Flax joins both means for one sum over devices, and cuts them apart again. What a model cuts is no statistic."""
    mesh, spec = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec

    def net(p, x):
        h = jnp.tanh(x @ p["a"])
        both = jax.lax.pmean(join([h.mean(0), (h * h).mean(0)]), "batch").reshape(-1)
        v = jnp.maximum(0.0, 1.0 * both[4:] - both[:4] ** 2)
        return jnp.maximum(0.0, ((h - both[None, :4]) / jnp.sqrt(v + 1e-5)[None])[:, :3]) @ p["b"]

    def inside(params, x):
        graph = Network(net).graph(params, x)
        assert [a.site for a in graph.activations] == ["tanh", "max"] and not graph.doubts
        pooled = lambda p, x: jnp.maximum(0.0, (x @ p["a"])[:, None].mean(1)[:, :3]) @ p["b"]  # noqa: E731
        assert [a.site for a in Network(pooled).graph(params, x).activations] == ["max"]
        return net(params, x)

    params, specs = {"a": jnp.ones((3, 4)), "b": jnp.ones((3, 2))}, (spec(), spec("batch"))
    jax.shard_map(inside, mesh=mesh, in_specs=specs, out_specs=spec("batch"))(params, jnp.ones((4, 3)))


@pytest.mark.foreign
@pytest.mark.parametrize("rule", RULES)
def test_batch_norm_of_equinox(rule):
    rule = RULES[rule]
    norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")
    first, last = (eqx.nn.Linear(*shape, key=jax.random.key(i)) for i, shape in enumerate([(3, 4), (4, 2)]))
    params, static = eqx.partition((first, norm, last), eqx.is_inexact_array)

    def mapped(p, x):
        first, norm, last = eqx.combine(p, static)
        return jax.vmap(lambda x: last(nn.elu(norm(first(x), eqx.nn.State(norm))[0])), axis_name="batch")(x)

    def plain(p, x):
        first, norm, last = p
        h = x @ first.weight.T + first.bias
        h = (h - h.mean(0)) / jnp.sqrt(((h - h.mean(0)) ** 2).mean(0) + norm.eps) * norm.weight + norm.bias
        return nn.elu(h) @ last.weight.T + last.bias

    x, found = jax.random.normal(jax.random.key(2), (6, 3)), []
    for net in (plain, mapped):
        assert [a.site for a in Network(net).graph(params, x).activations] == ["elu"]
        f = lrules.transform(net, rule)
        weights = feedback(rule, plain, params, x)
        found.append(jax.jit(jax.grad(lambda p, f=f, b=weights: (f(p, b, x) ** 2).mean()))(params))
    for one, other in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
