"""Mistakes in a user's program: at each, mypy and pyright report the error that its line names, and no other.

Both also report an error that is named and not found (see test_typing.py).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import lrules


def mlp(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ params["first"]


def loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return ((outputs - targets) ** 2).sum(-1)


def loss_of_all(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    return loss(mlp(params, x), y)


x = y = jnp.ones((2, 3))
params, key = {"first": jnp.ones((3, 3))}, jax.random.key(0)
rule = lrules.feedback_alignment()
feedback = rule.init(key, mlp, params, x)
f, step = lrules.transform(mlp, rule), lrules.value_and_grad(mlp, loss, rule)

# a factory that is not called
lrules.transform(mlp, lrules.backprop)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
lrules.value_and_grad(mlp, loss, lrules.feedback_alignment)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
lrules.partition({".*": lrules.backprop})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]
lrules.sign_error(lrules.backprop)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
lrules.testing.check_rule(lrules.backprop)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
lrules.describe(mlp, lrules.backprop, params, x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

# the arguments of what transform and value_and_grad return
f(params, x)  # type: ignore[call-arg, arg-type]  # pyright: ignore[reportCallIssue]
f(params, x, feedback)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
f(params, feedback, x, key)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
f(params, feedback, x, rngs=key)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
step(params, feedback, x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
step(params, x, y)  # type: ignore[call-arg, arg-type]  # pyright: ignore[reportCallIssue]
step(params, feedback, x, y, key)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
step(params, {}, x, y)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
print(step(params, feedback, x, y)[1].param)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]

# arguments left out, or in another order
lrules.value_and_grad(mlp, rule, loss)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
lrules.value_and_grad(mlp, rule)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
lrules.transform(rule, mlp)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
lrules.transform(loss_of_all, rule)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
rule.init(key, mlp, params)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
lrules.node_perturbation()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
lrules.Network(mlp, True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

# an option that is misspelt
lrules.transform(mlp, rule, reduction="average")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
lrules.sign_symmetry("units")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
lrules.sign_symmetry(magnitudes="unit")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
lrules.node_perturbation(0.1, solver="SGD")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
lrules.dual_propagation(order="backward")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
lrules.dual_propagation(output="all")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
lrules.dual_propagation(damping="spectrum")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
lrules.direct_feedback_alignment(error_at="logits")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
lrules.direct(None, error_at="logits")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
lrules.monotone_dfa(error_at="logits")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
lrules.quantize_error(rule, 3, at="outputs")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
lrules.backman(alpha="gradient")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

# an option of another kind
lrules.feedback_alignment(init="glorot")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
lrules.direct_feedback_alignment(rank="4")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
lrules.quantize_update(rule, bits=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
lrules.dual_propagation(feedback_rule=0.1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
lrules.Network(mlp, signal_axes="outputs")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
lrules.hidden(x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
lrules.hidden(x, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

# what from_nnx and from_linen return
net, state, more = lrules.from_nnx(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))  # type: ignore[misc]  # pyright: ignore[reportAssignmentType]
net, state = lrules.from_nnx(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), with_state=True)  # type: ignore[misc]  # pyright: ignore[reportAssignmentType]
net, state, more = lrules.from_linen(nn.Dense(3), {})  # type: ignore[misc]  # pyright: ignore[reportAssignmentType]
lrules.from_linen(nn.Dense(3))  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
lrules.from_nnx(nn.Dense(3))  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]

# names that are not public
print(lrules.monotone.Handler)  # type: ignore[attr-defined]  # pyright: ignore[reportPrivateImportUsage]
print(lrules.feedback.draw)  # type: ignore[attr-defined]  # pyright: ignore[reportPrivateImportUsage]
print(lrules.diagnostics.as_network)  # type: ignore[attr-defined]  # pyright: ignore[reportPrivateImportUsage]
print(lrules.testing.jnp)  # type: ignore[attr-defined]  # pyright: ignore[reportPrivateImportUsage]
