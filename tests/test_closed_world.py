"""The closed world: whatever brings error down by a parameter's own value is a layer, a bias or scale, or refused.

Each kind of network is written in many spellings, and once more by hand, in plain JAX, with two hooks: `layer`, a
product whose backward pass is written out, and `land`, which marks where direct feedback arrives. The numbers of every
spelling have to be those.
"""

import dataclasses
import re
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


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {lrules.network.parameter_name(path): jnp.asarray(leaf) for path, leaf in leaves}


def outputs(net, out):
    return out[0] if isinstance(net, lrules.Network) and net.has_aux else out


# -------------------------------------------------------------------------------------------- the definition, by hand


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
    return jax.grad(lambda p: objective(outputs(net, f(p, feedback, inputs))))(params)


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


# --------------------------------------------------------------------------------------------- weights chosen by data

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
        "one_hot_in_vmap": spelled(lambda p, h, k: jax.vmap(lambda h, k: h @ jnp.tensordot(one_hot(k), p["e"], 1))(h, k)),
        "select_n": spelled(
            lambda p, h, k: each(
                lax.select_n(jnp.broadcast_to(k[:, None, None], (B, 6, 6)).astype(jnp.int32), *map(whole, p["e"])), h
            )
        ),
        "where": spelled(
            lambda p, h, k: each(
                jnp.where((k == 0)[:, None, None], p["e"][0], jnp.where((k == 1)[:, None, None], p["e"][1], p["e"][2])), h
            )
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
    routes={"a": "layer", "e": "layer, feedback", "c": "layer, feedback"},
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
    masked, P, (X, KEEP), below="a e", feedback={"c", "e"}, direct={"c", "e"}, routes={"a": "layer", "e": "layer, feedback"},
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

# --------------------------------------------------------------------------------------------- layers without a batch

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
    TRUNKS, operator, T, (X, Y), below="b1 b2 t1 t1b t2", feedback={"b2", "t1", "t2", "t3"}, direct={"b2", "t1", "t2", "t3"},
    batch_axes=(0, None),
    routes={"t1": "layer, feedback", "t1b": "layer, feedback", "t2": "layer, feedback", "b1": "layer"},
)  # fmt: skip
BENDS = {
    "relu": jax.nn.relu, "gelu": jax.nn.gelu, "sin": jnp.sin, "maximum": lambda t: jnp.maximum(t, 0.0),
    "square": lambda t: t**2, "swish": lambda t: t * jax.nn.sigmoid(t), "elu": jax.nn.elu,
    "layer_norm": lambda t: (t - t.mean(-1, keepdims=True)) / jnp.sqrt(t.var(-1, keepdims=True) + 1e-5),
    "where": lambda t: jnp.where(t > 0, t, 0.0), "leaky": lambda t: jnp.where(t > 0, t, 0.1 * t), "product": lambda t: t * t,
}  # fmt: skip
for _name, _bend in BENDS.items():
    KINDS[f"trunk_{_name}"] = Kind(
        {"closed_over": closed(lambda p, u, f=_bend: joined(branch(p, u), trunk(p, jnp.asarray(Y), f)))},
        lambda p, i, layer, land, f=_bend: operator(p, i, layer, land, f),
        T, (X, Y), below="b1 b2 t1 t1b t2", feedback={"b2", "t1", "t2", "t3"}, direct={"b2", "t1", "t2", "t3"}, batch_axes=(0, None),
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
    routes={"b1": "layer", "t1": "layer, feedback", "ts": "layer, feedback"},
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
    lambda p, i, layer, land: layer(lambda q: q["b2"], land("b2", tanh(i[0] @ p["b1"]))) + painted(p, i[1], layer, land),
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
    positions, BIAS, rand(94, B, 7, 4), below="a v r1 r2", feedback={"r1", "r2", "v", "c"}, direct={"r1", "r2", "v", "c"},
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
            "vmap": lambda p, x, f=_bend: jax.vmap(
                lambda x: tanh(first(p, x) @ f(made(p))) @ p["c"]
            )(x),
        },
        lambda p, x, layer, land, f=_bend: hyper(p, x, layer, land, f),
        H, X, below="a z h1 h2", feedback={"h1", "h2", "c"}, direct={"h1", "h2", "h1#2", "c"},
        routes={"a": "layer", "h2": "layer, feedback", "c": "layer, feedback"},
    )  # fmt: skip

# --------------------------------------------------------------------------------- mixed kernels and bilinear products

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
        "reshaped": lambda p, x: tanh(each((gates(p, x) @ p["m"].reshape(3, -1)).reshape(-1, 6, 6), first(p, x))) @ p["c"],
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


