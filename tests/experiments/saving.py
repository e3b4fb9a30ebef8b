"""A program that saves checkpoints until it is killed, again and again: `python -m tests.experiments.saving FOLDER`.

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
    """A state whose every array tells the step, so that one mixed of two steps shows."""
    params = {"w": jnp.full((64, 257), step, jnp.bfloat16), "b": jnp.arange(5.0) + step}
    feedback = lrules.Feedback({"w": params["w"] + 1}, {"w": params["b"] + 2}, {"seen": (jnp.asarray(step),)})
    return {
        "params": params,
        "optimizer": jax.tree.map(lambda leaf: leaf + jnp.asarray(step, leaf.dtype), OPTIMIZER.init(params)),
        "feedback": feedback,
        "key": jax.random.split(jax.random.key(step), 3),
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


def main(folder):
    with Checkpoints(folder, DESCRIPTION, best="max") as saved:
        found = saved.restore(state_at(0))
        step = 0 if found is None else found.step
        assert found is None or same(found.state, state_at(step))
        print("process", os.getpid(), "from", step, flush=True)
        while True:
            step += 1
            saved.save(step, state_at(step), {"step": step, "curve": [float("nan"), step]}, metric=-step)
            if step > 1:
                print(step - 1, flush=True)  # a save waits for the one before


if __name__ == "__main__":
    for _ in sys.stdin:
        child = os.fork()  # no device is touched before: JAX has no threads yet
        if not child:
            main(sys.argv[1])
        os.waitpid(child, 0)
        print("killed", flush=True)
