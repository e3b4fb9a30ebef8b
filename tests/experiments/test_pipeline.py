"""Pipelines of stages: the numbers of one device, the operations of the critical path, and their timetables."""

import doctest
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrules
from experiments.errors import InputError
from experiments.parallel import counts, hlo, pipeline, report, stages, steps, timetable
from experiments.parallel.split import split_feedback
from tests.experiments.programs import run

STAGES = 4  # the devices of the tests
squared = lrules.testing.half_squared_error
NONE = lrules.Feedback({}, {})
BETWEEN = lrules.direct_feedback_alignment(at=stages.BOUNDARY)
RULES = {
    "dfa": lrules.direct_feedback_alignment(),
    "between": BETWEEN,
    "adaptive": lrules.direct_feedback_alignment(adaptive=True),
    "rank": lrules.direct_feedback_alignment(rank=2),
    "sign": lrules.sign_error(lrules.direct_feedback_alignment()),  # depends on the scale of the error
    "scaled": lrules.quantize_error(lrules.direct_feedback_alignment(), bits=4),
    "monotone": lrules.monotone_dfa(),
}


@pytest.fixture(autouse=True)
def _enough_devices():
    if jax.device_count() < STAGES:
        pytest.skip(f"needs {STAGES} devices")


def dense(dtype, batch=12, layers=2):
    net = stages.mlp(jnp.tanh)
    params = stages.mlp_params(
        jax.random.key(0), inputs=5, width=8, outputs=3, stages=STAGES, layers=layers, dtype=dtype
    )
    x, y = (jax.random.normal(jax.random.key(i), (batch, n), dtype) for i, n in ((1, 5), (2, 3)))
    return net, params, x, y, squared


def blocks(dtype, batch=12, length=3, width=6, words=7):
    """A small transformer: attention and a dense layer with skips; the classes of all positions are the outputs."""

    def matrix(key, *shape):
        return jax.random.normal(jax.random.key(key), shape, dtype) / shape[0] ** 0.5

    def first(p, tokens):
        return p["words"][tokens]

    def stage(p, h):
        n = jax.nn.standardize(h)
        q, k, v = (n @ p[name] for name in ("q", "k", "v"))
        h = h + jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k)) @ v
        return h + jax.nn.gelu(jax.nn.standardize(h) @ p["up"]) @ p["down"]

    def block(i):
        shapes = {"q": (width,) * 2, "k": (width,) * 2, "v": (width,) * 2, "up": (width, 9), "down": (9, width)}
        return {name: matrix(10 * i + j, *shape) for j, (name, shape) in enumerate(shapes.items(), 1)}

    def last(p, h):
        return h @ p["out"]

    def loss(outputs, targets):
        return -jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[..., None], -1)[..., 0].mean(-1)

    params = stages.Params(
        {"words": matrix(0, words, width)}, [block(i) for i in range(STAGES)], {"out": matrix(99, width, words)}
    )
    x, y = (jax.random.randint(jax.random.key(i), (batch, length), 0, words) for i in (3, 4))
    return stages.Staged(first, stage, last), params, x, y, loss


def one_device(problem, rule):
    net, params, x, y, loss = problem
    feedback = rule.init(jax.random.key(5), net.whole, params, x)
    (value, _), grads = jax.jit(lrules.value_and_grad(net.whole, loss, rule))(params, feedback, x, y)
    return feedback, (value, stages.stacked(grads.params)), grads.feedback


def piped(problem, rule, feedback, microbatches):
    net, params, x, y, loss = problem
    mesh = stages.make_mesh(STAGES)
    placed = stages.place(stages.stacked(params), mesh)
    if rule is None:
        return jax.jit(steps.gpipe(net, loss, mesh, microbatches))(placed, {}, x, y)
    split = stages.place(split_feedback(net, rule, params, feedback, x), mesh)
    return jax.jit(steps.direct(net, loss, rule, mesh, microbatches))(placed, split, x, y)


# -------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("make, microbatches", [(dense, 1), (dense, 2), (dense, 6), (dense, 12), (blocks, 6)])
def test_backpropagation(make, microbatches):
    with jax.enable_x64(True):
        problem = make(jnp.float64)
        _, wanted, _ = one_device(problem, lrules.backprop())
        value, grads, _ = piped(problem, None, None, microbatches)
        assert stages.difference(wanted, (value, grads)) < 1e-10


