"""Many devices: every rule gives the numbers of one device; meshes, layouts, processes, and what is refused."""

import doctest
import json
import os
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import lrules
from experiments import build, devices, rules
from experiments.config import Config
from experiments.data import Dataset
from experiments.errors import InputError
from tests.experiments import many_devices
from tests.experiments.many_devices import EXPRESSIONS, LAYOUTS, QUICK, WIDE, served
from tests.experiments.programs import ROOT
from tests.sampling import mostly_slow, pairs

# These subtract values that are nearly equal, so in float32 they round more; one device is as far from float64.
ROUNDS = ("cnn, dual", "mlp, dual_damped", "cnn, difference_target_propagation")


def tolerance(key):
    """By the key of `many_devices`."""
    return 1e-10 if key.endswith("float64") else 5e-4 if key.startswith(ROUNDS) else 1e-5


# ------------------------------------------------------------------------------------------------- the same numbers


def test_every_rule_and_modifier_is_compared():
    text = " ".join(EXPRESSIONS.values())
    for name in {**rules.rules(), **rules.modifiers()}.keys() - {"modify_error"}:  # drop_error is made with it
        assert re.search(rf"\b{name}\b", text), name


@pytest.mark.foreign
@pytest.mark.parametrize(("net", "name"), mostly_slow(pairs(["mlp", "cnn"], EXPRESSIONS), pairs(["mlp"], QUICK)))
def test_four_devices(net, name):
    with jax.enable_x64(True):
        for layout in LAYOUTS:
            if served(net, name, layout):
                mesh = many_devices.mesh_for(layout)
                assert many_devices.difference(net, name, layout, jnp.dtype("float64"), mesh) < 1e-10, layout


