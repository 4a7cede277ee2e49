"""Overlap losses for segmentation: Dice, Tversky and intersection over union.

All have one form, ``(alpha FP + beta FN) / (TP + alpha FP + beta FN + smooth)``, with sums over pixels of true
positives (``TP = sum p t``), false positives (``FP = sum p (1 - t)``) and false negatives (``FN = sum (1 - p) t``).
This equals one minus the usual overlap, without the subtraction.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checks import check_nonnegative, check_number, known
from nnlearn.losses.arguments import (
    Axis,
    as_floating,
    as_real,
    as_weights,
    check_reduction,
    check_same_shape,
    mask_over,
    normalize_axes,
    weighted_mean,
    widen,
)
from nnlearn.tree import as_hyperparam, safe_divide
from nnlearn.types import ArrayLike, Scalar


def _prepare_regions(
    predictions, targets, activate: bool, where
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Probabilities of presence and absence and targets, all ``[..., classes]``, and the mask.

    Masked probabilities and targets are 0, which adds nothing to the three sums.
    """
    predicted, target = as_floating("predictions", predictions), as_real("targets", targets)
    if predicted.ndim == target.ndim - 1:
        predicted = predicted[..., None]
    if target.ndim == predicted.ndim - 1:
        target = target[..., None]
    check_same_shape(("predictions", "targets"), predicted, target)
    if predicted.ndim == 0:
        raise ValueError("predictions must have a class axis, shape [..., classes], got a scalar")
    mask = mask_over(where, predicted.shape, (predicted.ndim - 1,))
    if not activate:
        _check_probabilities(predicted, mask)
    predicted, target = widen(predicted, target)
    if mask is not None:
        # A class masked at a pixel gets -inf and no share of the softmax; a pixel masked altogether gets 0, not NaN.
        gone = jnp.any(mask, -1, keepdims=True) & activate & (predicted.shape[-1] > 1)
        predicted = jnp.where(mask, predicted, jnp.where(gone, -jnp.inf, 0))
        target = jnp.where(mask, target, 0)
    if not activate:
        present, absent = predicted, jnp.maximum(1 - predicted, 0)  # a rounded 1 may exceed 1 slightly
    elif predicted.shape[-1] == 1:
        present, absent = jax.nn.sigmoid(predicted), jax.nn.sigmoid(-predicted)  # 1 - p loses all digits near p = 1
    else:
        present = jax.nn.softmax(predicted, -1)
        absent = 1 - present
    if mask is not None:
        present = jnp.where(mask, present, 0)
    return present, absent, target, mask


def _check_probabilities(predicted: jax.Array, mask: jax.Array | None) -> None:
    whole = known(predicted) and predicted.is_fully_addressable and (mask is None or known(mask))
    if not whole:
        return
    values = np.asarray(predicted if mask is None else jnp.where(mask, predicted, 0), np.float64)
    if np.any((values < 0) | (values > 1.001)):  # rounded in low precision, a probability may exceed 1
        raise ValueError(f"predictions must be probabilities in [0, 1], got {values.min()} to {values.max()}; for "
                         "logits leave apply_softmax (or apply_sigmoid) at True")  # fmt: skip


def _class_losses(present, absent, target, axes, smooth, alpha, beta) -> jax.Array:
    """The loss of each class, summed over ``axes``."""
    smooth, alpha, beta = (as_hyperparam(number, target.dtype) for number in (smooth, alpha, beta))
    found = jnp.sum(present * target, axes)
    wrong = alpha * jnp.sum(present * (1 - target), axes) + beta * jnp.sum(absent * target, axes)
    return safe_divide(wrong, found + wrong + smooth)


def _pixel_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """The axes to sum over; by default all but the first and the last."""
    if axis is None:
        return tuple(range(1, ndim - 1))
    axes = normalize_axes(axis, ndim)
    if ndim - 1 in axes:
        raise ValueError(f"axis {axis} names the last axis, that of the classes; sum over classes by reduction='sum'")
    return axes


