"""Where the batch lies: found past reshapes and transposes, and refused where its order is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lrules
from lrules.engine.batch import BatchAxis, Unbatched
from tests.small import DFA, FA, KEY, W, X, first, mlp, refused


def test_batch_axes():
    refused(lambda p, x: mlp(p, x).sum(0), "the batch axis of an output", "has_aux", rule=DFA, error=ValueError)
    refused(lrules.Network(mlp, batch_axes=None), "batch_axes", rule=DFA, error=ValueError)
    refused(lrules.Network(mlp, batch_axes=7), "no batch axis 7", "batch_axes", rule=DFA, error=ValueError)
    refused(lrules.Network(mlp, batch_axes={"x": 0}), "a prefix of", rule=DFA, error=ValueError)
    uneven = lrules.Network(lambda p, x: mlp(p, x[0]) + x[1].sum())
    refused(uneven, "differ in size", "batch_axes", rule=DFA, error=ValueError, inputs=(X, jnp.ones(3)))
    refused(mlp, "the batch is empty", rule=DFA, error=ValueError, inputs=X[:0])

    def mixed(p, x):  # a hidden signal that holds the batch along two axes
        h = jnp.tanh(x @ p["a"])
        return jnp.tanh((h @ h.T) @ (h @ p["b"])) @ p["c"]

    DFA.init(KEY, mixed, W, X)


T = 3
SEQUENCES = jax.random.normal(KEY, (4, T, 5))


def reached(apply, params, x):
    """The examples that get a signal when only example 0 is wrong."""
    feedback = DFA.init(KEY, apply, params, x)
    y, pull = jax.vjp(lambda x: lrules.transform(apply, DFA)(params, feedback, x), x)
    (d,) = pull(jnp.zeros_like(y).at[0].set(1.0))
    return [i for i in range(len(x)) if jnp.any(d[i])]


def test_merged_axes_keep_the_order_of_the_examples():
    def batch_first(p, x):
        return jnp.tanh(first(p, x.reshape(-1, 5)) @ p["b"]).reshape(-1, T, 6).mean(1) @ p["c"]

    def time_first(p, x):
        h = jnp.tanh(first(p, x.transpose(1, 0, 2).reshape(-1, 5)) @ p["b"])
        return h.reshape(T, -1, 6).mean(0) @ p["c"]

    def steps_in_turn(p, x):
        e = first(p, x.reshape(-1, 5)).reshape(-1, T, 6)
        e = jnp.concatenate([e[:, t] for t in range(T)], 0)
        return jnp.tanh(e @ p["b"]).reshape(T, -1, 6).mean(0) @ p["c"]

    for apply in (batch_first, time_first, steps_in_turn):
        for x in (SEQUENCES, SEQUENCES[:1]):
            assert reached(apply, {k: v * 0.1 for k, v in W.items()}, x) == [0]


def test_one_step_of_each_example():
    """The last step is looked up by the length of each sequence, which does not change the order of the examples."""

    def last(p, x):
        h, steps = first(p, x), jnp.where(x[:, 0, 0] > 0, T - 1, T - 2)
        return jnp.tanh(h[jnp.arange(len(x)), steps] @ p["b"]) @ p["c"]

    assert reached(last, {k: v * 0.1 for k, v in W.items()}, SEQUENCES) == [0]


def test_a_write_into_features_keeps_the_order_of_the_examples():
    w = {k: v * 0.1 for k, v in W.items()}
    x = SEQUENCES[:, 0]

    def best(h):
        return h.at[jnp.arange(len(h)), h.argmax(1)].set(0.0)

    for write in (
        lambda h: h.at[:, 0].set(0.0),
        lambda h: h.at[:, 1:3].multiply(2.0),
        lambda h: h.at[:, jnp.array([0, 2])].add(h[:, :2]),
        lambda h: jnp.zeros_like(h).at[:, ::-1].set(h),
        lambda h: h.T.at[0].set(0.0).T,
        lambda h: h[jnp.arange(len(h))],
        lambda h: jnp.stack([h, h], 1).reshape(-1, 6)[jnp.arange(len(h)) * 2 + 1],
        lambda h: h.at[1].set(0.0),  # an example loses its features, the others keep their places
        jax.vmap(lambda h: h.at[h.argmax()].set(0.0)),
        best,
    ):
        assert reached(lambda p, x, write=write: jnp.tanh(write(first(p, x)) @ p["b"]) @ p["c"], w, x) == [0]


def test_indices_made_in_many_steps():
    """Each step reads the one before three times."""

    def looked_up(p, x):
        order = jnp.arange(len(x))
        for _ in range(40):
            order = jnp.where(order < 0, order + len(x), order)
        return jnp.tanh(first(p, x)[order] @ p["b"]) @ p["c"]

    assert reached(looked_up, {k: v * 0.1 for k, v in W.items()}, SEQUENCES[:, 0]) == [0]


@pytest.mark.parametrize("any_batch", [True, False])
def test_the_examples_in_another_order(any_batch):
    """By a gather or a scatter along the batch; also in a model that does not accept another batch."""
    x = SEQUENCES[:, 0]

    def order(h):
        return jnp.arange(len(h) if any_batch else len(x))[::-1]

    for move in (
        lambda h: h[order(h)],
        lambda h: jnp.take(h, order(h), axis=0),
        lambda h: h.T[:, order(h)].T,
        lambda h: jnp.zeros_like(h).at[order(h)].set(h),
        lambda h: h.at[order(h)].add(h),
        lambda h: jnp.zeros_like(h.T).at[:, order(h)].set(h.T).T,
        lambda h: jax.random.permutation(KEY, h),
        lambda h: jax.vmap(lambda i: lax.dynamic_index_in_dim(h, i, keepdims=False))(order(h)),
        lambda h: lax.pad(h, 0.0, ((1, -1, 0), (0, 0, 0))),
        lambda h: jnp.zeros_like(h).at[order(h)[:, None], jnp.arange(6)[None]].set(h),
        lambda h: h.at[order(h), 0].set(h[:, 1]),
        lambda h: jnp.zeros((2, len(h), 6)).at[0, order(h)].set(h)[0],
        *([lambda h: h.reshape(2, -1, 6).at[jnp.array([1, 0])].set(h.reshape(2, -1, 6)).reshape(-1, 6)] * any_batch),
    ):

        def shuffled(p, x, move=move):
            h = first(p, x)
            h = move(h if any_batch else h.reshape(4, 6))
            return jnp.tanh(h @ p["b"]) @ p["c"]

        refused(shuffled, "the batch axis of", rule=DFA, error=ValueError, inputs=x)
        FA.init(KEY, shuffled, W, x)


@pytest.mark.parametrize("steps", [3, 4])
def test_other_axes_of_the_size_of_the_batch(steps):
    """A model that accepts one batch size only, and has as many steps as examples."""
    x = jax.random.normal(KEY, (4, steps, 5))
    w = {k: v * 0.1 for k, v in W.items()}

    def recurrent(p, x):
        cell = lambda h, u: (jnp.tanh(u @ p["a"] + h @ p["b"]),) * 2  # noqa: E731
        return lax.scan(cell, jnp.zeros((4, 6)), x.transpose(1, 0, 2))[1][-1] @ p["c"]

    def causal(p, x):
        h = jnp.pad(x.reshape(4, steps, 5)[:, :-1], ((0, 0), (1, 0), (0, 0)))[:, -1]
        return jnp.tanh(first(p, h) @ p["b"]) @ p["c"]

    for apply in (recurrent, causal):
        assert reached(apply, w, x) == [0]


def test_the_batch_is_brought_to_the_front_and_back():
    shape = (7, 2 * 5 * 3, 4)
    x = jnp.arange(7.0 * 30 * 4).reshape(shape)
    for axis, split, order in (
        (BatchAxis(1, 2, 3), (7, 2, 5, 3, 4), (2, 0, 1, 3, 4)),
        (BatchAxis(1, before=6), (7, 6, 5, 4), (2, 0, 1, 3)),
        (BatchAxis(1, after=6), (7, 5, 6, 4), (1, 0, 2, 3)),
        (BatchAxis(1), shape, (1, 0, 2)),
        (BatchAxis(2), shape, (2, 0, 1)),
    ):
        front = axis.in_front(x, shape, split[order[0]])
        np.testing.assert_array_equal(front, x.reshape(split).transpose(order))
        assert front.shape[1:] == axis.rest(shape)
        np.testing.assert_array_equal(axis.restore(front, shape), x)


def test_what_is_the_same_for_all_examples():
    """Each example has it, and the signals of all examples add up."""
    x = jnp.arange(6.0).reshape(2, 3)
    front = Unbatched().in_front(x, (2, 3), 5)
    assert Unbatched().rest((2, 3)) == (2, 3) and front.shape == (5, 2, 3)
    np.testing.assert_array_equal(Unbatched().restore(front, (2, 3)), 5 * x)


def test_examples_in_another_order():
    """Where examples were reversed or sorted, direct feedback would reach the wrong ones: refused."""

    def reversed_inside(p, x):
        return (jnp.tanh(first(p, x[:, 0])[::-1] @ p["b"]) @ p["c"])[::-1]

    def sorted_inside(p, x):
        order = jnp.argsort(x[:, 0, 0])
        return (jnp.tanh(first(p, x[:, 0])[order] @ p["b"]) @ p["c"])[jnp.argsort(order)]

    def reversed_and_weighted(p, x):  # by numbers that do not come from the examples
        weights = jnp.arange(1.0, len(x) + 1)[:, None]
        return jnp.tanh((weights * first(p, x[:, 0])[::-1]) @ p["b"]) @ p["c"]

    for apply in (reversed_inside, sorted_inside, reversed_and_weighted):
        refused(apply, "batch", rule=DFA, error=ValueError, inputs=SEQUENCES)
        FA.init(KEY, apply, W, SEQUENCES)


def test_a_model_of_one_batch_size():
    def fixed(p, x):  # traces at no other batch; the features are as many as the examples
        e = jnp.tanh(x.reshape(4 * T, 5) @ p["e"])
        return (e @ p["f"]).reshape(4, T, -1).mean(1)

    params = {"e": jnp.ones((5, 4)), "f": jnp.ones((4, 2))}
    refused(fixed, "cannot be found", rule=DFA, error=ValueError, params=params, inputs=SEQUENCES)

    def microbatches(p, x):
        return jnp.concatenate([first(p, x[i : i + 2]) @ p["c"] for i in range(0, len(x), 2)])

    refused(microbatches, "another batch size", rule=DFA, error=ValueError)
