"""A run as a value: `Config` holds all that determines the numbers of a run.

    config = Config(dataset="mnist", rule="backman(alpha=1.0)", model="lenet5", epochs=10)
    config.replace(rule="feedback_alignment").hash()
    Config.load("results/train/metrics.json")  # the config of an earlier run, or a file that holds one

The flags of the programs are made from its fields (`cli.py`); a checkpoint and a result hold it. Where the results go
and which devices compute them is no part of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from experiments.errors import InputError, nearest


def option(
    default: Any, help: str, *, least: float | None = None, most: float | None = None, above: bool = False
) -> Any:
    """A field with its help text and its range; with `above` the value must be greater than `least`."""
    return dataclasses.field(default=default, metadata={"help": help, "least": least, "most": most, "above": above})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All that determines the numbers of a run. A wrong value raises InputError, which names the field.

    Example:
      >>> config = Config(rule="backman", widths=(100, 100))
      >>> config == Config.from_dict(config.to_dict())
      True
    """

    # data
    dataset: str = option("digits", "digits (embedded), npz:FILE, npy:FOLDER, or a TFDS name such as mnist or cifar10.")
    classes: str = option("", "Only these classes, such as 3,5; a number alone, such as 2: as many, drawn by the seed.")
    validation: float = option(
        0.0, "The fraction of the training set kept for validation, drawn by the first seed.", least=0, most=0.999
    )
    normalisation: str = option("", "Mean and sd of the inputs, such as 0.13/0.31; or mnist, cifar10, cifar100.")
    augmentation: str = option("", "Random changes of training images, such as crop(4),flip.")
    # task and model
    task: Literal["classification", "autoencoding"] = option("classification", "What the model learns.")
    loss: Literal["cross_entropy", "squared_error", "softmax_squared_error"] = option(
        "cross_entropy", "The loss. squared_error is half the squared distance to the one-hot target."
    )
    label_smoothing: float = option(0.0, "The share of the target that all classes get.", least=0, most=0.999)
    model: str = option("mlp", "A model of models.py: mlp, lenet5, cnn, resnet18, resnet50, vgg16.")
    widths: tuple[int, ...] = option((64, 64, 64), "The MLP's hidden widths.", least=1)
    activation: str = option(
        "", "The activation of mlp, lenet5 and cnn, such as relu (default: tanh; the other models have ReLU)."
    )
    mono_net: str = option("", "Turn the model into a mono-net (for mdfa); its first weights: zeros, uniform, ...")
    dtype: Literal["float32", "bfloat16"] = option("float32", "The dtype of the computation; parameters are float32.")
    # rule
    rule: str = option("backprop", 'A learning rule, such as "backman(alpha=1.0)"; modifiers are nested the same way.')
    # optimizer
    optimizer: str = option("adam", "An optimizer of optax, such as adam or sgd(momentum=0.9,nesterov=True).")
    learning_rate: float = option(3e-3, "The learning rate at its peak.", least=0)
    schedule: str = option(
        "cosine", "Learning rate: constant, cosine(warmup=5), halfway, step(epochs=[60,80]), linear, exponential(...)."
    )
    weight_decay: float | None = option(
        None, "The weight decay, decoupled from the gradient (default: the optimizer's own).", least=0
    )
    coupled_decay: bool = option(False, "Add the weight decay to the gradient, before the optimizer.")
    decay_all: bool = option(False, "Decay biases and the scales of norms, too.")
    clip: float | None = option(None, "Scale gradients down to this global norm.", least=0, above=True)
    feedback_optimizer: str = option("", "The optimizer of learned feedback weights (default: the same).")
    feedback_learning_rate: float | None = option(
        None, "The learning rate of learned feedback weights, constant in the warm-up (default: the same).", least=0
    )
    accumulate: int = option(1, "Parts of each batch, whose gradients are averaged one after another.", least=1)
    average: float = option(
        0.0, "Evaluate an exponential average of the weights with this decay (0: the weights).", least=0, most=0.999999
    )
    # length
    batch_size: int = option(64, "Examples in a step.", least=1)
    epochs: int = option(30, "Passes over the training set.", least=1)
    warmup_epochs: int = option(
        0, "Epochs before --epochs that train only the feedback, for rules that learn it.", least=0
    )
    seed: int = option(0, "The first seed.", least=0)
    seeds: int = option(1, "The number of seeds.", least=1)
    # adversarial training
    fgsm: float = option(
        0.0, "Train on adversarial inputs with this step (FGSM by backprop, after the normalisation; 0: no).", least=0
    )
    attack: float = option(0.0, "Measure accuracy also under an FGSM attack with such a step (0: do not).", least=0)
    # what is measured
    select: Literal["last", "best_validation"] = option(
        "last", "Report the last epoch, or that with the best validation accuracy."
    )
    probe: int = option(256, "Training examples that measure the angle to backprop (0: do not measure it).", least=0)
    record_every: int = option(0, "Steps between records of the curves (0: an epoch).", least=0)
    layers: bool = option(False, "Record angle, norm ratio, alignment and dead units of each layer, too.")

    def __post_init__(self) -> None:
        for field, kind in zip(dataclasses.fields(self), kinds(), strict=True):
            object.__setattr__(self, field.name, _checked(field, kind, getattr(self, field.name)))
        if self.seed + self.seeds > 2**31:  # JAX makes a key of 32 bits
            last = self.seed + self.seeds - 1
            raise InputError(f"The last seed must be below 2**31, got {last}: give a smaller seed.")
        if self.layers and not self.probe:
            raise InputError("layers needs training examples to measure on and probe is 0: give some, as in probe=256.")
        if self.batch_size % self.accumulate:
            raise InputError(
                f"accumulate must divide the batch size {self.batch_size}, got {self.accumulate}: choose a divisor."
            )

    def replace(self, **changes: Any) -> Config:
        """The same config with other values."""
        unknown = [name for name in changes if name not in _names()]
        if unknown:
            raise InputError(f"A config has no field '{unknown[0]}': {nearest(unknown[0], _names(), most=99)}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Config:
        """The config with these fields and the default values of all others."""
        return cls().replace(**fields)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Config:
        """The config in a JSON file: its content, or what a result file has under "config"."""
        content = _read(path)
        return cls.from_dict(content.get("config", content))

    @property
    def all_seeds(self) -> range:
        """Every seed of the run."""
        return range(self.seed, self.seed + self.seeds)

    def hash(self) -> str:
        """Twelve hexadecimal digits that stay the same when the config gets new fields with default values."""
        default = Config().to_dict()
        given = {name: value for name, value in self.to_dict().items() if value != default[name]}
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:12]


