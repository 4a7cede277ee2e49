"""C kernels that split one buffer into many arrays and join them again, see ``split.c``.

XLA compiles and starts a separate loop for each of hundreds of small arrays. Each of these kernels is a single call for
any number of arrays, and each is the other's transpose.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.core import ShapedArray, Tracer

from nnlearn.native.kernel import call_kernel, runs_here

SOURCE = Path(__file__).with_name("split.c")
MANY = 16  # number of arrays above which this is faster than XLA's slices
ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class _CopyKernel:
    """A linear ``Kernel`` between a vector and its parts, of the given sizes and dtype."""

    sizes: tuple[int, ...]
    dtype: str

    in_place = ()

    @property
    def source(self) -> str:
        return SOURCE.read_text()

    @property
    def flags(self) -> tuple[str, ...]:
        return (f"-DITEM={ITEM_BYTES[self.dtype]}",)


class SplitKernel(_CopyKernel):
    handler = "split"

    @property
    def transposed(self) -> "JoinKernel":
        return JoinKernel(self.sizes, self.dtype)

    def results(self, vector):
        return [ShapedArray((size,), vector.dtype) for size in self.sizes]

    def reference(self, vector: jax.Array) -> list[jax.Array]:
        return list(jax.lax.split(vector, self.sizes))

    def vmapped(self, axes: Sequence[int], vectors: jax.Array):
        return list(jax.lax.split(jnp.moveaxis(vectors, axes[0], 0), self.sizes, axis=1)), [0] * len(self.sizes)


class JoinKernel(_CopyKernel):
    handler = "join"

    @property
    def transposed(self) -> SplitKernel:
        return SplitKernel(self.sizes, self.dtype)

    def results(self, *parts):
        return [ShapedArray((sum(self.sizes),), parts[0].dtype)]

    def reference(self, *parts: jax.Array) -> list[jax.Array]:
        return [jnp.concatenate(parts)]

    def vmapped(self, axes: Sequence[int | None], *parts: jax.Array):
        return jax.vmap(self.reference, in_axes=axes)(*parts), [0]


def split(array: jax.Array, sizes: Sequence[int]) -> Sequence[jax.Array]:
    """Cut an array along its last axis into parts of these sizes, which add up to the length of the axis.

    Its derivative is one concatenation.

    >>> split(jnp.arange(3.0), (2, 1))
    [Array([0., 1.], dtype=float32), Array([2.], dtype=float32)]
    """
    name = jnp.dtype(array.dtype).name
    traced = isinstance(array, Tracer)
    if len(sizes) >= MANY and array.ndim == 1 and name in ITEM_BYTES and traced and runs_here(array):
        return call_kernel(SplitKernel(tuple(sizes), name), array)
    return jax.lax.split(array, sizes, axis=array.ndim - 1)


__all__ = ["split"]
