"""Modifiers against the references, in float64: alone, in pairs, on every family of rules, and in awkward networks."""

import math
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lrules
from lrules.engine.quantizer import quantize
from tests import bridge
from tests.reference import (
    losses,
    modifiers,
    nets,
    quantise,
    random_target_projection,
)
from tests.rules.common import BATCH, FAMILIES, NETS, agrees, by_name, draw, make, one_hot_mean, pull, references
from tests.sampling import mostly_slow, pairs

NONE = lrules.Feedback({}, {})


# ---------------------------------------------------------------------------------------------------- the quantiser


@pytest.mark.parametrize(
    ("make_rule", "match"),
    [
        (lambda r: lrules.quantize_error(r, 0), "bits must be an integer >= 1, got 0"),
        (lambda r: lrules.quantize_update(r, 2.5), "bits must be an integer >= 1, got 2.5"),
        (lambda r: lrules.quantize_error(r, 3, scale=0.0), "scale must be a finite number > 0, got 0.0"),
        (lambda r: lrules.quantize_error(r, 3, at="input"), 'at must be "hidden" or "output", got .input'),
        (lambda r: lrules.quantize_update(r, True), "bits must be an integer >= 1, got True"),
        (lambda r: lrules.quantize_error(r, "3"), "bits must be an integer >= 1, got '3'"),
        (lambda r: lrules.quantize_error(r, 3, scale=math.inf), "scale must be a finite number > 0, got inf"),
        (lambda r: lrules.quantize_error(r, 3, scale=math.nan), "scale must be a finite number > 0, got nan"),
        (lambda r: lrules.quantize_update(r, 3, scale=True), "scale must be a finite number > 0, got True"),
        (lambda r: lrules.quantize_update(r, 3, scale="1"), "scale must be a finite number > 0, got '1'"),
        (lambda r: lrules.drop_error(r, False), "rate must be a number >= 0 and < 1, got False"),
        (lambda r: lrules.drop_error(r, 1.0), "rate must be a number >= 0 and < 1, got 1.0"),
        (lambda r: lrules.drop_error(r, "half"), "rate must be a number >= 0 and < 1, got 'half'"),
        (lambda r: lrules.partition({".*": lrules.sign_error(r)}), "put modifiers around the partition"),
    ],
)
def test_refusals(make_rule, match):
    with pytest.raises(ValueError, match=match):
        make_rule(lrules.backprop())


@pytest.mark.parametrize(
    ("make_rule", "match"),
    [
        (lambda: lrules.sign_error(lrules.backprop), "call its factory first"),
        (lambda: lrules.quantize_error(lrules.backprop, 2, at="output"), "call its factory first"),
        (lambda: lrules.modify_error(lrules.backprop(), None), "fn must be a function .*, got None"),
        (lambda: lrules.replace_derivative(lrules.backprop(), 1.0), "g must be an elementwise function .*, got 1.0"),
        (lambda: lrules.sign_error(lrules.backprop(), axis_name=3), "axis_name must be a name .*, got 3"),
        (lambda: lrules.quantize_error(lrules.backprop(), 2, at="output", axis_name=[1]), "axis_name must be a name"),
    ],
)
def test_what_is_no_rule_and_no_function(make_rule, match):
    with pytest.raises(TypeError, match=match):
        make_rule()


def test_functions_have_to_keep_the_shape():
    net, x, e = make("shallow")
    for fn, made in {
        lambda s: s[:1]: r"the shape \(1, 6\)",
        lambda s: None: "a NoneType",
        lambda s: 0.0: "a float",
    }.items():
        rule = lrules.modify_error(lrules.backprop(), lambda signal, name, rng, fn=fn: fn(signal))
        with pytest.raises(ValueError, match=f"must return an array of the signal's shape .*, got {made}"):
            pull(net, rule, NONE, x, e)
    with pytest.raises(ValueError, match=r"g must be elementwise, got the shape \(\) from a pre-activation"):
        pull(net, lrules.replace_derivative(lrules.backprop(), lambda z: z.sum()), NONE, x, e)


# --------------------------------------------------------------------------------------------- rules and references


