"""Marks inside a model: names of tensors, and functions that are activations or are none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules

X = jax.random.normal(jax.random.key(0), (5, 4))
PARAMS = {
    name: jax.random.normal(jax.random.key(i), shape)
    for i, (name, shape) in enumerate({"a": (4, 6), "b": (6, 6), "c": (6, 3)}.items())
}


def found(net):
    return lrules.describe(net, lrules.feedback_alignment(), PARAMS, X).activations


def test_hidden_changes_no_value():
    tree = {"x": X, "more": (jnp.arange(3), None)}
    named = lrules.hidden(tree, "tree")
    assert jax.tree.structure(named) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, named, tree)


def test_feedback_lands_where_hidden_says():
    def net(p, x):
        h = lrules.hidden(jnp.sin(x @ p["a"]), "sines")
        return jnp.tanh(h @ p["b"]) @ p["c"]

    drawn = lrules.direct_feedback_alignment(at="sines").init(jax.random.key(1), net, PARAMS, X).fixed
    assert {name: b.shape for name, b in drawn.items()} == {"sines": (3, 6)}


def test_hidden_is_documented_in_words_of_its_own():
    assert lrules.hidden.__module__ == "lrules.marks"
    assert "feedback" in lrules.hidden.__doc__ and "rematerialisation" not in lrules.hidden.__doc__


@pytest.mark.parametrize("mark, names", [(lrules.activation, ["wave"]), (lrules.not_activation, [])])
def test_a_function_is_what_its_mark_says(mark, names):
    def wave(x):
        return jnp.tanh(x) + jnp.sin(x)

    marked = mark(wave)
    np.testing.assert_array_equal(marked(X), wave(X))
    assert found(lambda p, x: marked(x @ p["a"]) @ p["b"] @ p["c"]) == names
