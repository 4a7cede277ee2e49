"""Regression losses: squared, absolute, Huber and log-cosh."""

import math

import jax
import jax.numpy as jnp

from nnlearn.checks import check_number
from nnlearn.losses.arguments import as_boolean, as_weights, lead_over, prepare_pair, weighted_mean
from nnlearn.tree import as_hyperparam
from nnlearn.types import ArrayLike, Scalar


def squared_error(predictions: ArrayLike, targets: ArrayLike | None = None) -> jax.Array:
    """Squared error, ``(prediction - target)**2``.

    Args:
      predictions: floating-point, of any shape ``[...]``.
      targets: real, of the same shape or a scalar; 0 by default.

    Returns:
      One loss per element, shape ``[...]``, float32 (float64 if an argument is), in squared units of the targets.

    Raises:
      ValueError: if the shapes differ.
      TypeError: if the predictions are not floating-point, or the targets are complex.

    Source: Hastie, Tibshirani & Friedman, *The Elements of Statistical Learning*, 2009, section 2.4.

    >>> squared_error(jnp.array([1.0, 3.0]), jnp.array([1.5, 1.0]))
    Array([0.25, 4.  ], dtype=float32)
    """
    predicted, target = prepare_pair(predictions, targets)
    return jnp.square(predicted - target)


def l2_loss(predictions: ArrayLike, targets: ArrayLike | None = None) -> jax.Array:
    """Half the squared error, ``(prediction - target)**2 / 2``; its derivative is the error.

    Args:
      predictions: floating-point, of any shape ``[...]``.
      targets: real, of the same shape or a scalar; 0 by default.

    Returns:
      One loss per element, shape ``[...]``, float32 (float64 if an argument is), in squared units of the targets.

    Raises:
      ValueError: if the shapes differ.
      TypeError: if the predictions are not floating-point, or the targets are complex.

    Source: Bishop, *Pattern Recognition and Machine Learning*, 2006, equation 1.2.

    >>> l2_loss(jnp.array([1.0, 3.0]), jnp.array([1.5, 1.0]))
    Array([0.125, 2.   ], dtype=float32)
    """
    return 0.5 * squared_error(predictions, targets)


def absolute_error(predictions: ArrayLike, targets: ArrayLike | None = None) -> jax.Array:
    """Absolute error, ``|prediction - target|``; its derivative at 0 is 0.

    Args:
      predictions: floating-point, of any shape ``[...]``.
      targets: real, of the same shape or a scalar; 0 by default.

    Returns:
      One loss per element, shape ``[...]``, float32 (float64 if an argument is), in units of the targets.

    Raises:
      ValueError: if the shapes differ.
      TypeError: if the predictions are not floating-point, or the targets are complex.

    Source: Hastie, Tibshirani & Friedman, *The Elements of Statistical Learning*, 2009, section 10.6.

    >>> absolute_error(jnp.array([1.0, 3.0]), jnp.array([1.5, 1.0]))
    Array([0.5, 2. ], dtype=float32)
    """
    predicted, target = prepare_pair(predictions, targets)
    return jnp.abs(predicted - target)


def _mean_error(error, predictions, targets, where, weights):
    predicted, target = prepare_pair(predictions, targets)
    mask = None if where is None else lead_over("where", as_boolean(where), predicted.shape)
    if weights is not None:
        weights = lead_over("weights", as_weights("weights", weights), predicted.shape)
    if mask is not None:  # before the error is computed, as the derivative of a masked NaN would be NaN
        predicted, target = jnp.where(mask, predicted, 0), jnp.where(mask, target, 0)
    return weighted_mean(error(predicted, target), weights, mask)


