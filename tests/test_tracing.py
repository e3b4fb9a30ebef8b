"""How often a network is traced and analysed, and that what is kept of it serves only where it is right."""

import collections
import contextvars
import copy
import functools
import gc
import importlib
import pickle
import sys
import threading
import types
import weakref
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from lrules.engine.analysis import Analysis
from tests.sampling import mostly_slow, pairs

KEY = jax.random.key(0)
X, Y = jax.random.normal(KEY, (4, 3)), jnp.ones((4, 2))
PARAMS = {"a": jax.random.normal(KEY, (3, 5)), "b": jax.random.normal(KEY, (5, 2))}

SEQUENTIAL = {
    "feedback_alignment": lrules.feedback_alignment(),
    "backman": lrules.backman(),
    "dual_propagation": lrules.dual_propagation(),
    "modified": lrules.sign_error(lrules.drop_error(lrules.quantize_error(lrules.feedback_alignment(), 4), 0.5)),
    "derivatives": lrules.without_derivatives(lrules.drop_error(lrules.sign_symmetry(), 0.5)),
    "partition": lrules.partition({"a": lrules.backprop(), "b": lrules.feedback_alignment()}),
}
DIRECT = {
    "direct_feedback_alignment": lrules.direct_feedback_alignment(),
    "modified": lrules.quantize_update(lrules.drop_error(lrules.direct_feedback_alignment(), 0.5), 4),
    "updates": lrules.quantize_update(lrules.drop_error(lrules.backman(), 0.5), 4),  # example by example
}


