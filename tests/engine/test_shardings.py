"""Where feedback lies on a mesh with automatic axes; tests/test_mesh.py has the explicit ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lrules
from lrules.engine.jaxprs import varying_axes
from tests.sampling import mostly_slow

P = PartitionSpec
FREE = P.UNCONSTRAINED
KEY = jax.random.key(1)
DFA = lrules.direct_feedback_alignment()
FA = lrules.feedback_alignment()


def mesh():
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def stated(x, *spec):
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh(), P(*spec)))


class Case:
    """A network, the shapes of its parameters with where they lie, and where direct feedback must lie."""

    def __init__(self, apply, shape, params, direct, rule=DFA):
        self.apply, self.rule, self.direct = apply, rule, direct
        self.x = jax.random.normal(KEY, shape)
        self.alone = {n: jax.random.normal(jax.random.key(i), s) for i, (n, (s, _)) in enumerate(params.items())}
        self.specs = {n: spec for n, (_, spec) in params.items()}

    def placed(self):
        return {n: jax.device_put(v, NamedSharding(mesh(), self.specs[n])) for n, v in self.alone.items()}


CASES = {}


def case(shape, params, direct, rule=DFA):
    def add(apply):
        CASES[apply.__name__] = Case(apply, shape, params, direct, rule)
        return apply

    return add


@case(
    (4, 3),
    {"a": ((3, 8), P(None, "model")), "b": ((8, 6), P("model", None)), "c": ((6, 2), P())},
    {"b": P(None, "model"), "c": P()},
)
def columns_then_rows(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


@case(
    (4, 3),
    {"a": ((3, 8), P(None, "model")), "bias": ((8,), P("model")), "b": ((8, 6), P(None, "model")), "c": ((6, 2), P())},
    {"b": P(None, "model"), "c": P(None, "model")},
)
def columns_alone(p, x):
    """The layers that make the features tell, past a bias, a normalisation and an activation."""
    h = x @ p["a"] + p["bias"][None]
    h = jax.nn.gelu((h - h.mean(1, keepdims=True)) / jnp.sqrt(1 + h.var(1, keepdims=True)))
    return jax.nn.relu(h @ p["b"]) @ p["c"]


@case((4, 3), {"a": ((3, 5), P()), "b": ((5, 6), P()), "c": ((6, 2), P())}, {"b": P(), "c": P()})
def whole_weights(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


@case(
    (4, 4),
    {"a": ((4, 8), P("data", None)), "b": ((8, 6), P("data", None)), "c": ((6, 2), P("data", None))},
    {"b": P(None, "data"), "c": P(None, "data")},
)
def parts_to_save_memory(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


@case(
    (4, 4),
    {"a": ((4, 8), P("data", "model")), "b": ((8, 6), P(("model", "data"), None)), "c": ((6, 2), P("data", None))},
    {"b": P(None, "model"), "c": P()},
)
def parts_and_a_stated_batch(p, x):
    """What the model splits along its batch has no parts along its features."""
    h = jnp.tanh(stated(x @ p["a"], "data", FREE))
    return stated(jnp.tanh(h @ p["b"]), "data") @ p["c"]


@case(
    (4, 4),
    {"a": ((4, 8), P()), "b": ((8, 6), P("data", None)), "c": ((6, 2), P())},
    {"b": P(None, "model"), "c": P(None, "data")},
)
def stated_features(p, x):
    """What the model states comes before the weights."""
    h = jnp.tanh(stated(x @ p["a"], None, "model"))
    return stated(jnp.tanh(h @ p["b"]), FREE, "data") @ p["c"]


@case(
    (4, 6, 6, 3),
    {"a": ((3, 3, 3, 8), P(None, None, None, "model")), "b": ((3, 3, 8, 4), P(None, None, "model", None)),
     "c": ((4, 2), P("model", None))},
    {"b": P(None, None, None, "model"), "c": P(None, "model")},
)  # fmt: skip
def convolutions(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    conv = functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
    h = jax.nn.relu(conv(x, p["a"], dimension_numbers=numbers))
    h = jax.nn.relu(conv(h, p["b"], dimension_numbers=numbers))
    return h.mean((1, 2)) @ p["c"]


@case(
    (4, 3, 6, 6),
    {"a": ((8, 3, 3, 3), P("model")), "b": ((4, 8, 1, 1), P(None, None)), "c": ((144, 2), P())},
    {"b": P(None, "model", None, None), "c": P()},
)
def convolutions_with_channels_first(p, x):
    conv = functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
    h = jax.nn.relu(conv(jax.nn.relu(conv(x, p["a"])), p["b"]))
    return h.reshape(len(x), 144) @ p["c"]


HEADS = {n: ((6, 2, 4), P(None, "model", None)) for n in "qkv"}


@case(
    (4, 5, 6),
    {"e": ((6, 6), P()), **HEADS, "o": ((2, 4, 6), P("model", None, None)), "up": ((6, 8), P(None, "model")),
     "down": ((8, 2), P("model", None))},
    {"q": P(), "o": P(None, None, "model", None), "up": P(), "down": P(None, None, "model")},
)  # fmt: skip
def attention(p, x):
    h = jnp.tanh(x @ p["e"])
    q, k, v = (jnp.einsum("btd,dhe->bthe", h, p[n]) for n in "qkv")
    scores = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k))
    h = h + jnp.einsum("bthe,hed->btd", jnp.einsum("bhts,bshe->bthe", scores, v), p["o"])
    return jnp.tanh(jnp.tanh(h @ p["up"]) @ p["down"]).mean(1)


@case(
    (4, 3),
    {"a": ((3, 8), P(None, "model")), "layers": ((4, 8, 8), P("data", "model", None)), "c": ((8, 2), P("model"))},
    {"layers": P("data", None, "model"), "c": P(None, "model")},
)
def scanned(p, x):
    h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), jnp.tanh(x @ p["a"]), p["layers"])[0]
    return h @ p["c"]


@case(
    (4, 3),
    {"table": ((7, 8), P(None, "model")), "b": ((8, 8), P()), "c": ((8, 4), P("model")), "d": ((12, 2), P())},
    {"b": P(None, None, "model"), "c": P(None, None, "model"), "d": P()},
)
def embedded(p, x):
    """The features of a table; then steps that are merged with the batch."""
    h = p["table"][(x * 7).astype(jnp.int32) % 7]
    h = jnp.tanh(h @ p["b"]).reshape(-1, 8) @ p["c"]
    return h.reshape(len(x), 12) @ p["d"]


@case(
    (4, 3),
    {"a": ((3, 8), P()), "b": ((8, 8), P(None, "model")), "c": ((16, 2), P("model"))},
    {"b": P(), "c": P(None, "model")},
)
def reshaped(p, x):
    """The first of several axes that are merged lies in parts."""
    h = jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"])
    return jnp.stack([h, -h], 2).reshape(len(x), 16) @ p["c"]


@case(
    (4, 5, 3),
    {"a": ((3, 8), P(None, "model")), "b": ((8, 2), P("model"))},
    {"b": P(None, "model")},
    lrules.direct_feedback_alignment(shared_axes=1),
)
def shared_steps(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


@case(
    (4, 3),
    {"a": ((3, 8), P(None, "model")), "b": ((8, 2), P("model"))},
    {"b": P(None, "model"), "(outputs)": P()},
    lrules.direct_feedback_alignment(rank=2),
)
def of_low_rank(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


@case(
    (4, 3),
    {"a": ((3, 6), P(None, "model")), "b": ((3, 2, 2), P()), "c": ((2, 2), P("model"))},
    {"b": P(), "c": P(None, "model")},
)
def indivisible(p, x):
    """Three times two features in two parts: no axis of the signal can be split like this."""
    h = jnp.tanh(x @ p["a"]).reshape(len(x), 3, 2)
    return jnp.tanh(jnp.einsum("bij,ijk->bk", h, p["b"])) @ p["c"]


@case(
    (4, 3),
    {"a": ((3, 8), P(None, "model")), "b": ((8, 2), P())},
    {"mark": P(None, "model")},
    lrules.direct_feedback_alignment(at="mark"),
)
def marked(p, x):
    return lrules.hidden(jnp.tanh(x @ p["a"]), "mark") @ p["b"]


QUICK = ("columns_then_rows", "parts_and_a_stated_batch", "attention", "scanned")


def lie(got, want):
    """Whether arrays lie where shardings say."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, array), sharding in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim), (path, array.sharding, sharding)


def equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def close(got, want):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-7), got, want)


@pytest.mark.parametrize("name", mostly_slow(CASES, QUICK))
def test_direct_feedback_lies_as_its_signal(name):
    """Outside of jit, under jit, and where `shardings` says; the random numbers are those of one device.

    (Under jit XLA may round parts of an array as it does not round the whole, by one bit.)
    """
    one = CASES[name]
    params, init = one.placed(), lambda p: one.rule.init(KEY, one.apply, p, one.x)
    want = lrules.feedback.shardings(one.rule, one.apply, params, one.x)
    assert {n: _trimmed(s) for n, s in want.fixed.items()} == {n: _trimmed(s) for n, s in one.direct.items()}
    drawn = init(params)
    lie(drawn, want)
    equal(drawn, init(one.alone))
    told = jax.jit(init, out_shardings=want)(params)
    lie(told, want)
    close(told, jax.jit(init)(one.alone))
    if name not in LEFT_TO_XLA:
        lie(jax.jit(init)(params), want)


# Under jit the library does not know how the parameters lie, so it cannot leave out what the batch takes.
LEFT_TO_XLA = ("parts_and_a_stated_batch",)


def _trimmed(spec):
    entries = list(getattr(spec, "spec", spec))
    while entries and entries[-1] is None:
        entries.pop()
    return tuple(entries)


