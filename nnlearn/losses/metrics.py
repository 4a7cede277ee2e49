"""Evaluation metrics, which are reported and not trained on."""

import jax
import jax.numpy as jnp

from nnlearn.losses.arguments import as_boolean, as_floating, as_real, weighted_mean, widen
from nnlearn.losses.softmax import as_labels, check_label_shape
from nnlearn.tree import widest
from nnlearn.types import ArrayLike


def accuracy(logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None = None) -> jax.Array:
    """The fraction of examples whose largest logit is that of the label; among equal logits the first is the largest.

    Args:
      logits: scores of any kind, floating-point, shape ``[..., classes]``; an example with a NaN counts as wrong.
      labels: integers, shape ``[...]`` (a label outside [0, classes) counts as wrong), or distributions of the logits'
        shape, whose largest entry is the label.
      where: booleans of shape ``[...]``, which examples count.

    Returns:
      A scalar in [0, 1], float32 (float64 if the logits are); 0 when no example counts. Its gradient is 0.

    Raises:
      ValueError: if the shapes do not match.
      TypeError: if the logits are not floating-point, class indices are not integers, or ``where`` is not boolean.

    Source: Hastie, Tibshirani & Friedman, *The Elements of Statistical Learning*, 2009, section 7.2 (one minus the
    misclassification error).

    >>> accuracy(jnp.array([[2.0, 1.0], [0.0, 3.0]]), jnp.array([0, 0]))
    Array(0.5, dtype=float32)
    """
    logits = as_floating("logits", logits)
    if jnp.shape(labels) == logits.shape:
        labels = jnp.argmax(as_real("labels", labels), -1)
    labels = as_labels(labels)
    check_label_shape(labels, logits.shape[:-1], logits.shape)
    classes = widest(labels.dtype, jnp.int32)
    right = (jnp.argmax(logits, -1).astype(classes) == labels.astype(classes)) & ~jnp.any(jnp.isnan(logits), -1)
    mask = None if where is None else as_boolean(where)
    if mask is not None and mask.shape != right.shape:
        raise ValueError(f"where must have the labels' shape {right.shape}, got {mask.shape}")
    return weighted_mean(right.astype(widen(logits)[0].dtype), None, mask)
