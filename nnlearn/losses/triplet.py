"""Triplet losses on embeddings: an anchor should be closer to its positive than to its negative by a margin."""

import math

import jax
import jax.numpy as jnp

from nnlearn.checks import check_nonnegative, check_number
from nnlearn.losses.arguments import (
    Axes,
    as_boolean,
    as_floating,
    as_real,
    check_same_shape,
    largest_scale,
    mask_over,
    normalize_axes,
    weighted_mean,
    widen,
)
from nnlearn.sharding.axes import automatic_axes
from nnlearn.tree import as_hyperparam
from nnlearn.types import ArrayLike, Scalar


def _power(size: jax.Array, degree: Scalar) -> jax.Array:
    """``size**degree``, as a multiplication if the degree is 2."""
    return jnp.square(size) if isinstance(degree, int | float) and degree == 2 else jnp.power(size, degree)


def _distance(first: jax.Array, second: jax.Array, degree: Scalar, eps: Scalar, axes: Axes) -> jax.Array:
    """``(sum |a - b|**degree + eps)**(1 / degree)``; its derivative where that is 0 is 0."""
    difference = first - second
    # Divided by its largest component, as its powers may leave float32. The result does not depend on the divisor, so
    # derivatives may treat it as a constant.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(difference), axes, keepdims=True, initial=0))
    largest = jnp.maximum(largest, jax.lax.stop_gradient(jnp.power(jnp.asarray(eps, first.dtype), 1 / degree)))
    most = largest_scale(first.dtype)
    divisor = jnp.where(largest == 0, 1, jnp.clip(largest, 1 / most, most))
    powers = jnp.sum(_power(jnp.abs(difference / divisor), degree), axes)
    divisor = jnp.squeeze(divisor, axes)
    total = powers + eps * jnp.minimum(_power(1 / divisor, degree), jnp.finfo(powers.dtype).max)
    nothing = total == 0
    return jnp.where(nothing, 0, divisor * jnp.power(jnp.where(nothing, 1, total), 1 / degree))


