"""Multi-class losses from logits: cross-entropy and its variants.

Logits may be as large as their dtype allows. A logit of -inf marks a class that does not exist: it adds nothing while
its label weight is 0, and a label on it has loss +inf. Label smoothing gives weight to every class that ``where`` does
not leave out. A logit of +inf or NaN makes the loss NaN.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.checks import check_nonnegative, check_number
from nnlearn.losses.arguments import (
    Axes,
    Axis,
    as_floating,
    as_real,
    as_weights,
    check_reduction,
    check_same_shape,
    is_off,
    mask_over,
    normalize_axes,
    widen,
)
from nnlearn.losses.softmax import (
    as_labels,
    check_label_shape,
    exclude,
    label_loss,
    mass_loss,
    normalize_logits,
    normalizer_loss,
    split_labels,
    spread_over,
)
from nnlearn.sharding.axes import take_rows
from nnlearn.tree import as_hyperparam, safe_divide
from nnlearn.types import ArrayLike, Scalar


class CrossEntropyOptions(NamedTuple):
    """The options of a cross-entropy, not yet checked."""

    label_smoothing: Scalar = 0.0
    z_loss: Scalar = 0.0
    class_weights: ArrayLike | None = None


def _normalized_rows(logits: ArrayLike, labels: ArrayLike, axis: Axis, where: ArrayLike | None):
    """Checked logits, label weights (0 where masked), mask, axes and normalised rows."""
    logits, labels = as_floating("logits", logits), as_real("labels", labels)
    check_same_shape(("logits", "labels"), logits, labels)
    logits, labels = widen(logits, labels)
    axes = normalize_axes(axis, logits.ndim)
    include = mask_over(where, logits.shape, axes)
    mass = labels if include is None else jnp.where(include, labels, 0)
    return logits, mass, include, axes, normalize_logits(exclude(logits, include), axes)


def _distribution_loss(
    logits: ArrayLike, labels: ArrayLike, axis: Axis, where: ArrayLike | None, options: CrossEntropyOptions
) -> tuple[jax.Array, jax.Array]:
    """Loss of each example from a distribution over classes, and its weight in a mean."""
    logits, mass, include, axes, rows = _normalized_rows(logits, labels, axis, where)
    label_smoothing, z_loss, class_weights = _check_options(options, logits, axes)
    if class_weights is not None:
        weight = jnp.sum(mass * class_weights, axes)
    elif include is not None:
        weight = jnp.any(include, axes).astype(logits.dtype)
    else:
        weight = jnp.ones(jnp.squeeze(rows.largest, axes).shape, logits.dtype)
    if not is_off(label_smoothing):
        spread = spread_over(logits.shape, include, axes, logits.dtype)
        mass = (1 - label_smoothing) * mass + label_smoothing * spread
    loss = mass_loss(rows, mass if class_weights is None else mass * class_weights, axes)
    return (loss if is_off(z_loss) else loss + weight * normalizer_loss(rows, z_loss, axes)), weight


def _integer_label_loss(
    logits: ArrayLike, labels: ArrayLike, axis: Axis, where: ArrayLike | None, options: CrossEntropyOptions
) -> tuple[jax.Array, jax.Array]:
    """As ``_distribution_loss``, from integer labels; several class axes are moved last and flattened."""
    logits, labels = as_floating("logits", logits), as_labels(labels)
    if axis is None:
        raise ValueError("axis must be an integer or a tuple of integers, got None; name the axes of the classes")
    axes = normalize_axes(axis, logits.ndim)
    batch_axes = tuple(one for one in range(logits.ndim) if one not in axes)
    batch_shape = tuple(logits.shape[one] for one in batch_axes)
    check_label_shape(labels, batch_shape, logits.shape)
    include = mask_over(where, logits.shape, axes)
    if len(axes) != 1:
        if include is not None:
            include = jnp.broadcast_to(include, logits.shape).transpose(batch_axes + axes).reshape(*batch_shape, -1)
        logits = logits.transpose(batch_axes + axes).reshape(*batch_shape, -1)
        axes = (logits.ndim - 1,)
    (logits,) = widen(logits)
    label_smoothing, z_loss, class_weights = _check_options(options, logits, axes)
    keep = None if include is None else jnp.broadcast_to(jnp.any(include, axes), labels.shape)
    labels, weight = split_labels(labels, logits.shape[axes[0]], logits.dtype, keep)
    if class_weights is not None:
        weight = weight * take_rows(class_weights.reshape(-1), labels)
    rows = normalize_logits(exclude(logits, include), axes)
    if is_off(label_smoothing):
        loss = label_loss(rows, labels, weight, axes[0])
    else:
        spread = label_smoothing * spread_over(logits.shape, include, axes, logits.dtype)
        spread = spread if class_weights is None else spread * class_weights
        loss = label_loss(rows, labels, (1 - label_smoothing) * weight, axes[0]) + mass_loss(rows, spread, axes)
    return (loss if is_off(z_loss) else loss + weight * normalizer_loss(rows, z_loss, axes)), weight


def _check_options(
    options: CrossEntropyOptions, logits: jax.Array, axes: Axes
) -> tuple[float | jax.Array, float | jax.Array, jax.Array | None]:
    """Check the options and convert them for arithmetic with the logits."""
    label_smoothing, z_loss, class_weights = options
    check_number("label_smoothing", label_smoothing, low=0.0, high=1.0)
    check_nonnegative("z_loss", z_loss)
    if class_weights is not None:
        class_weights = as_weights("class_weights", class_weights).astype(logits.dtype)
        classes = logits.shape[axes[0]]
        if class_weights.shape != (classes,):
            raise ValueError(
                f"class_weights must have shape ({classes},), one weight per class of logits {logits.shape}, got "
                f"{class_weights.shape}"
            )
        class_weights = class_weights.reshape([classes if axis == axes[0] else 1 for axis in range(logits.ndim)])
    return as_hyperparam(label_smoothing, logits.dtype), as_hyperparam(z_loss, logits.dtype), class_weights


def softmax_cross_entropy(
    logits: ArrayLike, labels: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> jax.Array:
    """Softmax cross-entropy with distributions as labels, ``-sum_k y_k log softmax(x)_k``.

    Args:
      logits: ``x``, unnormalised log-probabilities, floating-point, shape ``[..., classes]``.
      labels: ``y``, the weight of each class, real, of the same shape; each row usually sums to 1.
      axis: the axis, or axes, of the classes; None for all.
      where: booleans of the logits' shape (which classes exist; labels on the others are dropped) or of the result's
        (which examples count; the others have loss 0 and no gradient, even if they are NaN).

    Returns:
      One loss per example in nats, shape ``[...]``, float32 (float64 if an argument is).

    Raises:
      ValueError: if the shapes do not match.
      TypeError: if the logits are not floating-point, the labels are complex, or ``where`` is not boolean.

    Source: Goodfellow, Bengio & Courville, *Deep Learning*, 2016, section 6.2.2.3.

    >>> softmax_cross_entropy(jnp.log(jnp.array([[0.8, 0.2]])), jnp.array([[1.0, 0.0]]))
    Array([0.2231], dtype=float32)
    """
    return _distribution_loss(logits, labels, axis, where, CrossEntropyOptions())[0]


def safe_softmax_cross_entropy(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """An alias of ``softmax_cross_entropy`` over the last axis, for compatibility with optax.

    ``softmax_cross_entropy`` already handles logits of -inf.

    Args:
      logits: unnormalised log-probabilities, floating-point, shape ``[..., classes]``; -inf where a class does not
        exist.
      labels: the weight of each class, real, of the same shape; each row usually sums to 1.

    Returns:
      One loss per example in nats, shape ``[...]``, float32 (float64 if an argument is).

    Raises:
      ValueError: if the shapes differ.
      TypeError: if the logits are not floating-point, or the labels are complex.

    Source: Goodfellow, Bengio & Courville, *Deep Learning*, 2016, section 6.2.2.3.

    >>> safe_softmax_cross_entropy(jnp.array([0.0, 0.0, -jnp.inf]), jnp.array([1.0, 0.0, 0.0]))
    Array(0.6931, dtype=float32)
    """
    return softmax_cross_entropy(logits, labels)


def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    class_weights: ArrayLike | None = None,
) -> jax.Array:
    """Softmax cross-entropy with integer labels, ``-log softmax(x)_y``.

    With options: ``-sum_k w_k q_k log softmax(x)_k + w_y z_loss log(sum_k exp(x_k))**2``, where
    ``q = (1 - label_smoothing) onehot(y) + label_smoothing / classes`` and ``w`` are the class weights.

    Args:
      logits: ``x``, unnormalised log-probabilities, floating-point, shape ``[..., classes]``.
      labels: ``y``, integers in [0, classes), shape ``[...]``. A label outside this range makes its loss and gradient
        NaN, unless ``where`` leaves it out: ``where=labels != -100``.
      axis: the axis of the classes. With several axes a label indexes their product in row-major order.
      where: booleans of the logits' shape (which classes exist) or of the labels' (which examples count; the others
        have loss 0 and no gradient, even if they are NaN).
      label_smoothing: share of each label that is spread evenly over the classes that exist, in [0, 1].
      z_loss: coefficient, >= 0, of a penalty on the squared log-normaliser of the logits; 1e-4 is common.
      class_weights: ``w``, real and >= 0, shape ``[classes]``, 1 by default; larger weights emphasise rare classes.

    Returns:
      One loss per example in nats, shape ``[...]``, float32 (float64 if the logits are).

    Raises:
      ValueError: if the shapes do not match, or an option is out of range.
      TypeError: if the logits are not floating-point, the labels are not integers, or ``where`` is not boolean.

    Source: Goodfellow, Bengio & Courville, *Deep Learning*, 2016, section 6.2.2.3; smoothing: Szegedy et al.,
    *Rethinking the Inception architecture*, 2016; ``z_loss``: Chowdhery et al., *PaLM*, 2022, section 5.

    >>> logits = jnp.log(jnp.array([[0.8, 0.2], [0.5, 0.5]]))
    >>> softmax_cross_entropy_with_integer_labels(logits, jnp.array([0, 1])).round(2)
    Array([0.22, 0.69], dtype=float32)
    """
    return _integer_label_loss(
        logits, labels, axis, where, CrossEntropyOptions(label_smoothing, z_loss, class_weights)
    )[0]


def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    class_weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """The mean cross-entropy of a batch, from integer labels or distributions.

    Each example has the loss of ``softmax_cross_entropy_with_integer_labels``. The mean is ``sum_i loss_i / sum_i w_i``
    over the examples kept, where ``w_i`` is the class weight of the label (for a distribution, ``sum_k w_k y_k``), or 1
    without class weights.

    Args:
      logits: unnormalised log-probabilities, floating-point, shape ``[..., classes]``.
      labels: integers in [0, classes), shape ``[...]``, or distributions, real, of the logits' shape.
      label_smoothing: share of each label that is spread evenly over the classes that exist, in [0, 1].
      z_loss: coefficient, >= 0, of a penalty on the squared log-normaliser of the logits; 1e-4 is common.
      class_weights: real and >= 0, shape ``[classes]``, 1 by default; larger weights emphasise rare classes.
      where: booleans of shape ``[...]`` (which examples count) or of the logits' shape (which classes exist; an example
        without any does not count). To ignore padding labels, pass ``where=labels != -100``.
      reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one loss per example.

    Returns:
      A scalar in nats, or shape ``[...]`` for ``"none"``, float32 (float64 if an argument is). The mean of no examples
      is 0. A label outside [0, classes) makes the result NaN, unless ``where`` leaves it out.

    Raises:
      ValueError: if the shapes do not match, an option is out of range, or ``reduction`` is unknown.
      TypeError: if the logits are not floating-point, class indices are not integers, or ``where`` is not boolean.

    Source: Goodfellow, Bengio & Courville, *Deep Learning*, 2016, section 6.2.2.3.

    >>> logits = jnp.log(jnp.array([[0.8, 0.2], [0.5, 0.5]]))
    >>> cross_entropy(logits, jnp.array([0, 1]))
    Array(0.4581, dtype=float32)
    >>> cross_entropy(logits, jnp.array([0, -100]), where=jnp.array([True, False]))
    Array(0.2231, dtype=float32)
    """
    check_reduction(reduction)
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    # Integers of the logits' rank but another shape are class indices with an extra axis, which the check reports.
    soft = labels.ndim == logits.ndim and (labels.shape == logits.shape or jnp.issubdtype(labels.dtype, jnp.floating))
    loss, weight = (_distribution_loss if soft else _integer_label_loss)(
        logits, labels, -1, where, CrossEntropyOptions(label_smoothing, z_loss, class_weights)
    )
    if reduction == "none":
        return loss
    return jnp.sum(loss) if reduction == "sum" else safe_divide(jnp.sum(loss), jnp.sum(weight))


def poly_loss_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    epsilon: Scalar = 2.0,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Cross-entropy plus a linear term, ``sum_k y_k (-log p_k + epsilon (1 - p_k))`` with ``p = softmax(x)``.

    Args:
      logits: ``x``, unnormalised log-probabilities, floating-point, shape ``[..., classes]``.
      labels: ``y``, the weight of each class, real, of the same shape; each row usually sums to 1.
      epsilon: coefficient of the linear term, finite and >= -1 (below -1 a correct prediction costs more than a wrong
        one).
      axis: the axis, or axes, of the classes; None for all.
      where: booleans of the logits' shape (which classes exist; labels on the others are dropped) or of the result's
        (which examples count; the others have loss 0 and no gradient, even if they are NaN).

    Returns:
      One loss per example in nats, shape ``[...]``, float32 (float64 if an argument is).

    Raises:
      ValueError: if the shapes do not match, or ``epsilon`` is out of range.
      TypeError: if the logits are not floating-point, the labels are complex, or ``where`` is not boolean.

    Source: Leng et al., *PolyLoss: a polynomial expansion perspective of classification loss functions*, 2022.

    >>> poly_loss_cross_entropy(jnp.log(jnp.array([[0.8, 0.2]])), jnp.array([[1.0, 0.0]]), epsilon=2.0)
    Array([0.6231], dtype=float32)
    """
    check_number("epsilon", epsilon, low=-1.0, high=float("inf"), high_open=True)
    logits, mass, _, axes, rows = _normalized_rows(logits, labels, axis, where)
    wrong = jnp.sum(mass * -jnp.expm1(rows.shifted - rows.log_total), axes)
    return mass_loss(rows, mass, axes) + as_hyperparam(epsilon, logits.dtype) * wrong
