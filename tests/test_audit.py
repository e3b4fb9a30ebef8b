"""The audit finds by itself what the analysis overlooks, and prints what it found."""

import jax
import jax.numpy as jnp
import pytest

import lrules
from tests.small import FA, W, X, first, mlp

PARAMS = W | {"w": jnp.ones((6, 6))}


def deep(p, x):
    return mlp(p | {"c": p["w"]}, x) @ p["c"]


@pytest.mark.parametrize("missed", ["b", "w"])
def test_the_audit_is_independent(monkeypatch, missed):
    """Where the analysis overlooks a layer, the audit finds it by itself."""
    lrules.audit(deep, FA, PARAMS, X)
    number = sorted(PARAMS).index(missed)
    find = lrules.engine.analysis.multiplication

    def blind(eqn, ins):
        found = find(eqn, ins)
        return None if found is not None and number in found.sources else found

    monkeypatch.setattr(lrules.engine.analysis, "multiplication", blind)
    with pytest.raises(RuntimeError, match=f"by the value of '{missed}'"):
        lrules.audit(deep, FA, PARAMS, X)


def test_the_audit_prints_a_table():
    params = PARAMS | {"bias": jnp.ones((1, 3)), "unused": jnp.ones((2, 3))}
    rule = lrules.partition({"^b$": lrules.backprop(), ".*": FA})
    report = lrules.audit(lambda p, x: deep(p, x) + p["bias"], rule, params, jax.ShapeDtypeStruct(X.shape, X.dtype))
    routes = {row["parameter"]: row["route"] for row in report.rows}
    assert routes["b"] == "backprop" and routes["bias"] == "bias or scale" and routes["unused"] == "not reached"
    assert [line.split()[0] for line in str(report).splitlines()] == ["parameter", *sorted(params)]


def test_the_audit_refuses_as_the_rule_does():
    params = W | {"m": jnp.ones((3, 6))}
    with pytest.raises(NotImplementedError, match="'m'"):
        lrules.audit(lambda p, x: ((first(p, x)[:, None] - p["m"][None]) ** 2).sum(-1) @ p["c"].T, FA, params, X)