def _overlap_loss(
    predictions, targets, class_weights, smooth, alpha, beta, activate, reduction, ignore_background, axis, where
) -> jax.Array:
    for name, number in (("smooth", smooth), ("alpha", alpha), ("beta", beta)):
        check_nonnegative(name, number)
    check_reduction(reduction)
    present, absent, target, _ = _prepare_regions(predictions, targets, activate, where)
    loss = _class_losses(present, absent, target, _pixel_axes(axis, target.ndim), smooth, alpha, beta)
    if class_weights is not None:
        weights = as_weights("class_weights", class_weights)
        if weights.shape != loss.shape[-1:]:
            raise ValueError(f"class_weights must have shape {loss.shape[-1:]}, one per class, got {weights.shape}")
        loss = loss * weights.astype(loss.dtype).reshape((1,) * (loss.ndim - 1) + weights.shape)
    if ignore_background and loss.shape[-1] > 1:
        loss = loss[..., 1:]
    if reduction == "none":
        return loss
    return jnp.mean(loss, -1) if reduction == "mean" else jnp.sum(loss, -1)


def dice_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    class_weights: ArrayLike | None = None,
    smooth: Scalar = 1.0,
    alpha: Scalar = 0.5,
    beta: Scalar = 0.5,
    apply_softmax: bool = True,
    reduction: str = "mean",
    ignore_background: bool = False,
    axis: Axis = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Dice loss, ``1 - (TP + smooth) / (TP + a FP + b FN + smooth)``.

    With ``TP = sum p t``, ``FP = sum p (1 - t)`` and ``FN = sum (1 - p) t`` over the pixels. With ``a = b = 0.5`` and
    ``smooth = 0`` the fraction is ``2 sum p t / (sum p + sum t)``.

    Args:
      predictions: logits, floating-point, shape ``[batch, ..., classes]``; a sigmoid is applied if there is one class
        or no class axis, else a softmax.
      targets: ``t``, 0 or 1 (or a fraction of the pixel), real, of the same shape.
      class_weights: real and >= 0, shape ``[classes]``; each class's loss is multiplied by its weight.
      smooth: added to numerator and denominator, finite and >= 0; at 0 a class that is neither predicted nor present
        has loss 0.
      alpha: ``a``, the weight of false positives, finite and >= 0.
      beta: ``b``, the weight of false negatives, finite and >= 0.
      apply_softmax: whether ``predictions`` are logits; if not, they are probabilities.
      reduction: over the classes, ``"mean"``, ``"sum"``, or ``"none"``.
      ignore_background: whether to leave out class 0, if there are several.
      axis: the axis, or axes, of the pixels, to sum over; None for all but the first and the last.
      where: booleans of the predictions' shape without the classes (which pixels count) or with them (which classes
        exist at each pixel); entries that are False add nothing and get no gradient, even if they are NaN.

    Returns:
      The loss of each image, shape ``[batch]`` (``[batch, classes]`` for ``"none"``), in [0, 1] where no class weights
      are given and ``reduction`` is not ``"sum"``; float32 (float64 if an argument is). 0 for an image that is left
      out.

    Raises:
      ValueError: if the shapes do not match, an argument is out of range, or ``reduction`` is unknown.
      TypeError: if the predictions are not floating-point, the targets are complex, or ``where`` is not boolean.

    Source: Milletari, Navab & Ahmadi, *V-Net*, 2016.

    >>> logits, targets = jnp.array([[[9.0], [9.0], [-9.0]]]), jnp.array([[[1.0], [0.0], [0.0]]])
    >>> dice_loss(logits, targets, smooth=0.0).round(3)
    Array([0.333], dtype=float32)
    """
    return _overlap_loss(
        predictions, targets, class_weights, smooth, alpha, beta, apply_softmax, reduction, ignore_background, axis,
        where,
    )  # fmt: skip


def multiclass_generalized_dice_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    smooth: Scalar = 1.0,
    apply_softmax: bool = True,
    ignore_background: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Generalised Dice loss: classes are weighted by ``1 / f**2``, with ``f`` their number of pixels in the batch.

    The weights are scaled to a mean of 1. A class without pixels in the batch has the weight of the rarest class with
    any.

    Args:
      predictions: logits, floating-point, shape ``[batch, ..., classes]``.
      targets: 0 or 1 (or a fraction of the pixel), real, of the same shape.
      smooth: as in ``dice_loss``.
      apply_softmax: whether ``predictions`` are logits; if not, they are probabilities.
      ignore_background: whether to leave out class 0.
      where: booleans of the predictions' shape without the classes (which pixels count) or with them (which classes
        exist at each pixel); entries that are False add nothing and get no gradient, even if they are NaN.

    Returns:
      A scalar, the mean over the classes and over the images with unmasked pixels, float32 (float64 if an argument is).

    Raises:
      ValueError: if the shapes do not match, or ``smooth`` is out of range.
      TypeError: if the predictions are not floating-point, the targets are complex, or ``where`` is not boolean.

    Source: Sudre et al., *Generalised Dice overlap as a deep learning loss function for highly unbalanced
    segmentations*, 2017.

    >>> targets = jax.nn.one_hot(jnp.array([[0, 0, 0, 1]]), 2)
    >>> multiclass_generalized_dice_loss(8 * targets - 4, targets).round(4)
    Array(0.0003, dtype=float32)
    """
    check_nonnegative("smooth", smooth)
    present, absent, target, mask = _prepare_regions(predictions, targets, apply_softmax, where)
    if target.ndim < 2:
        raise ValueError(f"predictions must have shape [batch, ..., classes], got {target.shape}")
    frequencies = jnp.sum(target, tuple(range(target.ndim - 1)))
    weights = safe_divide(1.0, jnp.square(frequencies))
    weights = jnp.where(frequencies == 0, jnp.max(weights), weights)
    weights = jnp.where(jnp.any(weights > 0), weights, 1)  # in an empty batch all classes are equal
    weights = weights * (weights.size / jnp.sum(weights))
    loss = _class_losses(present, absent, target, _pixel_axes(None, target.ndim), smooth, 0.5, 0.5)
    loss = loss * weights.reshape((1,) * (loss.ndim - 1) + weights.shape)
    if mask is not None:
        mask = jnp.any(mask, tuple(range(1, target.ndim)), keepdims=True).reshape(loss.shape[:-1] + (1,))
        mask = jnp.broadcast_to(mask, loss.shape)
    first = int(ignore_background and loss.shape[-1] > 1)
    return weighted_mean(loss[..., first:], None, mask if mask is None else mask[..., first:])


