"""Training on many devices: a mesh of them, what lies where, and several processes.

The mesh has two axes. The batch is split over `data`. Wide layers are split over `model`: the last axis of their
parameters, and of the optimizer's state. Feedback lies where `lrules.feedback.shardings` says: as its parameter or
hidden signal. Everything else is whole on every device. The axis of seeds in front is never split. XLA adds the
communication, so a step needs no change:

    >>> import jax, jax.numpy as jnp, lrules, optax
    >>> from experiments import devices
    >>> mesh = devices.make_mesh("all", "data=1") if jax.device_count() == 1 else devices.make_mesh("all")
    >>> net, rule = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], lrules.feedback_alignment()
    >>> params, x, y = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((16, 3)), jnp.zeros((16, 2))
    >>> params = devices.place(params, mesh)
    >>> feedback = rule.init(jax.random.key(0), net, params, x)  # lies where it belongs
    >>> gradients = lrules.value_and_grad(net, lrules.testing.half_squared_error, rule)
    >>> def step(carry, key, x, y):
    ...     params, feedback = carry
    ...     (value, _), grads = gradients(params, feedback, x, y)
    ...     return (jax.tree.map(lambda p, g: p - 0.1 * g, params, grads.params), feedback), value
    >>> carry = params, feedback
    >>> x, y = devices.place_batch((x, y), mesh)
    >>> lies = jax.tree.map(lambda array: array.sharding, carry)
    >>> train = jax.jit(devices.shard_step(step, mesh, lies=lies), donate_argnums=0)
    >>> carry, value = train(carry, jax.random.key(1), x, y)
    >>> devices.gather(value).shape
    ()

What a training loop does:

1. It calls `initialize_processes` first, before any other use of JAX, and then `make_mesh` and `check_batch`.
2. It places what it carries (parameters, optimizer state: `place(carry, mesh, lead=1)` with an axis of seeds in front;
   feedback follows the parameters), and also keys and data sets (`place(keys, mesh, lead=1)`): with several processes,
   no array may lie on the devices of one process alone.
3. It trains with `shard_step(step, mesh, lies=...)`, which splits the batch inside of the step, and keeps the carry
   where it is. This may be under `jax.vmap` over seeds and in a loop over steps; under `vmap`, XLA may still choose for
   the axis of seeds, so give `jax.jit(..., out_shardings=...)` too.
4. Every process calls `gather` on what it reads. Only the process for which `is_first()` is True writes files.
"""

import math
import os
import pickle
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.errors import InputError, nearest
from experiments.placement import Lies, Placement

PyTree = Any
DATA, MODEL = AXES = ("data", "model")
WIDE = 256  # a shorter last axis stays whole: its parts would cost more communication than they save
PROCESS_VARIABLES = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")