def mean_squared_error(
    predictions: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> jax.Array:
    """Mean squared error, ``sum(w * (prediction - target)**2) / sum(w)`` over the entries kept.

    Args:
      predictions: floating-point, of any shape ``[...]``.
      targets: real, of the same shape or a scalar; 0 by default.
      where: booleans; entries that are False are left out, even if they are NaN, and get no gradient.
      weights: ``w``, real and >= 0, 1 by default. Both ``where`` and ``weights`` have the predictions' shape or its
        leading axes, such as ``[batch]`` for one value per example.

    Returns:
      A scalar, float32 (float64 if an argument is); 0 when nothing is kept or all weights are 0.

    Raises:
      ValueError: if the shapes do not match, or a weight is negative.
      TypeError: if the predictions are not floating-point, the targets or weights are complex, or ``where`` is not
        boolean.

    Source: Hastie, Tibshirani & Friedman, *The Elements of Statistical Learning*, 2009, section 2.4.

    >>> mean_squared_error(jnp.array([1.0, 3.0, 9.0]), jnp.array([1.5, 1.0, 0.0]), where=jnp.array([True, True, False]))
    Array(2.125, dtype=float32)
    """
    return _mean_error(squared_error, predictions, targets, where, weights)


def mean_absolute_error(
    predictions: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> jax.Array:
    """Mean absolute error, ``sum(w * |prediction - target|) / sum(w)`` over the entries kept.

    Args:
      predictions: floating-point, of any shape ``[...]``.
      targets: real, of the same shape or a scalar; 0 by default.
      where: booleans; entries that are False are left out, even if they are NaN, and get no gradient.
      weights: ``w``, real and >= 0, 1 by default. Both ``where`` and ``weights`` have the predictions' shape or its
        leading axes, such as ``[batch]`` for one value per example.

    Returns:
      A scalar, float32 (float64 if an argument is); 0 when nothing is kept or all weights are 0.

    Raises:
      ValueError: if the shapes do not match, or a weight is negative.
      TypeError: if the predictions are not floating-point, the targets or weights are complex, or ``where`` is not
        boolean.

    Source: Hastie, Tibshirani & Friedman, *The Elements of Statistical Learning*, 2009, section 10.6.

    >>> mean_absolute_error(jnp.array([1.0, 3.0]), jnp.array([1.5, 1.0]), weights=jnp.array([3.0, 1.0]))
    Array(0.875, dtype=float32)
    """
    return _mean_error(absolute_error, predictions, targets, where, weights)


def huber_loss(predictions: ArrayLike, targets: ArrayLike | None = None, *, delta: Scalar = 1.0) -> jax.Array:
    """Huber loss: quadratic for small errors and linear for large ones, so that outliers have a bounded gradient.

    ``error**2 / 2`` where ``|error| <= delta``, else ``delta * (|error| - delta / 2)``. The derivative is the error
    clipped to [-delta, delta].

    Args:
      predictions: floating-point, of any shape ``[...]``.
      targets: real, of the same shape or a scalar; 0 by default.
      delta: the error at which the two parts meet, in units of the targets; finite and > 0.

    Returns:
      One loss per element, shape ``[...]``, float32 (float64 if an argument is), in squared units of the targets.

    Raises:
      ValueError: if the shapes differ, or ``delta`` is out of range.
      TypeError: if the predictions are not floating-point, or the targets are complex.

    Source: Huber, *Robust estimation of a location parameter*, 1964.

    >>> huber_loss(jnp.array([0.5, -3.0]), jnp.zeros(2), delta=1.0)
    Array([0.125, 2.5  ], dtype=float32)
    """
    check_number("delta", delta, low=0.0, high=math.inf, low_open=True, high_open=True, cure="large is squared error")
    predicted, target = prepare_pair(predictions, targets)
    delta = as_hyperparam(delta, predicted.dtype)
    size = jnp.abs(predicted - target)
    # In the derivative of a sum of both parts, delta - delta would cancel the digits of small errors.
    small = size <= delta
    return jnp.where(small, 0.5 * jnp.square(jnp.where(small, size, 0)), delta * (size - 0.5 * delta))


def log_cosh(predictions: ArrayLike, targets: ArrayLike | None = None) -> jax.Array:
    """Log-cosh loss, ``log(cosh(error))``: smooth, quadratic near 0 and nearly absolute for large errors.

    It is about ``error**2 / 2`` near 0 and ``|error| - log(2)`` for large errors. Its derivative is ``tanh(error)``.

    Args:
      predictions: floating-point, of any shape ``[...]``.
      targets: real, of the same shape or a scalar; 0 by default.

    Returns:
      One loss per element, shape ``[...]``, float32 (float64 if an argument is), never below 0.

    Raises:
      ValueError: if the shapes differ.
      TypeError: if the predictions are not floating-point, or the targets are complex.

    Source: Chen et al., *Log hyperbolic cosine loss improves variational auto-encoder*, 2019.

    >>> log_cosh(jnp.array([0.0, 1e-3, 1e4]))
    Array([0.000000e+00, 5.000e-07, 9.999307e+03], dtype=float32)
    """
    predicted, target = prepare_pair(predictions, targets)
    error = predicted - target
    size = jnp.abs(error)
    small = size < 1
    # Near 0, |error| and log 2 would cancel, so use cosh**2 = 1 + sinh**2 there.
    near = 0.5 * jnp.log1p(jnp.square(jnp.sinh(jnp.where(small, error, 0))))
    return jnp.where(small, near, size + jnp.log1p(jnp.exp(-2 * size)) - math.log(2))
