"""Networks that many have: experts, products with a derivative of their own, graphs, Fourier layers, neural ODEs.

Each is held against explicit numbers, and against what every network owes: the forward pass bit for bit, feedback
alignment with the weights as feedback equal to `jax.grad`, nothing below a hidden signal under feedback of zero, the
same numbers jitted and not, and an audit that finds no other way of the error.
"""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import sparse

import lrules
from tests import bridge
from tests.reference.quantise import quantise

KEY = jax.random.key(0)
FA, DFA, BACKMAN = lrules.feedback_alignment(), lrules.direct_feedback_alignment(), lrules.backman()


def normal(shapes, scale=0.4):
    """Parameters by name."""
    return {n: scale * jax.random.normal(jax.random.fold_in(KEY, i), s) for i, (n, s) in enumerate(shapes.items())}


def objective(y):
    """With another slope for each output."""
    return jnp.sum(jnp.sin(y + jnp.arange(y.size, dtype=y.dtype).reshape(y.shape)))


def gradients(net, rule, params, feedback, inputs):
    f = lrules.transform(net, rule)
    return jax.jit(jax.grad(lambda p: objective(f(p, feedback, inputs))))(params)


def slope(net, params, inputs):
    """The error at the outputs, in float64."""
    return np.asarray(jax.jit(lambda p: jax.grad(objective)(net(p, inputs)))(params), np.float64)


def check(net, params, inputs, layers, below):
    """What every network owes, with exactly these layers; feedback of zero brings nothing to the parameters `below`."""
    assert [row["layer"] for row in lrules.describe(net, FA, params, inputs).layers] == layers
    feedback = FA.init(KEY, net, params, inputs)
    f = lrules.transform(net, FA)

    @jax.jit
    def learn(p, b):
        def run(f):
            return jax.grad(lambda p: (objective(y := f(p)), y), has_aux=True)(p)

        return run(lambda p: f(p, feedback._replace(fixed=b), inputs)), run(lambda p: net(p, inputs))

    (grads, ours), (true, plain) = learn(params, feedback.fixed)
    np.testing.assert_array_equal(ours, plain)
    assert all(not np.allclose(grads[name], true[name], rtol=0.01) for name in below)
    bridge.close(learn(params, {name: params[name] for name in feedback.fixed})[0][0], true, 1e-4)
    zero = learn(params, jax.tree.map(jnp.zeros_like, feedback.fixed))[0][0]
    assert {name for name, g in zero.items() if not jnp.any(g)} == set(below)
    lrules.audit(net, FA, params, inputs)


# ------------------------------------------------------------------------------------------------ mixtures of experts


EXPERTS = normal({"a": (4, 6), "gate": (6, 3), "e1": (3, 6, 8), "e2": (3, 8, 6), "c": (6, 2)})
TOKENS = jax.random.normal(jax.random.fold_in(KEY, 9), (5, 4))
LAYERS = ["a", "gate", "e1", "e2", "c"]


def routed(multiply):
    """A mixture in which each token goes to the likeliest expert; `multiply(p, h, i)` is what the experts `i` make."""

    def net(p, x):
        h = jnp.tanh(x @ p["a"])
        shares = jax.nn.softmax(h @ p["gate"])
        i = jnp.argmax(shares, -1)
        return (multiply(p, h, i) * jnp.take_along_axis(shares, i[:, None], 1)) @ p["c"]

    return net


def by_dispatch(p, h, i):
    y = jnp.einsum("bef,efd->bed", jnp.tanh(jnp.einsum("bd,edf->bef", h, p["e1"])), p["e2"])
    return jnp.einsum("bed,be->bd", y, jax.nn.one_hot(i, 3))


def by_gather(p, h, i):
    return jnp.einsum("bf,bfd->bd", jnp.tanh(jnp.einsum("bd,bdf->bf", h, p["e1"][i])), p["e2"][i])


def by_ragged_dot(p, h, i):
    order, sizes = jnp.argsort(i), jnp.bincount(i, length=3)
    y = jnp.tanh(lax.ragged_dot(h[order], p["e1"], sizes))
    return lax.ragged_dot(y, p["e2"], sizes)[jnp.argsort(order)]


DENSE, GATHERED, RAGGED = map(routed, (by_dispatch, by_gather, by_ragged_dot))
MIXTURES = {"dispatch": DENSE, "gather": GATHERED, "ragged_dot": RAGGED}


def mixture_gradients(p, x, e, feedback, direct=False):
    """By hand, token by token, in float64: feedback alignment, or direct feedback to h, the experts' and c's inputs."""
    p, b = ({k: np.asarray(v, np.float64) for k, v in tree.items()} for tree in (p, feedback))
    grads = {k: np.zeros_like(v) for k, v in p.items()}
    used = []
    for token, error in zip(np.asarray(x, np.float64), np.asarray(e, np.float64), strict=True):
        h = np.tanh(token @ p["a"])
        shares = np.exp(h @ p["gate"])
        shares /= shares.sum()
        i = int(shares.argmax())
        used.append(i)
        u = np.tanh(h @ p["e1"][i])
        y = u @ p["e2"][i]
        grads["c"] += np.outer(y * shares[i], error)
        at_c = error @ b["c"] if direct else b["c"] @ error
        logits = (at_c @ y) * shares[i] * (np.eye(3)[i] - shares)
        grads["gate"] += np.outer(h, logits)
        at_y = at_c * shares[i]
        grads["e2"][i] += np.outer(u, at_y)
        at_u = (error @ b["e2"] if direct else b["e2"][i] @ at_y) * (1 - u**2)
        grads["e1"][i] += np.outer(h, at_u)
        at_h = error @ b["gate"] if direct else b["e1"][i] @ at_u + b["gate"] @ logits
        grads["a"] += np.outer(token, at_h * (1 - h**2))
    assert len(set(used)) > 1
    return grads


