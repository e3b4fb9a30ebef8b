"""The table of primitives: one row serves a new one everywhere, and no other file knows their names."""

import ast
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import sparse
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

import lrules
from lrules.diagnostics import spectral_norms
from lrules.engine import operations
from lrules.engine.jaxprs import CALLS, CONSTRUCTS, bind
from lrules.engine.operations import Row, view_axes
from tests import bridge

KEY = jax.random.key(0)
FA, DFA = lrules.feedback_alignment(), lrules.direct_feedback_alignment()


# ---------------------------------------------------------------------------------------- a primitive that JAX has not


rows_dot_p = Primitive("rows_dot")  # of [m, k] and [n, k], the products of all rows: [n, m]


def rows_dot(x, w):
    return rows_dot_p.bind(x, w)


def plain(x, w):
    return w @ x.T


rows_dot_p.def_impl(plain)
rows_dot_p.def_abstract_eval(lambda x, w: jax.core.ShapedArray((w.shape[0], x.shape[0]), x.dtype))
ad.defbilinear(rows_dot_p, lambda d, x, w: d.T @ w, lambda d, x, w: d @ x)
mlir.register_lowering(rows_dot_p, mlir.lower_fun(plain, multiple_results=False))

ROW = Row(
    "rows_dot",
    "product",
    weights=(0, 1),
    contracted=lambda eqn, k: [1],
    lies=lambda eqn, k: {0: 1 - k},
    reduced=lambda eqn, k: [1],
)


def network(dot):
    """Three layers, the weight on the right, on the left, and on the right again, with the batch in the second axis."""

    def net(p, x):
        h = jnp.tanh(dot(x, p["a"]) + p["bias"][:, None])
        h = jnp.tanh(dot(p["b"], h.T))  # [batch, features]
        return dot(h, p["c"]).T

    return net


def draw(**shapes):
    return {n: 0.5 * jax.random.normal(jax.random.fold_in(KEY, i), s) for i, (n, s) in enumerate(shapes.items())}


@pytest.fixture
def case():
    with jax.enable_x64(True):
        yield draw(a=(6, 4), bias=(6,), b=(7, 6), c=(3, 7)), jax.random.normal(KEY, (5, 4))


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(operations.ROWS, ROW.name, ROW)


def step(dot, rule, params, x):
    def loss(y, t):
        return jnp.sum(t * jnp.sin(y), -1)

    net = network(dot)
    feedback = rule.init(KEY, net, params, x)
    gradients = lrules.value_and_grad(net, loss, rule)(params, feedback, x, jnp.arange(15.0).reshape(5, 3))
    return feedback, gradients[1].params


RULES = {
    "feedback_alignment": FA,
    "direct_feedback_alignment": DFA,
    "backman": lrules.backman(),
    "backman of one norm": lrules.backman("gradient_norm"),
    "kolen_pollack": lrules.kolen_pollack(),
    "updates of each example": lrules.quantize_update(FA, 4),
}


@pytest.mark.parametrize("name", RULES)
def test_a_row_serves_a_new_primitive(name, case, registered):
    """As the same network does that is written by dot_general; the rule differs from backprop."""
    (feedback, grads), (wanted_feedback, wanted) = (step(dot, RULES[name], *case) for dot in (rows_dot, plain))
    bridge.close(feedback, wanted_feedback, 0)
    bridge.close(grads, wanted, 1e-10)
    _, true = step(plain, lrules.backprop(), *case)
    assert not np.allclose(grads["a"], true["a"], rtol=0.01)


def test_all_else_asks_the_row_too(case, registered):
    params, x = case
    (first, second) = (network(dot) for dot in (rows_dot, plain))
    described = [lrules.describe(net, DFA, params, x).layers for net in (first, second)]
    assert [row["layer"] for row in described[0]] == ["a", "b", "c"] == [row["layer"] for row in described[1]]
    assert str(lrules.audit(first, FA, params, x)) == str(lrules.audit(second, FA, params, x))
    norms = {name: np.linalg.norm(params[name], 2) for name in "abc"}
    bridge.close(spectral_norms(first, params, x, iterations=400), norms, 1e-6)


def test_a_primitive_without_a_row_is_refused_by_name(case):
    for rule in (FA, DFA, lrules.backman()):
        with pytest.raises(NotImplementedError, match="'a' meets data in the primitive 'rows_dot'"):
            step(rows_dot, rule, *case)


# ---------------------------------------------------------------------------------------------------------- the table


