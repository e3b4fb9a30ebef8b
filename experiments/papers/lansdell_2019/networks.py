"""The dense networks of the paper, with weights and biases as its authors draw them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "identity": lambda z: z,
}


class Dense(nnx.Module):
    """Dense layers, each with its own activation; weights and biases are normal with variance 2 / fan-in."""

    def __init__(self, widths: Sequence[int], activations: Sequence[str], *, rngs: nnx.Rngs):
        """`widths` are those of the inputs and of all layers; `activations` has one name for each layer."""
        self.activations = tuple(activations)
        self.layers = nnx.List([self._layer(*pair, rngs) for pair in zip(widths[:-1], widths[1:], strict=True)])

    @staticmethod
    def _layer(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
        draw = nnx.initializers.normal((2 / inputs) ** 0.5)
        return nnx.Linear(inputs, outputs, kernel_init=draw, bias_init=draw, rngs=rngs)

    def __call__(self, x: Array, change: Callable[[Array], Array] = lambda h: h, stop: int | None = None) -> Array:
        """[batch, ...] -> outputs [batch, outputs], or the hidden signal after `stop` layers.

        `change` is done to every hidden signal: noise, for example.
        """
        x = x.reshape(x.shape[0], -1)
        for i, (layer, name) in enumerate(zip(self.layers, self.activations, strict=True), start=1):
            x = ACTIVATIONS[name](layer(x))
            if i == stop:
                return x
            x = change(x) if i < len(self.layers) else x
        return x


def noisy(make: Callable[[nnx.Rngs], Dense]) -> Callable[..., Array]:
    """(params, state, x, std, key) -> outputs [batch, outputs] with independent normal noise in all hidden signals."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def outputs(params: Any, state: Any, x: Array, std: float, key: Array) -> Array:
        model = nnx.merge(graph, params, state)
        keys = iter(jax.random.split(key, len(model.layers)))
        return model(x, lambda h: h + std * jax.random.normal(next(keys), h.shape, h.dtype))

    return outputs