def drop_masks(net, x, key, rate):
    """What `drop_error` draws from `rng`: a key per hidden signal, for each of its numbers 2 bits at 3/4, else 16."""
    bits = 2 if rate == 0.75 else 16
    own = jax.random.split(key)[0]
    trace, masks = nets.forward(net, x), [None]
    for k in range(1, len(net)):
        here = jax.random.fold_in(own, zlib.crc32(f"{k}/kernel".encode()) & 0x7FFFFFFF)
        *lead, last = trace.pooled[k - 1].shape
        words = np.asarray(jax.random.bits(here, (*lead, -(-last * bits // 32)), jnp.uint32))
        drawn = np.stack([(words >> shift) % 2**bits for shift in range(0, 32, bits)], axis=-1)
        drawn = drawn.reshape(*lead, -1)[..., :last]
        masks.append((drawn >= round(rate * 2**bits)).astype(np.float64).reshape(trace.reads[k].shape))
    return masks


KEY = jax.random.key(9)
MODIFIERS = {
    "quantize": (lambda r: lrules.quantize_error(r, 3), lambda net, x, n: quantise.error(3, n)),
    "sign": (lrules.sign_error, lambda net, x, n: modifiers.sign(n)),
    "magnitude": (lrules.magnitude_error, lambda net, x, n: modifiers.magnitude(n)),
    "drop": (lambda r: lrules.drop_error(r, 0.4), lambda net, x, n: modifiers.drop(drop_masks(net, x, KEY, 0.4), 0.4)),
    "own": (
        lambda r: lrules.modify_error(r, lambda signal, name, rng: jnp.tanh(signal)),
        lambda net, x, n: modifiers.per_example(np.tanh, n),
    ),
}


# Every family, and convolutions for one of those whose error goes layer by layer, and for one where it goes straight.
QUICK = [(("conv_max" if family in ("alignment", "direct") else "deep"), family) for family in FAMILIES]


@pytest.mark.parametrize(("name", "family"), mostly_slow(pairs(["deep", "conv_max"], FAMILIES), QUICK))
def test_each_modifier_on_each_rule(name, family):
    with jax.enable_x64(True):
        net, x, e = make(name)
        rule, feedback, reference = references(net, x, family)
        n = BATCH if rule.additive else 1
        for modify, modified in MODIFIERS.values():
            new = modify(rule)
            rng = {"rng": KEY} if new.stochastic else {}
            got = pull(net, new, feedback, x, e, **rng)
            wanted = reference(x, e, modify=modified(net, x, n))
            agrees(got, wanted)
            if wanted.feedback is not None and family == "kolen_pollack":
                bridge.close(got[1].learned, by_name(wanted.feedback))


@pytest.mark.parametrize(("name", "family"), mostly_slow(pairs(NETS, FAMILIES), QUICK))
def test_derivatives(name, family):
    with jax.enable_x64(True):
        net, x, e = make(name)
        rule, feedback, reference = references(net, x, family)
        agrees(pull(net, lrules.without_derivatives(rule), feedback, x, e), reference(x, e, derivative=nets.no_slope))
        other = lambda name, z: np.ones_like(z) if name == "identity" else np.cos(z)  # noqa: E731
        agrees(pull(net, lrules.replace_derivative(rule, jnp.cos), feedback, x, e), reference(x, e, derivative=other))


PAIRS = [("quantize", "drop"), ("drop", "quantize"), ("own", "quantize"), ("sign", "own"), ("magnitude", "drop")]


@pytest.mark.parametrize(
    ("family", "outer", "inner"),
    mostly_slow(
        [(family, *pair) for family in ["alignment", "direct", "skipped"] for pair in PAIRS],
        [("alignment", *pair) for pair in PAIRS[:3]] + [("direct", *pair) for pair in PAIRS[3:]],
    ),
)
def test_pairs_of_modifiers(family, outer, inner):
    """The outermost acts first."""
    with jax.enable_x64(True):
        net, x, e = make("conv_average")
        rule, feedback, reference = references(net, x, family)
        new = lrules.without_derivatives(MODIFIERS[outer][0](MODIFIERS[inner][0](rule)))
        rng = {"rng": KEY} if new.stochastic else {}
        turns = modifiers.in_turn(MODIFIERS[outer][1](net, x, BATCH), MODIFIERS[inner][1](net, x, BATCH))
        agrees(pull(net, new, feedback, x, e, **rng), reference(x, e, modify=turns, derivative=nets.no_slope))


def test_two_drops_are_independent_and_split_the_key():
    with jax.enable_x64(True):
        net, x, e = make("shallow")
        rule, feedback, reference = references(net, x, "direct")
        new = lrules.drop_error(lrules.drop_error(rule, 0.4), 0.75)
        inner = jax.random.split(KEY)[1]
        turns = modifiers.in_turn(
            modifiers.drop(drop_masks(net, x, KEY, 0.75), 0.75), modifiers.drop(drop_masks(net, x, inner, 0.4), 0.4)
        )
        agrees(pull(net, new, feedback, x, e, rng=KEY), reference(x, e, modify=turns))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.75])
def test_rate_of_drops(rate):
    """As often as said, independently of each other, the rest scaled up."""
    apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    params = {"a": jnp.zeros((1, 301)), "b": jnp.ones((301, 1))}
    f = lrules.transform(apply, lrules.drop_error(lrules.backprop(), rate), reduction="sum")
    x = jnp.ones((101, 1))
    gradient = jax.jit(lambda x: jax.grad(lambda p: f(p, NONE, x, rng=KEY).sum())(params)["a"][0])
    per_example = jax.vmap(gradient)(x[:1, None])
    assert set(np.unique(np.round(per_example, 5))) <= {0.0, np.float32(round(1 / (1 - rate), 5))}
    signal = gradient(x) * (1 - rate) / 101  # kept, of 101 each
    assert abs(float(signal.mean()) - (1 - rate)) < 0.01
    assert abs(float(signal.std()) - (rate * (1 - rate) / 101) ** 0.5) < 0.01
    if rate:
        for apart in (1, 16, 151):
            assert abs(float(np.corrcoef(signal[:-apart], signal[apart:])[0, 1])) < 0.3


@pytest.mark.parametrize(("rate", "kept"), [(1 - 2**-9, 2**-9), (1 - 2**-17, 0.0), (1 - 1e-9, 0.0), (1e-9, 1.0)])
def test_rates_near_the_ends(rate, kept):
    """Met to 2^-17: the mean of errors of one is 1, or 0 where all are dropped."""
    f = lrules.transform(lambda p, x: jnp.sin(x @ p["a"]) @ p["b"], lrules.drop_error(lrules.backprop(), rate))
    params = {"a": jnp.zeros((1, 1000)), "b": jnp.ones((1000, 1))}
    got = jax.jit(jax.grad(lambda p: f(p, NONE, jnp.ones((200, 1)), rng=KEY).sum()))(params)["a"]
    np.testing.assert_allclose(float(got.mean()) / 200, kept / (1 - rate), rtol=0.2)


def test_what_functions_of_the_error_see():
    """The tensor as the model makes it: any order of axes, a vmapped model's batch, a loop's iterations one by one."""
    seen = {}

    def fn(signal, name, rng):
        seen.setdefault(name, []).append(signal.shape)
        return signal

    def apply(p, x):  # [batch 5, time 3, features 4]
        h = jnp.tanh(x.reshape(15, 4) @ p["merged"]).reshape(5, 3, 4)
        h = jnp.tanh(jnp.einsum("btf,fg->tgb", h, p["moved"]))
        h = jnp.einsum("tgb,gf->btf", h, p["first"])
        h = jax.vmap(lambda row: jnp.tanh(jax.vmap(lambda v: p["left"] @ v)(row)))(jnp.sin(h))
        h = jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["looped"]), None), h, None, length=6)[0]
        return h @ p["last"]

    names = ["merged", "moved", "first", "left", "looped", "last"]
    params = {k: jnp.eye(4) for k in names}
    f = lrules.transform(apply, lrules.modify_error(lrules.backprop(), fn))
    jax.eval_shape(jax.grad(lambda p: f(p, NONE, jnp.ones((5, 3, 4))).sum()), params)
    shapes = {"moved": (15, 4), "first": (3, 4, 5), "left": (5, 3, 4), "looped": (5, 3, 4), "last": (5, 3, 4)}
    assert seen == {name: [shape] for name, shape in shapes.items()}


