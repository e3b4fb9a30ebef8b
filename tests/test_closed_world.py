"""The closed world: whatever brings error down by a parameter's own value is a layer, a bias or scale, or refused.

Each kind of network is written in many spellings, and once more by hand, in plain JAX, with two hooks: `layer`, a
product whose backward pass is written out, and `land`, which marks where direct feedback arrives. The numbers of every
spelling have to be those.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import lrules
from tests.bridge import close
from tests.sampling import mostly_slow

pytestmark = pytest.mark.foreign  # models as people write them, with JAX's ordinary promotion

tanh, softmax = jnp.tanh, jax.nn.softmax
KEY, B = jax.random.key(0), 5


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


def rand(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def weights(scale=0.5, **shapes):
    return {name: scale * rand(i, *shape) for i, (name, shape) in enumerate(shapes.items())}


def objective(y):
    return sum(
        jnp.sum(jnp.sin(1.0 + 1.7 * jnp.arange(a.size).reshape(a.shape)) * a + 0.3 * a**2) for a in jax.tree.leaves(y)
    )


def arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {lrules.network.parameter_name(path): jnp.asarray(leaf) for path, leaf in leaves}


def outputs(net, out):
    return out[0] if isinstance(net, lrules.Network) and net.has_aux else out


# ---------------------------------------------------------------------------------------------- the definition, by hand


def multiply(op, w, b, x):
    """`op(w, x)`, which brings down `op(b, .)^T d`, and to the weight what is true."""

    @jax.custom_vjp
    def run(w, b, x):
        return op(w, x)

    def backward(kept, d):
        w, b, x = kept
        return jax.vjp(lambda w: op(w, x), w)[1](d)[0], None, jax.vjp(lambda x: op(b, x), x)[1](d)[0]

    run.defvjp(lambda w, b, x: (op(w, x), (w, b, x)), backward)
    return run(w, b, x)


def matmul(w, x):
    return x @ w


def by_hand(oracle, params, inputs, feedback, rule):
    """The gradients by the definition: sequential, direct, or of the last layers only.

    `oracle(p, inputs, layer, land)`: `layer(weight, x, op, w=None)` multiplies by `weight(p)` (or by `w`, made of it),
    and brings down by `weight(feedback)`; `land(name, h)` is a hidden signal as it is read.
    """

    def run(p, signals=None, landed=None):
        stopped = jax.tree.map(lax.stop_gradient, p)

        def layer(weight, x, op=matmul, w=None):
            w = weight(p) if w is None else w
            return multiply(op, w, weight({**stopped, **feedback}), x) if rule == "sequential" else op(w, x)

        def land(name, h):
            if landed is not None:
                assert name not in landed
                landed[name] = h
            return h if rule == "sequential" else lax.stop_gradient(h)

        y = oracle(p, inputs, layer, land)
        sent = 0.0 if signals is None else sum(jnp.sum(signals[name] * h) for name, h in landed.items())
        return objective(y) + sent, y

    if rule != "direct":
        return jax.grad(lambda p: run(p)[0])(params)
    landed: dict[str, Any] = {}
    e = jax.grad(objective)(run(params, landed=landed)[1]).reshape(B, -1)
    signals = {}
    for name, h in landed.items():
        alike = feedback[name].ndim == h.ndim + 1 and feedback[name].shape[1:] == h.shape  # of all examples the sum
        b = feedback[name].reshape(-1, *(h.shape if alike else h.shape[1:]))
        signals[name] = jnp.einsum("bo,o...->...", e, b) if alike else jnp.einsum("bo,o...->b...", e, b)
    return jax.grad(lambda p: run(p, signals, {})[0])(params)


def fed(net, rule, params, inputs, feedback):
    """The gradients under a rule with this feedback."""
    f = lrules.transform(net, rule)
    return learned(net, lambda p: f(p, feedback, inputs), params)[1]


def learned(net, f, params):
    """What `f(params)` returns, and the gradient of the objective."""

    def run(p):
        out = f(p)
        return objective(outputs(net, out)), out

    gradients, out = jax.grad(run, has_aux=True)(params)
    return out, gradients


def beside(net, rule, params, inputs):
    """A function of feedback, compiled: what the network returns and learns under a rule, and without it."""

    @jax.jit
    def both(p, feedback):
        f = lrules.transform(net, rule)
        return learned(net, lambda p: f(p, feedback, inputs), p), learned(net, lambda p: net(p, inputs), p)

    return lambda feedback: both(params, feedback)


FA, DFA, LAST = lrules.feedback_alignment(), lrules.direct_feedback_alignment(), lrules.last_layer_only()


@dataclasses.dataclass
class Kind:
    """One network in several spellings, and by hand.

    Attributes:
      spellings: by name, functions or networks.
      below: the parameters that nothing reaches where feedback is zero.
      feedback: the parameters that get sequential feedback.
      direct: the hidden signals; None where there are several for one of the oracle's.
      routes: of some parameters, as the audit has to name them under feedback alignment.
      batch_axes: of spellings that are functions.
      refused: spellings that direct rules refuse.
      own: spellings with more hidden signals than the oracle has.
      brief: only sequential rules are tested, the others being as for another kind.
    """

    spellings: dict[str, Any]
    oracle: Callable
    params: dict
    inputs: Any
    below: str
    feedback: set[str]
    direct: set[str] | None
    routes: dict[str, str] = dataclasses.field(default_factory=dict)
    batch_axes: Any = 0
    refused: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    brief: bool = False


KINDS: dict[str, Kind] = {}


def marked(names, unseen, reason):
    """Parameters of a test, some of which show a limit that is known."""
    limit = [pytest.mark.xfail(strict=True, reason=reason)]
    return [pytest.param(n, marks=limit if n in unseen.split() else []) for n in names]


# ----------------------------------------------------------------------------------------------- weights chosen by data

X, TASK = rand(90, B, 4), np.array([0, 1, 2, 1, 0])
P = weights(a=(4, 6), e=(3, 6, 6), c=(6, 2))
KEEP = rand(91, B, 6, 6) > 0
KEYS = jax.random.split(KEY, B)


def first(p, x):
    return tanh(x @ p["a"])


def each(w, h):
    return jnp.einsum("bi,bio->bo", h, w)


def chosen(p, inputs, layer, land):
    x, task = inputs
    h = land("e", first(p, x))
    return layer(lambda q: q["c"], land("c", tanh(layer(lambda q: q["e"][task], h, each))))


def spelled(choose):
    """A network with a layer in the middle, `choose(p, h, task)`."""
    return lambda p, i: tanh(choose(p, first(p, i[0]), i[1])) @ p["c"]


def switch(h, k, p):
    return lax.switch(k, [lambda h, j=j: h @ p["e"][j] for j in range(3)], h)


def loop_over_experts(p, h, task):
    def step(total, expert):
        w, j = expert
        return total + jnp.where((task == j)[:, None], h @ w, 0.0), None

    return lax.scan(step, jnp.zeros_like(h), (p["e"], jnp.arange(3)))[0]


def one_hot(task, n=3):
    return jax.nn.one_hot(task, n, dtype=jnp.float64)


def whole(w):
    return jnp.broadcast_to(w, (B, 6, 6))


KINDS["chosen"] = Kind(
    {
        "gather": spelled(lambda p, h, k: each(p["e"][k], h)),
        "take": spelled(lambda p, h, k: each(jnp.take(p["e"], k, axis=0), h)),
        "gather_in_vmap": spelled(lambda p, h, k: jax.vmap(lambda h, k: h @ p["e"][k])(h, k)),
        "gather_of_a_gather": spelled(lambda p, h, k: each(p["e"][k][jnp.arange(B)[::-1]][::-1], h)),
        "one_hot": spelled(lambda p, h, k: each(jnp.einsum("be,eio->bio", one_hot(k), p["e"]), h)),
        "one_hot_in_vmap": spelled(
            lambda p, h, k: jax.vmap(lambda h, k: h @ jnp.tensordot(one_hot(k), p["e"], 1))(h, k)
        ),
        "select_n": spelled(
            lambda p, h, k: each(
                lax.select_n(jnp.broadcast_to(k[:, None, None], (B, 6, 6)).astype(jnp.int32), *map(whole, p["e"])), h
            )
        ),
        "where": spelled(
            lambda p, h, k: (
                lambda k: each(jnp.where(k == 0, p["e"][0], jnp.where(k == 1, p["e"][1], p["e"][2])), h)
            )(k[:, None, None])
        ),
        "switch_in_vmap": spelled(lambda p, h, k: jax.vmap(lambda h, k: switch(h, k, p))(h, k)),
        "switch_of_weights_in_vmap": spelled(
            lambda p, h, k: jax.vmap(lambda h, k: h @ lax.switch(k, [lambda j=j: p["e"][j] for j in range(3)]))(h, k)
        ),
        "cond_of_weights_in_vmap": spelled(
            lambda p, h, k: jax.vmap(
                lambda h, k: h @ lax.cond(k == 0, lambda: p["e"][0], lambda: p["e"][k])
            )(h, k)
        ),
        "every_expert_and_where": spelled(
            lambda p, h, k: sum(jnp.where((k == j)[:, None], h @ p["e"][j], 0.0) for j in range(3))
        ),
        "loop_over_experts": spelled(loop_over_experts),
        "loop_over_examples": spelled(lambda p, h, k: lax.map(lambda hk: hk[0] @ p["e"][hk[1]], (h, k))),
        "jit": spelled(lambda p, h, k: jax.jit(lambda p, h, k: each(p["e"][k], h))(p, h, k)),
        "remat": spelled(lambda p, h, k: jax.checkpoint(lambda p, h, k: each(p["e"][k], h))(p, h, k)),
    },
    chosen, P, (X, TASK), below="a e", feedback={"c", "e"}, direct={"c", "e"},
    routes={"a": "layer", "e": "layer, feedback", "c": "last layer, feedback"},
    refused=("loop_over_examples",), own=("loop_over_experts", "switch_in_vmap", "every_expert_and_where"),
)  # fmt: skip


def masked(p, inputs, layer, land):
    x, keep = inputs
    h = land("e", first(p, x))
    kept = jnp.asarray(keep, jnp.float64)
    return layer(lambda q: q["c"], land("c", tanh(layer(lambda q: q["e"][0] * kept, h, each))))


KINDS["masked"] = Kind(
    {
        "where": spelled(lambda p, h, m: each(jnp.where(m, p["e"][0], 0.0), h)),
        "cast": spelled(lambda p, h, m: each(p["e"][0] * m.astype(jnp.float64), h)),
        "in_vmap": spelled(lambda p, h, m: jax.vmap(lambda h, m: h @ (m * p["e"][0]))(h, m)),
        "select": spelled(lambda p, h, m: each(lax.select(m, whole(p["e"][0]), jnp.zeros((B, 6, 6))), h)),
        "both_branches": spelled(lambda p, h, m: each(jnp.where(m, p["e"][0], -0.0 * p["e"][1]), h)),
    },
    masked, P, (X, KEEP), below="a e", feedback={"c", "e"}, direct={"c", "e"},
    routes={"a": "layer", "e": "layer, feedback"},
)  # fmt: skip


def drop(key, w):
    return w * jax.random.bernoulli(key, 0.5, (6, 6)).astype(jnp.float64)


def dropped(p, inputs, layer, land):
    return masked(p, (inputs[0], jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (6, 6)))(inputs[1])), layer, land)


KINDS["drop_connect"] = Kind(
    {"keys": spelled(lambda p, h, keys: jax.vmap(lambda h, k: h @ drop(k, p["e"][0]))(h, keys))},
    dropped, P, (X, KEYS), below="a e", feedback={"c", "e"}, direct={"c", "e"},
)  # fmt: skip


def shared(p, inputs, layer, land):
    x, task = inputs
    h = land("e", first(p, x))
    return layer(lambda q: q["c"], land("c", tanh(layer(lambda q: q["e"][task], h))))


KINDS["chosen_for_all"] = Kind(
    {
        "index": spelled(lambda p, h, k: h @ p["e"][k]),
        "dynamic_index": spelled(lambda p, h, k: h @ lax.dynamic_index_in_dim(p["e"], k, keepdims=False)),
        "cond_of_weights": spelled(lambda p, h, k: h @ lax.switch(k, [lambda j=j: p["e"][j] for j in range(3)])),
        "switch": spelled(lambda p, h, k: switch(h, k, p)),
        "one_hot": spelled(lambda p, h, k: h @ jnp.tensordot(one_hot(k), p["e"], 1)),
    },
    shared, P, (X, np.asarray(2)), below="a e", feedback={"c", "e"}, direct={"c", "e"}, batch_axes=(0, None),
    refused=("switch",),
)  # fmt: skip


def bent(p, inputs, layer, land):
    x, task = inputs
    h = land("e", first(p, x))
    return layer(lambda q: q["c"], land("c", tanh(layer(lambda q: tanh(q["e"][task]), h, each))))


KINDS["chosen_and_bent"] = Kind(
    {
        "tanh_of_rows": spelled(lambda p, h, k: each(tanh(p["e"][k]), h)),
        "rows_of_tanh": spelled(lambda p, h, k: each(tanh(p["e"])[k], h)),
    },
    bent, P, (X, TASK), below="a e", feedback={"c", "e"}, direct={"c", "e"},
)  # fmt: skip

# ----------------------------------------------------------------------------------------------- layers without a batch

Y = np.linspace(0, 1, 9)[:, None]
T = weights(b1=(4, 8), b2=(8, 6), t1=(1, 8), t2=(8, 8), t3=(8, 6), t1b=(8,))


def branch(p, u):
    return tanh(u @ p["b1"]) @ p["b2"]


def trunk(p, y, bend=tanh):
    return bend(bend(y @ p["t1"] + p["t1b"]) @ p["t2"]) @ p["t3"]


def joined(b, t):
    return jnp.einsum("bp,np->bn", b, t)


def operator(p, inputs, layer, land, bend=tanh):
    u, y = inputs
    b = layer(lambda q: q["b2"], land("b2", tanh(u @ p["b1"])))
    t = bend(layer(lambda q: q["t2"], land("t2", bend(y @ p["t1"] + p["t1b"]))))
    t = layer(lambda q: q["t3"], land("t3", t))
    return layer(lambda q: trunk(q, y, bend), land("t1", b), lambda t, b: joined(b, t), w=t)


def closed(make):
    return lambda p, i: make(p, i[0])


BOTH = "layer, feedback; last layer, feedback"  # in the trunk, and as the weight that the branch meets
TRUNKS = {
    "input": lrules.Network(lambda p, i: joined(branch(p, i[0]), trunk(p, i[1])), batch_axes=(0, None)),
    "closed_over": closed(lambda p, u: joined(branch(p, u), trunk(p, jnp.asarray(Y)))),
    "jit": closed(lambda p, u: joined(branch(p, u), jax.jit(trunk)(p, jnp.asarray(Y)))),
    "remat": closed(lambda p, u: joined(branch(p, u), jax.checkpoint(trunk)(p, jnp.asarray(Y)))),
    "vmap": closed(lambda p, u: joined(branch(p, u), jax.vmap(lambda y: trunk(p, y))(jnp.asarray(Y)))),
    "vmap_of_vmap": closed(
        lambda p, u: jax.vmap(lambda u: jax.vmap(lambda y: branch(p, u) @ trunk(p, y))(jnp.asarray(Y)))(u)
    ),
}
KINDS["trunk"] = Kind(
    TRUNKS, operator, T, (X, Y), below="b1 b2 t1 t1b t2", feedback={"b2", "t1", "t2", "t3"},
    direct={"b2", "t1", "t2", "t3"}, batch_axes=(0, None),
    routes={"t1": BOTH, "t1b": "last layer, feedback", "t2": BOTH, "b1": "layer"},
)  # fmt: skip
BENDS = {
    "gelu": jax.nn.gelu, "sin": jnp.sin, "maximum": lambda t: jnp.maximum(t, 0.0),
    "layer_norm": lambda t: (t - t.mean(-1, keepdims=True)) / jnp.sqrt(t.var(-1, keepdims=True) + 1e-5),
    "where": lambda t: jnp.where(t > 0, t, 0.0), "leaky": lambda t: jnp.where(t > 0, t, 0.1 * t),
    "product": lambda t: t * t,
}  # fmt: skip
for _name, _bend in BENDS.items():
    KINDS[f"trunk_{_name}"] = Kind(
        {"closed_over": closed(lambda p, u, f=_bend: joined(branch(p, u), trunk(p, jnp.asarray(Y), f)))},
        lambda p, i, layer, land, f=_bend: operator(p, i, layer, land, f),
        T, (X, Y), below="b1 b2 t1 t1b t2", feedback={"b2", "t1", "t2", "t3"}, direct=None, batch_axes=(0, None),
        brief=True,
    )  # fmt: skip

S = weights(b1=(4, 8), t1=(1, 8), ts=(2, 8, 8), t3=(8, 8))


def scanned(p, inputs, layer, land):
    u, y = inputs
    t = y @ p["t1"]
    for k in range(2):
        t = tanh(layer(lambda q, k=k: q["ts"][k], land(f"ts {k}", tanh(t) if k == 0 else t)))
    t = layer(lambda q: q["t3"], land("t3", t))
    return layer(lambda q: in_a_scan(q, y) @ q["t3"], land("t1", tanh(u @ p["b1"])), lambda t, b: joined(b, t), w=t)


def in_a_scan(p, y):
    return lax.scan(lambda t, w: (tanh(t @ w), None), tanh(y @ p["t1"]), p["ts"])[0]


KINDS["scanned_trunk"] = Kind(
    {
        "scan": closed(lambda p, u: joined(tanh(u @ p["b1"]), in_a_scan(p, jnp.asarray(Y)) @ p["t3"])),
        "fori_loop": closed(
            lambda p, u: joined(
                tanh(u @ p["b1"]),
                lax.fori_loop(0, 2, lambda i, t: tanh(t @ p["ts"][i]), tanh(jnp.asarray(Y) @ p["t1"])) @ p["t3"],
            )
        ),
    },
    scanned, S, (X, Y), below="b1 t1 ts", feedback={"t1", "ts", "t3"}, direct=None, batch_axes=(0, None),
    routes={"b1": "layer", "t1": BOTH, "ts": BOTH},
)  # fmt: skip


def without_top(p, inputs, layer, land):
    u, y = inputs
    t = tanh(layer(lambda q: q["ts"][0], land("ts 0", tanh(y @ p["t1"]))))
    t = tanh(layer(lambda q: q["ts"][1], land("ts 1", t)))
    return layer(lambda q: in_a_scan(q, y), land("t1", tanh(u @ p["b1"])), lambda t, b: joined(b, t), w=t)


KINDS["scanned_trunk_without_a_layer_above"] = Kind(
    {"scan": closed(lambda p, u: joined(tanh(u @ p["b1"]), in_a_scan(p, jnp.asarray(Y))))},
    without_top, {n: S[n] for n in ("b1", "t1", "ts")}, (X, Y), below="b1 t1", feedback={"t1", "ts"}, direct=None,
    batch_axes=(0, None), brief=True,
)  # fmt: skip

IMAGE = rand(92, 1, 6, 6, 2)
C = weights(0.3, b1=(4, 8), b2=(8, 6), k1=(3, 3, 2, 4), k2=(3, 3, 4, 4), k3=(64, 6))


def conv(w, x):
    return lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def painted(p, image, layer, land):
    h = land("k2", jax.nn.relu(conv(p["k1"], image)))
    h = jax.nn.relu(layer(lambda q: q["k2"], h, conv))
    return layer(lambda q: q["k3"][:16], land("k3", h).reshape(1, -1))


KINDS["convolutions_of_a_constant"] = Kind(
    {
        "closed_over": closed(
            lambda p, u: branch(p, u)
            + jax.nn.relu(conv(p["k2"], jax.nn.relu(conv(p["k1"], jnp.asarray(IMAGE))))).reshape(1, -1) @ p["k3"][:16]
        )
    },
    lambda p, i, layer, land: (
        layer(lambda q: q["b2"], land("b2", tanh(i[0] @ p["b1"]))) + painted(p, i[1], layer, land)
    ),
    C, (X, IMAGE), below="b1 k1 k2", feedback={"b2", "k2", "k3"}, direct=None, batch_axes=(0, None),
)  # fmt: skip

SUPPORT = rand(93, 7, 4)
M = weights(a=(4, 6), b=(6, 3))


def siamese(p, inputs, layer, land):
    x, support = inputs
    f, g = [layer(lambda q: q["b"], land(n, tanh(z @ p["a"]))) for n, z in (("b", x), ("b#2", support))]
    return layer(lambda q: embed(q, support).T, land("a", f), w=g.T)


def embed(p, z):
    return tanh(z @ p["a"]) @ p["b"]


KINDS["support_set"] = Kind(
    {
        "closed_over": closed(lambda p, x: embed(p, x) @ embed(p, jnp.asarray(SUPPORT)).T),
        "input": lambda p, i: embed(p, i[0]) @ embed(p, i[1]).T,
        "vmap": closed(lambda p, x: jax.vmap(lambda s: embed(p, x) @ embed(p, s), out_axes=1)(jnp.asarray(SUPPORT))),
    },
    siamese, M, (X, SUPPORT), below="a", feedback={"a", "b"}, direct={"a", "b", "b#2"}, batch_axes=(0, None),
)  # fmt: skip

L = weights(x1=(4, 6), z=(3, 6), l1=(6, 6), l2=(6, 6), c=(6, 2))


def latent(p):
    return tanh(tanh(p["z"] @ p["l1"]) @ p["l2"])


def latents(p, x, layer, land):
    z = tanh(layer(lambda q: q["l2"], land("l2", tanh(layer(lambda q: q["l1"], land("l1", p["z"]))))))
    scores = layer(lambda q: latent(q).T, land("l1#2", tanh(x @ p["x1"])), w=z.T)
    return layer(lambda q: q["c"], land("c", layer(latent, land("l1#3", softmax(scores)), w=z)))


KINDS["learned_latents"] = Kind(
    {"read": lambda p, x: (lambda z: softmax(tanh(x @ p["x1"]) @ z.T) @ z @ p["c"])(latent(p))},
    latents, L, X, below="x1 z l1 l2", feedback={"z", "l1", "l2", "c"}, direct={"l1", "l1#2", "l1#3", "l2", "c"},
)  # fmt: skip

BIAS = weights(a=(4, 6), r1=(1, 6), r2=(6, 1), v=(6, 6), c=(6, 2))
STEPS = np.arange(7.0)[:, None, None] - np.arange(7.0)[None, :, None]


def attention(p):
    return softmax((jax.nn.relu(jnp.asarray(STEPS) @ p["r1"]) @ p["r2"])[..., 0])


def positions(p, x, layer, land):
    bias = layer(lambda q: q["r2"], land("r2", jax.nn.relu(jnp.asarray(STEPS) @ p["r1"])))
    v = land("r1", layer(lambda q: q["v"], land("v", tanh(x @ p["a"]))))
    y = layer(attention, v, lambda w, v: jnp.einsum("ts,bsd->btd", w, v), w=softmax(bias[..., 0]))
    return layer(lambda q: q["c"], land("c", y))


KINDS["continuous_positions"] = Kind(
    {
        "einsum": lambda p, x: jnp.einsum("ts,bsd->btd", attention(p), first(p, x) @ p["v"]) @ p["c"],
        "matmul": lambda p, x: attention(p) @ (first(p, x) @ p["v"]) @ p["c"],
    },
    positions, BIAS, rand(94, B, 7, 4), below="a v r1 r2", feedback={"r1", "r2", "v", "c"},
    direct={"r1", "r2", "v", "c"},
    routes={"a": "layer", "r1": "layer, feedback", "r2": "layer, feedback"},
)  # fmt: skip

H = weights(a=(4, 6), z=(3,), h1=(3, 7), h2=(7, 36), c=(6, 2))


def made(q):
    return (tanh(q["z"] @ q["h1"]) @ q["h2"]).reshape(6, 6)


def hyper(p, x, layer, land, bend=lambda w: w):
    z = tanh(layer(lambda q: q["h1"], land("h1", p["z"])))
    w = bend(layer(lambda q: q["h2"], land("h2", z)).reshape(6, 6))
    y = layer(lambda q: bend(made(q)), land("h1#2", first(p, x)), w=w)
    return layer(lambda q: q["c"], land("c", tanh(y)))


GENERATED = {
    "linear": lambda w: w, "scaled": lambda w: 0.5 * w, "transposed": lambda w: w.T, "tanh": tanh, "softmax": softmax,
    "normalised": lambda w: w / (0.1 + jnp.linalg.norm(w)),
}  # fmt: skip
for _name, _bend in GENERATED.items():
    KINDS[f"hypernetwork_{_name}"] = Kind(
        {
            "matmul": lambda p, x, f=_bend: tanh(first(p, x) @ f(made(p))) @ p["c"],
        },
        lambda p, x, layer, land, f=_bend: hyper(p, x, layer, land, f),
        H, X, below="a z h1 h2", feedback={"h1", "h2", "c"}, direct={"h1", "h2", "h1#2", "c"},
        routes={"a": "layer", "h2": "layer, feedback", "c": "last layer, feedback"},
    )  # fmt: skip

# ---------------------------------------------------------------------------------- mixed kernels and bilinear products

K = weights(a=(4, 6), r=(4, 3), m=(3, 6, 6), e=(6, 6), s=(4, 36), c=(6, 2))


def mixed(p, x, layer, land):
    gates = land("m", softmax(x @ p["r"]))
    mix = lambda m, g: jnp.einsum("be,eio->bio", g, m)  # noqa: E731
    kernel = layer(lambda q: q["m"], gates, mix)
    h = land("m#2", first(p, x))
    y = layer(lambda q: mix(q["m"], lax.stop_gradient(gates)), h, each, w=kernel)
    return layer(lambda q: q["c"], land("c", tanh(y)))


def gates(p, x):
    return softmax(x @ p["r"])


KINDS["mixed_kernels"] = Kind(
    {
        "einsum": lambda p, x: tanh(each(jnp.einsum("be,eio->bio", gates(p, x), p["m"]), first(p, x))) @ p["c"],
        "tensordot": lambda p, x: tanh(each(jnp.tensordot(gates(p, x), p["m"], 1), first(p, x))) @ p["c"],
        "reshaped": lambda p, x: (
            tanh(each((gates(p, x) @ p["m"].reshape(3, -1)).reshape(-1, 6, 6), first(p, x))) @ p["c"]
        ),
        "vmap": lambda p, x: jax.vmap(lambda x: tanh(first(p, x) @ jnp.tensordot(gates(p, x), p["m"], 1)) @ p["c"])(x),
    },
    mixed, K, X, below="a r m", feedback={"m", "c"}, direct={"m", "m#2", "c"},
    routes={"a": "layer", "r": "layer", "m": "layer, feedback"},
)  # fmt: skip


def filters(p, x, layer, land):
    kernel = (x @ p["s"]).reshape(-1, 6, 6)
    y = layer(lambda q: (x @ q["s"]).reshape(-1, 6, 6), land("s", first(p, x)), each, w=kernel)
    return layer(lambda q: q["c"], land("c", tanh(y)))


KINDS["dynamic_filters"] = Kind(
    {
        "einsum": lambda p, x: tanh(each((x @ p["s"]).reshape(-1, 6, 6), first(p, x))) @ p["c"],
        "matmul": lambda p, x: tanh((first(p, x)[:, None] @ (x @ p["s"]).reshape(-1, 6, 6))[:, 0]) @ p["c"],
        "vmap": lambda p, x: jax.vmap(lambda x: tanh(first(p, x) @ (x @ p["s"]).reshape(6, 6)) @ p["c"])(x),
    },
    filters, K, X, below="a s", feedback={"s", "c"}, direct={"s", "c"}, routes={"s": "layer, feedback", "a": "layer"},
)  # fmt: skip


def with_base(p, x, layer, land):
    kernel = p["e"] + (x @ p["s"]).reshape(-1, 6, 6)
    y = layer(lambda q: q["e"] + (x @ q["s"]).reshape(-1, 6, 6), land("s", first(p, x)), each, w=kernel)
    return layer(lambda q: q["c"], land("c", tanh(y)))


KINDS["base_and_filters"] = Kind(
    {"einsum": lambda p, x: tanh(each(p["e"] + (x @ p["s"]).reshape(-1, 6, 6), first(p, x))) @ p["c"]},
    with_base, K, X, below="a e s", feedback={"e", "s", "c"}, direct=None,
)  # fmt: skip

Q = weights(a=(4, 6), b=(4, 5), m=(6, 3, 5), c=(3, 2))


def bilinear(p, x, layer, land):
    u, v = land("m", tanh(x @ p["a"])), land("m#2", tanh(x @ p["b"]))
    left = lambda m, u: jnp.einsum("bi,ikj->bkj", u, m)  # noqa: E731
    half = layer(lambda q: q["m"], u, left)
    y = layer(lambda q: left(q["m"], lax.stop_gradient(u)), v, lambda w, v: jnp.einsum("bkj,bj->bk", w, v), w=half)
    return layer(lambda q: q["c"], land("c", tanh(y)))


KINDS["bilinear"] = Kind(
    {
        "einsum": lambda p, x: tanh(jnp.einsum("bi,ikj,bj->bk", tanh(x @ p["a"]), p["m"], tanh(x @ p["b"]))) @ p["c"],
        "in_two_steps": lambda p, x: tanh(
            jnp.einsum("bkj,bj->bk", jnp.einsum("bi,ikj->bkj", tanh(x @ p["a"]), p["m"]), tanh(x @ p["b"]))
        )
        @ p["c"],
        "vmap": lambda p, x: jax.vmap(
            lambda x: tanh(jnp.einsum("kj,j->k", jnp.tensordot(tanh(x @ p["a"]), p["m"], 1), tanh(x @ p["b"]))) @ p["c"]
        )(x),
    },
    bilinear, Q, X, below="a b m", feedback={"m", "c"}, direct={"m", "m#2", "c"},
)  # fmt: skip

N = weights(a=(2, 4), e=(4, 5), t=(5, 16), c=(4, 2))


def transformed(p, x, layer, land):
    f = land("e", tanh(x @ p["a"]))
    g = tanh(layer(lambda q: q["e"], f).max(1))
    g = land("t", g)
    make = lambda t: (lax.stop_gradient(g) @ t).reshape(-1, 4, 4)  # noqa: E731
    w = layer(lambda q: q["t"], g).reshape(-1, 4, 4) + jnp.eye(4)
    y = layer(lambda q: make(q["t"]) + jnp.eye(4), f, lambda w, f: f @ w, w=w)
    return layer(lambda q: q["c"], land("c", tanh(y)))


KINDS["spatial_transformer"] = Kind(
    {
        "matmul": lambda p, x: (
            lambda f: tanh(f @ ((tanh((f @ p["e"]).max(1)) @ p["t"]).reshape(-1, 4, 4) + jnp.eye(4))) @ p["c"]
        )(tanh(x @ p["a"])),
    },
    transformed, N, rand(95, B, 6, 2), below="a e t", feedback={"e", "t", "c"}, direct={"e", "t", "c"},
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the tests


def cases(brief=True, spellings=None, quick=None):
    """Names of kinds with their spellings: of each kind so many are quick, and what direct rules refuse."""
    return [
        pytest.param(
            name, spelling, id=f"{name}-{spelling}",
            marks=[pytest.mark.slow] if quick and i >= quick and spelling not in (*kind.refused, *kind.own) else [],
        )
        for name, kind in KINDS.items()
        for i, spelling in enumerate(list(kind.spellings)[:spellings])
        if brief or not kind.brief
    ]  # fmt: skip


def built(name, spelling):
    kind = KINDS[name]
    net = kind.spellings[spelling]
    net = net if isinstance(net, lrules.Network) else lrules.Network(net, batch_axes=kind.batch_axes)
    return kind, net, arrays(kind.params), arrays(kind.inputs)


@functools.cache
def oracle_of(name, how):
    """The oracle of a kind, compiled once for all spellings."""
    kind = KINDS[name]
    return jax.jit(lambda p, fb: by_hand(kind.oracle, p, arrays(kind.inputs), fb, how))


def zeros(feedback):
    return jax.tree.map(jnp.zeros_like, feedback)


@pytest.mark.parametrize("name, spelling", cases())
def test_sequential(name, spelling):
    """The forward pass is the same, FA is what is written by hand, with the weights as feedback `jax.grad`."""
    kind, net, params, inputs = built(name, spelling)
    feedback = FA.init(KEY, net, params, inputs)
    assert set(feedback.fixed) == kind.feedback and not feedback.learned

    both = beside(net, FA, params, inputs)
    (y, random), (plain_y, plain) = both(feedback)
    np.testing.assert_array_equal(y, plain_y)
    close(random, oracle_of(name, "sequential")(params, feedback.fixed))
    for n in kind.below.split():
        assert np.max(np.abs(random[n] - plain[n])) > 1e-3 * np.max(np.abs(plain[n])) > 0, n
    close(both(feedback._replace(fixed={n: params[n] for n in feedback.fixed}))[0][1], plain)
    silent = both(zeros(feedback))[0][1]
    for n in params:
        assert np.any(silent[n]) == (np.any(plain[n]) and n not in kind.below.split()), n


@pytest.mark.parametrize("name", mostly_slow([n for n, kind in KINDS.items() if not kind.brief], ["masked", "trunk"]))
def test_without_jit(name):
    """Step by step the numbers are the same."""
    kind, net, params, inputs = built(name, next(iter(KINDS[name].spellings)))
    feedback = FA.init(KEY, net, params, inputs)
    close(fed(net, FA, params, inputs, feedback), oracle_of(name, "sequential")(params, feedback.fixed))


@pytest.mark.parametrize("name, spelling", cases(brief=False, quick=1))
def test_direct(name, spelling):
    """DFA brings e.B to every hidden signal, and nothing else; without feedback it is training of the last layers."""
    kind, net, params, inputs = built(name, spelling)
    if spelling in kind.refused:
        with pytest.raises((ValueError, NotImplementedError), match="the batch axis of|lies inside a cond"):
            DFA.init(KEY, net, params, inputs)
        return
    feedback = DFA.init(KEY, net, params, inputs)
    got = jax.jit(lambda p, fb: fed(net, DFA, p, inputs, fb))
    close(got(params, zeros(feedback)), oracle_of(name, "last")(params, {}))
    if kind.direct is not None and spelling not in kind.own:
        assert set(feedback.fixed) == kind.direct
        close(got(params, feedback), oracle_of(name, "direct")(params, feedback.fixed))


@pytest.mark.parametrize("name, spelling", cases(brief=False, spellings=1))
def test_last_layer_only(name, spelling):
    """Nothing arrives below the last layers, and what does above is the gradient."""
    kind, net, params, inputs = built(name, spelling)
    got = jax.jit(lambda p: fed(net, LAST, p, inputs, lrules.Feedback({}, {})))(params)
    close(got, oracle_of(name, "last")(params, {}))
    assert not any(np.any(got[n]) for n in kind.below.split())


@pytest.mark.parametrize("name, spelling", cases())
def test_audit(name, spelling):
    """The audit agrees, and names the routes."""
    kind, net, params, inputs = built(name, spelling)
    routes = {row["parameter"]: row["route"] for row in lrules.audit(net, FA, params, inputs).rows}
    assert set(routes) == set(params)
    assert {n: routes[n] for n in kind.routes} == kind.routes


# ------------------------------------------------------------------------------- weights computed from parameters alone

W = weights(a=(4, 6), w=(6, 6), v=(6, 6), u=(6, 2), t=(2, 6), c=(6, 2))
COMPUTED = {
    "svd": ("w", lambda p: (lambda u, s, v: (u * s) @ v)(*jnp.linalg.svd(p["w"]))),
    "qr": ("w", lambda p: jnp.linalg.qr(p["w"])[0]),
    "eigh": ("w", lambda p: jnp.linalg.eigh(p["w"] + p["w"].T)[1]),
    "cayley": ("w", lambda p: jnp.linalg.solve(jnp.eye(6) + p["w"] - p["w"].T, jnp.eye(6) - p["w"] + p["w"].T)),
    "iterated": ("w", lambda p: 1.5 * p["w"] - 0.5 * p["w"] @ p["w"].T @ p["w"]),
    "bent": ("w", lambda p: tanh(p["w"] @ p["w"].T) @ p["w"]),
    "adjacency": ("u t", lambda p: softmax(jax.nn.relu(p["u"] @ p["t"]))),
    "adjacency_twice": ("u t", lambda p: (lambda a: a @ a)(softmax(jax.nn.relu(p["u"] @ p["t"])))),
    "low_rank": ("u t w", lambda p: p["w"] + p["u"] @ p["t"]),
    "masked": ("v w", lambda p: p["w"] * jax.nn.sigmoid(p["v"])),
    "rounded": ("w", lambda p: p["w"] + lax.stop_gradient(jnp.round(p["w"] * 4) / 4 - p["w"])),
    "sorted": ("w", lambda p: jnp.sort(p["w"], 0)),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights(name):
    """However parameters make a weight, the same function of the feedback stands in for it."""
    feedback_of, make = COMPUTED[name]
    params, x = arrays(W), arrays(X)
    net = lambda p, x: tanh(first(p, x) @ make(p)) @ p["c"]  # noqa: E731

    def oracle(p, x, layer, land):
        return layer(lambda q: q["c"], tanh(layer(make, first(p, x))))

    feedback = FA.init(KEY, net, params, x)
    assert set(feedback.fixed) == {"c", *feedback_of.split()}
    wanted = jax.jit(lambda p, fb: by_hand(oracle, p, x, fb, "sequential"))(params, feedback.fixed)
    both = beside(net, FA, params, x)
    got = both(feedback)[0][1]
    close({n: got[n] for n in "ac"}, {n: wanted[n] for n in "ac"})
    (_, got), (_, plain) = both(feedback._replace(fixed={n: params[n] for n in feedback.fixed}))
    close(got, plain)
    lrules.audit(net, FA, params, x)


STATISTICS = {
    "shifted": lambda w, x: w + x.sum(),
    "divided": lambda w, x: w / (0.1 + x.std()),
    "clipped": lambda w, x: jnp.clip(w, -1.0, jnp.abs(x).max()),
    "scaled": lambda w, x: w * x.mean(),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_weights_that_a_statistic_of_the_data_changes(name):
    """A layer with feedback, or refused by name."""
    params, x = arrays({n: W[n] for n in "awc"}), arrays(X)
    net = lambda p, x: tanh(first(p, x) @ STATISTICS[name](p["w"], x)) @ p["c"]  # noqa: E731
    if "w" not in lrules.refusals(net, FA, params, x):
        assert "w" in FA.init(KEY, net, params, x).fixed


# ------------------------------------------------------------------------------------- written by hand: refused by name


def refused(net, params, inputs, name, rule=FA):
    with pytest.raises(NotImplementedError, match=f"'{name}'") as caught:
        rule.init(KEY, net, params, inputs)
    assert set(lrules.refusals(net, rule, params, inputs)) == {name}, caught.value
    rest = lrules.partition({f"^{name}$": lrules.backprop(), ".*": rule})
    rest.init(KEY, net, params, inputs)


D = weights(a=(4, 6), m=(7, 6), c=(7, 2))


def differences(p, h):
    return h[:, None] - p["m"][None]


def squared_by_scan(p, h):
    return lax.scan(lambda c, m: (c, ((h - m) ** 2).sum(-1)), 0.0, p["m"])[1].T


DISTANCES = {
    "broadcast": lambda p, h: (differences(p, h) ** 2).sum(-1),
    "abs": lambda p, h: jnp.abs(differences(p, h)).sum(-1),
    "norm": lambda p, h: jnp.linalg.norm(differences(p, h), axis=-1),
    "times_itself": lambda p, h: (differences(p, h) * differences(p, h)).sum(-1),
    "vmap": lambda p, h: jax.vmap(lambda m: ((h - m) ** 2).sum(-1), out_axes=1)(p["m"]),
    "vmap_of_vmap": lambda p, h: jax.vmap(lambda h: jax.vmap(lambda m: ((h - m) ** 2).sum())(p["m"]))(h),
    "repeat": lambda p, h: ((jnp.repeat(h[:, None], 7, 1) - p["m"]) ** 2).sum(-1),
    "tile": lambda p, h: ((jnp.tile(h[:, None], (1, 7, 1)) - p["m"]) ** 2).sum(-1),
    "einsum": lambda p, h: (lambda d: jnp.einsum("bki,bki->bk", d, d))(differences(p, h)),
    "matmul": lambda p, h: (lambda d: (d[..., None, :] @ d[..., :, None])[..., 0, 0])(differences(p, h)),
    "mean": lambda p, h: (differences(p, h) ** 2).mean(-1),
    "dot_with_ones": lambda p, h: (differences(p, h) ** 2) @ jnp.ones(6),
    "cumsum": lambda p, h: jnp.cumsum(differences(p, h) ** 2, -1)[..., -1],
    "row_by_row": lambda p, h: jnp.stack([((h - p["m"][k]) ** 2).sum(-1) for k in range(7)], -1),
    "scan": squared_by_scan,
    "map": lambda p, h: lax.map(lambda m: ((h - m) ** 2).sum(-1), p["m"]).T,
    "axis_by_axis": lambda p, h: sum((h[:, i : i + 1] - p["m"][:, i]) ** 2 for i in range(6)),
    "kernels": lambda p, h: jnp.exp(-(differences(p, h) ** 2)).sum(-1),
    "logsumexp": lambda p, h: jax.nn.logsumexp(h[:, None] + p["m"], axis=-1),
    "cosine": lambda p, h: (h[:, None] * p["m"]).sum(-1) / jnp.linalg.norm(h, axis=-1, keepdims=True),
    "multiplied_out": lambda p, h: ((h**2)[:, None] - 2 * h[:, None] * p["m"] + p["m"] ** 2).sum(-1),
    "units": lambda p, h: jax.nn.relu(differences(p, h)).sum(-1),
    "tanh_of_products": lambda p, h: tanh(h[:, None] * p["m"]).sum(-1),
    "minimum": lambda p, h: jnp.minimum(h[:, None], p["m"]).sum(-1),
    "max_plus": lambda p, h: (h[:, None] + p["m"]).max(-1),
    "power": lambda p, h: (jnp.abs(h)[:, None] ** jax.nn.softplus(p["m"])).sum(-1),
}


ROW_BY_ROW = "tile mean row_by_row scan map axis_by_axis max_plus"


@pytest.mark.parametrize("name", marked(DISTANCES, ROW_BY_ROW, "such distances count as recorded values"))
def test_distances(name):
    """Prototypes and radial basis functions have true weights on the way down, unless they are refused."""
    net = lambda p, x: jnp.exp(-DISTANCES[name](p, first(p, x))) @ p["c"]  # noqa: E731
    refused(net, arrays(D), arrays(X), "m")


def test_a_distance_with_a_dot_product():
    """|h|^2 - 2 h.m + |m|^2, the remedy that refusals of distances give."""

    def oracle(p, x, layer, land):
        h = land("m", first(p, x))
        s = (h**2).sum(-1, keepdims=True) - 2 * layer(lambda q: q["m"].T, h) + (p["m"] ** 2).sum(-1)
        return layer(lambda q: q["c"], land("c", jnp.exp(-s)))

    def net(p, x):
        h = first(p, x)
        return jnp.exp(-((h**2).sum(-1, keepdims=True) - 2 * (h @ p["m"].T) + (p["m"] ** 2).sum(-1))) @ p["c"]

    params, x = arrays(D), arrays(X)
    for rule, how in ((FA, "sequential"), (DFA, "direct")):
        feedback = rule.init(KEY, net, params, x)
        assert set(feedback.fixed) == {"m", "c"}
        wanted = jax.jit(lambda p, fb, how=how: by_hand(oracle, p, x, fb, how))(params, feedback.fixed)
        close(jax.jit(lambda p, fb, r=rule: fed(net, r, p, x, fb))(params, feedback), wanted)


BY_HAND = {
    "splines": lambda p, h: (p["m"] * jax.nn.silu(h)[:, None] + p["v"] * jnp.sin(h)[:, None]).sum(-1),
    "splines_in_vmap": lambda p, h: jax.vmap(
        lambda h: jax.vmap(lambda w, v: (w * jax.nn.silu(h) + v * jnp.sin(h)).sum())(p["m"], p["v"])
    )(h),
    "locally_connected": lambda p, h: (p["m"] * windows(h) + p["v"] * windows(jnp.sin(h))).sum(-1),
}


def windows(h):
    return jnp.stack([jnp.roll(h, i, 1) for i in range(7)], 1)


@pytest.mark.parametrize("name", BY_HAND)
def test_two_products_in_one_sum(name):
    """Two products that are added before they are summed: both are named."""
    params = arrays({**D, "v": rand(5, 7, 6)})
    net = lambda p, x: tanh(BY_HAND[name](p, first(p, x))) @ p["c"]  # noqa: E731
    for rule in (FA, DFA, LAST):
        assert set(lrules.refusals(net, rule, params, arrays(X))) == {"m", "v"}


def test_modulated_weights():
    """A weight that data scale for each example (a style) is refused."""
    params = arrays({**P, "s": rand(6, 4, 6)})
    for make in (
        lambda p, x: p["e"][0] * (x @ p["s"])[:, :, None],
        lambda p, x: p["e"][0] * jax.nn.sigmoid(x @ p["s"])[:, None],
    ):
        refused(lambda p, x, f=make: tanh(each(f(p, x), first(p, x))) @ p["c"], params, arrays(X), "e")


# -------------------------------------------------------------------- products of data with data: served, with feedback

IDS = np.array([[0, 3, 7], [1, 1, 9], [8, 2, 4], [5, 6, 0], [10, 3, 3]])
G = weights(
    a=(4, 6), g=(6, 3), e=(3, 6, 7), mu=(6, 21), v=(6, 2, 7), c=(7, 2), o=(6, 2), emb=(11, 6), emb2=(11, 6), q=(6, 6),
    k=(6, 6), w=(6, 6), m=(9, 6), lam=(6,), film=(11, 12), caps=(3, 2, 4, 5), u=(6,), s=(6,), t=(7, 7),
)  # fmt: skip
SEQUENCE = rand(96, B, 7, 4)


def decays(p, x):
    lam = jnp.exp(-jnp.exp(p["lam"]))
    a = jnp.broadcast_to(lam, (7, 6))
    combine = lambda l, r: (l[0] * r[0], l[1] * r[0] + r[1])  # noqa: E731, E741
    h = jax.vmap(lambda u: lax.associative_scan(combine, (a, u))[1])(x @ p["a"])
    return tanh(h) @ p["o"]


def squash(s):
    n = (s**2).sum(-1, keepdims=True)
    return n / (1 + n) * s / jnp.sqrt(n + 1e-8)


def capsules(p, x):
    u = jnp.einsum("bid,iodk->biok", squash(tanh(x @ p["a"]).reshape(B, 3, 2)), p["caps"].transpose(0, 2, 1, 3))
    b = jnp.zeros((B, 3, 4))
    for _ in range(2):
        v = squash((softmax(b)[..., None] * u).sum(1))
        b = b + (u * v[:, None]).sum(-1)
    return v.reshape(B, -1)


def soft_tree(p, x):
    h = first(p, x)
    g = jax.nn.sigmoid(h @ p["g"])
    leaves = jnp.stack([g[:, 0], (1 - g[:, 0]) * g[:, 1], (1 - g[:, 0]) * (1 - g[:, 1])], -1)
    return (leaves[..., None] * (h @ p["mu"]).reshape(B, 3, 7)).sum(1)


def attention_by_sums(p, x):
    h = first(p, x)
    q, v = (jnp.einsum("btd,dhk->bthk", h, p["v"]) for _ in range(2))
    scores = softmax((q[:, :, None] * q[:, None]).sum(-1), axis=2)
    return (scores[..., None] * v[:, None]).sum((2, 3)) @ p["c"]


def linear_attention(p, x):
    h = first(p, x)
    return (h @ p["q"]) @ ((h @ p["k"]).swapaxes(1, 2) @ (h @ p["w"])) @ p["o"]


def vector_quantised(p, x):
    z = first(p, x)
    near = jnp.argmin((z**2).sum(-1, keepdims=True) - 2 * z @ p["m"].T + (p["m"] ** 2).sum(-1), -1)
    return (z + lax.stop_gradient(p["m"][near] - z)) @ p["o"]


def coupling(p, x):
    h = first(p, x)
    a, b = h[:, :3], h[:, 3:]
    return jnp.concatenate([a, b * jnp.exp(tanh(a @ p["g"].T[:, :3])) + (a @ p["w"][:3, :3])], -1)


def gated(p, x):
    h = first(p, x)
    return softmax(h @ p["g"]), h


def heads(p, x):
    return jnp.einsum("bd,dhk->bhk", first(p, x), p["v"])


def experts(p, h):
    return jnp.einsum("bi,eio->beo", h, p["e"])


def mix(gates, values, axis=1):
    return (gates[..., None] * values).sum(axis)


def normed(p):
    return p["w"] * p["s"] / jnp.linalg.norm(p["w"], axis=0)


def modulated(p, i):
    f = p["film"][i[:, 1]]
    return tanh(p["emb"][i[:, 0]] @ p["w"] * f[:, :6] + f[:, 6:]) @ p["o"]


def shifted(h):
    return jnp.stack([jnp.roll(h, i, 1) for i in range(3)], 2)


def relative_positions(p, x):
    h = first(p, x)
    bias = p["s"][np.abs(np.arange(7)[:, None] - np.arange(7)) % 6]
    return softmax((h @ p["q"]) @ (h @ p["k"]).swapaxes(1, 2) + bias) @ (h @ p["w"]) @ p["o"]


SERVED = {  # with the parameters that get feedback
    "experts": ("g e c", lambda p, x: (lambda s, h: mix(s, experts(p, h)) @ p["c"])(*gated(p, x))),
    "experts_in_vmap": (
        "g e c", lambda p, x: (lambda s, h: mix(s.T, jax.vmap(lambda w: h @ w)(p["e"]), 0) @ p["c"])(*gated(p, x)),
    ),
    "experts_one_by_one": (
        "g e c",
        lambda p, x: (lambda s, h: mix(s, jnp.stack([h @ p["e"][k] for k in range(3)], 1)) @ p["c"])(*gated(p, x)),
    ),
    "mixture_density": (
        "g mu", lambda p, x: (lambda s, h: mix(s, (h @ p["mu"]).reshape(B, 3, 7)))(*gated(p, x)),
    ),
    "gates_over_heads": (
        "v c", lambda p, x: (lambda z: mix(jax.nn.sigmoid(z.mean(-1)), z) @ p["c"])(heads(p, x)),
    ),
    "soft_tree": ("g mu", soft_tree),
    "capsules": ("caps", capsules),
    "attention_by_sums": ("v c", attention_by_sums),
    "linear_attention": ("q k w o", linear_attention),
    "random_synthesizer": ("t w o", lambda p, x: softmax(p["t"]) @ (first(p, x) @ p["w"]) @ p["o"]),
    "dynamic_convolution": (
        "g o", lambda p, x: (lambda s, h: jnp.einsum("bnk,bnkd->bnd", s, shifted(h)) @ p["o"])(*gated(p, x)),
    ),
    "mixture_of_softmaxes": (
        "g mu",
        lambda p, x: (lambda s, h: jnp.einsum("bk,bkc->bc", s, softmax((h @ p["mu"]).reshape(B, 3, 7))))(*gated(p, x)),
    ),
    "relative_positions": ("q k w o", relative_positions),
    "decays": ("o", decays),
    "memory": ("m o", lambda p, x: softmax(first(p, x) @ p["m"].T) @ p["m"] @ p["o"]),
    "vector_quantised": ("m o", vector_quantised),
    "coupling": ("g w", coupling),
    "planar_flow": ("u o", lambda p, x: (lambda h: (h + p["s"] * tanh(h @ p["u"])[:, None]) @ p["o"])(first(p, x))),
    "weight_norm": ("w o", lambda p, x: tanh(first(p, x) @ normed(p)) @ p["o"]),
    "word_vectors": ("", lambda p, i: jnp.einsum("bd,bkd->bk", p["emb"][i[:, 0]], p["emb2"][i[:, 1:]])),
    "triples": ("", lambda p, i: (p["emb"][i[:, 0]] * p["emb2"][i[:, 1]] * p["emb"][i[:, 2]]).sum(-1, keepdims=True)),
    "factorisation": ("o", lambda p, i: (p["emb"][i[:, 0]] * p["emb2"][i[:, 1]]) @ p["o"]),
    "tied": ("w emb", lambda p, i: tanh(p["emb"][i] @ p["w"]) @ p["emb"].T),
    "bag": ("o", lambda p, i: (p["emb"][i] * (i > 2)[..., None]).sum(1) @ p["o"]),
    "modulated_by_a_task": ("w o", modulated),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_served(name):
    """Data that multiply data, scales, recurrences and embeddings are no weights and no layers written by hand."""
    feedback_of, net = SERVED[name]
    params, inputs = arrays(G), arrays(X)
    for x in (X, SEQUENCE, IDS):
        try:
            jax.eval_shape(net, params, x)
            inputs = jnp.asarray(x)
            break
        except (TypeError, ValueError, IndexError):
            continue
    feedback = FA.init(KEY, net, params, inputs)
    assert set(feedback.fixed) == set(feedback_of.split())
    same = feedback._replace(fixed={n: params[n] for n in feedback.fixed})
    (y, got), (plain_y, plain) = beside(net, FA, params, inputs)(same)
    np.testing.assert_array_equal(y, plain_y)
    close(got, plain)
    lrules.audit(net, FA, params, inputs)


# ------------------------------------------------------------------------------------------------------- frozen weights

F = weights(a=(4, 6), b=(6, 6), c=(6, 6), d=(6, 2))


def deep(p, x):
    return tanh(tanh(tanh(x @ p["a"]) @ p["b"]) @ p["c"]) @ p["d"]


@pytest.mark.parametrize("rule", ["feedback_alignment", "direct_feedback_alignment", "backman", "last_layer_only"])
@pytest.mark.parametrize("frozen", ["a", "b", "d", "a c"])
def test_frozen(rule, frozen):
    """What is not trained has layers as all the rest: the others learn as if it were, with the same feedback."""
    rule = RULES[rule]
    params, x = arrays(F), arrays(X)
    still = {n: params[n] for n in frozen.split()}
    moving = {n: params[n] for n in params if n not in still}
    net = lrules.Network(lambda p, q, x: deep({**p, **q}, x), frozen=still)
    feedback, whole_feedback = rule.init(KEY, net, moving, x), rule.init(KEY, deep, params, x)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), feedback, whole_feedback))
    everything = fed(deep, rule, params, x, feedback)
    close(fed(net, rule, moving, x, feedback), {n: everything[n] for n in moving})
    routes = {row["parameter"]: row["route"] for row in lrules.audit(net, rule, moving, x).rows}
    assert {n for n, route in routes.items() if route == "frozen"} == set(still)


class Stack(nnx.Module):
    def __init__(self, layer, rngs):
        self.layers = nnx.List([layer(n, m, rngs=rngs) for n, m in ((4, 6), (6, 6), (6, 2))])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.tanh(layer(x))
        return self.layers[-1](x)


def test_frozen_in_nnx():
    """`from_nnx(wrt=...)` leaves layers out; feedback stands in for them, too, under the names that they have."""
    x = jnp.asarray(X)
    layer = lambda n, m, rngs: nnx.Linear(n, m, rngs=rngs, param_dtype=jnp.float64, dtype=jnp.float64)  # noqa: E731
    net, params = lrules.from_nnx(Stack(layer, nnx.Rngs(0)))
    feedback = FA.init(KEY, net, params, x)
    wanted = named(fed(net, FA, params, x, feedback))
    part = nnx.All(nnx.Param, nnx.Not(nnx.PathContains(1)))
    net, params = lrules.from_nnx(Stack(layer, nnx.Rngs(0)), wrt=part)
    again = FA.init(KEY, net, params, x)
    assert set(again.fixed) == {"layers/1/kernel", "layers/2/kernel"}
    assert all(np.array_equal(again.fixed[n], feedback.fixed[n]) for n in again.fixed)
    got = named(fed(net, FA, params, x, feedback))
    assert set(got) == {n for n in wanted if "/1/" not in n}
    close(got, {n: wanted[n] for n in got})


@pytest.mark.parametrize("rule", [FA, DFA], ids=["FA", "DFA"])
def test_adapters(rule):
    """Where only adapters are trained, feedback stands in for the base beside them: nothing else arrives below."""

    def layer(n, m, rngs):
        made = nnx.LoRALinear(n, m, lora_rank=2, rngs=rngs, param_dtype=jnp.float64, dtype=jnp.float64)
        made.lora.lora_b[...] = jnp.asarray(rand(n + m, 2, m))
        return made

    x = jnp.asarray(X)
    net, params = lrules.from_nnx(Stack(layer, nnx.Rngs(0)), wrt=nnx.LoRAParam)
    feedback = rule.init(KEY, net, params, x)
    silent, grads = (named(fed(net, rule, params, x, f)) for f in (zeros(feedback), feedback))
    for n in grads:
        assert np.any(grads[n]) and np.any(silent[n]) == (n == "layers/2/lora/lora_b")
    if rule is FA:
        assert {f"layers/2/{n}" for n in ("kernel", "lora/lora_a", "lora/lora_b")} <= set(feedback.fixed)
        both = {**named(net.frozen), **named(params)}
        same = feedback._replace(fixed={n: both[n] for n in feedback.fixed})
        close(fed(net, FA, params, x, same), jax.grad(lambda p: objective(net(p, x)))(params))


def test_a_partitioned_equinox_model():
    """`eqx.partition` with a filter: the static half's arrays are the frozen weights."""
    model = eqx.nn.MLP(4, 2, 6, 2, activation=jnp.tanh, key=KEY, dtype=jnp.float64)
    arrays_, static = eqx.partition(model, eqx.is_array)
    spec = jax.tree.map(lambda _: True, arrays_)
    spec = eqx.tree_at(lambda m: (m.layers[1].weight, m.layers[1].bias), spec, replace=(False, False))
    params, frozen = eqx.partition(arrays_, spec)
    x = jnp.asarray(X)
    net = lrules.Network(lambda p, q, x: jax.vmap(eqx.combine(p, q, static))(x), frozen=frozen)
    whole = lrules.Network(lambda p, x: jax.vmap(eqx.combine(p, static))(x))
    for rule in (FA, DFA):
        feedback = rule.init(KEY, net, params, x)
        everything = fed(whole, rule, arrays_, x, rule.init(KEY, whole, arrays_, x))
        close(fed(net, rule, params, x, feedback), eqx.partition(everything, spec)[0])


