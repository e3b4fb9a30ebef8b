"""Numbers rounded to signed powers of two."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrules.options import ByName, by_name, is_positive, is_whole
from lrules.typing import Numbers

LEVELS = 2**12  # more powers of two below one than any float has


def quantize(x: jax.Array, bits: int, scale: float) -> jax.Array:
    """Rounds numbers to signed powers of two, times alpha.

    Q(x) = alpha sign(x) 2^round(clip(log2 |x / alpha|, 1 - bits, 0)),  Q(0) = 0

    So there are `bits` magnitudes, and the largest is alpha. Numbers that are small but not zero get the smallest
    magnitude. The function does not use a logarithm: |x / alpha| = m 2^p with 1/2 <= m < 1 is rounded to 2^p if
    m^2 >= 1/2, else to 2^(p - 1). This is exact, and there are no ties, because no float has the square one half. The
    quotient has the precision of x, at least float32; if alpha is a power of two, it is exact. NaN stays NaN. For
    complex numbers, the real and the imaginary part are quantised.

    Args:
      x: an array.
      bits: the number of magnitudes, at least 1.
      scale: alpha, the largest magnitude.

    Returns:
      An array with the shape and dtype of x.

    Example:
      >>> quantize(jnp.array([3.0, 0.3, -0.001, 0.0]), bits=3, scale=1.0).tolist()
      [1.0, 0.25, -0.25, 0.0]

    References:
      Baldi, Sadowski, Lu (2018), Eq. 19.
    """
    if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
        return by_parts(lambda part: quantize(part, bits, scale), jnp.asarray(x))
    wide = jnp.asarray(x)
    wide = wide.astype(jnp.float32) if jnp.finfo(wide.dtype).bits < 32 else wide
    ratio = jnp.abs(wide) / scale
    if bits <= -jnp.finfo(wide.dtype).minexp:
        level = jnp.asarray(scale, wide.dtype) * _power(ratio, bits)
    else:  # powers below the smallest normal number
        mantissa, power = jnp.frexp(ratio)
        exponent = jnp.clip(jnp.where(mantissa >= _root_half(wide.dtype), power, power - 1), 1 - min(bits, LEVELS), 0)
        level = jnp.ldexp(jnp.asarray(scale, wide.dtype), exponent)
    return (jnp.sign(wide) * level).astype(jnp.result_type(x))


def _power(ratio: jax.Array, bits: int) -> jax.Array:
    """2^round(clip(log2 ratio, 1 - bits, 0)) by integer arithmetic on the bits of the floats, the fastest way.

    The exponent of a float stands above its mantissa. The sum adds one to it where the mantissa is at least sqrt(2).
    """
    info = jnp.finfo(ratio.dtype)
    integer: Any = np.dtype(f"int{info.bits}")
    one = 1 << info.nmant
    root = int(2 * _root_half(ratio.dtype) * 2**info.nmant) - one  # the mantissa of the smallest root of two
    bias = 1 - info.minexp
    exponent = (jax.lax.bitcast_convert_type(ratio, integer) + (one - root)) >> info.nmant
    return jax.lax.bitcast_convert_type(jnp.clip(exponent, bias + 1 - bits, bias) << info.nmant, ratio.dtype)


def by_parts(fn: Callable[..., Any], x: jax.Array) -> Any:
    """The function of a real array; for a complex array, the function of its real and imaginary parts."""
    return jax.lax.complex(fn(x.real), fn(x.imag)) if jnp.issubdtype(x.dtype, jnp.complexfloating) else fn(x)


def _root_half(dtype: Any) -> Any:
    """The smallest number of the dtype whose square is at least one half."""
    root = np.asarray(math.sqrt(0.5), dtype)
    while Fraction(float(root)) ** 2 >= Fraction(1, 2):
        root = np.nextafter(root, np.asarray(0, dtype))
    return np.nextafter(root, np.asarray(1, dtype))


def quantizer_numbers(bits: Numbers, scale: Numbers, kind: str) -> tuple[ByName[Any], ByName[Any]]:
    """The options of a quantizer, for names of this kind.

    Raises:
      ValueError: one is out of range.
    """
    return (
        by_name("bits", bits, lambda value: is_whole(value) and value >= 1, "an integer >= 1", kind),
        by_name("scale", scale, is_positive, "a finite number > 0", kind, traced=True),
    )
