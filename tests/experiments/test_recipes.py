"""The recipes against the references, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrules
from experiments import recipes
from tests import bridge
from tests.reference import (
    backprop,
    direct_feedback_alignment,
    feedback_alignment,
    losses,
    modifiers,
    nets,
    pepita,
    quantise,
)
from tests.rules.common import BATCH, agrees, draw, make, pull

NONE = lrules.Feedback({}, {})
CLASSES = optax.softmax_cross_entropy_with_integer_labels
DENSE = optax.softmax_cross_entropy


def test_mixed_channel():
    """Layer 3 reads the projected error; from there it goes down by feedback alignment, through one layer or more."""
    with jax.enable_x64(True):
        net, x, e = make("deep")
        rule = recipes.mixed_channel("3/kernel")
        feedback, listed = draw(rule, net, x)
        below = feedback_alignment.gradients(net[:3], listed[:3], x, e @ listed[3])
        got = pull(net, rule, feedback, x, e)[0]
        for k in range(3):
            bridge.close(got[str(k)]["kernel"], below.kernels[k])
        bridge.close(got["3"]["kernel"], backprop.gradients(net, x, e).kernels[3])


def test_nonlinear_channel():
    with jax.enable_x64(True):
        net, x, e = make("conv_max")
        rule = recipes.nonlinear_channel()
        feedback, listed = draw(rule, net, x)
        agrees(
            pull(net, rule, feedback, x, e),
            direct_feedback_alignment.gradients(net, listed, x, e, modify=modifiers.per_example(np.tanh, BATCH)),
        )


def test_averaged_matrices():
    """The averaged matrix brings the average of the signals that its draws would bring."""
    with jax.enable_x64(True):
        net, x, e = make("shallow")
        rule = recipes.averaged_matrices(4, jax.nn.initializers.normal(1.0))
        feedback, listed = draw(rule, net, x)
        agrees(pull(net, rule, feedback, x, e), feedback_alignment.gradients(net, listed, x, e))
        one, four = (lrules.feedback.averaged(n, init=jax.nn.initializers.normal(1.0)) for n in (1, 4))
        spread = [float(init(jax.random.key(0), (100, 100)).std()) for init in (one, four)]
        np.testing.assert_allclose(spread, [1, 0.5], rtol=0.05)


@pytest.mark.parametrize("concordant", [False, True])
def test_redrawn(concordant):
    with jax.enable_x64(True):
        net, x, e = make("deep")
        rule = recipes.redrawn_concordant() if concordant else recipes.redrawn()
        seen = []
        for seed in (0, 1):
            key = jax.random.key(seed)
            _, listed = draw(lrules.feedback_alignment(), net, x, seed)
            if concordant:
                listed = [
                    None,
                    *(np.abs(b) * np.sign(layer.kernel) for b, layer in zip(listed[1:], net[1:], strict=True)),
                ]
            got = pull(net, rule, NONE, x, e, rng=key)
            agrees(got, feedback_alignment.gradients(net, listed, x, e))
            seen.append(np.asarray(got[0]["0"]["kernel"]))
        assert not np.allclose(*seen)
        if concordant:
            same = lrules.sign_symmetry("random")
            bridge.close(pull(net, same, NONE, x, e, rng=key)[0], got[0])


def test_redrawn_direct():
    with jax.enable_x64(True):
        net, x, e = make("deep")
        _, listed = draw(lrules.direct_feedback_alignment(), net, x, 3)
        got = pull(net, recipes.redrawn_direct(), NONE, x, e, rng=jax.random.key(3))
        agrees(got, direct_feedback_alignment.gradients(net, listed, x, e))


def test_cascaded():
    """Signals sent step by step, as the cascade says, arrive as by the one matrix."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        names, sizes = ["a", "b", "c"], {"a": (2, 3), "b": (4,), "c": (5,)}
        straight = {n: rng.normal(size=(2, *sizes[n])) for n in names}
        pairs = [(u, v) for i, v in enumerate(names) for u in names[i + 1 :]]
        between = {(u, v): rng.normal(size=(*sizes[u], *sizes[v])) for u, v in pairs}
        e = rng.normal(size=(6, 2))
        total = recipes.cascade(names, straight, between)
        signals = {}
        for n in reversed(names):
            signals[n] = np.tensordot(e, straight[n], axes=1)
            for above in names[names.index(n) + 1 :]:
                signals[n] = signals[n] + np.tensordot(signals[above], between[above, n], axes=len(sizes[above]))
            bridge.close(np.tensordot(e, total[n], axes=1), signals[n])


