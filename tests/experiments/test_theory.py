"""The papers' theorems: every claim of the program on one random problem, and what can be worked out by hand.

Paper 1 is random backpropagation (Baldi, Sadowski, Lu), 2 BackMAN, 3 dual propagation (Hoier, Zach).
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import Polynomial

import lrules
from experiments.theory import backman, rbp_dynamics
from experiments.theory import dual_propagation as dp
from experiments.theory.check import Check
from experiments.theory.claims import CLAIMS
from experiments.theory.figures import FIGURES
from tests.experiments.programs import fork
from tests.reference import dual_propagation as reference
from tests.reference import nets
from tests.sampling import mostly_slow


@pytest.mark.parametrize("name", mostly_slow(CLAIMS, CLAIMS.keys() - {"chains", "three_layers", "best_responses"}))
def test_claims_hold(name):
    assert [str(c) for c in CLAIMS[name](range(1)) if not c.holds] == []


def test_check():
    assert Check("", "", 1.0, most=2).holds and not Check("", "", 3.0, most=2).holds
    assert not Check("", "", 1.0, least=2).holds and not Check("", "", float("nan"), most=2).holds
    assert Check("", "", 0.0, most=2, least=1e-3).wanted == "> 0.001 and < 2"


# ------------------------------------------------------------------------------------------------------- 1: the systems


def linear(weights, inputs):
    for name in sorted(weights):
        inputs = inputs @ weights[name].T
    return inputs


@pytest.mark.parametrize("rule", ["backprop", "direct_feedback_alignment", "feedback_alignment"])
def test_linear_systems_are_what_the_rules_do(rule):
    """Eq. 81, 84 and 87 are the library's updates of a linear network, averaged over data."""
    rng = np.random.default_rng(0)
    sizes = (3, 5, 4, 2)
    problem = rbp_dynamics.random_problem(0, sizes)
    x, t = rng.normal(size=(7, 3)), rng.normal(size=(7, 2))
    ti, ii = t.T @ x / 7, x.T @ x / 7
    between = [rng.normal(size=(n, m)) for n, m in zip(sizes[1:-1], sizes[2:], strict=True)]  # C_i of RBP
    feedback = lrules.Feedback({}, {})
    if rule == "backprop":
        field = rbp_dynamics.gradient_descent(problem.weights, ti, ii)
    elif rule == "direct_feedback_alignment":
        field = rbp_dynamics.srbp(problem.weights, problem.feedback, ti, ii)
        feedback = lrules.Feedback({"b": problem.feedback[0].T, "c": problem.feedback[1].T}, {})
    else:
        field = rbp_dynamics.srbp(problem.weights, rbp_dynamics.skipped(between), ti, ii)
        feedback = lrules.Feedback({"b": between[0].T, "c": between[1].T}, {})
    with jax.enable_x64(True):
        f = lrules.transform(linear, getattr(lrules, rule)())
        weights, feedback = jax.tree.map(jnp.asarray, (dict(zip("abc", problem.weights, strict=True)), feedback))
        grads = jax.grad(lambda w: backman.loss(f(w, feedback, jnp.asarray(x)), jnp.asarray(t)))(weights)
        for name, velocity in zip("abc", field, strict=True):
            np.testing.assert_allclose(-grads[name], velocity, atol=1e-12)


@pytest.mark.parametrize("derivative", [True, False])
def test_power_law_is_what_the_rules_do(derivative):
    """Eq. 113 and 114, and Eq. 119."""
    rng = np.random.default_rng(0)
    x, t = rng.uniform(0.2, 1.2, (2, 6, 1))
    a1, a2, c, mu = 0.8, 1.3, 0.6, 3.0
    moments = rbp_dynamics.power_moments(x, t, mu)
    cube = lrules.activation(lambda z: z**3)
    rule = lrules.direct_feedback_alignment()
    system = rbp_dynamics.power_srbp
    if not derivative:
        rule, system = lrules.without_derivatives(rule), rbp_dynamics.power_srbp_without_derivative
    with jax.enable_x64(True):
        weights = {"first": jnp.full((1, 1), a1), "second": jnp.full((1, 1), a2)}

        def net(w, x):
            return cube(x @ w["first"]) @ w["second"]

        f = lrules.transform(net, rule)
        feedback = lrules.Feedback({"second": jnp.full((1, 1), c)}, {})
        grads = jax.grad(lambda w: backman.loss(f(w, feedback, jnp.asarray(x)), jnp.asarray(t)))(weights)
        descent = jax.grad(lambda w: backman.loss(net(w, jnp.asarray(x)), jnp.asarray(t)))(weights)
    got = -np.ravel(grads["first"]), -np.ravel(grads["second"])
    np.testing.assert_allclose(np.ravel(got), system((a1, a2), moments, c, mu), rtol=1e-12)
    want = rbp_dynamics.power_gradient_descent((a1, a2), moments, mu)
    np.testing.assert_allclose(-np.ravel((descent["first"], descent["second"])), want, rtol=1e-12)