@pytest.mark.parametrize("name", RULES)
def test_direct_rules(name):
    rule = RULES[name]
    with jax.enable_x64(True):
        problem = dense(jnp.float64)
        feedback, wanted, learned = one_device(problem, rule)
        for microbatches in (1, 6) if name == "dfa" else (6,):
            value, grads, fed = piped(problem, rule, feedback, microbatches)
            assert stages.difference(wanted, (value, grads)) < 1e-10
        if learned:
            net, params, x, *_ = problem
            split = split_feedback(net, rule, params, lrules.Feedback({}, learned), x)
            assert stages.difference({"first": split.first.learned, "stages": split.stages.learned}, fed) < 1e-10
        else:
            assert not jax.tree.leaves(fed)


def test_transformer():
    """Stages with skips learn by feedback between stages, with feedback weights for each position."""
    with jax.enable_x64(True):
        problem = blocks(jnp.float64)
        for rule in (BETWEEN, lrules.direct_feedback_alignment(at=stages.BOUNDARY, shared_axes=1)):
            feedback, wanted, _ = one_device(problem, rule)
            value, grads, _ = piped(problem, rule, feedback, 6)
            assert stages.difference(wanted, (value, grads)) < 1e-10


@pytest.mark.parametrize("make", [dense, blocks])
def test_float32(make):
    problem = make(jnp.float32)
    for rule in (None, BETWEEN):
        feedback, wanted, _ = one_device(problem, rule or lrules.backprop())
        value, grads, _ = piped(problem, rule, feedback, 6)
        # Four blocks with softmax and standardisation round more: one device is as far from float64.
        assert stages.difference(wanted, (value, grads)) < (1e-6 if make is dense else 1e-5)


def test_bfloat16():
    """The dtypes stay, and the gradients are near those of float32."""
    full = dense(jnp.float32)
    half = tuple(jax.tree.map(lambda a: a.astype(jnp.bfloat16), part) for part in full[1:4])
    half = (full[0], *half, full[4])
    for rule in (None, RULES["dfa"]):
        feedback, (_, wanted), _ = one_device(full, rule or lrules.backprop())
        as_half = jax.tree.map(lambda b: b.astype(jnp.bfloat16), feedback)
        _, grads, _ = piped(half, rule, as_half, 6)
        assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}
        assert stages.difference(wanted, grads) < 0.1


def test_the_rules_differ():
    """What the comparisons could not see if all gradients were alike."""
    problem = dense(jnp.float32)
    found = {name: one_device(problem, rule)[1][1].stages for name, rule in RULES.items()}
    found["backprop"] = one_device(problem, lrules.backprop())[1][1].stages
    names = sorted(found.keys() - {"adaptive", "rank"})
    for i, a in enumerate(names):
        for b in names[:i]:
            assert stages.difference(found[a], found[b]) > 1e-2, (a, b)


def test_many_steps_in_a_scan_with_donation():
    """The value falls, and the parameters stay where they are."""
    net, params, x, _, loss = dense(jnp.float32)
    y = jnp.sin(x[:, :3])
    rule, mesh, optimizer = RULES["dfa"], stages.make_mesh(STAGES), optax.sgd(0.3, momentum=0.5)
    feedback = rule.init(jax.random.key(5), net.whole, params, x)
    placed = stages.place(stages.stacked(params), mesh)
    split = stages.place(split_feedback(net, rule, params, feedback, x), mesh)
    step = steps.direct(net, loss, rule, mesh, 4)

    def train(params, state):
        def one(carry, _):
            params, state = carry
            value, grads, _ = step(params, split, x, y)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(one, (params, state), None, length=60)

    (after, _), values = jax.jit(train, donate_argnums=0)(placed, optimizer.init(placed))
    assert values[-1] < 0.5 * values[0]
    leaf = jax.tree.leaves(after.stages)[0]
    assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {1}


