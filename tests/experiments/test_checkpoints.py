"""Checkpoints: what comes back, from where; damaged files; what is refused and how."""

import json
import os
import random
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import lrules
from experiments import checkpoints
from experiments.checkpoints import Checkpoints
from experiments.errors import InputError
from tests.experiments.programs import ROOT, environment
from tests.experiments.saving import DESCRIPTION, found_steps, restored, same, saved_in, shapes, state_at

EVERYTHING = {
    "params": {"layers": [{"w": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(4, jnp.bfloat16)}]},
    "optimizer": optax.chain(optax.clip(1.0), optax.adam(1e-3)).init({"w": jnp.ones(3)}),
    "feedback": lrules.Feedback({"a/b": jnp.ones((2, 2))}, {}, {"s": (jnp.zeros((0, 3)), None, jnp.asarray(True))}),
    "keys": (jax.random.key(3), jax.random.split(jax.random.key(1, impl="rbg"), 8)),
    "numpy": (np.arange(5, dtype=np.uint8), np.float64(0.1), np.int64(2**40), np.asarray(np.nan, np.float32)),
    "numbers": (3, 0.1, True),
    "weak": (jnp.asarray(0.1), jnp.full((2,), 3)),
    "small": (jnp.arange(4, dtype=jnp.int4), jnp.ones(3, jnp.float8_e4m3fn), jnp.asarray(1 + 2j), jnp.uint32(7)),
    "strided": np.arange(12.0).reshape(3, 4).T[:, ::2],
    "a/b": jnp.ones(1), "a": {"b": jnp.zeros(1)},
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------- what comes back


@pytest.mark.parametrize("like", [lambda tree: tree, shapes], ids=["arrays", "shapes"])
def test_every_kind_of_leaf(tmp_path, like):
    """Bit for bit, with dtype, kind and structure; `extra` with NaN."""
    with Checkpoints(tmp_path, DESCRIPTION) as saved:
        assert saved.restore(EVERYTHING) is None and saved.latest() is None
        extra = {"epoch": 2, "curves": {"loss": [np.float32(1.5), float("nan")]}, "seeds": (0, 1)}
        saved.save(7, EVERYTHING, extra)
        step, state, found = saved.restore(like(EVERYTHING))
    assert (step, saved.latest()) == (7, 7) and same(state, EVERYTHING)
    assert found["epoch"] == 2 and found["seeds"] == [0, 1]
    np.testing.assert_array_equal(found["curves"]["loss"], [1.5, np.nan])
    assert not state["params"]["layers"][0]["w"].committed


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_model(tmp_path):
    """Parameters, statistics and keys of Flax; what is restored goes on as what was saved."""
    model, x = Model(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (8, 3))
    model(x)
    graph, *state = nnx.split(model, nnx.Param, ...)
    with Checkpoints(tmp_path, DESCRIPTION) as saved:
        saved.save(1, state)
        found = saved.restore(jax.tree.map(jnp.zeros_like, state)).state
    assert same(found, state)
    assert same(*(nnx.merge(graph, *parts, copy=True)(x) for parts in (found, state)))


def test_no_arrays_at_all(tmp_path):
    with Checkpoints(tmp_path, {}) as saved:
        for step, state in enumerate([{}, {"a": jnp.zeros(0)}]):
            saved.save(step, state)
            assert same(saved.restore(state).state, state)


def test_what_is_saved_may_change_at_once(tmp_path):
    """Donated and overwritten after `save` returns, while the write goes on."""
    x, n = jnp.arange(2_000_000, dtype=jnp.float32), np.arange(1_000_000)
    want = {"x": np.asarray(x).copy(), "n": n.copy()}
    with Checkpoints(tmp_path, DESCRIPTION) as saved:
        saved.save(1, {"x": x, "n": n})
        jax.block_until_ready(jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(x))
        n[:] = -1
        state = saved.restore({"x": np.zeros_like(want["x"]), "n": n}).state
    assert same(state, want)


def test_the_last_and_the_best_stay(tmp_path):
    for best, stay in ((None, [4, 5]), ("max", [2, 4, 5]), ("min", [3, 4, 5])):
        with Checkpoints(tmp_path / str(best), DESCRIPTION, keep=2, best=best) as saved:
            for step, metric in ((1, None), (2, 0.9), (3, 0.1), (4, float("nan"))):
                saved.save(step, state_at(step), metric=metric)
        with Checkpoints(tmp_path / str(best), DESCRIPTION, keep=2, best=best) as saved:  # it knows the metrics again
            saved.save(5, state_at(5), metric=0.5)
        assert found_steps(tmp_path / str(best)) == stay
    for options in ({"keep": 0}, {"best": "largest"}):
        with pytest.raises(InputError):
            Checkpoints(tmp_path, DESCRIPTION, **options)


def test_nothing_else_stays(tmp_path):
    """What an interrupted save left is removed."""
    saved_in(tmp_path)
    (tmp_path / "9.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert restored(tmp_path).step == 3
    assert found_steps(tmp_path) == [1, 2, 3] and len(os.listdir(tmp_path)) == 3


def across(devices):
    """A state, and how it lies across some devices: along either axis, or whole on each."""
    mesh = jax.make_mesh((devices,), ("d",), devices=jax.devices()[:devices])
    first, second, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["d"], [None, "d"], []))
    state = {"x": jnp.arange(64.0).reshape(8, 8), "keys": jax.random.split(jax.random.key(0), 8), "one": jnp.ones(())}
    return state, {"x": second, "keys": first, "one": whole}