# ------------------------------------------------------------------------------------------------ 1: what can be solved


@pytest.mark.parametrize(
    ("coefficients", "start", "end"),
    [
        ([0, 1, 0, -1], 0.5, 1),  # x - x^3
        ([0, 1, 0, -1], -0.1, -1),
        ([0, 1, 0, -1], 0.0, 0),
        ([0, 1, 0, -1], 3.0, 1),
        ([0, -1, 0, 1], 2.0, np.inf),  # positive above the last root: not as printed
        ([0, -1, 0, 1], -2.0, -np.inf),
        ([-1, 0, 1], -5.0, -1),  # x^2 - 1
        ([-1, 0, 1], 1.1, np.inf),
    ],
)
def test_limits_in_one_dimension(coefficients, start, end):
    assert rbp_dynamics.limit(Polynomial(coefficients), start) == pytest.approx(end)


@pytest.mark.slow
def test_flow_without_a_solution_is_refused():
    with pytest.raises(RuntimeError, match="polynomial_flow has no solution until t = 500"):
        rbp_dynamics.integrate(rbp_dynamics.polynomial_flow, 2.0, np.array([0.0, -1.0, 0.0, 1.0]))


def test_shortest_chain_by_hand():
    """From 0 with c = alpha = beta = 1: a_1 = tau, a_2 = tau^2 / 2, so tau^3 = 2; in general, the cubic of Eq. 31."""
    np.testing.assert_allclose(rbp_dynamics.chain_limit([0, 0], [1]), [2 ** (1 / 3), 2 ** (-1 / 3)])
    (a1, a2), c, alpha, beta = (-1.3, 0.4), 0.7, 2.0, 0.5
    x, y = rbp_dynamics.chain_limit([a1, a2], [c], alpha, beta)
    assert x**3 + (2 * c * a2 - a1**2) * x - 2 * c * alpha / beta == pytest.approx(0, abs=1e-12)
    assert x * y == pytest.approx(alpha / beta)


def test_chain_without_lower_feedback():
    """The trivial case of Theorem 2: a_1 stays, a_2 goes to alpha / (beta a_1)."""
    np.testing.assert_allclose(rbp_dynamics.chain_limit([0.5, -1], [0.0], 3.0, 2.0), [0.5, 3.0])


def test_leading_coefficients_of_chains():
    """Degree 2^L - 1 and -beta c_2^2 / 16 c_1^2 in a_1 for three layers (Eq. 42); Eq. 50, its last exponent mended."""
    c1, c2, beta = 0.7, -1.3, 2.0
    velocity = c1 * rbp_dynamics.chain_velocity([0.1, 0.2, 0.3], [c1, c2], 1.0, beta)
    assert velocity.degree() == 7  # in tau; a_1 = a_1(0) + c_1 tau
    assert velocity.coef[-1] / c1**7 == pytest.approx(-beta * c2**2 / (16 * c1**2))
    c = [0.7, -1.3, 0.4, 1.0]
    top = rbp_dynamics.chain_polynomials([0.1, 0.2, 0.3, 0.4], c[:3])[3].coef[-1] / c1**8
    assert top == pytest.approx(c[3] / (2 * c[2]) * (c[2] / (2 * c[1])) ** 2 * (c[1] / (2 * c[0])) ** 4)


def test_attracting_and_repelling_fixed_points():
    """a_1^2 + c_1 a_2 at (-1, -1), the end of the parabola's interior, and on either side (Eq. 28, 33)."""
    slopes = [rbp_dynamics.chain_slope([a, 1 / a], [1.0]) for a in (-1.0, -0.9, -1.1, 0.3)]
    np.testing.assert_allclose(slopes[0], 0, atol=1e-15)
    assert slopes[1] < 0 < min(slopes[2:])


def test_autoencoder_by_hand():
    """C = (1, 0), A(0) = (0, 1), B(0) = 0: K = -1/2, and r^3 - r = 2 (Theorem 6)."""
    eye = np.eye(2)
    problem = rbp_dynamics.Problem((np.array([[0.0, 1.0]]), np.zeros((2, 1))), (np.array([[1.0, 0.0]]),), eye, eye)
    a, b = rbp_dynamics.compressive_limit(problem)
    r = 1.5213797068045676
    assert r**3 - r == pytest.approx(2)
    np.testing.assert_allclose(a, [[r, 0]])
    np.testing.assert_allclose(b, [[1 / r], [0]])