@pytest.mark.parametrize("name", mostly_slow(CASES, QUICK))
def test_sequential_feedback_lies_as_its_parameter(name):
    one, rule = CASES[name], lrules.kolen_pollack()
    params, init = one.placed(), lambda p: rule.init(KEY, one.apply, p, one.x)
    want = lrules.feedback.shardings(rule, one.apply, params, one.x)
    assert want.learned == {n: params[n].sharding for n in want.learned}
    drawn = init(params)
    lie(drawn, want)
    equal(drawn, init(one.alone))
    drawn = jax.jit(init)(params)
    lie(drawn, want)
    close(drawn, jax.jit(init)(one.alone))


@pytest.mark.parametrize("rule", [lrules.feedback_alignment, lrules.direct_feedback_alignment])
def test_random_bits_do_not_depend_on_placement(rule):
    """Under jit: numbers that are not rounded are the same, bit for bit, in parts and whole."""
    one, rule = CASES["convolutions"], rule(lrules.feedback.binary())
    init = jax.jit(lambda p: rule.init(KEY, one.apply, p, one.x))
    drawn = init(one.placed())
    assert any(not b.is_fully_replicated for b in drawn.fixed.values())
    equal(drawn, init(one.alone))


@pytest.mark.parametrize("rule", [FA, DFA, lrules.direct_feedback_alignment(adaptive=True)])
def test_seeds(rule):
    """Under vmap over keys, and over parameters that are stacked."""
    one = CASES["columns_then_rows"]
    params, keys = one.placed(), jax.random.split(KEY, 2)
    want = lrules.feedback.shardings(rule, one.apply, params, one.x)
    stacked = jax.tree.map(
        lambda p: jax.device_put(jnp.stack([p, p]), NamedSharding(p.sharding.mesh, P(None, *p.sharding.spec))), params
    )
    want = jax.tree.map(lambda s: NamedSharding(s.mesh, P(None, *s.spec)), want)
    init = lambda key, p: rule.init(key, one.apply, p, one.x)  # noqa: E731
    alone = jax.vmap(init, (0, None))(keys, one.alone)
    for lift in (lambda f: f, jax.jit):
        for axis, given in ((None, params), (0, stacked)):
            drawn = lift(jax.vmap(init, (0, axis)))(keys, given)
            lie(drawn, want)
            close(drawn, alone)


