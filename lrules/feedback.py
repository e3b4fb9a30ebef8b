"""Initializers of feedback weights that `jax.nn.initializers` does not have; where feedback lies; its file.

Each initializer here returns an `init(key, shape, dtype)`, for the `init=` of a rule. Rules draw sequential feedback as
a layer's `[fan_in, fan_out]` (a convolution: `[*window, in, out]`), and direct feedback as `[hidden size, outputs]`.
The error comes from the last axis; the other axes are the layer that receives it. The source is Baldi, Sadowski, Lu:
Learning in the machine: random backpropagation and the deep learning channel (2018), sections 3 and 4, except where a
docstring names another.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrules.network import NetworkLike, as_network
from lrules.options import as_initializer, draw, is_whole
from lrules.rule import Feedback, Rule, check_params, require_description, require_feedback, require_rule
from lrules.typing import Initializer, Pytree

__all__ = ["absolute", "averaged", "binary", "congruent", "load", "save", "shardings", "shifted", "sparse"]


def _around(init: Initializer | None, change: Callable[..., Any]) -> Initializer:
    """An initializer that returns `change(inner, key)`, where `inner(key)` is a draw of another initializer."""
    inner = as_initializer(init)

    @functools.wraps(inner)  # with its signature: it gets the weight if the other initializer asks for it
    def changed(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, **weight: Any) -> Any:
        return change(lambda k: draw(inner, k, shape, dtype, **weight), key)

    return changed


def sparse(n: float, *, rescale: bool = False) -> Initializer:
    """Sparse feedback: each neuron above reaches on average n neurons of the receiving layer, with weight one.

    B = 1 with probability p = n / fan_in, else 0, where fan_in is the size of the receiving layer

    Args:
      n: the average number of neurons, >= 0. A number above the size of the receiving layer means all its neurons.
      rescale: divides the weights by sqrt(n), so that errors do not grow from layer to layer of a sequential rule.

    Returns:
      The initializer.

    Raises:
      ValueError: n is negative, or n is zero and `rescale` is True.

    Example:
      >>> import jax, lrules
      >>> b = lrules.feedback.sparse(2)(jax.random.key(0), (100, 100))
      >>> round(float(b.sum(0).mean()))
      2

    References:
      Baldi, Sadowski, Lu (2018), Figures 3 and 4.
    """
    if n < 0 or (rescale and n == 0):
        least = "> 0 with rescale=True" if rescale else ">= 0"
        raise ValueError(f"sparse: n must be a number {least}, got {n}")

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        p = min(n / math.prod(shape[:-1]), 1.0)
        drawn = jax.random.bernoulli(key, p, shape).astype(dtype)
        return drawn / jnp.asarray(math.sqrt(n), dtype) if rescale else drawn

    return init


def binary(low: float = -1.0, high: float = 1.0) -> Initializer:
    """Binary feedback: one of two values, each with probability one half.

    B = low or high;  `binary()` draws -1 and +1, `binary(0, 1)` draws 0 and 1

    Args:
      low, high: the two values.

    Returns:
      The initializer.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> jnp.unique(lrules.feedback.binary(0, 1)(jax.random.key(0), (4, 5))).tolist()
      [0.0, 1.0]

    References:
      Baldi, Sadowski, Lu (2018), section 3.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        chosen = jax.random.bernoulli(key, 0.5, shape)
        return jnp.where(chosen, jnp.asarray(high, dtype), jnp.asarray(low, dtype))

    return init


def shifted(mean: float, *, init: Initializer | None = None) -> Initializer:
    """Feedback with a mean: the weights of another initializer plus a constant.

    B = B' + mean,  B' ~ init

    Args:
      mean: the constant.
      init: the other initializer; default `jax.nn.initializers.glorot_normal()`.

    Returns:
      The initializer.

    Raises:
      TypeError: `init` is not a function.

    Example:
      >>> import jax, lrules
      >>> b = lrules.feedback.shifted(0.1, init=jax.nn.initializers.zeros)(jax.random.key(0), (2, 3))
      >>> round(float(b.mean()), 3)
      0.1

    References:
      Baldi, Sadowski, Lu (2018), section 4.2, observation 3.
    """

    def change(inner: Callable[..., Any], key: jax.Array) -> Any:
        drawn = inner(key)
        return drawn + jnp.asarray(mean, drawn.dtype)

    return _around(init, change)