def test_power_one_is_the_chain():
    """mu = 1 is A[1,1,1]."""
    moments = rbp_dynamics.Moments(2.0, 0.5, 2.0, 0.5)
    found = rbp_dynamics.power_limit((0.4, -1.0), moments, 0.7, 1.0)
    np.testing.assert_allclose(found, rbp_dynamics.chain_limit([0.4, -1.0], [0.7], 2.0, 0.5))


def test_minus_identity_is_isolated_to_second_order_only():
    """Theorem 10 at A = -Id: the linearisation of Eq. 112 vanishes, as the appendix has it."""
    assert rbp_dynamics.isolation(-np.eye(2)) == pytest.approx(0, abs=1e-12)


# ----------------------------------------------------------------------------------------------------------- 2: BackMAN


def test_best_response_is_the_best():
    """No response drawn at random from the ball has a higher utility, and the update's is close to it."""
    net, weights, data = backman.random_dense(3)
    alpha, layer, unit = 1e-3, 1, 2
    with jax.enable_x64(True):
        weights, data = jax.tree.map(jnp.asarray, (weights, data))
        g, changes = backman.updates(net, weights, data, alpha)
        value = jax.jit(functools.partial(backman.utility, net, weights, data, alpha, layer, unit, frozen=g))
        drawn = np.random.default_rng(0).normal(size=(200, weights[layer].shape[0]))
        drawn *= alpha / np.linalg.norm(drawn, axis=1, keepdims=True)
        others = np.asarray(jax.lax.map(value, jnp.asarray(drawn)))
        nothing, update = float(value(jnp.zeros(drawn.shape[1]))), float(value(changes[layer][:, unit]))
        best = backman._best_responses(net, weights, data, alpha, layer, False, 50)[unit]
        highest = float(value(best))
    assert highest >= others.max()
    assert highest - update < 1e-3 * (update - nothing)


# -------------------------------------------------------------------------------------------------- 3: dual propagation

sets = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=8)
unit = st.integers(0, 8).map(lambda n: n / 8)
step = st.integers(1, 16).map(lambda n: n / 8)


@settings(max_examples=200)
@given(states=sets, alphas=st.tuples(unit, unit), betas=st.tuples(step, step))
def test_order_of_relaxations(states, alphas, betas):
    """Propositions 4.1 (a) the other way round, (b) for a loss >= 0, and 4.2, on any finite set of states."""
    loss, energy = np.array(states, np.float64).T
    (low, high), (small, large) = sorted(alphas), sorted(betas)
    assert dp.arovr(loss, energy, low, small) >= dp.arovr(loss, energy, high, small) - 1e-9
    assert small * dp.arovr(loss, energy, low, small) <= large * dp.arovr(loss, energy, low, large) + 1e-9
    move = low * small
    assert dp.arovr(loss, energy, 1 - move / large, large) <= dp.arovr(loss, energy, 1 - move / small, small) + 1e-9


def test_relaxations_by_hand():
    """E = (s - theta)^2 / 2 and l = g s: J = g theta - (2 alpha - 1) beta g^2 / 2, which falls with alpha."""
    s = np.linspace(-5, 5, 100_001)
    theta, g, alpha, beta = 0.4, 1.5, 0.3, 0.8
    energy = 0.5 * (s - theta) ** 2
    assert dp.arovr(g * s, energy, alpha, beta) == pytest.approx(g * theta - (2 * alpha - 1) * beta * g**2 / 2)
    # Eq. 13's example: a step of ascent
    assert dp.adversarial(g * s, energy, alpha, beta) == pytest.approx(g * (theta + 0.7 * beta * g))
    coarse = s[::200]  # a linear loss makes SPROVR the same as AROVR
    found = dp.sprovr(lambda s: g * s, coarse, energy[::200], alpha, beta)
    assert found == pytest.approx(dp.arovr(g * coarse, energy[::200], alpha, beta))


def test_scaled_relaxation_needs_a_loss_that_is_not_negative():
    """Prop. 4.1 (b) fails for l = -1 everywhere: beta J = -beta."""
    constant, energy = -np.ones(3), np.arange(3.0)
    assert 0.5 * dp.arovr(constant, energy, 0.5, 0.5) > 1.0 * dp.arovr(constant, energy, 0.5, 1.0)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.7, 1.0])
