"""Margin losses on scores: hinge and perceptron, binary and multi-class."""

import jax
import jax.numpy as jnp

from nnlearn.losses.arguments import as_floating, prepare_pair, widen
from nnlearn.losses.softmax import as_labels, check_label_shape, pick, split_labels
from nnlearn.types import ArrayLike


def hinge_loss(predictor_outputs: ArrayLike, targets: ArrayLike) -> jax.Array:
    """Hinge loss, ``max(0, 1 - score * target)``.

    Args:
      predictor_outputs: scores, floating-point, of any shape ``[...]``.
      targets: -1 or 1, real, of the same shape or a scalar.

    Returns:
      One loss per element, shape ``[...]``, float32 (float64 if an argument is).

    Raises:
      ValueError: if the shapes differ.
      TypeError: if the scores are not floating-point, or the targets are complex.

    Source: Cortes & Vapnik, *Support-vector networks*, 1995.

    >>> hinge_loss(jnp.array([0.5, 2.0, 0.5]), jnp.array([1, 1, -1]))
    Array([0.5, 0. , 1.5], dtype=float32)
    """
    scores, targets = prepare_pair(predictor_outputs, targets, ("predictor_outputs", "targets"))
    return jnp.maximum(0, 1 - scores * targets)


def perceptron_loss(predictor_outputs: ArrayLike, targets: ArrayLike) -> jax.Array:
    """Perceptron loss, ``max(0, -score * target)``.

    Args:
      predictor_outputs: scores, floating-point, of any shape ``[...]``.
      targets: -1 or 1, real, of the same shape or a scalar.

    Returns:
      One loss per element, shape ``[...]``, float32 (float64 if an argument is).

    Raises:
      ValueError: if the shapes differ.
      TypeError: if the scores are not floating-point, or the targets are complex.

    Source: Rosenblatt, *The perceptron*, 1958; as a loss: Bishop, *Pattern Recognition and Machine Learning*, 2006,
    equation 4.54.

    >>> perceptron_loss(jnp.array([0.5, 2.0, 0.5]), jnp.array([1, 1, -1]))
    Array([0. , 0. , 0.5], dtype=float32)
    """
    scores, targets = prepare_pair(predictor_outputs, targets, ("predictor_outputs", "targets"))
    return jnp.maximum(0, -scores * targets)


def _margin_loss(scores: ArrayLike, labels: ArrayLike, margin: float) -> jax.Array:
    """``max_k (score_k + margin [k != label]) - score_label``, NaN for a label out of range."""
    scores, labels = as_floating("scores", scores), as_labels(labels)
    check_label_shape(labels, scores.shape[:-1], scores.shape, "scores")
    (scores,) = widen(scores)
    labels, valid = split_labels(labels, scores.shape[-1], scores.dtype)
    right = pick(scores, labels, -1)
    missing = right == -jnp.inf  # replaced, as inf - inf is NaN
    # Differences first, as adding a margin of 1 to scores above 1e8 would round it away.
    gaps = scores - jnp.expand_dims(jnp.where(missing, 0, right), -1)
    index = jax.lax.broadcasted_iota(labels.dtype, scores.shape, scores.ndim - 1)
    shortfall = jnp.max(jnp.where(index == jnp.expand_dims(labels, -1), gaps, gaps + margin), -1)
    return jnp.where(missing, jnp.inf, shortfall) * valid


def multiclass_hinge_loss(scores: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Multi-class hinge loss (Crammer-Singer), ``max(0, 1 + max_{k != y} score_k - score_y)``.

    Args:
      scores: floating-point, shape ``[..., classes]``; -inf where a class does not exist (a label on it has loss +inf,
        with gradient 0).
      labels: ``y``, integers in [0, classes), shape ``[...]``; a label outside this range makes its loss and gradient
        NaN.

    Returns:
      One loss per example, shape ``[...]``, float32 (float64 if the scores are).

    Raises:
      ValueError: if the shapes do not match.
      TypeError: if the scores are not floating-point, or the labels are not integers.

    Source: Crammer & Singer, *On the algorithmic implementation of multiclass kernel-based vector machines*, 2001.

    >>> multiclass_hinge_loss(jnp.array([[2.0, 1.5, 0.0], [2.0, 0.0, 0.0]]), jnp.array([0, 0]))
    Array([0.5, 0. ], dtype=float32)
    """
    return _margin_loss(scores, labels, 1.0)


def multiclass_perceptron_loss(scores: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Multi-class perceptron loss, ``max_k score_k - score_y``.

    Args:
      scores: floating-point, shape ``[..., classes]``; -inf where a class does not exist (a label on it has loss +inf,
        with gradient 0).
      labels: ``y``, integers in [0, classes), shape ``[...]``; a label outside this range makes its loss and gradient
        NaN.

    Returns:
      One loss per example, shape ``[...]``, float32 (float64 if the scores are).

    Raises:
      ValueError: if the shapes do not match.
      TypeError: if the scores are not floating-point, or the labels are not integers.

    Source: Collins, *Discriminative training methods for hidden Markov models*, 2002.

    >>> multiclass_perceptron_loss(jnp.array([[2.0, 1.5, 0.0], [2.0, 0.0, 3.0]]), jnp.array([0, 0]))
    Array([0., 1.], dtype=float32)
    """
    return _margin_loss(scores, labels, 0.0)