def make_mesh(devices: str | int = "all", mesh: str | None = None) -> Mesh:
    """The mesh with the axes `data` and `model`.

    Args:
      devices: the number of devices, or `"all"`.
      mesh: the sizes of the axes, such as `"data=4,model=2"`. A missing model is 1; a missing data is the rest.

    Raises:
      InputError: there are fewer devices, or the text or the sizes are wrong.
    """
    count = _number_of_devices(devices)
    sizes = _sizes(mesh)
    model = sizes.get(MODEL, 1)
    data = sizes.get(DATA, max(count // model, 1))
    if data * model != count:
        text = mesh or f"{DATA}={data}"
        have, are = (f"{count} devices", "are") if count > 1 else ("one device", "is")
        raise InputError(
            f"The mesh '{text}' does not divide {have}, it takes {data * model}: give sizes whose product is {count}, "
            f"such as {DATA}={count}, or give {data * model} devices."
            if data * model <= jax.device_count()
            else f"The mesh '{text}' takes {data * model} devices, and there {are} {count}: give sizes whose product "
            f"is {count}, such as {DATA}={count}."
        )
    return jax.make_mesh((data, model), AXES, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:count])


def _number_of_devices(devices: str | int) -> int:
    there = jax.device_count()
    text = str(devices).strip()
    if text == "all":
        return there
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise InputError(f"The number of devices must be a positive integer or all, got '{devices}'.")
    if int(text) > there:
        remedy = f"give at most {there}" if there > 1 else "give 1"
        emulated = " (XLA_FLAGS=--xla_force_host_platform_device_count=8 makes 8 of one CPU)"
        raise InputError(
            f"There {'are' if there > 1 else 'is'} only {there} device{'s' * (there > 1)}, got {text}: {remedy}"
            f"{emulated if jax.default_backend() == 'cpu' else ''}."
        )
    if jax.process_count() > 1 and int(text) != there:
        raise InputError(
            f"With several processes, all {there} devices take part, got {text}: give {there} or all, or start fewer "
            "processes."
        )
    return int(text)


def _sizes(mesh: str | None) -> dict[str, int]:
    """The sizes in a text such as `data=4,model=2`."""
    sizes: dict[str, int] = {}
    for part in [] if mesh is None else mesh.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*=\s*([0-9]+)\s*", part)
        if found is None or int(found[2]) < 1:
            raise InputError(f"The mesh '{mesh}' is malformed: write names with sizes >= 1, as in data=4,model=2.")
        name, size = found[1], int(found[2])
        if name not in AXES:
            raise InputError(f"The mesh has no axis '{name}': {nearest(name, AXES)}")
        if name in sizes:
            raise InputError(f"The mesh '{mesh}' gives the axis '{name}' twice: give it once.")
        sizes[name] = size
    return sizes


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Refuses a batch that the axis `data` does not divide."""
    parts = mesh.shape[DATA]
    if batch_size < 1 or batch_size % parts:
        below, above = batch_size // parts * parts, (batch_size // parts + 1) * parts
        use = f"{below} or {above}" if below > 0 else f"{above}"
        raise InputError(
            f"A batch of {batch_size} examples cannot be split over {parts} devices in equal parts: use a batch size "
            f"of {use}, or a mesh with another size of data."
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch lies: its first axis is split over `data`."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def layout(tree: PyTree, mesh: Mesh, *, lead: int = 0, wide: int = WIDE) -> PyTree:
    """Where the leaves of a pytree lie, as shardings: whole, but for wide last axes, which are split over `model`.

    The rule looks at shapes only. So what has the shape of a parameter (its momentum) lies as the parameter. Direct
    feedback has the shape of no parameter: `lrules.feedback.shardings` says where it lies.

    Args:
      tree: arrays, or `jax.ShapeDtypeStruct`s.
      mesh: from `make_mesh`.
      lead: the number of first axes that are never split, such as that of seeds.
      wide: shorter last axes are not split.
    """

    def of(leaf: Any) -> NamedSharding:
        shape, parts = jnp.shape(leaf)[lead:], mesh.shape[MODEL]
        floats = jnp.issubdtype(getattr(leaf, "dtype", np.dtype(object)), jnp.inexact)
        if parts > 1 and floats and shape and shape[-1] >= wide and shape[-1] % parts == 0:
            return NamedSharding(mesh, PartitionSpec(*[None] * (lead + len(shape) - 1), MODEL))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(of, tree)


def place(tree: PyTree, mesh: Mesh, *, lead: int = 0, wide: int = WIDE, lies: PyTree | None = None) -> PyTree:
    """New arrays, so they can be donated. With several processes, all give the same values.

    Args:
      tree: the arrays.
      mesh, lead, wide: as in `layout`.
      lies: the shardings; None: those of `layout`.
    """
    copies = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) and x.is_fully_addressable else x, tree)
    return _put(copies, layout(tree, mesh, lead=lead, wide=wide) if lies is None else lies)


def place_batch(batch: PyTree, mesh: Mesh, *, shares: bool = False) -> PyTree:
    """The arrays `[batch, ...]`, split over `data`.

    Args:
      batch: arrays with the batch as their first axis.
      mesh: from `make_mesh`.
      shares: True if each process gives its own part of the batch, in the order of the processes. False if each gives
        the whole batch.

    Raises:
      InputError: the axis `data` does not divide the batch.
    """
    sharding = batch_sharding(mesh)
    for leaf in jax.tree.leaves(batch):
        check_batch(mesh, len(leaf) * (jax.process_count() if shares else 1))
    if shares:
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
    return _put(batch, jax.tree.map(lambda _: sharding, batch))


def _put(tree: PyTree, shardings: PyTree) -> PyTree:
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:  # it lies on the devices of all already
            return jax.jit(lambda x: x, out_shardings=sharding)(leaf)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(put, tree, shardings)


def shard_step(
    step: Callable[[PyTree, jax.Array, jax.Array, jax.Array], tuple[PyTree, PyTree]],
    mesh: Mesh,
    *,
    wide: int = WIDE,
    lies: PyTree | None = None,
) -> Callable[[PyTree, jax.Array, jax.Array, jax.Array], tuple[PyTree, PyTree]]:
    """A step `(carry, key, x, y) -> (carry, value)` that splits its batch over `data`, and keeps the carry in place.

    Use it under `jax.jit`, also below `jax.vmap` over seeds and in a loop over steps.

    Args:
      step: the step.
      mesh, wide: as in `layout`.
      lies: the shardings of the carry of one seed; None: those of `layout`, which knows no direct feedback.
    """

    def sharded(carry: PyTree, key: jax.Array, x: jax.Array, y: jax.Array) -> tuple[PyTree, PyTree]:
        x, y = jax.lax.with_sharding_constraint((x, y), batch_sharding(mesh))
        carry, value = step(carry, key, x, y)
        return jax.lax.with_sharding_constraint(carry, layout(carry, mesh, wide=wide) if lies is None else lies), value

    return sharded


def gather(tree: PyTree) -> PyTree:
    """The whole arrays, as NumPy arrays (keys stay keys). With several processes, every process must call it."""

    def whole(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(whole(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


def is_first() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return jax.process_index() == 0


def largest(number: int) -> int:
    """The largest number (below 2**31) of all processes. Every process must call it at the same place."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def from_first(function: Callable[[], Any]) -> Any:
    """What a function returns in the first process, or the `InputError` that it raises there, for all processes.

    Only the first one calls it, so it may read and write files. Every process must be here at the same place.
    """
    if jax.process_count() == 1:
        return function()
    outcome: tuple[Any, InputError | None] = None, None
    if is_first():
        try:
            outcome = function(), None
        except InputError as error:
            outcome = None, error
    told = np.frombuffer(pickle.dumps(outcome), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(told))))
    told = multihost_utils.broadcast_one_to_all(told if is_first() else np.zeros(size, np.uint8))
    value, fault = pickle.loads(np.asarray(told, np.uint8).tobytes())
    if fault is not None:
        raise fault
    return value


