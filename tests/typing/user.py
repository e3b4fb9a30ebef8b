"""A user's program, fully typed: mypy --strict and pyright find no error in it (see test_typing.py)."""

from __future__ import annotations

import pathlib
import tempfile
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

import lrules
from lrules import diagnostics, monotone

Params = dict[str, jax.Array]
x, y = jax.random.normal(jax.random.key(0), (16, 4)), jnp.arange(16) % 3
loss = optax.softmax_cross_entropy_with_integer_labels
shapes = {"first": (4, 8), "second": (8, 8), "last": (8, 3)}
weights: Params = {name: jax.random.normal(jax.random.key(i), s) for i, (name, s) in enumerate(shapes.items())}
key = jax.random.key(1)


def mlp(params: Params, x: jax.Array) -> jax.Array:
    h = jax.nn.relu(x @ params["first"])
    h = h + lrules.hidden(jax.nn.gelu(h @ params["second"]), "second")
    return h @ params["last"]


# ------------------------------------------------------------------------------------------------------ Flax NNX, optax


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden, self.head = nnx.Linear(4, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.hidden(x)))


def train_nnx() -> jax.Array:
    model = MLP(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    net, params = lrules.from_nnx(model)
    rule = lrules.direct_feedback_alignment()
    feedback = rule.init(key, net, params, x)
    step = lrules.value_and_grad(net, loss, rule)

    def train(model: MLP, optimizer: nnx.Optimizer[MLP], x: jax.Array, y: jax.Array) -> jax.Array:
        (value, _), (grads, *_) = step(nnx.state(model, nnx.Param), feedback, x, y)
        optimizer.update(model, grads)
        return value

    return train(model, optimizer, x, y)


def nnx_with_state() -> Any:
    net, params, state = lrules.from_nnx(MLP(rngs=nnx.Rngs(0)), nnx.Param, with_state=True)
    rule = lrules.backprop()
    (_, _, after), _ = lrules.value_and_grad(net, loss, rule)(params, lrules.Feedback({}, {}), (state, x), y)
    return after, state


# ----------------------------------------------------------------------------------------------------------- Flax Linen


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


def train_linen() -> Any:
    module = Dense()
    net, params = lrules.from_linen(module, module.init(jax.random.key(1), x))
    rule = lrules.feedback_alignment()
    feedback = rule.init(jax.random.key(2), net, params, x)
    f = lrules.transform(net, rule)

    def update(params: Any, x: jax.Array, y: jax.Array) -> Any:
        def objective(params: Any) -> jax.Array:
            mean: jax.Array = loss(f(params, feedback, x), y).mean()
            return mean

        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(objective)(params))

    return jax.jit(update)(params, x, y)


def linen_with_state() -> dict[str, Any]:
    module = Dense()
    _, _, state = lrules.from_linen(
        module, module.init(key, x), call=lambda m, x: m(x), rngs={"dropout": key}, with_state=True, batch_axes=0
    )
    return state


# -------------------------------------------------------------------------------------------------------------- Equinox


def train_equinox() -> Any:
    params, static = eqx.partition(eqx.nn.MLP(4, 3, 8, 1, key=key), eqx.is_inexact_array)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        outputs: jax.Array = jax.vmap(eqx.combine(params, static))(x)
        return outputs

    rule = lrules.kolen_pollack()
    feedback = rule.init(key, apply, params, x)
    grads: lrules.Gradients = lrules.value_and_grad(apply, loss, rule)(params, feedback, x, y)[1]
    return eqx.apply_updates(params, grads.params)


# ---------------------------------------------------------------------------- a bare function under JAX's own functions


def train_bare() -> Any:
    rule = lrules.feedback_alignment(jax.nn.initializers.he_normal(), adaptive=True)
    feedback = rule.init(key, mlp, weights, x)
    optimizer = optax.adam(1e-3)
    state = optimizer.init((weights, feedback.learned))
    step = jax.jit(lrules.value_and_grad(mlp, loss, rule))
    (_, _), grads = step(weights, feedback, x, y)
    updates: Any
    updates, state = optimizer.update((grads.params, grads.feedback), state)
    learned: Params
    params, learned = jax.tree.map(jnp.add, (weights, feedback.learned), updates)
    return optax.apply_updates(params, updates[0]), feedback._replace(learned=learned, state=grads.state)


