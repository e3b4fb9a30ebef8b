"""Updates that are changed example by example, against the references: `quantize_update`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from lrules.engine import per_example
from tests import bridge
from tests.reference import backman, backprop, nets, quantise
from tests.rules.common import BATCH, FAMILIES, NETS, NOTHING, agrees, make, pull, references
from tests.sampling import mostly_slow, pairs
from tests.test_modifiers import QUICK, by_parts, complex_arguments, complex_net


@pytest.mark.parametrize(("name", "family"), mostly_slow(pairs(NETS, FAMILIES[:-1]), QUICK))
def test_quantised_updates(name, family):
    with jax.enable_x64(True):
        net, x, e = make(name)
        rule, feedback, reference = references(net, x, family)
        got = pull(net, lrules.quantize_update(rule, 4), feedback, x, e)
        agrees(got, quantise.update(lambda net, x, e, i: reference(x, e), net, x, e, 4))
        if family == "kolen_pollack":
            kernels = {k: v["kernel"] for k, v in got[0].items()}
            bridge.close(got[1].learned, {f"{k}/kernel": kernels[str(k)] for k in range(1, len(net))})
        summed = pull(net, lrules.quantize_update(rule, 4), feedback, x, e * BATCH, reduction="sum")
        bridge.close(summed[0], jax.tree.map(lambda g: g * BATCH, got[0]))


@pytest.mark.parametrize("name", ["deep", "conv_max"])
def test_quantised_updates_of_backman(name):
    """c times the example's gradient, with c of the whole batch; nothing is divided by the batch."""
    with jax.enable_x64(True):
        net, x, e = make(name)
        got = pull(net, lrules.quantize_update(lrules.backman(), 4), NOTHING, x, e)
        whole = backman.gradients(net, x, e)
        c = []
        trace, signal, d = nets.forward(net, x), e, [None] * len(net)
        for k in reversed(range(len(net))):
            d[k] = nets.to_pre_activation(net, trace, k, signal)
            c.insert(0, backman.coefficients(nets.kernel_gradient(net[k], trace.reads[k], d[k]), d[k]))
            signal = nets.transpose(net[k], net[k].kernel * c[0], d[k], trace.reads[k].shape)
        bridge.close(got[2], whole.inputs)
        for k, layer in enumerate(net):
            kernel = sum(
                quantise.quantise(
                    nets.kernel_gradient(layer, trace.reads[k][i : i + 1], d[k][i : i + 1]) * c[k], 4, 2**-6
                )
                for i in range(BATCH)
            )
            bridge.close(got[0][str(k)]["kernel"], kernel)


def test_quantised_updates_with_other_modifiers():
    with jax.enable_x64(True):
        net, x, e = make("conv_max")
        for family in ("alignment", "direct"):
            rule, feedback, reference = references(net, x, family)
            one = lambda net, x, e, i: reference(x, e, modify=quantise.error(3, 1))  # noqa: B023, E731
            wanted = quantise.update(one, net, x, e, 4)
            inside = lrules.quantize_error(lrules.quantize_update(rule, 4), 3)
            outside = lrules.quantize_update(lrules.quantize_error(rule, 3), 4)
            agrees(pull(net, inside, feedback, x, e), wanted)
            agrees(pull(net, outside, feedback, x, e), wanted)


def test_two_quantised_updates():
    """The outermost first: 2 bits beside a larger scale, then 6 bits."""
    with jax.enable_x64(True):
        net, x, e = make("shallow")
        rule = lrules.quantize_update(lrules.quantize_update(lrules.backprop(), 6), 2, scale=0.3)
        got = pull(net, rule, NOTHING, x, e)
        total = np.zeros_like(net[0].kernel)
        for i in range(BATCH):
            g = backprop.gradients(net, x[i : i + 1], e[i : i + 1] * BATCH).kernels[0]
            total += quantise.quantise(quantise.quantise(g, 2, 0.3), 6, 2**-6) / BATCH
        bridge.close(got[0]["0"]["kernel"], total)


def awkward(p, tokens):
    """An embedding, positions, a token of its own, normalisation, attention, and a loop over layers."""
    h = jnp.take(p["embed"], tokens, axis=0) + p["position"][None]
    h = jnp.concatenate([jnp.broadcast_to(p["token"], (len(h), 1, 4)), h], axis=1)
    normal = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-3)
    h = normal * p["scale"].reshape(1, 1, -1) + p["bias"].reshape(1, 1, -1)
    q, k, v = (h @ p["qkv"][i] for i in range(3))
    h = h + jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v

    def layer(h, w):
        return jnp.tanh((h.reshape(-1, 4) @ w["w"] + w["b"].reshape(1, -1)).reshape(h.shape)), None

    h = jax.lax.scan(layer, h, {"w": p["w"], "b": p["b"]})[0]
    return h[:, 0] @ p["out"]


