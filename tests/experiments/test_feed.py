"""A set that is read from the disk trains as one that lies on the device does."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import loop
from experiments.config import Config
from experiments.methods import Method
from experiments.trial import Trial
from tests.experiments.test_loop import tiny

SMALL = Config(widths=(5,), batch_size=6, epochs=2, optimizer="sgd", learning_rate=0.1, schedule="constant", seeds=2)


@pytest.mark.parametrize("record_every", [0, 2])
def test_every_example_is_seen_once_in_an_epoch(record_every):
    """40 examples in batches of 6: six steps, and four examples that wait."""
    dataset = tiny()
    marked = dataset._replace(x_train=np.eye(40, dtype=np.float32))
    seen = []

    def method():
        def step(carry, key, x, y):
            return carry + x.sum(0), x.sum()

        return Method(lambda key, x, y: jnp.zeros(40), step, lambda carry, x, y: {"loss": x[:, 0]})

    for resident in (None, 0):
        run = loop.Run(
            method(), marked._replace(x_test=np.eye(40, dtype=np.float32)), batch_size=6, resident=resident,
            record_every=record_every,
        )  # fmt: skip
        run.epoch()
        seen.append(np.asarray(run.carry[0]))
        run.epoch()
        assert (run.carry[0].sum() == 72) and not (run.carry[0] == 2 * seen[-1]).all()
    for counts in seen:
        assert counts.sum() == 36 and counts.max() == 1


def test_it_learns_and_evaluates_as_on_the_device():
    resident, streamed = Trial(SMALL, tiny()), Trial(SMALL, tiny(), resident=0)
    assert streamed.runs[0]._feed.chunk == 6 and resident.runs[0]._feed.chunk is None
    before = [trial.runs[0].evaluate(*trial.runs[0]._feed.sets["test"]) for trial in (resident, streamed)]
    np.testing.assert_allclose(before[0]["loss"], before[1]["loss"], rtol=1e-6)
    for trial in (resident, streamed):
        while not trial.finished:
            trial.epoch()
    assert (streamed.records[-1].train_loss < streamed.records[0].train_loss).all()
    np.testing.assert_allclose(streamed.records[-1].test_loss, resident.records[-1].test_loss, atol=0.1)


def test_it_goes_on_inside_an_epoch(monkeypatch):
    monkeypatch.setattr("experiments.feed.CHUNK", 2 * 6 * 16 * 4)  # two steps
    whole, first, second = (Trial(SMALL.replace(rule="feedback_alignment"), tiny(), resident=0) for _ in range(3))
    assert whole.runs[0]._feed.chunk == 2
    while not whole.finished:
        whole.epoch()
    first.epoch()
    assert first.epoch(advance=lambda n: True) is None
    second.restore(*first.state())
    while not second.finished:
        second.epoch()
    for ours, theirs in zip(second.records, whole.records, strict=True):
        assert (ours.train_loss == theirs.train_loss).all() and (ours.test_loss == theirs.test_loss).all()
