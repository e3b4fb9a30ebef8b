"""What a run under a plan sends: the output error of networks with several outputs, of several dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from tests.bridge import close

KEY = jax.random.key(0)


def wide_and_narrow(p, x):
    """One output in float32, one in bfloat16, and one of integers, which no error comes from."""
    h = jnp.tanh(x @ p["a"])
    return {"narrow": (h @ p["b"]).astype(jnp.bfloat16), "wide": h @ p["c"], "class": jnp.argmax(h, -1)}


@pytest.mark.parametrize("adaptive", [False, True])
def test_outputs_of_several_dtypes(adaptive):
    """The errors of all outputs are sent side by side in float32, each rounded no further than its output is."""
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 6), "b": (6, 3), "c": (6, 2)}
    params = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    e = {n: rng.normal(size=(5, k)) for n, k in {"narrow": 3, "wide": 2}.items()}
    e = {"narrow": jnp.asarray(e["narrow"], jnp.bfloat16), "wide": jnp.asarray(e["wide"], jnp.float32)}
    rule = lrules.direct_feedback_alignment(adaptive=adaptive)
    feedback = rule.init(KEY, wide_and_narrow, params, x)
    f = lrules.transform(wide_and_narrow, rule)

    @jax.jit
    def gradients(params, feedback):
        def sent(params, feedback):
            y = f(params, feedback, x)
            return sum(jnp.sum((y[n] * e[n]).astype(jnp.float32)) for n in e)

        return jax.grad(sent, (0, 1))(params, feedback)

    got, got_feedback = gradients(params, feedback)
    (b,) = (feedback.learned if adaptive else feedback.fixed).values()
    assert b.shape == (5, 6) and b.dtype == jnp.float32
    exact = lambda v: np.asarray(v, np.float64)  # noqa: E731
    h, b = np.tanh(exact(x) @ exact(params["a"])), exact(b)
    errors = np.concatenate([exact(e["narrow"]), exact(e["wide"])], 1)  # in the order of the outputs' leaves
    close(got["a"], exact(x).T @ (errors @ b * (1 - h**2)), 1e-5)
    close(got["b"], h.T @ exact(e["narrow"]), 1e-2)  # bfloat16 products, as in jax.grad
    close(got["c"], h.T @ exact(e["wide"]), 1e-5)
    assert all(g.dtype == jnp.float32 for g in got.values())
    if adaptive:
        close(*got_feedback.learned.values(), errors.T @ h, 1e-5)
