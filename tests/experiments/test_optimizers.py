"""Optimizers and schedules by name: against optax written out, and AdamW's decay by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import optimizers
from experiments.config import Config
from experiments.errors import InputError

pytestmark = pytest.mark.foreign  # optax's Adam mixes integers and floats
PARAMS = {"w": jnp.full((2, 2), 2.0), "b": jnp.full(2, 3.0)}


def moves(config, grads=None, steps=1, per_epoch=10, **rates):
    """The parameters after some steps of one gradient."""
    optimizer = optimizers.make(config, per_epoch, **rates).params
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(steps):
        updates, state = optimizer.update(grads or jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    return params


def rates(schedule, epochs=10, per_epoch=10):
    """The learning rate of each step of a training with the peak 1, as SGD shows it."""
    config = Config(optimizer="sgd", learning_rate=1.0, schedule=schedule, epochs=epochs)
    optimizer = optimizers.make(config, per_epoch).params
    state, found = optimizer.init(jnp.zeros(())), []
    for _ in range(epochs * per_epoch):
        update, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
        found.append(-float(update))
    return np.array(found)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("sgd", optax.sgd(0.1)),
        ("momentum", optax.sgd(0.1, momentum=0.9)),
        ("sgd(momentum=0.5, nesterov=True)", optax.sgd(0.1, momentum=0.5, nesterov=True)),
        ("adam(b1=0.5)", optax.adam(0.1, b1=0.5)),
        ("rmsprop", optax.rmsprop(0.1)),
        ("lion", optax.lion(0.1, mask=lambda p: jax.tree.map(lambda a: a.ndim > 1, p))),
    ],
)
def test_they_are_those_of_optax(text, plain):
    ours = moves(Config(optimizer=text, learning_rate=0.1, schedule="constant"), steps=3)
    params, state = PARAMS, plain.init(PARAMS)
    for _ in range(3):
        updates, state = plain.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, params)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "sgd(momentum=0.9)", "lion"])
def test_decay_is_decoupled_and_leaves_biases_alone(optimizer):
    """Without a gradient a weight shrinks by rate x decay, once, whatever the optimizer."""
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    config = Config(optimizer=optimizer, learning_rate=0.1, schedule="constant", weight_decay=0.01)
    moved = moves(config, zero)
    np.testing.assert_allclose(moved["w"], 2 * (1 - 0.1 * 0.01), rtol=1e-6)
    assert (moved["b"] == 3).all()
    np.testing.assert_allclose(moves(config.replace(decay_all=True), zero)["b"], 3 * (1 - 0.1 * 0.01), rtol=1e-6)


def test_coupled_decay_is_part_of_the_gradient():
    """Adam's first step is the rate times the sign, however small the decay is."""
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    config = Config(learning_rate=0.1, schedule="constant", weight_decay=0.01, coupled_decay=True)
    np.testing.assert_allclose(moves(config, zero)["w"], 1.9, rtol=1e-5)
    np.testing.assert_allclose(moves(config.replace(optimizer="adamw"), zero)["w"], 1.9, rtol=1e-5)


def test_optax_s_own_decay_stays_where_none_is_given():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    moved = moves(Config(optimizer="adamw", learning_rate=0.1, schedule="constant"), zero)
    np.testing.assert_allclose(moved["w"], 2 * (1 - 0.1 * 1e-4), rtol=1e-6)


def test_clipping_bounds_the_global_norm():
    moved = moves(Config(optimizer="sgd", learning_rate=1.0, schedule="constant", clip=0.5))
    change = jnp.concatenate([(moved[k] - PARAMS[k]).ravel() for k in PARAMS])
    assert float(jnp.linalg.norm(change)) == pytest.approx(0.5, rel=1e-5)