@pytest.mark.parametrize("name", MIXTURES)
def test_experts(name):
    check(MIXTURES[name], EXPERTS, TOKENS, LAYERS, ["a", "gate", "e1", "e2"])


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("rule", [FA, lrules.kolen_pollack()])
def test_experts_by_hand(name, rule):
    net = MIXTURES[name]
    feedback = rule.init(KEY, net, EXPERTS, TOKENS)
    weights = {**feedback.fixed, **feedback.learned}
    assert {k: v.shape for k, v in weights.items()} == {k: EXPERTS[k].shape for k in LAYERS[1:]}
    wanted = mixture_gradients(EXPERTS, TOKENS, slope(net, EXPERTS, TOKENS), weights)
    bridge.close(gradients(net, rule, EXPERTS, feedback, TOKENS), wanted, 1e-4)
    if feedback.learned:
        f = lrules.transform(net, rule)
        fn = lambda b: objective(f(EXPERTS, feedback._replace(learned=b), TOKENS))  # noqa: E731
        bridge.close(jax.jit(jax.grad(fn))(feedback.learned), {k: wanted[k] for k in feedback.learned}, 1e-4)


def test_experts_of_which_each_token_reads_one_under_direct_feedback():
    feedback = DFA.init(KEY, GATHERED, EXPERTS, TOKENS)
    assert {k: v.shape for k, v in feedback.fixed.items()} == {"gate": (2, 6), "e2": (2, 8), "c": (2, 6)}
    e = slope(GATHERED, EXPERTS, TOKENS)
    wanted = mixture_gradients(EXPERTS, TOKENS, e, feedback.fixed, direct=True)
    bridge.close(gradients(GATHERED, DFA, EXPERTS, feedback, TOKENS), wanted, 1e-4)
    lrules.audit(GATHERED, DFA, EXPERTS, TOKENS)


def test_dispatched_experts_under_direct_feedback():
    """Every expert's hidden units get the error, those of tokens that are another's, too; the rest is as by gather."""
    feedback = DFA.init(KEY, DENSE, EXPERTS, TOKENS)
    assert {k: v.shape for k, v in feedback.fixed.items()} == {"gate": (2, 6), "e2": (2, 3, 8), "c": (2, 6)}
    grads = gradients(DENSE, DFA, EXPERTS, feedback, TOKENS)
    e = slope(DENSE, EXPERTS, TOKENS)
    wanted = mixture_gradients(EXPERTS, TOKENS, e, {**feedback.fixed, "e2": feedback.fixed["e2"][:, 0]}, direct=True)
    bridge.close(grads | {"e1": 0}, wanted | {"e1": 0}, 1e-4)
    h = np.tanh(np.asarray(TOKENS, np.float64) @ np.asarray(EXPERTS["a"], np.float64))
    u = np.tanh(np.einsum("bd,edf->bef", h, EXPERTS["e1"]))
    at_u = np.einsum("bo,oef->bef", e, feedback.fixed["e2"]) * (1 - u**2)
    bridge.close(grads["e1"], np.einsum("bd,bef->edf", h, at_u), 1e-4)


def test_sorted_tokens_under_direct_feedback():
    """Refused where the rows are in another order; the layers before and after are served, and right."""
    for rule in (DFA, lrules.partition({"e2": FA, ".*": DFA}), lrules.direct_feedback_alignment(at="e2")):
        with pytest.raises(ValueError, match="signal 'e[12]' .* cannot be found .*: give that layer a sequential"):
            rule.init(KEY, RAGGED, EXPERTS, TOKENS)
    landing = lrules.direct_feedback_alignment(at="gate|c")
    feedback = landing.init(KEY, RAGGED, EXPERTS, TOKENS)
    assert set(feedback.fixed) == {"gate", "c"}
    grads, others = (gradients(net, landing, EXPERTS, feedback, TOKENS) for net in (RAGGED, DENSE))
    bridge.close(grads, others, 1e-4)


def test_sorted_tokens_without_gates():
    """Nothing shows that the rows are back in their order: refused; what the sentence says is served."""

    def net(p, x):
        h = jnp.tanh(x @ p["a"])
        return by_ragged_dot(p, h, jnp.argmax(h @ p["gate"], -1)) @ p["c"]

    landing = lrules.direct_feedback_alignment(at="c")
    with pytest.raises(ValueError, match=r"signal_axes=\{'outputs': 0\}"):
        landing.init(KEY, net, EXPERTS, TOKENS)
    stated = lrules.Network(net, signal_axes={"outputs": 0, "^c$": 0})
    assert set(landing.init(KEY, stated, EXPERTS, TOKENS).fixed) == {"c"}


@pytest.mark.parametrize("alpha", [1.0, "gradient_norm"])
def test_experts_under_backman(alpha):
    """Each expert's neurons have norms of their own; those without a token learn nothing."""
    rule = lrules.backman(alpha)
    grads = gradients(DENSE, rule, EXPERTS, lrules.Feedback({}, {}), TOKENS)
    bridge.close(gradients(RAGGED, rule, EXPERTS, lrules.Feedback({}, {}), TOKENS), grads, 1e-4)
    norms = np.linalg.norm(grads["e2"], axis=1)
    used = np.asarray(jnp.any(grads["e2"] != 0, (1, 2)))
    assert 1 < used.sum() < 4 and not norms[~used].any()
    if alpha == 1.0:
        np.testing.assert_allclose(norms[used], 1, rtol=1e-4)
    lrules.audit(RAGGED, rule, EXPERTS, TOKENS)
    with pytest.raises(NotImplementedError, match="'e1', 'e2' backprop.. in a partition"):
        rule.init(KEY, GATHERED, EXPERTS, TOKENS)
    for others in (FA, lrules.backprop()):  # another rule for them, as the sentence says
        mixed = lrules.partition({"^e1$|^e2$": others, ".*": rule})
        feedback = mixed.init(KEY, GATHERED, EXPERTS, TOKENS)
        made = [gradients(net, mixed, EXPERTS, feedback, TOKENS) for net in (GATHERED, DENSE)]
        bridge.close(*made, 1e-4)


