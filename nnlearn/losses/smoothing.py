"""Label smoothing as a separate function; the cross-entropies with integer labels have it built in."""

import jax
import jax.numpy as jnp

from nnlearn.checks import check_number
from nnlearn.losses.arguments import Axis, as_floating, mask_over, normalize_axes, widen
from nnlearn.losses.softmax import spread_over
from nnlearn.tree import as_hyperparam
from nnlearn.types import ArrayLike, Scalar


def smooth_labels(labels: ArrayLike, alpha: Scalar, *, axis: Axis = -1, where: ArrayLike | None = None) -> jax.Array:
    """Mix labels with the uniform distribution, ``(1 - alpha) y + alpha / classes``.

    Args:
      labels: ``y``, distributions over classes, floating-point, shape ``[..., classes]``.
      alpha: the share of the uniform distribution, in [0, 1].
      axis: the axis, or axes, of the classes; None for all.
      where: booleans of the labels' shape (which classes exist; only they are counted, the others get 0) or without
        ``axis`` (the examples left out get 0 everywhere).

    Returns:
      Distributions of the labels' shape, float32 (float64 if the labels are).

    Raises:
      ValueError: if the shapes do not match, or ``alpha`` is out of range.
      TypeError: if the labels are not floating-point, or ``where`` is not boolean.

    Source: Szegedy et al., *Rethinking the Inception architecture for computer vision*, 2016, section 7.

    >>> smooth_labels(jnp.array([1.0, 0.0]), 0.1)
    Array([0.95, 0.05], dtype=float32)
    """
    check_number("alpha", alpha, low=0.0, high=1.0)
    (labels,) = widen(as_floating("labels", labels))
    axes = normalize_axes(axis, labels.ndim)
    include = mask_over(where, labels.shape, axes)
    alpha = as_hyperparam(alpha, labels.dtype)
    kept = labels if include is None else jnp.where(include, labels, 0)
    return (1 - alpha) * kept + alpha * spread_over(labels.shape, include, axes, labels.dtype)
