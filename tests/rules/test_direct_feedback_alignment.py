"""Direct feedback, fixed and adaptive: the reference, feedback shared along axes, feedback of low rank."""

import ast
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrules
from tests import bridge
from tests.reference import direct_feedback_alignment, low_rank_feedback, nets
from tests.rules.common import ALL_NETS, NETS, agrees, by_name, draw, make, pull
from tests.sampling import mostly_slow, pairs


@pytest.mark.parametrize("name", ALL_NETS)
def test_fixed(name):
    with jax.enable_x64(True):
        net, x, e = make(name)
        rule = lrules.direct_feedback_alignment()
        feedback, listed = draw(rule, net, x)
        agrees(pull(net, rule, feedback, x, e), direct_feedback_alignment.gradients(net, listed, x, e))


@pytest.mark.parametrize("name", mostly_slow(NETS, ["deep", "conv_max"]))
def test_adaptive(name):
    with jax.enable_x64(True):
        net, x, e = make(name)
        rule = lrules.direct_feedback_alignment(adaptive=True)
        feedback, listed = draw(rule, net, x)
        assert feedback.fixed == {} and sorted(feedback.learned) == [f"{k}/kernel" for k in range(1, len(net))]
        got = pull(net, rule, feedback, x, e)
        wanted = direct_feedback_alignment.gradients(net, listed, x, e, adaptive=True)
        agrees(got, wanted)
        bridge.close(got[1].learned, by_name(wanted.feedback))


@pytest.mark.foreign
def test_same_optimizer_and_another():
    net, params = lrules.Network(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]), {"a": jnp.eye(3), "b": jnp.ones((3, 2))}
    rule = lrules.direct_feedback_alignment(adaptive=True)
    x, y = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 2))
    feedback = rule.init(jax.random.key(0), net, params, x)
    _, grads = lrules.value_and_grad(net, lrules.testing.half_squared_error, rule)(params, feedback, x, y)
    together = (params, feedback.learned)
    same = optax.sgd(0.1)
    updates, _ = same.update((grads.params, grads.feedback), same.init(together), together)
    learned = optax.apply_updates(together, updates)[1]
    np.testing.assert_allclose(learned["b"], feedback.learned["b"] - 0.1 * grads.params["b"].T, rtol=1e-6)
    slower = optax.adam(1e-4)
    updates, _ = slower.update(grads.feedback, slower.init(feedback.learned))
    assert float(jnp.abs(updates["b"]).max()) < 2e-4


# ------------------------------------------------------------------------------------------------------- shared axes


