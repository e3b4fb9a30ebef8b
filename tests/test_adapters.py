"""from_nnx and from_linen: the network computes what the module computes, and its parameters fit flax's own tools."""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import lrules
from lrules.adapters import from_linen, from_nnx
from lrules.network import Network
from tests.sampling import mostly_slow, pairs

pytestmark = pytest.mark.foreign

X = jax.random.normal(jax.random.key(0), (8, 4))


class NNXModel(nnx.Module):
    """Linear, BatchNorm, Dropout, Linear: one of everything that has state."""

    def __init__(self, rngs, *, rate=0.0, deterministic=False):
        self.first = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(rate, deterministic=deterministic, rngs=rngs)
        self.last = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jax.nn.relu(self.norm(self.first(x)))))


class LinenModel(nn.Module):
    """The same in Linen."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(6)(x)))
        return nn.Dense(3)(nn.Dropout(self.rate, deterministic=not train)(x))


class Mixer(nn.Module):
    """Several inputs, one of them optional by keyword, and outputs that are a pytree."""

    @nn.compact
    def __call__(self, x, y, *, mask=None):
        h = nn.Dense(5)(x) + nn.Dense(5)(y)
        h = h if mask is None else jnp.where(mask[:, None], h, 0)
        return {"sum": h, "out": nn.Dense(2)(jnp.tanh(h))}


def train(bound, x):
    return bound(x, train=True)


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def square(net):
    return lambda params, x: jnp.mean(jnp.square(net(params, x)))


# ------------------------------------------------------------------------------------------------------------------ NNX


def test_nnx_is_the_model():
    model = NNXModel(nnx.Rngs(0))
    model.eval()
    net, params = from_nnx(model)
    assert isinstance(net, Network) and isinstance(params, nnx.State)
    np.testing.assert_array_equal(net(params, X), model(X))


def test_nnx_parameter_names():
    _, params = from_nnx(NNXModel(nnx.Rngs(0)))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value") for path in paths]
    assert names == [
        "first/bias", "first/kernel", "last/bias", "last/kernel", "norm/bias", "norm/scale",
    ]  # fmt: skip


@pytest.mark.parametrize("jit", [False, True])
def test_nnx_optimizer_round_trip(jit):
    """The gradient goes into nnx.Optimizer, and trains the model as nnx.grad of the model does."""
    model, twin = (NNXModel(nnx.Rngs(0)) for _ in range(2))
    net, params = from_nnx(model)
    optimizers = [nnx.Optimizer(m, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param) for m in (model, twin)]
    grad = jax.grad(square(net))
    grad = jax.jit(grad) if jit else grad
    for _ in range(3):
        optimizers[0].update(model, grad(params, X))
        frozen = nnx.state(twin, nnx.BatchStat)
        optimizers[1].update(twin, nnx.grad(lambda m: jnp.mean(jnp.square(m(X))))(twin))
        nnx.update(twin, frozen)
    for a, b in zip(*(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (model, twin)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert_trees_equal(params, nnx.state(model, nnx.Param))  # the parameters follow the model


def test_nnx_update_writes_trained_parameters_back():
    model = NNXModel(nnx.Rngs(0))
    net, params = from_nnx(model)
    tx = optax.adam(0.1)
    opt_state = tx.init(params)
    grads = jax.jit(jax.grad(square(net)))(params, X)
    assert isinstance(grads, nnx.State)
    updates, _ = tx.update(grads, opt_state, params)
    trained = optax.apply_updates(params, updates)
    nnx.update(model, trained)
    assert_trees_equal(nnx.state(model, nnx.Param), trained)


def test_nnx_wrt_selects():
    model = nnx.Sequential(nnx.LoRALinear(4, 6, lora_rank=2, rngs=nnx.Rngs(0)), jnp.tanh)
    net, params = from_nnx(model, nnx.LoRAParam)
    assert len(jax.tree.leaves(params)) == 2
    np.testing.assert_array_equal(net(params, X), model(X))


def test_nnx_other_state_is_frozen():
    """BatchNorm trains on the batch's statistics and leaves no trace; nor does the model's later life."""
    model = NNXModel(nnx.Rngs(0))
    net, params = from_nnx(model)
    params = jax.tree.map(jnp.copy, params)
    model.train()
    before = net(params, X)
    assert_trees_equal(nnx.state(model, nnx.BatchStat)["norm"]["mean"], nnx.BatchStat(jnp.zeros(6)))
    model(3 * X + 1)
    model.eval()
    np.testing.assert_array_equal(net(params, X), before)
    h = model.first(X)
    normalised = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5)
    np.testing.assert_allclose(before, model.last(jax.nn.relu(normalised)), rtol=1e-4, atol=1e-5)


def test_nnx_state_goes_in_and_out():
    model, twin = (NNXModel(nnx.Rngs(0), rate=0.5) for _ in range(2))
    model.train(), twin.train()
    net, params, state = from_nnx(model, with_state=True)
    assert net.has_aux and net.batch_axes == (None, 0)

    def loss(params, state):
        out, state = net(params, (state, X))
        return jnp.mean(jnp.square(out)), (out, state)

    outs = []
    for _ in range(3):
        (_, (out, new)), _ = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, state)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        state = new
        np.testing.assert_allclose(out, twin(X), rtol=1e-5, atol=1e-6)
        outs.append(out)
    assert not np.array_equal(outs[0], outs[1])  # another mask
    assert state["dropout"]["rngs"]["count"][...] == 3
    np.testing.assert_allclose(state["norm"]["mean"][...], twin.norm.mean[...], rtol=1e-5)


def test_nnx_state_survives_a_scan_over_steps():
    class Sowing(NNXModel):
        def __call__(self, x):
            self.seen = nnx.Intermediate(x)  # what sow does
            return super().__call__(x)

    model = Sowing(nnx.Rngs(0), rate=0.5)
    model.train()
    net, params, state = from_nnx(model, with_state=True)
    state, outs = jax.lax.scan(lambda s, x: net(params, (s, x))[::-1], state, jnp.stack([X, X]))
    assert not np.array_equal(outs[0], outs[1])
    assert state["dropout"]["rngs"]["count"][...] == 2


def streams(remat=False, jit=False):
    class Holder(nnx.Module):
        def __init__(self, rngs, deterministic):
            self.inner = NNXModel(rngs, rate=0.5, deterministic=deterministic)

        def __call__(self, x):
            call = NNXModel.__call__
            call = nnx.remat(call) if remat else nnx.jit(call) if jit else call
            return call(self.inner, x)

    return Holder


@pytest.mark.parametrize("lifted", [{}, {"remat": True}, {"jit": True}], ids=["plain", "remat", "jit"])
@pytest.mark.parametrize("trace", [False, True], ids=["eager", "traced"])
def test_nnx_repeated_dropout_warns(lifted, trace):
    holder = streams(**lifted)
    net, params = from_nnx(holder(nnx.Rngs(0), False))
    call = jax.jit(net.apply) if trace else net
    with pytest.warns(UserWarning, match=r"Holder draws from inner/dropout/rngs, .*with_state=True"):
        call(params, X)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net, params = from_nnx(holder(nnx.Rngs(0), True))  # switched off: no warning
        (jax.jit(net.apply) if trace else net)(params, X)
        net, params, state = from_nnx(holder(nnx.Rngs(0), False), with_state=True)
        (jax.jit(net.apply) if trace else net)(params, (state, X))


def test_nnx_own_random_numbers_warn():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 3, rngs=rngs)
            self.rngs = rngs

        def __call__(self, x):
            return self.linear(x) + self.rngs.noise.normal((3,))[None]

    net, params = from_nnx(Noisy(nnx.Rngs(0, noise=1)))
    with pytest.warns(UserWarning, match="Noisy draws from rngs/noise"):
        a = net(params, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        np.testing.assert_array_equal(a, net(params, X))


def carried(carry_init):
    """A recurrent network whose cells draw the carry that they begin with."""

    class Recurrent(nnx.Module):
        def __init__(self, rngs):
            cell = nnx.LSTMCell(2, 3, rngs=rngs)
            cell.carry_init = carry_init
            self.rnn = nnx.Bidirectional(nnx.RNN(cell), nnx.RNN(nnx.GRUCell(2, 3, rngs=rngs)))
            self.dropout, self.none = nnx.Dropout(0.5, deterministic=True, rngs=rngs), nnx.Dropout(0.0, rngs=rngs)
            self.out = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(self.none(self.dropout(self.rnn(x))))

    return Recurrent(nnx.Rngs(0))


LIFTS = {"eager": lambda f: f, "jit": jax.jit, "checkpoint": jax.checkpoint}


@pytest.mark.parametrize(
    ("lift", "train"), mostly_slow(pairs(LIFTS, [True, False]), [*pairs(LIFTS, [True])[1:], ("eager", False)])
)
def test_nnx_keys_that_make_no_random_numbers_do_not_warn(lift, train):
    """A key that is drawn for a carry of zeros, or for dropout that is switched off, reaches no output."""
    lift = LIFTS[lift]
    model = carried(nnx.initializers.zeros_init())
    if not train:
        model.eval()
    net, params = from_nnx(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule = lrules.feedback_alignment()
        feedback = rule.init(jax.random.key(1), net, params, X.reshape(-1, 2, 2))
        lift(lrules.transform(net, rule))(params, feedback, X.reshape(-1, 2, 2))


def test_nnx_random_carry_warns():
    net, params = from_nnx(carried(nnx.initializers.normal()))
    with pytest.warns(UserWarning, match="Recurrent draws from rnn/rngs, ") as said:
        lrules.describe(net, lrules.direct_feedback_alignment(), params, X.reshape(-1, 2, 2))
        jax.jit(net.apply)(params, X.reshape(-1, 2, 2))
    assert len(said) == 1


@pytest.mark.parametrize("lift", [lambda f: f, jax.jit, jax.grad], ids=["eager", "jit", "grad"])
def test_warnings_point_at_the_users_line(lift):
    net, params = from_nnx(streams()(nnx.Rngs(0), False))
    f = lrules.transform(net, lrules.feedback_alignment())

    def objective(p):
        return f(p, lrules.Feedback({}, {}), X).sum()

    with warnings.catch_warnings(record=True) as said, contextlib.suppress(ValueError):  # there is no feedback
        warnings.simplefilter("always")
        lift(objective)(params)
    assert [(w.filename, w.lineno) for w in said] == [(__file__, objective.__code__.co_firstlineno + 1)]


def test_nnx_call_takes_several_arguments():
    model = nnx.MultiHeadAttention(2, 4, qkv_features=4, decode=False, rngs=nnx.Rngs(0))
    x, mask = X.reshape(2, 4, 4), jnp.tril(jnp.ones((1, 1, 4, 4), bool))
    net, params = from_nnx(model, call=lambda m, inputs: m(inputs[0], mask=inputs[1]), batch_axes=(0, None))
    assert net.batch_axes == (0, None)
    np.testing.assert_array_equal(net(params, (x, mask)), model(x, mask=mask))


def test_nnx_vmap_over_seeds():
    models = [NNXModel(nnx.Rngs(seed)) for seed in range(3)]
    for model in models:
        model.eval()
    nets, params = zip(*map(from_nnx, models), strict=True)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    net = nets[0]
    grads = jax.jit(jax.vmap(jax.grad(square(net)), in_axes=(0, None)))(stacked, X)
    for i, p in enumerate(params):
        one = jax.grad(square(net))(p, X)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)


def test_nnx_bfloat16():
    model = nnx.Sequential(
        nnx.Linear(4, 6, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), jnp.tanh,
        nnx.Linear(6, 3, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(1)),
    )  # fmt: skip
    net, params = from_nnx(model)
    grads = jax.grad(lambda p: net(p, X).astype(jnp.float32).sum())(params)
    assert net(params, X).dtype == jnp.bfloat16
    assert [g.dtype for g in jax.tree.leaves(grads)] == [p.dtype for p in jax.tree.leaves(params)]


def test_nnx_integer_inputs():
    model = nnx.Sequential(nnx.Embed(7, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(1)))
    net, params = from_nnx(model)
    tokens = jnp.array([[0, 3], [6, 6]])
    np.testing.assert_array_equal(net(params, tokens), model(tokens))
    grads = jax.grad(square(net))(params, tokens)
    assert np.all(grads["layers"][0]["embedding"][...][1] == 0)


def test_nnx_leaves_no_tracer_behind():
    model = NNXModel(nnx.Rngs(0))
    net, params = from_nnx(model)
    with jax.checking_leaks():
        jax.jit(jax.grad(square(net)))(params, X)
    assert all(isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
               for leaf in jax.tree.leaves(nnx.state(model)))  # fmt: skip


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: nn.Dense(3), TypeError, r"Dense is a Linen module: use from_linen"),
        (lambda: nnx.Linear, TypeError, r"instance of an NNX module.*build the model first"),
        (lambda: jnp.tanh, TypeError, r"wrap a function as Network"),
        (lambda: nnx.Dict(a=nnx.Param(jnp.ones(3))), TypeError, r"Dict has no __call__: give from_nnx call="),
        (lambda: nnx.Sequential(jnp.tanh), ValueError, r"No variable of Sequential matches wrt="),
    ],
)
def test_nnx_refusals(make, error, message):
    with pytest.raises(error, match=message):
        from_nnx(make())


@pytest.mark.parametrize("mode", ["hijax", "ref"])
def test_nnx_variables_that_change_in_place(mode):
    """They are refused, and the remedy works."""
    with nnx.var_defaults(**{mode: True}):
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"from_nnx\(nnx\.\w+\(model, hijax=False, ref=False\)\)") as error:
        from_nnx(model)
    convert = getattr(nnx, str(error.value).split("nnx.")[-1].split("(")[0])
    net, params = from_nnx(convert(model, hijax=False, ref=False))
    kernel = net(params, jnp.eye(3)) - net(params, jnp.zeros((1, 3)))
    np.testing.assert_allclose(kernel, params["kernel"][...], rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- Linen


@pytest.fixture(scope="module")
def linen():
    module = LinenModel(rate=0.5)
    return module, module.init(jax.random.key(0), X)


def test_linen_is_the_module(linen):
    module, variables = linen
    net, params = from_linen(module, variables)
    assert isinstance(net, Network) and params is variables["params"]
    np.testing.assert_array_equal(net(params, X), module.apply(variables, X))
    rest = {"batch_stats": variables["batch_stats"]}
    jitted = jax.jit(lambda params, x: module.apply({"params": params, **rest}, x))
    np.testing.assert_array_equal(jax.jit(net.apply)(params, X), jitted(params, X))


def test_linen_gradient_is_the_modules(linen):
    module, variables = linen
    net, params = from_linen(module, variables)
    rest = {"batch_stats": variables["batch_stats"]}
    ours = jax.grad(square(net))(params, X)
    theirs = jax.grad(lambda p: jnp.mean(jnp.square(module.apply({"params": p, **rest}, X))))(params)
    assert_trees_equal(ours, theirs)


def test_linen_batch_norm_in_training_discards_updates():
    module = LinenModel()
    variables = module.init(jax.random.key(0), X)
    net, params = from_linen(module, variables, call=train)
    expected, updates = module.apply(variables, X, train=True, mutable=["batch_stats"])
    assert not np.array_equal(updates["batch_stats"]["BatchNorm_0"]["mean"], np.zeros(6))
    np.testing.assert_array_equal(net(params, X), expected)
    np.testing.assert_array_equal(net(params, X), expected)
    jax.jit(jax.grad(square(net)))(params, X)


def test_linen_state_goes_in_and_out():
    module = LinenModel()
    variables = module.init(jax.random.key(0), X)
    net, params, state = from_linen(module, variables, call=train, with_state=True)
    assert net.has_aux and net.batch_axes == (None, 0) and set(state) == {"batch_stats"}
    expected, updates = module.apply(variables, X, train=True, mutable=["batch_stats"])
    out, new = jax.jit(net.apply)(params, (state, X))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(updates), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.lax.scan(lambda s, x: net(params, (s, x))[::-1], state, jnp.stack([X, X]))


def test_linen_dropout_with_state_advances(linen):
    module, variables = linen
    net, params, state = from_linen(module, variables, call=train, rngs={"dropout": jax.random.key(1)}, with_state=True)
    step = jax.jit(net.apply)
    a, state1 = step(params, (state, X))
    b, _ = step(params, (state1, X))
    again, _ = step(params, (state, X))
    assert jax.tree.structure(state) == jax.tree.structure(state1)
    assert not np.array_equal(a, b)
    np.testing.assert_array_equal(a, again)


@pytest.mark.parametrize("key", [jax.random.key, jax.random.PRNGKey], ids=["key", "PRNGKey"])
def test_linen_repeated_dropout_warns(linen, key):
    module, variables = linen
    rngs = {"dropout": key(1)}
    net, params = from_linen(module, variables, call=train, rngs=rngs)
    expected, _ = module.apply(variables, X, train=True, rngs=rngs, mutable=["batch_stats"])
    with pytest.warns(UserWarning, match=r"LinenModel gets keys that do not change, dropout: .*with_state=True"):
        np.testing.assert_array_equal(net(params, X), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(net.apply)(params, X)  # once is enough
        net, params = from_linen(module, variables, rngs=rngs)  # switched off
        jax.jit(net.apply)(params, X)
    net, params, state = from_linen(module, variables, call=train, rngs=rngs, with_state=True)
    assert net(params, (state, X))[1]["rngs"]["dropout"].shape == rngs["dropout"].shape


def test_linen_without_a_key_says_what_to_give(linen):
    module, variables = linen
    net, params = from_linen(module, variables, call=train)
    with pytest.raises(ValueError, match=r"LinenModel draws random numbers.*rngs=\{'dropout': key\}"):
        net(params, X)


def test_linen_several_arguments_and_outputs():
    module, mask = Mixer(), jnp.arange(8) < 5
    variables = module.init(jax.random.key(0), X, X)
    net, params = from_linen(
        module, variables, call=lambda m, i: m(i["x"], i["y"], mask=i["mask"]), batch_axes={"x": 0, "y": 0, "mask": 0}
    )
    out = net(params, {"x": X, "y": 2 * X, "mask": mask})
    assert_trees_equal(out, module.apply(variables, X, 2 * X, mask=mask))


def test_linen_call_may_use_other_methods():
    class TwoMethods(nn.Module):
        def setup(self):
            self.encoder, self.decoder = nn.Dense(2), nn.Dense(4)

        def __call__(self, x):
            return self.decoder(self.encoder(x))

        def encode(self, x):
            return self.encoder(x)

    module = TwoMethods()
    variables = module.init(jax.random.key(0), X)
    net, params = from_linen(module, variables, call=TwoMethods.encode)
    np.testing.assert_array_equal(net(params, X), module.apply(variables, X, method="encode"))


def test_linen_vmap_over_seeds(linen):
    module, variables = linen
    net, _ = from_linen(module, variables)
    params = jax.vmap(lambda key: module.init(key, X)["params"])(jax.random.split(jax.random.key(0), 3))
    grads = jax.jit(jax.vmap(jax.grad(square(net)), in_axes=(0, None)))(params, X)
    one = jax.grad(square(net))(jax.tree.map(lambda p: p[1], params), X)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-5, atol=1e-6)


def test_linen_bfloat16_and_integer_inputs():
    module = nn.Sequential([nn.Embed(7, 4, dtype=jnp.bfloat16), nn.Dense(3, dtype=jnp.bfloat16)])
    tokens = jnp.array([[0, 3], [6, 6]])
    net, params = from_linen(module, module.init(jax.random.key(0), tokens))
    assert net(params, tokens).dtype == jnp.bfloat16
    grads = jax.grad(lambda p: net(p, tokens).astype(jnp.float32).sum())(params)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "args, error, message",
    [
        ((nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {"params": {}}), TypeError, "Linear is an NNX module: use from_nnx"),
        ((nn.Dense, {"params": {}}), TypeError, "instance of a Linen module.*build the module first"),
        ((jnp.tanh, {"params": {}}), TypeError, "wrap a function as Network"),
        ((nn.Dense(2), {"kernel": X}), ValueError, r"Dense must have a collection 'params', got \['kernel'\]"),
        ((nn.Dense(2), X), ValueError, "got ArrayImpl: give the result of module.init"),
    ],
)
def test_linen_refusals(args, error, message):
    with pytest.raises(error, match=message):
        from_linen(*args)


@pytest.mark.parametrize("adapt", [
    lambda: from_nnx(NNXModel(nnx.Rngs(0)), with_state=True),
    lambda: from_linen(LinenModel(), LinenModel().init(jax.random.key(0), X), with_state=True),
], ids=["nnx", "linen"])  # fmt: skip
def test_a_network_with_state_asks_for_it(adapt):
    net, params, _ = adapt()
    with pytest.raises(TypeError, match=r"must be \(state, inputs\), got"):
        net(params, X)
