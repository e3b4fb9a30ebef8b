"""What tests of rules can ask for."""

import jax
import pytest


@pytest.fixture
def double_precision():
    """float64 in the library, as the references have it."""
    with jax.enable_x64(True):
        yield
