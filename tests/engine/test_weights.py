"""The feedback weights that a rule draws."""

import jax.numpy as jnp
import pytest

from tests.small import FA, KEY, X


def test_feedback_of_an_ensemble_is_drawn_per_member():
    """One model written with a batch of weights has feedback of the scale of each member."""
    params = {"a": jnp.ones((8, 5, 32)), "b": jnp.ones((8, 32, 32))}

    def apply(p, x):
        return jnp.einsum("ebi,eij->ebj", jnp.tanh(jnp.einsum("bi,eij->ebj", x, p["a"])), p["b"]).mean(0)

    drawn = FA.init(KEY, apply, params, X).fixed["b"]
    assert 0.9 < float(drawn.std()) * 32**0.5 < 1.1


@pytest.mark.parametrize("join", [jnp.stack, lambda ws: jnp.concatenate([w[None] for w in ws])], ids=["stack", "join"])
def test_feedback_of_stacked_weights_is_drawn_as_for_each_alone(join):
    """An ensemble whose members are parameters of their own."""
    params = {"a": jnp.ones((5, 64)), "b": jnp.ones((64, 16)), "c": jnp.ones((64, 16))}

    def apply(p, x):
        return jnp.einsum("bi,eij->bj", jnp.tanh(x @ p["a"]), join([p["b"], p["c"]]))

    drawn = FA.init(KEY, apply, params, X).fixed
    for name in "bc":
        assert 0.9 < float(drawn[name].std()) * ((64 + 16) / 2) ** 0.5 < 1.1
