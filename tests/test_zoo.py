"""Models x rules: every model of the zoo under every kind of rule, with exactly the layers that its code has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from tests.zoo import ZOO, loss

# Constructs that each need something of their own where the rest of the models are as one of these.
EAGER = ("linen_mlp", "linen_scan", "linen_remat", "nnx_einsum", "conv_grouped", "cond")
BACKMAN = (
    "linen_lenet5", "linen_lstm", "linen_remat", "nnx_scan_remat", "equinox_mlp", "einsum", "conv_grouped", "conv_1d",
    "tied_embedding", "weight_normalisation", "vmapped", "merged_batch_and_time", "sharded_inside",
    "attention_bfloat16",
)  # fmt: skip


# The deepest, and the second of two that differ in dtype or library, are as the others.
USUAL = tuple(name for name in ZOO if name not in ("linen_resnet18", "nnx_transformer_bfloat16", "nnx_lenet5"))


def models(quick=tuple(ZOO)):
    """Parameters `entry`; the tests of one model run in one process, where it is built once."""
    params = [
        pytest.param(m, id=n, marks=[pytest.mark.xdist_group(n), *([] if n in quick else [pytest.mark.slow])])
        for n, m in ZOO.items()
    ]
    return pytest.mark.parametrize("entry", params)


@functools.cache
def build(entry):
    return entry.build()


@pytest.fixture(autouse=True)
def _promotion(request):
    entry = request.getfixturevalue("entry")
    if not entry.foreign:
        yield
    else:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield


def errors(a, b):
    """The largest difference of each pair of leaves, relative to the largest entry of the second.

    Gradients that vanish but for rounding (an attention key's bias) are measured by the largest of all leaves.
    """
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    wide = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs]
    floor = max([1e-6, *(1e-3 * np.max(np.abs(y), initial=0) for _, y in wide)])
    return [np.max(np.abs(x - y), initial=0) / max(np.max(np.abs(y), initial=0), floor) for x, y in wide]


def outputs_of(net, out):
    return out[0] if net.has_aux else out


def learn(entry, f, params):
    """What `f(params)` returns, and its gradient."""
    net = build(entry)[0]

    def objective(p):
        out = f(p)
        return loss(outputs_of(net, out)).mean(), out

    grads, out = jax.grad(objective, has_aux=True)(params)
    return out, grads


@functools.cache
def plain(entry):
    """The outputs and the gradients of the network as it is."""
    net, params, inputs = build(entry)
    return jax.jit(lambda p: learn(entry, lambda p: net(p, inputs), p))(params)


def compiled(entry, rule):
    """`(params, feedback) -> (outputs, gradients)`."""
    net, _, inputs = build(entry)
    f = lrules.transform(net, rule)
    return jax.jit(lambda p, feedback: learn(entry, lambda p: f(p, feedback, inputs), p))


def same(ours, wanted):
    """The outputs agree bit for bit."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@models()
def test_layers(entry):
    """The layers found are those of the model's code, in program order."""
    net, params, inputs = build(entry)
    graph = net.graph(params, inputs)
    found = tuple((tuple(sorted(layer.parameters)), layer.operation) for layer in graph.layers)
    assert found == entry.layers
    if entry.hidden is not None:
        assert len([h for h in graph.hidden if not h.mark]) == entry.hidden


@models(quick=USUAL)
def test_sequential(entry):
    """FA with the weights as feedback is `jax.grad`; other feedback changes all below; the forward pass is the same."""
    net, params, inputs = build(entry)
    rule = lrules.feedback_alignment()
    feedback = rule.init(jax.random.key(2), net, params, inputs)
    named = {lrules.network.parameter_name(k): v for k, v in jax.tree_util.tree_leaves_with_path(params)}
    assert set(feedback.fixed) <= set(named)

    step = compiled(entry, rule)
    outputs, reference = plain(entry)
    ours, grads = step(params, lrules.Feedback({name: named[name] for name in feedback.fixed}, {}))
    same(ours, outputs)
    assert max(errors(grads, reference)) < (5e-2 if "bfloat16" in entry.name else 1e-4)

    ours, other = step(params, feedback)
    same(ours, outputs)
    graph = net.graph(params, inputs)
    top = {layer.name for layer in graph.layers} - below(net, params, inputs)
    for (path, g), r in zip(jax.tree_util.tree_leaves_with_path(other), jax.tree.leaves(reference), strict=True):
        name = lrules.network.parameter_name(path)
        layers = [layer for layer in graph.layers if name in layer.parameters]
        if layers and not set(layer.name for layer in layers) & top and np.any(np.asarray(r, np.float32)):
            assert errors(g, r)[0] > 1e-3, name


@models(quick=EAGER)
def test_without_jit(entry):
    """Step by step a rule gives the same numbers."""
    net, params, inputs = build(entry)
    if "bfloat16" in entry.name:
        pytest.skip("rounds otherwise where operations are fused")
    rule = lrules.feedback_alignment()
    feedback = rule.init(jax.random.key(2), net, params, inputs)
    f = lrules.transform(net, rule)
    _, eager = learn(entry, lambda p: f(p, feedback, inputs), params)
    assert max(errors(eager, compiled(entry, rule)(params, feedback)[1])) < 1e-3


def below(net, params, inputs):
    """The layers that error reaches only through the feedback of another layer."""
    rule = lrules.last_layer_only()
    try:
        rows = lrules.describe(net, rule, params, inputs).layers
    except NotImplementedError:
        return set()
    names = [row["layer"].split("#")[0] for row in rows]
    return {n for n, row in zip(names, rows, strict=True) if "output" not in row["reached by"].split(", ")}


@models(quick=BACKMAN)
def test_backman(entry):
    """Each neuron's weight gradient has norm alpha (or is dead), for weights that are used once."""
    net, params, inputs = build(entry)
    _, grads = compiled(entry, lrules.backman(alpha=0.5))(params, lrules.Feedback({}, {}))
    assert all(np.all(np.isfinite(np.asarray(g, np.float32))) for g in jax.tree.leaves(grads))
    graph = net.graph(params, inputs)
    named = {lrules.network.parameter_name(k): v for k, v in jax.tree_util.tree_leaves_with_path(grads)}
    checked = 0
    for layer in graph.layers:
        uses = [other for other in graph.layers if set(other.parameters) & set(layer.parameters)]
        weight = named[layer.name]
        computed = len(layer.parameters) > 1 or weight.shape != layer.weight.aval.shape
        if len(uses) > 1 or computed or "scan" in layer.scope:
            continue
        norms = np.sqrt(np.sum(np.asarray(weight, np.float64) ** 2, axis=tuple(layer.contracted)))
        tolerance = 1e-2 if weight.dtype == jnp.bfloat16 or "bfloat16" in entry.name else 1e-4
        assert np.all((np.abs(norms - 0.5) < tolerance) | (norms < 0.5)), layer.name
        assert np.any(np.abs(norms - 0.5) < tolerance) or not np.any(norms), layer.name
        checked += 1
    assert checked or entry.name in NOT_CHECKED


def routes(entry, rule):
    net, params, inputs = build(entry)
    return {row["parameter"]: row["route"] for row in lrules.audit(net, rule, params, inputs).rows}


@models(quick=USUAL)
def test_audit(entry):
    """The program of the gradients multiplies error by no parameter that is neither a layer's, a bias nor a scale."""
    found = routes(entry, lrules.feedback_alignment())
    for name in {name for names, _ in entry.layers for name in names}:
        assert set(found[name].split("; ")) <= {"layer", "layer, feedback", "last layer, feedback"}, name
    assert any(route.endswith("layer, feedback") for route in found.values())


RULES = {
    "backprop": lrules.backprop(),
    "last_layer_only": lrules.last_layer_only(),
    "direct_feedback_alignment": lrules.direct_feedback_alignment(),
    "kolen_pollack": lrules.kolen_pollack(),
    "weight_mirror": lrules.weight_mirror(),
    "sign_symmetry": lrules.sign_symmetry(),
    "backman": lrules.backman(),
    "skipped_backprop": lrules.skipped_backprop(),
    "dual_propagation": lrules.dual_propagation(),
    "node_perturbation": lrules.node_perturbation(0.1),
    "difference_target_propagation": lrules.difference_target_propagation(),
    "predictive_coding": lrules.predictive_coding(),
    "equilibrium_propagation": lrules.equilibrium_propagation(nudged_steps=20),
    "modified": lrules.sign_error(lrules.feedback_alignment()),
    "partition": lrules.partition({".*": lrules.backprop()}),
}


@models(quick=())
@pytest.mark.parametrize("name", RULES)
def test_audit_under_every_rule(entry, name):
    """Each parameter of a layer learns by the rule, or the rule refuses the model."""
    try:
        found = routes(entry, RULES[name])
    except (NotImplementedError, ValueError) as error:
        assert name not in ("backprop", "kolen_pollack", "sign_symmetry", "backman", "modified", "partition"), error
        return
    layers = {name for names, _ in entry.layers for name in names}
    wanted = "backprop" if name in ("backprop", "partition") else "layer"
    for layer in layers:
        assert wanted in found[layer], (layer, found[layer])


# Every weight of these is scanned, tied, split or computed.
NOT_CHECKED = {"tied_autoencoder", "weight_normalisation", "fori_loop"}


@models(quick=USUAL)
def test_direct(entry):
    """DFA: every hidden signal gets e.B and nothing else, or the model is refused with a sentence."""
    net, params, inputs = build(entry)
    rule = lrules.direct_feedback_alignment()
    if not entry.direct:
        with pytest.raises(NotImplementedError, match="direct feedback cannot land"):
            rule.init(jax.random.key(2), net, params, inputs)
        return
    feedback = rule.init(jax.random.key(2), net, params, inputs)
    step = compiled(entry, rule)
    outputs, grads = step(params, feedback)
    same(outputs, plain(entry)[0])
    assert all(np.all(np.isfinite(np.asarray(g, np.float32))) for g in jax.tree.leaves(grads))
    # With feedback of zero nothing arrives below, and what the outputs reach without feedback stays as it is.
    silent = step(params, jax.tree.map(jnp.zeros_like, feedback))[1]
    _, ends = compiled(entry, lrules.last_layer_only())(params, lrules.Feedback({}, {}))
    assert max(errors(silent, ends)) < 1e-4
    # Each feedback weight matters.
    for name in feedback.fixed:
        without = feedback._replace(fixed={**feedback.fixed, name: jnp.zeros_like(feedback.fixed[name])})
        assert max(errors(step(params, without)[1], grads)) > 1e-6, name


# What each of these has is treated in a way of its own where a weight is used.
PHASE = ("linen_scan", "conv_grouped", "cond", "sharded_inside", "tied_embedding", "weight_normalisation", "vmapped")


@models(quick=PHASE)
def test_phase_of_feedback(entry):
    """An estimate learns from noise at every layer that reads a hidden signal, and rests where B is the weight."""
    net, params, inputs = build(entry)
    rule = lrules.weight_mirror(phase="estimation")
    feedback = jax.jit(lambda key: rule.init(key, net, params, inputs))(jax.random.key(0))
    gradient = jax.jit(lrules.feedback_grad(net, rule))
    moved = gradient(params, feedback, inputs, rng=jax.random.key(1))
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, feedback.learned)
    assert all(bool(jnp.isfinite(g).all()) for g in moved.values())
    still = [name for name, g in moved.items() if not bool(jnp.any(g))]
    assert not still or entry.name == "cond", still  # the branch that is not taken
    weights = lrules.Feedback({}, {name: leaf for name, leaf in by_name(params).items() if name in moved})
    rests = gradient(params, weights, inputs, rng=jax.random.key(1))
    for name, g in rests.items():
        assert float(jnp.max(jnp.abs(g))) <= 1e-5 * float(jnp.max(jnp.abs(moved[name]))), name


def by_name(tree):
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path).removesuffix("/value"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