def model(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def loss(outputs, targets):
    return jnp.square(outputs - targets).sum(-1)


class Counted:
    """A network that counts how often it is traced, and how often it is analysed."""

    def __init__(self, monkeypatch, apply=model):
        self.traced = self.analysed = 0
        finish = Analysis.finish

        def counted(analysis, *args):
            self.analysed += 1
            return finish(analysis, *args)

        def call(*args):
            self.traced += 1
            return apply(*args)

        monkeypatch.setattr(Analysis, "finish", counted)
        self.net = lrules.Network(call)

    def taken(self) -> tuple[int, int]:
        found = self.traced, self.analysed
        self.traced = self.analysed = 0
        return found


def step(net, rule, params=PARAMS, x=X, y=Y):
    """One call of `value_and_grad`, with feedback made from another network of the same shapes."""
    feedback = rule.init(KEY, model, params, x)
    return lrules.value_and_grad(net, loss, rule)(params, feedback, x, y, **({"rng": KEY} if rule.stochastic else {}))


def both(rules: dict[str, dict[str, lrules.Rule]], slow=()):
    given = [(rule, n, f"{kind} {name}") for (kind, n), some in rules.items() for name, rule in some.items()]
    marks = {name: [pytest.mark.slow] for name in slow}
    return pytest.mark.parametrize(
        "rule, times", [pytest.param(rule, n, marks=marks.get(name, []), id=name) for rule, n, name in given]
    )


EVERY = {("sequential", 1): SEQUENTIAL, ("direct", 2): DIRECT}
every_rule = both(EVERY)  # type: ignore[arg-type]


@every_rule
def test_a_compilation_traces_the_network_once_or_twice(monkeypatch, rule, times):
    feedback = rule.init(KEY, model, PARAMS, X)
    counted = Counted(monkeypatch)
    run = lrules.value_and_grad(counted.net, loss, rule)
    key = {"rng": KEY} if rule.stochastic else {}
    jax.jit(lambda *args: run(*args, **key)).trace(PARAMS, feedback, X, Y)
    assert counted.taken() == (times, 1)


@every_rule
def test_the_second_call_without_jit_traces_nothing(monkeypatch, rule, times):
    feedback = rule.init(KEY, model, PARAMS, X)
    counted = Counted(monkeypatch)
    run = lrules.value_and_grad(counted.net, loss, rule)
    key = {"rng": KEY} if rule.stochastic else {}
    first = run(PARAMS, feedback, X, Y, **key)
    assert counted.taken() == (times, 1)
    second = run(PARAMS, feedback, X, Y, **key)
    assert counted.taken() == (0, 0)
    chex.assert_trees_all_equal(first, second)


def test_what_is_kept_serves_other_rules_and_compilations(monkeypatch):
    counted = Counted(monkeypatch)
    step(counted.net, lrules.feedback_alignment())
    assert counted.traced == 1
    step(counted.net, lrules.drop_error(lrules.backman(), 0.5))
    jax.jit(functools.partial(step, counted.net, lrules.dual_propagation()))(PARAMS)
    assert counted.traced == 1
    step(counted.net, lrules.direct_feedback_alignment())
    lrules.describe(counted.net, lrules.backman(), PARAMS, X)
    assert counted.traced == 2
    step(counted.net, lrules.backman(), x=X[:3], y=Y[:3])
    assert counted.traced == 3


def test_the_count_by_chex():
    traced = chex.assert_max_traces(model, n=2)  # the second is of twice the batch
    for rule in (lrules.feedback_alignment(), lrules.direct_feedback_alignment()):
        net = lrules.Network(traced)
        chex.clear_trace_counter()
        step(net, rule)
        step(net, rule)


# -- what a function closes over


def closures() -> dict[str, tuple[Any, Any]]:
    """Functions `(params, x)` that read a factor, and `put(value)`, which replaces it."""
    cell = jnp.ones((1, 2))
    items, named, box = [jnp.ones((1, 2))], {"c": jnp.ones((1, 2))}, types.SimpleNamespace(c=jnp.ones((1, 2)))
    array = np.ones((1, 2), np.float32)
    shown = np.broadcast_to(array, (4, 2))  # it cannot be written to

    def put_cell(value):
        nonlocal cell
        cell = value

    def with_default(params, x, *, c=items):
        return model(params, x) * c[0]

    def put_global(value):
        globals()["GLOBAL"] = value

    class Owner:
        c: Any = jnp.ones((1, 2))

        def __call__(self, params, x):
            return self.inner(params, x)

        def inner(self, params, x):
            return model(params, x) * self.c

    owner, by_class = Owner(), type("ByClass", (Owner,), {})()
    queue, view = collections.deque([0]), types.MappingProxyType(named)
    variable: contextvars.ContextVar[Any] = contextvars.ContextVar("variable")
    settings, package = types.ModuleType("settings"), types.ModuleType("package")
    package.settings = settings  # type: ignore[attr-defined]
    sys.modules["lrules_test_settings"] = settings

    def importing(params, x):
        from lrules_test_settings import c  # type: ignore[import-not-found]

        return model(params, x) * c

    return {
        "a closure": (lambda params, x: model(params, x) * cell, put_cell),
        "a closure's closure": ((lambda f: lambda p, x: f(p, x))(lambda p, x: model(p, x) * cell), put_cell),
        "a list": (lambda params, x: model(params, x) * items[0], lambda v: items.__setitem__(0, v)),
        "a dict": (lambda params, x: model(params, x) * named["c"], lambda v: named.update(c=v)),
        "an object": (lambda params, x: model(params, x) * box.c, lambda v: setattr(box, "c", v)),
        "a default": (with_default, lambda v: items.__setitem__(0, v)),
        "a partial": (functools.partial(with_default, c=items), lambda v: items.__setitem__(0, v)),
        "a method": (owner.inner, lambda v: setattr(owner, "c", v)),
        "a callable": (owner, lambda v: setattr(owner, "c", v)),
        "a class": (by_class, lambda v: setattr(type(by_class), "c", v)),
        "a global": (lambda params, x: helper(params, x), put_global),
        "a deque": (lambda params, x: model(params, x) * queue[0], lambda v: queue.__setitem__(0, v)),
        "a view of a dict": (lambda params, x: model(params, x) * view["c"], lambda v: named.update(c=v)),
        "a context": (lambda params, x: model(params, x) * variable.get(), variable.set),
        "a module": (lambda params, x: model(params, x) * settings.c, lambda v: setattr(settings, "c", v)),
        "a module of a module": (
            lambda params, x: model(params, x) * package.settings.c, lambda v: setattr(settings, "c", v)
        ),
        "an import": (importing, lambda v: setattr(settings, "c", v)),
        "numpy in place": (lambda params, x: model(params, x) * array, lambda v: array.__setitem__(slice(None), v)),
        "a view of numpy": (
            lambda params, x: model(params, x) * shown, lambda v: array.__setitem__(slice(None), v)
        ),
    }  # fmt: skip


GLOBAL = jnp.ones((1, 2))


def helper(params, x):
    return model(params, x) * GLOBAL


KINDS = {"jax": jnp.asarray, "numpy": np.asarray}
IN_TURNS = [(where, list(KINDS)[i % 2]) for i, where in enumerate(closures())]  # the way matters, and the kind


@pytest.mark.parametrize(("where", "kind"), mostly_slow(pairs(closures(), KINDS), IN_TURNS))
def test_what_a_function_closes_over_may_be_replaced(monkeypatch, where, kind):
    (apply, put), kind = closures()[where], KINDS[kind]
    put(kind([[1.0, 1.0]], jnp.float32))
    counted = Counted(monkeypatch, apply)
    rule = lrules.direct_feedback_alignment()
    for value in ([[1.0, 1.0]], [[2.0, 3.0]], [[1.0, 1.0]], [[-1.0, 0.5]]):
        put(kind(value, jnp.float32))
        counted.taken()
        for _ in range(2):
            (_, outputs), grads = step(counted.net, rule)
            now = jnp.asarray(value, jnp.float32)
            (_, wanted), wanted_grads = step(lrules.Network(lambda p, x, now=now: model(p, x) * now), rule)
            chex.assert_trees_all_equal((outputs, grads), (wanted, wanted_grads))
        assert counted.traced == 2  # but only once for each value


def test_a_flag_of_a_model_may_be_set():
    class Model:
        training = True

        def __call__(self, params, x):
            return model(params, x) * (2 if self.training else 1)

    made = Model()
    net = lrules.Network(made)
    (_, doubled), _ = step(net, lrules.backman())
    made.training = False
    (_, outputs), _ = step(net, lrules.backman())
    chex.assert_trees_all_equal(doubled, 2 * outputs)


def test_the_order_of_a_dict_counts():
    blocks = {"double": lambda y: 2 * y, "raise": lambda y: y + 1}
    net = lrules.Network(lambda params, x: functools.reduce(lambda y, f: f(y), blocks.values(), model(params, x)))
    for _ in range(2):
        (_, outputs), _ = step(net, lrules.backman())
        chex.assert_trees_all_equal(outputs, net.apply(PARAMS, X))
        blocks["double"] = blocks.pop("double")


def test_what_a_function_writes_does_not_count(monkeypatch):
    calls, seen, counts = [], {}, types.SimpleNamespace(n=0)

    def apply(params, x):
        calls.append(x.shape)
        seen[len(calls)] = counts.n
        counts.n += 1
        return model(params, x)

    net = lrules.Network(apply)
    step(net, lrules.backman())
    calls.clear()
    step(net, lrules.backman())
    assert calls == [] and counts.n == 1


def test_arrays_too_large_to_be_compared_are_read_anew():
    large = np.ones((2**19, 2), np.float32)
    net = lrules.Network(lambda params, x: model(params, x) * large[-1:])
    step(net, lrules.backman())
    large[-1] = [2, 3]
    (_, outputs), _ = step(net, lrules.backman())
    chex.assert_trees_all_equal(outputs, model(PARAMS, X) * jnp.array([[2.0, 3.0]]))
    large.flags.writeable = False  # what cannot be written to is told by itself
    assert net.graph(PARAMS, X) is net.graph(PARAMS, X)


# -- tracers


@pytest.mark.slow
@pytest.mark.parametrize("rule", [lrules.feedback_alignment(), lrules.direct_feedback_alignment()])
def test_a_function_may_close_over_a_tracer(rule):
    def scaled(c):
        net = lrules.Network(lambda params, x: model(params, x) * c)
        (value, outputs), grads = step(net, rule)
        again = step(net, rule)[1]
        chex.assert_trees_all_equal_shapes(grads, again)
        return value, outputs, again.params

    wanted = [scaled(c) for c in (2.0, 3.0)]
    with jax.checking_leaks():
        for run in (jax.jit(scaled), lambda c: jax.tree.map(lambda v: v[0], jax.vmap(scaled)(c[None]))):
            for c, value in zip((2.0, 3.0), wanted, strict=True):
                chex.assert_trees_all_close(run(jnp.asarray(c)), value, rtol=1e-4)
    slope = jax.grad(lambda c: scaled(c)[1].sum())(2.0)
    np.testing.assert_allclose(slope, model(PARAMS, X).sum(), rtol=1e-5)


def test_a_tracer_may_be_put_where_a_kept_network_reads_it():
    holder: list[Any] = [None]
    hidden = weakref.WeakKeyDictionary()  # where nobody looks
    key = types.SimpleNamespace()
    for put, net in (
        (lambda c: holder.__setitem__(0, c), lrules.Network(lambda params, x: model(params, x) * holder[0])),
        (lambda c: hidden.__setitem__(model, c), lrules.Network(lambda params, x: model(params, x) * hidden[model])),
    ):

        def run(c, put=put, net=net):
            put(c)
            out = step(net, lrules.backman())[0][1], step(net, lrules.backman())[0][1]
            put(None)
            return out

        for c in (2.0, 3.0):
            wanted = model(PARAMS, X) * c
            with jax.checking_leaks():
                for outputs in jax.jit(run)(c):
                    np.testing.assert_allclose(outputs, wanted, rtol=1e-5)
    del key


LONG = [
    *("direct updates", "direct modified", "sequential dual_propagation", "sequential modified"),
    *("sequential derivatives", "sequential partition"),
]


@both(EVERY, slow=LONG)  # type: ignore[arg-type]
def test_a_network_that_is_kept_leaks_no_tracers(rule, times):
    net = lrules.Network(model)
    with jax.checking_leaks():
        jax.jit(functools.partial(step, net, rule)).trace(PARAMS)
        jax.jit(lambda params: step(lrules.Network(model), rule, params)).trace(PARAMS)
    jax.vmap(lambda x: step(net, rule, x=x)[0])(jnp.stack([X, 2 * X]))


def test_hyperparameters_may_be_tracers():
    net = lrules.Network(model)

    def run(alpha, rate):
        rule = lrules.modify_error(lrules.backman(alpha), lambda signal, name, rng: rate * signal)
        return step(net, rule)[1].params

    for args in ((1.0, 2.0), (0.5, 3.0)):
        wanted = run(*args)
        with jax.checking_leaks():
            found = jax.jit(run)(*args)
        chex.assert_trees_all_close(found, wanted, rtol=1e-4)
        stacked = jax.vmap(run)(*(jnp.array([a, 2 * a]) for a in args))
        chex.assert_trees_all_close(jax.tree.map(lambda v: v[0], stacked), wanted, rtol=1e-4)


TRACEABLE = {
    "quantize_error": lambda v: lrules.quantize_error(lrules.feedback_alignment(), 3, scale=v),
    "quantize_update": lambda v: lrules.quantize_update(lrules.backprop(), 3, scale={"a": v, ".*": 0.1}),
    "node_perturbation": lrules.node_perturbation,
}


@pytest.mark.parametrize("name", TRACEABLE)
def test_options_may_be_tracers(name):
    net = lrules.Network(model)
    run = lambda value: step(net, TRACEABLE[name](value))[1].params  # noqa: E731
    wanted, values = [run(0.5), run(0.75)], jnp.array([0.5, 0.75])
    compiled, stacked = jax.jit(run), jax.vmap(run)(values)
    for i in range(2):
        chex.assert_trees_all_close(compiled(values[i]), wanted[i], rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(jax.tree.map(lambda v: v[i], stacked), wanted[i], rtol=1e-4, atol=1e-5)  # noqa: B023


@pytest.mark.parametrize("make", [
    lambda v: lrules.drop_error(lrules.backprop(), v),
    lambda v: lrules.quantize_error(lrules.backprop(), v),
    lambda v: lrules.dual_propagation(beta=v),
    lambda v: lrules.dual_propagation(input_nudge=v),
    lambda v: lrules.dual_propagation(tolerance=v, iterations=2),
    lambda v: lrules.dual_propagation(damping=v, adjoint=False),
])  # fmt: skip
def test_options_that_may_not_be_tracers(make):
    with pytest.raises(ValueError, match="and not traced, got float32.*: make one rule for each value, outside of jit"):
        jax.jit(lambda v: step(lrules.Network(model), make(v))[1].params)(jnp.float32(0.5))


# -- JAX's settings


def test_settings_of_jax_are_told_apart(monkeypatch):
    counted = Counted(monkeypatch)
    for context in (
        lambda: jax.default_matmul_precision("float32"),
        lambda: jax.default_matmul_precision("bfloat16"),
        lambda: jax.enable_x64(True),
    ):
        with context():
            graph = counted.net.graph(PARAMS, X)
            assert counted.taken() == (1, 1)
            assert counted.net.graph(PARAMS, X) is graph
            assert counted.taken() == (0, 0)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda v: np.asarray(v, np.float64), (PARAMS, X))
        outputs = step(counted.net, lrules.feedback_alignment(), *double, y=np.ones((4, 2)))[0][1]
    assert outputs.dtype == jnp.float64


def test_meshes_and_splits_are_told_apart(monkeypatch):
    counted = Counted(monkeypatch)
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    whole = step(counted.net, lrules.feedback_alignment())
    with jax.set_mesh(mesh):
        split = jax.device_put(X, jax.NamedSharding(mesh, jax.P("i")))
        found = step(counted.net, lrules.feedback_alignment(), x=split)
        assert counted.net.graph(PARAMS, split).arguments[0].aval.sharding.spec == jax.P("i", None)
    chex.assert_trees_all_close(found, whole, rtol=1e-5)
    plain = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    for check in (True, False):

        def run(x, y, check=check):
            return jax.shard_map(
                lambda x, y: step(counted.net, lrules.backman(axis_name="i"), x=x, y=y)[1].params,
                mesh=plain, in_specs=jax.P("i"), out_specs=jax.P(), check_vma=check,
            )(x, y)  # fmt: skip

        chex.assert_trees_all_close(jax.jit(run)(X, Y), jax.jit(run)(X, Y))


# -- the life of what is kept


def test_at_most_so_many_are_kept(monkeypatch):
    counted = Counted(monkeypatch)
    graphs = [weakref.ref(counted.net.graph(PARAMS, jnp.ones((n, 3)))) for n in range(1, 41)]
    gc.collect()
    assert sum(graph() is not None for graph in graphs) == 32
    counted.taken()
    counted.net.graph(PARAMS, jnp.ones((9, 3)))  # the oldest, which becomes the newest
    assert counted.taken() == (0, 0)
    counted.net.graph(PARAMS, jnp.ones((41, 3)))
    counted.taken()
    counted.net.graph(PARAMS, jnp.ones((9, 3)))
    assert counted.taken() == (0, 0)
    counted.net.graph(PARAMS, jnp.ones((10, 3)))
    assert counted.taken() == (1, 1)


def test_it_dies_with_the_network():
    def make(params, x):
        return model(params, x)

    net = lrules.Network(make)
    step(net, lrules.direct_feedback_alignment())
    step(net.pushing(lrules.engine.handlers.Handler()), lrules.backman())
    graph, function = weakref.ref(net.graph(PARAMS, X)), weakref.ref(make)
    del net, make
    gc.collect()
    assert graph() is None and function() is None


def test_it_belongs_to_neither_equality_nor_copies():
    net, other = lrules.Network(model), lrules.Network(model)
    graph = net.graph(PARAMS, X)
    assert net == other and hash(net) == hash(other) and "traces" not in repr(net)
    assert net.pushing(lrules.engine.handlers.Handler()).graph(PARAMS, X) is graph
    for again in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net), copy.copy(net)):
        assert again == net
        chex.assert_trees_all_equal(step(again, lrules.backman()), step(net, lrules.backman()))
    assert pickle.loads(pickle.dumps(net)).graph(PARAMS, X) is not graph