def momentum(layer, key):
    return {"like the weight": jnp.zeros(layer.weight.aval.shape), "noise": jax.random.normal(key, (3,)), "n": 0}


def test_states_of_layers():
    def backward(op, w, b, x, d, layer, *, state):
        return op.weight_gradient(w, x, d), op.passed_down(b, x, d), None, state

    rule = lrules.sequential(backward, init=jax.nn.initializers.glorot_normal(), state=momentum)
    for one in (CASES["columns_then_rows"], CASES["scanned"]):
        params, init = one.placed(), lambda p, one=one: rule.init(KEY, one.apply, p, one.x)
        want = lrules.feedback.shardings(rule, one.apply, params, one.x)
        drawn = init(params)
        lie(drawn, want)
        equal(drawn, init(one.alone))
        lie(jax.jit(init)(params), want)
        lie(jax.jit(init, out_shardings=want)(params), want)
        for name, state in drawn.state.items():
            assert _trimmed(state["like the weight"].sharding) == _trimmed(one.specs[name])
            assert state["noise"].is_fully_replicated and state["n"].is_fully_replicated


def test_states_of_signals():
    def signal(e, b, targets, name, *, state):
        return lrules.extend.project(e, b), state

    rule = lrules.direct(
        signal, init=jax.nn.initializers.glorot_normal(), state=lambda shape: {"mean": jnp.zeros(shape), "n": 0}
    )
    one = CASES["columns_then_rows"]
    params = one.placed()
    drawn = rule.init(KEY, one.apply, params, one.x)
    lie(drawn, lrules.feedback.shardings(rule, one.apply, params, one.x))
    assert _trimmed(drawn.state["b"]["mean"].sharding) == ("model",)
    assert drawn.state["c"]["mean"].is_fully_replicated and drawn.state["b"]["n"].is_fully_replicated


@pytest.mark.parametrize("direct", [True, False])
def test_states_of_least_squares(direct):
    one, rule = CASES["columns_then_rows"], lrules.node_perturbation(0.1, solver="rls", direct=direct)
    params, init = one.placed(), lambda p: rule.init(KEY, one.apply, p, one.x)
    want = lrules.feedback.shardings(rule, one.apply, params, one.x)
    lie(init(params), want)
    lie(jax.jit(init)(params), want)
    assert {n: _trimmed(s) for n, s in want.state["b"].items()} == {
        "b": (None, "model") if direct else ("model",), "s": (None, "model"), "v": (),
    }  # fmt: skip


def test_feedback_that_is_redrawn_has_no_place():
    signal = lambda e, b, targets, name: lrules.extend.project(e, b)  # noqa: E731
    rule = lrules.direct(signal, init=jax.nn.initializers.normal(), redrawn=True)
    one = CASES["columns_then_rows"]
    assert lrules.feedback.shardings(rule, one.apply, one.placed(), one.x) == lrules.Feedback({}, {}, ())


@pytest.mark.parametrize("rule", [FA, DFA, lrules.kolen_pollack()])
def test_the_second_step_compiles_nothing(rule):
    one = CASES["columns_then_rows"]
    params = one.placed()
    feedback = rule.init(KEY, one.apply, params, one.x)
    gradients = lrules.value_and_grad(one.apply, lrules.testing.half_squared_error, rule)
    lies = jax.tree.map(lambda a: a.sharding, (params, feedback))

    @jax.jit(out_shardings=lies)
    def step(params, feedback, x, y):
        _, grads = gradients(params, feedback, x, y)
        learned = jax.tree.map(lambda b, g: b - g, feedback.learned, grads.feedback)
        return jax.tree.map(lambda p, g: p - g, params, grads.params), feedback._replace(learned=learned)

    x, y = jax.device_put((one.x, jnp.ones((4, 2))), NamedSharding(mesh(), P("data")))
    step(*step(params, feedback, x, y), x, y)
    assert step._cache_size() <= 1  # 0: JAX may leave its fast path out


