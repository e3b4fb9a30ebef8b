"""Dual propagation as a rule: under transform, vmap, shard_map and modifiers, and what it refuses."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrules
from tests import bridge
from tests.rules.dual_propagation.common import (
    NO_FEEDBACK,
    computed,
    conv,
    dense,
    expected,
    half_squared,
    refused,
    residual_case,
    residual_net,
    targets_of,
    transformed,
)
from tests.sampling import mostly_slow, pairs

pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.mark.parametrize(
    "case,adjoint,alpha,iterations",
    [(dense, True, 0.25, 3), (conv, False, 0.0, 1), (dense, True, 0.5, 2)],
)
def test_transform(case, adjoint, alpha, iterations):
    net, x = case()
    options = {"alpha": alpha, "beta": 0.4, "adjoint": adjoint, "iterations": iterations}
    want = expected(net, x, **options)
    params, inputs = transformed(net, x, **options)
    bridge.close((params, inputs), (bridge.kernels_and_biases(want), want.inputs))


def test_transform_of_a_sum():
    net, x = dense()
    y = jnp.asarray(targets_of(net, x))
    rule = lrules.dual_propagation(alpha=0.2, beta=0.4)
    means, sums = (lrules.transform(bridge.apply_of(net), rule, reduction=r) for r in ("mean", "sum"))
    params = bridge.parameters(net)
    mean = jax.jit(jax.grad(lambda p: half_squared(means(p, NO_FEEDBACK, jnp.asarray(x)), y).mean()))(params)
    total = jax.jit(jax.grad(lambda p: half_squared(sums(p, NO_FEEDBACK, jnp.asarray(x)), y).sum()))(params)
    bridge.close(jax.tree.map(lambda g: g / len(x), total), mean)


def test_feedback_weights():
    net, x = conv()
    rng = np.random.default_rng(3)
    feedback = [None, *(rng.normal(size=layer.kernel.shape) for layer in net[1:])]
    options = {"alpha": 0.3, "beta": 0.5, "iterations": 3}
    want = expected(net, x, feedback=feedback, **options)
    fixed = lrules.Feedback(bridge.feedback_dict(feedback), {})
    _, grads = computed(net, x, fixed, feedback_rule=lrules.feedback_alignment(), **options)
    bridge.close(grads.params, bridge.kernels_and_biases(want))
    learned = lrules.Feedback({}, bridge.feedback_dict(feedback))
    _, grads = computed(net, x, learned, feedback_rule=lrules.kolen_pollack(), **options)
    bridge.close(grads.params, bridge.kernels_and_biases(want))
    bridge.close(grads.feedback, {f"{k}/kernel": want.kernels[k] for k in range(1, len(net))})


def test_under_vmap_and_eager():
    params, x, y = residual_case()
    fn = lrules.value_and_grad(residual_net, half_squared, lrules.dual_propagation(0.3, beta=0.5, iterations=3))
    seeds = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    _, both = jax.jit(jax.vmap(lambda p: fn(p, NO_FEEDBACK, x, y)))(seeds)
    for i, scale in enumerate((1, 2)):
        _, one = fn(jax.tree.map(lambda p, scale=scale: scale * p, params), NO_FEEDBACK, x, y)
        bridge.close(jax.tree.map(lambda g, i=i: g[i], both.params), one.params)


def test_aux_integers_and_half_precision():
    def apply(params, inputs):
        x, scale = inputs
        h = jax.nn.relu(x @ params["a"]) * scale.astype(x.dtype)
        out = h @ params["b"]
        return (out, jnp.argmax(out, -1)), {"h": h}

    net = lrules.Network(apply, has_aux=True, batch_axes=(0, None))
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=s), jnp.bfloat16) for n, s in {"a": (3, 4), "b": (4, 2)}.items()}
    inputs = jnp.asarray(rng.normal(size=(5, 3)), jnp.bfloat16), jnp.asarray(1)
    y = jnp.zeros((5, 2), jnp.bfloat16)
    for output in ("once", "refreshed"):
        rule = lrules.dual_propagation(output=output, iterations=2)
        fn = lrules.value_and_grad(net, lambda o, t: half_squared(o[0], t), rule)
        (_, outputs, aux), grads = jax.jit(fn)(params, NO_FEEDBACK, inputs, y)
        assert aux["h"].shape == (5, 4) and outputs[1].dtype == jnp.int64
        assert all(g.dtype == jnp.bfloat16 and jnp.any(g) for g in jax.tree.leaves(grads.params))
    f = lrules.transform(net, rule._replace() if output == "once" else lrules.dual_propagation())
    grads = jax.grad(lambda p: half_squared(f(p, NO_FEEDBACK, inputs)[0][0], y).mean())(params)
    assert all(jnp.any(g) for g in jax.tree.leaves(grads))


def test_refusals():
    refused(ValueError, "has 3", order="forward", iterations=2)
    refused(ValueError, "has a minimiser only if", alpha=0.0, beta=1.0, adjoint=False, output="squared_error")
    exact = {"adjoint": False, "output": "squared_error"}
    message = "cannot see this: write the loss as a sum of jnp.square"
    refused(ValueError, message, loss=optax.softmax_cross_entropy, **exact)
    refused(ValueError, "feedback_rule must be a sequential rule", feedback_rule=lrules.direct_feedback_alignment())
    refused(NotImplementedError, "derivatives", modify=lrules.without_derivatives)
    net, x = dense()
    with pytest.raises(ValueError, match="value_and_grad"):
        lrules.transform(bridge.apply_of(net), lrules.dual_propagation(output="refreshed"))


def test_describe_lists_activations():
    params, x, _ = residual_case()
    text = lrules.describe(residual_net, lrules.dual_propagation(), params, x)
    assert text.activations == ["tanh", "relu", "tanh#2", "gelu"]


def test_error_modifiers_compose():
    """At weak feedback a modified dual propagation is the modified backprop."""
    net, x = dense(activations=("tanh", "tanh"))
    y, params = jnp.asarray(targets_of(net, x)), bridge.parameters(net)

    def grads(rule, **rng):
        fn = lrules.value_and_grad(bridge.apply_of(net), half_squared, rule)
        return jax.jit(fn)(params, NO_FEEDBACK, jnp.asarray(x), y, **rng)[1].params

    weak = lrules.dual_propagation(beta=1e-5)
    for modify in (
        lambda r: lrules.modify_error(r, lambda s, name, rng: s.clip(-0.05, 0.05)),
        lrules.magnitude_error,
        lrules.sign_error,
        lambda r: lrules.quantize_error(r, 3),
        lambda r: lrules.quantize_error(r, 3, at="output"),
        lambda r: lrules.sign_error(lrules.quantize_error(r, 3)),
    ):
        bridge.close(grads(modify(weak)), grads(modify(lrules.backprop())), 1e-6)
    quantised = [lrules.quantize_update(r, 20, scale=4.0) for r in (weak, lrules.backprop())]
    for a, b in itertools.pairwise([grads(r) for r in quantised]):
        assert all(
            np.abs(g - h).max() < 1e-2 * np.abs(h).max() for g, h in zip(*map(jax.tree.leaves, (a, b)), strict=True)
        )
    key = {"rng": jax.random.key(1)}
    dropped = [grads(lrules.drop_error(r, 0.5), **key) for r in (weak, lrules.backprop())]
    bridge.close(*dropped, 1e-6)


SHARDED = {
    "one sweep": {},
    "sweeps": {"alpha": 0.2, "iterations": 3},
    "until settled": {"alpha": 0.2, "iterations": 9, "tolerance": 1e-9},
    "forward": {"alpha": 0.2, "iterations": 5, "order": "forward"},
    "odd and even": {"alpha": 0.2, "iterations": 3, "order": "odd_even"},
    "inputs too": {"alpha": 0.2, "iterations": 2, "input_nudge": 1.0},
}


@pytest.mark.parametrize(
    "name,check_vma",
    mostly_slow(
        pairs(SHARDED, [True, False]),
        [("one sweep", True), ("until settled", True), ("inputs too", True), ("sweeps", False)],
    ),
)
def test_shard_map(name, check_vma):
    """A mean over all devices' examples, each device with its share of it: gradients sum to that of the batch."""
    params, x, y = residual_case()
    x, y = jnp.concatenate([x, x[:1]]), jnp.concatenate([y, y[:1]])
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def gradient(f, params, x, y):
        return jax.grad(lambda p: half_squared(f(p, NO_FEEDBACK, x), y).sum() / 8)(params)

    def shared(params, x, y):
        f = lrules.transform(residual_net, lrules.dual_propagation(beta=0.2, **SHARDED[name], axis_name="data"))
        grads = gradient(f, params, x, y)
        return grads if check_vma else jax.lax.psum(grads, "data")

    specs = {"in_specs": (spec(), spec("data"), spec("data")), "out_specs": spec(), "check_vma": check_vma}
    got = jax.jit(jax.shard_map(shared, mesh=mesh, **specs))(params, x, y)
    f = lrules.transform(residual_net, lrules.dual_propagation(beta=0.2, **SHARDED[name]))
    bridge.close(got, jax.jit(lambda *args: gradient(f, *args))(params, x, y), 1e-6)

    def means(params, x, y):
        rule = lrules.dual_propagation(beta=0.2, **SHARDED[name])
        _, grads = lrules.value_and_grad(residual_net, half_squared, rule)(params, NO_FEEDBACK, x, y)
        return jax.tree.map(lambda g: g / 4, grads.params if check_vma else jax.lax.psum(grads.params, "data"))

    bridge.close(jax.jit(jax.shard_map(means, mesh=mesh, **specs))(params, x, y), got, 1e-6)