def test_schedules():
    assert (rates("constant") == 1).all()
    assert rates("cosine")[0] == 1 and rates("cosine")[50] == pytest.approx(0.5)
    warm = rates("cosine(warmup=2, start=0.1, end=0.01, flat=3)")
    np.testing.assert_allclose(warm[:20], np.linspace(0.1, 1, 21)[:20], rtol=1e-5)
    assert warm[20] == 1 and warm[45] == pytest.approx((1 + 0.01) / 2, rel=1e-4)
    np.testing.assert_allclose(warm[70:], 0.01, rtol=1e-5)
    np.testing.assert_allclose(rates("halfway"), [1] * 50 + [0.1] * 50, rtol=1e-6)
    np.testing.assert_allclose(rates("step(epochs=[2, 4], factor=0.5)"), [1] * 20 + [0.5] * 20 + [0.25] * 60)
    np.testing.assert_allclose(rates("linear"), 1 - np.arange(100) / 100, atol=1e-6)
    np.testing.assert_allclose(rates("exponential(factor=0.9)"), 0.9 ** np.arange(100), rtol=1e-4)


def test_feedback_keeps_its_rate_through_the_warm_up():
    config = Config(
        optimizer="sgd", learning_rate=1.0, schedule="linear", epochs=2, warmup_epochs=1, feedback_learning_rate=0.5
    )
    optimizer = optimizers.make(config, 10).feedback
    state, found = optimizer.init(jnp.zeros(())), []
    for _ in range(30):
        update, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
        found.append(-float(update))
    np.testing.assert_allclose(found, [0.5] * 10 + list(0.5 * (1 - np.arange(20) / 20)), rtol=1e-5)


def test_every_optimizer_that_is_offered_can_make_a_step():
    for name in optimizers.names():
        optimizers.make(Config(optimizer=name, weight_decay=0.1), 10)


def test_rates_and_decay_may_be_traced():
    config = Config(optimizer="sgd", schedule="cosine(warmup=1)", weight_decay=0.5, learning_rate=7.0)

    def after(rate, decay):
        return moves(config, steps=12, learning_rate=rate, weight_decay=decay)["w"][0, 0]

    found = jax.jit(jax.vmap(after))(jnp.array([0.1, 0.2]), jnp.array([0.0, 0.1]))
    for rate, decay, value in zip((0.1, 0.2), (0.0, 0.1), found, strict=True):
        alone = moves(config.replace(learning_rate=rate, weight_decay=decay), steps=12)["w"][0, 0]
        np.testing.assert_allclose(value, alone, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optimizer": "adm"}, "There is no optimizer 'adm': did you mean 'adam'"),
        ({"optimizer": "sgd(moment=1)"}, "The optimizer sgd has no option 'moment': did you mean 'momentum'"),
        ({"optimizer": "sgd(0.9"}, "is malformed: write a name"),
        ({"optimizer": "sgd({[]})"}, "is malformed: write a name"),
        ({"optimizer": "sgd, adam"}, "must be one name, got 2"),
        ({"optimizer": "adamw(weight_decay=0.1)", "weight_decay": 0.1}, "given twice"),
        ({"optimizer": "sgd(momentum='a')"}, "cannot make a step .*: correct its options"),
        ({"optimizer": "rprop"}, "There is no optimizer 'rprop'"),  # it takes no schedule
        ({"schedule": "step(epochs=['a'])"}, "epochs must be numbers >= 0"),
        ({"schedule": "cosin"}, "There is no schedule 'cosin': did you mean 'cosine'"),
        ({"schedule": "cosine(ende=0)"}, "The schedule cosine has no option 'ende': did you mean 'end'"),
        ({"schedule": "cosine(warmup=50)"}, "that leave epochs for the cosine, got 50 and 0 of 30 epochs"),
        ({"schedule": "step"}, "missing a required argument: 'epochs'"),
        ({"schedule": "step(__import__('os'))"}, "is malformed"),
    ],
)
def test_bad_input(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        optimizers.make(Config(**changes), 10)