def sequences(rng):
    """Two layers that mix time, and an output per time step: [batch, time, features]."""
    params = {
        "first": jnp.asarray(rng.normal(size=(3, 4))),
        "mix": jnp.asarray(rng.normal(size=(2, 4, 5))),
        "last": jnp.asarray(rng.normal(size=(5, 2))),
    }

    def apply(p, x):
        h = jnp.tanh(x @ p["first"])
        before = jnp.pad(h, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        h = jnp.tanh(h @ p["mix"][0] + before @ p["mix"][1])
        return h @ p["last"]

    return apply, params, jnp.asarray(rng.normal(size=(6, 7, 3)))


def test_shared_along_time():
    """One matrix for all time steps is the full one with its blocks on the diagonal of time."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        apply, params, x = sequences(rng)
        e = jnp.asarray(rng.normal(size=(6, 7, 2)))
        shared = lrules.direct_feedback_alignment(shared_axes=1, adaptive=True)
        feedback = shared.init(jax.random.key(0), apply, params, x)
        assert {k: b.shape for k, b in feedback.learned.items()} == {"mix": (2, 4), "mix#2": (2, 4), "last": (2, 5)}
        eye = np.eye(7)
        full = {k: jnp.einsum("tu,ch->tcuh", eye, b).reshape(14, 7, -1) for k, b in feedback.learned.items()}

        def gradients(rule, feedback):
            return jax.vjp(lrules.transform(apply, rule), params, feedback, x)[1](e)

        got = gradients(shared, feedback)
        wanted = gradients(lrules.direct_feedback_alignment(adaptive=True), lrules.Feedback({}, full))
        bridge.close(got[0], wanted[0])
        bridge.close(got[2], wanted[2])
        for name, b in got[1].learned.items():
            blocks = wanted[1].learned[name].reshape(7, 2, 7, -1)
            bridge.close(b, jnp.einsum("tcth->ch", blocks))


def test_shared_along_a_recurrence():
    """A loop over time: the error of a step reaches the state of that step; adaptive feedback sums over steps."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params = {k: jnp.asarray(rng.normal(size=s)) for k, s in {"i": (3, 4), "h": (4, 4), "o": (4, 2)}.items()}
        x, e = jnp.asarray(rng.normal(size=(5, 7, 3))), jnp.asarray(rng.normal(size=(5, 7, 2)))

        def apply(p, x):
            def step(h, x):
                h = jnp.tanh(x @ p["i"] + h @ p["h"])
                return h, h @ p["o"]

            return jax.lax.scan(step, x[:, 0, :1] * jnp.zeros(4)[None], x.swapaxes(0, 1))[1].swapaxes(0, 1)

        rule = lrules.direct_feedback_alignment(shared_axes=1, adaptive=True)
        feedback = rule.init(jax.random.key(0), apply, params, x)
        assert {k: b.shape for k, b in feedback.learned.items()} == {"h": (2, 4), "o": (2, 4)}
        got = jax.jit(lambda: jax.vjp(lrules.transform(apply, rule), params, feedback, x)[1](e))()

        # By hand: the carry, read at the next step by h, and the new state, read by o, are hidden signals of their own.
        h, states, pre = np.zeros((5, 4)), [np.zeros((5, 4))], []
        for t in range(7):
            pre.append(np.asarray(x[:, t] @ params["i"] + h @ params["h"]))
            h = np.tanh(pre[-1])
            states.append(h)
        b = np.asarray(feedback.learned["o"])
        wanted = sum(np.asarray(x[:, t]).T @ (e[:, t] @ b * (1 - states[t + 1] ** 2)) for t in range(7))
        bridge.close(got[0]["i"], wanted)
        bridge.close(got[1].learned["o"], sum(np.asarray(e[:, t]).T @ states[t + 1] for t in range(7)))
        bridge.close(got[1].learned["h"], sum(np.asarray(e[:, t]).T @ states[t] for t in range(7)))


def test_shared_pixels_and_pairs():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params = {"a": jnp.asarray(rng.normal(size=(3, 3, 1, 4))), "b": jnp.asarray(rng.normal(size=(1, 1, 4, 2)))}
        x = jnp.asarray(rng.normal(size=(2, 5, 6, 1)))

        def apply(p, x):
            conv = lambda x, w: jax.lax.conv_general_dilated(  # noqa: E731
                x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return conv(jnp.tanh(conv(x, p["a"])), p["b"])

        rule = lrules.direct_feedback_alignment(shared_axes=(1, 2))
        feedback = rule.init(jax.random.key(0), apply, params, x)
        assert feedback.fixed["b"].shape == (2, 4)
        e = jnp.asarray(rng.normal(size=(2, 5, 6, 2)))
        got = jax.vjp(lrules.transform(apply, rule), params, feedback, x)[1](e)[0]["a"]

        class Kernel:
            kernel, stride, padding = np.asarray(params["a"]), (1, 1), "SAME"

        from tests.reference import nets

        layer = nets.conv(params["a"], padding="SAME")
        z = nets.multiply(layer, layer.kernel, np.asarray(x))
        d = np.asarray(e) @ np.asarray(feedback.fixed["b"]) * (1 - np.tanh(z) ** 2)
        bridge.close(got, nets.kernel_gradient(layer, np.asarray(x), d))

        swapped = lrules.direct_feedback_alignment(shared_axes=[(1, 2), (2, 1)])
        with pytest.raises(ValueError, match="no axis that corresponds to axis 1"):
            swapped.init(jax.random.key(0), apply, params, x)

        def turned(p, x):
            return apply(p, x).swapaxes(1, 2)

        same = jax.vjp(lrules.transform(turned, swapped), params, feedback, x)[1](e.swapaxes(1, 2))[0]["a"]
        bridge.close(same, got)


def gradients_of(apply, params, x, e, b, **options):
    """The gradients of shared feedback, all of whose weights are slices of `b` where they have its rank."""
    rule = lrules.direct_feedback_alignment(**options)
    drawn = rule.init(jax.random.key(0), apply, params, x).fixed
    fixed = {k: b[:, : v.shape[-1]] if v.ndim == 2 else v for k, v in drawn.items()}
    f = lrules.transform(apply, rule)
    return jax.jit(lambda p, b, e: jax.vjp(lambda p: f(p, lrules.Feedback(b, {}), x), p)[1](e)[0])(params, fixed, e)


def offered(apply, params, x, **options):
    """What the refusal says to give for `shared_axes=`."""
    with pytest.raises(ValueError) as caught:
        lrules.direct_feedback_alignment(**options).init(jax.random.key(0), apply, params, x)
    assert "\n" not in str(caught.value)
    return [ast.literal_eval(found) for found in re.findall(r"shared_axes=(\[.*?\])(?: or|,|$)", str(caught.value))]


def deep_sequences(steps, features, transposed=False):
    """A loop over four layers of signals [batch, time, features], or [batch, features, time], and one after it."""

    def apply(p, x):
        h = x @ p["in"]
        if transposed:
            h = h.swapaxes(1, 2)
        way, last = ("bft,fg->bgt", "bft,fg->btg") if transposed else ("btf,fg->btg",) * 2
        h = jax.lax.scan(lambda h, _: (jnp.tanh(jnp.einsum(way, h, p["w"])), None), h, None, length=4)[0]
        return jnp.einsum(last, jnp.tanh(jnp.einsum(way, h, p["v"])), p["out"])

    rng = np.random.default_rng(0)
    shapes = {"in": (3, features), "w": (features, features), "v": (features, features), "out": (features, 2)}
    params = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
    x, e = jnp.asarray(rng.normal(size=(6, steps, 3))), jnp.asarray(rng.normal(size=(6, steps, 2)))
    return apply, params, x, e, jnp.asarray(rng.normal(size=(2, features)))


def deep_by_hand(params, x, e, b):
    """Each position of each signal gets its own error, whichever way it lies."""
    h, signal, grads = np.asarray(x @ params["in"]), np.asarray(e @ b), {}
    grads["in"] = np.einsum("nti,ntf->if", x, signal)
    grads["w"] = np.zeros(params["w"].shape)
    for name in ["w"] * 4 + ["v"]:
        new = np.tanh(h @ np.asarray(params[name]))
        grads[name] = grads.get(name, 0) + np.einsum("ntf,ntg->fg", h, signal * (1 - new**2))
        h = new
    return grads | {"out": np.einsum("ntf,nto->fo", h, e)}


@pytest.mark.parametrize(
    ("steps", "features", "transposed", "pair"),
    mostly_slow(
        [(4, 5, False, 1), (5, 5, False, 1), (4, 4, False, 1), (4, 5, True, 2), (5, 5, True, 2), (4, 4, True, 2)],
        [(5, 5, False, 1), (4, 4, True, 2)],
    ),
)
def test_shared_axes_where_several_places_fit(steps, features, transposed, pair):
    """The depth of a loop, the features: refused, and each pair that is offered is served, the right one rightly."""
    with jax.enable_x64(True):
        *net, e, b = deep_sequences(steps, features, transposed)
        pairs = offered(*net, shared_axes=1)
        found = [gradients_of(*net, e, b, shared_axes=p) for p in pairs]
        assert [p[0] for p in pairs].count((1, pair)) == 1
        assert len(pairs) == 1 + (steps == 4) + (features == steps)
        right = next(g for p, g in zip(pairs, found, strict=True) if p[0] == (1, pair))
        bridge.close(right, deep_by_hand(*net[1:], e, b))
        assert all(np.abs(g["in"] - right["in"]).max() > 1e-3 for g in found if g is not right)
        bridge.close(gradients_of(*net, e, b, shared_axes=[(1, pair)]), right)


def test_shared_axes_that_lie_elsewhere_are_named():
    *net, e, b = deep_sequences(7, 5, transposed=True)
    assert offered(*net, shared_axes=1) == [[(1, 2)]]
    assert offered(*net, shared_axes=[(1, 1)]) == [[(1, 1), (1, 2)]]
    gradients_of(*net, e, b, shared_axes=[(1, 1), (1, 2)])


def test_shared_along_a_named_loop():
    """A recurrence as wide as it is long, inside a loop over as many layers, and a layer for all steps after it."""
    with jax.enable_x64(True):
        rng, n = np.random.default_rng(0), 4
        shapes = {"i": (3, n), "h": (n, n), "u": (n, 5), "o": (5, 2)}
        params = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
        x, e, b = (jnp.asarray(rng.normal(size=s)) for s in ((5, n, 3), (5, n, 2), (2, 5)))

        def looped(p, x):
            def over_time(xs, _):
                step = lambda h, x: (new := jnp.tanh(x + h @ p["h"]), new)  # noqa: E731
                return jax.lax.scan(step, jnp.sin(xs[0]), xs)[1], None

            h = jax.lax.scan(over_time, (x @ p["i"]).swapaxes(0, 1), None, length=n)[0]
            return jnp.tanh(h.swapaxes(0, 1) @ p["u"]) @ p["o"]

        def unrolled(p, x):
            xs = (x @ p["i"]).swapaxes(0, 1)
            for _ in range(n):
                h, new = jnp.sin(xs[0]), []
                for t in range(n):
                    h = jnp.tanh(xs[t] + land(h, t) @ p["h"])
                    new.append(h)
                xs = jnp.stack(new)
            h = land(jnp.tanh(land(xs.swapaxes(0, 1), slice(None)) @ p["u"]), slice(None))
            return h @ p["o"]

        def land(h, t):
            @jax.custom_vjp
            def identity(h):
                return h

            identity.defvjp(lambda h: (h, None), lambda _, d: (e[:, t] @ b[:, : h.shape[-1]],))
            return identity(h)

        pairs = [(1, "loop 1"), (1, 1)]
        assert pairs in offered(looped, params, x, shared_axes=1)
        got = gradients_of(looped, params, x, e, b, shared_axes=pairs)
        bridge.close(got, jax.vjp(lambda p: unrolled(p, x), params)[1](e)[0])


def test_square_images_keep_their_axes():
    """Where each axis of the outputs has the axis of its number, one is no rival of the other."""
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(1, 3))), "b": jnp.asarray(rng.normal(size=(3, 2)))}
    x, e, b = (jnp.asarray(rng.normal(size=s)) for s in ((2, 5, 5, 1), (2, 5, 5, 2), (2, 3)))
    apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    one, two = (gradients_of(apply, params, x, e, b, shared_axes=s) for s in ((1, 2), [(1, 1), (2, 2)]))
    bridge.close(one, two)
    h = np.tanh(np.asarray(x @ params["a"]))
    bridge.close(one["a"], np.einsum("nhwi,nhwf->if", x, np.asarray(e @ b) * (1 - h**2)), 1e-5)
    params["a"], params["b"] = params["a"][:, jnp.arange(5) % 3], params["b"][jnp.arange(5) % 3]
    assert [(1, 1), (2, 2)] in offered(apply, params, x, shared_axes=(1, 2))  # five features, too