@pytest.mark.parametrize("rule", [lrules.sign_symmetry(), lrules.sign_symmetry("scaled"), lrules.backprop()])
def test_experts_are_one_function_in_three_forms(rule):
    feedback = rule.init(KEY, GATHERED, EXPERTS, TOKENS)
    first, *others = [gradients(net, rule, EXPERTS, feedback, TOKENS) for net in MIXTURES.values()]
    for grads in others:
        bridge.close(grads, first, 1e-4)


def test_experts_in_a_partition():
    """Backprop at the experts, feedback elsewhere: explicit numbers, with the weights as the experts' feedback."""
    rule = lrules.partition({"^e[12]$": lrules.backprop(), ".*": FA})
    for net in MIXTURES.values():
        feedback = rule.init(KEY, net, EXPERTS, TOKENS)
        assert set(feedback.fixed) == {"gate", "c"}
        weights = {"e1": EXPERTS["e1"], "e2": EXPERTS["e2"], **feedback.fixed}
        wanted = mixture_gradients(EXPERTS, TOKENS, slope(net, EXPERTS, TOKENS), weights)
        bridge.close(gradients(net, rule, EXPERTS, feedback, TOKENS), wanted, 1e-4)


def grouped(p, inputs):
    """Tokens that come sorted, with the sizes of their groups beside them."""
    x, sizes = inputs
    return lax.ragged_dot(jnp.tanh(lax.ragged_dot(jnp.tanh(x @ p["a"]), p["e1"], sizes)), p["e2"], sizes) @ p["c"]


def test_experts_that_another_network_makes():
    """Their weights come from codes, without a batch: grouped or dispatched, they are a layer of the same network."""
    sizes, group = jnp.array([2, 0, 3]), jnp.array([0, 0, 2, 2, 2])
    params = normal({"a": (4, 6), "code": (3, 5), "m1": (5, 7), "m2": (7, 48), "c": (8, 2)})

    def net(multiply):
        def apply(p, x):
            experts = jnp.tanh(jnp.tanh(p["code"] @ p["m1"]) @ p["m2"]).reshape(3, 6, 8)
            return jnp.tanh(multiply(jnp.tanh(x @ p["a"]), experts)) @ p["c"]

        return apply

    def dispatch(h, w):
        return jnp.einsum("bef,be->bf", jnp.einsum("bd,edf->bef", h, w), jax.nn.one_hot(group, 3))

    dispatched, ragged = net(dispatch), net(lambda h, w: lax.ragged_dot(h, w, sizes))
    described = lrules.describe(ragged, FA, params, TOKENS).layers
    assert [row["layer"] for row in described] == ["m1", "m2", "a", "code", "c"]
    for rule in (FA, lrules.sign_symmetry()):
        feedback = rule.init(KEY, ragged, params, TOKENS)
        made = [gradients(f, rule, params, feedback, TOKENS) for f in (ragged, dispatched)]
        bridge.close(*made, 1e-4)
    plain = jax.jit(jax.grad(lambda p: objective(ragged(p, TOKENS))))(params)
    assert not np.allclose(made[0]["a"], plain["a"], rtol=0.01)
    lrules.audit(ragged, FA, params, TOKENS)


def test_quantised_updates_of_experts():
    """Each token's own update, before the sum: by hand, the gradients of the tokens one by one."""
    rule = lrules.quantize_update(FA, 4)
    sizes = jnp.array([2, 0, 3])
    alone = jnp.repeat(jnp.eye(3, dtype=int), sizes, axis=0, total_repeat_length=5)
    params = {k: v for k, v in EXPERTS.items() if k != "gate"}
    sorted_tokens = lrules.Network(grouped, batch_axes=(0, None))
    cases = [
        (GATHERED, EXPERTS, TOKENS, lambda i: TOKENS[i : i + 1]),
        (sorted_tokens, params, (TOKENS, sizes), lambda i: (TOKENS[i : i + 1], alone[i])),
    ]
    for net, p, inputs, one in cases:
        feedback = FA.init(KEY, net, p, inputs)
        loss = lambda y, t: jnp.sum(t * jnp.sin(y), -1)  # noqa: E731
        targets = jnp.arange(1.0, 11).reshape(5, 2)
        step = lrules.value_and_grad(net, loss, rule)
        grads = jax.jit(step)(p, feedback, inputs, targets)[1].params
        plain = jax.jit(lrules.value_and_grad(net, loss, FA))
        each = [plain(p, feedback, one(i), targets[i : i + 1])[1].params for i in range(5)]
        wanted = {k: sum(quantise(g[k], 4, 2**-6) for g in each) / 5 for k in p}
        bridge.close(grads, wanted, 1e-4)


# --------------------------------------------------------------------------------- products with their own derivative


def rounded(x, step=1 / 8):
    return jnp.round(x / step) * step


@jax.custom_vjp
def rounding_dot(x, w):
    """Weight and activation on a fixed grid, straight through."""
    return rounded(x) @ rounded(w)


