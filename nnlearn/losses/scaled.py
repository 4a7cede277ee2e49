"""Numbers far beyond a float's range: a float, and beside it an exponent of its own.

Sums of products of probabilities, as in recursions over a sequence, leave the range of a float. Their logarithms do
not, but cost an ``exp`` and a ``log`` for every addition. These cost shifts of bits, and round less.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Scaled(NamedTuple):
    """The number ``mantissa * 2**exponent``: whole exponents, -inf for 0; mantissas of at least 1, or 0.

    The exponent is a constant to derivatives, which go through the mantissa.
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
    """One instruction, where ``jnp.maximum`` is several: it carries NaN on, and here that of -inf + inf means 0."""
    return jnp.where(first > second, first, second)


def _bits(dtype) -> tuple[int, int, jnp.dtype]:
    """Of a float: how many bits its fraction has, what is added to its exponent, and the integers of its size."""
    info = jnp.finfo(dtype)
    return info.nmant, info.maxexp - 1, jnp.dtype(f"int{info.bits}")


def exact_exp2(exponent: jax.Array) -> jax.Array:
    """``2**exponent`` of whole exponents, put into a float's bits; 0 below the least normal number."""
    fraction, bias, integer = _bits(exponent.dtype)
    # A whole number plus 2**fraction has that number in its last bits.
    number = _larger(exponent, jnp.full_like(exponent, -bias)) + (2.0**fraction + bias)
    bits = jax.lax.bitcast_convert_type(number, integer) << fraction
    return jax.lax.bitcast_convert_type(bits, exponent.dtype)


def add(first: Scaled, second: Scaled) -> Scaled:
    """``first + second``; what is under the last digit of the larger is lost, as in any sum of floats."""
    exponent = _larger(first.exponent, second.exponent)
    first_scale, second_scale = exact_exp2(first.exponent - exponent), exact_exp2(second.exponent - exponent)
    return Scaled(first.mantissa * first_scale + second.mantissa * second_scale, exponent)


def multiply(first: Scaled, second: Scaled) -> Scaled:
    """``first * second``; mantissas grow, and have to be normalized in time."""
    return Scaled(first.mantissa * second.mantissa, first.exponent + second.exponent)


def normalize_mantissa(number: Scaled) -> Scaled:
    """The same number, with a mantissa below 2."""
    fraction, bias, integer = _bits(number.mantissa.dtype)
    biased = jax.lax.bitcast_convert_type(number.mantissa, integer) >> fraction
    scale = jax.lax.bitcast_convert_type((2 * bias - biased) << fraction, number.mantissa.dtype)
    return Scaled(number.mantissa * scale, number.exponent + (biased - bias).astype(number.mantissa.dtype))


__all__ = ["Scaled", "add", "exact_exp2", "from_log", "multiply", "normalize_mantissa"]
