"""The learning dynamics of random backpropagation, averaged over the data, in continuous time (section 7).

Baldi, Sadowski, Lu: Learning in the machine: random backpropagation and the deep learning channel, 2018.

A linear network O = P I, P = A_L ... A_1, learns T from I by skipped random backpropagation. Eq. 81, with C_L = Id:

    dA_i/dt = C_i (S_TI - P S_II) A_1^t ... A_{i-1}^t,    S_TI = E(T I^t),  S_II = E(I I^t)

Shapes: A_i [N_i, N_{i-1}], C_i [N_i, N_L], S_TI [N_L, N_0], S_II [N_0, N_0]. All linear cases of section 7 are this
system. In chains all sizes are 1, and a_i, c_i, alpha = E(TI) and beta = E(I^2) are [1, 1] matrices. Gradient descent
(Eq. 84) has A_{i+1}^t ... A_L^t instead of C_i. Weights and feedback are tuples of arrays; the last layer has no C.

All functions take and return NumPy arrays, and compute in float64.
"""

import functools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpy.polynomial import Polynomial

MOST_STEPS = 200_000

Weights = tuple[Any, ...]
Vector = Sequence[float] | np.ndarray
Field = Callable[..., Any]  # a named function (state, *arguments) -> time derivative, with the structure of state


class Flow(NamedTuple):
    """A solution: `times` [T], and `states`, the state with an axis of times in front."""

    times: np.ndarray
    states: Any

    @property
    def last(self) -> Any:
        return jax.tree.map(lambda x: x[-1], self.states)


class Problem(NamedTuple):
    """A linear network, its feedback, and the moments of its data."""

    weights: Weights
    feedback: Weights
    ti: np.ndarray  # [N_L, N_0]
    ii: np.ndarray  # [N_0, N_0]


# ---------------------------------------------------------------------------------------------------- the linear system


def srbp(weights: Weights, feedback: Weights, ti: Any, ii: Any) -> Weights:
    """Skipped random backpropagation: dA_i/dt = C_i (S_TI - P S_II) A_1^t ... A_{i-1}^t (Eq. 81)."""
    error = ti - product(weights) @ ii
    signals = (*(c @ error for c in feedback), error)
    below = [np.eye(ti.shape[1]), *(product(weights[:i]) for i in range(1, len(weights)))]
    return tuple(s @ b.T for s, b in zip(signals, below, strict=True))


def gradient_descent(weights: Weights, ti: Any, ii: Any) -> Weights:
    """Gradient descent: dA_i/dt = A_{i+1}^t ... A_L^t (S_TI - P S_II) A_1^t ... A_{i-1}^t (Eq. 84)."""
    return srbp(weights, tuple(product(weights[i:]).T for i in range(1, len(weights))), ti, ii)


def product(matrices: Sequence[Any]) -> Any:
    """A_n ... A_1."""
    return functools.reduce(lambda below, a: a @ below, matrices)


def skipped(feedback: Weights) -> Weights:
    """The SRBP feedback C_i C_{i+1} ... C_{L-1} that equals RBP with the matrices C_i [N_i, N_{i+1}] (Eq. 87)."""
    return tuple(functools.reduce(lambda a, b: a @ b, feedback[i:]) for i in range(len(feedback)))


def optimum(ti: np.ndarray, ii: np.ndarray) -> np.ndarray:
    """The least squares solution S_TI S_II^-1 [N_L, N_0]."""
    return np.linalg.solve(ii, ti.T).T


def excess_error(weights: Weights, ti: np.ndarray, ii: np.ndarray) -> np.ndarray:
    """E|T - P I|^2 / 2 minus its minimum over all P. The weights may have leading axes; the result has them too."""
    gap = product(weights) - optimum(ti, ii)
    return 0.5 * np.einsum("...ij,jk,...ik->...", gap, ii, gap)


def best_excess_error(ti: np.ndarray, ii: np.ndarray, rank: int) -> float:
    """The least excess error of any P of a rank: half the squares of the other singular values of P* S_II^(1/2)."""
    return float(0.5 * np.sum(np.linalg.svd(optimum(ti, ii) @ np.linalg.cholesky(ii), compute_uv=False)[rank:] ** 2))


def random_problem(seed: int, sizes: Sequence[int]) -> Problem:
    """Normal weights and feedback with standard deviation 1/sqrt(fan-in), and the moments of random data."""
    rng = np.random.default_rng(seed)
    inputs, outputs = sizes[0], sizes[-1]
    weights = tuple(rng.normal(size=(n, m)) / np.sqrt(m) for m, n in zip(sizes, sizes[1:], strict=False))
    feedback = tuple(rng.normal(size=(n, outputs)) / np.sqrt(outputs) for n in sizes[1:-1])
    x = rng.normal(size=(20 * inputs, inputs))
    t = x @ rng.normal(size=(inputs, outputs)) + 0.1 * rng.normal(size=(len(x), outputs))
    return Problem(weights, feedback, t.T @ x / len(x), x.T @ x / len(x))


