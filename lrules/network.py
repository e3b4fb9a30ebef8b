"""Network: a pure function, and where the batch lies in its inputs and outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lrules.engine.graph import Graph
from lrules.engine.handlers import Handler
from lrules.engine.jaxprs import Jaxpr
from lrules.engine.traces import Traces
from lrules.options import first_match
from lrules.typing import Pytree


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A pure function `apply(params, inputs) -> outputs`, ready for a learning rule.

    net(params, inputs) = apply(params, inputs)

    All functions of the library also take the bare function, if the options have their defaults.

    Args:
      apply: the function; `params`, `inputs` and `outputs` are pytrees.
      has_aux: `apply` returns `(outputs, aux)`. No error arrives at `aux`.
      batch_axes: where the batch lies in `inputs`: an axis, or a prefix pytree of axes as in `in_axes` of `jax.vmap`.
        None for inputs without a batch (state, keys, positions).
      frozen: a pytree of weights that are not trained; `apply` is then `apply(params, frozen, inputs)`. Rules treat the
        layers of these weights as all other layers, so frozen weights get feedback too. None: there are no such
        weights.
      signal_axes: where the batch lies in the outputs and hidden signals, in the order of the inputs. Rules that send
        each example its own error need it. Give one axis for all, or axes by regular expression for the names of hidden
        signals (see docs/terms.md) and for `"outputs"`. None: the library finds the axes. Give it if rows are the nodes
        of one graph (`segment_sum`), or if the network puts the examples into another order and back.
      handlers: what modifiers do at layers, hidden signals and activations, the outermost modifier first.

    Raises:
      ValueError: `signal_axes` is not an axis, axes by name or None.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> net = lrules.Network(lambda w, inputs: inputs[0] @ w + inputs[1], batch_axes=(0, None))
      >>> net(jnp.eye(2), (jnp.ones((3, 2)), jnp.ones(2))).shape  # the second input has no batch
      (3, 2)
    """

    apply: Callable[..., Any]
    _: dataclasses.KW_ONLY
    has_aux: bool = False
    batch_axes: Pytree = 0
    frozen: Pytree = None
    signal_axes: int | Mapping[str, int] | None = None
    handlers: tuple[Handler, ...] = ()
    traces: Traces = dataclasses.field(default_factory=Traces, init=False, repr=False)

    def __post_init__(self) -> None:
        axes = self.signal_axes
        given = axes.values() if isinstance(axes, Mapping) else () if axes is None else (axes,)
        if not all(isinstance(axis, int | np.integer) for axis in given):
            raise ValueError(f"signal_axes must be an axis, axes by name as {{'outputs': 0}}, or None, got {axes!r}")

    # jax.jit compares networks by equality: two networks are equal only if they hold the same frozen weights, by
    # identity.
    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, Network):
            return NotImplemented
        (mine, tree), (theirs, other_tree) = jax.tree.flatten(self.frozen), jax.tree.flatten(other.frozen)
        same = tree == other_tree and all(a is b for a, b in zip(mine, theirs, strict=True))
        names = ("apply", "has_aux", "batch_axes", "signal_axes", "handlers")
        return same and all(getattr(self, name) == getattr(other, name) for name in names)

    def __hash__(self) -> int:
        return hash((self.apply, self.has_aux, self.handlers))

    def __call__(self, params: Pytree, inputs: Pytree) -> Any:
        return self.apply(params, inputs) if self.frozen is None else self.apply(params, self.frozen, inputs)

    def parameters(self, params: Pytree) -> list[Any]:
        """The leaves of the parameters, then the frozen weights."""
        return [*jax.tree.leaves(params), *map(_without_gradient, jax.tree.leaves(self.frozen))]

    def pushing(self, handler: Handler) -> Network:
        """The same network with one more handler, inside the handlers that it has."""
        return self.handled((*self.handlers, handler))

    def handled(self, handlers: tuple[Handler, ...]) -> Network:
        """The same network with these handlers and the same traces."""
        new = dataclasses.replace(self, handlers=handlers)
        object.__setattr__(new, "traces", self.traces)
        return new

    def graph(self, params: Pytree, inputs: Pytree, *, double: bool = False) -> Graph:
        """The traced network, traced once for each kind of arguments; with `double`, on the batch followed by itself.

        (With `double`, the axes that grow with the batch have twice the size.)
        """
        key, flat, args = self._flat(params, inputs, double)
        axes = self.input_batch_axes(inputs)

        def build(closed: Any, out_tree: Any, aux_tree: Any) -> Graph:
            # Inputs without a batch (state, keys, masks) are not data: a weight that they change stays a weight.
            batched = [a is not None or all(other is None for other in axes) for a in axes]
            return Graph(closed, parameter_names((params, self.frozen)), batched, out_tree, aux_tree)

        return self.traces.graph(self.apply, key, flat, args, build)

    def jaxpr_at_twice(self, params: Pytree, inputs: Pytree) -> Jaxpr:
        """The program of the network on the batch followed by itself."""
        _, flat, args = self._flat(params, inputs, True)
        return jax.make_jaxpr(flat)(*args)

    def _flat(
        self, params: Pytree, inputs: Pytree, double: bool
    ) -> tuple[Hashable, Callable[..., Any], tuple[list[Any], list[Any]]]:
        """What `jax.make_jaxpr` traces, on which lists of arrays, and a key for it."""
        leaves, params_tree = jax.tree.flatten((params, self.frozen))
        input_leaves, inputs_tree = jax.tree.flatten(inputs)
        axes = self.input_batch_axes(inputs)

        def flat(param_leaves: list[Any], input_leaves: list[Any]) -> tuple[Pytree, Pytree]:
            if double:
                input_leaves = [
                    x if a is None else jax.lax.concatenate([x, x], a % jnp.ndim(x))
                    for x, a in zip(input_leaves, axes, strict=True)
                ]
            p, frozen = jax.tree.unflatten(params_tree, param_leaves)
            given = (p,) if frozen is None else (p, frozen)
            out = apply(*given, jax.tree.unflatten(inputs_tree, input_leaves))
            return _split_aux(out) if has_aux else (out, None)

        apply, has_aux = self.apply, self.has_aux  # not the network: traces are kept, and must not keep the network
        return (params_tree, inputs_tree, double), flat, (leaves, input_leaves)

    def input_batch_axes(self, inputs: Pytree) -> list[int | None]:
        """The batch axis of each leaf of `inputs`; a None among the inputs is not a leaf."""
        axes: list[int | None] = []
        try:
            jax.tree.map(
                lambda axis, sub: axes.extend([axis] * len(jax.tree.leaves(sub))),
                self.batch_axes,
                inputs,
                is_leaf=lambda axis: axis is None,
            )
        except ValueError:
            raise ValueError(
                f"batch_axes must be a prefix of the inputs, got {self.batch_axes} and inputs of the structure "
                f"{jax.tree.structure(inputs)}: give one axis (or None) per input, as in in_axes of jax.vmap"
            ) from None
        return axes

    def stated_axis(self, name: str, shape: Sequence[int], batch: int) -> int | None:
        """The batch axis that `signal_axes` gives for a hidden signal or, with the name `"outputs"`, for an output.

        Raises:
          ValueError: there is no such axis, or it does not have the size of the batch.
        """
        stated = self.signal_axes
        if isinstance(stated, Mapping):
            stated = first_match(stated, name)
        if stated is None:
            return None
        if not -len(shape) <= stated < len(shape) or shape[stated] != batch:
            raise ValueError(
                f"signal_axes says that the batch lies in axis {stated} of {name!r}, but its shape is {tuple(shape)} "
                f"and the batch {batch}: give axes by name, signal_axes={{{name!r}: ...}}"
            )
        return stated % len(shape)

    def batch_size(self, inputs: Pytree) -> int:
        """The number of examples in `inputs`.

        Raises:
          ValueError: no input has a batch axis, the batch axes have different sizes, or there are no examples.
        """
        sizes: dict[int, None] = {}  # in the order of the inputs: symbolic sizes cannot be sorted
        for leaf, axis in zip(jax.tree.leaves(inputs), self.input_batch_axes(inputs), strict=True):
            if axis is not None:
                if not -jnp.ndim(leaf) <= axis < jnp.ndim(leaf):
                    raise ValueError(
                        f"an input of shape {jnp.shape(leaf)} has no batch axis {axis}: "
                        "say where the batch lies with Network(apply, batch_axes=...)"
                    )
                sizes[jnp.shape(leaf)[axis]] = None
        if len(sizes) != 1:
            found = f"the inputs' batch axes differ in size, {list(sizes)}" if sizes else "no input has a batch axis"
            raise ValueError(f"{found}: say where the batch lies with Network(apply, batch_axes=...)")
        self.require_examples(inputs)
        (size,) = sizes
        return size

    def require_examples(self, inputs: Pytree) -> None:
        """Refuses an empty batch. Unlike `batch_size`, it serves inputs with different numbers of rows, and with none.

        Raises:
          ValueError: no input with a batch axis has an example.
        """
        axes = zip(jax.tree.leaves(inputs), self.input_batch_axes(inputs), strict=True)
        sizes = [n for leaf, axis in axes if axis is not None for n in jnp.shape(leaf)[axis:][:1]]
        if sizes and all(isinstance(n, int) and n == 0 for n in sizes):
            raise ValueError("the batch is empty, and the rule needs at least one example: leave out such a step")


