"""The table of primitives: one row serves a new one everywhere, and no other file knows their names."""

import ast
import gc
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

import lrules
from lrules.diagnostics import spectral_norms
from lrules.engine import operations
from lrules.engine.jaxprs import CALLS, CONSTRUCTS
from lrules.engine.operations import Row
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
    known = {o.name for o in gc.get_objects() if isinstance(o, Primitive)}
    later = {"stack"}  # than the oldest version that is supported
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
    table = {root / "engine" / name for name in ("operations.py", "jaxprs.py")}
    found = []
    for path in sorted({*root.rglob("*.py")} - table):
        text = path.read_text()
        if ".primitive.name" in text:
            found.append(f"{path.name}: primitive.name")
        for node in ast.walk(ast.parse(text)):
            found += [f"{path.name}:{node.lineno}: {name!r}" for name in compared(node) & names]
    assert not found