def run_programs(tmp_path, processes, count, nets, layouts, dtypes, names):
    """Runs `many_devices` in so many processes with so many devices each, and checks what it has found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = re.sub(r"--xla_force_host_platform_device_count=\S+", "", os.environ.get("XLA_FLAGS", ""))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment |= {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={count}"}
    if processes > 1:  # they would write to one cache
        environment |= {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": str(processes)}
        environment |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-m", "tests.experiments.many_devices", str(tmp_path / "found.json")]
    command += [",".join(nets), ";".join(layouts), ",".join(dtypes), ",".join(names)]
    started, logs = [], [tmp_path / f"{i}.log" for i in range(processes)]
    try:
        for i, log in enumerate(logs):
            own = environment | ({"PROCESS_ID": str(i)} if processes > 1 else {})
            with log.open("w") as out:
                started.append(subprocess.Popen(command, cwd=ROOT, env=own, stdout=out, stderr=subprocess.STDOUT))
        codes = [process.wait(timeout=900) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert not any(codes), "\n".join(log.read_text()[-3000:] for log in logs)
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found.pop("devices"), found.pop("processes")) == (processes * count, processes)
    wanted = {f"{net}, {name}, {layout}, {dtype}" for net in nets for name in names for layout in layouts
              for dtype in dtypes if served(net, name, layout)}  # fmt: skip
    assert set(found) == wanted
    wrong = {key: value for key, value in found.items() if not value < tolerance(key)}
    assert not wrong


def test_eight_devices_quickly(tmp_path):
    run_programs(tmp_path, 1, 8, ["mlp"], LAYOUTS[1:3], ["float32"], ["backman", "adaptive"])


@pytest.mark.slow
@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_eight_devices(net, dtype, tmp_path):
    run_programs(tmp_path, 1, 8, [net], LAYOUTS, [dtype], EXPRESSIONS)


def test_two_processes_quickly(tmp_path):
    run_programs(tmp_path, 2, 4, ["mlp"], LAYOUTS[1:3], ["float64"], ["backman"])


@pytest.mark.slow
@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_processes(net, dtype, tmp_path):
    run_programs(tmp_path, 2, 4, [net], LAYOUTS[:3], [dtype], EXPRESSIONS)


# ---------------------------------------------------------------------------------------------- a loop, as programs do


@pytest.mark.foreign
@pytest.mark.parametrize("mesh", ["data=4", "data=2,model=2"])
def test_steps_of_several_seeds(mesh):
    """Steps under vmap and in a loop: as on one device; all stays where it is, so the second call compiles nothing."""
    keys, mesh = jax.random.split(jax.random.key(0), 3), devices.make_mesh("all", mesh)
    x, y = jax.random.normal(jax.random.key(1), (3, 8, 6)), jax.random.normal(jax.random.key(2), (3, 8, 4))
    net = lambda p, x: jnp.tanh(x @ p["a"] + p["bias"][None]) @ p["b"]  # noqa: E731
    rule, optimizer = lrules.drop_error(lrules.kolen_pollack(), 0.3), optax.adam(0.01)
    gradients = lrules.value_and_grad(net, lrules.testing.half_squared_error, rule)

    def init(key):
        params = {"a": jax.random.normal(key, (6, 16)), "b": jax.random.normal(key, (16, 4)), "bias": jnp.ones(16)}
        feedback = rule.init(key, net, params, x[0])
        return params, feedback, optimizer.init(params)

    def step(carry, key, x, y):
        params, feedback, state = carry
        (value, _), grads = gradients(params, feedback, x, y, rng=key)
        updates, state = optimizer.update(grads.params, state, params)
        return (optax.apply_updates(params, updates), feedback, state), value

    def train(step):
        def one_seed(carry, key, x, y):
            body = lambda i, loop: step(loop[0], jax.random.fold_in(key, i), x[i], y[i])  # noqa: E731
            return jax.lax.fori_loop(0, len(x), body, (carry, jnp.zeros(())))

        return jax.vmap(one_seed, (0, 0, None, None))

    carry = jax.jit(jax.vmap(init))(keys)
    want = jax.jit(train(step))(carry, keys, x, y)
    lies = devices.layout(carry, mesh, lead=1, wide=WIDE)
    sharded = train(devices.shard_step(step, mesh, wide=WIDE))
    sharded = jax.jit(sharded, donate_argnums=0, out_shardings=(lies, None))
    x, y, keys = devices.place((x, y, keys), mesh)
    got = sharded(devices.place(carry, mesh, lead=1, wide=WIDE), keys, x, y)
    assert many_devices.distance(*map(devices.gather, (got, want))) < 1e-5
    splits = P(None, None, "model") if mesh.shape["model"] > 1 else P()
    assert got[0][0]["a"].sharding.spec == got[0][2][0].mu["a"].sharding.spec == splits
    text = sharded.lower(got[0], keys, x, y).compile().as_text()
    assert "all-reduce" in text and ("all-gather" in text) == (mesh.shape["model"] > 1)
    sharded(got[0], keys, x, y)
    assert sharded._cache_size() == 1


@pytest.mark.foreign
def test_feedback_lies_with_what_it_belongs_to():
    """In a run: where the library says, with the optimizer's state of what is learned, before and after training."""
    images = np.random.default_rng(0).normal(size=(32, 28, 28, 1)).astype(np.float32)
    data = Dataset(images, np.arange(32) % 10, images, np.arange(32) % 10, 10, "noise")
    wide, whole, found, moments = (None, None, "model"), (None, None, None), {}, 0
    for model, rule in (("lenet5", "srbp"), ("mlp", "srbp(adaptive=True)"), ("mlp", "arbp")):
        config = Config(model=model, widths=(256, 8, 256), rule=rule, batch_size=16, probe=0, seeds=2)
        run = build.run(config, data, placement=devices.placement("all", "data=2,model=2", 16))
        for _ in range(2):
            carry = run.carry
            for name, b in {**carry.feedback.fixed, **carry.feedback.learned}.items():
                key, leaves = jax.tree_util.DictKey(name), jax.tree.leaves_with_path(carry.optimizer[1])
                own = [m for path, m in leaves if path[-1] == key]
                assert all(m.sharding == b.sharding for m in own)
                found[model, rule, name] = (*b.sharding.spec, *[None] * (b.ndim - len(b.sharding.spec)))
                moments += len(own)
            run.epoch()
    assert moments == 2 * 2 * (3 + 3)
    lies = lambda *key: [found[(*key, name)] for name in sorted(n for *k, n in found if tuple(k) == key)]  # noqa: E731
    assert lies("mlp", "srbp(adaptive=True)") == [wide, whole, wide]  # as what the layers below make
    assert lies("mlp", "arbp") == [whole, wide, whole]  # as the parameters
    assert lies("lenet5", "srbp") == [(*whole, None, None), whole, whole, whole]  # fc1 reads 400 features, in no parts


