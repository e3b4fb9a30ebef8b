"""BackMAN against the explicit reference, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import lrules
from tests.reference import backman
from tests.rules.common import ALL_NETS, NOTHING, agrees, make, pull
from tests.small import BACKMAN, FA, KEY, W, X, first, refused


@pytest.mark.parametrize("alpha", [1.0, 0.3, "gradient_norm"])
@pytest.mark.parametrize("name", ALL_NETS)
def test_backman(name, alpha):
    with jax.enable_x64(True):
        net, x, e = make(name)
        agrees(pull(net, lrules.backman(alpha), NOTHING, x, e), backman.gradients(net, x, e, alpha=alpha))


@pytest.mark.parametrize("alpha", [1.0, "gradient_norm"])
@pytest.mark.parametrize("name", ALL_NETS)
def test_dead_neurons(name, alpha):
    """A neuron without gradient gets the layer's mean norm; a wholly dead layer gets zeros, nothing gets NaN."""
    with jax.enable_x64(True):
        net, x, e = make(name)
        dead = net[0]._replace(bias=net[0].bias - 1e4) if net[0].activation == "relu" else net[0]
        partly = net[0]._replace(bias=net[0].bias - 1e4 * (np.arange(len(net[0].bias)) == 1))
        for first in (dead, partly):
            changed = [first, *net[1:]]
            got = pull(changed, lrules.backman(alpha), NOTHING, x, e)
            agrees(got, backman.gradients(changed, x, e, alpha=alpha))
        zero = pull(net, lrules.backman(alpha), NOTHING, x, np.zeros_like(e))
        assert all(not np.any(g) for g in jax.tree.leaves(zero[0]))


@pytest.mark.parametrize("factor", [None, 2.0])
@pytest.mark.parametrize(("check_vma", "weight", "words"), [(False, P(), "check_vma=True"), (True, P("d"), "split")])
def test_backman_inside_a_shard_map_of_the_network(check_vma, weight, words, factor):
    """It needs the gradient of the whole batch: refused where the mesh hides it, or where the weight is split."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    data = P(None, "d") if weight == P("d") else P("d")

    def apply(p, x):
        def inner(w, h):
            return jax.lax.psum(h @ w, "d") if weight == P("d") else h @ w

        out = P() if weight == P("d") else P("d")
        mapped = jax.shard_map(inner, mesh=mesh, in_specs=(weight, data), out_specs=out, check_vma=check_vma)
        return jnp.tanh(mapped(factor * p["b"] if factor else p["b"], first(p, x))) @ p["c"]

    refused(apply, "'b'", words, "partition", rule=BACKMAN)
    FA.init(KEY, apply, W, X)


def test_alpha_by_layer():
    """Each layer has its own norm: as in a partition."""
    with jax.enable_x64(True):
        net, x, e = make("deep")
        got = pull(net, lrules.backman({"0": 0.5, "[12]/": 2.0, ".*": 1.0}), NOTHING, x, e)
        each = {"0": lrules.backman(0.5), "[12]/": lrules.backman(2.0), ".*": lrules.backman()}
        agrees_with = pull(net, lrules.partition(each), NOTHING, x, e)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(agrees_with), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
        norms = np.linalg.norm(got[0]["1"]["kernel"], axis=0)
        np.testing.assert_allclose(norms, 2.0)


@pytest.mark.parametrize(
    ("alpha", "words"),
    [
        ({"head": 1.0, ".*": 2.0}, "alpha: 'head' matches no layer; the layers are 'a', 'b', 'c'"),
        ({"a": 1.0}, "alpha: no pattern matches the layer 'b'"),
    ],
)
def test_patterns_that_do_not_fit(alpha, words):
    with pytest.raises(ValueError, match=words):
        lrules.backman(alpha).init(KEY, lambda p, x: first(p, x) @ p["b"] @ p["c"], W, X)
    with pytest.raises(ValueError, match="alpha must be a finite number >= 0"):
        lrules.backman({"a": -1.0})


def _two_layers(params, x):
    return (x @ params["a"]) @ params["b"]


def _gradients(x, errors):
    """BackMAN's gradients of two linear layers, for these errors at the outputs."""
    params = {"a": jnp.eye(2), "b": jnp.asarray([[1.0, 2.0], [3.0, 4.0]])}
    f = lrules.transform(_two_layers, lrules.backman())
    objective = lambda p, x: jnp.vdot(f(p, lrules.Feedback({}, {}), x), jnp.asarray(errors))  # noqa: E731
    return jax.grad(objective, (0, 1))(params, jnp.asarray(x))


def test_a_neuron_whose_gradient_cancels_sends_error_by_the_mean_norm():
    """Of two equal examples with opposite errors the raw gradient of a neuron is zero, and its error is not."""
    x, errors = np.array([[1.0, 2.0], [1.0, 2.0]]), np.array([[1.0, 1.0], [-1.0, 1.0]])
    grads, to_inputs = _gradients(x, errors)
    raw = x.T @ errors  # [inputs, neurons]: the first column is zero
    norms = np.linalg.norm(raw, axis=0)
    c = 1 / np.where(norms < 1e-15, norms.mean(), norms)
    np.testing.assert_allclose(grads["b"], raw * c, rtol=1e-6)
    down = errors * c @ np.array([[1.0, 2.0], [3.0, 4.0]]).T
    first = x.T @ down
    np.testing.assert_allclose(grads["a"], first / np.linalg.norm(first, axis=0), rtol=1e-5)
    # Of the two examples, the errors that go down differ by what the neuron sends.
    np.testing.assert_allclose(to_inputs, down / np.linalg.norm(first, axis=0), rtol=1e-5)
    assert np.any(errors[:, 0]) and norms[0] == 0


def test_a_layer_whose_gradients_all_cancel_sends_nothing():
    """The mean norm is zero, too: c is 0, and no error goes down."""
    x, errors = np.array([[1.0, 2.0], [1.0, 2.0]]), np.array([[1.0, -3.0], [-1.0, 3.0]])
    grads, down = _gradients(x, errors)
    assert not np.any(grads["b"]) and not np.any(grads["a"])
    assert not np.any(down)


def test_parameters_that_vary_over_the_devices_of_a_named_axis():
    """The axis is in `axis_name` and in the type of the gradient, and is summed over once."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {"a": W["a"], "b": W["b"]}
    x = jax.random.normal(KEY, (8, W["a"].shape[0]))

    def gradients(params, x, axis_name=None):
        f = lrules.transform(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], lrules.backman(axis_name=axis_name))
        return jax.grad(lambda p: (f(p, NOTHING, x) ** 2).sum())(params)

    def on_one_device(params, x):
        params = jax.tree.map(lambda p: jax.lax.pcast(p, ("data",), to="varying"), params)
        return jax.tree.map(lambda g: jax.lax.psum(g, "data"), gradients(params, x, "data"))

    mapped = jax.jit(jax.shard_map(on_one_device, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
    for name, wanted in gradients(params, x).items():
        np.testing.assert_allclose(mapped(params, x)[name], wanted, rtol=1e-4, atol=1e-5)