def test_cascaded_in_a_net():
    with jax.enable_x64(True):
        net, x, e = make("conv_max")
        rule = recipes.cascaded()
        feedback, listed = draw(rule, net, x)
        plain, _ = draw(lrules.direct_feedback_alignment(), net, x)
        bridge.close(feedback.fixed["3/kernel"], plain.fixed["3/kernel"])
        assert not np.allclose(feedback.fixed["1/kernel"], plain.fixed["1/kernel"])
        agrees(pull(net, rule, feedback, x, e), direct_feedback_alignment.gradients(net, listed, x, e))


def test_weight_by_weight():
    with jax.enable_x64(True):
        net, x, _ = make("shallow")
        apply, params, rule = bridge.apply_of(net), bridge.parameters(net), recipes.weight_by_weight()
        feedback = rule.init(jax.random.key(0), apply, params, jnp.asarray(x))
        targets = np.ones((BATCH, 3))
        step = lrules.value_and_grad(apply, lrules.testing.half_squared_error, rule)
        got = step(params, feedback, jnp.asarray(x), jnp.asarray(targets))[1].params
        trace = nets.forward(net, x)
        e = (trace.outputs - targets) / BATCH
        names = [
            jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(params)
        ]
        c = np.asarray(feedback.fixed[str(names.index("0/kernel"))])
        slope = 1 - np.tanh(trace.pre[0]) ** 2
        bridge.close(got["0"]["kernel"], np.einsum("kji,bk,bi,bj->ji", c, e, slope, x))
        bridge.close(got["1"]["kernel"], backprop.gradients(net, x, e).kernels[1])
        with pytest.raises(ValueError, match="value_and_grad"):
            lrules.transform(apply, rule)


# ----------------------------------------------------------------------------- what a rule's functions can ask for

LABELS = np.array([0, 2, 1, 1, 0])


def gradients(net, rule, feedback, x, targets, **rng):
    step = lrules.value_and_grad(bridge.apply_of(net), CLASSES, rule)
    grads = step(bridge.parameters(net), feedback, jnp.asarray(x), jnp.asarray(targets), **rng)[1]
    return grads.params, grads.feedback


def test_rates():
    with jax.enable_x64(True):
        net, x, e = make("deep")
        got = pull(net, recipes.rates({"0": 0.0, "[12]/": 2.0, ".*": 1.0}), NONE, x, e)[0]
        true = backprop.gradients(net, x, e)
        for k, rate in enumerate([0, 2, 2, 1]):
            bridge.close(got[str(k)]["kernel"], rate * true.kernels[k])
            bridge.close(got[str(k)]["bias"], true.biases[k])
        with pytest.raises(ValueError, match="rate: 'head' matches no layer; the layers are '0/kernel', '1/kernel'"):
            draw(recipes.rates({"head": 1.0, ".*": 1.0}), net, x)