NetworkLike: TypeAlias = Network | Callable[[Pytree, Pytree], Any]  # a function of (params, inputs)


def as_network(net: NetworkLike) -> Network:
    """Returns a network: a bare function becomes one.

    Args:
      net: a `Network`, or a function `apply(params, inputs)`.

    Returns:
      The network.

    Raises:
      TypeError: it is neither.

    Example:
      >>> import lrules
      >>> isinstance(lrules.extend.as_network(lambda w, x: x @ w), lrules.Network)
      True
    """
    if not callable(net):
        raise TypeError(
            f"the network must be a Network or a function apply(params, inputs), got a {type(net).__name__}: the order "
            "of the arguments is rule.init(key, net, params, inputs)"
        )
    return net if isinstance(net, Network) else Network(net)


def parameter_names(params: Pytree) -> list[str]:
    """The names of the leaves of `(parameters, frozen weights)`.

    Raises:
      ValueError: two have the same name.
    """
    names = [parameter_name(path[1:]) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"two parameters are named {twice!r}: rename one, because rules and feedback use the names")
    return names


def parameter_name(path: tuple[Any, ...]) -> str:
    """The name of a parameter: its path with `/` between the parts, without a trailing `/value`."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.removesuffix("/value") or "params"


def _without_gradient(leaf: Any) -> Any:
    """The value; an array that JAX does not trace stays as it is, so that it still says on which devices it lies."""
    return jax.lax.stop_gradient(leaf) if isinstance(leaf, jax.core.Tracer) else leaf


def _split_aux(out: Any) -> tuple[Any, Any]:
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"with has_aux=True, apply must return (outputs, aux), got a {type(out).__name__}")
    return out
