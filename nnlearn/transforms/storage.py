"""How running arrays are stored between steps: the only place where state changes its dtype.

A kernel computes in float32 or better. A ``Storage`` makes the array that the state keeps, and reads it back. Casts are
the only kind today; a storage in blocks of 8 bits, or with stochastic rounding, is another class with these methods.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checks import check_dtype
from nnlearn.packing import Packed, is_packed
from nnlearn.packing.parts import with_shapes
from nnlearn.transforms.whole_leaf import map_whole_leaves
from nnlearn.tree import compute_dtype, real_dtype, widest
from nnlearn.types import DTypeLike, MaskedNode, Params, PyTree, Scalar

Shape = tuple[int, ...]


class Storage(Protocol):
    """How one running array is stored."""

    def dtype_for(self, param: Any, real: bool) -> Any:
        """The dtype that the state has for a parameter."""
        ...

    def encode(self, value: jax.Array, stored: jax.Array, count: jax.Array | None) -> jax.Array:
        """The new stored form of ``value``, like the last one; ``count`` is the step's, to seed a rounding with."""
        ...

    def decode(self, stored: jax.Array, wide: Any) -> jax.Array:
        """The stored values in the precision ``wide``; real ones stay real."""
        ...


class Cast(NamedTuple):
    """Storage in a floating dtype; None for the parameter's dtype, float32 at least."""

    dtype: DTypeLike | None = None

    def dtype_for(self, param: Any, real: bool) -> Any:
        given = jnp.result_type(param)
        dtype = compute_dtype(given) if self.dtype is None else jnp.dtype(self.dtype)
        if not real and jnp.issubdtype(given, jnp.complexfloating):
            dtype = widest(dtype, jnp.complex64)  # never drop an imaginary part
        return real_dtype(dtype) if real else dtype

    def encode(self, value: jax.Array, stored: jax.Array, count: jax.Array | None) -> jax.Array:
        del count
        return value.astype(stored.dtype)

    def decode(self, stored: jax.Array, wide: Any) -> jax.Array:
        return stored.astype(wide if jnp.iscomplexobj(stored) else real_dtype(wide))


def as_storage(name: str, dtype: Any) -> Storage:
    """The storage that an argument such as ``mu_dtype`` asks for.

    Raises:
      TypeError: if it is no floating or complex dtype.

    >>> as_storage("mu_dtype", jnp.bfloat16).dtype
    dtype(bfloat16)
    """
    if hasattr(dtype, "dtype_for"):
        return dtype
    return Cast(check_dtype(name, dtype))


def start_of(function: Callable[[Params], PyTree], params: Params) -> PyTree:
    """A first state from the parameters' values; where ``params`` holds shapes alone, zeros of its shapes."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        return jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(function, params))
    return function(params)


class Slot(NamedTuple):
    """How one running array, such as Adam's first moment, starts and is stored.

    Attributes:
      fill: initial value.
      dtype: dtype or storage of the array; None for the parameter's dtype, float32 at least.
      real: whether it is real when the parameter is complex, as a mean of squared magnitudes is.
      shape: maps the parameter's shape to the array's; None for the same shape. Only kernels of whole leaves can have
        arrays of other shapes.
      initial: maps the parameter to the first value, in place of ``fill``.
    """

    fill: Scalar = 0.0
    dtype: DTypeLike | Storage | None = None
    real: bool = False
    shape: Callable[[Shape], Shape] | None = None
    initial: Callable[[jax.Array], jax.Array] | None = None

    @property
    def storage(self) -> Storage:
        return as_storage("dtype", self.dtype)

    def start(self, params: Params) -> PyTree:
        """The slot's first value for each parameter."""
        storage, initial = self.storage, self.initial
        if initial is not None:

            def first(param):
                param = jnp.asarray(param)
                value = initial(param.astype(compute_dtype(param.dtype)))
                return (jnp.array(value, storage.dtype_for(param, self.real), copy=True),)

            def firsts(params):
                if self.shape is None:
                    return jax.tree.map(lambda param: first(param)[0], params)
                return map_whole_leaves(lambda _, param: first(param), ["params"], [params], [None], [self.shape])[0]

            return start_of(firsts, params)
        if self.shape is None:
            return jax.tree.map(
                lambda param: jnp.full_like(param, self.fill, dtype=storage.dtype_for(param, self.real)), params
            )
        if is_packed(params):
            layout = with_shapes(params.layout, self.shape)
            return Packed(
                [
                    param
                    if isinstance(param, MaskedNode)
                    else jnp.full(buffer.shape, self.fill, storage.dtype_for(param, self.real))
                    for param, buffer in zip(params.buffers, layout.buffers, strict=True)
                ],
                layout,
            )
        shape = self.shape
        return jax.tree.map(
            lambda param: jnp.full(shape(np.shape(param)), self.fill, storage.dtype_for(param, self.real)), params
        )


__all__ = ["Cast", "Slot", "Storage", "as_storage", "start_of"]