@pytest.mark.foreign
@pytest.mark.parametrize("rule", [FA, DFA])
def test_flax(rule):
    """NNX parameters that are placed by their metadata, and abstract ones."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            part = nnx.with_partitioning
            normal = nnx.initializers.lecun_normal()
            self.up = nnx.Linear(4, 8, kernel_init=part(normal, (None, "model")), rngs=rngs)
            self.down = nnx.Linear(8, 2, kernel_init=part(normal, ("model", None)), rngs=rngs)

        def __call__(self, x):
            return self.down(jnp.tanh(self.up(x)))

    with jax.set_mesh(mesh()):
        net, params = lrules.from_nnx(Model(nnx.Rngs(0)))
    specs = nnx.get_partition_spec(params)
    lies = jax.tree.map(lambda s: NamedSharding(mesh(), s), specs, is_leaf=lambda s: isinstance(s, P))
    params, x = jax.device_put(params, lies), jnp.ones((4, 4))
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)
    drawn = rule.init(KEY, net, params, x)
    lie(drawn, lrules.feedback.shardings(rule, net, abstract, jax.ShapeDtypeStruct((4, 4), "float32")))
    assert _trimmed(drawn.fixed["down/kernel"].sharding) == (("model",) if rule is FA else (None, "model"))


@pytest.mark.parametrize("rule", [DFA, lrules.kolen_pollack(), lrules.node_perturbation(0.1, solver="rls")])
def test_checkpoints(rule, tmp_path):
    """Orbax restores each part of a weight to the device where it belongs."""
    one = CASES["columns_then_rows"]
    params = one.placed()
    feedback = rule.init(KEY, one.apply, params, one.x)
    lies = lrules.feedback.shardings(rule, one.apply, params, one.x)
    shapes = jax.eval_shape(lambda key: rule.init(key, one.apply, params, one.x), KEY)
    template = jax.tree.map(lambda s, lie: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=lie), shapes, lies)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "feedback", feedback)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "feedback", template)
    lie(restored, lies)
    equal(restored, feedback)
    lrules.feedback.save(tmp_path / "feedback.npz", feedback)
    loaded = jax.device_put(lrules.feedback.load(tmp_path / "feedback.npz"), lies)
    lie(loaded, lies)
    equal(loaded, feedback)


@pytest.mark.parametrize("rule", [FA, DFA])
def test_frozen_weights(rule):
    """Also where the frozen weights are constants of a program."""
    one = CASES["columns_then_rows"]
    params, alone = one.placed(), dict(one.alone)
    frozen, first = {"b": params.pop("b")}, {"b": alone.pop("b")}
    net, own = (lrules.Network(lambda p, f, x: one.apply({**p, **f}, x), frozen=f) for f in (frozen, first))
    want = lrules.feedback.shardings(rule, net, params, one.x)
    assert _trimmed(want.fixed["b"]) == (("model",) if rule is FA else (None, "model"))
    init = lambda p: rule.init(KEY, net, p, one.x)  # noqa: E731
    lie(init(params), want)
    lie(jax.jit(init)(params), want)
    equal(init(params), rule.init(KEY, own, alone, one.x))


def test_one_device():
    """Without a mesh, feedback lies where the parameters lie."""
    one = CASES["columns_then_rows"]
    found = lrules.feedback.shardings(DFA, one.apply, one.alone, one.x)
    assert set(found.fixed.values()) == {one.alone["a"].sharding}


def test_what_cannot_be_told():
    one = CASES["columns_then_rows"]
    params = one.placed()
    find = functools.partial(lrules.feedback.shardings, DFA, one.apply)
    remedy = "does not say where it lies: call it outside of jit with arrays, or with jax.ShapeDtypeStruct"
    shapes = jax.eval_shape(lambda: params)
    for given in (params | {"b": np.ones((8, 6), "float32")}, params | {"b": shapes["b"]}):
        with pytest.raises(ValueError, match=f"the parameter 'b' {remedy}"):
            find(given, one.x)
    with pytest.raises(ValueError, match=f"the parameter 'a' {remedy}"):
        jax.jit(lambda p: find(p, one.x))(params)
    with pytest.raises(ValueError, match="feedback.shardings needs to know what a rule does at each layer"):
        lrules.feedback.shardings(lrules.Rule(DFA.init, DFA.transform), one.apply, params, one.x)
    with pytest.raises(TypeError, match="not an lrules.Rule: call its factory first"):
        lrules.feedback.shardings(lrules.kolen_pollack, one.apply, params, one.x)


# --------------------------------------------------------------------------------------- inside a shard_map of the user

SHAPES = {"a": (4, 8), "b": (8, 6), "c": (6, 2)}
WHOLE = {n: jax.random.normal(jax.random.key(i), s) for i, (n, s) in enumerate(SHAPES.items())}
ADD = {"model": lambda h: jax.lax.psum(h, "model"), None: lambda h: h}


def by_hand(p, x, axis="model"):
    """The first layer makes a part of the features, and the second one sums over all parts."""
    h = jnp.tanh(x @ p["a"])
    return jnp.tanh(ADD[axis](h @ p["b"])) @ p["c"]


def gathered_by_hand(p, x):
    """Parts of the weights lie where the parts of the batch lie."""
    p = {n: jax.lax.all_gather(w, "model", tiled=True) for n, w in p.items()}
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


def in_parts(net, rule, specs, feedback_specs, *batch, marked=False):
    """Feedback that is drawn inside of a shard_map over `model`, with the gradients there."""
    lies = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    x = jax.random.normal(KEY, (4, 4))

    def objective(params, feedback, x):
        y = lrules.transform(net, rule)(params, feedback, x)
        value = jnp.mean(y**2)
        return jax.lax.pmean(value, "model") if varying_axes(jax.typeof(value)) else value

    def run(params, x):
        if marked:
            params = jax.tree.map(lambda p: jax.lax.pcast(p, ("model",), to="varying"), params)
        feedback = rule.init(KEY, net, params, x)
        grads = jax.grad(objective)(params, feedback, x)
        return feedback.fixed, jax.lax.psum(grads, "model") if marked else grads

    mapped = jax.shard_map(run, mesh=lies, in_specs=(specs, P(*batch)), out_specs=(feedback_specs, specs))
    return x, *jax.jit(mapped)(WHOLE, x)


@pytest.mark.parametrize("rule", [FA, DFA])
def test_tensor_parallel_by_hand(rule):
    """Each device draws its own part of a feedback weight; together they are one feedback weight."""
    specs = {"a": P(None, "model"), "b": P("model", None), "c": P()}
    lies = {"b": P("model", None) if rule is FA else P(None, "model"), "c": P()}
    x, drawn, grads = in_parts(by_hand, rule, specs, lies)
    first, second = jnp.split(drawn["b"], 2, axis=0 if rule is FA else 1)
    assert not jnp.any(first == second)
    net = functools.partial(by_hand, axis=None)
    alone = jax.grad(lambda p: jnp.mean(lrules.transform(net, rule)(p, lrules.Feedback(drawn, {}), x) ** 2))(WHOLE)
    close(grads, alone)


@pytest.mark.parametrize("rule", [FA, DFA])
def test_weights_gathered_by_hand(rule):
    """Sequential feedback is in parts, as the weights that the network gathers; direct feedback is whole."""
    specs = {n: P("model") for n in SHAPES}
    lies = {n: P("model") if rule is FA else P() for n in "bc"}
    x, drawn, grads = in_parts(gathered_by_hand, rule, specs, lies, "model")
    net = functools.partial(by_hand, axis=None)
    alone = jax.grad(lambda p: jnp.mean(lrules.transform(net, rule)(p, lrules.Feedback(drawn, {}), x) ** 2))(WHOLE)
    close(grads, alone)
    if rule is FA:
        assert not jnp.any(drawn["b"][:4] == drawn["b"][4:])


@pytest.mark.parametrize("rule", [FA, DFA])
def test_data_parallel_with_marked_parameters(rule):
    """Parameters that are marked as different, and are not, have one feedback."""
    net = functools.partial(by_hand, axis=None)
    x, drawn, _ = in_parts(net, rule, dict.fromkeys(SHAPES, P()), P(), "model", marked=True)
    close(drawn, rule.init(KEY, net, WHOLE, x).fixed)