def test_learned_direct_feedback_is_not_quantised():
    with jax.enable_x64(True):
        net, x, e = make("shallow")
        rule = lrules.direct_feedback_alignment(adaptive=True)
        feedback, _ = draw(rule, net, x)
        plain, quantised = (pull(net, r, feedback, x, e) for r in (rule, lrules.quantize_update(rule, 2)))
        bridge.close(quantised[1], plain[1])
        assert not np.allclose(quantised[0]["0"]["kernel"], plain[0]["0"]["kernel"], rtol=0.1)


def test_outermost_derivative_holds():
    with jax.enable_x64(True):
        net, x, e = make("deep")
        inner = lrules.replace_derivative(lrules.backprop(), jnp.cos)
        bridge.close(
            pull(net, lrules.without_derivatives(inner), NONE, x, e)[0],
            pull(net, lrules.without_derivatives(lrules.backprop()), NONE, x, e)[0],
        )


@pytest.mark.parametrize("name", ["quantize", "sign"])
def test_sum_in_place_of_mean(name):
    with jax.enable_x64(True):
        net, x, e = make("deep")
        rule, feedback, reference = references(net, x, "alignment")
        new = MODIFIERS[name][0](rule)
        agrees(
            pull(net, new, feedback, x, e * BATCH, reduction="sum"),
            reference(x, e * BATCH, modify=MODIFIERS[name][1](net, x, 1)),
        )


@pytest.mark.parametrize("name", MODIFIERS)
def test_turning_the_error_round(name):
    """Turns every update round, unless the sign is dropped."""
    with jax.enable_x64(True):
        net, x, e = make("shallow")
        rule, feedback, _ = references(net, x, "direct")
        new = MODIFIERS[name][0](rule)
        rng = {"rng": KEY} if new.stochastic else {}
        got, turned = (pull(net, new, feedback, x, s * e, **rng)[0] for s in (1, -1))
        sign = {"0": 1 if name == "magnitude" else -1, "1": -1}
        bridge.close({k: jax.tree.map(lambda g, k=k: sign[k] * g, v) for k, v in got.items()}, turned)


# ----------------------------------------------------------------------------------------------------- complex numbers


def complex_arguments():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape) + 1j * rng.normal(size=shape)  # noqa: E731
    return {"a": normal(3, 5), "b": normal(5, 2)}, normal(4, 3), rng.normal(size=(4, 2)) / 4


def complex_net(p, x):
    return (jnp.tanh(x @ p["a"]) @ p["b"]).real


def by_parts(fn):
    return lambda z: fn(np.real(z)) + 1j * fn(np.imag(z))


@pytest.mark.parametrize(
    ("modify", "wanted"),
    [
        (lambda r: lrules.quantize_error(r, 3), by_parts(lambda s: quantise.quantise(s, 3, 2**-3))),
        (lrules.sign_error, by_parts(np.sign)),
        (lrules.magnitude_error, np.abs),
        (lambda r: lrules.modify_error(r, lambda s, n, k: s * 1j), lambda s: s * 1j),
    ],
)
def test_modifiers_of_complex_errors(modify, wanted):
    """They act on real and imaginary part; the error is handed over as it is."""
    with jax.enable_x64(True):
        params, x, e = complex_arguments()
        h = np.tanh(x @ params["a"])
        for rule in (lrules.backprop(), lrules.direct_feedback_alignment()):
            feedback = rule.init(KEY, complex_net, params, x)
            f = lrules.transform(complex_net, modify(rule))
            got = jax.vjp(lambda p, f=f, fb=feedback: f(p, fb, x), params)[1](e)[0]
            arriving = e @ np.asarray(feedback.fixed["b"] if feedback.fixed else params["b"].T)
            bridge.close(got["a"], x.T @ (wanted(4 * arriving) / 4 * (1 - h**2)))
            bridge.close(got["b"], h.T @ e)


