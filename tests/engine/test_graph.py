"""Running a traced network: a loop backwards, a rematerialised block and its policy stay what the user wrote."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lrules
from lrules.engine.jaxprs import jaxprs_in_params, scan_counts
from tests.bridge import close

KEY = jax.random.key(0)
RULES = {
    "backprop": lrules.backprop(),
    "feedback_alignment": lrules.feedback_alignment(),
    "kolen_pollack": lrules.kolen_pollack(),
    "sign_symmetry": lrules.sign_symmetry(),
    "backman": lrules.backman(),
    "skipped_backprop": lrules.skipped_backprop(),
    "direct_feedback_alignment": lrules.direct_feedback_alignment(),
    "adaptive": lrules.direct_feedback_alignment(adaptive=True),
    "dual_propagation": lrules.dual_propagation(0.2, iterations=3),
    "parallel": lrules.dual_propagation(0.2, iterations=6, order="parallel"),
    "quantize_error": lrules.quantize_error(lrules.feedback_alignment(), 4),
    "quantize_update": lrules.quantize_update(lrules.feedback_alignment(), 4),
}


def random(**shapes):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape) / shape[-2] ** 0.5) for name, shape in shapes.items()}


def half_square(y, t):
    return 0.5 * jnp.sum((y - t) ** 2, -1)


def gradients(net, rule, params, feedback, x, t):
    step = lrules.value_and_grad(net, half_square, rule)
    return jax.jit(lambda *args: step(*args)[1])(params, feedback, x, t)


# ------------------------------------------------------------------------------------------------------------- loops


def layers(p, x, *, backwards, flip=lambda w: w):
    """Layers of one shape, each with a weight of its own, from the last to the first."""
    h = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), jnp.tanh(x @ p["a"]), flip(p["w"]), reverse=backwards)[0]
    return h @ p["c"]


def reader(p, x, *, backwards, flip=lambda x: x):
    """A recurrent network that reads its sequence from the end, with outputs at every time."""

    def step(h, x):
        h = jnp.tanh(x @ p["a"] + h @ p["b"])
        return h, h @ p["c"]

    xs = flip(x.swapaxes(0, 1))
    return flip(lax.scan(step, jnp.zeros((x.shape[0], 6), x.dtype), xs, reverse=backwards)[1]).swapaxes(0, 1)


def test_the_order_matters():
    """What the following tests flip makes a difference."""
    for net, shape in ((layers, (5, 4)), (reader, (5, 3, 4))):
        params, x = random(a=(4, 6), w=(3, 6, 6), b=(6, 6), c=(6, 2)), random(x=shape)["x"]
        assert not np.allclose(net(params, x, backwards=True), net(params, x, backwards=False), rtol=0.1)


@pytest.mark.parametrize("name", RULES)
def test_layers_from_the_last_to_the_first(name):
    """A scan with reverse=True is the scan of the flipped weights, and each layer keeps its own feedback."""
    with jax.enable_x64(True):
        rule, params = RULES[name], random(a=(4, 6), w=(3, 6, 6), c=(6, 2))
        x, t = random(x=(5, 4), t=(5, 2)).values()
        back = lambda p, x: layers(p, x, backwards=True)  # noqa: E731
        there = lambda p, x: layers(p, x, backwards=False, flip=lambda w: jnp.flip(w, 0))  # noqa: E731
        feedback = rule.init(KEY, back, params, x)
        direct = name in ("direct_feedback_alignment", "adaptive")  # whose feedback belongs to the turns of the loop
        turn = lambda tree: jax.tree.map(lambda b: jnp.flip(b, 0) if direct and b.ndim == 3 else b, tree)  # noqa: E731
        got = gradients(back, rule, params, feedback, x, t)
        want = gradients(there, rule, params, turn(feedback), x, t)
        if direct:
            assert feedback.fixed.get("w", feedback.learned.get("w")).shape == (3, 2, 6)
            want = want._replace(feedback=turn(want.feedback))
        close((got.params, got.feedback, got.report), (want.params, want.feedback, want.report))
        assert jnp.any(got.params["a"])


@pytest.mark.parametrize("name", [n for n in RULES if n not in ("dual_propagation", "parallel", "skipped_backprop")])
def test_a_sequence_from_its_end(name):
    """The same where the loop goes over time."""
    with jax.enable_x64(True):
        rule, params = RULES[name], random(a=(4, 6), b=(6, 6), c=(6, 2))
        x, t = random(x=(5, 3, 4), t=(5, 3, 2)).values()
        back = lambda p, x: reader(p, x, backwards=True)  # noqa: E731
        there = lambda p, x: reader(p, x, backwards=False, flip=lambda x: jnp.flip(x, 0))  # noqa: E731
        feedback = rule.init(KEY, back, params, x)
        got = gradients(back, rule, params, feedback, x, t)
        close(got, gradients(there, rule, params, feedback, x, t))


@pytest.mark.parametrize("adaptive", [False, True])
def test_feedback_shared_over_time_from_its_end(adaptive):
    """`shared_axes`: the error of each time reaches that time, in a loop that runs backwards too."""
    with jax.enable_x64(True):
        rule = lrules.direct_feedback_alignment(adaptive=adaptive, shared_axes=1)
        params = random(a=(4, 6), b=(6, 6), c=(6, 2))
        x, t = random(x=(5, 3, 4), t=(5, 3, 2)).values()
        net = lambda p, x: reader(p, x, backwards=True)  # noqa: E731
        feedback = rule.init(KEY, net, params, x)
        got = gradients(net, rule, params, feedback, x, t)
        h, e = [np.zeros((5, 6))], (net(params, x) - t) / 15
        for k in reversed(range(3)):
            h.insert(0, np.tanh(x[:, k] @ params["a"] + h[0] @ params["b"]))
        b = feedback.fixed | feedback.learned
        assert {name: weight.shape for name, weight in b.items()} == {"b": (2, 6), "c": (2, 6)}
        # h[k] is one tensor: the feedback of "c" lands on it, and the turn that reads it by "b" finds it stopped.
        d = [e[:, k] @ b["c"] * (1 - h[k] ** 2) for k in range(3)]
        close(got.params["a"], sum(x[:, k].T @ d[k] for k in range(3)))
        close(got.params["b"], sum(h[k + 1].T @ d[k] for k in range(3)))
        close(got.params["c"], sum(h[k].T @ e[:, k] for k in range(3)))
        if adaptive:
            close(got.feedback["b"], sum(e[:, k].T @ h[k + 1] for k in range(3)))
            close(got.feedback["c"], sum(e[:, k].T @ h[k] for k in range(3)))


def found(jaxpr, name):
    """All equations of one primitive, inside others too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from found(inner, name)