def with_noise() -> tuple[jax.Array, dict[str, Any], dict[str, jax.Array]]:
    rule = lrules.node_perturbation(0.01, direct=True)
    feedback: lrules.Feedback = rule.init(key, mlp, weights, x)
    step = lrules.value_and_grad(mlp, loss, rule)
    (value, _), grads = jax.jit(step, static_argnames=())(weights, feedback, x, y, rng=key)
    jax.vmap(lambda k: step(weights, feedback, x, y, rng=k)[1].params)(jax.random.split(key, 3))
    (value, _), grads = step(weights, feedback, x, y, rng=key)
    mean: jax.Array = value.mean()
    return mean, grads.report, grads.feedback


def in_a_phase_of_its_own() -> lrules.Feedback:
    rule = lrules.weight_mirror(decay=0.5)
    feedback = rule.init(key, mlp, weights, x)
    mirror: lrules.FeedbackGrad = lrules.feedback_grad(mlp, rule)
    db: dict[str, jax.Array] = jax.jit(mirror)(weights, feedback, x, rng=key)
    return feedback._replace(learned=jax.tree.map(lambda b, g: b - 0.1 * g, feedback.learned, db))


def under_transformations() -> Any:
    rule, feedback = lrules.backman(), lrules.Feedback({}, {})
    step, f = lrules.value_and_grad(mlp, loss, rule), lrules.transform(mlp, rule, reduction="sum")
    return [
        jax.vmap(step, in_axes=(None, None, 0, 0))(weights, feedback, x[:, None], y[:, None]),
        jax.eval_shape(step, weights, feedback, x, y),
        jax.grad(lambda w: f(w, feedback, x).sum())(weights),
        jax.jit(f)(weights, feedback, x),
        jax.vmap(f, in_axes=(None, None, 0))(weights, feedback, x[:, None]),
        jax.checkpoint(f)(weights, feedback, x),
    ]


def what_is_returned(net: lrules.Network, rule: lrules.Rule) -> tuple[lrules.TransformedNetwork, lrules.ValueAndGrad]:
    return lrules.transform(net, rule), lrules.value_and_grad(net, loss, rule)


# --------------------------------------------------------------------------------------------------- rules of one's own


def backward(
    op: Any, w: jax.Array, b: Any, x: jax.Array, d: jax.Array, layer: Any
) -> tuple[jax.Array, jax.Array, None]:
    dw, _ = jax.vjp(op, w, x)[1](d)
    _, dx = jax.vjp(op, b, x)[1](d)
    return dw, 0.5 * dx, None


def asking(
    op: Any, w: jax.Array, b: Any, x: jax.Array, d: jax.Array, layer: lrules.extend.Layer,
    *, rng: jax.Array, state: jax.Array, y: jax.Array, rate: float,
) -> tuple[jax.Array, jax.Array, None, jax.Array]:  # fmt: skip
    dw, dx = jax.vjp(op, w, x)[1](d)
    return rate * dw, dx * jax.random.bernoulli(rng, 0.9, dx.shape), None, 0.9 * state + 0.1 * y.mean()


def signal(e: jax.Array, b: jax.Array, targets: jax.Array | None, name: str) -> jax.Array:
    return jnp.tensordot(e, b, 1)


halved: lrules.Rule = lrules.sequential(backward, init=lrules.feedback.binary(), learned=False, whole_batch=True)
asked = lrules.sequential(asking, state=lambda layer: jnp.zeros(()), numbers={"rate": {"first": 0.1, ".*": 1.0}})
sent = lrules.direct(signal, init=lrules.feedback.sparse(2), at=["first", "second"], rank=2, error_at="outputs")


def conforms() -> None:
    lrules.testing.check_rule(halved)


class Recorded(lrules.extend.Handler):
    def layer(
        self, layer: lrules.extend.Layer, op: lrules.extend.Operation, w: jax.Array, b: Any, x: Any,
        frame: lrules.extend.Frame,
    ) -> Any:  # fmt: skip
        frame.records[layer.at_output] = y = op(w, x)
        return y


def with_a_handler_and_a_state() -> dict[str, Any]:
    _, _, records = lrules.extend.run(mlp, weights, x, [Recorded()])
    feedback = asked.init(key, mlp, weights, x)
    grads = lrules.value_and_grad(mlp, loss, asked)(weights, feedback, x, y, rng=key)[1]
    feedback._replace(state=grads.state)
    return records


def saved() -> lrules.Feedback:
    with tempfile.TemporaryDirectory() as folder:
        lrules.feedback.save(f"{folder}/feedback.npz", lrules.Feedback(weights, {}))
        loaded: lrules.Feedback = lrules.feedback.load(pathlib.Path(folder) / "feedback.npz")
    return loaded


# ------------------------------------------------------------------------------------------------------- what remains