def test_dropped_complex_errors_are_dropped_whole():
    with jax.enable_x64(True):
        params, x, e = complex_arguments()
        seen = []
        inner = lrules.modify_error(lrules.backprop(), lambda s, n, k: seen.append(np.asarray(s)) or s)
        f = lrules.transform(complex_net, lrules.drop_error(inner, 0.5))
        jax.vjp(lambda p: f(p, NONE, x, rng=KEY), params)[1](e)
        (got,), arriving = seen, 4 * (e @ params["b"].T)
        np.testing.assert_allclose(got, np.where(got == 0, 0, 2 * arriving), rtol=1e-12)
        assert 0 < np.sum(got == 0) < got.size


# ------------------------------------------------------------------------------------------------------------- marks


def marked(p, x):
    """Two blocks with a residual stream that no layer reads, marked after each, and a layer's signal that is marked."""
    normal = lambda h: h / (1 + jnp.abs(h))  # noqa: E731
    h = lrules.hidden(x @ p["a"] + jnp.sin(x @ p["a"]), "first")
    h = lrules.hidden(h + normal(h) @ p["b"], "second")
    return lrules.hidden(lrules.hidden(jnp.tanh(normal(h) @ p["c"]), "top"), "again") @ p["d"]


def marked_arguments():
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (4, 4), "c": (4, 4), "d": (4, 2)}
    params = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
    return params, jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=(5, 2)) / 5)


@pytest.mark.parametrize("at", ["first", "second", "top", "again", ("first", "second", "top"), ("second", "^d$")])
@pytest.mark.parametrize("modify", [lambda s: 3 * s, jnp.sign, lambda s: jnp.tanh(3 * s)])
def test_modifiers_act_where_feedback_lands_on_a_mark(at, modify):
    """Once on what lands there, be it a layer's signal too, and on nothing at the other marks."""
    with jax.enable_x64(True):
        params, x, e = marked_arguments()
        rule = lrules.direct_feedback_alignment(at=at)
        feedback = rule.init(KEY, marked, params, x)
        new = lrules.modify_error(rule, lambda signal, name, rng: modify(signal))
        got = jax.vjp(lambda p: lrules.transform(marked, new)(p, feedback, x), params)[1](e)[0]

        # By hand: between landings error flows as in backprop, through the modifier at each signal that a layer reads.
        b = {"top" if k in ("again", "d") else k: v for k, v in feedback.fixed.items()}
        changed = lambda s: modify(s * 5) / 5  # noqa: E731

        def at_mark(name, h):
            @jax.custom_vjp
            def identity(h):
                return h

            def backward(_, error):
                if name not in b and name in ("first", "second"):
                    return (error,)
                return (changed(e @ b[name] if name in b else error),)

            identity.defvjp(lambda h: (h, None), backward)
            return identity(h)

        def network(p):
            h = at_mark("first", x @ p["a"] + jnp.sin(x @ p["a"]))
            h = at_mark("second", h + (u := at_mark("u", h / (1 + jnp.abs(h)))) @ p["b"])
            u = at_mark("v", h / (1 + jnp.abs(h)))
            return at_mark("top", jnp.tanh(u @ p["c"])) @ p["d"]

        bridge.close(got, jax.vjp(network, params)[1](e)[0])


def test_every_error_modifier_acts_on_a_mark():
    """A mark of what a layer reads, and the layer itself: the same numbers, but for what is drawn; stacks too."""
    with jax.enable_x64(True):
        params, x, e = marked_arguments()
        feedback = lrules.direct_feedback_alignment(at="^d$").init(KEY, marked, params, x).fixed["d"]
        stack = lambda r: lrules.quantize_error(lrules.modify_error(r, lambda s, n, k: s + 1), 2)  # noqa: E731
        for modify in (*(m for m, _ in MODIFIERS.values()), stack):
            found = []
            for at in ("^d$", "top"):
                rule = modify(lrules.direct_feedback_alignment(at=at))
                fixed = lrules.Feedback({at.strip("^$"): feedback}, {})
                rng = {"rng": KEY} if rule.stochastic else {}
                f = lrules.transform(marked, rule)
                found.append(jax.vjp(lambda p, f=f, fb=fixed, rng=rng: f(p, fb, x, **rng), params)[1](e)[0])
            bridge.close(*found)


def test_modifiers_on_marks_in_loops_and_partitions():
    with jax.enable_x64(True):
        params, x, e = marked_arguments()
        params["b"] = jnp.stack([params["b"], params["c"], -params["b"]])

        def block(h, w):
            return lrules.hidden(h + jnp.tanh(jnp.sin(h) @ w), "stream"), None

        def scanned(p, x):
            return jnp.sin(jax.lax.scan(block, x @ p["a"], p["b"])[0]) @ p["d"]

        def unrolled(p, x):
            h = x @ p["a"]
            for i in range(3):
                h = lrules.hidden(h + jnp.tanh(jnp.sin(h) @ p["b"][i]), f"stream{i}")
            return jnp.sin(h) @ p["d"]

        direct = lrules.direct_feedback_alignment(at="stream")
        for base in (direct, lrules.partition({"^b": direct, ".*": lrules.backprop()})):
            rule = lrules.sign_error(base)
            feedback = rule.init(KEY, scanned, params, x)
            assert feedback.fixed["stream"].shape == (3, 2, 4)
            flat = lrules.Feedback({f"stream{i}": b for i, b in enumerate(feedback.fixed["stream"])}, {})
            pull = lambda net, fb, r=rule: jax.vjp(lambda p: lrules.transform(net, r)(p, fb, x), params)[1](e)[0]  # noqa: E731
            bridge.close(jax.jit(lambda: pull(scanned, feedback))(), pull(unrolled, flat))  # noqa: B023
            assert float(jnp.abs(pull(scanned, feedback)["b"] - pull(scanned, feedback, base)["b"]).max()) > 0.1