def test_dual_propagation_makes_its_objective_stationary(alpha):
    """At the states of Eq. 2 and 3 the objective of Eq. 1 is stationary, and its weight gradient is the rule's."""
    rng = np.random.default_rng(0)
    sizes, activations, beta = (4, 5, 3, 2), ("tanh", "tanh", "identity"), 0.4
    kernels = [0.5 * rng.normal(size=s) for s in zip(sizes, sizes[1:], strict=False)]
    x, y = rng.normal(size=(1, 4)), rng.normal(size=(1, 2))
    options = {"alpha": alpha, "beta": beta, "adjoint": False, "iterations": 200, "output": "squared_error"}
    net = [nets.dense(w, activation=f) for w, f in zip(kernels, activations, strict=True)]
    gradients, states = reference.gradients(net, x, targets=y, **options)
    with jax.enable_x64(True):
        plus, minus = ([jnp.asarray(s[0]) for s in side[1:]] for side in (states.plus, states.minus))

        def objective(plus, minus, kernels):
            energies = [dp.layer_energy(w, dp.POTENTIALS[f]) for w, f in zip(kernels, activations, strict=True)]
            loss = functools.partial(backman.loss, targets=jnp.asarray(y))
            return dp.dp_objective(lambda s: loss(s[None]), energies, plus, minus, jnp.asarray(x[0]), alpha, beta)

        d_plus, d_minus, d_kernels = jax.grad(objective, (0, 1, 2))(plus, minus, list(map(jnp.asarray, kernels)))
    for slope in (*d_plus, *d_minus):
        np.testing.assert_allclose(slope, 0, atol=1e-10)
    for got, want in zip(d_kernels, gradients.kernels, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_closed_form_is_where_dual_propagation_goes(alpha):
    """Appendix G beside the iterated rule, in a linear network."""
    rng = np.random.default_rng(1)
    lower, upper = 0.3 * rng.normal(size=(4, 5)), 0.2 * rng.normal(size=(5, 3))
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(6, 3))
    net = [nets.dense(lower), nets.dense(upper)]
    options = {"alpha": alpha, "beta": 0.4, "adjoint": False, "iterations": 300, "output": "squared_error"}
    found, _ = reference.gradients(net, x, targets=y, **options)
    for got, want in zip(dp.network_gradient(lower, upper, x, y, alpha, 0.4), found.kernels, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-10)


def test_printed_coefficient_of_the_loss_is_wrong():
    """M' as printed after Eq. 58 subtracts its two terms; added, they are the coefficient of b_l in Eq. 55."""
    q, alpha = dp.random_quadratic(0, beta=0.3), 0.4
    low, high = np.linalg.inv(q.h_f + alpha * q.h_l), np.linalg.inv(q.h_f - (1 - alpha) * q.h_l)
    printed = low @ ((1 - 2 * alpha) * q.h_f - 2 * alpha * (1 - alpha) * q.h_l) @ high
    right = low @ q.h_f @ high
    np.testing.assert_allclose(right, alpha * low + (1 - alpha) * high, atol=1e-12)
    plus, minus = dp.arovr_outputs(q, alpha, np.zeros(6))  # Eq. 55 with z = 0
    matrix = dp.arovr_signal(q, alpha)[0]
    np.testing.assert_allclose(plus - minus, -matrix @ q.b_f - right @ q.b_l, atol=1e-12)
    assert np.abs(plus - minus + matrix @ q.b_f + printed @ q.b_l).max() > 0.1


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_strength_of_the_signal(beta):
    """Eq. 60 and 70: the same at alpha 0 and 1, SPROVR weaker between; M of identity matrices is minus that."""
    for alpha in (0.0, 0.5, 1.0):
        strong, weak = dp.signal_strength(alpha, beta)
        assert strong > weak if alpha == 0.5 else strong == pytest.approx(weak)
        eye = np.eye(2)
        q = dp.Quadratic(beta * eye, np.zeros(2), eye, np.zeros(2), eye, np.zeros(2), eye, np.zeros(2))
        np.testing.assert_allclose(dp.arovr_signal(q, alpha)[0], -strong * eye)
        np.testing.assert_allclose(dp.sprovr_signal(q, alpha)[0], -weak * eye)


# ---------------------------------------------------------------------------------------------------------- the program


def test_program(tmp_path):
    done = fork("theory", "--only=relaxations,corollary", "--seeds=2", "--nofigures", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "9 of 9 claims hold, 2 seeds" in done.stdout and "| dual propagation, Prop. 4.2 " in done.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [c["holds"] for c in metrics["claims"]["relaxations"]] == 8 * [True]
    assert metrics["settings"]["seeds"] == 2 and metrics["provenance"]["device"]
    assert len((tmp_path / "claims.csv").read_text().splitlines()) == 10


def test_program_names_the_nearest_claim(tmp_path):
    done = fork("theory", "--only=chain", f"--output={tmp_path}")
    assert done.returncode == 1 and done.stderr.strip() == "Error: There is no claim 'chain': did you mean 'chains'?"


@pytest.mark.parametrize(
    "name", [n if n in ("vector_field", "relaxations") else pytest.param(n, marks=pytest.mark.slow) for n in FIGURES]
)
def test_figures(name, tmp_path):
    FIGURES[name]().savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 20_000
