"""Flax modules as networks: `from_nnx` and `from_linen` split a model into function, parameters and other state.

Flax is imported where it is used, so that `import lrules` works without it, and is quicker with it.
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

    The parameters are the `nnx.State` that `nnx.split` gives: `jax.grad` with respect to them returns what
    `nnx.Optimizer.update(model, grads)` takes, `nnx.update(model, params)` writes them back, and, holding the model's
    own variables, they follow the model when an optimizer updates it in place. Other `nnx.Param`s are frozen weights:
    they stay as they are now, and feedback stands in for them as for those that are trained. All else (flags such as
    `deterministic`, batch statistics, random streams, other variables outside `wrt`) is taken as it is now and stays
    so; what a call changes in it is discarded, or returned with `with_state`. Variables that a call creates (sown
    values) are dropped.

    Args:
      model: the module, an instance.
      wrt: the filter that selects what is trained, as in `nnx.split`: a variable type, a tuple of them, a predicate;
        by default `nnx.Param`.
      call: `call(model, inputs)`, where the model takes anything but `inputs` alone; by default `model(inputs)`.
      with_state: let the rest of the state in and out: inputs are then `(state, inputs)`, and the new state is the
        network's aux, so that batch statistics are kept and dropout masks advance.
      batch_axes: where the batch lies in `inputs`, as in `Network` (the state has none).

    Returns:
      `(network, params)`, or `(network, params, state)` with `with_state`.

    Raises:
      ImportError: Flax is not installed.
      TypeError: the model is no NNX module, or cannot be called.
      ValueError: `wrt` selects nothing.

    Warns:
      UserWarning: once, when a network without state is traced or called whose outputs depend on what it draws from a
        random stream, as with dropout: it draws the same numbers in every step.

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
            f"from_nnx takes an instance of an NNX module, and got {model!r}: build the model first, "
            "or wrap a function as Network(apply)."
        )
    if call is None and not callable(model):
        raise TypeError(f"{type(model).__name__} has no __call__: give from_nnx call=lambda model, inputs: ...")

    graphdef, params, *others = nnx.split(model, wrt, nnx.Param, ...)
    if not jax.tree.leaves(params):
        raise ValueError(f"No variable of {type(model).__name__} matches wrt={wrt}: give the type of those to train.")
    # split hands out the model's own variables: these must not follow it
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
        f"{type(model).__name__} draws from {{}}, which stands still: dropout repeats its mask in every step. Use "
        "from_nnx(..., with_state=True), or model.eval() before from_nnx.",
    )

    def stateless(params: Pytree, *args: Any) -> Any:  # the frozen weights, where there are any, and the inputs
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

    The parameters are the collection `"params"`, as it was given. The other collections are held fixed; what a call
    changes in them (batch statistics in training mode) is discarded, or returned with `with_state`.

    Args:
      module: the module.
      variables: what `module.init` returned.
      call: `call(module, inputs)` with the module bound to its variables, for several arguments, masks or training
        mode: `lambda m, x: m(x[0], mask=x[1], train=True)`. By default `module(inputs)`.
      rngs: keys for dropout and the like, as in `module.apply`: `{"dropout": key}`. With `with_state` they are part of
        the state, under `"rngs"`, and each call leaves new ones; otherwise every call draws the same numbers.
      with_state: let the other collections in and out: inputs are then `(state, inputs)`, and the new state is the
        network's aux.
      batch_axes: where the batch lies in `inputs`, as in `Network` (the state has none).

    Returns:
      `(network, params)`, or `(network, params, state)` with `with_state`, `state` a dict of collections.

    Raises:
      ImportError: Flax is not installed.
      TypeError: `module` is no Linen module.
      ValueError: `variables` has no collection `"params"`, or, when called, the module needs a key it was not given.

    Warns:
      UserWarning: once, when a network with `rngs` and without state is traced or called whose outputs depend on what
        it draws: dropout then repeats its mask.

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
            f"from_linen takes an instance of a Linen module, and got {module!r}: build the module first, "
            "or wrap a function as Network(apply)."
        )
    if not isinstance(variables, Mapping) or "params" not in variables:
        found = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            f"The variables of {type(module).__name__} need a collection 'params', and got {found}: give what "
            "module.init returned, or {'params': params}."
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
                "rngs={'dropout': key} and with_state=True, or switch dropout off in call=."
            ) from error
        return outputs, {name: changed.get(name, old) for name, old in collections.items()}

    warn = _repeated_draws(
        lambda keys, args: run(args[0], collections, args[1], keys)[0],
        rngs,
        f"{type(module).__name__} is given keys that stand still, {{}}: dropout repeats its mask in every step. Use "
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
    """The network of inputs `(state, inputs)` whose aux is the new state."""

    def apply(params: Pytree, *args: Any) -> tuple[Any, Any]:  # the frozen weights, where there are any, and the inputs
        *frozen, inputs = args
        if not isinstance(inputs, tuple | list) or len(inputs) != 2:
            raise TypeError(
                f"A network made with with_state=True takes inputs (state, inputs), and got {type(inputs).__name__}."
            )
        return run(params, *inputs, *frozen)

    return Network(apply, has_aux=True, batch_axes=(None, batch_axes))


def _like(state: nnx.State[Any, Any], after: nnx.State[Any, Any]) -> nnx.State[Any, Any]:
    """`after` without the variables that `state` lacks, so that a scan over steps can carry it."""
    from flax import nnx

    known = {path for path, _ in nnx.to_flat_state(state)}
    return nnx.from_flat_state((path, value) for path, value in nnx.to_flat_state(after) if path in known)


def _has_drawn(before: nnx.State[Any, Any], after: nnx.State[Any, Any]) -> bool:
    """Whether the call may have drawn from a random stream: that replaces its count, which lifted calls always do."""
    from flax import nnx

    new = dict(nnx.to_flat_state(after))
    counts = ((path, v) for path, v in nnx.to_flat_state(before) if isinstance(v, nnx.RngCount) and path in new)
    return any(jax.tree.leaves(v)[0] is not jax.tree.leaves(new[path])[0] for path, v in counts)


def _repeated_draws(apply: Callable[[Any, Any], Any], keys: Pytree, sentence: str) -> Callable[[Any, Any], None]:
    """`warn(params, inputs)`, which warns, once, if the outputs of `apply(keys, (params, inputs))` depend on any key.

    A key alone is no randomness: recurrent cells draw one for a carry that is zero.
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
    """The stack level of the user's line, as its caller counts: the first outside of this library, JAX and Flax."""
    import flax.core

    folders = [os.path.dirname(os.path.abspath(str(f))) for f in (__file__, jax.__file__, flax.core.__path__[0])]
    skipped = (*(folder + os.sep for folder in folders), contextlib.__file__, functools.__file__)
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(skipped):
        level, frame = level + 1, frame.f_back
    return level
