"""The output error below a softmax or the like at a network's end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.experimental import sparse

import lrules
from tests.bridge import close
from tests.test_closed_world import (
    DFA,
    FA,
    KEY,
    SEQUENCE,
    B,
    X,
    arrays,
    encode,
    marked,
    named,
    objective,
    outputs,
    rand,
    weights,
)

pytestmark = pytest.mark.foreign  # models as people write them, with JAX's ordinary promotion
tanh, softmax, stop = jnp.tanh, jax.nn.softmax, lax.stop_gradient


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


E = weights(a=(4, 6), b=(6, 6), c=(6, 3), d=(6, 3), bias=(3,))
MASK = rand(98, B, 3) > -0.5


def logits(p, x):
    return encode(p, x) @ p["c"] + p["bias"]


def normal(z):
    e = jnp.exp(z - stop(z.max(-1, keepdims=True)))
    return e / e.sum(-1, keepdims=True)


def values(p, x):
    return tanh(x @ p["a"]) @ p["d"]


def recurrent(p, x, inside, outside):
    def step(h, x):
        h = tanh(x @ p["a"] + h @ p["b"])
        return h, inside(h @ p["c"] + p["bias"])

    return outside(lax.scan(step, jnp.zeros((B, 6)), x.swapaxes(0, 1))[1].swapaxes(0, 1))


same = lambda z: z  # noqa: E731
EDGES = np.arange(B), np.roll(np.arange(B), 1)  # each example is a node, and has an edge to the one before it
RING = np.eye(B)[EDGES[1]]


def brought(along):
    """A graph of the examples whose edges bring the outputs of the layer along; and a softmax above that."""
    nets = [lambda p, x, end=end: end(along(logits(p, x))) for end in (softmax, same)]
    net, low = (lrules.Network(net, signal_axes={"outputs": 0}) for net in nets)
    return net, softmax, low, X


HEADS = {
    "softmax": softmax, "log_softmax": jax.nn.log_softmax, "sigmoid": jax.nn.sigmoid, "tanh": tanh, "by_hand": normal,
    "log_sigmoid": jax.nn.log_sigmoid, "by_logsumexp": lambda z: z - jax.nn.logsumexp(z, axis=-1, keepdims=True),
    "log_of_softmax": lambda z: jnp.log(softmax(z) + 1e-8), "temperature": lambda z: softmax(z / 2.0),
    "clipped": lambda z: jnp.clip(softmax(z), 1e-6, 1 - 1e-6), "some_classes": lambda z: softmax(
        jnp.where(jnp.arange(3) < 2, z, -1e9)), "jit": jax.jit(softmax), "vmap": jax.vmap(jax.nn.log_softmax),
    "remat": jax.checkpoint(softmax), "soft_cap": lambda z: 30 * tanh(z / 30), "masked": lambda z: softmax(
        jnp.where(jnp.asarray(MASK), z, -1e9)),
}  # fmt: skip
SCALAR = lambda p, x: (encode(p, x) @ p["c"][:, :1])[:, 0]  # noqa: E731
ENDS = {name: (lambda p, x, f=f: f(logits(p, x)), f, logits, X) for name, f in HEADS.items()} | {
    "in_jit": (jax.jit(lambda p, x: softmax(logits(p, x))), softmax, logits, X),
    "in_vmap": (lambda p, x: jax.vmap(lambda x: softmax(logits(p, x)))(x), softmax, logits, X),
    "in_remat": (jax.checkpoint(lambda p, x: softmax(logits(p, x))), softmax, logits, X),
    "two": (
        lambda p, x: (softmax(logits(p, x)), values(p, x)),
        lambda z: (softmax(z[0]), z[1]),
        lambda p, x: (logits(p, x), values(p, x)),
        X,
    ),
    "two_heads": (
        lambda p, x: {"pi": jax.nn.log_softmax(logits(p, x)), "v": tanh(values(p, x))},
        lambda z: {"pi": jax.nn.log_softmax(z["pi"]), "v": tanh(z["v"])},
        lambda p, x: {"pi": logits(p, x), "v": values(p, x)},
        X,
    ),
    "aux": (
        lrules.Network(lambda p, x: (softmax(logits(p, x)), encode(p, x)), has_aux=True), softmax, logits, X,
    ),
    "edges": brought(lambda z: jax.ops.segment_sum(z[EDGES[0]], EDGES[1], num_segments=B)),
    "adjacency": brought(lambda z: jnp.asarray(RING) @ z),
    "sparse": brought(lambda z: sparse.BCOO.fromdense(jnp.asarray(RING), nse=B) @ z),
    "time": (lambda p, x: softmax(logits(p, x)), softmax, logits, SEQUENCE),
    "scalar": (lambda p, x: jax.nn.sigmoid(SCALAR(p, x)), jax.nn.sigmoid, SCALAR, X),
    "classes_first": (
        lambda p, x: softmax(logits(p, x).swapaxes(1, 2), axis=1),
        lambda z: softmax(z, axis=1),
        lambda p, x: logits(p, x).swapaxes(1, 2),
        SEQUENCE,
    ),
    "flat_inside": (
        lambda p, x: softmax(logits(p, x.reshape(-1, 4))).reshape(-1, 7, 3), softmax,
        lambda p, x: logits(p, x.reshape(-1, 4)).reshape(-1, 7, 3), SEQUENCE,
    ),
    "above_a_loop": (
        lambda p, x: recurrent(p, x, same, softmax), softmax, lambda p, x: recurrent(p, x, same, same), SEQUENCE,
    ),
    "in_a_loop": (
        lambda p, x: recurrent(p, x, softmax, same), softmax, lambda p, x: recurrent(p, x, same, same), SEQUENCE,
    ),
    "loop_of_layers": (
        lambda p, x: softmax(lax.fori_loop(0, 2, lambda _, h: tanh(h @ p["b"]), tanh(x @ p["a"])) @ p["c"]), softmax,
        lambda p, x: lax.fori_loop(0, 2, lambda _, h: tanh(h @ p["b"]), tanh(x @ p["a"])) @ p["c"], X,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", marked(ENDS, "in_a_loop", "inside a loop the error is taken at the outputs"))
def test_ends(name):
    """Outputs that are a function without parameters of a layer's outputs: the error sent is the one below it."""
    net, end, low, x = ENDS[name]
    rule = lrules.direct_feedback_alignment(adaptive=name in ("softmax", "two", "time", "above_a_loop"))
    params, x = arrays(E), arrays(x)
    feedback = rule.init(KEY, net, params, x)
    below, above = lrules.transform(low, rule), lrules.transform(net, rule)
    both = jax.jit(jax.grad(lambda p, f: objective(outputs(net, above(p, f, x))), (0, 1), allow_int=True))
    want = jax.jit(jax.grad(lambda p, f: objective(end(below(p, f, x))), (0, 1), allow_int=True))
    close(both(params, feedback), want(params, feedback))
    y = jax.jit(lambda p: outputs(net, above(p, feedback, x)))(params)
    plain = jax.jit(lambda p: outputs(net, net(p, x)))(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), y, plain))
    lrules.audit(net, rule, params, x)


