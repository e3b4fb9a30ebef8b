"""Feedback that is drawn again in tiles: the numbers of the initializer, bit for bit, and no memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lrules
from lrules.engine import recomputed
from lrules.engine.recomputed import Matrix
from lrules.engine.weights import draw_reduction
from tests.small import KEY, W, X, half_square, mlp

INITS = {
    "glorot_normal": jax.nn.initializers.glorot_normal(),
    "he_uniform": jax.nn.initializers.he_uniform(),
    "normal": jax.nn.initializers.normal(),
    "zeros": jax.nn.initializers.zeros,
    "sparse": lrules.feedback.sparse(3),
    "binary": lrules.feedback.binary(),
    "shifted": lrules.feedback.shifted(0.1),
    "absolute": lrules.feedback.absolute(),
    "averaged": lrules.feedback.averaged(3),
    "by_row": lambda key, shape, dtype: jax.random.normal(key, shape, dtype) * jnp.ones(shape[0], dtype)[:, None],
    "turned": lambda key, shape, dtype: jax.random.uniform(key, shape[::-1], dtype).T,
    "integers": lambda key, shape, dtype: jax.random.randint(key, (1, *shape), -3, 4)[0].astype(dtype),
    "of a reduction": draw_reduction,
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(recomputed, "TILE", 12)
    monkeypatch.setattr(recomputed, "COLUMNS", 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", INITS)
def test_tiles_are_parts_of_what_the_initializer_draws(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        matrix = Matrix(INITS[name], 23, 7, jnp.dtype(dtype), "x")
        key = jax.random.key(5)
        whole = np.asarray(jax.jit(lambda key: INITS[name](key, (23, 7), jnp.dtype(dtype)))(key))
        for row, column in ((0, 0), (5, 0), (18, 0), (20, 4)):
            tile = matrix.part(jax.random.key_data(key), (row, column), (3, 3))
            assert tile.dtype == whole.dtype and np.array_equal(tile, whole[row : row + 3, column : column + 3])


def test_the_sizes_of_tiles():
    assert [recomputed._equal(n, 5) for n in (1, 5, 6, 10, 11)] == [1, 5, 3, 5, 4] and recomputed._equal(3, 0) == 1
    assert recomputed._starts(11, 4) == [0, 4, 7] and recomputed._starts(3, 3) == [0]


def test_places_beyond_32_bits():
    high, low = recomputed._places((3, 100_000, 70_000), [(1, 2), (99_990, 4), (5, 3)])
    i, j, k = np.meshgrid(np.arange(1, 3), np.arange(99_990, 99_994), np.arange(5, 8), indexing="ij")
    wanted = ((i * 100_000 + j) * 70_000 + k).astype(np.uint64)
    assert np.array_equal((np.asarray(high, np.uint64) << np.uint64(32)) | np.asarray(low), wanted)


def deep(params, x):
    """A convolution, a scan over layers, a dense layer."""
    h = jax.lax.conv(x, params["conv"], (1, 1), "VALID")
    h = jnp.tanh(h).reshape(x.shape[0], -1)
    h = jnp.tanh(h @ params["in"])
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["scanned"])
    return h @ params["out"]


def deep_case(dtype="float32"):
    keys = iter(jax.random.split(KEY, 5))
    shapes = {"conv": (3, 2, 2, 2), "in": (27, 6), "scanned": (3, 6, 6), "out": (6, 5)}
    params = {name: jax.random.normal(next(keys), shape, dtype) / 3 for name, shape in shapes.items()}
    return deep, params, jax.random.normal(next(keys), (4, 2, 4, 4), dtype), jnp.ones((4, 5), dtype)


def pair(**options):
    stored = lrules.direct_feedback_alignment(**options)
    return stored, lrules.direct_feedback_alignment(storage="recomputed", **options)


def updates(rule, apply, params, x, y, key=KEY, feedback=None):
    if feedback is None:
        feedback = jax.jit(lambda key: rule.init(key, apply, params, x))(key)
    return lrules.value_and_grad(apply, half_square, rule)(params, feedback, x, y)[1].params


def close(got, wanted, rtol=1e-12):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=rtol), got, wanted)


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"rank": 3, "max_feedback_bytes": 4000}], ids=str)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_equals_stored_feedback(options, jit):
    with jax.enable_x64(True):
        run = jax.jit(updates, static_argnums=(0, 1)) if jit else updates
        case = deep_case("float64")
        stored, again = (run(rule, *case) for rule in pair(**options))
        close(again, stored)


def test_equals_stored_feedback_along_shared_axes():
    def apply(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    x = jax.random.normal(KEY, (2, 7, 5))
    stored, again = (updates(rule, apply, W, x, jnp.ones((2, 7, 3))) for rule in pair(shared_axes=1))
    close(again, stored, 1e-6)


def test_feedback_holds_keys_alone():
    apply, params, x, _ = deep_case()
    for options, names in (({}, ["in", "out", "scanned"]), ({"rank": 2}, ["(outputs)", "in", "out", "scanned"])):
        rule = pair(**options)[1]
        feedback = rule.init(KEY, apply, params, x)
        assert {name: (b.shape, b.dtype) for name, b in feedback.fixed.items()} == dict.fromkeys(
            names, ((2,), jnp.uint32)
        )
        found = lrules.describe(apply, rule, params, x)
        assert found.feedback_bytes == 8 * len(names)
        assert found.hidden[0]["bytes"] == 8 and found.hidden[0]["feedback"].endswith("x (27,), drawn again")
    tight = lrules.direct_feedback_alignment(storage="recomputed", max_feedback_bytes=24)
    assert len(tight.init(KEY, apply, params, x).fixed) == 3


def test_vmap_over_seeds_and_sharded():
    rule, y = pair()[1], jnp.ones((4, 3))
    keys = jax.random.split(KEY, 3)
    many = jax.jit(jax.vmap(lambda key: updates(rule, mlp, W, X, y, key)))(keys)
    for i in range(3):
        alone = updates(rule, mlp, W, X, y, keys[i])
        close(jax.tree.map(lambda g: g[i], many), alone, 1e-6)  # noqa: B023
    mesh = jax.make_mesh((2, 2), ("batch", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    params = {name: put(w, None, "model") if name != "c" else put(w, "model", None) for name, w in W.items()}
    feedback = rule.init(KEY, mlp, W, X)
    split = jax.jit(functools.partial(updates, rule, mlp, key=None))(params, put(X, "batch"), y, feedback=feedback)
    close(split, updates(rule, mlp, W, X, y), 1e-6)


def test_explicit_mesh_and_shard_map():
    rule, y = pair()[1], jnp.ones((4, 3))
    feedback, wanted = rule.init(KEY, mlp, W, X), updates(rule, mlp, W, X, y)
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("batch")))
        t = jax.device_put(y, NamedSharding(mesh, PartitionSpec("batch")))
        params = jax.device_put(W, NamedSharding(mesh, PartitionSpec()))
        close(jax.jit(lambda p, x, t: updates(rule, mlp, p, x, t, feedback=feedback))(params, x, t), wanted, 1e-6)
    auto = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("batch")

    @functools.partial(jax.shard_map, mesh=auto, in_specs=(PartitionSpec(), spec, spec), out_specs=PartitionSpec())
    def mapped(params, x, y):
        return jax.tree.map(lambda g: g / 2, updates(rule, mlp, params, x, y, feedback=feedback))

    close(jax.jit(mapped)(W, X, y), wanted, 1e-6)


def test_memory_does_not_grow_with_the_outputs(monkeypatch):
    monkeypatch.setattr(recomputed, "TILE", 2**12)
    params = {name: jnp.zeros(shape) for name, shape in {"a": (8, 512), "b": (512, 512), "c": (512, 2000)}.items()}
    x, y = jnp.zeros((2, 8)), jnp.zeros((2, 2000))

    def temporary(rule):
        feedback = jax.eval_shape(lambda key: rule.init(key, mlp, params, x), KEY)
        step = jax.jit(lrules.value_and_grad(mlp, half_square, rule))
        return step.lower(params, feedback, x, y).compile().memory_analysis().temp_size_in_bytes

    stored, again = map(temporary, pair())
    one = 4 * 512 * 2000  # bytes of a stored feedback weight, of which there are two
    assert again < stored + one / 16


def test_redrawn_feedback_may_be_recomputed_too():
    def signal(e, b, targets, name):
        return lrules.extend.project(e, b)

    glorot = jax.nn.initializers.glorot_normal()
    rules = [lrules.direct(signal, init=glorot, redrawn=True, storage=s) for s in ("stored", "recomputed")]
    steps = [lrules.value_and_grad(mlp, half_square, rule) for rule in rules]
    got = [s(W, lrules.Feedback({}, {}), X, jnp.ones((4, 3)), rng=KEY)[1].params for s in map(jax.jit, steps)]
    close(*got, 1e-6)


def test_saves_and_passes_the_conformance_test(tmp_path):
    rule = pair()[1]
    lrules.testing.check_rule(rule)
    feedback = rule.init(KEY, mlp, W, X)
    lrules.feedback.save(tmp_path / "feedback.npz", feedback)
    loaded = lrules.feedback.load(tmp_path / "feedback.npz")
    wanted = updates(rule, mlp, W, X, jnp.ones((4, 3)), feedback=feedback)
    close(updates(rule, mlp, W, X, jnp.ones((4, 3)), feedback=loaded), wanted, 0)
    assert lrules.diagnostics.weight_alignment(feedback, W) == {}


def test_refusals():
    direct = functools.partial(lrules.direct_feedback_alignment, storage="recomputed")
    with pytest.raises(ValueError, match="cannot learn: leave out adaptive=True"):
        direct(adaptive=True)
    with pytest.raises(ValueError, match='storage must be "stored" or "recomputed", got 3'):
        lrules.direct_feedback_alignment(storage=3)
    with pytest.raises(ValueError, match="give init too"):
        lrules.direct(lambda e, b, targets, name: e, storage="recomputed")
    with pytest.raises(ValueError, match=r"'b' in tiles.*all its numbers together \(qr\).*glorot_normal"):
        direct(jax.nn.initializers.orthogonal()).init(KEY, mlp, W | {"b": jnp.ones((6, 50)), "c": jnp.ones((50, 3))}, X)
    with pytest.raises(ValueError, match="got a key of rbg"):
        direct().init(jax.random.key(0, impl="rbg"), mlp, W, X)
    with jax.threefry_partitionable(False), pytest.raises(ValueError, match="got jax_threefry_partitionable=False"):
        direct().init(KEY, mlp, W, X)
    feedback = direct().init(KEY, mlp, W, X)
    cast = feedback._replace(fixed=jax.tree.map(lambda b: b.astype(jnp.bfloat16), feedback.fixed))
    with pytest.raises(ValueError, match="is a key, two words of dtype uint32"):
        updates(direct(), mlp, W, X, jnp.ones((4, 3)), feedback=cast)
    with pytest.raises(ValueError, match=r'draw it again at each step \(storage="recomputed"\)'):
        lrules.direct_feedback_alignment(max_feedback_bytes=1).init(KEY, mlp, W, X)
    with pytest.raises(ValueError) as caught:
        lrules.direct_feedback_alignment(adaptive=True, max_feedback_bytes=1).init(KEY, mlp, W, X)
    assert "recomputed" not in str(caught.value)
    with pytest.raises(ValueError, match=r"raise max_feedback_bytes, or let it land at fewer places \(at=\)$"):
        direct(max_feedback_bytes=9).init(KEY, mlp, W, X)
    direct(max_feedback_bytes=9, at="c$").init(KEY, mlp, W, X)