def test_damping_under_shard_map():
    """The power iterations run on each device; numbers that shard_map marks as each device's own stay constants."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"a": jax.random.normal(keys[0], (3, 5)), "b": jax.random.normal(keys[1], (5, 2))}
    x, y = jax.random.normal(keys[2], (8, 3)), jax.random.normal(keys[3], (8, 2))
    net = lambda p, x: (jax.nn.relu(x @ p["a"]) / 3.0) @ p["b"]  # noqa: E731
    options = {"adjoint": False, "damping": "spectral", "iterations": 3, "output": "squared_error"}
    step = lrules.value_and_grad(net, half_squared, lrules.dual_propagation(**options))
    want = jax.jit(step)(params, NO_FEEDBACK, x, y)[1].params
    mesh, spec = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec

    def shared(params, x, y):
        return jax.tree.map(lambda g: g / 4, step(params, NO_FEEDBACK, x, y)[1].params)

    specs = {"in_specs": (spec(), spec("data"), spec("data")), "out_specs": spec()}
    bridge.close(jax.jit(jax.shard_map(shared, mesh=mesh, **specs))(params, x, y), want, 1e-9)


def test_devices_that_stop_together():
    """With a tolerance, each device has its own mean and all make as many iterations as on one device."""
    params, x, y = residual_case()
    x, y = jnp.concatenate([x, x[:1]]), jnp.concatenate([y, 3 * y[:1]])
    mesh, spec = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec

    def found(params, x, y, axis_name=None):
        rule = lrules.dual_propagation(0.2, iterations=30, tolerance=1e-3, axis_name=axis_name)
        grads = lrules.value_and_grad(residual_net, half_squared, rule)(params, NO_FEEDBACK, x, y)[1]
        return grads.params, grads.report["iterations"], grads.report["residual"]

    def shared(params, x, y):
        grads, *report = found(params, x, y, "data")
        return jax.tree.map(lambda g: g / 4, grads), *report

    specs = {"in_specs": (spec(), spec("data"), spec("data")), "out_specs": spec()}
    got, want = jax.jit(jax.shard_map(shared, mesh=mesh, **specs))(params, x, y), jax.jit(found)(params, x, y)
    assert got[1] == want[1] < 30
    bridge.close(got[0], want[0], 1e-9)
    np.testing.assert_allclose(got[2], want[2], rtol=1e-6)


@pytest.mark.parametrize("name", ["y", "rng"])
def test_a_feedback_rule_that_asks_for_more_is_refused(name):
    backward = {"y": lambda op, w, b, x, d, layer, y: None, "rng": lambda op, w, b, x, d, layer, rng: None}[name]
    rule = lrules.dual_propagation(feedback_rule=lrules.sequential(backward))
    net, params = (lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]), {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
    with pytest.raises(ValueError, match=f"got one that asks for '{name}' by name: give lrules.feedback_alignment"):
        rule.init(jax.random.key(0), net, params, jnp.ones((4, 2)))