def binary_dice_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    smooth: Scalar = 1.0,
    apply_sigmoid: bool = True,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Binary Dice loss, ``1 - (2 sum p t + 2 smooth) / (sum p + sum t + 2 smooth)`` over the pixels.

    Args:
      predictions: logits, floating-point, shape ``[batch, ...]`` or ``[batch, ..., 1]``.
      targets: ``t``, 0 or 1 (or a fraction of the pixel), real, of the same shape.
      smooth: as in ``dice_loss``.
      apply_sigmoid: whether ``predictions`` are logits; if not, they are probabilities.
      where: booleans of the predictions' shape (which pixels count); the others add nothing, even if they are NaN.

    Returns:
      One loss in [0, 1] per image, shape ``[batch]``, float32 (float64 if an argument is). 0 for an image that is left
      out.

    Raises:
      ValueError: if the shapes do not match, or ``smooth`` is out of range.
      TypeError: if the predictions are not floating-point, the targets are complex, or ``where`` is not boolean.

    Source: Milletari, Navab & Ahmadi, *V-Net*, 2016.

    >>> binary_dice_loss(jnp.array([[9.0, 9.0, -9.0]]), jnp.array([[1, 0, 0]]), smooth=0.0).round(3)
    Array([0.333], dtype=float32)
    """
    predictions, targets = jnp.asarray(predictions), jnp.asarray(targets)
    if predictions.ndim == targets.ndim and predictions.shape[-1:] != (1,):
        predictions, targets = predictions[..., None], targets[..., None]
    return dice_loss(predictions, targets, smooth=smooth, apply_softmax=apply_sigmoid, where=where)


def tversky_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    alpha: Scalar = 0.3,
    beta: Scalar = 0.7,
    gamma: Scalar = 1.0,
    smooth: Scalar = 1.0,
    apply_softmax: bool = True,
    ignore_background: bool = False,
    axis: Axis = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Tversky loss: with the defaults false negatives cost more than false positives, which suits small regions.

    The mean over the classes of ``(1 - (TP + smooth) / (TP + alpha FP + beta FN + smooth))**(1 / gamma)``.

    Args:
      predictions: logits, floating-point, shape ``[batch, ..., classes]``, as in ``dice_loss``.
      targets: 0 or 1 (or a fraction of the pixel), real, of the same shape.
      alpha: the weight of false positives, finite and >= 0.
      beta: the weight of false negatives, finite and >= 0.
      gamma: finite and > 0; above 1, nearly correct regions have larger gradients (4/3 is common). The derivative at a
        loss of exactly 0 is 0.
      smooth: as in ``dice_loss``.
      apply_softmax: whether ``predictions`` are logits; if not, they are probabilities.
      ignore_background: whether to leave out class 0, if there are several.
      axis: the axis, or axes, of the pixels, to sum over; None for all but the first and the last.
      where: booleans of the predictions' shape without the classes (which pixels count) or with them (which classes
        exist at each pixel); entries that are False add nothing and get no gradient, even if they are NaN.

    Returns:
      One loss in [0, 1] per image, shape ``[batch]``, float32 (float64 if an argument is). 0 for an image that is left
      out.

    Raises:
      ValueError: if the shapes do not match, or an argument is out of range.
      TypeError: if the predictions are not floating-point, the targets are complex, or ``where`` is not boolean.

    Source: Salehi, Erdogmus & Gholipour, *Tversky loss function for image segmentation using 3D fully convolutional
    deep networks*, 2017; ``gamma``: Abraham & Khan, *A novel focal Tversky loss function with improved attention U-Net
    for lesion segmentation*, 2019.

    >>> missed, found = jnp.array([[[-9.0], [9.0]]]), jnp.array([[[9.0], [9.0]]])
    >>> targets = jnp.array([[[1], [1]]])
    >>> tversky_loss(missed, targets, smooth=0.0).round(3), tversky_loss(found, targets, smooth=0.0).round(3)
    (Array([0.412], dtype=float32), Array([0.], dtype=float32))
    """
    check_number("gamma", gamma, low=0.0, high=math.inf, low_open=True, high_open=True)
    loss = _overlap_loss(
        predictions, targets, None, smooth, alpha, beta, apply_softmax, "none", ignore_background, axis, where
    )
    nothing = loss == 0
    gamma = as_hyperparam(gamma, loss.dtype)
    return jnp.mean(jnp.where(nothing, 0, jnp.power(jnp.where(nothing, 1, loss), 1 / gamma)), -1)