def absolute(init: Initializer | None = None) -> Initializer:
    """Non-negative feedback: the absolute values of another initializer.

    B = |B'|,  B' ~ init

    Args:
      init: the other initializer; default `jax.nn.initializers.glorot_normal()`.

    Returns:
      The initializer.

    Raises:
      TypeError: `init` is not a function.

    Example:
      >>> import jax, lrules
      >>> bool((lrules.feedback.absolute()(jax.random.key(0), (4, 5)) >= 0).all())
      True

    References:
      Lechner: Learning representations for binary-classification without backpropagation (2020), section 3.
    """
    return _around(init, lambda inner, key: jnp.abs(inner(key)))


def congruent(init: Initializer | None = None) -> Initializer:
    """Feedback with the signs that the forward weights have when `rule.init` draws it.

    B = |B'| * sign(W),  B' ~ init

    Only sequential rules can use it. The signs of the feedback stay the same when the forward weights change. For
    signs that follow the forward weights, use `lrules.sign_symmetry`.

    Args:
      init: the initializer of the magnitudes; default `jax.nn.initializers.glorot_normal()`.

    Returns:
      The initializer.

    Raises:
      TypeError: `init` is not a function.
      ValueError: in `rule.init`: the rule is direct, so its feedback does not belong to a forward weight.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": -jnp.ones((4, 2))}
      >>> rule = lrules.feedback_alignment(lrules.feedback.congruent())
      >>> bool((rule.init(jax.random.key(0), net, params, jnp.ones((1, 3))).fixed["b"] <= 0).all())
      True

    References:
      Baldi, Sadowski, Lu (2018), section 3.
    """
    inner = as_initializer(init)

    def congruent_init(
        key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, weight: Any = None
    ) -> jax.Array:
        if weight is None:
            raise ValueError(
                "congruent feedback takes the signs of a layer's weight, and direct feedback does not belong to a "
                "weight: use a sequential rule, such as feedback_alignment(init=congruent())"
            )
        return jnp.abs(draw(inner, key, shape, dtype)) * jnp.sign(weight).astype(dtype)

    return congruent_init


def averaged(n: int, *, init: Initializer | None = None) -> Initializer:
    """Averaged feedback: the mean of n draws of another initializer.

    B = (B_1 + ... + B_n) / n,  B_i ~ init;  this equals averaging the signals that n sets of random matrices bring

    Args:
      n: the number of draws, >= 1.
      init: the other initializer; default `jax.nn.initializers.glorot_normal()`.

    Returns:
      The initializer.

    Raises:
      TypeError: `init` is not a function.
      ValueError: n is not an integer >= 1.

    Example:
      >>> import jax, lrules
      >>> b = lrules.feedback.averaged(16, init=lrules.feedback.binary())(jax.random.key(0), (100, 100))
      >>> round(float(b.std()), 2)  # 1 / sqrt(16)
      0.25

    References:
      Baldi, Sadowski, Lu (2018), sections 3 and 6.1.
    """
    if not (is_whole(n) and n >= 1):
        raise ValueError(f"averaged: n must be an integer >= 1, got {n!r}")
    return _around(init, lambda inner, key: jax.vmap(inner)(jax.random.split(key, n)).mean(0))


# ------------------------------------------------------------------------------------------------------- many devices


