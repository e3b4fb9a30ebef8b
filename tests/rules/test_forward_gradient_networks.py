"""Forward gradients in networks of many kinds, what they cost, and what they refuse; the numbers they compute are in
test_forward_gradient.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from tests import bridge, zoo
from tests.rules.test_forward_gradient import (
    FG,
    KEY,
    NONE,
    dense,
    draw,
    half_squared,
    keys,
    residual_case,
    residual_net,
    run,
    targets_of,
)

pytestmark = pytest.mark.usefixtures("double_precision")


# ------------------------------------------------------------------------------------------------- transform, networks


@pytest.mark.parametrize("perturb", ["weights", "activations"])
def test_any_objective(perturb):
    """`transform`: masks and other terms of the user's objective, the sum over two losses, and inputs that learn."""
    params, x, y = residual_case()
    f = lrules.transform(residual_net, FG(perturb))

    def objective(net, params, x):
        out = net(params, x)
        return (half_squared(out, y) * jnp.arange(5.0)).sum() + jnp.sum(out[0] ** 3) + 0.1 * jnp.sum(params["a"] ** 2)

    truth = jax.grad(lambda p, x: objective(residual_net, p, x), (0, 1))(params, x)
    many = jax.random.split(jax.random.key(0), 20000)
    one = lambda key: jax.grad(lambda p, x: objective(lambda p, x: f(p, NONE, x, rng=key), p, x), (0, 1))(params, x)  # noqa: E731
    got = jax.jit(jax.vmap(one))(many)
    for sample, want in zip(*map(jax.tree.leaves, (got, truth)), strict=True):
        spread = np.maximum(np.asarray(sample).std(0) / np.sqrt(len(sample)), 1e-9)
        assert np.abs((np.asarray(sample).mean(0) - want) / spread).max() < 4.7
    alone = jax.grad(lambda p: objective(lambda p, x: f(p, NONE, x, rng=KEY), p, x))(params)
    assert any(bool(jnp.any(a != b)) for a, b in zip(*map(jax.tree.leaves, (alone, one(KEY)[0])), strict=True)) == (
        perturb == "weights"
    )  # inputs are a part of the direction only where they learn


def test_weights_serve_what_no_other_rule_serves():
    """A product by hand, a weight in a while loop and in a branch, and with two losses also a function without jvp."""

    @jax.custom_vjp
    def odd(x):
        return jnp.sin(x)

    odd.defvjp(lambda x: (odd(x), x), lambda x, d: (d * jnp.cos(x),))

    def net(p, x, f=jnp.sin):
        h = (x[:, :, None] * p["a"][None]).sum(1)
        h = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, f(c[1] @ p["b"])), (0, h))[1]
        return jax.lax.cond(x.sum() > 0, lambda h: h @ p["c"], lambda h: h, h)

    params = {n: jnp.eye(4) for n in "abc"}
    x, y = jnp.ones((3, 4)), jnp.zeros((3, 4))
    jvp, central = FG(), FG(method="central", std=1e-3)
    one, other = (
        jax.jit(lrules.value_and_grad(net, half_squared, rule))(params, NONE, x, y, rng=KEY)[1].params
        for rule in (jvp, central)
    )
    bridge.close(one, other, 1e-4)
    whole = lambda p, x: net(p, x, odd)  # noqa: E731
    refused = pytest.raises(NotImplementedError, match=r'jax.custom_vjp.*method="central"')
    with refused:
        lrules.value_and_grad(whole, half_squared, jvp)(params, NONE, x, y, rng=KEY)
    with refused:  # under jit, JAX itself would not complain before it compiles
        jax.eval_shape(lambda p: lrules.value_and_grad(whole, half_squared, jvp)(p, NONE, x, y, rng=KEY), params)
    of_data = lambda p, x: net(p, odd(x))  # noqa: E731
    assert jnp.isfinite(jax.jit(lrules.value_and_grad(of_data, half_squared, jvp))(params, NONE, x, y, rng=KEY)[0][0])
    served = lrules.value_and_grad(whole, half_squared, central)(params, NONE, x, y, rng=KEY)[1].params
    bridge.close(served, other, 1e-9)