@pytest.mark.slow
def test_caches_of_jax_may_be_cleared(monkeypatch):
    counted = Counted(monkeypatch)
    wanted = step(counted.net, lrules.backman())
    for _ in range(6):
        jax.clear_caches()
        chex.assert_trees_all_equal(step(counted.net, lrules.backman()), wanted)


def test_threads_share_a_network():
    net = lrules.Network(model)
    rules = [*SEQUENTIAL.values(), DIRECT["direct_feedback_alignment"]]
    wanted = {n: [step(lrules.Network(model), rule, x=X[:n], y=Y[:n])[1] for rule in rules] for n in (2, 3, 4)}
    start, failures = threading.Barrier(6), []

    def work(i):
        try:
            start.wait()
            for n in (2, 3, 4):
                for k in range(len(rules)):
                    k = (k + i) % len(rules)
                    chex.assert_trees_all_equal(step(net, rules[k], x=X[:n], y=Y[:n])[1], wanted[n][k])
        except Exception as error:  # noqa: BLE001  whatever it is, the test has failed
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


PLANNED = (
    SEQUENTIAL
    | DIRECT
    | {
        "node_perturbation": lrules.node_perturbation(0.1),
        "predictive_coding": lrules.predictive_coding(),
        "equilibrium_propagation": lrules.equilibrium_propagation(),
    }
)