def integrate(field: Field, state: Any, *arguments: Any, until: float = 500.0, points: int = 300) -> Flow:
    """Solve dstate/dt = field(state, *arguments) from t = 0, with Dopri8 of diffrax, to a relative error of 1e-10.

    Args:
      field: a function of this module. JAX compiles it once for each structure of its arguments.
      state: arrays.
      *arguments: arrays.
      until: the last time.
      points: the number of times in the solution: 0, and then logarithmic steps from until / 10^5.

    Raises:
      RuntimeError: there is no finite solution until that time, or the solver takes too many steps.
    """
    times = np.concatenate([[0.0], np.geomspace(1e-5 * until, until, points - 1)])
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (state, arguments))
        solved, finite = _solve(field, *wide, times)
        if not finite:
            raise RuntimeError(f"{field.__name__} has no solution until t = {until:g} within {MOST_STEPS} steps")
        return Flow(times, jax.tree.map(np.asarray, solved))


@functools.partial(jax.jit, static_argnums=0)
def _solve(field, state, arguments, times):
    flat, unflatten = ravel_pytree(state)  # a vector compiles in half the time of a tuple

    def velocity(t, y, arguments):
        return ravel_pytree(field(unflatten(y), *arguments))[0]

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(velocity),
        diffrax.Dopri8(),
        times[0],
        times[-1],
        None,
        flat,
        arguments,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=1e-10, atol=1e-12),
        max_steps=MOST_STEPS,
        throw=False,
    )
    return jax.vmap(unflatten)(solution.ys), jnp.isfinite(solution.ys).all()


# ------------------------------------------------------------------------------------------- one dimension: Theorem 1


def polynomial_flow(x: Any, coefficients: Any) -> Any:
    """dx/dt = sum_n coefficients[n] x^n."""
    return functools.reduce(lambda total, k: total * x + k, coefficients[::-1])


def limit(velocity: Polynomial, start: float) -> float:
    """The limit of dx/dt = velocity(x) from `start`: a root, or plus or minus infinity (Theorem 1).

    The limit is the next root in the direction of the velocity. If there is no such root, the solution reaches infinity
    in finite time. Above the last root this happens if the velocity is positive (the paper prints the opposite).
    """
    speed = velocity(start)
    if abs(speed) < 1e-14:
        return start
    roots = real_roots(velocity)
    ahead = roots[roots > start] if speed > 0 else roots[roots < start]
    if not len(ahead):
        return float(np.copysign(np.inf, speed))
    return float(ahead.min() if speed > 0 else ahead.max())


def real_roots(polynomial: Polynomial) -> np.ndarray:
    """The real roots in increasing order, refined by Newton's method."""
    found = np.roots(polynomial.coef[::-1])
    roots = np.sort(found[np.abs(found.imag) < 1e-7 * (1 + np.abs(found))].real)
    slope = polynomial.deriv()
    for _ in range(3):
        steep = np.abs(slope(roots)) > 1e-9
        roots = roots - np.where(steep, polynomial(roots) / np.where(steep, slope(roots), 1), 0)
    return roots


# ---------------------------------------------------------------------------------------- chains: Theorems 2, 3 and 4


def as_chain(values: Vector) -> Weights:
    """Numbers as [1, 1] matrices."""
    return tuple(np.full((1, 1), value, np.float64) for value in values)


def chain_problem(start: Vector, feedback: Vector, alpha: float = 1.0, beta: float = 1.0) -> Problem:
    """The chain A[1, ..., 1] with weights a_1 ... a_L and feedback c_1 ... c_{L-1} (Eq. 44)."""
    return Problem(as_chain(start), as_chain(feedback), *as_chain((alpha, beta)))


def chain_polynomials(start: Vector, feedback: Vector) -> list[Polynomial]:
    """Each a_i as a polynomial of degree 2^(i-1) in tau = integral of alpha - beta P (c_L = 1).

    da_i/dtau = c_i a_1 ... a_{i-1} (Eq. 45). The paper has polynomials in a_1, from c_i da_{i+1} = c_{i+1} a_i da_i
    (Eq. 47 to 49). These are the same, because a_1 = a_1(0) + c_1 tau, but more exact: they need no division by c_i.
    """
    below, polynomials = Polynomial([1.0]), []
    for a0, c in zip(start, [*feedback, 1.0], strict=True):
        polynomials.append(a0 + c * below.integ())
        below = below * polynomials[-1]
    return polynomials


