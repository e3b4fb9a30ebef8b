"""Direct Kolen-Pollack against the reference, and what its feedback weights come to in linear networks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrules
from tests import bridge
from tests.reference import direct_kolen_pollack
from tests.rules.common import NETS, agrees, by_name, draw, make, pull
from tests.sampling import mostly_slow


@pytest.mark.parametrize("name", mostly_slow(NETS, ["deep", "conv_max"]))
def test_reference(name):
    with jax.enable_x64(True):
        net, x, e = make(name)
        rule = lrules.direct_kolen_pollack()
        feedback, listed = draw(rule, net, x)
        assert feedback.fixed == {}
        got = pull(net, rule, feedback, x, e)
        wanted = direct_kolen_pollack.gradients(net, listed, x, e)
        agrees(got, wanted)
        bridge.close(got[1].learned, by_name(wanted.feedback))


def trained(apply, params, x, y, decay, steps, rate=0.05):
    """Parameters and feedback after gradient descent with the same decay for both, and the feedback before it."""
    rule = lrules.direct_kolen_pollack()
    feedback = rule.init(jax.random.key(0), apply, params, x)
    optimizer = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))
    step = lrules.value_and_grad(apply, lrules.testing.half_squared_error, rule)

    def update(carry, _):
        both, state = carry
        _, grads = step(both[0], lrules.Feedback({}, both[1]), x, y)
        updates, state = optimizer.update((grads.params, grads.feedback), state, both)
        return (optax.apply_updates(both, updates), state), None

    start = (params, feedback.learned)
    run = jax.jit(lambda carry: jax.lax.scan(update, carry, None, length=steps)[0])
    return *run((start, optimizer.init(start)))[0], feedback.learned


@pytest.mark.parametrize("decay", [0.5, 0.0])
def test_the_topmost_feedback_comes_to_the_last_weight(decay):
    """At any depth, in a nonlinear network: W_L - B shrinks by 1 - eta gamma at each step; without decay it stays."""
    with jax.enable_x64(True):
        net, x, _ = make("deep")
        apply, params, last = bridge.apply_of(net), bridge.parameters(net), str(len(net) - 1)
        x, y = jnp.asarray(x), jnp.ones((len(x), 3))
        after, learned, before = trained(apply, params, x, y, decay, steps=20)
        name = f"{last}/kernel"
        gap = np.asarray(after[last]["kernel"].T - learned[name])
        wanted = np.asarray(params[last]["kernel"].T - before[name]) * (1 - 0.05 * decay) ** 20
        np.testing.assert_allclose(gap, wanted, atol=1e-12)


DECAY = 0.3


def linear_net(outputs, scales, *, white):
    """A linear network that has come to rest: the product above each hidden signal, its feedback, and W_L W_L^T B.

    The targets are a linear map of the inputs with these singular values.
    """
    rng = np.random.default_rng(0)
    sizes = (6, 7, 6, 5, outputs)
    params = [jnp.asarray(rng.normal(size=s) / s[0] ** 0.5) for s in zip(sizes[:-1], sizes[1:], strict=True)]
    x = rng.normal(size=(40, 6))
    if white:  # the mean of x x^T is the identity
        left, _, right = np.linalg.svd(x, full_matrices=False)
        x = left @ right * len(x) ** 0.5
    y = x @ (np.linalg.qr(rng.normal(size=(6, 6)))[0][:, :outputs] * scales)

    def apply(params, x):
        for w in params:
            x = x @ w
        return x

    params, learned, _ = trained(apply, params, jnp.asarray(x), jnp.asarray(y), DECAY, steps=25_000, rate=0.02)
    last, product, found = np.asarray(params[-1]).T, np.eye(outputs), []
    for k in reversed(range(1, len(params))):
        product, b = product @ np.asarray(params[k]).T, np.asarray(learned[str(k)])
        found.append((product, b, b if k == len(params) - 1 else last @ last.T @ b))
    return found


def angle(a, b):
    return float(lrules.diagnostics.compare(jnp.asarray(a), jnp.asarray(b)).angle)  # a rounded cosine may be above 1


@pytest.mark.parametrize("white", [True, False])
def test_products_in_linear_networks(white):
    """At rest, B_l differs from the product M_l of the weights above by the factor W_L W_L^T at the outputs."""
    with jax.enable_x64(True):
        top, *below = linear_net(3, np.array([1.0, 1.5, 2.0]), white=white)
        bridge.close(top[0], top[1], 1e-8)
        for product, b, scaled in below:
            assert np.linalg.norm(b) > 1
            bridge.close(product, scaled, 1e-8)
            assert 10 < angle(product, b) < 30  # so it is not the product itself


def test_feedback_comes_to_the_product_of_weights():
    """With one output both have the same direction; and if W_L W_L^T is the identity, they are equal.

    For white inputs W_L W_L^T has the singular values of the targets, less the decay.
    """
    with jax.enable_x64(True):
        for product, b, _ in linear_net(1, 2.0, white=True):
            assert np.linalg.norm(b) > 0.5 and angle(product, b) < 1e-4
        for product, b, _ in linear_net(3, 1 + DECAY, white=True):
            assert np.linalg.norm(b) > 1
            bridge.close(product, b, 1e-8)


def test_options():
    """The options are those of direct feedback alignment, of which it is the adaptive kind."""
    net, x, e = make("deep")
    for options in ({"rank": 2}, {"at": "[23]/"}, {"error_at": "outputs"}, {}):
        rules = lrules.direct_kolen_pollack(**options), lrules.direct_feedback_alignment(adaptive=True, **options)
        got, wanted = (pull(net, rule, draw_any(rule, net, x), x, e) for rule in rules)
        bridge.close(got, wanted)
    with pytest.raises(ValueError, match="max_feedback_bytes=10"):
        draw_any(lrules.direct_kolen_pollack(max_feedback_bytes=10), net, x)


def draw_any(rule, net, x):
    return rule.init(jax.random.key(1), bridge.apply_of(net), bridge.parameters(net), jnp.asarray(x))