rounding_dot.defvjp(
    lambda x, w: (rounded(x) @ rounded(w), (rounded(x), rounded(w))), lambda r, d: (d @ r[1].T, r[0].T @ d)
)


def scales(v, axis):
    return jnp.maximum(jnp.max(jnp.abs(v), axis, keepdims=True), 1e-6) / 127


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def integer_dot(x, w, numbers):
    """A product of 8-bit integers, with scales by row of x and by column of w."""
    return integer_forward(x, w, numbers)[0]


def integer_forward(x, w, numbers):
    sx, sw = scales(x, 1), scales(w, 0)
    xi, wi = (jnp.clip(jnp.round(v / s), -127, 127).astype(jnp.int8) for v, s in ((x, sx), (w, sw)))
    y = lax.dot_general(xi, wi, numbers, preferred_element_type=jnp.int32).astype(jnp.float32)
    return y * sx * sw, (xi.astype(x.dtype) * sx, wi.astype(w.dtype) * sw)


integer_dot.defvjp(integer_forward, lambda numbers, r, d: (d @ r[1].T, r[0].T @ d))


@jax.custom_vjp
def tensor_dot(x, w):
    """One scale for the whole batch."""
    return tensor_forward(x, w)[0]


def tensor_forward(x, w):
    x, w = rounded(x, scales(x, None)), rounded(w, scales(w, None))
    return x @ w, (x, w)


tensor_dot.defvjp(tensor_forward, lambda r, d: (d @ r[1].T, r[0].T @ d))


@jax.custom_vjp
def through_float8(x):
    return x.astype(jnp.float8_e4m3fn).astype(jnp.float32)


through_float8.defvjp(lambda x: (through_float8(x), None), lambda _, d: (d,))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def precise_dot(x, w, numbers):
    return lax.dot_general(x, w, numbers)


