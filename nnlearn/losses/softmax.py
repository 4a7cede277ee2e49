"""The arithmetic that all softmax losses share, on arrays that have been checked.

A class that does not exist has a logit of -inf. It costs nothing while no label names it, and one that is named costs
+inf; neither makes a NaN, in the loss or in its gradient.
"""

import math

import jax
import jax.numpy as jnp

from nnlearn.tree import safe_divide
from nnlearn.types import ArrayLike, Scalar

Axes = tuple[int, ...]


def shift_logits(logits: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits less their largest, the log of the sum of those exponentials, and the largest.

    Two small numbers lose nothing where the one number ``logsumexp(logits)`` would round away all but the largest
    logit. A row of -inf alone has the sum's logarithm 0, so that nothing divides by the sum.
    """
    # The result does not depend on what is subtracted, so it may be a constant to the derivative.
    largest = jax.lax.stop_gradient(jnp.max(logits, axes, keepdims=True, initial=-jnp.inf))
    largest = jnp.where(largest == -jnp.inf, 0, largest)
    shifted = logits - largest
    total = jnp.sum(jnp.exp(shifted), axes, keepdims=True)
    return shifted, jnp.log(jnp.where(total == 0, 1, total)), largest


def mass_cross_entropy(shifted: jax.Array, log_total: jax.Array, mass: jax.Array, axes: Axes) -> jax.Array:
    """``sum_k mass_k * -log p_k`` with the axes kept at length 1, from what ``shift_logits`` returns.

    A class without mass and with a logit of -inf adds 0, where ``0 * inf`` would be NaN.
    """
    absent = (shifted == -jnp.inf) & (mass == 0)
    picked = jnp.sum(mass * jnp.where(absent, 0, shifted), axes, keepdims=True)
    return jnp.sum(mass, axes, keepdims=True) * log_total - picked


def softmax_loss(
    logits: jax.Array,
    mass: jax.Array,
    include: jax.Array | None,
    axes: Axes,
    *,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    class_weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy from labels as a distribution over classes, with all its options.

    Args:
      logits: ``[..., classes]``, float32 or wider, -inf where a class is left out.
      mass: the labels' weight on each class, of the logits' shape and dtype, 0 where an example is left out.
      include: None, or booleans that say which classes count, of the logits' shape or with ``axes`` of length 1.
      axes: where the classes lie.
      label_smoothing, z_loss: numbers in the logits' dtype.
      class_weights: one weight per class, broadcastable to the logits at equal rank.

    Returns:
      The loss and the labels' total weight of each example, both without ``axes``.
    """
    weighted = mass if class_weights is None else mass * class_weights
    example_weight = jnp.sum(weighted, axes)
    if include is None:
        spread = 1 / math.prod(logits.shape[axis] for axis in axes)
    else:
        kept = jnp.broadcast_to(include, logits.shape).astype(logits.dtype)
        spread = safe_divide(kept, jnp.sum(kept, axes, keepdims=True))
    smooth = (1 - label_smoothing) * mass + label_smoothing * spread
    smooth = smooth if class_weights is None else smooth * class_weights
    shifted, log_total, largest = shift_logits(logits, axes)
    loss = jnp.squeeze(mass_cross_entropy(shifted, log_total, smooth, axes), axes)
    log_sum = jnp.squeeze(largest + log_total, axes)
    # In this order a coefficient of 0 gives 0 even where the square overflows.
    penalty = z_loss * log_sum * log_sum
    return loss + (penalty if class_weights is None else penalty * example_weight), example_weight


def exclude(logits: jax.Array, include: jax.Array | None) -> jax.Array:
    """Logits with -inf where ``include`` is False, which also cuts their gradient."""
    return logits if include is None else jnp.where(include, logits, -jnp.inf)


def integer_mass(labels: jax.Array, logits: jax.Array, include: jax.Array | None, axis: int) -> jax.Array:
    """Integer labels as a distribution over the classes along ``axis``: 1 at the label, 0 elsewhere.

    The comparison with a running index is part of whatever consumes it once compiled: nothing of the logits' size is
    stored, the gradient is one fused pass, and the classes may be sharded, none of which a gather gives. A label that
    is no class makes its example NaN. An example without included classes has no mass.
    """
    classes = jnp.expand_dims(labels.astype(jnp.promote_types(labels.dtype, jnp.int32)), axis)
    index = jax.lax.broadcasted_iota(classes.dtype, logits.shape, axis)
    valid = (classes >= 0) & (classes < logits.shape[axis])
    mass = jnp.where(index == classes, 1, jnp.where(valid, 0, jnp.nan)).astype(logits.dtype)
    if include is not None:
        mass = jnp.where(jnp.any(include, axis, keepdims=True), mass, 0)
    return mass


def as_labels(labels: ArrayLike) -> jax.Array:
    """``labels`` as an array, which must be of integer dtype."""
    array = jnp.asarray(labels)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"labels must be of integer dtype, got {array.dtype.name} of shape {array.shape}; pass "
            "labels.astype(jnp.int32), or a distribution over classes to softmax_cross_entropy"
        )
    return array


def check_label_shape(
    labels: jax.Array, expected: tuple[int, ...], shape: tuple[int, ...], scores: str = "logits"
) -> None:
    """Raise unless integer labels have shape ``expected``, one per example of ``scores`` of ``shape``."""
    if labels.shape == expected:
        return
    cure = "pass one integer per example"
    if labels.shape == shape:
        cure = "for a distribution over classes use softmax_cross_entropy"
    elif labels.size == math.prod(expected):
        cure = f"pass labels.reshape({expected})"
    raise ValueError(f"labels must have shape {expected} for {scores} of shape {shape}, got {labels.shape}; {cure}")
