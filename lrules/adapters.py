"""Flax modules as networks: `from_nnx` and `from_linen` split a model into a function, parameters and other state.

Each function imports Flax itself. So `import lrules` works without Flax, and takes less time with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import jax

from lrules.network import Network
from lrules.typing import Pytree

if TYPE_CHECKING:
    from flax import linen as nn
    from flax import nnx


@overload
def from_nnx(
    model: nnx.Module,
    wrt: Any = ...,
    *,
    call: Callable[[Any, Any], Any] | None = ...,
    with_state: Literal[False] = ...,
    batch_axes: Pytree = ...,
) -> tuple[Network, nnx.State[Any, Any]]: ...
@overload
def from_nnx(
    model: nnx.Module,
    wrt: Any = ...,
    *,
    call: Callable[[Any, Any], Any] | None = ...,
    with_state: Literal[True],
    batch_axes: Pytree = ...,
) -> tuple[Network, nnx.State[Any, Any], nnx.State[Any, Any]]: ...
@overload
def from_nnx(
    model: nnx.Module,
    wrt: Any = ...,
    *,
    call: Callable[[Any, Any], Any] | None = ...,
    with_state: bool,
    batch_axes: Pytree = ...,
) -> tuple[Network, nnx.State[Any, Any]] | tuple[Network, nnx.State[Any, Any], nnx.State[Any, Any]]: ...
def from_nnx(
    model: nnx.Module,
    wrt: Any = None,
    *,
    call: Callable[[Any, Any], Any] | None = None,
    with_state: bool = False,
    batch_axes: Pytree = 0,
) -> tuple[Network, nnx.State[Any, Any]] | tuple[Network, nnx.State[Any, Any], nnx.State[Any, Any]]:
    """Splits an NNX model into a network and the parameters to train.

    network(params, inputs) = model(inputs)

    The parameters are the `nnx.State` that `nnx.split` returns. `nnx.Optimizer.update(model, grads)` takes the
    gradients that `jax.grad` computes with respect to them, and `nnx.update(model, params)` writes them back. They hold
    the variables of the model itself, so they follow the model when an optimizer updates it in place.

    Other `nnx.Param`s are frozen weights: they keep their present values, and they get feedback like the weights that
    are trained. Everything else (flags such as `deterministic`, batch statistics, random streams, other variables
    outside `wrt`) keeps its present value too. If a call changes it, the network discards the change, or returns it if
    `with_state` is True. The network drops variables that a call creates (sown values).

    Args:
      model: the module, an instance.
      wrt: the filter that selects what to train, as in `nnx.split`: a variable type, a tuple of them, or a predicate.
        Default `nnx.Param`.
      call: `call(model, inputs)`, for a model that takes more than `inputs`; default `model(inputs)`.
      with_state: gives the network the rest of the state. Its inputs are then `(state, inputs)`, and its aux is the new
        state. So batch statistics are kept and dropout masks change.
      batch_axes: where the batch lies in `inputs`, as in `Network` (the state has no batch).

    Returns:
      `(network, params)`, or `(network, params, state)` if `with_state` is True.

    Raises:
      ImportError: Flax is not installed.
      TypeError: `model` is not an NNX module, or it cannot be called.
      ValueError: `wrt` selects no variable, or variables change in place (`nnx.var_defaults` with hijax or ref).

    Warns:
      UserWarning: the outputs of a network without state depend on numbers that it draws from a random stream, for
        example for dropout. It draws the same numbers in every step. The warning comes once, when the network is traced
        or called.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> from flax import nnx
      >>> net, params = lrules.from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
      >>> net(params, jnp.ones((4, 3))).shape
      (4, 2)
    """
    _require_flax("from_nnx")
    from flax import linen as nn
    from flax import nnx

    wrt = nnx.Param if wrt is None else wrt
    if isinstance(model, nn.Module):
        raise TypeError(f"{type(model).__name__} is a Linen module: use from_linen(module, variables).")
    if isinstance(model, type) or not isinstance(model, nnx.Pytree):
        raise TypeError(
            f"from_nnx: the model must be an instance of an NNX module, got {model!r}: build the model first, "
            "or wrap a function as Network(apply)."
        )
    if call is None and not callable(model):
        raise TypeError(f"{type(model).__name__} has no __call__: give from_nnx call=lambda model, inputs: ...")

    graphdef, params, *others = nnx.split(model, wrt, nnx.Param, ...)
    variables = jax.tree.leaves((params, others), is_leaf=lambda x: isinstance(x, nnx.Variable))
    if any(getattr(v, "hijax", False) or getattr(v, "ref", False) for v in variables):
        convert = "with_vars" if hasattr(nnx, "with_vars") else "vars_as"  # Flax 0.12.4 has the old name
        raise ValueError(
            f"{type(model).__name__} has variables that change in place (nnx.var_defaults with hijax or ref): use "
            f"from_nnx(nnx.{convert}(model, hijax=False, ref=False))."
        )
    if not jax.tree.leaves(params):
        raise ValueError(f"No variable of {type(model).__name__} matches wrt={wrt}: give a type of variables to train.")
    # split returns the variables of the model itself: copies do not follow the model
    frozen, state = jax.tree.map(lambda x: x, others)
    given = {"frozen": frozen} if jax.tree.leaves(frozen) else {}

    def run(params: Pytree, state: Pytree, inputs: Pytree, frozen: Any = frozen) -> tuple[Any, Any]:
        merged = nnx.merge(graphdef, params, frozen, state, copy=True)
        outputs = merged(inputs) if call is None else call(merged, inputs)
        return outputs, _like(state, nnx.state(merged, nnx.Not(nnx.Any(wrt, nnx.Param))))

    keys, unkeyed = nnx.split_state(state, nnx.RngKey, ...)
    warn = _repeated_draws(
        lambda keys, args: run(args[0], nnx.merge_state(keys, unkeyed), args[1])[0],
        keys,
        f"{type(model).__name__} draws from {{}}, which does not change: dropout repeats its mask in every step. Use "
        "from_nnx(..., with_state=True), or model.eval() before from_nnx.",
    )

    def stateless(params: Pytree, *args: Any) -> Any:  # the frozen weights, if there are any, and the inputs
        *weights, inputs = args
        outputs, after = run(params, state, inputs, *weights)
        if _has_drawn(state, after):
            warn(params, inputs)
        return outputs

    if not with_state:
        return Network(stateless, batch_axes=batch_axes, **given), params
    return dataclasses.replace(_stateful(run, batch_axes), **given), params, state


@overload
def from_linen(
    module: nn.Module,
    variables: Mapping[str, Any],
    *,
    call: Callable[[Any, Any], Any] | None = ...,
    rngs: Pytree = ...,
    with_state: Literal[False] = ...,
    batch_axes: Pytree = ...,
) -> tuple[Network, Pytree]: ...
@overload
def from_linen(
    module: nn.Module,
    variables: Mapping[str, Any],
    *,
    call: Callable[[Any, Any], Any] | None = ...,
    rngs: Pytree = ...,
    with_state: Literal[True],
    batch_axes: Pytree = ...,
) -> tuple[Network, Pytree, dict[str, Any]]: ...
@overload
def from_linen(
    module: nn.Module,
    variables: Mapping[str, Any],
    *,
    call: Callable[[Any, Any], Any] | None = ...,
    rngs: Pytree = ...,
    with_state: bool,
    batch_axes: Pytree = ...,
) -> tuple[Network, Pytree] | tuple[Network, Pytree, dict[str, Any]]: ...
def from_linen(
    module: nn.Module,
    variables: Mapping[str, Any],
    *,
    call: Callable[[Any, Any], Any] | None = None,
    rngs: Pytree = None,
    with_state: bool = False,
    batch_axes: Pytree = 0,
) -> tuple[Network, Pytree] | tuple[Network, Pytree, dict[str, Any]]:
    """Splits a Linen module and its variables into a network and the parameters to train.

    network(params, inputs) = module.apply({"params": params, ...}, inputs)

    The parameters are the collection `"params"` of `variables`. The other collections keep their values. If a call
    changes them (batch statistics in training mode), the network discards the change, or returns it if `with_state` is
    True.

    Args:
      module: the module.
      variables: the result of `module.init`.
      call: `call(module, inputs)`, where the module is bound to its variables, for several arguments, masks or training
        mode: `lambda m, x: m(x[0], mask=x[1], train=True)`. Default `module(inputs)`.
      rngs: keys for dropout and the like, as in `module.apply`: `{"dropout": key}`. If `with_state` is True, they are
        part of the state, under `"rngs"`, and each call returns new ones. Otherwise every call draws the same numbers.
      with_state: gives the network the other collections. Its inputs are then `(state, inputs)`, and its aux is the new
        state.
      batch_axes: where the batch lies in `inputs`, as in `Network` (the state has no batch).

    Returns:
      `(network, params)`, or `(network, params, state)` if `with_state` is True; `state` is a dict of collections.

    Raises:
      ImportError: Flax is not installed.
      TypeError: `module` is not a Linen module.
      ValueError: `variables` has no collection `"params"`. The network raises it too, if the module needs a key and
        `rngs` has none for it.

    Warns:
      UserWarning: the outputs of a network with `rngs` and without state depend on the numbers that it draws, so
        dropout repeats its mask. The warning comes once, when the network is traced or called.

    Example:
      >>> import jax, jax.numpy as jnp, lrules
      >>> from flax import linen as nn
      >>> module, x = nn.Dense(2), jnp.ones((4, 3))
      >>> net, params = lrules.from_linen(module, module.init(jax.random.key(0), x))
      >>> net(params, x).shape
      (4, 2)
    """
    _require_flax("from_linen")
    import flax.core
    import flax.errors
    from flax import linen as nn
    from flax import nnx

    if isinstance(module, nnx.Pytree):
        raise TypeError(f"{type(module).__name__} is an NNX module: use from_nnx(model).")
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"from_linen: the module must be an instance of a Linen module, got {module!r}: build the module first, "
            "or wrap a function as Network(apply)."
        )
    if not isinstance(variables, Mapping) or "params" not in variables:
        found = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            f"The variables of {type(module).__name__} must have a collection 'params', got {found}: give the result "
            "of module.init, or {'params': params}."
        )
    params = variables["params"]
    collections = flax.core.unfreeze({name: variables[name] for name in variables if name != "params"})

    def run(params: Pytree, collections: Any, inputs: Pytree, keys: Any) -> tuple[Any, dict[str, Any]]:
        method = None if call is None else lambda bound, inputs: call(bound, inputs)
        try:
            outputs, changed = module.apply(
                {"params": params, **collections}, inputs, rngs=keys, mutable=list(collections), method=method
            )
        except flax.errors.InvalidRngError as error:
            raise ValueError(
                f"{type(module).__name__} draws random numbers and has no key for them: give from_linen "
                "rngs={'dropout': key} and with_state=True, or switch dropout off in call."
            ) from error
        return outputs, {name: changed.get(name, old) for name, old in collections.items()}

    warn = _repeated_draws(
        lambda keys, args: run(args[0], collections, args[1], keys)[0],
        rngs,
        f"{type(module).__name__} gets keys that do not change, {{}}: dropout repeats its mask in every step. Use "
        "from_linen(..., rngs=rngs, with_state=True).",
    )

    def stateless(params: Pytree, inputs: Pytree) -> Any:
        warn(params, inputs)
        return run(params, collections, inputs, rngs)[0]

    if not with_state:
        return Network(stateless, batch_axes=batch_axes), params

    def step(params: Pytree, state: Pytree, inputs: Pytree) -> tuple[Any, ...]:
        if rngs is None:
            return run(params, state, inputs, None)
        pairs = jax.tree.map(jax.random.split, state["rngs"])
        keys, following = (jax.tree.map(lambda pair, i=i: pair[i], pairs) for i in (0, 1))
        outputs, after = run(params, {name: state[name] for name in state if name != "rngs"}, inputs, keys)
        return outputs, {**after, "rngs": following}

    state = collections if rngs is None else {**collections, "rngs": rngs}
    return _stateful(step, batch_axes), params, state


def _require_flax(caller: str) -> None:
    """Flax can be imported.

    Raises:
      ImportError: it cannot, and `caller` needs it.
    """
    try:
        import flax  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "flax":  # it is there, and lacks something else
            raise
        raise ImportError(f"{caller} needs Flax, which is not installed: pip install flax", name="flax") from error


def _stateful(run: Callable[..., tuple[Any, Any]], batch_axes: Pytree) -> Network:
    """The network that takes inputs `(state, inputs)` and returns the new state as its aux."""

    def apply(params: Pytree, *args: Any) -> tuple[Any, Any]:  # the frozen weights, if there are any, and the inputs
        *frozen, inputs = args
        if not isinstance(inputs, tuple | list) or len(inputs) != 2:
            raise TypeError(
                f"The inputs of a network with with_state=True must be (state, inputs), got a {type(inputs).__name__}."
            )
        return run(params, *inputs, *frozen)

    return Network(apply, has_aux=True, batch_axes=(None, batch_axes))


def _like(state: nnx.State[Any, Any], after: nnx.State[Any, Any]) -> nnx.State[Any, Any]:
    """`after` without the variables that `state` does not have, so that a scan over steps can carry it."""
    from flax import nnx

    known = {path for path, _ in nnx.to_flat_state(state)}
    return nnx.from_flat_state((path, value) for path, value in nnx.to_flat_state(after) if path in known)


def _has_drawn(before: nnx.State[Any, Any], after: nnx.State[Any, Any]) -> bool:
    """Whether the call may have drawn from a random stream: a draw replaces its count (lifted calls always do so)."""
    from flax import nnx

    new = dict(nnx.to_flat_state(after))
    counts = ((path, v) for path, v in nnx.to_flat_state(before) if isinstance(v, nnx.RngCount) and path in new)
    return any(jax.tree.leaves(v)[0] is not jax.tree.leaves(new[path])[0] for path, v in counts)


def _repeated_draws(apply: Callable[[Any, Any], Any], keys: Pytree, sentence: str) -> Callable[[Any, Any], None]:
    """A function `warn(params, inputs)`: it warns once, if the outputs of `apply(keys, (params, inputs))` use a key.

    A key that is drawn and not used is not a reason to warn: recurrent cells draw one for a carry that is zero.
    """
    traced: list[Network] = []

    def warn(params: Pytree, inputs: Pytree) -> None:
        if traced or not jax.tree.leaves(keys):
            return
        traced.append(Network(apply))
        graph = traced[0].graph(keys, (params, inputs))
        used = dict.fromkeys(graph.names[i].removesuffix("/key") for out in graph.outs for i in sorted(out.params))
        if used:
            warnings.warn(sentence.format(", ".join(used)), stacklevel=_users_level())

    return warn


def _users_level() -> int:
    """The stack level of the user's line for the caller: the first line outside this library, JAX and Flax."""
    import flax.core

    folders = [os.path.dirname(os.path.abspath(str(f))) for f in (__file__, jax.__file__, flax.core.__path__[0])]
    skipped = (*(folder + os.sep for folder in folders), contextlib.__file__, functools.__file__)
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(skipped):
        level, frame = level + 1, frame.f_back
    return level
