"""Two values at each activation, against explicit states in NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from lrules.rules.dual_propagation.states import Unit
from tests import bridge
from tests.reference import dual_propagation as reference
from tests.reference import nets
from tests.rules.dual_propagation.common import (
    NO_FEEDBACK,
    VARIANTS,
    computed,
    conv,
    dense,
    expected,
    half_squared,
    refused,
)
from tests.sampling import mostly_slow

pytestmark = pytest.mark.usefixtures("double_precision")


ALPHAS = (0.0, 0.25, 0.5, 1.0)
CASES = [
    (order, alpha, adjoint, output) for order in reference.ORDERS for alpha in ALPHAS for adjoint, output in VARIANTS
]


# Each variant in each order, with one alpha, a different one from order to order.
QUICK = [
    (order, ALPHAS[(i + j) % 4], *variant)
    for i, order in enumerate(reference.ORDERS)
    for j, variant in enumerate(VARIANTS)
]


@pytest.mark.parametrize("order,alpha,adjoint,output", mostly_slow(CASES, QUICK))
def test_explicit_states(order, alpha, adjoint, output):
    index = CASES.index((order, alpha, adjoint, output))
    net, x = conv(pool=["max", "average"][index % 2]) if index % 5 == 2 else dense()
    iterations = 1 + index % 5 if order != "forward" else len(net) + index % 2
    options = {"alpha": alpha, "beta": 0.4, "adjoint": adjoint, "order": order, "iterations": iterations}
    options["output"] = output
    want = expected(net, x, **options)
    (_, outputs), grads = computed(net, x, **options)
    bridge.close(grads.params, bridge.kernels_and_biases(want))
    np.testing.assert_allclose(outputs, nets.forward(net, x).outputs, atol=1e-12)
    assert grads.report["residual"].shape == (iterations,)


@pytest.mark.slow
@pytest.mark.parametrize("case", [dense, conv])
@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("order,alpha,adjoint,output", CASES)
def test_explicit_states_in_full(order, alpha, adjoint, output, iterations, case):
    """All that `test_explicit_states` takes a sample of."""
    net, x = case()
    if order == "forward" and iterations < len(net):
        pytest.skip("refused: error would not come down")
    options = {"alpha": alpha, "beta": 0.4, "adjoint": adjoint, "order": order, "iterations": iterations}
    options["output"] = output
    _, grads = computed(net, x, **options)
    bridge.close(grads.params, bridge.kernels_and_biases(expected(net, x, **options)))


@pytest.mark.parametrize("order", ["forward_backward", "parallel"])
def test_numbers_by_name(order):
    net, x = dense()
    want = expected(
        net, x, alpha=[0.1, 0.3, 0.8, 0.6], beta=[0.2, 0.3, 0.6, 0.5], adjoint=False, iterations=3, order=order,
        output="squared_error", input_nudge=1.0,
    )  # fmt: skip
    alpha = {"inputs": 0.1, "tanh": 0.3, "relu": 0.8, "outputs": 0.6}
    beta = {"inputs": 0.2, "tanh": 0.3, "relu": 0.6, ".*": 0.5}
    options = {"adjoint": False, "iterations": 3, "order": order, "output": "squared_error", "input_nudge": 1.0}
    _, grads = computed(net, x, alpha=alpha, beta=beta, **options)
    bridge.close(grads.params, bridge.kernels_and_biases(want))


def test_names_without_a_number_and_numbers_without_a_name():
    refused(ValueError, "alpha: no pattern matches the state 'relu'", alpha={"tanh": 0.5})
    refused(
        ValueError,
        "beta: 'elu\\$' matches no state; the states are 'tanh', 'tanh#2' .inputs are states with input_nudge",
        beta={"elu$": 0.5, "elu": 0.1, ".*": 0.1},
        net=dense(0, ("tanh", "tanh")),
    )


def test_the_error_that_goes_down():
    """It is (s- - s+) / (n beta) bit for bit, also where both are the same, and where they are not finite."""
    plus = np.float32([0.3, -0.0, 0.0, 7.0, 1e-30, np.inf, np.inf, np.nan])
    minus = np.float32([0.1, 0.0, -0.0, 7.0, 0.0, np.inf, 1.0, 1.0])
    unit = Unit(0.5, True, 1.0, 0.25, 2)
    with np.errstate(invalid="ignore"):
        want = (minus - plus) / np.float32(unit.scale)
    np.testing.assert_array_equal(unit.error(jnp.asarray(plus), jnp.asarray(minus)), want)
    arrays, moved = (jnp.zeros(3), jnp.zeros(3)), (jnp.zeros(3), jnp.ones(3))
    np.testing.assert_array_equal(jax.jvp(unit.error, arrays, moved)[1], np.full(3, 1 / unit.scale))  # at zero, too


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="it is about XLA for CPUs")
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="the XLA of older JAX computes it again all the same")
def test_each_error_is_computed_once():
    """Not again for each of its readers: two products and the sum over the batch, which is the gradient of a bias."""
    size = {"a1": (16, 64), "a2": (64,), "a3": (64, 16)}
    params = {name.replace("a", block): jnp.ones(shape) for block in "ab" for name, shape in size.items()}

    def net(w, x):
        for k in "ab":
            x = x + jax.nn.gelu(x @ w[f"{k}1"] + w[f"{k}2"][None, None]) @ w[f"{k}3"]
        return x

    def loss(outputs, targets):
        return half_squared(outputs, targets).mean(-1)

    x = jnp.ones((8, 16, 16))
    step = jax.jit(lrules.value_and_grad(net, loss, lrules.dual_propagation()))
    text = step.lower(params, NO_FEEDBACK, x, x).compile().as_text()
    assert len(re.findall(r' (?:multiply|divide)\([^\n]*renew\)+/div"', text)) == 2  # for two activations
