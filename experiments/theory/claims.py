"""The theorems as measurements: each function in `CLAIMS` takes seeds and returns its checks."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.theory import backman, dual_propagation, rbp_dynamics
from experiments.theory.check import Check
from experiments.theory.rbp_dynamics import Problem

RBP, BACKMAN, DP = "random backpropagation", "BackMAN", "dual propagation"
Seeds = Sequence[int]


def distance(a, b) -> float:
    """The largest difference of two tuples of arrays, relative to the largest entry of the second, or to 1."""
    difference = max(float(np.abs(np.subtract(x, y)).max()) for x, y in zip(a, b, strict=True))
    return difference / max(1.0, max(float(np.abs(y).max()) for y in b))


def drift(path: np.ndarray) -> float:
    """The largest change of an entry along a path [T, ...], relative to the largest entry, or to 1."""
    return float(np.ptp(path, axis=0).max() / max(1.0, np.abs(path).max()))


# ----------------------------------------------------------------------------------------------- random backpropagation


def one_dimension(seeds: Seeds) -> list[Check]:
    """Theorem 1: the roots of a cubic flow predict its limit, or that it diverges."""
    wrong, worst, source = 0, 0.0, f"{RBP}, Theorem 1"
    for seed in seeds:
        rng = np.random.default_rng(seed)
        for sign in (-1, 1):
            coefficients = np.array([*rng.normal(size=3), sign * 0.5])
            start = rng.normal()
            end = rbp_dynamics.limit(np.polynomial.Polynomial(coefficients), start)
            try:
                reached = rbp_dynamics.integrate(rbp_dynamics.polynomial_flow, start, coefficients).last
            except RuntimeError:
                wrong += np.isfinite(end)
            else:
                wrong += not np.isfinite(end)
                worst = max(worst, abs(float(reached) - end))
    return [
        Check(source, "number of flows with a wrong prediction (last case corrected)", wrong, most=0.5),
        Check(source, "distance of the limit from the predicted root", worst, most=1e-6),
    ]


def chains(seeds: Seeds, depths: Sequence[int] = (2, 3, 4, 5)) -> list[Check]:
    """Theorems 2 to 4, and gradient descent from positive weights."""
    found = []
    for depth in depths:
        gap, error, varied, descent = [], [], [], []
        for seed in seeds:
            rng = np.random.default_rng([seed, depth])
            start, c = rng.normal(size=depth), rng.normal(size=depth - 1)
            problem = rbp_dynamics.chain_problem(start, c)
            flow = rbp_dynamics.integrate(rbp_dynamics.srbp, *problem)
            path = np.stack([w[:, 0, 0] for w in flow.states], -1)
            gap.append(distance([path[-1]], [rbp_dynamics.chain_limit(start, c)]))
            error.append(abs(1 - path[-1].prod()))
            varied.append(drift(rbp_dynamics.chain_couplings(path, c)))
            weights = rbp_dynamics.as_chain(np.abs(start))
            flow = rbp_dynamics.integrate(rbp_dynamics.gradient_descent, weights, problem.ti, problem.ii)
            descent.append(distance([np.ravel(flow.last)], [rbp_dynamics.chain_gradient_limit(np.abs(start))]))
        source = f"{RBP}, Theorem {min(depth, 4)}, {depth} layers"
        found += [
            Check(source, f"distance from the root of degree {2**depth - 1}", max(gap), most=1e-5),
            Check(source, "alpha - beta P in the limit", max(error), most=1e-7),
            Check(source, "drift of a_(i+1) - c_(i+1) a_i^2 / 2 c_i", max(varied), most=1e-7),
            Check(source, "gradient descent: distance from its root", max(descent), most=1e-7),
        ]
    return found


def attractors(seeds: Seeds) -> list[Check]:
    """Theorem 2: fixed points inside the parabola a_2 = -a_1^2 / c_1 repel, others attract (alpha = beta = c_1 = 1)."""
    moved: dict[bool, list[float]] = {True: [], False: []}
    rates, source = [], f"{RBP}, Theorem 2"
    for a1 in (-0.5, -0.7, -1.3, -2.0, 0.5, 2.0):
        fixed = np.array([a1, 1 / a1])
        slope = rbp_dynamics.chain_slope(fixed, [1.0])
        problem = rbp_dynamics.chain_problem(fixed + [1e-4, 0.0], [1.0])
        flow = rbp_dynamics.integrate(rbp_dynamics.srbp, *problem, until=50.0)
        moved[slope > 0].append(float(np.abs(np.ravel(flow.last) - fixed).max()))
        w = 1 - np.prod([w[:, 0, 0] for w in flow.states], 0)  # alpha - beta P, called w in Eq. 33
        early = np.searchsorted(flow.times, 0.1)
        rates.append(abs(np.log(w[early] / w[0]) / flow.times[early] / -slope - 1))
    return [
        Check(source, "outside the parabola: final distance after a displacement of 1e-4", max(moved[True]), most=1e-3),
        Check(source, "inside the parabola: the same distance", min(moved[False]), least=0.1),
        Check(f"{RBP}, Eq. 33", "relative error of the linear rate", max(rates), most=1e-2),
    ]


def expansive(seeds: Seeds, hidden: int = 4) -> list[Check]:
    """Theorem 5: the limit in A[1,N,1]."""
    gap, varied, descent = [], [], []
    for seed in seeds:
        problem = rbp_dynamics.random_problem(seed, (1, hidden, 1))
        flow = rbp_dynamics.integrate(rbp_dynamics.srbp, *problem)
        gap.append(distance(flow.last, rbp_dynamics.expansive_limit(problem)))
        varied.append(drift(rbp_dynamics.coupling(flow.states, problem.feedback)))
        descent.append(_gradient_descent_excess(problem, hidden))
    source = f"{RBP}, Theorem 5, A[1,{hidden},1]"
    return [
        Check(source, "distance from the cubic's root", max(gap), most=1e-7),
        Check(source, "drift of C A_2 + (C A_2)^t - A_1 A_1^t", max(varied), most=1e-7),
        Check(source, "gradient descent: error above the least", max(descent), most=1e-7),
    ]


def compressive(seeds: Seeds, size: int = 4) -> list[Check]:
    """Lemma 1 and Theorem 6: A[N,1,N] as an autoencoder, with any data, and from negative multiples of C."""
    same, general, goal, varied, above, line, back = [], [], [], [], [], [], []
    for seed in seeds:
        problem = rbp_dynamics.random_problem(seed, (size, 1, size))
        eye = np.eye(size)
        autoencoder = Problem(problem.weights, problem.feedback, eye, eye)
        flow = rbp_dynamics.integrate(rbp_dynamics.srbp, *autoencoder)
        same.append(distance(flow.last, rbp_dynamics.compressive_limit(autoencoder)))
        c = problem.feedback[0]
        goal.append(distance([rbp_dynamics.product(flow.last)], [c.T @ c / (c**2).sum()]))
        varied.append(drift(rbp_dynamics.coupling(flow.states, problem.feedback)))
        flow = rbp_dynamics.integrate(rbp_dynamics.srbp, *problem)
        general.append(distance(flow.last, rbp_dynamics.compressive_limit(problem)))
        above.append(_excess(problem, flow, 1) / rbp_dynamics.best_excess_error(problem.ti, problem.ii, 1))
        # A(0) = -3 C, and K is low enough for two negative roots. C is along an axis, so rounding keeps A on it.
        axis = np.eye(1, size)
        weights = -3.0 * axis, -2.0 * axis.T + 0.1 * np.random.default_rng(seed).normal(size=(size, 1))
        on_line = Problem(weights, (axis,), eye, eye)
        flow = rbp_dynamics.integrate(rbp_dynamics.srbp, *on_line, until=50.0)
        line.append(max(distance(flow.last, rbp_dynamics.compressive_line_limit(on_line)), flow.last[0][0, 0]))
        beside = Problem((weights[0] + 1e-6 * np.eye(1, size, 1), weights[1]), (axis,), eye, eye)
        flow = rbp_dynamics.integrate(rbp_dynamics.srbp, *beside)
        back.append(distance(flow.last, rbp_dynamics.compressive_limit(beside)))
    source = f"{RBP}, Theorem 6, A[{size},1,{size}]"
    return [
        Check(f"{RBP}, Lemma 1", "twice the drift of C B - A A^t / 2", max(varied), most=1e-7),
        Check(source, "autoencoder: distance from the cubic's root", max(same), most=1e-7),
        Check(source, "autoencoder: distance of P from C^t C / C C^t", max(goal), most=1e-7),
        Check(source, "any S_TI, S_II: distance from the cubic's root (added)", max(general), most=1e-6),
        Check(source, "any S_TI, S_II: mean error / best of rank 1, minus 1 (added)", float(np.mean(above)), least=0.1),
        Check(source, "A(0) = -3 C: distance from a negative root (exception)", max(line), most=1e-7),
        Check(source, "close to that line: distance from the positive root", max(back), most=1e-6),
    ]


def three_layers(seeds: Seeds) -> list[Check]:
    """Theorems 7 and 8, the monotone quantity of Eq. 109, gradient descent; for a wide and a narrow hidden layer."""
    found = []
    for sizes in ((4, 6, 3), (4, 2, 3)):
        size, goal, varied, rising, excess, descent, tail = [], [], [], [], [], [], []
        for seed in seeds:
            problem = rbp_dynamics.random_problem(seed, sizes)
            (c,), ti, ii = problem.feedback, problem.ti, problem.ii
            flow = rbp_dynamics.integrate(rbp_dynamics.srbp, *problem)
            a1 = np.linalg.norm(flow.states[0], axis=(1, 2)).max()
            size.append(a1 / rbp_dynamics.lower_layer_bound(problem))
            away = c @ (rbp_dynamics.product(flow.states) - rbp_dynamics.optimum(ti, ii))
            gaps = (away**2).sum((1, 2))
            goal.append(np.sqrt(gaps[-1]))
            tail.append(np.trapezoid(gaps[-30:], flow.times[-30:]) / np.trapezoid(gaps, flow.times))
            varied.append(drift(rbp_dynamics.coupling(flow.states, problem.feedback)))
            v = rbp_dynamics.decreasing(flow.states, *problem[1:])
            rising.append(np.linalg.eigvalsh(np.diff(v, axis=0)).max())
            excess.append(_excess(problem, flow, sizes[1]))
            descent.append(_gradient_descent_excess(problem, sizes[1]))
        name = f"A[{','.join(map(str, sizes))}]"
        least = f"{RBP}, Theorem 8, {name}"
        found += [
            Check(f"{RBP}, Theorem 7, {name}", "largest norm of A_1, divided by its bound", max(size), most=1.0),
            Check(f"{RBP}, Eq. 92, {name}", "drift of C A_2 + (C A_2)^t - A_1 A_1^t", max(varied), most=1e-7),
            Check(least, "distance of C_1 A_2 A_1 from C_1 S_TI S_II^-1", max(goal), most=1e-6),
            Check(f"{RBP}, Eq. 105, {name}", "share of the integral in the last third of log t", max(tail), most=1e-6),
            Check(f"{RBP}, Eq. 109, {name}", "largest rise of the monotone quantity", max(rising), most=1e-8),
            Check(least, "gradient descent: error above the least", max(descent), most=1e-6),
        ]
        if sizes[1] >= sizes[2]:
            found.append(Check(least, "C_1 of full column rank: error above the least", max(excess), most=1e-7))
        else:  # C_1 P does not determine P
            mean = float(np.mean(excess))
            found.append(Check(least, "fewer neurons than outputs: mean error above the least", mean, least=1e-2))
    return found


def _excess(problem: Problem, flow: rbp_dynamics.Flow, rank: int) -> float:
    error = rbp_dynamics.excess_error(flow.last, problem.ti, problem.ii)
    return float(error - rbp_dynamics.best_excess_error(problem.ti, problem.ii, rank))


def _gradient_descent_excess(problem: Problem, rank: int) -> float:
    weights, _, ti, ii = problem
    return _excess(problem, rbp_dynamics.integrate(rbp_dynamics.gradient_descent, weights, ti, ii), rank)


def two_by_two(seeds: Seeds) -> list[Check]:
    """Theorem 10: A[2,2,2], with moments and feedback equal to Id."""
    eye = np.eye(2)
    speed, inverse, alone = [], [], []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        weights = tuple(rng.normal(size=(2, 2, 2)))
        flow = rbp_dynamics.integrate(rbp_dynamics.srbp, weights, (eye,), eye, eye)
        a, b = flow.last
        speed.append(max(np.abs(v).max() for v in rbp_dynamics.srbp(flow.last, (eye,), eye, eye)))
        inverse.append(np.abs(a @ b - eye).max())
        alone.append(rbp_dynamics.isolation(a))
    source = f"{RBP}, Theorem 10, A[2,2,2]"
    return [
        Check(source, "speed of A and B in the limit", max(speed), most=1e-7),
        Check(source, "distance of A B from Id", max(inverse), most=1e-7),
        Check(source, "the limit is isolated (Eq. 112): least singular value", min(alone), least=1e-3),
    ]


def power_law(seeds: Seeds, powers: Sequence[float] = (1, 2, 3, 1 / 3)) -> list[Check]:
    """Theorem 12 and section 7.9: O = a_2 (a_1 I)^mu, with and without the derivative of the activation."""
    gap, varied, descent = [], [], []
    grown: list[tuple[float, float, float]] = []
    shrunk: list[tuple[float, float, float]] = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        x = rng.uniform(0.2, 1.2, 50)
        for mu in powers:
            moments = rbp_dynamics.power_moments(x, 1.5 * x**mu + 0.1 * rng.normal(size=50), mu)
            start, c = (rng.uniform(0.3, 1.5), rng.uniform(-1, 1)), rng.uniform(0.5, 1.5)
            flow = rbp_dynamics.integrate(rbp_dynamics.power_srbp, start, moments, c, mu, until=200.0)
            gap.append(distance(flow.last, rbp_dynamics.power_limit(start, moments, c, mu)))
            varied.append(drift(flow.states[1] - flow.states[0] ** 2 / (2 * c * mu)))
            start = start[0], abs(start[1])
            flow = rbp_dynamics.integrate(rbp_dynamics.power_gradient_descent, start, moments, mu)
            descent.append(distance(flow.last, rbp_dynamics.power_gradient_limit(start, moments, mu)))
        for bend, until, fates in ((0.5, 50.0, grown), (-0.5, 1e4, shrunk)):  # gamma/delta > alpha/beta, then <
            moments = rbp_dynamics.power_moments(x, x**2 + bend * (1 - x), 2)
            field, arguments = rbp_dynamics.power_srbp_without_derivative, (moments, 1.0, 2.0)
            a1, a2 = rbp_dynamics.integrate(field, (0.5, 0.5), *arguments, until=until).last
            speed, w = rbp_dynamics.power_fate_without_derivative(moments, 1.0)
            fates.append((a1, abs(field((a1, a2), *arguments)[0] - speed), abs(a2 * a1**2 - w)))
    source, without = f"{RBP}, Theorem 12", f"{RBP}, Eq. 113"
    return [
        Check(source, "distance from the positive root of Eq. 117", max(gap), most=1e-6),
        Check(source, "drift of a_2 - a_1^2 / 2 c mu", max(varied), most=1e-7),
        Check(f"{RBP}, Eq. 119", "gradient descent: distance from its root", max(descent), most=1e-6),
        Check(without, "gamma/delta high: a_1 at t = 50 (added: no limit)", min(g[0] for g in grown), least=1.5),
        Check(without, "gamma/delta high: error of the predicted speed of a_1", max(g[1] for g in grown), most=1e-2),
        Check(without, "gamma/delta high: distance of w from the optimum", max(g[2] for g in grown), most=1e-2),
        Check(without, "gamma/delta low: a_1 at t = 10^4 (added: falls to 0)", max(s[0] for s in shrunk), most=0.3),
        Check(without, "gamma/delta low: distance of w from gamma/delta", max(s[2] for s in shrunk), most=1e-2),
    ]


# ------------------------------------------------------------------------------------------------------------- BackMAN

NETS: dict[str, Callable] = {"dense": backman.random_dense, "conv": backman.random_conv}


def backman_is_gradient_descent(seeds: Seeds) -> list[Check]:
    """Theorem 3.1; and Algorithm 1 gives the same updates as the rule of the library."""
    found = []
    for name, make in NETS.items():
        plain, library = [], []
        for seed in seeds:
            net, *problem = make(seed)
            with jax.enable_x64(True):
                weights, data = jax.tree.map(jnp.asarray, problem)
                gradient = backman.gradient(net, weights, data)
                plain.append(distance(backman.updates(net, weights, data, None)[1], [-g for g in gradient]))
                gradient = backman.library_gradient(net, weights, data, 0.1)
                library.append(distance(backman.updates(net, weights, data, 0.1)[1], [-g for g in gradient]))
        found += [
            Check(f"{BACKMAN}, Theorem 3.1, {name}", "c = 1: distance from gradient descent", max(plain), most=1e-12),
            Check(f"{BACKMAN}, Algorithm 1, {name}", "distance from lrules.backman(0.1)", max(library), most=1e-12),
        ]
    return found


def best_responses(seeds: Seeds, alpha: float = 1e-4) -> list[Check]:
    """Theorems 3.2 and 3.3, with g frozen and with g responding."""
    found = []
    for name, make in NETS.items():
        frozen, responding = [], []
        for seed in seeds:
            net, weights, data = make(seed)
            frozen += [backman.best_responses(net, weights, data, alpha, layer) for layer in range(len(weights))]
            responding.append(backman.best_responses(net, weights, data, alpha, 0, responding=True))
        source = f"{BACKMAN}, Theorem {'3.2' if name == 'dense' else '3.3'}, {name}, alpha = {alpha:g}"
        least = min(r.cosine.min() for r in frozen)
        length = max(np.abs(r.length - 1).max() for r in frozen)
        mean = float(np.mean(np.concatenate([r.cosine for r in responding])))
        found += [
            Check(source, "g frozen: least cosine of best response and update", least, least=1 - 1e-3),
            Check(source, "g frozen: ratio of their lengths, minus 1", length, most=1e-3),
            Check(source, "g responding: mean cosine (the theorem does not hold)", mean, most=0.99),
        ]
    return found


# ---------------------------------------------------------------------------------------------------- dual propagation


def relaxations(seeds: Seeds, trials: int = 2000, states: int = 40) -> list[Check]:
    """Propositions 4.1 (corrected) and 4.2, and the order of AROVR, SPROVR and the adversarial loss."""
    arovr = dual_propagation.arovr
    worst: dict[str, list[float]] = {}

    def note(name: str, violation) -> None:
        worst.setdefault(name, []).append(float(np.max(violation)))

    for seed in seeds:
        rng = np.random.default_rng(seed)
        energy = rng.exponential(size=(trials, states))
        loss = rng.normal(size=(trials, states)) - 1
        low, high = np.sort(rng.uniform(size=2))
        small, large = np.sort(rng.uniform(0.1, 2, size=2))
        by_alpha = arovr(loss, energy, low, small), arovr(loss, energy, high, small)
        note("a", by_alpha[1] - by_alpha[0])
        note("a printed", by_alpha[0] - by_alpha[1])
        positive = loss - loss.min(-1, keepdims=True)
        note("b", small * arovr(positive, energy, low, small) - large * arovr(positive, energy, low, large))
        note("b any sign", small * arovr(loss, energy, low, small) - large * arovr(loss, energy, low, large))
        step = rng.uniform(0, small)  # (1 - alpha) beta, equal for both values of beta
        note("4.2", arovr(loss, energy, 1 - step / large, large) - arovr(loss, energy, 1 - step / small, small))
        note("adversarial", arovr(loss, energy, low, large) - dual_propagation.adversarial(loss, energy, low, large))
        s = np.sort(rng.normal(size=states))
        for alpha in (0.0, low, high, 1.0):
            gap = dual_propagation.sprovr(np.square, s, energy[0], alpha, small) - arovr(s**2, energy[0], alpha, small)
            note("convex" if alpha in (low, high) else "same", gap if alpha in (low, high) else abs(gap))
    measured = {name: max(values) for name, values in worst.items()}
    exact = 1e-12
    return [
        Check(f"{DP}, Prop. 4.1 (a)", "rise of J with alpha (corrected: it falls)", measured["a"], most=exact),
        Check(f"{DP}, Prop. 4.1 (a)", "fall of J with alpha (printed: none)", measured["a printed"], least=0.1),
        Check(f"{DP}, Prop. 4.1 (b)", "fall of beta J with beta, loss >= 0", measured["b"], most=exact),
        Check(f"{DP}, Prop. 4.1 (b)", "the same, loss of any sign (needs >= 0)", measured["b any sign"], least=0.1),
        Check(f"{DP}, Prop. 4.2", "excess of J(beta) over J(beta' < beta), same step", measured["4.2"], most=exact),
        Check(f"{DP}, Eq. 13 to 15", "excess of AROVR over the adversarial loss", measured["adversarial"], most=exact),
        Check(f"{DP}, section 4.3", "excess of SPROVR over AROVR, convex loss", measured["convex"], most=exact),
        Check(f"{DP}, section 4.3", "their difference at alpha 0 and 1", measured["same"], most=exact),
    ]


def corollary(seeds: Seeds, sizes: Sequence[int] = (4, 6, 5, 3)) -> list[Check]:
    """Corollary 4.3: AROVR at the outermost level and SPROVR below it give the DP objective."""
    worst = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        with jax.enable_x64(True):
            weights = [jnp.asarray(rng.normal(size=s)) for s in zip(sizes, sizes[1:], strict=False)]
            energies = [dual_propagation.layer_energy(w, dual_propagation.POTENTIALS["tanh"]) for w in weights]
            plus, minus = ([jnp.asarray(rng.uniform(-0.9, 0.9, n)) for n in sizes[1:]] for _ in range(2))
            arguments = (
                functools.partial(_half_square, jnp.asarray(rng.normal(size=sizes[-1]))),
                energies, plus, minus, jnp.asarray(rng.normal(size=sizes[0])), rng.uniform(), rng.uniform(0.1, 1),
            )  # fmt: skip
            direct = dual_propagation.dp_objective(*arguments)
            worst.append(abs(float(direct - dual_propagation.relaxed_from_outermost(*arguments))))
    return [Check(f"{DP}, Corollary 4.3", "difference: nested relaxations and Eq. 1", max(worst), most=1e-12)]


def _half_square(target, s):
    return 0.5 * ((s - target) ** 2).sum()


def closed_forms(seeds: Seeds) -> list[Check]:
    """Appendix G: the error signal, the fixed point, and the rate of the iteration."""
    found = []
    for name, (outputs, signal) in dual_propagation.SIGNALS.items():
        affine, end, rate, half = [], [], [], []
        for seed in seeds:
            z = np.random.default_rng(seed).normal(size=6)
            for alpha in (0.0, 0.3, 0.5, 1.0):
                q = dual_propagation.random_quadratic(seed, beta=0.3, scale=0.8)
                m, v = signal(q, alpha)
                plus, minus = outputs(q, alpha, z)
                affine.append(distance([plus - minus], [m @ q.weight @ z + v]))
                for inner in (0.0, 0.25, 1.0):
                    path = dual_propagation.iterate(q, outputs, alpha, inner, 400)
                    end.append(distance([path[-1]], [dual_propagation.fixed_point(q, (m, v), inner)]))
                strong = dual_propagation.random_quadratic(seed, beta=0.3, scale=6.0)
                path = dual_propagation.iterate(strong, outputs, alpha, 0.5, 3)
                strong_signal = signal(strong, alpha)
                half.append(distance([path[-1]], [dual_propagation.fixed_point(strong, strong_signal, 0.5)]))
                path = dual_propagation.iterate(strong, outputs, alpha, 1.0, 60)
                steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
                rate.append(abs(steps[-1] / steps[-2] / dual_propagation.contraction(strong, strong_signal, 1.0) - 1))
        numbers = "58, 59" if name == "AROVR" else "68, 69"
        source = f"{DP}, appendix G, {name}"
        found += [
            Check(source, f"distance of y+ - y- from M W z + v (Eq. {numbers}, corrected)", max(affine), most=1e-10),
            Check(source, "alpha' = 0, 1/4, 1: distance of the iteration from the closed form", max(end), most=1e-8),
            Check(source, "alpha' = 1/2, |W| = 6: the same after three steps", max(half), most=1e-10),
            Check(source, "alpha' = 1, |W| = 6: relative error of the rate of divergence", max(rate), most=1e-3),
        ]
    return found


CLAIMS: dict[str, Callable[[Seeds], list[Check]]] = {
    claim.__name__: claim
    for claim in (
        one_dimension,
        chains,
        attractors,
        expansive,
        compressive,
        three_layers,
        two_by_two,
        power_law,
        backman_is_gradient_descent,
        best_responses,
        relaxations,
        corollary,
        closed_forms,
    )
}