def test_every_row_is_a_primitive_of_jax():
    """A name that is misspelt would be a row that nobody asks."""
    assert sparse.bcoo_dot_general_p.name  # imported, so that its primitives are there
    modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "jax"]
    known = {o.name for module in modules for o in vars(module).values() if isinstance(o, Primitive)}
    later = {"stack", "log2", "one_minus_square", "polynomial", "relayout"}  # than the oldest version that is supported
    assert set(operations.ROWS) - known - set(CALLS) - CONSTRUCTS <= later
    assert len(operations.ROWS) == len(operations.TABLE)


def strings(nodes):
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def compared(node):
    """The strings that an expression compares something with, but for the facts of a row, or collects."""
    if isinstance(node, ast.Compare):
        if isinstance(node.left, ast.Attribute) and node.left.attr in ("kind", "curve", "combines"):
            return set()
        sides = [node.left, *node.comparators]
        return strings(sides).union(*(strings(getattr(side, "elts", ())) for side in sides))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
        return strings(node.args).union(*(strings(getattr(arg, "elts", ())) for arg in node.args))
    collected = strings(node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", ()))
    return collected if len(collected) > 1 and collected <= set(operations.ROWS) else set()


def test_no_other_file_knows_names():
    """What a primitive does stands in its row: a second place would be forgotten when the first changes."""
    root = pathlib.Path(lrules.__file__).parent
    names = set(operations.ROWS) - set(CALLS) - CONSTRUCTS
    # recomputed.py evaluates initializers, not networks.
    table = {root / "engine" / name for name in ("operations.py", "jaxprs.py", "recomputed.py")}
    found = []
    for path in sorted({*root.rglob("*.py")} - table):
        text = path.read_text()
        if ".primitive.name" in text:
            found.append(f"{path.name}: primitive.name")
        for node in ast.walk(ast.parse(text)):
            found += [f"{path.name}:{node.lineno}: {name!r}" for name in compared(node) & names]
    assert not found


# ------------------------------------------------------------------------------------------------ where the axes lie


def axes_kept(eqn, operands, k):
    """`{axis: axis of the result}`: along these axes, an element of operand k changes the result at its own place."""
    before = np.asarray(bind(eqn, operands)[0])
    reached = []
    for i in np.ndindex(operands[k].shape):
        changed = [v.at[i].add(1) if j == k else v for j, v in enumerate(operands)]
        reached += [(i, o) for o in np.argwhere(before != np.asarray(bind(eqn, changed)[0]))]
    assert reached
    axes = [(a, b) for a in range(operands[k].ndim) for b in range(before.ndim)]
    fitting = [(a, b) for a, b in axes if operands[k].shape[a] == before.shape[b]]
    return {a: b for a, b in fitting if all(i[a] == o[b] for i, o in reached)}


def numbers(*shape):
    return jnp.asarray(np.random.default_rng(0).uniform(size=shape), jnp.float32)


def convolved(**options):
    return lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", **options)


ROWS_OF = lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,))
COLUMNS_OF = lax.GatherDimensionNumbers(offset_dims=(0,), collapsed_slice_dims=(1,), start_index_map=(1,))
PLACES = jnp.array([[1], [3], [0]])

# The primitive, a function with it, its operands, and for each operand the axes that lie in the result, but not along
# the places of the operand: there it is cut, shifted, or added up with what came before.
AXES = {
    "dot_general": ("dot_general", lambda x, w: x @ w, (numbers(5, 3), numbers(3, 4)), ({}, {})),
    "members": (
        "dot_general", lambda x, w: jnp.einsum("bij,bkj->bik", x, w), (numbers(2, 5, 3), numbers(2, 4, 3)), ({}, {}),
    ),
    "ragged": ("ragged_dot_general", lax.ragged_dot,
               (numbers(6, 4), numbers(3, 4, 5), jnp.array([1, 2, 3])), ({}, {}, {})),
    "convolution": ("conv_general_dilated", convolved(), (numbers(2, 3, 5, 6), numbers(4, 3, 3, 3)), ({}, {})),
    "channels last": (
        "conv_general_dilated", convolved(dimension_numbers=("NHWC", "HWIO", "NHWC")),
        (numbers(2, 5, 6, 3), numbers(3, 3, 3, 4)), ({}, {}),
    ),
    "rows": ("gather", lambda x, i: lax.gather(x, i, ROWS_OF, (1, 4)), (numbers(6, 4), PLACES), ({}, {})),
    "columns": ("gather", lambda x, i: lax.gather(x, i, COLUMNS_OF, (6, 1)), (numbers(6, 5), PLACES), ({}, {})),
    "one row": ("dynamic_slice", lambda x: lax.dynamic_slice(x, (2, 0), (1, 3)), (numbers(5, 3),), ({},)),
    "broadcast": ("broadcast_in_dim", lambda x: jnp.broadcast_to(x, (2, 5, 3)), (numbers(5, 3),), ({},)),
    "concatenate": (
        "concatenate", lambda x, y: lax.concatenate([x, y], 1), (numbers(5, 3), numbers(5, 2)), ({1: 1}, {1: 1}),
    ),
    "pad": ("pad", lambda x: lax.pad(x, 0.0, ((0, 0, 0), (1, 2, 0))), (numbers(5, 3),), ({1: 1},)),
    "slice": ("slice", lambda x: lax.slice(x, (1, 0), (4, 6)), (numbers(5, 6),), ({0: 0},)),
    "sum": ("reduce_sum", lambda x: x.sum(1), (numbers(5, 3, 2),), ({},)),
    "maximum": ("reduce_max", lambda x: x.max((0, 2)), (numbers(5, 3, 2),), ({},)),
    "argmax": ("argmax", lambda x: jnp.argmax(x, 1), (numbers(5, 3, 2),), ({},)),
    "cumsum": ("cumsum", lambda x: lax.cumsum(x, 1), (numbers(5, 3),), ({1: 1},)),
    "window": (
        "reduce_window_sum", lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2), (1, 1), "SAME"), (numbers(5, 3),),
        ({1: 1},),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AXES)