@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_is_made_once_for_each_traced_network(name, monkeypatch):
    """What a rule does where is settled once, and called again with the same shapes it is there."""
    rule, made = PLANNED[name], []
    # `plan_elsewhere` of planning.py calls it for dual propagation, predictive coding and equilibrium propagation.
    for module in ("constructors", "engine.planning", "rules.node_perturbation"):
        held = functools.reduce(getattr, module.split("."), lrules)
        held = held if isinstance(held, types.ModuleType) else importlib.import_module(f"lrules.{module}")
        make = held.make_plan
        monkeypatch.setattr(held, "make_plan", lambda *a, make=make, **k: made.append(1) or make(*a, **k))
    net = lrules.Network(model)
    rng = {"rng": KEY} if rule.stochastic else {}
    feedback = rule.init(KEY, net, PARAMS, X)
    assert len(made) == 1
    step = lrules.value_and_grad(net, lambda y, t: ((y - t) ** 2).sum(-1), rule)
    first = step(PARAMS, feedback, X, Y, **rng)[1].params
    counted = len(made)
    second = step(PARAMS, feedback, X, Y, **rng)[1].params
    assert len(made) == counted <= 2  # the plan of a step may differ from that of init
    chex.assert_trees_all_equal(first, second)


def test_a_plan_is_dropped_with_its_rule():
    net, graph = lrules.Network(model), None
    rule = lrules.backman()
    rule.init(KEY, net, PARAMS, X)
    graph = net.graph(PARAMS, X)
    assert len(graph._made_for) == 1
    del rule
    gc.collect()
    assert len(graph._made_for) == 0


def test_plans_of_traced_hyperparameters_are_not_mixed_up():
    net = lrules.Network(model)

    def grads(alpha):
        f = lrules.transform(net, lrules.backman(alpha))
        return jax.grad(lambda p: f(p, lrules.Feedback({}, {}), X).sum())(PARAMS)

    one, two = jax.jit(grads)(1.0), jax.jit(grads)(2.0)
    together = jax.vmap(grads)(jnp.array([1.0, 2.0]))
    for i, alone in enumerate((one, two)):
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=1e-5, atol=1e-6)
    with jax.checking_leaks():
        jax.jit(grads)(3.0)