# -------------------------------------------------------------------------------------------------- the output error


@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_output_error(family):
    with jax.enable_x64(True):
        net, x, e = make("deep")
        rule, feedback, reference = references(net, x, family)
        reduction = "mean" if rule.additive else "sum"
        got = pull(net, lrules.quantize_error(rule, 2, scale=0.5, at="output"), feedback, x, e)
        agrees(got, reference(x, quantise.output_error(e, 2, 0.5, reduction)))


def test_quantised_output_error_of_rules_that_take_the_loss():
    with jax.enable_x64(True):
        net, x, _ = make("deep")
        labels = np.array([0, 2, 1, 1, 0])
        rule = lrules.random_target_projection()
        feedback, listed = draw(rule, net, x)
        new = lrules.quantize_error(rule, 2, scale=0.5, at="output")
        loss = optax.softmax_cross_entropy_with_integer_labels
        step = lrules.value_and_grad(bridge.apply_of(net), loss, new)
        (value, _), grads = jax.jit(step)(bridge.parameters(net), feedback, jnp.asarray(x), jnp.asarray(labels))
        e = quantise.output_error(one_hot_mean(net, x, labels), 2, 0.5)
        targets = losses.one_hot(labels, 3)
        wanted = random_target_projection.gradients(net, listed, x, e, targets, sign=-1.0)
        bridge.close(grads.params, bridge.kernels_and_biases(wanted))
        outputs = nets.forward(net, x).outputs
        np.testing.assert_allclose(value, losses.softmax_cross_entropy(outputs, targets)[0].mean())


# ------------------------------------------------------------------------------------------------------- the updates


@pytest.mark.parametrize(
    "rule",
    [lrules.sign_error(lrules.backprop()), lrules.quantize_error(lrules.backprop(), 3, at="output"),
     lrules.dual_propagation()],
)  # fmt: skip
def test_a_batch_larger_than_half_precision(rule):
    """float16 ends at 65,504."""
    f = lrules.transform(lambda p, x: jnp.tanh(x @ p["a"]) @ p["c"], rule)
    params = {"a": jnp.ones((1, 1), jnp.float16), "c": jnp.ones((1, 1), jnp.float16)}

    def gradient(batch):
        x = jnp.ones((batch, 1), jnp.float16)
        return jax.jit(jax.grad(lambda p: f(p, NONE, x).astype(jnp.float32).mean()))(params)["a"]

    small, large = gradient(1024), gradient(2**16 + 1024)
    np.testing.assert_allclose(large, small, rtol=0.1)  # subnormal numbers
    assert float(small[0, 0]) > 0.01


# -------------------------------------------------------------------------------------------------------- constructs


def scanned(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["in"], p["w"])[0] @ p["out"]


def test_each_iteration_of_a_loop_draws_its_own():
    params = {"in": jnp.eye(4), "w": jnp.stack([jnp.eye(4)] * 3), "out": jnp.eye(4)}
    seen = []

    def fn(signal, name, rng):
        jax.debug.callback(lambda s: seen.append(s), jax.random.uniform(rng, (), jnp.float32))
        return signal

    f = lrules.transform(scanned, lrules.modify_error(lrules.backprop(), fn, stochastic=True))
    jax.grad(lambda p: f(p, NONE, jnp.ones((2, 4)), rng=KEY).sum())(params)["in"].block_until_ready()
    jax.effects_barrier()
    assert len(seen) == 4 and len({float(s) for s in seen}) == 4  # three iterations, and the signal that `out` reads