def test_axes_lie_where_the_row_says(name):
    """What the row says of an equation is what changes in its result when one element of an operand changes."""
    primitive, function, operands, others = AXES[name]
    (eqn,) = [e for e in jax.make_jaxpr(function)(*operands).jaxpr.eqns if e.primitive.name == primitive]
    operands += tuple(v.val for v in eqn.invars[len(operands) :])  # numbers in the function itself
    row = operations.of(eqn)
    for k, other in enumerate(others):
        lies, contracted = dict(row.lies(eqn, k)), set(row.contracted(eqn, k))
        kept = axes_kept(eqn, operands, k)
        assert {i: o for i, o in lies.items() if i not in contracted} == kept | other
        if row.kind == "product" and k < 2:  # each axis is said to be something
            assert {*lies, *contracted, *row.members(eqn, k)} == set(range(operands[k].ndim))
        if row.kind in ("reduction", "cumulative", "window"):
            assert set(row.reduced(eqn, k)) == set(range(operands[k].ndim)) - set(kept)


@pytest.mark.parametrize(
    ("name", "k", "contracted", "members", "window"),
    [
        ("dot_general", 1, [0], [], []),
        ("members", 1, [2], [0], []),
        ("ragged", 1, [1], [0], []),
        ("convolution", 1, [1, 2, 3], [], [2, 3]),
        ("channels last", 1, [0, 1, 2], [], [0, 1]),
        ("rows", 0, [0], [], []),
        ("columns", 0, [1], [], []),
        ("one row", 0, [0], [], []),
        ("convolution", 0, [1, 2, 3], [], []),
        ("rows", 1, [], [], []),
    ],
)
def test_axes_of_a_weight(name, k, contracted, members, window):
    """The axes over which the weight is summed or chosen, those of separate matrices, and those of a window."""
    primitive, function, operands, _ = AXES[name]
    (eqn,) = [e for e in jax.make_jaxpr(function)(*operands).jaxpr.eqns if e.primitive.name == primitive]
    row = operations.of(eqn)
    assert (list(row.contracted(eqn, k)), list(row.members(eqn, k))) == (contracted, members)
    assert list(row.window(eqn, k)) == window
    assert row.free(eqn, k) == frozenset(row.lies(eqn, k)) - set(members)


VIEWS = {
    "reshape, merged": (lambda x: x.reshape(6, 4), (2, 3, 4), [(0, 1), (2,)]),
    "reshape, split": (lambda x: x.reshape(2, 3, 4), (6, 4), [(0,), (0,), (1,)]),
    "transpose": (lambda x: x.transpose(1, 2, 0), (2, 3, 4), [(1,), (2,), (0,)]),
    "squeeze": (lambda x: lax.squeeze(x, [1]), (2, 1, 4), [(0,), (2,)]),
    "expand": (lambda x: lax.broadcast_in_dim(x, (2, 1, 4), (0, 2)), (2, 4), [(0,), (), (1,)]),
    "broadcast": (lambda x: lax.broadcast_in_dim(x, (2, 3, 4), (0, 2)), (2, 4), None),
    "cast": (lambda x: x.astype(jnp.bfloat16), (2, 4), [(0,), (1,)]),
    "product": (lambda x: x * x, (2, 4), None),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_hold_the_axes_that_the_row_says(name):
    """For each axis of the result, the axes of the operand in it; None where elements are added or changed."""
    function, shape, axes = VIEWS[name]
    (eqn,) = jax.make_jaxpr(function)(numbers(*shape)).jaxpr.eqns
    assert view_axes(eqn, shape) == axes