def test_vmap_over_seeds():
    """Parameters and feedback of two seeds; also under vmap each stage stays on its device."""
    net, params, x, y, loss = dense(jnp.float32)
    rule, mesh = RULES["dfa"], stages.make_mesh(STAGES)
    feedback = [rule.init(jax.random.key(seed), net.whole, params, x) for seed in (5, 6)]
    split = [split_feedback(net, rule, params, fed, x) for fed in feedback]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *split)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), stages.stacked(params))
    step = steps.direct(net, loss, rule, mesh, 3)
    values, grads, _ = jax.jit(jax.vmap(step, in_axes=(0, 0, None, None)))(many, both, x, y)
    for i in range(2):
        value, one, _ = jax.jit(step)(jax.tree.map(lambda leaf: leaf[i], many), split[i], x, y)  # noqa: B023
        assert stages.difference((value, one), (values[i], jax.tree.map(lambda leaf: leaf[i], grads))) < 1e-6  # noqa: B023


def test_garbage_gives_no_nan():
    """A stage that is infinite at zero, before it has a microbatch."""
    net, params, x, y, loss = dense(jnp.float32)

    def stage(p, h):
        return net.stage(p, h / jnp.sqrt((h**2).sum(-1, keepdims=True)))

    problem = (stages.Staged(net.first, stage, net.last), params, x, y, loss)
    for rule in (None, BETWEEN):
        feedback, wanted, _ = one_device(problem, rule or lrules.backprop())
        value, grads, _ = piped(problem, rule, feedback, 3)
        assert stages.difference(wanted, (value, grads)) < 1e-5


def test_parameters_stacked_and_back():
    _, params, *_ = dense(jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, params, stages.unstacked(stages.stacked(params)))


# ---------------------------------------------------------------------------------------------------------- refusals


def refusal(net, params, x, rule):
    feedback = rule.init(jax.random.key(0), net.whole, params, x)
    with pytest.raises(InputError) as error:
        split_feedback(net, rule, params, feedback, x)
    return str(error.value)


def test_feedback_that_lands_elsewhere():
    """The first layer of a stage reads a function of what came from below; the remedy works."""
    net, params, x, y, loss = dense(jnp.float32)
    linear = stages.mlp(lambda h: h)

    def activated(part):
        return lambda p, h: part(p, jnp.tanh(h))

    before = stages.Staged(linear.first, activated(linear.stage), activated(linear.last))
    says = refusal(before, params, x, RULES["dfa"])
    assert "'first' sends to 'stages/0'" in says and "at='boundary'" in says
    skips = stages.Staged(net.first, lambda p, h: h + net.stage(p, jax.nn.standardize(h)), net.last)
    assert "'first' sends to 'stages/0'" in refusal(skips, params, x, RULES["dfa"])
    upper = stages.Staged(net.first, net.stage, activated(net.last))
    assert "'stages/3' sends to 'last'" in refusal(upper, params, x, RULES["dfa"])
    for other in (before, skips, upper):
        problem = (other, params, x, y, loss)
        feedback, wanted, _ = one_device(problem, BETWEEN)
        value, grads, _ = piped(problem, BETWEEN, feedback, 3)
        assert stages.difference(wanted, (value, grads)) < 1e-5


def test_other_refusals():
    net, params, x, y, loss = dense(jnp.float32)
    assert "use gpipe()" in refusal(net, params, x, lrules.feedback_alignment())
    assert "random numbers" in refusal(net, params, x, lrules.drop_error(RULES["dfa"], 0.5))
    assert "whole batch" in refusal(net, params, x, lrules.backman())
    assert "no feedback weights" in refusal(net, params, x, lrules.skipped_backprop())
    for rule in (lrules.random_target_projection(), lrules.direct_feedback_alignment(normalise_error=True)):
        assert "needs the targets or the loss" in refusal(net, params, x, rule)
    shared = lrules.direct_feedback_alignment(rank=2, learned_factors=True)
    assert "'(outputs)'" in refusal(net, params, x, shared) and "learned_factors" in refusal(net, params, x, shared)
    soft = stages.Staged(net.first, net.stage, lambda p, h: jax.nn.softmax(net.last(p, h)))
    assert "into the loss" in refusal(soft, params, x, RULES["dfa"])
    with pytest.raises(InputError, match="take fewer stages"):
        stages.make_mesh(jax.device_count() + 1)
    step = steps.gpipe(net, loss, stages.make_mesh(2), 3)
    with pytest.raises(InputError, match="There are 4 stages and 2 devices"):
        step(stages.stacked(params), {}, x, y)
    with pytest.raises(InputError, match="5 microbatches do not divide a batch of 12"):
        steps.gpipe(net, loss, stages.make_mesh(STAGES), 5)(stages.stacked(params), {}, x, y)


