"""The test that every rule has to pass, ours and yours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrules.apply import transform, value_and_grad
from lrules.network import Network, as_network
from lrules.promises import (
    check_arrives,
    check_batch,
    check_descends,
    check_local,
    check_modified,
    check_phase,
    check_transform,
    check_used,
)
from lrules.rule import Feedback, Gradients, Rule, require_rule
from lrules.trial import (
    Trial,
    example,
    learned,
    loss,
    other_example,
    same,
    shapes,
    stirred,
    wide,
    zip_leaves,
)
from lrules.typing import Pytree

__all__ = ["check_rule", "half_squared_error", "serves_transform"]

SKIPPABLE = ("descends", "local", "arrives", "used", "modified")


def check_rule(
    rule: Rule,
    net: Network | None = None,
    params: Pytree = None,
    inputs: Pytree = None,
    *,
    skip: str | Iterable[str] = (),
) -> None:
    """Checks that a rule keeps the promises of `lrules.Rule`, and that it learns.

    g(batch) = sum over parts of (n_part / n) g(part),  <g, true gradient> > 0 at the weights nearest the output

    **Program.** The rule keeps the outputs of the network, bit for bit, and what `has_aux` adds to them. Its gradients
    have the structure, shapes and dtypes of the parameters, also in bfloat16. They are finite, also for dead units,
    dead layers, an example of zeros and an error of zero. `jit`, `vmap` over seeds and `scan` over steps give what
    plain calls give, and the second step does not compile again. `init` works under `eval_shape`, returns new arrays,
    and gives the same shapes for every batch. A step returns a new `feedback.state` of the same shapes, if there is
    one, and leaves its arguments as they are. The rule serves `Network(has_aux=True)`, frozen weights, inputs without a
    batch, and parameters that are not a dict. `transform` and `value_and_grad` agree.

    **Error.** If the error at the outputs is zero, no parameter moves. This is not checked for a stochastic rule, which
    may add noise, or for a rule that `transform` does not serve, which may learn from the targets.

    **Batch.** The gradient of a batch is the weighted sum of the gradients of its parts, and `reduction="sum"` gives n
    times the gradient of the mean. So a rule may use any function of one example's own error, as `lrules.sign_error`
    does. But the function must act on the scale of the per-example sum, as in `lrules.modify_error`: the error that
    arrives is divided by the size of the batch. A rule that needs the whole batch must say so, with
    `sequential(whole_batch=True)` or `Rule(additive=False)`. For a stochastic rule, the check compares means over many
    keys. It is left out if the network itself mixes its examples (BatchNorm), or cannot take half of the batch.

    **Learning.** These promises have names, for `skip`. The check replaces the feedback weights by others, so an
    initializer may draw zeros.

    - `"descends"`: for the weights nearest the output (their error crosses no hidden signal), the gradient has a
      positive inner product with the true one.
    - `"local"`: on the default network, the gradient of a neuron's weights is the error that its bias gets, times what
      the layer reads, up to positive factors.
    - `"arrives"`: each parameter that backprop trains gets a gradient. A rule that stops the error must say so, with
      `direct(None)`, as `lrules.last_layer_only` does.
    - `"used"`: each feedback weight changes the step, and so does the key of a stochastic rule. Each learned feedback
      weight gets a gradient, in the step or in the phase of the rule (`lrules.feedback_grad`), and not in both.
    - `"modified"`: modifiers of the error act on the rule, or the rule refuses them.

    Args:
      rule: the rule.
      net, params, inputs: the network for the test, with outputs `[batch, outputs]`. Default: a small multilayer
        perceptron with a skip connection, a scale, and one unit that is always dead. Its layers are `a` to `d`.
      skip: the names of the promises that the rule does not make.

    Raises:
      AssertionError: the rule breaks a promise; the message says which.
      TypeError: the rule is not a `Rule`.
      ValueError: `skip` has another name.

    Example:
      >>> import lrules
      >>> lrules.testing.check_rule(lrules.feedback_alignment())
    """
    require_rule(rule)
    skipped = {skip} if isinstance(skip, str) else set(skip)
    if unknown := sorted(skipped - set(SKIPPABLE)):
        names = ", ".join(map(repr, SKIPPABLE))
        raise ValueError(f"skip={unknown[0]!r} is not the name of a promise: choose from {names}")
    default = net is None
    if net is None:
        net, params, inputs = example()
    trial = Trial(rule, as_network(net), params, inputs)

    _check_init(trial)
    _check_rng(trial)
    outputs = _check_step(trial)
    _check_vmap(trial)
    _check_scan(trial)
    if default:
        _check_tracing(trial)
    _check_no_error(trial, outputs)
    if default:
        _check_dead(trial)

    trial.feedback = stirred(trial.feedback)
    samples = trial.samples(trial.inputs, trial.targets)
    check_batch(trial)
    if "descends" not in skipped:
        check_descends(trial, samples)
    if default and "local" not in skipped:
        check_local(trial)
    if "arrives" not in skipped:
        check_arrives(trial, samples)
    if "used" not in skipped:
        check_used(trial, samples)
    check_phase(trial)
    if "modified" not in skipped:
        check_modified(trial)
    if serves_transform(trial.rule, trial.net):
        check_transform(trial)


def serves_transform(rule: Rule, net: Network) -> bool:
    """Checks whether `transform` serves a rule; if not, only `value_and_grad` does.

    Args:
      rule: the rule.
      net: the network.

    Returns:
      True or False.

    Example:
      >>> import lrules
      >>> net = lrules.Network(lambda w, x: x @ w)
      >>> serves = lrules.testing.serves_transform
      >>> serves(lrules.feedback_alignment(), net), serves(lrules.random_target_projection(), net)
      (True, False)
    """
    try:
        transform(net, rule)
    except ValueError:
        return False
    return True


def half_squared_error(outputs: Pytree, targets: Pytree) -> jax.Array:
    """A simple loss for tests and examples: half the squared error of each example.

    L = 1/2 ||y - t||^2

    Args:
      outputs: y, an array or a pytree of arrays `[batch, ...]`.
      targets: t, with the same structure and shapes.

    Returns:
      One loss per example, `[batch]`.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> lrules.testing.half_squared_error(jnp.ones((2, 3)), jnp.zeros((2, 3))).tolist()
      [1.5, 1.5]
    """
    return loss(outputs, jax.tree.map(jnp.negative, targets))


# ------------------------------------------------------------------------------------------------------- the program


def _check_init(trial: Trial) -> None:
    rule, net, params, inputs, feedback = trial.rule, trial.net, trial.params, trial.inputs, trial.feedback
    key = jax.random.key(7)
    assert isinstance(feedback, Feedback), "init does not return a Feedback"
    shaped = functools.partial(jax.eval_shape, lambda k, p, x: rule.init(k, net, p, x), key, params)
    assert shapes(shaped(inputs)) == shapes(feedback), "init differs under eval_shape"
    buffers = {id(x) for x in jax.tree.leaves(params)}
    assert not buffers & {id(x) for x in jax.tree.leaves(feedback)}, "init returns buffers of the parameters"
    again = rule.init(key, net, params, inputs)
    same(again, feedback, "init with one key gives two results", exact=True)
    for part, _ in trial.parts:
        assert shapes(shaped(part)) == shapes(feedback), (
            "init gives feedback of other shapes for a smaller batch: make its shapes independent of the batch"
        )


def _check_rng(trial: Trial) -> None:
    wrong = {} if trial.rule.stochastic else {"rng": jax.random.key(0)}
    try:
        trial.step(trial.params, trial.feedback, trial.inputs, trial.targets, **wrong)
    except ValueError as error:
        assert "rng" in str(error), f"the wrong use of rng raises something else: {error}"
    else:
        raise AssertionError("the rule " + ("does not ask for rng" if trial.rule.stochastic else "takes an unused rng"))


def _check_step(trial: Trial) -> Pytree:
    """The step alone, with jit and without; returns the outputs without jit."""
    net, params, feedback, inputs, targets = trial.net, trial.params, trial.feedback, trial.inputs, trial.targets
    before = jax.tree.flatten((params, feedback))
    (plain_value, plain_outputs, *_), plain = trial.step(params, feedback, inputs, targets, **trial.rng)
    after = jax.tree.flatten((params, feedback))
    assert before[1] == after[1] and all(a is b for a, b in zip(before[0], after[0], strict=True)), (
        "a step changes its arguments: put new values into a new dict, not into params or feedback"
    )
    if serves_transform(trial.rule, trial.net):
        f = transform(net, trial.rule)
        got = jax.jit(lambda p, x: f(p, feedback, x, **trial.rng))(params, inputs)
        got = got[0] if net.has_aux else got
        same(got, trial.outputs, "transform changes the outputs", exact=True)
    (value, seen, *_), grads = trial.jitted(params, feedback, inputs, targets, **trial.rng)
    same(seen, trial.outputs, "value_and_grad returns other outputs than the network's", tolerance=1e-6)
    same(value, loss(trial.outputs, targets).mean(), "the value is not the mean loss", tolerance=1e-5)
    _check_gradients(params, feedback, grads)
    same(plain_value, value, "jit changes the value", tolerance=1e-5)
    same(plain.params, grads.params, "jit changes the gradients", tolerance=1e-4)
    smaller = jax.tree.map(lambda p: p * jnp.asarray(0.9, p.dtype), params)
    trial.jitted(smaller, feedback, inputs, targets, **trial.rng)
    assert trial.traces == 1, "the second step compiles again"
    return plain_outputs


def _check_gradients(params: Pytree, feedback: Feedback, grads: Gradients) -> None:
    assert jax.tree.structure(grads.params) == jax.tree.structure(params), "gradients have another structure"
    for g, p in zip_leaves(grads.params, params):
        kinds = f"{g.dtype}{g.shape}", f"{p.dtype}{p.shape}"
        assert kinds[0] == kinds[1], f"a gradient is {kinds[0]}, its parameter {kinds[1]}"
        assert jnp.all(jnp.isfinite(g)), "a gradient is not finite"
    assert jax.tree.structure(grads.feedback) == jax.tree.structure(feedback.learned), (
        "grads.feedback has another structure than feedback.learned"
    )
    for g, b in zip_leaves(grads.feedback, feedback.learned):
        same = g.shape == b.shape and g.dtype == b.dtype
        assert same, "a feedback gradient has another shape or dtype than its weight"
        assert jnp.all(jnp.isfinite(g)), "a feedback gradient is not finite"
    assert jax.tree.structure(grads.state) == jax.tree.structure(feedback.state), "grads.state has another structure"
    assert shapes(grads.state) == shapes(feedback.state), (
        "grads.state has other shapes or dtypes than feedback.state: keep both"
    )
    assert not any(np.any(np.isnan(wide(leaf))) for leaf in jax.tree.leaves(grads.state)), "a state is not a number"
    old = jax.tree.leaves(feedback.state)
    moved = any(not np.array_equal(wide(a), wide(b)) for a, b in zip_leaves(grads.state, feedback.state))
    assert moved or not old, (
        "grads.state is the feedback.state that came in: return the next one, or keep in feedback.fixed the values "
        "that never change"
    )


def _check_vmap(trial: Trial) -> None:
    rule, net, params, inputs = trial.rule, trial.net, trial.params, trial.inputs
    keys = jax.random.split(jax.random.key(5), 2)
    feedbacks = jax.vmap(lambda k: rule.init(k, net, params, inputs))(keys)
    many = jax.tree.map(lambda p: jnp.stack([p, p * jnp.asarray(0.5, p.dtype)]), params)
    rngs = {"rng": jax.random.split(jax.random.key(6), 2)} if rule.stochastic else {}

    def one(step: Callable[..., Any], p: Pytree, fb: Feedback, rng: dict[str, Any]) -> Pytree:
        return step(p, fb, inputs, trial.targets, **rng)[1].params

    together = jax.jit(jax.vmap(functools.partial(one, trial.step)))(many, feedbacks, rngs)
    for i in range(2):
        alone = one(trial.jitted, *jax.tree.map(lambda x: x[i], (many, feedbacks, rngs)))  # noqa: B023
        picked = jax.tree.map(lambda x: x[i], together)  # noqa: B023
        same(picked, alone, "vmap over seeds changes the gradients", tolerance=1e-4)


def _check_scan(trial: Trial) -> None:
    def update(step: Callable[..., Any], p: Pytree, fb: Feedback) -> tuple[Pytree, Feedback]:
        grads = step(p, fb, trial.inputs, trial.targets, **trial.rng)[1]
        p = jax.tree.map(lambda p, g: p - jnp.asarray(1e-3, p.dtype) * g, p, grads.params)
        learned = jax.tree.map(lambda b, g: b - jnp.asarray(1e-3, b.dtype) * g, fb.learned, grads.feedback)
        return p, fb._replace(learned=learned, state=grads.state)

    start = trial.params, trial.feedback
    body = lambda carry, _: (update(trial.step, *carry), None)  # noqa: E731
    scanned, _ = jax.jit(lambda carry: jax.lax.scan(body, carry, None, length=2))(start)
    stepped = update(trial.jitted, *update(trial.jitted, *start))
    same(scanned[0], stepped[0], "scan changes the steps", tolerance=1e-4)


def _check_tracing(trial: Trial) -> None:
    """Checks that need only tracing, on variants of the default network."""

    def traced(net: Network, params: Pytree, inputs: Pytree, targets: Pytree, complaint: str) -> Any:
        def step() -> tuple[Any, Feedback]:
            feedback = trial.rule.init(jax.random.key(7), net, params, inputs)
            return value_and_grad(net, loss, trial.rule)(params, feedback, inputs, targets, **trial.rng), feedback

        try:
            return jax.eval_shape(step)
        except NotImplementedError:  # a refusal
            return None
        except Exception as error:
            raise AssertionError(f"{complaint}; it raised {type(error).__name__}: {error}") from error

    complaint = (
        "the rule fails in bfloat16: give gradients the dtypes of their weights, as dw.astype(w.dtype), and errors the "
        "dtypes of their signals, as dx.astype(x.dtype)"
    )
    net, params, inputs = example(jnp.bfloat16)
    found = traced(net, params, inputs, trial.targets.astype(jnp.bfloat16), complaint)
    if found is not None:
        (_, grads), feedback = found
        assert shapes((grads.params, grads.feedback)) == shapes((params, feedback.learned)), complaint
    net, params, inputs = example()
    more = Network(lambda p, x: (net(p, x), {"seen": x}), has_aux=True)
    complaint = "the rule loses the aux of a network with has_aux=True: return it after the outputs"
    found = traced(more, params, inputs, trial.targets, complaint)
    assert found is None or shapes(found[0][0][2:]) == ({"seen": shapes(inputs)},), complaint
    net, params, inputs = other_example()
    complaint = (
        "the rule fails with frozen weights, an input without a batch and parameters in a tuple: call the network as "
        "net(params, inputs), and use net.parameters, net.batch_size and jax.tree"
    )
    found = traced(net, params, inputs, trial.targets, complaint)
    assert found is None or shapes(found[0][1].params) == shapes(params), complaint


def _check_dead(trial: Trial) -> None:
    """A network in which whole layers are dead, and one example is zero."""
    params = jax.tree.map(lambda p: p, trial.params)
    for name in "ac":
        params[name]["bias"] = jnp.full_like(params[name]["bias"], -100)
    inputs = trial.inputs.at[0].set(0)
    grads = trial.jitted(params, trial.feedback, inputs, trial.targets, **trial.rng)[1]
    for name, g in learned(grads).items():
        assert np.all(np.isfinite(g)), (
            f"the gradient of {name!r} is not finite where a layer is dead, or an example is zero: do not divide by a "
            "value that can be zero"
        )


def _check_no_error(trial: Trial, outputs: Pytree) -> None:
    """It does not use jit, because two programs may round `outputs` in two ways."""
    targets = jax.tree.map(jnp.negative, outputs)
    grads = trial.step(trial.params, trial.feedback, trial.inputs, targets, **trial.rng)[1]
    for name, g in learned(grads).items():
        assert np.all(np.isfinite(g)), (
            f"the gradient of {name!r} is not finite where the error is zero: do not divide by a value that can be zero"
        )
    if not trial.rule.stochastic and serves_transform(trial.rule, trial.net):  # targets may teach without an error
        for leaf in jax.tree.leaves(grads.params):
            assert not jnp.any(leaf), "an error of zero at the outputs moves the parameters"


def __dir__() -> list[str]:
    return list(__all__)
