"""Cosine similarity and cosine distance."""

import jax
import jax.numpy as jnp

from nnlearn.checks import check_nonnegative
from nnlearn.losses.arguments import (
    Axis,
    as_floating,
    check_same_shape,
    largest_scale,
    mask_over,
    normalize_axes,
    widen,
)
from nnlearn.tree import as_hyperparam, safe_divide, safe_sqrt
from nnlearn.types import ArrayLike, Scalar


def unit(vectors: jax.Array, epsilon: Scalar, axes: tuple[int, ...]) -> jax.Array:
    """``v / max(|v|, sqrt(epsilon))``, and 0 for a vector of zeros."""
    # Scaled first, as squares of values above 1e19 or below 1e-19 leave float32. The result does not depend on the
    # scale, so derivatives may treat it as a constant.
    most = largest_scale(vectors.dtype)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(vectors), axes, keepdims=True, initial=0))
    inverse = 1 / jnp.clip(largest, 1 / most, most)
    scaled = jnp.clip(vectors * inverse, -64, 64)  # clips nothing, but keeps XLA from squaring before scaling
    length = safe_sqrt(jnp.sum(jnp.square(scaled), axes, keepdims=True))
    return safe_divide(scaled, jnp.maximum(length, safe_sqrt(jnp.asarray(epsilon, vectors.dtype)) * inverse))


def cosine_similarity(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    epsilon: Scalar = 0.0,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Cosine similarity, ``a . b / (|a| |b|)``.

    Args:
      predictions: floating-point, shape ``[..., dim]``.
      targets: floating-point, of the same shape.
      epsilon: lower bound, >= 0, of the squared lengths, which shrinks the similarity of short vectors.
      axis: the axis, or axes, of the vectors' components; None for all.
      where: booleans of the predictions' shape (which components count) or of the result's (which pairs count).

    Returns:
      One similarity in [-1, 1] per pair, shape ``[...]``, float32 (float64 if an argument is); 0 for a zero vector,
      with derivative 0 if ``epsilon`` is 0, and where ``where`` is False.

    Raises:
      ValueError: if the shapes do not match, or ``epsilon`` is negative.
      TypeError: if an argument is not floating-point, or ``where`` is not boolean.

    Source: Manning, Raghavan & Schütze, *Introduction to Information Retrieval*, 2008, section 6.3.1.

    >>> cosine_similarity(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[0.0, 2.0], [0.0, 3.0]]))
    Array([0., 1.], dtype=float32)
    """
    check_nonnegative("epsilon", epsilon)
    predicted, target = as_floating("predictions", predictions), as_floating("targets", targets)
    check_same_shape(("predictions", "targets"), predicted, target)
    predicted, target = widen(predicted, target)
    axes = normalize_axes(axis, predicted.ndim)
    mask = mask_over(where, predicted.shape, axes)
    if mask is not None:
        predicted, target = jnp.where(mask, predicted, 0), jnp.where(mask, target, 0)
    epsilon = as_hyperparam(epsilon, predicted.dtype)
    return jnp.sum(unit(predicted, epsilon, axes) * unit(target, epsilon, axes), axes)


def cosine_distance(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    epsilon: Scalar = 0.0,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Cosine distance, ``1 - a . b / (|a| |b|)``.

    Args:
      predictions: floating-point, shape ``[..., dim]``.
      targets: floating-point, of the same shape.
      epsilon: lower bound, >= 0, of the squared lengths, which shrinks the similarity of short vectors.
      axis: the axis, or axes, of the vectors' components; None for all.
      where: booleans of the predictions' shape (which components count) or of the result's (which pairs count).

    Returns:
      One distance in [0, 2] per pair, shape ``[...]``, float32 (float64 if an argument is); 1, with derivative 0, for a
      zero vector and where ``where`` is False.

    Raises:
      ValueError: if the shapes do not match, or ``epsilon`` is negative.
      TypeError: if an argument is not floating-point, or ``where`` is not boolean.

    Source: Manning, Raghavan & Schütze, *Introduction to Information Retrieval*, 2008, section 6.3.1.

    >>> cosine_distance(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[0.0, 2.0], [0.0, -3.0]]))
    Array([1., 2.], dtype=float32)
    """
    return 1 - cosine_similarity(predictions, targets, epsilon=epsilon, axis=axis, where=where)
