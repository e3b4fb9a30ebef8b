"""Every rule on one device and on many: what differs between them, as numbers.

As a program it prints one line of JSON: by case, layout and precision how far the gradients are from those of one
device. Tests start it with the devices and processes that they ask for.
"""

import functools
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

import lrules
from experiments import devices, models, rules

BATCH = 16
WIDE = 8  # the layers of the test are small

# By name: a rule; AXIS stands for the axis of the mesh over which the batch is spread, under shard_map.
EXPRESSIONS = {
    "backprop": "backprop",
    "last_layer_only": "last_layer_only",
    "feedback_alignment": "feedback_alignment",
    "adaptive_sequential": "feedback_alignment(adaptive=True)",
    "kolen_pollack": "kolen_pollack",
    "sign_symmetry": "sign_symmetry",
    "random_magnitudes": "sign_symmetry('random')",
    "fixed_magnitudes": "sign_symmetry('fixed')",
    "backman": "backman(0.5, axis_name=AXIS)",
    "gradient_norm": "backman('gradient_norm', axis_name=AXIS)",
    "direct_feedback_alignment": "direct_feedback_alignment",
    "adaptive": "direct_feedback_alignment(adaptive=True)",
    "rank": "direct_feedback_alignment(rank=2)",
    "monotone_dfa": "monotone_dfa",
    "random_target_projection": "random_target_projection",
    "skipped_backprop": "skipped_backprop",
    "direct_kolen_pollack": "direct_kolen_pollack",
    "weight_mirror": "weight_mirror",
    "both_factors": "direct_feedback_alignment(rank=3, learned_factors=True)",
    "normalised_error": "direct_feedback_alignment(normalise_error=True)",
    "partition": "partition({'layers/1': backman(axis_name=AXIS), '.*': feedback_alignment})",
    "dual_propagation": "dual_propagation(0.2, iterations=3, axis_name=AXIS)",
    "dual_parallel": "dual_propagation(iterations=6, order='parallel', tolerance=1e-3, axis_name=AXIS)",
    "dual_random": "dual_propagation(iterations=2, order='random', axis_name=AXIS)",
    "dual_damped": "dual_propagation(adjoint=False, damping='spectral', output='refreshed', axis_name=AXIS)",
    "dual_squared": "dual_propagation(adjoint=False, output='squared_error', feedback_rule=fa, axis_name=AXIS)",
    "predictive_coding": "predictive_coding(6, tolerance=1e-3, axis_name=AXIS)",
    "pre_activation": "predictive_coding(6, states='pre_activation', fixed_predictions=True)",
    "equilibrium_propagation": "equilibrium_propagation(free_steps=5, nudged_steps=4)",
    "node_perturbation": "node_perturbation(0.1)",
    "forward_gradient": "forward_gradient",
    "central_differences": "forward_gradient(method='central', std=0.01, directions=2)",
    "forward_activations": "forward_gradient('activations')",
    "local_losses": "local_losses",
    "least_squares": "node_perturbation(0.1, direct=True, solver='rls')",
    "least_squares_below": "node_perturbation(0.1, solver='rls')",
    "quantize_error": "quantize_error(feedback_alignment, 4, axis_name=AXIS)",
    "quantize_output": "quantize_error(srbp, 4, at='output', axis_name=AXIS)",
    "quantize_update": "quantize_update(feedback_alignment, 4, axis_name=AXIS)",
    "quantize_backman": "quantize_update(backman(axis_name=AXIS), 4, axis_name=AXIS)",
    "sign_error": "sign_error(feedback_alignment, axis_name=AXIS)",
    "magnitude_error": "magnitude_error(srbp)",
    "drop_error": "drop_error(kolen_pollack, 0.3)",
    "replace_derivative": "replace_derivative(srbp, derivative(sigmoid))",
    "without_derivatives": "without_derivatives(feedback_alignment)",
    # Rules made with the constructors: what their functions ask for by name.
    "difference_target_propagation": "difference_target_propagation",
    "redrawn_direct": "redrawn_direct",
}
QUICK = ("feedback_alignment", "adaptive", "backman", "dual_propagation", "node_perturbation", "quantize_update")
# Under jit with a split batch (and with split layers); under shard_map, where the objective is one mean over all
# devices, or each device has the mean of its own share and the gradients are averaged.
LAYOUTS = ("data", "data x model", "shard_map", "shard_map, own means")

# Rules that draw noise for each example. Under shard_map each device draws for its own share, with its number in the
# key; one device can be told to draw the same.
OWN_NOISE = {
    "node_perturbation", "least_squares", "least_squares_below", "drop_error", "difference_target_propagation",
    "forward_activations",
}  # fmt: skip
# These need the gradient of the whole batch: its mean is not that of the devices' means.
WHOLE_BATCH = {"backman", "gradient_norm", "partition", "quantize_backman"}
# Feedback that these learn does not come from the error, so it knows nothing of an objective over all devices.
OWN_MEANS = {"difference_target_propagation"}


