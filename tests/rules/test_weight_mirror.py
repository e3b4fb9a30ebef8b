"""Weight mirrors and weight estimation against the reference; what the feedback comes to; the phase of their own."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lrules
from tests import bridge
from tests.reference import feedback_alignment, weight_mirror
from tests.rules.common import NETS, agrees, by_name, draw, make, pull
from tests.sampling import mostly_slow, pairs

PHASES = ["mirror", "estimation"]


def taught(net, rule, feedback, x, key=3):
    """The gradient of the feedback in its phase."""
    step = jax.jit(lrules.feedback_grad(bridge.apply_of(net), rule))
    return step(bridge.parameters(net), feedback, jnp.asarray(x), rng=jax.random.key(key))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", mostly_slow(NETS, ["deep", "conv_max"]))
def test_reference(name, phase):
    """An ordinary step is one of feedback alignment; the phase learns from the noise that replaces each input."""
    with jax.enable_x64(True):
        net, x, e = make(name)
        drawn = []

        def noise(key, shape, dtype):
            drawn.append(jax.random.normal(key, shape, dtype))  # without jit, so that these are numbers
            return drawn[-1]

        options = {"decay": 0.3} if phase == "mirror" else {}
        rule = lrules.weight_mirror(std=0.7, noise=noise, phase=phase, **options)
        feedback, listed = draw(rule, net, x)
        assert feedback.fixed == {} and not rule.stochastic
        got = pull(net, rule, feedback, x, e)
        agrees(got, feedback_alignment.gradients(net, listed, x, e))
        assert not any(np.any(g) for g in got[1].learned.values()) and not drawn

        gradient = lrules.feedback_grad(bridge.apply_of(net), rule)
        learned = gradient(bridge.parameters(net), feedback, jnp.asarray(x), rng=jax.random.key(3))
        noises = [None]
        for layer in net[1:]:  # each layer has a noise of its own, of the shape of its input
            ndim, width = layer.kernel.ndim, layer.kernel.shape[-2]
            (xi,) = [xi for xi in drawn if xi.ndim == ndim and xi.shape[-1] == width]
            noises.append(0.7 * np.asarray(xi))
        assert len(drawn) == len(net) - 1
        wanted = weight_mirror.mirror_gradients(net, listed, noises, kind=phase, **options)
        bridge.close(learned, by_name(wanted))


# ------------------------------------------------------------------------------------------ what the feedback comes to


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(16, 50, rngs=rngs), nnx.Linear(50, 40, rngs=rngs)
        self.last = nnx.Linear(40, 10, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.second(nnx.relu(self.first(x)))))


class Conv(nnx.Module):
    """Strides, groups, padding that is much of a small map."""

    def __init__(self, rngs):
        self.first = nnx.Conv(1, 6, (3, 3), rngs=rngs)
        self.second = nnx.Conv(6, 8, (3, 3), strides=2, rngs=rngs)
        self.third = nnx.Conv(8, 8, (3, 3), kernel_dilation=2, feature_group_count=2, rngs=rngs)
        self.last = nnx.Linear(8 * 9, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.second(nnx.relu(self.first(x))))
        return self.last(nnx.relu(self.third(x)).reshape(len(x), -1))


def scanned():
    """A weight for each iteration, and one for all of them."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"first": (5, 20), "each": (3, 20, 20), "all": (20, 20), "last": (20, 4)}
    params = {n: jax.random.normal(k, s) / 4 for k, (n, s) in zip(keys, shapes.items(), strict=True)}

    def apply(p, x):
        body = lambda h, w: (jnp.tanh(jnp.tanh(h @ w) @ p["all"]), None)  # noqa: E731
        return jax.lax.scan(body, jnp.tanh(x @ p["first"]), p["each"])[0] @ p["last"]

    return apply, params, jnp.zeros((100, 5))


