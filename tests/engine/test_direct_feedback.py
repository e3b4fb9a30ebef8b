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
    """The message has all bytes, and only remedies that make feedback smaller; each works."""
    dfa, wide = lrules.direct_feedback_alignment, W | {"c": jnp.ones((6, 30))}

    def advice(net=mlp, params=wide, x=X, make=dfa, **options):
        with pytest.raises(ValueError, match="^direct feedback would take [0-9,]+ bytes, above max_feedback") as caught:
            make(max_feedback_bytes=100, **options).init(KEY, net, params, x)
        message = str(caught.value)
        make(max_feedback_bytes=float(message.split()[4].replace(",", "")), **options).init(KEY, net, params, x)
        return [word for word in ("at", "shared_axes", "rank", "storage") if f"({word}=" in message]

    limited = dfa(max_feedback_bytes=1439)
    refused(mlp, "1,440 bytes", "'b', of shape (30, 6)", rule=limited, params=wide, error=ValueError)
    assert advice() == ["at", "rank", "storage"]
    for remedy in ({"at": "b"}, {"rank": 1}, {"storage": "recomputed"}):
        dfa(max_feedback_bytes=720, **remedy).init(KEY, mlp, wide, X)
    assert advice(adaptive=True) == ["at", "rank"]
    assert advice(rank=2) == ["at", "rank", "storage"] and advice(rank=1) == ["at", "storage"]
    assert advice(at="b") == ["rank", "storage"]
    times = jnp.ones((4, 7, 5))
    assert advice(x=times) == ["at", "shared_axes", "rank", "storage"]
    dfa(shared_axes=1, max_feedback_bytes=1440).init(KEY, mlp, wide, times)
    assert advice(x=times, shared_axes=1) == ["at", "rank", "storage"]


def test_each_rule_of_a_partition_has_its_own_limit():
    small, large = (lrules.direct_feedback_alignment(max_feedback_bytes=most) for most in (72, 720))
    wide = W | {"b": jnp.ones((6, 60)), "c": jnp.ones((60, 3))}
    lrules.partition({"b": small, ".*": large}).init(KEY, mlp, wide, X)
    with pytest.raises(ValueError, match="would take 720 bytes, above max_feedback_bytes=72 "):
        lrules.partition({"c": small, ".*": large}).init(KEY, mlp, wide, X)


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