def test_quantised_updates_of_an_awkward_network():
    """Every example alone, quantised, summed: the same, where each parameter is used once per example."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shapes = {
            "embed": (7, 4), "position": (3, 4), "token": (4,), "scale": (4,), "bias": (4,), "qkv": (3, 4, 4),
            "w": (2, 4, 4), "b": (2, 4), "out": (4, 2),
        }  # fmt: skip
        params = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
        tokens, e = jnp.asarray(rng.integers(0, 7, size=(5, 3))), jnp.asarray(rng.normal(size=(5, 2)) / 5)
        f = lrules.transform(awkward, lrules.quantize_update(lrules.backprop(), 5))
        got = jax.jit(lambda p: jax.vjp(lambda p: f(p, NOTHING, tokens), p)[1](e)[0])(params)
        true = jax.jit(lambda p, t, e: jax.vjp(lambda p: awkward(p, t), p)[1](e)[0])
        quantised = [
            jax.tree.map(
                lambda g: quantise.quantise(g * 5, 5, 2**-6) / 5, true(params, tokens[i : i + 1], e[i : i + 1])
            )
            for i in range(5)
        ]
        wanted = jax.tree.map(lambda *g: sum(g), *quantised)
        wanted["token"] = true(params, tokens, e)["token"]  # joins the data by concatenation, neither bias nor scale
        bridge.close(got, wanted)


def test_memory_of_quantised_updates():
    """Does not grow with batch x parameters."""
    params = {"a": jnp.zeros((64, 256)), "b": jnp.zeros((256, 256)), "c": jnp.zeros((256, 10))}
    apply = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]  # noqa: E731
    f = lrules.transform(apply, lrules.quantize_update(lrules.backprop(), 4))

    def peak(batch):
        grad = jax.jit(jax.grad(lambda p, x: (f(p, NOTHING, x) ** 2).mean()))
        compiled = grad.lower(params, jnp.zeros((batch, 64))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    sizes = 4 * sum(p.size for p in params.values())
    assert peak(128) < 8 * sizes
    assert peak(128) - peak(8) < 120 * 4 * 1_500 * 4  # a few copies of the activations


def test_several_examples_at_once_are_each_alone(monkeypatch):
    """However many gradients are made at once: one, a divisor of the batch, or all."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": jax.random.normal(keys[0], (5, 7)), "b": jax.random.normal(keys[1], (7, 3))}
    x = jax.random.normal(keys[2], (12, 5))
    f = lrules.transform(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], lrules.quantize_update(lrules.backprop(), 3))

    def gradients(elements):
        monkeypatch.setattr(per_example, "ELEMENTS", {"cpu": elements})
        jaxpr = jax.make_jaxpr(jax.grad(lambda p: (f(p, NOTHING, x) ** 2).mean()))(params)
        found = jax.jit(jax.grad(lambda p: (f(p, NOTHING, x) ** 2).mean()))(params)
        return found, str(jaxpr).count("scan[")

    (alone, loops), (some, fewer), (together, none) = (gradients(n) for n in (1, 21 * 12, 10**6))
    assert (loops, fewer, none) == (2, 1, 0)  # the lower layer makes 6 at once, the upper one all 12
    for other in (some, together):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), alone, other)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_quantised_updates_are_summed_in_float32(dtype):
    """4,096 updates of 2^-6: in half precision such a sum stands still at 512 or 4,096 of them."""
    f = lrules.transform(lambda p, x: x @ p["w"] + p["b"], lrules.quantize_update(lrules.backprop(), bits=3))
    params = {"w": jnp.ones((1, 1), dtype), "b": jnp.ones((1, 1), dtype)}
    x = jnp.ones((8192, 1), dtype)
    got = jax.jit(jax.grad(lambda p: f(p, NOTHING, x).astype(jnp.float32).mean()))(params)
    assert [float(g[0, 0]) for g in got.values()] == [2**-6] * 2 and got["w"].dtype == dtype


def test_a_batch_that_cannot_be_told_is_refused():
    apply = lambda p, x: jax.lax.map(lambda row: jnp.tanh(row @ p["a"]) @ p["b"], x)  # noqa: E731
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    f = lrules.transform(apply, lrules.quantize_update(lrules.backprop(), 4))
    with pytest.raises(NotImplementedError, match="cannot be found"):
        f(params, NOTHING, jnp.ones((5, 3)))


@pytest.mark.parametrize("alpha", [1.0, "gradient_norm"])
def test_quantised_complex_updates(alpha):
    with jax.enable_x64(True):
        params, x, e = complex_arguments()
        h, quantiser = np.tanh(x @ params["a"]), by_parts(lambda s: quantise.quantise(s, 3, 2**-6))
        d = (e @ params["b"].T) * (1 - h**2)
        f = lrules.transform(complex_net, lrules.quantize_update(lrules.backprop(), 3))
        got = jax.vjp(lambda p: f(p, NOTHING, x), params)[1](e)[0]
        wanted = {"a": sum(quantiser(4 * np.outer(x[i], d[i])) for i in range(4)) / 4}
        wanted["b"] = sum(quantiser(4 * np.outer(h[i], e[i])) for i in range(4)) / 4
        bridge.close(got, wanted)
        rule = lrules.backman(alpha)
        c = np.linalg.norm(h.T @ e, axis=0, keepdims=True)  # of each neuron's gradient
        c = 1 / c * (1 if alpha == 1 else np.linalg.norm(e) / np.linalg.norm(np.linalg.norm(e, axis=0) / c))
        plain, quantised = (lrules.transform(complex_net, r) for r in (rule, lrules.quantize_update(rule, 3)))
        plain, quantised = (jax.vjp(lambda p, f=f: f(p, NOTHING, x), params)[1](e)[0]["b"] for f in (plain, quantised))
        bridge.close(plain, c * (h.T @ e))
        bridge.close(quantised, sum(quantiser(c * np.outer(h[i], e[i])) for i in range(4)))