# ------------------------------------------------------------------------------ what no derivative leads to the outputs

stop = lax.stop_gradient
Z = weights(a=(4, 6), b=(6, 6), w=(6, 6), c=(6, 2))


def encode(p, x):
    return tanh(tanh(x @ p["a"]) @ p["b"])


def inside_a_loop(p, x):
    h = encode(p, x)
    return lax.scan(lambda h, _: (tanh(stop(h) @ p["w"]), None), h, None, length=2)[0] @ p["c"]


STOPPED = {  # with the parameters that stay as they are
    "features": ("a b", lambda p, x: tanh(stop(encode(p, x)) @ p["w"]) @ p["c"]),
    "parameters": ("a b", lambda p, x: tanh(encode({n: stop(w) for n, w in p.items()}, x) @ p["w"]) @ p["c"]),
    "one_parameter": ("b", lambda p, x: tanh(encode({**p, "b": stop(p["b"])}, x) @ p["w"]) @ p["c"]),
    "in_jit": ("a b", lambda p, x: tanh(jax.jit(lambda p, x: stop(encode(p, x)))(p, x) @ p["w"]) @ p["c"]),
    "in_remat": ("a b", lambda p, x: jax.checkpoint(lambda h: tanh(stop(h) @ p["w"]))(encode(p, x)) @ p["c"]),
    "in_a_loop": ("a b", inside_a_loop),
    "in_vmap": ("a b", lambda p, x: jax.vmap(lambda x: tanh(stop(encode(p, x)) @ p["w"]) @ p["c"])(x)),
    "target": ("w", lambda p, x: encode(p, x) @ p["c"] - stop(tanh(encode(p, jnp.cos(x)) @ p["w"]) @ p["c"])),
    "teacher": ("w", lambda p, x: jnp.maximum(encode(p, x) @ p["c"], stop(encode(p, x) @ p["w"])[:, :2])),
    "choice": ("a b", lambda p, x: tanh(one_hot(jnp.argmax(encode(p, x), -1), 6) @ p["w"]) @ p["c"]),
    "unused": ("w", lambda p, x: (tanh(encode(p, x) @ p["w"]), encode(p, x) @ p["c"])[1]),
    "aux": ("w", lrules.Network(lambda p, x: (encode(p, x) @ p["c"], tanh(encode(p, x) @ p["w"])), has_aux=True)),
}  # fmt: skip
RULES = {
    "feedback_alignment": FA, "direct_feedback_alignment": DFA,
    "adaptive": lrules.direct_feedback_alignment(adaptive=True),
    "skipped": lrules.skipped_backprop(), "backman": lrules.backman(), "sign_symmetry": lrules.sign_symmetry(),
    "random_target_projection": lrules.random_target_projection(), "last_layer_only": LAST,
    "node_perturbation": lrules.node_perturbation(0.1, direct=True), "predictive_coding": lrules.predictive_coding(),
    "forward_gradient": lrules.forward_gradient(), "forward_activations": lrules.forward_gradient("activations"),
    "forward_local": lrules.forward_gradient(local=lrules.local_losses()), "local_losses": lrules.local_losses(),
    "central_differences": lrules.forward_gradient(method="central", std=0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", STOPPED)
def test_stopped(name):
    """Exactly zero wherever the gradient is zero because nothing leads to the outputs; the rest learns."""
    still, net = STOPPED[name]
    params, x, t = arrays(Z), arrays(X), jnp.asarray(rand(97, B, 2))
    turn = {"features": slice(None), "one_parameter": slice(0, None, 2), "target": slice(1, None, 2)}.get(name)
    for rule in list(RULES.values())[turn] if turn else (FA, DFA):
        feedback = rule.init(KEY, net, params, x)
        step = lrules.value_and_grad(net, lambda y, t: ((y - t) ** 2).sum(-1), rule)
        rng = {"rng": KEY} if rule.stochastic else {}
        grads = jax.jit(lambda p, f, s=step, k=rng: s(p, f, x, t, **k)[1].params)(params, feedback)
        rounding = 1e-15 if rule is RULES["predictive_coding"] else 0  # it computes mu twice, for x - mu
        assert all(np.max(np.abs(grads[n])) <= rounding for n in still.split()), rule
        assert np.any(grads["c"]), rule
    for rule in (FA, DFA):
        routes = {row["parameter"]: row["route"] for row in lrules.audit(net, rule, params, x).rows}
        assert {n for n, route in routes.items() if route == "not reached"} == set(still.split())


def test_a_target_teaches_nothing():
    """A target network behind stop_gradient is a constant to the online one."""
    params, x = arrays({n: Z[n] for n in "abc"}), arrays(X)
    online = lambda p, x: encode(p, x) @ p["c"]  # noqa: E731
    both = lambda p, x: online(p, x) - stop(online(p, jnp.cos(x)))  # noqa: E731
    target = online(params, jnp.cos(x))
    for rule in (FA, DFA, LAST):
        feedback = rule.init(KEY, online, params, x)
        got = fed(both, rule, params, x, rule.init(KEY, both, params, x))
        f = lrules.transform(online, rule)
        close(got, jax.grad(lambda p, f=f, feedback=feedback: objective(f(p, feedback, x) - target))(params))


# ------------------------------------------------------------------------------------- the output error below a softmax


def values(p, x):
    return tanh(x @ p["a"]) @ p["d"]


same = lambda z: z  # noqa: E731


# ------------------------------------------------------------------------------------------------------------ the audit


# ------------------------------------------------------------------------------------------------------- mutable arrays


def _written(p, x):
    r = jax.new_ref(jnp.zeros((B, 4)))
    r[...] = tanh(tanh(x @ p["a"]) @ p["b"])
    return r[...] @ p["c"]


def _written_in_parts(p, x):
    h, r = tanh(x @ p["a"]), jax.new_ref(jnp.zeros((2, B, 4)))
    r[0], r[1] = tanh(h @ p["b"]), h
    return (r[0] + r[1]) @ p["c"]


def _written_in_a_loop(p, x):
    r = jax.new_ref(tanh(x @ p["a"]))

    def body(i, carry):
        r[...] = tanh(r[...] @ p["b"])
        return carry

    lax.fori_loop(0, 2, body, 0)
    return r[...] @ p["c"]


def _written_in_a_jit(p, x):
    @jax.jit
    def inner(h, w):
        r = jax.new_ref(h)
        r[...] += tanh(r[...] @ w)
        return r[...]

    return inner(tanh(x @ p["a"]), p["b"]) @ p["c"]


WRITTEN = [_written, _written_in_parts, _written_in_a_loop, _written_in_a_jit]
NARROW = weights(a=(3, 4), b=(4, 4), c=(4, 2))


@pytest.mark.parametrize("net", WRITTEN)
@pytest.mark.parametrize("rule", [FA, DFA, LAST, lrules.forward_gradient(), lrules.skipped_backprop()])
def test_what_is_written_into_mutable_arrays_is_refused(net, rule):
    with pytest.raises(NotImplementedError, match=r"writes floating-point numbers into a mutable array .*x.at\[i\]"):
        rule.init(KEY, net, arrays(NARROW), arrays(rand(9, B, 3)))


@pytest.mark.parametrize("net", WRITTEN)
def test_backprop_serves_mutable_arrays(net):
    params, x = arrays(NARROW), arrays(rand(9, B, 3))
    found = fed(net, lrules.backprop(), params, x, lrules.Feedback({}, {}))
    close(found, jax.grad(lambda p: objective(net(p, x)))(params))


def test_mutable_arrays_that_count_or_are_only_read():
    def net(p, x):
        calls, h = jax.new_ref(jnp.zeros((), int)), jax.new_ref(tanh(x @ p["a"]))
        calls[...] += 1
        return tanh(h[...] @ p["b"]) @ p["c"]

    plain = lambda p, x: tanh(tanh(x @ p["a"]) @ p["b"]) @ p["c"]  # noqa: E731
    params, x = arrays(NARROW), arrays(rand(9, B, 3))
    feedback = FA.init(KEY, plain, params, x)
    close(fed(net, FA, params, x, feedback), fed(plain, FA, params, x, feedback))


# ------------------------------------------------------------------------------------------------------ other libraries


class Switched(nn.Module):
    """A head for each example, chosen by `nn.switch` under `nn.vmap`."""

    @nn.compact
    def __call__(self, x, task):
        h = nn.tanh(nn.Dense(6, name="trunk", param_dtype=jnp.float64)(x))
        heads = [nn.Dense(2, name=f"head{i}", param_dtype=jnp.float64) for i in range(2)]
        if self.is_initializing():
            return [head(h) for head in heads][0]
        branches = [lambda m, h, head=head: head(h) for head in heads]
        shared = {"variable_axes": {"params": None}, "split_rngs": {"params": False}}
        return nn.vmap(lambda m, k, h: nn.switch(k, branches, m, h), **shared)(self, task, h)


def test_heads_of_a_linen_module():
    module, x, task = Switched(), arrays(X), jnp.asarray(TASK % 2)
    net, params = lrules.from_linen(module, module.init(KEY, x, task), call=lambda m, i: m(*i))
    feedback = FA.init(KEY, net, params, (x, task))
    assert set(feedback.fixed) == {"head0/kernel", "head1/kernel"}
    fed_back = [feedback.fixed[f"head{i}/kernel"] for i in range(2)]

    def wanted(p):
        h = tanh(x @ p["trunk"]["kernel"] + p["trunk"]["bias"])
        z = [multiply(matmul, p[f"head{i}"]["kernel"], fed_back[i], h) + p[f"head{i}"]["bias"] for i in range(2)]
        return objective(jnp.where((task == 0)[:, None], *z))

    close(fed(net, FA, params, (x, task), feedback), jax.grad(wanted)(params))
    silent = fed(net, LAST, params, (x, task), lrules.Feedback({}, {}))
    assert not np.any(silent["trunk"]["kernel"]) and np.any(silent["head1"]["kernel"])