def _names() -> list[str]:
    return [field.name for field in dataclasses.fields(Config)]


def _read(path: str | pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file, whose "config" is one too if it is there."""
    path = pathlib.Path(path).expanduser()
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"The config {path} cannot be read ({error.strerror}): give a JSON file.") from None
    except ValueError:
        raise InputError(f"The config {path} is not JSON: give a config, or the metrics.json of a run.") from None
    for value in (content, content.get("config", {}) if isinstance(content, dict) else {}):
        if not isinstance(value, dict):
            raise InputError(f"The config {path} must hold a JSON object, got {type(value).__name__}.")
    return content


def sweep_of(path: str | pathlib.Path) -> list[str]:
    """The sweep of the run that wrote a result file, as the texts of --sweep."""
    return list(_read(path).get("sweep", []))


def kinds() -> list[Any]:
    """The annotated types of the fields, in order."""
    hints = typing.get_type_hints(Config)
    return [hints[name] for name in _names()]


def kind_of(kind: Any) -> tuple[Any, bool, tuple[str, ...]]:
    """The type of a field, whether None is allowed, and the choices of a Literal."""
    if typing.get_origin(kind) is Literal:
        return str, False, typing.get_args(kind)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(part for part in typing.get_args(kind) if part is not type(None)), True, ()
    return (tuple if typing.get_origin(kind) is tuple else kind), False, ()


def _checked(field: dataclasses.Field, kind: Any, value: Any) -> Any:
    """The value as its field has it, or an error that names the field and the remedy."""
    base, optional, choices = kind_of(kind)
    if value is None and optional:
        return None
    if base is tuple:
        entries = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_number(field, int, entry) for entry in entries)
    if base in (int, float):
        return _number(field, base, value)
    if not isinstance(value, base):
        word = {bool: "true or false", str: "a text"}[base]
        raise InputError(f"{field.name} must be {word}, got {value!r}.")
    if choices and value not in choices:
        raise InputError(f"{field.name} has no choice '{value}': {nearest(value, choices)}")
    return value


def _number(field: dataclasses.Field, base: type, value: Any) -> Any:
    least, most, above = (field.metadata[name] for name in ("least", "most", "above"))
    bounds = []
    if least is not None:
        bounds.append(f"{'>' if above else '>='} {least:g}")
    if most is not None:
        bounds.append(f"<= {most:g}")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    inside = is_number and (least is None or value > least or (value == least and not above))
    if not inside or (most is not None and value > most) or (base is int and value != int(value)):
        word = "an integer" if base is int else "a number"
        raise InputError(f"{field.name} must be {word} {' and '.join(bounds)}".rstrip() + f", got {value!r}.")
    return base(value)