def initialize_processes(asked: bool = False, *, timeout: int = 300) -> bool:
    """Joins the processes of one program, and returns whether there are several. Call it before any other use of JAX.

    It does so if the variables COORDINATOR_ADDRESS, NUM_PROCESSES and PROCESS_ID are set, if SLURM (`srun`) started
    several tasks, if a TPU pod lists several workers, or if it is asked to; then `jax.distributed` finds the others.

    Args:
      asked: join also where no other process shows in the environment, as on a Cloud TPU pod.
      timeout: seconds to wait for the other processes.

    Raises:
      InputError: the variables are wrong, there are no others to be found, or JAX is in use already.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    options = _explicit_processes()
    if not (options or asked or _several_are_detected()):
        return False
    try:
        jax.distributed.initialize(**options, initialization_timeout=timeout)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        if "before any JAX calls" in reason:
            raise InputError("JAX is in use already: call initialize_processes before anything else.") from error
        raise InputError(
            f"The processes cannot find one another ({reason}): set {', '.join(PROCESS_VARIABLES[:2])} and "
            f"{PROCESS_VARIABLES[2]} for each process."
        ) from error
    return jax.process_count() > 1


def _explicit_processes() -> dict[str, Any]:
    """The options of `jax.distributed.initialize` from the three variables; none if they are not set."""
    given = {name: os.environ[name].strip() for name in PROCESS_VARIABLES if os.environ.get(name, "").strip()}
    if not given:
        return {}
    if missing := [name for name in PROCESS_VARIABLES if name not in given]:
        raise InputError(f"{' and '.join(given)} is set, but not {missing[0]}: set all three, or none.")
    address, count, index = given.values()
    if not re.fullmatch(r".+:[0-9]+", address):
        raise InputError(f"COORDINATOR_ADDRESS must be host:port of process 0, as in 10.0.0.1:1234, got '{address}'.")
    numbers = [int(n) if n.isascii() and n.isdecimal() else -1 for n in (count, index)]
    if numbers[0] < 1:
        raise InputError(f"NUM_PROCESSES must be a positive integer, got '{count}'.")
    if not 0 <= numbers[1] < numbers[0]:
        raise InputError(f"PROCESS_ID must be an integer from 0 to {numbers[0] - 1}, got '{index}'.")
    return {"coordinator_address": address, "num_processes": numbers[0], "process_id": numbers[1]}


def _several_are_detected() -> bool:
    """Whether the environment says that several processes belong together."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    workers = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return (tasks.isdecimal() and int(tasks) > 1) or len(workers.split(",")) > 1


