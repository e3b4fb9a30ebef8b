"""States to save, and a program that saves until it is killed, again and again: `python -m tests.experiments.saving F`.

For each line that it reads, a copy of the process goes on where the one before was killed. It prints its process and
the step where it goes on, then each step as soon as its checkpoint is known to be written, and "killed" at the end.
"""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lrules
from experiments.checkpoints import Checkpoints

DESCRIPTION = {"rule": "backman", "data": {"batch": 64}}
OPTIMIZER = optax.adam(1e-3)


def state_at(step):
    """A state whose every array tells the step, so that one mixed of two steps shows. Nothing is compiled for it."""

    def filled(shape, dtype):
        return jnp.asarray(np.full(shape, step).astype(dtype))

    params = {"w": filled((64, 257), jnp.bfloat16), "b": filled(5, np.float32)}
    return {
        "params": params,
        "optimizer": jax.tree.map(lambda s: filled(s.shape, s.dtype), jax.eval_shape(OPTIMIZER.init, params)),
        "feedback": lrules.Feedback(params, {"w": filled(3, np.float32)}, {"seen": (filled((), np.int32),)}),
        "key": jax.random.wrap_key_data(filled((3, 2), np.uint32)),
        "data": np.arange(256, dtype=np.uint8) ^ np.uint8(step),
        "position": np.int64(step),
    }


def same(a, b):
    """Whether two states are equal, bit for bit, with their structure, dtypes and weak types."""

    def leaf(x, y):
        if jnp.issubdtype(getattr(x, "dtype", np.bool_), jax.dtypes.prng_key):
            if x.dtype != y.dtype:
                return False
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        kinds = [(type(v), getattr(v, "dtype", None), getattr(v, "weak_type", None), np.shape(v)) for v in (x, y)]
        return kinds[0] == kinds[1] and np.asarray(x).tobytes() == np.asarray(y).tobytes()

    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(leaf, a, b))


def shapes(tree):
    """As `jax.eval_shape` gives it, for the arrays of JAX."""
    return jax.tree.map(lambda x: jax.eval_shape(lambda: x) if isinstance(x, jax.Array) else x, tree)


def saved_in(folder, steps=(1, 2, 3), description=DESCRIPTION, **options):
    with Checkpoints(folder, description, **options) as saved:
        for step in steps:
            saved.save(step, state_at(step), {"step": step}, metric=-step)


def restored(folder, description=DESCRIPTION, like=None):
    with Checkpoints(folder, description) as saved:
        return saved.restore(shapes(state_at(0)) if like is None else like)


def found_steps(folder):
    return sorted(int(name) for name in os.listdir(folder) if name.isdecimal())


def main(folder):
    with Checkpoints(folder, DESCRIPTION, best="max") as saved:
        found = saved.restore(state_at(0))
        step = start = 0 if found is None else found.step
        assert found is None or same(found.state, state_at(step))
        print("process", os.getpid(), "from", step, flush=True)
        while True:
            step += 1
            saved.save(step, state_at(step), {"step": step, "curve": [float("nan"), step]}, metric=-step)
            if step > start + 1:
                print(step - 1, flush=True)  # a save waits for the one before


if __name__ == "__main__":
    for _ in sys.stdin:
        child = os.fork()  # no device is touched before: JAX has no threads yet
        if not child:
            main(sys.argv[1])
        os.waitpid(child, 0)
        print("killed", flush=True)