@pytest.mark.parametrize("channel", ["bp", "rbp", "srbp"])
def test_quantized_signals(channel):
    """Against an explicit backward pass: the signals that go down stay exact, and the quantised ones are summed."""
    rng, widths, batch = np.random.default_rng(0), (4, 6, 5, 3), 7
    weights = [rng.normal(size=pair) for pair in zip(widths[:-1], widths[1:], strict=True)]
    x, e = rng.normal(size=(batch, 4)), rng.normal(size=(batch, 3))
    hs = [x]
    for w in weights[:-1]:
        hs.append(np.tanh(hs[-1] @ w))

    def net(params, x):
        for i in range(2):
            x = jnp.tanh(x @ params[str(i)])
        return x @ params["2"]

    with jax.enable_x64(True):
        rule = recipes.quantized_signals(channel, bits=3, scale=0.5)
        params = {str(i): jnp.asarray(w) for i, w in enumerate(weights)}
        feedback = rule.init(jax.random.key(1), net, params, jnp.asarray(x))
        grads = jax.grad(lambda p: (lrules.transform(net, rule)(p, feedback, jnp.asarray(x)) * e).sum() / batch)(params)
    fixed = {name: np.asarray(b) for name, b in feedback.fixed.items()}
    down = e  # the error at the output of layer l, of each example
    bridge.close(grads["2"], hs[2].T @ e / batch)
    for layer in (2, 1):
        if channel == "srbp":
            signal = e @ next(b for b in fixed.values() if b.shape == (3, widths[layer]))
        else:
            signal = down @ (weights[layer] if channel == "bp" else fixed[str(layer)]).T
        slope = 1 - hs[layer] ** 2
        down = signal * slope
        bridge.close(grads[str(layer - 1)], hs[layer - 1].T @ (quantise.quantise(signal, 3, 0.5) * slope))


def test_quantized_signals_refuse_another_channel():
    with pytest.raises(ValueError, match='channel must be "bp", "rbp" or "srbp", got \'dfa\''):
        recipes.quantized_signals("dfa", bits=3)


@pytest.mark.parametrize("name", ["shallow", "deep", "conv_max", "conv_average"])
def test_pepita(name):
    with jax.enable_x64(True):
        net, x, _ = make(name)
        rule = recipes.pepita(init=jax.nn.initializers.normal(0.1))
        feedback = rule.init(jax.random.key(1), bridge.apply_of(net), bridge.parameters(net), jnp.asarray(x))
        got, _ = gradients(net, rule, feedback, x, LABELS)
        targets = losses.one_hot(LABELS, 3)
        error_at = lambda outputs: losses.mean(*losses.softmax_cross_entropy(outputs, targets))[1]  # noqa: E731
        wanted, _ = pepita.gradients(net, feedback.fixed["inputs"], x, error_at)
        bridge.close(got, bridge.kernels_and_biases(wanted))


def test_pepita_learns_and_refuses():
    """It learns where no error goes down; a layer without an activation, and a modifier, are refused."""
    net = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": jax.random.normal(keys[0], (8, 32)) / 8**0.5, "b": jnp.zeros((32, 3))}
    x = jax.random.normal(keys[1], (64, 8))
    labels = jnp.argmax(x @ jax.random.normal(keys[2], (8, 3)), 1)
    rule = recipes.pepita()
    feedback = rule.init(jax.random.key(1), net, params, x)
    step = jax.jit(lrules.value_and_grad(net, CLASSES, rule))
    start, first = params, step(params, feedback, x, labels)[0][0]
    for _ in range(100):
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, step(params, feedback, x, labels)[1].params)
    assert step(params, feedback, x, labels)[0][0] < 0.4 * first and np.any(params["a"] != start["a"])
    with pytest.raises(NotImplementedError, match="the hidden signal 'b' does not come from an activation"):
        rule.init(jax.random.key(1), lambda p, x: x @ p["a"] @ p["b"], params, x)
    with pytest.raises(ValueError, match="modifiers cannot change pepita"):
        lrules.value_and_grad(net, CLASSES, lrules.sign_error(rule))(params, feedback, x, labels)


def test_pepita_conforms():
    """What a layer reads is that of the second pass, and a scale between an activation and a layer does not learn."""
    lrules.testing.check_rule(recipes.pepita(), skip=("local", "arrives"))
