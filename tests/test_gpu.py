"""Gradients on a GPU are those of the CPU: `JAX_PLATFORMS=cuda,cpu pytest -m gpu tests/test_gpu.py`, where one is."""

import jax
import pytest

from experiments import rules
from experiments.gpu import correctness

pytestmark = pytest.mark.gpu


@pytest.fixture
def device():
    if jax.default_backend() != "gpu":
        pytest.skip("JAX finds no GPU here (tests take the CPU unless JAX_PLATFORMS is set)")
    return jax.devices()[0]


@pytest.mark.parametrize("model", correctness.MODELS)
def test_gradients_are_those_of_the_cpu(model, device):
    for name in correctness.names(model):
        assert correctness.of_rule(model, name, device) <= correctness.TOLERANCE, name


@pytest.mark.parametrize("model", correctness.MODELS)
def test_ten_seeds_at_once_are_ten_alone(model, device):
    for name in rules.select(correctness.SEEDED):
        assert correctness.of_seeds(model, name, device) <= correctness.TOLERANCE, name