@pytest.mark.parametrize("rule", [lrules.backprop(), lrules.direct_feedback_alignment(), lrules.skipped_backprop()])
def test_modifiers_in_loops(rule):
    """A scanned net gives what the same net unrolled gives."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params = {k: jnp.asarray(rng.normal(size=s)) for k, s in {"in": (3, 4), "w": (3, 4, 4), "out": (4, 2)}.items()}
        x, e = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=(5, 2)))

        def unrolled(p, x):
            h = x @ p["in"]
            for w in p["w"]:
                h = jnp.tanh(h @ w)
            return h @ p["out"]

        new = lrules.quantize_update(lrules.sign_error(lrules.replace_derivative(rule, jnp.cos)), 5)
        feedback = rule.init(jax.random.key(0), scanned, params, x)
        slices = {f"w#{i + 1}" if i else "w": feedback.fixed["w"][i] for i in range(3)} if feedback.fixed else {}
        flat = lrules.Feedback(slices | {k: v for k, v in feedback.fixed.items() if k != "w"}, {})

        def gradients(apply, feedback):
            return jax.jit(lambda p: jax.vjp(lambda p: lrules.transform(apply, new)(p, feedback, x), p)[1](e)[0])(
                params
            )

        bridge.close(gradients(scanned, feedback), gradients(unrolled, flat))


@pytest.mark.parametrize("modify", [lrules.sign_error, lrules.quantize_error, lrules.quantize_update])
def test_shard_map(modify):
    """The mean over all devices: `axis_name` says over which axes it runs."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params = {k: jnp.asarray(rng.normal(size=s)) for k, s in {"a": (3, 4), "b": (4, 4), "c": (4, 2)}.items()}
        params["bias"] = jnp.ones(4)
        x, y = jnp.asarray(rng.normal(size=(8, 3))), jnp.asarray(rng.normal(size=(8, 2)))
        apply = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"] + p["bias"][None]) @ p["b"]) @ p["c"]  # noqa: E731
        bits = () if modify is lrules.sign_error else (3,)
        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

        for rule in (lrules.feedback_alignment(), lrules.direct_feedback_alignment()):
            feedback = rule.init(jax.random.key(0), apply, params, x)

            def gradients(p, x, y, axis_name=None, rule=rule, feedback=feedback):
                f = lrules.transform(apply, modify(rule, *bits, axis_name=axis_name))

                def objective(p):
                    mean = lrules.testing.half_squared_error(f(p, feedback, x), y).mean()
                    return mean if axis_name is None else jax.lax.pmean(mean, axis_name)

                return jax.grad(objective)(p)

            sharded = jax.shard_map(
                lambda p, x, y, gradients=gradients: gradients(p, x, y, "data"),
                mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P(),
            )  # fmt: skip
            bridge.close(jax.jit(sharded)(params, x, y), jax.jit(gradients)(params, x, y))


SPLIT = {"drop": lambda rule: lrules.drop_error(rule, 0.3), "update": lambda rule: lrules.quantize_update(rule, 3)}


@pytest.mark.parametrize(("steps", "modify"), mostly_slow(pairs([(), (3,)], SPLIT), [((), "drop"), ((3,), "update")]))
def test_explicit_mesh(steps, modify):
    """A batch that is split over explicit mesh axes, as those of `jax.make_mesh` are by default."""
    keys = jax.random.split(KEY, 5)
    params = {"a": jax.random.normal(keys[0], (3, 4)), "b": jax.random.normal(keys[1], (4, 4))}
    params |= {"c": jax.random.normal(keys[2], (4, 2)), "bias": jnp.ones(4)}
    x, y = jax.random.normal(keys[3], (8, *steps, 3)), jax.random.normal(keys[4], (8, *steps, 2))

    def apply(p, x):
        h = jnp.tanh(x @ p["a"] + p["bias"].reshape((1,) * (x.ndim - 1) + (4,)))
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, jnp.stack([p["b"]] * 2))[0]
        return h @ p["c"]

    rule = SPLIT[modify](lrules.feedback_alignment())
    feedback = rule.init(KEY, apply, params, x)
    step = jax.jit(lrules.value_and_grad(apply, lambda y, t: ((y - t) ** 2).sum(-1), rule))
    rng = {"rng": KEY} if rule.stochastic else {}
    wanted = step(params, feedback, x, y, **rng)[1].params
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        split = jax.device_put((x, y), NamedSharding(mesh, P("data")))
        params, feedback = jax.device_put((params, feedback), NamedSharding(mesh, P()))
        bridge.close(step(params, feedback, *split, **rng)[1].params, wanted, 1e-5)


def test_an_infinite_update_is_the_largest_number_on_every_device():
    params, x, t = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 1))}, jnp.ones((4, 3)), jnp.asarray([[1.0], [0], [0], [0]])
    rule = lrules.quantize_update(lrules.backprop(), 4, scale=0.5)
    step = lrules.value_and_grad(
        lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], lambda y, t: (y * jnp.where(t > 0, jnp.inf, 1.0)).sum(-1), rule
    )

    def grads(p, x, t):
        return step(p, lrules.Feedback({}, {}), x, t)[1].params

    def on_a_device(p, x, t):
        return jax.lax.pmean(grads(jax.lax.pcast(p, ("data",), to="varying"), x, t), "data")

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(on_a_device, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P())
    found = jax.jit(sharded)(params, x, t)
    chex.assert_tree_all_finite(found)
    bridge.close(found, jax.jit(grads)(params, x, t), 1e-6)


def test_drops_differ_between_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    params = {"a": jnp.eye(16), "b": jnp.eye(16)}
    f = lrules.transform(apply, lrules.drop_error(lrules.backprop(), 0.5))
    sharded = jax.shard_map(
        lambda p, x, k: jax.grad(lambda x: f(p, NONE, x, rng=k).sum())(x),
        mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P("data"),
    )  # fmt: skip
    inputs = jax.jit(sharded)(params, jnp.ones((4, 16)), KEY)
    assert len({tuple(np.asarray(row) > 0) for row in inputs}) == 4


@pytest.mark.slow
def test_conformance():
    """Modifiers as rules: one stack that has all of them, on the slowest and on the direct channel."""
    for rule in (lrules.kolen_pollack(), lrules.direct_feedback_alignment(adaptive=True)):
        rule = lrules.quantize_update(lrules.drop_error(lrules.quantize_error(rule, 5), 0.1), 5)
        lrules.testing.check_rule(lrules.quantize_error(lrules.without_derivatives(rule), 6, at="output"))


