"""What the functions of a rule are given when they ask for it, wherever the layer lies; and what they may return."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lrules
from lrules.extend import correlate, project
from tests.bridge import close
from tests.sampling import mostly_slow
from tests.small import half_square

NORMAL = jax.nn.initializers.normal(1.0)
BATCH, LOOPS = 4, 3


@pytest.fixture(autouse=True)
def exact():
    with jax.enable_x64(True):
        yield


def drawn():
    rng = np.random.default_rng(0)
    params = {"a": (5, 6), "b": (LOOPS, 6, 6), "c": (6, 3), "bias": (6,)}
    params = {name: jnp.asarray(rng.normal(size=shape) / 2) for name, shape in params.items()}
    return params, jnp.asarray(rng.normal(size=(BATCH, 5))), jnp.asarray(rng.normal(size=(BATCH, 3)))


def layer(p, w, h):
    return jnp.tanh(h @ w + p["bias"][None])


def scanned(p, x):
    h, _ = jax.lax.scan(lambda h, w: (layer(p, w, h), None), layer(p, p["a"], x), p["b"])
    return h @ p["c"]


def rematerialised(p, x):
    body = jax.checkpoint(lambda h, w: (layer(p, w, h), None))
    return jax.lax.scan(body, layer(p, p["a"], x), p["b"])[0] @ p["c"]


def unrolled(p, x):
    h = layer(p, p["a"], x)
    for i in range(LOOPS):
        h = layer(p, p[f"b{i}"], h)
    return h @ p["c"]


def apart(tree):
    """Parameters, or states, or feedback of the scanned network, as those of the unrolled one."""
    return {n: v for n, v in tree.items() if n != "b"} | {
        f"b{i}": jax.tree.map(lambda v: v[i], tree["b"])  # noqa: B023
        for i in range(LOOPS)
    }


def step(net, rule, params, feedback, x, y, **rng):
    return jax.jit(lrules.value_and_grad(net, half_square, rule))(params, feedback, x, y, **rng)[1]


# ------------------------------------------------------------------------------------------------ what they are given


def test_values_of_a_sequential_rule():
    """Everything that a function can ask for, in a network whose values are known."""
    params, x, y = drawn()
    params = {**params, "b": params["b"][0]}
    seen = {}

    def backward(op, w, b, x, d, layer, *, rng, state, targets, elements, h, y, slope, alpha):
        seen[layer.site] = {"rng": rng, "state": state, "targets": targets, "elements": elements, "h": h, "y": y,
                            "slope": slope, "alpha": alpha}  # fmt: skip
        return *jax.vjp(op, w, x)[1](d), None, state + 1

    def net(p, x):
        return jax.nn.gelu(layer(p, p["a"], x).reshape(BATCH, 2, 3).reshape(BATCH, 6) @ p["b"]) @ p["c"]

    rule = lrules.sequential(backward, state=lambda layer: len(layer.name), numbers={"alpha": {"a": 1.0, ".*": 2.0}})
    feedback = rule.init(jax.random.key(0), net, params, x)
    key = jax.random.key(1)
    grads = lrules.value_and_grad(net, half_square, rule)(params, feedback, x, y, rng=key)[1]
    close(grads.params, jax.grad(lambda p: half_square(net(p, x), y).mean())(params))
    assert grads.state == {"a": 2, "b": 2, "c": 2}
    h = np.tanh(z := np.asarray(x @ params["a"] + params["bias"][None]))
    assert seen["a"]["h"] is None
    close(seen["a"]["y"], x @ params["a"])
    close(seen["a"]["slope"], 1 - np.tanh(z) ** 2)
    close([seen["b"]["h"], seen["b"]["y"]], [h, h @ params["b"]])
    close(seen["b"]["slope"], jax.vmap(jax.vmap(jax.grad(jax.nn.gelu)))(h @ params["b"]))
    close(seen["c"]["h"], jax.nn.gelu(h @ params["b"]))
    assert seen["c"]["slope"] is None
    assert [seen[site]["alpha"] for site in "abc"] == [1, 2, 2]
    for given in seen.values():
        assert given["elements"] == BATCH and given["state"] == 1
        close(given["targets"], y)
    keys = {jax.random.key_data(given["rng"]).tobytes() for given in seen.values()}
    assert len(keys) == 3 and jax.random.key_data(key).tobytes() not in keys


def test_values_of_a_direct_rule():
    params, x, y = drawn()
    params = {**params, "b": params["b"][0]}
    seen = {}

    def signal(e, b, targets, name, *, rng, state, elements, h, y, slope, alpha):
        seen[name] = {"e": e, "rng": rng, "elements": elements, "h": h, "y": y, "slope": slope, "alpha": alpha,
                      "targets": targets, "state": state}  # fmt: skip
        return jnp.tensordot(e, b, axes=1), state + 1

    def learn(e, h, b, *, rng, state, targets, elements, y, slope, name):
        seen[f"{name} learned"] = {"rng": rng, "h": h, "y": y, "slope": slope, "targets": targets, "state": state}
        return jnp.zeros_like(b)

    def net(p, x):  # of the second hidden signal, the pooled one, there is no slope
        h = layer(p, p["a"], x).reshape(BATCH, 2, 3)
        return (
            jnp.max(jax.nn.gelu(jnp.einsum("bij,ijk->bk", h, p["b"].reshape(2, 3, 6))).reshape(BATCH, 3, 2), -1)
            @ p["c"][:3]
        )

    rule = lrules.direct(signal, init=NORMAL, learn=learn, targets=True, state=lambda shape: len(shape),
                         numbers={"alpha": {"b": 1.0, ".*": 2.0}})  # fmt: skip
    feedback = rule.init(jax.random.key(0), net, params, x)
    grads = lrules.value_and_grad(net, half_square, rule)(params, feedback, x, y, rng=jax.random.key(1))[1]
    assert grads.state == {"b": 3, "c": 2}
    z = np.asarray(x @ params["a"] + params["bias"][None])
    e = np.asarray(net(params, x) - y) / BATCH
    for name in ("b", "b learned"):
        close(seen[name]["h"], np.tanh(z).reshape(BATCH, 2, 3))
        close([seen[name]["y"], seen[name]["slope"]], [g.reshape(BATCH, 2, 3) for g in (z, 1 - np.tanh(z) ** 2)])
        close(seen[name]["targets"], y)
    close(seen["b"]["e"], e)
    assert seen["c"]["h"].shape == (BATCH, 3) and seen["c"]["y"] is None and seen["c learned"]["slope"] is None
    assert [seen[name]["alpha"] for name in "bc"] == [1, 2] and seen["b learned"]["state"] == 2
    assert len({jax.random.key_data(given["rng"]).tobytes() for given in seen.values()}) == 4


def everything(op, w, b, x, d, layer, *, state, targets, h, y, slope, alpha):
    """A backward pass to which all that it asks for makes a difference."""
    d = d * (1 if slope is None else slope) + 0.01 * y * targets.mean()
    d = d + (0 if h is None else jnp.tanh(h).mean()) * state["mean"][None]
    dw, dx = jax.vjp(op, w, x)[1](d)
    return alpha * dw, dx, None, {"mean": 0.9 * state["mean"] + 0.1 * y.mean(0), "count": state["count"] + 1}


def begins(layer):
    return {"mean": jnp.ones(layer.output.aval.shape[-1]), "count": jnp.zeros((), jnp.int32)}


def sequential(alpha=2.0):
    return lrules.sequential(everything, state=begins, numbers={"alpha": alpha})


def everywhere(e, b, targets, name, *, state, h, y, slope, alpha):
    """The same for a direct rule."""
    s = alpha * jnp.tensordot(e, b, axes=1) + 0.01 * jnp.sin(h) * state["mean"][None]
    s = s * (1 if slope is None else slope) + (0 if y is None else 0.001 * y * targets.mean())
    return s, {"mean": 0.9 * state["mean"] + 0.1 * h.mean(0), "count": state["count"] + 1}


def learn(e, h, b, *, state, targets):
    return correlate(e, h * state["mean"][None] * targets.mean(), b)


def direct(alpha=2.0, **options):
    state = lambda shape: {"mean": jnp.ones(shape), "count": jnp.zeros((), jnp.int32)}  # noqa: E731
    return lrules.direct(
        everywhere, init=NORMAL, learn=learn, targets=True, state=state, numbers={"alpha": alpha}, **options
    )


RULES = {
    "sequential": sequential,
    "direct": direct,
    "partition": lambda alpha=2.0: lrules.partition({"a|c": sequential(alpha), ".*": direct(alpha)}),
    "modified": lambda alpha=2.0: lrules.sign_error(lrules.without_derivatives(sequential(alpha))),
    "modified_direct": lambda alpha=2.0: lrules.sign_error(lrules.without_derivatives(direct(alpha))),
}


@pytest.mark.parametrize("net", [scanned, rematerialised])
@pytest.mark.parametrize("name", RULES)
def test_a_loop_is_as_its_layers_one_by_one(name, net):
    """Two steps: the same gradients, and a state for each iteration. A loop's carry is not an activation's output."""
    if "direct" in name or name == "partition":
        slopeless = lambda e, b, targets, name, *, state, h, alpha: everywhere(  # noqa: E731
            e, b, targets, name, state=state, h=h, y=None, slope=None, alpha=alpha
        )
        state = lambda shape: {"mean": jnp.ones(shape), "count": jnp.zeros((), jnp.int32)}  # noqa: E731
        rule = lrules.direct(slopeless, init=NORMAL, learn=learn, targets=True, state=state, numbers={"alpha": 2.0})
        rule = lrules.partition({"a|c": sequential(), ".*": rule}) if name == "partition" else rule
        rule = lrules.sign_error(rule) if name == "modified_direct" else rule
    else:
        rule = RULES[name]()
    params, x, y = drawn()
    feedback = rule.init(jax.random.key(0), net, params, x)
    each = lrules.Feedback(apart(feedback.fixed | {"b": jnp.zeros(LOOPS)}), {}, apart(feedback.state))
    each = lrules.Feedback({}, apart(feedback.learned) if feedback.learned else {}, apart(feedback.state))
    for _ in range(2):
        got = step(net, rule, params, feedback, x, y)
        want = step(unrolled, rule, apart(params), each, x, y)
        close(apart(got.params), want.params)
        close(apart(got.feedback) if got.feedback else {}, want.feedback)
        close(apart(got.state), want.state)
        feedback, each = feedback._replace(state=got.state), each._replace(state=want.state)
    assert got.state["b"]["count"].tolist() == [2] * LOOPS


def test_shared_axes_have_a_state_for_each_position():
    """With one feedback weight along time, each time is a call of its own, as for examples that are sent apart."""
    params, _, _ = drawn()
    rng = np.random.default_rng(1)
    x, y = jnp.asarray(rng.normal(size=(BATCH, 7, 5))), jnp.asarray(rng.normal(size=(BATCH, 7, 3)))

    def net(p, x):
        return jnp.tanh(x @ p["a"] + p["bias"][None, None]) @ p["c"]

    rule = direct(shared_axes=1)
    feedback = rule.init(jax.random.key(0), net, params, x)
    assert jax.tree.map(jnp.shape, feedback.state) == {"c": {"mean": (7, 6), "count": (7,)}}
    got = step(net, rule, params, feedback, x, y)
    single = lambda p, x: layer(p, p["a"], x) @ p["c"]  # noqa: E731
    parts = []
    for t in range(7):
        each = feedback._replace(state=jax.tree.map(lambda s: s[t], feedback.state))  # noqa: B023
        parts.append(step(single, direct(), params, each, x[:, t], y[:, t]))
    # the objective is the mean over times, too, and `everywhere` is not linear in it
    close(got.state, jax.tree.map(lambda *s: jnp.stack(s), *(part.state for part in parts)))


def test_only_the_branch_that_runs_moves_its_state():
    params, x, y = drawn()

    def net(p, x):
        h = layer(p, p["a"], x)
        h = jax.lax.cond(x.sum() > 1e3, lambda h: layer(p, p["b"][0], h), lambda h: layer(p, p["b"][1], h), h)
        return h @ p["c"]

    feedback = sequential().init(jax.random.key(0), net, params, x)
    got = step(net, sequential(), params, feedback, x, y)
    assert {site: int(state["count"]) for site, state in got.state.items()} == {"a": 1, "b": 1, "b#2": 0, "c": 1}
    taken = {"a": params["a"], "b0": params["b"][1], "c": params["c"], "bias": params["bias"]}
    plain = lambda p, x: layer(p, p["b0"], layer(p, p["a"], x)) @ p["c"]  # noqa: E731
    want = step(plain, sequential(), taken, sequential().init(jax.random.key(0), plain, taken, x), x, y)
    close(got.params["a"], want.params["a"])
    close(got.params["b"][1], want.params["b0"])
    close(got.state["b"], want.state["b0"])
    close(got.state["b#2"], feedback.state["b#2"])


def test_state_where_no_error_arrives():
    """A layer that no error reaches keeps its state; its function is not called."""
    params, x, y = drawn()

    def net(p, x):
        return layer(p, p["b"][0], layer(p, p["a"], x)) @ p["c"] + jax.lax.stop_gradient(x[:, :3] @ p["a"][:3, :3])

    rule = sequential()
    feedback = rule.init(jax.random.key(0), net, params, x)
    got = step(net, rule, params, feedback, x, y)
    assert {site: int(state["count"]) for site, state in got.state.items()} == {"a": 1, "b": 1, "c": 1, "a#2": 0}
    close(got.state["a#2"], feedback.state["a#2"])


# ---------------------------------------------------------------------------------------------------------------- keys


def noisy_sequential(op, w, b, x, d, layer, *, rng):
    dw, dx = jax.vjp(op, w, x)[1](d)
    return jax.random.normal(rng, w.shape, w.dtype), dx, None


def noisy_direct(e, b, targets, name, *, rng, h):
    return jax.random.normal(rng, h.shape, h.dtype)


def test_each_iteration_has_a_key_of_its_own():
    params, x, y = drawn()
    rule = lrules.sequential(noisy_sequential)
    assert rule.stochastic
    first, again, other = (
        step(scanned, rule, params, lrules.Feedback({}, {}), x, y, rng=jax.random.key(i)).params for i in (0, 0, 1)
    )
    close(first, again, 0)
    numbers = np.concatenate([np.ravel(g) for p in (first, other) for n, g in p.items() if n != "bias"])
    assert len(np.unique(numbers)) == len(numbers)  # layers, iterations, steps
    rule = lrules.direct(noisy_direct)
    grads = step(scanned, rule, params, lrules.Feedback({}, {}), x, y, rng=jax.random.key(0)).params
    assert not np.allclose(grads["b"][0], grads["b"][1])
    with pytest.raises(ValueError, match="this rule is stochastic"):
        lrules.transform(scanned, rule)(params, lrules.Feedback({}, {}), x)


def test_keys_of_another_kind():
    params, x, y = drawn()
    for rule in (lrules.sequential(noisy_sequential), lrules.direct(noisy_direct)):
        step(scanned, rule, params, lrules.Feedback({}, {}), x, y, rng=jax.random.key(0, impl="rbg"))


@pytest.mark.parametrize("rule", [lrules.sequential(noisy_sequential), lrules.direct(noisy_direct)])
def test_each_device_has_a_key_of_its_own(rule):
    params, x, _ = drawn()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    f = lrules.transform(scanned, rule)

    def gradients(params, x):
        params = jax.tree.map(lambda p: jax.lax.pcast(p, "data", to="varying"), params)
        grads = jax.grad(lambda p: f(p, lrules.Feedback({}, {}), x, rng=jax.random.key(0)).sum())(params)
        return grads["b"][None]

    x = jnp.concatenate([x[:1]] * 4)
    got = jax.jit(jax.shard_map(gradients, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")))(params, x)
    assert all(not np.allclose(got[0], got[i]) for i in (1, 2, 3))


# ------------------------------------------------------------------------------------------ under JAX's transformations


@pytest.mark.parametrize("name", RULES)
def test_vmap_over_seeds_and_numbers(name):
    """Parameters, feedback, state and a hyperparameter, each with an axis of its own."""
    params, x, y = drawn()
    feedback = RULES[name]().init(jax.random.key(0), scanned, params, x)

    def one(scale, alpha):
        scaled = jax.tree.map(lambda p: p * scale, params)
        state = jax.tree.map(lambda s: s + jnp.asarray(scale, s.dtype), feedback.state)
        return step(scanned, RULES[name](alpha), scaled, feedback._replace(state=state), x, y)

    together = jax.vmap(one)(jnp.array([1.0, 2.0]), jnp.array([0.5, 3.0]))
    for i, numbers in enumerate([(1.0, 0.5), (2.0, 3.0)]):
        close(jax.tree.map(lambda g: g[i], together), one(*numbers))  # noqa: B023


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["sequential", "direct", "partition"])
def test_sharded_batch(name, kind):
    params, x, y = drawn()
    rule = RULES[name]()
    feedback = rule.init(jax.random.key(0), scanned, params, x)
    want = step(scanned, rule, params, feedback, x, y)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    params, feedback = jax.device_put((params, feedback), NamedSharding(mesh, P()))
    x, y = jax.device_put((x, y), NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        got = step(scanned, rule, params, feedback, x, y)
    close(jax.device_get(got), want)


def test_the_users_shard_map():
    """A state that all devices share has to be the same on all of them when it is returned."""
    params, x, y = drawn()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def make(mean):
        def backward(op, w, b, x, d, layer, *, state, y):
            return *jax.vjp(op, w, x)[1](d), None, 0.9 * state + 0.1 * mean(y.mean(0))

        return lrules.sequential(backward, state=lambda layer: jnp.zeros(layer.output.aval.shape[-1]))

    plain = make(lambda v: v)
    feedback = plain.init(jax.random.key(0), scanned, params, x)
    want = step(scanned, plain, params, feedback, x, y)

    def sharded(rule):
        def run(params, feedback, x, y):
            grads = lrules.value_and_grad(scanned, half_square, rule)(params, feedback, x, y)[1]
            return jax.tree.map(lambda g: g / 4, grads.params), grads.state

        specs = (P(), P(), P("data"), P("data"))
        return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(P(), P())))(params, feedback, x, y)

    got, state = sharded(make(lambda v: jax.lax.pmean(v, "data")))
    close(got, want.params)
    close(state, want.state)
    with pytest.raises(ValueError, match="state that differs between the devices along 'data'.*pmean"):
        sharded(plain)


def test_a_scan_over_steps_with_a_state():
    params, x, y = drawn()
    for name in ("sequential", "direct"):
        rule = RULES[name]()
        feedback = rule.init(jax.random.key(0), scanned, params, x)

        def update(carry, _, rule=rule):
            params, feedback = carry
            grads = step(scanned, rule, params, feedback, x, y)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads.params)
            return (params, feedback._replace(state=grads.state)), None

        together = jax.lax.scan(update, (params, feedback), None, length=2)[0]
        close(together, update(update((params, feedback), None)[0], None)[0])
        assert together[1].state["c"]["count"] == 2


def damped(signal, state):
    return signal / (1 + state).astype(signal.dtype)


def conforming_sequential(op, w, b, x, d, layer, *, rng, state, h, y, slope):
    """What goes down is divided by a running mean square, and each step has a random length."""
    assert (h is None) == (layer.reads is None) and y.shape == d.shape and (slope is None or slope.shape == y.shape)
    dw, dx = jax.vjp(op, w, x)[1](d)
    length = 1 + 0.1 * jax.random.normal(rng)
    return (
        length.astype(w.dtype) * dw,
        damped(dx, state),
        None,
        0.9 * state + 0.1 * jnp.mean(y.astype(state.dtype) ** 2),
    )


def conforming_direct(e, b, targets, name, *, state, h):
    return damped(project(e, b), state), 0.9 * state + 0.1 * jnp.mean(h.astype(state.dtype) ** 2)


CONFORMING = {
    "sequential": lambda: lrules.sequential(conforming_sequential, state=lambda layer: jnp.ones(())),
    "direct": lambda: lrules.direct(conforming_direct, init=NORMAL, state=lambda shape: jnp.ones(())),
}


@pytest.mark.parametrize("name", mostly_slow(CONFORMING, ["sequential"]))
def test_conformance(name):
    with jax.enable_x64(False):
        lrules.testing.check_rule(CONFORMING[name]())


# --------------------------------------------------------------------------------------------- numbers that are traced

TRACED = {
    "backman": lrules.backman,
    "backman_by_name": lambda alpha: lrules.backman({"b": alpha, ".*": 0.5}),
    "closure": lambda alpha: lrules.sequential(lambda op, w, b, x, d, layer: (*jax.vjp(op, w, x)[1](alpha * d), None)),
    "direct": lambda alpha: lrules.direct(lambda e, b, t, name: alpha * jnp.tensordot(e, b, 1), init=NORMAL),
    "learn": lambda alpha: lrules.direct(
        lambda e, b, t, name: jnp.tensordot(e, b, 1), init=NORMAL,
        learn=lambda e, h, b: alpha * jnp.tensordot(e, h, axes=(0, 0)),
    ),
    "modify_error": lambda alpha: lrules.modify_error(lrules.backprop(), lambda s, name, rng: alpha * s),
    "modify_error_by_name": lambda alpha: lrules.modify_error(
        lrules.direct_feedback_alignment(), lambda s, name, rng, a: a * s, numbers={"a": {"b": alpha, "c": 2.0}}
    ),
    "quantize_update": lambda alpha: lrules.quantize_update(lrules.backman(alpha), 4),
    "partition": lambda alpha: lrules.partition({"b": lrules.backman(alpha), ".*": TRACED["direct"](alpha)}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRACED)
def test_traced_numbers(name):
    """Under jit and vmap, with layers inside a scan; and with a scan, rematerialised, around all of the network."""
    params, x, y = drawn()

    def gradients(alpha):
        rule = TRACED[name](alpha)
        feedback = rule.init(jax.random.key(0), scanned, params, x)
        grads = lrules.value_and_grad(scanned, half_square, rule)(params, feedback, x, y)[1]
        return grads.params, grads.feedback

    def around(alpha):
        rule = TRACED[name](alpha)
        feedback = rule.init(jax.random.key(0), scanned, params, x)
        f = lrules.transform(scanned, rule)

        def objective(params):
            add = jax.checkpoint(lambda total, _: (total + half_square(f(params, feedback, x), y).mean(), None))
            return jax.lax.scan(add, 0.0, None, length=1)[0]

        return jax.grad(objective)(params)

    want, other = jax.jit(lambda: gradients(0.7))(), jax.jit(lambda: gradients(1.4))()
    assert not all(np.allclose(a, b) for a, b in zip(*map(jax.tree.leaves, (want, other)), strict=True))
    close(jax.jit(gradients)(0.7), want)
    close(jax.tree.map(lambda g: g[1], jax.jit(jax.vmap(gradients))(jnp.array([1.4, 0.7]))), want)
    close(jax.jit(around)(0.7), want[0])


@pytest.mark.parametrize("name", ["backman", "learn", "modify_error_by_name"])
def test_nothing_traced_outlives_its_trace(name):
    params, x, y = drawn()

    def gradients(alpha):
        rule = TRACED[name](alpha)
        feedback = rule.init(jax.random.key(0), scanned, params, x)
        return lrules.value_and_grad(scanned, half_square, rule)(params, feedback, x, y)[1]

    with jax.checking_leaks():
        jax.jit(gradients).trace(0.7)


# ------------------------------------------------------------------------------------------------------ what they cost


def equations(fn, *args):
    """How many equations there are in a program, those inside loops and calls among them."""
    found, todo = 0, [jax.make_jaxpr(fn)(*args).jaxpr]
    while todo:
        jaxpr = todo.pop()
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        found += len(jaxpr.eqns)
        values = [v for eqn in jaxpr.eqns for p in eqn.params.values() for v in (p if isinstance(p, tuple) else (p,))]
        todo += [v for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
    return found


def test_what_is_known_costs_nothing():
    """Numbers by name add no equation to a rule that has them written out."""
    params, x, y = drawn()

    def plain(op, w, b, x, d, layer):
        dw, dx = jax.vjp(op, w, x)[1](d)
        return 0.5 * dw, dx, None

    def asking(op, w, b, x, d, layer, alpha):
        dw, dx = jax.vjp(op, w, x)[1](d)
        return alpha * dw, dx, None

    rules = lrules.sequential(plain), lrules.sequential(asking, numbers={"alpha": {"a": 0.5, "b|c": 0.5}})
    steps = [lrules.value_and_grad(scanned, half_square, rule) for rule in rules]
    counts = [equations(step, params, lrules.Feedback({}, {}), x, y) for step in steps]
    assert counts[0] == counts[1]
