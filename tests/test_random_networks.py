"""Properties on random architectures: depth, widths, activations, skips, sharing, flattening, scans."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

import lrules
from tests import bridge

NAMES = [n for n in bridge.ACTIVATIONS if n != "relu6"]


@st.composite
def architectures(draw):
    """Hidden layers as `(width, activation, share, skip)`: share an earlier weight, or skip from an earlier layer."""
    width = draw(st.integers(2, 5))
    depth = draw(st.integers(1, 4))
    layers = []
    for k in range(depth):
        activation = draw(st.sampled_from(NAMES))
        share = draw(st.none() | st.integers(1, k - 1)) if k > 1 else None
        skip = draw(st.none() | st.integers(0, k - 1)) if k > 0 else None
        layers.append((activation, share, skip))
    return width, layers, draw(st.sampled_from(["dense", "conv", "scan"])), draw(st.booleans())


def build(architecture, seed):
    """A network, its parameters, inputs and targets, in float64."""
    width, layers, last, transposed = architecture
    rng = np.random.default_rng(seed)
    params = {"in": rng.normal(size=(3, width)) / 2, "out": rng.normal(size=(4 * width, 2)) / 2}
    for k, (_, share, _) in enumerate(layers):
        params[f"b{k}"] = rng.normal(size=width) / 4
        if share is None and k:
            params[f"w{k}"] = rng.normal(size=(width, width)) / np.sqrt(width)
    if last == "conv":
        params["conv"] = rng.normal(size=(2, width, width)) / 2
    if last == "scan":
        params["scan"] = rng.normal(size=(2, width, width)) / 2

    def weight(p, k):
        share = layers[k][1]
        source = k if share is None else share
        while source and layers[source][1] is not None:
            source = layers[source][1]
        w = p[f"w{source}"] if source else p["in"][:1].T @ p["in"][:1]
        return w.T if transposed and share is not None else w

    def apply(p, x):  # x: [batch, 4, 3]
        h, kept = x @ p["in"], []
        for k, (activation, _, skip) in enumerate(layers):
            z = (h @ weight(p, k) if k else h) + p[f"b{k}"].reshape(1, 1, -1)
            h = bridge.ACTIVATIONS[activation](z)
            h = h if skip is None else h + kept[skip]
            kept.append(h)
        if last == "conv":
            numbers = ("NWC", "WIO", "NWC")
            h = jnp.tanh(jax.lax.conv_general_dilated(h, p["conv"], (1,), "SAME", dimension_numbers=numbers))
        if last == "scan":
            h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["scan"])
        return h.reshape(len(x), -1) @ p["out"]

    params = {k: jnp.asarray(v) for k, v in params.items()}
    return apply, params, jnp.asarray(rng.normal(size=(3, 4, 3))), jnp.asarray(rng.normal(size=(3, 2)))


def half_square(y, t):
    return 0.5 * jnp.sum((y - t) ** 2, -1)


def gradient(apply, rule, feedback, params, x, t):
    return jax.jit(lrules.value_and_grad(apply, half_square, rule))(params, feedback, x, t)[1].params


@hypothesis.given(architectures(), st.integers(0, 2**16))
def test_backprop_layer_by_layer_is_the_gradient(architecture, seed):
    """Handing on what backprop hands on, layer by layer, gives `jax.grad`; so does FA with the weights as feedback."""
    with jax.enable_x64(True):
        apply, params, x, t = build(architecture, seed)
        wanted = jax.jit(jax.grad(lambda p: half_square(apply(p, x), t).mean()))(params)

        def backward(op, w, b, x, d, layer):
            return *jax.vjp(op, w, x)[1](d), None

        none = lrules.Feedback({}, {})
        bridge.close(gradient(apply, lrules.sequential(backward), none, params, x, t), wanted)
        bridge.close(gradient(apply, lrules.backprop(), none, params, x, t), wanted, 1e-13)
        rule = lrules.feedback_alignment()
        feedback = rule.init(jax.random.key(seed), apply, params, x)
        same = lrules.Feedback({name: params[name] for name in feedback.fixed}, {})
        bridge.close(gradient(apply, rule, same, params, x, t), wanted)


@hypothesis.given(architectures(), st.integers(0, 2**16))
def test_direct_feedback_is_linear_in_the_feedback(architecture, seed):
    """DFA's gradient is that of the last layer alone plus a part linear in the feedback; the top layer's is true."""
    with jax.enable_x64(True):
        apply, params, x, t = build(architecture, seed)
        rule = lrules.direct_feedback_alignment()
        feedback = rule.init(jax.random.key(seed), apply, params, x)

        step = jax.jit(lrules.value_and_grad(apply, half_square, rule))

        def with_feedback(scale):
            scaled = feedback._replace(fixed=jax.tree.map(lambda b: scale * b, feedback.fixed))
            return step(params, scaled, x, t)[1].params

        ends = gradient(apply, lrules.last_layer_only(), lrules.Feedback({}, {}), params, x, t)
        zero, one, three = with_feedback(0.0), with_feedback(1.0), with_feedback(3.0)
        bridge.close(zero, ends)
        bridge.close(three, jax.tree.map(lambda a, b: a + 3 * (b - a), zero, one), 1e-9)
        wanted = jax.jit(jax.grad(lambda p: half_square(apply(p, x), t).mean()))(params)
        bridge.close(one["out"], wanted["out"])


@hypothesis.given(architectures(), st.integers(0, 2**16), st.floats(0.1, 10))
def test_backman_ignores_the_scale_of_the_error(architecture, seed, scale):
    """Weight gradients keep their norm whatever the scale of the loss."""
    with jax.enable_x64(True):
        apply, params, x, t = build(architecture, seed)
        f = lrules.transform(apply, lrules.backman())

        @jax.jit
        def gradient(params, scale):
            return jax.grad(lambda p: scale * half_square(f(p, lrules.Feedback({}, {}), x), t).mean())(params)

        one, other = gradient(params, 1.0), gradient(params, scale)
        bridge.close(one["out"], other["out"], 1e-8)
        norms = jnp.linalg.norm(one["out"], axis=0)
        np.testing.assert_allclose(norms, jnp.ones(2), rtol=1e-9)