# --------------------------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize(("microbatches", "layers"), [(3, 1), (6, 2)])
def test_operations_of_the_compiled_program(microbatches, layers):
    """Products and bytes, to the last one."""
    size = counts.Size(STAGES, microbatches, examples=2, inputs=5, width=8, outputs=3, layers=layers)
    paper, sent = counts.on_paper(size), counts.sent_on_paper(size)
    for name in counts.NAMES:
        found = counts.counted(name, size)
        assert found.products == paper[name]
        assert found.sent == sent[name]


def test_memory():
    """GPipe keeps all microbatches, and a direct rule a ring of them: more microbatches cost it their errors only."""
    few, many = (counts.Size(STAGES, m, examples=4, inputs=5, width=32, outputs=3) for m in (4, 32))
    grown = {n: counts.counted(n, many).temporary - counts.counted(n, few).temporary for n in counts.NAMES}
    kept = 4 * 28 * few.examples * few.width  # one array of the size of a hidden signal for each microbatch more
    assert grown["backprop"] > 3 * kept
    assert max(grown["direct"], grown[counts.BETWEEN]) < 0.2 * kept


def test_what_a_stage_keeps():
    """A ring of P microbatches, and no parameter: the buffers do not grow with the number of microbatches."""

    def buffers(microbatches, rule):
        net, params, x, y, loss = dense(jnp.float32, batch=2 * microbatches)
        feedback = rule.init(jax.random.key(5), net.whole, params, x)
        mesh = stages.make_mesh(STAGES)
        split = split_feedback(net, rule, params, feedback, x)
        step = steps.direct(net, loss, rule, mesh, microbatches)
        return carried(jax.make_jaxpr(step)(stages.stacked(params), split, x, y).jaxpr)

    for rule in (RULES["dfa"], BETWEEN):
        few, many = buffers(3, rule), buffers(9, rule)
        assert few == many and few
        assert all(shape[0] == STAGES and shape[1] == 2 for shape in few if len(shape) == 3)
        assert not [shape for shape in few if shape[-2:] == (8, 8) and len(shape) == 3]


def carried(jaxpr):
    """The shapes of rank 3 that loops carry."""
    shapes = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            shapes += [v.aval.shape for v in eqn.outvars if len(v.aval.shape) == 3]
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            shapes += carried(inner) if hasattr(inner, "eqns") else []
    return sorted(shapes)


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile().as_text()


def test_products_in_loops_and_branches():
    a, x = jnp.ones((4, 5)), jnp.ones((5, 3))
    one = 2 * 4 * 5 * 3
    assert hlo.read(compiled(lambda a, x: a @ x, a, x)) == hlo.Counts(one, {})
    square = jnp.ones((5, 5))

    def nested(w, x):
        inner = lambda x: jax.lax.scan(lambda x, _: (jnp.tanh(w @ x), None), x, None, length=3)[0]  # noqa: E731
        return jax.lax.scan(lambda x, _: (inner(x), None), x, None, length=4)[0]

    assert hlo.read(compiled(nested, square, x)).products == 12 * 2 * 5 * 5 * 3

    def branch(which, w, x):
        return jax.lax.cond(which, lambda: w @ (w @ x), lambda: w @ x)

    assert hlo.read(compiled(branch, True, square, x)).products == 2 * 2 * 5 * 5 * 3
    with pytest.raises(ValueError, match="how often it runs"):
        hlo.read(compiled(lambda w, x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: w @ x, x), square, x))


# --------------------------------------------------------------------------------------------------------- timetables


