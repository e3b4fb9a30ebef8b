"""The types in the annotations of the library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax

Pytree: TypeAlias = Any  # containers of arrays, as in `jax.tree`; types cannot say more
Initializer: TypeAlias = Callable[..., jax.Array]  # `(key, shape, dtype) -> array`, as in `jax.nn.initializers`
Loss: TypeAlias = Callable[[Any, Any], jax.typing.ArrayLike]  # `(outputs, targets) -> [batch]` or `[batch, ...]`
AxisName: TypeAlias = str | Sequence[str] | None  # mesh axes, named as in `shard_map` and `pmap`
Numbers: TypeAlias = float | Mapping[str, float]  # one for all names, or by regular expression: the first match holds