@pytest.mark.parametrize("rule", [lrules.skipped_backprop(), lrules.without_derivatives(lrules.backprop())])
def test_activations_that_are_not_recognised_are_refused(rule):
    """As it is where a square may be one; the model says which it is."""
    params, x = {"a": jnp.eye(3), "b": jnp.eye(3)}, jnp.ones((2, 3))
    gradients = {}
    for name, bent in {
        "unmarked": jnp.square,
        "activation": lrules.activation(jnp.square),
        "none": lrules.not_activation(jnp.square),
    }.items():
        apply = lambda p, x, bent=bent: jnp.tanh(bent(x @ p["a"]) @ p["b"]) @ p["b"]  # noqa: E731
        f = lrules.transform(apply, rule)
        if name == "unmarked":
            with pytest.raises(NotImplementedError, match="not recognised as an activation"):
                f(params, NONE, x)
        else:
            gradients[name] = jax.grad(lambda p, f=f: f(p, NONE, x).sum())(params)["a"]
    # SBP keeps a layer's own derivative either way; without derivatives, what counts as an activation loses it.
    same = bool(np.allclose(gradients["activation"], gradients["none"]))
    assert same == (rule.description.layer is not None)


def gated(p, x):
    """A flow's layer: a learned scale, exp(log s), times data, and a select of two; and two kinds of activations."""
    h = jnp.tanh(x @ p["a"])
    y = (jnp.exp(h @ p["b"]) + jax.nn.relu(h[:, ::-1])) @ p["b"]
    return jnp.tanh(jnp.where(h > y, h, y) @ p["b"]) @ p["b"]


PASSED = {
    "skipped": lambda passing: lrules.skipped_backprop(passing),
    "no derivatives": lambda passing: lrules.without_derivatives(lrules.backprop(), passing=passing),
    "direct, no derivatives": lambda passing: lrules.without_derivatives(
        lrules.direct_feedback_alignment(), passing=passing
    ),
    "replaced": lambda passing: lrules.replace_derivative(lrules.backprop(), jnp.ones_like, passing=passing),
    "dual": lambda passing: lrules.dual_propagation(passing=passing, alpha=0.2),
}


def passed(rule, net=gated):
    key = jax.random.key(0)
    params = {"a": jax.random.normal(key, (3, 3)), "b": jax.random.normal(key, (3, 3)) / 2}
    x = jax.random.normal(jax.random.key(1), (4, 3))
    feedback = rule.init(key, net, params, x)
    f = lrules.transform(net, rule)
    return jax.jit(jax.grad(lambda p: (f(p, feedback, x) ** 2).mean()))(params)


@pytest.mark.parametrize("name", PASSED)
def test_what_passes_is_said_from_outside(name):
    """The same as marks inside the model; and what is an activation can be said to be none."""
    make = PASSED[name]
    with pytest.raises(NotImplementedError, match=r"exp, select_n are not .* passing=\{'exp', 'select_n'\}(\n|$)"):
        passed(make(()))
    with pytest.raises(NotImplementedError, match=r"select_n is not .* passing=\{'select_n'\}(\n|$)"):
        passed(make("exp"))

    def marked(p, x):
        h = jnp.tanh(x @ p["a"])
        y = (lrules.not_activation(jnp.exp)(h @ p["b"]) + jax.nn.relu(h[:, ::-1])) @ p["b"]
        return jnp.tanh(lrules.not_activation(lambda h, y: jnp.where(h > y, h, y))(h, y) @ p["b"]) @ p["b"]

    bridge.close(passed(make({"exp", "select_n"})), passed(make(()), marked), 1e-6)
    second = passed(make(["exp", "select_n", "tanh#2"]))
    assert not np.allclose(second["b"], passed(make({"exp", "select_n"}))["b"], rtol=1e-2)
    with pytest.raises(
        ValueError, match="'sin' is not an activation .* give one of 'exp', 'relu', 'select_n', 'tanh', 'tanh#2'"
    ):
        passed(make({"exp", "select_n", "sin"}))
    if name != "skipped":  # where all pass there is nothing left to replace
        everything = passed(make({"exp", "select_n", "tanh", "relu"}))
        rule = lrules.direct_feedback_alignment() if "direct" in name else lrules.backprop()
        bridge.close(everything, passed(rule), 1e-6)


@pytest.mark.parametrize("name", PASSED)
def test_passing_is_names(name):
    for wrong in (3, [jnp.exp], None):
        with pytest.raises(ValueError, match="passing must be names of functions, .*, got"):
            PASSED[name](wrong)
    with pytest.raises(ValueError, match="'exp' is not an activation .*: leave passing out, it has none"):
        passed(PASSED[name]("exp"), lambda p, x: x @ p["a"] @ p["b"])
    assert jax.tree.all(jax.tree.map(lambda g: jnp.isfinite(g).all(), passed(PASSED[name]("exp"), unread)))


def unread(p, x):
    """What no layer reads is in no doubt, and may be named."""
    h = jnp.tanh(x @ p["a"])
    return (h + jnp.exp(h @ p["b"]) * jnp.arange(3.0)[None]) @ p["b"]


# ------------------------------------------------------------------------------------------------- numbers by name


def chosen(name):
    """The first match of the patterns below."""
    return {"1": 1, "2": 2}.get(name[0], 3)


DIRECT = lrules.direct_feedback_alignment()