@pytest.mark.parametrize("saved_on, restored_on", [(4, 1), (1, 4), (4, 2), (4, 4)])
def test_other_devices(tmp_path, saved_on, restored_on):
    """The same values on any number of devices; without `sharding`, they lie where the template lies."""
    (state, before), (_, after) = across(saved_on), across(restored_on)
    with Checkpoints(tmp_path, {}) as saved:
        saved.save(1, jax.device_put(state, before))
        found = saved.restore(shapes(state), after).state
        again = saved.restore(found).state
    for values in (found, again):
        assert same(values, state) and all(values[name].sharding == after[name] for name in state)
        assert len(values["x"].devices()) == restored_on


MESH = """
import sys, jax
from experiments.checkpoints import Checkpoints
from tests.experiments.saving import same
from tests.experiments.test_checkpoints import across
state, shardings = across(jax.device_count())
with Checkpoints(sys.argv[1], {}) as saved:
    if sys.argv[2] == "save":
        saved.save(1, jax.device_put(state, shardings))
    else:
        found = saved.restore(state, shardings).state
        assert same(found, state) and found["x"].sharding == shardings["x"]
print(jax.device_count(), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [(8, 1), (1, 8)])
def test_other_devices_in_another_process(tmp_path, first, then):
    for count, how in ((first, "save"), (then, "restore")):
        flags = environment() | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
        command = [sys.executable, "-c", MESH, tmp_path, how]
        done = subprocess.run(command, cwd=ROOT, env=flags, capture_output=True, text=True)
        assert done.stdout == f"{count} {how}\n", done.stderr


def test_one_sharding_for_all(tmp_path):
    """It also holds for a part, and `None` in the template is no leaf."""
    mesh = jax.make_mesh((4,), ("d",))
    state = {"a": {"x": jnp.arange(8.0), "nothing": None}, "b": (jnp.ones(4), None)}
    split, whole = NamedSharding(mesh, PartitionSpec("d")), NamedSharding(mesh, PartitionSpec())
    with Checkpoints(tmp_path, {}) as saved:
        saved.save(1, state)
        for sharding, expected in ((split, (split, split)), ({"a": split, "b": (whole, whole)}, (split, whole))):
            found = saved.restore(state, sharding).state
            assert same(found, state) and (found["a"]["x"].sharding, found["b"][0].sharding) == expected
        found = saved.restore(state, {"a": split, "b": None}).state
        assert found["a"]["x"].sharding == split and isinstance(found["b"][0].sharding, SingleDeviceSharding)


# ----------------------------------------------------------------------------------------------------------- refusals


def test_another_run_is_refused(tmp_path):
    """At once, before anything is written, with the names of the fields and both values."""
    saved_in(tmp_path)
    other = {"rule": "backprop", "data": {"batch": 64, "name": "mnist"}}
    with pytest.raises(InputError) as refused:
        Checkpoints(tmp_path, other)
    assert str(refused.value) == (
        f"The checkpoints in {tmp_path} are of another run (rule: 'backman' there, 'backprop' here; data.name: absent "
        "there, 'mnist' here): use the same settings, or give another --output."
    )
    assert restored(tmp_path, {"data": {"batch": np.int64(64)}, "rule": "backman"}).step == 3


def rewrite(folder, step, change):
    """Changes what a checkpoint says of itself, with a right checksum."""
    path = folder / str(step) / "about" / "metadata"
    about = json.loads(path.read_text())
    version, content = change(about["version"], json.loads(about["content"]))
    text = json.dumps(content)
    path.write_text(
        json.dumps({"version": version, "checksum": checkpoints._checksum_of_text(version, text), "content": text})
    )


def test_a_newer_version_is_refused(tmp_path):
    """Also where its content is nothing that this version knows; a changed number alone is damage."""
    saved_in(tmp_path)
    rewrite(tmp_path, 3, lambda version, content: (version + 1, ["unknown"]))
    now = checkpoints.VERSION
    with pytest.raises(InputError, match=rf"/3 has format {now + 1}, and this program reads formats up to {now}: use"):
        Checkpoints(tmp_path, DESCRIPTION)
    path = tmp_path / "3" / "about" / "metadata"
    path.write_text(path.read_text().replace(f'"version": {now + 1}', '"version": 9'))
    assert restored(tmp_path).step == 2


def test_another_structure_is_refused(tmp_path):
    saved_in(tmp_path)
    like = state_at(0)
    like["params"] = {"w": jnp.zeros((64, 256), jnp.bfloat16), "c": jnp.zeros(5)}
    with pytest.raises(InputError) as refused:
        restored(tmp_path, like=like)
    assert (
        f"{tmp_path}/3 is not that of this program (params/b: 'float32[5]' there, absent here; params/w: "
        "'bfloat16[64,257]' there, 'bfloat16[64,256]' here; params/c: absent there, 'float32[5]' here): use the program"
    ) in str(refused.value)


def test_steps_go_up(tmp_path):
    saved_in(tmp_path)
    with Checkpoints(tmp_path, DESCRIPTION) as saved:
        with pytest.raises(InputError, match="has a checkpoint of step 3, and this run would save step 3: restore"):
            saved.save(3, state_at(3))
        saved.save(4, state_at(4))
    assert found_steps(tmp_path) == [2, 3, 4]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^The folder \S+ cannot be written \(.*\): give another --output\.$"):
        Checkpoints(tmp_path / "file" / "x", DESCRIPTION)


def test_mistakes_of_a_program_are_not_blamed_on_the_disk(tmp_path):
    with Checkpoints(tmp_path, DESCRIPTION) as saved:
        with pytest.raises(TypeError, match="not JSON serializable"):
            saved.save(1, state_at(1), {"x": object()})
        with pytest.raises(TypeError, match="the leaf 'text' of the state is a str, not an array or a number"):
            saved.save(1, {"text": "words"})
        saved.save(1, {"text": np.asarray("words")})
        with pytest.raises(ValueError, match="nsupported data type"):
            saved.wait()
        saved.save(1, state_at(1))
        assert saved.restore(state_at(0)).step == 1


# ------------------------------------------------------------------------------------------------------------- damage


def damage(path, how, rng):
    content = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(content[: rng.randrange(max(len(content), 1))])
    elif how == "flip" and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif how == "zeros":
        path.write_bytes(bytes(len(content)))


def files_of(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


# Orbax leaves reads of damaged files unfinished.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["delete", "truncate", "flip", "zeros"])
def test_damage_of_any_file(tmp_path, how, caplog):
    """Each file of the newest one: the state is whole, the newest or the one before, and damage is told."""
    saved_in(tmp_path / "good", (1, 2))
    rng, fell_back = random.Random(0), set()
    count = len(files_of(tmp_path / "good" / "2"))
    for i in range(count):
        folder = tmp_path / str(i)
        shutil.copytree(tmp_path / "good", folder)
        path = files_of(folder / "2")[i]
        damage(folder / "2" / path, how, rng)
        caplog.clear()
        step, state, extra = restored(folder)
        assert same(state, state_at(step)) and extra == {"step": step}
        if step == 1:
            fell_back.add(path.parts[:2])
            assert re.search(r"checkpoint \S+/2 is damaged \(.+\): an older one is taken", caplog.text)
        else:
            assert step == 2 and "damaged" not in caplog.text
    assert ("about", "metadata") in fell_back and any(parts[0] == "state" for parts in fell_back)


def test_a_changed_bit_among_the_numbers(tmp_path, caplog):
    """The numbers of a trained network cannot be compressed: there Orbax reads other numbers, and does not notice."""
    noise = {"x": np.random.default_rng(0).integers(0, 256, 2**14, np.uint8)}
    with Checkpoints(tmp_path / "good", {}) as saved:
        saved.save(1, noise)
        saved.save(2, noise)
    path = max(files_of(tmp_path / "good" / "2"), key=lambda path: (tmp_path / "good" / "2" / path).stat().st_size)
    rng, steps = random.Random(0), []
    for i in range(8):
        shutil.copytree(tmp_path / "good", tmp_path / str(i))
        damage(tmp_path / str(i) / "2" / path, "flip", rng)
        step, state, _ = restored(tmp_path / str(i), {}, noise)
        assert same(state, noise)
        steps.append(step)
    assert steps.count(1) >= 6 and "('x' has another checksum)" in caplog.text


def test_after_damage_the_run_goes_on(tmp_path, caplog):
    """The damaged one makes room for a new one of the same step, and does not count among those that stay."""
    saved_in(tmp_path, keep=2)
    damage(tmp_path / "3" / "about" / "metadata", "truncate", random.Random(0))
    with Checkpoints(tmp_path, DESCRIPTION, keep=2) as saved:
        assert saved.restore(state_at(0)).step == 2
        saved.save(3, state_at(3))
        assert saved.restore(state_at(0)).step == 3
    assert found_steps(tmp_path) == [2, 3] and (tmp_path / "damaged-3").exists()
    assert restored(tmp_path).step == 3
    shutil.rmtree(tmp_path / "3" / "state")  # once more
    with Checkpoints(tmp_path, DESCRIPTION, keep=2) as saved:
        assert saved.restore(state_at(0)).step == 2
        saved.save(3, state_at(3))
    assert restored(tmp_path).step == 3


def test_all_damaged(tmp_path):
    saved_in(tmp_path)
    for step in (1, 2, 3):
        shutil.rmtree(tmp_path / str(step) / "state")
    with pytest.raises(InputError, match=r"^All checkpoints in \S+ are damaged \(step 3: .*\): remove the folder"):
        restored(tmp_path)