def every_rule() -> list[lrules.Rule]:
    init = jax.nn.initializers.glorot_uniform()
    fa = lrules.feedback_alignment(init)
    return [
        lrules.backprop(),
        lrules.last_layer_only(),
        fa,
        lrules.difference_target_propagation(0.1, first_target="outputs", feedback_loss="jacobian", decoder=None),
        lrules.direct_feedback_alignment(init, shared_axes=[(1, 1)], at="first", error_at="layer"),
        lrules.direct_feedback_alignment(shared_axes=1, rank=4, max_feedback_bytes=2**20),
        lrules.skipped_backprop(passing={"exp"}),
        lrules.sign_symmetry("random"),
        lrules.sign_symmetry(magnitude="fixed", init=init),
        lrules.kolen_pollack(init),
        lrules.direct_kolen_pollack(init, at="first", shared_axes=1, error_at="outputs"),
        lrules.weight_mirror(init, std={"last": 0.5, ".*": 1.0}, noise=jax.random.rademacher, phase="estimation"),
        lrules.direct_feedback_alignment(rank=4, learned_factors=True, normalise_error=True),
        lrules.random_target_projection(init),
        lrules.backman(alpha=0.1),
        lrules.backman({"last": 0.1, ".*": 1.0}),
        lrules.backman(alpha="gradient_norm", axis_name=("data", "model")),
        lrules.monotone_dfa(error_at="outputs"),
        lrules.dual_propagation(beta=0.01, iterations=3, order="forward", output="refreshed"),
        lrules.dual_propagation(alpha={"relu": 0.0, ".*": 1.0}, adjoint=False, damping="spectral", feedback_rule=fa),
        lrules.dual_propagation(adjoint=False, damping=0.5, input_nudge=1.0, tolerance=1e-3, passing="tanh"),
        lrules.predictive_coding(8, step_size=0.2, states="pre_activation", fixed_predictions=True, tolerance=1e-3),
        lrules.equilibrium_propagation(0.1, centred=False, free_steps=40, nudged_steps=8, output="state"),
        lrules.node_perturbation(0.01, direct=True, solver="sgd", noise=jax.random.normal),
        lrules.forward_gradient(directions=2, noise=jax.random.rademacher),
        lrules.forward_gradient("activations", method="central", std=1e-3),
        lrules.forward_gradient(perturb="activations", local=lrules.local_losses()),
        lrules.local_losses("both", similarity=0.9, factor={"last": 0.0, ".*": 1.0}, init=init, at="last"),
        lrules.partition({"last": lrules.backprop(), ".*": fa}),
        lrules.modify_error(fa, lambda s, name, rng: 0.5 * s),
        lrules.modify_error(fa, lambda s, name, rng, factor: factor * s, numbers={"factor": {"last": 0.5, ".*": 1.0}}),
        lrules.quantize_error(fa, 3, at="output"),
        lrules.quantize_update(fa, bits=3, scale=2**-6),
        lrules.drop_error(fa, {"last": 0.5, ".*": 0.0}),
        lrules.sign_error(fa, axis_name="data"),
        lrules.magnitude_error(fa),
        lrules.replace_derivative(fa, jnp.cos),
        lrules.without_derivatives(fa, passing=["exp"]),
    ]


@lrules.activation
def bent(x: jax.Array) -> jax.Array:
    return x + jnp.sin(x)


@lrules.not_activation
def kept(x: jax.Array) -> jax.Array:
    return jnp.exp(x)


def what_is_told() -> Any:
    assert lrules.__version__
    net = lrules.Network(mlp, batch_axes=0, signal_axes={"outputs": 0})
    rule = lrules.feedback_alignment()
    feedback = rule.init(key, net, weights, x)
    for name, reason in lrules.refusals(net, rule, weights, x).items():
        print(name.upper(), reason.upper())
    routes = [row["route"] for row in lrules.audit(net, rule, weights, x).rows]
    updates = lrules.value_and_grad(net, loss, rule)(weights, feedback, x, y)[1].params
    angle: jax.Array = diagnostics.total_angle(updates, weights)
    angles: dict[str, jax.Array] = {name: each.angle for name, each in diagnostics.agreement(updates, weights).items()}
    aligned = diagnostics.weight_alignment(feedback, weights)
    norms = diagnostics.spectral_norms(net, weights, x), diagnostics.lipschitz_product(net, weights, x)
    return str(lrules.describe(net, rule, weights, x)), routes, angle, angles, aligned, norms, bent(kept(x))


def a_mono_net() -> Any:
    params = monotone.initialize(key, mlp, weights, x, init=monotone.uniform())
    optimizer = optax.chain(optax.sgd(0.1), monotone.constrain(mlp, params, x))
    return optimizer.init(params), monotone.constrained(mlp, params, x)