def test_layout():
    mesh = devices.make_mesh("all", "model=2")
    tree = {
        "weight": jnp.ones((3, 8)), "bias": jnp.ones(8), "narrow": jnp.ones((8, 4)), "odd": jnp.ones((8, 9)),
        "scalar": jnp.ones(()), "whole numbers": jnp.ones(8, int), "key": jax.random.key(0), "shape": jnp.ones((3, 8)),
    }  # fmt: skip
    tree["shape"] = jax.ShapeDtypeStruct((3, 8), "float32")
    found = {name: lies.spec for name, lies in devices.layout(tree, mesh, wide=8).items()}
    split = {"weight": P(None, "model"), "bias": P("model"), "shape": P(None, "model")}
    assert found == dict.fromkeys(tree, P()) | split
    assert devices.layout(jnp.ones((8, 8)), mesh, lead=1, wide=8).spec == P(None, "model")
    assert devices.layout(jnp.ones(8), mesh, lead=1, wide=8).spec == P()
    assert devices.layout(jnp.ones((2, devices.WIDE - 2)), mesh).spec == P()
    placed = devices.place({"w": np.ones((3, 8)), "n": 2}, mesh, wide=8)
    assert placed["w"].sharding.spec == P(None, "model") and placed["n"].sharding.spec == P()
    np.testing.assert_array_equal(devices.gather(placed)["w"], np.ones((3, 8)))
    (x,) = devices.place_batch((np.ones((4, 3)),), mesh)
    assert x.sharding == devices.batch_sharding(mesh) and x.addressable_shards[0].data.shape == (2, 3)
    assert devices.is_first()


@pytest.mark.parametrize("count", [1, 4])
def test_what_is_placed_can_be_donated(count):
    x = jnp.arange(4.0)
    jax.jit(lambda x: 2 * x, donate_argnums=0)(devices.place(x, devices.make_mesh(count)))
    np.testing.assert_array_equal(x, np.arange(4))


def test_collectives():
    mesh = devices.make_mesh("all")
    x = devices.place_batch(jnp.ones((8, 3)), mesh)
    assert devices.collectives(jax.jit(jnp.sum).lower(x).compile())["all-reduce"] == 1
    assert not any(devices.collectives(jax.jit(jnp.tanh).lower(x).compile()).values())
    gathered = jax.jit(lambda x: x, out_shardings=devices.layout(x, mesh)).lower(x).compile()
    assert devices.collectives(gathered)["all-gather"] == 1


# ------------------------------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize(
    ("count", "mesh", "shape"),
    [
        ("all", None, (4, 1)),
        (2, None, (2, 1)),
        ("2", "data=2", (2, 1)),
        ("all", "data=2,model=2", (2, 2)),
        ("all", " model = 4 ", (1, 4)),
        (1, "model=1", (1, 1)),
        ("all", "model=2,data=2", (2, 2)),
    ],
)
def test_mesh(count, mesh, shape):
    made = devices.make_mesh(count, mesh)
    assert made.axis_names == ("data", "model") and made.devices.shape == shape
    assert all(kind == jax.sharding.AxisType.Auto for kind in made.axis_types)


@pytest.mark.parametrize(
    ("count", "mesh", "words"),
    [
        (5, None, "There are only 4 devices, got 5: give at most 4 (XLA_FLAGS=--xla_force"),
        ("0", None, "The number of devices must be a positive integer or all, got '0'"),
        ("four", None, "must be a positive integer or all, got 'four'"),
        ("²", None, "must be a positive integer or all"),
        ("all", "data=3", "The mesh 'data=3' does not divide 4 devices, it takes 3: give sizes whose product is 4"),
        ("all", "model=3", "The mesh 'model=3' does not divide 4 devices"),
        ("all", "data=4,model=2", "The mesh 'data=4,model=2' takes 8 devices, and there are 4: give sizes whose"),
        (2, "data=4", "The mesh 'data=4' does not divide 2 devices, it takes 4: give sizes whose product is 2, such as "
            "data=2, or give 4 devices."),
        (1, "data=4", "does not divide one device, it takes 4"),
        ("all", "modle=2", "The mesh has no axis 'modle': did you mean 'model'?"),
        ("all", "data:4", "The mesh 'data:4' is malformed: write names with sizes >= 1, as in data=4,model=2."),
        ("all", "", "is malformed"),
        ("all", "data=4,", "is malformed"),
        ("all", "data=0", "is malformed"),
        ("all", "data=-4", "is malformed"),
        ("all", "data=2,data=2", "gives the axis 'data' twice: give it once"),
    ],
)  # fmt: skip
def test_wrong_mesh(count, mesh, words):
    with pytest.raises(InputError) as error:
        devices.make_mesh(count, mesh)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_several_processes_use_all_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="With several processes, all 4 devices take part, got 2: give 4 or all"):
        devices.make_mesh(2)
    assert devices.make_mesh(4).size == devices.make_mesh("all").size == 4


