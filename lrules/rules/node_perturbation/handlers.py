"""What node perturbation does at the sites of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lrules.extend import Frame, Handler, Hidden, Layer, Operation, key_at


class Noise(Handler):
    """Adds noise to hidden signals, and records it."""

    def __init__(self, std: Mapping[str, float], noise: Callable[..., Any], key: jax.Array) -> None:
        self.std, self.noise, self.key = std, noise, key

    def hidden(self, hidden: Hidden, value: Any, frame: Frame) -> Any:
        if hidden.name not in self.std:
            return value
        key = key_at(self.key, hidden.name, value, frame)
        frame.records[hidden.name] = xi = self.noise(key, value.shape, value.dtype)
        if jnp.shape(xi) != value.shape:
            raise ValueError(
                f"node_perturbation: noise(key, shape, dtype) must return the shape {value.shape} at the hidden signal "
                f"{hidden.name!r}, got {jnp.shape(xi)}: draw one number for each element"
            )
        return value + self.std[hidden.name] * xi


class ArrivingAtHidden(Handler):
    """Gives the error that arrives at a hidden signal also to a probe."""

    def hidden(self, hidden: Hidden, value: Any, frame: Frame) -> Any:
        return _probed(value, frame.inputs[hidden.name]) if hidden.name in frame.inputs else value


class ArrivingAtLayers(Handler):
    """Gives the error that arrives at the outputs of a layer also to a probe."""

    def layer(self, layer: Layer, op: Operation, w: jax.Array, b: Any, x: jax.Array, frame: Frame) -> Any:
        probe = frame.inputs.get(layer.at_output)
        return op(w, x) if probe is None else _probed(op(w, x), probe)


@jax.custom_vjp
def _probed(value: Any, probe: jax.Array) -> Any:
    return value


_probed.defvjp(lambda value, probe: (value, None), lambda _, error: (error, error))


class StandIn(Handler):
    """Replaces hidden signals by those in `frame.inputs`, and records what layers compute from them with `b`."""

    def __init__(self, sites: Any) -> None:
        self.sites = sites

    def hidden(self, hidden: Hidden, value: Any, frame: Frame) -> Any:
        return frame.inputs.get(hidden.name, value)

    def layer(self, layer: Layer, op: Operation, w: jax.Array, b: Any, x: jax.Array, frame: Frame) -> Any:
        if layer.site in self.sites:
            frame.records[layer.site] = op.product(b, x)
        return op(w, x)