def iou_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    smooth: Scalar = 1.0,
    apply_softmax: bool = True,
    ignore_background: bool = False,
    axis: Axis = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Intersection-over-union loss, also called soft Jaccard loss.

    The mean over the classes of ``1 - (sum p t + smooth) / (sum p + sum t - sum p t + smooth)``.

    Args:
      predictions: logits, floating-point, shape ``[batch, ..., classes]``, as in ``dice_loss``.
      targets: ``t``, 0 or 1 (or a fraction of the pixel), real, of the same shape.
      smooth: as in ``dice_loss``.
      apply_softmax: whether ``predictions`` are logits; if not, they are probabilities.
      ignore_background: whether to leave out class 0, if there are several.
      axis: the axis, or axes, of the pixels, to sum over; None for all but the first and the last.
      where: booleans of the predictions' shape without the classes (which pixels count) or with them (which classes
        exist at each pixel); entries that are False add nothing and get no gradient, even if they are NaN.

    Returns:
      One loss in [0, 1] per image, shape ``[batch]``, float32 (float64 if an argument is). 0 for an image that is left
      out.

    Raises:
      ValueError: if the shapes do not match, or ``smooth`` is out of range.
      TypeError: if the predictions are not floating-point, the targets are complex, or ``where`` is not boolean.

    Source: Rahman & Wang, *Optimizing intersection-over-union in deep neural networks for image segmentation*, 2016.

    >>> iou_loss(jnp.array([[[9.0], [9.0], [-9.0]]]), jnp.array([[[1], [0], [0]]]), smooth=0.0).round(3)
    Array([0.5], dtype=float32)
    """
    return _overlap_loss(
        predictions, targets, None, smooth, 1.0, 1.0, apply_softmax, "mean", ignore_background, axis, where
    )
