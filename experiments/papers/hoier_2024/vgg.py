"""VGG16 on CIFAR-10, CIFAR-100 and ImageNet 32x32: the settings of Table 3 and figure 2, and how a cell is trained.

The paper (appendix B) gives the epochs, SGD with momentum 0.9, a weight decay of 5e-4, the warm-up from 1e-3, the peak
and batches; and in section 6.2 random crops and flips, and that a tenth of the training images (ImageNet: a twentieth)
chooses the epoch. The rest is as in the authors' code: the rate falls as a cosine, and stays for the last 10 epochs, no
BatchNorm and no dropout, the decay is a part of the gradient and holds for biases too, means and deviations of the
pixels, crops with a margin of 4. In one point we follow the code against the paper: the loss is linearised at the clean
outputs, not at the current ones (Eq. 22). We differ in this: our margin is black (theirs is the mean colour), our
initial weights are those of He et al. (theirs are those of LeCun), and we pool after ReLU (they pool before it: the
same function).

A cell trains its seeds one after another: with vmap, the convolutions of seeds become grouped ones, which are slow.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import files, results
from experiments.config import Config
from experiments.papers.cells import Job, thin, trained
from experiments.papers.hoier_2024 import layers
from experiments.trial import Trial

BATCHES = 200  # of figure 2's right column
LOW, END = 1e-3, 2e-6  # the rate at the begin of the warm-up, and the last one
WARMUP, FLAT = 10, 10  # epochs
PASSES = 16  # after the first one, forward only; the paper counts 17

CIFAR_10 = Config(
    dataset="cifar10",
    validation=0.1,
    select="best_validation",
    normalisation="0.4914,0.4822,0.4465/0.2023,0.1994,0.2010",
    augmentation="dual_propagation",
    model="vgg16",
    optimizer="sgd(momentum=0.9)",
    learning_rate=0.025,
    weight_decay=5e-4,
    coupled_decay=True,
    decay_all=True,
    batch_size=100,
    epochs=130,
    seeds=3,
    probe=0,
)
CIFAR_100 = CIFAR_10.replace(
    dataset="cifar100",
    normalisation="0.5074,0.4867,0.4411/0.2011,0.1987,0.2025",
    learning_rate=0.015,
    batch_size=50,
    epochs=200,
)
IMAGENET = CIFAR_10.replace(
    dataset="imagenet_resized/32x32",
    validation=0.05,
    normalisation="0.485,0.456,0.406/0.229,0.224,0.225",
    learning_rate=0.02,
    batch_size=250,
)
CONFIGS = {"CIFAR-10": CIFAR_10, "CIFAR-100": CIFAR_100, "ImageNet 32x32": IMAGENET}


def rule(alpha: float, beta: float, order: str) -> str:
    """DP^T with one sweep up and down, or with the forward passes of the paper."""
    passes = f", order='forward', iterations={PASSES}" if order == "forward" else ""
    return f"dual_propagation(alpha={alpha}, beta={beta}{passes})"


def scheduled(config: Config, epochs: int) -> Config:
    """The config with the schedule for so many epochs; with fewer, warm-up and end are shorter alike."""
    share, peak = config.epochs / epochs, config.learning_rate
    parts = f"warmup={WARMUP * share:g}, start={LOW / peak:g}, end={END / peak:g}, flat={FLAT * share:g}"
    return config.replace(schedule=f"cosine({parts})")


def full_epochs(config: Config) -> int:
    """The epochs of the paper on the data set of a config."""
    return next(each.epochs for each in CONFIGS.values() if each.dataset == config.dataset)


def measure(job: Job) -> Mapping[str, Any] | None:
    """The test accuracy in the epoch that the validation set chooses, for each seed; with layers, their angles."""
    dataset = job.dataset(job.config)
    found = []
    for seed in job.config.all_seeds:
        done = job.work / f"seed_{seed}.json"
        if not done.is_file():
            config = scheduled(job.config.replace(seed=seed, seeds=1), full_epochs(job.config))
            own = job._replace(config=config, work=job.work / f"seed_{seed}")
            content = trained(own, Trial(config, dataset))
            if content is None:
                return None
            files.write_json(done, _kept(content, config.epochs))
        found.append(json.loads(done.read_text()))
    return _joined(found)


def _kept(content: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    """The figures and curves of one seed."""
    curves = dict(content["curves"])
    if "records" in content:
        curves |= thin(layers.curves(content["records"]), epochs)
    figures = {name: value for name, value in content.items() if isinstance(value, Mapping) and "by_seed" in value}
    return figures | {"curves": curves, "epoch_by_seed": content["epoch_by_seed"]} | {
        name: content[name] for name in ("compile_seconds", "step_seconds")
    }  # fmt: skip


def _joined(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures and curves of several seeds as those of one block."""
    joined: dict[str, Any] = {}
    for name, value in found[0].items():
        if isinstance(value, Mapping) and "by_seed" in value:
            by_seed = np.concatenate([np.asarray(each[name]["by_seed"], float) for each in found])
            joined[name] = results.statistics(by_seed) | {"by_seed": by_seed}
        elif name == "curves":
            joined[name] = {
                curve: points if curve in ("epoch", "seconds") else np.concatenate(
                    [np.asarray(each["curves"][curve], float) for each in found], 1
                )
                for curve, points in value.items()
            }  # fmt: skip
        else:
            joined[name] = [each[name] for each in found]
    return joined


def begin(job: Job) -> Mapping[str, Any] | None:
    """The angles of the first batches, by layer; it has no use for a checkpoint."""
    config = scheduled(job.config, full_epochs(job.config))
    run = Trial(config, job.dataset(job.config)).runs[0]
    batches = min(BATCHES, run.steps)
    job.bar.restart(batches)

    def advance(steps: int) -> bool:
        job.bar.advance(steps)
        return job.stop.requested or run.step >= batches

    run.epoch(advance=advance)
    if run.step < batches and not run.epochs:
        return None
    times = [record["step"] for record in run.curve]
    last = np.asarray(run.curve[-1]["angle"], float)
    return {
        "angle": results.statistics(last) | {"by_seed": last},
        "curves": {"epoch": times} | layers.curves(run.curve),
        "unit": "batch",
    }
