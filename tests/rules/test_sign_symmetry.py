"""Sign symmetry in its three forms, and congruent feedback."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from tests import bridge
from tests.reference import feedback_alignment, sign_symmetry
from tests.rules.common import NETS, agrees, draw, make, pull
from tests.sampling import mostly_slow


def magnitudes(net, x, key):
    """What `"random"` draws from `key`, and `"fixed"` at `init`."""
    return draw(lrules.feedback_alignment(), net, x, key)[1]


@pytest.mark.parametrize("name", mostly_slow(NETS, ["deep", "conv_max"]))
@pytest.mark.parametrize("magnitude", ["unit", "random", "fixed"])
def test_reference(name, magnitude):
    with jax.enable_x64(True):
        net, x, e = make(name)
        net[1].kernel.flat[0] = 0.0
        rule = lrules.sign_symmetry(magnitude)
        feedback, listed = draw(rule, net, x)
        rng = {"rng": jax.random.key(3)} if magnitude == "random" else {}
        drawn = {"unit": None, "random": magnitudes(net, x, 3), "fixed": listed}[magnitude]
        assert bool(feedback.fixed) == (magnitude == "fixed") and rule.stochastic == (magnitude == "random")
        got = pull(net, rule, feedback, x, e, **rng)
        agrees(got, sign_symmetry.gradients(net, drawn, x, e))


@pytest.mark.parametrize("name", mostly_slow(NETS, ["deep", "conv_max"]))
def test_scaled_by_the_deviation_of_the_weights_at_the_start(name):
    """The scale stays when the weights move, the signs follow them."""
    with jax.enable_x64(True):
        net, x, e = make(name)
        rule = lrules.sign_symmetry("scaled")
        assert not rule.stochastic
        feedback, listed = draw(rule, net, x)
        wanted = sign_symmetry.deviations(net)
        for b, m in zip(listed[1:], wanted[1:], strict=True):
            bridge.close(b, m)
        moved = [layer._replace(kernel=layer.kernel - 0.7) for layer in net]
        for now in (net, moved):
            agrees(pull(now, rule, feedback, x, e), sign_symmetry.gradients(now, wanted, x, e))
        assert not np.any(pull(net, rule, feedback, x, e)[1].fixed["1/kernel"])


def test_scaled_stays_finite_where_unit_overflows():
    """As large as backprop's, thirty layers down; a loop over layers has a scale for each."""
    sizes = [512] * 30 + [1]
    keys = jax.random.split(jax.random.key(0), 32)
    weights = [jax.random.normal(k, (512, n)) * 512**-0.5 for k, n in zip(keys, sizes, strict=False)]
    unrolled = {f"{i:02}": w for i, w in enumerate(weights)}
    scanned = {"w": jnp.stack(weights[:-1]), "out": weights[-1]}
    x = jax.random.normal(keys[-1], (4, 512))

    def plain(p, x):
        for name in sorted(p)[:-1]:
            x = jnp.tanh(x @ p[name])
        return x @ p[sorted(p)[-1]]

    def looped(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0] @ p["out"]

    def norms(rule, apply, params):
        feedback = rule.init(keys[0], apply, params, x)
        f = lrules.transform(apply, rule)
        grads = jax.grad(lambda p: f(p, feedback, x).sum())(params)
        return [float(jnp.linalg.norm(g)) for g in (grads["w"] if "w" in grads else list(grads.values())[:-1])]

    true, unit, scaled = (
        norms(r, plain, unrolled) for r in (lrules.backprop(), lrules.sign_symmetry(), lrules.sign_symmetry("scaled"))
    )
    assert not np.isfinite(unit[0]) and np.isfinite(scaled).all()
    assert all(0.2 < s / t < 5 for s, t in zip(scaled, true, strict=True))
    np.testing.assert_allclose(norms(lrules.sign_symmetry("scaled"), looped, scanned), scaled, rtol=1e-3)


def test_no_gradient_of_the_feedback_or_through_it():
    with jax.enable_x64(True):
        net, x, e = make("shallow")
        rule = lrules.sign_symmetry("fixed")
        feedback, _ = draw(rule, net, x)
        assert not np.any(pull(net, rule, feedback, x, e)[1].fixed["1/kernel"])


def test_within_a_partition():
    with jax.enable_x64(True):
        net, x, e = make("deep")
        rule = lrules.partition({"3": lrules.sign_symmetry("random"), ".*": lrules.backprop()})
        feedback, _ = draw(rule, net, x)
        listed = [None, *(layer.kernel for layer in net[1:3]), None]
        listed[3] = np.abs(magnitudes(net, x, 3)[3]) * np.sign(net[3].kernel)
        agrees(pull(net, rule, feedback, x, e, rng=jax.random.key(3)), feedback_alignment.gradients(net, listed, x, e))


@pytest.mark.parametrize("name", mostly_slow(NETS, ["deep", "conv_max"]))
def test_congruent_feedback(name):
    with jax.enable_x64(True):
        net, x, e = make(name)
        rule = lrules.feedback_alignment(init=lrules.feedback.congruent())
        feedback, listed = draw(rule, net, x)
        for b, m, layer in zip(listed[1:], magnitudes(net, x, 1)[1:], net[1:], strict=True):
            np.testing.assert_array_equal(b, np.abs(m) * np.sign(layer.kernel))
        agrees(pull(net, rule, feedback, x, e), feedback_alignment.gradients(net, listed, x, e))


def test_refusals():
    with pytest.raises(ValueError, match="magnitude must be one of 'unit', 'scaled', 'random', 'fixed', got 'half'"):
        lrules.sign_symmetry("half")
    for magnitude in ("unit", "scaled"):
        with pytest.raises(ValueError, match=f'"{magnitude}" draws nothing: leave out init='):
            lrules.sign_symmetry(magnitude, init=jax.nn.initializers.zeros)
    net, x, _ = make("shallow")
    with pytest.raises(ValueError, match="use a sequential rule"):
        draw(lrules.direct_feedback_alignment(init=lrules.feedback.congruent()), net, jnp.asarray(x))


def test_congruent_under_a_scan_over_layers():
    """Each slice of a scanned weight gives its own signs."""
    w = jax.random.normal(jax.random.key(0), (3, 4, 4))

    def apply(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["in"], p["w"])[0] @ p["out"]

    params = {"in": jnp.ones((2, 4)), "w": w, "out": jnp.ones((4, 1))}
    rule = lrules.feedback_alignment(init=lrules.feedback.congruent())
    feedback = rule.init(jax.random.key(1), apply, params, jnp.ones((5, 2)))
    np.testing.assert_array_equal(np.sign(feedback.fixed["w"]), np.sign(w))
    assert bridge.feedback_dict([None]) == {}
