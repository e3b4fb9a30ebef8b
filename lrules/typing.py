"""The words of the library's annotations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax

Pytree: TypeAlias = Any  # containers with arrays at their leaves, as `jax.tree` sees them; types cannot say more
Initializer: TypeAlias = Callable[..., jax.Array]  # `(key, shape, dtype) -> array`, as in `jax.nn.initializers`
Loss: TypeAlias = Callable[[Any, Any], jax.typing.ArrayLike]  # `(outputs, targets) -> [batch]` or `[batch, ...]`
AxisName: TypeAlias = str | Sequence[str] | None  # axes of a mesh, as `shard_map` and `pmap` name them
