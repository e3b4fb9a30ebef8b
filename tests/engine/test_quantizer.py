"""The quantizer of signed powers of two: whole numbers are the reference."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrules.engine.quantizer import quantize, quantizer_numbers
from tests.reference import (
    quantise,
)


def integer_reference(x, bits, scale):
    """Eq. 19 in whole numbers: |x / alpha| = n / d, and 2^k is nearest if 2^(2k - 1) <= (n / d)^2 < 2^(2k + 1)."""
    if x == 0:
        return 0.0
    ratio = abs(Fraction(float(x)) / Fraction(float(scale)))
    n, d = ratio.numerator, ratio.denominator
    k = n.bit_length() - d.bit_length()
    while 2 * n * n >= d * d * 4 ** (k + 1) if k + 1 >= 0 else 2 * n * n * 4 ** (-k - 1) >= d * d:
        k += 1
    while 2 * n * n < d * d * 4**k if k >= 0 else 2 * n * n * 4**-k < d * d:
        k -= 1
    return math.copysign(scale * 2.0 ** max(min(k, 0), 1 - bits), x)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_quantizer_is_the_integer_reference(dtype):
    """At the ties' neighbours too: 2^(k - 1/2) is never a float, so its two neighbours round to either side."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        edges = np.asarray([2.0 ** (k - 0.5) for k in range(-12, 4)], dtype)
        x = np.concatenate(
            [edges, np.nextafter(edges, dtype(0)), np.nextafter(edges, dtype(9)), 2.0 ** np.arange(-9.0, 3)]
        )
        x = np.concatenate([x, rng.normal(size=300) * 10.0 ** rng.uniform(-6, 3, size=300)]).astype(dtype)
        x = np.concatenate([x, -x, [0.0, -0.0, np.inf]]).astype(dtype)
        for bits in (1, 2, 5, 10):
            for scale in (0.125, 2**-6, 1.0):
                got = jax.jit(quantize, static_argnums=(1, 2))(x, bits, scale)
                assert got.dtype == dtype
                wanted = [scale if np.isinf(v) else integer_reference(v, bits, scale) for v in x]
                np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted, dtype))
                if dtype == np.float64:
                    np.testing.assert_array_equal(
                        np.asarray(quantize(x[:-1], bits, 0.3)), quantise.quantise(x[:-1], bits, 0.3)
                    )


@settings(max_examples=50)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False), st.integers(1, 12))
def test_quantizer_on_any_float(x, bits):
    assert float(quantize(jnp.float32(x), bits, 0.125)) == integer_reference(x, bits, 0.125)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_more_bits_than_floats_have_change_nothing(dtype):
    with jax.enable_x64(True):
        x = jnp.asarray([0.1, -1e-30, float(jnp.finfo(dtype).tiny), 3.0, 0.0], dtype)
        for bits in (2**31, 2**32, 2**40, 2**63):
            np.testing.assert_array_equal(quantize(x, bits, 0.125), quantize(x, 1500, 0.125))


def test_quantizer_in_low_precision_and_at_nan():
    x = jnp.asarray([0.1, -0.01, 0.0, 3.0], jnp.bfloat16)
    got = quantize(x, 4, 0.125)
    assert got.dtype == jnp.bfloat16 and got.tolist() == [0.125, -0.015625, 0.0, 0.125]
    assert np.isnan(quantize(jnp.asarray(np.nan), 4, 0.125))


def test_quantizer_of_complex_numbers():
    x = np.random.default_rng(0).normal(size=50) * 10.0 ** np.arange(-25, 25)
    z = np.asarray(x + 1j * x[::-1], np.complex64)
    got = quantize(z, 4, 0.125)
    assert got.dtype == np.complex64
    np.testing.assert_array_equal(got.real, quantize(z.real, 4, 0.125))
    np.testing.assert_array_equal(got.imag, quantize(z.imag, 4, 0.125))


@pytest.mark.parametrize("option", ["bits", "scale"])
def test_options_out_of_range(option):
    bad = {"bits": (0, -1, 1.5, "two"), "scale": (0, -1.0, float("inf"), float("nan"), "one")}
    for value in bad[option]:
        with pytest.raises((TypeError, ValueError), match=option):
            quantizer_numbers(**({"bits": 4, "scale": 1.0} | {option: value}), kind="layer")
    quantizer_numbers(1, 0.5, "layer")