def test_complex_parameters():
    """A complex number has two numbers in a direction; the mean is JAX's gradient."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(3, 2)) + 1j * rng.normal(size=(3, 2)))
    x, y = jnp.asarray(rng.normal(size=(4, 3)) + 0j), jnp.zeros((4, 2))
    net = lambda w, x: jnp.abs(jnp.sin(x @ w))  # noqa: E731
    truth = jax.grad(lambda w: half_squared(net(w, x), y).mean())(w)
    step = lrules.value_and_grad(net, half_squared, FG())
    draws = jax.jit(jax.vmap(lambda key: step(w, NONE, x, y, rng=key)[1].params))
    got = np.asarray(draws(jax.random.split(KEY, 20000)))
    for part in (np.real, np.imag):
        sample, want = part(got), part(truth)
        assert np.abs((sample.mean(0) - want) / (sample.std(0) / np.sqrt(len(sample)))).max() < 4.5


@pytest.mark.parametrize("options", [
    {}, {"perturb": "activations"}, {"method": "central", "std": 0.1},
    {"perturb": "activations", "method": "central", "std": 0.1},
], ids=str)  # fmt: skip
def test_shard_map(options):
    """Devices that share the parameters add what they find, as gradients are added."""
    net, _ = dense()
    x = np.random.default_rng(2).normal(size=(8, 4))
    apply, params, y = bridge.apply_of(net), bridge.parameters(net), jnp.asarray(targets_of(net, x))
    noise = lambda key, shape, dtype: jnp.broadcast_to(jnp.cos(jnp.arange(shape[-1], dtype=dtype)), shape)  # noqa: E731
    step = lrules.value_and_grad(apply, half_squared, FG(**options, noise=noise))
    spec, mesh = jax.sharding.PartitionSpec, jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shared = lambda x, y: step(params, NONE, x, y, rng=KEY)[1].params  # noqa: E731
    specs = {"in_specs": (spec("data"), spec("data")), "out_specs": spec()}
    got = jax.jit(jax.shard_map(shared, mesh=mesh, **specs))(jnp.asarray(x), y)
    want = jax.jit(step)(params, NONE, jnp.asarray(x), y, rng=KEY)[1].params
    bridge.close(jax.tree.map(lambda g: g / 4, got), want)


def test_step_sizes_may_be_traced():
    net, x = dense()
    one = lambda std: run(net, x, FG(method="central", std=std))[1].params["0"]["kernel"]  # noqa: E731
    many = jax.vmap(one)(jnp.array([0.1, 0.2]))
    bridge.close(many[1], one(0.2))


# ------------------------------------------------------------------------------------------------------------- costs


def memory(rule, depth, width=256):
    params = {str(i): jax.ShapeDtypeStruct((width, width), jnp.float32) for i in range(depth)}

    def net(p, x):
        for i in range(depth):
            x = jnp.tanh(x @ p[str(i)])
        return x

    step = lrules.value_and_grad(net, half_squared, rule)

    def update(p, x, key):
        rng = {"rng": key} if rule.stochastic else {}
        return jax.tree.map(lambda w, g: w - jnp.float32(1e-3) * g, p, step(p, NONE, x, x, **rng)[1].params)

    x = jax.ShapeDtypeStruct((512, width), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(update, donate_argnums=0).lower(params, x, key).compile().memory_analysis().temp_size_in_bytes


@functools.cache
def memory_of_backprop(depth):
    return memory(lrules.backprop(), depth)


@pytest.mark.parametrize("directions", [1, 3])
def test_memory_of_inference(directions):
    """Central differences keep neither activations nor noise: a deeper network needs no more memory for a step."""
    rule = FG(method="central", std=1e-3, directions=directions)
    weight, activation = 256 * 256 * 4, 512 * 256 * 4
    shallow, deep = (memory(rule, depth) for depth in (2, 8))
    assert memory_of_backprop(8) - memory_of_backprop(2) > 5 * activation  # which keeps the activations of all layers
    gradients = 6 * weight if directions > 1 else 0  # of several directions the sum is kept
    assert deep - shallow < gradients + 2 * weight, (shallow, deep)


def test_one_trace():
    """A step traces the user's function once for the analysis, and once for each pass of two losses."""
    net, x = dense()
    apply, count = bridge.apply_of(net), []

    def counted(params, x):
        count.append(1)
        return apply(params, x)

    params, y = bridge.parameters(net), jnp.asarray(targets_of(net, x))
    for rule, wanted in ((FG(), 1), (FG("activations"), 2), (FG(method="central", std=0.1, directions=5), 4)):
        count.clear()
        step = jax.jit(lrules.value_and_grad(counted, half_squared, rule))
        for i in range(3):
            step(params, NONE, jnp.asarray(x), y, rng=jax.random.key(i))
        assert len(count) <= wanted, rule


# ---------------------------------------------------------------------------------------------------------- refusals


