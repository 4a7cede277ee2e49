"""Arrays in fewer bits: 8-bit block codes, and rounding to 16 and 24 bits, all of them stochastic and unbiased."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 256  # numbers that share a scale: 4 / 256 bytes for each
SIGNED_POWER, UNSIGNED_POWER = 2, 4  # of the companding: more levels near 0


class Coded(NamedTuple):
    """A float array as 8-bit codes, with a scale for each block of the flat array.

    Attributes:
      codes: uint8, in the array's shape.
      scales: float32 (blocks,), the largest magnitude; negative if the block has negative numbers.
    """

    codes: jax.Array
    scales: jax.Array


def random_bits(seed: jax.Array, size: int) -> jax.Array:
    """Random 32-bit numbers (size,) from a seed, by a hash of the position that fuses with what follows.

    It costs six integer operations for each number, a small part of ``jax.random.bits``, and is random enough to round
    with (the mixing function is lowbias32 of Chris Wellons).

    >>> random_bits(jnp.uint32(7), 3).shape
    (3,)
    """
    x = jax.lax.iota(jnp.uint32, size) * jnp.uint32(0x9E3779B9) + seed.astype(jnp.uint32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def uniform(seed: jax.Array, size: int) -> jax.Array:
    """Random float32 numbers (size,) in [0, 1), see ``random_bits``."""
    return (random_bits(seed, size) >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def _level(codes: jax.Array, signed: jax.Array) -> jax.Array:
    """The number in [-1, 1] that a code stands for."""
    offset = codes.astype(jnp.float32) - 128
    both, one = offset / 127, codes.astype(jnp.float32) / 255
    return jnp.where(signed, both * jnp.abs(both) ** (SIGNED_POWER - 1), one**UNSIGNED_POWER)


def encode(x: jax.Array, seed: jax.Array) -> Coded:
    r"""Code an array in 8 bits, with stochastic rounding: the expected decoded array is the array.

    .. math:: x \approx s \operatorname{sign}(c) (c / 127)^2 \text{ where a block has negative numbers, }
        x \approx s (c / 255)^4 \text{ elsewhere}

    A positive number of the second kind never becomes 0, as a second moment must not: below the first level it is
    rounded up. NaN and infinity make their whole block NaN.

    Args:
      x: a float array of any shape.
      seed: a uint32 scalar.

    >>> coded = encode(jnp.array([0.5, -1.0, 0.0]), jnp.uint32(0))
    >>> decode(coded)
    Array([ 0.5..., -1. ,  0. ], dtype=float32)
    """
    flat = jnp.ravel(x).astype(jnp.float32)
    blocks = -(-flat.size // BLOCK)
    flat = jnp.pad(flat, (0, blocks * BLOCK - flat.size)).reshape(blocks, BLOCK)
    scale = jnp.max(jnp.abs(flat), axis=1, keepdims=True)
    signed = jnp.any(flat < 0, axis=1, keepdims=True)
    scaled = flat * jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    size = jnp.minimum(jnp.abs(scaled), 1)
    root = jnp.sqrt(size)
    below = jnp.where(signed, jnp.floor(root * 127), jnp.floor(jnp.sqrt(root) * 255))
    # the two levels around the magnitude; the probability of the upper one makes the mean exact
    most = jnp.where(signed, 127.0, 255.0)
    low, high = (_power(jnp.minimum(one, most) / most, signed) for one in (below, below + 1))
    share = jnp.where(high > low, (size - low) / jnp.where(high > low, high - low, 1), 0)
    up = uniform(seed, blocks * BLOCK).reshape(blocks, BLOCK) < share
    code = jnp.minimum(below + up, most)
    code = jnp.where(signed, 128 + jnp.sign(scaled) * code, jnp.where(size > 0, jnp.maximum(code, 1), 0))
    broken = jnp.where(jnp.isfinite(scale), 1, jnp.nan)
    scales = (jnp.where(signed, -scale, scale) * broken)[:, 0]
    return Coded(code.astype(jnp.uint8).ravel()[: x.size].reshape(x.shape), scales)


def _power(fraction: jax.Array, signed: jax.Array) -> jax.Array:
    square = jnp.square(fraction)
    return jnp.where(signed, square, jnp.square(square))


def decode(coded: Coded) -> jax.Array:
    """The float32 array that codes stand for, see ``encode``."""
    codes, scales = coded.codes.ravel(), coded.scales[:, None]
    padded = jnp.pad(codes, (0, scales.shape[0] * BLOCK - codes.size)).reshape(-1, BLOCK)
    values = _level(padded, scales < 0) * jnp.abs(scales)
    return values.ravel()[: codes.size].reshape(coded.codes.shape)


def _as_bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)


def _from_bits(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _drop_bits(x: jax.Array, count: int, seed: jax.Array) -> jax.Array:
    """Set the last bits of float32 numbers to 0, by stochastic rounding; infinity and NaN stay."""
    bits = _as_bits(x)
    noise = (random_bits(seed, x.size) >> (32 - count)).reshape(x.shape)
    return jnp.where(jnp.isfinite(x), _from_bits((bits + noise) >> count << count), x.astype(jnp.float32))


def round_to_bfloat16(x: jax.Array, seed: jax.Array) -> jax.Array:
    """Round float32 numbers to bfloat16 at random, so that the mean is the number.

    >>> round_to_bfloat16(jnp.array([1.0, 1.001]), jnp.uint32(0)).dtype
    dtype(bfloat16)
    """
    return _drop_bits(x, 16, seed).astype(jnp.bfloat16)


def split(x: jax.Array, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Split float32 numbers into the nearest bfloat16 and 8 more bits, ``(top, rest)``, rounded stochastically to 24.

    >>> top, rest = split(jnp.array([0.1]), jnp.uint32(0))
    >>> top, rest.dtype, abs(join(top, rest) - 0.1) < 2e-6
    (Array([0.100098], dtype=bfloat16), dtype('int8'), Array([ True], dtype=bool))
    """
    bits = _as_bits(_drop_bits(x, 8, seed)) >> 8  # 24 bits
    top = (bits + 128) >> 8
    rest = (bits.astype(jnp.int32) - (top << 8).astype(jnp.int32)).astype(jnp.int8)
    return _from_bits(top << 16).astype(jnp.bfloat16), jnp.where(jnp.isfinite(x), rest, 0)


def join(top: jax.Array, rest: jax.Array) -> jax.Array:
    """The float32 numbers that ``split`` made into two parts."""
    bits = (_as_bits(top) >> 8).astype(jnp.int32) + rest.astype(jnp.int32)
    return jnp.where(jnp.isfinite(top), _from_bits(bits.astype(jnp.uint32) << 8), top.astype(jnp.float32))


__all__ = ["BLOCK", "Coded", "decode", "encode", "join", "random_bits", "round_to_bfloat16", "split", "uniform"]