@pytest.mark.parametrize("p", [1, 2, 5, 8])
@pytest.mark.parametrize("m", [1, 3, 8, 20])
def test_formulas_of_the_timetables(p, m):
    """With f = 1: 3 (M + P - 1) and 2 M + P - 1, the idle parts that follow, and what is in flight."""
    even = timetable.equal(p, 1.0, 2.0, 1.0)
    for make in (timetable.gpipe, timetable.one_forward_one_backward):
        made = make(even, m)
        assert made.makespan == 3 * (m + p - 1)
        assert np.allclose(made.idle, (p - 1) / (m + p - 1))
    made = timetable.direct(even, m)
    assert made.makespan == 2 * m + p - 1
    assert np.allclose(made.idle, (p - 1) / (2 * m + p - 1))
    assert timetable.gpipe(even, m).in_flight == [m] * p
    for make in (timetable.one_forward_one_backward, timetable.direct):
        assert make(even, m).in_flight == [min(p - s, m) for s in range(p)]


@pytest.mark.parametrize("seed", range(5))
def test_any_costs(seed):
    """No stage does two things at once, nothing begins before what it needs, and the bounds hold."""
    rng = np.random.default_rng(seed)
    p, m = 4, 6
    costs = timetable.Costs(*(list(rng.uniform(0.5, 2, p)) for _ in range(3)))
    for name, make in timetable.SCHEDULES.items():
        made = make(costs, m)
        ends = {(t.stage, t.kind, t.microbatch): t.end for t in made.tasks}
        assert len(ends) == len(made.tasks) == 2 * p * m
        for stage in range(p):
            own = sorted((t.start, t.end) for t in made.tasks if t.stage == stage)
            assert all(a[1] <= b[0] + 1e-9 for a, b in zip(own, own[1:], strict=False))
        for t in made.tasks:
            needs = [(t.stage, "F", t.microbatch)] if t.kind == "B" else []
            if t.kind == "F" and t.stage:
                needs.append((t.stage - 1, "F", t.microbatch))
            if t.kind == "B":
                needs.append((p - 1, "F", t.microbatch))
                needs += [(t.stage + 1, "B", t.microbatch)] if name != "direct" and t.stage < p - 1 else []
            assert all(ends[need] <= t.start + 1e-9 for need in needs)
        down = costs.update if name == "direct" else costs.backward
        assert made.makespan >= max(m * (f + b) for f, b in zip(costs.forward, down, strict=True)) - 1e-9


# -------------------------------------------------------------------------------------------------------- the program


def test_examples():
    for module in (steps, timetable, hlo):
        assert doctest.testmod(module).failed == 0


def test_program_is_complete():
    """What the guide shows was measured by this program, and holds what it claims."""
    from docs.generate.facts import DOCS

    content = json.loads((DOCS / "parallel" / "pipeline.json").read_text())
    assert max(content["differences"]["float32"].values()) < 1e-6
    assert max(content["differences"]["float64"].values()) < 1e-10
    assert [row["size"] for row in content["operations"][:: len(counts.NAMES)]] == [
        size._asdict() for size in pipeline.COUNTED
    ]
    for row in content["operations"]:
        size = counts.Size(**row["size"])
        assert row["counted"] == row["paper"] == counts.on_paper(size)[row["rule"]]
        assert {k: tuple(v) for k, v in row["sent"].items()} == counts.sent_on_paper(size)[row["rule"]]
    again = counts.simulated(content["stage"]["seconds"], pipeline.STAGES, pipeline.MICROBATCHES)
    assert [row.keys() for row in again] == [row.keys() for row in content["simulated"]]
    for row, kept in zip(again, content["simulated"], strict=True):
        assert row["schedule"] == kept["schedule"]
        numbers = [[float(v) for k, v in each.items() if k != "schedule"] for each in (row, kept)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-12)  # from Python 3.12 on, `sum` rounds less
    assert all(make(content).count("\n") > 2 for make in report.TABLES.values())
    assert len(report.figure(content).axes) == 2


@pytest.mark.slow
def test_the_program(tmp_path):
    done = run("parallel.pipeline", "--width=16", "--examples=4", "--repeats=4", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline.json", "pipeline.png"]
    assert "| direct between stages |" in done.stdout
    content = json.loads((tmp_path / "pipeline.json").read_text())
    assert all(row["counted"] == row["paper"] for row in content["operations"])


def test_stage_seconds():
    seconds = counts.stage_seconds(counts.Size(examples=4, width=16), repeats=4)
    assert seconds.keys() == {"forward", *counts.NAMES} and all(len(v) == 3 for v in seconds.values())
    assert seconds["forward"][0] > 0