class Net(nnx.Module):
    """Convolutions with batch normalisation; `axis_name` as in `nnx.BatchNorm`."""

    def __init__(self, dtype, clips, axis_name=None):
        more = {"rngs": nnx.Rngs(0), "dtype": dtype}
        self.activation = jax.nn.hard_tanh if clips else jnp.tanh
        self.conv1 = nnx.Conv(2, 8, (3, 3), use_bias=False, **more)
        self.norm = nnx.BatchNorm(8, axis_name=axis_name, **more)
        self.conv2 = nnx.Conv(8, 8, (3, 3), strides=2, **more)
        self.out = nnx.Linear(8, 4, **more)

    def __call__(self, x):
        x = self.activation(self.norm(self.conv1(x)))
        return self.out(self.activation(self.conv2(x)).mean((1, 2)))


class Case:
    """A network with its parameters, inputs and targets, as one device has them."""

    def __init__(self, name, dtype, clips):
        self.name, self.dtype, self.clips = name, dtype, clips  # whether its activation clips
        rng = np.random.default_rng(0)
        shape = (6,) if name == "mlp" else (4, 4, 2)
        self.x = jnp.asarray(rng.normal(size=(BATCH, *shape)), dtype)
        self.y = jnp.asarray(rng.integers(0, 4, BATCH), jnp.int32)
        self.net, self.params, self.state = self.make(None)

    def make(self, axis_name):
        """`(net, params, state)`; the state is None where the network has none."""
        if self.name == "mlp":
            activation = jax.nn.hard_tanh if self.clips else jnp.tanh
            model = models.MLP((6, 16, 8, 4), activation, rngs=nnx.Rngs(0), dtype=self.dtype)
            net, params = lrules.from_nnx(model)
            return net, self.cast(params), None
        net, params, state = lrules.from_nnx(Net(self.dtype, self.clips, axis_name), with_state=True)
        return net, self.cast(params), self.cast(state)

    def cast(self, tree):
        floating = lambda v: jnp.issubdtype(v.dtype, jnp.floating)  # noqa: E731
        return jax.tree.map(lambda v: v.astype(self.dtype) if floating(v) else v, tree)

    def inputs(self, state, x):
        return x if self.name == "mlp" else (state, x)

    def loss(self, outputs, targets):
        wanted = jax.nn.one_hot(targets, 4, dtype=outputs.dtype)
        return 0.5 * jnp.sum((outputs - wanted) ** 2, -1)


