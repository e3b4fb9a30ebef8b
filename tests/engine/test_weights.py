"""The feedback weights that a rule draws."""

import jax.numpy as jnp
import pytest
from jax import lax

import lrules
from lrules.engine.weights import draw_reduction
from tests.small import FA, KEY, W, X, mlp


def test_feedback_of_an_ensemble_is_drawn_per_member():
    """One model written with a batch of weights has feedback of the scale of each member."""
    params = {"a": jnp.ones((8, 5, 32)), "b": jnp.ones((8, 32, 32))}

    def apply(p, x):
        return jnp.einsum("ebi,eij->ebj", jnp.tanh(jnp.einsum("bi,eij->ebj", x, p["a"])), p["b"]).mean(0)

    drawn = FA.init(KEY, apply, params, X).fixed["b"]
    assert 0.9 < float(drawn.std()) * 32**0.5 < 1.1


JOINS = {
    "stack": jnp.stack,
    "join": lambda ws: jnp.concatenate([w[None] for w in ws]),
    "write": lambda ws: jnp.zeros((2, 64, 16)).at[0].set(ws[0]).at[1].set(ws[1]),
}


@pytest.mark.parametrize("join", JOINS.values(), ids=JOINS)
def test_feedback_of_stacked_weights_is_drawn_as_for_each_alone(join):
    """An ensemble whose members are parameters of their own."""
    params = {"a": jnp.ones((5, 64)), "b": jnp.ones((64, 16)), "c": jnp.ones((64, 16))}

    def apply(p, x):
        return jnp.einsum("bi,eij->bj", jnp.tanh(x @ p["a"]), join([p["b"], p["c"]]))

    drawn = FA.init(KEY, apply, params, X).fixed
    for name in "bc":
        assert 0.9 < float(drawn[name].std()) * ((64 + 16) / 2) ** 0.5 < 1.1


@pytest.mark.parametrize("rank", [1, 2, 3, 8])
def test_a_reduction_keeps_mean_and_variance(rank):
    """Rows of length one, each sums to one; where so few numbers cannot be random, both hold on average at best."""
    rows = draw_reduction(KEY, (4000, rank), jnp.float32)
    squares = (rows**2).sum(1)
    if rank > 2:
        assert jnp.allclose(squares, 1, atol=1e-5) and jnp.allclose(rows.sum(1), 1, atol=1e-5)
        assert jnp.allclose(rows.mean(0), 1 / rank, atol=0.03) and rows.std(0).min() > 0.5 / rank**0.5
    else:
        assert 0.9 < squares.mean() < 1.1 and jnp.allclose(rows.mean(0), 0, atol=0.05)


def test_the_shape_of_direct_feedback_is_told():
    def loop(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["a"], jnp.stack([p["b"], p["b"]]))[0] @ p["c"]

    def told(net, **options):
        rule = lrules.direct_feedback_alignment(**options)
        return {row["hidden signal"]: row["feedback"] for row in lrules.describe(net, rule, W, X).hidden}

    assert told(mlp) == {"b": "3 outputs x (6,)", "c": "3 outputs x (6,)"}
    assert told(mlp, rank=2, at="b") == {"b": "2 rank x (6,)", "c": "-"}
    assert told(loop) == {"b": "2 iterations x 3 outputs x (6,)", "c": "3 outputs x (6,)"}


@pytest.mark.parametrize("turned", [False, True])
def test_feedback_of_a_weight_divided_by_its_norm_is_drawn_as_for_the_weight(turned):
    """The norm has no axes of the parameter any more: those of the weight count, whichever stands first."""
    params = {"a": jnp.ones((5, 64)), "b": jnp.ones((64, 16))}

    def apply(p, x):
        norm = 1 / jnp.sqrt(jnp.square(p["b"]).sum()) * jnp.ones((64, 16))
        return jnp.tanh(x @ p["a"]) @ (norm * p["b"] if turned else p["b"] * norm)

    drawn = FA.init(KEY, apply, params, X).fixed["b"]
    assert 0.9 < float(drawn.std()) * ((64 + 16) / 2) ** 0.5 < 1.1


def test_feedback_of_normalised_weights_in_a_loop():
    params = {"a": jnp.ones((5, 64)), "b": jnp.ones((2, 64, 64)), "c": jnp.ones((64, 3))}

    def apply(p, x):
        turn = lambda h, w: (jnp.tanh(h @ (w / jnp.linalg.norm(w, axis=0, keepdims=True))), None)  # noqa: E731
        return lax.scan(turn, x @ p["a"], p["b"])[0] @ p["c"]

    drawn = FA.init(KEY, apply, params, X).fixed["b"]
    assert drawn.shape == (2, 64, 64) and 0.9 < float(drawn.std()) * 64**0.5 < 1.1