def chain_velocity(start: Vector, feedback: Vector, alpha: float, beta: float) -> Polynomial:
    """dtau/dt = alpha - beta P, of degree 2^L - 1 in tau (Eq. 42, 51)."""
    return alpha - beta * functools.reduce(Polynomial.__mul__, chain_polynomials(start, feedback))


def chain_limit(start: Vector, feedback: Vector, alpha: float = 1.0, beta: float = 1.0) -> np.ndarray:
    """The fixed point a [L] that a chain reaches from `start` (Theorems 2 to 4)."""
    polynomials = chain_polynomials(start, feedback)
    tau = limit(chain_velocity(start, feedback, alpha, beta), 0.0)
    for _ in range(5):  # Newton's method with P itself: for five layers, the expanded polynomial is less exact
        a = np.array([p(tau) for p in polynomials])
        tau += (alpha / beta - a.prod()) / chain_slope(a, feedback)
    return np.array([p(tau) for p in polynomials])


def chain_couplings(a: np.ndarray, feedback: Vector) -> np.ndarray:
    """a_{i+1} - c_{i+1} / (2 c_i) a_i^2 [..., L - 1] of a [..., L], which is constant in time (Eq. 48).

    So every weight is a quadratic function of the weight below.
    """
    c = np.array([*feedback, 1.0])
    return a[..., 1:] - c[1:] / (2 * c[:-1]) * a[..., :-1] ** 2


def chain_gradient_limit(start: Vector, alpha: float = 1.0, beta: float = 1.0) -> np.ndarray:
    """The fixed point a [L] of gradient descent from positive weights, alpha > 0.

    a_i^2 - a_1^2 is constant (Eq. 54), so s = a_1^2 solves prod_i (s + a_i(0)^2 - a_1(0)^2) = (alpha / beta)^2. All a_i
    stay positive, so s is the largest root.
    """
    offsets = np.square(start) - start[0] ** 2
    s = real_roots(Polynomial.fromroots(-offsets) - (alpha / beta) ** 2).max()
    return np.sqrt(s + offsets)


def chain_slope(a: Vector, feedback: Vector) -> float:
    """dP/dt divided by (alpha - beta P): sum_i c_i a_1 ... a_{i-1} prod_{k != i} a_k (Eq. 24, 37, 46).

    At a fixed point, -beta times this slope is the rate of the linearised dynamics (Eq. 33), so the point attracts if
    the slope is positive. For A[1,1,1] this means a_1^2 + c_1 a_2 > 0, outside the parabola of Eq. 28.
    """
    c = [*feedback, 1.0]
    others = [np.prod([*a[:i], *a[i + 1 :]]) for i in range(len(a))]
    return float(sum(c[i] * np.prod(a[:i]) * others[i] for i in range(len(a))))


# ------------------------------------------------------------------------------ A[1,N,1] and A[N,1,N]: Theorems 5 and 6


def expansive_limit(problem: Problem) -> Weights:
    """The fixed point of A[1,N,1]: the root of a cubic (Theorem 5).

    With tau = integral of alpha - beta P: a_i = a_i(0) + c_i tau and db_i/dtau = a_i (Eq. 57). So P is a cubic in tau.
    """
    (a0, b0), (c,) = (w.ravel() for w in problem.weights), (w.ravel() for w in problem.feedback)
    lower = [Polynomial([a, c_i]) for a, c_i in zip(a0, c, strict=True)]
    upper = [b + a.integ() for a, b in zip(lower, b0, strict=True)]
    p = functools.reduce(Polynomial.__add__, (a * b for a, b in zip(lower, upper, strict=True)))
    tau = limit(problem.ti.item() - problem.ii.item() * p, 0.0)
    return np.array([[a(tau)] for a in lower]), np.array([[b(tau) for b in upper]])


def compressive_limit(problem: Problem) -> Weights:
    """The fixed point of A[N,1,M]: A = r C P*, with P* = S_TI S_II^-1 and r the positive root of a cubic (Theorem 6).

    The cubic is |C P*|^2 r^3 / 2 + K r = 1, with K of Lemma 1. It has one positive root. B = S_TI A^t / (A S_II A^t).
    The paper treats the autoencoder, S_TI = S_II = Id: there A = r C, B = C^t / (r |C|^2) and P = C^t C / |C|^2. If
    A(0) = -k C P* with k > 0, use `compressive_line_limit`.
    """
    (a0, b0), (c,), ti, ii = problem
    direction = c @ optimum(ti, ii)
    r = real_roots(_compressive_cubic(a0, b0, c, direction)).max()
    return _compressive_point(r * direction, ti, ii)


