"""Dual propagation as a relaxation, and its fixed-point iteration in closed form (section 4, appendices D, E and G).

Hoier, Zach: Two tales of single-phase contrastive Hebbian learning, 2024.

A network is a nested minimisation, s_k = argmin E_k(s_k, s_{k-1}), with a loss on top (Eq. 11). ~alpha is 1 - alpha.

    AROVR   J = min_{s+} max_{s-} alpha l(s+) + ~alpha l(s-) + (E(s+) - E(s-)) / beta        (Eq. 15)
    SPROVR  J = min_{s+} max_{s-} l(alpha s+ + ~alpha s-)    + (E(s+) - E(s-)) / beta        (Eq. 10)
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# ------------------------------------------------------------------------------- one level: Propositions 4.1 and 4.2


def arovr(loss: np.ndarray, energy: np.ndarray, alpha: float, beta: float) -> Any:
    """Eq. 15 over a finite set of states, from the loss and energy [..., states] of each state.

    The minimum and the maximum are independent. The proofs of Propositions 4.1 and 4.2 use only that s+ and s- are
    optimal, so they hold for any set of states and any numbers.
    """
    return (alpha * loss + energy / beta).min(-1) - (energy / beta - (1 - alpha) * loss).min(-1)


def sprovr(loss: Callable[[Any], Any], states: np.ndarray, energy: np.ndarray, alpha: float, beta: float) -> Any:
    """Eq. 10 over a finite set of real states [n] with energies [n]: min over s+ of max over s-.

    It is at most AROVR if the loss is convex, and equal to AROVR for alpha 0 and 1 (after Proposition 4.2).
    """
    value = loss(alpha * states[:, None] + (1 - alpha) * states) + (energy[:, None] - energy) / beta
    return value.max(1).min(0)


def adversarial(loss: np.ndarray, energy: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """l(s*), s* = argmin E - ~alpha beta l [..., states] (Eq. 13). AROVR is a relaxation of it: at most l(s*)."""
    worst = (energy - (1 - alpha) * beta * loss).argmin(-1)
    return np.take_along_axis(loss, worst[..., None], -1)[..., 0]


# ------------------------------------------------------------------------------------------ many levels: Corollary 4.3


def layer_energy(weight: Any, potential: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """E(s, below) = G(s) - s . (below W), weight [in, out]; its minimum is f(below W), f = (G')^-1 (after Eq. 1)."""
    return lambda s, below: potential(s) - s @ (below @ weight)


POTENTIALS: dict[str, Callable[[Any], Any]] = {  # the potential G for each activation f
    "identity": lambda s: 0.5 * (s**2).sum(),
    "tanh": lambda s: (s * jnp.arctanh(s) + 0.5 * jnp.log1p(-(s**2))).sum(),
    "sigmoid": lambda s: (s * jnp.log(s) + (1 - s) * jnp.log1p(-s)).sum(),
}


def dp_objective(
    loss: Callable, energies: Sequence[Callable], plus: Sequence, minus: Sequence, inputs: Any, alpha: Any, beta: Any
) -> Any:
    """L^DP before the minimum and maximum (Eq. 1).

    alpha l(s+_L) + ~alpha l(s-_L) + sum_k (E_k(s+_k, sbar_{k-1}) - E_k(s-_k, sbar_{k-1})) / beta

    Args:
      loss: a function of the outputs [N_L].
      energies: the functions E_k(s_k, s_{k-1}), k = 1 ... L.
      plus, minus: s+_k and s-_k [N_k], k = 1 ... L.
      inputs: s_0 [N_0].
      alpha, beta: numbers.
    """
    mean = [inputs, *(alpha * p + (1 - alpha) * m for p, m in zip(plus, minus, strict=True))]
    gaps = [e(p, below) - e(m, below) for e, p, m, below in zip(energies, plus, minus, mean[:-1], strict=True)]
    return alpha * loss(plus[-1]) + (1 - alpha) * loss(minus[-1]) + sum(gaps) / beta


def arovr_step(objective: Callable, energy: Callable, plus: Any, minus: Any, alpha: Any, beta: Any) -> Callable:
    """Relax the level s of objective(s) by AROVR (Eq. 15): a function of the level below."""
    outer = alpha * objective(plus) + (1 - alpha) * objective(minus)
    return lambda below: outer + (energy(plus, below) - energy(minus, below)) / beta


def sprovr_step(objective: Callable, energy: Callable, plus: Any, minus: Any, alpha: Any, beta: Any) -> Callable:
    """Relax the level s of objective(s) by SPROVR (Eq. 10): a function of the level below."""
    outer = objective(alpha * plus + (1 - alpha) * minus)
    return lambda below: outer + (energy(plus, below) - energy(minus, below)) / beta


def relaxed_from_outermost(
    loss: Callable, energies: Sequence[Callable], plus: Sequence, minus: Sequence, inputs: Any, alpha: Any, beta: Any
) -> Any:
    """AROVR at the outermost level, SPROVR at all others. By Corollary 4.3 this is `dp_objective`."""
    objective, step = loss, arovr_step
    for energy, p, m in reversed(list(zip(energies, plus, minus, strict=True))):
        objective, step = step(objective, energy, p, m, alpha, beta), sprovr_step
    return objective(inputs)


# -------------------------------------------------------------------------- the iteration in closed form: appendix G


class Quadratic(NamedTuple):
    """min l(y), y = argmin F(y) - y^t W z, z = argmin G(z) - z^t x, with quadratic l, F and G (Eq. 51, 52).

    l = y^t H_l y / 2 + b_l^t y, and it includes beta. F has h_f and b_f, G has h_g and b_g. Shapes: y [n], z [m],
    weight W [n, m].
    """

    h_l: np.ndarray
    b_l: np.ndarray
    h_f: np.ndarray
    b_f: np.ndarray
    h_g: np.ndarray
    b_g: np.ndarray
    weight: np.ndarray
    x: np.ndarray


def random_quadratic(seed: int, n: int = 4, m: int = 6, *, beta: float = 0.5, scale: float = 1.0) -> Quadratic:
    """H_F and H_G are positive definite and near Id, H_l is near beta Id, and `scale` is the spectral norm of W."""
    rng = np.random.default_rng(seed)

    def definite(size: int) -> np.ndarray:
        a = rng.normal(size=(size, size)) / np.sqrt(size)
        return 0.8 * np.eye(size) + 0.2 * a @ a.T

    weight = rng.normal(size=(n, m))
    weight *= scale / np.linalg.norm(weight, 2)
    h_l, h_f, h_g = beta * definite(n), definite(n), definite(m)
    b_l, b_f, b_g, x = (rng.normal(size=size) for size in (n, n, m, m))
    return Quadratic(h_l, b_l, h_f, b_f, h_g, b_g, weight, x)


def arovr_outputs(q: Quadratic, alpha: float, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y+ and y- under AROVR: argmin alpha l + F - y^t W z and argmin -~alpha l + F - y^t W z (Eq. 54)."""

    def minimiser(step):
        return np.linalg.solve(q.h_f + step * q.h_l, q.weight @ z - q.b_f - step * q.b_l)

    return minimiser(alpha), minimiser(alpha - 1)


def sprovr_outputs(q: Quadratic, alpha: float, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y+ and y- under SPROVR: the solution of the two stationarity conditions of Eq. 64."""
    down = 1 - alpha
    system = np.block(
        [[alpha * alpha * q.h_l + q.h_f, alpha * down * q.h_l], [down * alpha * q.h_l, down * down * q.h_l - q.h_f]]
    )
    drive = q.weight @ z - q.b_f
    plus, minus = np.split(np.linalg.solve(system, np.concatenate([drive - alpha * q.b_l, -drive - down * q.b_l])), 2)
    return plus, minus


def arovr_signal(q: Quadratic, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """M [n, n] and v [n] of y+ - y- = M W z + v under AROVR: v = -M b_F - M' b_l (Eq. 55 to 59, signs corrected).

    M = -(H_F + alpha H_l)^-1 H_l (H_F - ~alpha H_l)^-1 (Eq. 58) and M' = alpha (H_F + alpha H_l)^-1 + ~alpha (H_F -
    ~alpha H_l)^-1 = (H_F + alpha H_l)^-1 H_F (H_F - ~alpha H_l)^-1. The paper has a minus between the two terms of M'.
    """
    lower, upper = np.linalg.inv(q.h_f + alpha * q.h_l), np.linalg.inv(q.h_f - (1 - alpha) * q.h_l)
    m = -lower @ q.h_l @ upper
    return m, -m @ q.b_f - lower @ q.h_f @ upper @ q.b_l


def sprovr_signal(q: Quadratic, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """M and v of y+ - y- = M W z + v under SPROVR (Eq. 68, 69): M = -H_F^-1 H_l ((2 alpha - 1) H_l + H_F)^-1."""
    tilt = 2 * alpha - 1
    m = -np.linalg.solve(q.h_f, q.h_l @ np.linalg.inv(tilt * q.h_l + q.h_f))
    return m, -m @ (tilt * q.b_l + q.b_f) - np.linalg.solve(q.h_f, q.b_l)


def signal_strength(alpha: float, beta: float) -> tuple[float, float]:
    """|M| for H_F = I, H_l = beta I: (AROVR, SPROVR); SPROVR <= AROVR if beta < 1 / ~alpha (Eq. 60, 70)."""
    return beta / ((1 + alpha * beta) * (1 - (1 - alpha) * beta)), beta / (1 + (2 * alpha - 1) * beta)


def iterate(q: Quadratic, outputs: Callable, alpha: float, inner: float, steps: int) -> np.ndarray:
    """zbar [steps + 1, m], from the clean z. A step: y+, y- = outputs(q, alpha, zbar), then z+ and z- (Eq. 61).

    z+ = g(x + alpha' W^t (y+ - y-)), z- = g(x - ~alpha' W^t (y+ - y-)), g(a) = H_G^-1 (a - b_G), and
    zbar = alpha' z+ + ~alpha' z-, with alpha' = `inner`.
    """
    path = [np.linalg.solve(q.h_g, q.x - q.b_g)]
    for _ in range(steps):
        plus, minus = outputs(q, alpha, path[-1])
        down = q.weight.T @ (plus - minus)
        high, low = (np.linalg.solve(q.h_g, q.x - q.b_g + step * down) for step in (inner, inner - 1))
        path.append(inner * high + (1 - inner) * low)
    return np.array(path)


def fixed_point(q: Quadratic, signal: tuple[np.ndarray, np.ndarray], inner: float) -> np.ndarray:
    """The solution zbar [m] of zbar = H_G^-1 (x - b_G + (2 alpha' - 1) W^t (M W zbar + v)) (Eq. 62, 72)."""
    m, v = signal
    tilt = 2 * inner - 1
    return np.linalg.solve(q.h_g - tilt * q.weight.T @ m @ q.weight, q.x - q.b_g + tilt * q.weight.T @ v)


def contraction(q: Quadratic, signal: tuple[np.ndarray, np.ndarray], inner: float) -> float:
    """The factor by which the last iterations change the distance to the fixed point: spectral radius (Eq. 62, 72).

    It is 0 for alpha' = 1/2 and any weights. Otherwise it is proportional to |W|^2. Above 1, the iteration diverges.
    """
    step = (2 * inner - 1) * np.linalg.solve(q.h_g, q.weight.T @ signal[0] @ q.weight)
    return float(np.abs(np.linalg.eigvals(step)).max())


def network_gradient(
    lower: np.ndarray, upper: np.ndarray, x: np.ndarray, targets: np.ndarray, alpha: float, beta: float
) -> tuple[np.ndarray, np.ndarray]:
    """The weight gradients of dual propagation in a linear network O = x A B with half squared error, in closed form.

    This is appendix G with H_F = H_G = Id, H_l = beta Id, b_l = -beta y and alpha' = alpha. A gradient is the mean of
    -(s+ - s-) sbar^t / beta over the batch. Shapes: A [in, hidden], B [hidden, out], x [batch, in], targets
    [batch, out].
    """
    n, m = upper.shape[1], upper.shape[0]
    gradients = np.zeros_like(lower), np.zeros_like(upper)
    for inputs, target in zip(x, targets, strict=True):
        q = Quadratic(
            beta * np.eye(n), -beta * target, np.eye(n), np.zeros(n), np.eye(m), np.zeros(m), upper.T, inputs @ lower
        )
        m_matrix, v = signal = arovr_signal(q, alpha)
        z = fixed_point(q, signal, alpha)
        difference = m_matrix @ upper.T @ z + v
        gradients[0][...] -= np.outer(inputs, upper @ difference) / beta / len(x)
        gradients[1][...] -= np.outer(z, difference) / beta / len(x)
    return gradients


SIGNALS = {"AROVR": (arovr_outputs, arovr_signal), "SPROVR": (sprovr_outputs, sprovr_signal)}