def triplet_margin_loss(
    anchors: ArrayLike,
    positives: ArrayLike,
    negatives: ArrayLike,
    axis: int = -1,
    norm_degree: Scalar = 2,
    margin: Scalar = 1.0,
    eps: Scalar = 1e-6,
    *,
    swap: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Triplet margin loss, of the distances from an anchor to a positive and to a negative.

    ``max(0, d(a, p) - d(a, n) + margin)`` with ``d(x, y) = (sum |x - y|**norm_degree + eps)**(1 / norm_degree)``.

    Args:
      anchors: ``a``, floating-point, shape ``[..., dim]``.
      positives: ``p``, examples similar to the anchors, floating-point, of the same shape.
      negatives: ``n``, examples different from the anchors, floating-point, of the same shape.
      axis: the axis of the vectors' components.
      norm_degree: degree of the norm, finite and >= 1; 2 is Euclidean.
      margin: finite and >= 0, in units of the distance.
      eps: finite and >= 0; keeps the derivative small where two vectors nearly agree.
      swap: whether to replace ``d(a, n)`` by ``d(p, n)`` where that is smaller.
      where: booleans of the result's shape (which triplets count) or of the anchors' (which components count).

    Returns:
      One loss per triplet, shape ``[...]``, float32 (float64 if an argument is); 0 where ``where`` is False.

    Raises:
      ValueError: if the shapes do not match, or an argument is out of range.
      TypeError: if an argument is not floating-point, or ``where`` is not boolean.

    Source: Balntas et al., *Learning local feature descriptors with triplets and shallow convolutional neural
    networks*, 2016.

    >>> anchors, positives = jnp.array([[0.0, 0.0]]), jnp.array([[3.0, 4.0]])
    >>> triplet_margin_loss(anchors, positives, jnp.array([[0.0, 5.5]]))
    Array([0.5], dtype=float32)
    """
    check_number("norm_degree", norm_degree, low=1.0, high=math.inf, high_open=True)
    check_nonnegative("margin", margin)
    check_nonnegative("eps", eps)
    anchors, positives = as_floating("anchors", anchors), as_floating("positives", positives)
    negatives = as_floating("negatives", negatives)
    check_same_shape(("anchors", "positives"), anchors, positives)
    check_same_shape(("anchors", "negatives"), anchors, negatives)
    anchors, positives, negatives = widen(anchors, positives, negatives)
    axes = normalize_axes(axis, anchors.ndim)
    mask = mask_over(where, anchors.shape, axes)
    if mask is not None:
        anchors, positives, negatives = (jnp.where(mask, array, 0) for array in (anchors, positives, negatives))
    loss = _triplet_loss(anchors, positives, negatives, axes, norm_degree, margin, eps, swap)
    return loss if mask is None else jnp.where(jnp.any(mask, axes), loss, 0)


def _triplet_loss(anchors, positives, negatives, axes, norm_degree, margin, eps, swap) -> jax.Array:
    degree, margin, eps = (as_hyperparam(number, anchors.dtype) for number in (norm_degree, margin, eps))
    near, far = _distance(anchors, positives, degree, eps, axes), _distance(anchors, negatives, degree, eps, axes)
    if swap:
        far = jnp.minimum(far, _distance(positives, negatives, degree, eps, axes))
    return jnp.maximum(near - far + margin, 0)


@automatic_axes(like="embeddings")
def batch_hard_triplet_loss(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    margin: Scalar | None = 1.0,
    eps: Scalar = 1e-6,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Batch-hard triplet loss: each example with its farthest positive and its nearest negative of the batch.

    The mean over anchors ``a`` of ``max(0, max_p d(a, p) - min_n d(a, n) + margin)``, with ``p`` over the others of the
    anchor's label, ``n`` over those of other labels, and ``d(x, y) = sqrt(|x - y|**2 + eps)``.

    Args:
      embeddings: floating-point, shape ``[batch, dim]``.
      labels: real, shape ``[batch]``.
      margin: finite and >= 0, in units of the distance; None for the soft margin, ``log(1 + exp(d(a, p) - d(a, n)))``,
        whose gradient does not vanish beyond the margin.
      eps: finite and >= 0; keeps the derivative small where two vectors nearly agree.
      where: booleans, shape ``[batch]``; examples that are False are left out of all triplets, even if they are NaN.

    Returns:
      A scalar, the mean over the anchors that have a positive and a negative, float32 (float64 if the embeddings are);
      0 when none has.

    Raises:
      ValueError: if the shapes do not match, or an argument is out of range.
      TypeError: if the embeddings are not floating-point, the labels are complex, or ``where`` is not boolean.

    Source: Hermans, Beyer & Leibe, *In defense of the triplet loss for person re-identification*, 2017.

    >>> embeddings, labels = jnp.array([[0.0], [1.0], [3.0], [3.5]]), jnp.array([0, 0, 1, 1])
    >>> batch_hard_triplet_loss(embeddings, labels, margin=2.0, eps=0.0)
    Array(0.375, dtype=float32)
    """
    embeddings, labels = as_floating("embeddings", embeddings), as_real("labels", labels)
    if margin is not None:
        check_nonnegative("margin", margin)
    check_nonnegative("eps", eps)
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"embeddings must have shape [batch, dim] and labels [batch], got {embeddings.shape} and {labels.shape}"
        )
    (embeddings,) = widen(embeddings)
    keep = jnp.ones(labels.shape, bool) if where is None else as_boolean(where)
    if keep.shape != labels.shape:
        raise ValueError(f"where must have shape {labels.shape}, one entry per example, got {keep.shape}")
    embeddings = jnp.where(keep[:, None], embeddings, 0)
    positive, negative, counts = _hardest(jax.lax.stop_gradient(embeddings), labels, keep)
    eps = as_hyperparam(eps, embeddings.dtype)
    far, near = (_distance(embeddings, embeddings[chosen], 2, eps, (1,)) for chosen in (positive, negative))
    gap = far - near
    loss = jax.nn.softplus(gap) if margin is None else jnp.maximum(gap + as_hyperparam(margin, gap.dtype), 0)
    return weighted_mean(loss, None, counts)


def _hardest(embeddings: jax.Array, labels: jax.Array, keep: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Indices of each example's farthest positive and nearest negative, and whether it has both.

    The distances only serve to choose, so they are computed with a matrix product, which loses digits but needs no
    array of ``batch**2 * dim`` values. The caller recomputes those of the chosen pairs.
    """
    count = jnp.maximum(jnp.sum(keep), 1).astype(embeddings.dtype)
    centred = embeddings - jnp.sum(embeddings, 0, keepdims=True) / count
    largest = jnp.max(jnp.abs(centred), initial=0)
    centred = centred / jnp.where(largest == 0, 1, largest)
    squares = jnp.sum(jnp.square(centred), 1)
    products = jnp.matmul(centred, centred.T, precision=jax.lax.Precision.HIGHEST)
    distances = squares[:, None] + squares[None, :] - 2 * products
    both = keep[:, None] & keep[None, :]
    same = labels[:, None] == labels[None, :]
    positives, negatives = both & same & ~jnp.eye(labels.shape[0], dtype=bool), both & ~same
    farthest = jnp.argmax(jnp.where(positives, distances, -jnp.inf), 1)
    nearest = jnp.argmin(jnp.where(negatives, distances, jnp.inf), 1)
    return farthest, nearest, jnp.any(positives, 1) & jnp.any(negatives, 1)
