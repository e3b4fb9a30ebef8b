"""Figures of the theory. Each function returns a figure to save or show, and does not change the state of pyplot."""

import numpy as np
from matplotlib.figure import Figure

from experiments.plots import COLOURS
from experiments.theory import backman, dual_propagation, rbp_dynamics

STARTS = (-2.8, 2.5), (-1.0, -2.9), (-0.1, -2.5), (-2.4, -0.8), (1.0, -2.5), (2.7, 2.6), (-0.5, 0.7)  # (a_1, a_2)


def vector_field() -> Figure:
    """Figure 11 of Baldi, Sadowski, Lu: A[1,1,1] with c_1 = alpha = beta = 1; solutions with their predicted limits."""
    figure = Figure(figsize=(7.2, 6.2), dpi=130, layout="constrained")
    axis = figure.subplots()
    reach = 3.0
    a1, a2 = np.meshgrid(*2 * [np.linspace(-reach, reach, 31)])
    error = 1 - a1 * a2
    size = np.hypot(error, a1 * error) + 1e-9
    dp = (a1**2 + a2) * error
    arrows = axis.quiver(
        a1, a2, error / size, a1 * error / size, np.arcsinh(dp), cmap="coolwarm", clim=(-3, 3), scale=42, width=0.0028
    )
    figure.colorbar(arrows, label="arcsinh(dP/dt)", shrink=0.8)
    for side in (-1, 1):
        x = side * np.linspace(1 / reach, reach, 200)
        stable = np.where(x**2 + 1 / x > 0, 1 / x, np.nan)
        axis.plot(x, stable, color="black", linewidth=2, label="attracting fixed points" if side > 0 else None)
        if side < 0:
            unstable = np.where(x**2 + 1 / x < 0, 1 / x, np.nan)
            axis.plot(x, unstable, color="black", linewidth=2, linestyle=":", label="repelling fixed points")
    x = np.linspace(-np.sqrt(reach), np.sqrt(reach), 200)
    axis.plot(x, -(x**2), color="0.45", linestyle="--", label="$a_2 = -a_1^2/c_1$")
    for i, start in enumerate(STARTS):
        problem = rbp_dynamics.chain_problem(start, [1.0])
        flow = rbp_dynamics.integrate(rbp_dynamics.srbp, *problem, until=50.0, points=2000)
        axis.plot(*(w[:, 0, 0] for w in flow.states), color=COLOURS[2], label=None if i else "solutions")
        axis.plot(*start, ".", color=COLOURS[2])
        end = rbp_dynamics.chain_limit(start, [1.0])
        axis.plot(*end, "o", markerfacecolor="none", color=COLOURS[2], label=None if i else "predicted limits")
    axis.set(xlabel="$a_1$", ylabel="$a_2$", xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axis.set_title("Random backpropagation in A[1,1,1], $c_1 = \\alpha = \\beta = 1$", fontsize="medium")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    return figure


def linear_dynamics(seeds: int = 3) -> Figure:
    """Error above the best of the network's rank, over time, for random backpropagation and gradient descent."""
    figure = Figure(figsize=(11, 5.4), dpi=130, layout="constrained")
    panels = [(1,) * 3, (1,) * 4, (1,) * 6, (1, 4, 1), (4, 1, 4), (4, 6, 3), (4, 2, 3), (2, 2, 2)]
    for axis, sizes in zip(figure.subplots(2, 4, sharex=True, sharey=True).flat, panels, strict=True):
        best = "" if min(sizes[1:-1]) >= min(sizes[0], sizes[-1]) else " (best rank subtracted)"
        for seed in range(seeds):
            problem = rbp_dynamics.random_problem(seed, sizes)
            weights, _, ti, ii = problem
            least = rbp_dynamics.best_excess_error(ti, ii, min(sizes))
            for name, line, field, arguments in (
                ("random backpropagation", "-", rbp_dynamics.srbp, problem),
                ("gradient descent", "--", rbp_dynamics.gradient_descent, (weights, ti, ii)),
            ):
                flow = rbp_dynamics.integrate(field, *arguments)
                error = rbp_dynamics.excess_error(flow.states, ti, ii) - least
                label = name if seed == 0 and axis.get_subplotspec().is_first_col() else None
                axis.plot(flow.times[1:], np.maximum(error[1:], 1e-12), line, color=COLOURS[seed], label=label)
        axis.set(xscale="log", yscale="log", ylim=(1e-9, 30), xlim=(5e-3, 500))
        axis.set_title(f"A[{','.join(map(str, sizes))}]{best}", fontsize="small")
        axis.grid(alpha=0.3)
        if axis.get_subplotspec().is_last_row():
            axis.set(xlabel="time")
    figure.supylabel("error above the least", fontsize="medium")
    figure.suptitle("Linear networks, averaged dynamics; one colour for each random start and task", fontsize="medium")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    return figure


def power_law() -> Figure:
    """O = a_2 (a_1 I)^2, with and without the derivative, for gamma/delta above and below alpha/beta (section 7.9)."""
    figure = Figure(figsize=(11, 4.2), dpi=130, layout="constrained")
    x = np.random.default_rng(0).uniform(0.2, 1.2, 50)
    c, mu, start = 1.0, 2.0, (0.5, 0.5)
    for row, (axis, bend) in enumerate(zip(figure.subplots(1, 2), (0.5, -0.5), strict=True)):
        moments = rbp_dynamics.power_moments(x, x**2 + bend * (1 - x), mu)
        for name, colour, field, arguments in (
            ("with the derivative", COLOURS[0], rbp_dynamics.power_srbp, (moments, c, mu)),
            ("without the derivative", COLOURS[1], rbp_dynamics.power_srbp_without_derivative, (moments, c, mu)),
            ("gradient descent", COLOURS[3], rbp_dynamics.power_gradient_descent, (moments, mu)),
        ):
            flow = rbp_dynamics.integrate(field, start, *arguments, until=50.0)
            a1, a2 = flow.states
            axis.plot(flow.times[1:], (a2 * a1**mu)[1:], color=colour, label=None if row else f"$w$, {name}")
            axis.plot(flow.times[1:], a1[1:], color=colour, linestyle=":", label=None if row else f"$a_1$, {name}")
        best, other = moments.alpha / moments.beta, moments.gamma / moments.delta
        axis.axhline(best, color="black", linewidth=0.8, label=None if row else r"$\alpha/\beta$, the optimum of $w$")
        label = None if row else r"$\gamma/\delta$"
        axis.axhline(other, color="black", linewidth=0.8, linestyle="--", label=label)
        axis.set(xscale="log", xlabel="time", ylim=(0, 2.5))
        sign = ">" if other > best else "<"
        axis.set_title(rf"$\gamma/\delta {sign} \alpha/\beta$", fontsize="medium")
        axis.grid(alpha=0.3)
    figure.suptitle(r"$O = a_2 (a_1 I)^2$, $w = a_2 a_1^2$, by random backpropagation", fontsize="medium")
    figure.legend(loc="outside right center", fontsize="small", frameon=False)
    return figure


def best_responses() -> Figure:
    """BackMAN updates and best responses: over alpha (g frozen or responding), and over the width (g responding)."""
    figure = Figure(figsize=(11, 4.4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    alphas = np.geomspace(1e-5, 0.1, 9)
    problems = {"dense": backman.random_dense(0), "conv": backman.random_conv(0)}
    for colour, (name, (net, weights, data)) in zip(COLOURS, problems.items(), strict=False):
        for responding, line in ((False, "-"), (True, "--")):
            cosines = [
                backman.best_responses(net, weights, data, alpha, 0, responding=responding).cosine for alpha in alphas
            ]
            label = f"{name}, g {'responding' if responding else 'frozen'}"
            left.plot(alphas, 1 - np.array([c.mean() for c in cosines]), line, marker=".", color=colour, label=label)
            if not responding:
                left.plot(alphas, 1 - np.array([c.min() for c in cosines]), ":", color=colour, label="the worst neuron")
    left.set(xscale="log", yscale="log", xlabel=r"$\alpha$", ylabel="1 - cosine of best response and update")
    left.legend(fontsize="small", frameon=False)
    widths = (4, 8, 16, 32, 64)
    for seed in range(3):
        means = []
        for width in widths:
            net, weights, data = backman.random_dense(seed, (6, width, width, 4), 64)
            found = backman.best_responses(net, weights, data, 1e-4, 0, responding=True)
            means.append(found.cosine.mean())
        right.plot(widths, means, marker=".", color=COLOURS[seed])
    right.axhline(1, color="black", linewidth=0.8)
    right.set(xscale="log", xlabel="width", ylabel="mean cosine, g responding", ylim=(0, 1.03))
    right.set_xticks(widths, map(str, widths))
    right.minorticks_off()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    title = "BackMAN: a neuron's best response approaches its update if g does not respond to it"
    figure.suptitle(title, fontsize="medium")
    return figure


def relaxations() -> Figure:
    """AROVR and SPROVR of one state over alpha and beta; strength of the error signal; convergence of the iteration."""
    figure = Figure(figsize=(11, 7.4), dpi=130, layout="constrained")
    (by_alpha, by_beta), (strength, convergence) = figure.subplots(2, 2)
    states = np.linspace(-4, 4, 801)
    energy = 0.5 * (states - 1) ** 2

    def loss(s):
        return np.log1p(np.exp(-2 * s)) + 0.3 * np.sin(3 * s) + 0.3

    alphas = np.linspace(0, 1, 21)
    for i, beta in enumerate((0.25, 0.5, 1.0)):
        values = [dual_propagation.arovr(loss(states), energy, alpha, beta) for alpha in alphas]
        by_alpha.plot(alphas, values, color=COLOURS[i], label=rf"AROVR, $\beta$ = {beta:g}")
        values = [dual_propagation.sprovr(loss, states, energy, alpha, beta) for alpha in alphas]
        by_alpha.plot(alphas, values, "--", color=COLOURS[i], label="SPROVR")
    by_alpha.axhline(loss(1.0), color="black", linewidth=0.8, label="the loss itself")
    by_alpha.set(xlabel=r"$\alpha$", ylabel="J", title="J falls with $\\alpha$ (Prop. 4.1 a, corrected)")
    betas = np.linspace(0.05, 1.5, 30)
    for i, alpha in enumerate((0.0, 0.5, 1.0)):
        values = [beta * dual_propagation.arovr(loss(states), energy, alpha, beta) for beta in betas]
        by_beta.plot(betas, values, color=COLOURS[i], label=rf"$\beta J$, $\alpha$ = {alpha:g}")
    step = 0.3
    values = [dual_propagation.arovr(loss(states), energy, 1 - step / beta, beta) for beta in betas[betas >= step]]
    label = rf"$J$, $(1 - \alpha)\beta$ = {step:g}"
    by_beta.plot(betas[betas >= step], values, "--", color=COLOURS[3], label=label)
    title = r"$\beta J$ rises with $\beta$ (4.1 b, loss $\geq$ 0), $J$ falls at equal step (4.2)"
    by_beta.set(xlabel=r"$\beta$", title=title)
    for i, alpha in enumerate((0.0, 0.5, 1.0)):
        inside = betas[(1 - alpha) * betas < 0.9]
        pairs = np.array([dual_propagation.signal_strength(alpha, beta) for beta in inside])
        strength.plot(inside, pairs[:, 0], color=COLOURS[i], label=rf"AROVR, $\alpha$ = {alpha:g}")
        strength.plot(inside, pairs[:, 1], "--", color=COLOURS[i], label="SPROVR")
    strength.set(xlabel=r"$\beta$", ylabel="|M|", yscale="log", title="Strength of the error signal (Eq. 60, 70)")
    for i, inner in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        for line, scale in (("-", 1.2), ("--", 3.0)):
            q = dual_propagation.random_quadratic(0, beta=0.3, scale=scale)
            signal = dual_propagation.arovr_signal(q, 0.5)
            path = dual_propagation.iterate(q, dual_propagation.arovr_outputs, 0.5, inner, 12)
            away = np.linalg.norm(path - dual_propagation.fixed_point(q, signal, inner), axis=1)
            convergence.plot(np.maximum(away, 1e-15), line, marker=".", color=COLOURS[i])
        convergence.plot([], [], color=COLOURS[i], label=rf"$\alpha'$ = {inner:g}")
    convergence.set(xlabel="iteration", ylabel="distance from the closed form", yscale="log", ylim=(1e-16, 1e5))
    convergence.set_title("Appendix G: |W| = 1.2 (solid) and 3 (dashed)")
    convergence.legend(loc=(0.02, 0.08), fontsize="x-small", frameon=False)
    for axis in (by_alpha, by_beta, strength):
        axis.legend(fontsize="x-small", frameon=False, ncols=2)
    for axis in (by_alpha, by_beta, strength, convergence):
        axis.title.set_fontsize("medium")
        axis.grid(alpha=0.3)
    return figure


FIGURES = {f.__name__: f for f in (vector_field, linear_dynamics, power_law, best_responses, relaxations)}