def test_refusals():
    local = lrules.local_losses()
    for arguments, options, message in [
        (("biases",), {}, "perturb must be 'weights' or 'activations', got 'biases'"),
        ((), {"method": "both"}, "method must be 'jvp' or 'central', got 'both'"),
        ((), {"directions": 0}, "directions must be an integer >= 1, got 0"),
        ((), {"directions": 1.5}, "directions must be an integer >= 1, got 1.5"),
        ((), {"std": 0.1}, "a jvp makes no step"),
        ((), {"method": "central"}, "give it, such as std=1e-3"),
        ((), {"method": "central", "std": 0}, "std must be a finite number > 0, got 0"),
        ((), {"method": "central", "std": {".*": 0.1}}, "std must be one number"),
        ((), {"noise": 3}, "noise must be a function .* got a int"),
        ((), {"local": lrules.backprop()}, "local must be lrules.local_losses"),
        ((), {"local": lrules.local_losses}, "local must be lrules.local_losses"),
        ((), {"local": local, "method": "central", "std": 0.1}, 'give method="jvp"'),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            FG(*arguments, **options)
    net, x = dense()
    apply, params = bridge.apply_of(net), bridge.parameters(net)
    for perturb in ("weights", "activations"):
        with pytest.raises(ValueError, match="draw one number for each element"):
            run(net, x, FG(perturb, noise=lambda key, shape, dtype: jnp.ones((), dtype)))
        for modifier in (lrules.sign_error, lrules.without_derivatives, lambda rule: lrules.quantize_update(rule, 3)):
            with pytest.raises(NotImplementedError, match="leave the modifier out"):
                run(net, x, modifier(FG(perturb)))
        with pytest.raises(NotImplementedError, match="modifier of the output error"):
            run(net, x, lrules.quantize_error(FG(perturb, method="central", std=0.1), 3, at="output"))
    run(net, x, lrules.quantize_error(FG("activations"), 3, at="output"))  # a jvp takes the error that arrives
    for rule in (FG(method="central", std=0.1), FG(local=local)):
        with pytest.raises(ValueError, match="value_and_grad"):
            lrules.transform(apply, rule)
    with pytest.raises(ValueError, match="acts on the network as a whole"):
        lrules.partition({".*": FG()})

    def branching(p, x):
        return jax.lax.cond(x.sum() > 0, lambda x: jnp.tanh(x @ p["a"]) @ p["b"], lambda x: x @ p["a"] @ p["b"], x)

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    with pytest.raises(NotImplementedError, match="inside a cond"):
        FG("activations").init(KEY, branching, params, jnp.ones((5, 3)))


def test_parameters_are_made_late():
    """Weights that are cast, transposed, tied, made of others, in a loop or read by no data."""
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 3), "scale": (4,), "b": (4, 4), "stack": (2, 4, 4), "free": (2,), "penalty": (3,)}
    params = {n: jnp.asarray(rng.normal(size=s)) for n, s in shapes.items()}
    x, y = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=(5, 3)))

    def net(p, x):
        a = p["a"].T * (p["scale"] / jnp.linalg.norm(p["scale"]))[None]
        h = jnp.tanh(x @ a)
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["stack"])[0]
        h = jnp.tanh(h @ p["b"].astype(jnp.float32).astype(jnp.float64)) + jnp.sum(p["penalty"] ** 2)
        return h @ p["a"] @ jnp.eye(3)

    std, key = 0.05, keys(1)[0]
    v = {n: draw(key, n, p.shape) for n, p in params.items()}
    at = lambda s: half_squared(net({n: p + s * v[n] for n, p in params.items()}, x), y).mean()  # noqa: E731
    rate = (at(std) - at(-std)) / (2 * std)
    step = lrules.value_and_grad(net, half_squared, FG(method="central", std=std))
    for lift in (jax.jit, lambda f: f):
        grads = lift(lambda p: step(p, NONE, x, y, rng=KEY)[1].params)(params)
        assert not np.any(grads.pop("free"))  # it leads nowhere
        bridge.close(grads, {n: rate * v[n] for n in grads})


@pytest.mark.foreign
@pytest.mark.parametrize("name", ["linen_jit", "linen_scan_remat"])
@pytest.mark.parametrize("rule", [FG("activations"), FG(local=lrules.local_losses())], ids=["activations", "local"])
def test_models_that_are_traced_anew(name, rule):
    """The places belong to the trace of the plan, also where each trace makes other equations."""
    with jax.enable_x64(False):
        net, params, inputs = zoo.ZOO[name].build()
        outputs = jax.eval_shape(net, params, inputs)
        loss = lambda y, t: jnp.sum(jnp.square(y - t).reshape(y.shape[0], -1), 1)  # noqa: E731
        targets = jnp.zeros(outputs.shape, outputs.dtype)
        feedback = rule.init(KEY, net, params, inputs)
        step = lrules.value_and_grad(net, loss, rule)
        found = jax.eval_shape(lambda p: step(p, feedback, inputs, targets, rng=KEY)[1].params, params)
        assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, params)