def noise_by_shares(key, shape, dtype, parts):
    """What `parts` devices draw for their shares of the batch, each with its own number in the key."""
    share = (shape[0] // parts, *shape[1:])
    return jnp.concatenate([jax.random.normal(jax.random.fold_in(key, i), share, dtype) for i in range(parts)])


def dropped_by_shares(signal, name, rng, parts):
    keys = [jax.random.fold_in(rng, i) for i in range(parts)] if parts > 1 else [rng]
    share = (signal.shape[0] // parts, *signal.shape[1:])
    kept = jnp.concatenate([jax.random.bernoulli(key, 0.7, share) for key in keys])
    return jnp.where(kept, signal / 0.7, jnp.zeros_like(signal))


def rule_of(name, axis=None, parts=None):
    """The rule.

    Args:
      name: its name in `EXPRESSIONS`.
      axis: the axis over which a shard_map spreads the batch.
      parts: for rules that draw noise for each example: how many devices draw it, each for its share. 1 is what such a
        device itself does.
    """
    if parts and name == "drop_error":
        fn = functools.partial(dropped_by_shares, parts=parts)
        return lrules.modify_error(lrules.kolen_pollack(), fn, stochastic=True)
    if parts and parts > 1 and name in OWN_NOISE:
        noise = functools.partial(noise_by_shares, parts=parts)
        if name == "forward_activations":
            return lrules.forward_gradient("activations", noise=noise)
        if name == "difference_target_propagation":
            return lrules.difference_target_propagation(noise=noise)
        options = {"direct": name == "least_squares", "solver": "sgd" if name == "node_perturbation" else "rls"}
        return lrules.node_perturbation(0.1, noise=noise, **options)
    return rules.parse(EXPRESSIONS[name].replace("AXIS", repr(axis)))


def keyed(rule):
    return {"rng": jax.random.key(2)} if rule.stochastic else {}


def gradients(case, rule, params, feedback, state, x, y):
    """`(value, outputs, ...), gradients` of a step, without the report."""
    step = lrules.value_and_grad(case.net, case.loss, rule)
    head, grads = step(params, feedback, case.inputs(state, x), y, **keyed(rule))
    return head, grads._replace(report={})


@functools.cache
def _case(name, dtype, clips):
    return Case(name, dtype, clips)


@functools.cache
def start(case, name):
    """The feedback, drawn on one device."""
    init = functools.partial(rule_of(name).init, jax.random.key(1), case.net)
    return jax.jit(init)(case.params, case.inputs(case.state, case.x))


@functools.cache
def alone(case, name, parts=None):
    """The step on one device."""
    step = functools.partial(gradients, case, rule_of(name, parts=parts))
    return jax.device_get(jax.jit(step)(case.params, start(case, name), case.state, case.x, case.y))


def under_jit(case, name, mesh):
    """The step with a split batch, and the feedback as it is drawn there."""
    rule = rule_of(name)
    params, state = devices.place((case.params, case.state), mesh, wide=WIDE)
    lies = lrules.feedback.shardings(rule, case.net, params, case.inputs(state, case.x))
    feedback = devices.place(start(case, name), mesh, lies=lies)
    x, y = devices.place_batch((case.x, case.y), mesh)

    def step(carry, key, x, y):
        params, feedback, state = carry
        drawn = rule.init(jax.random.key(1), case.net, params, case.inputs(state, x))
        head, grads = gradients(case, rule, params, feedback, state, x, y)
        return (grads.params, grads.feedback), (head, grads, drawn)

    sharded = jax.jit(devices.shard_step(step, mesh, wide=WIDE))
    _, (head, grads, drawn) = sharded((params, feedback, state), jax.random.key(0), x, y)
    return devices.gather((head, grads)), devices.gather(drawn)


def under_shard_map(case, name, mesh, own_means=False):
    """The gradients of the mean over all devices, of which each has its share of the batch."""
    parts = mesh.shape["data"]
    axis = None if own_means and not name.startswith("dual") else "data"  # states settle together in both
    rule = rule_of(name, axis, parts=1 if name in OWN_NOISE else None)
    net = case.make("data")[0]
    # The axis `model` has no part in this; every device along it does the same.
    specs = {"in_specs": (P(), P(), P(), P("data"), P("data")), "out_specs": (P(), P(), P())}

    @functools.partial(jax.shard_map, mesh=mesh, **specs)
    def step(params, feedback, state, x, y):
        inputs = case.inputs(state, x)
        if not own_means and lrules.testing.serves_transform(rule, net):
            f = lrules.transform(net, rule)

            def objective(params, learned):
                out = f(params, feedback._replace(learned=learned), inputs, **keyed(rule))
                outputs = out[0] if net.has_aux else out
                return jax.lax.pmean(case.loss(outputs, y).mean(), "data")

            return *jax.grad(objective, (0, 1))(params, feedback.learned), feedback.state
        _, grads = lrules.value_and_grad(net, case.loss, rule)(params, feedback, inputs, y, **keyed(rule))
        return *jax.tree.map(lambda g: g / parts, (grads.params, grads.feedback)), grads.state

    placed = devices.place((case.params, start(case, name), case.state), mesh)
    x, y = devices.place_batch((case.x, case.y), mesh)
    return devices.gather(jax.jit(step)(*placed, x, y))


def distance(got, want):
    """The largest difference, relative to the largest number of the same array (or a thousandth of all arrays')."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    size = lambda v: float(np.max(np.abs(v.astype(np.float64)), initial=0))  # noqa: E731
    floor = 1e-3 * max([1e-3, *(size(w) for w in want)])
    found = [size(np.asarray(g, np.float64) - w) / max(size(w), floor) for g, w in zip(got, want, strict=True)]
    assert all(np.shape(g) == np.shape(w) for g, w in zip(got, want, strict=True))
    return max(found, default=0.0)


def difference(net, name, layout, dtype, mesh):
    """How far a rule is from one device; in its own precision."""
    case = _case(net, dtype, name == "dual_damped")
    shared = layout.startswith("shard_map")
    parts = mesh.shape["data"] if shared and name in OWN_NOISE else None
    head, want = alone(case, name, parts)
    if shared:
        got = under_shard_map(case, name, mesh, layout != "shard_map")
        return distance(got, (want.params, want.feedback, want.state))
    got, drawn = under_jit(case, name, mesh)
    return max(distance(got, (head, want)), distance(drawn, jax.device_get(start(case, name))))


def mesh_for(layout):
    return devices.make_mesh("all", "model=2" if layout == "data x model" else None)


def served(net, name, layout):
    """Whether there is something to compare."""
    if net == "cnn" and name in ("partition", "least_squares_below"):
        return False  # its pattern names a layer of the other network; it serves dense layers only
    if layout == "shard_map":
        return name not in OWN_MEANS
    return layout != "shard_map, own means" or name not in WHOLE_BATCH


def main():
    """Arguments: a file for the results; networks, layouts (separated by semicolons), dtypes and rules (by commas)."""
    file, nets, layouts, dtypes, names = sys.argv[1:]
    several = devices.initialize_processes(timeout=120)
    jax.config.update("jax_enable_x64", "float64" in dtypes)
    found = {"devices": jax.device_count(), "processes": jax.process_count()}
    for net in nets.split(","):
        for name in names.split(","):
            for layout in layouts.split(";"):
                for dtype in dtypes.split(","):
                    if served(net, name, layout):
                        key = f"{net}, {name}, {layout}, {dtype}"
                        found[key] = difference(net, name, layout, jnp.dtype(dtype), mesh_for(layout))
    if devices.is_first():
        with open(file, "w") as out:
            json.dump(found, out)
    if several:
        jax.distributed.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
