"""Sparsemax, a projection of scores to a probability distribution in which most classes are exactly 0, and its losses.

With ``p`` the projection of the scores and ``t`` its threshold, the loss of a label ``y`` is
``|p - onehot(y)|**2 / 2 + max(t - s_y, 0)``. The published form subtracts values of the size of the scores. This one is
a sum of nonnegative terms, so it is exactly 0 for a correct prediction and accurate elsewhere.
"""

import functools

import jax
import jax.numpy as jnp

from nnlearn.losses.arguments import as_floating, mask_over, normalize_axes, prepare_pair, widen
from nnlearn.losses.softmax import as_labels, check_label_shape, exclude, pick, split_labels
from nnlearn.types import ArrayLike


def _shift(scores: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Scores minus the largest of their row, and the threshold of the shifted scores.

    The threshold is the maximum of ``(sum of the k largest - 1) / k`` over ``k``. The published search for the first
    ``k`` at which it stops growing fails by rounding in long rows.
    """
    largest = jnp.max(scores, axis, keepdims=True, initial=-jnp.inf)
    shifted = scores - jnp.where(largest == -jnp.inf, 0, largest)
    # Scores 1 or more below the largest have probability 0, so clipping them at -1 keeps sums small and finite.
    sums = jnp.cumsum(-jnp.sort(-jnp.clip(shifted, -1, 0), axis), axis)
    counts = 1 + jax.lax.broadcasted_iota(scores.dtype, scores.shape, axis)
    return shifted, jnp.max((sums - 1) / counts, axis, keepdims=True, initial=-jnp.inf)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _project(scores: jax.Array, axis: int) -> jax.Array:
    shifted, threshold = _shift(scores, axis)
    return jnp.maximum(shifted - threshold, 0)


@_project.defjvp
def _project_jvp(axis, primals, tangents):
    # The derivative removes the mean within the support, and is 0 outside.
    projected = _project(*primals, axis)
    support = projected > 0
    kept = jnp.where(support, tangents[0], 0)
    count = jnp.maximum(jnp.sum(support, axis, keepdims=True), 1).astype(kept.dtype)
    return projected, jnp.where(support, kept - jnp.sum(kept, axis, keepdims=True) / count, 0)


def sparsemax(logits: ArrayLike, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    """Sparsemax, ``argmin_p |p - x|**2`` over ``p >= 0`` with ``sum_k p_k = 1``.

    Like softmax it is invariant to a constant added to the logits. Unlike softmax it gives a class whose logit is 1 or
    more below the largest exactly 0.

    Args:
      logits: ``x``, floating-point, shape ``[..., classes]``; -inf for a class that does not exist.
      axis: the axis of the classes.
      where: booleans of the logits' shape (which classes exist) or of that without ``axis`` (which rows count).

    Returns:
      Probabilities of the logits' shape, float32 (float64 if the logits are); 0 where ``where`` is False and in a row
      without classes.

    Raises:
      ValueError: if the shapes do not match, or ``axis`` is out of bounds.
      TypeError: if the logits are not floating-point, or ``where`` is not boolean.

    Source: Martins & Astudillo, *From softmax to sparsemax*, 2016.

    >>> sparsemax(jnp.array([1.0, 0.6, -2.0]))
    Array([0.7, 0.3, 0. ], dtype=float32)
    """
    (logits,) = widen(as_floating("logits", logits))
    (axis,) = axes = normalize_axes(axis, logits.ndim)
    return _project(exclude(logits, mask_over(where, logits.shape, axes)), axis)


@jax.custom_jvp
def _sparsemax_label_loss(scores: jax.Array, labels: jax.Array) -> jax.Array:
    shifted, threshold = _shift(scores, scores.ndim - 1)
    is_label = _is_label(scores, labels)
    others = jnp.where(is_label, 0, jnp.maximum(shifted - threshold, 0))
    short = jnp.maximum(jnp.squeeze(threshold, -1) - pick(shifted, labels, -1), 0)
    return 0.5 * (jnp.sum(jnp.square(others), -1) + jnp.square(jnp.sum(others, -1))) + short


@_sparsemax_label_loss.defjvp
def _sparsemax_label_loss_jvp(primals, tangents):
    scores, labels = primals
    error = _project(scores, scores.ndim - 1) - _is_label(scores, labels).astype(scores.dtype)
    return _sparsemax_label_loss(scores, labels), jnp.sum(error * tangents[0], -1)


def _is_label(scores: jax.Array, labels: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(labels.dtype, scores.shape, scores.ndim - 1) == jnp.expand_dims(labels, -1)


def multiclass_sparsemax_loss(scores: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """Multi-class sparsemax loss; its gradient is sparsemax minus the label, and 0 where the label leads by 1 or more.

    ``max_p (p . s + (1 - |p|**2) / 2) - s_y``, the maximum over all distributions ``p``.

    Args:
      scores: ``s``, floating-point, shape ``[..., classes]``; -inf where a class does not exist (a label on it has loss
        +inf).
      labels: ``y``, integers in [0, classes), shape ``[...]``; a label outside this range makes its loss and gradient
        NaN, unless ``where`` leaves it out.
      where: booleans of the scores' shape (which classes exist) or of the labels' (which examples count; the others
        have loss 0 and no gradient, even if they are NaN).

    Returns:
      One loss per example, shape ``[...]``, float32 (float64 if the scores are).

    Raises:
      ValueError: if the shapes do not match.
      TypeError: if the scores are not floating-point, the labels are not integers, or ``where`` is not boolean.

    Source: Martins & Astudillo, *From softmax to sparsemax*, 2016, section 3.

    >>> multiclass_sparsemax_loss(jnp.array([[1.0, 0.6, -2.0], [3.0, 0.0, 0.0]]), jnp.array([0, 0]))
    Array([0.09, 0. ], dtype=float32)
    """
    scores, labels = as_floating("scores", scores), as_labels(labels)
    check_label_shape(labels, scores.shape[:-1], scores.shape, "scores")
    (scores,) = widen(scores)
    include = mask_over(where, scores.shape, normalize_axes(-1, scores.ndim))
    keep = None if include is None else jnp.broadcast_to(jnp.any(include, -1), labels.shape)
    labels, weight = split_labels(labels, scores.shape[-1], scores.dtype, keep)
    loss = _sparsemax_label_loss(exclude(scores, include), labels)
    return weight * (loss if keep is None else jnp.where(keep, loss, 0))  # a row without classes has loss +inf


def sparsemax_loss(logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """Binary sparsemax loss: 0 beyond a margin of 1, quadratic within, and linear on the wrong side.

    ``(p - y)**2 + |x - clip(x, -1, 1)| |[x > 0] - y|`` with ``p = clip((1 + x) / 2, 0, 1)``. Its derivative is
    ``p - y``.

    Args:
      logits: ``x``, floating-point, of any shape ``[...]``.
      labels: ``y``, 0 or 1 or a probability, real, of the same shape or a scalar.
      where: booleans of the logits' shape; entries that are False have loss 0 and no gradient, even if they are NaN.

    Returns:
      One loss per element, shape ``[...]``, float32 (float64 if an argument is).

    Raises:
      ValueError: if the shapes differ.
      TypeError: if the logits are not floating-point, the labels are complex, or ``where`` is not boolean.

    Source: Blondel, Martins & Niculae, *Learning with Fenchel-Young losses*, 2020, section 4.4.

    >>> sparsemax_loss(jnp.array([0.0, 1.5, -3.0]), jnp.array([1, 1, 1]))
    Array([0.25, 0. , 3. ], dtype=float32)
    """
    logits, labels = prepare_pair(logits, labels, ("logits", "labels"))
    mask = mask_over(where, logits.shape, ())
    if mask is not None:
        logits, labels = jnp.where(mask, logits, 0), jnp.where(mask, labels, 0.5)
    inside = jnp.clip(logits, -1, 1)
    against = jnp.where(logits > 0, 1 - labels, -labels)
    # An infinite correct logit has loss 0, not the NaN of 0 * inf.
    outside = jnp.where((against == 0) & jnp.isinf(logits), 0, logits - inside)
    return 0.25 * jnp.square(inside - (2 * labels - 1)) + outside * against