def compressive_line_limit(problem: Problem) -> Weights:
    """The fixed point of A[N,1,M] from A(0) = k C P*: A stays on this line.

    The proof of Theorem 6 calls this case easier. But for k < 0 and K low enough, the limit is a *negative* root of the
    cubic, which the theorem does not include. This fixed point is unstable against displacements from the line.
    """
    (a0, b0), (c,), ti, ii = problem
    direction = c @ optimum(ti, ii)
    k = (a0 @ direction.T).item() / (direction**2).sum()
    return _compressive_point(limit(_compressive_cubic(a0, b0, c, direction), k) * direction, ti, ii)


def _compressive_cubic(a0, b0, c, direction) -> Polynomial:
    """dr/dt = 1 - (|C P*|^2 r^2 / 2 + K) r (Eq. 77, 79), K = C B - |A|^2 / 2 (Lemma 1)."""
    k = (c @ b0).item() - 0.5 * (a0**2).sum()
    return Polynomial([1.0, -k, 0.0, -0.5 * (direction**2).sum()])


def _compressive_point(a, ti, ii) -> Weights:
    return a, ti @ a.T / (a @ ii @ a.T)


# ------------------------------------------------------------------------------ three layers: Lemma 1, Theorems 7 to 10


def coupling(weights: Weights, feedback: Weights) -> np.ndarray:
    """C A_2 + (C A_2)^t - A_1 A_1^t [..., N_1, N_1], constant in time (Eq. 92). For N_1 = 1 it is 2 K of Lemma 1."""
    (a1, a2), (c,) = weights, feedback
    ca2 = c @ a2
    return ca2 + np.swapaxes(ca2, -1, -2) - a1 @ np.swapaxes(a1, -1, -2)


def balance(weights: Weights) -> list[np.ndarray]:
    """A_{i+1}^t A_{i+1} - A_i A_i^t, constant under gradient descent (Eq. 85 and its transpose)."""
    return [
        np.swapaxes(above, -1, -2) @ above - below @ np.swapaxes(below, -1, -2)
        for below, above in zip(weights, weights[1:], strict=False)
    ]


def decreasing(weights: Weights, feedback: Weights, ti: np.ndarray, ii: np.ndarray) -> np.ndarray:
    """V = (C A_2)(C A_2)^t - A_1 (C P*)^t - (C P*) A_1^t [..., N_1, N_1]: a matrix that never increases (Eq. 109).

    dV/dt = -2 U S_II U^t with U = C (P* - P). (Eq. 110 has the same V, but two signs are wrong and S_II^-1 is missing.)
    """
    (a1, a2), (c,) = weights, feedback
    ca2, goal = c @ a2, c @ optimum(ti, ii)
    cross = a1 @ goal.T
    return ca2 @ np.swapaxes(ca2, -1, -2) - cross - np.swapaxes(cross, -1, -2)


def lower_layer_bound(problem: Problem) -> float:
    """An upper bound of |A_1| at all times (Theorem 7: its proof, with explicit constants).

    With f = |A_1|^2, g = |C S_TI|, K the coupling, l and L the extreme eigenvalues of S_II, r the largest rank of A_1:
    df/dt <= 2 g sqrt(f) + |K| L f - l f^2 / r. So f cannot grow above the root of the right-hand side.
    """
    (a1, _), (c,), ti, ii = problem
    least, most = np.linalg.eigvalsh(ii)[[0, -1]]
    k = np.linalg.norm(coupling(problem.weights, problem.feedback), 2)
    cubic = Polynomial([-2 * np.linalg.norm(c @ ti), -k * most, 0.0, least / min(a1.shape)])
    return float(max(np.linalg.norm(a1), real_roots(cubic).max()))


def isolation(a: np.ndarray) -> float:
    """Whether the solution (A, A^-1) of Eq. 112 is isolated: the smallest singular value of a linear map (Theorem 10).

    The map is E -> (d(B + B^t - A A^t), d(A + A^t - B B^t)) with dA = E, dB = -B E B. If the value is positive, the
    solution is isolated, and A and B converge.
    """
    b, n = np.linalg.inv(a), len(a)

    def symmetric(x):
        return x + x.T

    columns = []
    for e in np.eye(n * n).reshape(-1, n, n):
        de = -b @ e @ b
        columns.append(np.concatenate([symmetric(de - e @ a.T).ravel(), symmetric(e - de @ b.T).ravel()]))
    return float(np.linalg.svd(np.array(columns).T, compute_uv=False)[-1])


