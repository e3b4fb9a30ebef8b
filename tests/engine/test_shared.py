"""Pieces of programs that are traced once: what counts as the same, and how many are kept."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lrules
from lrules.engine import shared
from lrules.engine.shared import Pieces, equation_key

X = jnp.ones((4, 3))


def equation(fn, *args):
    """The last equation of a function's program."""
    return jax.make_jaxpr(fn)(*args).eqns[-1]


def test_equal_equations_have_equal_keys():
    assert equation_key(equation(jnp.tanh, X)) == equation_key(equation(lambda x: jnp.tanh(x), X))
    assert equation_key(equation(jax.nn.relu, X)) == equation_key(equation(jax.nn.relu, X)) is not None


@pytest.mark.parametrize(
    "other",
    [
        equation(jnp.sin, X),
        equation(jnp.tanh, X[:2]),
        equation(jnp.tanh, X.astype(jnp.bfloat16)),
        equation(lambda x: lax.reduce_precision(x, 8, 7), X),
    ],
)
def test_others_have_other_keys(other):
    assert equation_key(equation(jnp.tanh, X)) != equation_key(other)


def test_parameters_of_an_equation_tell():
    first, second = (equation(lambda x, n=n: lax.integer_pow(x, n), X) for n in (3, 4))
    assert equation_key(first) != equation_key(second)


def test_what_does_more_than_compute_is_not_shared():
    assert equation_key(equation(lambda x: jax.debug.callback(lambda: None), X)) is None


def test_a_function_with_a_derivative_of_its_own_is_not_shared():
    @jax.custom_jvp
    def bent(x):
        return jnp.sin(x)

    bent.defjvp(lambda primals, tangents: (bent(*primals), 2 * tangents[0]))
    assert equation_key(equation(bent, X)) is None


def test_an_equation_whose_parameters_cannot_be_compared_is_not_shared():
    eqn = equation(jnp.tanh, X)
    odd = eqn.replace(params={**eqn.params, "table": np.zeros(2)})
    assert equation_key(odd) is None


def test_kept_pieces():
    pieces, made = Pieces(), []

    def make(name):
        made.append(name)
        return lambda x: x + 1

    first = pieces.shared("a", lambda: make("a"))
    assert pieces.shared("a", lambda: make("again")) is first and made == ["a"]
    assert float(first(1.0)) == 2


def test_so_many_are_kept_the_latest_used(monkeypatch):
    monkeypatch.setattr(shared, "MOST", 2)
    pieces = Pieces()
    kept = {name: pieces.shared(name, lambda: lambda x: x) for name in "ab"}
    assert pieces.shared("a", lambda: lambda x: x) is kept["a"]  # used again, so that b is the oldest
    pieces.shared("c", lambda: lambda x: x)
    assert pieces.shared("a", lambda: lambda x: x) is kept["a"]
    assert pieces.shared("b", lambda: lambda x: x) is not kept["b"]


def test_many_threads_get_one_piece():
    pieces, found = Pieces(), []
    threads = [threading.Thread(target=lambda: found.append(pieces.shared("a", lambda: lambda x: x))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(piece) for piece in found}) == 1


def test_literals_tell_pieces_apart():
    """Two layers whose equations between differ in a number alone."""

    def apply(p, x):
        h = jnp.tanh(0.75 - x @ p["a"]) * 0.5
        h = jnp.tanh(0.75 - h @ p["b"]) * 0.25
        return h @ p["c"]

    params = {name: jax.random.normal(jax.random.key(i), (3, 3)) for i, name in enumerate("abc")}
    f = lrules.transform(apply, lrules.sequential(lambda op, w, b, x, d, layer: (*jax.vjp(op, w, x)[1](d), None)))
    got = jax.jit(jax.grad(lambda p: (f(p, lrules.Feedback({}, {}), X) ** 2).sum()))(params)  # eager: no pieces
    wanted = jax.grad(lambda p: (apply(p, X) ** 2).sum())(params)
    for name in params:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, atol=1e-6)
