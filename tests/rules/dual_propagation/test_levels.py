"""The level of a state: loops and long chains."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrules
from lrules.rules.dual_propagation.levels import levels_of
from tests import bridge
from tests.reference import dual_propagation as reference
from tests.rules.dual_propagation.common import NO_FEEDBACK, computed, expected, half_squared, stacked, targets_of

pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.mark.parametrize("order", reference.ORDERS)
def test_loops(order):
    net, x, apply, params = stacked()
    options = {"alpha": 0.3, "beta": 0.5, "iterations": 4, "order": order}
    want = expected(net, x, **options)
    fn = lrules.value_and_grad(apply, half_squared, lrules.dual_propagation(**options))
    _, grads = jax.jit(fn)(params, NO_FEEDBACK, jnp.asarray(x), jnp.asarray(targets_of(net, x)))
    bridge.close(grads.params, {"w": np.stack(want.kernels[:-1]), "out": want.kernels[-1]})
    _, chain = computed(net, x, **options)  # whose states have a residual each
    np.testing.assert_allclose(grads.report["residual"], chain.report["residual"], rtol=1e-10)
    f = lrules.transform(apply, lrules.dual_propagation(**options))
    np.testing.assert_array_equal(
        jax.jit(f)(params, NO_FEEDBACK, jnp.asarray(x)), jax.jit(apply)(params, jnp.asarray(x))
    )


def test_a_loop_without_iterations():
    """It has no state, and so no residual; the layer above learns as without the loop."""
    _, x, apply, params = stacked()
    params, x, y = {"w": params["w"][:0], "out": params["out"]}, jnp.asarray(x), jnp.zeros((5, 2))
    for options in ({"iterations": 3}, {"iterations": 3, "tolerance": 0.1}):
        fn = lrules.value_and_grad(apply, half_squared, lrules.dual_propagation(**options))
        _, grads = jax.jit(fn)(params, NO_FEEDBACK, x, y)
        bridge.close(grads.params["out"], x.T @ (x @ params["out"]) / 5)
        np.testing.assert_array_equal(grads.report["residual"][:2], [1, 0])


def test_a_loop_counts_as_many_layers_as_it_has_iterations():
    net, x, apply, params = stacked(6)
    rule = lrules.dual_propagation(order="forward", iterations=6)
    with pytest.raises(ValueError, match="at least iterations=7"):
        lrules.transform(apply, rule)(params, NO_FEEDBACK, jnp.asarray(x))


@pytest.mark.parametrize(("reverse", "wanted"), [(False, [1, 2, 3]), (True, [3, 2, 1])])
def test_the_last_turn_of_a_reversed_loop_comes_first(reverse, wanted):
    def net(p, x):
        turn = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
        return jnp.sin(jax.lax.scan(turn, x, p["w"], reverse=reverse)[0] @ p["out"])

    params = {"w": jnp.ones((3, 4, 4)), "out": jnp.ones((4, 2))}
    graph = lrules.Network(net).graph(params, jnp.ones((5, 4)))
    levels, outputs = levels_of(graph, {activation.site for activation in graph.activations})
    assert levels["tanh"].tolist() == wanted and (int(levels["sin"]), outputs) == (4, 5)


def vgg16(params, x):
    """13 convolutions of 3x3, max-pooling after the 2nd, 4th, 7th, 10th and 13th, three dense layers (Table 3)."""
    for k in range(13):
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.nn.relu(jax.lax.conv_general_dilated(x, params[f"conv{k}"], (1, 1), "SAME", dimension_numbers=dims))
        if k in (1, 3, 6, 9, 12):
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = x.reshape(x.shape[0], -1)
    for k in range(2):
        x = jax.nn.relu(x @ params[f"fc{k}"])
    return x @ params["out"]


def test_vgg16_takes_sixteen_passes():
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    shapes = {f"conv{k}": (3, 3, *io) for k, io in enumerate(itertools.pairwise(widths))}
    shapes |= {"fc0": (512, 512), "fc1": (512, 512), "out": (512, 10)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    x, y = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 32, 32, 3), (2, 10)))

    def step(params, x, y, iterations):
        rule = lrules.dual_propagation(0.0, beta=0.01, order="forward", iterations=iterations)
        return lrules.value_and_grad(vgg16, optax.softmax_cross_entropy, rule)(params, NO_FEEDBACK, x, y)[1]

    assert jax.eval_shape(functools.partial(step, iterations=16), params, x, y).params == params
    with pytest.raises(ValueError, match="has 16"):
        jax.eval_shape(functools.partial(step, iterations=15), params, x, y)
