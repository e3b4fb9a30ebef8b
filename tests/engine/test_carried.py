"""State as floats and back, exactly; and its first value, in loops too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrules.engine.carried import begin, encoded, require_same

STATES = {
    "floats": {"a": jnp.array([0.1, -jnp.inf], jnp.float32), "b": jnp.array(2.0, jnp.bfloat16)},
    "whole": [jnp.array([0, 1, -1, 2**31 - 1, -(2**31)]), jnp.array([0, 2**32 - 1], jnp.uint32)],
    "small": (jnp.array([-128, 127], jnp.int8), jnp.array([-(2**15), 2**15 - 1], jnp.int16), jnp.array([True, False])),
    "keys": {"one": jax.random.key(3), "old": jax.random.PRNGKey(4), "several": jax.random.split(jax.random.key(5), 2)},
    "complex": jnp.array([1 + 2j]),
    "nothing": (),
}


def bits(leaf):
    data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return leaf.dtype, leaf.shape, np.asarray(data).tobytes()


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("jit", [False, True])
def test_states_come_back_as_they_were(name, jit):
    state = STATES[name]

    def there_and_back(state):
        floats, decoded = encoded(state)
        assert all(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(floats))
        return decoded(jax.tree.map(lambda x: x + 0, floats))  # as where cotangents are summed

    back = (jax.jit(there_and_back) if jit else there_and_back)(state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert [bits(x) for x in jax.tree.leaves(back)] == [bits(x) for x in jax.tree.leaves(state)]


def test_wide_integers():
    with jax.enable_x64(True):
        state = jnp.array([2**62 + 3, -5], jnp.int64)
        floats, decoded = encoded(state)
        assert bits(decoded(floats)) == bits(state)


def test_the_first_state():
    def make(like, key, name=None):
        return {"drawn": jax.random.normal(key, like), "count": 0, "name": len(name)}

    one = begin(make, frozenset({"key", "name"}), (4,), "ab", jax.random.key(0), ())
    assert one["drawn"].shape == (4,) and int(one["name"]) == 2
    many = begin(make, frozenset({"key", "name"}), (4,), "ab", jax.random.key(0), (2, 3))
    assert many["drawn"].shape == (2, 3, 4) and many["count"].shape == (2, 3)
    assert len(np.unique(many["drawn"])) == 24  # each iteration its own


def test_another_state_is_refused():
    old = {"m": jnp.zeros(3), "n": jnp.zeros((), jnp.int32)}
    new = require_same({"m": jnp.ones(3), "n": 1}, old, "backward, at the layer 'a',")
    assert new["n"].dtype == jnp.int32
    with pytest.raises(TypeError, match="at the layer 'a', returned a state of the structure"):
        require_same({"m": jnp.ones(3)}, old, "backward, at the layer 'a',")
    with pytest.raises(ValueError, match=r"state of shape \(4,\) and dtype float32, and got one of shape \(3,\)"):
        require_same({"m": jnp.ones(4), "n": 1}, old, "backward, at the layer 'a',")
    with pytest.raises(ValueError, match="dtype float32, and got one of shape .* and dtype int32: keep both"):
        require_same({"m": jnp.ones(3), "n": jnp.ones(())}, old, "backward, at the layer 'a',")
