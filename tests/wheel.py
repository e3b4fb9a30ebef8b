"""What a user does first, with the wheel and what it declares to need alone: `make wheel-test` runs it, not pytest.

    python -I tests/wheel.py         # in an environment that has the wheel alone
    python -I tests/wheel.py docs    # in one that has the wheel with this extra
"""  # fmt: skip

import importlib.metadata
import pathlib
import re
import sys
import sysconfig

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lrules


def mlp(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def loss(y, t):
    return jnp.sum((y - t) ** 2, -1)


def losses(net, params, inputs, targets, steps=3):
    """The losses of some steps of feedback alignment."""
    rule, optimizer, found = lrules.feedback_alignment(), optax.sgd(0.05), []
    feedback, state = rule.init(jax.random.key(0), net, params, inputs), optimizer.init(params)
    step = jax.jit(lrules.value_and_grad(net, loss, rule))
    for _ in range(steps):
        (value, _), grads = step(params, feedback, inputs, targets)
        updates, state = optimizer.update(grads.params, state)
        params = optax.apply_updates(params, updates)
        found.append(float(value))
    return found


class Model(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.b(jnp.tanh(self.a(x)))


def needed(extra=None):
    """What the wheel declares to need: always, or for an extra."""
    found = set()
    for line in importlib.metadata.requires("lrules"):
        need, _, marker = line.partition(";")
        (of,) = re.findall("extra == ['\"](.+?)['\"]", marker) or [None]
        if of == extra:
            found.add(re.match(r"[\w.-]+", need)[0])
    return found


installed = pathlib.Path(lrules.__file__).parent
assert installed == pathlib.Path(sysconfig.get_path("purelib"), "lrules"), f"this is {installed}, not the wheel"
assert (installed / "py.typed").exists(), "py.typed is missing in the wheel: type checkers would ignore its types"
assert importlib.metadata.version("lrules") == lrules.__version__
assert not {"tests", "experiments"} & {path.name for path in installed.parent.iterdir()}

assert needed() == {"jax", "flax", "optax"}, f"the library needs {sorted(needed())}"
present = {re.sub("[-_.]+", "-", found.name).lower() for found in importlib.metadata.distributions()}
extras = sys.argv[1:]
for extra in extras:
    assert needed(extra), f"the wheel has no extra {extra}"
    missing = {re.sub("[-_.]+", "-", name).lower() for name in needed(extra)} - present
    assert not missing, f"the extra {extra} did not bring {sorted(missing)}"
if not extras:  # a library that brings these with it takes long to install, and meets other versions
    heavy = present & {"matplotlib", "pandas", "scikit-learn", "tensorboardx", "tensorflow-datasets", "torch"}
    assert not heavy, f"the library brings {sorted(heavy)}"

x = jax.random.normal(jax.random.key(1), (16, 3))
t = jnp.stack([x[:, 0], x[:, 1] - x[:, 2]], -1)
weights = {"a": jax.random.normal(jax.random.key(2), (3, 8)) / 2, "b": jax.random.normal(jax.random.key(3), (8, 2)) / 3}
for net, params in ((mlp, weights), lrules.from_nnx(Model(nnx.Rngs(0)))):
    first, *_, last = losses(net, params, x, t)
    assert last < first, "feedback alignment does not learn"
print(f"lrules {lrules.__version__}: the wheel works with {' and '.join(extras) or 'no extra'}")
