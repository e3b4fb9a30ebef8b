"""Where direct feedback lands, how large it may be, and where it cannot land."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lrules
from tests.small import DFA, FA, GLOROT, KEY, W, X, first, mlp, refused


def test_direct_rules_in_a_branch():
    def apply(p, x):
        h = jnp.tanh(x @ p["a"])
        return lax.cond(h.sum() > 0, lambda h: h @ p["b"], lambda h: h, h) @ p["c"]

    refused(apply, "'b'", "cond", "sequential", rule=DFA)
    FA.init(KEY, apply, W, X)


def test_feedback_above_the_limit():
    rule = lrules.direct_feedback_alignment(max_feedback_bytes=100)
    refused(mlp, "144 bytes", "max_feedback_bytes", "at=", "shared_axes", "rank=", rule=rule, error=ValueError)
    wide = W | {"c": jnp.ones((6, 30))}
    for remedy in ({"at": "b"}, {"rank": 1}, {"max_feedback_bytes": 1440}):
        most = {"max_feedback_bytes": 720} | remedy
        lrules.direct_feedback_alignment(**most).init(KEY, mlp, wide, X)
    shared = lrules.direct_feedback_alignment(shared_axes=1, max_feedback_bytes=144)
    shared.init(KEY, mlp, W, jnp.ones((4, 7, 5)))


@pytest.mark.parametrize(
    "make",
    [
        lrules.monotone_dfa,
        lambda **more: lrules.node_perturbation(0.1, direct=True, **more),
        lrules.random_target_projection,
        lambda **more: lrules.direct(lambda e, b, t, n: e @ b, init=GLOROT, offers=(), **more),
    ],
)
def test_no_remedy_that_the_rule_does_not_have(make):
    with pytest.raises(ValueError, match="raise max_feedback_bytes$"):
        make(max_feedback_bytes=100).init(KEY, mlp, W, X)
    make(max_feedback_bytes=144).init(KEY, mlp, W, X)

    def reversed_examples(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"] @ p["c"] + (jnp.sin(x @ p["a"])[::-1] @ p["b"])[::-1] @ p["c"]

    with pytest.raises(ValueError, match="batch axis .* cannot be found .*: write the network so") as caught:
        make().init(KEY, reversed_examples, W, X)
    assert "at=" not in str(caught.value) and "partition" not in str(caught.value)
    refused(reversed_examples, "partition", "at=", rule=DFA, error=ValueError)


def test_marks_beside_layers():
    """A mark on a tensor that a layer reads is the same signal; marks on integers and in loops are no landings."""

    def apply(p, x):
        h = lrules.hidden(first(p, x), "m")
        return jnp.tanh(h @ p["b"]) @ p["c"]

    everywhere = lrules.direct_feedback_alignment(at=".*")
    assert set(everywhere.init(KEY, apply, W, X).fixed) == {"b", "c"}

    def integer(p, x):
        top = lrules.hidden(jnp.argmax(first(p, x), -1), "m")
        return jnp.tanh(first(p, x) @ p["b"]) @ p["c"] + jax.nn.one_hot(top, 3)

    refused(integer, "'m' matches no hidden signal", rule=lrules.direct_feedback_alignment(at="m"), error=ValueError)