def test_refusals_of_shared_axes():
    apply, params, x = sequences(np.random.default_rng(0))

    def refused(match, net, **options):
        with pytest.raises(ValueError, match=match):
            lrules.direct_feedback_alignment(**options).init(jax.random.key(0), net, params, x)

    refused("must be an axis of the outputs", apply, shared_axes=3)
    refused("must be an axis of the outputs", apply, shared_axes=0)
    refused("outputs that are one array", lambda p, x: (apply(p, x), apply(p, x)), shared_axes=1)
    refused("no axis that corresponds", lambda p, x: apply(p, x)[:, :4], shared_axes=1)
    with pytest.raises(ValueError, match="rank must be an integer >= 1 or None, got 0"):
        lrules.direct_feedback_alignment(rank=0)


# ---------------------------------------------------------------------------------------------------------- low rank


@pytest.mark.parametrize("name", ["deep", "conv_max"])
def test_low_rank(name):
    with jax.enable_x64(True):
        net, x, e = make(name)
        rule = lrules.direct_feedback_alignment(rank=2, adaptive=True)
        feedback = rule.init(jax.random.key(0), bridge.apply_of(net), bridge.parameters(net), jnp.asarray(x))
        shared = np.asarray(feedback.fixed["(outputs)"])
        assert list(feedback.fixed) == ["(outputs)"] and shared.shape == (3, 2)
        listed = [np.asarray(feedback.learned[f"{k}/kernel"]) for k in range(1, len(net))]
        products = [None, *(np.tensordot(shared, b, axes=1) for b in listed)]
        got = pull(net, rule, feedback, x, e)
        wanted = direct_feedback_alignment.gradients(net, products, x, e, adaptive=True)
        agrees(got, wanted)
        for k, b in enumerate(wanted.feedback[1:], 1):
            bridge.close(got[1].learned[f"{k}/kernel"], np.tensordot(shared.T, b, axes=1))


