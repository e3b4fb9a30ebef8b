"""Feedback weights that take no memory: they are drawn again from their key, in tiles, wherever they are needed.

The numbers are those of the initializer for the whole matrix, bit for bit: a number of threefry depends on the key and
on its place alone, so the program of the initializer is evaluated for a few rows at a time. This serves initializers
that make each number from numbers at the same place or in the same row, such as all of `jax.nn.initializers` but the
orthogonal ones.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p

from lrules.engine.dtypes import at_least_float32
from lrules.engine.jaxprs import bind, call_body, is_literal, open_jaxpr
from lrules.engine.operations import of
from lrules.options import draw
from lrules.typing import Initializer

TILE, COLUMNS = 2**16, 512  # the numbers that are drawn at once, and in how many columns at most
_ELEMENTWISE = {"shift_right_logical", "shift_right_arithmetic", "shift_left", "bitcast_convert_type"}


def key_words(key: jax.Array, name: str) -> jax.Array:
    """The two words of a key, which are all that is kept of a feedback weight.

    Raises:
      ValueError: the numbers of such a key do not depend on their places alone.
    """
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    kind = str(jax.random.key_impl(key) if typed else jax.config.jax_default_prng_impl)  # type: ignore[attr-defined]
    _require_places(kind, f"the feedback {name!r}")
    return jax.random.key_data(key) if typed else key


def _require_places(kind: str, what: str) -> None:
    if kind not in ("fry", "threefry2x32") or not jax.config.jax_threefry_partitionable:  # type: ignore[attr-defined]
        got = f"a key of {kind}" if kind not in ("fry", "threefry2x32") else "jax_threefry_partitionable=False"
        raise ValueError(
            f'storage="recomputed" draws {what} in tiles, which needs keys of threefry2x32 and '
            f'jax_threefry_partitionable=True, got {got}: give such a key, or storage="stored"'
        )


@dataclasses.dataclass(frozen=True)
class Matrix:
    """What an initializer draws: `[rows, columns]`, of a dtype; the name of the feedback weight is for messages."""

    init: Initializer
    rows: int
    columns: int
    dtype: Any
    name: str

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def part(self, words: jax.Array, starts: Sequence[Any], sizes: tuple[int, int]) -> jax.Array:
        """Some rows and columns of the matrix for a key, from a first row and a first column."""

        def drawn(words: jax.Array) -> jax.Array:
            key = jax.random.wrap_key_data(words, impl="threefry2x32")
            return draw(self.init, key, (self.rows, self.columns), self.dtype)

        jaxpr, consts = open_jaxpr(jax.make_jaxpr(drawn)(words))
        variables = [*jaxpr.constvars, *jaxpr.invars]
        given = {v: _Whole(x) for v, x in zip(variables, [*consts, words], strict=True)}
        return _Parts(jaxpr, given, self.name).part(jaxpr.outvars[0], _Window(list(zip(starts, sizes, strict=True))))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["key"], meta_fields=["matrix", "shape", "dtype", "name"]
)
@dataclasses.dataclass(frozen=True)
class RecomputedFeedback:
    """A direct feedback weight that is not stored; `lrules.extend.project` draws it again, tile by tile.

    Attributes:
      key: the two words of its key.
      matrix: what the initializer draws from it, `[hidden size, outputs]`, or more outputs than are needed.
      shape, dtype: the shape, `[outputs, *hidden]`, and the dtype of the feedback weight.
      name: the name of the feedback weight.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> def signal(e, b, targets, name):
      ...     print(name, type(b).__name__, b.shape)
      ...     return lrules.extend.project(e, b)
      >>> rule = lrules.direct(signal, init=jax.nn.initializers.normal(), storage="recomputed")
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> x, loss = jnp.ones((5, 3)), lrules.testing.half_squared_error
      >>> feedback = rule.init(jax.random.key(0), net, params, x)
      >>> grads = lrules.value_and_grad(net, loss, rule)(params, feedback, x, jnp.ones((5, 2)))
      b RecomputedFeedback (2, 4)
    """

    key: jax.Array
    matrix: Matrix
    shape: tuple[int, ...]
    dtype: Any
    name: str

    def checked(self) -> jax.Array:
        """One tile. Its shapes alone say whether parts of what the initializer draws can be drawn."""
        return self.matrix.part(self.key, (0, 0), self._tile())

    def whole(self) -> jax.Array:
        """The feedback weight, `[outputs, *hidden]`; for tests and small feedback, as it takes memory."""
        return self.matrix.part(self.key, (0, 0), (self.matrix.rows, self.shape[0])).T.reshape(self.shape)

    def _tile(self) -> tuple[int, int]:
        """The rows and columns of a tile."""
        columns = _equal(self.shape[0], COLUMNS)
        return _equal(self.matrix.rows, TILE // max(columns, 1)), columns

    def projected(self, e: jax.Array) -> jax.Array:
        """The product `e . B`, `[batch, *hidden]`, of the error `[batch, outputs]`."""
        (rows, outputs), (n, m) = (self.matrix.rows, self.shape[0]), self._tile()
        columns = _starts(outputs, m)
        wide = at_least_float32(e.dtype) if len(columns) > 1 else e.dtype

        def product(row: Any, column: Any, first: Any) -> jax.Array:  # [batch, n], of the outputs from the first on
            tile = jax.lax.optimization_barrier(self.matrix.part(self.key, (row, column), (n, m)))
            if outputs % m:
                tile = jnp.where(column + jnp.arange(m, dtype=jnp.int32) >= first, tile, jnp.zeros((), tile.dtype))
            sent = e if len(columns) == 1 else jax.lax.dynamic_slice_in_dim(e, column, m, axis=1)
            return jax.lax.dot_general(sent, tile, (((1,), (1,)), ((), ())), preferred_element_type=wide)

        def over_outputs(row: Any) -> jax.Array:
            s, rest = product(row, 0, 0), range(1, len(columns))
            if rest:
                steps = jnp.asarray(columns[1:], jnp.int32), jnp.asarray([i * m for i in rest], jnp.int32)
                s, _ = jax.lax.scan(lambda s, at: (s + product(row, *at), None), s, steps)
            return s.astype(e.dtype)

        starts = _starts(rows, n)
        if len(starts) == 1:
            return over_outputs(0).reshape(e.shape[0], *self.shape[1:])
        tiles = jax.lax.map(over_outputs, jnp.asarray(starts, jnp.int32))  # [tiles, batch, n]
        front = jnp.moveaxis(tiles[:-1], 0, 1).reshape(e.shape[0], -1)
        s = jnp.concatenate([front, tiles[-1][:, len(starts) * n - rows :]], axis=1)
        return s.reshape(e.shape[0], *self.shape[1:])


def reduced(e: jax.Array, key: jax.Array, matrix: Matrix) -> jax.Array:
    """The product of errors `[..., outputs]` and a matrix `[outputs, rank]`, which is drawn in tiles.

    Args:
      e: the errors.
      key: the two words of the key of the matrix.
      matrix: what is drawn.
    """
    n = _equal(matrix.rows, TILE // matrix.columns)
    starts = jnp.asarray(_starts(matrix.rows, n), jnp.int32)

    def one(start: jax.Array, first: jax.Array) -> jax.Array:
        rows = matrix.part(key, (start, 0), (n, matrix.columns))
        new = start + jnp.arange(n, dtype=jnp.int32) >= first  # the last tile may begin inside the tile before it
        part = jax.lax.dynamic_slice_in_dim(e, start, n, axis=e.ndim - 1)
        return jnp.tensordot(part, jnp.where(new[:, None], rows, jnp.zeros((), rows.dtype)), axes=1)

    firsts = jnp.arange(len(starts), dtype=jnp.int32) * n
    if len(starts) == 1:
        return one(starts[0], firsts[0])
    return jax.lax.map(lambda at: one(*at), (starts, firsts)).sum(0)


def _equal(total: int, most: int) -> int:
    """The size of parts of a total that are equally large, and not larger than `most` (or than one)."""
    return -(-total // -(-total // max(1, min(total, most))))


def _starts(total: int, n: int) -> list[int]:
    """The starts of parts of size n; the last part begins inside the part before it if they do not fit."""
    return [min(start, total - n) for start in range(0, total, n)]


class _Window:
    """A part of an array: the start and the size along each axis. Starts may be traced."""

    def __init__(self, axes: Sequence[tuple[Any, int]]) -> None:
        self.axes = tuple(axes)
        self.starts, self.sizes = [start for start, _ in axes], [size for _, size in axes]

    def of(self, array: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(array, self.starts, self.sizes) if self.axes else array

    def beside(self, shape: Sequence[int], result: Sequence[int]) -> _Window:
        """The part of an operand from which this part of a result follows; it may be a scalar, or have axes of one."""
        if tuple(shape) == tuple(result):
            return self
        triples = zip(self.axes, shape, result, strict=True) if shape else ()
        return _Window([axis if n == m else (0, n) for axis, n, m in triples])


class _Whole:
    """A value that is there as a whole."""

    def __init__(self, array: jax.Array) -> None:
        self.array = array

    def whole(self) -> jax.Array:
        return self.array

    def part(self, window: _Window) -> jax.Array:
        return window.of(self.array)


@dataclasses.dataclass(frozen=True)
class _Inside:
    """A value of the program that calls this one."""

    parts: _Parts
    atom: Any

    def whole(self) -> jax.Array:
        return self.parts.whole(self.atom)

    def part(self, window: _Window) -> jax.Array:
        return self.parts.part(self.atom, window)


class _Parts:
    """Evaluates parts of the values of a jaxpr, from what is asked for back to the random bits."""

    def __init__(self, jaxpr: Any, given: Mapping[Any, Any], name: str) -> None:
        self.jaxpr, self.given, self.name = jaxpr, given, name
        self.source = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        self.inner: dict[int, _Parts] = {}
        self.made: dict[Any, jax.Array] = {}

    def whole(self, atom: Any) -> jax.Array:
        """A whole value, which must be small."""
        if is_literal(atom) or atom in self.given:
            return atom.val if is_literal(atom) else self.given[atom].whole()
        if atom not in self.made:
            eqn = self.source[atom]
            if max(math.prod(v.aval.shape) for v in (*eqn.outvars, *eqn.invars)) > TILE:
                raise ValueError(
                    f'storage="recomputed" draws the feedback {self.name!r} in tiles, and its init computes all its '
                    f"numbers together ({of(eqn).name}): use an initializer that draws each number by itself, such as "
                    'jax.nn.initializers.glorot_normal(), or storage="stored"'
                )
            body = call_body(eqn)
            if body is not None:
                return self.called(eqn, body).whole(body.outvars[eqn.outvars.index(atom)])
            self.made.update(zip(eqn.outvars, bind(eqn, [self.whole(v) for v in eqn.invars]), strict=True))
        return self.made[atom]

    def called(self, eqn: Any, body: Any) -> _Parts:
        if id(eqn) not in self.inner:
            given = {v: _Inside(self, outer) for v, outer in zip(body.invars, eqn.invars, strict=True)}
            self.inner[id(eqn)] = _Parts(body, given, self.name)
        return self.inner[id(eqn)]

    def part(self, atom: Any, window: _Window) -> jax.Array:
        """A part of a value."""
        if is_literal(atom):
            return atom.val
        if atom in self.given:
            return self.given[atom].part(window)
        if (atom, window) not in self.made:
            self.made[atom, window] = self.computed(atom, window)
        return self.made[atom, window]

    def computed(self, atom: Any, window: _Window) -> jax.Array:
        eqn, shape = self.source[atom], atom.aval.shape
        name, body = of(eqn).name, call_body(eqn)
        if body is not None:
            return self.called(eqn, body).part(body.outvars[eqn.outvars.index(atom)], window)
        if of(eqn).elementwise or name in _ELEMENTWISE:
            return bind(eqn, [self.part(v, window.beside(v.aval.shape, shape)) for v in eqn.invars])[0]
        if name == "random_bits":
            return self.bits(eqn, window)
        if name == "iota":
            start, n = window.axes[axis := eqn.params["dimension"]]
            return (jax.lax.broadcasted_iota(jnp.int32, window.sizes, axis) + start).astype(atom.aval.dtype)
        if name in ("broadcast_in_dim", "transpose", "squeeze", "reshape") or of(eqn).kind == "reduction":
            inside = self.operand_window(eqn, name, window)
            if inside is not None:
                x = self.part(eqn.invars[0], inside)
                if name == "broadcast_in_dim":
                    return jax.lax.broadcast_in_dim(x, window.sizes, eqn.params["broadcast_dimensions"])
                return bind(eqn, [x])[0] if name == "transpose" or "axes" in eqn.params else x.reshape(window.sizes)
        return window.of(self.whole(atom))

    def operand_window(self, eqn: Any, name: str, window: _Window) -> _Window | None:
        """The part of the operand from which a part of the result follows; None if it is not known."""
        shape, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        if name == "broadcast_in_dim":
            dims = eqn.params["broadcast_dimensions"]
            return _Window([window.axes[d] if n == out[d] else (0, n) for n, d in zip(shape, dims, strict=True)])
        if name == "transpose":
            order = eqn.params["permutation"]
            return _Window([window.axes[order.index(i)] for i in range(len(order))])
        if "axes" in eqn.params and len(eqn.outvars) == 1:
            left = iter(window.axes)
            return _Window([(0, n) if i in eqn.params["axes"] else next(left) for i, n in enumerate(shape)])
        if [n for n in shape if n != 1] == [n for n in out if n != 1]:  # only axes of size one come or go
            left = iter([axis for axis, n in zip(window.axes, out, strict=True) if n != 1])
            return _Window([(0, 1) if n == 1 else next(left) for n in shape])
        return None

    def bits(self, eqn: Any, window: _Window) -> jax.Array:
        """Random bits at some places."""
        keys, shape, width = self.whole(eqn.invars[0]), eqn.params["shape"], eqn.params["bit_width"]
        _require_places(str(jax.random.key_impl(keys)), f"the feedback {self.name!r}")
        lead = keys.ndim
        words = _Window([*window.axes[:lead], (0, 2)]).of(jax.random.key_data(keys))
        words = words.reshape(*words.shape[:-1], *[1] * len(shape), 2)
        places = [jnp.broadcast_to(c, window.sizes) for c in _places(shape, window.axes[lead:])]
        a, b = (jnp.broadcast_to(words[..., i], window.sizes) for i in (0, 1))
        high, low = threefry2x32_p.bind(a, b, *places)
        if width == 64:
            return (high.astype(jnp.uint64) << 32) | low.astype(jnp.uint64)
        return (high ^ low).astype(eqn.outvars[0].aval.dtype)


def _places(shape: Sequence[int], axes: Sequence[tuple[Any, int]]) -> tuple[jax.Array, jax.Array]:
    """The places of a part's elements in the flat array, as two words of 32 bits: the high ones and the low ones."""
    high = low = jnp.zeros([1] * len(shape), jnp.uint32)
    for i, (start, n) in enumerate(axes):
        stride = math.prod(shape[i + 1 :])
        at = jnp.asarray(start, jnp.uint32) + jnp.arange(n, dtype=jnp.uint32)
        at = at.reshape([n if j == i else 1 for j in range(len(shape))])
        if math.prod(shape) <= 2**32:
            low = low + at * jnp.uint32(stride)
            continue
        high_part, low_part = _wide_product(at, stride)
        low = low + low_part
        high = high + high_part + (low < low_part).astype(jnp.uint32)
    return high, low


def _wide_product(a: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """The 64 bits of a product of a word and a number, as two words."""
    half, mask = jnp.uint32(16), jnp.uint32(0xFFFF)
    b = jnp.uint32(by % 2**32)
    (a1, a0), (b1, b0) = ((x >> half, x & mask) for x in (a, b))
    middle = a1 * b0 + ((a0 * b0) >> half)
    other = a0 * b1 + (middle & mask)
    high = a1 * b1 + (middle >> half) + (other >> half) + a * jnp.uint32(by // 2**32)
    return high, a * b
