"""Gradients on a GPU are those of the CPU: `JAX_PLATFORMS=cuda,cpu pytest -m gpu tests/test_gpu.py`, where one is."""

import jax
import pytest

from experiments import rules
from experiments.gpu import correctness

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=correctness.MODELS)
def comparison(request):
    if jax.default_backend() != "gpu":
        pytest.skip("JAX finds no GPU here (tests take the CPU unless JAX_PLATFORMS is set)")
    return request.param, correctness.Comparison(request.param, jax.devices()[0], tiny=True)


def test_gradients_are_those_of_the_cpu(comparison):
    model, compare = comparison
    errors = {name: compare.of_rule(rules.parse(name))() for name in correctness.names(model)}
    assert not {name: error for name, error in errors.items() if not error <= correctness.tolerance(name)}


def test_ten_seeds_at_once_are_ten_alone(comparison):
    _, compare = comparison
    errors = {name: compare.of_seeds(rules.parse(name))() for name in correctness.SEEDED}
    assert not {name: error for name, error in errors.items() if not error <= correctness.TOLERANCE}
