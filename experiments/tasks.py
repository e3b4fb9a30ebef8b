"""What a run learns: a model, its loss and its measures, as pure functions for one seed.

    task = tasks.task(lambda rngs: models.MLP((64, 100, 10), rngs=rngs))
    task = tasks.build(Config(model="lenet5", dataset="mnist"), dataset)
"""  # fmt: skip

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lrules
from experiments import adversarial, models
from experiments.config import Config
from experiments.data import Dataset, scale
from experiments.errors import InputError, nearest

Array = jax.Array
PyTree = Any
Loss = Callable[[Array, Array], Array]

# (logits [batch, classes], labels [batch]) -> [batch]
cross_entropy: Loss = optax.softmax_cross_entropy_with_integer_labels
MONO_NETS = {
    "zeros": lrules.monotone.zeros,
    "uniform": lrules.monotone.uniform(),
    "absolute_normal": lrules.monotone.absolute_normal(),
}


def squared_error(outputs: Array, labels: Array) -> Array:
    """Half the squared distance to the one-hot target: (outputs [batch, classes], labels [batch]) -> [batch]."""
    return half_squared_distance(outputs, jax.nn.one_hot(labels, outputs.shape[-1], dtype=outputs.dtype))


def softmax_squared_error(logits: Array, labels: Array) -> Array:
    """The squared error of the softmax of the logits."""
    return squared_error(jax.nn.softmax(logits), labels)


def half_squared_distance(outputs: Array, targets: Array) -> Array:
    """Half the squared distance: (outputs [batch, n], targets [batch, n]) -> [batch]."""
    return 0.5 * jnp.sum(jnp.square(outputs - targets), -1)


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "squared_error": squared_error,
    "softmax_squared_error": softmax_squared_error,
}


def smoothed(smoothing: float) -> Loss:
    """Cross-entropy with targets that are mixed with the uniform distribution: 1 - s of the label, s of all classes."""

    def loss(logits: Array, labels: Array) -> Array:
        log_p = jax.nn.log_softmax(logits)
        return (1 - smoothing) * cross_entropy(logits, labels) - smoothing * log_p.mean(-1)

    return loss


class Task(NamedTuple):
    """A model and its loss as pure functions for one seed, shared by all rules."""

    net: lrules.Network  # (params, (state, x [batch, ...])) -> (outputs [batch, ...], new state), in training mode
    loss: Loss
    init: Callable[[Array], tuple[PyTree, PyTree]]  # key -> (params, state)
    predict: Callable[[PyTree, PyTree, Array], Array]  # (params, state, x) -> outputs, in evaluation mode
    prepare: Callable[[Array], Array] = scale  # stored inputs -> the floats that the model reads
    targets: Callable[[Array, Array], Array] = lambda x, y: y  # (prepared x, y) -> what the loss compares with
    constraint: optax.GradientTransformation = optax.identity()  # comes after the optimizer of the forward weights
    labelled: bool = True  # the targets are classes, so that there is an accuracy

    def evaluate(self, params: PyTree, state: PyTree, x: Array, y: Array, epsilon: float = 0.0) -> dict[str, Array]:
        """Figures of each example [batch], under an FGSM attack of `epsilon`: "loss" and, of classes, "accuracy"."""
        x = self.prepare(x)
        y = self.targets(x, y)

        def losses(x: Array) -> Array:
            return self.loss(self.predict(params, state, x), y)

        outputs = self.predict(params, state, adversarial.fgsm(losses, x, epsilon))
        figures = {"loss": self.loss(outputs, y)}
        return figures | {"accuracy": outputs.argmax(-1) == y} if self.labelled else figures


def task(make_model: Callable[[nnx.Rngs], nnx.Module], loss: Loss = cross_entropy) -> Task:
    """The functions of a Flax NNX model, given the function that builds it."""
    model = nnx.eval_shape(lambda: make_model(nnx.Rngs(0)))  # its structure, without computing the weights
    net: lrules.Network = lrules.from_nnx(model, with_state=True)[0]
    model.eval()
    evaluating = nnx.graphdef(model)

    def init(key: Array) -> tuple[PyTree, PyTree]:
        split: Any = nnx.split(make_model(nnx.Rngs(jax.random.fold_in(key, 0))), nnx.Param, ...)
        return split[1], split[2]

    def predict(params: PyTree, state: PyTree, x: Array) -> Array:
        return nnx.merge(evaluating, params, state, copy=True)(x)

    return Task(net, loss, init, predict)


def build(config: Config, dataset: Dataset) -> Task:
    """The task of a config, for the shape of the data."""
    if config.augmentation:
        from experiments import augment  # dm-pix is slow to import

        augment.parse(config.augmentation).check(dataset.shape)
    loss = LOSSES[config.loss]
    if config.label_smoothing:
        if config.loss != "cross_entropy":
            raise InputError(f"label_smoothing needs the loss cross_entropy, got {config.loss}.")
        loss = smoothed(config.label_smoothing)
    autoencodes = config.task == "autoencoding"
    outputs = math.prod(dataset.shape) if autoencodes else dataset.classes
    options: dict[str, Any] = {"widths": config.widths, "activation": config.activation}
    options["dtype"] = jnp.dtype(config.dtype)
    built = task(lambda rngs: models.build(config.model, dataset.shape, outputs, rngs=rngs, **options), _wide(loss))
    if autoencodes:
        if config.loss != "squared_error":
            raise InputError(f"The task autoencoding needs the loss squared_error, got {config.loss}.")
        built = built._replace(
            loss=_wide(half_squared_distance), targets=lambda x, y: x.reshape(len(x), -1), labelled=False
        )
    if config.normalisation:
        built = normalised(built, config.normalisation)
    if not config.mono_net:
        return built
    if config.mono_net not in MONO_NETS:
        raise InputError(f"There is no mono-net start '{config.mono_net}': {nearest(config.mono_net, MONO_NETS)}")
    try:
        return mono_net(built, dataset.shape, MONO_NETS[config.mono_net])
    except ValueError as error:
        raise InputError(f"mono_net: {str(error).splitlines()[0]}.") from None


def normalised(built: Task, normalisation: str) -> Task:
    """The task with normalised images, as `--normalisation` says."""
    from experiments import augment  # dm-pix is slow to import

    normalise = augment.parse_normalise(normalisation)
    return built._replace(prepare=lambda x: normalise(scale(x)))


def _wide(loss: Loss) -> Loss:
    """The loss in float32 at least, so that bfloat16 outputs do not round it."""

    def wide(outputs: Array, targets: Array) -> Array:
        return loss(outputs.astype(lrules.extend.at_least_float32(outputs.dtype)), targets)

    return wide


def mono_net(task: Task, shape: Sequence[int], initializer: Callable[..., Array]) -> Task:
    """The task with a mono-net: weights >= 0 in all layers but the first, at the start and after each step.

    Args:
      task: a task whose model has increasing activations.
      shape: the shape of one input.
      initializer: the initializer of these weights, as in `lrules.monotone`.
    """
    x = jnp.zeros((2, *shape))
    params, state = jax.jit(task.init)(jax.random.key(0))
    positive = lrules.monotone.initialize(jax.random.key(0), task.net, params, (state, x))
    lrules.monotone.check(task.net, positive, (state, x))

    def init(key: Array) -> tuple[PyTree, PyTree]:
        params, state = task.init(key)
        key = jax.random.fold_in(key, 4)
        return lrules.monotone.initialize(key, task.net, params, (state, x), init=initializer), state

    return task._replace(init=init, constraint=lrules.monotone.constrain(task.net, params, (state, x)))
