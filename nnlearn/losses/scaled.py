"""Numbers beyond the range of a float: a float with a separate exponent.

Sums of products of probabilities, as in recursions over a sequence, leave the range of a float. Their logarithms do
not, but need an ``exp`` and a ``log`` for every addition. This form needs only bit shifts, and rounds less.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Scaled(NamedTuple):
    """The number ``mantissa * 2**exponent``: integer exponents, -inf for 0; mantissas of at least 1, or 0.

    Derivatives pass through the mantissa and treat the exponent as a constant.
    """

    mantissa: jax.Array
    exponent: jax.Array


def from_log(log_value: jax.Array) -> Scaled:
    """``exp(log_value)``.

    >>> from_log(jnp.log(jnp.array([6.0, 0.0])))
    Scaled(mantissa=Array([1.5, 0. ], dtype=float32), exponent=Array([  2., -inf], dtype=float32))
    """
    log2 = log_value * (1 / math.log(2))
    exponent, is_zero = jnp.floor(log2), log2 == -jnp.inf
    return Scaled(jnp.where(is_zero, 0, jnp.exp2(jnp.where(is_zero, 0, log2 - exponent))), exponent)


def _larger(first: jax.Array, second: jax.Array) -> jax.Array:
    """A maximum in one instruction; ``jnp.maximum`` would also propagate NaN, which here (-inf + inf) means 0."""
    return jnp.where(first > second, first, second)


def _bits(dtype) -> tuple[int, int, jnp.dtype]:
    """Of a float dtype: number of fraction bits, exponent bias, and the integer dtype of its size."""
    info = jnp.finfo(dtype)
    return info.nmant, info.maxexp - 1, jnp.dtype(f"int{info.bits}")


def exact_exp2(exponent: jax.Array) -> jax.Array:
    """``2**exponent`` for integer exponents, built from the bits of a float; 0 below the least normal number."""
    fraction, bias, integer = _bits(exponent.dtype)
    # The last bits of a float n + 2**fraction are the integer n.
    number = _larger(exponent, jnp.full_like(exponent, -bias)) + (2.0**fraction + bias)
    bits = jax.lax.bitcast_convert_type(number, integer) << fraction
    return jax.lax.bitcast_convert_type(bits, exponent.dtype)


def add(first: Scaled, second: Scaled) -> Scaled:
    """``first + second``, rounded to the precision of the larger."""
    exponent = _larger(first.exponent, second.exponent)
    first_scale, second_scale = exact_exp2(first.exponent - exponent), exact_exp2(second.exponent - exponent)
    return Scaled(first.mantissa * first_scale + second.mantissa * second_scale, exponent)


def multiply(first: Scaled, second: Scaled) -> Scaled:
    """``first * second``; the mantissas grow and must be normalised before they overflow."""
    return Scaled(first.mantissa * second.mantissa, first.exponent + second.exponent)


def normalize_mantissa(number: Scaled) -> Scaled:
    """The same value with a mantissa below 2."""
    fraction, bias, integer = _bits(number.mantissa.dtype)
    biased = jax.lax.bitcast_convert_type(number.mantissa, integer) >> fraction
    scale = jax.lax.bitcast_convert_type((2 * bias - biased) << fraction, number.mantissa.dtype)
    return Scaled(number.mantissa * scale, number.exponent + (biased - bias).astype(number.mantissa.dtype))


__all__ = ["Scaled", "add", "exact_exp2", "from_log", "multiply", "normalize_mantissa"]
