"""Products of weights and data that a model sums by hand: refused, and told from scales."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tests.small import BACKMAN, DFA, FA, KEY, W, X, first, refused, zero_below


def test_product_summed_by_hand():
    def apply(p, x):
        h = jnp.tanh(x @ p["a"])
        return (h[:, :, None] * p["b"][None]).sum(1) @ p["c"]

    refused(apply, "'b'", "summed", "einsum")

    def one_neuron(p, x):
        return (jnp.tanh(x @ p["a"]) * p["v"][None]).sum(1, keepdims=True)

    refused(one_neuron, "'v'", "summed", params={"a": W["a"], "v": jnp.ones(6)})


def test_normalisation_is_no_product_summed_by_hand():
    """A scale followed by a mean over other axes, or by the next normalisation after its bias, is served."""

    def norm(scale, bias, x):
        x = x - x.mean(-1, keepdims=True)
        return x * scale[None] + bias[None]

    def apply(p, x):
        h = norm(p["s"], p["t"], x @ p["a"])
        h = norm(p["s"], p["t"], h)
        return jnp.tanh(h * p["s"][None]) @ p["c"]

    FA.init(KEY, apply, {**W, "s": jnp.ones(6), "t": jnp.ones(6)}, X)

    def pooled(p, x):
        h = jnp.stack([x @ p["a"]] * 2, 1) * p["s"][None, None]
        return h.mean(1) @ p["c"]

    FA.init(KEY, pooled, {**W, "s": jnp.ones(6)}, X)


def carried(z):
    """The same values up to constants, by every kind of operation that only carries them."""
    z = checkpoint_name(-z.astype(jnp.bfloat16), "carried").astype(jnp.float32)
    z = jnp.flip(lax.optimization_barrier(lax.reduce_precision(z, 8, 7)), 1).swapaxes(0, 1).swapaxes(0, 1)
    z = jnp.concatenate([z[:, :3], z[:, 3:]], 1).reshape(4, 6, 1, 3).squeeze(2)
    z = jnp.where(jnp.arange(6)[None, :, None] < 5, z, 0.0) + jnp.ones_like(z) - jnp.ones_like(z)
    z = jnp.stack([z, z], 0)[0]
    first_half, second_half = jnp.split(lax.dynamic_slice(z, (0, 0, 0), (4, 6, 3)), 2, 1)
    return jnp.pad(first_half, ((0, 0), (0, 3), (0, 0))) + jnp.pad(second_half / 2, ((0, 0), (3, 0), (0, 0)))


BY_HAND = {
    "scaled": lambda h, w: (0.5 * (h[:, :, None] * w[None])).sum(1),
    "mean": lambda h, w: (h[:, :, None] * w[None]).mean(1),
    "masked": lambda h, w: jnp.sum(h[:, :, None] * w[None], 1, where=(jnp.arange(6) < 5)[None, :, None]),
    "dot_without_contraction": lambda h, w: jnp.einsum("bi,ij->bij", h, w).sum(1),
    "summed_by_a_dot": lambda h, w: jnp.einsum("bij,i->bj", h[:, :, None] * w[None], jnp.ones(6)),
    "cumsum": lambda h, w: jnp.cumsum(h[:, :, None] * w[None], 1)[:, -1],
    "row_by_row": lambda h, w: sum(h[:, i : i + 1] * w[i][None] for i in range(6)),
    "in_a_loop": lambda h, w: lax.fori_loop(
        0, 6, lambda i, s: s + lax.dynamic_slice_in_dim(h, i, 1, 1) * w[i][None], jnp.zeros((4, 3))
    ),
    "shifts": lambda h, w: sum(jnp.pad(h, ((0, 0), (i, 0)))[:, :6] * w[i, 0] for i in range(3)),
    "carried": lambda h, w: carried(h[:, :, None] * w[None]).sum(1),
    "shifts_of_parts": lambda h, w: sum(
        jnp.pad(h, ((0, 0), (i, 0)))[:, :6] * part[None] for i, part in enumerate(jnp.split(w[:3, 0], 3))
    ),
    "shifts_by_index": lambda h, w: sum(
        jnp.pad(h, ((0, 0), (i, 0)))[:, :6] * lax.dynamic_slice(w, (i, 0), (1, 1)) for i in range(3)
    ),
    "shifted_products": lambda h, w: sum(  # scaled, shifted and cut before they are added
        -jnp.pad(0.5 * (h * w[i, 0]), ((0, 0), (i, 0)))[:, :6] / 3 for i in range(3)
    ),
    "quotient": lambda h, w: (h[:, :, None] / w[None]).sum(1),
    "outer": lambda h, w: jnp.trace(jnp.tensordot(h, w, 0), axis1=1, axis2=2),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_products_summed_by_hand(name):
    for rule in (FA, DFA, BACKMAN):
        refused(lambda p, x: BY_HAND[name](first(p, x), p["c"]), "'c'", "summed", "einsum", rule=rule)


def test_scales_are_no_products_summed_by_hand():
    """Normalisations without bias, mixing with a previous token, gated pooling, scaled residuals: all served."""

    def norm(x, scale):
        x = x - x.mean(-1, keepdims=True)
        return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale[None]

    params = {**W, "g": jnp.ones(6)}
    zero_below(lambda p, x: norm(norm(x @ p["a"], p["g"]), p["g"]) @ p["c"], params)
    zero_below(
        lambda p, x: (first(p, x) * p["g"][None] + jnp.roll(first(p, x), 1, 1) * (1 - p["g"][None])) @ p["c"], params
    )
    zero_below(lambda p, x: ((first(p, x) * p["g"][None]).mean(-1, keepdims=True) * first(p, x)) @ p["c"], params)
    zero_below(lambda p, x: (x @ p["a"] + first(p, x) * p["g"][None]) @ p["c"], params)


def test_scales_of_values_that_are_pooled():
    """Each step of each head has its scale, and data weigh the steps: no matrix, as its columns have one scale."""

    def pooled(p, x):
        v = (first(p, x) @ p["b"]).reshape(4, 3, 2)
        steps = jax.nn.softmax((first(p, x) @ p["steps"]), -1)
        return jnp.einsum("bt,btd->bd", steps, v * p["s"][None, :, None])

    zero_below(pooled, W | {"steps": jnp.ones((6, 3)), "s": jnp.ones(3)})

    def heads(p, x):
        v = (first(p, x) @ p["v"]).reshape(4, 3, 2, 2)
        steps = jax.nn.softmax((first(p, x) @ p["steps"]), -1)
        return jnp.einsum("bt,bthd->bhd", steps, v * p["s"][None, :, :, None]).reshape(4, 4)

    zero_below(heads, W | {"v": jnp.ones((6, 12)), "steps": jnp.ones((6, 3)), "s": jnp.ones((3, 2))})


def test_one_scale_of_two_values_that_are_added():
    """The whole parameter scales both, so these are not the shifts of a convolution."""

    def apply(p, x):
        h = first(p, x)
        both = h[:, :, None] * p["s"][None, None] + jnp.sin(h[:, None] + h[:, :, None]) * p["s"][None, None]
        return both.reshape(4, 36) @ p["c"]

    zero_below(apply, W | {"c": jnp.ones((36, 3)), "s": jnp.ones(6)})


def test_distances_to_what_does_not_learn():
    """Of the inputs, or of a hidden signal that no error reaches, a distance is no layer."""
    params = W | {"m": jnp.ones((3, 6)), "n": jnp.ones((3, 5))}

    def distances(z, m):
        return ((z[:, None] - m[None]) ** 2).sum(-1)

    learns = lambda p, x: distances(first(p, x), p["m"]) + first(p, x) @ p["c"]  # noqa: E731
    refused(learns, "'m'", "distance", params=params)
    FA.init(KEY, lambda p, x: distances(lax.stop_gradient(first(p, x)), p["m"]) + first(p, x) @ p["c"], params, X)
    FA.init(KEY, lambda p, x: distances(x, p["n"]) + first(p, x) @ p["c"], params, X)


def test_a_product_that_a_loop_adds_up():
    """The sum over the turns of one product is that product still, and a layer reads it."""

    def apply(p, x):
        product = lambda: first(p, x)[:, :, None] * p["s"][None, None]  # noqa: E731
        return lax.scan(lambda s, _: (0.5 * s + product(), None), product(), None, length=3)[0].reshape(4, 12) @ p["c"]

    zero_below(apply, W | {"c": jnp.ones((12, 3)), "s": jnp.ones(2)})
