"""Settings of the whole suite: several host devices, and JAX's strictest promotion rules for our own code."""

import os

DEVICES = 4  # of the host's, for the sharding tests

# Before the first import of jax, which reads them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _relaxed_for_foreign_models(request):
    """Models of other libraries rely on JAX's ordinary promotion: tests marked `foreign` run with that."""
    if request.node.get_closest_marker("foreign") is None:
        yield
    else:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield
