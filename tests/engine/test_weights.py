"""The feedback weights that a rule draws."""

import jax.numpy as jnp

from tests.small import FA, KEY, X


def test_feedback_of_an_ensemble_is_drawn_per_member():
    """One model written with a batch of weights has feedback of the scale of each member."""
    params = {"a": jnp.ones((8, 5, 32)), "b": jnp.ones((8, 32, 32))}

    def apply(p, x):
        return jnp.einsum("ebi,eij->ebj", jnp.tanh(jnp.einsum("bi,eij->ebj", x, p["a"])), p["b"]).mean(0)

    drawn = FA.init(KEY, apply, params, X).fixed["b"]
    assert 0.9 < float(drawn.std()) * 32**0.5 < 1.1
