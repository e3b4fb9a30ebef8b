"""The checks of `lrules.testing.check_rule` on the learning, and on a batch as the sum of its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from lrules.apply import transform, value_and_grad
from lrules.modifiers import modify_error
from lrules.rule import Gradients
from lrules.trial import (
    Trial,
    changed,
    forward,
    gap_of,
    largest,
    learned,
    loss,
    named,
    off,
    shapes,
    wide,
)
from lrules.typing import Pytree


def _mean(samples: Pytree) -> dict[str, np.ndarray]:
    return {name: g.mean(0) for name, g in named(samples).items()}


def check_descends(trial: Trial, samples: Gradients) -> None:
    grads = _mean(samples.params)
    for name, true in trial.nearest.items():
        g = grads[name]
        assert np.any(g), (
            f"the gradient of {name!r} is zero, and this weight is nearest the output: return its gradient (dw of "
            "backward), not None"
        )
        cosine = np.vdot(g, true).real / (np.linalg.norm(g) * np.linalg.norm(true))
        assert cosine > 0, (
            f"the gradient of {name!r}, a weight nearest the output, goes up the objective (its cosine with the true "
            f"gradient is {cosine:.2f}): check the sign of dw, and that the error is that of the loss given"
        )


def check_local(trial: Trial) -> None:
    """Takes one example at a time, so that a bias gets the error itself."""
    for i in range(len(trial.inputs)):
        x = trial.inputs[i : i + 1]
        grads = named(trial.samples(x, trial.targets[i : i + 1]).params)
        for name, read in forward(trial.params, x)[1].items():
            kernel, error = grads[f"{name}/kernel"], grads[f"{name}/bias"]
            expected = wide(read)[0][:, None] * error[:, None]
            size = np.linalg.norm(expected, axis=1)
            alive, moves = size > 1e-6 * size.max(), np.any(kernel, axis=1)
            if trial.rule.additive:  # others may need more than one example
                assert not np.any(alive & ~moves), (
                    f"an error arrives at the layer {name!r}, whose bias learns, and its kernel does not learn: return "
                    "the gradient of the kernel (dw of backward), not None"
                )
            assert not np.any(alive & moves & ((kernel * expected).sum(1) <= 0)), (
                f"the kernel of the layer {name!r} learns against the error that the bias gets, times the input of the "
                'layer: check the sign of dw, or give skip="local" if the weights of a neuron do not share one error'
            )


def check_arrives(trial: Trial, samples: Gradients) -> None:
    grads = _mean(samples.params)
    still = [name for name in trial.true if not np.any(grads[name])]
    assert not still or trial.stops_error, (
        f"nothing arrives at {', '.join(map(repr, still))}: return dx from backward, or a signal other than zero; if "
        'the rule stops the error, say so by direct(None), or by skip="arrives" for a Rule made by hand'
    )


def check_used(trial: Trial, samples: Gradients) -> None:
    taught = named(trial.taught) if trial.rule.phase is not None else {}
    for name, g in named(samples.feedback).items():
        assert np.any(g) or np.any(taught.get(name, 0)) or trial.stops_error, (
            f"the learned feedback weight {name!r} has no gradient: return it (db of backward, learn, or phase), or "
            "make the weight fixed, without learned=True"
        )
    base = named(samples)
    for kind in ("fixed", "learned"):
        weights = getattr(trial.feedback, kind)
        for name, b in weights.items():
            other = trial.feedback._replace(**{kind: weights | {name: changed(b, -1)}})
            assert _differ(base, named(trial.samples(trial.inputs, trial.targets, other))), (
                f"the feedback weight {name!r} is drawn and never used: use it (b of backward or signal), or drop init"
            )
    if trial.rule.stochastic and not trial.stops_error:
        assert _differ(base, {name: g[:1] for name, g in base.items()}), (
            "the rule is stochastic, and another key changes nothing: use rng, or leave out stochastic=True"
        )


def _differ(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return any(not np.array_equal(a[name], np.broadcast_to(b[name], a[name].shape), equal_nan=True) for name in a)


def check_phase(trial: Trial) -> None:
    """In a phase of its own, the feedback gets gradients like itself, and the ordinary step gives it none."""
    if trial.rule.phase is None:
        return
    taught, learned = trial.taught, trial.feedback.learned
    assert shapes(taught) == shapes(learned), "feedback_grad gives another structure than feedback.learned"
    assert all(np.all(np.isfinite(g)) for g in named(taught).values()), "a gradient of the phase is not finite"
    stepped = named(trial.samples(trial.inputs, trial.targets).feedback)
    for name, g in named(taught).items():
        assert not (np.any(g) and np.any(stepped[name])), (
            f"the feedback weight {name!r} learns in ordinary steps and in the phase: return zeros for its db in one"
        )
    if trial.rule.phase.stochastic:
        other = trial.teach(jax.random.key(23))
        assert _differ(named(taught), named(other)), "the phase is stochastic, and another key changes nothing"


def check_modified(trial: Trial) -> None:
    met: list[str] = []

    def spy(signal: jax.Array, name: str, rng: Any) -> jax.Array:
        met.append(name)
        return signal

    step = value_and_grad(trial.net, loss, modify_error(trial.rule, spy))
    try:
        jax.eval_shape(lambda p: step(p, trial.feedback, trial.inputs, trial.targets, **trial.rng), trial.params)
    except (NotImplementedError, ValueError):
        return  # it refuses modifiers
    assert met or trial.nearest.keys() == trial.true.keys() or trial.stops_error, (
        "modifiers of the error do nothing around the rule: run the network with net.handlers, as rules made by "
        "sequential and direct do, or refuse a network that has handlers"
    )


def check_batch(trial: Trial) -> None:
    if not trial.rule.additive or not trial.parts:
        return
    n = trial.net.batch_size(trial.inputs)

    def added(gradient: Callable[..., dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        found = [(where, gradient(x, jax.tree.map(lambda t: t[where], trial.targets))) for x, where in trial.parts]  # noqa: B023
        return {name: sum((where.stop - where.start) / n * g[name] for where, g in found) for name in found[0][1]}

    def of_rule(x: Pytree, t: Pytree) -> dict[str, np.ndarray]:
        return learned(trial.samples(x, t))

    def of_backprop(x: Pytree, t: Pytree) -> dict[str, np.ndarray]:
        return named(trial.true_gradient(x, t))

    whole, parts = of_rule(trial.inputs, trial.targets), added(of_rule)
    least = 1e-3 * largest(whole) / len(next(iter(whole.values()))) ** 0.5
    for name, g in whole.items():
        gap = gap_of(g, parts[name], least)
        if not gap:
            continue
        plain = added(of_backprop)
        if any(off(plain[name], g) > 1e-3 for name, g in trial.true.items()):
            return  # the network itself mixes its examples
        raise AssertionError(
            f"the gradient of {name!r} is not the sum of those of the parts of the batch (it differs by {gap:.0%}): "
            "compute it from the error of each example, on the scale of the per-example sum as modify_error does, or "
            "say that it needs the whole batch (sequential(whole_batch=True), Rule(additive=False))"
        )


def check_transform(trial: Trial) -> None:
    """Both ways to a gradient agree, and the rule distinguishes the scale of a sum from that of a mean."""
    rule, net, n = trial.rule, trial.net, trial.net.batch_size(trial.inputs)
    wanted = learned(trial.jitted(trial.params, trial.feedback, trial.inputs, trial.targets, **trial.rng)[1])

    def compare(reduction: Literal["mean", "sum"], factor: int, complaint: str) -> None:
        f = transform(net, rule, reduction=reduction)

        def objective(params: Pytree, weights: Any) -> jax.Array:
            out = f(params, trial.feedback._replace(learned=weights), trial.inputs, **trial.rng)
            return factor * loss(out[0] if net.has_aux else out, trial.targets).mean()

        got = jax.jit(jax.grad(objective, (0, 1)))(trial.params, trial.feedback.learned)
        for name, g in learned(Gradients(*got)).items():
            scales = (factor, 1) if name.startswith("feedback ") else (factor,)  # feedback may learn without the error
            gap = min(off(g / scale, wanted[name], 1e-3 * largest(wanted)) for scale in scales)
            assert gap < 2e-3, complaint.format(name=name)

    if rule.value_and_grad is not None:
        compare("mean", 1, "transform and value_and_grad give two gradients of {name!r}: compute both in the same way")
    if rule.additive:
        complaint = 'transform(reduction="sum") does not give the gradient of {name!r} of the mean, times the batch: '
        compare("sum", n, complaint + "take the scale of the arriving error from reduction=")