# --------------------------------------------------------------------------------------------- a power law: Theorem 12


class Moments(NamedTuple):
    """The moments of positive inputs: alpha = E(T I^mu), beta = E(I^2mu), gamma = E(T I), delta = E(I^(mu+1))."""

    alpha: float
    beta: float
    gamma: float
    delta: float


def power_moments(inputs: np.ndarray, targets: np.ndarray, mu: float) -> Moments:
    """The moments of data [n] (after Eq. 113)."""
    alpha, beta = (targets * inputs**mu).mean(), (inputs ** (2 * mu)).mean()
    return Moments(alpha, beta, (targets * inputs).mean(), (inputs ** (mu + 1)).mean())


def power_srbp(state: Any, moments: Moments, c: Any, mu: Any) -> Any:
    """SRBP for O = a_2 (a_1 I)^mu, with the derivative of the activation (Eq. 114).

    da_1/dt = c mu a_1^(mu-1) (alpha - beta a_2 a_1^mu),  da_2/dt = a_1^mu (alpha - beta a_2 a_1^mu)
    """
    a1, a2 = state
    error = moments.alpha - moments.beta * a2 * a1**mu
    return c * mu * a1 ** (mu - 1) * error, a1**mu * error


def power_srbp_without_derivative(state: Any, moments: Moments, c: Any, mu: Any) -> Any:
    """SRBP for O = a_2 (a_1 I)^mu, without the derivative of the activation (Eq. 113).

    da_1/dt = c (gamma - delta a_2 a_1^mu),  da_2/dt = a_1^mu (alpha - beta a_2 a_1^mu)
    """
    a1, a2 = state
    return c * (moments.gamma - moments.delta * a2 * a1**mu), a1**mu * (moments.alpha - moments.beta * a2 * a1**mu)


def power_gradient_descent(state: Any, moments: Moments, mu: Any) -> Any:
    """Gradient descent: `power_srbp` with a_2 instead of c (Eq. 119)."""
    return power_srbp(state, moments, state[1], mu)


def power_limit(start: tuple[float, float], moments: Moments, c: float, mu: float) -> np.ndarray:
    """The fixed point (a_1, a_2) from a_1(0) > 0, for alpha, beta, c > 0 (Theorem 12).

    It solves a_2 = a_1^2 / (2 c mu) + K (Eq. 115) and a_2 a_1^mu = alpha / beta: one positive root for every K. For
    mu = p/q, u = a_1^(1/q) is a root of a polynomial of degree p + 2q. (If a_1(0) = 0 and mu > 1, nothing changes.)
    """
    k = start[1] - start[0] ** 2 / (2 * c * mu)
    a1 = _positive_power_root({2: 1 / (2 * c * mu), 0: k}, mu, moments.alpha / moments.beta)
    return np.array([a1, a1**2 / (2 * c * mu) + k])


def power_gradient_limit(start: tuple[float, float], moments: Moments, mu: float) -> np.ndarray:
    """The fixed point (a_1, a_2) of gradient descent from positive weights: a_1^2 - mu a_2^2 is constant."""
    k = start[0] ** 2 - mu * start[1] ** 2
    s = _positive_power_root({1: 1 / mu, 0: -k / mu}, mu, (moments.alpha / moments.beta) ** 2)
    return np.sqrt([s, (s - k) / mu])


def _positive_power_root(terms: dict[int, float], mu: float, value: float) -> float:
    """The positive root a of a^mu sum_n terms[n] a^n = value."""
    ratio = Fraction(mu).limit_denominator(12)
    p, q = ratio.numerator, ratio.denominator
    coefficients = np.zeros(p + q * max(terms) + 1)
    for n, coefficient in terms.items():
        coefficients[p + q * n] = coefficient
    coefficients[0] -= value
    return float(real_roots(Polynomial(coefficients)).max() ** q)


def power_fate_without_derivative(moments: Moments, c: float) -> tuple[float, float]:
    """The limits of (da_1/dt, w = a_2 a_1^mu) without the derivative, from positive weights, for c > 0.

    There is no fixed point unless alpha / beta = gamma / delta (after Eq. 113). The paper says no more. We add:
    gamma / delta < alpha / beta: a_1 falls to 0, a_2 grows without limit, and w goes to gamma / delta, not the optimum;
    gamma / delta > alpha / beta: a_1 grows without limit, at last linearly, and w goes to the optimum alpha / beta.
    """
    best, other = moments.alpha / moments.beta, moments.gamma / moments.delta
    return (0.0, other) if other < best else (c * moments.delta * (other - best), best)
