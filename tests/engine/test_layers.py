"""Which equations are layers, and which of their operands is the weight."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lrules
from lrules.engine.layers import multiplies

KEY = jax.random.key(0)
X = jnp.ones((4, 3))
A, B, C = (jax.random.normal(jax.random.fold_in(KEY, i), (3, 3)) for i in range(3))


def graph(apply, params):
    return lrules.Network(apply).graph(params, X)


# --------------------------------------------------------------------------------------------- made of parameters alone

STAGES = {
    "a parameter": (lambda a, b, c: a, 0),
    "a curve": (lambda a, b, c: jnp.tanh(a), 0),
    "a product": (lambda a, b, c: a @ b, 1),
    "two products": (lambda a, b, c: a @ b @ c, 1),
    "a curve of a product": (lambda a, b, c: jnp.tanh(a @ b), 2),
    "relu": (lambda a, b, c: jax.nn.relu(a @ b), 2),
    "maximum": (lambda a, b, c: jnp.maximum(a @ b, 0), 2),
    "scaled": (lambda a, b, c: (a @ b) * c, 1),
    "squared": (lambda a, b, c: (a @ b) * (a @ b), 2),
    "divided by a parameter": (lambda a, b, c: (a @ b) / c, 1),
    "divides a parameter": (lambda a, b, c: c / (a @ b), 2),
    "divided by a number made of a product": (lambda a, b, c: a / jnp.full_like(a, (a @ b).sum()), 0),
    "two parameters": (lambda a, b, c: a * c, 0),
    "chosen by a parameter": (lambda a, b, c: jnp.where(a > 0, a @ b, c), 1),
    "chosen by a product": (lambda a, b, c: jnp.where(a @ b > 0, a, c), 2),
}


@pytest.mark.parametrize("name", STAGES)
def test_stages(name):
    """A nonlinear function of a product of parameters may be a network without a batch; a product alone is a weight."""
    function, stage = STAGES[name]
    out = graph(lambda p, x: (x @ p["a"], function(*p.values())), {"a": A, "b": B, "c": C}).outs[1]
    assert out.pure and out.stage == stage


def found(apply, params):
    """The weight and the operand of each layer, by the names of the parameters that they are."""
    net = graph(apply, params)
    names = {id(value): name for name, value in zip(net.names, net.parameters, strict=True)}
    return [(layer.name, names.get(id(layer.weight.root()[0])), names.get(id(layer.operand))) for layer in net.layers]


def test_latents():
    """Learned latents pass layers without a batch: a vector on either side, or else what stands on the left."""
    params = {"latents": A, "l1": B, "l2": C}
    assert found(lambda p, x: x @ (jnp.tanh(p["latents"] @ p["l1"]) @ p["l2"]), params)[:2] == [
        ("l1", "l1", "latents"), ("l2", "l2", None),
    ]  # fmt: skip
    params = {"latents": A[0], "l1": B, "l2": C}
    for apply in (
        lambda p, x: x @ (p["l2"] @ jnp.tanh(p["l1"] @ p["latents"])),
        lambda p, x: x @ (jnp.tanh(p["latents"] @ p["l1"]) @ p["l2"]),
    ):
        assert found(apply, params)[:2] == [("l1", "l1", "latents"), ("l2", "l2", None)]


def test_values_that_pass_a_barrier_together_stay_apart():
    def apply(p, x):
        w, h = lax.optimization_barrier((p["b"], jnp.tanh(x @ p["a"])))
        return h @ w

    net = graph(apply, {"a": A, "b": B})
    assert [(layer.name, layer.weight.pure) for layer in net.layers] == [("a", True), ("b", True)]


def test_a_product_of_one_parameter_is_no_layer():
    """Neither of its two sides is the weight, wherever it is used."""
    layers = found(lambda p, x: x @ (jnp.tanh(p["a"] @ p["a"]) @ p["b"]), {"a": A, "b": B})
    assert ("b", "b", None) in layers and "a" not in [weight for _, weight, _ in layers]


def test_a_product_between_two_transforms():
    """It is a convolution over the transformed axes: a layer, unlike a scale."""

    def mixed(p, x):
        return jnp.fft.irfft(jnp.fft.rfft(jnp.tanh(x @ p["a"])) * p["w"][None], 3) @ p["b"]

    params = {"a": A, "w": jnp.ones(2, jnp.complex64), "b": B}
    (layer,) = [layer for layer in graph(mixed, params).layers if layer.name == "w"]
    assert list(layer.contracted) == [1] and layer.operand.aval.shape == (4, 2)
    scaled = graph(lambda p, x: (jnp.tanh(x @ p["a"]) * p["w"][None]) @ p["b"], {"a": A, "w": B[0], "b": C})
    assert [layer.name for layer in scaled.layers] == ["a", "b"]


def test_a_row_and_a_matrix_that_are_both_looked_up():
    """The matrix is the weight, and the row is what comes in, on whichever side it stands."""
    rows, matrices = jnp.ones((5, 3)), jnp.ones((5, 3, 2))
    for name, text in (("left", "bi,bio->bo"), ("right", "bio,bi->bo")):

        def apply(p, i, text=text):
            both = [p["rows"][i], p["matrices"][i]]
            return jnp.einsum(text, *(both if text.startswith("bi,") else reversed(both)))

        net = lrules.Network(apply).graph({"rows": rows, "matrices": matrices}, jnp.arange(4))
        assert [(layer.name, layer.operation) for layer in net.layers] == [
            ("rows", "gather"), ("matrices", "dot_general"),
        ], name  # fmt: skip


@jax.custom_vjp
def dense(w, x):
    return x @ w


dense.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, d: (r[1].T @ d, d @ r[0].T))


@pytest.mark.parametrize("normal", [False, True])
@pytest.mark.parametrize("product", [lambda w, x: x @ w, dense], ids=["plain", "own derivative"])
def test_a_layer_that_makes_a_matrix_for_each_example(product, normal):
    """The matrix that one layer makes is the weight of the next, also with columns of one size."""

    def apply(p, x):
        made = product(p["maker"], x).reshape(-1, 3, 2)
        made = made / jnp.linalg.norm(made, axis=1, keepdims=True) if normal else made
        return jnp.einsum("bi,bio->bo", jnp.tanh(x @ p["a"]), made)

    net = graph(apply, {"a": A, "maker": jnp.ones((3, 6))})
    assert sorted(layer.name for layer in net.layers) == ["a", "maker", "maker"]
    assert [(layer.mixed, sorted(layer.sources)) for layer in net.layers if layer.mixed] == [(True, [1])]


def test_products_inside():
    """Products are found in a jaxpr and in the jaxprs inside it."""
    for function, wanted in (
        (lambda a: jnp.tanh(a), False),
        (lambda a: a @ a, True),
        (lambda a: jax.jit(lambda a: a @ a)(a), True),
        (lambda a: jnp.tanh(jax.jit(lambda a: a * a)(a)), False),
    ):
        assert multiplies(jax.make_jaxpr(function)(A).jaxpr) is wanted
