"""Arrays in fewer bits: 8-bit block codes, and rounding to 16 and 24 bits, all of them stochastic and unbiased."""

import jax
import jax.numpy as jnp

from nnlearn.native.codes import BLOCK, Coded, decode, encode, random_bits


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


__all__ = ["BLOCK", "Coded", "decode", "encode", "join", "round_to_bfloat16", "split"]