def cases(brief=True):
    return [
        pytest.param(k, s, id=f"{k}-{s}") for k, kind in KINDS.items() for s in kind.spellings if brief or not kind.brief
    ]


def built(name, spelling):
    kind = KINDS[name]
    net = kind.spellings[spelling]
    net = net if isinstance(net, lrules.Network) else lrules.Network(net, batch_axes=kind.batch_axes)
    return kind, net, arrays(kind.params), arrays(kind.inputs)


def arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def zeros(feedback):
    return jax.tree.map(jnp.zeros_like, feedback)


@pytest.mark.parametrize("name, spelling", cases())
def test_sequential(name, spelling):
    """The forward pass is the same, FA is what is written by hand, with the weights as feedback `jax.grad`."""
    kind, net, params, inputs = built(name, spelling)
    feedback = FA.init(KEY, net, params, inputs)
    assert set(feedback.fixed) == kind.feedback and not feedback.learned

    @jax.jit
    def everything(p, fb):
        wanted = by_hand(kind.oracle, p, inputs, fb.fixed, "sequential")
        return lrules.transform(net, FA)(p, fb, inputs), fed(net, FA, p, inputs, fb), wanted

    plain_y, plain = jax.jit(lambda p: (net(p, inputs), jax.grad(lambda p: objective(net(p, inputs)))(p)))(params)
    y, random, wanted = everything(params, feedback)
    np.testing.assert_array_equal(y, plain_y)
    close(random, wanted)
    for n in kind.below.split():
        assert np.max(np.abs(random[n] - plain[n])) > 1e-3 * np.max(np.abs(plain[n])) > 0, n
    close(everything(params, feedback._replace(fixed={n: params[n] for n in feedback.fixed}))[1], plain)
    silent = everything(params, zeros(feedback))[1]
    for n in params:
        assert np.any(silent[n]) == (np.any(plain[n]) and n not in kind.below.split()), n
    if spelling == next(iter(kind.spellings)) and not kind.brief:
        close(fed(net, FA, params, inputs, feedback), random)


@pytest.mark.parametrize("name, spelling", cases(brief=False))
def test_direct(name, spelling):
    """DFA brings e.B to every hidden signal, and nothing else; without feedback it is training of the last layers."""
    kind, net, params, inputs = built(name, spelling)
    if spelling in kind.refused:
        with pytest.raises((ValueError, NotImplementedError), match="the batch axis of the hidden signal|lies inside a cond"):
            DFA.init(KEY, net, params, inputs)
        return
    feedback = DFA.init(KEY, net, params, inputs)
    got = jax.jit(lambda p, fb: fed(net, DFA, p, inputs, fb))
    last = jax.jit(lambda p: by_hand(kind.oracle, p, inputs, {}, "last"))(params)
    close(got(params, zeros(feedback)), last)
    if kind.direct is not None and spelling not in kind.own:
        assert set(feedback.fixed) == kind.direct
        wanted = jax.jit(lambda p, fb: by_hand(kind.oracle, p, inputs, fb.fixed, "direct"))
        close(got(params, feedback), wanted(params, feedback))


@pytest.mark.parametrize("name, spelling", cases(brief=False))
def test_last_layer_only(name, spelling):
    """Nothing arrives below the last layers, and what does above is the gradient."""
    kind, net, params, inputs = built(name, spelling)
    got = jax.jit(lambda p: fed(net, LAST, p, inputs, lrules.Feedback({}, {})))(params)
    close(got, jax.jit(lambda p: by_hand(kind.oracle, p, inputs, {}, "last"))(params))
    assert not any(np.any(got[n]) for n in kind.below.split())


@pytest.mark.parametrize("name, spelling", cases())
def test_audit(name, spelling):
    """The audit agrees, and names the routes."""
    kind, net, params, inputs = built(name, spelling)
    routes = {row["parameter"]: row["route"] for row in lrules.audit(net, FA, params, inputs).rows}
    assert set(routes) == set(params)
    assert {n: routes[n] for n in kind.routes} == kind.routes


# ------------------------------------------------------------------------------------ written by hand: refused by name


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


@pytest.mark.parametrize("name", DISTANCES)
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
        return jnp.exp(-((h**2).sum(-1, keepdims=True) - 2 * h @ p["m"].T + (p["m"] ** 2).sum(-1))) @ p["c"]

    params, x = arrays(D), arrays(X)
    for rule, how in ((FA, "sequential"), (DFA, "direct")):
        feedback = rule.init(KEY, net, params, x)
        assert set(feedback.fixed) == {"m", "c"}
        close(fed(net, rule, params, x, feedback), by_hand(oracle, params, x, feedback.fixed, how))


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