@precise_dot.defjvp
def _(numbers, primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return lax.dot_general(x, w, numbers), lax.dot_general(x, dw, numbers) + lax.dot_general(dx, w, numbers)


MATMUL = (((1,), (0,)), ((), ()))
DOTS = {  # with what each makes of x and w
    "fixed grid": (rounding_dot, rounded, rounded),
    "integers": (
        lambda x, w: integer_dot(x, w, MATMUL),
        lambda x: rounded(x, scales(x, 1)),
        lambda w: rounded(w, scales(w, 0)),
    ),
    "scale of a tensor": (tensor_dot, *[lambda v: rounded(v, scales(v, None))] * 2),
    "float8": (lambda x, w: precise_dot(through_float8(x), through_float8(w), MATMUL), through_float8, through_float8),
}
DENSE_LAYERS = normal({"a": (4, 6), "b": (6, 6), "c": (6, 2)}, 0.7)


def quantised(dot):
    return lambda p, x: dot(jnp.tanh(dot(jnp.tanh(dot(x, p["a"])), p["b"])), p["c"])


def quantised_gradients(name, p, x, e, down, alpha=None):
    """By hand, straight through: `down(name, d)` is what goes down from a layer's arriving error d."""
    dot, of_x, of_w = DOTS[name]
    wide = lambda v: np.asarray(v, np.float64)  # noqa: E731
    h1 = jnp.tanh(dot(x, p["a"]))
    h2 = jnp.tanh(dot(h1, p["b"]))
    d, grads = wide(e), {}
    for layer, below in (("c", h2), ("b", h1), ("a", x)):
        raw = wide(of_x(below)).T @ d
        c = np.ones(raw.shape[1]) if alpha is None else alpha / np.linalg.norm(raw, axis=0)
        grads[layer] = raw * c
        d = down(layer, d * c, wide(of_w(p[layer]))) * (1 - wide(below) ** 2)
    return grads


@pytest.mark.parametrize("name", DOTS)
def test_quantised_products(name):
    net = quantised(DOTS[name][0])
    check(net, DENSE_LAYERS, TOKENS, ["a", "b", "c"], ["a", "b"])
    e = slope(net, DENSE_LAYERS, TOKENS)

    feedback = FA.init(KEY, net, DENSE_LAYERS, TOKENS)
    b = {k: np.asarray(DOTS[name][2](v), np.float64) for k, v in feedback.fixed.items()}  # rounded as the weights are
    wanted = quantised_gradients(name, DENSE_LAYERS, TOKENS, e, lambda k, d, w: d @ b.get(k, w).T)
    bridge.close(gradients(net, FA, DENSE_LAYERS, feedback, TOKENS), wanted, 1e-4)

    feedback = DFA.init(KEY, net, DENSE_LAYERS, TOKENS)
    b = {k: np.asarray(v, np.float64) for k, v in feedback.fixed.items()}
    wanted = quantised_gradients(name, DENSE_LAYERS, TOKENS, e, lambda k, d, w: e @ b[k] if k in b else d @ w.T)
    bridge.close(gradients(net, DFA, DENSE_LAYERS, feedback, TOKENS), wanted, 1e-4)

    wanted = quantised_gradients(name, DENSE_LAYERS, TOKENS, e, lambda k, d, w: d @ w.T, alpha=1.0)
    bridge.close(gradients(net, BACKMAN, DENSE_LAYERS, lrules.Feedback({}, {}), TOKENS), wanted, 1e-4)


@pytest.mark.parametrize("name", DOTS)
def test_quantised_updates_of_quantised_products(name):
    """The update of an example is its part of the batch's, with the scales of the batch."""
    net = quantised(DOTS[name][0])
    rule = lrules.quantize_update(FA, 4)
    feedback = FA.init(KEY, net, DENSE_LAYERS, TOKENS)
    e = slope(net, DENSE_LAYERS, TOKENS)
    b = {k: np.asarray(DOTS[name][2](v), np.float64) for k, v in feedback.fixed.items()}
    f = lrules.transform(net, rule, reduction="sum")
    grads = jax.jit(jax.grad(lambda p: objective(f(p, feedback, TOKENS))))(DENSE_LAYERS)
    wanted = {k: 0 for k in DENSE_LAYERS}
    for i in range(len(TOKENS)):
        alone = np.where(np.arange(len(TOKENS))[:, None] == i, e, 0)
        one = quantised_gradients(name, DENSE_LAYERS, TOKENS, alone, lambda k, d, w: d @ b.get(k, w).T)
        wanted = {k: wanted[k] + quantise(one[k], 4, 2**-6) for k in wanted}
    bridge.close(grads, wanted, 1e-4)


# -------------------------------------------------------------------------------------------------------------- graphs


NODES = 7
SENDERS = np.array([0, 1, 2, 3, 4, 5, 6, 0, 2])
RECEIVERS = np.array([1, 2, 3, 4, 5, 6, 0, 3, 5])
ADJACENCY = np.zeros((NODES, NODES), np.float32)
ADJACENCY[RECEIVERS, SENDERS] = 1
GRAPH = normal({"a": (4, 6), "b": (6, 6), "c": (6, 2)}, 0.7)
FEATURES = jax.random.normal(jax.random.fold_in(KEY, 10), (NODES, 4))


def passing(h, senders=SENDERS, receivers=RECEIVERS):
    return jax.ops.segment_sum(h[senders], receivers, num_segments=NODES)


def gcn(go):
    """Two graph convolutions and a third at the outputs; `go` brings messages along the edges."""
    return lambda p, x: go(jax.nn.relu(go(jax.nn.relu(go(x @ p["a"])) @ p["b"])) @ p["c"])


def edges_as_inputs(p, inputs):
    x, senders, receivers = inputs
    return gcn(lambda h: passing(h, senders, receivers))(p, x)


SPARSE = sparse.BCOO.fromdense(jnp.asarray(ADJACENCY))
GRAPHS = {
    "dense": (gcn(lambda h: jnp.asarray(ADJACENCY) @ h), FEATURES),
    "BCOO": (gcn(lambda h: SPARSE @ h), FEATURES),
    "segment_sum": (lrules.Network(gcn(passing), signal_axes=0), FEATURES),
    "by name": (lrules.Network(gcn(passing), signal_axes={"outputs": 0, "b|c": 0}), FEATURES),
    "edges": (
        lrules.Network(edges_as_inputs, batch_axes=(0, None, None), signal_axes=0),
        (FEATURES, jnp.asarray(SENDERS), jnp.asarray(RECEIVERS)),
    ),
}


def gcn_gradients(p, x, e, down, alpha=None):
    """By hand; `down(name, d)` is what goes down from the arriving error of the layer `name`, or lands there."""
    p, x, adjacency = {k: np.asarray(v, np.float64) for k, v in p.items()}, np.asarray(x, np.float64), ADJACENCY
    h1 = np.maximum(adjacency @ (x @ p["a"]), 0)
    h2 = np.maximum(adjacency @ (h1 @ p["b"]), 0)
    d, grads = adjacency.T @ e, {}
    for name, below in (("c", h2), ("b", h1), ("a", x)):
        raw = below.T @ d
        norm = np.linalg.norm(raw, axis=0)
        c = np.ones(raw.shape[1]) if alpha is None else alpha / np.where(norm > 0, norm, 1)
        grads[name] = raw * c
        if name != "a":
            d = adjacency.T @ (down(name, d * c, p[name]) * (below > 0))
    return grads


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(name):
    net, inputs = GRAPHS[name]
    check(net, GRAPH, inputs, ["a", "b", "c"], ["a", "b"])
    e = slope(net, GRAPH, inputs)
    for rule, down, alpha in (
        (FA, lambda b, layer, d, w: d @ b[layer].T, None),
        (DFA, lambda b, layer, d, w: e @ b[layer], None),
        (BACKMAN, lambda b, layer, d, w: d @ w.T, 1.0),
    ):
        feedback = rule.init(KEY, net, GRAPH, inputs)
        b = {k: np.asarray(v, np.float64) for k, v in feedback.fixed.items()}
        wanted = gcn_gradients(GRAPH, FEATURES, e, functools.partial(down, b), alpha)
        bridge.close(gradients(net, rule, GRAPH, feedback, inputs), wanted, 1e-4)


@pytest.mark.parametrize("name", ["dense", "segment_sum"])
def test_a_graph_that_ends_in_a_softmax(name):
    """The error is taken below it, at the logits of each node, which messages have made."""
    net, inputs = GRAPHS[name]
    soft = lrules.Network(lambda p, x: jax.nn.log_softmax(net(p, x)), signal_axes=0)
    targets = jax.nn.one_hot(jnp.arange(NODES) % 2, 2)
    loss = lambda y, t: -jnp.sum(t * y, -1)  # noqa: E731
    feedback = DFA.init(KEY, soft, GRAPH, inputs)
    grads = jax.jit(lrules.value_and_grad(soft, loss, DFA))(GRAPH, feedback, inputs, targets)[1].params
    e = np.asarray((jax.nn.softmax(net(GRAPH, inputs)) - targets) / NODES, np.float64)
    b = {k: np.asarray(v, np.float64) for k, v in feedback.fixed.items()}
    bridge.close(grads, gcn_gradients(GRAPH, FEATURES, e, lambda layer, d, w: e @ b[layer]), 1e-4)


def test_a_graph_that_does_not_say_where_its_nodes_lie():
    with pytest.raises(ValueError, match=r"nodes of one graph .* are, give .*signal_axes=\{'outputs': 0\}"):
        DFA.init(KEY, gcn(passing), GRAPH, FEATURES)
    said = {"outputs": 0}
    for name in "bc":
        with pytest.raises(ValueError, match=rf"hidden signal '{name}' .*signal_axes=\{{'\^{name}\$': 0\}}"):
            DFA.init(KEY, lrules.Network(gcn(passing), signal_axes=said), GRAPH, FEATURES)
        said[f"^{name}$"] = 0
    net = lrules.Network(gcn(passing), signal_axes=said)
    stated, inputs = GRAPHS["segment_sum"]
    feedback = DFA.init(KEY, net, GRAPH, inputs)
    bridge.close(*(gradients(n, DFA, GRAPH, feedback, inputs) for n in (net, stated)), 1e-6)


def test_layers_on_edges():
    """A layer that reads the edges has rows of its own: a sequential rule for it, as the sentence says."""

    def messages(p, x):
        return passing_messages(jnp.tanh((x @ p["a"])[SENDERS] @ p["b"])) @ p["c"]

    def passing_messages(m):
        return jax.ops.segment_sum(m, RECEIVERS, num_segments=NODES)

    check(messages, GRAPH, FEATURES, ["a", "b", "c"], ["a", "b"])
    net = lrules.Network(messages, signal_axes={"outputs": 0, "^c$": 0})
    with pytest.raises(ValueError, match="hidden signal 'b' of shape .9, 6. cannot be found .*a sequential rule"):
        DFA.init(KEY, net, GRAPH, FEATURES)
    rule = lrules.partition({"^b$": FA, ".*": DFA})
    feedback = rule.init(KEY, net, GRAPH, FEATURES)
    assert {k: v.shape for k, v in feedback.fixed.items()} == {"b": (6, 6), "c": (2, 6)}
    x, p = np.asarray(FEATURES, np.float64), {k: np.asarray(v, np.float64) for k, v in GRAPH.items()}
    h = (x @ p["a"])[SENDERS]
    m = np.tanh(h @ p["b"])
    e = slope(messages, GRAPH, FEATURES)
    d = (e @ np.asarray(feedback.fixed["c"], np.float64))[RECEIVERS] * (1 - m**2)
    gather = np.eye(NODES)[SENDERS]
    wanted = {"c": (np.eye(NODES)[RECEIVERS].T @ m).T @ e, "b": h.T @ d}
    wanted["a"] = x.T @ gather.T @ (d @ np.asarray(feedback.fixed["b"], np.float64).T)
    bridge.close(gradients(net, rule, GRAPH, feedback, FEATURES), wanted, 1e-4)


# ------------------------------------------------------------------------------------------------------ Fourier layers


LENGTH = 8
SEQUENCES = jax.random.normal(jax.random.fold_in(KEY, 11), (5, LENGTH, 3))
IMAGES = jax.random.normal(jax.random.fold_in(KEY, 12), (5, 4, 6, 3))


def between(inner, x, p):
    """Dense layers around what acts on channels first."""
    h = jnp.moveaxis(jnp.tanh(x @ p["a"]), -1, 1)
    return jnp.moveaxis(jnp.tanh(inner(p, h)), 1, -1) @ p["c"]


def long_convolution(p, h):
    """A causal convolution as long as the sequence, one kernel a channel, as state space models compute it."""
    n = 2 * LENGTH
    return jnp.fft.irfft(jnp.fft.rfft(h, n=n) * jnp.fft.rfft(p["k"], n=n)[None], n=n)[..., :LENGTH]


def filtered(p, h):
    """A filter given by its spectrum."""
    return jnp.fft.irfft(jnp.fft.rfft(h) * lax.complex(p["re"], p["im"])[None], n=LENGTH)


def periodic(p, h):
    """A periodic convolution in two dimensions."""
    return jnp.fft.irfft2(jnp.fft.rfft2(h) * jnp.fft.rfft2(p["k"])[None], s=(4, 6))


def operator(p, h):
    """A neural operator's layer: the lowest frequencies mixed over channels, and a way around."""
    low = jnp.einsum("bix,iox->box", jnp.fft.rfft(h)[..., :3], lax.complex(p["re"], p["im"]))
    return jnp.fft.irfft(jnp.pad(low, ((0, 0), (0, 0), (0, 2))), n=LENGTH) + jnp.einsum("bix,io->box", h, p["s"])


def operator_2d(p, h):
    low = jnp.einsum("bixy,ioxy->boxy", jnp.fft.rfft2(h)[..., :2, :2], lax.complex(p["re"], p["im"]))
    whole = jnp.zeros((len(h), 4, 4, 4), low.dtype).at[:, :, :2, :2].set(low)
    return jnp.fft.irfft2(whole, s=(4, 6))


ENDS = {"a": (3, 4), "c": (4, 2)}
FOURIER = {
    "long convolution": (long_convolution, {"k": (4, LENGTH)}, SEQUENCES, ["k"]),
    "filter": (filtered, {"re": (4, 5), "im": (4, 5)}, SEQUENCES, ["im"]),
    "periodic": (periodic, {"k": (4, 4, 6)}, IMAGES, ["k"]),
    "operator": (operator, {"re": (4, 4, 3), "im": (4, 4, 3), "s": (4, 4)}, SEQUENCES, ["im", "s"]),
    "operator 2d": (operator_2d, {"re": (4, 4, 2, 2), "im": (4, 4, 2, 2)}, IMAGES, ["im"]),
}


def fourier(name):
    inner, shapes, x, layers = FOURIER[name]
    return (lambda p, x: between(inner, x, p)), normal(ENDS | shapes, 0.6), x, ["a", *layers, "c"]


@pytest.mark.parametrize("name", FOURIER)
def test_fourier_layers(name):
    net, params, x, layers = fourier(name)
    check(net, params, x, layers, sorted(set(params) - {"c"}))


@pytest.mark.parametrize("name", ["long convolution", "periodic"])
def test_a_fourier_layer_is_the_convolution(name):
    """The same numbers as a layer of the circulant matrices of its kernels, with those of its feedback."""
    net, params, x, _ = fourier(name)
    sizes = (2 * LENGTH,) if name == "long convolution" else (4, 6)
    kept = (LENGTH,) if name == "long convolution" else (4, 6)
    feedback = FA.init(KEY, net, params, x)

    def matrices(k):  # [channel, *outputs, *inputs]
        k = np.pad(np.asarray(k, np.float64), [(0, 0), *((0, n - m) for n, m in zip(sizes, k.shape[1:], strict=True))])
        out = np.zeros((4, *kept, *kept))
        for i in np.ndindex(*kept):
            for j in np.ndindex(*kept):
                apart = np.mod(np.subtract(i, j), sizes)
                out[(slice(None), *i, *j)] = k[(slice(None), *apart)]
        return out.reshape(4, np.prod(kept), np.prod(kept))

    e = slope(net, params, x).reshape(5, -1, 2)
    wide = {k: np.asarray(v, np.float64) for k, v in params.items()}
    b = {k: np.asarray(v, np.float64) for k, v in feedback.fixed.items()}
    x = np.asarray(x, np.float64).reshape(5, -1, 3)
    h = np.tanh(x @ wide["a"])
    y = np.tanh(np.einsum("cij,bjc->bic", matrices(params["k"]), h))
    d = (e @ b["c"].T) * (1 - y**2)
    at_h = np.einsum("cij,bic->bjc", matrices(feedback.fixed["k"]), d)
    by_entry = np.einsum("bic,bjc->cij", d, h)
    units = np.eye(np.prod(kept)).reshape(-1, 1, *kept).repeat(4, 1)
    k = np.stack([(by_entry * matrices(unit)).sum((1, 2)) for unit in units])
    wanted = {"a": np.einsum("bji,bjc->ic", x, at_h * (1 - h**2)), "c": np.einsum("bic,bio->co", y, e)}
    wanted["k"] = k.T.reshape(params["k"].shape)
    bridge.close(gradients(net, FA, params, feedback, FOURIER[name][2]), wanted, 1e-4)


def test_a_filter_by_hand():
    """BackMAN's neurons are channels: the norm over all frequencies; direct feedback lands at the spectrum."""
    net, params, x, _ = fourier("filter")
    e = slope(net, params, x)
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    x = np.asarray(x, np.float64)
    h = np.tanh(x @ p["a"])
    spectrum = np.fft.rfft(h, axis=1)
    y = np.tanh(np.fft.irfft(spectrum * (p["re"] + 1j * p["im"]).T, n=LENGTH, axis=1))
    twice = np.array([1, 2, 2, 2, 1])[:, None]  # irfft counts the inner frequencies with their conjugates

    def at_spectrum(d):  # what goes down through irfft, as d(re) - i d(im)
        return np.conj(np.fft.rfft(d, axis=1)) * twice / LENGTH

    def below(g):  # what goes down from there through rfft
        return np.real(np.fft.fft(np.pad(g, ((0, 0), (0, LENGTH - 5), (0, 0))), axis=1))

    for rule in (FA, DFA, BACKMAN):
        feedback = rule.init(KEY, net, params, FOURIER["filter"][2])
        b = {k: np.asarray(v, np.float64) for k, v in feedback.fixed.items()}
        wanted = {"c": np.einsum("btc,bto->co", y, e)}
        c = 1.0
        if rule is BACKMAN:
            c = 1 / np.linalg.norm(wanted["c"], axis=0)
            wanted["c"] = wanted["c"] * c
        if rule is DFA:
            at_y = np.einsum("bo,otc->btc", e.reshape(5, -1), b["c"])
        else:
            at_y = (e * c) @ b.get("c", p["c"]).T
        g = at_spectrum(at_y * (1 - y**2))
        raw = (g * spectrum).sum(0).T  # [channel, frequency]
        c = 1 / np.linalg.norm(raw, axis=1, keepdims=True) if rule is BACKMAN else np.ones((4, 1))
        wanted |= {"re": raw.real * c, "im": -raw.imag * c}
        if rule is DFA:
            assert b["im"].shape == (2 * LENGTH, 4, 5)
            down = np.einsum("bo,ocf->bfc", e.reshape(5, -1), b["im"])
        else:
            down = g * (c * (b.get("re", p["re"]) + 1j * b.get("im", p["im"]))).T
        wanted["a"] = np.einsum("bti,btc->ic", x, below(down) * (1 - h**2))
        if rule is BACKMAN:
            wanted["a"] /= np.linalg.norm(wanted["a"], axis=0)
        got = gradients(net, rule, params, feedback, FOURIER["filter"][2])
        bridge.close(got, wanted, 1e-4)


@pytest.mark.parametrize("name", FOURIER)
def test_fourier_layers_under_direct_feedback(name):
    """Error goes no further than to each layer's own hidden signal, and reaches all that is below one."""
    net, params, x, _ = fourier(name)
    feedback = DFA.init(KEY, net, params, x)
    grads = gradients(net, DFA, params, feedback, x)
    assert all(jnp.any(g) for g in grads.values())
    for hidden in feedback.fixed:
        silent = feedback._replace(fixed={k: 0 * v if k == hidden else v for k, v in feedback.fixed.items()})
        changed = gradients(net, DFA, params, silent, x)
        if (name, hidden) != ("operator", "im"):  # whose error ends at the signal of the layer beside it
            assert [k for k in params if not np.allclose(changed[k], grads[k], rtol=1e-5)]
    lrules.audit(net, DFA, params, x)
    lrules.audit(net, BACKMAN, params, x)


# --------------------------------------------------------------------------------------------------------- neural ODEs


FIELD = normal({"a": (3, 4), "f": (4, 6), "g": (6, 4), "c": (4, 2)}, 0.7)
STARTS = jax.random.normal(jax.random.fold_in(KEY, 13), (5, 3))


def ode(adjoint):
    """A vector field of two layers, solved from a layer's outputs by two steps of Euler."""

    def net(p, x):
        field = lambda t, y, args: jnp.tanh(y @ args["f"]) @ args["g"]  # noqa: E731
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field), diffrax.Euler(), 0.0, 1.0, 0.5, jnp.tanh(x @ p["a"]),
            args={"f": p["f"], "g": p["g"]}, adjoint=adjoint, max_steps=4,
        )  # fmt: skip
        return solution.ys[-1] @ p["c"]

    return net