@pytest.mark.parametrize(("size", "use"), [(6, "of 4 or 8,"), (3, "of 4,"), (0, "of 4,")])
def test_wrong_batch(size, use):
    mesh = devices.make_mesh("all")
    for check in (lambda: devices.check_batch(mesh, size), lambda: devices.place_batch(np.ones((size, 2)), mesh)):
        with pytest.raises(InputError, match=f"A batch of {size} examples cannot be split over 4 devices.*{use}"):
            check()
    devices.check_batch(mesh, 8)


# ---------------------------------------------------------------------------------------------------------- processes

ADDRESS, COUNT, INDEX = devices.PROCESS_VARIABLES
RIGHT = {ADDRESS: "10.0.0.1:1234", COUNT: "4", INDEX: "2"}
OTHERS = ("SLURM_STEP_NUM_TASKS", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")


@pytest.fixture
def started(monkeypatch):
    """The options with which the processes are joined, in place of joining them."""
    calls = []
    for name in (*devices.PROCESS_VARIABLES, *OTHERS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    return calls


def test_one_process_joins_none(started, monkeypatch):
    assert not devices.initialize_processes() and not started
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "one")
    assert not devices.initialize_processes() and not started


def test_processes_that_are_named(started, monkeypatch):
    for name, value in RIGHT.items():
        monkeypatch.setenv(name, value)
    devices.initialize_processes(timeout=7)
    named = {"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 2}
    assert started == [named | {"initialization_timeout": 7}]


@pytest.mark.parametrize("name", OTHERS)
def test_processes_that_are_detected(started, monkeypatch, name):
    monkeypatch.setenv(name, "2" if name.startswith("SLURM") else "one,two")
    devices.initialize_processes()
    assert started == [{"initialization_timeout": 300}]


def test_processes_that_are_asked_for(started):
    devices.initialize_processes(asked=True)
    assert started == [{"initialization_timeout": 300}]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({INDEX: None}, "COORDINATOR_ADDRESS and NUM_PROCESSES is set, but not PROCESS_ID: set all three, or none."),
        ({ADDRESS: ""}, "but not COORDINATOR_ADDRESS"),
        ({ADDRESS: "10.0.0.1"}, "must be host:port of process 0, as in 10.0.0.1:1234, got '10.0.0.1'"),
        ({COUNT: "many"}, "NUM_PROCESSES must be a positive integer, got 'many'"),
        ({COUNT: "0"}, "NUM_PROCESSES must be a positive integer, got '0'"),
        ({INDEX: "4"}, "PROCESS_ID must be an integer from 0 to 3, got '4'"),
        ({INDEX: "-1"}, "PROCESS_ID must be an integer from 0 to 3, got '-1'"),
    ],
)
def test_wrong_processes(started, monkeypatch, changed, words):
    for name, value in (RIGHT | changed).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error:
        devices.initialize_processes()
    assert words in str(error.value) and not started


def test_too_late(monkeypatch):
    jax.devices()
    for name, value in RIGHT.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="JAX is in use already: call initialize_processes before anything else"):
        devices.initialize_processes()


def test_no_processes_to_be_found(started, monkeypatch):
    def fail(**options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(InputError, match="cannot find one another.*: set COORDINATOR_ADDRESS, NUM"):
        devices.initialize_processes(asked=True)


def test_the_example_runs():
    assert doctest.testmod(devices).attempted > 5
    assert not doctest.testmod(devices).failed
