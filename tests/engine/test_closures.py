"""What functions close over while JAX traces goes in as an argument, and comes back into a copy of the function."""

import dataclasses
import functools
import types

import equinox
import jax
import jax.numpy as jnp
import pytest

from lrules.engine.closures import held


class Module(equinox.Module):
    alpha: jax.Array

    def __call__(self, x):
        return self.alpha * x

    def method(self, x):
        return self.alpha * x


def closure(alpha):
    return lambda x: alpha * x


def nested(alpha):
    inner = closure(alpha)
    return lambda x: inner(x)


def defaults(alpha):
    return lambda x, alpha=alpha: alpha * x


def keyword(alpha):
    def fn(x, *, alpha=alpha):
        return alpha * x

    return fn


def container(alpha):
    values = {"alpha": [alpha, 1.0]}
    return lambda x: values["alpha"][0] * x


def recursive(alpha):
    def fn(x, n=3):
        return alpha * x if n == 0 else fn(x, n - 1)

    return fn


MAKERS = {
    "closure": closure,
    "nested": nested,
    "defaults": defaults,
    "keyword": keyword,
    "container": container,
    "recursive": recursive,
    "partial": lambda alpha: functools.partial(lambda alpha, x: alpha * x, alpha),
    "partial_keyword": lambda alpha: functools.partial(keyword(1.0), alpha=alpha),
    "module": Module,
    "method": lambda alpha: Module(alpha).method,
    "bound": lambda alpha: types.MethodType(lambda own, x: own["alpha"] * x, {"alpha": alpha}),
}


@pytest.mark.parametrize("name", MAKERS)
def test_traced_values_are_found_and_replaced(name):
    def swapped(alpha):
        fn = MAKERS[name](alpha)
        values, remade = held(fn)
        assert [v is alpha for v in values] == [True]
        return fn(1.0), remade([10 * v for v in values])(1.0), fn(1.0)

    with jax.checking_leaks():
        assert jax.tree.map(float, jax.jit(swapped)(3.0)) == (3, 30, 3)
        assert jax.vmap(swapped)(jnp.array([3.0, 4.0]))[1].tolist() == [30, 40]


def test_without_traced_values_the_function_stays_itself():
    for make in MAKERS.values():
        fn = make(jnp.float32(2.0))  # a number that is known is a constant
        values, remade = held(fn)
        assert values == [] and remade([]) is fn


def test_several_functions_share_a_value():
    def swapped(alpha):
        fns = {"a": closure(alpha), "b": (nested(alpha), closure(2 * alpha))}
        values, remade = held(fns)
        assert len(values) == 2
        new = remade([jnp.float32(5.0), jnp.float32(7.0)])
        return new["a"](1.0), new["b"][0](1.0), new["b"][1](1.0)

    assert jax.tree.map(float, jax.jit(swapped)(3.0)) == (5, 5, 7)


def test_what_cannot_be_looked_into_is_left():
    @dataclasses.dataclass
    class Plain:
        alpha: object

        def __call__(self, x):
            return self.alpha * x

    def fn(alpha):
        values, remade = held(Plain(alpha))
        assert values == []
        unfilled = lambda: later  # noqa: E731, F821
        assert held(unfilled)[0] == []
        if alpha is None:
            later = 1  # noqa: F841
        return remade([])(1.0)

    assert float(jax.jit(fn)(3.0)) == 3
