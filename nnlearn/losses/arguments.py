"""Preparation of the arguments of every loss: check dtypes and shapes, widen to float32, align masks, average.

Shapes must agree exactly (a scalar target is the one exception): NumPy's broadcasting would turn predictions of shape
(8,) and targets of shape (8, 1) into 64 errors, and the mean of those trains a model to predict the mean target.
"""

import operator
from collections.abc import Sequence
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checks import known
from nnlearn.tree import compute_dtype, safe_divide
from nnlearn.types import ArrayLike, Scalar

Axis = int | Sequence[int] | None
Axes = tuple[int, ...]
REDUCTIONS = ("mean", "sum", "none")


def check_reduction(reduction: str) -> None:
    """Raise ``ValueError`` if ``reduction`` is unknown."""
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def is_off(value: Scalar) -> bool:
    """Whether an option is a Python 0, so that its term can be left out of the program."""
    return isinstance(value, int | float) and value == 0


def as_floating(name: str, value: ArrayLike) -> jax.Array:
    """``value`` as an array; raises ``TypeError`` if its dtype is not floating."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be of floating dtype, got {array.dtype.name} of shape {array.shape}; were the arguments "
            f"swapped? If not, pass {name}.astype(jnp.float32)"
        )
    return array


def as_real(name: str, value: ArrayLike) -> jax.Array:
    """``value`` as an array; raises ``TypeError`` if its dtype is complex."""
    array = jnp.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be real, got {array.dtype.name} of shape {array.shape}; pass real and imaginary "
                        "parts as two arrays")  # fmt: skip
    return array


def as_weights(name: str, value: ArrayLike) -> jax.Array:
    """``value`` as a real array; raises ``ValueError`` if a concrete entry is negative."""
    array = as_real(name, value)
    numbers = value if known(value) else array
    if known(numbers) and getattr(numbers, "is_fully_addressable", True) and np.any(np.asarray(numbers) < 0):
        raise ValueError(f"{name} must be >= 0, got a smallest value of {np.nanmin(np.asarray(numbers))}")
    return array


@overload
def widen(first: jax.Array, /) -> tuple[jax.Array]: ...
@overload
def widen(first: jax.Array, second: jax.Array, /) -> tuple[jax.Array, jax.Array]: ...
@overload
def widen(first: jax.Array, second: jax.Array, third: jax.Array, /) -> tuple[jax.Array, jax.Array, jax.Array]: ...
@overload
def widen(*arrays: jax.Array) -> tuple[jax.Array, ...]: ...
def widen(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Cast all arrays to the widest of their dtypes, float32 at least, so that no sum or exponential is in bfloat16.

    >>> [array.dtype.name for array in widen(jnp.zeros(2, jnp.bfloat16), jnp.zeros(2, int))]
    ['float32', 'float32']
    """
    dtype = compute_dtype(*arrays)
    return tuple(array.astype(dtype) for array in arrays)


def largest_scale(dtype) -> float:
    """The largest power of two of this dtype whose inverse is a normal number.

    >>> largest_scale(jnp.float32) == 2.0**126
    True
    """
    return 2.0 ** (jnp.finfo(dtype).maxexp - 2)


def check_same_shape(names: tuple[str, str], first: jax.Array, second: jax.Array, *, scalar: bool = False) -> None:
    """Raise ``ValueError`` if the shapes differ; with ``scalar`` the second may be ``()``."""
    if first.shape == second.shape or (scalar and second.shape == ()):
        return
    cure = f"broadcast {names[1]} yourself, if that is meant: jnp.broadcast_to({names[1]}, {names[0]}.shape)"
    if first.size == second.size:
        cure = f"pass {names[1]}.reshape({names[0]}.shape), if the order of the elements agrees"
    raise ValueError(f"{names[0]} {first.shape} and {names[1]} {second.shape} must have one shape; {cure}")


def prepare_pair(
    predictions: ArrayLike, targets: ArrayLike | None, names: tuple[str, str] = ("predictions", "targets")
) -> tuple[jax.Array, jax.Array]:
    """Check, widen and broadcast the arguments of an elementwise loss; without targets these are zeros."""
    predicted = as_floating(names[0], predictions)
    target = as_real(names[1], 0 if targets is None else targets)
    check_same_shape(names, predicted, target, scalar=True)
    predicted, target = widen(predicted, target)
    return predicted, jnp.broadcast_to(target, predicted.shape)


def normalize_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """The axes as a tuple of distinct integers in [0, ndim), in the given order; None means all.

    >>> normalize_axes(-1, 3), normalize_axes((2, 0), 3), normalize_axes(None, 2)
    ((2,), (2, 0), (0, 1))
    """
    if axis is None:
        return tuple(range(ndim))
    given = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    axes = tuple(operator.index(one) for one in given)
    if any(not -ndim <= one < ndim for one in axes):
        raise ValueError(f"axis {axis} is out of bounds for an array of {ndim} dimensions")
    axes = tuple(one % ndim for one in axes)
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis {axis} names a dimension twice")
    return axes


def as_boolean(where: ArrayLike) -> jax.Array:
    """``where`` as an array; raises ``TypeError`` if it is not boolean."""
    mask = jnp.asarray(where)
    if mask.dtype != jnp.bool:
        raise TypeError(f"where must be boolean, got {mask.dtype.name} of shape {mask.shape}; pass where != 0")
    return mask


def mask_over(where: ArrayLike | None, shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array | None:
    """A mask that broadcasts against arrays of ``shape``, from one per element or one without the reduced ``axes``.

    Args:
      where: None, or booleans of ``shape``, or of ``shape`` without ``axes``, which are restored with length 1.
      shape: the shape of the loss's main argument.
      axes: the axes that the loss sums over.

    >>> mask_over(jnp.array([True, False]), (2, 3), (1,)).shape
    (2, 1)
    """
    if where is None:
        return None
    mask = as_boolean(where)
    reduced = tuple(length for axis, length in enumerate(shape) if axis not in axes)
    if mask.shape == shape:
        return mask
    if mask.shape == reduced:
        return jnp.expand_dims(mask, axes)
    raise ValueError(f"where must have shape {shape} (one entry per element) or {reduced} (one per example), got "
                     f"{mask.shape}; use jnp.broadcast_to to repeat it along an axis")  # fmt: skip


def lead_over(name: str, value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Broadcast ``value``, whose shape must be ``shape`` or its leading axes, to ``shape``.

    >>> lead_over("weights", jnp.array([1, 2]), (2, 3))
    Array([[1, 1, 1],
           [2, 2, 2]], dtype=int32)
    """
    if value.shape != shape[: value.ndim]:
        raise ValueError(
            f"{name} must have shape {shape} or the first axes of it, such as {shape[:1]} for one value per example, "
            f"got {value.shape}; reshape or jnp.broadcast_to it"
        )
    return jnp.broadcast_to(value.reshape(value.shape + (1,) * (len(shape) - value.ndim)), shape)


def weighted_mean(values: jax.Array, weights: jax.Array | None, mask: jax.Array | None) -> jax.Array:
    """``sum(weights * values) / sum(weights)`` over the entries that ``mask`` keeps; 0 if the weights sum to 0.

    All arrays have the same shape.
    """
    weights = jnp.ones_like(values) if weights is None else weights.astype(values.dtype)
    if mask is not None:  # both, as a masked infinity times 0 would be NaN
        values, weights = jnp.where(mask, values, 0), jnp.where(mask, weights, 0)
    return safe_divide(jnp.sum(values * weights), jnp.sum(weights))