def test_softmax_gets_targets_minus_outputs():
    """The error that cross-entropy sends through a softmax or log_softmax at the end is O - T, as in the papers."""
    params, x, t = arrays(E), arrays(X), softmax(jnp.asarray(rand(99, B, 3)))
    h1 = np.tanh(X @ E["a"])
    h2 = np.tanh(h1 @ E["b"])
    o = np.asarray(softmax(h2 @ E["c"] + E["bias"]))
    for end, loss in (
        (softmax, lambda y, t: -(t * jnp.log(y)).sum(-1)),
        (jax.nn.log_softmax, lambda y, t: -(t * y).sum(-1)),
    ):
        net = lambda p, x, f=end: f(logits(p, x))  # noqa: E731
        for error_at, e in (
            ("layer", (o - t) / B),
            ("outputs", np.asarray(-t / o / B if end is softmax else -t / B)),
        ):
            rule = lrules.direct_feedback_alignment(error_at=error_at)
            feedback = rule.init(KEY, net, params, x)
            got = lrules.value_and_grad(net, loss, rule)(params, feedback, x, t)[1].params
            b1, b2 = (np.asarray(feedback.fixed[n]) for n in "bc")
            d2 = (e @ b2) * (1 - h2**2)
            d1 = (e @ b1) * (1 - h1**2)
            top = (o - t) / B
            wanted = {"a": X.T @ d1, "b": h1.T @ d2, "c": h2.T @ top, "bias": np.asarray(top).sum(0)}
            close({n: got[n] for n in wanted}, wanted)


def test_ends_with_options():
    """With shared axes, at fewer places, and under a partition, the error is taken below the softmax, too."""
    params, x = arrays(E), arrays(SEQUENCE)
    net = lambda p, x: softmax(logits(p, x))  # noqa: E731
    direct = lrules.direct_feedback_alignment
    for rule in (
        direct(shared_axes=1), direct(at="b"), direct(rank=2), lrules.sign_error(DFA),
        lrules.partition({"b": FA, ".*": DFA}),
    ):  # fmt: skip
        feedback = rule.init(KEY, net, params, x)
        f, g = lrules.transform(net, rule), lrules.transform(logits, rule)
        got = jax.jit(jax.grad(lambda p, f=f, fb=feedback: objective(f(p, fb, x))))(params)
        close(got, jax.jit(jax.grad(lambda p, g=g, fb=feedback: objective(softmax(g(p, fb, x)))))(params))


class Classifier(nnx.Module):
    def __init__(self, rngs, end):
        self.hidden, self.norm = nnx.Linear(4, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)
        self.top, self.end = nnx.Linear(6, 3, rngs=rngs), end

    def __call__(self, x):
        return self.end(self.top(nnx.tanh(self.norm(self.hidden(x)))))


def test_an_end_with_state():
    """The same with the state of a module that comes in and goes out."""
    x, grads = jnp.asarray(X, jnp.float32), []
    for inner, outer in ((jax.nn.log_softmax, same), (same, jax.nn.log_softmax)):
        net, params, state = lrules.from_nnx(Classifier(nnx.Rngs(0), inner), with_state=True)
        f = lrules.transform(net, DFA)
        feedback = DFA.init(KEY, net, params, (state, x))
        grads.append(jax.grad(lambda p, f=f, fb=feedback, s=state, o=outer: objective(o(f(p, fb, (s, x))[0])))(params))
    close(*map(named, grads), tolerance=1e-5)