def shardings(rule: Rule, net: NetworkLike, params: Pytree, inputs: Pytree) -> Feedback:
    """Says where the feedback of a rule lies on a mesh of devices. `rule.init` places it there.

    Sequential feedback lies as its parameter. Direct feedback `[outputs, *hidden]` lies as the features of the hidden
    signal: as the model says (`jax.lax.with_sharding_constraint`), else as the axis of the weight that reads them, else
    as that of the weight that makes them, else whole. An array in the state of a rule lies as the parameter or feedback
    weight of its shape, else whole.

    Args:
      rule: the rule.
      net: the network.
      params: the parameters: arrays, or `ShapeDtypeStruct`s with `sharding=`.
      inputs: the inputs of the network, arrays or `ShapeDtypeStruct`s.

    Returns:
      The shardings, in the structure of `rule.init(key, net, params, inputs)`: a `NamedSharding` for each array, for
      `jax.jit(in_shardings=..., out_shardings=...)`, `jax.device_put` and checkpoints. If the parameters lie on one
      device, without a mesh, it is this device's sharding.

    Raises:
      ValueError: a parameter does not say where it lies, or the rule does not say what it does at each layer.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> net = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
      >>> params = {"a": (jnp.ones((3, 4)), P(None, "model")), "b": (jnp.ones((4, 2)), P("model", None))}
      >>> params = {name: jax.device_put(w, NamedSharding(mesh, spec)) for name, (w, spec) in params.items()}
      >>> rule = lrules.direct_feedback_alignment()
      >>> lrules.feedback.shardings(rule, net, params, jnp.ones((5, 3))).fixed["b"].spec == P(None, "model")
      True
    """
    require_rule(rule)
    check_params(params)
    net = as_network(net)
    known = require_description(rule, "feedback.shardings")
    leaves = jax.tree.leaves((params, net.frozen))
    for path, leaf in jax.tree_util.tree_leaves_with_path((params, net.frozen)):
        if isinstance(leaf, jax.core.Tracer) or getattr(leaf, "sharding", None) is None:
            name = jax.tree_util.keystr(path[1:], simple=True, separator="/") or "params"
            raise ValueError(
                f"feedback.shardings: the parameter {name!r} does not say where it lies: call it outside of jit with "
                "arrays, or with jax.ShapeDtypeStruct(shape, dtype, sharding=...)"
            )
    shapes = jax.eval_shape(lambda key, p, x: rule.init(key, net, p, x), jax.random.key(0), params, inputs)
    return known.plan(net, net.graph(params, inputs), params, inputs).shardings(shapes, leaves)


# ----------------------------------------------------------------------------------------------------- saving, loading

_FORMAT = 1  # of the file; a file with a larger number is refused
_KEY = "key:"  # before the name of the generator of a typed key, in the place of a dtype


def save(path: str | os.PathLike[str], feedback: Feedback) -> None:
    """Saves feedback weights, and the state of the rule, in one file that `load` reads.

    The file is an npz file of NumPy. Its entries are `fixed/NAME`, `learned/NAME`, `state/...` and `structure`, a text
    of JSON with the containers, and with the dtypes that NumPy does not have: an array of bfloat16 is stored as uint16
    with the same bits. A file of the same name is replaced when the new one is complete.

    Args:
      path: the file; the usual end of its name is `.npz`.
      feedback: what `rule.init` returned, or what training made of it. Its state may be of dicts, lists and tuples.

    Raises:
      TypeError: `feedback` is not a `Feedback`, or its state has other containers.
      OSError: the file cannot be written.

    Example:
      >>> import jax, jax.numpy as jnp, lrules, pathlib, tempfile
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> feedback = lrules.feedback_alignment().init(jax.random.key(0), net, params, jnp.ones((1, 3)))
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "feedback.npz"
      >>> lrules.feedback.save(path, feedback)
      >>> bool(jnp.array_equal(lrules.feedback.load(path).fixed["b"], feedback.fixed["b"]))
      True
    """
    require_feedback(feedback)
    arrays: dict[str, Any] = {}
    dtypes: dict[str, str] = {}
    containers = {name: _taken_apart(part, name, arrays, dtypes) for name, part in feedback._asdict().items()}
    structure = json.dumps({"lrules feedback": _FORMAT, "containers": containers, "dtypes": dtypes})
    path = pathlib.Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, structure=np.asarray(structure), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> Feedback:
    """Loads feedback weights that `save` saved, with the same names, containers, dtypes and bits.

    Args:
      path: the file.

    Returns:
      The feedback, on the default device.

    Raises:
      ValueError: the file is damaged, `save` did not write it, a newer version did, or it has 64-bit numbers and
        `jax_enable_x64` is off.
      OSError: the file does not exist, or cannot be read.

    Example:
      >>> import jax.numpy as jnp, lrules, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "feedback.npz"
      >>> lrules.feedback.save(path, lrules.Feedback({"layers/1/w": jnp.ones((2, 3), jnp.bfloat16)}, {}, {"n": (1,)}))
      >>> feedback = lrules.feedback.load(path)
      >>> feedback.fixed["layers/1/w"].dtype.name, feedback.learned, feedback.state
      ('bfloat16', {}, {'n': (Array(1, dtype=int32),)})
    """
    content = pathlib.Path(path).read_bytes()
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            structure = json.loads(str(file["structure"]))
            version = structure["lrules feedback"]
            if version <= _FORMAT:
                arrays, dtypes = {name: file[name] for name in file.files}, structure["dtypes"]
                parts = {name: _put_together(structure["containers"][name], arrays) for name in Feedback._fields}
    except Exception as error:  # a damaged file makes NumPy and zipfile raise nearly anything
        raise ValueError(
            f"{path} is damaged, or lrules.feedback.save did not write it ({type(error).__name__}): give a file that "
            "it wrote"
        ) from error
    if version > _FORMAT:
        raise ValueError(f"{path} is of a newer version of lrules (format {version}): update lrules to load it")

    def as_jax(name: str) -> jax.Array:
        array, dtype = arrays[name], dtypes.get(name)
        if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            raise ValueError(
                f"{path} has {name!r} in {array.dtype}, and jax_enable_x64 is off: write "
                'jax.config.update("jax_enable_x64", True) before you load it'
            )
        if dtype is not None and dtype.startswith(_KEY):
            return jax.random.wrap_key_data(jnp.asarray(array), impl=dtype.removeprefix(_KEY))
        return jnp.asarray(array if dtype is None else array.view(dtype))

    return Feedback(**jax.tree.map(as_jax, parts))


def _taken_apart(part: Pytree, name: str, arrays: dict[str, Any], dtypes: dict[str, str]) -> Any:
    """The containers of a part as JSON, with names in the place of its arrays, which are added to `arrays`."""
    if part is None:
        return None
    if type(part) is dict and all(type(key) in (str, int) for key in part):  # pairs: keys of JSON are strings
        return {"dict": [(key, _taken_apart(inner, f"{name}/{key}", arrays, dtypes)) for key, inner in part.items()]}
    if type(part) in (list, tuple):
        inner = [_taken_apart(inner, f"{name}/{i}", arrays, dtypes) for i, inner in enumerate(part)]
        return {type(part).__name__: inner}
    if not jax.tree_util.all_leaves([part]):
        raise TypeError(
            f"the feedback has a {type(part).__name__} at {name!r}, which its file cannot keep: make the state of the "
            "rule of dicts with names, lists and tuples, or save the feedback together with your checkpoints"
        )
    while name in arrays:  # {"a/b": ...} and {"a": {"b": ...}} read alike
        name += "'"
    array = jnp.asarray(part)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        dtypes[name] = f"{_KEY}{jax.random.key_impl(array)}"
        array = jax.random.key_data(array)
    arrays[name] = np.asarray(array)
    if array.dtype.isbuiltin != 1:  # NumPy would write it without its name
        dtypes[name] = array.dtype.name
        arrays[name] = arrays[name].view(f"u{array.dtype.itemsize}")
    return name


def _put_together(containers: Any, arrays: Mapping[str, Any]) -> Pytree:
    """The containers that `_taken_apart` has returned, with the names of arrays as leaves."""
    if containers is None:
        return None
    if isinstance(containers, str):
        arrays[containers]  # it must be there
        return containers
    ((kind, inner),) = containers.items()
    if kind == "dict":
        return {key: _put_together(value, arrays) for key, value in inner}
    return {"list": list, "tuple": tuple}[kind](_put_together(value, arrays) for value in inner)


def __dir__() -> list[str]:
    return list(__all__)
