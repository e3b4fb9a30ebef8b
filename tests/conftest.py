"""Settings of the whole suite: several host devices, quick compilation, and JAX's strictest promotion for our own code.

What is set in the environment already stays as it is: `XLA_FLAGS="--xla_backend_optimization_level=3
--xla_cpu_use_fusion_emitters=1" make test` runs everything as users do.
"""

import functools
import gc
import os
import pathlib
from importlib import metadata

ROOT = pathlib.Path(__file__).resolve().parent.parent

# All before the first import of jax, which reads them; programs that tests start inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = {
    "xla_force_host_platform_device_count": 4,  # for the sharding tests
    "xla_backend_optimization_level": 0,  # the suite compiles far more than it computes: a third of the time
}
if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # later ones know no such flags, and abort
    FLAGS["xla_cpu_use_fusion_emitters"] = 0  # the older emitters compile in two thirds of the time
    FLAGS["xla_cpu_parallel_codegen_split_count"] = 1  # one module a program, in two thirds of the time again
given = os.environ.get("XLA_FLAGS", "")
added = [f"--{name}={value}" for name, value in FLAGS.items() if name not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()

# What is compiled is kept for the next run, for each worker by itself, as jax does not write its cache atomically.
# (Workers inherit what the process that starts them has set here.)
caches, worker = ROOT / ".pytest_cache" / "jax", os.environ.get("PYTEST_XDIST_WORKER", "main")
if os.environ.get("JAX_COMPILATION_CACHE_DIR", str(caches / "main")) == str(caches / "main"):
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(caches / worker)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples on every run, so that a failure is the change's; compilation would miss any deadline. Few, as each
# may be a network of its own to compile: `--hypothesis-profile=thorough` takes the other profile.
hypothesis.settings.register_profile("lrules", deadline=None, derandomize=True, max_examples=6)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=60)
hypothesis.settings.load_profile("lrules")

# JAX makes an MLIR context for each program, and loads every dialect into it: the half of the time to lower a small
# one. The programs of a test file share one context, but for those that are lowered while another is.
own_context = getattr(mlir, "make_ir_context", None)  # it is not of JAX's public interface, and may go
shared_context = functools.cache(own_context or (lambda: None))
if own_context:
    mlir.make_ir_context = lambda: shared_context() if mlir.ir.Context.current is None else own_context()
gc.set_threshold(10_000, 20, 20)  # the tests keep millions of objects, and a full collection looks at each


@pytest.fixture(autouse=True, scope="module")
def _after_each_file():
    """A new context, as one keeps the constants of its programs; what is left of the file is not collected again."""
    yield
    shared_context.cache_clear()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _relaxed_for_foreign_models(request):
    """Models of other libraries rely on JAX's ordinary promotion: tests marked `foreign` run with that."""
    if request.node.get_closest_marker("foreign") is None:
        yield
    else:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield
