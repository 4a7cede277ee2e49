"""8-bit codes of float arrays, and their arithmetic: in C, see ``codes.h``, and by JAX's operations.

``elementwise.py`` makes one loop of decoding, an update and encoding; without an update around them, each is a loop.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import ShapedArray

from nnlearn.native.kernel import KERNEL, call_kernel, runs_here

BLOCK = 256  # numbers that share a scale: 4 / 256 bytes for each
UNIT = 64  # blocks per unit of work
HEADER = Path(__file__).with_name("codes.h")
SOURCE = """
typedef struct {{
  int64_t elements;
  uint32_t seed;
  float *values, *scales;
  uint8_t* codes;
}} Work;

static void run(void* data, int64_t unit) {{
  const Work* work = data;
  for (int64_t group = unit * UNIT; group < (unit + 1) * UNIT && group * GROUP < work->elements; group++) {{
    const int64_t at = group * GROUP, count = at + GROUP < work->elements ? GROUP : work->elements - at;
    {each}
  }}
}}

XLA_FFI_Error* {name}(XLA_FFI_CallFrame* frame) {{
  if (answered(frame)) return NULL;
  Work work = {{.elements = length(frame->args.args[0]), {fields}}};
  run_blocks(frame, (work.elements + UNIT * GROUP - 1) / (UNIT * GROUP), run, &work);
  return NULL;
}}
"""


class Coded(NamedTuple):
    """A float array as 8-bit codes, with a scale for each block of the flat array.

    Attributes:
      codes: uint8, in the array's shape.
      scales: float32 (blocks,), the largest magnitude; negative if the block has negative numbers.
    """

    codes: jax.Array
    scales: jax.Array


@dataclasses.dataclass(frozen=True)
class _CodesKernel:
    flags = (f"-DUNIT={UNIT}",)
    in_place = ()

    def reference(self, *values: Any) -> Any:
        raise NotImplementedError

    def vmapped(self, axes, *values):
        results = jax.vmap(self.reference, in_axes=axes)(*values)
        return results, [0] * len(results)


@dataclasses.dataclass(frozen=True)
class EncodeKernel(_CodesKernel):
    """A ``Kernel`` from an array and a seed to its codes and scales."""

    handler = "encode"

    @property
    def source(self) -> str:
        each = "work->scales[group] = encode_group(work->codes + at, work->values + at, work->seed, at, count);"
        fields = ".values = argument(frame, 0), .seed = *(uint32_t*)argument(frame, 1), "
        fields += ".codes = result(frame, 0), .scales = result(frame, 1)"
        return HEADER.read_text() + SOURCE.format(name="encode", each=each, fields=fields)

    def results(self, x, seed):
        return [ShapedArray(x.shape, jnp.uint8), ShapedArray((-(-x.size // BLOCK),), jnp.float32)]

    def reference(self, x: jax.Array, seed: jax.Array) -> list[jax.Array]:
        return list(_encode(x, seed))


@dataclasses.dataclass(frozen=True)
class DecodeKernel(_CodesKernel):
    """A ``Kernel`` from codes and scales to the array."""

    handler = "decode"

    @property
    def source(self) -> str:
        each = "decode_group(work->values + at, work->codes + at, work->scales[group], count);"
        fields = ".codes = argument(frame, 0), .scales = argument(frame, 1), .values = result(frame, 0)"
        return HEADER.read_text() + SOURCE.format(name="decode", each=each, fields=fields)

    def results(self, codes, scales):
        return [ShapedArray(codes.shape, jnp.float32)]

    def reference(self, codes: jax.Array, scales: jax.Array) -> list[jax.Array]:
        return [_decode(codes, scales)]


def kernel_of(equation: Any) -> Any:
    """The kernel that an equation of a program calls, or None."""
    return equation.params["kernel"] if equation.primitive.name == KERNEL else None


def random_bits(seed: jax.Array, size: int) -> jax.Array:
    """Random 32-bit numbers (size,) from a seed, by a hash of the position that fuses with what follows.

    It costs five integer operations for each number, a small part of ``jax.random.bits``, and is random enough to round
    with (the mixing function is lowbias32 of Chris Wellons).

    >>> random_bits(jnp.uint32(7), 3).shape
    (3,)
    """
    x = jax.lax.iota(jnp.uint32, size) * jnp.uint32(0x9E3779B9) + seed.astype(jnp.uint32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x  # its upper bits are mixed well


def uniform(seed: jax.Array, size: int) -> jax.Array:
    """Random float32 numbers (size,) in [0, 1), see ``random_bits``."""
    return (random_bits(seed, size) >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


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
    x = x.astype(jnp.float32)
    return Coded(*call_kernel(EncodeKernel(), x, seed)) if x.size and runs_here(x, seed) else _encode(x, seed)


def decode(coded: Coded) -> jax.Array:
    """The float32 array that codes stand for, see ``encode``."""
    fits = coded.codes.size and runs_here(*coded)
    return call_kernel(DecodeKernel(), *coded)[0] if fits else _decode(*coded)


def _encode(x: jax.Array, seed: jax.Array) -> Coded:
    flat = jnp.ravel(x)
    blocks = -(-flat.size // BLOCK)
    flat = jnp.pad(flat, (0, blocks * BLOCK - flat.size)).reshape(blocks, BLOCK)
    scale = jnp.max(jnp.abs(flat), axis=1, keepdims=True)
    signed = jnp.any(flat < 0, axis=1, keepdims=True)
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    # in units in which levels are powers of whole numbers
    size = jnp.abs(flat) * inverse * jnp.where(signed, 127.0**2, 255.0**4).astype(flat.dtype)
    root = jnp.sqrt(size)
    below = jnp.floor(jnp.where(signed, root, jnp.sqrt(root)))
    low, high = (_power(one, signed) for one in (below, below + 1))
    # the probability of the upper one of the two levels around the magnitude makes the mean exact
    code = below + (uniform(seed, blocks * BLOCK).reshape(blocks, BLOCK) * (high - low) < size - low)
    code = jnp.where(signed, 128 + jnp.sign(flat) * code, jnp.where(size > 0, jnp.maximum(code, 1), 0))
    broken = jnp.where(jnp.isfinite(scale), 1, jnp.nan)
    scales = (jnp.where(signed, -scale, scale) * broken)[:, 0]
    return Coded(code.astype(jnp.uint8).ravel()[: x.size].reshape(x.shape), scales)


def _decode(codes: jax.Array, scales: jax.Array) -> jax.Array:
    padded = jnp.pad(codes.ravel(), (0, scales.shape[0] * BLOCK - codes.size)).reshape(-1, BLOCK)
    signed, numbers = scales[:, None] < 0, padded.astype(jnp.float32)
    numbers = jnp.where(signed, numbers - 128, numbers)
    values = jnp.sign(numbers) * _magnitude(jnp.abs(numbers), signed) * jnp.abs(scales[:, None])
    return values.ravel()[: codes.size].reshape(codes.shape)


def _magnitude(number: jax.Array, signed: jax.Array) -> jax.Array:
    """The level in [0, 1] of a code without its sign."""
    return _power(number * jnp.where(signed, jnp.float32(1 / 127), jnp.float32(1 / 255)), signed)


def _power(number: jax.Array, signed: jax.Array) -> jax.Array:
    square = jnp.square(number)
    return jnp.where(signed, square, jnp.square(square))


__all__ = ["BLOCK", "HEADER", "Coded", "DecodeKernel", "EncodeKernel", "decode", "encode", "kernel_of", "random_bits",
           "uniform"]  # fmt: skip