def test_low_rank_saves_memory_for_many_outputs():
    params = {"a": jnp.zeros((8, 64)), "b": jnp.zeros((64, 64)), "c": jnp.zeros((64, 50_000))}

    def apply(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    x = jnp.zeros((2, 8))
    full = lrules.describe(apply, lrules.direct_feedback_alignment(), params, x).feedback_bytes
    low = lrules.describe(apply, lrules.direct_feedback_alignment(rank=16), params, x).feedback_bytes
    assert full == 4 * 50_000 * 128 and low == 4 * 16 * (50_000 + 128)
    with pytest.raises(ValueError, match="max_feedback_bytes"):
        rule = lrules.direct_feedback_alignment(rank=16, max_feedback_bytes=10**6)
        rule.init(jax.random.key(0), apply, params, x)


INITIALISERS = {
    "glorot_normal": jax.nn.initializers.glorot_normal(),
    "lecun_uniform": jax.nn.initializers.lecun_uniform(),
    "sparse": lrules.feedback.sparse(20),
    "rescaled": lrules.feedback.sparse(20, rescale=True),
    "all ones": lrules.feedback.sparse(400),
    "absolute": lrules.feedback.absolute(),
    "shifted": lrules.feedback.shifted(0.1),
    "binary": lrules.feedback.binary(0, 1),
    "averaged": lrules.feedback.averaged(4),
}


@pytest.mark.parametrize(
    ("name", "rank"),
    mostly_slow(
        pairs(INITIALISERS, [3, 40]),
        [("glorot_normal", 3), ("sparse", 40), ("all ones", 3), ("shifted", 40), ("averaged", 40)],
    ),
)
def test_low_rank_has_the_mean_and_variance_of_full_feedback(name, rank):
    params = {"a": jnp.zeros((2, 400)), "b": jnp.zeros((400, 300))}
    apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731

    def drawn(**options):
        rule = lrules.direct_feedback_alignment(INITIALISERS[name], **options)
        draw = lambda key: rule.init(key, apply, params, jnp.zeros((2, 2))).fixed  # noqa: E731
        return jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 10))

    full, low = drawn()["b"], drawn(rank=rank)
    assert low["b"].shape == (10, rank, 400) and low["(outputs)"].shape == (10, 300, rank)
    product = low["(outputs)"] @ low["b"]
    spread = float(full.std())
    np.testing.assert_allclose(product.mean(), full.mean(), atol=0.05 * spread + 1e-5)
    np.testing.assert_allclose(product.std(), spread, rtol=0.1, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_low_rank_of_sparse_feedback_sends_errors_that_sum_to_zero(rank):
    """As those of softmax do: a matrix of ones would send nothing."""
    params = {"a": jnp.ones((2, 6)), "b": jnp.ones((6, 5))}
    apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    rule = lrules.direct_feedback_alignment(lrules.feedback.sparse(3), rank=rank)
    e = jnp.asarray([[1.0, -1, 0, 0, 0], [0, 0.5, 0, -0.25, -0.25]])
    for key in jax.random.split(jax.random.key(0), 5):
        feedback = rule.init(key, apply, params, jnp.ones((2, 2)))
        sent = e @ feedback.fixed["(outputs)"]
        assert float(jnp.abs(sent).max(1).min()) > 1e-3


def test_the_matrix_that_all_share_has_a_name_of_its_own():
    """Beside parameters and a mark of names like its own, and a second one in a partition."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        names = ["first", "outputs", "(outputs)", "last"]
        shapes = [(3, 4), (4, 4), (4, 4), (4, 2)]
        params = {k: jnp.asarray(rng.normal(size=s)) for k, s in zip(names, shapes, strict=True)}
        x, e = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=(5, 2)))

        def apply(p, x):
            for name in names[:-1]:
                x = lrules.hidden(jnp.tanh(x @ p[name]), "((outputs))")
            return x @ p["last"]

        low, other = lrules.direct_feedback_alignment(rank=3), lrules.direct_feedback_alignment(rank=2)
        own = "(((outputs)))"
        mixed = lrules.partition({"^outputs": low, ".*": other})
        for rule, shared in {low: [own] * 3, mixed: [f"({own})", own, own]}.items():
            feedback = rule.init(jax.random.key(0), apply, params, x).fixed
            assert sorted(feedback) == sorted({*names[1:], *shared})
            got = jax.vjp(
                lambda p, r=rule, f=feedback: lrules.transform(apply, r)(p, lrules.Feedback(f, {}), x), params
            )
            got, h = got[1](e)[0], np.asarray(x)
            for name, above, matrix in zip(names[:-1], names[1:], shared, strict=True):
                new = np.tanh(h @ np.asarray(params[name]))
                bridge.close(got[name], h.T @ (np.asarray(e @ feedback[matrix] @ feedback[above]) * (1 - new**2)))
                h = new


def test_low_rank_draws_no_matrix_larger_than_all_feedback_may_be():
    drawn = []

    def init(key, shape, dtype):
        drawn.append(shape)
        return jax.random.normal(key, shape, dtype)

    params = {"a": jnp.zeros((2, 10)), "b": jnp.zeros((10, 100))}
    apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    for most in (float("inf"), 2000, 1000):
        rule = lrules.direct_feedback_alignment(init, rank=2, max_feedback_bytes=most)
        rule.init(jax.random.key(0), apply, params, jnp.zeros((3, 2)))
    assert drawn == [(10, 100), (10, 50), (10, 25)]


# ------------------------------------------------------------------------------- both factors learn, normalised errors


def factors_of(feedback, net):
    """The shared matrix, and the other factors as the reference takes them."""
    weights = {**feedback.fixed, **feedback.learned}
    return weights["(outputs)"], [None, *(weights[f"{k}/kernel"] for k in range(1, len(net)))]


def step_of(net, rule, feedback, x, e):
    """The gradients of a step whose output error is e: through the loss, which `normalise_error` needs."""
    apply = bridge.apply_of(net)
    loss = lambda outputs, e: len(x) * jnp.sum(outputs * e, -1)  # noqa: E731
    step = jax.jit(lrules.value_and_grad(apply, loss, rule))
    return step(bridge.parameters(net), feedback, jnp.asarray(x), jnp.asarray(e))[1]


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("name", ["deep", "conv_max"])
def test_both_factors_learn(name, normalise):
    with jax.enable_x64(True):
        net, x, e = make(name)
        e[1] = 0  # an error of zero stays zero
        rule = lrules.direct_feedback_alignment(rank=2, learned_factors=True, normalise_error=normalise)
        feedback, _ = draw(rule, net, x)
        assert feedback.fixed == {}
        shared, factors = factors_of(feedback, net)
        got = step_of(net, rule, feedback, x, e)
        wanted, of_shared = low_rank_feedback.gradients(net, shared, factors, x, e, normalise=normalise)
        bridge.close(got.params, bridge.kernels_and_biases(wanted))
        bridge.close(got.feedback, by_name(wanted.feedback) | {"(outputs)": of_shared})


@pytest.mark.parametrize("name", ["deep", "conv_max"])
def test_normalised_error(name):
    with jax.enable_x64(True):
        net, x, e = make(name)
        e[1] = 0
        e[2] *= 1e-200  # whose square is zero
        rule = lrules.direct_feedback_alignment(normalise_error=True)
        feedback, listed = draw(rule, net, x)
        grads = step_of(net, rule, feedback, x, e).params
        sent = low_rank_feedback.normalised(e / np.maximum(np.abs(e).max(1, keepdims=True), 1e-300))
        signals = [np.tensordot(sent, b, axes=1) for b in listed[1:]]
        trace = nets.forward(net, x)
        bridge.close(
            grads, bridge.kernels_and_biases(direct_feedback_alignment.from_signals(net, trace, x, e, signals))
        )
        with pytest.raises(ValueError, match="needs the loss, so transform cannot serve it"):
            lrules.transform(bridge.apply_of(net), rule)


def test_both_factors_where_positions_and_iterations_share_feedback():
    """The shared matrix has the part of the whole product's gradient that is its own, as `jax.vjp` of the product says.

    Along a shared axis (time), in a loop with a weight for each iteration, and in one with a weight for all.
    """
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shapes = {"first": (3, 4), "each": (2, 4, 4), "all": (4, 4), "last": (4, 5)}
        params = {name: jnp.asarray(rng.normal(size=s)) for name, s in shapes.items()}
        x, y = jnp.asarray(rng.normal(size=(6, 7, 3))), jnp.asarray(rng.normal(size=(6, 7, 5)))

        def apply(p, x):
            h = jnp.tanh(x @ p["first"])
            h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["each"])
            h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["all"]), None), h, None, length=3)
            return h @ p["last"]

        def grads_of(feedback, **options):
            rule = lrules.direct_feedback_alignment(shared_axes=1, **options)
            fb = rule.init(jax.random.key(0), apply, params, x) if feedback is None else feedback
            return fb, lrules.value_and_grad(apply, lambda o, t: ((o - t) ** 2).sum(-1), rule)(params, fb, x, y)[1]

        feedback, got = grads_of(None, rank=2, learned_factors=True)
        factors = dict(feedback.learned)
        shared = factors.pop("(outputs)")

        def whole(shared, factors):
            return {name: jnp.einsum("or,...rh->...oh", shared, b) for name, b in factors.items()}

        products, pull = jax.vjp(whole, shared, factors)
        _, of_products = grads_of(lrules.Feedback({}, products), adaptive=True)
        of_shared, of_factors = pull(of_products.feedback)
        bridge.close(got.params, of_products.params)
        bridge.close(got.feedback, of_factors | {"(outputs)": of_shared})


def test_options_that_need_each_other():
    with pytest.raises(ValueError, match="two factors that rank makes: give rank="):
        lrules.direct_feedback_alignment(learned_factors=True)
    with pytest.raises(ValueError, match="give rank and learn too"):
        lrules.direct(lambda e, b, t, n: e @ b, init=jax.nn.initializers.normal(), rank=2, learned_factors=True)
