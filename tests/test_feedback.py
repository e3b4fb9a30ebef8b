"""Initialisers of feedback weights: their values, how often, and in which layout."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from lrules import feedback

KEY = jax.random.key(0)


@pytest.mark.parametrize("n", [0, 1, 7, 100, 1000])
def test_sparse(n):
    """n neurons of the receiving layer per neuron above, on average; as many as there are if n is larger."""
    drawn = np.asarray(feedback.sparse(n)(KEY, (100, 400)))
    assert set(np.unique(drawn)) <= {0.0, 1.0}
    assert abs(drawn.sum(0).mean() - min(n, 100)) < 0.05 * n + 0.01


def test_sparse_counts_the_receiving_layer():
    """Sequential: the layer below; a convolution: all of its window; direct: the hidden signal."""
    window = np.asarray(feedback.sparse(9)(KEY, (3, 3, 4, 2000)))
    assert abs(window.reshape(36, -1).sum(0).mean() - 9) < 0.3
    apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    params, x = {"a": jnp.ones((3, 50)), "b": jnp.ones((50, 2000))}, jnp.ones((1, 3))
    direct = lrules.direct_feedback_alignment(init=feedback.sparse(5)).init(KEY, apply, params, x).fixed["b"]
    sequential = lrules.feedback_alignment(init=feedback.sparse(5)).init(KEY, apply, params, x).fixed["b"]
    assert direct.shape == (2000, 50) and abs(float(direct.sum(1).mean()) - 5) < 0.2
    assert sequential.shape == (50, 2000) and abs(float(sequential.sum(0).mean()) - 5) < 0.2


def test_sparse_rescaled():
    drawn = np.asarray(feedback.sparse(4, rescale=True)(KEY, (10, 10)))
    np.testing.assert_allclose(np.unique(drawn), [0.0, 0.5])
    for make in (lambda: feedback.sparse(-1), lambda: feedback.sparse(0, rescale=True)):
        with pytest.raises(ValueError, match="n must be a number >"):
            make()


@pytest.mark.parametrize(("values", "init"), [((-1, 1), feedback.binary()), ((0, 1), feedback.binary(0, 1))])
def test_binary(values, init):
    drawn = np.asarray(init(KEY, (100, 100)))
    assert tuple(np.unique(drawn)) == values and abs(drawn.mean() - np.mean(values)) < 0.05


def test_shifted_and_absolute():
    for inner in (jax.nn.initializers.glorot_normal(), jax.nn.initializers.glorot_uniform()):
        plain = inner(KEY, (20, 30), jnp.float32)
        np.testing.assert_allclose(feedback.shifted(0.3, init=inner)(KEY, (20, 30)), plain + 0.3, rtol=1e-6)
        np.testing.assert_array_equal(feedback.absolute(inner)(KEY, (20, 30)), jnp.abs(plain))


def test_congruent():
    weight = jax.random.normal(KEY, (20, 30)).at[0, 0].set(0)
    drawn = np.asarray(feedback.congruent()(KEY, (20, 30), jnp.float32, weight=weight))
    np.testing.assert_array_equal(np.sign(drawn), np.sign(weight))
    np.testing.assert_array_equal(np.abs(drawn)[1:], np.abs(jax.nn.initializers.glorot_normal()(KEY, (20, 30)))[1:])


WRAPPERS = {
    "shifted": lambda init: feedback.shifted(0.1, init=init),
    "absolute": feedback.absolute,
    "averaged": lambda init: feedback.averaged(3, init=init),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_congruent_inside_another(name):
    """The forward weight reaches it, also where a loop runs over the layers; a direct rule has none to give."""
    apply = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["a"], p["b"])[0]  # noqa: E731
    b = jax.random.normal(KEY, (3, 50, 50))
    params, x, init = {"a": jnp.ones((3, 50)), "b": b}, jnp.ones((1, 3)), WRAPPERS[name](feedback.congruent())
    drawn = np.asarray(lrules.feedback_alignment(init).init(KEY, apply, params, x).fixed["b"])
    signs = {"shifted": np.sign(drawn - np.float32(0.1)), "absolute": np.ones_like(drawn)}.get(name, np.sign(drawn))
    np.testing.assert_array_equal(signs, np.ones_like(drawn) if name == "absolute" else np.sign(b))
    assert np.all(drawn > 0) == (name == "absolute")
    with pytest.raises(ValueError, match="does not belong to a weight: use a sequential rule"):
        lrules.direct_feedback_alignment(init).init(KEY, apply, params, x)


@pytest.mark.parametrize(
    "init",
    [
        feedback.sparse(2),
        feedback.sparse(2, rescale=True),
        feedback.binary(),
        feedback.shifted(1.0),
        feedback.averaged(3),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes(init, dtype):
    assert init(KEY, (4, 5), dtype).dtype == dtype
    with pytest.raises(ValueError, match="integer >= 1"):
        feedback.averaged(0)


# ----------------------------------------------------------------------------------------------------- saving, loading


def saved_and_loaded(tmp_path, given):
    feedback.save(tmp_path / "f.npz", given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.npz"]
    return feedback.load(tmp_path / "f.npz")


def same(a, b):
    def leaf(x, y):
        x, y = jnp.asarray(x), jnp.asarray(y)
        if x.dtype != y.dtype or x.shape != y.shape:
            return False
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        return np.asarray(x).tobytes() == np.asarray(y).tobytes()

    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(leaf, a, b))


DTYPES = ["bool", "uint8", "int4", "int32", "float16", "bfloat16", "float8_e4m3fn", "float32", "complex64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_dtypes(tmp_path, dtype):
    drawn = jax.random.normal(KEY, (3, 4)).astype(dtype)
    given = lrules.Feedback({"layers/0/w": drawn}, {"layers/1/w": drawn[0, 0]}, {"empty": drawn[:0]})
    loaded = saved_and_loaded(tmp_path, given)
    assert isinstance(loaded, lrules.Feedback) and same(loaded, given)


def test_saved_containers(tmp_path):
    """All that a state may be made of, with names that read alike; NaN keeps its bits; numbers become arrays."""
    state = {
        "a/b": jnp.asarray([jnp.nan, -jnp.nan, -0.0]), "a": {"b": jnp.ones(2), "c": [{7: jnp.zeros(1)}, (None, ())]},
        "keys": (jax.random.key(1), jax.random.split(jax.random.key(2, impl="rbg"), 3)), "n": 3, "file": {}, "ü": 0.5,
    }  # fmt: skip
    given = lrules.Feedback({"fixed": jnp.ones(1), "w#2": jnp.ones(2)}, {}, state)
    loaded = saved_and_loaded(tmp_path, given)
    assert same(loaded, given) and loaded.state["n"].dtype == jnp.int32
    assert saved_and_loaded(tmp_path, lrules.Feedback({}, {})) == lrules.Feedback({}, {}, ())


def test_what_rules_draw_is_saved(tmp_path):
    """Feedback of every kind trains on as before; the entries are what NumPy alone can read."""
    apply = lambda p, x: jnp.tanh(x @ p["l/a"]) @ p["l/b"]  # noqa: E731
    params, x = {"l/a": jnp.full((3, 4), 0.1), "l/b": jnp.full((4, 2), 0.2)}, jnp.ones((5, 3))
    rls = lrules.node_perturbation(0.1, direct=True, solver="rls")
    for rule in (lrules.feedback_alignment(), lrules.kolen_pollack(), lrules.backprop(), rls):
        given = rule.init(KEY, apply, params, x)
        loaded = saved_and_loaded(tmp_path, given)
        assert same(loaded, given)
        rng = {"rng": KEY} if rule.stochastic else {}
        step = lrules.value_and_grad(apply, lrules.testing.half_squared_error, rule)
        assert same(*(step(params, f, x, jnp.ones((5, 2)), **rng) for f in (given, loaded)))
        with np.load(tmp_path / "f.npz") as file:
            assert all(np.array_equal(file[f"fixed/{name}"], value) for name, value in given.fixed.items())
            assert all(np.array_equal(file[f"learned/{name}"], value) for name, value in given.learned.items())


def test_what_is_not_saved(tmp_path):
    """One sentence, and the file that was there stays."""
    path, given = tmp_path / "f.npz", lrules.Feedback({"w": jnp.ones(2)}, {})
    feedback.save(path, given)
    for state, name, kind in (
        ({"s": (given,)}, "state/s/0", "Feedback"),
        ({"s": {(1, 2): 0}}, "state/s", "dict"),
    ):
        with pytest.raises(TypeError, match=f"the feedback has a {kind} at '{name}', .*: make the state of"):
            feedback.save(path, given._replace(state=state))
    with pytest.raises(TypeError, match="the feedback is a dict, not an lrules.Feedback"):
        feedback.save(path, {"fixed": {}, "learned": {}})
    with pytest.raises(FileNotFoundError):
        feedback.save(tmp_path / "nowhere" / "f.npz", given)
    assert same(feedback.load(path), given) and [p.name for p in tmp_path.iterdir()] == ["f.npz"]


def test_a_file_is_replaced_when_the_new_one_is_complete(tmp_path, monkeypatch):
    """A write that fails leaves the old file and nothing else; a link stays a link."""
    path, link, given = tmp_path / "f.npz", tmp_path / "link", lrules.Feedback({"w": jnp.ones(2)}, {})
    link.symlink_to(path)
    feedback.save(link, given)
    assert link.is_symlink() and same(feedback.load(path), given)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        feedback.save(path, given._replace(learned={"v": jnp.ones(3)}))
    assert same(feedback.load(path), given) and {p.name for p in tmp_path.iterdir()} == {"f.npz", "link"}


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "f.npz"
    with pytest.raises(FileNotFoundError):
        feedback.load(path)
    np.savez(tmp_path / "arrays.npz", w=np.ones(2))
    np.save(tmp_path / "array.npy", np.ones(2))
    np.save(tmp_path / "pickled.npy", np.asarray([{}]), allow_pickle=True)
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("words")
    others = [p for p in tmp_path.iterdir()]
    assert len(others) == 5
    for other in others:
        with pytest.raises(ValueError, match=f"{other} is damaged, or lrules.feedback.save did not write it"):
            feedback.load(other)
    feedback.save(path, lrules.Feedback({"w": jnp.ones(2)}, {}))
    arrays = dict(np.load(path))
    arrays["structure"] = np.asarray(str(arrays["structure"]).replace('"lrules feedback": 1', '"lrules feedback": 2'))
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"of a newer version of lrules \(format 2\): update lrules"):
        feedback.load(path)
    arrays = {name: array for name, array in np.load(path).items() if name != "fixed/w"}
    arrays["structure"] = np.asarray(str(arrays["structure"]).replace('"lrules feedback": 2', '"lrules feedback": 1'))
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"is damaged, .* \(KeyError\)"):
        feedback.load(path)


def test_a_damaged_file(tmp_path):
    """Truncated or with one changed bit: refused, or what was saved."""
    path, given = tmp_path / "f.npz", lrules.Feedback({"w": jnp.arange(6.0)}, {"v": jnp.ones(3, jnp.bfloat16)}, (1,))
    feedback.save(path, given)
    content, refused = path.read_bytes(), 0
    changed = [content[:n] for n in range(0, len(content), 7)]
    for i in range(0, len(content), 3):
        changed.append(content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :])
    for one in changed:
        path.write_bytes(one)
        try:
            loaded = feedback.load(path)
        except ValueError as error:
            assert "is damaged, or lrules.feedback.save did not write it" in str(error)
            refused += 1
        else:
            assert same(loaded, given)
    assert refused > 0.7 * len(changed)


def test_numbers_of_64_bits(tmp_path):
    path = tmp_path / "f.npz"
    with jax.enable_x64(True):
        given = lrules.Feedback({"w": jnp.asarray([0.1], jnp.float64)}, {})
        feedback.save(path, given)
        assert same(feedback.load(path), given)
    with pytest.raises(ValueError, match=r"has 'fixed/w' in float64, and jax_enable_x64 is off: write jax.config"):
        feedback.load(path)