def branched():
    """A branch that is taken, and one that is not."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"first": (5, 20), "taken": (20, 20), "other": (20, 20), "last": (20, 4)}
    params = {n: jax.random.normal(k, s) / 4 for k, (n, s) in zip(keys, shapes.items(), strict=True)}

    def apply(p, x):
        branches = [lambda h, w=p[name]: jnp.tanh(h @ w) for name in ("taken", "other")]
        return jax.lax.cond(x.shape[0] * x.sum() == 0, *branches, jnp.tanh(x @ p["first"])) @ p["last"]

    return apply, params, jnp.zeros((100, 5))


def model(make, shape):
    return *lrules.from_nnx(make(nnx.Rngs(0))), jnp.zeros(shape)


NETWORKS = {
    "mlp": lambda: model(MLP, (100, 16)),
    "conv": lambda: model(Conv, (100, 6, 6, 1)),
    "scanned": scanned,
    "branched": branched,
}


def angles(feedback, params):
    return {name: float(each.angle) for name, each in lrules.diagnostics.weight_alignment(feedback, params).items()}


def after_the_phase(rule, net, params, x, *, steps=200, rate=0.05):
    feedback = rule.init(jax.random.key(1), net, params, x)
    gradient = lrules.feedback_grad(net, rule)

    def update(feedback, key):
        db = gradient(params, feedback, x, rng=key)
        return feedback._replace(learned=jax.tree.map(lambda b, g: b - rate * g, feedback.learned, db)), None

    run = jax.jit(lambda feedback: jax.lax.scan(update, feedback, jax.random.split(jax.random.key(2), steps))[0])
    return feedback, run(feedback)


QUICK = [("mlp", "estimation"), ("conv", "estimation"), ("scanned", "mirror"), ("branched", "mirror")]


@pytest.mark.foreign
@pytest.mark.parametrize(("name", "phase"), mostly_slow(pairs(NETWORKS, PHASES), QUICK))
def test_alignment(name, phase):
    """From random feedback to within ten degrees of the weights (an estimate: to the weights), from noise alone.

    The inputs are zeros: there is no data. The weights of a branch that is not taken do not respond.
    """
    net, params, x = NETWORKS[name]()
    before, after = after_the_phase(lrules.weight_mirror(phase=phase), net, params, x)
    first, last = angles(before, params), angles(after, params)
    assert min(first.values()) > 60
    if name == "branched":
        assert last.pop("other") == first.pop("other")
    assert max(last.values()) < (10 if phase == "mirror" else 0.1), last
    sizes = {n: float(each.norm_ratio) for n, each in lrules.diagnostics.weight_alignment(after, params).items()}
    sizes.pop("other", None)
    assert all(0.9 < size < 1.1 for size in sizes.values()), sizes


def test_where_the_mirror_settles():
    """At std^2 / decay W, by layer; and around it at the angle that docs/rules/weight_mirror.md gives."""
    net, params, x = NETWORKS["mlp"]()
    rule = lrules.weight_mirror(std={"second": 2.0, ".*": 1.0}, decay={"last": 0.5, ".*": 2.0})
    _, after = after_the_phase(rule, net, params, x, steps=400)
    for name, each in lrules.diagnostics.weight_alignment(after, params).items():
        decay, inputs = (2.0, 50) if name == "second/kernel" else (0.5, 40)
        np.testing.assert_allclose(each.norm_ratio, 2.0, rtol=0.06)  # 4 / 2 and 1 / 0.5
        pace = 0.05 * decay
        wanted = np.degrees(np.arctan(np.sqrt(pace / (2 - pace) * (inputs + 1) / len(x))))
        np.testing.assert_allclose(each.angle, wanted, rtol=0.15)


@pytest.mark.parametrize("phase", PHASES)
def test_only_layers_that_get_noise_need_numbers(phase):
    net, x, _ = make("deep")
    feedback, _ = draw(lrules.weight_mirror(), net, x)
    first, second, *_ = bridge.parameters(net)
    others = f"^(?!{first}/)"
    numbers = [{"std": 0.5}, {"std": {others: 0.5}}, {"std": {"": 0.5}}, {"std": {first: 9.0, ".*": 0.5}}]
    if phase == "mirror":
        numbers.append({"std": 0.5, "decay": {others: 1.0}})
    want, *same = [taught(net, lrules.weight_mirror(phase=phase, **given), feedback, x) for given in numbers]
    for got in same:
        bridge.close(got, want)
    with pytest.raises(ValueError, match=f"std: no pattern matches the layer '{second}/kernel': add one"):
        taught(net, lrules.weight_mirror(phase=phase, std={f"^(?!({first}|{second})/)": 0.5}), feedback, x)
    gradient = lambda std: taught(net, lrules.weight_mirror(phase=phase, std={others: std}), feedback, x)  # noqa: E731
    bridge.close(jax.jit(gradient)(0.5), want)


# ---------------------------------------------------------------------------------------------------------- the phase


def test_products_of_the_phase():
    """Two for each layer with feedback (an estimate: three), and none of the forward pass."""

    def apply(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    params, x = {name: jnp.ones((64, 64)) for name in "abc"}, jnp.ones((32, 64))
    for phase, products in {"mirror": 2, "estimation": 3}.items():
        rule = lrules.weight_mirror(phase=phase, noise=jax.random.rademacher)
        feedback = rule.init(jax.random.key(0), apply, params, x)
        step = jax.jit(lrules.feedback_grad(apply, rule)).lower(params, feedback, x, rng=jax.random.key(1))
        assert step.compile().as_text().count(" dot(") == 2 * products


@pytest.mark.foreign
def test_training_in_turns():
    """What a user writes: a training step and a mirror step in turns. The gradients come close to those of backprop."""
    net, params, _ = NETWORKS["mlp"]()
    x, y = jax.random.normal(jax.random.key(3), (100, 16)), jnp.arange(100) % 10
    loss = optax.softmax_cross_entropy_with_integer_labels
    rule = lrules.weight_mirror(phase="estimation")
    feedback = rule.init(jax.random.key(1), net, params, x)
    forward, own = optax.adamw(1e-3, weight_decay=0.1), optax.sgd(0.3)
    step, mirror = lrules.value_and_grad(net, loss, rule), lrules.feedback_grad(net, rule)

    @jax.jit
    def train(params, feedback, state):
        (value, _), grads = step(params, feedback, x, y)
        updates, state = forward.update(grads.params, state, params)
        return optax.apply_updates(params, updates), state, value

    @jax.jit
    def turn(params, feedback, state, key):
        updates, state = own.update(mirror(params, feedback, x, rng=key), state)
        return feedback._replace(learned=optax.apply_updates(feedback.learned, updates)), state

    state, own_state, values = forward.init(params), own.init(feedback.learned), []
    for key in jax.random.split(jax.random.key(2), 60):
        params, state, value = train(params, feedback, state)
        feedback, own_state = turn(params, feedback, own_state, key)
        values.append(float(value))
    assert values[-1] < values[0] - 0.3
    true = lrules.value_and_grad(net, loss, lrules.backprop())(params, lrules.Feedback({}, {}), x, y)[1].params
    got = step(params, feedback, x, y)[1].params
    assert float(lrules.diagnostics.total_angle(got, true)) < 3
    assert max(train._cache_size(), turn._cache_size()) <= 1  # 0: JAX may leave its fast path out


@pytest.mark.parametrize("phase", PHASES)
def test_several_seeds_and_dtypes(phase):
    """`vmap` over seeds and over the standard deviation; in bfloat16 all keep their dtypes."""
    apply, params, x = scanned()
    gradient = lambda std, key: lrules.feedback_grad(apply, lrules.weight_mirror(std=std, phase=phase))(  # noqa: E731
        params, feedback, x, rng=key
    )
    feedback = lrules.weight_mirror().init(jax.random.key(0), apply, params, x)
    keys, stds = jax.random.split(jax.random.key(1), 2), jnp.array([0.5, 2.0])
    together = jax.jit(jax.vmap(gradient))(stds, keys)
    for i in range(2):
        alone = gradient(float(stds[i]), keys[i])
        bridge.close(jax.tree.map(lambda g: g[i], together), alone, 1e-5)  # noqa: B023
    params, x = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (params, x))
    rule = lrules.weight_mirror(phase=phase)
    feedback = rule.init(jax.random.key(0), apply, params, x)
    db = jax.jit(lrules.feedback_grad(apply, rule))(params, feedback, x, rng=keys[0])
    assert {name: (g.shape, g.dtype) for name, g in db.items()} == {
        name: (b.shape, jnp.bfloat16) for name, b in feedback.learned.items()
    }


@pytest.mark.parametrize("kind", ["dense", "convolution"])
@pytest.mark.parametrize("phase", PHASES)
def test_more_terms_than_float16_can_count(phase, kind):
    """A convolution of 64 images of 32 by 32 pixels has as many."""

    def net(params, x):
        h = jax.nn.relu(x @ params["a"])
        if kind == "dense":
            return h @ params["b"]
        return jax.lax.conv_general_dilated(h, params["b"][None], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    rule = lrules.weight_mirror(phase=phase, init=lambda key, shape, dtype: jnp.ones(shape, dtype))
    found = []
    for dtype in (jnp.float16, jnp.float32):
        params = {"a": jnp.full((3, 4), 0.3, dtype), "b": jnp.full((4, 2), 0.5, dtype)}
        x = jnp.ones((70, 1000, 3), dtype)
        feedback = rule.init(jax.random.key(0), net, params, x)
        db = lrules.feedback_grad(net, rule)(params, feedback, x, rng=jax.random.key(1))["b"]
        assert db.dtype == dtype
        found.append(np.asarray(db, float))
    np.testing.assert_allclose(*found, atol=0.03)
    assert np.abs(found[1]).min() > 0.4  # 1 - 0.5


@pytest.mark.parametrize("phase", PHASES)
def test_export_for_any_batch(phase):
    """The mean over the examples is right for a batch whose size is not known when the phase is traced."""
    rule = lrules.weight_mirror(phase=phase)
    apply, params, feedback = net_and_feedback(rule)

    def step(params, learned, x, key):
        rng = jax.random.wrap_key_data(key)
        return lrules.feedback_grad(apply, rule)(params, lrules.Feedback({}, learned), x, rng=rng)

    (batch,) = jax.export.symbolic_shape("batch")
    x, key = jnp.ones((7, 6)), jax.random.key_data(jax.random.key(2))
    of_any = jax.export.export(jax.jit(step))(params, feedback.learned, jax.ShapeDtypeStruct((batch, 6), x.dtype), key)
    args = params, feedback.learned, x, key
    bridge.close(of_any.call(*args), jax.jit(step)(*args), 1e-6)


def net_and_feedback(rule):
    def apply(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"a": (6, 8), "b": (8, 8), "c": (8, 4)}
    params = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    return apply, params, rule.init(jax.random.key(1), apply, params, jnp.ones((8, 6)))


@pytest.mark.parametrize("explicit", [False, True])
def test_sharded_batch(explicit):
    """Under jit the gradient is that of the whole batch, wherever its examples lie."""
    rule = lrules.weight_mirror()
    apply, params, feedback = net_and_feedback(rule)
    step = jax.jit(lrules.feedback_grad(apply, rule))
    wanted = step(params, feedback, jnp.ones((8, 6)), rng=jax.random.key(2))
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    x = jax.device_put(jnp.ones((8, 6)), NamedSharding(mesh, P("data")))
    params, feedback = jax.device_put((params, feedback), NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        bridge.close(jax.device_get(step(params, feedback, x, rng=jax.random.key(2))), wanted, 1e-5)


def test_shard_map():
    """Each device has noise of its own, and the gradient is the mean over all: near the expectation, decay B - W."""
    rule = lrules.weight_mirror(decay=0.5)
    apply, params, feedback = net_and_feedback(rule)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.ones((40_000, 6))

    def step(params, feedback, x):
        return lrules.feedback_grad(apply, rule)(params, feedback, x, rng=jax.random.key(2))

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
    db = jax.jit(mapped)(params, feedback, x)
    for name, b in feedback.learned.items():
        np.testing.assert_allclose(db[name], 0.5 * b - params[name], atol=0.1)


def test_in_a_partition_and_in_dual_propagation():
    """The phase teaches the feedback of its own layers; it has no part in other feedback."""
    net, x, e = make("deep")
    rule = lrules.partition({"2/": lrules.weight_mirror(), "3/": lrules.kolen_pollack(), ".*": lrules.backprop()})
    feedback, _ = draw(lrules.kolen_pollack(), net, x)
    feedback = feedback._replace(learned={k: feedback.learned[k] for k in ("2/kernel", "3/kernel")})
    stepped = pull(net, rule, feedback, x, e)[1].learned
    assert np.any(stepped["3/kernel"]) and not np.any(stepped["2/kernel"])
    db = taught(net, rule, feedback, x)
    assert not np.any(db["3/kernel"])
    alone = lrules.weight_mirror()
    whole, _ = draw(alone, net, x)
    np.testing.assert_allclose(db["2/kernel"], taught(net, alone, whole, x)["2/kernel"], rtol=1e-6)

    dual = lrules.dual_propagation(feedback_rule=alone)
    db = taught(net, dual, whole, x)
    bridge.close(db, taught(net, alone, whole, x), 1e-6)
    assert not any(np.any(g) for g in pull(net, dual, whole, x, e)[1].learned.values())


def test_direct_feedback_beside_a_mirror():
    """A direct rule of a partition stops the error, but not the phase, and its feedback does not learn there."""
    net, x, _ = make("deep")
    adaptive = lrules.direct_feedback_alignment(adaptive=True)
    rule = lrules.partition({"[12]/": lrules.weight_mirror(), ".*": adaptive})
    feedback = rule.init(jax.random.key(1), bridge.apply_of(net), bridge.parameters(net), jnp.asarray(x))
    db = taught(net, rule, feedback, x)
    assert np.any(db["1/kernel"]) and np.any(db["2/kernel"]) and not np.any(db["3/kernel"])


@pytest.mark.parametrize("loop", ["scan", "unrolled"])
@pytest.mark.parametrize("phase", PHASES)
def test_uses_of_a_weight_make_a_mean(phase, loop):
    """With the same noise at each step of a recurrent net, the number of steps does not count."""

    def net(p, x):
        h, step = jnp.tanh(x[0] @ p["in"]), lambda h, x: (jnp.tanh(h @ p["w"] + x @ p["in"]), None)
        if loop == "scan":
            h, _ = jax.lax.scan(step, h, x[1:])
        else:
            for one in x[1:]:
                h, _ = step(h, one)
        return h @ p["out"]

    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"in": (3, 6), "w": (6, 6), "out": (6, 2)}
    params = {name: jax.random.normal(k, s) for k, (name, s) in zip(keys, shapes.items(), strict=False)}
    draws = jax.random.normal(keys[3], (5, 6))
    rule = lrules.weight_mirror(phase=phase, noise=lambda key, shape, dtype: draws)
    learned = {}
    for steps in (1, 30):
        network, x = lrules.Network(net, batch_axes=1), jnp.ones((steps + 1, 5, 3))
        feedback = rule.init(jax.random.key(1), network, params, x)
        learned[steps] = lrules.feedback_grad(network, rule)(params, feedback, x, rng=jax.random.key(2))
    assert jnp.abs(learned[1]["w"]).max() > 0.1
    bridge.close(learned[30], learned[1], 1e-5)


def test_slices_of_a_weight_do_not_share_a_mean():
    """Layers in one stacked parameter learn as layers with parameters of their own."""

    def net(p, x):
        return jnp.tanh(jnp.tanh(jnp.tanh(x @ p["in"]) @ p["w"][0]) @ p["w"][1]) @ p["out"]

    def apart(p, x):
        return jnp.tanh(jnp.tanh(jnp.tanh(x @ p["in"]) @ p["w0"]) @ p["w1"]) @ p["out"]

    draws, x = jax.random.normal(jax.random.key(3), (5, 4)), jnp.ones((5, 4))
    rule = lrules.weight_mirror(noise=lambda key, shape, dtype: draws)
    w = jax.random.normal(jax.random.key(0), (2, 4, 4))
    common = {"in": jnp.eye(4), "out": jnp.eye(4)}
    one = lrules.feedback_grad(net, rule)
    learned = one(common | {"w": w}, lrules.Feedback({}, {"w": -w, "out": jnp.eye(4)}), x, rng=jax.random.key(2))
    two = lrules.feedback_grad(apart, rule)
    given = lrules.Feedback({}, {"w0": -w[0], "w1": -w[1], "out": jnp.eye(4)})
    wanted = two(common | {"w0": w[0], "w1": w[1]}, given, x, rng=jax.random.key(2))
    bridge.close(learned["w"], jnp.stack([wanted["w0"], wanted["w1"]]), 1e-6)


def test_weights_used_twice_and_weights_chosen_by_data():
    """A weight that reads data, too, learns where it reads a hidden signal; experts learn from the rows they get."""

    def tied(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"]

    rule = lrules.weight_mirror(phase="estimation")
    x = jnp.ones((50, 6))
    params = {"w": jax.random.normal(jax.random.key(0), (6, 6))}
    _, after = after_the_phase(rule, tied, params, x, rate=0.3)
    np.testing.assert_allclose(after.learned["w"], params["w"], atol=1e-4)

    def routed(p, inputs):
        x, expert = inputs
        return jnp.einsum("bi,bio->bo", jnp.tanh(x @ p["first"]), p["experts"][expert])

    params = {"first": jnp.ones((6, 5)), "experts": jax.random.normal(jax.random.key(0), (3, 5, 4))}
    inputs = x, jnp.arange(50) % 2  # the last expert gets no rows
    before, after = after_the_phase(rule, routed, params, inputs, rate=0.01)
    np.testing.assert_allclose(after.learned["experts"][:2], params["experts"][:2], atol=1e-2)
    np.testing.assert_allclose(after.learned["experts"][2], before.learned["experts"][2])


@pytest.mark.parametrize("phase", PHASES)
def test_complex_weights(phase):
    """The gradient is that of JAX: its conjugate is subtracted."""
    rng = np.random.default_rng(0)
    shapes = {"first": (5, 8), "second": (8, 8), "last": (8, 3)}
    params = {n: jnp.asarray(rng.normal(size=s) + 1j * rng.normal(size=s), "complex64") for n, s in shapes.items()}

    def apply(p, x):
        return jnp.tanh(jnp.tanh(x @ p["first"]) @ p["second"]) @ p["last"]

    rule, x = lrules.weight_mirror(phase=phase), jnp.zeros((200, 5), "complex64")
    gradient = jax.jit(lrules.feedback_grad(apply, rule))
    learned = rule.init(jax.random.key(0), apply, params, x).learned
    for key in jax.random.split(jax.random.key(1), 100):
        db = gradient(params, lrules.Feedback({}, learned), x, rng=key)
        learned = jax.tree.map(lambda b, g: b - 0.1 * jnp.conj(g), learned, db)
    for name, b in learned.items():
        off = np.linalg.norm(b - params[name]) / np.linalg.norm(params[name])
        assert off < (0.1 if phase == "mirror" else 1e-3)


def test_modifiers_leave_the_phase_alone():
    net, x, _ = make("deep")
    rule = lrules.weight_mirror()
    feedback, _ = draw(rule, net, x)
    bridge.close(taught(net, lrules.sign_error(rule), feedback, x), taught(net, rule, feedback, x), 1e-7)


@pytest.mark.parametrize("phase", PHASES)
def test_conformance(phase):
    lrules.testing.check_rule(lrules.weight_mirror(phase=phase))


@pytest.mark.parametrize("phase", PHASES)
def test_inputs_of_any_sizes(phase):
    """The phase needs no batch that all inputs share: each layer has as many terms as its input has rows."""
    rule, two = lrules.weight_mirror(phase=phase), lambda p, x: apply(p, x["nodes"] * x["scale"]).sum() + x["edges"]
    apply, params, feedback = net_and_feedback(rule)
    nodes, key = jnp.ones((8, 6)), {"rng": jax.random.key(2)}
    want = lrules.feedback_grad(apply, rule)(params, feedback, nodes, **key)
    for rows in (3, 0):
        inputs = {"nodes": nodes, "edges": jnp.ones((rows, 4)), "scale": jnp.float32(2)}
        bridge.close(lrules.feedback_grad(two, rule)(params, feedback, inputs, **key), want, 1e-6)
    without = lrules.Network(apply, batch_axes=None)
    bridge.close(lrules.feedback_grad(without, rule)(params, feedback, nodes, **key), want, 1e-6)
    nothing = lrules.feedback_grad(apply, rule)(params, feedback, jnp.ones((8, 0, 6)), **key)  # no time step
    wanted = jax.tree.map(lambda b: b if phase == "mirror" else 0 * b, feedback.learned)
    bridge.close(nothing, wanted, 0)


def test_refusals():
    for options, error, match in [
        ({"std": 0.0}, ValueError, "std must be a finite number > 0, got 0.0"),
        ({"decay": -1.0}, ValueError, "decay must be a finite number >= 0, got -1.0"),
        ({"phase": "both"}, ValueError, 'phase must be "mirror" or "estimation", got \'both\''),
        ({"phase": "estimation", "decay": 0.5}, ValueError, 'decay belongs to phase="mirror": leave it out'),
        ({"noise": 1.0}, TypeError, "noise must be a function"),
    ]:
        with pytest.raises(error, match=match):
            lrules.weight_mirror(**options)
    net, x, _ = make("deep")
    rule = lrules.weight_mirror()
    feedback, _ = draw(rule, net, x)
    flat = lrules.weight_mirror(noise=lambda key, shape, dtype: jnp.ones(3, dtype))
    with pytest.raises(ValueError, match=r"noise\(key, shape, dtype\) must return the shape \(5, 8\) at the layer"):
        taught(net, flat, feedback, x)
    with pytest.raises(ValueError, match="std: 'head' matches no layer"):
        taught(net, lrules.weight_mirror(std={"head": 1.0, ".*": 2.0}), feedback, x)
    with pytest.raises(ValueError, match="the batch is empty, and the rule needs at least one example"):
        taught(net, rule, feedback, x[:0])
    with pytest.raises(ValueError, match="give it a new key at every step"):
        lrules.feedback_grad(bridge.apply_of(net), rule)(bridge.parameters(net), feedback, jnp.asarray(x))
    with pytest.raises(ValueError, match="this rule has no phase"):
        lrules.feedback_grad(bridge.apply_of(net), lrules.kolen_pollack())
    with pytest.raises(ValueError, match="phase must be a sequential rule with learned=True"):
        lrules.sequential(lambda op, w, b, x, d, layer: (None, None, None), phase=lrules.feedback_alignment())
