"""A network of equal stages, its parameters, and where they lie."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lrules
from experiments.errors import InputError

PyTree = Any
AXIS = "stage"
BOUNDARY = "boundary"  # the mark of what goes from one stage to the next: boundary/0 leaves `first`


class Params(NamedTuple):
    """The parameters: `stages` is a list, one entry a stage, or (`stacked`) one pytree with an axis of stages."""

    first: PyTree
    stages: PyTree
    last: PyTree


class SplitFeedback(NamedTuple):
    """The feedback of `first`, and that of all stages with an axis of stages in front."""

    first: lrules.Feedback
    stages: lrules.Feedback


T = TypeVar("T", Params, SplitFeedback)


@dataclasses.dataclass(frozen=True)
class Staged:
    """A network of equal stages.

    Attributes:
      first: `(params, inputs) -> h`, which runs on the first device.
      stage: `(params, h) -> h`, with the same shapes for every stage.
      last: `(params, h) -> outputs`, which runs on the last device. It has one layer, and ends with it: a softmax
        belongs into the loss.
    """

    first: Callable[[PyTree, jax.Array], jax.Array]
    stage: Callable[[PyTree, jax.Array], jax.Array]
    last: Callable[[PyTree, jax.Array], PyTree]

    def whole(self, params: Params, inputs: jax.Array) -> PyTree:
        """The network on one device; `params.stages` is a list."""
        h = lrules.hidden(self.first(params.first, inputs), f"{BOUNDARY}/0")
        for i, p in enumerate(params.stages, 1):
            h = lrules.hidden(self.stage(p, h), f"{BOUNDARY}/{i}")
        return self.last(params.last, h)

    def alone(self, part: Callable[[PyTree, Any], Any]) -> lrules.Network:
        """A part as a network for a direct rule: the outputs are those of `last` above it, and aux is what it sends."""

        def apply(params: dict[str, PyTree], x: jax.Array) -> tuple[PyTree, jax.Array]:
            h = lrules.hidden(part(params["part"], x), BOUNDARY)
            return self.last(params["last"], h), h

        return lrules.Network(apply, has_aux=True)


# --------------------------------------------------------------------------------------------- parameters and feedback


def make_mesh(count: int) -> Mesh:
    """A mesh of so many devices along the axis of stages."""
    if count > jax.device_count():
        raise InputError(
            f"{count} stages need {count} devices, and there are {jax.device_count()}: take fewer stages, or, on a "
            f"processor, set XLA_FLAGS=--xla_force_host_platform_device_count={count}."
        )
    return Mesh(np.array(jax.devices()[:count]), (AXIS,))


def stacked(params: Params) -> Params:
    """The parameters with an axis of stages in front of those of the stages."""
    return params._replace(stages=jax.tree.map(lambda *leaves: jnp.stack(leaves), *params.stages))


def unstacked(params: Params) -> Params:
    """The parameters as `Staged.whole` takes them, from `stacked` ones."""
    count = len(jax.tree.leaves(params.stages)[0])
    return params._replace(stages=[jax.tree.map(operator.itemgetter(i), params.stages) for i in range(count)])


def place(values: T, mesh: Mesh) -> T:
    """Puts each stage on its device, and `first` and `last` on all of them; takes `Params` or a `SplitFeedback`."""
    lies = {"stages": PartitionSpec(AXIS)}
    put = {
        name: jax.device_put(value, NamedSharding(mesh, lies.get(name, PartitionSpec())))
        for name, value in values._asdict().items()
    }
    return values._replace(**put)


def difference(wanted: PyTree, got: PyTree) -> float:
    """The largest difference of two pytrees, leaf by leaf relative to the largest number of the leaf."""

    def one(a: Any, b: Any) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.max(np.abs(a - b), initial=0) / max(np.max(np.abs(a), initial=0), 1e-30))

    return max(jax.tree.leaves(jax.tree.map(one, wanted, got)), default=0.0)


# ------------------------------------------------------------------------------------------------------------- networks


def mlp(activation: Callable[[jax.Array], jax.Array]) -> Staged:
    """Dense layers of one width, some to a stage, with a dense layer before and after."""

    def dense(p: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
        y = x @ p["kernel"]
        return y + jnp.broadcast_to(p["bias"], y.shape)

    def stage(layers: Sequence[Mapping[str, jax.Array]], h: jax.Array) -> jax.Array:
        for p in layers:
            h = activation(dense(p, h))
        return h

    return Staged(lambda p, x: activation(dense(p, x)), stage, dense)


def mlp_params(
    key: jax.Array, *, inputs: int, width: int, outputs: int, stages: int, layers: int, dtype: Any = None
) -> Params:
    """Random parameters of `mlp`."""
    keys = iter(jax.random.split(key, stages * layers + 2))

    def dense(m: int, n: int) -> dict[str, jax.Array]:
        kernel = jax.random.normal(next(keys), (m, n), dtype or float) / m**0.5
        return {"kernel": kernel, "bias": jnp.zeros(n, kernel.dtype)}

    first, last = dense(inputs, width), dense(width, outputs)
    return Params(first, [[dense(width, width) for _ in range(layers)] for _ in range(stages)], last)
