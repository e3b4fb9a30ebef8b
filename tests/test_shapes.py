"""Inputs that are not there, batches of symbolic size, and parameters whose names hold slashes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import lrules
from tests import bridge
from tests.sampling import mostly_slow, pairs
from tests.zoo import ZOO, loss

DP, FA, DFA = lrules.dual_propagation, lrules.feedback_alignment(), lrules.direct_feedback_alignment()
QUICK = ("feedback_alignment", "direct_feedback_alignment", "backman", "dual_propagation", "quantize_update")
RULES = {
    "backprop": lrules.backprop(),
    "last_layer_only": lrules.last_layer_only(),
    "feedback_alignment": FA,
    "kolen_pollack": lrules.kolen_pollack(),
    "sign_symmetry": lrules.sign_symmetry(),
    "random_magnitudes": lrules.sign_symmetry("random"),
    "backman": lrules.backman(),
    "gradient_norm": lrules.backman("gradient_norm"),
    "direct_feedback_alignment": DFA,
    "adaptive": lrules.direct_feedback_alignment(adaptive=True),
    "rank": lrules.direct_feedback_alignment(rank=2),
    "monotone_dfa": lrules.monotone_dfa(),
    "random_target_projection": lrules.random_target_projection(),
    "skipped_backprop": lrules.skipped_backprop(),
    "partition": lrules.partition({"a": lrules.backprop(), "b": FA, ".*": lrules.backman()}),
    "dual_propagation": DP(0.2, iterations=3, input_nudge=1.0),
    "parallel": DP(iterations=4, order="parallel", tolerance=1e-3),
    "random_order": DP(iterations=3, order="random"),
    "damped": DP(adjoint=False, damping="spectral", output="refreshed"),
    "squared_error": DP(adjoint=False, output="squared_error", feedback_rule=FA),
    "node_perturbation": lrules.node_perturbation(0.1),
    "least_squares": lrules.node_perturbation(0.1, direct=True, solver="rls"),
    "forward_gradient": lrules.forward_gradient(),
    "central_differences": lrules.forward_gradient(method="central", std=0.1),
    "forward_activations": lrules.forward_gradient("activations"),
    "forward_local": lrules.forward_gradient("activations", local=lrules.local_losses()),
    "local_losses": lrules.local_losses("both"),
    "difference_target_propagation": lrules.difference_target_propagation(feedback_loss="jacobian"),
    "predictive_coding": lrules.predictive_coding(4),
    "pre_activation": lrules.predictive_coding(4, states="pre_activation", fixed_predictions=True),
    "equilibrium_propagation": lrules.equilibrium_propagation(free_steps=4, nudged_steps=3),
    "quantize_error": lrules.quantize_error(FA, 4),
    "quantize_output": lrules.quantize_error(DFA, 4, at="output"),
    "quantize_update": lrules.quantize_update(FA, 4),
    "drop_error": lrules.drop_error(DFA, 0.5),
    "without_derivatives": lrules.without_derivatives(FA),
}
W = {n: jax.random.normal(jax.random.key(i), s) / s[0] ** 0.5 for i, (n, s) in enumerate(
    {"a": (4, 6), "b": (6, 5), "c": (5, 2)}.items())}  # fmt: skip
X, Y = (jax.random.normal(jax.random.key(i), (8, n)) for i, n in ((7, 4), (8, 2)))


def half_square(y, t):
    return 0.5 * jnp.sum((y - t) ** 2, -1)


def mlp(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]


def gradients(net, rule, params, inputs, targets, objective, feedback=None):
    rng = {"rng": jax.random.key(2)} if rule.stochastic else {}
    feedback = rule.init(jax.random.key(1), net, params, inputs) if feedback is None else feedback
    step = lrules.value_and_grad(net, objective, rule)
    return feedback, jax.jit(lambda *args: step(*args, **rng)[1]._replace(report={}))(params, feedback, inputs, targets)


# -------------------------------------------------------------------------------------------------- what is not there


def optional(p, inputs):
    """With a mask or without, an output that may be missing, and a state that may be."""
    h = jax.nn.relu(inputs["x"] @ p["net"]["a"])
    h = h if inputs["mask"] is None else h * inputs["mask"][:, None]
    out = jax.nn.relu(h @ p["net"]["b"]) @ p["net"]["c"]
    return {"logits": out, "extra": None}, {"state": inputs["state"]}


AXES = {
    "one": 0,
    "none of None": {"x": 0, "mask": None, "state": None},
    "of None": {"x": 0, "mask": 0, "state": 0},
}
IN_TURNS = [(name, list(AXES)[i % 3]) for i, name in enumerate([*QUICK, "feedback_alignment"])]


@pytest.mark.parametrize(("name", "axes"), mostly_slow(pairs(RULES, AXES), IN_TURNS))
def test_none(name, axes):
    """None in the inputs, parameters, outputs, aux and targets is no leaf: all is as without it."""
    rule, axes = RULES[name], AXES[axes]
    targets = {"logits": Y, "weights": None}
    net = lrules.Network(optional, has_aux=True, batch_axes=axes)
    inputs, params = {"x": X, "mask": None, "state": None}, {"net": W | {"bias": None}, "static": None}
    feedback, got = gradients(net, rule, params, inputs, targets, lambda y, t: half_square(y["logits"], t["logits"]))
    assert jax.tree.structure(got.params) == jax.tree.structure(params)
    without = lambda p, x: mlp(p["net"], x)  # noqa: E731
    want_feedback, want = gradients(without, rule, {"net": W}, X, Y, half_square)
    named = lambda feedback: {k.removeprefix("net/") for k in {**feedback.fixed, **feedback.learned}}  # noqa: E731
    assert named(feedback) == named(want_feedback)
    bridge.close(got.params["net"] | {"bias": 0}, want.params["net"] | {"bias": 0}, 1e-5)


@pytest.mark.foreign
@pytest.mark.parametrize("name", ["feedback_alignment", "direct_feedback_alignment", "quantize_update", "parallel"])
def test_equinox_partition(name):
    """`eqx.partition` leaves None in the parameters and in the rest, which may be closed over or be an input."""
    rule, model = RULES[name], eqx.nn.MLP(4, 2, 6, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    frozen, arrays = eqx.partition(static, eqx.is_array)
    closed = lambda p, x: jax.vmap(eqx.combine(p, static))(x)  # noqa: E731
    given = lrules.Network(lambda p, i: jax.vmap(eqx.combine(p, i[0], arrays))(i[1]), batch_axes=(None, 0))
    feedback, want = gradients(closed, rule, params, X, Y, half_square)
    _, got = gradients(given, rule, params, (frozen, X), Y, half_square, feedback)
    assert jax.tree.structure(got.params) == jax.tree.structure(params)
    bridge.close(got.params, want.params, 1e-6)


# ------------------------------------------------------------------------------------------------------ symbolic sizes


def exported(step, *args, sizes):
    """`step` exported where each argument has the sizes of `sizes`, and called."""
    shapes = [jax.tree.map(lambda a, s=s: jax.ShapeDtypeStruct(s or a.shape, a.dtype), a)
              for a, s in zip(args, sizes, strict=True)]  # fmt: skip
    leaves = lambda *args: jax.tree.leaves(step(*args))  # noqa: E731
    return export.export(jax.jit(leaves))(*shapes).call(*args)


def merged(p, x):
    """Two positions per example, merged with the batch where the second layer reads them."""
    h = jax.nn.relu(x.reshape(-1, 2, 2) @ p["a"][:2]).reshape(-1, 6)
    return jax.nn.relu(h @ p["b"]).reshape(-1, 2, 5).mean(1) @ p["c"]


NETS = {"mlp": mlp, "merged": merged}
BY_NET = [("merged", name) for name in QUICK] + [("mlp", "direct_feedback_alignment")]


@pytest.mark.parametrize(("net", "name"), mostly_slow(pairs(NETS, sorted(RULES.keys() - {"damped"})), BY_NET))
def test_symbolic_batch(net, name):
    """A step exported for any batch gives what it gives for one."""
    net, rule, (b,) = NETS[net], RULES[name], export.symbolic_shape("b")
    feedback, want = gradients(net, rule, W, X, Y, half_square)

    def step(p, x, y):
        return gradients(net, rule, p, x, y, half_square, feedback)[1]

    got = exported(step, W, X, Y, sizes=(None, (b, 4), (b, 2)))
    bridge.close(dict(enumerate(got)), dict(enumerate(jax.tree.leaves(want))), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["linen_scan", "nnx_einsum", "equinox_cnn", "vmapped_batch_last", "columns"])
@pytest.mark.parametrize("name", ["feedback_alignment", "direct_feedback_alignment"])
def test_symbolic_batch_in_the_zoo(model, name):
    rule, (b,) = RULES[name], export.symbolic_shape("b")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        net, params, inputs = ZOO[model].build()
        feedback, want = gradients(net, rule, params, inputs, None, lambda y, t: loss(y))
        step = lambda p, x: gradients(net, rule, p, x, None, lambda y, t: loss(y), feedback)[1]  # noqa: E731
        (axis,) = net.input_batch_axes(inputs)
        sizes = (*inputs.shape[:axis], b, *inputs.shape[axis:][1:])
        got = exported(step, params, inputs, sizes=(None, sizes))
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want))
    for a, c in zip(got, jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-5 * scale)


def test_symbolic_batch_refused_by_damping():
    rule, (b,) = RULES["damped"], export.symbolic_shape("b")
    step = lambda p, x, y: gradients(mlp, rule, p, x, y, half_square)[1]  # noqa: E731
    with pytest.raises(NotImplementedError, match="the shapes must be numbers, not symbols: give the batch its size"):
        exported(step, W, X, Y, sizes=(None, (b, 4), (b, 2)))
    exported(step, W, X, Y, sizes=(None, None, None))


def recurrent(p, x):
    def cell(h, x):
        h = jnp.tanh(x @ p["a"] + h @ p["h"])
        return h, h @ p["c"]

    return jnp.moveaxis(jax.lax.scan(cell, jnp.zeros((x.shape[0], 6)), jnp.moveaxis(x, 1, 0))[1], 0, 1)


SEQUENCES = jax.random.normal(jax.random.key(3), (8, 7, 4))
RECURRENT = W | {"h": W["b"] @ W["b"].T, "c": W["b"] @ W["c"]}


@pytest.mark.parametrize("rule", [FA, lrules.direct_feedback_alignment(shared_axes=1), DP()], ids=["FA", "DFA", "DP"])
def test_symbolic_time(rule):
    """Time may be symbolic too, also that of a loop, where no feedback weight has it as an axis."""
    b, t = export.symbolic_shape("b, t")
    objective = lambda y, _: jnp.square(y).sum(-1)  # noqa: E731
    feedback, want = gradients(recurrent, rule, RECURRENT, SEQUENCES, None, objective)
    step = lambda p, x: gradients(recurrent, rule, p, x, None, objective, feedback)[1]  # noqa: E731
    got = exported(step, RECURRENT, SEQUENCES, sizes=(None, (b, t, 4)))
    bridge.close(dict(enumerate(got)), dict(enumerate(jax.tree.leaves(want))), 1e-5)


@pytest.mark.parametrize("rule, error", [(DFA, ValueError), (DP(order="odd_even"), NotImplementedError)])
def test_symbolic_time_refused(rule, error):
    """One sentence, and its first remedy works."""
    b, t = export.symbolic_shape("b, t")
    objective = lambda y, _: jnp.square(y).sum(-1)  # noqa: E731
    feedback, _ = gradients(recurrent, rule, RECURRENT, SEQUENCES, None, objective)
    step = lambda p, x: gradients(recurrent, rule, p, x, None, objective, feedback)[1]  # noqa: E731
    with pytest.raises(error, match=r"symbolic .*t.*: give .* sizes?[ ,]") as refused:
        exported(step, RECURRENT, SEQUENCES, sizes=(None, (b, t, 4)))
    assert "\n" not in str(refused.value)
    exported(step, RECURRENT, SEQUENCES, sizes=(None, (b, 7, 4)))


def test_symbolic_sizes_that_differ():
    b, c = export.symbolic_shape("b, c")
    inputs = [jax.ShapeDtypeStruct((n, 4), jnp.float32) for n in (b, c, 8)]
    with pytest.raises(ValueError, match=r"differ in size, \[b, c, 8\]"):
        lrules.Network(lambda p, i: i).batch_size(inputs)


def test_description_of_a_symbolic_batch():
    (b,) = export.symbolic_shape("b")
    shown = [lrules.describe(mlp, DFA, W, jax.ShapeDtypeStruct((n, 4), jnp.float32)) for n in (b, 8)]
    assert str(shown[0]) == str(shown[1])


# --------------------------------------------------------------------------------------------------------------- names


def test_names_with_slashes():
    """As Haiku's modules have them: `{"mlp/~/linear_0": {"w": ..., "b": ...}}`."""
    params = {f"mlp/~/linear_{i}": {"w": W[n], "b": jnp.zeros(W[n].shape[1])} for i, n in enumerate("abc")}

    def apply(p, x):
        for i in range(3):
            layer = p[f"mlp/~/linear_{i}"]
            x = x @ layer["w"] + layer["b"][None]
            x = jax.nn.relu(x) if i < 2 else x
        return x

    feedback = FA.init(jax.random.key(1), apply, params, X)
    assert set(feedback.fixed) == {"mlp/~/linear_1/w", "mlp/~/linear_2/w"}
    rule = lrules.partition({"mlp/~/linear_0": lrules.backprop(), ".*": lrules.backman()})
    assert gradients(apply, rule, params, X, Y, half_square)[1].params.keys() == params.keys()
    clash = params | {"mlp": {"~/linear_0/w": W["a"]}}
    with pytest.raises(ValueError, match="two parameters are named 'mlp/~/linear_0/w': rename one"):
        FA.init(jax.random.key(1), apply, clash, X)
