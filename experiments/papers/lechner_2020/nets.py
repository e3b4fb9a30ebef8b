"""The networks of the paper, their starts, and their losses, as one task for each rule.

Fully connected: hidden layers of equal width. Convolutional: convolutions without padding, and one dense layer on all
that the last of them computes (the padding and the dense layer are those of the authors' program; the paper leaves both
open). Two classes have one output, the logit of a sigmoid; more classes have a softmax.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lrules
from experiments import models, tasks
from experiments.config import Config
from experiments.errors import InputError, nearest
from experiments.tasks import Task

Array = jax.Array
Layers = Sequence[tuple[int, int, int]]  # filters, side of the window, stride

CONVOLUTIONS: dict[str, Layers] = {
    "conv_cifar": ((96, 5, 2), (96, 3, 2), (96, 3, 1)),
    "conv_imagenet": ((96, 3, 2), (96, 5, 1), (128, 3, 2), (192, 3, 1), (192, 3, 2), (384, 3, 1)),
}

# The forward weights at the start. In a mono-net the layers above the first one have the second of each pair.
_normal = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")
STARTS: dict[str, tuple[Any, Any]] = {
    "zeros": (jax.nn.initializers.zeros, lrules.monotone.zeros),
    # Between -1 / sqrt(fan_in) and 1 / sqrt(fan_in), or between 0.001 and 1 / sqrt(fan_in).
    "uniform": (jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), lrules.monotone.uniform()),
    # The sd is 1 / sqrt(fan_in): the paper does not give it.
    "normal": (_normal, lrules.monotone.absolute_normal(_normal)),
}


class Convolutional(nnx.Module):
    """Convolutions without padding, with an activation after each, and a dense layer."""

    def __init__(
        self, shape: Sequence[int], layers: Layers, outputs: int, activation: Callable[[Array], Array], rngs: nnx.Rngs
    ):
        self.activation = activation
        (*sides, channels), convolutions = shape, []
        for filters, window, stride in layers:
            own = nnx.Conv(channels, filters, (window, window), strides=stride, padding="VALID", rngs=rngs)
            convolutions.append(own)
            sides, channels = [(side - window) // stride + 1 for side in sides], filters
        if min(sides) < 1:
            raise InputError(f"The images {shape[0]}x{shape[1]} are too small for {len(layers)} convolutions: use mlp.")
        self.layers = nnx.List(convolutions)
        self.out = nnx.Linear(math.prod(sides) * channels, outputs, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[batch, height, width, channels] -> outputs [batch, outputs]."""
        for layer in self.layers:
            x = self.activation(layer(x))
        return self.out(x.reshape(len(x), -1))


def binary_cross_entropy(outputs: Array, labels: Array) -> Array:
    """The loss of one logit: (outputs [batch, 1], labels [batch]) -> [batch]."""
    return optax.sigmoid_binary_cross_entropy(outputs[..., 0], labels.astype(outputs.dtype))


def hits(outputs: Array, labels: Array) -> Array:
    """Whether each example is classified rightly [batch]; one output is a logit."""
    found = outputs[..., 0] > 0 if outputs.shape[-1] == 1 else outputs.argmax(-1)
    return found.astype(labels.dtype) == labels


def task(config: Config, shape: Sequence[int], classes: int) -> Task:
    """The task of a config for two or more classes."""
    outputs = 1 if classes == 2 else classes
    activation = models.ACTIVATIONS.get(config.activation)
    if activation is None:
        known = nearest(config.activation, models.ACTIVATIONS)
        raise InputError(f"There is no activation '{config.activation}': {known}")

    def make(rngs: nnx.Rngs) -> nnx.Module:
        if config.model == "mlp":
            return models.MLP((math.prod(shape), *config.widths, outputs), activation, rngs=rngs)
        return Convolutional(shape, CONVOLUTIONS[config.model], outputs, activation, rngs)

    return tasks.task(make, binary_cross_entropy if outputs == 1 else tasks.cross_entropy)


def start(task: Task, shape: Sequence[int], starts: Sequence[str], which: Any, *, mono_net: bool) -> Task:
    """The task with the forward weights at one of the `starts`, and with the constraint of a mono-net where it is one.

    Args:
      task: a task of `task`; biases keep the zeros that it gives them.
      shape: the shape of one input.
      starts: names in `STARTS`.
      which: the number of the name, perhaps traced.
      mono_net: weights >= 0 in all layers but the first, at the start and after each step.
    """
    x = jnp.zeros((2, *shape))
    shapes, state = jax.eval_shape(task.init, jax.random.key(0))

    def begin(key: Array, params: Any, state: Any, name: str) -> Any:
        everywhere, positive = STARTS[name]
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.fold_in(key, 3), len(leaves))
        drawn = [everywhere(k, a.shape) if a.ndim > 1 else a for k, a in zip(keys, leaves, strict=True)]
        params = jax.tree.unflatten(tree, drawn)
        if not mono_net:
            return params
        return lrules.monotone.initialize(jax.random.fold_in(key, 4), task.net, params, (state, x), init=positive)

    def init(key: Array) -> tuple[Any, Any]:
        params, state = task.init(key)
        found = [begin(key, params, state, name) for name in starts]
        chosen = [jnp.asarray(which) == i for i in range(len(starts))]

        def choose(*leaves: Array) -> Any:
            return sum(jnp.where(is_it, leaf, 0) for is_it, leaf in zip(chosen, leaves, strict=True))

        return jax.tree.map(choose, *found), state

    if not mono_net:
        return task._replace(init=init)
    return task._replace(init=init, constraint=lrules.monotone.constrain(task.net, shapes, (state, x)))
