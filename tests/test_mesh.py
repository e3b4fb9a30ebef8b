"""Weights split over explicit axes of a mesh: every rule as on one device, and feedback where what it stands for is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

import lrules
from tests.sampling import mostly_slow, pairs
from tests.test_shapes import QUICK, RULES, half_square

P = PartitionSpec
MORE = {
    "at": lrules.direct_feedback_alignment(at=["b", "c"]),
    "congruent": lrules.feedback_alignment(lrules.feedback.congruent()),
    "fixed_magnitudes": lrules.sign_symmetry("fixed"),
    "least_squares_below": lrules.node_perturbation(0.1, solver="rls"),
    "drop_sequential": lrules.drop_error(lrules.kolen_pollack(), 0.3),
    "quantize_backman": lrules.quantize_update(lrules.backman(), 4),
    "quantize_direct": lrules.quantize_update(lrules.direct_feedback_alignment(), 4),
    "sign_error": lrules.sign_error(lrules.kolen_pollack()),
    "magnitude_error": lrules.magnitude_error(lrules.direct_feedback_alignment()),
    "replace_derivative": lrules.replace_derivative(lrules.feedback_alignment(), jax.nn.sigmoid),
}
ALL = RULES | MORE
W = {n: jax.random.normal(jax.random.key(i), s) / s[0] ** 0.5 for i, (n, s) in enumerate(
    {"a": (4, 8), "b": (8, 8), "c": (8, 4), "bias": (8,)}.items())}  # fmt: skip
SPLIT = {"a": P(None, "model"), "b": P("model", None), "c": P(None, "model"), "bias": P("model")}
X, Y = (jax.random.normal(jax.random.key(i), (8, 4)) for i in (7, 8))


def columns_and_rows(p, x, batch):
    """The first layer makes split features, which the second sums over; the outputs are split again."""
    h = jax.nn.relu(x @ p["a"] + p["bias"][None])
    h = jax.nn.relu(jnp.dot(h, p["b"], out_sharding=batch))
    return h @ p["c"]


def gathered(p, x, batch):
    """Features are split where they are made and whole where they are read, also past the layer."""
    lay = (lambda v, *spec: v) if batch is None else lambda v, *spec: reshard(v, P(*spec))
    h = jax.nn.relu(x @ p["a"] + p["bias"][None])
    g = jax.nn.relu(lay(h, "batch") @ lay(p["b"]))
    return (lay(h, "batch") + g) @ p["c"]


def split_views(p, x, batch):
    """A layer reads split features after a reshape."""
    h = jax.nn.relu(x @ p["a"]).reshape(x.shape[0], 2, 4)
    b = p["b"].reshape(2, 4, 8)
    h = jax.nn.relu(jnp.einsum("bij,ijk->bk", h, b, out_sharding=batch))
    return h @ p["c"]


def merged_batch(p, x, batch):
    """The batch is merged with two steps where layers read it."""
    h = jnp.stack([x, jnp.sin(x)], 1).reshape(-1, 4)
    h = jax.nn.relu(h @ p["a"] + p["bias"][None])
    h = jax.nn.relu(jnp.dot(h, p["b"], out_sharding=batch))
    return h.reshape(x.shape[0], 2, 8).sum(1) @ p["c"]


def gradients(net, rule, params, x, y, feedback=None, lift=jax.jit):
    rng = {"rng": jax.random.key(2)} if rule.stochastic else {}
    feedback = rule.init(jax.random.key(1), net, params, x) if feedback is None else feedback
    step = lrules.value_and_grad(net, half_square, rule)
    return feedback, lift(lambda *args: step(*args, **rng)[1]._replace(report={}))(params, feedback, x, y)


def on_mesh(net, rule, types=(AxisType.Explicit,) * 2, init=lambda f: f, lift=jax.jit, whole=False):
    """`(parameters, feedback, gradients)` with batch and weights split; `whole`: the feedback is not."""
    mesh = jax.make_mesh((2, 2), ("batch", "model"), axis_types=types)
    kept = [n if t == AxisType.Explicit else None for n, t in zip(mesh.axis_names, types, strict=True)]
    put = lambda v, spec: jax.device_put(v, NamedSharding(mesh, spec))  # noqa: E731
    with jax.set_mesh(mesh):
        params = {n: put(v, SPLIT[n]) for n, v in W.items()}
        x, y = put(X, P("batch")), put(Y, P("batch"))
        split = lambda p, x: net(p, x, P(kept[0]) if any(kept) else None)  # noqa: E731
        feedback = init(lambda p, x: rule.init(jax.random.key(1), split, p, x))(params, x)
        if whole:
            feedback = put(jax.device_get(feedback), P())
        return params, *gradients(split, rule, params, x, y, feedback, lift)


def same(got, wanted, tolerance=2e-5):
    got, wanted = jax.device_get((got, wanted))
    for (path, g), w in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        scale = max(np.max(np.abs(w), initial=0), 1e-3)
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance * scale, err_msg=str(path))


def alone(net, rule):
    return gradients(lambda p, x: net(p, x, None), rule, W, X, Y)


@pytest.mark.parametrize("name", mostly_slow(ALL, QUICK))
def test_split_features(name):
    """Gradients and feedback are as on one device; gradients lie where the parameters do."""
    rule = ALL[name]
    feedback, want = alone(columns_and_rows, rule)
    params, drawn, got = on_mesh(columns_and_rows, rule)
    same(drawn, feedback, 1e-6)
    same(got, want)
    for n, g in got.params.items():
        assert jax.typeof(g) == jax.typeof(params[n])
    for n, g in got.feedback.items():
        assert jax.typeof(g) == jax.typeof(drawn.learned[n])


DIRECT = ["direct_feedback_alignment", "adaptive", "rank", "skipped_backprop", "random_target_projection"]
HARD = [*DIRECT, "kolen_pollack", "node_perturbation", "quantize_update"]


@pytest.mark.parametrize("net", [gathered, split_views, merged_batch])
@pytest.mark.parametrize("name", mostly_slow(HARD, HARD[:2]))
def test_split_features_read_by_views(name, net):
    feedback, want = alone(net, ALL[name])
    _, drawn, got = on_mesh(net, ALL[name])
    same(drawn, feedback, 1e-6)
    same(got, want)


def automatic_inside(p, x, batch):
    """A hidden signal is made where the mesh has automatic axes."""
    part = lambda h: jnp.tanh(jnp.sort(h, -1))  # noqa: E731
    h = jax.nn.relu(x @ p["a"] + p["bias"][None])
    h = part(h) if batch is None else jax.sharding.auto_axes(part, out_sharding=P("batch"))(h)
    h = jax.nn.relu(jnp.dot(h, p["b"], out_sharding=batch))
    return h @ p["c"]


INSIDE = [*DIRECT[:3], *DIRECT[4:], "kolen_pollack", "quantize_update", "quantize_error", "replace_derivative"]


@pytest.mark.parametrize("name", mostly_slow(INSIDE, [*HARD[:2], "quantize_error", "replace_derivative"]))
def test_split_features_beside_automatic_axes(name):
    feedback, want = alone(automatic_inside, ALL[name])
    _, drawn, got = on_mesh(automatic_inside, ALL[name])
    same(drawn, feedback, 1e-6)
    same(got, want)


@pytest.mark.parametrize(
    "name", mostly_slow(["adaptive", "kolen_pollack", "random_magnitudes", "dual_propagation"], ["adaptive"])
)
@pytest.mark.parametrize("how", ["eager", "init", "whole"])
def test_split_features_otherwise(name, how):
    """Without `jit`, from feedback drawn under `jit`, and from feedback that lies whole on every device."""
    options = {"eager": {"lift": lambda f: f}, "init": {"init": jax.jit}, "whole": {"whole": True}}[how]
    _, drawn, got = on_mesh(columns_and_rows, ALL[name], **options)
    same(got, alone(columns_and_rows, ALL[name])[1])
    for n, g in got.feedback.items():
        assert jax.typeof(g) == jax.typeof(drawn.learned[n])


@pytest.mark.parametrize("types", ["EA", "AE", "AA"])
@pytest.mark.parametrize(
    "name",
    mostly_slow(["adaptive", "kolen_pollack", "node_perturbation", "drop_error", "quantize_update"], ["kolen_pollack"]),
)
def test_mixed_axes(name, types):
    """A mesh with automatic axes, some or all."""
    types = tuple({"E": AxisType.Explicit, "A": AxisType.Auto}[t] for t in types)
    _, _, got = on_mesh(columns_and_rows, ALL[name], types)
    same(got, alone(columns_and_rows, ALL[name])[1])


def test_where_feedback_lies():
    """Sequential feedback as its parameter; direct feedback as the features, before they are gathered."""
    spec = lambda x: tuple(jax.typeof(x).sharding.spec)  # noqa: E731
    _, sequential, _ = on_mesh(columns_and_rows, lrules.feedback_alignment())
    assert {n: spec(b) for n, b in sequential.fixed.items()} == {"b": ("model", None), "c": (None, "model")}
    _, direct, _ = on_mesh(columns_and_rows, lrules.direct_feedback_alignment())
    assert {n: spec(b) for n, b in direct.fixed.items()} == {"b": (None, "model"), "c": (None, None)}
    _, direct, _ = on_mesh(gathered, lrules.direct_feedback_alignment())
    assert {n: spec(b) for n, b in direct.fixed.items()} == {"b": (None, "model"), "c": (None, None)}


def with_state(layer):
    return {"like the weight": jnp.zeros(layer.weight.aval.shape), "n": jnp.zeros(())}


def keep(op, w, b, x, d, layer, *, state):
    return op.weight_gradient(w, x, d), op.passed_down(b, x, d), None, state


LYING = {
    "direct": lrules.direct_feedback_alignment(), "rank": lrules.direct_feedback_alignment(rank=2),
    "learned": lrules.kolen_pollack(), "rls": lrules.node_perturbation(0.1, solver="rls", direct=True),
    "state": lrules.sequential(keep, init=jax.nn.initializers.normal(), state=with_state),
}  # fmt: skip
QUICK_LYING = [("EE", "direct"), ("EE", "rls"), ("EA", "rank"), ("EA", "state"), ("AE", "direct"), ("AE", "learned")]


@pytest.mark.parametrize(("types", "name"), mostly_slow(pairs(["EE", "EA", "AE"], LYING), QUICK_LYING))
def test_shardings_are_where_feedback_lies(types, name):
    """Also the states, with the same types under jit and outside."""
    rule = LYING[name]
    mesh = jax.make_mesh(
        (2, 2), ("batch", "model"), axis_types=tuple({"E": AxisType.Explicit, "A": AxisType.Auto}[t] for t in types)
    )
    batch = P("batch" if types[0] == "E" else None) if "E" in types else None
    net = lambda p, x: columns_and_rows(p, x, batch)  # noqa: E731
    with jax.set_mesh(mesh):
        params = {n: jax.device_put(v, NamedSharding(mesh, SPLIT[n])) for n, v in W.items()}
        x = jax.device_put(X, NamedSharding(mesh, P("batch")))
        init = lambda p, x: rule.init(jax.random.key(1), net, p, x)  # noqa: E731
        drawn, jitted = init(params, x), jax.jit(init)(params, x)
        want = lrules.feedback.shardings(rule, net, params, x)
        told = jax.jit(init, out_shardings=want)(params, x)
    assert jax.tree.map(jax.typeof, drawn) == jax.tree.map(jax.typeof, jitted)
    for a, b, s in zip(*map(jax.tree.leaves, (drawn, told, want)), strict=True):
        assert a.sharding.is_equivalent_to(s, a.ndim) and b.sharding.is_equivalent_to(s, a.ndim)
    same(jitted, jax.device_get(drawn), 1e-6)


def test_a_reshard_is_no_leak():
    """Direct feedback stops at the tensor that is gathered, not behind the gathering, as a skip goes past that."""
    mesh = jax.make_mesh((2, 2), ("batch", "model"))
    with jax.set_mesh(mesh):
        params = {n: jax.device_put(v, NamedSharding(mesh, SPLIT[n])) for n, v in W.items()}
        x = jax.device_put(X, NamedSharding(mesh, P("batch")))
        graph = lrules.Network(lambda p, x: gathered(p, x, P("batch"))).graph(params, x)
    whole = lrules.Network(lambda p, x: gathered(p, x, None)).graph(W, X)
    assert [(h.name, len(h.readers)) for h in graph.hidden] == [(h.name, len(h.readers)) for h in whole.hidden]
    assert [h.root.producer.primitive.name for h in graph.hidden] == [
        h.root.producer.primitive.name for h in whole.hidden
    ]


@pytest.mark.foreign
@pytest.mark.parametrize("name", ["feedback_alignment", "adaptive", "node_perturbation"])
def test_flax_metadata(name):
    """NNX parameters with `out_sharding` metadata."""

    class Model(nnx.Module):
        def __init__(self, rngs, split):
            kernel, bias = {"out_sharding": P(None, "model")}, {"out_sharding": P("model")}
            meta = {"kernel_metadata": kernel, "bias_metadata": bias} if split else {}
            sizes, self.split = ((4, 8), (8, 8), (8, 4)), split
            self.layers = nnx.List(nnx.Linear(i, o, rngs=rngs, **meta) for i, o in sizes)

        def __call__(self, x):
            for i, layer in enumerate(self.layers):
                x = layer(x) if i == 2 else nnx.relu(layer(x))
                x = reshard(x, P("batch", None)) if self.split else x
            return x

    net, params = lrules.from_nnx(Model(nnx.Rngs(0), False))
    _, want = gradients(net, ALL[name], params, X, Y)
    mesh = jax.make_mesh((2, 2), ("batch", "model"))
    with jax.set_mesh(mesh):
        net, params = lrules.from_nnx(Model(nnx.Rngs(0), True))
        x, y = jax.device_put((X, Y), NamedSharding(mesh, P("batch")))
        _, got = gradients(net, ALL[name], params, x, y)
    same(jax.tree.leaves(got), jax.tree.leaves(want))
