"""A small language model under direct feedback, shared along time: characters of this repository's own text."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrules

ROOT = pathlib.Path(__file__).parent.parent
WIDTH, TIME, BATCH, STEPS = 32, 24, 16, 150


@pytest.fixture(scope="module")
def text():
    """The library's sources as numbers, and how many characters there are."""
    joined = "".join(path.read_text() for path in sorted((ROOT / "lrules").glob("*.py")))
    characters, numbers = np.unique(list(joined), return_inverse=True)
    return numbers.astype(np.int32), len(characters)


def parameters(key, vocabulary):
    shapes = {"embed": (vocabulary, WIDTH), "one": (4 * WIDTH, WIDTH), "two": (4 * WIDTH, WIDTH)}
    shapes["out"] = (WIDTH, vocabulary)
    keys = dict(zip(shapes, jax.random.split(key, 4), strict=True))
    return {k: jax.random.normal(keys[k], s) / s[0] ** 0.5 for k, s in shapes.items()}


def apply(p, tokens):
    """Two causal layers, four characters wide, and a skip connection: [batch, time] -> [batch, time, characters]."""

    def causal(h, w):
        padded = jnp.pad(h, ((0, 0), (3, 0), (0, 0)))
        return jnp.concatenate([padded[:, i : i + TIME] for i in range(4)], axis=-1) @ w

    h = p["embed"][tokens] * len(p["embed"]) ** 0.5
    h = jnp.tanh(causal(h, p["one"]))
    h = h + jnp.tanh(causal(h, p["two"]))
    return h @ p["out"]


def train(rule, text, vocabulary):
    """The mean loss of the last steps, in nats per character."""
    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(text) - TIME - 1, size=(STEPS, BATCH))
    windows = jnp.asarray(text[starts[..., None] + np.arange(TIME + 1)])
    params, optimizer = parameters(jax.random.key(0), vocabulary), optax.adam(3e-3)
    feedback = rule.init(jax.random.key(1), apply, params, windows[0, :, :-1])
    step = lrules.value_and_grad(apply, optax.softmax_cross_entropy_with_integer_labels, rule)

    def update(carry, window):
        params, state = carry
        (value, _), grads = step(params, feedback, window[:, :-1], window[:, 1:])
        updates, state = optimizer.update(grads.params, state)
        return (optax.apply_updates(params, updates), state), value

    _, losses = jax.jit(lambda carry: jax.lax.scan(update, carry, windows))((params, optimizer.init(params)))
    return float(losses[-20:].mean()), feedback


@pytest.mark.foreign
def test_direct_feedback_trains_hidden_layers(text):
    """Better than the last layer alone, the feedback as small as the width times the characters."""
    numbers, vocabulary = text
    direct, feedback = train(lrules.direct_feedback_alignment(shared_axes=1), numbers, vocabulary)
    sizes = {"one": 4 * WIDTH, "two": 4 * WIDTH, "out": WIDTH}
    assert {k: b.shape for k, b in feedback.fixed.items()} == {k: (vocabulary, n) for k, n in sizes.items()}
    low_rank, _ = train(lrules.direct_feedback_alignment(shared_axes=1, rank=16), numbers, vocabulary)
    last, _ = train(lrules.last_layer_only(), numbers, vocabulary)
    print(f"nats per character: direct {direct:.3f}, rank 16 {low_rank:.3f}, last layer only {last:.3f}")
    assert direct < last - 0.1 and low_rank < last - 0.05
