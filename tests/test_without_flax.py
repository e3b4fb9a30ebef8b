"""`import lrules` takes JAX alone: bare functions and Equinox models train, and the adapters say what to install."""

import subprocess
import sys

BLOCKED = """
import importlib.abc
import sys


class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"flax", "optax", "chex", "orbax"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocked())
"""

BARE = """
import jax, jax.numpy as jnp, lrules


def mlp(params, x):
    return jnp.tanh(x @ params["first"]) @ params["last"]


params = {"first": jax.random.normal(jax.random.key(0), (4, 8)), "last": jax.random.normal(jax.random.key(1), (8, 3))}
x, y = jnp.ones((5, 4)), jnp.zeros((5, 3))
for rule in (lrules.feedback_alignment(), lrules.direct_feedback_alignment(), lrules.dual_propagation()):
    feedback = rule.init(jax.random.key(2), mlp, params, x)
    step = lrules.value_and_grad(mlp, lambda out, targets: ((out - targets) ** 2).sum(-1), rule)
    _, grads = step(params, feedback, x, y)
    assert float(jnp.abs(grads.params["first"]).max()) > 0
"""

EQUINOX = """
import equinox as eqx, jax, jax.numpy as jnp, lrules

model = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
params, static = eqx.partition(model, eqx.is_inexact_array)
net = lambda params, x: jax.vmap(eqx.combine(params, static))(x)
rule = lrules.feedback_alignment()
feedback = rule.init(jax.random.key(1), net, params, jnp.ones((5, 4)))
grads = jax.grad(lambda p: lrules.transform(net, rule)(p, feedback, jnp.ones((5, 4))).sum())(params)
assert float(jnp.abs(grads.layers[0].weight).max()) > 0
"""

REFUSED = """
import lrules

for adapter in (lrules.from_nnx, lambda model: lrules.from_linen(model, {"params": {}})):
    try:
        adapter(object())
    except ImportError as error:
        print(error)
"""

UNTOUCHED = """
import sys
import lrules

print(sorted({"flax", "optax", "chex", "orbax"} & {name.partition(".")[0] for name in sys.modules}))
"""


def run(*scripts):
    done = subprocess.run([sys.executable, "-c", "\n".join(scripts)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_bare_functions_and_equinox():
    run(BLOCKED, BARE, EQUINOX)


def test_the_adapters_say_what_to_install():
    assert run(BLOCKED, REFUSED) == [
        "from_nnx needs Flax, which is not installed: pip install flax",
        "from_linen needs Flax, which is not installed: pip install flax",
    ]


def test_importing_takes_jax_alone():
    """What is installed beside is imported by who needs it: it took nearly as long as JAX itself."""
    assert run(UNTOUCHED) == ["[]"]


def test_a_broken_flax_is_told_apart():
    """What Flax itself lacks is not reported as Flax missing."""
    broken = BLOCKED.replace('{"flax", "optax", "chex", "orbax"}', '{"msgpack"}')
    assert run(broken, REFUSED) == ["No module named 'msgpack'"] * 2
