"""What a compiled program does, from the text of its HLO: the operations of its products, and what it sends.

XLA's own cost analysis counts the body of a loop once, and adds the elementwise operations. Here a loop counts as often
as it runs, and only products count (2 operations for each multiplication); of a branch, the larger side counts.

    >>> import jax, jax.numpy as jnp
    >>> from experiments.parallel import hlo
    >>> def power(a, x):
    ...     return jax.lax.fori_loop(0, 5, lambda i, x: a @ x, x)
    >>> program = jax.jit(power).lower(jnp.ones((8, 8)), jnp.ones((8, 3))).compile()
    >>> hlo.read(program.as_text()).products == 5 * 2 * 8 * 8 * 3
    True
"""

import math
import re
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}  # else 4

HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|[^( ]+) ([\w-]+)\((.*)$")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Counts(NamedTuple):
    """What one device does in one run of the program."""

    products: int  # operations
    sent: dict[str, tuple[int, int]]  # for each collective: how often, and the bytes of its results


def read(text: str) -> Counts:
    """Counts products and collectives.

    Args:
      text: `compiled.as_text()`.

    Raises:
      ValueError: a loop with products or collectives does not say how often it runs.
    """
    bodies: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if head := HEAD.match(line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name:
            bodies[name].append(line)
    done: dict[str, Counts] = {}

    def total(name: str) -> Counts:
        if name not in done:
            done[name] = _computation(bodies[name], total)
        return done[name]

    return total(entry)


def _computation(lines: list[str], total) -> Counts:
    shapes: dict[str, tuple[int, ...]] = {}
    found = Counts(0, {})
    for line in lines:
        match = OPERATION.match(line)
        if match is None:
            continue
        name, kind, op, rest = match.groups()
        shapes[name] = _dims(kind)
        if op == "dot":
            left = re.findall(r"%([\w.-]+)", rest)[0]
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
            contracted = [shapes[left][int(a)] for a in axes[1].split(",") if a] if axes else []
            found = _plus(found, Counts(2 * math.prod(shapes[name]) * math.prod(contracted), {}))
        if op == "convolution":
            left, right = re.findall(r"%([\w.-]+)", rest)[:2]
            found = _plus(found, Counts(_convolution(line, shapes[left], shapes[right], shapes[name]), {}))
        kind_sent = op.removesuffix("-start")
        if kind_sent in COLLECTIVES:
            found = _plus(found, Counts(0, {kind_sent: (1, _bytes(kind))}))
        if branches := BRANCHES.search(line):
            sides = [total(side.strip().lstrip("%")) for side in branches[1].split(",")]
            found = _plus(found, max(sides, key=lambda side: side.products))
        elif op == "conditional":
            found = _plus(found, max((total(side) for side in CALLED.findall(line)), key=lambda side: side.products))
        elif called := CALLED.findall(line):
            inner = Counts(0, {})
            for other in called:
                inner = _plus(inner, total(other))
            found = _plus(found, _times(inner, _trips(op, line, inner)))
    return found


def _convolution(line: str, x: tuple[int, ...], w: tuple[int, ...], y: tuple[int, ...]) -> int:
    """Operations of a convolution: only where the window lies on the data, not on padding or in gaps."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line)
    assert labels is not None
    of_x, of_w, of_y = labels.groups()
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{([^}]*)\}", line) or ["", ""])[1]))
    spatial = sorted(c for c in of_x if c.isdigit())

    def sizes(key: str) -> list[int]:
        return [int(v) for v in window[key].split("x")] if key in window else [1] * len(spatial)

    pads = [int(v.split("_")[0]) for v in window["pad"].split("x")] if "pad" in window else [0] * len(spatial)
    count = 2 * y[of_y.index("b")] * y[of_y.index("f")] * w[of_w.index("i")]
    options = zip(sizes("size"), sizes("stride"), pads, sizes("lhs_dilate"), sizes("rhs_dilate"), strict=True)
    for axis, (size, stride, pad, gaps, spread) in zip(spatial, options, strict=True):
        outs, ins = y[of_y.index(axis)], x[of_x.index(axis)]
        places = (o * stride + j * spread - pad for o in range(outs) for j in range(size))
        count *= sum(0 <= place <= (ins - 1) * gaps and place % gaps == 0 for place in places)
    return count


def _trips(op: str, line: str, inner: Counts) -> int:
    if op != "while" or not (inner.products or inner.sent):
        return 1
    known = TRIPS.search(line)
    if known is None:
        raise ValueError("a loop does not say how often it runs: write it out with unroll=True")
    return int(known[1])


def _dims(kind: str) -> tuple[int, ...]:
    shape = SHAPE.search(kind)
    return tuple(int(d) for d in shape[2].split(",") if d) if shape else ()


def _bytes(kind: str) -> int:
    return sum(
        BYTES.get(dtype, 4) * math.prod(int(d) for d in dims.split(",") if d) for dtype, dims in SHAPE.findall(kind)
    )


def _plus(a: Counts, b: Counts) -> Counts:
    sent = {k: tuple(map(sum, zip(a.sent.get(k, (0, 0)), b.sent.get(k, (0, 0)), strict=True))) for k in a.sent | b.sent}
    return Counts(a.products + b.products, sent)  # type: ignore[arg-type]


def _times(a: Counts, n: int) -> Counts:
    return Counts(a.products * n, {k: (n * count, n * size) for k, (count, size) in a.sent.items()})