@pytest.mark.parametrize("name", ["feedback_alignment", "direct_feedback_alignment"])
def test_the_options_of_a_loop(name):
    rule, params, x = RULES[name], random(a=(4, 6), w=(4, 6, 6), c=(6, 2)), jnp.ones((5, 4))

    def net(p, x):
        step = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
        return lax.scan(step, jnp.tanh(x @ p["a"]), p["w"], reverse=True, unroll=2)[0] @ p["c"]

    f, feedback = lrules.transform(net, rule), rule.init(KEY, net, params, x)
    (scan,) = found(jax.make_jaxpr(f)(params, feedback, x).jaxpr, "scan")
    assert scan.params["reverse"] and scan.params["unroll"] == 2 and scan.params["length"] == 4
    assert scan_counts(scan.params)[1] == 1  # no feedback goes with what depends on data


# ----------------------------------------------------------------------------------------------- rematerialised blocks

POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
    "products": jax.checkpoint_policies.dots_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("kept"),
    "other names": jax.checkpoint_policies.save_only_these_names("of something else"),
}


def block(p, x):
    z = checkpoint_name(x @ p["a"], "kept")
    return jnp.tanh(jnp.tanh(z) @ p["b"]) @ p["c"]


def products(step, *args):
    """How many products a step computes, those that it computes anew included."""
    return len(list(found(jax.make_jaxpr(step)(*args).jaxpr, "dot_general")))


@pytest.mark.parametrize("rule", ["backprop", "feedback_alignment", "backman", "direct_feedback_alignment"])
def test_policies(rule):
    """What the user's policy saves is saved, and what it does not save is computed anew, no more than that."""
    rule, params, x = RULES[rule], random(a=(4, 6), b=(6, 6), c=(6, 2)), jnp.ones((5, 4))
    feedback, counts = rule.init(KEY, block, params, x), {}
    (name,) = [eqn.primitive.name for eqn in jax.make_jaxpr(jax.checkpoint(jnp.sin))(1.0).jaxpr.eqns]
    for policy, saves in POLICIES.items():
        f = lrules.transform(jax.checkpoint(block, policy=saves, prevent_cse=False), rule)
        (remat,) = found(jax.make_jaxpr(f)(params, feedback, x).jaxpr, name)
        assert remat.params["policy"] is saves and remat.params["prevent_cse"] is False
        counts[policy] = products(jax.grad(lambda p, f=f: f(p, feedback, x).sum()), params)
    anew = {policy: n - counts["everything"] for policy, n in counts.items()}
    assert anew == {"nothing": 2, "everything": 0, "products": 0, "names": 1, "other names": 2}
