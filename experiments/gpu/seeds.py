"""Ten seeds at once over ten seeds one after the other: an epoch of `loop.Run` on MNIST."""

from functools import partial
from typing import Any

import numpy as np
import optax

from experiments import data, loop, models, rules
from experiments.gpu import session

NETS = {"784-100x4-10": (100,) * 4, "784-512-512-10": (512, 512)}
RULES = ("backprop", "feedback_alignment", "direct_feedback_alignment")
SEEDS, BATCH, ROUNDS, RATE = 10, 100, 3, 0.01


def part(results: session.Results, clock: session.Clock, settings: session.Settings) -> None:
    """An entry for each net and rule: seconds of an epoch of one seed and of ten, and how they compare.

    The rounds take turns. The first epoch of a run does not count.
    """
    keys = {f"{net}, {rule}": 0.0 if settings.tiny else 5.0 for net in NETS for rule in RULES}
    if settings.tiny:
        keys = {f"{list(NETS)[0]}, {RULES[1]}": 0.0}
    missing = [key for key in keys if not results.done(key)]
    if not missing:
        return
    dataset = data.on_device(settings.mnist())

    def make(key: str, seeds: int) -> loop.Run:
        net, rule = key.split(", ")
        widths = (8,) * 2 if settings.tiny else NETS[net]
        task = loop.task(lambda rngs: models.build("mlp", dataset.shape, 10, rngs=rngs, widths=widths))
        run = loop.Run(
            task,
            rules.parse(rule),
            dataset,
            optimizer=session.rated(optax.adam),
            seeds=range(seeds),
            batch_size=BATCH,
        )
        session.set_rates(run, RATE / 10)
        return run

    if clock.left < min(keys.values()):
        results.put("compilation", {"skipped": f"{clock.left:.0f} s were left"})
        return
    runs = session.threads({f"{key}, {n}": partial(make, key, n) for key in missing for n in (1, SEEDS)})
    for key in results.todo(keys, clock):
        with results.guard(key):
            pair: dict[int, Any] = {n: runs[f"{key}, {n}"] for n in (1, SEEDS)}
            for run in pair.values():
                if isinstance(run, Exception):
                    raise run
            seconds: dict[int, list[float]] = {1: [], SEEDS: []}
            for round_ in range(ROUNDS + 1):
                records = {n: run.epoch() for n, run in pair.items()}
                for n, record in records.items():
                    seconds[n] += [record.seconds] if round_ else []
            ratio = np.array(seconds[SEEDS]) / (SEEDS * np.array(seconds[1]))
            results.put(
                key,
                {
                    "batch": BATCH,
                    "steps": pair[1].steps,
                    "epoch_seconds_of_one": np.median(seconds[1]),
                    "epoch_seconds_of_ten": np.median(seconds[SEEDS]),
                    "ten_at_once_over_ten_alone": np.quantile(ratio, (0.5, 0.25, 0.75)),
                    "accuracy_of_ten": records[SEEDS].accuracy,
                    "accuracy_of_one": records[1].accuracy,
                },
            )
