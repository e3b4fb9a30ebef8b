"""From a `Config` to what it describes: the data, the task, the method, the run."""

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import lrules
from experiments import data, methods, optimizers, rules, tasks
from experiments.config import Config
from experiments.loop import PARTS, Run, steps_per_epoch
from experiments.methods import Method
from experiments.placement import Placement


def dataset(config: Config, *, data_dir: str | None = None, download: bool = False) -> data.Dataset:
    """The data set of a config, with the validation set that it asks for; `download` prepares a TFDS set before."""
    if download:
        from experiments import tfds_sets

        tfds_sets.prepare(config.dataset, data_dir)
    found = data.load(config.dataset, data_dir=data_dir)
    if config.classes:
        from experiments import subsets

        found = subsets.choose(found, subsets.parse_classes(config.classes), seed=config.seed)
    return data.split_validation(found, config.validation, seed=config.seed) if config.validation else found


TRACED = ("learning_rate", "weight_decay", "feedback_learning_rate")  # the fields that lanes of one run may differ in


def method(
    config: Config,
    task: tasks.Task,
    steps: int,
    *,
    rule: lrules.Rule | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
    **settings: Any,
) -> Method:
    """The method of a config; `settings` are traced numbers: fields of the config, or options of its rule.

    Args:
      config, task: what to train.
      steps: steps in an epoch.
      rule: the rule, where it is not that of the config.
      options: options of the config's rule, in place of its own.
      settings: numbers of `TRACED` by name, and options of the rule as in `{"rule.alpha": 0.5}`.
    """
    traced = {name.removeprefix("rule."): v for name, v in settings.items() if name.startswith("rule.")}
    rates = {name: v for name, v in settings.items() if name in TRACED}
    if rule is None:
        rule = rules.parse(config.rule, {**options, **traced})
    augment = None
    if config.augmentation:
        from experiments import augment as augmentations  # dm-pix is slow to import

        augment = augmentations.parse(config.augmentation)
    return methods.by_rule(
        task,
        rule,
        optimizers.make(config, steps, **rates),
        augment=augment,
        fgsm=config.fgsm,
        attack=config.attack,
        accumulate=config.accumulate,
        average=config.average,
        angle=config.probe > 0,
        layers=config.layers,
    )


def run(
    config: Config,
    dataset: data.Dataset,
    task: tasks.Task | None = None,
    *,
    rule: lrules.Rule | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
    settings: Mapping[str, Sequence[float]] | None = None,
    placement: Placement | None = None,
    check_nan: bool = False,
    limit: int | None = None,
    resident: int | None = None,
    parts: int = PARTS,
) -> Run:
    """The run of a config. Each of the `settings` has a number for each seed of each point, point after point."""
    task = tasks.build(config, dataset) if task is None else task
    steps = steps_per_epoch(dataset, config.batch_size)
    seeds = list(config.all_seeds)
    points = len(next(iter(settings.values()))) // len(seeds) if settings else 1
    make = functools.partial(method, config, task, steps, rule=rule, options=options)
    return Run(
        make if settings else make(),
        dataset,
        seeds=seeds * points,
        settings=settings,
        batch_size=config.batch_size,
        check_nan=check_nan,
        probe=config.probe,
        record_every=config.record_every,
        placement=placement,
        limit=limit,
        resident=resident,
        parts=parts,
    )