def unrolled(p, x):
    y = jnp.tanh(x @ p["a"])
    for _ in range(2):
        y = y + 0.5 * jnp.tanh(y @ p["f"]) @ p["g"]
    return y @ p["c"]


@pytest.mark.foreign
def test_neural_odes():
    """With the adjoint that differentiates the solver's own steps they are loops like others."""
    net = ode(diffrax.DirectAdjoint())
    check(net, FIELD, STARTS, ["a", "f", "g", "c"], ["a", "f", "g"])
    feedback = FA.init(KEY, net, FIELD, STARTS)
    bridge.close(*(gradients(n, FA, FIELD, feedback, STARTS) for n in (net, unrolled)), 1e-4)


ADJOINTS = [diffrax.RecursiveCheckpointAdjoint(), diffrax.BacksolveAdjoint()]


@pytest.mark.foreign
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda adjoint: type(adjoint).__name__)
def test_neural_odes_with_an_adjoint_of_their_own(adjoint):
    """The sentence names the adjoint that is served, and backprop() for the field, which works too."""
    net = ode(adjoint)
    for rule in (FA, BACKMAN, DFA):
        with pytest.raises(NotImplementedError, match="'f' .*DirectAdjoint.*'f', 'g' backprop.. in a partition"):
            rule.init(KEY, net, FIELD, STARTS)
    refused = lrules.refusals(net, FA, FIELD, STARTS)
    assert set(refused) == {"f", "g"}
    if isinstance(adjoint, diffrax.BacksolveAdjoint):
        return  # whose steps back are no gradient of the steps forward
    rule = lrules.partition({"^[fg]$": lrules.backprop(), ".*": FA})
    feedback = rule.init(KEY, net, FIELD, STARTS)
    weights = lrules.Feedback({"c": FIELD["c"]}, {})
    true = jax.jit(jax.grad(lambda p: objective(unrolled(p, STARTS))))(FIELD)
    bridge.close(gradients(net, rule, FIELD, weights, STARTS), true, 1e-4)
    assert set(feedback.fixed) == {"c"}