def collectives(compiled: jax.stages.Compiled) -> dict[str, int]:
    """The number of operations of each kind by which devices communicate in a compiled program (a loop's count once).

    Args:
      compiled: such as `jax.jit(step).lower(carry, key, x, y).compile()`.
    """
    return {kind: number for kind, (number, _) in traffic(compiled).items()}


def traffic(compiled: jax.stages.Compiled) -> dict[str, tuple[int, int]]:
    """The same, with the bytes of their results on one device: `{kind: (number, bytes)}`."""
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    found = dict.fromkeys(kinds, (0, 0))
    for shapes, kind in re.findall(rf"= (.*?) ({'|'.join(kinds)})(?:-start)?\(", compiled.as_text() or ""):
        size = 0
        for dtype, axes in re.findall(r"([a-z]+\d*)\w*\[([\d,]*)\]", shapes):
            bits = int(re.sub(r"\D", "", dtype) or 8)  # those of pred are bytes
            size += bits * math.prod(int(n) for n in axes.split(",") if n) // 8
        found[kind] = found[kind][0] + 1, found[kind][1] + size
    return found


class MeshPlacement(Placement):
    """Where the arrays of a run lie on a mesh: the data sets and the carry as `layout` says, batches over `data`."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh

    def whole(self, array: Any) -> jax.Array:
        return _put(array, NamedSharding(self.mesh, PartitionSpec()))

    def batch(self, array: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(array, batch_sharding(self.mesh))

    def carry(self, tree: PyTree, lies: Lies | None = None) -> PyTree:
        return place(tree, self.mesh, lies=self.layout(tree, lies))

    def layout(self, tree: PyTree, lies: Lies | None = None) -> PyTree:
        found = layout(tree, self.mesh, lead=1)
        if lies is None:
            return found

        def of_one_lane(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            own = NamedSharding(self.mesh, PartitionSpec(*sharding.spec[1:]))
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=own)

        found = lies(jax.tree.map(of_one_lane, tree, found))
        return jax.tree.map(lambda sharding: NamedSharding(self.mesh, PartitionSpec(None, *sharding.spec)), found)

    def gather(self, tree: PyTree) -> PyTree:
        return gather(tree)

    def least(self, number: int) -> int:
        # In units that keep it below 2**31.
        return -largest(-min(number // 2**20, 2**31 - 1)) * 2**20 if jax.process_count() > 1 else number


def placement(devices: str | int, mesh: str | None, batch_size: int) -> Placement:
    """Where the arrays of a run lie: on one device, or on a mesh of many, whose `data` axis divides the batch.

    Of "all" devices without a mesh it takes as many as divide the batch, in one process.
    """
    if mesh is None and devices == "all" and jax.process_count() == 1:
        devices = max(n for n in range(1, jax.device_count() + 1) if batch_size % n == 0)
        if devices < jax.device_count():
            print(f"Computes on {devices} of {jax.device_count()} devices, which a batch of {batch_size} divides into.")
    made = make_mesh(devices, mesh)
    check_batch(made, batch_size)
    return MeshPlacement(made) if made.size > 1 else Placement()
