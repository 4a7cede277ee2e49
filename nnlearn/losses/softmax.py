"""Arithmetic shared by the softmax losses, on checked arrays.

A class that does not exist has a logit of -inf. It adds nothing unless a label names it; then the loss is +inf. Neither
case gives NaN in the loss or its gradient.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.losses.arguments import Axes
from nnlearn.sharding.axes import automatic, explicit_spec
from nnlearn.tree import safe_divide, widest
from nnlearn.types import ArrayLike


class Normalized(NamedTuple):
    """Logits, the largest of each row, and the log of the sum of exponentials of ``logits - largest``.

    The last two keep the class axes with length 1.
    """

    logits: jax.Array
    largest: jax.Array
    log_total: jax.Array

    @property
    def shifted(self) -> jax.Array:
        """``log softmax`` before ``log_total`` is subtracted."""
        return self.logits - self.largest


def normalize_logits(logits: jax.Array, axes: Axes) -> Normalized:
    """Split a row's ``logsumexp`` into ``largest + log_total``, so that ``log softmax = shifted - log_total``.

    The two parts keep digits that ``logsumexp`` would round away next to a large logit. In a row of only -inf the
    logarithm is 0, so that nothing divides by its sum.
    """
    # No loss depends on the value subtracted, so derivatives may treat it as a constant.
    largest = jax.lax.stop_gradient(jnp.max(logits, axes, keepdims=True, initial=-jnp.inf))
    largest = jnp.where(largest == -jnp.inf, 0, largest)
    total = jnp.sum(jnp.exp(logits - largest), axes, keepdims=True)
    return Normalized(logits, largest, jnp.log(jnp.where(total == 0, 1, total)))


def mass_loss(rows: Normalized, mass: jax.Array, axes: Axes) -> jax.Array:
    """``sum_k mass_k * -log p_k`` over ``axes``, the cross-entropy from a weight on each class.

    A class without mass and with a logit of -inf adds 0 instead of the NaN of ``0 * inf``.
    """
    shifted = rows.shifted
    absent = (shifted == -jnp.inf) & (mass == 0)
    picked = jnp.sum(mass * jnp.where(absent, 0, shifted), axes)
    return jnp.sum(mass, axes) * jnp.squeeze(rows.log_total, axes) - picked


def label_loss(rows: Normalized, labels: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    """``weight * -log p_label``, from integer labels, without another array of the logits' size."""
    picked = pick(rows.logits, labels, axis) - jnp.squeeze(rows.largest, axis)
    absent = (picked == -jnp.inf) & (weight == 0)
    return weight * (jnp.squeeze(rows.log_total, axis) - jnp.where(absent, 0, picked))


def normalizer_loss(rows: Normalized, z_loss: float | jax.Array, axes: Axes) -> jax.Array:
    """``z_loss * logsumexp**2``, clipped before the square overflows, so that a coefficient of 0 gives 0."""
    log_sum = jnp.squeeze(rows.largest + rows.log_total, axes)
    limit = 0.5 * math.sqrt(float(jnp.finfo(log_sum.dtype).max))
    return z_loss * jnp.square(jnp.clip(log_sum, -limit, limit))


def spread_over(shape: tuple[int, ...], include: jax.Array | None, axes: Axes, dtype) -> jax.Array:
    """The uniform distribution over the classes that ``include`` keeps; 0 on the others and in rows without any."""
    if include is None:
        return jnp.full(shape, 1 / max(1, math.prod(shape[axis] for axis in axes)), dtype)
    kept = jnp.broadcast_to(include, shape).astype(dtype)
    return safe_divide(kept, jnp.sum(kept, axes, keepdims=True))


def exclude(logits: jax.Array, include: jax.Array | None) -> jax.Array:
    """Logits with -inf where ``include`` is False, which also removes their gradient."""
    return logits if include is None else jnp.where(include, logits, -jnp.inf)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def pick(values: jax.Array, labels: jax.Array, axis: int) -> jax.Array:
    """The value at each label along ``axis``, which is removed; labels must be valid."""

    def take(values, labels):
        return jnp.squeeze(jnp.take_along_axis(values, jnp.expand_dims(labels, axis), axis), axis)

    return automatic(take, values, labels, spec=lambda _: explicit_spec(labels))


@pick.defjvp
def _pick_jvp(axis, primals, tangents):
    # By comparison, whose transpose is elementwise and fuses with its successors; that of a gather is a scatter.
    (values, labels), (change, _) = primals, tangents
    classes = jax.lax.broadcasted_iota(labels.dtype, values.shape, axis % values.ndim)
    picked = jnp.where(classes == jnp.expand_dims(labels, axis), change, 0)
    return pick(values, labels, axis), jnp.sum(picked, axis)


def split_labels(labels: jax.Array, classes: int, dtype, keep: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Labels with 0 for invalid ones, and the weight of each: 1, or NaN if invalid.

    An index out of range does not fail in a compiled program: -1 would silently mean the last class. Labels that
    ``keep``, booleans of the labels' shape, leaves out have weight 0, valid or not.
    """
    labels = labels.astype(widest(labels.dtype, jnp.int32))  # a uint8 cannot be compared with 1,000 classes
    valid = (labels >= 0) & (labels < classes)
    weight = one_or_nan(valid if keep is None else valid | ~keep, dtype)
    return jnp.where(valid, labels, 0), weight if keep is None else jnp.where(keep, weight, 0)


def one_or_nan(valid: jax.Array, dtype) -> jax.Array:
    """1 where ``valid``, else NaN, without a NaN constant, which ``jax_debug_nans`` would always report.

    >>> one_or_nan(jnp.array([True, False]), jnp.float32)
    Array([ 1., nan], dtype=float32)
    """
    return jnp.sqrt(jnp.where(valid, 1, -1).astype(dtype))


def as_labels(labels: ArrayLike) -> jax.Array:
    """``labels`` as an array; raises ``TypeError`` if its dtype is not integer."""
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
    """Raise ``ValueError`` if integer labels do not have shape ``expected``, one per example of the scores."""
    if labels.shape == expected:
        return
    cure = "pass one integer per example"
    if labels.shape == shape:
        cure = "for a distribution over classes use softmax_cross_entropy"
    elif labels.size == math.prod(expected):
        cure = f"pass labels.reshape({expected})"
    raise ValueError(f"labels must have shape {expected} for {scores} of shape {shape}, got {labels.shape}; {cure}")