@pytest.mark.foreign
def test_neural_odes_under_direct_feedback():
    """Inside the solver's branches nothing can land: sequential rules there, as the sentence says."""
    net = ode(diffrax.DirectAdjoint())
    with pytest.raises(NotImplementedError, match="'f' lies inside a cond, .* use a sequential rule for it"):
        DFA.init(KEY, net, FIELD, STARTS)
    rule = lrules.partition({"^[fg]$": FA, ".*": DFA})
    assert set(rule.init(KEY, net, FIELD, STARTS).fixed) == {"f", "g", "c"}


# ---------------------------------------------------------------------------------------------------------------- loops


def test_loops():
    """In a while loop a layer is refused; the loops that the sentence names are served."""
    params = normal({"a": (4, 6), "b": (6, 6), "c": (6, 2)})
    body = lambda p, h: jnp.tanh(h @ p["b"])  # noqa: E731

    def loop(p, x):
        turn = lambda state: (state[0] + 1, body(p, state[1]))  # noqa: E731
        return lax.while_loop(lambda state: state[0] < 2, turn, (0, x @ p["a"]))[1] @ p["c"]

    for rule in (FA, DFA, BACKMAN):
        with pytest.raises(NotImplementedError, match="'b' .* while loop .*numbers as bounds.*fori_loop, or lax.scan"):
            rule.init(KEY, loop, params, TOKENS)
    served = [
        lambda p, x: lax.fori_loop(0, 2, lambda _, h: body(p, h), x @ p["a"]) @ p["c"],
        lambda p, x: lax.scan(lambda h, _: (body(p, h), None), x @ p["a"], None, length=2)[0] @ p["c"],
    ]
    plain = lambda p, x: body(p, body(p, x @ p["a"])) @ p["c"]  # noqa: E731
    feedback = FA.init(KEY, plain, params, TOKENS)
    for net in served:
        check(net, params, TOKENS, ["a", "b", "c"], ["a", "b"])
        bridge.close(*(gradients(n, FA, params, feedback, TOKENS) for n in (net, plain)), 1e-5)
        for rule in (DFA, BACKMAN):
            rule.init(KEY, net, params, TOKENS)