@pytest.mark.parametrize("rule", [lrules.feedback_alignment(), DIRECT])
@pytest.mark.parametrize("kind", ["bits", "scale", "rate"])
def test_numbers_by_hidden_signal(rule, kind):
    """Each hidden signal has its own number: as a modifier that looks at the name."""
    with jax.enable_x64(True):
        net, x, e = make("deep")
        feedback, _ = draw(rule, net, x)
        given = {"^1/": 1, "2": 2, ".*": 3}
        if kind == "rate":
            rates = {pattern: n / 4 for pattern, n in given.items()}
            got = pull(net, lrules.drop_error(rule, rates), feedback, x, e, rng=jax.random.key(0))
            for n, k in ((3, "2"), (1, "0")):  # the layer below a hidden signal; sequential rules add up above it
                whole = pull(net, lrules.drop_error(rule, n / 4), feedback, x, e, rng=jax.random.key(0))
                same = np.allclose(got[0][k]["kernel"], whole[0][k]["kernel"])
                assert same == (n == 3 or rule is DIRECT)
            return
        options = {"bits": given, "scale": 0.1} if kind == "bits" else {"bits": 3, "scale": given}

        def by_the_name(signal, name, rng):
            own = {option: chosen(name) if isinstance(v, dict) else v for option, v in options.items()}
            return quantize(signal, **own)

        got = pull(net, lrules.quantize_error(rule, options["bits"], scale=options["scale"]), feedback, x, e)
        bridge.close(got, pull(net, lrules.modify_error(rule, by_the_name), feedback, x, e))
        uniform = pull(net, lrules.quantize_error(rule, 3, scale=0.1), feedback, x, e)
        assert not np.allclose(got[0]["0"]["kernel"], uniform[0]["0"]["kernel"])


@pytest.mark.parametrize("kind", ["bits", "scale"])
def test_numbers_by_layer(kind):
    """The update of a layer, and that of a bias, by its own number: as with that number for all."""
    with jax.enable_x64(True):
        net, x, e = make("deep")
        numbers = {"0/bias": 4, "1": 1, ".*": 2}
        make_rule = {
            "bits": lambda n: lrules.quantize_update(lrules.backprop(), n),
            "scale": lambda n: lrules.quantize_update(lrules.backprop(), 2, scale=n),
        }[kind]
        got = pull(net, make_rule(numbers), NONE, x, e)[0]
        whole = {n: pull(net, make_rule(n), NONE, x, e)[0] for n in (1, 2, 4)}
        for k in range(4):
            for part in ("kernel", "bias"):
                n = 4 if (k, part) == (0, "bias") else 1 if k == 1 else 2
                bridge.close(got[str(k)][part], whole[n][str(k)][part])
        assert not np.allclose(whole[1]["1"]["kernel"], whole[2]["1"]["kernel"])


def test_both_quantisers_of_updates_have_their_numbers():
    with jax.enable_x64(True):
        net, x, e = make("shallow")
        inner = lrules.quantize_update(lrules.backprop(), 3, scale=0.5)
        got = pull(net, lrules.quantize_update(inner, {"0": 1, ".*": 2}), NONE, x, e)[0]
        for k, bits in enumerate((1, 2)):
            bridge.close(got[str(k)], pull(net, lrules.quantize_update(inner, bits), NONE, x, e)[0][str(k)])


@pytest.mark.parametrize(
    ("make_rule", "match"),
    [
        (lambda r: lrules.drop_error(r, {"0/": 0.5, ".*": 0.1}), "rate: '0/' matches no hidden signal; .*'1/kernel'"),
        (lambda r: lrules.quantize_error(r, {"1/": 3}), "bits: no pattern matches the hidden signal '2/kernel'"),
        (lambda r: lrules.quantize_update(r, {"head": 3, ".*": 2}), "bits: 'head' matches no layer; .* are '0/kernel'"),
        (lambda r: lrules.quantize_update(r, 3, scale={"0": 0.1}), "scale: no pattern matches the layer '1/kernel'"),
        (lambda r: lrules.quantize_update(lrules.quantize_update(r, 3), {"head": 3, ".*": 2}), "'head' matches no"),
    ],
)
def test_patterns_of_modifiers(make_rule, match):
    net, x, e = make("deep")
    rule = make_rule(lrules.backprop())
    with pytest.raises(ValueError, match=match):
        pull(net, rule, NONE, x, e, **({"rng": jax.random.key(0)} if rule.stochastic else {}))


def test_numbers_at_the_output_are_one():
    with pytest.raises(ValueError, match='at="output"'):
        lrules.quantize_error(lrules.backprop(), {".*": 3}, at="output")


def test_a_mark_without_a_pattern():
    """Where feedback lands at a mark, the modifier acts there too, and needs a number."""

    def net(p, x):
        return jnp.tanh(lrules.hidden(jnp.tanh(x @ p["a"]) + 1, "middle") * 2 @ p["b"]) @ p["c"]

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 4)), "c": jnp.ones((4, 2))}
    rule = lrules.direct_feedback_alignment(at="middle")
    feedback = rule.init(jax.random.key(0), net, params, jnp.ones((5, 3)))

    def grads(rates):
        f = lrules.transform(net, lrules.drop_error(rule, rates))
        return jax.grad(lambda p: f(p, feedback, jnp.ones((5, 3)), rng=jax.random.key(0)).sum())(params)

    with pytest.raises(ValueError, match="no pattern matches the mark 'middle'"):
        grads({"b": 0.5, "c": 0.5})
    assert not np.any(grads({"middle": 1 - 2**-20, ".*": 0.0})["a"]) and np.any(grads({"middle": 0.0, ".*": 0.0})["a"])
